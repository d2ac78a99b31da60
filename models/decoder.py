"""The one decoder: embeddings, scanned blocks and a language-model or scalar head, as Flax linen modules.

The same `Block` runs in three ways: scanned over stacked parameters (training, scoring), and layer by layer with an
explicit key/value cache (prefill and decode, see models/decode.py). Dropout is active exactly when a `dropout` RNG is
passed to `apply`.
"""

import math
from collections.abc import Callable
from functools import partial

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from jaxrlhf.kernels import LIBRARIES, Cache, entries, project_logits, write_columns
from jaxrlhf.models.attend import attend_to_cache, attend_to_sequence
from jaxrlhf.models.config import DecoderConfig, LoRAConfig
from jaxrlhf.models.head import head_logprobs
from jaxrlhf.models.rotary import rotate, rotation
from jaxrlhf.sharding import constrain

_ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "relu": nn.relu,
    "gelu": lambda x: nn.gelu(x, approximate=False),
    "gelu_new": lambda x: nn.gelu(x, approximate=True),
    "silu": nn.silu,
}

# What is kept of a block's forward pass: all of it; nothing but its input; the results of its projections.
REMAT_POLICIES = {
    "none": None,
    "full": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


@flax.struct.dataclass
class AttentionContext:
    """What every layer's attention needs to know about the batch."""

    key_mask: jax.Array | None = None
    """`[B, T]` bool: which columns hold real tokens. Not for decoding."""
    positions: jax.Array | None = None
    """`[B, T]` int: each column's position within its sequence (0 where masked). Not for decoding."""
    rotation: tuple[jax.Array, jax.Array] | None = None
    """cos and sin of the *query* columns, `[B, 1, T, rotated/2]`."""
    write_index: jax.Array | None = None
    """Decoding: the cache column of the one new token, one for all rows or `[B]`."""
    start: jax.Array | None = None
    """Decoding: the first live cache column of each row, int `[B]`."""


@flax.struct.dataclass
class LayerOptions:
    """What differs between layers: scalars when unrolled, `[L]` arrays when scanned."""

    scale: jax.Array | float
    window: jax.Array | int


def layer_options(config: DecoderConfig) -> list[LayerOptions]:
    """The options of each layer, in order."""
    scale = config.head_dim**-0.5 if config.attention_scale is None else config.attention_scale
    windows = config.windows or (0,) * config.num_layers
    return [
        LayerOptions(scale=scale / (i + 1 if config.scale_by_inverse_layer else 1), window=windows[i])
        for i in range(config.num_layers)
    ]


def positions_from_mask(mask: jax.Array) -> jax.Array:
    """Position of each column within its sequence `[B, T]`: counts real tokens, 0 on padding."""
    mask = mask.astype(jnp.int32)
    return jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0) * mask


def alibi_slopes(num_heads: int) -> jax.Array:
    """ALiBi slopes `[H]` float32 (Press et al. 2021, arXiv 2108.12409, with its rule for other head counts)."""
    power = 2 ** (num_heads.bit_length() - 1)
    slopes = [2.0 ** (-8.0 * (i + 1) / power) for i in range(power)]
    slopes += [2.0 ** (-4.0 * (2 * i + 1) / power) for i in range(num_heads - power)]
    return jnp.asarray(slopes, jnp.float32)


def _kernel_init(config: DecoderConfig, axes: tuple[str | None, ...]):
    return nn.with_logical_partitioning(nn.initializers.normal(config.initializer_range), axes)


class Norm(nn.Module):
    """LayerNorm or RMSNorm over the last axis, computed in float32."""

    config: DecoderConfig
    dtype: jnp.dtype
    kind: str | None = None
    size_axis: str | None = "norm"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kind = self.kind or self.config.norm
        size = x.shape[-1]
        scale = self.param("scale", nn.with_logical_partitioning(nn.initializers.ones, (self.size_axis,)), (size,))
        x = x.astype(jnp.float32)
        if kind == "layernorm":
            x = x - x.mean(-1, keepdims=True)
        x = x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + self.config.norm_eps)
        x = x * scale.astype(jnp.float32)
        if kind == "layernorm":
            bias = self.param("bias", nn.with_logical_partitioning(nn.initializers.zeros, (self.size_axis,)), (size,))
            x = x + bias.astype(jnp.float32)
        return x.astype(self.dtype)


