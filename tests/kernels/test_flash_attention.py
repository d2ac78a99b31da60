"""Flash attention and its gradients against a float64 oracle; what it refuses; what compilers make of it."""

import re
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled_kernels import HEAD_SIZES, KERNEL_NAMES, TARGETS, flash_case

from jaxrlhf.kernels import flash_attention, flash_tpu, pallas
from jaxrlhf.kernels.flash_attention import FlashBlocks, flash_blocks

# B, H, H_kv, T, D, window, ALiBi, queries and keys per block
PROBLEMS = [
    (4, 2, 2, 37, 64, 0, False, 16, 32),
    (5, 4, 2, 50, 80, 0, True, 32, 16),
    (4, 4, 1, 33, 96, 9, False, 16, 16),
    (4, 6, 2, 70, 10, 20, True, 32, 32),
    (3, 2, 1, 16, 256, 2, False, 16, 16),
    (3, 1, 1, 65, 128, 0, True, 64, 16),
]
ids = ["-".join(map(str, problem)) for problem in PROBLEMS]


def oracle(query, key, value, upstream, start, length, scale, window, slopes):
    """Output and the gradients of query, key and value in float64, head by head."""
    arrays = [np.asarray(x, np.float64) for x in (query, key, value, upstream)]
    output, *gradients = (np.zeros(x.shape) for x in (query, *arrays[:3]))
    group = query.shape[1] // key.shape[1]
    at = np.arange(query.shape[2])
    distance = at[:, None] - at[None]
    for b, h in np.ndindex(*query.shape[:2]):
        kv = (b, h // group)
        q, k, v, g = arrays[0][b, h], arrays[1][kv], arrays[2][kv], arrays[3][b, h]
        seen = (distance >= 0) & (at >= start[b]) & (at < length[b])
        if window:
            seen &= distance < window
        scores = q @ k.T * scale - (0 if slopes is None else np.float64(slopes[h]) * distance)
        top = np.where(seen, scores, -np.inf).max(1, keepdims=True)
        weights = np.exp(np.where(seen, scores - np.where(np.isfinite(top), top, 0), -np.inf))
        weights /= np.maximum(weights.sum(1, keepdims=True), 1e-300)
        output[b, h] = weights @ v
        inner = g @ v.T
        d_scores = weights * (inner - (weights * inner).sum(1, keepdims=True)) * scale
        gradients[0][b, h] = d_scores @ k
        gradients[1][kv] += d_scores.T @ q
        gradients[2][kv] += weights.T @ g
    return output, *gradients


def make(problem, dtype=jnp.float32):
    batch, heads, kv_heads, size, width, window, alibi, queries, keys = problem
    rng = np.random.default_rng(size)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)  # noqa: E731
    arrays = draw(batch, heads, size, width), draw(batch, kv_heads, size, width), draw(batch, kv_heads, size, width)
    length = np.array([0, size, size, *rng.integers(1, size, batch)], np.int32)[:batch]
    start = np.array([0, size - 1, size // 3, *(rng.integers(0, n) for n in length[3:])], np.int32)
    slopes = jnp.asarray(rng.random(heads), jnp.float32) if alibi else None
    return arrays, draw(batch, heads, size, width), start, length, window, slopes, (FlashBlocks(queries, keys),) * 2


def value_and_gradients(implementation, arrays, upstream, start, length, window, slopes, blocks, scale=0.3):
    def run(arrays, upstream, start, length, window, scale):
        def attend(*arrays):
            options = {"scale": scale, "window": window, "alibi_slopes": slopes}
            return flash_attention(*arrays, start, length, **options, implementation=implementation, blocks=blocks)

        output, pull = jax.vjp(attend, *arrays)
        return output, *pull(upstream)

    if implementation == "tokamax":
        return jax.jit(run, static_argnums=(4, 5))(arrays, upstream, start, length, window, scale)
    # Window and scale are traced, as they are in layers that are scanned.
    return jax.jit(run)(arrays, upstream, start, length, jnp.int32(window), jnp.float32(scale))


@pytest.mark.parametrize("implementation", ["xla", "pallas", "tokamax"])
@pytest.mark.parametrize("problem", PROBLEMS, ids=ids)
def test_output_and_gradients_equal_the_oracle(problem, implementation):
    if implementation == "tokamax":
        pytest.importorskip("tokamax")
        problem = (*problem[:6], False, *problem[7:])
    arrays, upstream, start, length, window, slopes, blocks = make(problem)
    expected = oracle(*arrays, upstream, start, length, np.float32(0.3), window, slopes)
    got = value_and_gradients(implementation, arrays, upstream, start, length, window, slopes, blocks)
    for ours, theirs in zip(got, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * max(1, np.abs(theirs).max()))
        assert not np.asarray(ours)[0].any() and theirs.any()


def pack(problem):
    """`make`, with rows of several segments before their padding, and `start` `[B, T]` of each column's."""
    arrays, upstream, _, length, *rest = make(problem)
    rng, (batch, size) = np.random.default_rng(1), (problem[0], problem[3])
    start = np.zeros((batch, size), np.int32)
    for row, end in enumerate(length):
        cuts = np.unique([0, *rng.integers(0, max(end, 1), 3), end])
        start[row] = cuts[np.searchsorted(cuts, np.arange(size), side="right") - 1]
    return arrays, upstream, start, length, *rest


def oracle_of_segments(query, key, value, upstream, start, length, scale, window, slopes):
    """The oracle's results for each segment alone."""
    arrays = query, key, value, upstream
    results = [np.zeros(x.shape) for x in (query, *arrays[:3])]
    for row, end in enumerate(length):
        for begin in np.unique(start[row, :end]):
            count = (start[row, :end] == begin).sum()
            at = np.s_[row : row + 1, :, begin : begin + count]
            part = oracle(*(x[at] for x in arrays), np.zeros(1, int), [count], scale, window, slopes)
            for whole, own in zip(results, part, strict=True):
                whole[at] = own
    return results


@pytest.mark.parametrize("implementation", ["xla", "pallas"])
@pytest.mark.parametrize("problem", PROBLEMS, ids=ids)
def test_packed_rows_give_what_their_segments_give_alone(problem, implementation):
    arrays, upstream, start, length, window, slopes, blocks = pack(problem)
    expected = oracle_of_segments(*arrays, upstream, start, length, np.float32(0.3), window, slopes)
    got = value_and_gradients(implementation, arrays, upstream, start, length, window, slopes, blocks)
    for ours, theirs in zip(got, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * max(1, np.abs(theirs).max()))
        assert not np.asarray(ours)[0].any() and theirs.any()


def assert_blocks_of_other_segments_are_not_read():
    """Two segments of whole blocks: NaN in one of them stays there."""
    arrays, upstream, _, _, window, slopes, blocks = make((1, 4, 2, 128, 64, 0, True, 16, 16))
    start, length = np.repeat(np.array([[0, 64]], np.int32), 64, axis=1), np.array([128], np.int32)
    rest = start, length, window, slopes, blocks
    clean = value_and_gradients("pallas", arrays, upstream, *rest)
    for own, other in ((np.s_[..., :64, :], np.s_[..., 64:, :]), (np.s_[..., 64:, :], np.s_[..., :64, :])):
        *poisoned, loud = (x.at[other].set(jnp.nan) for x in (*arrays, upstream))
        for ours, theirs in zip(value_and_gradients("pallas", poisoned, loud, *rest), clean, strict=True):
            np.testing.assert_array_equal(ours[own], theirs[own])
            assert np.isnan(np.asarray(ours[other])).any()


def test_blocks_of_other_segments_are_not_read():
    assert_blocks_of_other_segments_are_not_read()


def test_dead_keys_neither_reach_the_result_nor_get_a_gradient():
    arrays, upstream, start, length, window, slopes, blocks = make(PROBLEMS[1])
    columns = np.arange(arrays[0].shape[2])
    dead = ((columns < start[:, None]) | (columns >= length[:, None]))[:, None, :, None]
    poisoned = arrays[0], *(jnp.where(dead, jnp.nan, x) for x in arrays[1:])
    rest = upstream, start, length, window, slopes, blocks
    clean = value_and_gradients("pallas", arrays, *rest)
    plain = value_and_gradients("pallas", (arrays[0], *(jnp.where(dead, 1e4, x) for x in arrays[1:])), *rest)
    for ours, theirs in zip(plain, clean, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert not np.where(dead, clean[2], 0).any() and not np.where(dead, clean[3], 0).any()
    # Whole blocks of dead keys are not read at all: row 1 lives on its last column alone.
    output = value_and_gradients("pallas", poisoned, *rest)[0]
    assert np.isfinite(output[1]).all()


@pytest.mark.parametrize("problem", [PROBLEMS[0], PROBLEMS[1]], ids=ids[:2])
def test_bfloat16_is_right_to_its_rounding(problem):
    arrays, upstream, start, length, window, slopes, blocks = make(problem, jnp.bfloat16)
    expected = oracle(*arrays, upstream, start, length, 0.3, window, slopes)
    got = value_and_gradients("pallas", arrays, upstream, start, length, window, slopes, blocks)
    for ours, theirs in zip(got, expected, strict=True):
        assert ours.dtype == jnp.bfloat16
        # Weights, and the results themselves, are rounded to eight bits.
        assert np.abs(np.asarray(ours, np.float64) - theirs).max() < 2**-7 * np.abs(theirs).max()


def test_large_scores_neither_overflow_nor_lose_the_winner():
    arrays, upstream, start, length, window, slopes, blocks = make(PROBLEMS[0])
    arrays = arrays[0] * 1e3, arrays[1] * 1e3, arrays[2]
    expected = oracle(*arrays, upstream, start, length, np.float32(0.3), window, slopes)
    got = value_and_gradients("pallas", arrays, upstream, start, length, window, slopes, blocks)
    np.testing.assert_allclose(got[0], expected[0], rtol=0, atol=1e-5)
    assert all(np.isfinite(x).all() for x in got)


def attend(query=(2, 4, 32, 64), key=(2, 2, 32, 64), value=None, start=(2,), dtype=jnp.float32, **options):
    make = lambda shape, dtype=jnp.int32: jnp.zeros(shape, dtype)  # noqa: E731
    arrays = make(query, dtype), make(key, dtype), make(value or key, dtype), make(start), make((2,))
    return flash_attention(*arrays, **{"scale": 1.0, "implementation": "pallas"} | options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"query": (2, 4, 64)}, r"query \[B, H, T, D\].*found \(2, 4, 64\), \(2, 2, 32, 64\)"),
        ({"key": (2, 2, 31, 64)}, r"query \(2, 4, 32, 64\) does not fit key \(2, 2, 31, 64\)"),
        ({"query": (2, 3, 32, 64)}, r"does not fit key"),
        ({"start": (3,)}, r"start has shape \(3,\).*must be \(2,\)"),
        ({"start": (2, 31)}, r"start has shape \(2, 31\).*must be \(2, 32\)"),
        (
            {"start": (2, 32), "implementation": "cudnn"},
            r"'cudnn' .* cannot see the segments .* take 'xla' or 'pallas'",
        ),
        ({"start": (2, 32), "implementation": "tokamax"}, r"'tokamax' .* cannot see .*, or set packing: false"),
        ({"query": (2, 4, 32, 320), "key": (2, 2, 32, 320)}, r"up to 256 in float32.*found 320 in float32: take 'xla'"),
        ({"implementation": "fast"}, r"implementation='fast' of flash_attention is not one of .*'cudnn'"),
        ({"implementation": "cudnn"}, r"'cudnn' of flash_attention runs on NVIDIA devices, not on cpu; take 'xla'"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        attend(**options)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"alibi_slopes": jnp.ones(4)}, "ALiBi"),
        ({"dtype": jnp.float32}, "dtype float32"),
        ({"query": (2, 4, 32, 20), "key": (2, 2, 32, 20)}, "head size 20"),
    ],
)
def test_cudnn_refuses_by_name_what_it_has_no_form_for(options, problem, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    with pytest.raises(ValueError, match=f"does not take {problem}; it takes bfloat16"):
        attend(**{"dtype": jnp.bfloat16} | options, implementation="cudnn")
    with pytest.raises(ValueError, match="does not take a scale or window that differs between layers"):
        jax.jit(lambda scale: attend(dtype=jnp.bfloat16, implementation="cudnn", scale=scale))(1.0)


def test_cudnn_gets_the_same_problem_and_its_answer_is_masked(monkeypatch):
    (query, key, value), _, start, length, window, _, _ = make(PROBLEMS[2], jnp.bfloat16)
    start = np.array([0, 3, 0, 0], np.int32)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    plain = jax.nn.dot_product_attention

    def through_xla(*arrays, implementation, **options):
        assert implementation == "cudnn"
        return plain(*arrays, **options, implementation="xla")

    monkeypatch.setattr(jax.nn, "dot_product_attention", through_xla)
    options = {"scale": 0.3, "window": window}
    got = flash_attention(query, key, value, start, length, **options, implementation="cudnn")
    expected = flash_attention(query, key, value, start, length, **options, implementation="xla")
    for row in (0, 2, 3):
        np.testing.assert_allclose(got[row].astype("f4"), expected[row].astype("f4"), rtol=0, atol=2**-6)
    assert np.isnan(got[1].astype("f4")).all()


def test_tokamax_is_asked_for_by_name_and_what_it_refuses_is_told(monkeypatch):
    asked = []

    def through_xla(*arrays, implementation, **options):
        asked.append(implementation)
        if implementation == "triton":
            raise NotImplementedError("no such thing")
        return jax.nn.dot_product_attention(*arrays, **options, implementation="xla")

    monkeypatch.setitem(sys.modules, "tokamax", SimpleNamespace(dot_product_attention=through_xla))
    (query, key, value), _, start, length, window, _, _ = make(PROBLEMS[2], jnp.bfloat16)
    options = {"scale": 0.3, "window": window}
    expected = flash_attention(query, key, value, start, length, **options, implementation="xla")
    devices = [SimpleNamespace(compute_capability=number, device_kind="GPU") for number in ("9.0", "8.0")]
    for platform, device in (("cpu", devices[0]), ("gpu", devices[0])):
        monkeypatch.setattr(jax, "default_backend", lambda platform=platform: platform)
        monkeypatch.setattr(jax, "devices", lambda device=device: [device])
        got = flash_attention(query, key, value, start, length, **options, implementation="tokamax")
        np.testing.assert_allclose(got.astype("f4"), expected.astype("f4"), rtol=0, atol=2**-6)
    monkeypatch.setattr(jax, "devices", lambda: [devices[1]])
    with pytest.raises(ValueError, match=r"its kernel 'triton' does not take head size 96 in bfloat16 .*no such thing"):
        flash_attention(query, key, value, start, length, **options, implementation="tokamax")
    assert asked == ["xla", "mosaic", "triton"]


def test_without_tokamax_the_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "tokamax", None)
    with pytest.raises(
        ValueError, match=r"needs the package tokamax .*pip install 'jaxrlhf\[tokamax\]', or take 'xla'"
    ):
        attend(implementation="tokamax")
    with pytest.raises(ValueError, match=r"'tokamax' of flash_attention does not take ALiBi; .*take 'xla' or 'pallas'"):
        attend(implementation="tokamax", alibi_slopes=jnp.ones(4))


