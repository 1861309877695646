//! The tokenizer on the tiny checkpoint's files, against ids from Python's `tokenizers` 0.22.2
//! (Oniguruma instead of fancy-regex) and against the crate's own decoder.

use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use model::tokenizer::{AddBos, SpecialTokens, Tokenizer, TokenizerError};
use proptest::prelude::*;
use serde_json::{Value, json};
use tokenizers::{OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer};

const BOS: &str = "<｜begin▁of▁sentence｜>";
const EOS: &str = "<｜end▁of▁sentence｜>";

fn tiny(file: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/tiny-dsv3").join(file)
}

fn read(file: &str) -> Vec<u8> {
    std::fs::read(tiny(file)).unwrap()
}

fn read_json(file: &str) -> Value {
    serde_json::from_slice(&read(file)).unwrap()
}

fn build(tokenizer: &Value, config: Value, generation: Value) -> Result<Tokenizer, TokenizerError> {
    let bytes = |value: &Value| serde_json::to_vec(value).unwrap();
    Tokenizer::from_bytes(&bytes(tokenizer), Some(&bytes(&config)), Some(&bytes(&generation)))
}

static TINY: LazyLock<Tokenizer> = LazyLock::new(|| {
    let (tokenizer, config) = (read("tokenizer.json"), read("tokenizer_config.json"));
    let generation = read("generation_config.json");
    Tokenizer::from_bytes(&tokenizer, Some(&config), Some(&generation)).unwrap()
});

/// The `tokenizers` crate on the same file, without our code.
static ORACLE: LazyLock<tokenizers::Tokenizer> =
    LazyLock::new(|| tokenizers::Tokenizer::from_file(tiny("tokenizer.json")).unwrap());

#[rustfmt::skip]
const GOLDEN: &[(&str, &[u32])] = &[
    ("Hello, world!  12345 你好ABC\n\n x=foo(1);don't ", &[42, 380, 81, 14, 302, 288, 465, 3, 223, 223, 19, 20, 21, 22, 23, 223, 163, 124, 257, 164, 101, 124, 35, 36, 37, 201, 201, 223, 90, 31, 72, 506, 10, 19, 11, 29, 70, 338, 9, 86, 223]),
    ("The capital of France is Paris.", &[290, 279, 272, 775, 262, 646, 261, 16]),
    (" leading and trailing  ", &[650, 449, 324, 73, 322, 260, 329, 378, 324, 73, 223, 223]),
    ("emoji 👩‍👩‍👧 🦊é naïve — “quotes”", &[71, 79, 81, 76, 75, 223, 175, 256, 242, 105, 161, 225, 238, 175, 256, 242, 105, 161, 225, 238, 175, 256, 242, 103, 223, 175, 256, 102, 235, 130, 105, 367, 67, 130, 110, 464, 223, 161, 225, 245, 223, 161, 225, 253, 554, 81, 86, 350, 161, 225, 254]),
    ("かな カナ 漢字", &[162, 226, 236, 162, 226, 106, 223, 162, 227, 107, 162, 228, 235, 223, 165, 123, 98, 164, 258, 248]),
    ("tabs\tand\r\nnewlines\n\n\n  end", &[518, 68, 85, 200, 428, 204, 201, 301, 630, 808, 85, 201, 201, 201, 223, 407]),
    ("a<｜User｜>b<｜end▁of▁sentence｜>", &[67, 1022, 68, 1]),
    ("#include <x>\n  if (a[0]!=b) { return -1; }", &[5, 324, 69, 78, 87, 940, 223, 30, 90, 32, 201, 223, 223, 75, 72, 223, 10, 67, 61, 18, 63, 3, 31, 68, 11, 223, 93, 365, 450, 349, 80, 307, 19, 29, 223, 95]),
    ("", &[]),
];

#[test]
fn ids_equal_those_of_python() {
    for (text, ids) in GOLDEN {
        assert_eq!(TINY.encode(text, AddBos::Never).unwrap(), *ids, "{text:?}");
        assert_eq!(TINY.decode(ids, SpecialTokens::Keep), *text);
    }
}

