//! Opening checkpoints: the trained one in `models/`, and a table of damaged ones.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use model::{
    checkpoint::{
        Checkpoint, CheckpointError, Dtype, MtpState, SynthOptions, inspect, inspect_config,
        synthesize,
    },
    config::{ModelConfig, Preset},
};
use safetensors::{SafeTensors, tensor::TensorView};
use serde_json::Value;

const TINY: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../models/tiny-dsv3");
const INDEX: &str = "model.safetensors.index.json";
const SHARD_1: &str = "model-00001-of-000002.safetensors";
const SHARD_2: &str = "model-00002-of-000002.safetensors";
const WEIGHT: &str = "model.layers.0.self_attn.o_proj.weight";
const SCALE: &str = "model.layers.0.self_attn.o_proj.weight_scale_inv";

#[test]
fn trained_checkpoint_is_clean() {
    let checkpoint = Checkpoint::open(Path::new(TINY)).unwrap();
    checkpoint.verify().unwrap();
    assert!(checkpoint.has_mtp().unwrap());
    let found = inspect(&checkpoint);
    assert!(found.is_clean(), "{found:#?}");
    assert_eq!(found.notes, Vec::<String>::new());
    assert_eq!(found.mtp_state, MtpState::Complete);
    let config = checkpoint.config();
    let copies = 2 * config.vocab_size * config.hidden_size;
    let parameters = found.main.parameters + found.mtp.parameters - copies as u64;
    assert!((6_850_000..6_950_000).contains(&parameters), "{parameters}");
    // `metadata.total_size` of its index, written by other software.
    assert_eq!(found.main.bytes + found.mtp.bytes, 8_633_496);
    assert_eq!(found.files.len(), 3);
    assert!(serde_json::to_string(&found).unwrap().contains("\"mtp_state\":\"complete\""));
}

/// Weight in shard 1, scale in shard 2.
#[test]
fn scales_are_found_in_other_shards() {
    let checkpoint = Checkpoint::open(Path::new(TINY)).unwrap();
    let name = "model.layers.0.mlp.down_proj.weight";
    let scale_file = checkpoint.tensor(&format!("{name}_scale_inv")).unwrap().file.to_owned();
    let weight = checkpoint.weight(name).unwrap();
    assert_eq!(weight.file, "model-00001-of-000003.safetensors");
    assert_eq!(scale_file, "model-00002-of-000003.safetensors");
    assert_eq!((weight.dtype, weight.shape), (hal::DType::F8E4M3, &[256, 512][..]));
    let scales = weight.scales.as_ref().unwrap();
    assert_eq!((scales.shape, scales.values.len()), ([2, 4], 8));
    assert_eq!(scales.at(255, 511), scales.values[7]);
    assert!(checkpoint.weight("model.norm.weight").unwrap().scales.is_none());
}

#[test]
fn every_trained_value_is_sound() {
    let checkpoint = Checkpoint::open(Path::new(TINY)).unwrap();
    for spec in model::checkpoint::layout::tensors(checkpoint.config()) {
        if let Ok(weight) = checkpoint.weight(&spec.name) {
            weight.check_values().unwrap();
        }
    }
}

#[test]
fn files_beside_the_weights() {
    let checkpoint = Checkpoint::open(Path::new(TINY)).unwrap();
    let text = checkpoint.aux_file("tokenizer_config.json").unwrap().unwrap();
    assert!(serde_json::from_slice::<Value>(&text).unwrap().is_object());
    assert!(checkpoint.aux_file("chat_template.jinja").unwrap().is_none());
    assert!(checkpoint.aux_file("../README.md").unwrap().is_none());
}

/// Loader threads share one.
const _: () = {
    const fn shareable<T: Send + Sync>() {}
    shareable::<Checkpoint>();
};

/// A checkpoint built into the program equals the folder it was made from.
#[test]
fn memory_and_folder_are_the_same() {
    let files: Vec<(&'static str, &'static [u8])> = fs::read_dir(TINY)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.is_file())
        .map(|path| {
            let name = path.file_name().unwrap().to_str().unwrap().to_owned();
            (&*name.leak(), &*fs::read(&path).unwrap().leak())
        })
        .collect();
    let memory = Checkpoint::from_memory(files.leak()).unwrap();
    let folder = Checkpoint::open(Path::new(TINY)).unwrap();
    let (mut a, mut b) = (inspect(&memory), inspect(&folder));
    (a.location, b.location) = (String::new(), String::new());
    assert_eq!(a, b);
    for view in folder.tensors() {
        assert_eq!(memory.tensor(view.name).unwrap().data, view.data);
    }
    assert!(memory.aux_file("tokenizer.json").unwrap().is_some());
    let error = Checkpoint::from_memory(&[]).unwrap_err().to_string();
    assert!(error.starts_with("the built-in checkpoint has no config.json"), "{error}");
}

