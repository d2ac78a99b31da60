"""Packed rows against padded ones: tokens per second, padding, and the loss at equal numbers of tokens.

    python benchmarks/packing.py --data_path train.jsonl --eval_data_path eval.jsonl --tokenizer_name_or_path X

A language model is fine-tuned on the same rows three times, in turns: with packed rows; with padded batches of as many
rows; and with padded batches of about as many tokens, whose loss is compared with that of the packed run. Results go to
benchmarks/results/packing_<device>.json. Runs lie in runs/packing.
"""

import argparse
import statistics
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxrlhf.bench.record import say, write
from jaxrlhf.data import DataConfig, load_data, load_tokenizer
from jaxrlhf.runs.report import read_curves
from jaxrlhf.trainers.sft import SFTConfig, train_sft

ROOT = Path(__file__).resolve().parent
RUNS = Path("runs/packing")
SHAPE = {
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 384,
    "max_position_embeddings": 2048,
}
COMPARED = ("perf/tokens_per_second", "perf/padding", "timing/step")


def settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """The settings that all runs share."""
    model = {"model_name_or_path": arguments.model_name_or_path}
    if arguments.model_name_or_path is None:
        model = {"model_type": "llama", "config_overrides": SHAPE}
    return model | {
        "tokenizer_name_or_path": arguments.tokenizer_name_or_path,
        "data_path": arguments.data_path,
        "eval_data_path": arguments.eval_data_path or (),
        "max_length": arguments.max_length,
        "max_eval_samples": 32,
        "learning_rate": 5e-4,
        "lr_scheduler_type": "constant",
        "logging_steps": 10,
        "overwrite_output_dir": True,
    }


def run(name: str, steps: int, rows: int, packing: bool, common: dict[str, Any]) -> dict[str, Any]:
    """Trains once; the medians of what is compared without the first step, and the curves over tokens."""
    config = SFTConfig.create(
        **common,
        output_dir=str(RUNS / name),
        packing=packing,
        max_steps=steps,
        per_device_train_batch_size=rows,
    )
    train_sft(config)
    curves = read_curves(RUNS / name / "metrics.jsonl")
    seconds, rate = np.array(curves["timing/step"].values), np.array(curves["perf/tokens_per_second"].values)
    return {
        "rows": rows,
        "packing": packing,
        **{metric: statistics.median(curves[metric].values[1:]) for metric in COMPARED},
        "tokens": np.cumsum(seconds * rate).round().astype(int).tolist(),
        "loss": [round(value, 4) for value in curves["loss"].values],
        "eval_loss": [round(value, 4) for value in curves["eval/loss"].values],
    }


def mean_tokens(common: dict[str, Any]) -> float:
    """Mean number of tokens of a row."""
    names = ("data_path", "eval_data_path", "max_length", "max_eval_samples")
    config = DataConfig.create(**{name: common[name] for name in names}, packing=False)
    train, _ = load_data(config, load_tokenizer(common["tokenizer_name_or_path"]), "sft")
    return float(np.concatenate([part.lengths[0] for part in train.parts]).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_path", required=True)
    parser.add_argument("--eval_data_path")
    parser.add_argument("--tokenizer_name_or_path", required=True)
    parser.add_argument("--model_name_or_path", help="default: a small llama from random weights")
    parser.add_argument("--max_length", type=int, default=512)
    parser.add_argument("--batch", type=int, default=8, help="packed rows of a batch")
    parser.add_argument("--steps", type=int, default=60)
    arguments = parser.parse_args()
    common = settings(arguments)
    equal = round(arguments.batch * arguments.max_length / mean_tokens(common))
    runs = {
        "packed": run("packed", arguments.steps, arguments.batch, True, common),
        "padded": run("padded", arguments.steps // 3, arguments.batch, False, common),
        "padded_equal_tokens": run("padded_equal_tokens", arguments.steps, equal, False, common),
    }
    packed = runs["packed"]["perf/tokens_per_second"]
    ratios = {name: packed / result["perf/tokens_per_second"] for name, result in runs.items() if name != "packed"}
    for name, result in runs.items():
        rate, padding = result["perf/tokens_per_second"], result["perf/padding"]
        say(f"{name:20} {result['rows']:3} rows  {rate:8.0f} tokens/s  padding {padding:6.1%}  {result['eval_loss']}")
    say("packed is " + ", ".join(f"{ratio:.2f} times {name}" for name, ratio in ratios.items()))
    path = ROOT / "results" / f"packing_{jax.default_backend()}.json"
    named = [f"--{name} {Path(str(value)).name}" for name, value in vars(arguments).items() if value is not None]
    command = " ".join(["python benchmarks/packing.py", *named])
    write(path, {"command": command, "runs": runs, "ratios": {name: round(ratio, 3) for name, ratio in ratios.items()}})


if __name__ == "__main__":
    main()
