"""Small tables of the report as HTML. Pure."""

from collections import Counter
from collections.abc import Iterable, Sequence
from html import escape

_MOST_COUNTS = 25
"""Lines of a table of counts; the rest is summed up in one."""


def counts_table(title: str, counts: Counter[str], what: str) -> str:
    """Names by how often they occur, with a bar each; the most frequent first."""
    if not counts:
        none = '<tbody><tr><td class="none">none</td></tr></tbody>'
        return f'<table class="counts"><caption>{escape(title)}</caption>{none}</table>'
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    if rest := ordered[_MOST_COUNTS:]:
        ordered = [*ordered[:_MOST_COUNTS], (f"{len(rest)} more", sum(count for _, count in rest))]
    most = max(count for _, count in ordered)
    rows = "".join(
        f'<tr><td>{escape(name.replace("_", " "))}</td><td class="n">{count:,}</td>'
        f'<td><span class="share" style="width:{count / most:.1%}"></span></td></tr>'
        for name, count in ordered
    )
    head = f'<thead><tr><th scope="col">what</th><th scope="col" class="n">{what}</th><td></td></tr></thead>'
    return f'<table class="counts"><caption>{escape(title)}</caption>{head}<tbody>{rows}</tbody></table>'


def plain_table(columns: Sequence[str], rows: Iterable[Sequence[str]], style: str = "") -> str:
    """A table of text; columns that start with > are numbers."""
    kinds = [' class="n"' if name.startswith(">") else "" for name in columns]
    head = "".join(
        f'<th scope="col"{kind}>{escape(name.lstrip(">"))}</th>' for name, kind in zip(columns, kinds, strict=True)
    )
    body = "".join(
        "<tr>" + "".join(f"<td{kind}>{escape(text)}</td>" for text, kind in zip(row, kinds, strict=True)) + "</tr>"
        for row in rows
    )
    return f'<table class="{style}"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'
