"""Measures greedy decoding by transformers, one sequence, with its KV cache. Prints JSON.

usage: decode_speed.py CHECKPOINT [--dtype f32|bf16] [--ids 0,5,7 | --ids FILE.json] [--new N]
                       [--threads N] [--experts NAME] [--attention NAME] [--repeat N]

The checkpoint is dequantised to the dtype first; neither that nor the prompt counts as decoding.
With no `--ids` the prompt is token 0 and 31 others. An end-of-sequence token does not stop it.
"""

import argparse
import json
import resource
import time
from pathlib import Path

import torch

import dsv3


def arguments():
    p = argparse.ArgumentParser()
    p.add_argument("checkpoint")
    p.add_argument("--dtype", choices=["f32", "bf16"], default="bf16")
    p.add_argument("--ids", help="comma-separated token ids, or a JSON file with a list of them")
    p.add_argument("--new", type=int, default=32)
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--experts", default="eager", help="eager, batched_mm or grouped_mm")
    p.add_argument("--attention", default="sdpa", help="sdpa or eager")
    p.add_argument("--repeat", type=int, default=3)
    return p.parse_args()


def prompt_ids(text, vocab):
    if text is None:
        return [0] + [(7 * i + 3) % vocab for i in range(31)]
    if text.endswith(".json"):
        return json.loads(Path(text).read_text())
    return [int(part) for part in text.split(",")]


@torch.no_grad()
def decode(model, ids, new):
    """(tokens, seconds of the prompt, seconds of each further token).

    The bare loop, without the bookkeeping of `generate`: the harder rival.
    """
    start = time.perf_counter()
    out = model(torch.tensor([ids]), use_cache=True, logits_to_keep=1)
    tokens, seconds = [out.logits[0, -1].argmax().item()], []
    prompt = time.perf_counter() - start
    for _ in range(new):
        start = time.perf_counter()
        step = torch.tensor([[tokens[-1]]])
        out = model(step, past_key_values=out.past_key_values, use_cache=True)
        tokens.append(out.logits[0, -1].argmax().item())
        seconds.append(time.perf_counter() - start)
    return tokens, prompt, seconds


@torch.no_grad()
def generate(model, ids, new):
    """Tokens per second of `generate`, as users call it, the prompt's share taken off."""
    prompt = torch.tensor([ids])

    def seconds(count):
        start = time.perf_counter()
        model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=count,
            min_new_tokens=count,
            do_sample=False,
            use_cache=True,
            pad_token_id=0,
        )
        return time.perf_counter() - start

    return new / (seconds(new + 1) - seconds(1))


def main():
    args = arguments()
    torch.set_num_threads(args.threads)
    dtype = {"f32": torch.float32, "bf16": torch.bfloat16}[args.dtype]
    start = time.perf_counter()
    model, _ = dsv3.load(
        args.checkpoint, dtype, with_mtp=False, experts=args.experts, attention=args.attention
    )
    loading = time.perf_counter() - start
    ids = prompt_ids(args.ids, model.config.vocab_size)
    decode(model, ids, 2)
    runs = [decode(model, ids, args.new) for _ in range(args.repeat)]
    # The best run is the one least disturbed by others on the machine.
    tokens, prompt, seconds = min(runs, key=lambda run: sum(run[2]))
    total = sum(seconds)
    generate(model, ids, 2)
    generated = max(generate(model, ids, args.new) for _ in range(args.repeat))
    report = {
        "checkpoint": args.checkpoint,
        "dtype": args.dtype,
        "threads": args.threads,
        "experts": args.experts,
        "attention": args.attention,
        "prompt_tokens": len(ids),
        "new_tokens": args.new,
        "tokens_per_s": round(args.new / total, 2),
        "generate_tokens_per_s": round(generated, 2),
        "ms_per_token": round(1000 * total / args.new, 3),
        "ms_per_token_median": round(1000 * sorted(seconds)[len(seconds) // 2], 3),
        "ms_per_token_of_runs": [round(1000 * sum(run[2]) / args.new, 3) for run in runs],
        "prompt_ms": round(1000 * prompt, 1),
        "load_s": round(loading, 1),
        "peak_rss_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "tokens": tokens,
        **dsv3.versions(),
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
