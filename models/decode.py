"""Prefill and decode with an explicit key/value cache, layer by layer over a per-layer view of the parameters."""

from collections.abc import Callable
from typing import Any, cast

import flax.struct
import jax
import jax.numpy as jnp

from jaxrlhf.kernels import KV_CACHE_DTYPES, Cache
from jaxrlhf.models.decoder import Decoder
from jaxrlhf.models.layer_options import LayerOptions, layer_options
from jaxrlhf.models.layers import Block, DecodeContext, KernelForm
from jaxrlhf.models.lora import merge_lora
from jaxrlhf.models.mixed import block_config, layer_params, stacks_of
from jaxrlhf.models.model import logical_axes, storage_rules
from jaxrlhf.models.rotary import rotation
from jaxrlhf.models.sequences import SequenceContext, sequence_context
from jaxrlhf.sharding import constrain, current_rules, platform, reshard, split

PyTree = Any


class GenerationView(flax.struct.PyTreeNode):
    """Parameters in the form that decode reads: one tree per layer instead of stacked arrays."""

    outer: PyTree
    """Everything outside the layers: embeddings, norms, heads."""
    layers: tuple[PyTree, ...]
    form: KernelForm = flax.struct.field(pytree_node=False, default=KernelForm())
    """How the kernels of `layers` lie."""
    stacked: PyTree | None = None
    """The layers as training has them, `[L, …]`, for a prefill that scans over them; None: it goes layer by layer."""


def qkv_groups(module: Decoder) -> int:
    """Number of shards that split the heads under the current generation rules, each with its own q, k and v.

    0 if query heads are split into more parts than key/value heads: a fused kernel would mix shards.
    """
    c = module.config
    g = split("kv_heads", c.num_kv_heads)
    return g if g == split("heads", c.num_heads) else 0


def kernel_form(module: Decoder) -> KernelForm:
    """The form in which decode reads the kernels of `module` fastest, under the current generation rules."""
    c = module.config
    return KernelForm(qkv_groups(module), c.gated_mlp and not c.num_experts, outputs_first=platform() == "cpu")


def _fuse(layer: PyTree, names: tuple[str, ...], into: str, join: Callable[..., jax.Array]) -> PyTree:
    """A layer's attention or MLP with the projections `names` joined into one, kernels and biases alike."""
    parts = [layer[name] for name in names]
    fused = {leaf: join(leaf, *(part[leaf] for part in parts)) for leaf in parts[0]}
    return {name: x for name, x in layer.items() if name not in names} | {into: fused}


