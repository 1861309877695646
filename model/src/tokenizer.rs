//! Text to token ids and back, from the checkpoint's own tokenizer files.
//!
//! DeepSeek-V3 uses byte-level BPE (`tokenizer.json`, run by the `tokenizers` crate). Three things
//! are not in that file and are done here:
//!
//! * **BOS.** The post-processor does not add it; `add_bos_token` in `tokenizer_config.json` says
//!   whether raw prompts get one, and the answer differs between releases. A chat template prints
//!   its own, so rendered chat text is encoded with [`AddBos::Never`]: a doubled BOS degrades the
//!   answers without any error.
//! * **Holes and padding.** The model's vocabulary (129,280) is larger than the tokenizer's. Ids
//!   without a token must never be sampled: see [`Tokenizer::real_ids`].
//! * **Streaming.** One character may be spread over several tokens: see [`StreamDecoder`].
//!
//! Post-processor, truncation and padding sections of `tokenizer.json` are ignored: the first would
//! add a second BOS, the others would silently cut or extend prompts.

use std::collections::BTreeSet;
use std::sync::Arc;

use serde::Deserialize;
use tokenizers::DecoderWrapper;

/// Ids at or above this are taken for a damaged file rather than for a vocabulary.
const MAX_VOCAB: u32 = 1 << 24;

/// Why tokenizer files were refused or a text could not be encoded.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TokenizerError {
    /// `tokenizer.json` is not a tokenizer that the `tokenizers` crate can read.
    #[error("tokenizer.json cannot be read; is it the file of the released checkpoint?")]
    Tokenizer(#[source] tokenizers::Error),
    /// A JSON side file is malformed or a field has an unexpected type.
    #[error("{file} cannot be read")]
    Config {
        /// `tokenizer_config.json`, `generation_config.json` or `tokenizer.json`.
        file: &'static str,
        /// The position and the kind of the mistake.
        source: serde_json::Error,
    },
    /// The tokenizer does not decode bytes, so it is not of DeepSeek-V3's kind.
    #[error(
        "tokenizer.json has the decoder {found}, but DeepSeek-V3 tokenizers are byte-level BPE \
         (decoder ByteLevel); the file belongs to another model"
    )]
    NotByteLevel {
        /// The decoder found, or "none".
        found: String,
    },
    /// A configured token has no id.
    #[error("{file} names {field} {token:?}, but tokenizer.json has no such token")]
    UnknownToken {
        /// The file that names the token.
        file: &'static str,
        /// The field in it.
        field: &'static str,
        /// The token's text or id.
        token: String,
    },
    /// `add_bos_token` without a BOS token.
    #[error(
        "tokenizer_config.json sets add_bos_token, but neither it nor generation_config.json names \
         a BOS token; add \"bos_token\" or set add_bos_token to false"
    )]
    NoBos,
    /// An added token would get another id than the file states.
    #[error(
        "tokenizer.json gives the added token {token:?} the id {stated}, but ids of added tokens \
         must follow the base vocabulary without gaps and it would become {actual:?}"
    )]
    AddedTokenMoved {
        /// The token's text.
        token: String,
        /// Its id in the file.
        stated: u32,
        /// The id the tokenizer assigns.
        actual: Option<u32>,
    },
    /// A token id that no vocabulary of this kind reaches.
    #[error("tokenizer.json has the token id {0}, which is beyond any vocabulary of this kind")]
    IdTooLarge(u32),
    /// The tokenizer failed on a text.
    #[error("the text could not be encoded")]
    Encode(#[source] tokenizers::Error),
}

/// Whether [`Tokenizer::encode`] puts a BOS token in front.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AddBos {
    /// One BOS if `add_bos_token` is set and the text does not begin with it already: the rule for
    /// raw prompts.
    IfConfigured,
    /// None beyond what the text itself contains: for rendered chat templates.
    Never,
}

/// What decoding does with special tokens (BOS, EOS, padding).
///
/// Only tokens marked `special` in `tokenizer.json` are concerned; the tool markers of DeepSeek-V3
/// are ordinary added tokens and stay in the text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SpecialTokens {
    /// Leave them out.
    Skip,
    /// Print their text.
    Keep,
}

/// A checkpoint's tokenizer. Clones share the vocabulary.
#[derive(Clone, Debug)]
pub struct Tokenizer {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    bpe: tokenizers::Tokenizer,
    /// `real[id]`: the id has a token. Ends at the last one that has.
    real: Arc<[bool]>,
    special: BTreeSet<u32>,
    bos: Option<u32>,
    eos: Vec<u32>,
    bos_token: Option<String>,
    eos_token: Option<String>,
    add_bos: bool,
}

