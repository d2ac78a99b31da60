"""The step of SFT, reward modelling and DPO against a plain forward, and under everything that must not matter."""

from types import SimpleNamespace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrlhf.trainers import gradients, narrowing, reward
from jaxrlhf.trainers.dpo import Losses, objective
from jaxrlhf.trainers.sft import sft_loss, token_count
from jaxrlhf.trainers.supervised import Objective, init_state, train_step


def sft_batch(rows, width, vocab):
    rng = np.random.default_rng(0)
    lengths = rng.integers(4, width + 1, rows)
    mask = (np.arange(width)[None] < lengths[:, None]).astype(np.int32)
    loss_mask = mask * (np.arange(width)[None] >= rng.integers(1, 4, rows)[:, None])
    ids = rng.integers(0, vocab, (rows, width)).astype(np.int32)
    return {"input_ids": ids, "attention_mask": mask, "loss_mask": loss_mask, "row_mask": np.ones(rows, np.int32)}


def pair_batch(rows, width, vocab):
    chosen, rejected = (sft_batch(rows, width, vocab) for _ in range(2))
    shuffled = np.random.default_rng(1).permutation(rows)
    ids = np.where(np.arange(width)[None] < 2, chosen["input_ids"], rejected["input_ids"][shuffled])
    return {
        "chosen_ids": chosen["input_ids"],
        "chosen_mask": chosen["attention_mask"],
        "chosen_loss_mask": chosen["loss_mask"],
        "rejected_ids": ids,
        "rejected_mask": chosen["attention_mask"][shuffled],
        "rejected_loss_mask": chosen["loss_mask"][shuffled],
        "row_mask": np.ones(rows, np.int32),
        "margin": np.linspace(-1, 1, rows, dtype=np.float32),
    }


def referenced(batch):
    """A batch of pairs with log-probs of some reference."""
    rng = np.random.default_rng(3)
    rows = len(batch["row_mask"])
    return batch | {f"ref_{side}_logps": rng.normal(-30, 2, rows).astype(np.float32) for side in ("chosen", "rejected")}


BETA = 0.3
DPO = {
    "sigmoid": Losses(beta=BETA),
    "ipo": Losses(("ipo",), beta=BETA),
    "several": Losses(("sigmoid", "simpo", "orpo"), (0.5, 2.0, 0.3), sft_weight=0.7, beta=BETA, margin=0.4),
}
REWARD = {
    "pairwise": reward.objective(reward.RewardLoss())[0],
    "centred and smoothed": reward.objective(reward.RewardLoss("pairwise", 0.1, 0.01))[0],
    "tokenwise": reward.objective(reward.RewardLoss("tokenwise"))[0],
}
OBJECTIVE = {"sft": Objective(token_count, sft_loss), **REWARD}
OBJECTIVE |= {kind: objective(losses)[0] for kind, losses in DPO.items()}
WIDTH = 12


@pytest.fixture(scope="module", params=["sft", *REWARD, *DPO])
def supervised(request, lab):
    """One SGD step of a dropout-free model on one device: `step(batch, parts)` → (params, metrics)."""
    kind = request.param
    model = lab.tiny_model(head="scalar" if kind in REWARD else "lm", mesh=lab.mesh_of())

    rate = 0.01 if kind == "ipo" else 0.1  # a square far from its minimum: gradients are large, and so is rounding
    optimizer = optax.sgd(rate)

    def step(batch, parts=1):
        state = init_state(model.replace(params=jax.tree.map(jnp.copy, model.params)), optimizer, lab.mesh_of())
        options = {"objective": OBJECTIVE[kind], "micro_batches": parts}
        state, metrics = train_step(state, batch, jax.random.key(0), **options)
        return jax.device_get((state.params, metrics))

    batch = (sft_batch if kind == "sft" else pair_batch)(8, WIDTH, 101)
    batch = referenced(batch) if kind in DPO else batch
    return SimpleNamespace(kind=kind, model=model, rate=rate, step=step, batch=batch, whole=step(batch))


def assert_same(step, expected):
    chex.assert_trees_all_close(step, expected, rtol=1e-5, atol=2e-6)


