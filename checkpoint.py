"""Files of a run: ckpt.pt, the model to predict with; last.pt, to resume from; summary.json.

    model, tokenizer = restore(load_checkpoint("runs/demo/ckpt.pt"))     # needs no network

ckpt.pt has the best model: "format", "weights", "encoder" (its config as JSON), "tokenizer" (its
files), "labels", "model_options" (of RelationModel), "template" (fields of data.Template),
"max_length", "negative_factor" (see metrics.scale_negative), "temperature" (see calibration.temper,
it comes after the factor), "pairs" (types of subject and object that have a relation in a training
row), and about the run "run", "data", "version", "scores". Older files lack temperature and pairs.

last.pt has the last state: "format", "weights", "optimizer", "scaler", "progress" (fields of
Progress), "settings", "hash" (of examples and encoder). The save before it is previous.pt. Both
files contain tensors and plain values only, and are read with weights_only=True: no code in them
runs.
"""

import copy
import json
import os
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields
from functools import cache
from numbers import Real
from pathlib import Path

import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, AutoTokenizer

from common import InputError, atomic_write, expect, first_line, read_json, read_text
from data import MARKERS, PROMPTS, TYPE_NAMES, Template
from distributed import Worker
from encoder import text_encoder
from model import RelationModel
from settings import TrainingSettings

MODEL_FORMAT, PROGRESS_FORMAT = "relation model 4", "training progress 2"
PROGRESS_FILES = ("last.pt", "previous.pt", "damaged.pt")


class DamagedFile(InputError):
    """The file is truncated, or not written by this project."""


def save_tensors(path: str | Path, content: dict, keep: Path | None = None):
    """torch.save, atomically; `keep` is the new name of the old file."""
    with atomic_write(path, "wb", keep) as file:
        try:
            torch.save(content, file)
        except RuntimeError as error:  # torch hides why a write failed
            if not isinstance(error.__context__, OSError):
                raise
            raise error.__context__ from error


def load_checkpoint(path: str | Path, expected: str = MODEL_FORMAT) -> dict:
    """The content of a ckpt.pt or last.pt, or of a folder that export.py wrote, on the CPU.

    InputError for anything else.
    """
    if (Path(path) / RELATION_FILE).is_file():
        return _read_folder(Path(path), expected)
    try:
        open(path, "rb").close()
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file raises any kind
        found = "truncated, or not a checkpoint of train.py"
        raise DamagedFile(f"{path}: {found}") from error
    _check_format(path, content, expected)
    return content


def _check_format(path: str | Path, content, expected: str):
    found = content.get("format") if isinstance(content, dict) else None
    if found != expected:
        needs = f"expected {expected!r}, which this version of train.py writes"
        raise InputError(f"{path}: found format {str(found)[:40]!r}, {needs}")


# --- ckpt.pt ----------------------------------------------------------------------------------

RELATION_FILE, HEAD_FILE = "relation.json", "head.safetensors"
RELATION_KEYS = {
    "labels": list, "model_options": dict, "template": dict, "max_length": int,
    "negative_factor": Real, "run": str, "data": str, "version": dict, "scores": dict,
    "tokenizer_files": list,
}  # fmt: skip


def _read_folder(folder: Path, expected: str) -> dict:
    """The content of a folder that export.py wrote, as `load_checkpoint` gives that of ckpt.pt."""
    content = read_json(folder / RELATION_FILE, "what infer.py --export writes")
    _check_format(folder / RELATION_FILE, content, expected)
    _check_relation(folder / RELATION_FILE, content)
    names = content.pop("tokenizer_files")
    content["tokenizer"] = {name: read_text(folder / Path(name).name) for name in names}
    content["encoder"] = read_text(folder / "config.json")
    weights = {}
    for file, prefix in (("model.safetensors", "encoder."), (HEAD_FILE, "")):
        try:
            found = load_file(folder / file)
        except (OSError, SafetensorError) as error:
            raise DamagedFile(f"{folder / file}: cannot be read: {first_line(error)}") from error
        weights |= {prefix + name: weight for name, weight in found.items()}
    return content | {"weights": weights}


