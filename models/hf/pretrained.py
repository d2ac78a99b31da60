"""Hugging Face model folders in and out, through the one declaration each family gives."""

import json
import math
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh

from jaxrlhf.distributed import barrier, check_same, is_primary, to_host
from jaxrlhf.errors import InputError
from jaxrlhf.models.config import DecoderConfig, LoRAConfig
from jaxrlhf.models.decoder import Decoder
from jaxrlhf.models.families import get_family
from jaxrlhf.models.hf.card import ModelCard, render_card
from jaxrlhf.models.hf.checkpoint_files import (
    CONFIG,
    TensorSource,
    TensorToWrite,
    all_finite,
    find_model_folder,
    fingerprint,
    indexed_shards,
    open_checkpoint,
    read_json,
    replace_files,
    write_checkpoint,
)
from jaxrlhf.models.hf.mapping import Family, HFConfig, Tensor
from jaxrlhf.models.lora import merge_kernel
from jaxrlhf.models.model import Model, create_model, logical_axes, make_module, param_shapes, param_shardings
from jaxrlhf.runs.console import Console

Leaf = jax.ShapeDtypeStruct


def config_from_dict(values: dict[str, Any], where: str = CONFIG) -> DecoderConfig:
    """Our configuration of an HF config dict; every option is honoured or refused by name."""
    model_type = values.get("model_type")
    if model_type is None:
        raise InputError(f"{where}: option 'model_type' is missing; is this a Hugging Face model config?")
    hf = HFConfig(values, where)
    config = get_family(model_type, where).config_from_hf(hf)
    hf.finish()
    return config


def read_config(name_or_path: str | os.PathLike) -> DecoderConfig:
    """The configuration of a model folder (or hub name)."""
    path = find_model_folder(name_or_path) / CONFIG
    return config_from_dict(read_json(path), str(path))