impl Tokenizer {
    /// Reads the contents of `tokenizer.json`, `tokenizer_config.json` and
    /// `generation_config.json`; the last two may be missing.
    ///
    /// BOS is `bos_token` of `tokenizer_config.json`, else `bos_token_id` of
    /// `generation_config.json`. End-of-sequence ids are the union of `eos_token` and
    /// `eos_token_id`, as in vLLM. A missing `add_bos_token` means true for `LlamaTokenizer*`
    /// classes and false otherwise, as in transformers.
    ///
    /// # Errors
    /// If a file is malformed, is of another kind of model, or names tokens that do not exist.
    pub fn from_bytes(
        tokenizer_json: &[u8],
        tokenizer_config_json: Option<&[u8]>,
        generation_config_json: Option<&[u8]>,
    ) -> Result<Self, TokenizerError> {
        let mut bpe =
            tokenizers::Tokenizer::from_bytes(tokenizer_json).map_err(TokenizerError::Tokenizer)?;
        bpe.with_padding(None);
        bpe.with_truncation(None).map_err(TokenizerError::Tokenizer)?;
        match bpe.get_decoder() {
            Some(DecoderWrapper::ByteLevel(_)) => {}
            other => {
                let found = other.map_or("none".into(), |decoder| {
                    let debug = format!("{decoder:?}");
                    debug.split(['(', ' ', '{']).next().unwrap_or_default().to_owned()
                });
                return Err(TokenizerError::NotByteLevel { found });
            }
        }
        check_added_tokens(&bpe, tokenizer_json)?;

        let vocab = bpe.get_vocab(true);
        let last = vocab.values().copied().max().unwrap_or(0);
        if last >= MAX_VOCAB {
            return Err(TokenizerError::IdTooLarge(last));
        }
        let mut real = vec![false; if vocab.is_empty() { 0 } else { last as usize + 1 }];
        for id in vocab.into_values() {
            real[id as usize] = true;
        }
        let special = bpe
            .get_added_tokens_decoder()
            .into_iter()
            .filter_map(|(id, token)| token.special.then_some(id))
            .collect();

        let config = TokenizerConfig::parse(tokenizer_config_json)?;
        let generation: GenerationConfig =
            parse("generation_config.json", generation_config_json)?.unwrap_or_default();
        let named = |field, token: Option<&NamedToken>| {
            let Some(token) = token.map(NamedToken::text) else { return Ok(None) };
            let id = bpe.token_to_id(token).ok_or_else(|| TokenizerError::UnknownToken {
                file: TokenizerConfig::FILE,
                field,
                token: token.to_owned(),
            })?;
            Ok(Some((id, token.to_owned())))
        };
        let numbered = |field, id: u32| {
            let token = bpe.id_to_token(id).ok_or_else(|| TokenizerError::UnknownToken {
                file: "generation_config.json",
                field,
                token: id.to_string(),
            })?;
            Ok((id, token))
        };
        let bos = match named("bos_token", config.bos_token.as_ref())? {
            None => generation.bos_token_id.map(|id| numbered("bos_token_id", id)).transpose()?,
            some => some,
        };
        let mut eos: Vec<_> = named("eos_token", config.eos_token.as_ref())?.into_iter().collect();
        for id in generation.eos_token_id.map(OneOrMany::into_vec).unwrap_or_default() {
            eos.push(numbered("eos_token_id", id)?);
        }
        let add_bos = config.adds_bos();
        if add_bos && bos.is_none() {
            return Err(TokenizerError::NoBos);
        }
        let eos_token = eos.first().map(|(_, token)| token.clone());
        let mut eos: Vec<u32> = eos.into_iter().map(|(id, _)| id).collect();
        eos.sort_unstable();
        eos.dedup();
        let (bos, bos_token) = bos.unzip();
        let real = real.into();
        let inner = Inner { bpe, real, special, bos, eos, bos_token, eos_token, add_bos };
        Ok(Self { inner: Arc::new(inner) })
    }

    /// Token ids of `text`. Added tokens written in the text (`<｜User｜>`) become their ids.
    ///
    /// # Errors
    /// If the tokenizer refuses the text, which byte-level BPE does not do for valid UTF-8.
    pub fn encode(&self, text: &str, add_bos: AddBos) -> Result<Vec<u32>, TokenizerError> {
        let encoding = self.inner.bpe.encode_fast(text, false).map_err(TokenizerError::Encode)?;
        let ids = encoding.get_ids();
        let mut out = Vec::with_capacity(ids.len() + 1);
        if let (AddBos::IfConfigured, true, Some(bos)) = (add_bos, self.inner.add_bos, self.bos())
            && ids.first() != Some(&bos)
        {
            out.push(bos);
        }
        out.extend_from_slice(ids);
        Ok(out)
    }

