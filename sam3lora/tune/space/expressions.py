"""Arithmetic that ties one parameter to others, such as `2 * lora.rank`."""

from __future__ import annotations

import ast
import operator
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

_LONGEST = 200  # characters
_LARGEST_EXPONENT = _MOST_DIGITS = 64  # larger ones would take forever


def _power(base: Any, exponent: Any) -> Any:
    if abs(exponent) > _LARGEST_EXPONENT:
        raise ValueError(f"the exponent {exponent:g} is too large, expected at most {_LARGEST_EXPONENT}")
    return base**exponent


def _round(value: Any, digits: Any = None) -> Any:
    if digits is not None and abs(digits) > _MOST_DIGITS:
        raise ValueError(f"round to {digits:g} digits is too much, expected at most {_MOST_DIGITS}")
    return round(value, digits)


_OPERATORS: dict[type[ast.operator] | type[ast.unaryop], Callable[..., Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Pow: _power,
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
}
_FUNCTIONS: dict[str, Callable[..., Any]] = {"min": min, "max": max, "round": _round, "int": int}

ALLOWED = f"numbers, dotted keys, + - * / // **, brackets and {', '.join(_FUNCTIONS)}"


@dataclass(frozen=True)
class Expression:
    """Arithmetic over dotted keys: the text as it was written, and the keys in it, each once, in order."""

    text: str
    keys: tuple[str, ...] = ()

    @classmethod
    def parse(cls, text: str) -> Expression:
        """Read an expression without computing it.

        Raises:
            ValueError: It is not an expression, is too long, or holds anything but `ALLOWED`.
        """
        if len(text) > _LONGEST:
            raise ValueError(f"an expression of {len(text)} characters is too long, expected at most {_LONGEST}")
        return cls(text, tuple(dict.fromkeys(_keys(_tree(text)))))

    def evaluate(self, values: Mapping[str, Any]) -> int | float:
        """The value with these values of its keys.

        Raises:
            ValueError: A key's value is not a number, or the result of a step is not a finite number.
        """
        try:
            return _evaluate(_tree(self.text), values)
        except (ArithmeticError, TypeError) as error:
            raise ValueError(f"{self.text!r} cannot be computed: {error}") from None


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _tree(text: str) -> ast.expr:
    try:
        return ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError) as error:
        raise ValueError(f"{text!r} is not an expression such as 2 * lora.rank: {error}") from None


def _dotted(node: ast.expr) -> str | None:
    """`training.loss.mask` for nested attributes of a name."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (front := _dotted(node.value)):
        return f"{front}.{node.attr}"
    return None


def _step(node: ast.expr) -> tuple[Callable[..., Any], list[ast.expr]]:
    """The operation that a node stands for, and its operands; ValueError for anything but arithmetic."""
    match node:
        case ast.Constant(value) if is_number(value):
            return lambda: value, []
        case ast.BinOp(left, op, right) if type(op) in _OPERATORS:
            return _OPERATORS[type(op)], [left, right]
        case ast.UnaryOp(op, operand) if type(op) in _OPERATORS:
            return _OPERATORS[type(op)], [operand]
        case ast.Call(ast.Name(name), arguments, []) if name in _FUNCTIONS and arguments:
            return _FUNCTIONS[name], arguments
    raise ValueError(f"{ast.unparse(node)!r} is not allowed: use {ALLOWED}")


def _keys(node: ast.expr) -> list[str]:
    key = _dotted(node)
    return [key] if key else [key for operand in _step(node)[1] for key in _keys(operand)]


def _evaluate(node: ast.expr, values: Mapping[str, Any]) -> int | float:
    if key := _dotted(node):
        result = values[key]
        if not is_number(result):
            raise ValueError(f"{key} is {result!r:.80}, expected a number")
    else:
        operation, operands = _step(node)
        result = operation(*(_evaluate(operand, values) for operand in operands))
    # Whole numbers that grow without bound would take forever, so each step has to fit into a float.
    if isinstance(result, complex) or not abs(result) <= sys.float_info.max:
        raise OverflowError("expected a finite number at every step")
    return result
