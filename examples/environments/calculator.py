"""A calculator for the model: `--tools examples/environments/calculator.py:calculate`."""

import ast
import operator

OPERATORS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
}


def calculate(expression: str) -> str:
    """Calculates the value of an arithmetic expression.

    Args:
        expression: The expression, such as (17 + 4) * 3.
    """
    if len(expression) > 200:
        raise ValueError("the expression is too long")
    value = _value(ast.parse(expression.strip(), mode="eval").body)
    return str(int(value) if value == int(value) else round(value, 10))


def _value(node: ast.expr) -> float:
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        return float(node.value) if isinstance(node.value, float) else int(node.value)
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        return OPERATORS[type(node.op)](_value(node.left), _value(node.right))
    if isinstance(node, ast.UnaryOp) and type(node.op) in OPERATORS:
        return OPERATORS[type(node.op)](_value(node.operand))
    raise ValueError("only numbers, + - * / // % and parentheses are allowed")
