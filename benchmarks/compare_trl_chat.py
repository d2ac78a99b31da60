"""SFT, DPO and GRPO of a real chat model beside TRL: the same YAML file, rows, order and seeds in both.

    python benchmarks/compare_trl_chat.py --peer_python peer/bin/python --model HuggingFaceTB/SmolLM2-135M-Instruct \\
      --data_path data/preferences/train.jsonl --eval_data_path data/preferences/eval.jsonl --json FILE

`benchmarks/trl_settings/*.yaml` are TRL's files. Ours is the plain command, such as `jaxrlhf sft --config FILE.yaml`;
theirs does what `trl sft --config` does. The rows are prompts, chosen and rejected responses: SFT takes the chosen,
DPO both, GRPO the prompts, with `compare_trl_side.brief` as the reward. Each run has the machine for itself. The
results of a trainer and seed join those that the file has.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np
from compare_trl import FOLDER, compare, peer_versions, rounded

from jaxrlhf.bench.record import write
from jaxrlhf.config.files import read_json, read_jsonl
from jaxrlhf.config.yaml_files import load_yaml_file
from jaxrlhf.data import read_tokenizer
from jaxrlhf.data.order import epoch_units
from jaxrlhf.errors import InputError

SETTINGS = FOLDER / "trl_settings"
CURVES = {
    "sft": {"loss": "loss"},
    "dpo": {"loss": "loss", "rewards/accuracies": "rewards/accuracies", "rewards/margins": "rewards/margins"},
    "grpo": {"reward": "objective/scores", "completions/mean_length": "val/response_length"},
}
"""Metrics of training steps: TRL's name, ours."""
HELD_OUT = {"sft": ("loss",), "dpo": ("loss", "rewards/accuracies", "rewards/margins"), "grpo": ()}
"""Metrics of held-out rows, before and after."""
LAST = 5  # steps at the end whose mean is a run's last value
HELD_OUT_ROWS = 64
PROMPT_TOKENS = 96  # of GRPO's prompts at most
REWARD = f"{FOLDER / 'compare_trl_side.py'}:brief"


def conversation(trainer: str, row: dict[str, str]) -> dict[str, Any]:
    """A row of preferences in TRL's conversational form for a trainer."""
    parts = {"sft": {"completion": "chosen"}, "dpo": {"chosen": "chosen", "rejected": "rejected"}, "grpo": {}}[trainer]
    responses = {name: [{"role": "assistant", "content": row[of]}] for name, of in parts.items()}
    return {"prompt": [{"role": "user", "content": row["prompt"]}], **responses}


def prepare(trainer: str, config: dict[str, Any], given: argparse.Namespace, folder: Path) -> int:
    """Writes train.jsonl and test.jsonl of the rows that no side cuts; returns how many train.jsonl has."""
    tokenizer = read_tokenizer(given.model)
    limit = config.get("max_length", PROMPT_TOKENS)

    def fits(row: dict[str, Any]) -> bool:
        responses = [row[name] for name in ("completion", "chosen", "rejected") if name in row] or [[]]
        rendered = (
            tokenizer.apply_chat_template(row["prompt"] + r, add_generation_prompt=not r, return_dict=True)
            for r in responses
        )
        return all(len(whole["input_ids"]) <= limit for whole in rendered)

    folder.mkdir(parents=True, exist_ok=True)
    sizes: dict[str, int] = {}
    for name, path, most in (("train", given.data_path, 2000), ("test", given.eval_data_path, 1000)):
        rows = [row for row in (conversation(trainer, row) for row in read_jsonl(path)[:most]) if fits(row)]
        rows = rows if name == "train" else rows[:HELD_OUT_ROWS]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        sizes[name] = len(rows)
    return sizes["train"]


def ours(trainer: str, flags: list[str], run: Path) -> dict[str, Any]:
    """Runs the command, and reads the metrics of the run folder."""
    extra = ["--overwrite_output_dir", "true", "--train_sampling_strategy", "random", "--save_steps", "0"]
    if trainer == "grpo":
        extra += ["--reward_functions", REWARD, "--max_prompt_seq_len", str(PROMPT_TOKENS), "--max_eval_samples", "8"]
    extra += ["--compilation_cache", str(run.parent / "xla")]  # empty at first, as in a user's first run
    command = [sys.executable, "-m", "jaxrlhf", trainer, *flags, *extra]
    start(command, run.with_suffix(".log"), {"JAX_PLATFORMS": "cpu"})
    lines = read_jsonl(run / "metrics.jsonl")
    steps = [line for line in lines if "timing/step" in line]
    tests = [line for line in lines if "eval/loss" in line]
    return {
        "seconds": [line["timing/step"] for line in steps],
        "peak_gib": max(line.get("perf/peak_memory_gib", 0) for line in lines),
        "curves": {name: [line[of] for line in steps] for name, of in CURVES[trainer].items()},
        "held_out": {name: [line[f"eval/{name}"] for line in tests] for name in HELD_OUT[trainer]},
    }


