"""Rows whose label is probably wrong, and the out-of-fold probabilities that show it.

    files, labels = read_folds(["runs/x-folds=5-fold=0/valid.csv", ...], print)
    suspects = find_suspects(rows, labels, file)
    write_suspects(Path("runs/labels/rows.csv"), suspects)

Probabilities must come from models that were not trained on the row: a model repeats the labels
that it has learned, right or wrong.
"""

import argparse
from collections import Counter
from dataclasses import fields
from itertools import chain, combinations
from pathlib import Path
from typing import NamedTuple

import numpy as np

from analysis import type_pair
from common import (
    InputError,
    atomic_write,
    csv_text,
    expand,
    expect,
    optional_import,
    read_text,
    shorten,
)
from data import find_labels, with_known_labels, with_label_names
from metrics import (
    Predictions,
    describe,
    gold_classes,
    read_summary,
    score,
    write_predictions,
)
from page import Section, write_report
from rows import Row, compose, read_rows
from settings import Settings
from targets import check_labels, read_probabilities

ALIKE = 0.7  # from this share of common character trigrams on, sentences are near-duplicates
RARE, ENOUGH = 0.01, 100  # a type pair is rare below this share of a label with so many rows
NAMED = [f.name for f in fields(Settings) if f.metadata["named"] and f.name not in ("data", "fold")]

# --- folds ------------------------------------------------------------------------------------


def read_folds(paths: list[str], log) -> tuple[list[Predictions], list[str]]:
    """(the valid.csv of each fold, labels).

    InputError if a fold is missing or there twice, or if the folds are not of the same rows and
    labels. `log` is told of runs that have not finished, and of other settings.
    """
    files, fold_of = {}, {}  # {fold: file}, {id: path}
    for path in paths:
        summary = read_summary(Path(path).parent)
        settings, labels = summary.get("settings", {}), summary.get("labels")
        folds, fold = settings.get("folds", 0), settings.get("fold")
        expected = "the valid.csv of a train.py --folds, beside its summary.json"
        expect(folds and labels, path, "folds", folds, expected)
        about = {"folds": folds, "clean": settings["clean"], "labels": labels}
        about["rows"] = summary["version"]["content"]
        if not files:
            same, first = about, settings
        for name, found in about.items():
            expected = f"{shorten(same[name])} as in {paths[0]}"
            expect(found == same[name], path, name, found, expected)
        expect(fold not in files, path, "fold", fold, "each fold once")
        if not summary.get("finished"):
            log(f"{path}: its run has not finished")
        other = [name for name in NAMED if settings.get(name) != first.get(name)]
        if settings.get("demo"):  # each of its runs makes its encoder
            other = [name for name in other if name != "model"]
        if other:
            log(f"{path}: its run has other settings than that of {paths[0]}: {', '.join(other)}")
        files[fold] = file = read_probabilities(path, labels, "its summary.json", log)
        expect(file.gold, path, "header", "no column label", "that of a valid.csv")
        for line, row_id in zip(file.lines, file.ids):
            expected = f"no id of {fold_of.get(row_id)}"
            expect(row_id not in fold_of, f"{path}:{line}", "id", row_id, expected)
        fold_of |= dict.fromkeys(file.ids, path)
    if missing := set(range(folds)) - set(files):
        expected = f"all {folds} folds"
        found = f"found no fold {', '.join(map(str, sorted(missing)))}"
        raise InputError(f"{paths[0]}: {found}, expected {expected}; train.py --fold trains one")
    return [files[fold] for fold in sorted(files)], labels


# --- suspects ---------------------------------------------------------------------------------


class Suspects(NamedTuple):
    """Rows whose label may be wrong, by three signs. `rows` are all rows of the file."""

    rows: list[Row]
    labels: list[str]
    probs: dict[str, np.ndarray]  # {id: probabilities (C,)}, of the rows that have some
    issues: dict[str, float]  # {id: probability of the label}, worst first
    confusions: list[dict]  # table: how often which label is another
    alike: list[tuple[float, Row, Row]]  # (similarity, rows with different labels), most first
    rare: list[tuple[int, Row]]  # (rows of its label with its types, row), fewest first

    def likely(self, row: Row) -> str:
        """The most probable label; the given one without probabilities."""
        return self.labels[self.probs[row.id].argmax()] if row.id in self.probs else row.label


