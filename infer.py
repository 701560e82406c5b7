"""Predicts with a checkpoint of train.py: a whole file, or one sentence.

    python infer.py runs/demo/ckpt.pt                            # test_data.csv of the folder it was trained from
    python infer.py CKPT --data test.csv --out out/mine.csv      # another file; its metrics too, if it has gold labels
    python infer.py CKPT --sentence "비틀즈는 조지 해리슨이 …" --subject "비틀즈:ORG" --object "조지 해리슨:PER"
    torchrun --nproc_per_node=4 infer.py CKPT                    # the same file, four GPUs

Writes the competition's id,pred_label,probs, rows in the order of the input.
"""

import argparse
from pathlib import Path

import numpy as np
import transformers
from tqdm import tqdm

from data import (
    Entity,
    InputError,
    Row,
    Template,
    data_file,
    encode,
    exit_on_bad_input,
    read_rows,
    with_known_labels,
    write_predictions,
)
from metrics import describe, score
from model import Machine, load_checkpoint, predict, restore, running


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="ckpt.pt of a run of train.py")
    parser.add_argument("--data", help="file to predict; default: test_data.csv of the checkpoint's data folder")
    parser.add_argument("--out", help="file to write; default: out/<name of the run>.csv")
    parser.add_argument("--sentence", help="predict this sentence instead of a file")
    parser.add_argument("--subject", help="its subject as WORD:TYPE, or WORD for models without types")
    parser.add_argument("--object", help="its object, likewise; the first place in the sentence counts")
    parser.add_argument("--amp", default="auto", choices=("auto", "off", "bf16", "fp16"), help="precision (auto)")
    parser.add_argument("--max-tokens", type=int, default=16384, help="tokens at a time on a device (16384)")
    arguments = parser.parse_args()
    one = (arguments.sentence, arguments.subject, arguments.object)
    if any(one) and not all(one):
        raise InputError("--sentence, --subject and --object go together")
    if any(one) and (arguments.data or arguments.out):
        raise InputError("--sentence prints its prediction; --data and --out are for files")
    if arguments.max_tokens < 1:
        raise InputError(f"--max-tokens: found {arguments.max_tokens}, expected at least 1")
    return arguments


def entity_of(sentence: str, text: str, option: str) -> Entity:
    """The entity that WORD:TYPE names, at the word's first place in the sentence. A word may hold colons itself."""
    for word, kind in ((text.rpartition(":")[0], text.rpartition(":")[2]), (text, None)):
        if word and word in sentence:
            start = sentence.index(word)
            return Entity(word, start, start + len(word) - 1, kind or None)
    raise InputError(f"{option}: found {text!r}, expected WORD:TYPE with a word of the sentence")


def predict_rows(checkpoint: dict, rows: list[Row], machine: Machine, max_tokens: int, show=False) -> np.ndarray:
    """Probabilities (rows, labels) on every rank."""
    settings = checkpoint["settings"]
    model, tokenizer = restore(checkpoint)
    template = Template(settings["marker"], settings["prompt"], settings["type_names"])
    examples, n_cut = encode(rows, template, tokenizer, checkpoint["labels"], settings["max_length"])
    if n_cut and machine.rank == 0:
        print(f"{n_cut} sentences cut to {settings['max_length']} tokens")
    bar = (lambda batches: tqdm(batches, unit="batch", leave=False)) if show and machine.rank == 0 else iter
    return predict(model.to(machine.device), examples, machine, max_tokens, bar)


@exit_on_bad_input
def main():
    arguments = parse_arguments()
    checkpoint = load_checkpoint(arguments.checkpoint)
    labels = checkpoint["labels"]
    transformers.logging.set_verbosity_error()
    with running(arguments.amp) as machine:
        if arguments.sentence:
            subject = entity_of(arguments.sentence, arguments.subject, "--subject")
            object = entity_of(arguments.sentence, arguments.object, "--object")
            if subject[1:3] == object[1:3]:
                raise InputError("--object: expected another place in the sentence than the subject's")
            row = Row("0", arguments.sentence, subject, object, None, "", "--sentence")
            probs = predict_rows(checkpoint, [row], machine, arguments.max_tokens)[0]
            if machine.rank == 0:
                print(*(f"{probs[i]:.4f}  {labels[i]}" for i in np.argsort(-probs)[:5]), sep="\n")
            return

        path = arguments.data or data_file(checkpoint["data"], "test_data")
        rows = read_rows(path)
        has_gold = any(row.label is not None for row in rows)
        if has_gold:
            rows = with_known_labels(rows, labels)
        out = Path(arguments.out or f"out/{checkpoint['run']}.csv")
        probs = predict_rows(checkpoint, rows, machine, arguments.max_tokens, show=True)
        if machine.rank == 0:
            write_predictions(out, [row.id for row in rows], [labels[c] for c in probs.argmax(1)], probs)
            print(f"{out}: {len(rows)} rows of {path}")
            if has_gold:
                print(describe(score(probs, np.array([labels.index(row.label) for row in rows])), labels))


if __name__ == "__main__":
    main()
