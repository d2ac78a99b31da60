"""Cost of a program that was compiled for a GPU: bytes, FLOPs and kernels, counted in its optimised HLO.

The count knows that a slice reads its result alone, that an update in place writes the update alone, and that a loop's
body runs as often as the loop. A loop without a known count is the decode loop, whose steps the caller gives. Our own
kernels count with their operands, those of decoding with the share of the cache that is live; a sort counts with the
passes that XLA's takes.
"""

import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from jaxrlhf.plan.hlo import Array, Computation, Instruction, Program, walk

NOTHING = {
    *("parameter", "constant", "get-tuple-element", "tuple", "bitcast", "after-all", "opt-barrier", "partition-id"),
    *("replica-id", "optimization-barrier", "copy-done", "async-done", "all-gather-done", "all-reduce-done"),
    *("collective-permute-done", "async-update", "domain", "iota"),
}
"""Operations that launch no kernel of their own."""
COLLECTIVES = ("all-gather", "all-reduce", "all-to-all", "reduce-scatter", "collective-permute", "collective-broadcast")
_ELEMENTWISE = {"convert", "bitcast", "copy", "reshape", "transpose", "negate"}
"""Operations in a fusion that read an element of their operand for each element that is read of their result."""
_SORTED_AT_ONCE = 4096
"""Elements that XLA's bitonic sort holds in the shared memory of a block."""


@dataclass(frozen=True)
class Kernel:
    """A kernel of the program, or a copy, and its cost each time that it runs."""

    name: str
    kind: str
    """`product`, `fusion`, `copy`, `sort`, `collective`, the name of a kernel of ours, or the HLO operation."""
    read: float
    """Bytes."""
    written: float
    """Bytes."""
    flops: float = 0.0
    """FLOPs of matrix products."""
    launches: int = 1
    times: float = 1.0
    """Runs in one call of the program."""
    loop: str = ""
    """The loops around it, outermost first, each followed by a slash."""
    decodes: bool = False
    """In a loop without a known count."""

    @property
    def bytes(self) -> float:
        return self.read + self.written


@dataclass(frozen=True)
class Loops:
    """Facts about a program that its text does not have."""

    steps: float = 1.0
    """Iterations of loops without a known count."""
    live: float = 1.0
    """Mean share of the key/value cache that decoding reads."""


def launches(thunks: str) -> list[int]:
    """Launches outside of command buffers, each buffer being one, in one run of the entry and of every loop.

    Loops come in the order in which they begin.

    Args:
        thunks: XLA's dump `*.thunk_sequence_after_thunk_passes.txt`, which nests by indentation.
    """
    counts = [0]
    scopes: list[tuple[int, int | None]] = [(-1, 0)]  # indentation, and the loop; None: launched as one
    for line in thunks.splitlines():
        found = re.match(r"( *)\d+: (k\w+)", line)
        if found is None:
            continue
        indent, kind = len(found[1]), found[2]
        while scopes[-1][0] >= indent:
            scopes.pop()
        loop = scopes[-1][1]
        if kind == "kWhile":
            counts.append(0)
            scopes.append((indent, None if loop is None else len(counts) - 1))
        elif loop is not None:
            counts[loop] += 1
            if kind in ("kCommandBuffer", "kDynamicSliceFusion"):
                scopes.append((indent, None))
    return counts


def kernels(program: Program, loops: Loops = Loops()) -> list[Kernel]:
    """All kernels of a program, those of loop bodies with the times that they run."""
    found = []
    for x, within, times, loop, decodes, _ in walk(program, loops.steps):
        if x.operation not in NOTHING:
            found.append(Kernel(x.name, *_cost(program, within, x, loops), times, loop, decodes))
    return found


