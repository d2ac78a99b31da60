"""`jaxrlhf sample`: several scored responses per prompt, and the best of them as rows for the SFT step."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import numpy as np
from jax.sharding import Mesh

from jaxrlhf import keys, objectives
from jaxrlhf.commands.evaluation.episodes import ENVIRONMENT, summarise
from jaxrlhf.commands.evaluation.statistics import plain
from jaxrlhf.commands.sample_output import check_output, lines, nothing_kept, show, show_episodes
from jaxrlhf.commands.selection import Samples, select_samples, summarise_samples
from jaxrlhf.config import Gt, Le, NonNegativeInt, PathName, PositiveInt, Settings, alias, default_of, to_dict
from jaxrlhf.config.compilation import CompilationConfig
from jaxrlhf.config.files import write_json_atomic, write_text_atomic
from jaxrlhf.data import DataConfig, PromptData, answer_text, load_data, vocabulary_size
from jaxrlhf.distributed import ProcessConfig, is_primary, joined, to_host
from jaxrlhf.engine import GenerationConfig, HybridEngine, Rollout, SamplingConfig
from jaxrlhf.environments import EnvironmentConfig, Environments
from jaxrlhf.errors import InputError
from jaxrlhf.models import (
    Decoder,
    Model,
    check_tokenizer_fits,
    load_pretrained,
    logical_axes,
    merged,
    read_config,
    with_kernels,
    working_copy,
)
from jaxrlhf.models.model import PyTree
from jaxrlhf.rewards import Rewards, RewardsConfig, finite_mean
from jaxrlhf.rl.episodes import EpisodeRunner, Episodes
from jaxrlhf.rl.outcomes import Graded, Outcome, data_columns, reads_state
from jaxrlhf.runs.console import Console
from jaxrlhf.sharding import TRAIN_RULES, constrain, use
from jaxrlhf.trainers.gradients import map_rows
from jaxrlhf.trainers.narrowing import worth_cutting
from jaxrlhf.trainers.programs import Announce
from jaxrlhf.trainers.settings import MeshConfig, batch_devices, check_context
from jaxrlhf.trainers.tokenizers import TokenizerConfig, check_reads_tokens, sampling_for

OWN_FIELDS = ("prompt", "chosen", "tools", "score", "scores")
MODEL_PART = "reward_model"


@dataclass(frozen=True)
class SelectionConfig(Settings):
    """The choice among scored responses."""

    select: Literal["best", "threshold"] = "best"
    """best: the highest-scoring response of each prompt (best-of-n); threshold: all that reach min_score (rejection
    sampling)."""
    min_score: float | None = None
    """Leave out responses that score less; required by threshold."""
    top_fraction: Annotated[float, Gt(0), Le(1)] = 1.0
    """Keep this share of the selected responses, those with the highest scores."""
    keep_unfinished: bool = False
    """Also select responses that were cut at max_new_tokens."""

    def check(self) -> None:
        if self.select == "threshold" and self.min_score is None:
            raise InputError("select=threshold requires min_score; set min_score, or select best")


@dataclass(frozen=True)
class SampleConfig(Settings):
    """Best-of-n and rejection sampling: scored responses as SFT data."""

    model_name_or_path: PathName[Annotated[str, alias("actor_model_name_or_path")]]
    """Language model to sample from."""
    output_file: PathName[str]
    """JSON-lines file to write, rows that `jaxrlhf sft --data_path FILE` trains on."""
    reward_model_name_or_path: PathName[str | None] = None
    """Reward model that scores the responses, by itself or beside reward functions."""
    overwrite: bool = False
    """Replace output_file where it exists."""
    show: NonNegativeInt = 4
    """Episodes that the terminal shows, the first ones of the file; only with an environment or tools."""
    part: Literal["train", "eval"] = "train"
    """Rows of the data that give the prompts."""
    per_device_batch_size: PositiveInt = 8
    """Prompts per device that are worked on at a time."""
    data: DataConfig = DataConfig()
    sampling: SamplingConfig = SamplingConfig(samples_per_prompt=8)
    selection: SelectionConfig = SelectionConfig()
    rewards: RewardsConfig = RewardsConfig()
    environments: EnvironmentConfig = EnvironmentConfig()
    tokenizer: TokenizerConfig = TokenizerConfig()
    generation: GenerationConfig = GenerationConfig()
    mesh: MeshConfig = MeshConfig()
    compilation: CompilationConfig = CompilationConfig()
    process: ProcessConfig = ProcessConfig()

    def check(self) -> None:
        if self.sampling.temperature == 0 and self.sampling.samples_per_prompt > 1:
            raise InputError(
                f"temperature=0 with samples_per_prompt={self.sampling.samples_per_prompt}: greedy responses to a "
                "prompt are all the same; raise the temperature, or take one sample"
            )
        model, rewards, environments = self.reward_model_name_or_path, self.rewards, self.environments
        if model is None and not rewards.reward_functions and not environments.environment:
            raise InputError(
                "nothing scores the responses: give reward_model_name_or_path, reward_functions, or an environment "
                "that rewards"
            )
        if self.show != default_of(SampleConfig, "show") and not environments.used:
            raise InputError(f"show={self.show} requires environment or tools; set one of them, or remove show")
        environments.check_slots(self.generation.generation_slots, "lower per_device_batch_size")
        if model is not None and not rewards.reward_model_weight:
            raise InputError("reward_model_weight=0 leaves reward_model_name_or_path without use; leave one out")


@partial(jax.jit, static_argnames=("module", "mesh", "parts"))
def reward_model_scores(params: PyTree, rollout: Rollout, *, module: Decoder, mesh: Mesh, parts: int) -> jax.Array:
    """Computes the reward model's score float32 `[B]` at each sequence's last real token, in `parts` chunks of rows."""
    with use(mesh, TRAIN_RULES):
        rows = jax.tree.map(lambda x: constrain(x, "batch", None), rollout.compact())
        read = working_copy(params, logical_axes(module), module, mesh)

        def score(chunk: Rollout) -> jax.Array:
            values: Any = module.apply({"params": read}, chunk.tokens, chunk.mask, contiguous=True)
            return objectives.score_at_last_token(values, chunk.mask)

        return map_rows(score, rows, parts, worth_cutting(rows.mask, module.config))


class Sampler:
    """Model, scorers and prompts, ready to work through the prompts batch by batch."""

    def __init__(self, config: SampleConfig, console: Console) -> None:
        self.config, self.mesh = config, config.mesh.make_mesh()
        self.rewards: Rewards = config.rewards.rewards(say=console.print)
        self.tokenizer = config.tokenizer.load(config.model_name_or_path, config.data.template)
        if config.reward_model_name_or_path is not None:
            shape, names = read_config(config.model_name_or_path), ("the model", "the reward model")
            check_reads_tokens(self.tokenizer, shape, config.reward_model_name_or_path, names)
        self.environments = config.environments.load()
        self.data = self._prompts()
        self.sampling = sampling_for(self.tokenizer, config.sampling)
        self.runner = None if self.environments is None else self._runner(self.environments, console)
        self.copies = self.sampling.samples_per_prompt
        self.rows = config.per_device_batch_size * batch_devices(self.mesh)
        model = self._load(config.model_name_or_path, "lm")
        check_tokenizer_fits(vocabulary_size(self.tokenizer), model.config, "the tokenizer")
        model = with_kernels(model, kv_cache_dtype=config.generation.kv_cache_dtype)
        self.engine = HybridEngine(model, self.mesh)
        self.engine.check_slots(config.generation.generation_slots, self.rows * self.copies)
        self.reward_model: Model | None = None
        if config.reward_model_name_or_path is not None:
            self.reward_model = self._load(config.reward_model_name_or_path, "scalar", new_head=False)
        self._generate = Announce(console, "generate program", self.engine.generate)
        self._begin = Announce(console, "generate program", self.engine.episodes)
        self._score = Announce(console, "scoring program", reward_model_scores)

    def _load(self, name: str, head: str, **options: Any) -> Model:
        dtype = self.config.mesh.compute_dtype
        model = merged(load_pretrained(name, head=head, mesh=self.mesh, dtype=dtype, param_dtype=dtype, **options))
        longest = self.config.data.max_prompt_seq_len + self.config.sampling.max_new_tokens
        check_context(model.config, longest, f"max_prompt_seq_len + max_new_tokens for {name}")
        return model

    def _runner(self, environments: Environments, console: Console) -> EpisodeRunner:
        scored_otherwise = bool(self.rewards) or self.config.reward_model_name_or_path is not None
        environments.check_scored(scored_otherwise)
        return EpisodeRunner(
            self.config.environments,
            environments,
            self.tokenizer,
            self.sampling,
            longest_prompt=self.config.data.max_prompt_seq_len,
            special_tokens_in_data=self.config.data.template.special_tokens_in_data,
            scored_otherwise=scored_otherwise,
            keeps_state=reads_state(self.rewards),
            say=console.print,
        )

    def _prompts(self) -> PromptData:
        data = self.config.data
        columns, wanted = data_columns(self.rewards, self.environments)
        check_names((*columns, *data.reward_columns))
        parts = load_data(data, self.tokenizer, "ppo", columns, wanted)
        prompts = dict(zip(("train", "eval"), parts, strict=True))[self.config.part]
        check_names(prompts.column_names)
        self.rewards.check_references(prompts)
        return prompts

    def batches(self) -> list[np.ndarray]:
        """Row numbers in batches of prompts of similar length; -1 fills up the last batch."""
        order = np.argsort(self.data.lengths(np.arange(len(self.data)))[0], kind="stable")
        padded = np.concatenate([order, np.full(-len(order) % self.rows, -1)])
        return list(padded.reshape(-1, self.rows))

    def start(self, indices: np.ndarray) -> dict[str, Any]:
        """Samples a batch and scores it on the devices; reward functions go on in the background."""
        n = self.copies
        repeated = np.repeat(indices, n)
        columns, rows = self.data.columns(repeated), repeated >= 0
        episodes, rollout = self._generated(indices)
        scores = None
        if self.reward_model is not None:
            static = {"module": self.reward_model.module, "mesh": self.mesh, "parts": n}
            scores = to_host(self._score(self.reward_model.params, rollout, **static))
        tokens, mask = to_host((rollout.tokens, rollout.response_mask))
        responses = [row[real] for row, real in zip(tokens, mask, strict=True)]
        texts = [self.text(response) for response in responses]
        ended = [self.sampling.ended(response) for response in responses]
        messages: Sequence[Any] = self.data.prompts(repeated)
        completions = None
        if episodes is not None:
            graded = Graded.of(episodes.outcomes)
            texts, rows, columns = graded.replies, rows & graded.scored, columns | graded.columns
            messages, completions = graded.prompts, graded.completions
            ended = [outcome.status == "done" for outcome in episodes.outcomes]
        handle = self.rewards.submit(
            self.data.prompt_texts(repeated),
            texts,
            columns,
            rows=rows,
            conversations=messages,
            completion_ids=responses,
            completions=completions,
        )
        return {
            "indices": indices,
            "texts": texts,
            "ended": np.array(ended),
            "lengths": np.array([len(response) for response in responses]),
            "model_scores": scores,
            "handle": handle,
            "episodes": episodes,
        }

    def _generated(self, indices: np.ndarray) -> tuple[Episodes | None, Rollout]:
        """A rollout of a batch, and its episodes with an environment or tools."""
        n, key = self.copies, keys.stream(self.config.data.seed, keys.Stream.SAMPLES)
        numbers = (np.maximum(indices, 0)[:, None] * n + np.arange(n)).reshape(-1)
        if self.runner is None:
            batch, slots = self.data.batch(indices), self.config.generation.generation_slots
            given = (batch["prompt_ids"], batch["prompt_mask"], key, self.sampling)
            return None, self._generate(*given, sample_index=numbers, slots=slots)
        prompts: list[Any] = self.data.prompts(indices)  # None in filler rows, which have no episode
        columns = self.data.columns(indices)
        return self.runner.play(self._begin, prompts, columns, indices >= 0, key, numbers)

    def text(self, response: np.ndarray) -> str:
        return answer_text(self.tokenizer, response, self.sampling.stop_strings)

    def finish(self, started: dict[str, Any]) -> dict[str, Any]:
        """Waits for the reward functions; returns the batch with scores and their parts, `[B · n]` each."""
        result = started.pop("handle").result()
        parts, model = dict(result.parts), None
        if started["model_scores"] is not None:
            parts[MODEL_PART] = started["model_scores"]
            model = self.config.rewards.reward_model_weight * parts[MODEL_PART].astype(np.float64)
        scores, episodes = result.beside(model), started["episodes"]
        if episodes is not None:
            scores = scores + episodes.scores.astype(np.float32)
            if self.environments is not None and self.environments.rewards:
                parts[ENVIRONMENT] = episodes.scores.astype(np.float32)
        return started | {"scores": scores, "parts": parts, "failed": len(result.failures)}

    def run(self, console: Console) -> Iterator[dict[str, Any]]:
        """Yields every batch, scored. Reward functions work on one batch while the devices work on the next."""
        waiting, begin, done = None, time.monotonic(), 0
        batches = self.batches()
        with console.progress(len(batches), description="sample") as bar:
            for indices in [*batches, None]:
                started = None if indices is None else self.start(indices)
                if waiting is not None:
                    finished = self.finish(waiting)
                    done += int(np.sum(finished["indices"] >= 0)) * self.copies
                    real = np.repeat(finished["indices"] >= 0, self.copies)
                    mean = finite_mean(finished["scores"][real])
                    rate = done / (time.monotonic() - begin)
                    scored = "none has a score" if mean is None else f"mean score {mean:.3g}"
                    bar.note = f"{done} samples, {rate:.3g} a second, {scored}"
                    bar.update()
                    yield finished
                waiting = started


def check_names(columns: Sequence[str]) -> None:
    """Refuses columns with the name of a field of the output."""
    taken = [name for name in columns if name in OWN_FIELDS]
    if taken:
        raise InputError(f"column '{taken[0]}': output_file has a field of that name; rename it in the data")


def collect(finished: list[dict[str, Any]], rows: int, n: int) -> tuple[Samples, np.ndarray, dict[str, np.ndarray]]:
    """Joins all batches in the order of the data: samples, lengths in tokens `[P, n]`, parts of the scores."""
    indices = np.concatenate([batch["indices"] for batch in finished])
    place = np.argsort(indices, kind="stable")[len(indices) - rows :]  # without the filler rows

    def joined_up(pieces: list[np.ndarray]) -> np.ndarray:
        return np.concatenate(pieces).reshape(-1, n)[place]

    texts = [text for batch in finished for text in batch["texts"]]
    played: list[Outcome] = [o for batch in finished if batch["episodes"] for o in batch["episodes"].outcomes]
    samples = Samples(
        scores=joined_up([batch["scores"] for batch in finished]),
        texts=[texts[p * n : (p + 1) * n] for p in place],
        ended=joined_up([batch["ended"] for batch in finished]),
        episodes=[played[p * n : (p + 1) * n] for p in place] if played else None,
    )
    parts = {name: joined_up([batch["parts"][name] for batch in finished]) for name in finished[0]["parts"]}
    return samples, joined_up([batch["lengths"] for batch in finished]), parts


def sample(config: SampleConfig) -> dict[str, Any]:
    """Samples, scores, selects, and writes `output_file` with a summary beside it; returns the summary.

    Both files appear whole, at the end; an interrupt leaves earlier files as they were.
    """
    path = Path(config.output_file).expanduser()
    config = joined(config)
    summary_path = path.with_suffix(".summary.json")
    check_output(path, summary_path, config.overwrite)
    console = Console(quiet=not is_primary())
    begin = time.monotonic()
    sampler = Sampler(config, console)
    n = config.sampling.samples_per_prompt
    finished = list(sampler.run(console))
    samples, lengths, parts = collect(finished, len(sampler.data), n)
    kept, left_out = select_samples(
        samples,
        best=config.selection.select == "best",
        min_score=config.selection.min_score,
        top_fraction=config.selection.top_fraction,
        keep_unfinished=config.selection.keep_unfinished,
    )
    seconds = time.monotonic() - begin
    summary = summarise_samples(samples, kept) | {
        "left_out": left_out,
        "failed_calls": sum(batch["failed"] for batch in finished),
        "parts": {name: finite_mean(part) for name, part in parts.items()},
        "response_length": float(lengths.mean()),
        "seconds": round(seconds, 1),
        "samples_per_second": samples.scores.size / seconds,
        "tokens_per_second": int(lengths.sum()) / seconds,
        "settings": to_dict(config),
    }
    tools = () if sampler.environments is None else sampler.environments.tools
    if samples.episodes is not None:
        summary["episodes"] = summarise(samples.episodes, bool(tools))
    if not kept:
        raise InputError(nothing_kept(left_out, summary["score_max"], config))
    if is_primary():
        write_text_atomic(path, "".join(lines(sampler.data, samples, parts, kept, tools)))
        write_json_atomic(summary_path, plain(summary))
    if samples.episodes is not None:
        show_episodes(console, samples, parts, kept[: config.show])
    show(console, summary, path)
    return summary
