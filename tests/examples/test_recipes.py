"""The recipes of examples/: every key is a flag, the devices they name hold them, and the CPU ones run in a chain."""

import json
import re
import runpy
from functools import cache, partial
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest

from jaxrlhf import cli
from jaxrlhf.config import parse
from jaxrlhf.config.files import read_jsonl
from jaxrlhf.data import write_demo
from jaxrlhf.plan.command import make_plan
from jaxrlhf.plan.memory import train_memory
from jaxrlhf.plan.settings import PlanConfig
from jaxrlhf.plan.system import build_system

pytestmark = pytest.mark.long

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
RECIPES = sorted(path.relative_to(EXAMPLES).as_posix() for path in EXAMPLES.rglob("*.yaml"))
DEEPSPEED_CHAT = [name for name in RECIPES if name.startswith("deepspeed_chat/")]
CPU = ("sft", "reward", "dpo", "ppo", "grpo", "rloo", "reinforce++", "best-of-n")


def command_of(name):
    """The command that a recipe's own comment tells to run it with."""
    text = (EXAMPLES / name).read_text()
    found = re.search(rf"^#   jaxrlhf (\S+) --config examples/{re.escape(name)}$", text, re.MULTILINE)
    assert found, f"{name} does not say how it is run"
    return found.group(1)


PLANNED = [name for name in DEEPSPEED_CHAT if command_of(name) == "rlhf"]


@cache
def config_of(name):
    command = command_of(name)
    kind = cli.commands()[command].config
    if isinstance(kind, str):
        kind = getattr(import_module(cli.commands()[command].module), kind)
    return parse(kind, ["--config", str(EXAMPLES / name)], f"jaxrlhf {command}", "")


def output_of(config):
    values = dict(config.items())
    return values.get("output_dir") or values["output_file"]


@pytest.fixture(scope="module")
def planner():
    return SimpleNamespace(**runpy.run_path(str(EXAMPLES / "plan.py")))


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_read_by_the_command_it_names_and_stands_in_the_table(name):
    config = config_of(name)
    output = output_of(config)
    assert output.startswith("runs/")
    assert f"`{name}`" in (EXAMPLES / "README.md").read_text()


def test_recipes_write_to_folders_of_their_own():
    configs = [config_of(name) for name in RECIPES]
    outputs = [output_of(config) for config in configs]
    assert len(set(outputs)) == len(outputs)


@pytest.mark.parametrize("name", [*PLANNED, "gsm8k/grpo.yaml"])
def test_the_devices_that_a_recipe_names_hold_it_and_the_table_says_what_the_planner_says(name, planner):
    path = EXAMPLES / name
    plan = make_plan(planner.plan_config(path))
    assert plan.fits
    count, device = planner.devices_of(path)
    size, room = (f"{n / 2**30:.2f}" for n in (plan.peak, plan.capacity))
    row = f"| `{name}` | {count} × {device} | {plan.system.rows} | {size} of {room} | {plan.cost.hours:.1f} |"
    assert row in (EXAMPLES / "README.md").read_text(), f"python examples/plan.py prints the rows anew: {row}"


def test_the_first_two_steps_fit_too(planner):
    """Bound from above by PPO's train program at their micro-batch: it holds the other models beside."""
    shared = ("gradient_accumulation_steps", "lora_r", "gradient_checkpointing", "offload_optimizer")
    known = set()
    for name in PLANNED:
        config = config_of(name)
        assert config.data.max_length == config.data.max_prompt_seq_len + config.ppo.sampling.max_new_tokens
        for step, sequences in (("sft", 1), ("reward", 2)):
            section = getattr(config, step)
            changes = {name: section.value(name) for name in shared}
            changes["per_device_train_batch_size"] = sequences * section.run.per_device_train_batch_size
            models = config.models
            changes["actor"] = models.reward_model_name_or_path if step == "reward" else models.actor_model_name_or_path
            planned = planner.plan_config(EXAMPLES / name, **changes)
            key = (planned.devices, planned.ppo.compute.zero_stage, *changes.values())
            if key not in known:
                needed = train_memory(build_system(planned), planned.accelerator.platform).bytes_per_device
                assert needed <= planned.accelerator.memory * planned.accelerator.usable, (name, step)
            known.add(key)


def test_the_recipes_of_one_step_fit_too(planner, tmp_path):
    """Bound from above in the same way: DPO's two responses are two sequences, and its reference is one model more."""
    shape = {"model_type": "gpt2", "n_embd": 2048, "n_layer": 24, "n_head": 16, "n_positions": 2048}
    (tmp_path / "config.json").write_text(json.dumps(shape | {"vocab_size": 100_000}))
    for name in set(DEEPSPEED_CHAT) - set(PLANNED):
        config = config_of(name)
        known = ("gradient_accumulation_steps", "lora_r", "gradient_checkpointing", "offload_optimizer", "zero_stage")
        changes = {key: config.value(key) for key in known}
        rows = config.run.per_device_train_batch_size * (2 if command_of(name) == "dpo" else 1)
        count, device = planner.devices_of(EXAMPLES / name)
        model = config.model.model_name_or_path
        model = str(tmp_path) if model == "ai-forever/mGPT" else model
        planned = PlanConfig.create(
            device=device, devices=count, actor=model, reward=model, per_device_train_batch_size=rows, **changes
        )
        needed = train_memory(build_system(planned), planned.accelerator.platform).bytes_per_device
        assert needed <= planned.accelerator.memory * planned.accelerator.usable, name


