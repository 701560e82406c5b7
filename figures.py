"""Figures of tables and predictions, drawn by matplotlib and scikit-learn without a display.

    bar_figure(score_table(probs, predicted, gold), ["value"], "%").savefig("scores.png")
    log_evaluation(writer, step, probs, gold, labels, rows)  # for TensorBoard

Korean names need an installed font that has Korean. Without one, a name is replaced by its number
in the table. Figures are at most 1100 pixels wide.
"""

import functools
import sys
import textwrap
from contextlib import suppress

import matplotlib
import numpy as np
from matplotlib import font_manager
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from sklearn.metrics import auc, confusion_matrix, precision_recall_curve

from analysis import label_table, list_cases, worst_mistakes
from page import format_cell, text_cases
from rows import Row

BARS = 50  # at most, in a figure
COLOURS = ("#3566a8", "#d9822b")  # of the first and the second file
matplotlib.rcParams.update({"font.size": 8, "axes.spines.top": False, "axes.spines.right": False})

# --- fonts ------------------------------------------------------------------------------------


@functools.cache
def drawable_characters() -> set[int]:
    """Let matplotlib use an installed Korean font, if any; the characters that it can draw."""
    fonts = ["DejaVu Sans"]  # comes with matplotlib
    characters = set(font_manager.get_font(font_manager.findfont(fonts[0])).get_charmap())
    paths = font_manager.findSystemFonts()
    for path in sorted(paths, key=lambda p: ("NanumGothic." not in p, "Regular" not in p, p)):
        with suppress(RuntimeError, OSError):  # a font that matplotlib cannot read
            found = set(font_manager.get_font(path).get_charmap())
            if found >= {ord("가"), ord("힣")}:
                font_manager.fontManager.addfont(path)
                fonts.append(font_manager.FontProperties(fname=path).get_name())
                characters |= found
                break
    matplotlib.rcParams["font.family"] = fonts
    return characters


@functools.cache
def warn_of_missing_font():
    hint = "install a Korean font, such as Debian's fonts-nanum"
    print(f"figures: no font has all letters; some names become numbers; {hint}", file=sys.stderr)


def drawable(names: list[str]) -> list[str]:
    """The names as figures can draw them: short, and "#3" for the third if no font has it."""
    out = []
    for i, name in enumerate(map(format_cell, names), 1):
        if not drawable_characters().issuperset(map(ord, name)):
            warn_of_missing_font()
            name = f"#{i}"
        name = name if len(name) <= 40 else f"{name[:39]}…"
        out.append(name.replace("$", r"\$"))  # matplotlib reads $...$ as a formula
    return out


# --- figures ----------------------------------------------------------------------------------


def new_figure(width: float, height: float, **grid):
    """A figure of this size in inches (100 pixels each), and its axes."""
    drawable_characters()  # chooses the font
    figure = Figure((width, height), dpi=100, layout="constrained")
    return figure, figure.subplots(**grid)


def bar_figure(table: list[dict], columns: list[str], x_label: str) -> Figure:
    """Bars of one or two columns of a table, with intervals if it has "from" and "to"."""
    if len(table) > BARS:
        x_label += f" (the first {BARS} of {len(table)} lines of the table)"
    table = table[:BARS]
    figure, axis = new_figure(5.2, 0.9 + len(table) * (0.12 + 0.14 * len(columns)))
    at, thickness = np.arange(len(table)), 0.8 / len(columns)
    for i, (column, title) in enumerate(zip(columns, drawable(columns))):
        values = [line[column] for line in table]
        y = at + (i - (len(columns) - 1) / 2) * thickness
        axis.barh(y, values, thickness, color=COLOURS[i], label=title)
    if "from" in table[0]:
        low, high = ([line[end] for line in table] for end in ("from", "to"))
        axis.hlines(at, low, high, color="black")
    axis.set_yticks(at, drawable([next(iter(line.values())) for line in table]))
    axis.set_ylim(len(table) - 0.4, -0.6)
    axis.set_xlabel(x_label)
    if len(columns) > 1:
        axis.legend()
    return figure


def confusion_figure(predicted: np.ndarray, gold: np.ndarray, labels: list[str]) -> Figure:
    """The confusion matrix (rows: gold, columns: predicted), on a logarithmic colour scale."""
    matrix = confusion_matrix(gold, predicted, labels=range(len(labels)))
    side = min(0.28 * len(labels), 8.2)  # of the matrix, in inches
    size = min(8, 72 * side / len(labels))  # of the letters
    figure, axis = new_figure(side + 2.5, side + 2.5)
    top = max(matrix.max(), 2)
    axis.imshow(matrix, cmap="Blues", norm=LogNorm(0.7, top))
    for g, p in np.argwhere(matrix):
        style = {"ha": "center", "va": "center", "fontsize": size - 1}
        style["color"] = "white" if matrix[g, p] > top**0.6 else "black"
        axis.text(p, g, matrix[g, p], **style)
    ticks, names = range(len(labels)), drawable(labels)
    axis.set_xticks(ticks, names, fontsize=size, rotation=60, ha="right", rotation_mode="anchor")
    axis.set_yticks(ticks, names, fontsize=size)
    axis.set(xlabel="predicted", ylabel="gold")
    return figure