#[test]
fn recorded_prompts_and_completions_agree() {
    let reference = read_json("reference.json");
    for completion in reference["completions"].as_array().unwrap() {
        let prompt = completion["prompt"].as_str().unwrap();
        let mut ids = vec![TINY.bos().unwrap(), TINY.id_of("<｜User｜>").unwrap()];
        ids.extend(TINY.encode(prompt, AddBos::Never).unwrap());
        ids.push(TINY.id_of("<｜Assistant｜>").unwrap());
        assert_eq!(json!(ids), completion["prompt_token_ids"], "{prompt}");

        let ids: Vec<u32> =
            serde_json::from_value(completion["completion_token_ids"].clone()).unwrap();
        let text = completion["text"].as_str().unwrap();
        assert_eq!(TINY.decode(&ids, SpecialTokens::Skip), text);
        assert_eq!(TINY.decode(&ids, SpecialTokens::Keep), format!("{text}{EOS}"));
    }
}

/// The released V3 patterns cut digits in threes; the tiny checkpoint's, for its arithmetic, singly.
#[test]
fn v3_pre_tokenizer_splits_as_documented() {
    let mut file = read_json("tokenizer.json");
    file["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = json!("\\p{N}{1,3}");
    let split = |file: &Value, text: &str| -> Vec<String> {
        let bpe = tokenizers::Tokenizer::from_bytes(serde_json::to_vec(file).unwrap()).unwrap();
        let mut pieces = PreTokenizedString::from(text);
        bpe.get_pre_tokenizer().unwrap().pre_tokenize(&mut pieces).unwrap();
        let splits = pieces.get_splits(OffsetReferential::Original, OffsetType::Byte);
        splits.into_iter().map(|(piece, ..)| piece.to_owned()).collect()
    };
    let pieces = split(&file, "Hello, world!  12345 你好ABC\n\n x=foo(1);don't ");
    let expected = "Hello , Ġworld ! ĠĠ 123 45 Ġ ä½łå¥½ ABC ĊĊ Ġx =foo ( 1 ); don 't Ġ";
    assert_eq!(pieces.join(" "), expected);
    assert_eq!(split(&file, "1234567 ٣٤٥٦").join(" "), "123 456 7 Ġ Ù£Ù¤Ù¥ Ù¦");
    assert_eq!(split(&read_json("tokenizer.json"), "12345").join(" "), "1 2 3 4 5");
}

#[test]
fn raw_prompts_get_one_bos_if_the_checkpoint_says_so() {
    let file = read_json("tokenizer.json");
    let config = |add: Value| json!({"bos_token": BOS, "eos_token": EOS, "add_bos_token": add});
    let doubled = format!("{BOS}hi");
    let with = build(&file, config(json!(true)), json!({})).unwrap();
    let without = build(&file, config(json!(false)), json!({})).unwrap();
    let hi = with.encode("hi", AddBos::Never).unwrap();
    let bos_hi = [&[0], hi.as_slice()].concat();
    for (tokenizer, text, add_bos, expected) in [
        (&with, "hi", AddBos::IfConfigured, &bos_hi),
        (&with, &doubled, AddBos::IfConfigured, &bos_hi),
        (&with, &doubled, AddBos::Never, &bos_hi),
        (&without, "hi", AddBos::IfConfigured, &hi),
        (&without, &doubled, AddBos::IfConfigured, &bos_hi),
        (&with, "", AddBos::IfConfigured, &vec![0]),
    ] {
        assert_eq!(&tokenizer.encode(text, add_bos).unwrap(), expected, "{text} {add_bos:?}");
    }
}

#[test]
fn a_post_processor_padding_or_truncation_changes_nothing() {
    let mut file = read_json("tokenizer.json");
    let bos = json!({"SpecialToken": {"id": BOS, "type_id": 0}});
    let a = json!({"Sequence": {"id": "A", "type_id": 0}});
    file["post_processor"] = json!({
        "type": "TemplateProcessing", "single": [bos, a], "pair": [a],
        "special_tokens": {BOS: {"id": BOS, "ids": [0], "tokens": [BOS]}}
    });
    file["truncation"] = json!({
        "direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0
    });
    file["padding"] = json!({
        "strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": null, "pad_id": 2,
        "pad_type_id": 0, "pad_token": "<｜▁pad▁｜>"
    });
    let tokenizer = build(&file, read_json("tokenizer_config.json"), json!({})).unwrap();
    let (text, ids) = GOLDEN[0];
    assert_eq!(tokenizer.encode(text, AddBos::Never).unwrap(), ids);
}

#[test]
fn bos_and_eos_come_in_all_their_forms() {
    let file = read_json("tokenizer.json");
    let object = json!({"__type": "AddedToken", "content": EOS, "special": true});
    #[rustfmt::skip]
    let cases = [
        (json!({"bos_token": BOS, "eos_token": EOS}), json!({}), Some(0), vec![1]),
        (json!({"bos_token": {"content": BOS}, "eos_token": object}), json!({}), Some(0), vec![1]),
        (json!({"eos_token": EOS}), json!({"bos_token_id": 0, "eos_token_id": 1}), Some(0), vec![1]),
        (json!({"bos_token": null, "eos_token": EOS}), json!({"eos_token_id": [1023, 1]}), None, vec![1, 1023]),
        (json!({}), json!({"eos_token_id": 2}), None, vec![2]),
        (json!({}), json!({}), None, vec![]),
    ];
    for (config, generation, bos, eos) in cases {
        let label = format!("{config} {generation}");
        let tokenizer = build(&file, config, generation).unwrap();
        assert_eq!((tokenizer.bos(), tokenizer.eos_ids()), (bos, eos.as_slice()), "{label}");
        assert_eq!(tokenizer.bos_token(), bos.map(|_| BOS), "{label}");
        assert!(!tokenizer.adds_bos(), "{label}");
    }
    let llama = json!({"tokenizer_class": "LlamaTokenizerFast", "bos_token": BOS});
    assert!(build(&file, llama, json!({})).unwrap().adds_bos());
    assert_eq!(TINY.eos_token(), Some(EOS));
    assert!(TINY.adds_bos());
}

#[test]
fn ids_without_a_token_are_known() {
    assert_eq!(TINY.vocab_size(), 1024);
    assert!(TINY.real_ids().iter().all(|&real| real));
    assert!(TINY.is_real(1023) && !TINY.is_real(1024) && !TINY.is_real(u32::MAX));
    assert_eq!(TINY.special_ids().collect::<Vec<_>>(), [0, 1, 2, 1022, 1023]);
    assert_eq!((TINY.id_of("Ġthe"), TINY.token_of(1022)), (Some(269), Some("<｜User｜>".into())));
    assert_eq!((TINY.id_of("no such token"), TINY.token_of(1024)), (None, None));
    assert_eq!(TINY.decode(&[290, 5000, 279], SpecialTokens::Keep), "The capital");

    let mut file = read_json("tokenizer.json");
    let vocab = file["model"]["vocab"].as_object_mut().unwrap();
    let id = vocab.shift_remove("~").unwrap().as_u64().unwrap();
    let tokenizer = build(&file, json!({}), json!({}));
    // Without one base token the library numbers the added tokens from 1021 on.
    assert!(
        matches!(
            tokenizer,
            Err(TokenizerError::AddedTokenMoved { stated: 1022, actual: Some(1021), .. })
        ),
        "{tokenizer:?}"
    );
    file["added_tokens"].as_array_mut().unwrap().truncate(3);
    let tokenizer = build(&file, json!({}), json!({})).unwrap();
    assert_eq!(tokenizer.vocab_size(), 1022);
    assert!(!tokenizer.is_real(id as u32) && tokenizer.is_real(id as u32 + 1));
}

#[test]
fn unsuitable_files_are_refused_in_words() {
    let file = read_json("tokenizer.json");
    let with = |key: &str, value: Value| {
        let mut file = file.clone();
        file[key] = value;
        build(&file, json!({}), json!({})).unwrap_err().to_string()
    };
    let config = |config, generation| build(&file, config, generation).unwrap_err().to_string();
    for (message, words) in [
        (with("decoder", Value::Null), "decoder none"),
        (with("decoder", json!({"type": "Fuse"})), "decoder Fuse"),
        (with("model", json!({"type": "Nonsense"})), "tokenizer.json cannot be read"),
        (config(json!({"bos_token": "<s>"}), json!({})), "bos_token \"<s>\""),
        (config(json!({"bos_token": 3}), json!({})), "tokenizer_config.json cannot be read"),
        (config(json!({}), json!({"eos_token_id": [1, 9999]})), "eos_token_id \"9999\""),
        (config(json!({}), json!({"eos_token_id": -1})), "generation_config.json cannot be read"),
        (config(json!({"add_bos_token": true}), json!({})), "add_bos_token"),
    ] {
        assert!(message.contains(words), "{message:?} lacks {words:?}");
    }
}

#[test]
fn a_character_is_held_back_until_it_is_whole() {
    let ids = TINY.encode("a🦊b", AddBos::Never).unwrap();
    let mut stream = TINY.stream(SpecialTokens::Skip);
    let pieces: Vec<_> = ids.iter().map(|&id| stream.push(id)).collect();
    assert_eq!(pieces, ["a", "", "", "", "🦊", "b"]);
    assert_eq!(stream.finish(), "");
    // An unfinished one is not lost, and the decoder starts afresh.
    stream.push(ids[1]);
    assert_eq!(stream.finish(), "\u{FFFD}");
    assert_eq!(stream.push(ids[0]), "a");
    // A genuine U+FFFD is not taken for an incomplete character.
    let replacement = TINY.encode("\u{FFFD}", AddBos::Never).unwrap();
    let text: String = replacement.iter().map(|&id| stream.push(id)).collect();
    assert_eq!(text, "\u{FFFD}");
}

#[test]
fn every_single_token_decodes_as_in_the_library() {
    for id in 0..1030 {
        for (ours, skip) in [(SpecialTokens::Keep, false), (SpecialTokens::Skip, true)] {
            assert_eq!(TINY.decode(&[id], ours), ORACLE.decode(&[id], skip).unwrap(), "{id}");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, failure_persistence: None, ..ProptestConfig::default() })]

    /// Any ids at all, most of which are not valid UTF-8 together.
    #[test]
    fn streamed_pieces_equal_the_whole(
        ids in prop::collection::vec(prop_oneof![0_u32..262, 0_u32..1030], 0..40),
        skip: bool,
    ) {
        let special = if skip { SpecialTokens::Skip } else { SpecialTokens::Keep };
        let whole = ORACLE.decode(&ids, skip).unwrap();
        prop_assert_eq!(&TINY.decode(&ids, special), &whole);
        let mut stream = TINY.stream(special);
        let mut text: String = ids.iter().map(|&id| stream.push(id)).collect();
        text += &stream.finish();
        prop_assert_eq!(text, whole);
    }

    #[test]
    fn text_survives_the_round_trip(
        text in "([ -~]|[ \n\t]{1,3}|[一-龥]|\\PC|🦊|👩‍👩‍👧|é){0,40}",
    ) {
        let ids = TINY.encode(&text, AddBos::Never).unwrap();
        prop_assert_eq!(TINY.decode(&ids, SpecialTokens::Keep), text.clone());
        let mut stream = TINY.stream(SpecialTokens::Keep);
        let mut streamed = String::new();
        for &id in &ids {
            streamed += &stream.push(id);
            prop_assert!(text.starts_with(&streamed), "no piece may be taken back");
        }
        prop_assert_eq!(streamed, text);
        prop_assert_eq!(stream.finish(), "");
    }

    #[test]
    fn arbitrary_bytes_are_refused_without_panic(bytes in prop::collection::vec(any::<u8>(), 0..64)) {
        prop_assert!(Tokenizer::from_bytes(&bytes, None, None).is_err());
    }
}
