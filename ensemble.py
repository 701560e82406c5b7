"""Vote over several submissions: different models, seeds and settings make different mistakes.

    python ensemble.py out/*.csv                                # hard vote into submission.csv
    python ensemble.py out/*.csv --soft                         # mean of the probabilities
    python ensemble.py out/a.csv out/b.csv --weights 2 1 --out best.csv
    python ensemble.py --select 'runs/*/valid.csv' --soft       # which to vote, with which weights

Reads id,pred_label,probs as infer.py writes it. Rows are aligned by id; files of different rows
are an error. A hard vote counts the labels, a soft one reads the probabilities only.
"""

# First: it handles Ctrl-C while the others are imported.
from common import InputError, Parser, exit_on_error, expand, expect

# isort: split

import argparse
import math
import os
import shlex
from collections import Counter
from pathlib import Path

import numpy as np

from metrics import (
    Predictions,
    aligned,
    class_names,
    gold_classes,
    read_predictions,
    read_summary,
    write_predictions,
)
from page import text_table
from selection import DRAWS, Choice, select, winners


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
    won = winners(mean, shares).tolist()
    unnamed = set(won) - set(names)
    if unnamed:
        found = f"class {min(unnamed)} wins the vote of a row, but no file predicts it"
        raise InputError(f"{found}: the name of its label is unknown")
    return [names[c] for c in won], shares


def print_agreement(submissions: list[Predictions]):
    predicted = np.array([s.predicted for s in submissions])
    print("rows predicted alike by two files, in %:")
    for i, s in enumerate(submissions):
        cells = [f"{100 * (predicted[i] == predicted[j]).mean():5.1f}" for j in range(i)]
        print(f"[{i + 1}] {s.path}", *cells, sep="  ")


def parse_arguments() -> argparse.Namespace:
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("files", nargs="*", help="submissions of the same rows")
    add("--soft", action="store_true", help="average the probabilities instead of counting votes")
    add("--weights", nargs="+", type=float, metavar="X", help="weight of each file (default: 1)")
    add("--out", help="file to write (default: submission.csv)")
    add("--select", nargs="+", metavar="FILE",
        help="valid.csv of runs: print which to vote, with which weights")  # fmt: skip
    text = "score that --select raises (default: micro_f1)"
    add("--metric", choices=("micro_f1", "auprc"), help=text)
    arguments = parser.parse_args()
    if arguments.select:
        given = {"files": arguments.files, "--weights": arguments.weights, "--out": arguments.out}
        if used := [name for name, value in given.items() if value]:
            raise InputError(f"--select and {used[0]} exclude each other")
        return arguments
    if arguments.metric:
        raise InputError("--metric is for --select")
    if not arguments.files:
        raise InputError("files: found none, expected submissions, or --select")
    arguments.out = arguments.out or "submission.csv"
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


# --- selection --------------------------------------------------------------------------------


def print_selection(patterns: list[str], metric: str, soft: bool):
    """Select among files of predictions with gold labels, and print the command that votes."""
    paths = [path for pattern in patterns for path in expand(pattern)]
    twice = [path for path, n in Counter(map(os.path.realpath, paths)).items() if n > 1]
    if twice or len(paths) < 2:
        found = f"{twice[0]} twice" if twice else f"one file, {paths[0]}"
        raise InputError(f"--select: found {found}, expected at least two different files")
    files = aligned([read_predictions(path) for path in paths])
    names = class_names(files, read_summary(Path(paths[0]).parent).get("labels"))
    for file in files:
        expect(file.gold, file.path, "header", "no column label", "that of a run's valid.csv")
    told = [(f"{paths[0]}:{line}", x) for line, x in zip(files[0].lines, files[0].gold)]
    gold, *_ = [gold_classes(file, names, told) for file in files]  # all the same
    number = {label: c for c, label in names.items()}
    predicted = np.array([[number[label] for label in file.predicted] for file in files])
    if len(gold) < 20:  # some sample of fewer rows may have all of them
        raise InputError(f"--select: found {len(gold)} rows, expected at least 20 to select on")
    print(f"{len(paths)} files, {len(gold):,} rows; this repeats a selection {DRAWS} times")
    choice = select(np.array([f.probs for f in files]), predicted, gold, metric, soft, paths)
    print(text_table(choice.members))
    print(verdict(choice, metric))
    print("next:", *commands(paths, choice.weights.tolist(), soft), sep="\n  ")


def verdict(choice: Choice, metric: str) -> str:
    """How much of the gain is expected to survive."""
    gain = choice.score - choice.single
    lines = [
        f"{metric} of the vote {choice.score:.2f}, of the best file {choice.single:.2f}: "
        f"gain {gain:.2f} on the rows that it was selected on",
        f"selected again on samples: gain {choice.seen:.2f} on their rows, {choice.unseen:.2f} on "
        f"the others (middle 95 %: {choice.spread['from']:.2f} to {choice.spread['to']:.2f})",
    ]
    if gain < 0:
        lines.append("the best file is better than the vote: use it alone")
    if gain > 0 and choice.seen > 0:
        share = min(max(choice.unseen / choice.seen, 0), 1)
        lines.append(f"so {share:.0%} of the gain is expected to survive")
    return "\n".join(lines)


def commands(paths: list[str], weights: list[int], soft: bool) -> list[str]:
    """The command that votes the submissions of the selected runs, after those that write them.

    A run's submission is out/<run>.csv, or out/<sweep>-<run>.csv as sweep.py --top writes it. One
    that is older than the run is of a model that the run has replaced.
    """
    run_of = {path: Path(path).resolve().parent for path in paths}
    n_named = Counter(run.name for run in run_of.values())
    missing, outs = [], []
    for path, weight in zip(paths, weights):
        run = run_of[path]
        out, longer = f"out/{run.name}.csv", f"out/{run.parent.name}-{run.name}.csv"
        if n_named[run.name] > 1 or Path(longer).exists():
            out = longer
        is_new = Path(out).exists() and os.path.getmtime(out) >= os.path.getmtime(path)
        if weight and not is_new:
            checkpoint = str(Path(path).parent / "ckpt.pt")
            missing.append(shlex.join(["python", "infer.py", checkpoint, "--out", out]))
        outs += [out] if weight else []
    if len(set(outs)) < len(outs):
        found = f"two of the runs would both write {Counter(outs).most_common(1)[0][0]}"
        raise InputError(f"--select: {found}; rename the folder of one")
    chosen = [str(weight) for weight in weights if weight]
    command = ["python", "ensemble.py", *outs, *(["--soft"] if soft else [])]
    return [*missing, shlex.join([*command, "--weights", *chosen])]


@exit_on_error
def main():
    arguments = parse_arguments()
    if arguments.select:
        print_selection(arguments.select, arguments.metric or "micro_f1", arguments.soft)
        return
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
