"""The losses of routers in training: load balancing and z-loss.

They are means over the tokens of the global batch. The load-balancing loss is a product of two such means, of which
only the routers' probabilities have a gradient. So micro-batches add up to exactly the loss of the whole batch once the
other factor, the share of each expert, is known. With several micro-batches a forward pass over all of them counts the
choices first; one micro-batch needs no such pass.
"""

from dataclasses import dataclass
from typing import Any, cast

import jax
import jax.numpy as jnp

from jaxrlhf import objectives
from jaxrlhf.config import NonNegative, Settings
from jaxrlhf.errors import InputError
from jaxrlhf.models import ROUTER_SUMS, Decoder, DecoderConfig, RouterSums


@dataclass(frozen=True)
class RouterOptions(Settings):
    """Losses of the routers of models with experts."""

    router_aux_loss_coef: NonNegative | None = None
    """Weight of the load-balancing loss, which keeps experts equally busy; default: the model's own."""
    router_z_loss_coef: NonNegative = 0.0
    """Weight of the router z-loss, which keeps the routers' logits small."""

    def coefficients(self, config: DecoderConfig) -> tuple[float, float]:
        """Weights of the load-balancing loss and of the z-loss for a model."""
        own = self.router_aux_loss_coef
        return config.router_aux_loss_coef if own is None else own, self.router_z_loss_coef

    def check_models(self, *configs: DecoderConfig) -> None:
        """Raises InputError for options of routers if no model has experts."""
        if any(config.num_experts for config in configs):
            return
        for name in ("router_aux_loss_coef", "router_z_loss_coef"):
            value = getattr(self, name)
            if value:
                families = " and ".join(dict.fromkeys(config.family for config in configs))
                raise InputError(f"{name}={value}: {families} has no experts; leave it out")


class Recorder:
    """Stands for a Decoder in a loss: `apply` returns the same results, and keeps the sums of the routers."""

    def __init__(self, module: Decoder) -> None:
        self._module = module
        self._sums: list[RouterSums] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)

    def apply(self, *args: Any, **options: Any) -> Any:
        result, state = cast(Any, self._module.apply(*args, mutable=[ROUTER_SUMS], **options))
        self._sums.append(state[ROUTER_SUMS]["layers"]["mlp"]["sums"])
        return result

    @property
    def sums(self) -> RouterSums:
        """Sums of all calls, with a leading axis of layers."""
        return jax.tree.map(lambda *parts: sum(parts), *self._sums)


def router_loss(part: RouterSums, whole: RouterSums, coefficients: tuple[float, float]) -> jax.Array:
    """Computes the share of a micro-batch `part` in the weighted losses of the batch `whole`."""
    balance, z = coefficients
    counts, tokens = jax.lax.stop_gradient((whole.counts.sum(0), whole.tokens.sum()))
    loss = balance * objectives.load_balancing_loss(counts, part.probabilities.sum(0), tokens)
    return loss + z * objectives.router_z_loss(part.squared_log_z.sum(), tokens)


def router_metrics(sums: RouterSums) -> dict[str, jax.Array]:
    """Losses of a batch without their weights, and the largest and smallest share of an expert in its layer's tokens.

    Shares of a layer add up to 1.
    """
    tokens = sums.tokens.sum()
    shares = sums.counts / jnp.maximum(sums.counts.sum(1, keepdims=True), 1)
    return {
        "moe/load_balancing_loss": objectives.load_balancing_loss(
            sums.counts.sum(0), sums.probabilities.sum(0), tokens
        ),
        "moe/z_loss": objectives.router_z_loss(sums.squared_log_z.sum(), tokens),
        "moe/expert_share_max": shares.max(),
        "moe/expert_share_min": shares.min(),
    }
