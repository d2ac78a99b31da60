"""Low-rank adapters (LoRA): added to a model, split off for training, and merged into its kernels.

Source: Hu et al. 2021 (arXiv 2106.09685). Adapters are the leaves `lora_a` and `lora_b` beside a `kernel`; which maps
have them is in `module.lora`. For files see models/adapters.py.
"""

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from jaxrlhf.errors import InputError
from jaxrlhf.models.config import DecoderConfig, LoRAConfig
from jaxrlhf.models.decoder import Decoder
from jaxrlhf.models.families import get_family
from jaxrlhf.models.model import Model, param_shapes, param_shardings

PyTree = Any

ALL_LINEAR = "all-linear"  # PEFT's word for every linear map
_ADAPTER_LEAVES = ("lora_a", "lora_b")


def linear_maps(module: Decoder) -> list[str]:
    """Paths of the linear maps that may have adapters (`layers/attn/query`, …); output heads are none."""
    paths = flatten_dict(param_shapes(module.clone(lora=None)), sep="/")
    return [
        p.removesuffix("/kernel") for p in paths if p.endswith("/kernel") and not p.startswith(("lm_head", "score"))
    ]


def hf_module_names(config: DecoderConfig) -> dict[str, str]:
    """{path of a linear map of ours: name of the Hugging Face module that holds it, with `{i}` for the layer}."""
    family = get_family(config.family, "config")
    return {
        leaf.removesuffix("/kernel"): tensor.hf.removesuffix(".weight")
        for tensor in family.tensors
        for leaf in tensor.leaves
        if leaf.endswith("/kernel")
    }


def resolve_targets(module: Decoder, targets: Sequence[str]) -> tuple[str, ...]:
    """The paths of the linear maps that `targets` mean; none given means all of attention and MLP.

    A target is a regular expression searched in our paths, or the name of a Hugging Face module as PEFT takes it
    (`q_proj`, `attn.c_proj`); one that is neither is searched in the full Hugging Face names
    (`decoder.layers.`, as DeepSpeed-Chat does). InputError for one that matches nothing, listing what there is.
    """
    paths = linear_maps(module)
    theirs = hf_module_names(module.config)
    chosen: set[str] = set()
    for target in targets or LoRAConfig.targets:
        pattern = LoRAConfig(rank=1, targets=("" if target == ALL_LINEAR else target,))
        found = {p for p in paths if pattern.matches(p) or f".{theirs[p]}".endswith(f".{target}")}
        found = found or {p for p in paths if re.search(target, theirs[p].format(i=0))}
        if not found:
            known = "\n  ".join(f"{p}  ({theirs[p].format(i='N')})" for p in paths)
            raise InputError(
                f"LoRA target {target!r} matches no linear map of {module.config.family}; there are\n  {known}"
            )
        chosen |= found
    return tuple(p for p in paths if p in chosen)


def add_lora(model: Model, config: LoRAConfig, key: jax.Array | None = None) -> Model:
    """The same model with fresh float32 adapters, which at first change nothing: A uniform (as PEFT), B zero.

    The base arrays are shared, not copied; adapters lie on the same mesh. `config.targets` may hold Hugging Face names
    (see `resolve_targets`). InputError for a target that matches nothing, and for a model that has adapters already.
    """
    if model.module.lora is not None:
        raise InputError("the model has LoRA adapters already; merge them first")
    targets = tuple(f"^{path}$" for path in resolve_targets(model.module, config.targets))
    module = model.module.clone(lora=dataclasses.replace(config, targets=targets))
    mesh = getattr(jax.tree.leaves(model.params)[0].sharding, "mesh", None)
    shardings = None if mesh is None else adapter_leaves(param_shardings(module, mesh))

    def init(key: jax.Array) -> PyTree:
        # What is not returned is not computed: no second base is ever made.
        return adapter_leaves(nn.meta.unbox(module.init(key, jnp.zeros((1, 1), jnp.int32)))["params"])

    fresh = jax.jit(init, out_shardings=shardings)(jax.random.key(0) if key is None else key)
    return Model(module=module, params=join(model.params, fresh), config=model.config)


def _is_adapter(path: tuple[str, ...]) -> bool:
    return path[-1] in _ADAPTER_LEAVES


def adapter_leaves(tree: PyTree) -> PyTree:
    """The part of a parameter-shaped tree that belongs to adapters."""
    return unflatten_dict({path: x for path, x in flatten_dict(tree).items() if _is_adapter(path)})


def base_leaves(tree: PyTree) -> PyTree:
    """A parameter-shaped tree without what belongs to adapters: the base model's."""
    return unflatten_dict({path: x for path, x in flatten_dict(tree).items() if not _is_adapter(path)})


def split_trainable(tree: PyTree, module: Decoder) -> tuple[PyTree, PyTree]:
    """(trainable, frozen) parts of a parameter-shaped tree; `join` is the inverse.

    Without adapters everything is trainable; with them they alone are, and the scalar head of a reward model.
    """
    if module.lora is None:
        return tree, {}
    parts: tuple[dict, dict] = ({}, {})
    for path, x in flatten_dict(tree).items():
        parts[0 if _is_adapter(path) or path[0] == "score" else 1][path] = x
    return unflatten_dict(parts[0]), unflatten_dict(parts[1])


def join(*trees: PyTree) -> PyTree:
    """One tree of the leaves of several that have none in common."""
    if len(trees) == 2 and not trees[1]:
        return trees[0]
    flat = [flatten_dict(tree) for tree in trees]
    merged = {path: x for tree in flat for path, x in tree.items()}
    if len(merged) < sum(map(len, flat)):
        raise ValueError("trees to join have leaves in common")
    return unflatten_dict(merged)


def merge_kernel(kernel: jax.Array, a: jax.Array, b: jax.Array, scale: float) -> jax.Array:
    """`kernel + A B · scale`, in float32 and then in the kernel's dtype; all three may be stacked by layer.

    `kernel` `[in…, out…]`, `a` `[in…, r]`, `b` `[r, out…]`.
    """
    inputs = kernel.ndim - b.ndim + 1
    stacked = tuple(range(a.ndim - 1 - inputs))
    a, b = jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32)
    dims = (((a.ndim - 1,), (len(stacked),)), (stacked, stacked))
    update = jax.lax.dot_general(a, b, dims, precision=jax.lax.Precision.HIGHEST)
    return (jnp.asarray(kernel, jnp.float32) + update * scale).astype(kernel.dtype)


def merge_lora(params: PyTree, module: Decoder) -> PyTree:
    """`params` without adapter leaves, these added to their kernels: the tree of `module.clone(lora=None)`.

    A pure function, for use inside a jitted program; also of one layer's tree. Without adapters it changes nothing.
    """
    if module.lora is None:
        return params
    flat = flatten_dict(params)
    merged = {}
    for path, x in flat.items():
        a, b = (flat.get((*path[:-1], name)) for name in _ADAPTER_LEAVES)
        if path[-1] == "kernel" and a is not None:
            merged[path] = merge_kernel(x, a, b, module.lora.scale)
        elif not _is_adapter(path):
            merged[path] = x
    return unflatten_dict(merged)


def merged(model: Model) -> Model:
    """The model with its adapters merged into its kernels, where they lie; unchanged without adapters."""
    if model.module.lora is None:
        return model
    module = model.module.clone(lora=None)
    mesh = getattr(jax.tree.leaves(model.params)[0].sharding, "mesh", None)
    shardings = None if mesh is None else param_shardings(module, mesh)
    merge = jax.jit(lambda params: merge_lora(params, model.module), out_shardings=shardings)
    return Model(module=module, params=merge(model.params), config=model.config)
