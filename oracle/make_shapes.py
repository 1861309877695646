"""Writes the small checkpoints of `shapes.py`, each with reference outputs by transformers in f32.

usage: make_shapes.py FOLDER [NAME ...]

A checkpoint is random, but not any random one will do: an implementation that is right up to
rounding must agree with it on every choice. So seeds are tried upwards from 0 until no routing
decision and no greedy token is near a tie (see `weakness`). Results are a function of this
file and the pinned versions.
"""

import copy
import json
import math
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

import dsv3
from shapes import BASE, SHAPES

# Together 61 tokens: positions up to 60.
PROMPT, NEW, SHORT = 37, 24, 5
MIN_ROUTING_GAP, MIN_TOP2_GAP = 1e-4, 0.01
SEEDS = 5000


def layout(c, shape):
    """Yields (name, shape) in the released layout."""
    heads, hidden = c["num_attention_heads"], c["hidden_size"]
    nope, rope, v = c["qk_nope_head_dim"], c["qk_rope_head_dim"], c["v_head_dim"]

    def ffn(prefix, width):
        yield f"{prefix}.gate_proj.weight", (width, hidden)
        yield f"{prefix}.up_proj.weight", (width, hidden)
        yield f"{prefix}.down_proj.weight", (hidden, width)

    def block(i):
        at = f"model.layers.{i}"
        yield f"{at}.input_layernorm.weight", (hidden,)
        yield f"{at}.post_attention_layernorm.weight", (hidden,)
        if c["q_lora_rank"] is None:
            yield f"{at}.self_attn.q_proj.weight", (heads * (nope + rope), hidden)
        else:
            yield f"{at}.self_attn.q_a_proj.weight", (c["q_lora_rank"], hidden)
            yield f"{at}.self_attn.q_a_layernorm.weight", (c["q_lora_rank"],)
            yield f"{at}.self_attn.q_b_proj.weight", (heads * (nope + rope), c["q_lora_rank"])
        yield f"{at}.self_attn.kv_a_proj_with_mqa.weight", (c["kv_lora_rank"] + rope, hidden)
        yield f"{at}.self_attn.kv_a_layernorm.weight", (c["kv_lora_rank"],)
        yield f"{at}.self_attn.kv_b_proj.weight", (heads * (nope + v), c["kv_lora_rank"])
        yield f"{at}.self_attn.o_proj.weight", (hidden, heads * v)
        if i < c["first_k_dense_replace"]:
            yield from ffn(f"{at}.mlp", c["intermediate_size"])
            return
        yield f"{at}.mlp.gate.weight", (c["n_routed_experts"], hidden)
        yield f"{at}.mlp.gate.e_score_correction_bias", (c["n_routed_experts"],)
        for e in range(c["n_routed_experts"]):
            yield from ffn(f"{at}.mlp.experts.{e}", c["moe_intermediate_size"])
        shared = c["n_shared_experts"] * c["moe_intermediate_size"]
        yield from ffn(f"{at}.mlp.shared_experts", shared)

    yield "model.embed_tokens.weight", (c["vocab_size"], hidden)
    for i in range(c["num_hidden_layers"]):
        yield from block(i)
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (c["vocab_size"], hidden)
    if c["num_nextn_predict_layers"] and shape.mtp_tensors:
        at = f"model.layers.{c['num_hidden_layers']}"
        yield from block(c["num_hidden_layers"])
        for norm in ("enorm", "hnorm", "shared_head.norm"):
            yield f"{at}.{norm}.weight", (hidden,)
        yield f"{at}.eh_proj.weight", (hidden, 2 * hidden)
        if shape.mtp_copies:
            yield f"{at}.embed_tokens.weight", (c["vocab_size"], hidden)
            yield f"{at}.shared_head.head.weight", (c["vocab_size"], hidden)


