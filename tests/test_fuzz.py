"""Bad input of every kind that hypothesis thinks of: an error of one line that names the place, or right output."""

import csv
import io
import json

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data import KLUE_LABELS, MARKERS, PROMPTS, Entity, InputError, Row, Template, particle, read_rows
from metrics import read_predictions
from model import encode, load_tokenizer

HEADER = ["id", "sentence", "subject_entity", "object_entity", "label", "source"]
anything = st.text(max_size=40) | st.text(
    alphabet="{}[]()'\",:\n\r\t\0 0159-.ewordstartiendxpl김각\u200b𝒦\u1100\u1161", max_size=60
)
number = st.integers(-5, 60) | st.floats(allow_nan=True) | st.none() | st.booleans() | st.just(10**400) | anything
entity = st.fixed_dictionaries({"word": anything, "start_idx": number, "end_idx": number}, optional={"type": anything})
cell = anything | entity.map(str) | entity.map(json.dumps)
fuzz = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def check_rows(path):
    """Reads a file; the error is one line that starts with the file, or every row is right."""
    try:
        rows = read_rows(path)
    except InputError as error:
        assert str(error).startswith(str(path))
        assert len(str(error).splitlines()) == 1
        return None
    for row in rows:
        for e in (row.subject, row.object):
            assert row.sentence[e.start : e.end + 1] == e.word != ""
    return rows


@fuzz
@given(content=st.binary(max_size=300))
def test_any_bytes(tmp_path, content):
    for name in ("a.csv", "a.json", "a.jsonl"):
        (tmp_path / name).write_bytes(content)
        check_rows(tmp_path / name)


@fuzz
@given(rows=st.lists(st.lists(cell, min_size=5, max_size=7), min_size=1, max_size=4))
def test_any_cells(tmp_path, rows):
    file = io.StringIO(newline="")
    csv.writer(file).writerows([HEADER, *rows])
    (tmp_path / "a.csv").write_text(file.getvalue(), encoding="utf-8", errors="replace", newline="")
    check_rows(tmp_path / "a.csv")


@fuzz
@given(
    rows=st.lists(st.dictionaries(st.sampled_from([*HEADER, "guid"]), cell | entity | number, max_size=7), max_size=3)
)
def test_any_objects(tmp_path, rows):
    (tmp_path / "a.json").write_text(json.dumps(rows))
    check_rows(tmp_path / "a.json")
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    check_rows(tmp_path / "a.jsonl")


@pytest.mark.parametrize(
    "literal",
    ["(" * 100_000, "[" * 2000 + "]" * 2000, "-" * 100_000 + "1", "{'word': '" + "a" * 10_000_000,
     "__import__('os').abort()",
     "{'word': '김', 'start_idx': 0, 'end_idx': 0, 'type': 'PER'}" + " " * 10_000_000 + ")", "'\\ud800'", "{1: {}}[1]",
     "{'word': '김', 'start_idx': 9" + "9" * 5000 + ", 'end_idx': 0}", "{{}: 1}", "\0", "1e999", "nan",
     "{'word': '김', 'start_idx': 0x" + "f" * 5000 + ", 'end_idx': 0}"],
)  # fmt: skip
def test_hostile_literals(tmp_path, literal):
    file = io.StringIO(newline="")
    good = str({"word": "이", "start_idx": 3, "end_idx": 3, "type": "PER"})
    csv.writer(file).writerows([HEADER, ["0", "김은 이를", literal, good, "no_relation", ""]])
    (tmp_path / "a.csv").write_text(file.getvalue(), encoding="utf-8", newline="")
    with pytest.raises(InputError) as raised:
        read_rows(tmp_path / "a.csv")
    assert str(raised.value).startswith(f"{tmp_path / 'a.csv'}:2: subject_entity")
    assert len(str(raised.value)) < 400


@st.composite
def rows(draw):
    sentence = draw(st.text(alphabet="김각가힣ab1 .()@#*^[]\u200b𝒦\u1100\u1161\n", min_size=2, max_size=80))
    sentence = sentence * draw(st.sampled_from([1, 1, 1, 40]))
    places = st.tuples(st.integers(0, len(sentence) - 1), st.integers(0, len(sentence) - 1)).map(sorted)
    spans = draw(st.lists(places.map(tuple), min_size=2, max_size=2, unique=True))
    entities = [Entity(sentence[a : b + 1], a, b, draw(st.sampled_from(["PER", "ORG", "새"]))) for a, b in spans]
    return Row("0", sentence, *entities, "no_relation", "", "f:2")


@fuzz
@given(row=rows(), marker=st.sampled_from(list(MARKERS)), prompt=st.sampled_from(list(PROMPTS)))
def test_any_entities_are_marked_at_their_places(encoder_folder, row, marker, prompt):
    template, tokenizer = Template(marker, prompt), load_tokenizer(str(encoder_folder))
    tokenizer.add_tokens(template.added_tokens({"PER", "ORG", "새"}))
    rendered = template.render(row)
    if marker == "none":
        assert rendered.text == row.sentence
    if marker != "entity_mask":
        marks = sorted((span[i], span[i + 1]) for span in rendered.spans for i in (0, 2))
        without, at = "", 0
        for start, end in marks:
            without += rendered.text[at:start]
            at = end
        assert without + rendered.text[at:] == row.sentence
    (example,), _ = encode([row], template, tokenizer, KLUE_LABELS, 96)
    assert len(example.ids) <= 96
    assert len(example.ids) == len(example.segments)
    assert all(0 <= mark < len(example.ids) for mark in example.openings + example.closings)
    assert example.entities.shape == (2, len(example.ids))


@fuzz
@given(word=st.text(max_size=20))
def test_particles_of_anything(word):
    assert particle(word, "과/와") in ("과", "와")


@fuzz
@given(rows=st.lists(st.tuples(anything, anything, anything | st.lists(number, max_size=4).map(str)), max_size=4))
def test_any_submission(tmp_path, rows):
    file = io.StringIO(newline="")
    csv.writer(file).writerows([["id", "pred_label", "probs"], *rows])
    (tmp_path / "a.csv").write_text(file.getvalue(), encoding="utf-8", errors="replace", newline="")
    try:
        submission = read_predictions(str(tmp_path / "a.csv"))
    except InputError as error:
        assert len(str(error).splitlines()) == 1
    else:
        assert np.allclose(submission.probs.sum(1), 1, atol=1e-3)
