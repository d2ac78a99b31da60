"""Prefill and decode with an explicit key/value cache, layer by layer over a per-layer view of the parameters."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from jaxrlhf.kernels import KV_CACHE_DTYPES, Cache
from jaxrlhf.models.decoder import AttentionContext, Block, Decoder, layer_options, positions_from_mask
from jaxrlhf.models.lora import merge_lora
from jaxrlhf.models.model import logical_axes, storage_rules
from jaxrlhf.models.rotary import rotation
from jaxrlhf.sharding import constrain, flip, split

PyTree = Any


@flax.struct.dataclass
class GenerationView:
    """Parameters as decode wants them: one tree per layer instead of stacked arrays."""

    outer: PyTree
    layers: tuple[PyTree, ...]
    qkv_groups: int = flax.struct.field(pytree_node=False, default=0)
    """g of the fused `attn/qkv` kernels `[D, g, (H + 2·H_kv)/g, head_dim]`; 0: query, key and value are apart."""


def qkv_groups(module: Decoder) -> int:
    """The g under the current generation rules: how many shards split the heads, each holding its own q, k and v.

    0 where query heads are split into more parts than key/value heads are: a fused kernel would mix shards.
    """
    c = module.config
    g = split("kv_heads", c.num_kv_heads)
    return g if g == split("heads", c.num_heads) else 0


def _fuse_qkv(attn: PyTree, g: int) -> PyTree:
    """One layer's attention with `query`, `key` and `value` joined into `qkv`, shard by shard of g."""
    parts = [attn[name] for name in ("query", "key", "value")]

    def join(axes: tuple[str | None, ...], *xs: jax.Array) -> jax.Array:
        grouped = [x.reshape(*x.shape[:-2], g, x.shape[-2] // g, x.shape[-1]) for x in xs]
        return constrain(jnp.concatenate(grouped, axis=-2), *axes, "heads", None, "head_dim")

    fused = {name: join(("embed",) * (name == "kernel"), *(part[name] for part in parts)) for name in parts[0]}
    return {name: x for name, x in attn.items() if name not in ("query", "key", "value")} | {"qkv": fused}


@jax.named_scope("flip")
def generation_view(params: PyTree, module: Decoder) -> GenerationView:
    """Cast to the compute dtype, unstack, and pin to the current generation rules: the one place of the flip.

    `params` is the training tree of `module`. Casting comes before any collective, and pinning the result keeps
    collectives out of the decode loop. Vectors (norms) stay in float32, as training uses them. Adapters are merged
    into their kernels layer by layer, so that decode pays nothing for them. Query, key and value become one kernel
    where that crosses no shards (`qkv_groups`).
    """
    axes = logical_axes(module.clone(lora=None))
    groups = qkv_groups(module)

    def leaf(x: jax.Array, names: tuple[str | None, ...]) -> jax.Array:
        return flip(x.astype(module.dtype) if x.ndim > 1 else x, names, storage_rules(module))

    def layer(i: int, before: PyTree) -> PyTree:
        tree = jax.tree.map(lambda x: x[i], params["layers"])
        # One layer after the other: what is on the move, or merged in float32, is one layer's at a time.
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
    """Zeroed keys and values per layer, each `[B, H_kv, length, D]` (kernels/kv_cache.py), as `kv_cache_dtype` says."""
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
    context: AttentionContext,
    caches: tuple[Cache, ...],
) -> tuple[jax.Array, tuple[Cache, ...]]:
    module = module.clone(lora=None)  # the view holds merged kernels
    outer = {"params": view.outer}
    block = Block(
        module.config,
        module.dtype,
        qkv_groups=view.qkv_groups,
        attention_implementation=module.attention_implementation,
    )
    x = module.apply(outer, input_ids, positions, method="embed_tokens")
    updated = []
    for params, options, cache in zip(view.layers, layer_options(module.config), caches, strict=True):
        x, cache = block.apply({"params": params}, x, context, options, cache)
        updated.append(cache)
    hidden = module.apply(outer, x[:, -1], method="finish")
    return module.apply(outer, hidden, method="padded_logits"), tuple(updated)


def prefill(
    module: Decoder, view: GenerationView, prompt_ids: jax.Array, prompt_mask: jax.Array, caches: tuple[Cache, ...]
) -> tuple[jax.Array, tuple[Cache, ...]]:
    """Run left-padded prompts `[B, P]`, fill cache columns 0…P-1; returns the last column's logits `[B, V_padded]`."""
    mask = prompt_mask.astype(bool)
    positions = positions_from_mask(mask)
    rotary = rotation(module.config, positions) if module.config.position == "rotary" else None
    context = AttentionContext(key_mask=mask, positions=positions, rotation=rotary)
    return _run(module, view, prompt_ids, positions, context, caches)


def decode_step(
    module: Decoder,
    view: GenerationView,
    tokens: jax.Array,
    column: jax.Array,
    start: jax.Array,
    caches: tuple[Cache, ...],
) -> tuple[jax.Array, tuple[Cache, ...]]:
    """Feed one token per row `[B]`, written at cache `column`; rows begin at column `start` `[B]`.

    `column` is one for all rows (the cheaper write) or `[B]`. Returns the next token's float32 logits `[B, V_padded]`
    and the caches, updated in place under jit.
    """
    own = (column - start)[:, None]
    rotary = rotation(module.config, own) if module.config.position == "rotary" else None
    context = AttentionContext(rotation=rotary, write_index=column, start=start)
    return _run(module, view, tokens[:, None], own, context, caches)
