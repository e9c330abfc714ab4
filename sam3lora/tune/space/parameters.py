"""What a sweep varies: the kinds of parameters, how they are written and how they are drawn."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from sam3lora.tune.space.expressions import Expression

if TYPE_CHECKING:
    import numpy as np

LARGEST_WHOLE = 2**53  # a float has every whole number up to it
_LARGEST_END = 1e300  # of a range: the distance between two ends is a finite number
_DIGITS = 5  # significant digits of drawn numbers: more would only be hard to read


@dataclass(frozen=True)
class Parameter:
    """One line under ``parameters``.

    Attributes:
        key: Dotted key of the configuration, or ``components``.
        kind: choice, uniform, loguniform, randint, grid or tied.
        is_log: Whether its values are spread over orders of magnitude.
    """

    key: str
    kind: ClassVar[str]
    is_log: ClassVar[bool] = False

    @property
    def is_numeric(self) -> bool:
        """Whether every value is a number."""
        return True

    @property
    def count(self) -> int | None:
        """How many values it has; None without end."""
        return None

    def draw(self, rng: np.random.Generator) -> Any:
        """A random value."""
        raise NotImplementedError

    def has(self, value: Any) -> bool:
        """Whether a value is one of its own."""
        raise NotImplementedError

    def extremes(self) -> tuple[Any, ...]:
        """The values that a configuration must accept if it is to accept all: both ends, or every choice."""
        raise NotImplementedError

    def label(self, value: Any) -> str:
        """A short text for tables."""
        return value_text(value)

    def written(self) -> dict[str, Any]:
        """As it stands in a search space file: ``{kind: ...}``."""
        raise NotImplementedError

    def describe(self) -> str:
        """Its values in words."""
        raise NotImplementedError


@dataclass(frozen=True)
class Choice(Parameter):
    """One of some values of any type, drawn with equal chances; ``labels`` are None where none were given."""

    kind: ClassVar[str] = "choice"
    values: tuple[Any, ...]
    labels: tuple[str, ...] | None = None

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
        return self.values

    def label(self, value: Any) -> str:
        if self.labels is not None and value in self.values:
            return self.labels[self.values.index(value)]
        return value_text(value)

    def written(self) -> dict[str, Any]:
        values = list(self.values) if self.labels is None else dict(zip(self.labels, self.values))
        return {self.kind: values}

    def describe(self) -> str:
        return "; ".join(self.label(value) for value in self.values)


@dataclass(frozen=True)
class Grid(Choice):
    """Values that are all visited, equally often, whichever way the other parameters are searched."""

    kind: ClassVar[str] = "grid"


@dataclass(frozen=True)
class Range(Parameter):
    """Numbers between two ends."""

    low: float
    high: float

    def has(self, value: Any) -> bool:
        return is_number(value) and self.low <= value <= self.high

    def extremes(self) -> tuple[Any, ...]:
        return (self.low, self.high)

    def written(self) -> dict[str, Any]:
        return {self.kind: [self.low, self.high]}

    def describe(self) -> str:
        return f"{value_text(self.low)} to {value_text(self.high)}"

    def rounded(self, value: float) -> float:
        """With few digits, and still inside."""
        return min(max(float(f"{value:.{_DIGITS}g}"), self.low), self.high)


@dataclass(frozen=True)
class Uniform(Range):
    """Any number between the ends, each as likely."""

    kind: ClassVar[str] = "uniform"

    def draw(self, rng: np.random.Generator) -> float:
        return self.rounded(rng.uniform(self.low, self.high))


@dataclass(frozen=True)
class LogUniform(Range):
    """Any number between two positive ends, each order of magnitude as likely: for learning rates."""

    kind: ClassVar[str] = "loguniform"
    is_log: ClassVar[bool] = True

    def draw(self, rng: np.random.Generator) -> float:
        return self.rounded(math.exp(rng.uniform(math.log(self.low), math.log(self.high))))

    def describe(self) -> str:
        return f"{super().describe()}, logarithmic"


@dataclass(frozen=True)
class RandInt(Range):
    """Whole numbers from the lower to the upper end, both included."""

    kind: ClassVar[str] = "randint"
    low: int
    high: int

    @property
    def count(self) -> int:
        return self.high - self.low + 1

    def draw(self, rng: np.random.Generator) -> int:
        return int(rng.integers(self.low, self.high, endpoint=True))

    def describe(self) -> str:
        return f"{super().describe()}, whole numbers"


@dataclass(frozen=True)
class Tied(Parameter):
    """Follows from other parameters or keys of the base; never drawn."""

    kind: ClassVar[str] = "tied"
    expression: Expression

    def extremes(self) -> tuple[Any, ...]:
        return ()

    def written(self) -> dict[str, Any]:
        return {self.kind: self.expression.text}

    def describe(self) -> str:
        return f"= {self.expression.text}"


KINDS: tuple[str, ...] = ("choice", "uniform", "loguniform", "randint", "grid", "tied")
_EXAMPLE = "{choice: [4, 8, 16]}"


def parse_parameter(key: str, written: Any) -> Parameter:
    """Read what stands after ``key:`` under ``parameters``.

    Raises:
        ValueError: it is no parameter; says what to write.
    """
    if not isinstance(written, Mapping) or not written:
        raise ValueError(f"expected a kind such as {_EXAMPLE}, got {_got(written)}; a fixed value goes under set")
    if len(written) > 1:
        raise ValueError(f"expected one kind such as {_EXAMPLE}, got {short(', '.join(map(str, written)))}: keep one")
    kind, content = next(iter(written.items()))
    if kind not in KINDS:
        close = difflib.get_close_matches(str(kind), KINDS, n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        raise ValueError(f'"{kind}" is no kind of parameter; {hint}kinds are {", ".join(KINDS)}')
    if kind == "tied":
        if not isinstance(content, str | int | float) or isinstance(content, bool):
            raise ValueError(f"tied expects an expression such as 2 * lora.rank, got {_got(content)}")
        return Tied(key, Expression.parse(str(content)))
    if kind in ("choice", "grid"):
        return _parse_choice(key, kind, content)
    return _parse_range(key, kind, content)


def _parse_choice(key: str, kind: str, content: Any) -> Choice:
    if isinstance(content, Mapping):
        labels, values = tuple(map(str, content)), tuple(content.values())
    elif isinstance(content, list | tuple):
        labels, values = None, tuple(content)
    else:
        raise ValueError(f"{kind} expects a list of values or labels with values, got {_got(content)}")
    if not values:
        raise ValueError(f"{kind} is empty: list the values to try")
    if len(values) > 500:
        raise ValueError(f"{kind} has {len(values)} values, expected at most 500: leave some out")
    if labels and len(set(labels)) < len(labels):
        raise ValueError(f"{kind} has two labels that read the same: {short(', '.join(labels))}")
    for place, value in enumerate(values):
        if value in values[:place]:
            raise ValueError(f"{kind} holds {short(value_text(value))} twice: remove one")
    return (Grid if kind == "grid" else Choice)(key, values, labels)


def _parse_range(key: str, kind: str, content: Any) -> Range:
    is_pair = isinstance(content, list | tuple) and len(content) == 2
    largest = LARGEST_WHOLE if kind == "randint" else _LARGEST_END
    if not is_pair or not all(is_number(end) and abs(end) <= largest for end in content):
        raise ValueError(f"{kind} expects two numbers [low, high] of at most {largest:.0e}, got {_got(content)}")
    low, high = content
    if low >= high:
        raise ValueError(f"{kind} needs low < high, got [{value_text(low)}, {value_text(high)}]")
    if kind == "randint":
        if not isinstance(low, int) or not isinstance(high, int):
            raise ValueError(f"randint expects two whole numbers, got {_got(content)}; uniform draws any number")
        return RandInt(key, low, high)
    if kind == "loguniform" and low <= 0:
        raise ValueError(f"loguniform needs low > 0, got {value_text(low)}: raise it, or write uniform")
    return (LogUniform if kind == "loguniform" else Uniform)(key, float(low), float(high))


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def short(text: str) -> str:
    """A text for a message: on one line, cut where it is long."""
    line = " ".join(text.split())
    return line if len(line) <= 80 else f"{line[:80]}..."


def _got(value: Any) -> str:
    return short(repr(value))


def value_text(value: Any) -> str:
    """A value as a table shows it: 2e-4, true, none, q_proj, v_proj.

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
