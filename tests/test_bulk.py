"""infer.py with files: words instead of offsets, triples, chunks that resume, several processes."""

import csv
import json
import os
import tracemalloc
from types import SimpleNamespace
from unittest.mock import MagicMock

import numpy as np
import pytest

import bulk
import infer
from checkpoint import load_checkpoint, save_tensors
from common import InputError
from metrics import read_predictions, write_predictions
from predictor import Predictor
from rows import ENTITY_FIELDS, locate, read_chunks, read_rows, row_of
from tests.helpers import CPU, nfd, row, write_rows

# --- words ------------------------------------------------------------------------------------


def with_words(rows) -> list[dict]:
    """The rows with words, of those whose words the rule puts where the offsets are."""
    records = []
    for r in rows:
        record = {"sentence": r.sentence, "subject": r.subject.word, "object": r.object.word}
        record |= {"subject_type": r.subject.type, "object_type": r.object.type}
        if row_of(record, 0, "x")[0][1:4] == r[1:4]:
            records.append(record)
    return records


def write_records(path, records):
    if path.suffix == ".jsonl":
        path.write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    elif path.suffix == ".parquet":
        pytest.importorskip("pyarrow")
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), path)
    else:
        with open(path, "w", encoding="utf-8", newline="") as file:
            delimiter = "\t" if path.suffix == ".tsv" else ","
            writer = csv.DictWriter(file, list(records[0]), delimiter=delimiter)
            writer.writeheader()
            writer.writerows(records)


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl", "parquet"])
def test_words_need_no_offsets(call, checkpoint, rows, tmp_path, suffix):
    records = with_words(rows[:60])
    assert len(records) > 40
    path = tmp_path / f"words.{suffix}"
    write_records(path, records)
    ambiguous = sum(any(r["sentence"].count(r[x]) > 1 for x in ("subject", "object"))
                    for r in records)  # fmt: skip
    printed = call(infer, checkpoint, "--data", path).out
    line = f"{ambiguous} rows have a word that is in the sentence more than once: its first place"
    assert (line in printed) == (ambiguous > 0)
    kept = [r for r in rows[:60] if with_words([r])]
    write_rows(tmp_path / "offsets.csv", kept)
    call(infer, checkpoint, "--data", "offsets.csv", "--out", "b.csv")
    a, b = (read_predictions(str(tmp_path / name)) for name in ("out/run.csv", "b.csv"))
    assert a.ids == [str(i) for i in range(len(kept))]
    np.testing.assert_array_equal(a.probs, b.probs)


def test_words_are_counted_composed_and_refused(tmp_path):
    sentence = "인천과 인천대학교는 멀다"
    records = [
        {"sentence": sentence, "subject": "인천", "object": "인천대학교"},
        {"sentence": nfd(sentence), "subject": nfd("인천대학교"), "object": "멀다"},
        {"sentence": sentence, "subject": "서울", "object": "멀다"},
        {"sentence": "가나", "subject": "가나", "object": "가나"},
    ]
    write_records(tmp_path / "a.csv", records)
    with pytest.raises(InputError, match=r"a\.csv:4: subject: word: found '서울', expected a word"):
        read_rows(tmp_path / "a.csv")
    found = read_rows(tmp_path / "a.csv", skipped := [], (lines := []).append)
    assert [(r.subject[:3], r.object[:3]) for r in found] == [
        (("인천", 0, 1), ("인천대학교", 4, 8)), (("인천대학교", 4, 8), ("멀다", 11, 12))
    ]  # fmt: skip
    assert "object: word: found '가나', expected another position" in skipped[1]
    assert "composed the text of 1 rows" in lines[1]
    assert "1 rows have a word that is in the sentence more than once" in lines[2]


@pytest.mark.parametrize(
    ("sentence", "words", "places"),
    [
        ("가나다 가나 다라", ["가나", "가나다", "다라"], [4, 0, 7]),
        ("가나 가나 가나", ["가나"] * 3, [0, 3, 6]),
        ("가나다라 가나", ["나다", "가나"], [1, 5]),
        ("ABC AB", ["AB", "BC"], [4, 1]),  # the word with one place first
        ("가나", ["가나", "나"], [0, 1]),
    ],
)
def test_words_with_fewer_places_and_longer_words_come_first(sentence, words, places):
    assert locate(sentence, words, [None] * len(words), words)[0] == places


# --- chunks -----------------------------------------------------------------------------------


