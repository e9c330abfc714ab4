"""Regular expressions on module names, as adapter configurations have them, matched in linear time.

Python's `re` goes back and tries again: an expression such as ``(.*)*(a+)+b`` would hold the interpreter for hours.
Here an expression is an automaton that follows all its branches at once: a name takes one step a character, a step
visits each place of the expression at most once, and names with a common beginning share its steps.

    literal    letters, digits, ``_`` and ``-``; any other ASCII mark behind a backslash
    any of     ``.``  ``[a-z_]``  ``[^.]``  ``\\d``  ``\\w``
    repeated   ``*``  ``+``  ``?``, also lazy
    joined     ``a|b``  ``(a)``  ``(?:a)``
    at an end  ``^``  ``$``
"""

from __future__ import annotations

import re
import string
from typing import NamedTuple

MAX_EXPRESSION_CHARS = 1000
_MAX_DEPTH = 30
_PLAIN = re.compile(r"[A-Za-z0-9_.-]+")
_DIGITS = frozenset(string.digits)
_WORD = frozenset(string.ascii_letters + string.digits + "_")


class PatternError(ValueError):
    """A text is no expression of the kind above; the message says where."""


def is_plain_name(text: str) -> bool:
    """Whether the text is a module's name or the end of one, in which a dot is a dot."""
    return _PLAIN.fullmatch(text) is not None


class NamePattern:
    """An expression that whole names are compared with.

    Raises:
        PatternError: The expression uses something else, or is too long or too deep.

    >>> pattern = NamePattern(r".*decoder.*[.](q|v)_proj")
    >>> pattern.matches("detr_decoder.layers.0.q_proj"), pattern.matches("detr_decoder.layers.0.k_proj")
    (True, False)
    """

    def __init__(self, expression: str) -> None:
        self._nodes: list[_Node] = [_Node("accept")]
        start = self._add(_Parser(expression).parse(), 0)
        self._start = self._reach([start], at="begin")
        self._steps: dict[tuple[frozenset[int], str], frozenset[int]] = {}

    def matches(self, name: str) -> bool:
        places = self._start
        for char in name:
            known = self._steps.get((places, char))
            if known is None:
                following = [node.next[0] for node in map(self._nodes.__getitem__, places) if node.accepts(char)]
                known = self._steps[places, char] = self._reach(following)
            if not known:
                return False
            places = known
        return 0 in self._reach(places, at="both" if not name else "end")

    def _add(self, tree: _Tree, then: int) -> int:
        """Add the nodes of an expression that continues at node `then`; return the first."""
        if tree.kind == "joined":
            for part in reversed(tree.parts):
                then = self._add(part, then)
            return then
        number = len(self._nodes)
        self._nodes.append(_Node("split"))
        if tree.kind == "either":
            ways = tuple(self._add(part, then) for part in tree.parts)
            self._nodes[number] = _Node("split", ways)
        elif tree.kind in ("*", "+", "?"):
            body = self._add(tree.parts[0], then if tree.kind == "?" else number)
            self._nodes[number] = _Node("split", (body, then))
            return body if tree.kind == "+" else number
        else:
            self._nodes[number] = _Node(tree.kind, (then,), tree.chars, tree.negated)
        return number

    def _reach(self, numbers: list[int] | frozenset[int], at: str = "") -> frozenset[int]:
        """The nodes that wait for a character or the end, reached without reading a character."""
        passed = {"begin": {"^"}, "end": {"$"}, "both": {"^", "$"}}.get(at, set())
        todo, seen = list(numbers), set(numbers)
        while todo:
            node = self._nodes[todo.pop()]
            if node.kind == "split" or node.kind in passed:
                todo += (new := set(node.next) - seen)
                seen |= new
        return frozenset(number for number in seen if self._nodes[number].kind in ("char", "$", "accept"))


class _Node(NamedTuple):
    kind: str  # "char", "split", "^", "$" or "accept"
    next: tuple[int, ...] = ()
    chars: frozenset[str] = frozenset()
    negated: bool = False

    def accepts(self, char: str) -> bool:
        return self.kind == "char" and (char in self.chars) != self.negated


class _Tree(NamedTuple):
    kind: str  # "char", "joined", "either", "*", "+", "?", "^" or "$"
    parts: tuple[_Tree, ...] = ()
    chars: frozenset[str] = frozenset()
    negated: bool = False


class _Parser:
    """Recursive descent over the expression's text."""

    def __init__(self, text: str) -> None:
        if len(text) > MAX_EXPRESSION_CHARS:
            raise PatternError(f"it has {len(text)} characters, expected at most {MAX_EXPRESSION_CHARS}")
        self._text = text
        self._at = 0

    def parse(self) -> _Tree:
        tree = self._either(0)
        if self._at < len(self._text):
            raise self._unexpected()
        return tree

    def _either(self, depth: int) -> _Tree:
        if depth > _MAX_DEPTH:
            raise PatternError(f"its brackets are more than {_MAX_DEPTH} deep")
        parts = [self._joined(depth)]
        while self._take("|"):
            parts.append(self._joined(depth))
        return parts[0] if len(parts) == 1 else _Tree("either", tuple(parts))

    def _joined(self, depth: int) -> _Tree:
        parts = []
        while self._at < len(self._text) and self._text[self._at] not in "|)":
            part = self._one(depth)
            if part.kind not in "^$" and (mark := self._take("*") or self._take("+") or self._take("?")):
                part = _Tree(mark, (part,))
                self._take("?")  # lazy: the same names match
            parts.append(part)
        return _Tree("joined", tuple(parts))

    def _one(self, depth: int) -> _Tree:
        if self._take("("):
            self._take("?:")
            tree = self._either(depth + 1)
            if not self._take(")"):
                raise self._unexpected()
            return tree
        if mark := self._take("^") or self._take("$"):
            return _Tree(mark)
        if self._take("."):
            return _Tree("char", chars=frozenset("\n"), negated=True)
        if self._take("["):
            return self._class()
        return _Tree("char", chars=self._char("*+?{}]"))

    def _class(self) -> _Tree:
        negated = bool(self._take("^"))
        chars: frozenset[str] = frozenset()
        while not chars or not self._take("]"):
            first = self._char("[]" if not chars else "[")
            if self._text[self._at : self._at + 1] == "-" and self._text[self._at + 1 : self._at + 2] != "]":
                self._at += 1
                last = self._char("[")
                if len(first) != 1 or len(last) != 1 or min(first) > min(last):
                    raise self._unexpected()
                first = frozenset(map(chr, range(ord(min(first)), ord(min(last)) + 1)))
            chars |= first
        return _Tree("char", chars=chars, negated=negated)

    def _char(self, special: str) -> frozenset[str]:
        """The characters that the next one, or an escape, stands for."""
        char = self._text[self._at : self._at + 1]
        if not char or char in special or not char.isascii() or not char.isprintable():
            raise self._unexpected()
        self._at += 1
        if char != "\\":
            return frozenset(char)
        escaped = self._text[self._at : self._at + 1]
        if escaped in string.punctuation and escaped:
            self._at += 1
            return frozenset(escaped)
        if not escaped or escaped not in "dw":
            raise self._unexpected()
        self._at += 1
        return _DIGITS if escaped == "d" else _WORD

    def _take(self, mark: str) -> str:
        if self._text.startswith(mark, self._at):
            self._at += len(mark)
            return mark
        return ""

    def _unexpected(self) -> PatternError:
        found = ascii(self._text[self._at : self._at + 1]) if self._at < len(self._text) else "the end"
        return PatternError(f"did not expect {found} at position {self._at}")
