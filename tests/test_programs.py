"""The three commands that users type, one after the other, and voting."""

import ast
import csv
import json
import re
import shutil
from dataclasses import fields

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

import ensemble
import infer
import train
from data import KLUE_LABELS
from metrics import read_predictions, write_predictions
from settings import Settings
from tests.helpers import SAMPLE, next_commands, write_rows


def read(path):
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def check_predictions(predicted):
    """One row of 30 probabilities for each row of the sample's test_data.csv."""
    assert [row["id"] for row in predicted] == [row["id"] for row in read(SAMPLE / "test_data.csv")]
    for row in predicted:
        probs = json.loads(row["probs"])
        assert len(probs) == 30
        assert abs(sum(probs) - 1) < 1e-9
        assert row["pred_label"] == KLUE_LABELS[int(np.argmax(probs))]


def test_short_demo_then_infer_then_ensemble(call, tmp_path):
    done = call(train, "--demo", "--epochs", 1, "--limit", 100)
    assert next_commands(done.out) == [["python", "infer.py", "runs/demo/ckpt.pt"]]
    valid = read(tmp_path / "runs/demo/valid.csv")
    assert list(valid[0]) == ["id", "label", "pred_label", "probs"]
    assert re.search(r"micro F1 \d", call(infer, "runs/demo/ckpt.pt").out)
    predicted = read(tmp_path / "out/demo.csv")
    check_predictions(predicted)
    call(ensemble, "out/demo.csv")
    voted = read(tmp_path / "submission.csv")
    assert [row["pred_label"] for row in voted] == [row["pred_label"] for row in predicted]


@pytest.mark.slow
def test_demo_then_infer_then_ensemble(run, call, tmp_path):
    done = run("train.py", "--demo")
    f1 = float(re.findall(r"\nmicro F1 (\d+\.\d+)", done.stdout)[-1])
    assert f1 > 80
    (command,) = next_commands(done.stdout)
    assert command == ["python", "infer.py", "runs/demo/ckpt.pt"]
    summary = json.loads((tmp_path / "runs/demo/summary.json").read_text())
    assert summary["best"]["micro_f1"] == pytest.approx(f1, abs=0.01)
    check_events(EventAccumulator(str(tmp_path / "runs/demo"), {"images": 0}).Reload())  # 0: all

    done = run(*command[1:])
    assert re.search(r"micro F1 \d", done.stdout)
    predicted = read(tmp_path / "out/demo.csv")
    check_predictions(predicted)

    # two processes write the same file
    checkpoint = "runs/demo/ckpt.pt"
    run("infer.py", checkpoint, "--out", "two/demo.csv", "--amp", "off", processes=2)
    call(infer, checkpoint, "--out", "one/demo.csv", "--amp", "off", "--max-tokens", 100)
    paths = (tmp_path / "one/demo.csv", tmp_path / "two/demo.csv")
    one, two = (read_predictions(str(path)) for path in paths)
    assert (one.ids, one.predicted) == (two.ids, two.predicted)
    np.testing.assert_allclose(one.probs, two.probs, atol=1e-5)

    run("ensemble.py", "out/demo.csv", "two/demo.csv")
    given = read(SAMPLE / "test_data.csv")
    assert [row["id"] for row in read(tmp_path / "submission.csv")] == [row["id"] for row in given]
    check_one_sentence(call, given[0], predicted[0]["pred_label"])

    (tmp_path / checkpoint).write_bytes((tmp_path / checkpoint).read_bytes()[:1000])
    assert "truncated" in call(infer, checkpoint, code=2).err