@pytest.fixture
def chunks_of_seven(monkeypatch):
    monkeypatch.setattr(bulk, "CHUNK", {"cpu": 7})


def test_chunks_give_the_same_file_and_scores(
    call, checkpoint, rows, tmp_path, monkeypatch, chunks_of_seven
):
    write_rows(tmp_path / "test.csv", rows[:30])
    chunked = call(infer, checkpoint, "--data", "test.csv", "--out", "a.csv").out
    monkeypatch.setattr(bulk, "CHUNK", {"cpu": 4096})
    whole = call(infer, checkpoint, "--data", "test.csv", "--out", "b.csv").out
    assert chunked.replace("a.csv", "b.csv") == whole
    assert "micro F1" in whole
    a, b = (read_predictions(str(tmp_path / name)) for name in ("a.csv", "b.csv"))
    assert (a.ids, a.predicted) == (b.ids, b.predicted)
    np.testing.assert_allclose(a.probs, b.probs, atol=1e-6)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.csv", "b.csv", "test.csv"]
    monkeypatch.setattr(infer, "MAX_SCORED", 29)
    assert "no scores: they take" in call(infer, checkpoint, "--data", "test.csv").out
    monkeypatch.setattr(infer, "MAX_SCORED", 100)
    monkeypatch.setattr("rows.UNIQUE", 7)
    monkeypatch.setattr(bulk, "CHUNK", {"cpu": 7})
    write_rows(tmp_path / "test.csv", [*rows[:30], rows[0]])
    printed = call(infer, checkpoint, "--data", "test.csv", "--out", "c.csv").out
    assert "no scores: c.csv:32: id: found '0', expected a unique id; line 2 has it" in printed


def interrupt_at(monkeypatch, number: int) -> list:
    """Interrupt the prediction of a chunk by its number; the list gets the chunks that begin."""
    begun, predictions = [], bulk.predictions

    def interrupted(rows, *arguments):
        begun.append(rows[0].id)
        if len(begun) == number:
            raise KeyboardInterrupt
        return predictions(rows, *arguments)

    monkeypatch.setattr(bulk, "predictions", interrupted)
    return begun


def test_a_killed_run_goes_on_after_its_last_whole_chunk(
    call, checkpoint, rows, tmp_path, monkeypatch, chunks_of_seven
):
    write_rows(tmp_path / "test.csv", rows[:30])
    command = checkpoint, "--data", "test.csv", "--out", "out/a.csv"
    expected = call(infer, *command).out, (tmp_path / "out/a.csv").read_bytes()
    begun = interrupt_at(monkeypatch, 3)
    call(infer, *command, code=130)
    assert (tmp_path / "out/a.csv").read_bytes() == expected[1]  # of the first run, unharmed
    done = call(infer, *command)
    assert begun == [rows[i].id for i in (0, 7, 14, 14, 21, 28)]
    assert done.out == f"out/.a.csv.parts: resuming; finished chunks: 2\n{expected[0]}"
    assert (tmp_path / "out/a.csv").read_bytes() == expected[1]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["a.csv"]


@pytest.mark.parametrize("change", ["input", "option"])
def test_chunks_of_another_input_or_options_are_not_used(
    call, checkpoint, rows, tmp_path, monkeypatch, chunks_of_seven, change
):
    write_rows(tmp_path / "test.csv", rows[:30])
    interrupt_at(monkeypatch, 3)
    call(infer, checkpoint, "--data", "test.csv", code=130)
    if change == "input":
        write_rows(tmp_path / "test.csv", rows[30:60])
    options = ["--skip-bad-rows"] if change == "option" else []
    printed = call(infer, checkpoint, "--data", "test.csv", *options).out
    line = "its chunks were written with another input, checkpoint or options: starting over"
    assert printed.startswith(f"out/.run.csv.parts: {line}\n")
    ids = read_predictions(str(tmp_path / "out/run.csv")).ids
    assert ids == [r.id for r in (rows[30:60] if change == "input" else rows[:30])]


def test_a_bad_row_leaves_the_chunks_before_it_and_no_empty_folder(
    call, checkpoint, rows, tmp_path, chunks_of_seven
):
    write_rows(tmp_path / "test.csv", [*rows[:20], rows[20]._replace(id=" "), *rows[21:]])
    assert "test.csv:22: id" in call(infer, checkpoint, "--data", "test.csv", code=2).err
    assert {path.name for path in (tmp_path / "out/.run.csv.parts").iterdir()} == {"key", "0", "1"}
    write_rows(tmp_path / "test.csv", [rows[0]._replace(id=" ")])
    call(infer, checkpoint, "--data", "test.csv", code=2)
    assert not list((tmp_path / "out").iterdir())


