//! Machine files: what a machine is made of, each constant with its provenance.

use hal::{DType, DiePlacement, Link, LinkKind, Topology};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::path::{Path, PathBuf};

/// Where a constant comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Provenance {
    /// The maker's or a paper's own figure.
    Published,
    /// Somebody measured it on the machine.
    Measured,
    /// Arithmetic from published or measured figures.
    Derived,
    /// Nobody outside the maker knows; a named guess.
    Assumed,
}

impl fmt::Display for Provenance {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Provenance::Published => "published",
            Provenance::Measured => "measured",
            Provenance::Derived => "derived",
            Provenance::Assumed => "assumed",
        })
    }
}

/// A figure, where it comes from, and the source or the reasoning in words.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Constant {
    /// The figure, in the unit that the field's name says.
    pub value: f64,
    /// Where it comes from.
    pub provenance: Provenance,
    /// Document, measurement or reasoning.
    pub source: String,
}

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
    /// The share of it that long reads reach, 0 to 1.
    pub memory_reach: Constant,
    /// Dense FP8 matrix rate under load, in TFLOPS.
    pub fp8_tflops: Constant,
    /// Dense BF16 matrix rate under load, in TFLOPS.
    pub bf16_tflops: Constant,
    /// FP32 matrix rate, in TFLOPS.
    pub f32_tflops: Constant,
    /// Vector units, in 10⁹ operations per second.
    pub vector_gops: Constant,
    /// Matrix operands run best in multiples of this.
    pub matrix_alignment: Constant,
}

/// What it costs to start work.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Launch {
    /// Host time to issue one command, in microseconds.
    pub host_us: Constant,
    /// Device time between two commands of a stream, in microseconds.
    pub device_us: Constant,
    /// Time until the host notices that a command is done, in microseconds.
    pub sync_us: Constant,
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
    /// Reachable bandwidth one way, in GB/s.
    pub gb_s: Constant,
    /// Time for the first byte, in microseconds.
    pub latency_us: Constant,
}

/// Why a machine cannot be had.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MachineError {
    /// No built-in machine has this name.
    #[error("no machine is called {name:?}; built in are {}; or give the path of a machine file", known.join(", "))]
    Unknown {
        /// The name asked for.
        name: String,
        /// The names there are.
        known: Vec<&'static str>,
    },
    /// The file cannot be read.
    #[error("machine file {}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The file is not a machine file.
    #[error("machine file {file}: {problem}")]
    Parse {
        /// The file or the built-in's name.
        file: String,
        /// Where and what.
        problem: String,
    },
    /// A constant is impossible.
    #[error("machine file {file}: {field} is {value}, expected {expected}")]
    Impossible {
        /// The file or the built-in's name.
        file: String,
        /// The constant.
        field: String,
        /// Its value.
        value: f64,
        /// What is possible.
        expected: &'static str,
    },
}

const BUILT_IN: &[(&str, &str)] = &[
    ("va16", include_str!("../machines/va16.toml")),
    ("h800", include_str!("../machines/h800.toml")),
];

