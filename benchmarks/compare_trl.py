"""Our PPO beside TRL's on the same tiny model, prompts, reward function and settings: reward curves and seconds.

    taskset -c 0,1 python benchmarks/compare_trl.py --peer_python PATH [--json FILE] [--svg FILE]

PATH is the interpreter of an environment of TRL's own, with CPU builds:

    python -m venv peer && peer/bin/pip install torch==2.13.0 trl==1.12.0 transformers

A language model is first fine-tuned on the demo data (or given, --model). Then, seed by seed, both sides run in
processes of their own, an iteration of one and an iteration of the other in turns. At the end our sampler responds
to held-out questions with all policies.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean, median
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np
from compare_trl_side import quality

import jaxrlhf
from jaxrlhf.bench.record import write
from jaxrlhf.bench.render import save_svg
from jaxrlhf.commands.demo import SHAPE
from jaxrlhf.data import DataConfig, load_data, load_tokenizer, pad_token_id
from jaxrlhf.data.demo import materialize_demo
from jaxrlhf.data.order import epoch_units
from jaxrlhf.data.settings import cache_folder
from jaxrlhf.errors import InputError

FOLDER = Path(__file__).resolve().parent
SIDES = ("ours", "trl")
SETTINGS = {
    "batch": 64,
    "mini_batches": 2,
    "epochs": 4,
    "learning_rate": 1e-4,
    "adam_beta1": 0.9,
    "adam_beta2": 0.999,
    "adam_epsilon": 1e-8,
    "answer_length": 32,
    "temperature": 1.0,
    "missing_eos_penalty": 1.0,
    "kl_coef": 0.05,
    "cliprange": 0.2,
    "cliprange_value": 0.2,
    "gamma": 1.0,
    "lam": 0.95,
}
"""TRL's defaults, but for the batch, the penalty (TRL: none), and learning rate and temperature, for a tiny model."""
FINAL = 10  # iterations at the end whose mean is a run's final reward
PROBE = """
import json, sys
import accelerate, torch, transformers, trl
from trl.experimental.ppo import PPOConfig, PPOTrainer
print(json.dumps({"python": sys.version.split()[0]} | {m.__name__: m.__version__ for m in (torch, transformers, trl)}))
"""


def peer_versions(python: str) -> dict[str, str]:
    """Versions in the peer's interpreter; InputError when it is missing, or cannot import TRL's PPO."""
    install = "make one with `python -m venv peer` and `peer/bin/pip install torch==2.13.0 trl==1.12.0 transformers`"
    if os.sep in python:
        python = os.path.abspath(python)  # not its target: that is the interpreter of no environment
    try:
        # In another folder than the repository's, whose kernels/ would hide a package of that name.
        done = subprocess.run([python, "-c", PROBE], capture_output=True, text=True, env=environment(), cwd=FOLDER)
    except OSError as error:
        raise InputError(
            f"peer_python={python}: not an interpreter that can be started ({error.strerror}); {install}, then name "
            "peer/bin/python"
        ) from error
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise InputError(f"peer_python={python}: has no usable trl.experimental.ppo ({last}); {install}")
    return json.loads(done.stdout.splitlines()[-1])


def environment() -> dict[str, str]:
    """For both sides alike. Threads of torch that wait sleep: spinning, they would hold up what they wait for."""
    own = {"JAX_PLATFORMS": "cpu", "OMP_WAIT_POLICY": "passive", "TRL_EXPERIMENTAL_SILENCE": "1"}
    return os.environ | own | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def language_model(folder: Path) -> Path:
    """Four layers of width 128, fine-tuned on the demo's good answers."""
    shared = {"data_path": ("demo",), "data_split": "2,4,4", "max_length": 64, "mesh_fsdp": 1, "dtype": "float32"}
    config = jaxrlhf.SFTConfig.create(
        **shared,
        output_dir=str(folder),
        overwrite_output_dir=True,
        model_type="llama",
        config_overrides=SHAPE,
        tokenizer_name_or_path=str(materialize_demo(cache_folder(DataConfig())).tokenizer),
        packing=False,
        max_steps=400,
        per_device_train_batch_size=32,
        per_device_eval_batch_size=100,
        learning_rate=2e-3,
        warmup_ratio=0.05,
        logging_steps=100,
    )
    jaxrlhf.train_sft(config)
    return folder


