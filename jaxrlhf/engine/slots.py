"""Slots of a server: rows that prompts join and leave at any time, each with sampling parameters of its own.

Two programs do the work. `slot_join` runs the prefill of one prompt, for each width of prompts that occurs, and puts
it into the slots of its samples; `slot_step` decodes one token for every slot. What differs between requests is an
array, so nothing compiles once both have run. A sample depends on its prompt, its seed and its number alone: shapes
are the same whatever the other slots hold.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxrlhf import keys
from jaxrlhf.engine.decoding import batched
from jaxrlhf.engine.hybrid import HybridEngine
from jaxrlhf.engine.sampling import SamplingConfig, sample_token
from jaxrlhf.kernels import Cache
from jaxrlhf.models import Decoder, GenerationView, cast_matrices, decode_step, generation_view, init_cache, prefill
from jaxrlhf.sharding import GENERATE_RULES, abstract, constrain, use

Array = Any
"""A numpy array on the host, a JAX array in a program."""
TOP = 20
"""Likeliest tokens that a step reports of the rows that want them."""
SMALLEST_WIDTH = 32
COMPILERS = 4
"""Most programs that compile at a time."""
WIDEST_RUN = 512
"""Widest prompt that the warm-up runs, and not only compiles, on a CPU: one of 4,096 tokens takes as long as five
compilations."""
SAMPLED, GREEDY = SamplingConfig(1), SamplingConfig(1, temperature=0)


@dataclass(frozen=True)
class SlotSampling:
    """The sampling settings of one sample."""

    seed: int
    """Any integer; its lowest 64 bits count."""
    number: int = 0
    """Number of the sample among those of its request."""
    temperature: float = 1.0
    """0: greedy."""
    top_k: int = 0
    """0: all."""
    top_p: float = 1.0
    top_logprobs: bool = False
    """Report the likeliest tokens too."""


class SlotRows(flax.struct.PyTreeNode):
    """The host's record of each slot, all `[S]`."""

    live: Array
    """bool: the slots that a program works for."""
    column: Array
    """int32: cache column of the last token."""
    length: Array
    """int32: tokens sampled so far."""
    seed: Array
    """uint32 `[S, 2]`: low and high half."""
    number: Array
    temperature: Array
    top_k: Array
    top_p: Array
    top_logprobs: Array
    """bool."""


class Sampled(flax.struct.PyTreeNode):
    """The tokens of one step. Log-probs are those of the model, before temperature, top-k and top-p."""

    token: jax.Array
    """int32 `[S]`; of slots that are not live, the one before."""
    logprob: jax.Array
    """float32 `[S]`."""
    top_tokens: jax.Array
    """int32 `[S, TOP]`, the likeliest first; zeros where no slot wants them."""
    top_logprobs: jax.Array
    """float32 `[S, TOP]`."""


def doubling_widths(longest: int) -> list[int]:
    """The widths 32, 64, 128, … below `longest`, and `longest`."""
    widths = [SMALLEST_WIDTH]
    while widths[-1] < longest:
        widths.append(2 * widths[-1])
    return [*(width for width in widths if width < longest), longest]


