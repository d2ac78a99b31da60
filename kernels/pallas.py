"""Shared parts of our Pallas kernels: masked loads and stores, matrix products, and the launch of a kernel body.

On NVIDIA devices a body goes through Pallas' Triton lowering. JAX has deprecated that lowering (it warns since 0.11,
Mosaic GPU is to follow it), and this is the only file that touches it: where it is gone, `available` says so once and
callers take their XLA form. On CPU the same body runs in Pallas' interpreter.
"""

import re
import warnings
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any, Literal, NamedTuple, Protocol, cast

import jax
import jax.numpy as jnp

try:
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton
except ImportError:  # a later JAX without it
    pl = triton = cast(Any, None)
try:
    from jax.experimental.pallas import tpu
except ImportError:
    tpu = cast(Any, None)

LANES = 128  # of a TPU's vector registers
PyTree = Any
Ref = Any  # a reference inside a kernel, or a part of one
Semantics = tuple[Literal["parallel", "arbitrary"], ...]
DTYPES = ("float32", "bfloat16", "float16")
"""Compute dtypes of our kernels; TPUs do not support the last one."""
MAX_HEAD_DIM = 256


class Blocks(Protocol):
    """Block sizes of a kernel."""

    @property
    def num_warps(self) -> int: ...

    @property
    def num_stages(self) -> int: ...


class Device(NamedTuple):
    """The limits of an NVIDIA device that block sizes depend on."""

    name: str
    multiprocessors: int
    shared_memory: int
    """Bytes that one block may have."""


# KiB by compute capability: CUDA programming guide, "Compute capabilities". The multiprocessors of a device that
# DEVICES does not name are those of the smallest one that is sold with its capability: fewer splits, no other limit.
_SHARED = {"7.0": 96, "7.5": 64, "8.0": 163, "8.6": 99, "8.9": 99, "9.0": 227, "10.0": 227, "12.0": 99}
_SMALLEST = {"7.0": 80, "7.5": 14, "8.0": 56, "8.6": 16, "8.9": 20, "9.0": 78, "10.0": 148, "12.0": 20}
_NAMED = {"A100": ("8.0", 108), "A30": ("8.0", 56), "H100": ("9.0", 114), "H200": ("9.0", 132), "B200": ("10.0", 148)}
_NAMED |= {"L40": ("8.9", 142), "L40S": ("8.9", 142), "L4": ("8.9", 58), "A10": ("8.6", 72), "A10G": ("8.6", 80)}
_NAMED |= {"RTX A6000": ("8.6", 84), "RTX 4090": ("8.9", 128), "V100": ("7.0", 80), "T4": ("7.5", 40)}
DEVICES = {name: Device(name, count, _SHARED[capability] * 1024) for name, (capability, count) in _NAMED.items()}
"""Keys are whole words of a device's kind, as JAX spells it."""


@lru_cache(maxsize=1)
def available() -> bool:
    """True if this JAX can run our kernels; warns once, on the first call, if it cannot."""
    on_tpu = jax.default_backend() == "tpu"
    lowering = tpu if on_tpu else triton
    if lowering is None:
        warnings.warn(
            f"JAX {jax.__version__} has no {'Mosaic' if on_tpu else 'Triton'} lowering of Pallas any more: our kernels "
            "run as plain XLA instead",
            RuntimeWarning,
            stacklevel=2,
        )
    return lowering is not None


def is_kind(name: str, kind: str) -> bool:
    """True if `name` is among the whole words of a device's kind, as JAX spells it: A100 is not in RTX A1000."""
    return re.search(rf"(?<!\w){re.escape(name)}(?!\w)", kind, re.IGNORECASE) is not None


def device() -> Device:
    """The NVIDIA device at hand, one not in DEVICES by its compute capability; an A100 where there is none.

    ValueError for one of a compute capability whose limits are not known.
    """
    here = jax.devices()[0]
    if here.platform != "gpu":
        return DEVICES["A100"]
    for known in DEVICES.values():
        if is_kind(known.name, here.device_kind):
            return known
    capability = str(getattr(here, "compute_capability", None))
    if capability not in _SHARED:
        raise ValueError(
            f"implementation='pallas' knows no limits of {here.device_kind} with compute capability {capability} "
            f"(but those of {', '.join(_SHARED)}): take 'xla'"
        )
    return Device(here.device_kind, _SMALLEST[capability], _SHARED[capability] * 1024)


def check_taken(kernel: str, dtype: jnp.dtype, head_dim: int = 0, held: jnp.dtype | None = None) -> None:
    """Raises ValueError if our kernels do not support `dtype`, a cache in the dtype `held`, or heads of this size."""
    on_tpu = jax.default_backend() == "tpu"
    takes = DTYPES[:2] if on_tpu else DTYPES
    found = list(dict.fromkeys(jnp.dtype(x).name for x in (dtype, held) if x is not None))
    if head_dim <= MAX_HEAD_DIM and set(found) <= set(takes):
        return
    sizes, size = (f"head sizes up to {MAX_HEAD_DIM} in ", f"{head_dim} in ") if head_dim else ("", "")
    raise ValueError(
        f"implementation='pallas' of {kernel} takes {sizes}{', '.join(takes)}{' on TPUs' if on_tpu else ''}; found "
        f"{size}{' with a cache of '.join(found)}: take 'xla'"
    )


