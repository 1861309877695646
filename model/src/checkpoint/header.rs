//! The header of one safetensors file, checked in full before any tensor is touched.
//!
//! The `safetensors` crate's own parser accepts and rejects the same files (a test compares them)
//! but does not say which tensor is wrong or with what numbers, and takes the last of two entries
//! of one name; hence this one. Its [`Dtype`] is used as it is.

use std::{collections::HashMap, fmt, ops::Range};

use safetensors::Dtype;
use serde::{
    Deserialize, Deserializer,
    de::{IntoDeserializer, MapAccess, Visitor, value},
};

use super::error::HeaderError;
use crate::config::json_message;

/// Bytes of the length field.
const LENGTH_BYTES: usize = 8;
/// The format's ceiling on header sizes; that of DeepSeek-V3's largest shard is 0.1 MB.
const MAX_HEADER: u64 = 100_000_000;

/// One tensor as its header describes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Entry {
    pub(super) name: String,
    pub(super) dtype: Dtype,
    pub(super) shape: Box<[usize]>,
    /// Bytes from the start of the file.
    pub(super) range: Range<usize>,
}

/// Reads the header of a whole file; entries come in the order of their data.
pub(super) fn parse(file: &[u8]) -> Result<Vec<Entry>, HeaderError> {
    let Some((length, rest)) = file.split_first_chunk::<LENGTH_BYTES>() else {
        return Err(HeaderError::TooShort { len: file.len() });
    };
    let claimed = u64::from_le_bytes(*length);
    if claimed > MAX_HEADER {
        return Err(HeaderError::TooLarge { claimed, limit: MAX_HEADER });
    }
    let available = rest.len() as u64;
    let Some((json, data)) = usize::try_from(claimed).ok().and_then(|n| rest.split_at_checked(n))
    else {
        return Err(HeaderError::BeyondFile { claimed, available });
    };
    let RawHeader(raw) = serde_json::from_slice(json).map_err(|error| HeaderError::Json {
        line: error.line(),
        column: error.column(),
        message: json_message(&error),
    })?;
    let data_start = LENGTH_BYTES + json.len();
    let mut entries = raw
        .into_iter()
        .map(|(name, tensor)| tensor.check(name))
        .collect::<Result<Vec<Entry>, HeaderError>>()?;
    // Tensors without elements share their offset with their neighbour: they go first.
    entries.sort_by_key(|entry| (entry.range.start, entry.range.end));
    check_tiling(&entries, data_start, data.len())?;
    check_names(&entries)?;
    for entry in &mut entries {
        // In bounds of the file, as just checked, so the sums cannot overflow.
        entry.range = entry.range.start + data_start..entry.range.end + data_start;
    }
    Ok(entries)
}

/// The data must be tiled: no holes, no overlaps, nothing left over, nothing missing.
fn check_tiling(entries: &[Entry], data_start: usize, data: usize) -> Result<(), HeaderError> {
    let mut end = 0;
    let mut previous: Option<&Entry> = None;
    let file_size = |data: usize| data as u64 + data_start as u64;
    // The last offset is what the file size should be, but only if the tiling is sound.
    let total = entries.iter().map(|entry| entry.range.end).max().unwrap_or(0);
    for entry in entries {
        let tensor = || entry.name.clone();
        match entry.range.start.cmp(&end) {
            std::cmp::Ordering::Greater => {
                let (from, to) = (end as u64, entry.range.start as u64);
                return Err(HeaderError::Hole { tensor: tensor(), from, to });
            }
            std::cmp::Ordering::Less => {
                let first = previous.map_or_else(String::new, |entry| entry.name.clone());
                let (begin, end) = (entry.range.start as u64, end as u64);
                return Err(HeaderError::Overlap { first, second: tensor(), begin, end });
            }
            std::cmp::Ordering::Equal => {}
        }
        end = entry.range.end;
        if end > data {
            let (expected, actual) = (file_size(total), file_size(data));
            return Err(HeaderError::Truncated { tensor: tensor(), expected, actual });
        }
        previous = Some(entry);
    }
    if end < data {
        let (expected, actual) = (file_size(end), file_size(data));
        return Err(HeaderError::TrailingBytes { expected, actual });
    }
    Ok(())
}

