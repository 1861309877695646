//! `config.json` text to [`ModelConfig`] and back.
//!
//! Writers differ: DeepSeek's own files, transformers 4 and transformers 5 name or nest some
//! fields differently and leave others out. All observed forms are read; one is written. Fields
//! without meaning for inference are skipped, `head_dim` among them: transformers 5 writes it and
//! means `qk_rope_head_dim`. `modules_to_not_convert` is skipped too, because a tensor of another
//! type than the layout's is reported by name when it is used.

use serde_json::{Map, Value, json};

use super::{
    ConfigError, FP8_BLOCK, ModelConfig, Quantization, RopeScaling, ScaleFormat, json_message,
};

/// Longest excerpt of a value quoted in a message, in characters.
const EXCERPT: usize = 60;

/// `value` as JSON, cut to a length that fits into a message.
fn excerpt(value: &Value) -> String {
    let text = value.to_string();
    match text.char_indices().nth(EXCERPT) {
        Some((cut, _)) => format!("{}...", &text[..cut]),
        None => text,
    }
}

/// A JSON object together with its dotted path. Null counts as absent throughout.
#[derive(Clone, Copy)]
struct Object<'a> {
    path: &'static str,
    map: &'a Map<String, Value>,
}

impl<'a> Object<'a> {
    fn get(&self, field: &str) -> Option<&'a Value> {
        self.map.get(field).filter(|value| !value.is_null())
    }

    fn path_of(&self, field: &str) -> String {
        format!("{}{field}", self.path)
    }

    fn wrong_type(&self, field: &str, value: &Value, expected: &'static str) -> ConfigError {
        ConfigError::WrongType { field: self.path_of(field), found: excerpt(value), expected }
    }

    fn missing(&self, field: &str, why: &'static str) -> ConfigError {
        ConfigError::Missing { field: self.path_of(field), why }
    }

    fn unsupported(&self, field: &str, value: &Value, accepted: &'static str) -> ConfigError {
        let (field, value) = (self.path_of(field), excerpt(value));
        ConfigError::Unsupported { field, value, accepted }
    }

    fn size(&self, field: &str) -> Result<Option<usize>, ConfigError> {
        let Some(value) = self.get(field) else { return Ok(None) };
        let number = value.as_u64().and_then(|number| usize::try_from(number).ok());
        number.map(Some).ok_or_else(|| self.wrong_type(field, value, "a whole number, 0 or more"))
    }

    fn required_size(&self, field: &str) -> Result<usize, ConfigError> {
        self.size(field)?.ok_or_else(|| self.missing(field, "in every configuration"))
    }

    /// Integers may stand where floats are meant (`"factor": 40`).
    fn number(&self, field: &str) -> Result<Option<f64>, ConfigError> {
        let Some(value) = self.get(field) else { return Ok(None) };
        value.as_f64().map(Some).ok_or_else(|| self.wrong_type(field, value, "a number"))
    }

    fn flag(&self, field: &str, default: bool) -> Result<bool, ConfigError> {
        let Some(value) = self.get(field) else { return Ok(default) };
        value.as_bool().ok_or_else(|| self.wrong_type(field, value, "true or false"))
    }

    fn object(&self, field: &str, path: &'static str) -> Result<Option<Object<'a>>, ConfigError> {
        let Some(value) = self.get(field) else { return Ok(None) };
        let map = value.as_object().ok_or_else(|| self.wrong_type(field, value, "an object"))?;
        Ok(Some(Object { path, map }))
    }

    fn token(&self, field: &str, value: &Value) -> Result<u32, ConfigError> {
        value
            .as_u64()
            .and_then(|id| u32::try_from(id).ok())
            .ok_or_else(|| self.wrong_type(field, value, "a token id (a whole number, 0 or more)"))
    }

    /// Fails unless `field` is absent or one of the values that are implemented.
    fn only(&self, field: &str, accepted: &[Value], text: &'static str) -> Result<(), ConfigError> {
        match self.get(field) {
            Some(value) if !accepted.contains(value) => Err(self.unsupported(field, value, text)),
            _ => Ok(()),
        }
    }
}

