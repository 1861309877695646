//! DeepSeek-V3 checkpoints in the released form: opening, checking, describing and making them.
//!
//! A checkpoint is a Hugging Face folder: `config.json`, and either `model.safetensors` or shards
//! with `model.safetensors.index.json`. Linear weights are FP8 E4M3 with one F32 scale per
//! 128 x 128 block in a tensor of their own, possibly in another shard (the value of a weight is
//! its FP8 value *times* its scale); everything else is BF16, the routing bias F32.
//!
//! [`Checkpoint::open`] parses all headers and touches no tensor data; files are memory-mapped.
//! [`Checkpoint::weight`] resolves one weight with its scales and checks both against the
//! [`layout`] of the configuration.

mod error;
mod files;
mod footprint;
mod fp8;
mod header;
mod index;
mod inspect;
pub mod layout;
mod map;
mod role;
mod synth;
mod weight;

use std::{borrow::Cow, collections::HashMap, ops::Range, path::Path};

pub use error::{CheckpointError, HeaderError};
pub use footprint::Footprint;
pub use fp8::check_fp8_nan;
pub use inspect::{
    ConfigSummary, DtypeTally, FileTally, Inspection, Listing, Mismatch, MtpState, inspect,
    inspect_config,
};
pub use safetensors::Dtype;
pub use synth::{SynthError, SynthOptions, synthesize};
pub use weight::{BlockScales, Weight};

use self::{
    files::{Contents, Files},
    index::{INDEX_FILE, Index},
    layout::{Role, TensorSpec},
};
use crate::config::ModelConfig;

const CONFIG_FILE: &str = "config.json";
const SINGLE_FILE: &str = "model.safetensors";

/// An open checkpoint. Shareable between threads.
#[derive(Debug)]
pub struct Checkpoint {
    files: Files,
    config: ModelConfig,
    shards: Vec<Shard>,
    tensors: HashMap<String, Entry>,
    /// Tensors that a shard holds and the index does not list.
    unlisted: Vec<String>,
    /// What the index claims the tensors to sum up to, in bytes.
    claimed_size: Option<u64>,
}

#[derive(Debug)]
struct Shard {
    name: String,
    contents: Contents,
}

#[derive(Debug)]
struct Entry {
    shard: usize,
    dtype: Dtype,
    shape: Box<[usize]>,
    range: Range<usize>,
}

/// One tensor as it lies in its file.
#[derive(Clone, Copy, Debug)]
pub struct TensorView<'a> {
    /// Name.
    pub name: &'a str,
    /// Element type.
    pub dtype: Dtype,
    /// Dimensions, outermost first.
    pub shape: &'a [usize],
    /// The elements, little-endian, row-major, aligned to nothing in particular.
    pub data: &'a [u8],
    /// The file it lies in, for messages.
    pub file: &'a str,
}

impl Checkpoint {
    /// Opens the checkpoint in a folder.
    ///
    /// Parses `config.json`, the index and every header; reads no tensor data. The files must not
    /// be modified while the checkpoint is open, since they are mapped, not copied.
    ///
    /// # Errors
    /// [`CheckpointError`] for what is missing, unreadable, malformed or contradictory. Missing
    /// *tensors* are no error yet: see [`Checkpoint::verify`] and [`inspect()`].
    pub fn open(folder: &Path) -> Result<Checkpoint, CheckpointError> {
        Checkpoint::from_files(Files::folder(folder)?)
    }

    /// Opens a checkpoint that is part of the program: file names (as in a folder) and contents.
    ///
    /// # Errors
    /// As [`Checkpoint::open`].
    pub fn from_memory(
        files: &'static [(&'static str, &'static [u8])],
    ) -> Result<Checkpoint, CheckpointError> {
        Checkpoint::from_files(Files::Memory(files))
    }