@pytest.mark.parametrize("width", HEAD_SIZES)
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
def test_blocks_fit_every_device_and_are_the_same_where_there_is_room(width, dtype):
    for device in pallas.DEVICES.values():
        for blocks in flash_blocks(width, dtype, 1024, device):
            assert blocks.shared_memory(width, dtype) <= device.shared_memory, (device, blocks)
    a100, h200 = (flash_blocks(width, dtype, 1024, pallas.DEVICES[name]) for name in ("A100", "H200"))
    assert a100 == h200 and all(blocks.num_stages == 2 for blocks in a100)


@pytest.mark.parametrize("implementation", ["xla", "pallas"])
def test_without_tokens_there_is_nothing_to_attend_to(implementation):
    query, nobody = jnp.zeros((1, 2, 0, 16)), jnp.zeros(1, jnp.int32)
    got = flash_attention(query, query, query, nobody, nobody, scale=1.0, implementation=implementation)
    assert got.shape == query.shape


def test_arrays_of_different_dtypes_are_refused():
    query, nobody = jnp.zeros((1, 2, 16, 16)), jnp.zeros(1, jnp.int32)
    with pytest.raises(ValueError, match="have the dtypes float32, bfloat16 and float32; give all in one"):
        flash_attention(query, query.astype(jnp.bfloat16), query, nobody, nobody, scale=1.0)


