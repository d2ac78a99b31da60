"""`jaxrlhf bench`: every section over a sweep of batches, one JSON result, and a table of its metrics."""

import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

import jax

from jaxrlhf.bench import ours
from jaxrlhf.bench.iteration import Peers, iteration_with_peers, measure_iteration, rates
from jaxrlhf.bench.record import (
    Record,
    Records,
    in_turns,
    peak_memory,
    provenance,
    reset_peak_memory,
    say,
    write,
)
from jaxrlhf.bench.render import peer_checks, render, show
from jaxrlhf.bench.settings import FIRST_BATCH, ITERATION, KERNEL_SECTIONS, PHASES, BenchConfig
from jaxrlhf.config import to_dict
from jaxrlhf.config.files import check_output
from jaxrlhf.errors import InputError
from jaxrlhf.plan.roofline import Peaks, decode
from jaxrlhf.trainers.settings import batch_devices

__all__ = ["BenchConfig", "bench"]

FORMAT = 1


def bench(config: BenchConfig) -> Record:
    """Measure, print and write the result; or render all results.

    The file is written after every batch of every section, so a run that ends early loses only its current batch.

    Returns:
        The result as JSON values; empty after `render`.

    Raises:
        InputError: A setting is refused, or the models do not fit the device's memory.
        SystemExit: A peer computed something else.
    """
    if config.render:
        print(f"{render(Path(config.results), Path(config.document))} results in {config.document}")
        return {}
    # JAX takes three quarters of a GPU's memory at its start: peers need room, and a sweep wants all of it.
    share = ("XLA_PYTHON_CLIENT_PREALLOCATE", "false") if config.peers else ("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")
    os.environ.setdefault(*share)
    config.shapes() if config.iterates else config.actor_shape()
    for rows in batches(config):
        config.parts(rows)
    path = config.json or default_path(config)
    check_output(path, "json" if config.json else "results")
    peaks, measured = ours.measure_peaks(config)
    say(f"device peaks: {measured['tflops']:.3g} TFLOP/s, {measured['gb_per_second']:.4g} GB/s")
    origin = provenance()
    origin["load_average"] = {"before": origin["load_average"]}
    result = origin | {"format": FORMAT, "settings": to_dict(config), "peaks": measured}
    measure(config, peaks, result, path)
    show(result)
    print(f"result: {path}")
    for check in peer_checks(result):
        if check["wrong"]:
            raise SystemExit(f"the peer computes something else: {', '.join(check['wrong'])}")
    return result


def measure(config: BenchConfig, peaks: Peaks, result: Record, path: str | Path) -> None:
    """Add the records of all sections to `result`, and write it after each batch and on an error."""
    written = False
    try:
        for records in sections(config, peaks):
            result |= records
            result["load_average"]["after"] = os.getloadavg()[0]
            write(path, result)
            written = True
    except BaseException as error:
        if written:
            write(path, result | {"ended_by": " ".join([type(error).__name__, *str(error).splitlines()[:1]])})
            say(f"result up to here: {path}")
        if out_of_memory(error):
            raise InputError(
                f"actor={config.actor} and critic={config.critic} do not fit the device's memory; name smaller ones"
            ) from error
        raise


def out_of_memory(error: BaseException) -> bool:
    """True for JAX's error of a device whose memory is full."""
    return isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(error)


def default_path(config: BenchConfig) -> Path:
    """New file in `results`, named after device, sections and time."""
    device = re.sub(r"[^a-z0-9]+", "-", provenance()["device"].lower()).strip("-")
    names = "-".join(config.sections) if len(config.sections) < 4 else "all"
    return Path(config.results) / f"bench-{device}-{names}-{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}.json"


def sections(config: BenchConfig, peaks: Peaks) -> Iterator[Records]:
    """Yield the records of one section after the other, those of an iteration together; again after every batch."""
    for name in (name for name in KERNEL_SECTIONS if name in config.sections):
        say(f"{name}:")
        if name == "decode":
            record = partial(decode_record, config, peaks, ours.decode_actor(config))
        else:
            runs_of = {"attention": ours.attention_runs, "logprobs": ours.logprobs_runs}[name]
            record = partial(kernel_record, config, peaks, runs_of)
        yield from sweep(batches(config), lambda rows, record=record, name=name: {name: record(rows)}, {})
    if config.iterates:
        with iteration_with_peers(config) as (iteration, peers):
            yield from iteration_sections(config, iteration, peers, peaks)


