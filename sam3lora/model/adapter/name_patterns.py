"""Regular expressions on module names, as adapter configurations have them, matched in linear time by RE2.

Python's `re` goes back and tries again: an expression such as ``(.*)*(a+)+b`` would hold the interpreter for hours. RE2
knows what people write, but neither look-around nor back references.
"""

from __future__ import annotations

import re

import re2

MAX_EXPRESSION_CHARS = 1000
_MAX_MEMORY = 8 << 20  # bytes of an expression, compiled; RE2 refuses what needs more
_PLAIN = re.compile(r"[A-Za-z0-9_.-]+")


class PatternError(ValueError):
    """A text is no such expression; the message says why."""


def is_plain_name(text: str) -> bool:
    """Whether the text is a module's name or the end of one, in which a dot is a dot."""
    return _PLAIN.fullmatch(text) is not None


class NamePattern:
    """An expression that whole names are compared with.

    Raises:
        PatternError: The expression uses something else, or is too long.

    >>> pattern = NamePattern(r".*decoder.*[.](q|v)_proj")
    >>> pattern.matches("detr_decoder.layers.0.q_proj"), pattern.matches("detr_decoder.layers.0.k_proj")
    (True, False)
    """

    def __init__(self, expression: str) -> None:
        if len(expression) > MAX_EXPRESSION_CHARS:
            raise PatternError(f"it has {len(expression)} characters, expected at most {MAX_EXPRESSION_CHARS}")
        options = re2.Options()
        options.max_mem = _MAX_MEMORY
        options.log_errors = False
        try:
            self._pattern = re2.compile(expression, options)
        except (re2.error, UnicodeEncodeError) as error:  # half surrogate pairs are no text
            reason = error.args[0] if isinstance(error, re2.error) else "it is no text"
            raise PatternError(reason.decode(errors="replace") if isinstance(reason, bytes) else str(reason)) from None

    def matches(self, name: str) -> bool:
        return self._pattern.fullmatch(name) is not None
