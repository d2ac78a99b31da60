"""Makes our engine a model of lm-eval, so that its task library runs on JAX.

Importing this module registers the model `jaxrlhf`. `python -m jaxrlhf.commands.evaluation.harness` is lm-eval's own
command with it: `… run --model jaxrlhf --model_args pretrained=DIR --tasks ifeval`.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from lm_eval import utils  # pyright: ignore[reportMissingImports]
from lm_eval.api.model import TemplateLM  # pyright: ignore[reportMissingImports]
from lm_eval.api.registry import register_model  # pyright: ignore[reportMissingImports]

from jaxrlhf import keys
from jaxrlhf.commands.evaluation.generators import cut, generate_all, with_stops
from jaxrlhf.data import end_ids, length_bucket, pad_token_id, read_tokenizer, vocabulary_size
from jaxrlhf.data.batches import padded
from jaxrlhf.distributed import to_host
from jaxrlhf.engine import HybridEngine, SamplingConfig
from jaxrlhf.errors import InputError
from jaxrlhf.models import (
    Decoder,
    check_tokenizer_fits,
    default_dtype,
    load_pretrained,
    logical_axes,
    merged,
    read_config,
    with_kernels,
    working_copy,
)
from jaxrlhf.models.decoder import read_columns
from jaxrlhf.models.model import PyTree
from jaxrlhf.runs.console import Console
from jaxrlhf.sharding import TRAIN_RULES, make_mesh, place_batch, use
from jaxrlhf.trainers.settings import DTYPES, batch_devices
from jaxrlhf.trainers.tokenizers import with_model_ends

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance  # pyright: ignore[reportMissingImports]

MAX_GEN_TOKS = 256
COLUMNS = 64  # continuation tokens whose logits are in memory together
LENGTH_NAMES = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
SAMPLING_NAMES = ("top_k", "top_p", "repetition_penalty", "min_new_tokens")
NEUTRAL = {"num_beams": 1, "num_return_sequences": 1, "use_cache": True, "early_stopping": False}
"""Arguments that change nothing at these values. Others are refused."""


@partial(jax.jit, static_argnames=("module", "mesh", "count"))
def continuation_scores(
    params: PyTree,
    ids: jax.Array,
    mask: jax.Array,
    start: jax.Array,
    labels: jax.Array,
    *,
    module: Decoder,
    mesh: Mesh,
    count: int,
) -> tuple[jax.Array, jax.Array]:
    """Scores continuations that share their input.

    Args:
        params: The model's parameters.
        ids: int `[B, T]`: the inputs, right-padded.
        mask: `[B, T]`.
        start: int `[B]`: the column whose logits predict the first continuation token.
        labels: int `[B, K, count]`: K continuations of each row; -1: no token.
        module: The model's module.
        mesh: The mesh of the parameters.
        count: Columns to score.

    Returns:
        The sum of the log-probs float32 `[B, K]`, and whether every token is the most likely one, bool `[B, K]`.
    """
    with use(mesh, TRAIN_RULES):
        variables: Any = {"params": working_copy(params, logical_axes(module), module, mesh)}
        hidden: Any = module.apply(variables, ids, mask, contiguous=True, method="hidden_states")
        size = min(COLUMNS, count)
        more = -count % size
        columns = jnp.pad(read_columns(hidden, start, count), ((0, 0), (0, more), (0, 0)))
        labels = jnp.pad(labels, ((0, 0), (0, 0), (0, more)), constant_values=-1)

        def block(i: jax.Array) -> tuple[jax.Array, jax.Array]:
            part: Any = partial(jax.lax.dynamic_slice_in_dim, start_index=i * size, slice_size=size)
            logits: Any = module.apply(variables, part(columns, axis=1), method="padded_logits")
            targets = part(labels, axis=2)
            kept = targets >= 0
            picked = jnp.take_along_axis(logits, jnp.maximum(targets, 0).swapaxes(1, 2), axis=-1).swapaxes(1, 2)
            logprobs = picked - jax.nn.logsumexp(logits, axis=-1)[:, None]
            best = targets == jnp.argmax(logits, axis=-1)[:, None]
            return jnp.sum(jnp.where(kept, logprobs, 0.0), axis=2), jnp.all(best | ~kept, axis=2)

        sums, greedy = jax.lax.map(block, jnp.arange((count + more) // size))
        return jnp.sum(sums, axis=0), jnp.all(greedy, axis=0)


def power_of_two(size: int) -> int:
    """The smallest power of two that is at least `size`."""
    return 1 << max(size - 1, 0).bit_length()


@register_model("jaxrlhf")
class JaxLM(TemplateLM):
    """A model in a folder, as lm-eval calls it.

    Args:
        pretrained: Folder or hub name of a language model.
        tokenizer: Folder or hub name of the tokenizer. Default: the model's own.
        dtype: "auto", "float32" or "bfloat16".
        batch_size: Rows per device that are worked on at a time; "auto" stands for 8.
        max_length: Longest input in tokens. Default: the model's context.
        add_bos_token: Whether texts begin with BOS. Default: as the tokenizer says.
        mesh: Sizes of the mesh axes `data`, `fsdp` and `tensor`.
        seed: Seed of the sampling.
        kv_cache_dtype: "auto", "int8" or "fp8".
        generation_slots: Slots of continuous batching; 0: none.
        options: What lm-eval passes to every model, such as `device`; without effect.
    """

    def __init__(
        self,
        pretrained: str,
        tokenizer: str | None = None,
        dtype: str = "auto",
        batch_size: int | str | None = 8,
        max_length: int | None = None,
        add_bos_token: bool | None = None,
        mesh: Sequence[int] = (1, -1, 1),
        seed: int = 42,
        kv_cache_dtype: str = "auto",
        generation_slots: int = 0,
        **options: object,
    ) -> None:
        super().__init__()
        unknown = set(options) - {"device", "max_batch_size"}
        if unknown:
            raise InputError(f"model_args: {', '.join(sorted(unknown))}: the model jaxrlhf has no such argument")
        self.pretrained, self.add_bos_token = str(pretrained), add_bos_token
        other = tokenizer not in (None, pretrained)
        plain = read_tokenizer(tokenizer or pretrained)
        self.tokenizer: Any = with_model_ends(plain, read_config(pretrained), other_tokenizer=other)
        self.mesh = make_mesh(*mesh)
        precision = default_dtype() if dtype == "auto" else DTYPES[dtype]
        model = merged(load_pretrained(pretrained, mesh=self.mesh, dtype=precision, param_dtype=precision))
        check_tokenizer_fits(vocabulary_size(self.tokenizer), model.config, "the tokenizer")
        self.engine = HybridEngine(with_kernels(model, kv_cache_dtype=kv_cache_dtype), self.mesh)
        self.max_length = int(max_length or model.config.max_positions)
        if self.max_length > model.config.max_positions:
            raise InputError(f"max_length={max_length} exceeds the model's context of {model.config.max_positions}")
        rows = 8 if batch_size in (None, "auto") else int(batch_size)
        self.batch_size = rows
        self.rows = rows * batch_devices(self.mesh)
        self.key = keys.stream(int(seed), keys.Stream.EVALUATION)
        self.slots, self.console = self.engine.check_slots(int(generation_slots), self.rows), Console()

    # ---- tokens

    @property
    def eot_token_id(self) -> int:
        """The tokenizer's EOS."""
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """The token before a text without context: BOS, else EOS."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    @property
    def max_gen_toks(self) -> int:
        """Tokens to generate where a task does not say: 256, or half of a short context."""
        return min(MAX_GEN_TOKS, self.max_length // 2)

    @property
    def tokenizer_name(self) -> str:
        """Names the tokenizer in lm-eval's caches."""
        return self.tokenizer.name_or_path.replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **options: object) -> list[int]:
        """Token ids of a text, as lm-eval's model of transformers encodes it: BOS where the tokenizer adds one, unless
        the text begins with it."""
        special = self.add_bos_token if add_special_tokens is None else add_special_tokens
        if add_special_tokens is None and string.startswith(self.tokenizer.decode([self.prefix_token_id])):
            special = False
        chosen = {} if special is None else {"add_special_tokens": special}
        return list(self.tokenizer.encode(string, **chosen))

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Renders a conversation by the tokenizer's chat template."""
        if not self.tokenizer.chat_template:
            raise InputError(
                f"apply_chat_template: the tokenizer of {self.pretrained} has no chat template; leave it out, or add "
                "one to the tokenizer"
            )
        options = {"add_generation_prompt": add_generation_prompt, "continue_final_message": not add_generation_prompt}
        return self.tokenizer.apply_chat_template(chat_history, tokenize=False, **options)

    # ---- log-likelihoods

    def _loglikelihood_tokens(
        self, requests: list[tuple[object, list[int], list[int]]], disable_tqdm: bool = False, **options: object
    ) -> list[tuple[float, bool]]:
        """Log-likelihoods of (texts, context ids, continuation ids), in batches of similar length.

        Continuations that differ in their last token alone, such as the letters of multiple choice, share a row.
        """
        rows: dict[tuple[tuple[int, ...], int], list[int]] = defaultdict(list)
        for i, (_, context, continuation) in enumerate(requests):
            if not continuation or len(continuation) > self.max_length:
                raise InputError(
                    f"a continuation of {len(continuation)} tokens cannot be scored in a context of {self.max_length}"
                )
            given = (context + continuation)[-(self.max_length + 1) :][:-1]
            rows[tuple(given), len(continuation)].append(i)
        order = sorted(rows, key=lambda row: (len(row[0]), row[1]), reverse=True)
        results: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        with self.console.progress(len(order), description="log-likelihoods", unit="row", transient=True) as bar:
            for begin in range(0, len(order), self.rows):
                chosen = order[begin : begin + self.rows]
                members = [rows[row] for row in chosen]
                labels = [[requests[i][2] for i in held] for held in members]
                sums, greedy = self._score([list(row[0]) for row in chosen], labels)
                for j, held in enumerate(members):
                    for k, i in enumerate(held):
                        results[i] = float(sums[j, k]), bool(greedy[j, k])
                        if requests[i][0] is not None:
                            self.cache_hook.add_partial("loglikelihood", requests[i][0], results[i])
                bar.update(len(chosen))
        return results

    def _score(self, given: list[list[int]], labels: list[list[list[int]]]) -> tuple[np.ndarray, np.ndarray]:
        """Sums of log-probs float32 and greedy bool `[rows, K]` of at most `rows` inputs and their continuations."""
        rows, pad = self.rows, pad_token_id(self.tokenizer)
        width = length_bucket(max(map(len, given)), self.max_length)
        count = min(width, power_of_two(max(len(held[0]) for held in labels)))
        choices = power_of_two(max(map(len, labels)))
        start = np.zeros(rows, np.int32)
        targets = np.full((rows, choices, count), -1, np.int32)
        for j, (inputs, held) in enumerate(zip(given, labels, strict=True)):
            size = len(held[0])
            start[j] = min(len(inputs) - size, width - count)
            shift = len(inputs) - size - start[j]
            for k, continuation in enumerate(held):
                targets[j, k, shift : shift + size] = continuation
        placed = place_batch((*padded(given, rows, width, pad), start, targets), self.mesh)
        static = {"module": self.engine.module, "mesh": self.mesh, "count": count}
        return to_host(continuation_scores(self.engine.params, *placed, **static))

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihoods of whole texts. A text longer than the context is scored in windows, each token once."""
        windows, owners = [], []
        for i, request in enumerate(requests):
            (text,) = request.args
            pieces = utils.get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            for piece in map(utils.make_disjoint_window, pieces):
                windows.append((None, *piece))
                owners.append(i)
        scores = [score for score, _ in self._loglikelihood_tokens(windows)]
        totals = np.bincount(np.array(owners, int), scores, len(requests)).tolist()
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    # ---- generation

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Generates a text for each request, up to the first of its stop strings."""
        groups: dict[str, list[int]] = defaultdict(list)
        for i, request in enumerate(requests):
            groups[json.dumps(request.args[1], sort_keys=True, default=str)].append(i)
        texts = [""] * len(requests)
        with self.console.progress(len(requests), description="generate", unit="response", transient=True) as bar:
            for members in groups.values():
                sampling, until = self.sampling_of(requests[members[0]].args[1])
                room = self.max_length - sampling.max_new_tokens
                prompts = [self.tok_encode(requests[i].args[0])[-room:] for i in members]
                sampled = generate_all(
                    self.engine,
                    prompts,
                    self.key,
                    with_stops(sampling, self.tokenizer, until),
                    rows=self.rows,
                    slots=self.slots,
                    numbers=members,
                    on_batch=bar.update,
                )
                for i, (response,) in zip(members, sampled, strict=True):
                    texts[i] = cut(self.tokenizer.decode(response, skip_special_tokens=True), until)
                    self.cache_hook.add_partial("generate_until", requests[i].args, texts[i])
        return texts

    def sampling_of(self, given: dict[str, Any]) -> tuple[SamplingConfig, list[str]]:
        """The sampling and the stop strings of a request's arguments.

        Raises InputError for an argument that the engine does not have, or a length that leaves no room for a prompt.
        """
        given = dict(given)
        lengths = [value for name in LENGTH_NAMES if (value := given.pop(name, None)) is not None]
        longest = int(lengths[0]) if lengths else self.max_gen_toks
        if not 0 < longest < self.max_length:
            raise InputError(
                f"max_gen_toks={longest} must be at least 1 and less than the context of {self.max_length} tokens; set "
                f"it, as in --gen_kwargs max_gen_toks={self.max_gen_toks}"
            )
        until = given.pop("until", None) or []
        until = [until] if isinstance(until, str) else [stop for stop in until if stop]
        temperature, samples = float(given.pop("temperature", 0.0) or 0.0), given.pop("do_sample", None)
        if samples is None:
            samples = temperature > 0
        options = {name: given.pop(name) for name in SAMPLING_NAMES if given.get(name) is not None}
        refused = {k: v for k, v in given.items() if k not in SAMPLING_NAMES and NEUTRAL.get(k, object()) != v}
        if refused:
            raise InputError(
                f"generation_kwargs: {', '.join(f'{k}={v}' for k, v in refused.items())}: the engine has no such "
                f"option; it has {', '.join(('until', LENGTH_NAMES[0], 'temperature', 'do_sample', *SAMPLING_NAMES))}"
            )
        sampling = SamplingConfig(
            longest,
            temperature=(temperature or 1.0) if samples else 0.0,
            eos_token_id=end_ids(self.tokenizer),
            pad_token_id=pad_token_id(self.tokenizer),
            **options,
        )
        return sampling, until

    def get_model_info(self) -> dict[str, int | str]:
        """Metadata of the model that lm-eval writes beside the results."""
        params = sum(x.size for x in jax.tree.leaves(self.engine.params))
        return {"model_num_parameters": params, "model_dtype": str(jnp.dtype(self.engine.module.dtype))}


def main() -> None:
    """lm-eval's own command, which then knows the model `jaxrlhf`."""
    from lm_eval.__main__ import cli_evaluate  # pyright: ignore[reportMissingImports]

    sys.exit(cli_evaluate())


if __name__ == "__main__":
    main()
