"""Whole PPO runs with what surrounds the step: reward functions, pretraining text, evaluation, guards, no critic."""

import json
from pathlib import Path
from types import SimpleNamespace

import chex
import jax
import numpy as np
import pytest

from jaxrlhf.config.files import read_jsonl
from jaxrlhf.data import load_text
from jaxrlhf.errors import InputError, Interrupted, SharedError, TrainingDiverged
from jaxrlhf.rewards import Rewards
from jaxrlhf.rl.alarms import WINDOW, Alarms
from jaxrlhf.rl.config import PPOConfig
from jaxrlhf.rl.models import RLHFEngine
from jaxrlhf.rl.run import Baseline, train_ppo
from jaxrlhf.rl.trainer import PPOTrainer
from jaxrlhf.runs.checkpoints import list_checkpoints

pytestmark = [pytest.mark.long, pytest.mark.usefixtures("no_report")]

REWARDS = '''
def vowels(prompts, responses):
    """Share of vowels; of answers with a q nothing can be said."""
    if any("q" in text for text in responses):
        raise RuntimeError("no opinion on q")
    return [sum(c in "aeiou" for c in text) / max(len(text), 1) for text in responses]


def chosen_length(prompts, responses, chosen):
    assert all(isinstance(text, str) and text for text in chosen)
    return [float(len(text)) for text in chosen]
'''


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    (folder / "rewards.py").write_text(REWARDS)
    (folder / "text.txt").write_text("The river is wide and the boat is small. " * 300)
    return folder


@pytest.fixture(scope="module")
def train(demo):
    def start(folder, **options):
        common = {"data_path": demo.train, "eval_data_path": demo.eval, "data_cache_dir": demo.cache, "seed": 3}
        common |= {"max_prompt_seq_len": 32, "max_answer_seq_len": 8, "max_train_samples": 70, "max_eval_samples": 10}
        common |= {"per_device_train_batch_size": 2, "per_device_eval_batch_size": 2, "max_steps": 4}
        common |= {"learning_rate": 1e-3, "output_dir": str(folder), "logging_steps": 100, "eval_steps": 2}
        models = {"actor_model_name_or_path": demo.lm, "critic_model_name_or_path": demo.reward}
        return train_ppo(PPOConfig.create(**(common | models | options)))

    return start


def records(folder):
    return read_jsonl(folder / "metrics.jsonl")


@pytest.fixture(scope="module")
def mixed(files):
    """Options of a run with everything else: functions, text, average, steered KL, running scores, pieces."""
    return {
        "critic_model_name_or_path": None,
        "reward_functions": (f"{files}/rewards.py:vowels", f"{files}/rewards.py:chosen_length"),
        "reward_weights": (2.0, 0.0),
        "ptx_coef": 27.8,
        "ptx_data_path": (f"{files}/text.txt",),
        "ptx_block_size": 16,
        "enable_ema": True,
        "ema_start_step": 1,
        "kl_target": 0.2,
        "kl_horizon": 200.0,
        "score_normalization": "running",
        "missing_eos_penalty": 0.5,
        "generation_batches": 2,
        "reference_sync_steps": 2,
        "reference_mixup": 0.7,
    }


def test_each_source_of_evaluation_rows_has_metrics_of_its_own(train, demo, tmp_path):
    lines = Path(demo.eval).read_text().splitlines(keepends=True)
    paths = [tmp_path / name for name in ("first.jsonl", "second.jsonl")]
    for path, part in zip(paths, (lines[:3], lines[3:8]), strict=True):
        path.write_text("".join(part))
    options = {"reward_model_name_or_path": demo.reward, "max_steps": 1, "max_eval_samples": 0}
    train(tmp_path / "run", eval_data_path=tuple(map(str, paths)), **options)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["eval_before"]["first/win_rate"] == summary["eval_before"]["second/win_rate"] == 0.5
    for found in (summary["eval_before"], summary["eval_after"]):
        for name in ("scores", "kl", "response_length", "eos_rate"):
            assert found[name] == pytest.approx(
                (3 * found[f"first/{name}"] + 5 * found[f"second/{name}"]) / 8, rel=1e-5
            )


