"""Predict with checkpoints of train.py: a file, or one sentence.

    python infer.py runs/demo/ckpt.pt                          # test_data.csv of its data folder
    python infer.py CKPT --data test.csv --out out/mine.csv    # another file
    python infer.py A/ckpt.pt B/ckpt.pt                        # the mean of their probabilities
    python infer.py CKPT --sentence "…" --subject 비틀즈:ORG --object "링고 스타:PER"
    python infer.py CKPT --data texts.jsonl --triples out/triples.jsonl    # all pairs of entities
    torchrun --nproc_per_node=4 infer.py CKPT                  # four GPUs share the file
    python infer.py CKPT --export DIR                          # for transformers, ONNX and the hub

Writes the competition's format, id,pred_label,probs, in the order of the input. Prints scores if
every row has a gold label that the model knows. predictor.py is for use from Python.
"""

# First: it handles Ctrl-C while the others are imported.
from common import InputError, Parser, exit_on_error, is_text, shorten

# isort: split

import argparse
import csv
import shlex
from array import array
from pathlib import Path

import numpy as np
import transformers

import bulk
from checkpoint import load_checkpoint
from data import with_label_names
from distributed import DTYPES, Worker, process_group
from export import export
from formats import read_records
from metrics import describe, read_predictions, score
from predictor import Predictor
from rows import NEEDED, Entity, Row, compose, data_file, locate, read_chunks, row_of, text_of

OPTIONS = ("--subject", "--object")
MAX_SCORED = 500_000  # rows: scores need all probabilities at once


def parse_arguments() -> argparse.Namespace:
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("checkpoints", nargs="+", help="ckpt.pt of one or more runs, or folders of --export; "
        "several are averaged")  # fmt: skip
    add("--data", help="file to predict, a folder with test_data.csv, or hub:OWNER/NAME@REVISION"
        "[:CONFIG][/SPLIT] (default: the first run's data folder)")  # fmt: skip
    add("--out", help="CSV to write, replaced if it exists (default: out/<run>.csv, "
        "of a folder of --export out/<folder>.csv; out/<A>+<B>.csv, out/<A>+2.csv)")  # fmt: skip
    add("--skip-bad-rows", action="store_true",
        help="leave bad rows out; otherwise the first is an error")  # fmt: skip
    add("--label-order", metavar="ORDER",
        help="what gold labels that are class numbers mean, as in train.py")  # fmt: skip
    add("--triples", metavar="OUT", help="write the relations between the entities of each "
        "sentence of --data: JSON lines, or .csv for Neo4j's import")  # fmt: skip
    add("--threshold", type=float, metavar="P",
        help="the least probability of a triple (default: 0.5)")  # fmt: skip
    add("--sentence", help="predict this sentence instead of a file")
    add("--subject", help="subject of the sentence, as WORD:TYPE, such as 비틀즈:ORG, or WORD")
    add("--object", help="the object in the sentence, likewise")
    add("--subject-at", type=int, metavar="N",
        help="where it starts, from 0, if the word is in the sentence more than once")  # fmt: skip
    add("--object-at", type=int, metavar="N", help="likewise for the object")
    add("--export", metavar="DIR", help="write the model to a new folder: encoder and tokenizer as "
        "save_pretrained, ONNX, model card")  # fmt: skip
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    add("--amp", default="auto", choices=("auto", *DTYPES), help="mixed precision (default: auto)")
    add("--max-tokens", type=int, default=16384, metavar="N",
        help="tokens per batch on a GPU (default: 16384; on a CPU at most 4096)")  # fmt: skip
    arguments = parser.parse_args()
    for name, value in vars(arguments).items():
        if value == "":  # a shell variable that is not set
            raise InputError(f"--{name.replace('_', '-')}: found nothing, expected a value")
    one = (arguments.sentence, arguments.subject, arguments.object)
    if any(one) and not all(one):
        raise InputError("--sentence, --subject and --object: expected all three or none")
    if any(one) and not is_text("".join(one)):
        raise InputError("--sentence, --subject, --object: found bytes that are not UTF-8")
    if any(one):
        arguments.sentence, arguments.subject, arguments.object = map(compose, one)
    of_files = ("data", "out", "triples", "label_order", "skip_bad_rows")
    if any(one) and (given := [name for name in of_files if getattr(arguments, name)]):
        name = given[0].replace("_", "-")
        raise InputError(f"--{name} is for files; --sentence prints its prediction")
    if not any(one) and (arguments.subject_at, arguments.object_at) != (None, None):
        raise InputError("--subject-at and --object-at are for --sentence")
    used = ("sentence", "subject_at", "object_at", *of_files)
    if arguments.export and (given := [name for name in used if getattr(arguments, name)]):
        name = given[0].replace("_", "-")
        raise InputError(f"--{name}: --export predicts nothing, expected one of the two")
    if arguments.export and len(arguments.checkpoints) > 1:
        raise InputError(f"--export: found {len(arguments.checkpoints)} checkpoints, expected one")
    if arguments.triples and not arguments.data:
        raise InputError("--triples needs --data FILE, JSON lines with sentence and entities")
    if arguments.triples and (arguments.out or arguments.label_order):
        raise InputError("--triples excludes --out and --label-order")
    if arguments.threshold is not None and not arguments.triples:
        raise InputError("--threshold is for --triples")
    if arguments.threshold is None:
        arguments.threshold = 0.5
    if not 0 <= arguments.threshold <= 1:
        raise InputError(f"--threshold: found {arguments.threshold}, expected 0 to 1")
    if arguments.max_tokens < 1:
        raise InputError(f"--max-tokens: found {arguments.max_tokens}, expected at least 1")
    return arguments