pub(super) fn parse(text: &[u8]) -> Result<ModelConfig, ConfigError> {
    let value: Value = serde_json::from_slice(text).map_err(|error| ConfigError::Json {
        line: error.line(),
        column: error.column(),
        message: json_message(&error),
    })?;
    let Value::Object(map) = &value else {
        return Err(ConfigError::NotAnObject { found: excerpt(&value) });
    };
    let root = Object { path: "", map };

    // First of all: the other fields of another family would only raise misleading complaints.
    match root.get("model_type") {
        None => return Err(root.missing("model_type", "to tell the model family")),
        Some(_) => root.only("model_type", &[json!("deepseek_v3")], "\"deepseek_v3\"")?,
    }
    refuse_other_mathematics(&root)?;

    let num_hidden_layers = root.required_size("num_hidden_layers")?;
    let first_k_dense_replace = root.required_size("first_k_dense_replace")?;
    let num_nextn_predict_layers = match root.size("num_nextn_predict_layers")? {
        Some(layers) => layers,
        // The attribute's own name in transformers 5; DeepSeek's name is an alias there.
        None => root.size("num_mtp_layers")?.unwrap_or(0),
    };
    let has_moe =
        first_k_dense_replace < num_hidden_layers.saturating_add(num_nextn_predict_layers);
    let moe_size = |field: &str| match root.size(field)? {
        None if has_moe => Err(root.missing(field, "where there are layers with experts")),
        size => Ok(size.unwrap_or(0)),
    };
    let n_routed_experts = match root.size("num_local_experts")? {
        Some(experts) if root.get("n_routed_experts").is_none() => experts,
        _ => moe_size("n_routed_experts")?,
    };
    let intermediate_size = match root.size("intermediate_size")? {
        None if first_k_dense_replace > 0 => {
            return Err(root.missing("intermediate_size", "where there are dense layers"));
        }
        size => size.unwrap_or(0),
    };

    let num_attention_heads = root.required_size("num_attention_heads")?;
    if let Some(kv_heads) = root.size("num_key_value_heads")?
        && kv_heads != num_attention_heads
    {
        return Err(ConfigError::Invalid {
            field: "num_key_value_heads".to_owned(),
            value: kv_heads.to_string(),
            reason: format!(
                "multi-head latent attention has one key-value head per query head, and \
                 num_attention_heads is {num_attention_heads}"
            ),
        });
    }

    let routed_scaling_factor = match root.number("routed_scaling_factor")? {
        // The class defaults of DeepSeek (1.0) and transformers (2.5) contradict each other.
        None if has_moe => {
            return Err(root.missing(
                "routed_scaling_factor",
                "where there are layers with experts, because writers disagree on its default",
            ));
        }
        factor => factor.unwrap_or(1.0),
    };

    let (rope_theta, rope_scaling) = parse_rope(&root)?;
    Ok(ModelConfig {
        vocab_size: root.required_size("vocab_size")?,
        hidden_size: root.required_size("hidden_size")?,
        num_hidden_layers,
        first_k_dense_replace,
        intermediate_size,
        num_attention_heads,
        // null in transformers files, 0 in DeepSeek's own.
        q_lora_rank: root.size("q_lora_rank")?.filter(|&rank| rank > 0),
        kv_lora_rank: root.required_size("kv_lora_rank")?,
        qk_nope_head_dim: root.required_size("qk_nope_head_dim")?,
        qk_rope_head_dim: root.required_size("qk_rope_head_dim")?,
        v_head_dim: root.required_size("v_head_dim")?,
        moe_intermediate_size: moe_size("moe_intermediate_size")?,
        n_routed_experts,
        n_shared_experts: moe_size("n_shared_experts")?,
        num_experts_per_tok: moe_size("num_experts_per_tok")?,
        n_group: moe_size("n_group")?,
        topk_group: moe_size("topk_group")?,
        norm_topk_prob: root.flag("norm_topk_prob", true)?,
        routed_scaling_factor,
        num_nextn_predict_layers,
        rms_norm_eps: root.number("rms_norm_eps")?.unwrap_or(1e-6),
        rope_theta,
        rope_scaling,
        max_position_embeddings: root.size("max_position_embeddings")?.unwrap_or(4096),
        bos_token_id: root
            .get("bos_token_id")
            .map(|value| root.token("bos_token_id", value))
            .transpose()?,
        eos_token_ids: parse_eos(&root)?,
        quantization: parse_quantization(&root)?,
        dtype: ["dtype", "torch_dtype"]
            .iter()
            .find_map(|field| root.get(field))
            .and_then(Value::as_str)
            .map(str::to_owned),
    })
}

