"""Predictor: rows as dicts, columns, triples, threads, copies in other processes."""

import pickle
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch

import infer
import train
from calibration import temper
from checkpoint import load_checkpoint, save_tensors
from common import InputError
from distributed import local_device
from metrics import read_predictions
from predictor import Predictor, version_of
from rows import ENTITY_FIELDS, Row, read_rows
from tests.helpers import ROOT, SAMPLE, nfd, write_rows

TEXT = "인천대학교는 1979년 인천에서 문을 열었다."
WORDS = {"subject": "인천대학교", "subject_type": "ORG", "object": "인천", "object_type": "LOC"}


@pytest.fixture(scope="module")
def predictor(checkpoint):
    return Predictor(checkpoint)


def as_dict(row: Row) -> dict:
    entities = (dict(zip(ENTITY_FIELDS, entity)) for entity in (row.subject, row.object))
    return dict(zip(("sentence", "subject_entity", "object_entity"), (row.sentence, *entities)))


def test_rows_are_dicts_with_words_offsets_or_the_competitions_entities(predictor):
    org = {"word": "인천대학교", "start_idx": 0, "end_idx": 4, "type": "ORG"}
    loc = {"word": "인천", "start_idx": 13, "end_idx": 14, "type": "LOC"}
    without_end = [{k: v for k, v in e.items() if k != "end_idx"} for e in (org, loc)]
    rows = [
        {"sentence": TEXT, **WORDS},
        {"sentence": TEXT, "subject": {"word": "인천대학교", "type": "ORG"}, "object": loc},
        {"sentence": TEXT, "subject": without_end[0], "object": without_end[1]},
        {"sentence": TEXT, "subject_entity": org, "object_entity": str(loc)},
        {"sentence": nfd(TEXT), **{key: nfd(text) for key, text in WORDS.items()}},
        {"sentence": nfd(TEXT), "subject": org, "object": without_end[1]},
    ]
    first, *others = predictor.predict(rows)
    assert list(first["probabilities"]) == list(predictor.labels)
    assert sum(first["probabilities"].values()) == pytest.approx(1)
    assert first["probability"] == max(first["probabilities"].values())
    assert first["probabilities"][first["label"]] == first["probability"]
    for other in others:
        assert other["probabilities"] == pytest.approx(first["probabilities"], abs=1e-6)
    elsewhere = {**rows[0], "object": {"word": "인천", "start_idx": 0, "type": "LOC"}}
    (moved,) = predictor.predict([elsewhere])
    assert moved["probabilities"] != pytest.approx(first["probabilities"], abs=1e-6)
    assert predictor.predict([]) == []


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({**WORDS}, "row 1: no field sentence; found 'subject, "),
        ({"sentence": None}, "row 1: sentence: found None, expected text"),
        ({"sentence": TEXT, "subj": "a"}, "row 1: no field subject_entity or subject; found 'sent"),
        ({"sentence": TEXT, "subject": None}, "row 1: subject: found None, expected a word of"),
        ({"sentence": TEXT, **WORDS, "object": "서울"}, "row 1: object: word: found '서울', expec"),
        ({"sentence": TEXT, **WORDS, "object": 3}, "row 1: object: found 3, expected a dict"),
        ({"sentence": TEXT, **WORDS, "object_type": 3}, "row 1: object_type: found 3"),
        (
            {"sentence": TEXT, "subject": "인천", "object": "문"},
            "row 1: subject: type: found None, exp",
        ),
        ({"sentence": TEXT, "entities": []}, "row 1: found entities, expected subject and object"),
        (TEXT, "row 1: row: found '인천대학교"),
    ],
)
def test_a_bad_row_is_named_by_its_number(predictor, row, message):
    with pytest.raises(InputError) as raised:
        predictor.predict([{"sentence": TEXT, **WORDS}, row])
    assert str(raised.value).startswith(message)


