//! The FFI path as a user meets it: the simulator behind the C ABI answers as the simulator does.

#[path = "../../../backends/vacc/tests/common/valgrind.rs"]
mod valgrind;

use serde_json::Value;
use std::path::PathBuf;
use std::process::{Command, Output};

/// `libvaccrt`, which was built as a dependency of this test and lies beside it.
fn runtime() -> String {
    let path = std::env::current_exe().unwrap().with_file_name("libvaccrt.so");
    assert!(path.is_file(), "{} was not built", path.display());
    path.to_str().unwrap().to_string()
}

const DSV3: &str = env!("CARGO_BIN_EXE_dsv3-run");

fn dsv3(args: &[&str]) -> Command {
    with(Command::new(DSV3), args)
}

fn with(mut command: Command, args: &[&str]) -> Command {
    // Cargo puts its build folder on the loader's path, where the library would be found.
    command.args(args).env_remove("LD_LIBRARY_PATH");
    command.env_remove("VACC_RUNTIME").env_remove("VACC_VISIBLE_DEVICES");
    command
}

fn json(output: &Output) -> Value {
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{errors}");
    serde_json::from_slice(&output.stdout).unwrap()
}

#[test]
fn both_backends_give_the_same_tokens_and_the_same_simulated_time() {
    let runtime = runtime();
    let mut decode = Vec::new();
    for (numerics, eager) in [("fp8", false), ("fp8", true), ("bf16", false), ("f32", false)] {
        let mut common = vec!["--numerics", numerics, "--chat", "What is 17 + 25?", "--json", "-"];
        common.extend(eager.then_some("--enforce-eager"));
        let sim = json(&dsv3(&[&common[..], &["--backend", "sim"]].concat()).output().unwrap());
        let vacc = ["--backend", "vacc", "--vacc-runtime", &runtime, "--validate"];
        let vacc = json(&dsv3(&[&common[..], &vacc].concat()).output().unwrap());
        assert_eq!(sim["text"], "17 + 25 = 42.");
        for (section, key) in [
            ("timing", "prefill_ms"),
            ("timing", "decode_ms"),
            ("timing", "machine"),
            ("timing", "clock"),
            ("timing", "ops"),
            ("memory", "weights_bytes"),
        ] {
            assert_eq!(vacc[section][key], sim[section][key], "{numerics}: {section}.{key}");
        }
        assert_eq!(vacc["token_ids"], sim["token_ids"], "{numerics}");
        decode.push(sim["timing"]["decode_ms"].as_f64().unwrap());
        assert_eq!(vacc["timing"]["assumed"], Value::Null, "the library does not tell");
    }
    assert!(decode[0] < decode[1], "lists spare the host: {decode:?} ms");
}

#[test]
fn a_short_generation_is_clean_under_valgrind() {
    let Some(watched) = valgrind::valgrind(DSV3) else { return };
    let runtime = runtime();
    // Token ids instead of text: the tokenizer and the templates keep tables in statics that
    // valgrind cannot see pointers to, and are not what is watched here.
    let common = ["--token-ids", "0,1022,267", "--max-tokens", "4", "--json", "-"];
    let vacc = ["--backend", "vacc", "--vacc-runtime", &runtime, "--vacc-config", "threads=2"];
    let watched = json(&with(watched, &[&common[..], &vacc].concat()).output().unwrap());
    let sim = json(&dsv3(&common).output().unwrap());
    assert_eq!(watched["token_ids"].as_array().map(Vec::len), Some(4));
    assert_eq!(watched["token_ids"], sim["token_ids"]);
    assert_eq!(watched["timing"]["ops"], sim["timing"]["ops"]);
}

#[test]
fn the_variable_names_the_library_and_devices_are_listed() {
    let devices = ["devices", "--backend", "vacc", "--json"];
    let output = dsv3(&devices).env("VACC_RUNTIME", runtime()).output().unwrap();
    let report = json(&output);
    assert_eq!(report["dies"].as_array().unwrap().len(), 32);
    assert_eq!(report["missing_optional_functions"], serde_json::json!([]));
    let few = dsv3(&devices)
        .env("VACC_RUNTIME", runtime())
        .env("VACC_VISIBLE_DEVICES", "5,0")
        .output()
        .unwrap();
    let dies = json(&few)["dies"].clone();
    assert_eq!(dies.as_array().unwrap().len(), 2);
    assert_eq!(
        (&dies[0]["placement"]["card"], &dies[1]["placement"]["card"]),
        (&1.into(), &0.into())
    );
}

#[test]
fn a_library_that_cannot_be_used_is_named_with_the_reason() {
    let folder = tempfile::tempdir().unwrap();
    let text = folder.path().join("text.so");
    std::fs::write(&text, "no library at all, only words").unwrap();
    let missing = folder.path().join("missing.so");
    let fails = |command: &mut Command, words: &[&str]| {
        let output = command.output().unwrap();
        let errors = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{errors}");
        for word in words {
            assert!(errors.contains(word), "{errors:?} lacks {word:?}");
        }
        assert!(!errors.contains("panicked"), "{errors}");
    };
    let flag =
        |path: &PathBuf| dsv3(&["--backend", "vacc", "--vacc-runtime", path.to_str().unwrap()]);
    fails(&mut flag(&text), &["text.so", "is not a shared library"]);
    fails(&mut flag(&missing), &["missing.so", "cannot be read"]);
    fails(&mut dsv3(&["--backend", "vacc"]), &["libvaccrt.so.1", "--vacc-runtime", "VACC_RUNTIME"]);
    let relative = &mut dsv3(&["--backend", "vacc"]);
    fails(relative.env("VACC_RUNTIME", "libvaccrt.so"), &["not an absolute path"]);
    // A library of that name in the current directory is not taken through an empty path entry.
    std::fs::copy(runtime(), folder.path().join("libvaccrt.so")).unwrap();
    let here = &mut dsv3(&["--backend", "vacc"]);
    here.current_dir(folder.path()).env("LD_LIBRARY_PATH", ":/nowhere");
    fails(here, &["would come from the current directory"]);
    let sim_flags = ["--backend", "vacc", "--vacc-runtime", &runtime(), "--machine", "h800"];
    fails(&mut dsv3(&sim_flags), &["--vacc-config"]);
}

