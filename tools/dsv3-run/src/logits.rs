//! Writing logits for comparison with other implementations.

use crate::cli::LogitsArgs;
use crate::source::Source;
use crate::system;
use anyhow::Context;
use safetensors::Dtype;
use safetensors::tensor::TensorView;
use std::io::Write;

pub(crate) fn run(args: &LogitsArgs) -> anyhow::Result<()> {
    let source = Source::open(&args.model)?;
    let mut running = system::open(&args.model, source.checkpoint.config())?;
    let tokens = &args.token_ids.0;
    let mtp = source.checkpoint.has_mtp()?;
    let mut engine = source.engine(&args.model, &running, tokens.len(), mtp)?;
    running.watch(&engine, None)?;
    let (logits, mtp_logits) = engine.all_logits(tokens)?;
    let vocabulary = engine.config().vocab_size;
    running.end_watch(&engine)?;
    drop(engine);
    running.finish()?;
    let mut tensors = vec![("logits", to_bytes(&logits))];
    tensors.extend(mtp_logits.map(|l| ("mtp_logits", to_bytes(&l))));
    let views: Vec<_> = tensors
        .iter()
        .map(|(name, data)| {
            let shape = vec![data.len() / 4 / vocabulary, vocabulary];
            TensorView::new(Dtype::F32, shape, data).map(|view| (*name, view))
        })
        .collect::<Result<_, _>>()
        .context("describing the logits")?;
    let shapes: Vec<String> =
        views.iter().map(|(name, view)| format!("{name} {:?}", view.shape())).collect();
    write_whole(&args.out, &safetensors::serialize(views, None).context("encoding the logits")?)?;
    let summary =
        format!("{} in {}: wrote {}", shapes.join(", "), args.model.numerics, args.out.display());
    writeln!(std::io::stderr(), "{summary}")?;
    Ok(())
}

fn to_bytes(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_le_bytes()).collect()
}

/// Writes a file so that it is there whole or not at all.
fn write_whole(path: &std::path::Path, data: &[u8]) -> anyhow::Result<()> {
    let mut partial = path.as_os_str().to_owned();
    partial.push(".partial");
    let partial = std::path::PathBuf::from(partial);
    let written = std::fs::write(&partial, data).and_then(|()| std::fs::rename(&partial, path));
    if written.is_err() {
        let _ = std::fs::remove_file(&partial);
    }
    written.with_context(|| format!("writing {}", path.display()))
}
