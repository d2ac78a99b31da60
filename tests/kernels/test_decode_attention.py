"""Decode attention against a float64 oracle; what it reads and writes; what it refuses; what compilers make of it."""

import sys
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled_kernels import HEAD_SIZES, TARGETS, decode_case

from jaxrlhf.kernels import (
    append_attention,
    choice,
    choose,
    decode_attention,
    decode_tpu,
    flash_attention,
    live_attention,
    live_blocks,
    pallas,
    token_logprobs,
)
from jaxrlhf.kernels.decode_attention import DecodeBlocks, decode_blocks
from jaxrlhf.kernels.flash_attention import FlashBlocks
from jaxrlhf.kernels.kv_cache import KV_CACHE_DTYPES, quantise
from jaxrlhf.kernels.logprobs_kernel import HeadBlocks

# B, H, H_kv, S, D, window, ALiBi, columns per step, splits
PROBLEMS = [
    (4, 3, 3, 37, 64, 0, False, 16, 1),
    (5, 4, 2, 50, 80, 0, True, 16, 3),
    (4, 8, 1, 33, 96, 9, False, 32, 2),
    (6, 6, 2, 70, 16, 20, True, 16, 4),
    (4, 40, 2, 16, 10, 1, False, 16, 1),
    (4, 2, 2, 130, 128, 0, True, 64, 2),
    (3, 2, 1, 20, 256, 0, False, 16, 2),
]
ids = ["-".join(map(str, problem)) for problem in PROBLEMS]


