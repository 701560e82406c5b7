"""Trains a relation classifier: encoder and head, in a loop written out below.

    python train.py --demo                                       # a tiny encoder on tests/sample, no network, no GPU
    python train.py                                              # KLUE-RE in data/ with klue/roberta-large, one GPU
    torchrun --nproc_per_node=4 train.py --head bilstm           # another head; four GPUs share a batch of 64
    python train.py --model DIR --batch-size 32 --limit 8000     # another encoder, some of the rows
    python train.py --objective mlm --out runs/tapt              # pre-training on the sentences; then
    python train.py --model runs/tapt/encoder                    # the encoder that it leaves
    python train.py -h                                           # all settings

A run leaves runs/<name>/: ckpt.pt (the best evaluation's model, all that infer.py needs), valid.csv (its predictions
on the validation rows), summary.json, what TensorBoard shows, and last.pt, from which the same command goes on.
With --objective mlm it leaves encoder/ in place of the first two.
"""

import argparse
import gc
import json
import math
import os
import re
import shutil
import signal
import sys
import time
from dataclasses import asdict, dataclass, field, fields, replace
from hashlib import sha256
from pathlib import Path

import numpy as np
import torch
import transformers
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

import data
from data import MARKERS, PROMPTS, TYPE_NAMES, InputError, Row, Template, atomic_write
from infer import Machine, StopSignal, negative_factor, predict, restarts, running, scale_negative
from metrics import describe, score, write_predictions
from model import (
    PROGRESS_FORMAT,
    DamagedFile,
    FlatEncoder,
    MaskedLanguageModel,
    RelationModel,
    add_markers,
    collate,
    collate_masked,
    encode,
    encode_sentences,
    load_checkpoint,
    load_encoder,
    load_language_model,
    load_tokenizer,
    n_masked,
    relation_loss,
    save_checkpoint,
    save_encoder,
    save_tensors,
    to_device,
    within_tokens,
)
from tests.sample.tiny_encoder import make_tiny_encoder

DATA_SEED = 42  # of --limit and the split: runs of several seeds are compared on the same rows
LOG_EVERY = 10  # steps between two readings of the loss
# what --preset stands for; options given beside it come on top
PRESETS = {
    "recommended": {},
    "report": {"head": "cls", "lr": 2e-5, "layer_decay": 1.0},
}
PROGRESS_FILES = ("last.pt", "previous.pt", "damaged.pt")
BAD_STEPS = 20  # skipped in a row that stop a run; fp16 skips a few at its start until it has found its scale


def setting(default, help: str, *allowed, bare=None):
    """A field of Settings; allowed: the choices of a text, the limits of a number; bare: what the option means where
    no value follows it."""
    return field(default=default, metadata={"help": help, "allowed": allowed, "bare": bare})


