"""Reading and checking rows: CSV, JSON and JSON lines, and the message for each kind of error."""

import csv
import itertools
import json
import math
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet
import pytest

import infer
from common import InputError
from data import KLUE_LABELS, TYPES, Template, version, with_known_labels, with_label_names
from encoder import load_tokenizer
from metrics import read_predictions
from rows import (
    ENTITY_FIELDS,
    Entity,
    Row,
    data_file,
    normalized,
    read_rows,
    rows_to_predict,
    text_of,
)
from tests.helpers import SAMPLE, decomposed, nfd, write_rows
from tests.helpers import row as made_row
from tokens import encode

HEADER = "id,sentence,subject_entity,object_entity,label,source\n"


def entity(word, start, end, kind="PER"):
    return str(dict(zip(ENTITY_FIELDS, (word, start, end, kind))))


def csv_row(id="0", sentence="김은 이를 만났다", s=None, o=None, label="no_relation"):
    s, o = s or entity("김", 0, 0), o or entity("이", 3, 3)
    return f'{id},"{sentence}","{s}","{o}",{label},wikipedia\n'


def without_places(rows):
    return [row[:-1] for row in rows]


def write_csv(path, *rows):
    path.write_text(HEADER + "".join(rows), encoding="utf-8")
    return path


SUBJECT, OBJECT = ":2: subject_entity: ", ":3: object_entity: "


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            HEADER + csv_row(s=entity("김", 1, 1)),
            SUBJECT + r"word '김' but sentence\[1:2\] is '은'",
        ),
        (
            HEADER + csv_row() + csv_row("1", o=entity("이", 3, 99)),
            OBJECT + r"start_idx, end_idx: found \(3, 99\)",
        ),
        (
            HEADER + csv_row(s=entity("김", -1, 0)),
            SUBJECT + r"start_idx, end_idx: found \(-1, 0\)",
        ),
        (
            HEADER + csv_row(s=entity("김", 0.0, 0)),
            SUBJECT + r"start_idx: found 0.0, expected a whole number",
        ),
        (HEADER + csv_row(s=entity("김", "nan", 0)), SUBJECT + r"start_idx: found 'nan'"),
        (HEADER + csv_row(s="{'word': '김'}"), SUBJECT + r"start_idx: found None"),
        (HEADER + csv_row(s="[1, 2]"), SUBJECT + r"found \[1, 2\], expected a dict"),
        (
            HEADER + csv_row(s="__import__('os').getcwd()"),
            SUBJECT + r"found .*, expected a dict literal",
        ),
        (HEADER + csv_row(s="(" * 5000), SUBJECT + r"found .*, expected a dict literal"),
        (
            HEADER + csv_row(o=entity("김", 0, 0)),
            r":2: object_entity: found '김', expected another span",
        ),
        (HEADER + csv_row(s=entity(" ", 2, 2)), SUBJECT + r"word: found ' ', expected text"),
        (HEADER + csv_row(id=""), r":2: id: found '', expected a number or text"),
        (HEADER + "0,a,b\n", r":2: row: found \['0', 'a', 'b'\], expected 6 cells"),
        (HEADER + '0,"김은', r":2: broken CSV"),
        (
            "id,sentence\n0,a\n",
            r":1: header: found 'id,sentence', expected a column subject_entity or subject, object",
        ),
        (HEADER, r"no rows"),
        ("", r"no rows"),
    ],
)
def test_the_message_says_what_is_wrong_with_a_row(tmp_path, content, message):
    path = tmp_path / "train.csv"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(InputError, match=message) as raised:
        read_rows(path)
    assert "\n" not in str(raised.value)
    assert str(raised.value).startswith(str(path))


def test_line_numbers_are_right_after_a_cell_of_several_lines(tmp_path):
    rows = csv_row(sentence="김은 이를\n만났다"), csv_row("1", s=entity("박", 0, 0))
    path = write_csv(tmp_path / "a.csv", *rows)
    with pytest.raises(InputError, match=r"a.csv:4: subject_entity: word '박'"):
        read_rows(path)


