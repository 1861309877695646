//! Machine files: what a machine is made of, each constant with its provenance.
//!
//! `docs/machine-files.md` says how to write one. [`Machine`] is the file's contents, [`Constant`]
//! a figure of it; reading and checking are in `file.rs`.

mod constant;
mod file;

pub use constant::{Constant, Provenance};
pub use file::MachineError;

use hal::{DType, DiePlacement, Link, LinkKind, Topology};
use serde::{Deserialize, Serialize};

/// A machine: a page that reads like a data sheet.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Machine {
    /// Short name, as `--machine` takes it.
    pub name: String,
    /// One line about it.
    pub description: String,
    /// How many of what.
    pub system: SystemSize,
    /// One die.
    pub die: Die,
    /// What it costs to start work.
    pub launch: Launch,
    /// The kernel library that runs on it.
    pub kernels: Kernels,
    /// What joins dies and hosts.
    pub link: Links,
}

/// How many of what.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SystemSize {
    /// Hosts.
    pub hosts: u32,
    /// Cards in a host.
    pub cards_per_host: u32,
    /// Dies on a card.
    pub dies_per_card: u32,
}

/// One die.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Die {
    /// Compute cores: AI cores, SMs.
    pub cores: Constant,
    /// Device memory, in GiB.
    pub memory_gib: Constant,
    /// Nominal memory bandwidth, in GB/s.
    pub memory_gb_s: Constant,
    /// The share of it that long contiguous reads reach, 0 to 1.
    pub memory_reach: Constant,
    /// The share of it that reads of matrix tiles reach: many rows of 128 bytes, far apart.
    pub memory_tile_reach: Constant,
    /// Time from a read's issue to its first byte, in microseconds.
    pub memory_latency_us: Constant,
    /// Dense FP8 matrix rate under load, in TFLOPS.
    pub fp8_tflops: Constant,
    /// Dense BF16 matrix rate under load, in TFLOPS.
    pub bf16_tflops: Constant,
    /// FP32 matrix rate, in TFLOPS.
    pub f32_tflops: Constant,
    /// Vector units, in 10⁹ operations per second.
    pub vector_gops: Constant,
    /// Matrix operands run best in multiples of this; the rows of the native matrix tile.
    pub matrix_alignment: Constant,
    /// One core.
    pub core: Core,
    /// The cache that all cores share, where there is one.
    pub cache: Option<Cache>,
}

/// One compute core.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Core {
    /// On-chip memory for operands in flight, in KiB.
    pub memory_kib: Constant,
    /// Room for FP32 accumulators, in KiB: what bounds a tile's area.
    pub accumulator_kib: Constant,
    /// What one core can load, in GB/s, however idle the rest.
    pub port_gb_s: Constant,
    /// The shortest time of one step of 128 bytes of K, in nanoseconds: the latency of dependent
    /// matrix instructions and, for FP8, of adding the partial sums in FP32.
    pub matrix_step_ns: Constant,
}

/// A cache between device memory and the cores.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Cache {
    /// Its size, in MiB.
    pub mib: Constant,
    /// What all cores together read from it, in GB/s.
    pub gb_s: Constant,
}

/// What it costs to start work.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Launch {
    /// Host time to issue one command, in microseconds.
    pub host_us: Constant,
    /// Device time between two commands of a stream, in microseconds.
    pub device_us: Constant,
    /// Time inside a kernel before its first load and after its last store, in microseconds.
    pub kernel_us: Constant,
    /// Time until the host notices that a command is done, in microseconds.
    pub sync_us: Constant,
    /// Host time between two steps, in microseconds: choosing tokens, choosing who goes next.
    pub step_us: Constant,
}

/// How a kernel library cuts a matrix product into tiles.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum TileChoice {
    /// The tile with the least predicted time: a tuned library.
    Fastest,
    /// The tile with the fewest waves, then the fullest last wave, then the least padding: the
    /// rule of DeepGEMM, which knows nothing of bandwidth.
    FewestWaves,
}

