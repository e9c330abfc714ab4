"""Reading and writing YAML 1.2: 1e-4 is a number, a bare `no` is a word, and a duplicate key is an error."""

from __future__ import annotations

import re
from typing import Any

import yaml

from ..errors import UserError

_FLOAT = re.compile(r"^[-+]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)([eE][-+]?\d+)?$|^[-+]?\.(inf|Inf|INF)$|^\.(nan|NaN|NAN)$")
_BOOL = re.compile(r"^(true|True|TRUE|false|False|FALSE)$")

_SHOWN = 200


class _Loader(yaml.SafeLoader):
    """SafeLoader with the numbers and booleans of YAML 1.2."""


class _Dumper(yaml.SafeDumper):
    """SafeDumper that quotes every text that YAML 1.1 or 1.2 would not read as a text."""


def _without_bools(resolvers: dict[str, list[tuple[str, Any]]]) -> dict[str, list[tuple[str, Any]]]:
    return {
        first: [rule for rule in rules if rule[0] != "tag:yaml.org,2002:bool"] for first, rules in resolvers.items()
    }


_Loader.yaml_implicit_resolvers = _without_bools(yaml.SafeLoader.yaml_implicit_resolvers)
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", _BOOL, list("tTfF"))
# Integers come first in the list of rules, so "10" stays one.
for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))


def _unique_mapping(loader: _Loader, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node, deep=deep)  # type: ignore[no-untyped-call]
        if not isinstance(key, list | dict) and key in seen:
            raise yaml.constructor.ConstructorError(
                None, None, f'the key "{key}" is written twice: keep one', key_node.start_mark
            )
        if not isinstance(key, list | dict):
            seen.add(key)
    return yaml.SafeLoader.construct_mapping(loader, node, deep=deep)


def _construct_map(loader: _Loader, node: yaml.MappingNode) -> Any:
    data: dict[Any, Any] = {}
    yield data
    data.update(_unique_mapping(loader, node))


_Loader.add_constructor("tag:yaml.org,2002:map", _construct_map)


def parse_yaml(text: str, where: str) -> Any:
    """Read one YAML document; `where` names it in error messages.

    Raises:
        UserError: The text is not YAML, or a mapping has a key twice; names line and column.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark is not None else ""
        raise UserError(f"{where}{place}: not valid YAML: {error.problem}") from None
    except (yaml.YAMLError, ValueError) as error:  # a date that does not exist, a number of thousands of digits
        raise UserError(f"{where}: not valid YAML: {str(error)[:_SHOWN]}") from None
    except (LookupError, AttributeError, TypeError, RecursionError):
        raise UserError(f"{where}: not valid YAML: a !!tag does not suit its value, or it is nested too deep") from None


def dump_yaml(value: Any) -> str:
    """Plain data as YAML text, keys in the given order; `parse_yaml` restores the data."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)
