"""Rows of KLUE-RE: the checks that each row must pass, and composed text.

    rows = read_rows("data/train.csv")           # or another format, or a split of a hub data set
    rows = read_rows("train.csv", skipped := []) # leave bad rows out, collect their messages
    row = normalized(Row(...))                   # check and compose a row made in Python
    row, n_ambiguous = row_of({"sentence": …, "subject": "비틀즈", "object": …}, 0, "my row")

See docs/data.md.
"""

import ast
import math
import re
import unicodedata
from itertools import zip_longest
from numbers import Integral, Real
from pathlib import Path
from typing import NamedTuple

from common import InputError, expect, expect_field, expect_new_id, is_text, parse_json, shorten
from formats import MissingSplit, data_file, file_in, read_records

COLUMNS = ("id", "sentence", "subject_entity", "object_entity")  # label and source are optional
NEEDED = ("sentence", "subject_entity or subject", "object_entity or object")
UNIQUE = 200_000  # rows of a file read in chunks whose ids are remembered: 40 MB
ID = "a number or text, in all rows or in none"  # what an id is
ENTITY_FIELDS = ("word", "start_idx", "end_idx", "type")


class Entity(NamedTuple):
    """A span of a sentence: `sentence[start : end + 1] == word`. `type` is PER, … or None."""

    word: str
    start: int
    end: int
    type: str | None


class Text(NamedTuple):
    """A sentence with any number of entities."""

    id: str
    sentence: str
    entities: list[Entity]
    where: str  # FILE:LINE


class Row(NamedTuple):
    """A sentence with its two entities. `label` is None if the file has none."""

    id: str
    sentence: str
    subject: Entity
    object: Entity
    label: str | None
    source: str
    where: str  # FILE:LINE


def read_rows(
    path: str | Path, skipped: list[str] | None = None, log=print, unique_ids: bool = False
) -> list[Row]:
    """Read and check all rows of a file, in its order. Rows without ids are numbered from 0.

    A bad row raises InputError. With a list `skipped`, bad rows are left out instead, and their
    error messages are appended to the list. With `unique_ids`, a row with the id of an earlier one
    is bad. `log` gets a line if rows are changed.
    """
    (rows,) = read_chunks(path, row_of, math.inf, skipped, log, unique_ids)
    return rows


def read_chunks(path: str | Path, make, size: float, skipped: list[str] | None = None, log=print,
                unique_ids: bool = False, check=None):  # fmt: skip
    """Yield lists of at most `size` rows, read one after the other; see `read_rows`.

    `make` is row_of or text_of. In chunks, ids are compared with those of UNIQUE rows only.
    check(row) may raise InputError for more rows that are bad.
    """
    columns = NEEDED if make is row_of else ("sentence",)
    numbered = all(_id(record) is None for _, record in read_records(Path(path), columns))
    chunk, n_rows, n_composed, n_ambiguous = [], 0, 0, 0
    line_of, n_bad, first_bad = {}, 0, ""
    for number, (line, record) in enumerate(read_records(Path(path), columns)):
        where = f"{path}:{line}"
        try:
            if isinstance(record, InputError):
                raise record
            row_id = number if numbered else _id(record)
            row, ambiguous, composed = make(record, row_id, where)
            if check:
                check(row)
            if unique_ids and not numbered and n_rows < max(UNIQUE, size):
                expect_new_id(row.id, line, line_of, where)
        except InputError as error:
            if skipped is None:
                raise
            skipped.append(str(error))
            n_bad, first_bad = n_bad + 1, first_bad or str(error)
            continue
        if len(chunk) == size:
            yield chunk
            chunk = []
        chunk.append(row)
        n_rows += 1
        n_composed += composed
        n_ambiguous += ambiguous > 0
    if not chunk:
        found = f"all {n_bad} rows are bad; the first: {first_bad}" if n_bad else "no rows"
        raise InputError(f"{path}: {found}")
    if numbered:
        log(f"{path}: the rows have no ids; they are numbered from 0")
    elif unique_ids and n_rows > max(UNIQUE, size):
        log(f"{path}: of {n_rows} rows the first {UNIQUE} were checked for ids that repeat")
    if n_composed:
        changed = f"composed the text of {n_composed} rows (Unicode NFC)"
        log(f"{path}: {changed}, and moved their offsets")
    if n_ambiguous:
        found = f"{n_ambiguous} rows have a word that is in the sentence more than once"
        log(f"{path}: {found}: its first place outside the other entities was taken")
    yield chunk


