"""The proof: the three programs compiled for the planned devices by their own compiler, none of them present.

Runs in a process of its own per program, since the compilers' packages read environment variables when they are
loaded and complain on standard error, where they also say what must be treated as a failure.
"""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass

from jaxrlhf.config import to_dict
from jaxrlhf.errors import InputError
from jaxrlhf.plan.devices import Device
from jaxrlhf.plan.programs import (
    PROGRAMS,
    System,
    build_system,
    lower,
    offloaded_arguments,
    topology_devices,
)
from jaxrlhf.plan.settings import PlanConfig
from jaxrlhf.runs.console import Console

# No device is opened, so the cloud need not be asked for one and several processes may load libtpu at once.
ENVIRONMENT = {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
ENVIRONMENT |= {"TF_CPP_MIN_LOG_LEVEL": "0"}
INVOLUNTARY = "Involuntary full rematerialization"
OUT_OF_MEMORY = "RESOURCE_EXHAUSTED"


@dataclass(frozen=True)
class Compiled:
    """What the compiler reports of one program, in bytes per device."""

    program: str
    arguments: int
    outputs: int
    aliased: int
    temporaries: int
    peak: int
    """Of the buffers that are alive at once, as the compiler itself counts."""
    seconds: float
    problems: tuple[str, ...]
    """Why the program cannot run, or runs badly; empty when all is well."""

    @property
    def bytes(self) -> int:
        """arguments + temporaries + outputs − aliased."""
        return self.arguments + self.temporaries + self.outputs - self.aliased


def check_compiler(device: Device) -> None:
    """InputError that names the missing package and the pip line."""
    if device.platform == "tpu":
        if importlib.util.find_spec("libtpu") is None:
            raise InputError(f"--compile for {device.name} needs libtpu; pip install 'jaxrlhf[plan-tpu]'")
    elif device.platform == "cuda":
        plugins = ("jax_plugins.xla_cuda12", "jax_plugins.xla_cuda13")
        if importlib.util.find_spec("jax_plugins") is None or not any(map(importlib.util.find_spec, plugins)):
            raise InputError(f"--compile for {device.name} needs JAX's CUDA plugin; pip install 'jaxrlhf[plan-cuda]'")
        packaged = importlib.util.find_spec("nvidia") and importlib.util.find_spec("nvidia.cuda_nvcc")
        if not packaged and shutil.which("ptxas") is None:
            raise InputError(
                f"--compile for {device.name} needs the assembler ptxas; pip install nvidia-cuda-nvcc-cu12, or put a "
                "CUDA toolkit's bin folder into PATH"
            )
    else:
        raise InputError(f"--compile: there is no compiler for absent {device.name} devices; leave it out")


def compile_programs(config: PlanConfig, console: Console) -> dict[str, Compiled]:
    """Compile each of PROGRAMS; InputError when a compiler is missing or fails for another reason than memory."""
    check_compiler(config.accelerator)
    where = f"{config.devices} × {config.accelerator.name}"
    results = {}
    for program in PROGRAMS:
        with console.status(f"compiling {program} for {where}"):
            results[program] = _in_a_process(config, program)
    return results


def _in_a_process(config: PlanConfig, program: str) -> Compiled:
    environment = os.environ | ENVIRONMENT
    begin = time.monotonic()
    with tempfile.TemporaryFile("w+", errors="replace") as log:
        command = [sys.executable, "-m", "jaxrlhf.plan.compile", program]
        settings = json.dumps(to_dict(config))
        done = subprocess.run(command, input=settings, stdout=subprocess.PIPE, stderr=log, text=True, env=environment)
        log.seek(0)
        said = log.read()
    return read_outcome(program, done.returncode, done.stdout, said, time.monotonic() - begin)


def read_outcome(program: str, status: int, figures: str, said: str, seconds: float) -> Compiled:
    """What the process found: `figures` from its standard output, `said` the compiler's log.

    Raises InputError, with the end of the log, for a failure that is not one of memory.
    """
    if status:
        memory = re.search(rf"{OUT_OF_MEMORY}.*", said)
        if memory is None:
            tail = "\n  ".join(said.strip().splitlines()[-6:])
            raise InputError(f"--compile: compiling {program} failed:\n  {tail}")
        return Compiled(program, 0, 0, 0, 0, 0, seconds, (f"out of memory: {memory[0][:300]}",))
    problems = [
        f"the compiler moves an array whole between shardings: {line.strip()[:300]}"
        for line in said.splitlines()
        if INVOLUNTARY in line
    ]
    return Compiled(program, **json.loads(figures.splitlines()[-1]), seconds=seconds, problems=tuple(problems[:1]))


def topology_system(config: PlanConfig) -> System:
    """The abstract run on the devices of the compiler's topology."""
    return build_system(config, topology_devices(config.accelerator, config.shape, config.devices))


def main(program: str) -> None:
    """In the process: settings as JSON on standard input, figures as JSON on standard output."""
    config = PlanConfig.create(**json.load(sys.stdin))
    system = topology_system(config)
    memory = lower(system, program).compile().memory_analysis()
    # The TPU compiler counts arguments in host memory apart, the CUDA compiler among the others.
    waiting = 0 if memory.host_argument_size_in_bytes else offloaded_arguments(system, program)
    replaced = waiting if program == "train" else 0
    figures = {
        "arguments": memory.argument_size_in_bytes - waiting,
        "outputs": memory.output_size_in_bytes - replaced,
        "aliased": memory.alias_size_in_bytes - replaced,
        "temporaries": memory.temp_size_in_bytes,
        "peak": memory.peak_memory_in_bytes - waiting,
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main(sys.argv[1])
