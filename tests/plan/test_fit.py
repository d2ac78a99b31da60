"""`--fit auto` on devices of chosen sizes, and the message about a real lack of memory."""

import dataclasses
from typing import get_args

import jax
import jax.numpy as jnp
import pytest

import jaxrlhf
from jaxrlhf import cli
from jaxrlhf.commands.rlhf import RLHFConfig, step_configs
from jaxrlhf.config import parse, save_yaml, settings
from jaxrlhf.config.annotations import hints_of
from jaxrlhf.errors import InputError, OutOfMemory
from jaxrlhf.models import save_pretrained
from jaxrlhf.plan import fit
from jaxrlhf.plan.devices import DEVICES
from jaxrlhf.plan.memory import estimate
from jaxrlhf.plan.search import capacity
from jaxrlhf.plan.settings import PlanConfig
from jaxrlhf.plan.system import build_system

CONFIGS = {
    "sft": jaxrlhf.SFTConfig,
    "reward": jaxrlhf.RewardConfig,
    "dpo": jaxrlhf.DPOConfig,
    "kto": jaxrlhf.KTOConfig,
    "distill": jaxrlhf.DistillConfig,
    "ppo": jaxrlhf.PPOConfig,
    "grpo": jaxrlhf.GRPOConfig,
    "rloo": jaxrlhf.RLOOConfig,
}


@pytest.fixture(scope="module")
def model(lab, tmp_path_factory):
    """Folder of a model with a long context."""
    folder = tmp_path_factory.mktemp("fit") / "lm"
    save_pretrained(lab.tiny_model(lab.LLAMA | {"max_position_embeddings": 512}), folder)
    return str(folder)


@pytest.fixture
def device(monkeypatch):
    """Gives the devices at hand a memory of so many MiB."""

    def use(mib: float):
        found = dataclasses.replace(DEVICES["h100"], memory=int(mib * 2**20), usable=1.0, devices_per_host=8)
        monkeypatch.setattr(fit, "device_at_hand", lambda: found)
        return found

    return use


def config_of(trainer, model, tmp_path, **settings):
    settings = {"fit": "auto", "output_dir": str(tmp_path / "run"), "dtype": "float32"} | settings
    if trainer == "distill":
        settings |= {"teacher_model_name_or_path": model}
    if trainer in ("sft", "reward", "dpo", "kto", "distill"):
        return CONFIGS[trainer].create(model_name_or_path=model, max_length=256, **settings)
    settings |= {"reward_functions": ("length:target=5",), "max_prompt_seq_len": 128, "max_new_tokens": 128}
    return CONFIGS[trainer].create(actor_model_name_or_path=model, **settings)


@pytest.mark.parametrize("trainer", CONFIGS)
def test_the_chosen_flags_fit_and_keep_the_global_batch(trainer, model, tmp_path, device, capsys):
    asked = config_of(trainer, model, tmp_path)
    need = fit._peak(fit.plan_of(asked, device(2**20)))
    found = jaxrlhf.fitted(asked)
    assert found.value("fit") == "none"
    assert found == asked.replace(fit="none")
    assert "no flag needs a change" in capsys.readouterr().err

    small = device(need / 2**20 / 3)
    found = jaxrlhf.fitted(asked)
    plan = fit.plan_of(found, small)
    assert fit._peak(plan) <= capacity(plan) < need

    def rows(c) -> int:
        return c.value("per_device_train_batch_size") * c.value("gradient_accumulation_steps")

    assert rows(found) == rows(asked)
    changed = {name for name, value in found.items() if value != asked.value(name)} - {"fit"}
    assert changed and changed <= set(fit.FITTED)
    said = capsys.readouterr().err
    assert all(f"--{name} " in said for name in changed)


def test_the_plan_of_distillation_counts_the_teacher_and_the_students_samples(model, tmp_path, device):
    device(2**20)
    plans = {
        lmbda: fit.plan_of(config_of("distill", model, tmp_path, lmbda=lmbda, packing=False), device(2**20))
        for lmbda in (0.0, 0.5)
    }
    programs = {lmbda: estimate(build_system(plan), "cuda") for lmbda, plan in plans.items()}
    assert [*programs[0.0]] == ["score", "train"] and [*programs[0.5]] == ["generate", "score", "train"]
    for found in programs.values():
        held = [found["score"].arguments["reference"], found["train"].resident["reference"]]
        assert held[0] == held[1] > 0.9 * found["train"].arguments["actor"], "both models are of one size, in float32"
    teacher = fit.plan_of(config_of("distill", model, tmp_path, seq_kd=True, packing=False), device(2**20))
    generate = estimate(build_system(teacher), "cuda")["generate"]
    assert "reference" in generate.arguments and "actor" in generate.resident
    rows = [found["train"].arguments["batch"] for found in programs.values()]
    assert rows[1] / rows[0] == pytest.approx(2, rel=0.01), "256 further tokens, each with 64 of the teacher's"


def test_samples_of_distillation_are_cut_into_pieces_where_that_makes_them_fit(model, tmp_path, device):
    options = {"lmbda": 1.0, "packing": False, "max_new_tokens": 256, "gradient_accumulation_steps": 16}
    options |= {"per_device_train_batch_size": 1, "per_device_eval_batch_size": 1}
    asked = config_of("distill", model, tmp_path, **options)
    plan = fit.plan_of(asked, device(2**20))
    parts = (estimate(build_system(p), "cuda") for p in (plan, plan.replace(generation_batches=8)))
    whole, split = ({name: program.bytes_per_device for name, program in found.items()} for found in parts)
    assert split["generate"] < whole["generate"] and split["train"] == whole["train"] < whole["generate"]
    device((max(split.values()) + 1) / 2**20)
    found = jaxrlhf.fitted(asked)
    assert found.value("generation_batches") > 1
    assert found == asked.replace(generation_batches=found.value("generation_batches"), fit="none")


