"""HTML and SVG elements as text that is escaped unless it says that it is markup already."""

from __future__ import annotations

import html
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

_VOID = frozenset({"br", "hr", "meta", "link"})


class Markup(str):
    """Text that is HTML already. Anything else is escaped when it enters an element."""

    __slots__ = ()


def escape(text: object) -> Markup:
    """The text as HTML; `Markup` unchanged. Control characters, which HTML forbids, become U+FFFD."""
    if isinstance(text, Markup):
        return text
    clean = "".join(c if c in "\n\t" or c.isprintable() or c.isspace() else "\ufffd" for c in str(text))
    return Markup(html.escape(clean.encode("utf-8", "replace").decode("utf-8"), quote=True))


def join(parts: Iterable[object], separator: str = "") -> Markup:
    """The parts one after another, each escaped."""
    return Markup(separator.join(escape(part) for part in parts))


def el(tag: str, *children: object, **attributes: object) -> Markup:
    """An element.

    Args:
        tag: its name.
        children: text (escaped) or `Markup`; None is left out.
        attributes: `class_` is `class`, `_` becomes `-`; None and False are left out, True has no value, floats are
            rounded to a tenth of a pixel.
    """
    text = "".join(_attribute(name, value) for name, value in attributes.items() if value not in (None, False))
    if tag in _VOID:
        return Markup(f"<{tag}{text}>")
    return Markup(f"<{tag}{text}>{join(child for child in children if child is not None)}</{tag}>")


def _attribute(name: str, value: object) -> str:
    name = name.rstrip("_").replace("_", "-")
    if value is True:
        return f" {name}"
    return f' {name}="{pixels(value) if isinstance(value, float) else escape(value)}"'


def pixels(value: float) -> str:
    """A coordinate with one decimal at most: `12.3`, `4`."""
    text = f"{value:.1f}".removesuffix(".0")
    return "0" if text == "-0" else text