def log_of(worker: Worker):
    """print on the first rank, nothing on the others."""
    return print if worker.rank == 0 else lambda text: None


# --- one sentence -----------------------------------------------------------------------------


def split_type(text: str, sentence: str, option: str, types: list[str] | None):
    """(word, type or None) of WORD:TYPE or WORD; the word may contain colons.

    types: the types that the model knows, in any case; None if it takes any.
    """
    word, _, type_ = (part.strip() for part in text.rpartition(":"))
    if types and type_.upper() in types:
        type_ = type_.upper()
    elif not word or word not in sentence or (text in sentence and type_ not in (types or ())):
        word, type_ = text.strip(), ""
    if not word or word not in sentence:
        expected = "WORD:TYPE with a word of the sentence"
        raise InputError(f"{option}: found {text!r}, expected {expected}")
    if type_ and types and type_ not in types:
        raise InputError(f"{option}: found type {type_!r}, expected one of {', '.join(types)}")
    return word, type_ or None


def choose_places(sentence: str, words: list[str], given: list[int | None], log=print):
    """Where the subject and the object start: as given, else as rows.locate says."""
    starts, places = locate(sentence, words, given, OPTIONS)
    for option, word, at, start, found in zip(OPTIONS, words, given, starts, places):
        where = ", ".join(map(str, found))
        if start not in found:
            raise InputError(f"{option}-at: found {at}, expected a place of {word!r}: {where}")
        if at is None and len(found) > 1:
            log(f"{option}: {word!r} at {start}, of {where}; {option}-at N takes another")
    if starts[0] == starts[1] and len(words[0]) == len(words[1]):
        raise InputError("--object: expected another position in the sentence than the subject's")
    return starts


def row_from_options(arguments: argparse.Namespace, predictor: Predictor, log):
    """The row of --sentence. InputError if the markers of a model need types that are missing."""
    sentence, types = arguments.sentence, predictor.types
    texts = arguments.subject, arguments.object
    found = [split_type(text, sentence, name, types) for name, text in zip(OPTIONS, texts)]
    for option, text, (_, type_) in zip(OPTIONS, texts, found):
        if predictor.needs_types and not type_:
            one_of = f", one of {', '.join(types)}" if types else ""
            expected = f"WORD:TYPE{one_of}: the model's markers need a type"
            raise InputError(f"{option}: found {text!r}, expected {expected}")
    words = [word for word, _ in found]
    starts = choose_places(sentence, words, [arguments.subject_at, arguments.object_at], log)
    entities = [
        Entity(word, start, start + len(word) - 1, type_)
        for (word, type_), start in zip(found, starts)
    ]
    return Row("0", sentence, *entities, None, "", "--sentence")


def predict_sentence(arguments: argparse.Namespace, predictor: Predictor, worker: Worker):
    """Print the five most probable relations of --sentence."""
    log = log_of(worker)
    row = row_from_options(arguments, predictor, log)
    (probs,), n_truncated = predictor.probabilities([row])
    note(predictor, n_truncated, [row], log)
    for i in np.argsort(-probs)[:5]:
        log(f"{probs[i]:.4f}  {predictor.labels[i]}")


