"""Gradients of a minibatch of the PPO step: of the policy loss, the loss on pretraining text, and the value loss."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import optax

from jaxrlhf import objectives
from jaxrlhf.models import Decoder, join
from jaxrlhf.rl.experience import actor_logprobs, critic_values
from jaxrlhf.rl.hyperparameters import PPOHyperparameters
from jaxrlhf.trainers.gradients import model_gradients
from jaxrlhf.trainers.routers import RouterOptions
from jaxrlhf.trainers.sft import sft_loss, token_count

if TYPE_CHECKING:
    from jaxrlhf.rl.step import PPOState

PyTree = Any


def weights_of_gap(
    h: PPOHyperparameters, logprobs: jax.Array, sampler_logprobs: jax.Array, mask: jax.Array
) -> jax.Array:
    """Importance weights for the gap between the train program and the sampler, `[B, T]`."""
    bounds = h.importance_sampling_floor, h.importance_cap or jnp.inf
    return objectives.importance_weights(logprobs, sampler_logprobs, mask, h.importance_sampling_mode, *bounds)


def policy_gradients(
    state: PPOState, frozen: PyTree, params: PyTree, batch: dict[str, jax.Array], longest: int | None
) -> tuple[dict[str, jax.Array], PyTree, tuple[jax.Array, ...]]:
    """Metrics and gradients of the policy loss on a minibatch.

    Where the rollout has no log-probs, also those of this pass and its entropies `[B, T]`, else nothing.
    """
    h = state.hyperparameters
    shape, tokens_in_batch = batch["tokens"].shape, jnp.sum(batch["response_mask"])

    def loss_of(
        module: Decoder, params: PyTree, b: dict[str, jax.Array], _: jax.Array | None
    ) -> tuple[jax.Array, dict[str, Any]]:
        params = join(params, frozen)
        sequences = b["tokens"], b["mask"], h.temperature, b["response_mask"], longest
        logprobs, entropy = actor_logprobs(module, params, *sequences)
        old = b["logprobs"] if "logprobs" in b else jax.lax.stop_gradient(logprobs)
        weights = None
        if h.importance_cap is not None:
            weights = weights_of_gap(h, old, b["sampler_logprobs"], b["response_mask"])
        stats: dict[str, Any]
        loss, stats = objectives.policy_loss(
            logprobs,
            old,
            b["advantages"],
            b["response_mask"],
            h.cliprange,
            tokens_in_batch,
            weights,
            clip_range_high=h.cliprange_high,
            dual_clip=h.dual_clip,
            token_weights=b.get("token_weights"),
            kind=h.policy_loss,
            sequence_ratio=h.ratio_level == "sequence",
        )

        def mean(x: jax.Array) -> jax.Array:
            if "token_weights" in b:
                return objectives.masked_sum(x * b["token_weights"], b["response_mask"])
            return objectives.masked_mean(x, b["response_mask"], tokens_in_batch)

        if h.kl_in_loss:
            kl = objectives.kl_estimate(logprobs, b["ref_logprobs"], h.kl_estimator, b["response_mask"])
            stats["loss/kl_avg"] = mean(kl)
            loss += state.kl_coef * stats["loss/kl_avg"]
        if h.entropy_coef:
            stats["loss/entropy_avg"] = mean(entropy)
            loss -= h.entropy_coef * stats["loss/entropy_avg"]
        if "row" in b:
            # Rows of other micro-batches are 0, so the sum over micro-batches joins all rows.
            rows, columns = b["row"], logprobs.shape[1]
            placed = [jnp.zeros(shape).at[rows, :columns].set(x) for x in (old, jax.lax.stop_gradient(entropy))]
            stats["known"] = tuple(placed)
        return loss, stats

    policy, stats, grads, routed = model_gradients(
        loss_of, state.actor, params, batch, h.micro_batches, state.mesh, routers=state.routers, mask=batch["mask"]
    )
    known = stats.pop("known", ())
    return _policy_metrics(policy, stats) | routed, grads, known


def _policy_metrics(loss: jax.Array, stats: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """The metrics of a policy loss, under TRL's names."""
    metrics = {
        "loss/policy_avg": loss,
        "policy/approxkl_avg": stats["approx_kl"],
        "policy/clipfrac_avg": stats["clipfrac"],
        "val/ratio": 1 + stats["ratio_shift"],
        "val/ratio_var": objectives.ratio_variance(stats),
    }
    return metrics | {name: value for name, value in stats.items() if name.startswith("loss/")}


def ptx_gradients(
    state: PPOState, frozen: PyTree, params: PyTree, ptx: dict[str, jax.Array]
) -> tuple[jax.Array, PyTree]:
    """Loss on pretraining text in nats per token, and gradients of `ptx_coef` times it; no losses of routers."""
    h = state.hyperparameters

    def loss_of(
        module: Decoder, params: PyTree, b: dict[str, jax.Array], _key: jax.Array | None
    ) -> tuple[jax.Array, jax.Array]:
        loss, _ = sft_loss(module, join(params, frozen), b, token_count(ptx), None)
        return h.ptx_coef * loss, loss

    routers = RouterOptions(router_aux_loss_coef=0.0)
    result = model_gradients(loss_of, state.actor, params, ptx, h.micro_batches, state.mesh, routers=routers)
    return result.stats, result.grads


def critic_gradients(
    state: PPOState, critic: Decoder, frozen: PyTree, params: PyTree, batch: dict[str, jax.Array]
) -> tuple[dict[str, jax.Array], PyTree]:
    """Metrics and gradients of the value loss on a minibatch."""
    h = state.hyperparameters
    tokens_in_batch = jnp.sum(batch["response_mask"])

    def loss_of(
        module: Decoder, params: PyTree, b: dict[str, jax.Array], _: jax.Array | None
    ) -> tuple[jax.Array, jax.Array]:
        values = critic_values(module, join(params, frozen), b["tokens"], b["mask"])
        return objectives.value_loss(
            values, b["values"], b["returns"], b["response_mask"], h.cliprange_value, tokens_in_batch
        )

    value, clipfrac, grads, routed = model_gradients(
        loss_of, critic, params, batch, h.micro_batches, state.mesh, routers=state.routers, mask=batch["mask"]
    )
    metrics = {"loss/value_avg": value, "val/clipfrac_avg": clipfrac, "val/grad_norm": optax.tree.norm(grads)}
    return metrics | {f"val/{name}": x for name, x in routed.items()}, grads
