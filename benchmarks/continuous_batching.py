"""Tokens per second of continuous batching against fixed batches of as many rows, for answers of geometric length.

    python benchmarks/continuous_batching.py [--json FILE]

The model is random; so many of its tokens end an answer that lengths are geometric with a mean of a quarter of the
longest. The same prompts get the same answers both ways, which is checked. Only real response tokens are counted.
"""

import argparse

import jax
import numpy as np

from jaxrlhf import HybridEngine, SamplingConfig
from jaxrlhf.bench.record import interleaved, write
from jaxrlhf.config.files import check_output
from jaxrlhf.models import config_from_dict, create_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--slots", type=int, default=32)
    parser.add_argument("--prompts", type=int, default=0, help="default: 8 x slots")
    parser.add_argument("--prompt_length", type=int, default=32)
    parser.add_argument("--max_new_tokens", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    check_output(args.json, "json")
    slots, total = args.slots, args.prompts or 8 * args.slots
    longest, length = args.max_new_tokens, args.prompt_length

    shape = {"model_type": "gpt2", "vocab_size": args.vocab, "n_embd": args.width, "n_layer": args.layers}
    shape |= {"n_head": args.width // 64, "n_positions": length + longest}
    engine = HybridEngine(create_model(config_from_dict(shape), key=jax.random.key(0)))
    ends = tuple(range(0, args.vocab, longest // 4))  # the chance of an end per token is 4 / longest
    sampling = SamplingConfig(longest, eos_token_id=ends, pad_token_id=1)
    rng = np.random.default_rng(0)
    ids = rng.integers(0, args.vocab, (total, length))
    mask = np.arange(length)[None] >= rng.integers(0, length // 2, total)[:, None]
    key, numbers = jax.random.key(1), np.arange(total)

    def fixed() -> list:
        rows = [slice(i, i + slots) for i in range(0, total, slots)]
        return [engine.generate(ids[r], mask[r], key, sampling, sample_index=numbers[r]) for r in rows]

    def continuous():
        return engine.generate(ids, mask, key, sampling, slots=slots)

    one = jax.device_get(continuous())
    parts = jax.device_get(fixed())
    same = np.array_equal(one.tokens, np.concatenate([p.tokens for p in parts]))
    seconds = interleaved({"fixed": fixed, "continuous": continuous}, args.repeats)

    lengths = one.response_mask.sum(1)
    steps = sum(int(p.response_mask.sum(1).max()) for p in parts)
    rate = {name: float(lengths.sum() / s) for name, s in seconds.items()}
    print(f"{total} prompts, {slots} rows at a time, answers of {lengths.mean():.1f} tokens (longest {lengths.max()})")
    print(f"{'':12}{'seconds':>10}{'tokens/s':>12}")
    for name, s in seconds.items():
        print(f"{name:12}{s:10.3f}{rate[name]:12.0f}")
    print(f"continuous is {rate['continuous'] / rate['fixed']:.2f}x the fixed batch; same answers: {same}")
    print(
        f"steps of the fixed batches: {steps}; no fewer than {lengths.sum() / slots:.0f} fill every row of every step"
    )
    result = {"settings": {k: v for k, v in vars(args).items() if k != "json"} | {"prompts": total}}
    result |= {"mean_length": float(lengths.mean()), "seconds": seconds, "tokens_per_second": rate}
    write(args.json, result | {"ratio": rate["continuous"] / rate["fixed"], "same_answers": same})
    if not same:
        raise SystemExit("the answers differ")


if __name__ == "__main__":
    main()