@dataclass
class Settings:
    """All settings of a run; the command line is made of it, --no-NAME turns a switch off."""

    preset: str = setting("recommended", "what to start from; report: head and rates of the wrap-up report", *PRESETS)
    # data
    data: str = setting("data", "folder with train.csv and test_data.csv (or .json, .jsonl), the training file, or "
                        "hub:OWNER/NAME@REVISION[:CONFIG]")  # fmt: skip
    valid: str = setting("", "file to validate on, instead of a split of the training rows; none: train on all of them")
    split: str = setting("test-like", "9:1, like the test set as far as that can be; or 8:2", "test-like", "stratified")
    folds: int = setting(0, "validate on one of this many folds, of whole sentences, instead; 0: none", 0, math.inf)
    fold: int = setting(0, "which fold to validate on, from 0", 0, math.inf)
    no_relation_share: float = setting(0.0, "share of the negative label in test-like validation rows and predictions; "
                                       "0: 0.6 for KLUE-RE's labels, for others that of the file", 0, 1)  # fmt: skip
    clean: bool = setting(True, "leave out repeated training rows and settle those that contradict each other")
    skip_bad_rows: bool = setting(False, "leave wrong rows out and count them, instead of stopping at the first")
    negative_label: str = setting("no_relation", "the label that means none of the others")
    limit: int = setting(0, "use this many of the training rows (mlm: of all sentences), the same ones for every seed; "
                         "0: all", 0, math.inf)  # fmt: skip
    # input
    marker: str = setting("typed_entity_marker_punct", "how the entities are marked", *MARKERS)
    prompt: str = setting("s_and_o", "what is said beside the sentence", *PROMPTS)
    type_names: str = setting("en", "language of the entity types in typed markers", *TYPE_NAMES)
    max_length: int = setting(256, "tokens of an input; longer ones lose what is far from the entities", 64, math.inf)
    # model
    objective: str = setting("relation", "what is learned; mlm: masked tokens of the sentences, before fine-tuning",
                             "relation", "mlm")  # fmt: skip
    model: str = setting("klue/roberta-large", "encoder: a folder, or a name on the Hugging Face hub")
    head: str = setting("entity", "what reads the encoder's states", "cls", "entity", "bilstm", "bigru")
    norm: str = setting("layer", "normalisation before the classifier", "layer", "batch", "none")
    gelu: bool = setting(False, "a GELU before the classifier")
    dropout: float = setting(0.0, "dropout before the classifier (the encoder has its own)", 0, 0.99)
    entity_embedding: str = setting("none", "learned vectors added to the input embeddings; plain, which the option "
                                    "alone means: for subject, object, neither; typed: for their types too",
                                    "none", "plain", "typed", bare="plain")  # fmt: skip
    # optimisation
    batch_size: int = setting(64, "sentences an optimiser step, over all processes together", 1, math.inf)
    epochs: int = setting(5, "times that every training row is seen", 1, math.inf)
    lr: float = setting(0.0, "highest learning rate; 0: 4e-5 for 1,024 hidden units, more for fewer", 0, math.inf)
    layer_decay: float = setting(0.0, "factor of the learning rate from a layer to the one below; 0: 0.85 in an "
                                 "encoder of 12 layers, in others the same top to bottom (mlm: 1)", 0, 1)  # fmt: skip
    warmup_ratio: float = setting(0.06, "share of the steps in which the learning rate rises; then it falls to 0", 0, 1)
    beta2: float = setting(0.98, "AdamW's second beta", 0, 0.999999)
    weight_decay: float = setting(0.01, "AdamW's weight decay (none on biases and norms)", 0, math.inf)
    clip_norm: float = setting(1.0, "gradients of a larger norm are scaled down to this; 0: not at all", 0, math.inf)
    label_smoothing: float = setting(0.0, "share of the target spread over all labels", 0, 1)
    focal_gamma: float = setting(0.0, "gamma of the focal loss; 0: cross entropy", 0, math.inf)
    focal_alpha: str = setting("", "JSON file {label: alpha} of the focal loss; labels not in it have 1")
    seed: int = setting(42, "of the order of batches, new weights and dropout", 0, 2**32 - 1)
    seeds: int = setting(1, "one run for each of this many seeds from --seed on, and the mean of their scores", 1, 100)
    # the run
    amp: str = setting("auto", "mixed precision; auto: bf16, or without it fp16 on GPUs and off on CPUs",
                       "auto", "off", "bf16", "fp16")  # fmt: skip
    max_tokens: int = setting(16384, "tokens at a time on a device; a larger batch is accumulated", 1, math.inf)
    compile: bool = setting(False, "torch.compile of the encoder's layers; for GPUs, on CPUs it is slower")
    eval_every: int = setting(0, "steps between evaluations; 0: at the end of each epoch", 0, math.inf)
    best_metric: str = setting("micro_f1", "which score decides what ckpt.pt holds", "micro_f1", "auprc")
    patience: int = setting(0, "stop after this many evaluations without a better score; 0: never", 0, math.inf)
    save_every: int = setting(0, "steps between saves of last.pt, to go on from; 0: at each evaluation", 0, math.inf)
    out: str = setting("", "run folder; default: runs/<name made of the settings>")
    resume: bool = setting(False, "insist on going on from last.pt, which happens by itself where there is one")
    fresh: bool = setting(False, "start over even if the run folder has a last.pt")
    deterministic: bool = setting(False, "the same bits each time on a GPU too, at some cost in speed")
    demo: bool = setting(False, "a tiny encoder, trained from nothing on tests/sample in under two minutes")

    def check(self):
        """Raises InputError for settings that cannot be, before anything is loaded."""
        for f in fields(self):
            value, allowed = getattr(self, f.name), f.metadata["allowed"]
            if f.type in (int, float) and not (math.isfinite(value) and allowed[0] <= value <= allowed[1]):
                raise InputError(f"{flag(f.name)}: found {value}, expected {allowed[0]} to {allowed[1]}")
        if self.label_smoothing and (self.focal_gamma or self.focal_alpha):
            raise InputError("--label-smoothing goes with cross entropy, not with --focal-gamma or --focal-alpha")
        if self.folds and (self.valid or self.folds == 1):
            raise InputError(f"--folds {self.folds}: expected 2 or more, and no --valid")
        if self.fold and self.fold >= self.folds:
            raise InputError(f"--fold {self.fold}: expected less than --folds, {self.folds}")
        if self.folds and self.objective == "mlm":
            raise InputError("--folds is for relations; with --objective mlm a tenth of the sentences is held out")
        if self.patience and self.valid == "none":
            raise InputError("--patience waits for better scores, and with --valid none there are none")
        compiler = (os.environ.get("CXX", "").split() or ["g++"])[0]
        if self.compile and not shutil.which(compiler):
            raise InputError(f"--compile needs a C++ compiler: found no {compiler}")
        if self.resume and self.fresh:
            raise InputError("--resume and --fresh contradict each other")

    def name(self) -> str:
        """The run's name: encoder, head, and the settings not at their defaults that say what is optimised."""
        model = Path(self.model)
        name = model.parent.name if model.name == "encoder" else ""  # as of runs/tapt/encoder
        parts = [name or model.name, self.head]
        for f in fields(self):
            value = getattr(self, f.name)
            if value != f.default and f.name not in ("model", "head", *NOT_OPTIMISATION):
                value = Path(value).name if "/" in str(value) else value
                parts.append(f.name if value is True else f"no_{f.name}" if value is False else f"{f.name}={value}")
        return "-".join(parts)

    def test_like(self) -> bool:
        """Whether rows split off, and predictions (with --valid too), are to be like KLUE-RE's test set."""
        return self.split == "test-like" and not self.folds

    def folder(self) -> Path:
        return Path(self.out) if self.out else Path("runs") / self.name()


# settings that do not say what is optimised: not in a run's name, and free to change when it goes on
NOT_OPTIMISATION = ("preset", "seeds", "max_tokens", "compile", "eval_every", "save_every", "out", "resume", "fresh",
                    "demo", "deterministic")  # fmt: skip
DEMO = {"data": str(Path(__file__).parent / "tests" / "sample"), "out": "runs/demo", "split": "stratified",
        "batch_size": 32, "epochs": 8, "lr": 1e-3, "layer_decay": 1.0}  # fmt: skip


def flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    pass


def parse_settings(arguments: list[str] | None = None) -> Settings:
    """Settings from the command line (sys.argv by default)."""
    parser = data.Parser("train.py", description=__doc__, formatter_class=Help, allow_abbrev=False)
    for f in fields(Settings):
        how = {"type": f.type, "choices": f.metadata["allowed"] or None} if f.type is str else {"type": f.type}
        if f.metadata["bare"]:
            how |= {"nargs": "?", "const": f.metadata["bare"]}
        if f.type is bool:
            how = {"action": argparse.BooleanOptionalAction}
        parser.add_argument(flag(f.name), default=f.default, help=f.metadata["help"], **how)
    first = parser.parse_args(arguments)
    parser.set_defaults(**PRESETS[first.preset] | (DEMO if first.demo else {}))
    settings = Settings(**vars(parser.parse_args(arguments)))
    if settings.demo:
        if settings.model != Settings.model:
            raise InputError(f"--model {settings.model}: --demo makes an encoder of its own")
        settings.model = str(settings.folder() / "tiny_encoder")
    settings.check()
    return settings


# --- what is learned ---------------------------------------------------------------------------------------------


def choose_rows(settings: Settings, say) -> tuple[list[Row], list[Row], list[Row], float, list[str], dict]:
    """(training rows, validation rows, rows on which the negative label's scaling is found, its share there, labels,
    version of the data), as the settings say; `say` prints what is done."""
    skipped = [] if settings.skip_bad_rows else None
    path = data.data_file(settings.data, "train")
    rows = data.read_rows(path, skipped)
    version = data.version(settings.data, rows)
    labels = data.find_labels(rows, settings.negative_label)
    rows = data.with_known_labels(rows, labels, skipped)
    if not rows:
        raise InputError(f"{path}: none of its rows can be trained on; the first bad one: {skipped[0]}")
    say(f"{path}: {len(rows)} rows, {len(labels)} labels")
    if settings.clean:
        rows, removed = data.clean(rows, labels[0])
        say(f"cleaning removed {len(removed)} repeated or contradicting rows")
    usual = 0.6 if labels == data.KLUE_LABELS else sum(row.label == labels[0] for row in rows) / len(rows)
    share = settings.no_relation_share or usual
    like = data.rows_to_predict(settings.data, skipped) if settings.test_like() else []
    if settings.valid == "none":
        valid = []
    elif settings.valid:
        valid = data.with_known_labels(data.read_rows(settings.valid, skipped), labels, skipped)
        held_out, n = {row.sentence for row in valid}, len(rows)
        rows = [row for row in rows if row.sentence not in held_out]
        if len(rows) < n:
            say(f"left out {n - len(rows)} rows whose sentences are in {settings.valid} too")
    elif settings.folds:
        rows, valid = data.fold(rows, settings.folds, settings.fold, DATA_SEED)
    elif settings.test_like():
        rows, valid = data.split(rows, labels, 0.11, DATA_SEED, share, like)
    else:
        rows, valid = data.split(rows, labels, 0.2, DATA_SEED)
    rows = subsample(rows, settings.limit or len(rows))
    if skipped:
        say(f"left out {len(skipped)} bad rows, the first: {skipped[0]}")
    if not rows or (not valid and settings.valid != "none"):
        raise InputError(f"{path}: {len(rows)} rows to train on and {len(valid)} to validate on, expected some of each")
    return rows, valid, (like or valid) if settings.test_like() else [], share, labels, version


def subsample(rows: list, n: int) -> list:
    """At most n of the rows or sentences, the same ones each time."""
    return [rows[i] for i in sorted(np.random.default_rng(DATA_SEED).permutation(len(rows))[:n])]


def focal_alpha(settings: Settings, labels: list[str], device: torch.device) -> torch.Tensor | None:
    """The alpha of each label, or None."""
    if not settings.focal_alpha:
        return None
    expected = "a JSON object {label: alpha}"
    given = data.read_json(settings.focal_alpha, expected)
    try:
        unknown = [label for label in given if label not in labels]
        if unknown:
            raise ValueError(f"{unknown[0]!r} is none of the labels")
        return torch.tensor([float(given.get(label, 1)) for label in labels], device=device)
    except (ValueError, TypeError, AttributeError) as error:
        raise InputError(f"{settings.focal_alpha}: expected {expected}: {error}") from error