def rows_to_predict(data: str | Path, skipped: list[str] | None = None, log=print) -> list[Row]:
    """Rows of test_data beside the training file of `data`; empty if there is no such file."""
    folder = data_file(data, "train").parent
    is_hub = str(folder).startswith("hub:")
    path = data_file(folder, "test_data") if is_hub else file_in(folder, "test_data")
    try:
        return read_rows(path, skipped, log) if path else []
    except MissingSplit:  # as a folder without the file
        return []


# --- Unicode ----------------------------------------------------------------------------------


def compose(text: str) -> str:
    """The text in Unicode NFC. macOS writes Korean decomposed (NFD): 각 is then three jamo."""
    return unicodedata.normalize("NFC", text)


def normalized(row: Row) -> Row:
    """The row with all texts but its id in NFC, and its offsets moved with the sentence.

    Offsets may count the characters of the sentence as it is, or of its NFC or NFD: a text may have
    been composed or decomposed after they were counted. Raises InputError unless they then point
    at the words, and at different spans.
    """
    entities = [_located(entity, row.sentence, f"{row.where}: {who}_entity")
                for who, entity in (("subject", row.subject), ("object", row.object))]  # fmt: skip
    distinct, expected = entities[0][1:3] != entities[1][1:3], "another span than the subject's"
    expect(distinct, row.where, "object_entity", entities[1].word, expected)
    label = row.label and compose(row.label)
    return Row(row.id, compose(row.sentence), *entities, label, compose(row.source), row.where)


def _located(entity: Entity, sentence: str, where: str) -> Entity:
    """The entity in the composed sentence; see `normalized`."""
    composed, word = compose(sentence), compose(entity.word)
    type_ = compose(entity.type) if entity.type else None
    start, inside_a_letter = entity.start, False
    for form in (None, "NFC", "NFD"):
        text = unicodedata.normalize(form, sentence) if form else sentence
        end = entity.end
        if end is None:
            end = start + len(unicodedata.normalize(form, word) if form else entity.word) - 1
        if 0 <= start <= end < len(text) and compose(text[start : end + 1]) == word:
            before = compose(text[:start])
            if before + word + compose(text[end + 1 :]) == composed:
                return Entity(word, len(before), len(before) + len(word) - 1, type_)
            inside_a_letter = True
    if inside_a_letter:
        raise InputError(f"{where}: word {shorten(word)} starts or ends inside a composed letter")
    bounds = f"0 <= start_idx <= end_idx < {len(sentence)} (the sentence's length)"
    end = start + len(word) - 1 if entity.end is None else entity.end
    expect(0 <= start <= end < len(sentence), where, "start_idx, end_idx", (start, end), bounds)
    span = compose(sentence[start : end + 1])
    found = f"word {shorten(word)} but sentence[{start}:{end + 1}] is {shorten(span)}"
    hint = f"; end_idx is inclusive: expected {end - 1}" if span[:-1] == word else ""
    raise InputError(f"{where}: {found}{_look_alikes(word, span)}{hint}")


def _look_alikes(a: str, b: str) -> str:
    """The first different characters of two texts by number, if they may look alike."""
    different = next(pair for pair in zip_longest(a, b, fillvalue="") if pair[0] != pair[1])
    if all(re.fullmatch("[ -~가-힣]?", c) for c in different):
        return ""
    names = [f"U+{ord(c):04X}" if c else "nothing" for c in different]
    return f" ({names[0]} differs from {names[1]})"


# --- words ------------------------------------------------------------------------------------


def locate(sentence: str, words: list[str], starts: list[int | None], names: list[str]):
    """(starts, all places of each word) in a composed sentence; finds the starts that are None.

    Words with fewer places come first, of equally many the longer. Each takes its first place
    outside the words that were located before it; if there is none, its first other span. `names`
    are those of the words in error messages.
    """
    patterns = (f"(?={re.escape(word)})" for word in words)  # overlapping places too
    places = [[found.start() for found in re.finditer(p, sentence)] for p in patterns]
    spans = {k: (at, at + len(words[k])) for k, at in enumerate(starts) if at is not None}
    missing = [k for k in range(len(words)) if k not in spans]
    for k in sorted(missing, key=lambda k: (len(places[k]), -len(words[k]))):
        found, taken = [(i, i + len(words[k])) for i in places[k]], spans.values()
        expect(found, names[k], "word", words[k], "a word of the sentence")
        apart = [a for a in found if all(a[1] <= b[0] or b[1] <= a[0] for b in taken)]
        others = apart or [a for a in found if a not in taken]
        expect(others, names[k], "word", words[k], "another position than another entity's")
        spans[k] = others[0]
    return [spans[k][0] for k in range(len(words))], places


