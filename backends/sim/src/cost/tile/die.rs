//! A die's figures in SI units, divided by cores where they are private to one.

use super::program::Rates;
use crate::machine::{Kernels, Machine, TileChoice};
use hal::DType;

/// What tile programs are made from.
#[derive(Clone, Debug)]
pub(crate) struct DieFigures {
    pub(crate) cores: u64,
    /// Of those, the ones that communication takes while it runs.
    pub(crate) communication_cores: u64,
    /// Seconds before a kernel's first load arrives.
    pub(crate) startup: f64,
    pub(crate) memory_latency: f64,
    pub(crate) kernel: f64,
    /// Tile rows of 128 bytes from memory.
    pub(crate) tile_rates: Rates,
    /// Long contiguous runs from memory.
    pub(crate) stream_rates: Rates,
    /// Bytes that the shared cache holds; 0 without one.
    pub(crate) cache_bytes: f64,
    /// Bytes of operands that a core holds.
    pub(crate) core_bytes: u64,
    /// FP32 accumulators that a core holds.
    pub(crate) accumulators: u64,
    /// Shortest step, in seconds.
    pub(crate) matrix_step: f64,
    /// Vector operations per second of one core.
    pub(crate) vector: f64,
    fp8: f64,
    bf16: f64,
    f32: f64,
    pub(crate) alignment: u64,
    pub(crate) library: Library,
}

/// What the kernel library does, as numbers.
#[derive(Clone, Debug)]
pub(crate) struct Library {
    pub(crate) choice: TileChoice,
    pub(crate) rows: Vec<u64>,
    pub(crate) columns: Vec<u64>,
    pub(crate) group_rows: u64,
    pub(crate) stores_overlap: bool,
    pub(crate) stages: u64,
    pub(crate) cluster: u64,
    pub(crate) cluster_rows: u64,
    pub(crate) split_k: u64,
    pub(crate) promotion_ops: f64,
    pub(crate) decode_reach: f64,
    pub(crate) prefill_reach: f64,
    pub(crate) decode_rows: u64,
    pub(crate) prefill_rows: u64,
    pub(crate) attention_keys: u64,
}

impl DieFigures {
    pub(crate) fn new(machine: &Machine) -> Self {
        let d = &machine.die;
        let cores = d.cores.value;
        let memory = d.memory_gb_s.value * 1e9;
        let rates = |reach: f64| Rates {
            load: memory * reach,
            store: memory * d.memory_reach.value,
            cache: d.cache.as_ref().map_or(f64::INFINITY, |c| c.gb_s.value * 1e9),
            port: d.core.port_gb_s.value * 1e9,
        };
        let memory_latency = d.memory_latency_us.value * 1e-6;
        let kernel = machine.launch.kernel_us.value * 1e-6;
        DieFigures {
            cores: cores as u64,
            communication_cores: (machine.kernels.communication_cores.value as u64)
                .min(cores as u64),
            startup: kernel + memory_latency,
            memory_latency,
            kernel,
            // A tile's reach above the stream's would beat the roofline.
            tile_rates: rates(d.memory_tile_reach.value.min(d.memory_reach.value)),
            stream_rates: rates(d.memory_reach.value),
            cache_bytes: d.cache.as_ref().map_or(0.0, |c| c.mib.value * f64::from(1 << 20)),
            core_bytes: (d.core.memory_kib.value * 1024.0) as u64,
            accumulators: (d.core.accumulator_kib.value * 1024.0 / 4.0) as u64,
            matrix_step: d.core.matrix_step_ns.value * 1e-9,
            vector: d.vector_gops.value * 1e9 / cores,
            fp8: d.fp8_tflops.value * 1e12 / cores,
            bf16: d.bf16_tflops.value * 1e12 / cores,
            f32: d.f32_tflops.value * 1e12 / cores,
            alignment: d.matrix_alignment.value as u64,
            library: Library::new(&machine.kernels),
        }
    }

    /// Matrix operations per second of one core.
    pub(crate) fn matrix(&self, dtype: DType) -> f64 {
        match dtype {
            DType::F8E4M3 => self.fp8,
            DType::Bf16 => self.bf16,
            _ => self.f32,
        }
    }
}

impl Library {
    fn new(k: &Kernels) -> Self {
        let whole = |c: &crate::machine::Constant| c.value as u64;
        Library {
            choice: k.tile_choice,
            rows: k.tile_rows.iter().map(|&r| u64::from(r)).collect(),
            columns: k.tile_columns.iter().map(|&c| u64::from(c)).collect(),
            group_rows: u64::from(k.group_rows),
            stores_overlap: k.stores_overlap,
            stages: whole(&k.stages).max(2),
            cluster: whole(&k.cluster),
            cluster_rows: whole(&k.cluster_rows),
            split_k: whole(&k.split_k),
            promotion_ops: k.promotion_ops.value,
            decode_reach: k.decode_reach.value,
            prefill_reach: k.prefill_reach.value,
            decode_rows: whole(&k.decode_rows),
            prefill_rows: whole(&k.prefill_rows),
            attention_keys: whole(&k.attention_keys),
        }
    }
}