def test_rows_without_types_are_bad_for_markers_that_need_them(
    call, checkpoint, rows, tmp_path, chunks_of_seven
):
    untyped = rows[9]._replace(subject=rows[9].subject._replace(type=None))
    write_rows(tmp_path / "test.csv", [*rows[:9], untyped, *rows[10:20]])
    expected = "test.csv:11: subject: type: found None, expected one of PER"
    assert expected in call(infer, checkpoint, "--data", "test.csv", code=2).err
    printed = call(infer, checkpoint, "--data", "test.csv", "--skip-bad-rows").out
    assert f"bad rows left out: 1\n  {expected}" in printed
    ids = read_predictions(str(tmp_path / "out/run.csv")).ids
    assert ids == [r.id for r in rows[:20] if r is not rows[9]]
    typed = {"word": "가", "type": "PER"}
    texts = [{"sentence": "가 나", "entities": [typed, *more]} for more in ([], ["나"])]
    write_records(tmp_path / "texts.jsonl", texts)
    command = checkpoint, "--data", "texts.jsonl", "--triples", "a.jsonl", "--skip-bad-rows"
    printed = call(infer, *command).out
    assert "0 triples of 1 rows" in printed
    assert "bad rows left out: 1\n  texts.jsonl:2: entities[1]: type: found None" in printed


@pytest.mark.parametrize("name", ["data", "out", "triples", "export", "sentence", "label-order"])
def test_an_option_without_a_value_is_an_error(call, checkpoint, name):
    refused = call(infer, checkpoint, f"--{name}", "", code=2).err
    assert f"--{name}: found nothing, expected a value" in refused


def test_a_pipe_is_not_replaced_by_a_file(call, checkpoint, rows, tmp_path):
    write_rows(tmp_path / "test.csv", rows[:3])
    os.mkfifo(tmp_path / "pipe")
    refused = call(infer, checkpoint, "--data", "test.csv", "--out", "pipe", code=2).err
    assert "pipe: expected the name of a file, found a device or a pipe" in refused
    assert (tmp_path / "pipe").is_fifo()


def test_ids_with_line_ends_are_read_back(call, checkpoint, tmp_path):
    row = {"sentence": "가 나", "subject": {"word": "가", "type": "PER"}}
    row["object"] = {"word": "나", "type": "PER"}
    records = [row | {"id": id_} for id_ in ("a\rb", "a\nb", "a\r\n", 'a"')]
    write_records(tmp_path / "test.jsonl", records)
    call(infer, checkpoint, "--data", "test.jsonl")
    assert b"\r\n" not in (tmp_path / "out/run.csv").read_bytes().replace(b"a\r\n", b"")
    found = read_predictions(str(tmp_path / "out/run.csv"))
    assert found.ids == [record["id"] for record in records]
    write_predictions(tmp_path / "b.csv", found.ids, found.predicted, found.probs)
    assert (tmp_path / "b.csv").read_bytes() == (tmp_path / "out/run.csv").read_bytes()


def test_a_damaged_key_starts_over(tmp_path):
    (tmp_path / ".a.csv.parts").mkdir()
    (tmp_path / ".a.csv.parts/key").write_bytes(b"\xff")
    lines = []
    assert bulk.Parts([tmp_path / "a.csv"], "k", CPU, lines.append).done == set()
    assert "starting over" in lines[0]


def test_an_error_of_another_process_is_raised_in_this_one(tmp_path):
    told = []
    worker = SimpleNamespace(
        rank=1, world_size=2, barrier=lambda: None, gather=lambda value: told.append(value) or
        ["a bad row", value],
    )  # fmt: skip
    (tmp_path / ".a.csv.parts").mkdir()
    (tmp_path / ".a.csv.parts" / "key").write_text("k")
    parts = bulk.Parts([tmp_path / "a.csv"], "k", worker, print)
    with pytest.raises(InputError, match="a bad row"):
        bulk.predict_chunks(iter([[1], [2], [3]]), lambda rows: (["x"], [0]), parts, worker, 3, 1)
    assert told == [None]
    assert parts.done == {1}  # the first process has chunk 0


