"""Rollouts that later steps train on again (`replay_steps`): the parts that are kept, and their metrics.

A step first trains on its own rollout, then on those of the steps before it, the newest first. Their log-probs are
computed again with the newest parameters, and tokens are weighed by the ratio of these to the sampler's
(`importance_sampling_correction`): the decoupled objective, as for rollouts ahead of their updates
(`jaxrlhf.rl.ahead`). Source: Hilton et al. 2021 (arXiv 2110.00641).
"""

from collections.abc import Mapping, Sequence
from functools import partial

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxrlhf.engine import Rollout
from jaxrlhf.rl.experience import Experience
from jaxrlhf.sharding import TRAIN_RULES, constrain, replicated, use

EMPTY = -1
REPORTED = (
    *("loss/policy_avg", "policy/grad_norm", "policy/clipfrac_avg"),
    *("sampling/importance_sampling_ratio/mean", "sampling/logp_difference/mean"),
)
"""Metrics of the updates on earlier rollouts, which are logged as `replay/…`."""
COUNTS = ("guard/skipped_updates", "guard/spike")


class Replayed(flax.struct.PyTreeNode):
    """A scored rollout that is kept, in the widest shape, so that checkpoints hold it."""

    rollout: Rollout
    """Rows from column 0 on, as an `Experience` has them, `[B, T]`."""
    scores: jax.Array
    """float32 `[B]`."""
    step: jax.Array
    """int32: finished steps of the policy that sampled it; EMPTY: there is none yet."""
    columns: jax.Array
    """int32: columns that the experience had."""


@partial(jax.jit, static_argnames=("width", "mesh"))
def _kept(e: Experience, *, width: int, mesh: Mesh) -> tuple[Rollout, jax.Array]:
    def wide(x: jax.Array) -> jax.Array:
        return constrain(jnp.pad(x, ((0, 0), (0, width - x.shape[1]))), "batch", None)

    with use(mesh, TRAIN_RULES):
        rows = Rollout(e.tokens, e.mask, e.response_mask, e.sampler_logprobs, width - (e.longest or 0), e.turn_rewards)
        return jax.tree.map(wide, rows), constrain(e.scores, "batch")


def kept(experience: Experience, step: int, *, width: int, mesh: Mesh) -> Replayed:
    """Keeps the parts of a scored experience that later steps need, padded to `width` columns.

    Args:
        experience: rows with their final scores; those without one are masked out, and stay so.
        step: finished steps of the policy that sampled it.
        width: columns of the widest experience.
        mesh: where it lies.
    """
    rollout, scores = _kept(experience, width=width, mesh=mesh)
    numbers = (jax.device_put(jnp.int32(n), replicated(mesh)) for n in (step, experience.tokens.shape[1]))
    return Replayed(rollout, scores, *numbers)


def narrowed(old: Replayed) -> Rollout:
    """The rollout in the shape of its experience, so that the same programs run on it."""
    columns = int(old.columns)
    longest = old.rollout.tokens.shape[1] - old.rollout.prompt_length
    return jax.tree.map(lambda x: x[:, :columns], old.rollout).replace(prompt_length=columns - longest)


def replays(steps: int, reuses: int) -> int:
    """Updates on earlier rollouts in a run of `steps`, each of whose rollouts is used `reuses` times more."""
    few = min(steps, reuses)
    return few * (few - 1) // 2 + (steps - few) * reuses


def with_replays(metrics: dict[str, float], found: Sequence[Mapping[str, float]], age: int) -> dict[str, float]:
    """A step's metrics with those of its earlier rollouts.

    Args:
        metrics: of the step's own rollout.
        found: of the updates on earlier ones (`PPOTrainer.replay`).
        age: `sampling/staleness` of the step's own rollout.
    """
    known = {name: [m[name] for m in found if name in m] for name in REPORTED}
    means = {f"replay/{name}": float(np.mean(values)) for name, values in known.items() if values}
    counts = {name: sum(m.get(name, 0.0) for m in (metrics, *found)) for name in COUNTS if name in metrics}
    staleness = float(np.mean([age, *(m["sampling/staleness"] for m in found)]))
    seconds = sum(m["timing/replay"] for m in found)
    own = {"sampling/replays": len(found), "sampling/staleness": staleness, "timing/replay": seconds}
    return metrics | means | counts | own
