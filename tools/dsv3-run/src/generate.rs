//! Generating text.

use crate::cli::GenerateArgs;
use crate::output::{bold, bytes, count, dim, picos, seconds};
use crate::source::Source;
use crate::system::{self, Provenance};
use crate::totals::{Total, Totals};
use anyhow::Context;
use model::engine::{Engine, Generation, GenerationOptions, MemoryPlan, Timing};
use model::plan::ParallelOptions;
use model::sampling::SamplingParams;
use model::tokenizer::SpecialTokens;
use report::Recorded;
use report::analysis::{Communication, StepTime};
use serde::Serialize;
use serde_json::{Value, json};
use std::io::Write;
use std::sync::Arc;
use std::time::Instant;

/// What the built-in model is asked if the user asks nothing.
const QUESTION: &str = "What is the capital of France?";

/// How many ops the table lists.
const SHOWN_OPS: usize = 5;

/// Where the time of each phase went.
#[derive(Debug, Serialize)]
struct Analysis {
    /// Until the first token was known.
    prefill: Option<StepTime>,
    /// From then on.
    decode: Option<StepTime>,
}

impl Analysis {
    fn of(recorded: &Recorded, first_moe_layer: usize) -> anyhow::Result<Analysis> {
        let phase = |number| {
            StepTime::of_phase(recorded, number, first_moe_layer).context("reading the trace back")
        };
        Ok(Analysis { prefill: phase(0)?, decode: phase(1)? })
    }
}

/// What a run measured, for the table and for JSON.
struct Report<'a> {
    source: &'a Source,
    args: &'a GenerateArgs,
    prompt: &'a [u32],
    generation: &'a Generation,
    text: String,
    /// Absent where the devices do not tell.
    ops: Option<Vec<Total>>,
    /// With `--trace`.
    analysis: Option<Analysis>,
    provenance: Provenance,
    memory: MemoryPlan,
    plan: ParallelOptions,
    ranks: usize,
    load_seconds: f64,
    run_seconds: f64,
    decode_seconds: f64,
    first_token_seconds: Option<f64>,
}

pub(crate) fn run(args: &GenerateArgs) -> anyhow::Result<()> {
    let began = Instant::now();
    let to_stdout = args.json.as_deref() == Some("-");
    let source = Source::open(&args.model)?;
    let prompt = prompt(args, &source)?;
    let mut running = system::open(&args.model, source.checkpoint.config())?;
    let tokens = prompt.len().saturating_add(args.max_tokens);
    let mut engine = source.engine(&args.model, &running, tokens, false)?;
    // Loading is over: only what the request costs is counted.
    let totals = Arc::new(Totals::default());
    let watched = running.watch(&engine, Some(totals.clone()))?;
    let options = GenerationOptions {
        max_tokens: args.max_tokens,
        sampling: SamplingParams {
            temperature: args.temperature,
            top_k: args.top_k,
            top_p: args.top_p,
            seed: args.seed,
        },
        stop_ids: source.stop_ids(),
        ignore_eos: args.ignore_eos,
        allowed: source.tokenizer.as_ref().map(|t| t.real_ids()),
    };
    let load_seconds = began.elapsed().as_secs_f64();
    if !to_stdout && !args.quiet {
        announce(args, &source, &prompt)?;
    }
    let started = Instant::now();
    let (mut first_token, mut decode_began) = (None, Instant::now());
    let mut printer = Printer::new(&source, !to_stdout);
    let mut told = Ok(());
    let generation = engine.generate(&prompt, &options, &mut |token| {
        if first_token.is_none() {
            first_token = Some(began.elapsed().as_secs_f64());
            decode_began = Instant::now();
            told = running.trace.as_ref().map_or(Ok(()), |trace| trace.next_phase());
        }
        printer.token(token);
    })?;
    told?;
    let run_seconds = started.elapsed().as_secs_f64();
    let decode_seconds = decode_began.elapsed().as_secs_f64();
    let text = printer.finish()?;
    // The rank that needs the most.
    let memory = engine.memory().iter().copied().max_by_key(MemoryPlan::total).unwrap_or_default();
    let plan = engine.plan().options();
    let ranks = engine.plan().ranks();
    let first_moe_layer = engine.config().first_k_dense_replace;
    let analysis = match running.end_watch(&engine)? {
        Some(recorded) => Some(Analysis::of(&recorded, first_moe_layer)?),
        None => None,
    };
    release(engine, &running)?;
    let report = Report {
        source: &source,
        args,
        prompt: &prompt,
        generation: &generation,
        text,
        ops: watched.then(|| totals.ranked()),
        analysis,
        provenance: running.provenance(),
        memory,
        plan,
        ranks,
        load_seconds,
        run_seconds,
        decode_seconds,
        first_token_seconds: first_token,
    };
    match args.json.as_deref() {
        Some("-") => writeln!(std::io::stdout(), "{}", report.json())?,
        Some(file) => std::fs::write(file, format!("{:#}\n", report.json()))
            .with_context(|| format!("writing {file}"))?,
        None => {}
    }
    if !to_stdout && !args.quiet {
        write!(std::io::stdout(), "{}", report.table())?;
    }
    Ok(())
}

