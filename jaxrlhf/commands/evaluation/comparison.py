"""Responses of one or several models to the same prompts: scores, win rates and pass@k, with standard errors."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from jaxrlhf.commands.evaluation.episodes import ENVIRONMENT, EpisodeModel, environment_scores, summarise
from jaxrlhf.commands.evaluation.following import Following, check_instructions
from jaxrlhf.commands.evaluation.generators import FolderModel, Responses
from jaxrlhf.commands.evaluation.prompts import prompts_of
from jaxrlhf.commands.evaluation.rows import Prompts
from jaxrlhf.commands.evaluation.scoring import RewardModel
from jaxrlhf.commands.evaluation.servers import ServerModel
from jaxrlhf.commands.evaluation.settings import EvalConfig, is_server
from jaxrlhf.commands.evaluation.statistics import Estimate, mean_and_error, pass_at_k, plain, wins
from jaxrlhf.commands.transcripts import record_of
from jaxrlhf.environments import Environments
from jaxrlhf.errors import InputError
from jaxrlhf.rewards import Rewards
from jaxrlhf.rewards.functions import split_spec
from jaxrlhf.rl.outcomes import Graded, data_columns
from jaxrlhf.runs.console import Console

MODEL_PART = "reward_model"


@dataclass(frozen=True)
class Comparison:
    """The responses of M models to P prompts, and their scores.

    Attributes:
        prompts: the prompts that fit the context of every model.
        left_out: rows that were left out, by reason.
        responses: of each model.
        scores: by scorer (each reward function, `reward_model` and `environment`), float64 `[M, P, n]`; NaN where a
            call or an episode failed.
        pass_scores: the score from which on a response passes, of each scorer with pass@k.
        tools: True if the model may call tools in its episodes.
        following: the verdicts on each model's instructions; empty without the reward function `instructions`.
    """

    prompts: Prompts
    left_out: dict[str, int]
    responses: list[Responses]
    scores: dict[str, np.ndarray]
    pass_scores: dict[str, float]
    following: list[Following]
    tools: bool = False

    @property
    def models(self) -> list[str]:
        """The models' names, in order."""
        return [responses.model for responses in self.responses]

    @property
    def samples(self) -> int:
        """n, the responses to each prompt."""
        return self.responses[0].lengths.shape[1]

    @cached_property
    def summary(self) -> dict[str, Any]:
        """Counts, the estimates of each model, and those of each pair of models."""
        pairs = list(itertools.combinations(range(len(self.responses)), 2))
        return {
            "prompts": len(self.prompts),
            "samples_per_prompt": self.samples,
            "left_out": self.left_out,
            "models": [self.model_summary(m) for m in range(len(self.responses))],
            "pairs": [self.pair_summary(name, a, b) for name in self.scores for a, b in pairs],
        }

    def model_summary(self, m: int) -> Mapping[str, object]:
        """Estimates of model number `m`; errors are clustered by prompt."""
        responses = self.responses[m]
        groups = np.repeat(np.arange(len(self.prompts)), self.samples)
        return {
            "model": responses.model,
            "tokens": mean_and_error(responses.lengths, groups),
            "ended": mean_and_error(responses.ended, groups),
            "scores": {name: mean_and_error(scores[m], groups) for name, scores in self.scores.items()},
            "pass_at_k": {name: self.passes(name, m) for name in self.pass_scores},
            "seconds": responses.seconds,
            **({"instructions": self.following[m].summary()} if self.following else {}),
            **({} if responses.episodes is None else {"episodes": summarise(responses.episodes, self.tools)}),
        }

    def passes(self, name: str, m: int) -> dict[int, Estimate]:
        """pass@k of a model for k = 1, 2, 4, … and n, over the prompts none of whose samples failed."""
        scores = self.scores[name][m]
        passed = scores[~np.isnan(scores).any(axis=1)] >= self.pass_scores[name]
        ks = sorted({1 << i for i in range(self.samples.bit_length())} | {self.samples})
        return {k: mean_and_error(pass_at_k(passed, k)) for k in ks}

    def pair_summary(self, name: str, a: int, b: int) -> dict[str, str | Estimate]:
        """Win rate and difference of the scores of two models, paired by prompt."""
        first, second = self.scores[name][a], self.scores[name][b]
        return {
            "model": self.models[a],
            "other": self.models[b],
            "scorer": name,
            "win_rate": mean_and_error(wins(first, second)),
            "score_difference": mean_and_error(first.mean(axis=1) - second.mean(axis=1)),
        }

    def lines(self) -> Iterator[str]:
        """A JSON line for each prompt: its responses, their scores and their episodes by model."""
        for i, prompt in enumerate(self.prompts.prompts):
            row: dict[str, Any] = {"prompt": prompt, **{k: v[i] for k, v in self.prompts.values.items()}}
            row["responses"] = {responses.model: responses.texts[i] for responses in self.responses}
            row["scores"] = {
                name: {model: scores[m, i] for m, model in enumerate(self.models)}
                for name, scores in self.scores.items()
            }
            played = {r.model: list(map(record_of, r.episodes[i])) for r in self.responses if r.episodes is not None}
            row |= {"episodes": played} if played else {}
            yield json.dumps(plain(row), ensure_ascii=False) + "\n"


