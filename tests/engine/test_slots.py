"""Slots of a server: joining and leaving at any time changes no sample, and nothing compiles after the warm-up."""

import jax
import numpy as np
import pytest

from jaxrlhf.engine import HybridEngine, SamplingConfig, SlotBatch, SlotSampling, slots
from jaxrlhf.engine.slots import TOP, slot_join, slot_step

LENGTH, SLOTS = 64, 3


@pytest.fixture(scope="module")
def engine(lab):
    return HybridEngine(lab.tiny_model(), lab.mesh_of())


@pytest.fixture(scope="module")
def batch(engine):
    batch = SlotBatch(engine, SLOTS, LENGTH)
    batch.warm_up()
    return batch


def prompts(seed=0, sizes=(2, 17, 40, 33, 9)):
    rng = np.random.default_rng(seed)
    return [rng.integers(3, 101, size).tolist() for size in sizes]


def drive(batch, jobs, count):
    """Runs jobs (prompt, sampling) through the slots as these get free: the `count` tokens and log-probs of each."""
    waiting, running, results = list(enumerate(jobs)), {}, [[] for _ in jobs]

    def take(sampled, slots):
        token, logprob = np.asarray(sampled.token), np.asarray(sampled.logprob)
        for slot in slots:
            results[running[slot]].append((int(token[slot]), float(logprob[slot])))

    while waiting or running:
        for slot in set(range(SLOTS)) - set(running):
            if waiting:
                running[slot], (prompt, sampling) = waiting.pop(0)
                take(batch.join(prompt, {slot: sampling}), [slot])
        take(batch.step(), list(running))
        for slot in [slot for slot, job in running.items() if len(results[job]) == count]:
            batch.leave(slot)
            del running[slot]
    return [[token for token, _ in result] for result in results], [[x for _, x in result] for result in results]


def test_greedy_tokens_are_those_of_generate(engine, batch):
    given = prompts()
    tokens, _ = drive(batch, [(prompt, SlotSampling(seed=1, temperature=0)) for prompt in given], 12)
    for prompt, got in zip(given, tokens, strict=True):
        ids = np.array([prompt])
        sampling = SamplingConfig(12, temperature=0)
        rollout = engine.generate(ids, np.ones_like(ids), jax.random.key(0), sampling)
        assert got == np.asarray(rollout.tokens)[0, len(prompt) :].tolist()


def test_a_sample_is_the_same_alone_and_among_others(batch):
    samplings = [
        SlotSampling(seed=-5, temperature=1.3),
        SlotSampling(seed=2**40 + 7, temperature=0.8, top_p=0.7),
        SlotSampling(seed=7, number=2, top_k=5),
        SlotSampling(seed=7, number=3, top_k=5, top_logprobs=True),
        SlotSampling(seed=7, temperature=0.0),
    ]
    jobs = list(zip(prompts(), samplings, strict=True))
    together = drive(batch, jobs, 10)
    for i, job in enumerate(jobs):
        assert drive(batch, [job], 10) == ([together[0][i]], [together[1][i]])
    assert len({tuple(tokens) for tokens in together[0]}) == len(jobs)


def test_seeds_and_numbers_give_different_samples(batch):
    prompt = prompts()[0]
    samplings = [SlotSampling(0), SlotSampling(1), SlotSampling(2**32), SlotSampling(0, number=1)]
    tokens, _ = drive(batch, [(prompt, sampling) for sampling in samplings], 10)
    assert len({tuple(row) for row in tokens}) == 4


def test_one_prefill_serves_several_samples(batch):
    prompt = prompts()[1]
    sampled = batch.join(prompt, {0: SlotSampling(3), 2: SlotSampling(3, number=1)})
    first = np.asarray(sampled.token)[[0, 2]].tolist()
    second = np.asarray(batch.step().token)[[0, 2]].tolist()
    batch.leave(0)
    batch.leave(2)
    tokens, _ = drive(batch, [(prompt, SlotSampling(3)), (prompt, SlotSampling(3, number=1))], 2)
    assert tokens == [list(pair) for pair in zip(first, second, strict=True)]


