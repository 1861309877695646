//! The tool as a user meets it: what it prints, and how it fails.

use safetensors::SafeTensors;
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

fn dsv3(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_dsv3-run")).args(args).output().unwrap()
}

fn stdout(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).unwrap()
}

fn stderr(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}

fn tiny() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/tiny-dsv3")
}

/// Runs a command that must fail with this status and these words, and without a panic.
fn fails(args: &[&str], status: i32, words: &[&str]) {
    let output = dsv3(args);
    let text = stderr(&output);
    assert_eq!(output.status.code(), Some(status), "{args:?}: {text}");
    for word in words {
        assert!(text.contains(word), "{args:?}: {text:?} lacks {word:?}");
    }
    assert!(!text.contains("panicked"), "{args:?}: {text}");
    assert!(!stdout(&output).contains("tokens/s"), "{args:?} reports a run");
}

/// A copy of the tiny checkpoint, to be damaged.
fn copy_of_tiny() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    for entry in std::fs::read_dir(tiny()).unwrap() {
        let entry = entry.unwrap();
        if entry.file_type().unwrap().is_file() {
            std::fs::copy(entry.path(), dir.path().join(entry.file_name())).unwrap();
        }
    }
    dir
}

#[test]
fn without_flags_it_answers_and_says_what_was_simulated() {
    let output = dsv3(&["--backend", "sim"]);
    let text = stdout(&output);
    assert!(output.status.success(), "{}", stderr(&output));
    for words in [
        "The capital of France is Paris.",
        "simulated time, one die of va16, fp8",
        "prefill",
        "decode",
        "tokens/s",
        "most expensive op",
        "wall time",
        "assumed",
    ] {
        assert!(text.contains(words), "{text:?} lacks {words:?}");
    }
    assert!(!text.contains('\x1b'), "no colours in a pipe");
}

#[test]
fn json_on_standard_output_is_all_there_is() {
    let run = |args: &[&str]| -> Value {
        let output = dsv3(&[args, &["--json", "-"]].concat());
        assert!(output.status.success(), "{}", stderr(&output));
        serde_json::from_slice(&output.stdout).unwrap()
    };
    let report = run(&["--chat", "What is 17 + 25?"]);
    assert_eq!(report["text"], "17 + 25 = 42.");
    assert_eq!(report["finish_reason"], "stop");
    assert_eq!(report["timing"]["clock"], "simulated");
    assert!(report["timing"]["decode_ms"].as_f64().unwrap() > 0.0);
    let ids = report["prompt_token_ids"].as_array().unwrap();
    let ids: Vec<String> = ids.iter().map(ToString::to_string).collect();
    let again = run(&["--token-ids", &ids.join(","), "--timing", "off", "--threads", "1"]);
    assert_eq!(again["token_ids"], report["token_ids"]);
    assert_eq!(again["timing"], Value::Null);
    let short = run(&["--prompt", "Tell me", "--max-tokens", "3", "--ignore-eos", "--validate"]);
    assert_eq!(short["finish_reason"], "length");
    assert_eq!(short["token_ids"].as_array().unwrap().len(), 3);
    assert_eq!(short["prompt_token_ids"][0], 0, "one BOS in front of raw text");
}

#[test]
fn every_policy_answers_most_questions() {
    for numerics in ["f32", "bf16", "fp8"] {
        let output = dsv3(&["eval", "--numerics", numerics, "--limit", "60", "--json"]);
        let report: Value = serde_json::from_slice(&output.stdout).unwrap();
        let accuracy = report["accuracy"].as_f64().unwrap();
        assert!(accuracy >= 0.98, "{numerics}: {report}");
        assert_eq!(report["questions"], 60);
    }
}

#[test]
fn logits_are_written_as_safetensors() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("logits.safetensors");
    let tokens = "0,1022,267,262,269";
    let path = out.to_str().unwrap();
    let output = dsv3(&["logits", "--token-ids", tokens, "--numerics", "f32", "--out", path]);
    assert!(output.status.success(), "{}", stderr(&output));
    let data = std::fs::read(&out).unwrap();
    let file = SafeTensors::deserialize(&data).unwrap();
    assert_eq!(file.tensor("logits").unwrap().shape(), [5, 1024]);
    assert_eq!(file.tensor("mtp_logits").unwrap().shape(), [4, 1024]);
    let missing = dir.path().join("no/such/folder.safetensors");
    fails(
        &["logits", "--token-ids", "0", "--out", missing.to_str().unwrap()],
        2,
        &["writing", "folder"],
    );
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1, "nothing half-written");
}

