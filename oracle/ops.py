"""Writes golden values of single operations: casts, activation quantisation, RoPE, routing, GEMM.

usage: ops.py FILE.safetensors

Casts are torch's, checked here against a search for the nearest value; RoPE and routing are
transformers' own functions and classes.
"""

import sys

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import (
    DeepseekV3RotaryEmbedding,
    DeepseekV3TopkRouter,
    apply_rotary_pos_emb_interleave,
)

import dsv3
from shapes import YARN

E4M3 = torch.float8_e4m3fn


def neighbours(values):
    """The values, and the next F32 below and above each."""
    values = values.astype(np.float32)
    low, high = np.float32(-np.inf), np.float32(np.inf)
    return np.concatenate([values, np.nextafter(values, low), np.nextafter(values, high)])


def e4m3(out, g):
    """Every value, every tie and its neighbours, saturation, random values, NaN."""
    codes = torch.arange(127, dtype=torch.uint8)
    grid = codes.view(E4M3).double().numpy()
    ties = (grid[1:] + grid[:-1]) / 2
    special = np.array([448.0, 464.0, 480.0, 1e9, np.inf, 2.0**-10, 2.0**-11, 1e-30, 1e-45])
    positive = np.concatenate([neighbours(grid[1:]), neighbours(ties), neighbours(special[:-3])])
    wide = np.exp2(torch.empty(600, dtype=torch.float64).uniform_(-12, 10, generator=g).numpy())
    positive = np.concatenate([positive, special, wide]).astype(np.float32)
    x = torch.from_numpy(np.concatenate([[np.float32(0)], positive]))
    x = torch.cat([x, -x])
    code = x.clamp(-448, 448).to(E4M3).view(torch.uint8)
    # The nearest value, the even code in a tie.
    distance = np.abs(np.minimum(x.abs().double().numpy(), 448)[:, None] - grid)
    nearest = distance.min(1, keepdims=True) == distance
    even = nearest & (np.arange(127) % 2 == 0)
    best = np.where(even.any(1), even.argmax(1), nearest.argmax(1))
    assert (best == (code.numpy() & 0x7F)).all()
    assert ((code.numpy() >> 7 == 1) == np.signbit(x.numpy())).all()
    nan = torch.tensor([torch.nan, -torch.nan])
    x = torch.cat([x, nan])
    out["e4m3.input"] = x
    out["e4m3.output"] = torch.cat([code, nan.to(E4M3).view(torch.uint8)])


def bf16(out, g):
    """Ties to even and their neighbours, subnormals, overflow, random bit patterns."""
    bits = torch.randint(-(2**31), 2**31, (1500,), generator=g)
    tie = (bits[:500] & ~0xFFFF) | 0x8000
    edges = torch.tensor([0, 1, 0x8000, 0x8001, 0x18000, 0x7F7FFFFF, 0x7F7F7FFF, 0x7F7F8000])
    edges = torch.cat([edges, edges | -(2**31), torch.tensor([0x7F800000, -0x800000])])
    x = torch.cat([bits, tie, tie - 1, tie + 1, edges]).to(torch.int32).view(torch.float32)
    x = x[~x.isnan()]
    code = x.bfloat16().view(torch.int16).int() & 0xFFFF
    b = x.view(torch.int32).long() & 0xFFFFFFFF
    assert (((b + 0x7FFF + (b >> 16 & 1)) >> 16) == code).all()
    out["bf16.input"], out["bf16.output"] = x, x.bfloat16()


def quantise_activations(x):
    """DeepSeek's rule, per row and 128 columns: s = max(amax, 1e-4) / 448, q = e4m3(x / s)."""
    codes, scales = [], []
    for block in x.split(dsv3.BLOCK, 1):
        s = block.abs().amax(1, keepdim=True).clamp(min=1e-4) / 448
        codes.append((block / s).clamp(-448, 448).to(E4M3))
        scales.append(s)
    return torch.cat([c.view(torch.uint8) for c in codes], 1), torch.cat(scales, 1)


def activations(out, g):
    x = torch.randn(8, 400, generator=g)
    x[1] = 0
    x[2] *= 1e-6
    x[3] *= 1e4
    x[4, ::37] *= 300
    x[5, :128] = 0
    x[6] = x[6].exp() * 1e-3
    x[7] = x[7].bfloat16().float()
    out["act.input"] = x
    out["act.output"], out["act.scale"] = quantise_activations(x)


def gemm(out, g):
    """y = x W^T with both sides quantised; the sum in F64, to be approached, not matched."""
    x = torch.randn(3, 272, generator=g)
    weight = torch.randn(144, 272, generator=g) * torch.linspace(0.1, 2, 272)
    a, a_scale = quantise_activations(x)
    w, w_scale = dsv3.quantise(weight)
    left = a.view(E4M3).double() * a_scale.double().repeat_interleave(128, 1)[:, :272]
    right = w.double()
    wide = w_scale.double().repeat_interleave(128, 0).repeat_interleave(128, 1)
    right *= wide[:144, :272]
    out |= {"gemm.a": a, "gemm.a_scale": a_scale, "gemm.w": w.view(torch.uint8)}
    out |= {"gemm.w_scale": w_scale, "gemm.output": left @ right.T}
    out["gemm.magnitude"] = left.abs() @ right.abs().T


