"""Learning experiments on the embedded demo data: each from several seeds, with metrics, curves and a bound.

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
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxrlhf.bench.record import write
from jaxrlhf.bench.render import save_svg
from jaxrlhf.commands.demo import DemoConfig, rlhf_config
from jaxrlhf.commands.rlhf import RLHFConfig, step_configs
from jaxrlhf.config import default_of
from jaxrlhf.config.files import write_text_atomic
from jaxrlhf.data import (
    demo_quality,
    encode_prompts,
    load_data,
    load_text,
    load_tokenizer,
    materialize_demo,
    pad_token_id,
)
from jaxrlhf.data.settings import cache_folder
from jaxrlhf.engine import HybridEngine, SamplingConfig
from jaxrlhf.models import load_pretrained, save_pretrained
from jaxrlhf.objectives import win_rate
from jaxrlhf.rl.algorithms import find_algorithm
from jaxrlhf.rl.config import PPOConfig
from jaxrlhf.rl.models import RLHFEngine
from jaxrlhf.rl.run import train_ppo
from jaxrlhf.rl.trainer import PPOTrainer
from jaxrlhf.runs.report import read_curves
from jaxrlhf.sharding import make_mesh
from jaxrlhf.trainers.dpo import train_dpo
from jaxrlhf.trainers.kto import KTOConfig, train_kto
from jaxrlhf.trainers.optimizer import OptimizerConfig, make_optimizer
from jaxrlhf.trainers.references import ReferencedConfig
from jaxrlhf.trainers.reward import train_reward
from jaxrlhf.trainers.sft import OBJECTIVE, train_sft
from jaxrlhf.trainers.supervised import init_state, train_step

ROOT = Path(__file__).resolve().parent
RESULTS = ROOT / "results" / "learning"
PLOTS = ROOT.parent / "docs" / "learning"
RUNS = Path("runs/learning")
ANSWERS = 4  # sampled per held-out question
BLOCK = 64  # tokens of a block of pretraining text
PRETRAINING_STEPS = 400
QUALITY, SLOW = (f"{ROOT}/slow_quality.py:{name}" for name in ("quality", "slow_quality"))


class Outcome(NamedTuple):
    """Result of one seed: metrics by name, and curves by name as [step, value] pairs."""

    figures: dict[str, float]
    curves: dict[str, list[list[float]]]


class Experiment(NamedTuple):
    run: Callable[[int, Path], Outcome]
    title: str
    bound: str
    """Condition that holds for every seed, in words."""
    holds: Callable[[dict[str, float]], bool]


# ---- what experiments share


def demo_settings(seed: int, folder: Path) -> RLHFConfig:
    """The demo's settings under another seed, which is also that of its data's order and of sampling."""
    return rlhf_config(DemoConfig.create(output_dir=str(folder), seed=seed)).replace(overwrite_output_dir=True)


def sft_model(seed: int) -> Path:
    """The folder of the demo's SFT model of this seed, trained unless it is there."""
    folder = RUNS / f"base-{seed}"
    config = step_configs(demo_settings(seed, folder))["sft"]
    if not (folder / "sft" / "summary.json").is_file():
        train_sft(config)
    return folder / "sft"


def curves_of(run: Path, names: Sequence[str]) -> dict[str, list[list[float]]]:
    """These metrics of a run folder, rounded for the plot."""
    found = read_curves(run / "metrics.jsonl")
    return {n: [[s, float(f"{v:.4g}")] for s, v in zip(found[n].steps, found[n].values, strict=True)] for n in names}


def held_out_questions() -> list[str]:
    rows = materialize_demo(cache_folder(demo_settings(0, RUNS).data)).eval.read_text(encoding="utf-8").splitlines()
    return sorted({json.loads(row)["prompt"] for row in rows})


def true_qualities(model: Path, seed: int) -> np.ndarray:
    """`[questions, ANSWERS]`: the demo's quality rule (-2 to 5) of sampled answers to the held-out questions.

    The keys of the samples are the same for every model.
    """
    tokenizer, questions = load_tokenizer(model), held_out_questions()
    prompts = encode_prompts(tokenizer, [question for question in questions for _ in range(ANSWERS)])
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


# ---- the experiments


