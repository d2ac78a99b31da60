"""KTO as a trainer: what it starts from, that it learns, its adapters, and what it refuses.

Resumption, layouts and exports are in test_trainers.py, the losses in tests/objectives.
"""

import json
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rows import write_lines

from jaxrlhf import objectives
from jaxrlhf.config.files import read_jsonl
from jaxrlhf.data import load_data
from jaxrlhf.data.steps import UnpairedData
from jaxrlhf.errors import InputError
from jaxrlhf.models import load_pretrained
from jaxrlhf.sharding import place_batch
from jaxrlhf.trainers.kto import KTOConfig, add_kl, check_labels, train_kto


@pytest.fixture(scope="module")
def config(demo):
    """`config(**options)` on the demo data."""

    def make(**options):
        common = {"data_path": demo.train, "eval_data_path": demo.eval, "data_cache_dir": demo.cache, "seed": 3}
        common |= {"max_length": 32, "max_train_samples": 70, "max_eval_samples": 10, "model_name_or_path": demo.lm}
        return KTOConfig.create(**(common | options))

    return make


@pytest.fixture
def train(config, tmp_path, monkeypatch):
    """`train(**options)`: a short run in `tmp_path`; returns its records."""
    monkeypatch.setattr("jaxrlhf.runs.report.write_report", lambda folder: None)

    def start(**options):
        common = {"output_dir": str(tmp_path), "per_device_train_batch_size": 4, "per_device_eval_batch_size": 4}
        for name, numbers in (("data_path", range(16)), ("eval_data_path", range(16, 24))):
            rows = [(f"Is {i} a number?", "yes" if i % 2 else "no idea", bool(i % 2)) for i in numbers]
            keys = ("prompt", "completion", "label")
            text = "".join(json.dumps(dict(zip(keys, row, strict=True))) + "\n" for row in rows)
            common[name] = str(tmp_path / f"{name}.jsonl")
            Path(common[name]).write_text(text)
        train_kto(config(**(common | options)))
        return read_jsonl(tmp_path / "metrics.jsonl")

    return start


@pytest.mark.long
def test_training_starts_at_the_reference_and_learns_the_labels(train, tmp_path):
    records = train(max_steps=12, learning_rate=3e-3, beta=0.5)
    before, first = records[0], records[1]
    assert before["eval/loss"] == first["loss"] == pytest.approx(0.5, rel=1e-6)
    for name in ("kl", "rewards/chosen", "rewards/rejected", "rewards/margins"):
        assert first[name] == before[f"eval/{name}"] == 0
    assert first["logps/chosen"] < 0 and first["logps/rejected"] < 0
    last = [record for record in records if "loss" in record][-1]
    assert last["loss"] < 0.48 and last["kl"] >= 0
    assert last["rewards/margins"] == pytest.approx(last["rewards/chosen"] - last["rewards/rejected"], abs=1e-4)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["trainer"] == "kto" and summary["eval_after"]["rewards/margins"] > 0
    assert summary["eval_after"]["loss"] < 0.5


@pytest.mark.long
def test_adapters_learn_with_their_base_as_the_reference(train):
    options = {"lora_r": 4, "lora_alpha": 8, "max_steps": 6, "learning_rate": 1e-2, "beta": 0.5}
    records = train(**options, loss_type="apo_zero_unpaired", precompute_ref_log_probs=True)
    steps = [record for record in records if "loss" in record]
    assert steps[0]["rewards/margins"] == pytest.approx(0, abs=1e-4)
    assert steps[0]["loss"] == pytest.approx(0.5, rel=1e-4)
    assert all(step["kl"] == 0 for step in steps), "this loss compares with 0"
    assert steps[-1]["rewards/margins"] > 0.02 and steps[-1]["loss"] < 0.498


@pytest.mark.long
def test_the_kl_of_a_step_is_that_of_the_whole_batch_in_every_row(config, demo, lab):
    mesh = lab.mesh_of(data=2)
    model = load_pretrained(demo.lm, mesh=mesh)
    moved = jax.tree.map(lambda x: x * 0.5, model.params)  # flatter, so other prompts' responses are likelier
    data = load_data(config().data, demo.tokenizer, "kto")
    batch = data[0].batch([4, 7, 30, 2, 31, 5, 6, -1])

    def logprobs(params):
        ids, mask, counted = (batch[f"kl_{name}"] for name in ("ids", "mask", "loss_mask"))
        logp = jax.nn.log_softmax(model.module.apply({"params": jax.device_get(params)}, ids, mask))
        picked = jnp.take_along_axis(logp[:, :-1], ids[:, 1:, None], axis=-1)[..., 0]
        return np.asarray((picked * counted[:, 1:]).sum(1))

    expected = objectives.kto_kl(logprobs(moved) - logprobs(model.params), batch["row_mask"])
    assert expected > 0.1
    values = {"kto": float(expected), "apo_zero_unpaired": 0.0}
    for options in ({}, {"gradient_accumulation_steps": 2}):
        for kind, value in values.items():
            extend = add_kl(config(loss_type=kind, **options), None, model, mesh, data)
            found = extend(moved, place_batch(batch, mesh))
            np.testing.assert_allclose(found["kl"], np.full(8, value), rtol=1e-4, atol=1e-4)
            assert not {name for name in found if name.startswith(("kl_", "ref_kl"))}, "the train program has no use"


@pytest.mark.long
@pytest.mark.parametrize("label", [True, False])
def test_rows_of_one_label_are_refused_before_a_step(train, tmp_path, label):
    rows = [{"prompt": f"question {i}", "completion": "an answer", "label": label} for i in range(20)]
    path = write_lines(tmp_path.with_name(f"{tmp_path.name}-data") / "rows.jsonl", rows)
    with pytest.raises(InputError, match=rf"label: all 1\d training rows are {label}; kto needs good and bad"):
        train(data_path=path, eval_data_path=(), max_steps=1)
    assert not (tmp_path / "metrics.jsonl").exists()


def test_labels_decide_whether_there_is_something_to_learn():
    def rows(*labels):
        data = object.__new__(UnpairedData)
        part = SimpleNamespace(fetch=lambda rows, columns: {"label": np.array(labels)[rows]})
        data.parts = [type("Part", (SimpleNamespace,), {"__len__": lambda self: len(labels)})(**vars(part))]
        return data

    check_labels(rows(True, False, True))
    for labels in ((True, True), (False,)):
        with pytest.raises(InputError, match=f"label: all {len(labels)} training rows are {labels[0]}"):
            check_labels(rows(*labels))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": 0.0}, r"beta=0.0 must be"),
        ({"loss_type": "sigmoid"}, r"loss_type='sigmoid' must be one of kto, apo_zero_unpaired"),
        ({"desirable_weight": -1.0}, r"desirable_weight=-1.0 must be"),
        ({"undesirable_weight": 0.0}, r"undesirable_weight=0.0 must both be above 0"),
        ({"lora_r": 2, "lora_dropout": 0.1}, r"lora_dropout=0.1: kto never drops out"),
        ({"packing": True}, r"packing"),
        ({"streaming": True}, r"streaming"),
    ],
)
def test_contradictory_or_senseless_settings_are_refused_by_name(options, message):
    with pytest.raises(InputError, match=message):
        KTOConfig.create(**options)
