"""DeepSeek-V3 checkpoints in the released layout, and transformers models made from them.

The only arithmetic of our own is the block dequantisation; everything behind it is transformers:
its loader stacks the experts, its classes compute, its `MtpModel` runs the MTP layer.
"""

import json
import tempfile
from pathlib import Path

import torch
import transformers
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM
from transformers.modeling_layers import MtpModel

transformers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()

BLOCK = 128
SCALE = "_scale_inv"


def versions():
    return {"torch": torch.__version__, "transformers": transformers.__version__}


def quantise(weight):
    """FP8 bytes and F32 scales, one scale per 128 x 128 block, edge blocks included."""
    rows, cols = weight.shape
    scale = torch.empty(-(-rows // BLOCK), -(-cols // BLOCK))
    out = torch.empty(rows, cols, dtype=torch.float8_e4m3fn)
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            at = (slice(i * BLOCK, (i + 1) * BLOCK), slice(j * BLOCK, (j + 1) * BLOCK))
            block = weight[at].float()
            scale[i, j] = block.abs().max().clamp(min=1e-12) / 448
            out[at] = (block / scale[i, j]).clamp(-448, 448).to(torch.float8_e4m3fn)
    return out, scale


def dequantise(weight, scale):
    """The weight in F32: FP8 value times the scale of its block."""
    rows, cols = weight.shape
    out = weight.float()
    for i in range(scale.shape[0]):
        wide = scale[i].repeat_interleave(BLOCK)[:cols]
        out[i * BLOCK : min((i + 1) * BLOCK, rows)] *= wide
    return out


def read_config(folder):
    return json.loads((Path(folder) / "config.json").read_text())


def read_tensors(folder, dtype=torch.float32):
    """Yields (name, tensor) in `dtype`, FP8 weights dequantised, scales left out."""
    folder = Path(folder)
    index = folder / "model.safetensors.index.json"
    if index.exists():
        where = json.loads(index.read_text())["weight_map"]
        files = {name: safe_open(folder / name, "pt") for name in sorted(set(where.values()))}
    else:
        files = {"model.safetensors": safe_open(folder / "model.safetensors", "pt")}
        where = dict.fromkeys(files["model.safetensors"].keys(), "model.safetensors")
    for name, file in where.items():
        if name.endswith(SCALE):
            continue
        tensor = files[file].get_tensor(name)
        if name + SCALE in where:
            # A weight and its scales may lie in different shards.
            scale = files[where[name + SCALE]].get_tensor(name + SCALE)
            tensor = dequantise(tensor, scale)
        # The routing bias is F32 in every numerics.
        keep = name.endswith("e_score_correction_bias")
        yield name, tensor.float() if keep else tensor.to(dtype)


def load(folder, dtype=torch.float32, with_mtp=True, experts="eager", attention="eager"):
    """(model, mtp): transformers' model and MTP module, the latter None if there is no such layer.

    `experts` and `attention` choose among transformers' implementations; "eager" is the plain one.
    """
    raw = read_config(folder)
    raw.pop("quantization_config", None)
    config = DeepseekV3Config.from_dict(raw)
    layers = config.num_hidden_layers
    prefix = f"model.layers.{layers}."
    main, extra = {}, {}
    for name, tensor in read_tensors(folder, dtype):
        if not name.startswith(prefix):
            main[name] = tensor
        elif with_mtp:
            extra[name] = tensor
    model, report = DeepseekV3ForCausalLM.from_pretrained(
        None,
        config=config,
        state_dict=main,
        dtype=dtype,
        attn_implementation=attention,
        experts_implementation=experts,
        output_loading_info=True,
    )
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report[kind]:
            raise ValueError(f"{folder}: {kind}: {sorted(report[kind])[:5]}")
    model.eval()
    if not extra:
        return model, None
    # transformers looks for layer 61 only, and reads MTP weights from files only.
    model._keys_to_ignore_on_load_unexpected = [rf"model\.layers\.{layers}\..*"]
    with tempfile.TemporaryDirectory() as scratch:
        save_file(extra, f"{scratch}/model.safetensors", metadata={"format": "pt"})
        model.config._name_or_path = scratch
        mtp = MtpModel.from_pretrained(model).eval()
    return model, mtp


@torch.no_grad()
def forward(model, mtp, ids):
    """Logits [T, vocab], and [T - 1, vocab] of the MTP layer or None.

    MTP row i comes from the hidden state i after the final norm and token i + 1, at RoPE
    position i, and predicts token i + 2.
    """
    tokens = torch.tensor([ids])
    hidden = model.model(tokens, use_cache=False).last_hidden_state
    logits = model.lm_head(hidden)[0]
    if mtp is None:
        return logits, None
    positions = torch.arange(len(ids) - 1)[None]
    out = mtp.forward_layer(0, hidden[:, :-1], positions, None, input_ids=tokens[:, 1:])
    return logits, model.lm_head(out)[0]


@torch.no_grad()
def greedy(model, ids, count, eos=None):
    """Up to `count` greedy tokens, with transformers' KV cache; an `eos` reached is included."""
    tokens = torch.tensor([ids])
    out = model.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        max_new_tokens=count,
        do_sample=False,
        use_cache=True,
        eos_token_id=eos,
        pad_token_id=0,
    )
    return out[0, len(ids) :].tolist()


def top2_gap(logits):
    """The smallest distance between the best and the second best logit of any row."""
    best = logits.topk(2).values
    return (best[:, 0] - best[:, 1]).min().item()