fn prompt(args: &GenerateArgs, source: &Source) -> anyhow::Result<Vec<u32>> {
    match (&args.token_ids, &args.prompt, &args.chat) {
        (Some(ids), ..) => Ok(ids.0.clone()),
        (_, Some(text), _) => source.raw(text),
        (_, _, Some(message)) => source.chat(message),
        _ => source.chat(QUESTION),
    }
}

/// Says what was asked, before the answer.
fn announce(args: &GenerateArgs, source: &Source, prompt: &[u32]) -> std::io::Result<()> {
    let asked = match (&args.token_ids, &args.prompt, &args.chat) {
        (Some(_), ..) => format!("{} token ids", prompt.len()),
        (_, Some(text), _) => text.clone(),
        (_, _, Some(message)) => message.clone(),
        _ => QUESTION.to_string(),
    };
    let mut out = std::io::stdout();
    writeln!(out, "{} {}", dim(&format!("{} >", source.name)), asked)
}

/// Frees everything, and with `--validate` makes sure that it is freed.
fn release(engine: Engine, running: &system::Running) -> anyhow::Result<()> {
    drop(engine);
    match running.leaks() {
        0 => running.finish(),
        n => anyhow::bail!("--validate: {n} buffers are still allocated at the end"),
    }
}

/// Prints text as tokens come.
struct Printer {
    decoder: Option<model::tokenizer::StreamDecoder>,
    text: String,
    show: bool,
    failed: Option<std::io::Error>,
}

impl Printer {
    fn new(source: &Source, show: bool) -> Self {
        let decoder = source.tokenizer.as_ref().map(|t| t.stream(SpecialTokens::Skip));
        Printer { decoder, text: String::new(), show, failed: None }
    }

    fn token(&mut self, token: u32) {
        match &mut self.decoder {
            Some(decoder) => {
                let piece = decoder.push(token);
                self.print(&piece);
                self.text.push_str(&piece);
            }
            None => self.print(&format!("{token} ")),
        }
    }

    fn print(&mut self, piece: &str) {
        if self.show && self.failed.is_none() && !piece.is_empty() {
            let mut out = std::io::stdout();
            self.failed = write!(out, "{piece}").and_then(|()| out.flush()).err();
        }
    }

    fn finish(mut self) -> std::io::Result<String> {
        let rest = self.decoder.as_mut().map(|d| d.finish()).unwrap_or_default();
        self.print(&rest);
        self.text.push_str(&rest);
        self.print("\n");
        self.failed.map_or(Ok(self.text), Err)
    }
}

/// Tokens per second, if any time passed.
fn rate(tokens: usize, ps: u64) -> Option<f64> {
    (ps > 0).then(|| tokens as f64 / (ps as f64 * 1e-12))
}