#[test]
fn what_the_library_refuses_and_what_fails_on_it_is_told() {
    let runtime = runtime();
    let run = |more: &[&str]| {
        let common = ["--backend", "vacc", "--vacc-runtime", &runtime];
        let output = dsv3(&[&common[..], more].concat()).output().unwrap();
        (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
    };
    let (status, text) = run(&["--vacc-config", "colour=red"]);
    assert_eq!(status, Some(1), "{text}");
    assert!(text.contains("colour=red") && text.contains("machine, timing and threads"), "{text}");
    let (status, text) = run(&["--fault", "op=linear,nth=5,action=fail:bad parity"]);
    assert_eq!(status, Some(1), "{text}");
    for words in ["linear", "bad parity", "die 0"] {
        assert!(text.contains(words), "{text}");
    }
}

/// The library without some of its functions: under other names, nobody finds them.
fn without(functions: &[&str], folder: &std::path::Path) -> String {
    let mut library = std::fs::read(runtime()).unwrap();
    for function in functions {
        let mut at = 0;
        let mut renamed = 0;
        while let Some(found) =
            library[at..].windows(function.len()).position(|w| w == function.as_bytes())
        {
            library[at + found] = b'_';
            at += found + function.len();
            renamed += 1;
        }
        assert!(renamed > 0, "{function}");
    }
    let path = folder.join("libvaccrt.so");
    std::fs::write(&path, library).unwrap();
    path.to_str().unwrap().to_string()
}

#[test]
fn a_library_with_a_clock_and_no_profile_is_timed_without_a_breakdown() {
    let folder = tempfile::tempdir().unwrap();
    let runtime = without(&["vacc_profile_enable", "vacc_profile_read"], folder.path());
    let args = ["--backend", "vacc", "--vacc-runtime", &runtime];
    let report = json(&dsv3(&[&args[..], &["--json", "-"]].concat()).output().unwrap());
    let sim = json(&dsv3(&["--json", "-"]).output().unwrap());
    assert_eq!(report["token_ids"], sim["token_ids"]);
    assert_eq!(report["timing"]["decode_ms"], sim["timing"]["decode_ms"]);
    assert_eq!(report["timing"]["ops"], Value::Null, "it does not tell");
    let text = dsv3(&args).output().unwrap();
    let text = String::from_utf8_lossy(&text.stdout);
    assert!(text.contains("decode") && !text.contains("most expensive op"), "{text}");
    assert!(text.contains("no breakdown by op"), "{text}");
    let trace = folder.path().join("t.json");
    let output = dsv3(&[&args[..], &["--trace", trace.to_str().unwrap()]].concat()).output();
    let output = output.unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{errors}");
    for words in ["--trace", "does not export", "vacc_profile_enable and vacc_profile_read"] {
        assert!(errors.contains(words), "{errors:?} lacks {words:?}");
    }
    assert!(output.stdout.is_empty() && !trace.exists(), "refused before the run");
}

#[test]
fn both_backends_agree_on_several_dies() {
    let runtime = runtime();
    for plan in [
        "tp 2",
        "tp 4",
        "tp 8 --overlap two-batch",
        "tp 16",
        "tp 32",
        "tp 32 --enforce-eager",
        "pp 2",
        "pp 4",
        "tp 2 pp 2 --enforce-eager",
        "tp 4 pp 2",
        "dp 2 --expert-parallel",
        "dp 4 --expert-parallel --overlap two-batch",
        "dp 8 --expert-parallel --enforce-eager",
        "tp 2 dp 2 --expert-parallel --overlap two-batch",
        "tp 4 dp 2 --expert-parallel",
    ] {
        let plan: Vec<&str> = plan
            .split(' ')
            .map(|word| match word {
                "tp" => "--tensor-parallel-size",
                "pp" => "--pipeline-parallel-size",
                "dp" => "--data-parallel-size",
                other => other,
            })
            .collect();
        let common = [&["--json", "-"], &plan[..]].concat();
        let sim = json(&dsv3(&common).output().unwrap());
        let vacc = ["--backend", "vacc", "--vacc-runtime", &runtime];
        let vacc = json(&dsv3(&[&common[..], &vacc].concat()).output().unwrap());
        assert_eq!(sim["text"], "The capital of France is Paris.", "{plan:?}");
        assert_eq!(vacc["token_ids"], sim["token_ids"], "{plan:?}");
        for key in ["prefill_ms", "decode_ms"] {
            assert_eq!(vacc["timing"][key], sim["timing"][key], "{plan:?}: {key}");
        }
    }
}
