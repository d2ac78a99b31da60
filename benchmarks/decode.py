"""Decoding against a hand-written loop, and its cost per token when the cache is twice as long.

    python benchmarks/decode.py [--json FILE]

The hand loop is GPT-2 in plain jnp: one weight array per layer, fused QKV, one jitted `while_loop`, no padding, no
options. Both draw the same tokens from the same weights, which is checked. Cost per token is the difference between a
long and a short answer over the same cache, so it holds no prefill and no reshard.
"""

import argparse
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jaxrlhf import HybridEngine, SamplingConfig
from jaxrlhf.bench.ours import DECODE_STEPS, decode_runs, decode_view
from jaxrlhf.bench.record import interleaved, write
from jaxrlhf.config.files import check_output
from jaxrlhf.models import config_from_dict, create_model


def hand_weights(params: dict, layers: int) -> dict:
    """Plain arrays, one set per layer."""

    def layer(i: int) -> dict:
        p = jax.tree.map(lambda x: x[i], params["layers"])
        width = p["mlp"]["up"]["kernel"].shape[0]
        names = ("query", "key", "value")
        return {
            "ln1": p["attn_norm"],
            "ln2": p["mlp_norm"],
            "qkv": jnp.concatenate([p["attn"][n]["kernel"].reshape(width, width) for n in names], axis=1),
            "qkv_bias": jnp.concatenate([p["attn"][n]["bias"].reshape(width) for n in names]),
            "out": p["attn"]["out"]["kernel"].reshape(width, width),
            "out_bias": p["attn"]["out"]["bias"],
            "up": p["mlp"]["up"],
            "down": p["mlp"]["down"],
        }

    return {
        "embed": params["embed"]["embedding"],
        "positions": params["embed_positions"]["embedding"],
        "norm": params["final_norm"],
        "layers": [layer(i) for i in range(layers)],
    }


def norm(x: jax.Array, p: dict) -> jax.Array:
    x = x - x.mean(-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-5) * p["scale"] + p["bias"]


