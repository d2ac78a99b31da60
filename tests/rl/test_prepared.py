"""Programs that are compiled ahead: the step finds them, other shapes and failures leave it as it was."""

import re
from concurrent.futures import Future

import jax
import numpy as np
import pytest

from jaxrlhf.rl.config import PPOConfig
from jaxrlhf.rl.models import RLHFEngine
from jaxrlhf.rl.trainer import PPOTrainer
from jaxrlhf.sharding import abstract
from jaxrlhf.trainers.programs import Announce
from jaxrlhf.trainers.sft import SFTConfig, train_sft

PROGRAMS = {"generate", "score_rollout", "ppo_step"}


@pytest.fixture
def alone(monkeypatch):
    """A machine of one device."""
    own = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda *_: own)


@pytest.fixture
def log(caplog):
    """JAX's log of what it traces and compiles, in all threads."""
    jax.config.update("jax_log_compiles", True)
    yield caplog
    jax.config.update("jax_log_compiles", False)


def traced(log):
    """Names of the programs that JAX has traced or compiled since the last call."""
    text = "\n".join(record.getMessage() for record in log.records)
    log.clear()
    found = re.findall(r"Finished (?:tracing \+ transforming|XLA compilation of) (?:jit\()?(\w+)", text)
    return set(found) & PROGRAMS


def trainer_of(demo, rewards, **options):
    config = PPOConfig.create(
        max_prompt_seq_len=32, max_answer_seq_len=8, per_device_train_batch_size=4, mesh_fsdp=1, **options
    )
    reward = None if rewards else demo.reward
    engine = RLHFEngine(demo.lm, reward, demo.tokenizer, num_total_iters=2, config=config)
    return PPOTrainer(engine, rewards=rewards)


def prompts_of(lab, width):
    ids, mask = lab.prompts(rows=4, width=width, vocab=400)
    return {"prompt_ids": ids, "prompt_mask": mask}


def step(trainer, batch):
    trainer.train_rlhf(trainer.generate_experience(batch))


@pytest.mark.parametrize("algorithm", ["gae", "grpo"])
def test_a_prepared_step_traces_and_compiles_none_of_its_programs(alone, demo, lab, log, algorithm):
    group = {"samples_per_prompt": 4, "advantage_estimator": "grpo"} if algorithm == "grpo" else {}
    trainer = trainer_of(demo, None, **group)
    batch = prompts_of(lab, 16)
    if group:
        batch = {name: x[:1] for name, x in batch.items()}
    for waiting in trainer.prepare(16):
        waiting.result()
    assert traced(log) == PROGRAMS
    step(trainer, batch)
    assert traced(log) == set()


def test_a_step_with_longer_prompts_than_were_prepared_compiles_its_own(alone, demo, lab, log):
    trainer = trainer_of(demo, None)
    for waiting in trainer.prepare(16):
        waiting.result()
    traced(log)
    step(trainer, prompts_of(lab, 32))
    assert traced(log) == PROGRAMS


def test_programs_of_several_devices_are_not_prepared(demo):
    config = PPOConfig.create(max_prompt_seq_len=32, max_answer_seq_len=8)
    engine = RLHFEngine(demo.lm, demo.reward, demo.tokenizer, num_total_iters=2, config=config)
    assert PPOTrainer(engine).prepare(16) == []


def test_a_failure_ahead_is_left_to_the_call():
    def fails():
        raise ValueError("ahead")

    add = Announce(None, "addition", lambda x: x + 1)
    assert isinstance(add.compile_ahead(fails).exception(), ValueError)
    assert add(1) == 2


def test_a_call_waits_for_the_program_of_its_own_shapes_only():
    begun, order = Future(), []

    def compiled():
        begun.result()
        order.append("compiled")

    add = Announce(None, "addition", lambda x: order.append(x.shape))
    ahead = add.compile_ahead(compiled, (np.zeros(3),))
    add(np.zeros(2))
    assert not ahead.done()
    begun.set_result(None)
    add(np.zeros(3))
    assert order == [(2,), "compiled", (3,)]


def test_an_abstract_tree_has_the_placement_of_its_arrays_and_keeps_other_leaves():
    placed = jax.device_put(np.zeros((2, 3), np.float32), jax.devices()[1])
    found = abstract({"placed": placed, "free": jax.numpy.int32(1), "number": np.float32(2), "none": None})
    assert (found["placed"].shape, found["placed"].dtype, found["placed"].sharding) == (
        (2, 3),
        np.float32,
        placed.sharding,
    )
    assert found["free"].sharding is None
    assert found["number"] == 2 and found["none"] is None


def test_a_run_of_sft_compiles_its_train_step_once(alone, demo, tmp_path, log):
    options = {"data_path": demo.train, "data_cache_dir": demo.cache, "max_length": 32, "max_eval_samples": 8}
    options |= {"per_device_train_batch_size": 2, "max_steps": 1, "report_to": ("none",), "max_train_samples": 40}
    config = SFTConfig.create(model_name_or_path=demo.lm, output_dir=str(tmp_path / "run"), mesh_fsdp=1, **options)
    train_sft(config)
    text = [record for record in log.records if "Finished XLA compilation of jit(train_step)" in record.getMessage()]
    assert [record.threadName for record in text] == ["compiles the sft train step_0"]
