"""Rollout batches in pieces and through slots: other shapes and another order of work, the same rollout."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest
from comparisons import assert_same_rollout

from jaxrlhf.data import encode_stops
from jaxrlhf.errors import InputError
from jaxrlhf.rl import sampler
from jaxrlhf.rl.config import PPOConfig
from jaxrlhf.rl.models import RLHFEngine
from jaxrlhf.rl.samples import Prompts, RolloutPlan, Started
from jaxrlhf.rl.trainer import PPOTrainer
from jaxrlhf.trainers.rollouts import generate_in_pieces, pieces_by_length

SIZES = {"max_prompt_seq_len": 64, "max_answer_seq_len": 8, "seed": 3}


@pytest.fixture(scope="module")
def wide():
    """Prompts `[16, 48]`, six of more than 32 tokens."""
    rng = np.random.default_rng(6)
    lengths = rng.permutation([3, 5, 7, 9, 12, 20, 25, 30, 31, 32, 33, 36, 40, 44, 47, 48])
    return rng.integers(3, 101, (16, 48)), np.arange(48) >= 48 - lengths[:, None]


def test_pieces_hold_prompts_of_similar_length_in_their_own_width(wide):
    lengths = wide[1].sum(1)
    pieces = pieces_by_length(wide[1], 2)
    assert [width for _, width in pieces] == [32, 48]
    assert sorted(np.concatenate([rows for rows, _ in pieces]).tolist()) == list(range(16))
    assert lengths[pieces[0][0]].max() <= lengths[pieces[1][0]].min()


def test_a_batch_generated_in_pieces_is_the_same_rollout(wide, setup, lab):
    ids, mask = wide
    key, numbers = jax.random.key(3), np.arange(16) * 3 + 1
    shapes = []

    def generate(ids, *args, **options):
        shapes.append(ids.shape)
        return setup.engine.generate(ids, *args, **options)

    sampling = lab.sampling.replace(pad_token_id=2)
    whole = setup.engine.generate(ids, mask, key, sampling, sample_index=numbers)
    parts = generate_in_pieces(generate, ids, mask, key, sampling, pieces=4, sample_index=numbers, slots=0)
    assert shapes == [(4, 32), (4, 32), (4, 48), (4, 48)]
    assert parts.prompt_length == whole.prompt_length == 48
    assert_same_rollout(jax.device_get(parts), jax.device_get(whole))


def test_ppo_generates_the_same_in_pieces_and_through_slots(demo, lab):
    ids, mask = lab.prompts(rows=32, width=48, vocab=400)
    batch = {"prompt_ids": ids, "prompt_mask": mask}
    options = {"repetition_penalty": 1.2, "min_answer_seq_len": 1}
    config = PPOConfig.create(**SIZES, **options)
    engine = RLHFEngine(demo.lm, demo.reward, demo.tokenizer, num_total_iters=1, config=config)
    key = jax.random.key(5)

    def rollout(trainer):
        plan = RolloutPlan(key, trainer.sampling, trainer.config.rollout.generation_batches)
        return jax.device_get(trainer.rollout(engine.generating(engine.state), Prompts.of(batch), plan))

    free = rollout(PPOTrainer(engine, config))
    answers = [free.tokens[row][free.response_mask[row]].tolist() for row in range(32)]
    row, text, stop = next(
        (row, text, tuple(ids[2:4]))
        for row, ids in enumerate(answers)
        if encode_stops(demo.tokenizer, [text := demo.tokenizer.decode(ids[2:4])]) == (tuple(ids[2:4]),)
        and len(ids) > 5
    )
    stopping = config.replace(stop_strings=(text,))
    trainers = [PPOTrainer(engine, c) for c in (stopping, stopping.replace(generation_batches=2, generation_slots=8))]
    plain, other = map(rollout, trainers)
    assert_same_rollout(other, plain)
    assert plain.tokens[row][plain.response_mask[row]].tolist() == answers[row][:4]
    sampling = trainers[0].sampling
    assert (sampling.stop_sequences, sampling.repetition_penalty, sampling.min_new_tokens) == ((stop,), 1.2, 1)


def test_batches_that_do_not_divide_are_refused_by_name(demo, lab):
    with pytest.raises(InputError, match=r"generation_batches=0 must be at least 1"):
        PPOConfig.create(generation_batches=0)
    with pytest.raises(InputError, match=r"generation_slots=-2 must be"):
        PPOConfig.create(generation_slots=-2)
    config = PPOConfig.create(**SIZES, generation_batches=3)
    message = r"generation_batches=3 must divide the 16 prompts of a rollout batch"
    with pytest.raises(InputError, match=message):
        config.replace(per_device_train_batch_size=2).rollout_rows(8)
    trainer = PPOTrainer(RLHFEngine(demo.lm, demo.reward, demo.tokenizer, num_total_iters=1, config=config))
    ids, mask = lab.prompts(rows=16, width=32, vocab=400)
    with pytest.raises(InputError, match=message):
        trainer.generate_experience({"prompt_ids": ids, "prompt_mask": mask})


def test_a_stop_string_is_its_own_tokens_and_one_without_any_is_refused(demo):
    tokenizer = demo.tokenizer
    (ids,) = encode_stops(tokenizer, [" Human:"])
    assert tokenizer.decode(list(ids)) == " Human:" and tokenizer.eos_token_id not in ids
    with pytest.raises(InputError, match="stop_strings: ''"):
        encode_stops(tokenizer, ["x", ""])


def test_waiting_for_a_rollout_that_was_only_dispatched_is_time_of_generation(monkeypatch):
    clock = SimpleNamespace(now=10.0)

    def wait(value):
        clock.now += {"rollout": 5.0, "experience": 2.0}[value]
        return value

    monkeypatch.setattr(sampler, "time", SimpleNamespace(monotonic=lambda: clock.now))
    monkeypatch.setattr(sampler, "jax", SimpleNamespace(block_until_ready=wait))
    models = SimpleNamespace(score=lambda *_: "experience", rewards=())
    started = Started("rollout", [], None, seconds=1.0)
    sampled = sampler.Sampler.finish(models, SimpleNamespace(hyperparameters=None), started)
    assert sampled.metrics == {"timing/generate": 6.0, "timing/score": 2.0}
