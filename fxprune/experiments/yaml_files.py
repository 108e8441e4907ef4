"""Reads and writes YAML as people mean it: 2:4 is a pattern and not 124, 1e-3 is a number, a key stands only once."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from fxprune.errors import OptionsError


class _Loader(yaml.SafeLoader):
    """YAML 1.2's scalars instead of 1.1's, where 2:4 is a base-60 number and `no` is false."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        twice = sorted({key for key in keys if keys.count(key) > 1})
        if twice:
            raise yaml.constructor.ConstructorError(None, None, f"key {twice[0]!r} stands twice", node.start_mark)
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?(0|[1-9][0-9]*)", "-+0123456789"),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+\.[0-9]*|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?|[-+]?\.inf|\.nan", "-+.0123456789"),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), list(_first))


class _Dumper(yaml.SafeDumper):
    """Leaves 2:4 without quotes where `_Loader` reads it back as it is, and writes short lists in one line."""


_Dumper.yaml_implicit_resolvers = _Loader.yaml_implicit_resolvers
_Dumper.add_representer(
    list, lambda dumper, value: dumper.represent_sequence("tag:yaml.org,2002:seq", value, flow_style=True)
)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read a YAML file that holds a mapping; keys may be written with - or _.

    Raises:
        OptionsError: the file is absent, unreadable, no YAML, holds no mapping, or a key stands twice.
    """
    path = Path(path)
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except (OSError, UnicodeDecodeError) as error:
        raise OptionsError(f"cannot read {path}: {error}") from error
    except yaml.YAMLError as error:
        raise OptionsError(f"{path} is no valid YAML: {' '.join(str(error).split())}") from error
    if content is None:
        return {}
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise OptionsError(f"{path} must hold a mapping such as 'epochs: 10', not {type(content).__name__}")
    return {key.replace("-", "_"): value for key, value in content.items()}


def parse_scalar(text: str) -> Any:
    """Read one value as a YAML file has it: 3, 1e-3, true, 2:4, [1, 2]; what is no YAML stays text."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError:
        return text


def to_yaml(values: Mapping[str, Any]) -> str:
    """Write a mapping as YAML that `read_yaml` reads back."""
    text: str = yaml.dump(dict(values), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)
    return text


def check_keys(keys: Iterable[str], known: Iterable[str], where: str) -> None:
    """Raise for the keys that are not known, with the closest ones.

    Raises:
        OptionsError: there is an unknown key.
    """
    known = sorted(known)
    for key in keys:
        if key not in known:
            close = difflib.get_close_matches(key, known, n=3, cutoff=0.5)
            hint = f"did you mean {' or '.join(close)}?" if close else f"known: {', '.join(known)}"
            raise OptionsError(f"{where}: unknown key {key!r}; {hint}")
