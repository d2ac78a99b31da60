"""`jaxrlhf sample`: several scored responses per prompt, and the best of them as rows for the SFT step."""

import json
import math
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxrlhf import objectives
from jaxrlhf.commands.selection import Samples, figures, select_samples
from jaxrlhf.config import REQUIRED, field, to_dict
from jaxrlhf.config.files import write_json_atomic, write_text_atomic
from jaxrlhf.data import DataConfig, PromptData, answer_text, encode_stops, load_data, load_tokenizer, pad_token_id
from jaxrlhf.distributed import ProcessConfig, is_primary, joined, to_host
from jaxrlhf.engine import HybridEngine, Rollout, SamplingConfig
from jaxrlhf.errors import InputError
from jaxrlhf.models import (
    Decoder,
    Model,
    check_same_tokens,
    check_tokenizer_fits,
    load_pretrained,
    logical_axes,
    merged,
    read_config,
    working_copy,
)
from jaxrlhf.rewards import RewardFunctionOptions, Rewards, finite_mean
from jaxrlhf.runs.console import Console
from jaxrlhf.sharding import TRAIN_RULES, constrain, use
from jaxrlhf.trainers.gradients import map_rows
from jaxrlhf.trainers.loop import Announce
from jaxrlhf.trainers.settings import MeshConfig, batch_devices, check_context

OWN_FIELDS = ("prompt", "chosen", "score", "scores")
MODEL_PART = "reward_model"


@dataclass(frozen=True)
class SampleModelConfig(MeshConfig, ProcessConfig):
    """The models, the device mesh and the precision."""

    model_name_or_path: str = field(REQUIRED, "language model to sample from", aliases=("actor_model_name_or_path",))
    reward_model_name_or_path: str | None = field(
        None, "reward model that scores the responses, by itself or beside reward functions"
    )
    tokenizer_name_or_path: str | None = field(None, "tokenizer folder or hub name; default: that of the model")