def draw(name, size, g):
    """A random tensor of F32 values at a scale where every part of the model matters."""
    if name.endswith("e_score_correction_bias"):
        return 0.08 * torch.randn(size, generator=g)
    if len(size) == 1:
        return torch.empty(size).uniform_(0.6, 1.4, generator=g)
    if name.endswith("embed_tokens.weight"):
        return torch.randn(size, generator=g)
    gain = 3.0 if "lm_head" in name else 2.0 if "down_proj" in name or "o_proj" in name else 1.3
    weight = gain / math.sqrt(size[1]) * torch.randn(size, generator=g)
    if is_linear(name):
        # Blocks of unlike size, so that a scale used for the wrong block shows.
        blocks = [-(-n // dsv3.BLOCK) for n in size]
        if max(blocks) > 1:
            factor = torch.exp(0.7 * torch.randn(blocks, generator=g))
            wide = factor.repeat_interleave(dsv3.BLOCK, 0).repeat_interleave(dsv3.BLOCK, 1)
            weight *= wide[: size[0], : size[1]]
    return weight


def is_linear(name):
    return "_proj" in name and "eh_proj" not in name


def make_tensors(shape, seed):
    g = torch.Generator().manual_seed(seed)
    out = {}
    copies = {"embed_tokens": "model.embed_tokens.weight", "shared_head.head": "lm_head.weight"}
    # The base fills in the fields that the file leaves out.
    for name, size in layout(BASE | shape.change, shape):
        original = next((o for part, o in copies.items() if part in name and o != name), None)
        value = out[original].clone() if original else draw(name, size, g)
        if "quantization_config" not in shape.drop and is_linear(name):
            out[name], out[name + dsv3.SCALE] = dsv3.quantise(value)
        elif name.endswith("e_score_correction_bias"):
            out[name] = value
        else:
            out[name] = value.bfloat16()
    return out


def config_of(shape):
    c = copy.deepcopy(BASE | shape.change)
    for name in shape.drop:
        del c[name]
    if not shape.transformers_config:
        return c
    quantization = c.pop("quantization_config")
    c = json.loads(DeepseekV3Config(**c).to_json_string())
    return c | {"quantization_config": quantization}


def write(folder, c, tensors, shards):
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(c, indent=2) + "\n")
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return
    # Consecutive tensors share a shard, but every third scale is in another than its weight.
    names, parts, where = list(tensors), [{} for _ in range(shards)], {}
    for k, name in enumerate(names):
        part = k * shards // len(names) + (name.endswith(dsv3.SCALE) and k % 3 == 0)
        parts[part % shards][name] = tensors[name]
    for k, part in enumerate(parts):
        file = f"model-{k + 1:05d}-of-{shards:06d}.safetensors"
        save_file(part, folder / file, metadata={"format": "pt"})
        where |= dict.fromkeys(part, file)
    total = sum(t.numel() * t.element_size() for t in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": {n: where[n] for n in names}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=0) + "\n")


class Routing:
    """Watches routers: how near to a tie their choices come, and which experts they use."""

    def __init__(self, *modules):
        self.gap, self.used = math.inf, []
        for module in filter(None, modules):
            for router in module.modules():
                if isinstance(router, DeepseekV3TopkRouter):
                    self.used.append(torch.zeros(router.num_experts, dtype=torch.bool))
                    router.register_forward_hook(self.hook(self.used[-1]))

    def hook(self, used):
        def watch(router, _, output):
            logits, _, chosen = output
            used[chosen.flatten()] = True
            biased = logits.sigmoid() + router.e_score_correction_bias
            groups = biased.view(len(biased), router.num_group, -1)
            score = groups.topk(2, -1).values.sum(-1)
            self.note(score, router.topk_group)
            allowed = score.topk(router.topk_group).indices
            kept = groups.gather(1, allowed[..., None].expand(-1, -1, groups.shape[2]))
            self.note(kept.flatten(1), router.top_k)

        return watch

    def note(self, scores, k):
        if k < scores.shape[1]:
            ranked = scores.sort(descending=True).values
            self.gap = min(self.gap, (ranked[:, k - 1] - ranked[:, k]).min().item())


def weakness(routing, completion, gap, logits, eos):
    """Why these outputs make a poor reference, or None."""
    if routing.gap < MIN_ROUTING_GAP:
        return f"routing gap {routing.gap:.1e}"
    if gap < MIN_TOP2_GAP:
        return f"greedy gap {gap:.4f}"
    if len(completion) < NEW or set(completion) & set(eos):
        return "end of sequence in the completion"
    if len(set(completion)) < NEW // 3:
        return "a completion that repeats itself"
    if not 1.5 < logits.std().item() < 8:
        return f"logits of standard deviation {logits.std().item():.2f}"
    if not all(used.all() for used in routing.used):
        return "an expert without tokens"
    return None


def contrast(folder, c, shape, ids):
    """Largest difference of the logits when the feature under test is misread."""
    if not shape.contrast:
        return None
    wrong = folder / "wrong"
    wrong.mkdir()
    for file in folder.iterdir():
        if file.is_file():
            shutil.copy(file, wrong)
    (wrong / "config.json").write_text(json.dumps(c | shape.contrast))
    right, _ = dsv3.forward(*dsv3.load(folder), ids)
    other, _ = dsv3.forward(*dsv3.load(wrong), ids)
    shutil.rmtree(wrong)
    return (right - other).abs().max().item()


def make(shape, folder):
    c = config_of(shape)
    eos = c["eos_token_id"] if isinstance(c["eos_token_id"], list) else [c["eos_token_id"]]
    for seed in range(SEEDS):
        write(folder, c, make_tensors(shape, seed), shape.shards)
        model, mtp = dsv3.load(folder)
        g = torch.Generator().manual_seed(10_000 + seed)
        vocab = c["vocab_size"]
        prompt = [0] + torch.randint(3, vocab, (PROMPT - 1,), generator=g).tolist()
        short = [0] + torch.randint(3, vocab, (SHORT - 1,), generator=g).tolist()
        completion = dsv3.greedy(model, prompt, NEW, eos)
        routing = Routing(model, mtp)
        tensors = {}
        for i, ids in enumerate((prompt + completion, short)):
            logits, draft = dsv3.forward(model, mtp, ids)
            tensors[f"token_ids.{i}"] = torch.tensor(ids, dtype=torch.int32)
            tensors[f"logits.{i}"] = logits.contiguous()
            if draft is not None:
                tensors[f"mtp_logits.{i}"] = draft.contiguous()
        first = tensors["logits.0"]
        gap = dsv3.top2_gap(first[PROMPT - 1 : -1])
        if weakness(routing, completion, gap, first, eos) is None:
            break
    else:
        raise SystemExit(f"{shape.name}: no seed below {SEEDS} will do")
    difference = contrast(folder, c, shape, prompt + completion)
    if difference is not None and difference < 0.1:
        raise SystemExit(f"{shape.name}: a misread config moves logits by {difference:.3f} only")
    save_file(tensors, folder / "reference.safetensors", metadata={"policy": "f32"})
    report = {
        "policy": "f32",
        "covers": shape.covers,
        "seed": seed,
        "completions": [
            {
                "prompt_token_ids": prompt,
                "completion_token_ids": completion,
                "min_top2_gap": round(gap, 4),
            }
        ],
        "min_routing_gap": None if math.isinf(routing.gap) else float(f"{routing.gap:.2e}"),
        "logits_std": round(first.std().item(), 2),
        "max_logit_change_if_misread": difference and round(difference, 2),
        "versions": dsv3.versions(),
    }
    text = json.dumps(report, indent=1)
    (folder / "reference.json").write_text(text + "\n")
    size = sum(file.stat().st_size for file in folder.iterdir())
    print(f"| `{shape.name}` | {shape.covers} | {size:,} | {seed} |", flush=True)
    return size


def main():
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    target, names = Path(sys.argv[1]), sys.argv[2:]
    unknown = set(names) - {shape.name for shape in SHAPES}
    if unknown:
        raise SystemExit(f"no shape {sorted(unknown)}")
    sizes = [make(s, target / s.name) for s in SHAPES if not names or s.name in names]
    print(f"total {sum(sizes):,} bytes")


if __name__ == "__main__":
    main()
