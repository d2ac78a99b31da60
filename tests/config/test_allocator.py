"""Memory kept from step to step: what is set, what is left alone, and that pages come only once."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from jaxrlhf.config import allocator
from jaxrlhf.config.allocator import OPTIONS, give_back, keep_memory
from jaxrlhf.errors import InputError
from jaxrlhf.runs import system
from jaxrlhf.runs.console import Console
from jaxrlhf.trainers import programs

on_glibc = pytest.mark.skipif(allocator.glibc() is None, reason="the C library is not glibc")


class Library:
    """Stands for glibc and records its calls."""

    def __init__(self):
        self.told = []

    def mallopt(self, number, value):
        self.told.append((number, value))

    def malloc_trim(self, padding):
        self.told.append("trim")


@pytest.fixture
def library(monkeypatch):
    library = Library()
    monkeypatch.setattr(allocator, "glibc", lambda: library)
    return library


def test_a_run_on_a_cpu_keeps_memory(library, capsys):
    assert keep_memory({}, "cpu", verbose=True)
    assert library.told == [(-8, 1), (-4, 0), (-1, -1)]
    printed = capsys.readouterr().err
    assert all(f"{option.name}={option.value}" in printed and option.reason in printed for option in OPTIONS)


@pytest.mark.parametrize(
    ("environment", "platform"),
    [
        ({"JAXRLHF_KEEP_MEMORY": "0"}, "cpu"),
        ({"GLIBC_TUNABLES": "glibc.malloc.arena_max=4"}, "cpu"),
        ({}, "cuda"),
        ({}, "tpu"),
    ],
)
def test_the_switch_glibc_tunables_and_other_platforms_leave_the_allocator_alone(library, environment, platform):
    assert not keep_memory(environment, platform)
    assert library.told == []


def test_variables_of_the_user_win(library):
    assert keep_memory({"MALLOC_ARENA_MAX": "4"}, "cpu")
    assert library.told == [(option.number, option.value) for option in OPTIONS[1:]]


def test_other_c_libraries_are_left_alone(monkeypatch):
    monkeypatch.setattr(allocator, "glibc", lambda: None)
    assert not keep_memory({}, "cpu")
    give_back()


def test_another_value_of_the_switch_is_refused():
    with pytest.raises(InputError, match="JAXRLHF_KEEP_MEMORY=yes: set it to 1"):
        keep_memory({"JAXRLHF_KEEP_MEMORY": "yes"}, "cpu")


ARRAYS = """
import ctypes, os, resource, sys
from jaxrlhf.config.allocator import give_back, keep_memory
keep_memory(dict(os.environ), "cpu")
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    array = libc.malloc(64 << 20)
    ctypes.memset(array, 1, 64 << 20)
    libc.free(array)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
first, second = faults(), faults()
give_back()
print(first, second, faults())
"""


@on_glibc
@pytest.mark.parametrize("kept", [True, False])
def test_a_second_array_gets_pages_of_the_first_until_they_are_given_back(kept):
    environment = {"JAXRLHF_KEEP_MEMORY": str(int(kept)), "PYTHONPATH": str(Path(allocator.__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", ARRAYS], env=environment, capture_output=True, text=True, check=True)
    first, second, after = map(int, done.stdout.split())
    pages = (64 << 20) // 4096
    assert (second < pages / 100) == kept
    assert min(first, after) > 100 * second or not kept


@pytest.mark.parametrize(("available", "scarce"), [(9, False), (7, True)])
def test_unused_memory_is_given_back_when_the_machine_has_little(library, monkeypatch, available, scarce):
    monkeypatch.setattr(system, "available_memory", lambda: available)
    monkeypatch.setattr(system, "_resident_bytes", lambda: 64)
    monkeypatch.setattr(system.time, "monotonic", lambda: 0.0)
    assert system.MemoryRelief().after_step() == scarce
    assert library.told == ["trim"] * scarce


def test_unused_memory_is_given_back_after_long_steps(library, monkeypatch):
    clock = iter([0.0, 19.0, 40.0, 59.0])
    monkeypatch.setattr(system, "available_memory", lambda: 2**40)
    monkeypatch.setattr(system, "_resident_bytes", lambda: 4 * 2**30)
    monkeypatch.setattr(system.time, "monotonic", lambda: next(clock))
    relief = system.MemoryRelief()
    assert [relief.after_step() for _ in range(3)] == [False, True, False]
    assert library.told == ["trim"]


def test_memory_that_a_step_left_behind_is_given_back_once(library, monkeypatch):
    held = iter([62, 63, 95, 60, 64, 96, 80, 81])
    monkeypatch.setattr(system, "available_memory", lambda: 1000)
    monkeypatch.setattr(system, "_resident_bytes", lambda: next(held))
    monkeypatch.setattr(system.time, "monotonic", lambda: 0.0)
    relief = system.MemoryRelief()
    assert [relief.after_step() for _ in range(8)] == [False, False, True, False, False, True, False, False]
    assert library.told == ["trim", "trim"]


def test_limits_of_control_groups_bound_the_available_memory(tmp_path):
    group = tmp_path / "outer" / "inner"
    group.mkdir(parents=True)
    own = tmp_path / "cgroup"
    own.write_text("4:memory:/elsewhere\n0::/outer/inner\n")
    for folder, limit in ((group, "max"), (group.parent, "1000")):
        (folder / "memory.max").write_text(f"{limit}\n")
        (folder / "memory.current").write_text("700\n")
        (folder / "memory.stat").write_text("anon 500\ninactive_file 100\n")
    groups = system._control_groups(tmp_path, own)
    assert groups == [group.parent]
    assert system._left_in(group.parent) == 400


def test_memory_is_given_back_before_a_program_runs_on_new_shapes(monkeypatch):
    events = []
    monkeypatch.setattr(programs, "give_back", lambda: events.append("given back"))
    program = programs.Announce(Console(quiet=True), "double", lambda x: events.append(x.shape) or 2 * x)
    for shape in ((2,), (2,), (3,), (2,)):
        program(np.zeros(shape))
    assert events == ["given back", (2,), (2,), "given back", (3,), (2,)]
