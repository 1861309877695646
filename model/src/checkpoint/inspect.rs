//! What a checkpoint holds, and where it departs from the layout of its configuration.

use std::collections::BTreeMap;

use serde::Serialize;

use super::{
    Checkpoint, Footprint, TensorView,
    layout::{self, SCALE_SUFFIX, Storage, TensorSpec},
};
use crate::config::ModelConfig;

/// Findings beyond this number are counted but not named.
const NAMED: usize = 20;

/// A description of a checkpoint, made without reading tensor data.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Inspection {
    /// The folder.
    pub location: String,
    /// Tensors of the main model that are in the files.
    pub main: Footprint,
    /// Tensors of the MTP layer that are in the files.
    pub mtp: Footprint,
    /// State of the MTP layer.
    pub mtp_state: MtpState,
    /// Tensors and bytes by element type, in the files' own names.
    pub dtypes: Vec<DtypeTally>,
    /// Tensors and bytes by file.
    pub files: Vec<FileTally>,
    /// What one decoded token reads of the main model, by the configuration.
    pub active: Footprint,
    /// Tensors of the layout that no file holds.
    pub missing: Listing<String>,
    /// Tensors of the files that the layout does not have.
    pub unexpected: Listing<String>,
    /// Tensors whose shape is not that of the layout.
    pub wrong_shape: Listing<Mismatch>,
    /// Tensors whose element type is not one that the layout accepts.
    pub wrong_dtype: Listing<Mismatch>,
    /// Remarks in words: nothing here keeps the checkpoint from loading.
    pub notes: Vec<String>,
}

/// How much of the MTP layer is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum MtpState {
    /// The configuration has none.
    NotConfigured,
    /// All of it.
    Complete,
    /// Some of it: loading will fail.
    Partial,
    /// The configuration has one, the files have nothing of it: it will not be used.
    Absent,
}

/// Tensors of one element type.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct DtypeTally {
    /// The type's name in safetensors (`F8_E4M3`, `BF16`, `F32`).
    pub dtype: String,
    /// Tensors.
    pub tensors: u64,
    /// Bytes.
    pub bytes: u64,
}

/// One weight file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct FileTally {
    /// Its name.
    pub file: String,
    /// Tensors.
    pub tensors: u64,
    /// Size, header included.
    pub bytes: u64,
}

/// Findings: all counted, the first few (by name) kept.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Listing<T> {
    /// How many there are.
    pub count: usize,
    /// The first of them.
    pub first: Vec<T>,
}

/// A tensor that is not what the layout wants.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Mismatch {
    /// The tensor.
    pub tensor: String,
    /// Its file.
    pub file: String,
    /// What the layout wants.
    pub expected: String,
    /// What the file says.
    pub found: String,
}

/// Sizes that follow from a configuration alone.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ConfigSummary {
    /// The main model.
    pub main: Footprint,
    /// The MTP layer; zeros if there is none.
    pub mtp: Footprint,
    /// What one decoded token reads of the main model.
    pub active: Footprint,
    /// Tensors and bytes by element type, MTP included.
    pub dtypes: Vec<DtypeTally>,
    /// Bytes of key-value cache per token in BF16, main model only.
    pub cache_bytes_per_token: u64,
}

impl<T: Ord> Listing<T> {
    fn new(mut all: Vec<T>) -> Listing<T> {
        let count = all.len();
        all.sort_unstable();
        all.truncate(NAMED);
        Listing { count, first: all }
    }
}

impl<T> Listing<T> {
    /// Whether nothing was found.
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }
}

impl Inspection {
    /// Whether everything is as the configuration implies. A wholly absent MTP layer is; one that
    /// is there in part is not.
    pub fn is_clean(&self) -> bool {
        self.missing.is_empty()
            && self.unexpected.is_empty()
            && self.wrong_shape.is_empty()
            && self.wrong_dtype.is_empty()
    }
}

/// Sizes of a configuration of which there need not be any files.
pub fn inspect_config(config: &ModelConfig) -> ConfigSummary {
    let mut dtypes = Dtypes::default();
    for spec in layout::tensors(config) {
        dtypes.add(&spec.storage.dtype().to_string(), spec.bytes());
    }
    let cached = config.num_hidden_layers * config.kv_latent_width();
    ConfigSummary {
        main: Footprint::main(config),
        mtp: Footprint::mtp(config),
        active: Footprint::active(config),
        dtypes: dtypes.finish(),
        cache_bytes_per_token: 2 * cached as u64,
    }
}

