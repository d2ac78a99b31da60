"""The one decoder: embeddings, scanned blocks and a language-model or scalar head, as a Flax linen module.

Training and scoring scan `Block` over stacked parameters. Prefill and decode (models/decode.py) run it layer by layer
with an explicit key/value cache. Dropout is active exactly when a `dropout` RNG is passed to `apply`.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxrlhf.kernels import project_logits
from jaxrlhf.models.config import DecoderConfig, LoRAConfig
from jaxrlhf.models.head import head_logprobs
from jaxrlhf.models.layer_options import layer_options
from jaxrlhf.models.layers import PRODUCT, Block, Head, Norm, Projection, scaled
from jaxrlhf.models.mixed import MixedLayers
from jaxrlhf.models.moe import ROUTER_SUMS
from jaxrlhf.models.sequences import sequence_context
from jaxrlhf.models.token_rows import TokenRows, look_up, replace_rows
from jaxrlhf.sharding import check_columns, constrain, platform, split

# What the forward pass of a block keeps for the backward pass. "none" recomputes nothing and keeps all of it; "full"
# keeps the block's input only; "dots" keeps the results of its projections.
REMAT_POLICIES = {
    "none": None,
    "full": None,
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        jax.checkpoint_policies.save_only_these_names(PRODUCT),
    ),
}

READ_ELEMENTS = 1 << 24
"""Log-probs per device that `Decoder.read_distributions` works on at a time."""
PyTree = Any


def read_columns(x: jax.Array, start: jax.Array, count: int) -> jax.Array:
    """Reads `count` columns of `x` `[B, T, …]` from column `start` `[B]` on: `[B, count, …]`."""
    read = jax.vmap(partial(jax.lax.dynamic_slice_in_dim, slice_size=count))(x, start)
    return constrain(read, "batch", *[None] * (x.ndim - 1))


def place_columns(x: jax.Array, start: jax.Array, length: int) -> jax.Array:
    """The inverse of `read_columns`: zeros `[B, length]` with `x` `[B, count]` from column `start` `[B]` on."""
    blank = jnp.zeros((x.shape[0], length), x.dtype)
    return jax.vmap(partial(jax.lax.dynamic_update_slice_in_dim, axis=0))(blank, x, start)


def repeat_values(values: jax.Array, own: jax.Array, segment_ids: jax.Array | None = None) -> jax.Array:
    """Replaces each of `values` `[B, T]` that is not `own` by the last own one before it.

    The first value of a row, or of a segment of packed rows, stands for those before its first own one.
    """
    if segment_ids is not None:
        own |= segment_ids != jnp.roll(segment_ids, 1, axis=1)
    columns = jnp.where(own, jnp.arange(values.shape[1]), 0)
    return jnp.take_along_axis(values, jax.lax.cummax(columns, axis=1), axis=1)


class Decoder(nn.Module):
    """The decoder: `apply({"params": params}, input_ids, attention_mask, segment_ids)` computes logits or values.

    With head "lm" the result is logits `[B, T, V]`, with head "scalar" values `[B, T]`; both are float32. Parameters
    are created in float32.
    """

    config: DecoderConfig
    head: str = "lm"
    """"lm" or "scalar"."""
    dtype: jnp.dtype = jnp.float32
    """Compute dtype."""
    remat: str = "none"
    """One of REMAT_POLICIES: what the backward pass recomputes of a block."""
    lora: LoRAConfig | None = None
    """Adapters (models/lora.py); None: the model has none."""
    added_tokens: int = 0
    """Rows that `resize_vocabulary` has added since the model was loaded; adapters train them too."""
    zero_stage: int = 3
    """How parameters lie on a mesh (models/model.py); changes no result."""
    attention_implementation: str = "auto"
    """One of kernels.IMPLEMENTATIONS. "cudnn" and "tokamax" apply to training and scoring; generation uses "auto"."""
    logprob_implementation: str = "auto"
    """Kernel of token log-probs."""
    expert_implementation: str = "auto"
    """One of models.moe.EXPERT_IMPLEMENTATIONS."""
    kv_cache_dtype: str = "auto"
    """One of kernels.KV_CACHE_DTYPES: how generation stores keys and values."""

    def setup(self) -> None:
        c = self.config
        table = nn.with_logical_partitioning(nn.initializers.normal(c.initializer_range), ("vocab", "embed"))
        self.embed = nn.Embed(c.padded_vocab_size, c.embedding_size, embedding_init=table, dtype=self.dtype)
        trained = () if self.lora is None else self.lora.trained_tokens
        if trained:
            self.embed_rows = TokenRows((len(trained), c.embedding_size))
            if self.head == "lm" and not c.tie_embeddings:
                self.head_rows = TokenRows((len(trained), c.embedding_size))
        if c.position == "learned":
            table = nn.with_logical_partitioning(nn.initializers.normal(c.initializer_range), ("position", "embed"))
            self.embed_positions = nn.Embed(
                c.max_positions + c.position_offset, c.hidden_size, embedding_init=table, dtype=self.dtype
            )
        if c.embedding_size != c.hidden_size:
            narrow, wide = (c.embedding_size,), (c.hidden_size,)
            self.project_in = Projection(c, narrow, wide, ("embed",), ("mlp",), False, self.dtype, self.lora)
            self.project_out = Projection(c, wide, narrow, ("mlp",), ("embed",), False, self.dtype, self.lora)
        if c.embed_norm:
            self.embed_norm = Norm(c, self.dtype)
        self.layers = self._mixed_layers() if c.dense_layers else self._equal_layers()
        if c.final_norm:
            self.final_norm = Norm(c, self.dtype)
        self.embed_drop = nn.Dropout(c.embed_dropout)
        if self.head == "scalar":
            # Stiennon et al. 2020 (arXiv 2009.01325), appendix C: N(0, 1/(d+1)) for a fresh reward head.
            self.score = Head((c.embedding_size,), ("norm",), c.score_bias, (c.embedding_size + 1) ** -0.5)
        elif not c.tie_embeddings:
            shape = (c.padded_vocab_size, c.embedding_size)
            self.lm_head = Head(shape, ("vocab", "embed"), c.lm_head_bias, c.initializer_range)

    def _equal_layers(self) -> nn.Module:
        """All layers as one scan over stacked parameters."""
        policy = REMAT_POLICIES[self.remat]
        block = Block if self.remat == "none" else nn.remat(Block, prevent_cse=False, policy=policy)
        return nn.scan(
            block,
            variable_axes={"params": 0, ROUTER_SUMS: 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=cast(Any, (nn.broadcast, 0)),
            length=self.config.num_layers,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )(
            self.config,
            self.dtype,
            self.lora,
            attention_implementation=self.attention_implementation,
            expert_implementation=self.expert_implementation,
        )

    def _mixed_layers(self) -> MixedLayers:
        """The layers of a model some of whose layers have no experts."""
        policy = REMAT_POLICIES[self.remat]
        remat = partial(jax.checkpoint, prevent_cse=False, policy=policy)
        return MixedLayers(
            self.config,
            self.dtype,
            self.lora,
            (lambda layer: layer) if self.remat == "none" else remat,
            attention_implementation=self.attention_implementation,
            expert_implementation=self.expert_implementation,
        )

    def embed_tokens(self, input_ids: jax.Array, positions: jax.Array) -> jax.Array:
        """Computes token and position embeddings `[B, T, D]` of int ids and positions `[B, T]`."""
        c = self.config
        x = self.embed(input_ids)
        if self.lora is not None and self.lora.trained_tokens:
            x = look_up(x, input_ids, self.lora.trained_tokens, self.embed_rows())
        x = scaled(x, c.embed_scale)
        if c.embed_scale_sqrt:
            x = x * jnp.asarray(c.hidden_size**0.5, self.dtype)
        if c.embedding_size != c.hidden_size:
            x = self.project_in(x)
        if c.embed_norm:
            x = self.embed_norm(x)
        if c.position == "learned":
            # Gathered before the look-up: XLA cannot read rows that are split by batch from a table that is split by
            # width without copying the table.
            table = constrain(self.embed_positions.embedding.astype(self.dtype), None, None)
            x = x + jnp.take(table, positions + c.position_offset, axis=0)
        x = self.embed_drop(x, deterministic=c.embed_dropout == 0 or not self.has_rng("dropout"))
        return constrain(x, "batch", "sequence", None)

    def finish(self, x: jax.Array) -> jax.Array:
        """Applies the final norm and projection to `x` `[…, D]`: the hidden states `[…, E]` that a head reads."""
        c = self.config
        if c.final_norm:
            x = self.final_norm(x)
        return self.project_out(x) if c.embedding_size != c.hidden_size else x

    def hidden_states(
        self,
        input_ids: jax.Array,
        attention_mask: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        contiguous: bool = False,
    ) -> jax.Array:
        """Computes the final hidden states `[B, T, E]`.

        Args:
            input_ids: int `[B, T]`.
            attention_mask: `[B, T]`, set for real tokens; None: all are real, but for segment 0.
            segment_ids: int `[B, T]` of packed rows: equal for the columns of a sequence, which lie side by side, and
                0 on the padding after them. A token attends to its own sequence; positions restart at 0. None: each
                row is one sequence.
            contiguous: The caller knows that no row has padding between real tokens, which opens the way to kernels
                that cannot see such holes (models/attend.py).
        """
        if not self.is_initializing():
            check_columns(input_ids.shape[1])
        contiguous = contiguous or (attention_mask is None and segment_ids is None)
        mask = jnp.ones(input_ids.shape, bool) if attention_mask is None else attention_mask.astype(bool)
        context = sequence_context(self.config, mask, segment_ids, contiguous=contiguous)
        options = jax.tree.map(lambda *xs: jnp.asarray(xs), *layer_options(self.config))
        x = self.embed_tokens(input_ids, context.positions)
        x, _ = self.layers(x, context, options)
        return self.finish(constrain(x, "batch", "sequence", None))

    def output_weight(self) -> tuple[jax.Array, jax.Array | None]:
        """Returns the stored matrix `[V_padded, E]` of the language-model head, and its bias `[V_padded]` or None."""
        tied = self.config.tie_embeddings
        weight, bias = (self.embed.embedding, None) if tied else self.lm_head()
        if self.lora is not None and self.lora.trained_tokens:
            rows = self.embed_rows() if tied else self.head_rows()
            weight = replace_rows(weight, self.lora.trained_tokens, rows)
        return weight, bias

    def padded_logits(self, hidden: jax.Array) -> jax.Array:
        """Computes float32 logits `[…, V_padded]` of final hidden states `[…, E]`; padded columns are -1e30."""
        weight, bias = self.output_weight()
        c = self.config
        head = weight.astype(self.dtype), bias
        on_cpu = platform() == "cpu"
        return project_logits(hidden, *head, c.vocab_size, scale=c.logit_scale, softcap=c.logit_softcap, on_cpu=on_cpu)

    def __call__(
        self,
        input_ids: jax.Array,
        attention_mask: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        contiguous: bool = False,
    ) -> jax.Array:
        hidden = self.hidden_states(input_ids, attention_mask, segment_ids, contiguous)
        if self.head == "scalar":
            kernel, bias = self.score()
            values = jnp.einsum("bte,e->bt", hidden.astype(jnp.float32), kernel.astype(jnp.float32))
            values = values if bias is None else values + bias.astype(jnp.float32)
            skipped = self.config.score_skips
            return values if skipped is None else repeat_values(values, input_ids != skipped, segment_ids)
        return self.padded_logits(hidden)[..., : self.config.vocab_size]

    def _head(self, hidden: jax.Array, labels: jax.Array, temperature: float) -> tuple[jax.Array, jax.Array]:
        """Log-probs of `labels` `[B, T]` and entropies by the language-model head of `hidden` `[B, T, E]`."""
        weight, bias = self.output_weight()
        return head_logprobs(
            hidden,
            weight,
            bias,
            labels,
            config=self.config,
            temperature=temperature,
            zero_stage=self.zero_stage,
            implementation=self.logprob_implementation,
        )

    def logprobs(
        self,
        input_ids: jax.Array,
        attention_mask: jax.Array | None = None,
        temperature: float = 1.0,
        start: jax.Array | None = None,
        count: int | None = None,
        segment_ids: jax.Array | None = None,
        contiguous: bool = False,
    ) -> tuple[jax.Array, jax.Array]:
        """Computes the log-prob of each token given those before it, and the entropy of its distribution.

        Column t is read from the logits at t-1; column 0 is 0. `[B, T, V]` is never in memory (kernels/logprobs.py).
        In packed rows the results at a segment's first column mean nothing: they are read from another segment.

        Args:
            input_ids: int `[B, T]`.
            attention_mask: `[B, T]`, set for real tokens; None: all are real, but for segment 0.
            temperature: Divides the logits.
            start: int `[B]`: the head computes only `count` columns of each row from this one on, or earlier columns
                where the row ends before. The others are 0. Where the mesh splits the columns of sequences, the head
                computes all of them instead, because reading some would gather them on every device.
            count: Columns per row with `start`.
            segment_ids: int `[B, T]` of packed rows, as `hidden_states` takes them.
            contiguous: As `hidden_states` takes it.

        Returns:
            Log-probs and entropies in nats, float32 `[B, T]` each.
        """
        hidden = self.hidden_states(input_ids, attention_mask, segment_ids, contiguous)
        length = hidden.shape[1] - 1
        width = length if count is None else min(count, length)
        first = None if start is None else jnp.clip(start - 1, 0, length - width)
        if split("sequence", hidden.shape[1]) > 1:
            labels = jnp.pad(input_ids[:, 1:], ((0, 0), (0, 1)))  # the last one means nothing, but the split stays even
            results = [x[:, :-1] for x in self._head(hidden, labels, temperature)]
            if first is not None:
                column = jnp.arange(length) - first[:, None]
                results = [jnp.where((column >= 0) & (column < width), x, 0.0) for x in results]
        elif first is None:
            results = self._head(hidden[:, :-1], input_ids[:, 1:], temperature)
        else:
            labels = read_columns(input_ids[:, 1:], first, width)
            results = self._head(read_columns(hidden[:, :-1], first, width), labels, temperature)
            results = [place_columns(x, first, length) for x in results]
        logprobs, entropy = (jnp.pad(x, ((0, 0), (1, 0))) for x in results)
        return logprobs, entropy

    def read_distributions(
        self,
        input_ids: jax.Array,
        attention_mask: jax.Array | None,
        read: Callable[..., PyTree],
        *given: jax.Array,
        temperature: float = 1.0,
        segment_ids: jax.Array | None = None,
        contiguous: bool = False,
    ) -> PyTree:
        """Applies a function to the distribution of every token given those before it.

        A few columns are worked on at a time and computed again for the gradient, so that `[B, T, V]` is never in
        memory. Column t is read from the logits at t-1; column 0 of the results is 0.

        Args:
            input_ids: int `[B, T]`.
            attention_mask: `[B, T]`, set for real tokens; None: all are real, but for segment 0.
            read: `(log-probs [B, t, V], *given [B, t, …])` → arrays `[B, t, …]`.
            given: `[B, T, …]` each.
            temperature: Divides the logits.
            segment_ids: int `[B, T]` of packed rows, as `hidden_states` takes them.
            contiguous: As `hidden_states` takes it.

        Returns:
            What `read` returns, of all columns: `[B, T, …]`.
        """
        hidden = self.hidden_states(input_ids, attention_mask, segment_ids, contiguous)
        weight, bias = self.output_weight()
        c, on_cpu, head = self.config, platform() == "cpu", weight.astype(self.dtype)
        batch, length = input_ids.shape[0], input_ids.shape[1] - 1
        width = min(length, max(1, READ_ELEMENTS * split("batch", batch) // (batch * c.vocab_size)))
        blocks = -(-length // width)

        def cut(x: jax.Array) -> jax.Array:
            x = jnp.pad(x, ((0, 0), (0, blocks * width - length), *[(0, 0)] * (x.ndim - 2)))
            return jnp.moveaxis(x.reshape(batch, blocks, width, *x.shape[2:]), 1, 0)

        @jax.checkpoint
        def of_block(block: tuple[jax.Array, ...]) -> PyTree:
            hidden, *given = block
            logits = project_logits(
                hidden, head, bias, c.vocab_size, scale=c.logit_scale, softcap=c.logit_softcap, on_cpu=on_cpu
            )
            return read(jax.nn.log_softmax(logits[..., : c.vocab_size] / temperature), *given)

        def whole(x: jax.Array) -> jax.Array:
            x = jnp.moveaxis(x, 0, 1).reshape(batch, blocks * width, *x.shape[3:])[:, :length]
            return jnp.pad(x, ((0, 0), (1, 0), *[(0, 0)] * (x.ndim - 2)))

        return jax.tree.map(whole, jax.lax.map(of_block, (cut(hidden[:, :-1]), *(cut(x[:, 1:]) for x in given))))