fn check_names(entries: &[Entry]) -> Result<(), HeaderError> {
    let mut seen = HashMap::with_capacity(entries.len());
    match entries.iter().find(|entry| seen.insert(entry.name.as_str(), ()).is_some()) {
        Some(entry) => Err(HeaderError::DuplicateTensor { tensor: entry.name.clone() }),
        None => Ok(()),
    }
}

/// A tensor's entry before its numbers are checked against each other.
#[derive(Deserialize)]
struct RawTensor {
    dtype: String,
    shape: Box<[usize]>,
    data_offsets: (usize, usize),
}

impl RawTensor {
    fn check(self, tensor: String) -> Result<Entry, HeaderError> {
        let RawTensor { dtype: dtype_name, shape, data_offsets: (begin, end) } = self;
        let deserializer: value::StrDeserializer<'_, value::Error> =
            dtype_name.as_str().into_deserializer();
        let Ok(dtype) = Dtype::deserialize(deserializer) else {
            return Err(HeaderError::UnknownDtype { tensor, dtype: dtype_name });
        };
        let bits = shape
            .iter()
            .try_fold(1usize, |product, &size| product.checked_mul(size))
            .and_then(|elements| elements.checked_mul(dtype.bitsize()));
        let Some(needed) = bits.filter(|bits| bits.is_multiple_of(8)).map(|bits| bits / 8) else {
            let shape = shape.into_vec();
            return Err(HeaderError::ImpossibleSize { tensor, shape, dtype });
        };
        if end.checked_sub(begin) != Some(needed) {
            return Err(HeaderError::SizeMismatch {
                tensor,
                shape: shape.into_vec(),
                dtype,
                needed: needed as u64,
                begin: begin as u64,
                end: end as u64,
            });
        }
        Ok(Entry { name: tensor, dtype, shape, range: begin..end })
    }
}

/// The JSON object, with entries of one name kept apart.
struct RawHeader(Vec<(String, RawTensor)>);

impl<'de> Deserialize<'de> for RawHeader {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<RawHeader, D::Error> {
        struct Entries;

        impl<'de> Visitor<'de> for Entries {
            type Value = RawHeader;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object with one entry per tensor")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<RawHeader, A::Error> {
                let mut entries = Vec::new();
                while let Some(name) = map.next_key::<String>()? {
                    if name == "__metadata__" {
                        // Unused, but the format says strings, and who breaks it breaks more.
                        map.next_value::<Option<HashMap<String, String>>>()?;
                    } else {
                        entries.push((name, map.next_value()?));
                    }
                }
                Ok(RawHeader(entries))
            }
        }

        deserializer.deserialize_map(Entries)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use safetensors::SafeTensors;

    fn file(header: &str, data: usize) -> Vec<u8> {
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend_from_slice(header.as_bytes());
        bytes.resize(bytes.len() + data, 7);
        bytes
    }

