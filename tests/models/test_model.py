"""The model object: log-probs without full logits, padding of the vocabulary, heads, dropout, remat, creation."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf.errors import InputError
from jaxrlhf.models import (
    LoRAConfig,
    config_from_dict,
    count_params,
    create_model,
    frozen_stage,
    model_from_overrides,
    resize_vocabulary,
    with_head,
)
from jaxrlhf.sharding import make_mesh


def apply(model, *args, **kwargs):
    return jax.jit(partial(model.module.apply, **kwargs))({"params": model.params}, *args)


@pytest.mark.parametrize(
    ("case_name", "temperature"),
    [("gpt2", 1.0), ("opt-350m", 0.7), ("llama", 1.7), ("granite", 0.7), ("cohere2", 1.0), ("gemma2", 0.7)],
)
def test_logprobs_and_entropy_are_those_of_the_logits(make_model, make_batch, case_name, temperature):
    model = make_model(case_name)
    if case_name == "gemma2":
        model = make_model(case_name, logit_scale=0.6)  # scale and soft-cap together
    ids, mask = (jnp.asarray(x, jnp.int32) for x in make_batch("right", model.config.vocab_size))

    def from_logits(params):
        logits = model.module.apply({"params": params}, ids, mask)[:, :-1] / temperature
        logp = jax.nn.log_softmax(logits)
        picked = jnp.take_along_axis(logp, ids[:, 1:, None], -1)[..., 0]
        return picked, -(jnp.exp(logp) * logp).sum(-1)

    def direct(params):
        return model.module.apply({"params": params}, ids, mask, temperature, method="logprobs")

    weights = np.random.default_rng(1).normal(size=(2, 3, 10)).astype(np.float32)

    def run(function, cut):
        def total(params):
            outputs = [x[:, cut:] for x in function(params)]
            return sum((w * x).sum() for w, x in zip(weights, outputs, strict=True)), function(params)

        return jax.jit(jax.grad(total, has_aux=True))(model.params)

    (got, (logprobs, entropy)), (want, expected) = run(direct, 1), run(from_logits, 0)
    assert logprobs.shape == entropy.shape == ids.shape
    assert not logprobs[:, 0].any() and not entropy[:, 0].any()
    np.testing.assert_allclose(logprobs[:, 1:], expected[0], rtol=0, atol=1e-5)
    np.testing.assert_allclose(entropy[:, 1:], expected[1], rtol=0, atol=1e-5)
    largest = max(np.abs(x).max() for x in jax.tree.leaves(want))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert np.abs(a - b).max() < 1e-5 * largest


def test_logprobs_of_a_window_are_those_of_all_columns_and_gradients_likewise(make_model, make_batch):
    """Windows of 4 columns: in the middle, at the left edge, and one that the row ends before."""
    model = make_model("llama")
    ids, mask = (jnp.asarray(x, jnp.int32) for x in make_batch("right", model.config.vocab_size))
    length, count = ids.shape[1], 4
    first = np.clip([5, 0, 9], 1, length - count)
    inside = (np.arange(length) >= first[:, None]) & (np.arange(length) < first[:, None] + count)
    weights = np.random.default_rng(1).normal(size=(2, *ids.shape)).astype(np.float32)

    def run(*window):
        def total(params):
            outputs = model.module.apply({"params": params}, ids, mask, 0.7, *window, method="logprobs")
            return sum((w * jnp.where(inside, x, 0)).sum() for w, x in zip(weights, outputs, strict=True)), outputs

        return jax.jit(jax.grad(total, has_aux=True))(model.params)

    (got, outputs), (want, expected) = run(jnp.array([5, 0, 9]), count), run()
    for x, y in zip(outputs, expected, strict=True):
        np.testing.assert_allclose(x, np.where(inside, y, 0), rtol=0, atol=1e-5)
    largest = max(np.abs(x).max() for x in jax.tree.leaves(want))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert np.abs(a - b).max() < 1e-5 * largest
    whole = apply(model, ids, mask, start=jnp.array([5, 0, 9]), count=99, temperature=0.7, method="logprobs")
    np.testing.assert_allclose(whole, expected, rtol=0, atol=1e-5)


def test_rows_that_pad_the_vocabulary_never_get_probability_or_gradient(make_model, make_batch):
    model = make_model("gpt2")
    config = model.config
    assert config.padded_vocab_size == 104 > config.vocab_size == 101
    loud = model.params["embed"]["embedding"].at[101:].set(50.0)
    model.params["embed"]["embedding"] = loud
    ids, mask = make_batch("right", config.vocab_size)
    logits = apply(model, ids, mask)
    assert logits.shape == (3, 11, 101)
    hidden = apply(model, ids, mask, method="hidden_states")
    padded = apply(model, hidden, method="padded_logits")
    assert padded.shape == (3, 11, 104) and (padded[..., 101:] <= -1e29).all()
    assert not jax.nn.softmax(padded)[..., 101:].any()
    np.testing.assert_array_equal(padded[..., :101], logits)

    def loss(params):
        logprobs, entropy = model.module.apply({"params": params}, ids, mask, method="logprobs")
        return (logprobs + entropy).sum()

    assert not jax.jit(jax.grad(loss))(model.params)["embed"]["embedding"][101:].any()


@pytest.mark.parametrize(
    ("case_name", "policy"), [("llama", "full"), ("llama", "dots"), ("gemma2", "full"), ("olmo3", "dots")]
)
def test_remat_changes_neither_values_nor_gradients(case_name, policy, make_model, make_batch):
    model = make_model(case_name)
    ids, mask = make_batch("right", model.config.vocab_size)

    def run(module):
        loss = lambda p: (module.apply({"params": p}, ids, mask, method="logprobs")[0] * mask).sum()  # noqa: E731
        return jax.jit(jax.value_and_grad(loss))(model.params)

    plain, remat = run(model.module), run(model.module.clone(remat=policy))
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(remat), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_dropout_acts_only_with_a_key_and_differs_between_layers_and_keys(make_model, make_batch):
    ids, mask = make_batch("right", 101)
    for rate in ("embed_dropout", "attention_dropout", "residual_dropout"):
        rates = {"embed_dropout": 0.0, "attention_dropout": 0.0, "residual_dropout": 0.0} | {rate: 0.5}
        model = make_model("gpt2", **rates)
        plain = apply(model, ids, mask)

        @jax.jit
        def dropped(key, model=model):
            return model.module.apply({"params": model.params}, ids, mask, rngs={"dropout": key})

        first, again, other = (dropped(jax.random.key(k)) for k in (0, 0, 1))
        np.testing.assert_array_equal(first, again)
        assert jnp.abs(first - other).max() > 1e-2, rate
        assert jnp.abs(first - plain).max() > 1e-2, rate


def test_a_new_head_keeps_the_body_and_the_placement(make_model):
    mesh = make_mesh(fsdp=8)
    config = make_model("gpt2").config.replace(hidden_size=32, num_heads=4, num_kv_heads=4, head_dim=8)
    model = create_model(config, mesh=mesh, key=jax.random.key(0))
    reward = with_head(model, "scalar", jax.random.key(1))
    assert reward.module.head == "scalar"
    assert set(reward.params) == (set(model.params) - {"lm_head"}) | {"score"}
    assert reward.params["layers"]["mlp"]["up"]["kernel"] is model.params["layers"]["mlp"]["up"]["kernel"]
    score = reward.params["score"]["kernel"]
    assert score.shape == (32,) and score.sharding.mesh == mesh
    assert apply(reward, jnp.ones((8, 5), jnp.int32)).shape == (8, 5)
    back = with_head(reward, "lm", jax.random.key(1))
    assert jax.tree.structure(back.params) == jax.tree.structure(model.params)


def test_a_fresh_scalar_head_has_the_documented_variance(make_model):
    config = make_model("llama").config.replace(hidden_size=4096, num_layers=1, intermediate_size=8)
    score = create_model(config, head="scalar", key=jax.random.key(2)).params["score"]["kernel"]
    assert float(score.std()) == pytest.approx((4096 + 1) ** -0.5, rel=0.05)


def test_created_parameters_do_not_depend_on_the_mesh(make_model):
    config = make_model("gpt2").config.replace(hidden_size=32, num_heads=4, num_kv_heads=4, head_dim=8)
    alone = create_model(config, key=jax.random.key(4))
    meshed = create_model(config, key=jax.random.key(4), mesh=make_mesh(data=2, fsdp=2, tensor=2))
    for a, b in zip(jax.tree.leaves(alone.params), jax.tree.leaves(meshed.params), strict=True):
        np.testing.assert_array_equal(a, b)


def test_model_from_option_names():
    overrides = {"vocab_size": 64, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 16}
    model = model_from_overrides("gpt2", overrides)
    body = 64 * 16 + 16 * 16 + 2 * (12 * 16 * 16 + 13 * 16) + 2 * 16
    assert count_params(model.params) == body
    with pytest.raises(InputError, match=r"--model_type gpt2: option 'n_head' is missing"):
        model_from_overrides("gpt2", {k: v for k, v in overrides.items() if k != "n_head"})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_kv_heads": 3}, "3 key/value heads do not divide 4 heads"),
        ({"num_layers": 0}, "num_layers must be at least 1, got 0"),
        ({"activation": "tanh"}, "activation='tanh' is not one of"),
        ({"windows": (1,)}, "1 windows for 2 layers"),
    ],
)
def test_impossible_configs_are_refused(make_model, changes, message):
    config = make_model("llama").config
    with pytest.raises(InputError, match=message):
        config.replace(**changes)


def test_unknown_head_is_refused(make_model):
    with pytest.raises(InputError, match="head='value' is not one of"):
        create_model(make_model("gpt2").config, head="value")


def test_token_ids_absent_and_null_follow_transformers():
    llama = {"model_type": "llama", "vocab_size": 32, "hidden_size": 8, "num_hidden_layers": 1}
    llama |= {"num_attention_heads": 2, "intermediate_size": 8}
    assert config_from_dict(llama).eos_token_id == 2
    assert config_from_dict(llama | {"eos_token_id": None}).eos_token_id is None
    assert config_from_dict(llama | {"eos_token_id": [3, 4]}).eos_token_id == (3, 4)


@pytest.mark.parametrize("sizes", [None, (2, 2, 2)])
@pytest.mark.parametrize("tied", [True, False])
def test_added_tokens_get_mean_rows_and_change_nothing_else(sizes, tied):
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    options = {"vocab_size": 21, "tie_word_embeddings": tied, "initializer_range": 0.5, **shape}
    mesh = None if sizes is None else make_mesh(*sizes)
    model = model_from_overrides("llama", options, mesh=mesh, key=jax.random.key(3))
    grown = resize_vocabulary(model, 27)

    tables = [("embed", "embedding")] if tied else [("embed", "embedding"), ("lm_head", "kernel")]
    for module, leaf in tables:
        old, new = (np.asarray(m.params[module][leaf]) for m in (model, grown))
        assert old.shape == (24, 16) and new.shape == (32, 16)
        np.testing.assert_array_equal(new[:21], old[:21])
        np.testing.assert_allclose(new[21:27], np.tile(old[:21].mean(0), (6, 1)), rtol=1e-6, atol=1e-6)
        np.testing.assert_array_equal(new[27:], 0)
    ids = np.arange(12, dtype=np.int32).reshape(2, 6)
    before, after = apply(model, ids), apply(grown, ids)
    assert after.shape == (2, 6, 27)
    np.testing.assert_allclose(after[..., :21], before, rtol=1e-5, atol=1e-5)
    with pytest.raises(InputError, match="vocab_size=20 is below the model's 21"):
        resize_vocabulary(model, 20)


def test_remat_policies_keep_less_and_less(make_model):
    """What the forward pass keeps for the backward one, in elements."""
    from jax._src.ad_checkpoint import saved_residuals  # public only as a function that prints

    model = make_model("llama")
    ids = jnp.ones((2, 16), jnp.int32)

    def kept(policy):
        module = model.module.clone(remat=policy)
        residuals = saved_residuals(lambda p: module.apply({"params": p}, ids).sum(), model.params)
        return sum(aval.size for aval, source in residuals if "argument" not in source)

    assert kept("full") < kept("dots") < kept("none")


@pytest.mark.parametrize(("name", "value"), [("remat", "some"), ("zero_stage", 4), ("head", "both")])
def test_an_unknown_layout_or_head_is_refused_by_name(name, value, make_model):
    with pytest.raises(InputError, match=rf"{name}={value!r} is not one of"):
        create_model(make_model("gpt2").config, **{name: value})


@pytest.mark.parametrize(
    ("own", "asked", "stage"), [(0, None, 0), (1, None, 0), (2, None, 0), (3, None, 3), (3, 2, 0), (1, 3, 3), (2, 0, 0)]
)
def test_a_frozen_copy_is_split_at_stage_3_only(make_model, own, asked, stage):
    module = make_model("gpt2").module.clone(zero_stage=own)
    assert frozen_stage(module, asked) == stage
    assert frozen_stage(module.clone(lora=LoRAConfig(2)), asked) == own  # the base that adapters share lies as it does
