"""From a file of KLUE-RE to the text that an encoder reads: reading and checking, cleaning, splitting, templates.

A row says which relation holds between a subject and an object in a sentence. Its way through this module:

    rows = read_rows("data/train.csv")                    # checked: a wrong row is named, never guessed
    rows, removed = clean(rows)                           # repeated and contradicting rows
    train, valid = split(rows, KLUE_LABELS, 0.1, seed=42, negative_share=0.6)
    Template("typed_entity_marker_punct", "s_and_o").render(train[0])

What is in a file, or in two side by side, as tables, figures and a page (report.py does the work):

    python data.py data/train.csv
    python data.py data/train.csv data/test_data.csv --model klue/roberta-large --max-length 128 --out runs/eda

    python data.py --diff old/train.csv new/train.csv     # rows added, removed, relabelled
    python data.py --download                             # KLUE-RE itself, into data/

Formats: the CSV of the Boostcamp competition, KLUE's JSON, JSON lines; UTF-8 with or without BOM.
"""

import argparse
import ast
import csv
import difflib
import functools
import io
import json
import os
import re
import sys
import unicodedata
import warnings
from collections import Counter
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

import numpy as np

# KLUE-RE's 30 relations in the order of the competition, whose submissions depend on it (KLUE's own order differs).
KLUE_LABELS = (
    "no_relation org:top_members/employees org:members org:product per:title org:alternate_names per:employee_of "
    "org:place_of_headquarters per:product org:number_of_employees/members per:children per:place_of_residence "
    "per:alternate_names per:other_family per:colleagues per:origin per:siblings per:spouse org:founded "
    "org:political/religious_affiliation org:member_of per:parents org:dissolved per:schools_attended "
    "per:date_of_death per:date_of_birth per:place_of_birth per:place_of_death org:founded_by per:religion"
).split()
TYPE_NAMES = {
    "en": {"PER": "person", "ORG": "organization", "LOC": "location", "DAT": "date", "POH": "other", "NOH": "number"},
    "ko": {"PER": "사람", "ORG": "조직", "LOC": "장소", "DAT": "시간", "POH": "기타", "NOH": "수량"},
}


class InputError(Exception):
    """Something the user gave is wrong. The text is one line that says where, what was found and what was expected."""