def _contract(x: jax.Array, kernel: jax.Array, count: int) -> jax.Array:
    """The last `count` axes of `x` against the first ones of `kernel`."""
    dims = (tuple(range(x.ndim - count, x.ndim)), tuple(range(count)))
    return jax.lax.dot_general(x, kernel, (dims, ((), ())))


def _adapter_init(inputs: int, axes: tuple[str | None, ...]):
    # U(-1/√inputs, 1/√inputs): what PEFT starts A from
    bound = inputs**-0.5
    draw = lambda key, shape, dtype=jnp.float32: jax.random.uniform(key, shape, dtype, -bound, bound)  # noqa: E731
    return nn.with_logical_partitioning(draw, axes)


class Projection(nn.Module):
    """A linear map contracting the last `len(in_axes)` axes of its input; logical axes name kernel and bias.

    With adapters at this path there are two more leaves: `lora_a` `[in…, r]` and `lora_b` `[r, out…]`.
    """

    config: DecoderConfig
    in_shape: tuple[int, ...]
    out_shape: tuple[int, ...]
    in_axes: tuple[str, ...]
    out_axes: tuple[str, ...]
    use_bias: bool
    dtype: jnp.dtype
    lora: LoRAConfig | None = None

    def _adapter(self, x: jax.Array) -> jax.Array:
        rank, rate = self.lora.rank, self.lora.dropout
        init_a = _adapter_init(math.prod(self.in_shape), (*self.in_axes, None))
        init_b = nn.with_logical_partitioning(nn.initializers.zeros, (None, *self.out_axes))
        a = self.param("lora_a", init_a, (*self.in_shape, rank))
        b = self.param("lora_b", init_b, (rank, *self.out_shape))
        x = nn.Dropout(rate, deterministic=rate == 0 or not self.has_rng("dropout"))(x)
        return _contract(_contract(x, a.astype(self.dtype), len(self.in_shape)), b.astype(self.dtype), 1)

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = self.in_shape + self.out_shape
        kernel = self.param("kernel", _kernel_init(self.config, self.in_axes + self.out_axes), shape)
        x = x.astype(self.dtype)
        y = _contract(x, kernel.astype(self.dtype), len(self.in_shape))
        if self.use_bias:
            axes = self.out_axes if self.out_axes != ("embed",) else ("norm",)
            bias = self.param("bias", nn.with_logical_partitioning(nn.initializers.zeros, axes), self.out_shape)
            y = y + bias.astype(self.dtype)
        if self.lora is not None and self.lora.matches("/".join(self.path)):
            y = y + self._adapter(x) * self.lora.scale
        return y


def place_columns(x: jax.Array, start: jax.Array, length: int) -> jax.Array:
    """The inverse: `x` `[B, count]` from columns `start` `[B]` on of `[B, length]`, zeros elsewhere."""
    blank = jnp.zeros((x.shape[0], length), x.dtype)
    return jax.vmap(partial(jax.lax.dynamic_update_slice_in_dim, axis=0))(blank, x, start)


def read_columns(x: jax.Array, start: jax.Array, count: int) -> jax.Array:
    """`[B, count, …]`: the columns of `x` `[B, T, …]` from `start` `[B]` on."""
    read = jax.vmap(partial(jax.lax.dynamic_slice_in_dim, slice_size=count))(x, start)
    return constrain(read, "batch", *[None] * (x.ndim - 1))


