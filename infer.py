"""Predict with checkpoints of train.py: a file, or one sentence.

    python infer.py runs/demo/ckpt.pt                          # test_data.csv of its data folder
    python infer.py CKPT --data test.csv --out out/mine.csv    # another file
    python infer.py A/ckpt.pt B/ckpt.pt                        # the mean of their probabilities
    python infer.py CKPT --sentence "…" --subject 비틀즈:ORG --object "링고 스타:PER"
    torchrun --nproc_per_node=4 infer.py CKPT                  # four GPUs share the file
    python infer.py CKPT --export DIR                          # for transformers, ONNX and the hub

Writes the competition's format, id,pred_label,probs, in the order of the input. Prints scores if
every row has a gold label that the model knows.
"""

# First: it handles Ctrl-C while the others are imported.
from common import InputError, Parser, exit_on_error, is_text, shorten

# isort: split

import argparse
import shlex
from pathlib import Path

import numpy as np
import transformers

from checkpoint import load_checkpoint
from data import (
    KLUE_LABELS,
    TYPES,
    note_unknown_types,
    with_label_names,
)
from distributed import DTYPES, Worker, process_group
from export import export
from metrics import describe, score, write_predictions
from predictor import Predictor
from rows import Entity, Row, compose, data_file, locate, read_rows

OPTIONS = ("--subject", "--object")


def parse_arguments() -> argparse.Namespace:
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("checkpoints", nargs="+", help="ckpt.pt of one or more runs, or folders of --export; "
        "several are averaged")  # fmt: skip
    add("--data", help="file to predict, a folder with test_data.csv, or hub:OWNER/NAME@REVISION"
        "[:CONFIG][/SPLIT] (default: the first run's data folder)")  # fmt: skip
    add("--out", help="file to write (default: out/<run>.csv; out/<A>+<B>.csv, out/<A>+2.csv)")
    add("--skip-bad-rows", action="store_true",
        help="leave bad rows out; otherwise the first is an error")  # fmt: skip
    add("--label-order", default="", metavar="ORDER",
        help="what gold labels that are class numbers mean, as in train.py")  # fmt: skip
    add("--sentence", help="predict this sentence instead of a file")
    add("--subject", help="the subject in the sentence, as WORD:TYPE, such as 비틀즈:ORG, or WORD")
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
    one = (arguments.sentence, arguments.subject, arguments.object)
    if any(one) and not all(one):
        raise InputError("--sentence, --subject and --object: expected all three or none")
    if any(one) and not is_text("".join(one)):
        raise InputError("--sentence, --subject, --object: found bytes that are not UTF-8")
    if any(one):
        arguments.sentence, arguments.subject, arguments.object = map(compose, one)
    of_files = ("data", "out", "label_order", "skip_bad_rows")
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
    if arguments.max_tokens < 1:
        raise InputError(f"--max-tokens: found {arguments.max_tokens}, expected at least 1")
    return arguments


def log_of(worker: Worker):
    """print on the first rank, nothing on the others."""
    return print if worker.rank == 0 else lambda text: None


# --- one sentence -----------------------------------------------------------------------------


def split_type(text: str, sentence: str, option: str, types: tuple[str, ...] | None):
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


def row_from_options(arguments: argparse.Namespace, labels: list[str], needs_types: bool, log):
    """The row of --sentence. InputError if the markers of a model need types that are missing."""
    sentence, types = arguments.sentence, TYPES if set(labels) == set(KLUE_LABELS) else None
    texts = arguments.subject, arguments.object
    found = [split_type(text, sentence, name, types) for name, text in zip(OPTIONS, texts)]
    for option, text, (_, type_) in zip(OPTIONS, texts, found):
        if needs_types and not type_:
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


# --- a file -----------------------------------------------------------------------------------