/// Fields whose other values change the computation.
fn refuse_other_mathematics(root: &Object<'_>) -> Result<(), ConfigError> {
    root.only("scoring_func", &[json!("sigmoid")], "\"sigmoid\"")?;
    root.only("topk_method", &[json!("noaux_tc")], "\"noaux_tc\"")?;
    root.only("moe_layer_freq", &[json!(1)], "1 (every layer after the dense ones has experts)")?;
    root.only("hidden_act", &[json!("silu")], "\"silu\"")?;
    root.only("attention_bias", &[json!(false)], "false")?;
    root.only("rope_interleave", &[json!(true)], "true (rotated pairs are neighbours)")?;
    root.only("tie_word_embeddings", &[json!(false)], "false (no DeepSeek-V3 ties them)")
}

fn parse_eos(root: &Object<'_>) -> Result<Vec<u32>, ConfigError> {
    const FIELD: &str = "eos_token_id";
    match root.get(FIELD) {
        None => Ok(Vec::new()),
        Some(Value::Array(ids)) => ids.iter().map(|id| root.token(FIELD, id)).collect(),
        Some(id) => Ok(vec![root.token(FIELD, id)?]),
    }
}

/// `rope_theta` and the scaling, from `rope_scaling` or transformers 5's `rope_parameters`.
fn parse_rope(root: &Object<'_>) -> Result<(f64, RopeScaling), ConfigError> {
    // transformers' order of precedence: a legacy object, unless empty, replaces the new one.
    let legacy = root.object("rope_scaling", "rope_scaling.")?;
    let rope = match legacy.filter(|legacy| !legacy.map.is_empty()) {
        None => root.object("rope_parameters", "rope_parameters.")?,
        legacy => legacy,
    };
    let nested = rope.map(|rope| rope.number("rope_theta")).transpose()?.flatten();
    let theta = match nested {
        Some(theta) => theta,
        None => root.number("rope_theta")?.unwrap_or(10_000.0),
    };
    let Some(rope) = rope else { return Ok((theta, RopeScaling::None)) };

    let field = if rope.get("rope_type").is_some() { "rope_type" } else { "type" };
    match rope.get(field).map(|kind| (kind, kind.as_str())) {
        None | Some((_, Some("default"))) => return Ok((theta, RopeScaling::None)),
        Some((_, Some("yarn"))) => {}
        Some((kind, _)) => {
            return Err(rope.unsupported(field, kind, "\"yarn\", \"default\" or no scaling"));
        }
    }
    let why = "by YaRN";
    let or_default = |value: Option<f64>, default| value.filter(|&v| v != 0.0).unwrap_or(default);
    let scaling = RopeScaling::Yarn {
        factor: rope.number("factor")?.ok_or_else(|| rope.missing("factor", why))?,
        beta_fast: or_default(rope.number("beta_fast")?, 32.0),
        beta_slow: or_default(rope.number("beta_slow")?, 1.0),
        mscale: rope.number("mscale")?,
        mscale_all_dim: rope.number("mscale_all_dim")?,
        original_max_position_embeddings: rope
            .size("original_max_position_embeddings")?
            .ok_or_else(|| rope.missing("original_max_position_embeddings", why))?,
        attention_factor: rope.number("attention_factor")?,
        truncate: rope.flag("truncate", true)?,
    };
    Ok((theta, scaling))
}