CONTENT = HEADER + csv_row()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (CONTENT.encode("cp949"), ":2: found byte 0xb1, expected UTF-8 text; it seems to be cp949"),
        (
            CONTENT.encode("utf-16"),
            ":1: found byte 0xff, .*; it seems to be UTF-16: save it as UTF",
        ),
        (CONTENT.encode("utf-16-be"), "it seems to be UTF-16: save it as UTF-8"),
        (CONTENT.encode()[:-20] + b"\xed", "expected UTF-8 text; save it as UTF-8"),
        (b"PAR1\x15\x04\x80", "it seems to be a Parquet file: name it .parquet"),
        (b"PK\x03\x04\xff\xff", "it seems to be a checkpoint, or an Excel sheet: save that as CSV"),
        (b"\x1f\x8b\x08\x00\x00", "it seems to be a gzip archive"),
        (b"abc\xff" + bytes(range(256)), "it is not a text file"),
    ],
)
def test_a_file_that_is_not_utf8_is_named(tmp_path, content, message):
    (tmp_path / "a.csv").write_bytes(content)
    with pytest.raises(InputError, match=message) as raised:
        read_rows(tmp_path / "a.csv")
    assert "\n" not in str(raised.value)
    with pytest.raises(InputError, match=r"absent.csv: cannot be read"):
        read_rows(tmp_path / "absent.csv")


def test_a_column_that_stands_twice_is_an_error(tmp_path):
    cells = csv_row().strip()
    (tmp_path / "a.csv").write_text(f"{HEADER.strip()}, label\n{cells},per:title\n")
    with pytest.raises(
        InputError, match=r"a.csv:1: header: found 'label', expected each column once"
    ):
        read_rows(tmp_path / "a.csv")
    (tmp_path / "b.csv").write_text(f"{HEADER.strip()},,\n{cells},,\n")  # empty columns at the end
    assert read_rows(tmp_path / "b.csv")[0].label == "no_relation"
    (tmp_path / "c.csv").write_text("id,pred_label,probs,id\n")
    with pytest.raises(InputError, match=r"c.csv:1: header: found 'id', expected each column once"):
        read_predictions(str(tmp_path / "c.csv"))


@pytest.mark.parametrize("sentence", ["", " ", "nan", None, math.nan])
def test_a_missing_sentence_is_named(tmp_path, sentence):
    record = json.dumps({"id": 0, "sentence": sentence, "subject_entity": {}, "object_entity": {}})
    (tmp_path / "a.jsonl").write_text(record)
    with pytest.raises(InputError, match=r"a.jsonl:1: sentence: found .*, expected text"):
        read_rows(tmp_path / "a.jsonl")


def test_if_all_rows_are_bad_the_message_says_why(tmp_path):
    path = write_csv(tmp_path / "a.csv", csv_row(s="{}"), csv_row("1", label="x,y"))
    with pytest.raises(
        InputError, match=r"a.csv: all 2 rows are bad; the first: .*a.csv:2: subject"
    ):
        read_rows(path, ["a bad row of another file"])


def test_bad_rows_are_skipped_and_their_messages_kept(tmp_path):
    rows = csv_row(), csv_row("1", s=entity("박", 0, 0)), "2,short\n", csv_row("3", label="per:x")
    path, skipped = write_csv(tmp_path / "a.csv", *rows), []
    rows = with_known_labels(read_rows(path, skipped), KLUE_LABELS, skipped)
    assert [r.id for r in rows] == ["0"]
    assert [message.split(":")[1] for message in skipped] == ["3", "4", "5"]


def as_objects(rows, id="id"):
    entities = [[dict(zip(ENTITY_FIELDS, e)) for e in (r.subject, r.object)] for r in rows]
    keys = id, "sentence", "subject_entity", "object_entity", "label", "source"
    values = ((r.id, r.sentence, *e, r.label, r.source) for r, e in zip(rows, entities))
    return [dict(zip(keys, v)) for v in values]