def check_shared_memory(kernel: str, blocks: Blocks, needed: int) -> None:
    """Raises ValueError if `blocks` of a kernel need more shared memory than the NVIDIA device at hand has."""
    limits = device()
    if needed > limits.shared_memory:
        raise ValueError(
            f"implementation='pallas' of {kernel} with {blocks} needs {needed // 1024} KiB of shared memory, but a "
            f"block has {limits.shared_memory // 1024} KiB on {limits.name}: give smaller blocks or fewer num_stages, "
            "or take 'xla'"
        )


def check_blocks(blocks: Blocks, *sizes: str) -> None:
    """Raises ValueError unless Triton supports these fields of a kernel's blocks, its warps and its stages."""
    name = type(blocks).__name__
    for field in sizes:
        size = getattr(blocks, field)
        if size < 16 or size != power_of_two(size):
            raise ValueError(f"{field}={size} of {name} must be a power of two of at least 16")
    if blocks.num_warps not in (1, 2, 4, 8, 16, 32):
        raise ValueError(f"num_warps={blocks.num_warps} of {name} must be a power of two of at most 32")
    if blocks.num_stages < 1:
        raise ValueError(f"num_stages={blocks.num_stages} of {name} must be at least 1")


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n: the sizes that a block in registers may have."""
    return 1 << (n - 1).bit_length()


def ceil_div(x: jax.Array, n: int) -> jax.Array:
    """`x / n`, rounded up; `x` is not negative."""
    return jax.lax.div(x + (n - 1), jnp.int32(n))


def dot(a: jax.Array, b: jax.Array, contract: tuple[int, int] = (1, 0)) -> jax.Array:
    """The product of two matrices over these dimensions, `[M, K] · [K, N]` if none are given, accumulated in float32.

    Float32 inputs are not rounded, to TF32 on NVIDIA or to bfloat16 on TPUs.
    """
    return jax.lax.dot_general(
        a,
        b,
        (((contract[0],), (contract[1],)), ((), ())),
        precision=jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )


def load(ref: Ref, mask: jax.Array) -> jax.Array:
    """Reads a reference where `mask` is set; 0 elsewhere, without reading there."""
    return triton.load(ref, mask=mask, other=0)


def store(ref: Ref, value: jax.Array, mask: jax.Array) -> None:
    """Writes `value` to a reference where `mask` is set, in the dtype of the reference."""
    triton.store(ref, value.astype(ref.dtype), mask=mask)


def dispatch(triton_form: Callable, tpu_form: Callable, *arrays: PyTree) -> PyTree:
    """A kernel's form for the platform that the program is compiled for: cpu, cuda or tpu.

    Both are functions of `arrays`, which may be trees; the first also of `interpret`, true on CPU.
    """
    platforms = {"cpu": partial(triton_form, interpret=True), "cuda": partial(triton_form, interpret=False)}
    return jax.lax.platform_dependent(*arrays, **platforms, tpu=tpu_form)


def launch(
    body: Callable,
    arrays: Sequence[jax.Array],
    *,
    grid: tuple[int, ...],
    in_specs: Sequence[PyTree],
    out_specs: PyTree,
    out_shape: PyTree,
    num_warps: int,
    num_stages: int,
    aliases: dict[int, int] | None = None,
    interpret: bool = False,
) -> PyTree:
    """A kernel through Triton; `aliases` names inputs whose place an output takes."""
    return pl.pallas_call(
        body,
        grid=grid,
        in_specs=in_specs,
        out_specs=out_specs,
        out_shape=out_shape,
        interpret=interpret,
        compiler_params=triton.CompilerParams(num_warps=num_warps, num_stages=num_stages),
        input_output_aliases=aliases or {},
    )(*arrays)


def launch_tpu(
    body: Callable,
    arrays: Sequence[jax.Array],
    *,
    grid: tuple[int, ...],
    in_specs: Sequence[PyTree],
    out_specs: PyTree,
    out_shape: PyTree,
    semantics: Semantics,
    name: str,
    scalars: int = 0,
    scratch: Sequence[PyTree] = (),
    aliases: dict[int, int] | None = None,
    interpret: bool = False,
) -> PyTree:
    """A kernel through Mosaic; the first `scalars` arrays lie whole in scalar memory, and index maps get them too."""
    return pl.pallas_call(
        body,
        grid_spec=tpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=scalars, grid=grid, in_specs=in_specs, out_specs=out_specs, scratch_shapes=scratch
        ),
        out_shape=out_shape,
        interpret=interpret,
        name=name,
        compiler_params=tpu.CompilerParams(dimension_semantics=semantics, vmem_limit_bytes=64 * 2**20),
        input_output_aliases=aliases or {},
    )(*arrays)
