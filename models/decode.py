"""Prefill and decode with an explicit key/value cache, layer by layer over a per-layer view of the parameters."""

from typing import Any, cast

import flax.struct
import jax
import jax.numpy as jnp

from jaxrlhf.kernels import KV_CACHE_DTYPES, Cache
from jaxrlhf.models.decoder import Decoder
from jaxrlhf.models.layer_options import layer_options
from jaxrlhf.models.layers import Block, DecodeContext
from jaxrlhf.models.lora import merge_lora
from jaxrlhf.models.model import logical_axes, storage_rules
from jaxrlhf.models.rotary import rotation
from jaxrlhf.models.sequences import SequenceContext, sequence_context
from jaxrlhf.sharding import constrain, reshard, split

PyTree = Any


class GenerationView(flax.struct.PyTreeNode):
    """Parameters in the form that decode reads: one tree per layer instead of stacked arrays."""

    outer: PyTree
    """Everything outside the layers: embeddings, norms, heads."""
    layers: tuple[PyTree, ...]
    qkv_groups: int = flax.struct.field(pytree_node=False, default=0)
    """g of the fused `attn/qkv` kernels `[D, g, (H + 2·H_kv)/g, head_dim]`; 0: query, key and value are separate."""


def qkv_groups(module: Decoder) -> int:
    """Number of shards that split the heads under the current generation rules, each with its own q, k and v.

    0 if query heads are split into more parts than key/value heads: a fused kernel would mix shards.
    """
    c = module.config
    g = split("kv_heads", c.num_kv_heads)
    return g if g == split("heads", c.num_heads) else 0


