"""Random input of every kind: either a one-line error that names the place, or a correct result."""

import csv
import io
import json
import re

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from common import InputError
from data import KLUE_LABELS, MARKERS, PROMPTS, Template, particle
from metrics import read_predictions
from model import load_tokenizer
from rows import COLUMNS, Entity, Row, compose, read_rows
from tests.helpers import decomposed, write_rows
from tokens import encode

HEADER = [*COLUMNS, "label", "source"]
SYNTAX = "{}[]()'\",:\n\r\t\0 0159-.ewordstartiendxpl김각\u200b𝒦\u1100\u1161"
anything = st.text(max_size=40) | st.text(alphabet=SYNTAX, max_size=60)
number = st.integers(-5, 60) | st.floats(allow_nan=True) | st.none() | st.booleans()
number |= st.just(10**400) | anything
fields = {"word": anything, "start_idx": number, "end_idx": number}
entity = st.fixed_dictionaries(fields, optional={"type": anything})
cell = anything | entity.map(str) | entity.map(json.dumps)
probs = anything | st.lists(number, max_size=4).map(str)
fuzz = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def write_csv(path, rows):
    file = io.StringIO(newline="")
    csv.writer(file).writerows(rows)
    path.write_text(file.getvalue(), encoding="utf-8", errors="replace", newline="")
    return path


def check_rows(path):
    """Read a file: the error is one line that starts with the path, or every row is correct."""
    try:
        rows = read_rows(path)
    except InputError as error:
        assert str(error).startswith(str(path))
        assert len(str(error).splitlines()) == 1
        return
    for row in rows:
        for e in (row.subject, row.object):
            assert row.sentence[e.start : e.end + 1] == e.word != ""


@fuzz
@given(content=st.binary(max_size=300))
def test_any_bytes(tmp_path, content):
    for name in ("a.csv", "a.tsv", "a.json", "a.jsonl", "a.parquet"):
        (tmp_path / name).write_bytes(content)
        check_rows(tmp_path / name)


@fuzz
@given(rows=st.lists(st.lists(cell, min_size=5, max_size=7), min_size=1, max_size=4))
def test_any_cells(tmp_path, rows):
    check_rows(write_csv(tmp_path / "a.csv", [HEADER, *rows]))


keys = st.sampled_from([*HEADER, "guid"])


@fuzz
@given(rows=st.lists(st.dictionaries(keys, cell | entity | number, max_size=7), max_size=3))
def test_any_objects(tmp_path, rows):
    (tmp_path / "a.json").write_text(json.dumps(rows))
    check_rows(tmp_path / "a.json")
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    check_rows(tmp_path / "a.jsonl")


@pytest.mark.parametrize(
    "literal",
    [
        "(" * 100_000,
        "[" * 2000 + "]" * 2000,
        "-" * 100_000 + "1",
        "{'word': '" + "a" * 10_000_000,
        "__import__('os').abort()",
        "{'word': '김', 'start_idx': 0, 'end_idx': 0, 'type': 'PER'}" + " " * 10_000_000 + ")",
        "'\\ud800'",
        "{1: {}}[1]",
        "{'word': '김', 'start_idx': 9" + "9" * 5000 + ", 'end_idx': 0}",
        "{{}: 1}",
        "\0",
        "1e999",
        "nan",
        "{'word': '김', 'start_idx': 0x" + "f" * 5000 + ", 'end_idx': 0}",
    ],
    ids=lambda literal: literal[:12],
)
def test_hostile_literals(tmp_path, literal):
    good = str({"word": "이", "start_idx": 3, "end_idx": 3, "type": "PER"})
    row = ["0", "김은 이를", literal, good, "no_relation", ""]
    path = write_csv(tmp_path / "a.csv", [HEADER, row])
    with pytest.raises(InputError) as raised:
        read_rows(path)
    assert str(raised.value).startswith(f"{path}:2: subject_entity")
    assert len(str(raised.value)) < 400


@st.composite
def rows(draw):
    alphabet = "김각가힣ab1 .()@#*^[]\u200b𝒦\u1100\u1161\u119e\néㅋ\u0307\u0323\uf9e1\uffa1"
    sentence = draw(st.text(alphabet=alphabet, min_size=2, max_size=80))
    sentence = compose(sentence * draw(st.sampled_from([1, 1, 1, 40])))
    assume(len(sentence) > 1)
    offset = st.integers(0, len(sentence) - 1)
    span = st.tuples(offset, offset).map(sorted).map(tuple)
    kind = st.sampled_from(["PER", "ORG", "새"])
    entities = [
        Entity(sentence[start : end + 1], start, end, draw(kind))
        for start, end in draw(st.lists(span, min_size=2, max_size=2, unique=True))
    ]
    return Row("0", sentence, *entities, "no_relation", "", "f:2")


@fuzz
@given(row=rows(), marker=st.sampled_from(list(MARKERS)), prompt=st.sampled_from(list(PROMPTS)))
def test_any_entities_are_marked_at_their_offsets(encoder_folder, row, marker, prompt):
    template, tokenizer = Template(marker, prompt), load_tokenizer(str(encoder_folder))
    tokenizer.add_tokens(template.added_tokens({"PER", "ORG", "새"}))
    rendered = template.render(row)
    if marker == "none":
        assert rendered.text == row.sentence
    if marker != "entity_mask":
        markers = sorted((span[i], span[i + 1]) for span in rendered.spans for i in (0, 2))
        without, at = "", 0
        for start, end in markers:
            without += rendered.text[at:start]
            at = end
        assert without + rendered.text[at:] == row.sentence
    (example,), _ = encode([row], template, tokenizer, KLUE_LABELS, 96)
    assert len(example.ids) <= 96
    assert len(example.ids) == len(example.segments)
    found = example.marker_starts + example.marker_ends
    assert all(0 <= token < len(example.ids) for token in found)
    assert example.entities.shape == (2, len(example.ids))


@fuzz
@given(row=rows())
def test_any_row_is_the_same_in_nfd(encoder_folder, tmp_path, row):
    for name, written in (("a", row), ("b", decomposed(row))):
        write_rows(tmp_path / f"{name}.csv", [written])
    try:
        (found,) = read_rows(tmp_path / "a.csv")
    except InputError as error:  # a combining mark on its own, or white space only
        reason = str(error).partition(": ")[2]
        with pytest.raises(InputError, match=re.escape(reason.partition(":")[0])):
            read_rows(tmp_path / "b.csv")
        return
    assert found[:-1] == row[:-1]
    assert read_rows(tmp_path / "b.csv")[0][:-1] == row[:-1]
    tokenizer = load_tokenizer(str(encoder_folder))
    examples, _ = encode([row, decomposed(row)], Template(), tokenizer, KLUE_LABELS, 96)
    assert len({tuple(example.ids) for example in examples}) == 1


@fuzz
@given(word=st.text(max_size=20))
def test_any_word_has_a_particle(word):
    assert particle(word, "과/와") in ("과", "와")


@fuzz
@given(rows=st.lists(st.tuples(anything, anything, probs), max_size=4))
def test_any_predictions(tmp_path, rows):
    path = write_csv(tmp_path / "a.csv", [["id", "pred_label", "probs"], *rows])
    try:
        predictions = read_predictions(str(path))
    except InputError as error:
        assert len(str(error).splitlines()) == 1
    else:
        assert np.allclose(predictions.probs.sum(1), 1, atol=1e-3)