/// Describes an open checkpoint.
pub fn inspect(checkpoint: &Checkpoint) -> Inspection {
    let config = checkpoint.config();
    let (mut main, mut mtp) = (Footprint::default(), Footprint::default());
    let mut dtypes = Dtypes::default();
    let mut per_file = vec![0; checkpoint.shards.len()];
    let (mut unexpected, mut wrong_shape, mut wrong_dtype) = (Vec::new(), Vec::new(), Vec::new());
    for (name, entry) in &checkpoint.tensors {
        let view = checkpoint.view(name, entry);
        let bytes = view.data.len() as u64;
        per_file[entry.shard] += 1;
        dtypes.add(&view.dtype.to_string(), bytes);
        let Some(spec) = TensorSpec::lookup(config, name) else {
            unexpected.push(name.clone());
            continue;
        };
        let part = if spec.is_mtp(config) { &mut mtp } else { &mut main };
        part.tensors += 1;
        part.bytes += bytes;
        if spec.storage != Storage::BlockScale {
            part.parameters += view.shape.iter().map(|&size| size as u64).product::<u64>();
        }
        if view.shape != spec.shape {
            let (expected, found) = (format!("{:?}", spec.shape), format!("{:?}", view.shape));
            wrong_shape.push(mismatch(&view, expected, found));
        }
        if !spec.storage.accepts(view.dtype) {
            let expected = spec.storage.accepted().to_owned();
            wrong_dtype.push(mismatch(&view, expected, view.dtype.to_string()));
        }
    }

    let mtp_state = match (config.mtp_layer(), checkpoint.has_mtp()) {
        (None, _) => MtpState::NotConfigured,
        (_, Ok(true)) => MtpState::Complete,
        (_, Ok(false)) => MtpState::Absent,
        (_, Err(_)) => MtpState::Partial,
    };
    let (mut missing, mut copies_left_out) = (Vec::new(), Vec::new());
    for spec in layout::tensors(config) {
        if checkpoint.tensors.contains_key(&spec.name) {
            continue;
        }
        match spec.role.copy_of() {
            _ if spec.is_mtp(config) && mtp_state == MtpState::Absent => {}
            Some(_) => copies_left_out.push(spec.name),
            None => missing.push(spec.name),
        }
    }
    let files = checkpoint.shards.iter().zip(per_file).map(|(shard, tensors)| FileTally {
        file: shard.name.clone(),
        tensors,
        bytes: shard.contents.bytes().len() as u64,
    });

    let mut inspection = Inspection {
        location: checkpoint.location(),
        main,
        mtp,
        mtp_state,
        dtypes: dtypes.finish(),
        files: files.collect(),
        active: Footprint::active(config),
        missing: Listing::new(missing),
        unexpected: Listing::new(unexpected),
        wrong_shape: Listing::new(wrong_shape),
        wrong_dtype: Listing::new(wrong_dtype),
        notes: Vec::new(),
    };
    inspection.notes = notes(checkpoint, &inspection, &copies_left_out);
    inspection
}

fn mismatch(view: &TensorView<'_>, expected: String, found: String) -> Mismatch {
    let (tensor, file) = (view.name.to_owned(), view.file.to_owned());
    Mismatch { tensor, file, expected, found }
}

fn notes(checkpoint: &Checkpoint, found: &Inspection, copies_left_out: &[String]) -> Vec<String> {
    let config = checkpoint.config();
    let mut notes = Vec::new();
    if found.mtp_state == MtpState::Absent {
        notes.push(format!(
            "num_nextn_predict_layers is {}, but the files hold no layer {}: there is no MTP layer \
             to draft tokens with",
            config.num_nextn_predict_layers, config.num_hidden_layers
        ));
    }
    let mtp_prefix = format!("model.layers.{}.", config.num_hidden_layers);
    if found.mtp_state == MtpState::NotConfigured
        && checkpoint.tensors.keys().any(|name| name.starts_with(&mtp_prefix))
    {
        notes.push(format!(
            "the files hold tensors of an MTP layer ({mtp_prefix}*), but num_nextn_predict_layers \
             is 0: they are not used"
        ));
    }
    if !copies_left_out.is_empty() && found.mtp_state == MtpState::Complete {
        notes.push(format!(
            "copies left out, the main model's tensors stand in: {}",
            copies_left_out.join(", ")
        ));
    }
    let is_scale = |name: &&String| name.ends_with(SCALE_SUFFIX);
    if config.quantization.is_none() && checkpoint.tensors.keys().any(|name| is_scale(&name)) {
        notes.push(format!(
            "there are *{SCALE_SUFFIX} tensors, but config.json has no quantization_config"
        ));
    }
    if !checkpoint.unlisted.is_empty() {
        notes.push(format!(
            "{} tensors are in the files but not in the index, {} first",
            checkpoint.unlisted.len(),
            checkpoint.unlisted[0]
        ));
    }
    let actual: u64 = found.dtypes.iter().map(|tally| tally.bytes).sum();
    if let Some(claimed) = checkpoint.claimed_size.filter(|&claimed| claimed != actual) {
        notes.push(format!("the index claims {claimed} bytes of tensors, the files hold {actual}"));
    }
    notes
}

/// Tallies by element type.
#[derive(Default)]
struct Dtypes(BTreeMap<String, (u64, u64)>);

impl Dtypes {
    fn add(&mut self, dtype: &str, bytes: u64) {
        if !self.0.contains_key(dtype) {
            self.0.insert(dtype.to_owned(), (0, 0));
        }
        if let Some((tensors, sum)) = self.0.get_mut(dtype) {
            *tensors += 1;
            *sum += bytes;
        }
    }

    /// Largest first.
    fn finish(self) -> Vec<DtypeTally> {
        let tally = |(dtype, (tensors, bytes))| DtypeTally { dtype, tensors, bytes };
        let mut tallies: Vec<DtypeTally> = self.0.into_iter().map(tally).collect();
        tallies.sort_by_key(|tally| std::cmp::Reverse(tally.bytes));
        tallies
    }
}
