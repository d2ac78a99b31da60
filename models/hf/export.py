"""Exports: a model as the Hugging Face folder that transformers and `load_pretrained` read."""

import json
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jaxrlhf.distributed import barrier, is_primary, to_host
from jaxrlhf.models.config import LoRAConfig
from jaxrlhf.models.families import get_family
from jaxrlhf.models.hf.card import ModelCard, render_card
from jaxrlhf.models.hf.checkpoint_files import (
    CONFIG,
    TensorToWrite,
    indexed_shards,
    replace_files,
    staged,
    write_checkpoint,
)
from jaxrlhf.models.hf.config_json import config_to_dict
from jaxrlhf.models.hf.generation_config import GENERATION_CONFIG, generation_values
from jaxrlhf.models.hf.mapping import Tensor
from jaxrlhf.models.hf.pretrained import Leaf, declared_tensors, hf_shape, index_key, local_index
from jaxrlhf.models.hf.score_export import for_transformers
from jaxrlhf.models.hf.tokenizer_export import save_tokenizer
from jaxrlhf.models.lora import merge_kernel
from jaxrlhf.models.model import Model, leaves_by_path
from jaxrlhf.models.token_rows import LEAF, TABLES

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def _fetch(x: jax.Array, index: tuple[int, ...]) -> np.ndarray:
    """Gathers a parameter, or the part of a layer (and expert) `index`, on the host, shard by shard.

    `np.asarray(x)` would leave a host copy of the whole parameter cached in `x` for as long as `x` lives. Across hosts
    every process must call this, and all get the result.
    """
    if not x.is_fully_addressable:
        return to_host(x[index] if index else x)
    whole = np.empty(x.shape[len(index) :], x.dtype)
    for shard in x.addressable_shards:
        place = local_index(index_key(shard.index, x.shape), index)
        if shard.replica_id == 0 and place is not None:
            whole[shard.index[len(index) :]] = shard.data[place] if place else jnp.array(shard.data)
    return whole


def _fetch_merged(
    params: dict[str, jax.Array], leaf: str, index: tuple[int, ...], lora: LoRAConfig | None
) -> np.ndarray:
    """`_fetch`, with the adapters of a kernel merged into it."""
    array = _fetch(params[leaf], index)
    path, _, name = leaf.rpartition("/")
    for holder, table in TABLES.items():
        if lora is not None and leaf == table and f"{holder}/{LEAF}" in params:
            array[list(lora.trained_tokens)] = _fetch(params[f"{holder}/{LEAF}"], ())
    if lora is None or name != "kernel" or f"{path}/lora_a" not in params:
        return array
    a, b = (_fetch(params[f"{path}/{n}"], index) for n in ("lora_a", "lora_b"))
    return np.asarray(merge_kernel(array, a, b, lora.scale))


def _tensors_to_write(model: Model) -> Iterator[TensorToWrite]:
    module, params = model.module, leaves_by_path(model.params)

    def make(tensor: Tensor, leaves: list[Leaf], index: tuple[int, ...]) -> np.ndarray:
        parts = []
        for leaf, expected in zip(tensor.leaves, leaves, strict=True):
            array = _fetch_merged(params, leaf, index, module.lora)
            parts.append(array[tuple(slice(0, n) for n in expected.shape)])
        return tensor.layout.to_hf(parts, np)

    for tensor, leaves in declared_tensors(get_family(model.config.family, "config"), module.clone(lora=None)):
        shape = hf_shape(tensor, leaves)
        for name, index in tensor.names(model.config).items():
            yield TensorToWrite(name, shape, partial(make, tensor, leaves, index))


def save_pretrained(
    model: Model,
    path: str | os.PathLike,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    *,
    dtype: DTypeLike | None = None,
    max_shard_bytes: int = 5 * 2**30,
    card: ModelCard | None = None,
) -> None:
    """Writes a folder that `transformers` and `load_pretrained` load: weights, config, generation config, tokenizer.

    Tensors are gathered one at a time. Files are written to a folder beside the target and then renamed into place, so
    an interrupted save leaves an older export intact. A reward model gets a pad token that ends no text. Adapters are
    merged (`save_adapter` writes them separately).
    Every process of a run must call this; the first one writes.

    Args:
        model: A language model or reward model.
        path: The folder.
        tokenizer: Saved into the folder. That of a reward model gets a pad token that ends no response.
        dtype: Of the tensors in the files; None: as stored.
        max_shard_bytes: Largest weights file.
        card: Becomes the folder's README.md.

    Raises:
        InputError: Parameters are not finite, or too large for `dtype`; or a reward model adds a constant to its
            scores, which transformers cannot express.
        StorageError: Writing fails.
    """
    folder = Path(path)
    model, tokenizer = for_transformers(model, tokenizer)
    if is_primary():
        with staged(folder, ".export") as staging:
            _write_export(model, staging, folder, tokenizer, dtype, max_shard_bytes, card)
            replace_files(staging, folder)
    else:  # take part in the gathering
        for tensor in _tensors_to_write(model):
            tensor.make()
    barrier(f"writing the model {folder}")


def _write_export(
    model: Model,
    staging: Path,
    folder: Path,
    tokenizer: "PreTrainedTokenizerBase | None",
    dtype: DTypeLike | None,
    max_shard_bytes: int,
    card: ModelCard | None,
) -> None:
    config, head = model.config, model.module.head
    stored = np.dtype(dtype or next(iter(leaves_by_path(model.params).values())).dtype)
    write_checkpoint(staging, _tensors_to_write(model), stored, max_shard_bytes, taken=indexed_shards(folder))
    values = config_to_dict(config, head, str(stored))
    files = {CONFIG: json.dumps(values, indent=2) + "\n"}
    if head == "lm" or config.generation_config:
        files[GENERATION_CONFIG] = json.dumps(generation_values(config), indent=2) + "\n"
    if card is not None:
        files["README.md"] = render_card(card, config, head)
    if tokenizer is not None:
        save_tokenizer(tokenizer, staging)
    for name, text in files.items():
        (staging / name).write_text(text, encoding="utf-8")
