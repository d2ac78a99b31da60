"""The programs that `jaxrlhf bench` runs: prompts, batches, and attention as the model has it; and their rates."""

import json

import jax
import numpy as np
import pytest

from jaxrlhf.bench import ours
from jaxrlhf.bench.command import batches
from jaxrlhf.bench.iteration import rates, ratios
from jaxrlhf.bench.settings import BenchConfig
from jaxrlhf.models import Decoder, config_from_dict
from jaxrlhf.plan import roofline

SHAPE = {"model_type": "opt", "vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
SHAPE |= {"ffn_dim": 64, "max_position_embeddings": 64, "word_embed_proj_dim": 32}
LOCAL = {"model_type": "gpt_neo", "vocab_size": 96, "hidden_size": 32, "num_layers": 2, "num_heads": 2}
LOCAL |= {"attention_types": [[["global", "local"], 1]], "window_size": 3, "max_position_embeddings": 64}


def test_every_row_of_a_batch_has_a_prompt(monkeypatch):
    config = BenchConfig.create(batch=(2048,), prompt=5)
    prompts = ours.random_prompts(config, 96, 2048)
    assert prompts.shape == (2048, 5) and prompts.dtype == np.int32
    np.testing.assert_array_equal(ours.random_prompts(config, 96, 3), prompts[:3])
    assert ours.random_prompts(BenchConfig.create(batch=(4,), max_batch=2, prompt=5), 96, 4).shape == (4, 5)
    whole = {"mesh_data": 1, "mesh_fsdp": 1, "mesh_tensor": 8}
    assert batches(BenchConfig.create(max_batch=2, **whole)) == [2] and batches(
        BenchConfig.create(max_batch=2, batch=(4,))
    ) == [4]
    assert batches(BenchConfig.create(max_batch=2)) == [8], "one row for each device"
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert batches(BenchConfig.create(max_batch=40)) == [8, 16, 32]


def test_log_probs_are_measured_with_the_head_that_training_reads(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(SHAPE))
    config = BenchConfig.create(actor=str(tmp_path), dtype="bfloat16", prompt=4, answer=4)
    for run, _ in ours.logprobs_runs(config, 8).values():
        assert [x.dtype.name for x in run.args] == ["bfloat16", "float32"]


def test_rates_are_by_the_median_and_ratios_by_the_minima():
    peaks = roofline.Peaks(flops=100.0, bandwidth=10.0)
    done = rates((roofline.Cost(200.0, 5.0),), [4.0, 8.0, 16.0], rows=2, tokens=3, peaks=peaks)
    assert done["roofline_fraction"] == 0.25 and done["tokens_per_second"] == 0.75
    assert ratios([3.0, 4.0, 9.0], [2.0, 2.0, 1.0])["ratio"] == 3.0


def _by_hand(q, k, v, scale, window, slopes):
    """Causal attention in float64, one query after the other."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out = np.zeros_like(q)
    for row, head, t in np.ndindex(*q.shape[:3]):
        first = max(0, t + 1 - window) if window else 0
        scores = scale * k[row, head, first : t + 1] @ q[row, head, t] + slopes[head] * np.arange(first, t + 1)
        weights = np.exp(scores - scores.max())
        out[row, head, t] = weights @ v[row, head, first : t + 1] / weights.sum()
    return out


BLOOM = {"model_type": "bloom", "vocab_size": 96, "hidden_size": 32, "n_layer": 2, "n_head": 2}
EXPECTED = {  # of each kind of layer: scale, window, slopes
    "opt": (SHAPE, {"": (16**-0.5, 0, (0, 0))}),
    "bloom": (BLOOM, {"": (16**-0.5, 0, (2**-4, 2**-8))}),
    "gpt_neo": (LOCAL, {"": (1.0, 0, (0, 0)), " (window 3)": (1.0, 3, (0, 0))}),
}


@pytest.mark.parametrize("family", sorted(EXPECTED))
def test_attention_is_measured_with_the_models_slopes_windows_and_scale(family, tmp_path):
    shape, kinds = EXPECTED[family]
    (tmp_path / "config.json").write_text(json.dumps(shape))
    config = BenchConfig.create(actor=str(tmp_path), critic=str(tmp_path), prompt=4, answer=3)
    runs = ours.attention_runs(config, 2)
    assert list(runs) == [part + kind for kind in kinds for part in ("forward", "train")]
    for kind, (scale, window, slopes) in kinds.items():
        run, done = runs[f"forward{kind}"]
        np.testing.assert_allclose(run(), _by_hand(*run.args[:3], scale, window, slopes), rtol=1e-5, atol=1e-6)
        pairs = sum(min(t, window or t) for t in range(1, 8))
        (forward,), (gradients,) = done, runs[f"train{kind}"][1]
        assert forward.flops == 4 * 2 * pairs * 32 and gradients.flops == 3 * forward.flops


@pytest.mark.parametrize(
    ("asked", "ran"), [("auto", "xla"), ("xla", "xla"), ("pallas", "pallas"), ("cudnn", "xla"), ("tokamax", "xla")]
)
def test_decoding_says_which_attention_it_ran(asked, ran):
    module = Decoder(config_from_dict(BLOOM), head="lm", dtype=np.float32, attention_implementation=asked)
    assert ours.decode_kernel(module) == ran


@pytest.mark.parametrize(("shape", "plain"), [(SHAPE, True), (LOCAL, False)])
def test_kernels_that_want_plain_numbers_get_them_where_layers_are_alike(shape, plain, monkeypatch, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(shape))
    seen = []
    monkeypatch.setattr(ours, "attend_to_sequence", lambda q, *rest: (seen.append(rest[-1]), q)[1])
    options = {"attention_implementation": "cudnn", "prompt": 4, "answer": 3}
    config = BenchConfig.create(actor=str(tmp_path), critic=str(tmp_path), **options)
    for run, _ in ours.attention_runs(config, 2).values():
        run()
    for options in seen:
        assert options.implementation == "cudnn"
        assert isinstance(options.scale, float) == isinstance(options.window, int) == plain