def first_line(error: Exception) -> str:
    """What another library's error says, short enough for a line of ours."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def printable(text: str) -> str:
    """The text in one line: spaces for line ends, escapes and all else that str.isprintable refuses."""
    return "".join(c if c.isprintable() else " " for c in text)


def exit_on_bad_input(main):
    """Makes bad input or a failing disk one line on stderr, of the first process on a machine, and exit code 2."""

    @functools.wraps(main)
    def program():
        try:
            main()
            sys.stdout.flush()
        except KeyboardInterrupt:
            sys.exit(130)
        except (InputError, OSError) as error:
            if isinstance(error, BrokenPipeError):  # nobody reads what is printed, the interpreter's last flush neither
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            if os.environ.get("LOCAL_RANK", "0") == "0":
                print(printable(f"{Path(sys.argv[0]).name}: {error}"), file=sys.stderr)
            sys.exit(2)

    return program


class Parser(argparse.ArgumentParser):
    """A command line whose errors are bad input like any other: one line, exit code 2."""

    def error(self, message: str):
        unknown = re.match(r"unrecognized arguments: (--[\w-]+)", message)
        near = difflib.get_close_matches(unknown[1], self._option_string_actions, n=1) if unknown else []
        hint = f"did you mean {near[0]}? " if near else ""
        raise InputError(f"{message}; {hint}{self.prog} -h lists all options")


@contextmanager
def atomic_write(path: str | Path, mode: str = "w", keep: Path | None = None):
    """Opens a file beside `path` that takes its place when the block ends well; what was at `path` stays till then,
    and goes to `keep` if given."""
    path = Path(path)
    beside = path.with_name(f".{path.name}.tmp")  # one name, so that what a kill leaves is written over
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(beside, mode, **({} if "b" in mode else {"encoding": "utf-8", "newline": ""})) as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            if keep and path.exists():
                os.replace(path, keep)
            os.replace(beside, path)
        finally:
            beside.unlink(missing_ok=True)
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror or error}") from error


# --- reading -----------------------------------------------------------------------------------------------------


class Entity(NamedTuple):
    """A stretch of a sentence: `sentence[start : end + 1] == word`. `type` is PER, ORG, ... or None."""

    word: str
    start: int
    end: int
    type: str | None


class Row(NamedTuple):
    """One sentence with its two entities. `label` is None where the file does not tell; `where` is FILE:LINE."""

    id: str
    sentence: str
    subject: Entity
    object: Entity
    label: str | None
    source: str
    where: str


HUB = re.compile(r"hub:([^@]+)@([^:@]+)(?::([^:@/]+))?")  # name or folder, revision, configuration


def data_file(data: str | Path, stem: str) -> Path:
    """The file called `stem` in a data folder, in whichever format it is there, or `data` itself if it is a file. Of a
    data set on the hub, HUB, its split as HUB/stem."""
    if str(data).startswith("hub:"):
        return Path(str(data), stem)
    candidates = [Path(data), *(Path(data) / f"{stem}{suffix}" for suffix in (".csv", ".json", ".jsonl"))]
    for path in candidates:
        if path.is_file():
            return path
    raise InputError(f"{data}: no {stem}.csv, {stem}.json or {stem}.jsonl there; --data names another place")


def read_rows(path: str | Path, skipped: list[str] | None = None) -> list[Row]:
    """All rows of a file in its order. Every row is checked; the first wrong one raises InputError.

    With a list as `skipped`, wrong rows are left out instead and their messages appended to it.
    """
    rows, first = [], {}
    for line, record in _records(Path(path)):
        try:
            row = _check(record, f"{path}:{line}")
            expect(row.id not in first, row.where, "id", row.id, f"another: line {first.get(row.id)} has it already")
            first[row.id] = line
            rows.append(row)
        except InputError as error:
            if skipped is None:
                raise
            skipped.append(str(error))
    if not rows:
        raise InputError(f"{path}: no rows")
    return rows


def rows_to_predict(data: str | Path, skipped: list[str] | None = None) -> list[Row]:
    """The rows of test_data beside the training file of `data`; none where there is no such file. A data set on the
    hub has to have them."""
    training = data_file(data, "train")
    try:
        path = data_file(training.parent, "test_data")
    except InputError:
        return []
    return read_rows(path, skipped)


def read_text(path: str | Path) -> str:
    """A UTF-8 file as text, without its byte order mark."""
    try:
        content = Path(path).read_bytes()
        return content.decode("utf-8-sig")
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise InputError(f"{path}:{line}: found byte {content[error.start]:#04x}, expected UTF-8 text") from error


def read_json(path: str | Path, expected: str):
    """What a JSON file holds; `expected` tells in words what that should be."""
    try:
        return json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: expected {expected}: {first_line(error)}") from error


def read_csv(path: str | Path, columns: tuple[str, ...]):
    """Yields (line, {column: cell}) for each record of a CSV file that has at least these columns."""
    csv.field_size_limit(2**31 - 1)  # what a C long holds on every system
    reader = csv.reader(io.StringIO(read_text(path), newline=""), strict=True)
    line, header = 1, None
    try:
        for cells in reader:
            if header is None:
                header = cells
                missing = [column for column in columns if column not in header]
                expect(not missing, f"{path}:1", "header", ",".join(header), f"a column {', '.join(missing)}")
            elif cells:
                expect(len(cells) == len(header), f"{path}:{line}", "row", cells, f"{len(header)} cells as the header")
                yield line, dict(zip(header, cells, strict=True))
            line = reader.line_num + 1  # where the next record starts: a quoted cell may span lines
    except csv.Error as error:
        raise InputError(f"{path}:{line}: broken CSV: {error}") from error


def _records(path: Path):
    """Yields (line, fields) of a CSV, JSON or JSON lines file; for JSON the line is the element's number."""
    if str(path).startswith("hub:"):
        yield from _hub_records(path)
        return
    if path.suffix not in (".json", ".jsonl"):
        yield from read_csv(path, ("id", "sentence", "subject_entity", "object_entity"))
        return
    text, is_list, records = read_text(path), path.suffix == ".json", []
    for number, piece in enumerate([text] if is_list else text.split("\n"), 1):
        try:
            content = json.loads(piece) if piece.strip() else []
            records += enumerate(content, 1) if is_list else [(number, content)] if piece.strip() else []
        except (ValueError, TypeError, RecursionError) as error:
            line = number - 1 + getattr(error, "lineno", 1)
            raise InputError(f"{path}:{line}: expected {path.suffix[1:].upper()} rows: {error}") from error
    for number, record in records:
        expect(isinstance(record, dict), f"{path}:{number}", "row", record, "an object")
        yield number, {"id": record.get("guid"), **record}


