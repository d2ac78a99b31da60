"""Logical axes → mesh axes: the two rule tables, and how an array's spec is resolved from them.

A rule names the mesh axes that a logical axis wants, in order of preference. Rules are tried from the top; each takes
the longest prefix of its axes that are still unused in this array and divide the dimension. So `fsdp` goes to the
dimension that decode tensor-parallelism splits (heads, mlp, vocab), because resharding for generation then moves no
bytes. It falls back to `embed` where that dimension does not divide. The mesh axis `expert` splits the experts of a
sparse model, in every table; parameters outside the experts it splits as `fsdp` does. The mesh axis `context` splits
the columns of sequences in training and scoring. Attention, where columns meet, splits heads over it instead (Jacobs et
al. 2023, arXiv 2309.14509), so each device attends over whole sequences; parameters it splits as `fsdp` does.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxrlhf.errors import InputError

Rules = tuple[tuple[str, tuple[str, ...]], ...]
LogicalAxes = tuple[str | None, ...]

_SPLIT = ("vocab", "heads", "kv_heads", "mlp")
_EXPERT: Rules = (("expert", ("expert",)),)


def _split_over(*mesh_axes: str) -> Rules:
    """Experts over `expert`, and the dimensions that decode splits over these axes."""
    return (*_EXPERT, *((name, mesh_axes) for name in _SPLIT))


_TOKENS: Rules = (("batch", ("data", "fsdp", "expert")), ("sequence", ("context",)))

# Fully sharded parameters; the batch is split over the same devices.
TRAIN_RULES: Rules = (
    *_TOKENS,
    *_split_over("tensor", "fsdp", "expert", "context"),
    ("embed", ("fsdp", "expert", "context")),
)

# Plain data parallelism: only `tensor` splits the parameters, and `expert` those of the experts.
REPLICATED_RULES: Rules = (*_TOKENS, *_split_over("tensor"))

# On `generate_mesh`: tensor-parallel over tensor × the slow part of fsdp; the batch is split over the rest.
GENERATE_RULES: Rules = (("batch", ("data", "replica", "expert", "context")), *_split_over("tensor", "fsdp"))


def resolve_spec(
    axes: LogicalAxes, shape: Sequence[int], mesh: Mesh | Mapping[str, int], rules: Rules
) -> PartitionSpec:
    """Resolves the PartitionSpec of an array.

    Args:
        axes: Logical axis of each dimension; None: never split.
        shape: Of the array.
        mesh: The mesh, or the sizes of its axes by name.
        rules: Such as TRAIN_RULES.

    Raises:
        ValueError: `axes` and `shape` have different lengths.
    """
    sizes = mesh.shape if isinstance(mesh, Mesh) else mesh
    if len(axes) != len(shape):
        raise ValueError(f"logical axes {axes} do not fit an array of shape {tuple(shape)}")
    chosen: list[tuple[str, ...]] = [()] * len(axes)
    used: set[str] = set()
    for name, wanted in rules:
        for dim, axis in enumerate(axes):
            if axis != name or chosen[dim]:
                continue
            taken: list[str] = []
            split = 1
            for mesh_axis in wanted:
                size = sizes.get(mesh_axis, 1)
                if mesh_axis in used or size == 1:
                    continue
                if shape[dim] % (split * size):
                    break
                taken.append(mesh_axis)
                split *= size
            chosen[dim] = tuple(taken)
            used.update(taken)
    entries = [None if not c else c[0] if len(c) == 1 else c for c in chosen]
    while entries and entries[-1] is None:
        entries.pop()
    return PartitionSpec(*entries)


def mesh_axes(spec: PartitionSpec, dimension: int) -> tuple[str, ...]:
    """Mesh axes that split a dimension of an array with this spec."""
    entry = spec[dimension] if dimension < len(spec) else None
    return (entry,) if isinstance(entry, str) else entry or ()


def named_sharding(axes: LogicalAxes, shape: Sequence[int], mesh: Mesh, rules: Rules) -> NamedSharding:
    """`resolve_spec` as a NamedSharding on `mesh`."""
    return NamedSharding(mesh, resolve_spec(axes, shape, mesh, rules))


_current: ContextVar[tuple[Mesh, Rules] | None] = ContextVar("jaxrlhf_sharding", default=None)


@contextmanager
def use(mesh: Mesh | None, rules: Rules) -> Iterator[None]:
    """Within this block (at trace time) `constrain` applies `rules` on `mesh`; with a mesh of None it does nothing."""
    token = _current.set(None if mesh is None else (mesh, rules))
    try:
        yield
    finally:
        _current.reset(token)


def current_rules() -> tuple[Mesh, Rules] | None:
    """Mesh and rules of the current `use(mesh, rules)`; None outside of one."""
    return _current.get()


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Pins the sharding of `x` to its logical `axes` under the current `use(mesh, rules)`; does nothing outside."""
    current = _current.get()
    if current is None:
        return x
    mesh, rules = current
    return jax.lax.with_sharding_constraint(x, named_sharding(axes, x.shape, mesh, rules))


