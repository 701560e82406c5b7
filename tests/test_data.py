"""Reading, cleaning, splitting, templates and tokens."""

import ast
import csv
import json
from collections import Counter

import numpy as np
import pytest

from data import (
    KLUE_LABELS,
    MARKERS,
    PROMPTS,
    Entity,
    InputError,
    Row,
    Template,
    atomic_write,
    clean,
    count_table,
    cross_table,
    exit_on_bad_input,
    find_labels,
    fold,
    length_table,
    particle,
    read_rows,
    repeat_table,
    shared_table,
    split,
    type_pair,
    with_known_labels,
)
from model import encode, load_tokenizer
from tests.conftest import SAMPLE

SENTENCE = "〈Something〉는 조지 해리슨이 쓰고 비틀즈가 1969년 앨범 《Abbey Road》에 담은 노래다."
BEATLES = Row(
    "0", SENTENCE, Entity("비틀즈", 24, 26, "ORG"), Entity("조지 해리슨", 13, 18, "PER"), "no_relation", "", "f:2"
)
HEADER = "id,sentence,subject_entity,object_entity,label,source\n"


def row(sentence, subject, object, label="no_relation", id="0", types=("PER", "ORG")):
    """A row whose entities are at their words' first places, or at (word, start)."""
    entities = []
    for found, kind in ((subject, types[0]), (object, types[1])):
        word, start = found if isinstance(found, tuple) else (found, sentence.index(found))
        entities.append(Entity(word, start, start + len(word) - 1, kind))
    return Row(id, sentence, *entities, label, "", f"f:{id}")


# --- templates ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("marker", "expected"),
    [
        ("none", SENTENCE),
        ("entity_mask", "〈Something〉는 [OBJ-PER]이 쓰고 [SUBJ-ORG]가 1969년"),
        ("entity_marker", "〈Something〉는 [E2] 조지 해리슨 [/E2]이 쓰고 [E1] 비틀즈 [/E1]가 1969년"),
        ("entity_marker_punct", "〈Something〉는 # 조지 해리슨 # 이 쓰고 @ 비틀즈 @ 가 1969년"),
        (
            "typed_entity_marker",
            "〈Something〉는 <o:person> 조지 해리슨 </o:person> 이 쓰고 <s:organization> 비틀즈 </s:organization> 가 ",
        ),
        (
            "typed_entity_marker_punct",
            "〈Something〉는 # ^ person ^ 조지 해리슨 # 이 쓰고 @ * organization * 비틀즈 @ 가 1969년",
        ),
    ],
)
def test_markers_match_the_golden_strings(marker, expected):
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
def test_prompts_match_the_golden_strings(prompt, before, after):
    rendered = Template(prompt=prompt).render(BEATLES, separator="</s>")
    assert (rendered.before, rendered.after) == (before, after)


def test_korean_type_names():
    text = Template("typed_entity_marker_punct", type_names="ko").render(BEATLES).text
    assert "# ^ 사람 ^ 조지 해리슨 # 이 쓰고 @ * 조직 * 비틀즈 @ 가" in text
    assert "<s:조직> 비틀즈 </s:조직> 가" in Template("typed_entity_marker", type_names="ko").render(BEATLES).text


@pytest.mark.parametrize(
    ("subject", "object", "expected"),
    [
        ("서울은행", "서울", "@ # 서울 # 은행 @ 은 컸다"),
        ("서울", "서울은행", "# @ 서울 @ 은행 # 은 컸다"),
        ("서울은행", "은행", "@ 서울# 은행 #  @ 은 컸다"),
        ("서울은", "은행은", "@ 서울# 은 @ 행은 #  컸다"),
    ],
)
def test_entities_that_nest_or_overlap_are_marked_at_their_own_offsets(subject, object, expected):
    assert Template("entity_marker_punct").render(row("서울은행은 컸다", subject, object)).text == expected


def test_a_mask_replaces_nested_entities():
    nested = row("서울은행은 컸다", "서울은행", "서울", types=("ORG", "LOC"))
    assert Template("entity_mask").render(nested).text == "[SUBJ-ORG][OBJ-LOC]은 컸다"