    const TWO: &str = r#"{"__metadata__":{"format":"pt"},
        "b":{"dtype":"F32","shape":[2,3],"data_offsets":[4,28]},
        "a":{"dtype":"F8_E4M3","shape":[4],"data_offsets":[0,4]},
        "none":{"dtype":"BF16","shape":[0,9],"data_offsets":[4,4]}}"#;

    #[test]
    fn lists_tensors_in_the_order_of_their_data() {
        let entries = parse(&file(TWO, 28)).unwrap();
        let names: Vec<&str> = entries.iter().map(|entry| entry.name.as_str()).collect();
        assert_eq!(names, ["a", "none", "b"]);
        let start = 8 + TWO.len();
        assert_eq!(entries[2].range, start + 4..start + 28);
        assert_eq!((entries[2].dtype, &*entries[2].shape), (Dtype::F32, &[2, 3][..]));
    }

    #[test]
    fn refuses_each_damage_by_its_name() {
        let with_length = |length: u64| {
            let mut bytes = file(TWO, 28);
            bytes[..8].copy_from_slice(&length.to_le_bytes());
            bytes
        };
        let one = |dtype: &str, shape: &str, offsets: &str| {
            let tensor = format!(r#""dtype":"{dtype}","shape":{shape},"data_offsets":{offsets}"#);
            file(&format!(r#"{{"x":{{{tensor}}}}}"#), 8)
        };
        let pair = |a: &str, b: &str| {
            let entry = |name: &str, offsets: &str| {
                format!(r#""{name}":{{"dtype":"U8","shape":[8],"data_offsets":{offsets}}}"#)
            };
            file(&format!("{{{},{}}}", entry("x", a), entry("y", b)), 16)
        };
        let twice = file(&TWO.replace("\"none\"", "\"b\""), 28);
        for (bytes, expected) in [
            (vec![], "has 0 bytes"),
            (vec![0; 7], "has 7 bytes"),
            (with_length(u64::MAX), "limit of 100000000"),
            (with_length(100_000_001), "limit of 100000000"),
            (with_length(50_000), "claims 50000 bytes, but the file ends"),
            (with_length(20), "not valid at line 1"),
            (file("[]", 0), "an object with one entry per tensor"),
            (file("{\"x\": 3}", 0), "not valid at line 1, column 7"),
            (file(&"[".repeat(100_000), 0), "not valid"),
            (file(TWO, 27), "should have 267 bytes and has 266: the end of tensor b"),
            (file(TWO, 29), "should have 267 bytes and has 268"),
            (twice, "tensor b is listed twice"),
            (one("F9", "[8]", "[0,8]"), "unknown element type \"F9\""),
            (one("F4", "[3]", "[0,2]"), "no valid size in bytes"),
            (one("U8", "[18446744073709551615,2]", "[0,8]"), "no valid size in bytes"),
            (one("U8", "[-8]", "[0,8]"), "not valid at line 1"),
            (one("F32", "[8]", "[0,8]"), "needs 32 bytes"),
            (one("U8", "[8]", "[8,0]"), "needs 8 bytes"),
            (one("U8", "[8]", "[1,9]"), "1 bytes before tensor x"),
            (one("U8", "[8]", "[18446744073709551607,18446744073709551615]"), "before tensor x"),
            (pair("[0,8]", "[4,12]"), "tensors x and y overlap"),
            (pair("[0,8]", "[0,8]"), "overlap"),
            (pair("[0,8]", "[9,17]"), "(offsets 8..9) belong to no tensor"),
        ] {
            let message = parse(&bytes).unwrap_err().to_string();
            assert!(message.contains(expected), "{message:?} lacks {expected:?}");
        }
    }

    /// Mutations of a sound file, so that parsing gets deep.
    fn mutated() -> impl Strategy<Value = Vec<u8>> {
        let edit = (any::<prop::sample::Index>(), any::<u8>());
        prop::collection::vec(edit, 0..4).prop_map(|edits| {
            let mut bytes = file(TWO, 28);
            for (at, value) in edits {
                let at = at.index(bytes.len());
                bytes[at] = value;
            }
            bytes
        })
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = parse(&bytes);
            let _ = parse(&file(&String::from_utf8_lossy(&bytes), 16));
        }

        /// The `safetensors` crate is the reference: the same files are accepted, with the same
        /// contents, except that a name given twice is refused here.
        #[test]
        fn agrees_with_the_reference(bytes in mutated()) {
            match (SafeTensors::read_metadata(&bytes), parse(&bytes)) {
                (Ok((header, metadata)), Ok(entries)) => {
                    prop_assert_eq!(metadata.tensors().len(), entries.len());
                    for entry in entries {
                        let info = metadata.info(&entry.name).unwrap();
                        let (begin, end) = info.data_offsets;
                        prop_assert_eq!(entry.range, begin + 8 + header..end + 8 + header);
                        prop_assert_eq!(&*entry.shape, &info.shape[..]);
                        prop_assert_eq!(entry.dtype, info.dtype);
                    }
                }
                (Ok(_), Err(error)) => {
                    let duplicate = matches!(error, HeaderError::DuplicateTensor { .. });
                    prop_assert!(duplicate, "{}", error);
                }
                (Err(reference), Ok(_)) => prop_assert!(false, "the reference says: {reference}"),
                (Err(_), Err(_)) => {}
            }
        }
    }
}
