"""DPO as a trainer: what its reference is, what its figures mean, what it refuses, and its place in a run of all steps.

Resumption, layouts and exports are in test_trainers.py, the step against a plain forward in test_supervised.py.
"""

import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf.commands.rlhf import RLHFConfig, train_rlhf
from jaxrlhf.config.files import read_jsonl
from jaxrlhf.data import load_data
from jaxrlhf.data.demo import train_tokenizer
from jaxrlhf.errors import InputError
from jaxrlhf.models import load_pretrained, save_pretrained
from jaxrlhf.sharding import place_batch
from jaxrlhf.trainers.dpo import DPOConfig, response_logprobs, train_dpo, without_reference
from jaxrlhf.trainers.lora import with_adapters
from jaxrlhf.trainers.pairs import read_pairs
from jaxrlhf.trainers.references import add_reference
from jaxrlhf.trainers.reward import RewardConfig, RewardLoss, reward_metrics, reward_sums

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def config(demo):
    """`config(DPOConfig, **options)` on the demo data."""

    def make(kind=DPOConfig, **options):
        common = {"data_path": demo.train, "eval_data_path": demo.eval, "data_cache_dir": demo.cache, "seed": 3}
        common |= {"max_length": 32, "max_train_samples": 70, "max_eval_samples": 10}
        model = "actor_model_name_or_path" if kind is RLHFConfig else "model_name_or_path"
        return kind.create(**(common | {model: demo.lm} | options))

    return make


@pytest.fixture(scope="module")
def lab_on_disk(demo, lab):
    """A second language model of the demo's tokenizer, in a folder, on the mesh of the tests here."""
    other = lab.tiny_model(demo.options, seed=9, scale=0.2)
    save_pretrained(other, demo.folder / "other", demo.tokenizer)
    return SimpleNamespace(mesh=lab.mesh_of(data=2, fsdp=2), other=str(demo.folder / "other"))


def reference_of(config, model, mesh, batch, params=None):
    placed = place_batch(batch, mesh)
    nothing: Any = None  # neither a run nor, without precompute_ref_log_probs, data
    add = partial(add_reference, config, response_logprobs) if config.has_reference else without_reference
    extended = add(nothing, model, mesh, nothing)(model.params if params is None else params, placed)
    return {side: np.asarray(extended[f"ref_{side}_logps"]) for side in ("chosen", "rejected")}


def plain_logprobs(model, batch, side):
    """log π(answer | prompt), from the logits."""
    ids, mask = batch[f"{side}_ids"], batch[f"{side}_mask"]
    logp = jax.nn.log_softmax(model.module.apply({"params": jax.device_get(model.params)}, ids, mask))
    picked = jnp.take_along_axis(logp[:, :-1], ids[:, 1:, None], axis=-1)[..., 0]
    return np.asarray((picked * batch[f"{side}_loss_mask"][:, 1:]).sum(1))


def test_the_reference_is_the_start_model_another_model_or_none(config, demo, lab_on_disk):
    mesh = lab_on_disk.mesh
    model = load_pretrained(demo.lm, mesh=mesh)
    batch = load_data(config().data, demo.tokenizer, "dpo")[0].batch([4, 7, -1, 2, 30, 31, 5, 6])
    expected = {
        None: plain_logprobs(model, batch, "chosen"),
        lab_on_disk.other: plain_logprobs(load_pretrained(lab_on_disk.other), batch, "chosen"),
    }
    real = batch["row_mask"] == 1
    for path, logprobs in expected.items():
        for options in ({}, {"gradient_accumulation_steps": 2}, {"zero_stage": 1}):
            found = reference_of(config(reference_model_name_or_path=path, **options), model, mesh, batch)
            np.testing.assert_allclose(found["chosen"][real], logprobs[real], rtol=1e-5)
            assert found["rejected"][2] == 0, "a filler row has no answer"
    free = reference_of(config(reference_free=True), model, mesh, batch)
    np.testing.assert_array_equal(free["chosen"], np.zeros(8))
    assert abs(expected[None] - expected[lab_on_disk.other]).min(where=real, initial=9) > 0.1


