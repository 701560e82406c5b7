"""Data sets of the Hugging Face hub, from a folder with the same layout; downloads; versions."""

import csv
import json
import os

import datasets
import pytest
import torch

import data
import infer
import train
from common import InputError
from data import KLUE_LABELS, version
from rows import ENTITY_FIELDS, data_file, read_rows, rows_to_predict
from tests.helpers import SAMPLE, write_rows

TEXT, NUMBER = datasets.Value("string"), datasets.Value("int32")
ENTITY = dict(zip(ENTITY_FIELDS, (TEXT, NUMBER, NUMBER, TEXT)))
LABELS = KLUE_LABELS[::-1]  # the data set numbers its labels in another order
CARD = """---
configs:
- config_name: re
  data_files:
  - {split: train, path: re/train-*}
  - {split: validation, path: re/validation-*}
---
"""


def without_ids(rows):
    return [row[1:-1] for row in rows]


@pytest.fixture(scope="session")
def hub(tmp_path_factory, rows):
    """hub:FOLDER@refs/v1:re with 300 training rows and 100 validation rows of the sample."""
    folder = tmp_path_factory.mktemp("hub") / "own-re"
    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("cache")
    features = {"guid": TEXT, "sentence": TEXT, "subject_entity": ENTITY, "object_entity": ENTITY,
                "label": datasets.ClassLabel(names=LABELS), "source": TEXT}  # fmt: skip

    def record(row):
        entities = (dict(zip(ENTITY_FIELDS, e)) for e in (row.subject, row.object))
        cells = [f"own_{row.id}", row.sentence, *entities, LABELS.index(row.label), row.source]
        return dict(zip(features, cells))

    for split, part in (("train", rows[:300]), ("validation", rows[300:400])):
        records = [record(row) for row in part]
        table = datasets.Dataset.from_list(records, features=datasets.Features(features))
        table.to_parquet(folder / "re" / f"{split}-00000-of-00001.parquet")
    (folder / "README.md").write_text(CARD)
    return f"hub:{folder}@refs/v1:re"


def test_a_hub_data_set_has_the_rows_of_the_file(hub, rows):
    found = read_rows(data_file(hub, "train"))
    assert without_ids(found) == without_ids(rows[:300])
    assert found[0].id == "own_" + rows[0].id
    # without a test split, the validation split is predicted
    assert without_ids(read_rows(data_file(hub, "test_data"))) == without_ids(rows[300:400])
    assert version(hub, found)["revision"] == "refs/v1"
    assert version(hub, found) != version(hub, found[1:])
    with pytest.raises(InputError, match=r"splits: found \['train', 'validation'\], expected dev"):
        read_rows(data_file(hub, "dev"))


@pytest.mark.parametrize(
    "spec", ["hub:klue", "hub:klue/klue", "hub:klue/klue:re", "hub:nobody/has-it@v1:re"]
)
def test_a_hub_data_set_that_cannot_be_read_is_a_one_line_error(spec):
    with pytest.raises(InputError, match=spec.replace("/", ".")) as raised:
        read_rows(data_file(spec, "train"))
    assert "\n" not in str(raised.value)


@pytest.mark.slow  # the hub's client retries for 20 seconds
def test_a_download_without_a_network_is_a_one_line_error(run, tmp_path):
    network = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)}
    done = run("data.py", "--download", code=2, env=os.environ | network)
    assert done.stderr.startswith("data.py: hub:klue/klue@main:re: cannot be read from the Hugging")
    assert len(done.stderr.splitlines()) == 1


def test_a_run_stores_the_version_of_its_data(call, hub, encoder_folder, tmp_path, rows):
    settings = "--split stratified --amp off --epochs 1 --lr 1e-3 --out a"
    call(train, "--data", hub, "--model", encoder_folder, *settings.split())
    expected, run = version(hub, read_rows(data_file(hub, "train"))), tmp_path / "a"
    assert json.loads((run / "summary.json").read_text())["version"] == expected
    assert torch.load(run / "ckpt.pt", weights_only=True)["version"] == expected
    events = run.glob("events.out.tfevents*")
    assert any(expected["content"].encode() in file.read_bytes() for file in events)
    assert "100 rows of hub:" in call(infer, "a/ckpt.pt").out  # the validation split
    # --data means the same in every program: a split, a folder, a file
    assert "300 rows of hub:" in call(infer, "a/ckpt.pt", "--data", f"{hub}/train").out
    write_rows(tmp_path / "test_data.csv", rows[:3])
    for named in (tmp_path, tmp_path / "test_data.csv"):
        printed = call(infer, "a/ckpt.pt", "--data", named).out
        assert f"3 rows of {tmp_path / 'test_data.csv'}" in printed


def test_a_data_set_needs_no_other_split_than_train(rows, tmp_path):
    own = [{"sentence": r.sentence, "subject": r.subject.word, "object": r.object.word,
            "label": r.label} for r in rows[:300]]  # fmt: skip
    (tmp_path / "own").mkdir()
    datasets.Dataset.from_list(own).to_parquet(tmp_path / "own/train.parquet")
    hub = f"hub:{tmp_path / 'own'}@main"
    assert rows_to_predict(hub, log=str) == []
    with pytest.raises(InputError, match=r"splits: found \['train'\], expected validation"):
        read_rows(data_file(hub, "validation"))


def test_a_download_has_the_competitions_format(call, hub, rows, tmp_path):
    call(data, "--download", hub)
    folder = tmp_path / "data"
    for name, part in (("train", rows[:300]), ("dev", rows[300:400])):
        assert without_ids(read_rows(folder / f"{name}.csv")) == without_ids(part)
    with open(folder / "test_data.csv", encoding="utf-8", newline="") as file:
        table = list(csv.DictReader(file))
    assert {line["label"] for line in table} == {"100"}
    with open(SAMPLE / "train.csv", encoding="utf-8", newline="") as file:
        assert list(table[0]) == list(next(csv.DictReader(file)))
    before = (folder / "train.csv").read_bytes()
    assert "data/train.csv: exists already" in call(data, "--download", hub, code=2).err
    for other in (f"{hub}/train", "data/train.csv", hub.removesuffix(":re") + "/train"):
        found = f"--download: found {other}, expected hub:OWNER/NAME@REVISION[:CONFIG] without"
        assert found in call(data, "--download", other, "--out", "other", code=2).err
    assert not (tmp_path / "other").exists()
    assert (folder / "train.csv").read_bytes() == before

    unchanged = "0 rows added (+), 0 removed (-), 0 relabelled (~)"
    assert unchanged in call(data, "--diff", hub, "data").out
