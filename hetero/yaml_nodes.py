"""Values out of YAML nodes, where every fault is noted with its file, line and column and reading goes on."""

from __future__ import annotations

import math
import re
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

import yaml

from hetero import units
from hetero.errors import DeviceError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from pathlib import Path

    Read = Callable[[yaml.Node, str], Any]

MAX_DEPTH = 32


def compose(path: Path) -> yaml.Node | None:
    """The root node of a file; None where it is empty.

    Anchors and aliases are refused (seven lines of them can stand for a billion nodes), and so is deep nesting.

    Raises:
        DeviceError: it can't be read, or is not YAML.
    """
    try:
        text = path.read_text(encoding="utf-8")
        _refuse_extras(text, path)
        return yaml.compose(text, Loader=yaml.SafeLoader)
    except OSError as error:
        raise DeviceError(f"can't read {path}", found=error.strerror or str(error)) from None
    except UnicodeDecodeError as error:
        raise DeviceError(f"can't read {path}", found=str(error), expected="UTF-8 text") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)  # a character that YAML forbids has none
        problem = getattr(error, "problem", None) or " ".join(str(error).split())
        raise DeviceError(f"{_place(path, mark)}: {problem}", expected="a YAML file") from None


def _refuse_extras(text: str, path: Path) -> None:
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise DeviceError(f"{_place(path, event.start_mark)}: anchors and aliases are not supported")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH:
            raise DeviceError(f"{_place(path, event.start_mark)}: nested deeper than {MAX_DEPTH} levels")


def _place(path: Path, mark: Any) -> str:
    return f"{path}:{mark.line + 1}:{mark.column + 1}" if mark else f"{path}:1:1"


class Reader:
    """Reads values of one file and collects faults.

    Each method takes a node and the name by which messages call it (`devices[1].flops`), and gives a value of its type
    even where it notes a fault.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.faults: list[str] = []

    def fault(self, node: yaml.Node | None, key: str, text: str) -> None:
        """Note a fault: `file:line:column: key: text`."""
        self.faults.append(f"{_place(self.path, node.start_mark if node else None)}: {key}: {text}")

    def mapping(
        self, node: yaml.Node | None, key: str, readers: Mapping[str, Read], *, needs: Iterable[str] = ()
    ) -> dict[str, Any]:
        """The values of a mapping whose keys are known.

        Args:
            node: the mapping.
            key: what messages call it; empty for the document.
            readers: key -> how to read its value.
            needs: keys that have to be there.
        """
        if not isinstance(node, yaml.MappingNode):
            self.fault(node, key or "topology", f"{_shown(node)}; expected {', '.join(readers)}")
            return {}
        values: dict[str, Any] = {}
        for name_node, value_node in node.value:
            name = name_node.value if isinstance(name_node, yaml.ScalarNode) else _shown(name_node)
            inner = f"{key}.{name}" if key else name
            if name not in readers:
                self.fault(name_node, inner, f"unknown key; {did_you_mean(name, readers)}")
            elif name in values:
                self.fault(name_node, inner, "given twice")
            else:
                values[name] = readers[name](value_node, inner)
        for name in needs:
            if name not in values:
                self.fault(node, f"{key}.{name}", "missing")
        return values

    def list_of(self, item: Read) -> Read:
        """A reader of lists, from one of their items; items that are None are left out."""

        def values(node: yaml.Node, key: str) -> list[Any]:
            if not isinstance(node, yaml.SequenceNode):
                self.fault(node, key, f"{_shown(node)}; expected a list")
                return []
            found = [item(child, f"{key}[{k}]") for k, child in enumerate(node.value)]
            return [value for value in found if value is not None]

        return values

    def text(self, node: yaml.Node, key: str) -> str:
        """A text that is not empty."""
        if isinstance(node, yaml.ScalarNode) and node.value:
            return str(node.value)
        self.fault(node, key, f"{_shown(node)}; expected a text")
        return ""

    def texts(self, node: yaml.Node, key: str) -> dict[str, str]:
        """A mapping of words to texts."""
        if isinstance(node, yaml.MappingNode):
            return {str(name.value): self.text(value, f"{key}.{name.value}") for name, value in node.value}
        self.fault(node, key, f"{_shown(node)}; expected field: source")
        return {}

    def one_of(self, *words: str) -> Read:
        """A reader of a word out of a few."""

        def word(node: yaml.Node, key: str) -> str:
            value = self.text(node, key)
            if value and value not in words:
                self.fault(node, key, f"{value!r}; expected {' or '.join(words)}")
            return value

        return word

    def whole(self, node: yaml.Node, key: str) -> int:
        """A whole number of at most nine digits, not negative."""
        if isinstance(node, yaml.ScalarNode) and re.fullmatch(r"[0-9]{1,9}", str(node.value)):
            return int(node.value)
        self.fault(node, key, f"{_shown(node)}; expected a whole number")
        return 0

    def count(self, node: yaml.Node, key: str) -> int:
        """A whole number, at least one."""
        before = len(self.faults)
        value = self.whole(node, key)
        if value == 0 and len(self.faults) == before:
            self.fault(node, key, "0; expected at least 1")
        return max(value, 1)

    def quantity(self, dimension: str, *, positive: bool = False) -> Read:
        """A reader of quantities, with their unit or as a bare number (`hetero.units`)."""

        def value(node: yaml.Node, key: str) -> float:
            try:
                found = units.parse(node.value if isinstance(node, yaml.ScalarNode) else "", dimension)
            except ValueError as error:
                self.fault(node, key, f"{_shown(node)}; {error}")
                return math.nan
            if positive and found == 0:
                self.fault(node, key, "0; expected more")
            return found

        return value

    def size(self, node: yaml.Node, key: str) -> int:
        """Bytes, rounded to whole ones, at least one."""
        value = self.quantity("bytes", positive=True)(node, key)
        return 0 if math.isnan(value) else round(value)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The nearest of the words that exist, or all of them."""
    known = list(known)
    close = get_close_matches(word.lower(), {name.lower(): name for name in known}, n=1, cutoff=0.5)
    nearest = [name for name in known if close and name.lower() == close[0]]
    return f"did you mean {nearest[0]!r}?" if nearest else f"there are {', '.join(known)}"


def _shown(node: yaml.Node | None) -> str:
    if isinstance(node, yaml.ScalarNode):
        return repr(node.value if len(node.value) <= 60 else node.value[:57] + "...")
    if node is None:
        return "nothing"
    return "a list" if isinstance(node, yaml.SequenceNode) else "a mapping"
