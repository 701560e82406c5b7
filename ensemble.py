"""Vote over several submissions: different models, seeds and settings make different mistakes.

    python ensemble.py out/*.csv                                # hard vote into submission.csv
    python ensemble.py out/*.csv --soft                         # mean of the probabilities
    python ensemble.py out/a.csv out/b.csv --weights 2 1 --out best.csv

Reads id,pred_label,probs as infer.py writes it. Rows are aligned by id; files of different rows
are an error. A hard vote counts the labels, a soft one reads the probabilities only.
"""

# First: it handles Ctrl-C while the others are imported.
from common import InputError, Parser, exit_on_error

# isort: split

import argparse
import math
import os
from pathlib import Path

import numpy as np

from metrics import Predictions, aligned, class_names, read_predictions, write_predictions


def vote(submissions: list[Predictions], names: dict[int, str], weights: np.ndarray, soft: bool):
    """(predicted labels, probs (N, C)) of a weighted vote over submissions of N rows.

    soft: probs are the mean of the probabilities. Otherwise they are shares of the votes; in a tie
    the class with the higher mean probability wins.
    """
    mean = shares = np.average([s.probs for s in submissions], 0, weights)
    if not soft:
        number = {label: c for c, label in names.items()}
        votes = [[number[label] for label in s.predicted] for s in submissions]  # (files, N)
        shares = np.average(np.eye(mean.shape[1])[votes], 0, weights)
    tied = shares >= shares.max(1, keepdims=True) - 1e-9
    winners = np.where(tied, mean, -1).argmax(1)
    unnamed = set(winners.tolist()) - set(names)
    if unnamed:
        found = f"class {min(unnamed)} wins the vote of a row, but no file predicts it"
        raise InputError(f"{found}: the name of its label is unknown")
    return [names[c] for c in winners.tolist()], shares


def print_agreement(submissions: list[Predictions]):
    predicted = np.array([s.predicted for s in submissions])
    print("rows predicted alike by two files, in %:")
    for i, s in enumerate(submissions):
        cells = [f"{100 * (predicted[i] == predicted[j]).mean():5.1f}" for j in range(i)]
        print(f"[{i + 1}] {s.path}", *cells, sep="  ")


def parse_arguments() -> argparse.Namespace:
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("files", nargs="+", help="submissions of the same rows")
    add("--soft", action="store_true", help="average the probabilities instead of counting votes")
    add("--weights", nargs="+", type=float, metavar="X", help="weight of each file (default: 1)")
    add("--out", default="submission.csv", help="file to write (default: submission.csv)")
    arguments = parser.parse_args()
    files, weights = arguments.files, arguments.weights or [1.0] * len(arguments.files)
    if len(weights) != len(files):
        raise InputError(f"--weights: found {len(weights)}, expected {len(files)}, one per file")
    if not all(0 <= w < math.inf for w in weights) or sum(weights) == 0:
        raise InputError(f"--weights: found {weights}, expected numbers from 0, not all 0")
    if len(set(map(os.path.realpath, files))) < len(files):
        raise InputError("files: found one twice, expected different ones; --weights counts twice")
    arguments.weights = np.array(weights)
    return arguments


def check_output(out: str, files: list[str]):
    for file in files:
        if Path(out).resolve().parent == Path(file).resolve().parent:
            hint = f"expected another folder than that of {file}; the next *.csv would include it"
            raise InputError(f"--out {out}: {hint}")


@exit_on_error
def main():
    arguments = parse_arguments()
    submissions = aligned([read_predictions(path) for path in arguments.files])
    check_output(arguments.out, arguments.files)
    used = "probabilities" if arguments.soft else "labels"
    names = class_names(submissions, log=lambda text: print(f"{text}; the vote is on the {used}"))
    predicted, probs = vote(submissions, names, arguments.weights, arguments.soft)
    write_predictions(arguments.out, submissions[0].ids, predicted, probs)
    if len(submissions) > 1:
        print_agreement(submissions)
    kind = "soft" if arguments.soft else "hard"
    print(f"{arguments.out}: {kind} vote, files: {len(submissions)}, rows: {len(predicted)}")


if __name__ == "__main__":
    main()
