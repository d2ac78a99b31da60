"""Hugging Face model folders in and out, through the one declaration of each family."""

import math
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict
from jax.sharding import Mesh, Sharding
from jax.typing import DTypeLike

from jaxrlhf.config.model_folder import is_adapter
from jaxrlhf.distributed import check_same
from jaxrlhf.errors import InputError
from jaxrlhf.models.config import DecoderConfig
from jaxrlhf.models.decoder import Decoder
from jaxrlhf.models.families import get_family
from jaxrlhf.models.hf.adapters import adapter_head, load_onto_base
from jaxrlhf.models.hf.checkpoint_files import (
    FLOATS,
    base_folder,
    find_model_folder,
    fingerprint,
)
from jaxrlhf.models.hf.config_json import config_from_dict, read_config
from jaxrlhf.models.hf.gguf import is_gguf
from jaxrlhf.models.hf.mapping import Family, Tensor
from jaxrlhf.models.hf.opened import folder_head, open_model
from jaxrlhf.models.hf.tensor_names import common_prefix, is_buffer
from jaxrlhf.models.hf.tensor_source import TensorSource, all_finite, refuse
from jaxrlhf.models.model import (
    Model,
    create_model,
    leaves_by_path,
    logical_axes,
    make_module,
    param_shapes,
    param_shardings,
)
from jaxrlhf.runs.console import Console

if TYPE_CHECKING:
    pass

Leaf = jax.ShapeDtypeStruct


def stored_head(name_or_path: str | os.PathLike) -> str:
    """The head that a model folder (or hub name, GGUF file or adapter folder) holds, "lm" or "scalar"."""
    if is_gguf(name_or_path):
        return "lm"
    folder = find_model_folder(name_or_path)
    return adapter_head(folder) if is_adapter(folder) else folder_head(folder, read_config(folder))


def declared_tensors(family: Family, module: Decoder) -> list[tuple[Tensor, list[Leaf]]]:
    """The tensors of a module, each with the shapes of its leaves without stacked axes and vocabulary padding."""
    shapes = leaves_by_path(param_shapes(module))
    axes = leaves_by_path(logical_axes(module))
    c = module.config
    declared, covered = [], set()
    for tensor in family.all_tensors:
        present = [leaf in shapes for leaf in tensor.leaves]
        if not any(present):
            continue
        if not all(present):
            raise ValueError(f"{family.name}: {tensor.hf} maps to leaves of which only some exist: {tensor.leaves}")
        leaves = []
        for leaf in tensor.leaves:
            dims = [c.vocab_size if a == "vocab" else s for a, s in zip(axes[leaf], shapes[leaf].shape, strict=True)]
            leaves.append(Leaf(tuple(dims[tensor.stacked :]), jnp.float32))
        declared.append((tensor, leaves))
        covered.update(tensor.leaves)
    if missing := set(shapes) - covered:
        raise ValueError(f"{family.name}: no declared tensor for {sorted(missing)}")
    return declared


def hf_shape(tensor: Tensor, leaves: list[Leaf]) -> tuple[int, ...]:
    return jax.eval_shape(lambda *parts: tensor.layout.to_hf(parts, jnp), *leaves).shape


def _check_names(
    source: TensorSource,
    config: DecoderConfig,
    declared: list[tuple[Tensor, list[Leaf]]],
    optional: Collection[str],
    wrapper: str,
) -> None:
    """Raises one InputError that lists every missing, unexpected and mis-shaped tensor."""
    family, expected = get_family(config.family, source.where), {}
    for tensor, leaves in declared:
        expected |= dict.fromkeys(tensor.names(config), hf_shape(tensor, leaves))
    # A tied head may be stored twice, and a scalar head does not need a language model's head.
    spare = {tensor.hf for tensor in family.heads}
    found = source.shapes
    problems = [f"missing {name} {expected[name]}" for name in sorted(set(expected) - set(found) - set(optional))]
    unexpected = (name for name in sorted(set(found) - set(expected) - spare) if not is_buffer(name))
    problems += [f"unexpected {name} {found[name]}" for name in unexpected]
    for name in sorted(set(expected) & set(found)):
        if found[name] != expected[name]:
            problems.append(f"{name} has shape {found[name]}, the config asks for {expected[name]}")
    common = wrapper or common_prefix(found)
    within = f" (tensor names in the file begin with {common!r})" if common != f"{family.prefix}." and common else ""
    refuse(f"{source.where} does not fit its config.json{within}", problems)


