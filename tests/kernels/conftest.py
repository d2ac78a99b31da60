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

GPUS = {  # compute capability, multiprocessors, L2, shared memory per multiprocessor and per block, memory, bandwidth
    "A100": (8, "NONE", 108, 41943040, 167936, 166912, 85100068864, 2039 * 10**9),
    "H200": (9, "ACCELERATED_FEATURES", 132, 52428800, 233472, 232448, 151397597184, 4800 * 10**9),
}
ARCHITECTURE = {"A100": "sm_80", "H200": "sm_90a"}
OPTIONS = {"xla_backend_optimization_level": 3, "xla_llvm_disable_expensive_passes": False}  # undoes tests/conftest.py


def target_config(name: str) -> str:
    major, feature, cores, l2, shared, block, memory, bandwidth = GPUS[name]
    return f"""gpu_device_info {{
  cuda_compute_capability {{ major: {major} feature_extension: {feature} }}
  core_count: {cores} fpus_per_core: 64 clock_rate_ghz: 1.4 l2_cache_size: {l2}
  device_memory_size: {memory} memory_bandwidth: {bandwidth}
  shared_memory_per_core: {shared} shared_memory_per_block_optin: {block} shared_memory_per_block: 49152
  threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  runtime_version: "12.8.0" compile_time_toolkit_version: "12.8.0" driver_version: "12.8.0" dnn_version: "9.10.0"
}}
platform_name: "CUDA" runtime_version {{ major: 12 minor: 8 }} dnn_version_info {{ major: 9 minor: 10 }}
device_description_str: "{name}"
"""


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
        config = target_config(name)
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
            command = ["ptxas", "-v", f"-arch={ARCHITECTURE[name]}", str(path), "-o", "/dev/null"]
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
