"""`jaxrlhf bench`: every section over a sweep of batches, one JSON result, and a table of what was found."""

import os
import re
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from jaxrlhf.bench import ours, work
from jaxrlhf.bench.iteration import Peers, figures, iteration_with_peers, measure_iteration
from jaxrlhf.bench.record import check_output, peak_memory, provenance, reset_peak_memory, timed, write
from jaxrlhf.bench.render import peer_checks, render, table
from jaxrlhf.bench.settings import FIRST_BATCH, ITERATION, KERNEL_SECTIONS, PHASES, BenchConfig
from jaxrlhf.config import to_dict
from jaxrlhf.errors import InputError
from jaxrlhf.models import Decoder
from jaxrlhf.trainers.settings import batch_devices

__all__ = ["BenchConfig", "bench"]

FORMAT = 1
Records = dict[str, dict[str, Any]]


def bench(config: BenchConfig) -> dict[str, Any]:
    """Measure, print and write the result; or render all results. SystemExit when a peer computed something else.

    The file is written after every batch of every section: what ends a run early loses only what it was at.
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
    result: dict[str, Any] = origin | {"format": FORMAT, "settings": to_dict(config), "peaks": measured}
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
        if isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(error):
            raise InputError(
                f"actor={config.actor} and critic={config.critic} do not fit the device's memory; name smaller ones"
            ) from error
        raise
    print(table(result))
    print(f"result: {path}")
    for check in peer_checks(result):
        if check["wrong"]:
            raise SystemExit(f"the peer computes something else: {', '.join(check['wrong'])}")
    return result


def say(text: str) -> None:
    print(text, flush=True)


def default_path(config: BenchConfig) -> Path:
    device = re.sub(r"[^a-z0-9]+", "-", provenance()["device"].lower()).strip("-")
    names = "-".join(config.sections) if len(config.sections) < 4 else "all"
    return Path(config.results) / f"bench-{device}-{names}-{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}.json"


def sections(config: BenchConfig, peaks: work.Peaks) -> Iterator[Records]:
    """The records of one section after the other, those of an iteration together; again after every batch."""
    kernels = {"attention": ours.attention_runs, "logprobs": ours.logprobs_runs}
    for name in KERNEL_SECTIONS:
        if name not in config.sections:
            continue
        say(f"{name}:")
        if name == "decode":
            measure = partial(decode_record, config, peaks, *ours.decode_actor(config))
        else:
            measure = partial(kernel_record, config, peaks, kernels[name])
        yield from sweep(batches(config), lambda rows, m=measure, n=name: {n: m(rows)}, {})
    if config.iterates:
        with iteration_with_peers(config) as (iteration, peers):
            yield from iteration_sections(config, iteration, peers, peaks)


def iteration_sections(
    config: BenchConfig, iteration: ours.Iteration, peers: Peers | None, peaks: work.Peaks
) -> Iterator[Records]:
    """Where memory ends for one phase, the sweep goes on with those before it: training needs most, then scoring."""
    wanted, sizes = [name for name in ITERATION if name in config.sections], batches(config)
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in wanted}
    while wanted:
        say(f"{', '.join(wanted)}:")
        measure = partial(measure_iteration, config, wanted, iteration, peers, peaks, say)
        for records in sweep(sizes, measure, {name: found[name] for name in wanted}):
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
    """What is swept over. A CPU has no limit of its own to stop at, so it gets one."""
    if config.batch:
        return list(config.batch)
    devices = batch_devices(config.make_mesh())
    sizes = [devices * max(1, min(FIRST_BATCH, config.max_batch) // devices)]
    while jax.default_backend() != "cpu" and sizes[-1] * 2 <= config.max_batch:
        sizes.append(sizes[-1] * 2)
    return sizes


def sweep(
    sizes: list[int], measure: Callable[[int], Records], found: dict[str, list[dict[str, Any]]]
) -> Iterator[Records]:
    """After each batch: of each section the record with the most sequences/s, and under `sweep` all up to there.

    `found` are those of smaller batches. The first batch that does not fit the memory is the last, and stands under
    `stopped`; InputError when none fits.
    """
    for rows in sizes:
        try:
            records = measure(rows)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
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


def _swept(found: dict[str, list[dict[str, Any]]], stopped: dict[str, Any] | None) -> Records:
    best = {name: max(records, key=lambda r: r["sequences_per_second"]) for name, records in found.items()}
    return {name: dict(best[name]) | {"sweep": list(found[name]), "stopped": stopped} for name in found}


def kernel_record(
    config: BenchConfig, peaks: work.Peaks, runs_of: Callable[[BenchConfig, int], ours.Runs], rows: int
) -> dict[str, Any]:
    """Of attention or log-probs: the figures with gradients, and under `parts` all."""
    runs = runs_of(config, rows)
    reset_peak_memory()
    times, first = in_turns({part: run for part, (run, _) in runs.items()}, config.repeats)
    parts = {}
    for part, seconds in times.items():
        parts[part] = figures(runs[part][1], seconds, rows, config.length, peaks)
        parts[part]["compile_seconds"] = max(0.0, first[part] - parts[part]["seconds"]["median"])
    say(f"  batch {rows}: " + ", ".join(f"{n} {1e3 * p['seconds']['median']:.2f} ms" for n, p in parts.items()))
    return parts["train"] | {"parts": parts, "peak_memory": peak_memory()}


def decode_record(
    config: BenchConfig, peaks: work.Peaks, module: Decoder, view: Any, mesh: Mesh, rows: int
) -> dict[str, Any]:
    """Of one decode step near the end of the answers: the difference between many steps and one, so without set-up."""
    steps = min(ours.DECODE_STEPS, config.answer)
    runs = ours.decode_runs(module, view, mesh, rows, config.length, steps)
    reset_peak_memory()
    times, first = in_turns(runs, config.repeats)
    seconds = [(many - one) / (steps - 1) for one, many in zip(times["one"], times["many"], strict=True)]
    with_setup = min(seconds) <= 0  # too short to tell apart
    if with_setup:
        seconds = [many / steps for many in times["many"]]
    middle = config.length - steps // 2
    record = figures(work.decode_work(module, rows, middle), seconds, rows, 1, peaks)
    record |= {"sequences_per_second": record["sequences_per_second"] / config.answer, "with_setup": with_setup}
    say(f"  batch {rows}: {1e3 * record['seconds']['median']:.2f} ms a token")
    compiling = max(0.0, first["many"] - min(times["many"]))
    record |= {"compile_seconds": compiling, "peak_memory": peak_memory(), "positions": middle}
    return record | {"decode_attention": ours.decode_kernel(module)}


def in_turns(runs: dict[str, Callable[[], Any]], repeats: int) -> tuple[dict[str, list[float]], dict[str, float]]:
    """(seconds of each run in each of `repeats` rounds, seconds of its first call, which compiles)."""
    first = {name: timed(run)[0] for name, run in runs.items()}
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            times[name].append(timed(run)[0])
    return times, first
