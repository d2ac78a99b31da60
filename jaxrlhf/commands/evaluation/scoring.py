"""Scores of token sequences and of responses by a reward model."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxrlhf import objectives
from jaxrlhf.commands.evaluation.rows import Prompts
from jaxrlhf.commands.evaluation.settings import EvalConfig
from jaxrlhf.data import EncodedRow, Tokenizer, encode_rows, length_bucket, pad_token_id, vocabulary_size
from jaxrlhf.data.batches import padded
from jaxrlhf.data.tokenized import Encoding, fit
from jaxrlhf.distributed import to_host
from jaxrlhf.environments import Tool
from jaxrlhf.models import (
    Decoder,
    Model,
    check_tokenizer_fits,
    load_pretrained,
    logical_axes,
    merged,
    read_config,
    working_copy,
)
from jaxrlhf.models.model import PyTree
from jaxrlhf.rl.outcomes import Outcome, to_last_turn
from jaxrlhf.runs.console import Console
from jaxrlhf.sharding import TRAIN_RULES, place_batch, use
from jaxrlhf.trainers.settings import batch_devices
from jaxrlhf.trainers.tokenizers import TokenizerConfig


@partial(jax.jit, static_argnames=("module", "mesh"))
def last_scores(params: PyTree, ids: jax.Array, mask: jax.Array, *, module: Decoder, mesh: Mesh) -> jax.Array:
    """Computes the score float32 `[B]` at the last token of each right-padded sequence `[B, T]`."""
    with use(mesh, TRAIN_RULES):
        read = working_copy(params, logical_axes(module), module, mesh)
        values: Any = module.apply({"params": read}, ids, mask, contiguous=True)
        return objectives.score_at_last_token(values, mask)


def score_batch(
    model: Model, mesh: Mesh, sequences: Sequence[Sequence[int]], rows: int, width: int, pad: int
) -> np.ndarray:
    """Scores at most `rows` token sequences of at most `width` tokens at their last tokens: float32 `[N]`.

    Args:
        model: The reward model.
        mesh: The mesh of its parameters.
        sequences: Token ids of N sequences.
        rows: Rows of the program, a multiple of the devices that the batch is split over.
        width: Columns of the program.
        pad: Id of the padding.
    """
    ids, mask = place_batch(padded(sequences, rows, width, pad), mesh)
    return to_host(last_scores(model.params, ids, mask, module=model.module, mesh=mesh))[: len(sequences)]


class RewardModel:
    """A reward model and its tokenizer.

    Args:
        config: names the model. The tokenizer is its own, unless there are no language models and one is named.

    Raises:
        InputError: the model has no scalar head, or cannot be read.
    """

    def __init__(self, config: EvalConfig) -> None:
        self.config, self.name = config, str(config.reward_model_name_or_path)
        self.shape = read_config(self.name)
        setting = TokenizerConfig() if config.models else config.tokenizer
        self.tokenizer: Tokenizer = setting.load(self.name, config.data.template)
        check_tokenizer_fits(vocabulary_size(self.tokenizer), self.shape, f"the tokenizer of {self.name}")
        self.mesh = config.mesh.make_mesh()
        self.rows = config.per_device_batch_size * batch_devices(self.mesh)

    def load(self) -> Model:
        """Loads the weights."""
        dtype = self.config.mesh.compute_dtype
        options = {"head": "scalar", "new_head": False, "mesh": self.mesh, "dtype": dtype, "param_dtype": dtype}
        return merged(load_pretrained(self.name, **options))

    def score(self, sequences: Sequence[np.ndarray], console: Console) -> np.ndarray:
        """Scores token sequences at their last tokens: float64 `[N]`."""
        model, pad = self.load(), pad_token_id(self.tokenizer)
        order = np.argsort([len(ids) for ids in sequences], kind="stable")
        scores = np.zeros(len(sequences))
        with console.progress(len(sequences), description="score", unit="sequence") as bar:
            for start in range(0, len(order), self.rows):
                chosen = order[start : start + self.rows]
                given = [sequences[i] for i in chosen]
                width = length_bucket(max(map(len, given)), self.shape.max_positions)
                scores[chosen] = score_batch(model, self.mesh, given, self.rows, width, pad)
                bar.update(len(chosen))
        return scores

    def score_responses(self, prompts: Prompts, texts: Sequence[Sequence[str]], console: Console) -> np.ndarray:
        """Scores responses `[P][n]` by the reward model's own tokenizer and template: float64 `[P, n]`.

        As in training, a response ends with EOS, and a prompt that is too long loses its beginning. NaN where the
        template cannot render a response.
        """
        encoded = encode_rows(self.tokenizer, prompts.prompts, texts, prompts.tools, prompts.variables)
        return self._score_encoded(encoded, max(map(len, texts), default=0), console)

    def score_episodes(
        self, episodes: Sequence[Sequence[Outcome]], tools: Sequence[Tool], console: Console
    ) -> np.ndarray:
        """Scores episodes `[P][n]`, from the prompt to the model's last turn, as `score_responses`: float64 `[P, n]`.

        NaN for failed episodes.
        """
        outcomes = [outcome for row in episodes for outcome in row]
        kept = [k for k, outcome in enumerate(outcomes) if outcome.status != "failed"]
        played = [to_last_turn(outcomes[k].messages) for k in kept]
        schemas = [[tool.schema for tool in tools] or None] * len(played)
        prompts, turns = [messages[:-1] for messages in played], [[messages[-1:]] for messages in played]
        scores = np.full(len(outcomes), np.nan)
        scores[kept] = self._score_encoded(encode_rows(self.tokenizer, prompts, turns, schemas), 1, console)[:, 0]
        return scores.reshape(len(episodes), -1)

    def _score_encoded(self, encoded: Sequence[EncodedRow | str], size: int, console: Console) -> np.ndarray:
        """Scores of rows with up to `size` responses each, float64 `[P, size]`; NaN where there is none."""
        longest = self.shape.max_positions
        encoding = Encoding("reward", max_length=longest, max_prompt_length=longest, long_prompts="truncate")
        sequences, places = [], []
        for i, row in enumerate(encoded):
            if isinstance(row, str):  # the template cannot render it
                continue
            for j, response in enumerate(row.responses):
                alone = EncodedRow(row.prompt, row.prompt_mask, [response])
                bos: Any = self.tokenizer.bos_token_id
                fitted: Any = fit(alone, encoding, bos)[0]
                _, ((ids, _),) = fitted
                sequences.append(np.asarray(ids, np.int32))
                places.append((i, j))
        scores = np.full((len(encoded), size), np.nan)
        if sequences:
            rows, columns = np.array(places).T
            scores[rows, columns] = self.score(sequences, console)
        return scores
