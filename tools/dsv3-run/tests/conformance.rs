//! `dsv3-run conformance` as the author of a backend meets it.

use serde_json::Value;
use std::path::Path;
use std::process::{Command, Output};

fn conformance(args: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_dsv3-run"));
    command.arg("conformance").args(args).env_remove("VACC_RUNTIME").output().unwrap()
}

fn text(bytes: &[u8]) -> &str {
    std::str::from_utf8(bytes).unwrap()
}

/// `libvaccrt`, which was built as a dependency of this test and lies beside it.
fn runtime() -> String {
    let path = std::env::current_exe().unwrap().with_file_name("libvaccrt.so");
    assert!(path.is_file(), "{} was not built", path.display());
    path.to_str().unwrap().to_string()
}

#[test]
fn both_backends_pass_and_nothing_is_skipped() {
    let runtime = runtime();
    let vacc = ["--backend", "vacc", "--vacc-runtime", &runtime, "--vacc-config", "threads=2"];
    for (name, backend) in [("sim", &["--threads", "2"][..]), ("vacc", &vacc)] {
        // One case of each kind of need: values, a clock, faults, hazards; alone and shared.
        for filter in ["memory/*", "streams/*", "*/die_lost_in_the_middle", "op/add/*"] {
            let output = conformance(&[backend, &["--filter", filter, "--json"]].concat());
            assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
            assert!(output.stderr.is_empty(), "{}", text(&output.stderr));
            let report: Value = serde_json::from_slice(&output.stdout).unwrap();
            assert_eq!(report["backend"], name);
            let results = report["results"].as_array().unwrap();
            assert!(!results.is_empty() && report["cases"] == results.len());
            for result in results {
                assert_eq!(result["outcome"], "passed", "{name}: {result}");
            }
        }
    }
}

#[test]
fn the_table_has_a_line_per_family() {
    let output = conformance(&["--filter", "beside*", "--threads", "2"]);
    assert_eq!(output.status.code(), Some(2), "a pattern means whole names");
    let output = conformance(&["--filter", "*reuse_in_stream_order", "--threads", "2"]);
    let table = text(&output.stdout);
    assert_eq!(output.status.code(), Some(0), "{table}");
    let lines: Vec<Vec<&str>> =
        table.lines().map(|line| line.split_whitespace().collect()).collect();
    assert_eq!(lines.len(), 3, "{table}");
    assert_eq!(lines[0][..4], ["sim", "passed", "failed", "skipped"]);
    assert_eq!(lines[1][..6], ["memory", "1", "0", "0", "0", "0"]);
    assert_eq!(lines[2][..6], ["all", "1", "0", "0", "0", "0"]);
}

#[test]
fn cases_are_listed_without_being_run() {
    let output = conformance(&["--list", "--filter", "collectives/mismatch/"]);
    let names = text(&output.stdout);
    assert!(output.status.success());
    assert!(names.lines().any(|name| name == "collectives/mismatch/dtype"), "{names}");
    assert!(names.lines().all(|name| name.starts_with("collectives/mismatch/")), "{names}");
    let output = conformance(&["--list", "--json"]);
    let all: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert!(all["cases"].as_array().unwrap().len() >= 300);
}

#[test]
fn a_machine_that_cannot_do_it_fails_with_the_reason() {
    let folder = tempfile::tempdir().unwrap();
    let machine = folder.path().join("small.toml");
    let va16 = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../backends/sim/machines/va16.toml");
    let va16 = std::fs::read_to_string(va16).unwrap();
    let found = "memory_gib = { value = 32,";
    assert!(va16.contains(found));
    // Too little memory for one case, one host without further cards for another.
    let small = va16.replace(found, "memory_gib = { value = 0.0005,");
    std::fs::write(&machine, small.replace("cards_per_host = 8", "cards_per_host = 1")).unwrap();
    let machine = ["--machine", machine.to_str().unwrap(), "--threads", "2"];
    let output = conformance(&[&machine[..], &["--filter", "memory/contents/"]].concat());
    assert_eq!(output.status.code(), Some(1));
    let table = text(&output.stdout);
    assert!(table.contains("failed: memory/contents/1048577: "), "{table}");
    assert!(table.contains("out of memory"), "{table}");
    assert!(text(&output.stderr).contains("1 of 10 conformance cases failed"));
    let json = [&machine[..], &["--filter", "memory/contents/", "--json"]].concat();
    let output = conformance(&json);
    assert_eq!(output.status.code(), Some(1));
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!((&report["failed"], &report["cases"]), (&1.into(), &10.into()));
    let output = conformance(&[&machine[..], &["--filter", "copies/to_a_die*/1"]].concat());
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stdout));
    assert!(text(&output.stdout).contains("skipped 1: needs 8 dies, there are 4"));
}

#[test]
fn input_that_cannot_be_used_is_refused() {
    for (args, words) in [
        (&["--filter", "no/such/case"][..], "no case matches --filter \"no/such/case\""),
        (&["--fault", "op=add,action=fail"], "it injects faults"),
        (&["--machine", "no-such-machine"], "no-such-machine"),
        (&["--vacc-runtime", "x.so"], "--backend vacc"),
    ] {
        let output = conformance(args);
        assert_eq!(output.status.code(), Some(2), "{args:?}");
        let errors = text(&output.stderr);
        assert!(errors.contains(words), "{args:?}: {errors}");
        assert!(output.stdout.is_empty(), "{args:?}");
    }
}
