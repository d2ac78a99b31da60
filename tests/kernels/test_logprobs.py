"""Token log-probs, entropies and gradients against float64 numpy: blocks, padding, meshes, memory, refusals."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled_kernels import TARGETS, logprobs_case
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxrlhf.kernels import HeadPlacement, logprobs_kernel, pallas, project_logits, token_logprobs
from jaxrlhf.kernels.logprobs import LogprobBlocks, logprob_blocks
from jaxrlhf.kernels.logprobs_kernel import HeadBlocks, head_blocks
from jaxrlhf.sharding import make_mesh
from tests.support.compiled import operand_types

VOCAB, PADDED, WIDTH = 29, 32, 6
NO_PADDING = {"vocab": VOCAB, "padded": VOCAB}


def make(length=7, batch=2, vocab=VOCAB, padded=PADDED, width=WIDTH, bias=True, dtype=jnp.float32):
    """hidden, weight, bias, labels, and the upstream gradients of log-probs and entropies."""
    rng = np.random.default_rng(length)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    hidden, weight = draw(batch, length, width).astype(dtype), draw(padded, width)
    labels = jnp.asarray(rng.integers(0, vocab, (batch, length)))
    return hidden, weight, draw(padded) if bias else None, labels, draw(batch, length), draw(batch, length)


def oracle(hidden, weight, bias, labels, d_logprob, d_entropy, temperature, vocab, softcap=None):
    """Log-probs, entropies, and the gradients of hidden, weight and bias in float64."""
    hidden, weight, d_logprob, d_entropy = (np.asarray(x, np.float64) for x in (hidden, weight, d_logprob, d_entropy))
    logits = hidden @ weight[:vocab].T + (0 if bias is None else np.asarray(bias, np.float64)[:vocab])
    slope = 1.0
    if softcap is not None:
        slope = 1 - np.tanh(logits / softcap) ** 2
        logits = softcap * np.tanh(logits / softcap)
    logits /= temperature
    logp = logits - logits.max(-1, keepdims=True)
    logp -= np.log(np.exp(logp).sum(-1, keepdims=True))
    p = np.exp(logp)
    entropy = -(p * logp).sum(-1)
    onehot = np.eye(vocab)[np.asarray(labels)]
    d_logits = d_logprob[..., None] * (onehot - p) - d_entropy[..., None] * p * (logp + entropy[..., None])
    d_logits *= slope / temperature
    d_weight, d_bias = np.zeros(weight.shape), np.zeros(len(weight))
    d_weight[:vocab] = np.einsum("btv,btd->vd", d_logits, hidden)
    d_bias[:vocab] = d_logits.sum((0, 1))
    values = (logp * onehot).sum(-1), entropy, d_logits @ weight[:vocab], d_weight
    return values if bias is None else (*values, d_bias)


def run(hidden, weight, bias, labels, *upstream, vocab=VOCAB, **options):
    """The same of ours, under jit."""

    @jax.jit
    def both(hidden, weight, bias, labels, upstream):
        call = lambda *x: token_logprobs(*x[:2], labels, bias=x[2], vocab_size=vocab, **options)  # noqa: E731
        values, pull = jax.vjp(call, hidden, weight, bias)
        return *values, *(x for x in pull(upstream) if x is not None)

    return both(hidden, weight, bias, labels, upstream)


def check(got, expected, tolerance=1e-5):
    for ours, theirs in zip(got, expected, strict=True):
        assert ours.shape == theirs.shape and ours.dtype == jnp.float32
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance * max(1, np.abs(theirs).max()))


@pytest.mark.parametrize("blocks", [(1, 32), (3, 7), (5, 16), (14, 5), (64, 64), None], ids=str)
@pytest.mark.parametrize(("options", "temperature"), [({}, 0.5), ({"bias": False} | NO_PADDING, 1.0)], ids=str)
def test_values_and_gradients_equal_float64_for_any_blocks(blocks, options, temperature):
    arrays = make(**options)
    blocks = blocks and LogprobBlocks(*blocks)
    got = run(*arrays, temperature=temperature, blocks=blocks)
    check(got, oracle(*arrays, temperature, VOCAB))


@pytest.mark.parametrize("blocks", [(3, 7), None], ids=str)
@pytest.mark.parametrize("softcap", [0.7, 30.0])
def test_soft_capped_logits_equal_float64_whatever_padded_rows_hold(blocks, softcap):
    hidden, weight, bias, *rest = make()
    expected = oracle(hidden, weight, bias, *rest, 0.5, VOCAB, softcap)
    dead = np.arange(PADDED) >= VOCAB
    weight, bias = jnp.where(dead[:, None], jnp.nan, weight), jnp.where(dead, jnp.nan, bias)
    options = {"temperature": 0.5, "softcap": softcap, "blocks": blocks and LogprobBlocks(*blocks)}
    check(run(hidden, weight, bias, *rest, **options), expected)
    logits = project_logits(hidden, weight, bias, VOCAB, scale=2.0, softcap=softcap)[..., :VOCAB]
    plain = np.asarray(project_logits(hidden, weight, bias, VOCAB), np.float64)[..., :VOCAB]
    np.testing.assert_allclose(logits, softcap * np.tanh(2 * plain / softcap), rtol=1e-5, atol=1e-6)


def test_kernels_without_a_soft_cap_are_refused_by_name():
    with pytest.raises(ValueError, match="'pallas' of token_logprobs has no soft-capping: take 'xla' or 'auto'"):
        run(*make(), softcap=1.0, implementation="pallas")


@pytest.mark.parametrize("blocks", [(3, 7), None], ids=str)
def test_padded_vocabulary_rows_reach_nothing_and_get_no_gradient(blocks):
    hidden, weight, bias, *rest = make()
    expected = oracle(hidden, weight, bias, *rest, 1.0, VOCAB)
    dead = np.arange(PADDED) >= VOCAB
    weight, bias = jnp.where(dead[:, None], jnp.nan, weight), jnp.where(dead, jnp.nan, bias)
    got = run(hidden, weight, bias, *rest, blocks=blocks and LogprobBlocks(*blocks))
    check(got, expected)
    assert not np.asarray(got[3])[dead].any() and not np.asarray(got[4])[dead].any()


def test_a_tied_weight_gets_the_sum_of_both_gradients():
    _, weight, _, labels, *upstream = make(bias=False, **NO_PADDING)
    ids = (labels + 3) % VOCAB

    def both(weight):
        return token_logprobs(weight[ids], weight, labels, vocab_size=VOCAB)

    pull = jax.vjp(both, weight)[1]
    d_hidden, d_weight = oracle(weight[ids], weight, None, labels, *upstream, 1.0, VOCAB)[2:]
    np.add.at(d_weight, np.asarray(ids), d_hidden)
    check(pull(tuple(upstream)), [d_weight], 2e-5)


@pytest.mark.parametrize("on_cpu", [False, True])
def test_bfloat16_states_with_a_float32_head_are_right_to_their_rounding(on_cpu):
    hidden, weight, bias, *rest = make(dtype=jnp.bfloat16)
    got = run(hidden, weight, bias, *rest, blocks=LogprobBlocks(5, 16), on_cpu=on_cpu)
    rounded = weight.astype(jnp.bfloat16).astype(jnp.float32)
    expected = oracle(hidden, rounded, bias, *rest, 1.0, VOCAB)
    assert [x.dtype for x in got[2:]] == [jnp.bfloat16, jnp.float32, jnp.float32]
    check(got[:2], expected[:2])
    for ours, theirs in zip(got[2:], expected[2:], strict=True):  # gradients of logits are rounded to eight bits
        assert np.abs(np.asarray(ours, np.float64) - theirs).max() < 2**-7 * np.abs(theirs).max()


@pytest.mark.parametrize("temperature", [1e-3, 1e3])
def test_extreme_temperatures_stay_finite(temperature):
    hidden, weight, bias, labels, *_ = make()

    def loss(hidden):
        outputs = token_logprobs(hidden, weight, labels, vocab_size=VOCAB, bias=bias, temperature=temperature)
        return sum(x.sum() for x in outputs), outputs

    grad, (logprobs, entropy) = jax.grad(loss, has_aux=True)(hidden)
    assert np.isfinite(grad).all() and np.isfinite(logprobs).all()
    assert (np.asarray(entropy) >= -1e-6).all() and (np.asarray(entropy) <= np.log(VOCAB) + 1e-5).all()


PLACEMENTS = {
    "rows and vocabulary": {"rows": ("data", "fsdp"), "vocab": ("tensor",)},
    "stored over fsdp": {"rows": ("data", "fsdp"), "vocab": ("tensor", "fsdp")},
    "stored by width": {"rows": ("data", "fsdp"), "vocab": ("tensor",), "width": ("fsdp",)},
    "vocabulary over two axes": {"rows": ("data",), "vocab": ("tensor", "fsdp")},
    "whole rows": {"vocab": ("tensor", "fsdp")},
}


def place(arrays, placement):
    mesh, rows = placement.mesh, P(placement.rows or None)
    head = P(placement.vocab or None, placement.width or None)
    specs = (rows, head, P(placement.vocab or None), rows, rows, rows)
    return [
        None if x is None else jax.device_put(x, NamedSharding(mesh, s)) for x, s in zip(arrays, specs, strict=True)
    ]


@pytest.mark.parametrize("implementation", ["xla", "pallas"])
@pytest.mark.parametrize("name", PLACEMENTS)
def test_a_mesh_changes_nothing(name, implementation):
    """Of 8 devices; the last part of the vocabulary is padding alone where it is split in four."""
    vocab, bias = (23, True) if name != "stored by width" else (VOCAB, False)
    arrays = make(length=5, batch=4, vocab=vocab, bias=bias)
    placement = HeadPlacement(make_mesh(2, 2, 2), **PLACEMENTS[name])
    got = run(
        *place(arrays, placement), vocab=vocab, temperature=0.7, placement=placement, implementation=implementation
    )
    check(got, oracle(*arrays, 0.7, vocab))
    stored = P(placement.vocab, placement.width or None)
    assert got[3].sharding.is_equivalent_to(NamedSharding(placement.mesh, stored), 2)


def test_no_device_gathers_the_head_or_the_logits():
    """What moves is per token, but for the gradients: of hidden states over `tensor`, of the head over the batch."""
    rows, length, vocab, width = 8, 64, 4096, 16
    placement = HeadPlacement(make_mesh(2, 1, 4), rows=("data",), vocab=("tensor",))
    arrays = make(length=length, batch=rows, vocab=vocab, padded=vocab, width=width, bias=False)

    def both(hidden, weight, labels, *upstream):
        call = lambda *x: token_logprobs(*x, labels, vocab_size=vocab, placement=placement)  # noqa: E731
        values, pull = jax.vjp(call, hidden, weight)
        return values, pull(upstream)

    hidden, weight, _, labels, *upstream = place(arrays, placement)
    text = jax.jit(both).lower(hidden, weight, labels, *upstream).compile().as_text()
    assert "all-gather" not in text and "all-to-all" not in text and "all-reduce" in text
    moved = [line.split(" all-reduce")[0] for line in text.splitlines() if " all-reduce(" in line]
    sizes = sorted({int(np.prod([int(n) for n in s.split(",")])) for line in moved for s in shapes_of(line)})
    assert sizes == [rows // 2 * length, rows // 2 * length * width, vocab // 4 * width]


def test_where_the_batch_splits_what_stores_the_head_it_comes_block_by_block():
    rows, length, vocab, width = 4, 32, 16384, 8
    placement = HeadPlacement(make_mesh(1, 4, 2), rows=("fsdp",), vocab=("tensor", "fsdp"))
    arrays = make(length=length, batch=rows, vocab=vocab, padded=vocab, width=width, bias=False)
    hidden, weight, _, labels, *upstream = place(arrays, placement)

    def both(hidden, weight, labels, *upstream):
        call = lambda *x: token_logprobs(*x, labels, vocab_size=vocab, placement=placement)  # noqa: E731
        return jax.vjp(call, hidden, weight)[1](upstream)

    text = jax.jit(both).lower(hidden, weight, labels, *upstream).compile().as_text()
    gathers = [line.split(" all-gather")[0] for line in text.splitlines() if " all-gather(" in line]
    assert {shape for line in gathers for shape in shapes_of(line)} == {f"4096,{width}"}
    scattered = [line.split(" reduce-scatter")[0] for line in text.splitlines() if " reduce-scatter(" in line]
    assert {shape for line in scattered for shape in shapes_of(line)} == {f"1024,{width}"}


def shapes_of(line):
    return [part.split("]")[0] for part in line.split("f32[")[1:] if not part.startswith("]")]


@pytest.mark.parametrize("gradient", [False, True])
def test_extra_memory_is_a_twentieth_of_the_logits(gradient):
    batch, length, vocab, width = 4, 512, 8192, 64
    make = lambda *shape, dtype=jnp.float32: jax.ShapeDtypeStruct(shape, dtype)  # noqa: E731
    arrays = make(batch, length, width), make(vocab, width), make(batch, length, dtype=jnp.int32)

    def values(hidden, weight, labels):
        return token_logprobs(hidden, weight, labels, vocab_size=vocab)

    def gradients(*arrays):
        return jax.grad(lambda *x: sum(y.sum() for y in values(*x, arrays[2])), (0, 1))(*arrays[:2])

    compiled = jax.jit(gradients if gradient else values).lower(*arrays).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < batch * length * vocab * 4 / 20


@pytest.mark.parametrize("on_cpu", [False, True])
@pytest.mark.parametrize("split", [False, True])
def test_the_gradient_of_a_bfloat16_weight_is_summed_as_that_of_a_float32_one(split, on_cpu):
    """Over 512 blocks of tokens: a sum kept in bfloat16 alone would be off by many units in the last place."""
    hidden, weight, _, *rest = make(length=256, bias=False, dtype=jnp.bfloat16)
    weight, options = weight.astype(jnp.bfloat16), {"blocks": LogprobBlocks(1, 16), "on_cpu": on_cpu}
    if split:
        options["placement"] = HeadPlacement(make_mesh(2, 1, 4), rows=("data",), vocab=("tensor",))

    def gradient(weight):
        arrays = hidden, weight, None, *rest
        return run(*(place(arrays, options["placement"]) if split else arrays), **options)[3]

    got, expected = gradient(weight), gradient(weight.astype(jnp.float32))
    assert got.dtype == jnp.bfloat16
    rounding = 2**-8 * np.abs(expected) + 2**-16 * np.abs(expected).max()
    assert (np.abs(np.float32(got) - expected) < rounding).all()


def test_the_compiler_makes_no_float32_copies_for_the_gradient_of_a_head_on_a_cpu():
    hidden, weight, _, labels, *_ = make(length=64, bias=False, dtype=jnp.bfloat16)
    weight = weight.astype(jnp.bfloat16)
    if operand_types(lambda x, w: jnp.matmul(x, w.T, preferred_element_type=jnp.float32), hidden, weight) != {"bf16"}:
        pytest.skip("this XLA computes no product from bfloat16 operands")

    def loss(weight, on_cpu):
        return token_logprobs(hidden, weight, labels, vocab_size=VOCAB, on_cpu=on_cpu)[0].sum()

    for on_cpu, types in ((True, {"bf16"}), (False, {"bf16", "f32"})):
        assert operand_types(jax.grad(partial(loss, on_cpu=on_cpu)), weight) == types


@pytest.mark.parametrize(("tokens", "vocab"), [(32768, 50272), (2040, 50272), (1, 50272), (7, 29), (512, 250880)])
@pytest.mark.parametrize(("platform", "least"), [("cpu", 1 << 16), ("gpu", 1 << 24)])
def test_blocks_cover_everything_once_and_are_as_small_as_the_platform_likes(tokens, vocab, platform, least):
    blocks = logprob_blocks(tokens, vocab, platform)
    assert blocks.tokens <= tokens and blocks.vocab <= vocab
    assert blocks.tokens * blocks.vocab <= 1.1 * max(tokens * vocab / 192, least)
    assert -(-tokens // blocks.tokens) * blocks.tokens < tokens * 1.05 + 16
    count = -(-tokens // blocks.tokens) * -(-vocab // blocks.vocab)
    assert count <= 1.1 * tokens * vocab / min(least, tokens * vocab) + 1


def test_projection_hides_padded_columns_and_accumulates_in_float32():
    hidden, weight, bias, *_ = make()
    logits = project_logits(hidden, weight, bias, VOCAB)
    assert logits.shape == (2, 7, PADDED) and (logits[..., VOCAB:] == np.float32(-1e30)).all()
    np.testing.assert_allclose(logits[..., :VOCAB], hidden @ weight[:VOCAB].T + bias[:VOCAB], rtol=0, atol=3e-6)
    low = project_logits(hidden.astype(jnp.bfloat16), weight.astype(jnp.bfloat16), None, VOCAB)
    assert low.dtype == jnp.float32


STRANGE = np.array([[-1, 3, -100, VOCAB, 7], [PADDED - 1, 0, PADDED, 10**6, VOCAB - 1]])
"""Labels, and among them some that are no entries of the vocabulary: negative, of padded rows, beyond all."""


@pytest.mark.parametrize("form", ["xla", "pallas", "tpu", "mesh xla", "mesh pallas"])
def test_labels_outside_the_vocabulary_have_log_prob_0_and_no_gradient(form, request):
    """As torch's `ignore_index`; the entropy of such a token is that of any."""
    hidden, weight, bias, _, d_logprob, d_entropy = make(length=5)
    arrays = hidden, weight, bias, jnp.asarray(STRANGE, jnp.int32), d_logprob, d_entropy
    real = (STRANGE >= 0) & (STRANGE < VOCAB)
    expected = oracle(hidden, weight, bias, np.where(real, STRANGE, 0), d_logprob * real, d_entropy, 0.7, VOCAB)
    expected = np.where(real, expected[0], 0.0), *expected[1:]
    options = {"temperature": 0.7, "implementation": "xla" if "xla" in form else "pallas"}
    if form == "tpu":
        request.getfixturevalue("through_mosaic")
    if "mesh" in form:
        options["placement"] = HeadPlacement(make_mesh(2, 2, 2), rows=("data",), vocab=("tensor", "fsdp"))
        arrays = place(arrays, options["placement"])
    got = run(*arrays, **options)
    check(got, expected)
    assert not np.asarray(got[0])[~real].any() and (np.asarray(got[0])[real] < 0).all()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"hidden": jnp.zeros((7, 6))}, r"hidden \[B, T, D\] and weight \[V, D\]; found \(7, 6\) and \(32, 6\)"),
        ({"weight": jnp.zeros((32, 5))}, r"found \(2, 7, 6\) and \(32, 5\)"),
        ({"labels": jnp.zeros((2, 6), int)}, r"labels has shape \(2, 6\).*must be \(2, 7\)"),
        ({"bias": jnp.zeros(31)}, r"bias has shape \(31,\).*must be \(32,\)"),
        ({"vocab_size": 33}, r"vocab_size=33 must be between 1 and the 32 rows"),
        ({"temperature": 0.0}, r"temperature=0.0 must be positive"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(changed, message):
    hidden, weight, bias, labels, *_ = make()
    options = {"hidden": hidden, "weight": weight, "labels": labels, "bias": bias, "vocab_size": VOCAB}
    with pytest.raises(ValueError, match=message):
        token_logprobs(**options | changed)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
def test_blocks_of_the_kernel_fit_every_device(dtype):
    for device in pallas.DEVICES.values():
        assert head_blocks(4096, 2048, dtype, device).shared_memory(dtype) <= device.shared_memory, device
    assert head_blocks(4096, 2048, dtype, pallas.DEVICES["A100"]).num_stages == 3


@pytest.mark.parametrize("implementation", ["xla", "pallas"])
def test_without_tokens_there_are_no_figures_and_no_gradient(implementation):
    hidden, weight, _, labels, *_ = make()
    call = lambda w: token_logprobs(hidden[:, :0], w, labels[:, :0], vocab_size=VOCAB, implementation=implementation)  # noqa: E731
    assert [x.shape for x in call(weight)] == [(2, 0)] * 2
    assert not jax.grad(lambda w: sum(x.sum() for x in call(w)))(weight).any()


def test_blocks_of_the_kernel_are_of_no_account_to_plain_xla():
    hidden, weight, bias, labels, *_ = make()
    options = {"vocab_size": VOCAB, "bias": bias, "kernel_blocks": HeadBlocks(1024, 1024, 64)}
    plain = token_logprobs(hidden, weight, labels, **options, implementation="xla")
    assert np.isfinite(plain).all()
    with pytest.raises(ValueError, match=r"'pallas' of token_logprobs with HeadBlocks.* of shared memory.*take 'xla'"):
        token_logprobs(hidden, weight, labels, **options, implementation="pallas")


def test_blocks_and_placements_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="tokens=0 of LogprobBlocks must be at least 1"):
        LogprobBlocks(0, 4)
    mesh = make_mesh(2, 2, 2)
    with pytest.raises(ValueError, match=r"vocab=\('fsdp', 'tensor'\) .* the axes of tokens=\('fsdp',\) last"):
        HeadPlacement(mesh, rows=("fsdp",), vocab=("fsdp", "tensor"))
    with pytest.raises(ValueError, match=r"width=\('tensor',\) .* must be among tokens=\('data',\)"):
        HeadPlacement(mesh, rows=("data",), width=("tensor",))


