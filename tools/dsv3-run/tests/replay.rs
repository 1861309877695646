//! Recordings as a card user makes them and as whoever gets them replays them.

use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::Command;

/// `libvaccrt`, which was built as a dependency of this test and lies beside it.
fn runtime() -> String {
    let path = std::env::current_exe().unwrap().with_file_name("libvaccrt.so");
    assert!(path.is_file(), "{} was not built", path.display());
    path.to_str().unwrap().to_string()
}

/// Exit status, standard output, standard error.
fn dsv3(args: &[&str]) -> (i32, String, String) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_dsv3-run"));
    command.args(args).env_remove("LD_LIBRARY_PATH");
    command.env_remove("VACC_RUNTIME").env_remove("VACC_VISIBLE_DEVICES");
    let output = command.output().unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let errors = text(&output.stderr);
    assert!(!errors.contains("panicked"), "{errors}");
    (output.status.code().unwrap(), text(&output.stdout), errors)
}

struct Folder(tempfile::TempDir);

impl Folder {
    fn new() -> Self {
        Folder(tempfile::tempdir().unwrap())
    }

    fn file(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// Records a run, which must end with this status.
    fn record(&self, name: &str, args: &[&str], status: i32) -> String {
        let file = self.file(name);
        let file = file.to_str().unwrap();
        let (code, _, errors) = dsv3(&[args, &["--record", file]].concat());
        assert_eq!(code, status, "{errors}");
        assert!(errors.contains("recorded") && errors.contains(file), "{errors}");
        assert!(!self.file(&format!("{name}.partial")).exists());
        file.to_string()
    }
}

/// The report of a replay, which must end with this status.
fn replay(file: &str, args: &[&str], status: i32) -> Value {
    let (code, out, errors) = dsv3(&[&["replay", file, "--json"], args].concat());
    assert_eq!(code, status, "{errors}\n{out}");
    let report: Value = serde_json::from_str(&out).unwrap();
    assert_eq!(report["equal"], status == 0);
    report
}

const SHORT: &[&str] = &["--quiet", "--max-tokens", "4"];

#[test]
fn a_generation_replays_equal_on_both_backends() {
    let (folder, runtime) = (Folder::new(), runtime());
    let vacc: &[&str] = &["--backend", "vacc", "--vacc-runtime", &runtime];
    let all: &[&str] = &["--record-all", "--numerics", "bf16"];
    for (name, how, backend) in [
        ("sim", &[][..], &[][..]),
        ("all", all, &[]),
        ("vacc", &[], vacc),
        ("validated", &["--validate", "--record-all"], vacc),
    ] {
        let file = folder.record(name, &[SHORT, how, backend].concat(), 0);
        for on in [&[][..], &["--threads", "1", "--machine", "h800"], vacc, &["--validate"]] {
            let report = replay(&file, on, 0);
            assert_eq!(report["commands"], report["recorded_commands"], "{name} {on:?}");
            assert_eq!(report["reads"], 4, "one token a read");
            let hashed = how.contains(&"--record-all");
            assert_eq!(report["hashes"].as_u64().unwrap() > 400, hashed, "{name}: {report}");
            assert_eq!((&report["not_compared"], &report["different"]), (&0.into(), &0.into()));
            let by = if on == vacc { "vacc" } else { "sim" };
            assert_eq!(report["replayed_dies"][0]["backend"], by);
        }
    }
}

#[test]
fn logits_and_evaluations_are_recorded_too() {
    let folder = Folder::new();
    let out = folder.file("logits.safetensors");
    let logits =
        ["logits", "--token-ids", "0,5,9", "--out", out.to_str().unwrap(), "--numerics", "f32"];
    let file = folder.record("logits", &logits, 0);
    let report = replay(&file, &["--tolerance", "1e-6"], 0);
    assert!(report["compared_bytes"].as_u64().unwrap() > 3 * 4 * 500, "{report}");
    let file = folder.record("eval", &["eval", "--limit", "1", "--max-tokens", "2"], 0);
    assert_eq!(replay(&file, &[], 0)["reads"], 2);
    let (code, out, _) = dsv3(&["replay", &file, "--dump"]);
    assert_eq!(code, 0);
    for words in ["# recorded by dsv3-run", " eval --limit 1", "linear \"layer 2 q_a\" x=", "end: "]
    {
        assert!(out.contains(words), "no {words:?}");
    }
}

#[test]
fn a_failure_is_recorded_and_told_to_have_happened_again_or_not() {
    let (folder, runtime) = (Folder::new(), runtime());
    let vacc: &[&str] = &["--backend", "vacc", "--vacc-runtime", &runtime];
    let fault: &[&str] = &["--fault", "op=linear,label=layer 2,nth=5,action=fail:bad parity"];
    for backend in [&[][..], vacc] {
        let file = folder.record("failed", &[SHORT, fault, backend].concat(), 1);
        let with = replay(&file, &[fault, backend].concat(), 0);
        assert_eq!(with["failures"][0]["outcome"], "same", "{with}");
        assert_eq!(with["run_finished"], false);
        let (code, out, _) = dsv3(&[&["replay", &file], backend].concat());
        assert_eq!(code, 1);
        for words in ["did not happen again", "linear \"layer 2", "bad parity", "stopped early"] {
            assert!(out.contains(words), "{out}");
        }
    }
    // A card that fails where the recorded one did not.
    let file = folder.record("well", SHORT, 0);
    let report = replay(&file, &[fault, vacc].concat(), 1);
    assert_eq!(report["failures"][0]["outcome"], "new");
    assert_eq!(report["failures"][0]["replayed"]["origin"]["op"], "linear", "{report}");
}

/// Writes a recording again, as a device with one wrong bit in one weight would have made it.
fn with_other_weight(from: &str, to: &Path) {
    use replay::file::{Reader, Writer};
    use replay::record::Call;
    let mut reader = Reader::new(std::fs::File::open(from).unwrap()).unwrap();
    let mut writer = Writer::new(std::fs::File::create(to).unwrap(), reader.header()).unwrap();
    let (mut writes, mut changed) = (0, false);
    while let Some(mut stored) = reader.next_record().unwrap() {
        let call = &mut stored.record.call;
        let wrote = matches!(call, Call::Write { .. });
        if let Call::Write { payload, .. } | Call::Read { payload: Some(payload), .. } = call {
            let mut bytes = reader.payload(*payload).unwrap().unwrap().to_vec();
            writes += usize::from(wrote);
            // A norm's weight: a BF16 in the middle, its sign.
            if wrote && !changed && writes > 3 && bytes.len() == 512 {
                bytes[257] ^= 0x80;
                changed = true;
            }
            *payload = writer.payload(&bytes).unwrap();
        }
        writer.record(&stored.record).unwrap();
    }
    assert!(changed);
    writer.into_inner().unwrap();
}

#[test]
fn a_difference_is_found_and_the_op_is_named() {
    let (folder, other) = (Folder::new(), Folder::new());
    let file = folder.record("all", &[SHORT, &["--record-all"]].concat(), 0);
    let other = other.file("other");
    with_other_weight(&file, &other);
    let report = replay(other.to_str().unwrap(), &[], 1);
    let first = &report["differences"][0]["wrote"];
    assert_eq!(
        (&first["op"], &first["operand"]),
        (&"rms_norm_quantize".into(), &"q".into()),
        "{report}"
    );
    let (code, out, errors) = dsv3(&["replay", other.to_str().unwrap()]);
    assert_eq!(code, 1);
    assert!(
        out.contains("comparisons differ") && out.contains("last written by rms_norm"),
        "{out}"
    );
    assert!(errors.contains("the replay differs from the recorded run"), "{errors}");
}

#[test]
fn unusable_files_and_flags_are_refused() {
    let folder = Folder::new();
    let file = folder.record("run", SHORT, 0);
    let bytes = std::fs::read(&file).unwrap();
    let variant = |name: &str, bytes: &[u8]| {
        std::fs::write(folder.file(name), bytes).unwrap();
        folder.file(name).to_str().unwrap().to_string()
    };
    let mut damaged = bytes.clone();
    let middle = bytes.len() / 2;
    damaged[middle] ^= 1;
    let mut newer = bytes.clone();
    newer[8] = 2;
    let cut = variant("cut", &bytes[..middle]);
    for (file, words) in [
        (variant("damaged", &damaged), &["byte ", "damaged here"][..]),
        (variant("newer", &newer), &["byte 8", "version 2"]),
        (variant("text", b"{}"), &["byte 0", "no recording"]),
        (cut.clone(), &["byte ", "cut off", "--unfinished"]),
        (folder.file("absent").to_str().unwrap().to_string(), &["opening", "absent"]),
    ] {
        let (code, _, errors) = dsv3(&["replay", &file]);
        assert_eq!(code, 2, "{errors}");
        for word in words {
            assert!(errors.contains(word), "{errors:?} lacks {word:?}");
        }
    }
    let report = replay(&cut, &["--unfinished"], 0);
    assert_eq!(report["recording_complete"], false);
    for args in [
        &["--record-all"][..],
        &["--record", "/nowhere/at/all.hal"],
        &["replay"],
        &["replay", &file, "--tolerance", "-1"],
        &["replay", &file, "--dump", "--json"],
    ] {
        assert_eq!(dsv3(args).0, 2, "{args:?}");
    }
}

#[test]
fn a_generation_over_several_dies_replays_equal() {
    let folder = Folder::new();
    for (name, plan) in [
        ("tensor", &["--tensor-parallel-size", "2", "--overlap", "two-batch"][..]),
        ("expert", &["--data-parallel-size", "2", "--expert-parallel"]),
    ] {
        let file = folder.record(name, &[SHORT, plan].concat(), 0);
        let report = replay(&file, &[], 0);
        assert_eq!(report["recorded_dies"].as_array().unwrap().len(), 2, "{report}");
        assert_eq!((&report["different"], &report["skipped"]), (&0.into(), &0.into()), "{report}");
        assert!(report["reads"].as_u64().unwrap() > 0, "{report}");
    }
}
