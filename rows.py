"""Rows of KLUE-RE: the formats they are read from, and the checks that each row must pass.

    rows = read_rows("data/train.csv")           # or .json, .jsonl, or a split of a hub data set
    rows = read_rows("train.csv", skipped := []) # leave bad rows out, collect their messages
    row = normalized(Row(...))                   # check and compose a row made in Python

Formats: the Boostcamp competition's CSV, KLUE's JSON, JSON lines; UTF-8. See docs/data.md.
"""

import ast
import re
import unicodedata
from hashlib import sha256
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple

from common import (
    InputError,
    expect,
    first_line,
    is_text,
    optional_import,
    parse_json,
    read_csv,
    read_text,
    shorten,
)

COLUMNS = ("id", "sentence", "subject_entity", "object_entity")  # label and source are optional
ENTITY_FIELDS = ("word", "start_idx", "end_idx", "type")
HUB = re.compile(r"hub:([^@]+)@([^:@]+)(?::([^:@/]+))?")  # name or folder, revision, config
# HUB/SPLIT. A revision may contain a slash too: without a config, only these splits are taken
HUB_SPLIT = re.compile(r"hub:[^@]+@[^:@]+(:[^:@/]+/[^:@/]+|/(train|dev|validation|test|test_data))")
SUFFIXES = (".csv", ".tsv", ".json", ".jsonl", ".parquet")


class Entity(NamedTuple):
    """A span of a sentence: `sentence[start : end + 1] == word`. `type` is PER, … or None."""

    word: str
    start: int
    end: int
    type: str | None


class Row(NamedTuple):
    """A sentence with its two entities. `label` is None if the file has none."""

    id: str
    sentence: str
    subject: Entity
    object: Entity
    label: str | None
    source: str
    where: str  # FILE:LINE


def data_file(data: str | Path, stem: str) -> Path:
    """The file that `data` means: `data` itself, or the file `stem` of a data folder.

    For a hub data set the "path" is HUB/SPLIT, where `stem` names the split if `data` does not.
    """
    if str(data).startswith("hub:"):
        has_split = HUB_SPLIT.fullmatch(str(data))
        return Path(str(data)) if has_split else Path(str(data), stem)
    if (path := _file_in(Path(data), stem)) is None:
        found = f"no {stem}.csv, .tsv, .json, .jsonl or .parquet"
        found = found if Path(data).is_dir() else "no such file or folder"
        raise InputError(f"{data}: {found}; --data names another folder or file")
    return path


def _file_in(folder: Path, stem: str) -> Path | None:
    """The file `stem` of a folder, or the "folder" itself if it is a file; None without one."""
    candidates = [folder, *(folder / f"{stem}{suffix}" for suffix in SUFFIXES)]
    found = [path for path in candidates if path.is_file()]
    if len(found) > 1:
        names = f"{found[0].name} and {found[1].name}"
        raise InputError(f"{folder}: found {names}, expected one of them; --data may name a file")
    return found[0] if found else None


def read_rows(path: str | Path, skipped: list[str] | None = None, log=print) -> list[Row]:
    """Read and check all rows of a file, in its order.

    A bad row raises InputError. With a list `skipped`, bad rows are left out instead, and their
    error messages are appended to the list. `log` gets a line if rows are changed.
    """
    rows, line_of, n_composed, n_skipped = [], {}, 0, len(skipped or [])
    for line, record in _records(Path(path), skipped):
        try:
            found = _row(record, f"{path}:{line}")
            row = normalized(found)
            unique = f"a unique id; line {line_of.get(row.id)} has it too"
            expect(row.id not in line_of, row.where, "id", row.id, unique)
            line_of[row.id] = line
            rows.append(row)
            n_composed += row != found
        except InputError as error:
            if skipped is None:
                raise
            skipped.append(str(error))
    if not rows:
        bad = (skipped or [])[n_skipped:]
        found = f"all {len(bad)} rows are bad; the first: {bad[0]}" if bad else "no rows"
        raise InputError(f"{path}: {found}")
    if n_composed:
        log(
            f"{path}: composed the text of {n_composed} rows (Unicode NFC), and moved their offsets"
        )
    return rows


def rows_to_predict(data: str | Path, skipped: list[str] | None = None, log=print) -> list[Row]:
    """Rows of test_data beside the training file of `data`; empty if there is no such file."""
    folder = data_file(data, "train").parent
    is_hub = str(folder).startswith("hub:")
    path = data_file(folder, "test_data") if is_hub else _file_in(folder, "test_data")
    return read_rows(path, skipped, log) if path else []


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
    start, end = entity.start, entity.end
    inside_a_letter = False
    for form in (None, "NFC", "NFD"):
        text = unicodedata.normalize(form, sentence) if form else sentence
        if 0 <= start <= end < len(text) and compose(text[start : end + 1]) == word:
            before = compose(text[:start])
            if before + word + compose(text[end + 1 :]) == composed:
                return Entity(word, len(before), len(before) + len(word) - 1, type_)
            inside_a_letter = True
    if inside_a_letter:
        raise InputError(f"{where}: word {shorten(word)} starts or ends inside a composed letter")
    bounds = f"0 <= start_idx <= end_idx < {len(sentence)} (the sentence's length)"
    in_sentence = 0 <= start <= end < len(sentence)
    expect(in_sentence, where, "start_idx, end_idx", (start, end), bounds)
    span = compose(sentence[start : end + 1])
    found = f"word {shorten(word)} but sentence[{start}:{end + 1}] is {shorten(span)}"
    raise InputError(f"{where}: {found}{_look_alikes(word, span)}")