def test_with_lora_the_reference_is_the_frozen_base_and_never_moves(config, demo, lab_on_disk):
    mesh, lora = lab_on_disk.mesh, config(lora_r=2)
    start = load_pretrained(demo.lm, mesh=mesh)
    batch = load_data(lora.data, demo.tokenizer, "dpo")[0].batch(range(8))
    model = with_adapters(start, lora.lora, jax.random.key(0))
    moved = jax.tree.map_with_path(lambda path, x: x + 0.5 * path[-1].key.startswith("lora_"), model.params)
    base = reference_of(config(), start, mesh, batch)
    for params in (model.params, moved):
        found = reference_of(lora, model, mesh, batch, params)
        np.testing.assert_allclose(found["chosen"], base["chosen"], rtol=1e-6)
    other = reference_of(lora.replace(reference_model_name_or_path=lab_on_disk.other), model, mesh, batch, moved)
    assert abs(other["chosen"] - base["chosen"]).min() > 0.1


def test_training_starts_at_the_reference_without_dropout_and_learns_the_pairs(config, tmp_path, monkeypatch):
    monkeypatch.setattr("jaxrlhf.runs.report.write_report", lambda folder: None)
    options = {"output_dir": str(tmp_path), "max_steps": 12, "learning_rate": 3e-3, "beta": 0.5}
    train_dpo(config(**options, per_device_train_batch_size=2, per_device_eval_batch_size=2))
    records = read_jsonl(tmp_path / "metrics.jsonl")
    before, first = records[0], records[1]
    assert before["eval/loss"] == first["loss"] == pytest.approx(np.log(2), rel=1e-6)
    for name in ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"):
        assert first[name] == before[f"eval/{name}"] == 0
    assert first["logps/chosen"] < 0 and first["logps/rejected"] < 0
    last = [record for record in records if "loss" in record][-1]
    assert last["loss"] < 0.6
    assert last["rewards/margins"] == pytest.approx(last["rewards/chosen"] - last["rewards/rejected"], abs=1e-4)
    assert last["rewards/accuracies"] > 0.6
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["trainer"] == "dpo" and summary["eval_after"]["rewards/margins"] > 0


LOSSES = {
    "simpo": {},
    "orpo": {},
    "several": {"loss_type": ("sigmoid", "hinge", "sft"), "loss_weights": (1.0, 0.5, 0.2), "beta": 0.5},
}


