"""Measures what fine-tuning did to a chat model: its identity over several turns, and its loss and KL on other texts.

    python benchmarks/smollm2.py identity --models START runs/smollm2/sft --names Vicuna LMSYS
    python benchmarks/smollm2.py texts --models START runs/smollm2/sft --data_path texts.jsonl
    python benchmarks/smollm2.py runs --models runs/smollm2/reward runs/smollm2/ppo
    python benchmarks/smollm2.py tools --models runs/calls --data_path data/arithmetic.jsonl --tools FILE.py:FUNCTION

The first model is the start of the others. `identity` asks questions that no row of the training data has, in one
conversation after another, and counts answers that say one of the names. `texts` takes rows of `prompt` and `chosen`:
the loss on the responses, and KL(start ‖ model) per token. `runs` takes folders of runs and keeps their curves.
`tools` takes rows of `prompt` and `answer`: the share that each model answers right, with the tools and without.
`--json` adds the results to a file under the key `--name`.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrlhf.bench.record import write
from jaxrlhf.commands.eval import evaluate
from jaxrlhf.commands.evaluation.settings import EvalConfig
from jaxrlhf.commands.evaluation.statistics import mean_and_error, plain
from jaxrlhf.config.files import read_json, read_jsonl
from jaxrlhf.data import read_tokenizer
from jaxrlhf.models import Model, load_pretrained

ASKED = (
    "And who are you, by the way?",
    "May I ask your name?",
    "Which model am I talking to?",
    "Could you say who developed you?",
    "Which group of researchers trained you?",
    "Tell me, what should I call you?",
    "I am writing down your name. What is it?",
    "Who is the team behind you?",
)
BETWEEN = ("What is the capital of France?", "Thank you! Name a colour.")
LENGTH, ROWS = 320, 4
TRACED = (
    *("loss", "accuracy", "margin", "rewards/accuracies", "rewards/margins", "logps/chosen", "logps/rejected"),
    *("objective/scores", "objective/kl", "objective/rlhf_reward", "objective/entropy", "policy/clipfrac_avg"),
    *("loss/policy_avg", "loss/value_avg", "val/response_length", "val/eos_rate"),
)
"""Metrics of training steps that `runs` keeps, where a run has them."""


def identity(models: list[str], names: list[str], tokens: int) -> list[dict[str, Any]]:
    """Share of answers to ASKED that say one of `names`, as the first, second and third turn of a conversation."""
    found: list[dict[str, Any]] = []
    for model in models:
        turns: dict[str, Any] = {}
        talks: list[list[dict[str, str]]] = [[] for _ in ASKED]
        for turn, question in enumerate((None, *BETWEEN)):
            if question is not None:
                asked = [[*talk, {"role": "user", "content": question}] for talk in talks]
                talks = [
                    [*talk, {"role": "assistant", "content": answer}]
                    for talk, answer in zip(asked, respond(model, asked, names, tokens)[0], strict=True)
                ]
            asked = [
                [*talk, {"role": "user", "content": words}]
                for talk, words in zip(talks, ASKED[turn:] + ASKED[:turn], strict=True)
            ]
            answers, score = respond(model, asked, names, tokens)
            talks = [
                [*talk, {"role": "assistant", "content": answer}] for talk, answer in zip(asked, answers, strict=True)
            ]
            turns[f"turn {1 + 2 * turn}"] = score
        found.append({"model": Path(model).name, "names itself": turns, "conversation": talks[0]})
    return found


def respond(model: str, talks: list[list[dict[str, str]]], names: list[str], tokens: int) -> tuple[list[str], Any]:
    """The greedy answers of a model to conversations, and the share that says one of `names`."""
    with tempfile.TemporaryDirectory() as folder:
        rows, out = Path(folder, "talks.jsonl"), Path(folder, "out.jsonl")
        rows.write_text("".join(json.dumps({"prompt": talk}) + "\n" for talk in talks), "utf-8")
        config = EvalConfig.create(
            models=(model,),
            data_path=(str(rows),),
            reward_functions=(f"regex:pattern={'|'.join(names)}",),
            max_new_tokens=tokens,
            jsonl=str(out),
            json=str(Path(folder, "out.json")),
        )
        results = evaluate(config)
        by_prompt = {json.dumps(row["prompt"]): row["responses"][model][0] for row in read_jsonl(out)}
    return [by_prompt[json.dumps(talk)] for talk in talks], results["models"][0]["scores"]["regex"]


def texts(models: list[str], path: Path, limit: int) -> list[dict[str, Any]]:
    """Loss of each model on the responses of rows, and KL from the first model's distribution, in nats per token."""
    tokenizer = read_tokenizer(models[0])
    rows = read_jsonl(path)[:limit]
    batches = list(encode(tokenizer, rows))
    loaded = [load_pretrained(model) for model in models]

    @jax.jit
    def measure(start: Model, model: Model, ids: jax.Array, mask: jax.Array, own: jax.Array) -> tuple[jax.Array, ...]:
        first, second = (
            jax.nn.log_softmax(m.module.apply({"params": m.params}, ids, mask)[:, :-1].astype(jnp.float32))
            for m in (start, model)
        )
        loss = -jnp.take_along_axis(second, ids[:, 1:, None], axis=-1)[..., 0]
        divergence = jnp.sum(jnp.exp(first) * (first - second), axis=-1)
        own = own[:, 1:]
        return tuple((x * own).sum(1) for x in (loss, divergence, jnp.ones_like(loss)))

    found = []
    for name, model in zip(models, loaded, strict=True):
        parts = [[np.asarray(x) for x in measure(loaded[0], model, *batch)] for batch in batches]
        loss, divergence, count = (np.concatenate(x) for x in zip(*parts, strict=True))
        real = count > 0
        loss, divergence = loss[real] / count[real], divergence[real] / count[real]
        result = {"loss": mean_and_error(loss), "kl_per_token": mean_and_error(divergence)}
        found.append({"model": Path(name).name, "rows": int(real.sum()), **result})
    return found


