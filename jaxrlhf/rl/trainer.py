"""The pieces of a PPO iteration, for a loop of one's own: experience from prompts, the update, an evaluation."""

import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrlhf import objectives
from jaxrlhf.data import answer_text, encode_stops, eval_batches, pad_token_id
from jaxrlhf.distributed import to_host
from jaxrlhf.engine import Rollout, SamplingConfig
from jaxrlhf.errors import SharedError
from jaxrlhf.rewards import Rewards, finite_mean
from jaxrlhf.rl import Experience, PPOHyperparameters, ppo_step, score_rollout
from jaxrlhf.rl.config import PPOConfig
from jaxrlhf.rl.models import RLHFEngine
from jaxrlhf.rl.rollouts import generate_in_pieces
from jaxrlhf.runs import Run
from jaxrlhf.sharding import place_batch
from jaxrlhf.trainers.loop import Announce

Columns = dict[str, list[Any]]


class PPOTrainer:
    """The two halves of a PPO iteration, for a loop of one's own: `generate_experience`, then `train_rlhf`.

    `rewards` replaces the config's `reward_functions`, with Python callables say.
    """

    def __init__(
        self,
        engine: RLHFEngine,
        config: PPOConfig | None = None,
        run: Run | None = None,
        rewards: Rewards | None = None,
    ) -> None:
        self.engine = engine
        self.config = config = engine.config if config is None else config
        self.run = run
        self.rewards = config.rewards(print if run is None else run.print) if rewards is None else rewards
        stops = encode_stops(engine.tokenizer, config.stop_strings)
        self.sampling = config.sampling(engine.tokenizer.eos_token_id, pad_token_id(engine.tokenizer), stops)
        self.key = jax.random.fold_in(jax.random.key(config.seed), 2)
        self.metrics: dict[str, float] = {}
        """Of the last `train_rlhf`, under TRL's names."""
        self._generate = Announce(run, "generate program", engine.actor.generate)
        self._score = Announce(run, "scoring program", score_rollout)
        self._train = Announce(run, "PPO train program", ppo_step)
        self._scored: dict[str, float] = {}
        self.timing: dict[str, float] = {}

    def rollout(
        self,
        prompt_batch: dict[str, Any],
        key: jax.Array,
        sample_index: Any = None,
        pieces: int = 1,
        sampling: SamplingConfig | None = None,
        each: Any = None,
    ) -> Rollout:
        """`samples_per_prompt` responses to each prompt; `each` as in `generate_in_pieces`."""
        sampling = self.sampling if sampling is None else sampling
        batch = (self._generate, prompt_batch["prompt_ids"], prompt_batch["prompt_mask"], key, sampling)
        options = {"pieces": pieces, "sample_index": sample_index, "each": each}
        return generate_in_pieces(*batch, **options, slots=self.config.generation_slots)

    def score(self, rollout: Rollout, hyperparameters: PPOHyperparameters) -> Experience:
        """The four models' part: log-probs, values, and the reward model's scores (0 without one)."""
        e = self.engine
        params = (e.state.actor_params, e.state.critic_params, e.reference_params, e.reward_params)
        modules = {"actor": e.state.actor, "critic": e.state.critic, "reference": e.reference, "reward": e.reward}
        static = {"hyperparameters": hyperparameters, "mesh": e.mesh, "sampling": self.sampling}
        return self._score(rollout, *params, **modules, **static)

    def experience(
        self,
        prompt_batch: dict[str, Any],
        key: jax.Array,
        hyperparameters: PPOHyperparameters,
        columns: Columns | None = None,
        prompts: Sequence[str] | None = None,
        sample_index: Any = None,
        pieces: int = 1,
        sampling: SamplingConfig | None = None,
    ) -> Experience:
        """Sample and score, as `generate_experience` says, with keys, pieces and a sampling of one's own."""
        sampling = self.sampling if sampling is None else sampling
        n = sampling.samples_per_prompt
        row_mask = np.asarray(prompt_batch.get("row_mask", np.ones(len(prompt_batch["prompt_ids"])))) > 0
        handles: list[tuple[np.ndarray, Any]] = []

        def submit(rows: np.ndarray, rollout: Rollout) -> None:
            tokens, mask, response_mask = to_host((rollout.tokens, rollout.mask, rollout.response_mask))
            own = rows // n
            asked = self.texts(tokens, mask, response_mask)[0] if prompts is None else [prompts[i] for i in own]
            template, stops = self.config.prompt_template, self.config.stop_strings
            answers = [
                answer_text(self.engine.tokenizer, ids[inside], template, stops)
                for ids, inside in zip(tokens, response_mask, strict=True)
            ]
            of_rows = {name: [values[i] for i in own] for name, values in (columns or {}).items()}
            handles.append((rows, self.rewards.submit(asked, answers, of_rows, row_mask[own])))

        begin = time.monotonic()
        options = {"sample_index": sample_index, "pieces": pieces, "sampling": sampling}
        rollout = self.rollout(prompt_batch, key, **options, each=submit if self.rewards else None)
        middle = time.monotonic()
        experience = jax.block_until_ready(self.score(jax.block_until_ready(rollout), hyperparameters))
        end = time.monotonic()
        self.timing = {"timing/generate": middle - begin, "timing/score": end - middle}
        self._scored = {}
        if self.rewards:
            experience = self._with_functions(experience, handles)
            self.timing["timing/reward_functions"] = time.monotonic() - end
        return experience

    def _with_functions(self, experience: Experience, handles: Sequence[tuple[np.ndarray, Any]]) -> Experience:
        """The experience with the weighted sum of all scores; rows without one are masked out."""
        model = to_host(experience.scores)
        scores = self.config.reward_model_weight * model if self.engine.reward is not None else np.zeros_like(model)
        parts: dict[str, np.ndarray] = {}
        failures = 0
        for rows, handle in handles:
            result = handle.result()
            scores[rows] += result.scores
            failures += len(result.failures)
            for name, values in result.parts.items():
                parts.setdefault(name, np.zeros_like(model))[rows] = values
        means = {f"rewards/{name}": finite_mean(values) for name, values in parts.items()}
        self._scored = {name: mean for name, mean in means.items() if mean is not None}
        self._scored |= {"rewards/failures": failures}
        if self.engine.reward is not None:
            self._scored["rewards/reward_model"] = float(model.mean())
        return experience.with_scores(place_batch(scores.astype(np.float32), self.engine.mesh))

    def texts(self, tokens: np.ndarray, mask: np.ndarray, response_mask: np.ndarray) -> tuple[list[str], list[str]]:
        """Prompts and responses as text, without special tokens, of host arrays `[B, T]`."""
        decode = partial(self.engine.tokenizer.batch_decode, skip_special_tokens=True)
        rows = list(zip(tokens, mask, response_mask, strict=True))
        prompts = decode([ids[real & ~response] for ids, real, response in rows])
        return prompts, decode([ids[response] for ids, _, response in rows])

    def generate_experience(
        self,
        prompt_batch: dict[str, Any],
        columns: Columns | None = None,
        prompts: Sequence[str] | None = None,
    ) -> Experience:
        """Sample `samples_per_prompt` responses per prompt and score them.

        `prompt_batch` holds `prompt_ids` and `prompt_mask`, left-padded `[B, P]`. Reward functions read the `prompts`
        as text (default: as decoded from the ids), the answers, and `columns`, B values each; they work on one piece
        (generation_batches) while the next is generated, and on the last beside the models. Draws are keyed by (seed,
        step, row).
        """
        h, count = self.engine.state.hyperparameters, len(prompt_batch["prompt_ids"])
        h.check_rows(count * self.sampling.samples_per_prompt)
        self.config.check_pieces(count)
        key = jax.random.fold_in(self.key, int(self.engine.state.step))
        return self.experience(prompt_batch, key, h, columns, prompts, pieces=self.config.generation_batches)

    def train_rlhf(self, experience: Experience, ptx: dict[str, Any] | None = None) -> tuple[float, float]:
        """All epochs and minibatches on this experience; returns (actor loss, critic loss), more in `metrics`.

        `ptx`, with ptx_coef, is a batch of pretraining text (`TextBlocks.batch`). The critic's loss is NaN without one.
        Where no answer had a score nothing is updated, and both are NaN: momentum alone would move the models.
        """
        begin = time.monotonic()
        if self.rewards and not to_host(jnp.any(experience.response_mask)):
            self.engine.state = self.engine.state.replace(step=self.engine.state.step + 1)
            self.metrics = {"guard/skipped_updates": 0.0, "guard/unscored": 1.0} | self._scored
            self.timing["timing/train"] = 0.0
            return float("nan"), float("nan")
        self.engine.state, metrics = self._train(self.engine.state, experience, ptx)
        self.metrics = {name: float(value) for name, value in to_host(metrics).items()} | self._scored
        self.metrics |= {"guard/unscored": 0.0} if self.rewards else {}
        self.timing["timing/train"] = time.monotonic() - begin
        return self.metrics["loss/policy_avg"], self.metrics.get("loss/value_avg", float("nan"))

    def evaluate(
        self, prompts: Any, batch_size: int, baseline: dict[int, float] | None = None
    ) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """Sample an answer to every held-out prompt, always with the same keys; (figures, one record per sample).

        `baseline`: scores by prompt number of another model's answers to the same prompts, for a win rate.
        """
        plain = PPOHyperparameters(temperature=self.engine.state.hyperparameters.temperature)
        sampling = replace(self.sampling, samples_per_prompt=1)
        key = jax.random.fold_in(jax.random.key(self.config.seed), 3)
        records: list[dict[str, Any]] = []
        for batch in eval_batches(prompts, batch_size):
            index, read = batch["index"], {}
            if self.rewards:
                read = {"columns": prompts.columns(index), "prompts": prompts.prompt_texts(index)}
            number = np.maximum(index, 0)
            experience = self.experience(batch, key, plain, **read, sample_index=number, sampling=sampling)
            records += self.records(experience, batch["row_mask"], index)
        if not records:
            raise SharedError("evaluation: no answer to a held-out prompt could be scored; see the messages above")
        scores = np.array([r["score"] for r in records])
        figures = {
            "scores": float(scores.mean()),
            "scores_std": float(scores.std()),
            "kl": float(np.mean([r["kl"] for r in records])),
            "response_length": float(np.mean([r["length"] for r in records])),
            "eos_rate": float(np.mean([r["ended"] for r in records])),
        }
        if baseline is not None:
            before = np.array([baseline.get(r["index"], np.nan) for r in records])
            figures["win_rate"] = float(objectives.win_rate(jnp.asarray(scores), jnp.asarray(before)))
        return figures, records

    def records(self, experience: Experience, row_mask: Any = None, index: Any = None) -> list[dict[str, Any]]:
        """Per scored row: number, prompt and response text, score, KL to the reference in nats, length, whether ended.

        Rows that `row_mask` excludes or that have no score are left out; `index` `[B]` are the rows' numbers.
        """
        e = to_host(experience)
        prompts, responses = self.texts(e.tokens, e.mask, e.response_mask)
        records = []
        for b in range(len(e.scores)):
            if not e.response_mask[b].any() or (row_mask is not None and not row_mask[b]):
                continue
            response = e.tokens[b][e.response_mask[b]]
            gap = np.where(e.response_mask[b], e.logprobs[b] - e.ref_logprobs[b], 0.0)
            records.append(
                {
                    "index": b if index is None else int(index[b]),
                    "prompt": prompts[b],
                    "response": responses[b],
                    "score": float(e.scores[b]),
                    "kl": float(gap.sum()),
                    "length": len(response),
                    "ended": self.sampling.ended(response),
                }
            )
        return records
