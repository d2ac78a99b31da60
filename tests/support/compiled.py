"""Reads compiled programs."""

import re
from collections.abc import Callable
from typing import Any

import jax


def operand_types(function: Callable[..., Any], *arrays: Any) -> set[str]:
    """The types of the operands of each product in the compiled program."""
    found = set()
    for computation in re.split(r"\n\n", jax.jit(function).lower(*arrays).compile().as_text()):
        types = dict(re.findall(r"%([\w.-]+) = (\w+)\[", computation))
        for left, right in re.findall(r" dot\(%([\w.-]+), %([\w.-]+)\)", computation):
            found |= {types[left], types[right]}
    return found