def test_same_word_twice_is_marked_where_the_offsets_say():
    rendered = Template("entity_marker").render(row("김은 김을 만났다", ("김", 0), ("김", 3)))
    assert rendered.text == "[E1] 김 [/E1]은 [E2] 김 [/E2]을 만났다"


def test_folds_share_the_rows_out_by_whole_sentences(rows):
    folds = [fold(rows, 5, k, seed=42) for k in range(5)]
    held_out = [row.id for _, valid in folds for row in valid]
    assert sorted(held_out) == sorted(row.id for row in rows)
    for train, valid in folds:
        assert not {r.sentence for r in train} & {r.sentence for r in valid}
        assert sorted(r.id for r in train + valid) == sorted(r.id for r in rows)
        share = {label: n / len(rows) for label, n in Counter(r.label for r in rows).items()}
        found = Counter(r.label for r in valid)
        assert all(abs(found[label] / len(valid) - p) < 0.02 for label, p in share.items())
    assert fold(rows, 5, 2, seed=42) == folds[2]
    with pytest.raises(InputError, match="--folds 5: 3 rows"):
        fold(rows[:3], 5, 0, seed=42)


def test_spans_point_at_marks_and_words():
    for marker in MARKERS:
        rendered = Template(marker).render(BEATLES)
        for (opening, word, word_end, closing), entity in zip(rendered.spans, BEATLES[2:4]):
            assert 0 <= opening <= word <= word_end <= closing <= len(rendered.text)
            if marker != "entity_mask":
                assert rendered.text[word:word_end] == entity.word


def test_a_typed_marker_without_types_is_named():
    untyped = BEATLES._replace(object=BEATLES.object._replace(type=None))
    assert "조지" in Template("entity_marker").render(untyped).text
    with pytest.raises(InputError, match=r"f:2: object_entity: has no type"):
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
        ("서울", "으로/로", "로"),
        ("부산", "으로/로", "으로"),
        ("100%", "은/는", "는"),
        ("\u1100\u1161\u11a8", "과/와", "과"),  # decomposed: final consonant as a jamo of its own
        ("中國", "과/와", "와"),
        ("", "과/와", "와"),
    ],
)
def test_particles(word, pair, expected):
    assert particle(word, pair) == expected


# --- tokens ------------------------------------------------------------------------------------------------------


def test_marks_are_the_opening_tokens(encoder_folder):
    for marker, openings in {
        "entity_mask": ("[SUBJ-ORG]", "[OBJ-PER]"),
        "entity_marker": ("[E1]", "[E2]"),
        "typed_entity_marker": ("<s:organization>", "<o:person>"),
        "typed_entity_marker_punct": ("@", "#"),
    }.items():
        template, tokenizer = Template(marker), load_tokenizer(str(encoder_folder))
        tokenizer.add_tokens(template.added_tokens({"ORG", "PER"}))
        (example,), _ = encode([BEATLES], template, tokenizer, KLUE_LABELS, 256)
        assert tuple(tokenizer.convert_ids_to_tokens([int(example.ids[m]) for m in example.openings])) == openings


@pytest.mark.parametrize("marker", MARKERS)
def test_tokens_know_their_entity_and_closing_marks_are_found(encoder_folder, marker):
    template, tokenizer = Template(marker), load_tokenizer(str(encoder_folder))
    tokenizer.add_tokens(template.added_tokens({"ORG", "PER"}))
    nested = row(SENTENCE, "해리슨", "조지 해리슨", types=("PER", "새"))
    (plain, inner), _ = encode([BEATLES, nested], template, tokenizer, KLUE_LABELS, 256)

    def text(example, who):
        return tokenizer.decode(example.ids[example.entities[0] == who]).replace(" ##", "").replace(" ", "")

    masked = marker == "entity_mask"
    assert (text(plain, 1), text(plain, 2)) == (("[SUBJ-ORG]", "[OBJ-PER]") if masked else ("비틀즈", "조지해리슨"))
    # each token of a nested word belongs to the inner entity
    assert text(inner, 1) == ("[SUBJ-PER]" if masked else "해리슨")
    assert text(inner, 2) == "[OBJ-새]" if masked else text(inner, 2).startswith("조지")
    assert set(zip(*plain.entities.tolist())) == {(0, 0), (1, 2), (2, 1)}  # ORG is the second type, PER the first
    assert set(zip(*inner.entities.tolist())) == {(0, 0), (1, 1), (2, 0)}  # a type that is none of KLUE-RE's
    ends = {"none": ("즈", "슨"), "entity_mask": ("[SUBJ-ORG]", "[OBJ-PER]"), "entity_marker": ("[/E1]", "[/E2]"),
            "typed_entity_marker": ("</s:organization>", "</o:person>")}.get(marker, ("@", "#"))  # fmt: skip
    last = tokenizer.convert_ids_to_tokens([int(plain.ids[k]) for k in plain.closings])
    assert all(token.endswith(end) for token, end in zip(last, ends)), last
    assert all(closing >= mark for closing, mark in zip(plain.closings, plain.openings))


