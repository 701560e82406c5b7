"""Labels of KLUE-RE, and the text that an encoder reads: entity markers and prompts.

labels = find_labels(rows)                         # KLUE-RE's 30, or a data set's own
Template("typed_entity_marker_punct", "s_and_o").render(rows[0])

python data.py --download                          # KLUE-RE from the Hugging Face hub to data/
python data.py --diff old/train.csv new/train.csv  # rows added, removed and relabelled
"""

import re
import unicodedata
from collections import Counter
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

from common import (
    InputError,
    Parser,
    atomic_write,
    csv_writer,
    exit_on_error,
    is_text,
    printable,
    read_json,
    shorten,
)
from formats import HUB, HUB_SPLIT
from rows import COLUMNS, ENTITY_FIELDS, Entity, Row, compose, data_file, read_rows

# In the order of the competition's dict_label_to_num.pkl, which the columns of `probs` follow.
KLUE_LABELS = (
    "no_relation org:top_members/employees org:members org:product per:title org:alternate_names "
    "per:employee_of org:place_of_headquarters per:product org:number_of_employees/members "
    "per:children per:place_of_residence per:alternate_names per:other_family per:colleagues "
    "per:origin per:siblings per:spouse org:founded org:political/religious_affiliation "
    "org:member_of per:parents org:dissolved per:schools_attended per:date_of_death "
    "per:date_of_birth per:place_of_birth per:place_of_death org:founded_by per:religion"
).split()
# What class numbers mean as labels. klue: the order of KLUE's relation_list.json, which the
# ClassLabel of klue/re on the Hugging Face hub follows.
LABEL_ORDERS = {
    "competition": KLUE_LABELS,
    "klue": (
        "no_relation org:dissolved org:founded org:place_of_headquarters org:alternate_names "
        "org:member_of org:members org:political/religious_affiliation org:product org:founded_by "
        "org:top_members/employees org:number_of_employees/members per:date_of_birth "
        "per:date_of_death per:place_of_birth per:place_of_death per:place_of_residence per:origin "
        "per:employee_of per:schools_attended per:alternate_names per:parents per:children "
        "per:siblings per:spouse per:other_family per:colleagues per:product per:religion per:title"
    ).split(),
}
TYPES = ("PER", "ORG", "LOC", "DAT", "POH", "NOH")
TYPE_NAMES = {
    "en": dict(zip(TYPES, ("person", "organization", "location", "date", "other", "number"))),
    "ko": dict(zip(TYPES, ("사람", "조직", "장소", "시간", "기타", "수량"))),
}
KLUE_RE = "hub:klue/klue@main:re"


def find_labels(rows: list[Row], negative: str = "no_relation") -> list[str]:
    """KLUE-RE's labels if at least half of the relations found are KLUE-RE's; otherwise the
    data set's own: the negative label, then the others in alphabetical order."""
    found = {row.label for row in rows if row.label is not None} - {negative}
    if negative == KLUE_LABELS[0] and 2 * len(found & set(KLUE_LABELS)) >= len(found):
        return list(KLUE_LABELS)
    if all(row.label != negative for row in rows):
        expected = f"the label that means no relation, one of {', '.join(sorted(found)[:40])}"
        raise InputError(f"--negative-label {negative}: no row has it, expected {expected}")
    if not found:
        raise InputError(
            f"--negative-label {negative}: all rows have it, expected other labels too"
        )
    return [negative, *sorted(found)]


def with_known_labels(rows: list[Row], labels: list[str], skipped: list[str] | None = None):
    """The rows whose label is one of `labels`; others raise or are skipped as in `read_rows`."""
    bad = [row for row in rows if row.label not in labels]
    expected = f"one of {len(labels)} labels such as {', '.join(labels[:2])}"
    for row in bad:
        label = "none (no such column, or 100)" if row.label is None else shorten(row.label)
        message = f"{row.where}: label: found {label}, expected {expected}"
        if skipped is None:
            raise InputError(message)
        skipped.append(message)
    return [row for row in rows if row.label in labels] if bad else rows


