"""report.py folds and report.py labels: out-of-fold probabilities, and labels that are wrong."""

import csv
import json
import sys

import numpy as np
import pytest

import infer
import labels
import report
import train
from data import KLUE_LABELS
from metrics import read_predictions, write_predictions
from rows import read_rows
from tests.helpers import SAMPLE, row, write_rows
from tools import soft_targets

N = len(KLUE_LABELS)
NUMBER = {label: c for c, label in enumerate(KLUE_LABELS)}


def probs_near(rows, certainty=0.8, seed=0):
    """Probabilities (N, C) of a model that is right in most rows."""
    random = np.random.default_rng(seed)
    probs = random.dirichlet(np.full(N, 0.3), len(rows)) * (1 - certainty)
    probs[np.arange(len(rows)), [NUMBER[r.label] for r in rows]] += certainty
    return probs


def write(path, rows, probs):
    """A valid.csv with these gold labels."""
    predicted = [KLUE_LABELS[c] for c in probs.argmax(1)]
    write_predictions(path, [r.id for r in rows], predicted, probs, [r.label for r in rows])


def read(path):
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


# --- folds ------------------------------------------------------------------------------------


@pytest.fixture
def folds(tmp_path, rows):
    """Three fold runs; returns fold(number, **changes), which rewrites a run's summary."""

    def fold(number, **changes):
        path = tmp_path / f"runs/x-fold={number}/valid.csv"
        settings = {"folds": 3, "fold": number, "clean": True} | changes
        part = rows[number::3]
        write(path, part, probs_near(part))
        summary = {"labels": list(KLUE_LABELS), "version": {"content": "a"}, "finished": True}
        summary |= {"settings": settings, **changes}
        (path.parent / "summary.json").write_text(json.dumps(summary))
        return path

    for number in range(3):
        fold(number)
    return fold


PATTERN = "runs/x-fold=*/valid.csv"


def test_folds_are_joined_with_their_labels(call, folds, tmp_path, rows):
    done = call(report, "folds", PATTERN, "--out", "out/oof.csv")
    assert f"out/oof.csv: {len(rows):,} rows of 3 folds" in done.out
    assert "micro F1 100.00" in done.out
    joined = read_predictions(tmp_path / "out/oof.csv")
    assert dict(zip(joined.ids, joined.gold)) == {row.id: row.label for row in rows}
    np.testing.assert_allclose(joined.probs[: len(rows[::3])], probs_near(rows[::3]))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"folds": 5},
            "fold=1/valid.csv: folds: found 5, expected 3 as in runs/x-fold=0/valid.csv",
        ),
        ({"folds": 0}, "fold=1/valid.csv: folds: found 0, expected the valid.csv of a train.py"),
        ({"fold": 0}, "fold=1/valid.csv: fold: found 0, expected each fold once"),
        ({"version": {"content": "b"}}, "fold=1/valid.csv: rows: found 'b', expected 'a' as in"),
        ({"clean": False}, "fold=1/valid.csv: clean: found False, expected True as in"),
        ({"labels": None}, "fold=1/valid.csv: folds: found 3, expected the valid.csv of a train"),
        ({"labels": KLUE_LABELS[::-1]}, "fold=1/valid.csv: labels: found ['per:religion', 'org:"),
    ],
)
def test_folds_that_do_not_fit_are_one_line(call, folds, changes, expected):
    folds(1, **changes)
    assert expected in call(report, "folds", PATTERN, code=2).err


def test_a_missing_fold_is_named(call, folds, tmp_path):
    before = (tmp_path / "runs/x-fold=0/valid.csv").read_bytes()
    refused = call(report, "folds", "runs/x-fold=0/valid.csv", "runs/x-fold=2/valid.csv", code=2)
    assert "x-fold=0/valid.csv: found no fold 1, expected all 3 folds" in refused.err
    refused = call(report, "folds", PATTERN, "--out", "runs/x-fold=0/valid.csv", code=2)
    assert "expected another file than those that are read" in refused.err
    assert (tmp_path / "runs/x-fold=0/valid.csv").read_bytes() == before
    assert "runs/y/valid.csv: " in call(report, "folds", "runs/y/valid.csv", code=2).err
    folds(2, finished=False)
    printed = call(report, "folds", PATTERN).out
    assert "runs/x-fold=2/valid.csv: its run has not finished" in printed


def test_files_of_folds_that_are_not_of_their_run_are_one_line(call, folds, tmp_path, rows):
    def refused(part, probs, gold=True):
        write(path, part, probs)
        if not gold:
            names = [KLUE_LABELS[c] for c in probs.argmax(1)]
            write_predictions(path, [r.id for r in part], names, probs)
        return call(report, "folds", PATTERN, code=2).err

    path, part = tmp_path / "runs/x-fold=1/valid.csv", rows[1::3]
    place = "runs/x-fold=1/valid.csv"
    expected = f"{place}:2: id: found '{rows[0].id}', expected no id of runs/x-fold=0/valid.csv"
    assert expected in refused([rows[0], *part[1:]], probs_near(part))
    expected = f"{place}: probabilities per row: found 4, expected the 30 labels of its summary"
    assert expected in refused(part, np.full((len(part), 4), 0.25))
    expected = f"{place}:3: label: found 'other', expected one of 30 known labels"
    wrong = [part[0], part[1]._replace(label="other"), *part[2:]]
    assert expected in refused(wrong, probs_near(part))
    assert f"{place}: header: found 'no column label'" in refused(part, probs_near(part), False)
    assert not (tmp_path / "oof.csv").exists()
    summary = path.with_name("summary.json")
    summary.write_text("[]")
    expected = "fold=1/summary.json: summary: found [], expected the summary of a run, an object"
    assert expected in call(report, "folds", PATTERN, code=2).err


