"""The comparison with TRL: a small run of both sides, its verdicts, and what it says when the peer is not there."""

import dataclasses
import importlib.util
import io
import json
import re
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

pytestmark = pytest.mark.long

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path.insert(0, str(FOLDER))

import compare_trl  # noqa: E402
import compare_trl_chat  # noqa: E402
import compare_trl_ours  # noqa: E402
from compare_trl_side import Turns, brief, quality  # noqa: E402

from jaxrlhf.config import parse  # noqa: E402
from jaxrlhf.data import DataConfig, encode_prompts, load_data, load_tokenizer  # noqa: E402
from jaxrlhf.data.demo import demo_quality, materialize_demo  # noqa: E402
from jaxrlhf.errors import InputError  # noqa: E402
from jaxrlhf.models import config_from_dict, create_model, load_pretrained, save_pretrained  # noqa: E402
from jaxrlhf.rl.config import PPOConfig  # noqa: E402

QUESTIONS = ("What is 2 plus 2?", "What color is snow?", "Goodbye!", "What does a cow say?")


def fake_interpreter(folder: Path, script: str) -> str:
    path = folder / "python"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


def runs_of(ours: list[list[float]], theirs: list[list[float]], seconds: tuple[float, float] = (1.0, 3.0)) -> list:
    def side(curve, each):
        times = [10.0, *[each] * (len(curve) - 1)]
        return {"curves": {"score": curve}, "seconds": times, "cpu_seconds": times, "setup_seconds": 2.0}

    return [{"ours": side(a, seconds[0]), "trl": side(b, seconds[1])} for a, b in zip(ours, theirs, strict=True)]


def documented(tmp_path):
    """The file of the run that docs/coming-from-trl.md shows for both libraries."""
    section = (FOLDER.parent / "docs" / "coming-from-trl.md").read_text().partition("## PPO after TRL")[2]
    (tmp_path / "ppo.yaml").write_text(re.search(r"```yaml\n(.*?)```", section, re.S)[1])
    return section.partition("\n## ")[0], tmp_path / "ppo.yaml"


SMALL = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "total_episodes": 16}
SMALL |= {"response_length": 4, "num_ppo_epochs": 1}
"""The documented run, made small: two iterations of 8 rows in 2 minibatches."""


def our_configuration(file):
    """Makes `compare_trl_ours.configuration` read the documented run."""

    def configuration(settings, prompt_length, seed):
        flags = [word for name, value in SMALL.items() for word in (f"--{name}", str(value))]
        config = parse(PPOConfig, ["--config", str(file), *flags, "--no_gradient_checkpointing"], "", "")
        assert config.rows_per_device == 8 and config.total_steps(lambda: 0, rows=8) == 2
        functions = (f"{compare_trl_ours.REWARD}:quality",)
        models = {"reward_model_name_or_path": None, "actor_model_name_or_path": None}
        return config.replace(reward_functions=functions, max_prompt_seq_len=prompt_length, seed=seed, **models)

    return configuration


