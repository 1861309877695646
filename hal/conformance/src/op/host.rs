//! Operands on the host: what a case is made of before it meets a device.

use hal::{Operand, TensorDesc};
use std::fmt;
use std::sync::{Arc, OnceLock};

/// The bytes of one buffer. Operands that share them alias each other.
pub struct HostMemory {
    bytes: OnceLock<Box<[u8]>>,
    /// Makes the bytes when they are first asked for: most runs look at few of the cases.
    make: Option<Box<dyn Fn() -> Vec<u8> + Send + Sync>>,
}

impl fmt::Debug for HostMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.bytes.get() {
            Some(bytes) => write!(f, "{} bytes", bytes.len()),
            None => f.write_str("bytes not made yet"),
        }
    }
}

impl HostMemory {
    /// These bytes.
    pub fn new(bytes: Vec<u8>) -> Self {
        HostMemory { bytes: OnceLock::from(Box::from(bytes)), make: None }
    }

    /// The bytes that `make` gives, once somebody wants them.
    pub fn lazy(make: impl Fn() -> Vec<u8> + Send + Sync + 'static) -> Self {
        HostMemory { bytes: OnceLock::new(), make: Some(Box::new(make)) }
    }

    /// The bytes.
    pub fn bytes(&self) -> &[u8] {
        self.bytes
            .get_or_init(|| self.make.as_ref().map_or_else(Box::default, |make| make().into()))
    }
}

/// A strided view of host memory.
#[derive(Clone, Debug)]
pub struct HostTensor {
    /// What it is a view of.
    pub memory: Arc<HostMemory>,
    /// Bytes to the first element.
    pub offset: u64,
    /// Shape, strides and dtype.
    pub desc: TensorDesc,
}

impl HostTensor {
    /// The bytes from the first element to the end of the last.
    pub fn view_bytes(&self) -> Vec<u8> {
        let (start, len) = (self.offset as usize, self.desc.extent() as usize);
        self.memory.bytes().get(start..start + len).unwrap_or_default().to_vec()
    }

    /// Calls `f` with the range of bytes of every element, in order.
    pub fn for_each_element(&self, mut f: impl FnMut(std::ops::Range<usize>)) {
        let d = &self.desc;
        let size = d.dtype().size();
        for flat in 0..d.elements() {
            let (mut rest, mut at) = (flat, self.offset as usize);
            for axis in (0..d.rank()).rev() {
                at += (rest % d.dim(axis)) * d.stride(axis) * size;
                rest /= d.dim(axis);
            }
            f(at..at + size);
        }
    }
}

impl Operand for HostTensor {
    fn desc(&self) -> &TensorDesc {
        &self.desc
    }
}
