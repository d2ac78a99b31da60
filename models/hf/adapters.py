"""LoRA adapters as PEFT folders (`adapter_config.json`, `adapter_model.safetensors`), out and in.

Hugging Face fuses some linear maps that are separate here (query, key and value of GPT-2, BLOOM, GPT-NeoX, CodeGen). An
adapter of a fused map has one A for all parts; ours have one each. Saving stacks the As and gives B one block per part,
so the rank is the sum and the scale stays. Loading gives every part the whole A and its own rows of B. Both are exact.
"""

import json
import logging
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict

from jaxrlhf.config.files import read_json
from jaxrlhf.config.model_folder import ADAPTER_CONFIG, adapter_base
from jaxrlhf.distributed import barrier, is_primary, to_host
from jaxrlhf.errors import InputError
from jaxrlhf.models.config import LoRAConfig
from jaxrlhf.models.decoder import Decoder
from jaxrlhf.models.families import get_family
from jaxrlhf.models.hf.adapter_files import ADAPTER_WEIGHTS, read_adapter_options, read_adapter_tensors
from jaxrlhf.models.hf.adapter_tokens import rows_to_peft, take_rows, token_options
from jaxrlhf.models.hf.checkpoint_files import move_files, staged
from jaxrlhf.models.hf.mapping import Layout
from jaxrlhf.models.hf.score_export import score_offset
from jaxrlhf.models.hf.tensor_source import all_finite, refuse
from jaxrlhf.models.hf.tokenizer_export import save_tokenizer
from jaxrlhf.models.lora import join, linear_maps, merged
from jaxrlhf.models.model import Model, leaves_by_path, param_shapes
from jaxrlhf.models.token_rows import LEAF

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

_PREFIX = "base_model.model."
_TARGETS = "jaxrlhf_targets"  # in the weights' metadata, which PEFT does not read: the paths of our linear maps


class _Linear(NamedTuple):
    """A linear module of Hugging Face, and our maps that it holds."""

    name: str
    """With `{i}` for the layer if there is one per layer."""
    paths: tuple[str, ...]
    """The paths of our maps."""
    shapes: tuple[tuple[int, ...], ...]
    """The shapes of our kernels in one layer."""
    inputs: tuple[int, ...]
    """The dimensions of our kernels that are contracted."""
    layout: Layout

    @property
    def per_layer(self) -> bool:
        return "{i}" in self.name

    @property
    def in_size(self) -> int:
        return math.prod(self.inputs)

    @property
    def out_size(self) -> int:
        return sum(math.prod(shape[len(self.inputs) :]) for shape in self.shapes)

    @property
    def is_conv1d(self) -> bool:
        """True if Hugging Face stores the weight as `[in, out]`."""
        ones = (1,) * len(self.inputs)
        kernels = [jax.ShapeDtypeStruct(ones + shape[len(ones) :], jnp.float32) for shape in self.shapes]
        return jax.eval_shape(lambda *parts: self.layout.to_hf(parts, jnp), *kernels).shape[0] == 1

    def b_to_hf(self, parts: list[np.ndarray]) -> np.ndarray:
        """Joins B of every path, `[r, out…]`, into PEFT's `[out, r]`."""
        if len(parts) == 1:
            return parts[0].reshape(len(parts[0]), -1).T
        weight = self.layout.to_hf(parts, np)
        return weight.T if self.is_conv1d else weight

    def b_to_ours(self, weight: np.ndarray) -> list[np.ndarray]:
        """The inverse of `b_to_hf`."""
        rank = weight.shape[1]
        shapes = [(rank, *shape[len(self.inputs) :]) for shape in self.shapes]
        if len(shapes) == 1:
            return [weight.T.reshape(shapes[0])]
        return list(self.layout.to_ours(weight.T if self.is_conv1d else weight, shapes))


def _linears(module: Decoder) -> list[_Linear]:
    """Every linear module that may have an adapter."""
    base = module.clone(lora=None)
    shapes, maps = leaves_by_path(param_shapes(base)), set(linear_maps(base))
    # Adapters everywhere show the dimensions that are contracted: those of A except the last.
    adapted = leaves_by_path(param_shapes(base.clone(lora=LoRAConfig(rank=1, targets=("",)))))
    found = []
    for tensor in get_family(module.config.family, "config").tensors:
        paths = tuple(leaf.removesuffix("/kernel") for leaf in tensor.leaves)
        if not maps.issuperset(paths):
            continue
        skip = 1 if tensor.per_layer else 0
        kernels = tuple(shapes[f"{path}/kernel"].shape[skip:] for path in paths)
        inputs = adapted[f"{paths[0]}/lora_a"].shape[skip:-1]
        found.append(_Linear(tensor.hf.removesuffix(".weight"), paths, kernels, inputs, tensor.layout))
    return found