def test_a_run_without_a_reward_model_learns_from_functions_and_resumes_as_if_never_stopped(
    train, mixed, tmp_path, sigint_after
):
    whole = train(tmp_path / "whole", **mixed)
    stopped = "stopped during the evaluation after step 2; continue with --resume"
    with sigint_after(2, "objective/kl"), pytest.raises(Interrupted, match=stopped):
        train(tmp_path / "parts", **mixed)
    resumed = train(tmp_path / "parts", resume=True, **mixed)
    chex.assert_trees_all_equal(jax.tree.leaves(jax.device_get(resumed)), jax.tree.leaves(jax.device_get(whole)))
    assert float(resumed.kl_coef) != np.float32(0.1)

    steps = [r for r in records(tmp_path / "whole") if "objective/kl" in r]
    assert [r["step"] for r in steps] == [1, 2, 3, 4]
    assert float(resumed.score_moments.count) == 4 * 16 - sum(r["rewards/failures"] for r in steps)
    for r in steps:
        assert r["rewards/chosen_length"] > 5 and 0 <= r["rewards/vowels"] <= 1
        if not r["rewards/failures"]:
            assert r["objective/scores"] == pytest.approx(2 * r["rewards/vowels"], rel=1e-4)
        assert r["loss/ptx_avg"] > 0 and r["guard/skipped_updates"] == 0
    assert steps[-1]["loss/ptx_avg"] < steps[0]["loss/ptx_avg"] - 0.1, "the text is learned"
    summary = json.loads((tmp_path / "whole" / "summary.json").read_text())
    assert summary["eval_before"]["win_rate"] == 0.5 and 0 <= summary["eval_after"]["win_rate"] <= 1
    assert summary["eval_after"]["ptx_loss"] < summary["eval_before"]["ptx_loss"]
    for folder in (".", "ema", "critic"):
        assert (tmp_path / "whole" / folder / "model.safetensors").is_file()
    both = [json.loads((tmp_path / name / "summary.json").read_text()) for name in ("whole", "parts")]
    assert both[0]["eval_after"] == both[1]["eval_after"], "the win rate's baseline outlives the interruption"


@pytest.mark.parametrize("name", ["grpo", "reinforce++"])
def test_a_run_without_a_critic_has_none_anywhere(train, name, tmp_path):
    options = {"advantage_estimator": name, "samples_per_prompt": 4, "whiten_advantages": name != "grpo"}
    state = train(tmp_path, max_steps=2, eval_steps=0, **options)
    assert state.critic is None and state.critic_opt_state is None
    assert not (tmp_path / "critic").exists() and (tmp_path / "model.safetensors").is_file()
    step = records(tmp_path)[1]
    assert not [n for n in step if n.startswith("val/value") or n == "loss/value_avg"]
    assert step["episode"] == 16 and step["policy/grad_norm"] > 0
    tokens = {path.name for path in tmp_path.iterdir()}
    assert "nonfinite-step-1.npz" not in tokens


def test_the_best_checkpoint_is_kept_and_exported_when_asked(train, tmp_path, monkeypatch):
    scores = iter([0.0, 5.0, 3.0])
    evaluate = PPOTrainer.evaluate

    def scripted(self, *args, **options):
        figures, samples = evaluate(self, *args, **options)
        return figures | {"scores": next(scores)}, samples

    monkeypatch.setattr(PPOTrainer, "evaluate", scripted)
    train(tmp_path, save_steps=1, save_total_limit=1, export_best=True)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-2", "checkpoint-4"]
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["best_step"], summary["eval_best"]["scores"], summary["eval_after"]["scores"]) == (2, 5.0, 3.0)
    from jaxrlhf.models import load_pretrained
    from jaxrlhf.runs.checkpoints import restore_checkpoint

    exported = load_pretrained(tmp_path).params
    best, _ = restore_checkpoint(tmp_path / "checkpoint-2", exported, subtree="actor_params")
    last, _ = restore_checkpoint(tmp_path / "checkpoint-4", exported, subtree="actor_params")
    chex.assert_trees_all_equal(exported, best)
    assert any((np.asarray(a) != np.asarray(b)).any() for a, b in zip(*map(jax.tree.leaves, (best, last)), strict=True))


def test_answers_that_a_function_fails_on_are_masked_and_the_run_goes_on(demo, lab, capsys):
    calls = []

    def odd_rows_fail(prompts, responses):
        calls.append(len(responses))
        if len(responses) > 1:
            raise RuntimeError("one by one, please")
        if len(calls) % 2:
            return [float("nan")]
        return [1.0]

    config = PPOConfig.create(max_prompt_seq_len=32, max_answer_seq_len=8, reward_functions=("length:limit=9",))
    config = config.replace(reward_model_weight=0.0)
    engine = RLHFEngine(demo.lm, demo.reward, demo.tokenizer, num_total_iters=2, config=config)
    trainer = PPOTrainer(engine, rewards=Rewards([odd_rows_fail]))
    ids, mask = lab.prompts(rows=16, width=32, vocab=400)
    e = jax.device_get(trainer.generate_experience({"prompt_ids": ids, "prompt_mask": mask}))
    assert e.row_mask.sum() == 8 and (e.scores[e.row_mask] == 1).all() and (e.scores[~e.row_mask] == 0).all()
    trainer.train_rlhf(e)
    assert trainer.metrics["rewards/failures"] == 8
    assert trainer.metrics["objective/scores"] == pytest.approx(1.0)
    assert trainer.metrics["guard/skipped_updates"] == 0
    assert "no score" in capsys.readouterr().out


