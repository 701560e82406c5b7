"""Reports on data and on predictions: tables in the terminal, and a page with figures.

    python report.py data data/train.csv data/test_data.csv             # one or two data files
    python report.py errors runs/demo/valid.csv                         # where a model is wrong
    python report.py compare runs/a/valid.csv runs/b/valid.csv          # whether B is better
    python report.py compare 'runs/a-*/valid.csv' 'runs/b-*/valid.csv'  # with several seeds
    python report.py folds 'runs/x-fold=*/valid.csv' --out oof.csv      # join the folds
    python report.py labels data/train.csv --oof oof.csv                # labels that may be wrong

`report.py COMMAND -h` lists the options of a command.
"""

# First: it handles Ctrl-C while the others are imported.
from common import InputError, Parser, exit_on_error, expand, expect

# isort: split

import argparse
import inspect
import sys
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np

import analysis
import calibration
import figures
import labels
import metrics
from data import MARKERS, PROMPTS, TYPE_NAMES, Template, with_label_names
from page import Section, format_cell, write_report
from rows import Row, data_file, read_rows

# --- report.py data ---------------------------------------------------------------------------


def report_data(arguments: argparse.Namespace):
    """Describe one data file, or two side by side.

    Number of rows by label, source and entity types; repeated rows; rows shared by two files.
    With --model, lengths in tokens too.
    """
    paths = arguments.files
    if len(paths) > 2 or len(set(paths)) < len(paths):
        raise InputError(f"data: found {len(paths)} files, expected one or two different ones")
    names = [Path(path).name for path in paths]
    names = names if len(set(names)) == len(names) else paths
    order = arguments.label_order
    files = {name: with_label_names(read_rows(path), order) for name, path in zip(names, paths)}
    labelled = {name: rows for name, rows in files.items() if any(row.label for row in rows)}
    columns = {
        "label": (labelled, lambda row: row.label),
        "source": (files, lambda row: row.source),
        "type of the subject": (files, lambda row: row.subject.type),
        "type of the object": (files, lambda row: row.object.type),
        "types of subject and object": (files, analysis.type_pair),
    }
    sections = []
    for heading, (counted, value) in columns.items():
        if counted:
            table = analysis.count_table(counted, heading, value)
            figure = figures.bar_figure(table, [f"{name} %" for name in counted], "% of the rows")
            sections.append(Section(f"By {heading}", "", table, figure))
    for name, rows in labelled.items():
        table = analysis.cross_table(rows)
        sections.append(Section(f"Labels and types of {name}", "Number of rows.", table))
    note = "Rows that repeat all of the named fields of an earlier row of the file.\n"
    note += "Entities are the same if their words, offsets and types are."
    sections.append(Section("Repeated rows", note, analysis.repeat_table(files)))
    if len(files) == 2:
        sections.append(Section("Shared by both files", "", analysis.shared_table(files)))
    if arguments.model:
        template = Template(arguments.marker, arguments.prompt, arguments.type_names)
        lengths, limit = token_lengths(files, template, arguments.model), arguments.max_length
        note = f"{arguments.model}, --marker {arguments.marker}, --prompt {arguments.prompt}"
        table, figure = analysis.length_table(lengths, limit), figures.length_figure(lengths, limit)
        sections.append(Section("Lengths in tokens", note, table, figure))
    title = ", ".join(f"{name}: {len(rows):,} rows" for name, rows in files.items())
    write_report(title, sections, Path(arguments.out))


def token_lengths(files, template: Template, model: str) -> dict[str, np.ndarray]:
    """{file: number of tokens of each row (N,), without truncation}."""
    from encoder import add_markers, load_tokenizer  # torch takes seconds to import
    from tokens import encode
    from vocabulary import unknown_in_rows

    tokenizer, lengths = load_tokenizer(model), {}
    for name, rows in files.items():
        add_markers(tokenizer, template, rows)
        examples, _ = encode(rows, template, tokenizer, [], sys.maxsize)
        for line in unknown_in_rows(tokenizer, rows, template):
            print(f"{name}: {line}")
        lengths[name] = np.array([len(example.ids) for example in examples])
    return lengths


# --- files of predictions ---------------------------------------------------------------------


