"""Start-up: help pages without JAX, closed pipes, the compilation cache, traces of steps."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from jaxrlhf import cli
from jaxrlhf.config import settings
from jaxrlhf.config.compilation import CompilationConfig, default_folder, use_compilation_cache
from jaxrlhf.errors import InputError
from jaxrlhf.trainers.sft import SFTConfig, train_sft

ROOT = Path(__file__).resolve().parents[1]


def python(program, *args, **variables):
    """Runs a program in a process of its own; what it prints."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "100", **variables}
    command = [sys.executable, "-c", program, *map(str, args)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True, cwd=ROOT).stdout


# ---- help


HELP = """
import sys
from jaxrlhf import cli
try:
    cli.main(sys.argv[1:])
except SystemExit:
    pass
loaded = {"jax", "jaxlib", "flax", "optax", "transformers", "datasets", "orbax"} & set(sys.modules)
print("loaded:", *sorted(loaded))
"""


@pytest.mark.parametrize("name", ["", "ppo", "rlhf"])
def test_help_loads_no_jax_and_is_the_page_that_jax_would_give(name):
    words = [name, "--help"] if name else ["--help"]
    page, _, loaded = python(HELP, *words).rpartition("loaded:")
    with_jax, _, _ = python("import jax\n" + HELP, *words).rpartition("loaded:")
    assert loaded.strip() == ""
    assert page == with_jax and "usage: jaxrlhf" in page


def test_the_libraries_work_in_a_process_that_has_printed_a_help_page():
    program = (
        "from jaxrlhf import cli\n"
        "try:\n    cli.main(['sft', '--help'])\nexcept SystemExit:\n    pass\n"
        "import jax.numpy as jnp, jaxrlhf\nfrom jaxrlhf import objectives\n"
        "mask = jnp.ones((1, 2))\n"
        "print('sum', float(objectives.masked_sum(jnp.ones((1, 2)), mask)), jaxrlhf.SFTConfig.__name__)"
    )
    assert python(program).splitlines()[-1] == "sum 2.0 SFTConfig"


def test_output_into_a_closed_pipe_ends_without_a_trace():
    reader, writer = os.pipe()
    os.close(reader)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "jaxrlhf", "ppo", "--help"]
    done = subprocess.run(command, env=environment, stdout=writer, stderr=subprocess.PIPE, cwd=ROOT)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, b"")


# ---- the compilation cache


@pytest.fixture
def jax_settings():
    """JAX's settings of the cache, put back afterwards."""
    names = ("compilation_cache_dir", "compilation_cache_max_size", "persistent_cache_min_compile_time_secs")
    names += ("persistent_cache_min_entry_size_bytes",)
    before = {f"jax_{name}": getattr(jax.config, f"jax_{name}") for name in names}
    yield lambda: jax.config.jax_compilation_cache_dir
    for name, value in before.items():
        jax.config.update(name, value)


def test_the_cache_lies_where_the_flag_the_environment_or_the_default_says(jax_settings, tmp_path, monkeypatch):
    own = jax_settings()
    use_compilation_cache(CompilationConfig())
    assert jax_settings() == own, "JAX_COMPILATION_CACHE_DIR goes before the default"
    use_compilation_cache(CompilationConfig(str(tmp_path / "named")))
    assert jax_settings() == str(tmp_path / "named") and (tmp_path / "named").is_dir()
    assert jax.config.jax_compilation_cache_max_size == 10 * 2**30
    use_compilation_cache(CompilationConfig(None))
    assert jax_settings() is None
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    use_compilation_cache(CompilationConfig())
    assert jax_settings() == str(tmp_path / "home" / "jaxrlhf" / "xla") == str(default_folder())


def test_a_cache_folder_that_cannot_be_made_is_refused_when_named_and_left_out_when_not(
    jax_settings, tmp_path, monkeypatch, caplog
):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"compilation_cache .*file/x cannot be made"):
        use_compilation_cache(CompilationConfig(str(tmp_path / "file" / "x")))
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    use_compilation_cache(CompilationConfig())
    assert jax_settings() is None and "programs are compiled anew" in caplog.text


