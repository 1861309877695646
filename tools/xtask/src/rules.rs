//! Rules of the architecture that can be read off the manifests and sources.

use anyhow::{Context, bail};
use std::path::{Path, PathBuf};

/// Which crates of the workspace each crate may depend on. Nothing else may.
const DEPENDENCIES: &[(&str, &[&str])] = &[
    ("hal", &[]),
    ("hal/conformance", &["hal"]),
    ("hal/replay", &["hal"]),
    ("backends/sim", &["hal"]),
    ("backends/vacc", &["hal"]),
    // A runtime like any other, seen from outside; inside, the simulator behind the shared ABI.
    ("backends/vacc/runtime-sim", &["hal", "sim", "vacc"]),
    // Tests of the model run it on the simulator; the library must not know it.
    ("model", &["hal"]),
    // Any source of spans: it knows neither devices nor the model.
    ("tools/report", &["hal"]),
    // Estimates take times from the simulator and names from reports; they run nothing.
    ("tools/perf", &["hal", "sim", "model", "report"]),
];

/// Crates that another may depend on.
const MEMBERS: &[&str] =
    &["hal", "conformance", "replay", "sim", "vacc", "model", "report", "perf", "dsv3-run"];

/// Where `unsafe` may stand: SIMD kernels, the one call that maps a file, the FFI crates, and tests
/// and benchmarks that need an allocator of their own or call C.
const UNSAFE: &[&str] = &[
    "backends/sim/src/kernels/simd.rs",
    "backends/vacc/",
    "model/src/checkpoint/map.rs",
    "hal/tests/no_alloc.rs",
];

/// Checks the rules, and names every place that breaks one.
pub(crate) fn check(root: &Path) -> anyhow::Result<()> {
    let mut broken = Vec::new();
    for (krate, allowed) in DEPENDENCIES {
        let manifest = std::fs::read_to_string(root.join(krate).join("Cargo.toml"))
            .with_context(|| format!("reading the manifest of {krate}"))?;
        let dependencies = manifest.split("[dependencies]").nth(1).unwrap_or_default();
        let dependencies = dependencies.split("\n[").next().unwrap_or_default();
        for &member in MEMBERS {
            let named = dependencies.lines().any(|l| l.starts_with(&format!("{member}.")));
            if named && !allowed.contains(&member) {
                broken.push(format!("{krate} depends on {member}"));
            }
        }
    }
    for folder in ["hal", "backends", "model", "tools"] {
        for file in rust_files(&root.join(folder))? {
            let name = file.strip_prefix(root).unwrap_or(&file).display().to_string();
            let text = std::fs::read_to_string(&file)?;
            let code = text.lines().map(str::trim).filter(|l| !l.starts_with("//"));
            let uses_unsafe = code.into_iter().any(|l| {
                l.contains("unsafe {") || l.contains("unsafe fn") || l.contains("unsafe impl")
            });
            // This file spells the words out.
            if uses_unsafe
                && !UNSAFE.iter().any(|allowed| name.starts_with(allowed))
                && !name.ends_with("xtask/src/rules.rs")
            {
                broken.push(format!("{name} has unsafe code; it belongs in {}", UNSAFE.join(", ")));
            }
        }
    }
    if !broken.is_empty() {
        bail!("rules of ARCHITECTURE.md are broken:\n  {}", broken.join("\n  "));
    }
    println!("dependencies and unsafe code are where they belong");
    Ok(())
}

fn rust_files(folder: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(folder).with_context(|| folder.display().to_string())? {
        let path = entry?.path();
        if path.is_dir() {
            files.extend(rust_files(&path)?);
        } else if path.extension().is_some_and(|e| e == "rs") {
            files.push(path);
        }
    }
    Ok(files)
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_workspace_keeps_its_rules() {
        super::check(&crate::root()).unwrap();
    }
}
