//! `model.safetensors.index.json`: which shard holds which tensor.

use std::{collections::HashMap, fmt, path::Component, path::Path};

use serde::{
    Deserialize, Deserializer,
    de::{self, MapAccess, Visitor},
};

use super::error::CheckpointError;
use crate::config::json_message;

/// File name of the index.
pub(super) const INDEX_FILE: &str = "model.safetensors.index.json";

/// A parsed index.
#[derive(Debug)]
pub(super) struct Index {
    /// Shards in the order of their first mention.
    pub(super) shards: Vec<String>,
    /// Tensor to position in `shards`.
    pub(super) tensors: HashMap<String, usize>,
    /// `metadata.total_size`, if it is there and a whole number.
    pub(super) total_size: Option<u64>,
}

impl Index {
    /// Reads the index and refuses shard names that lead out of the folder.
    pub(super) fn parse(text: &[u8]) -> Result<Index, CheckpointError> {
        let file = || INDEX_FILE.to_owned();
        let raw: RawIndex = serde_json::from_slice(text).map_err(|error| {
            let (line, column) = (error.line(), error.column());
            CheckpointError::Index { file: file(), line, column, message: json_message(&error) }
        })?;
        let RawMap { shards, tensors } = raw.weight_map;
        if let Some(bad) = shards.iter().position(|shard| !is_plain_file_name(shard)) {
            // The first by name, so that the message does not depend on the hasher.
            let tensor = tensors.iter().filter(|(_, shard)| **shard == bad).map(|(name, _)| name);
            return Err(CheckpointError::UnsafeShardName {
                file: file(),
                tensor: tensor.min().cloned().unwrap_or_default(),
                shard: shards[bad].clone(),
            });
        }
        let total_size = raw.metadata.and_then(|metadata| metadata.get("total_size")?.as_u64());
        Ok(Index { shards, tensors, total_size })
    }
}

/// Whether `name` is one file directly in the folder, on every platform. What the file is (a
/// symbolic link, say, as in Hugging Face's cache) is not this function's business.
pub(super) fn is_plain_file_name(name: &str) -> bool {
    let mut components = Path::new(name).components();
    let alone = match (components.next(), components.next()) {
        (Some(Component::Normal(only)), None) => only == name,
        _ => false,
    };
    alone && !name.contains(['/', '\\', ':', '\0'])
}

#[derive(Deserialize)]
struct RawIndex {
    #[serde(default)]
    metadata: Option<serde_json::Map<String, serde_json::Value>>,
    weight_map: RawMap,
}

/// `weight_map` with shard names stored once: 92 thousand tensors share 163 of them.
struct RawMap {
    shards: Vec<String>,
    tensors: HashMap<String, usize>,
}

impl<'de> Deserialize<'de> for RawMap {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<RawMap, D::Error> {
        struct Entries;

        impl<'de> Visitor<'de> for Entries {
            type Value = RawMap;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object that maps tensors to files")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<RawMap, A::Error> {
                let mut positions: HashMap<String, usize> = HashMap::new();
                let mut raw = RawMap { shards: Vec::new(), tensors: HashMap::new() };
                while let Some((tensor, shard)) = map.next_entry::<String, String>()? {
                    let position = positions.get(&shard).copied().unwrap_or_else(|| {
                        raw.shards.push(shard.clone());
                        positions.insert(shard, raw.shards.len() - 1);
                        raw.shards.len() - 1
                    });
                    if raw.tensors.contains_key(&tensor) {
                        let message = format!("tensor {tensor} is listed twice");
                        return Err(de::Error::custom(message));
                    }
                    raw.tensors.insert(tensor, position);
                }
                Ok(raw)
            }
        }

        deserializer.deserialize_map(Entries)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn stores_each_shard_once() {
        let text = br#"{"metadata":{"total_size":7},"weight_map":{"a":"x","b":"y","c":"x"}}"#;
        let index = Index::parse(text).unwrap();
        assert_eq!(index.shards, ["x", "y"]);
        assert_eq!((index.tensors["a"], index.tensors["b"], index.tensors["c"]), (0, 1, 0));
        assert_eq!(index.total_size, Some(7));
        let bare = Index::parse(br#"{"weight_map":{}}"#).unwrap();
        assert_eq!((bare.shards.len(), bare.total_size), (0, None));
    }

    #[test]
    fn names_what_is_wrong() {
        for (text, expected) in [
            ("", "line 1, column 0: EOF"),
            ("{\n\"weight_map\": {\n\"a\": 3}}", "line 3, column 6"),
            ("{}", "missing field `weight_map`"),
            (r#"{"weight_map":[]}"#, "an object that maps tensors to files"),
            (r#"{"weight_map":{"a":"x","a":"y"}}"#, "tensor a is listed twice"),
            (r#"{"weight_map":{"a":"../x"}}"#, "tensor a in \"../x\", which is not a plain"),
        ] {
            let message = Index::parse(text.as_bytes()).unwrap_err().to_string();
            assert!(message.contains(expected), "{message:?} lacks {expected:?}");
        }
    }

    #[test]
    fn only_plain_names_stay_in_the_folder() {
        assert!(is_plain_file_name("model-00001-of-000163.safetensors"));
        assert!(is_plain_file_name("..model"));
        for name in [
            "",
            ".",
            "..",
            "/etc/passwd",
            "a/b",
            "a/",
            "./a",
            "../a",
            "a\\b",
            "C:a",
            "C:\\a",
            "a\0b",
        ] {
            assert!(!is_plain_file_name(name), "{name:?}");
        }
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = Index::parse(&bytes);
        }

        #[test]
        fn mutated_indices_never_panic(at in 0..71usize, value: u8) {
            let mut text =
                br#"{"metadata":{"total_size":7},"weight_map":{"a":"x","b":"y","c":"z"}}"#.to_vec();
            let at = at.min(text.len() - 1);
            text[at] = value;
            let _ = Index::parse(&text);
        }
    }
}
