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

/// The text of a command that is refused as unusable input.
fn refused(args: &str) -> String {
    let output = dsv3(args);
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(2), "{args}: {text}");
    assert!(output.stdout.is_empty() && !text.contains("panicked"), "{args}: {text}");
    text
}

#[test]
fn a_step_is_answered_on_every_machine() {
    for machine in sim::Machine::names() {
        for (step, latency, other) in [
            ("--batch 2 --kv 100", "tpot_ms", "ttft_ms"),
            ("--batch 2 --kv 100 --mtp", "tpot_ms", "ttft_ms"),
            ("--phase prefill --batch 2 --input-len 50", "ttft_ms", "tpot_ms"),
        ] {
            let plan = "--config tiny --tensor-parallel-size 2 --overlap two-batch";
            let report = json(&format!("perf step --machine {machine} {plan} {step}"));
            let (step_ms, floor_ms) = (number(&report, "step_ms"), number(&report, "floor_ms"));
            assert!(floor_ms > 0.0 && step_ms >= floor_ms, "{machine} {step}: {report:#}");
            assert!(number(&report, latency) > 0.0 && report[other].is_null(), "{report:#}");
            let (all, each) =
                (number(&report, "tokens_per_s"), number(&report, "tokens_per_s_per_die"));
            assert!((all / each - 2.0).abs() < 1e-9, "{report:#}");
            assert!(number(&report, "memory_bytes_per_die") > 1e6, "{report:#}");
            let breakdown = &report["breakdown"];
            for part in ["by_op", "by_layer", "by_bound"] {
                assert!(!breakdown[part].as_array().unwrap().is_empty(), "{part}: {report:#}");
            }
            let busy = number(breakdown, "compute_ms")
                + number(breakdown, "communication_exposed_ms")
                + number(breakdown, "idle_ms")
                + number(breakdown, "host_ms");
            assert!((busy / step_ms - 1.0).abs() < 1e-6, "{busy} {report:#}");
            let provenance = &report["provenance"];
            assert_eq!(provenance["machine"], machine);
            assert_eq!(provenance["clock"], "simulated");
            assert!(provenance["assumed"].is_array(), "{report:#}");
            let moved = provenance["sensitive_to"].as_array().unwrap();
            for constant in moved {
                let at_most = number(constant, "halved_ms").max(number(constant, "doubled_ms"));
                assert!(at_most > 0.0, "{constant}");
            }
        }
    }
}

#[test]
fn the_large_model_is_above_its_floor_wherever_it_fits() {
    for machine in sim::Machine::names() {
        let step = "--tensor-parallel-size 32 --batch 4 --no-sensitivity";
        let report = json(&format!("perf step --machine {machine} {step}"));
        assert!(number(&report, "step_ms") >= number(&report, "floor_ms"), "{report:#}");
        assert_eq!(report["dies"], 32);
    }
}

#[test]
fn people_are_told_what_a_step_is_and_rests_on() {
    let plan = "--machine h800 --data-parallel-size 16 --expert-parallel --overlap two-batch";
    let args = format!("perf step {plan} --batch 8 --kv 200 --mtp --routing zipf:0.5");
    let output = dsv3(&args);
    let text = String::from_utf8(output.stdout).unwrap();
    for words in [
        "for a decode step, simulated on 16 dies of h800",
        "8 sequences of 200 tokens on each of 16 data ranks; TP1 DP16 EP 2mb MTP, fp8",
        "TPOT",
        "85% of the drafted tokens",
        "of the step: ",
        "routing zipf:0.5: the most loaded die gets",
        "MoE layers",
        "MTP module",
        "all_to_all_v",
        "constants are assumed",
        "all 16 ranks and",
    ] {
        assert!(text.contains(words), "{text} lacks {words:?}");
    }
    assert!(text.lines().all(|line| line.chars().count() <= 110), "{text}");
}

