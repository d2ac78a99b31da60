"""The jitted step that SFT and reward modelling share: one model, one loss over labelled rows, accumulation inside."""

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

from jaxrlhf.data import Data, eval_batches, padding_fraction, stream_indices
from jaxrlhf.gradients import accumulate_gradients
from jaxrlhf.models import Decoder, Model, join, param_shardings, split_trainable
from jaxrlhf.runs import Run
from jaxrlhf.sharding import TRAIN_RULES, constrain_tree, optimizer_shardings, place_batch, use
from jaxrlhf.trainers.loop import Announce, Task
from jaxrlhf.trainers.lora import describe_model, export_model
from jaxrlhf.trainers.optimizer import make_optimizer, make_schedule
from jaxrlhf.trainers.settings import DTYPES, batch_devices, total_steps

PyTree = Any
Batch = dict[str, Any]
TOKEN_MASKS = ("attention_mask", "chosen_mask", "rejected_mask")


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


def init_state(model: Model, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    trainable, _ = split_trainable(model.params, model.module)
    placement, _ = split_trainable(param_shardings(model.module, mesh), model.module)
    shardings = optimizer_shardings(optimizer, trainable, placement, mesh)
    opt_state = jax.jit(optimizer.init, out_shardings=shardings)(trainable)
    return TrainState(jnp.int32(0), model.params, opt_state, module=model.module, optimizer=optimizer, mesh=mesh)


def has_dropout(module: Decoder) -> bool:
    c, lora = module.config, module.lora
    return max(c.embed_dropout, c.attention_dropout, c.residual_dropout, lora.dropout if lora else 0) > 0


@partial(jax.jit, static_argnames=("objective", "micro_batches"), donate_argnums=0)
def train_step(
    state: TrainState, batch: Batch, key: jax.Array, *, objective: Objective, micro_batches: int
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One optimizer step on a batch `[B, …]`, in `micro_batches` chunks whose number does not change the result.

    Gradients are taken of the trainable leaves only: all, or the adapters and a scalar head (`split_trainable`).
    """
    with use(state.mesh, TRAIN_RULES):
        count = objective.count(batch)
        trainable, frozen = split_trainable(state.params, state.module)

        def loss(trainable: PyTree, rows: Batch, key: jax.Array | None) -> tuple[jax.Array, dict[str, jax.Array]]:
            return objective.loss(state.module, join(trainable, frozen), rows, count, key)

        dropout_key = jax.random.fold_in(key, state.step) if has_dropout(state.module) else None
        value, stats, grads = accumulate_gradients(loss, trainable, batch, micro_batches, dropout_key)
        updates, opt_state = state.optimizer.update(grads, state.opt_state, trainable)
        placement, _ = split_trainable(param_shardings(state.module, state.mesh), state.module)
        trainable = constrain_tree(optax.apply_updates(trainable, updates), placement)
    metrics = {"loss": value, "grad_norm": optax.global_norm(grads), **stats}
    return state.replace(step=state.step + 1, params=join(trainable, frozen), opt_state=opt_state), metrics


@partial(jax.jit, static_argnames=("module", "mesh", "measure"))
def eval_step(params: PyTree, batch: Batch, *, module: Decoder, mesh: Mesh, measure: Callable) -> dict[str, jax.Array]:
    """Sums over one evaluation batch, as `measure(module, params, batch)` gives them."""
    with use(mesh, TRAIN_RULES):
        return measure(module, params, batch)


def supervised_task(
    name: str,
    run: Run,
    config: Any,
    model: Model,
    tokenizer: Any,
    data: tuple[Data, Data],
    mesh: Mesh,
    *,
    objective: Objective,
    measure: Callable[[Decoder, PyTree, Batch], dict[str, jax.Array]],
    summarise: Callable[[dict[str, float]], dict[str, float]],
    batch_options: dict[str, Any],
) -> tuple[Task, TrainState]:
    """A Task over labelled rows and its initial state; `config` is an SFTConfig or a RewardConfig.

    `measure` sums figures over an evaluation batch, `summarise` turns their totals into metrics, `batch_options` go to
    `data.batch`.
    """
    train, evaluation = data
    rows = config.per_device_train_batch_size * batch_devices(mesh) * config.gradient_accumulation_steps
    eval_rows = config.per_device_eval_batch_size * batch_devices(mesh)
    steps = total_steps(config, len(train), rows)
    optimizer = make_optimizer(config, steps, split_trainable(model.params, model.module)[0])
    schedule = make_schedule(config, steps)
    key = jax.random.fold_in(jax.random.key(config.seed), 1)
    update = Announce(run, f"{name} train step", train_step)
    measured = Announce(run, f"{name} evaluation", eval_step)

    def step(state: TrainState, i: int) -> tuple[TrainState, dict[str, Any]]:
        begin = time.monotonic()
        batch = train.batch(stream_indices(i, rows, len(train), config.seed), **batch_options)
        options = {"objective": objective, "micro_batches": config.gradient_accumulation_steps}
        state, metrics = update(state, place_batch(batch, mesh), key, **options)
        metrics = jax.block_until_ready(metrics)
        tokens = sum(int(batch[mask].sum()) for mask in TOKEN_MASKS if mask in batch)
        seconds = time.monotonic() - begin
        return state, metrics | {
            "learning_rate": schedule(i),
            "epoch": np.float64((i + 1) * rows / len(train)),
            "perf/tokens_per_second": np.float64(tokens / seconds),
            "perf/padding": np.float64(padding_fraction(batch)),
            "timing/step": np.float64(seconds),
        }

    def evaluate(state: TrainState, _: int) -> dict[str, float]:
        totals: dict[str, float] = {}
        for batch in eval_batches(evaluation, eval_rows, **batch_options):
            options = {"module": state.module, "mesh": mesh, "measure": measure}
            sums = jax.device_get(measured(state.params, place_batch(batch, mesh), **options))
            for figure, value in sums.items():
                totals[figure] = totals.get(figure, 0.0) + float(value)
        return summarise(totals)

    def export(state: TrainState) -> None:
        trained = Model(module=state.module, params=state.params, config=model.config)
        dtype = DTYPES[config.save_dtype]
        export_model(trained, run.output_dir, tokenizer, config, config.model_name_or_path, dtype=dtype)

    identity = {
        "trainer": name,
        "seed": config.seed,
        "global_batch_size": rows,
        "micro_batches": config.gradient_accumulation_steps,
        "train_rows": len(train),
        "total_steps": steps,
        "learning_rate": config.learning_rate,
        "lora": describe_model(model).get("lora"),
    }
    task = Task(name, steps, step, evaluate, export, identity, {"params": describe_model(model)})
    return task, init_state(model, optimizer, mesh)