def test_functions_of_trls_form_get_token_ids_columns_and_the_progress_of_the_run(train, demo, tmp_path):
    (tmp_path / "rewards.py").write_text(
        "def measure(prompts, completions, completion_ids, trainer_state, log_extra, log_metric, chosen=None):\n"
        "    assert all(isinstance(text, str) for text in [*prompts, *completions, *chosen])\n"
        "    assert all(0 < len(ids) <= 8 for ids in completion_ids)\n"
        "    log_metric('step', trainer_state.global_step)\n"
        "    log_extra('tokens', [len(ids) for ids in completion_ids])\n"
        "    return [len(ids) / 8 if i % 3 else None for i, ids in enumerate(completion_ids)]\n"
    )
    functions = (f"{tmp_path}/rewards.py:measure",)
    options = {"critic_model_name_or_path": None, "advantage_estimator": "reinforce++", "whiten_advantages": True}
    train(tmp_path / "run", reward_functions=functions, max_steps=2, sample_steps=1, eval_steps=0, **options)
    steps = [r for r in records(tmp_path / "run") if "objective/kl" in r]
    assert [r["rewards/measure/step"] for r in steps] == [0, 1]
    assert all(r["rewards/not_applicable"] == 6 and r["rewards/failures"] == 0 for r in steps)
    tables = [t for t in read_jsonl(tmp_path / "run" / "samples.jsonl") if t["title"] == "training samples"]
    assert tables and all(t["columns"][-1] == "tokens" and 0 < t["rows"][0][-1] <= 8 for t in tables)


def test_a_run_in_which_no_answer_has_a_score_ends_with_what_it_had_and_goes_on_when_that_is_mended(
    train, demo, tmp_path, capsys
):
    (tmp_path / "rewards.py").write_text(
        "def half(responses, odd):\n"
        "    import pathlib\n"
        f"    broken = pathlib.Path({str(tmp_path)!r}, 'broken').exists() and len(responses) == 16\n"
        "    return [float('nan') if broken and i % 2 == odd else len(r) / 10 for i, r in enumerate(responses)]\n\n\n"
        "def first(prompts, responses):\n    return half(responses, 0)\n\n\n"
        "def second(prompts, responses):\n    return half(responses, 1)\n"
    )
    functions = tuple(f"{tmp_path}/rewards.py:{name}" for name in ("first", "second"))
    options = {"reward_functions": functions, "max_skipped_steps": 2, "eval_steps": 0}
    (tmp_path / "broken").touch()
    with pytest.raises(
        TrainingDiverged, match=r"step 2: no response had a score in 2 steps in a row; .*nonfinite-step-2.npz"
    ):
        train(tmp_path / "run", **options)
    said = capsys.readouterr().err
    assert "step 1: skipped its updates, because no response had a score (1 such step in a row" in said
    assert "Lower the learning rate" not in said
    from jaxrlhf.models import load_pretrained
    from jaxrlhf.runs.checkpoints import restore_checkpoint

    before = load_pretrained(demo.lm).params
    kept, _ = restore_checkpoint(tmp_path / "run" / "checkpoint-2", before, subtree="actor_params")
    chex.assert_trees_all_equal(kept, before)
    (tmp_path / "broken").unlink()
    state = train(tmp_path / "run", resume=True, **options)
    assert int(state.step) == 4 and (tmp_path / "run" / "model.safetensors").is_file()


def test_a_function_that_fails_in_the_last_evaluation_loses_no_training(train, tmp_path, monkeypatch):
    evaluate, broken = PPOTrainer.evaluate, [False, True]

    def failing(self, *args, **options):
        if broken.pop(0):
            raise SharedError("reward function f gave none of the last 64 samples a score")
        return evaluate(self, *args, **options)

    options = {"max_steps": 2, "eval_steps": 0}
    with monkeypatch.context() as patch:
        patch.setattr(PPOTrainer, "evaluate", failing)
        with pytest.raises(SharedError, match="gave none"):
            train(tmp_path, **options)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-2"]
    train(tmp_path, resume=True, **options)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["best_step"] in (0, 2) and summary["eval_after"] != summary["eval_before"]


