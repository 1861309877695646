//! Bindings of `vacc.h`: generated here, committed there, so that no build needs libclang.

use anyhow::{Context, bail, ensure};
use std::path::Path;
use std::process::Command;

const HEADER: &str = "backends/vacc/include/vacc.h";
const BINDINGS: &str = "backends/vacc/src/sys/bindings.rs";
const UNWRAPPED: &str = "backends/vacc/UNWRAPPED.md";

/// Writes the generated files, or with `check` fails where they differ from what is committed.
pub(crate) fn run(root: &Path, check: bool) -> anyhow::Result<()> {
    let header = std::fs::read_to_string(root.join(HEADER)).context(HEADER)?;
    let functions = functions(&header)?;
    let bindings = generate(root, &functions)?;
    let unwrapped = unwrapped(root, &functions)?;
    for (file, text) in [(BINDINGS, bindings), (UNWRAPPED, unwrapped)] {
        let path = root.join(file);
        if !check {
            std::fs::write(&path, text).with_context(|| format!("writing {file}"))?;
        } else if std::fs::read_to_string(&path).with_context(|| format!("reading {file}"))? != text
        {
            bail!("{file} is not what {HEADER} gives: run `cargo xtask bindings` and commit it");
        }
    }
    println!("bindings of {} functions are {}", functions.len(), state(check));
    Ok(())
}

fn state(check: bool) -> &'static str {
    if check { "up to date" } else { "written" }
}

/// A function of the header.
#[derive(Debug, PartialEq, Eq)]
struct Function {
    name: String,
    required: bool,
}

/// The functions in order, and whether the comment before them, or else their section, says
/// OPTIONAL.
fn functions(header: &str) -> anyhow::Result<Vec<Function>> {
    let (mut section, mut marked) = (true, None);
    let mut found = Vec::new();
    for line in header.lines() {
        if line.starts_with(" * ") && line.contains("(OPTIONAL") {
            section = false;
        }
        if line.starts_with("/*") {
            marked = match () {
                () if line.contains("REQUIRED.") => Some(true),
                () if line.contains("OPTIONAL.") => Some(false),
                () => None,
            };
        }
        let prototype = ["vacc_status ", "uint32_t ", "const char *"]
            .iter()
            .find_map(|r| line.strip_prefix(r))
            .filter(|rest| rest.starts_with("vacc_"))
            .and_then(|rest| rest.split_once('('));
        if let Some((name, _)) = prototype {
            found.push(Function { name: name.to_string(), required: marked.unwrap_or(section) });
        }
    }
    ensure!(found.iter().any(|f| f.required), "{HEADER} declares no required function");
    Ok(found)
}

fn generate(root: &Path, functions: &[Function]) -> anyhow::Result<String> {
    let header = root.join(HEADER);
    let header = header.to_str().context("the repository's path is not UTF-8")?;
    let builder = bindgen::builder()
        .header(header)
        .allowlist_item("(vacc|VACC)_.*")
        .dynamic_library_name("Api")
        // Absent symbols are judged by the loader: it names all of them, and not all are needed.
        .dynamic_link_require_all(false)
        .derive_default(true)
        .derive_debug(true)
        .generate_comments(false)
        .wrap_unsafe_ops(true)
        .formatter(bindgen::Formatter::None)
        .clang_arg("-std=c99");
    // Without libclang the generator panics; this is for people.
    let generated = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| builder.generate()));
    let Ok(generated) = generated else {
        bail!("bindgen needs libclang: `apt-get install libclang1`, or set LIBCLANG_PATH");
    };
    let generated = generated.context("bindgen")?;
    let check = |required: bool| {
        let lines = functions
            .iter()
            .filter(|f| f.required == required)
            .map(|f| format!("if api.{0}.is_err() {{ missing.push(\"{0}\"); }}\n", f.name));
        lines.collect::<String>()
    };
    let text = format!(
        "// Generated from include/vacc.h by `cargo xtask bindings`: do not edit.\n{generated}\n\
         /// Required functions that the library does not export.\n\
         pub fn missing_required(api: &Api) -> Vec<&'static str> {{\n\
         let mut missing = Vec::new();\n{}missing\n}}\n\n\
         /// Optional functions that the library does not export.\n\
         pub fn missing_optional(api: &Api) -> Vec<&'static str> {{\n\
         let mut missing = Vec::new();\n{}missing\n}}\n",
        check(true),
        check(false),
    );
    format(root, &text)
}

/// The text as `cargo fmt` wants it.
fn format(root: &Path, text: &str) -> anyhow::Result<String> {
    let file = root.join("target/vacc-bindings.rs");
    std::fs::create_dir_all(root.join("target"))?;
    std::fs::write(&file, text)?;
    let status = Command::new("rustfmt")
        .args(["--edition", "2024", "--config-path"])
        .arg(root.join("rustfmt.toml"))
        .arg(&file)
        .status()
        .context("starting rustfmt")?;
    ensure!(status.success(), "rustfmt failed on the generated bindings");
    Ok(std::fs::read_to_string(&file)?)
}

/// A list of the functions that no file of the backend names.
fn unwrapped(root: &Path, functions: &[Function]) -> anyhow::Result<String> {
    let mut sources = String::new();
    for entry in std::fs::read_dir(root.join("backends/vacc/src"))? {
        let path = entry?.path();
        if path.is_file() {
            sources += &std::fs::read_to_string(&path)?;
        }
    }
    let called = |f: &Function| {
        sources
            .split(&f.name)
            .skip(1)
            .any(|rest| !rest.starts_with(|c: char| c.is_ascii_alphanumeric() || c == '_'))
    };
    let open: Vec<String> =
        functions.iter().filter(|f| !called(f)).map(|f| format!("- `{}`\n", f.name)).collect();
    let list = if open.is_empty() { "None: all are wrapped.\n".into() } else { open.concat() };
    Ok(format!(
        "# Functions of vacc.h that the backend does not call\n\n\
         Generated by `cargo xtask bindings`.\n\n{list}"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn functions_are_found_with_their_marks() {
        let header = "/* REQUIRED. One. */\nvacc_status vacc_a(int x);\nvacc_status vacc_b(void);\n\
                      /* OPTIONAL. */\nconst char *vacc_c(void);\n * 13. X (OPTIONAL: all)\n\
                      /* words */\nuint32_t vacc_d(void);\ntypedef struct vacc_e {\n";
        let found = functions(header).unwrap();
        let found: Vec<_> = found.iter().map(|f| (f.name.as_str(), f.required)).collect();
        assert_eq!(
            found,
            [("vacc_a", true), ("vacc_b", true), ("vacc_c", false), ("vacc_d", false)]
        );
    }
}