def _hub_records(path: Path):
    """Yields (number, fields) of a split of a data set on the Hugging Face hub, or in a folder laid out like one, as
    the `datasets` library reads it. `path`: hub:OWNER/NAME@REVISION[:CONFIG]/SPLIT; test_data is the split test, or
    where there is none, as in KLUE, validation."""
    spec, split = str(path.parent), path.name
    if not (found := HUB.fullmatch(spec)):
        raise InputError(f"{spec}: expected hub:OWNER/NAME@REVISION[:CONFIG], of a file to validate on /SPLIT as well")
    name, revision, config = found.groups()
    try:
        import datasets
        import huggingface_hub
    except ImportError as error:
        raise InputError("--data hub:... needs the package datasets: pip install datasets") from error
    datasets.disable_progress_bars()
    huggingface_hub.utils.logging.set_verbosity_error()  # else it tells of each of its tries
    try:
        splits = datasets.load_dataset(name, config, revision=revision)
    except Exception as error:  # of many kinds: the hub's, the network's, the files'
        raise InputError(f"{spec}: cannot be read from the Hugging Face hub: {first_line(error)}") from error
    if split == "test_data":
        split = "test" if "test" in splits else "validation"
    expect(split in splits, spec, "splits", sorted(splits), split)
    label = splits[split].features.get("label")
    for number, record in enumerate(splits[split], 1):
        if isinstance(label, datasets.ClassLabel):
            told = record["label"] not in (None, -1)
            record["label"] = label.int2str(record["label"]) if told else None
        yield number, {"id": record.get("guid"), **record}


def version(data: str, rows: list[Row]) -> dict:
    """What tells `data`, as --data names it, from an earlier or later state: the hub's revision, a hash of the rows."""
    found = HUB.fullmatch(data)
    content = sha256(repr([row[:-1] for row in rows]).encode()).hexdigest()
    return {"revision": found and found[2], "content": content[:16]}


def _check(record: dict, where: str) -> Row:
    id, sentence, label = (record.get(field) for field in ("id", "sentence", "label"))
    expect(is_text(sentence), where, "sentence", sentence, "text")
    subject, object = (_entity(record.get(f), f, sentence, where) for f in ("subject_entity", "object_entity"))
    same = (subject.start, subject.end) == (object.start, object.end)
    expect(not same, where, "object_entity", object.word, "another span than the subject's")
    expect(isinstance(id, int) or (is_text(id) and id.strip()), where, "id", id, "a name for the row")
    expect(label is None or isinstance(label, int) or is_text(label), where, "label", label, "a relation's name")
    label = None if label is None or str(label).strip() in ("", "100") else str(label)  # 100: not told, in test files
    return Row(str(id), sentence, subject, object, label, str(record.get("source") or ""), where)


# an entity as the competition's file spells nearly all; ast.literal_eval reads the rest, at ten times the cost
USUAL_ENTITY = re.compile(
    r"\{'word': '([^'\\\n\r\0]*)', 'start_idx': (0|[1-9][0-9]{0,8}), 'end_idx': (0|[1-9][0-9]{0,8}), "
    r"'type': '([A-Z]+)'\}"
)


