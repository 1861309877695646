//! What a recording holds: every call that reached a device, in an order in which it can be made
//! again.
//!
//! Buffers, streams, communicators and commands go by numbers, given in the order in which they
//! were made. A record is JSON, so that a reader of another version, or a person, can make it out;
//! the short keys are for the records that come by the hundred thousand.

mod failed;

pub use failed::{Failed, FailedKind, Origin};

use hal::{CollectiveKind, DType, Op, Operand, Reduction, Region, Tensor, TensorDesc};
use serde::{Deserialize, Serialize};

/// One call and how it ended.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// What was called.
    #[serde(rename = "c")]
    pub call: Call,
    /// The error that it returned, if it did.
    #[serde(rename = "e", default, skip_serializing_if = "Option::is_none")]
    pub error: Option<Failed>,
}

/// A call. Times are nanoseconds, sizes bytes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[expect(missing_docs, reason = "the fields are those of the calls of `hal` that are named")]
pub enum Call {
    /// A die was opened.
    Die(Die),
    /// [`hal::Device::stream`].
    Stream { stream: u64, die: u32, label: String },
    /// A stream's handle was dropped; its timeline may still be waited for.
    CloseStream { stream: u64 },
    /// [`hal::Stream::alloc`].
    Alloc { buffer: u64, stream: u64, bytes: u64 },
    /// [`hal::Device::alloc_host`].
    AllocHost { buffer: u64, die: u32, bytes: u64 },
    /// The last handle of a buffer was dropped.
    Free { buffer: u64 },
    /// [`hal::Stream::write`], of the payload with this number.
    Write { stream: u64, to: Span, payload: u64 },
    /// [`hal::Stream::read`], and the payload that it gave, if the device computes values. Stands
    /// where it returned; nothing else was submitted to the stream meanwhile.
    /// `into` is there where the destination had another length, which every device refuses.
    Read {
        stream: u64,
        from: Span,
        timeout: u64,
        payload: Option<u64>,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        into: Option<u64>,
    },
    /// [`hal::Stream::copy`].
    Copy { stream: u64, to: Span, from: Span },
    /// [`hal::Stream::fill`].
    Fill { stream: u64, to: Span, byte: u8 },
    /// No call: what the command with this number is. Commands recur, so each is written once.
    Define { command: u64, what: Definition },
    /// [`hal::Stream::submit`] or [`hal::Stream::submit_collectives`].
    Submit {
        #[serde(rename = "s")]
        stream: u64,
        #[serde(rename = "c")]
        command: u64,
    },
    /// [`hal::Stream::wait`] for a value of the stream `on`.
    Wait { stream: u64, on: u64, value: u64 },
    /// [`hal::Timeline::synchronize`]. Stands where it returned.
    Synchronize { stream: u64, value: u64, timeout: u64 },
    /// [`hal::Timeline::failure`] told the error of this record.
    Failure { stream: u64 },
    /// [`hal::RawBuffer::write_host`].
    HostWrite { to: Span, payload: u64 },
    /// [`hal::RawBuffer::read_host`].
    HostRead { from: Span, payload: Option<u64> },
    /// [`hal::Device::communicator`].
    Join { communicator: u64, die: u32, id: [u64; 2], rank: usize, size: usize },
    /// A communicator's handle was dropped.
    Leave { communicator: u64 },
    /// [`hal::Communicator::abort`].
    Abort { communicator: u64, reason: String },
    /// The recorder copied an output of the command before to pinned memory of its own.
    Probe { probe: u64, stream: u64, operand: String, view: View },
    /// What the probe saw: [`crate::xxh64`] of the view's elements, row-major, with seed 0.
    Probed { probe: u64, hash: u64 },
    /// The recording is complete.
    End(End),
}

