"""Files of PEFT's LoRA adapters, read and checked: the options that count, and the tensors."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxrlhf.config.files import read_json
from jaxrlhf.errors import InputError
from jaxrlhf.models.config import check_pattern
from jaxrlhf.models.hf.checkpoint_files import FLOATS, open_safetensors
from jaxrlhf.models.hf.tensor_source import all_finite

ADAPTER_WEIGHTS = "adapter_model.safetensors"
# Options of PEFT that this file reads, or that do not change the computation of a saved adapter.
_READ = {"peft_type", "r", "lora_alpha", "lora_dropout", "rank_pattern", "alpha_pattern", "use_rslora", "bias"}
_READ |= {"modules_to_save", "init_lora_weights", "trainable_token_indices", "ensure_weight_tying"}
_INERT = {"task_type", "base_model_name_or_path", "target_modules", "exclude_modules", "fan_in_fan_out", "auto_mapping"}
_INERT |= {"inference_mode", "revision", "peft_version", "megatron_core", "qalora_group_size", "runtime_config"}
_INERT |= {"eva_config"}
# Initialisations that leave the base as it was (PiSSA and similar ones move a part of it into the adapter).
_KEEP_BASE = (True, False, None, "gaussian", "eva", "orthogonal")
_REMEDY = "merge this adapter with peft and load the merged model"


@dataclass(frozen=True)
class AdapterOptions:
    """The part of an adapter_config.json that decides the computation."""

    rank: int
    alpha: float
    dropout: float
    root: bool
    """The scale is alpha / sqrt(rank) (rsLoRA)."""
    alpha_pattern: Mapping[str, float]
    """Alpha of the modules whose name a pattern matches."""
    tokens: Mapping[str, tuple[int, ...]] | tuple[int, ...]
    """Token ids whose rows are trained, by module; a plain tuple means those of the input embedding."""
    saved: frozenset[str]
    """Modules that are saved whole."""
    ties: bool
    """A head that is tied to the embedding follows it."""

    @property
    def scale(self) -> float:
        return self.alpha / (self.rank**0.5 if self.root else self.rank)

    def scale_of(self, module: str, rank: int) -> float:
        """Scale of a module with `rank`: the first pattern that matches the end of its name counts, as in PEFT."""
        found = (v for key, v in self.alpha_pattern.items() if re.match(rf"(.*\.)?({key})$", module))
        alpha = next(found, self.alpha)
        return alpha / (rank**0.5 if self.root else rank)


def read_adapter_options(path: Path) -> AdapterOptions:
    """Reads an adapter_config.json.

    Raises:
        InputError: It is not of a LoRA adapter, or an option is wrong or not supported.
    """
    config = read_json(path)
    if config.get("peft_type") != "LORA":
        raise InputError(f"{path}: peft_type={config.get('peft_type')!r} is not supported, only 'LORA' is")
    saved = _texts(path, "modules_to_save", config.get("modules_to_save"))
    _refuse_unsupported(path, config)
    for name in ("rank_pattern", "alpha_pattern"):
        _check_patterns(path, name, config.get(name))
    dropout = config.get("lora_dropout") or 0.0
    if not _number(dropout) or not 0 <= dropout < 1:
        raise InputError(f"{path}: lora_dropout={dropout!r} must be a number of 0 or more, below 1")
    return AdapterOptions(
        rank=_rank(path, "r", config.get("r", 8)),
        alpha=_alpha(path, "lora_alpha", config.get("lora_alpha", 8)),
        dropout=float(dropout),
        root=_flag(path, "use_rslora", config),
        alpha_pattern=config.get("alpha_pattern") or {},
        tokens=_tokens(path, config.get("trainable_token_indices")),
        saved=frozenset(saved),
        ties=_flag(path, "ensure_weight_tying", config),
    )


def _refuse_unsupported(path: Path, config: dict[str, object]) -> None:
    refused = {name: value for name, value in config.items() if name not in _READ | _INERT and value}
    if config.get("bias", "none") != "none":
        refused["bias"] = config["bias"]
    start = config.get("init_lora_weights")
    if not isinstance(start, str | bool | None) or start not in _KEEP_BASE:
        refused["init_lora_weights"] = start
    if refused:
        shown = ", ".join(f"{name}={value!r}" for name, value in refused.items())
        raise InputError(f"{path}: not supported: {shown}; {_REMEDY}")


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _rank(path: Path, name: str, value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 2**24:
        raise InputError(f"{path}: {name}={value!r} must be a positive integer, the rank of the adapters")
    return value


def _alpha(path: Path, name: str, value: Any) -> float:
    if not _number(value) or not 0 < value < 1e9:
        raise InputError(f"{path}: {name}={value!r} must be a positive number")
    return value


def _flag(path: Path, name: str, config: dict[str, object]) -> bool:
    value = config.get(name) or False
    if not isinstance(value, bool):
        raise InputError(f"{path}: {name}={value!r} must be true or false")
    return value


def _texts(path: Path, name: str, value: object) -> list[str]:
    value = [] if value is None else value
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise InputError(f"{path}: {name}={value!r} must be a list of names")
    return value


def _check_patterns(path: Path, name: str, patterns: object) -> None:
    """Raises InputError for patterns that are none, or that could take forever to match."""
    if patterns is None:
        return
    if not isinstance(patterns, dict):
        raise InputError(f"{path}: {name}={patterns!r} must hold values by pattern")
    for pattern, value in patterns.items():
        _rank(path, f"{name} of {pattern!r}", value) if name == "rank_pattern" else _alpha(
            path, f"{name} of {pattern!r}", value
        )
        check_pattern(pattern, f"{path}: {name}:")


def _tokens(path: Path, value: object) -> Mapping[str, tuple[int, ...]] | tuple[int, ...]:
    def ids(found: Any) -> tuple[int, ...]:
        whole = isinstance(found, list) and all(isinstance(i, int) and not isinstance(i, bool) for i in found)
        if not whole or len(set(found)) < len(found) or any(not 0 <= i < 2**31 for i in found):
            raise InputError(f"{path}: trainable_token_indices={value!r} must list token ids, each once")
        return tuple(found)

    if isinstance(value, dict):
        return {name: ids(found) for name, found in value.items()}
    return ids([] if value is None else value)


def read_adapter_tensors(path: Path) -> tuple[dict[str, np.ndarray], Mapping[str, str]]:
    """Reads the tensors of an adapter as float32, and the metadata of their file.

    Raises:
        InputError: The file is missing or damaged, or tensors are no matrices of finite floating-point numbers.
    """
    if not path.is_file():
        raise InputError(f"{path.parent} has no {path.name}; save the adapter with peft's save_pretrained")
    source = open_safetensors(path)
    tensors = {}
    for name, shape in source.shapes.items():
        x = source.read(name)
        if x.dtype not in FLOATS or len(shape) != 2:
            raise InputError(f"{path}: {name} is {x.dtype} {shape}; an adapter holds floating-point matrices")
        with np.errstate(over="ignore"):
            tensors[name] = x.astype(np.float32)
        if not all_finite(tensors[name]):
            raise InputError(f"{path}: NaN or infinite values in {name}; the adapter is damaged")
    return tensors, source.metadata