def test_each_command_on_a_device_takes_the_folder():
    with_flag = {n for n, command in cli.commands().items() if "compilation_cache" in settings(command.config_class())}
    on_device = {name for name, command in cli.commands().items() if command.on_device}
    assert with_flag == on_device - {"demo"}  # it has few flags, and takes the default folder


COUNTED = """
import collections, json, sys
import jax.monitoring
from jaxrlhf import cli
counts = collections.Counter()
jax.monitoring.register_event_listener(lambda event, **_: counts.update([event.rpartition("/")[2]]))
folder, seed, lm, reward, data, cache = sys.argv[1:]
common = ["--learning_rate", f"{seed}e-4", "--warmup_steps", seed, "--lr_scheduler_type", "linear"]
common += ["--data_path", data, "--data_cache_dir", cache, "--max_train_samples", "40", "--max_eval_samples", "8"]
common += ["--max_length", "32", "--max_prompt_seq_len", "32", "--per_device_train_batch_size", "2", "--max_steps", "2"]
common += ["--report_to", "none", "--mesh_fsdp", "1", "--seed", seed]
models = {
    "sft": ["--model_name_or_path", lm],
    "reward": ["--model_name_or_path", lm],
    "ppo": ["--actor_model_name_or_path", lm, "--reward_model_name_or_path", reward, "--max_answer_seq_len", "8"],
}
models["ppo"] += ["--num_mini_batches", "2", "--critic_learning_rate", f"{seed}e-5"]
for name, flags in models.items():
    counts.clear()
    assert cli.main([name, "--output_dir", f"{folder}/{name}", *flags, *common]) == 0
    print("COUNT", json.dumps([name, counts["cache_hits"], counts["cache_misses"]]))
"""


@pytest.mark.long
def test_a_second_run_of_the_same_shapes_with_another_seed_and_schedule_compiles_nothing(demo, tmp_path):
    flags = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    variables = {"XDG_CACHE_HOME": str(tmp_path / "cache"), "JAX_COMPILATION_CACHE_DIR": "", "XLA_FLAGS": flags}
    runs = []
    for number in (1, 2):
        out = python(
            "import os; del os.environ['JAX_COMPILATION_CACHE_DIR']\n" + COUNTED,
            *(tmp_path / str(number), str(number), demo.lm, demo.reward, demo.train, tmp_path / "data"),
            **variables,
        )
        runs.append([json.loads(line.split(" ", 1)[1]) for line in out.splitlines() if line.startswith("COUNT")])
    cold, warm = runs
    assert [name for name, _, _ in warm] == ["sft", "reward", "ppo"]
    assert all(misses > 0 for _, _, misses in cold)
    assert all(hits > 0 and misses == 0 for _, hits, misses in warm), warm


# ---- traces


@pytest.mark.long
def test_the_profiled_steps_leave_a_trace_and_others_none(demo, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("jaxrlhf.runs.report.write_report", lambda folder: None)
    traced = []
    start = jax.profiler.start_trace
    monkeypatch.setattr("jax.profiler.start_trace", lambda folder: traced.append(folder) or start(folder))
    options = {"data_path": demo.train, "data_cache_dir": demo.cache, "max_length": 32, "max_eval_samples": 8}
    options |= {"per_device_train_batch_size": 1, "max_steps": 3, "report_to": ("none",), "max_train_samples": 40}
    train_sft(
        SFTConfig.create(model_name_or_path=demo.lm, output_dir=str(tmp_path / "run"), profile_steps="2:3", **options)
    )
    assert traced == [tmp_path / "run" / "profile"]
    (trace,) = (tmp_path / "run" / "profile").glob("plugins/profile/*/*.xplane.pb")
    assert trace.stat().st_size > 1000
    assert f"profile: {tmp_path}/run/profile" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["5:3", "0:2", "a", "3:", "-1"])
def test_profile_steps_that_are_no_range_are_refused(text):
    with pytest.raises(InputError, match=f"profile_steps='{text}' must"):
        SFTConfig.create(profile_steps=text)
