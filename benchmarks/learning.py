"""Learning experiments on the embedded demo data: each from several seeds, with figures, curves and a bound.

    python benchmarks/learning.py dpo                  # three seeds; JSON to benchmarks/results/learning/dpo.json
    python benchmarks/learning.py dpo --seeds 0        # one seed; those in the file already are kept
    python benchmarks/learning.py --plot               # every JSON there as docs/learning/NAME.svg

Runs lie in runs/learning. What a seed shares with other experiments (the SFT model) is trained once; delete the folder
to train it anew. A new experiment is a function `(seed, folder) -> Outcome` and a line in EXPERIMENTS.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxrlhf.bench.record import write
from jaxrlhf.data import demo_quality, encode_prompt, load_tokenizer, materialize_demo, pad_token_id
from jaxrlhf.data.loading import cache_folder
from jaxrlhf.engine import HybridEngine
from jaxrlhf.models import load_pretrained
from jaxrlhf.report import read_curves
from jaxrlhf.sampling import SamplingConfig
from jaxrlhf.trainers.demo import DemoConfig, rlhf_config
from jaxrlhf.trainers.dpo import DPOOptions, train_dpo
from jaxrlhf.trainers.rlhf import step_configs
from jaxrlhf.trainers.sft import train_sft

ROOT = Path(__file__).resolve().parent
RESULTS = ROOT / "results" / "learning"
PLOTS = ROOT.parent / "docs" / "learning"
RUNS = Path("runs/learning")
ANSWERS = 4  # sampled per held-out question


class Outcome(NamedTuple):
    """Of one seed: figures by name, and curves by name as [step, value] pairs."""

    figures: dict[str, float]
    curves: dict[str, list[list[float]]]


class Experiment(NamedTuple):
    run: Callable[[int, Path], Outcome]
    title: str
    bound: str
    """What must hold for every seed, in words."""
    holds: Callable[[dict[str, float]], bool]


# ---- what experiments share


def demo_settings(seed: int, folder: Path) -> Any:
    """The demo's settings under another seed, which is also that of its data's order and of sampling."""
    return replace(rlhf_config(DemoConfig(output_dir=str(folder), seed=seed)), overwrite_output_dir=True)


def sft_model(seed: int) -> Path:
    """The folder of the demo's SFT model of this seed, trained unless it is there."""
    folder = RUNS / f"base-{seed}"
    config = step_configs(demo_settings(seed, folder))["sft"]
    if not (folder / "sft" / "summary.json").is_file():
        train_sft(config)
    return folder / "sft"


def curves_of(run: Path, names: Sequence[str]) -> dict[str, list[list[float]]]:
    """These metrics of a run folder, rounded as they are drawn."""
    found = read_curves(run / "metrics.jsonl")
    return {n: [[s, float(f"{v:.4g}")] for s, v in zip(found[n].steps, found[n].values, strict=True)] for n in names}


def held_out_questions() -> list[str]:
    rows = materialize_demo(cache_folder(demo_settings(0, RUNS))).eval.read_text(encoding="utf-8").splitlines()
    return sorted({json.loads(row)["prompt"] for row in rows})


def true_qualities(model: Path, seed: int) -> np.ndarray:
    """`[questions, ANSWERS]`: the demo's quality rule (-2 to 5) of sampled answers to the held-out questions.

    The draws' keys are the same for every model.
    """
    tokenizer, questions = load_tokenizer(model), held_out_questions()
    prompts = [encode_prompt(tokenizer, question) for question in questions for _ in range(ANSWERS)]
    width = max(map(len, prompts))
    pad = pad_token_id(tokenizer)
    ids = np.array([[pad] * (width - len(prompt)) + prompt for prompt in prompts], np.int32)
    mask = np.array([[False] * (width - len(prompt)) + [True] * len(prompt) for prompt in prompts])
    sampling = SamplingConfig(32, eos_token_id=tokenizer.eos_token_id, pad_token_id=pad)
    rollout = jax.device_get(HybridEngine(load_pretrained(model)).generate(ids, mask, jax.random.key(seed), sampling))
    texts = tokenizer.batch_decode(
        [row[real] for row, real in zip(rollout.tokens, rollout.response_mask, strict=True)], skip_special_tokens=True
    )
    asked = [question for question in questions for _ in range(ANSWERS)]
    return np.array([demo_quality(q, text) for q, text in zip(asked, texts, strict=True)]).reshape(-1, ANSWERS)


def win_rate(ours: np.ndarray, theirs: np.ndarray) -> float:
    """How often an answer of ours is better than one of theirs to the same question; a tie counts half."""
    return float(np.mean((ours > theirs) + 0.5 * (ours == theirs)))


# ---- the experiments


