"""Labels, templates, and what changed between two versions of a file."""

import json

import numpy as np
import pytest

import data
import report
from common import InputError
from data import (
    KLUE_LABELS,
    LABEL_ORDERS,
    MARKERS,
    Template,
    diff,
    find_labels,
    label_order,
    note_unknown_types,
    particle,
    with_known_labels,
    with_label_names,
)
from metrics import write_predictions
from rows import read_rows
from sample import make_sample
from tests.helpers import SAMPLE, row, write_rows

SENTENCE = "〈Something〉는 조지 해리슨이 쓰고 비틀즈가 1969년 앨범 《Abbey Road》에 담은 노래다."
BEATLES = row(SENTENCE, "비틀즈", "조지 해리슨", types=("ORG", "PER"))

# --- labels -----------------------------------------------------------------------------------


def test_labels_of_the_competition_and_of_another_data_set(rows):
    assert find_labels(rows) == KLUE_LABELS
    assert KLUE_LABELS[1] == "org:top_members/employees"
    assert KLUE_LABELS[29] == "per:religion"
    assert len(set(KLUE_LABELS)) == 30
    own = [row("김은 이를 만났다", "김", "이", label) for label in ("knows", "none", "likes")]
    assert find_labels(own, "none") == ["none", "knows", "likes"]
    message = r"--negative-label nome: no row has it, expected .* one of knows, likes, none"
    with pytest.raises(InputError, match=message):
        find_labels(own, "nome")
    with pytest.raises(InputError, match="--negative-label none: all rows have it"):
        find_labels(own[1:2], "none")


def test_an_unknown_label_is_an_error(rows):
    message = r"label: found none \(no such column, or 100\), expected one of"
    with pytest.raises(InputError, match=message):
        with_known_labels([rows[0]._replace(label=None)], KLUE_LABELS)
    typo = [*rows[:9], rows[9]._replace(label="per:titel")]
    with pytest.raises(InputError, match=r"label: found 'per:titel', expected one of 30 labels"):
        with_known_labels(typo, find_labels(typo))


def numbered(rows, order, text="{}"):
    return [r._replace(label=text.format(order.index(r.label))) for r in rows]


def test_the_orders_of_class_numbers_are_those_of_klue_and_of_the_competition():
    klue = LABEL_ORDERS["klue"]
    assert set(klue) == set(KLUE_LABELS)
    assert (klue[1], klue[12], klue[29]) == ("org:dissolved", "per:date_of_birth", "per:title")
    assert LABEL_ORDERS["competition"][17] == "per:spouse"
    assert klue[17] == "per:origin"


@pytest.mark.parametrize("text", ["{}", "{}.0"])
@pytest.mark.parametrize("order", ["klue", "competition", "list.json", "dict.json"])
def test_class_numbers_get_the_names_that_the_label_order_tells(tmp_path, rows, text, order):
    names = LABEL_ORDERS.get(order, sorted(KLUE_LABELS))
    content = names if order == "list.json" else {name: i for i, name in enumerate(names)}
    (tmp_path / order).write_text(json.dumps(content))
    order = order if order in LABEL_ORDERS else str(tmp_path / order)
    write_rows(tmp_path / "a.csv", numbered(rows[:300], names, text))
    found = read_rows(tmp_path / "a.csv")
    labels = [r.label for r in with_label_names(found, order)]
    assert labels == [r.label for r in rows[:300]]
    expected = rf"a.csv:2: label: found {names.index(rows[0].label)}, a class number, expected a na"
    with pytest.raises(InputError, match=expected):
        with_label_names(found)
    assert with_label_names(rows, order) == rows  # names stay


def test_class_numbers_of_another_order_or_out_of_range_or_mixed_with_names_are_errors(rows):
    some = numbered(rows[:300], KLUE_LABELS)
    with pytest.raises(
        InputError, match=r"relations .* the other type; --label-order klue is wrong"
    ):
        with_label_names(some, "klue")
    for label in ("30", "-2", "per:title", "1.5"):
        mixed = [*some[:5], rows[5]._replace(label=label), rows[6]._replace(label=None)]
        message = (
            f"label: found '{label}', expected a class number from 0 to 29 .--label-order comp"
        )
        with pytest.raises(InputError, match=message):
            with_label_names(mixed, "competition")
        found = with_label_names(mixed, "competition", skipped := [])
        assert [r.label for r in found] == [r.label for r in rows[:5]] + [None]
        assert len(skipped) == 1