def current_device() -> jax.Device | None:
    """The first device of the current `use(mesh, rules)`, at hand or of a compiler's topology; None outside of one."""
    current = _current.get()
    return None if current is None else current[0].devices.flat[0]


def platform() -> str:
    """Platform of the current `use(mesh, rules)`: `cpu`, `gpu` or `tpu`; outside of one, JAX's default."""
    device = current_device()
    return jax.default_backend() if device is None else device.platform


def split(axis: str, size: int) -> int:
    """Number of parts that the current `use(mesh, rules)` splits a dimension `axis` of `size` into; 1 outside."""
    current = _current.get()
    if current is None:
        return 1
    mesh, rules = current
    return math.prod(mesh.shape[name] for name in mesh_axes(resolve_spec((axis,), (size,), mesh, rules), 0))


def check_columns(columns: int) -> None:
    """Raises InputError if the current `use(mesh, rules)` cannot split sequences of this many columns evenly."""
    current = _current.get()
    if current is None:
        return
    mesh, rules = current
    for axis in dict(rules).get("sequence", ()):
        if columns % (size := mesh.shape[axis]):
            raise InputError(
                f"mesh {axis}={size} does not divide sequences of {columns} tokens; choose lengths that are multiples "
                f"of {size} (max_length; or max_prompt_length + max_new_tokens), or another mesh_{axis}"
            )


# Half-way between storage over `embed` and GENERATE_RULES, on `generate_mesh`.
_HALF_WAY_RULES: Rules = (*_split_over("tensor", "fsdp"), ("embed", ("replica", "expert", "context")))


def reshard(x: jax.Array, axes: LogicalAxes, stored: Rules) -> jax.Array:
    """Pins a weight of the training mesh to the current rules, those of generation.

    Where `fsdp` fell back to `embed`, this takes two steps: an all-to-all that splits the dimension of generation
    instead, then an all-gather of the rest. In one step XLA would gather the whole weight on every device.

    Args:
        x: The weight, inside a jitted program.
        axes: Logical axis of each dimension.
        stored: The rules that store it for training.
    """
    current = _current.get()
    if current is None:
        return x
    mesh, _ = current
    sizes = {name: mesh.shape[name] for name in ("data", "expert", "context", "tensor")}
    sizes["fsdp"] = mesh.shape["fsdp"] * mesh.shape["replica"]
    spec = resolve_spec(axes, x.shape, sizes, stored)
    if any(axis == "embed" and entry is not None for axis, entry in zip(axes, spec, strict=False)):
        x = jax.lax.with_sharding_constraint(x, named_sharding(axes, x.shape, mesh, _HALF_WAY_RULES))
    return constrain(x, *axes)