    fn from_files(files: Files) -> Result<Checkpoint, CheckpointError> {
        let location = || files.location();
        let Some(text) = files.read(CONFIG_FILE)? else {
            return Err(CheckpointError::MissingConfig { location: location() });
        };
        let config = ModelConfig::from_json(&text)
            .map_err(|source| CheckpointError::Config { location: location(), source })?;
        // The index wins where both forms are present, as it does in vLLM.
        let index = files.read(INDEX_FILE)?.map(|text| Index::parse(&text)).transpose()?;
        let mut checkpoint = Checkpoint {
            files,
            config,
            shards: Vec::new(),
            tensors: HashMap::new(),
            unlisted: Vec::new(),
            claimed_size: None,
        };
        match index {
            Some(index) => checkpoint.load_shards(index)?,
            None => match checkpoint.files.open(SINGLE_FILE)? {
                Some(contents) => checkpoint.load_shard(SINGLE_FILE.to_owned(), contents)?,
                None => {
                    let location = checkpoint.location();
                    return Err(CheckpointError::MissingWeights { location });
                }
            },
        }
        Ok(checkpoint)
    }

    fn load_shards(&mut self, index: Index) -> Result<(), CheckpointError> {
        let Index { shards, tensors: listed, total_size } = index;
        self.claimed_size = total_size;
        for (position, name) in shards.iter().enumerate() {
            let Some(contents) = self.files.open(name)? else {
                return Err(CheckpointError::MissingShard {
                    index: INDEX_FILE.to_owned(),
                    shard: name.clone(),
                    tensors: listed.values().filter(|shard| **shard == position).count(),
                    location: self.location(),
                });
            };
            self.load_shard(name.clone(), contents)?;
        }
        let misplaced = |(tensor, shard): &(&String, &usize)| {
            self.tensors.get(*tensor).is_none_or(|entry| entry.shard != **shard)
        };
        // The first by name, so that the message does not depend on the hasher.
        if let Some((tensor, &shard)) = listed.iter().filter(misplaced).min() {
            return Err(CheckpointError::IndexMismatch {
                index: INDEX_FILE.to_owned(),
                shard: shards[shard].clone(),
                tensor: tensor.clone(),
            });
        }
        let unlisted = self.tensors.keys().filter(|tensor| !listed.contains_key(*tensor));
        self.unlisted = unlisted.cloned().collect();
        self.unlisted.sort_unstable();
        Ok(())
    }

    fn load_shard(&mut self, name: String, contents: Contents) -> Result<(), CheckpointError> {
        let entries = header::parse(contents.bytes())
            .map_err(|source| CheckpointError::Header { file: name.clone(), source })?;
        let shard = self.shards.len();
        self.tensors.reserve(entries.len());
        for header::Entry { name: tensor, dtype, shape, range } in entries {
            if let Some(first) = self.tensors.get(&tensor) {
                let first = self.shards[first.shard].name.clone();
                return Err(CheckpointError::DuplicateTensor { tensor, first, second: name });
            }
            self.tensors.insert(tensor, Entry { shard, dtype, shape, range });
        }
        self.shards.push(Shard { name, contents });
        Ok(())
    }

    /// The configuration.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// The folder, or words that say that it is built in; for messages.
    pub fn location(&self) -> String {
        self.files.location()
    }