def test_input_is_what_the_tokenizer_makes_of_the_pair(encoder_folder):
    tokenizer = load_tokenizer(str(encoder_folder))
    for prompt in PROMPTS:
        template = Template("entity_marker_punct", prompt)
        rendered = template.render(BEATLES)
        texts = [rendered.before, rendered.text + rendered.after] if rendered.before else [rendered.text]
        expected = tokenizer(*texts)
        (example,), _ = encode([BEATLES], template, tokenizer, KLUE_LABELS, 256)
        assert example.ids.tolist() == expected["input_ids"]
        assert example.segments.tolist() == expected["token_type_ids"]
        assert example.label == 0


LONG = "가나다라 마바사 " * 400


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("marker", MARKERS)
def test_no_entity_is_lost_in_a_long_sentence(encoder_folder, marker, prompt):
    template, tokenizer = Template(marker, prompt), load_tokenizer(str(encoder_folder))
    tokenizer.add_tokens(template.added_tokens({"ORG", "PER"}))
    places = [
        (LONG + "비틀즈" + LONG + "조지 해리슨" + LONG),
        ("비틀즈가 조지 해리슨" + LONG),
        (LONG + "비틀즈와 조지 해리슨"),
    ]
    rows = [row(s, "비틀즈", "조지 해리슨", types=("ORG", "PER")) for s in places]
    rows.append(row(places[0], (places[0], 0), "조지 해리슨", types=("ORG", "PER")))  # the sentence is an entity
    examples, n_cut = encode(rows, template, tokenizer, KLUE_LABELS, max_length=64)
    for r, example in zip(rows, examples):
        text = tokenizer.decode(example.ids).replace(" ##", "").replace(" ", "")
        assert len(example.ids) <= 64
        assert marker == "entity_mask" or r.object.word.replace(" ", "") in text
        rendered = template.render(r)
        for who, (opening, word, _, _) in enumerate(rendered.spans):
            first = rendered.text[opening:word].split() or [rendered.text[opening : opening + 1]]
            token = tokenizer.convert_ids_to_tokens(int(example.ids[example.openings[who]]))
            assert first[0].startswith(token) or token.startswith(first[0]), (first, token)
        closings = [rendered.text[word_end:closing].strip() for _, _, word_end, closing in rendered.spans]
        assert all(text.count(closing) >= closings.count(closing) for closing in closings if closing)
    assert n_cut == (3 if marker == "entity_mask" else 4)


def test_a_short_sentence_is_not_cut_and_long_context_stays_near_the_entities(encoder_folder):
    tokenizer = load_tokenizer(str(encoder_folder))
    sentence = "먼 " * 300 + "가까운 비틀즈와 조지 해리슨의 노래" + " 먼" * 300
    rows = [BEATLES, row(sentence, "비틀즈", "조지 해리슨")]
    (whole, cut), n_cut = encode(rows, Template("entity_marker_punct", "none"), tokenizer, KLUE_LABELS, 64)
    assert n_cut == 1
    assert len(cut.ids) == 64
    assert "가까운@비틀즈@와#조지해리슨#의노래" in tokenizer.decode(cut.ids).replace(" ##", "").replace(" ", "")
    assert len(whole.ids) < 64


# --- reading -----------------------------------------------------------------------------------------------------


def entity(word, start, end, type="PER"):
    return str({"word": word, "start_idx": start, "end_idx": end, "type": type})


