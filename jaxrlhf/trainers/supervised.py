"""The jitted step that SFT, reward models and DPO share: one model, one loss over labelled rows, accumulated."""

import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from jaxrlhf.data import Data, eval_batches, load_data, load_tokenizer, padding_fraction, stream_indices
from jaxrlhf.distributed import joined, to_host
from jaxrlhf.models import Decoder, Model, ModelCard, join, read_config, split_trainable
from jaxrlhf.runs import Run
from jaxrlhf.sharding import TRAIN_RULES, held_rows, place_batch, replicated, use
from jaxrlhf.trainers.gradients import apply_gradients, frozen_working_copy, init_optimizer, model_gradients
from jaxrlhf.trainers.loop import Announce, Task, fit
from jaxrlhf.trainers.lora import describe_model, export_model, with_adapters
from jaxrlhf.trainers.optimizer import make_optimizer, make_schedule, updates_made
from jaxrlhf.trainers.settings import (
    DTYPES,
    batch_devices,
    check_context,
    lasting_settings,
    load_model,
    open_run,
    total_steps,
    with_special_tokens,
)

PyTree = Any
Batch = dict[str, Any]


class Objective(NamedTuple):
    """A loss over labelled rows: `count(batch)` is the global denominator, `loss` a sum over it.

    `loss(module, params, rows, count, dropout_key)` → (scalar, stats), stats being sums over the same denominator.
    """

    count: Callable[[Batch], jax.Array]
    loss: Callable[[Decoder, PyTree, Batch, jax.Array, jax.Array | None], tuple[jax.Array, dict[str, jax.Array]]]


@flax.struct.dataclass
class TrainState:
    """What one step reads and replaces; donated to `train_step`. With adapters, only they have optimizer state."""

    step: jax.Array
    params: PyTree
    opt_state: PyTree
    module: Decoder = flax.struct.field(pytree_node=False)
    optimizer: optax.GradientTransformation = flax.struct.field(pytree_node=False)
    mesh: Mesh = flax.struct.field(pytree_node=False)


def init_state(
    model: Model, optimizer: optax.GradientTransformation, mesh: Mesh, *, offload_optimizer: bool = False
) -> TrainState:
    trainable, _ = split_trainable(model.params, model.module)
    opt_state = init_optimizer(optimizer, model.module, trainable, mesh, offload=offload_optimizer)
    step = jax.device_put(jnp.int32(0), replicated(mesh))  # as the step returns it, or the second call compiles anew
    return TrainState(step, model.params, opt_state, module=model.module, optimizer=optimizer, mesh=mesh)


def has_dropout(module: Decoder) -> bool:
    c, lora = module.config, module.lora
    return max(c.embed_dropout, c.attention_dropout, c.residual_dropout, lora.dropout if lora else 0) > 0