impl Call {
    /// Whether the call puts a command on a stream, and on which.
    pub fn command_on(&self) -> Option<u64> {
        match self {
            Call::Write { stream, .. }
            | Call::Read { stream, .. }
            | Call::Copy { stream, .. }
            | Call::Fill { stream, .. }
            | Call::Submit { stream, .. }
            | Call::Wait { stream, .. }
            | Call::Probe { stream, .. } => Some(*stream),
            _ => None,
        }
    }
}

/// A die, as it was.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Die {
    /// Its number in its system.
    pub die: u32,
    /// The backend that drove it.
    pub backend: String,
    /// Product name.
    pub name: String,
    /// Bytes of memory.
    pub memory_bytes: u64,
    /// Compute cores.
    pub cores: u32,
    /// Whether commands computed values. Where not, reads have no payload and nothing compares.
    pub functional: bool,
}

/// The last record.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct End {
    /// Commands put on streams, those that were refused included.
    pub commands: u64,
    /// Whether the run came to its end; a recording of a run that failed is no less complete.
    pub finished: bool,
    /// Outputs that were not probed although all were asked for: too large, or too many at once.
    pub unprobed: u64,
}

/// Bytes of a buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Span {
    /// Which buffer.
    #[serde(rename = "b")]
    pub buffer: u64,
    /// First byte.
    #[serde(rename = "o")]
    pub offset: u64,
    /// Bytes.
    #[serde(rename = "n")]
    pub len: u64,
}

impl Span {
    pub(crate) fn of(region: &Region, buffer: u64) -> Span {
        Span { buffer, offset: region.offset, len: region.len }
    }
}

/// A tensor's fields, as they were given; not checked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct View {
    /// Which buffer.
    #[serde(rename = "b")]
    pub buffer: u64,
    /// Byte of the first element.
    #[serde(rename = "o")]
    pub offset: u64,
    /// Element type.
    #[serde(rename = "t")]
    pub dtype: DType,
    /// Dimensions.
    #[serde(rename = "s")]
    pub shape: Vec<u32>,
    /// Elements between neighbours, where rows do not lie one after the other.
    #[serde(rename = "st", default, skip_serializing_if = "Option::is_none")]
    pub strides: Option<Vec<u32>>,
}

impl View {
    pub(crate) fn of(tensor: &Tensor, buffer: u64) -> View {
        let desc = tensor.desc();
        let dense = dense_strides(desc.shape());
        View {
            buffer,
            offset: tensor.offset(),
            dtype: desc.dtype(),
            shape: desc.shape().to_vec(),
            strides: (dense.as_deref() != Some(desc.strides())).then(|| desc.strides().to_vec()),
        }
    }

    /// The descriptor, if there can be one.
    ///
    /// # Errors
    ///
    /// As [`TensorDesc::strided`].
    pub fn desc(&self) -> Result<TensorDesc, String> {
        match &self.strides {
            Some(strides) => TensorDesc::strided(self.dtype, &self.shape, strides),
            None => {
                let strides = dense_strides(&self.shape)
                    .ok_or_else(|| format!("{:?} has strides beyond 32 bits", self.shape))?;
                TensorDesc::strided(self.dtype, &self.shape, &strides)
            }
        }
    }
}

/// Strides of a row-major tensor without gaps, if they fit.
fn dense_strides(shape: &[u32]) -> Option<Vec<u32>> {
    let mut strides = vec![1u32; shape.len()];
    for axis in (1..shape.len()).rev() {
        strides[axis - 1] = strides[axis].checked_mul(shape[axis].max(1))?;
    }
    Some(strides)
}

/// A command that is submitted by its number.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Definition {
    /// An op.
    Op {
        /// Kind, operands, attributes.
        op: Box<Op<View>>,
        /// Its label.
        label: String,
    },
    /// A batch of collectives.
    Batch {
        /// The communicator's number.
        communicator: u64,
        /// The parts of this rank.
        batch: Vec<Part>,
        /// Its label.
        label: String,
    },
}