def rope(out, g):
    cases = {
        "v3": dict(qk_rope_head_dim=64, rope_scaling=YARN),
        "plain": dict(qk_rope_head_dim=16, rope_scaling=None, rope_theta=500.0),
        "short": dict(
            qk_rope_head_dim=16,
            rope_scaling=YARN
            | {"factor": 4, "original_max_position_embeddings": 32, "mscale_all_dim": 0.707},
        ),
    }
    positions = torch.tensor([0, 1, 2, 31, 32, 63, 4095, 4096, 100_000, 163_839])
    out["rope.positions"] = positions.int()
    for name, change in cases.items():
        config = DeepseekV3Config(**({"rope_theta": 10000.0} | change))
        module = DeepseekV3RotaryEmbedding(config)
        dim = config.qk_rope_head_dim
        x = torch.randn(1, 1, len(positions), dim, generator=g)
        cos, sin = module(x, positions[None])
        turned, _ = apply_rotary_pos_emb_interleave(x, x, cos, sin)
        # transformers leaves the even members of the pairs in front of the odd ones.
        pairs = turned[0, 0].view(-1, 2, dim // 2).transpose(1, 2).reshape(-1, dim)
        out[f"rope.{name}.inv_freq"] = module.inv_freq.clone()
        out[f"rope.{name}.factor"] = torch.tensor([module.attention_scaling])
        out[f"rope.{name}.cos"] = cos[0, :, : dim // 2].contiguous()
        out[f"rope.{name}.sin"] = sin[0, :, : dim // 2].contiguous()
        out[f"rope.{name}.input"] = x[0, 0].contiguous()
        out[f"rope.{name}.output"] = pairs.contiguous()


def gate(out, g):
    # experts, groups, kept groups, experts per token, normalise, scale, rows, bias size, shift
    cases = {
        "v3": (256, 8, 4, 8, True, 2.5, 24, 0.05, 0.0),
        "negative": (32, 4, 2, 6, True, 2.5, 32, 0.2, -0.7),
        "tiny": (8, 4, 2, 2, True, 2.5, 64, 0.05, 0.0),
        "one_group": (12, 1, 1, 3, True, 1.0, 64, 0.05, 0.0),
        "all_groups": (16, 4, 4, 8, True, 2.5, 64, 0.05, 0.0),
        "no_norm": (16, 4, 2, 4, False, 1.7, 64, 0.05, 0.0),
        "all_kept": (6, 3, 2, 4, True, 2.5, 64, 0.05, 0.0),
    }
    for name, (experts, groups, kept, k, norm, scale, rows, size, shift) in cases.items():
        config = DeepseekV3Config(
            hidden_size=experts,
            n_routed_experts=experts,
            n_group=groups,
            topk_group=kept,
            num_experts_per_tok=k,
            norm_topk_prob=norm,
            routed_scaling_factor=scale,
        )
        router = DeepseekV3TopkRouter(config)
        # With the identity as weight the hidden states are the logits.
        router.weight.data = torch.eye(experts)
        router.e_score_correction_bias = size * torch.randn(experts, generator=g) + shift
        logits = torch.randn(8 * rows, experts, generator=g)
        logits = logits[clear(logits, router)][:rows].contiguous()
        assert len(logits) == rows
        with torch.no_grad():
            same, weights, ids = router(logits)
        assert torch.equal(same, logits)
        order = ids.argsort(1)
        at = f"gate.{name}"
        out[f"{at}.params"] = torch.tensor([groups, kept, k, int(norm)], dtype=torch.int32)
        out[f"{at}.scale"] = torch.tensor([scale])
        out[f"{at}.logits"] = logits
        out[f"{at}.bias"] = router.e_score_correction_bias
        out[f"{at}.ids"] = ids.gather(1, order).int()
        out[f"{at}.weights"] = weights.gather(1, order)


def clear(logits, router):
    """The rows in which no choice is closer to a tie than 1e-5."""
    biased = logits.sigmoid() + router.e_score_correction_bias
    groups = biased.view(len(biased), router.num_group, -1)
    score = groups.topk(2, -1).values.sum(-1)
    best = score.topk(router.topk_group).indices[..., None].expand(-1, -1, groups.shape[2])
    good = torch.ones(len(logits), dtype=torch.bool)
    for values, k in (
        (score, router.topk_group),
        (groups.gather(1, best).flatten(1), router.top_k),
    ):
        if k < values.shape[1]:
            ranked = values.sort(descending=True).values
            good &= ranked[:, k - 1] - ranked[:, k] > 1e-5
    return good


def main():
    torch.set_num_threads(1)
    g, out = torch.Generator().manual_seed(2026), {}
    for part in (e4m3, bf16, activations, gemm, rope, gate):
        part(out, g)
    made_with = ", ".join(f"{name} {version}" for name, version in dsv3.versions().items())
    save_file(dict(sorted(out.items())), sys.argv[1], metadata={"made_with": made_with})
    for name, tensor in sorted(out.items()):
        print(f"| `{name}` | {str(tensor.dtype)[6:]} | {list(tensor.shape)} |")


if __name__ == "__main__":
    main()