def find_suspects(rows: list[Row], labels: list[str], file: Predictions) -> Suspects:
    """The suspects among `rows` with different ids; `file` has the probabilities of some of them.

    By the cleanlab library. A row is an issue if its label is not the most probable one. The worst
    one's label is the least probable: docs/experiments.md has other choices and orders. Confusions
    are those of confident learning (Northcutt et al. 2021): the threshold of a label is its mean
    probability over the rows that have it, and a row is counted under its most probable label among
    those that reach their threshold.

    InputError unless the rows with probabilities have at least two labels.
    """
    cleanlab = optional_import("cleanlab", "report.py labels")
    for module in ("count", "filter", "rank"):
        optional_import(f"cleanlab.{module}", "report.py labels")
    label_of = {row.id: row.label for row in rows}
    gold, probs = np.array([labels.index(label_of[i]) for i in file.ids]), file.probs
    if len(set(gold)) == 1:
        found = f"found {labels[gold[0]]} as the label of all {len(gold)} rows"
        raise InputError(f"{file.path}: {found}, expected at least two labels")
    joint = cleanlab.count.compute_confident_joint(gold, probs, calibrate=False)
    how = {"filter_by": "predicted_neq_given", "return_indices_ranked_by": "self_confidence"}
    order = cleanlab.filter.find_label_issues(gold, probs, **how, n_jobs=1)
    quality = cleanlab.rank.get_label_quality_scores(gold, probs, method="self_confidence")
    n_rows, confusions = np.bincount(gold, minlength=len(labels)), []
    for given, likely in np.argwhere((joint > 0) & ~np.eye(len(labels), dtype=bool)):
        n = joint[given, likely]
        line = {"label": labels[given], "likely": labels[likely], "rows": int(n)}
        confusions.append(line | {"% of the label": 100 * n / n_rows[given]})
    confusions.sort(key=lambda line: -line["rows"])
    issues = {file.ids[i]: float(quality[i]) for i in order}
    by_id = dict(zip(file.ids, probs))
    return Suspects(rows, labels, by_id, issues, confusions, alike(rows), rare(rows, labels[0]))


def alike(rows: list[Row]) -> list[tuple[float, Row, Row]]:
    """Pairs of rows with the same entities, similar sentences and different labels."""
    groups, found = {}, []
    for row in rows:
        groups.setdefault((row.subject.word, row.object.word), []).append(row)
    for group in groups.values():
        if len({row.label for row in group}) > 1:
            grams = {row.id: trigrams(row.sentence) for row in group}
            for a, b in combinations(group, 2):
                shared = len(grams[a.id] & grams[b.id]) / len(grams[a.id] | grams[b.id])
                if a.label != b.label and shared >= ALIKE:
                    found.append((shared, a, b))
    return sorted(found, key=lambda pair: -pair[0])


def trigrams(text: str) -> set[str]:
    text = f" {' '.join(text.split())} "
    return {text[i : i + 3] for i in range(len(text) - 2)}


def rare(rows: list[Row], negative: str) -> list[tuple[int, Row]]:
    """Rows with a pair of types that their label almost never has; any pair may be negative."""
    of_label = Counter(row.label for row in rows)
    of_pair = Counter((row.label, type_pair(row)) for row in rows)
    found = []
    for row in rows:
        n, total = of_pair[row.label, type_pair(row)], of_label[row.label]
        if row.label != negative and total >= ENOUGH and n < RARE * total:
            found.append((n, row))
    return sorted(found, key=lambda pair: (pair[0], pair[1].label))


# --- what is shown ----------------------------------------------------------------------------


def sections(suspects: Suspects) -> list[Section]:
    rows, labels = {row.id: row for row in suspects.rows}, suspects.labels
    n, flagged = Counter(row.label for row in suspects.rows), Counter()
    cases = []
    for row_id in suspects.issues:
        row, probs = rows[row_id], suspects.probs[row_id]
        flagged[row.label] += 1
        text = f"{row_id}: {row.label} {probs[labels.index(row.label)]:.2f}, "
        cases.append((f"{text}likely {suspects.likely(row)} {probs.max():.2f}", row))
    note = f"{len(cases)} of {len(suspects.probs)} rows, worst first; their probabilities."
    wrong = Section("Labels that are probably wrong", note, cases=cases)
    table = [
        {"label": label, "rows": n[label], "probably wrong": m, "%": 100 * m / n[label]}
        for label, m in flagged.most_common()
    ]
    note = "Rows of a label in which the other is probable (the confident joint)."
    confused = Section("Labels that are confused", note, suspects.confusions[:15])
    found = []
    for shared, a, b in suspects.alike:
        found.append((f"{a.id}: {a.label}; {shared:.0%} of the trigrams shared with {b.id}", a))
        found.append((f"{b.id}: {b.label}", b))
    note = f"The same entities, and at least {ALIKE:.0%} of the characters' trigrams."
    near = Section("Near-duplicates with different labels", note, cases=found)
    found = [
        (f"{row.id}: {row.label} has {type_pair(row)} in {m} of {n[row.label]} rows", row)
        for m, row in suspects.rare
    ]
    note = f"Below {RARE:.0%} of the rows of a label with at least {ENOUGH} rows."
    types = Section("Types that a label almost never has", note, cases=found)
    return [wrong, Section("By label", "", table), confused, near, types]