def curves_figure(probs: np.ndarray, gold: np.ndarray, labels: list[str]) -> Figure:
    """A grid of precision-recall curves, for the labels in `gold`, most frequent first."""
    counts = np.bincount(gold, minlength=len(labels))
    present = [c for c in np.argsort(-counts, kind="stable") if counts[c]]
    n_rows, names = -(-len(present) // 5), drawable(labels)
    grid = {"nrows": n_rows, "ncols": 5, "sharex": True, "sharey": True, "squeeze": False}
    figure, axes = new_figure(10.8, 0.8 + 2 * n_rows, **grid)
    for axis, c in zip(axes.flat, present):
        precision, recall, _ = precision_recall_curve(gold == c, probs[:, c])
        axis.plot(recall, precision, color=COLOURS[0])
        axis.fill_between(recall, precision, color=COLOURS[0], alpha=0.2)
        area = 100 * auc(recall, precision)
        axis.set_title(f"{names[c]}\narea {area:.1f}, {counts[c]} rows", fontsize=7)
    for axis in axes.flat[len(present) :]:
        axis.set_visible(False)
    figure.supxlabel("recall")
    figure.supylabel("precision")
    return figure


def reliability_figure(before: list[dict], after: list[dict]) -> Figure:
    """Accuracy against mean probability of two tables of `calibration.reliability_table`."""
    figure, axis = new_figure(4.6, 4.4)
    axis.plot([0, 100], [0, 100], color="black", linewidth=1, linestyle="--", label="calibrated")
    for table, title, colour in zip((before, after), ("before", "after"), COLOURS[::-1]):
        mean, accuracy = ([line[name] for line in table] for name in ("mean", "accuracy"))
        axis.plot(mean, accuracy, "o-", color=colour, label=title)
    axis.set(xlabel="mean probability of the prediction, %", ylabel="accuracy, %")
    axis.legend()
    return figure


def length_figure(lengths: dict[str, np.ndarray], limit: int) -> Figure:
    """Histograms of the files' lengths in tokens, and the limit."""
    figure, axis = new_figure(6.6, 3.2)
    shares = [np.full(len(n), 100 / len(n)) for n in lengths.values()]
    style = {"histtype": "stepfilled", "alpha": 0.5, "color": COLOURS[: len(lengths)]}
    axis.hist(list(lengths.values()), 60, weights=shares, label=drawable(list(lengths)), **style)
    axis.axvline(limit, color="black", linewidth=1, linestyle="--", label=f"--max-length {limit}")
    axis.set(xlabel="tokens", ylabel="% of the rows")
    axis.legend()
    return figure


def difference_figure(table: list[dict], differences: dict[str, np.ndarray]) -> Figure:
    """Histograms of the result of `analysis.compare`, with the 95 % interval shaded."""
    figure, axes = new_figure(10, 2.8, ncols=len(table))
    for axis, line, drawn in zip(axes, table, differences.values()):
        axis.hist(drawn, 40, color=COLOURS[0])
        axis.axvspan(line["from"], line["to"], color=COLOURS[0], alpha=0.2)
        axis.axvline(0, color="black", linewidth=1, linestyle="--")
        axis.set(title=f"{line['score']}, p = {line['p']:.3f}", xlabel="B - A, points", yticks=[])
    return figure


# --- TensorBoard ------------------------------------------------------------------------------


def log_evaluation(writer, step: int, probs, gold, labels: list[str], rows: list[Row]):
    """Write to TensorBoard: precision-recall curve and F1 of each label, confusion matrix, worst
    mistakes. probs (N, C), gold (N,) class numbers, N rows."""
    predicted = probs.argmax(1)
    for c, line in enumerate(label_table(predicted, gold, labels)):
        if line["rows"]:
            writer.add_pr_curve(f"pr/{line['label']}", gold == c, probs[:, c], step)
            writer.add_scalar(f"valid_label_f1/{line['label']}", line["F1"], step)
    writer.add_figure("confusion matrix", confusion_figure(predicted, gold, labels), step)
    ids, worst = [row.id for row in rows], worst_mistakes(probs, predicted, gold)
    cases = text_cases(list_cases(worst, ids, rows, gold, labels, [(probs, predicted)]))
    writer.add_text("worst mistakes", textwrap.indent(cases, "    "), step)  # a code block
