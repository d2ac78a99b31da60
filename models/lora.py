"""Low-rank adapters (LoRA): added to a model, split off for training, and merged into its kernels.

Source: Hu et al. 2021 (arXiv 2106.09685). Adapters are the leaves `lora_a` and `lora_b` beside a `kernel`;
`module.lora` names the maps that have them. Files: models/hf/adapters.py.
"""

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.typing import ArrayLike

from jaxrlhf.errors import InputError
from jaxrlhf.models import token_rows
from jaxrlhf.models.config import DecoderConfig, LoRAConfig
from jaxrlhf.models.decoder import Decoder
from jaxrlhf.models.families import get_family
from jaxrlhf.models.model import Model, initial_params, leaves_by_path, param_shapes

PyTree = Any

ALL_LINEAR = "all-linear"  # PEFT's word for every linear map
_ADAPTER_LEAVES = ("lora_a", "lora_b", token_rows.LEAF)


def _kernels(module: Decoder) -> list[str]:
    """The paths of all linear maps but the output heads."""
    paths = leaves_by_path(param_shapes(module.clone(lora=None)))
    return [
        p.removesuffix("/kernel") for p in paths if p.endswith("/kernel") and not p.startswith(("lm_head", "score"))
    ]


def linear_maps(module: Decoder) -> list[str]:
    """Returns the paths of the linear maps that may have adapters: `layers/attn/query`, …

    Output heads may not, and neither may routers, experts and the MLPs beside them.
    """
    return [path for path in _kernels(module) if not (module.config.num_experts and "mlp/" in path)]


def hf_module_names(config: DecoderConfig) -> dict[str, str]:
    """Returns, by the path of a linear map, the name of the Hugging Face module that holds it (`{i}`: the layer)."""
    family = get_family(config.family, "config")
    return {
        leaf.removesuffix("/kernel"): tensor.hf.removesuffix(".weight")
        for tensor in family.tensors
        for leaf in tensor.leaves
        if leaf.endswith("/kernel")
    }


def resolve_targets(module: Decoder, targets: Sequence[str]) -> tuple[str, ...]:
    """Returns the paths of the linear maps that `targets` select.

    Args:
        module: The model's module.
        targets: Each is a regular expression that is searched in our paths, or the name of a Hugging Face module as
            PEFT takes it (`q_proj`, `attn.c_proj`). A target that is neither is searched in the full Hugging Face names
            (`decoder.layers.`, as DeepSpeed-Chat does). Without targets: all of attention and MLP.

    Raises:
        InputError: A target matches nothing; the message lists the maps.
    """
    paths = linear_maps(module)
    theirs = hf_module_names(module.config)

    def matching(target: str, paths: Sequence[str]) -> set[str]:
        pattern = LoRAConfig(rank=1, targets=("" if target == ALL_LINEAR else target,))
        found = {p for p in paths if pattern.matches(p) or f".{theirs[p]}".endswith(f".{target}")}
        return found or {p for p in paths if re.search(target, theirs[p].format(i=0, e=0))}

    chosen: set[str] = set()
    for target in targets or LoRAConfig.targets:
        found = matching(target, paths)
        if not found:
            known = "\n  ".join(f"{p}  ({theirs[p].format(i='N')})" for p in paths)
            experts = matching(target, _kernels(module))
            beside = "names experts, routers or an MLP beside them, which cannot have adapters"
            why = beside if experts else "matches no linear map"
            raise InputError(f"LoRA target {target!r} {why} of {module.config.family}; there are\n  {known}")
        chosen |= found
    return tuple(p for p in paths if p in chosen)


def lora_module(module: Decoder, config: LoRAConfig) -> Decoder:
    """The module with adapters on the maps that `config.targets` names (see `resolve_targets`).

    Rows of tokens that were added to the base (`resize_vocabulary`) are trained with them.
    """
    targets = tuple(f"^{path}$" for path in resolve_targets(module, config.targets))
    rows = module.config.vocab_size
    tokens = config.trained_tokens or tuple(range(rows - module.added_tokens, rows))
    return module.clone(lora=dataclasses.replace(config, targets=targets, trained_tokens=tokens))


def add_lora(model: Model, config: LoRAConfig, key: jax.Array | None = None) -> Model:
    """Adds fresh float32 adapters to a model: A is uniform (as in PEFT) and B zero, so outputs do not change.

    Args:
        model: Its arrays are shared, not copied; adapters lie on the same mesh.
        config: Its targets may be Hugging Face names (see `resolve_targets`).
        key: Random key of A; None: key 0.

    Raises:
        InputError: A target matches nothing, or the model has adapters already.
    """
    if model.module.lora is not None:
        raise InputError("the model has LoRA adapters already; merge them first")
    module = lora_module(model.module, config)
    shardings = model.shardings_of(module)
    init = jax.jit(
        lambda key: adapter_leaves(initial_params(module, key)),
        out_shardings=None if shardings is None else adapter_leaves(shardings),
    )
    fresh = init(jax.random.key(0) if key is None else key)
    fresh = _with_rows(fresh, model, module)
    return Model(module=module, params=join(model.params, fresh), config=model.config)