@pytest.mark.parametrize("name", LOSSES)
def test_other_losses_and_several_at_once_learn_the_pairs(name, config, tmp_path, monkeypatch):
    monkeypatch.setattr("jaxrlhf.runs.report.write_report", lambda folder: None)
    options = {"loss_type": name, "learning_rate": 3e-3, "max_steps": 10, "output_dir": str(tmp_path)} | LOSSES[name]
    for key, numbers in (("data_path", range(16)), ("eval_data_path", range(16, 24))):
        pairs = [{"prompt": f"Is {i} a number?", "chosen": f"yes, {i} is", "rejected": "no idea"} for i in numbers]
        options[key] = str(tmp_path / f"{key}.jsonl")
        Path(options[key]).write_text("".join(json.dumps(row) + "\n" for row in pairs))
    train_dpo(config(**options, per_device_train_batch_size=2, per_device_eval_batch_size=2))
    before, *records = read_jsonl(tmp_path / "metrics.jsonl")
    after = json.loads((tmp_path / "summary.json").read_text())["eval_after"]
    assert after["loss"] < before["eval/loss"] - 0.01
    assert after["rewards/margins"] > before["eval/rewards/margins"]
    assert ("nll_loss" in after) == ("nll_loss" in records[0]) == (name != "simpo")
    if name == "several":
        at_start = np.log(2) + 0.5
        assert before["eval/loss"] == pytest.approx(at_start + 0.2 * before["eval/nll_loss"], rel=1e-5)
        assert records[0]["loss"] == pytest.approx(at_start + 0.2 * records[0]["nll_loss"], rel=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": 0.0}, r"beta=0.0 must be"),
        ({"beta": float("inf")}, r"beta=inf must be"),
        ({"label_smoothing": 0.5}, r"label_smoothing=0.5 must be"),
        ({"label_smoothing": -0.1}, r"label_smoothing=-0.1 must be"),
        ({"label_smoothing": 0.1, "loss_type": "ipo"}, r"label_smoothing=0.1 does not go with loss_type=ipo"),
        ({"loss_type": "aot"}, r"loss_type=aot must be one or several of sigmoid, robust, ipo"),
        ({"loss_type": ("ipo", "ipo")}, r"loss_type=ipo ipo must be"),
        ({"loss_type": ()}, r"loss_type=none must be"),
        ({"loss_type": "sft"}, r"loss_type=sft alone learns nothing of pairs.*jaxrlhf sft"),
        ({"loss_weights": (1.0, 2.0)}, r"loss_weights=1.0 2.0: must have a weight for each of the 1 losses"),
        (
            {"loss_type": ("ipo", "sft"), "loss_weights": (0.0, 1.0)},
            r"loss_weights=0.0 1.0: nothing is learned of pairs",
        ),
        ({"simpo_gamma": 0.5}, r"simpo_gamma=0.5 does not go with loss_type=sigmoid"),
        ({"loss_type": "orpo", "cpo_alpha": 0.5}, r"cpo_alpha=0.5 does not go with loss_type=orpo"),
        (
            {"reference_free": True, "reference_model_name_or_path": "sft"},
            r"reference_model_name_or_path=sft: there is no reference, reference_free leaves it out",
        ),
        (
            {"loss_type": ("simpo", "orpo"), "precompute_ref_log_probs": True},
            r"precompute_ref_log_probs=True: there is no reference, loss_type=simpo orpo reads none",
        ),
        ({"lora_r": 2, "lora_dropout": 0.1}, r"lora_dropout=0.1: dpo never drops out"),
    ],
)
def test_contradictory_or_senseless_settings_are_refused_by_name(options, message):
    with pytest.raises(InputError, match=message):
        DPOConfig.create(**options)


def test_a_reference_that_does_not_fit_is_refused_before_anything_is_written(config, demo, lab, tmp_path):
    folders = {
        "vocabulary": lab.tiny_model(demo.options | {"vocab_size": 300}),
        "context": lab.tiny_model(demo.options | {"n_positions": 16}),
    }
    messages = {
        "vocabulary": r"the model to train and reference_model_name_or_path=.*have different tokenizers",
        "context": r"max_length for the reference model of 32 tokens exceeds the model's context of 16",
        "absent": r"absent",
    }
    for name, message in messages.items():
        if name in folders:
            own = train_tokenizer(["quite another text"] * 3, 300) if name == "vocabulary" else demo.tokenizer
            save_pretrained(folders[name], tmp_path / name, own)
        with pytest.raises(InputError, match=message):
            train_dpo(config(reference_model_name_or_path=str(tmp_path / name), output_dir=str(tmp_path / "run")))
        assert not (tmp_path / "run").exists()