def preferences(name: str, **options: Any) -> Callable[[int, Path], Outcome]:
    """A trainer on preferences from the SFT model, against which it is judged by the demo's true quality rule."""

    def run(seed: int, folder: Path) -> Outcome:
        start = sft_model(seed)
        given = {"per_device_train_batch_size": 32, "per_device_eval_batch_size": 100, "warmup_ratio": 0.05}
        given |= {"max_steps": 200, "learning_rate": 1e-4, "eval_steps": 25, "logging_steps": 25} | options
        config, train = step_configs(demo_settings(seed, folder).replace(alignment="dpo"))["dpo"], train_dpo
        if name == "kto":
            shared = {field.name: getattr(config, field.name) for field in fields(ReferencedConfig)}
            config, train = KTOConfig(**shared), train_kto
        config = config.replace(model_name_or_path=str(start), **given)
        begin = time.monotonic()
        train(config)
        seconds = time.monotonic() - begin
        before, after = (true_qualities(Path(model), seed) for model in (start, config.folder.output_dir))
        own = ("logps/chosen", "logps/rejected") if name == "kto" else ("eval/rewards/accuracies", "rewards/accuracies")
        names = ("eval/rewards/margins", "rewards/margins", *own, "loss")
        curves = curves_of(Path(config.folder.output_dir), names)
        figures = {
            "win_rate": float(win_rate(after, before)),
            "better": float(np.mean(after > before)),
            "equal": float(np.mean(after == before)),
            "quality_sft": float(before.mean()),
            f"quality_{name}": float(after.mean()),
        }
        if accuracies := curves.get("eval/rewards/accuracies"):
            figures["eval_accuracy"] = accuracies[-1][1]
        return Outcome(figures | {"seconds": round(seconds, 1)}, curves)

    return run


def reward_model(seed: int) -> Path:
    """The folder of the demo's reward model of this seed, trained from its SFT model unless it is there."""
    start = sft_model(seed)
    config = step_configs(demo_settings(seed, start.parent))["reward"]
    if not (start.parent / "reward" / "summary.json").is_file():
        train_reward(config)
    return start.parent / "reward"


def text_model() -> tuple[Path, Path]:
    """A model trained on packed text until its loss is flat, and the file of the text: what ptx should keep.

    The text is the demo's conversations; the model starts as the SFT model.
    """
    folder, start = RUNS / "text", sft_model(0)
    file = folder / "conversations.jsonl"
    if not file.is_file():
        demo = materialize_demo(cache_folder(demo_settings(0, RUNS).data))
        rows = [json.loads(line) for line in demo.train.read_text(encoding="utf-8").splitlines()]
        lines = [json.dumps({"text": f"Human: {row['prompt']} Assistant: {row['chosen']}"}) for row in rows]
        write_text_atomic(file, "\n".join(lines) + "\n")
    if not (folder / "lm" / "config.json").is_file():
        tokenizer, config = load_tokenizer(start), OptimizerConfig(1e-3, lr_scheduler_type="linear")
        options = {
            "field": "text",
            "block": BLOCK,
            "held_out": 0.05,
            "cache": cache_folder(demo_settings(0, RUNS).data),
        }
        blocks, _ = load_text((str(file),), tokenizer, **options)
        model = load_pretrained(start, mesh=make_mesh())
        state = init_state(model, make_optimizer(config, PRETRAINING_STEPS, model.params), make_mesh())
        for step in range(PRETRAINING_STEPS):
            batch = blocks.batch(blocks.indices(step, 64))
            state, metrics = train_step(state, batch, jax.random.key(0), objective=OBJECTIVE, micro_batches=1)
            if step % 50 == 0:
                print(f"pretraining {step}/{PRETRAINING_STEPS}: loss {float(metrics['loss']):.4f}", flush=True)
        save_pretrained(model.replace(params=state.params), folder / "lm", tokenizer)
    return folder / "lm", file