def test_logprobs_are_those_of_the_model_with_the_likeliest_tokens(engine, batch, lab):
    prompt = prompts()[1]
    sampled = batch.join(prompt, {1: SlotSampling(0, temperature=0.3, top_p=0.2, top_logprobs=True)})
    batch.leave(1)
    logits = engine.module.apply({"params": engine.params}, np.array([prompt]), np.ones((1, len(prompt)), bool))
    expected = np.asarray(jax.nn.log_softmax(logits[0, -1]))
    best = np.argsort(-expected)[:TOP]
    np.testing.assert_array_equal(np.asarray(sampled.top_tokens)[1], best)
    np.testing.assert_allclose(np.asarray(sampled.top_logprobs)[1], expected[best], rtol=0, atol=2e-5)
    np.testing.assert_allclose(np.asarray(sampled.logprob)[1], expected[int(sampled.token[1])], rtol=0, atol=2e-5)


def test_a_prompt_and_its_response_fill_the_cache_to_the_last_column(engine, batch):
    (prompt,) = prompts(1, (LENGTH - 8,))
    tokens, _ = drive(batch, [(prompt, SlotSampling(0, temperature=0))], 8)
    ids = np.array([prompt])
    rollout = engine.generate(ids, np.ones_like(ids), jax.random.key(0), SamplingConfig(8, temperature=0))
    assert tokens[0] == np.asarray(rollout.tokens)[0, len(prompt) :].tolist()
    assert batch.widths() == [32, LENGTH - 1]


def test_nothing_compiles_after_the_warm_up(batch):
    before = slot_join._cache_size(), slot_step._cache_size()
    jobs = [(prompt, SlotSampling(i, i, i / 3, i, 1 - i / 9, i > 2)) for i, prompt in enumerate(prompts(2))]
    drive(batch, jobs, 5)
    assert (slot_join._cache_size(), slot_step._cache_size()) == before


def test_a_program_that_the_warm_up_only_compiles_is_there_for_its_first_prompt(engine, monkeypatch, caplog):
    monkeypatch.setattr(slots, "WIDEST_RUN", 32)
    batch, ready = SlotBatch(engine, SLOTS, LENGTH + 7), []
    monkeypatch.setattr(batch, "join", lambda prompt, _: ready.append(len(prompt)))
    batch.warm_up(lambda: ready.append("ready"))
    assert ready == [32, *["ready"] * batch.programs] and batch.widths() == [32, 64, LENGTH + 6]
    monkeypatch.undo()
    jax.config.update("jax_log_compiles", True)
    try:
        drive(batch, [(prompts()[2], SlotSampling(0))], 3)
    finally:
        jax.config.update("jax_log_compiles", False)
    text = " ".join(record.getMessage() for record in caplog.records)
    assert "slot_join" not in text and "slot_step" not in text


def test_slots_work_on_a_mesh(engine, lab):
    parallel = SlotBatch(HybridEngine(lab.tiny_model(mesh=lab.mesh_of(2, 2, 2)), lab.mesh_of(2, 2, 2)), 4, 40)
    parallel.warm_up()
    before = slot_join._cache_size(), slot_step._cache_size()
    prompt = prompts()[1]
    rows = [np.asarray(parallel.join(prompt, {2: SlotSampling(0, temperature=0)}).token)]
    rows += [np.asarray(parallel.step().token) for _ in range(5)]
    ids = np.array([prompt])
    rollout = engine.generate(ids, np.ones_like(ids), jax.random.key(0), SamplingConfig(6, temperature=0))
    assert [int(row[2]) for row in rows] == np.asarray(rollout.tokens)[0, len(prompt) :].tolist()
    assert (slot_join._cache_size(), slot_step._cache_size()) == before
