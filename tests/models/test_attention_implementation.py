"""Whole models under each `attention_implementation`: the same tokens, on one device and on a mesh; what is refused."""

import logging
import sys
from dataclasses import dataclass
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lab import few

from jaxrlhf import cli
from jaxrlhf.config import Settings
from jaxrlhf.engine import HybridEngine, SamplingConfig
from jaxrlhf.errors import InputError
from jaxrlhf.kernels import choice
from jaxrlhf.models import create_model, decode_step, generation_view, init_cache, prefill, with_kernels
from jaxrlhf.sharding import TRAIN_RULES, make_mesh, platform, use

PROMPT, STEPS = 6, 5
DECODED = ("gpt2", "bloom", "llama", "gpt_neo", "mistral", "gemma3")


def greedy(model, ids, mask):
    """Greedy answers `[B, STEPS]` and the logits that each token was read from, decoded token by token."""
    module = model.module

    @jax.jit
    def run(params, ids, mask):
        view = generation_view(params, module)
        caches = init_cache(module, len(ids), PROMPT + STEPS)
        logits, caches = prefill(module, view, ids, mask, caches)

        def step(carry, column):
            logits, caches = carry
            token = logits.argmax(-1)
            after, caches = decode_step(module, view, token, column, (mask == 0).sum(1), caches)
            return (after, caches), (token, logits)

        return jax.lax.scan(step, (logits, caches), PROMPT + jnp.arange(STEPS))[1]

    return (np.asarray(x) for x in run(model.params, ids[:, :PROMPT], mask[:, :PROMPT]))


@pytest.mark.parametrize("case", few(DECODED, ("bloom", "gemma3")))
def test_greedy_answers_of_the_decode_kernel_are_those_of_xla(case, make_model, make_batch):
    model = make_model(case)
    batch = make_batch("left", model.config.vocab_size)
    tokens, logits = greedy(with_kernels(model, attention_implementation="xla"), *batch)
    ours, our_logits = greedy(with_kernels(model, attention_implementation="pallas"), *batch)
    np.testing.assert_array_equal(ours, tokens)
    real = np.s_[..., : model.config.vocab_size]
    assert np.abs(our_logits - logits)[real].max() < 1e-5 * np.abs(logits[real]).max()


@pytest.mark.parametrize("case", few(["llama-tied-mqa", "bloom", "olmo2", "gemma2"], ["llama-tied-mqa"]))
def test_generation_on_a_mesh_is_that_of_one_device(case, make_model, make_batch):
    four_heads = {"num_heads": 4, "num_kv_heads": 4, "head_dim": 6} if case == "bloom" else {}
    kernel = "auto" if case == "gemma2" else "pallas"  # which has no soft-capping
    model = with_kernels(make_model(case, **four_heads), attention_implementation=kernel)
    ids, mask = (np.concatenate([x, x[:1]])[:, :PROMPT] for x in make_batch("left", model.config.vocab_size))
    sampling = SamplingConfig(max_new_tokens=STEPS, temperature=0.0)
    rollouts = [
        HybridEngine(model, mesh, 2 if mesh else None).generate(ids, mask, jax.random.key(0), sampling)
        for mesh in (None, make_mesh(2, 2, 2))
    ]
    np.testing.assert_array_equal(*(np.asarray(rollout.tokens) for rollout in rollouts))
    np.testing.assert_allclose(*(np.asarray(rollout.logprobs) for rollout in rollouts), rtol=0, atol=1e-5)


def test_unknown_and_unfit_implementations_are_refused(make_model, make_batch, monkeypatch):
    model = make_model("llama")
    with pytest.raises(InputError, match=r"attention_implementation='fast' is not one of 'auto', 'xla', .*'cudnn'"):
        with_kernels(model, attention_implementation="fast")
    monkeypatch.setattr(jax, "default_backend", lambda: "rocm")
    with pytest.raises(InputError, match=r"attention_implementation: .*'pallas'.* not on rocm; take 'xla'"):
        greedy(with_kernels(model, attention_implementation="pallas"), *make_batch("left", model.config.vocab_size))


@pytest.mark.parametrize("name", ["pallas", "cudnn", "tokamax"])
def test_named_kernels_without_soft_capping_are_refused(name, make_model, make_batch):
    model = with_kernels(make_model("gemma2"), attention_implementation=name)
    message = f"attention_implementation: implementation='{name}' of flash_attention has no soft-capping: take 'xla'"
    with pytest.raises(InputError, match=message):
        model.module.apply({"params": model.params}, *make_batch("right", model.config.vocab_size))