def prompt_data(tokenizer: Any) -> tuple[Any, Any]:
    config = DataConfig(data_path=("demo",), data_split="2,4,4", max_prompt_seq_len=32)
    return load_data(config, tokenizer, "ppo")


def padded(data: Any, rows: np.ndarray, pad_id: int) -> dict[str, np.ndarray]:
    """Prompts of the rows, padded on the left to the longest of all data: ids and mask `[*rows.shape, P]`."""
    width = int(data.lengths(range(len(data))).max())
    ids = np.full((*rows.shape, width), pad_id, np.int32)
    mask = np.zeros(ids.shape, bool)
    for place, row in np.ndenumerate(rows):
        ((prompt, _),) = data.sequences(data.read([row], None))[0]
        ids[place][width - len(prompt) :] = prompt
        mask[place][width - len(prompt) :] = True
    return {"ids": ids, "mask": mask}


class Side:
    """A process that does iterations on command."""

    def __init__(self, name: str, python: str, job: dict[str, Any], folder: Path) -> None:
        self.name, self.log = name, folder / f"{name}.log"
        path = folder / f"{name}.json"
        path.write_text(json.dumps(job), encoding="utf-8")
        script = FOLDER / f"compare_trl_{'ours' if name == 'ours' else 'peer'}.py"
        with self.log.open("w") as log:
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": log}
            self.process = subprocess.Popen(
                [python, str(script), str(path)], text=True, bufsize=1, env=environment(), **pipes
            )
        self.expect("ready")

    def expect(self, word: str) -> None:
        if self.process.stdout.readline().strip() != word:
            self.process.kill()
            tail = "\n".join(self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-5:])
            raise InputError(f"the run of {self.name} ended early; the end of {self.log}:\n{tail}")

    def iteration(self, last: bool) -> None:
        print("go", file=self.process.stdin, flush=True)
        self.expect("done" if last else "ready")


def run_seed(seed: int, actor: Path, prompts: Any, python: dict[str, str], settings: dict, folder: Path) -> dict:
    """Both sides' results under one seed; their policies lie in `folder/NAME-policy`."""
    folder.mkdir(parents=True, exist_ok=True)
    shape = settings["iterations"], settings["batch"]
    rows = epoch_units(np.arange(np.prod(shape)), len(prompts), seed).reshape(shape)
    np.savez(folder / "prompts.npz", **padded(prompts, rows, pad_token_id(load_tokenizer(actor))))
    shared = {"settings": settings, "seed": seed, "actor": str(actor), "value": str(folder / "value")}
    shared["prompts"] = str(folder / "prompts.npz")
    sides: list[Side] = []
    try:
        for name in SIDES:  # ours first: it writes the critic's start
            own = {"trained": str(folder / f"{name}-policy"), "result": str(folder / f"{name}-result.json")}
            sides.append(Side(name, python[name], shared | own, folder))
        for i in range(settings["iterations"]):
            for side in sides if i % 2 else sides[::-1]:
                side.iteration(last=i + 1 == settings["iterations"])
    finally:
        for side in sides:
            side.process.stdin.close()
            if side.process.poll() is None and sys.exc_info()[0] is not None:
                side.process.kill()
            side.process.wait()
    return {name: json.loads((folder / f"{name}-result.json").read_text(encoding="utf-8")) for name in SIDES}


