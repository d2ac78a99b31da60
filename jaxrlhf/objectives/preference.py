"""Losses of preferences, paired (DPO and its relatives) and unpaired (KTO), from sequence log-probs."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxrlhf.objectives.masked import divide, keep_where, masked_mean
from jaxrlhf.objectives.supervised import bradley_terry


class PreferenceLoss(NamedTuple):
    """The declaration of a loss of pairs."""

    loss: Callable[[Array, Array, float, float, float], Array]
    """`(chosen, rejected, beta, label_smoothing, margin)` → losses `[B]`."""
    reference: bool = True
    """Reads log-ratios of the policy to a reference; without, log-probs of the policy."""
    per_token: bool = False
    """Reads these per token of each response, not summed over it."""
    smooths: bool = False
    """Has label smoothing."""


def _sigmoid(chosen: Array, rejected: Array, beta: float, smoothing: float, margin: float) -> Array:
    return bradley_terry(beta * (chosen - rejected) - margin, smoothing)


def _without_margin(chosen: Array, rejected: Array, beta: float, smoothing: float, _margin: float) -> Array:
    return _sigmoid(chosen, rejected, beta, smoothing, 0.0)


def _robust(chosen: Array, rejected: Array, beta: float, smoothing: float, _margin: float) -> Array:
    right, wrong = jax.nn.softplus(-beta * (chosen - rejected)), jax.nn.softplus(beta * (chosen - rejected))
    return ((1 - smoothing) * right - smoothing * wrong) / (1 - 2 * smoothing)


def _hinge(chosen: Array, rejected: Array, beta: float, _smoothing: float, _margin: float) -> Array:
    return jax.nn.relu(1 - beta * (chosen - rejected))


def _ipo(chosen: Array, rejected: Array, beta: float, _smoothing: float, _margin: float) -> Array:
    return jnp.square(chosen - rejected - 1 / (2 * beta))


def _apo_zero(chosen: Array, rejected: Array, beta: float, _smoothing: float, _margin: float) -> Array:
    return jax.nn.sigmoid(-beta * chosen) + jax.nn.sigmoid(beta * rejected)


def _apo_down(chosen: Array, rejected: Array, beta: float, _smoothing: float, _margin: float) -> Array:
    return jax.nn.sigmoid(beta * chosen) + jax.nn.sigmoid(-beta * (chosen - rejected))


def _odds_ratio(chosen: Array, rejected: Array, beta: float, _smoothing: float, _margin: float) -> Array:
    return beta * jax.nn.softplus(_log_odds(rejected) - _log_odds(chosen))


def _log_odds(logprobs: Array) -> Array:
    """`log(p / (1 - p))`. A probability that rounds to 1 counts as 1 - ε, which keeps its odds finite."""
    logprobs = jnp.minimum(logprobs, -jnp.finfo(logprobs.dtype).eps)
    return logprobs - jnp.log(-jnp.expm1(logprobs))


PREFERENCE_LOSSES = {
    "sigmoid": PreferenceLoss(_without_margin, smooths=True),
    "robust": PreferenceLoss(_robust, smooths=True),
    "ipo": PreferenceLoss(_ipo, per_token=True),
    "hinge": PreferenceLoss(_hinge),
    "apo_zero": PreferenceLoss(_apo_zero),
    "apo_down": PreferenceLoss(_apo_down),
    "simpo": PreferenceLoss(_sigmoid, reference=False, per_token=True, smooths=True),
    "cpo": PreferenceLoss(_without_margin, reference=False, smooths=True),
    "orpo": PreferenceLoss(_odds_ratio, reference=False, per_token=True),
}
"""The losses of pairs, by name.

The first kinds compare log-ratios, log π(response | prompt) - log π_ref(response | prompt), summed over the
response's tokens. With d = chosen - rejected and ε = label smoothing:

- "sigmoid": `-(1 - ε)·log σ(β·d) - ε·log σ(-β·d)`. Rafailov et al. 2023 (arXiv 2305.18290), equation 7; with ε the
  conservative loss of Mitchell 2023, whose minimum is at a finite d.
- "robust": `(-(1 - ε)·log σ(β·d) + ε·log σ(-β·d)) / (1 - 2ε)`, unbiased under flipped labels. Chowdhury et al. 2024
  (arXiv 2403.00409).
- "ipo": `(d' - 1/(2β))²`, where d' is the difference of the log-ratios per token. Azar et al. 2023 (arXiv
  2310.12036), equation 17, with the averaging over tokens that TRL has from its authors.
- "hinge": `max(0, 1 - β·d)`. Zhao et al. 2023 (SLiC, arXiv 2305.10425); with log-ratios, Liu et al. 2023 (RSO).
- "apo_zero": `σ(-β·chosen) + σ(β·rejected)`. D'Oosterlinck et al. 2024 (arXiv 2408.06266), equation 7.
- "apo_down": `σ(β·chosen) + σ(-β·d)`. The same, equation 8.

The others compare log-probs of the policy, without a reference. Primes mark values per token:

- "simpo": `-(1 - ε)·log σ(β·d' - γ) - ε·log σ(γ - β·d')`. Meng et al. 2024 (arXiv 2405.14734), equation 6.
- "cpo": `sigmoid` of log-probs. Xu et al. 2024 (arXiv 2401.08417), equation 3; the paper adds `sft_loss`
  of the chosen responses.
- "orpo": `-β·log σ(log odds(chosen') - log odds(rejected'))`, with odds = p / (1 - p). Hong et al. 2024 (arXiv
  2403.07691), equation 7; the loss of the paper adds `sft_loss`.
"""


def sequence_logprobs(logprobs: ArrayLike, mask: ArrayLike) -> Array:
    """Sums `logprobs` `[B, T]` of each row where `mask` `[B, T]` is set: `[B]`."""
    return jnp.sum(keep_where(logprobs, jnp.asarray(mask) != 0), axis=1)


def preference_loss(
    chosen: ArrayLike,
    rejected: ArrayLike,
    row_mask: ArrayLike,
    beta: float,
    kind: str = "sigmoid",
    label_smoothing: float = 0.0,
    chosen_lengths: ArrayLike | None = None,
    rejected_lengths: ArrayLike | None = None,
    denominator: ArrayLike | None = None,
    *,
    margin: float = 0.0,
) -> Array:
    """Computes the mean loss of pairs whose chosen response the policy should prefer.

    Args:
        chosen: Log-ratios or log-probs of the chosen responses, `[B]`, or `[B, P]` with P pairs in a packed row; the
            other arrays have the same shape.
        rejected: Those of the rejected responses, `[B]`.
        row_mask: `[B]`, set for real pairs.
        beta: β.
        kind: One of PREFERENCE_LOSSES.
        label_smoothing: ε, the share of pairs whose label is assumed to be wrong.
        chosen_lengths: Tokens of the chosen responses, `[B]`, for the kinds per token.
        rejected_lengths: Tokens of the rejected responses, `[B]`, for the kinds per token.
        denominator: Real pairs of the global batch; None: those of `row_mask`.
        margin: γ of "simpo".

    Raises:
        ValueError: Another `kind`, one per token without lengths, or label smoothing of a kind that has none.
    """
    if kind not in PREFERENCE_LOSSES:
        raise ValueError(f"kind={kind!r} of preference loss is not one of {', '.join(map(repr, PREFERENCE_LOSSES))}")
    declared = PREFERENCE_LOSSES[kind]
    if label_smoothing and not declared.smooths:
        raise ValueError(f"kind={kind!r} of preference loss has no label smoothing, found {label_smoothing}")
    keep = jnp.asarray(row_mask) != 0
    chosen, rejected = keep_where(chosen, keep), keep_where(rejected, keep)
    if declared.per_token:
        if chosen_lengths is None or rejected_lengths is None:
            raise ValueError(f"kind={kind!r} of preference loss needs the lengths of both responses")
        lengths = (keep_where(x, keep) for x in (chosen_lengths, rejected_lengths))
        chosen, rejected = (divide(x, n) for x, n in zip((chosen, rejected), lengths, strict=True))
    return masked_mean(declared.loss(chosen, rejected, beta, label_smoothing, margin), keep, denominator)


def kto_loss(
    logratios: ArrayLike,
    desirable: ArrayLike,
    kl: ArrayLike,
    row_mask: ArrayLike,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    denominator: ArrayLike | None = None,
) -> Array:
    """Computes KTO's mean loss of responses, each of which is labelled desirable or not.

    It is `λ_D·(1 - σ(β·(r - z)))` of a desirable response and `λ_U·(1 - σ(β·(z - r)))` of another, with r its log-ratio
    to the reference and z the policy's KL from it. Source: Ethayarajh et al. 2024 (arXiv 2402.01306), equation 8.

    Args:
        logratios: r, log π(response | prompt) - log π_ref(response | prompt), `[B]`.
        desirable: `[B]`, set for desirable responses.
        kl: z ≥ 0 in nats per response, a scalar or `[B]` with one value (`kto_kl`). It is not differentiated.
        row_mask: `[B]`, set for real rows.
        beta: β.
        desirable_weight: λ_D.
        undesirable_weight: λ_U.
        denominator: Real rows of the global batch; None: those of `row_mask`.
    """
    keep = jnp.asarray(row_mask) != 0
    good = jnp.asarray(desirable) != 0
    gain = beta * (keep_where(logratios, keep) - jax.lax.stop_gradient(keep_where(kl, keep)))
    loss = jnp.where(good, desirable_weight * jax.nn.sigmoid(-gain), undesirable_weight * jax.nn.sigmoid(gain))
    return masked_mean(loss, keep, denominator)


def kto_kl(logratios: ArrayLike, row_mask: ArrayLike) -> Array:
    """Estimates KTO's z: the mean log-ratio of responses to the prompts of others, at least 0; a scalar.

    Args:
        logratios: log π(y' | x) - log π_ref(y' | x) of mismatched pairs, `[B]`: the response y' belongs to another
            prompt than x.
        row_mask: `[B]`, set for real rows.
    """
    return jnp.maximum(masked_mean(logratios, row_mask), 0)
