"""A reward model on real preference pairs, beside what the lengths of the answers alone give.

    python benchmarks/reward_on_pairs.py --data_path train.jsonl --eval_data_path eval.jsonl --tokenizer_name_or_path X

A small language model from random weights is trained on all different answers, chosen or not, a reward model is made
of it on the pairs, and its evaluations go to benchmarks/results/reward_on_pairs.json and to
docs/learning/reward_on_pairs.svg. Runs lie in runs/reward_on_pairs; a finished step is kept, an interrupted one
continues from its newest checkpoint.
"""

import argparse
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import minimize
from scipy.sparse import csr_matrix, hstack, lil_matrix
from scipy.special import expit

from jaxrlhf.bench.record import write
from jaxrlhf.bench.render import save_svg
from jaxrlhf.config.files import write_text_atomic
from jaxrlhf.runs.checkpoints import list_checkpoints
from jaxrlhf.runs.report import read_curves
from jaxrlhf.trainers.reward import RewardConfig, train_reward
from jaxrlhf.trainers.sft import SFTConfig, train_sft

ROOT = Path(__file__).resolve().parent
RUNS = Path("runs/reward_on_pairs")
# GPT-2's positions are learned and its dropout is on: the first lets a small model read off how long an answer is, the
# second keeps it from learning by heart the answers that many pairs have in common.
SHAPE = {"n_embd": 128, "n_layer": 4, "n_head": 4, "n_positions": 384}
COMMON = {"weight_decay": 0.1, "warmup_steps": 30, "save_steps": 100, "logging_steps": 20, "eval_steps": 100}
SFT = {
    "max_length": 192,
    "max_steps": 1200,
    "per_device_train_batch_size": 16,
    "per_device_eval_batch_size": 16,
    "learning_rate": 2e-3,
}
SFT |= {"train_on": "everything", "packing": False, "model_type": "gpt2", "config_overrides": SHAPE}
REWARD = {"max_length": 320, "max_steps": 400, "per_device_train_batch_size": 16, "per_device_eval_batch_size": 24}
REWARD |= {"learning_rate": 3e-4, "eval_steps": 50}
SIDES = ("chosen", "rejected")
PICKS = {"accuracy": max, "loss": min}
SHOWN = ("accuracy", "length_baseline", "accuracy_similar_length")


def answers(pairs: str) -> str:
    """A file of every different answer of these pairs with its prompt, as rows for SFT."""
    different = dict.fromkeys((row["prompt"], row[side]) for row in read(pairs) for side in SIDES)
    lines = [json.dumps({"prompt": prompt, "chosen": answer}) for prompt, answer in different]
    write_text_atomic(RUNS / "answers.jsonl", "\n".join(lines) + "\n")
    return str(RUNS / "answers.jsonl")