def held_out_score(folder: Path, data: Any) -> float:
    """Mean quality of one response to each held-out prompt; our sampler takes the same keys every time."""
    tokenizer = load_tokenizer(folder)
    engine = jaxrlhf.HybridEngine(jaxrlhf.models.load_pretrained(folder))
    sampling = jaxrlhf.SamplingConfig(
        SETTINGS["answer_length"], eos_token_id=tokenizer.eos_token_id, pad_token_id=pad_token_id(tokenizer)
    )
    prompts = padded(data, np.arange(len(data)), pad_token_id(tokenizer))
    rollout = jax.device_get(engine.generate(prompts["ids"], prompts["mask"], jax.random.key(0), sampling))
    texts = []
    for part in (rollout.mask & ~rollout.response_mask, rollout.response_mask):
        ids = [row[keep] for row, keep in zip(rollout.tokens, part, strict=True)]
        texts.append(tokenizer.batch_decode(ids, skip_special_tokens=True))
    return mean(quality(*texts))


def compare(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, Any]:
    """Means of two sets of runs with standard errors, the 95 % interval of ours less theirs (Welch), and a verdict.

    "better" or "worse" where the interval lies wholly above or below 0, else "within noise". Needs two runs a side.
    """
    from scipy import stats

    errors = [float(np.std(values, ddof=1)) / len(values) ** 0.5 for values in (ours, theirs)]
    difference, error = mean(ours) - mean(theirs), float(np.hypot(*errors))
    half = 0.0
    if error > 0:
        sizes = (len(ours), len(theirs))
        freedom = error**4 / sum(e**4 / (n - 1) for e, n in zip(errors, sizes, strict=True))
        half = float(stats.t.ppf(0.975, freedom)) * error
    low, high = difference - half, difference + half
    verdict = "better" if low > 0 else "worse" if high < 0 else "within noise"
    sides = {
        name: {"mean": mean(values), "standard_error": e, "runs": list(values)}
        for name, values, e in zip(SIDES, (ours, theirs), errors, strict=True)
    }
    return sides | {"difference_95": [low, high], "verdict": verdict}


def verdicts(runs: Sequence[dict[str, dict]], final: int = FINAL) -> dict[str, Any]:
    """Rewards at the end and over the whole run; seconds of each side, and their ratios, TRL / ours."""

    def score(name: str, of: Callable[[list[float]], float]) -> list[float]:
        return [of(run[name]["curves"]["score"]) for run in runs]

    def seconds(name: str) -> dict[str, float]:
        found = {"setup": mean(run[name]["setup_seconds"] for run in runs)}
        for key, clock in (("", "seconds"), ("cpu_", "cpu_seconds")):
            later = [s for run in runs for s in run[name][clock][1:]]
            found |= {
                f"{key}total": mean(sum(run[name][clock]) for run in runs),
                f"{key}first": mean(run[name][clock][0] for run in runs),
                f"{key}median": median(later),
                f"{key}min": min(later),
            }
        return found

    times = {name: seconds(name) for name in SIDES}
    return {
        "final_reward": compare(*(score(name, lambda curve: mean(curve[-final:])) for name in SIDES)),
        "mean_reward": compare(*(score(name, mean) for name in SIDES)),
        "seconds": times,
        "ratio": {kind: times["trl"][kind] / times["ours"][kind] for kind in times["ours"]},
    }


def table(found: dict[str, Any]) -> str:
    """The metrics of `verdicts` as Markdown."""
    rewards = {"final_reward": f"reward, last {FINAL} iterations", "mean_reward": "reward, whole run"}
    rewards["held_out_reward"] = "reward on held-out questions, afterwards"
    times = {"setup": "seconds before the first iteration"}
    for key, text in (("", "seconds"), ("cpu_", "CPU seconds")):
        times |= {
            f"{key}first": f"{text} of the first iteration, with compilation",
            f"{key}median": f"{text} of a later iteration, median",
            f"{key}min": f"{text} of a later iteration, least",
            f"{key}total": f"{text} of all iterations",
        }
    lines = ["| | ours | TRL | |", "|---|---|---|---|"]
    for key, text in rewards.items():
        if key in found:
            cells = [f"{found[key][name]['mean']:.3f} ± {found[key][name]['standard_error']:.3f}" for name in SIDES]
            lines.append(f"| {text} | {cells[0]} | {cells[1]} | {found[key]['verdict']} |")
    for key, text in times.items():
        cells = [f"{found['seconds'][name][key]:.3g}" for name in SIDES]
        lines.append(f"| {text} | {cells[0]} | {cells[1]} | × {found['ratio'][key]:.2f} |")
    return "\n".join(lines)