def test_folds_with_other_settings_are_named(call, folds):
    folds(2, seed=43, device="cuda")
    printed = call(report, "folds", PATTERN).out
    found = "its run has other settings than that of runs/x-fold=0/valid.csv: seed\n"
    assert f"runs/x-fold=2/valid.csv: {found}" in printed
    for fold in range(3):  # the demo makes an encoder for each run
        folds(fold, demo=True, model=f"runs/x-fold={fold}/tiny_encoder")
    assert "other settings" not in call(report, "folds", PATTERN).out


# --- suspects ---------------------------------------------------------------------------------


def planted(rows, share=0.02):
    """(rows with wrong labels, their ids)."""
    random = np.random.default_rng(0)
    chosen = random.choice(len(rows), round(share * len(rows)), replace=False)
    wrong = list(rows)
    for i in chosen:
        others = [label for label in KLUE_LABELS if label != rows[i].label]
        wrong[i] = rows[i]._replace(label=str(random.choice(others)))
    return wrong, {rows[i].id for i in chosen}


def test_planted_errors_are_found_and_corrected(call, tmp_path, rows):
    wrong, ids = planted(rows)
    write_rows(tmp_path / "train.csv", wrong)
    write(tmp_path / "oof.csv", wrong, probs_near(rows))
    printed = call(report, "labels", "train.csv", "--oof", "oof.csv").out
    lines = [x for x in read(tmp_path / "runs/labels/rows.csv") if "probabilities" in x["found_by"]]
    found = [line["id"] for line in lines]
    assert len(ids & set(found)) / len(found) > 0.9  # precision
    assert len(ids & set(found)) / len(ids) > 0.6  # recall
    label_of = {row.id: row.label for row in rows}
    assert all(x["new_label"] == label_of[x["id"]] for x in lines if x["id"] in ids)
    quality = [float(line["quality"]) for line in lines]
    assert quality == sorted(quality)
    probs = {r.id: p for r, p in zip(wrong, probs_near(rows))}
    given = [probs[x["id"]][KLUE_LABELS.index(x["label"])] for x in lines]
    np.testing.assert_allclose(quality, given, atol=1e-4)
    assert len(found) == sum(p.argmax() != KLUE_LABELS.index(r.label)
                             for r, p in zip(wrong, probs.values()))  # fmt: skip
    assert f"{len(lines)} of {len(rows)} rows, worst first" in printed
    page = (tmp_path / "runs/labels/index.html").read_text(encoding="utf-8")
    first = next(row for row in rows if row.id == found[0])
    assert f"{first.id}: {lines[0]['label']} 0." in page
    assert f"likely {lines[0]['new_label']}" in page
    assert '<mark class="s">' in page

    again = "labels", "train.csv", "--oof", "oof.csv"
    call(report, *again)  # the same content
    path = tmp_path / "runs/labels/rows.csv"
    edited = "\n".join(path.read_text(encoding="utf-8").splitlines()[:3])
    path.write_text(edited, encoding="utf-8")
    assert "runs/labels/rows.csv: has another content, maybe" in call(report, *again, code=2).err
    assert path.read_text(encoding="utf-8") == edited


def test_near_duplicates_and_rare_types_are_listed(call, tmp_path, rows):
    sentence = "서울에 본사를 둔 새한전자는 1985년 3월에 한태영이 세운 회사이다"
    entities = ("새한전자", "한태영")
    near = [
        row(sentence, *entities, "org:founded_by", "a", ("ORG", "PER")),
        row(f"{sentence}.", *entities, "no_relation", "b", ("ORG", "PER")),
        row(f"{sentence}!", *entities, "org:founded_by", "c", ("ORG", "PER")),
        row("한태영이 새한전자를 떠났다", *entities, "no_relation", "d", ("ORG", "PER")),
    ]
    birth = [row(sentence, "한태영", "1985년", "per:date_of_birth", f"r{i}", ("PER", "DAT"))
             for i in range(150)]  # fmt: skip
    birth[7] = birth[7]._replace(subject=birth[7].subject._replace(type="POH"))
    pairs = labels.alike(near)
    assert [{a.id, b.id} for _, a, b in pairs] == [{"a", "b"}, {"b", "c"}]
    assert all(shared > 0.9 for shared, _, _ in pairs)
    assert [(n, r.id) for n, r in labels.rare([*near, *birth], "no_relation")] == [(1, "r7")]
    assert labels.rare(birth, "per:date_of_birth") == []
    everything = [*rows, *near, *birth]
    write_rows(tmp_path / "train.csv", everything)
    write(tmp_path / "oof.csv", rows, probs_near(rows))
    printed = call(report, "labels", "train.csv", "--oof", "oof.csv", "--out", "out").out
    assert "r7: per:date_of_birth has POH-DAT in 1 of" in printed
    assert "of the trigrams shared with b" in printed
    lines = {line["id"]: line for line in read(tmp_path / "out/rows.csv")}
    assert lines["b"]["found_by"] == "near-duplicate"
    assert lines["r7"]["found_by"] == "types"
    assert lines["r7"]["new_label"] == "per:date_of_birth"  # without probabilities
    assert lines["r7"]["quality"] == ""