def label_order(order: str) -> list[str]:
    """The label of each class number: a key of LABEL_ORDERS, or a JSON file's."""
    if order in LABEL_ORDERS:
        return LABEL_ORDERS[order]
    expected = "a JSON list of labels, or an object {label: number} with the numbers from 0"
    found = read_json(order, expected)
    if isinstance(found, dict):
        name_of = {number: name for name, number in found.items() if type(number) is int}
        found = [name_of.get(number) for number in range(len(found))]
    found = found if isinstance(found, list) else []
    names = [compose(name.strip()) for name in found if is_text(name)]
    if len(set(names) - {""}) < max(len(found), 2):
        raise InputError(f"{order}: expected {expected}")
    return names


def with_label_names(rows: list[Row], order: str = "", skipped: list[str] | None = None):
    """The rows, with the names of labels that are class numbers, as `order` says (--label-order).

    Rows of names are returned as they are. In a file of numbers, other labels raise InputError or
    are skipped as in `read_rows`. Raises InputError if the order does not fit the entity types.
    """
    numbers = [row for row in rows if row.label and re.fullmatch(r"-?\d{1,18}", row.label)]
    if not numbers:
        return rows
    if not order:
        found, expected = f"found {numbers[0].label}, a class number", "expected a name"
        option = "--label-order competition, klue or FILE.json tells what the numbers mean"
        raise InputError(f"{numbers[0].where}: label: {found}, {expected}; {option}")
    names, named = label_order(order), []
    class_of = {str(number): number for number in range(len(names))}
    for row in rows:
        if row.label is not None and row.label not in class_of:
            expected = f"a class number from 0 to {len(names) - 1} (--label-order {order})"
            message = f"{row.where}: label: found {shorten(row.label)}, expected {expected}"
            if skipped is None:
                raise InputError(message)
            skipped.append(message)
        else:
            named.append(row._replace(label=row.label and names[class_of[row.label]]))
    kinds = [((row.label or "")[:4].upper(), f"{row.subject.type}:") for row in named]
    fits = [a == b for a, b in kinds if {a, b} <= {"PER:", "ORG:"}]
    n_wrong, n = fits.count(False), len(fits)
    if n_wrong > 2 + 0.2 * n:  # in KLUE-RE 0.02 %, with numbers of the other order 40 % or more
        found = f"{n_wrong} of {n} relations (per:, org:) have a subject of the other type"
        raise InputError(f"{rows[0].where}: label: {found}; --label-order {order} is wrong")
    return named


def note_unknown_types(rows: list[Row], labels: list[str], log):
    """Say which entity types are not KLUE-RE's, such as per for PER, if the labels are."""
    types = Counter(entity.type for row in rows for entity in row[2:4] if entity.type)
    unknown = {type_: n for type_, n in types.items() if type_ not in TYPES}
    if unknown and set(labels) == set(KLUE_LABELS):
        found = f"{sum(unknown.values())} of {sum(types.values())} entities have other types"
        names = ", ".join(map(shorten, list(unknown)[:5]))
        path = rows[0].where.rpartition(":")[0]
        log(f"{path}: {found} than {', '.join(TYPES)}, such as {names}")


# --- templates --------------------------------------------------------------------------------

# (opening, closing) of the subject, then of the object. "none" and "entity_mask" have no closing
# marker. Template.added_tokens lists the markers that become tokens of their own.
MARKERS = {
    "none": (("", ""), ("", "")),
    "entity_mask": (("[SUBJ-{TYPE}]", ""), ("[OBJ-{TYPE}]", "")),
    "entity_marker": (("[E1] ", " [/E1]"), ("[E2] ", " [/E2]")),
    "entity_marker_punct": (("@ ", " @ "), ("# ", " # ")),
    "typed_entity_marker": (("<s:{type}> ", " </s:{type}> "), ("<o:{type}> ", " </o:{type}> ")),
    "typed_entity_marker_punct": (("@ * {type} * ", " @ "), ("# ^ {type} ^ ", " # ")),
}
TOKEN_MARKERS = ("entity_mask", "entity_marker", "typed_entity_marker")
# (text before the sentence, text after it). Text before it is the first segment, the sentence then
# the second. {s}, {o}: words of subject and object; {s과}, {o은}: with a particle; {sep}: the
# tokenizer's separator. There are no other combinations.
QUIZ = "다음 문장에서 {s과} {o}의 관계를 추출하시오."
PROMPTS = {
    "none": ("", ""),
    "s_sep_o": ("{s}{sep}{o}", ""),
    "s_and_o": ("{s과} {o}의 관계", ""),
    "quiz": (QUIZ, ""),
    "problem": (QUIZ, " {s과} {o은} 어떤 관계입니까?"),
}