def csv_row(id="0", sentence="김은 이를 만났다", s=None, o=None, label="no_relation"):
    s, o = s or entity("김", 0, 0), o or entity("이", 3, 3)
    return f'{id},"{sentence}","{s}","{o}",{label},wikipedia\n'


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (HEADER + csv_row(s=entity("김", 1, 1)), r":2: subject_entity: word '김' but sentence\[1:2\] is '은'"),
        (
            HEADER + csv_row() + csv_row("1", o=entity("이", 3, 99)),
            r":3: object_entity: start_idx, end_idx: found \(3, 99\)",
        ),
        (HEADER + csv_row(s=entity("김", -1, 0)), r":2: subject_entity: start_idx, end_idx: found \(-1, 0\)"),
        (
            HEADER + csv_row(s=entity("김", 0.0, 0)),
            r":2: subject_entity: start_idx: found 0.0, expected a whole number",
        ),
        (HEADER + csv_row(s=entity("김", "nan", 0)), r":2: subject_entity: start_idx: found 'nan'"),
        (HEADER + csv_row(s="{'word': '김'}"), r":2: subject_entity: start_idx: found None"),
        (HEADER + csv_row(s="[1, 2]"), r":2: subject_entity: found \[1, 2\], expected a dict"),
        (HEADER + csv_row(s="__import__('os').getcwd()"), r":2: subject_entity: found .*, expected a dict literal"),
        (HEADER + csv_row(s="(" * 5000), r":2: subject_entity: found .*, expected a dict literal"),
        (HEADER + csv_row(o=entity("김", 0, 0)), r":2: object_entity: found '김', expected another span"),
        (HEADER + csv_row() + csv_row(), r":3: id: found '0', expected another: line 2 has it"),
        (HEADER + csv_row(id=""), r":2: id: found '', expected a name"),
        (HEADER + "0,a,b\n", r":2: row: found \['0', 'a', 'b'\], expected 6 cells"),
        (HEADER + '0,"김은', r":2: broken CSV"),
        ("id,sentence\n0,a\n", r":1: header: found 'id,sentence', expected a column subject_entity, object_entity"),
        (HEADER, r"no rows"),
        ("", r"no rows"),
    ],
)
def test_a_bad_row_is_named(tmp_path, content, message):
    path = tmp_path / "train.csv"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(InputError, match=message) as raised:
        read_rows(path)
    assert "\n" not in str(raised.value)
    assert str(raised.value).startswith(str(path))


def test_lines_are_counted_over_cells_that_span_lines(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text(
        HEADER + csv_row(sentence="김은 이를\n만났다") + csv_row("1", s=entity("박", 0, 0)), encoding="utf-8"
    )
    with pytest.raises(InputError, match=r"a.csv:4: subject_entity: word '박'"):
        read_rows(path)


def test_wrong_encodings_are_named(tmp_path):
    (tmp_path / "a.csv").write_bytes((HEADER + csv_row()).encode("cp949"))
    with pytest.raises(InputError, match=r"a.csv:2: found byte 0x.., expected UTF-8"):
        read_rows(tmp_path / "a.csv")
    with pytest.raises(InputError, match="cannot be read"):
        read_rows(tmp_path / "absent.csv")


def test_bad_rows_can_be_skipped_and_are_counted(tmp_path):
    path, skipped = tmp_path / "a.csv", []
    path.write_text(
        HEADER + csv_row() + csv_row("1", s=entity("박", 0, 0)) + csv_row("2", label="per:x"), encoding="utf-8"
    )
    rows = with_known_labels(read_rows(path, skipped), KLUE_LABELS, skipped)
    assert [r.id for r in rows] == ["0"]
    assert [message.split(":")[1] for message in skipped] == ["3", "4"]


def test_all_formats_give_the_same_rows(tmp_path, rows):
    def as_object(r):
        entities = [
            {"word": e.word, "start_idx": e.start, "end_idx": e.end, "type": e.type} for e in (r.subject, r.object)
        ]
        return {"guid": r.id, "sentence": r.sentence, "subject_entity": entities[0], "object_entity": entities[1],
                "label": r.label, "source": r.source}  # fmt: skip

    objects = [as_object(r) for r in rows[:50]]
    (tmp_path / "a.json").write_text(json.dumps(objects, ensure_ascii=False), encoding="utf-8-sig")
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(o) for o in objects) + "\n", encoding="utf-8")
    for name in ("a.json", "a.jsonl"):
        assert [r[:-1] for r in read_rows(tmp_path / name)] == [r[:-1] for r in rows[:50]]


