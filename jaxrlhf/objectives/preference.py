"""The losses of direct preference optimisation, from sequence log-probs of policy and reference."""

import jax
import jax.numpy as jnp
from jax import Array

from jaxrlhf.objectives.masked import divide, keep_where, masked_mean

PREFERENCE_LOSSES = ("sigmoid", "robust", "ipo")


def sequence_logprobs(logprobs, mask) -> Array:
    """The log-prob `[B]` of each row's counted tokens together: the sum of `logprobs` `[B, T]` where `mask` is set."""
    return jnp.sum(keep_where(logprobs, jnp.asarray(mask) != 0), axis=1)


def preference_loss(
    chosen_logratios,
    rejected_logratios,
    row_mask,
    beta: float,
    kind: str = "sigmoid",
    label_smoothing: float = 0.0,
    chosen_lengths=None,
    rejected_lengths=None,
    denominator=None,
) -> Array:
    """The mean loss of pairs whose chosen answer the policy should prefer; all arrays are `[B]`.

    A log-ratio is log π(answer | prompt) - log π_ref(answer | prompt), summed over the answer's tokens; without a
    reference the second term is 0. With d = chosen - rejected log-ratio and ε = `label_smoothing`, the share of pairs
    whose label is taken to be the wrong way round:

    - "sigmoid": `-(1 - ε)·log σ(β·d) - ε·log σ(-β·d)`. Rafailov et al. 2023 (arXiv 2305.18290), equation 7; with ε the
      conservative loss of Mitchell 2023, whose minimum is at a finite d.
    - "robust": `(-(1 - ε)·log σ(β·d) + ε·log σ(-β·d)) / (1 - 2ε)`, unbiased under such labels. Chowdhury et al. 2024
      (arXiv 2403.00409).
    - "ipo": `(d' - 1/(2β))²`, where d' is the difference of the log-ratios per token, so `chosen_lengths` and
      `rejected_lengths` (tokens of the answers) are needed. Azar et al. 2023 (arXiv 2310.12036), equation 17, with the
      averaging over tokens that TRL has from its authors.

    The mean is over the rows where `row_mask` is set; `denominator` is their number in the global batch. Raises
    ValueError for another `kind`, and for IPO without lengths or with smoothing.
    """
    keep = jnp.asarray(row_mask) != 0
    chosen, rejected = keep_where(chosen_logratios, keep), keep_where(rejected_logratios, keep)
    if kind == "ipo":
        if chosen_lengths is None or rejected_lengths is None or label_smoothing:
            raise ValueError("the IPO loss needs the lengths of both answers, and has no label smoothing")
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