def _with_rows(fresh: PyTree, model: Model, module: Decoder) -> PyTree:
    """The adapters with the rows of the trained tokens as they are in the model's tables."""
    tables, flat = leaves_by_path(model.params), leaves_by_path(fresh)
    for holder, table in token_rows.TABLES.items():
        name = f"{holder}/{token_rows.LEAF}"
        if name in flat and module.lora is not None:
            rows = tables[table][jnp.asarray(module.lora.trained_tokens)].astype(jnp.float32)
            flat[name] = jax.device_put(rows, flat[name].sharding)
    return unflatten_dict(flat, sep="/")


def _is_adapter(path: tuple[str, ...]) -> bool:
    return path[-1] in _ADAPTER_LEAVES


def adapter_leaves(tree: PyTree) -> PyTree:
    """Returns the adapters' part of a tree that is shaped like the parameters."""
    return unflatten_dict({path: x for path, x in flatten_dict(tree).items() if _is_adapter(path)})


def base_leaves(tree: PyTree) -> PyTree:
    """Returns the base model's part of a tree that is shaped like the parameters: all but the adapters."""
    return unflatten_dict({path: x for path, x in flatten_dict(tree).items() if not _is_adapter(path)})


def split_trainable(tree: PyTree, module: Decoder) -> tuple[PyTree, PyTree]:
    """Splits a tree that is shaped like the parameters into (trainable, frozen); `join` is the inverse.

    Without adapters everything is trainable. With adapters, only they and the scalar head of a reward model are.
    """
    if module.lora is None:
        return tree, {}
    parts: tuple[dict, dict] = ({}, {})
    for path, x in flatten_dict(tree).items():
        parts[0 if _is_adapter(path) or path[0] == "score" else 1][path] = x
    return unflatten_dict(parts[0]), unflatten_dict(parts[1])


def join(*trees: PyTree) -> PyTree:
    """Merges trees that have no leaves in common into one; ValueError if they have."""
    if len(trees) == 2 and not trees[1]:
        return trees[0]
    flat = [flatten_dict(tree) for tree in trees]
    merged = {path: x for tree in flat for path, x in tree.items()}
    if len(merged) < sum(map(len, flat)):
        raise ValueError("trees to join have leaves in common")
    return unflatten_dict(merged)


def merge_kernel(kernel: ArrayLike, a: ArrayLike, b: ArrayLike, scale: float) -> jax.Array:
    """Computes `kernel + A B · scale` in float32, and casts it to the kernel's dtype.

    Args:
        kernel: `[in…, out…]`; like `a` and `b`, it may have a leading axis of layers.
        a: `[in…, r]`.
        b: `[r, out…]`.
        scale: alpha / r.
    """
    a, b = jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32)
    inputs = jnp.ndim(kernel) - b.ndim + 1
    stacked = tuple(range(a.ndim - 1 - inputs))
    dims = (((a.ndim - 1,), (len(stacked),)), (stacked, stacked))
    update = jax.lax.dot_general(a, b, dims, precision=jax.lax.Precision.HIGHEST)
    return (jnp.asarray(kernel, jnp.float32) + update * scale).astype(jnp.result_type(kernel))


def merge_lora(params: PyTree, module: Decoder) -> PyTree:
    """Adds the adapters of `params` to their kernels: returns the tree of `module.clone(lora=None)`.

    A pure function for jitted programs; `params` may be one layer's tree. Without adapters it returns `params`.
    """
    if module.lora is None:
        return params
    flat = leaves_by_path(params)
    for path, x in flat.items():
        map_path, _, name = path.rpartition("/")
        a, b = (flat.get(f"{map_path}/{name}") for name in ("lora_a", "lora_b"))
        if name == "kernel" and a is not None and b is not None:
            flat[path] = merge_kernel(x, a, b, module.lora.scale)
    for holder, table in token_rows.TABLES.items():
        rows = flat.get(f"{holder}/{token_rows.LEAF}")
        if rows is not None:
            flat[table] = token_rows.replace_rows(flat[table], module.lora.trained_tokens, rows)
    return base_leaves(unflatten_dict(flat, sep="/"))


def merged(model: Model) -> Model:
    """Merges a model's adapters into its kernels, on the same mesh; a model without adapters is returned as it is."""
    if model.module.lora is None:
        return model
    module = model.module.clone(lora=None)
    merge = jax.jit(lambda params: merge_lora(params, model.module), out_shardings=model.shardings_of(module))
    return Model(module=module, params=merge(model.params), config=model.config)