fn parse_quantization(root: &Object<'_>) -> Result<Option<Quantization>, ConfigError> {
    let Some(object) = root.object("quantization_config", "quantization_config.")? else {
        return Ok(None);
    };
    match object.get("quant_method") {
        None => return Err(object.missing("quant_method", "to tell how weights are stored")),
        Some(_) => object.only("quant_method", &[json!("fp8")], "\"fp8\"")?,
    }
    object.only("fmt", &[json!("e4m3")], "\"e4m3\"")?;
    object.only("activation_scheme", &[json!("dynamic")], "\"dynamic\"")?;
    if object.get("weight_block_size").is_none() {
        return Err(object.missing("weight_block_size", "to find each weight's scale"));
    }
    object.only("weight_block_size", &[json!([FP8_BLOCK, FP8_BLOCK])], "[128, 128]")?;
    object.only("scale_fmt", &[json!("float"), json!("ue8m0")], "\"ue8m0\", or nothing")?;
    let scale_fmt = match object.get("scale_fmt").and_then(Value::as_str) {
        Some("ue8m0") => ScaleFormat::Ue8m0,
        _ => ScaleFormat::Float,
    };
    Ok(Some(Quantization { block: [FP8_BLOCK, FP8_BLOCK], scale_fmt }))
}

pub(super) fn write(config: &ModelConfig) -> String {
    let mut out = json!({
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_hidden_layers,
        "first_k_dense_replace": config.first_k_dense_replace,
        "intermediate_size": config.intermediate_size,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_attention_heads,
        "q_lora_rank": config.q_lora_rank,
        "kv_lora_rank": config.kv_lora_rank,
        "qk_nope_head_dim": config.qk_nope_head_dim,
        "qk_rope_head_dim": config.qk_rope_head_dim,
        "v_head_dim": config.v_head_dim,
        "moe_intermediate_size": config.moe_intermediate_size,
        "n_routed_experts": config.n_routed_experts,
        "n_shared_experts": config.n_shared_experts,
        "num_experts_per_tok": config.num_experts_per_tok,
        "n_group": config.n_group,
        "topk_group": config.topk_group,
        "norm_topk_prob": config.norm_topk_prob,
        "routed_scaling_factor": config.routed_scaling_factor,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "moe_layer_freq": 1,
        "num_nextn_predict_layers": config.num_nextn_predict_layers,
        "hidden_act": "silu",
        "attention_bias": false,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "max_position_embeddings": config.max_position_embeddings,
        "tie_word_embeddings": false,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": match config.eos_token_ids[..] {
            [id] => json!(id),
            _ => json!(config.eos_token_ids),
        },
    });
    if let RopeScaling::Yarn {
        factor,
        beta_fast,
        beta_slow,
        mscale,
        mscale_all_dim,
        original_max_position_embeddings,
        attention_factor,
        truncate,
    } = config.rope_scaling
    {
        let mut rope = json!({
            "type": "yarn",
            "factor": factor,
            "beta_fast": beta_fast,
            "beta_slow": beta_slow,
            "original_max_position_embeddings": original_max_position_embeddings,
        });
        for (field, value) in [
            ("mscale", mscale),
            ("mscale_all_dim", mscale_all_dim),
            ("attention_factor", attention_factor),
        ] {
            if let Some(value) = value {
                rope[field] = json!(value);
            }
        }
        if !truncate {
            rope["truncate"] = json!(false);
        }
        out["rope_scaling"] = rope;
    }
    if let Some(quantization) = config.quantization {
        let mut object = json!({
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": quantization.block,
        });
        if quantization.scale_fmt == ScaleFormat::Ue8m0 {
            object["scale_fmt"] = json!("ue8m0");
        }
        out["quantization_config"] = object;
    }
    if let Some(dtype) = &config.dtype {
        out["torch_dtype"] = json!(dtype);
    }
    // `{:#}` is serde_json's pretty form and cannot fail for a `Value`.
    format!("{out:#}\n")
}
