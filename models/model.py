"""A model as the rest of the system handles it: a module, its parameter tree and its configuration."""

from collections.abc import Hashable
from functools import lru_cache, partial
from typing import Any, cast

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict
from jax.sharding import Mesh, Sharding
from jax.tree_util import KeyPath
from jax.typing import DTypeLike

from jaxrlhf.errors import InputError
from jaxrlhf.kernels import IMPLEMENTATIONS, KERNELS, KV_CACHE_DTYPES
from jaxrlhf.models.config import DecoderConfig
from jaxrlhf.models.decoder import REMAT_POLICIES, Decoder
from jaxrlhf.models.moe import EXPERT_IMPLEMENTATIONS
from jaxrlhf.sharding import REPLICATED_RULES, TRAIN_RULES, Rules, check_divisible, constrain, tree_shardings, use

PyTree = Any


class Model(flax.struct.PyTreeNode):
    """A model, used as `module.apply({"params": params}, input_ids, attention_mask)` (shapes: models/decoder.py)."""

    module: Decoder = flax.struct.field(pytree_node=False)
    params: PyTree
    """Parameters as a nested dict; those of the layers are stacked, `[L, …]`."""
    config: DecoderConfig = flax.struct.field(pytree_node=False)

    @property
    def mesh(self) -> Mesh | None:
        """The mesh that the parameters lie on; None for a single device."""
        return getattr(jax.tree.leaves(self.params)[0].sharding, "mesh", None)

    def shardings_of(self, module: Decoder) -> PyTree | None:
        """Shardings on this model's mesh for the parameters of another module; None for a single device."""
        return None if self.mesh is None else param_shardings(module, self.mesh)


def default_dtype() -> jnp.dtype:
    """The compute dtype unless one is given: bfloat16 on accelerators, float32 on CPU."""
    return jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16


def initial_params(module: Decoder, key: jax.Array) -> PyTree:
    """Fresh float32 parameters. Under jit, a part that the caller does not return is not computed."""
    return nn.meta.unbox(module.init(key, jnp.zeros((1, 1), jnp.int32)))["params"]


@lru_cache(maxsize=64)
def _abstract(module: Decoder) -> tuple[PyTree, PyTree]:
    ids = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    variables = jax.eval_shape(module.init, jax.random.key(0), ids)
    specs = nn.get_partition_spec(variables)["params"]
    shapes = nn.meta.unbox(variables)["params"]
    axes = jax.tree.map(lambda s, x: tuple(s) + (None,) * (x.ndim - len(s)), specs, shapes)
    return axes, shapes


def logical_axes(module: Decoder) -> PyTree:
    """Returns the parameter tree with a tuple of logical axis names in place of each leaf."""
    return _abstract(cast(Hashable, module))[0]


def param_shapes(module: Decoder) -> PyTree:
    """Returns the parameter tree with a float32 ShapeDtypeStruct in place of each leaf."""
    return _abstract(cast(Hashable, module))[1]


def leaves_by_path(tree: PyTree) -> dict[str, PyTree]:
    """Returns the leaves of a tree of nested dicts by their paths, `layers/attn/query/kernel`."""
    return dict(flatten_dict(tree, sep="/"))


def storage_rules(module: Decoder) -> Rules:
    """Returns the sharding rules that `module.zero_stage` stores parameters by."""
    return REPLICATED_RULES if module.zero_stage == 0 else TRAIN_RULES


def param_shardings(module: Decoder, mesh: Mesh, rules: Rules | None = None) -> PyTree:
    """Returns NamedShardings of the parameters on `mesh`.

    Args:
        module: The module that has the parameters.
        mesh: The training mesh.
        rules: None: those of `module.zero_stage`. Stage 0 replicates parameters over `fsdp`, the others split them.

    Raises:
        InputError: The mesh axes `context` × `tensor` do not divide the heads, `tensor` not the MLP, or `expert` not
            the experts.
    """
    c = module.config
    check_divisible(mesh, {"num_heads": c.num_heads, "intermediate_size": c.expert_size}, "tensor")
    check_divisible(mesh, {"num_heads": c.num_heads}, "context", "tensor")
    if c.dense_layers:
        check_divisible(mesh, {"intermediate_size": c.intermediate_size}, "tensor")
    check_divisible(mesh, {"num_experts": c.num_experts}, "expert")
    rules = rules or storage_rules(module)
    return tree_shardings(logical_axes(module), param_shapes(module), mesh, rules)


