"""Measure soft targets and label errors on KLUE-RE: one command for each table.

    python tools/soft_targets.py --table students --model DIR --out runs/soft -- --batch-size 32
    python tools/soft_targets.py --table errors --model DIR --out runs/errors -- --batch-size 32

What follows `--` goes to each train.py. The rows to score are the test-like validation rows: the
students see them as test_data.csv, without labels, and their labels are used for the scores alone.
All trainings are without validation, so that no model is chosen by these labels. The same command
resumes: trainings that have finished are not repeated.
"""

import argparse
import csv
import subprocess
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from analysis import compare  # noqa: E402
from common import InputError, Parser, atomic_write, exit_on_error  # noqa: E402
from data import write_rows  # noqa: E402
from metrics import read_predictions, read_summary, score, write_predictions  # noqa: E402
from page import text_table  # noqa: E402
from rows import Row  # noqa: E402
from settings import Settings  # noqa: E402
from splits import choose_rows  # noqa: E402

PLANTED = 0.02  # share of the training rows that get a wrong label
WORST = (0.01, 0.03, 0.05)  # shares of the training rows that are left out


class Runs:
    """Trainings and predictions in one folder."""

    def __init__(self, arguments: argparse.Namespace):
        self.out, self.seeds = Path(arguments.out), range(42, 42 + arguments.seeds)
        self.folds, self.more = arguments.folds, arguments.train
        self.model, self.held, self.results = arguments.model, self.out / "held.csv", {}
        settings = Settings(data=arguments.data, limit=arguments.limit)
        self.chosen = choose_rows(settings, print)

    def write_data(self, train: list[Row]):
        held = self.chosen.valid
        write_rows(self.out / "data/train.csv", train)
        write_rows(self.out / "data/test_data.csv", [row._replace(label=None) for row in held])
        write_rows(self.held, held)

    def program(self, name: str, *arguments):
        command = [sys.executable, str(ROOT / name), *map(str, arguments)]
        if subprocess.run(command).returncode:
            raise InputError(f"{name} failed; the same command goes on from here")

    def train(self, name: str, *options):
        data = ("--data", self.out / "data", "--model", self.model, "--out", self.out / name)
        self.program("train.py", *data, *options, *self.more)

    def predict(self, name: str, *runs: str) -> Path:
        path = self.out / f"predictions/{name}.csv"
        checkpoints = [self.out / run / "ckpt.pt" for run in runs]
        self.program("infer.py", *checkpoints, "--data", self.held, "--out", path)
        return path

    def arm(self, name: str, *options) -> list[str]:
        """Train with each seed and predict; returns the names of the runs."""
        names = [f"{name}-seed={seed}" for seed in self.seeds]
        for run, seed in zip(names, self.seeds):
            self.train(run, "--valid", "none", "--seed", seed, *options)
        paths = [self.predict(run, run) for run in names]
        seconds = [read_summary(self.out / run)["seconds"] for run in names]
        self.add(name, paths, np.mean(seconds))
        return names

    def add(self, name: str, paths: list[Path], seconds: float):
        files = [read_predictions(str(path)) for path in paths]
        number = {label: c for c, label in enumerate(self.chosen.labels)}
        runs = [(f.probs, np.array([number[label] for label in f.predicted])) for f in files]
        self.results[name] = runs, seconds

    def out_of_fold(self) -> Path:
        """Out-of-fold probabilities of all training rows."""
        for fold in range(self.folds):
            self.train(f"fold={fold}", "--folds", self.folds, "--fold", fold)
        files = [self.out / f"fold={fold}/valid.csv" for fold in range(self.folds)]
        self.program("report.py", "folds", *files, "--out", self.out / "oof.csv")
        return self.out / "oof.csv"

    def print_table(self):
        """Each arm beside the first: scores over seeds, difference with its 95 % interval."""
        gold = np.array([self.chosen.labels.index(row.label) for row in self.chosen.valid])
        (base, _), table = next(iter(self.results.values())), []
        for name, (runs, seconds) in self.results.items():
            lines, _ = compare(base, runs, gold)
            line = {"arm": name, "runs": len(runs), "seconds": float(seconds)}
            for key, found in zip(("micro_f1", "auprc"), lines):
                values = [score(probs, gold, predicted)[key] for probs, predicted in runs]
                spread = f" ± {np.std(values, ddof=1):.2f}" if len(values) > 1 else ""
                line[key] = f"{np.mean(values):.2f}{spread}"
                difference = f"{found['B - A']:+.2f} ({found['from']:.2f} to {found['to']:.2f})"
                line[f"{key} - first"] = "" if runs is base else difference
            table.append(line)
        print(text_table(table))