class Task:
    """What a run learns: examples, a model for them, a loss and scores. On each process.

    A task sets lengths and n_targets, of each training example the tokens and the terms of its loss (N,); hash, of all
    that the training depends on beside the settings; about, the data's version and more for summary.json. It has loss
    (a sum), evaluate (on every rank; {} where nothing is scored), merit (more is better), describe, save and
    next_commands.
    """

    decay_of_12_layers = 0.85  # of the learning rate

    def __init__(self, settings: Settings, machine: Machine, say):
        self.settings, self.machine, self.say = settings, machine, say

    def load_tokenizer(self, texts):
        """The tokenizer; of a demo also the encoder is made, from the texts."""
        if self.settings.demo and self.machine.rank == 0:
            make_tiny_encoder(self.settings.model, texts, self.settings.seed)
        self.machine.barrier()
        return load_tokenizer(self.settings.model)

    def tell_lengths(self, what: str, n_valid: int, n_cut: int):
        mean = self.lengths.mean()
        self.say(f"{len(self.lengths)} {what} to train on, {n_valid} to validate on; mean {mean:.0f} tokens; "
                 f"{n_cut} cut to {self.settings.max_length}")  # fmt: skip

    def set_model(self, model: FlatEncoder):
        """Takes the model to its device, once it is sure that it can read as many tokens; chooses the learning rates
        where that is left to it, by width as ELECTRA's for its sizes (Clark et al. 2020)."""
        if self.settings.max_length > model.longest:
            found = f"{self.settings.model} takes at most {model.longest} tokens"
            raise InputError(f"--max-length {self.settings.max_length}: {found}")
        encoder = model.encoder.config
        rate = self.settings.lr or float(f"{4e-5 * (1024 / encoder.hidden_size) ** 2:.2g}")
        decay = self.settings.layer_decay or round(self.decay_of_12_layers ** (12 / encoder.num_hidden_layers), 3)
        self.settings = replace(self.settings, lr=rate, layer_decay=decay)
        lower = "in all layers" if decay == 1 else f"at the top, {decay} times that from each layer to the one below"
        self.say(f"learning rate {rate} {lower}")
        self.model = model.to(self.machine.device)
        if self.settings.compile:
            self.say("the encoder's layers are compiled at the first steps, which may take a minute")
            self.model.compile_layers()

    def log(self, writer: SummaryWriter, step: int):
        """Shows TensorBoard what the last evaluation has found beside its scores."""


def fingerprint(model: FlatEncoder, tokenizer) -> str:
    """Tells encoders apart that were at the same place at different times: the bits of their weights, added up, and
    the tokenizer. (The input embeddings are left out: those of added tokens are means, whose rounding depends on the
    number of threads.)"""
    parameters = (p for p in model.encoder.parameters() if p is not model.encoder.get_input_embeddings().weight)
    return f"{sum(int(p.detach().view(torch.int32).sum()) for p in parameters)} {tokenizer.backend_tokenizer.to_str()}"


class Relations(Task):
    """The relation between two entities, of labelled rows."""

    def __init__(self, settings: Settings, machine: Machine, say):
        super().__init__(settings, machine, say)
        rows, self.valid_rows, scaling_rows, share, self.labels, version = choose_rows(settings, say)
        self.settings = replace(settings, no_relation_share=share)
        self.about = {"version": version, "labels": self.labels}
        template = Template(settings.marker, settings.prompt, settings.type_names)

        # rows to token ids
        self.tokenizer = self.load_tokenizer(" ".join(template.render(row)[:3]) for row in rows)
        known = len(self.tokenizer)
        add_markers(self.tokenizer, template, rows)
        scaling_rows = subsample(scaling_rows, 1000)
        (self.examples, n_cut), (self.valid, n_valid_cut), (self.scaling_examples, _) = (
            encode(part, template, self.tokenizer, self.labels, settings.max_length)
            for part in (rows, self.valid_rows, scaling_rows)
        )
        self.gold = np.array([e.label for e in self.valid])
        self.lengths, self.n_targets = np.array([len(e.ids) for e in self.examples]), np.ones(len(rows), dtype=int)
        self.tell_lengths("rows", len(self.valid), n_cut + n_valid_cut)

        torch.manual_seed(settings.seed)
        encoder = load_encoder(settings.model, range(known, len(self.tokenizer)))
        shape = (settings.head, settings.norm, settings.gelu, settings.dropout, settings.entity_embedding)
        self.set_model(RelationModel(encoder, len(self.labels), *shape))
        self.alpha = focal_alpha(settings, self.labels, machine.device)
        used = [fingerprint(self.model, self.tokenizer), version["content"], [row.id for row in rows], self.labels]
        used += [[row[:-1] for row in part] for part in (self.valid_rows, scaling_rows)]
        self.hash = sha256(repr([*used, self.alpha is None or self.alpha.tolist()]).encode()).hexdigest()

    def loss(self, model, indices: np.ndarray, step: int) -> torch.Tensor:
        """The sum of the losses of these examples."""
        batch = collate(self.examples, indices).to(self.machine.device)
        with self.machine.autocast():
            logits = model(batch)
        smoothing, gamma = self.settings.label_smoothing, self.settings.focal_gamma
        return relation_loss(logits, batch.labels, smoothing, gamma, self.alpha).sum()

    def evaluate(self, max_tokens: int) -> dict:
        """Scores on the validation rows; none where there are no such rows."""
        n, share = len(self.valid), self.settings.no_relation_share
        probs = predict(self.model, self.valid + self.scaling_examples, self.machine, max_tokens)
        self.negative_factor = negative_factor(probs[n:], share) if self.scaling_examples else 1.0
        if self.scaling_examples:
            factor = f"its probability times {self.negative_factor:.2f}"
            self.say(f"{self.labels[0]}: {factor}, so that {share:.0%} of the predictions are it")
        self.probs = scale_negative(probs[:n], self.negative_factor)
        return score(self.probs, self.gold) if self.valid else {}

    def merit(self, scores: dict) -> float:
        return scores[self.settings.best_metric]

    def describe(self, scores: dict) -> str:
        return describe(scores, self.labels)

    def save(self, folder: Path, scores: dict):
        """Writes the model, and its predictions as `evaluate` has made them."""
        version, found = self.about["version"], self.settings.data
        if not version["revision"]:
            found = str(data.data_file(found, "train").parent.resolve())
        save_checkpoint(
            folder / "ckpt.pt", self.model, self.tokenizer, self.labels, settings=asdict(self.settings),
            run=folder.name, scores=scores, negative_factor=self.negative_factor, data=found, version=version,
        )  # fmt: skip
        if self.valid:
            ids, gold = [row.id for row in self.valid_rows], [row.label for row in self.valid_rows]
            predicted = [self.labels[c] for c in self.probs.argmax(1)]
            write_predictions(folder / "valid.csv", ids, predicted, self.probs, gold)
        else:
            (folder / "valid.csv").unlink(missing_ok=True)  # an earlier run's

    def log(self, writer: SummaryWriter, step: int):
        from report import log_evaluation  # what draws takes a second to import, which the start need not wait for

        log_evaluation(writer, step, self.probs, self.gold, self.labels, self.valid_rows)

    @staticmethod
    def next_commands(folders: list[Path]) -> str:
        return f"  python infer.py {' '.join(str(f / 'ckpt.pt') for f in folders)}\n  python ensemble.py out/*.csv"


