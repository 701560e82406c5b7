"""Files of predictions, and their scores as KLUE defines them (Park et al. 2021, section 3.5).

    file = read_predictions("out/demo.csv")
    scores = score(file.probs, gold)  # {"micro_f1": 71.2, "auprc": 74.0, "accuracy": 70.3, ...}
    print(describe(scores, labels))

Scores are percentages. Class 0 is the negative label (no_relation).
"""

import itertools
import json
import math
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np

from common import (
    InputError,
    atomic_write,
    csv_writer,
    expect,
    expect_new_id,
    read_csv,
    read_json,
)
from data import KLUE_LABELS

# --- files ------------------------------------------------------------------------------------


class Predictions(NamedTuple):
    """A file of predictions: N rows in the file's order, C classes."""

    path: str
    ids: list[str]
    predicted: list[str]
    probs: np.ndarray  # (N, C), each row sums to 1
    lines: list[int]  # line numbers in the file
    gold: list[str] | None  # the column "label" of a run's valid.csv

    def take(self, rows: list[int]) -> "Predictions":
        """The rows of these numbers, in this order."""
        ids, predicted, lines, gold = (
            values and [values[i] for i in rows]
            for values in (self.ids, self.predicted, self.lines, self.gold)
        )
        return Predictions(self.path, ids, predicted, self.probs[rows], lines, gold)


def write_predictions(
    path: str | Path,
    ids: list[str],
    predicted: list[str],
    probs: np.ndarray,
    gold: list[str] | None = None,
):
    """Write the competition's columns id, pred_label, probs; with `gold`, label after id."""
    columns = {"id": ids} | ({"label": gold} if gold else {})
    columns |= {"pred_label": predicted, "probs": map(json.dumps, probs.tolist())}
    with atomic_write(path) as file:
        writer = csv_writer(file)
        writer.writerow(columns)
        writer.writerows(zip(*columns.values(), strict=True))


def read_predictions(path: str) -> Predictions:
    """Read a submission or a run's valid.csv; a bad row raises InputError."""
    line_of, predicted, probs, gold = {}, [], [], []
    for line, cells in read_csv(path, ("id", "pred_label", "probs")):
        where, row_id = f"{path}:{line}", cells["id"]
        p = _probabilities(cells["probs"], where)
        n_classes = len(probs[0] if probs else p)
        expect(len(p) == n_classes, where, "classes", len(p), f"{n_classes} as in earlier rows")
        expect_new_id(row_id, line, line_of, where)
        predicted.append(cells["pred_label"])
        probs.append(p)
        gold += [cells["label"]] if "label" in cells else []
    if not probs:
        raise InputError(f"{path}: no rows")
    ids, lines = list(line_of), list(line_of.values())
    return Predictions(path, ids, predicted, np.array(probs), lines, gold or None)


def _probabilities(cell: str, where: str) -> list[float]:
    """The probabilities of a cell."""
    try:
        p = [float(x) for x in json.loads(cell)]
    except (ValueError, TypeError, OverflowError, RecursionError):
        p = []
    expect(p, where, "probs", cell, "a list of numbers")
    for x in p:
        expect(0 <= x <= 1.001, where, "probs", x, "numbers from 0 to 1")
    is_one = math.isclose(sum(p), 1, abs_tol=1e-3)
    expect(is_one, where, "probs", cell, f"numbers that sum to 1, not to {sum(p):.6g}")
    return p


def read_summary(folder: Path) -> dict:
    """The summary.json of a run's folder; {} if there is none."""
    path, expected = folder / "summary.json", "the summary of a run, an object"
    summary = read_json(path, expected) if path.exists() else {}
    expect(isinstance(summary, dict), str(path), "summary", summary, expected)
    return summary


def aligned(files: list[Predictions]) -> list[Predictions]:
    """The files with their rows in the order of the first; prints which were not.

    Raises InputError unless all files have the same ids and C classes.
    """
    first, out = files[0], files[:1]
    for other in files[1:]:
        missing, extra = set(first.ids) - set(other.ids), set(other.ids) - set(first.ids)
        if alone := missing or extra:
            problem = f"of {first.path} are missing" if missing else f"are not in {first.path}"
            found = f"{len(alone)} rows {problem}, such as id {min(alone)!r}"
            raise InputError(f"{other.path}: {found}; expected files of the same rows")
        found, expected = other.probs.shape[1], first.probs.shape[1]
        expect(found == expected, other.path, "classes", found, f"{expected} as in {first.path}")
        if other.ids != first.ids:
            found = f"its rows are in another order than in {first.path}"
            print(f"{other.path}: {found}; aligned by id")
            number = {row_id: i for i, row_id in enumerate(other.ids)}
            other = other.take([number[row_id] for row_id in first.ids])
        out.append(other)
    return out


