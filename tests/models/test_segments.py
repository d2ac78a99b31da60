"""Packed rows: loss and gradients of several sequences in a row are those of one per row, whatever its neighbours."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf.errors import InputError
from jaxrlhf.models import with_kernels
from jaxrlhf.models.sequences import sequence_context
from jaxrlhf.sharding import TRAIN_RULES, make_mesh, use

LENGTHS = ((5, 3, 4), (12, 1), (2, 7), (9, 4))
"""Lengths of the sequences of each packed row. Some exceed the windows of the tiny models."""
COLUMNS = 14
KERNELS = ("gpt2", "bloom", "mistral", "gpt_neo", "llama-tied-mqa")
"""Learned positions, ALiBi, windows, windows that differ between layers, grouped keys."""


def packed(vocab):
    """ids, mask, segment ids and loss mask of packed rows, each `[B, T]`."""
    ids = np.random.default_rng(7).integers(3, vocab, (len(LENGTHS), COLUMNS))
    segments, loss_mask = np.zeros_like(ids), np.zeros_like(ids)
    for row, lengths in enumerate(LENGTHS):
        at = 0
        for i, length in enumerate(lengths):
            segments[row, at : at + length] = i + 1
            loss_mask[row, at + 1 : at + length] = 1
            at += length
    return ids, (segments > 0).astype(int), segments, loss_mask


def alone(ids, segments, loss_mask):
    """The same sequences, one per row from column 0 on: ids, mask and loss mask."""
    rows = [(row, i) for row, lengths in enumerate(LENGTHS) for i in range(1, len(lengths) + 1)]
    arrays = [np.zeros((len(rows), COLUMNS), int) for _ in range(3)]
    for n, (row, i) in enumerate(rows):
        columns = np.flatnonzero(segments[row] == i)
        for array, own in zip(arrays, (ids[row, columns], 1, loss_mask[row, columns]), strict=True):
            array[n, : len(columns)] = own
    return arrays


def loss_and_gradients(model, ids, mask, loss_mask, segments=None, mesh=None):
    """Mean loss and entropy of the tokens in `loss_mask`, the log-probs there in order, and all gradients."""
    at = np.flatnonzero(loss_mask)

    @jax.jit
    def run(params, *arrays):
        def loss(params):
            with use(mesh, TRAIN_RULES):
                given = dict(zip(("input_ids", "attention_mask", "segment_ids"), arrays, strict=False))
                logprobs, entropy = model.module.apply({"params": params}, **given, method="logprobs")
            logprobs, entropy = logprobs.reshape(-1)[at], entropy.reshape(-1)[at]
            return (entropy - logprobs).mean(), logprobs

        return jax.value_and_grad(loss, has_aux=True)(params)

    arrays = [jnp.asarray(x) for x in (ids, mask, segments) if x is not None]
    (loss, logprobs), gradients = run(model.params, *arrays)
    return float(loss), np.asarray(logprobs), gradients


def assert_same(ours, theirs):
    assert abs(ours[0] - theirs[0]) < 1e-5 * abs(theirs[0])
    np.testing.assert_allclose(ours[1], theirs[1], rtol=0, atol=1e-5 * np.abs(theirs[1]).max())
    largest = max(np.abs(x).max() for x in jax.tree.leaves(theirs[2]))
    for a, b in zip(jax.tree.leaves(ours[2]), jax.tree.leaves(theirs[2]), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * largest)


def both(model, packed_model=None, mesh=None):
    """Returns the outputs of the packed rows, and of their sequences alone."""
    ids, mask, segments, loss_mask = packed(model.config.vocab_size)
    ours = loss_and_gradients(packed_model or model, ids, mask, loss_mask, segments, mesh)
    ids, mask, loss_mask = alone(ids, segments, loss_mask)
    return ours, loss_and_gradients(model, ids, mask, loss_mask)


def test_packed_loss_and_gradients_are_those_of_the_sequences_alone(kind, make_model):
    assert_same(*both(make_model(kind)))


@pytest.mark.parametrize("implementation", ["xla", "pallas"])
@pytest.mark.parametrize("case", KERNELS)
def test_each_kernel_keeps_packed_sequences_apart(case, implementation, make_model):
    model = make_model(case)
    assert_same(*both(model, with_kernels(model, attention_implementation=implementation)))


@pytest.mark.parametrize(
    ("case", "implementation"),
    [("bloom", "auto"), ("bloom", "xla"), ("bloom", "pallas"), ("gemma2", "auto"), ("olmo3", "pallas")],
)
def test_packed_rows_on_a_mesh_with_remat_are_those_of_one_device(case, implementation, make_model):
    heads = {"num_heads": 4, "num_kv_heads": 4, "head_dim": 6} if case == "bloom" else {}
    model = make_model(case, **heads)
    kernels = with_kernels(model, attention_implementation=implementation)
    kernels = kernels.replace(module=kernels.module.clone(remat="full"))
    assert_same(*both(model, kernels, make_mesh(2, 2, 2)))


def test_rope_scaled_by_length_counts_each_segment_alone(make_model):
    scaling = (("factor", 2.0), ("rope_type", "dynamic"))
    model = make_model("llama", rope_scaling=scaling, max_positions=4)
    ours, theirs = both(model)
    assert_same(ours, theirs)
    plain = both(make_model("llama", max_positions=4))[0]
    assert np.abs(ours[1] - plain[1]).max() > 1e-3


def test_values_of_packed_rows_are_those_of_the_sequences_alone(make_model):
    model = make_model("opt", head="scalar")
    ids, mask, segments, loss_mask = packed(model.config.vocab_size)
    run = jax.jit(lambda *batch: model.module.apply({"params": model.params}, *batch))
    values = np.asarray(run(ids, mask, segments))
    np.testing.assert_array_equal(run(ids, None, segments)[mask > 0], values[mask > 0])
    ids, own_mask, _ = alone(ids, segments, loss_mask)
    np.testing.assert_allclose(values[mask > 0], np.asarray(run(ids, own_mask))[own_mask > 0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("implementation", ["auto", "xla", "pallas"])
@pytest.mark.parametrize("case", KERNELS)
def test_a_poisoned_neighbour_changes_nothing(case, implementation, make_model):
    """Other tokens with embeddings a hundred times as large: hidden states stay bit for bit, and no gradient flows."""
    model = with_kernels(make_model(case), attention_implementation=implementation)
    ids, mask, segments, _ = packed(40)
    own = segments == 2
    poison = np.where(own, ids, 50 + ids)
    weights = np.random.default_rng(1).normal(size=(*ids.shape, model.config.hidden_size)) * own[..., None]

    @jax.jit
    def run(params, ids):
        def loss(params):
            given = {"params": params}, ids, jnp.asarray(mask), jnp.asarray(segments)
            hidden = model.module.apply(*given, method="hidden_states")
            return (hidden * weights).sum(), hidden

        return jax.grad(loss, has_aux=True)(params)

    table = model.params["embed"]["embedding"]
    loud = model.params | {"embed": {"embedding": table.at[50:].multiply(100)}}
    clean, hidden = run(model.params, ids)
    poisoned, found = run(loud, poison)
    np.testing.assert_array_equal(np.asarray(found)[own], np.asarray(hidden)[own])
    largest = max(np.abs(x).max() for x in jax.tree.leaves(clean))
    for a, b in zip(jax.tree.leaves(poisoned), jax.tree.leaves(clean), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-6 * largest)
    assert not np.asarray(poisoned["embed"]["embedding"])[50:].any()
    assert np.asarray(poisoned["embed"]["embedding"])[:50].any()


def test_dropout_on_attention_keeps_packed_sequences_apart(make_model):
    model = make_model("gpt2", attention_dropout=0.3)
    ids, mask, segments, _ = packed(model.config.vocab_size)

    @jax.jit
    def hidden(ids):
        given = {"params": model.params}, ids, jnp.asarray(mask), jnp.asarray(segments)
        return model.module.apply(*given, rngs={"dropout": jax.random.key(0)}, method="hidden_states")

    own = segments == 2
    poisoned = np.where(own, ids, 3)
    np.testing.assert_array_equal(np.asarray(hidden(poisoned))[own], np.asarray(hidden(ids))[own])
    assert not np.array_equal(hidden(poisoned)[~own], hidden(ids)[~own])


def test_positions_restart_where_the_segment_changes(make_model):
    ids = jnp.asarray([[1, 1, 1, 2, 3, 3, 0, 0], [1, 1, 1, 1, 1, 1, 1, 1]])
    context = sequence_context(make_model("gpt2").config, ids > 0, ids)
    assert context.starts is not None
    np.testing.assert_array_equal(context.starts, [[0, 0, 0, 3, 4, 4, 6, 6], [0] * 8])
    np.testing.assert_array_equal(context.positions, [[0, 1, 2, 0, 0, 1, 0, 0], range(8)])


def test_segment_ids_of_another_shape_are_refused(make_model):
    model = make_model("gpt2")
    message = r"segment_ids has shape \(2, 1\); it must be that of the token ids, \(2, 5\)"
    with pytest.raises(InputError, match=message):
        model.module.apply({"params": model.params}, jnp.ones((2, 5), int), None, jnp.ones((2, 1), int))