def placed(sentence: str, entities: list[Entity], names: list[str]):
    """(composed entities with offsets, number of words that took one of several places).

    `sentence` may be decomposed. An entity without offsets has None as its start, one without the
    offset of its last character None as its end.
    """
    words = [compose(entity.word) for entity in entities]
    at = [e.start if e.start is None else _located(e, sentence, name).start
          for e, name in zip(entities, names)]  # fmt: skip
    starts, places = locate(compose(sentence), words, at, names)
    done = [Entity(word, start, start + len(word) - 1, entity.type and compose(entity.type))
            for word, start, entity in zip(words, starts, entities)]  # fmt: skip
    return done, sum(start is None and len(found) > 1 for start, found in zip(at, places))


# --- fields -----------------------------------------------------------------------------------


def row_of(record: dict, row_id, where: str):
    """(checked and composed row, number of words that took one of several places, whether text was
    composed), of the fields that docs/data.md lists."""
    expect(isinstance(record, dict), where, "row", record, "an object")
    found, n_ambiguous = _row(record, row_id, where), 0
    given = found
    if None in (*found.subject[1:3], *found.object[1:3]):
        names = [f"{where}: {who}" for who in ("subject", "object")]
        entities, n_ambiguous = placed(found.sentence, [found.subject, found.object], names)
        found = found._replace(sentence=compose(found.sentence))
        found = found._replace(subject=entities[0], object=entities[1])
    row = normalized(found)
    words = [(r.sentence, r.subject.word, r.object.word) for r in (given, row)]
    return row, n_ambiguous, row != found or words[0] != words[1]


def entity_of(found, where: str) -> Entity:
    """The entity of a word, or of a dict with at least `word`; offsets may be None."""
    if isinstance(found, str):
        found = {"word": found.strip()}
    elif isinstance(found, dict):
        expect_field(found, where, "word")
        other = {"start", "end"} & {*found}
        expect(not other, where, "offsets", sorted(other), "start_idx and end_idx (inclusive)")
    return _entity(found, where, offsets=False)


def text_of(record: dict, row_id, where: str):
    """Like row_of, for {"sentence": …, "entities": […]}: a Text. Entities may share a span."""
    expect(isinstance(record, dict), where, "row", record, "an object")
    if "entities" not in record and {"subject", "subject_entity"} & {*record}:
        raise InputError(f"{where}: found a subject, expected entities; leave out --triples")
    expect_field(record, where, "sentence")
    expect_field(record, where, "entities")
    sentence, found = record["sentence"], record["entities"]
    expect(is_text(sentence) and not _is_missing(sentence), where, "sentence", sentence, "text")
    has_id = type(row_id) is int or (is_text(row_id) and row_id.strip())
    expect(has_id, where, "id", row_id, ID)
    expect(isinstance(found, (list, tuple)), where, "entities", found, "a list")
    names = [f"{where}: entities[{k}]" for k in range(len(found))]
    entities = [entity_of(entity, name) for entity, name in zip(found, names)]
    done, n_ambiguous = placed(sentence, entities, names)
    text = Text(str(row_id), compose(sentence), done, where)
    return text, n_ambiguous, text.sentence != sentence


def _given(record: dict, who: str, where: str) -> Entity:
    """The subject or object: SUBJECT_entity with offsets, else SUBJECT, a word or an entity."""
    hint = "found entities, expected subject and object; --triples predicts all their pairs"
    if "entities" in record and who not in record and f"{who}_entity" not in record:
        raise InputError(f"{where}: {hint}")
    expect_field(record, where, f"{who}_entity", who)
    entity = record.get(f"{who}_entity")
    if entity is not None or who not in record:
        return _entity(entity, f"{where}: {who}_entity")
    expect(not _is_missing(record[who]), where, who, record[who], "a word of the sentence")
    entity, type_ = entity_of(record[who], f"{where}: {who}"), record.get(f"{who}_type")
    has_type = _is_missing(type_) or is_text(type_)
    expect(has_type, where, f"{who}_type", type_, "text such as PER")
    return entity if _is_missing(type_) else entity._replace(type=type_.strip())


