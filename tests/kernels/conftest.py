"""Kernels compiled ahead of time for devices that are not there, and the TPU's forms in the interpreter."""

import jax
import pytest
from compiled_kernels import compile_for as compile_program
from compiled_kernels import missing

from jaxrlhf.kernels import pallas

OPTIONS = {"xla_backend_optimization_level": 3, "xla_llvm_disable_expensive_passes": False}  # undoes tests/conftest.py


@pytest.fixture
def through_mosaic(monkeypatch):
    """The TPU's form of each kernel in place of the other one, in the interpreter."""

    def dispatch(_, tpu_form, *arrays):
        return tpu_form(*arrays, interpret=True)

    monkeypatch.setattr(pallas, "dispatch", dispatch)


@pytest.fixture(scope="module")
def compile_for():
    """compile_for(target, function, *shapes, **jit) → the compiled program and {kernel: Registers}."""
    # A program out of the cache would come without PTX.
    shortest = jax.config.jax_persistent_cache_min_compile_time_secs
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1e9)

    def compile_(target, function, *shapes, **jit):
        if lacks := missing(target):
            pytest.skip(f"compiling for an absent {target} needs {lacks}")
        return compile_program(target, function, *shapes, options={} if target == "v5e" else OPTIONS, **jit)

    yield compile_
    jax.config.update("jax_persistent_cache_min_compile_time_secs", shortest)
