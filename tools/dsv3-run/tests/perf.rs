//! `dsv3-run perf`: what it prints, and what it refuses.

use serde_json::Value;
use std::process::{Command, Output};

fn dsv3(args: &str) -> Output {
    let args: Vec<&str> = args.split_whitespace().collect();
    Command::new(env!("CARGO_BIN_EXE_dsv3-run")).args(args).output().unwrap()
}

fn json(args: &str) -> Value {
    let output = dsv3(&format!("{args} --json"));
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{args}: {error}");
    serde_json::from_slice(&output.stdout).unwrap_or_else(|e| panic!("{args}: {e}"))
}

fn number(report: &Value, key: &str) -> f64 {
    report[key].as_f64().unwrap_or_else(|| panic!("{key} of {report:#}"))
}

const OPS: &[&str] = &[
    "gemm --dtype fp8 --m 64 --n 7168 --k 16384",
    "gemm --dtype bf16 --m 4096 --n 4096 --k 7168",
    "gemm --m 1 --n 1 --k 1",
    "gemm --m 3 --n 576 --k 7168",
    "grouped-gemm --groups 4 --m 256 --n 4096 --k 7168 --masked",
    "grouped-gemm --groups 4 --m 8192 --n 4096 --k 2048",
    "mla-decode --batch 4 --kv 4096 --heads 4 --dtype bf16",
    "mla-decode --batch 64 --kv 4096 --heads 128 --dtype fp8 --queries 2",
    "mla-prefill --tokens 1024 --heads 4",
    "collective --kind all-reduce --ranks 32 --bytes 14336",
    "collective --kind all-to-all --ranks 8 --bytes 1000000",
    "collective --kind send-recv --ranks 2 --bytes 1000000",
    "moe-dispatch --ep 8 --tokens 128 --top-k 8 --hidden 7168 --low-latency",
    "moe-combine --ep 32 --tokens 4096 --top-k 8 --hidden 7168",
];

#[test]
fn every_operation_is_answered_on_every_machine() {
    for machine in sim::Machine::names() {
        for op in OPS {
            let report = json(&format!("perf op --machine {machine} {op}"));
            let time = number(&report, "time_us");
            assert!(time > 0.0 && number(&report, "gb_per_s") > 0.0, "{machine} {op}: {report}");
            assert!(time >= number(&report, "floor_us"), "{machine} {op}: {report}");
            let computes = op.contains("gemm") || op.contains("mla");
            assert_eq!(number(&report, "tflops") > 0.0, computes, "{machine} {op}: {report}");
            let bounds = ["memory", "matrix", "vector", "link", "launch"];
            assert!(
                bounds.contains(&report["bound"].as_str().unwrap()),
                "{machine} {op}: {report}"
            );
            assert!(report["mapping"].as_str().unwrap().len() > 3, "{machine} {op}: {report}");
            assert_eq!(report["provenance"]["clock"], "simulated");
            assert_eq!(report["provenance"]["machine"], machine);
        }
    }
}

#[test]
fn people_are_told_what_decides() {
    let output = dsv3("perf op --machine va16 gemm --m 1 --n 7168 --k 2048");
    let text = String::from_utf8(output.stdout).unwrap();
    for words in
        ["simulated on va16", "memory", "floor", "mapping: tiles of", "die.memory_gb_s", "half:"]
    {
        assert!(text.contains(words), "{text:?} lacks {words:?}");
    }
}

