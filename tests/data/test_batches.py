"""Batches: shapes, masks, and an order that depends on nothing but seed and step."""

import dataclasses

import numpy as np
import pytest

from jaxrlhf.data import (
    PairData,
    PromptData,
    SFTData,
    demo,
    epoch_permutation,
    eval_batches,
    length_bucket,
    stream_indices,
)
from jaxrlhf.data.batches import short_names
from jaxrlhf.data.tokenized import Ragged

EOS = 1
PROMPTS = [[5, 6, 7], [8], [EOS, 9, 10, 11]]
CHOSEN = [[12, EOS], [13] * 40 + [EOS], [14, 15, EOS]]
REJECTED = [[16, EOS], [17, EOS], [18] * 70]


@pytest.fixture(scope="module", params=["own pad", "pad is eos"])
def tokenizer(request):
    tokenizer = demo.train_tokenizer(["a b c"], vocab_size=260)
    if request.param == "pad is eos":
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def data(kind, tokenizer, maximum=256):
    columns = {SFTData: (PROMPTS, CHOSEN), PairData: (PROMPTS, CHOSEN, REJECTED), PromptData: (PROMPTS,)}[kind]
    parts = [ids for row in zip(*columns, strict=True) for ids in row]
    offsets = np.concatenate([[0], np.cumsum([len(ids) for ids in parts])])
    rows = np.stack([np.zeros(3), np.arange(3)], axis=1).astype(np.int32)
    return kind(Ragged(np.concatenate(parts).astype(np.int32), offsets, rows, ("x",), {}, ()), tokenizer, maximum)


def test_sft_rows_are_right_padded_and_only_the_response_counts(tokenizer):
    batch = data(SFTData, tokenizer).batch([0, 2])
    assert all(value.dtype == np.int32 for value in batch.values())
    assert batch["input_ids"].shape == (2, 32)
    for row, (prompt, response) in enumerate([(PROMPTS[0], CHOSEN[0]), (PROMPTS[2], CHOSEN[2])]):
        n = len(prompt) + len(response)
        assert batch["input_ids"][row, :n].tolist() == prompt + response
        assert set(batch["input_ids"][row, n:]) == {tokenizer.pad_token_id}
        assert batch["attention_mask"][row].tolist() == [1] * n + [0] * (32 - n)
        assert batch["loss_mask"][row].tolist() == [0] * len(prompt) + [1] * len(response) + [0] * (32 - n)


def test_whole_sequence_loss_counts_every_token_but_the_first(tokenizer):
    batch = data(SFTData, tokenizer).batch([0, -1], completion_only_loss=False)
    assert batch["loss_mask"].sum(axis=1).tolist() == [len(PROMPTS[0] + CHOSEN[0]) - 1, 0]
    assert batch["loss_mask"][0, 0] == 0


def test_pairs_share_one_width(tokenizer):
    batch = data(PairData, tokenizer).batch([0, 1, 2])
    assert batch["chosen_ids"].shape == batch["rejected_ids"].shape == (3, 96)
    for row in range(3):
        for name, responses in (("chosen", CHOSEN), ("rejected", REJECTED)):
            ids = PROMPTS[row] + responses[row]
            assert batch[f"{name}_ids"][row, : len(ids)].tolist() == ids
            assert batch[f"{name}_mask"][row].sum() == len(ids)
            assert batch[f"{name}_mask"][row, : len(ids)].all()
            counted = np.flatnonzero(batch[f"{name}_loss_mask"][row])
            assert counted.tolist() == list(range(len(PROMPTS[row]), len(ids)))
    filler = data(PairData, tokenizer).batch([-1, 0])
    assert not filler["chosen_loss_mask"][0].any() and not filler["rejected_loss_mask"][0].any()


def test_prompts_are_left_padded_and_carry_their_row_number(tokenizer):
    batch = data(PromptData, tokenizer).batch([2, 0, -1])
    assert batch["prompt_ids"].shape == (3, 32)
    assert batch["prompt_ids"][0, -4:].tolist() == PROMPTS[2]
    assert batch["prompt_mask"][0].tolist() == [0] * 28 + [1] * 4
    assert batch["prompt_mask"][1].tolist() == [0] * 29 + [1] * 3
    assert batch["index"].tolist() == [2, 0, -1]
    assert batch["row_mask"].tolist() == [1, 1, 0]