class MaskedTokens(Task):
    """Masked tokens of the sentences to train and to predict on, which goes on with the encoder's pre-training
    (Gururangan et al. 2020). No labels, marks or prompts."""

    decay_of_12_layers = 1.0

    def __init__(self, settings: Settings, machine: Machine, say):
        super().__init__(settings, machine, say)
        sentences, valid, version = choose_sentences(settings, say)
        self.about = {"version": version}
        self.tokenizer = self.load_tokenizer(sentences)
        if self.tokenizer.mask_token is None:
            raise InputError(f"--objective mlm: the tokenizer of {settings.model} has no token to mask with")
        self.examples, n_cut = encode_sentences(sentences, self.tokenizer, settings.max_length)
        self.valid, n_valid_cut = encode_sentences(valid, self.tokenizer, settings.max_length)
        self.lengths = np.array([len(e.ids) for e in self.examples])
        self.n_targets = np.array([n_masked(example) for example in self.examples])
        self.tell_lengths("sentences", len(valid), n_cut + n_valid_cut)

        torch.manual_seed(settings.seed)
        language_model, head_is_new = load_language_model(settings.model)
        self.set_model(MaskedLanguageModel(language_model))
        if head_is_new:
            say("the encoder has no head for masked tokens: a new one, tied to its embeddings, learns with it")
        self.hash = sha256(repr([fingerprint(self.model, self.tokenizer), sentences, valid]).encode()).hexdigest()

    def loss(self, model, indices: np.ndarray, step: int) -> torch.Tensor:
        """The sum of the losses of these examples' masked tokens, other ones at each step."""
        return self.loss_of(model, self.examples, indices, [self.settings.seed, step])

    def loss_of(self, model, examples, indices, key: list[int]) -> torch.Tensor:
        batch, *masked = collate_masked(examples, indices, key, self.tokenizer)
        places, true = (to_device(tokens, self.machine.device) for tokens in masked)
        with self.machine.autocast():
            logits = model(batch.to(self.machine.device), places)
        return torch.nn.functional.cross_entropy(logits.float(), true, reduction="sum")

    @torch.inference_mode()
    def evaluate(self, max_tokens: int) -> dict:
        """Mean loss and perplexity of the held-out sentences' masked tokens, always the same ones."""
        if not self.valid:
            return {}
        self.model.eval()
        lengths = np.array([len(e.ids) for e in self.valid])
        batches = within_tokens(np.arange(len(lengths)), lengths, max_tokens)
        total = torch.zeros((), dtype=torch.float64, device=self.machine.device)
        for indices in batches[self.machine.rank :: self.machine.world_size]:
            total += self.loss_of(self.model, self.valid, indices, [DATA_SEED])
        loss = self.machine.sum(total).item() / sum(map(n_masked, self.valid))
        if not math.isfinite(loss):
            raise InputError(f"the loss of the held-out sentences is {loss}; try --amp off")
        return {"loss": loss, "perplexity": math.exp(min(loss, 100))}

    def merit(self, scores: dict) -> float:
        return -scores["loss"]

    def describe(self, scores: dict) -> str:
        return "masked tokens: loss {loss:.4f}  perplexity {perplexity:.2f}".format(**scores)

    def save(self, folder: Path, scores: dict):
        save_encoder(folder / "encoder", self.model, self.tokenizer)

    @staticmethod
    def next_commands(folders: list[Path]) -> str:
        return "\n".join(f"  python train.py --model {folder / 'encoder'}" for folder in folders)


TASKS = {"relation": Relations, "mlm": MaskedTokens}  # by --objective