/// A kernel library, by what it can do. The same chip gains 10 to 30% between generations of
/// kernels, so a machine file names one.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Kernels {
    /// Which libraries, of when.
    pub generation: String,
    /// How tiles are chosen.
    pub tile_choice: TileChoice,
    /// Tile heights that exist (rows of activations), ascending.
    pub tile_rows: Vec<u32>,
    /// Tile widths that exist (columns of output), ascending.
    pub tile_columns: Vec<u32>,
    /// Tile height of grouped products whose groups lie one after the other.
    pub group_rows: u32,
    /// Whether results are written while the next tile is computed.
    pub stores_overlap: bool,
    /// Most stages of loads in flight on a core.
    pub stages: Constant,
    /// Neighbouring cores that load an operand together; 1 for none.
    pub cluster: Constant,
    /// Rows from which they do.
    pub cluster_rows: Constant,
    /// Most pieces that K is cut into where tiles are too few; 1 for none.
    pub split_k: Constant,
    /// Vector operations per accumulator and 128 of K that FP8 products need, where the matrix unit
    /// does not scale and add partial sums in FP32 itself; 0 where it does.
    pub promotion_ops: Constant,
    /// The share of the matrix rate that absorbed attention's main loop reaches, softmax between
    /// products.
    pub decode_reach: Constant,
    /// The same for expanded attention.
    pub prefill_reach: Constant,
    /// Rows (queries times heads) of a tile of decode attention.
    pub decode_rows: Constant,
    /// Query rows of a tile of prefill attention.
    pub prefill_rows: Constant,
    /// Keys in a step of attention.
    pub attention_keys: Constant,
    /// Sender's time per token copy of low-latency expert dispatch, in microseconds.
    pub token_us: Constant,
    /// Fixed time of a throughput-oriented exchange: counting, barriers; in microseconds.
    pub exchange_us: Constant,
    /// Most rows of a rank that go straight to their dies by low-latency kernels; more go by kernels
    /// made for throughput.
    pub low_latency_rows: Constant,
    /// Fixed time of a collective: joining, choosing, flags; in microseconds.
    pub collective_us: Constant,
    /// Cores that a collective, or an exchange made for throughput, takes from computation; 0 where
    /// copy engines carry it.
    pub communication_cores: Constant,
}

/// What joins dies and hosts. An absent link joins nothing.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Links {
    /// A die and its host.
    pub host: LinkConstants,
    /// Dies of one card.
    pub on_card: Option<LinkConstants>,
    /// Cards of one host.
    pub in_host: Option<LinkConstants>,
    /// Hosts.
    pub network: Option<LinkConstants>,
}

/// One kind of link.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LinkConstants {
    /// Reachable bandwidth one way, in GB/s, of one port.
    pub gb_s: Constant,
    /// Time for the first byte, in microseconds.
    pub latency_us: Constant,
    /// Dies, neighbours in number, that share a port: a card's dies behind one PCIe slot, GPUs
    /// behind one NIC. 1 where absent: every die has its own.
    pub shared_by: Option<Constant>,
}

impl LinkConstants {
    /// Dies that share a port, at least 1.
    pub fn sharers(&self) -> u32 {
        self.shared_by.as_ref().map_or(1, |c| c.value as u32).max(1)
    }
}

