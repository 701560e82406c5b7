"""The Python snippets of the documents, run as they stand there."""

import json
import os
import re
import shutil
import subprocess
import sys
from functools import partialmethod

import numpy as np
import pytest

import infer
from calibration import temper
from metrics import read_predictions
from predictor import Predictor
from tests.helpers import ROOT, SAMPLE


def snippets(name: str) -> list:
    """A parameter for each snippet, named after its heading."""
    text = (ROOT / "docs" / name).read_text(encoding="utf-8")
    found = []
    for section in re.split(r"^## ", text, flags=re.MULTILINE)[1:]:
        for code in re.findall(r"^```python\n(.*?)^```", section, re.MULTILINE | re.DOTALL):
            found.append((section.splitlines()[0], code))
    return found


def example(name: str, start: str) -> str:
    """The indented block of a document that starts so."""
    text = (ROOT / "docs" / name).read_text(encoding="utf-8")
    return re.search(rf"^    {re.escape(start)}.*\n(    .*\n)*", text, re.MULTILINE)[0]


SNIPPETS = snippets("python.md")
(RAY,) = snippets("running.md")


@pytest.fixture
def folder(tmp_path, checkpoint, monkeypatch):
    """An empty folder with the sample and a checkpoint where the snippets expect them."""
    (tmp_path / "runs/demo").mkdir(parents=True)
    shutil.copy(checkpoint, tmp_path / "runs/demo/ckpt.pt")
    (tmp_path / "sample").symlink_to(SAMPLE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_snippet(heading: str) -> dict:
    """Run the snippet under a heading; returns its variables."""
    variables = {"__name__": "__main__"}
    exec(compile(dict(SNIPPETS)[heading], heading, "exec"), variables)
    return variables


def test_every_snippet_has_a_test():
    tested = ("Predict", "Triples", "Columns: datasets", "A web service",
              "Probabilities as an array", "Errors", "Train", "Export", "Export")  # fmt: skip
    assert tuple(heading for heading, _ in SNIPPETS) == tested


def test_predict(folder, capsys):
    run_snippet("Predict")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert len(set(lines)) == 1
    assert lines[0].endswith(" 30")


def test_triples(folder, capsys):
    found = run_snippet("Triples")["predictor"].triples
    assert found("조동제와 강릉", [{"word": w, "type": "PER"} for w in ("조동제", "강릉")], 0)


def test_datasets(folder, call, monkeypatch):
    pytest.importorskip("datasets")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", folder / "cache")
    predicted = run_snippet("Columns: datasets")["predicted"]
    call(infer, "runs/demo/ckpt.pt", "--data", "sample", "--out", "a.csv")
    expected = read_predictions("a.csv")
    assert predicted["pred_label"][:] == expected.predicted
    probs = temper(expected.probs, 2.0)  # the checkpoint's temperature
    np.testing.assert_allclose(predicted["probs"][:], probs, atol=1e-6)


def test_web_service(folder, monkeypatch):
    client = pytest.importorskip("fastapi.testclient")
    monkeypatch.setenv("CHECKPOINT", "runs/demo/ckpt.pt")
    app = client.TestClient(run_snippet("A web service")["app"])
    row = {"sentence": "조동제와 문서연", "subject": {"word": "조동제", "type": "PER"},
           "object": {"word": "문서연", "type": "PER"}}  # fmt: skip
    found = app.post("/predict", json=[row])
    assert found.status_code == 200
    assert found.json()[0]["label"]
    wrong = app.post("/predict", json=[{"sentence": "조동제"}])
    assert (wrong.status_code, wrong.json()["detail"][:6]) == (422, "row 0:")
    monkeypatch.setattr(Predictor, "triples", partialmethod(Predictor.triples, threshold=0))
    found = app.post("/triples", json={"sentence": row["sentence"],
                                       "entities": [row["subject"], row["object"]]})  # fmt: skip
    assert found.json()[0]["subject"] in (
        {"word": "조동제", "start_idx": 0, "end_idx": 2, "type": "PER"},
        {"word": "문서연", "start_idx": 5, "end_idx": 7, "type": "PER"},
    )


def test_probabilities(folder, capsys):
    run_snippet("Probabilities as an array")
    assert capsys.readouterr().out.endswith("(300, 30) [0] True\n")


def test_errors(folder, capsys):
    run_snippet("Errors")
    (line,) = re.findall(r"print\(error\)  # (.*)", dict(SNIPPETS)["Errors"])
    assert capsys.readouterr().out == f"{line}\n"


def test_the_examples_of_files(folder, call):
    """data.md's words and entities, and running.md's line of triples."""
    words = example("data.md", "sentence,subject,object").replace("    ", "")
    (folder / "words.csv").write_text(words, encoding="utf-8")
    assert "1 rows of words.csv" in call(infer, "runs/demo/ckpt.pt", "--data", "words.csv").out
    entities = json.loads(example("data.md", '{"id": "a", "sentence"'))
    (folder / "texts.jsonl").write_text(json.dumps(entities), encoding="utf-8")
    options = "--data", "texts.jsonl", "--threshold", 0, "--triples", "out/triples.jsonl"
    call(infer, "runs/demo/ckpt.pt", *options)
    lines = (folder / "out/triples.jsonl").read_text(encoding="utf-8").splitlines()
    shown = json.loads(example("running.md", '{"id": "0", "subject"'))
    assert list(json.loads(lines[0])) == list(shown)
    assert list(json.loads(lines[0])["subject"]) == list(shown["subject"])


@pytest.mark.slow
def test_train(folder, capsys):
    run_snippet("Train")
    assert "micro F1" in capsys.readouterr().out


@pytest.mark.slow
def test_ray(folder, call):
    """Two workers of Ray Data write what infer.py writes."""
    pytest.importorskip("ray", reason="ray is not installed: pip install 'ray[data]'")
    import pyarrow.parquet

    (folder / "predict_with_ray.py").write_text(RAY[1], encoding="utf-8")
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    quiet = {"PYTHONPATH": path, "RAY_USAGE_STATS_ENABLED": "0"}
    done = subprocess.run(
        [sys.executable, "predict_with_ray.py"], env=os.environ | quiet, capture_output=True,
        text=True, timeout=400, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    call(infer, "runs/demo/ckpt.pt", "--data", "sample", "--out", "a.csv")
    expected = read_predictions("a.csv")
    table = pyarrow.parquet.read_table("out/ray").to_pylist()
    found = {str(row["id"]): row for row in table}
    assert len(table) == len(found) == len(expected.ids)
    assert [found[id_]["pred_label"] for id_ in expected.ids] == expected.predicted
    probs = [found[id_]["probs"] for id_ in expected.ids]
    np.testing.assert_allclose(probs, temper(expected.probs, 2.0), atol=1e-6)
