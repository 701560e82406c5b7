"""Soft targets, and training rows dropped and relabelled."""

import csv
import re
import shlex

import numpy as np
import pytest
import torch

import infer
import train
from common import InputError
from data import KLUE_LABELS
from distributed import Worker
from metrics import read_predictions, write_predictions
from rows import read_rows
from settings import Settings
from splits import choose_rows
from targets import edited, with_targets
from task import RelationTask
from tests.helpers import ROOT, SAMPLE, write_rows

LABELS = dict(enumerate(KLUE_LABELS))


def predictions(path, ids, gold=None, seed=0, n_classes=30):
    """Write random probabilities; returns them (N, n_classes)."""
    ids = list(ids)
    probs = np.random.default_rng(seed).dirichlet(np.full(n_classes, 0.1), len(ids))
    predicted = [LABELS[c] for c in probs.argmax(1)]
    write_predictions(path, ids, predicted, probs, gold)
    return probs


def edits(path, rows, columns=("id", "label", "new_label")):
    with open(path, "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([columns, *rows])
    return str(path)


@pytest.fixture
def chosen():
    """The rows of a short run; choosing them does not depend on the settings that are tested."""
    return choose_rows(settings(soft_labels=("x.csv",)), lambda text: None)


def settings(**options):
    return Settings(data=str(SAMPLE), split="stratified", limit=100, **options)


# --- soft targets -----------------------------------------------------------------------------


def test_targets_mix_labels_with_probabilities_and_weight_the_rows_of_test_data(tmp_path, chosen):
    ids = [row.id for row in chosen.read]
    gold = [row.label for row in chosen.read]
    known = [row.id for row in chosen.train[:60]] + [chosen.valid[0].id]
    label_of = dict(zip(ids, gold))
    oof = predictions(tmp_path / "oof.csv", known, [label_of[i] for i in known])
    test_ids = [row.id for row in read_rows(SAMPLE / "test_data.csv")]
    a, b = (predictions(tmp_path / f"{n}.csv", test_ids, seed=n) for n in (1, 2))
    files = tuple(str(tmp_path / name) for name in ("oof.csv", "1.csv", "2.csv"))
    messages = []
    options = settings(soft_labels=files, soft_mix=0.7, soft_weight=2.0)
    rows, targets = with_targets(options, chosen, chosen.train, messages.append)
    hard = np.eye(30)[[KLUE_LABELS.index(row.label) for row in chosen.train]]
    np.testing.assert_allclose(targets[:60], 0.7 * oof[:60] + 0.3 * hard[:60], atol=1e-6)
    np.testing.assert_array_equal(targets[60:100], hard[60:])
    assert rows[:100] == chosen.train
    held_out = {row.sentence for row in chosen.valid}
    extra = rows[100:]
    assert not held_out & {row.sentence for row in extra}
    assert all(row.label is None for row in extra)
    which = [test_ids.index(row.id) for row in extra]
    np.testing.assert_allclose(targets[100:], a[which] + b[which], atol=1e-6)
    assert f"soft targets: 60 of 100 training rows, and {len(extra)} rows of test_data" in messages
    assert any("1 of its 61 rows are not trained on (validation rows" in m for m in messages)


def test_a_row_of_test_data_with_a_validation_sentence_is_left_out(tmp_path, rows):
    write_rows(tmp_path / "train.csv", rows)
    options = Settings(
        data=str(tmp_path), split="stratified", soft_labels=(str(tmp_path / "vote.csv"),)
    )
    held_out = choose_rows(options, lambda text: None).valid[0]
    test = [rows[0]._replace(label=None), held_out._replace(label=None)]
    write_rows(tmp_path / "test_data.csv", [x._replace(id=f"t{i}") for i, x in enumerate(test)])
    predictions(tmp_path / "vote.csv", ["t0", "t1"])
    chosen, messages = choose_rows(options, lambda text: None), []
    found, _ = with_targets(options, chosen, chosen.train, messages.append)
    extra = found[len(chosen.train) :]
    assert chosen.valid[0].sentence not in {row.sentence for row in extra}
    n = 2 - len(extra)
    assert f"left out {n} rows of test_data whose sentences are validation sentences" in messages


def test_ids_that_two_files_have_belong_to_the_file_that_they_are_all_of(tmp_path, chosen):
    """The training file and test_data have the ids 0 to 299; a submission has all of the latter."""
    path = tmp_path / "vote.csv"
    options = settings(soft_labels=(str(path),))
    predictions(path, map(str, range(300)))
    found, _ = with_targets(options, chosen, chosen.train, print)
    assert len(found) > len(chosen.train)
    predictions(path, [row.id for row in chosen.read])  # infer.py --data train.csv
    messages = []
    found, _ = with_targets(options, chosen, chosen.train, messages.append)
    assert found == chosen.train
    predicted = read_predictions(str(path)).predicted
    n = sum(row.label == label for row, label in zip(chosen.read, predicted))
    found = f"{n} of its {len(predicted)} predictions are the training rows' labels"
    assert messages[0] == f"{path}: {found}"
    predictions(path, map(str, range(299)))
    with pytest.raises(InputError, match=r"its 299 ids are ids of .*train.csv and of test_data"):
        with_targets(options, chosen, chosen.train, print)


def test_bad_rows_of_test_data_are_counted_once_with_every_split(tmp_path, rows):
    """With other splits than test-like only the soft labels need these rows."""
    write_rows(tmp_path / "train.csv", rows)
    bad = rows[1]._replace(id="b", subject=rows[1].subject._replace(word="엉뚱"))
    write_rows(tmp_path / "test_data.csv", [rows[0]._replace(id="t", label=None), bad])
    predictions(tmp_path / "vote.csv", ["t"])
    for split in ("stratified", "test-like"):
        options = {"data": str(tmp_path), "split": split, "skip_bad_rows": True}
        options = Settings(**options, soft_labels=(str(tmp_path / "vote.csv"),))
        messages = []
        chosen = choose_rows(options, messages.append)
        with_targets(options, chosen, chosen.train, messages.append)
        (line,) = [text for text in messages if "bad rows" in text]
        assert line.startswith(f"bad rows left out: 1, the first: {tmp_path / 'test_data.csv'}:3: ")


def test_probabilities_are_used_if_a_later_step_changed_labels(tmp_path, chosen):
    path, messages = tmp_path / "vote.csv", []
    probs = predictions(path, map(str, range(300)))
    predicted = [LABELS[c] for c in probs.argmax(1)]
    predicted[0] = "per:title"
    write_predictions(path, list(map(str, range(300))), predicted, probs)
    with_targets(settings(soft_labels=(str(path),)), chosen, chosen.train, messages.append)
    differs = "the label of 1 of 300 rows is not the one with the highest probability"
    assert f"{path}: {differs}; the probabilities are used" in messages


def test_a_file_of_soft_labels_is_given_once(tmp_path):
    (tmp_path / "link.csv").symlink_to(tmp_path / "vote.csv")
    files = tuple(str(tmp_path / name) for name in ("vote.csv", "link.csv"))
    with pytest.raises(InputError, match="--soft-labels: found a file twice"):
        settings(soft_labels=files).check()


def test_without_soft_labels_examples_have_no_targets(encoder_folder, chosen):
    assert with_targets(settings(), chosen, chosen.train, print) == (chosen.train, None)
    options = settings(model=str(encoder_folder), lr=1e-3)
    task = RelationTask(options, Worker(torch.device("cpu")), lambda text: None)
    assert task.batch(np.arange(3), 0).targets is None


def test_types_of_rows_without_labels_are_not_related(encoder_folder, tmp_path, rows):
    """Triples are predicted of types that have a relation in a labelled row."""
    write_rows(tmp_path / "train.csv", rows)
    row = rows[0]._replace(id="t", label=None, subject=rows[0].subject._replace(type="NOH"))
    write_rows(tmp_path / "test_data.csv", [row])
    predictions(tmp_path / "vote.csv", ["t"])
    options = {"data": str(tmp_path), "model": str(encoder_folder), "valid": "none"}
    options |= {"split": "stratified", "soft_labels": (str(tmp_path / "vote.csv"),)}
    task = RelationTask(Settings(**options), Worker(torch.device("cpu")), lambda text: None)
    assert task.examples[-1].label == -1
    related = {(r.subject.type, r.object.type) for r in rows if r.label != "no_relation"}
    assert set(map(tuple, task.pairs)) == related


BAD = {
    "nowhere": "vote.csv:2: id: found 'x', expected an id of .*train.csv or test_data",
    "of other rows": "vote.csv:2: label: found 'per:title', expected 'no_relation' as in .*train",
    "of other labels": "vote.csv: probabilities per row: found 4, expected the 30 labels of",
    "in another order": "vote.csv:2: pred_label: found .*, the most probable class, in most rows",
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_soft_labels_are_one_line(tmp_path, chosen, kind):
    path, row = tmp_path / "vote.csv", next(r for r in chosen.read if r.label == "no_relation")
    if kind == "nowhere":
        predictions(path, ["x", "0"])
    elif kind == "of other rows":
        predictions(path, [row.id], ["per:title"])
    elif kind == "of other labels":
        predictions(path, ["0", "1"], n_classes=4)
    else:
        probs = np.random.default_rng(0).dirichlet(np.full(30, 0.1), 300)
        predicted = [LABELS[c] for c in probs[:, ::-1].argmax(1)]
        write_predictions(path, list(map(str, range(300))), predicted, probs)
    with pytest.raises(InputError, match=BAD[kind]) as error:
        with_targets(settings(soft_labels=(str(path),)), chosen, chosen.train, print)
    assert "\n" not in str(error.value)


# --- rows dropped and relabelled --------------------------------------------------------------


def test_rows_are_dropped_and_relabelled_but_not_in_validation(tmp_path, chosen):
    a, b, c, d = chosen.train[:4]
    held_out = chosen.valid[0]
    drop = edits(tmp_path / "drop.csv", [(r.id,) for r in (a, b, held_out)], ["id"])
    new = "per:title" if c.label != "per:title" else "no_relation"
    lines = [(c.id, c.label, new), (d.id, d.label, d.label), (held_out.id, held_out.label, new)]
    relabel = edits(tmp_path / "relabel.csv", lines)
    messages = []
    found = edited(settings(drop=drop, relabel=relabel), chosen, messages.append)
    assert found == [c._replace(label=new), d, *chosen.train[4:]]
    assert messages[0] == f"{drop}: dropped 2 training rows"
    assert f"{drop}: 1 of its 3 rows are not trained on" in messages[1]
    assert messages[2] == f"{relabel}: changed the label of 1 training rows"
    assert f"{relabel}: 1 of its 3 rows are not trained on" in messages[3]


@pytest.mark.parametrize(
    ("option", "line", "expected"),
    [
        ("drop", ("x", "", ""), "rows.csv:2: id: found 'x', expected an id of the training"),
        (
            "relabel",
            ("x", "", ""),
            "rows.csv:2: id: found 'x', expected an id of the training",
        ),
        ("drop", (None, "other", ""), "rows.csv:2: label: found 'other', expected '.*' as in"),
        (
            "relabel",
            (None, None, "x"),
            "rows.csv:2: new_label: found 'x', expected one of 30",
        ),
        ("relabel", (None, None, ""), "rows.csv:2: new_label: found '', expected one of 30"),
    ],
)
def test_bad_edits_are_one_line(tmp_path, chosen, option, line, expected):
    row = chosen.train[0]
    given = [value if value is not None else own for value, own in zip(line, (row.id, row.label))]
    path = edits(tmp_path / "rows.csv", [[*given, line[2]]])
    with pytest.raises(InputError, match=expected):
        edited(settings(**{option: path}), chosen, print)


def test_ids_are_compared_as_they_are(tmp_path, rows):
    """Also those with spaces, as report.py labels writes them."""
    write_rows(tmp_path / "train.csv", [rows[0]._replace(id=" 0"), *rows[1:]])
    options = {"data": str(tmp_path), "split": "stratified", "valid": "none"}
    options["drop"] = edits(tmp_path / "drop.csv", [(" 0",)], ["id"])
    chosen = choose_rows(Settings(**options), lambda text: None)
    messages = []
    assert edited(Settings(**options), chosen, messages.append) == chosen.train[1:]


def test_the_ids_of_a_file_of_edits_are_unique_and_some_rows_stay(tmp_path, chosen):
    path = edits(tmp_path / "rows.csv", [("0",), ("0",)], ["id"])
    with pytest.raises(InputError, match=r"rows.csv:3: id: found '0', expected each id once"):
        edited(settings(drop=path), chosen, print)
    path = edits(tmp_path / "rows.csv", [(row.id,) for row in chosen.train], ["id"])
    with pytest.raises(InputError, match="it has all training rows, expected some of them"):
        edited(settings(drop=path), chosen, print)
    path = edits(tmp_path / "rows.csv", [], ["id"])
    with pytest.raises(InputError, match=r"rows.csv: no rows"):
        edited(settings(drop=path), chosen, print)


# --- train.py ---------------------------------------------------------------------------------


def test_training_with_soft_labels_and_edits_resumes_only_with_the_same_ones(
    call, encoder_folder, tmp_path
):
    predictions(tmp_path / "vote.csv", map(str, range(300)))
    first = next(row for row in read_rows(SAMPLE / "train.csv") if row.label == "no_relation")
    edits(tmp_path / "new.csv", [(first.id, first.label, "per:title")])
    edits(tmp_path / "drop.csv", [("1",), ("2",)], ["id"])
    arguments = f"--data {SAMPLE} --model {encoder_folder} --lr 1e-3 --amp off --limit 60"
    arguments += " --epochs 1 --valid none --out a --soft-labels vote.csv --relabel new.csv"
    arguments += " --drop drop.csv"
    done = call(train, *arguments.split())
    assert "soft targets: 0 of 60 training rows, and 300 rows of test_data" in done.out
    assert "already finished" in call(train, *arguments.split()).out
    expected = "last.pt: saved with other rows, targets, focal alphas or encoder"
    predictions(tmp_path / "vote.csv", map(str, range(300)), seed=1)
    assert expected in call(train, *arguments.split(), code=2).err
    refused = call(train, *arguments.split(), "--soft-labels", "b.csv", "vote.csv", code=2).err
    assert "b.csv: cannot be read" in refused
    name = "tiny-entity-drop=x.csv-relabel=y.csv"
    assert Settings(model="tiny", drop="a/x.csv", relabel="y.csv").name() == name
    name = "tiny-entity-soft_labels=x.csv+y.csv-soft_mix=1.0"
    assert Settings(model="tiny", soft_labels=("a/x.csv", "y.csv"), soft_mix=1.0).name() == name


@pytest.mark.slow
def test_the_four_commands_of_the_docs_make_one_model_of_three_seeds(call, tmp_path):
    text = (ROOT / "docs/running.md").read_text(encoding="utf-8")
    section = text.split("## From three seeds to one model\n")[1].split("\n## ")[0]
    commands = re.findall(r"^    (python .+)$", section, re.MULTILINE)[:4]
    programs = {"train.py": train, "infer.py": infer}
    for command in commands:
        _, name, *arguments = shlex.split(command)
        done = call(programs[name], *arguments)
    voted, student = (read_predictions(tmp_path / f"out/{x}.csv") for x in ("vote", "student"))
    assert voted.ids == student.ids
    assert np.mean([a == b for a, b in zip(voted.predicted, student.predicted)]) > 0.7
    assert float(re.search(r"micro F1 (\d+\.\d+)", done.out)[1]) > 70
