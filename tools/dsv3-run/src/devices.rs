//! Listing dies.

use crate::cli::DevicesArgs;
use crate::output::{bold, bytes, count, dim};
use crate::system;
use hal::{DeviceId, DeviceProperties, Link, LinkKind};
use serde_json::json;
use std::io::Write;

pub(crate) fn run(args: &DevicesArgs) -> anyhow::Result<()> {
    let running = system::open(&args.system)?;
    let (machine, topology) = (running.system.machine(), running.system.topology());
    let dies: Vec<DeviceProperties> = (0..machine.dies())
        .map(|id| Ok(running.system.open(DeviceId(id))?.properties().clone()))
        .collect::<Result<_, hal::Error>>()?;
    let links: Vec<Link> = [LinkKind::OnCard, LinkKind::InHost, LinkKind::Network]
        .into_iter()
        .filter_map(|kind| {
            let other = (1..machine.dies()).map(DeviceId);
            let mut with = other.filter(|&d| topology.kind(DeviceId(0), d) == Some(kind));
            topology.link(DeviceId(0), with.next()?)
        })
        .collect();
    let constants = machine.constants();
    let mut out = std::io::stdout().lock();
    if args.json {
        let constants: serde_json::Map<_, _> =
            constants.iter().map(|(name, c)| (name.clone(), json!(c))).collect();
        let report = json!({
            "backend": "sim",
            "machine": machine.name,
            "description": machine.description,
            "dies": dies,
            "links": links,
            "constants": constants,
        });
        return Ok(writeln!(out, "{report:#}")?);
    }
    writeln!(out, "{} {}", bold(&format!("{} (simulated):", machine.name)), machine.description)?;
    let s = &machine.system;
    writeln!(
        out,
        "  {} dies: {} host(s) x {} cards x {} dies; each {} cores, {} of memory",
        machine.dies(),
        s.hosts,
        s.cards_per_host,
        s.dies_per_card,
        dies[0].cores,
        bytes(dies[0].memory_bytes),
    )?;
    for link in links {
        let (rate, latency) = (count(link.bytes_per_second), link.latency_ps as f64 * 1e-6);
        writeln!(out, "  link {:<9} {rate}B/s, {latency} us", link.kind.to_string())?;
    }
    writeln!(out, "\n{:<24} {:>9}  {:<10} source", "constant", "value", "provenance")?;
    for (name, c) in &constants {
        let source = dim(&c.source);
        writeln!(out, "{name:<24} {:>9}  {:<10} {source}", c.value, c.provenance.to_string())?;
    }
    let assumed = machine.assumed().len();
    writeln!(
        out,
        "\n{assumed} of {} constants are assumed: times on this machine rest on them.",
        constants.len()
    )?;
    Ok(())
}