def _adapters_of(module: Decoder) -> LoRAConfig:
    if module.lora is None:
        raise InputError("the model has no LoRA adapters to save; add_lora adds them")
    return module.lora


def _targeted(module: Decoder) -> list[str]:
    lora = _adapters_of(module)
    return [path for path in linear_maps(module) if lora.matches(path)]


def _suffix(linear: _Linear) -> str:
    """The module's name in every layer, as in PEFT's `target_modules`: `attn.c_attn`."""
    return linear.name.split("{i}.")[-1]


def _adapter_tensors(model: Model) -> Iterator[tuple[str, np.ndarray]]:
    params, rank = leaves_by_path(model.params), _adapters_of(model.module).rank
    targeted = set(_targeted(model.module))

    def fetch(name: str) -> np.ndarray:
        return np.asarray(to_host(params[name]), np.float32)

    for linear in _linears(model.module):
        own = [path for path in linear.paths if path in targeted]
        leaves = {path: [fetch(f"{path}/{n}") for n in ("lora_a", "lora_b")] for path in own}
        for layer in range(model.config.num_layers if linear.per_layer else 1) if own else ():
            pairs = {path: [x[layer] if linear.per_layer else x for x in ab] for path, ab in leaves.items()}
            a = np.concatenate([pairs[path][0].reshape(linear.in_size, rank).T for path in own])
            parts = []
            for path, shape in zip(linear.paths, linear.shapes, strict=True):
                b = np.zeros((len(own) * rank, *shape[len(linear.inputs) :]), np.float32)
                if path in own:
                    b[own.index(path) * rank :][:rank] = pairs[path][1]
                parts.append(b)
            name = _PREFIX + linear.name.format(i=layer)
            yield f"{name}.lora_A.weight", a
            yield f"{name}.lora_B.weight", linear.b_to_hf(parts)
    for name, rows in rows_to_peft(model):
        yield f"{_PREFIX}{name}", rows
    if model.module.head == "scalar":
        yield f"{_PREFIX}score.weight", fetch("score/kernel").reshape(1, -1)


def _config_to_peft(module: Decoder, base: str | None) -> dict[str, object]:
    lora, targeted = _adapters_of(module), set(_targeted(module))
    linears = [linear for linear in _linears(module) if targeted.intersection(linear.paths)]
    parts = {_suffix(linear): len(targeted.intersection(linear.paths)) for linear in linears}
    alpha = int(lora.alpha) if lora.alpha == int(lora.alpha) else lora.alpha  # PEFT's alpha is an int
    scalar = module.head == "scalar"
    return {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS" if scalar else "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": alpha,
        "lora_dropout": lora.dropout,
        "target_modules": sorted(parts),
        "rank_pattern": {name: n * lora.rank for name, n in parts.items() if n > 1},
        "alpha_pattern": {name: n * alpha for name, n in parts.items() if n > 1},
        "modules_to_save": ["score"] if scalar else None,
        "fan_in_fan_out": all(linear.is_conv1d for linear in linears),
        "bias": "none",
        "inference_mode": True,
    } | token_options(module)


def save_adapter(
    model: Model,
    path: str | os.PathLike,
    base_model_name_or_path: str | None = None,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
) -> None:
    """Writes the adapters (and the scalar head) as a folder that `peft.PeftModel.from_pretrained(base, path)` loads.

    Tensors are float32. An interrupted save leaves older files intact. Every process of a run must call this; the first
    one writes.

    Args:
        model: A model with adapters.
        path: The folder.
        base_model_name_or_path: Noted in the folder.
        tokenizer: Saved into the folder.

    Raises:
        InputError: The model has no adapters, or they are not finite.
        StorageError: Writing fails.
    """
    if score_offset(model):
        raise InputError("the model adds a constant to its scores, which an adapter cannot hold; export it merged")
    tensors = {name: np.ascontiguousarray(x) for name, x in _adapter_tensors(model)}
    if bad := [name for name, x in tensors.items() if not all_finite(x)]:
        raise InputError(f"{', '.join(bad)}: NaN or infinite; the model has diverged and its adapter is not saved")
    folder = Path(path)
    if is_primary():
        from safetensors.numpy import save_file

        with staged(folder, ".adapter") as staging:
            metadata = {"format": "pt", _TARGETS: ",".join(_targeted(model.module))}
            save_file(tensors, staging / ADAPTER_WEIGHTS, metadata)
            text = json.dumps(_config_to_peft(model.module, base_model_name_or_path), indent=2)
            (staging / ADAPTER_CONFIG).write_text(text + "\n", encoding="utf-8")
            if tokenizer is not None:
                save_tokenizer(tokenizer, staging)
            move_files(staging, folder)
    barrier(f"writing the adapter {folder}")


