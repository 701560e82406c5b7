"""Reports as text for the terminal and as an HTML page.

    table = [{"label": "no_relation", "rows": 123}, {"label": "per:title", "rows": 45}]
    print(text_table(table))
    write_report("train.csv", [Section("Labels", "Number of rows.", table)], Path("runs/eda"))

The page, index.html, is one file that needs no network; figures are embedded as PNG.
"""

import base64
import html
import io
import unicodedata
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np

from common import atomic_write, printable
from data import Template
from rows import Row

CASES = 10  # rows that a section shows in the terminal; the page shows all


class Section(NamedTuple):
    """A part of a report. `cases` are (text, row); the row is shown with its entities marked."""

    title: str
    note: str = ""
    table: list[dict] | None = None
    figure: object = None  # a matplotlib Figure
    cases: list[tuple[str, Row | None]] | None = None


def write_report(title: str, sections: list[Section], out: Path):
    """Write index.html to the folder `out`, then print the sections without figures.

    In this order, since a closed pipe (`| head`) ends the program while it prints.
    """
    with atomic_write(out / "index.html") as file:
        file.write(html_page(title, sections))
    print(title)
    for section in sections:
        if section.table or section.cases:
            print(f"\n## {section.title}\n{section.note}".rstrip())
        if section.table:
            print(text_table(section.table))
        if section.cases:
            print(text_cases(section.cases[:CASES]))
        if len(section.cases or []) > CASES:
            print(f"... and {len(section.cases) - CASES} more in the page")
    print(f"\n{out / 'index.html'}: this report with figures")


# --- text -------------------------------------------------------------------------------------


def format_cell(value) -> str:
    """A value as one line of printable text."""
    if isinstance(value, (float, np.floating)):
        return "–" if np.isnan(value) else f"{value:.2f}"
    if isinstance(value, (int, np.integer)):
        return f"{value:,}"
    return printable(str(value))


def text_table(table: list[dict]) -> str:
    """A table for the terminal: numbers right-aligned, Korean letters two columns wide."""

    def pad(text: str, width: int, left: bool) -> str:
        space = " " * (width - text_width(text))
        return text + space if left else space + text

    lines = [list(table[0]), *(list(map(format_cell, line.values())) for line in table)]
    widths = [max(map(text_width, column)) for column in zip(*lines)]
    left = [isinstance(value, str) for value in table[0].values()]
    return "\n".join("  ".join(map(pad, line, widths, left)).rstrip() for line in lines)


def text_width(text: str) -> int:
    """The number of terminal columns that a text takes."""
    return len(text) + sum(unicodedata.east_asian_width(c) in "WF" for c in text)


def text_cases(cases: list[tuple[str, Row | None]]) -> str:
    """Cases for the terminal; [E1] [/E1] enclose the subject, [E2] [/E2] the object."""
    template, lines = Template("entity_marker"), []
    for text, row in cases:
        lines.append(format_cell(text))
        lines += [f"    {format_cell(template.render(row).text)}"] if row else []
    return "\n".join(lines)


# --- HTML -------------------------------------------------------------------------------------

STYLE = """
body { margin: 0 auto; padding: 1rem; max-width: 1360px; color: #222; background: #fff;
  font: 15px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; box-sizing: border-box }
h1 { font-size: 1.5rem } h2 { font-size: 1.15rem; margin: 2.2rem 0 .4rem }
nav a { display: inline-block; margin-right: 1rem } a { color: #3566a8 }
p { margin: .3rem 0; max-width: 80ch; white-space: pre-line }
.row { display: flex; flex-wrap: wrap; gap: 1.5rem; align-items: flex-start }
.box { overflow-x: auto; max-width: 100% } img { display: block; max-width: 100% }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums }
th, td { padding: .15rem .6rem; text-align: left; white-space: nowrap }
th:first-child, td:first-child { position: sticky; left: 0; background: #fff }
th { border-bottom: 2px solid #999 } td { border-bottom: 1px solid #e3e3e3 }
.wide { font-size: 12px } .wide th, .wide td { padding: .15rem .25rem }
.n { text-align: right } tr:hover { background: #f3f6fa }
.case { margin: .6rem 0; padding: .4rem .7rem; border-left: 3px solid #ccc }
mark { padding: 0 .15em; border-radius: 3px }
.s { background: #bcd6f7 } .o { background: #ffd9a8 } .s.o { background: #d9c2f0 }
"""


def html_page(title: str, sections: list[Section]) -> str:
    """The page, with images embedded and all text escaped."""
    body = links = ""
    for i, section in enumerate(sections):
        name = html.escape(section.title)
        links += f'<a href="#{i}">{name}</a>'
        body += f'<section id="{i}"><h2>{name}</h2>\n<p>{html.escape(section.note)}</p>\n'
        body += '<div class="row">' + (html_table(section.table) if section.table else "")
        if section.figure:
            png = io.BytesIO()
            section.figure.savefig(png, format="png")
            source = f"data:image/png;base64,{base64.b64encode(png.getvalue()).decode()}"
            body += f'<div class="box"><img alt="{name}" src="{source}"></div>'
        body += "</div>\n"
        for text, row in section.cases or []:
            sentence = f"<br>{html_sentence(row)}" if row else ""
            text = html.escape(format_cell(text))
            body += f'<div class="case"><b>{text}</b>{sentence}</div>\n'
        body += "</section>\n"
    title = html.escape(title)
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width">'
    head += f"<title>{title}</title><style>{STYLE}</style>"
    body = f"<h1>{title}</h1>\n<nav>{links}</nav>\n{body}"
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n{body}</body></html>\n'


def html_table(table: list[dict]) -> str:
    """A table as HTML, with numbers right-aligned."""
    classes = ["" if isinstance(value, str) else "n" for value in table[0].values()]
    rows = ""
    for tag, values in [("th", table[0]), *(("td", line.values()) for line in table)]:
        cells = zip(classes, map(html.escape, map(format_cell, values)))
        row = "".join(f'<{tag} class="{name}">{cell}</{tag}>' for name, cell in cells)
        rows += f"<tr>{row}</tr>\n"
    wide = ' class="wide"' if len(classes) > 9 else ""  # labels and types, at 1200 pixels
    return f'<div class="box"><table{wide}>{rows}</table></div>'


def html_sentence(row: Row) -> str:
    """A row's sentence as HTML with subject and object marked, also where they overlap."""
    entities = {"s": row.subject, "o": row.object}
    edges = {0, len(row.sentence)}.union(*((e.start, e.end + 1) for e in entities.values()))
    out = ""
    for start, end in pairwise(sorted(edges)):
        text = html.escape(row.sentence[start:end])
        css_class = " ".join(name for name, e in entities.items() if e.start <= start <= e.end)
        out += f'<mark class="{css_class}">{text}</mark>' if css_class else text
    return out