/// Names and places of all constants, for `&` and for `&mut`.
macro_rules! constants {
    ($m:ident, $as:ident, $($by:tt)+) => {{
        let (d, l, k) = ($($by)+ $m.die, $($by)+ $m.launch, $($by)+ $m.kernels);
        let mut all = vec![
            ("die.cores", $($by)+ d.cores),
            ("die.memory_gib", $($by)+ d.memory_gib),
            ("die.memory_gb_s", $($by)+ d.memory_gb_s),
            ("die.memory_reach", $($by)+ d.memory_reach),
            ("die.memory_tile_reach", $($by)+ d.memory_tile_reach),
            ("die.memory_latency_us", $($by)+ d.memory_latency_us),
            ("die.fp8_tflops", $($by)+ d.fp8_tflops),
            ("die.bf16_tflops", $($by)+ d.bf16_tflops),
            ("die.f32_tflops", $($by)+ d.f32_tflops),
            ("die.vector_gops", $($by)+ d.vector_gops),
            ("die.matrix_alignment", $($by)+ d.matrix_alignment),
            ("die.core.memory_kib", $($by)+ d.core.memory_kib),
            ("die.core.accumulator_kib", $($by)+ d.core.accumulator_kib),
            ("die.core.port_gb_s", $($by)+ d.core.port_gb_s),
            ("die.core.matrix_step_ns", $($by)+ d.core.matrix_step_ns),
        ];
        if let Some(cache) = d.cache.$as() {
            all.push(("die.cache.mib", $($by)+ cache.mib));
            all.push(("die.cache.gb_s", $($by)+ cache.gb_s));
        }
        all.extend([
            ("launch.host_us", $($by)+ l.host_us),
            ("launch.device_us", $($by)+ l.device_us),
            ("launch.kernel_us", $($by)+ l.kernel_us),
            ("launch.sync_us", $($by)+ l.sync_us),
            ("launch.step_us", $($by)+ l.step_us),
            ("kernels.stages", $($by)+ k.stages),
            ("kernels.cluster", $($by)+ k.cluster),
            ("kernels.cluster_rows", $($by)+ k.cluster_rows),
            ("kernels.split_k", $($by)+ k.split_k),
            ("kernels.promotion_ops", $($by)+ k.promotion_ops),
            ("kernels.decode_reach", $($by)+ k.decode_reach),
            ("kernels.prefill_reach", $($by)+ k.prefill_reach),
            ("kernels.decode_rows", $($by)+ k.decode_rows),
            ("kernels.prefill_rows", $($by)+ k.prefill_rows),
            ("kernels.attention_keys", $($by)+ k.attention_keys),
            ("kernels.token_us", $($by)+ k.token_us),
            ("kernels.exchange_us", $($by)+ k.exchange_us),
            ("kernels.low_latency_rows", $($by)+ k.low_latency_rows),
            ("kernels.collective_us", $($by)+ k.collective_us),
            ("kernels.communication_cores", $($by)+ k.communication_cores),
        ]);
        let names = [
            ["link.host.gb_s", "link.host.latency_us", "link.host.shared_by"],
            ["link.on_card.gb_s", "link.on_card.latency_us", "link.on_card.shared_by"],
            ["link.in_host.gb_s", "link.in_host.latency_us", "link.in_host.shared_by"],
            ["link.network.gb_s", "link.network.latency_us", "link.network.shared_by"],
        ];
        let links = [
            Some($($by)+ $m.link.host),
            $m.link.on_card.$as(),
            $m.link.in_host.$as(),
            $m.link.network.$as(),
        ];
        for ([rate, latency, shared], link) in names.into_iter().zip(links) {
            let Some(link) = link else { continue };
            all.push((rate, $($by)+ link.gb_s));
            all.push((latency, $($by)+ link.latency_us));
            if let Some(constant) = link.shared_by.$as() {
                all.push((shared, constant));
            }
        }
        all
    }};
}

impl Machine {
    /// Every constant with its dotted name, in the order of the file.
    pub fn constants(&self) -> Vec<(String, &Constant)> {
        let all = constants!(self, as_ref, &);
        all.into_iter().map(|(name, constant)| (name.to_string(), constant)).collect()
    }

    /// A constant by its dotted name, to ask what changes with it; see [`Machine::constants`].
    pub fn constant_mut(&mut self, name: &str) -> Option<&mut Constant> {
        let all = constants!(self, as_mut, &mut);
        all.into_iter().find(|(known, _)| *known == name).map(|(_, constant)| constant)
    }

