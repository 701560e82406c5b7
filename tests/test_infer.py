"""infer.py: entities of one sentence, gold labels that the model does not know, bad rows."""

import csv

import pytest

import infer
from calibration import temper
from common import InputError
from data import KLUE_LABELS, TYPES
from infer import choose_places, split_type
from metrics import read_predictions
from tests.helpers import write_rows

# --- one sentence -----------------------------------------------------------------------------


def test_an_entity_may_have_a_type_that_the_model_knows():
    sentence = "오전 10:30에 비틀즈가"
    expected = {
        "비틀즈:ORG": ("비틀즈", "ORG"),
        "비틀즈:org": ("비틀즈", "ORG"),
        " 비틀즈 : ORG ": ("비틀즈", "ORG"),
        "비틀즈": ("비틀즈", None),
        "10:30": ("10:30", None),
        "10:30:PER": ("10:30", "PER"),
    }
    for text, entity in expected.items():
        assert split_type(text, sentence, "--object", TYPES) == entity
    assert split_type("비틀즈:Robot", sentence, "--object", None) == ("비틀즈", "Robot")
    assert split_type("10:30", sentence, "--object", None) == ("10:30", None)
    with pytest.raises(InputError, match=r"--object: found type 'PERSON', expected one of PER, OR"):
        split_type("비틀즈:PERSON", sentence, "--object", TYPES)
    for wrong in ("비틀스:ORG", "비틀스", ":ORG", ""):
        with pytest.raises(InputError, match=r"--object: found .*WORD:TYPE with a word of the sen"):
            split_type(wrong, sentence, "--object", TYPES)


@pytest.mark.parametrize(
    ("sentence", "words", "given", "places"),
    [
        ("인천대학교는 1979년 인천에서", ("인천대학교", "인천"), (None, None), (0, 13)),
        ("인천대학교는 1979년 인천에서", ("인천대학교", "인천"), (None, 0), (0, 0)),
        ("인천과 인천대학교", ("인천대학교", "인천"), (None, None), (4, 0)),
        ("인천대학교", ("인천대학교", "인천"), (None, None), (0, 0)),
        ("인천과 인천대", ("인천", "인천대"), (None, None), (0, 4)),
        ("가나 가나 가나", ("가나", "가나"), (None, None), (0, 3)),
        ("가나 가나 가나", ("가나", "가나"), (3, None), (3, 0)),
        ("가나 가나 가나", ("가나", "가나"), (6, 3), (6, 3)),
        ("aaa", ("aa", "aa"), (None, None), (0, 1)),
    ],
)
def test_places_outside_the_other_entity_come_first(sentence, words, given, places):
    printed = []
    assert tuple(choose_places(sentence, words, given, printed.append)) == places
    ambiguous = [sentence.count(w) > 1 and at is None for w, at in zip(words, given)]
    assert len(printed) == sum(ambiguous) + (sentence == "aaa") * 2


def test_a_wrong_place_is_one_line_that_names_the_right_ones():
    sentence = "가나 가나"
    with pytest.raises(InputError, match=r"--object-at: found 1, expected a place of '가나': 0, 3"):
        choose_places(sentence, ("가나", "가나"), (None, 1))
    for words, given in ((("가나", "가나"), (3, 3)), (("나 가", "나 가"), (None, None))):
        with pytest.raises(InputError, match=r"--object: .*expected another position"):
            choose_places(sentence, words, given)


# --- programs ---------------------------------------------------------------------------------


def test_one_sentence_says_which_place_it_took(call, checkpoint):
    sentence = "인천대학교는 1979년 인천에서 문을 열었다."
    words = "--subject", "인천대학교: org", "--object", "인천:loc"
    line = "--object: '인천' at 13, of 0, 13; --object-at N takes another\n"
    chosen = call(infer, checkpoint, "--sentence", sentence, *words).out
    assert chosen.startswith(line)
    given = call(infer, checkpoint, "--sentence", sentence, *words, "--object-at", 13).out
    assert chosen == line + given
    assert call(infer, checkpoint, "--sentence", sentence, *words, "--object-at", 0).out != given
    assert "are for --sentence" in call(infer, checkpoint, "--object-at", 0, code=2).err
    options = checkpoint, "--sentence", sentence, *words, "--skip-bad-rows"
    assert "infer.py: --skip-bad-rows is for files" in call(infer, *options, code=2).err