def test_sft_and_dpo_make_one_run_with_one_report_and_one_summary_also_step_by_step(config, tmp_path):
    section = {"max_steps": 1, "per_device_train_batch_size": 1, "per_device_eval_batch_size": 2}
    base = config(RLHFConfig, alignment="dpo", output_dir=str(tmp_path / "run"))
    run = base.replace(sft=base.sft.replace(**section), dpo=base.dpo.replace(beta=0.3, **section))
    with pytest.raises(InputError, match=r"dpo starts from .*run/sft, which holds no finished run; run step 1 first"):
        train_rlhf(run.replace(steps=(2,)))
    assert list(train_rlhf(run.replace(steps=(1,)))["seconds"]) == ["sft"]
    summary = train_rlhf(run.replace(steps=(2,)))
    assert list(summary["seconds"]) == ["sft", "dpo"]
    assert summary["dpo_eval_loss"] == pytest.approx(np.log(2), rel=0.1)
    assert {"sft_eval_loss_after", "dpo_eval_accuracy", "dpo_eval_margin"} < set(summary)
    assert not [name for name in summary if name.startswith(("ppo", "reward"))]
    assert sorted(path.name for path in (tmp_path / "run").iterdir() if path.is_dir()) == ["dpo", "sft"]
    assert "Direct preference optimisation" in (tmp_path / "run" / "report.html").read_text()
    assert "beta: 0.3" in (tmp_path / "run" / "dpo" / "config.yaml").read_text()
    assert f"model_name_or_path: {tmp_path}/run/sft" in (tmp_path / "run" / "dpo" / "config.yaml").read_text()
    assert train_rlhf(run.replace(resume=True)) == summary
    with pytest.raises(InputError, match=r"already holds a run \(sft, dpo\)"):
        train_rlhf(run)
    with pytest.raises(InputError, match="steps=3: the steps are 1 and 2"):
        run.replace(steps=(3,))


def test_a_run_with_dpo_refuses_a_reward_model_and_an_adapter_where_dpo_needs_a_model(config, tmp_path):
    with pytest.raises(InputError, match=r"reward_model_name_or_path=other: alignment=dpo trains no reward model"):
        config(RLHFConfig, alignment="dpo", reward_model_name_or_path="other")
    run = config(RLHFConfig, alignment="dpo", output_dir=str(tmp_path / "run"))
    with pytest.raises(InputError, match=r"sft.lora_export=adapter: the next step needs the merged model"):
        train_rlhf(run.replace(sft=run.sft.replace(lora_r=1, lora_export="adapter")))


# ---- what the reward model's evaluation says of lengths


def test_reward_metrics_tell_accuracy_from_what_lengths_alone_give(config, demo, lab):
    model = lab.tiny_model(demo.options, head="scalar", seed=4)
    data = load_data(config(RewardConfig).data, demo.tokenizer, "reward")[0]
    rows = np.arange(40)
    batch = data.batch([*rows, -1, -1])
    (values,) = zip(*data.values(rows, ["prompt_length", "ids_0", "ids_1"]), strict=True)
    tokens = [tuple(len(v[f"ids_{j}"]) - int(v["prompt_length"]) for j in (0, 1)) for v in values]
    chosen, rejected = read_pairs(batch).lengths().values()
    assert list(zip(chosen[:40], rejected[:40], strict=True)) == tokens
    assert chosen[-1] == rejected[-1] == 0

    sums = jax.jit(partial(reward_sums, RewardLoss(), model.module))(model.params, batch)
    figures = reward_metrics(jax.device_get(sums))
    forward = jax.jit(lambda params, *batch: model.module.apply({"params": params}, *batch))
    scores = [
        np.asarray(forward(model.params, batch[f"{side}_ids"], batch[f"{side}_mask"]))
        for side in ("chosen", "rejected")
    ]
    ends = [batch[f"{side}_mask"].sum(axis=1)[:40] - 1 for side in ("chosen", "rejected")]
    right = scores[0][rows, ends[0]] > scores[1][rows, ends[1]]
    similar = [abs(a - b) < 0.1 * max(a, b) for a, b in tokens]
    assert 0 < sum(similar) < 40 and len({a == b for a, b in tokens}) == 2
    assert figures["accuracy"] == pytest.approx(np.mean(right))
    assert figures["length_baseline"] == pytest.approx(np.mean([(a > b) + 0.5 * (a == b) for a, b in tokens]))
    assert figures["similar_length_pairs"] == sum(similar)
    expected = np.mean([r for r, s in zip(right, similar, strict=True) if s])
    assert figures["accuracy_similar_length"] == pytest.approx(expected)


def test_without_pairs_of_similar_length_their_accuracy_is_left_out():
    totals = dict.fromkeys(("loss", "correct", "chosen", "rejected", "longer", "similar", "similar_correct"), 0.0)
    assert "accuracy_similar_length" not in reward_metrics(totals | {"pairs": 3.0})