def _check_relation(path: Path, content: dict):
    """Raise InputError if relation.json lacks a key or has a wrong value: users may edit it."""
    missing = ", ".join(key for key in RELATION_KEYS if key not in content)
    expect(not missing, path, "keys", list(content), f"{missing} too")
    for key, kind in RELATION_KEYS.items():
        expected = "a number" if kind == Real else f"the type {kind.__name__}"
        expect(isinstance(content[key], kind), path, key, content[key], expected)
    temperature = content.get("temperature", 1.0)  # older ones have none
    is_positive = isinstance(temperature, Real) and temperature > 0
    expect(is_positive, path, "temperature", temperature, "a number above 0")
    for name, known in zip(Template._fields, (MARKERS, PROMPTS, TYPE_NAMES)):
        found = content["template"].get(name)
        expect(found in known, path, f"template: {name}", found, f"one of {', '.join(known)}")


def save_checkpoint(path: str | Path, model: RelationModel, tokenizer, **content):
    """Write ckpt.pt; `content` has every other entry that the module's docstring lists.

    "weights" in it take the place of the model's.
    """
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        files = {f.name: f.read_text(encoding="utf-8") for f in Path(folder).iterdir()}
    config = json.dumps(model.encoder.config.to_dict())
    entries = {"weights": model.state_dict(), "encoder": config, "tokenizer": files}
    save_tensors(path, {"format": MODEL_FORMAT, **entries, **content})


def restore(checkpoint: dict):
    """(model in evaluation mode, tokenizer) of a ckpt.pt; needs no network."""
    try:
        with tempfile.TemporaryDirectory() as folder:
            for name, text in checkpoint["tokenizer"].items():
                if Path(name).name != name:
                    found = f"tokenizer file {name!r}"
                    raise InputError(f"{found}: expected a file name without folders")
                (Path(folder) / name).write_text(text, encoding="utf-8")
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        config = AutoConfig.for_model(**json.loads(checkpoint["encoder"]))
        encoder = AutoModel.from_config(config, dtype=torch.float32, trust_remote_code=False)
        encoder = text_encoder(encoder)
        model = RelationModel(encoder, len(checkpoint["labels"]), **checkpoint["model_options"])
    except (InputError, OSError):
        raise
    except Exception as error:  # files of a folder that somebody edited raise any kind
        run, found = checkpoint["run"], f"{type(error).__name__}: {first_line(error)}"
        raise InputError(f"the model of the run {run!r} cannot be made: {found}") from error
    try:
        model.load_state_dict(checkpoint["weights"])
    except RuntimeError as error:  # other versions may name or shape weights differently
        found = str(error).splitlines()[1].strip()[:200]
        version = f"transformers {transformers.__version__}"
        raise InputError(f"the checkpoint's weights do not fit {version}: {found}") from error
    return model.eval(), tokenizer


# --- last.pt and summary.json -----------------------------------------------------------------


@dataclass
class Progress:
    """What a run has done so far."""

    step: int = 0  # optimiser steps
    sentences: int = 0  # trained on, over all epochs
    seconds: float = 0.0  # of training
    skipped: int = 0  # steps whose gradient was not finite
    best: dict | None = None  # scores and step of the saved model
    without_gain: int = 0  # evaluations since then
    evaluations: list = field(default_factory=list)  # scores and step of each

    def out_of_patience(self, patience: int) -> bool:
        return 0 < patience <= self.without_gain


def progress_content(settings: TrainingSettings, data_hash: str, progress: Progress) -> dict:
    """The content of last.pt but for the states."""
    return {
        "format": PROGRESS_FORMAT,
        "settings": asdict(settings),
        "hash": data_hash,
        "progress": asdict(progress),
    }


def save_progress(folder: Path, content: dict, states: dict):
    """Write last.pt and rename the old one to previous.pt."""
    save_tensors(folder / "last.pt", content | states, keep=folder / "previous.pt")


@cache
def save_stream(device: torch.device):
    """One for each GPU: torch hands out 32 streams in turn, in time that of a recording too."""
    return torch.cuda.Stream(device)