def test_predictions_equal_those_of_infer(call, predictor, checkpoint, rows, tmp_path):
    write_rows(tmp_path / "test.csv", rows[:300])
    call(infer, checkpoint, "--data", "test.csv")
    expected = read_predictions(str(tmp_path / "out/run.csv"))
    records = [as_dict(row) for row in rows[:300]]
    found = predictor.predict(records)
    assert [result["label"] for result in found] == expected.predicted
    probs = [list(result["probabilities"].values()) for result in found]
    np.testing.assert_allclose(probs, temper(expected.probs, 2.0))  # the checkpoint's temperature
    raw, _ = Predictor(checkpoint, calibrated=False).probabilities(rows[:300])
    np.testing.assert_array_equal(raw, expected.probs)
    batch = {key: [record[key] for record in records] for key in records[0]}
    columns = predictor(batch | {"source": np.array(["x"] * 300)})
    assert list(columns) == [*batch, "source", "pred_label", "probability", "probs"]
    assert columns["pred_label"] == expected.predicted
    np.testing.assert_array_equal(columns["probs"], probs)
    np.testing.assert_array_equal(columns["probability"], np.max(probs, 1))


def test_numbers_and_columns_may_be_numpys(predictor, rows):
    expected = predictor.predict([as_dict(rows[0])])
    record = as_dict(rows[0])
    for who in ("subject_entity", "object_entity"):
        record[who] = {k: v if isinstance(v, str) else np.int64(v) for k, v in record[who].items()}
    assert predictor.predict([record | {"label": np.int64(100), "id": np.int64(3)}]) == expected
    batch = {key: np.array([value], dtype=object) for key, value in record.items()}
    found = predictor(batch | {"label": np.array([100]), "source": np.array([np.nan])})
    assert found["pred_label"] == [expected[0]["label"]]
    for wrong in (True, 1.5):
        record["subject_entity"]["start_idx"] = wrong
        with pytest.raises(InputError, match="row 0: subject_entity: start_idx: found"):
            predictor.predict([record])


def test_columns_may_be_pyarrows_but_not_of_different_lengths(predictor, rows):
    pyarrow = pytest.importorskip("pyarrow")
    records = [as_dict(row) for row in rows[:2]]
    expected = [result["label"] for result in predictor.predict(records)]
    table = pyarrow.Table.from_pylist(records)
    assert predictor(dict(zip(table.column_names, table.columns)))["pred_label"] == expected
    for batch, message in (
        (table, "batch: found a Table, expected a dict of columns"),
        ({"sentence": ["가"], "subject": []}, r"batch: rows: found \{'sentence': 1, 'subject': 0"),
    ):
        with pytest.raises(InputError, match=message):
            predictor(batch)


def test_options_that_are_none_are_one_line(checkpoint, predictor):
    with pytest.raises(InputError, match="--amp: found 'float16', expected auto, off, bf16, fp16"):
        Predictor(checkpoint, amp="float16")
    for threshold in (50, float("nan"), -1, "0.5", None):
        with pytest.raises(InputError, match=r"threshold: found .*, expected a number from 0 to 1"):
            predictor.triples(TEXT, ENTITIES, threshold)
    with pytest.raises(InputError, match="checkpoints: found none"):
        Predictor(None)
    for rows in (None, {"sentence": TEXT, **WORDS}, TEXT):
        with pytest.raises(InputError, match=r"predict: rows: found .*, expected a list of rows"):
            predictor.predict(rows)
    with pytest.raises(InputError, match=r"batch: sentence: found .*map\(…, batched=True\)"):
        predictor({"sentence": TEXT, **WORDS})


def test_a_bad_row_of_a_batch_is_named_by_its_id_too(predictor):
    batch = {"id": ["doc7", 8], "sentence": [TEXT, TEXT]}
    batch |= {key: [value, "PER" if "type" in key else value] for key, value in WORDS.items()}
    with pytest.raises(
        InputError, match=r"row 1 of the batch \(id 8\): object: word: found '서울'"
    ):
        predictor(batch | {"object": [WORDS["object"], "서울"]})
    with pytest.raises(InputError, match=r"row 0 of the batch \(id doc7\): subject: type: found"):
        predictor(batch | {"subject_type": ["per", "PER"]})


