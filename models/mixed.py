"""The layers of a decoder in which some have experts and some one MLP (`DecoderConfig.dense_layers`).

Attention and norms of all layers are stacked `[L, …]`, as in any decoder. The feed-forward parts are two stacks, each
with an entry for its own layers only: `mlp` of the sparse ones and `dense_mlp` of the others. So nothing is stored, or
trained, that no layer reads. The forward pass scans over runs of layers that follow one pattern (`segments`).
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxrlhf.models.config import DENSE_STACK, MLP_STACKS, SPARSE_STACK, DecoderConfig, LoRAConfig
from jaxrlhf.models.layer_options import LayerOptions
from jaxrlhf.models.layers import Block
from jaxrlhf.models.moe import ROUTER_SUMS
from jaxrlhf.models.sequences import SequenceContext

PyTree = Any
LONGEST_PATTERN = 8


class Segment(NamedTuple):
    """Layers that repeat a pattern."""

    start: int
    """Number of the first layer."""
    pattern: tuple[bool, ...]
    """True for each dense layer of the pattern."""
    repeats: int

    @property
    def stop(self) -> int:
        """Number of the first layer after it."""
        return self.start + self.repeats * len(self.pattern)


def segments(config: DecoderConfig) -> list[Segment]:
    """The layers as runs of patterns, each as long as possible: `dense × 3, sparse × 58` or `(dense, sparse) × 12`."""
    dense = tuple(i in config.dense_layers for i in range(config.num_layers))
    found: list[Segment] = []
    start = 0
    while start < len(dense):
        choices = [_repeated(dense, start, length) for length in range(1, LONGEST_PATTERN + 1)]
        best = max(choices, key=lambda s: (s.stop if s.repeats > 1 else start + 1, -len(s.pattern)))
        found.append(best)
        start = best.stop
    return found


def _repeated(dense: tuple[bool, ...], start: int, length: int) -> Segment:
    """The next `length` layers, as often as they follow each other."""
    pattern, repeats = dense[start : start + length], 1
    while dense[start + repeats * length : start + (repeats + 1) * length] == pattern:
        repeats += 1
    return Segment(start, pattern, repeats)


def block_config(config: DecoderConfig, layer: int) -> DecoderConfig:
    """The configuration of a layer's block: without experts in a dense layer."""
    dense = layer in config.dense_layers
    return config.replace(num_experts=0, dense_layers=()) if dense else config


def stacks_of(layers: PyTree, config: DecoderConfig, layer: int) -> PyTree:
    """The part of a tree of stacked layers that one layer has, by the names that its block gives them."""
    if not config.dense_layers:
        return layers
    own = DENSE_STACK if layer in config.dense_layers else SPARSE_STACK
    return {name: x for name, x in layers.items() if name not in MLP_STACKS} | {SPARSE_STACK: layers[own]}


def layer_params(layers: PyTree, config: DecoderConfig, layer: int) -> PyTree:
    """The parameters of one layer, as its block reads them."""
    if not config.dense_layers:
        return jax.tree.map(lambda x: x[layer], layers)
    own = config.stack(DENSE_STACK if layer in config.dense_layers else SPARSE_STACK).index(layer)
    return {
        name: jax.tree.map(lambda x, i=own if name == SPARSE_STACK else layer: x[i], stack)
        for name, stack in stacks_of(layers, config, layer).items()
    }


class _Layer(nn.Module):
    """A block under the name `layers`, by which targets of adapters find its projections."""

    layers: Block

    def __call__(self, x: jax.Array, context: SequenceContext, options: LayerOptions) -> jax.Array:
        return self.layers(x, context, options)[0]


