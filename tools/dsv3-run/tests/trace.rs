//! `--trace` as a user meets it.

use serde_json::Value;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

fn dsv3(args: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_dsv3-run"));
    command.args(args).env_remove("LD_LIBRARY_PATH").env_remove("VACC_RUNTIME").output().unwrap()
}

fn runtime() -> String {
    let path = std::env::current_exe().unwrap().with_file_name("libvaccrt.so");
    assert!(path.is_file(), "{} was not built", path.display());
    path.to_str().unwrap().to_string()
}

/// Runs with `--trace` and returns the file's text.
fn trace(path: &Path, args: &[&str]) -> String {
    let output = dsv3(&[args, &["--trace", path.to_str().unwrap()]].concat());
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{errors}");
    assert!(errors.contains("traced") && errors.contains("events"), "{errors}");
    std::fs::read_to_string(path).unwrap()
}

fn events(text: &str) -> Vec<Value> {
    let parsed: Value = serde_json::from_str(text).unwrap();
    parsed["traceEvents"].as_array().unwrap().clone()
}

fn only(folder: &Path) -> Vec<PathBuf> {
    std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect()
}

#[test]
fn a_trace_shows_dies_streams_waits_and_ranks_and_is_the_same_every_time() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("t.json");
    let plan = ["--tensor-parallel-size", "4", "--overlap", "two-batch", "--quiet"];
    let text = trace(&path, &[&plan[..], &["--threads", "1"]].concat());
    assert_eq!(trace(&path, &[&plan[..], &["--threads", "3"]].concat()), text);
    assert_eq!(only(folder.path()), [path], "nothing but the file");
    let events = events(&text);
    let phase = |name: &'static str| events.iter().filter(move |e| e["ph"] == name);
    let named = |name: &'static str| phase("M").filter(move |e| e["name"] == name);
    let processes: Vec<&str> =
        named("process_name").map(|e| e["args"]["name"].as_str().unwrap()).collect();
    assert_eq!(processes.len(), 4);
    assert_eq!(processes[3], "die 3 (card 0, host 0)");
    let threads: Vec<&str> =
        named("thread_name").map(|e| e["args"]["name"].as_str().unwrap()).collect();
    assert_eq!(threads[..2], ["compute", "communication"]);
    assert_eq!(threads.len(), 8);
    for label in ["layer 2 q_b", "layer 0 mlp all-reduce", "largest logit", "embed"] {
        assert!(phase("X").any(|e| e["name"] == label), "{label}");
    }
    // Every arrow has both its ends, and every wait for what is in the trace has an arrow.
    let mut ends: BTreeMap<u64, (u32, u32)> = BTreeMap::new();
    phase("s").for_each(|e| ends.entry(e["id"].as_u64().unwrap()).or_default().0 += 1);
    phase("f").for_each(|e| ends.entry(e["id"].as_u64().unwrap()).or_default().1 += 1);
    assert!(ends.values().all(|both| *both == (1, 1)));
    let there: Vec<String> = phase("X")
        .map(|e| {
            let (pid, tid) = (e["pid"].as_u64().unwrap(), e["tid"].as_u64().unwrap());
            let lane = threads[tid as usize - 5];
            format!("die {}, {lane} command {}", pid - 1, e["args"]["sequence"])
        })
        .collect();
    let waits = phase("X").filter_map(|e| e["args"]["waited for"].as_str());
    let (found, lost): (Vec<_>, Vec<_>) = waits.partition(|for_| there.iter().any(|t| t == for_));
    assert!(lost.is_empty(), "{lost:?}");
    let schedule = dsv3(&[&["plan", "--schedule", "--prefill", "10"][..], &plan[..4]].concat());
    let schedule = String::from_utf8(schedule.stdout).unwrap();
    let scheduled = schedule.lines().filter(|line| line.contains(" waits for ")).count();
    assert_eq!((found.len(), scheduled > 20), (4 * scheduled, true), "decode has no waits");
    assert_eq!(phase("f").filter(|e| e["name"] == "wait").count(), found.len());
    // Each collective of four ranks has three arrows that join them.
    let collectives = phase("X").filter(|e| e["args"]["round"].is_u64()).count();
    let joined = phase("f").filter(|e| e["name"].as_str().unwrap().ends_with("rank")).count();
    assert_eq!(joined, collectives / 4 * 3);
    assert!(phase("C").any(|e| e["name"] == "links"));
    assert!(phase("C").any(|e| e["name"] == "device memory"));
}