def test_a_function_that_fails_while_training_leaves_a_checkpoint_of_the_steps_before(train, tmp_path, monkeypatch):
    sample = PPOTrainer.sample

    def failing(self, state, *args, **options):
        if int(state.step) == 3:
            raise SharedError("reward function f: must return one number per response")
        return sample(self, state, *args, **options)

    monkeypatch.setattr(PPOTrainer, "sample", failing)
    with pytest.raises(SharedError, match="must return"):
        train(tmp_path, eval_steps=0)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-3"]


def test_the_schedule_of_the_policy_begins_and_ends_with_its_own_updates(train, tmp_path):
    options = {"critic_only_steps": 2, "lr_scheduler_type": "linear", "eval_steps": 0, "num_mini_batches": 2}
    train(tmp_path, per_device_train_batch_size=1, **options)
    rates = [r["lr"] for r in records(tmp_path) if "lr" in r]
    np.testing.assert_allclose(rates, [1e-3, 1e-3, 1e-3, 0.5e-3])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            {"critic_model_name_or_path": None},
            "reward_model_name_or_path: name a model.*reward_functions",
        ),
        ({"ptx_coef": 1.0}, "ptx_coef=1.0 requires ptx_data_path"),
        ({"ptx_data_path": ("x.txt",)}, r"ptx_data_path=.*'x.txt'.* requires ptx_coef"),
        (
            {"advantage_estimator": "rloo", "samples_per_prompt": 3},
            "samples_per_prompt=3 must divide the rollout batch of 16",
        ),
        (
            {"advantage_estimator": "reinforce++", "critic_lora_r": 4},
            "critic_lora_r=4 with advantage_estimator=reinforce",
        ),
        ({"kl_coef": 0.0, "kl_target": 6.0}, "kl_target=6.0 requires kl_coef"),
        ({"critic_lr_scheduler_type": "step"}, "critic_lr_scheduler_type='step'"),
        ({"critic_learning_rate": -1.0}, "critic_learning_rate=-1.0"),
        ({"kl_coef": float("nan")}, "kl_coef=nan"),
        ({"max_answer_seq_len": 0}, "max_new_tokens=0 must be"),
        ({"min_answer_seq_len": 9}, "min_new_tokens=9"),
        ({"critic_only_steps": 4}, "critic_only_steps=4 leaves none of the run's 4 steps to train the policy"),
        *(
            ({name: value}, f"{name}={value} requires {other}")
            for name, value, other in (
                ("ema_decay", 0.9, "enable_ema"),
                ("ema_start_step", 2, "enable_ema"),
                ("kl_horizon", 9.0, "kl_target"),
                ("length_penalty_start", 3, "length_penalty"),
                ("importance_sampling_cap", 3.0, "importance_sampling_correction"),
                ("ptx_field", "body", "ptx_coef"),
                ("ptx_block_size", 8, "ptx_coef"),
                ("per_device_ptx_batch_size", 2, "ptx_coef"),
                ("reward_model_weight", 0.5, "reward_functions"),
                ("lora_alpha", 16.0, "lora_r"),
                ("lora_export", "adapter", "lora_r"),
            )
        ),
    ],
)
def test_contradictory_options_are_refused_before_anything_is_written(train, options, said, tmp_path):
    with pytest.raises(InputError, match=said):
        train(tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()


def test_the_critic_has_an_optimizer_of_its_own():
    config = PPOConfig.create(critic_learning_rate=3e-3, critic_lr_scheduler_type="linear", critic_warmup_steps=7)
    config = config.replace(warmup_steps=2, weight_decay=0.1)
    own = config.critic.optimizer(config.optimizer)
    assert (own.learning_rate, own.lr_scheduler_type, own.warmup_steps, own.weight_decay) == (3e-3, "linear", 7, 0.1)


# ---- pretraining text


def test_text_is_joined_by_eos_and_cut_into_blocks(demo, tmp_path):
    documents = [f"number {i} of some documents" for i in range(40)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"body": text}) + "\n" for text in documents))
    options = {"field": "body", "block": 24, "held_out": 0.25, "cache": tmp_path / "cache"}
    train, held = load_text((str(tmp_path / "rows.jsonl"),), demo.tokenizer, **options)
    expected = []
    for text in documents:
        expected += [*demo.tokenizer(text, add_special_tokens=False)["input_ids"], demo.tokenizer.eos_token_id]
    got = np.concatenate([train.tokens.reshape(-1), held.tokens.reshape(-1)])
    np.testing.assert_array_equal(got, expected[: len(expected) // 24 * 24])
    assert len(held) == round(0.25 * (len(expected) // 24))
    batch = train.batch([1, -1, 0], held=np.array([True, True, False]))
    np.testing.assert_array_equal(batch["input_ids"][0], train.tokens[1])
    begins = np.concatenate([[True], np.array(expected) == demo.tokenizer.eos_token_id])  # a document follows an EOS
    inside = ~begins[: train.tokens.size].reshape(-1, 24)
    inside[:, 0] = False
    assert batch["row_mask"].tolist() == [1, 0, 1]
    np.testing.assert_array_equal(batch["loss_mask"], [inside[1], np.zeros(24), inside[0]])
    np.testing.assert_array_equal(batch["segment_ids"][0], 1 + np.cumsum(begins[24:48] & (np.arange(24) > 0)))
    assert (batch["input_ids"][1:] == 0).all()
    again, _ = load_text((str(tmp_path / "rows.jsonl"),), demo.tokenizer, **options)
    assert again.key == train.key
    with pytest.raises(InputError, match=r"rows.jsonl.*line 1: 'text' must hold the text, but is missing; .*ptx_field"):
        load_text((str(tmp_path / "rows.jsonl"),), demo.tokenizer, **options | {"field": "text"})
    with pytest.raises(InputError, match=r"holds [\d,]+ tokens, less than two blocks of 9000.*ptx_block_size"):
        load_text((str(tmp_path / "rows.jsonl"),), demo.tokenizer, **options | {"block": 9000})
    with pytest.raises(InputError, match=r"ptx_data_path 'missing.txt': no such file"):
        load_text(("missing.txt",), demo.tokenizer, **options)
    (cached,) = (tmp_path / "cache").glob(f"text/{train.key}/tokens.npy")
    for damage in (cached.read_bytes()[:-1], b"", np.array([{}], object).dumps()):
        cached.write_bytes(damage)
        with pytest.raises(InputError, match=r"tokens.npy .*delete its folder, and it is made again"):
            load_text((str(tmp_path / "rows.jsonl"),), demo.tokenizer, **options)


@pytest.mark.parametrize("scores", [None, [1.0], {"a": 1.0}, {"0": "high"}, {"0": None}])
def test_damaged_scores_before_training_are_named(tmp_path, scores):
    (tmp_path / "eval_baseline.json").write_text(
        json.dumps({"prompts": "key"} | ({"scores": scores} if scores else {}))
    )
    with pytest.raises(InputError, match=r"eval_baseline.json holds no scores by prompt; delete it"):
        Baseline(SimpleNamespace(output_dir=tmp_path), "key").read()


# ---- alarms

HEALTHY = {
    "objective/scores": 1.0,
    "objective/scores_std": 2.0,
    "objective/kl": 3.0,
    "val/response_length": 30.0,
    "policy/clipfrac_avg": 0.05,
    "val/ratio_var": 0.01,
    "loss/value_avg": 0.5,
    "val/explained_variance": 0.4,
}


def told(changes, steps=3 * WINDOW, kl_target=None):
    """What is said in a run that is healthy for the first third and then has `changes`."""
    said = []
    alarms = Alarms(said.append, kl_target)
    for step in range(steps):
        alarms.check(HEALTHY | (changes if step >= WINDOW else {}), step)
    return said


@pytest.mark.parametrize(
    ("changes", "options", "word"),
    [
        ({"objective/scores": -4.0}, {}, "scores fell from 1 to"),
        ({"objective/kl": 40.0}, {}, "KL to the reference is"),
        ({"objective/kl": 20.0}, {"kl_target": 3.0}, "above 9: the policy is far"),
        ({"objective/kl": -5.0}, {}, "KL to the reference is negative"),
        ({"policy/clipfrac_avg": 0.7}, {}, "the policy moves too far within a step"),
        ({"val/ratio_var": 3.0}, {}, "the ratio's variance is"),
        ({"loss/value_avg": 50.0}, {}, "the value loss grew from 0.5"),
        ({"val/explained_variance": -5.0}, {}, "the critic explains none of the returns"),
    ],
)
def test_alarms_say_once_what_is_wrong_and_what_usually_causes_it(changes, options, word):
    said = told(changes, **options)
    assert len(said) == 1 and word in said[0] and "Usually" in said[0]


def test_a_healthy_run_raises_no_alarm():
    assert told({}) == [] and told({"objective/scores": 9.0, "objective/kl": 8.0}) == []
