"""What our Pallas kernels share: masked loads and stores, matrix products, and where a kernel body runs.

On NVIDIA devices a body goes through Pallas' Triton lowering. JAX has deprecated that lowering (it warns since 0.11,
Mosaic GPU is to follow it), and this is the only file that touches it: where it is gone, `available` says so once and
callers take their XLA form. On CPU the same body runs in Pallas' interpreter.
"""

import warnings
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp

try:
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton
except ImportError:  # a later JAX without it
    pl = triton = None
try:
    from jax.experimental.pallas import tpu
except ImportError:
    tpu = None

LANES = 128  # of a TPU's vector registers
LOG_ZERO = -1e30  # finite, so that rows without any key stay free of NaN
MULTIPROCESSORS = {"A100": 108, "H100": 132, "H200": 132}
SHARED_MEMORY = {"A100": 163 * 1024, "H100": 227 * 1024, "H200": 227 * 1024}


@lru_cache(maxsize=1)
def available() -> bool:
    """Whether this JAX can run our kernels; warns once, on the first call, when it cannot."""
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


def device_name() -> str:
    """The NVIDIA device at hand as a key of MULTIPROCESSORS; "A100", the smallest, where it is none of them."""
    kind = jax.devices()[0].device_kind
    return next((name for name in MULTIPROCESSORS if name in kind), "A100")


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n: the sizes that a block in registers may have."""
    return 1 << (n - 1).bit_length()


def ceil_div(x: jax.Array, n: int) -> jax.Array:
    return jax.lax.div(x + (n - 1), jnp.int32(n))


def dot(a: jax.Array, b: jax.Array) -> jax.Array:
    """`[M, K] · [K, N]` accumulated in float32, and for float32 inputs without their rounding to TF32."""
    return jax.lax.dot_general(
        a,
        b,
        (((1,), (0,)), ((), ())),
        precision=jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )


def load(ref: Any, mask: jax.Array) -> jax.Array:
    """What a reference holds, 0 outside of `mask`: nothing is read there."""
    return triton.load(ref, mask=mask, other=0)


def store(ref: Any, value: jax.Array, mask: jax.Array) -> None:
    triton.store(ref, value.astype(ref.dtype), mask=mask)


def dispatch(triton_form: Callable, tpu_form: Callable, *arrays: Any) -> Any:
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
    in_specs: Sequence[Any],
    out_specs: Any,
    out_shape: Any,
    num_warps: int,
    num_stages: int,
    aliases: dict[int, int] | None = None,
    interpret: bool = False,
) -> Any:
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
    in_specs: Sequence[Any],
    out_specs: Any,
    out_shape: Any,
    semantics: tuple[str, ...],
    scalars: int = 0,
    scratch: Sequence[Any] = (),
    aliases: dict[int, int] | None = None,
    interpret: bool = False,
) -> Any:
    """A kernel through Mosaic; the first `scalars` arrays lie whole in scalar memory, and index maps get them too."""
    return pl.pallas_call(
        body,
        grid_spec=tpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=scalars, grid=grid, in_specs=in_specs, out_specs=out_specs, scratch_shapes=scratch
        ),
        out_shape=out_shape,
        interpret=interpret,
        compiler_params=tpu.CompilerParams(dimension_semantics=semantics, vmem_limit_bytes=64 * 2**20),
        input_output_aliases=aliases or {},
    )(*arrays)