class Loaded(NamedTuple):
    """Files of predictions for the same N rows and C classes."""

    files: list[metrics.Predictions]
    runs: list[tuple[np.ndarray, np.ndarray]]  # per file: probs (N, C), predicted classes (N,)
    labels: list[str]  # (C,)
    gold: np.ndarray  # (N,) classes
    rows: list[Row] | None  # None if the data file is unknown

    def cases(self, which, runs: list[tuple]) -> list[tuple[str, Row | None]]:
        ids = self.files[0].ids
        return analysis.list_cases(which, ids, self.rows, self.gold, self.labels, runs)

    def write_report(self, title: str, sections: list[Section], out: str | Path):
        write_report(f"{title}: {len(self.gold):,} rows", sections, Path(out))
        if self.rows is None:
            print("no sentences: use --gold FILE with the rows")


def load(paths: list[str], gold_path: str | None, label_order: str = "") -> Loaded:
    """Read files of predictions, their rows and gold labels; check that they fit together."""
    files = metrics.aligned([metrics.read_predictions(path) for path in paths])
    summary = metrics.read_summary(Path(paths[0]).parent)
    names = metrics.class_names(files, summary.get("labels"))
    rows = find_rows(files[0], gold_path, summary)
    rows = rows and with_label_names(
        rows, label_order or summary.get("settings", {}).get("label_order", "")
    )
    for row in rows or []:
        expect(row.label, row.where, "label", row.label, "a label in each row")
    told = rows and [(row.where, row.label) for row in rows]
    if not told and files[0].gold:
        told = [(f"{paths[0]}:{line}", x) for line, x in zip(files[0].lines, files[0].gold)]
    gold, *_ = (metrics.gold_classes(file, names, told) for file in files)  # all the same
    labels = [names.get(c, f"class {c}") for c in range(files[0].probs.shape[1])]
    runs = [(file.probs, np.array(list(map(labels.index, file.predicted)))) for file in files]
    return Loaded(files, runs, labels, gold, rows)


def find_rows(file: metrics.Predictions, gold_path: str | None, summary: dict) -> list[Row] | None:
    """The rows that a file predicts: of --gold, or of the data file that its run used, or None.

    If these are not all rows of the data file, say so: ids do not prove that it is the right one.
    """
    settings, unique_ids = summary.get("settings", {}), gold_path is not None
    if gold_path is None:
        try:
            valid, data = settings["valid"], settings["data"]
            # --valid may be HUB/SPLIT, while --data is HUB
            gold_path = valid if valid.startswith("hub:") else data_file(valid or data, "train")
        except (KeyError, InputError):
            return None
    skipped = [] if settings.get("skip_bad_rows") else None
    row_of = {}  # by id; in training files the first row that has it: the others are copies
    for row in read_rows(gold_path, skipped, unique_ids=unique_ids):
        row_of.setdefault(row.id, row)
    for line, row_id in zip(file.lines, file.ids):
        expected = f"an id of {gold_path}; use --gold FILE with the rows"
        expect(row_id in row_of, f"{file.path}:{line}", "id", row_id, expected)
    if len(file.ids) < len(row_of):
        print(f"{file.path}: {len(file.ids):,} of the {len(row_of):,} rows of {gold_path}")
    return [row_of[row_id] for row_id in file.ids]


# --- report.py errors -------------------------------------------------------------------------