class Attention(nn.Module):
    """Self-attention. With `qkv_groups` g > 0 query, key and value are one map `qkv`, of which group i of g holds the
    query heads, then the key heads, then the value heads of shard i (models/decode.py makes it)."""

    config: DecoderConfig
    dtype: jnp.dtype
    lora: LoRAConfig | None = None
    qkv_groups: int = 0
    implementation: str = "auto"

    def _heads(self, x: jax.Array) -> list[jax.Array]:
        """Query, key and value, each `[B, T, heads, D]`."""
        c, g = self.config, self.qkv_groups
        counts = (c.num_heads, c.num_kv_heads, c.num_kv_heads)

        def project(name: str, shape: tuple[int, ...], axes: tuple[str | None, ...]) -> jax.Array:
            shapes = ((c.hidden_size,), (*shape, c.head_dim), ("embed",), (*axes, "head_dim"))
            return Projection(c, *shapes, c.qkv_bias, self.dtype, self.lora, name=name)(x)

        if not g:
            names = (("query", "heads"), ("key", "kv_heads"), ("value", "kv_heads"))
            return [project(name, (n,), (axis,)) for (name, axis), n in zip(names, counts, strict=True)]
        fused = project("qkv", (g, sum(counts) // g), ("heads", None))
        parts = jnp.split(fused, (counts[0] // g, (counts[0] + counts[1]) // g), axis=-2)
        return [part.reshape(*x.shape[:2], n, c.head_dim) for part, n in zip(parts, counts, strict=True)]

    @nn.compact
    def __call__(
        self, x: jax.Array, context: AttentionContext, options: LayerOptions, cache: Cache | None
    ) -> tuple[jax.Array, Cache | None]:
        c = self.config
        query, key, value = (
            constrain(part.swapaxes(1, 2), "batch", axis, None, None)
            for part, axis in zip(self._heads(x), ("heads", "kv_heads", "kv_heads"), strict=True)
        )
        if c.qk_norm:
            query = Norm(c, self.dtype, kind="rmsnorm", name="query_norm")(query)
            key = Norm(c, self.dtype, kind="rmsnorm", name="key_norm")(key)
        if context.rotation is not None:
            query = rotate(query, *context.rotation, interleaved=c.rotary_interleaved)
            key = rotate(key, *context.rotation, interleaved=c.rotary_interleaved)

        decoding = context.write_index is not None
        implementation = self.implementation
        if implementation in LIBRARIES and cache is not None:
            implementation = "auto"  # they have no form for what generation needs: left padding, one query
        first, *others = layer_options(c)
        if all(other == first for other in others):
            options = first  # as plain numbers, which some kernels want
        shared = {
            "scale": options.scale,
            "window": options.window,
            "alibi_slopes": alibi_slopes(c.num_heads) if c.position == "alibi" else None,
            "implementation": implementation,
        }
        if self.is_initializing():
            output = query  # parameters are made; what attention gives is of no account
        elif decoding:
            output, cache = attend_to_cache(query, key, value, cache, context.start, context.write_index, **shared)
        else:
            if cache is not None:
                cache = write_columns(cache, entries(key, value, cache), 0)
            dropout = c.attention_dropout > 0 and self.has_rng("dropout")
            output = attend_to_sequence(
                query,
                key,
                value,
                context.key_mask,
                context.positions,
                prefill=cache is not None,
                dropout_rate=c.attention_dropout,
                dropout_key=self.make_rng("dropout") if dropout else None,
                **shared,
            )
        output = constrain(output.swapaxes(1, 2), "batch", None, "heads", None)
        out = Projection(
            c,
            (c.num_heads, c.head_dim),
            (c.hidden_size,),
            ("heads", "head_dim"),
            ("embed",),
            c.out_bias,
            self.dtype,
            self.lora,
            name="out",
        )
        return out(output), cache


class MLP(nn.Module):
    config: DecoderConfig
    dtype: jnp.dtype
    lora: LoRAConfig | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c = self.config
        wide = ((c.hidden_size,), (c.intermediate_size,), ("embed",), ("mlp",), c.mlp_bias, self.dtype, self.lora)
        hidden = Projection(c, *wide, name="up")(x)
        activation = _ACTIVATIONS[c.activation]
        hidden = activation(Projection(c, *wide, name="gate")(x)) * hidden if c.gated_mlp else activation(hidden)
        hidden = constrain(hidden, "batch", None, "mlp")
        narrow = ((c.intermediate_size,), (c.hidden_size,), ("mlp",), ("embed",), c.mlp_bias, self.dtype, self.lora)
        return Projection(c, *narrow, name="down")(hidden)


class Block(nn.Module):
    """One transformer layer. Returns the new hidden states and, when a cache was given, the updated cache."""

    config: DecoderConfig
    dtype: jnp.dtype
    lora: LoRAConfig | None = None
    qkv_groups: int = 0
    attention_implementation: str = "auto"

    def _drop(self, x: jax.Array) -> jax.Array:
        rate = self.config.residual_dropout
        return nn.Dropout(rate, deterministic=rate == 0 or not self.has_rng("dropout"))(x)

    @nn.compact
    def __call__(
        self, x: jax.Array, context: AttentionContext, options: LayerOptions, cache: Cache | None = None
    ) -> tuple[jax.Array, Cache | None]:
        c = self.config
        attend = Attention(c, self.dtype, self.lora, self.qkv_groups, self.attention_implementation, name="attn")
        mlp = MLP(c, self.dtype, self.lora, name="mlp")
        attn_norm = Norm(c, self.dtype, name="attn_norm")
        mlp_norm = None if c.residual == "parallel_shared_norm" else Norm(c, self.dtype, name="mlp_norm")

        if c.residual != "sequential":
            normed = attn_norm(x)
            attended, cache = attend(normed, context, options, cache)
            x = x + self._drop(attended) + self._drop(mlp(normed if mlp_norm is None else mlp_norm(x)))
        elif c.norm_placement == "post":
            attended, cache = attend(x, context, options, cache)
            x = attn_norm(x + self._drop(attended))
            x = mlp_norm(x + self._drop(mlp(x)))
        else:
            normed = attn_norm(x)
            attended, cache = attend(normed, context, options, cache)
            x = (normed if c.residual_from_norm else x) + self._drop(attended)
            normed = mlp_norm(x)
            x = (normed if c.residual_from_norm else x) + self._drop(mlp(normed))
        return constrain(x, "batch", None, None), cache


class Head(nn.Module):
    """The parameters of an output head: a kernel `shape` with logical `axes`, and optionally a bias over axis 0."""

    shape: tuple[int, ...]
    axes: tuple[str, ...]
    use_bias: bool
    stddev: float

    @nn.compact
    def __call__(self) -> tuple[jax.Array | None, jax.Array | None]:
        init = nn.with_logical_partitioning(nn.initializers.normal(self.stddev), self.axes)
        kernel = self.param("kernel", init, self.shape)
        zeros = nn.with_logical_partitioning(nn.initializers.zeros, self.axes[:1])
        return kernel, self.param("bias", zeros, self.shape[:1]) if self.use_bias else None


class Decoder(nn.Module):
    """`apply({"params": params}, input_ids, attention_mask)` → logits `[B, T, V]` (head "lm") or values `[B, T]`.

    Results are float32. `dtype` is the compute dtype, parameters are created in float32; `remat` says what of a block
    the backward pass recomputes (REMAT_POLICIES); `lora` adds adapters (models/lora.py); `zero_stage` how parameters
    lie on a mesh (models/model.py) and changes no result; `attention_implementation` which kernels it takes, one of
    kernels.IMPLEMENTATIONS ("cudnn" and "tokamax": for training and scoring; generation as "auto"),
    `logprob_implementation` likewise that of token log-probs; `kv_cache_dtype`, one of kernels.KV_CACHE_DTYPES, how
    generation holds keys and values.
    """

    config: DecoderConfig
    head: str = "lm"
    dtype: jnp.dtype = jnp.float32
    remat: str = "none"
    lora: LoRAConfig | None = None
    zero_stage: int = 3
    attention_implementation: str = "auto"
    logprob_implementation: str = "auto"
    kv_cache_dtype: str = "auto"

    def setup(self) -> None:
        c = self.config
        table = nn.with_logical_partitioning(nn.initializers.normal(c.initializer_range), ("vocab", "embed"))
        self.embed = nn.Embed(c.padded_vocab_size, c.embedding_size, embedding_init=table, dtype=self.dtype)
        if c.position == "learned":
            table = nn.with_logical_partitioning(nn.initializers.normal(c.initializer_range), ("position", "embed"))
            self.embed_positions = nn.Embed(
                c.max_positions + c.position_offset, c.hidden_size, embedding_init=table, dtype=self.dtype
            )
        if c.embedding_size != c.hidden_size:
            shapes = ((c.embedding_size,), (c.hidden_size,))
            self.project_in = Projection(c, *shapes, ("embed",), ("mlp",), False, self.dtype, self.lora)
            self.project_out = Projection(c, *reversed(shapes), ("mlp",), ("embed",), False, self.dtype, self.lora)
        if c.embed_norm:
            self.embed_norm = Norm(c, self.dtype)
        policy = REMAT_POLICIES[self.remat]
        block = Block if self.remat == "none" else nn.remat(Block, prevent_cse=False, policy=policy)
        self.layers = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=(nn.broadcast, 0),
            length=c.num_layers,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )(c, self.dtype, self.lora, attention_implementation=self.attention_implementation)
        if c.final_norm:
            self.final_norm = Norm(c, self.dtype)
        self.embed_drop = nn.Dropout(c.embed_dropout)
        if self.head == "scalar":
            # Stiennon et al. 2020 (arXiv 2009.01325), appendix C: N(0, 1/(d+1)) for a fresh reward head.
            self.score = Head((c.embedding_size,), ("norm",), False, (c.embedding_size + 1) ** -0.5)
        elif not c.tie_embeddings:
            shape = (c.padded_vocab_size, c.embedding_size)
            self.lm_head = Head(shape, ("vocab", "embed"), c.lm_head_bias, c.initializer_range)

    def embed_tokens(self, input_ids: jax.Array, positions: jax.Array) -> jax.Array:
        """Token and position embeddings `[B, T, D]` of ids and positions `[B, T]`."""
        c = self.config
        x = self.embed(input_ids)
        if c.embedding_size != c.hidden_size:
            x = self.project_in(x)
        if c.embed_norm:
            x = self.embed_norm(x)
        if c.position == "learned":
            # Whole before the look-up: from a table split by width XLA could reach rows split by batch only by copying.
            table = constrain(self.embed_positions.embedding.astype(self.dtype), None, None)
            x = x + jnp.take(table, positions + c.position_offset, axis=0)
        x = self.embed_drop(x, deterministic=c.embed_dropout == 0 or not self.has_rng("dropout"))
        return constrain(x, "batch", None, None)

    def finish(self, x: jax.Array) -> jax.Array:
        """Final norm and out-projection: the hidden states `[…, E]` that a head reads."""
        c = self.config
        if c.final_norm:
            x = self.final_norm(x)
        return self.project_out(x) if c.embedding_size != c.hidden_size else x

    def hidden_states(
        self, input_ids: jax.Array, attention_mask: jax.Array | None = None, position_ids: jax.Array | None = None
    ) -> jax.Array:
        """Final hidden states `[B, T, E]`; without a mask every token is real, positions count real tokens."""
        c = self.config
        mask = jnp.ones(input_ids.shape, bool) if attention_mask is None else attention_mask.astype(bool)
        positions = positions_from_mask(mask) if position_ids is None else position_ids
        context = AttentionContext(
            key_mask=mask,
            positions=positions,
            rotation=rotation(c, positions) if c.position == "rotary" else None,
        )
        options = jax.tree.map(lambda *xs: jnp.asarray(xs), *layer_options(c))
        x = self.embed_tokens(input_ids, positions)
        x, _ = self.layers(x, context, options)
        return self.finish(constrain(x, "batch", None, None))

    def output_weight(self) -> tuple[jax.Array, jax.Array | None]:
        """The language-model head's `[V_padded, E]` matrix as it is stored, and its bias."""
        return (self.embed.embedding, None) if self.config.tie_embeddings else self.lm_head()

    def padded_logits(self, hidden: jax.Array) -> jax.Array:
        """Float32 logits `[…, V_padded]` of final hidden states `[…, E]`; padded columns are -1e30."""
        weight, bias = self.output_weight()
        return project_logits(hidden, weight.astype(self.dtype), bias, self.config.vocab_size)

    def __call__(
        self, input_ids: jax.Array, attention_mask: jax.Array | None = None, position_ids: jax.Array | None = None
    ) -> jax.Array:
        hidden = self.hidden_states(input_ids, attention_mask, position_ids)
        if self.head == "scalar":
            kernel, _ = self.score()
            return jnp.einsum("bte,e->bt", hidden.astype(jnp.float32), kernel.astype(jnp.float32))
        return self.padded_logits(hidden)[..., : self.config.vocab_size]

    def logprobs(
        self,
        input_ids: jax.Array,
        attention_mask: jax.Array | None = None,
        temperature: float = 1.0,
        start: jax.Array | None = None,
        count: int | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """Log-prob of each token given those before it, and the entropy it was drawn from; float32 `[B, T]` each.

        Column t is read from the logits at t-1; column 0 is 0. Never holds `[B, T, V]` (kernels/logprobs.py). With
        `start` int `[B]` and `count` the head runs on `count` columns of each row only, from `start` on (earlier where
        the row ends before; column 0 has none to give); the others are 0.
        """
        hidden, labels = self.hidden_states(input_ids, attention_mask)[:, :-1], input_ids[:, 1:]
        length = labels.shape[1]
        if start is not None:
            count = min(count, length)
            start = jnp.clip(start - 1, 0, length - count)
            hidden, labels = read_columns(hidden, start, count), read_columns(labels, start, count)
        weight, bias = self.output_weight()
        result = head_logprobs(
            hidden,
            weight,
            bias,
            labels,
            vocab_size=self.config.vocab_size,
            temperature=temperature,
            zero_stage=self.zero_stage,
            implementation=self.logprob_implementation,
        )
        if start is not None:
            result = (place_columns(x, start, length) for x in result)
        return tuple(jnp.pad(x, ((0, 0), (1, 0))) for x in result)