def test_blocks_that_the_hardware_cannot_hold_are_refused():
    with pytest.raises(ValueError, match="queries=8 of FlashBlocks must be a power of two of at least 16"):
        FlashBlocks(8, 16)
    with pytest.raises(ValueError, match="keys=24"):
        FlashBlocks(16, 24)


COMPILED = {
    64: [(jnp.bfloat16, 1024, True, False), (jnp.bfloat16, 1000, False, False), (jnp.bfloat16, 1000, False, True)],
    80: [(jnp.bfloat16, 1024, False, False), (jnp.float32, 40, False, False), (jnp.bfloat16, 1024, False, True)],
    96: [(jnp.bfloat16, 40, True, False), (jnp.float32, 1000, False, False), (jnp.bfloat16, 40, True, True)],
    128: [(jnp.bfloat16, 1000, True, False), (jnp.float32, 40, False, False), (jnp.bfloat16, 1000, True, True)],
    256: [(jnp.bfloat16, 1000, False, False), (jnp.bfloat16, 1024, True, True)],
}
"""By head size: dtype, tokens (where no block divides them, registers are needed for masks as well), ALiBi, and
whether rows are packed."""


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("width", HEAD_SIZES)
def test_it_compiles_without_spills_and_without_scores_in_memory(target, width, compile_for):
    for dtype, size, alibi, packed in COMPILED[width]:
        run, shapes, _ = flash_case(width, dtype, alibi, size, packed)
        program, kernels = compile_for(target, run, *shapes)
        ours = {name: figures for name, figures in kernels.items() if name.startswith("flash_attention")}
        assert len(ours) == (0 if target == "v5e" else 3) and all(spilled == 0 for _, spilled in ours.values()), ours
        assert len(set(re.findall(r"flash_attention_[a-z_]+", program.as_text())) & KERNEL_NAMES) == 3
        heads = shapes[0].shape[1]
        assert size < 1000 or program.memory_analysis().temp_size_in_bytes < heads * size * size