class Rendered(NamedTuple):
    """A row as text.

    `spans` has for subject and object four offsets in `text`: start of the opening marker, start
    of the word, end of the word, end of the closing marker (ends exclusive).
    """

    before: str
    text: str
    after: str
    spans: tuple[tuple[int, int, int, int], tuple[int, int, int, int]]


class Template(NamedTuple):
    """Turns a row into text: a key of MARKERS, of PROMPTS and of TYPE_NAMES."""

    marker: str = "typed_entity_marker_punct"
    prompt: str = "s_and_o"
    type_names: str = "en"

    def render(self, row: Row, separator: str = "[SEP]") -> Rendered:
        """The text of a row; `separator` is the tokenizer's separator token.

        Entities are marked at their offsets, also if they overlap or one contains the other.
        Raises InputError if a typed marker meets an entity without a type.
        """
        edits = []
        for who, entity in enumerate((row.subject, row.object)):
            opening, closing = self._markers(who, entity, row.where)
            # At one offset: closing markers first, the inner entity's before the outer one's;
            # then opening markers, the outer entity's before the inner one's.
            edits.append((entity.start, 1, -entity.end, who, opening))
            edits.append((entity.end + 1, 0, -entity.start, who, closing))
        text, at, depth, spans = "", 0, 0, [[], []]
        for offset, is_opening, _, who, marker in sorted(edits):
            if not (depth and self.marker == "entity_mask"):
                text += row.sentence[at:offset]
            at = offset
            spans[who].append(len(text))
            text += marker
            spans[who].append(len(text))
            depth += 1 if is_opening else -1
        text += row.sentence[at:]
        s, o = row.subject.word, row.object.word
        before, after = PROMPTS[self.prompt]
        words = {"s": s, "o": o, "sep": separator}
        words |= {"s과": s + particle(s, "과/와"), "o은": o + particle(o, "은/는")}
        return Rendered(
            before.format(**words), text, after.format(**words), tuple(map(tuple, spans))
        )

    def added_tokens(self, types: set[str]) -> list[str]:
        """The markers that must be added to the tokenizer, for these entity types."""
        if self.marker not in TOKEN_MARKERS:
            return []
        entities = [Entity("", 0, 0, type_) for type_ in types | set(TYPES)]
        markers = [m for who in (0, 1) for e in entities for m in self._markers(who, e, "")]
        return sorted({marker.strip() for marker in markers if marker.strip()})

    def _markers(self, who: int, entity: Entity, where: str) -> tuple[str, str]:
        opening, closing = MARKERS[self.marker][who]
        if "{" in opening and entity.type is None:
            field = ("subject_entity", "object_entity")[who]
            needs = f"no type, which --marker {self.marker} needs"
            raise InputError(f"{where}: {field}: {needs}; --marker entity_marker needs none")
        name = TYPE_NAMES[self.type_names].get(entity.type, (entity.type or "").lower())
        return opening.format(type=name, TYPE=entity.type), closing.format(type=name)