VALID = {
    "guid": "0",
    "sentence": "김은 이를 만났다",
    "subject_entity": {"word": "김", "start_idx": 0, "end_idx": 0, "type": "PER"},
    "object_entity": {"word": "이", "start_idx": 3, "end_idx": 3, "type": "PER"},
}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", "{", r"a.json:1: expected JSON rows"),
        ("a.json", '{"a": 1}', r"a.json:1: row: found 'a', expected an object"),
        ("a.json", "[" * 100_000, r"a.json:1: expected JSON rows"),
        ("a.jsonl", '{"guid": "0"}\n{', r"a.jsonl:2: expected JSONL rows"),
        ("a.jsonl", json.dumps({**VALID, "guid": "\ud800"}), r"a.jsonl:1: id: found '\\ud800'"),
        ("a.jsonl", json.dumps({**VALID, "label": "\ud800"}), r"a.jsonl:1: label: found '\\ud800'"),
        ("a.jsonl", "[1]\n", r"a.jsonl:1: row: found \[1\], expected an object"),
        ("a.jsonl", '{"guid": "0"}\n', r"a.jsonl:1: sentence: found None, expected text"),
        ("a.jsonl", '{"guid": "0", "sentence": "\\ud83d"}\n', r"a.jsonl:1: sentence: found '\\ud83d', expected text"),
    ],
)
def test_bad_json_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=message):
        read_rows(tmp_path / name)


def test_characters_beyond_the_basic_plane_and_an_entity_as_long_as_the_sentence(tmp_path):
    path = tmp_path / "a.csv"
    whole = entity("𝒦\u200b\u1100\u1161\u11a8", 0, 4)
    path.write_text(
        HEADER + csv_row(sentence="𝒦\u200b\u1100\u1161\u11a8", s=whole, o=entity("𝒦", 0, 0)), encoding="utf-8"
    )
    assert read_rows(path)[0].subject.word == "𝒦\u200b\u1100\u1161\u11a8"


def test_what_is_said_of_bad_input_is_one_line_without_commands_to_the_terminal(capsys):
    @exit_on_bad_input
    def main():
        raise InputError("train.csv:3: label: found a\x1b[2J\nb\r\u2028c")

    with pytest.raises(SystemExit):
        main()
    assert capsys.readouterr().err.endswith(": train.csv:3: label: found a [2J b  c\n")


def test_labels_of_the_competition_and_of_another_data_set(rows):
    assert find_labels(rows) == KLUE_LABELS
    assert KLUE_LABELS[1] == "org:top_members/employees"
    assert KLUE_LABELS[29] == "per:religion"
    assert len(set(KLUE_LABELS)) == 30
    own = [row("김은 이를 만났다", "김", "이", label) for label in ("knows", "none", "likes")]
    assert find_labels(own, "none") == ["none", "knows", "likes"]
    with pytest.raises(
        InputError, match=r"--negative-label nome: no row has it, expected .* one of knows, likes, none"
    ):
        find_labels(own, "nome")
    with pytest.raises(InputError, match="--negative-label none: all rows have it"):
        find_labels(own[1:2], "none")
    with pytest.raises(InputError, match=r"label: found none \(no such column, or 100\), expected one of"):
        with_known_labels([own[0]._replace(label=None)], KLUE_LABELS)
    typo = [*rows[:9], rows[9]._replace(label="per:titel")]
    with pytest.raises(InputError, match=r"label: found 'per:titel', expected one of 30 labels"):
        with_known_labels(typo, find_labels(typo))


# --- cleaning and splitting --------------------------------------------------------------------------------------