def _shaped(tree: PyTree, form: KernelForm) -> PyTree:
    """One layer's kernels in `form`; those of experts stay as they are."""

    def join_qkv(leaf: str, *xs: jax.Array) -> jax.Array:
        g = form.qkv_groups
        grouped = [x.reshape(*x.shape[:-2], g, x.shape[-2] // g, x.shape[-1]) for x in xs]
        axes = ("embed",) * (leaf == "kernel")
        return constrain(jnp.concatenate(grouped, axis=-2), *axes, "heads", None, "head_dim")

    def join_gate_up(leaf: str, *xs: jax.Array) -> jax.Array:
        return constrain(jnp.stack(xs, axis=-2), *("embed",) * (leaf == "kernel"), None, "mlp")

    def turned(name: str, projection: PyTree) -> PyTree:
        if "kernel" not in projection:
            return projection
        kernel, inputs = projection["kernel"], 2 if name == "out" else 1
        return projection | {"kernel": jnp.moveaxis(kernel, range(inputs), range(-inputs, 0))}

    tree = dict(tree)
    if form.qkv_groups:
        tree["attn"] = _fuse(tree["attn"], ("query", "key", "value"), "qkv", join_qkv)
    if form.gate_up:
        tree["mlp"] = _fuse(tree["mlp"], ("gate", "up"), "gate_up", join_gate_up)
    if form.outputs_first:
        for part in ("attn", "mlp") if "router" not in tree["mlp"] else ("attn",):
            tree[part] = {name: turned(name, x) for name, x in tree[part].items()}
    return tree


@jax.named_scope("reshard")
def generation_view(params: PyTree, module: Decoder, *, scan_prefill: bool = False) -> GenerationView:
    """Reshards the parameters from training to generation, under the current generation rules.

    Kernels and biases are cast to the compute dtype before any collective, because that halves the bytes that move, and
    the decode loop casts nothing. Norms stay in float32, as training uses them. Pinning the result keeps collectives
    out of the decode loop. Adapters are merged into their kernels layer by layer, so decode pays nothing for them.
    Kernels take the form that decode reads fastest (`kernel_form`).

    Args:
        params: The training tree of `module`.
        module: Its `dtype` is the compute dtype.
        scan_prefill: For a program that computes both the view and prefills with it. On one CPU device they then scan
            over the layers, which shortens the compile; each layer's weights are read from `params`.
    """
    axes = logical_axes(module.clone(lora=None))
    form, current = kernel_form(module), current_rules()
    alone = current is None or current[0].size == 1
    config = module.config
    scanned = scan_prefill and alone and platform() == "cpu" and not config.dense_layers

    def leaf(x: jax.Array, names: tuple[str | None, ...]) -> jax.Array:
        return reshard(x.astype(module.dtype) if x.ndim > 1 else x, names, storage_rules(module))

    def layer_leaf(path: tuple, x: jax.Array, names: tuple[str | None, ...]) -> jax.Array:
        x = x if path[-2].key.endswith("norm") else x.astype(module.dtype)
        return reshard(x, names[1:], storage_rules(module))

    def layer(i: int, before: PyTree) -> PyTree:
        tree = layer_params(params["layers"], config, i)
        if not alone or module.lora is not None:
            # The barrier orders the layers, so that only one at a time is in transit or merged in float32.
            tree, _ = jax.lax.optimization_barrier((tree, before))
        tree = merge_lora(tree, module)
        own = stacks_of(axes["layers"], config, i)
        return _shaped(jax.tree_util.tree_map_with_path(layer_leaf, tree, own), form)

    outer = merge_lora({name: x for name, x in params.items() if name != "layers"}, module)
    outer = {name: jax.tree.map(leaf, x, axes[name]) for name, x in outer.items()}
    layers: list[PyTree] = []
    for i in range(config.num_layers):
        layers.append(layer(i, layers[-1] if layers else {}))
    return GenerationView(outer, tuple(layers), form, params["layers"] if scanned else None)


def init_cache(module: Decoder, batch: int, length: int) -> tuple[Cache, ...]:
    """Creates the zeroed cache of each layer, keys and values `[B, H_kv, length, D]`, in `module.kv_cache_dtype`.

    See kernels/kv_cache.py for its form. On a CPU, `auto` is float32 (kernels/live_blocks.py).
    """
    c = module.config
    dtype = KV_CACHE_DTYPES[module.kv_cache_dtype]
    computed = jnp.float32 if platform() == "cpu" else module.dtype

    def zeros(*width: int, dtype: jnp.dtype) -> jax.Array:
        x = jnp.zeros((batch, c.num_kv_heads, length, *width), dtype)
        return constrain(x, "batch", "kv_heads", *[None] * (x.ndim - 2))

    def layer() -> Cache:
        held = tuple(zeros(c.head_dim, dtype=dtype or computed) for _ in range(2))
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
    adapted, module = module, module.clone(lora=None)  # the view holds merged kernels
    outer = {"params": view.outer}
    block = Block(
        module.config,
        module.dtype,
        form=view.form,
        attention_implementation=module.attention_implementation,
        expert_implementation=module.expert_implementation,
    )

    def run_layer(
        block: Block, x: jax.Array, params: PyTree, options: LayerOptions, cache: Cache
    ) -> tuple[jax.Array, Cache]:
        # flax types the result of `apply` as if it were mutable, with the variables beside it.
        return cast(tuple[jax.Array, Cache], block.apply({"params": params}, x, context, options, cache))

    def run_stacked(x: jax.Array, layer: tuple[PyTree, LayerOptions, Cache]) -> tuple[jax.Array, Cache]:
        params, options, cache = layer
        return run_layer(block.clone(form=KernelForm()), x, merge_lora(params, adapted), options, cache)

    x = cast(jax.Array, module.apply(outer, input_ids, positions, method="embed_tokens"))
    layers = layer_options(module.config)
    if view.stacked is not None and isinstance(context, SequenceContext):
        options, stacked = (jax.tree.map(lambda *xs: jnp.stack(xs), *parts) for parts in (layers, caches))
        x, stacked = jax.lax.scan(run_stacked, x, (view.stacked, options, stacked))
        updated = tuple(jax.tree.map(lambda x, i=i: x[i], stacked) for i in range(len(layers)))
    else:
        updated = ()
        for i, (params, options, cache) in enumerate(zip(view.layers, layers, caches, strict=True)):
            own = block.clone(config=block_config(module.config, i))
            x, cache = run_layer(own, x, params, options, cache)
            updated += (cache,)
    hidden = module.apply(outer, x[:, -1], method="finish")
    return cast(jax.Array, module.apply(outer, hidden, method="padded_logits")), updated


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