def _entity(found, field: str, sentence: str, where: str) -> Entity:
    if isinstance(found, str) and (usual := USUAL_ENTITY.fullmatch(found)):
        word, start, end, kind = usual.groups()
        found = {"word": word, "start_idx": int(start), "end_idx": int(end), "type": kind}
    elif isinstance(found, str):
        try:
            found = ast.literal_eval(found)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError) as error:
            raise InputError(f"{where}: {field}: found {_short(found)}, expected a dict literal") from error
    expect(isinstance(found, dict), where, field, found, "a dict of word, start_idx, end_idx, type")
    word, start, end, kind = (found.get(key) for key in ("word", "start_idx", "end_idx", "type"))
    expect(is_text(word), where, f"{field}: word", word, "text")
    expect(type(start) is int, where, f"{field}: start_idx", start, "a whole number")
    expect(type(end) is int, where, f"{field}: end_idx", end, "a whole number")
    expect(kind is None or is_text(kind), where, f"{field}: type", kind, "text such as PER")
    inside = 0 <= start <= end < len(sentence)
    bounds = f"0 <= start_idx <= end_idx < {len(sentence)} (the sentence's length)"
    expect(inside, where, f"{field}: start_idx, end_idx", (start, end), bounds)
    piece = sentence[start : end + 1]
    if piece != word:
        raise InputError(f"{where}: {field}: word {_short(word)} but sentence[{start}:{end + 1}] is {_short(piece)}")
    return Entity(word, start, end, kind or None)


def is_text(value) -> bool:
    """Whether a value is a text that can be written as UTF-8."""
    return isinstance(value, str) and not re.search("[\ud800-\udfff]", value)  # JSON can spell half a character


def expect(holds, where: str, field: str, found, expected: str):
    """Raises InputError with a message of the usual form unless something holds; `where` is FILE or FILE:LINE."""
    if not holds:
        raise InputError(f"{where}: {field}: found {_short(found)}, expected {expected}")


def _short(value) -> str:
    try:
        text = repr(value)  # escapes line ends and half characters: a message stays one printable line
    except (ValueError, RecursionError):  # a number of thousands of digits
        text = f"a {type(value).__name__}"
    return text if len(text) <= 60 else f"{text[:57]}..."


def find_labels(rows: list[Row], negative: str = "no_relation") -> list[str]:
    """KLUE-RE's labels, or a data set's own where most of its relations are not KLUE's, the negative label first."""
    found = {row.label for row in rows if row.label is not None} - {negative}
    if negative == KLUE_LABELS[0] and 2 * len(found & set(KLUE_LABELS)) >= len(found):
        return list(KLUE_LABELS)
    if all(row.label != negative for row in rows):
        expected = f"the label that means none of the others, one of {', '.join(sorted(found)[:40])}"
        raise InputError(f"--negative-label {negative}: no row has it, expected {expected}")
    if not found:
        raise InputError(f"--negative-label {negative}: all rows have it, expected some with a relation")
    return [negative, *sorted(found)]


def with_known_labels(rows: list[Row], labels: list[str], skipped: list[str] | None = None) -> list[Row]:
    """The rows, once it is sure that each has one of `labels`; wrong ones as in `read_rows`."""
    bad = [row for row in rows if row.label not in labels]
    expected = f"one of {len(labels)} labels such as {', '.join(labels[:2])}"
    found = ["none (no such column, or 100)" if row.label is None else _short(row.label) for row in bad]
    wrong = [f"{row.where}: label: found {label}, expected {expected}" for row, label in zip(bad, found)]
    if wrong and skipped is None:
        raise InputError(wrong[0])
    if wrong:
        skipped += wrong
    return [row for row in rows if row.label in labels]


# --- versions ----------------------------------------------------------------------------------------------------

KLUE_RE = "hub:klue/klue@main:re"


def diff(old: list[Row], new: list[Row]) -> tuple[list[Row], list[Row], list[tuple[Row, Row]]]:
    """(added, removed, relabelled) rows: what is in `new` alone, in `old` alone, and (old, new) pairs that differ in
    the label alone. Rows are the same by sentence and entities, whatever their ids."""
    added, removed = new, old
    for what in ("sentence + both + label", "sentence + both"):  # first those that have stayed as they are
        rest = {}
        for row in removed:
            rest.setdefault(SAME[what](row), []).append(row)
        pairs, alone = [], []
        for row in added:
            if alike := rest.get(SAME[what](row)):
                pairs.append((alike.pop(0), row))
            else:
                alone.append(row)
        added, removed = alone, [row for rows in rest.values() for row in rows]
    return added, removed, pairs