class Saver:
    """Saves states: on a GPU a copy of them, in a thread, while training continues.

    The files of a large model take seconds to write. `wait` raises what a save has raised.
    """

    def __init__(self, device: torch.device):
        self.is_async, self.saves, self.failed = device.type == "cuda", [], False
        self.thread = ThreadPoolExecutor(1)
        has_gpu = self.is_async and torch.cuda.is_available()
        self.stream = save_stream(device) if has_gpu else None

    def __call__(self, states: dict, save, *arguments):
        """Call save(*arguments, states)."""
        if self.is_async:
            while len(self.saves) > 1:  # each holds a copy
                self.saves.pop(0).result()
            try:
                states = copy.deepcopy(states)
                self.saves.append(self.thread.submit(self.run, save, *arguments, states))
                return
            except torch.OutOfMemoryError:  # save the states themselves
                self.wait()
        save(*arguments, states)

    def run(self, save, *arguments):
        if self.failed:  # last.pt must not name a best model that was not written
            return
        if self.stream:  # its copies to the CPU wait for this moment, not for later steps
            self.stream.wait_stream(torch.cuda.default_stream(self.stream.device))
        try:
            with torch.cuda.stream(self.stream):
                save(*arguments)
        except BaseException:
            self.failed = True
            raise

    def wait(self):
        while self.saves:
            self.saves.pop(0).result()


def load_progress(folder: Path, settings: TrainingSettings, data_hash: str, parts: dict,
                  steps: int, worker: Worker, log) -> Progress:  # fmt: skip
    """Load the state to resume from into `parts`, and return its progress, of `steps` in all.

    Reads last.pt, or previous.pt if last.pt is damaged or missing; without either, the run starts
    from the beginning. InputError if it was saved with other settings or other data.
    """
    found = [folder / name for name in ("last.pt", "previous.pt") if (folder / name).exists()]
    for path in found:
        try:
            content = load_checkpoint(path, PROGRESS_FORMAT)
        except DamagedFile as error:
            if path is found[-1]:
                raise
            log(str(error))
            worker.barrier()  # every process must have seen the file
            if worker.rank == 0:  # the next save must not rename it to previous.pt
                os.replace(path, folder / "damaged.pt")
            continue
        _check_same_run(path, content, settings, data_hash)
        for name, part in parts.items():
            if content[name]:  # the scaler has a state in fp16 only
                part.load_state_dict(content[name])
        progress = Progress(**content["progress"])
        finished = progress.step == steps or progress.out_of_patience(settings.patience)
        found = "already finished; --fresh starts over"
        log(found if finished else f"{path}: resuming after step {progress.step}")
        return progress
    return Progress()


def _check_same_run(path: Path, content: dict, settings: TrainingSettings, data_hash: str):
    hint = "use --fresh, or another --out"
    of_train = "head" in content["settings"]
    if of_train != hasattr(settings, "head"):
        program = "train.py" if of_train else "pretrain.py"
        raise InputError(f"{path}: saved by {program}; use another --out")
    cause = "saved with other rows, targets, focal alphas or encoder"  # unless a path has changed
    for f in fields(settings):
        before = content["settings"].get(f.name, f.default)
        now = getattr(settings, f.name)
        if before in (None, now) or not f.metadata["named"]:  # None: of an older version
            continue
        found = f"saved with {f.name} = {before!r}, now {now!r}"
        if f.name not in ("data", "valid"):
            raise InputError(f"{path}: {found}; {hint}")
        cause = f"{found}, which has other rows"
    if content["hash"] != data_hash:
        raise InputError(f"{path}: {cause}; {hint}")


def write_summary(folder: Path, settings, progress: Progress, about: dict, finished: bool):
    """Write summary.json: scores, settings, and what the task says about its data."""
    summary = {"run": folder.name, "finished": finished, **asdict(progress), **about}
    with atomic_write(folder / "summary.json") as file:
        json.dump(summary | {"settings": asdict(settings)}, file, ensure_ascii=False, indent=1)


def remove_progress(folder: Path):
    """Delete what a run would resume from, and its TensorBoard events."""
    for path in [folder / name for name in PROGRESS_FILES] + [*folder.glob("events.out.tfevents*")]:
        path.unlink(missing_ok=True)
