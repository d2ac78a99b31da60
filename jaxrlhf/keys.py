"""Random streams: one key per purpose, all from the seed of the run.

No two purposes share a stream, and a step or sample number is folded into the stream of its purpose, never into the
root. So a new stream changes no other, and a sample does not depend on the mesh, the batch or other random numbers.
"""

from enum import IntEnum

import jax


class Stream(IntEnum):
    """The purposes of random numbers."""

    WEIGHTS = 0
    DROPOUT = 1
    ROLLOUTS = 2
    EVALUATION = 3
    CRITIC_HEAD = 4
    SAMPLES = 5
    ADAPTERS = 6
    CRITIC_ADAPTERS = 7
    MINIBATCHES = 8
    CHAT = 9
    SERVING = 10
    REFILLS = 11
    ON_POLICY = 12


def stream(seed: int | jax.Array, purpose: Stream, *numbers: int | jax.Array) -> jax.Array:
    """Returns the key of a purpose.

    Args:
        seed: the seed of the run.
        purpose: what the numbers are for.
        numbers: step, round or row numbers, folded in one after the other.
    """
    key = jax.random.fold_in(jax.random.key(seed), purpose)
    for number in numbers:
        key = jax.random.fold_in(key, number)
    return key