def print_diff(old: str, new: str):
    """python data.py --diff: what changed from one version to the other, a line a row."""
    added, removed, relabelled = diff(*(read_rows(data_file(version, "train")) for version in (old, new)))
    for sign, rows in (("+", added), ("-", removed)):
        for row in rows:
            print(printable(f"{sign} {row.where}  id {row.id}  {row.label}  {row.subject.word} / {row.object.word}"))
    for before, row in relabelled:
        words = f"{row.subject.word} / {row.object.word}"
        print(printable(f"~ {before.where} -> {row.where}  id {row.id}  {before.label} -> {row.label}  {words}"))
    print(f"{len(added)} rows added (+), {len(removed)} removed (-), {len(relabelled)} relabelled (~)")


def download(folder: Path, hub: str):
    """python data.py --download: KLUE-RE as train.csv, dev.csv and, without labels, test_data.csv in the competition's
    format; nothing that is there is written over."""
    for name in ("train.csv", "dev.csv", "test_data.csv"):
        if (folder / name).exists():
            raise InputError(f"{folder / name}: is there already; move it away, or name another folder with --out")
    train, dev = (read_rows(data_file(hub, split)) for split in ("train", "validation"))
    parts = {"train.csv": train, "dev.csv": dev, "test_data.csv": [row._replace(label=None) for row in dev]}
    for name, rows in parts.items():
        with atomic_write(folder / name) as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(["id", "sentence", "subject_entity", "object_entity", "label", "source"])
            for row in rows:
                entities = (dict(zip(("word", "start_idx", "end_idx", "type"), e)) for e in (row.subject, row.object))
                writer.writerow([row.id, row.sentence, *entities, row.label or 100, row.source])
        print(f"{folder / name}: {len(rows)} rows of {hub}, content {version(hub, rows)['content']}")


# --- cleaning and splitting --------------------------------------------------------------------------------------


def clean(rows: list[Row], negative: str = "no_relation") -> tuple[list[Row], list[Row]]:
    """Rows without repeats, and those removed. Of equal rows the first stays; of rows alike but for the label the
    one with a relation, between two relations the later (what the wrap-up report's authors decided by hand)."""
    distinct, kept = {}, {}
    for row in rows:
        distinct.setdefault((row.sentence, row.subject, row.object, row.label), row)
    for (*key, label), row in distinct.items():
        if label != negative or tuple(key) not in kept:
            kept[tuple(key)] = row
    ids = {row.id for row in kept.values()}
    return [row for row in rows if row.id in ids], [row for row in rows if row.id not in ids]