def _split_by_part(linear: _Linear, a: np.ndarray, bs: list[np.ndarray], own: list[str]) -> dict[str, tuple] | None:
    """Undoes our stacking: {path: (A `[r, in]`, B `[r, out…]`)}, or None if the blocks are not ours."""
    rank, rest = divmod(len(a), len(own))
    blocks = {}
    for path, b in zip(linear.paths, bs, strict=True):
        start = own.index(path) * rank if path in own else 0
        block = slice(start, start + (rank if path in own else 0))
        if rest or np.delete(b, block, axis=0).any():
            return None
        blocks[path] = (a[block], b[block])
    return {path: blocks[path] for path in own}


def _pairs_of(linear: _Linear, a: np.ndarray, b: np.ndarray, hint: set[str], scale: float, rank: int) -> dict:
    """{path: (A, B)} of one module and layer; B is rescaled if the module's scale differs from the config's."""
    bs = [part * np.float32(scale) for part in linear.b_to_ours(b)]
    own = [path for path in linear.paths if path in hint] or list(linear.paths)
    stacked = len(a) == rank * len(own) and (len(own) > 1 or bool(hint))
    split = _split_by_part(linear, a, bs, own) if stacked else None
    return split or {path: (a, part) for path, part in zip(linear.paths, bs, strict=True)}


def load_adapter(model: Model, path: str | os.PathLike) -> Model:
    """Adds the adapters of a PEFT LoRA folder to a model, to train on or to merge; it computes the same as in PEFT.

    Ranks and scales that differ between modules are exact too: adapters of lower rank are padded with zeros, and their
    scale goes into B.

    Raises:
        InputError: The model has adapters already, the folder is not a LoRA adapter, an option is not supported, or
            tensors are missing, unexpected or mis-shaped for this model.
    """
    if model.module.lora is not None:
        raise InputError("the model has LoRA adapters already; merge them first")
    folder = Path(path)
    options = read_adapter_options(folder / ADAPTER_CONFIG)
    tensors, metadata = read_adapter_tensors(folder / ADAPTER_WEIGHTS)
    prefix = get_family(model.config.family, "config").prefix
    names = {
        name.replace(".default.weight", ".weight").replace(".modules_to_save.", ".").removeprefix(_PREFIX): name
        for name in tensors
        if ".original_module." not in name  # PEFT's copy of the base's module
    }
    if not any(name.startswith(f"{prefix}.") for name in names):  # trained on the base model's class
        names = {name if name.startswith("score.") else f"{prefix}.{name}": old for name, old in names.items()}
    tensors = {name: tensors[old] for name, old in names.items()}
    model, trained = take_rows(folder, model, options, tensors)
    linears = [x for x in _linears(model.module) if any(f"{n}.lora_A.weight" in tensors for n in _modules(x, model))]
    score = tensors.pop("score.weight", None)
    _check(folder, model, linears, tensors, score)

    hint = set(filter(None, metadata.get(_TARGETS, "").split(",")))
    collected: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}
    for linear in linears:
        for module in _modules(linear, model):
            a, b = (tensors[f"{module}.lora_{x}.weight"] for x in "AB")
            scale = options.scale_of(module, len(a)) / options.scale
            for leaf, pair in _pairs_of(linear, a, b, hint, scale, options.rank).items():
                collected.setdefault(leaf, []).append(pair)
    largest = max(len(a) for pairs in collected.values() for a, _ in pairs)
    lora = LoRAConfig(
        rank=largest,
        alpha=options.alpha if largest == options.rank and not options.root else options.scale * largest,
        dropout=options.dropout,
        targets=tuple(f"^{leaf}$" for leaf in linear_maps(model.module) if leaf in collected),
        trained_tokens=trained.tokens,
    )
    flat = {f"{holder}/{LEAF}": rows for holder, rows in trained.rows.items()}
    return _with_adapters(model, lora, flat | _kernels(lora, collected, linears), score)


