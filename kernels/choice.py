"""Which implementation of a kernel runs where: what was asked for, or what measurements say is fastest."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from jaxrlhf.kernels import pallas

IMPLEMENTATIONS = ("auto", "xla", "pallas", "cudnn")
KERNELS = {
    "decode_attention": IMPLEMENTATIONS[:3],
    "flash_attention": IMPLEMENTATIONS,
    "token_logprobs": IMPLEMENTATIONS[:3],
}
"""What each kernel exists as."""


@dataclass(frozen=True)
class Measured:
    """One row: on `device`, for these shapes, `implementation` beat XLA."""

    kernel: str
    device: str
    """Part of the device's kind, as `jax.devices()[0].device_kind` spells it."""
    dtype: str
    head_dims: tuple[int, ...]
    alibi: bool
    implementation: str
    measurement: str
    """Both times with shapes and versions, and the command that took them."""


# Nothing is in here before it was measured on the device itself: until then `auto` means XLA everywhere.
MEASURED: tuple[Measured, ...] = ()


def choose(kernel: str, implementation: str, *, dtype: jnp.dtype, head_dim: int, alibi: bool) -> str:
    """The implementation that `implementation` means for this kernel, dtype and mask on the device at hand.

    "auto" takes the first fitting row of MEASURED and otherwise "xla". Raises ValueError for a name that is unknown or
    has no form on this platform. Where JAX has lost what our kernels need, "pallas" becomes "xla" with a warning.
    """
    if implementation not in KERNELS[kernel]:
        raise ValueError(
            f"implementation={implementation!r} of {kernel} is not one of {', '.join(map(repr, KERNELS[kernel]))}"
        )
    platform = jax.default_backend()
    if implementation == "auto":
        kind = jax.devices()[0].device_kind
        fitting = (
            row.implementation
            for row in MEASURED
            if (row.kernel, row.dtype, row.alibi) == (kernel, jnp.dtype(dtype).name, alibi)
            and row.device in kind
            and head_dim in row.head_dims
        )
        implementation = next(fitting, "xla")
    elif implementation == "pallas" and platform not in ("cpu", "gpu", "tpu"):
        raise ValueError(
            f"implementation='pallas' of {kernel} runs on NVIDIA, TPU and CPU, not on {platform}; take 'xla'"
        )
    elif implementation == "cudnn" and platform != "gpu":
        raise ValueError(f"implementation='cudnn' of {kernel} runs on NVIDIA devices, not on {platform}; take 'xla'")
    return "xla" if implementation == "pallas" and not pallas.available() else implementation
