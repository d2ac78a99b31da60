"""Our kernels compiled ahead of time for devices that are not present, with the registers and spills of each.

Tests of the kernels and `kernels_aot.py` share it. For a GPU, ptxas reports registers; for a TPU, Mosaic compiles the
kernel or fails.
"""

import importlib.util
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, SingleDeviceSharding

from jaxrlhf.kernels import KV_CACHE_DTYPES, append_attention, flash_attention, pallas, token_logprobs
from jaxrlhf.kernels.decode_attention import decode_blocks
from jaxrlhf.kernels.flash_attention import flash_blocks
from jaxrlhf.kernels.logprobs_kernel import head_blocks
from jaxrlhf.plan.devices import DEVICES
from jaxrlhf.plan.programs import topology_devices

ARCHITECTURES = {"a100-80g": "sm_80", "h100": "sm_90a", "h200": "sm_90a"}
TARGETS = ("a100-80g", "h200", "v5e")
HEAD_SIZES = {64: (32, 32), 80: (32, 32), 96: (32, 8), 128: (32, 8), 256: (16, 1)}
"""Head size: query heads and key/value heads that such models have."""
UNALIGNED = (40, 1000)
"""Lengths of sequences that no block divides: registers are then needed for masks as well."""
OURS = ("decode_attention", "flash_attention", "token_logprobs")
KERNEL_NAMES = {
    "decode_attention_share",
    "flash_attention_forward",
    "flash_attention_query_gradient",
    "flash_attention_key_gradient",
    "token_logprobs_forward",
    "token_logprobs_logit_gradient",
}


class Registers(NamedTuple):
    """Registers per thread of one kernel, as ptxas reports them."""

    registers: int
    spilled: int
    """Bytes stored to and loaded from local memory for want of registers."""


def missing(target: str) -> str | None:
    """Name of the package that this machine lacks to compile for a target, or None."""
    if DEVICES[target].platform == "tpu":
        return None if importlib.util.find_spec("libtpu") else "the package libtpu (extra plan-tpu)"
    plugins = importlib.util.find_spec("jax_plugins")
    if not plugins or not importlib.util.find_spec("jax_plugins.xla_cuda12"):
        return "JAX's CUDA plugin (extra plan-cuda)"
    return None if shutil.which("ptxas") else "ptxas (extra plan-cuda)"


def compile_for(
    target: str, function: Callable, *shapes: Any, options: dict[str, Any] | None = None, **jit: Any
) -> tuple[Any, dict[str, Registers]]:
    """`jit(function)` of arrays of these shapes for one device of a kind, and what ptxas says of its kernels."""
    device = DEVICES[target]
    place = topology_devices(device, "1x1" if device.platform == "tpu" else "", 1)[0]
    sharding = SingleDeviceSharding(place)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes)
    # Newer JAX wants to know at lowering which devices it compiles for.
    with (
        tempfile.TemporaryDirectory() as folder,
        jax.set_mesh(Mesh(np.array([place]), ("x",), axis_types=(AxisType.Auto,))),
    ):
        dump = {} if device.platform == "tpu" else {"xla_dump_to": folder}
        lowered = jax.jit(function, **jit).lower(*shapes)
        compiled = lowered.compile(compiler_options=(options or {}) | dump)
        return compiled, dict(_assembled(Path(folder), target))


def _assembled(folder: Path, target: str) -> Iterator[tuple[str, Registers]]:
    for path in (path for path in folder.glob("*.ptx") if ".entry" in path.read_text()):
        command = ["ptxas", "-v", f"-arch={ARCHITECTURES[target]}", str(path), "-o", "/dev/null"]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        found = re.findall(
            r"entry function '(\w+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers",
            report,
            re.DOTALL,
        )
        yield from ((kernel, Registers(int(used), int(out) + int(back))) for kernel, out, back, used in found)


