"""Rows of token tables in PEFT adapters: `trainable_token_indices`, or embedding and head saved whole."""

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxrlhf.distributed import to_host
from jaxrlhf.errors import InputError
from jaxrlhf.models.decoder import Decoder
from jaxrlhf.models.families import get_family
from jaxrlhf.models.hf.adapter_files import AdapterOptions
from jaxrlhf.models.model import Model, leaves_by_path, resize_vocabulary
from jaxrlhf.models.token_rows import LEAF, TABLES

_DELTA = "token_adapter.trainable_tokens_delta"


class TrainedRows(NamedTuple):
    """Rows that an adapter replaces."""

    tokens: tuple[int, ...]
    """Their ids, ascending."""
    rows: dict[str, np.ndarray]
    """`[n, E]` by the module that holds them (`embed_rows`, `head_rows`)."""


def _modules(module: Decoder) -> dict[str, str]:
    """Hugging Face's modules of the token tables, by the module that holds their trained rows."""
    tensors = get_family(module.config.family, "config").all_tensors
    places = {tensor.ours: tensor.hf.removesuffix(".weight") for tensor in tensors}
    return {holder: places[table] for holder, table in TABLES.items()}


def _holders(module: Decoder) -> tuple[str, ...]:
    own_head = module.head == "lm" and not module.config.tie_embeddings
    return ("embed_rows", "head_rows") if own_head else ("embed_rows",)


def rows_to_peft(model: Model) -> Iterator[tuple[str, np.ndarray]]:
    """Names (without PEFT's prefix) and values of the trained rows of a model."""
    params, modules = leaves_by_path(model.params), _modules(model.module)
    if model.module.lora is not None and model.module.lora.trained_tokens:
        for holder in _holders(model.module):
            rows = np.asarray(to_host(params[f"{holder}/{LEAF}"]), np.float32)
            yield f"{modules[holder]}.{_DELTA}", rows


def token_options(module: Decoder) -> dict[str, object]:
    """The options of adapter_config.json for the trained rows; empty without any."""
    if module.lora is None or not module.lora.trained_tokens:
        return {}
    names, tokens = _modules(module), list(module.lora.trained_tokens)
    return {"trainable_token_indices": {names[h].rpartition(".")[2]: tokens for h in _holders(module)}}


def take_rows(
    folder: Path, model: Model, options: AdapterOptions, tensors: dict[str, np.ndarray]
) -> tuple[Model, TrainedRows]:
    """Takes the rows of token tables out of an adapter's tensors.

    Tables that were saved whole count as the rows that differ from the base's.

    Returns:
        The base model, with more rows where the adapter was trained with a larger vocabulary; and the rows.

    Raises:
        InputError: Shapes and ids do not fit the base, or embedding and head were trained apart though they are tied.
    """
    modules, found = _modules(model.module), {}
    _check_saved(folder, options, modules, tensors)
    for holder, name in modules.items():
        delta, whole = tensors.pop(f"{name}.{_DELTA}", None), tensors.pop(f"{name}.weight", None)
        if delta is not None:
            found[holder] = _listed(folder, model, name, options, delta)
        elif whole is not None and not (holder == "head_rows" and model.module.head == "scalar"):
            found[holder] = _differing(folder, model, TABLES[holder], name, whole)
    if model.config.tie_embeddings or model.module.head == "scalar":
        _check_tied(folder, modules, options, found)
    tokens = tuple(sorted({i for rows in found.values() for i in rows}))
    if tokens and tokens[-1] >= model.config.vocab_size:
        model = resize_vocabulary(model, tokens[-1] + 1)
    tables = leaves_by_path(model.params)
    rows: dict[str, np.ndarray] = {}
    for holder in _holders(model.module) if tokens else ():
        rows[holder] = np.array(tables[TABLES[holder]][np.asarray(tokens)], np.float32)
        for i, row in found.get(holder, {}).items():
            rows[holder][tokens.index(i)] = row
    return model, TrainedRows(tokens, rows)


def _check_saved(folder: Path, options: AdapterOptions, modules: dict[str, str], tensors: Collection[str]) -> None:
    """Raises InputError for a module that was saved whole and is no token table or head, or is not in the file."""
    for name in sorted(options.saved - {"score", "classifier"}):  # PEFT lists both for any reward model
        module = next((module for module in modules.values() if f".{module}".endswith(f".{name}")), None)
        if module is None or f"{module}.weight" not in tensors:
            why = "is not supported" if module is None else f"lacks {module}.weight in the file"
            raise InputError(
                f"{folder}: modules_to_save={name!r} {why}; merge this adapter with peft and load the result"
            )


def _listed(folder: Path, model: Model, name: str, options: AdapterOptions, delta: np.ndarray) -> dict[int, np.ndarray]:
    """The rows by the ids that the config lists for a module."""
    listed = options.tokens
    if isinstance(listed, tuple):
        listed = {_modules(model.module)["embed_rows"]: listed}
    ids = next((i for key, i in listed.items() if f".{name}".endswith(f".{key}")), ())
    if delta.shape != (len(ids), model.config.embedding_size):
        raise InputError(
            f"{folder}: {name} has trained rows {delta.shape}, but its config lists {len(ids)} tokens and the base "
            f"model has a width of {model.config.embedding_size}"
        )
    return dict(zip(ids, delta, strict=True))


def _differing(folder: Path, model: Model, table: str, name: str, whole: np.ndarray) -> dict[int, np.ndarray]:
    """The rows of a whole table that differ from the base's."""
    rows, width = model.config.vocab_size, model.config.embedding_size
    if whole.shape[1] != width or len(whole) < rows:
        raise InputError(f"{folder}: {name}.weight has shape {whole.shape}, the base model's is {(rows, width)}")
    params = leaves_by_path(model.params)
    base = params.get(table, params["embed/embedding"])
    same = (np.asarray(to_host(base), np.float32)[:rows] == whole[:rows]).all(1)
    changed = [*np.flatnonzero(~same), *range(rows, len(whole))]
    return {int(i): whole[i] for i in changed}


def _check_tied(folder: Path, modules: dict[str, str], options: AdapterOptions, found: dict[str, dict]) -> None:
    """Drops the head's rows where they equal the embedding's, with which it is tied; InputError where they differ."""
    table, head = (modules[holder] for holder in ("embed_rows", "head_rows"))
    own = found.pop("head_rows", None)
    embedding = found.get("embed_rows", {})
    apart = own is not None and (own.keys() != embedding.keys() or any((own[i] != embedding[i]).any() for i in own))
    alone = own is None and bool(embedding) and table.rpartition(".")[2] in options.saved and not options.ties
    if apart or alone:
        raise InputError(
            f"{folder}: {table} and {head} are tied in the base model, but the adapter trained them apart; merge this "
            "adapter with peft and load the merged model"
        )