def index_key(index: tuple[slice, ...] | None, shape: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    return tuple(s.indices(n)[:2] for s, n in zip(index or (), shape, strict=True))


def _read_checked(source: TensorSource, name: str, dtype: np.dtype) -> np.ndarray:
    """Reads a tensor that will be stored in `dtype`."""
    array = source.read(name)
    if array.dtype not in FLOATS:
        raise InputError(f"{source.where}: tensor {name} is {array.dtype}; quantised checkpoints are not supported")
    if not all_finite(array):
        raise InputError(f"{source.where}: tensor {name} holds NaN or infinite values; the checkpoint is damaged")
    if jnp.finfo(array.dtype).max > jnp.finfo(dtype).max:
        with np.errstate(over="ignore"):
            array = array.astype(dtype)
        if not all_finite(array):
            raise InputError(f"{source.where}: tensor {name} holds values too large for {dtype}")
    return array


def _aligned_zeros(shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
    """A zeroed array on a 64-byte boundary, which the CPU backend adopts without a copy.

    It holds zeros because rows that pad the vocabulary are never written.
    """
    size = math.prod(shape) * dtype.itemsize
    raw = np.zeros(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size].view(dtype).reshape(shape)


def local_index(key: tuple[tuple[int, int], ...], index: tuple[int, ...]) -> tuple[int, ...] | None:
    """Place of a layer's (and expert's) part in a shard; None if the shard has another part."""
    places = tuple(i - start for i, (start, stop) in zip(index, key, strict=False) if start <= i < stop)
    return places if len(places) == len(index) else None


def _load_tensor(
    tensor: Tensor,
    wanted: list[Leaf],
    source: TensorSource,
    shapes: dict[str, Leaf],
    shardings: Mapping[str, Sharding],
    config: DecoderConfig,
    dtype: np.dtype,
) -> dict[str, jax.Array]:
    """Reads one declared tensor (of all layers and experts) into the local shards of its leaves."""
    buffers: dict[str, dict[tuple, np.ndarray]] = {}
    for leaf in tensor.leaves:
        shape = shapes[leaf].shape
        indices = shardings[leaf].addressable_devices_indices_map(shape).values()
        keys = {index_key(index, shape) for index in indices}
        buffers[leaf] = {key: _aligned_zeros([stop - start for start, stop in key], dtype) for key in keys}
    for name, index in tensor.names(config).items():
        if not any(local_index(key, index) is not None for of_leaf in buffers.values() for key in of_leaf):
            continue  # an expert that only other processes hold
        parts = tensor.layout.to_ours(_read_checked(source, name, dtype), [leaf.shape for leaf in wanted])
        for leaf, part in zip(tensor.leaves, parts, strict=True):
            for key, buffer in buffers[leaf].items():
                place = local_index(key, index)
                if place is not None:
                    window = part[tuple(slice(start, stop) for start, stop in key[tensor.stacked :])]
                    buffer[place][tuple(slice(0, n) for n in window.shape)] = window
    loaded = {}
    for leaf in tensor.leaves:
        shape, parts = shapes[leaf].shape, buffers.pop(leaf)
        loaded[leaf] = jax.make_array_from_callback(
            shape, shardings[leaf], lambda index, p=parts, s=shape: p[index_key(index, s)]
        )
    return loaded


def _check_alike(name: str | os.PathLike, folder: Path, mesh: Mesh | None) -> None:
    """Raises InputError if the processes of the mesh have different files of a model."""
    if mesh is not None and mesh.is_multi_process:
        hashes = fingerprint(folder).items()
        check_same("files of a model", {f"{name}/{file}": hashed for file, hashed in hashes})


def _places(module: Decoder, mesh: Mesh | None) -> dict[str, Sharding]:
    """Shardings of the parameters by path: on the mesh, or all on the first device."""
    if mesh is not None:
        return leaves_by_path(param_shardings(module, mesh))
    alone = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return dict.fromkeys(leaves_by_path(param_shapes(module)), alone)


def _load_tensors(
    stored: Iterable[tuple[Tensor, list[Leaf]]],
    source: TensorSource,
    module: Decoder,
    shardings: Mapping[str, Sharding],
    dtype: np.dtype,
) -> dict[str, jax.Array]:
    """Reads declared tensors one after the other: the module's leaves by path."""
    shapes = leaves_by_path(param_shapes(module))
    params: dict[str, jax.Array] = {}
    for tensor, leaves in stored:
        params |= _load_tensor(tensor, leaves, source, shapes, shardings, module.config, dtype)
    return params


def load_pretrained(
    name_or_path: str | os.PathLike,
    *,
    head: str = "lm",
    mesh: Mesh | None = None,
    dtype: jnp.dtype | None = None,
    param_dtype: DTypeLike = jnp.float32,
    new_head: bool = True,
    key: jax.Array | None = None,
    remat: str = "none",
    zero_stage: int = 3,
    progress: bool = False,
) -> Model:
    """Loads a Hugging Face model folder (or hub name) straight into its place on a mesh.

    Tensors are read one at a time into the local shards, so a process needs no memory for the shards of others.

    Args:
        name_or_path: Folder or hub name.
        head: "lm" or "scalar".
        mesh: None: one device.
        dtype: Compute dtype; None: bfloat16 on accelerators, float32 on CPU.
        param_dtype: Dtype that parameters are stored in.
        new_head: Creates a fresh scalar head if the checkpoint has none; false refuses such a checkpoint.
        key: Random key of that head; None: key 0.
        remat: One of REMAT_POLICIES.
        zero_stage: How parameters lie on the mesh, 0 to 3.
        progress: Shows a progress bar on stderr.

    Raises:
        InputError: The folder is missing or unreadable, a family or option is not supported, files differ between the
            processes of the mesh, or tensors are missing, unexpected or mis-shaped (the message lists them).
    """
    folder = find_model_folder(name_or_path)
    _check_alike(name_or_path, folder, mesh)
    if is_adapter(folder):  # the head's check is left to the adapter, which may bring it
        base = load_pretrained(
            base_folder(folder),
            head=head,
            mesh=mesh,
            dtype=dtype,
            param_dtype=param_dtype,
            key=key,
            remat=remat,
            zero_stage=zero_stage,
            progress=progress,
        )
        return load_onto_base(base, folder, new_head)
    opened = open_model(folder, read_config(folder), head)
    module = make_module(opened.config, head, dtype, remat, zero_stage)
    declared = declared_tensors(get_family(module.config.family, str(folder)), module)
    fresh = _missing_head(folder, opened.source, declared, new_head)
    _check_names(opened.source, module.config, declared, optional=fresh, wrapper=opened.wrapper)
    shardings = _places(module, mesh)
    stored = [(tensor, leaves) for tensor, leaves in declared if tensor.hf not in fresh]
    label = f"loading {folder.name or folder}"
    with Console(quiet=not progress).progress(len(stored), description=label, unit="tensor", transient=True) as bar:
        params = _load_tensors(bar.over(stored), opened.source, module, shardings, np.dtype(param_dtype))
    params |= {path: _fresh_score(module, key, shardings[path], param_dtype) for path in fresh.values()}
    return Model(module=module, params=unflatten_dict(params, sep="/"), config=module.config)


def _missing_head(
    folder: Path, source: TensorSource, declared: list[tuple[Tensor, list[Leaf]]], new_head: bool
) -> dict[str, str]:
    """Name and path of the scalar head's tensor if the checkpoint lacks it; InputError without `new_head`."""
    fresh = {t.hf: "score/kernel" for t, _ in declared if t.ours == "score/kernel" and t.hf not in source.shapes}
    if fresh and not new_head:
        raise InputError(
            f"{folder} has no scalar head ({', '.join(sorted(fresh))} is missing): it is a language model, not a "
            f"reward model; train one with `jaxrlhf reward` first"
        )
    return fresh


def _fresh_score(module: Decoder, key: jax.Array | None, sharding: Sharding, dtype: DTypeLike) -> jax.Array:
    width = module.config.embedding_size

    def make(key: jax.Array) -> jax.Array:
        return (jax.random.normal(key, (width,)) * (width + 1) ** -0.5).astype(dtype)

    return jax.jit(make, out_shardings=sharding)(jax.random.key(0) if key is None else key)


def model_from_overrides(model_type: str, overrides: Mapping[str, object], **options: Any) -> Model:
    """Creates a randomly initialised model of a family.

    Args:
        model_type: The family.
        overrides: Options by their HF names; the others have the family's defaults.
        options: See `create_model`.
    """
    config = config_from_dict({"model_type": model_type, **overrides}, f"--model_type {model_type}", strict=True)
    return create_model(config, **options)
