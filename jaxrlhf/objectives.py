"""The losses, rewards and advantages of SFT, reward-model and PPO training, as pure `jnp` functions.

Conventions that hold for every function here:

- Index `t` of a `[B, T]` array refers to token `s_t`: `logprobs[t]` is log π(s_t | s_<t) and `values[t]` is the value
  estimate before `s_t` is chosen. The caller does the shift by one.
- Masks are explicit, of any integer, float or boolean dtype; a non-zero entry counts fully. Whatever stands where the
  mask is zero, infinities and NaN included, reaches neither the result nor a gradient.
- Arithmetic and reductions are float32, or float64 for float64 input. No argument is detached: differentiate with
  respect to the new log-probs or values only.
- A loss is a masked sum over a denominator. The default denominator is the mask's own count; pass the count of the
  global batch to make micro-batches and shards add up to the loss of the whole batch. A denominator of 0 gives 0.
"""

import jax
import jax.numpy as jnp
from jax import Array


def _real(x) -> Array:
    x = jnp.asarray(x)
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _keep(x, keep: Array) -> Array:
    """`x` as float with zeros outside `keep`; selecting before any arithmetic is what keeps gradients clean."""
    return jnp.where(keep, _real(x), 0)


def _divide(total: Array, denominator) -> Array:
    denominator = jnp.asarray(denominator).astype(total.dtype)
    usable = denominator > 0
    return jnp.where(usable, total / jnp.where(usable, denominator, 1), 0)


def masked_sum(x, mask) -> Array:
    """Sum of `x` where `mask` is set. `x` and `mask` have one shape; the result is a scalar."""
    return jnp.sum(_keep(x, jnp.asarray(mask) != 0))


def masked_mean(x, mask, denominator=None) -> Array:
    """Sum of `x` where `mask` is set, over `denominator` (default: how many entries are set); 0 over nothing."""
    keep = jnp.asarray(mask) != 0
    return _divide(masked_sum(x, keep), jnp.sum(keep, dtype=jnp.int32) if denominator is None else denominator)


def masked_whiten(x, mask, shift_mean: bool = True, epsilon: float = 1e-8) -> Array:
    """Scales `x` to unit variance, and to zero mean unless `shift_mean` is false, over all entries where `mask` is set.

    Returns an array of the shape of `x` with zeros where the mask is not set. The variance is the unbiased one (divided
    by n - 1), as TRL and verl do; DeepSpeed-Chat does not whiten. A single entry has no variance: its deviation is 0.
    `epsilon` is added to the variance.
    """
    keep = jnp.asarray(mask) != 0
    count = jnp.sum(keep, dtype=jnp.int32)
    mean = masked_mean(x, keep)
    deviation = jnp.where(keep, _keep(x, keep) - mean, 0)
    variance = _divide(jnp.sum(jnp.square(deviation)), jnp.maximum(count - 1, 1))
    whitened = deviation * jax.lax.rsqrt(variance + epsilon)
    return whitened if shift_mean else jnp.where(keep, whitened + mean, 0)


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
    margin = _keep(chosen_scores, keep) - _keep(rejected_scores, keep)
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
    margin = _keep(chosen_values, span) - _keep(rejected_values, span)
    per_token = jnp.where(span, jax.nn.softplus(-margin), 0)
    per_row = _divide(jnp.sum(per_token, axis=1), jnp.sum(span, axis=1, dtype=jnp.int32))
    return masked_mean(per_row, rows, denominator)


def _hold_last(values, real: Array) -> Array:
    return jnp.where(real, _real(values), score_at_last_token(values, real)[:, None])


def last_token_index(mask) -> Array:
    """Index [B] int32 of the last set entry in each row of `mask` [B, T], on either side of any padding; 0 if none."""
    mask = jnp.asarray(mask)
    return jnp.max(jnp.where(mask != 0, jnp.arange(mask.shape[1], dtype=jnp.int32), 0), axis=1)


def _is_last(mask) -> Array:
    mask = jnp.asarray(mask)
    return (jnp.arange(mask.shape[1]) == last_token_index(mask)[:, None]) & (mask != 0)


def score_at_last_token(values, mask) -> Array:
    """The entry of `values` [B, T] at the last set position of `mask` [B, T], as [B]; 0 for a row without any."""
    return jnp.sum(_keep(values, _is_last(mask)), axis=1)


def kl_estimate(logprobs, ref_logprobs, kind: str = "k1", mask=None) -> Array:
    """Per-token estimate of KL(policy || reference) in nats, from tokens sampled by the policy; shape of the inputs.

    With d = logprobs - ref_logprobs: "k1" is d, "k2" is d²/2, "k3" is exp(-d) - 1 + d, none of them clamped. Entries
    where `mask` is given and not set are 0. Source: J. Schulman, "Approximating KL Divergence", 2020.

    Raises ValueError for another `kind`.
    """
    if mask is None:
        difference = _real(logprobs) - _real(ref_logprobs)
    else:
        keep = jnp.asarray(mask) != 0
        difference = _keep(logprobs, keep) - _keep(ref_logprobs, keep)
    if kind == "k1":
        return difference
    if kind == "k2":
        return 0.5 * jnp.square(difference)
    if kind == "k3":
        return jnp.expm1(-difference) + difference
    raise ValueError(f"kind={kind!r} is not a KL estimate; use 'k1', 'k2' or 'k3'")


