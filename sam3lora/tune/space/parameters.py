"""The kinds of parameters that a sweep varies: how they are written, and how values are drawn."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from sam3lora.tune.space.expressions import Expression, is_number

if TYPE_CHECKING:
    import numpy as np

KINDS = ("choice", "uniform", "loguniform", "randint", "grid", "tied")
LARGEST_WHOLE = 2**53  # a float can hold every whole number up to it
LARGEST_NUMBER = 1e300  # the distance between two such ends of a range is finite
_MOST_VALUES = 500
_DIGITS = 5  # significant digits of drawn numbers
_EXAMPLE = "{choice: [4, 8, 16]}"


@dataclass(frozen=True)
class Choice:
    """One of some values of any type.

    Attributes:
        key: Dotted key of the configuration, or `components`.
        kind: "choice", drawn with equal chances; or "grid", all visited equally often, whichever way the other
            parameters are searched.
        labels: Names of the values in tables.
    """

    key: str
    kind: str
    values: tuple[Any, ...]
    labels: tuple[str, ...] | None = None
    is_log: ClassVar[bool] = False

    @property
    def is_numeric(self) -> bool:
        return all(is_number(value) for value in self.values)

    @property
    def count(self) -> int:
        return len(self.values)

    def has(self, value: Any) -> bool:
        return value in self.values

    def draw(self, rng: np.random.Generator) -> Any:
        return self.values[int(rng.integers(len(self.values)))]

    def extremes(self) -> tuple[Any, ...]:
        """The values that must be valid if all are to be: here every one."""
        return self.values

    def label(self, value: Any) -> str:
        if self.labels is not None and value in self.values:
            return self.labels[self.values.index(value)]
        return value_text(value)

    def written(self) -> dict[str, Any]:
        """As in a search space file."""
        return {self.kind: list(self.values) if self.labels is None else dict(zip(self.labels, self.values))}

    def describe(self) -> str:
        return "; ".join(self.label(value) for value in self.values)


@dataclass(frozen=True)
class Range:
    """A number between two ends, both included.

    The kind "uniform" is any number, "loguniform" the same with each order of magnitude equally likely, "randint" a
    whole number.
    """

    key: str
    kind: str
    low: float
    high: float
    is_numeric: ClassVar[bool] = True

    @property
    def is_log(self) -> bool:
        return self.kind == "loguniform"

    @property
    def count(self) -> int | None:
        """How many values there are; None for any number of them."""
        return int(self.high - self.low) + 1 if self.kind == "randint" else None

    def has(self, value: Any) -> bool:
        return is_number(value) and self.low <= value <= self.high

    def draw(self, rng: np.random.Generator) -> float:
        if self.kind == "randint":
            return int(rng.integers(int(self.low), int(self.high), endpoint=True))
        if self.is_log:
            return self.rounded(math.exp(rng.uniform(math.log(self.low), math.log(self.high))))
        return self.rounded(rng.uniform(self.low, self.high))

    def rounded(self, value: float) -> float:
        """With few digits, and still between the ends."""
        return min(max(float(f"{value:.{_DIGITS}g}"), self.low), self.high)

    def extremes(self) -> tuple[Any, ...]:
        return (self.low, self.high)

    def label(self, value: Any) -> str:
        return value_text(value)

    def written(self) -> dict[str, Any]:
        return {self.kind: [self.low, self.high]}

    def describe(self) -> str:
        note = {"loguniform": ", logarithmic", "randint": ", whole numbers"}.get(self.kind, "")
        return f"{value_text(self.low)} to {value_text(self.high)}{note}"


@dataclass(frozen=True)
class Tied:
    """Computed from other parameters or keys of the base; never drawn."""

    key: str
    expression: Expression
    kind: ClassVar[str] = "tied"

    def label(self, value: Any) -> str:
        return value_text(value)

    def written(self) -> dict[str, Any]:
        return {self.kind: self.expression.text}

    def describe(self) -> str:
        return f"= {self.expression.text}"


FreeParameter = Choice | Range
Parameter = Choice | Range | Tied


def parse_parameter(key: str, written: Any) -> Parameter:
    """Read what stands after `key:` under `parameters`.

    Raises:
        ValueError: It is not a parameter; the message says what to write.
    """
    if not isinstance(written, Mapping) or not written:
        raise ValueError(f"expected a kind such as {_EXAMPLE}, got {_got(written)}; a fixed value goes under set")
    if len(written) > 1:
        raise ValueError(f"expected one kind such as {_EXAMPLE}, got {short(', '.join(map(str, written)))}: keep one")
    kind, content = next(iter(written.items()))
    if kind not in KINDS:
        close = difflib.get_close_matches(str(kind), KINDS, n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        raise ValueError(f'"{kind}" is not a kind of parameter; {hint}kinds are {", ".join(KINDS)}')
    if kind == "tied":
        if not isinstance(content, str) and not is_number(content):
            raise ValueError(f"tied expects an expression such as 2 * lora.rank, got {_got(content)}")
        return Tied(key, Expression.parse(str(content)))
    return _parse_choice(key, kind, content) if kind in ("choice", "grid") else _parse_range(key, kind, content)


def _parse_choice(key: str, kind: str, content: Any) -> Choice:
    if isinstance(content, Mapping):
        labels, values = tuple(map(str, content)), tuple(content.values())
    elif isinstance(content, list | tuple):
        labels, values = None, tuple(content)
    else:
        raise ValueError(f"{kind} expects a list of values or labels with values, got {_got(content)}")
    if not values:
        raise ValueError(f"{kind} is empty: list the values to try")
    if len(values) > _MOST_VALUES:
        raise ValueError(f"{kind} has {len(values)} values, expected at most {_MOST_VALUES}: leave some out")
    if labels and len(set(labels)) < len(labels):
        raise ValueError(f"{kind} has the same label twice: {short(', '.join(labels))}")
    for place, value in enumerate(values):
        if value in values[:place]:
            raise ValueError(f"{kind} holds {short(value_text(value))} twice: remove one")
    return Choice(key, kind, values, labels)


def _parse_range(key: str, kind: str, content: Any) -> Range:
    is_pair = isinstance(content, list | tuple) and len(content) == 2
    largest = LARGEST_WHOLE if kind == "randint" else LARGEST_NUMBER
    if not is_pair or not all(is_number(end) and abs(end) <= largest for end in content):
        raise ValueError(f"{kind} expects two numbers [low, high] of at most {largest:.0e}, got {_got(content)}")
    low, high = content
    if low >= high:
        raise ValueError(f"{kind} needs low < high, got [{value_text(low)}, {value_text(high)}]")
    if kind == "randint":
        if not isinstance(low, int) or not isinstance(high, int):
            raise ValueError(f"randint expects two whole numbers, got {_got(content)}; uniform draws any number")
        return Range(key, kind, low, high)
    if kind == "loguniform" and low <= 0:
        raise ValueError(f"loguniform needs low > 0, got {value_text(low)}: raise it, or write uniform")
    return Range(key, kind, float(low), float(high))


def short(text: str) -> str:
    """A text for a message: on one line, cut after 80 characters."""
    line = " ".join(text.split())
    return line if len(line) <= 80 else f"{line[:80]}..."


def _got(value: Any) -> str:
    return short(repr(value))


def value_text(value: Any) -> str:
    """A value as a table shows it.

    >>> [value_text(value) for value in (0.0002, 16.0, 0.05, None, True, ["q_proj", "v_proj"])]
    ['2e-4', '16', '0.05', 'none', 'true', 'q_proj, v_proj']
    """
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return _float_text(value)
    if isinstance(value, Mapping):
        return ", ".join(f"{name}: {value_text(item)}" for name, item in value.items())
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(map(value_text, value))
    return str(value)


def _float_text(value: float) -> str:
    if value == 0 or 1e-3 <= abs(value) < 1e6:
        return f"{value:.4g}" if abs(value) < 1e4 else f"{value:.0f}"
    mantissa, _, exponent = f"{value:.2e}".partition("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