def test_accumulating_single_rows_equals_the_whole_batch(supervised):
    assert_same(supervised.step(supervised.batch, parts=8), supervised.whole)


def test_row_order_changes_nothing(supervised):
    order = np.random.default_rng(5).permutation(8)
    assert_same(supervised.step({k: v[order] for k, v in supervised.batch.items()}), supervised.whole)


def test_filler_rows_and_wider_padding_change_nothing(supervised):
    wider = {}
    for name, x in supervised.batch.items():
        filler = 7 if name.endswith("ids") else 0
        x = np.pad(x, ((0, 4), (0, 5))[: x.ndim], constant_values=filler)
        if name.endswith("mask") and x.ndim > 1 and not name.endswith("loss_mask"):
            x[8:, 0] = 1  # as the data gives them: one token, so that attention has something to look at
        wider[name] = x
    assert_same(supervised.step(wider), supervised.whole)


def test_micro_batches_that_a_cpu_cuts_to_their_rows_change_nothing(supervised, monkeypatch):
    monkeypatch.setattr(narrowing, "WORTH", 0)
    monkeypatch.setattr(gradients, "CPU_TOKENS", 128)  # two rows of 64 columns
    wide = {k: np.pad(x, ((0, 0), (0, 64 - WIDTH))) if x.ndim > 1 else x for k, x in supervised.batch.items()}
    for name in [name for name in wide if name.endswith("ids")]:
        wide[name][:, WIDTH:] = 3
    widths, whole = set(), OBJECTIVE[supervised.kind]

    def recorded(module, params, rows, count, key):
        widths.update(x.shape[1] for name, x in rows.items() if name.endswith("ids"))
        return whole.loss(module, params, rows, count, key)

    monkeypatch.setitem(OBJECTIVE, supervised.kind, Objective(whole.count, recorded))
    assert_same(supervised.step(wide), supervised.whole)
    assert widths == {32, 48, 64}


def test_the_loss_and_its_gradient_equal_a_plain_forward(supervised):
    b, module = supervised.batch, supervised.model.module

    def last(values, mask):
        return values[np.arange(8), mask.sum(1) - 1]

    def loss(params):
        if supervised.kind in DPO:
            return plain_dpo_loss(supervised.kind, module, params, b)
        if supervised.kind == "sft":
            logp = jax.nn.log_softmax(module.apply({"params": params}, b["input_ids"], b["attention_mask"]))
            picked = jnp.take_along_axis(logp[:, :-1], b["input_ids"][:, 1:, None], axis=-1)[..., 0]
            return -(picked * b["loss_mask"][:, 1:]).sum() / b["loss_mask"].sum()
        chosen, rejected = (
            module.apply({"params": params}, b[f"{k}_ids"], b[f"{k}_mask"]) for k in ("chosen", "rejected")
        )
        if supervised.kind != "tokenwise":
            wrong, center = (0.1, 0.01) if supervised.kind == "centred and smoothed" else (0, 0)
            scores = last(chosen, b["chosen_mask"]), last(rejected, b["rejected_mask"])
            d = scores[0] - scores[1] - b["margin"]
            losses = -(1 - wrong) * jax.nn.log_sigmoid(d) - wrong * jax.nn.log_sigmoid(-d)
            return (losses + center * (scores[0] + scores[1]) ** 2).mean()
        total = 0.0
        for row in range(8):
            ends = [b[f"{k}_mask"][row].sum() for k in ("chosen", "rejected")]
            differs = (b["chosen_ids"][row] != b["rejected_ids"][row])[: min(ends)]
            first = int(np.argmax(differs)) if differs.any() else min(min(ends), max(ends) - 1)
            columns = np.arange(first, max(ends))
            c, r = (v[row, np.minimum(columns, end - 1)] for v, end in zip((chosen, rejected), ends, strict=True))
            total += -jnp.log(jax.nn.sigmoid(c - r - b["margin"][row])).mean()
        return total / 8

    value, grads = jax.value_and_grad(loss)(supervised.model.params)
    params, metrics = supervised.whole
    assert float(metrics["loss"]) == pytest.approx(float(value), rel=1e-5)
    assert float(metrics["grad_norm"]) == pytest.approx(float(optax.tree.norm(grads)), rel=1e-5)
    expected = jax.tree.map(lambda p, g: p - supervised.rate * g, supervised.model.params, grads)
    chex.assert_trees_all_close(params, jax.device_get(expected), rtol=1e-5, atol=2e-6)