class MixedLayers(nn.Module):
    """All layers of a mixed decoder, in place of the scan over equal ones."""

    config: DecoderConfig
    dtype: jnp.dtype
    lora: LoRAConfig | None
    wrap: Callable[..., Any]
    """Wraps the function that computes a layer: rematerialisation."""
    attention_implementation: str = "auto"
    expert_implementation: str = "auto"

    @nn.compact
    def __call__(self, x: jax.Array, context: SequenceContext, options: LayerOptions) -> tuple[jax.Array, None]:
        """Computes `[B, T, D]` of `x` `[B, T, D]`; the second result stands for the caches that there are none of.

        Args:
            x: Embedded tokens.
            context: Their sequences.
            options: Of each layer, with leading axes `[L]`.
        """
        if self.is_initializing():
            self._create(x, context, options)
            return x, None
        params: PyTree = {name: self.get_variable("params", name) for name in self.variables["params"]}
        keys = jax.random.split(self.make_rng("dropout"), self.config.num_layers) if self.has_rng("dropout") else None
        sums = []
        for segment in segments(self.config):
            x, found = self._run(segment, x, params, context, (options, keys))
            sums.append(found)
        if self.is_mutable_collection(ROUTER_SUMS):
            joined = jax.tree.map(lambda *parts: jnp.concatenate(parts), *(part for part in sums if part is not None))
            self.put_variable(ROUTER_SUMS, SPARSE_STACK, joined)
        return x, None

    def _layer(self, layer: int) -> _Layer:
        block = Block(
            block_config(self.config, layer),
            self.dtype,
            self.lora,
            attention_implementation=self.attention_implementation,
            expert_implementation=self.expert_implementation,
            parent=None,
        )
        return _Layer(block, parent=None)

    def _create(self, x: jax.Array, context: SequenceContext, options: LayerOptions) -> None:
        """Creates the stacks, each with random values of its own for every layer."""
        c = self.config
        option = jax.tree.map(lambda o: o[0], options)

        def fresh(layer: int, key: jax.Array) -> PyTree:
            return self._layer(layer).init(key, x, context, option)["params"]["layers"]

        parts = jax.eval_shape(partial(fresh, c.stack(SPARSE_STACK)[0]), jax.random.key(0))
        for stack in (*parts, DENSE_STACK):
            layers, part = c.stack(stack), SPARSE_STACK if stack == DENSE_STACK else stack

            def init(key: jax.Array, layers: tuple[int, ...] = layers, part: str = part) -> PyTree:
                stacked = jax.vmap(lambda key: fresh(layers[0], key)[part])(jax.random.split(key, len(layers)))
                return nn.meta.add_axis(stacked, 0, {nn.PARTITION_NAME: "layers"})

            self.param(stack, init)

    def _run(
        self, segment: Segment, x: jax.Array, params: PyTree, context: SequenceContext, of_layers: PyTree
    ) -> tuple[jax.Array, PyTree]:
        """Scans over a segment. Returns the hidden states and the sums of its routers, or None where it has none."""
        records = self.is_mutable_collection(ROUTER_SUMS)
        modules = [self._layer(segment.start + j) for j in range(len(segment.pattern))]

        def compute(j: int) -> Callable[..., tuple[jax.Array, PyTree]]:
            def layer(
                x: jax.Array, params: PyTree, context: SequenceContext, options: LayerOptions, key: jax.Array | None
            ) -> tuple[jax.Array, PyTree]:
                rngs = None if key is None else {"dropout": key}
                kept = [ROUTER_SUMS] if records else False
                result = modules[j].apply({"params": {"layers": params}}, x, context, options, rngs=rngs, mutable=kept)
                return cast(Any, result if records else (result, {}))

            return self.wrap(layer)

        layers = [compute(j) for j in range(len(segment.pattern))]

        def step(x: jax.Array, part: tuple[PyTree, PyTree]) -> tuple[jax.Array, PyTree]:
            params, (options, keys) = part
            found = []
            for j, dense in enumerate(segment.pattern):
                own = _nth(params, segment.pattern, j)
                option, key = jax.tree.map(lambda v, j=j: v[j], (options, keys))
                x, state = layers[j](x, own, context, option, key)
                if records and not dense:
                    found.append(state[ROUTER_SUMS]["layers"][SPARSE_STACK])
            return x, jax.tree.map(lambda *parts: jnp.stack(parts), *found) if found else None

        scanned = {name: _cut(stack, segment, self.config.stack(name)) for name, stack in params.items()}
        scanned = {name: stack for name, stack in scanned.items() if stack is not None}
        every = _cut(of_layers, segment, tuple(range(self.config.num_layers)))
        x, sums = jax.lax.scan(step, x, (scanned, every))
        return x, sums if sums is None else jax.tree.map(lambda s: s.reshape(-1, *s.shape[2:]), sums)


def _cut(stack: PyTree, segment: Segment, layers: tuple[int, ...]) -> PyTree | None:
    """The entries of a stack that a segment reads, `[repeats, n, …]`; None where it reads none."""
    own = [k for k, layer in enumerate(layers) if segment.start <= layer < segment.stop]
    if not own:
        return None
    n = len(own) // segment.repeats
    return jax.tree.map(lambda v: v[own[0] : own[-1] + 1].reshape(segment.repeats, n, *v.shape[1:]), stack)


def _nth(params: PyTree, pattern: tuple[bool, ...], j: int) -> PyTree:
    """The parameters of the pattern's layer `j`, out of one repetition of the stacks."""
    place = {SPARSE_STACK: pattern[:j].count(False), DENSE_STACK: pattern[:j].count(True)}
    own, other = (DENSE_STACK, SPARSE_STACK) if pattern[j] else (SPARSE_STACK, DENSE_STACK)

    def entry(name: str) -> PyTree:
        at = place.get(name, j)
        return jax.tree.map(lambda v: v[at], params[name])

    return {SPARSE_STACK if name == own else name: entry(name) for name in params if name != other}


def read_shapes(config: DecoderConfig, layers: PyTree) -> set[tuple[int, ...]]:
    """The shapes in which the scans of a mixed decoder read its stacked parameters; empty for any other decoder."""
    if not config.dense_layers:
        return set()
    found = set()
    for segment in segments(config):
        for name, stack in layers.items():
            n = sum(segment.start <= i < segment.stop for i in config.stack(name)) // segment.repeats
            for shape in (x.shape[1:] for x in jax.tree.leaves(stack)):
                found |= {(segment.repeats * n, *shape), (segment.repeats, n, *shape), (segment.repeats, *shape)}
    return found