@pytest.mark.parametrize("kind", [SFTData, PairData, PromptData])
def test_eval_batches_give_each_row_once_and_fill_the_last_batch(tokenizer, kind):
    batches = list(eval_batches(data(kind, tokenizer), 2))
    assert [batch["row_mask"].tolist() for batch in batches] == [[1, 1], [1, 0]]
    last = batches[-1]
    mask = next(last[name] for name in ("attention_mask", "chosen_mask", "prompt_mask") if name in last)
    assert mask[1].sum() == 1  # a filler row attends to something, so attention gives no NaN
    if "loss_mask" in last:
        assert last["loss_mask"][1].sum() == 0


def test_the_rows_of_each_source_can_be_evaluated_apart(tokenizer):
    rows = data(SFTData, tokenizer)
    ragged = dataclasses.replace(
        rows.ragged, sources=("a/x.jsonl", "y", "b/x.csv"), rows=np.array([[0, 5], [2, 0], [0, 1]])
    )
    rows = SFTData(ragged, tokenizer, 256)
    assert {name: numbers.tolist() for name, numbers in rows.rows_by_source().items()} == {"x": [0, 2], "x-2": [1]}
    (batch,) = eval_batches(rows, 3, rows.rows_by_source()["x"])
    for name, array in rows.batch([0, 2, -1]).items():
        np.testing.assert_array_equal(batch[name], array)


def test_short_names_of_sources_are_unlike_and_hold_no_slash():
    names = short_names(["/data/train.jsonl.gz", "other/train.csv", "Anthropic/hh-rlhf", "x/train.json", "folder/"])
    assert names == ("train", "train-2", "hh-rlhf", "train-3", "folder")
    assert short_names(["a-2", "a", "b/a"]) == ("a-2", "a", "a-3")


@pytest.mark.parametrize("kind", [SFTData, PairData, PromptData])
def test_processes_that_hold_different_rows_agree_on_shapes_and_make_up_the_whole_batch(tokenizer, kind, monkeypatch):
    rows, read = data(kind, tokenizer), []
    whole = rows.batch([0, 1, 2, -1])
    part = Ragged.part
    monkeypatch.setattr(Ragged, "part", lambda self, i, j: read.append(i) or part(self, i, j))
    first = rows.batch([0, 1, 2, -1], held=np.array([True, False, True, False]))
    assert set(read) == {0, 2}, "only the rows that are held are read"
    second = rows.batch([0, 1, 2, -1], held=np.array([False, True, False, True]))
    for name, array in whole.items():
        assert first[name].shape == second[name].shape == array.shape
        np.testing.assert_array_equal(first[name][[0, 2]], array[[0, 2]])
        np.testing.assert_array_equal(second[name][[1, 3]], array[[1, 3]])
    np.testing.assert_array_equal(first["row_mask"], whole["row_mask"])


def test_buckets_are_few_and_capped():
    buckets = sorted({length_bucket(n, 600) for n in range(601)})
    assert buckets == [32, 64, 96, 128, 192, 256, 384, 512, 600]
    assert all(length_bucket(n, 600) >= n for n in range(601))
    assert length_bucket(10, 20) == 20
    with pytest.raises(ValueError, match="length 601 exceeds the maximum 600"):
        length_bucket(601, 600)


@pytest.mark.parametrize(("n", "batch_size"), [(10, 3), (10, 10), (3, 8), (1, 4), (7, 2)])
def test_the_stream_is_every_row_once_an_epoch(n, batch_size):
    steps = 4 * n
    stream = np.concatenate([stream_indices(step, batch_size, n, seed=5) for step in range(steps)])
    for epoch in range(len(stream) // n):
        rows = stream[epoch * n : (epoch + 1) * n]
        assert sorted(rows) == list(range(n))
        np.testing.assert_array_equal(rows, epoch_permutation(n, 5, epoch))


def test_a_step_does_not_depend_on_the_steps_before_it():
    expected = [stream_indices(step, 4, 10, 0).tolist() for step in range(20)]
    epoch_permutation.cache_clear()
    assert [stream_indices(step, 4, 10, 0).tolist() for step in reversed(range(20))] == expected[::-1]


def test_epochs_and_seeds_differ_and_the_order_cannot_be_changed():
    orders = [epoch_permutation(50, seed, epoch).tolist() for seed in range(2) for epoch in range(2)]
    assert len({tuple(order) for order in orders}) == 4
    with pytest.raises(ValueError, match="read-only"):
        epoch_permutation(50, 0, 0)[0] = 1
