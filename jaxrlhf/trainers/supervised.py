"""The jitted step that SFT, reward models and DPO share: one model, one loss over labelled rows, accumulated."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from jaxrlhf import keys
from jaxrlhf.config import lasting, lasting_defaults
from jaxrlhf.data import Data, Tokenizer, load_data
from jaxrlhf.distributed import joined, to_host
from jaxrlhf.models import Decoder, Model, ModelCard, join, split_trainable
from jaxrlhf.runs import Run
from jaxrlhf.sharding import TRAIN_RULES, abstract, held_rows, place_batch, replicated, use
from jaxrlhf.trainers.corruption import run_twice
from jaxrlhf.trainers.evaluation import eval_step, evaluation_totals, metrics_by_source
from jaxrlhf.trainers.gradients import (
    apply_gradients,
    exceeds,
    frozen_working_copy,
    init_optimizer,
    model_gradients,
)
from jaxrlhf.trainers.guards import History, Limits, StepPlan, robust_limit
from jaxrlhf.trainers.loop import fit
from jaxrlhf.trainers.lora import check_base, describe_model, export_model, with_adapters
from jaxrlhf.trainers.narrowing import real_columns
from jaxrlhf.trainers.on_policy import OnPolicy, OwnResponses
from jaxrlhf.trainers.optimizer import (
    Rates,
    make_optimizer,
    make_rates,
    make_schedule,
    same_past,
    updates_made,
    with_rates,
)
from jaxrlhf.trainers.packing_advice import packing_advice
from jaxrlhf.trainers.programs import Announce
from jaxrlhf.trainers.resuming import same_rows, start_from
from jaxrlhf.trainers.routers import RouterOptions
from jaxrlhf.trainers.settings import (
    DTYPES,
    StepConfig,
    StepOptions,
    batch_devices,
    check_context,
    open_run,
)
from jaxrlhf.trainers.starting import load_model
from jaxrlhf.trainers.task import Metrics, Watch, unwatched
from jaxrlhf.trainers.tokenizers import with_special_tokens

PyTree = Any
Batch = dict[str, Any]
MASKS = ("attention_mask", "chosen_mask", "rejected_mask")
"""Arrays `[B, T]` of a batch that mark its tokens, where it has them."""


Extend = Callable[[PyTree, Batch], Batch]
"""Adds arrays to a placed batch of steps and evaluations, given the current parameters."""


class Objective(NamedTuple):
    """A loss over labelled rows.

    `count(batch)` is the global denominator, or several. `loss(module, params, rows, count, dropout_key)` returns a
    scalar and stats, all sums over these denominators.
    """

    count: Callable[[Batch], Any]
    loss: Callable[[Decoder, PyTree, Batch, Any, jax.Array | None], tuple[jax.Array, dict[str, jax.Array]]]


class TrainState(flax.struct.PyTreeNode):
    """The state that one step replaces; donated to `train_step`. With adapters, only they have optimizer state."""

    step: jax.Array
    params: PyTree
    opt_state: PyTree
    module: Decoder = flax.struct.field(pytree_node=False)
    optimizer: optax.GradientTransformationExtraArgs = flax.struct.field(pytree_node=False)
    mesh: Mesh = flax.struct.field(pytree_node=False)


def init_state(
    model: Model, optimizer: optax.GradientTransformationExtraArgs, mesh: Mesh, *, offload_optimizer: bool = False
) -> TrainState:
    trainable, _ = split_trainable(model.params, model.module)
    opt_state = init_optimizer(optimizer, model.module, trainable, mesh, offload=offload_optimizer)
    step = jax.device_put(jnp.int32(0), replicated(mesh))  # as the step returns it, or the second call compiles anew
    return TrainState(step, model.params, opt_state, module=model.module, optimizer=optimizer, mesh=mesh)


def token_sum(batch: Batch) -> jax.Array:
    """Number of the batch's tokens, int32, without the one that a filler row has."""
    mask = sum(batch[name] for name in MASKS if name in batch)
    return jnp.sum(mask * batch["row_mask"][:, None])