#[test]
fn impossible_steps_are_refused_with_what_would_do() {
    let tp32 = "--tensor-parallel-size 32";
    for (args, words) in [
        (format!("{tp32} --batch 0"), "batch is 0; expected at least 1"),
        (format!("{tp32} --kv 0"), "kv is 0; expected at least 1"),
        (format!("{tp32} --batch -3"), "'-3'"),
        (format!("{tp32} --kv -1"), "'-1'"),
        (format!("{tp32} --phase prefill --input-len -1"), "'-1'"),
        (format!("{tp32} --phase prefill --input-len 0"), "input-len is 0"),
        (format!("{tp32} --phase prefill --kv 5"), "--input-len"),
        (format!("{tp32} --past 5"), "--phase prefill"),
        (format!("{tp32} --kv 200000"), "at most 163840 tokens, the model's context"),
        (format!("{tp32} --acceptance 1.5"), "acceptance is 1.5; expected 0 to 1"),
        (format!("{tp32} --acceptance -0.5"), "acceptance is -0.5; expected 0 to 1"),
        (format!("{tp32} --batch 18446744073709551615"), "at most 16777216"),
        (format!("{tp32} --batch 4096 --kv 4096"), "sequences of this length fit"),
        (String::new(), "spread them over at least 20 dies"),
        ("--tensor-parallel-size 0".into(), "at least 1"),
        ("--tensor-parallel-size 33".into(), "at most 32 dies"),
        ("--tensor-parallel-size 3000".into(), "tensor 128 is the most"),
        (format!("{tp32} --routing nope"), "balanced, zipf:S"),
        (format!("{tp32} --routing zipf:-1"), "S from 0 to 4"),
        (format!("{tp32} --expert-capacity 0.5"), "at least 1, or worst"),
        (format!("{tp32} --machine va17"), "va16, h800"),
        (format!("{tp32} --config no-such"), "deepseek-v3"),
        (format!("{tp32} --trace no/such/folder/t.json"), "--trace no/such/folder/t.json"),
        (format!("{tp32} --trace src"), "it is a folder"),
    ] {
        let text = refused(&format!("perf step --no-sensitivity {args}"));
        assert!(text.contains(words), "{args}: {text}");
    }
    // What does not fit is told with its sizes.
    let text = refused("perf step --machine h800 --tensor-parallel-size 16 --batch 200 --kv 8192");
    for words in ["weights", "KV cache", "workspace", "h800 has 80.0 GiB", "fit on each data rank"]
    {
        assert!(text.contains(words), "{text}");
    }
}

#[test]
fn files_that_a_step_needs_are_refused_with_what_is_wrong_in_them() {
    let dir = tempfile::tempdir().unwrap();
    let write = |name: &str, text: &str| {
        let path = dir.path().join(name);
        std::fs::write(&path, text).unwrap();
        path.display().to_string()
    };
    let page = include_str!("../../../docs/machine-files.md");
    let example = page.split("```toml\n").nth(1).unwrap().split("```").next().unwrap();
    let idle = write("idle.toml", &example.replace("value = 5000", "value = 0"));
    let text = refused(&format!("perf step --config tiny --machine {idle}"));
    assert!(text.contains("die.memory_gb_s is 0"), "{text}");
    // va16 has no network, so 64 dies are not joined.
    let text = refused("perf step --machine va16 --data-parallel-size 64 --expert-parallel");
    assert!(text.contains("[link.network]"), "{text}");
    let mut config = std::fs::read_to_string("../../models/tiny-dsv3/config.json").unwrap();
    config = config.replace("\"num_nextn_predict_layers\": 1", "\"num_nextn_predict_layers\": 0");
    let no_mtp = write("config.json", &config);
    let text = refused(&format!("perf step --config {no_mtp} --mtp"));
    assert!(text.contains("no MTP layer"), "{text}");
    json(&format!("perf step --config {no_mtp}"));
    for (file, words) in [
        ("[1, 2, 3]", "3 counts"),
        ("[[0, 1], [1, 5000]]", "expert 5000"),
        ("[-1]", "neither a list of counts nor a list of tokens' experts"),
        ("{}", "neither a list of counts"),
        ("[]", "0 counts"),
        ("[[]]", "all counts of the histogram are 0"),
    ] {
        let routing = write("routing.json", file);
        let text = refused(&format!("perf step --config tiny --routing {routing}"));
        assert!(text.contains(words), "{file}: {text}");
    }
}