# --- a file -----------------------------------------------------------------------------------


def note(predictor: Predictor, n_truncated: list[int], rows: list[Row], log):
    """Say how many rows each checkpoint has truncated, and what in `rows` is unknown to it."""
    for n, model in zip(n_truncated, predictor.models):
        if n:
            log(f"{n} rows truncated to {model.content['max_length']} tokens")
    for line in predictor.notes(rows) if rows else []:
        log(line)


def default_output(runs: list[str]) -> Path:
    """out/A.csv, out/A+B.csv, out/A+2.csv for one, two, three runs: names have a maximum length."""
    names = [Path(run).name.strip(".") or "run" for run in runs]  # a checkpoint may name any path
    name = "+".join(names) if len(names) < 3 else f"{names[0]}+{len(names) - 1}"
    return Path("out") / f"{name}.csv"


def choose_files(arguments: argparse.Namespace, predictor: Predictor) -> tuple[Path, list[Path]]:
    """(file to predict, files to write). InputError if they are not of the expected kind."""
    about = [model.content for model in predictor.models]
    data = arguments.data or about[0]["data"]
    if not data:
        raise InputError("--data: expected a file: an exported model does not know its data")
    path = data_file(data, "test_data")
    if arguments.triples and path.suffix.lower() in (".csv", ".tsv"):
        expected = "JSON lines, a JSON list or Parquet with sentence and entities"
        raise InputError(f"--triples: {path}: found {path.suffix}, expected {expected}")
    paths = map(Path, predictor.paths)  # a folder of --export has its own name, not the run's
    runs = [x.resolve() if x.is_dir() else run["run"] for x, run in zip(paths, about)]
    out = Path(arguments.triples or arguments.out or default_output(runs))
    option, kinds = ("--triples", [".csv", ".jsonl"]) if arguments.triples else ("--out", [".csv"])
    suffix = out.suffix.lower()
    if suffix in {".csv", ".tsv", ".json", ".jsonl", ".parquet", ".xlsx"} - {*kinds}:
        raise InputError(f"{option} {out}: expected the name of a {' or '.join(kinds)} file")
    outs = [out, out.with_suffix(".nodes.csv")] if arguments.triples and suffix == ".csv" else [out]
    read = {Path(file).resolve() for file in (path, *arguments.checkpoints)}
    for file in outs:
        if file.exists() and not file.is_file():
            found = "a folder" if file.is_dir() else "a device or a pipe"
            raise InputError(f"{file}: expected the name of a file, found {found}")
        if file.resolve() in read:
            raise InputError(f"{option} {file}: expected another file than those that are read")
    return path, outs


def predict_file(arguments: argparse.Namespace, predictor: Predictor, worker: Worker):
    """Predict a file in chunks and write a submission, or triples."""
    path, outs = choose_files(arguments, predictor)
    as_triples, as_csv, log = bool(arguments.triples), len(outs) == 2, log_of(worker)
    make, columns = (text_of, ("sentence",)) if as_triples else (row_of, NEEDED)
    n_rows = sum(1 for _ in read_records(path, columns))
    size = bulk.chunk_size(n_rows, worker, of_texts=as_triples)
    options = [size, arguments.skip_bad_rows, arguments.threshold, len(outs), as_triples]
    parts = bulk.Parts(outs, bulk.key_of(path, predictor, *options), worker, log)
    skipped = bulk.Skipped() if arguments.skip_bad_rows else None
    chunks = read_chunks(path, make, size, skipped, log, not as_triples, predictor.check)
    seen = Seen(arguments.label_order, predictor, log)
    chunks = seen.texts(chunks) if as_triples else seen.rows(chunks)

    def predict_chunk(rows):
        progress = worker.rank == 0
        if as_triples:
            return bulk.triples(rows, predictor, arguments.threshold, as_csv, progress)
        return bulk.predictions(rows, predictor, progress)

    n_chunks = bulk.predict_chunks(chunks, predict_chunk, parts, worker, n_rows, size)
    if worker.rank > 0:
        return
    headers = [""] if as_triples else [bulk.PREDICTIONS]
    n_truncated = parts.join(list(bulk.NEO4J) if as_csv else headers, n_chunks)
    note(predictor, n_truncated, [], log)
    found = f"{seen.n} rows of {path}"
    if as_triples:
        with open(outs[0], encoding="utf-8", newline="") as file:
            n_triples = sum(1 for _ in (csv.reader(file) if as_csv else file)) - as_csv  # a header
        found = f"{n_triples} triples of {found}"
    if seen.left_out:
        why = "no training row has a relation between such types, or both are the same span"
        log(f"left out {seen.left_out} of {seen.n_pairs} pairs of entities: {why}")
    print(f"{' and '.join(map(str, outs))}: {found}")
    if skipped:
        more = [f"and {skipped.n - len(skipped)} more"] if skipped.n > len(skipped) else []
        print(f"bad rows left out: {skipped.n}", *skipped, *more, sep="\n  ")
    if scores := seen.scores(outs[0]):
        print(scores)