@partial(jax.jit, static_argnames=("objective", "micro_batches"), donate_argnums=0)
def train_step(
    state: TrainState, batch: Batch, key: jax.Array, *, objective: Objective, micro_batches: int
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One optimizer step on a batch `[B, …]`, in `micro_batches` chunks whose number does not change the result.

    Gradients are taken of the trainable leaves only: all, or the adapters and a scalar head (`split_trainable`). When
    the loss or a gradient is not finite, parameters and optimizer state stay as they were.
    """
    with use(state.mesh, TRAIN_RULES):
        count = objective.count(batch)
        trainable, frozen = split_trainable(state.params, state.module)

        read = frozen_working_copy(frozen, state.module, state.mesh)

        def loss(trainable: PyTree, rows: Batch, key: jax.Array | None) -> tuple[jax.Array, dict[str, jax.Array]]:
            return objective.loss(state.module, join(trainable, read), rows, count, key)

        dropout_key = jax.random.fold_in(key, state.step) if has_dropout(state.module) else None
        value, stats, grads = model_gradients(
            loss, state.module, trainable, batch, micro_batches, state.mesh, dropout_key
        )
        norm = optax.tree.norm(grads)
        finite = jnp.isfinite(value) & jnp.isfinite(norm)
        trainable, opt_state = apply_gradients(
            state.optimizer, state.module, trainable, state.opt_state, grads, state.mesh, finite
        )
    metrics = {"loss": value, "grad_norm": norm, "guard/skipped_updates": ~finite, **stats}
    return state.replace(step=state.step + 1, params=join(trainable, frozen), opt_state=opt_state), metrics


@partial(jax.jit, static_argnames=("module", "mesh", "measure"))
def eval_step(params: PyTree, batch: Batch, *, module: Decoder, mesh: Mesh, measure: Callable) -> dict[str, jax.Array]:
    """Sums over one evaluation batch, as `measure(module, params, batch)` gives them."""
    with use(mesh, TRAIN_RULES):
        return measure(module, params, batch)


def evaluation_totals(
    sums: Callable[[Batch], dict[str, jax.Array]], data: Any, rows: int, mesh: Mesh, **options: Any
) -> dict[str, float]:
    """What `sums` gives for each placed batch of `rows` rows of `data`, added up; `options` go to `data.batch`."""
    totals: dict[str, float] = {}
    for batch in eval_batches(data, rows, held=held_rows(mesh, rows), **options):
        for figure, value in to_host(sums(place_batch(batch, mesh))).items():
            totals[figure] = totals.get(figure, 0.0) + float(value)
    return totals


class Recipe(NamedTuple):
    """What one kind of supervised training adds to the common course."""

    name: str
    """Also the step whose rows `load_data` gives."""
    head: str
    headline: tuple[str, ...]
    objective: Objective
    measure: Callable[[Decoder, PyTree, Batch], dict[str, jax.Array]]
    """Sums of figures over an evaluation batch."""
    summarise: Callable[[dict[str, float]], dict[str, float]]
    """From their totals to metrics."""
    batch_options: dict[str, Any]
    """Passed to `data.batch`."""
    best: tuple[str, int]
    """As in Task."""
    extend: Callable[[Run, Any, Model, Mesh], Callable[[PyTree, Batch], Batch]] = lambda *_: lambda params, batch: batch
    """`extend(run, config, start model, mesh)` is called once; what it returns, before each step and evaluation with
    the current parameters and the placed batch, for a batch of more arrays."""


def train_supervised(config: Any, recipe: Recipe) -> TrainState:
    """Run one supervised step; the trained model lies in `config.output_dir` afterwards."""
    config = joined(config)
    with open_run(config, recipe.headline) as run:
        mesh = config.make_mesh()
        source = config.tokenizer_source
        if config.model_name_or_path is not None:
            read_config(config.model_name_or_path)  # a model that cannot be used is the first thing to say
        tokenizer = load_tokenizer(source)
        model = load_model(config, recipe.head, mesh, len(tokenizer), remat=config.remat)
        model = with_adapters(with_special_tokens(model, tokenizer), config, jax.random.key(config.seed))
        check_context(model.config, config.max_length, "max_length")
        data = load_data(config, tokenizer, recipe.name)
        task, state = supervised_task(run, config, recipe, model, tokenizer, data, mesh)
        return fit(run, config, task, state)


def supervised_task(
    run: Run, config: Any, recipe: Recipe, model: Model, tokenizer: Any, data: tuple[Data, Data], mesh: Mesh
) -> tuple[Task, TrainState]:
    """A Task over labelled rows and its initial state; `config` is the trainer's own."""
    train, evaluation = data
    rows = config.per_device_train_batch_size * batch_devices(mesh) * config.gradient_accumulation_steps
    eval_rows = config.per_device_eval_batch_size * batch_devices(mesh)
    steps = total_steps(config, len(train), rows)
    optimizer = make_optimizer(config, steps, split_trainable(model.params, model.module)[0])
    schedule = make_schedule(config, steps)
    key = jax.random.fold_in(jax.random.key(config.seed), 1)
    update = Announce(run, f"{recipe.name} train step", train_step)
    held = held_rows(mesh, rows)
    measured = Announce(run, f"{recipe.name} evaluation", eval_step)
    extend = recipe.extend(run, config, model, mesh)

    newest: Batch = {}

    def step(state: TrainState, i: int) -> tuple[TrainState, dict[str, Any]]:
        begin = time.monotonic()
        made = int(to_host(updates_made(state.opt_state)))
        indices = stream_indices(i, rows, len(train), config.seed)
        batch = train.batch(indices, held=held, **recipe.batch_options)
        options = {"objective": recipe.objective, "micro_batches": config.gradient_accumulation_steps}
        newest.update(placed := extend(state.params, place_batch(batch, mesh)))
        state, metrics = update(state, placed, key, **options)
        metrics = jax.block_until_ready(metrics)
        tokens = train.token_count(indices)
        seconds = time.monotonic() - begin
        return state, metrics | {
            "learning_rate": schedule(made),
            "epoch": np.float64((i + 1) * rows / len(train)),
            "perf/tokens_per_second": np.float64(tokens / seconds),
            "perf/padding": np.float64(padding_fraction(batch, tokens)),
            "timing/step": np.float64(seconds),
        }

    def evaluate(state: TrainState, _: int) -> dict[str, float]:
        options = {"module": state.module, "mesh": mesh, "measure": recipe.measure}

        def sums(batch: Batch) -> dict[str, jax.Array]:
            return measured(state.params, extend(state.params, batch), **options)

        return recipe.summarise(evaluation_totals(sums, evaluation, eval_rows, mesh, **recipe.batch_options))

    def export(state: TrainState, card: ModelCard) -> None:
        trained = Model(module=state.module, params=state.params, config=model.config)
        dtype = DTYPES[config.save_dtype]
        base = config.model_name_or_path
        export_model(trained, run.output_dir, tokenizer, config, base, dtype=dtype, card=card)

    described = describe_model(model)
    identity = {
        "trainer": recipe.name,
        "model": config.model_name_or_path or config.model_type,
        "data": train.key,
        "global_batch_size": rows,
        "micro_batches": config.gradient_accumulation_steps,
        "train_rows": len(train),
        "total_steps": steps,
        "lora": described.get("lora"),
        **lasting_settings(config),
    }
    base = config.model_name_or_path or f"{config.model_type} with random weights"
    exports = {"params": described}
    task = Task(recipe.name, steps, step, evaluate, export, base, identity, exports, recipe.best, lambda: dict(newest))
    return task, init_state(model, optimizer, mesh, offload_optimizer=config.offload_optimizer)