def write_suspects(path: Path, suspects: Suspects) -> int:
    """Write the suspects as a CSV file for train.py --drop or --relabel; returns their number.

    The rows whose label is not the most probable come first, the worst at the top. InputError if
    the file exists and has another content: somebody may have edited it.
    """
    signs = {row_id: ["probabilities"] for row_id in suspects.issues}
    for row in [row for _, *pair in suspects.alike for row in pair]:
        signs.setdefault(row.id, []).append("near-duplicate")
    for _, row in suspects.rare:
        signs.setdefault(row.id, []).append("types")
    rows = {row.id: row for row in suspects.rows}
    records = ["id label new_label found_by quality types subject object sentence".split()]
    for row_id, found_by in signs.items():
        row, quality = rows[row_id], suspects.issues.get(row_id, "")
        given = [row_id, row.label, suspects.likely(row), "+".join(dict.fromkeys(found_by))]
        words = [type_pair(row), row.subject.word, row.object.word, row.sentence]
        records.append([*given, quality and f"{quality:.4f}", *words])
    text = csv_text(records)
    if path.exists() and read_text(path) != text:
        raise InputError(f"{path}: has another content, maybe edited; move it or use another --out")
    with atomic_write(path) as file:
        file.write(text)
    return len(signs)


# --- commands of report.py --------------------------------------------------------------------


def report_folds(arguments: argparse.Namespace):
    """Join the predictions of all folds of a cross-validation into one file.

    Each row of the training file is then predicted by a model that was not trained on it.
    """
    paths = [path for pattern in arguments.files for path in expand(pattern)]
    if Path(arguments.out).resolve() in {Path(path).resolve() for path in paths}:
        raise InputError(f"--out {arguments.out}: expected another file than those that are read")
    files, labels = read_folds(paths, print)
    gold = np.concatenate([gold_classes(file, dict(enumerate(labels))) for file in files])
    probs = np.concatenate([file.probs for file in files])
    ids, predicted, given = (
        list(chain.from_iterable(getattr(file, name) for file in files))
        for name in ("ids", "predicted", "gold")
    )
    write_predictions(arguments.out, ids, predicted, probs, given)
    print(describe(score(probs, gold), labels))
    print(f"{arguments.out}: {len(gold):,} rows of {len(paths)} folds")


def report_labels(arguments: argparse.Namespace):
    """List the rows of a training file whose label is probably wrong.

    By out-of-fold probabilities; near-duplicates whose labels differ; types that a label almost
    never has. Writes rows.csv, to edit and to use with train.py.
    """
    path, out = arguments.file, Path(arguments.out)
    rows = with_label_names(read_rows(path), arguments.label_order)
    labels = find_labels(rows, compose(arguments.negative_label))
    first = {}  # the others with its id are copies
    for row in with_known_labels(rows, labels):
        first.setdefault(row.id, row)
    file = read_probabilities(arguments.oof, labels, path, print)
    for line, row_id in zip(file.lines, file.ids):
        expect(row_id in first, f"{file.path}:{line}", "id", row_id, f"an id of {path}")
    check_labels(file, rows, print)
    rows = list(first.values())
    suspects = find_suspects(rows, labels, file)
    n = write_suspects(out / "rows.csv", suspects)
    title = f"Labels of {path}: {len(rows):,} rows, {len(file.ids):,} with probabilities"
    write_report(title, sections(suspects), out)
    print(f"{out / 'rows.csv'}: {n} rows, for train.py --drop or --relabel after you edited it")


def add_commands(add_command):
    """Add both commands with their options; `add_command` is that of report.py."""
    folds = add_command("folds", report_folds)
    folds.add_argument("files", nargs="+", metavar="FILE", help="valid.csv of each fold's run")
    text = "file to write (default: oof.csv)"
    folds.add_argument("--out", default="oof.csv", help=text)

    labels = add_command("labels", report_labels)
    labels.add_argument("file", metavar="FILE", help="the training file")
    text = "out-of-fold predictions of its rows: what report.py folds writes"
    labels.add_argument("--oof", required=True, metavar="FILE", help=text)
    text = "folder of the page and of rows.csv (default: runs/labels)"
    labels.add_argument("--out", default="runs/labels", help=text)
    text = "the label that means no relation, as in train.py"
    labels.add_argument("--negative-label", default="no_relation", metavar="LABEL", help=text)
    text = "what labels that are class numbers mean, as in train.py"
    labels.add_argument("--label-order", default="", metavar="ORDER", help=text)
