"""Votes several submissions into one: models, seeds and settings err in different places.

    python ensemble.py out/*.csv                                     # hard vote into submission.csv
    python ensemble.py out/*.csv --soft                              # the mean of the probabilities
    python ensemble.py out/a.csv out/b.csv --weights 2 1 --out best.csv

Reads files of id,pred_label,probs as infer.py writes them. Where they do not fit together, nothing is written.
"""

import argparse
import math
from pathlib import Path

import numpy as np

from data import InputError, Parser, exit_on_bad_input
from metrics import Predictions, check_alike, class_names, read_predictions, write_predictions


def vote(submissions: list[Predictions], names: dict[int, str], weights: np.ndarray, soft: bool):
    """(predicted labels, probs (N, C)): the weighted mean of the probabilities, or the shares of the votes, where a
    tie goes to the class of higher summed probability."""
    mean = shares = np.average([s.probs for s in submissions], 0, weights)
    if not soft:
        number = {label: c for c, label in names.items()}
        votes = [[number[label] for label in s.predicted] for s in submissions]  # (files, N)
        shares = np.average(np.eye(mean.shape[1])[votes], 0, weights)
    tied = shares >= shares.max(1, keepdims=True) - 1e-9
    winners = np.where(tied, mean, -1).argmax(1)
    unnamed = set(winners.tolist()) - set(names)
    if unnamed:
        raise InputError(f"class {min(unnamed)} wins a vote, but no file predicts it, so its label is not known")
    return [names[c] for c in winners.tolist()], shares


def print_agreement(submissions: list[Predictions]):
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
            why = "is in its folder; expected another one, lest the next vote counts the result too"
            raise InputError(f"--out {arguments.out}: {file} {why}")
    return arguments


@exit_on_bad_input
def main():
    arguments = parse_arguments()
    submissions = [read_predictions(path) for path in arguments.files]
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
