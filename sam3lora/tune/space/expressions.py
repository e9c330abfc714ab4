"""Arithmetic that ties one parameter to others, such as ``2 * lora.rank``."""

from __future__ import annotations

import ast
import operator
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

_BINARY: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Pow: operator.pow,
}
_UNARY: dict[type[ast.unaryop], Callable[[Any], Any]] = {ast.USub: operator.neg, ast.UAdd: operator.pos}
_LONGEST = 200  # characters
_LARGEST_EXPONENT = _MOST_DIGITS = 64


def _round(value: Any, digits: Any = None) -> Any:
    if digits is not None and abs(digits) > _MOST_DIGITS:
        raise ValueError(f"round to {digits:g} digits is too much, expected at most {_MOST_DIGITS}")
    return round(value, digits)


_FUNCTIONS: dict[str, Callable[..., Any]] = {"min": min, "max": max, "round": _round, "int": int}

ALLOWED = f"numbers, dotted keys, + - * / // **, brackets and {', '.join(_FUNCTIONS)}"


@dataclass(frozen=True)
class Expression:
    """Parsed arithmetic over dotted keys.

    Attributes:
        text: As it was written.
        keys: The dotted keys in it, each once, in order.
    """

    text: str
    keys: tuple[str, ...] = field(default=())

    @classmethod
    def parse(cls, text: str) -> Expression:
        """Read an expression without evaluating it.

        Raises:
            ValueError: it is not an expression, is too long, or holds anything but `ALLOWED`.
        """
        if len(text) > _LONGEST:
            raise ValueError(f"an expression of {len(text)} characters is too long, expected at most {_LONGEST}")
        keys: dict[str, None] = {}
        _check(_tree(text), keys)
        return cls(text, tuple(keys))

    def evaluate(self, values: Mapping[str, Any]) -> int | float:
        """The value with these values of its keys.

        Raises:
            ValueError: a key's value is not a number, or the result of a step is not a finite number.
        """
        try:
            return _evaluate(_tree(self.text), values)
        except (ArithmeticError, TypeError) as error:
            raise ValueError(f"{self.text!r} cannot be computed: {error}") from None


def _tree(text: str) -> ast.expr:
    try:
        return ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError) as error:
        raise ValueError(f"{text!r} is not an expression such as 2 * lora.rank: {error}") from None


def _dotted(node: ast.expr) -> str | None:
    """``training.loss.mask`` for nested attributes of a name."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (front := _dotted(node.value)):
        return f"{front}.{node.attr}"
    return None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _check(node: ast.expr, keys: dict[str, None]) -> None:
    if isinstance(node, ast.Constant) and _is_number(node.value):
        return
    if (key := _dotted(node)) is not None:
        keys[key] = None
    elif isinstance(node, ast.BinOp) and type(node.op) in _BINARY:
        _check(node.left, keys)
        _check(node.right, keys)
    elif isinstance(node, ast.UnaryOp) and type(node.op) in _UNARY:
        _check(node.operand, keys)
    elif (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id in _FUNCTIONS
        and node.args
        and not node.keywords
    ):
        for argument in node.args:
            _check(argument, keys)
    else:
        raise ValueError(f"{ast.unparse(node)!r} is not allowed: use {ALLOWED}")


def _evaluate(node: ast.expr, values: Mapping[str, Any]) -> int | float:
    """The value of a node, in the range of a float: whole numbers that grow without bound would take forever."""
    result = _compute(node, values)
    if isinstance(result, complex) or not abs(result) <= sys.float_info.max:
        raise OverflowError("expected a finite number at every step")
    return result


def _compute(node: ast.expr, values: Mapping[str, Any]) -> Any:
    if isinstance(node, ast.Constant):
        return node.value
    if (key := _dotted(node)) is not None:
        value = values[key]
        if not _is_number(value):
            raise ValueError(f"{key} is {value!r:.80}, expected a number")
        return value
    if isinstance(node, ast.BinOp):
        left, right = _evaluate(node.left, values), _evaluate(node.right, values)
        if isinstance(node.op, ast.Pow) and abs(right) > _LARGEST_EXPONENT:
            raise ValueError(f"the exponent {right:g} is too large, expected at most {_LARGEST_EXPONENT}")
        return _BINARY[type(node.op)](left, right)
    if isinstance(node, ast.UnaryOp):
        return _UNARY[type(node.op)](_evaluate(node.operand, values))
    assert isinstance(node, ast.Call)
    assert isinstance(node.func, ast.Name)
    return _FUNCTIONS[node.func.id](*(_evaluate(argument, values) for argument in node.args))