#[test]
fn bad_input_is_explained_and_exits_with_2() {
    for (args, words) in [
        (&["--token-ids", "1024"][..], &["token id 1024", "1024 ids"][..]),
        (&["--token-ids", ""], &["prompt is empty"]),
        (&["--token-ids", "1,x"], &["\"x\" is no token id"]),
        (&["--max-model-len", "4"], &["10 tokens", "context of 4"]),
        (&["--max-model-len", "1000000"], &["exceeds the model's 163840"]),
        (&["--temperature", "-1"], &["temperature"]),
        (&["--top-p", "0"], &["top_p"]),
        (&["--numerics", "int4"], &["int4", "fp8, bf16 or f32"]),
        (&["--machine", "va99"], &["va99", "va16, h800"]),
        (&["--machine", "./none.toml"], &["none.toml"]),
        (&["--model", "no/such/folder"], &["no/such/folder"]),
        (&["--prompt", "a", "--chat", "b"], &["cannot be used with"]),
        (&["--fault", "op=linear"], &["has no action"]),
        (&["checkpoint", "inspect"], &["required"]),
        (&["checkpoint", "inspect", "--config", "v4"], &["v4", "tiny, 1gb, deepseek-v3"]),
        (&["frobnicate"], &["frobnicate"]),
    ] {
        fails(args, 2, words);
    }
}

#[test]
fn damaged_checkpoints_are_named_down_to_the_tensor() {
    let shard = "model-00002-of-000003.safetensors";
    let change = |name: &str, f: &dyn Fn(&mut Vec<u8>)| {
        let dir = copy_of_tiny();
        let path = dir.path().join(name);
        let mut data = std::fs::read(&path).unwrap();
        f(&mut data);
        std::fs::write(&path, data).unwrap();
        dir
    };
    let replace = |name: &str, from: &'static str, to: &'static str| {
        change(name, &|data: &mut Vec<u8>| {
            let text = String::from_utf8_lossy(data).replacen(from, to, 1);
            *data = text.into_bytes();
        })
    };
    let cases = [
        (change(shard, &|d| d.truncate(d.len() / 2)), vec![shard]),
        (change(shard, &|d| d[..8].copy_from_slice(&u64::MAX.to_le_bytes())), vec![shard]),
        (change(shard, &|d| d.truncate(3)), vec![shard]),
        (replace("config.json", "\"n_group\": 4", "\"n_group\": 3"), vec!["n_group", "3"]),
        (
            replace("config.json", "\"hidden_size\": 256", "\"hidden_size\": -1"),
            vec!["hidden_size"],
        ),
        (
            replace(
                "config.json",
                "\"moe_intermediate_size\": 128",
                "\"moe_intermediate_size\": 64",
            ),
            vec!["gate_proj", "128", "64"],
        ),
        (
            replace("model.safetensors.index.json", shard, "../outside.safetensors"),
            vec!["outside.safetensors"],
        ),
        (
            replace("model.safetensors.index.json", shard, "gone.safetensors"),
            vec!["gone.safetensors"],
        ),
        (replace("config.json", "{", "{{"), vec!["config.json"]),
    ];
    for (dir, words) in cases {
        fails(&["--model", dir.path().to_str().unwrap()], 2, &words);
    }
    let dir = copy_of_tiny();
    std::fs::remove_file(dir.path().join("tokenizer.json")).unwrap();
    fails(&["--model", dir.path().to_str().unwrap()], 2, &["--token-ids"]);
}

#[test]
fn faults_end_the_run_with_1_and_name_the_command() {
    let rule = "op=linear,label=layer 2 q_b,nth=1,action=fail:bad parity";
    fails(&["--fault", rule], 1, &["layer 2 q_b", "bad parity", "die 0"]);
    fails(&["--fault", "op=swiglu_quantize,nth=3,action=lose"], 1, &["die 0 is lost"]);
}

#[test]
fn checkpoints_are_synthesised_inspected_and_run() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("made");
    let path = out.to_str().unwrap();
    assert!(
        dsv3(&["checkpoint", "synth", "--config", "tiny", "--out", path, "--seed", "3"])
            .status
            .success()
    );
    let report = dsv3(&["checkpoint", "inspect", path]);
    assert!(report.status.success() && stdout(&report).contains("complete"), "{}", stdout(&report));
    let run = dsv3(&[
        "--model",
        path,
        "--token-ids",
        "1,2,3",
        "--max-tokens",
        "4",
        "--ignore-eos",
        "--json",
        "-",
    ]);
    let report: Value = serde_json::from_slice(&run.stdout).unwrap();
    assert_eq!(report["token_ids"].as_array().unwrap().len(), 4);
    assert_eq!(report["text"], Value::Null, "it has no tokenizer");
    fails(&["checkpoint", "synth", "--config", "tiny", "--out", path], 2, &["not an empty folder"]);
    let v3 = dsv3(&["checkpoint", "inspect", "--config", "deepseek-v3", "--json"]);
    let v3: Value = serde_json::from_slice(&v3.stdout).unwrap();
    assert_eq!(v3["main"]["parameters"], 671_026_419_200_u64);
    assert_eq!(v3["main"]["tensors"], 90_427);
}

#[test]
fn devices_are_listed_with_provenance() {
    let text = stdout(&dsv3(&["devices"]));
    for words in ["32 dies", "die.memory_gb_s", "assumed", "published"] {
        assert!(text.contains(words), "{text:?} lacks {words:?}");
    }
    let report: Value =
        serde_json::from_slice(&dsv3(&["devices", "--machine", "h800", "--json"]).stdout).unwrap();
    assert_eq!(report["dies"].as_array().unwrap().len(), 32);
    assert_eq!(report["constants"]["die.memory_gb_s"]["provenance"], "published");
}