def test_bad_probabilities_are_one_line(call, tmp_path, rows):
    write_rows(tmp_path / "train.csv", rows)
    part = rows[:300]
    write(tmp_path / "oof.csv", [*part, part[0]._replace(id="x")], probs_near([*part, part[0]]))
    command = ["labels", "train.csv", "--oof", "oof.csv"]
    expected = "oof.csv:302: id: found 'x', expected an id of train.csv"
    assert expected in call(report, *command, code=2).err
    write(tmp_path / "oof.csv", [part[0]._replace(label="x"), *part[1:]], probs_near(part))
    expected = f"oof.csv:2: label: found 'x', expected {part[0].label!r} as in train.csv:2"
    assert expected in call(report, *command, code=2).err
    probs = np.full((300, 2), 0.5)
    write_predictions(tmp_path / "oof.csv", [r.id for r in part], ["no_relation"] * 300, probs)
    expected = "oof.csv: probabilities per row: found 2, expected the 30 labels of train.csv"
    assert expected in call(report, *command, code=2).err
    part = [r for r in part if r.label == "per:title"]
    write(tmp_path / "oof.csv", part, probs_near(part))
    expected = f"oof.csv: found per:title as the label of all {len(part)} rows, expected at least"
    assert expected in call(report, *command, code=2).err


def test_without_cleanlab_the_message_says_what_installs_it(call, tmp_path, rows, monkeypatch):
    monkeypatch.setitem(sys.modules, "cleanlab", None)
    write(tmp_path / "oof.csv", rows, probs_near(rows))
    refused = call(report, "labels", SAMPLE / "train.csv", "--oof", "oof.csv", code=2).err
    expected = "report.py labels needs the package cleanlab: pip install -r requirements-dev.txt"
    assert expected in refused


@pytest.mark.slow
def test_from_folds_to_a_training_without_the_worst_rows(call, encoder_folder, tmp_path):
    arguments = f"--data {SAMPLE} --model {encoder_folder} --lr 1e-3 --amp off --limit 200"
    arguments = [*arguments.split(), "--epochs", 1]
    for fold in (0, 1):
        call(train, *arguments, "--folds", 2, "--fold", fold, "--out", f"runs/x-fold={fold}")
    call(report, "folds", PATTERN)
    call(report, "labels", SAMPLE / "train.csv", "--oof", "oof.csv")
    assert len(read(tmp_path / "oof.csv")) == len(read_rows(SAMPLE / "train.csv"))
    done = call(train, *arguments, "--drop", "runs/labels/rows.csv", "--out", "a")
    assert "rows.csv: dropped " in done.out
    done = call(train, *arguments, "--relabel", "runs/labels/rows.csv", "--out", "b")
    assert "rows.csv: changed the label of " in done.out
    call(train, *arguments, "--soft-labels", "oof.csv", "--soft-mix", 1, "--out", "c")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("table", "arms"),
    [
        ("students", ["recipe", "vote of the recipe", "student, unlabelled rows", "student, both"]),
        ("errors", ["all rows", "without the worst 1%", "soft targets for the worst 5%"]),
    ],
)
def test_the_tool_measures_what_they_gain(call, monkeypatch, encoder_folder, table, arms):
    programs = {"train.py": train, "infer.py": infer, "report.py": report}

    def program(self, name, *arguments):  # in this process: saves minutes
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        programs[name].main()

    monkeypatch.setattr(soft_targets.Runs, "program", program)
    options = ["--table", table, "--data", SAMPLE, "--model", encoder_folder, "--out", "o"]
    options += ["--seeds", 1, "--folds", 2, "--limit", 200, "--", "--lr", 1e-3, "--epochs", 1]
    printed = call(soft_targets, *options).out
    last = printed[printed.rindex("\narm ") :]
    for arm in arms:
        assert f"\n{arm}  " in last
    assert ("precision %" in printed) == (table == "errors")


@pytest.mark.slow
def test_the_tool_ends_with_the_error_of_the_program_that_failed(run):
    options = ["--data", SAMPLE, "--model", "nowhere", "--out", "o"]
    done = run("tools/soft_targets.py", "--table", "students", *options, code=2)
    assert "Traceback" not in done.stderr
    last = done.stderr.splitlines()[-1]
    assert last == "soft_targets.py: train.py failed; the same command goes on from here"