def test_the_decode_kernel_refuses_soft_capping_too(make_model, make_batch):
    model = with_kernels(make_model("gemma2"), attention_implementation="pallas")
    with pytest.raises(InputError, match="of prefill_attention has no soft-capping: take 'xla' or 'auto'"):
        greedy(model, *make_batch("left", model.config.vocab_size))


def loss_and_gradients(model, ids, mask, mesh=None):
    """A loss over the real columns' logits, the logits there, and the gradients of all parameters."""
    module = model.module

    @jax.jit
    def run(params, ids, mask):
        def loss(params):
            with use(mesh, TRAIN_RULES):
                logits = module.apply({"params": params}, ids, mask, contiguous=True)
            chosen = jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), ids[:, 1:, None], axis=-1)[..., 0]
            weights = mask[:, 1:] * mask[:, :-1]
            return -(chosen * weights).sum() / weights.sum(), logits * mask[..., None]

        return jax.value_and_grad(loss, has_aux=True)(params)

    (loss, logits), gradients = run(model.params, jnp.asarray(ids), jnp.asarray(mask))
    return float(loss), np.asarray(logits), gradients


def assert_same(ours, theirs):
    assert abs(ours[0] - theirs[0]) < 1e-5 * abs(theirs[0])
    np.testing.assert_allclose(ours[1], theirs[1], rtol=0, atol=1e-5 * np.abs(theirs[1]).max())
    largest = max(np.abs(x).max() for x in jax.tree.leaves(theirs[2]))
    for a, b in zip(jax.tree.leaves(ours[2]), jax.tree.leaves(theirs[2]), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * largest)


@pytest.mark.parametrize("case", ["gpt_neo", "bloom", "llama-tied-mqa", "gemma3"])
def test_logits_and_gradients_of_the_training_kernel_are_those_of_xla(case, make_model, make_batch):
    model = make_model(case)
    for side in ("left", "right") if case == "bloom" else ("right",):
        batch = make_batch(side, model.config.vocab_size)
        results = [
            loss_and_gradients(with_kernels(model, attention_implementation=name), *batch) for name in ("pallas", "xla")
        ]
        assert_same(*results)


@pytest.mark.parametrize("implementation", ["pallas", "tokamax"])
def test_rematerialised_training_on_a_mesh_is_that_of_xla_on_one_device(make_model, make_batch, implementation):
    if implementation == "tokamax":
        pytest.importorskip("tokamax")
    model = with_kernels(make_model("llama"), attention_implementation=implementation)
    ids, mask = (np.concatenate([x, x[:1]]) for x in make_batch("right", model.config.vocab_size))
    again = model.replace(module=model.module.clone(remat="full"))
    expected = loss_and_gradients(with_kernels(model, attention_implementation="xla"), ids, mask)
    assert_same(loss_and_gradients(again, ids, mask, make_mesh(2, 2, 2)), expected)


@pytest.mark.parametrize("case", few(["gpt_neo", "bloom", "llama-tied-mqa", "olmo3", "gemma2"], ["bloom", "gemma2"]))
@pytest.mark.parametrize("shape", [None, (2, 2, 2)], ids=["one device", "mesh"])
def test_on_a_cpu_auto_goes_head_by_head_with_the_results_of_xla(case, shape, make_model, make_batch):
    heads = {"num_heads": 4, "num_kv_heads": 4, "head_dim": 6} if case == "bloom" else {}
    model = make_model(case, **heads)
    assert model.module.attention_implementation == "auto"
    for side in ("left", "right"):
        batch = [np.concatenate([x, x[:1]]) for x in make_batch(side, model.config.vocab_size)]
        mesh = make_mesh(*shape) if shape else None
        expected = loss_and_gradients(with_kernels(model, attention_implementation="xla"), *batch)
        assert_same(loss_and_gradients(model, *batch, mesh), expected)