    /// Text of `ids`. Bytes that are not UTF-8 become U+FFFD; ids without a token become nothing.
    pub fn decode(&self, ids: &[u32], special_tokens: SpecialTokens) -> String {
        let mut bytes = Vec::with_capacity(ids.len() * 4);
        for &id in ids {
            self.append_bytes(id, special_tokens, &mut bytes);
        }
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// An incremental decoder for one generated sequence.
    pub fn stream(&self, special_tokens: SpecialTokens) -> StreamDecoder {
        StreamDecoder { tokenizer: self.clone(), special_tokens, pending: Vec::new() }
    }

    /// One more than the last id that has a token. The model's vocabulary may be padded above it.
    pub fn vocab_size(&self) -> usize {
        self.inner.real.len()
    }

    /// Whether `id` has a token. Ids without one must never be sampled.
    pub fn is_real(&self, id: u32) -> bool {
        self.inner.real.get(id as usize).copied().unwrap_or(false)
    }

    /// `is_real` of every id below [`vocab_size`](Self::vocab_size), as the sampler takes it.
    pub fn real_ids(&self) -> Arc<[bool]> {
        Arc::clone(&self.inner.real)
    }

    /// The ids that [`SpecialTokens::Skip`] leaves out, ascending.
    pub fn special_ids(&self) -> impl Iterator<Item = u32> + '_ {
        self.inner.special.iter().copied()
    }

    /// The id of a token, given its text: in the byte-level alphabet (`Ġthe`) for base tokens, as
    /// written for added ones.
    pub fn id_of(&self, token: &str) -> Option<u32> {
        self.inner.bpe.token_to_id(token)
    }

    /// The token of an id, as [`id_of`](Self::id_of) takes it.
    pub fn token_of(&self, id: u32) -> Option<String> {
        self.inner.bpe.id_to_token(id)
    }

    /// The beginning-of-sequence id.
    pub fn bos(&self) -> Option<u32> {
        self.inner.bos
    }

    /// The beginning-of-sequence token's text, as chat templates print it.
    pub fn bos_token(&self) -> Option<&str> {
        self.inner.bos_token.as_deref()
    }

    /// The ids that end a sequence, ascending; empty if no file names one.
    pub fn eos_ids(&self) -> &[u32] {
        &self.inner.eos
    }

    /// The end-of-sequence token's text, as chat templates print it.
    pub fn eos_token(&self) -> Option<&str> {
        self.inner.eos_token.as_deref()
    }

    /// Whether raw prompts get a BOS (`add_bos_token`).
    pub fn adds_bos(&self) -> bool {
        self.inner.add_bos
    }

    /// Appends the bytes that `id` stands for, by the rule of the `ByteLevel` decoder: a token
    /// wholly in the byte alphabet is mapped back, any other is taken as it is written.
    fn append_bytes(&self, id: u32, special_tokens: SpecialTokens, out: &mut Vec<u8>) {
        if special_tokens == SpecialTokens::Skip && self.inner.special.contains(&id) {
            return;
        }
        let Some(token) = self.token_of(id) else { return };
        let start = out.len();
        for c in token.chars() {
            match byte_of(c) {
                Some(byte) => out.push(byte),
                None => {
                    out.truncate(start);
                    out.extend_from_slice(token.as_bytes());
                    return;
                }
            }
        }
    }
}

/// Turns generated ids into text, one at a time.
///
/// The pieces, with that of [`finish`](Self::finish), make up exactly what [`Tokenizer::decode`]
/// gives for all ids at once. At most three bytes are ever held back: the beginning of a character
/// whose other bytes are still to come.
///
/// Rejected: decoding a window of the last tokens and comparing (as vLLM and transformers do). It
/// holds back a genuine U+FFFD, and everything after bytes that can never become valid, until the
/// window ends in something else; byte-level tokens allow the exact answer at constant cost.
#[derive(Clone, Debug)]
pub struct StreamDecoder {
    tokenizer: Tokenizer,
    special_tokens: SpecialTokens,
    pending: Vec<u8>,
}