KERNEL_BLOCKS = [None, HeadBlocks(16, 16, 16), HeadBlocks(16, 32, 16)]


@pytest.mark.parametrize("kernel_blocks", KERNEL_BLOCKS, ids=str)
@pytest.mark.parametrize(("options", "temperature"), [({}, 0.5), ({"bias": False, "width": 40} | NO_PADDING, 1.0)])
def test_the_kernel_equals_float64_and_never_sees_padded_rows(kernel_blocks, options, temperature):
    hidden, weight, bias, *rest = make(**options, length=11)
    expected = oracle(hidden, weight, bias, *rest, temperature, VOCAB)
    dead = np.arange(len(weight)) >= VOCAB
    weight, bias = jnp.where(dead[:, None], jnp.nan, weight), None if bias is None else jnp.where(dead, jnp.nan, bias)
    blocks = LogprobBlocks(9, 20)
    # The interpreter hands out outputs full of NaN, so an element that is not written shows.
    options = {"temperature": temperature, "implementation": "pallas", "blocks": blocks, "kernel_blocks": kernel_blocks}
    check(run(hidden, weight, bias, *rest, **options), expected)


@pytest.mark.parametrize("options", [{}, {"bias": False, "width": 40} | NO_PADDING])
def test_the_form_for_tpus_equals_float64(options, through_mosaic, monkeypatch):
    arrays = make(**options, length=21)
    monkeypatch.setattr(logprobs_kernel, "_tpu_blocks", lambda *_: (16, 128))
    got = run(*arrays, temperature=0.5, implementation="pallas", blocks=LogprobBlocks(33, 20))
    check(got, oracle(*arrays, 0.5, VOCAB))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("implementation", ["xla", "pallas"])
