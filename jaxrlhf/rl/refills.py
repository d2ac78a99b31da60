"""Dynamic sampling: groups whose responses all have one score are replaced by groups of further prompts (DAPO).

Such a group has advantages of 0, so nothing is learned from it. Source: Yu et al. 2025 (arXiv 2503.14476), section 3.2.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxrlhf.distributed import to_host
from jaxrlhf.rl.experience import Experience
from jaxrlhf.rl.samples import Sampled
from jaxrlhf.sharding import TRAIN_RULES, constrain, use


def differing(experience: Experience, group_size: int) -> np.ndarray:
    """Finds the groups that have two different scores, bool `[groups]`; rows without a score do not count."""
    scores, known = to_host((experience.scores, experience.row_mask))
    scores, known = (np.asarray(x).reshape(-1, group_size) for x in (scores, known))
    high, low = (limit(np.where(known, scores, -sign * np.inf), axis=1) for limit, sign in ((np.max, 1), (np.min, -1)))
    return high > low


@partial(jax.jit, static_argnames=("pad_id", "mesh"))
def choose_rows(old: Experience, new: Experience, order: jax.Array, *, pad_id: int, mesh: Mesh | None) -> Experience:
    """Takes rows of two experiences: row numbers in `order` count those of `old`, then those of `new`."""
    width = max(old.tokens.shape[1], new.tokens.shape[1])

    def chosen(a: jax.Array, b: jax.Array, fill: int = 0) -> jax.Array:
        if a.ndim == 2:
            a, b = (jnp.pad(x, ((0, 0), (0, width - x.shape[1])), constant_values=fill) for x in (a, b))
        return constrain(jnp.take(jnp.concatenate([a, b]), order, axis=0), "batch", *[None] * (a.ndim - 1))

    with use(mesh, TRAIN_RULES):
        rows = jax.tree.map(chosen, old, new.replace(longest=old.longest))
        return rows.replace(tokens=chosen(old.tokens, new.tokens, pad_id))


def refilled(
    first: Sampled, more: Callable[[int], Sampled], group_size: int, limit: int, *, pad_id: int, mesh: Mesh | None
) -> Sampled:
    """Replaces groups without differing scores by groups of further batches.

    Args:
        first: The step's own samples.
        more: Samples the further batch with this number, from 1, of the same shape.
        group_size: Responses per prompt.
        limit: Most further batches. Groups that are left then stay.
        pad_id: Token that fills shorter rows.
        mesh: Where the experience lies.

    Returns:
        The samples with metrics of all batches: seconds and failures added up, means of the other metrics, and
        `sampling/refills` and `sampling/equal_groups`, the share of all groups that were sampled without a difference.
    """
    experience, rewards, extras = first.experience, first.rewards, first.extras
    good = differing(experience, group_size)
    batches, equal = [first.metrics], [1 - good.mean()]
    while not good.all() and len(batches) <= limit:
        new = more(len(batches))
        usable = differing(new.experience, group_size)
        batches.append(new.metrics)
        equal.append(1 - usable.mean())
        groups = np.arange(len(good))
        places, fresh = np.flatnonzero(~good), np.flatnonzero(usable)
        count = min(len(places), len(fresh))
        groups[places[:count]] = len(good) + fresh[:count]
        good[places[:count]] = True
        order = (groups[:, None] * group_size + np.arange(group_size)).reshape(-1)
        experience = choose_rows(experience, new.experience, order, pad_id=pad_id, mesh=mesh)
        rewards = {name: np.concatenate([values, new.rewards[name]])[order] for name, values in rewards.items()}
        nothing = np.full(len(order), None, object)
        extras = {
            name: np.concatenate([extras.get(name, nothing), new.extras.get(name, nothing)])[order]
            for name in (extras | new.extras)
        }
    added = (
        "timing/",
        *("rewards/failures", "rewards/not_applicable"),
        *("environment/failures", "environment/tool_errors", "environment/seconds"),
    )
    metrics = {}
    for name in dict.fromkeys(name for batch in batches for name in batch):
        values = [batch[name] for batch in batches if name in batch]
        metrics[name] = sum(values) if name.startswith(added) else float(np.mean(values))
    metrics |= {"sampling/refills": len(batches) - 1, "sampling/equal_groups": float(np.mean(equal))}
    return Sampled(experience, metrics, rewards, extras)
