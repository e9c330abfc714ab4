"""Ids of images and categories as files write them: whole numbers of any size, or text."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

IdKey = int | str

_DECIMAL = re.compile(r"-?(0|[1-9][0-9]*)")
_MAX_INT64 = 2**63 - 1
_MAX_DIGITS = 100


def id_key(value: Any) -> IdKey | None:
    """What an id is compared by: 1, 1.0 and "1" are one id, "001" and "a1" are texts; None for what is no id.

    >>> [id_key(value) for value in (7, 7.0, " 7 ", "007", True, 7.5, [7])]
    [7, 7, 7, '007', None, None, None]
    """
    if isinstance(value, bool):
        return None
    if isinstance(value, int):
        return value
    if isinstance(value, float):
        return int(value) if value.is_integer() else None
    if isinstance(value, str) and value.strip():
        text = value.strip()
        return int(text) if len(text) < 20 and _DECIMAL.fullmatch(text) else text
    return None


class IdTable:
    """A whole number that fits 64 bits for each listed id, the id itself where it is one.

    A reference is read like the list: as the same id or, where only one listed id can be meant, as the same number with
    other leading zeros ("001" for 1).
    """

    def __init__(self, listed: Iterable[Any] = ()) -> None:
        keys = [key for key in map(id_key, listed) if key is not None]
        self._taken = {key for key in keys if isinstance(key, int) and abs(key) <= _MAX_INT64}
        self._next = max(self._taken, default=0) + 1
        self._numbers: dict[IdKey, int] = {}
        self._by_value: dict[int, IdKey | None] = {}  # value -> the text id with it, None if there are several
        self.written: dict[int, Any] = {}
        """Number -> the id as the file writes it, where that is not the number."""

    def __len__(self) -> int:
        return len(self._numbers)

    def add(self, listed: Any) -> int | None:
        """The number of a listed id; None if it is no id, or was added before."""
        key = id_key(listed)
        if key is None or key in self._numbers:
            return None
        number = key if isinstance(key, int) and key in self._taken else self._free_number(key)
        self._keep(key, number)
        if type(listed) is not int or listed != number:
            self.written[number] = listed
        return number

    def alias(self, number: int, other: int) -> None:
        """From now on the id of `number` means `other`."""
        key = id_key(self.written.get(number, number))
        assert key is not None
        self._numbers[key] = other

    def _keep(self, key: IdKey, number: int) -> None:
        self._numbers[key] = number
        if (value := _value(key)) is not None:
            self._by_value[value] = None if value in self._by_value else key

    def shared_numbers(self) -> set[int]:
        """Numbers that several listed ids have."""
        return {number for number, count in Counter(self._numbers.values()).items() if count > 1}

    def to_json(self) -> dict[str, list[Any]]:
        plain = [key for key, number in self._numbers.items() if key == number]
        other = [[key, number] for key, number in self._numbers.items() if key != number]
        return {"plain": plain, "other": other, "written": list(map(list, self.written.items()))}

    @classmethod
    def from_json(cls, values: Mapping[str, list[Any]]) -> IdTable:
        table = cls()
        for key, number in [*((key, key) for key in values["plain"]), *values["other"]]:
            table._keep(key, number)
        table.written = dict(values["written"])
        return table

    def find(self, reference: Any) -> int | None:
        """The number of the id that is referred to; None if none was added, or several could be meant."""
        key = id_key(reference)
        if key is None:
            return None
        if key in self._numbers:
            return self._numbers[key]
        if isinstance(key, int):
            other = self._by_value.get(key)
            return None if other is None else self._numbers[other]
        value = _value(key)
        return None if value is None else self._numbers.get(value)

    def _free_number(self, key: IdKey) -> int:
        """A number that no other id has; for a text of digits its value, if that is free."""
        value = _value(key)
        if value is None or value in self._taken or value > _MAX_INT64:
            while self._next in self._taken or self._next > _MAX_INT64:
                self._next = 1 if self._next > _MAX_INT64 else self._next + 1
            value = self._next
        self._taken.add(value)
        return value


def _value(key: IdKey) -> int | None:
    """The number that a text of digits stands for; None for other keys."""
    return int(key) if isinstance(key, str) and len(key) <= _MAX_DIGITS and key.isascii() and key.isdecimal() else None
