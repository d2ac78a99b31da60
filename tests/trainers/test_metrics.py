"""Metrics of a supervised run: of each source, of all sources together, and the share of padding."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from jaxrlhf.config.files import read_jsonl
from jaxrlhf.data import DataConfig, load_data
from jaxrlhf.trainers.evaluation import metrics_by_source
from jaxrlhf.trainers.packing_advice import packing_advice
from jaxrlhf.trainers.reward import RewardConfig, train_reward
from jaxrlhf.trainers.sft import SFTConfig, train_sft


def mean(totals):
    return {"loss": totals["sum"] / totals["n"]}


def test_joint_metrics_weigh_each_row_alike_and_one_source_has_no_names_of_its_own():
    one = {"a": {"sum": 6.0, "n": 3.0}}
    assert metrics_by_source(one, mean) == {"loss": 2.0}
    two = one | {"b": {"sum": 9.0, "n": 2.0}}
    assert metrics_by_source(two, mean) == {"loss": 3.0, "a/loss": 2.0, "b/loss": 4.5}


@pytest.mark.long
def test_a_run_on_two_sources_reports_the_metrics_of_each(demo, tmp_path, no_report):
    lines = Path(demo.eval).read_text().splitlines()
    shares = {"few": lines[:3], "many": lines[3:14]}
    for name, of_source in shares.items():
        (tmp_path / f"{name}.jsonl").write_text("\n".join(of_source))

    def evaluations(*names):
        folder = tmp_path / "-".join(names)
        options = {"data_path": demo.train, "data_cache_dir": demo.cache, "model_name_or_path": demo.lm, "max_steps": 1}
        options |= {"eval_data_path": tuple(str(tmp_path / f"{name}.jsonl") for name in names), "max_length": 32}
        train_reward(RewardConfig.create(**options, output_dir=str(folder), per_device_eval_batch_size=1))
        records = [r for r in read_jsonl(folder / "metrics.jsonl") if "eval/loss" in r]
        assert len(records) == 2
        return records

    both, alone = evaluations("few", "many"), evaluations("few")
    assert not any("few" in name for record in alone for name in record)
    for metric in ("loss", "accuracy", "mean_chosen_score", "length_baseline"):
        assert both[0][f"eval/few/{metric}"] == pytest.approx(alone[0][f"eval/{metric}"], rel=1e-6)
        for record in both:
            few, many = (record[f"eval/{name}/{metric}"] for name in shares)
            assert record[f"eval/{metric}"] == pytest.approx((3 * few + 11 * many) / 14, rel=1e-6)


@pytest.mark.long
@pytest.mark.parametrize(("train", "kind"), [(train_sft, SFTConfig), (train_reward, RewardConfig)])
def test_padding_is_the_share_of_positions_without_a_token(train, kind, demo, tmp_path, no_report):
    options = {"data_path": demo.train, "eval_data_path": demo.eval, "data_cache_dir": demo.cache, "max_steps": 1}
    options |= {"max_length": 32, "max_eval_samples": 8, "per_device_train_batch_size": 2, "packing": False}
    config = kind.create(**options, model_name_or_path=demo.lm, output_dir=str(tmp_path))
    train(config)
    data, _ = load_data(config.data, demo.tokenizer, "sft" if kind is SFTConfig else "reward")
    batch = data.batch(data.indices(0, 16))
    masks = [x for name, x in batch.items() if name in ("attention_mask", "chosen_mask", "rejected_mask")]
    (record,) = [r for r in read_jsonl(tmp_path / "metrics.jsonl") if "perf/padding" in r]
    assert record["perf/padding"] == pytest.approx(1 - np.mean(masks), rel=1e-6)
    assert "tokens" not in record


@pytest.mark.parametrize(("padding", "told"), [(0.45, 1), (0.2, 0)])
def test_packing_is_advised_once_where_much_is_padding_and_nobody_chose(padding, told):
    config, data = DataConfig(max_length=32), SimpleNamespace(bins=None)
    assert packing_advice(config.replace(packing=False), data, "reward") is None
    advice = packing_advice(config, data, "reward")
    said = [advice.after(padding) for _ in range(12)]
    assert [i for i, text in enumerate(said) if text] == [4] * told
    assert all("--packing true" in text and "45%" in text and "64 tokens" in text for text in filter(None, said))
