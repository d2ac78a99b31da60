"""Prefill and decode with the cache against the full forward pass, per family, and the flip to generation itself."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxrlhf.models import decode_step, generation_view, init_cache, prefill

PROMPT = 6


def full_and_decoded(model, ids, mask):
    """Logits of columns PROMPT-1 … T-1: of one forward pass, and of prefill with one decode step per further token."""
    module, length = model.module, ids.shape[1]

    @jax.jit
    def run(params, ids, mask):
        full = module.apply({"params": params}, ids, mask)[:, PROMPT - 1 :]
        view = generation_view(params, module, scan_prefill=True)
        start = (mask == 0).sum(1)
        caches = init_cache(module, len(ids), length)
        first, caches = prefill(module, view, ids[:, :PROMPT], mask[:, :PROMPT], caches)

        def step(caches, column):
            logits, caches = decode_step(module, view, ids[:, column], column, start, caches)
            return caches, logits

        _, rest = jax.lax.scan(step, caches, jnp.arange(PROMPT, length))
        return full, jnp.concatenate([first[:, None], rest.swapaxes(0, 1)], axis=1)

    return (np.asarray(x) for x in run(model.params, ids, mask))


def test_prefill_and_decode_equal_the_full_forward(kind, make_model, make_batch):
    model = make_model(kind)
    vocab = model.config.vocab_size
    ids, mask = make_batch("left", vocab)
    full, decoded = full_and_decoded(model, ids, mask)
    assert decoded.shape == (3, ids.shape[1] - PROMPT + 1, model.config.padded_vocab_size)
    assert np.abs(decoded[..., :vocab] - full).max() < 1e-5 * np.abs(full).max()
    assert (decoded[..., vocab:] <= -1e29).all()


def test_a_prefill_that_scans_over_layers_and_a_column_per_row_write_what_the_plain_forms_write(make_model, make_batch):
    model = make_model("mistral")
    ids, mask = make_batch("left", model.config.vocab_size)
    module = model.module
    view = generation_view(model.params, module)
    caches = init_cache(module, len(ids), 14)
    given = ids[:, :PROMPT], mask[:, :PROMPT], caches
    logits, caches = prefill(module, view, *given)
    scanned = prefill(module, generation_view(model.params, module, scan_prefill=True), *given)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=1e-6), scanned, (logits, caches))
    start = (mask == 0).sum(1)
    step = jax.jit(lambda token, column, caches: decode_step(module, view, token, column, start, caches))
    one = [caches]
    for column in range(PROMPT, 11):
        _, caches = step(ids[:, column], jnp.int32(column), one[-1])
        one.append(caches)
    # Row 0 lags two columns behind row 2: its cache is the one of two steps ago.
    behind = [
        tuple(jnp.stack([a[0], b[1], c[2]]) for a, b, c in zip(*layers, strict=True))
        for layers in zip(one[2], one[3], one[4], strict=True)
    ]
    columns = np.array([PROMPT + 2, PROMPT + 3, PROMPT + 4])
    got, caches = step(ids[np.arange(3), columns], jnp.asarray(columns), tuple(behind))
    for row, column in enumerate(columns):
        expected, after = step(ids[:, column], jnp.int32(column), one[column - PROMPT])
        np.testing.assert_allclose(got[row], expected[row], rtol=0, atol=1e-5)
        for ours, theirs in zip(jax.tree.leaves(caches), jax.tree.leaves(after), strict=True):
            np.testing.assert_allclose(ours[row], theirs[row], rtol=0, atol=1e-6)


def test_left_padding_does_not_change_a_row(make_model, make_batch):
    model = make_model("llama")
    ids, mask = make_batch("left", model.config.vocab_size)
    padded = np.asarray(jax.jit(model.module.apply)({"params": model.params}, ids, mask))
    alone = np.asarray(jax.jit(model.module.apply)({"params": model.params}, ids[:1, 4:], mask[:1, 4:]))
    np.testing.assert_allclose(padded[:1, 4:], alone, rtol=0, atol=2e-5)


def test_content_of_padding_columns_is_irrelevant(make_model, make_batch):
    model = make_model("gpt2")
    ids, mask = make_batch("right", model.config.vocab_size)
    other = np.where(mask == 0, (ids + 17) % 90, ids)
    assert (other != ids).any()
    a, b = (np.asarray(jax.jit(model.module.apply)({"params": model.params}, x, mask)) for x in (ids, other))
    np.testing.assert_array_equal(a[mask > 0], b[mask > 0])


def test_generation_view_in_bfloat16_keeps_vectors_in_float32(make_model):
    model = make_model("llama")
    view = generation_view(model.params, model.module.clone(dtype=jnp.bfloat16))
    assert len(view.layers) == model.config.num_layers
    assert view.layers[0]["attn"]["qkv"]["kernel"].dtype == jnp.bfloat16
    assert view.layers[0]["attn_norm"]["scale"].dtype == jnp.float32
    assert set(view.layers[1]["mlp"]) == {"gate_up", "down"}
    stored = (model.params["layers"]["mlp"][name]["kernel"][1].T.astype(jnp.bfloat16) for name in ("gate", "up"))
    np.testing.assert_array_equal(view.layers[1]["mlp"]["gate_up"]["kernel"], jnp.stack([*stored]))


def test_bfloat16_decode_equals_the_bfloat16_forward_within_rounding(make_model, make_batch):
    model = make_model("llama")
    model = model.replace(module=model.module.clone(dtype=jnp.bfloat16))
    full, decoded = full_and_decoded(model, *make_batch("left", model.config.vocab_size))
    assert full.dtype == decoded.dtype == np.float32
    assert np.abs(decoded[..., : full.shape[-1]] - full).max() < 2**-6 * np.abs(full).max()


def test_decode_honours_a_window_per_layer(make_model, make_batch):
    model = make_model("llama", windows=(3, 0))
    ids, mask = make_batch("left", model.config.vocab_size)
    full, decoded = full_and_decoded(model, ids, mask)
    assert np.abs(decoded[..., : full.shape[-1]] - full).max() < 1e-5 * np.abs(full).max()
    other = model.module.clone(config=model.config.replace(windows=(0, 3)))
    swapped = np.asarray(jax.jit(other.apply)({"params": model.params}, ids, mask))[:, PROMPT - 1 :]
    assert np.abs(swapped - full).max() > 1e-2
