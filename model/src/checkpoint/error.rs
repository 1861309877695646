//! What can be wrong with a checkpoint.

use std::{io, path::PathBuf};

use safetensors::Dtype;

use crate::config::ConfigError;

/// Why a checkpoint, or a tensor of it, was refused.
///
/// `file` fields hold a file's name within the checkpoint; paths are given where the file system
/// itself is the trouble.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CheckpointError {
    /// There is no such folder.
    #[error("there is no checkpoint folder at {}", path.display())]
    NotFound {
        /// Where it was looked for.
        path: PathBuf,
    },
    /// The path names a file.
    #[error("{} is not a folder; give the folder that holds config.json", path.display())]
    NotAFolder {
        /// The path.
        path: PathBuf,
    },
    /// No `config.json`.
    #[error("{location} has no config.json, so it is not a Hugging Face checkpoint")]
    MissingConfig {
        /// The folder.
        location: String,
    },
    /// Neither an index nor a single file.
    #[error(
        "{location} has neither model.safetensors.index.json nor model.safetensors; if there are \
         shards, fetch the index that belongs to them"
    )]
    MissingWeights {
        /// The folder.
        location: String,
    },
    /// The operating system refused.
    #[error("cannot read {}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// Its answer.
        source: io::Error,
    },
    /// `config.json` was refused.
    #[error("config.json in {location}: {source}")]
    Config {
        /// The folder.
        location: String,
        /// Why.
        source: ConfigError,
    },
    /// The index is not the JSON it should be.
    #[error("{file} is not a valid index at line {line}, column {column}: {message}")]
    Index {
        /// The index.
        file: String,
        /// 1-based line.
        line: usize,
        /// 1-based column.
        column: usize,
        /// The parser's words.
        message: String,
    },
    /// The index points outside the checkpoint.
    #[error(
        "{file} places tensor {tensor} in {shard:?}, which is not a plain file name; the index is \
         damaged or hostile"
    )]
    UnsafeShardName {
        /// The index.
        file: String,
        /// The tensor.
        tensor: String,
        /// The path it names.
        shard: String,
    },
    /// A shard named by the index is not there.
    #[error(
        "{index} names {shard}, which {location} lacks ({tensors} tensors are in it); the download \
         is incomplete"
    )]
    MissingShard {
        /// The index.
        index: String,
        /// The shard.
        shard: String,
        /// How many tensors the index places in it.
        tensors: usize,
        /// The folder.
        location: String,
    },
    /// A shard's header was refused.
    #[error("{file}: {source}")]
    Header {
        /// The shard.
        file: String,
        /// Why.
        source: HeaderError,
    },
    /// The index and a shard disagree.
    #[error("{index} places tensor {tensor} in {shard}, which does not hold it; they do not match")]
    IndexMismatch {
        /// The index.
        index: String,
        /// The shard.
        shard: String,
        /// The tensor.
        tensor: String,
    },
    /// Two places for one tensor.
    #[error("tensor {tensor} is both in {first} and in {second}; remove one of the two")]
    DuplicateTensor {
        /// The tensor.
        tensor: String,
        /// One file.
        first: String,
        /// The other.
        second: String,
    },
    /// No file holds the tensor.
    #[error("tensor {tensor} is missing in {location}; the checkpoint is incomplete")]
    MissingTensor {
        /// The tensor.
        tensor: String,
        /// The folder.
        location: String,
    },
    /// The configuration has no weight of this name.
    #[error("{tensor} is not a weight of this configuration")]
    NotInLayout {
        /// The name asked for.
        tensor: String,
    },
    /// Shape differs from what `config.json` implies.
    #[error(
        "{file}: tensor {tensor} has shape {found:?}, but config.json implies {expected:?}; the \
         two files belong to different models"
    )]
    WrongShape {
        /// The shard.
        file: String,
        /// The tensor.
        tensor: String,
        /// What the configuration implies.
        expected: Vec<usize>,
        /// What the file says.
        found: Vec<usize>,
    },
    /// Element type differs from what the layout allows.
    #[error("{file}: tensor {tensor} is stored as {found}, but {expected} is needed{hint}")]
    WrongDtype {
        /// The shard.
        file: String,
        /// The tensor.
        tensor: String,
        /// The accepted types.
        expected: &'static str,
        /// What the file says.
        found: Dtype,
        /// What to do, or nothing.
        hint: &'static str,
    },
    /// An FP8 weight without scales.
    #[error("FP8 tensor {tensor} in {file} has no scales: {scale} is missing")]
    MissingScale {
        /// The shard of the weight.
        file: String,
        /// The weight.
        tensor: String,
        /// The scale tensor that should exist.
        scale: String,
    },
    /// Scales for a weight that is not quantised.
    #[error(
        "{file}: {scale} exists, but {tensor} is not an FP8 weight under this configuration; \
         quantization_config does not match the files"
    )]
    UnexpectedScale {
        /// The shard of the scale.
        file: String,
        /// The weight.
        tensor: String,
        /// The scale tensor.
        scale: String,
    },
    /// A scale that no quantiser writes.
    #[error(
        "{file}: {scale} is {value} at block [{row}, {column}], but scales are finite and not \
         negative; the file is damaged"
    )]
    BadScale {
        /// The shard of the scale.
        file: String,
        /// The scale tensor.
        scale: String,
        /// Block row.
        row: usize,
        /// Block column.
        column: usize,
        /// The value.
        value: f32,
    },
    /// NaN (or, in unquantised weights, infinity) among the weights.
    #[error("{file}: tensor {tensor} is NaN or infinite at {index:?}; the file is damaged")]
    NanWeight {
        /// The shard.
        file: String,
        /// The tensor.
        tensor: String,
        /// Index of the element, outermost dimension first.
        index: Vec<usize>,
    },
    /// Some of the MTP layer's tensors are there, but not all.
    #[error(
        "the MTP layer (model.layers.{layer}) is incomplete in {location}: {missing} of {expected} \
         tensors are missing, first {}; complete it, or set num_nextn_predict_layers to 0",
        first.join(", ")
    )]
    PartialMtp {
        /// The folder.
        location: String,
        /// The layer.
        layer: usize,
        /// How many tensors are missing.
        missing: usize,
        /// How many there should be.
        expected: usize,
        /// The first few of the missing.
        first: Vec<String>,
    },
}

