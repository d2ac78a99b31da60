"""A model as the rest of the system handles it: a module, its parameter tree and the configuration."""

from functools import lru_cache
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxrlhf.errors import InputError
from jaxrlhf.kernels import IMPLEMENTATIONS, KERNELS, KV_CACHE_DTYPES
from jaxrlhf.models.config import DecoderConfig
from jaxrlhf.models.decoder import REMAT_POLICIES, Decoder
from jaxrlhf.sharding import REPLICATED_RULES, TRAIN_RULES, Rules, check_divisible, constrain, tree_shardings, use

PyTree = Any


@flax.struct.dataclass
class Model:
    """`module.apply({"params": params}, input_ids, attention_mask)`; see models/decoder.py for shapes."""

    module: Decoder = flax.struct.field(pytree_node=False)
    params: PyTree
    config: DecoderConfig = flax.struct.field(pytree_node=False)


def default_dtype() -> jnp.dtype:
    """Compute dtype when none is asked for: bfloat16 on accelerators, float32 on CPU."""
    return jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16


@lru_cache(maxsize=64)
def _abstract(module: Decoder) -> tuple[PyTree, PyTree]:
    ids = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    # Inside the branch for the LM head every parameter of it is touched, tied or not.
    variables = jax.eval_shape(module.init, jax.random.key(0), ids)
    specs = nn.get_partition_spec(variables)["params"]
    shapes = nn.meta.unbox(variables)["params"]
    axes = jax.tree.map(lambda s, x: tuple(s) + (None,) * (x.ndim - len(s)), specs, shapes)
    return axes, shapes


def logical_axes(module: Decoder) -> PyTree:
    """The parameter tree with each leaf replaced by its tuple of logical axis names."""
    return _abstract(module)[0]


def param_shapes(module: Decoder) -> PyTree:
    """The parameter tree as float32 ShapeDtypeStructs."""
    return _abstract(module)[1]


def storage_rules(module: Decoder) -> Rules:
    """The rules by which `module.zero_stage` stores parameters."""
    return REPLICATED_RULES if module.zero_stage == 0 else TRAIN_RULES


def param_shardings(module: Decoder, mesh: Mesh, rules: Rules | None = None) -> PyTree:
    """NamedShardings of the parameters on `mesh`, by default as `module.zero_stage` stores them.

    Stage 0 keeps them whole over `fsdp`, the others split them. InputError when `tensor` does not divide heads or MLP.
    """
    c = module.config
    check_divisible(mesh, {"num_heads": c.num_heads, "intermediate_size": c.intermediate_size})
    rules = rules or storage_rules(module)
    return tree_shardings(logical_axes(module), param_shapes(module), mesh, rules)


def is_matrix(path: Any) -> bool:
    """Whether the leaf at a tree path may be held in the compute dtype: kernels, embeddings, adapters.

    Norms, biases and a scalar head may not: they compute in float32.
    """
    name = _name(path)
    return name.endswith(("kernel", "embedding", "lora_a", "lora_b")) and name != "score/kernel"


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def cast_matrices(params: PyTree, dtype: jnp.dtype, but: str | None = None) -> PyTree:
    """The tree with its matrices (`is_matrix`) in `dtype`, and the rest as it is, like the leaf named `but`."""
    cast = lambda path, x: x.astype(dtype) if is_matrix(path) and _name(path) != but else x  # noqa: E731
    return jax.tree_util.tree_map_with_path(cast, params)


def trained_head(module: Decoder) -> str | None:
    """The name of the leaf that a language model's head reads, which training leaves in float32.

    Its gradient is then a float32 sum, neither rounded nor with memory beside it (`token_logprobs`).
    """
    if module.head != "lm":
        return None
    return "embed/embedding" if module.config.tie_embeddings else "lm_head/kernel"


def working_copy(params: PyTree, axes: PyTree, module: Decoder, mesh: Mesh | None, *, trained: bool = False) -> PyTree:
    """The parameters as the passes of one train or scoring program read them, made once at its entry.

    Stages 0 and 3 read them where they lie (3: gathered layer by layer). Stages 1 and 2 gather them once over `fsdp`,
    in the compute dtype, but for the `trained_head` of those that are `trained`. `params` may be a part of the module's
    tree, with the same part of `logical_axes`.
    """
    if mesh is None or module.zero_stage in (0, 3):
        return params
    with use(mesh, REPLICATED_RULES), jax.named_scope("working_copy"):
        cast = cast_matrices(params, module.dtype, trained_head(module) if trained else None)
        return jax.tree.map(lambda x, names: constrain(x, *names), cast, axes)