def _fuse_qkv(attn: PyTree, g: int) -> PyTree:
    """One layer's attention with `query`, `key` and `value` joined into `qkv`, shard by shard."""
    parts = [attn[name] for name in ("query", "key", "value")]

    def join(axes: tuple[str | None, ...], *xs: jax.Array) -> jax.Array:
        grouped = [x.reshape(*x.shape[:-2], g, x.shape[-2] // g, x.shape[-1]) for x in xs]
        return constrain(jnp.concatenate(grouped, axis=-2), *axes, "heads", None, "head_dim")

    fused = {name: join(("embed",) * (name == "kernel"), *(part[name] for part in parts)) for name in parts[0]}
    return {name: x for name, x in attn.items() if name not in ("query", "key", "value")} | {"qkv": fused}


@jax.named_scope("reshard")
def generation_view(params: PyTree, module: Decoder) -> GenerationView:
    """Reshards the parameters from training to generation, under the current generation rules.

    Matrices are cast to the compute dtype before any collective, because that halves the bytes that move. Vectors
    (norms) stay in float32, as training uses them. Pinning the result keeps collectives out of the decode loop.
    Adapters are merged into their kernels layer by layer, so decode pays nothing for them. Query, key and value become
    one kernel where that crosses no shards (`qkv_groups`).

    Args:
        params: The training tree of `module`.
        module: Its `dtype` is the compute dtype.
    """
    axes = logical_axes(module.clone(lora=None))
    groups = qkv_groups(module)

    def leaf(x: jax.Array, names: tuple[str | None, ...]) -> jax.Array:
        return reshard(x.astype(module.dtype) if x.ndim > 1 else x, names, storage_rules(module))

    def layer(i: int, before: PyTree) -> PyTree:
        tree = jax.tree.map(lambda x: x[i], params["layers"])
        # The barrier orders the layers, so that only one at a time is in transit or merged in float32.
        tree, _ = jax.lax.optimization_barrier((tree, before))
        tree = merge_lora(tree, module)
        tree = jax.tree.map(lambda x, names: leaf(x, names[1:]), tree, axes["layers"])
        return tree | {"attn": _fuse_qkv(tree["attn"], groups)} if groups else tree

    outer = merge_lora({name: x for name, x in params.items() if name != "layers"}, module)
    outer = {name: jax.tree.map(leaf, x, axes[name]) for name, x in outer.items()}
    layers: list[PyTree] = []
    for i in range(module.config.num_layers):
        layers.append(layer(i, layers[-1] if layers else {}))
    return GenerationView(outer=outer, layers=tuple(layers), qkv_groups=groups)


def init_cache(module: Decoder, batch: int, length: int) -> tuple[Cache, ...]:
    """Creates the zeroed cache of each layer, keys and values `[B, H_kv, length, D]`, in `module.kv_cache_dtype`.

    See kernels/kv_cache.py for its form.
    """
    c = module.config
    dtype = KV_CACHE_DTYPES[module.kv_cache_dtype]

    def zeros(*width: int, dtype: jnp.dtype) -> jax.Array:
        x = jnp.zeros((batch, c.num_kv_heads, length, *width), dtype)
        return constrain(x, "batch", "kv_heads", *[None] * (x.ndim - 2))

    def layer() -> Cache:
        held = tuple(zeros(c.head_dim, dtype=dtype or module.dtype) for _ in range(2))
        return held if dtype is None else held + tuple(zeros(dtype=jnp.float32) for _ in range(2))

    return tuple(layer() for _ in range(c.num_layers))


def _run(
    module: Decoder,
    view: GenerationView,
    input_ids: jax.Array,
    positions: jax.Array,
    context: SequenceContext | DecodeContext,
    caches: tuple[Cache, ...],
) -> tuple[jax.Array, tuple[Cache, ...]]:
    module = module.clone(lora=None)  # the view holds merged kernels
    outer = {"params": view.outer}
    block = Block(
        module.config,
        module.dtype,
        qkv_groups=view.qkv_groups,
        attention_implementation=module.attention_implementation,
        expert_implementation=module.expert_implementation,
    )
    # flax types the result of `apply` as if it were mutable, with the variables beside it.
    x = cast(jax.Array, module.apply(outer, input_ids, positions, method="embed_tokens"))
    updated = []
    for params, options, cache in zip(view.layers, layer_options(module.config), caches, strict=True):
        x, cache = cast(tuple[jax.Array, Cache], block.apply({"params": params}, x, context, options, cache))
        updated.append(cache)
    hidden = module.apply(outer, x[:, -1], method="finish")
    return cast(jax.Array, module.apply(outer, hidden, method="padded_logits")), tuple(updated)


def prefill(
    module: Decoder,
    view: GenerationView,
    prompt_ids: jax.Array,
    prompt_mask: jax.Array,
    caches: tuple[Cache, ...],
    *,
    longest: int | None = None,
) -> tuple[jax.Array, tuple[Cache, ...]]:
    """Runs the model over left-padded prompts, and fills cache columns 0 … P-1.

    Args:
        module: The model's module.
        view: Its parameters for generation.
        prompt_ids: int `[B, P]`.
        prompt_mask: `[B, P]`, set for real tokens.
        caches: Per layer, from `init_cache`.
        longest: Columns of the caches that decoding will have, which decide how `longrope` rotates; None: as `caches`.

    Returns:
        Float32 logits `[B, V_padded]` of the last column, and the caches.
    """
    longest = caches[0][0].shape[2] if longest is None else longest
    context = sequence_context(module.config, prompt_mask.astype(bool), longest=longest, contiguous=True)
    return _run(module, view, prompt_ids, context.positions, context, caches)


def decode_step(
    module: Decoder,
    view: GenerationView,
    tokens: jax.Array,
    column: jax.Array,
    start: jax.Array,
    caches: tuple[Cache, ...],
) -> tuple[jax.Array, tuple[Cache, ...]]:
    """Runs the model over one token per row.

    Args:
        module: The model's module.
        view: Its parameters for generation.
        tokens: int `[B]`.
        column: Cache column to write, int scalar (a cheaper write) or `[B]`.
        start: int `[B]`: the first live cache column of each row.
        caches: Per layer; updated in place under jit.

    Returns:
        Float32 logits `[B, V_padded]` of the next token, and the caches.
    """
    own = (column - start)[:, None]
    longest = caches[0][0].shape[2]
    rotary = rotation(module.config, own, longest=longest) if module.config.position == "rotary" else None
    context = DecodeContext(start, column, rotary)
    return _run(module, view, tokens[:, None], own, context, caches)