def is_matrix(path: KeyPath) -> bool:
    """True for a leaf that may be stored in the compute dtype: a kernel, an embedding or an adapter.

    Norms, biases and a scalar head compute in float32 and stay in it.
    """
    name = _name(path)
    return name.endswith(("kernel", "embedding", "lora_a", "lora_b")) and name != "score/kernel"


def _name(path: KeyPath) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def cast_matrices(params: PyTree, dtype: DTypeLike, but: str | None = None) -> PyTree:
    """Casts the matrices (`is_matrix`) of a tree to `dtype`, except for the leaf named `but`."""

    def leaf(path: KeyPath, x: jax.Array) -> jax.Array:
        return x.astype(dtype) if is_matrix(path) and _name(path) != but else x

    return jax.tree_util.tree_map_with_path(leaf, params)


def trained_head(module: Decoder) -> str | None:
    """Name of the leaf that a language model's head reads; None with a scalar head.

    Training keeps this leaf in float32, so its gradient is accumulated in float32: nothing is rounded, and the sum
    needs no second array (`token_logprobs`).
    """
    if module.head != "lm":
        return None
    return "embed/embedding" if module.config.tie_embeddings else "lm_head/kernel"


def working_copy(params: PyTree, axes: PyTree, module: Decoder, mesh: Mesh | None, *, trained: bool = False) -> PyTree:
    """The parameters as one train or scoring program reads them, built once at its entry.

    Matrices are in the compute dtype: cast here, they are cast once per update instead of in each layer of each
    micro-batch. ZeRO stages 1 and 2 then gather them over `fsdp`, in half the bytes. Stage 3 on several devices reads
    the stored parameters: it casts and gathers layer by layer, and a gradient is summed over devices in float32.

    Args:
        params: The module's tree, or a part of it.
        axes: The same part of `logical_axes`.
        module: Gives the stage and the compute dtype.
        mesh: The training mesh; None for a single device.
        trained: The program computes gradients, so the `trained_head` stays in float32.
    """
    if reads_stored(module, mesh):
        return params
    with jax.named_scope("working_copy"):
        cast = cast_matrices(params, module.dtype, trained_head(module) if trained else None)
        if mesh is None or module.zero_stage in (0, 3):
            return cast
        with use(mesh, REPLICATED_RULES):
            return jax.tree.map(lambda x, names: constrain(x, *names), cast, axes)


def reads_stored(module: Decoder, mesh: Mesh | None) -> bool:
    """True where programs read the stored parameters of `module`, without a `working_copy`."""
    return module.zero_stage == 3 and mesh is not None and mesh.size > 1


def count_params(params: PyTree) -> int:
    """The number of elements of all leaves."""
    return sum(x.size for x in jax.tree.leaves(params))


def make_module(
    config: DecoderConfig, head: str, dtype: jnp.dtype | None, remat: str = "none", zero_stage: int = 3
) -> Decoder:
    """Returns a `Decoder`; InputError for an unknown head, remat policy or stage."""
    for name, value, known in (
        ("head", head, ("lm", "scalar")),
        ("remat", remat, tuple(REMAT_POLICIES)),
        ("zero_stage", zero_stage, (0, 1, 2, 3)),
    ):
        if value not in known:
            raise InputError(f"{name}={value!r} is not one of {', '.join(map(repr, known))}")
    return Decoder(config, head=head, dtype=dtype or default_dtype(), remat=remat, zero_stage=zero_stage)


def create_model(
    config: DecoderConfig,
    *,
    head: str = "lm",
    key: jax.Array | None = None,
    mesh: Mesh | None = None,
    dtype: jnp.dtype | None = None,
    remat: str = "none",
    zero_stage: int = 3,
) -> Model:
    """Creates a randomly initialised model with float32 parameters.

    Args:
        config: Its shape.
        head: "lm" or "scalar".
        key: Random key; None: key 0.
        mesh: Parameters are created in their place on it; None: on one device.
        dtype: Compute dtype; None: `default_dtype`.
        remat: One of REMAT_POLICIES.
        zero_stage: How parameters lie on the mesh, 0 to 3.
    """
    module = make_module(config, head, dtype, remat, zero_stage)
    init = jax.jit(partial(initial_params, module), out_shardings=mesh and param_shardings(module, mesh))
    return Model(module=module, params=init(jax.random.key(0) if key is None else key), config=config)


KERNEL_OPTIONS = {
    "attention_implementation": IMPLEMENTATIONS,
    "logprob_implementation": KERNELS["token_logprobs"],
    "expert_implementation": EXPERT_IMPLEMENTATIONS,
    "kv_cache_dtype": tuple(KV_CACHE_DTYPES),
}