def split(rows: list[Row], labels: list[str], share: float, seed: int, negative_share=None, like=()):
    """(train, valid) where valid has about `share` of the rows, whole sentences, its labels mixed as in `rows`.

    Given `negative_share` it is like KLUE-RE's test set, which is harder than the training rows: as far as the rows
    allow it has that share of the negative label, the first (60 % there, 29 % in train), and types of entities and
    sources are mixed as in the rows `like`; and no subject and object stand together on both sides (3 % of the test
    rows have such a pair of train's, but 61 % of train's rows one of another row).
    """
    negative = np.array([row.label == labels[0] for row in rows])
    strata, wanted = [_stratum(row) for row in rows], Counter(map(_stratum, like))
    if negative_share is None or wanted.keys().isdisjoint(strata):
        strata, wanted = [None] * len(rows), Counter([None])
    weights, parent = np.full(len(rows), 1 / max(len(rows), 1)), {}
    if negative_share is not None:
        if share * negative_share * len(rows) > negative.sum() / 2:
            text = f"takes over half of the {negative.sum()} {labels[0]} rows"
            raise InputError(f"--no-relation-share {negative_share} {text}; use --split stratified")
        weights = _raked(strata, wanted, negative, negative_share)
        for row in rows:
            parent[_root(parent, row.sentence)] = _root(parent, (row.subject.word, row.object.word))
    expected = (share * len(rows) * weights).clip(max=0.5)  # of no kind of row more than half
    counted = [(row.label, (row.label == labels[0], stratum)) for row, stratum in zip(rows, strata)]
    room, groups = Counter(), {}
    for i, keys in enumerate(counted):
        groups.setdefault(_root(parent, rows[i].sentence), []).append(i)
        for key in keys:
            room[key] += expected[i]
    room = {key: round(n) for key, n in room.items()}
    groups, valid = list(groups.values()), set()
    order = np.random.default_rng(seed).permutation(len(groups))
    if negative_share is not None:  # rows that stand alone first, as those of the test set do
        order = sorted(order, key=lambda i: len(groups[i]))
    for i in order:
        need = Counter(key for row in groups[i] for key in counted[row])
        if all(room[key] >= n for key, n in need.items()):
            valid.update(groups[i])
            for key, n in need.items():
                room[key] -= n
    if not valid or len(valid) == len(rows):
        raise InputError(f"{len(rows)} rows are too few to split; name a validation file with --valid")
    return [row for i, row in enumerate(rows) if i not in valid], [rows[i] for i in sorted(valid)]


def _root(parent: dict, node):
    """The root of the union-find tree that holds `node`."""
    while parent.get(node, node) != node:
        node = parent[node]
    return node


def _stratum(row: Row) -> tuple:
    return row.subject.type, row.object.type, row.source


def _raked(strata: list, wanted: Counter, negative: np.ndarray, negative_share: float) -> np.ndarray:
    """Weights (rows,) of sum 1, as near to equal ones as can be, under which the negative rows have their share, and
    the strata are as frequent as in `wanted` (iterative proportional fitting)."""
    number = {stratum: i for i, stratum in enumerate(wanted)}
    sides = [
        (np.array([number.get(stratum, len(number)) for stratum in strata]), np.array([*wanted.values(), 0.0])),
        (negative.astype(int), np.array([1 - negative_share, negative_share])),
    ]
    weights = np.ones(len(strata))
    for _ in range(100):
        for which, target in sides:
            found = np.bincount(which, weights, len(target))
            weights *= np.divide(target, found, out=np.zeros_like(target), where=found > 0)[which]
    return weights / weights.sum()


def fold(rows: list[Row], folds: int, number: int, seed: int):
    """(train, valid) where valid is fold `number`, from 0, of `folds` that share the rows out: labels are mixed in each
    as in `rows`, and all rows of one sentence are in one fold."""
    from sklearn.model_selection import StratifiedGroupKFold  # a second to import, for this alone

    splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
    labels, sentences = [row.label for row in rows], [row.sentence for row in rows]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it warns of labels with fewer rows than folds, as KLUE-RE has
            train, valid = list(splitter.split(labels, labels, sentences))[number]
    except ValueError as error:
        raise InputError(f"--folds {folds}: {len(rows)} rows of {len(set(sentences))} sentences are too few") from error
    return [rows[i] for i in train], [rows[i] for i in valid]


# --- what is in a file -------------------------------------------------------------------------------------------
# A table is a list of lines, each a dict from the heading of a column to a value. `files`: {name: its rows}.

# what rows may have in common; entities are compared by word, offsets and type
SAME = {
    "sentence": lambda row: row.sentence,
    "sentence + object": lambda row: (row.sentence, row.object),
    "sentence + subject": lambda row: (row.sentence, row.subject),
    "sentence + both": lambda row: (row.sentence, row.subject, row.object),
    "sentence + both + label": lambda row: (row.sentence, row.subject, row.object, row.label),
}


def type_pair(row: Row) -> str:
    """The types of subject and object."""
    return f"{row.subject.type or '(none)'}-{row.object.type or '(none)'}"


