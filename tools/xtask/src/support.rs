//! The op support matrix of the documentation, from the conformance suite.

use anyhow::{Context, bail};
use hal::{Device, DeviceId};
use sim::{Machine, Mode};
use std::path::{Path, PathBuf};
use std::sync::Arc;

const DOCUMENT: &str = "docs/op-support.md";

/// Writes the matrix, or with `check` fails where it differs from what is committed.
pub(crate) fn run(root: &Path, check: bool) -> anyhow::Result<()> {
    let text = document()?;
    let path = root.join(DOCUMENT);
    if !check {
        std::fs::create_dir_all(root.join("docs"))?;
        std::fs::write(&path, text).with_context(|| format!("writing {DOCUMENT}"))?;
    } else if std::fs::read_to_string(&path).with_context(|| format!("reading {DOCUMENT}"))? != text
    {
        bail!("{DOCUMENT} is out of date: run `cargo xtask support-matrix` and commit it");
    }
    println!("{DOCUMENT} is {}", if check { "up to date" } else { "written" });
    Ok(())
}

fn document() -> anyhow::Result<String> {
    let sim = conformance::support_matrix(&*simulator()?);
    let vacc = conformance::support_matrix(&*over_the_abi()?);
    let table = conformance::support_table(&[("sim", sim), ("vacc", vacc)]);
    Ok(format!(
        "# Which ops each backend runs\n\n\
         Written by `cargo xtask support-matrix`: what `Device::supports` answers about one op for \
         every combination of dtypes that the conformance suite has cases for. The suite holds \
         the answers to what happens: its cases `op/*` run all of them against a reference, and \
         `supports/*` submit well-formed and malformed ops and compare. Dtypes stand in the order \
         of the operands, neighbours that are equal once.\n\n\
         `vacc` is the FFI backend over the simulator behind the C ABI. A card's own library \
         answers for itself: `dsv3-run conformance --backend vacc --vacc-runtime FILE` runs the \
         suite on it.\n\n{table}"
    ))
}

fn simulator() -> anyhow::Result<Arc<dyn Device>> {
    let options = sim::Options { mode: Mode::FunctionalOnly, threads: Some(1) };
    Ok(sim::System::new(Machine::named("va16")?, options)?.open(DeviceId(0))?)
}

/// `libvaccrt` over the simulator, which is built with this program.
fn over_the_abi() -> anyhow::Result<Arc<dyn Device>> {
    let flag = Some(library()?);
    let runtime = vacc::loader::load(&vacc::Search { flag, ..vacc::Search::default() })?;
    let config = Some("machine=va16;threads=1".to_string());
    let options = vacc::Options { visible_devices: None, config };
    Ok(vacc::System::new(Arc::new(runtime), &options)?.open(DeviceId(0))?)
}

/// It lies beside a test program, and in the folder of dependencies of any other.
fn library() -> anyhow::Result<PathBuf> {
    let program = std::env::current_exe()?;
    let beside = program.with_file_name("libvaccrt.so");
    let below = program.with_file_name("deps").join("libvaccrt.so");
    match [below, beside].into_iter().find(|path| path.is_file()) {
        Some(path) => Ok(path),
        None => bail!("libvaccrt.so was not built beside {}", program.display()),
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_matrix_is_up_to_date_and_complete() {
        super::run(&crate::root(), true).unwrap();
        let text = std::fs::read_to_string(crate::root().join(super::DOCUMENT)).unwrap();
        for kind in hal::OpKind::ALL {
            let row = format!("| `{}` |", kind.name());
            let found = text.lines().find(|line| line.starts_with(&row));
            let found = found.unwrap_or_else(|| panic!("no line about {}", kind.name()));
            assert!(found.ends_with("| yes | yes |"), "{found}");
        }
    }
}
