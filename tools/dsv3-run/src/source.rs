//! The model to run: a folder, or the tiny one that is part of the program.

use crate::cli::ModelArgs;
use crate::output::Progress;
use crate::system::Running;
use anyhow::Context;
use model::chat::{ChatTemplate, Message, RenderOptions};
use model::checkpoint::Checkpoint;
use model::config::{ModelConfig, Preset};
use model::engine::{Engine, EngineOptions};
use model::tokenizer::{AddBos, Tokenizer};
use std::path::Path;

macro_rules! tiny {
    ($($name:literal),+ $(,)?) => {
        &[$(($name, include_bytes!(concat!("../../../models/tiny-dsv3/", $name)) as &[u8])),+]
    };
}

/// The built-in checkpoint: 6.9 M parameters, trained to answer a few kinds of questions.
static TINY: &[(&str, &[u8])] = tiny![
    "config.json",
    "generation_config.json",
    "model-00001-of-000003.safetensors",
    "model-00002-of-000003.safetensors",
    "model-00003-of-000003.safetensors",
    "model.safetensors.index.json",
    "tokenizer.json",
    "tokenizer_config.json",
];

/// A checkpoint with its tokenizer, if it has one.
#[derive(Debug)]
pub(crate) struct Source {
    pub(crate) checkpoint: Checkpoint,
    pub(crate) tokenizer: Option<Tokenizer>,
    pub(crate) name: String,
}

impl Source {
    pub(crate) fn open(args: &ModelArgs) -> anyhow::Result<Source> {
        let (checkpoint, name) = match &args.model {
            Some(dir) => (Checkpoint::open(dir)?, dir.display().to_string()),
            None => (Checkpoint::from_memory(TINY)?, "built-in tiny-dsv3".to_string()),
        };
        let tokenizer = match checkpoint.aux_file("tokenizer.json")? {
            Some(json) => {
                let config = checkpoint.aux_file("tokenizer_config.json")?;
                let generation = checkpoint.aux_file("generation_config.json")?;
                let tokenizer =
                    Tokenizer::from_bytes(&json, config.as_deref(), generation.as_deref())
                        .with_context(|| format!("tokenizer of {name}"))?;
                Some(tokenizer)
            }
            None => None,
        };
        Ok(Source { checkpoint, tokenizer, name })
    }

    /// The tokenizer, or an error that says what to do without one.
    pub(crate) fn tokenizer(&self) -> anyhow::Result<&Tokenizer> {
        let hint = "it has no tokenizer.json; give the prompt as --token-ids 1,2,3";
        self.tokenizer.as_ref().with_context(|| format!("{}: {hint}", self.name))
    }

    /// A user's message as the model wants it.
    pub(crate) fn chat(&self, message: &str) -> anyhow::Result<Vec<u32>> {
        let tokenizer = self.tokenizer()?;
        let config = self.checkpoint.aux_file("tokenizer_config.json")?.unwrap_or_default();
        let jinja = self.checkpoint.aux_file("chat_template.jinja")?;
        let jinja = jinja.as_deref().map(std::str::from_utf8).transpose();
        let jinja = jinja.context("chat_template.jinja is not UTF-8")?;
        let template =
            ChatTemplate::from_config(if config.is_empty() { b"{}" } else { &config }, jinja)?;
        let text = template.render(&[Message::user(message)], &RenderOptions::default())?;
        Ok(tokenizer.encode(&text, AddBos::Never)?)
    }

    /// Raw text, with one BOS in front where the checkpoint wants it.
    pub(crate) fn raw(&self, text: &str) -> anyhow::Result<Vec<u32>> {
        Ok(self.tokenizer()?.encode(text, AddBos::IfConfigured)?)
    }

    /// Tokens that end a text.
    pub(crate) fn stop_ids(&self) -> Vec<u32> {
        let mut ids = self.checkpoint.config().eos_token_ids.clone();
        ids.extend(self.tokenizer.iter().flat_map(Tokenizer::eos_ids));
        ids.sort_unstable();
        ids.dedup();
        ids
    }

    /// Loads the model for sequences of `tokens` tokens, or of `--max-model-len`.
    pub(crate) fn engine(
        &self,
        args: &ModelArgs,
        running: &Running,
        tokens: usize,
        mtp: bool,
    ) -> anyhow::Result<Engine> {
        let limit = self.checkpoint.config().max_position_embeddings;
        let max_model_len = args.max_model_len.unwrap_or_else(|| tokens.min(limit).max(1));
        let options = EngineOptions {
            numerics: args.numerics,
            max_model_len,
            prefill_chunk: args.prefill_chunk.max(1),
            vocabulary: self.tokenizer.as_ref().map(Tokenizer::vocab_size),
            mtp,
            overlap: args.parallel.overlap.into(),
            fuse: !args.parallel.no_fusion,
            enforce_eager: args.parallel.enforce_eager,
            timeout: args.step_timeout(),
            ..EngineOptions::default()
        };
        let plan = args.parallel.plan(self.checkpoint.config(), &running.platform.topology()?)?;
        let mut progress = Progress::new("loading");
        let devices = running.devices();
        let engine = Engine::load_on(devices, plan, &self.checkpoint, options, &mut |p| {
            progress.update(p.done, p.total);
        });
        progress.finish();
        engine.with_context(|| format!("model {}", self.name))
    }
}

/// A configuration by preset, by file or by folder; the built-in model's if nothing is named.
pub(crate) fn config(name: Option<&str>) -> anyhow::Result<ModelConfig> {
    match name {
        Some(name) => named_config(name),
        None => Ok(Checkpoint::from_memory(TINY)?.config().clone()),
    }
}

/// A configuration by preset, or from a `config.json` or the folder that holds one.
pub(crate) fn named_config(name: &str) -> anyhow::Result<ModelConfig> {
    if let Some(preset) = Preset::ALL.into_iter().find(|p| p.name() == name) {
        return Ok(preset.config());
    }
    let path = Path::new(name);
    let path = if path.is_dir() { path.join("config.json") } else { path.to_path_buf() };
    let presets = Preset::ALL.map(Preset::name).join(", ");
    let text = std::fs::read_to_string(&path)
        .with_context(|| format!("{name:?} is neither a preset ({presets}) nor a readable file"))?;
    ModelConfig::from_json(text.as_bytes()).with_context(|| path.display().to_string())
}
