"""The three commands that users type, one after the other, and voting."""

import csv
import json
import re
from dataclasses import fields

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

import infer
from data import KLUE_LABELS, Entity, InputError
from infer import entity_of
from metrics import read_predictions, write_predictions
from tests.conftest import SAMPLE
from train import NOT_OPTIMISATION, Settings


def read(path):
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_demo_then_infer_then_ensemble(run, tmp_path):
    done = run("train.py", "--demo")
    f1 = float(re.findall(r"\nmicro F1 (\d+\.\d+)", done.stdout)[-1])
    assert f1 > 80
    commands = re.findall(r"^  python (.*)$", done.stdout, re.MULTILINE)
    assert commands == ["infer.py runs/demo/ckpt.pt", "ensemble.py out/*.csv"]
    valid = read(tmp_path / "runs/demo/valid.csv")
    assert list(valid[0]) == ["id", "label", "pred_label", "probs"]
    assert json.loads((tmp_path / "runs/demo/summary.json").read_text())["best"]["micro_f1"] == pytest.approx(
        f1, abs=0.01
    )
    events = EventAccumulator(str(tmp_path / "runs/demo"), {"images": 0}).Reload()  # 0: all
    assert {"train/loss", "valid/micro_f1", "label_f1/per:title"} <= set(events.Tags()["scalars"])
    assert {"pr/per:title", "worst mistakes/text_summary"} <= set(events.Tags()["tensors"])
    assert events.Tags()["images"] == ["confusion matrix"]
    assert len(events.Images("confusion matrix")) == 8  # evaluations
    hparams = events.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    columns = HParamsPluginData.FromString(hparams).session_start_info.hparams
    assert set(columns) == {field.name for field in fields(Settings)} - set(NOT_OPTIMISATION)

    done = run(*commands[0].split())
    assert re.search(r"micro F1 \d", done.stdout)
    predicted, given = read(tmp_path / "out/demo.csv"), read(SAMPLE / "test_data.csv")
    assert [row["id"] for row in predicted] == [row["id"] for row in given]
    for row in predicted:
        probs = json.loads(row["probs"])
        assert len(probs) == 30
        assert abs(sum(probs) - 1) < 1e-9
        assert row["pred_label"] == KLUE_LABELS[int(np.argmax(probs))]

    # two processes write the same file
    run("infer.py", "runs/demo/ckpt.pt", "--out", "two/demo.csv", "--amp", "off", processes=2)
    run("infer.py", "runs/demo/ckpt.pt", "--out", "one/demo.csv", "--amp", "off", "--max-tokens", "100")
    one, two = read_predictions(str(tmp_path / "one/demo.csv")), read_predictions(str(tmp_path / "two/demo.csv"))
    assert (one.ids, one.predicted) == (two.ids, two.predicted)
    np.testing.assert_allclose(one.probs, two.probs, atol=1e-5)

    run("ensemble.py", "out/demo.csv", "two/demo.csv")
    voted = read(tmp_path / "submission.csv")
    assert [row["id"] for row in voted] == [row["id"] for row in given]

    row = given[0]
    subject, object = (eval_free_entity(row[f]) for f in ("subject_entity", "object_entity"))
    one_sentence = ["--sentence", row["sentence"], "--subject", subject, "--object", object]
    lines = run("infer.py", "runs/demo/ckpt.pt", *one_sentence).stdout.strip().splitlines()
    assert len(lines) == 5
    assert lines[0].split()[1] == predicted[0]["pred_label"]
    wrong = run("infer.py", "runs/demo/ckpt.pt", *one_sentence[:3], "없는 말:PER", *one_sentence[4:], code=2)
    assert wrong.stderr.startswith("infer.py: --subject: found '없는 말:PER'")
    (tmp_path / "runs/demo/ckpt.pt").write_bytes((tmp_path / "runs/demo/ckpt.pt").read_bytes()[:1000])
    assert "truncated" in run("infer.py", "runs/demo/ckpt.pt", code=2).stderr