def test_another_file_of_a_folder_is_another_version(tmp_path):
    (tmp_path / "relation.json").write_text("a")
    before = version_of(tmp_path)
    assert version_of(tmp_path) == before
    (tmp_path / "relation.json").write_text("bb")  # the folder's own time stays
    assert version_of(tmp_path) != before
    assert version_of(tmp_path / "relation.json")[0][1] == 2


def test_several_checkpoints_are_averaged(predictor, checkpoint, tmp_path):
    content = load_checkpoint(checkpoint)
    content["weights"] = {name: 0.5 * weight for name, weight in content["weights"].items()}
    save_tensors(tmp_path / "other.pt", content)
    row = [{"sentence": TEXT, **WORDS}]
    each = [predictor, Predictor(tmp_path / "other.pt")]
    each.append(Predictor([checkpoint, tmp_path / "other.pt"]))
    a, b, mean = (list(p.predict(row)[0]["probabilities"].values()) for p in each)
    np.testing.assert_allclose(mean, (np.array(a) + b) / 2)
    assert a != pytest.approx(b)
    with pytest.raises(InputError, match="found one twice"):
        Predictor([checkpoint, checkpoint])
    with pytest.raises(InputError, match="found none"):
        Predictor([])
    with pytest.raises(InputError, match=r"none\.pt: cannot be read"):
        Predictor("none.pt")
    content["labels"] = content["labels"][::-1]
    save_tensors(tmp_path / "reversed.pt", content)
    with pytest.raises(InputError, match=r"reversed\.pt: its labels, or their order"):
        Predictor([checkpoint, tmp_path / "reversed.pt"])


