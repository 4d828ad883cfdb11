"""A report's blocks as Markdown and as one HTML page."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Block:
    """A piece of the report: a heading, a paragraph, a picture or a table."""

    kind: str
    text: str = ""
    path: str = ""
    rows: tuple[tuple[str, ...], ...] = ()


def slug(text: str) -> str:
    """A name for files."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def markdown(blocks: Sequence[Block]) -> str:
    """The report as Markdown."""
    parts = []
    for block in blocks:
        text = escaped(block.text)
        if block.kind in ("h1", "h2"):
            parts.append(f"\n{'#' * int(block.kind[1])} {text}\n")
        elif block.kind == "li":
            parts.append(f"- {text}")
        elif block.kind == "img":
            parts.append(f"\n![{text}]({block.path})\n\n{text}\n")
        elif block.kind == "table":
            head, *body = [[escaped(cell) for cell in row] for row in block.rows]
            lines = [head, ["---"] * len(head), *body]
            parts.append(f"\n**{text}**\n\n" + "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n")
        else:
            parts.append(f"\n{text}\n")
    return re.sub(r"\n{3,}", "\n\n", "\n".join(parts)).strip() + "\n"


def escaped(text: str) -> str:
    """Text that Markdown shows as it is."""
    return html.escape(text, quote=False).replace("|", "\\|")


STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:76rem;margin:2rem auto;padding:0 1rem}img{max-width:100%}"
    "table{border-collapse:collapse;font-size:12px;display:block;overflow-x:auto}td,th{border-bottom:1px solid #ddd;"
    "padding:.2rem .5rem;text-align:left;white-space:nowrap}figure{margin:1rem 0}figcaption{color:#555}"
)


def page(blocks: Sequence[Block]) -> str:
    """The report as one HTML page."""
    body = "\n".join(element(block) for block in blocks)
    title = html.escape(blocks[0].text)
    head = f'<meta charset="utf-8"><title>{title}</title><style>{STYLE}</style>'
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n{body}\n</body></html>\n'


def element(block: Block) -> str:
    """One block in HTML."""
    text = html.escape(block.text)
    if block.kind == "img":
        return f'<figure><img src="{html.escape(block.path)}" alt="{text}"><figcaption>{text}</figcaption></figure>'
    if block.kind == "table":
        head, *body = block.rows
        cells = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
        lines = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in body)
        return f"<h3>{text}</h3><table><tr>{cells}</tr>{lines}</table>"
    return f"<{block.kind}>{text}</{block.kind}>"