def test_reports_name_gold_labels_that_are_class_numbers(tmp_path, rows):
    some = rows[:50]
    gold = [KLUE_LABELS.index(r.label) for r in some]
    path, probs = tmp_path / "a.csv", np.eye(30)[gold]
    write_predictions(path, [r.id for r in some], [r.label for r in some], probs)
    write_rows(tmp_path / "gold.csv", numbered(some, LABEL_ORDERS["klue"]))
    loaded = report.load([str(path)], tmp_path / "gold.csv", "klue")
    assert loaded.gold.tolist() == gold
    with pytest.raises(InputError, match=r"gold.csv:2: label: found .*, a class number"):
        report.load([str(path)], tmp_path / "gold.csv")


@pytest.mark.parametrize("content", [[], ["a", "a"], {"a": 0, "b": 2}, {"a": 0, "b": "1"}, 3, [1]])
def test_a_file_that_is_no_label_order_is_an_error(tmp_path, content):
    (tmp_path / "a.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"a.json: expected a JSON list of labels, or an object"):
        label_order(str(tmp_path / "a.json"))


def test_entity_types_that_klue_re_lacks_are_named(rows):
    lower = [r._replace(subject=r.subject._replace(type=r.subject.type.lower())) for r in rows[:9]]
    note_unknown_types([*lower, *rows[9:20]], KLUE_LABELS, (messages := []).append)
    (message,) = messages
    assert message.startswith(
        f"{SAMPLE / 'train.csv'}: 9 of 40 entities have other types than PER,"
    )
    assert "such as 'per'" in message
    note_unknown_types(rows, KLUE_LABELS, messages.append)
    note_unknown_types(lower, ["none", "knows"], messages.append)
    assert len(messages) == 1


# --- templates --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("marker", "expected"),
    [
        ("none", SENTENCE),
        ("entity_mask", "〈Something〉는 [OBJ-PER]이 쓰고 [SUBJ-ORG]가 1969년"),
        (
            "entity_marker",
            "〈Something〉는 [E2] 조지 해리슨 [/E2]이 쓰고 [E1] 비틀즈 [/E1]가 1969년",
        ),
        (
            "entity_marker_punct",
            "〈Something〉는 # 조지 해리슨 # 이 쓰고 @ 비틀즈 @ 가 1969년",
        ),
        (
            "typed_entity_marker",
            "〈Something〉는 <o:person> 조지 해리슨 </o:person> 이 쓰고 "
            "<s:organization> 비틀즈 </s:organization> 가 ",
        ),
        (
            "typed_entity_marker_punct",
            "〈Something〉는 # ^ person ^ 조지 해리슨 # 이 쓰고 "
            "@ * organization * 비틀즈 @ 가 1969년",
        ),
    ],
)
def test_text_with_each_marker(marker, expected):
    assert Template(marker).render(BEATLES).text.startswith(expected)


@pytest.mark.parametrize(
    ("prompt", "before", "after"),
    [
        ("none", "", ""),
        ("s_sep_o", "비틀즈</s>조지 해리슨", ""),
        ("s_and_o", "비틀즈와 조지 해리슨의 관계", ""),
        ("quiz", "다음 문장에서 비틀즈와 조지 해리슨의 관계를 추출하시오.", ""),
        (
            "problem",
            "다음 문장에서 비틀즈와 조지 해리슨의 관계를 추출하시오.",
            " 비틀즈와 조지 해리슨은 어떤 관계입니까?",
        ),
    ],
)
def test_text_of_each_prompt(prompt, before, after):
    rendered = Template(prompt=prompt).render(BEATLES, separator="</s>")
    assert (rendered.before, rendered.after) == (before, after)


def test_korean_type_names():
    text = Template("typed_entity_marker_punct", type_names="ko").render(BEATLES).text
    assert "# ^ 사람 ^ 조지 해리슨 # 이 쓰고 @ * 조직 * 비틀즈 @ 가" in text
    text = Template("typed_entity_marker", type_names="ko").render(BEATLES).text
    assert "<s:조직> 비틀즈 </s:조직> 가" in text


@pytest.mark.parametrize(
    ("subject", "object", "expected"),
    [
        ("서울은행", "서울", "@ # 서울 # 은행 @ 은 컸다"),
        ("서울", "서울은행", "# @ 서울 @ 은행 # 은 컸다"),
        ("서울은행", "은행", "@ 서울# 은행 #  @ 은 컸다"),
        ("서울은", "은행은", "@ 서울# 은 @ 행은 #  컸다"),
    ],
)
def test_nested_and_overlapping_entities_are_marked_at_their_offsets(subject, object, expected):
    overlapping = row("서울은행은 컸다", subject, object)
    assert Template("entity_marker_punct").render(overlapping).text == expected


