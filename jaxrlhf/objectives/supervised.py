"""The losses of supervised fine-tuning and of reward models."""

import jax
import jax.numpy as jnp
from jax import Array

from jaxrlhf.objectives.masked import divide, keep_where, last_token_index, masked_mean, real, score_at_last_token


def sft_loss(logprobs, loss_mask, denominator=None) -> Array:
    """Cross-entropy of the counted target tokens, in nats per token.

    `logprobs` and `loss_mask` are [B, T]; `denominator` is the number of counted tokens of the global batch.
    """
    return -masked_mean(logprobs, loss_mask, denominator)


def pairwise_loss(chosen_scores, rejected_scores, row_mask, denominator=None) -> Array:
    """Bradley–Terry loss `-log σ(chosen - rejected)`, averaged over the rows where `row_mask` is set.

    All inputs are [B]; `denominator` is the number of real rows of the global batch. Source: Ouyang et al. 2022,
    equation 1.
    """
    keep = jnp.asarray(row_mask) != 0
    margin = keep_where(chosen_scores, keep) - keep_where(rejected_scores, keep)
    return masked_mean(jax.nn.softplus(-margin), keep, denominator)


def tokenwise_pairwise_loss(
    chosen_values,
    rejected_values,
    chosen_ids,
    rejected_ids,
    chosen_mask,
    rejected_mask,
    row_mask,
    denominator=None,
    read_padding: bool = False,
) -> Array:
    """DeepSpeed-Chat's reward loss: the Bradley–Terry loss at every token from the first one that differs.

    For each row the mean of `-log σ(chosen_t - rejected_t)` over the positions from the first difference to the end of
    the longer of the two sequences; then the mean over the rows where `row_mask` is set. A position where only one of
    the two has a token counts as a difference. Past its own end the shorter sequence keeps the value of its last token;
    DeepSpeed-Chat reads there what the model gives for padding tokens, which `read_padding` reproduces. Two identical
    sequences are compared at their last token alone (DeepSpeed-Chat: at the last column, be it padding), which adds
    log 2 when their values agree.

    Values, ids and masks are [B, T], both sides right-padded to the same T; `row_mask` is [B]; `denominator` is the
    number of real rows of the global batch. An unmasked row without any token adds 0 and counts as a row.
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
    margin = keep_where(chosen_values, span) - keep_where(rejected_values, span)
    per_token = jnp.where(span, jax.nn.softplus(-margin), 0)
    per_row = divide(jnp.sum(per_token, axis=1), jnp.sum(span, axis=1, dtype=jnp.int32))
    return masked_mean(per_row, rows, denominator)


def _hold_last(values, keep: Array) -> Array:
    return jnp.where(keep, real(values), score_at_last_token(values, keep)[:, None])