def dpo(seed: int, folder: Path) -> Outcome:
    """DPO from the SFT model, against which it is judged by the demo's true quality rule."""
    start = sft_model(seed)
    options = DPOOptions(
        beta=0.5,
        max_steps=200,
        per_device_train_batch_size=32,
        per_device_eval_batch_size=100,
        learning_rate=1e-4,
        warmup_ratio=0.05,
        eval_steps=25,
        logging_steps=25,
    )
    config = replace(demo_settings(seed, folder), alignment="dpo", dpo=options)
    config = replace(step_configs(config)["dpo"], model_name_or_path=str(start))
    begin = time.monotonic()
    train_dpo(config)
    seconds = time.monotonic() - begin
    before, after = (true_qualities(Path(model), seed) for model in (start, config.output_dir))
    names = ("eval/rewards/accuracies", "eval/rewards/margins", "rewards/accuracies", "rewards/margins", "loss")
    curves = curves_of(Path(config.output_dir), names)
    return Outcome(
        {
            "win_rate": win_rate(after, before),
            "better": float(np.mean(after > before)),
            "equal": float(np.mean(after == before)),
            "quality_sft": float(before.mean()),
            "quality_dpo": float(after.mean()),
            "eval_accuracy": curves["eval/rewards/accuracies"][-1][1],
            "seconds": round(seconds, 1),
        },
        curves,
    )


EXPERIMENTS = {
    "dpo": Experiment(
        dpo,
        "DPO from the SFT model",
        "win rate against the SFT model of at least 70 %, by the demo's true quality rule, a tie counting half",
        lambda figures: figures["win_rate"] >= 0.7,
    ),
}


# ---- running and drawing


def run(name: str, seeds: Sequence[int]) -> dict[str, Any]:
    """Run the seeds, and write each to the experiment's file as soon as it is done."""
    experiment, path = EXPERIMENTS[name], RESULTS / f"{name}.json"
    found = {}
    for seed in seeds:
        outcome = experiment.run(seed, RUNS / f"{name}-{seed}")
        found = json.loads(path.read_text(encoding="utf-8"))["seeds"] if path.is_file() else {}
        found[str(seed)] = {
            "holds": bool(experiment.holds(outcome.figures)),
            "figures": {key: float(f"{value:.6g}") for key, value in outcome.figures.items()},
            "curves": outcome.curves,
        }
        ordered = dict(sorted(found.items(), key=lambda item: int(item[0])))
        write(path, {"experiment": name, "title": experiment.title, "bound": experiment.bound, "seeds": ordered})
        print(f"{name}, seed {seed}: {found[str(seed)]['figures']}", flush=True)
    return found


def table(name: str) -> str:
    """The figures of an experiment's file as Markdown: a column per seed, and their mean."""
    seeds = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))["seeds"]
    lines = [f"| | {' | '.join(f'seed {seed}' for seed in seeds)} | mean |", "|---" * (len(seeds) + 2) + "|"]
    for figure in next(iter(seeds.values()))["figures"]:
        values = [seed["figures"][figure] for seed in seeds.values()]
        lines.append(f"| {figure} | {' | '.join(f'{v:.4g}' for v in [*values, statistics.mean(values)])} |")
    return "\n".join(lines)


def plot(name: str) -> Path:
    """Every curve of the experiment's file, a line per seed, as docs/learning/NAME.svg."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    seeds = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))["seeds"]
    names = list(next(iter(seeds.values()))["curves"])
    with rc_context({"svg.hashsalt": name, "font.size": 8, "axes.spines.top": False, "axes.spines.right": False}):
        columns = min(3, len(names))
        rows = -(-len(names) // columns)
        figure = Figure(figsize=(3.4 * columns, 2.4 * rows), layout="constrained")
        for axes, curve in zip(figure.subplots(rows, columns, squeeze=False).flat, names, strict=False):
            for seed, result in seeds.items():
                axes.plot(*zip(*result["curves"][curve], strict=True), label=f"seed {seed}", linewidth=1.1)
            axes.set_title(curve, fontsize=8)
            axes.set_xlabel("step")
        for axes in list(figure.axes)[len(names) :]:
            axes.set_visible(False)
        figure.axes[0].legend(frameon=False)
        PLOTS.mkdir(parents=True, exist_ok=True)
        figure.savefig(PLOTS / f"{name}.svg", metadata={"Date": None})
    return PLOTS / f"{name}.svg"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiments", nargs="*", help=f"which ones to run: {', '.join(EXPERIMENTS)}")
    parser.add_argument("--seeds", default="0,1,2", help="comma-separated seeds")
    parser.add_argument("--plot", action="store_true", help="draw every result that there is, and print its table")
    arguments = parser.parse_args()
    unknown = [name for name in arguments.experiments if name not in EXPERIMENTS]
    if unknown:
        parser.error(f"there is no experiment {unknown[0]!r}; there are {', '.join(EXPERIMENTS)}")
    held = True
    for name in arguments.experiments:
        found = run(name, [int(seed) for seed in arguments.seeds.split(",")])
        missed = [seed for seed, result in found.items() if not result["holds"]]
        print(f"{name}: {EXPERIMENTS[name].bound}: {f'missed by seeds {missed}' if missed else 'holds for all seeds'}")
        held = held and not missed
    if arguments.plot:
        for name in EXPERIMENTS:
            if (RESULTS / f"{name}.json").is_file():
                print(f"{plot(name)}\n{table(name)}")
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main())