def draw(runs: Sequence[dict[str, dict]], path: Path) -> None:
    """Reward against iterations and against seconds: each run, and the mean of each side."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context({"svg.fonttype": "none", "svg.hashsalt": path.stem, "font.size": 9}):
        figure = Figure(figsize=(8, 3), layout="constrained")
        left, right = figure.subplots(1, 2, sharey=True)
        for name, colour in zip(SIDES, ("#3366aa", "#cc7722"), strict=True):
            scores = np.array([run[name]["curves"]["score"] for run in runs])
            seconds = np.cumsum([run[name]["seconds"] for run in runs], axis=1)
            steps = np.arange(scores.shape[1])
            for axes, x in ((left, np.tile(steps, (len(runs), 1))), (right, seconds)):
                for one, curve in zip(x, scores, strict=True):
                    axes.plot(one, curve, color=colour, linewidth=0.8, alpha=0.35)
                axes.plot(x.mean(axis=0), scores.mean(axis=0), color=colour, label={"trl": "TRL"}.get(name, name))
        left.set_xlabel("iteration")
        right.set_xlabel("seconds, compilation included")
        left.set_ylabel("mean reward of the batch")
        left.legend(frameon=False)
        for axes in (left, right):
            axes.spines[["top", "right"]].set_visible(False)
        save_svg(figure, path)


def rounded(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, 4)
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    return [rounded(item) for item in value] if isinstance(value, list) else value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer_python", required=True, metavar="PATH", help="interpreter of TRL's own environment")
    parser.add_argument("--model", type=Path, metavar="FOLDER", help="default: one is fine-tuned on the demo data")
    parser.add_argument("--iterations", type=int, default=40)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--learning_rate", type=float, default=SETTINGS["learning_rate"])
    parser.add_argument("--work_dir", type=Path, default=Path("runs/compare_trl"), metavar="FOLDER")
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--svg", type=Path, metavar="FILE")
    args = parser.parse_args()
    for name, least in (("seeds", 2), ("iterations", 2)):
        if getattr(args, name) < least:
            raise InputError(f"{name}={getattr(args, name)} must be at least {least}")
    versions = peer_versions(args.peer_python)
    print(", ".join(f"{name} {version}" for name, version in versions.items()), flush=True)
    settings = SETTINGS | {"iterations": args.iterations, "learning_rate": args.learning_rate}
    work = args.work_dir.resolve()
    actor = args.model.resolve() if args.model else language_model(work / "sft")
    prompts, held_out = prompt_data(load_tokenizer(actor))
    runs = []
    python = {"ours": sys.executable, "trl": args.peer_python}
    for seed in range(args.seeds):
        runs.append(run_seed(seed, actor, prompts, python, settings, work / f"seed-{seed}"))
        ends = {name: mean(runs[-1][name]["curves"]["score"][-FINAL:]) for name in SIDES}
        print(f"seed {seed}: " + ", ".join(f"{name} {end:.3f}" for name, end in ends.items()), flush=True)
    found = verdicts(runs)
    after = {name: [] for name in SIDES}
    for seed in range(args.seeds):
        for name in SIDES:
            after[name].append(held_out_score(work / f"seed-{seed}" / f"{name}-policy", held_out))
    found["held_out_reward"] = compare(*after.values())
    start = held_out_score(actor, held_out)
    print(f"\n{table(found)}\n\nheld-out reward before PPO: {start:.3f}")
    print(
        f"final reward of ours {found['final_reward']['verdict']}, "
        f"in {1 / found['ratio']['total']:.2f} of TRL's seconds"
    )
    result = {"settings": settings, "peer": versions, "held_out_reward_before": start, **found, "runs": runs}
    write(args.json, rounded(result))
    if args.svg:
        draw(runs, args.svg)


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        raise SystemExit(f"error: {error}") from error
