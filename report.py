"""What `python data.py FILE` and `python metrics.py FILE` show: tables in the terminal, the same as figures (PNG), and
one page, index.html, that opens from disk without a network. And what TensorBoard shows of an evaluation.

    table --> text_table, html_table          a list of lines, each a dict from heading to value
    table --> bar_figure, heat_figure, ...    figures are matplotlib's, drawn without a display
    sections of these --> write_report

Names from the data are drawn with any installed Korean font; without one, names in Latin letters stay and others are
shown by their number in the table.
"""

import argparse
import base64
import functools
import glob
import html
import io
import re
import sys
import unicodedata
from contextlib import suppress
from itertools import groupby, pairwise
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib import font_manager
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from sklearn.metrics import auc, confusion_matrix, precision_recall_curve

import data
import metrics
from data import InputError, Row, Template, atomic_write, expect

CASES = 10  # rows that a section shows in the terminal; the page shows all
BARS = 50  # lines of a table that a figure shows
COLOURS = ("#3566a8", "#d9822b")  # of the first and the second file


class Section(NamedTuple):
    """A part of a report: `cases` are rows to show with their entities marked, each under a line of text."""

    title: str
    note: str = ""
    table: list[dict] | None = None
    figure: Figure | None = None
    cases: list[tuple[str, Row | None]] | None = None


# --- text --------------------------------------------------------------------------------------------------------


def shown(value) -> str:
    """A cell as text of one line: numbers with few digits, nothing that a terminal would take for a command."""
    if isinstance(value, (float, np.floating)):
        return "–" if np.isnan(value) else f"{value:.2f}"
    if isinstance(value, (int, np.integer)):
        return f"{value:,}"
    return data.printable(str(value))


def text_table(table: list[dict]) -> str:
    """A table for the terminal; numbers stand to the right, and Korean letters take two columns."""

    def width(text: str) -> int:
        return sum(0 if unicodedata.combining(c) else 1 + (unicodedata.east_asian_width(c) in "WF") for c in text)

    lines = [list(table[0]), *([shown(value) for value in line.values()] for line in table)]
    widths = [max(map(width, column)) for column in zip(*lines)]
    is_text = [isinstance(value, str) for value in table[0].values()]
    out = []
    for line in lines:
        cells = [
            cell + " " * (w - width(cell)) if left else " " * (w - width(cell)) + cell
            for cell, w, left in zip(line, widths, is_text)
        ]
        out.append("  ".join(cells).rstrip())
    return "\n".join(out)


def text_cases(cases: list[tuple[str, Row | None]]) -> str:
    """Rows for the terminal, the subject between [E1] and [/E1], the object between [E2] and [/E2]."""
    template = Template("entity_marker")
    return "\n".join(shown(line) + (f"\n    {shown(template.render(row).text)}" if row else "") for line, row in cases)


# --- figures -----------------------------------------------------------------------------------------------------


@functools.cache
def drawable_characters() -> set[int]:
    """The characters that figures can show, once matplotlib knows an installed Korean font, if there is one."""
    fonts, files = ["DejaVu Sans"], font_manager.findSystemFonts()
    characters = set(font_manager.get_font(font_manager.findfont(fonts[0])).get_charmap())
    for path in sorted(files, key=lambda p: ("NanumGothic." not in p, "Regular" not in p, p)):
        with suppress(RuntimeError, OSError):  # no font that matplotlib can read
            found = set(font_manager.get_font(path).get_charmap())
            if found >= {ord("가"), ord("힣")}:
                font_manager.fontManager.addfont(path)
                fonts.append(font_manager.FontProperties(fname=path).get_name())
                characters |= found
                break
    matplotlib.rcParams["font.family"] = fonts
    return characters


@functools.cache
def say_once(text: str):
    print(text, file=sys.stderr)