def compare(config: EvalConfig, console: Console) -> Comparison:
    """Generates with every model, one after the other, and scores all responses.

    Raises:
        InputError: a model, the data or a reward function cannot be used.
    """
    rewards, environments = config.rewards.rewards(say=console.print), config.environments.load()
    columns, wanted = data_columns(rewards, environments)
    prompts = prompts_of(config, columns, console, wanted)
    rewards.check_references(prompts)
    models = models_of(config, environments, rewards, console)
    judge = RewardModel(config) if config.reward_model_name_or_path else None
    fits = np.logical_and.reduce([model.fits(prompts) for model in models])
    if not fits.any():
        raise InputError(
            f"no prompt leaves room for max_new_tokens={config.sampling.max_new_tokens} in the context of every model; "
            "lower it"
        )
    left_out = prompts.skipped | ({"too long for a model": int((~fits).sum())} if not fits.all() else {})
    prompts = prompts.take(np.flatnonzero(fits).tolist())
    responses = [model.respond(prompts, console) for model in models]
    scores: dict[str, list[np.ndarray]] = {name: [] for name in rewards.functions}
    for one in responses:
        for name, part in function_scores(rewards, prompts, one).items():
            scores[name].append(part)
    if judge is not None:
        scores[MODEL_PART] = judged(judge, prompts, responses, environments, console)
    if environments is not None and environments.rewards:
        scores[ENVIRONMENT] = [environment_scores(one.episodes) for one in responses if one.episodes is not None]
    joined = {name: np.stack(parts) for name, parts in scores.items()}
    checked = [n for n, spec in zip(rewards.functions, config.rewards.reward_functions, strict=True) if is_ours(spec)]
    scored = [~np.isnan(part) for part in joined[checked[0]]] if checked else []
    following = [check_instructions(prompts, one, rows) for one, rows in zip(responses, scored, strict=False)]
    tools = environments is not None and bool(environments.tools)
    return Comparison(prompts, left_out, responses, joined, pass_scores(config, joined), following, tools)


def models_of(
    config: EvalConfig, environments: Environments | None, rewards: Rewards, console: Console
) -> list[FolderModel | ServerModel]:
    """The models that the settings name."""
    if environments is not None:
        return [EpisodeModel(name, config, environments, rewards, console) for name in config.models]
    return [ServerModel(name, config) if is_server(name) else FolderModel(name, config) for name in config.models]


def judged(
    judge: RewardModel,
    prompts: Prompts,
    responses: list[Responses],
    environments: Environments | None,
    console: Console,
) -> list[np.ndarray]:
    """The reward model's scores of each model's responses, or of its whole episodes: float64 `[P, n]`."""
    if environments is None:
        texts = [list(itertools.chain(*rows)) for rows in zip(*(one.texts for one in responses), strict=True)]
        found = judge.score_responses(prompts, texts, console)
    else:
        every = zip(*(one.episodes or [] for one in responses), strict=True)
        found = judge.score_episodes([list(itertools.chain(*rows)) for rows in every], environments.tools, console)
    return np.split(found, len(responses), axis=1)


def is_ours(spec: str | Callable[..., object]) -> bool:
    """True for the built-in reward function `instructions`."""
    return isinstance(spec, str) and split_spec(spec)[0] == "instructions"


def function_scores(rewards: Rewards, prompts: Prompts, responses: Responses) -> dict[str, np.ndarray]:
    """The scores of each reward function, float64 `[P, n]`; NaN where a call failed."""
    if not rewards:
        return {}
    n = responses.lengths.shape[1]
    repeated = np.repeat(np.arange(len(prompts)), n).tolist()
    texts = list(itertools.chain(*responses.texts))
    columns, scored = prompts.columns(repeated), np.ones(len(texts), bool)
    messages: list[Any] = [prompts.prompts[i] for i in repeated]
    completions = None
    if responses.episodes is not None:
        graded = Graded.of(list(itertools.chain(*responses.episodes)))
        columns, scored = columns | graded.columns, graded.scored
        messages, completions = graded.prompts, graded.completions
    result = rewards.submit(
        [responses.prompts[i] for i in repeated],
        texts,
        columns,
        scored,
        conversations=messages,
        completions=completions,
    ).result()
    parts = {name: np.where(scored, part.astype(np.float64), np.nan) for name, part in result.parts.items()}
    return {name: part.reshape(-1, n) for name, part in parts.items()}


def pass_scores(config: EvalConfig, scores: dict[str, np.ndarray]) -> dict[str, float]:
    """The passing score of each scorer but the reward model: `pass_score`, or 1 where all scores are 0 or 1."""
    found = {}
    for name, values in scores.items():
        finite = values[~np.isnan(values)]
        if name != MODEL_PART and config.pass_score is not None:
            found[name] = config.pass_score
        elif name != MODEL_PART and len(finite) and np.isin(finite, (0, 1)).all():
            found[name] = 1.0
    return found
