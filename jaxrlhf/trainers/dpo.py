"""Direct preference optimisation (DPO): steps 2 and 3 in one, from pairs, without a reward model and without rollouts.

The reference's log-probs come from a program of its own before each step, not from a pass over the data beforehand:
nothing has to be kept per row or made anew on a resume, and an epoch costs the same. The price is a frozen copy in the
compute dtype (in bfloat16 an eighth of masters, gradients and Adam); with LoRA the frozen base serves, uncopied.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Literal

import jax
from jax.sharding import Mesh

from jaxrlhf import objectives
from jaxrlhf.config import Ge, Lt, PathName, Positive, alias, deepspeed_chat, trl
from jaxrlhf.distributed import is_primary
from jaxrlhf.errors import InputError
from jaxrlhf.models import (
    Decoder,
    Model,
    base_leaves,
    frozen_copy,
    frozen_stage,
    load_pretrained,
    logical_axes,
    param_shardings,
    read_config,
    with_kernels,
    working_copy,
)
from jaxrlhf.runs import Run
from jaxrlhf.runs.mirror import works_locally
from jaxrlhf.sharding import TRAIN_RULES, use
from jaxrlhf.trainers.gradients import map_rows
from jaxrlhf.trainers.loop import Announce
from jaxrlhf.trainers.optimizer import OptimizerConfig
from jaxrlhf.trainers.pairs import SIDES, Sides, pair_count, pair_mask, read_pairs
from jaxrlhf.trainers.settings import StepOptions, check_context
from jaxrlhf.trainers.supervised import Batch, Objective, Recipe, SupervisedConfig, TrainState, train_supervised
from jaxrlhf.trainers.tokenizers import check_reads_tokens

PyTree = Any


@dataclass(frozen=True)
class DPOOptions(StepOptions):
    """Direct preference optimisation."""

    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=1e-6)
    beta: Positive = 0.1
    """Weight of the KL constraint to the reference; ipo: its regularisation τ."""
    loss_type: Literal["sigmoid", "robust", "ipo"] = "sigmoid"
    """sigmoid: DPO, conservative DPO with label_smoothing; robust: unbiased when a share of label_smoothing of the
    labels is wrong; ipo: squared distance of the margin per token to 1 / (2 beta)."""
    label_smoothing: Annotated[float, Ge(0), Lt(0.5)] = 0.0
    """Share of pairs whose label is taken to be wrong; not with ipo."""
    reference_free: bool = False
    """Leave the reference out: prefer by the policy's log-probs alone."""
    reference_model_name_or_path: PathName[Annotated[str | None, alias("ref_model_name_or_path")]] = None
    """Model folder or hub name of the reference; default: the start model, with LoRA its frozen base."""

    def check(self) -> None:
        super().check()
        if self.label_smoothing and self.loss_type == "ipo":
            raise InputError(
                f"label_smoothing={self.label_smoothing} does not go with loss_type=ipo, whose margin is bounded "
                "already; leave it at 0, or take sigmoid or robust"
            )
        if self.reference_free and self.reference_model_name_or_path is not None:
            raise InputError(
                f"reference_free and reference_model_name_or_path={self.reference_model_name_or_path} exclude each "
                "other: leave one of them out"
            )
        if self.lora.lora_dropout:
            raise InputError(f"lora_dropout={self.lora.lora_dropout}: dpo never drops out; leave it at 0")


@dataclass(frozen=True)
class DPOConfig(DPOOptions, SupervisedConfig):
    """Direct preference optimisation alone."""

    HIDDEN = frozenset({"train_on", "group_by_length"})
    OTHER_FLAGS = deepspeed_chat.DPO
    TRL_KEYS = trl.DPO


def response_logprobs(module: Decoder, params: PyTree, rows: Batch) -> Sides:
    """Computes log π(response | prompt) of both responses, in one forward pass without dropout.

    Returns:
        `[B]` each, of packed rows `[B, P]`.
    """
    pairs = read_pairs(rows)
    logprobs, _ = module.apply(
        {"params": params},
        pairs.input_ids,
        pairs.attention_mask,
        segment_ids=pairs.segment_ids,
        contiguous=True,
        method="logprobs",
    )
    return pairs.sums(logprobs)


