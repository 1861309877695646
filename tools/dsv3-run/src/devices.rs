//! Listing dies.

use crate::cli::DevicesArgs;
use crate::output::{bold, bytes, count, dim};
use crate::system::Platform;
use hal::{DeviceId, DeviceProperties, Link, LinkKind, Topology};
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::io::Write;

pub(crate) fn run(args: &DevicesArgs) -> anyhow::Result<()> {
    let platform = Platform::start(&args.system)?;
    let topology = platform.topology()?;
    let dies: Vec<DeviceProperties> = (0..platform.dies())
        .map(|id| Ok(platform.open(DeviceId(id))?.properties().clone()))
        .collect::<Result<_, hal::Error>>()?;
    let links = links(&topology);
    let mut out = std::io::stdout().lock();
    if args.json {
        let mut report = json!({ "dies": dies, "links": links });
        about(&platform, &mut report);
        return Ok(writeln!(out, "{report:#}")?);
    }
    match &platform {
        Platform::Sim(system) => {
            let machine = system.machine();
            let name = bold(&format!("{} (simulated):", machine.name));
            writeln!(out, "{name} {}", machine.description)?;
        }
        Platform::Vacc(system) => {
            let runtime = system.runtime();
            let name = bold(&format!("{}:", system.description()));
            writeln!(out, "{name} {}, ABI {}", runtime.path(), runtime.version())?;
        }
    }
    let Some(first) = dies.first() else { return Ok(writeln!(out, "  no dies")?) };
    let distinct = |of: fn(&DeviceProperties) -> u32| dies.iter().map(of).collect::<BTreeSet<_>>();
    writeln!(
        out,
        "  {} dies of {} on {} cards in {} host(s); each {} cores, {} of memory",
        dies.len(),
        first.name,
        distinct(|d| d.placement.card).len(),
        distinct(|d| d.placement.host).len(),
        first.cores,
        bytes(first.memory_bytes),
    )?;
    for link in links {
        let (rate, latency) = (count(link.bytes_per_second), link.latency_ps as f64 * 1e-6);
        writeln!(out, "  link {:<9} {rate}B/s, {latency} us", link.kind.to_string())?;
    }
    match &platform {
        Platform::Sim(system) => constants(system, &mut out),
        Platform::Vacc(system) => readings(system, &mut out),
    }
}

/// One link of each kind but a die's own.
fn links(topology: &Topology) -> Vec<Link> {
    let dies = || (0..topology.dies() as u32).map(DeviceId);
    [LinkKind::OnCard, LinkKind::InHost, LinkKind::Network]
        .into_iter()
        .filter_map(|kind| {
            let mut pairs = dies().flat_map(|a| dies().map(move |b| (a, b)));
            let (a, b) = pairs.find(|&(a, b)| topology.kind(a, b) == Some(kind))?;
            topology.link(a, b)
        })
        .collect()
}

/// What only this backend can say, for machines.
fn about(platform: &Platform, report: &mut Value) {
    match platform {
        Platform::Sim(system) => {
            let machine = system.machine();
            let constants: serde_json::Map<_, _> =
                machine.constants().iter().map(|(name, c)| (name.clone(), json!(c))).collect();
            report["backend"] = json!("sim");
            report["machine"] = json!(machine.name);
            report["description"] = json!(machine.description);
            report["constants"] = Value::Object(constants);
        }
        Platform::Vacc(system) => {
            let runtime = system.runtime();
            report["backend"] = json!("vacc");
            report["description"] = json!(system.description());
            report["runtime"] = json!(runtime.path());
            report["abi"] = json!(runtime.version().to_string());
            report["missing_optional_functions"] = json!(runtime.missing_optional());
        }
    }
}

fn constants(system: &sim::System, out: &mut impl Write) -> anyhow::Result<()> {
    let constants = system.machine().constants();
    writeln!(out, "\n{:<24} {:>9}  {:<10} source", "constant", "value", "provenance")?;
    for (name, c) in &constants {
        let source = dim(&c.source);
        writeln!(out, "{name:<24} {:>9}  {:<10} {source}", c.value, c.provenance.to_string())?;
    }
    let assumed = system.machine().assumed().len();
    writeln!(
        out,
        "\n{assumed} of {} constants are assumed: times on this machine rest on them.",
        constants.len()
    )?;
    Ok(())
}

/// What a library's telemetry tells about each die.
fn readings(system: &vacc::System, out: &mut impl Write) -> anyhow::Result<()> {
    let missing = system.runtime().missing_optional();
    if !missing.is_empty() {
        writeln!(out, "\noptional functions that the library lacks: {}", missing.join(", "))?;
    }
    writeln!(out, "\n{:>4} {:>8} {:>8} {:>8} {:>20}", "die", "ai", "power", "temp", "memory used")?;
    for die in 0..system.dies() {
        let told = match system.telemetry(DeviceId(die)) {
            Err(hal::Error::Unsupported { .. }) => break,
            told => told?,
        };
        let say =
            |value: Option<f64>, unit: &str| value.map_or("-".into(), |v| format!("{v:.0}{unit}"));
        writeln!(
            out,
            "{die:>4} {:>8} {:>8} {:>8} {:>20}",
            say(told.ai.map(|part| part * 100.0), "%"),
            say(told.power, " W"),
            say(told.temperature, " C"),
            format!("{} of {}", bytes(told.memory_used), bytes(told.memory_capacity)),
        )?;
    }
    Ok(())
}
