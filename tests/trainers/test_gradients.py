"""Micro-batches: rows are dealt out and collected in order, and their gradients add up to the whole batch's."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf.models import logical_axes, working_copy
from jaxrlhf.models.model import leaves_by_path
from jaxrlhf.rl.experience import actor_logprobs
from jaxrlhf.sharding import TRAIN_RULES, place_batch, use
from jaxrlhf.trainers import gradients, narrowing
from jaxrlhf.trainers.gradients import (
    accumulate_gradients,
    join_rows,
    map_rows,
    micro_batches,
    model_gradients,
    split_rows,
)
from jaxrlhf.trainers.narrowing import order_by_length, widths_of, worth_cutting

ROWS = 24


@pytest.fixture
def batch():
    rng = np.random.default_rng(0)
    return {"x": rng.normal(size=(ROWS, 3)).astype("f4"), "y": rng.normal(size=ROWS).astype("f4")}


def loss(params, rows, key):
    """A sum over rows divided by the global number of rows, with a statistic and, given a key, noise per draw."""
    noise = 0.0 if key is None else jax.random.normal(key)
    error = rows["x"] @ params["w"] + noise - rows["y"]
    return jnp.sum(error**2) / ROWS, {"error": jnp.sum(error) / ROWS, "noise": jnp.asarray(noise) / 4}


PARAMS = {"w": jnp.asarray([0.3, -1.0, 2.0])}


@pytest.mark.parametrize("parts", [1, 4, 24])
def test_split_rows_deals_them_out_and_join_rows_collects_them(batch, parts):
    split = split_rows(batch, parts)
    assert split["x"].shape == (parts, ROWS // parts, 3)
    for j in range(parts):
        np.testing.assert_array_equal(split["y"][j], batch["y"][j::parts])
    jax.tree.map(np.testing.assert_array_equal, join_rows(split), batch)


def test_parts_that_do_not_divide_the_rows_are_refused(batch):
    with pytest.raises(ValueError, match=f"5 parts do not divide a batch of {ROWS} rows"):
        split_rows(batch, 5)


def test_every_part_is_spread_over_all_devices(batch, lab):
    mesh = lab.mesh_of(2, 4)
    placed = place_batch(batch, mesh)

    @jax.jit
    def split(rows):
        with use(mesh, TRAIN_RULES):
            return split_rows(rows, 3)

    parts = split(placed)
    assert tuple(parts["x"].sharding.spec) == (None, ("data", "fsdp"))
    assert {shard.data.shape for shard in parts["x"].addressable_shards} == {(3, 1, 3)}
    text = split.lower(placed).compile().as_text()
    assert not any(word in text for word in ("all-to-all", "all-gather", "collective-permute"))


@pytest.mark.parametrize("parts", [1, 4])
def test_map_rows_keeps_the_order_of_rows(batch, parts):
    result = map_rows(lambda rows: {"sum": rows["x"].sum(1), "y": rows["y"]}, batch, parts)
    np.testing.assert_array_equal(result["y"], batch["y"])
    np.testing.assert_allclose(result["sum"], batch["x"].sum(1), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("parts", [2, 8, 24])
def test_accumulated_loss_statistics_and_gradients_are_those_of_the_whole_batch(batch, parts):
    whole = jax.value_and_grad(loss, has_aux=True)(PARAMS, batch, None)
    value, stats, grads = accumulate_gradients(loss, PARAMS, batch, parts)
    np.testing.assert_allclose(value, whole[0][0], rtol=2e-6)
    np.testing.assert_allclose(stats["error"], whole[0][1]["error"], rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(grads["w"], whole[1]["w"], rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("rows", "length", "parts", "number"),
    [
        (16, 352, 1, 8),
        (16, 352, 8, 8),  # small enough as they are
        (16, 352, 2, 8),
        (6, 512, 1, 3),
        (7, 1024, 1, 7),  # 7 rows only divide into single ones
        (2, 5000, 1, 2),  # rows stay whole
        (1, 5000, 1, 1),
    ],
)
def test_a_cpu_works_on_few_tokens_at_a_time(rows, length, parts, number):
    batch = {"tokens": np.zeros((rows, length), np.int32), "scores": np.zeros(rows)}
    assert micro_batches(batch, parts) == number


def test_other_devices_work_on_as_many_tokens_as_was_asked_for(monkeypatch):
    monkeypatch.setattr(gradients, "platform", lambda: "gpu")
    assert micro_batches({"tokens": np.zeros((16, 352), np.int32)}, 1) == 1


def test_tokens_of_a_micro_batch_are_counted_per_device(lab):
    with use(lab.mesh_of(2, 4), TRAIN_RULES):
        assert micro_batches({"tokens": np.zeros((64, 512), np.int32)}, 1) == 4


def test_smaller_micro_batches_on_a_cpu_change_no_gradient(lab, monkeypatch):
    model = lab.tiny_model(lab.LLAMA)
    rows = {"tokens": np.random.default_rng(0).integers(0, model.config.vocab_size, (4, 8)).astype(np.int32)}

    def of_tokens(module, params, batch, key):
        logprobs, _ = module.apply({"params": params}, batch["tokens"], method="logprobs")
        return -jnp.sum(logprobs) / 32, jnp.sum(logprobs)

    def run(tokens):
        monkeypatch.setattr(gradients, "CPU_TOKENS", tokens)
        return jax.jit(lambda p: model_gradients(of_tokens, model.module, p, rows, 1, None)[:3])(model.params)

    whole, split = run(32), run(8)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), split, whole)


def test_every_micro_batch_has_a_key_of_its_own(batch):
    key = jax.random.key(7)
    _, stats, _ = accumulate_gradients(loss, PARAMS, batch, 4, key)
    expected = np.mean([float(jax.random.normal(k)) for k in jax.random.split(key, 4)])
    np.testing.assert_allclose(stats["noise"], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("tied", [True, False])
def test_the_gradient_of_the_head_is_never_rounded_to_the_compute_dtype(lab, tied):
    """At ZeRO stage 2, whose passes read a copy in that dtype, as at stage 3; the other leaves' copies are rounded."""
    mesh, rows = lab.mesh_of(2, 4), np.random.default_rng(0).integers(1, 32, (8, 16))

    def gradients(stage):
        options = lab.LLAMA | {"tie_word_embeddings": tied}
        model = lab.tiny_model(options, mesh=mesh, dtype=jnp.bfloat16, zero_stage=stage)

        def loss(module, params, rows, key):
            return -module.apply({"params": params}, rows, method="logprobs")[0].mean(), {}

        @jax.jit
        def step(params, rows):
            with use(mesh, TRAIN_RULES):
                return model_gradients(loss, model.module, params, rows, 1, mesh)[2]

        return step(model.params, place_batch(rows, mesh))

    two, three = gradients(2), gradients(3)
    head = (lambda grads: grads["embed"]["embedding"]) if tied else (lambda grads: grads["lm_head"]["kernel"])
    assert not is_rounded(head(two)) and not is_rounded(head(three))
    np.testing.assert_allclose(head(two), head(three), rtol=0, atol=2e-3 * np.abs(head(three)).max())
    if not tied:
        assert is_rounded(two["embed"]["embedding"])