@dataclass(frozen=True)
class SampleOptions(RewardFunctionOptions):
    """Sampling and selection."""

    output_file: str = field(REQUIRED, "JSON-lines file to write, rows that `jaxrlhf sft --data_path FILE` trains on")
    overwrite: bool = field(False, "replace output_file where it exists")
    part: str = field("train", "which rows of the data give the prompts", choices=("train", "eval"))
    samples_per_prompt: int = field(8, "responses to each prompt", aliases=("n",))
    select: str = field(
        "best",
        "best: the highest-scoring response of each prompt (best-of-n); threshold: all that reach min_score (rejection "
        "sampling)",
        choices=("best", "threshold"),
    )
    min_score: float | None = field(None, "leave out responses that score less; threshold needs it")
    top_fraction: float = field(1.0, "of the selected responses, keep the share with the highest scores")
    keep_unfinished: bool = field(False, "also select responses that were cut at max_answer_seq_len")
    max_answer_seq_len: int = field(256, "longest response in tokens", aliases=("response_length",))
    min_answer_seq_len: int = field(0, "EOS cannot be drawn before this many tokens")
    temperature: float = field(1.0, "sampling temperature")
    top_k: int = field(0, "sample among the k most likely tokens; 0: all")
    top_p: float = field(1.0, "sample among the most likely tokens that hold this probability")
    repetition_penalty: float = field(1.0, "divides positive logits of tokens seen before, multiplies others; 1: off")
    stop_strings: tuple[str, ...] = field(
        (), "texts that end a response and are cut off from it, matched as the tokens that the tokenizer makes of each"
    )
    per_device_batch_size: int = field(8, "prompts per device that are worked on at a time")
    generation_slots: int = field(
        0,
        "continuous batching: responses in work at a time; one that is done makes room for the next. 0: all at once",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.sampling(None, 0)
        if self.samples_per_prompt < 1 or self.per_device_batch_size < 1:
            name = "samples_per_prompt" if self.samples_per_prompt < 1 else "per_device_batch_size"
            raise InputError(f"{name}={getattr(self, name)} must be at least 1")
        if self.temperature == 0 and self.samples_per_prompt > 1:
            raise InputError(
                f"temperature=0 with samples_per_prompt={self.samples_per_prompt}: greedy responses to a prompt are "
                "all the same; raise the temperature, or take one sample"
            )
        if self.generation_slots < 0:
            raise InputError(f"generation_slots={self.generation_slots} must be 0 or more")
        if self.select == "threshold" and self.min_score is None:
            raise InputError("select=threshold keeps what reaches min_score: give one, or select best")
        if self.min_score is not None and not math.isfinite(self.min_score):
            raise InputError(f"min_score={self.min_score} must be a finite number")
        if not 0 < self.top_fraction <= 1:
            raise InputError(f"top_fraction={self.top_fraction} must be above 0 and at most 1")

    def sampling(self, eos_id: Any, pad_id: int, stops: tuple[tuple[int, ...], ...] = ()) -> SamplingConfig:
        same = ("temperature", "top_k", "top_p", "repetition_penalty", "samples_per_prompt")
        return SamplingConfig(
            max_new_tokens=self.max_answer_seq_len,
            min_new_tokens=self.min_answer_seq_len,
            eos_token_id=eos_id,
            pad_token_id=pad_id,
            stop_sequences=stops,
            **{name: getattr(self, name) for name in same},
        )


@dataclass(frozen=True)
class SampleConfig(DataConfig, SampleModelConfig, SampleOptions):
    """Scored samples as SFT data."""

    def __post_init__(self) -> None:
        super().__post_init__()
        model = self.reward_model_name_or_path
        if model is None and not self.reward_functions:
            raise InputError("nothing scores the responses: give reward_model_name_or_path, reward_functions, or both")
        if model is not None and not self.reward_model_weight:
            raise InputError(
                "reward_model_weight=0 with a reward_model_name_or_path: it would not count; leave one out"
            )


@partial(jax.jit, static_argnames=("module", "mesh", "parts"))
def reward_model_scores(params: Any, rollout: Rollout, *, module: Decoder, mesh: Mesh, parts: int) -> jax.Array:
    """float32 `[B]`: the reward model's score at each sequence's last real token, in `parts` chunks of rows."""
    with use(mesh, TRAIN_RULES):
        rows = jax.tree.map(lambda x: constrain(x, "batch", None), rollout.compact())
        read = working_copy(params, logical_axes(module), module, mesh)

        def score(chunk: Rollout) -> jax.Array:
            return objectives.score_at_last_token(module.apply({"params": read}, chunk.tokens, chunk.mask), chunk.mask)

        return map_rows(score, rows, parts)


class Sampler:
    """Model, scorers and prompts, ready to work through the prompts batch by batch."""

    def __init__(self, config: SampleConfig, console: Console) -> None:
        self.config, self.mesh = config, config.make_mesh()
        for name in (config.model_name_or_path, config.reward_model_name_or_path):
            if name is not None:
                read_config(name)  # a model that cannot be used is the first thing to say
        self.rewards: Rewards = config.rewards(say=console.print)
        self.tokenizer = load_tokenizer(config.tokenizer_name_or_path or config.model_name_or_path)
        self.data = self._prompts()
        stops = encode_stops(self.tokenizer, config.stop_strings)
        self.sampling = config.sampling(self.tokenizer.eos_token_id, pad_token_id(self.tokenizer), stops)
        self.rows = config.per_device_batch_size * batch_devices(self.mesh)
        model = self._load(config.model_name_or_path, "lm")
        check_tokenizer_fits(len(self.tokenizer), model.config, "the tokenizer")
        self.engine = HybridEngine(model, self.mesh)
        self.engine.check_slots(config.generation_slots, self.rows * config.samples_per_prompt)
        self.reward_model: Model | None = None
        if config.reward_model_name_or_path is not None:
            self.reward_model = self._load(config.reward_model_name_or_path, "scalar", new_head=False)
            check_same_tokens(model.config, self.reward_model.config, ("the model", "the reward model"))
        self._generate = Announce(console, "generate program", self.engine.generate)
        self._score = Announce(console, "scoring program", reward_model_scores)

    def _load(self, name: str, head: str, **options: Any) -> Model:
        dtype = self.config.compute_dtype
        model = merged(load_pretrained(name, head=head, mesh=self.mesh, dtype=dtype, param_dtype=dtype, **options))
        longest = self.config.max_prompt_seq_len + self.config.max_answer_seq_len
        check_context(model.config, longest, f"max_prompt_seq_len + max_answer_seq_len for {name}")
        return model

    def _prompts(self) -> PromptData:
        taken = [name for name in (*self.rewards.columns, *self.config.reward_columns) if name in OWN_FIELDS]
        if taken:
            raise InputError(f"column '{taken[0]}': output_file has a field of that name; rename it in the data")
        parts = load_data(self.config, self.tokenizer, "ppo", self.rewards.columns)
        data = dict(zip(("train", "eval"), parts, strict=True))[self.config.part]
        self.rewards.check_references(data)
        return data

    def batches(self) -> list[np.ndarray]:
        """The rows of the data in batches of prompts of similar length; -1 fills up the last one."""
        order = np.argsort(self.data.lengths(np.arange(len(self.data)))[0], kind="stable")
        padded = np.concatenate([order, np.full(-len(order) % self.rows, -1)])
        return list(padded.reshape(-1, self.rows))

    def start(self, indices: np.ndarray) -> dict[str, Any]:
        """Sample and score a batch, as far as the devices go; reward functions are left at work."""
        n = self.config.samples_per_prompt
        batch = self.data.batch(indices)
        numbers = (np.maximum(indices, 0)[:, None] * n + np.arange(n)).reshape(-1)
        key = jax.random.fold_in(jax.random.key(self.config.seed), 4)
        options = {"sample_index": numbers, "slots": self.config.generation_slots}
        rollout = self._generate(batch["prompt_ids"], batch["prompt_mask"], key, self.sampling, **options)
        scores = None
        if self.reward_model is not None:
            static = {"module": self.reward_model.module, "mesh": self.mesh, "parts": n}
            scores = to_host(self._score(self.reward_model.params, rollout, **static))
        tokens, mask = to_host((rollout.tokens, rollout.response_mask))
        responses = [row[real] for row, real in zip(tokens, mask, strict=True)]
        texts = [self.text(response) for response in responses]
        repeated = np.repeat(indices, n)
        columns = self.data.columns(repeated)
        handle = self.rewards.submit(self.data.prompt_texts(repeated), texts, columns, rows=repeated >= 0)
        return {
            "indices": indices,
            "texts": texts,
            "ended": np.array([self.sampling.ended(response) for response in responses]),
            "lengths": np.array([len(response) for response in responses]),
            "model_scores": scores,
            "handle": handle,
        }

    def text(self, response: np.ndarray) -> str:
        return answer_text(self.tokenizer, response, self.config.prompt_template, self.config.stop_strings)

    def finish(self, started: dict[str, Any]) -> dict[str, Any]:
        """The batch with its scores and their parts, `[B · n]` each."""
        result = started.pop("handle").result()
        scores, parts = result.scores.astype(np.float64), dict(result.parts)
        if started["model_scores"] is not None:
            parts[MODEL_PART] = started["model_scores"]
            scores = scores + self.config.reward_model_weight * parts[MODEL_PART].astype(np.float64)
        return started | {"scores": scores.astype(np.float32), "parts": parts, "failed": len(result.failures)}

    def run(self, console: Console) -> Iterator[dict[str, Any]]:
        """Every batch, scored; functions work on one while the devices work on the next."""
        waiting, begin, done = None, time.monotonic(), 0
        batches = self.batches()
        with console.progress(len(batches), description="sample") as bar:
            for indices in [*batches, None]:
                started = None if indices is None else self.start(indices)
                if waiting is not None:
                    finished = self.finish(waiting)
                    done += int(np.sum(finished["indices"] >= 0)) * self.config.samples_per_prompt
                    real = np.repeat(finished["indices"] >= 0, self.config.samples_per_prompt)
                    mean = finite_mean(finished["scores"][real])
                    rate = done / (time.monotonic() - begin)
                    scored = "none has a score" if mean is None else f"mean score {mean:.3g}"
                    bar.set_postfix_str(f"{done} samples, {rate:.3g} a second, {scored}", refresh=False)
                    bar.update()
                    yield finished
                waiting = started


def collect(finished: list[dict[str, Any]], rows: int, n: int) -> tuple[Samples, np.ndarray, dict[str, np.ndarray]]:
    """All batches in the order of the data: samples, lengths in tokens `[P, n]`, and the parts of the scores."""
    indices = np.concatenate([batch["indices"] for batch in finished])
    place = np.argsort(indices, kind="stable")[len(indices) - rows :]  # without the filler rows

    def joined_up(pieces: list[np.ndarray]) -> np.ndarray:
        return np.concatenate(pieces).reshape(-1, n)[place]

    texts = [text for batch in finished for text in batch["texts"]]
    samples = Samples(
        scores=joined_up([batch["scores"] for batch in finished]),
        texts=[texts[p * n : (p + 1) * n] for p in place],
        ended=joined_up([batch["ended"] for batch in finished]),
    )
    parts = {name: joined_up([batch["parts"][name] for batch in finished]) for name in finished[0]["parts"]}
    return samples, joined_up([batch["lengths"] for batch in finished]), parts


def sample(config: SampleConfig) -> dict[str, Any]:
    """Sample, score, select and write `output_file` and beside it the figures, which are returned.

    Both files appear whole, at the end; an interrupt leaves what was there before.
    """
    path = Path(config.output_file).expanduser()
    config = joined(config)
    summary_path = path.with_suffix(".summary.json")
    check_output(path, summary_path, config.overwrite)
    console = Console(quiet=not is_primary())
    begin = time.monotonic()
    sampler = Sampler(config, console)
    n = config.samples_per_prompt
    finished = list(sampler.run(console))
    samples, lengths, parts = collect(finished, len(sampler.data), n)
    kept, left_out = select_samples(
        samples,
        best=config.select == "best",
        min_score=config.min_score,
        top_fraction=config.top_fraction,
        keep_unfinished=config.keep_unfinished,
    )
    seconds = time.monotonic() - begin
    summary = figures(samples, kept) | {
        "left_out": left_out,
        "failed_calls": sum(batch["failed"] for batch in finished),
        "parts": {name: finite_mean(part) for name, part in parts.items()},
        "response_length": float(lengths.mean()),
        "seconds": round(seconds, 1),
        "samples_per_second": samples.scores.size / seconds,
        "tokens_per_second": int(lengths.sum()) / seconds,
        "settings": to_dict(config),
    }
    if not kept:
        raise InputError(nothing_kept(left_out, summary["score_max"], config))
    if is_primary():
        write_text_atomic(path, "".join(lines(sampler.data, samples, parts, kept)))
        write_json_atomic(summary_path, summary)
    show(console, summary, path)
    return summary


def check_output(path: Path, summary_path: Path, overwrite: bool) -> None:
    """Refuse, before anything else is done, a file that exists or that could not be written or read back."""
    if path.suffix != ".jsonl":
        raise InputError(f"output_file {path}: must end in .jsonl, as the data that sft reads")
    there = next((p for p in (path, summary_path) if p.exists()), None)
    if there is not None and (not overwrite or there.is_dir()):
        raise InputError(f"output_file: {there} exists; name another file, or replace it with --overwrite")
    folder = next(p for p in path.absolute().parents if p.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise InputError(f"output_file {path}: {folder} is no folder that can be written to; name another place")


def nothing_kept(left_out: dict[str, int], highest: float | None, config: SampleConfig) -> str:
    reasons = ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in left_out.items() if count)
    hints = ["raise max_answer_seq_len, or --keep_unfinished"] if left_out["unfinished"] else []
    if left_out["below_min_score"]:
        hints.append(f"lower min_score={config.min_score} (the highest score was {highest:.4g})")
    return f"no sample is left to write ({reasons}): {'; '.join(hints) or 'change the model or the rewards'}"


def lines(
    data: PromptData, samples: Samples, parts: dict[str, np.ndarray], kept: list[tuple[int, int]]
) -> Iterator[str]:
    """The rows of the file: prompt as the data has it, chosen, score, its parts where there are several, columns."""
    for p, j in kept:
        row = {"prompt": data.prompts([p])[0], "chosen": samples.texts[p][j], "score": _short(samples.scores[p, j])}
        if len(parts) > 1:
            row["scores"] = {name: _short(part[p, j]) for name, part in parts.items()}
        row |= {name: values[0] for name, values in data.columns([p]).items()}
        yield json.dumps(row, ensure_ascii=False) + "\n"


def _short(value: np.float32) -> float | None:
    return float(f"{value:.7g}") if math.isfinite(value) else None


def show(console: Console, summary: dict[str, Any], path: Path) -> None:
    curve = summary["expected_best_of_k"]
    shown = [point for point in curve if point["k"] & (point["k"] - 1) == 0 or point["k"] == len(curve)]
    table = [[point["k"], point["score"], point["kl_bound"]] for point in shown]
    if summary["expected_best_prompts"]:
        console.table("expected best of k", ("k", "mean score", "KL at most"), table)
    left = ", ".join(f"{v:,} {k.replace('_', ' ')}" for k, v in summary["left_out"].items() if v)
    console.print(
        f"sample: {summary['prompts']:,} prompts × {summary['samples_per_prompt']}, mean score "
        f"{summary['score_mean']:.4g}; kept {summary['kept']:,} of mean score {summary['kept_score_mean']:.4g}"
        f"{f' (left out: {left})' if left else ''} in {summary['seconds']}s → {path}"
    )