def _shape(*shape: int, dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def decode_case(width: int, target: str, dtype: Any = jnp.bfloat16, kv: str = "auto", alibi: bool = True):
    """(function, shapes, donated, blocks) of decode attention that appends, as the target would cut it.

    64 rows on a cache of 512 columns.
    """
    batch, size = 64, 512
    heads, kv_heads = HEAD_SIZES[width]
    held = KV_CACHE_DTYPES[kv]
    cache = (_shape(batch, kv_heads, size, width, dtype=held or dtype),) * 2
    cache += (_shape(batch, kv_heads, size, dtype=jnp.float32),) * (0 if held is None else 2)
    new = _shape(batch, kv_heads, width, dtype=dtype)
    blocks = decode_blocks(width, dtype, programs=batch * kv_heads, cache_length=size, device=_device(target))

    def attend(query, key, value, cache, start, length):
        slopes = jnp.ones(heads) if alibi else None
        options = {"scale": 1.0, "alibi_slopes": slopes, "implementation": "pallas", "blocks": blocks}
        return append_attention(query, key, value, cache, start, length, **options)

    return (
        attend,
        (_shape(batch, heads, width, dtype=dtype), new, new, cache, _shape(batch), _shape(batch)),
        (3,),
        blocks,
    )


def flash_case(width: int, dtype: Any = jnp.bfloat16, alibi: bool = True, size: int = 1024, packed: bool = False):
    """(function, shapes, blocks) of flash attention and its gradients."""
    heads, kv_heads = HEAD_SIZES[width]
    wide, narrow = (_shape(1, h, size, width, dtype=dtype) for h in (heads, kv_heads))

    def attend(query, key, value, upstream, start, length, window, scale):
        def call(*arrays):
            slopes = jnp.ones(heads) if alibi else None
            options = {"scale": scale, "window": window, "alibi_slopes": slopes, "implementation": "pallas"}
            return flash_attention(*arrays, start, length, **options)

        output, pull = jax.vjp(call, query, key, value)
        return output, pull(upstream)

    start = _shape(1, size) if packed else _shape(1)
    scalars = start, _shape(1), _shape(), _shape(dtype=jnp.float32)
    return attend, (wide, narrow, narrow, wide, *scalars), flash_blocks(width, dtype, size)


def logprobs_case(
    width: int,
    dtype: Any = jnp.bfloat16,
    tokens: int = 4096,
    vocab: int = 50272,
    gradient: bool = True,
    head: Any = jnp.float32,
    implementation: str = "pallas",
):
    """(function, shapes, blocks) of token log-probs, and of their gradients; the head held in the dtype `head`."""
    hidden = _shape(1, tokens, width, dtype=dtype)
    upstream = _shape(1, tokens, dtype=jnp.float32)

    def values(hidden, weight, labels):
        return token_logprobs(hidden, weight, labels, vocab_size=vocab, implementation=implementation)

    def both(hidden, weight, labels, *upstream):
        results, pull = jax.vjp(lambda *x: values(*x, labels), hidden, weight)
        return results, pull(upstream)

    shapes = hidden, _shape(vocab, width, dtype=head), _shape(1, tokens)
    blocks = head_blocks(tokens, width, dtype)
    return (both, (*shapes, upstream, upstream), blocks) if gradient else (values, shapes, blocks)


def _device(target: str) -> pallas.Device:
    return pallas.DEVICES[target.upper().split("-")[0] if target in ARCHITECTURES else "A100"]


def _flash_cases(shape: str, width: int, dtype: Any) -> Iterator[tuple[str, tuple]]:
    yield shape, flash_case(width, dtype)
    for size in UNALIGNED:
        yield f"{shape}, {size} tokens, no ALiBi", flash_case(width, dtype, alibi=False, size=size)
        yield f"{shape}, {size} tokens, packed", flash_case(width, dtype, size=size, packed=True)


def _cases(target: str) -> Iterator[tuple[str, tuple]]:
    for width in HEAD_SIZES:
        yield from ((f"head size {width}, cache {kv}", decode_case(width, target, kv=kv)) for kv in KV_CACHE_DTYPES)
        yield from _flash_cases(f"head size {width}", width, jnp.bfloat16)
        if DEVICES[target].platform == "cuda":
            single = f"float32, head size {width}"
            yield f"{single}, cache auto", decode_case(width, target, jnp.float32)
            yield f"{single}, cache int8, no ALiBi", decode_case(width, target, jnp.float32, "int8", alibi=False)
            yield from _flash_cases(single, width, jnp.float32)
    yield from ((f"width {width}", logprobs_case(width)) for width in (768, 2048, 5120))


def kernel_table(targets: tuple[str, ...] = TARGETS, say: Callable[[str], None] = print) -> list[dict[str, Any]]:
    """Every kernel for every target, in bfloat16, of 1024 tokens and with ALiBi unless its shape says otherwise.

    Registers and spilled bytes are None on a TPU, where it only compiles.
    """
    rows = []
    for target in targets:
        if lacks := missing(target):
            say(f"{target}: left out for want of {lacks}")
            continue
        for shape, (function, shapes, *donated, blocks) in _cases(target):
            program, found = compile_for(target, function, *shapes, donate_argnums=donated[0] if donated else ())
            names = set(re.findall(rf"\b((?:{'|'.join(OURS)})[a-z_]+)", program.as_text()))
            for kernel in sorted(names & KERNEL_NAMES):
                held = found.get(kernel)
                sizes = {"registers": held and held.registers, "spilled": held and held.spilled}
                cut = str(blocks) if DEVICES[target].platform == "cuda" else None
                rows.append({"device": target, "kernel": kernel, "shape": shape, "blocks": cut} | sizes)
                say(f"{target}: {kernel}, {shape}: {sizes}")
    return rows