def test_the_printed_commands_work_whatever_the_folders_are_called_and_hold(
    call, encoder_folder, tmp_path, rows
):
    """Names with spaces, a bad row that was skipped, an out/ with the files of other runs."""
    shutil.copytree(encoder_folder, tmp_path / "an encoder")
    (tmp_path / "my data").mkdir()
    write_rows(tmp_path / "my data/train.csv", rows)
    submission(tmp_path / "out/other.csv", probs_of({0: 1.0}))
    arguments = "--limit 60 --epochs 1 --lr 1e-3 --amp off --skip-bad-rows --split stratified"
    arguments = [*arguments.split(), "--data", "my data", "--model", "an encoder"]
    done = call(train, *arguments, "--out", "my runs/no test")
    (command,) = next_commands(done.out)
    assert command[-2:] == ["--data", "FILE"]
    assert "FILE is what to predict: found no test_data." in done.out
    call(infer, *command[2:-1], "my data/train.csv")

    write_rows(tmp_path / "my data/test_data.csv", [rows[0]._replace(id=""), *rows[:9]])
    done = call(train, *arguments, "--seeds", 2, "--out", "my runs/a b")
    one, other, both = next_commands(done.out)
    paths = [f"my runs/a b-seed={seed}/ckpt.pt" for seed in (42, 43)]
    options = ["--amp=off", "--skip-bad-rows"]
    assert [one, other, both] == [
        ["python", "infer.py", *checkpoints, *options]
        for checkpoints in (paths[:1], paths[1:], paths)
    ]
    assert "9 rows of" in call(infer, *both[2:]).out


def check_events(events):
    """TensorBoard's data of a demo run with 8 evaluations."""
    scalars = events.Tags()["scalars"]
    assert {"train/loss", "valid/micro_f1", "valid_label_f1/per:title"} <= set(scalars)
    # TensorBoard sorts groups by name, and opens the first two
    groups = sorted({tag.split("/")[0] for tag in scalars})
    assert groups == ["train", "valid", "valid_best", "valid_label_f1"]
    assert {"pr/per:title", "worst mistakes/text_summary"} <= set(events.Tags()["tensors"])
    assert events.Tags()["images"] == ["confusion matrix"]
    assert len(events.Images("confusion matrix")) == 8
    hparams = events.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    columns = HParamsPluginData.FromString(hparams).session_start_info.hparams
    assert set(columns) == {f.name for f in fields(Settings) if f.metadata["named"]}


def check_one_sentence(call, row, label):
    """--sentence gives the label that the row has in the file of predictions."""
    entities = [ast.literal_eval(row[f"{who}_entity"]) for who in ("subject", "object")]
    subject, obj = (f"{entity['word']}:{entity['type']}" for entity in entities)
    arguments = ["runs/demo/ckpt.pt", "--sentence", row["sentence"], "--object", obj, "--subject"]
    lines = call(infer, *arguments, subject).out.strip().splitlines()
    assert len(lines) == 5
    assert lines[0].split()[1] == label
    wrong = call(infer, *arguments, "없는 말:PER", code=2)
    assert wrong.err.startswith("infer.py: --subject: found '없는 말:PER'")