@pytest.mark.parametrize(
    ("width", "dtype", "head"),
    [(2048, jnp.bfloat16, jnp.float32), (2048, jnp.bfloat16, jnp.bfloat16), (768, jnp.float32, jnp.float32)],
    ids=["bf16", "bf16 with a bf16 head", "f32"],
)
def test_it_compiles_without_spills_and_without_logits_in_memory(
    target, implementation, width, dtype, head, compile_for
):
    """The published setting's shapes: OPT-1.3B, 64 rows of 512 tokens; training holds the head in float32."""
    tokens, vocab = 64 * 512, 50272
    run, shapes, _ = logprobs_case(width, dtype, tokens, vocab, head=head, implementation=implementation)
    program, kernels = compile_for(target, run, *shapes)
    ours = {name: statistics for name, statistics in kernels.items() if name.startswith("token_logprobs")}
    kernel = implementation == "pallas"
    assert len(ours) == (2 if kernel and target != "v5e" else 0)
    assert all(spilled == 0 for _, spilled in ours.values()), ours
    named = set(re.findall(r"token_logprobs_(forward|logit_gradient)", program.as_text()))
    assert named == ({"forward", "logit_gradient"} if kernel else set())
    assert program.memory_analysis().temp_size_in_bytes < tokens * vocab * 4 / 20
