"""Batches: shapes, masks, and an order that depends on nothing but seed and step."""

import re

import numpy as np
import pytest
from rows import pairs, write_lines

from jaxrlhf.data import (
    DataConfig,
    PairData,
    PromptData,
    SFTData,
    demo,
    epoch_permutation,
    eval_batches,
    length_bucket,
    load_data,
)
from jaxrlhf.data.order import epoch_units, stream_positions
from jaxrlhf.data.packing import pack
from jaxrlhf.data.parts import Part, make_part
from jaxrlhf.data.steps import RewardData, UnpairedData
from jaxrlhf.data.tokenized import features_of

EOS = 1
PROMPTS = [[5, 6, 7], [8], [EOS, 9, 10, 11]]
CHOSEN = [[12, EOS], [13] * 40 + [EOS], [14, 15, EOS]]
REJECTED = [[16, EOS], [17, EOS], [18] * 70]
KINDS = {SFTData: "sft", PairData: "dpo", RewardData: "reward", PromptData: "ppo"}


@pytest.fixture(scope="module", params=["own pad", "pad is eos"])
def tokenizer(request):
    tokenizer = demo.train_tokenizer(["a b c"], vocab_size=260)
    if request.param == "pad is eos":
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def part(step, rows, name="x"):
    """Tokenised rows of a step: (prompt, *responses) each, of which the responses count."""
    import datasets

    columns = {column: [] for column in features_of(step)}
    for number, (prompt, *responses) in enumerate(rows):
        values = {"row": number, "problem": None, "cut": 0, "prompt_length": len(prompt), "kept": "[null]"}
        values |= {"label": number != 1, "margin": number / 4 if number else None}
        for j, response in enumerate(responses or [[]]):
            values |= {f"ids_{j}": prompt + response, f"mask_{j}": [0] * len(prompt) + [1] * len(response)}
            values[f"length_{j}"] = len(prompt) + len(response)
        for column, into in columns.items():
            into.append(values[column])
    return make_part(name, [datasets.Dataset.from_dict(columns, features=features_of(step))], len(rows), (), "rows")


def data(kind, tokenizer, maximum=256, **options):
    columns = (PROMPTS, CHOSEN, REJECTED)[: {SFTData: 2, PromptData: 1}.get(kind, 3)]
    return kind([part(KINDS[kind], list(zip(*columns, strict=True)))], tokenizer, maximum, **options)


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
    rows = list(zip(PROMPTS, CHOSEN, strict=True))
    both = SFTData([part("sft", rows[:2], "x"), part("sft", rows[2:], "y")], tokenizer, 256)
    assert {name: numbers.tolist() for name, numbers in both.rows_by_source().items()} == {"x": [0, 1], "y": [2]}
    assert [both.source(i) for i in range(3)] == [("x", 0), ("x", 1), ("y", 0)]
    (batch,) = eval_batches(both, 3, both.rows_by_source()["x"])
    for name, array in both.batch([0, 1, -1]).items():
        np.testing.assert_array_equal(batch[name], array)


@pytest.mark.parametrize("kind", [SFTData, RewardData, PromptData])
def test_processes_that_hold_different_rows_agree_on_shapes_and_make_up_the_whole_batch(tokenizer, kind, monkeypatch):
    rows, read = data(kind, tokenizer), []
    whole = rows.batch([0, 1, 2, -1])
    fetch = Part.fetch
    monkeypatch.setattr(Part, "fetch", lambda self, i, names: read.extend(i) or fetch(self, i, names))
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


def stream_indices(step, batch_size, n, seed):
    return epoch_units(stream_positions(step, batch_size), n, seed)


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


# ---- packing


def lengths_like_conversations(n, longest=512):
    return np.clip(np.random.default_rng(n).lognormal(4.6, 0.8, n).astype(int), 4, longest)


@pytest.mark.parametrize("n", [1, 7, 100, 3000])
def test_bins_hold_each_row_once_and_never_more_than_fits(n):
    lengths = lengths_like_conversations(n)
    bins = pack(lengths, 512, seed=3)
    assert sorted(np.concatenate([bins[i] for i in range(len(bins))])) == list(range(n))
    sums = [lengths[bins[i]].sum() for i in range(len(bins))]
    assert max(sums) <= 512 and min(map(len, (bins[i] for i in range(len(bins))))) > 0
    assert bins.largest == max(len(bins[i]) for i in range(len(bins)))
    if n == 3000:
        assert sum(sums) / (len(bins) * 512) > 0.95