def test_masks_of_nested_entities_replace_both_words():
    nested = row("서울은행은 컸다", "서울은행", "서울", types=("ORG", "LOC"))
    assert Template("entity_mask").render(nested).text == "[SUBJ-ORG][OBJ-LOC]은 컸다"


def test_two_entities_with_the_same_word_are_marked_at_their_offsets():
    rendered = Template("entity_marker").render(row("김은 김을 만났다", ("김", 0), ("김", 3)))
    assert rendered.text == "[E1] 김 [/E1]은 [E2] 김 [/E2]을 만났다"


def test_spans_are_the_offsets_of_markers_and_words():
    for marker in MARKERS:
        rendered = Template(marker).render(BEATLES)
        for (opening, word, word_end, closing), entity in zip(rendered.spans, BEATLES[2:4]):
            assert 0 <= opening <= word <= word_end <= closing <= len(rendered.text)
            if marker != "entity_mask":
                assert rendered.text[word:word_end] == entity.word


def test_a_typed_marker_needs_types():
    untyped = BEATLES._replace(object=BEATLES.object._replace(type=None))
    assert "조지" in Template("entity_marker").render(untyped).text
    with pytest.raises(InputError, match=r"f:0: object_entity: no type, which --marker typed_"):
        Template("typed_entity_marker").render(untyped)


@pytest.mark.parametrize(
    ("word", "pair", "expected"),
    [
        ("비틀즈", "과/와", "와"),
        ("조지 해리슨", "은/는", "은"),
        ("2010", "과/와", "과"),
        ("2", "은/는", "는"),
        ("3", "은/는", "은"),
        ("MBC", "과/와", "와"),
        ("CNN", "과/와", "과"),
        ("KGM", "은/는", "은"),
        ("Google", "은/는", "은"),
        ("Samsung", "과/와", "과"),
        ("Naver", "과/와", "와"),
        ("민생당(가칭)", "은/는", "은"),
        ("한국(KOREA)", "과/와", "과"),
        ("《기생충》", "과/와", "과"),
        ("'미나리'", "은/는", "는"),
        ("100%", "은/는", "는"),
        ("서울", "으로/로", "로"),
        ("부산", "으로/로", "으로"),
        ("\u1100\u1161\u11a8", "과/와", "과"),  # decomposed: the final consonant is a jamo
        ("中國", "과/와", "와"),
        ("", "과/와", "와"),
    ],
)
def test_particles(word, pair, expected):
    assert particle(word, pair) == expected


def test_the_sample_is_what_its_script_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(make_sample, "HERE", tmp_path)
    make_sample.main()
    for name in ("train.csv", "test_data.csv"):
        assert (tmp_path / name).read_bytes() == (SAMPLE / name).read_bytes()


# --- versions ---------------------------------------------------------------------------------


def test_rows_added_removed_and_relabelled(rows):
    old = rows[:20]
    new = [*old[:5], old[5]._replace(label="per:religion", id="x"), *old[7:], rows[30], old[0]]
    added, removed, relabelled = diff(old, new)
    assert added == [rows[30], old[0]]  # a second copy of a row counts as added
    assert removed == [old[6]]
    assert relabelled == [(old[5], new[5])]
    assert sorted(diff(new, old)[1]) == sorted(added)
    assert diff(old, old[::-1]) == ([], [], [])


def test_a_diff_is_printed_one_line_per_row(call, tmp_path):
    met, liked = "김은 이를 만났다", "박은 최를 좋아한다"
    old = [row(met, "김", "이", "per:title", id="0"), row(met, "이", "김", id="1")]
    new = [row(met, "김", "이", "per:spouse", id="5"), row(liked, "박", "최", id="6")]
    write_rows(tmp_path / "old.csv", old)
    write_rows(tmp_path / "new.csv", new)
    assert call(data, "--diff", "old.csv", "new.csv").out.splitlines() == [
        "+ new.csv:3  id 6  no_relation  박 / 최",
        "- old.csv:3  id 1  no_relation  이 / 김",
        "~ old.csv:2 -> new.csv:2  id 5  per:title -> per:spouse  김 / 이",
        "1 rows added (+), 1 removed (-), 1 relabelled (~)",
    ]
    write_rows(tmp_path / "numbers.csv", numbered(old, LABEL_ORDERS["klue"]))
    assert "a class number" in call(data, "--diff", "old.csv", "numbers.csv", code=2).err
    printed = call(data, "--diff", "old.csv", "numbers.csv", "--label-order", "klue").out
    assert printed == "0 rows added (+), 0 removed (-), 0 relabelled (~)\n"