impl Report<'_> {
    /// Tokens after the first, which prefill gives.
    fn decoded(&self) -> usize {
        self.generation.token_ids.len().saturating_sub(1)
    }

    fn json(&self) -> Value {
        let timing = self.generation.timing.map(|t| self.timing_json(t));
        json!({
            "model": self.source.name,
            "numerics": self.args.model.numerics.name(),
            "prompt_token_ids": self.prompt,
            "token_ids": self.generation.token_ids,
            "text": self.source.tokenizer.is_some().then_some(&self.text),
            "finish_reason": self.generation.finish_reason,
            "timing": timing,
            "analysis": self.analysis,
            "wall": {
                "clock": "host",
                "load_s": self.load_seconds,
                "first_token_s": self.first_token_seconds,
                "run_s": self.run_seconds,
                "decode_tokens_per_s": self.decoded() as f64 / self.decode_seconds,
                "tokens_per_s": self.generation.token_ids.len() as f64 / self.run_seconds,
            },
            "memory": {
                "weights_bytes": self.memory.weights,
                "cache_bytes": self.memory.cache,
                "workspace_bytes": self.memory.workspace,
                "communication_bytes": self.memory.communication,
            },
            "ranks": self.ranks,
            "plan": self.plan,
        })
    }

    fn timing_json(&self, timing: Timing) -> Value {
        let Timing { clock, prefill_ps, decode_ps } = timing;
        json!({
            "clock": clock,
            "machine": self.provenance.machine,
            "prefill_ms": prefill_ps as f64 * 1e-9,
            "decode_ms": decode_ps as f64 * 1e-9,
            "ttft_ms": prefill_ps as f64 * 1e-9,
            "tpot_ms": (self.decoded() > 0).then(|| decode_ps as f64 * 1e-9 / self.decoded() as f64),
            "prefill_tokens_per_s": rate(self.prompt.len(), prefill_ps),
            "decode_tokens_per_s": rate(self.decoded(), decode_ps),
            "ops": self.ops,
            "assumed": self.provenance.assumed.as_ref().map(|(names, _)| names),
        })
    }

    fn table(&self) -> String {
        let mut out = String::from("\n");
        if let Some(timing) = self.generation.timing {
            self.timing_table(timing, &mut out);
        }
        let wall = format!(
            "{} for {} tokens = {} tokens/s, after {} to load {}",
            seconds(self.run_seconds),
            self.generation.token_ids.len(),
            count(self.generation.token_ids.len() as f64 / self.run_seconds),
            seconds(self.load_seconds),
            bytes(self.memory.weights),
        );
        out += &format!("{} {wall}\n", bold("host wall time:"));
        out += &dim(&self.provenance.sentence(self.generation.timing.is_some()));
        out.push('\n');
        out
    }

    /// With `--trace` and several dies: how much of the communication hides.
    fn communication_table(&self, out: &mut String) {
        let Some(Analysis { prefill, decode }) = &self.analysis else { return };
        let phases = [("prefill", prefill), ("decode", decode)];
        let phases = phases.map(|(name, step)| Some((name, step.as_ref()?.mean.communication)));
        let mut phases = phases.into_iter().flatten().filter(|(_, c)| c.busy_ps > 0).peekable();
        if phases.peek().is_some() {
            out.push_str(&format!(
                "  {:<18} {:>10} {:>10} {:>7}  (mean of the dies)\n",
                "communication", "busy", "exposed", "hidden"
            ));
        }
        for (name, communication) in phases {
            let Communication { busy_ps, exposed_ps, hidden_share, .. } = communication;
            let hidden = 100.0 * hidden_share.unwrap_or_default();
            out.push_str(&format!(
                "    {name:<16} {:>10} {:>10} {hidden:>6.1}%\n",
                picos(busy_ps),
                picos(exposed_ps)
            ));
        }
    }

    fn timing_table(&self, timing: Timing, out: &mut String) {
        let dies = match self.ranks {
            1 => "one die".to_string(),
            n => format!("{n} dies"),
        };
        let heading = format!(
            "{} time, {dies} of {}, {}:",
            timing.clock, self.provenance.machine, self.args.model.numerics
        );
        out.push_str(&bold(&heading));
        out.push('\n');
        let mut row = |what: &str, tokens: usize, ps: u64| {
            let rate = rate(tokens, ps).map_or("-".to_string(), count);
            out.push_str(&format!(
                "  {what:<8} {tokens:>6} tokens {:>10} {rate:>9} tokens/s\n",
                picos(ps)
            ));
        };
        row("prefill", self.prompt.len(), timing.prefill_ps);
        row("decode", self.decoded(), timing.decode_ps);
        self.communication_table(out);
        let Some(ops) = &self.ops else {
            out.push_str("  no breakdown by op: the devices do not say what took how long\n");
            return;
        };
        let all: u64 = ops.iter().map(|t| t.picos).sum();
        if all == 0 {
            return;
        }
        out.push_str(&format!(
            "  {:<18} {:>6} {:>10} {:>6}  {}\n",
            "most expensive op", "calls", "time", "share", "bound by"
        ));
        for op in ops.iter().take(SHOWN_OPS) {
            let share = 100.0 * op.picos as f64 / all as f64;
            out.push_str(&format!(
                "  {:<18} {:>6} {:>10} {share:>5.1}%  {}\n",
                op.op,
                op.calls,
                picos(op.picos),
                op.bound
            ));
        }
    }
}
