//! Reading machine files, and refusing what cannot be.

use super::{Machine, Provenance};
use std::path::{Path, PathBuf};
use toml::Table;

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
    /// Dies that a machine has are joined by nothing.
    #[error("machine file {file}: {many}, but there is no [link.{link}] to join them")]
    MissingLink {
        /// The file or the built-in's name.
        file: String,
        /// What there is more than one of.
        many: String,
        /// The link's name.
        link: &'static str,
    },
}

const BUILT_IN: &[(&str, &str)] = &[
    ("va16", include_str!("../../machines/va16.toml")),
    ("h800", include_str!("../../machines/h800.toml")),
    ("h100", include_str!("../../machines/h100.toml")),
    ("h200", include_str!("../../machines/h200.toml")),
    ("b200", include_str!("../../machines/b200.toml")),
    ("cloudmatrix384", include_str!("../../machines/cloudmatrix384.toml")),
];

/// The most dies of a machine.
pub(super) const MOST_DIES: u64 = 65_536;

/// Constants that count something.
const COUNTS: &[&str] = &[
    "die.cores",
    "die.matrix_alignment",
    "kernels.stages",
    "kernels.cluster",
    "kernels.cluster_rows",
    "kernels.split_k",
    "kernels.decode_rows",
    "kernels.prefill_rows",
    "kernels.attention_keys",
    "kernels.low_latency_rows",
    "kernels.communication_cores",
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
        Machine::parse(built_in(name)?, name)
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

    /// Reads a machine file's text; `file` is how errors call it. A file with `based_on = "h800"`
    /// says only what differs from that built-in machine.
    ///
    /// # Errors
    ///
    /// [`MachineError::Parse`] with line and field; [`MachineError::Impossible`];
    /// [`MachineError::MissingLink`]; [`MachineError::Unknown`] for the base.
    pub fn parse(text: &str, file: &str) -> Result<Machine, MachineError> {
        let parse = |e: toml::de::Error| MachineError::Parse {
            file: file.to_string(),
            problem: e.to_string(),
        };
        let mut table: Table = toml::from_str(text).map_err(parse)?;
        let machine: Machine = match table.remove("based_on") {
            // Straight from the text, so that errors have lines.
            None => toml::from_str(text).map_err(parse)?,
            Some(base) => {
                let mut whole = with_base(base.as_str().unwrap_or_default())?;
                overlay(&mut whole, table);
                toml::Value::Table(whole).try_into().map_err(parse)?
            }
        };
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
        if dies > MOST_DIES {
            return impossible("system", dies as f64, "at most 65536 dies in all");
        }
        for (field, constant) in self.constants() {
            let v = constant.value;
            // A latency may be nothing; a rate of zero would never finish.
            let may_be_zero =
                ["_us", "_ns", "_ops", "_cores"].iter().any(|end| field.ends_with(end));
            if !v.is_finite() || v < 0.0 || (v == 0.0 && !may_be_zero) || v > 1e12 {
                return impossible(&field, v, "a positive number");
            }
            if field.ends_with("reach") && v > 1.0 {
                return impossible(&field, v, "a share of at most 1");
            }
            let counts = COUNTS.contains(&field.as_str()) || field.ends_with("shared_by");
            if counts && (v.fract() != 0.0 || v > 1e6) {
                return impossible(&field, v, "a whole number up to 1000000");
            }
            if constant.provenance != Provenance::Assumed && constant.source.trim().is_empty() {
                let problem = format!("{field} is {} but names no source", constant.provenance);
                return Err(MachineError::Parse { file: file.into(), problem });
            }
        }
        self.check_tiles(file)?;
        let missing =
            |many: String, link| Err(MachineError::MissingLink { file: file.into(), many, link });
        if s.dies_per_card > 1 && self.link.on_card.is_none() {
            return missing(format!("a card has {} dies", s.dies_per_card), "on_card");
        }
        if s.cards_per_host > 1 && self.link.in_host.is_none() {
            return missing(format!("a host has {} cards", s.cards_per_host), "in_host");
        }
        if s.hosts > 1 && self.link.network.is_none() {
            return missing(format!("there are {} hosts", s.hosts), "network");
        }
        Ok(())
    }

    /// Tiles exist, and the smallest fits a core.
    fn check_tiles(&self, file: &str) -> Result<(), MachineError> {
        let k = &self.kernels;
        for (name, sizes) in [
            ("kernels.tile_rows", &k.tile_rows),
            ("kernels.tile_columns", &k.tile_columns),
            ("kernels.group_rows", &vec![k.group_rows]),
        ] {
            let sound = !sizes.is_empty()
                && sizes.iter().all(|s| (1..=65_536).contains(s))
                && sizes.is_sorted_by(|a, b| a < b);
            if !sound {
                let problem =
                    format!("{name} is {sizes:?}, expected ascending sizes of 1 to 65536");
                return Err(MachineError::Parse { file: file.into(), problem });
            }
        }
        let core = &self.die.core;
        for rows in [k.tile_rows[0], k.group_rows] {
            let columns = k.tile_columns[0];
            let accumulators = f64::from(rows) * f64::from(columns) * 4.0 / 1024.0;
            // Two stages of 128 bytes of K each.
            let operands = f64::from(rows + columns) * 256.0 / 1024.0;
            let (room, need, what) = if accumulators > core.accumulator_kib.value {
                (core.accumulator_kib.value, accumulators, "die.core.accumulator_kib")
            } else if operands > core.memory_kib.value {
                (core.memory_kib.value, operands, "die.core.memory_kib")
            } else {
                continue;
            };
            let problem = format!(
                "{what} is {room}, but a tile of {rows} rows and {columns} columns, the smallest \
                 of kernels, needs {need}"
            );
            return Err(MachineError::Parse { file: file.into(), problem });
        }
        Ok(())
    }
}

fn built_in(name: &str) -> Result<&'static str, MachineError> {
    match BUILT_IN.iter().find(|(known, _)| *known == name) {
        Some((_, text)) => Ok(text),
        None => {
            Err(MachineError::Unknown { name: name.to_string(), known: Machine::names().collect() })
        }
    }
}

/// A built-in machine's file over that of its own base. Built-in files form no circle.
fn with_base(name: &str) -> Result<Table, MachineError> {
    let mut table: Table = toml::from_str(built_in(name)?)
        .map_err(|e| MachineError::Parse { file: name.to_string(), problem: e.to_string() })?;
    let Some(base) = table.remove("based_on") else { return Ok(table) };
    let mut whole = with_base(base.as_str().unwrap_or_default())?;
    overlay(&mut whole, table);
    Ok(whole)
}

/// Puts `upper`'s entries over `lower`'s; tables are merged, constants replaced whole.
fn overlay(lower: &mut Table, upper: Table) {
    for (key, value) in upper {
        match (lower.get_mut(&key), value) {
            (Some(toml::Value::Table(below)), toml::Value::Table(above))
                if !below.contains_key("value") =>
            {
                overlay(below, above);
            }
            (_, value) => {
                lower.insert(key, value);
            }
        }
    }
}

#[cfg(test)]
#[path = "tests.rs"]
mod tests;
