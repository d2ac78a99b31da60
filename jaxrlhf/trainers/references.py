"""The frozen reference of DPO and its relatives: its log-probs before each step, or of all rows before training."""

import hashlib
import io
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh

from jaxrlhf.config import PathName, Settings, alias
from jaxrlhf.data import Data
from jaxrlhf.data.cache import created, hash_json
from jaxrlhf.data.settings import cache_folder
from jaxrlhf.distributed import gather, is_primary, to_host
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
from jaxrlhf.sharding import TRAIN_RULES, held_rows, place_batch, use
from jaxrlhf.trainers.corruption import checksum
from jaxrlhf.trainers.gradients import map_rows
from jaxrlhf.trainers.narrowing import real_columns, worth_cutting
from jaxrlhf.trainers.programs import Announce
from jaxrlhf.trainers.settings import batch_devices, check_context
from jaxrlhf.trainers.supervised import Batch, Extend, SupervisedConfig
from jaxrlhf.trainers.tokenizers import check_reads_tokens

PyTree = Any
Value = TypeVar("Value")
Logprobs = Callable[[Decoder, PyTree, Batch], dict[str, jax.Array]]
"""Log-probs of the sequences of a batch, by name: `[B]` each, or `[B, P]` of packed rows."""


@dataclass(frozen=True)
class ReferenceOptions(Settings):
    """The reference."""

    reference_model_name_or_path: PathName[Annotated[str | None, alias("ref_model_name_or_path")]] = None
    """Model folder or hub name of the reference; default: the start model, with LoRA its frozen base."""
    precompute_ref_log_probs: bool = False
    """Score all rows with the reference before training, and keep its log-probs beside the tokenised data instead of a
    copy of the model in memory. Another run with the same model, data and precision reads them."""


class ReferencedConfig(SupervisedConfig):
    """Settings of a trainer with a reference."""

    reference: ReferenceOptions


@partial(jax.jit, static_argnames=("logprobs", "module", "mesh", "micro_batches"))
def score_batch(
    params: PyTree, batch: Batch, *, logprobs: Logprobs, module: Decoder, mesh: Mesh, micro_batches: int
) -> dict[str, jax.Array]:
    """Runs `logprobs` of a model without gradients, in `micro_batches` chunks of rows."""
    with use(mesh, TRAIN_RULES):
        params = working_copy(params, logical_axes(module), module, mesh)
        mask = worth_cutting(real_columns(batch), module.config)
        return map_rows(partial(logprobs, module, params), batch, micro_batches, mask)


def add_reference(
    config: ReferencedConfig, logprobs: Logprobs, run: Run, model: Model, mesh: Mesh, data: tuple[Data, Data]
) -> Extend:
    """Returns the function that adds the reference's `logprobs` to a placed batch, as `ref_<name>_logps`.

    With `precompute_ref_log_probs` the data has them already, and no copy of the reference stays.
    """
    own = config.reference.reference_model_name_or_path
    shares = own is None and model.module.lora is not None
    source = model if own is None else load_frozen(config, own, mesh, "the reference model")
    stage = frozen_stage(source.module, config.compute.zero_stage)
    module = source.module.clone(lora=None, zero_stage=stage)
    score = Announce(run, "reference program", partial(score_batch, logprobs=logprobs, module=module, mesh=mesh))
    frozen = None
    if not shares:
        frozen = frozen_copy(source.params, param_shardings(module, mesh), config.mesh.compute_dtype)
    if config.reference.precompute_ref_log_probs:
        params = base_leaves(model.params) if shares else frozen
        for part in data:
            attach(config, part, partial(score, params, micro_batches=1), module, params, mesh)
        return lambda params, batch: batch

    def extend(params: PyTree, batch: Batch) -> Batch:
        found = score(base_leaves(params) if shares else frozen, batch, micro_batches=chunks(config, batch))
        return batch | named(found)

    return extend


def chunks(config: SupervisedConfig, batch: Batch) -> int:
    """Chunks that a batch is scored in: the micro-batches of a step, if they divide its rows."""
    parts = config.run.gradient_accumulation_steps
    return parts if batch["row_mask"].shape[0] % parts == 0 else 1


def named(logps: dict[str, Value]) -> dict[str, Value]:
    return {f"ref_{name}_logps": values for name, values in logps.items()}