def _cost(program: Program, within: Computation, x: Instruction, loops: Loops) -> tuple[str, float, float, float, int]:
    """(kind, bytes read, bytes written, FLOPs, launches) of one run of an instruction."""
    read = sum(array.bytes for name in x.operands for array in within.arrays(name))
    if x.operation == "fusion":
        fused = program.computations[x.called or ""]
        return "fusion", _fusion_read(program, fused), _written(program, fused, fused.root), _fused_flops(fused), 1
    if x.operation == "custom-call":
        return _custom_call(within, x, read, loops)
    if x.operation == "sort":
        passes = _sort_passes(x)
        return "sort", passes * read, passes * x.bytes, 0.0, passes
    if x.operation in ("slice", "dynamic-slice"):
        return x.operation, x.bytes, x.bytes, 0.0, 1
    if x.operation == "dynamic-update-slice":
        update = sum(array.bytes for array in within.arrays(x.operands[1]))
        return x.operation, update, update, 0.0, 1
    if x.operation in ("copy", "copy-start"):
        return "copy", read, read, 0.0, 1
    if x.operation.removesuffix("-start") in COLLECTIVES:
        return "collective", read, read, 0.0, 1
    return x.operation, read, x.bytes, 0.0, 1


def _custom_call(
    within: Computation, x: Instruction, read: float, loops: Loops
) -> tuple[str, float, float, float, int]:
    """The cost of a library's kernel or of ours."""
    target = x.attribute(r'custom_call_target="([^"]*)"') or ""
    if "cublas" in target:
        result = x.arrays[0]  # the second one is the library's workspace
        contracted = x.attribute(r'"lhs_contracting_dimensions":\[([^\]]*)\]') or ""
        left = within.arrays(x.operands[0])[0].dims
        depth = math.prod(left[int(axis)] for axis in re.findall(r"\d+", contracted))
        return "product", read, result.bytes, 2.0 * result.elements * depth, 1
    name = x.attribute(r'op_name="[^"]*?(\w+)"') or target
    ours = re.search(r"(decode_attention|flash_attention|token_logprobs)\w*", f"{x.name} {x.attributes}")
    kind = ours[0] if ours else name
    aliased = re.findall(
        r"\{(\d*)\}: \((\d+), \{", x.attribute(r"output_to_operand_aliasing=\{(.*?\)[^)]*?)\}[,}]") or ""
    )
    in_place = sum(x.arrays[int(out)].bytes for out, _ in aliased if out)
    written = x.bytes - in_place
    if kind.startswith("decode_attention"):
        cache = sum(max(within.arrays(name), key=_bytes).bytes for name in x.operands if _is_cache(within.arrays(name)))
        return kind, read - cache + loops.live * cache, written, 0.0, 1
    return kind, read, written, 0.0, 1


def _bytes(array: Array) -> float:
    return array.bytes


def _is_cache(arrays: tuple[Array, ...]) -> bool:
    """True for keys or values `[B, H, S, D]` and scales `[B, H, S]`, which the kernel reads where they are live."""
    return len(arrays) == 1 and len(arrays[0].dims) >= 3 and arrays[0].dims[2] > 64


def _sort_passes(x: Instruction) -> int:
    """Kernels of XLA's bitonic sort, each of which reads and writes all operands."""
    axis = int(x.attribute(r"dimensions=\{(\d+)") or 0)
    doublings = max(0, math.ceil(math.log2(max(2, x.arrays[0].dims[axis]) / _SORTED_AT_ONCE)))
    return 1 + sum(stage + 1 for stage in range(1, doublings + 1))


def _fusion_read(program: Program, fused: Computation) -> float:
    """Bytes that a fusion reads."""
    total = 0.0
    for x in fused.parameters.values():
        used = _used(program, fused, x.name)
        for array in x.arrays:
            total += array.itemsize * (array.elements if used is None else min(used, array.elements))
    return total


