"""The proof of a plan: the devices' own compiler compiles its programs, without the devices.

Each program compiles in its own process, because the compilers' packages read environment variables when they load, and
report failures and warnings on standard error alone. A GPU's compiler also tells its kernels, whose cost is counted
(plan/traffic.py). It gets the flags that training sets, and leaves matrix products to the vendor's library: without a
device it cannot tune its own, so they would count for more than a run's.
"""

import dataclasses
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
from pathlib import Path

import jax

from jaxrlhf.config import to_dict
from jaxrlhf.config.xla_flags import VARIABLE, set_xla_flags
from jaxrlhf.errors import InputError
from jaxrlhf.plan import hlo
from jaxrlhf.plan.devices import Device
from jaxrlhf.plan.programs import lower, offloaded_arguments, topology_devices
from jaxrlhf.plan.settings import PlanConfig
from jaxrlhf.plan.system import System, build_system
from jaxrlhf.plan.traffic import Loops, Traffic, kernels, launches, traffic
from jaxrlhf.rl.config import PPOConfig
from jaxrlhf.runs.console import Console

# No device is opened: libtpu need not ask the cloud for one, and several processes may load it at once.
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TF_CPP_MIN_LOG_LEVEL": "0",
}
INVOLUNTARY = "Involuntary full rematerialization"
OUT_OF_MEMORY = "RESOURCE_EXHAUSTED"


@dataclass(frozen=True)
class Compiled:
    """The compiler's report on one program, in bytes per device."""

    program: str
    arguments: int
    outputs: int
    aliased: int
    temporaries: int
    peak: int
    """Most bytes of buffers that are alive at once, by the compiler's own count."""
    seconds: float
    problems: tuple[str, ...]
    """Reasons why the program cannot run, or runs badly."""
    traffic: Traffic | None = None
    """Cost of its kernels; None for other devices than NVIDIA's."""

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
    """Compile the run's programs; InputError when a compiler is missing or fails for another reason than memory."""
    check_compiler(config.accelerator)
    where = f"{config.devices} × {config.accelerator.name}"
    results = {}
    for program in config.programs:
        with console.status(f"compiling {program} for {where}"):
            results[program] = compile_program(config, program)
    return results


def environment(platform: str) -> dict[str, str]:
    """Environment of a compiling process."""
    found = os.environ | ENVIRONMENT
    if platform == "cuda":
        set_xla_flags(found, platform)
        found[VARIABLE] += " --xla_gpu_enable_triton_gemm=false"
    return found


def compile_program(config: PlanConfig, program: str) -> Compiled:
    """Compile one program in a process of its own."""
    command = [sys.executable, "-m", "jaxrlhf.plan.compile", program]
    begin = time.monotonic()
    done = subprocess.run(
        command,
        input=json.dumps(to_dict(config)),
        capture_output=True,
        text=True,
        errors="replace",
        env=environment(config.accelerator.platform),
    )
    return read_outcome(program, done.returncode, done.stdout, done.stderr, time.monotonic() - begin)


def read_outcome(program: str, status: int, output: str, log: str, seconds: float) -> Compiled:
    """Read the outcome of a compiling process.

    Args:
        program: One of PROGRAMS.
        status: Exit status of the process.
        output: Its standard output, which ends with the sizes as JSON.
        log: Its standard error, the compiler's log.
        seconds: Time that it took.

    Raises:
        InputError: Compilation failed, and not for want of memory; the message has the end of the log.
    """
    if status:
        memory = re.search(rf"{OUT_OF_MEMORY}.*", log)
        if memory is None:
            tail = "\n  ".join(log.strip().splitlines()[-6:])
            raise InputError(f"--compile: compiling {program} failed:\n  {tail}")
        return Compiled(program, 0, 0, 0, 0, 0, seconds, (f"out of memory: {memory[0][:300]}",))
    moved = [line.strip()[:300] for line in log.splitlines() if INVOLUNTARY in line]
    problems = tuple(f"the compiler moves an array whole between shardings: {line}" for line in moved[:1])
    sizes = json.loads(output.splitlines()[-1])
    cost = sizes.pop("traffic", None)
    found = Compiled(program, **sizes, seconds=seconds, problems=problems)
    return found if cost is None else dataclasses.replace(found, traffic=Traffic(**cost))


def compile_for_device(system: System, program: str, device: Device) -> tuple[jax.stages.Compiled, Traffic | None]:
    """Compiles one of PROGRAMS in this process, whose environment is `environment`, and counts its kernels' cost."""
    lowered = lower(system, program)
    if device.platform != "cuda":
        return lowered.compile(), None
    with tempfile.TemporaryDirectory() as folder:
        compiled = lowered.compile(compiler_options={"xla_dump_to": folder})
        dumps = sorted(Path(folder).glob("*.thunk_sequence_after_thunk_passes.txt"))
        thunks = dumps[-1].read_text() if dumps else None
    return compiled, count(compiled.as_text() or "", thunks, system.config, device)


def count(text: str, thunks: str | None, config: PPOConfig, device: Device) -> Traffic:
    """Cost of a compiled program.

    Args:
        text: The optimised HLO.
        thunks: XLA's dump of what it launches; None: every kernel counts as launched by itself.
        config: Settings of the run; its lengths say how often and over how many columns decoding goes.
        device: The device that it was compiled for.
    """
    prompt, response = config.data.max_prompt_seq_len, config.sampling.max_new_tokens
    live = (prompt + (response + 1) / 2) / (prompt + response)
    found = kernels(hlo.parse(text), Loops(response - 1, live))
    return traffic(found, device.rates, None if thunks is None else launches(thunks))


def main(program: str) -> None:
    """Compile in this process: settings as JSON on standard input, sizes as JSON on standard output."""
    config = PlanConfig.create(**json.load(sys.stdin))
    system = build_system(config, topology_devices(config.accelerator, config.shape, config.devices))
    compiled, cost = compile_for_device(system, program, config.accelerator)
    memory = compiled.memory_analysis()
    assert memory is not None
    # The TPU compiler counts arguments in host memory apart, the CUDA compiler among the others.
    waiting = 0 if memory.host_argument_size_in_bytes else offloaded_arguments(system, program)
    replaced = waiting if program == "train" else 0
    sizes = {
        "arguments": memory.argument_size_in_bytes - waiting,
        "outputs": memory.output_size_in_bytes - replaced,
        "aliased": memory.alias_size_in_bytes - replaced,
        "temporaries": memory.temp_size_in_bytes,
        "peak": memory.peak_memory_in_bytes - waiting,
        "traffic": cost and dataclasses.asdict(cost),
    }
    print(json.dumps(sizes))


if __name__ == "__main__":
    main(sys.argv[1])