def _id(record):
    """The id of a record, also named guid; None if it has none."""
    fields = record if isinstance(record, dict) else {}
    found = fields.get("guid") if fields.get("id") is None else fields["id"]
    if isinstance(found, float):  # what pandas makes of whole numbers if some are missing
        return None if math.isnan(found) else int(found) if found.is_integer() else found
    return found


def _row(record: dict, row_id, where: str) -> Row:
    """The row of a record. The labels 100 (competition) and -1 (hub) mean no label."""
    expect_field(record, where, "sentence")
    sentence, label = record["sentence"], record.get("label")
    expect(is_text(sentence) and not _is_missing(sentence), where, "sentence", sentence, "text")
    entities = [_given(record, who, where) for who in ("subject", "object")]
    has_id = type(row_id) is int or (is_text(row_id) and row_id.strip())
    expect(has_id, where, "id", row_id, ID)
    has_text = _is_missing(label) or _is_number(label) or is_text(label)
    expect(has_text, where, "label", label, "a relation's name")
    label = None if _is_missing(label) else re.sub(r"^(-?\d+)\.0*$", r"\1", str(label).strip())
    label = None if label in ("100", "-1") else label
    source = record.get("source")
    has_text = _is_missing(source) or _is_number(source) or is_text(source)
    expect(has_text, where, "source", source, "text")
    source = "" if _is_missing(source) else str(source)
    return Row(str(row_id), sentence, *entities, label, source, where)


def _is_number(value) -> bool:
    """Whether a value is a number, NumPy's too."""
    return isinstance(value, Real) and not isinstance(value, bool)


def _is_missing(value) -> bool:
    """Whether a value is null, blank or NaN, which pandas writes for a missing one."""
    blank = isinstance(value, str) and value.strip().lower() in ("", "nan")
    return value is None or blank or (isinstance(value, float) and math.isnan(value))


# A fast path for the usual cell: ast.literal_eval takes ten times as long, 2 s for KLUE-RE.
ENTITY = re.compile(
    r"\{'word': '([^'\\\n\r\0]*)', 'start_idx': (0|[1-9]\d{0,8}), 'end_idx': (0|[1-9]\d{0,8}), "
    r"'type': '([A-Z]+)'\}",
    re.ASCII,
)


def _entity(found, where: str, offsets: bool = True) -> Entity:
    """The entity of a cell: a dict, or the text of one in Python's syntax or JSON. Without
    `offsets` it may lack both, or the second."""
    if isinstance(found, str) and (usual := ENTITY.fullmatch(found)):
        word, start, end, type_ = usual.groups()
        found = {"word": word, "start_idx": int(start), "end_idx": int(end), "type": type_}
    elif isinstance(found, str):
        try:
            found = _parse_cell(found)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError) as error:
            expected = "a dict literal or a JSON object"
            raise InputError(f"{where}: found {shorten(found)}, expected {expected}") from error
    if not isinstance(found, dict):
        expected = f"a dict of {', '.join(ENTITY_FIELDS)}"
        raise InputError(f"{where}: found {shorten(found)}, expected {expected}")
    word, start, end, type_ = (found.get(key) for key in ENTITY_FIELDS)
    expect(is_text(word) and word.strip(), where, "word", word, "text")
    is_whole = [isinstance(x, Integral) and not isinstance(x, bool) for x in (start, end)]
    start, end = (int(x) if whole else x for x, whole in zip((start, end), is_whole))
    expect(is_whole[0] or (start is end is None and not offsets), where, "start_idx", start,
           "a whole number")  # fmt: skip
    expect(is_whole[1] or (end is None and not offsets), where, "end_idx", end, "a whole number")
    expect(_is_missing(type_) or is_text(type_), where, "type", type_, "text such as PER")
    return Entity(word, start, end, None if _is_missing(type_) else type_.strip())


def _parse_cell(text: str):
    """The value of a JSON text or a Python literal. A text that is both is JSON: str(dict) is none,
    and only JSON joins the escaped halves of an emoji."""
    try:
        return parse_json(text)
    except ValueError:
        tree = ast.parse(text.strip(), mode="eval")
    keys = [getattr(key, "value", key) for key in getattr(tree.body, "keys", [])]
    if len(set(keys)) < len(keys):
        raise ValueError("a key stands twice")
    return ast.literal_eval(tree)
