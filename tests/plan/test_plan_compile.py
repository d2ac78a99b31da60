"""The planner's estimates against compilers: the committed grid, and real compilations where the packages are there."""

import json
from pathlib import Path

import pytest

from jaxrlhf.errors import InputError
from jaxrlhf.plan import compile as compiling
from jaxrlhf.plan.command import make_plan, run_plan
from jaxrlhf.plan.compile import Compiled, check_compiler, compile_programs, read_outcome
from jaxrlhf.plan.memory import estimate
from jaxrlhf.plan.settings import PROGRAMS, PlanConfig
from jaxrlhf.plan.system import build_system
from jaxrlhf.runs.console import Console

GRID = Path(__file__).parents[2] / "benchmarks" / "results" / "plan_compile_grid.json"
POINTS = json.loads(GRID.read_text())["points"]
COMPILED_WITH = {"remat_policy": "none", "attention_implementation": "xla"}
"""Settings of the grid that were defaults when it was compiled; points may name another remat."""
MODELS = ("opt-1.3b", "opt-13b", "opt-66b", "opt-175b")
CLUSTERS = (("a100-80g", 1), ("a100-80g", 8), ("a100-80g", 16), ("a100-80g", 64), ("v5p", 64))


def name_of(point) -> str:
    return "-".join(str(value) for value in point["settings"].values())


@pytest.mark.parametrize("point", POINTS, ids=name_of)
def test_estimates_are_within_a_tenth_of_the_compilers_figures(point):
    config = PlanConfig.create(**COMPILED_WITH | point["settings"])
    estimates = estimate(build_system(config), config.accelerator.platform)
    for name in ("generate", "train"):
        compiled = Compiled(**point["programs"][name])
        if compiled.bytes == 0:  # the compiler gave up for want of memory
            assert estimates[name].bytes_per_device > config.accelerator.memory, name
        else:
            assert estimates[name].compiler_bytes == pytest.approx(compiled.bytes, rel=0.10), name
    score = Compiled(**point["programs"]["score"])
    assert estimates["score"].compiler_bytes == pytest.approx(score.bytes, rel=0.30)


@pytest.mark.parametrize("point", POINTS, ids=name_of)
def test_arguments_are_the_compilers_to_a_thousandth(point):
    config = PlanConfig.create(**COMPILED_WITH | point["settings"])
    estimates = estimate(build_system(config), config.accelerator.platform)
    for name in PROGRAMS:
        compiled = Compiled(**point["programs"][name])
        if compiled.arguments:
            arguments = sum(estimates[name].arguments.values()) + estimates[name].shared
            assert arguments == pytest.approx(compiled.arguments, rel=1e-3), name


def test_the_grid_holds_the_published_models_on_all_clusters():
    held = {(p["settings"]["actor"], p["settings"]["device"], p["settings"]["devices"]) for p in POINTS}
    assert held >= {(model, *cluster) for model in MODELS for cluster in CLUSTERS}


# ---- what a compiler says


FIGURES = json.dumps({"arguments": 10, "outputs": 5, "aliased": 5, "temporaries": 7, "peak": 17})


def test_an_outcome_without_complaint_has_no_problems():
    outcome = read_outcome("train", 0, "noise\n" + FIGURES + "\n", "W0000 some warning\n", 2.0)
    assert outcome.problems == ()
    assert outcome.bytes == 17


def test_involuntary_rematerialisation_is_a_problem():
    said = "W1 spmd_partitioner.cc:656] [SPMD] Involuntary full rematerialization. The compiler cannot go from …"
    outcome = read_outcome("train", 0, FIGURES, f"other\n{said}\n{said}\n", 2.0)
    assert len(outcome.problems) == 1
    assert "Involuntary full rematerialization" in outcome.problems[0]


def test_running_out_of_memory_is_a_problem_and_any_other_failure_an_error():
    outcome = read_outcome("train", 1, "", "RESOURCE_EXHAUSTED: Ran out of memory on HBM: 19.87G exceeds 15.75G\n", 2.0)
    assert "19.87G exceeds 15.75G" in outcome.problems[0]
    with pytest.raises(InputError, match=r"compiling train failed:\s+ValueError: bad layout"):
        read_outcome("train", 1, "", "ValueError: bad layout\n", 2.0)