def _sample(logits: jax.Array, last: jax.Array, rows: SlotRows) -> Sampled:
    """Samples the next token of each live slot from logits `[S, V]`."""
    logits = batched(logits.astype(jnp.float32))

    def draw(logits: jax.Array) -> jax.Array:
        row_keys = jax.vmap(lambda seed, number: keys.stream(0, keys.Stream.SERVING, *seed, number))(
            rows.seed, rows.number
        )
        # Free slots sample too, but without truncation, which costs something where any row has it.
        truncation = jnp.where(rows.live, rows.top_k, 0), jnp.where(rows.live, rows.top_p, 1.0)
        own = {"temperature": rows.temperature, "truncation": truncation}
        return sample_token(logits, row_keys, rows.length, SAMPLED, **own)[0]

    def greedy(logits: jax.Array) -> jax.Array:
        return sample_token(logits, jnp.zeros(0), rows.length, GREEDY)[0]

    token = jax.lax.cond(jnp.any(rows.live & (rows.temperature > 0)), draw, greedy, logits)
    token = jnp.where(rows.live, token, last)
    total = jax.nn.logsumexp(logits, axis=-1)
    best = min(TOP, logits.shape[-1])

    def likeliest(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
        values, tokens = jax.lax.top_k(logits, best)
        return tokens.astype(jnp.int32), values - total[:, None]

    def nothing(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
        shape = (logits.shape[0], best)
        return jnp.zeros(shape, jnp.int32), jnp.zeros(shape, jnp.float32)

    top_tokens, top_logprobs = jax.lax.cond(jnp.any(rows.live & rows.top_logprobs), likeliest, nothing, logits)
    picked = jnp.take_along_axis(logits, token[:, None], axis=-1)[:, 0]
    return jax.tree.map(batched, Sampled(token, picked - total, top_tokens, top_logprobs))


@partial(jax.jit, static_argnames=("module", "mesh"), donate_argnames="caches")
def slot_step(
    view: GenerationView,
    caches: tuple[Cache, ...],
    last: jax.Array,
    rows: SlotRows,
    *,
    module: Decoder,
    mesh: Mesh,
) -> tuple[Sampled, tuple[Cache, ...]]:
    """Decodes one token for every slot.

    Args:
        view: The model's parameters for generation.
        caches: `[S, H_kv, L, D]` per layer, updated in place.
        last: int32 `[S]`: each slot's last token.
        rows: The slots; those that are not live write to their own cache only.
        module: The model's module.
        mesh: The mesh of generation.
    """
    with use(mesh, GENERATE_RULES):
        logits, caches = decode_step(module, view, last, rows.column, jnp.zeros_like(last), caches)
        return _sample(logits, last, rows), caches


@partial(jax.jit, static_argnames=("module", "mesh"), donate_argnames="caches")
def slot_join(
    view: GenerationView,
    caches: tuple[Cache, ...],
    last: jax.Array,
    ids: jax.Array,
    size: jax.Array,
    rows: SlotRows,
    *,
    module: Decoder,
    mesh: Mesh,
) -> tuple[Sampled, tuple[Cache, ...]]:
    """Puts a prompt into the live slots of `rows`, and samples the first token of each.

    Args:
        view: The model's parameters for generation.
        caches: `[S, H_kv, L, D]` per layer, updated in place.
        last: int32 `[S]`: each slot's last token.
        ids: int32 `[1, P]`, left-padded.
        size: Tokens of the prompt.
        rows: The slots, live where the prompt goes.
        module: The model's module.
        mesh: The mesh of generation.
    """
    width, slots = ids.shape[1], last.shape[0]
    with use(mesh, GENERATE_RULES):
        mask = jnp.arange(width)[None] >= width - size
        longest = caches[0][0].shape[2]
        logits, fresh = prefill(module, view, ids, mask, init_cache(module, 1, width), longest=longest)

        def put(old: jax.Array, new: jax.Array) -> jax.Array:
            # Rows begin in column 0, so that a cache of L columns holds prompts and responses of L tokens.
            new = jnp.roll(new, size - width, axis=2)
            live = rows.live.reshape(-1, *[1] * (old.ndim - 1))
            old = old.at[:, :, :width].set(jnp.where(live, new, old[:, :, :width]))
            return constrain(old, "batch", "kv_heads", *[None] * (old.ndim - 2))

        caches = jax.tree.map(put, caches, fresh)
        return _sample(jnp.broadcast_to(logits, (slots, logits.shape[-1])), last, rows), caches


@partial(jax.jit, static_argnames=("module", "mesh"))
def _view(params, *, module: Decoder, mesh: Mesh) -> GenerationView:
    with use(mesh, GENERATE_RULES):
        view = generation_view(params, module, scan_prefill=True)
        # Prompts come one by one, so the layers that their prefill scans are cast here, not in each of them.
        return view.replace(stacked=None if view.stacked is None else cast_matrices(view.stacked, module.dtype))


@partial(jax.jit, static_argnames=("module", "mesh", "slots", "length"))
def _start(*, module: Decoder, mesh: Mesh, slots: int, length: int) -> tuple[jax.Array, tuple[Cache, ...]]:
    with use(mesh, GENERATE_RULES):
        return batched(jnp.zeros(slots, jnp.int32)), init_cache(module, slots, length)


class SlotBatch:
    """S slots of L cache columns on the devices, and what the host knows of them. Not for several threads at once.

    The weights are copied from the engine in the form that decode reads; the engine need not be kept.

    Args:
        engine: The model and its mesh.
        slots: S.
        length: L, the most tokens of a prompt and its response.
    """

    def __init__(self, engine: HybridEngine, slots: int, length: int) -> None:
        self.slots, self.length = slots, length
        self._static = {"module": engine.module, "mesh": engine.generate_mesh}
        self._view = _view(engine.params, **self._static)
        self._last, self._caches = _start(**self._static, slots=slots, length=length)
        integers, floats = np.zeros(slots, np.int32), np.zeros(slots, np.float32)
        self._rows = SlotRows(
            live=np.zeros(slots, bool),
            column=integers.copy(),
            length=integers.copy(),
            seed=np.zeros((slots, 2), np.uint32),
            number=integers.copy(),
            temperature=floats.copy(),
            top_k=integers.copy(),
            top_p=floats.copy(),
            top_logprobs=np.zeros(slots, bool),
        )

    def widths(self) -> list[int]:
        """The widths of prompts, each with a program of its own: 32, 64, 128, … and L - 1."""
        return doubling_widths(self.length - 1)  # a response has at least one token

    def join(self, prompt: Sequence[int], samples: Mapping[int, SlotSampling]) -> Sampled:
        """Begins samples of one prompt in free slots, and samples the first token of each.

        Args:
            prompt: Token ids, at least one and at most L - 1.
            samples: How each is sampled, by slot.
        """
        rows, size = self._rows, len(prompt)
        for slot, sample in samples.items():
            rows.live[slot], rows.column[slot], rows.length[slot] = True, size, 1
            rows.seed[slot] = sample.seed & 0xFFFFFFFF, sample.seed >> 32 & 0xFFFFFFFF
            rows.number[slot], rows.temperature[slot] = sample.number, sample.temperature
            rows.top_k[slot], rows.top_p[slot] = sample.top_k, sample.top_p
            rows.top_logprobs[slot] = sample.top_logprobs
        live = np.isin(np.arange(self.slots), list(samples))
        new = self._copy(live, length=np.zeros_like(rows.length))
        return self._run(slot_join, *self._prompt(prompt), new)

    def step(self) -> Sampled:
        """Decodes one token for every slot that is taken. The result is of the devices: reading it waits for them."""
        rows = self._rows
        sampled = self._run(slot_step, self._copy(rows.live))
        rows.column[rows.live] += 1
        rows.length[rows.live] += 1
        return sampled

    def leave(self, slot: int) -> None:
        """Frees a slot."""
        self._rows.live[slot] = False

    @property
    def programs(self) -> int:
        """Number of the programs."""
        return len(self.widths()) + 1

    def warm_up(self, ready: Callable[[], object] = lambda: None) -> None:
        """Compiles every program, several at a time, and runs those of short prompts. All slots must be free.

        Args:
            ready: Called when a program is ready.
        """
        arrays = abstract((self._view, self._caches, self._last))
        on_cpu = self._static["mesh"].devices.flat[0].platform == "cpu"
        with ThreadPoolExecutor(min(COMPILERS, os.cpu_count() or 1), "compiles slots") as pool:
            widths = self.widths()
            joins = [pool.submit(self._compile, slot_join, *arrays, *self._prompt([0] * width)) for width in widths]
            step = pool.submit(self._compile, slot_step, *arrays)
            for width, compiled in zip(widths, joins, strict=True):
                compiled.result()
                if width <= WIDEST_RUN or not on_cpu:
                    self.join([0] * width, {})
                ready()
            step.result()
        jax.block_until_ready(self.step())
        ready()

    def _compile(self, program, *arguments) -> None:
        """Compiles a program for these arguments before its rows; the call that follows finds it."""
        program.lower(*arguments, self._copy(self._rows.live), **self._static).compile()

    def _prompt(self, prompt: Sequence[int]) -> tuple[np.ndarray, np.int32]:
        """The token ids of a prompt in the width that holds it, `[1, P]`, and their number."""
        width = next(width for width in self.widths() if width >= len(prompt))
        ids = np.zeros((1, width), np.int32)
        ids[0, width - len(prompt) :] = prompt
        return ids, np.int32(len(prompt))

    def _copy(self, live: np.ndarray, **changes: np.ndarray) -> SlotRows:
        """The rows as they are now: programs run later, and the host goes on changing its own."""
        return jax.tree.map(np.copy, self._rows.replace(live=live, **changes))

    def _run(self, program, *arguments) -> Sampled:
        sampled, self._caches = program(self._view, self._caches, self._last, *arguments, **self._static)
        self._last = sampled.token
        return sampled