def config_to_dict(config: DecoderConfig, head: str = "lm") -> dict[str, Any]:
    """The HF config dict that `transformers` loads back as the same model."""
    family = get_family(config.family, "config")
    values = family.config_to_hf(config) | {"architectures": [family.architecture(head)]}
    if head == "scalar":
        values |= {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
        # transformers finds the last token of a row by its pad id; its models refuse batches without one.
        if config.pad_token_id is None:
            eos = config.eos_token_id
            values["pad_token_id"] = eos[0] if isinstance(eos, tuple) else eos
    return values


def _declared(family: Family, module: Decoder) -> list[tuple[Tensor, list[Leaf]]]:
    """The tensors this module has, each with the shapes of its leaves without the layer axis and vocabulary padding."""
    shapes = flatten_dict(param_shapes(module), sep="/")
    axes = flatten_dict(logical_axes(module), sep="/")
    c = module.config
    declared, covered = [], set()
    for tensor in (*family.tensors, *family.heads):
        present = [leaf in shapes for leaf in tensor.leaves]
        if not any(present):
            continue
        if not all(present):
            raise ValueError(f"{family.name}: {tensor.hf} maps to leaves of which only some exist: {tensor.leaves}")
        leaves = []
        for leaf in tensor.leaves:
            dims = [c.vocab_size if a == "vocab" else s for a, s in zip(axes[leaf], shapes[leaf].shape, strict=True)]
            leaves.append(Leaf(tuple(dims[1:] if tensor.per_layer else dims), jnp.float32))
        declared.append((tensor, leaves))
        covered.update(tensor.leaves)
    if missing := set(shapes) - covered:
        raise ValueError(f"{family.name}: no declared tensor for {sorted(missing)}")
    return declared


def _hf_shape(tensor: Tensor, leaves: list[Leaf]) -> tuple[int, ...]:
    return jax.eval_shape(lambda *parts: tensor.layout.to_hf(parts, jnp), *leaves).shape


def _names(tensor: Tensor, layers: int) -> list[str]:
    return [tensor.hf.format(i=i) for i in range(layers)] if tensor.per_layer else [tensor.hf]


# DeepSpeed-Chat saves its reward models under this attribute's name, misspelt in its first releases.
_WRAPPERS = ("rwtransformer.", "rwtranrsformer.")


def _with_our_names(source: TensorSource, family: Family, layers: int) -> TensorSource:
    """Tensor names as the family declares them: wrappers stripped, aliases resolved, the base model's prefix added.

    Files saved from the base model lack its prefix; heads never have it.
    """
    aliases = {
        alias.format(i=i): name
        for tensor in (*family.tensors, *family.heads)
        for alias in tensor.aliases
        for i, name in enumerate(_names(tensor, layers))
    }
    prefix, heads = family.prefix + ".", {tensor.hf for tensor in family.heads}
    stripped = {name: next((name[len(w) :] for w in _WRAPPERS if name.startswith(w)), name) for name in source.shapes}
    renamed = {name: aliases.get(short, short) for name, short in stripped.items()}
    if not any(short.startswith(prefix) for short in renamed.values()):
        renamed = {name: short if short in heads else prefix + short for name, short in renamed.items()}
    original = {new: old for old, new in renamed.items()}
    if len(original) < len(renamed):
        twice = sorted(old for old, new in renamed.items() if original[new] != old)
        raise InputError(f"{source.where}: {', '.join(twice)} stored twice under different names")
    shapes = {new: source.shapes[old] for new, old in original.items()}
    return TensorSource(source.where, shapes, lambda name: source.read(original[name]))


def _check_names(
    source: TensorSource, family: Family, declared: list[tuple[Tensor, list[Leaf]]], layers: int, optional: set[str]
) -> None:
    """One error that lists every missing, unexpected and mis-shaped tensor."""
    expected = {}
    for tensor, leaves in declared:
        expected |= dict.fromkeys(_names(tensor, layers), _hf_shape(tensor, leaves))
    # A tied head may be stored twice, and a language model's head is not needed under a scalar one.
    spare = {tensor.hf for tensor in family.heads}
    inert = re.compile("|".join(family.inert_tensors) or r"(?!)")
    problems = []
    for name in sorted(set(expected) - set(source.shapes) - optional):
        problems.append(f"missing {name} {expected[name]}")
    for name in sorted(set(source.shapes) - set(expected) - spare):
        if not inert.fullmatch(name):
            problems.append(f"unexpected {name} {source.shapes[name]}")
    for name in sorted(set(expected) & set(source.shapes)):
        if source.shapes[name] != expected[name]:
            problems.append(f"{name} has shape {source.shapes[name]}, the config asks for {expected[name]}")
    if problems:
        shown = "\n  ".join(problems[:20])
        more = f"\n  … and {len(problems) - 20} more" if len(problems) > 20 else ""
        raise InputError(f"{source.where} does not fit its config.json:\n  {shown}{more}")


def _index_key(index: tuple[slice, ...], shape: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    return tuple(s.indices(n)[:2] for s, n in zip(index, shape, strict=True))


def _read_checked(source: TensorSource, name: str) -> np.ndarray:
    array = source.read(name)
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise InputError(f"{source.where}: tensor {name} is {array.dtype}; quantised checkpoints are not supported")
    if not all_finite(array):
        raise InputError(f"{source.where}: tensor {name} holds NaN or infinite values; the checkpoint is damaged")
    return array


def _aligned_zeros(shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
    """A zeroed array on a 64-byte boundary, which the CPU backend adopts instead of copying.

    Zeros, because rows that pad the vocabulary are never written.
    """
    size = math.prod(shape) * dtype.itemsize
    raw = np.zeros(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size].view(dtype).reshape(shape)


def _load_tensor(
    tensor: Tensor,
    wanted: list[Leaf],
    source: TensorSource,
    shapes: dict[str, Leaf],
    shardings: dict[str, Any],
    layers: int,
    dtype: np.dtype,
) -> dict[str, jax.Array]:
    """Read one declared tensor (all its layers) into the local shards of its leaves."""
    buffers: dict[str, dict[tuple, np.ndarray]] = {}
    for leaf in tensor.leaves:
        shape = shapes[leaf].shape
        indices = shardings[leaf].addressable_devices_indices_map(shape).values()
        keys = {_index_key(index, shape) for index in indices}
        buffers[leaf] = {key: _aligned_zeros([stop - start for start, stop in key], dtype) for key in keys}
    skip = 1 if tensor.per_layer else 0
    for layer, name in enumerate(_names(tensor, layers)):
        parts = tensor.layout.to_ours(_read_checked(source, name), [leaf.shape for leaf in wanted])
        for leaf, part in zip(tensor.leaves, parts, strict=True):
            for key, buffer in buffers[leaf].items():
                target = buffer[layer] if skip else buffer
                window = part[tuple(slice(start, stop) for start, stop in key[skip:])]
                target[tuple(slice(0, n) for n in window.shape)] = window
    loaded = {}
    for leaf in tensor.leaves:
        shape, parts = shapes[leaf].shape, buffers.pop(leaf)
        loaded[leaf] = jax.make_array_from_callback(
            shape, shardings[leaf], lambda index, p=parts, s=shape: p[_index_key(index, s)]
        )
    return loaded


def load_pretrained(
    name_or_path: str | os.PathLike,
    *,
    head: str = "lm",
    mesh: Mesh | None = None,
    dtype: Any = None,
    param_dtype: Any = jnp.float32,
    new_head: bool = True,
    key: jax.Array | None = None,
    remat: str = "none",
    zero_stage: int = 3,
    progress: bool = False,
) -> Model:
    """Load a Hugging Face model folder (or hub name) straight into its place on `mesh`.

    `head` is "lm" or "scalar". A checkpoint without a scalar head gets a fresh one from `key`, unless `new_head` is
    false. `dtype` is the compute dtype (default: bfloat16 on accelerators, float32 on CPU), `param_dtype` the stored
    one; `remat` and `zero_stage` are Decoder's. Raises InputError for a missing or unreadable folder, unknown family or
    option, for files that differ between the processes of the mesh, and lists every missing, unexpected or mis-shaped
    tensor.
    """
    folder = find_model_folder(name_or_path)
    config = read_config(folder)
    if mesh is not None and mesh.is_multi_process:
        check_same(
            "files of a model", {f"{name_or_path}/{name}": hashed for name, hashed in fingerprint(folder).items()}
        )
    module = make_module(config, head, dtype, remat, zero_stage)
    family = get_family(config.family, str(folder))
    source = _with_our_names(open_checkpoint(folder), family, config.num_layers)
    declared = _declared(family, module)
    if head == "lm" and any(name in source.shapes for name in ("score.weight", "v_head.weight")):
        raise InputError(f"{folder} is a reward model (it has a scalar head), not a language model; load it as one")
    fresh = {t.hf for t, _ in declared if t.ours == "score/kernel" and t.hf not in source.shapes}
    if fresh and not new_head:
        raise InputError(
            f"{folder} has no scalar head ({', '.join(sorted(fresh))} is missing): it is a language model, not a "
            f"reward model; train one with `jaxrlhf reward` first"
        )
    _check_names(source, family, declared, config.num_layers, optional=fresh)

    shapes = flatten_dict(param_shapes(module), sep="/")
    if mesh is None:
        single = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        shardings = dict.fromkeys(shapes, single)
    else:
        shardings = flatten_dict(param_shardings(module, mesh), sep="/")
    stored = [(tensor, leaves) for tensor, leaves in declared if tensor.hf not in fresh]
    params: dict[str, jax.Array] = {}
    console, label = Console(quiet=not progress), f"loading {folder.name or folder}"
    with console.progress(len(stored), description=label, unit="tensor", transient=True) as bar:
        for tensor, leaves in bar.over(stored):
            params |= _load_tensor(tensor, leaves, source, shapes, shardings, config.num_layers, np.dtype(param_dtype))
    if fresh:
        params["score/kernel"] = _fresh_score(module, key, shardings["score/kernel"], param_dtype)
    return Model(module=module, params=unflatten_dict(params, sep="/"), config=config)


def _fresh_score(module: Decoder, key: jax.Array | None, sharding: Any, dtype: Any) -> jax.Array:
    width = module.config.embedding_size
    make = lambda key: (jax.random.normal(key, (width,)) * (width + 1) ** -0.5).astype(dtype)  # noqa: E731
    return jax.jit(make, out_shardings=sharding)(jax.random.key(0) if key is None else key)


def _fetch(x: jax.Array, layer: int | None) -> np.ndarray:
    """A parameter (or one layer of it) on the host, gathered shard by shard.

    Not `np.asarray(x)`: that leaves a host copy of the whole parameter cached in `x` for as long as it lives. Across
    hosts every process must call it, and all get the result.
    """
    if not x.is_fully_addressable:
        return to_host(x if layer is None else x[layer])
    whole = np.empty(x.shape if layer is None else x.shape[1:], x.dtype)
    for shard in x.addressable_shards:
        if shard.replica_id == 0:
            index = shard.index if layer is None else shard.index[1:]
            whole[index] = jnp.array(shard.data) if layer is None else shard.data[layer]
    return whole


def _fetch_merged(params: dict[str, jax.Array], leaf: str, layer: int | None, lora: LoRAConfig | None) -> np.ndarray:
    """`_fetch`, with the adapters of a kernel merged into it."""
    array = _fetch(params[leaf], layer)
    path, _, name = leaf.rpartition("/")
    if lora is None or name != "kernel" or f"{path}/lora_a" not in params:
        return array
    return np.asarray(
        merge_kernel(array, *(_fetch(params[f"{path}/{n}"], layer) for n in ("lora_a", "lora_b")), lora.scale)
    )


def _tensors_to_write(family: Family, module: Decoder, params: dict[str, jax.Array]) -> Iterator[TensorToWrite]:
    for tensor, leaves in _declared(family, module.clone(lora=None)):
        shape = _hf_shape(tensor, leaves)
        for layer, name in enumerate(_names(tensor, module.config.num_layers)):

            def make(tensor=tensor, leaves=leaves, layer=layer) -> np.ndarray:
                parts = []
                for leaf, expected in zip(tensor.leaves, leaves, strict=True):
                    array = _fetch_merged(params, leaf, layer if tensor.per_layer else None, module.lora)
                    parts.append(array[tuple(slice(0, n) for n in expected.shape)])
                return tensor.layout.to_hf(parts, np)

            yield TensorToWrite(name, shape, make)


def save_pretrained(
    model: Model,
    path: str | os.PathLike,
    tokenizer: Any = None,
    *,
    dtype: Any = None,
    max_shard_bytes: int = 5 * 2**30,
    card: ModelCard | None = None,
) -> None:
    """Write a folder that `transformers` and `load_pretrained` reload: weights, config, tokenizer, generation config.

    Tensors are gathered one at a time; `dtype` is theirs in the file (default: as stored). A `card` becomes the
    folder's README.md. Everything is written beside the target first and then renamed into place, so an interrupted
    save leaves an older export intact. Adapters are written merged (for themselves: `save_adapter`). Of several
    processes, all call it and the first writes. Raises InputError for parameters that are not finite or do not fit
    `dtype`.
    """
    folder = Path(path)
    if not is_primary():  # take part in the gathering; the first process writes
        family, params = get_family(model.config.family, "config"), flatten_dict(model.params, sep="/")
        for tensor in _tensors_to_write(family, model.module, params):
            tensor.make()
        barrier(f"writing the model {folder}")
        return
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob(".export-*"):
        shutil.rmtree(left)
    staging = folder / f".export-{os.getpid()}"
    staging.mkdir()
    config, head = model.config, model.module.head
    params = flatten_dict(model.params, sep="/")
    family = get_family(config.family, "config")
    stored = dtype or next(iter(params.values())).dtype
    try:
        tensors = _tensors_to_write(family, model.module, params)
        write_checkpoint(staging, tensors, np.dtype(stored), max_shard_bytes, taken=indexed_shards(folder))
        values = config_to_dict(config, head) | {"dtype": str(np.dtype(stored))}
        (staging / CONFIG).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
        if head == "lm":
            ids = {k: values[k] for k in ("bos_token_id", "eos_token_id", "pad_token_id") if values[k] is not None}
            (staging / "generation_config.json").write_text(json.dumps(ids, indent=2) + "\n", encoding="utf-8")
        if tokenizer is not None:
            tokenizer.save_pretrained(staging)
        if card is not None:
            (staging / "README.md").write_text(render_card(card, config, head), encoding="utf-8")
        replace_files(staging, folder)
    except BaseException as error:
        shutil.rmtree(staging, ignore_errors=True)
        if isinstance(error, OSError):
            reason = error.strerror or error
            raise InputError(f"cannot write the model to {folder}: {reason}; what was there is kept") from error
        raise
    barrier(f"writing the model {folder}")


def model_from_overrides(model_type: str, overrides: dict[str, Any], **kwargs: Any) -> Model:
    """A randomly initialised model of `model_type` from HF option names; see `create_model` for `kwargs`."""
    return create_model(
        config_from_dict({"model_type": model_type} | overrides, f"--model_type {model_type}"), **kwargs
    )