def report_errors(arguments: argparse.Namespace):
    """Describe the errors in one file of predictions.

    Scores with 95 % intervals, by label and by group of rows; confusions; precision-recall
    curves; calibration; the worst mistakes.
    """
    loaded = load([arguments.file], arguments.gold, arguments.label_order)
    (probs, predicted), gold, labels = loaded.runs[0], loaded.gold, loaded.labels
    table = analysis.score_table(probs, predicted, gold)
    note = f"From, to: 95 % interval of {analysis.DRAWS:,} bootstrap draws."
    if absent := [label for c, label in enumerate(labels) if c not in gold]:
        note += f" AUPRC without {', '.join(absent)}: no such row."
    sections = [Section("Scores", note, table, figures.bar_figure(table, ["value"], "%"))]

    classes = predicted, gold, labels
    table = analysis.label_table(*classes)
    precision, recall = (format_cell(table[0][name]) for name in ("precision", "recall"))
    note = f"{labels[0]}: precision {precision}, recall {recall}."
    sections += [
        Section("Kinds of errors", note, analysis.error_table(predicted, gold)),
        Section("Labels", "", table, figures.bar_figure(table, ["F1"], "F1, %")),
        Section("Most frequent confusions", "", analysis.confusion_table(*classes)),
        Section("Confusion matrix", figure=figures.confusion_figure(*classes)),
        Section("Precision-recall curves", figure=figures.curves_figure(probs, gold, labels)),
        *calibration_sections(probs, predicted, gold),
    ]
    if loaded.rows:
        for heading, (names, group) in groups_of(loaded.rows).items():
            table = analysis.group_table(heading, names, group, predicted, gold)
            figure = figures.bar_figure(table, ["micro F1"], "micro F1, %")
            sections.append(Section(f"By {heading}", "", table, figure))
    note = "Wrong predictions, the lowest probability of the gold label first."
    worst = loaded.cases(analysis.worst_mistakes(probs, predicted, gold, 50), loaded.runs)
    sections.append(Section("Worst mistakes", note, cases=worst))
    out = arguments.out or Path(arguments.file).with_suffix("")
    loaded.write_report(arguments.file, sections, out)


def calibration_sections(probs, predicted, gold) -> list[Section]:
    """How far the probabilities can be trusted before and after a temperature, and thresholds."""
    each, right = np.arange(len(gold)), predicted == gold
    before, after = probs[each, predicted], calibration.cross_fitted(probs, gold)[each, predicted]
    tables = [calibration.reliability_table(p, right) for p in (before, after)]
    errors = [calibration.expected_calibration_error(p, right) for p in (before, after)]
    temperature = calibration.fit_temperature(probs, gold)
    note = f"Expected calibration error: {errors[0]:.2f} % before, {errors[1]:.2f} % after a"
    note += f" temperature of {temperature:.2f}. Each half of the rows has the temperature that"
    note += " was fitted on the other half. The table is of the probabilities after it."
    kept = calibration.threshold_table(after, predicted, gold)
    text = "Relations predicted with at least this probability, after the temperature."
    return [
        Section("Calibration", note, tables[1], figures.reliability_figure(*tables)),
        Section("Thresholds", text, kept),
    ]


def groups_of(rows: list[Row]) -> dict[str, tuple[list[str], np.ndarray]]:
    """{heading: (names of groups, the group of each row (N,))}."""
    sources, types = [row.source or "(none)" for row in rows], list(map(analysis.type_pair, rows))
    lengths, distances = [len(row.sentence) for row in rows], list(map(distance, rows))
    return {
        "source": np.unique(sources, return_inverse=True),
        "types": np.unique(types, return_inverse=True),
        "characters of the sentence": binned(lengths, [0, 50, 75, 100, 150, 200]),
        "characters between the entities": binned(distances, [0, 5, 10, 20, 40, 80]),
    }


def binned(values: list[int], edges: list[int]) -> tuple[list[str], np.ndarray]:
    """The names of the bins that start at `edges`, and the bin of each value (N,)."""
    names = [f"{low} to {high - 1}" for low, high in pairwise(edges)]
    return [*names, f"{edges[-1]} or more"], np.digitize(values, edges) - 1


def distance(row: Row) -> int:
    """The number of characters between the entities; 0 if they touch or overlap."""
    return max(row.subject.start - row.object.end, row.object.start - row.subject.end, 1) - 1


# --- report.py compare ------------------------------------------------------------------------


