"""Figures of tables and predictions, drawn by matplotlib and scikit-learn without a display.

    bar_figure(score_table(probs, predicted, gold), ["value"], "%").savefig("scores.png")
    log_evaluation(writer, step, probs, gold, labels, rows)  # for TensorBoard

Korean names need an installed font that has Korean. Without one, a name is replaced by its number
in the table. Figures are at most 1100 pixels wide.
"""

import functools
import sys
from contextlib import suppress

import matplotlib
import numpy as np
from matplotlib import font_manager
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from sklearn.metrics import (
    ConfusionMatrixDisplay,
    PrecisionRecallDisplay,
    auc,
    confusion_matrix,
    precision_recall_curve,
)

from analysis import label_table, list_cases, worst_mistakes
from page import format_cell, text_cases
from rows import Row

BARS = 50  # at most, in a figure
COLOURS = ("#3566a8", "#d9822b")  # of the first and the second file

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
    drawable_characters()
    figure = Figure((width, height), dpi=100, layout="constrained")
    axes = figure.subplots(**grid)
    for axis in np.ravel(axes):
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8, length=2)
    return figure, axes


def bar_figure(table: list[dict], columns: list[str], x_label: str) -> Figure:
    """Bars of one or two columns of a table, with error bars if it has "from" and "to"."""
    table = table[:BARS]
    figure, axis = new_figure(5.2, 0.9 + len(table) * (0.12 + 0.14 * len(columns)))
    at, thickness = np.arange(len(table)), 0.8 / len(columns)
    for i, (column, title) in enumerate(zip(columns, drawable(columns))):
        values = np.array([line[column] for line in table])
        y = at + (i - (len(columns) - 1) / 2) * thickness
        bars = axis.barh(y, values, thickness, color=COLOURS[i], label=title)
        if "from" in table[0]:
            errors = np.abs(values - np.array([(line["from"], line["to"]) for line in table]).T)
            axis.errorbar(values, y, xerr=errors, fmt="none", ecolor="black", lw=1, capsize=2)
        else:
            axis.bar_label(bars, list(map(format_cell, values)), fontsize=7, padding=2)
    axis.set_yticks(at, drawable([next(iter(line.values())) for line in table]))
    axis.set_ylim(len(table) - 0.4, -0.6)
    axis.margins(x=0.1)
    axis.set_xlabel(x_label, fontsize=9)
    if len(columns) > 1:
        axis.legend(fontsize=8)
    return figure


def confusion_figure(predicted: np.ndarray, gold: np.ndarray, labels: list[str]) -> Figure:
    """The confusion matrix (rows: gold, columns: predicted), on a logarithmic colour scale."""
    matrix = confusion_matrix(gold, predicted, labels=range(len(labels)))
    side = min(0.28 * len(labels), 8.2)  # of the matrix, in inches
    size = min(8, 72 * side / len(labels))
    figure, axis = new_figure(side + 2.5, side + 2.5)
    display = ConfusionMatrixDisplay(matrix, display_labels=drawable(labels))
    top = max(matrix.max(), 2)
    display.plot(
        ax=axis, cmap="Blues", colorbar=False, values_format="d",
        im_kw={"norm": LogNorm(0.7, top)}, text_kw={"fontsize": size - 1, "clip_on": True},
    )  # fmt: skip
    for text, count in zip(display.text_.flat, matrix.flat):
        text.set_visible(count > 0)
        text.set_color("white" if count > top**0.6 else "black")
    axis.tick_params(labelsize=size)
    for label in axis.get_xticklabels():
        label.set(rotation=60, ha="right", rotation_mode="anchor")
    axis.set_xlabel("predicted", fontsize=9)
    axis.set_ylabel("gold", fontsize=9)
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
        display = PrecisionRecallDisplay(precision, recall)
        display.plot(axis)
        display.line_.set(color=COLOURS[0], drawstyle="default")  # straight, as the AUPRC takes it
        axis.fill_between(recall, precision, color=COLOURS[0], alpha=0.2)
        area = 100 * auc(recall, precision)
        axis.set_title(f"{names[c]}\narea {area:.1f}, {counts[c]} rows", fontsize=7)
        axis.set(xlabel="", ylabel="", aspect="auto")
    for axis in axes.flat[len(present) :]:
        axis.set_visible(False)
    figure.supxlabel("recall", fontsize=9)
    figure.supylabel("precision", fontsize=9)
    return figure


def length_figure(lengths: dict[str, np.ndarray], limit: int) -> Figure:
    """Histograms of the files' lengths in tokens, and the limit."""
    figure, axis = new_figure(6.6, 3.2)
    edges = np.linspace(0, max(limit, *(n.max() for n in lengths.values())) + 1, 60)
    for colour, title, n in zip(COLOURS, drawable(list(lengths)), lengths.values()):
        shares = np.full(len(n), 100 / len(n))
        axis.hist(n, edges, weights=shares, alpha=0.5, color=colour, label=title)
    axis.axvline(limit, color="black", linewidth=1, linestyle="--", label=f"--max-length {limit}")
    axis.set_xlabel("tokens", fontsize=9)
    axis.set_ylabel("% of the rows", fontsize=9)
    axis.legend(fontsize=8)
    return figure


def difference_figure(table: list[dict], differences: dict[str, np.ndarray]) -> Figure:
    """Histograms of the result of `analysis.compare`; the 95 % interval has the full colour."""
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


# --- TensorBoard ------------------------------------------------------------------------------


def log_evaluation(writer, step: int, probs, gold, labels: list[str], rows: list[Row]):
    """Write to TensorBoard: precision-recall curve and F1 of each label, confusion matrix, worst
    mistakes. probs (N, C), gold (N,) class numbers, N rows."""
    predicted = probs.argmax(1)
    for c, line in enumerate(label_table(predicted, gold, labels)):
        if line["rows"]:
            writer.add_pr_curve(f"pr/{line['label']}", gold == c, probs[:, c], step)
            writer.add_scalar(f"label_f1/{line['label']}", line["F1"], step)
    writer.add_figure("confusion matrix", confusion_figure(predicted, gold, labels), step)
    ids, worst = [row.id for row in rows], worst_mistakes(probs, predicted, gold)
    cases = text_cases(list_cases(worst, ids, rows, gold, labels, [(probs, predicted)]))
    code_block = "".join(f"    {line}\n" for line in cases.splitlines())
    writer.add_text("worst mistakes", code_block, step)