@pytest.mark.slow
def test_processes_share_the_chunks_and_report_each_others_errors(
    run, call, checkpoint, rows, tmp_path
):
    write_rows(tmp_path / "test.csv", rows[:30])
    run("infer.py", checkpoint, "--data", "test.csv", "--out", "two.csv", processes=2)
    call(infer, checkpoint, "--data", "test.csv", "--out", "one.csv")
    one, two = (read_predictions(str(tmp_path / name)) for name in ("one.csv", "two.csv"))
    assert (one.ids, one.predicted) == (two.ids, two.predicted)
    untyped = rows[29]._replace(object=rows[29].object._replace(type=None))
    write_rows(tmp_path / "test.csv", [*rows[:29], untyped])
    done = run("infer.py", checkpoint, "--data", "test.csv", processes=2, code=1)
    assert "infer.py: test.csv:31: object: type: found None" in done.stderr


def test_log_files_get_a_line_a_minute(monkeypatch, tmp_path):
    given = {}
    monkeypatch.setattr(bulk, "tqdm", lambda **how: given.update(how) or np.errstate())
    parts = SimpleNamespace(done=set(), folder=tmp_path)
    assert bulk.predict_chunks(iter([]), None, parts, CPU, 0, 1) == 0
    assert given["mininterval"] == given["delay"] == 60
    assert not given["disable"]


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_reading_in_chunks_needs_the_memory_of_a_chunk(tmp_path, suffix):
    path = tmp_path / f"long.{suffix}"
    text = "가나다라 " * 200
    write_records(path, [{"sentence": f"비틀즈와 링고 {i} {text}", "subject": "비틀즈",
                          "object": "링고"} for i in range(3000)])  # fmt: skip
    tracemalloc.start()
    n_rows = sum(len(rows) for rows in read_chunks(path, row_of, 50, log=lambda text: None))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert n_rows == 3000
    assert peak < 5e6  # the file has 9 MB, its rows need 6 MB more


def test_ids_are_compared_with_the_first_ones_only_in_a_long_file(tmp_path, monkeypatch):
    rows = [row("비틀즈와 링고", "비틀즈", "링고", id=str(i)) for i in [*range(30), 3]]
    write_rows(tmp_path / "a.csv", rows)
    with pytest.raises(InputError, match="a unique id; line 5 has it too"):
        list(read_chunks(tmp_path / "a.csv", row_of, 10, unique_ids=True))
    monkeypatch.setattr("rows.UNIQUE", 20)
    lines = []
    chunks = read_chunks(tmp_path / "a.csv", row_of, 10, log=lines.append, unique_ids=True)
    assert [len(chunk) for chunk in chunks] == [10, 10, 10, 1]
    assert "of 31 rows the first 20 were checked for ids that repeat" in lines[0]


# --- triples ----------------------------------------------------------------------------------


@pytest.fixture
def texts(tmp_path, rows):
    """A file of sentences with entities, and its records."""
    records = []
    for r in rows[:20]:
        entities = [dict(zip(ENTITY_FIELDS, entity)) for entity in (r.subject, r.object)]
        del entities[0]["end_idx"]
        records.append({"id": f"t{r.id}", "sentence": r.sentence, "entities": entities})
    records[3]["entities"] = []
    write_records(tmp_path / "texts.jsonl", records)
    return records


def test_files_of_entities_give_triples(call, checkpoint, texts, tmp_path, chunks_of_seven):
    command = checkpoint, "--data", "texts.jsonl", "--threshold", 0.03, "--triples"
    printed = call(infer, *command, "a/t.jsonl").out
    n_triples = len((tmp_path / "a/t.jsonl").read_text(encoding="utf-8").splitlines())
    assert n_triples > 0
    assert printed.endswith(f"a/t.jsonl: {n_triples} triples of 20 rows of texts.jsonl\n")
    lines = (tmp_path / "a/t.jsonl").read_text(encoding="utf-8").splitlines()
    predictor, expected = Predictor(checkpoint), []
    for record in texts:
        for triple in predictor.triples(record["sentence"], record["entities"], threshold=0.03):
            expected.append((record["id"], *triple))
    found = [json.loads(line) for line in lines]
    assert [(t["id"], tuple(t["subject"].values()), t["relation"], tuple(t["object"].values()))
            for t in found] == [e[:4] for e in expected]  # fmt: skip
    probs = [t["probability"] for t in found], [e[4] for e in expected]
    np.testing.assert_allclose(*probs, atol=1e-6)
    sentence_of = {record["id"]: record["sentence"] for record in texts}
    for t in found:
        word, start, end = (t["subject"][key] for key in ENTITY_FIELDS[:3])
        assert sentence_of[t["id"]][start : end + 1] == word

    printed = call(infer, *command, "a/t.csv").out
    found = f"{n_triples} triples of 20 rows of texts.jsonl\n"
    assert printed.endswith(f"a/t.csv and a/t.nodes.csv: {found}")
    with open(tmp_path / "a/t.csv", encoding="utf-8", newline="") as file:
        edges = list(csv.DictReader(file))
    assert list(edges[0]) == [":START_ID", ":END_ID", ":TYPE", "probability:float", "sentence"]
    assert [(e["sentence"], e[":TYPE"]) for e in edges] == [(e[0], e[2]) for e in expected]
    with open(tmp_path / "a/t.nodes.csv", encoding="utf-8", newline="") as file:
        nodes = {node[":ID"]: (node["name"], node[":LABEL"]) for node in csv.DictReader(file)}
    assert {e[key] for e in edges for key in (":START_ID", ":END_ID")} == set(nodes)
    assert all(id_ == ":".join(node) for id_, node in nodes.items())