#[test]
fn what_cannot_be_is_refused_with_the_reason() {
    for (args, words) in [
        ("gemm --m 0 --n 1 --k 1", "m is 0"),
        ("gemm --m -4 --n 1 --k 1", "-4"),
        ("gemm --m 1.5 --n 1 --k 1", "1.5"),
        ("gemm --m 99999999999999999999999 --n 1 --k 1", "99999999999999999999999"),
        ("gemm --m 9999999999 --n 1 --k 1", "m is 9999999999"),
        ("gemm --m 1000000 --n 1000000 --k 1000000", "GiB"),
        ("gemm --m 1 --n 1", "--k"),
        ("gemm --dtype int3 --m 1 --n 1 --k 1", "int3"),
        ("grouped-gemm --groups 0 --m 1 --n 1 --k 1", "groups is 0"),
        ("mla-decode --batch 1 --kv 0 --heads 4", "kv is 0"),
        ("mla-decode --batch 1 --kv 1 --heads 4 --queries 2", "2 new tokens among 1 keys"),
        ("mla-decode --batch 100000 --kv 100000 --heads 4", "GiB"),
        ("mla-prefill --tokens 0 --heads 4", "tokens is 0"),
        ("collective --kind all-reduce --ranks 1 --bytes 8", "expected at least 2"),
        ("collective --kind all-reduce --ranks 33 --bytes 8", "at most 32 dies"),
        ("collective --kind all-reduce --ranks 8 --bytes 0", "bytes is 0"),
        ("collective --kind send-recv --ranks 3 --bytes 8", "2 ranks"),
        ("moe-dispatch --ep 1 --tokens 8", "expected at least 2"),
        ("moe-dispatch --ep 64 --tokens 8", "at most 32 dies"),
        ("moe-dispatch --machine h800 --ep 12 --tokens 8", "a multiple of 8"),
        ("moe-dispatch --machine h800 --ep 144 --tokens 8 --experts 256", "288 would"),
        ("moe-dispatch --ep 8 --tokens 8 --top-k 300", "256 experts"),
        ("moe-dispatch --ep 8 --tokens 8 --hidden 100", "multiple of 128"),
        ("--machine va17 gemm --m 1 --n 1 --k 1", "va16, h800"),
        ("--machine no/such.toml gemm --m 1 --n 1 --k 1", "no/such.toml"),
    ] {
        let output = dsv3(&format!("perf op {args}"));
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(2), "{args}: {text}");
        assert!(text.contains(words) && !text.contains("panicked"), "{args}: {text}");
        assert!(output.stdout.is_empty(), "{args}");
    }
}

#[test]
fn a_machine_file_is_enough() {
    let dir = tempfile::tempdir().unwrap();
    let page = include_str!("../../../docs/machine-files.md");
    let example = page.split("```toml\n").nth(1).unwrap().split("```").next().unwrap();
    let file = dir.path().join("x1.toml");
    std::fs::write(&file, example).unwrap();
    let op = "mla-decode --batch 128 --kv 8192 --heads 16";
    let x1 = json(&format!("perf op --machine {} {op}", file.display()));
    let h800 = json(&format!("perf op --machine h800 {op}"));
    assert_eq!(x1["provenance"]["machine"], "x1");
    assert!(number(&x1, "time_us") < number(&h800, "time_us"), "5000 GB/s against 3350");
    std::fs::write(&file, example.replace("cores = 120", "cores = 0")).unwrap();
    let output = dsv3(&format!("perf op --machine {} {op}", file.display()));
    assert_eq!(output.status.code(), Some(2));
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(text.contains("die.cores is 0, expected a positive number"), "{text}");
}

#[test]
fn validation_reports_every_row_and_meets_its_targets() {
    let report = json("perf validate");
    let rows = report["rows"].as_array().unwrap();
    assert!(rows.len() >= 30, "{}", rows.len());
    for row in rows {
        let (measured, predicted) = (number(row, "measured"), number(row, "predicted"));
        let error = (predicted / measured - 1.0) * 100.0;
        assert!((error - number(row, "error_percent")).abs() < 1e-9, "{row}");
        assert!(row["source"].as_str().unwrap().contains("README"), "{row}");
        assert_eq!(row["held_out"].as_bool().unwrap(), row["calibrates"].is_null());
    }
    for (group, most) in [
        ("DeepGEMM dense", 10.0),
        ("DeepGEMM grouped", 10.0),
        ("FlashMLA", 10.0),
        ("DeepEP normal", 15.0),
        ("DeepEP low latency", 15.0),
    ] {
        let groups = report["groups"].as_array().unwrap();
        let found = groups.iter().find(|g| g["group"] == group).unwrap();
        assert!(number(found, "mean_absolute_error_percent") <= most, "{found}");
    }
    for exact in report["exact"].as_array().unwrap() {
        assert_eq!(exact["exact"], true, "{exact}");
    }
    let text = String::from_utf8(dsv3("perf validate").stdout).unwrap();
    for words in ["measured", "predicted", "held out", "V11 exact", "V12 exact", "14.76"] {
        assert!(text.contains(words), "{text:?} lacks {words:?}");
    }
}