@pytest.mark.parametrize("problem", PROBLEMS, ids=ids)
def test_the_form_for_tpus_equals_the_oracle_whatever_dead_keys_hold(problem, monkeypatch, through_mosaic):
    arrays, upstream, start, length, window, slopes, blocks = make(problem)
    expected = oracle(*arrays, upstream, start, length, np.float32(0.3), window, slopes)
    for name, size in (("QUERIES", 16), ("KEYS", 32)):
        monkeypatch.setattr(flash_tpu, name, size)
    columns = np.arange(arrays[0].shape[2])
    dead = ((columns < start[:, None]) | (columns >= length[:, None]))[:, None, :, None]
    arrays = arrays[0], *(jnp.where(dead, jnp.nan, x) for x in arrays[1:])
    got = value_and_gradients("pallas", arrays, upstream, start, length, window, slopes, blocks)
    for ours, theirs in zip(got, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * max(1, np.abs(theirs).max()))


@pytest.mark.parametrize("problem", PROBLEMS, ids=ids)
def test_the_form_for_tpus_keeps_packed_segments_apart(problem, monkeypatch, through_mosaic):
    arrays, upstream, start, length, window, slopes, blocks = pack(problem)
    expected = oracle_of_segments(*arrays, upstream, start, length, np.float32(0.3), window, slopes)
    for name, size in (("QUERIES", 16), ("KEYS", 32)):
        monkeypatch.setattr(flash_tpu, name, size)
    dead = (np.arange(arrays[0].shape[2]) >= length[:, None])[:, None, :, None]
    arrays = arrays[0], *(jnp.where(dead, jnp.nan, x) for x in arrays[1:])
    got = value_and_gradients("pallas", arrays, upstream, start, length, window, slopes, blocks)
    for ours, theirs in zip(got, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * max(1, np.abs(theirs).max()))


def test_stops_of_queries_are_the_same_mask_as_starts():
    start = pack(PROBLEMS[3])[2]
    columns = np.arange(start.shape[1])
    stops = np.asarray(flash_tpu.query_stops(jnp.asarray(start)))
    np.testing.assert_array_equal(columns[:, None] < stops[:, None], columns >= start[:, :, None])


def test_the_form_for_tpus_does_not_read_blocks_of_other_segments(monkeypatch, through_mosaic):
    for name, size in (("QUERIES", 16), ("KEYS", 32)):
        monkeypatch.setattr(flash_tpu, name, size)
    assert_blocks_of_other_segments_are_not_read()
