//! The speed claims of the README, measured in one run: ratios, since hosts differ.

use anyhow::{Context, ensure};
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Tokens that a run decodes; the tiny model's context stays short, as in a chat.
const TINY_TOKENS: usize = 64;
const LARGE_TOKENS: usize = 48;

/// Runs of each kind; the best counts, since other load on the host only ever slows a run down.
const RUNS: usize = 7;

/// Measures and prints. With a Python that has the oracle's requirements, transformers too.
pub(crate) fn measure(root: &Path, python: Option<&Path>) -> anyhow::Result<()> {
    crate::cargo(&["build", "--release", "--locked", "--package", "dsv3-run"], &[])?;
    let tool = root.join("target/release/dsv3-run");
    let large = root.join("target/speed/1gb");
    if !large.is_dir() {
        let out = large.to_str().context("the repository's path is not UTF-8")?;
        run(&tool, &["checkpoint", "synth", "--config", "1gb", "--out", out])?;
    }
    let threads = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let bandwidth = sim::host::read_bandwidth(threads)?;
    println!("host: {threads} threads read {:.1} GB/s", bandwidth * 1e-9);

    let prompt: Vec<String> = (0..32).map(|i| (i * 29 % 1000).to_string()).collect();
    let prompt = prompt.join(",");
    let tokens = TINY_TOKENS.to_string();
    let tiny = ["--token-ids", &prompt, "--max-tokens", &tokens, "--ignore-eos", "--json", "-"];
    // Alternating, so that a slow spell of the host meets both.
    let (mut timed, mut untimed) = (0f64, 0f64);
    for _ in 0..RUNS {
        timed = timed.max(rate(&run(&tool, &tiny)?)?);
        untimed = untimed.max(rate(&run(&tool, &[&tiny[..], &["--timing", "off"]].concat())?)?);
    }
    println!("tiny model, fp8: {timed:.0} tokens/s with the time model, {untimed:.0} without");
    println!("  the time model costs {:.1}%", 100.0 * (untimed / timed - 1.0));

    let folder = large.to_str().context("the repository's path is not UTF-8")?;
    let tokens = LARGE_TOKENS.to_string();
    let args = [
        "--model",
        folder,
        "--token-ids",
        &prompt,
        "--max-tokens",
        &tokens,
        "--ignore-eos",
        "--json",
        "-",
    ];
    let (mut decoded, mut first) = (0f64, f64::INFINITY);
    for _ in 0..RUNS {
        let report = run(&tool, &args)?;
        decoded = decoded.max(rate(&report)?);
        first = first.min(report["wall"]["first_token_s"].as_f64().context("no first_token_s")?);
    }
    let inspected = run(&tool, &["checkpoint", "inspect", "--config", "1gb", "--json"])?;
    let bytes = inspected["active"]["bytes"].as_f64().context("no active bytes")?;
    println!("1 GB model, fp8: {decoded:.1} tokens/s, {:.2} s from start to first token", first);
    println!(
        "  weights are read at {:.1} GB/s = {:.0}% of the read bandwidth",
        decoded * bytes * 1e-9,
        100.0 * decoded * bytes / bandwidth
    );

    let Some(python) = python else {
        println!("transformers not measured: give --python with oracle/requirements.txt installed");
        return Ok(());
    };
    for (name, checkpoint, ours, new) in [
        ("tiny model", root.join("models/tiny-dsv3"), timed, TINY_TOKENS),
        ("1 GB model", large, decoded, 24),
    ] {
        for dtype in ["f32", "bf16"] {
            let (bare, generate) = transformers(root, python, &checkpoint, dtype, new)?;
            println!(
                "{name}, transformers in {dtype}: bare decode loop {bare:.1} tokens/s, ours is {:.1} times that; \
                 generate() {generate:.1} tokens/s, ours is {:.1} times that",
                ours / bare,
                ours / generate
            );
        }
    }
    Ok(())
}

fn run(tool: &Path, args: &[&str]) -> anyhow::Result<Value> {
    let output = Command::new(tool).args(args).output().context("starting dsv3-run")?;
    let errors = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "dsv3-run {} failed: {errors}", args.join(" "));
    if output.stdout.is_empty() {
        return Ok(Value::Null);
    }
    Ok(serde_json::from_slice(&output.stdout)?)
}

fn rate(report: &Value) -> anyhow::Result<f64> {
    report["wall"]["decode_tokens_per_s"].as_f64().context("no decode_tokens_per_s")
}

fn transformers(
    root: &Path,
    python: &Path,
    checkpoint: &Path,
    dtype: &str,
    new: usize,
) -> anyhow::Result<(f64, f64)> {
    let script: PathBuf = root.join("oracle/decode_speed.py");
    let output = Command::new(python)
        .arg(script)
        .arg(checkpoint)
        .args(["--dtype", dtype, "--new", &new.to_string()])
        .output()
        .context("starting Python")?;
    let errors = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "decode_speed.py failed: {errors}");
    let report: Value = serde_json::from_slice(&output.stdout)?;
    let rate = |key: &str| {
        report[key].as_f64().with_context(|| format!("decode_speed.py reports no {key}"))
    };
    Ok((rate("tokens_per_s")?, rate("generate_tokens_per_s")?))
}
