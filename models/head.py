"""Token log-probs as the decoder calls them: splits the output head over a mesh."""

import jax

from jaxrlhf.errors import InputError
from jaxrlhf.kernels import HeadPlacement, choose, token_logprobs
from jaxrlhf.models.config import DecoderConfig
from jaxrlhf.sharding import REPLICATED_RULES, current_rules, mesh_axes, platform, resolve_spec


def head_placement(weight: tuple[int, ...], tokens: tuple[int, int], zero_stage: int) -> HeadPlacement | None:
    """Placement of a head and of hidden states `[B, T, D]` under the current `use(mesh, rules)`; None outside of one.

    The vocabulary stays split over the axes that do not split the tokens. Below ZeRO stage 3 the passes read a head
    that is whole over `fsdp`.

    Args:
        weight: Shape of the head's weight.
        tokens: B and T.
        zero_stage: The stage that stores the weight.
    """
    current = current_rules()
    if current is None:
        return None
    mesh, rules = current
    stored = rules if zero_stage == 3 else REPLICATED_RULES
    placed = resolve_spec(("batch", "sequence"), tokens, mesh, rules)
    rows, columns = mesh_axes(placed, 0), mesh_axes(placed, 1)
    spec = resolve_spec(("vocab", "embed"), weight, mesh, stored)
    vocab, width = mesh_axes(spec, 0), mesh_axes(spec, 1)
    return HeadPlacement(mesh, rows, columns, vocab, tuple(axis for axis in width if axis in (*rows, *columns)))


def head_logprobs(
    hidden: jax.Array,
    weight: jax.Array,
    bias: jax.Array | None,
    labels: jax.Array,
    *,
    config: DecoderConfig,
    temperature: float = 1.0,
    zero_stage: int,
    implementation: str = "auto",
) -> tuple[jax.Array, jax.Array]:
    """`token_logprobs`, computed by each device for its own rows and its own part of the vocabulary.

    Args:
        hidden: `[B, T, D]`.
        weight: `[V_padded, D]`.
        bias: `[V_padded]` or None.
        labels: int `[B, T]`.
        config: Gives the real rows of `weight`, and scale and soft-cap of the logits.
        temperature: Divides the logits.
        zero_stage: The stage that stores the weight.
        implementation: Kernel, see kernels/choice.py.

    Returns:
        Log-probs and entropies, float32 `[B, T]` each.

    Raises:
        InputError: The implementation cannot run here.
    """
    placement = head_placement(weight.shape, (hidden.shape[0], hidden.shape[1]), zero_stage)
    # s · z / t is z / (t / s), and c · tanh(s · z / c) / t is the same with c / s in place of c.
    scale, softcap = config.logit_scale, config.logit_softcap
    softcap = None if softcap is None else softcap / scale
    try:
        chosen = choose(
            "token_logprobs",
            implementation,
            dtype=hidden.dtype,
            head_dim=hidden.shape[-1],
            alibi=False,
            softcap=softcap is not None,
        )
        return token_logprobs(
            hidden,
            weight,
            labels,
            vocab_size=config.vocab_size,
            bias=bias,
            temperature=temperature / scale,
            softcap=softcap,
            implementation=chosen,
            placement=placement,
            on_cpu=platform() == "cpu",
        )
    except ValueError as error:
        raise InputError(f"token log-probs: {error}") from error
