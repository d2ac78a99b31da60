"""The losses of direct preference optimisation, from sequence log-probs of policy and reference."""

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxrlhf.objectives.masked import divide, keep_where, masked_mean

PREFERENCE_LOSSES = ("sigmoid", "robust", "ipo")


def sequence_logprobs(logprobs: ArrayLike, mask: ArrayLike) -> Array:
    """Sums `logprobs` `[B, T]` of each row where `mask` `[B, T]` is set: `[B]`."""
    return jnp.sum(keep_where(logprobs, jnp.asarray(mask) != 0), axis=1)


def preference_loss(
    chosen_logratios: ArrayLike,
    rejected_logratios: ArrayLike,
    row_mask: ArrayLike,
    beta: float,
    kind: str = "sigmoid",
    label_smoothing: float = 0.0,
    chosen_lengths: ArrayLike | None = None,
    rejected_lengths: ArrayLike | None = None,
    denominator: ArrayLike | None = None,
) -> Array:
    """Computes the mean loss of pairs whose chosen response the policy should prefer.

    A log-ratio is log π(response | prompt) - log π_ref(response | prompt), summed over the response's tokens; without a
    reference the second term is 0. With d = chosen - rejected log-ratio and ε = `label_smoothing`, the kinds are:

    - "sigmoid": `-(1 - ε)·log σ(β·d) - ε·log σ(-β·d)`. Rafailov et al. 2023 (arXiv 2305.18290), equation 7; with ε the
      conservative loss of Mitchell 2023, whose minimum is at a finite d.
    - "robust": `(-(1 - ε)·log σ(β·d) + ε·log σ(-β·d)) / (1 - 2ε)`, unbiased under flipped labels. Chowdhury et al. 2024
      (arXiv 2403.00409).
    - "ipo": `(d' - 1/(2β))²`, where d' is the difference of the log-ratios per token. Azar et al. 2023 (arXiv
      2310.12036), equation 17, with the averaging over tokens that TRL has from its authors.

    Args:
        chosen_logratios: `[B]`, or `[B, P]` with P pairs in a packed row; the other arrays have the same shape.
        rejected_logratios: `[B]`.
        row_mask: `[B]`, set for real pairs.
        beta: β.
        kind: One of PREFERENCE_LOSSES.
        label_smoothing: ε, the share of pairs whose label is assumed to be wrong.
        chosen_lengths: Tokens of the chosen responses, `[B]`, for "ipo".
        rejected_lengths: Tokens of the rejected responses, `[B]`, for "ipo".
        denominator: Real pairs of the global batch; None: those of `row_mask`.

    Raises:
        ValueError: Another `kind`, or IPO without lengths or with smoothing.
    """
    keep = jnp.asarray(row_mask) != 0
    chosen, rejected = keep_where(chosen_logratios, keep), keep_where(rejected_logratios, keep)
    if kind == "ipo":
        if chosen_lengths is None or rejected_lengths is None or label_smoothing:
            raise ValueError("the IPO loss needs the lengths of both responses, and has no label smoothing")
        lengths = (keep_where(x, keep) for x in (chosen_lengths, rejected_lengths))
        chosen, rejected = (divide(x, n) for x, n in zip((chosen, rejected), lengths, strict=True))
        return masked_mean(jnp.square(chosen - rejected - 1 / (2 * beta)), keep, denominator)
    logits = beta * (chosen - rejected)
    right, wrong = jax.nn.softplus(-logits), jax.nn.softplus(logits)
    if kind == "sigmoid":
        loss = (1 - label_smoothing) * right + label_smoothing * wrong
    elif kind == "robust":
        loss = ((1 - label_smoothing) * right - label_smoothing * wrong) / (1 - 2 * label_smoothing)
    else:
        raise ValueError(f"kind={kind!r} of preference loss is not one of {', '.join(map(repr, PREFERENCE_LOSSES))}")
    return masked_mean(loss, keep, denominator)
