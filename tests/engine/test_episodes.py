"""Responses of several turns: the environment's tokens go into the same cache, and change no sample before them."""

import jax
import numpy as np
import pytest

from jaxrlhf.engine import SamplingConfig
from jaxrlhf.engine.episodes import turns_advance, turns_start
from jaxrlhf.rl.experience import actor_logprobs

LONGEST, TURN, GIVEN = 24, 4, 6
PLAIN = SamplingConfig(LONGEST, pad_token_id=0)
ENDING = SamplingConfig(LONGEST, eos_token_id=tuple(range(3, 40)), pad_token_id=0, repetition_penalty=1.1)
KEY = jax.random.key(3)


def answers(row, turn):
    """The environment's tokens after a turn: their number differs from row to row."""
    return [41 + (7 * row + 3 * turn + i) % 50 for i in range(1 + (row + turn) % GIVEN)]


def played(setup, lab, sampling, reply, turns, live=None, together=True, turn_tokens=TURN):
    """Rows of up to `turns` turns; all rows that wait go on together, or one at a time."""
    ids, mask = lab.prompts()
    batch = setup.engine.episodes(ids, mask, KEY, sampling, live=live, turn_tokens=turn_tokens)
    waiting, given, count, transcript = {}, {}, np.zeros(len(ids), int), [[] for _ in ids]
    while batch.running.any() or waiting or given:
        for row, tokens in batch.advance(given).items():
            count[row] += 1
            transcript[row].append((True, tokens))
            if count[row] < turns and len(reply(row, count[row])) < batch.room(row):
                waiting[row] = reply(row, count[row])
        given = dict(waiting) if together else dict(list(waiting.items())[-1:])
        for row, tokens in given.items():
            transcript[row].append((False, tokens))
            del waiting[row]
    return batch, transcript


@pytest.fixture(scope="module")
def three(setup, lab):
    return played(setup, lab, ENDING, answers, 3)


def test_the_rollout_holds_every_turn_under_the_mask_of_the_models_tokens(three, lab):
    batch, transcript = three
    rollout = jax.device_get(batch.rollout({2: {3: 0.5, 7: 2.0}}))
    lengths = set()
    for row, parts in enumerate(transcript):
        tokens = [token for _, ids in parts for token in ids]
        sampled = [own for own, ids in parts for _ in ids]
        inside = rollout.mask[row, lab.PROMPT :]
        assert rollout.tokens[row, lab.PROMPT :][inside].tolist() == tokens
        assert rollout.response_mask[row, lab.PROMPT :][inside].tolist() == sampled
        assert not rollout.response_mask[row, lab.PROMPT :][~inside].any()
        np.testing.assert_array_equal(rollout.logprobs[row] != 0, rollout.response_mask[row])
        lengths.add(len(tokens))
    assert len(lengths) > 3 and max(len(parts) for parts in transcript) == 5
    assert rollout.rewards[2, lab.PROMPT + 2] == 0.5 and rollout.rewards[2, lab.PROMPT + 6] == 2.0
    assert rollout.rewards.sum() == 2.5


def test_log_probs_of_the_models_tokens_are_those_of_one_pass_over_the_whole_transcript(three, setup):
    rollout = three[0].rollout({}).compact()
    expected, _ = actor_logprobs(setup.actor.module, setup.actor.params, rollout.tokens, rollout.mask, 1.0)
    mask = np.asarray(rollout.response_mask)
    assert mask.sum() > 60
    np.testing.assert_allclose(np.asarray(rollout.logprobs)[mask], np.asarray(expected)[mask], rtol=0, atol=1e-5)


def test_a_row_does_not_depend_on_when_it_waits(three, setup, lab):
    live = np.arange(lab.ROWS) % 4 > 0
    whole = jax.device_get(three[0].rollout({}))
    alone = jax.device_get(played(setup, lab, ENDING, answers, 3, live=live, together=False)[0].rollout({}))
    for name in ("tokens", "mask", "response_mask", "logprobs"):
        ours, expected = getattr(alone, name), getattr(whole, name)
        np.testing.assert_array_equal(ours[live], expected[live])
    assert not alone.response_mask[~live].any() and not alone.mask[~live, lab.PROMPT :].any()


def test_one_turn_is_what_generate_gives(setup, lab):
    ids, mask = lab.prompts()
    expected = jax.device_get(setup.engine.generate(ids, mask, KEY, ENDING))
    got = jax.device_get(played(setup, lab, ENDING, answers, 1, turn_tokens=0)[0].rollout({}))
    for name in ("tokens", "mask", "response_mask"):
        np.testing.assert_array_equal(getattr(got, name), getattr(expected, name))
    np.testing.assert_allclose(got.logprobs, expected.logprobs, rtol=0, atol=1e-5)


def test_three_turns_cost_what_one_turn_of_their_length_costs(setup, lab):
    one, _ = played(setup, lab, PLAIN, answers, 1, turn_tokens=0)
    equal, transcript = played(setup, lab, PLAIN, lambda row, turn: [50] * GIVEN, 3)
    assert [len(tokens) for _, tokens in transcript[0]] == [TURN, GIVEN, TURN, GIVEN, TURN]
    assert one.steps == LONGEST - 1 and one.lengths.tolist() == equal.lengths.tolist() == [LONGEST] * lab.ROWS
    assert equal.steps <= 1.15 * one.steps


def test_turns_compile_nothing(three, setup, lab):
    programs = turns_start._cache_size(), turns_advance._cache_size()
    played(setup, lab, ENDING, lambda row, turn: [60 + row] * (turn + 1), 3)
    assert (turns_start._cache_size(), turns_advance._cache_size()) == programs


def test_tokens_for_a_row_that_does_not_wait_or_has_no_room_are_refused(setup, lab):
    ids, mask = lab.prompts()
    batch = setup.engine.episodes(ids, mask, KEY, ENDING, turn_tokens=TURN)
    with pytest.raises(ValueError, match="row 0 does not wait"):
        batch.advance({0: [50]})
    while batch.running[0]:
        batch.advance({})
    with pytest.raises(ValueError, match=r"row 0 .*no room"):
        batch.advance({0: [50] * batch.room(0)})
