"""Token ids of rows: markers, entities, segments and truncation."""

import pytest

from data import KLUE_LABELS, MARKERS, PROMPTS, Template
from encoder import load_tokenizer
from tests.helpers import row
from tokens import encode

SENTENCE = "〈Something〉는 조지 해리슨이 쓰고 비틀즈가 1969년 앨범 《Abbey Road》에 담은 노래다."
BEATLES = row(SENTENCE, "비틀즈", "조지 해리슨", types=("ORG", "PER"))
LONG = "가나다라 마바사 " * 400


@pytest.fixture
def tokenizer_for(encoder_folder):
    """tokenizer_for(template): the tokenizer of a tiny encoder, with the template's markers."""

    def tokenizer_for(template):
        tokenizer = load_tokenizer(str(encoder_folder))
        tokenizer.add_tokens(template.added_tokens({"ORG", "PER"}))
        return tokenizer

    return tokenizer_for


def decode(tokenizer, ids) -> str:
    """The text of these tokens, without spaces."""
    return tokenizer.decode(ids).replace(" ##", "").replace(" ", "")


def tokens_at(tokenizer, example, positions) -> list[str]:
    return tokenizer.convert_ids_to_tokens(example.ids[list(positions)].tolist())


@pytest.mark.parametrize(
    ("marker", "expected"),
    [
        ("entity_mask", ["[SUBJ-ORG]", "[OBJ-PER]"]),
        ("entity_marker", ["[E1]", "[E2]"]),
        ("typed_entity_marker", ["<s:organization>", "<o:person>"]),
        ("typed_entity_marker_punct", ["@", "#"]),
    ],
)
def test_marker_starts_are_the_opening_tokens(tokenizer_for, marker, expected):
    template = Template(marker)
    tokenizer = tokenizer_for(template)
    (example,), _ = encode([BEATLES], template, tokenizer, KLUE_LABELS, 256)
    assert tokens_at(tokenizer, example, example.marker_starts) == expected


CLOSING = {
    "none": ("즈", "슨"),
    "entity_mask": ("[SUBJ-ORG]", "[OBJ-PER]"),
    "entity_marker": ("[/E1]", "[/E2]"),
    "entity_marker_punct": ("@", "#"),
    "typed_entity_marker": ("</s:organization>", "</o:person>"),
    "typed_entity_marker_punct": ("@", "#"),
}


@pytest.mark.parametrize("marker", MARKERS)
def test_entities_of_tokens_and_marker_ends(tokenizer_for, marker):
    template = Template(marker)
    tokenizer = tokenizer_for(template)
    nested = row(SENTENCE, "해리슨", "조지 해리슨", types=("PER", "새"))
    (plain, inner), _ = encode([BEATLES, nested], template, tokenizer, KLUE_LABELS, 256)

    def text(example, who):
        return decode(tokenizer, example.ids[example.entities[0] == who])

    masked = marker == "entity_mask"
    words = ("[SUBJ-ORG]", "[OBJ-PER]") if masked else ("비틀즈", "조지해리슨")
    assert (text(plain, 1), text(plain, 2)) == words
    # each token of a nested word belongs to the inner entity
    assert text(inner, 1) == ("[SUBJ-PER]" if masked else "해리슨")
    assert text(inner, 2) == "[OBJ-새]" if masked else text(inner, 2).startswith("조지")
    # PER is type 1, ORG is type 2, a type that KLUE-RE does not have is 0
    assert set(zip(*plain.entities.tolist())) == {(0, 0), (1, 2), (2, 1)}
    assert set(zip(*inner.entities.tolist())) == {(0, 0), (1, 1), (2, 0)}
    last = tokens_at(tokenizer, plain, plain.marker_ends)
    assert all(token.endswith(end) for token, end in zip(last, CLOSING[marker])), last
    assert all(end >= start for end, start in zip(plain.marker_ends, plain.marker_starts))


@pytest.mark.parametrize("prompt", PROMPTS)
def test_ids_and_segments_are_those_of_the_tokenizer(tokenizer_for, prompt):
    template = Template("entity_marker_punct", prompt)
    tokenizer, rendered = tokenizer_for(template), template.render(BEATLES)
    sentence = rendered.text + rendered.after
    expected = tokenizer(rendered.before, sentence) if rendered.before else tokenizer(sentence)
    (example,), _ = encode([BEATLES], template, tokenizer, KLUE_LABELS, 256)
    assert example.ids.tolist() == expected["input_ids"]
    assert example.segments.tolist() == expected["token_type_ids"]
    assert example.label == 0


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("marker", MARKERS)
def test_truncation_keeps_markers_and_entities(tokenizer_for, marker, prompt):
    template = Template(marker, prompt)
    tokenizer = tokenizer_for(template)
    sentences = [
        LONG + "비틀즈" + LONG + "조지 해리슨" + LONG,
        "비틀즈가 조지 해리슨" + LONG,
        LONG + "비틀즈와 조지 해리슨",
    ]
    rows = [row(s, "비틀즈", "조지 해리슨", types=("ORG", "PER")) for s in sentences]
    whole = (sentences[0], 0)  # the subject is the whole sentence
    rows.append(row(sentences[0], whole, "조지 해리슨", types=("ORG", "PER")))
    examples, n_truncated = encode(rows, template, tokenizer, KLUE_LABELS, max_length=64)
    for r, example in zip(rows, examples):
        text = decode(tokenizer, example.ids)
        assert len(example.ids) <= 64
        assert marker == "entity_mask" or r.object.word.replace(" ", "") in text
        rendered = template.render(r)
        starts = tokens_at(tokenizer, example, example.marker_starts)
        for token, (opening, word, _, _) in zip(starts, rendered.spans):
            first = rendered.text[opening:word].split() or [rendered.text[opening : opening + 1]]
            assert first[0].startswith(token) or token.startswith(first[0]), (first, token)
        closings = [rendered.text[end:closing].strip() for _, _, end, closing in rendered.spans]
        assert all(text.count(c) >= closings.count(c) for c in closings if c)
    assert n_truncated == (3 if marker == "entity_mask" else 4)


def test_truncation_keeps_the_context_near_the_entities(tokenizer_for):
    template = Template("entity_marker_punct", "none")
    tokenizer = tokenizer_for(template)
    sentence = "먼 " * 300 + "가까운 비틀즈와 조지 해리슨의 노래" + " 먼" * 300
    rows = [BEATLES, row(sentence, "비틀즈", "조지 해리슨")]
    (short, truncated), n_truncated = encode(rows, template, tokenizer, KLUE_LABELS, 64)
    assert n_truncated == 1
    assert len(truncated.ids) == 64
    assert "가까운@비틀즈@와#조지해리슨#의노래" in decode(tokenizer, truncated.ids)
    assert len(short.ids) < 64