def test_the_pairs_that_are_left_out_are_counted(call, checkpoint, texts, tmp_path):
    save_tensors(tmp_path / "a.pt", load_checkpoint(checkpoint) | {"pairs": [["PER", "ORG"]]})
    printed = call(infer, "a.pt", "--data", "texts.jsonl", "--triples", "t.jsonl").out
    types = [[entity["type"] for entity in record["entities"]] for record in texts]
    n = sum(len({*pair} - {"PER", "ORG"}) > 0 or len({*pair}) == 1 for pair in types if pair)
    n_pairs = 2 * sum(len(pair) == 2 for pair in types)
    left_out = n_pairs - sum({*pair} == {"PER", "ORG"} for pair in types)
    assert 0 < n < n_pairs / 2
    assert f"left out {left_out} of {n_pairs} pairs of entities: no training row has" in printed


def test_two_processes_do_not_write_one_file(tmp_path):
    parts = bulk.Parts([tmp_path / "a.csv"], "k", CPU, print)
    with pytest.raises(InputError, match=r"a.csv: another process is writing it"):
        bulk.Parts([tmp_path / "a.csv"], "k", CPU, print)
    parts.write(0, ["x"], [0])
    parts.join([""], 1)
    bulk.Parts([tmp_path / "a.csv"], "k", CPU, print)


def test_options_of_triples_are_checked(call, checkpoint, texts, tmp_path):
    (tmp_path / "a.csv").write_text("sentence,entities\n")
    for options, message in [
        (["--triples", "a.jsonl"], "--triples needs --data FILE"),
        (["--triples", "a.jsonl", "--data", "texts.jsonl", "--out", "b"], "--triples excludes"),
        (["--triples", "texts.jsonl", "--data", "texts.jsonl"], "expected another file"),
        (["--triples", "a.csv", "--data", "texts.jsonl", "--threshold", 2], "--threshold: found 2"),
        (["--data", "texts.jsonl"], "texts.jsonl:1: found entities, expected subject and object"),
        (["--data", "texts.jsonl", "--threshold", 0.3], "--threshold is for --triples"),
        (["--data", "texts.jsonl", "--triples", "a.tsv"], "expected the name of a .csv or .jsonl"),
        (["--data", "texts.jsonl", "--out", "a.parquet"], "a.parquet: expected the name of a .csv"),
        (["--data", "a.csv", "--triples", "a.jsonl"], "a.csv: found .csv, expected JSON lines, a"),
    ]:
        assert message in call(infer, checkpoint, *options, code=2).err


def test_the_speed_does_not_count_chunks_of_an_earlier_run(monkeypatch, tmp_path):
    given, updates = {}, []
    bar = MagicMock()
    bar.__enter__().update = updates.append
    monkeypatch.setattr(bulk, "tqdm", lambda **how: given.update(how) or bar)
    parts = bulk.Parts([tmp_path / "a.csv"], "k", CPU, print)
    for number in (0, 1):
        parts.write(number, ["x"], [0])
    chunks = iter([[1, 2], [3, 4], [5, 6], [7]])
    bulk.predict_chunks(chunks, lambda rows: (["x"], [0]), parts, CPU, 7, 2)
    assert (given["initial"], given["total"], updates) == (4, 7, [0, 0, 2, 1])