def oracle(query, key, value, start, length, scale, window=0, slopes=None):
    """Row by row in float64."""
    output = np.zeros(query.shape)
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    group = query.shape[1] // key.shape[1]
    for b, h in np.ndindex(*query.shape[:2]):
        columns = np.arange(max(start[b], length[b] - window if window else 0), length[b])
        if not len(columns):
            continue
        scores = key[b, h // group, columns] @ query[b, h] * scale
        if slopes is not None:
            scores += np.float64(slopes[h]) * (columns - start[b])
        weights = np.exp(scores - scores.max())
        output[b, h] = weights / weights.sum() @ value[b, h // group, columns]
    return output


def make(problem, dtype=jnp.float32):
    """Arrays of a problem: rows of no, of one, of all and of random live columns; and what is dead, as a mask."""
    batch, heads, kv_heads, size, width, window, alibi, columns, splits = problem
    rng = np.random.default_rng(size)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)  # noqa: E731
    arrays = draw(batch, heads, width), draw(batch, kv_heads, size, width), draw(batch, kv_heads, size, width)
    length = np.concatenate([[0, 1, size], rng.integers(1, size, batch - 3)]).astype(np.int32)
    start = np.array([0, 0, 0, *(rng.integers(0, n) for n in length[3:])], np.int32)
    slopes = jnp.asarray(rng.random(heads), jnp.float32) if alibi else None
    first = np.maximum(start, length - window) if window else start
    dead = (np.arange(size) < first[:, None]) | (np.arange(size) >= length[:, None])
    options = {"scale": 0.3, "window": window, "alibi_slopes": slopes}
    return (*arrays, start, length), options, dead[:, None, :, None], DecodeBlocks(columns, splits, num_stages=1)


@pytest.mark.parametrize("problem", PROBLEMS, ids=ids)
def test_both_forms_equal_the_oracle_and_the_kernel_never_sees_dead_columns(problem):
    (query, key, value, start, length), options, dead, blocks = make(problem)
    expected = oracle(query, key, value, start, length, *options.values())
    plain = decode_attention(query, key, value, start, length, **options, implementation="xla")
    np.testing.assert_allclose(plain, expected, rtol=0, atol=1e-5)
    assert dead.any() and not expected[0].any()
    key, value = (jnp.where(dead, jnp.nan, x) for x in (key, value))
    kernel = jax.jit(lambda *x: decode_attention(*x, **options, implementation="pallas", blocks=blocks))
    # The interpreter hands out outputs full of NaN, so an element that is not written shows.
    np.testing.assert_allclose(kernel(query, key, value, start, length), expected, rtol=0, atol=1e-5)


def stored(key, value, name):
    """A cache by the name of its dtype, and the float64 keys and values that it stands for."""
    if name == "auto":
        return (key, value), (key, value)
    parts = [quantise(x, KV_CACHE_DTYPES[name]) for x in (key, value)]
    cache = tuple(x for x, _ in parts) + tuple(scale for _, scale in parts)
    numbers = [x.view(jnp.float8_e4m3fn) if name == "fp8" else x for x in map(np.asarray, cache[:2])]
    return cache, [
        x.astype(np.float64) * np.asarray(scale)[..., None] for x, scale in zip(numbers, cache[2:], strict=True)
    ]


def poisoned(cache, dead):
    """With NaN wherever columns are dead; in int8, where there is none, in scales alone."""
    dead = np.broadcast_to(dead, cache[0].shape)
    ill = lambda x: {"int8": 127, "uint8": 0x7F}.get(x.dtype.name, jnp.nan)  # noqa: E731
    return tuple(jnp.where(dead if x.ndim == 4 else dead[..., 0], jnp.asarray(ill(x), x.dtype), x) for x in cache)


def newest(key, value, length):
    at = np.maximum(length, 1) - 1
    return (jnp.asarray(x)[np.arange(len(at)), :, at] for x in (key, value))


@pytest.mark.parametrize("form", ["xla", "pallas", "tpu"])
@pytest.mark.parametrize("name", KV_CACHE_DTYPES)
@pytest.mark.parametrize("problem", [PROBLEMS[1], PROBLEMS[3]], ids=[ids[1], ids[3]])
def test_the_newest_entry_is_appended_and_seen_in_a_cache_of_any_dtype(problem, name, form, request):
    (query, key, value, start, length), options, dead, blocks = make(problem)
    cache, meant = stored(key, value, name)
    expected = oracle(query, *meant, start, length, *options.values())
    column = np.maximum(length, 1) - 1
    at = (np.arange(len(length)), slice(None), column)
    before = poisoned(cache, dead) if form != "xla" else cache
    before = tuple(x.at[at].set(jnp.asarray(3).astype(x.dtype)) for x in before)
    if form == "tpu":
        request.getfixturevalue("through_mosaic")
    options |= {"implementation": "xla" if form == "xla" else "pallas", "blocks": blocks}
    call = jax.jit(lambda *x: append_attention(*x, **options))
    got, after = call(query, *newest(key, value, length), before, start, length)
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5)
    assert [x.dtype for x in after] == [x.dtype for x in before]
    for new, old, right in zip(after, before, cache, strict=True):
        new, old, right = (np.asarray(x, np.float32) for x in (new, old, right))
        np.testing.assert_array_equal(new[at][length > 0], right[at][length > 0])
        untouched = (np.arange(new.shape[2]) != column[:, None])[:, None]
        untouched = np.broadcast_to(untouched if new.ndim == 3 else untouched[..., None], new.shape)
        np.testing.assert_array_equal(new[untouched], old[untouched])


def in_blocks_of_16(monkeypatch):
    for name in ("WHOLE", "COLUMNS"):
        monkeypatch.setattr(live_blocks, name, 16)


@pytest.mark.parametrize("whole", [False, True], ids=["blocks", "whole"])
@pytest.mark.parametrize("name", KV_CACHE_DTYPES)
@pytest.mark.parametrize("problem", PROBLEMS, ids=ids)
def test_the_form_for_cpus_equals_the_oracle_in_a_cache_of_any_dtype(problem, name, whole, monkeypatch):
    (query, key, value, start, length), options, _, _ = make(problem)
    cache, meant = stored(key, value, name)
    if not whole:
        in_blocks_of_16(monkeypatch)
    got = live_attention(query, cache, start, length, **options)
    np.testing.assert_allclose(got, oracle(query, *meant, start, length, *options.values()), rtol=0, atol=1e-5)


def test_blocks_cap_scores_as_all_columns_at_once_do(monkeypatch):
    in_blocks_of_16(monkeypatch)
    (query, key, value, start, length), options, _, _ = make(PROBLEMS[3])
    capped = options | {"softcap": 0.5}
    got = live_attention(query, (key, value), start, length, **capped)
    expected = decode_attention(query, key, value, start, length, **capped, implementation="xla")
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5)