class Seen:
    """What the chunks of a file have had: rows, pairs of entities, gold labels."""

    def __init__(self, label_order: str | None, predictor: Predictor, log):
        self.label_order, self.predictor, self.log = label_order, predictor, log
        self.labels = predictor.labels
        self.n, self.gold = 0, array("h")  # -1: no label the model knows
        self.n_pairs, self.left_out = 0, 0
        self.unlabelled, self.unknown, self.first_unknown = 0, 0, None

    def texts(self, chunks):
        for texts in chunks:
            self.n += len(texts)
            n = sum(len(text.entities) * (len(text.entities) - 1) for text in texts)
            self.n_pairs += n
            self.left_out += n - sum(1 for text in texts for _ in self.predictor.pairs_of(text))
            yield texts

    def rows(self, chunks):
        number = {label: i for i, label in enumerate(self.labels)}
        for rows in chunks:
            if self.n == 0:
                note(self.predictor, [], rows, self.log)
            if self.label_order:  # without it, class numbers are labels that the model lacks
                rows = with_label_names(rows, self.label_order)
            self.n += len(rows)
            self.gold.extend(number.get(row.label, -1) for row in rows)
            self.unlabelled += sum(row.label is None for row in rows)
            unknown = [row for row in rows if row.label is not None and row.label not in number]
            self.unknown += len(unknown)
            self.first_unknown = self.first_unknown or (unknown and unknown[0])
            yield rows

    def scores(self, out: Path) -> str:
        """The scores of the predictions in `out` if the model knows each row's gold label."""
        if self.unlabelled == self.n or not self.gold:
            return ""
        if self.unknown:
            found = f"{self.unknown} of {self.n} rows have a label that the model does not know"
            label, where = self.first_unknown.label, self.first_unknown.where
            hint = "; --label-order says what numbers mean" if label.isdigit() else ""
            return f"no scores: {found}, such as {shorten(label)} at {where}{hint}"
        if self.unlabelled:
            return f"no scores: {self.unlabelled} of {self.n} rows have no label"
        if self.n > MAX_SCORED:
            return f"no scores: they take all probabilities of at most {MAX_SCORED} rows"
        try:
            probs = read_predictions(str(out)).probs
        except InputError as error:  # ids that repeat are searched among the first rows only
            return f"no scores: {error}"
        return describe(score(probs, np.array(self.gold)), self.labels)


@exit_on_error
def main():
    arguments = parse_arguments()
    if arguments.export:
        transformers.logging.set_verbosity_error()  # it warns of weights that we do not use
        transformers.logging.disable_progress_bar()
        export(load_checkpoint(arguments.checkpoints[0]), Path(arguments.export), print)
        print(f"wrote {arguments.export} from {arguments.checkpoints[0]}; upload it with")
        print(f"  hf upload OWNER/NAME {shlex.quote(arguments.export)}")
        return
    with process_group(arguments.amp, arguments.device) as worker:
        amp = next(name for name, dtype in DTYPES.items() if dtype == worker.amp)  # of all ranks
        # a temperature changes the order between rows, and so the AUPRC of a submission
        calibrated = bool(arguments.sentence or arguments.triples)
        options = arguments.device, amp, arguments.max_tokens, calibrated
        predictor = Predictor(arguments.checkpoints, *options)
        predict = predict_sentence if arguments.sentence else predict_file
        predict(arguments, predictor, worker)


if __name__ == "__main__":
    main()