impl Machine {
    /// The names of the built-in machines.
    pub fn names() -> impl Iterator<Item = &'static str> {
        BUILT_IN.iter().map(|(name, _)| *name)
    }

    /// A built-in machine.
    ///
    /// # Errors
    ///
    /// [`MachineError::Unknown`] with the names there are.
    pub fn named(name: &str) -> Result<Machine, MachineError> {
        match BUILT_IN.iter().find(|(known, _)| *known == name) {
            Some((_, text)) => Machine::parse(text, name),
            None => Err(MachineError::Unknown {
                name: name.to_string(),
                known: Machine::names().collect(),
            }),
        }
    }

    /// A built-in machine by name, or a machine file by path: what `--machine` takes. Text that
    /// ends in `.toml` or has a path separator is a path.
    ///
    /// # Errors
    ///
    /// As [`Machine::named`] and [`Machine::parse`]; [`MachineError::Read`].
    pub fn load(name_or_path: &str) -> Result<Machine, MachineError> {
        let path = Path::new(name_or_path);
        if path.extension().is_none_or(|e| e != "toml") && path.components().count() < 2 {
            return Machine::named(name_or_path);
        }
        let text = std::fs::read_to_string(path)
            .map_err(|source| MachineError::Read { path: path.to_path_buf(), source })?;
        Machine::parse(&text, name_or_path)
    }

    /// Reads a machine file's text; `file` is how errors call it.
    ///
    /// # Errors
    ///
    /// [`MachineError::Parse`] with line and field; [`MachineError::Impossible`].
    pub fn parse(text: &str, file: &str) -> Result<Machine, MachineError> {
        let machine: Machine = toml::from_str(text)
            .map_err(|e| MachineError::Parse { file: file.to_string(), problem: e.to_string() })?;
        machine.check(file)?;
        Ok(machine)
    }

    fn check(&self, file: &str) -> Result<(), MachineError> {
        let impossible = |field: &str, value: f64, expected| {
            Err(MachineError::Impossible {
                file: file.into(),
                field: field.into(),
                value,
                expected,
            })
        };
        let s = &self.system;
        for (field, count) in [
            ("system.hosts", s.hosts),
            ("system.cards_per_host", s.cards_per_host),
            ("system.dies_per_card", s.dies_per_card),
        ] {
            if !(1..=65_536).contains(&count) {
                return impossible(field, f64::from(count), "a count from 1 to 65536");
            }
        }
        let dies = u64::from(s.hosts) * u64::from(s.cards_per_host) * u64::from(s.dies_per_card);
        if dies > 65_536 {
            return impossible("system", dies as f64, "at most 65536 dies in all");
        }
        for (field, constant) in self.constants() {
            let (v, may_be_zero) = (constant.value, field.ends_with("_us"));
            if !v.is_finite() || v < 0.0 || (v == 0.0 && !may_be_zero) || v > 1e12 {
                return impossible(&field, v, "a positive number");
            }
        }
        let reach = self.die.memory_reach.value;
        if reach > 1.0 {
            return impossible("die.memory_reach", reach, "a share of at most 1");
        }
        Ok(())
    }

    /// Every constant with its dotted name, in the order of the file.
    pub fn constants(&self) -> Vec<(String, &Constant)> {
        let (d, l) = (&self.die, &self.launch);
        let mut all: Vec<(String, &Constant)> = [
            ("die.cores", &d.cores),
            ("die.memory_gib", &d.memory_gib),
            ("die.memory_gb_s", &d.memory_gb_s),
            ("die.memory_reach", &d.memory_reach),
            ("die.fp8_tflops", &d.fp8_tflops),
            ("die.bf16_tflops", &d.bf16_tflops),
            ("die.f32_tflops", &d.f32_tflops),
            ("die.vector_gops", &d.vector_gops),
            ("die.matrix_alignment", &d.matrix_alignment),
            ("launch.host_us", &l.host_us),
            ("launch.device_us", &l.device_us),
            ("launch.sync_us", &l.sync_us),
        ]
        .into_iter()
        .map(|(name, constant)| (name.to_string(), constant))
        .collect();
        let links = [
            ("host", Some(&self.link.host)),
            ("on_card", self.link.on_card.as_ref()),
            ("in_host", self.link.in_host.as_ref()),
            ("network", self.link.network.as_ref()),
        ];
        for (name, link) in links {
            if let Some(link) = link {
                all.push((format!("link.{name}.gb_s"), &link.gb_s));
                all.push((format!("link.{name}.latency_us"), &link.latency_us));
            }
        }
        all
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

    /// Where dies sit and what joins them.
    pub fn topology(&self) -> Topology {
        let s = &self.system;
        let per_host = s.cards_per_host * s.dies_per_card;
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn built_in_machines_are_sound() {
        for name in Machine::names() {
            let machine = Machine::named(name).unwrap();
            assert_eq!(machine.name, name);
            assert_eq!(machine.topology().dies(), machine.dies() as usize);
            for (field, constant) in machine.constants() {
                assert!(!constant.source.is_empty(), "{name}: {field} has no source");
            }
        }
        let va16 = Machine::named("va16").unwrap();
        assert_eq!(va16.dies(), 32, "8 cards of 4 dies");
        assert_eq!(va16.memory_bytes(), 32 << 30);
        assert!(va16.assumed().contains(&"die.memory_gb_s".to_string()), "it is not public");
        assert!(!va16.assumed().contains(&"die.memory_gib".to_string()));
    }

    #[test]
    fn mistakes_are_named() {
        let text = include_str!("../machines/va16.toml");
        let unknown_field = text.replace("dies_per_card", "dies_on_card");
        let impossible = text.replacen("value = 32", "value = -32", 1);
        for (text, words) in [
            ("name = 3", "name"),
            (&unknown_field, "dies_on_card"),
            (&impossible, "die.memory_gib is -32, expected a positive number"),
        ] {
            let error = Machine::parse(text, "x.toml").unwrap_err().to_string();
            assert!(error.contains(words) && error.contains("x.toml"), "{error}");
        }
        let error = Machine::load("va17").unwrap_err().to_string();
        assert!(error.contains("va16, h800"), "{error}");
        assert!(matches!(Machine::load("no/such.toml"), Err(MachineError::Read { .. })));
    }
}