#[test]
fn recorded_routing_is_read_as_counts_and_as_tokens() {
    let dir = tempfile::tempdir().unwrap();
    let experts = model::config::Preset::Tiny.config().n_routed_experts;
    // Expert e is chosen e + 1 times.
    let counts: Vec<u64> = (1..=experts as u64).collect();
    let mut tokens: Vec<Vec<usize>> = Vec::new();
    for expert in 0..experts {
        tokens.extend(std::iter::repeat_n(vec![expert], expert));
    }
    tokens.push((0..experts).collect());
    let step = |name: &str, text: String| {
        let path = dir.path().join(name);
        std::fs::write(&path, text).unwrap();
        let plan = "--config tiny --data-parallel-size 4 --expert-parallel --batch 8";
        let routing = path.display();
        json(&format!("perf step {plan} --no-sensitivity --routing {routing}"))
    };
    let by_counts = step("counts.json", serde_json::to_string(&counts).unwrap());
    let by_tokens = step("tokens.json", serde_json::to_string(&tokens).unwrap());
    let even = step("even.json", serde_json::to_string(&vec![7; experts]).unwrap());
    assert!(number(&by_counts, "expert_imbalance") > 1.2, "{by_counts:#}");
    assert_eq!(by_counts["step_ms"], by_tokens["step_ms"]);
    assert_eq!(by_counts["expert_imbalance"], by_tokens["expert_imbalance"]);
    assert_eq!(number(&even, "expert_imbalance"), 1.0);
    assert!(number(&even, "step_ms") <= number(&by_counts, "step_ms"));
}

#[test]
fn a_traced_step_says_for_whom_a_rank_stands_and_changes_nothing_else() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("t.json");
    let args = "perf step --config tiny --machine h800 --data-parallel-size 4 --expert-parallel \
                --overlap two-batch --batch 4 --no-sensitivity";
    let plain = json(args);
    let traced = json(&format!("{args} --trace {}", path.display()));
    assert_eq!(plain, traced);
    let trace = |path: &std::path::Path| -> Vec<Value> {
        let text = std::fs::read_to_string(path).unwrap();
        let file: Value = serde_json::from_str(&text).unwrap();
        assert_eq!(file["otherData"]["machine"], "h800");
        file["traceEvents"].as_array().unwrap().clone()
    };
    let named = |events: &[Value], what: &str| -> Vec<String> {
        let named = events.iter().filter(|e| e["name"] == what);
        named.map(|e| e["args"]["name"].as_str().unwrap().to_string()).collect()
    };
    let events = trace(&path);
    assert_eq!(named(&events, "process_name"), ["die 0 (card 0, host 0), stands for 4 ranks"]);
    assert_eq!(named(&events, "thread_name"), ["compute", "communication"]);
    let all = dir.path().join("all.json");
    json(&format!("{args} --no-folding --trace {}", all.display()));
    let events = trace(&all);
    let processes = named(&events, "process_name");
    assert_eq!(processes.len(), 4);
    assert!(processes.iter().all(|name| name.ends_with("stands for itself")), "{processes:?}");
    assert!(events.iter().any(|e| e["ph"] == "f" && e["name"] != "wait"), "ranks meet");
    // One that cannot be leaves nothing, and keeps what was there.
    refused(&format!("perf step --config tiny --batch 0 --trace {}", path.display()));
    refused(&format!("perf step --trace {}", dir.path().join("none.json").display()));
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 2);
}

const SWEEP: &str = r#"
config = "tiny"
[[grid]]
machine = ["va16", "h800"]
phase = ["decode", "prefill"]
tensor-parallel-size = [1, 2, 5000]
batch = [1, 4]
kv = [64, 2000000]
input-len = [32]
"#;