@pytest.mark.slow
def test_the_demo_and_its_tokenizer_are_the_same_in_each_process(run, call, tmp_path):
    arguments = ["--demo", "--epochs", 1, "--limit", 300, "--out"]
    call(train, *arguments, "a")
    run("train.py", *arguments, "b")
    for file in ("tiny_encoder/tokenizer.json", "tiny_encoder/model.safetensors", "valid.csv"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes(), file


def test_a_sentence_in_another_encoding_is_one_line(call):
    sentence, word = "비틀즈의 노래".encode("cp949").decode("utf-8", "surrogateescape"), "노래"
    options = ["--sentence", sentence, "--subject", word, "--object", word]
    assert "bytes that are not UTF-8" in call(infer, "none.pt", *options, code=2).err


@pytest.mark.slow
def test_the_benchmark_measures_this_project(run, encoder_folder, monkeypatch):
    monkeypatch.delenv("KLUE_RE", raising=False)
    command = ["tools/benchmark.py", "--model", encoder_folder]
    measured = json.loads(run(*command, "--turn", "ours", "--rows", 96).stdout.splitlines()[-1])
    assert set(measured) == {"train", "predict", "flops", "tokens", "peak"}
    assert min(measured.values()) > 0
    done = run(*command, "--start", "--rounds", 1)
    assert re.fullmatch(r"\d+\.\d s to the first step\n", done.stdout)


# --- voting -----------------------------------------------------------------------------------


def submission(path, probs, ids=None, predicted=None):
    probs = np.array(probs, dtype=float)
    ids = ids or [str(i) for i in range(len(probs))]
    write_predictions(path, ids, predicted or [KLUE_LABELS[c] for c in probs.argmax(1)], probs)
    return str(path)


def probs_of(*rows):
    """Rows of 30 probabilities, each given as {class: probability}."""
    probs = np.zeros((len(rows), 30))
    for i, row in enumerate(rows):
        for c, p in row.items():
            probs[i, c] = p
    return probs


@pytest.fixture
def three(tmp_path):
    probs = {
        "a": probs_of({0: 0.9, 1: 0.1}, {2: 0.6, 3: 0.4}, {5: 1.0}),
        "b": probs_of({1: 0.6, 0: 0.4}, {3: 0.9, 2: 0.1}, {5: 1.0}),
        "c": probs_of({1: 0.6, 0: 0.4}, {4: 0.8, 3: 0.2}, {5: 1.0}),
    }
    return [submission(tmp_path / f"in/{name}.csv", probs[name]) for name in probs]


def test_hard_and_soft_votes(call, three, tmp_path):
    done = call(ensemble, *three)
    hard = read_predictions(str(tmp_path / "submission.csv"))
    # Row 0: two of three. Row 1: a tie of three classes; 3 has the highest mean probability.
    assert hard.predicted == [KLUE_LABELS[1], KLUE_LABELS[3], KLUE_LABELS[5]]
    np.testing.assert_allclose(hard.probs[0][:2], [1 / 3, 2 / 3])
    assert "66.7" in done.out
    call(ensemble, *three, "--soft", "--out", "soft.csv")
    soft = read_predictions(str(tmp_path / "soft.csv"))
    assert soft.predicted == [KLUE_LABELS[0], KLUE_LABELS[3], KLUE_LABELS[5]]
    np.testing.assert_allclose(soft.probs[0][:2], [1.7 / 3, 1.3 / 3])
    call(ensemble, *three, "--weights", 3, 1, 1, "--out", "weighted.csv")
    weighted = read_predictions(str(tmp_path / "weighted.csv"))
    assert weighted.predicted[0] == KLUE_LABELS[0]
    np.testing.assert_allclose(weighted.probs[0][:2], [0.6, 0.4])


BASE = probs_of({0: 1.0}, {1: 1.0}, {2: 1.0})
BAD_FILES = {
    "missing": ({"probs": BASE[:2]}, r"1 rows of .*a.csv are missing, such as id '2'"),
    "extra": ({"probs": BASE[[0, 1, 2, 2]]}, r"1 rows are not in .*a.csv, such as id '3'"),
    "others": ({"probs": BASE, "ids": ["0", "1", "x"]}, r"missing, such as id '2'"),
    "repeated": (
        {"probs": BASE, "ids": ["0", "1", "1"]},
        r"repeated.csv:4: id: found '1', expected a unique id; line 3 has it too",
    ),
    "classes": ({"probs": BASE[:, :29]}, r"classes: found 29, expected 30"),
    "sum": ({"probs": BASE * 0.98}, r"sum.csv:2: probs: found .* that sum to 1, not to 0\.98$"),
    "above": ({"probs": BASE * 2}, r"above.csv:2: probs: found 2.0, expected numbers from 0 to 1"),
    "nan": ({"probs": BASE * np.nan}, r"nan.csv:2: probs: found"),
    "negative": (
        {"probs": probs_of({0: 1.5, 1: -0.5}, {1: 1}, {2: 1})},
        r"negative.csv:2: probs: found",
    ),
    "names": (
        {"probs": BASE, "predicted": [KLUE_LABELS[9]] * 3},
        r"names.csv:2: pred_label: found .* the most probable class, .* \(3 of 3 rows differ\)",
    ),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_is_one_line_and_nothing_is_written(call, three, tmp_path, name):
    (tmp_path / "submission.csv").write_text("old")
    content, expected = BAD_FILES[name]
    bad = submission(tmp_path / f"bad/{name}.csv", **content)
    refused = call(ensemble, three[0], bad, code=2).err
    assert re.search(expected, refused), refused
    assert len(refused.strip().splitlines()) == 1
    assert (tmp_path / "submission.csv").read_text() == "old"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("in/absent.csv", "in/absent.csv: cannot be read"),
        ("in/a.csv --weights 1 2", "--weights: found 2, expected 1"),
        ("in/a.csv --weights 0", "--weights: found"),
        ("in/a.csv --out in/vote.csv", "--out in/vote.csv: expected another folder"),
        ("absent.csv", "absent.csv: cannot be read"),  # in the folder of --out
        ("in/a.csv ./in/a.csv", "files: found one twice"),
    ],
)
def test_bad_arguments_of_a_vote_are_one_line(call, three, tmp_path, arguments, expected):
    (tmp_path / "submission.csv").write_text("old")
    refused = call(ensemble, *arguments.split(), code=2).err
    assert refused.startswith(f"ensemble.py: {expected}")
    assert len(refused.strip().splitlines()) == 1
    assert (tmp_path / "submission.csv").read_text() == "old"


