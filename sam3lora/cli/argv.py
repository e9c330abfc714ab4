"""Arguments as people type them, brought into the form that the parser reads."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from sam3lora.local_paths import refuse_bad_path

_DEVICE = re.compile(r"^(\d+(,\d+)*|cpu)$")
_ANY = re.compile(r"^(?!-)")
_NUMBER = re.compile(r"^(?!--)")
_SHARE = re.compile(r"^\d*\.?\d+$")
LIST_OPTIONS = {
    "--device": _DEVICE,
    "--prompt": _ANY,
    "--weights": _ANY,
    "--saco": _ANY,
    "--box": _NUMBER,
    "--negative-box": _NUMBER,
    "--click": _NUMBER,
    "--names": _ANY,
    "--fractions": _SHARE,
}
"""Option that takes several words -> what such a word looks like."""

SWITCHES = {"--boundingbox": "--no-boundingbox"}
"""Option that may be followed by True or False -> its opposite."""

TAKE_ADDRESSES = ("--address", "--prompt", "--names")
"""Options whose value may look like an address."""


def refuse_bad_paths(argv: Sequence[str]) -> None:
    """Refuse `--output s3://...` and its like, of every option and argument: all others that take one name files.

    Keys of a configuration (`a.b=s3://...`) are for `load_config` to refuse.

    Raises:
        UserError: An address, or the home of an unknown user, where a path is expected.
    """
    option = "the argument"
    for word in argv:
        value = word
        if word.startswith("--"):
            option, _, value = word.partition("=")
            option = option.replace("_", "-")
        if option not in TAKE_ADDRESSES:
            refuse_bad_path(value, option)


def normalize_argv(argv: Sequence[str], list_options: Mapping[str, re.Pattern[str]] = LIST_OPTIONS) -> list[str]:
    """Arguments with dashes in option names, and a list option repeated before each of its words.

    Nothing after a bare `--` is changed.

    >>> normalize_argv(["validate", "--val_data_dir=my_data", "--device", "0", "1", "lora.rank=8"])
    ['validate', '--val-data-dir=my_data', '--device', '0', '--device', '1', 'lora.rank=8']
    """
    words = list(argv)
    out: list[str] = []
    position = 0
    while position < len(words):
        word = words[position]
        position += 1
        if word == "--":
            return [*out, word, *words[position:]]
        if not word.startswith("--"):
            out.append(word)
            continue
        name, equals, value = word.partition("=")
        name = name.replace("_", "-")
        if name in SWITCHES and value.lower() in ("", "true", "false"):
            if not equals and position < len(words) and words[position].lower() in ("true", "false"):
                value = words[position]
                position += 1
            out.append(SWITCHES[name] if value.lower() == "false" else name)
            continue
        if name not in list_options or equals:
            out.append(name + equals + value)
            continue
        start = position
        while position < len(words) and list_options[name].match(words[position]):
            out += [name, words[position]]
            position += 1
        if position == start:
            out.append(name)
    return out
