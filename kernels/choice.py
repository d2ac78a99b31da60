"""Which implementation of a kernel runs where: what was asked for, or what measurements say is fastest."""

import importlib.util
import logging
from dataclasses import dataclass
from functools import lru_cache

import jax
import jax.numpy as jnp

from jaxrlhf.kernels import pallas

IMPLEMENTATIONS = ("auto", "xla", "pallas", "cudnn", "tokamax")
KERNELS = {
    "decode_attention": IMPLEMENTATIONS[:3],
    "flash_attention": IMPLEMENTATIONS,
    "prefill_attention": IMPLEMENTATIONS[:3],
    "token_logprobs": IMPLEMENTATIONS[:3],
}
"""The implementations of each kernel. Prefill is flash attention of prompts that are padded on the left. It uses no
library: measurements for training and scoring, whose rows are padded on the right, do not apply to it."""
PLATFORMS = {
    "pallas": {"cpu": "CPU", "gpu": "NVIDIA", "tpu": "TPU"},
    "cudnn": {"gpu": "NVIDIA devices"},
    "tokamax": {"cpu": "CPU", "gpu": "NVIDIA"},
}
"""The platforms of each implementation other than XLA, by the names of JAX, with the names that users know."""
LIBRARIES = IMPLEMENTATIONS[3:]
"""Implementations of other projects: for training and scoring only, with scale and window as numbers."""
LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True)
class Measured:
    """One row: on `device`, for these shapes, `implementation` beat XLA."""

    kernel: str
    device: str
    """Whole words of the device's kind, as `jax.devices()[0].device_kind` spells it."""
    dtype: str
    head_dims: tuple[int, ...]
    """Head sizes; for token log-probs the widths of hidden states."""
    alibi: bool
    implementation: str
    measurement: str
    """Both times with shapes and versions, and the command that took them."""

    def __post_init__(self) -> None:
        if self.implementation not in (known := KERNELS[self.kernel][1:]):
            raise ValueError(
                f"implementation={self.implementation!r} measured for {self.kernel} is not one of "
                f"{', '.join(map(repr, known))}"
            )


# Only measurements on the device itself belong here; until there are some, `auto` means XLA everywhere.
MEASURED: tuple[Measured, ...] = ()


@dataclass(frozen=True)
class Choice:
    implementation: str
    reason: str


def decide(
    kernel: str,
    implementation: str,
    *,
    dtype: jnp.dtype,
    head_dim: int,
    alibi: bool,
    varies: bool = False,
    packed: bool = False,
    softcap: bool = False,
) -> Choice:
    """Chooses the implementation of a kernel for this dtype and mask on the device at hand, and gives the reason.

    "auto" takes the first row of MEASURED that fits and is installed, and otherwise "xla". Raises ValueError for a name
    that is unknown or has no form on this platform or device. `varies`: scale or window differ between layers, so that
    "auto" takes no library, which wants them as numbers. `packed`: rows hold several sequences, which libraries cannot
    tell apart. `softcap`: scores or logits are soft-capped, which only "xla" can. Where JAX has lost what our kernels
    need, "pallas" becomes "xla" with a warning.
    """
    if implementation not in KERNELS[kernel]:
        raise ValueError(
            f"implementation={implementation!r} of {kernel} is not one of {', '.join(map(repr, KERNELS[kernel]))}"
        )
    if packed and implementation in LIBRARIES:
        raise ValueError(
            f"implementation={implementation!r} of {kernel} cannot see the segments of packed rows: take 'xla' or "
            "'pallas', or set packing: false"
        )
    if softcap and implementation not in ("auto", "xla"):
        raise ValueError(f"implementation={implementation!r} of {kernel} has no soft-capping: take 'xla' or 'auto'")
    if softcap:
        return Choice("xla", "only this one has soft-capping")
    platform, reason = jax.default_backend(), "asked for"
    if implementation == "auto":
        kind = jax.devices()[0].device_kind
        fitting = (
            Choice(row.implementation, row.measurement)
            for row in MEASURED
            if (row.kernel, row.dtype, row.alibi) == (kernel, jnp.dtype(dtype).name, alibi)
            and pallas.is_kind(row.device, kind)
            and head_dim in row.head_dims
            and not ((varies or packed) and row.implementation in LIBRARIES)
            and (row.implementation != "tokamax" or importlib.util.find_spec("tokamax") is not None)
        )
        nothing = Choice("xla", f"nothing measured on {kind} for this dtype, head size and mask")
        choice = next(fitting, nothing)
        implementation, reason = choice.implementation, choice.reason
    elif implementation in PLATFORMS and platform not in PLATFORMS[implementation]:
        *others, last = sorted(PLATFORMS[implementation].values())
        known = f"{', '.join(others)} and {last}" if others else last
        raise ValueError(
            f"implementation={implementation!r} of {kernel} runs on {known}, not on {platform}; take 'xla'"
        )
    if implementation == "pallas" and not pallas.available():
        return Choice("xla", "this JAX cannot run our kernels")
    if implementation == "pallas" and platform == "gpu":
        pallas.device()
    return Choice(implementation, reason)


def choose(
    kernel: str,
    implementation: str,
    *,
    dtype: jnp.dtype,
    head_dim: int,
    alibi: bool,
    varies: bool = False,
    packed: bool = False,
    softcap: bool = False,
) -> str:
    """`decide` without the reason, which is logged (`jaxrlhf --verbose`), once for each kernel and shape.

    Models call this and pass the result on; kernels that are called directly decide without a log entry.
    """
    choice = decide(
        kernel,
        implementation,
        dtype=dtype,
        head_dim=head_dim,
        alibi=alibi,
        varies=varies,
        packed=packed,
        softcap=softcap,
    )
    shape = f"{jnp.dtype(dtype).name}, {'width' if kernel == 'token_logprobs' else 'head size'} {head_dim}"
    log_once(f"{kernel} ({shape}{', ALiBi' if alibi else ''}): {choice.implementation}: {choice.reason}")
    return choice.implementation


@lru_cache(maxsize=256)
def log_once(text: str) -> None:
    """Logs which implementation runs, for `jaxrlhf --verbose`."""
    LOGGER.info("kernel %s", text)