def particle(word: str, pair: str) -> str:
    """The particle that follows `word`: of "과/와", the first after a consonant, else the second.

    Digits and Latin letters follow their Korean reading. A bracket at the end is ignored.
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
        closed, rieul = last in "013678", last in "178"  # 영 일 삼 육 칠 팔
    elif re.search(r"(?:^|[^a-z])[A-Z]+$", text):
        closed, rieul = last in "LMNR", last in "LR"  # read letter by letter: 엘 엠 엔 알
    else:
        closed = bool(re.search(r"(?:[lmn]e?|ng|[aeiou](?:c?k|p|t))$", text, re.IGNORECASE))
        rieul = bool(re.search(r"le?$", text, re.IGNORECASE))
    return after_vowel if not closed or (rieul and after_consonant == "으로") else after_consonant


# --- program ----------------------------------------------------------------------------------


def diff(old: list[Row], new: list[Row]) -> tuple[list[Row], list[Row], list[tuple[Row, Row]]]:
    """(added, removed, relabelled): rows of `new` only, rows of `old` only, (old, new) pairs that
    differ in the label. Rows are compared by sentence and entities; ids are ignored."""
    added, removed = new, old
    for with_label in (True, False):  # unchanged rows are matched first
        unmatched = {}
        for row in removed:
            unmatched.setdefault(row[1 : 5 if with_label else 4], []).append(row)
        pairs, alone = [], []
        for row in added:
            if alike := unmatched.get(row[1 : 5 if with_label else 4]):
                pairs.append((alike.pop(0), row))
            else:
                alone.append(row)
        added, removed = alone, [row for rows in unmatched.values() for row in rows]
    return added, removed, pairs


def print_diff(old: str, new: str, order: str):
    files = (read_rows(data_file(data, "train")) for data in (old, new))
    added, removed, relabelled = diff(*(with_label_names(rows, order) for rows in files))
    lines = [("+", row.where, row.label, row) for row in added]
    lines += [("-", row.where, row.label, row) for row in removed]
    for before, row in relabelled:
        where, label = f"{before.where} -> {row.where}", f"{before.label} -> {row.label}"
        lines.append(("~", where, label, row))
    for sign, where, label, row in lines:
        words = f"{row.subject.word} / {row.object.word}"
        print(printable(f"{sign} {where}  id {row.id}  {label}  {words}"))
    counts = f"{len(added)} rows added (+), {len(removed)} removed (-), "
    print(f"{counts}{len(relabelled)} relabelled (~)")


def write_rows(path: Path, rows: list[Row]):
    """Write rows as the competition's CSV; the label of a row without one is 100."""
    with atomic_write(path) as file:
        writer = csv_writer(file)
        writer.writerow([*COLUMNS, "label", "source"])
        for row in rows:
            entities = [dict(zip(ENTITY_FIELDS, entity)) for entity in row[2:4]]
            writer.writerow([row.id, row.sentence, *entities, row.label or 100, row.source])


def version(data: str, rows: list[Row]) -> dict:
    """What identifies the state of a data set: its hub revision and a hash of its rows."""
    found = HUB.fullmatch(str(data_file(data, "train").parent)) if data.startswith("hub:") else None
    content = sha256(repr([row[:-1] for row in rows]).encode()).hexdigest()
    return {"revision": found and found[2], "content": content[:16]}


def download(folder: Path, hub: str):
    """Write a hub data set as train.csv, dev.csv, and test_data.csv: dev.csv without its labels."""
    if not HUB.fullmatch(hub) or HUB_SPLIT.fullmatch(hub):
        expected = "hub:OWNER/NAME@REVISION[:CONFIG] without a split"
        raise InputError(f"--download: found {hub}, expected {expected}")
    for name in ("train.csv", "dev.csv", "test_data.csv"):
        if (folder / name).exists():
            raise InputError(f"{folder / name}: exists already; move it, or use another --out")
    train, dev = (read_rows(data_file(hub, split)) for split in ("train", "validation"))
    unlabelled = [row._replace(label=None) for row in dev]
    parts = {"train.csv": train, "dev.csv": dev, "test_data.csv": unlabelled}
    for name, rows in parts.items():
        write_rows(folder / name, rows)
        content = version(hub, rows)["content"]
        print(f"{folder / name}: {len(rows)} rows of {hub}, content {content}")


@exit_on_error
def main():
    parser = Parser(description=__doc__)
    command = parser.add_mutually_exclusive_group(required=True)
    command.add_argument("--diff", nargs=2, metavar=("OLD", "NEW"), help="two files or folders")
    command.add_argument("--download", nargs="?", const=KLUE_RE, metavar="HUB",
                         help=f"data set to write as CSV (default: {KLUE_RE})")  # fmt: skip
    parser.add_argument("--out", default="data", help="folder of --download (default: data)")
    parser.add_argument("--label-order", default="", metavar="ORDER",
                        help="with --diff, what class numbers mean, as in train.py")  # fmt: skip
    arguments = parser.parse_args()
    if arguments.diff:
        print_diff(*arguments.diff, arguments.label_order)
    else:
        download(Path(arguments.out), arguments.download)


if __name__ == "__main__":
    main()