def test_the_platform_of_the_mesh_decides_and_not_the_host(make_model, make_batch, monkeypatch):
    """A program compiled on a CPU for a GPU that is not there must not get the CPU's form."""
    model = make_model("gpt2")
    batch = make_batch("right", model.config.vocab_size)

    def loops(module):
        trace = jax.make_jaxpr(lambda *x: module.apply({"params": model.params}, *x))(*batch)
        return str(trace).count("scan[")

    assert loops(model.module) == 2 * loops(with_kernels(model, attention_implementation="xla").module)
    assert platform() == "cpu"
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert loops(model.module) == loops(with_kernels(model, attention_implementation="xla").module)
    with use(make_mesh(1, 1, 1, devices=jax.devices()[:1]), TRAIN_RULES):
        assert platform() == "cpu"


def test_what_remat_keeps_on_a_cpu_holds_no_scores(make_model):
    """The policies that keep projections would keep products of single heads as well."""
    module = make_model("gpt2").module
    ids = jnp.zeros((2, 23), int)
    params = jax.eval_shape(lambda: module.init(jax.random.key(0), ids))["params"]

    def kept(remat):
        one = module.clone(remat=remat)
        residuals = jax.eval_shape(lambda p: jax.vjp(lambda p: one.apply({"params": p}, ids), p)[1], params)
        return [x.shape for x in jax.tree.leaves(residuals)]

    for remat in ("none", "dots", "full"):
        assert not [shape for shape in kept(remat) if shape[-2:] == (23, 23) and len(shape) > 2], remat


@pytest.fixture
def cudnn(monkeypatch):
    """A GPU that is not there, on which cuDNN was measured to be fastest in training; what it is called with."""
    calls, plain = [], jax.nn.dot_product_attention

    def through_xla(query, *arrays, implementation, **options):
        calls.append((implementation, options["scale"]))
        return plain(query, *arrays, **options, implementation="xla")

    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax.nn, "dot_product_attention", through_xla)
    row = choice.Measured("flash_attention", "bfloat16", (8,), "cudnn", "for this test", "cpu", alibi=False)
    monkeypatch.setattr(choice, "MEASURED", (row,))
    return calls


def half(model, implementation):
    model = with_kernels(model, attention_implementation=implementation)
    return model.replace(module=model.module.clone(dtype=jnp.bfloat16))