def test_bins_depend_on_the_lengths_and_the_seed_alone():
    lengths = lengths_like_conversations(300)
    first, again, other = (pack(lengths, 512, seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first.rows, again.rows)
    assert first.rows.tolist() != other.rows.tolist()


def random_rows(n, responses):
    rng = np.random.default_rng(n)
    return [tuple(rng.integers(2, 250, rng.integers(2, 12)).tolist() for _ in range(1 + responses)) for _ in range(n)]


@pytest.mark.parametrize(("kind", "sequences"), [(SFTData, 1), (PairData, 2)])
def test_a_packed_batch_is_its_rows_segment_by_segment(tokenizer, kind, sequences):
    rows = random_rows(40, sequences)
    packed = kind([part(KINDS[kind], rows)], tokenizer, 32, packing=True, seed=1)
    assert packed.maximum == 32 * sequences and packed.rows == 40 and len(packed) < 40
    seen = []
    for batch in eval_batches(packed, 4):
        assert batch["input_ids"].shape == (4, batch["segment_ids"].shape[1])
        np.testing.assert_array_equal(batch["attention_mask"], batch["segment_ids"] > 0)
        for i in range(4):
            segments = batch["segment_ids"][i]
            count = segments.max() if batch["row_mask"][i] else 0
            assert (np.diff(segments[segments > 0]) >= 0).all() and not segments[(segments > 0).sum() :].any()
            found = [
                tuple(tuple(batch[name][i][segments == s].tolist()) for name in ("input_ids", "loss_mask"))
                for s in range(1, count + 1)
            ]
            assert count % sequences == 0
            seen += [tuple(found[j : j + sequences]) for j in range(0, count, sequences)]
            if kind is PairData:
                assert batch["pair_mask"][i].tolist() == [1] * (count // 2) + [0] * (
                    batch["pair_mask"].shape[1] - count // 2
                )
            if not count:
                assert segments.tolist() == [1, *[0] * (len(segments) - 1)] and not batch["loss_mask"][i].any()
    expected = [
        tuple((tuple(prompt + r), (0,) * len(prompt) + (1,) * len(r)) for r in responses) for prompt, *responses in rows
    ]
    assert sorted(seen) == sorted(expected)


def test_pairs_for_a_reward_model_have_their_margins_and_0_where_there_is_none(tokenizer):
    rows = data(RewardData, tokenizer)
    batch = rows.batch([2, 0, -1, 1])
    assert batch["margin"].dtype == np.float32 and batch["margin"].tolist() == [0.5, 0, 0, 0.25]
    assert rows.parts[0].margins() == 2 and data(PairData, tokenizer).parts[0].margins() == 0
    packed = RewardData([part("reward", random_rows(40, 2))], tokenizer, 32, packing=True)
    for units in (np.arange(4), np.array([5, -1])):
        batch = packed.batch(units)
        expected = [[row / 4 for _, row in packed.members(unit)] for unit in units.tolist()]
        assert [row[: len(e)].tolist() for row, e in zip(batch["margin"], expected, strict=True)] == expected
        assert not batch["margin"][batch["pair_mask"] == 0].any()


@pytest.mark.parametrize("kind", [SFTData, RewardData])
def test_processes_that_hold_different_packed_rows_make_up_the_batch(tokenizer, kind):
    packed = kind([part(KINDS[kind], random_rows(40, 1 + (kind is RewardData)))], tokenizer, 32, packing=True)
    whole = packed.batch([0, 1, 2, -1])
    parts = [packed.batch([0, 1, 2, -1], held=np.arange(4) % 2 == k) for k in (0, 1)]
    for name, array in whole.items():
        np.testing.assert_array_equal(parts[0][name][::2], array[::2])
        np.testing.assert_array_equal(parts[1][name][1::2], array[1::2])


def test_a_batch_of_a_packed_epoch_holds_every_row_once(tokenizer):
    packed = SFTData([part("sft", random_rows(100, 1))], tokenizer, 32, packing=True, seed=2)
    units = np.concatenate([packed.indices(step, 1) for step in range(len(packed))])
    rows = [row for unit in units for _, row in packed.members(int(unit))]
    assert sorted(rows) == list(range(100))


def test_batches_of_ppo_hold_prompts_of_like_lengths_and_every_row_once_an_epoch(tokenizer):
    rng = np.random.default_rng(0)
    prompts = [([5] * int(n),) for n in rng.integers(1, 200, 320)]
    rows = PromptData([part("ppo", prompts)], tokenizer, 256, seed=4)
    steps = [rows.indices(step, 10) for step in range(32)]
    assert sorted(np.concatenate(steps)) == list(range(320)), "two windows of 16 batches are one epoch"
    spread = np.mean([np.ptp(rows.lengths(units)[0]) for units in steps])
    rows.group_by_length = False
    plain = [rows.indices(step, 10) for step in range(32)]
    assert sorted(np.concatenate(plain)) == list(range(320))
    assert spread < 0.15 * np.mean([np.ptp(rows.lengths(units)[0]) for units in plain])
    assert sorted(np.concatenate(steps[:16])) == sorted(np.concatenate(plain[:16])), "a window keeps its rows"


# ---- responses with labels

UNPAIRED = [([5, 6, 7], [12, EOS]), ([8], [13] * 40 + [EOS]), ([EOS, 9, 10, 11], [14, 15, EOS]), ([9] * 20, [7, EOS])]


def unpaired(tokenizer, maximum=256, rows=UNPAIRED):
    return UnpairedData([part("kto", rows)], tokenizer, maximum)


def test_labelled_rows_come_with_their_prompt_and_the_response_of_the_row_half_the_data_away(tokenizer):
    data = unpaired(tokenizer)
    batch = data.batch([1, -1, 2])
    assert all(value.dtype == np.int32 for value in batch.values())
    assert batch["label"].tolist() == [0, 0, 1] and batch["row_mask"].tolist() == [1, 0, 1]
    assert data.labels().tolist() == [True, False, True, True]
    for place, own, other in ((0, 1, 3), (2, 2, 0)):
        prompt = UNPAIRED[own][0]
        for names, response in (
            (("input_ids", "attention_mask", "loss_mask"), UNPAIRED[own][1]),
            (("kl_ids", "kl_mask", "kl_loss_mask"), UNPAIRED[other][1]),
        ):
            ids, mask, counted = (batch[name][place] for name in names)
            n = len(prompt) + len(response)
            assert ids[:n].tolist() == prompt + response and set(ids[n:]) == {tokenizer.pad_token_id}
            assert mask.tolist() == [1] * n + [0] * (len(ids) - n)
            assert np.flatnonzero(counted).tolist() == list(range(len(prompt), n))
    assert not any(batch[name][1].any() for name in ("loss_mask", "kl_loss_mask"))


def test_a_mismatched_pair_widens_the_batch_and_is_cut_at_the_longest_length(tokenizer):
    data = unpaired(tokenizer)
    batch = data.batch([3])
    assert batch["kl_mask"].sum() == 20 + 41 and batch["kl_ids"].shape == (1, 64), "the row itself has 22 tokens"
    batch = unpaired(tokenizer, 48).batch([3])
    assert batch["kl_ids"].shape == batch["input_ids"].shape == (1, 48)
    assert batch["kl_loss_mask"].sum() == 28 and EOS not in batch["kl_ids"]


def test_rows_that_another_process_holds_change_no_shape(tokenizer):
    data = unpaired(tokenizer)
    whole, part = data.batch([0, 3]), data.batch([0, 3], held=np.array([True, False]))
    assert {name: x.shape for name, x in whole.items()} == {name: x.shape for name, x in part.items()}
    for name in whole:
        np.testing.assert_array_equal(part[name][0], whole[name][0])
    assert part["row_mask"].tolist() == [1, 1] and not part["loss_mask"][1].any()


@pytest.mark.parametrize("rows", [2, 5, 8])
def test_no_row_is_its_own_partner(tokenizer, rows):
    data = unpaired(tokenizer, rows=(UNPAIRED * 2)[:rows])
    partners = data.partners(np.arange(rows))
    assert sorted(partners) == list(range(rows)) and (partners != np.arange(rows)).all()
    assert data.partners([-1]).tolist() == [-1]


def test_kto_reads_pairs_as_a_good_and_a_bad_row_and_labels_as_they_are(tmp_path):
    own = demo.train_tokenizer(["Human: question 12 Assistant: yes no 3"] * 20, vocab_size=300)
    labelled = [{"prompt": f"q {i}", "completion": "an answer", "label": i % 3 == 0} for i in range(9)]
    for name, rows, number in (("pairs", pairs(6), 6), ("labelled", labelled, 3)):
        paths = {kind: write_lines(tmp_path / f"{name}-{kind}.jsonl", rows) for kind in ("rows", "eval")}
        config = DataConfig.create(
            data_path=paths["rows"],
            eval_data_path=paths["eval"],
            data_cache_dir=str(tmp_path / "cache"),
            packing=False,
        )
        data, _ = load_data(config, own, "kto")
        assert isinstance(data, UnpairedData)
        assert (len(data), data.labels().sum()) == (12 if name == "pairs" else 9, number)
        for i in range(len(data)):
            text, label = data.text(i), bool(data.batch([i])["label"][0])
            asked = int(re.findall(r"\d+", text["prompt"])[0])
            good = "yes" in text["completion"] if name == "pairs" else asked % 3 == 0
            assert label == good, text
