"""AdamW with gradient clipping and a learning-rate schedule, equal step for step to the usual PyTorch recipe."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from jaxrlhf.config import Fraction, Ge, Lt, NonNegative, NonNegativeInt, Positive, Settings, alias
from jaxrlhf.errors import InputError

if TYPE_CHECKING:
    from jaxrlhf.models.model import PyTree

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


class Rates(NamedTuple):
    """Numbers of a learning-rate schedule, float32 scalars.

    A program that takes them as arguments does not depend on them: a run with other numbers finds it compiled.
    """

    peak: Any
    warmup: Any
    """Steps of the warm-up."""
    decay: Any
    """Steps after it, at least 1."""
    floor: Any
    """Share of the peak at the end."""
    span: Any
    """1 - floor."""


def make_rates(config: OptimizerConfig, total_steps: int) -> Rates:
    """Numbers of the schedule over a run of `total_steps`. Raises InputError if there is no step."""
    if total_steps < 1:
        raise InputError(f"total_steps={total_steps}: a schedule needs at least one step; give more data or epochs")
    warmup, floor = warmup_length(config, total_steps), config.min_lr_ratio
    numbers = config.learning_rate, warmup, max(total_steps - warmup, 1), floor, 1 - floor
    return Rates(*map(np.float32, numbers))


def learning_rate(kind: Schedule, rates: Rates, step: ArrayLike) -> jax.Array:
    """The learning rate (float32) after `step` updates, an int or an int32 scalar array.

    Equal to `transformers.get_scheduler`: with W > 0 warm-up steps the rate is step/W of the peak, so 0 for the first
    update; from then on the schedule falls to `floor` of the peak over `decay` steps and stays there. "constant" also
    honours the warm-up (transformers calls that `constant_with_warmup`).
    """
    step = jnp.asarray(step, jnp.float32)
    progress = jnp.clip((step - rates.warmup) / rates.decay, 0, 1)
    if kind == "linear":
        factor = rates.floor + rates.span * (1 - progress)
    elif kind == "cosine":
        factor = rates.floor + rates.span * 0.5 * (1 + jnp.cos(jnp.pi * progress))
    else:
        factor = jnp.ones_like(progress)
    return rates.peak * jnp.where(step < rates.warmup, step / jnp.maximum(rates.warmup, 1), factor)


def make_schedule(config: OptimizerConfig, total_steps: int) -> Callable[[ArrayLike], jax.Array]:
    """`learning_rate` as a function of the number of updates made so far. Raises InputError if there is no step."""
    return partial(learning_rate, config.lr_scheduler_type, make_rates(config, total_steps))


def decay_mask(params) -> "PyTree":
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


def make_optimizer(config: OptimizerConfig, total_steps: int, params_like) -> optax.GradientTransformationExtraArgs:
    """Clipping, AdamW and the schedule as one transformation; its updates are added by `optax.apply_updates`.

    `params_like` is the parameter tree or a tree of the same structure (shapes are not read). Moments, norms and
    updates are float32 whatever the dtype of gradients and parameters. The structure of the state does not depend on
    the hyper-parameters, so a run may be resumed with others. `update(…, rates=…)` takes the numbers of the schedule as
    an argument (`with_rates`). Source: Loshchilov & Hutter 2019, algorithm 2.
    """
    own, mask = make_rates(config, total_steps), decay_mask(params_like)

    def with_schedule(rates: Rates) -> optax.GradientTransformation:
        return optax.chain(
            clip_by_global_norm(config.max_grad_norm),
            optax.scale_by_adam(config.adam_beta1, config.adam_beta2, config.adam_epsilon),
            optax.add_decayed_weights(config.weight_decay, mask),
            optax.scale_by_learning_rate(partial(learning_rate, config.lr_scheduler_type, rates)),
        )

    def init(params):
        return with_schedule(own).init(_float32(params))

    def update(updates, state, params=None, *, rates: Rates | None = None, **_):
        return with_schedule(rates or own).update(_float32(updates), state, _float32(params))

    return optax.GradientTransformationExtraArgs(init, update)


def with_rates(
    optimizer: optax.GradientTransformationExtraArgs, rates: Rates | None
) -> optax.GradientTransformationExtraArgs:
    """The optimizer with other numbers of its schedule, which may be arguments of the program; None: its own."""
    if rates is None:
        return optimizer
    return optax.GradientTransformationExtraArgs(optimizer.init, partial(optimizer.update, rates=rates))


def updates_made(state: optax.OptState) -> jax.Array:
    """The number of updates that an optimizer state of `make_optimizer` has seen. Its schedule reads it."""
    return optax.tree.get_all_with_path(state, "count")[0][1]


def _float32(tree):
    return jax.tree.map(lambda x: x.astype(jnp.float32), tree)
