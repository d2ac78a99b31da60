"""AdamW with gradient clipping and a learning-rate schedule, equal step for step to the usual PyTorch recipe."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import optax

from jaxrlhf.config import Fraction, Ge, Lt, NonNegative, NonNegativeInt, Positive, Settings, alias
from jaxrlhf.errors import InputError

Schedule = Literal["linear", "cosine", "constant"]
DECAYED_LEAVES = ("kernel", "embedding", "lora_a", "lora_b", "lora_rows")
UNDECAYED_LEAVES = ("scale", "bias")


@dataclass(frozen=True)
class OptimizerConfig(Settings):
    """AdamW and the learning-rate schedule."""

    learning_rate: Annotated[NonNegative, alias("actor_learning_rate")] = 9.65e-6
    """Peak learning rate, reached after the warm-up."""
    weight_decay: NonNegative = 0.0
    """Decoupled weight decay of kernels and embeddings; biases and norms never decay."""
    adam_beta1: Annotated[float, Ge(0), Lt(1)] = 0.9
    """Decay of Adam's first moment."""
    adam_beta2: Annotated[float, Ge(0), Lt(1)] = 0.95
    """Decay of Adam's second moment."""
    adam_epsilon: Positive = 1e-8
    """Added to the denominator of Adam's update."""
    max_grad_norm: NonNegative = 1.0
    """Global gradient norm above which gradients are scaled down; 0 turns this off."""
    lr_scheduler_type: Schedule = "cosine"
    """Shape of the learning rate after the warm-up, over all steps of the run."""
    warmup_steps: Annotated[NonNegativeInt, alias("num_warmup_steps")] = 0
    """Steps over which the learning rate rises linearly from 0; the first step then changes nothing. Overrides
    warmup_ratio when above 0."""
    warmup_ratio: Fraction = 0.0
    """Warm-up as a share of all steps, rounded up."""
    min_lr_ratio: Fraction = 0.0
    """Share of the peak that linear and cosine schedules end at, instead of 0."""


def warmup_length(config: OptimizerConfig, total_steps: int) -> int:
    """Number of warm-up steps in a run of `total_steps`."""
    return config.warmup_steps or math.ceil(config.warmup_ratio * total_steps)


def same_past(config: OptimizerConfig, then: int, now: int) -> bool:
    """True when schedules over `then` and over `now` steps, the longer, agree as far as the shorter one goes."""
    return config.lr_scheduler_type == "constant" and warmup_length(config, then) == warmup_length(config, now)


def make_schedule(config: OptimizerConfig, total_steps: int) -> Callable[[Any], jax.Array]:
    """The learning rate (float32) as a function of the number of updates made so far, an int or an int32 scalar array.

    Equal to `transformers.get_scheduler`: with W > 0 warm-up steps the rate is step/W of the peak, so 0 for the first
    update; from then on the schedule falls to `min_lr_ratio` of the peak at `total_steps` and stays there. "constant"
    also honours the warm-up (transformers calls that `constant_with_warmup`). Raises InputError if there is no step.
    """
    if total_steps < 1:
        raise InputError(f"total_steps={total_steps}: a schedule needs at least one step; give more data or epochs")
    warmup = warmup_length(config, total_steps)
    floor = config.min_lr_ratio

    def schedule(step):
        step = jnp.asarray(step, jnp.float32)
        progress = jnp.clip((step - warmup) / max(total_steps - warmup, 1), 0, 1)
        if config.lr_scheduler_type == "linear":
            factor = floor + (1 - floor) * (1 - progress)
        elif config.lr_scheduler_type == "cosine":
            factor = floor + (1 - floor) * 0.5 * (1 + jnp.cos(jnp.pi * progress))
        else:
            factor = jnp.ones_like(progress)
        return config.learning_rate * jnp.where(step < warmup, step / max(warmup, 1), factor)

    return schedule


def decay_mask(params) -> Any:
    """A tree of the structure of `params`: True for the leaves that weight decay shrinks (kernels and embeddings).

    Decided by the ending of the leaf's name and not by its rank, since stacked biases are matrices. Raises ValueError
    for a name that ends in none of the known ones, so that a new kind of parameter cannot get a decay by accident.
    """

    def is_decayed(path, _leaf) -> bool:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if name.endswith(DECAYED_LEAVES):
            return True
        if name.endswith(UNDECAYED_LEAVES):
            return False
        known = ", ".join(DECAYED_LEAVES + UNDECAYED_LEAVES)
        raise ValueError(f"parameter {name!r}: weight decay is decided by name, which must end in one of {known}")

    return jax.tree_util.tree_map_with_path(is_decayed, params)


def clip_by_global_norm(max_norm: float) -> optax.GradientTransformation:
    """Scales all gradients by `min(1, max_norm / (norm + 1e-6))`, as PyTorch does; a `max_norm` of 0 turns it off."""
    if max_norm == 0:
        return optax.identity()

    def update(gradients, params=None):
        factor = jnp.minimum(1, max_norm / (optax.tree.norm(gradients) + 1e-6))
        return jax.tree.map(lambda g: g * factor, gradients)

    return optax.stateless(update)


def make_optimizer(config: OptimizerConfig, total_steps: int, params_like) -> optax.GradientTransformation:
    """Clipping, AdamW and the schedule as one transformation; its updates are added by `optax.apply_updates`.

    `params_like` is the parameter tree or a tree of the same structure (shapes are not read). Moments, norms and
    updates are float32 whatever the dtype of gradients and parameters. The structure of the state does not depend on
    the hyper-parameters, so a run may be resumed with others. Source: Loshchilov & Hutter 2019, algorithm 2.
    """
    transformation = optax.chain(
        clip_by_global_norm(config.max_grad_norm),
        optax.scale_by_adam(config.adam_beta1, config.adam_beta2, config.adam_epsilon),
        optax.add_decayed_weights(config.weight_decay, decay_mask(params_like)),
        optax.scale_by_learning_rate(make_schedule(config, total_steps)),
    )

    def init(params):
        return transformation.init(_float32(params))

    def update(updates, state, params=None, **_):
        return transformation.update(_float32(updates), state, _float32(params))

    return optax.GradientTransformation(init, update)


def updates_made(state: Any) -> jax.Array:
    """How many updates an optimizer state of `make_optimizer` has seen: what its schedule goes by."""
    return optax.tree.get_all_with_path(state, "count")[0][1]


def _float32(tree):
    return jax.tree.map(lambda x: x.astype(jnp.float32), tree)
