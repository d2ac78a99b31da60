"""Rollouts of several turns: a response goes on after the tokens of an environment, in the same key/value cache.

A row's response fills columns P … P+N-1, whoever its tokens come from. A row whose turn is over waits until the host
gives it the environment's tokens. These then take the place of samples in the decode loop, one per step, while other
rows sample: no token is computed twice. Shapes are those of a fixed batch, so turns compile nothing. A row depends on
its prompt, its key and the tokens that it is given, not on when it waits.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxrlhf.distributed import to_host
from jaxrlhf.engine.decoding import Given, Requests, Rows, advance, batched, begin, repeat
from jaxrlhf.engine.generation import Rollout
from jaxrlhf.engine.sampling import SamplingConfig
from jaxrlhf.models import Decoder, GenerationView, generation_view
from jaxrlhf.sharding import GENERATE_RULES, place_batch, use

PyTree = Any

SHARE = 8
"""The loop returns to the host once a SHARE-th of the rows that it began with wait: a call costs little then, and the
environments work while the other rows go on."""


class Continuations(flax.struct.PyTreeNode):
    """Tokens of the environment, which go on while other rows end their turns and the host gives them theirs."""

    tokens: jax.Array | np.ndarray
    """int32 `[B, N]`, from column 0."""
    left: jax.Array | np.ndarray
    """int32 `[B]`: tokens that are not in the response yet, the first ones of `tokens`."""


class Turns(flax.struct.PyTreeNode):
    """The state between two calls of the loop: B rows with responses of up to N tokens."""

    rows: Rows
    tokens: jax.Array
    """int32 `[B, N]`, of model and environment."""
    logprobs: jax.Array
    """float32 `[B, N]`."""
    sampled: jax.Array
    """bool `[B, N]`: tokens that the model sampled."""
    turn: jax.Array
    """int32 `[B]`: tokens sampled in the current turn."""
    given: Continuations
    steps: jax.Array
    """int32: steps of the decode loop so far."""


@partial(jax.jit, static_argnames=("module", "sampling", "mesh"))
def turns_start(
    params: PyTree,
    requests: Requests,
    live: jax.Array,
    key: jax.Array,
    *,
    module: Decoder,
    sampling: SamplingConfig,
    mesh: Mesh | None,
) -> tuple[GenerationView, Turns]:
    """Reshards the weights, runs the prefill, and samples the first token of the rows of `live`, bool `[B·n]`."""
    longest, copies = sampling.max_new_tokens, sampling.samples_per_prompt
    with use(mesh, GENERATE_RULES):
        view = generation_view(params, module)
        width = requests.ids.shape[1] + longest
        rows, logprob = begin(module, view, requests, key, sampling, cache_length=width, copies=copies)
        first = (jnp.arange(longest) == 0) & live[:, None]
        rows = rows.replace(done=rows.done | ~live, length=jnp.where(live, rows.length, 0))
        state = Turns(
            rows=rows,
            tokens=jnp.where(first, rows.token[:, None], sampling.pad_token_id),
            logprobs=jnp.where(first, logprob[:, None], 0.0),
            sampled=first,
            turn=rows.length,
            given=Continuations(jnp.zeros(first.shape, jnp.int32), jnp.zeros_like(rows.length)),
            steps=jnp.int32(0),
        )
        return view, _pinned(state)


def _pinned(state: Turns) -> Turns:
    """The state with its rows split over the batch axes; the caches are pinned where they are made."""
    names = ("tokens", "logprobs", "sampled", "turn", "given")
    return state.replace(**{name: jax.tree.map(batched, getattr(state, name)) for name in names})


@partial(jax.jit, static_argnames=("module", "sampling", "mesh", "turn_tokens"), donate_argnames="state")
def turns_advance(
    view: GenerationView,
    state: Turns,
    resumed: jax.Array,
    given: Continuations,
    key: jax.Array,
    *,
    module: Decoder,
    sampling: SamplingConfig,
    mesh: Mesh | None,
    turn_tokens: int = 0,
) -> Turns:
    """Decodes until a share of the rows has ended its turn, or all have.

    Args:
        view: The model's parameters for generation.
        state: donated.
        resumed: bool `[B]`: waiting rows that go on.
        given: Tokens of the environment for them.
        key: The rollout's random key.
        module: The model's module.
        sampling: How tokens are sampled; max_new_tokens = N counts those of the environment.
        mesh: The mesh of generation.
        turn_tokens: Longest turn of the model; 0: no bound but N.
    """
    longest = sampling.max_new_tokens
    columns = jnp.arange(longest)
    with use(mesh, GENERATE_RULES):
        prompt_length = state.rows.caches[0][0].shape[2] - longest
        state = _resumed(state, resumed, given)
        begun = ~state.rows.done
        share = jnp.maximum(1, jnp.sum(begun) // SHARE)

        def goes_on(state: Turns) -> jax.Array:
            return jnp.any(~state.rows.done) & (jnp.sum(begun & state.rows.done) < share)

        def step(state: Turns) -> Turns:
            live, old, given = ~state.rows.done, state.rows, state.given
            forced = Given(live & (given.left > 0), jnp.asarray(given.tokens)[:, 0])
            column = prompt_length + jnp.maximum(old.length, 1) - 1
            rows, logprob = advance(module, view, old, column, key, sampling, forced)
            turn = jnp.where(live & ~forced.where, state.turn + 1, state.turn)
            if turn_tokens:
                rows = rows.replace(done=rows.done | (turn >= turn_tokens))
            here = live[:, None] & (columns == old.length[:, None])
            shifted = jnp.where(forced.where[:, None], jnp.roll(given.tokens, -1, axis=1), given.tokens)
            return state.replace(
                rows=rows,
                tokens=jnp.where(here, rows.token[:, None], state.tokens),
                logprobs=jnp.where(here, logprob[:, None], state.logprobs),
                sampled=state.sampled | (here & ~forced.where[:, None]),
                turn=turn,
                given=Continuations(shifted, given.left - forced.where),
                steps=state.steps + 1,
            )

        return _pinned(jax.lax.while_loop(goes_on, step, state))


def _resumed(state: Turns, resumed: jax.Array, given: Continuations) -> Turns:
    """The state in which the rows of `resumed` go on, from their last token and with the tokens that they are given."""
    last = jnp.clip(state.rows.length - 1, 0)[:, None]
    token = jnp.where(resumed, jnp.take_along_axis(state.tokens, last, axis=1)[:, 0], state.rows.token)
    return state.replace(
        rows=state.rows.replace(token=token, done=state.rows.done & ~resumed),
        turn=jnp.where(resumed, 0, state.turn),
        given=Continuations(
            tokens=jnp.where(resumed[:, None], given.tokens, state.given.tokens),
            left=jnp.where(resumed, given.left, state.given.left),
        ),
    )


@partial(jax.jit, static_argnames=("sampling", "mesh"))
def turns_rollout(
    requests: Requests, state: Turns, rewards: jax.Array, *, sampling: SamplingConfig, mesh: Mesh | None
) -> Rollout:
    """The rollout of finished rows; `rewards` float32 `[B, N]` stand at the columns of their tokens."""
    with use(mesh, GENERATE_RULES):
        copies = sampling.samples_per_prompt
        mask = repeat(requests.mask, copies)
        ids = jnp.where(mask, repeat(requests.ids, copies), sampling.pad_token_id)

        def joined(prompt: jax.Array, response: jax.Array) -> jax.Array:
            return batched(jnp.concatenate([prompt, response], axis=1))

        zeros = jnp.zeros(ids.shape, jnp.float32)
        return Rollout(
            tokens=joined(ids, state.tokens),
            mask=joined(mask, jnp.arange(sampling.max_new_tokens) < state.rows.length[:, None]),
            response_mask=joined(jnp.zeros_like(mask), state.sampled),
            logprobs=joined(zeros, state.logprobs),
            prompt_length=ids.shape[1],
            rewards=joined(zeros, rewards),
        )


class EpisodeBatch:
    """Rows of a rollout of several turns, on the devices; made by `HybridEngine.episodes`.

    Every process of a run makes the same calls.

    Args:
        params: The training tree of `module`.
        requests: B prompts, with n = samples_per_prompt rows each.
        live: bool `[B·n]`: the rows to generate; the others stay empty.
        key: Random key. A row's samples depend on its number and on their places in the response.
        static: `module`, `sampling` and `mesh` of the programs.
        turn_tokens: Longest turn of the model; 0: no bound but max_new_tokens.
    """

    def __init__(
        self,
        params: PyTree,
        requests: Requests,
        live: np.ndarray,
        key: jax.Array,
        static: Mapping[str, Any],
        turn_tokens: int = 0,
    ) -> None:
        self.sampling: SamplingConfig = static["sampling"]
        self.longest = self.sampling.max_new_tokens
        self._static, self._requests, self._key, self._turn_tokens = static, requests, key, turn_tokens
        self._view, self._state = turns_start(params, requests, self._place(live), key, **static)
        self.running = live.copy()
        """bool `[B·n]`: rows within a turn; the others wait or are finished."""
        self.lengths = np.zeros(len(live), np.int64)
        """Tokens of each response so far, when its last turn ended."""
        self._begun = np.zeros(len(live), np.int64)

    def room(self, row: int) -> int:
        """Tokens that a waiting row has left, for environment and model."""
        return self.longest - int(self.lengths[row])

    def advance(self, continuations: Mapping[int, Sequence[int]]) -> dict[int, list[int]]:
        """Gives waiting rows the environment's tokens, and decodes until some rows have ended their turn.

        Args:
            continuations: Token ids by row, fewer than it has room for.

        Returns:
            The tokens of the turns that have ended, by row. A turn ends with an end id or a stop sequence, or is cut
            by a limit of tokens.
        """
        rows = len(self.running)
        tokens, count = np.zeros((rows, self.longest), np.int32), np.zeros(rows, np.int32)
        resumed = np.zeros(rows, bool)
        for row, ids in continuations.items():
            if self.running[row] or len(ids) >= self.room(row):
                raise ValueError(f"row {row} does not wait, or has no room for {len(ids)} tokens and a further one")
            tokens[row, : len(ids)], count[row], resumed[row] = ids, len(ids), True
            self._begun[row] = self.lengths[row] + len(ids)
        self.running |= resumed
        given = self._place((resumed, Continuations(tokens, count)))
        self._state = turns_advance(
            self._view, self._state, *given, self._key, turn_tokens=self._turn_tokens, **self._static
        )
        done, length, ids = to_host((self._state.rows.done, self._state.rows.length, self._state.tokens))
        ended = np.flatnonzero(self.running & done)
        self.running[ended] = False
        self.lengths[ended] = length[ended]
        return {int(row): ids[row, self._begun[row] : length[row]].tolist() for row in ended}

    @property
    def steps(self) -> int:
        """Steps of the decode loop so far, each of one token for every row."""
        return int(to_host(self._state.steps))

    def rollout(self, rewards: Mapping[int, Mapping[int, float]]) -> Rollout:
        """The rollout, when no row runs any more.

        Args:
            rewards: By row, and by length of the response up to and with the last token of the rewarded turn.
        """
        placed = np.zeros((len(self.running), self.longest), np.float32)
        for row, turns in rewards.items():
            for length, reward in turns.items():
                placed[row, length - 1] += reward
        static = {name: self._static[name] for name in ("sampling", "mesh")}
        return turns_rollout(self._requests, self._state, self._place(placed), **static)

    def _place(self, tree: PyTree) -> PyTree:
        return place_batch(tree, self._static["mesh"], GENERATE_RULES)
