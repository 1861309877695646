//! Licences of dependencies, read from their manifests: works offline on a plain Rust machine.

use anyhow::{Context, bail, ensure};
use serde_json::Value;
use std::path::Path;
use std::process::Command;

/// Checks every package of the dependency graph against the list in `deny.toml`, and runs
/// cargo-deny besides where it is installed.
pub(crate) fn check(root: &Path) -> anyhow::Result<()> {
    let allowed = allowed(&std::fs::read_to_string(root.join("deny.toml"))?);
    ensure!(!allowed.is_empty(), "deny.toml allows no licences");
    let output = Command::new(env!("CARGO"))
        .args(["metadata", "--format-version", "1", "--locked"])
        .current_dir(root)
        .output()
        .context("cargo metadata")?;
    ensure!(output.status.success(), "cargo metadata failed");
    let metadata: Value = serde_json::from_slice(&output.stdout)?;
    let packages = metadata["packages"].as_array().context("cargo metadata without packages")?;
    let mut refused = Vec::new();
    for package in packages {
        let licence = package["license"].as_str().unwrap_or("none");
        if !is_allowed(licence, &allowed) {
            refused.push(format!("{} {}: {licence}", package["name"], package["version"]));
        }
    }
    if !refused.is_empty() {
        bail!("licences that deny.toml does not allow:\n  {}", refused.join("\n  "));
    }
    println!("licences of {} packages are allowed", packages.len());
    let deny = Command::new("cargo-deny").arg("--version").output();
    if deny.is_ok_and(|o| o.status.success()) {
        let checks = ["deny", "--offline", "check", "licenses", "bans", "sources"];
        let status = Command::new(env!("CARGO")).args(checks).current_dir(root).status()?;
        ensure!(status.success(), "cargo deny failed");
    }
    Ok(())
}

/// The strings of the `allow` list.
fn allowed(deny_toml: &str) -> Vec<String> {
    let list = deny_toml.split("allow = [").nth(1).and_then(|rest| rest.split(']').next());
    let quoted = list.unwrap_or_default().split('"').skip(1).step_by(2);
    quoted.map(str::to_string).collect()
}

/// Whether an SPDX expression can be satisfied: one alternative of every `OR`, all of an `AND`.
fn is_allowed(expression: &str, allowed: &[String]) -> bool {
    let expression = expression.replace('/', " OR ").replace(['(', ')'], " ");
    expression
        .split(" AND ")
        .all(|part| part.split(" OR ").any(|licence| allowed.iter().any(|a| a == licence.trim())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn expressions_are_read() {
        let allowed = allowed("[licenses]\nallow = [\n \"MIT\",\n \"Zlib\",\n]\n");
        assert_eq!(allowed, ["MIT", "Zlib"]);
        for (expression, expected) in [
            ("MIT", true),
            ("MIT OR GPL-3.0", true),
            ("GPL-3.0/MIT", true),
            ("(MIT OR Apache-2.0) AND Zlib", true),
            ("MIT AND GPL-3.0", false),
            ("none", false),
        ] {
            assert_eq!(is_allowed(expression, &allowed), expected, "{expression}");
        }
    }
}
