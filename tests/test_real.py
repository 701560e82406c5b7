"""KLUE-RE and a real encoder, whose folders two environment variables name:

KLUE_RE=data RE_ENCODER=DIR python -m pytest -m slow tests/test_real.py
"""

import csv
import json
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from analysis import count_table, repeat_table, shared_table
from data import KLUE_LABELS, Template, find_labels, with_known_labels
from encoder import load_tokenizer
from rows import read_rows
from splits import clean, split
from tests.helpers import repeats_counted_from_the_file
from tokens import encode

pytestmark = pytest.mark.slow
KLUE_RE, RE_ENCODER = os.environ.get("KLUE_RE"), os.environ.get("RE_ENCODER")
needs_data = pytest.mark.skipif(not KLUE_RE, reason="KLUE_RE is not set")
needs_both = pytest.mark.skipif(
    not (KLUE_RE and RE_ENCODER), reason="KLUE_RE and RE_ENCODER are not set"
)


def read_cells(path):
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@needs_data
def test_klue_re_is_read_cleaned_and_split_as_in_the_report():
    rows = read_rows(Path(KLUE_RE) / "train.csv")
    assert len(rows) == 32470
    assert find_labels(rows) == KLUE_LABELS
    rows, removed = clean(with_known_labels(rows, KLUE_LABELS))
    assert len(removed) == 47
    assert {"6749", "8364", "22258", "4212"} <= {row.id for row in removed}
    test = read_rows(Path(KLUE_RE) / "test_data.csv")
    assert len(test) == 7765
    assert {row.label for row in test} == {None}
    train, valid = split(rows, KLUE_LABELS, 0.11, 42, 0.6, test)
    assert not {r.sentence for r in train} & {r.sentence for r in valid}
    assert len(valid) > 3000
    for part, share in ((valid, 0.372), (test, 0.408)):  # objects of type POH: 15.7 % in train
        found = np.mean([r.object.type == "POH" for r in part])
        assert found == pytest.approx(share, abs=0.001)
    subjects = {r.subject.word for r in train}
    for part, share in ((valid, 0.375), (test, 0.330)):  # subjects of train: 78.5 % in train
        found = np.mean([r.subject.word in subjects for r in part])
        assert found == pytest.approx(share, abs=0.04)
    negatives = Counter(r.label for r in valid)["no_relation"]
    assert negatives / len(valid) == pytest.approx(0.544, abs=0.001)


@needs_data
def test_tables_of_klue_re_match_the_report_and_an_independent_count():
    path, test_path = Path(KLUE_RE) / "train.csv", Path(KLUE_RE) / "test_data.csv"
    files = {"train": read_rows(path), "test": read_rows(test_path)}
    repeats = [line["train"] for line in repeat_table(files)]
    assert repeats == [3667, 877, 1263, 47, 42]
    assert repeats == repeats_counted_from_the_file(path)
    cells = read_cells(path)
    for column in ("label", "source"):
        table = count_table(files, column, lambda row, column=column: getattr(row, column))
        counts = {line[column]: line["train"] for line in table if line["train"]}
        assert counts == Counter(record[column] for record in cells)
    sentences = {record["sentence"] for record in read_cells(test_path)}
    shared = shared_table(files)[0]
    assert shared["different"] == len(sentences & {record["sentence"] for record in cells})
    assert shared["rows of train"] == sum(record["sentence"] in sentences for record in cells)


@needs_both
def test_markers_are_found_in_every_row():
    rows, tokenizer = read_rows(Path(KLUE_RE) / "train.csv")[:3000], load_tokenizer(RE_ENCODER)
    examples, _ = encode(rows, Template(), tokenizer, KLUE_LABELS, 256)
    for row, example in zip(rows, examples):
        ids = example.ids[list(example.marker_starts)].tolist()
        subject, obj = tokenizer.convert_ids_to_tokens(ids)
        assert "@" in subject, row
        assert "#" in obj, row
    for row, example in zip(rows[:300], examples):
        rendered = Template().render(row)
        assert example.ids.tolist() == tokenizer(rendered.before, rendered.text)["input_ids"]


@needs_both
def test_a_real_encoder_trains_and_predicts(run, tmp_path):
    data = tmp_path / "klue"
    data.mkdir()
    for name, n in (("train.csv", 1500), ("test_data.csv", 200)):
        with open(Path(KLUE_RE) / name, encoding="utf-8", newline="") as file:
            table = list(csv.reader(file))[: n + 1]
        with open(data / name, "w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows(table)
    settings = "--head bilstm --lr 1.5e-4 --batch-size 32 --epochs 1 --limit 200 "
    settings += "--split stratified --out runs/real"
    done = run("train.py", "--data", data, "--model", RE_ENCODER, *settings.split())
    assert "200 training rows" in done.stdout
    done = run("infer.py", "runs/real/ckpt.pt")
    predicted = read_cells(tmp_path / "out/real.csv")
    rows = read_rows(data / "test_data.csv")
    assert [record["id"] for record in predicted] == [row.id for row in rows]
    assert all(abs(sum(json.loads(record["probs"])) - 1) < 1e-9 for record in predicted)
    assert "micro F1" not in done.stdout