def test_a_library_measured_for_training_is_autos_choice_there_and_never_where_a_cache_is_written(
    make_model, make_batch, cudnn
):
    model = make_model("gpt2", num_heads=3, num_kv_heads=3, head_dim=8)
    batch = make_batch("right", model.config.vocab_size)
    ours, theirs = (loss_and_gradients(half(model, name), *batch) for name in ("auto", "xla"))
    asked = len(cudnn)
    assert set(cudnn) == {("cudnn", 8**-0.5)}
    assert np.isfinite(ours[1]).all() and np.abs(ours[1] - theirs[1]).max() < 2**-6 * np.abs(theirs[1]).max()
    left = make_batch("left", model.config.vocab_size)
    for ours, theirs in zip(*(greedy(half(model, name), *left) for name in ("auto", "xla")), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert len(cudnn) == asked


def test_where_layers_differ_auto_takes_no_library(make_model, make_batch, cudnn):
    model = make_model("gpt_neo", num_heads=3, num_kv_heads=3, head_dim=8)
    batch = make_batch("right", model.config.vocab_size)
    ours, theirs = (loss_and_gradients(half(model, name), *batch) for name in ("auto", "xla"))
    np.testing.assert_array_equal(ours[1], theirs[1])
    assert not cudnn


def test_for_packed_rows_auto_takes_no_library_and_a_named_one_is_refused(make_model, make_batch, cudnn):
    model = make_model("gpt2", num_heads=3, num_kv_heads=3, head_dim=8)
    ids, mask = make_batch("right", model.config.vocab_size)
    segments = mask * np.where(np.arange(ids.shape[1]) < 3, 1, 2)

    def logits(name):
        module = half(model, name).module
        run = jax.jit(lambda *batch: module.apply({"params": model.params}, *batch, contiguous=True))
        return np.asarray(run(ids, mask, segments))

    np.testing.assert_array_equal(logits("auto"), logits("xla"))
    assert not cudnn
    for name in ("cudnn", "tokamax"):
        message = f"attention_implementation: implementation='{name}' of flash_attention cannot see the segments of "
        with pytest.raises(InputError, match=message + "packed rows: take 'xla' or 'pallas', or set packing: false"):
            logits(name)


def test_a_mask_that_may_have_holes_reaches_no_such_kernel_by_itself(make_model, make_batch, cudnn):
    model = make_model("gpt2", num_heads=3, num_kv_heads=3, head_dim=8)
    ids, mask = make_batch("right", model.config.vocab_size)
    mask[0, 3] = 0
    ours, theirs = (half(model, name).module.apply({"params": model.params}, ids, mask) for name in ("auto", "xla"))
    np.testing.assert_array_equal(ours, theirs)
    assert not cudnn


@pytest.mark.parametrize("kernel", ["prefill_attention", "decode_attention"])
def test_no_row_can_say_that_a_library_serves_generation(kernel):
    for name in ("cudnn", "tokamax"):
        with pytest.raises(ValueError, match=rf"'{name}' of a row for {kernel} is not one of 'xla', 'pallas'"):
            choice.Measured(kernel, "bfloat16", (64,), name, "for this test", "A100", alibi=False)


@dataclass(frozen=True)
class NoSettings(Settings):
    """Of a command without any."""


def test_kernels_are_told_with_verbose_alone_and_each_choice_once(make_model, make_batch, monkeypatch, capsys):
    config = make_model("gpt2").config

    def work(_):
        model = create_model(config, key=jax.random.key(0))
        ids, mask = make_batch("left", model.config.vocab_size)
        greedy(model, ids, mask)
        model.module.apply({"params": model.params}, ids, mask, method="logprobs")

    monkeypatch.setitem(sys.modules, "made_up", SimpleNamespace(NoSettings=NoSettings, work=work))
    monkeypatch.setitem(cli.OTHERS, "made-up", cli.Command("made_up", "NoSettings", "work", "for this test", False))
    slow = "head by head: a CPU is slow at batched small products"
    nothing = "xla: no evidence on cpu for this dtype, head size and mask"
    chosen = [
        f"kernel prefill_attention: {slow}",
        f"kernel decode_attention (float32, head size {config.head_dim}): {nothing}",
        f"kernel flash_attention: {slow}",
        f"kernel token_logprobs (float32, width {config.hidden_size}): {nothing}",
    ]
    for words, told in (([], []), (["--verbose"], chosen)):
        choice.log_once.cache_clear()
        monkeypatch.setattr(logging.getLogger(), "handlers", [])
        assert cli.main([*words, "made-up"]) == 0
        assert capsys.readouterr().err.splitlines() == told


def test_a_row_with_a_hole_is_marked_and_the_others_are_right(make_model, make_batch):
    model = make_model("bloom")
    ids, mask = make_batch("right", model.config.vocab_size)
    mask[0, 3] = 0
    ours, theirs = (
        np.asarray(with_kernels(model, attention_implementation=name).module.apply({"params": model.params}, ids, mask))
        for name in ("pallas", "xla")
    )
    assert np.isnan(ours[0]).all()
    np.testing.assert_allclose(ours[1:], theirs[1:], rtol=0, atol=1e-5 * np.abs(theirs).max())


def test_dropout_and_cudnn_on_cpu_are_refused(make_model, make_batch):
    model = make_model("gpt2", attention_dropout=0.1)
    ids, mask = make_batch("right", model.config.vocab_size)
    for name, message in (
        ("pallas", r"attention_implementation='pallas' has no dropout, but attention_dropout=0.1"),
        ("cudnn", r"attention_implementation='cudnn' has no dropout"),
        ("tokamax", r"attention_implementation='tokamax' has no dropout"),
    ):
        module = with_kernels(model, attention_implementation=name).module
        with pytest.raises(InputError, match=message):
            module.apply({"params": model.params}, ids, mask, rngs={"dropout": jax.random.key(0)})
    with pytest.raises(InputError, match=r"attention_implementation: .*'cudnn'.* not on cpu"):
        with_kernels(model, attention_implementation="cudnn").module.apply({"params": model.params}, ids, mask)


@pytest.mark.parametrize("implementation", ["cudnn", "tokamax"])
def test_with_a_library_generation_is_that_of_auto(make_model, make_batch, implementation):
    model = make_model("gpt2")
    batch = make_batch("left", model.config.vocab_size)
    for ours, theirs in zip(
        *(greedy(with_kernels(model, attention_implementation=name), *batch) for name in (implementation, "auto")),
        strict=True,
    ):
        np.testing.assert_array_equal(ours, theirs)