def drawable(names: list[str]) -> list[str]:
    """The names as figures can show them: one with letters that no font has becomes its number in the list."""
    out = []
    for i, name in enumerate(map(shown, names), 1):
        if not drawable_characters().issuperset(map(ord, name)):
            say_once("figures: no font for some names, their numbers stand for them; Debian's fonts-nanum has Korean")
            name = f"#{i}"
        name = name if len(name) <= 40 else f"{name[:39]}…"
        out.append(name.replace("$", r"\$"))  # else matplotlib reads a formula
    return out


def new_figure(width: float, height: float, **grid):
    """A figure in inches and its axes, with what the figures have in common."""
    drawable_characters()
    figure = Figure((width, height), dpi=100, layout="constrained")
    axes = figure.subplots(**grid)
    for axis in np.ravel(axes):
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8, length=2)
    return figure, axes


def bar_figure(table: list[dict], columns: list[str], x_label: str) -> Figure:
    """Bars for some columns of a table, one group a line, with whiskers where the table has "from" and "to"; of a long
    table the first lines."""
    table = table[:BARS]
    names = drawable([line[next(iter(line))] for line in table])
    figure, axis = new_figure(6.6, 0.9 + len(table) * (0.12 + 0.14 * len(columns)))
    at, thickness = np.arange(len(table)), 0.8 / len(columns)
    for i, (column, title) in enumerate(zip(columns, drawable(columns))):
        values = np.array([line[column] for line in table])
        place = at + (i - (len(columns) - 1) / 2) * thickness
        bars = axis.barh(place, values, thickness, color=COLOURS[i], label=title)
        if "from" in table[0]:
            whiskers = np.abs(values - np.array([(line["from"], line["to"]) for line in table]).T)
            axis.errorbar(values, place, xerr=whiskers, fmt="none", ecolor="black", elinewidth=1, capsize=2)
        else:
            axis.bar_label(bars, list(map(shown, values)), fontsize=7, padding=2)
    axis.set_yticks(at, names)
    axis.set_ylim(len(table) - 0.4, -0.6)
    axis.margins(x=0.1)
    axis.set_xlabel(x_label, fontsize=9)
    if len(columns) > 1:
        axis.legend(fontsize=8)
    return figure


def heat_figure(counts: np.ndarray, y_names: list[str], x_names: list[str], y_label: str, x_label: str) -> Figure:
    """A matrix of counts as colours, on a logarithmic scale, with the numbers written in."""
    width, height = 2.6 + 0.36 * len(x_names), 2 + 0.3 * len(y_names)
    figure, axis = new_figure(max(width, 4.5), height)
    most = max(counts.max(), 2)
    masked = np.ma.masked_equal(counts, 0)
    axis.pcolormesh(masked, cmap="Blues", norm=LogNorm(0.7, most), edgecolors="#dddddd", linewidth=0.5)
    for y, x in np.argwhere(counts):
        colour = "white" if counts[y, x] > most**0.6 else "black"
        place = {"ha": "center", "va": "center", "clip_on": True}  # clipped: the layout need not look at it
        axis.text(x + 0.5, y + 0.5, f"{counts[y, x]}", fontsize=7, color=colour, **place)
    axis.set_ylim(len(y_names), 0)
    axis.set_yticks(np.arange(len(y_names)) + 0.5, drawable(y_names))
    axis.set_xticks(np.arange(len(x_names)) + 0.5, drawable(x_names), rotation=60, ha="right", rotation_mode="anchor")
    axis.set_ylabel(y_label, fontsize=9)
    axis.set_xlabel(x_label, fontsize=9)
    return figure


def confusion_figure(predicted: np.ndarray, gold: np.ndarray, labels: list[str]) -> Figure:
    """The confusion matrix; right predictions are on the diagonal."""
    matrix = confusion_matrix(gold, predicted, labels=range(len(labels)))
    return heat_figure(matrix, labels, labels, "true", "predicted")


