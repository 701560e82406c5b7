"""Predict with checkpoints of train.py: a file, or one sentence.

    python infer.py runs/demo/ckpt.pt                          # test_data.csv of its data folder
    python infer.py CKPT --data test.csv --out out/mine.csv    # another file
    python infer.py A/ckpt.pt B/ckpt.pt                        # the mean of their probabilities
    python infer.py CKPT --sentence "…" --subject 비틀즈:ORG --object "링고 스타:PER"
    torchrun --nproc_per_node=4 infer.py CKPT                  # four GPUs share the file

Writes the competition's format, id,pred_label,probs, in the order of the input. Prints scores if
every row has a gold label.
"""

# First: it handles Ctrl-C while the others are imported.
from common import InputError, Parser, exit_on_error, is_text

# isort: split

import argparse
from pathlib import Path

import numpy as np
import transformers

from checkpoint import load_checkpoint, restore
from data import KLUE_LABELS, TYPES, Template, with_known_labels
from distributed import DTYPES, Worker, process_group
from metrics import describe, scale_negative, score, write_predictions
from model import predict
from rows import Entity, Row, compose, data_file, read_rows
from tokens import encode


def parse_arguments() -> argparse.Namespace:
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("checkpoints", nargs="+", help="ckpt.pt of one or more runs; several are averaged")
    add("--data", help="file to predict (default: test_data.csv of the first run's data folder)")
    add("--out", help="file to write (default: out/<run>.csv; out/<A>+<B>.csv, out/<A>+2.csv)")
    add("--sentence", help="predict this sentence instead of a file")
    add("--subject", help="the subject in the sentence, as WORD:TYPE or WORD; its first occurrence")
    add("--object", help="the object in the sentence, likewise")
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
    if any(one) and (arguments.data or arguments.out):
        raise InputError("--data and --out are for files; --sentence prints its prediction")
    if arguments.max_tokens < 1:
        raise InputError(f"--max-tokens: found {arguments.max_tokens}, expected at least 1")
    return arguments


def read_about(paths: list[str]) -> list[dict]:
    """Run, data and labels of each checkpoint; the labels must agree."""
    about = []
    for path in paths:
        checkpoint = load_checkpoint(path)
        about.append({key: checkpoint[key] for key in ("run", "data", "labels")})
        if about[-1]["labels"] != about[0]["labels"]:
            raise InputError(f"{path}: its labels, or their order, differ from those of {paths[0]}")
    return about


def predict_rows(checkpoint: dict, rows: list[Row], worker: Worker, max_tokens: int) -> np.ndarray:
    """Probabilities (rows, labels) on every rank, with the checkpoint's scaling of no_relation."""
    model, tokenizer = restore(checkpoint)
    template, max_length = Template(**checkpoint["template"]), checkpoint["max_length"]
    examples, n_truncated = encode(rows, template, tokenizer, checkpoint["labels"], max_length)
    if n_truncated and worker.rank == 0:
        print(f"{n_truncated} rows truncated to {max_length} tokens")
    probs = predict(model.to(worker.device), examples, worker, max_tokens)
    return scale_negative(probs, checkpoint["negative_factor"])


def mean_probs(paths: list[str], rows: list[Row], worker: Worker, max_tokens: int) -> np.ndarray:
    """The mean of the checkpoints' probabilities (rows, labels); one model at a time in memory."""
    each = (predict_rows(load_checkpoint(path), rows, worker, max_tokens) for path in paths)
    return sum(each) / len(paths)


# --- one sentence -----------------------------------------------------------------------------


def find_entity(sentence: str, text: str, option: str, types: tuple[str, ...] | None) -> Entity:
    """The entity that WORD or WORD:TYPE names, at the word's first occurrence.

    The word may contain colons. types: the types that the model knows; None if it takes any.
    """
    word, _, type_ = text.rpartition(":")
    if not word or word not in sentence or (text in sentence and type_ not in (types or ())):
        word, type_ = text, ""
    if word not in sentence:
        raise InputError(
            f"{option}: found {text!r}, expected WORD:TYPE with a word of the sentence"
        )
    if type_ and types and type_ not in types:
        raise InputError(f"{option}: found type {type_!r}, expected one of {', '.join(types)}")
    start = sentence.index(word)
    return Entity(word, start, start + len(word) - 1, type_ or None)


def row_from_options(arguments: argparse.Namespace, labels: list[str]) -> Row:
    types = TYPES if set(labels) == set(KLUE_LABELS) else None
    options = ("--subject", arguments.subject), ("--object", arguments.object)
    subject, obj = (find_entity(arguments.sentence, text, name, types) for name, text in options)
    if subject[1:3] == obj[1:3]:
        raise InputError("--object: expected another position in the sentence than the subject's")
    return Row("0", arguments.sentence, subject, obj, None, "", "--sentence")


# --- a file -----------------------------------------------------------------------------------


def default_output(runs: list[str]) -> Path:
    """out/A.csv, out/A+B.csv, out/A+2.csv for one, two, three runs: names have a maximum length."""
    names = [Path(run).name.strip(".") or "run" for run in runs]  # a checkpoint may name any path
    name = "+".join(names) if len(names) < 3 else f"{names[0]}+{len(names) - 1}"
    return Path("out") / f"{name}.csv"


def predict_file(arguments: argparse.Namespace, about: list[dict], worker: Worker):
    labels = about[0]["labels"]
    path = arguments.data or data_file(about[0]["data"], "test_data")
    rows = read_rows(path, log=print if worker.rank == 0 else lambda text: None)
    n_gold = sum(row.label is not None for row in rows)
    if n_gold == len(rows):
        rows = with_known_labels(rows, labels)
    out = Path(arguments.out or default_output([run["run"] for run in about]))
    probs = mean_probs(arguments.checkpoints, rows, worker, arguments.max_tokens)
    if worker.rank > 0:
        return
    predicted = [labels[c] for c in probs.argmax(1)]
    write_predictions(out, [row.id for row in rows], predicted, probs)
    print(f"{out}: {len(rows)} rows of {path}")
    if n_gold == len(rows):
        gold = np.array([labels.index(row.label) for row in rows])
        print(describe(score(probs, gold), labels))
    elif n_gold:
        print(f"no scores: only {n_gold} of {len(rows)} rows have a label")


@exit_on_error
def main():
    arguments = parse_arguments()
    about = read_about(arguments.checkpoints)
    transformers.logging.set_verbosity_error()
    with process_group(arguments.amp) as worker:
        if not arguments.sentence:
            predict_file(arguments, about, worker)
            return
        labels = about[0]["labels"]
        row = row_from_options(arguments, labels)
        probs = mean_probs(arguments.checkpoints, [row], worker, arguments.max_tokens)[0]
        if worker.rank == 0:
            print(*(f"{probs[i]:.4f}  {labels[i]}" for i in np.argsort(-probs)[:5]), sep="\n")


if __name__ == "__main__":
    main()