impl StreamDecoder {
    /// The text that `id` completes; empty while a character is incomplete.
    pub fn push(&mut self, id: u32) -> String {
        self.tokenizer.append_bytes(id, self.special_tokens, &mut self.pending);
        let mut text = String::new();
        let mut rest = self.pending.as_slice();
        let incomplete = loop {
            match std::str::from_utf8(rest) {
                Ok(valid) => {
                    text.push_str(valid);
                    break 0;
                }
                Err(error) => {
                    let (valid, after) = rest.split_at(error.valid_up_to());
                    text.push_str(&String::from_utf8_lossy(valid));
                    let Some(invalid) = error.error_len() else { break after.len() };
                    text.push(char::REPLACEMENT_CHARACTER);
                    rest = &after[invalid..];
                }
            }
        };
        self.pending.drain(..self.pending.len() - incomplete);
        text
    }

    /// Ends the sequence: U+FFFD if a character remained incomplete, else nothing. The decoder is
    /// then ready for another sequence.
    pub fn finish(&mut self) -> String {
        String::from_utf8_lossy(&std::mem::take(&mut self.pending)).into_owned()
    }
}

/// The byte that a character of GPT-2's byte-level alphabet stands for: printable Latin-1 stands
/// for itself, the other 68 bytes are U+0100 and up in ascending order.
fn byte_of(c: char) -> Option<u8> {
    match c {
        '!'..='~' | '¡'..='¬' | '®'..='ÿ' => u8::try_from(c).ok(),
        // 0x00..=0x20, then 0x7F..=0xA0, then 0xAD.
        '\u{100}'..='\u{120}' => Some((c as u32 - 0x100) as u8),
        '\u{121}'..='\u{142}' => Some((c as u32 - 0x121 + 0x7F) as u8),
        '\u{143}' => Some(0xAD),
        _ => None,
    }
}

/// The `tokenizers` crate numbers added tokens by itself and only logs a difference to the file;
/// every prompt would then be wrong without a word.
fn check_added_tokens(
    bpe: &tokenizers::Tokenizer,
    tokenizer_json: &[u8],
) -> Result<(), TokenizerError> {
    #[derive(Deserialize)]
    struct File {
        #[serde(default)]
        added_tokens: Vec<Added>,
    }
    #[derive(Deserialize)]
    struct Added {
        id: u32,
        content: String,
    }
    let file: File =
        parse("tokenizer.json", Some(tokenizer_json))?.unwrap_or(File { added_tokens: Vec::new() });
    for Added { id: stated, content: token } in file.added_tokens {
        let actual = bpe.token_to_id(&token);
        if actual != Some(stated) {
            return Err(TokenizerError::AddedTokenMoved { token, stated, actual });
        }
    }
    Ok(())
}

fn parse<'a, T: Deserialize<'a>>(
    file: &'static str,
    json: Option<&'a [u8]>,
) -> Result<Option<T>, TokenizerError> {
    json.map(serde_json::from_slice)
        .transpose()
        .map_err(|source| TokenizerError::Config { file, source })
}

/// The fields of `tokenizer_config.json` that are used, here and by the chat template.
#[derive(Debug, Default, Deserialize)]
pub(crate) struct TokenizerConfig {
    pub(crate) bos_token: Option<NamedToken>,
    pub(crate) eos_token: Option<NamedToken>,
    pub(crate) chat_template: Option<serde_json::Value>,
    add_bos_token: Option<bool>,
    tokenizer_class: Option<String>,
}

impl TokenizerConfig {
    pub(crate) const FILE: &'static str = "tokenizer_config.json";

    pub(crate) fn parse(json: Option<&[u8]>) -> Result<Self, TokenizerError> {
        Ok(parse(Self::FILE, json)?.unwrap_or_default())
    }

    fn adds_bos(&self) -> bool {
        self.add_bos_token.unwrap_or_else(|| {
            self.tokenizer_class.as_deref().is_some_and(|class| class.starts_with("LlamaTokenizer"))
        })
    }
}

/// A token in `tokenizer_config.json`: its text, or an `AddedToken` object.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
pub(crate) enum NamedToken {
    Text(String),
    Object { content: String },
}

impl NamedToken {
    pub(crate) fn text(&self) -> &str {
        match self {
            Self::Text(text) | Self::Object { content: text } => text,
        }
    }
}

#[derive(Debug, Default, Deserialize)]
struct GenerationConfig {
    bos_token_id: Option<u32>,
    eos_token_id: Option<OneOrMany>,
}

#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum OneOrMany {
    One(u32),
    Many(Vec<u32>),
}

impl OneOrMany {
    fn into_vec(self) -> Vec<u32> {
        match self {
            Self::One(id) => vec![id],
            Self::Many(ids) => ids,
        }
    }
}