def choose_sentences(settings: Settings, say) -> tuple[list[str], list[str], dict]:
    """(training sentences, held-out sentences, version of the data): those to train and to predict on, each once."""
    skipped = [] if settings.skip_bad_rows else None
    path = data.data_file(settings.data, "train")
    rows, others = data.read_rows(path, skipped), data.rows_to_predict(settings.data, skipped)
    sentences = list(dict.fromkeys(row.sentence for row in rows + others))
    version = data.version(settings.data, rows + others)
    say(f"{path}{' and test_data beside it' if others else ''}: {len(sentences)} sentences")
    sentences, valid = subsample(sentences, settings.limit or len(sentences)), []
    if settings.valid == "":
        valid = subsample(sentences, max(1, len(sentences) // 10))
    elif settings.valid != "none":
        valid = list(dict.fromkeys(row.sentence for row in data.read_rows(settings.valid, skipped)))
    held_out = set(valid)
    sentences = [sentence for sentence in sentences if sentence not in held_out]
    if skipped:
        say(f"left out {len(skipped)} bad rows, the first: {skipped[0]}")
    if not sentences:
        raise InputError(f"{path}: no sentences to train on beside those held out")
    return sentences, valid, version


# --- the optimiser -----------------------------------------------------------------------------------------------


def make_optimizer(model: FlatEncoder, settings: Settings) -> torch.optim.AdamW:
    """Fused AdamW that decays matrices only: vectors are biases and the scales of norms. A group's learning rate is
    `scale` times that of the step."""
    groups = {}
    for name, parameter in model.named_parameters():
        scale = settings.layer_decay ** layers_above(name, model.encoder.config.num_hidden_layers)
        weight_decay = settings.weight_decay if parameter.ndim > 1 else 0.0
        group = {"params": [], "scale": scale, "weight_decay": weight_decay}
        groups.setdefault((scale, weight_decay), group)["params"].append(parameter)
    return torch.optim.AdamW(list(groups.values()), lr=settings.lr, betas=(0.9, settings.beta2), fused=True)


def layers_above(name: str, n_layers: int) -> int:
    """How many layers, the head counted as one, a parameter's output goes through, by the number in its name. What is
    new, the vectors of --entity-embedding too, counts as the head."""
    if not name.startswith("encoder."):
        return 0
    if re.match(r"encoder\.(norm|final_norm|ln_f)\.", name):  # behind the last layer
        return 1
    found = re.search(r"\.(\d+)\.", name)
    return n_layers - int(found[1]) if found else n_layers + 1


def learning_rate(settings: Settings, step: int, steps: int) -> float:
    """The rate of step `step` of `steps`: linear from 0 up to --lr, then linear down to 0."""
    warmup = math.ceil(settings.warmup_ratio * steps)
    return settings.lr * min((step + 1) / max(warmup, 1), (steps - step) / max(steps - warmup, 1))


def training_batches(lengths: np.ndarray, batch_size: int, seed: int, epoch: int) -> list[np.ndarray]:
    """The indices of all examples, in batches of similar length in random order: a pure function of (seed, epoch)."""
    random = np.random.default_rng([seed, epoch])
    order = random.permutation(len(lengths))
    pool = 50 * batch_size  # sorting within pools keeps batches random, and few lengths meet in one
    pools = [order[i : i + pool] for i in range(0, len(order), pool)]
    order = np.concatenate([p[np.argsort(lengths[p], kind="stable")] for p in pools])
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    return [batches[i] for i in random.permutation(len(batches))]


# --- the loop ----------------------------------------------------------------------------------------------------


def share_of_rank(indices: np.ndarray, lengths: np.ndarray, machine: Machine, max_tokens: int, n_targets: int):
    """The parts in which this process works through its share of a batch that asks for `n_targets` predictions, and
    the weight of the loss of each of them."""
    mine = indices[machine.rank :: machine.world_size]  # of like lengths on each: training_batches has sorted them
    if len(mine):
        # DistributedDataParallel takes the mean over the processes; the loss is the mean over the whole batch
        return within_tokens(mine, lengths, max_tokens), machine.world_size / n_targets
    return [indices[:1]], 0.0  # fewer sentences than processes: take part in the exchange, add nothing


def batch_gradients(task, model, indices, step, scaler, max_tokens):
    """Adds up the gradients of one batch, part by part, and returns this process's share of the mean loss, still on
    the device; or None if memory ran out on any process."""
    machine = task.machine
    torch.manual_seed(int(np.random.SeedSequence([task.settings.seed, step, machine.rank]).generate_state(1)[0]))
    parts, weight = share_of_rank(indices, task.lengths, machine, max_tokens, task.n_targets[indices].sum())
    total, out_of_memory = torch.zeros((), device=machine.device), False
    try:
        for part in parts:
            exchange = machine.world_size > 1 and part is parts[-1]
            model.require_backward_grad_sync = exchange  # DistributedDataParallel's switch, as in nanoGPT
            loss = task.loss(model, part, step)
            total += (loss.detach() * weight / machine.world_size).nan_to_num(0, 0, 0)
            loss = scaler.scale(loss * weight)
            if not exchange:
                loss.backward()
    except torch.OutOfMemoryError:
        out_of_memory = True
    if machine.any(out_of_memory):
        return None
    if machine.world_size > 1:  # the backward pass that exchanges gradients begins when all have got as far as this
        loss.backward()
    return total


def update_weights(model, optimizer, scaler, clip_norm: float) -> torch.Tensor:
    """A step of the optimiser, left out where the gradient is not finite; returns 1 if it was left out, else 0, on the
    device."""
    scaler.unscale_(optimizer)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip_norm or math.inf)
    is_bad = 1 - norm.isfinite().float()
    if not scaler.is_enabled():
        optimizer.found_inf = is_bad  # as GradScaler has a fused optimiser skip a step: no wait for the device
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    return is_bad


@dataclass
class Progress:
    """What a run knows of its past."""

    step: int = 0  # optimiser steps done
    sentences: int = 0  # trained on, all epochs together
    seconds: float = 0.0  # spent in those steps
    skipped: int = 0  # steps whose gradient was not finite
    best: dict | None = None  # scores of the model saved
    without_gain: int = 0  # evaluations since
    evaluations: list = field(default_factory=list)  # their scores


def save_progress(folder: Path, task: Task, progress: Progress, parts: dict):
    """Writes last.pt; the one before becomes previous.pt. `parts`: what has a state_dict, by name."""
    content = {"format": PROGRESS_FORMAT, "settings": asdict(task.settings), "rows": task.hash}
    content |= {"progress": asdict(progress), **{name: part.state_dict() for name, part in parts.items()}}
    save_tensors(folder / "last.pt", content, keep=folder / "previous.pt")


def load_progress(folder: Path, task: Task, parts: dict) -> Progress:
    """The progress to go on from, its states loaded into `parts`: of last.pt, or of previous.pt where that is damaged
    or missing; where there is neither, that of a beginning. InputError where settings or rows are others now."""
    found = [folder / name for name in ("last.pt", "previous.pt") if (folder / name).exists()]
    if task.settings.resume and not found:
        raise InputError(f"{folder}: no last.pt to go on from, as --resume wants")
    for path in found:
        try:
            content = load_checkpoint(path, PROGRESS_FORMAT)
        except DamagedFile as error:
            if path is found[-1]:
                raise
            task.say(str(error))
            task.machine.barrier()  # till all have seen it
            if task.machine.rank == 0:
                os.replace(path, folder / "damaged.pt")  # lest it takes the place of previous.pt
            continue
        before_all = asdict(Settings()) | content["settings"]  # a setting of today was at its default before
        for name, value in asdict(task.settings).items():
            before = before_all[name]
            if before != value and name not in ("data", "valid", *NOT_OPTIMISATION):
                raise InputError(f"{path}: made with {name} = {before!r}, now {value!r}; use --fresh, or another --out")
        if content["rows"] != task.hash:
            raise InputError(f"{path}: made with other rows, alphas or encoder than now; use --fresh, or another --out")
        for name, part in parts.items():
            if content[name]:  # the scaler has no state but in fp16
                part.load_state_dict(content[name])
        task.say(f"{path}: going on after step {content['progress']['step']}")
        return Progress(**content["progress"])
    return Progress()


def remove_progress(folder: Path):
    """Does away with what a run would go on from, and what it has shown TensorBoard."""
    for path in [*(folder / name for name in PROGRESS_FILES), *folder.glob("events.out.tfevents*")]:
        path.unlink(missing_ok=True)


def train(settings: Settings, machine: Machine, stop: StopSignal, stale: list[Path]) -> dict:
    """The whole run, on each process; returns the best scores. Once it is sure that it can begin, the progress in the
    `stale` folders is removed."""
    is_first, folder = machine.rank == 0, settings.folder()
    say = tqdm.write if is_first else lambda text: None
    task = TASKS[settings.objective](settings, machine, say)
    settings = task.settings
    optimizer = make_optimizer(task.model, settings)
    scaler = torch.amp.GradScaler(machine.device.type, enabled=machine.amp == torch.float16)
    parts = {"weights": task.model, "optimizer": optimizer, "scaler": scaler}
    if is_first:
        for one in stale:
            remove_progress(one)
    machine.barrier()
    progress = load_progress(folder, task, parts)
    trained = machine.distribute(task.model)
    lengths = task.lengths
    per_epoch = math.ceil(len(lengths) / settings.batch_size)
    steps = settings.epochs * per_epoch
    if progress.step == steps:
        say("it has been to its end before; --fresh starts it over")

    def evaluate():
        """Scores the model; the best so far is saved, or where nothing is scored the last."""
        scores = task.evaluate(max_tokens)
        if scores:
            say(f"step {progress.step}: {task.describe(scores)}")
            if is_first:
                task.log(writer, progress.step)
            progress.evaluations.append(scores | {"step": progress.step})
        progress.without_gain += 1
        if not scores or progress.best is None or task.merit(scores) > task.merit(progress.best):
            progress.best, progress.without_gain = scores | {"step": progress.step}, 0
            if is_first:
                task.save(folder, progress.best)
        return scores

    # the loop
    gc.freeze()  # what is loaded stays
    gc.enable()
    batches, max_tokens = [], settings.max_tokens
    if is_first:
        writer = SummaryWriter(folder, purge_step=progress.step + 1)  # what a killed run has written beyond
        writer.add_text("data", f"{settings.data} {task.about['version']}")
    interval = 0.5 if sys.stderr.isatty() else 60  # a log file needs few lines
    # since the loss was last read: the sum of the losses, the steps skipped; and over readings: those in a row
    loss_sum, bad, bad_in_a_row = torch.zeros(3, device=machine.device).unbind()
    window_start, window_steps, window_sentences = time.perf_counter(), 0, 0
    with tqdm(total=steps, initial=progress.step, unit="step", mininterval=interval, disable=not is_first) as bar:
        while progress.step < steps and not (settings.patience and progress.without_gain >= settings.patience):
            epoch, i_batch = divmod(progress.step, per_epoch)
            if i_batch == 0 or not batches:
                batches = training_batches(lengths, settings.batch_size, settings.seed, epoch)
            rate = learning_rate(settings, progress.step, steps)
            for group in optimizer.param_groups:
                group["lr"] = rate * group["scale"]
            trained.train()
            indices, tokens_before = batches[i_batch], max_tokens
            while (loss := batch_gradients(task, trained, indices, progress.step, scaler, max_tokens)) is None:
                if max_tokens < lengths[indices].min():
                    raise InputError("out of memory with one sentence at a time; try a smaller --max-length or --model")
                max_tokens = min(max_tokens, math.ceil(lengths[indices].sum() / machine.world_size)) // 2
                task.model.zero_grad()
                torch.cuda.empty_cache()
                trained = None  # a DistributedDataParallel that was stopped half way cannot go on
                trained = machine.distribute(task.model)
            if max_tokens < tokens_before:
                say(f"out of memory at step {progress.step + 1}: from now on {max_tokens} tokens at a time")
            is_bad = update_weights(task.model, optimizer, scaler, settings.clip_norm)
            loss_sum, bad, bad_in_a_row = loss_sum + loss * (1 - is_bad), bad + is_bad, (bad_in_a_row + is_bad) * is_bad
            progress.step += 1
            window_steps += 1
            window_sentences += len(indices)
            bar.update()

            every = settings.eval_every or per_epoch
            stopping = machine.any(stop.number > 0)
            evaluating = progress.step % every == 0 or progress.step == steps
            saving = stopping or evaluating or (settings.save_every and progress.step % settings.save_every == 0)
            if window_steps < LOG_EVERY and not saving:
                continue  # reading the loss waits for the device
            loss, n_bad, n_in_a_row = machine.sum(loss_sum).item(), int(bad), int(bad_in_a_row)
            seconds = time.perf_counter() - window_start
            progress.seconds += seconds
            progress.sentences += window_sentences
            progress.skipped += n_bad
            shown = {"loss": loss / max(window_steps - n_bad, 1), "learning_rate": rate}
            shown |= {"sentences_per_second": window_sentences / seconds, "skipped_steps": progress.skipped}
            text = "loss {loss:.3f}, lr {learning_rate:.1e}, {sentences_per_second:.1f} sentences/s".format(**shown)
            text += f", {progress.skipped} steps skipped" if progress.skipped else ""
            bar.set_postfix_str(text, refresh=False)
            if n_in_a_row >= BAD_STEPS:
                raise InputError(
                    f"{n_in_a_row} steps in a row, up to {progress.step}, were skipped: their gradient is not finite; "
                    f"the model in {folder} is as before them; try a smaller --lr, or --amp off"
                )
            if evaluating:
                shown |= {f"valid/{name}": value for name, value in evaluate().items() if name != "absent"}
            if is_first:
                for name, value in shown.items():
                    writer.add_scalar(name if "/" in name else f"train/{name}", value, progress.step)
                if evaluating:
                    write_summary(folder, task, progress, finished=False)
                if saving:
                    save_progress(folder, task, progress, parts)
            if stopping or (evaluating and machine.any(stop.number > 0)):  # an evaluation may take minutes
                say(f"stopped after step {progress.step} of {steps} and saved; the same command goes on from there")
                machine.barrier()  # torchrun ends all processes when the first one has ended
                sys.exit(128 + (stop.number or signal.SIGTERM))
            loss_sum, bad = torch.zeros_like(loss_sum), torch.zeros_like(bad)
            window_start, window_steps, window_sentences = time.perf_counter(), 0, 0
    if is_first:
        finish(folder, task, progress, writer)
    return progress.best


def write_summary(folder: Path, task: Task, progress: Progress, finished: bool):
    summary = {"run": folder.name, "finished": finished, **asdict(progress), "settings": asdict(task.settings)}
    with atomic_write(folder / "summary.json") as file:
        json.dump(summary | task.about, file, ensure_ascii=False, indent=1)


def finish(folder: Path, task: Task, progress: Progress, writer: SummaryWriter):
    """Writes summary.json and the settings for TensorBoard's HPARAMS, and says what there is and how to go on."""
    scores = {f"best/{name}": value for name, value in progress.best.items() if name not in ("absent", "step")}
    compared = {name: value for name, value in asdict(task.settings).items() if name not in NOT_OPTIMISATION}
    writer.add_hparams(compared, scores, run_name=".")
    writer.close()
    write_summary(folder, task, progress, finished=True)
    if scores:
        print(f"\n{task.describe(progress.best)}\nat step {progress.best['step']} of {progress.step}, on held-out rows")
    print(
        f"trained on {progress.sentences} sentences in {progress.seconds:.0f} s, "
        f"{progress.sentences / progress.seconds:.1f} a second\n"
        f"next:\n{task.next_commands([folder])}"
    )


@data.exit_on_bad_input
def main():
    settings = parse_settings()
    gc.disable()  # while rows become examples there is nothing to collect, and looking for it takes a second
    transformers.logging.set_verbosity_error()  # else it warns of the heads in the files that we leave unread
    transformers.logging.disable_progress_bar()
    if settings.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":16:8")  # cuBLAS and cuDNN read it when they start
        torch.use_deterministic_algorithms(True)
    with running(settings.amp) as machine:
        stop = StopSignal()
        if settings.norm == "batch" and machine.world_size > 1:
            raise InputError("--norm batch: normalises over the sentences of one process, and there are several")
        is_fresh = settings.fresh and not machine.any(restarts() > 0)  # torchrun's restart is no fresh start
        seeds, each = range(settings.seed, settings.seed + settings.seeds), [settings]
        if settings.seeds > 1:
            folder = replace(settings, seed=Settings.seed).folder()
            each = [replace(settings, seed=seed, seeds=1, out=f"{folder}-seed={seed}") for seed in seeds]
        runs = [train(each[0], machine, stop, [one.folder() for one in each] if is_fresh else [])]
        if settings.seeds == 1:
            return
        # --resume insists on the first one's progress: the others may not have begun
        runs += [train(replace(one, resume=False), machine, stop, []) for one in each[1:]]
        names = [name for name in runs[0] if name not in ("absent", "step")]
        if machine.rank == 0:
            print(f"\nnext, with all:\n{TASKS[settings.objective].next_commands([one.folder() for one in each])}")
        if machine.rank == 0 and names:
            print(f"\nseeds {seeds[0]} to {seeds[-1]}, mean ± standard deviation:")
            for name in names:
                values = [scores[name] for scores in runs]
                print(f"  {name} {np.mean(values):.2f} ± {np.std(values, ddof=1):.2f}")


if __name__ == "__main__":
    main()