def test_cleaning_keeps_the_first_of_equals_a_relation_over_none_and_the_later_of_two_relations():
    def repeated(*labels):
        return [row("김은 이를 만났다", "김", "이", label, id=str(i)) for i, label in enumerate(labels)]

    for labels, kept in {
        ("per:title", "per:title"): "0",
        ("no_relation", "per:title"): "1",
        ("per:title", "no_relation"): "0",
        ("per:title", "per:spouse"): "1",
        ("per:title", "per:title", "per:spouse", "no_relation"): "2",
    }.items():
        rows, removed = clean(repeated(*labels))
        assert [r.id for r in rows] == [kept], labels
        assert len(removed) == len(labels) - 1
    other = row("김은 이를 만났다", "이", "김", id="9")
    assert len(clean([*repeated("per:title"), other])[0]) == 2


def test_splits_keep_sentences_on_one_side_and_mix_labels_as_asked(rows):
    repeated = rows + [r._replace(id=f"x{r.id}", subject=r.object, object=r.subject) for r in rows[:400]]
    for share, negative_share in ((0.2, None), (0.1, 0.6)):
        train, valid = split(repeated, KLUE_LABELS, share, 1, negative_share)
        assert sorted(r.id for r in train + valid) == sorted(r.id for r in repeated)
        assert not {r.sentence for r in train} & {r.sentence for r in valid}
        assert abs(len(valid) / len(repeated) - share) < 0.03
        negatives = Counter(r.label for r in valid)["no_relation"] / len(valid)
        wanted = negative_share or Counter(r.label for r in repeated)["no_relation"] / len(repeated)
        assert abs(negatives - wanted) < 0.04
        assert split(repeated, KLUE_LABELS, share, 1, negative_share)[1] == valid
        assert split(repeated, KLUE_LABELS, share, 2, negative_share)[1] != valid


def made_up(n, seed=0):
    """Rows of types, sources and labels that hang together, a third of them of pairs that stand in other rows too."""
    random, out = np.random.default_rng(seed), []
    for i in range(n):
        kind, negative = ("LOC", "DAT", "POH")[random.choice(3, p=(0.5, 0.4, 0.1))], random.random() < 0.3
        pair = (f"s{i}", f"o{i}") if random.random() < 0.67 else (f"s{i % 40}", f"o{i % 40}")
        made = row(f"{pair[0]} 및 {pair[1]} {i}", *pair, id=str(i), label="no_relation" if negative else "per:title")
        source = "wikitree" if random.random() < (0.5 if kind == "POH" else 0.2) else "wikipedia"
        out.append(made._replace(object=made.object._replace(type=kind), source=source))
    return out


def test_a_test_like_split_has_the_types_and_sources_of_the_test_set_and_no_pair_twice():
    rows = made_up(6000)
    like = [r for r in made_up(3000, seed=1) if (r.object.type, r.source) == ("POH", "wikitree") or int(r.id) % 4 == 0]
    train, valid = split(rows, KLUE_LABELS, 0.1, 1, 0.6, like)
    pairs, in_train = ([(r.subject.word, r.object.word) for r in part] for part in (valid, train))
    assert not set(pairs) & set(in_train)
    assert 480 < len(valid) <= 600
    assert abs(Counter(r.label for r in valid)["no_relation"] / len(valid) - 0.6) < 0.05
    for value in (lambda r: r.object.type, lambda r: r.source):
        plain, found, wanted = (Counter(map(value, part)) for part in (rows, valid, like))
        for name in wanted:
            assert abs(found[name] / len(valid) - wanted[name] / len(like)) < 0.03
        assert max(abs(plain[name] / len(rows) - wanted[name] / len(like)) for name in wanted) > 0.03
    # kinds of rows that only the test set has do no harm, nor do sources that tell each row from all others
    other = [r._replace(source="elsewhere") for r in like[:100]]
    own = [r._replace(source=r.id) for r in rows]
    for training, test in ((rows, like + other), (rows, other), (own, like), (own, ())):
        assert len(split(training, KLUE_LABELS, 0.1, 1, 0.6, test)[1]) > 480


def test_a_stratified_split_takes_sentences_of_several_rows_as_often(rows):
    sentences = [r for r in rows if not r.id.endswith("7")]
    doubled = sentences + [r._replace(id=f"x{r.id}", subject=r.object, object=r.subject) for r in sentences[:600]]
    of_several = {r.sentence for r in sentences[:600]}
    _, valid = split(doubled, KLUE_LABELS, 0.2, 1)
    found = np.mean([r.sentence in of_several for r in valid])
    assert abs(found - np.mean([r.sentence in of_several for r in doubled])) < 0.15