#[test]
fn what_hides_is_reported_in_words_and_in_json() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("t.json");
    let plan = ["--tensor-parallel-size", "4", "--trace", path.to_str().unwrap()];
    let run = |more: &[&str]| String::from_utf8(dsv3(&[&plan[..], more].concat()).stdout).unwrap();
    let text = run(&["--overlap", "two-batch"]);
    for words in ["communication", "busy", "exposed", "hidden", "mean of the dies"] {
        assert!(text.contains(words), "{text:?} lacks {words:?}");
    }
    let hidden = |overlap| {
        let report: Value =
            serde_json::from_str(&run(&["--overlap", overlap, "--json", "-"])).unwrap();
        let analysis = &report["analysis"];
        let mean = analysis["prefill"]["mean"]["communication"].clone();
        assert!(mean["exposed_ps"].as_u64().unwrap() <= mean["busy_ps"].as_u64().unwrap());
        let layers = &analysis["decode"]["mean"]["by_layer"];
        assert!(layers["moe_layers"].as_u64().unwrap() > layers["head"].as_u64().unwrap());
        assert_eq!(analysis["decode"]["dies"].as_array().unwrap().len(), 4);
        mean["hidden_share"].as_f64().unwrap()
    };
    let (plain, two) = (hidden("none"), hidden("two-batch"));
    assert!(plain < 0.01 && two > 0.5, "{plain} {two}");
    // One die has nothing to hide, and an untraced run has no spans.
    let one = ["--quiet", "--json", "-", "--max-tokens", "1"];
    let untraced: Value = serde_json::from_slice(&dsv3(&one).stdout).unwrap();
    assert_eq!(untraced["analysis"], Value::Null);
    let traced = [&one[..], &plan[2..]].concat();
    let traced: Value = serde_json::from_slice(&dsv3(&traced).stdout).unwrap();
    let communication = &traced["analysis"]["prefill"]["mean"]["communication"];
    assert_eq!(communication["hidden_share"], Value::Null);
    assert_eq!(traced["analysis"]["decode"], Value::Null);
}

#[test]
fn other_commands_and_the_other_backend_trace_too() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("t.json");
    let out = folder.path().join("logits.safetensors");
    let logits = ["logits", "--token-ids", "0,1022,267", "--out", out.to_str().unwrap()];
    assert!(trace(&path, &logits).contains("mtp eh_proj"));
    assert!(trace(&path, &["eval", "--limit", "1"]).contains("layer 3 router"));
    let prompt = ["--token-ids", "0,1022,267", "--max-tokens", "2", "--quiet"];
    let commands = |text: &str| -> Vec<Value> {
        let commands = events(text).into_iter().filter(|e| e["ph"] == "X");
        commands.map(|e| Value::from(vec![e["name"].clone(), e["ts"].clone()])).collect()
    };
    let sim = commands(&trace(&path, &prompt));
    let runtime = runtime();
    let vacc = [&prompt[..], &["--backend", "vacc", "--vacc-runtime", &runtime]].concat();
    assert_eq!(commands(&trace(&path, &vacc)), sim, "the same commands at the same times");
}

#[test]
fn what_cannot_be_traced_is_refused_before_the_run_and_leaves_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("t.json");
    let file = path.to_str().unwrap();
    let fails = |args: &[&str], status: i32, words: &[&str]| {
        let output = dsv3(args);
        let errors = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(status), "{args:?}: {errors}");
        for word in words {
            assert!(errors.contains(word), "{args:?}: {errors:?} lacks {word:?}");
        }
        assert!(output.stdout.is_empty(), "{args:?}: it ran");
        assert_eq!(only(folder.path()), [] as [PathBuf; 0], "{args:?}");
    };
    fails(&["--trace", file, "--timing", "off"], 2, &["--trace", "--timing off"]);
    let below = folder.path().join("none/t.json");
    fails(&["--trace", below.to_str().unwrap()], 2, &["--trace", "none/t.json", "No such file"]);
    fails(&["--trace", folder.path().to_str().unwrap()], 2, &["--trace", "folder"]);
    let runtime = runtime();
    let vacc = ["--backend", "vacc", "--vacc-runtime", &runtime, "--trace", file];
    fails(&[&vacc[..], &["--vacc-config", "timing=off"]].concat(), 2, &["has no clock"]);
    let fault = "op=linear,label=layer 2 q_b,nth=0,action=fail:bad parity";
    fails(&["--trace", file, "--json", "-", "--fault", fault], 1, &["bad parity"]);
}