def test_blocks_beyond_a_row_change_no_bit_of_it(monkeypatch):
    in_blocks_of_16(monkeypatch)
    (query, key, value, _, _), options, _, _ = make(PROBLEMS[3])
    start, alone, among = np.zeros(6, np.int32), np.full(6, 21, np.int32), np.array([21, 70, 60, 50, 40, 30], np.int32)
    rows = [live_attention(query, (key, value), start, length, **options)[0] for length in (alone, among)]
    np.testing.assert_array_equal(*rows)


@pytest.mark.parametrize("problem", PROBLEMS, ids=ids)
def test_the_form_for_tpus_equals_the_oracle(problem, monkeypatch, through_mosaic):
    (query, key, value, start, length), options, dead, _ = make(problem)
    expected = oracle(query, key, value, start, length, *options.values())
    monkeypatch.setattr(decode_tpu, "COLUMNS", 32)
    key, value = (jnp.where(dead, jnp.nan, x) for x in (key, value))
    got = jax.jit(lambda *x: decode_attention(*x, **options, implementation="pallas"))(query, key, value, start, length)
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("problem", [PROBLEMS[0], PROBLEMS[1]], ids=ids[:2])
def test_bfloat16_is_right_to_its_rounding(problem):
    arrays, options, _, blocks = make(problem, jnp.bfloat16)
    got = decode_attention(*arrays, **options, implementation="pallas", blocks=blocks)
    expected = oracle(*arrays, *options.values())
    assert got.dtype == jnp.bfloat16
    # Half a step of the result, and half a step of each weight: at most 2⁻⁹ of the largest value twice.
    assert np.abs(np.asarray(got, np.float64) - expected).max() < 2**-8 * np.abs(np.asarray(arrays[2], "f4")).max()


def test_a_cache_in_bfloat16_gives_the_float32_of_its_query_in_either_form():
    (query, key, value, start, length), options, _, blocks = make(PROBLEMS[1])
    key, value = (x.astype(jnp.bfloat16) for x in (key, value))
    expected = oracle(query, *(x.astype(jnp.float32) for x in (key, value)), start, length, *options.values())
    for implementation in ("xla", "pallas"):
        options |= {"implementation": implementation, "blocks": blocks}
        got = decode_attention(query, key, value, start, length, **options)
        assert got.dtype == jnp.float32
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5)


def test_the_interpreter_hands_out_outputs_full_of_nan():
    shape = jax.ShapeDtypeStruct((4,), jnp.float32)
    spec = pallas.pl.BlockSpec((4,), lambda i: (0,))
    options = {"grid": (1,), "in_specs": [spec], "out_specs": spec, "out_shape": shape}
    got = pallas.launch(lambda i, o: None, [jnp.ones(4)], **options, num_warps=1, num_stages=1, interpret=True)
    assert np.isnan(got).all()


def test_large_scores_neither_overflow_nor_lose_the_winner():
    (query, key, value, start, length), options, _, blocks = make(PROBLEMS[1])
    arrays = query * 1e4, key * 1e4, value, start, length
    got = decode_attention(*arrays, **options, implementation="pallas", blocks=blocks)
    np.testing.assert_allclose(got, oracle(*arrays, *options.values()), rtol=0, atol=1e-5)


def test_alibi_keeps_its_digits_in_a_long_cache():
    problem = (4, 2, 2, 4000, 16, 0, True, 128, 2)
    arrays, options, _, blocks = make(problem)
    expected = oracle(*arrays, *options.values())
    for implementation in ("xla", "pallas"):
        got = decode_attention(*arrays, **options, implementation=implementation, blocks=blocks)
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5)