    /// One tensor as it is, checked against nothing but its own header.
    ///
    /// # Errors
    /// [`CheckpointError::MissingTensor`].
    pub fn tensor(&self, name: &str) -> Result<TensorView<'_>, CheckpointError> {
        match self.tensors.get_key_value(name) {
            Some((name, entry)) => Ok(self.view(name, entry)),
            None => {
                let (tensor, location) = (name.to_owned(), self.location());
                Err(CheckpointError::MissingTensor { tensor, location })
            }
        }
    }

    /// Every tensor, in no particular order.
    pub fn tensors(&self) -> impl Iterator<Item = TensorView<'_>> {
        self.tensors.iter().map(|(name, entry)| self.view(name, entry))
    }

    fn view<'a>(&'a self, name: &'a str, entry: &'a Entry) -> TensorView<'a> {
        let Shard { name: file, contents } = &self.shards[entry.shard];
        // The header parser keeps ranges within the file.
        let data = &contents.bytes()[entry.range.clone()];
        TensorView { name, dtype: entry.dtype, shape: &entry.shape, data, file }
    }

    /// A file beside the weights, such as `tokenizer.json`; `None` if there is none.
    ///
    /// # Errors
    /// [`CheckpointError::Io`] if it is there and cannot be read.
    pub fn aux_file(&self, name: &str) -> Result<Option<Cow<'static, [u8]>>, CheckpointError> {
        if index::is_plain_file_name(name) { self.files.read(name) } else { Ok(None) }
    }

    /// Whether the MTP layer can be used: the configuration has one and its tensors are there.
    ///
    /// Redistributed checkpoints often drop the layer and leave the configuration as it was; that
    /// is `false`, not an error. Copies of embedding and head may be left out.
    ///
    /// # Errors
    /// [`CheckpointError::PartialMtp`] if only some of the tensors are there.
    pub fn has_mtp(&self) -> Result<bool, CheckpointError> {
        let Some(layer) = self.config.mtp_layer() else { return Ok(false) };
        let (mut expected, mut missing) = (0, Vec::new());
        for spec in layout::layer_tensors(&self.config, layer) {
            if spec.role.copy_of().is_some() {
                continue;
            }
            for spec in spec.with_scale() {
                expected += 1;
                if !self.tensors.contains_key(&spec.name) {
                    missing.push(spec.name);
                }
            }
        }
        if missing.is_empty() || missing.len() == expected {
            return Ok(missing.is_empty());
        }
        let missing_count = missing.len();
        missing.truncate(3);
        Err(CheckpointError::PartialMtp {
            location: self.location(),
            layer,
            missing: missing_count,
            expected,
            first: missing,
        })
    }

    /// Checks that every tensor of the configuration is there with the right shape and type.
    ///
    /// Reads no tensor data, so it takes milliseconds even for the released model; to be called
    /// before loading, so that a model does not fail half way.
    ///
    /// # Errors
    /// The first problem, in the order of [`layout::tensors`].
    pub fn verify(&self) -> Result<(), CheckpointError> {
        let mtp = self.has_mtp()?;
        for spec in layout::tensors(&self.config).filter(|spec| mtp || !spec.is_mtp(&self.config)) {
            match self.tensors.get_key_value(&spec.name) {
                Some((name, entry)) => self.check(&spec, &self.view(name, entry))?,
                None if spec.role.copy_of().is_some() => {}
                None => return Err(self.missing(&spec)),
            }
        }
        Ok(())
    }

    /// Resolves a weight by its full name, with its scales if it has any, and checks both against
    /// the layout. Norms, the router and its bias are weights too.
    ///
    /// # Errors
    /// Anything from [`CheckpointError::MissingTensor`] to [`CheckpointError::BadScale`].
    pub fn weight(&self, name: &str) -> Result<Weight<'_>, CheckpointError> {
        match TensorSpec::lookup(&self.config, name) {
            Some(spec) if spec.storage != layout::Storage::BlockScale => self.resolve(&spec),
            _ => Err(CheckpointError::NotInLayout { tensor: name.to_owned() }),
        }
    }

    /// [`Checkpoint::weight`] by role instead of name.
    ///
    /// # Errors
    /// As [`Checkpoint::weight`].
    pub fn weight_at(
        &self,
        role: Role,
        layer: Option<usize>,
        expert: Option<usize>,
    ) -> Result<Weight<'_>, CheckpointError> {
        match TensorSpec::at(&self.config, role, layer, expert) {
            Some(spec) => self.resolve(&spec),
            None => {
                let tensor = format!("{role:?} (layer {layer:?}, expert {expert:?})");
                Err(CheckpointError::NotInLayout { tensor })
            }
        }
    }
}