def plain_dpo_loss(kind, module, params, b):
    logps, refs, lengths = [], [], []
    for side in ("chosen", "rejected"):
        ids, mask = b[f"{side}_ids"], b[f"{side}_mask"]
        logp = jax.nn.log_softmax(module.apply({"params": params}, ids, mask))
        picked = jnp.take_along_axis(logp[:, :-1], ids[:, 1:, None], axis=-1)[..., 0]
        counted = b[f"{side}_loss_mask"][:, 1:]
        logps.append((picked * counted).sum(1))
        refs.append(b[f"ref_{side}_logps"])
        lengths.append(counted.sum(1))
    ratios = [logp - ref for logp, ref in zip(logps, refs, strict=True)]
    sigmoid = -jnp.log(jax.nn.sigmoid(BETA * (ratios[0] - ratios[1]))).mean()
    if kind == "ipo":
        return jnp.square(ratios[0] / lengths[0] - ratios[1] / lengths[1] - 1 / (2 * BETA)).mean()
    if kind == "sigmoid":
        return sigmoid
    means = [logp / length for logp, length in zip(logps, lengths, strict=True)]
    simpo = -jnp.log(jax.nn.sigmoid(BETA * (means[0] - means[1]) - 0.4)).mean()
    odds = [mean - jnp.log(1 - jnp.exp(mean)) for mean in means]
    orpo = -BETA * jnp.log(jax.nn.sigmoid(odds[0] - odds[1])).mean()
    return 0.5 * sigmoid + 2 * simpo + 0.3 * orpo - 0.7 * logps[0].sum() / lengths[0].sum()


def test_dropout_is_drawn_anew_each_step_and_is_a_function_of_seed_and_step(lab):
    """A learning rate of 0: only dropout can make two steps on one batch differ."""
    model = lab.tiny_model(lab.GPT2 | {"vocab_size": 101}, mesh=lab.mesh_of())
    batch = sft_batch(8, WIDTH, 101)

    def losses(seed):
        state = init_state(model.replace(params=jax.tree.map(jnp.copy, model.params)), lab.still, lab.mesh_of())
        result = []
        for _ in range(3):
            options = {"objective": OBJECTIVE["sft"], "micro_batches": 2}
            state, metrics = train_step(state, batch, jax.random.key(seed), **options)
            result.append(float(metrics["loss"]))
        return result

    first = losses(0)
    assert len(set(first)) == 3
    assert losses(0) == first
    assert not set(losses(1)) & set(first)


def test_a_step_above_a_limit_changes_nothing_and_other_limits_compile_nothing(lab):
    model = lab.tiny_model(mesh=lab.mesh_of())
    batch = sft_batch(4, WIDTH, 101)

    def step(**limits):
        state = init_state(model.replace(params=jax.tree.map(jnp.copy, model.params)), lab.sgd, lab.mesh_of())
        limits = {name: np.float32(limits.get(name, np.inf)) for name in ("loss", "grad_norm")}
        state, metrics = train_step(
            state, batch, jax.random.key(0), objective=OBJECTIVE["sft"], micro_batches=1, limits=limits
        )
        return jax.device_get((state.params, metrics))

    params, metrics = step()
    compiled = train_step._cache_size()
    assert not metrics["guard/spike"] and not metrics["guard/skipped_updates"]
    start = jax.device_get(model.params)
    assert max(jax.tree.leaves(jax.tree.map(lambda a, b: np.abs(a - b).max(), params, start))) > 0
    for name in ("loss", "grad_norm"):
        params, again = step(**{name: metrics[name] * 0.9})
        assert again["guard/spike"] and not again["guard/skipped_updates"] and again["loss"] == metrics["loss"]
        chex.assert_trees_all_equal(params, start)
    assert train_step._cache_size() == compiled
