"""Token log-probs as the decoder calls them: how the head's work is split over a mesh."""

import jax
from jax.sharding import PartitionSpec

from jaxrlhf.errors import InputError
from jaxrlhf.kernels import HeadPlacement, choose, token_logprobs
from jaxrlhf.sharding import REPLICATED_RULES, current_rules, resolve_spec


def _axes(spec: PartitionSpec, dimension: int) -> tuple[str, ...]:
    entry = spec[dimension] if dimension < len(spec) else None
    return (entry,) if isinstance(entry, str) else entry or ()


def head_placement(weight: tuple[int, int], rows: int, zero_stage: int) -> HeadPlacement | None:
    """How a head `[V, D]` and `rows` rows lie under the current `use(mesh, rules)`; None outside of one.

    The vocabulary stays split over the axes that do not split the batch. Below ZeRO stage 3 the passes read a head that
    is whole over `fsdp`.
    """
    current = current_rules()
    if current is None:
        return None
    mesh, rules = current
    stored = rules if zero_stage == 3 else REPLICATED_RULES
    batch = _axes(resolve_spec(("batch",), (rows,), mesh, rules), 0)
    spec = resolve_spec(("vocab", "embed"), weight, mesh, stored)
    vocab, width = _axes(spec, 0), _axes(spec, 1)
    return HeadPlacement(mesh, batch, vocab, tuple(axis for axis in width if axis in batch))


def head_logprobs(
    hidden: jax.Array,
    weight: jax.Array,
    bias: jax.Array | None,
    labels: jax.Array,
    *,
    zero_stage: int,
    implementation: str = "auto",
    **options,
) -> tuple[jax.Array, jax.Array]:
    """`token_logprobs` of hidden `[B, T, D]`, each device with its own rows and its own part of the vocabulary.

    InputError for an implementation that cannot run here.
    """
    placement = head_placement(weight.shape, hidden.shape[0], zero_stage)
    facts = {"dtype": hidden.dtype, "head_dim": hidden.shape[-1], "alibi": False}
    try:
        options["implementation"] = choose("token_logprobs", implementation, **facts)
        return token_logprobs(hidden, weight, labels, bias=bias, placement=placement, **options)
    except ValueError as error:
        raise InputError(f"token log-probs: {error}") from error