/// A sound checkpoint of two shards, to be damaged.
struct Patient(tempfile::TempDir);

type Tensors = BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)>;

impl Patient {
    fn new() -> Patient {
        Patient::of(&Patient::config())
    }

    fn config() -> ModelConfig {
        ModelConfig {
            vocab_size: 16,
            hidden_size: 160,
            num_hidden_layers: 2,
            first_k_dense_replace: 1,
            intermediate_size: 64,
            num_attention_heads: 2,
            q_lora_rank: None,
            kv_lora_rank: 32,
            moe_intermediate_size: 32,
            n_routed_experts: 4,
            n_group: 2,
            topk_group: 1,
            ..Preset::Tiny.config()
        }
    }

    fn of(config: &ModelConfig) -> Patient {
        let patient = Patient(tempfile::tempdir().unwrap());
        let size = inspect_config(config).main + inspect_config(config).mtp;
        let options = SynthOptions { seed: 0, shard_bytes: size.bytes * 2 / 3 };
        synthesize(config, patient.0.path(), options, &mut |_, _| {}).unwrap();
        assert!(patient.path(SHARD_2).exists());
        patient
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn open(&self) -> Result<Checkpoint, CheckpointError> {
        Checkpoint::open(self.0.path())
    }

    /// Message of the failure to open.
    fn complaint(&self) -> String {
        self.open().unwrap_err().to_string()
    }

    fn bytes(&self, name: &str, edit: impl FnOnce(&mut Vec<u8>)) {
        let mut bytes = fs::read(self.path(name)).unwrap();
        edit(&mut bytes);
        fs::write(self.path(name), bytes).unwrap();
    }

    fn json(&self, name: &str, edit: impl FnOnce(&mut Value)) {
        self.bytes(name, |bytes| {
            let mut value = serde_json::from_slice(bytes).unwrap();
            edit(&mut value);
            *bytes = value.to_string().into_bytes();
        });
    }

    /// Rewrites the shard with `safetensors` itself, and the index to match.
    fn tensors(&self, shard: &str, edit: impl FnOnce(&mut Tensors)) {
        let mut tensors = Tensors::new();
        self.bytes(shard, |bytes| {
            for (name, view) in SafeTensors::deserialize(bytes).unwrap().iter() {
                let tensor = (view.dtype(), view.shape().to_vec(), view.data().to_vec());
                tensors.insert(name.to_owned(), tensor);
            }
            edit(&mut tensors);
            let views = tensors.iter().map(|(name, (dtype, shape, data))| {
                (name, TensorView::new(*dtype, shape.clone(), data).unwrap())
            });
            *bytes = safetensors::serialize(views, None).unwrap();
        });
        self.json(INDEX, |index| {
            let map = index["weight_map"].as_object_mut().unwrap();
            map.retain(|_, file| file.as_str() != Some(shard));
            map.extend(tensors.keys().map(|name| (name.clone(), shard.into())));
        });
    }
}

#[test]
fn folders_that_are_no_checkpoints() {
    let patient = Patient::new();
    let error = Checkpoint::open(&patient.path("nowhere")).unwrap_err();
    assert!(matches!(error, CheckpointError::NotFound { .. }), "{error}");
    let error = Checkpoint::open(&patient.path("config.json")).unwrap_err();
    assert!(matches!(error, CheckpointError::NotAFolder { .. }), "{error}");

    fs::remove_file(patient.path(INDEX)).unwrap();
    let error = patient.open().unwrap_err();
    assert!(matches!(error, CheckpointError::MissingWeights { .. }), "{error}");
    fs::remove_file(patient.path("config.json")).unwrap();
    let error = patient.open().unwrap_err();
    assert!(matches!(error, CheckpointError::MissingConfig { .. }), "{error}");
}

#[test]
fn one_file_needs_no_index() {
    let patient = Patient(tempfile::tempdir().unwrap());
    synthesize(&Patient::config(), patient.0.path(), SynthOptions::default(), &mut |_, _| {})
        .unwrap();
    fs::remove_file(patient.path(INDEX)).unwrap();
    let single = patient.path("model-00001-of-000001.safetensors");
    fs::rename(single, patient.path("model.safetensors")).unwrap();
    let found = inspect(&patient.open().unwrap());
    assert!(found.is_clean() && found.files[0].file == "model.safetensors");
}

/// Damage that is found on opening: what is done, and what the message must say.
#[test]
fn damage_found_on_opening() {
    type Damage = fn(&Patient);
    let cases: [(Damage, &[&str]); 18] = [
        (|p| p.bytes("config.json", |b| b.truncate(40)), &["config.json in ", "at line 3"]),
        (
            |p| p.json("config.json", |c| c["n_group"] = 3.into()),
            &["config.json in ", "n_group = 3"],
        ),
        (|p| p.bytes(INDEX, |b| b.truncate(300)), &[INDEX, "at line", "EOF"]),
        (|p| p.bytes(INDEX, |b| *b = b"{}".to_vec()), &[INDEX, "missing field `weight_map`"]),
        (|p| fs::remove_file(p.path(SHARD_2)).unwrap(), &[INDEX, SHARD_2, "tensors are in it"]),
        (|p| set_shard(p, "/etc/passwd"), &["\"/etc/passwd\"", WEIGHT, "not a plain file name"]),
        (|p| set_shard(p, "../model.safetensors"), &["../model.safetensors", "not a plain"]),
        (|p| set_shard(p, "a/b"), &["\"a/b\"", "not a plain file name"]),
        (|p| set_shard(p, SHARD_2), &[WEIGHT, SHARD_2, "does not hold it"]),
        (|p| p.bytes(SHARD_1, |b| b.truncate(b.len() - 1)), &[SHARD_1, "is missing; fetch"]),
        (|p| p.bytes(SHARD_1, |b| b.truncate(20)), &[SHARD_1, "the file ends after 12"]),
        (|p| p.bytes(SHARD_1, Vec::clear), &[SHARD_1, "has 0 bytes"]),
        (|p| p.bytes(SHARD_1, |b| b.push(0)), &[SHARD_1, "what follows the last tensor"]),
        (|p| p.bytes(SHARD_1, |b| b[6] = 1), &[SHARD_1, "limit of 100000000"]),
        (|p| p.bytes(SHARD_1, |b| b[9] = b'!'), &[SHARD_1, "line 1, column 2"]),
        (
            |p| {
                fs::remove_file(p.path(SHARD_1)).unwrap();
                fs::create_dir(p.path(SHARD_1)).unwrap();
            },
            &[SHARD_1, "not a regular file"],
        ),
        (
            // The same tensor in both shards.
            |p| {
                let bytes = fs::read(p.path(SHARD_1)).unwrap();
                let tensors = SafeTensors::deserialize(&bytes).unwrap();
                let norm = tensors.tensor("model.norm.weight").unwrap();
                let copy = (norm.dtype(), norm.shape().to_vec(), norm.data().to_vec());
                p.tensors(SHARD_2, |t| drop(t.insert("model.norm.weight".into(), copy)));
            },
            &["model.norm.weight", SHARD_1, SHARD_2, "both"],
        ),
        (
            |p| {
                p.bytes(INDEX, |b| {
                    let text = String::from_utf8(b.clone()).unwrap();
                    let twice = format!("\"weight_map\": {{ \"{WEIGHT}\": \"{SHARD_1}\",");
                    *b = text.replace("\"weight_map\": {", &twice).into_bytes();
                });
            },
            &[INDEX, WEIGHT, "listed twice"],
        ),
    ];
    for (damage, expected) in cases {
        let patient = Patient::new();
        damage(&patient);
        let message = patient.complaint();
        for part in expected {
            assert!(message.contains(part), "{message:?} lacks {part:?}");
        }
    }
}

fn set_shard(patient: &Patient, file: &str) {
    patient.json(INDEX, |index| index["weight_map"][WEIGHT] = file.into());
}

fn shard_of(patient: &Patient, tensor: &str) -> String {
    patient.open().unwrap().tensor(tensor).unwrap().file.to_owned()
}

/// Damage to single tensors: opening works, `weight` and `verify` name it, `inspect` lists it.
#[test]
fn damage_found_on_resolving() {
    type Damage = fn(&mut Tensors);
    fn value(tensors: &mut Tensors, at: usize, bytes: [u8; 4]) {
        tensors.get_mut(SCALE).unwrap().2[4 * at..4 * at + 4].copy_from_slice(&bytes);
    }
    // Whether `verify`, which reads no data, finds it too.
    let cases: [(bool, Damage, &[&str]); 9] = [
        (true, |t| drop(t.remove(WEIGHT)), &[WEIGHT, "is missing in"]),
        (true, |t| drop(t.remove(SCALE)), &[WEIGHT, SCALE, "has no scales"]),
        (true, |t| t.get_mut(WEIGHT).unwrap().1 = vec![32, 160], &["[32, 160]", "[160, 32]"]),
        (true, |t| t.get_mut(WEIGHT).unwrap().1 = vec![5120], &["[5120]", "[160, 32]"]),
        (true, |t| t.get_mut(WEIGHT).unwrap().0 = Dtype::F8_E5M2, &["F8_E5M2", "F8_E4M3"]),
        (true, |t| t.get_mut(SCALE).unwrap().1 = vec![1, 2], &[SCALE, "[1, 2]", "[2, 1]"]),
        (false, |t| value(t, 1, f32::NAN.to_le_bytes()), &[SCALE, "NaN", "block [1, 0]"]),
        (false, |t| value(t, 0, (-1f32).to_le_bytes()), &[SCALE, "is -1 at", "block [0, 0]"]),
        (false, |t| value(t, 0, f32::INFINITY.to_le_bytes()), &[SCALE, "is inf", "block [0, 0]"]),
    ];
    for (in_headers, damage, expected) in cases {
        let patient = Patient::new();
        let shard = shard_of(&patient, WEIGHT);
        assert_eq!(shard, shard_of(&patient, SCALE), "the cases take both to be in one shard");
        patient.tensors(&shard, damage);
        let checkpoint = patient.open().unwrap();
        let message = checkpoint.weight(WEIGHT).unwrap_err().to_string();
        for part in expected {
            assert!(message.contains(part), "{message:?} lacks {part:?}");
        }
        if in_headers {
            assert_eq!(checkpoint.verify().unwrap_err().to_string(), message);
            assert!(!inspect(&checkpoint).is_clean());
        } else {
            checkpoint.verify().unwrap();
        }
    }
}

#[test]
fn nan_weights_are_located() {
    let patient = Patient::new();
    let shard = shard_of(&patient, WEIGHT);
    patient.tensors(&shard, |t| t.get_mut(WEIGHT).unwrap().2[3 * 32 + 5] = 0xff);
    let checkpoint = patient.open().unwrap();
    let message = checkpoint.weight(WEIGHT).unwrap().check_values().unwrap_err().to_string();
    assert!(message.contains(WEIGHT) && message.contains("[3, 5]"), "{message}");

    let norm = "model.norm.weight";
    let nan = half::bf16::NAN.to_le_bytes();
    patient.tensors(&shard_of(&patient, norm), |t| {
        t.get_mut(norm).unwrap().2[14..16].copy_from_slice(&nan);
    });
    let checkpoint = patient.open().unwrap();
    let message = checkpoint.weight(norm).unwrap().check_values().unwrap_err().to_string();
    assert!(message.contains(norm) && message.contains("[7]"), "{message}");
}

/// `quantization_config` and files that contradict each other.
#[test]
fn quantisation_must_match_the_files() {
    let patient = Patient::new();
    patient.json("config.json", |c| drop(c.as_object_mut().unwrap().remove("quantization_config")));
    let checkpoint = patient.open().unwrap();
    let message = checkpoint.weight(WEIGHT).unwrap_err().to_string();
    assert!(message.contains("F8_E4M3") && message.contains("needs its quantization_config"));
    let found = inspect(&checkpoint);
    assert!(found.wrong_dtype.count > 0 && found.unexpected.count > 0);
    assert!(found.notes.iter().any(|note| note.contains("no quantization_config")), "{found:?}");

    let patient = Patient::of(&ModelConfig { quantization: None, ..Patient::config() });
    let scale = (Dtype::F32, vec![1, 1], vec![0; 4]);
    patient.tensors(SHARD_1, |t| drop(t.insert(SCALE.into(), scale)));
    let error = patient.open().unwrap().weight(WEIGHT).unwrap_err();
    assert!(matches!(error, CheckpointError::UnexpectedScale { .. }), "{error}");

    patient.json("config.json", |c| {
        c["quantization_config"] =
            serde_json::from_str(r#"{"quant_method": "fp8", "weight_block_size": [128, 128]}"#)
                .unwrap();
    });
    let message = patient.open().unwrap().weight(WEIGHT).unwrap_err().to_string();
    assert!(message.contains("BF16") && message.contains("remove quantization_config"));
}

#[test]
fn dumps_in_f32_are_accepted() {
    let patient = Patient::new();
    let name = "model.norm.weight";
    patient.tensors(&shard_of(&patient, name), |t| {
        let (dtype, _, data) = t.get_mut(name).unwrap();
        (*dtype, *data) = (Dtype::F32, vec![0; 2 * data.len()]);
    });
    let checkpoint = patient.open().unwrap();
    assert_eq!(checkpoint.weight(name).unwrap().dtype, hal::DType::F32);
    checkpoint.verify().unwrap();
}

#[test]
fn names_outside_the_layout_are_refused() {
    let checkpoint = Patient::new().open().unwrap();
    for name in [SCALE, "model.layers.0.mlp.gate.weight", "model.layers.9.hnorm.weight", ""] {
        let error = checkpoint.weight(name).unwrap_err();
        assert!(matches!(error, CheckpointError::NotInLayout { .. }), "{name}: {error}");
    }
}

/// Keeps only those tensors for which `keep` holds, in both shards.
fn retain(patient: &Patient, keep: impl Fn(&str) -> bool) {
    for shard in [SHARD_1, SHARD_2] {
        patient.tensors(shard, |tensors| tensors.retain(|name, _| keep(name)));
    }
}

#[test]
fn mtp_may_be_absent_but_not_in_part() {
    let mtp = |name: &str| name.starts_with("model.layers.2.");
    let patient = Patient::new();
    retain(&patient, |name| !mtp(name));
    let checkpoint = patient.open().unwrap();
    assert!(!checkpoint.has_mtp().unwrap());
    checkpoint.verify().unwrap();
    let found = inspect(&checkpoint);
    assert!(found.is_clean() && found.mtp_state == MtpState::Absent && found.mtp.tensors == 0);
    assert!(found.notes.iter().any(|note| note.contains("there is no MTP layer")), "{found:?}");

    let patient = Patient::new();
    retain(&patient, |name| {
        !name.contains("shared_head.head") && !name.ends_with("2.embed_tokens.weight")
    });
    let checkpoint = patient.open().unwrap();
    assert!(checkpoint.has_mtp().unwrap());
    checkpoint.verify().unwrap();
    let found = inspect(&checkpoint);
    assert!(found.is_clean() && found.mtp_state == MtpState::Complete);
    assert!(found.notes.iter().any(|note| note.contains("copies left out")), "{found:?}");

    let patient = Patient::new();
    retain(&patient, |name| !name.ends_with("2.hnorm.weight") && !name.ends_with("2.enorm.weight"));
    let checkpoint = patient.open().unwrap();
    let message = checkpoint.has_mtp().unwrap_err().to_string();
    assert!(message.contains("2 of ") && message.contains("model.layers.2.hnorm.weight"));
    assert_eq!(checkpoint.verify().unwrap_err().to_string(), message);
    let found = inspect(&checkpoint);
    assert_eq!((found.mtp_state, found.missing.count), (MtpState::Partial, 2));

    let patient = Patient::new();
    patient.json("config.json", |c| c["num_nextn_predict_layers"] = 0.into());
    let found = inspect(&patient.open().unwrap());
    assert_eq!(found.mtp_state, MtpState::NotConfigured);
    assert!(found.notes.iter().any(|note| note.contains("they are not used")), "{found:?}");
}

#[test]
fn tensors_the_index_does_not_list_are_mentioned() {
    let patient = Patient::new();
    patient.json(INDEX, |index| {
        drop(index["weight_map"].as_object_mut().unwrap().remove("model.norm.weight"));
        index["metadata"]["total_size"] = 5.into();
    });
    let found = inspect(&patient.open().unwrap());
    let notes = found.notes.join("\n");
    assert!(notes.contains("1 tensors are in the files but not in the index"), "{notes}");
    assert!(notes.contains("the index claims 5 bytes"), "{notes}");
}

#[cfg(unix)]
#[test]
fn links_are_followed() {
    let patient = Patient::new();
    let store = tempfile::tempdir().unwrap();
    for shard in [SHARD_1, SHARD_2] {
        fs::rename(patient.path(shard), store.path().join(shard)).unwrap();
        std::os::unix::fs::symlink(store.path().join(shard), patient.path(shard)).unwrap();
    }
    assert!(inspect(&patient.open().unwrap()).is_clean());
}