def students(runs: Runs):
    """The vote of the recipe's seeds, and students of soft targets."""
    runs.write_data(runs.chosen.train)
    teachers = runs.arm("recipe")
    vote = runs.predict("vote", *teachers)
    runs.add("vote of the recipe", [vote], runs.results["recipe"][1] * len(teachers))
    oof = runs.out_of_fold()
    for name, files in {
        "student, training rows": [oof],
        "student, unlabelled rows": [vote],
        "student, both": [oof, vote],
    }.items():
        runs.arm(name, "--soft-labels", *files)
    runs.print_table()


def errors(runs: Runs):
    """Precision and recall of report.py labels for planted errors; trainings without the worst."""
    random, train = np.random.default_rng(0), list(runs.chosen.train)
    planted = random.choice(len(train), round(PLANTED * len(train)), replace=False)
    for i in planted:
        others = [label for label in runs.chosen.labels if label != train[i].label]
        train[i] = train[i]._replace(label=str(random.choice(others)))
    runs.write_data(train)
    wrong, oof = {train[i].id for i in planted}, runs.out_of_fold()
    path = runs.out / "data/train.csv"
    runs.program("report.py", "labels", path, "--oof", oof, "--out", runs.out / "labels")
    with open(runs.out / "labels/rows.csv", encoding="utf-8", newline="") as file:
        lines = [x for x in csv.DictReader(file) if "probabilities" in x["found_by"]]
    table = []
    for name, part in {
        "the whole list": lines,
        "as many as are planted": lines[: len(wrong)],
        **{f"worst {share:.0%} of the rows": lines[: round(share * len(train))] for share in WORST},
    }.items():
        hits = sum(line["id"] in wrong for line in part)
        line = {"part": name, "rows": len(part), "planted": hits}
        table.append(
            line | {"precision %": 100 * hits / len(part), "recall %": 100 * hits / len(wrong)}
        )
    print(text_table(table))
    runs.arm("all rows")
    file = read_predictions(str(oof))
    for share in WORST:
        worst = [line["id"] for line in lines[: round(share * len(train))]]
        drop, soft = runs.out / f"worst-{share}.csv", runs.out / f"soft-{share}.csv"
        with atomic_write(drop) as out:
            csv.writer(out).writerows([["id"], *([row_id] for row_id in worst)])
        number = {row_id: i for i, row_id in enumerate(file.ids)}
        part = file.take([number[row_id] for row_id in worst])
        write_predictions(soft, part.ids, part.predicted, part.probs, part.gold)
        runs.arm(f"without the worst {share:.0%}", "--drop", drop)
        runs.arm(f"soft targets for the worst {share:.0%}", "--soft-labels", soft, "--soft-mix", 1)
    runs.print_table()


@exit_on_error
def main():
    parser = Parser(description=__doc__)
    parser.add_argument("--table", choices=("students", "errors"), required=True)
    parser.add_argument("--data", default="data", help="folder of KLUE-RE")
    parser.add_argument("--model", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--limit", type=int, default=0, help="number of training rows; 0: all")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("train", nargs="*", help="after --: options of train.py")
    arguments = parser.parse_args()
    {"students": students, "errors": errors}[arguments.table](Runs(arguments))


if __name__ == "__main__":
    main()