def _used(program: Program, fused: Computation, name: str) -> float | None:
    """Elements of a value that a fusion reads; None: all of them."""
    total = 0.0
    for user, index in fused.users.get(name, ()):
        if user.operation in ("slice", "dynamic-slice") or (user.operation == "gather" and index == 0):
            more: float | None = user.arrays[0].elements if index == 0 else 1
        elif user.operation == "dynamic-update-slice" and index != 1:
            more = 0 if index == 0 else 1
        elif user.operation in _ELEMENTWISE and not user.root:
            more = _used(program, fused, user.name)
        elif user.operation == "fusion":
            inner = program.computations[user.called or ""]
            more = _used(program, inner, inner.parameters[index].name)
        else:
            more = None
        if more is None:
            return None
        total += more
    return total


def _written(program: Program, fused: Computation, x: Instruction) -> float:
    """Bytes that a fusion writes as its result `x`, in place where it can."""
    inner = fused.instructions
    if x.operation == "tuple":
        return sum(_written(program, fused, inner[name]) for name in x.operands)
    if x.operation == "dynamic-update-slice":
        update = inner[x.operands[1]].arrays[0]
        return update.elements * x.arrays[0].itemsize
    if x.operation == "bitcast" and x.operands[0] in inner:
        return _written(program, fused, inner[x.operands[0]])
    if x.operation == "parameter":
        return 0.0
    if x.operation == "scatter":
        return inner[x.operands[-1]].bytes
    if x.operation == "fusion":
        called = program.computations[x.called or ""]
        return _written(program, called, called.root)
    return x.bytes


def _fused_flops(fused: Computation) -> float:
    """FLOPs of matrix products in a fusion."""
    total = 0.0
    for x in fused.instructions.values():
        if x.operation == "dot":
            left = fused.arrays(x.operands[0])[0].dims
            axes = re.findall(r"\d+", x.attribute(r"lhs_contracting_dims=\{([^}]*)\}") or "")
            total += 2.0 * x.arrays[0].elements * math.prod(left[int(axis)] for axis in axes)
    return total


@dataclass(frozen=True)
class Traffic:
    """Sums over the kernels of one call of a program."""

    read: float
    written: float
    flops: float
    kernels: float
    copies: float
    """Kernels that only copy."""
    launched: float
    """Launches outside of command buffers."""
    decoded: float
    """Those of the bytes that decoding reads and writes, all its steps together."""
    seconds: float
    """Sum over kernels of the longer of their bytes and their FLOPs, and the launches."""

    @property
    def bytes(self) -> float:
        return self.read + self.written


@dataclass(frozen=True)
class Rates:
    """Rates that the estimate of time expects."""

    bandwidth: float
    """Bytes/s."""
    flops: float
    """FLOP/s of matrix products."""
    launch: float = 2e-6
    """Seconds of a launch outside of command buffers."""


def traffic(found: Collection[Kernel], rates: Rates, launched: Sequence[int] | None = None) -> Traffic:
    """Sums over kernels, with the counts of `launches`; None: every kernel is launched by itself."""
    loops = by_loop(found)
    if launched is None or len(launched) != len(loops):
        alone = sum(k.times * k.launches for k in found)
    else:
        alone = sum(kernels[0].times * count for kernels, count in zip(loops.values(), launched, strict=True))
    busy = sum(k.times * max(k.bytes / rates.bandwidth, k.flops / rates.flops) for k in found)
    return Traffic(
        read=sum(k.times * k.read for k in found),
        written=sum(k.times * k.written for k in found),
        flops=sum(k.times * k.flops for k in found),
        kernels=sum(k.times * k.launches for k in found),
        copies=sum(k.times * k.launches for k in found if k.kind == "copy"),
        launched=alone,
        decoded=sum(k.times * k.bytes for k in found if k.decodes),
        seconds=busy + alone * rates.launch,
    )


def by_loop(found: Collection[Kernel]) -> Mapping[str, list[Kernel]]:
    """Kernels by the loops around them."""
    groups: dict[str, list[Kernel]] = {}
    for kernel in found:
        groups.setdefault(kernel.loop, []).append(kernel)
    return groups
