//! `perf validate`: published measurements against the model.

use crate::output::{bold, dim};
use clap::Args;
use perf::Published;
use serde_json::json;
use sim::Machine;
use sim::cost::question::Question;
use sim::cost::validation::{Exact, Metric, Outcome, mean_and_worst, predict, rows};
use std::io::Write;

#[derive(Args, Clone, Debug)]
pub(crate) struct ValidateArgs {
    /// Print one JSON object and nothing else.
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: &ValidateArgs) -> anyhow::Result<()> {
    let (rows, exact) = rows().map_err(anyhow::Error::msg)?;
    let outcomes: Vec<Outcome> =
        rows.iter().map(predict).collect::<Result<_, _>>().map_err(anyhow::Error::msg)?;
    let mut groups: Vec<&str> = outcomes.iter().map(|o| o.row.group.as_str()).collect();
    groups.dedup();
    let systems = perf::published()?;
    let mut out = std::io::stdout().lock();
    if args.json {
        let mut report = as_json(&groups, &outcomes, &exact);
        report["systems"] = json!(systems);
        return Ok(writeln!(out, "{report:#}")?);
    }
    for group in groups {
        let of_group: Vec<&Outcome> = outcomes.iter().filter(|o| o.row.group == group).collect();
        let (mean, worst) = mean_and_worst(of_group.iter().copied());
        let unit = of_group.first().map_or("", |o| unit(o.row.metric));
        let sources: Vec<&str> = of_group.iter().map(|o| o.row.source.as_str()).collect();
        writeln!(out, "{} {}", bold(group), dim(sources.first().unwrap_or(&"")))?;
        let head = ["measured", "predicted", "error"];
        writeln!(out, "  {:<52} {:>10} {:>10} {:>8}", unit, head[0], head[1], head[2])?;
        for o in &of_group {
            let note = match &o.row.calibrates {
                Some(constant) => dim(&format!("  chose {constant}")),
                None => String::new(),
            };
            writeln!(
                out,
                "  {:<52} {:>10.1} {:>10.1} {:>+7.1}%{note}",
                words(&o.row.question),
                o.row.measured,
                o.predicted,
                o.error * 100.0
            )?;
        }
        writeln!(out, "  mean absolute error {:.1}%, worst {:.1}%\n", mean * 100.0, worst * 100.0)?;
    }
    systems_text(&systems, &mut out)?;
    writeln!(out, "{}", bold("Exact by arithmetic"))?;
    for e in &exact {
        let (got, expected) = (e.value(), e.published);
        let verdict = if got == expected { "exact" } else { "DIFFERS" };
        writeln!(out, "  {} {} {}: {got} {}, published {expected}", e.id, verdict, e.what, e.unit)?;
        writeln!(out, "      {}", dim(&e.source))?;
    }
    let held_out = outcomes.iter().filter(|o| o.row.calibrates.is_none());
    let (mean, _) = mean_and_worst(held_out.clone());
    writeln!(
        out,
        "\n{} of {} rows are held out: no constant was chosen with them, though the form of the model was \
         made with this table in view. Over these the mean absolute error is {:.1}%.\nTimes are simulated kernel times, without the gap between kernels.",
        held_out.count(),
        outcomes.len(),
        mean * 100.0
    )?;
    Ok(())
}

fn systems_text(systems: &[Published], out: &mut impl Write) -> anyhow::Result<()> {
    writeln!(out, "{} {}", bold("Whole systems"), dim("tokens/s for each die"))?;
    let head = ["measured", "predicted", "error"];
    writeln!(out, "  {:<84} {:>10} {:>10} {:>8}", "", head[0], head[1], head[2])?;
    for row in systems {
        let what = format!("{}: {}", row.id, row.what);
        let note = if row.comparable { "" } else { "  for the record" };
        writeln!(
            out,
            "  {what:<84} {:>10.0} {:>10.0} {:>+7.1}%{}",
            row.measured,
            row.predicted,
            row.error * 100.0,
            dim(note)
        )?;
    }
    Ok(writeln!(out)?)
}

fn as_json(groups: &[&str], outcomes: &[Outcome], exact: &[Exact]) -> serde_json::Value {
    let kernels = Machine::named("h800").map(|m| m.kernels.generation).unwrap_or_default();
    let rows: Vec<_> = outcomes
        .iter()
        .map(|o| {
            json!({
                "group": o.row.group,
                "machine": o.row.machine,
                "question": o.row.question,
                "metric": o.row.metric,
                "measured": o.row.measured,
                "predicted": o.predicted,
                "error_percent": o.error * 100.0,
                "source": o.row.source,
                "held_out": o.row.calibrates.is_none(),
                "calibrates": o.row.calibrates,
            })
        })
        .collect();
    let summary: Vec<_> = groups
        .iter()
        .map(|group| {
            let of_group = || outcomes.iter().filter(|o| o.row.group == *group);
            let (mean, worst) = mean_and_worst(of_group());
            let (held_out, _) = mean_and_worst(of_group().filter(|o| o.row.calibrates.is_none()));
            json!({
                "group": group,
                "rows": of_group().count(),
                "mean_absolute_error_percent": mean * 100.0,
                "worst_absolute_error_percent": worst * 100.0,
                "held_out_mean_absolute_error_percent": held_out * 100.0,
            })
        })
        .collect();
    let exact: Vec<_> = exact
        .iter()
        .map(|e| {
            json!({
                "id": e.id,
                "what": e.what,
                "published": e.published,
                "computed": e.value(),
                "unit": e.unit,
                "exact": e.value() == e.published,
                "source": e.source,
            })
        })
        .collect();
    json!({
        "clock": "simulated",
        "kernels": kernels,
        "groups": summary,
        "rows": rows,
        "exact": exact,
    })
}

fn unit(metric: Metric) -> &'static str {
    match metric {
        Metric::Tflops => "TFLOPS",
        Metric::GbPerS => "GB/s",
        Metric::TimeUs => "microseconds",
    }
}

fn words(question: &Question) -> String {
    match *question {
        Question::Gemm { m, n, k, .. } => format!("{m} x {n} x {k}"),
        Question::GroupedGemm { groups, m, n, k, masked, .. } => {
            format!("{groups} groups of {m} x {n} x {k}{}", if masked { ", masked" } else { "" })
        }
        Question::MlaDecode { batch, kv, heads, queries, .. } => {
            format!("{batch} sequences, {kv} keys, {heads} heads, {queries} queries")
        }
        Question::MlaPrefill { tokens, heads, batch } => {
            format!("{batch} x {tokens} tokens, {heads} heads")
        }
        Question::Collective { collective, ranks, bytes } => {
            format!("{} of {bytes} B over {ranks}", collective.name())
        }
        Question::Moe { combine, ep, tokens, network_only, .. } => format!(
            "EP{ep} {}, {tokens} tokens{}",
            if combine { "combine" } else { "dispatch" },
            if network_only { ", all over the network" } else { "" }
        ),
    }
}