def read(path: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def logistic(x: Any, held_out: Any, decay: float) -> dict[str, float]:
    """A logistic model of the pairs' differences `x` with weight decay: its share right and loss on those held out."""

    def loss(w: np.ndarray) -> tuple[float, np.ndarray]:
        z = x @ w
        return np.logaddexp(0, -z).mean() + decay * w @ w / 2, -(x.T @ expit(-z)) / len(z) + decay * w

    found = held_out @ minimize(loss, np.zeros(x.shape[1]), jac=True, method="L-BFGS-B").x
    return {"accuracy": float((found > 0).mean()), "loss": float(np.logaddexp(0, -found).mean())}


def baselines(data: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Accuracy from lengths alone, and from lengths with the counts of words that at least 20 training answers hold.

    The words' weight decay is the best of five for the held-out pairs, so theirs are upper bounds.
    """
    pairs = [read(data["data_path"]), read(data["eval_data_path"])]
    words = [[[re.findall(r"\w+|[^\w\s]", row[side].lower()) for side in SIDES] for row in rows] for rows in pairs]
    seen = Counter(word for pair in words[0] for answer in pair for word in set(answer))
    column = {word: i for i, word in enumerate(word for word, count in seen.items() if count >= 20)}

    def lengths(rows: list[dict[str, Any]]) -> np.ndarray:
        sizes = np.array([[len(row[side]) for side in SIDES] for row in rows])
        return np.stack([np.log1p(sizes), sizes / 1000]) @ np.array([1, -1])

    def counts(rows: list[list[list[str]]]) -> Any:
        found = lil_matrix((len(rows), len(column)))
        for i, pair in enumerate(rows):
            for answer, sign in zip(pair, (1, -1), strict=True):
                for word, count in Counter(answer).items():
                    if word in column:
                        found[i, column[word]] += sign * np.log1p(count)
        return found.tocsr()

    of_length = [3 * lengths(rows).T for rows in pairs]
    of_words = [hstack([counts(rows), csr_matrix(x)]).tocsr() for rows, x in zip(words, of_length, strict=True)]
    several = [logistic(*of_words, decay) for decay in (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)]
    return {
        "lengths": logistic(*of_length, 0.0),
        "words": {k: pick(x[k] for x in several) for k, pick in PICKS.items()},
    }


def train(data: dict[str, Any]) -> None:
    sft, reward = RUNS / "sft", RUNS / "reward"
    texts = data | {"data_path": answers(data["data_path"])}
    configs = [
        (
            train_sft,
            SFTConfig.create(**(texts | COMMON | SFT), output_dir=str(sft), resume=bool(list_checkpoints(sft))),
        ),
        (
            train_reward,
            RewardConfig.create(
                **({k: v for k, v in data.items() if k != "tokenizer_name_or_path"} | COMMON | REWARD),
                model_name_or_path=str(sft),
                output_dir=str(reward),
                resume=bool(list_checkpoints(reward)),
            ),
        ),
    ]
    for run, config in configs:
        if not (Path(config.folder.output_dir) / "summary.json").is_file():
            run(config)


def evaluations(run: Path) -> dict[str, list[list[float]]]:
    curves = read_curves(run / "metrics.jsonl")
    names = [name for name in curves if name.startswith("eval/")]
    return {n: [[s, v] for s, v in zip(curves[n].steps, curves[n].values, strict=True)] for n in names}


def plot(curves: dict[str, list[list[float]]], limits: dict[str, dict[str, float]], path: Path) -> None:
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context({"svg.hashsalt": "pairs", "font.size": 8, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(7.2, 2.6), layout="constrained")
        left, right = figure.subplots(1, 2)
        for name in SHOWN:
            left.plot(*zip(*curves[f"eval/{name}"], strict=True), "o-", markersize=3, linewidth=1.1, label=name)
        left.set_title("held-out pairs", fontsize=8)
        right.plot(*zip(*curves["eval/loss"], strict=True), "o-", markersize=3, linewidth=1.1, label="eval/loss")
        for name, line in (("lengths", "--"), ("words", ":")):
            right.axhline(limits[name]["loss"], linestyle=line, color="grey", linewidth=1, label=f"logistic: {name}")
        right.set_title("held-out loss (log 2 = 0.693 says nothing)", fontsize=8)
        for axes in (left, right):
            axes.set_xlabel("step")
            axes.legend(frameon=False)
        save_svg(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("data_path", "eval_data_path", "tokenizer_name_or_path"):
        parser.add_argument(f"--{name}", required=True)
    data = vars(parser.parse_args())
    limits = baselines(data)
    train(data)
    curves, base = evaluations(RUNS / "reward"), evaluations(RUNS / "sft")
    summary = json.loads((RUNS / "reward" / "summary.json").read_text(encoding="utf-8"))
    named = " ".join(f"--{name} {Path(value).name}" for name, value in data.items())
    result = {
        "command": f"python benchmarks/reward_on_pairs.py {named}",
        "model": SHAPE,
        "sft": {k: v for k, v in (COMMON | SFT).items() if k != "config_overrides"},
        "reward": COMMON | REWARD,
        "steps": summary["steps"],
        "seconds": summary["seconds"],
        "sft_eval_loss": [base["eval/loss"][0][1], base["eval/loss"][-1][1]],
        "figures": {name.removeprefix("eval/"): points[-1][1] for name, points in curves.items()},
        "logistic": limits,
        "curves": curves,
    }
    write(ROOT / "results" / "reward_on_pairs.json", result)
    plot(curves, limits, ROOT.parent / "docs" / "learning" / "reward_on_pairs.svg")
    print(json.dumps(result["figures"] | {"logistic": limits}, indent=2))


if __name__ == "__main__":
    main()