def with_kernels(model: Model, **options: str) -> Model:
    """Replaces KERNEL_OPTIONS, which are fields of the model's Decoder; InputError for an unknown value."""
    for name, value in options.items():
        if value not in KERNEL_OPTIONS[name]:
            raise InputError(f"{name}={value!r} is not one of {', '.join(map(repr, KERNEL_OPTIONS[name]))}")
    return model.replace(module=model.module.clone(**cast(dict[str, Any], options)))


def with_head(model: Model, head: str, key: jax.Array) -> Model:
    """Puts a freshly initialised head on the body of a model: a reward model or critic from a language model.

    Args:
        model: Its body's arrays are shared, not copied.
        head: "lm" or "scalar". The new head lies on the same mesh, in the dtype of the body.
        key: Random key of the head.
    """
    module = model.module.clone(head=head)
    shapes, params = param_shapes(module), model.params
    missing = [name for name in shapes if name not in params or name in ("score", "lm_head")]
    body = {name: x for name, x in params.items() if name in shapes and name not in missing}
    dtype, shardings = jax.tree.leaves(params)[0].dtype, model.shardings_of(module)

    def init(key: jax.Array) -> PyTree:
        fresh = initial_params(module, key)
        return jax.tree.map(lambda x: x.astype(dtype), {name: fresh[name] for name in missing})

    places = None if shardings is None else {name: shardings[name] for name in missing}
    fresh = jax.jit(init, out_shardings=places)(key) if missing else {}
    return Model(module=module, params=body | fresh, config=model.config)


def resize_vocabulary(model: Model, vocab_size: int) -> Model:
    """Adds rows to embedding and head: the old rows are kept, each new one is the mean of the old.

    Args:
        model: Its mesh and dtype stay the same.
        vocab_size: Tokens of the new model.

    Raises:
        InputError: `vocab_size` is below the model's, so rows would be lost.
    """
    old = model.config.vocab_size
    if vocab_size < old:
        raise InputError(f"vocab_size={vocab_size} is below the model's {old}: rows can only be added")
    config = model.config.replace(vocab_size=vocab_size)
    added = model.module.added_tokens + vocab_size - old
    module = model.module.clone(config=config, added_tokens=added)
    shardings = model.shardings_of(module)

    def grow(x: jax.Array, axes: tuple[str | None, ...], shape: jax.ShapeDtypeStruct) -> jax.Array:
        if "vocab" not in axes:
            return x
        real = x[:old]
        mean = real.astype(jnp.float32).mean(0, keepdims=True).astype(x.dtype)
        grown = jnp.concatenate([real, jnp.broadcast_to(mean, (vocab_size - old, *x.shape[1:]))])
        return jnp.pad(grown, [(0, shape.shape[0] - vocab_size), *([(0, 0)] * (x.ndim - 1))])

    resize = jax.jit(lambda params: jax.tree.map(grow, params, logical_axes(module), param_shapes(module)))
    params = resize(model.params) if shardings is None else jax.device_put(resize(model.params), shardings)
    return Model(module=module, params=params, config=config)


def frozen_stage(trained: Decoder, stage: int | None = None) -> int:
    """The ZeRO stage that stores a frozen model: the reference or reward model of a module that is trained.

    Stages 1 and 2 split only what the optimizer needs, and a frozen model has no optimizer. So below stage 3 every
    device holds a frozen copy whole. With LoRA there is no copy: the frozen model reads the base of the trained one, so
    it lies as that base does.

    Args:
        trained: The module whose start the frozen model is.
        stage: The stage that the user asks for; None means that of `trained`. Unused with LoRA.
    """
    if trained.lora is not None:
        return trained.zero_stage
    return 3 if (trained.zero_stage if stage is None else stage) == 3 else 0


def frozen_copy(params: PyTree, shardings: PyTree, dtype: DTypeLike) -> PyTree:
    """Copies parameters for a model that is only read: matrices in `dtype`, vectors and a scalar head as they are.

    The copy goes leaf by leaf, because `shardings` may lie in host memory to leave room on the devices.
    """

    def leaf(path: KeyPath, x: jax.Array, sharding: Sharding) -> jax.Array:
        changes = is_matrix(path) and x.dtype != dtype
        return jax.device_put(x.astype(dtype) if changes else jnp.copy(x), sharding)

    return jax.tree_util.tree_map_with_path(leaf, params, shardings)