def kl_penalty_rewards(logprobs, ref_logprobs, scores, response_mask, kl_coef, clip_reward=None) -> Array:
    """PPO's per-token rewards: `-kl_coef · (logp - ref)` on the response, plus the clipped score at its last token.

    `scores` [B] are the reward model's, clipped to ±`clip_reward` (None: not clipped). The other arrays and the result
    are [B, T]. A row without a response gets no reward at all.
    """
    keep = jnp.asarray(response_mask) != 0
    scores = _real(scores)
    if clip_reward is not None:
        scores = jnp.clip(scores, -clip_reward, clip_reward)
    penalty = kl_coef * kl_estimate(logprobs, ref_logprobs, "k1", keep)
    return jnp.where(_is_last(keep), scores[:, None], 0) - penalty


def gae(rewards, values, response_mask, gamma: float, lam: float) -> tuple[Array, Array]:
    """Generalised advantage estimates over the responses, and the returns `advantages + values`; both [B, T].

    All inputs are [B, T]; each row's response is one contiguous span, at any column. Nothing is bootstrapped after its
    end, and both results are zero outside it. Advantages are not whitened. Source: Schulman et al. 2016, equation 16.
    """
    keep = jnp.asarray(response_mask) != 0
    rewards, values = _keep(rewards, keep), _keep(values, keep)

    def step(following, now):
        following_advantage, following_value = following
        reward, value, inside = now
        advantage = reward + gamma * following_value - value + gamma * lam * following_advantage
        advantage = jnp.where(inside, advantage, 0)
        return (advantage, value), advantage

    dtype = jnp.promote_types(rewards.dtype, values.dtype)
    columns = (rewards.T.astype(dtype), values.T.astype(dtype), keep.T)
    after_the_end = jnp.zeros(keep.shape[:1], dtype)
    _, advantages = jax.lax.scan(step, (after_the_end, after_the_end), columns, reverse=True)
    return advantages.T, advantages.T + values


def truncated_importance_weights(logprobs, sampler_logprobs, mask, cap: float) -> Array:
    """`min(exp(logp - sampler), cap)` per response token, 1 elsewhere; [B, T] float32.

    What was drawn by one program and is trained by another (other kernels, another precision) is weighed by the ratio
    of their probabilities. Source: Ionides 2008, Truncated Importance Sampling; Yao et al. 2025 for this use.
    """
    keep = jnp.asarray(mask) != 0
    return jnp.minimum(jnp.exp(_keep(logprobs, keep) - _keep(sampler_logprobs, keep)), jnp.where(keep, cap, 1.0))


def policy_loss(
    logprobs, old_logprobs, advantages, mask, clip_range: float, denominator=None, weights=None
) -> tuple[Array, dict[str, Array]]:
    """PPO's clipped surrogate `mean(w·max(-A·r, -A·clip(r, 1 - ε, 1 + ε)))`, r = exp(logp - old), and its statistics.

    All arrays are [B, T]; `weights` w are 1 unless given (`truncated_importance_weights`); `denominator` is the number
    of response tokens of the global (mini)batch. Statistics, each a masked sum over that same denominator, so that
    those of micro-batches add up: `ratio_shift` (mean of r - 1: shares of a mean of 1 would not add up to exactly 1),
    `ratio_spread` (mean of (r - 1)², see `ratio_variance`), `clipfrac` (share of tokens where the clipped term is the
    larger) and `approx_kl` (mean of (logp - old)²/2).
    Source: Schulman et al. 2017, equation 7.
    """
    keep = jnp.asarray(mask) != 0
    log_ratio = _keep(logprobs, keep) - _keep(old_logprobs, keep)
    ratio = jnp.exp(log_ratio)
    advantages = _keep(advantages, keep)
    plain = -advantages * ratio
    clipped = -advantages * jnp.clip(ratio, 1 - clip_range, 1 + clip_range)

    def mean(x):
        return masked_mean(x, keep, denominator)

    stats = {
        "ratio_shift": mean(ratio - 1),
        "ratio_spread": mean(jnp.square(ratio - 1)),
        "clipfrac": mean(clipped > plain),
        "approx_kl": mean(0.5 * jnp.square(log_ratio)),
    }
    loss = jnp.maximum(plain, clipped)
    return mean(loss if weights is None else loss * _keep(weights, keep)), stats


def ratio_variance(stats: dict[str, Array]) -> Array:
    """Variance over tokens of the ratio, from `policy_loss` statistics that were added up over all micro-batches."""
    return jnp.maximum(stats["ratio_spread"] - jnp.square(stats["ratio_shift"]), 0)


def value_loss(values, old_values, returns, mask, clip_range: float, denominator=None) -> tuple[Array, Array]:
    """Clipped value loss `0.5 · mean(max((v - R)², (clip(v, old ± ε) - R)²))`, and the share of tokens it clips.

    All arrays are [B, T]; `denominator` is the number of response tokens of the global (mini)batch.
    """
    keep = jnp.asarray(mask) != 0
    values, old_values, returns = _keep(values, keep), _keep(old_values, keep), _keep(returns, keep)
    plain = jnp.square(values - returns)
    clipped = jnp.square(jnp.clip(values, old_values - clip_range, old_values + clip_range) - returns)
    loss = 0.5 * masked_mean(jnp.maximum(plain, clipped), keep, denominator)
    return loss, masked_mean(clipped > plain, keep, denominator)