def theirs(trainer: str, flags: list[str], run: Path, python: str, order: Path) -> dict[str, Any]:
    """Runs TRL's trainer on the rows in this order, and reads its log."""
    result = run.with_suffix(".json")
    own = {"TRL_EXPERIMENTAL_SILENCE": "1", "COMPARE_ORDER": str(order), "COMPARE_RESULT": str(result)}
    command = [python, str(FOLDER / "compare_trl_chat_peer.py"), trainer, *flags, "--use_cpu", "true"]
    start(command, run.with_suffix(".log"), own)
    found = read_json(result)
    log = found.pop("log")
    steps = [line for line in log if "grad_norm" in line]
    tests = [line for line in log if "eval_loss" in line]
    found["curves"] = {name: [line[name] for line in steps] for name in CURVES[trainer]}
    found["held_out"] = {name: [line[f"eval_{name}"] for line in tests] for name in HELD_OUT[trainer]}
    return found


def start(command: list[str], log: Path, own: dict[str, str]) -> None:
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"} | own
    with log.open("w") as out:
        done = subprocess.run(command, stdout=out, stderr=subprocess.STDOUT, env=environment)
    if done.returncode:
        tail = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-5:])
        raise InputError(f"{' '.join(command[:4])} ended with status {done.returncode}; the end of {log}:\n{tail}")


def run_both(trainer: str, seed: int, given: argparse.Namespace) -> dict[str, Any]:
    """Both sides' results; ours runs first where the seed is even."""
    work = given.work_dir.resolve()
    file = SETTINGS / f"{trainer}.yaml"
    config = load_yaml_file(file)
    data = work / trainer
    count = prepare(trainer, config, given, data)
    rows = config["max_steps"] * config["per_device_train_batch_size"] // config.get("num_generations", 1)
    order = work / f"{trainer}-order-{seed}.npy"
    np.save(order, epoch_units(np.arange(rows), count, seed))
    found = {}
    for side in ("ours", "trl") if seed % 2 == 0 else ("trl", "ours"):
        run = work / f"{trainer}-{side}-{seed}"
        flags = ["--config", str(file), "--model_name_or_path", given.model, "--dataset_name", str(data)]
        flags += ["--output_dir", str(run), "--seed", str(seed)]
        if side == "ours":
            found[side] = ours(trainer, flags, run)
        else:
            found[side] = theirs(trainer, flags, run, given.peer_python, order)
        seconds = found[side]["seconds"]
        print(f"{trainer}, seed {seed}, {side}: {median(seconds[1:]):.1f} s a step", flush=True)
    return found


def table(runs: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Verdicts of a trainer over its seeds."""
    sides = {side: [run[side] for run in runs.values()] for side in ("ours", "trl")}

    def of(pick: Any) -> list[list[float]]:
        return [[pick(run) for run in sides[side]] for side in ("ours", "trl")]

    found: dict[str, Any] = {}
    for name in sides["trl"][0]["curves"]:
        found[f"{name}, last {LAST} steps"] = of(lambda run, n=name: mean(run["curves"][n][-LAST:]))
    for name in sides["trl"][0]["held_out"]:
        found[f"held-out {name} before"] = of(lambda run, n=name: run["held_out"][n][0])
        found[f"held-out {name} after"] = of(lambda run, n=name: run["held_out"][n][-1])
    found["seconds of all steps"] = of(lambda run: sum(run["seconds"]))
    found["seconds of the first step"] = of(lambda run: run["seconds"][0])
    found["seconds of a later step, median"] = of(lambda run: median(run["seconds"][1:]))
    found["peak memory, GiB"] = of(lambda run: run["peak_gib"])
    return {name: verdict(*values) for name, values in found.items()}


def verdict(mine: list[float], others: list[float]) -> dict[str, Any]:
    if len(mine) > 1:
        return compare(mine, others)
    return {"ours": {"mean": mine[0], "runs": mine}, "trl": {"mean": others[0], "runs": others}}


def markdown(found: dict[str, dict[str, Any]]) -> Iterable[str]:
    yield "| | ours | TRL | TRL / ours |"
    yield "|---|---|---|---|"
    for name, row in found.items():
        a, b = row["ours"]["mean"], row["trl"]["mean"]
        cells = [
            f"{row[side]['mean']:.3f}"
            + (f" ± {row[side]['standard_error']:.3f}" if "standard_error" in row[side] else "")
            for side in ("ours", "trl")
        ]
        last = f"× {b / a:.2f}" if name.startswith(("seconds", "peak")) else ""
        yield f"| {name} | {cells[0]} | {cells[1]} | {last} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer_python", required=True, metavar="PATH", help="interpreter of TRL's own environment")
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--data_path", type=Path, required=True, help="JSONL of prompt, chosen and rejected")
    parser.add_argument("--eval_data_path", type=Path, required=True, help="held-out rows")
    parser.add_argument("--trainers", nargs="+", choices=tuple(CURVES), default=tuple(CURVES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--work_dir", type=Path, default=Path("runs/compare_trl_chat"), metavar="FOLDER")
    parser.add_argument("--json", type=Path, metavar="FILE")
    given = parser.parse_args()
    versions = peer_versions(given.peer_python)
    known = read_json(given.json) if given.json is not None and given.json.exists() else {}
    results = known.get("runs", {})
    for trainer in given.trainers:
        for seed in given.seeds:
            results.setdefault(trainer, {})[str(seed)] = rounded(run_both(trainer, seed, given))
            tables = rounded({name: table(runs) for name, runs in results.items()})
            settings = {name: load_yaml_file(SETTINGS / f"{name}.yaml") for name in results}
            write(given.json, {"settings": settings, "peer": versions, "tables": tables, "runs": results})
        print(f"\n{trainer}\n" + "\n".join(markdown(tables[trainer])) + "\n", flush=True)


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        raise SystemExit(f"error: {error}") from error