def test_one_sentence_has_the_temperature_and_a_file_has_not(call, checkpoint, rows, tmp_path):
    row = rows[0]
    write_rows(tmp_path / "test.csv", [row])
    call(infer, checkpoint, "--data", "test.csv")
    probs = read_predictions(str(tmp_path / "out/run.csv")).probs
    words = [f"{entity.word}:{entity.type}" for entity in (row.subject, row.object)]
    places = "--subject-at", row.subject.start, "--object-at", row.object.start
    options = "--sentence", row.sentence, "--subject", words[0], "--object", words[1], *places
    first = call(infer, checkpoint, *options).out.splitlines()[0]
    expected = temper(probs, 2.0)[0]
    assert first == f"{expected.max():.4f}  {KLUE_LABELS[expected.argmax()]}"
    assert f"{probs.max():.4f}" not in first


def test_a_type_that_the_markers_need_is_asked_for(call, checkpoint):
    options = "--sentence", "비틀즈의 링고", "--subject", "비틀즈", "--object", "링고:PER"
    refused = call(infer, checkpoint, *options, code=2).err
    expected = "--subject: found '비틀즈', expected WORD:TYPE, one of PER, ORG, LOC, DAT, POH, NOH"
    assert refused.startswith(f"infer.py: {expected}")


@pytest.mark.parametrize("label", ["?", "인물:직업", "17", "per:titel"])
def test_labels_that_the_model_does_not_know_are_predicted_without_scores(
    call, checkpoint, rows, tmp_path, label
):
    some = [*rows[:4], rows[4]._replace(label=label)]
    write_rows(tmp_path / "test.csv", some)
    done = call(infer, checkpoint, "--data", "test.csv")
    found = f"1 of 5 rows have a label that the model does not know, such as '{label}'"
    hint = "; --label-order says what numbers mean" if label == "17" else ""
    assert done.out == f"out/run.csv: 5 rows of test.csv\nno scores: {found} at test.csv:6{hint}\n"
    write_rows(tmp_path / "test.csv", [*rows[:4], rows[4]._replace(label=None)])
    done = call(infer, checkpoint, "--data", "test.csv")
    assert "no scores: 1 of 5 rows have no label" in done.out
    write_rows(tmp_path / "test.csv", [row._replace(label=None) for row in some])
    assert call(infer, checkpoint, "--data", "test.csv").out == "out/run.csv: 5 rows of test.csv\n"


def test_bad_rows_are_left_out_counted_and_named(call, checkpoint, rows, tmp_path):
    bad = [row._replace(id=" ") for row in rows[5:30]]
    write_rows(tmp_path / "test.csv", [bad[0], *rows[:5], *bad[1:]])
    assert "test.csv:2: id: found ' '" in call(infer, checkpoint, "--data", "test.csv", code=2).err
    done = call(infer, checkpoint, "--data", "test.csv", "--skip-bad-rows")
    assert "out/run.csv: 5 rows of test.csv\nbad rows left out: 25\n  test.csv:2: id: f" in done.out
    assert "\n  and 5 more\nmicro F1 " in done.out
    with open(tmp_path / "out/run.csv", encoding="utf-8", newline="") as file:
        assert [row["id"] for row in csv.DictReader(file)] == [row.id for row in rows[:5]]


def test_what_is_read_is_not_overwritten_and_no_checkpoint_counts_twice(
    call, checkpoint, rows, tmp_path
):
    write_rows(tmp_path / "test.csv", rows[:2])
    before = (tmp_path / "test.csv").read_bytes()
    for out in ("./test.csv", checkpoint):
        refused = call(infer, checkpoint, "--data", "test.csv", "--out", out, code=2).err
        assert f"--out {str(out).removeprefix('./')}: expected another file" in refused
    assert (tmp_path / "test.csv").read_bytes() == before
    (tmp_path / "folder").mkdir()
    refused = call(infer, checkpoint, "--data", "test.csv", "--out", "folder", code=2).err
    assert "folder: expected the name of a file, found a folder" in refused
    assert "found one twice" in call(infer, checkpoint, checkpoint, code=2).err
