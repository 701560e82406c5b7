"""ensemble.py --select: which models to vote, with which weights."""

import json
import os
import re
import shlex

import numpy as np
import pytest

import ensemble
import selection
from common import InputError
from data import KLUE_LABELS
from metrics import read_predictions, score, write_predictions
from selection import Vote, select

N = 400
GOLD = np.random.default_rng(0).choice(30, N, p=[0.4, *[0.6 / 29] * 29])


def model(seed, strength):
    """Probabilities (N, 30) of a model whose errors are its own."""
    random = np.random.default_rng(seed)
    logits = random.normal(size=(N, 30))
    logits[np.arange(N), GOLD] += strength
    return np.exp(2 * logits) / np.exp(2 * logits).sum(1, keepdims=True)


def write(path, probs, gold=GOLD):
    names = [KLUE_LABELS[c] for c in probs.argmax(1)]
    labels = None if gold is None else [KLUE_LABELS[c] for c in gold]
    write_predictions(path, list(map(str, range(len(probs)))), names, probs, labels)


@pytest.fixture
def runs(tmp_path):
    """Two good runs, a copy of one, and a useless run."""
    each = {"a": model(1, 1.6), "b": model(2, 1.6), "a2": model(1, 1.6), "bad": model(3, 0)}
    for name, probs in each.items():
        write(tmp_path / f"runs/{name}/valid.csv", probs)
    return each


PATTERN = "runs/*/valid.csv"


@pytest.mark.parametrize("soft", [True, False])
@pytest.mark.parametrize("metric", ["micro_f1", "auprc"])
def test_the_selected_vote_beats_the_best_file_and_leaves_out_the_bad_one(
    call, runs, tmp_path, monkeypatch, metric, soft
):
    monkeypatch.setattr(selection, "DRAWS", 3)
    options = ["--metric", metric, *(["--soft"] if soft else [])]
    printed = call(ensemble, "--select", PATTERN, *options).out
    command = shlex.split(printed.strip().splitlines()[-1])
    assert command[:2] == ["python", "ensemble.py"]
    files = [word for word in command if word.endswith(".csv")]
    assert "out/b.csv" in files
    assert "out/bad.csv" not in files
    assert ("--soft" in command) == soft
    # the submissions are not there yet: the command would fail without these
    assert f"python infer.py runs/b/ckpt.pt --out {files[-1]}" in printed
    found = re.search(rf"{metric} of the vote ([\d.]+), of the best file ([\d.]+)", printed)
    vote, single = map(float, found.groups())
    best = max(score(probs, GOLD)[metric] for probs in runs.values())
    assert single == pytest.approx(best, abs=0.1)
    assert vote > single or (metric == "auprc" and not soft)  # few different shares
    # the printed command gives the printed score
    for name, probs in runs.items():
        write(tmp_path / f"out/{name}.csv", probs, None)
    call(ensemble, *command[2:])
    voted = read_predictions(tmp_path / "submission.csv")
    predicted = np.array([KLUE_LABELS.index(label) for label in voted.predicted])
    assert score(voted.probs, GOLD, predicted)[metric] == pytest.approx(vote, abs=0.3)
    assert "infer.py" not in call(ensemble, "--select", PATTERN, *options).out


def test_a_gain_by_luck_does_not_survive_on_rows_that_were_not_drawn():
    """All models are equally bad: what selection gains is chance."""
    probs = np.array([model(seed, 0) for seed in range(8)])
    names = list("abcdefgh")
    luck = select(probs, probs.argmax(2), GOLD, "micro_f1", True, names)
    assert luck.score > luck.single
    assert luck.unseen < luck.seen / 2
    assert luck.spread["from"] < 0 < luck.spread["to"]
    good = np.array([model(seed, 1.6) for seed in range(4)])
    found = select(good, good.argmax(2), GOLD, "micro_f1", True, names)
    assert found.unseen > found.seen / 2 > 1
    assert all(float(line["p"]) < 0.05 for line in found.members)