def test_files_in_another_order_are_aligned_by_id(call, three, tmp_path):
    call(ensemble, *three, "--soft", "--out", "expected.csv")
    b = read_predictions(three[1])
    submission(tmp_path / "in/b.csv", b.probs[[2, 0, 1]], ["2", "0", "1"])
    done = call(ensemble, *three, "--soft")
    assert f"{three[1]}: its rows are in another order than in {three[0]}; aligned" in done.out
    assert (tmp_path / "submission.csv").read_bytes() == (tmp_path / "expected.csv").read_bytes()
    assert "order" not in call(ensemble, three[0]).out


def test_labels_that_a_second_step_has_changed_count_in_a_hard_vote_only(call, three, tmp_path):
    a = read_predictions(three[0])
    changed = [KLUE_LABELS[7], *a.predicted[1:]]
    submission(tmp_path / "in/a.csv", a.probs, predicted=changed)
    found = f"{three[0]}: the label of 1 of 3 rows is not the one with the highest probability; "
    done = call(ensemble, three[0])
    assert f"{found}the vote is on the labels" in done.out
    assert read_predictions(str(tmp_path / "submission.csv")).predicted == changed
    done = call(ensemble, three[0], "--soft")
    assert f"{found}the vote is on the probabilities" in done.out
    assert read_predictions(str(tmp_path / "submission.csv")).predicted == a.predicted


def test_probabilities_in_another_order_of_labels_are_found_among_many_negative_rows(
    call, three, tmp_path
):
    """Both orders have no_relation first, and most rows are no_relation."""
    probs = probs_of(*[{0: 1.0}] * 8, {1: 1.0}, {2: 1.0})
    other = [KLUE_LABELS[c] for c in [0] * 8 + [2, 1]]
    path = submission(tmp_path / "in/other.csv", probs, predicted=other)
    refused = call(ensemble, path, code=2).err
    assert "other.csv:10: pred_label: found 'org:members', expected 'org:top_members" in refused
    assert "(2 of 10 rows differ)" in refused


def test_own_labels_are_named_by_most_rows_and_must_all_be_known(call, tmp_path):
    probs = np.eye(2)[[0, 0, 0, 1, 1, 1]]
    labels = ["none", "none", "b", "b", "b", "b"]  # the third was changed
    path = submission(tmp_path / "in/own.csv", probs, predicted=labels)
    assert "the label of 1 of 6 rows" in call(ensemble, path).out
    assert read_predictions(str(tmp_path / "submission.csv")).predicted == labels
    path = submission(tmp_path / "in/own.csv", probs, predicted=[*labels[:5], "c"])
    refused = call(ensemble, path, code=2).err
    assert "own.csv:7: pred_label: found 'c', expected a label that has the" in refused
