"""Responses of a model in a folder: prompts in batches of similar length, at keys that do not depend on the batch."""

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import jax
import numpy as np

from jaxrlhf import keys
from jaxrlhf.commands.evaluation.rows import Prompts
from jaxrlhf.commands.evaluation.settings import EvalConfig
from jaxrlhf.data import (
    Tokenizer,
    encode_prompts,
    encode_stops,
    end_ids,
    length_bucket,
    pad_token_id,
    plain_response,
    vocabulary_size,
    without_end,
)
from jaxrlhf.data.batches import padded
from jaxrlhf.data.messages import Prompt
from jaxrlhf.engine import HybridEngine, SamplingConfig
from jaxrlhf.models import check_tokenizer_fits, load_pretrained, merged, read_config, with_kernels
from jaxrlhf.rl.outcomes import Outcome
from jaxrlhf.runs.console import Console
from jaxrlhf.trainers.settings import batch_devices


@dataclass(frozen=True)
class Responses:
    """The n responses of one model to each of P prompts.

    Attributes:
        model: the model, as the user named it.
        prompts: text of each prompt as reward functions get it: as the data has it, or rendered for the model.
        texts: `[P][n]`.
        lengths: int `[P, n]`: tokens.
        ended: bool `[P, n]`: ended by EOS or a stop string, before the longest length; of an episode: by no limit.
        seconds: duration with compilation, without loading the model.
        episodes: `[P][n]` with an environment or tools, whose last turns are `texts`.
    """

    model: str
    prompts: list[str]
    texts: list[list[str]]
    lengths: np.ndarray
    ended: np.ndarray
    seconds: float
    episodes: list[list[Outcome]] | None = None


def cut(text: str, stops: Sequence[str]) -> str:
    """The text before the first of the stop strings in it."""
    return text[: min((at for stop in stops if (at := text.find(stop)) >= 0), default=len(text))]


@lru_cache(maxsize=2)
def _token_texts(tokenizer: Tokenizer) -> tuple[str, ...]:
    """The text of each id by itself."""
    return tuple(tokenizer.batch_decode([[i] for i in range(len(tokenizer))], clean_up_tokenization_spaces=False))


@lru_cache(maxsize=16)
def _tokens_with(tokenizer: Tokenizer, stop: str) -> tuple[int, ...]:
    """The ids whose own text holds the stop string."""
    return tuple(i for i, text in enumerate(_token_texts(tokenizer)) if stop in text)


def with_stops(sampling: SamplingConfig, tokenizer: Tokenizer, stops: Sequence[str]) -> SamplingConfig:
    """The sampling, such that rows end soon after a stop string.

    The engine compares token ids, and a text can be written with several sequences of ids. So the ids that hold a
    stop string end a row, and the sequences that a tokenizer makes of it alone, after a space and after a line break.
    Text is cut at the stop string in any case (`cut`), so a way that is not foreseen costs time and changes no result.
    """
    if not stops:
        return sampling
    # min_new_tokens forbids the EOS ids, and these must stay allowed.
    ends = () if sampling.min_new_tokens else {i for stop in stops for i in _tokens_with(tokenizer, stop)}
    ways = encode_stops(tokenizer, [before + stop for stop in stops for before in ("", " ", "\n")])
    sequences = tuple(dict.fromkeys(ids for ids in ways if len(ids) > 1))
    eos = tuple(sorted({*sampling.eos_ids, *ends}))
    return dataclasses.replace(sampling, eos_token_id=eos, stop_sequences=sequences)


