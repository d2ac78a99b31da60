"""Episodes of a model in a folder, with an environment or tools: the rollouts that training makes."""

import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxrlhf import keys
from jaxrlhf.commands.evaluation.generators import FolderModel, Responses
from jaxrlhf.commands.evaluation.rows import Prompts
from jaxrlhf.commands.evaluation.settings import EvalConfig
from jaxrlhf.commands.evaluation.statistics import Estimate, mean_and_error
from jaxrlhf.distributed import to_host
from jaxrlhf.engine import HybridEngine
from jaxrlhf.environments import Environments
from jaxrlhf.rewards import Rewards
from jaxrlhf.rl.episodes import EpisodeRunner
from jaxrlhf.rl.outcomes import Outcome, reads_state
from jaxrlhf.runs.console import Console
from jaxrlhf.trainers.settings import batch_devices, check_context
from jaxrlhf.trainers.tokenizers import sampling_for

ENVIRONMENT = "environment"
"""The scorer that the environment's own rewards are."""


class EpisodeModel(FolderModel):
    """A model in a folder that plays an episode for each sample.

    Args:
        name: The folder, or a name on the hub.
        config: The settings.
        environments: The source of episodes.
        rewards: The reward functions.
        console: Gets messages on failed episodes.

    Raises:
        InputError: The model cannot be read, or its chat template does not show the tools.
    """

    def __init__(
        self, name: str, config: EvalConfig, environments: Environments, rewards: Rewards, console: Console
    ) -> None:
        super().__init__(name, config)
        self.sampling, context = sampling_for(self.tokenizer, config.sampling), self.shape.max_positions
        longest = self.sampling.max_new_tokens
        check_context(self.shape, longest + 1, f"max_new_tokens={longest} and a prompt for {name}")
        self.runner = EpisodeRunner(
            config.environments,
            environments,
            self.tokenizer,
            self.sampling,
            longest_prompt=context - longest,
            special_tokens_in_data=config.data.template.special_tokens_in_data,
            scored_otherwise=bool(rewards) or config.reward_model_name_or_path is not None,
            keeps_state=reads_state(rewards),
            say=console.print,
        )
        self.runner.prompt_limit = f"with max_new_tokens={longest} the context of {context} has no room for it"

    def fits(self, prompts: Prompts) -> np.ndarray:
        """bool `[P]`: all; an episode whose prompt is too long fails."""
        return np.ones(len(prompts), bool)

    def respond(self, prompts: Prompts, console: Console) -> Responses:
        """Loads the weights and plays n episodes of each prompt. The weights are released afterwards."""
        engine = self.open(console)
        given, n = self.encode(prompts), self.sampling.samples_per_prompt
        rows = self.config.per_device_batch_size * batch_devices(engine.mesh)
        order = np.argsort([len(ids) for ids in given], kind="stable")
        outcomes: list[list[Outcome]] = [[] for _ in given]
        lengths = np.zeros((len(given), n), int)
        begin = time.monotonic()
        with console.progress(len(given), description=self.name, unit="prompt") as bar:
            for start in range(0, len(order), rows):
                chosen = order[start : start + rows]
                played, sampled = self._play(engine, prompts, chosen, rows)
                for j, i in enumerate(chosen):
                    outcomes[i], lengths[i] = played[j * n : (j + 1) * n], sampled[j * n : (j + 1) * n]
                bar.update(len(chosen))
        return Responses(
            model=self.name,
            prompts=[self._prompt_text(prompt, own) for prompt, own in zip(prompts.prompts, given, strict=True)],
            texts=[[outcome.reply for outcome in row] for row in outcomes],
            lengths=lengths,
            ended=np.array([[outcome.status == "done" for outcome in row] for row in outcomes]),
            seconds=time.monotonic() - begin,
            episodes=outcomes,
        )

    def _play(
        self, engine: HybridEngine, prompts: Prompts, chosen: np.ndarray, rows: int
    ) -> tuple[list[Outcome], np.ndarray]:
        """Outcomes and sampled tokens `[rows · n]` of the episodes of some prompts, filled up to `rows`."""
        n = self.sampling.samples_per_prompt
        filled = np.zeros(rows, int)
        filled[: len(chosen)] = chosen
        episodes, rollout = self.runner.play(
            engine.episodes,
            [prompts.prompts[i] for i in filled],
            prompts.columns(filled.tolist()),
            np.arange(rows) < len(chosen),
            keys.stream(self.config.data.seed, keys.Stream.EVALUATION),
            (filled[:, None] * n + np.arange(n)).reshape(-1),
        )
        return episodes.outcomes, to_host(rollout.response_mask).sum(axis=1)


def environment_scores(episodes: Sequence[Sequence[Outcome]]) -> np.ndarray:
    """The rewards of the environment, float64 `[P, n]`; NaN for failed episodes."""
    return np.array([[outcome.score for outcome in row] for row in episodes], np.float64)


def summarise(episodes: Sequence[Sequence[Outcome]], tools: bool) -> dict[str, Any]:
    """Estimates of the episodes `[P][n]` of one model; errors are clustered by prompt.

    `cut_at_…` are shares of all episodes, and the other estimates are of the episodes in which the model had a turn.
    """
    outcomes = [outcome for row in episodes for outcome in row]
    groups = np.repeat(np.arange(len(episodes)), [len(row) for row in episodes])
    played = np.array([outcome.turns > 0 for outcome in outcomes])

    def mean(values: Sequence[float | None], where: np.ndarray) -> Estimate:
        numbers = np.array([np.nan if value is None else value for value in values], np.float64)
        return mean_and_error(numbers[where], groups[where])

    def cut(limit: str) -> Estimate:
        return mean([o.status == "truncated" and o.reason == limit for o in outcomes], np.ones(len(outcomes), bool))

    found: dict[str, Any] = {"turns": mean([o.turns for o in outcomes], played)}
    if tools:
        found["tool_calls"] = mean([o.calls for o in outcomes], played)
        found["tool_errors"] = mean([o.errors for o in outcomes], played)
    found |= {
        "environment_tokens": mean([o.given for o in outcomes], played),
        "cut_at_max_turns": cut("turns"),
        "cut_at_max_new_tokens": cut("tokens"),
        "failures": sum(outcome.status == "failed" for outcome in outcomes),
    }
    names = sorted({name for outcome in outcomes for name in outcome.info})
    found["info"] = {name: mean([o.info.get(name) for o in outcomes], played) for name in names}
    return found
