"""Kernels compiled ahead of time for NVIDIA devices that are not there: what ptxas says of each."""

import importlib.util
import re
import shutil
import subprocess

import jax
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, SingleDeviceSharding

from jaxrlhf.kernels import pallas
from jaxrlhf.plan.devices import DEVICES as PLANNED
from jaxrlhf.plan.devices import target_config

DEVICES = {"A100": ("a100-80g", "sm_80"), "H200": ("h200", "sm_90a")}
OPTIONS = {"xla_backend_optimization_level": 3, "xla_llvm_disable_expensive_passes": False}  # undoes tests/conftest.py


@pytest.fixture
def through_mosaic(monkeypatch):
    """The TPU's form of each kernel in place of the other one, in the interpreter."""

    def dispatch(_, tpu_form, *arrays):
        return tpu_form(*arrays, interpret=True)

    monkeypatch.setattr(pallas, "dispatch", dispatch)


@pytest.fixture(scope="module")
def compile_for(tmp_path_factory):
    """compile_for(device, function, *shapes) → the compiled program and {kernel: (registers, spilled bytes)}."""
    found = importlib.util.find_spec("jax_plugins")
    if not found or not importlib.util.find_spec("jax_plugins.xla_cuda12") or not shutil.which("ptxas"):
        pytest.skip("needs JAX's CUDA plugin and ptxas to compile for absent devices")

    # A program out of the cache would come without PTX.
    shortest = jax.config.jax_persistent_cache_min_compile_time_secs
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1e9)

    def compile_program(name, function, *shapes):
        known, architecture = DEVICES[name]
        config = target_config(PLANNED[known])
        device = topologies.get_topology_desc(
            platform="cuda", topology_name="", topology="1x1x1", target_config=config
        ).devices[0]
        place = SingleDeviceSharding(device)
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes)
        folder = tmp_path_factory.mktemp("ptx")
        # Newer JAX wants to know at lowering which devices it compiles for.
        with jax.set_mesh(Mesh(np.array([device]), ("x",), axis_types=(AxisType.Auto,))):
            compiled = jax.jit(function).lower(*shapes).compile(compiler_options=OPTIONS | {"xla_dump_to": str(folder)})
        figures = {}
        for path in (path for path in folder.glob("*.ptx") if ".entry" in path.read_text()):
            command = ["ptxas", "-v", f"-arch={architecture}", str(path), "-o", "/dev/null"]
            said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
            entries = re.findall(
                r"entry function '(\w+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers",
                said,
                re.DOTALL,
            )
            figures |= {kernel: (int(used), int(out) + int(back)) for kernel, out, back, used in entries}
        return compiled, figures

    yield compile_program
    jax.config.update("jax_persistent_cache_min_compile_time_secs", shortest)
