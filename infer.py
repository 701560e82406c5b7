"""Predicts with a checkpoint of train.py: a whole file, or one sentence.

    python infer.py runs/demo/ckpt.pt                            # test_data.csv of the folder it was trained from
    python infer.py CKPT --data test.csv --out out/mine.csv      # another file; its metrics too, if it has gold labels
    python infer.py A/ckpt.pt B/ckpt.pt                          # the mean of their probabilities
    python infer.py CKPT --sentence "비틀즈는 조지 해리슨이 …" --subject "비틀즈:ORG" --object "조지 해리슨:PER"
    torchrun --nproc_per_node=4 infer.py CKPT                    # the same file, four GPUs

Writes the competition's id,pred_label,probs, rows in the order of the input. train.py evaluates by `predict` too.
"""

import argparse
import ctypes
import gc
import os
import signal
import sys
import time
import traceback
import warnings
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import transformers
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from data import (
    KLUE_LABELS,
    TYPE_NAMES,
    Entity,
    InputError,
    Parser,
    Row,
    Template,
    data_file,
    exit_on_bad_input,
    is_text,
    read_rows,
    with_known_labels,
)
from metrics import describe, score, write_predictions
from model import Example, RelationModel, collate, encode, load_checkpoint, restore, to_device, within_tokens

# --- where it runs -----------------------------------------------------------------------------------------------