def attach(
    config: ReferencedConfig,
    data: Data,
    score: Callable[[Batch], dict[str, jax.Array]],
    module: Decoder,
    params: PyTree,
    mesh: Mesh,
) -> None:
    """Adds the reference's log-probs of every unit to the data, from the cache where another run has left them."""
    sums = to_host(jax.jit(partial(jax.tree.map, checksum))(params))
    weights = {jax.tree_util.keystr(path): int(value) for path, value in jax.tree_util.tree_leaves_with_path(sums)}
    rows = config.run.per_device_eval_batch_size * batch_devices(mesh)
    key = hash_json([data.key, len(data), data.maximum, data.bins is not None, str(module), weights])
    path = cache_folder(config.data) / "references" / key
    if not all(gather("looking for the reference's log-probs", path.exists())):
        write_logprobs(path, score_all(data, score, rows, mesh))
    data.attached = named(read_logprobs(path))


DIGEST = 16  # bytes


def write_logprobs(path: Path, logps: Mapping[str, np.ndarray]) -> None:
    """Writes arrays as an npz file after its own hash."""
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **logps)
    content = buffer.getvalue()
    with created(path) as temporary:
        temporary.write_bytes(hashlib.blake2b(content, digest_size=DIGEST).digest() + content)


def read_logprobs(path: Path) -> dict[str, np.ndarray]:
    """Reads what `write_logprobs` wrote. Raises InputError for a file that was changed since."""
    content = path.read_bytes()
    if hashlib.blake2b(content[DIGEST:], digest_size=DIGEST).digest() != content[:DIGEST]:
        raise InputError(f"{path}: the reference's log-probs are damaged; delete the file, and they are computed again")
    with np.load(io.BytesIO(content[DIGEST:]), allow_pickle=False) as found:
        return dict(found)


def score_all(
    data: Data, score: Callable[[Batch], dict[str, jax.Array]], rows: int, mesh: Mesh
) -> dict[str, np.ndarray]:
    """Scores every unit of the data; float32 `[units, …]`."""
    found: dict[str, np.ndarray] = {}
    for units, scores in scored(data, score, rows, mesh):
        for name, values in scores.items():
            found.setdefault(name, np.zeros((len(data), *values.shape[1:]), np.float32))[units] = values
    return found


def scored(
    data: Data, score: Callable[[Batch], dict[str, jax.Array]], rows: int, mesh: Mesh
) -> Iterator[tuple[np.ndarray, dict[str, np.ndarray]]]:
    """Yields unit numbers, and what `score` gives for them: `rows` at a time, units of similar length together."""
    order = np.argsort(data.lengths(np.arange(len(data))).sum(axis=0), kind="stable")
    for start in range(0, len(order), rows):
        units = order[start : start + rows]
        indices = np.pad(units, (0, rows - len(units)), constant_values=-1)
        batch = place_batch(data.batch(indices, held=held_rows(mesh, rows)), mesh)
        yield units, {name: values[: len(units)] for name, values in to_host(score(batch)).items()}


def load_frozen(config: SupervisedConfig, path: str, mesh: Mesh, name: str) -> Model:
    """Loads a model that is only read. Raises InputError when it has too few positions; `name` stands in the error."""
    model = load_pretrained(
        path,
        mesh=mesh,
        dtype=config.mesh.compute_dtype,
        zero_stage=config.compute.zero_stage,
        progress=is_primary(),
    )
    check_context(model.config, config.data.max_length, f"max_length for {name}")
    return with_kernels(model, **config.compute.kernels)


def check_reference(config: ReferencedConfig) -> None:
    """Raises InputError for a reference that reads other tokens than the model to train, or that nothing can store."""
    if config.reference.precompute_ref_log_probs and config.data.streaming:
        raise InputError(
            "precompute_ref_log_probs and streaming exclude each other: the rows of a stream are not known before "
            "training; leave one of them out"
        )
    path = config.reference.reference_model_name_or_path
    if path is not None:
        tokenizer, model = config.model.load_tokenizer(config.data.template), config.model.model_name_or_path
        shape = read_config(path if model is None else model)
        check_reads_tokens(tokenizer, shape, path, ("the model to train", f"reference_model_name_or_path={path}"))
