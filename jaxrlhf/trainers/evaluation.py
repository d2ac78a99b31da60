"""Evaluations on labelled rows: sums over batches, and metrics of them by source."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxrlhf.data import eval_batches
from jaxrlhf.data.batches import Batches
from jaxrlhf.distributed import to_host
from jaxrlhf.models import Decoder
from jaxrlhf.sharding import TRAIN_RULES, held_rows, place_batch, use
from jaxrlhf.trainers.gradients import micro_batches, sum_parts
from jaxrlhf.trainers.narrowing import mask_to_cut_by, real_columns, worth_cutting
from jaxrlhf.trainers.task import Watch, unwatched

PyTree = Any
Batch = dict[str, Any]


@partial(jax.jit, static_argnames=("module", "mesh", "measure"))
def eval_step(params: PyTree, batch: Batch, *, module: Decoder, mesh: Mesh, measure: Callable) -> dict[str, jax.Array]:
    """Returns the sums of `measure(module, params, rows)` over one evaluation batch, in micro-batches on a CPU."""
    with use(mesh, TRAIN_RULES):
        parts = micro_batches(batch, 1)
        mask = mask_to_cut_by(worth_cutting(real_columns(batch), module.config), 1, parts)
        return sum_parts(lambda rows, _: measure(module, params, rows), batch, parts, None, mask)


def evaluation_totals(
    sums: Callable[[Batch], dict[str, jax.Array]],
    data: Batches,
    batch_size: int,
    mesh: Mesh,
    rows: np.ndarray | None = None,
    watch: Watch = unwatched,
) -> dict[str, float]:
    """Adds up `sums` over the rows of `data`.

    Args:
        sums: of one batch, placed on the mesh.
        data: as `eval_batches` takes it.
        batch_size: rows of a batch.
        mesh: where batches are placed.
        rows: row numbers; None: all rows.
        watch: gets the batches.
    """
    totals: dict[str, float] = {}
    count = -(-len(data if rows is None else rows) // batch_size)
    for batch in watch(eval_batches(data, batch_size, rows, held=held_rows(mesh, batch_size)), count):
        for name, value in to_host(sums(place_batch(batch, mesh))).items():
            totals[name] = totals.get(name, 0.0) + float(value)
    return totals


def metrics_by_source(
    totals: dict[str, dict[str, float]], summarise: Callable[[dict[str, float]], dict[str, float]]
) -> dict[str, float]:
    """Metrics of all sources together; with more than one source, also `<source>/<metric>` of each.

    Args:
        totals: sums of an evaluation, by source.
        summarise: from sums to metrics.
    """
    joint = {name: sum(sums[name] for sums in totals.values()) for name in next(iter(totals.values()))}
    metrics = summarise(joint)
    if len(totals) > 1:
        for source, sums in totals.items():
            metrics |= {f"{source}/{name}": value for name, value in summarise(sums).items()}
    return metrics