impl Definition {
    /// The command's label.
    pub fn label(&self) -> &str {
        match self {
            Definition::Op { label, .. } | Definition::Batch { label, .. } => label,
        }
    }

    /// The name of the op, or of the first collective.
    pub fn name(&self) -> &'static str {
        match self {
            Definition::Op { op, .. } => op.kind().name(),
            Definition::Batch { batch, .. } => batch.first().map_or("nothing", |p| p.kind.name()),
        }
    }
}

/// One collective of a batch. Which fields are there is a matter of its kind.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Part {
    /// Kind.
    pub kind: CollectiveKind,
    /// What is sent; a broadcast's tensor, whichever the rank.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub send: Option<View>,
    /// What is received.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub recv: Option<View>,
    /// How to combine.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reduction: Option<Reduction>,
    /// A broadcast's root, or the other rank of a send or receive.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub peer: Option<usize>,
    /// Elements to and from each rank of an all-to-all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub counts: Option<(Vec<usize>, Vec<usize>)>,
    /// Offsets in device memory of an all-to-all by offsets.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub offsets: Option<Offsets>,
}

/// Where the rows for and from each rank begin, as values in device memory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Offsets {
    /// Of what is sent.
    pub send: View,
    /// Of what is received, where it is written.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub recv: Option<View>,
    /// The hint for cost models.
    pub expected_rows: u32,
}

impl Part {
    /// What this rank writes.
    pub fn written(&self, rank: usize) -> Option<&View> {
        match self.kind {
            CollectiveKind::Broadcast if self.peer != Some(rank) => self.send.as_ref(),
            _ => self.recv.as_ref(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use hal::op::RmsNorm;
    use proptest::prelude::*;

    fn view(strides: Option<Vec<u32>>) -> View {
        View { buffer: 7, offset: 64, dtype: DType::Bf16, shape: vec![3, 5], strides }
    }

    #[test]
    fn what_is_written_is_what_people_read() {
        let op = RmsNorm {
            x: view(Some(vec![8, 1])),
            weight: view(None),
            residual: None,
            out: view(None),
            eps: 0.25,
        };
        let json = serde_json::to_string(&Op::from(op)).unwrap();
        let dense = r#"{"b":7,"o":64,"t":"bf16","s":[3,5]}"#;
        let gaps = r#"{"b":7,"o":64,"t":"bf16","s":[3,5],"st":[8,1]}"#;
        let expected = format!(
            r#"{{"rms_norm":{{"x":{gaps},"weight":{dense},"residual":null,"out":{dense},"eps":0.25}}}}"#
        );
        assert_eq!(json, expected);
    }

    #[test]
    fn descriptors_come_back_or_are_refused() {
        assert_eq!(view(None).desc(), Ok(TensorDesc::new(DType::Bf16, &[3, 5])));
        let columns = TensorDesc::new(DType::Bf16, &[3, 8]).columns(1, 5).1;
        assert_eq!(view(Some(vec![8, 1])).desc(), Ok(columns));
        for shape in [vec![], vec![1; 5], vec![u32::MAX; 4]] {
            assert!(View { shape, ..view(None) }.desc().is_err());
        }
    }

    proptest! {
        #[test]
        fn attributes_keep_every_bit(bits in any::<u32>()) {
            let op = |eps| {
                let (x, weight, out) = (view(None), view(None), view(None));
                Op::from(RmsNorm { x, weight, residual: Some(view(None)), out, eps })
            };
            for bits in [bits, 0x7f80_0000, 0xff80_0000, 0x7fc0_0001, 0x8000_0000, 1] {
                let json = serde_json::to_string(&op(f32::from_bits(bits))).unwrap();
                let Op::RmsNorm(back) = serde_json::from_str::<Op<View>>(&json).unwrap() else {
                    return Err(TestCaseError::fail("the kind changed"));
                };
                prop_assert_eq!(back.eps.to_bits(), bits);
                prop_assert!(back.residual.is_some());
            }
        }
    }
}