def test_given_flags_are_kept_also_at_their_defaults_and_from_yaml(model, tmp_path, device):
    free = config_of("sft", model, tmp_path)
    device(fit._peak(fit.plan_of(free, device(2**20))) / 2**20 / 3)
    assert jaxrlhf.fitted(free).value("per_device_train_batch_size") < 8
    file = tmp_path / "given.yaml"
    file.write_text("per_device_train_batch_size: 8\n")
    words = ["--config", str(file), "--model_name_or_path", model, "--max_length", "256", "--dtype", "float32"]
    given = parse(jaxrlhf.SFTConfig, [*words, "--output_dir", str(tmp_path / "run"), "--fit", "auto"], "sft", "")
    found = jaxrlhf.fitted(given)
    assert found.value("per_device_train_batch_size") == 8
    both = parse(
        jaxrlhf.SFTConfig,
        [
            *words,
            "--output_dir",
            str(tmp_path / "run"),
            "--fit",
            "auto",
            "--no_gradient_checkpointing",
            "--mesh_tensor",
            "1",
        ],
        "sft",
        "",
    )
    with pytest.raises(InputError, match=r"fits these devices .*: --per_device_train_batch_size 2 [\s\S]*leave out"):
        jaxrlhf.fitted(both)


def test_what_fits_nowhere_is_refused_with_the_next_step(model, tmp_path, device, monkeypatch):
    device(0.05)
    monkeypatch.setattr("jaxrlhf.plan.search.MOST_DEVICES", 16)
    with pytest.raises(
        InputError, match=r"do not fit 8 × h100[\s\S]*(these devices|devices of this kind|smaller model)"
    ):
        jaxrlhf.fitted(config_of("sft", model, tmp_path))


def test_a_resumed_run_gets_the_flags_of_its_folder(model, tmp_path, device):
    asked = config_of("dpo", model, tmp_path)
    device(fit._peak(fit.plan_of(asked, device(2**20))) / 2**20 / 3)
    first = jaxrlhf.fitted(asked)
    (tmp_path / "run").mkdir()
    save_yaml(first, tmp_path / "run" / "config.yaml")
    device(2**20)  # other devices would be fitted otherwise
    resumed = jaxrlhf.fitted(asked.replace(resume=True))
    assert resumed == first.replace(resume=True)


def test_steps_of_rlhf_inherit_fit_with_the_flags_given_for_each(tmp_path):
    words = "--actor_model_name_or_path a --fit auto --zero_stage 2 --sft.remat_policy none"
    config = parse(RLHFConfig, [*words.split(), "--output_dir", str(tmp_path)], "rlhf", "")
    steps = step_configs(config)
    assert {step.value("fit") for step in steps.values()} == {"auto"}
    assert fit._kept(steps["sft"]) == {"zero_stage", "remat_policy"}
    assert fit._kept(steps["ppo"]) == {"zero_stage"}


def test_a_trainer_refuses_a_config_that_was_not_fitted(model, tmp_path, demo):
    with pytest.raises(InputError, match=r"fit=auto: pass the config through jaxrlhf.fitted"):
        jaxrlhf.train_sft(config_of("sft", model, tmp_path))


def allocate(config):
    """Asks a device for more than there is."""
    jnp.zeros(2**50, jnp.float32).block_until_ready()


def test_a_real_lack_of_memory_ends_a_command_with_the_flags_that_need_less(model, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("jaxrlhf.trainers.sft.train_sft", allocate)
    command = f"sft --model_name_or_path {model} --output_dir {tmp_path / 'run'} --max_length 256"
    assert cli.main(command.split()) == InputError.status
    said = capsys.readouterr().err
    assert "a device ran out of memory: RESOURCE_EXHAUSTED" in said
    assert "--per_device_train_batch_size 4 --gradient_accumulation_steps 2" in said
    assert "Traceback" not in said


def test_the_step_is_in_the_flags_of_a_run_of_all_steps(model, tmp_path):
    config = config_of("sft", model, tmp_path, fit="none")
    with pytest.raises(OutOfMemory, match=r"--sft\.per_device_train_batch_size 4") as caught:
        fit.run_fitted(allocate, config, "sft")
    assert isinstance(caught.value.__cause__, jax.errors.JaxRuntimeError)


def test_another_error_of_the_runtime_stays_as_it_is(model, tmp_path):
    def broken(config):
        raise jax.errors.JaxRuntimeError("INTERNAL: broken")

    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL: broken"):
        fit.run_fitted(broken, config_of("sft", model, tmp_path, fit="none"))


def test_the_memory_of_a_cpu_is_what_the_machine_has_left():
    found = fit.device_at_hand()
    assert found.platform == "cpu" and not found.pinned_host
    assert 2**20 < found.memory * len(jax.local_devices()) < 2**50


def test_every_command_that_fits_can_be_planned_and_the_others_have_no_such_flag():
    planned = set(get_args(hints_of(PlanConfig)["trainer"].kind))
    commands = cli.commands()
    assert planned == {name for name, command in commands.items() if command.fits}
    assert {name for name, command in commands.items() if "fit" in settings(command.config_class())} == planned | {
        "rlhf"
    }