def test_the_demo_is_the_same_in_each_process_its_tokenizer_too(run, tmp_path):
    for name in ("a", "b"):
        run("train.py", "--demo", "--epochs", "1", "--out", name)
    for file in ("tiny_encoder/tokenizer.json", "tiny_encoder/model.safetensors", "valid.csv"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes(), file


def eval_free_entity(cell):
    return "{}:{}".format(*re.match(r"""\{'word': ['"](.*)['"], 'start.*'type': '(\w+)'\}""", cell).groups())


def test_a_sentence_in_another_encoding_is_one_line(call):
    sentence, word = ("비틀즈의 노래".encode("cp949").decode("utf-8", "surrogateescape"), "노래")
    options = ["--sentence", sentence, "--subject", word, "--object", word]
    assert "bytes that are not UTF-8" in call(infer, "none.pt", *options, code=2).err


def test_an_entity_is_found_in_the_sentence_and_typed_as_the_model_knows():
    sentence, types = "오전 10:30에 비틀즈가", ["PER", "ORG"]
    assert entity_of(sentence, "비틀즈:ORG", "--object", types) == Entity("비틀즈", 10, 12, "ORG")
    assert entity_of(sentence, "비틀즈:ROBOT", "--object", None).type == "ROBOT"
    assert entity_of(sentence, "10:30", "--object", types) == Entity("10:30", 3, 7, None)
    assert entity_of(sentence, "10:30:PER", "--object", types) == Entity("10:30", 3, 7, "PER")
    assert entity_of(sentence, "10:30", "--object", None) == Entity("10:30", 3, 7, None)
    with pytest.raises(InputError, match=r"--object: found type 'PERSON', expected one of PER, ORG"):
        entity_of(sentence, "비틀즈:PERSON", "--object", types)
    for wrong in ("비틀스:ORG", "비틀스", ":ORG"):
        with pytest.raises(InputError, match=r"--object: found .* not in the sentence"):
            entity_of(sentence, wrong, "--object", types)


# --- voting ------------------------------------------------------------------------------------------------------


def submission(path, probs, ids=None, predicted=None):
    probs = np.array(probs, dtype=float)
    ids = ids or [str(i) for i in range(len(probs))]
    write_predictions(path, ids, predicted or [KLUE_LABELS[c] for c in probs.argmax(1)], probs)
    return str(path)


def probs_of(*pairs):
    """Rows of 30 probabilities, each given as {class: probability}."""
    out = np.zeros((len(pairs), 30))
    for i, row in enumerate(pairs):
        for c, p in row.items():
            out[i, c] = p
    return out


@pytest.fixture
def three(tmp_path):
    a = probs_of({0: 0.9, 1: 0.1}, {2: 0.6, 3: 0.4}, {5: 1.0})
    b = probs_of({1: 0.6, 0: 0.4}, {3: 0.9, 2: 0.1}, {5: 1.0})
    c = probs_of({1: 0.6, 0: 0.4}, {4: 0.8, 3: 0.2}, {5: 1.0})
    return [submission(tmp_path / "in" / f"{name}.csv", p) for name, p in (("a", a), ("b", b), ("c", c))]


def test_hard_and_soft_votes(run, three, tmp_path):
    done = run("ensemble.py", *three)
    hard = read_predictions(str(tmp_path / "submission.csv"))
    # row 0: two of three; row 1: a tie of three, won by the highest summed probability (class 3: 0.4 + 0.9 + 0.2)
    assert hard.predicted == [KLUE_LABELS[1], KLUE_LABELS[3], KLUE_LABELS[5]]
    np.testing.assert_allclose(hard.probs[0][:2], [1 / 3, 2 / 3])
    assert "66.7" in done.stdout
    run("ensemble.py", *three, "--soft", "--out", "soft.csv")
    soft = read_predictions(str(tmp_path / "soft.csv"))
    assert soft.predicted == [KLUE_LABELS[0], KLUE_LABELS[3], KLUE_LABELS[5]]
    np.testing.assert_allclose(soft.probs[0][:2], [1.7 / 3, 1.3 / 3])
    run("ensemble.py", *three, "--weights", "3", "1", "1", "--out", "weighted.csv")
    weighted = read_predictions(str(tmp_path / "weighted.csv"))
    assert weighted.predicted[0] == KLUE_LABELS[0]
    np.testing.assert_allclose(weighted.probs[0][:2], [0.6, 0.4])


def test_files_that_do_not_fit_are_refused_and_nothing_is_written(run, three, tmp_path):
    base = probs_of({0: 1.0}, {1: 1.0}, {2: 1.0})
    (tmp_path / "submission.csv").write_text("old")
    cases = {
        "missing": ({"probs": base[:2]}, r"1 rows of .*a.csv are missing, such as id '2'"),
        "extra": ({"probs": base[[0, 1, 2, 2]]}, r"1 rows are not in .*a.csv, such as id '3'"),
        "others": ({"probs": base, "ids": ["0", "1", "x"]}, r"missing, such as id '2'"),
        "order": ({"probs": base, "ids": ["1", "0", "2"]}, r"order.csv:2: id: found '1', expected '0'"),
        "repeated": ({"probs": base, "ids": ["0", "1", "1"]}, r"repeated.csv:4: id: found '1', expected another"),
        "classes": ({"probs": base[:, :29]}, r"found 29 classes, expected 30"),
        "sum": ({"probs": base * 2}, r"sum.csv:2: probs: found .* expected numbers from 0 to 1 that sum to 1"),
        "nan": ({"probs": base * np.nan}, r"nan.csv:2: probs: found"),
        "negative": ({"probs": probs_of({0: 1.5, 1: -0.5}, {1: 1}, {2: 1})}, r"negative.csv:2: probs: found"),
        "names": ({"probs": base, "predicted": [KLUE_LABELS[9]] * 3}, r"names.csv:2: pred_label: found"),
    }  # fmt: skip
    for name, (content, message) in cases.items():
        bad = submission(tmp_path / "bad" / f"{name}.csv", **content)
        done = run("ensemble.py", three[0], bad, code=2)
        assert re.search(message, done.stderr), (name, done.stderr)
        assert len(done.stderr.strip().splitlines()) == 1
    for arguments in (["in/absent.csv"], [three[0], "--weights", "1", "2"], [three[0], "--out", "in/vote.csv"]):
        assert len(run("ensemble.py", *arguments, code=2).stderr.strip().splitlines()) == 1
    assert (tmp_path / "submission.csv").read_text() == "old"
