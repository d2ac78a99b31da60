"""Test-wide set-up: eight CPU devices, and a compilation cache that outlives the run."""

import contextlib
import gc
import os
import signal
import tempfile
from collections import defaultdict
from importlib.metadata import version
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAXRLHF_KEEP_MEMORY"] = "0"  # a command that a test calls is not to change the process of all tests
# Tests run each program once or twice: compiling quickly matters, not the code's speed.
_QUICK = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
_QUICK += " --xla_cpu_parallel_codegen_split_count=1"  # parts of a program for threads, which two workers keep busy
if version("jaxlib").startswith("0.10."):  # its older code generator takes a third of the time; newer ones lack it
    _QUICK += " --xla_cpu_use_fusion_emitters=false"
os.environ["XLA_FLAGS"] = f"{_QUICK} --xla_force_host_platform_device_count=8 " + os.environ.get("XLA_FLAGS", "")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
_CACHE = Path(os.environ.get("JAXRLHF_TEST_CACHE", Path(tempfile.gettempdir()) / "jaxrlhf-test-cache"))
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_CACHE / "xla"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")

import jax  # noqa: E402 - after the settings above
import pytest  # noqa: E402

pytest_plugins = ["lab"]
gc.set_threshold(50_000, 50, 100)  # tracing makes many objects that live on: looking through them took a tenth of it


def pytest_addoption(parser):
    parser.addoption("--full-matrix", action="store_true", help="every mesh × decode group × ZeRO stage of 8 devices")
    parser.addoption(
        "--cases", type=int, metavar="N", help="at most N cases of each test: the first, the last, some between"
    )


@pytest.hookimpl(trylast=True)  # after -m and -k
def pytest_collection_modifyitems(config, items):
    limit = config.getoption("cases")
    if limit is None:
        return
    tests = defaultdict(list)
    for item in items:
        tests[item.nodeid.partition("[")[0]].append(item)
    kept = {cases[i] for cases in tests.values() for i in evenly(len(cases), limit)}
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = [item for item in items if item in kept]


def evenly(count, limit):
    """At most `limit` of the numbers below `count`, from the first to the last at even distances."""
    if count <= limit:
        return range(count)
    return [round(i * (count - 1) / max(limit - 1, 1)) for i in range(limit)]


@pytest.fixture(autouse=True, scope="module")
def release_compiled_programs():
    """Programs for eight devices add up to gigabytes over the suite; the cache on disk makes coming back cheap."""
    yield
    jax.clear_caches()


@pytest.fixture
def sigint_after():
    """`with sigint_after(5):` Ctrl-C comes while step 5 is logged, where a name is given with that metric."""
    from jaxrlhf.runs import Run

    @contextlib.contextmanager
    def armed(step, metric=None):
        log = Run.log

        def interrupting(self, number, metrics):
            recorded = log(self, number, metrics)
            if number == step and (metric is None or metric in metrics):
                signal.raise_signal(signal.SIGINT)  # in this thread: handled before the next line
            return recorded

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Run, "log", interrupting)
            yield

    return armed