/// Why a safetensors header was refused.
///
/// The format: 8 bytes of little-endian length, that many bytes of JSON, then the data, which the
/// tensors' `data_offsets` must tile without holes or overlaps.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum HeaderError {
    /// Too short to be a safetensors file at all.
    #[error("the file has {len} bytes, fewer than the 8 of a safetensors header length")]
    TooShort {
        /// Bytes in the file.
        len: usize,
    },
    /// Larger than the format allows.
    #[error(
        "the header claims {claimed} bytes, more than the format's limit of {limit}; this is not \
         a safetensors file"
    )]
    TooLarge {
        /// The length field.
        claimed: u64,
        /// The limit.
        limit: u64,
    },
    /// The header does not fit into the file.
    #[error(
        "the header claims {claimed} bytes, but the file ends after {available}; it is truncated \
         or not a safetensors file"
    )]
    BeyondFile {
        /// The length field.
        claimed: u64,
        /// Bytes after the length field.
        available: u64,
    },
    /// The header is not JSON of the right form.
    #[error("the header is not valid at line {line}, column {column}: {message}")]
    Json {
        /// 1-based line within the header.
        line: usize,
        /// 1-based column.
        column: usize,
        /// The parser's words.
        message: String,
    },
    /// One name twice.
    #[error("tensor {tensor} is listed twice")]
    DuplicateTensor {
        /// The tensor.
        tensor: String,
    },
    /// An element type that safetensors does not have.
    #[error("tensor {tensor} has the unknown element type {dtype:?}")]
    UnknownDtype {
        /// The tensor.
        tensor: String,
        /// The type.
        dtype: String,
    },
    /// Shape times element size overflows, or is no whole number of bytes.
    #[error("tensor {tensor} of shape {shape:?} and type {dtype} has no valid size in bytes")]
    ImpossibleSize {
        /// The tensor.
        tensor: String,
        /// Its shape.
        shape: Vec<usize>,
        /// Its type.
        dtype: Dtype,
    },
    /// The offsets hold another number of bytes than shape and type need.
    #[error(
        "tensor {tensor} of shape {shape:?} and type {dtype} needs {needed} bytes, but its offsets \
         {begin}..{end} do not hold that many"
    )]
    SizeMismatch {
        /// The tensor.
        tensor: String,
        /// Its shape.
        shape: Vec<usize>,
        /// Its type.
        dtype: Dtype,
        /// Bytes that shape and type need.
        needed: u64,
        /// First offset.
        begin: u64,
        /// Offset past the end.
        end: u64,
    },
    /// Two tensors share bytes.
    #[error(
        "tensors {first} and {second} overlap: the second begins at {begin}, the first ends at \
         {end}"
    )]
    Overlap {
        /// The tensor that begins first.
        first: String,
        /// The other.
        second: String,
        /// Where the second begins.
        begin: u64,
        /// Where the first ends.
        end: u64,
    },
    /// Bytes that belong to no tensor.
    #[error(
        "{} bytes before tensor {tensor} (offsets {from}..{to}) belong to no tensor",
        to - from
    )]
    Hole {
        /// The tensor after the hole.
        tensor: String,
        /// Where the hole begins.
        from: u64,
        /// Where it ends.
        to: u64,
    },
    /// The data ends early.
    #[error(
        "the file should have {expected} bytes and has {actual}: the end of tensor {tensor} is \
         missing; fetch the file again"
    )]
    Truncated {
        /// The first tensor that does not fit.
        tensor: String,
        /// File size that the header implies.
        expected: u64,
        /// File size.
        actual: u64,
    },
    /// More data than described.
    #[error(
        "the file should have {expected} bytes and has {actual}; what follows the last tensor is \
         unknown"
    )]
    TrailingBytes {
        /// File size that the header implies.
        expected: u64,
        /// File size.
        actual: u64,
    },
}