def test_a_split_that_would_take_most_of_a_label_is_refused(rows):
    few = [r for r in rows if r.label != "no_relation"] + [r for r in rows if r.label == "no_relation"][:20]
    with pytest.raises(InputError, match="no-relation-share"):
        split(few, KLUE_LABELS, 0.1, 1, 0.6)


# --- writing -----------------------------------------------------------------------------------------------------


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("old")

    def fail_half_way():
        with atomic_write(path) as file:
            file.write("new")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail_half_way()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
    with atomic_write(path) as file:
        file.write("new")
    assert path.read_text() == "new"
    with pytest.raises(InputError, match="cannot be written"), atomic_write(path / "below"):
        pass


def test_reading_the_sample_takes_every_row(rows):
    assert len(rows) > 1400
    assert set(Counter(r.label for r in rows)) == set(KLUE_LABELS)
    assert np.all([r.sentence[r.subject.start : r.subject.end + 1] == r.subject.word for r in rows])


# --- what is in a file -------------------------------------------------------------------------------------------


def repeats_counted_from_the_file(path):
    """The rows beyond the first of each group, counted from the cells: sentence, with object, subject, both, label."""
    with open(path, encoding="utf-8-sig", newline="") as file:
        cells = [(r["sentence"], r["object_entity"], r["subject_entity"], r["label"]) for r in csv.DictReader(file)]
    entity = {text: tuple(sorted(ast.literal_eval(text).items())) for row in cells for text in row[1:3]}
    rows = [(sentence, entity[object], entity[subject], label) for sentence, object, subject, label in cells]
    parts = [[0], [0, 1], [0, 2], [0, 1, 2], [0, 1, 2, 3]]
    return [sum(n - 1 for n in Counter(tuple(row[i] for i in part) for row in rows).values()) for part in parts]


def test_repeats_are_counted_beyond_the_first(rows):
    counted = [line["sample"] for line in repeat_table({"sample": rows})]
    assert counted == repeats_counted_from_the_file(SAMPLE / "train.csv")
    first = row("김은 이를 만났다", "김", "이")
    other_type = row("김은 이를 만났다", "김", "이", types=("ORG", "PER"))
    other_object = row("김은 이를 만났다", "김", "만")
    alike = {"f": [first, first, first._replace(label="per:spouse"), other_type, other_object]}
    assert [line["f"] for line in repeat_table(alike)] == [4, 2, 3, 2, 1]


def test_tables_of_labels_types_and_shared_rows():
    a = [row("김은 이를 만났다", "김", "이"), row("박은 최를 안다", "박", "최", "per:spouse")]
    b = [row("김은 이를 만났다", "김", "만", "per:spouse"), row("모두 다르다", "모", "다")]
    table = count_table({"a": [*a, a[0]], "b": b}, "label", lambda r: r.label)
    assert table[0] == {"label": "no_relation", "a": 2, "a %": pytest.approx(200 / 3), "b": 1, "b %": 50}
    assert [line["label"] for line in table] == ["no_relation", "per:spouse"]
    assert cross_table(a) == [
        {"label": "no_relation", "PER-ORG": 1},
        {"label": "per:spouse", "PER-ORG": 1},
    ]
    untyped = a[0]._replace(subject=a[0].subject._replace(type=None), label=None)
    assert type_pair(untyped) == "(none)-ORG"
    assert cross_table([untyped])[0]["label"] == "(none)"
    shared = shared_table({"a": [*a, a[0]], "b": b})
    assert [tuple(line.values())[1:] for line in shared] == [(1, 2, 1), (0, 0, 0), (1, 2, 1), (0, 0, 0)]


def test_lengths_are_summed_up():
    table = length_table({"f": np.arange(1, 102)}, 100)
    assert [(line["tokens"], line["f"]) for line in table] == [
        ("mean", 51), ("50 %", 51), ("90 %", 91), ("95 %", 96), ("99 %", 100), ("max", 101), ("over 100", 1)
    ]  # fmt: skip