def class_names(
    files: list[Predictions], labels: list[str] | None = None, log=print
) -> dict[int, str]:
    """{class: label}: `labels` if given, else KLUE-RE's if they fit, else from the predictions.

    The latter lacks the classes that no row predicts. A later step may have changed the label of
    some rows: `log` is told how many are not the most probable class. Raises InputError if most
    of a file are not, since its probs then follow another order of labels.
    """
    n_classes = files[0].probs.shape[1]
    predicted = set().union(*(file.predicted for file in files))
    known = f"one of {n_classes} labels"
    if labels and len(labels) == n_classes:
        names = dict(enumerate(labels))
    elif n_classes == len(KLUE_LABELS) and predicted <= set(KLUE_LABELS):
        names = dict(enumerate(KLUE_LABELS))
    else:  # the most frequent pairs first
        known = "a label that has the highest probability of a row"
        pairs, names = Counter(), {}
        for file in files:
            untied = (_likeliest(file.probs).sum(1) == 1).tolist()
            pairs.update(itertools.compress(zip(file.probs.argmax(1), file.predicted), untied))
        for (c, label), _ in pairs.most_common():
            if c not in names and label not in names.values():
                names[int(c)] = label
    class_of = {label: c for c, label in names.items()}
    for file in files:
        for line, label in zip(file.lines, file.predicted):
            expect(label in class_of, f"{file.path}:{line}", "pred_label", label, known)
        classes = np.array([class_of[label] for label in file.predicted])
        differs = ~_likeliest(file.probs)[np.arange(len(classes)), classes]
        if not differs.any():
            continue
        relation, n = file.probs.argmax(1) != 0, f"{differs.sum()} of {len(classes)} rows"
        if differs.mean() > 0.5 or (relation.any() and differs[relation].mean() > 0.5):
            i = differs.argmax()
            likeliest = names.get(file.probs[i].argmax())
            expected = f"{likeliest!r}, the most probable class, in most rows ({n} differ)"
            expect(False, f"{file.path}:{file.lines[i]}", "pred_label", file.predicted[i], expected)
        log(f"{file.path}: the label of {n} is not the one with the highest probability")
    return names


def _likeliest(probs: np.ndarray) -> np.ndarray:
    """Which classes have the highest probability of their row, also in a tie: (N, C)."""
    return probs >= probs.max(1, keepdims=True) - 1e-9


def gold_classes(
    file: Predictions, names: dict[int, str], told: list[tuple[str, str]] | None = None
) -> np.ndarray:
    """The gold class of each row (N,): of `told`, (place, label) of each row, or of the file.

    Raises InputError if there are neither, if the two differ, or if a label has no class.
    """
    own = file.gold and [(f"{file.path}:{line}", x) for line, x in zip(file.lines, file.gold)]
    if not (told or own):
        raise InputError(f"{file.path}: no column label; use --gold FILE with the rows' labels")
    class_of = {label: c for c, label in names.items()}
    for (place, label), (here, own_label) in zip(told or own, own or told):
        expected = f"one of {len(class_of)} known labels"
        if len(class_of) < file.probs.shape[1]:
            expected += f"; no row of {file.path} has the others, and its folder no summary.json"
        expect(label in class_of, place, "label", label, expected)
        expect(label == own_label, here, "label", own_label, f"{label!r} as in {place}")
    return np.array([class_of[label] for _, label in told or own])


# --- scores -----------------------------------------------------------------------------------


def score(probs: np.ndarray, gold: np.ndarray, predicted: np.ndarray | None = None) -> dict:
    """Scores of probabilities (N, C) for gold classes (N,).

    micro_f1: F1 of precision and recall pooled over all classes but 0. `predicted` (N,) are the
        most probable classes unless given, which resolves ties such as those of a vote.
    auprc: area under the precision-recall curve (trapezoidal rule), averaged over all classes
        including 0. A class without a gold row has no curve; it is listed in "absent".
    """
    from sklearn.metrics import auc, f1_score, precision_recall_curve  # takes a second

    predicted = probs.argmax(1) if predicted is None else predicted
    classes = list(range(probs.shape[1]))
    areas = []
    for c in np.unique(gold):
        precision, recall, _ = precision_recall_curve(gold == c, probs[:, c])
        areas.append(auc(recall, precision))
    f1 = f1_score(gold, predicted, average="micro", labels=classes[1:], zero_division=0)
    return {
        "micro_f1": 100 * f1,
        "auprc": 100 * float(np.mean(areas)),
        "accuracy": 100 * float((predicted == gold).mean()),
        "absent": [c for c in classes if c not in gold],
    }


def describe(scores: dict, labels: list[str]) -> str:
    """The scores as one line, with the labels that the AUPRC leaves out."""
    line = "micro F1 {micro_f1:.2f}  AUPRC {auprc:.2f}  accuracy {accuracy:.2f}".format(**scores)
    absent = ", ".join(labels[c] for c in scores["absent"])
    return f"{line}  (AUPRC without {absent}: no such row)" if absent else line


# --- share of the negative label --------------------------------------------------------------


def negative_factor(probs: np.ndarray, share: float) -> float:
    """The factor for class 0 with which it is the most probable one in `share` of the rows (N, C).

    A model trained on 29 % no_relation predicts too many relations on rows with 60 % (Saerens et
    al. 2002, Adjusting the outputs of a classifier to new a priori probabilities). The share of
    the predictions is set, since a model is less certain on rows unlike its training rows.
    """
    needed = probs[:, 1:].max(1) / np.maximum(probs[:, 0], 1e-9)  # class 0 wins above this factor
    return float(np.quantile(needed, share))


def scale_negative(probs: np.ndarray, factor: float) -> np.ndarray:
    """Multiply the probability of class 0 by `factor`, and normalise each row to sum 1."""
    scaled = probs.copy()
    scaled[:, 0] *= factor
    return scaled / scaled.sum(1, keepdims=True)