def policy_run(seed: int, folder: Path, start: Path | None = None, **options: Any) -> Outcome:
    """The third step of the demo with `options` in place of its own; all seeds from the SFT and reward model of seed 0.

    So the seeds differ in the order of prompts, in sampling and in minibatches, and rewards may be compared.
    """
    start = start or sft_model(0)
    reward = None if options.get("reward_functions") else reward_model(0)
    base = step_configs(demo_settings(seed, folder))["ppo"]
    options = {"eval_steps": 10, "logging_steps": 20, "sample_steps": 0, "num_sample_rows": 0} | options
    models = {"actor_model_name_or_path": str(start), "critic_model_name_or_path": reward and str(reward)}
    config = base.replace(**models, **options)
    begin = time.monotonic()
    train_ppo(config)
    seconds = time.monotonic() - begin
    summary = json.loads((Path(config.folder.output_dir) / "summary.json").read_text(encoding="utf-8"))
    before, after = summary["eval_before"], summary["eval_after"]
    figures = {
        "reward_before": before["scores"],
        "reward_after": after["scores"],
        "reward_spread_before": before["scores_std"],
        "reward_best": summary["eval_best"]["scores"],
        "kl": after["kl"],
        "win_rate": after["win_rate"],
        "response_length": after["response_length"],
        "seconds": round(seconds, 1),
    }
    if config.rewards.reward_functions:
        steps = read_curves(Path(config.folder.output_dir) / "metrics.jsonl")
        for name in ("perf/sequences_per_second", "timing/train", "timing/reward_functions"):
            figures[name] = statistics.median(steps[name].values)
        for name in {"objective/equal_groups", "sampling/equal_groups", "sampling/refills"} & set(steps):
            figures[name] = statistics.mean(steps[name].values)
    names = ["eval/scores", "eval/kl", "objective/scores", "objective/kl", "policy/entropy_avg", "policy/clipfrac_avg"]
    if config.algorithm.ptx_coef:
        figures |= {"text_loss_before": before["ptx_loss"], "text_loss_after": after["ptx_loss"]}
        names.append("eval/ptx_loss")
    if config.algorithm.kl_target:
        names.append("objective/kl_coef")
    if config.algorithm.enable_ema:
        raw, ema = (held_out_scores(Path(config.folder.output_dir) / name, reward, config) for name in (".", "ema"))
        gap = ema - raw
        figures |= {
            "reward_raw": float(raw.mean()),
            "reward_ema": float(ema.mean()),
            "ema_gap_in_errors": float(gap.mean() / (gap.std(ddof=1) / np.sqrt(len(gap)) + 1e-9)),
        }
    return Outcome(figures, curves_of(Path(config.folder.output_dir), names))


def held_out_scores(actor: Path, reward: Path, config: PPOConfig) -> np.ndarray:
    """The reward model's scores of one answer of `actor` to every held-out prompt, with keys of their own."""
    tokenizer = load_tokenizer(actor)
    plain = config.replace(seed=config.data.seed + 1000)
    engine = RLHFEngine(str(actor), str(reward), tokenizer, num_total_iters=1, config=plain)
    _, evaluation = load_data(config.data, tokenizer, "ppo")
    _, records = PPOTrainer(engine, plain).evaluate(engine.state, evaluation, config.run.per_device_eval_batch_size)
    return np.array([record["score"] for record in records])


STEERED = {"kl_target": 6.0, "kl_horizon": 1000.0, "max_steps": 40, "lr_scheduler_type": "linear"}


def ppo(epochs: int, **options: Any) -> Callable[[int, Path], Outcome]:
    """PPO with a moving average that spans a sixteenth of the updates, whatever their number."""
    average = {"ema_decay": 1 - 0.2 / epochs} if options.get("enable_ema", True) else {}
    options = STEERED | {"ppo_epochs": epochs} | average | options
    return lambda seed, folder: policy_run(seed, folder, **options)


def critic_free(estimator: str, **options: Any) -> Callable[[int, Path], Outcome]:
    """An algorithm without a critic, with the defaults for what the demo sets of a critic."""
    unused = {name: default_of(PPOConfig, name) for name in find_algorithm(estimator).unused}
    options = {"whiten_advantages": False, "enable_ema": False, "samples_per_prompt": 4} | options
    options = STEERED | unused | {"advantage_estimator": estimator} | options
    return lambda seed, folder: policy_run(seed, folder, **options)


def ptx(coefficient: float) -> Callable[[int, Path], Outcome]:
    def run(seed: int, folder: Path) -> Outcome:
        start, text = text_model()
        options = {"ptx_coef": coefficient, "ptx_data_path": (str(text),), "ptx_block_size": BLOCK, "enable_ema": False}
        return policy_run(seed, folder, start, **(STEERED | {"ppo_epochs": 2} | options))

    return run


def waiting(steps: int) -> Callable[[int, Path], Outcome]:
    """GRPO from a reward function that takes as long as training, with rollouts `steps` ahead of their updates."""
    options = {"async_steps": steps, "importance_sampling_correction": True, "reward_functions": (SLOW,)}
    return critic_free("grpo", loss_aggregation="sequence-mean", kl_in_loss=True, kl_estimator="k3", **options)