def count_table(files: dict[str, list[Row]], heading: str, value) -> list[dict]:
    """How many rows have which `value(row)`, and their share of the file in per cent, the most frequent first."""
    counts = {name: Counter(value(row) or "(none)" for row in rows) for name, rows in files.items()}
    values = sorted(set().union(*counts.values()), key=lambda v: ([-c[v] for c in counts.values()], v))
    table = []
    for v in values:
        line = {heading: v}
        for name, count in counts.items():
            line |= {name: count[v], f"{name} %": 100 * count[v] / len(files[name])}
        table.append(line)
    return table


def cross_table(rows: list[Row]) -> list[dict]:
    """How many rows of each label have which types of subject and object, the most frequent first."""
    labels, pairs = Counter(row.label or "(none)" for row in rows), Counter(map(type_pair, rows))
    count = Counter((row.label or "(none)", type_pair(row)) for row in rows)
    return [
        {"label": label, **{pair: count[label, pair] for pair, _ in pairs.most_common()}}
        for label, _ in labels.most_common()
    ]


def repeat_table(files: dict[str, list[Row]]) -> list[dict]:
    """How many rows repeat an earlier row's sentence, sentence and object, ... (of n alike, n - 1 are counted)."""
    return [
        {"the same": what, **{name: len(rows) - len(set(map(key, rows))) for name, rows in files.items()}}
        for what, key in SAME.items()
    ]


def shared_table(files: dict[str, list[Row]]) -> list[dict]:
    """How many different sentences, sentences with object, ... are in both of two files, and in how many rows."""
    table = []
    for what, key in SAME.items():
        if "label" not in what:
            shared = set.intersection(*({key(row) for row in rows} for rows in files.values()))
            rows_with = {f"rows of {name}": sum(key(r) in shared for r in rows) for name, rows in files.items()}
            table.append({"in both files": what, "different": len(shared), **rows_with})
    return table


def length_table(lengths: dict[str, np.ndarray], limit: int) -> list[dict]:
    """Mean, quantiles and maximum of each file's lengths, and how many are over `limit`."""
    measures = {"mean": np.mean} | {f"{q} %": functools.partial(np.percentile, q=q) for q in (50, 90, 95, 99)}
    measures |= {"max": np.max, f"over {limit}": lambda n: int((n > limit).sum())}
    return [{"tokens": what, **{name: f(n) for name, n in lengths.items()}} for what, f in measures.items()]


# --- templates ---------------------------------------------------------------------------------------------------


def particle(word: str, pair: str) -> str:
    """The particle of `pair` ("과/와", "은/는", "으로/로"; consonant form first) that is right behind `word`.

    Digits and Latin letters go by their Korean reading; a closing bracket by the word before the bracket.
    """
    after_consonant, after_vowel = pair.split("/")
    text = unicodedata.normalize("NFC", word)
    text = re.sub(r"(?<=\w)\s*[(（\[][^()（）\[\]]*[)）\]]\W*$", "", text)
    text = re.sub(r"[^\w%]+$", "", text)
    last = text[-1:]
    if "가" <= last <= "힣":
        final = (ord(last) - ord("가")) % 28
        closed, rieul = final > 0, final == 8
    elif last.isdigit():
        closed, rieul = last in "013678", last in "178"  # 영 일 삼 육 칠 팔 end in a consonant
    elif re.search(r"(?:^|[^a-z])[A-Z]+$", text):
        closed, rieul = last in "LMNR", last in "LR"  # spelt out: 엘 엠 엔 알
    else:
        closed = bool(re.search(r"(?:[lmn]e?|ng|[aeiou](?:c?k|p|t))$", text, re.IGNORECASE))
        rieul = bool(re.search(r"le?$", text, re.IGNORECASE))
    return after_vowel if not closed or (rieul and after_consonant == "으로") else after_consonant


class Rendered(NamedTuple):
    """A row as text. `spans` holds, for subject and object, where in `text` the opening marker starts, the word
    starts, the word ends and the closing marker ends (offsets in characters, ends exclusive)."""

    before: str
    text: str
    after: str
    spans: tuple[tuple[int, int, int, int], tuple[int, int, int, int]]