def test_selection_is_with_replacement_and_takes_the_best_of_all_rounds():
    probs = np.array([model(1, 1.8), model(2, 1.2), model(3, 1.2)])
    vote, rows = Vote(probs, probs.argmax(2), GOLD, "micro_f1", True), np.ones((N, 1))
    weights = vote.select(rows[:, 0])
    assert weights.max() > 1
    for i in range(3):  # no single change makes it better
        assert vote.score(weights + np.eye(3, dtype=int)[i], rows) <= vote.score(weights, rows)
    assert vote.best_file(rows[:, 0]) == 0
    hard = Vote(probs, probs.argmax(2), GOLD, "micro_f1", False)
    names = dict(enumerate(KLUE_LABELS))
    files = []
    for p in probs:
        labels = [names[c] for c in p.argmax(1)]
        files.append(ensemble.Predictions("", [], labels, p, [], None))
    predicted, _ = ensemble.vote(files, names, np.array([2, 1, 1]), soft=False)
    classes = np.array([KLUE_LABELS.index(label) for label in predicted])
    expected = score(np.eye(30)[classes], GOLD, classes)["micro_f1"]
    assert hard.score(np.array([2, 1, 1]), rows)[0] == pytest.approx(expected)


def test_runs_of_the_same_name_and_of_a_sweep_have_files_of_their_own(call, tmp_path):
    for seed, folder in enumerate(("x/trial-1", "y/trial-1", "y/trial-2")):
        write(tmp_path / f"runs/{folder}/valid.csv", model(seed, 1.6))
    write(tmp_path / "out/y-trial-2.csv", model(2, 1.6), None)
    printed = call(ensemble, "--select", "runs/*/*/valid.csv", "--soft").out
    assert "python infer.py runs/x/trial-1/ckpt.pt --out out/x-trial-1.csv" in printed
    command = "python ensemble.py out/x-trial-1.csv out/y-trial-1.csv out/y-trial-2.csv --soft"
    assert command in printed
    os.utime(tmp_path / "out/y-trial-2.csv", (1, 1))  # of a model that was trained again since
    printed = call(ensemble, "--select", "runs/*/*/valid.csv", "--soft").out
    assert "python infer.py runs/y/trial-2/ckpt.pt --out out/y-trial-2.csv" in printed


def test_bad_input_of_a_selection_is_one_line(call, runs, tmp_path):
    def refused(*arguments):
        error = call(ensemble, *arguments, code=2).err
        assert len(error.strip().splitlines()) == 1
        return error

    assert "found one file, runs/a/valid.csv" in refused("--select", "runs/a/valid.csv")
    assert "a/valid.csv twice" in refused("--select", PATTERN, "runs/a/valid.csv")
    assert "--select and --out exclude" in refused("--select", PATTERN, "--out", "x.csv")
    assert "--select and files exclude" in refused("x.csv", "--select", PATTERN)
    assert "--metric is for --select" in refused("a.csv", "--metric", "auprc")
    assert "found none, expected submissions, or --select" in refused()
    other = GOLD.copy()
    other[0] = 29 - other[0]
    write(tmp_path / "runs/b/valid.csv", runs["b"], other)
    found = f"runs/b/valid.csv:2: label: found {KLUE_LABELS[other[0]]!r}"
    assert found in refused("--select", PATTERN)
    write(tmp_path / "runs/b/valid.csv", runs["b"], None)
    assert "runs/b/valid.csv: header: found 'no column label'" in refused("--select", PATTERN)
    with pytest.raises(InputError, match="--select: two of the runs would both write out/runs-a"):
        ensemble.commands(["x/runs/a/valid.csv", "y/runs/a/valid.csv"], [2, 1], soft=True)
    for name, probs in runs.items():
        write(tmp_path / f"few/{name}/valid.csv", probs[:19], GOLD[:19])
    found = "--select: found 19 rows, expected at least 20"
    assert found in refused("--select", "few/*/valid.csv")
    write_predictions(tmp_path / "runs/b/valid.csv", ["x"], ["no_relation"], runs["b"][:1])
    assert "expected files of the same rows" in refused("--select", PATTERN)
    assert json.dumps(sorted(path.name for path in tmp_path.iterdir())) == '["few", "runs"]'
