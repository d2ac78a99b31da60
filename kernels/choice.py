"""Chooses the implementation of a kernel: the one asked for, or the one that was measured to be fastest.

There are two kinds of evidence. A *measured* row comes from the device itself. A *compiled* row comes from the device's
compiler: bytes, peak memory and spills of the programs of a whole iteration. A measured row overrules a compiled one.
"""

import importlib.util
import logging
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

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


class Device(Protocol):
    """A device at hand, or of a compiler's topology, as JAX describes it."""

    @property
    def platform(self) -> str: ...

    @property
    def device_kind(self) -> str: ...


@dataclass(frozen=True)
class Row:
    """One row of evidence: `implementation` beats the others for these shapes."""

    kernel: str
    dtype: str
    head_dims: tuple[int, ...]
    """Head sizes; for token log-probs the widths of hidden states."""
    implementation: str
    evidence: str
    """The compared programs, with shapes and versions, and the command that compared them."""

    def __post_init__(self) -> None:
        if self.implementation not in (known := KERNELS[self.kernel][1:]):
            raise ValueError(
                f"implementation={self.implementation!r} of a row for {self.kernel} is not one of "
                f"{', '.join(map(repr, known))}"
            )

    def fits(self, device: Device, alibi: bool) -> bool:
        """True if the row speaks of this device, and of masks with or without ALiBi."""
        raise NotImplementedError


@dataclass(frozen=True)
class Measured(Row):
    """Evidence from the device itself."""

    device: str
    """Whole words of the device's kind, as `jax.devices()[0].device_kind` spells it."""
    alibi: bool

    def fits(self, device: Device, alibi: bool) -> bool:
        return pallas.is_kind(self.device, device.device_kind) and self.alibi == alibi


@dataclass(frozen=True)
class Compiled(Row):
    """Evidence from the device's compiler, with and without ALiBi."""

    capabilities: tuple[str, ...]
    """Compute capabilities of NVIDIA devices."""

    def fits(self, device: Device, alibi: bool) -> bool:
        return str(getattr(device, "compute_capability", None)) in self.capabilities


_OF_OURS = (
    "compiled: half of the bytes of XLA's form in training, a fifth fewer per decoded token, no spills "
    "(benchmarks/results/compiled.json, kernels_aot.json)"
)

# Only measurements on the device itself belong here.
MEASURED: tuple[Measured, ...] = ()
COMPILED: tuple[Compiled, ...] = tuple(
    Compiled(kernel, "bfloat16", (64, 80, 96, 128, 256), "pallas", _OF_OURS, ("8.0", "9.0"))
    for kernel in ("flash_attention", "prefill_attention", "decode_attention")
)
"""Token log-probs have no row: XLA's form leaves its products to the vendor's library, in as much memory."""


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
    holes: bool = False,
    device: Device | None = None,
) -> Choice:
    """Chooses the implementation of a kernel for this dtype and mask, and gives the reason.

    "auto" takes the first row of MEASURED, and then of COMPILED, that fits and is installed, and otherwise "xla".
    Raises ValueError for a name that is unknown or has no form on this platform or device. `varies`: scale or window
    differ between layers, so that "auto" takes no library, which wants them as numbers. `packed`: rows hold several
    sequences, which libraries cannot tell apart. `softcap`: scores or logits are soft-capped, which only "xla" can.
    `holes`: a row may have padding between real tokens, which only "xla" sees. `device`: the one that the program is
    compiled for, by default the one at hand. Where JAX has lost what our kernels need, "pallas" becomes "xla" with a
    warning.
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
        if holes:
            return Choice("xla", "the mask may have holes, which only this one sees")
        device = jax.devices()[0] if device is None else device
        fitting = (
            Choice(row.implementation, row.evidence)
            for row in (*MEASURED, *COMPILED)
            if (row.kernel, row.dtype) == (kernel, jnp.dtype(dtype).name)
            and row.fits(device, alibi)
            and head_dim in row.head_dims
            and not ((varies or packed) and row.implementation in LIBRARIES)
            and (row.implementation != "tokamax" or importlib.util.find_spec("tokamax") is not None)
        )
        nothing = Choice("xla", f"no evidence on {device.device_kind} for this dtype, head size and mask")
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


def choose(kernel: str, implementation: str, *, dtype: jnp.dtype, head_dim: int, alibi: bool, **facts: Any) -> str:
    """`decide` without the reason, which is logged (`jaxrlhf --verbose`), once for each kernel and shape.

    Models call this and pass the result on; kernels that are called directly decide without a log entry. `facts` are
    the optional ones of `decide`.
    """
    choice = decide(kernel, implementation, dtype=dtype, head_dim=head_dim, alibi=alibi, **facts)
    shape = f"{jnp.dtype(dtype).name}, {'width' if kernel == 'token_logprobs' else 'head size'} {head_dim}"
    log_once(f"{kernel} ({shape}{', ALiBi' if alibi else ''}): {choice.implementation}: {choice.reason}")
    return choice.implementation


@lru_cache(maxsize=256)
def log_once(text: str) -> None:
    """Logs which implementation runs, for `jaxrlhf --verbose`."""
    LOGGER.info("kernel %s", text)