def _look_alikes(a: str, b: str) -> str:
    """The first different characters of two texts by number, if they may look alike."""
    different = next(pair for pair in zip_longest(a, b, fillvalue="") if pair[0] != pair[1])
    if all(re.fullmatch("[ -~가-힣]?", c) for c in different):
        return ""
    names = [f"U+{ord(c):04X}" if c else "nothing" for c in different]
    return f" ({names[0]} differs from {names[1]})"


# --- formats ----------------------------------------------------------------------------------


def _records(path: Path, skipped: list[str] | None):
    """Yield (line, fields) for each record of a file; for JSON, line is the record's number."""
    if str(path).startswith("hub:"):
        yield from _hub_records(path)
        return
    if path.suffix not in (".json", ".jsonl"):
        yield from read_csv(path, COLUMNS, skipped)
        return
    text, is_list, records = read_text(path), path.suffix == ".json", []
    for number, piece in enumerate([text] if is_list else text.split("\n"), 1):
        if not piece.strip():
            continue
        try:
            content = parse_json(piece)
            records += enumerate(content, 1) if is_list else [(number, content)]
        except (ValueError, TypeError, RecursionError) as error:
            line = number - 1 + getattr(error, "lineno", 1)
            expected = f"expected {path.suffix[1:].upper()} rows"
            raise InputError(f"{path}:{line}: {expected}: {error}") from error
    for number, record in records:
        expect(isinstance(record, dict), f"{path}:{number}", "row", record, "an object")
        yield number, {"id": record.get("guid"), **record}


def _hub_records(path: Path):
    """Yield (number, fields) of HUB/SPLIT, read by the `datasets` library.

    Split test_data is the data set's "test", or "validation" if it has no test split, as KLUE.
    """
    spec, split = str(path.parent), path.name
    if not (found := HUB.fullmatch(spec)):
        expected = "hub:OWNER/NAME@REVISION[:CONFIG], for a validation file followed by /SPLIT"
        raise InputError(f"{spec}: expected {expected}")
    name, revision, config = found.groups()
    datasets = optional_import("datasets", "hub:")
    datasets.disable_progress_bars()
    optional_import("huggingface_hub", "hub:").utils.logging.set_verbosity_error()  # log no retry
    try:
        splits = datasets.load_dataset(name, config, revision=revision)
    except Exception as error:  # the hub, the network and the files raise many kinds
        message = f"cannot be read from the Hugging Face hub: {first_line(error)}"
        raise InputError(f"{spec}: {message}") from error
    if split == "test_data":
        split = "test" if "test" in splits else "validation"
    expect(split in splits, spec, "splits", sorted(splits), split)
    label = splits[split].features.get("label")
    for number, record in enumerate(splits[split], 1):
        if isinstance(label, datasets.ClassLabel):
            has_label = record["label"] not in (None, -1)
            record["label"] = label.int2str(record["label"]) if has_label else None
        yield number, {"id": record.get("guid"), **record}


# --- fields -----------------------------------------------------------------------------------


def _row(record: dict, where: str) -> Row:
    """The row of a record. The labels 100 (competition) and -1 (hub) mean no label."""
    row_id, sentence, label = (record.get(name) for name in ("id", "sentence", "label"))
    has_sentence = is_text(sentence) and not _is_missing(sentence)
    expect(has_sentence, where, "sentence", sentence, "text")
    entities = [_entity(record.get(f"{who}_entity"), f"{where}: {who}_entity")
                for who in ("subject", "object")]  # fmt: skip
    has_id = type(row_id) is int or (is_text(row_id) and row_id.strip())
    expect(has_id, where, "id", row_id, "a number or text")
    has_text = _is_missing(label) or type(label) in (int, float) or is_text(label)
    expect(has_text, where, "label", label, "a relation's name")
    label = None if _is_missing(label) else re.sub(r"^(-?\d+)\.0*$", r"\1", str(label).strip())
    label = None if label in ("100", "-1") else label
    source = record.get("source")
    source = "" if _is_missing(source) else str(source)
    return Row(str(row_id), sentence, *entities, label, source, where)


def _is_missing(value) -> bool:
    """Whether a value is null, blank or NaN, which pandas writes for a missing one."""
    return value is None or str(value).strip().lower() in ("", "nan")


# A fast path for the usual cell: ast.literal_eval takes ten times as long, 2 s for KLUE-RE.
ENTITY = re.compile(
    r"\{'word': '([^'\\\n\r\0]*)', 'start_idx': (0|[1-9]\d{0,8}), 'end_idx': (0|[1-9]\d{0,8}), "
    r"'type': '([A-Z]+)'\}",
    re.ASCII,
)


def _entity(found, where: str) -> Entity:
    """The entity of a cell: a dict, or the text of one in Python's syntax or JSON."""
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
    expect(is_text(word), where, "word", word, "text")
    expect(type(start) is int, where, "start_idx", start, "a whole number")
    expect(type(end) is int, where, "end_idx", end, "a whole number")
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


def version(data: str, rows: list[Row]) -> dict:
    """What identifies the state of a data set: its hub revision and a hash of its rows."""
    found = HUB.fullmatch(str(data_file(data, "train").parent)) if data.startswith("hub:") else None
    content = sha256(repr([row[:-1] for row in rows]).encode()).hexdigest()
    return {"revision": found and found[2], "content": content[:16]}