#[test]
fn a_sweep_is_a_table_a_csv_file_and_json() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("sweep.toml");
    std::fs::write(&file, SWEEP).unwrap();
    let (file, csv) = (file.display(), dir.path().join("points.csv"));
    let output = dsv3(&format!("perf sweep {file} --csv {} --json -", csv.display()));
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    let points = report["points"].as_array().unwrap();
    assert_eq!(points.len(), 2 * (4 + 2) * 3);
    let text = std::fs::read_to_string(&csv).unwrap();
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!(lines.len(), 1 + points.len());
    let columns: Vec<&str> = lines[0].split(',').collect();
    assert_eq!(columns[..4], ["machine", "phase", "batch", "length"]);
    assert_eq!(columns[columns.len() - 1], "error");
    let at = |name: &str| columns.iter().position(|c| *c == name).unwrap();
    for (line, point) in lines[1..].iter().zip(points) {
        let fields: Vec<&str> = line.split(',').collect();
        assert_eq!(fields[at("machine")], point["machine"].as_str().unwrap());
        assert_eq!(fields[at("phase")], point["phase"].as_str().unwrap());
        let wide = point["tensor_parallel_size"] == 5000;
        assert_eq!(wide || point["kv"] == 2_000_000, point["error"].is_string(), "{point}");
        match point["error"].as_str() {
            Some(error) => {
                assert!(line.contains(error) && fields[at("step_ms")].is_empty(), "{line}");
            }
            None => {
                assert_eq!(fields.len(), columns.len(), "{line}");
                let told: f64 = fields[at("step_ms")].parse().unwrap();
                assert!((told / number(point, "step_ms") - 1.0).abs() < 1e-12, "{line}");
                assert_eq!(fields[at("dies")], point["dies"].to_string());
                assert!(fields[at("error")].is_empty());
            }
        }
    }
    let front = report["pareto"].as_array().unwrap();
    assert!(!front.is_empty());
    for at in front {
        assert_eq!(points[at.as_u64().unwrap() as usize]["phase"], "decode");
    }
    assert!(report["provenance"]["assumed"]["va16"].is_array());
    let json_file = dir.path().join("report.json");
    let output = dsv3(&format!("perf sweep {file} --threads 1 --json {}", json_file.display()));
    assert!(output.status.success() && output.stdout.is_empty());
    let again: Value = serde_json::from_slice(&std::fs::read(json_file).unwrap()).unwrap();
    assert_eq!(again, report);
    let text = String::from_utf8(dsv3(&format!("perf sweep {file}")).stdout).unwrap();
    for words in ["36 points, 16 possible", "impossible: ", "Pareto front", "per user", "prefill"] {
        assert!(text.contains(words), "{text} lacks {words:?}");
    }
}

#[test]
fn sweeps_that_cannot_be_leave_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let write = |name: &str, text: &str| {
        let path = dir.path().join(name);
        std::fs::write(&path, text).unwrap();
        path.display().to_string()
    };
    let good = write("good.toml", SWEEP);
    let bad = write("bad.toml", &SWEEP.replace("\"prefill\"", "\"walk\""));
    let nowhere = dir.path().join("no/such.csv").display().to_string();
    for (args, words) in [
        (format!("{bad} --csv {}", dir.path().join("x.csv").display()), "phase \"walk\""),
        (format!("{good} --csv {nowhere}"), "--csv"),
        (format!("{good} --json {nowhere}"), "--json"),
        (format!("{good} --csv {}", dir.path().display()), "it is a folder"),
        (dir.path().join("absent.toml").display().to_string(), "absent.toml"),
        (write("machine.toml", &SWEEP.replace("h800", "h801")), "h801"),
        (write("config.toml", &SWEEP.replace("tiny", "huge")), "huge"),
    ] {
        let text = refused(&format!("perf sweep {args}"));
        assert!(text.contains(words), "{args}: {text}");
    }
    let names = || -> Vec<String> {
        let files = std::fs::read_dir(dir.path()).unwrap();
        files.map(|f| f.unwrap().file_name().into_string().unwrap()).collect()
    };
    assert!(names().iter().all(|name| name.ends_with(".toml")), "{:?}", names());
    // No point fits: every one is told with its reason all the same, and the status says so.
    let none = write("none.toml", &SWEEP.replace("[1, 2, 5000]", "[5000]"));
    let csv = dir.path().join("none.csv");
    let output = dsv3(&format!("perf sweep {none} --csv {}", csv.display()));
    assert_eq!(output.status.code(), Some(2));
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(error.contains("none of 12 points is possible"), "{error}");
    assert_eq!(std::fs::read_to_string(csv).unwrap().lines().count(), 13);
}

#[test]
fn whole_systems_are_validated() {
    let report = json("perf validate");
    let systems = report["systems"].as_array().unwrap();
    for id in ["V1", "V2"] {
        let row = systems.iter().find(|row| row["id"] == id).unwrap();
        let (measured, predicted) = (number(row, "measured"), number(row, "predicted"));
        assert!((predicted / measured - 1.0).abs() <= 0.10, "{row:#}");
        assert_eq!(row["comparable"], true);
    }
}