@pytest.fixture
def compiler_says(monkeypatch):
    """Make `--compile` report given figures for every program."""

    def use(**figures):
        outcome = {"arguments": 1, "outputs": 0, "aliased": 0, "temporaries": 0, "peak": 1, "problems": ()} | figures
        results = {name: Compiled(name, seconds=1.0, **outcome) for name in PROGRAMS}
        monkeypatch.setattr("jaxrlhf.plan.command.check_compiler", lambda device: None)
        monkeypatch.setattr("jaxrlhf.plan.command.compile_programs", lambda config, console: results)

    return use


def planned(tmp_path, **settings) -> PlanConfig:
    small = {"actor": "opt-1.3b", "device": "a100-80g", "devices": 8, "per_device_train_batch_size": 1}
    return PlanConfig.create(**small, compile=True, json=str(tmp_path / "plan.json"), **settings)


def test_a_compiled_program_that_is_too_large_refutes_the_plan(tmp_path, compiler_says):
    # the CUDA compiler does not fail when memory overflows
    compiler_says(temporaries=80 * 2**30)
    with pytest.raises(
        InputError, match=r"generate: the compiled program needs 80.00 GiB beside .* more than the 72.92"
    ):
        run_plan(planned(tmp_path), Console(quiet=True))
    written = json.loads((tmp_path / "plan.json").read_text())
    assert written["fits"] is False
    assert written["generate"]["compiler"]["temporaries"] == 80 * 2**30


def test_a_problem_of_the_compiler_refutes_the_plan(tmp_path, compiler_says):
    compiler_says(problems=("Involuntary full rematerialization of everything",))
    with pytest.raises(InputError, match="train: Involuntary full rematerialization of everything"):
        run_plan(planned(tmp_path), Console(quiet=True))


def test_a_compiled_plan_shows_both_figures(tmp_path, compiler_says, capsys):
    compiler_says(temporaries=2**30)
    plan = run_plan(planned(tmp_path))
    assert plan.fits
    assert "program, compiled" in capsys.readouterr().err
    assert json.loads((tmp_path / "plan.json").read_text())["train"]["compiler"]["bytes"] == 2**30 + 1


@pytest.mark.parametrize(
    ("device", "package"),
    [("v5p", r"pip install 'jaxrlhf\[plan-tpu\]'"), ("h100", r"pip install 'jaxrlhf\[plan-cuda\]'")],
)
def test_a_missing_compiler_is_named_with_the_line_that_installs_it(monkeypatch, device, package):
    monkeypatch.setattr(compiling.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=package):
        check_compiler(PlanConfig.create(actor="opt-125m", device=device).accelerator)


def test_a_missing_assembler_is_named(monkeypatch):
    monkeypatch.setattr(compiling.importlib.util, "find_spec", lambda name: None if name == "nvidia" else name)
    monkeypatch.setattr(compiling.shutil, "which", lambda name: None)
    with pytest.raises(InputError, match="needs the assembler ptxas; pip install nvidia-cuda-nvcc-cu12"):
        check_compiler(PlanConfig.create(actor="opt-125m", device="a100-40g").accelerator)


# ---- real compilers, of devices that are not here


@pytest.mark.parametrize(
    "cluster",
    [
        {"device": "a100-40g", "devices": 2, "devices_per_host": 2, "offload_reference_model": True},
        {"device": "h100", "devices": 1, "lora_r": 4},
        {"device": "v5e", "devices": 4},
    ],
    ids=lambda cluster: cluster["device"],
)
def test_a_real_compiler_takes_all_three_programs(lab, tmp_path, cluster):
    from jaxrlhf.models import save_pretrained

    for name, head in (("lm", "lm"), ("reward", "scalar")):
        save_pretrained(lab.tiny_model(lab.GPT2, head), tmp_path / name)
    config = PlanConfig.create(
        actor=str(tmp_path / "lm"),
        reward=str(tmp_path / "reward"),
        max_prompt_seq_len=16,
        max_answer_seq_len=16,
        **cluster,
    )
    try:
        check_compiler(config.accelerator)
    except InputError as missing:
        pytest.skip(str(missing))
    compiled = compile_programs(config, Console(quiet=True))
    plan = make_plan(config)
    for name, figures in compiled.items():
        assert figures.problems == ()
        arguments = sum(plan.programs[name].arguments.values()) + plan.programs[name].shared
        assert figures.arguments == pytest.approx(arguments, rel=0.02), name
