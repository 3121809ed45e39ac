"""Small pieces of HTML; every text that comes from data is escaped here."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from html import escape
from typing import Any


def section(anchor: str, title: str, *content: str) -> str:
    """Return a titled section that the table of contents can point to."""
    return f'<section id="{escape(anchor)}"><h2>{escape(title)}</h2>\n{"".join(content)}</section>\n'


def paragraph(text: str, kind: str = "") -> str:
    """Return a paragraph, of the class ``kind`` if given."""
    return f'<p class="{kind}">{escape(text)}</p>\n' if kind else f"<p>{escape(text)}</p>\n"


def note(text: str) -> str:
    """Return a paragraph that should not be overlooked."""
    return f'<div class="note"><p>{escape(text)}</p></div>\n'


def figure(png: bytes, caption: str, width: int | None = None) -> str:
    """Return a picture, held in the page itself, with a caption that is also its text for those who cannot see it."""
    data = base64.b64encode(png).decode("ascii")
    sized = f' style="width:{width}px"' if width else ""
    return (
        f'<figure><img alt="{escape(caption, quote=True)}" src="data:image/png;base64,{data}"{sized}>'
        f"<figcaption>{escape(caption)}</figcaption></figure>\n"
    )


def tiles(items: Sequence[tuple[str, str, str]]) -> str:
    """Return large numbers: rows of (value, unit, label)."""
    cells = (
        f'<div class="tile"><b>{escape(value)} <span class="unit">{escape(unit)}</span></b>'
        f"<span>{escape(label)}</span></div>"
        for value, unit, label in items
    )
    return f'<div class="tiles">{"".join(cells)}</div>\n'


def table(rows: Sequence[Sequence[object]], head: Sequence[str] = (), numeric: Sequence[int] = ()) -> str:
    """Return a table; the columns ``numeric`` are aligned to the right. Cells that are :class:`Raw` are not escaped."""
    mark = [
        ' class="number"' if index in numeric else "" for index in range(max((len(row) for row in rows), default=0))
    ]
    top = "".join(f"<th{mark[i] if i < len(mark) else ''}>{escape(name)}</th>" for i, name in enumerate(head))
    body = "".join(
        "<tr>" + "".join(f"<td{mark[i]}>{_cell(cell)}</td>" for i, cell in enumerate(row)) + "</tr>" for row in rows
    )
    return f'<div class="scroll"><table>{f"<tr>{top}</tr>" if top else ""}{body}</table></div>\n'


class Raw(str):
    """Markup that is already escaped."""

    __slots__ = ()


def details(title: str, content: str, open_: bool = False) -> str:
    """Return something that is folded away until asked for."""
    return f"<details{' open' if open_ else ''}><summary>{escape(title)}</summary>{content}</details>\n"


def code(value: Any) -> str:
    """Return a JSON-able value as preformatted text."""
    return f"<pre>{escape(json.dumps(value, indent=2, ensure_ascii=False, default=str))}</pre>\n"


def data_script(anchor: str, value: Any) -> str:
    """Return JSON for a script of the page; nothing in it can end the element early."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    return f'<script type="application/json" id="{escape(anchor)}">{text}</script>\n'


def number(value: float | int | None, digits: int = 4) -> str:
    """Return ``value`` with at most ``digits`` significant digits, thousands apart, a dash for nothing."""
    if value is None:
        return "–"
    if float(value).is_integer() and abs(value) < 1e15:
        return f"{int(value):,}".replace(",", "\u202f")
    text = f"{float(value):.{digits}g}"
    return f"{float(text):,.0f}".replace(",", "\u202f") if "e+" in text and abs(value) < 1e9 else text


def duration(seconds: float | None) -> tuple[str, str]:
    """Return ``(value, unit)`` of a time in s, min or h."""
    if seconds is None:
        return "–", ""
    if seconds < 120:
        return (f"{seconds:.1f}" if seconds < 10 else f"{seconds:.0f}"), "s"
    return (f"{seconds / 60:.1f}", "min") if seconds < 7200 else (f"{seconds / 3600:.1f}", "h")


def _cell(value: object) -> str:
    return str(value) if isinstance(value, Raw) else escape(str(value))