def curves_figure(probs: np.ndarray, gold: np.ndarray, labels: list[str]) -> Figure:
    """The precision-recall curve of each label that `gold` has, the most frequent first, one small plot each."""
    counts = np.bincount(gold, minlength=len(labels))
    present = [c for c in np.argsort(-counts, kind="stable") if counts[c]]
    n = -(-len(present) // 5)
    figure, axes = new_figure(12, 0.8 + 2 * n, nrows=n, ncols=5, sharex=True, sharey=True, squeeze=False)
    names = drawable(labels)
    for axis, c in zip(axes.flat, present):
        precision, recall, _ = precision_recall_curve(gold == c, probs[:, c])
        area = 100 * auc(recall, precision)
        axis.fill_between(recall, precision, color=COLOURS[0], alpha=0.2)
        axis.plot(recall, precision, color=COLOURS[0], linewidth=1.2)
        axis.set_title(f"{names[c]}\narea {area:.1f}, {counts[c]} rows", fontsize=8)
    for axis in axes.flat[len(present) :]:
        axis.set_visible(False)
    figure.supxlabel("recall", fontsize=9)
    figure.supylabel("precision", fontsize=9)
    return figure


def length_figure(lengths: dict[str, np.ndarray], limit: int) -> Figure:
    """The files' lengths as histograms, and the limit."""
    figure, axis = new_figure(6.6, 3.2)
    edges = np.linspace(0, max(limit, *(n.max() for n in lengths.values())) + 1, 60)
    for colour, title, n in zip(COLOURS, drawable(list(lengths)), lengths.values()):
        axis.hist(n, edges, weights=np.full(len(n), 100 / len(n)), alpha=0.5, color=colour, label=title)
    axis.axvline(limit, color="black", linewidth=1, linestyle="--", label=f"--max-length {limit}")
    axis.set_xlabel("tokens", fontsize=9)
    axis.set_ylabel("% of the rows", fontsize=9)
    axis.legend(fontsize=8)
    return figure


def difference_figure(table: list[dict], differences: dict[str, np.ndarray]) -> Figure:
    """How the drawn differences of each score spread, their middle 95 % in full colour."""
    figure, axes = new_figure(10, 2.8, ncols=len(table))
    for axis, line, drawn in zip(axes, table, differences.values()):
        _, edges, bars = axis.hist(drawn, 40, color=COLOURS[0])
        for edge, bar in zip(edges, bars):
            bar.set_alpha(1 if line["from"] <= edge <= line["to"] else 0.3)
        axis.axvline(0, color="black", linewidth=1, linestyle="--")
        axis.set_title(f"{line['score']}, p = {line['p']:.3f}", fontsize=9)
        axis.set_xlabel("B - A, points", fontsize=9)
        axis.set_yticks([])
    return figure


# --- the page ----------------------------------------------------------------------------------------------------

STYLE = """
body { margin: 0 auto; padding: 1rem; max-width: 1360px; font: 15px/1.5 system-ui, "Noto Sans KR", "NanumGothic",
  "Malgun Gothic", sans-serif; color: #222; background: #fff; overflow-wrap: anywhere }
h1 { font-size: 1.5rem; line-height: 1.25 } h2 { font-size: 1.15rem; margin: 2.2rem 0 .4rem }
nav a { display: inline-block; margin-right: 1rem } a { color: #3566a8 }
p { margin: .3rem 0; max-width: 80ch; white-space: pre-line }
.row { display: flex; flex-wrap: wrap; gap: 1.5rem; align-items: flex-start }
.box { overflow-x: auto; max-width: 100% } img { display: block }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; overflow-wrap: normal }
th, td { padding: .15rem .6rem; text-align: left; border-bottom: 1px solid #e3e3e3; white-space: nowrap }
th { border-bottom: 2px solid #999 } .n { text-align: right } tbody tr:hover { background: #f3f6fa }
.case { margin: .6rem 0; padding: .4rem .7rem; border-left: 3px solid #ccc } .case b { font-weight: 600 }
mark { padding: 0 .15em; border-radius: 3px } .s { background: #bcd6f7 } .o { background: #ffd9a8 }
.s.o { background: #d9c2f0 }
"""


def html_table(table: list[dict]) -> str:
    """A table as HTML; numbers stand to the right."""
    side = ['class="n"' if not isinstance(value, str) else "" for value in table[0].values()]
    head = "".join(f"<th {s}>{html.escape(shown(name))}</th>" for s, name in zip(side, table[0]))
    body = ""
    for line in table:
        cells = (f"<td {s}>{html.escape(shown(value))}</td>" for s, value in zip(side, line.values()))
        body += f"<tr>{''.join(cells)}</tr>\n"
    return f'<div class="box"><table><thead><tr>{head}</tr></thead><tbody>\n{body}</tbody></table></div>'


def html_sentence(row: Row) -> str:
    """A row's sentence as HTML with subject and object marked, also where they overlap."""
    entities = {"s": row.subject, "o": row.object}
    kinds = [" ".join(k for k, e in entities.items() if e.start <= i <= e.end) for i in range(len(row.sentence))]
    out = ""
    for kind, pairs in groupby(zip(kinds, row.sentence), key=lambda pair: pair[0]):
        text = html.escape("".join(c for _, c in pairs))
        out += f'<mark class="{kind}">{text}</mark>' if kind else text
    return out


def html_page(title: str, sections: list[Section], images: list[bytes | None]) -> str:
    """The whole page; every text is escaped, images are part of it."""
    body = links = ""
    for i, (section, png) in enumerate(zip(sections, images)):
        links += f'<a href="#{i}">{html.escape(section.title)}</a>'
        body += f'<section id="{i}"><h2>{html.escape(section.title)}</h2>\n<p>{html.escape(section.note)}</p>\n'
        body += '<div class="row">' + (html_table(section.table) if section.table else "")
        if png:
            source = f"data:image/png;base64,{base64.b64encode(png).decode()}"
            body += f'<div class="box"><img alt="{html.escape(section.title)}" src="{source}"></div>'
        body += "</div>\n"
        for line, row in section.cases or []:
            sentence = f"<br>{html_sentence(row)}" if row else ""
            body += f'<div class="case"><b>{html.escape(shown(line))}</b>{sentence}</div>\n'
        body += "</section>\n"
    title = html.escape(title)
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width">'
    head += f"<title>{title}</title><style>{STYLE}</style>"
    text = f"<h1>{title}</h1>\n<nav>{links}</nav>\n{body}"
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n{text}</body></html>\n'


def write_report(title: str, sections: list[Section], out: Path):
    """Writes the sections' figures and index.html into the folder `out`, and then prints the sections: a reader of
    what is printed, such as `head`, may end the program."""
    images = []
    for section in sections:
        images.append(None)
        if section.figure:
            buffer = io.BytesIO()
            section.figure.savefig(buffer, format="png")
            images[-1] = buffer.getvalue()
            name = re.sub(r"\W+", "-", section.title.lower()).strip("-")
            with atomic_write(out / f"{name}.png", "wb") as file:
                file.write(images[-1])
    with atomic_write(out / "index.html") as file:
        file.write(html_page(title, sections, images))
    print(title)
    for section in sections:
        if section.table or section.cases:
            print(f"\n## {section.title}")
        if section.note:
            print(section.note)
        if section.table:
            print(text_table(section.table))
        if section.cases:
            print(text_cases(section.cases[:CASES]))
        if len(section.cases or []) > CASES:
            print(f"... and {len(section.cases) - CASES} more in the page")
    print(f"\n{out / 'index.html'}: the same as a page, its figures as PNG beside it")


# --- python data.py ----------------------------------------------------------------------------------------------


def data_arguments() -> argparse.Namespace:
    parser = data.Parser(description=data.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", help="one file of rows, or two to see side by side")
    parser.add_argument("--diff", nargs=2, metavar=("OLD", "NEW"), help="the rows that differ, of two files or folders")
    parser.add_argument(
        "--download", nargs="?", const=data.KLUE_RE, metavar="HUB", help=f"write it as CSV ({data.KLUE_RE})"
    )
    parser.add_argument("--model", help="encoder whose tokens are counted: a folder, or a name on the Hugging Face hub")
    parser.add_argument("--marker", default=Template().marker, choices=data.MARKERS, help=f"({Template().marker})")
    parser.add_argument("--prompt", default=Template().prompt, choices=data.PROMPTS, help=f"({Template().prompt})")
    parser.add_argument("--type-names", default=Template().type_names, choices=data.TYPE_NAMES, help="(en)")
    parser.add_argument("--max-length", type=int, default=256, help="count the rows with more tokens (256)")
    parser.add_argument("--out", help="folder for figures and page (runs/eda), or of --download (data)")
    arguments = parser.parse_args()
    if arguments.diff or arguments.download:
        if arguments.files or (arguments.diff and arguments.download):
            raise InputError("--diff, --download and files are for three commands")
        return arguments
    if not arguments.files or len(arguments.files) > 2 or len(set(arguments.files)) < len(arguments.files):
        raise InputError(f"found {len(arguments.files)} files, expected one or two different ones")
    return arguments


def token_lengths(files: dict[str, list[Row]], template: Template, model: str) -> dict[str, np.ndarray]:
    """How many tokens the encoder gets of each row if none is cut."""
    from model import add_markers, encode, load_tokenizer  # torch takes seconds to load: only when tokens are counted

    tokenizer, lengths = load_tokenizer(model), {}
    for name, rows in files.items():
        add_markers(tokenizer, template, rows)
        examples, _ = encode(rows, template, tokenizer, [], sys.maxsize)
        lengths[name] = np.array([len(example.ids) for example in examples])
    return lengths


def data_sections(files: dict[str, list[Row]], lengths: dict[str, np.ndarray] | None, how: str, limit: int):
    """The parts of the report on one or two files. lengths: in tokens, or None; how: what was counted; limit:
    --max-length."""
    names, sections = list(files), []
    labelled = {name: rows for name, rows in files.items() if any(row.label for row in rows)}
    columns = {
        "label": (labelled, lambda row: row.label),
        "source": (files, lambda row: row.source),
        "type of the subject": (files, lambda row: row.subject.type),
        "type of the object": (files, lambda row: row.object.type),
        "types of subject and object": (files, data.type_pair),
    }
    for heading, (of_files, value) in columns.items():
        if of_files:
            table = data.count_table(of_files, heading, value)
            figure = bar_figure(table, [f"{name} %" for name in of_files], "% of the rows")
            sections.append(Section(f"By {heading}", "", table, figure))
    for name, rows in labelled.items():
        table = data.cross_table(rows)
        pairs = list(table[0])[1:]
        matrix = np.array([[line[pair] for pair in pairs] for line in table])
        figure = heat_figure(matrix, [line["label"] for line in table], pairs, "label", "types of subject and object")
        sections.append(Section(f"Labels and types of {name}", "Number of rows.", table, figure))
    note = "Rows that repeat an earlier one's sentence, and more: of n alike, n - 1 are counted. Entities are the same "
    note += "if word, place and type are."
    table = data.repeat_table(files)
    sections.append(Section("Repeated rows", note, table, bar_figure(table, names, "rows")))
    if len(files) == 2:
        table = data.shared_table(files)
        figure = bar_figure(table, list(table[0])[2:], "rows")
        sections.append(Section("Shared by both files", "", table, figure))
    if lengths:
        table = data.length_table(lengths, limit)
        sections.append(Section("Lengths in tokens", how, table, length_figure(lengths, limit)))
    return sections


@data.exit_on_bad_input
def data_report():
    """python data.py"""
    arguments = data_arguments()
    if arguments.diff:
        data.print_diff(*arguments.diff)
        return
    if arguments.download:
        data.download(Path(arguments.out or "data"), arguments.download)
        return
    names = [Path(path).name for path in arguments.files]
    names = names if len(set(names)) == len(names) else arguments.files
    files = dict(zip(names, map(data.read_rows, arguments.files)))
    lengths, how = None, f"{arguments.model}, --marker {arguments.marker}, --prompt {arguments.prompt}"
    if arguments.model:
        template = Template(arguments.marker, arguments.prompt, arguments.type_names)
        lengths = token_lengths(files, template, arguments.model)
    sections = data_sections(files, lengths, how, arguments.max_length)
    title = ", ".join(f"{name}: {len(rows):,} rows" for name, rows in files.items())
    write_report(title, sections, Path(arguments.out or "runs/eda"))
    if not lengths:
        print("lengths in tokens: name an encoder with --model")


# --- python metrics.py -------------------------------------------------------------------------------------------


def metrics_arguments() -> argparse.Namespace:
    parser = data.Parser(description=metrics.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", help="valid.csv of a run or a submission; or two of the same rows")
    parser.add_argument("--a", nargs="+", default=[], help="files of several seeds, or a pattern, to compare ...")
    parser.add_argument("--b", nargs="+", default=[], help="... with these")
    parser.add_argument("--gold", help="the file with the rows, their sentences and labels; a run's own is found")
    parser.add_argument("--out", help="folder for figures and page (FILE without .csv; of a comparison runs/compare)")
    arguments = parser.parse_args()
    of_files = len(arguments.files) in (1, 2) and not (arguments.a or arguments.b)
    of_sides = arguments.a and arguments.b and not arguments.files
    if not (of_files or of_sides):
        raise InputError("expected one file, or two to compare, or --a FILES --b FILES")
    return arguments


def matching(patterns: list[str], option: str) -> list[str]:
    """The files that the patterns name."""
    paths = [path for pattern in patterns for path in sorted(glob.glob(pattern)) or [pattern]]
    if len(set(paths)) < len(paths):
        raise InputError(f"{option}: names a file twice")
    return paths


def rows_of(file: metrics.Predictions, gold_path: str | None, summary: dict) -> list[Row] | None:
    """The rows that a file predicts: of --gold, else of the file that its run validated on or that it split, or None if
    that is not there. Prints how many of the file's rows they are, if not all. InputError for an id that is not
    in it."""
    settings = summary.get("settings", {})
    if gold_path is None:
        try:
            valid = settings["valid"]
            gold_path = valid if valid.startswith("hub:") else data.data_file(valid or settings["data"], "train")
        except (KeyError, InputError):
            return None
    by_id = {row.id: row for row in data.read_rows(gold_path, [] if settings.get("skip_bad_rows") else None)}
    for line, id in zip(file.lines, file.ids):
        expect(id in by_id, f"{file.path}:{line}", "id", id, f"one of {gold_path}; --gold names the rows' file")
    if len(file.ids) < len(by_id):  # ids alone do not tell another file's rows
        print(f"{file.path}: {len(file.ids):,} of the {len(by_id):,} rows of {gold_path}")
    return [by_id[id] for id in file.ids]


class Loaded(NamedTuple):
    """Files of the same N rows, of each its probabilities (N, C) and predicted classes (N,); their ids, names of the
    classes, gold classes (N,), the rows if they were found."""

    files: list[metrics.Predictions]
    runs: list[tuple[np.ndarray, np.ndarray]]
    ids: list[str]
    labels: list[str]
    gold: np.ndarray
    rows: list[Row] | None


def load(paths: list[str], gold_path: str | None) -> Loaded:
    """Reads and checks files of predictions that belong together."""
    files = [metrics.read_predictions(path) for path in paths]
    metrics.check_alike(files)
    summary = metrics.read_summary(Path(paths[0]).parent)
    names = metrics.class_names(files, summary.get("labels"))
    rows = rows_of(files[0], gold_path, summary)
    told = [row.label for row in rows] if rows and None not in {row.label for row in rows} else None
    if gold_path and not told:
        raise InputError(f"--gold {gold_path}: found rows without a label, expected {len(rows)} with one")
    classes = [metrics.gold_classes(file, names, told) for file in files]
    for file, found in zip(files, classes):
        if (found != classes[0]).any():
            raise InputError(f"{file.path}: other labels than {paths[0]} for the same rows")
    n_labels = files[0].probs.shape[1]
    labels = [names.get(c, f"class {c}") for c in range(n_labels)]
    runs = [(file.probs, np.array([labels.index(label) for label in file.predicted])) for file in files]
    return Loaded(files, runs, files[0].ids, labels, classes[0], rows)


def cases_of(loaded: Loaded, which, runs: list[tuple]) -> list[tuple[str, Row | None]]:
    """Rows to show: id, true label with its probabilities, what each of `runs` predicts."""
    cases = []
    for i in which:
        text = f"{loaded.ids[i]}: true {loaded.labels[loaded.gold[i]]}"
        for probs, predicted in runs:
            p, label = probs[i], loaded.labels[predicted[i]]
            text += f", predicted {label} {p.max():.2f} (true: {p[loaded.gold[i]]:.2f})"
        cases.append((text, loaded.rows[i] if loaded.rows else None))
    return cases


def binned(values: list[int], edges: list[int]) -> tuple[list[str], np.ndarray]:
    """The names of the bins that begin at `edges`, and in which of them each value is."""
    names = [f"{low} to {high - 1}" for low, high in pairwise(edges)] + [f"{edges[-1]} or more"]
    return names, np.digitize(values, edges) - 1


def distance(row: Row) -> int:
    """The characters between the entities, 0 where they touch or overlap."""
    return max(row.subject.start - row.object.end, row.object.start - row.subject.end, 1) - 1


def score_sections(loaded: Loaded) -> list[Section]:
    """The parts of the report on one file of predictions."""
    (probs, predicted), gold, labels, rows = loaded.runs[0], loaded.gold, loaded.labels, loaded.rows
    table = metrics.score_table(probs, predicted, gold)
    note = f"From and to: the middle 95 % of {metrics.DRAWS:,} bootstrap draws."
    if absent := [label for c, label in enumerate(labels) if c not in gold]:
        note += f" The AUPRC leaves out what no row has: {', '.join(absent)}."
    sections = [Section("Scores", note, table, bar_figure(table, ["value"], "%"))]
    of_labels = metrics.label_table(predicted, gold, labels)
    precision, recall = (shown(of_labels[0][name]) for name in ("precision", "recall"))
    note = f"{labels[0]}: precision {precision}, recall {recall}."
    table = metrics.error_table(predicted, gold)
    sections.append(Section(f"{labels[0]} and the errors", note, table, bar_figure(table, ["rows"], "rows")))
    sections.append(Section("Labels", "", of_labels, bar_figure(of_labels, ["F1"], "F1, %")))
    sections.append(Section("Most frequent confusions", "", metrics.confusion_table(predicted, gold, labels)))
    sections.append(Section("Confusion matrix", "", figure=confusion_figure(predicted, gold, labels)))
    sections.append(Section("Precision and recall", "", figure=curves_figure(probs, gold, labels)))
    if rows:
        groups = {}
        for heading, value in (("source", lambda row: row.source or "(none)"), ("types", data.type_pair)):
            groups[heading] = np.unique([value(row) for row in rows], return_inverse=True)
        groups["characters of the sentence"] = binned([len(row.sentence) for row in rows], [0, 50, 75, 100, 150, 200])
        groups["characters between the entities"] = binned(list(map(distance, rows)), [0, 5, 10, 20, 40, 80])
        for heading, (names, group) in groups.items():
            table = metrics.group_table(heading, names, group, predicted, gold)
            figure = bar_figure(table, ["micro F1"], "micro F1, %")
            sections.append(Section(f"By {heading}", "", table, figure))
    note = "Wrong predictions by the probability of the true label, the smallest first."
    cases = cases_of(loaded, metrics.worst_mistakes(probs, predicted, gold, 50), loaded.runs)
    return [*sections, Section("Worst mistakes", note, cases=cases)]


def comparison_sections(loaded: Loaded, n_a: int) -> list[Section]:
    """The parts of the report on two sides; the first n_a of the files are A."""
    gold, a, b = loaded.gold, loaded.runs[:n_a], loaded.runs[n_a:]
    scores = [metrics.score(probs, gold, predicted) for probs, predicted in loaded.runs]
    each = [
        {"side": "A" if i < n_a else "B", "file": file.path}
        | {text: of_run[name] for name, text in metrics.SCORES.items()}
        for i, (file, of_run) in enumerate(zip(loaded.files, scores))
    ]
    table, differences = metrics.compare(a, b, gold)
    note = "\n".join(metrics.verdict(line) for line in table)
    if len(a) == len(b) == 1:
        note += "\nThis is about these two models: whether other seeds would say the same, several seeds a side tell."
    figure = difference_figure(table, differences)
    table = [line | {"p": f"{line['p']:.4f}"} for line in table]
    sections = [Section("Files", "", each), Section("Is one better?", note, table, figure)]
    right = np.array([predicted == gold for _, predicted in loaded.runs])
    all_a, all_b, no_a, no_b = right[:n_a].all(0), right[n_a:].all(0), ~right[:n_a].any(0), ~right[n_a:].any(0)
    what = {"both right": all_a & all_b, "only A right": all_a & no_b, "only B right": no_a & all_b}
    what["both wrong"] = no_a & no_b
    number = {name: int(which.sum()) for name, which in what.items()}
    counts = [{"rows": name, "count": n} for name, n in number.items()]
    note = "Rows on which all runs of a side agree."
    if len(a) == len(b) == 1:
        p = metrics.mcnemar(number["only A right"], number["only B right"])
        luck = "hardly luck" if p < 0.05 else "it could be luck"
        note = f"McNemar's exact test: by luck, a split as uneven would come with p = {p:.4f}: {luck}."
    sections.append(Section("Right and wrong", note, counts, bar_figure(counts, ["count"], "rows")))
    for name in ("only A right", "only B right"):
        cases = cases_of(loaded, np.flatnonzero(what[name]), [a[0], b[0]])
        sections.append(Section(name[0].upper() + name[1:], "Predicted by A, then by B.", cases=cases))
    return sections


@data.exit_on_bad_input
def metrics_report():
    """python metrics.py"""
    arguments = metrics_arguments()
    a, b = arguments.files[:1] or matching(arguments.a, "--a"), arguments.files[1:] or matching(arguments.b, "--b")
    loaded = load([*a, *b], arguments.gold)
    if b:
        title, out = f"A: {', '.join(a)}; B: {', '.join(b)}", arguments.out or "runs/compare"
        sections = comparison_sections(loaded, len(a))
    else:
        title, out = a[0], arguments.out or Path(a[0]).with_suffix("")
        sections = score_sections(loaded)
    write_report(f"{title}: {len(loaded.gold):,} rows", sections, Path(out))
    if loaded.rows is None:
        print("no sentences: --gold names the file with the rows")


# --- TensorBoard -------------------------------------------------------------------------------------------------


def log_evaluation(writer, step: int, probs: np.ndarray, gold: np.ndarray, labels: list[str], rows: list[Row]):
    """What TensorBoard shows of an evaluation beside the scores: a precision-recall curve and the F1 of each label, the
    confusion matrix, the worst mistakes."""
    predicted = probs.argmax(1)
    for c, line in enumerate(metrics.label_table(predicted, gold, labels)):
        if line["rows"]:
            writer.add_pr_curve(f"pr/{line['label']}", gold == c, probs[:, c], step)
            writer.add_scalar(f"label_f1/{line['label']}", line["F1"], step)
    writer.add_figure("confusion matrix", confusion_figure(predicted, gold, labels), step)
    loaded = Loaded([], [(probs, predicted)], [row.id for row in rows], labels, gold, rows)
    cases = cases_of(loaded, metrics.worst_mistakes(probs, predicted, gold), loaded.runs)
    writer.add_text("worst mistakes", "".join(f"    {line}\n" for line in text_cases(cases).splitlines()), step)