def hand_block(p: dict, x: jax.Array, cache: tuple, at: jax.Array, heads: int) -> tuple[jax.Array, tuple]:
    batch, length, width = x.shape
    qkv = norm(x, p["ln1"]) @ p["qkv"] + p["qkv_bias"]
    query, key, value = qkv.reshape(batch, length, 3, heads, width // heads).transpose(2, 0, 3, 1, 4)
    cache = tuple(
        jax.lax.dynamic_update_slice(old, new, (0, 0, at, 0)) for old, new in zip(cache, (key, value), strict=True)
    )
    visible = jnp.arange(cache[0].shape[2])[None] <= at + jnp.arange(length)[:, None]
    scores = jnp.einsum("bhtd,bhsd->bhts", query, cache[0]) * (width // heads) ** -0.5
    weights = jax.nn.softmax(jnp.where(visible, scores, -1e30), axis=-1)
    attended = jnp.einsum("bhts,bhsd->bhtd", weights, cache[1]).swapaxes(1, 2).reshape(batch, length, width)
    x = x + attended @ p["out"] + p["out_bias"]
    hidden = jax.nn.gelu(norm(x, p["ln2"]) @ p["up"]["kernel"] + p["up"]["bias"], approximate=True)
    return x + hidden @ p["down"]["kernel"] + p["down"]["bias"], cache


@partial(jax.jit, static_argnames=("heads", "longest", "eos", "vocab"))
def hand_generate(weights: dict, ids: jax.Array, key: jax.Array, *, heads: int, longest: int, eos: int, vocab: int):
    batch, prompt = ids.shape
    width = weights["embed"].shape[1]
    keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, jnp.arange(batch))

    def forward(ids: jax.Array, at: jax.Array, caches: list) -> tuple[jax.Array, list]:
        x = weights["embed"][ids] + weights["positions"][at + jnp.arange(ids.shape[1])]
        updated = []
        for p, cache in zip(weights["layers"], caches, strict=True):
            x, cache = hand_block(p, x, cache, at, heads)
            updated.append(cache)
        return (norm(x[:, -1], weights["norm"]) @ weights["embed"].T)[:, :vocab], updated

    def sample(logits: jax.Array, step: jax.Array) -> tuple[jax.Array, jax.Array]:
        token = jax.vmap(jax.random.categorical)(jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, step), logits)
        logprob = jnp.take_along_axis(logits, token[:, None], axis=1)[:, 0] - jax.nn.logsumexp(logits, axis=1)
        return token.astype(jnp.int32), logprob

    def body(carry: tuple) -> tuple:
        step, token, done, tokens, logprobs, caches = carry
        logits, caches = forward(token[:, None], prompt + step - 1, caches)
        token, logprob = sample(logits, step)
        token = jnp.where(done, 0, token)
        tokens = jax.lax.dynamic_update_slice(tokens, token[:, None], (0, step))
        logprobs = jax.lax.dynamic_update_slice(logprobs, jnp.where(done, 0.0, logprob)[:, None], (0, step))
        return step + 1, token, done | (token == eos), tokens, logprobs, caches

    shape = (batch, heads, prompt + longest, width // heads)
    logits, caches = forward(ids, 0, [(jnp.zeros(shape), jnp.zeros(shape)) for _ in weights["layers"]])
    token, logprob = sample(logits, 0)
    tokens = jnp.zeros((batch, longest), jnp.int32).at[:, 0].set(token)
    logprobs = jnp.zeros((batch, longest)).at[:, 0].set(logprob)
    carry = (jnp.int32(1), token, token == eos, tokens, logprobs, caches)
    carry = jax.lax.while_loop(lambda c: (c[0] < longest) & ~jnp.all(c[2]), body, carry)
    return carry[3], carry[4]


def step_cost(engine: HybridEngine, rows: int, lengths: list[int], repeats: int) -> dict[str, float]:
    """Seconds per decode step of `rows` rows with caches of each of `lengths`."""
    module, mesh = engine.module, engine.generate_mesh
    view = decode_view(module, engine.params, mesh)
    runs = {
        f"{length}/{name}": run
        for length in lengths
        for name, run in decode_runs(module, view, mesh, rows, length, DECODE_STEPS).items()
    }
    seconds = interleaved(runs, repeats)
    steps = DECODE_STEPS - 1
    return {str(length): (seconds[f"{length}/many"] - seconds[f"{length}/one"]) / steps for length in lengths}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--prompt_length", type=int, default=64)
    parser.add_argument("--max_new_tokens", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--cache_length", type=int, default=256, help="compared with twice as much")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    check_output(args.json, "json")

    heads, positions = args.width // 64, max(args.prompt_length + args.max_new_tokens, 2 * args.cache_length)
    shape = {"model_type": "gpt2", "vocab_size": args.vocab, "n_embd": args.width, "n_layer": args.layers}
    shape |= {"n_head": heads, "n_positions": positions}
    engine = HybridEngine(create_model(config_from_dict(shape), key=jax.random.key(0), dtype=jnp.float32))
    ids = np.random.default_rng(0).integers(2, args.vocab, (args.rows, args.prompt_length)).astype(np.int32)
    mask, key, weights = np.ones_like(ids), jax.random.key(1), jax.jit(hand_weights, static_argnums=1)
    weights = weights(engine.params, args.layers)
    sampling = SamplingConfig(args.max_new_tokens, eos_token_id=args.vocab - 1)
    options = {"heads": heads, "longest": args.max_new_tokens, "eos": args.vocab - 1, "vocab": args.vocab}

    def ours():
        return engine.generate(ids, mask, key, sampling)

    def by_hand():
        return hand_generate(weights, jnp.asarray(ids), key, **options)

    got, (tokens, logprobs) = jax.device_get((ours(), by_hand()))
    same = np.array_equal(got.tokens[:, args.prompt_length :], tokens)
    gap = float(np.abs(got.logprobs[:, args.prompt_length :] - logprobs).max())
    seconds = interleaved({"engine": ours, "hand": by_hand}, args.repeats)
    ratio = seconds["engine"] / seconds["hand"]
    print(f"{args.rows} rows, {args.prompt_length} + {args.max_new_tokens} tokens, {args.layers} x {args.width}")
    print(f"engine {seconds['engine']:.3f} s, hand-written loop {seconds['hand']:.3f} s: {ratio:.2f}x")
    print(f"same tokens: {same}; largest gap of log-probs {gap:.1e}")

    costs = step_cost(engine, args.rows, [args.cache_length, 2 * args.cache_length], args.repeats)
    growth = costs[str(2 * args.cache_length)] / costs[str(args.cache_length)]
    text = ", ".join(f"{1e3 * s:.2f} ms with a cache of {n}" for n, s in costs.items())
    print(f"a step: {text}: {growth:.2f}x")
    result = {"settings": {k: v for k, v in vars(args).items() if k != "json"}, "seconds": seconds, "ratio": ratio}
    result |= {"same_tokens": same, "logprob_gap": gap, "seconds_per_step": costs, "growth": growth}
    write(args.json, result)
    if not same:
        raise SystemExit("the tokens differ")


if __name__ == "__main__":
    main()
