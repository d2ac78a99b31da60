"""The layers of the decoder, as Flax linen modules: norms, projections, attention, MLP, block and output head.

A block takes the facts about its sequences as a context: whole sequences (`SequenceContext`) in training, scoring and
prefill, or one new token each (`DecodeContext`) in decode.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import cast

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jaxrlhf.kernels import LIBRARIES, Cache, cpu_product, entries, outputs_first_product, write_columns
from jaxrlhf.models.activations import ACTIVATION_FUNCTIONS
from jaxrlhf.models.attend import AttentionOptions, attend_to_cache, attend_to_sequence
from jaxrlhf.models.config import DecoderConfig, LoRAConfig
from jaxrlhf.models.layer_options import LayerOptions, attends_alike, attention_options, layer_options
from jaxrlhf.models.moe import MoE
from jaxrlhf.models.norms import NormOptions, normalise
from jaxrlhf.models.rotary import rotate
from jaxrlhf.models.sequences import SequenceContext
from jaxrlhf.sharding import constrain, platform


class DecodeContext(flax.struct.PyTreeNode):
    """Facts about one decode step that the attention of every layer needs."""

    start: jax.Array
    """int `[B]`: first live cache column of each row."""
    column: jax.Array
    """int scalar or `[B]`: cache column of the one new token."""
    rotation: tuple[jax.Array, jax.Array] | None
    """cos and sin of the new token as `rotation` returns them; None without rotary positions."""


@dataclass(frozen=True)
class KernelForm:
    """The layout of a layer's projections in memory. The default is that in which they are stored and trained.

    Decode reads every weight for each token, so models/decode.py rearranges them once per rollout.
    """

    qkv_groups: int = 0
    """g of one kernel `attn/qkv` `[D, g, (H + 2·H_kv)/g, head_dim]` in place of query, key and value; 0: none. Group i
    holds the query heads, then the key heads, then the value heads of shard i."""
    gate_up: bool = False
    """One kernel `mlp/gate_up` `[D, 2, F]` in place of gate and up."""
    outputs_first: bool = False
    """Kernels are `[out…, in…]` instead of `[in…, out…]`."""


def _parameter(
    module: nn.Module,
    name: str,
    init: nn.initializers.Initializer,
    shape: tuple[int, ...],
    axes: tuple[str | None, ...],
) -> jax.Array:
    """A parameter of `module` with logical axes, which flax strips from what it returns."""
    return cast(jax.Array, module.param(name, nn.with_logical_partitioning(init, axes), shape))


class Norm(nn.Module):
    """LayerNorm or RMSNorm over the last `axes` axes, computed in float32."""

    config: DecoderConfig
    dtype: jnp.dtype
    kind: str | None = None
    axes: int = 1

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c, kind = self.config, self.kind or self.config.norm
        shape = x.shape[-self.axes :]
        size = math.prod(shape)
        init = nn.initializers.zeros if c.norm_plus_one else nn.initializers.ones
        scale = _parameter(self, "scale", init, (size,), ("norm",)).reshape(shape)
        bias = None
        if kind == "layernorm" and c.norm_bias:
            bias = _parameter(self, "bias", nn.initializers.zeros, (size,), ("norm",)).reshape(shape)
        form = NormOptions(c.norm_eps, kind == "layernorm", c.norm_plus_one, self.dtype)
        return normalise(x, scale, bias, form)


def scaled(x: jax.Array, factor: float) -> jax.Array:
    """`x · factor`, computed in float32: a factor that is rounded to 16 bits would shift all of `x` alike."""
    return x if factor == 1 else (x.astype(jnp.float32) * factor).astype(x.dtype)


PRODUCT = "product"
"""Name of what the remat policy `dots` keeps besides the results of `dot_general`."""


def _contract(x: jax.Array, kernel: jax.Array, count: int) -> jax.Array:
    """Contracts the last `count` axes of `x` with the first ones of `kernel`."""
    if platform() == "cpu":  # the policy cannot see products in a function with a VJP of its own
        return checkpoint_name(cpu_product(x, kernel, count), PRODUCT)
    dims = (tuple(range(x.ndim - count, x.ndim)), tuple(range(count)))
    return jax.lax.dot_general(x, kernel, (dims, ((), ())))


class Projection(nn.Module):
    """A linear map that contracts the last `len(in_axes)` axes of its input.

    Logical axes name the axes of kernel and bias. With adapters at this path there are two more leaves: `lora_a`
    `[in…, r]` and `lora_b` `[r, out…]`.
    """

    config: DecoderConfig
    in_shape: tuple[int, ...]
    out_shape: tuple[int, ...]
    in_axes: tuple[str | None, ...]
    out_axes: tuple[str | None, ...]
    use_bias: bool
    dtype: jnp.dtype
    lora: LoRAConfig | None = None
    outputs_first: bool = False
    """The kernel is `[out…, in…]`."""

    def _adapter(self, x: jax.Array, rank: int, rate: float) -> jax.Array:
        bound = math.prod(self.in_shape) ** -0.5

        def uniform(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype = jnp.float32) -> jax.Array:
            return jax.random.uniform(key, shape, dtype, -bound, bound)  # as PEFT initialises A

        a = _parameter(self, "lora_a", uniform, (*self.in_shape, rank), (*self.in_axes, None))
        b = _parameter(self, "lora_b", nn.initializers.zeros, (rank, *self.out_shape), (None, *self.out_axes))
        x = nn.Dropout(rate, deterministic=rate == 0 or not self.has_rng("dropout"))(x)
        return _contract(_contract(x, a.astype(self.dtype), len(self.in_shape)), b.astype(self.dtype), 1)

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        init = nn.initializers.normal(self.config.initializer_range)
        x, count = x.astype(self.dtype), len(self.in_shape)
        if self.outputs_first:
            shape, axes = self.out_shape + self.in_shape, self.out_axes + self.in_axes
            kernel = _parameter(self, "kernel", init, shape, axes)
            y = outputs_first_product(x, kernel.astype(self.dtype), count)
        else:
            kernel = _parameter(self, "kernel", init, self.in_shape + self.out_shape, self.in_axes + self.out_axes)
            y = _contract(x, kernel.astype(self.dtype), count)
        if self.use_bias:
            axes = self.out_axes if self.out_axes != ("embed",) else ("norm",)
            bias = _parameter(self, "bias", nn.initializers.zeros, self.out_shape, axes)
            # Added flat: the form in which XLA makes it a part of the matrix product on GPUs.
            flat = y.reshape(*y.shape[: y.ndim - len(self.out_shape)], -1) + bias.astype(self.dtype).reshape(-1)
            y = flat.reshape(y.shape)
        if self.lora is not None and self.lora.matches("/".join(self.path)):
            y = y + self._adapter(x, self.lora.rank, self.lora.dropout) * self.lora.scale
        return y


class Attention(nn.Module):
    """Self-attention."""

    config: DecoderConfig
    dtype: jnp.dtype
    lora: LoRAConfig | None = None
    form: KernelForm = KernelForm()
    implementation: str = "auto"

    def _heads(self, x: jax.Array) -> list[jax.Array]:
        """Query, key and value, each `[B, T, heads, D]`."""
        c, g = self.config, self.form.qkv_groups
        counts = (c.num_heads, c.num_kv_heads, c.num_kv_heads)

        def project(name: str, shape: tuple[int, ...], axes: tuple[str | None, ...]) -> jax.Array:
            shapes = ((c.hidden_size,), (*shape, c.head_dim), ("embed",), (*axes, "head_dim"))
            return Projection(c, *shapes, c.qkv_bias, self.dtype, self.lora, self.form.outputs_first, name=name)(x)

        if not g:
            names = (("query", "heads"), ("key", "kv_heads"), ("value", "kv_heads"))
            return [project(name, (n,), (axis,)) for (name, axis), n in zip(names, counts, strict=True)]
        fused = project("qkv", (g, sum(counts) // g), ("heads", None))
        parts = jnp.split(fused, (counts[0] // g, (counts[0] + counts[1]) // g), axis=-2)
        return [part.reshape(*x.shape[:2], n, c.head_dim) for part, n in zip(parts, counts, strict=True)]

    def _options(self, options: LayerOptions, generates: bool) -> AttentionOptions:
        c, implementation = self.config, self.implementation
        if implementation in LIBRARIES and generates:
            implementation = "auto"  # libraries support neither left padding nor a single query
        if attends_alike(c):
            options = layer_options(c)[0]  # as plain numbers, which some kernels need
        return attention_options(c, options, implementation)

    def _positioned(
        self, query: jax.Array, key: jax.Array, context: SequenceContext | DecodeContext, options: LayerOptions
    ) -> tuple[jax.Array, jax.Array]:
        """Query and key `[B, H, T, D]`, rotated as this layer rotates."""
        if context.rotation is None:
            return query, key
        cos, sin = context.rotation if options.rope is None else (x[options.rope] for x in context.rotation)
        query, key = (rotate(x, cos, sin, interleaved=self.config.rotary_interleaved) for x in (query, key))
        return query, key

    @nn.compact
    def __call__(
        self, x: jax.Array, context: SequenceContext | DecodeContext, options: LayerOptions, cache: Cache | None
    ) -> tuple[jax.Array, Cache | None]:
        c = self.config
        query, key, value = self._heads(x)
        if c.qk_norm:
            axes = 2 if c.qk_norm_joint else 1
            query = Norm(c, self.dtype, kind="rmsnorm", axes=axes, name="query_norm")(query)
            key = Norm(c, self.dtype, kind="rmsnorm", axes=axes, name="key_norm")(key)
        axes = ("heads", "kv_heads", "kv_heads")
        # Columns are split until keys meet queries, so that projections gather weights, not x, over `context`.
        query, key, value = (
            constrain(part.swapaxes(1, 2), "batch", axis, "sequence", None)
            for part, axis in zip((query, key, value), axes, strict=True)
        )
        query, key = self._positioned(query, key, context, options)
        query, key, value = (
            constrain(part, "batch", axis, None, None) for part, axis in zip((query, key, value), axes, strict=True)
        )

        how = self._options(options, generates=cache is not None)
        if self.is_initializing():
            output = query  # initialisation only creates parameters: the output of attention does not matter
        elif isinstance(context, DecodeContext):
            assert cache is not None
            output, cache = attend_to_cache(query, key, value, cache, context.start, context.column, how)
        else:
            if cache is not None:
                cache = write_columns(cache, entries(key, value, cache), 0)
            rate = c.attention_dropout
            output = attend_to_sequence(
                query,
                key,
                value,
                context,
                how,
                prefill=cache is not None,
                dropout=(rate, self.make_rng("dropout")) if rate > 0 and self.has_rng("dropout") else None,
            )
        output = constrain(output.swapaxes(1, 2), "batch", "sequence", "heads", None)
        shapes = (c.num_heads, c.head_dim), (c.hidden_size,)
        axes = ("heads", "head_dim"), ("embed",)
        out = Projection(c, *shapes, *axes, c.out_bias, self.dtype, self.lora, self.form.outputs_first, name="out")
        return out(output), cache


class MLP(nn.Module):
    """The feed-forward part of a block, gated or not."""

    config: DecoderConfig
    dtype: jnp.dtype
    lora: LoRAConfig | None = None
    form: KernelForm = KernelForm()

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c, form = self.config, self.form
        activation = ACTIVATION_FUNCTIONS[c.activation]
        options = (c.mlp_bias, self.dtype, self.lora, form.outputs_first)

        def widened(name: str, *count: int) -> jax.Array:
            shape, axes = (*count, c.intermediate_size), (*[None] * len(count), "mlp")
            return Projection(c, (c.hidden_size,), shape, ("embed",), axes, *options, name=name)(x)

        if form.gate_up:
            both = widened("gate_up", 2)
            hidden = activation(both[..., 0, :]) * both[..., 1, :]
        else:
            hidden = widened("up")
            hidden = activation(widened("gate")) * hidden if c.gated_mlp else activation(hidden)
        hidden = constrain(hidden, "batch", "sequence", "mlp")
        shapes = (c.intermediate_size,), (c.hidden_size,)
        return Projection(c, *shapes, ("mlp",), ("embed",), *options, name="down")(hidden)


class Block(nn.Module):
    """One transformer layer. Returns the new hidden states and, when a cache was given, the updated cache."""

    config: DecoderConfig
    dtype: jnp.dtype
    lora: LoRAConfig | None = None
    form: KernelForm = KernelForm()
    attention_implementation: str = "auto"
    expert_implementation: str = "auto"

    def _mlp(self, context: SequenceContext | DecodeContext) -> Callable[[jax.Array], jax.Array]:
        """The feed-forward part: one MLP, or experts."""
        if not self.config.num_experts:
            return MLP(self.config, self.dtype, self.lora, self.form, name="mlp")
        experts = MoE(self.config, self.dtype, self.expert_implementation, name="mlp")
        return partial(experts, real=context.key_mask if isinstance(context, SequenceContext) else None)

    def _added(self, x: jax.Array, name: str) -> jax.Array:
        """The result of attention or MLP (`name`) as added to the sum: normed, dropped and scaled as configured."""
        c, rate = self.config, self.config.residual_dropout
        if c.norm_placement in ("branch", "sandwich"):
            x = Norm(c, self.dtype, name=f"{name}_out_norm")(x)
        x = nn.Dropout(rate, deterministic=rate == 0 or not self.has_rng("dropout"))(x)
        return scaled(x, c.residual_scale)

    @nn.compact
    def __call__(
        self, x: jax.Array, context: SequenceContext | DecodeContext, options: LayerOptions, cache: Cache | None = None
    ) -> tuple[jax.Array, Cache | None]:
        c = self.config
        attend = Attention(c, self.dtype, self.lora, self.form, self.attention_implementation, name="attn")
        mlp = self._mlp(context)
        shared = c.residual == "parallel_shared_norm"

        def norm(x: jax.Array, name: str) -> jax.Array:
            return x if c.norm_placement == "branch" else Norm(c, self.dtype, name=name)(x)

        if c.residual != "sequential":
            normed = norm(x, "attn_norm")
            attended, cache = attend(normed, context, options, cache)
            produced = mlp(normed if shared else norm(x, "mlp_norm"))
            x = x + self._added(attended, "attn") + self._added(produced, "mlp")
        elif c.norm_placement == "post":
            attended, cache = attend(x, context, options, cache)
            x = norm(x + self._added(attended, "attn"), "attn_norm")
            x = norm(x + self._added(mlp(x), "mlp"), "mlp_norm")
        else:
            normed = norm(x, "attn_norm")
            attended, cache = attend(normed, context, options, cache)
            x = (normed if c.residual_from_norm else x) + self._added(attended, "attn")
            normed = norm(x, "mlp_norm")
            x = (normed if c.residual_from_norm else x) + self._added(mlp(normed), "mlp")
        return constrain(x, "batch", "sequence", None), cache


class Head(nn.Module):
    """The parameters of an output head: a kernel `[…, E]` with logical `axes`, and optionally a bias per output."""

    shape: tuple[int, ...]
    axes: tuple[str, ...]
    use_bias: bool
    stddev: float

    @nn.compact
    def __call__(self) -> tuple[jax.Array, jax.Array | None]:
        kernel = _parameter(self, "kernel", nn.initializers.normal(self.stddev), self.shape, self.axes)
        if not self.use_bias:
            return kernel, None
        return kernel, _parameter(self, "bias", nn.initializers.zeros, self.shape[:-1] or (1,), self.axes[:1])
