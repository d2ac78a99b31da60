"""Compiler flags for the device at hand, set before JAX starts.

XLA reads `XLA_FLAGS` once, when JAX starts its backends, and refuses to run with a flag that it does not know; so the
platform is found out without JAX (`find_platform`), and every flag below is one that JAX 0.10.2 to 0.12 know.
"""

import importlib.util
import sys
from collections.abc import Callable, Mapping, MutableMapping
from pathlib import Path
from typing import NamedTuple

VARIABLE = "XLA_FLAGS"
NVIDIA_FILES = ("/proc/driver/nvidia/version", "/dev/nvidiactl", "/usr/lib/wsl/lib/libcuda.so.1")
TPU_FILES = ("/dev/accel0", "/dev/vfio/0")
_CUDA_PACKAGES = ("jax_cuda12_plugin", "jax_cuda13_plugin")


class Flag(NamedTuple):
    name: str
    value: str
    reason: str


_COMBINED = str(128 * 2**20)

CUDA_FLAGS = (
    Flag(
        "--xla_gpu_enable_command_buffer",
        "+WHILE",
        "loops become command buffers too: decoding launches one CUDA graph instead of every kernel of every token",
    ),
    Flag(
        "--xla_gpu_enable_latency_hiding_scheduler",
        "true",
        "orders operations so that collectives run while others compute",
    ),
    Flag(
        "--xla_disable_hlo_passes",
        "fusion-dynamic-memcpy-rewriter,dynamic-slice-fusion",
        "reads and writes one layer of stacked arrays by kernels: copies in their place cannot be in a command buffer, "
        "and would keep the loops over layers and micro-batches of training and scoring out of it",
    ),
    Flag(
        "--xla_gpu_all_gather_combine_threshold_bytes",
        _COMBINED,
        "the parameters of an FSDP layer are gathered in one collective",
    ),
    Flag(
        "--xla_gpu_reduce_scatter_combine_threshold_bytes",
        _COMBINED,
        "the gradients of an FSDP layer are reduced and split in one collective",
    ),
    Flag(
        "--xla_gpu_all_reduce_combine_threshold_bytes",
        _COMBINED,
        "gradients of replicated parameters are reduced in few large collectives",
    ),
)
RECOMMENDED = {"cuda": CUDA_FLAGS, "tpu": (), "rocm": (), "cpu": ()}
"""By platform; a TPU's compiler overlaps and combines collectives by itself, and a CPU has nothing to gain."""


def find_platform(
    environment: Mapping[str, str],
    exists: Callable[[str], bool] = lambda path: Path(path).exists(),
    installed: Callable[[str], bool] = lambda package: importlib.util.find_spec(package) is not None,
) -> str:
    """The platform that JAX is going to start on: `cuda`, `rocm`, `tpu` or `cpu`. Starts nothing.

    `JAX_PLATFORMS` decides where it is set. Otherwise it is cuda where the driver's files are there (NVIDIA_FILES), a
    CUDA plugin of JAX is installed and CUDA_VISIBLE_DEVICES does not switch the GPUs off; tpu where its device files
    and libtpu are there; else cpu.
    """
    asked = environment.get("JAX_PLATFORMS", "").split(",")[0].strip().lower()
    if asked == "rocm":
        return "rocm"
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    hidden = visible is not None and visible.split(",")[0].strip() in ("", "-1")
    gpu = any(map(exists, NVIDIA_FILES)) and any(map(installed, _CUDA_PACKAGES)) and not hidden
    if asked:
        return "cuda" if asked == "cuda" or (asked == "gpu" and gpu) else asked if asked in RECOMMENDED else "cpu"
    if gpu:
        return "cuda"
    return "tpu" if any(map(exists, TPU_FILES)) and installed("libtpu") else "cpu"


def set_xla_flags(environment: MutableMapping[str, str], platform: str | None = None, verbose: bool = False) -> None:
    """Put the flags of the platform into `XLA_FLAGS`, before those that are there; a flag that is there stays as it is.

    `verbose` prints each to stderr, with its reason. To be called before JAX starts; without effect after.
    """
    platform = find_platform(environment) if platform is None else platform
    own = environment.get(VARIABLE, "")
    taken = {name: value for name, _, value in (word.partition("=") for word in own.split())}
    flags = RECOMMENDED[platform]
    added = [flag for flag in flags if flag.name not in taken]
    if verbose:
        print(f"XLA flags for {platform}: {'none' if not flags else ''}".rstrip(), file=sys.stderr)
        for flag in flags:
            value = taken.get(flag.name, flag.value)
            given = "" if value == flag.value else f"   (as {VARIABLE} has it, instead of {flag.value})"
            print(f"  {flag.name}={value}{given}\n      {flag.reason}", file=sys.stderr)
    if added:
        environment[VARIABLE] = " ".join([*(f"{flag.name}={flag.value}" for flag in added), own]).strip()