    /// The names of the constants that are guesses: what a prediction on this machine rests on.
    pub fn assumed(&self) -> Vec<String> {
        self.constants()
            .into_iter()
            .filter(|(_, c)| c.provenance == Provenance::Assumed)
            .map(|(name, _)| name)
            .collect()
    }

    /// Dies in all.
    pub fn dies(&self) -> u32 {
        self.system.hosts * self.system.cards_per_host * self.system.dies_per_card
    }

    /// Dies of one host.
    pub fn dies_per_host(&self) -> u32 {
        self.system.cards_per_host * self.system.dies_per_card
    }

    /// The same machine with enough hosts for `dies` dies: constants of dies and links do not
    /// depend on the number of hosts.
    ///
    /// # Errors
    ///
    /// In words, where hosts are not joined or the dies are too many.
    pub fn enlarged(&self, dies: u32) -> Result<Machine, String> {
        let mut machine = self.clone();
        machine.system.hosts = machine.system.hosts.max(dies.div_ceil(self.dies_per_host()));
        if machine.system.hosts > 1 && self.link.network.is_none() {
            return Err(format!(
                "{} joins at most {} dies: its file has no [link.network], so its hosts are not \
                 joined; {dies} were asked for",
                self.name,
                self.dies_per_host()
            ));
        }
        let most = file::MOST_DIES;
        if u64::from(machine.system.hosts) * u64::from(self.dies_per_host()) > most {
            return Err(format!("{dies} dies are too many: at most {most} are simulated"));
        }
        Ok(machine)
    }

    /// Bytes of a die's memory.
    pub fn memory_bytes(&self) -> u64 {
        (self.die.memory_gib.value * (1u64 << 30) as f64) as u64
    }

    /// Matrix operations per second with operands of this dtype.
    pub fn matrix_rate(&self, dtype: DType) -> f64 {
        let tflops = match dtype {
            DType::F8E4M3 => &self.die.fp8_tflops,
            DType::Bf16 => &self.die.bf16_tflops,
            _ => &self.die.f32_tflops,
        };
        tflops.value * 1e12
    }

    /// Bytes per second that long reads reach.
    pub fn memory_rate(&self) -> f64 {
        self.die.memory_gb_s.value * 1e9 * self.die.memory_reach.value
    }

    /// The constants of a kind of link; [`None`] for a die's own memory and where nothing joins.
    pub fn link(&self, kind: LinkKind) -> Option<&LinkConstants> {
        match kind {
            LinkKind::SameDie => None,
            LinkKind::OnCard => self.link.on_card.as_ref(),
            LinkKind::InHost => self.link.in_host.as_ref(),
            LinkKind::Network => self.link.network.as_ref(),
        }
    }

    /// Where dies sit and what joins them.
    pub fn topology(&self) -> Topology {
        let s = &self.system;
        let per_host = self.dies_per_host();
        let placements = (0..self.dies())
            .map(|die| DiePlacement {
                host: die / per_host,
                card: die / s.dies_per_card,
                die_on_card: die % s.dies_per_card,
            })
            .collect();
        let link = |kind, constants: &LinkConstants| Link {
            kind,
            bytes_per_second: constants.gb_s.value * 1e9,
            latency_ps: picos(constants.latency_us.value),
            peer_copy: true,
        };
        let mut links = vec![Link {
            kind: LinkKind::SameDie,
            bytes_per_second: self.memory_rate(),
            latency_ps: 0,
            peer_copy: true,
        }];
        links.extend(self.link.on_card.as_ref().map(|l| link(LinkKind::OnCard, l)));
        links.extend(self.link.in_host.as_ref().map(|l| link(LinkKind::InHost, l)));
        links.extend(self.link.network.as_ref().map(|l| link(LinkKind::Network, l)));
        Topology::new(placements, links)
    }
}

/// Microseconds as picoseconds.
pub(crate) fn picos(micros: f64) -> u64 {
    (micros * 1e6) as u64
}