@dataclass
class Machine:
    """The device of this process and its place among those that torchrun started (rank 0 of 1 without torchrun)."""

    device: torch.device
    amp: torch.dtype | None  # what autocast computes in
    rank: int = 0
    world_size: int = 1

    def in_precision(self, amp: str) -> "Machine":
        """This machine computing in auto, off, bf16 or fp16. auto is the same on all processes, whatever the others'
        devices can do: gradients that fp16 has scaled on some of them only cannot be added up."""
        cuda = self.device.type == "cuda"
        if amp == "auto":
            if cuda:
                has_bf16 = torch.cuda.get_device_capability(self.device) >= (8, 0)
            else:
                has_bf16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
            amp = "bf16" if not self.any(not has_bf16) else "fp16" if cuda else "off"
        return replace(self, amp={"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}[amp])

    def autocast(self):
        return torch.autocast(self.device.type, dtype=self.amp, enabled=self.amp is not None)

    def distribute(self, model: torch.nn.Module) -> torch.nn.Module:
        """The model, wrapped so that the backward pass exchanges gradients where there are several processes."""
        with warnings.catch_warnings():  # torch 2.13 has another name for it, which those before do not know
            warnings.filterwarnings("ignore", "`broadcast_buffers`", FutureWarning)
            return DistributedDataParallel(model, broadcast_buffers=False) if self.world_size > 1 else model

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum of a tensor over all processes, in place."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def any(self, holds: bool) -> bool:
        """Whether something holds on any process. Costs no wait for a GPU: it is asked over the CPU."""
        if self.world_size == 1:
            return holds
        flag = torch.tensor(int(holds))
        dist.all_reduce(flag)
        return flag.item() > 0

    def barrier(self):
        self.any(False)


def restarts() -> int:
    """How often torchrun has started this process again; each node counts for itself."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


@contextmanager
def running(amp: str):
    """Yields this process's Machine, joined to the others of torchrun for the length of the block; `amp`: auto,
    off, bf16 or fp16."""
    cuda, place = torch.cuda.is_available(), int(os.environ.get("LOCAL_RANK", "0"))
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if cuda and here > torch.cuda.device_count():
        raise InputError(f"torchrun --nproc_per_node: found {here}, expected at most {torch.cuda.device_count()} GPUs")
    device = torch.device("cuda", place) if cuda else torch.device("cpu")
    machine = Machine(device, None)
    if cuda:
        torch.cuda.set_device(device)
    elif sys.platform == "linux":
        # glibc would hand large blocks back to the system after each use; fetching them anew costs a tenth of the time
        mallopt = getattr(ctypes.CDLL(None), "mallopt", lambda *_: None)  # other libcs have none
        mallopt(-3, 2**30)  # M_MMAP_THRESHOLD
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
    if "RANK" not in os.environ:
        yield machine.in_precision(amp)
        return
    if not cuda and os.environ.get("OMP_NUM_THREADS", "1") == "1":  # what torchrun sets where nobody else has
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // here))
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    store, rank, world_size = next(rendezvous("env://"))
    # torchrun's store outlives a restart: what the processes before have left there must not be taken for fresh
    # (pytorch issue 135712)
    life = restarts() if world_size == here else ""
    dist.init_process_group(backend, store=dist.PrefixStore(f"life {life}", store), rank=rank, world_size=world_size)
    failed = False
    try:
        yield replace(machine, rank=rank, world_size=world_size).in_precision(amp)
    except BaseException as end:
        failed = isinstance(end, Exception)
        traceback.clear_frames(end.__traceback__)
        raise
    finally:
        # a DistributedDataParallel that outlives the group ends gloo's threads while it holds the interpreter's lock,
        # which they may be waiting for: none is left, in a frame or a cycle
        gc.unfreeze()
        gc.collect()
        if not (cuda and failed):  # NCCL's end waits for all processes, and this one may have failed alone
            dist.destroy_process_group()


class StopSignal:
    """Remembers a SIGTERM or SIGINT, so that the step in hand is finished and saved. A second one, unless it comes
    within a second (a launcher may pass on what was sent to this process already), ends the program at once."""

    def __init__(self):
        self.number, self.when = 0, 0.0
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.catch)

    def catch(self, number, frame):
        if self.number and time.monotonic() - self.when > 1:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        if not self.number:
            self.number, self.when = number, time.monotonic()


@torch.inference_mode()
def predict(model: RelationModel, examples: list[Example], machine: Machine, max_tokens=16384):
    """Probabilities (N, n_labels) as float64, in the order of the examples and not scaled, all of them on every rank,
    which computes a part. On a CPU it takes at most 4,096 tokens at a time. InputError where some are not finite."""
    model.eval()
    if machine.device.type == "cpu":
        max_tokens = min(max_tokens, 4096)  # these stay in the caches: a tenth faster than 16,384
    lengths = np.array([len(e.ids) for e in examples])
    batches = within_tokens(np.arange(len(examples)), lengths, max_tokens)[machine.rank :: machine.world_size]
    probs = torch.zeros(len(examples), model.classifier.out_features, dtype=torch.float64, device=machine.device)
    for indices in tqdm(batches, unit="batch", leave=False, disable=machine.rank > 0 or None):  # None: on a terminal
        batch = collate(examples, indices).to(machine.device)
        with machine.autocast():
            logits = model(batch)
        probs[to_device(torch.from_numpy(batch.indices), machine.device)] = logits.double().softmax(1)
    probs = machine.sum(probs).cpu().numpy()
    if not np.isfinite(probs).all():
        n_bad = (~np.isfinite(probs)).any(1).sum()
        raise InputError(f"{n_bad} rows have probabilities that are not finite; try --amp off")
    return probs


def negative_factor(probs: np.ndarray, share: float) -> float:
    """What the probability of the negative label, the first, is to be multiplied by so that `share` of these rows
    (rows, labels) have it as the likeliest.

    A model trained where 29 % of the rows have no relation finds too many relations where 60 % have none (Saerens et
    al. 2002, Adjusting the outputs of a classifier to new a priori probabilities). Here it is the share of the
    predictions that is set, since a model is less sure of rows unlike those it was trained on.
    """
    needed = probs[:, 1:].max(1) / np.maximum(probs[:, 0], 1e-9)  # factors from which on a row is negative
    return float(np.quantile(needed, share))


def scale_negative(probs: np.ndarray, factor: float) -> np.ndarray:
    """The probabilities (rows, labels) with the first label's multiplied by `factor`, each row summing to 1 again."""
    scaled = probs.copy()
    scaled[:, 0] *= factor
    return scaled / scaled.sum(1, keepdims=True)


# --- the program -------------------------------------------------------------------------------------------------


def parse_arguments() -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", nargs="+", help="ckpt.pt of a run of train.py; of several, the mean is taken")
    parser.add_argument("--data", help="file to predict; default: test_data.csv of the first one's data folder")
    parser.add_argument("--out", help="file to write; default: out/<name of the run>.csv, A+B of two, A+2 of three")
    parser.add_argument("--sentence", help="predict this sentence instead of a file")
    parser.add_argument("--subject", help="its subject as WORD:TYPE, or WORD for models without types")
    parser.add_argument("--object", help="its object, likewise; the first place in the sentence counts")
    parser.add_argument("--amp", default="auto", choices=("auto", "off", "bf16", "fp16"), help="precision (auto)")
    parser.add_argument("--max-tokens", type=int, default=16384, help="tokens at a time on a device (16384)")
    arguments = parser.parse_args()
    one = (arguments.sentence, arguments.subject, arguments.object)
    if any(one) and not all(one):
        raise InputError("--sentence, --subject and --object go together")
    if any(one) and not is_text("".join(one)):
        raise InputError("--sentence, --subject, --object: found bytes that are not UTF-8")
    if any(one) and (arguments.data or arguments.out):
        raise InputError("--sentence prints its prediction; --data and --out are for files")
    if arguments.max_tokens < 1:
        raise InputError(f"--max-tokens: found {arguments.max_tokens}, expected at least 1")
    return arguments


def entity_of(sentence: str, text: str, option: str, types: list[str] | None) -> Entity:
    """The entity that WORD:TYPE names, at the word's first place in the sentence. A word may hold colons itself.
    `types`: those there are, None for any."""
    word, _, kind = text.rpartition(":")
    if not word or word not in sentence or (text in sentence and kind not in (types or ())):
        word, kind = text, ""
    if word not in sentence:
        raise InputError(f"{option}: found {text!r}, expected WORD:TYPE; this word is not in the sentence")
    if kind and types and kind not in types:
        raise InputError(f"{option}: found type {kind!r}, expected one of {', '.join(types)}")
    start = sentence.index(word)
    return Entity(word, start, start + len(word) - 1, kind or None)


def mean_of(paths: list[str], rows: list[Row], machine: Machine, max_tokens: int) -> np.ndarray:
    """The mean of the checkpoints' probabilities (rows, labels), on every rank; one model at a time is in memory."""
    return sum(predict_rows(load_checkpoint(path), rows, machine, max_tokens) for path in paths) / len(paths)


def predict_rows(checkpoint: dict, rows: list[Row], machine: Machine, max_tokens: int) -> np.ndarray:
    """Probabilities (rows, labels) on every rank, the negative label's scaled as the checkpoint says."""
    settings = checkpoint["settings"]
    model, tokenizer = restore(checkpoint)
    template = Template(settings["marker"], settings["prompt"], settings["type_names"])
    examples, n_cut = encode(rows, template, tokenizer, checkpoint["labels"], settings["max_length"])
    if n_cut and machine.rank == 0:
        print(f"{n_cut} sentences cut to {settings['max_length']} tokens")
    probs = predict(model.to(machine.device), examples, machine, max_tokens)
    return scale_negative(probs, checkpoint["negative_factor"])


@exit_on_bad_input
def main():
    arguments = parse_arguments()
    about = []
    for path in arguments.checkpoints:
        checkpoint = load_checkpoint(path)
        about.append({key: checkpoint[key] for key in ("run", "data", "labels")})
        if about[-1]["labels"] != about[0]["labels"]:
            raise InputError(f"{path}: its labels, or their order, are not those of {arguments.checkpoints[0]}")
    del checkpoint
    labels = about[0]["labels"]
    transformers.logging.set_verbosity_error()
    with running(arguments.amp) as machine:
        if arguments.sentence:
            types = list(TYPE_NAMES["en"]) if set(labels) == set(KLUE_LABELS) else None
            subject = entity_of(arguments.sentence, arguments.subject, "--subject", types)
            object = entity_of(arguments.sentence, arguments.object, "--object", types)
            if subject[1:3] == object[1:3]:
                raise InputError("--object: expected another place in the sentence than the subject's")
            row = Row("0", arguments.sentence, subject, object, None, "", "--sentence")
            probs = mean_of(arguments.checkpoints, [row], machine, arguments.max_tokens)[0]
            if machine.rank == 0:
                print(*(f"{probs[i]:.4f}  {labels[i]}" for i in np.argsort(-probs)[:5]), sep="\n")
            return

        path = arguments.data or data_file(about[0]["data"], "test_data")
        rows = read_rows(path)
        n_gold = sum(row.label is not None for row in rows)
        if n_gold == len(rows):
            rows = with_known_labels(rows, labels)
        names = [Path(run["run"]).name.strip(".") or "run" for run in about]  # whoever made it: no folders
        name = "+".join(names) if len(names) < 3 else f"{names[0]}+{len(names) - 1}"  # a file's name has its limits
        out = Path(arguments.out or f"out/{name}.csv")
        probs = mean_of(arguments.checkpoints, rows, machine, arguments.max_tokens)
        if machine.rank == 0:
            write_predictions(out, [row.id for row in rows], [labels[c] for c in probs.argmax(1)], probs)
            print(f"{out}: {len(rows)} rows of {path}")
            if n_gold == len(rows):
                print(describe(score(probs, np.array([labels.index(row.label) for row in rows])), labels))
            elif n_gold:
                print(f"no scores: {n_gold} of the rows have a label, the others none")


if __name__ == "__main__":
    main()