def report_comparison(arguments: argparse.Namespace):
    """Test whether predictions B are better than predictions A of the same rows.

    A paired bootstrap over rows and runs; the rows that only one side gets right. With one file
    per side, McNemar's exact test too.
    """
    if arguments.unquoted:
        found = f"found {2 + len(arguments.unquoted)} files, expected A and B"
        raise InputError(f"compare: {found}; quote patterns, such as 'runs/a-*/valid.csv'")
    a, b = (expand(side) for side in (arguments.a, arguments.b))
    if in_both := set(a) & set(b):
        raise InputError(f"{min(in_both)}: found in both A and B, expected different files")
    loaded = load([*a, *b], arguments.gold, arguments.label_order)
    gold, runs_a, runs_b = loaded.gold, loaded.runs[: len(a)], loaded.runs[len(a) :]
    one_each = len(a) == len(b) == 1
    of_files = []
    for path, (probs, predicted) in zip([*a, *b], loaded.runs):
        scores = metrics.score(probs, gold, predicted)
        titled = {title: scores[name] for name, title in analysis.SCORES.items()}
        of_files.append({"side": "A" if path in a else "B", "file": path} | titled)
    table, differences = analysis.compare(runs_a, runs_b, gold)
    note = "\n".join(map(analysis.verdict, table))
    if one_each:
        note += "\nThis holds for these two models only: several seeds per side compare methods."
    figure = figures.difference_figure(table, differences)
    table = [line | {"p": f"{line['p']:.4f}"} for line in table]
    sections = [Section("Files", "", of_files), Section("Is B better?", note, table, figure)]

    right_a, right_b = (  # the share of a side's runs that are right, for each row
        np.mean([predicted == gold for _, predicted in runs], 0) for runs in (runs_a, runs_b)
    )
    which = {
        "both right": np.flatnonzero((right_a == 1) & (right_b == 1)),
        "only A right": np.flatnonzero((right_a == 1) & (right_b == 0)),
        "only B right": np.flatnonzero((right_a == 0) & (right_b == 1)),
        "both wrong": np.flatnonzero((right_a == 0) & (right_b == 0)),
    }
    note = "Rows that all runs of a side get right, or none does."
    if one_each:
        p = analysis.mcnemar(len(which["only A right"]), len(which["only B right"]))
        significant = "significant" if p < 0.05 else "not significant"
        note = f"McNemar's exact test of the two accuracies: p = {p:.4f}, {significant}."
    table = [{"rows": name, "count": len(rows)} for name, rows in which.items()]
    sections.append(Section("Right and wrong", note, table))
    for side in "AB":
        cases = loaded.cases(which[f"only {side} right"], [runs_a[0], runs_b[0]])
        note = "The prediction of A, then of B."
        sections.append(Section(f"Only {side} right", note, cases=cases))
    loaded.write_report(f"A: {', '.join(a)}; B: {', '.join(b)}", sections, arguments.out)


# --- program ----------------------------------------------------------------------------------


def parse_arguments() -> argparse.Namespace:
    parser = Parser(description=__doc__)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def add_command(name: str, report) -> argparse.ArgumentParser:
        text = inspect.getdoc(report)
        command = commands.add_parser(name, description=text, help=text.splitlines()[0])
        command.set_defaults(report=report)
        return command

    data = add_command("data", report_data)
    data.add_argument("files", nargs="+", metavar="FILE", help="a data file, or two")
    data.add_argument("--model", help="encoder whose tokens are counted: a folder or a hub name")
    for option, choices in (("marker", MARKERS), ("prompt", PROMPTS), ("type-names", TYPE_NAMES)):
        default = getattr(Template(), option.replace("-", "_"))
        text = f"with --model, as in train.py (default: {default})"
        data.add_argument(f"--{option}", default=default, choices=choices, help=text)
    text = "with --model, count the rows with more tokens (default: 256)"
    data.add_argument("--max-length", type=int, default=256, metavar="N", help=text)
    data.add_argument("--out", default="runs/eda", help="folder of the page (default: runs/eda)")

    errors = add_command("errors", report_errors)
    errors.add_argument("file", metavar="FILE", help="valid.csv of a run, or a submission")
    errors.add_argument("--out", help="folder of the page (default: FILE without .csv)")

    compare = add_command("compare", report_comparison)
    text = "a file of predictions, or a quoted pattern such as 'runs/a-*/valid.csv'"
    compare.add_argument("a", metavar="A", help=text)
    compare.add_argument("b", metavar="B", help="the same for the other side")
    compare.add_argument("unquoted", nargs="*", help=argparse.SUPPRESS)
    text = "folder of the page (default: runs/compare)"
    compare.add_argument("--out", default="runs/compare", help=text)
    labels.add_commands(add_command)
    for command in (errors, compare):
        text = "data file with the rows and labels (default: the one that the run used)"
        command.add_argument("--gold", metavar="FILE", help=text)
    for command in (data, errors, compare):
        text = "what labels that are class numbers mean, as in train.py"
        command.add_argument("--label-order", default="", metavar="ORDER", help=text)
    return parser.parse_args()


@exit_on_error
def main():
    arguments = parse_arguments()
    arguments.report(arguments)


if __name__ == "__main__":
    main()
