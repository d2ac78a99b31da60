"""Packed batches equal batches of single sequences: loss, stats, gradients and evaluation sums of every trainer."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from lab import few

from jaxrlhf.errors import InputError
from jaxrlhf.sharding import place_batch
from jaxrlhf.trainers import reward
from jaxrlhf.trainers.dpo import Losses, objective, response_logprobs
from jaxrlhf.trainers.evaluation import eval_step
from jaxrlhf.trainers.pairs import SIDES, read_pairs
from jaxrlhf.trainers.references import score_batch
from jaxrlhf.trainers.reward import RewardConfig, RewardLoss
from jaxrlhf.trainers.sft import OBJECTIVE, sft_sums
from jaxrlhf.trainers.supervised import init_state, token_sum, train_step

VOCABULARY, LONGEST, WIDTH, COUNT = 101, 10, 32, 16
BLOOM = {"model_type": "bloom", "vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": 2, "n_head": 4}
CENTRED = RewardLoss(label_smoothing=0.1, center=0.01)
TRAINERS = {
    "sft": (OBJECTIVE, sft_sums),
    "reward": reward.objective(RewardLoss()),
    "reward centred and smoothed": reward.objective(CENTRED),
    "dpo sigmoid": objective(Losses(beta=0.3)),
    "dpo ipo and sft": objective(Losses(("ipo",), sft_weight=0.7, beta=0.3)),
}
KEEP_GRADIENTS = optax.trace(decay=0.0)  # its state is the gradient


def sequences(seed):
    """Token ids and loss masks of COUNT sequences of different lengths; a mask leaves out at least the first token."""
    rng = np.random.default_rng(seed)
    ids = [rng.integers(0, VOCABULARY, rng.integers(3, LONGEST + 1)) for _ in range(COUNT)]
    return [(x, (np.arange(len(x)) >= rng.integers(1, 3)).astype(np.int32)) for x in ids]


def pack(groups):
    """Rows of whole groups of sequences, first-fit; a filler row last. Also the numbers of the groups in each row."""
    rows: list[list[int]] = []
    for number, group in enumerate(groups):
        size = sum(len(ids) for ids, _ in group)
        fits = (row for row in rows if size + sum(len(ids) for i in row for ids, _ in groups[i]) <= WIDTH)
        row = next(fits, None)
        if row is None:
            row = []
            rows.append(row)
        row.append(number)
    rows.append([])
    names = ("input_ids", "attention_mask", "segment_ids", "loss_mask")
    batch = {name: np.zeros((len(rows), WIDTH), np.int32) for name in names}
    batch["row_mask"] = np.array([bool(row) for row in rows]).astype(np.int32)
    batch["segment_ids"][-1, 0] = 1
    for row, numbers in enumerate(rows):
        end, segment = 0, 0
        for ids, loss_mask in (sequence for number in numbers for sequence in groups[number]):
            place, end, segment = slice(end, end + len(ids)), end + len(ids), segment + 1
            batch["input_ids"][row, place], batch["loss_mask"][row, place] = ids, loss_mask
            batch["segment_ids"][row, place] = segment
    batch["attention_mask"] = (batch["segment_ids"] > 0).astype(np.int32)
    return batch, rows


def pad(of_rows):
    """ids, mask and loss mask `[COUNT, LONGEST]`, one sequence per row."""
    arrays = np.zeros((3, COUNT, LONGEST), np.int32)
    for row, (ids, loss_mask) in enumerate(of_rows):
        arrays[:, row, : len(ids)] = ids, np.ones(len(ids)), loss_mask
    return arrays


def sft_batches():
    ids, mask, loss_mask = pad(sequences(0))
    plain = {"input_ids": ids, "attention_mask": mask, "loss_mask": loss_mask, "row_mask": np.ones(COUNT, np.int32)}
    return plain, pack([[sequence] for sequence in sequences(0)])[0]


def pair_batches():
    """The same pairs in both forms, with log-probs of some reference."""
    chosen, rejected = sequences(1), sequences(2)
    plain = {"row_mask": np.ones(COUNT, np.int32), "margin": np.linspace(-1, 1, COUNT, dtype=np.float32)}
    for side, of_side in zip(SIDES, (chosen, rejected), strict=True):
        plain |= {f"{side}_{name}": x for name, x in zip(("ids", "mask", "loss_mask"), pad(of_side), strict=True)}
        plain[f"ref_{side}_logps"] = np.random.default_rng(len(side)).normal(-30, 2, COUNT).astype(np.float32)
    packed, rows = pack(list(zip(chosen, rejected, strict=True)))
    numbers = np.full((len(rows), max(map(len, rows))), -1)
    for row, of_row in enumerate(rows):
        numbers[row, : len(of_row)] = of_row
    packed["pair_mask"] = (numbers >= 0).astype(np.int32)
    packed["margin"] = np.where(numbers >= 0, plain["margin"][numbers], 0)
    for side in SIDES:
        packed[f"ref_{side}_logps"] = np.where(numbers >= 0, plain[f"ref_{side}_logps"][numbers], np.nan)
    return plain, packed, numbers


@pytest.fixture(scope="module", params=few(["llama", "bloom"], ["llama"]))
def tiny(request, lab):
    """`tiny("scalar", mesh)`: a model of the family."""
    options = {"llama": lab.LLAMA, "bloom": BLOOM}[request.param]
    return lambda head, mesh: lab.tiny_model(options, head, mesh=mesh, scale=0.1)


def step(model, batch, trainer, mesh, parts=1):
    """Metrics and gradients of one step."""
    state = init_state(model.replace(params=jax.tree.map(jnp.copy, model.params)), KEEP_GRADIENTS, mesh)
    options = {"objective": TRAINERS[trainer][0], "micro_batches": parts}
    state, metrics = train_step(state, place_batch(batch, mesh), jax.random.key(0), **options)
    return jax.device_get((metrics, state.opt_state.trace))


@pytest.mark.parametrize("trainer", TRAINERS)
def test_a_packed_step_equals_the_step_of_single_sequences(trainer, tiny, lab):
    mesh = lab.mesh_of()
    model = tiny("scalar" if trainer.startswith("reward") else "lm", mesh)
    plain, packed = (sft_batches() if trainer == "sft" else pair_batches())[:2]
    expected = step(model, plain, trainer, mesh, parts=4)
    assert np.isfinite(expected[0]["grad_norm"]) and expected[0]["grad_norm"] > 0
    rows = len(packed["row_mask"])
    assert rows < COUNT and packed["row_mask"].sum() == rows - 1
    for parts in (1, rows):
        found = step(model, packed, trainer, mesh, parts)
        chex.assert_trees_all_close(found, expected, rtol=1e-5, atol=1e-6 * max(1, expected[0]["grad_norm"]))


@pytest.mark.parametrize("trainer", TRAINERS)
def test_packed_evaluation_sums_equal_those_of_single_sequences(trainer, tiny, lab):
    mesh = lab.mesh_of()
    model = tiny("scalar" if trainer.startswith("reward") else "lm", mesh)
    batches = (sft_batches() if trainer == "sft" else pair_batches())[:2]
    options = {"module": model.module, "mesh": mesh, "measure": TRAINERS[trainer][1]}
    expected, found = (jax.device_get(eval_step(model.params, batch, **options)) for batch in batches)
    chex.assert_trees_all_close(found, expected, rtol=1e-5, atol=1e-5)


def test_the_reference_scores_packed_pairs_as_single_sequences(tiny, lab):
    mesh = lab.mesh_of()
    model = tiny("lm", mesh)
    plain, packed, numbers = pair_batches()
    score = partial(score_batch, model.params, logprobs=response_logprobs, module=model.module, mesh=mesh)
    expected = score(plain, micro_batches=1)
    for parts in (1, len(numbers)):
        found = score(packed, micro_batches=parts)
        for side in SIDES:
            assert found[side].shape == numbers.shape
            of_pairs = np.where(numbers >= 0, np.asarray(expected[side])[numbers], 0)
            np.testing.assert_allclose(found[side], of_pairs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("trainer", ["reward", "dpo sigmoid"])
def test_a_packed_step_on_a_mesh_equals_the_step_on_one_device(trainer, lab):
    packed = pair_batches()[1]
    rows = len(packed["row_mask"])
    more = {name: np.pad(x, ((0, -rows % 8), *[(0, 0)] * (x.ndim - 1))) for name, x in packed.items()}
    more["attention_mask"][rows:, 0] = more["segment_ids"][rows:, 0] = 1
    found = []
    for mesh in (lab.mesh_of(), lab.mesh_of(data=2, fsdp=2)):
        model = lab.tiny_model(head="scalar" if trainer.startswith("reward") else "lm", mesh=mesh, scale=0.1)
        found.append(step(model, more, trainer, mesh, parts=2))
    chex.assert_trees_all_close(*found, rtol=1e-5, atol=2e-6)


def test_both_forms_of_a_batch_have_the_same_pairs():
    plain, packed, numbers = pair_batches()
    values = np.random.default_rng(3).normal(size=(2, COUNT, LONGEST)).astype(np.float32)
    spread = np.full(packed["input_ids"].shape, np.nan, np.float32)
    for row, column in np.argwhere(packed["segment_ids"][:-1] > 0):
        segment = packed["segment_ids"][row, column]
        side, pair = (segment - 1) % 2, numbers[row, (segment - 1) // 2]
        spread[row, column] = values[side, pair, column - np.argmax(packed["segment_ids"][row] == segment)]
    expected, found = read_pairs(plain), read_pairs(packed)
    assert expected.mask.shape == (COUNT,) and found.mask.shape == numbers.shape
    both = np.concatenate(values)
    for a, b in (
        (expected.last(both), found.last(spread)),
        (expected.sums(both), found.sums(spread)),
        (expected.lengths(), found.lengths()),
    ):
        for side in SIDES:
            of_pairs = np.where(numbers >= 0, np.asarray(a[side])[numbers], 0)
            np.testing.assert_allclose(np.where(numbers >= 0, b[side], 0), of_pairs, rtol=1e-5, atol=1e-6)
    for side in SIDES:
        assert not np.asarray(found.lengths()[side])[numbers < 0].any()


def test_tokens_are_counted_without_padding_and_without_filler_rows():
    plain, packed = sft_batches()
    assert token_sum(packed) == token_sum(plain) == sum(len(ids) for ids, _ in sequences(0))
    plain, packed, _ = pair_batches()
    assert token_sum(packed) == token_sum(plain) == sum(len(ids) for seed in (1, 2) for ids, _ in sequences(seed))


def test_the_tokenwise_reward_loss_is_refused_with_packing():
    with pytest.raises(InputError, match=r"packing=True does not go with reward_loss=tokenwise.*packing.*pairwise"):
        RewardConfig.create(reward_loss="tokenwise", packing=True)
    for packing in (None, False):
        assert RewardConfig.create(reward_loss="tokenwise", packing=packing).data.packing is packing