def test_on_one_device_matrices_are_cast_once_and_gradients_are_those_of_a_cast_in_each_layer(lab):
    model = lab.tiny_model(lab.LLAMA | {"tie_word_embeddings": False}, dtype=jnp.bfloat16)
    module, rows = model.module, np.random.default_rng(0).integers(1, 32, (8, 16))
    read = working_copy(model.params, logical_axes(module), module, None, trained=True)
    held = {path: x.dtype for path, x in leaves_by_path(read).items()}
    assert held.pop("lm_head/kernel") == jnp.float32
    assert {name for name, dtype in held.items() if dtype != jnp.bfloat16} == {n for n in held if "norm" in n}

    def loss(params, rows, key):
        return -module.apply({"params": params}, rows, method="logprobs")[0].mean(), {}

    def floats(grads):
        return jax.tree.map(lambda x: x.astype(jnp.float32), grads)

    def step(params, rows):
        once = model_gradients(lambda _, *given: loss(*given), module, params, rows, 2, None).grads
        return once, accumulate_gradients(loss, params, rows, 2, pin=floats)[2]

    once, layer_by_layer = jax.jit(step)(model.params, rows)
    assert {x.dtype for x in jax.tree.leaves(once)} == {jnp.dtype("float32")}
    for x, y in zip(jax.tree.leaves(once), jax.tree.leaves(layer_by_layer), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=2**-7 * np.abs(y).max())


def is_rounded(x):
    return bool((x == x.astype(jnp.bfloat16)).all())


LENGTHS = (5, 64, 17, 33, 12, 48, 20, 9)


def test_micro_batches_that_are_cut_to_their_rows_change_no_result(lab, monkeypatch):
    model = lab.tiny_model(lab.LLAMA)
    columns = np.arange(64)[None]
    rng, lengths = np.random.default_rng(0), np.array(LENGTHS)[:, None]
    rows = {"tokens": rng.integers(0, model.config.vocab_size, (8, 64)).astype(np.int32)}
    rows |= {"mask": columns < lengths, "response": (columns < lengths) & (columns >= lengths // 2)}
    widths = []

    def passes(module, params, b):
        widths.append(b["tokens"].shape[1])
        given = b["tokens"], b["mask"], 0.7, b["response"], 32
        logprobs, entropy = actor_logprobs(module, params, *given)
        return jnp.where(b["response"], logprobs, 0), {"entropy": jnp.where(b["response"], entropy, 0)}

    def loss(module, params, b, _):
        logprobs, _ = passes(module, params, b)
        return -jnp.sum(logprobs**2) / 1000, jnp.sum(logprobs)

    @jax.jit
    def both(params, mask):
        mapped = map_rows(partial(passes, model.module, params), rows, 1, mask)
        return mapped, model_gradients(loss, model.module, params, rows, 1, None, mask=mask)[:3]

    whole = both(model.params, None)
    monkeypatch.setattr(narrowing, "WORTH", 0)
    monkeypatch.setattr(gradients, "CPU_TOKENS", 128)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), both(model.params, rows["mask"]), whole)
    assert set(widths) == {32, 48, 64}


def test_rows_of_similar_length_share_a_micro_batch():
    mask = np.arange(64) < np.array(LENGTHS)[:, None]
    parts = split_rows(mask.sum(1)[order_by_length(mask, 4)], 4)
    assert parts.tolist() == [[5, 9], [12, 17], [20, 33], [48, 64]]


def test_small_models_are_not_cut_as_that_compiles_every_width(lab):
    mask = np.ones((8, 64), bool)
    config = lab.tiny_model(lab.LLAMA).config
    assert worth_cutting(mask, config) is None and worth_cutting(None, config) is None
    smol = replace(config, num_layers=30, hidden_size=576, intermediate_size=1536, vocab_size=49152, embed_size=576)
    assert worth_cutting(mask, smol) is mask, "2 · 135M · 512 operations"


@pytest.mark.parametrize(
    ("columns", "widths"), [(16, [16]), (40, [32, 40]), (64, [32, 48, 64]), (352, [96, 176, 272, 352])]
)
def test_rows_are_cut_to_a_few_widths_and_small_ones_to_fewer(columns, widths):
    assert widths_of(columns) == widths
