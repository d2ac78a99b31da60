"""Tokenizing preference pairs: ours against `datasets.map` with the same work.

    python benchmarks/tokenizing.py --data_path train.jsonl --tokenizer_name_or_path gpt2-tokenizer --json FILE

Both sides start from the file and an empty cache, render prompt, prompt + chosen and prompt + rejected by the same
chat template, encode them, cut them at `--max_length`, mark the response, and write an Arrow file. Ours also finds the
format of the rows, their prompts, and rows that cannot be used, and holds one prompt out. `map` gets its rows in
batches, `map by row` one at a time, as TRL does. Each run is a process of its own, in turns. Seconds count from the
opening of the file, without imports; CPU seconds include those of the worker processes.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets

from jaxrlhf.bench.record import say, summary, write
from jaxrlhf.data import DataConfig, Tokenizer, load_data, load_tokenizer

SIDES = ("ours", "map", "map by row")
Ids = list[int]


TEXT = {"tokenize": False}


def rendered(tokenizer: Tokenizer, rows: Mapping[str, Sequence[str]]) -> tuple[list[str], list[str], list[str]]:
    """The texts of prompt, prompt + chosen and prompt + rejected of each row."""
    render: Any = tokenizer.apply_chat_template
    prompts = [[{"role": "user", "content": prompt}] for prompt in rows["prompt"]]
    wholes = [
        render([[*p, {"role": "assistant", "content": r}] for p, r in zip(prompts, rows[side], strict=True)], **TEXT)
        for side in ("chosen", "rejected")
    ]
    return render(prompts, add_generation_prompt=True, **TEXT), wholes[0], wholes[1]


def by_map(rows: Mapping[str, Sequence[str]], tokenizer: Tokenizer, max_length: int) -> dict[str, list[Ids]]:
    """The columns of a batch of rows, as an experienced user of `datasets.map` makes them."""
    texts = rendered(tokenizer, rows)
    heads, *sides = (tokenizer(each, add_special_tokens=False)["input_ids"] for each in texts)
    result: dict[str, list[Ids]] = {f"{kind}_{j}": [] for j in range(2) for kind in ("ids", "mask")}
    for j, wholes in enumerate(sides):
        for head, whole in zip(heads, wholes, strict=True):
            ids = whole[:max_length]
            result[f"ids_{j}"].append(ids)
            result[f"mask_{j}"].append(([0] * len(head) + [1] * len(ids))[: len(ids)])
    return result


def by_row(row: Mapping[str, str], tokenizer: Tokenizer, max_length: int) -> dict[str, Ids]:
    """The columns of one row."""
    columns = by_map({name: [value] for name, value in row.items()}, tokenizer, max_length)
    return {name: values[0] for name, values in columns.items()}


def seconds() -> float:
    """CPU seconds of this process and of those that it has started and that have ended."""
    kinds = resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN
    return sum(used.ru_utime + used.ru_stime for used in map(resource.getrusage, kinds))


def run(side: str, given: argparse.Namespace, cache: Path) -> dict[str, Any]:
    """Tokenizes once: wall and CPU seconds, rows and tokens."""
    tokenizer = load_tokenizer(given.tokenizer_name_or_path)
    datasets.disable_progress_bars()
    wall, cpu = time.perf_counter(), seconds()
    if side == "ours":
        config = DataConfig(
            data_path=(given.data_path,),
            max_length=given.max_length,
            max_eval_samples=1,
            eval_fraction=1e-4,
            dataset_num_proc=given.processes,
            data_cache_dir=str(cache),
        )
        train, _ = load_data(config, tokenizer, "dpo")
        rows, tokens = len(train), int(sum(part.lengths.sum() for part in train.parts))
    else:
        table: Any = datasets.load_dataset("json", data_files=given.data_path, cache_dir=str(cache), split="train")
        table = table.select_columns(["prompt", "chosen", "rejected"])
        batched = side == "map"
        made = table.map(
            by_map if batched else by_row,
            batched=batched,
            num_proc=given.processes if given.processes > 1 else None,
            remove_columns=table.column_names,
            fn_kwargs={"tokenizer": tokenizer, "max_length": given.max_length},
        )
        plain = made.with_format("arrow")[:]
        rows, tokens = len(made), sum(len(plain[name].combine_chunks().values) for name in ("ids_0", "ids_1"))
    return {"wall": time.perf_counter() - wall, "cpu": seconds() - cpu, "rows": rows, "tokens": tokens}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_path", required=True, help="JSON lines of prompt, chosen and rejected")
    parser.add_argument("--tokenizer_name_or_path", required=True)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--max_length", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", help="file of the result")
    parser.add_argument("--side", choices=SIDES, help="run one side once, and print its record")
    given = parser.parse_args()
    if given.side:
        with tempfile.TemporaryDirectory() as cache:
            print(json.dumps(run(given.side, given, Path(cache))))
        return
    runs: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    for _ in range(given.repeats):
        for side, found in runs.items():
            words = [sys.executable, *sys.argv, "--side", side]
            done = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True)
            found.append(json.loads(done.stdout.splitlines()[-1]))
            say(f"{side:12}" + "  ".join(f"{name} {value:,.4g}" for name, value in found[-1].items()))
    result = {
        side: {name: summary([round(one[name], 2) for one in found]) for name in ("wall", "cpu")}
        | {name: found[0][name] for name in ("rows", "tokens")}
        for side, found in runs.items()
    }
    names = ("processes", "max_length", "repeats")
    write(given.json, {name: getattr(given, name) for name in names} | {"sides": result})


if __name__ == "__main__":
    main()