def left_padded(prompts: Sequence[Sequence[int]], rows: int, longest: int, pad: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids int32 and mask bool `[rows, P]` of prompts, with one pad token as the prompt of filler rows."""
    ids, mask = padded(prompts, rows, length_bucket(max(map(len, prompts)), longest), pad, left=True)
    return ids, mask.astype(bool)


def generate_all(
    engine: HybridEngine,
    prompts: Sequence[Sequence[int]],
    key: jax.Array,
    sampling: SamplingConfig,
    *,
    rows: int,
    slots: int = 0,
    numbers: Sequence[int] | None = None,
    on_batch: Callable[[int], object] | None = None,
) -> list[list[np.ndarray]]:
    """Generates n responses to each prompt, in batches of prompts of similar length.

    Args:
        engine: The engine.
        prompts: Token ids of P prompts; each leaves room for max_new_tokens in the model's context.
        key: Random key. A sample depends on it, on its prompt and on its number alone.
        sampling: How tokens are sampled.
        rows: Prompts of a batch.
        slots: Slots of continuous batching; 0: none.
        numbers: The number of each prompt; None: 0 … P-1.
        on_batch: Called with the number of prompts of each batch that is done.

    Returns:
        The response ids of each prompt, `[P][n]`.
    """
    n, longest = sampling.samples_per_prompt, engine.config.max_positions - sampling.max_new_tokens
    order = np.argsort([len(p) for p in prompts], kind="stable")
    found: list[list[np.ndarray]] = [[] for _ in prompts]
    for start in range(0, len(order), rows):
        chosen = order[start : start + rows]
        ids, mask = left_padded([prompts[i] for i in chosen], rows, longest, sampling.pad_token_id)
        own = np.zeros(rows, int)
        own[: len(chosen)] = chosen if numbers is None else np.asarray(numbers)[chosen]
        index = (own[:, None] * n + np.arange(n)).reshape(-1)
        rollout = engine.generate(ids, mask, key, sampling, sample_index=index, slots=slots)
        tokens, real = jax.device_get((rollout.tokens, rollout.response_mask))
        for j, i in enumerate(chosen):
            found[i] = [tokens[k][real[k]] for k in range(j * n, (j + 1) * n)]
        if on_batch is not None:
            on_batch(len(chosen))
    return found


class FolderModel:
    """A model in a folder, or on the hub. Reads config and tokenizer at once, and the weights in `respond`."""

    def __init__(self, name: str, config: EvalConfig) -> None:
        self.name, self.config = name, config
        self.shape = read_config(name)
        self.tokenizer: Tokenizer = config.tokenizer.load(name, config.data.template)
        check_tokenizer_fits(vocabulary_size(self.tokenizer), self.shape, f"the tokenizer of {name}")

    def encode(self, prompts: Prompts) -> list[list[int]]:
        """Token ids of the prompts, rendered by the model's own chat template."""
        special = self.config.data.template.special_tokens_in_data
        rows = prompts.prompts, prompts.tools, prompts.variables
        return encode_prompts(self.tokenizer, *rows, special_tokens_in_data=special)

    def fits(self, prompts: Prompts) -> np.ndarray:
        """bool `[P]`: prompts that leave room for the longest response in the context."""
        room = self.shape.max_positions - self.config.sampling.max_new_tokens
        return np.array([len(ids) <= room for ids in self.encode(prompts)])

    def open(self, console: Console) -> HybridEngine:
        """Loads the weights."""
        config, mesh = self.config, self.config.mesh.make_mesh()
        if config.tokenizer.lacks_template(self.name, config.data.template):
            console.print(
                f"WARNING: {self.name} has no chat template, so the default prompt_template renders its prompts; "
                "--chat_template names another"
            )
        dtype = config.mesh.compute_dtype
        model = merged(load_pretrained(self.name, mesh=mesh, dtype=dtype, param_dtype=dtype))
        return HybridEngine(with_kernels(model, kv_cache_dtype=config.generation.kv_cache_dtype), mesh)

    def respond(self, prompts: Prompts, console: Console) -> Responses:
        """Loads the weights and generates. The weights are released afterwards."""
        config, engine = self.config, self.open(console)
        sampling = dataclasses.replace(
            config.sampling, eos_token_id=end_ids(self.tokenizer), pad_token_id=pad_token_id(self.tokenizer)
        )
        ending = with_stops(sampling, self.tokenizer, sampling.stop_strings)
        ids, key = self.encode(prompts), keys.stream(config.data.seed, keys.Stream.EVALUATION)
        rows = config.per_device_batch_size * batch_devices(engine.mesh)
        slots = engine.check_slots(config.generation.generation_slots, rows * sampling.samples_per_prompt)
        begin = time.monotonic()
        with console.progress(len(ids), description=self.name, unit="prompt") as bar:
            found = generate_all(engine, ids, key, ending, rows=rows, slots=slots, on_batch=bar.update)
        seconds = time.monotonic() - begin
        plain = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
        decode: Any = self.tokenizer.decode  # one text, though its type says perhaps several
        full = [[decode(without_end(self.tokenizer, r), **plain) for r in responses] for responses in found]
        texts = [[plain_response(self.tokenizer, cut(text, sampling.stop_strings)) for text in row] for row in full]
        stopped = np.array([[cut(text, sampling.stop_strings) != text for text in row] for row in full])
        return Responses(
            model=self.name,
            prompts=[self._prompt_text(prompt, own) for prompt, own in zip(prompts.prompts, ids, strict=True)],
            texts=texts,
            lengths=np.array([[len(r) for r in responses] for responses in found]),
            ended=stopped | np.array([[ending.ended(r.tolist()) for r in responses] for responses in found]),
            seconds=seconds,
        )

    def _prompt_text(self, prompt: Prompt, ids: list[int]) -> str:
        decode: Any = self.tokenizer.decode
        return prompt if isinstance(prompt, str) else decode(ids, skip_special_tokens=True)