def dpo_loss(
    kind: str,
    beta: float,
    label_smoothing: float,
    module: Decoder,
    params: PyTree,
    rows: Batch,
    count: jax.Array,
    _key: jax.Array | None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Mean loss of the pairs, and TRL's metrics: implicit rewards β·log(π / π_ref) and log-probs of the responses."""
    logps = response_logprobs(module, params, rows)
    ratios = {side: logps[side] - rows[f"ref_{side}_logps"] for side in SIDES}
    lengths = read_pairs(rows).lengths()
    loss = objectives.preference_loss(
        ratios["chosen"],
        ratios["rejected"],
        pair_mask(rows),
        beta,
        kind,
        label_smoothing,
        lengths["chosen"],
        lengths["rejected"],
        denominator=count,
    )
    mean = partial(objectives.masked_mean, mask=pair_mask(rows), denominator=count)
    stats = {f"rewards/{side}": mean(beta * ratios[side]) for side in SIDES}
    stats["rewards/accuracies"] = mean(ratios["chosen"] > ratios["rejected"])
    stats["rewards/margins"] = mean(beta * (ratios["chosen"] - ratios["rejected"]))
    return loss, stats | {f"logps/{side}": mean(logps[side]) for side in SIDES}


def dpo_sums(loss: Callable, module: Decoder, params: PyTree, batch: Batch) -> dict[str, jax.Array]:
    count = pair_count(batch)
    value, stats = loss(module, params, batch, count, None)
    return jax.tree.map(lambda mean: mean * count, {"loss": value, **stats}) | {"pairs": count}


def dpo_metrics(totals: dict[str, float]) -> dict[str, float]:
    pairs = max(totals["pairs"], 1)
    return {name: total / pairs for name, total in totals.items() if name != "pairs"}


@functools.cache
def objective(kind: str, beta: float, label_smoothing: float) -> tuple[Objective, Callable]:
    """The objective and its evaluation sums; made once per setting, so that a jitted step compiles once."""
    loss = partial(dpo_loss, kind, beta, label_smoothing)
    return Objective(pair_count, loss), partial(dpo_sums, loss)


@partial(jax.jit, static_argnames=("module", "mesh", "micro_batches"))
def reference_logprobs(params: PyTree, batch: Batch, *, module: Decoder, mesh: Mesh, micro_batches: int) -> Sides:
    """`response_logprobs` of the reference, in `micro_batches` chunks of rows."""
    with use(mesh, TRAIN_RULES):
        params = working_copy(params, logical_axes(module), module, mesh)
        return map_rows(partial(response_logprobs, module, params), batch, micro_batches)


def add_reference(config: DPOConfig, run: Run, model: Model, mesh: Mesh) -> Callable[[PyTree, Batch], Batch]:
    """Returns the function that adds the reference's `response_logprobs` to a placed batch.

    The arrays are `ref_chosen_logps` and `ref_rejected_logps`.
    """
    if config.reference_free:
        return lambda params, batch: batch | {f"ref_{side}_logps": 0.0 * pair_mask(batch) for side in SIDES}
    own = config.reference_model_name_or_path
    shares = own is None and model.module.lora is not None
    source = model if own is None else load_reference(config, own, model, mesh)
    stage = frozen_stage(source.module, config.compute.zero_stage)
    module = source.module.clone(lora=None, zero_stage=stage)
    frozen = None if shares else frozen_copy(source.params, param_shardings(module, mesh), config.mesh.compute_dtype)
    score = Announce(run, "dpo reference", reference_logprobs)

    def extend(params: PyTree, batch: Batch) -> Batch:
        parts = config.run.gradient_accumulation_steps
        parts = parts if batch["row_mask"].shape[0] % parts == 0 else 1
        reference_params = base_leaves(params) if shares else frozen
        logps = score(reference_params, batch, module=module, mesh=mesh, micro_batches=parts)
        return batch | {f"ref_{side}_logps": logps[side] for side in SIDES}

    return extend


def load_reference(config: DPOConfig, path: str, model: Model, mesh: Mesh) -> Model:
    """Loads a reference of its own. Raises InputError when it has too few positions."""
    reference = load_pretrained(
        path,
        mesh=mesh,
        dtype=config.mesh.compute_dtype,
        zero_stage=config.compute.zero_stage,
        progress=is_primary(),
    )
    check_context(reference.config, config.data.max_length, "max_length for the reference model")
    return with_kernels(reference, **config.compute.kernels)


def check_reference(config: DPOConfig, path: str) -> None:
    """Raises InputError when a reference of its own reads other tokens than the model to train."""
    tokenizer, model = config.model.load_tokenizer(config.data.template), config.model.model_name_or_path
    shape = read_config(path if model is None else model)
    check_reads_tokens(tokenizer, shape, path, ("the model to train", f"reference_model_name_or_path={path}"))


@works_locally
def train_dpo(config: DPOConfig) -> TrainState:
    """Runs DPO; the trained model lies in the run's folder afterwards."""
    if config.reference_model_name_or_path is not None:
        check_reference(config, config.reference_model_name_or_path)  # fails early when the model cannot be used
    loss, measure = objective(config.loss_type, config.beta, config.label_smoothing)
    recipe = Recipe(
        name="dpo",
        title="Direct preference optimisation",
        head="lm",
        headline=("loss", "rewards/accuracies", "rewards/margins", "grad_norm"),
        objective=loss,
        measure=measure,
        summarise=dpo_metrics,
        best=("loss", -1),
        extend=partial(add_reference, config),
    )
    return train_supervised(config, recipe)
