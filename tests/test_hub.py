"""Versioned data: a data set of the hub's layout in a folder, what changed between two versions, KLUE-RE's download."""

import csv
import json

import datasets
import pytest
import torch

import infer
import report
import train
from data import KLUE_LABELS, InputError, data_file, diff, read_rows, version
from tests.conftest import SAMPLE

ENTITY = {"word": datasets.Value("string"), "start_idx": datasets.Value("int32"),
          "end_idx": datasets.Value("int32"), "type": datasets.Value("string")}  # fmt: skip
CARD = """---
configs:
- config_name: re
  data_files:
  - {split: train, path: re/train-*}
  - {split: validation, path: re/validation-*}
---
"""


@pytest.fixture(scope="session")
def hub(tmp_path_factory, rows):
    """hub:FOLDER@refs/v1:re of the sample's rows, 300 to train, 100 to validate on; its order of labels is another."""
    folder = tmp_path_factory.mktemp("hub") / "own-re"
    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("cache")
    features = {"guid": datasets.Value("string"), "sentence": datasets.Value("string"), "subject_entity": ENTITY,
                "object_entity": ENTITY, "label": datasets.ClassLabel(names=KLUE_LABELS[::-1]),
                "source": datasets.Value("string")}  # fmt: skip

    def record(row):
        entities = ({"word": e.word, "start_idx": e.start, "end_idx": e.end, "type": e.type} for e in row[2:4])
        number = KLUE_LABELS[::-1].index(row.label)
        return dict(zip(features, [f"own_{row.id}", row.sentence, *entities, number, row.source]))

    for split, part in (("train", rows[:300]), ("validation", rows[300:400])):
        table = datasets.Dataset.from_list([record(row) for row in part], features=datasets.Features(features))
        table.to_parquet(folder / "re" / f"{split}-00000-of-00001.parquet")
    (folder / "README.md").write_text(CARD)
    return f"hub:{folder}@refs/v1:re"


def test_a_hub_data_set_is_read_as_a_file_is(hub, rows):
    found = read_rows(data_file(hub, "train"))
    assert [row[1:-1] for row in found] == [row[1:-1] for row in rows[:300]]
    assert found[0].id == "own_" + rows[0].id
    assert [row[1:-1] for row in read_rows(data_file(hub, "test_data"))] == [row[1:-1] for row in rows[300:400]]
    assert version(hub, found)["revision"] == "refs/v1"
    assert version(hub, found) != version(hub, found[1:])


@pytest.mark.parametrize("spec", ["hub:klue", "hub:klue/klue", "hub:klue/klue:re", "hub:nobody/has-it@v1:re"])
def test_what_cannot_be_read_is_one_line(spec):
    with pytest.raises(InputError, match=spec.replace("/", ".")) as raised:
        read_rows(data_file(spec, "train"))
    assert "\n" not in str(raised.value)


def test_a_run_knows_the_version_of_its_data(call, hub, encoder_folder, tmp_path):
    settings = f"--data {hub} --model {encoder_folder} --split stratified --amp off --epochs 1 --lr 1e-3 --out a"
    call(train, *settings.split())
    expected = version(hub, read_rows(data_file(hub, "train")))
    assert json.loads((tmp_path / "a" / "summary.json").read_text())["version"] == expected
    assert torch.load(tmp_path / "a" / "ckpt.pt", weights_only=True)["version"] == expected
    events = (tmp_path / "a").glob("events.out.tfevents*")
    assert any(expected["content"].encode() in file.read_bytes() for file in events)
    assert "100 rows of hub:" in call(infer, "a/ckpt.pt").out  # its validation rows, as there is no split called test


def test_the_download_has_the_competitions_format(call, hub, rows, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "main", report.data_report, raising=False)
    call(report, "--download", hub)
    for name, part in (("train", rows[:300]), ("dev", rows[300:400])):
        assert [row[1:-1] for row in read_rows(tmp_path / "data" / f"{name}.csv")] == [row[1:-1] for row in part]
    with open(tmp_path / "data" / "test_data.csv", encoding="utf-8", newline="") as file:
        table = list(csv.DictReader(file))
    assert {line["label"] for line in table} == {"100"}
    with open(SAMPLE / "train.csv", encoding="utf-8", newline="") as file:
        assert list(table[0]) == list(next(csv.DictReader(file)))
    before = (tmp_path / "data" / "train.csv").read_bytes()
    assert "data/train.csv: is there already" in call(report, "--download", hub, code=2).err
    assert (tmp_path / "data" / "train.csv").read_bytes() == before

    assert "0 rows added (+), 0 removed (-), 0 relabelled (~)" in call(report, "--diff", hub, "data").out


def test_rows_added_removed_and_relabelled(rows):
    old = rows[:20]
    new = [*old[:5], old[5]._replace(label="per:religion", id="x"), *old[7:], rows[30], old[0]]
    added, removed, relabelled = diff(old, new)
    assert added == [rows[30], old[0]]  # a row that is there twice now is one more
    assert removed == [old[6]]
    assert relabelled == [(old[5], new[5])]
    assert sorted(diff(new, old)[1]) == sorted(added)
    assert diff(old, old[::-1]) == ([], [], [])
