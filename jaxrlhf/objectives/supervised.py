"""The losses of supervised fine-tuning and of reward models."""

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxrlhf.objectives.masked import divide, keep_where, last_token_index, masked_mean, real, score_at_last_token


def sft_loss(logprobs: ArrayLike, loss_mask: ArrayLike, denominator: ArrayLike | None = None) -> Array:
    """Computes the cross-entropy of the target tokens, in nats per token.

    Args:
        logprobs: `[B, T]`.
        loss_mask: `[B, T]`, set for target tokens.
        denominator: Target tokens of the global batch; None: those of `loss_mask`.
    """
    return -masked_mean(logprobs, loss_mask, denominator)


def bradley_terry(difference: Array, label_smoothing: float = 0.0) -> Array:
    """Computes `-(1 - ε)·log σ(d) - ε·log σ(-d)` of each difference d, with ε = `label_smoothing`; shaped as d."""
    return (1 - label_smoothing) * jax.nn.softplus(-difference) + label_smoothing * jax.nn.softplus(difference)


def pairwise_loss(
    chosen_scores: ArrayLike,
    rejected_scores: ArrayLike,
    row_mask: ArrayLike,
    denominator: ArrayLike | None = None,
    *,
    margin: ArrayLike = 0.0,
    label_smoothing: float = 0.0,
    center: float = 0.0,
) -> Array:
    """Computes the Bradley–Terry loss, the mean of `-(1 - ε)·log σ(d) - ε·log σ(-d) + η·(chosen + rejected)²`.

    Here d = chosen - rejected - margin. Source: Ouyang et al. 2022, equation 1; with a margin Touvron et al. 2023
    (Llama 2), equation 2; with η Eisenstein et al. 2023 (arXiv 2312.09244), equation 2; with ε as in `preference_loss`.

    Args:
        chosen_scores: `[B]`, or `[B, P]` with P pairs in a packed row; the other arrays have the same shape.
        rejected_scores: `[B]`.
        row_mask: `[B]`, set for real pairs.
        denominator: Real pairs of the global batch; None: those of `row_mask`.
        margin: By how much the chosen score should be above the other; `[B]` or a number.
        label_smoothing: ε, the share of pairs whose label is assumed to be wrong.
        center: η, which draws the mean of the scores to 0.
    """
    keep = jnp.asarray(row_mask) != 0
    chosen, rejected = keep_where(chosen_scores, keep), keep_where(rejected_scores, keep)
    loss = bradley_terry(chosen - rejected - margin, label_smoothing)
    return masked_mean(loss + center * jnp.square(chosen + rejected), keep, denominator)


def tokenwise_pairwise_loss(
    chosen_values: ArrayLike,
    rejected_values: ArrayLike,
    chosen_ids: ArrayLike,
    rejected_ids: ArrayLike,
    chosen_mask: ArrayLike,
    rejected_mask: ArrayLike,
    row_mask: ArrayLike,
    denominator: ArrayLike | None = None,
    read_padding: bool = False,
    margin: ArrayLike = 0.0,
) -> Array:
    """Computes DeepSpeed-Chat's reward loss: the Bradley–Terry loss at every token from the first one that differs.

    The loss of a row is the mean of `-log σ(chosen_t - rejected_t)` from the first difference to the end of the longer
    sequence. A position where only one of the two has a token counts as a difference. Past its end the shorter sequence
    keeps the value of its last token. Two identical sequences are compared at their last token only (DeepSpeed-Chat: at
    the last column, which may be padding), which adds log 2 if their values agree.

    Args:
        chosen_values: `[B, T]`.
        rejected_values: `[B, T]`.
        chosen_ids: int `[B, T]`, right-padded.
        rejected_ids: int `[B, T]`, right-padded.
        chosen_mask: `[B, T]`, set for real tokens.
        rejected_mask: `[B, T]`, set for real tokens.
        row_mask: `[B]`, set for real rows. A real row without any token adds 0 and counts as a row.
        denominator: Real rows of the global batch; None: those of `row_mask`.
        read_padding: Reads the model's values at padding past the end of the shorter sequence, as DeepSpeed-Chat does.
        margin: By how much the chosen values should be above the others; `[B]` or a number.
    """
    rows = jnp.asarray(row_mask) != 0
    chosen_real, rejected_real = jnp.asarray(chosen_mask) != 0, jnp.asarray(rejected_mask) != 0
    either = (chosen_real | rejected_real) & rows[:, None]
    differs = either & ((jnp.asarray(chosen_ids) != jnp.asarray(rejected_ids)) | (chosen_real != rejected_real))
    first = jnp.where(differs.any(axis=1), jnp.argmax(differs, axis=1), last_token_index(either))
    span = either & (jnp.arange(either.shape[1]) >= first[:, None])
    if not read_padding:
        chosen_values = _hold_last(chosen_values, chosen_real)
        rejected_values = _hold_last(rejected_values, rejected_real)
    difference = keep_where(chosen_values, span) - keep_where(rejected_values, span)
    margins = jnp.broadcast_to(margin, rows.shape)[:, None]
    per_token = jnp.where(span, jax.nn.softplus(margins - difference), 0)
    per_row = divide(jnp.sum(per_token, axis=1), jnp.sum(span, axis=1, dtype=jnp.int32))
    return masked_mean(per_row, rows, denominator)


def _hold_last(values: ArrayLike, keep: Array) -> Array:
    """`values` `[B, T]`, with that of the last token in place of padding."""
    return jnp.where(keep, real(values), score_at_last_token(values, keep)[:, None])
