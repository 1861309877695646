//! Exact-match accuracy over questions with known answers.

use crate::cli::EvalArgs;
use crate::output::seconds;
use crate::source::Source;
use crate::system;
use anyhow::Context;
use model::engine::GenerationOptions;
use model::sampling::SamplingParams;
use model::tokenizer::SpecialTokens;
use serde::Deserialize;
use serde_json::json;
use std::io::Write;
use std::time::Instant;

/// Questions of the kinds that the built-in model was trained on.
const QUESTIONS: &str = include_str!("../../../models/tiny-dsv3/questions.json");

#[derive(Debug, Deserialize)]
struct Question {
    question: String,
    answer: String,
}

pub(crate) fn run(args: &EvalArgs) -> anyhow::Result<()> {
    let mut questions = questions(args)?;
    questions.truncate(args.limit.unwrap_or(usize::MAX));
    let source = Source::open(&args.model)?;
    let prompts =
        questions.iter().map(|q| source.chat(&q.question)).collect::<Result<Vec<_>, _>>()?;
    let longest = prompts.iter().map(Vec::len).max().unwrap_or(1);
    let mut running = system::open(&args.model, source.checkpoint.config())?;
    let mut engine = source.engine(&args.model, &running, longest + args.max_tokens, false)?;
    let options = GenerationOptions {
        max_tokens: args.max_tokens,
        sampling: SamplingParams::greedy(),
        stop_ids: source.stop_ids(),
        ignore_eos: false,
        allowed: source.tokenizer.as_ref().map(|t| t.real_ids()),
    };
    running.watch(&engine, None)?;
    let began = Instant::now();
    let (mut exact, mut tokens, mut wrong) = (0, 0, Vec::new());
    for (question, prompt) in questions.iter().zip(&prompts) {
        let generation = engine.generate(prompt, &options, &mut |_| {})?;
        tokens += generation.token_ids.len();
        let text = source.tokenizer()?.decode(&generation.token_ids, SpecialTokens::Skip);
        if text == question.answer {
            exact += 1;
        } else {
            wrong.push(json!({
                "question": question.question,
                "expected": question.answer,
                "answer": text,
            }));
        }
    }
    running.end_watch(&engine)?;
    drop(engine);
    running.finish()?;
    let accuracy = exact as f64 / questions.len().max(1) as f64;
    let mut out = std::io::stdout();
    if args.json {
        let report = json!({
            "model": source.name,
            "numerics": args.model.numerics.name(),
            "questions": questions.len(),
            "exact": exact,
            "accuracy": accuracy,
            "generated_tokens": tokens,
            "wall_s": began.elapsed().as_secs_f64(),
            "wrong": wrong,
        });
        return Ok(writeln!(out, "{report:#}")?);
    }
    for w in &wrong {
        writeln!(
            out,
            "{}\n  expected {}\n  answer   {}",
            w["question"], w["expected"], w["answer"]
        )?;
    }
    let wall = seconds(began.elapsed().as_secs_f64());
    let numerics = args.model.numerics;
    let total = questions.len();
    writeln!(
        out,
        "{numerics}: {exact} of {total} exact ({:.2}%), {tokens} tokens in {wall}",
        100.0 * accuracy
    )?;
    Ok(())
}

fn questions(args: &EvalArgs) -> anyhow::Result<Vec<Question>> {
    let (text, name) = match &args.questions {
        Some(path) => {
            let text = std::fs::read_to_string(path)
                .with_context(|| format!("reading {}", path.display()))?;
            (text, path.display().to_string())
        }
        None => (QUESTIONS.to_string(), "the built-in questions".to_string()),
    };
    serde_json::from_str(&text)
        .with_context(|| format!("{name}: expected a list of {{\"question\", \"answer\"}}"))
}