def groups_that_differ() -> Callable[[int, Path], Outcome]:
    """DAPO, which samples further batches in place of groups whose responses all have one score."""
    own = {name: find_algorithm("dapo").defaults[name] for name in ("cliprange_high", "loss_aggregation")}
    options = {"dynamic_sampling": 8, "reward_functions": (QUALITY,), "logging_steps": 1}
    return critic_free("dapo", kl_in_loss=True, kl_estimator="k3", **own, **options)


def wastes_nothing(figures: dict[str, float]) -> bool:
    return improves(figures) and figures["objective/equal_groups"] == 0 < figures["sampling/equal_groups"]


def improves(figures: dict[str, float]) -> bool:
    """At least half a standard deviation of reward gained, no collapse from the best, KL within twice its target.

    Where a moving average was kept, its reward must not be below the last policy's by two standard errors.
    """
    gain = figures["reward_after"] - figures["reward_before"]
    kept = figures["reward_best"] - figures["reward_after"] <= 0.25 * (
        figures["reward_best"] - figures["reward_before"]
    )
    steered = figures["kl"] <= 2 * STEERED["kl_target"]
    averaged = figures.get("ema_gap_in_errors", 0.0) >= -2
    return gain >= 0.5 * figures["reward_spread_before"] and kept and steered and averaged


def keeps_the_text(figures: dict[str, float]) -> bool:
    return figures["text_loss_after"] <= 1.02 * figures["text_loss_before"] and (
        figures["reward_after"] > figures["reward_before"]
    )


RISES = (
    "reward up by half its spread at least, within a quarter of its best at the end, KL at most twice the target of 6"
)
AVERAGES = f"{RISES}, the average's reward within two standard errors of the last policy's or above"
BETTER = "win rate against the SFT model {} %, by the demo's true quality rule, a tie counting half"
EXPERIMENTS = {
    "dpo": Experiment(
        preferences("dpo", beta=0.5),
        "DPO from the SFT model",
        BETTER.format("of at least 70"),
        lambda figures: figures["win_rate"] >= 0.7,
    ),
    "kto": Experiment(
        preferences("kto", beta=0.5),
        "KTO from the SFT model",
        BETTER.format("of at least 60"),
        lambda figures: figures["win_rate"] >= 0.6,
    ),
    "simpo": Experiment(
        preferences("simpo", loss_type=("simpo",), beta=2.0, simpo_gamma=1.0, cpo_alpha=0.2),
        "SimPO from the SFT model, with 0.2 of the SFT loss",
        BETTER.format("above 50"),
        lambda figures: figures["win_rate"] > 0.5,
    ),
    "ppo-1": Experiment(ppo(1), "PPO, one epoch", AVERAGES, improves),
    "ppo-2": Experiment(ppo(2), "PPO, two epochs", AVERAGES, improves),
    "ppo-4": Experiment(ppo(4), "PPO, four epochs", AVERAGES, improves),
    "lora": Experiment(
        ppo(2, lora_r=8, critic_lora_r=8, learning_rate=1e-3, critic_learning_rate=2e-3, enable_ema=False),
        "PPO, two epochs, LoRA of rank 8",
        RISES,
        improves,
    ),
    "grpo": Experiment(
        critic_free("grpo", loss_aggregation="sequence-mean", kl_in_loss=True, kl_estimator="k3", ppo_epochs=2),
        "GRPO, groups of four",
        RISES,
        improves,
    ),
    "rloo": Experiment(critic_free("rloo", loss_aggregation="fixed-length"), "RLOO, groups of four", RISES, improves),
    **{
        f"async-{steps}": Experiment(
            waiting(steps), f"GRPO with a slow reward function, rollouts {steps} steps ahead", RISES, improves
        )
        for steps in (0, 1)
    },
    "dapo": Experiment(
        groups_that_differ(),
        "DAPO with dynamic sampling",
        f"{RISES}; no group of any update has equal scores, though sampled ones have",
        wastes_nothing,
    ),
    "ptx": Experiment(
        ptx(27.8),
        "PPO with pretraining text at 27.8",
        "loss on held-out text at most 2 % above its start, and reward up",
        keeps_the_text,
    ),
    "no-ptx": Experiment(
        ptx(1e-12),
        "The same without the text's gradient (a weight of 1e-12 to measure its loss)",
        "reward up",
        lambda figures: figures["reward_after"] > figures["reward_before"],
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
    """The metrics of an experiment's file as Markdown: a column per seed, and their mean."""
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
        save_svg(figure, PLOTS / f"{name}.svg")
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