def count_params(params: PyTree) -> int:
    return sum(x.size for x in jax.tree.leaves(params))


def make_module(
    config: DecoderConfig, head: str, dtype: jnp.dtype | None, remat: str = "none", zero_stage: int = 3
) -> Decoder:
    """The module of a model; InputError for an unknown head, remat policy or stage."""
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
    """A randomly initialised model, created directly in its place on `mesh`; parameters are float32."""
    module = make_module(config, head, dtype, remat, zero_stage)
    shardings = None if mesh is None else param_shardings(module, mesh)

    def init(key: jax.Array) -> PyTree:
        return nn.meta.unbox(module.init(key, jnp.zeros((1, 1), jnp.int32)))["params"]

    params = jax.jit(init, out_shardings=shardings)(jax.random.key(0) if key is None else key)
    return Model(module=module, params=params, config=config)


KERNEL_OPTIONS = {
    "attention_implementation": IMPLEMENTATIONS,
    "logprob_implementation": KERNELS["token_logprobs"],
    "kv_cache_dtype": tuple(KV_CACHE_DTYPES),
}


def with_kernels(model: Model, **options: str) -> Model:
    """The same model with other KERNEL_OPTIONS, which are fields of its Decoder; InputError for an unknown value."""
    for name, value in options.items():
        if value not in KERNEL_OPTIONS[name]:
            raise InputError(f"{name}={value!r} is not one of {', '.join(map(repr, KERNEL_OPTIONS[name]))}")
    return model.replace(module=model.module.clone(**options))


def with_head(model: Model, head: str, key: jax.Array) -> Model:
    """The same body under a freshly initialised `head` (a reward model or critic from a language model).

    The body's arrays are shared, not copied; the new head lies on the same mesh and in the same dtype.
    """
    module = model.module.clone(head=head)
    missing = [name for name in param_shapes(module) if name not in model.params or name in ("score", "lm_head")]
    body = {name: x for name, x in model.params.items() if name in param_shapes(module) and name not in missing}
    reference = jax.tree.leaves(model.params)[0]
    mesh = getattr(reference.sharding, "mesh", None)
    shardings = None if mesh is None else {k: v for k, v in param_shardings(module, mesh).items() if k in missing}

    def init(key: jax.Array) -> PyTree:
        # What is not returned is not computed: no second body is ever made.
        fresh = nn.meta.unbox(module.init(key, jnp.zeros((1, 1), jnp.int32)))["params"]
        return jax.tree.map(lambda x: x.astype(reference.dtype), {name: fresh[name] for name in missing})

    fresh = jax.jit(init, out_shardings=shardings)(key) if missing else {}
    return Model(module=module, params=body | fresh, config=model.config)


def resize_vocabulary(model: Model, vocab_size: int) -> Model:
    """The model with rows for `vocab_size` tokens: old rows are kept, each new one is the mean of the old.

    Embedding and head grow alike, each in its place on the mesh. Raises InputError when rows would be lost.
    """
    old = model.config.vocab_size
    if vocab_size < old:
        raise InputError(f"vocab_size={vocab_size} is below the model's {old}: rows are only ever added")
    config = model.config.replace(vocab_size=vocab_size)
    module = model.module.clone(config=config)
    mesh = getattr(jax.tree.leaves(model.params)[0].sharding, "mesh", None)
    shardings = None if mesh is None else param_shardings(module, mesh)

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


def frozen_copy(params: PyTree, shardings: PyTree, dtype: Any) -> PyTree:
    """A copy for a model that is only read: matrices in `dtype`, vectors and a scalar head as they are.

    Goes leaf by leaf, since `shardings` may lie in host memory to make room.
    """

    def leaf(path: Any, x: jax.Array, sharding: Any) -> jax.Array:
        cast = is_matrix(path) and x.dtype != dtype
        return jax.device_put(x.astype(dtype) if cast else jnp.copy(x), sharding)

    return jax.tree_util.tree_map_with_path(leaf, params, shardings)