class Template(NamedTuple):
    """How a row becomes text: a marker (a key of MARKERS), a prompt (a key of PROMPTS), names of types ("en", "ko")."""

    marker: str = "typed_entity_marker_punct"
    prompt: str = "s_and_o"
    type_names: str = "en"

    def render(self, row: Row, separator: str = "[SEP]") -> Rendered:
        """The text of a row; `separator` is the tokenizer's own. Each entity is marked at its own offsets, whether
        they overlap, nest or share a word. Raises InputError where a typed marker meets an entity without type."""
        entities = (row.subject, row.object)
        edits = []
        for who, entity in enumerate(entities):
            opening, closing = self._markers(who, entity, row.where)
            # at one offset: closings first and the inner one before the outer, openings the outer before the inner
            edits.append((entity.start, 1, -entity.end, who, opening))
            edits.append((entity.end + 1, 0, -entity.start, who, closing))
        text, at, inside, spans = "", 0, 0, [[], []]
        for offset, is_opening, _, who, mark in sorted(edits):
            if not (inside and self.marker == "entity_mask"):
                text += row.sentence[at:offset]
            at = offset
            spans[who].append(len(text))
            text += mark
            spans[who].append(len(text))
            inside += 1 if is_opening else -1
        text += row.sentence[at:]
        s, o = row.subject.word, row.object.word
        before, after = PROMPTS[self.prompt]
        words = {"s": s, "o": o, "sep": separator, "s과": s + particle(s, "과/와"), "o은": o + particle(o, "은/는")}
        return Rendered(before.format(**words), text, after.format(**words), tuple(map(tuple, spans)))

    def added_tokens(self, types: set[str]) -> list[str]:
        """The markers that a tokenizer has to learn as tokens of their own, for these entity types."""
        if self.marker not in ("entity_mask", "entity_marker", "typed_entity_marker"):
            return []
        tokens = set()
        for type in sorted(types | set(TYPE_NAMES["en"])):
            for who in (0, 1):
                tokens |= {mark.strip() for mark in self._markers(who, Entity("", 0, 0, type), "") if mark.strip()}
        return sorted(tokens)

    def _markers(self, who: int, entity: Entity, where: str) -> tuple[str, str]:
        opening, closing = MARKERS[self.marker][who]
        if "{" in opening and entity.type is None:
            field = ("subject_entity", "object_entity")[who]
            needs = f"has no type, which --marker {self.marker} needs"
            raise InputError(f"{where}: {field}: {needs}; give it one, or train with entity_marker")
        name = TYPE_NAMES[self.type_names].get(entity.type, (entity.type or "").lower())
        return opening.format(type=name, TYPE=entity.type), closing.format(type=name)


# (opening, closing) for the subject, then for the object; the words of `none` and `entity_mask` have no closing mark.
# Markers that are tokens of their own are named in Template.added_tokens too
MARKERS = {
    "none": (("", ""), ("", "")),
    "entity_mask": (("[SUBJ-{TYPE}]", ""), ("[OBJ-{TYPE}]", "")),
    "entity_marker": (("[E1] ", " [/E1]"), ("[E2] ", " [/E2]")),
    "entity_marker_punct": (("@ ", " @ "), ("# ", " # ")),
    "typed_entity_marker": (("<s:{type}> ", " </s:{type}> "), ("<o:{type}> ", " </o:{type}> ")),
    "typed_entity_marker_punct": (("@ * {type} * ", " @ "), ("# ^ {type} ^ ", " # ")),
}
# (before, after) the sentence; the first is the first segment of the input, the second ends the second segment.
# {s}, {o}: the words of subject and object; {s과}, {o은}: with the particle; {sep}: the tokenizer's separator
PROMPTS = {
    "none": ("", ""),
    "s_sep_o": ("{s}{sep}{o}", ""),
    "s_and_o": ("{s과} {o}의 관계", ""),
    "quiz": ("다음 문장에서 {s과} {o}의 관계를 추출하시오.", ""),
    "problem": ("다음 문장에서 {s과} {o}의 관계를 추출하시오.", " {s과} {o은} 어떤 관계입니까?"),
}


if __name__ == "__main__":
    # `__main__` is a second copy of this module, whose InputError is not the one that all the others raise and catch
    from report import data_report

    data_report()
