"""The text of an optimised HLO program: its computations and instructions, their bytes, and how often each runs."""

import math
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

_BITS = {"pred": 8, "bf16": 16, "token": 0}
_ARRAY = re.compile(r"\b(pred|token|bf16|[suf]\d+\w*)\[([\d,]*)\]")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_OPERATION = re.compile(r"([\w\-]+)\((.*)$")


class Array(NamedTuple):
    """Type of an array in HLO."""

    dtype: str
    dims: tuple[int, ...]

    @property
    def elements(self) -> int:
        return math.prod(self.dims)

    @property
    def itemsize(self) -> float:
        """Bytes of an element; those of `s4` are half of one."""
        bits = _BITS.get(self.dtype)
        return (int(re.findall(r"\d+", self.dtype)[0]) if bits is None else bits) / 8

    @property
    def bytes(self) -> float:
        return self.elements * self.itemsize


@dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    name: str
    operation: str
    arrays: tuple[Array, ...]
    """The result, or the elements of a tuple."""
    operands: tuple[str, ...]
    """Names; of a parameter its number."""
    attributes: str
    root: bool

    @property
    def bytes(self) -> float:
        return sum(array.bytes for array in self.arrays)

    def attribute(self, pattern: str) -> str | None:
        """The first group of `pattern` in the attributes."""
        found = re.search(pattern, self.attributes)
        return found[1] if found else None

    @cached_property
    def called(self) -> str | None:
        """The computation of a fusion or call."""
        return self.attribute(r"(?:calls|to_apply)=%?([\w.\-]+)")


@dataclass(frozen=True)
class Computation:
    """A function of the program: the entry, a loop's body, or what is fused into a kernel."""

    instructions: Mapping[str, Instruction]

    @cached_property
    def root(self) -> Instruction:
        return next(x for x in self.instructions.values() if x.root)

    @cached_property
    def users(self) -> Mapping[str, list[tuple[Instruction, int]]]:
        """By name of a value: the instructions that take it, and as which operand."""
        users: dict[str, list[tuple[Instruction, int]]] = {}
        for x in self.instructions.values():
            for i, name in enumerate(x.operands):
                users.setdefault(name, []).append((x, i))
        return users

    @cached_property
    def parameters(self) -> Mapping[int, Instruction]:
        return {int(x.operands[0]): x for x in self.instructions.values() if x.operation == "parameter"}

    def arrays(self, name: str) -> tuple[Array, ...]:
        """Arrays of a value; none for one of another computation."""
        return self.instructions[name].arrays if name in self.instructions else ()


@dataclass(frozen=True)
class Program:
    """The computations of an HLO module by name."""

    computations: Mapping[str, Computation]
    entry: str


def _closing(text: str, opened: int = 0) -> int:
    """Index of the parenthesis that closes the first one of `text`, after `opened` that are open already."""
    depth = opened
    for i, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if letter == ")" and not depth:
            return i
    raise ValueError(f"no closing parenthesis in {text[:80]!r}")


def _split(text: str) -> Iterator[str]:
    """Parts between the commas of `text` that lie in no bracket."""
    depth, begin = 0, 0
    for i, letter in enumerate(text):
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and not depth:
            yield text[begin:i].strip()
            begin = i + 1
    if text[begin:].strip():
        yield text[begin:].strip()


def _arrays(text: str) -> tuple[Array, ...]:
    return tuple(Array(dtype, tuple(int(n) for n in dims.split(",") if n)) for dtype, dims in _ARRAY.findall(text))


def _instruction(name: str, root: bool, text: str) -> Instruction | None:
    """An instruction from the text after its `=`."""
    text = re.sub(r"/\*index=\d+\*/", "", text)
    end = _closing(text) + 1 if text.startswith("(") else text.index(" ")
    found = _OPERATION.match(text[end:].strip())
    if found is None:
        return None
    operation, rest = found.groups()
    close = _closing(rest, 1)
    operands = tuple(part.split(" ")[-1].lstrip("%") for part in _split(rest[:close]))
    return Instruction(name, operation, _arrays(text[:end]), operands, rest[close + 1 :], root)


def parse(text: str) -> Program:
    """Reads the text of an optimised module, as `compiled.as_text()` prints it."""
    computations: dict[str, Computation] = {}
    entry, instructions = "", None
    for line in text.splitlines():
        if instructions is None:
            if found := _COMPUTATION.match(line):
                instructions = {}
                computations[found[2]] = Computation(instructions)
                entry = found[2] if found[1] else entry
        elif line.startswith("}"):
            instructions = None
        elif found := _INSTRUCTION.match(line):
            instruction = _instruction(found[2], bool(found[1]), found[3])
            if instruction is not None:
                instructions[instruction.name] = instruction
    if not entry:
        raise ValueError("the text has no ENTRY computation, so it is no HLO module")
    return Program(computations, entry)


class Visit(NamedTuple):
    """An instruction where the program runs it."""

    instruction: Instruction
    within: Computation
    times: float
    """Runs in one call of the program."""
    loop: str
    """The loops around it, outermost first, each followed by a slash."""
    decodes: bool
    """In a loop without a known count."""
    callers: tuple[tuple[Computation, Instruction], ...]
    """The calls around it, outermost first, each with the computation that it stands in."""


def walk(program: Program, steps: float, into: Collection[str] = ("call",)) -> Iterator[Visit]:
    """Visits the instructions of a program, of its loops and of its branches, in their order.

    Args:
        program: The module.
        steps: Iterations of a loop without a known count, which is the decode loop.
        into: Operations that are not visited themselves: the instructions that they call are.
    """

    def visit(
        within: Computation,
        times: float,
        loop: str = "",
        decodes: bool = False,
        callers: tuple[tuple[Computation, Instruction], ...] = (),
    ) -> Iterator[Visit]:
        for x in within.instructions.values():
            if x.operation == "while":
                known = x.attribute(r'"known_trip_count":\{"n":"(\d+)"')
                count = times * (float(known) if known else steps)
                for part in ("condition", "body"):
                    inner = program.computations[x.attribute(rf"{part}=%?([\w.\-]+)") or ""]
                    yield from visit(inner, count, f"{loop}{x.name}/", decodes or not known, callers)
            elif x.operation == "conditional":
                branches = _branches(program, x)
                for branch in branches:
                    yield from visit(branch, times / len(branches), loop, decodes, callers)
            elif x.operation in into and x.called:
                inner = program.computations[x.called]
                yield from visit(inner, times, loop, decodes, (*callers, (within, x)))
            else:
                yield Visit(x, within, times, loop, decodes, callers)

    yield from visit(program.computations[program.entry], 1.0)


def _branches(program: Program, x: Instruction) -> list[Computation]:
    """The branches of a conditional, each taken as often as the others."""
    listed = x.attribute(r"branch_computations=\{([^}]*)\}")
    names = listed.split(",") if listed else re.findall(r"(?:true|false)_computation=%?([\w.\-]+)", x.attributes)
    return [program.computations[name.strip().lstrip("%")] for name in names]