def has_dropout(module: Decoder) -> bool:
    c, lora = module.config, module.lora
    return max(c.embed_dropout, c.attention_dropout, c.residual_dropout, lora.dropout if lora else 0) > 0


@partial(jax.jit, static_argnames=("objective", "micro_batches", "routers"), donate_argnums=0)
def train_step(
    state: TrainState,
    batch: Batch,
    key: jax.Array,
    *,
    objective: Objective,
    micro_batches: int,
    routers: RouterOptions = RouterOptions(),  # noqa: B008 - frozen
    limits: Limits | None = None,
    rates: Rates | None = None,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """Makes one optimizer step on a batch.

    Only trainable leaves get gradients: all, or the adapters and a scalar head (`split_trainable`). When the loss or a
    gradient is not finite, or above its limit, parameters and optimizer state stay as they were.

    Args:
        state: donated.
        batch: arrays `[B, …]`.
        key: of dropout.
        objective: the loss.
        micro_batches: chunks that the batch is worked through in; their number does not change the result.
        routers: weights of the losses of routers.
        limits: of `loss` and `grad_norm`.
        rates: numbers of the schedule; default: those that the optimizer was made with.

    Returns:
        The new state, and `loss`, `grad_norm`, `guard/skipped_updates`, `tokens` (`token_sum`), the objective's stats,
        and `router_metrics` of a model with experts. `loss` has no losses of routers in it. With limits also
        `guard/spike`.
    """
    with use(state.mesh, TRAIN_RULES):
        count, tokens = objective.count(batch), token_sum(batch)
        trainable, frozen = split_trainable(state.params, state.module)

        read = frozen_working_copy(frozen, state.module, state.mesh)

        def loss(
            module: Decoder, trainable: PyTree, rows: Batch, key: jax.Array | None
        ) -> tuple[jax.Array, dict[str, jax.Array]]:
            return objective.loss(module, join(trainable, read), rows, count, key)

        dropout_key = jax.random.fold_in(key, state.step) if has_dropout(state.module) else None
        value, stats, grads, routed = model_gradients(
            loss, state.module, trainable, batch, micro_batches, state.mesh, dropout_key, routers, real_columns(batch)
        )
        norm = optax.tree.norm(grads)
        finite = jnp.isfinite(value) & jnp.isfinite(norm)
        metrics = {"loss": value, "grad_norm": norm, "guard/skipped_updates": ~finite, "tokens": tokens}
        spike = finite & exceeds(metrics, limits)
        optimizer = with_rates(state.optimizer, rates)
        trainable, opt_state = apply_gradients(
            optimizer, state.module, trainable, state.opt_state, grads, state.mesh, finite & ~spike
        )
    metrics |= {**stats, **routed} | ({} if limits is None else {"guard/spike": spike})
    return state.replace(step=state.step + 1, params=join(trainable, frozen), opt_state=opt_state), metrics


def unextended(params: PyTree, batch: Batch) -> Batch:
    """The batch itself: the loss reads what the data has."""
    return batch


@dataclass(frozen=True)
class Recipe:
    """One kind of supervised training: its loss, its metrics, its data."""

    name: str
    """Command, and name of the trainer in records."""
    title: str
    """Name in reports and model cards."""
    head: str
    headline: tuple[str, ...]
    objective: Objective
    measure: Callable[[Decoder, PyTree, Batch], dict[str, jax.Array]]
    """Sums of metrics over an evaluation batch."""
    summarise: Callable[[dict[str, float]], dict[str, float]]
    """From their totals to metrics."""
    best: tuple[str, int]
    """As in Task."""
    extend: Callable[[Run, Model, Mesh, tuple[Data, Data]], Extend] = lambda *_: unextended
    """Called once with run, start model, mesh, and the training and evaluation data."""
    rows: str = ""
    """Step whose rows `load_data` gives, if not `name`."""
    packable: bool = True
    """True if rows may be packed."""
    on_policy: OwnResponses | None = None
    """Batches whose responses the model or its teacher samples; None: none of them."""


@dataclass(frozen=True)
class SupervisedConfig(StepOptions, StepConfig):
    """The settings of SFT, reward models and DPO, without what is their own."""


def train_supervised(config: SupervisedConfig, recipe: Recipe) -> TrainState:
    """Runs one supervised step; the trained model lies in the run's folder afterwards."""
    config = joined(config)
    with open_run(config, config.run.logging_steps, recipe.headline) as run:
        mesh = config.mesh.make_mesh()
        devices = batch_devices(mesh)
        config = same_rows(config, run, rows_of(config, devices), devices)
        check_base(config.lora, config.model.model_name_or_path)
        tokenizer = config.model.load_tokenizer(config.data.template)  # fails early when the model cannot be used
        model = load_model(config, recipe.head, mesh, tokenizer, remat=config.run.remat)
        key = keys.stream(config.data.seed, keys.Stream.ADAPTERS)
        model = with_adapters(with_special_tokens(model, tokenizer), config.lora, key)
        check_context(model.config, config.data.max_length, "max_length")
        config.routers.check_models(model.config)
        task = SupervisedTask(
            run, config, recipe, model, tokenizer, load_data(config.data, tokenizer, recipe.rows or recipe.name)
        )
        folder, options = config.folder, config.checkpoint
        return fit(
            run,
            config.run,
            task,
            start_from(run, options, task.initial_state(), folder.resume),
            resume=folder.resume,
            named=folder.resume_from_checkpoint,
            allowed=options.allow_changes,
        )


def rows_of(config: SupervisedConfig, devices: int) -> int:
    """Rows of a step."""
    return config.run.per_device_train_batch_size * config.run.gradient_accumulation_steps * devices


class SupervisedTask:
    """The steps of SFT, a reward model or DPO over labelled rows (a `Task`)."""

    def __init__(
        self,
        run: Run,
        config: SupervisedConfig,
        recipe: Recipe,
        model: Model,
        tokenizer: Tokenizer,
        data: tuple[Data, Data],
    ) -> None:
        self.run, self.config, self.recipe, self.model, self.tokenizer = run, config, recipe, model, tokenizer
        self.train, self.evaluation = data
        self.mesh = mesh = config.mesh.make_mesh()
        self.micro_batches, self.devices = config.run.gradient_accumulation_steps, batch_devices(mesh)
        self.rows = rows_of(config, self.devices)
        self.name, self.title, self.best = recipe.name, recipe.title, recipe.best
        self.total_steps = config.run.total_steps(lambda: len(self.train), self.rows)
        self.data_names = config.data.names
        self.trainable = split_trainable(model.params, model.module)[0]
        self.optimizer = make_optimizer(config.optimizer, self.total_steps, self.trainable)
        self.schedule = make_schedule(config.optimizer, self.total_steps)
        self.rates = make_rates(config.optimizer, self.total_steps)
        self.key = keys.stream(config.data.seed, keys.Stream.DROPOUT)
        self._update = Announce(run, f"{recipe.name} train step", train_step)
        self._measure = Announce(run, f"{recipe.name} evaluation", eval_step)
        self._extend = recipe.extend(run, model, mesh, data)
        self._on_policy = None
        if recipe.on_policy is not None:
            recipe.on_policy.pieces.check_pieces(self.rows)
            self._on_policy = OnPolicy(run, recipe.on_policy, model, mesh, tokenizer, self.train, config.data.seed)
        self._newest: Batch = {}
        self._advice = None
        if recipe.packable:
            self._advice = packing_advice(config.data, self.train, recipe.rows or recipe.name)
        start = config.model.start.model_type
        self.base_model = config.model.model_name_or_path or f"{start} with random weights"
        described = describe_model(model)
        self.exports = {"params": described}
        self.identity = {
            "trainer": recipe.name,
            "model": config.model.model_name_or_path or start,
            "data": self.train.key,
            "global_batch_size": self.rows,
            "micro_batches": self.micro_batches,
            "train_rows": self.train.size,
            "total_steps": self.total_steps,
            "lora": described.get("lora"),
            **lasting(config),
        }
        self.defaults = lasting_defaults(type(config))

    def initial_state(self) -> TrainState:
        return init_state(self.model, self.optimizer, self.mesh, offload_optimizer=self.config.run.offload_optimizer)

    def prepare(self, state: TrainState, plan: StepPlan) -> None:
        if self.mesh.size > 1 or self._on_policy is not None or self._extend is not unextended:
            return
        args = (*abstract((state, self._batch(state.params, plan.batch)[0])), self.key)
        options = self._options(plan)
        self._update.compile_ahead(lambda: train_step.lower(*args, **options).compile())

    def _options(self, plan: StepPlan) -> dict[str, Any]:
        """Arguments of `train_step` by name."""
        return {
            "objective": self.recipe.objective,
            "micro_batches": self.micro_batches,
            "routers": self.config.routers,
            "limits": plan.limits,
            "rates": self.rates,
        }

    def step(self, state: TrainState, plan: StepPlan) -> tuple[TrainState, Metrics]:
        begin = time.monotonic()
        made = int(to_host(updates_made(state.opt_state)))
        batch, sampled = self._batch(state.params, plan.batch)
        self._newest = self._extend(state.params, batch)
        update = partial(run_twice, self._update) if plan.twice else self._update
        state, metrics = update(state, self._newest, self.key, **self._options(plan))
        metrics = to_host(metrics)
        tokens = metrics.pop("tokens")
        positions = sum(batch[name].size for name in MASKS if name in batch)
        seconds, padding = time.monotonic() - begin, 1 - tokens / positions
        if self._advice is not None and (advice := self._advice.after(padding)):
            self.run.print(advice)
        return state, metrics | sampled | {
            "learning_rate": self.schedule(made),
            **self.train.progress(plan.batch + 1, self.rows),
            "perf/tokens_per_second": np.float64(tokens / seconds),
            "perf/padding": np.float64(padding),
            "timing/step": np.float64(seconds),
        }

    def _batch(self, params: PyTree, number: int) -> tuple[Batch, Metrics]:
        """The placed rows of a batch, with responses of the data or sampled ones; and metrics of the sampling."""
        indices, sampled = self.train.indices(number, self.rows), {}
        if self._on_policy is not None:
            batch, sampled = self._on_policy.rows(params, indices, number)
            if batch is not None:
                return batch, sampled
        return place_batch(self.train.batch(indices, held=held_rows(self.mesh, self.rows)), self.mesh), sampled

    def limits(self, history: History) -> dict[str, float]:
        threshold = self.config.run.guard.spike_threshold
        return {name: robust_limit(history.get(name, ()), threshold) for name in ("loss", "grad_norm")}

    def evaluate(self, state: TrainState, done: int, watch: Watch = unwatched) -> dict[str, float]:
        def sums(batch: Batch) -> dict[str, jax.Array]:
            extended = self._extend(state.params, batch)
            return self._measure(
                state.params, extended, module=state.module, mesh=self.mesh, measure=self.recipe.measure
            )

        size = self.config.run.per_device_eval_batch_size * batch_devices(self.mesh)
        totals = {
            source: evaluation_totals(sums, self.evaluation, size, self.mesh, rows, watch)
            for source, rows in self.evaluation.rows_by_source().items()
        }
        return metrics_by_source(totals, self.recipe.summarise)

    def export(self, state: TrainState, card: ModelCard) -> None:
        trained = Model(module=state.module, params=state.params, config=self.model.config)
        export_model(
            trained,
            self.run.output_dir,
            self.tokenizer,
            self.config.lora.lora_export,
            self.config.model.model_name_or_path,
            dtype=DTYPES[self.config.run.save_dtype],
            card=card,
        )

    def last_batch(self) -> Batch:
        return self._newest

    def same_past(self, steps: int) -> bool:
        return same_past(self.config.optimizer, steps, self.total_steps)