def shapes(
    query=(2, 4, 64), key=(2, 2, 32, 64), value=None, start=(2,), length=(2,), dtype=jnp.float32, query_dtype=None
):
    make = lambda shape, dtype=jnp.int32: jnp.zeros(shape, dtype)  # noqa: E731
    return make(query, query_dtype or dtype), make(key, dtype), make(value or key, dtype), make(start), make(length)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"query": (2, 4, 1, 64)}, r"query \[B, H, D\].*found \(2, 4, 1, 64\), \(2, 2, 32, 64\)"),
        ({"value": (2, 2, 31, 64)}, r"found .*\(2, 2, 31, 64\)"),
        ({"query": (2, 3, 64)}, r"\(2, 3, 64\) does not fit key \(2, 2, 32, 64\)"),
        ({"query": (2, 4, 32)}, r"\(2, 4, 32\) does not fit key"),
        ({"length": (3,)}, r"length has shape \(3,\).*must be \(2,\)"),
        ({"query": (2, 4, 320), "key": (2, 2, 32, 320)}, r"up to 256 in float32.*found 320 in float32: take 'xla'"),
        ({"dtype": jnp.float64}, r"found 64 in float64"),
        ({"query_dtype": jnp.int32}, r"found 64 in int32 with a cache of float32: take 'xla'"),
        ({"dtype": jnp.float8_e4m3fn, "query_dtype": jnp.float32}, r"in float32 with a cache of float8_e4m3fn: take"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(arrays, message):
    with jax.enable_x64(True), pytest.raises(ValueError, match=message):
        decode_attention(*shapes(**arrays), scale=1.0, implementation="pallas")


@pytest.mark.parametrize("columns", [8, 24])
def test_blocks_that_the_hardware_cannot_hold_are_refused(columns):
    with pytest.raises(ValueError, match=rf"columns={columns} of DecodeBlocks must be a power of two of at least 16"):
        DecodeBlocks(columns, 1)
    with pytest.raises(ValueError, match="splits=0"):
        DecodeBlocks(16, 0)


@pytest.mark.parametrize(
    "make", [partial(DecodeBlocks, 16, 1), partial(FlashBlocks, 16, 16), partial(HeadBlocks, 16, 16, 16)]
)
def test_warps_and_stages_that_do_not_exist_are_refused(make):
    name = type(make()).__name__
    for warps in (0, 3, 64):
        with pytest.raises(ValueError, match=rf"num_warps={warps} of {name} must be a power of two of at most 32"):
            make(num_warps=warps)
    for stages in (0, -5):
        with pytest.raises(ValueError, match=rf"num_stages={stages} of {name} must be at least 1"):
            make(num_stages=stages)


def test_float16_on_a_tpu_is_refused_by_name(monkeypatch):
    """Mosaic ends with an error of its own there."""
    query, key, _, start, length = shapes(dtype=jnp.float16)
    sequence, head = jnp.zeros((2, 2, 16, 64), jnp.float16), jnp.zeros((32, 64))
    ours = {"implementation": "pallas"}
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    for name, call in (
        ("decode", lambda: decode_attention(query, key, key, start, length, scale=1.0, **ours)),
        ("decode", lambda: decode_attention(query.astype("f4"), key, key, start, length, scale=1.0, **ours)),
        ("flash", lambda: flash_attention(sequence, sequence, sequence, start, length, scale=1.0, **ours)),
        ("token", lambda: token_logprobs(sequence[0], head, jnp.zeros((2, 16), int), vocab_size=32, **ours)),
    ):
        with pytest.raises(ValueError, match=rf"of {name}.* float32, bfloat16 on TPUs; found .*float16: take 'xla'"):
            call()


def test_blocks_beyond_the_shared_memory_are_refused_by_name():
    with pytest.raises(ValueError, match=r"columns=1024, .*needs 1536 KiB of shared memory, .* 163 KiB on A100"):
        decode_attention(*shapes(), scale=1.0, implementation="pallas", blocks=DecodeBlocks(1024, 1))
    blocks = (FlashBlocks(256, 256),) * 2
    with pytest.raises(ValueError, match=r"flash_attention with FlashBlocks\(queries=256.*fewer num_stages, or take"):
        sequence = jnp.zeros((1, 1, 16, 64))
        row = jnp.zeros(1, jnp.int32)
        flash_attention(sequence, sequence, sequence, row, row, scale=1.0, implementation="pallas", blocks=blocks)


@pytest.mark.parametrize("cache", [{"dtype": jnp.int8}, {"scales": (jnp.zeros((2, 2, 32)),) * 2}])
def test_eight_bits_go_with_scales_and_others_without(cache):
    query, key, _, *rest = shapes()
    key = key.astype(cache.get("dtype", key.dtype))
    with pytest.raises(ValueError, match=r"int8 and uint8 \(float8_e4m3fn\) go with a key and a value scale"):
        decode_attention(query, key, key, *rest, scale=1.0, scales=cache.get("scales"))


@pytest.mark.parametrize("device", pallas.DEVICES.values(), ids=pallas.DEVICES)
def test_blocks_fit_the_device_and_fill_it(device):
    for width in (16, 64, 80, 128, 256):
        for dtype in (jnp.bfloat16, jnp.float32):
            row = pallas.power_of_two(width) * jnp.dtype(dtype).itemsize
            full, few = (decode_blocks(width, dtype, programs=n, cache_length=8192, device=device) for n in (4096, 8))
            assert 2 * row * full.columns * (full.num_stages + 1) <= device.shared_memory
            assert full.splits == 1 and few.splits * 8 >= device.multiprocessors
            assert decode_blocks(width, dtype, programs=8, cache_length=40, device=device).splits <= 2


@pytest.mark.parametrize(
    ("kind", "capability", "multiprocessors", "kib"),
    [
        ("NVIDIA A100-SXM4-80GB", "8.0", 108, 163),
        ("NVIDIA H200", "9.0", 132, 227),
        ("NVIDIA GH200 480GB", "9.0", 78, 227),
        ("NVIDIA GeForce RTX 4090", "8.9", 128, 99),
        ("NVIDIA RTX A6000", "8.6", 84, 99),
        ("NVIDIA RTX 6000 Ada Generation", "8.9", 20, 99),
        ("NVIDIA RTX A1000", "8.6", 16, 99),
        ("NVIDIA A30", "8.0", 56, 163),
        ("NVIDIA L40S", "8.9", 142, 99),
        ("NVIDIA B200", "10.0", 148, 227),
    ],
)
def test_a_device_has_its_own_limits_or_the_least_of_its_compute_capability(
    kind, capability, multiprocessors, kib, monkeypatch
):
    device = SimpleNamespace(platform="gpu", device_kind=kind, compute_capability=capability)
    monkeypatch.setattr(jax, "devices", lambda: [device])
    assert pallas.device()[1:] == (multiprocessors, kib * 1024)
    with pytest.raises(ValueError, match=rf"needs 1536 KiB of shared memory, but a block has {kib} KiB on "):
        pallas.check_shared_memory("decode_attention", DecodeBlocks(1024, 1), 1536 * 1024)


def test_a_device_of_which_nothing_is_known_is_refused_by_name(monkeypatch):
    device = SimpleNamespace(platform="gpu", device_kind="NVIDIA Tesla K80", compute_capability="3.7")
    monkeypatch.setattr(jax, "devices", lambda: [device])
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert choose("flash_attention", "auto", dtype=jnp.bfloat16, head_dim=64, alibi=False) == "xla"
    with pytest.raises(ValueError, match=r"'pallas' knows no limits of NVIDIA Tesla K80 with compute capability 3.7"):
        choose("flash_attention", "pallas", dtype=jnp.bfloat16, head_dim=64, alibi=False)


def test_auto_means_xla_without_evidence(monkeypatch):
    query = {"dtype": jnp.bfloat16, "head_dim": 64, "alibi": False}
    assert choose("decode_attention", "auto", **query) == "xla" and not choice.MEASURED
    row = choice.Measured("decode_attention", "bfloat16", (64,), "pallas", "for this test", "cpu", alibi=False)
    monkeypatch.setattr(choice, "MEASURED", (row,))
    assert choose("decode_attention", "auto", **query) == "pallas"
    for other in ({"head_dim": 80}, {"alibi": True}, {"dtype": jnp.float32}):
        assert choose("decode_attention", "auto", **query | other) == "xla"
    assert choice.decide("decode_attention", "auto", **query).reason == "for this test"
    library = choice.Measured("flash_attention", "bfloat16", (64,), "tokamax", "for this test", "cpu", alibi=False)
    monkeypatch.setattr(choice, "MEASURED", (library,))
    monkeypatch.setitem(sys.modules, "tokamax", None)
    assert choose("flash_attention", "auto", **query) == "xla", "where the library is not installed"
    with pytest.raises(ValueError, match=r"implementation='fast' of decode_attention is not one of 'auto', 'xla'"):
        choose("decode_attention", "fast", **query)
    monkeypatch.setattr(jax, "default_backend", lambda: "rocm")
    with pytest.raises(ValueError, match=r"'pallas' of decode_attention runs on CPU, NVIDIA and TPU, not on rocm"):
        choose("decode_attention", "pallas", **query)


@pytest.mark.parametrize("capability", ["8.0", "9.0"])
def test_compiled_evidence_names_our_kernels_and_a_measurement_overrules_it(monkeypatch, capability):
    device = SimpleNamespace(platform="gpu", device_kind="NVIDIA A100-SXM4-80GB", compute_capability=capability)
    query = {"dtype": jnp.bfloat16, "head_dim": 64, "alibi": True, "device": device}
    attention = ("flash_attention", "prefill_attention", "decode_attention")
    assert {choice.choose(kernel, "auto", **query) for kernel in attention} == {"pallas"}
    assert choose("token_logprobs", "auto", **query) == "xla"
    others = {"dtype": jnp.float32}, {"head_dim": 72}, {"holes": True}, {"softcap": True}
    for other in (*others, {"device": SimpleNamespace(platform="gpu", device_kind="T4", compute_capability="7.5")}):
        assert choose("flash_attention", "auto", **query | other) == "xla", other
    row = choice.Measured("flash_attention", "bfloat16", (64,), "xla", "for this test", "A100", alibi=True)
    monkeypatch.setattr(choice, "MEASURED", (row,))
    assert [choose(kernel, "auto", **query) for kernel in attention] == ["xla", "pallas", "pallas"]


def test_without_the_triton_lowering_it_warns_once_and_runs_as_xla(monkeypatch):
    monkeypatch.setattr(pallas, "triton", None)
    pallas.available.cache_clear()
    arrays, options, _, _ = make(PROBLEMS[0])
    with pytest.warns(RuntimeWarning, match="no Triton lowering") as caught:
        got = [decode_attention(*arrays, **options, implementation="pallas") for _ in range(2)]
    pallas.available.cache_clear()
    assert len(caught) == 1
    np.testing.assert_array_equal(got[1], decode_attention(*arrays, **options, implementation="xla"))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("width", HEAD_SIZES)
def test_it_compiles_without_spills_and_writes_the_cache_in_place(target, width, compile_for):
    single = (jnp.float32, "int8", False) if width == 64 else (jnp.float32, "auto", True)
    half = ("auto", True), ("int8" if width % 128 else "fp8", width != 80)
    for dtype, kv, alibi in (*((jnp.bfloat16, *rest) for rest in half), single):
        attend, shapes, donated, blocks = decode_case(width, target, dtype, kv, alibi)
        program, kernels = compile_for(target, attend, *shapes, donate_argnums=donated)
        memory = program.memory_analysis()
        cache = sum(x.size * x.dtype.itemsize for x in shapes[3])
        if target == "v5e":
            assert "decode_attention_share" in program.as_text() and memory.alias_size_in_bytes >= cache
            continue
        registers, spilled = kernels["decode_attention_share"]
        assert spilled == 0 and registers < 255, (dtype, kv, alibi)
        assert memory.alias_size_in_bytes == cache
        assert memory.temp_size_in_bytes < 2 * (blocks.splits + 2) * shapes[0].size * 4 + 2**16


def test_the_choice_and_its_reason_are_said_once_for_each_shape(caplog):
    choice.log_once.cache_clear()
    with caplog.at_level("INFO", logger="jaxrlhf.kernels"):
        for width in (64, 64, 80):
            choose("decode_attention", "auto", dtype=jnp.bfloat16, head_dim=width, alibi=width == 80)
        choose("token_logprobs", "pallas", dtype=jnp.float32, head_dim=768, alibi=False)
    nothing = "xla: no evidence on cpu for this dtype, head size and mask"
    assert caplog.messages == [
        f"kernel decode_attention (bfloat16, head size 64): {nothing}",
        f"kernel decode_attention (bfloat16, head size 80, ALiBi): {nothing}",
        "kernel token_logprobs (float32, width 768): pallas: asked for",
    ]
