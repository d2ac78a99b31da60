"""The names of tensors in files: wrappers, base models without their prefix, aliases, tied heads, buffers.

Whatever a state dict was saved from, its tensors end up under the names that the family declares.
"""

import itertools
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

import numpy as np

from jaxrlhf.errors import InputError
from jaxrlhf.models.config import DecoderConfig
from jaxrlhf.models.hf.mapping import SCORE_BIAS, Family
from jaxrlhf.models.hf.tensor_source import TensorSource

# Modules that torch and its trainers put between the others: torch.compile, FSDP, activation checkpointing.
_BETWEEN = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
# Buffers that torch modules of any family have saved beside their weights: masks, rotary tables, a version number.
_BUFFERS = re.compile(
    r"(.+\.)?(rotary_emb\.(inv_freq|original_inv_freq|cos_cached|sin_cached)|inv_freq|decoder\.version"
    r"|(attn|attention|self_attention)\.(bias|masked_bias|causal_mask|embed_positions)|position_ids)"
)


def is_buffer(name: str) -> bool:
    """True for a tensor that carries no weights."""
    return _BUFFERS.fullmatch(name) is not None


def _renamed(source: TensorSource, names: Mapping[str, str]) -> TensorSource:
    """The source with the names that `names` gives to each of its own."""
    original = {new: old for old, new in names.items()}
    if len(original) < len(names):
        twice = sorted(old for old, new in names.items() if original[new] != old)
        raise InputError(f"{source.where}: {', '.join(twice)} stored twice under different names")

    def read(name: str) -> np.ndarray:
        return source.read(original[name])

    def peek(name: str) -> np.ndarray:
        return source.peek(original[name])

    return replace(source, shapes={new: source.shapes[old] for new, old in original.items()}, read=read, peek=peek)


def unwrapped(source: TensorSource, family: Family, config: DecoderConfig) -> tuple[TensorSource, str]:
    """Strips what wraps a model in a state dict, as `module.`, `_orig_mod.`, `base_model.model.` or `rwtransformer.`.

    A wrapper is whatever stands before a name that the family declares. Names outside of it lose the part that they
    share with it: in `module.rwtransformer.decoder…` and `module.v_head.weight` both belong to one model.

    Returns:
        The source, and the wrapper; empty without one.

    Raises:
        InputError: The file holds adapters that are not merged.
    """
    adapters = sorted(name for name in source.shapes if ".lora_A." in name or ".base_layer." in name)
    if adapters:
        raise InputError(
            f"{source.where} holds a model with adapters that are not merged ({adapters[0]}); save it with peft's "
            "merge_and_unload(), or give the base model and the adapter folder"
        )
    plain = {name: ".".join(part for part in name.split(".") if part not in _BETWEEN) for name in source.shapes}
    wrapper = _wrapper(set(plain.values()), family, config)
    parts = wrapper.split(".")[:-1]

    def stripped(name: str) -> str:
        rest = name.split(".")
        for part in parts:
            if rest[0] != part or len(rest) == 1:
                break
            rest = rest[1:]
        return ".".join(rest)

    between = sorted({part for name in source.shapes for part in name.split(".") if part in _BETWEEN})
    renamed = _renamed(source, {name: stripped(short) for name, short in plain.items()})
    return renamed, wrapper or ("".join(f"{part}." for part in between))


def _wrapper(names: set[str], family: Family, config: DecoderConfig) -> str:
    """The text before the first declared tensor that is found; the shortest such text, with its dot."""
    prefix = f"{family.prefix}."
    for tensor in family.tensors:
        name = next(iter(tensor.names(config)))
        for declared in (name, name.removeprefix(prefix)):
            if declared in names:
                return ""
            found = [long.removesuffix(declared) for long in names if long.endswith(f".{declared}")]
            if found:
                return min(found, key=len)
    return ""


def common_prefix(names: Iterable[str]) -> str:
    """The beginning that all names share, up to a dot; empty if there is none."""
    parts = [name.split(".")[:-1] for name in names]
    shared = itertools.takewhile(lambda found: len(set(found)) == 1, zip(*parts, strict=False))
    return "".join(f"{found[0]}." for found in shared)


def with_declared_names(source: TensorSource, family: Family, config: DecoderConfig) -> TensorSource:
    """Renames tensors as the family declares them: aliases resolved, the base model's prefix added.

    Files saved from the base model lack its prefix; heads never have it.
    """
    aliases = {
        theirs: name
        for tensor in family.all_tensors
        for alias in tensor.aliases
        for theirs, name in zip(tensor.names(config, alias), tensor.names(config), strict=True)
    }
    prefix, heads = f"{family.prefix}.", {tensor.hf for tensor in (*family.heads, SCORE_BIAS)}
    renamed = {name: aliases.get(name, name) for name in source.shapes}
    if not any(short.startswith(prefix) for short in renamed.values()):
        renamed = {name: short if short in heads else prefix + short for name, short in renamed.items()}
    return _renamed(source, renamed)


def _declared_as(family: Family, leaf: str) -> str:
    return next(tensor.hf for tensor in family.all_tensors if tensor.ours == leaf)


def resolve_tied(
    source: TensorSource, family: Family, config: DecoderConfig, head: str
) -> tuple[TensorSource, DecoderConfig]:
    """Reads a config that ties the head to the embedding by what the file holds, as transformers 5 does.

    A table that is stored once is found under either name. A head that differs from the embedding is kept: the
    returned config then does not tie.
    """
    table, own = _declared_as(family, "embed/embedding"), _declared_as(family, "lm_head/kernel")
    if not config.tie_embeddings or own not in source.shapes:
        return source, config
    if table not in source.shapes:
        return _renamed(source, {name: table if name == own else name for name in source.shapes}), config
    if head == "lm" and not _equal(source, table, own):
        return source, config.replace(tie_embeddings=False)
    return source, config


def _equal(source: TensorSource, *names: str) -> bool:
    if len({source.shapes[name] for name in names}) > 1:
        return False
    first, second = (source.read(name) for name in names)
    return np.array_equal(first, second)


def differences(one: TensorSource, other: TensorSource) -> Iterator[str]:
    """Differences between two sources of one model, found by names, shapes and the first values of each tensor.

    Files in different precisions are compared in the lower one. A tied head may be stored in one of them only.
    """
    names = [{name for name in source.shapes if not is_buffer(name)} for source in (one, other)]
    for name in sorted(names[0] ^ names[1]):
        if name.rpartition(".")[0] not in ("lm_head", "embed_out"):
            yield f"{name} is only in {(one if name in names[0] else other).where}"
    for name in sorted(names[0] & names[1]):
        shapes = [source.shapes[name] for source in (one, other)]
        if shapes[0] != shapes[1]:
            yield f"{name} has the shapes {shapes[0]} and {shapes[1]}"
            continue
        values = [source.peek(name) for source in (one, other)]
        narrow = min((x.dtype for x in values), key=lambda dtype: dtype.itemsize)
        if not np.array_equal(values[0].astype(narrow), values[1].astype(narrow)):
            yield f"{name} has other values"