def default_output(runs: list[str]) -> Path:
    """out/A.csv, out/A+B.csv, out/A+2.csv for one, two, three runs: names have a maximum length."""
    names = [Path(run).name.strip(".") or "run" for run in runs]  # a checkpoint may name any path
    name = "+".join(names) if len(names) < 3 else f"{names[0]}+{len(names) - 1}"
    return Path("out") / f"{name}.csv"


def predict_file(arguments: argparse.Namespace, predictor: Predictor, worker: Worker):
    labels, paths = predictor.labels, arguments.checkpoints
    about = [model.content for model in predictor.models]
    path = data_file(arguments.data or about[0]["data"], "test_data")
    out = Path(arguments.out or default_output([run["run"] for run in about]))
    if out.resolve() in {Path(file).resolve() for file in (path, *paths)}:
        raise InputError(f"--out {out}: expected another file than those that are read")
    skipped = [] if arguments.skip_bad_rows else None
    rows = read_rows(path, skipped, log_of(worker), unique_ids=True)
    note_unknown_types(rows, labels, log_of(worker))
    if arguments.label_order:  # without it, class numbers are labels that the model does not know
        rows = with_label_names(rows, arguments.label_order)
    probs, n_truncated = predictor.probabilities(rows, progress=True, calibrated=False)
    for n, run in zip(n_truncated, about):
        if n:
            log_of(worker)(f"{n} rows truncated to {run['max_length']} tokens")
    for line in predictor.notes(rows):
        log_of(worker)(line)
    if worker.rank > 0:
        return
    predicted = [labels[c] for c in probs.argmax(1)]
    write_predictions(out, [row.id for row in rows], predicted, probs)
    print(f"{out}: {len(rows)} rows of {path}")
    if skipped:
        more = [f"and {len(skipped) - 20} more"] if len(skipped) > 20 else []
        print(f"left out {len(skipped)} bad rows:", *skipped[:20], *more, sep="\n  ")
    if any(row.label is not None for row in rows):
        print(scores_or_why_not(rows, labels, probs))


def scores_or_why_not(rows: list[Row], labels: list[str], probs: np.ndarray) -> str:
    """The scores of probs (N, C) if the model knows the gold label of each row."""
    unlabelled = sum(row.label is None for row in rows)
    unknown = [row for row in rows if row.label not in (None, *labels)]
    if unknown:
        found = f"{len(unknown)} of {len(rows)} rows have a label that the model does not know"
        label, where = unknown[0].label, unknown[0].where
        hint = "; --label-order says what numbers mean" if label.isdigit() else ""
        return f"no scores: {found}, such as {shorten(label)} at {where}{hint}"
    if unlabelled:
        return f"no scores: {unlabelled} of {len(rows)} rows have no label"
    gold = np.array([labels.index(row.label) for row in rows])
    return describe(score(probs, gold), labels)


@exit_on_error
def main():
    arguments = parse_arguments()
    if arguments.export:
        transformers.logging.set_verbosity_error()  # it warns of weights that we do not use
        transformers.logging.disable_progress_bar()
        export(load_checkpoint(arguments.checkpoints[0]), Path(arguments.export), print)
        print(f"{arguments.export}: {arguments.checkpoints[0]}; upload it with")
        print(f"  hf upload OWNER/NAME {shlex.quote(arguments.export)}")
        return
    with process_group(arguments.amp, arguments.device) as worker:
        options = arguments.device, arguments.amp, arguments.max_tokens
        predictor = Predictor(arguments.checkpoints, *options)
        if not arguments.sentence:
            predict_file(arguments, predictor, worker)
            return
        labels, needs_types = predictor.labels, predictor.needs_types
        row = row_from_options(arguments, labels, needs_types, log_of(worker))
        probs = predictor.probabilities([row])[0][0]
        if worker.rank == 0:
            print(*(f"{probs[i]:.4f}  {labels[i]}" for i in np.argsort(-probs)[:5]), sep="\n")


if __name__ == "__main__":
    main()
