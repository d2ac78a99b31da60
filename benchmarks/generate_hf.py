"""Generation against transformers' `generate`: the same float32 model folder, batch, lengths and cores, in turns.

    python benchmarks/generate_hf.py FOLDER [--rows 32] [--prompt_length 64] [--max_new_tokens 96] [--greedy]

Prints seconds and CPU seconds of the fastest call of each, and how many times as long transformers takes. Responses
have a fixed length. CPU seconds compare the two on a machine that others use too. With `--greedy` both take the
likeliest token, and the tokens are compared; rounding may resolve near-ties of random prompts either way.
"""

import argparse
import os
import time
from collections.abc import Callable

import jax
import numpy as np
import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from jaxrlhf import HybridEngine, SamplingConfig
from jaxrlhf.bench.record import write
from jaxrlhf.config.files import check_output
from jaxrlhf.models import load_pretrained

Run = Callable[[], np.ndarray]


def our_run(engine: HybridEngine, ids: np.ndarray, longest: int, greedy: bool) -> Run:
    sampling = SamplingConfig(longest, temperature=0.0 if greedy else 1.0)
    mask, key = np.ones_like(ids), jax.random.key(1)
    return lambda: np.asarray(engine.generate(ids, mask, key, sampling).tokens)


def their_run(folder: str, ids: np.ndarray, longest: int, greedy: bool) -> Run:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokens = torch.tensor(ids)
    mask = torch.ones_like(tokens)
    options = {"do_sample": False} if greedy else {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    config = GenerationConfig(max_new_tokens=longest, eos_token_id=None, pad_token_id=0, **options)

    def run() -> np.ndarray:
        with torch.inference_mode():
            return model.generate(tokens, attention_mask=mask, generation_config=config).numpy()

    return run


def measured(runs: dict[str, Run], repeats: int) -> tuple[dict[str, dict[str, float]], dict[str, np.ndarray]]:
    """The fewest seconds and CPU seconds of `repeats` calls of each, after one uncounted round, and results."""
    results = {name: run() for name, run in runs.items()}
    best = {name: {"seconds": np.inf, "cpu_seconds": np.inf} for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            begin, cpu = time.perf_counter(), time.process_time()
            run()
            took = {"seconds": time.perf_counter() - begin, "cpu_seconds": time.process_time() - cpu}
            best[name] = {key: min(took[key], best[name][key]) for key in took}
    return best, results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", help="a model folder that transformers reads")
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--prompt_length", type=int, default=64)
    parser.add_argument("--max_new_tokens", type=int, default=96)
    parser.add_argument("--greedy", action="store_true")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    check_output(args.json, "json")

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.set_num_threads(cores)
    engine = HybridEngine(load_pretrained(args.folder))
    ids = np.random.default_rng(0).integers(0, engine.config.vocab_size, (args.rows, args.prompt_length))
    options = (ids, args.max_new_tokens, args.greedy)
    runs = {"engine": our_run(engine, *options), "transformers": their_run(args.folder, *options)}
    best, results = measured(runs, args.repeats)

    print(f"{args.rows} rows, {args.prompt_length} + {args.max_new_tokens} tokens, {cores} cores")
    for name, took in best.items():
        speed = args.rows * args.max_new_tokens / took["seconds"]
        print(f"{name}: {took['seconds']:.2f} s ({speed:.0f} tokens/s), {took['cpu_seconds']:.2f} CPU s")
    ratios = {key: best["transformers"][key] / best["engine"][key] for key in best["engine"]}
    print(
        f"transformers takes {ratios['seconds']:.2f} times as long, {ratios['cpu_seconds']:.2f} times the CPU seconds"
    )
    result = {"settings": {k: v for k, v in vars(args).items() if k != "json"}, "times": best, "ratios": ratios}
    if args.greedy:
        result["same_tokens"] = float((results["engine"] == results["transformers"]).mean())
        print(f"same tokens: {result['same_tokens']:.4f}")
    write(args.json, result)


if __name__ == "__main__":
    main()