def _modules(linear: _Linear, model: Model) -> list[str]:
    """The full names of a linear module, layer by layer."""
    return [linear.name.format(i=i) for i in range(model.config.num_layers)] if linear.per_layer else [linear.name]


def _check(folder: Path, model: Model, linears: list[_Linear], tensors: dict, score: np.ndarray | None) -> None:
    """Raises one InputError that lists every missing, unexpected and mis-shaped tensor."""
    problems, expected = [], set()
    for linear in linears:
        for module in _modules(linear, model):
            names = [f"{module}.lora_{x}.weight" for x in "AB"]
            expected.update(names)
            if absent := [name for name in names if name not in tensors]:
                problems += [f"missing {name}" for name in absent]
                continue
            a, b = (tensors[name].shape for name in names)
            wanted = ((a[0], linear.in_size), (linear.out_size, a[0]))
            for name, got, want in zip(names, (a, b), wanted, strict=True):
                if got != want:
                    problems.append(f"{name} has shape {got}, the base model asks for {want}")
    problems += [f"unexpected {name} {tensors[name].shape}" for name in sorted(set(tensors) - expected)]
    if score is not None and model.module.head != "scalar":
        problems.append("unexpected score.weight: load the base model with head='scalar'")
    elif score is not None and score.shape != (1, model.config.embedding_size):
        problems.append(f"score.weight has shape {score.shape}, not {(1, model.config.embedding_size)}")
    if not linears:
        problems.append(f"no adapter of a linear map of {model.config.family}")
    refuse(f"the adapter {folder} does not fit this {model.config.family} model", problems)


def _kernels(lora: LoRAConfig, collected: dict, linears: list[_Linear]) -> dict[str, np.ndarray]:
    """The leaves of adapters, padded to one rank and stacked."""
    flat: dict[str, np.ndarray] = {}
    for linear in linears:
        for path in set(linear.paths) & set(collected):
            pairs = [
                tuple(np.pad(x, ((0, lora.rank - len(x)), *[(0, 0)] * (x.ndim - 1))) for x in pair)
                for pair in collected[path]
            ]
            a = np.stack([a.T.reshape(*linear.inputs, lora.rank) for a, _ in pairs])
            b = np.stack([b for _, b in pairs])
            flat |= {f"{path}/lora_{n}": x if linear.per_layer else x[0] for n, x in (("a", a), ("b", b))}
    return flat


def _with_adapters(model: Model, lora: LoRAConfig, flat: dict[str, np.ndarray], score: np.ndarray | None) -> Model:
    module = model.module.clone(lora=lora)
    params = dict(model.params)
    if score is not None:
        flat = flat | {"score/kernel": score.reshape(-1)}
        params.pop("score")
    shardings = leaves_by_path(model.shardings_of(module) or {})
    placed = {name: jax.device_put(x, shardings.get(name)) for name, x in flat.items()}
    return Model(module=module, params=join(params, unflatten_dict(placed, sep="/")), config=model.config)


def adapter_head(folder: Path) -> str:
    """The head that an adapter folder was trained with: "scalar" for a reward model's, else "lm"."""
    config = read_json(folder / ADAPTER_CONFIG)
    saved = config.get("modules_to_save")
    scores = config.get("task_type") == "SEQ_CLS" or (isinstance(saved, list) and "score" in saved)
    return "scalar" if scores else "lm"


def load_onto_base(base: Model, folder: Path, new_head: bool) -> Model:
    """Merges an adapter folder into its base model.

    Args:
        base: The base model, with the head that is wanted.
        folder: The adapter.
        new_head: A scalar head may be fresh, where neither base nor adapter has one.

    Raises:
        InputError: As `load_adapter`, or the adapter was trained with another head.
    """
    head, trained = base.module.head, adapter_head(folder)
    if head == "lm" and trained == "scalar":
        raise InputError(
            f"{folder} is the adapter of a reward model, not of a language model; name a language model here"
        )
    if head == "scalar" and trained == "lm" and not new_head:
        raise InputError(
            f"{folder} is the adapter of a language model, not of a reward model; train one with `jaxrlhf reward` first"
        )
    logger.info("%s is an adapter of %s: it is merged into that model", folder, adapter_base(folder))
    model = merged(load_adapter(base, folder))
    return model.replace(module=model.module.clone(added_tokens=0))  # its rows are trained already