def test_published_settings_are_kept():
    """Rows of an update of step 3, learning rates and ranks, as in DeepSpeed-Chat's scripts."""
    for name, rows, rate, rank in (
        ("opt-1.3b", 32, 5e-4, 128),
        ("opt-6.7b-lora", 128, 5e-4, 128),
        ("opt-1.3b-node", 4, 9.65e-6, 0),
        ("opt-6.7b-node", 4, 9.65e-6, 0),
        ("opt-13b-node", 16, 5e-4, 128),
        ("opt-30b-lora-node", 4, 5e-4, 128),
        ("opt-66b-64", 4, 5e-4, 128),
        ("llama-2-7b-node", 1, 9.65e-6, 0),
        ("llama-2-7b-lora-node", 1, 5e-4, 64),
    ):
        ppo = config_of(f"deepspeed_chat/{name}.yaml").ppo
        per_device = ppo.run.per_device_train_batch_size * ppo.run.gradient_accumulation_steps
        assert (per_device, ppo.optimizer.learning_rate, ppo.lora.lora_r) == (rows, rate, rank), name
        assert (ppo.optimizer.warmup_steps, ppo.optimizer.lr_scheduler_type) == (100, "cosine"), name
        assert (ppo.algorithm.kl_coef, ppo.algorithm.clip_reward) == (0.1, 5.0), name


# ---- on CPU

TINY = "hidden_size=16,num_hidden_layers=1,num_attention_heads=2,intermediate_size=32,max_position_embeddings=64"


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """`chain("ppo")`: a recipe of examples/cpu, run after those it needs, at toy size in a folder of its own."""
    folder = tmp_path_factory.mktemp("recipes")
    done = set()
    needs = {"sft": (), "reward": ("sft",), "dpo": ("sft",)}
    small = ["--max_steps", "2", "--per_device_eval_batch_size", "1", "--max_eval_samples", "8"]
    rows = ["--per_device_train_batch_size", "1"]
    sizes = {
        "sft": [*small, *rows, "--max_length", "32", "--config_overrides", TINY],
        "reward": [*small, *rows, "--max_length", "32"],
        "dpo": [*small, *rows, "--max_length", "32"],
        "best-of-n": ["--per_device_batch_size", "1", "--max_train_samples", "8", "--keep_unfinished"],
    }
    short = ["--max_prompt_seq_len", "32", "--max_answer_seq_len", "4"]

    def run(name, recipe=None, *flags):
        for needed in needs.get(name, ("sft", "reward")):
            if needed not in done:
                run(needed)
        recipe = recipe or f"cpu/{name}.yaml"
        command = command_of(recipe)
        argv = ["--config", str(EXAMPLES / recipe), *sizes.get(name, [*small, *rows])]
        argv += [] if name in ("sft", "reward", "dpo") else short
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(folder)
            patch.setenv("JAXRLHF_CACHE", str(folder / "cache"))
            patch.setattr("jaxrlhf.runs.report.write_report", lambda folder: None)
            patch.setattr("jaxrlhf.data.demo.write_demo", partial(write_demo, size=400))
            assert cli.run(command, cli.commands()[command], [*argv, *flags]) == 0
        done.add(name)
        return folder / "runs"

    return run


@pytest.mark.parametrize("name", CPU)
def test_a_recipe_for_cpu_runs(name, chain):
    runs = chain(name)
    if name == "best-of-n":
        rows = [json.loads(line) for line in (runs / "cpu" / "best-of-8.jsonl").read_text().splitlines()]
        assert rows and all(row["prompt"] and row["score"] == max(row["scores"]) for row in rows if "scores" in row)
        return
    summary = json.loads((runs / "cpu" / name / "summary.json").read_text())
    assert (summary["trainer"], summary["steps"]) == (name, 2)


def test_the_recipe_for_gsm8k_learns_from_right_and_wrong_numbers(chain, tmp_path):
    rows = [{"question": f"What is {n} and {n}?", "answer": f"It is twice {n}.\n#### {2 * n}"} for n in range(24)]
    (tmp_path / "gsm.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--actor_model_name_or_path", "runs/cpu/sft", "--data_path", str(tmp_path / "gsm.jsonl")]
    flags += ["--gradient_accumulation_steps", "1", "--generation_batches", "1", "--eval_steps", "0"]
    runs = chain("gsm8k", "gsm8k/grpo.yaml", *flags, "--gradient_checkpointing", "false")
    records = read_jsonl(runs / "gsm8k" / "grpo" / "metrics.jsonl")
    assert [r["rewards/number_match"] for r in records if "loss/policy_avg" in r] == [
        r["objective/scores"] for r in records if "loss/policy_avg" in r
    ]
