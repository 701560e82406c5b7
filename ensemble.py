"""Votes several submissions into one: models, seeds and settings err in different places.

    python ensemble.py out/*.csv                                     # hard vote into submission.csv
    python ensemble.py out/*.csv --soft                              # the mean of the probabilities
    python ensemble.py out/a.csv out/b.csv --weights 2 1 --out best.csv

Reads files of id,pred_label,probs as infer.py writes them. Where they do not fit together, nothing is written.
"""

import argparse
import json
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data import KLUE_LABELS, InputError, Parser, exit_on_bad_input, read_csv, write_predictions


class Submission(NamedTuple):
    """A file of predictions, N rows of C classes. Rows stand in the file's order."""

    path: str
    ids: list[str]
    predicted: list[str]
    probs: np.ndarray  # (N, C), each row sums to 1
    lines: list[int]


def read_submission(path: str) -> Submission:
    """Reads a submission; raises InputError at the first row that is not as it should be."""
    first, predicted, probs = {}, [], []
    for line, cells in read_csv(path, ("id", "pred_label", "probs")):
        where = f"{path}:{line}"
        id, found = cells["id"], cells["probs"] if len(cells["probs"]) <= 60 else cells["probs"][:57] + "..."
        try:
            p = [float(x) for x in json.loads(cells["probs"])]
        except (ValueError, TypeError, OverflowError, RecursionError) as error:
            raise InputError(f"{where}: probs: found {found!r}, expected a list of numbers") from error
        if probs and len(p) != len(probs[0]):
            raise InputError(f"{where}: probs: found {len(p)} classes, expected {len(probs[0])} as in the rows above")
        if not p or not min(p) >= 0 or not math.isclose(sum(p), 1, abs_tol=1e-3):
            raise InputError(f"{where}: probs: found {found!r}, expected numbers from 0 to 1 that sum to 1")
        if id in first:
            raise InputError(f"{where}: id: found {id!r}, expected another: line {first[id]} has it already")
        first[id] = line
        predicted.append(cells["pred_label"])
        probs.append(p)
    if not probs:
        raise InputError(f"{path}: no rows")
    return Submission(path, list(first), predicted, np.array(probs), list(first.values()))


def check_alike(submissions: list[Submission]):
    """Raises InputError unless all have the same ids in the same order and as many classes."""
    base = submissions[0]
    for other in submissions[1:]:
        missing, extra = set(base.ids) - set(other.ids), set(other.ids) - set(base.ids)
        if missing:
            example = next(id for id in base.ids if id in missing)
            raise InputError(f"{other.path}: {len(missing)} rows of {base.path} are missing, such as id {example!r}")
        if extra:
            example = next(id for id in other.ids if id in extra)
            raise InputError(f"{other.path}: {len(extra)} rows are not in {base.path}, such as id {example!r}")
        if other.ids != base.ids:
            i = next(i for i, pair in enumerate(zip(base.ids, other.ids)) if pair[0] != pair[1])
            where = f"{other.path}:{other.lines[i]}"
            raise InputError(f"{where}: id: found {other.ids[i]!r}, expected {base.ids[i]!r}, the order of {base.path}")
        if other.probs.shape != base.probs.shape:
            found, expected = other.probs.shape[1], base.probs.shape[1]
            raise InputError(f"{other.path}: found {found} classes, expected {expected} as in {base.path}")


def class_names(submissions: list[Submission]) -> dict[int, str]:
    """The label of each class: KLUE-RE's, or of another data set as far as its predictions tell. Raises InputError
    where a predicted label is not the likeliest class, as in a file whose probs are in another order of labels."""
    rows = [
        (f"{s.path}:{line}", label, np.flatnonzero(p >= p.max() - 1e-9).tolist())
        for s in submissions
        for line, label, p in zip(s.lines, s.predicted, s.probs)
    ]
    if submissions[0].probs.shape[1] == len(KLUE_LABELS) and {label for _, label, _ in rows} <= set(KLUE_LABELS):
        names = dict(enumerate(KLUE_LABELS))
    else:
        names = {classes[0]: label for _, label, classes in reversed(rows) if len(classes) == 1}
    for where, label, classes in rows:
        likeliest = [names.get(c) for c in classes]
        if label not in likeliest:
            raise InputError(f"{where}: pred_label: found {label!r}, but its probs are highest for {likeliest[0]!r}")
    return names


def vote(submissions: list[Submission], names: dict[int, str], weights: np.ndarray, soft: bool):
    """(predicted labels, probs (N, C)): the weighted mean of the probabilities, or the shares of the votes, where a
    tie goes to the class of higher summed probability."""
    number = {label: c for c, label in names.items()}
    mean = np.tensordot(weights / weights.sum(), np.stack([s.probs for s in submissions]), 1)
    shares = mean
    if not soft:
        votes = np.array([[number[label] for label in s.predicted] for s in submissions])  # (files, N)
        one_hot = np.eye(mean.shape[1])[votes]
        shares = np.tensordot(weights / weights.sum(), one_hot, 1)
    tied = shares >= shares.max(1, keepdims=True) - 1e-9
    winners = np.where(tied, mean, -1).argmax(1)
    unnamed = set(winners.tolist()) - set(names)
    if unnamed:
        raise InputError(f"class {min(unnamed)} wins a vote, but no file predicts it, so its label is not known")
    return [names[c] for c in winners.tolist()], shares


def print_agreement(submissions: list[Submission]):
    """In how many per cent of the rows each two files predict the same."""
    predicted = np.array([s.predicted for s in submissions])
    for i, s in enumerate(submissions):
        cells = [f"{100 * (predicted[i] == predicted[j]).mean():5.1f}" for j in range(i)]
        print(f"[{i + 1}] {s.path}", *cells, sep="  ")


def parse_arguments() -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", help="submissions of the same rows")
    parser.add_argument("--soft", action="store_true", help="average probabilities instead of counting votes")
    parser.add_argument("--weights", nargs="+", type=float, help="a weight for each file (all alike)")
    parser.add_argument("--out", default="submission.csv", help="file to write (submission.csv)")
    arguments = parser.parse_args()
    weights = arguments.weights or [1.0] * len(arguments.files)
    if len(weights) != len(arguments.files):
        raise InputError(f"--weights: found {len(weights)}, expected {len(arguments.files)}, one for each file")
    if not all(0 <= w < math.inf for w in weights) or sum(weights) == 0:
        raise InputError(f"--weights: found {weights}, expected numbers from 0, not all 0")
    arguments.weights = np.array(weights)
    for file in arguments.files:
        if Path(arguments.out).resolve().parent == Path(file).resolve().parent:
            raise InputError(f"--out {arguments.out}: expected another folder than that of {file}, an input")
    return arguments


@exit_on_bad_input
def main():
    arguments = parse_arguments()
    submissions = [read_submission(path) for path in arguments.files]
    check_alike(submissions)
    names = class_names(submissions)
    predicted, probs = vote(submissions, names, arguments.weights, arguments.soft)
    write_predictions(arguments.out, submissions[0].ids, predicted, probs)
    if len(submissions) > 1:
        print("rows that two files predict alike, in per cent:")
        print_agreement(submissions)
    kind = "soft" if arguments.soft else "hard"
    print(f"{arguments.out}: {kind} vote, files: {len(submissions)}, rows: {len(predicted)}")


if __name__ == "__main__":
    main()