def test_both_sides_run_the_documented_ppo_from_one_file(tmp_path, monkeypatch):
    section, file = documented(tmp_path)
    tokenizer = load_tokenizer(materialize_demo(tmp_path / "cache").tokenizer)
    shape = {"model_type": "llama", "vocab_size": len(tokenizer), "hidden_size": 16, "num_hidden_layers": 1}
    shape |= {"num_attention_heads": 2, "intermediate_size": 16, "max_position_embeddings": 64}
    shape |= {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    save_pretrained(create_model(config_from_dict(shape), key=jax.random.key(0)), tmp_path / "actor", tokenizer)
    prompts = encode_prompts(tokenizer, QUESTIONS * 2)
    width = max(map(len, prompts))
    ids = np.array([[tokenizer.pad_token_id] * (width - len(p)) + p for p in prompts], np.int32)
    mask = np.arange(width) >= np.array([[width - len(p)] for p in prompts])
    np.savez(tmp_path / "prompts.npz", ids=np.stack([ids] * 2), mask=np.stack([mask] * 2))
    job = {name: str(tmp_path / name) for name in ("actor", "value", "trained")} | {"result": str(tmp_path / "r.json")}
    job |= {"prompts": str(tmp_path / "prompts.npz"), "seed": 3}
    job["settings"] = compare_trl.SETTINGS | {"iterations": 2, "batch": 8}
    monkeypatch.setattr(compare_trl_ours, "configuration", our_configuration(file))
    turns = Turns()
    result = compare_trl_ours.run(job, turns)
    curves = result["curves"]
    assert set(curves) == {"score", "kl", "length", "eos_rate"}
    assert all(len(values) == 2 and np.isfinite(values).all() for values in curves.values())
    assert curves["kl"][0] == 0 and curves["kl"][1] != 0  # the policy starts as its reference, and then moves
    assert set(result["phases"]) == set(compare_trl_ours.PHASES) and len(turns.seconds) == len(turns.cpu_seconds) == 2
    start = load_pretrained(tmp_path / "value", head="scalar", new_head=False)
    again = load_pretrained(tmp_path / "actor")
    np.testing.assert_array_equal(
        start.params["embed"]["embedding"], again.params["embed"]["embedding"]
    )  # the critic before training has the actor's body
    moved = load_pretrained(tmp_path / "trained")
    assert not np.array_equal(moved.params["embed"]["embedding"], again.params["embed"]["embedding"])
    if importlib.util.find_spec("trl"):
        monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
        check_peer(job, file, section, curves, monkeypatch)


def check_peer(job, file, section, ours, monkeypatch):
    """TRL's side of the same job: its own parser reads the same file, and its records have the documented names."""
    import compare_trl_peer as peer
    from trl import ModelConfig, ScriptArguments, TrlParser

    def configuration(settings, folder, seed):
        here = {"use_cpu": True, "bf16": False, "gradient_checkpointing": False, "lr_scheduler_type": "constant"}
        words = [f"--{name}={value}" for name, value in (SMALL | here).items()]
        parser = TrlParser((ScriptArguments, peer.PPOConfig, ModelConfig))
        given = parser.parse_args_and_config(["--config", str(file), *words])[1]
        changed = {"output_dir": str(folder), "seed": seed, "save_strategy": "no", "num_sample_generations": 0}
        return dataclasses.replace(given, **changed)

    monkeypatch.setattr(peer, "configuration", configuration)
    logs = []

    class Recorded(peer.Logs):
        def __init__(self):
            super().__init__()
            logs.append(self)

    monkeypatch.setattr(peer, "Logs", Recorded)
    theirs = peer.run(job, Turns())["curves"]
    assert theirs["kl"][0] == pytest.approx(0, abs=1e-5) and len(theirs["score"]) == 2
    assert abs(np.mean(theirs["score"]) - np.mean(ours["score"])) < 3  # of demo_quality's -2 to 5
    names = set(re.findall(r"`((?:objective|policy|loss|val)/\w+)`", section))
    assert len(names) == 13 and names <= set(logs[0].records[-1])


def test_the_reward_is_the_demos_quality_of_rendered_prompts():
    rendered = [f"Human: {question} Assistant:" for question in QUESTIONS]
    answers = ["2 plus 2 is 4.", "Of course! Snow is white.", "Not you again.", "A cow says woof."]
    expected = [demo_quality(q, a) for q, a in zip(QUESTIONS, answers, strict=True)]
    assert quality(rendered, answers) == expected
    assert expected == [3, 4, -1, 0]
    with pytest.raises(KeyError):
        quality(["Human: What is love? Assistant:"], [""])


@pytest.mark.parametrize(
    ("ours", "theirs", "verdict"),
    [
        ([4.0, 4.1, 4.2], [3.0, 3.1, 3.2], "better"),
        ([3.0, 3.1, 3.2], [4.0, 4.1, 4.2], "worse"),
        ([3.0, 4.0, 5.0], [3.4, 4.4, 5.4], "within noise"),
        ([4.0, 4.0, 4.0], [4.0, 4.0, 4.0], "within noise"),
        ([4.1, 4.1, 4.1], [4.0, 4.0, 4.0], "better"),
    ],
)
def test_a_verdict_is_that_of_the_interval_of_the_difference(ours, theirs, verdict):
    found = compare_trl.compare(ours, theirs)
    low, high = found["difference_95"]
    assert found["verdict"] == verdict
    assert low <= np.mean(ours) - np.mean(theirs) + 1e-12 and high >= np.mean(ours) - np.mean(theirs) - 1e-12
    assert found["ours"]["standard_error"] == pytest.approx(np.std(ours, ddof=1) / np.sqrt(3))


def test_verdicts_take_the_end_the_whole_curve_and_the_seconds():
    ours = [[0.0, 0.0, 4.0, 4.0 + noise] for noise in (0.0, 0.1, 0.2)]
    theirs = [[3.0, 3.0, 3.0, 3.0 + noise] for noise in (0.0, 0.1, 0.2)]
    found = compare_trl.verdicts(runs_of(ours, theirs), final=2)
    assert found["final_reward"]["verdict"] == "better" and found["mean_reward"]["verdict"] == "worse"
    assert found["final_reward"]["ours"]["mean"] == pytest.approx(4.05)
    assert found["seconds"]["ours"]["total"] == 13 and found["seconds"]["trl"]["total"] == 19
    assert found["ratio"]["total"] == pytest.approx(19 / 13) and found["ratio"]["median"] == 3
    text = compare_trl.table(found)
    assert "| 4.050 ± 0.029 | 3.050 ± 0.029 | better |" in text and "× 3.00" in text


def test_a_drawing_has_a_panel_by_iterations_and_one_by_seconds(tmp_path):
    compare_trl.draw(runs_of([[1.0, 2.0]] * 2, [[1.0, 1.5]] * 2), tmp_path / "plots" / "a.svg")
    text = (tmp_path / "plots" / "a.svg").read_text()
    assert "iteration" in text and "seconds, compilation included" in text and "TRL" in text


def test_a_peer_that_is_missing_or_has_no_trl_is_named(tmp_path, monkeypatch):
    missing = str(tmp_path / "nowhere" / "python")
    with pytest.raises(InputError, match=rf"peer_python={missing}: not an interpreter .*pip install"):
        compare_trl.peer_versions(missing)
    bare = fake_interpreter(tmp_path, "echo \"ModuleNotFoundError: No module named 'trl'\" >&2; exit 1")
    with pytest.raises(InputError, match=r"no usable trl.experimental.ppo \(ModuleNotFoundError: .*'trl'\)"):
        compare_trl.peer_versions(bare)
    monkeypatch.chdir(tmp_path)
    fake_interpreter(tmp_path, 'echo a warning; echo \'{"trl": "1.12.0"}\'')
    assert compare_trl.peer_versions("./python") == {"trl": "1.12.0"}


def test_too_few_seeds_or_iterations_are_refused(monkeypatch):
    for flag in ("--seeds", "--iterations"):
        monkeypatch.setattr(sys, "argv", ["compare_trl.py", "--peer_python", "python", flag, "1"])
        with pytest.raises(InputError, match=f"{flag[2:]}=1 must be at least 2"):
            compare_trl.main()


def test_iterations_wait_for_their_turn_and_are_timed():
    replies = io.StringIO()
    turns = Turns(io.StringIO("go\ngo\n"), replies)
    turns.begin()
    turns.begin()
    assert len(turns.seconds) == 1
    turns.end()
    turns.end()  # nothing is at hand any more
    assert len(turns.seconds) == len(turns.cpu_seconds) == 2 and replies.getvalue() == "ready\nready\n"
    with pytest.raises(SystemExit, match="gone"):
        turns.begin()


def test_a_side_that_ends_early_is_told_with_the_end_of_its_log(tmp_path):
    dying = fake_interpreter(tmp_path, "echo the reason >&2; exit 3")
    with pytest.raises(InputError, match=r"the run of trl ended early; the end of .*trl.log:\nthe reason"):
        compare_trl.Side("trl", dying, {}, tmp_path)


def test_a_run_drives_both_sides_through_all_iterations(tmp_path, monkeypatch):
    """Both sides stand-ins that say `ready` before each turn, and write where each turn came."""
    order = tmp_path / "order"
    script = f"""
name=$(basename "$2" .json)
for i in 1 2 3; do echo ready; read line; echo $name >> {order}; done
echo '{{"side": "'$name'"}}' > {tmp_path}/seed/$name-result.json
echo done
"""
    python = fake_interpreter(tmp_path, script)
    rows = {"ids": np.zeros((3, 1, 1)), "mask": np.ones((3, 1, 1))}
    monkeypatch.setattr(compare_trl, "padded", lambda *_: rows)
    monkeypatch.setattr(compare_trl, "load_tokenizer", lambda _: None)
    monkeypatch.setattr(compare_trl, "pad_token_id", lambda _: 0)
    settings = {"iterations": 3, "batch": 1}
    found = compare_trl.run_seed(0, tmp_path, range(5), {"ours": python, "trl": python}, settings, tmp_path / "seed")
    assert found == {"ours": {"side": "ours"}, "trl": {"side": "trl"}}
    assert order.read_text().split() == ["trl", "ours", "ours", "trl", "trl", "ours"]
    job = json.loads((tmp_path / "seed" / "trl.json").read_text())
    assert {"settings", "seed", "actor", "value", "prompts", "trained", "result"} == set(job)


def test_prompts_are_padded_on_the_left_to_the_longest_of_all(demo):
    data, _ = load_data(
        DataConfig.create(data_path=(demo.train,), data_cache_dir=demo.cache, max_prompt_seq_len=32),
        demo.tokenizer,
        "ppo",
    )
    found = compare_trl.padded(data, np.array([[2, 0]]), 0)
    width = int(data.lengths(range(len(data))).max())
    assert found["ids"].shape == found["mask"].shape == (1, 2, width)
    for place, row in enumerate((2, 0)):
        real = found["ids"][0, place][found["mask"][0, place]]
        assert demo.tokenizer.decode(real, skip_special_tokens=True) == data.text(row)["prompt"]
        assert found["mask"][0, place, -1] and len(real) == data.lengths([row])[0, 0]


def test_committed_results_keep_their_bounds():
    """As measured on the machine that the file names: the bounds are claims about it, not about this one."""
    result = json.loads((FOLDER / "results" / "compare_trl.json").read_text())
    assert result["peer"]["trl"] == "1.12.0" and len(result["runs"]) >= 3
    assert "worse" not in {result[name]["verdict"] for name in ("final_reward", "mean_reward", "held_out_reward")}
    assert result["ratio"]["total"] > 1 and result["ratio"]["cpu_total"] > 1
    assert compare_trl.verdicts(result["runs"])["ratio"] == pytest.approx(result["ratio"], abs=1e-3)
    text = (FOLDER.parent / "docs" / "learning.md").read_text()
    assert all(line in text for line in compare_trl.table(result).splitlines()[2:])


def chat_run(seconds: float, reward: float) -> dict:
    curve = {"reward": [0.0] * 5 + [reward] * 5, "completions/mean_length": [64.0] * 10}
    return {"seconds": [9.0] + [seconds] * 9, "peak_gib": 4.0, "curves": curve, "held_out": {}}


def test_the_chat_trainers_are_compared_by_their_last_steps_and_later_seconds():
    runs = {str(seed): {"ours": chat_run(2.0, 0.5 + seed), "trl": chat_run(3.0, 0.5 - seed)} for seed in (0, 1)}
    found = compare_trl_chat.table(runs)
    assert found["reward, last 5 steps"]["ours"]["mean"] == 1.0 and found["reward, last 5 steps"]["trl"]["mean"] == 0.0
    lines = list(compare_trl_chat.markdown(found))
    assert "| seconds of a later step, median | 2.000 ± 0.000 | 3.000 ± 0.000 | × 1.50 |" in lines
    single = compare_trl_chat.table({"0": runs["0"]})  # one seed has no standard error
    assert "| seconds of the first step | 9.000 | 9.000 | × 1.00 |" in compare_trl_chat.markdown(single)


def test_rows_of_preferences_become_conversations_of_each_trainer():
    row = {"prompt": "Why?", "chosen": "So.", "rejected": "No."}
    sft, dpo, grpo = (compare_trl_chat.conversation(trainer, row) for trainer in ("sft", "dpo", "grpo"))
    assert sft["completion"] == dpo["chosen"] == [{"role": "assistant", "content": "So."}]
    assert dpo["rejected"] == [{"role": "assistant", "content": "No."}]
    assert set(grpo) == {"prompt"} and grpo["prompt"] == [{"role": "user", "content": "Why?"}]


def test_a_brief_response_has_the_whole_reward():
    answers = ["word " * n for n in (20, 50, 200)]
    assert brief(answers) == [1, 0.5, 0]
    assert brief([[{"role": "assistant", "content": answers[1]}]]) == [0.5]