@pytest.mark.parametrize("id", ["id", "guid"])
def test_all_formats_give_the_same_rows(tmp_path, rows, id):
    objects = as_objects(rows[:50], id)
    as_json = json.dumps(objects, ensure_ascii=False)
    as_lines = "\n".join(json.dumps(o) for o in objects) + "\n"
    for suffix in ("json", "jsonl", "JSON"):  # the content decides which of both it is
        (tmp_path / f"list.{suffix}").write_text(as_json, encoding="utf-8-sig")
        (tmp_path / f"lines.{suffix}").write_text(as_lines, encoding="utf-8")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(objects), tmp_path / "a.parquet")
    for name, delimiter in (("a.csv", ","), ("a.CSV", ","), ("a.tsv", "\t")):
        with open(tmp_path / name, "w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, delimiter=delimiter)
            writer.writerows([objects[0], *(o.values() for o in objects)])
    files = sorted(tmp_path.iterdir())
    assert len(files) == 10
    for path in files:
        assert without_places(read_rows(path)) == without_places(rows[:50]), path


@pytest.mark.parametrize("number", [int, float])
def test_a_parquet_file_of_the_hub_knows_the_names_of_its_labels(tmp_path, rows, number):
    objects = [o | {"label": 29 - KLUE_LABELS.index(o["label"])} for o in as_objects(rows[:50])]
    features = {"label": {"names": KLUE_LABELS[::-1], "_type": "ClassLabel"}}
    about = {"huggingface": json.dumps({"info": {"features": features}})}
    objects = [o | {"label": number(o["label"])} for o in objects]  # pandas: floats
    table = pyarrow.Table.from_pylist([*objects, objects[0] | {"label": number(-1)}])
    pyarrow.parquet.write_table(table.replace_schema_metadata(about), tmp_path / "a.parquet")
    found = read_rows(tmp_path / "a.parquet")
    assert [r.label for r in found] == [*(r.label for r in rows[:50]), None]
    pyarrow.parquet.write_table(table, tmp_path / "b.parquet")  # without the names
    with pytest.raises(InputError, match=r"b.parquet:1: label: found \d+, a class number"):
        with_label_names(read_rows(tmp_path / "b.parquet"))
    late = pyarrow.array([2**60] * len(table), pyarrow.timestamp("ms"))
    pyarrow.parquet.write_table(table.append_column("time", late), tmp_path / "d.parquet")
    with pytest.raises(
        InputError, match=r"d.parquet: expected a Parquet file: Python int too large"
    ):
        read_rows(tmp_path / "d.parquet")
    content = (tmp_path / "b.parquet").read_bytes()
    for wrong in (b"id,sentence", content.replace("가".encode(), b"\xea\xb0\xea")):
        (tmp_path / "c.parquet").write_bytes(wrong)
        with pytest.raises(InputError, match=r"c.parquet: expected a Parquet file: ") as raised:
            read_rows(tmp_path / "c.parquet")
        assert "\n" not in str(raised.value)
    twice = table.append_column("label", table["label"])
    pyarrow.parquet.write_table(twice, tmp_path / "d.parquet")
    with pytest.raises(InputError, match="columns: found 'label', expected each column once"):
        read_rows(tmp_path / "d.parquet")


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl"])
def test_rows_without_ids_are_numbered(tmp_path, rows, capsys, name):
    objects = [{k: v for k, v in o.items() if k != "id"} for o in as_objects(rows[:3])]
    objects[1]["label"] = [1, 2] if name == "a.jsonl" else None
    lines = "\n".join(map(json.dumps, objects))
    if name == "a.csv":
        with open(tmp_path / name, "w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([objects[0], *(o.values() for o in objects)])
    else:
        (tmp_path / name).write_text(lines)
    found = read_rows(tmp_path / name, skipped := [], unique_ids=True)
    assert [r.id for r in found] == ["0", "1", "2"] if name == "a.csv" else ["0", "2"]
    assert len(skipped) == (name == "a.jsonl")
    assert "the rows have no ids; they are numbered from 0" in capsys.readouterr().out
    some = [objects[0], objects[2] | {"id": "a"}]
    (tmp_path / "b.jsonl").write_text("\n".join(map(json.dumps, some)))
    with pytest.raises(InputError, match=r"b.jsonl:1: id: found None, expected a number or text"):
        read_rows(tmp_path / "b.jsonl")
    assert [r.id for r in read_rows(tmp_path / "b.jsonl", [])] == ["a"]


def test_ids_may_repeat_except_where_rows_are_predicted(tmp_path):
    path = write_csv(tmp_path / "a.csv", csv_row(), csv_row(), csv_row("1"))
    assert [r.id for r in read_rows(path)] == ["0", "0", "1"]
    with pytest.raises(
        InputError, match=r"a.csv:3: id: found '0', expected a unique id; line 2 has"
    ):
        read_rows(path, unique_ids=True)


VALID = {
    "guid": "0",
    "sentence": "김은 이를 만났다",
    "subject_entity": {"word": "김", "start_idx": 0, "end_idx": 0, "type": "PER"},
    "object_entity": {"word": "이", "start_idx": 3, "end_idx": 3, "type": "PER"},
}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", "{", r"a.json:1: expected a JSON list, or an object on each line: Expecting"),
        ("a.json", '{"a": 1}', r"a.json:1: no field sentence; found 'a'"),
        ("a.json", "[" * 100_000, r"a.json:1: expected a JSON list, or an object on each"),
        ("a.jsonl", json.dumps(VALID) + "\n{", r"a.jsonl:2: expected a JSON list, or an object on"),
        ("a.jsonl", json.dumps(VALID) + "\n{\r\n\n", r"a.jsonl:2: expected a JSON list, or an obj"),
        ("a.jsonl", json.dumps({**VALID, "guid": "\ud800"}), r"a.jsonl:1: id: found '\\ud800'"),
        ("a.jsonl", json.dumps({**VALID, "label": True}), r"a.jsonl:1: label: found True"),
        ("a.jsonl", json.dumps({**VALID, "source": ["a"]}), r"a.jsonl:1: source: found \['a'\]"),
        ("a.jsonl", json.dumps({**VALID, "label": "\ud800"}), r"a.jsonl:1: label: found '\\ud800'"),
        ("a.jsonl", "1\n", r"a.jsonl:1: row: found 1, expected an object"),
        ("a.json", "[[1]]", r"a.json:1: row: found \[1\], expected an object"),
        ("a.jsonl", '{"guid": "0"}\n', r"a.jsonl:1: no field sentence; found 'guid'"),
        (
            "a.jsonl",
            '{"guid": "0", "sentence": "\\ud83d"}\n',
            r"a.jsonl:1: sentence: found '\\ud83d', expected text",
        ),
    ],
)
def test_the_message_says_what_is_wrong_with_json(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=message):
        read_rows(tmp_path / name)


def test_offsets_count_code_points_and_an_entity_may_be_the_whole_sentence(tmp_path):
    sentence = "𝒦\u200b\ufeff\xa0ㅋ\uffa1\u1100\u119e\u11a8"  # beyond the BMP, invisible, jamo
    row = csv_row(sentence=sentence, s=entity(sentence, 0, 8), o=entity("𝒦", 0, 0))
    assert read_rows(write_csv(tmp_path / "a.csv", row))[0].subject.word == sentence


# --- Unicode ----------------------------------------------------------------------------------


OWN = made_row(
    "\u0387금(金) 박형은 Café의 ㅋㅋ 이각을 만났다", "박형", "이각", "관계", types=("사람", "각")
)


def test_text_from_macos_is_composed_and_its_offsets_are_moved(tmp_path, rows, capsys):
    some = [normalized(r) for r in (OWN._replace(id="x"), *rows[:50])]
    assert some[0].sentence.startswith("\xb7금(金) 박형은 Café")
    write_rows(tmp_path / "a.csv", [decomposed(r) for r in some])
    found = read_rows(tmp_path / "a.csv")
    assert without_places(found) == without_places(some)
    message = f"{tmp_path / 'a.csv'}: composed the text of 51 rows (Unicode NFC), and moved their"
    assert message in capsys.readouterr().out
    write_rows(tmp_path / "b.csv", some)
    assert without_places(read_rows(tmp_path / "b.csv")) == without_places(some)
    assert capsys.readouterr().out == ""


def test_parts_of_a_row_may_be_composed_or_decomposed_and_ids_stay():
    parts, id = decomposed(OWN), nfd("번호")
    expected = normalized(OWN)._replace(id=id)
    subjects = {0: OWN.subject, 1: parts.subject}
    for sentence, word, offsets in itertools.product((0, 1), (0, 1), (0, 1)):
        subject = Entity(subjects[word].word, *subjects[offsets][1:3], OWN.subject.type)
        object = (OWN, parts)[sentence].object
        made = Row(id, (OWN, parts)[sentence].sentence, subject, object, *OWN[4:])
        assert normalized(made) == expected


def test_a_word_that_is_a_part_of_a_letter_is_an_error():
    parts = decomposed(made_row("이각을 만났다", "이", "각"))
    wrong = parts._replace(object=Entity(nfd("가"), 2, 3, "PER"))
    with pytest.raises(
        InputError, match="object_entity: word '가' starts or ends inside a compose"
    ):
        normalized(wrong)


@pytest.mark.parametrize(
    ("word", "different"),
    [("А이", r"\(U\+0410 differs from U\+0041\)"), ("A\xa0이", "U.00A0 differs from U.C774"),
     ("Aㅇㅣ", r"U\+3147 differs from U\+C774"), ("A", r"\(nothing differs from U\+C774\)")],
)  # fmt: skip
def test_an_error_about_texts_that_look_alike_names_the_characters(word, different):
    row = made_row("A이가 왔다", "A이", "왔")
    if word == "A":
        row = row._replace(sentence="A\u200b가 왔다")
        different = different.replace("C774", "200B")
    with pytest.raises(InputError, match=different):
        normalized(row._replace(subject=Entity(word, 0, 1, "PER")))


def test_a_sentence_on_the_command_line_is_composed(monkeypatch):
    predictor = SimpleNamespace(types=list(TYPES), needs_types=True)
    sentence, words = "비틀즈의 노래는 조지 해리슨이 썼다", ("비틀즈:ORG", "조지 해리슨:PER")
    for form in itertools.product((str, nfd), repeat=3):
        texts = [convert(text) for convert, text in zip(form, (sentence, *words))]
        options = ["a.pt", "--sentence", texts[0], "--subject", texts[1], "--object", texts[2]]
        monkeypatch.setattr("sys.argv", ["infer.py", *options])
        found = infer.row_from_options(infer.parse_arguments(), predictor, print)
        assert found[1:4] == made_row(sentence, "비틀즈", "조지 해리슨", types=("ORG", "PER"))[1:4]


def test_a_row_made_in_python_is_checked_and_composed_before_it_is_encoded(encoder_folder):
    tokenizer = load_tokenizer(str(encoder_folder))
    row = made_row("비틀즈의 노래는 조지 해리슨이 썼다", "비틀즈", "조지 해리슨")
    (a, b), _ = encode([row, decomposed(row)], Template(), tokenizer, KLUE_LABELS, 256)
    assert a.ids.tolist() == b.ids.tolist()
    wrong = row._replace(subject=row.subject._replace(start=1, end=3))
    with pytest.raises(InputError, match="f:0: subject_entity: word '비틀즈' but sentence"):
        encode([wrong], Template(), tokenizer, KLUE_LABELS, 256)


def quoted(cell):
    return cell.replace('"', '""')


@pytest.mark.parametrize("type", ["null", '"\\ubb38"', '""', "NaN"])
def test_entities_in_cells_may_be_json(tmp_path, type):
    word, sentence = "😀비틀즈", "😀비틀즈가 왔다"
    s = f'{{"word": {json.dumps(word)}, "start_idx": 0, "end_idx": 3, "type": {type}}}'
    o = '{"word": "왔다", \'start_idx\': 6, "end_idx": 7, "type": None}'  # mixed: Python's syntax
    path = write_csv(tmp_path / "a.csv", csv_row(sentence=sentence, s=quoted(s), o=quoted(o)))
    row = read_rows(path)[0]
    assert row.subject == Entity(word, 0, 3, "문" if "b" in type else None)
    assert row.object == Entity("왔다", 6, 7, None)


@pytest.mark.parametrize("name", ["a.csv", "a.json"])
def test_half_an_emoji_and_a_key_that_stands_twice_are_errors(tmp_path, name):
    s = '{"word": "\\ud83d", "start_idx": 0, "end_idx": 0, "type": "PER"}'
    twice = '{"word": "이", "start_idx": 3, "end_idx": 3, "type": "PER", "type": "ORG"}'
    for cell, message in ((s, r"word: found '\\ud83d'"), (twice, "expected a dict lit|key twice")):
        if name == "a.csv":
            content = HEADER + csv_row(s=quoted(cell))
        else:
            content = json.dumps([VALID]).replace(json.dumps(VALID["subject_entity"]), cell)
        (tmp_path / name).write_text(content)
        with pytest.raises(InputError, match=message):
            read_rows(tmp_path / name)
    python = "{'word': '이', 'start_idx': 3, 'end_idx': 3, 'type': 'PER', 'type': 'ORG'}"
    with pytest.raises(
        InputError, match=r"subject_entity: found .*, expected a dict literal or a J"
    ):
        read_rows(write_csv(tmp_path / "b.csv", csv_row(s=python)))


@pytest.mark.parametrize("label", ["", "100", "100.0", " ", "nan", "-1"])
def test_an_empty_label_and_100_mean_no_label(tmp_path, label):
    path = write_csv(tmp_path / "a.csv", csv_row(label=label))
    assert read_rows(path)[0].label is None


def test_every_row_of_the_sample_is_read(rows):
    assert len(rows) > 1400
    assert set(Counter(r.label for r in rows)) == set(KLUE_LABELS)
    assert np.all([r.sentence[r.subject.start : r.subject.end + 1] == r.subject.word for r in rows])


def test_files_of_a_data_folder(tmp_path, rows):
    with pytest.raises(InputError, match=r"no train.csv, .tsv, .json, .jsonl or .parq.*; --data"):
        data_file(tmp_path, "train")
    path = tmp_path / "train.jsonl"
    path.write_text(json.dumps(VALID))
    assert data_file(tmp_path, "train") == path
    assert data_file(path, "train") == path
    assert rows_to_predict(tmp_path) == rows_to_predict(path) == []
    (tmp_path / "test_data.json").write_text(json.dumps([VALID, VALID | {"guid": 1}]))
    for data in (tmp_path, path):
        assert [row.id for row in rows_to_predict(data)] == ["0", "1"]
    assert len(rows_to_predict(SAMPLE)) == len(read_rows(SAMPLE / "test_data.csv"))


def test_data_means_a_folder_a_file_or_a_split_everywhere(tmp_path):
    hub = "hub:a/b@main"
    assert str(data_file(hub, "train")) == "hub:a/b@main/train"
    assert str(data_file(f"{hub}/dev", "train")) == "hub:a/b@main/dev"
    assert str(data_file(f"{hub}:re", "test_data")) == "hub:a/b@main:re/test_data"
    assert str(data_file(f"{hub}:re/own", "test_data")) == "hub:a/b@main:re/own"
    assert str(data_file("hub:a/b@refs/v1", "train")) == "hub:a/b@refs/v1/train"
    for data in (hub, f"{hub}/train", f"{hub}:re/train"):
        assert version(data, [])["revision"] == "main"
    with pytest.raises(InputError, match=r"absent.csv: no such file; --data names another"):
        data_file(tmp_path / "absent.csv", "train")
    for name in ("train.csv", "test_data.csv", "test_data.json"):
        (tmp_path / name).touch()
    expected = r"found test_data.csv and test_data.json, expected one of them; --data may name"
    with pytest.raises(InputError, match=expected):
        data_file(tmp_path, "test_data")
    with pytest.raises(InputError, match=expected):
        rows_to_predict(tmp_path / "train.csv")


def test_a_version_depends_on_the_rows_but_not_on_their_file(tmp_path, rows):
    moved = [r._replace(where="elsewhere.csv:2") for r in rows]
    assert version("a", rows) == version("b", moved)
    assert version("a", rows)["revision"] is None
    assert version("a", rows) != version("a", rows[::-1])
    assert version("a", rows) != version("a", [rows[0]._replace(label="per:x"), *rows[1:]])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"entities": [{"word": "김", "end": 1}]}, r"entities\[0\]: offsets: found \['end'\], exp"),
        ({"entities": [{"text": "김"}]}, r"entities\[0\]: no field word; found 'text'"),
        ({"subject": "김"}, "found a subject, expected entities; leave out --triples"),
        ({"text": "김은"}, "no field entities; found 'sentence, text'"),
        ({"entities": [{"word": "김", "start_idx": 0, "end_idx": 1}]}, "inclusive: expected 0"),
    ],
)
def test_a_sentence_with_wrong_entities_says_what_is_expected(changed, message):
    with pytest.raises(InputError, match=message):
        text_of({"sentence": "김은 이와"} | changed, 0, "f:1")


def test_ids_that_pandas_made_floats_are_whole_numbers(tmp_path):
    write_lines(tmp_path / "a.jsonl", [VALID | {"id": 0.0}, VALID | {"id": 3.0}])
    assert [r.id for r in read_rows(tmp_path / "a.jsonl")] == ["0", "3"]
    write_lines(tmp_path / "b.jsonl", [VALID | {"id": 0.0}, VALID | {"id": math.nan}])
    with pytest.raises(InputError, match=r"b.jsonl:2: id: found None, expected a number or text"):
        read_rows(tmp_path / "b.jsonl")


def write_lines(path, records):
    path.write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