def iteration_sections(
    config: BenchConfig, iteration: ours.Iteration, peers: Peers | None, peaks: Peaks
) -> Iterator[Records]:
    """Yield records of the phases. Training needs most memory, then scoring: the sweep goes on with what still fits."""
    wanted, sizes = [name for name in ITERATION if name in config.sections], batches(config)
    found: dict[str, list[Record]] = {name: [] for name in wanted}
    while wanted:
        say(f"{', '.join(wanted)}:")
        measured = partial(measure_iteration, config, wanted, iteration, peers, peaks)
        stopped = None
        for records in sweep(sizes, measured, {name: found[name] for name in wanted}):
            yield records
            stopped = records[wanted[0]]["stopped"]
        if not stopped:
            return
        last = min(ITERATION.index(wanted[-1]), PHASES.index("train"))
        wanted = [name for name in PHASES[:last] if name in wanted]
        sizes = [rows for rows in sizes if rows >= stopped["batch"]]
        if wanted:  # an update that ended early may have taken the state with it
            iteration.renew()


def batches(config: BenchConfig) -> list[int]:
    """Batch sizes of the sweep. A CPU never runs out of memory, so there it is a single size."""
    if config.batch:
        return list(config.batch)
    devices = batch_devices(config.mesh.make_mesh())
    sizes = [devices * max(1, min(FIRST_BATCH, config.max_batch) // devices)]
    while jax.default_backend() != "cpu" and sizes[-1] * 2 <= config.max_batch:
        sizes.append(sizes[-1] * 2)
    return sizes


def sweep(sizes: list[int], measured: Callable[[int], Records], found: dict[str, list[Record]]) -> Iterator[Records]:
    """Yield after each batch, for each section, the record with the most sequences/s, and all records under `sweep`.

    The first batch that does not fit the memory ends the sweep, and is noted under `stopped`.

    Args:
        sizes: Batch sizes, ascending.
        measured: Measures one batch size.
        found: Records of smaller batches, by section; it grows.

    Raises:
        InputError: No batch fits.
    """
    for rows in sizes:
        try:
            records = measured(rows)
        except jax.errors.JaxRuntimeError as error:
            if not out_of_memory(error):
                raise
            if not any(found.values()):
                raise InputError(
                    f"batch={rows} does not fit the memory of the device; give a smaller --batch or --micro_batch"
                ) from error
            say(f"  batch {rows} does not fit the memory")
            yield _swept(found, {"batch": rows, "reason": str(error).splitlines()[0][:300]})
            return
        for name, record in records.items():
            found.setdefault(name, []).append(record)
        yield _swept(found, None)


def _swept(found: Mapping[str, list[Record]], stopped: Record | None) -> Records:
    best = {name: max(records, key=lambda r: r["sequences_per_second"]) for name, records in found.items()}
    return {name: best[name] | {"sweep": list(found[name]), "stopped": stopped} for name in found}


def kernel_record(
    config: BenchConfig, peaks: Peaks, runs_of: Callable[[BenchConfig, int], ours.Runs], rows: int
) -> Record:
    """Metrics of attention or log-probs with gradients; `parts` holds those of every part."""
    runs = runs_of(config, rows)
    reset_peak_memory()
    times, first = in_turns({part: run for part, (run, _) in runs.items()}, config.repeats)
    parts = {}
    for part, seconds in times.items():
        parts[part] = rates(runs[part][1], seconds, rows, config.length, peaks)
        parts[part]["compile_seconds"] = max(0.0, first[part] - parts[part]["seconds"]["median"])
    say(f"  batch {rows}: " + ", ".join(f"{n} {1e3 * p['seconds']['median']:.2f} ms" for n, p in parts.items()))
    return parts["train"] | {"parts": parts, "peak_memory": peak_memory()}


def decode_record(config: BenchConfig, peaks: Peaks, actor: ours.DecodeActor, rows: int) -> Record:
    """Metrics of one decode step near the end of the responses.

    Its time is the difference between many steps and one, so that set-up does not count.
    """
    steps = min(ours.DECODE_STEPS, config.answer)
    runs = ours.decode_runs(*actor, rows, config.length, steps)
    reset_peak_memory()
    times, first = in_turns(runs, config.repeats)
    seconds = [(many - one) / (steps - 1) for one, many in zip(times["one"], times["many"], strict=True)]
    with_setup = min(seconds) <= 0  # too short to tell apart
    if with_setup:
        seconds = [many / steps for many in times["many"]]
    middle = config.length - steps // 2
    record = rates((decode(actor.module, rows, middle),), seconds, rows, 1, peaks)
    say(f"  batch {rows}: {1e3 * record['seconds']['median']:.2f} ms a token")
    return record | {
        "sequences_per_second": record["sequences_per_second"] / config.answer,
        "with_setup": with_setup,
        "compile_seconds": max(0.0, first["many"] - min(times["many"])),
        "peak_memory": peak_memory(),
        "positions": middle,
        "decode_attention": ours.decode_kernel(actor.module),
    }
