"""Strict YAML: plain data with the place of every key and value, and nothing that could surprise.

Scalars follow the core schema of YAML 1.2 (section 10.3.2), not PyYAML's YAML 1.1: `1e-3` is a number, `no` and `on`
are words, `010` and `12:30` are words and not 8 and 750. Anchors, aliases, tags, duplicate keys, several documents,
more than 1 MiB and more than 32 levels are refused: a configuration needs none of them, and an alias bomb of seven
lines can fill a machine's memory.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, NoReturn

import yaml

from experiments.errors import ConfigError

MAX_BYTES = 1 << 20
MAX_DEPTH = 32

Path = tuple[str | int, ...]
Mark = tuple[int, int]

_CORE_SCALARS = (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("int", r"[-+]?(?:0|[1-9][0-9]*)", "-+0123456789"),
    ("float", r"[-+]?(?:\.[0-9]+|(?:0|[1-9][0-9]*)(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?", "-+.0123456789"),
    ("float", r"[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)", "-+."),
)
_TAG = "tag:yaml.org,2002:"
_WORDS = {"int": "a whole number", "float": "a number", "bool": "true or false", "null": "null"}


@dataclass(frozen=True)
class Document:
    """A YAML mapping as plain data.

    Attributes:
        data: dicts, lists and scalars.
        keys: path -> (line, column) of a mapping's key, counted from 1.
        values: path -> (line, column) of a value.
        problems: what is wrong without making the rest unreadable, duplicate keys: ((line, column), text).
    """

    data: dict[str, Any]
    keys: dict[Path, Mark]
    values: dict[Path, Mark]
    problems: tuple[tuple[Mark, str], ...] = ()


def _core_resolvers() -> dict[str, list[tuple[str, re.Pattern[str]]]]:
    table: dict[str, list[tuple[str, re.Pattern[str]]]] = {}
    for tag, pattern, first in _CORE_SCALARS:
        for letter in first:
            table.setdefault(letter, []).append((_TAG + tag, re.compile(rf"^(?:{pattern})$")))
    return table


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers = _core_resolvers()


class _Dumper(yaml.SafeDumper):
    yaml_implicit_resolvers = _core_resolvers()


def dump(data: dict[str, Any]) -> str:
    """The mapping as YAML that `load_text` reads back to the same data."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100, default_flow_style=None)


def load_text(text: str, name: str) -> Document:
    """A YAML mapping as plain data with the places of its keys and values.

    Args:
        text: the YAML document.
        name: how messages call it: the file as the user named it.

    Raises:
        ConfigError: not YAML, or more of YAML than a configuration needs; names `name:line:column`.
    """
    data, builder = _load(text, name)
    if not isinstance(data, dict):
        line, column = builder.values.get((), (1, 1))
        raise ConfigError(f"{name}:{line}:{column}: expected settings as 'key: value', found {describe(data)}")
    return Document(data, builder.keys, builder.values, tuple(builder.problems))


def load_value(text: str, name: str) -> Any:
    """One YAML value, as `load_text` would read it after a key; an empty text is null."""
    if not text.strip():
        return None
    value, builder = _load(text, name)
    for (line, column), problem in builder.problems:
        raise ConfigError(f"{name}:{line}:{column}: {problem}")
    return value


def describe(value: Any) -> str:
    """A value as a message shows it: short, with its type where the text alone doesn't tell."""
    if value is None:
        return "nothing"
    if isinstance(value, dict):
        return "a section"
    if isinstance(value, list):
        return "a list"
    if isinstance(value, bool):
        return str(value).lower()
    text = repr(value) if isinstance(value, str) else str(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _load(text: str, name: str) -> tuple[Any, _Builder]:
    try:
        size = len(text.encode())
    except UnicodeEncodeError as error:
        raise ConfigError(f"{name}: not text (lone surrogate at character {error.start})") from None
    if size > MAX_BYTES:
        raise ConfigError(f"{name}: larger than 1 MiB", found=f"{size} bytes")
    try:
        _refuse_extras(text, name)
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        _fail(name, error.problem_mark or error.context_mark, error.problem or "not YAML")
    except yaml.YAMLError as error:  # a character that YAML forbids
        at = getattr(error, "position", 0)
        line, column = text.count("\n", 0, at) + 1, at - text.rfind("\n", 0, at)
        raise ConfigError(f"{name}:{line}:{column}: not YAML: {getattr(error, 'reason', error)}") from None
    if node is None:
        raise ConfigError(f"{name}:1:1: empty document")
    builder = _Builder(name)
    return builder.build(node, ()), builder


def _fail(name: str, mark: Any, text: str) -> NoReturn:
    line, column = (mark.line + 1, mark.column + 1) if mark else (1, 1)
    raise ConfigError(f"{name}:{line}:{column}: {text}") from None


def _refuse_extras(text: str, name: str) -> None:
    """Look at the events first: depth and aliases are refused before anything is built."""
    depth = 0
    for event in yaml.parse(text, Loader=_Loader):
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            _fail(name, event.start_mark, "anchors and aliases are not supported; write the value out")
        if tag := getattr(event, "tag", None):
            _fail(name, event.start_mark, f"tag '{tag}' is not supported; write the plain value")
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
            if depth > MAX_DEPTH:
                _fail(name, event.start_mark, f"nested deeper than {MAX_DEPTH} levels")
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1


class _Builder:
    """Turns nodes into plain data and notes the places."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.keys: dict[Path, Mark] = {}
        self.values: dict[Path, Mark] = {}
        self.problems: list[tuple[Mark, str]] = []
        self._scalars = _Loader("")

    def build(self, node: yaml.Node, path: Path) -> Any:
        self.values[path] = (node.start_mark.line + 1, node.start_mark.column + 1)
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, path)
        if isinstance(node, yaml.SequenceNode):
            return [self.build(child, (*path, i)) for i, child in enumerate(node.value)]
        assert isinstance(node, yaml.ScalarNode)
        return self._scalar(node)

    def _mapping(self, node: yaml.MappingNode, path: Path) -> dict[str, Any]:
        out: dict[str, Any] = {}
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                _fail(self.name, key.start_mark, "a key has to be a plain word")
            at = (*path, key.value)
            mark = (key.start_mark.line + 1, key.start_mark.column + 1)
            if key.value in out:
                text = f"{dotted(at)}: duplicate key (first on line {self.keys[at][0]}); remove one"
                self.problems.append((mark, text))
                continue
            self.keys[at] = mark
            out[key.value] = self.build(value, at)
        return out

    def _scalar(self, node: yaml.ScalarNode) -> Any:
        kind = node.tag.removeprefix(_TAG)
        if kind not in ("str", *_WORDS):
            _fail(self.name, node.start_mark, f"'{node.value[:40]}' is not supported here")
        try:
            return self._plain(node, kind)
        except (ValueError, yaml.YAMLError):
            _fail(self.name, node.start_mark, f"'{node.value[:40]}' can't be read as {_WORDS[kind]}")

    def _plain(self, node: yaml.ScalarNode, kind: str) -> Any:
        if kind == "int":
            return int(node.value)
        if kind == "float":
            return float(node.value.lower().replace(".inf", "inf").replace(".nan", "nan"))
        return self._scalars.construct_object(node)


def dotted(path: Path) -> str:
    """A path as the user writes it on the command line: `train.steps`."""
    return ".".join(map(str, path))