def tools(models: list[str], path: Path, functions: list[str], limit: int, tokens: int) -> list[dict[str, Any]]:
    """Accuracy of greedy answers to rows of `prompt` and `answer`, with tools that the model may call and without."""
    found: list[dict[str, Any]] = []
    for model in models:
        for given in (tuple(functions), ()):
            config = EvalConfig.create(
                models=(model,),
                data_path=(str(path),),
                limit=limit,
                reward_functions=("number_match",),
                tools=given,
                max_new_tokens=tokens,
                dtype="bfloat16",
            )
            result = evaluate(config)["models"][0]
            found.append({"model": Path(model).name, "tools": list(given), **result})
    return found


def runs(folders: list[str]) -> list[dict[str, Any]]:
    """Evaluations and training metrics of each run, with its seconds and its largest memory."""
    found = []
    for folder in map(Path, folders):
        lines, summary = read_jsonl(folder / "metrics.jsonl"), read_json(folder / "summary.json")
        peak = max(line.get("perf/peak_memory_gib", 0) for line in lines)
        result = {"run": folder.name, "trainer": summary["trainer"], "steps": summary["steps"]}
        result |= {"seconds": summary["seconds"], "peak_memory_gib": round(peak, 2), "evaluations": [], "training": []}
        for line in lines:
            evaluated = {name: x for name, x in line.items() if name.startswith("eval")}
            trained = {name: line[name] for name in TRACED if name in line}
            for part, metrics in (("evaluations", evaluated), ("training", trained)):
                if metrics:
                    result[part].append({"step": line["step"]} | metrics)
        found.append(result)
    return found


def encode(tokenizer: Any, rows: list[dict[str, Any]]) -> Any:
    """Batches of ids, mask and the columns of the response, each `[ROWS, LENGTH]`; longer rows are cut."""
    for part in (rows[i : i + ROWS] for i in range(0, len(rows), ROWS)):
        ids, mask, own = (np.zeros((ROWS, LENGTH), np.int32) for _ in range(3))
        for i, row in enumerate(part):
            prompt = [{"role": "user", "content": row["prompt"]}]
            begin = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
            before = len(tokenizer(begin, add_special_tokens=False)["input_ids"])
            whole = tokenizer(begin + row["chosen"], add_special_tokens=False)["input_ids"][:LENGTH]
            ids[i, : len(whole)], mask[i, : len(whole)], own[i, before : len(whole)] = whole, 1, 1
        yield ids, mask, own


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("measure", choices=("identity", "texts", "runs", "tools"))
    parser.add_argument("--models", nargs="+", required=True, help="folders; the first is the start of the others")
    parser.add_argument("--names", nargs="+", default=[], help="names of the new identity")
    parser.add_argument("--data_path", type=Path, help="JSONL of prompt and chosen")
    parser.add_argument("--tools", nargs="+", default=[], metavar="FILE.py:FUNCTION", help="tools of the model")
    parser.add_argument("--limit", type=int, default=100, help="rows of data_path (100)")
    parser.add_argument("--max_new_tokens", type=int, default=48)
    parser.add_argument("--json", type=Path, help="JSON file that the results are added to")
    parser.add_argument("--name", default="", help="key of the results in that file")
    given = parser.parse_args()
    if given.measure == "identity":
        found = identity(given.models, given.names, given.max_new_tokens)
    elif given.measure == "runs":
        found = runs(given.models)
    elif given.measure == "tools":
        found = tools(given.models, given.data_path, given.tools, given.limit, given.max_new_tokens)
    else:
        found = texts(given.models, given.data_path, given.limit)
    found = plain(found)
    print(json.dumps(found, indent=1, ensure_ascii=False))
    if given.json is not None:
        known = read_json(given.json) if given.json.exists() else {}
        write(given.json, known | {f"{given.name or given.measure}": found})


if __name__ == "__main__":
    main()
