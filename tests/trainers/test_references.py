"""Log-probs of the reference before training: what they are kept for, and when they are computed anew."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rows import pairs, write_lines

from jaxrlhf.config.files import read_jsonl
from jaxrlhf.data import demo as embedded
from jaxrlhf.data import load_data
from jaxrlhf.errors import InputError
from jaxrlhf.sharding import make_mesh
from jaxrlhf.trainers.dpo import DPOConfig, train_dpo
from jaxrlhf.trainers.pairs import SIDES, read_pairs
from jaxrlhf.trainers.references import attach, check_reference, read_logprobs, write_logprobs


@pytest.fixture(scope="module")
def tokenizer():
    return embedded.train_tokenizer(["Human: question 12 Assistant: yes no 3"] * 20, vocab_size=300)


class Reference:
    """A reference whose log-prob of a response is its ids' sum times its one weight; counts its batches."""

    def __init__(self, weight=0.5):
        self.params, self.batches = {"w": jnp.float32(weight)}, 0

    def score(self, batch):
        self.batches += 1
        assert batch["row_mask"].shape[0] == 3
        if "input_ids" in batch:
            return read_pairs(batch).sums(batch["input_ids"].astype(jnp.float32) * self.params["w"])
        return {side: (batch[f"{side}_ids"] * batch[f"{side}_loss_mask"]).sum(1) * self.params["w"] for side in SIDES}


@pytest.fixture
def attached(tmp_path, tokenizer):
    """`attached(reference, rows, **options)`: data with the log-probs, and the number of batches that it took."""
    mesh = make_mesh(devices=jax.devices()[:1])

    def start(reference, rows=None, module="module", **options):
        path = write_lines(tmp_path / "rows.jsonl", rows or pairs(10))
        options = {"data_path": path, "max_length": 64} | options
        options |= {"data_cache_dir": str(tmp_path / "cache"), "per_device_eval_batch_size": 3}
        config = DPOConfig.create(precompute_ref_log_probs=True, **options)
        data, _ = load_data(config.data, tokenizer, "dpo")
        before = reference.batches
        attach(config, data, reference.score, module, reference.params, mesh)
        return data, reference.batches - before

    return start


def expected(batch, weight=0.5):
    return {side: (batch[f"{side}_ids"] * batch[f"{side}_loss_mask"]).sum(1) * weight for side in SIDES}


def test_batches_hold_the_log_probs_of_their_rows_and_zeros_in_filler_rows(attached):
    data, batches = attached(Reference())
    assert batches == -(-len(data) // 3)
    batch = data.batch([3, -1, 0])
    for side, values in expected(batch).items():
        np.testing.assert_array_equal(batch[f"ref_{side}_logps"], values * [1, 0, 1])
        assert (batch[f"ref_{side}_logps"] > 0).tolist() == [True, False, True]


def test_packed_units_hold_those_of_each_of_their_pairs(attached):
    plain, _ = attached(Reference())
    packed, _ = attached(Reference(), packing=True)
    assert len(packed) < len(plain)
    batch = packed.batch(range(len(packed)))
    for side in SIDES:
        found = batch[f"ref_{side}_logps"]
        assert found.shape == batch["pair_mask"].shape
        all_of = plain.batch(range(len(plain)))[f"ref_{side}_logps"]
        np.testing.assert_array_equal(np.sort(found[batch["pair_mask"] == 1]), np.sort(all_of))


def test_another_run_with_the_same_data_and_model_reads_them(attached):
    reference = Reference()
    first, _ = attached(reference)
    second, batches = attached(reference)
    assert batches == 0
    for name, values in first.attached.items():
        np.testing.assert_array_equal(second.attached[name], values)


@pytest.mark.parametrize(
    "change",
    [
        {"rows": [*pairs(9), {"prompt": "question 9", "chosen": "yes 9", "rejected": "no, 9"}]},
        {"reference": Reference(0.25)},
        {"module": "module with another precision"},
        {"chat_template": "chatml"},
        {"max_length": 12},
        {"packing": True},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_change_of_rows_model_template_or_lengths_is_noticed(attached, change):
    reference = Reference()
    attached(reference)
    data, batches = attached(**{"reference": reference} | change)
    assert batches == -(-len(data) // 3)
    if "packing" not in change:
        weight = 0.25 if "reference" in change else 0.5
        batch = data.batch([0, 1])
        np.testing.assert_array_equal(batch["ref_chosen_logps"], expected(batch, weight)["chosen"])


def test_a_damaged_file_is_named(attached, tmp_path):
    reference = Reference()
    attached(reference)
    (path,) = (tmp_path / "cache").rglob("references/*")
    whole = path.read_bytes()
    for content in (b"", whole[:7], whole[:-1], whole[16:], whole[:60] + bytes([whole[60] ^ 1]) + whole[61:]):
        path.write_bytes(content)
        with pytest.raises(InputError, match=rf"{path.name}: the reference's log-probs are damaged; delete the file"):
            attached(reference)
    path.unlink()
    assert attached(reference)[1] > 0 and path.read_bytes() == whole


def test_arrays_are_read_as_they_were_written(tmp_path):
    arrays = {"chosen": np.array([[-1.5, 0.0]], np.float32), "kl": np.array([np.nan], np.float32)}
    write_logprobs(tmp_path / "a" / "file", arrays)
    found = read_logprobs(tmp_path / "a" / "file")
    assert found.keys() == arrays.keys()
    for name, values in arrays.items():
        np.testing.assert_array_equal(found[name], values)


def test_a_stream_is_refused():
    with pytest.raises(InputError, match="precompute_ref_log_probs and streaming exclude each other"):
        check_reference(DPOConfig.create(precompute_ref_log_probs=True, streaming=True))


@pytest.mark.long
@pytest.mark.parametrize("options", [{}, {"packing": True}, {"lora_r": 2}], ids=["rows", "packed", "adapters"])
def test_a_run_computes_the_same_with_log_probs_from_before_training(demo, tmp_path, monkeypatch, options):
    monkeypatch.setattr("jaxrlhf.runs.report.write_report", lambda folder: None)
    common = {"data_path": demo.train, "eval_data_path": demo.eval, "data_cache_dir": str(tmp_path / "cache")}
    common |= {"max_length": 32, "max_train_samples": 70, "max_eval_samples": 10, "model_name_or_path": demo.lm}
    common |= {"per_device_train_batch_size": 1, "per_device_eval_batch_size": 2, "max_steps": 3, "beta": 0.5}
    common |= {"learning_rate": 3e-3, "packing": False} | options
    records = {}
    for name, precompute in (("beside", False), ("before", True), ("again", True)):
        folder = tmp_path / name
        train_dpo(DPOConfig.create(**common, output_dir=str(folder), precompute_ref_log_probs=precompute))
        records[name] = [r for r in read_jsonl(folder / "metrics.jsonl") if "loss" in r or "eval/loss" in r]
        assert len(list((tmp_path / "cache").rglob("references/*"))) == (2 if precompute else 0)
    names = ("loss", "eval/loss", "rewards/margins", "eval/rewards/margins", "grad_norm")
    for name in names:
        of_run = {run: [r[name] for r in found if name in r] for run, found in records.items()}
        assert of_run["again"] == of_run["before"], "the second run reads what the first has left"
        np.testing.assert_allclose(of_run["before"], of_run["beside"], rtol=1e-4, atol=1e-5)