def test_threads_share_a_predictor(predictor, rows):
    records, results = [as_dict(row) for row in rows[:60]], {}
    expected = predictor.predict(records)

    def work(start):
        results[start] = predictor.predict(records[start : start + 10])

    threads = [threading.Thread(target=work, args=(start,)) for start in range(0, 60, 10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = [result for start in sorted(results) for result in results[start]]
    for a, b in zip(found, expected, strict=True):
        assert a["probabilities"] == pytest.approx(b["probabilities"], abs=1e-5)


def test_a_copy_loads_the_checkpoint_again_and_another_version_is_another_pickle(
    predictor, checkpoint, tmp_path
):
    row = [{"sentence": TEXT, **WORDS}]
    assert pickle.loads(pickle.dumps(predictor)).predict(row) == predictor.predict(row)
    content = load_checkpoint(checkpoint)
    pickles = []
    for run in ("a", "bb"):  # `datasets` must not take what it saved for the other one
        save_tensors(tmp_path / "ckpt.pt", content | {"run": run})
        pickles.append(pickle.dumps(Predictor(tmp_path / "ckpt.pt")))
    assert pickles[0] != pickles[1]


def test_importing_it_loads_neither_tensorboard_nor_figures():
    code = "import sys, infer; print(sorted(m for m in sys.modules if '.' not in m))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    unwanted = ("tensorboard", "matplotlib", "sklearn", "datasets", "pandas", "pyarrow", "optuna")
    assert not [name for name in unwanted if f"'{name}'" in done.stdout]


# --- triples ----------------------------------------------------------------------------------

ENTITIES = [{"word": "인천대학교", "type": "ORG"}, {"word": "인천", "start_idx": 13, "type": "LOC"},
            {"word": "1979년", "type": "DAT"}]  # fmt: skip


def test_triples_are_the_relations_of_all_ordered_pairs(predictor):
    rows = [{"sentence": TEXT, "subject": a, "object": b}
            for a in ENTITIES for b in ENTITIES if a is not b]  # fmt: skip
    results = predictor.predict(rows)
    for threshold in (1e-6, sorted(result["probability"] for result in results)[3]):
        expected = [
            (row["subject"]["word"], result["label"], row["object"]["word"])
            for row, result in zip(rows, results)
            if result["label"] != "no_relation" and result["probability"] >= threshold - 1e-6
        ]
        found = predictor.triples(TEXT, ENTITIES, threshold=threshold - 1e-6)
        assert [(t.subject.word, t.relation, t.object.word) for t in found] == expected
        assert expected
    assert predictor.triples(TEXT, ENTITIES[:1]) == predictor.triples(TEXT, []) == []
    with pytest.raises(InputError, match=r"triples: entities\[0\]: word: found '서울'"):
        predictor.triples(TEXT, ["서울"])


def test_a_long_list_of_pairs_is_predicted_in_slices(predictor, monkeypatch):
    expected = predictor.triples(TEXT, ENTITIES, threshold=0)
    monkeypatch.setattr("predictor.SLICE", 4)
    found = predictor.triples(TEXT, ENTITIES, threshold=0)
    assert [t[:3] for t in found] == [t[:3] for t in expected]


def test_pairs_without_relations_in_the_training_rows_are_skipped(checkpoint, tmp_path):
    content = load_checkpoint(checkpoint)
    save_tensors(tmp_path / "a.pt", content | {"pairs": [["ORG", "LOC"], ["ORG", "PER"]]})
    save_tensors(tmp_path / "b.pt", content | {"pairs": [["DAT", "ORG"]], "run": "b"})
    found = Predictor(tmp_path / "a.pt").triples(TEXT, ENTITIES, threshold=0)
    assert {(t.subject.word, t.object.word) for t in found} <= {("인천대학교", "인천")}
    both = Predictor([tmp_path / "a.pt", tmp_path / "b.pt"])
    assert both.pairs == {("ORG", "LOC"), ("ORG", "PER"), ("DAT", "ORG")}
    text, *_ = infer.text_of({"sentence": TEXT, "entities": ENTITIES}, 0, "t")
    assert list(both.pairs_of(text)) == [(0, 1), (2, 0)]


def test_a_run_saves_the_pairs_of_types_that_have_a_relation(call, tmp_path, encoder_folder):
    options = f"--data {SAMPLE} --model {encoder_folder} --epochs 1 --limit 64 --valid none"
    call(train, *options.split(), "--out", "a", "--device", "cpu", "--batch-size", 64)
    pairs = load_checkpoint(tmp_path / "a/ckpt.pt")["pairs"]
    rows = [row for row in read_rows(SAMPLE / "train.csv") if row.label != "no_relation"]
    known = {(row.subject.type, row.object.type) for row in rows}
    assert pairs
    assert {tuple(pair) for pair in pairs} <= known


def test_pairs_of_unknown_types_are_predicted_and_those_of_one_span_are_not(checkpoint, tmp_path):
    save_tensors(tmp_path / "a.pt", load_checkpoint(checkpoint) | {"pairs": [["ORG", "LOC"]]})
    predictor = Predictor(tmp_path / "a.pt")
    first = {"word": "인천대학교", "start_idx": 0}
    entities = [first | {"type": "ORG"}, *ENTITIES[1:], first | {"type": "company"}]
    text, *_ = infer.text_of({"sentence": TEXT, "entities": entities}, 0, "t")
    found = list(predictor.pairs_of(text))
    assert found == [(0, 1), (1, 3), (2, 3), (3, 1), (3, 2)]
    message = r"triples: entities\[3\]: type: found 'company', expected one of PER, ORG, LOC, DAT"
    with pytest.raises(InputError, match=message):
        predictor.triples(TEXT, entities)


# --- device -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "message"),
    [("gpu", "found 'gpu', expected auto, cpu, cuda or cuda:N"), ("cuda:x", "found 'cuda:x'"),
     ("cuda", "--device cuda: found no GPU"), ("cuda:1", "--device cuda:1: found no GPU")],
)  # fmt: skip
def test_a_device_that_is_not_there_is_one_line(name, message, call, checkpoint):
    assert local_device("cpu") == local_device() == torch.device("cpu")
    with pytest.raises(InputError, match=message):
        local_device(name)
    assert message in call(infer, checkpoint, "--device", name, code=2).err
    assert message in call(train, "--demo", "--device", name, code=2).err


def test_one_process_of_several_cannot_name_a_gpu(monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(InputError, match="several processes need --device cuda"):
        local_device("cuda:1")
