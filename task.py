"""What the loop of train.py trains: examples, a model, a loss and scores.

task = RelationTask(settings, worker, print)     # reads the rows, loads encoder and tokenizer
loss = task.loss(task.model, task.batch(indices, step=0))
scores = task.evaluate(max_tokens=4096)          # {"micro_f1": ..., "auprc": ..., ...}
"""

import shlex
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import numpy as np
import torch

from calibration import fit_temperature
from checkpoint import save_checkpoint
from common import InputError, read_json
from data import Template
from distributed import Worker
from encoder import FlatEncoder, add_markers, input_embeddings, load_encoder, load_tokenizer
from metrics import describe, negative_factor, scale_negative, score, write_predictions
from model import RelationModel, predict, relation_loss
from rows import compose, data_file
from sample.tiny_encoder import make_tiny_encoder
from settings import Settings, TrainingSettings
from splits import choose_rows, subsample
from targets import edited, with_targets
from tokens import Batch, collate, encode
from vocabulary import unknown_in_rows


class Task:
    """What the loop trains: examples, a model, a loss and scores. Each process has one.

    A subclass sets `model`, `lengths` and `n_targets` (tokens and loss terms of each example,
    (N,)), `n_valid_tokens` (of an evaluation), `hash` (of data and encoder) and `about` (for
    summary.json), and defines the methods that raise NotImplementedError here.
    """

    recorder = None  # records graphs in place of CUDA, for tests

    def __init__(self, settings: TrainingSettings, worker: Worker, log):
        self.settings, self.worker, self.log = settings, worker, log

    def batch(self, indices: np.ndarray, step: int) -> Batch:
        """The flat batch of these examples, on the CPU."""
        raise NotImplementedError

    def loss(self, model, batch: Batch) -> torch.Tensor:
        """The sum of the losses of a batch. CUDA graphs record it: it must not wait for the GPU."""
        raise NotImplementedError

    def evaluate(self, max_tokens: int) -> dict:
        """Validation scores, the same on every rank; {} without validation data."""
        raise NotImplementedError

    def merit(self, scores: dict) -> float:
        """The score that selects the best model; higher is better."""
        raise NotImplementedError

    def describe(self, scores: dict) -> str:
        """The scores as a line."""
        raise NotImplementedError

    def save(self, folder: Path, scores: dict, weights: dict):
        """Write the best model, after `evaluate`; `weights` are the model's state_dict."""
        raise NotImplementedError

    def next_commands(self, folders: list[Path]) -> str:
        """The next commands to run, for the folders of one or more runs."""
        raise NotImplementedError

    def log_evaluation(self, writer, step: int):
        """Write what the last evaluation found, besides its scores, to TensorBoard."""

    def set_model(self, model: FlatEncoder):
        if self.settings.max_length > model.max_length:
            found = f"{self.settings.model} takes at most {model.max_length} tokens"
            raise InputError(f"--max-length {self.settings.max_length}: {found}")
        if model.frozen:
            n, first = len(model.frozen), model.frozen[0]
            self.log(f"{n} weights of the encoder have no effect and are frozen, such as {first}")
        n_tokens, n_rows = len(self.tokenizer), len(input_embeddings(model.encoder).weight)
        sizes = f"the tokenizer has {n_tokens} tokens, the encoder embeddings for {n_rows}"
        if n_tokens > n_rows:
            raise InputError(f"--model {self.settings.model}: {sizes}")
        if n_tokens < 0.9 * n_rows:  # many encoders have some in reserve
            self.log(f"WARNING: {sizes}; are their files of one encoder?")
        self.model = model.place(self.worker)

    def set_hash(self, examples: list, *more):
        """Hash the examples and the encoder's weights: a run must resume with the same ones.

        The input embeddings are left out: the mean that new tokens start from depends on the
        number of threads.
        """
        digest = sha256(repr(more).encode())
        for example in examples:
            for value in example:
                digest.update(b"" if value is None else np.asarray(value).tobytes())
        embeddings = self.model.encoder.get_input_embeddings().weight
        weights = [p.detach() for p in self.model.encoder.parameters() if p is not embeddings]
        digest.update(repr(sum(int(w.view(torch.int32).sum()) for w in weights)).encode())
        self.hash = digest.hexdigest()

    def log_lengths(self, what: str, n_valid: int, n_truncated: int):
        limit = f"{n_truncated} truncated to {self.settings.max_length}"
        mean = f"mean {self.lengths.mean():.0f} tokens"
        self.log(f"{len(self.lengths)} training {what}, {n_valid} for validation; {mean}; {limit}")


class RelationTask(Task):
    """Relations between two entities, learned from labelled rows."""

    def __init__(self, settings: Settings, worker: Worker, log):
        super().__init__(settings, worker, log)
        if settings.norm == "batch" and worker.world_size > 1:
            raise InputError(
                "--norm batch: expected one process; it normalises over a process's rows"
            )
        chosen = choose_rows(settings, log)
        self.valid_rows, self.labels, self.version = chosen.valid, chosen.labels, chosen.version
        share = self.negative_share = chosen.negative_share
        rows, targets = with_targets(settings, chosen, edited(settings, chosen, log), log)
        if settings.test_like():  # the same run as with this share given
            self.settings = replace(settings, no_relation_share=share)
        related = {  # of labelled rows
            (row.subject.type, row.object.type)
            for row in rows
            if row.label not in (None, self.labels[0])
        }
        self.pairs = [list(pair) for pair in sorted(related, key=str)]
        self.about = {"version": self.version, "labels": self.labels, "negative_share": share}
        self.template = Template(settings.marker, settings.prompt, settings.type_names)

        if settings.demo:
            self._make_demo_encoder(rows)
        self.tokenizer = load_tokenizer(settings.model)
        n_pretrained = len(self.tokenizer)
        add_markers(self.tokenizer, self.template, rows)
        (self.examples, n_cut), (self.valid, n_valid_cut), (self.scaling, _) = (
            encode(part, self.template, self.tokenizer, self.labels, settings.max_length)
            for part in (rows, self.valid_rows, subsample(chosen.scaling, 1000))
        )
        if targets is not None:
            self.examples = [e._replace(targets=t) for e, t in zip(self.examples, targets)]
        self.gold = np.array([example.label for example in self.valid])
        self.lengths = np.array([len(example.ids) for example in self.examples])
        self.n_targets = np.ones(len(rows), dtype=int)
        self.n_valid_tokens = sum(len(example.ids) for example in self.valid + self.scaling)
        self.log_lengths("rows", len(self.valid), n_cut + n_valid_cut)
        for line in unknown_in_rows(self.tokenizer, rows, self.template):
            log(line)

        torch.manual_seed(settings.seed)
        encoder = load_encoder(settings.model, range(n_pretrained, len(self.tokenizer)))
        self.set_model(RelationModel(encoder, len(self.labels), **settings.model_options()))
        self.alpha = read_focal_alpha(settings.focal_alpha, self.labels, worker.device)
        alpha = None if self.alpha is None else self.alpha.tolist()
        parts = len(self.examples), len(self.valid)
        self.set_hash([*self.examples, *self.valid, *self.scaling], parts, self.labels, alpha)

    def _make_demo_encoder(self, rows):
        if self.worker.rank == 0:
            texts = (" ".join(self.template.render(row)[:3]) for row in rows)
            make_tiny_encoder(self.settings.model, texts, self.settings.seed)
        self.worker.barrier()

    def batch(self, indices: np.ndarray, step: int) -> Batch:
        return collate(self.examples, indices)

    def loss(self, model, batch: Batch) -> torch.Tensor:
        with self.worker.autocast():
            logits = model(batch)
        smoothing, gamma = self.settings.label_smoothing, self.settings.focal_gamma
        how = smoothing, gamma, self.alpha, batch.targets
        return relation_loss(logits, batch.labels, *how).sum()

    def evaluate(self, max_tokens: int) -> dict:
        n = len(self.valid)
        how = self.worker, max_tokens
        graphs = self.settings.cuda_graphs
        probs = predict(self.model, self.valid + self.scaling, *how, cuda_graphs=graphs)
        self.factor = 1.0
        if self.scaling:
            self.factor = negative_factor(probs[n:], self.negative_share)
            share = f"{self.negative_share:.0%} of the predictions"
            self.log(
                f"{self.labels[0]} gets {share}: its probability is scaled by {self.factor:.2f}"
            )
        self.probs = scale_negative(probs[:n], self.factor)
        self.temperature = fit_temperature(self.probs, self.gold)
        return score(self.probs, self.gold) if self.valid else {}

    def merit(self, scores: dict) -> float:
        return scores[self.settings.best_metric]

    def describe(self, scores: dict) -> str:
        return describe(scores, self.labels)

    def save(self, folder: Path, scores: dict, weights: dict):
        """Write ckpt.pt, and valid.csv with the predictions of the last `evaluate`."""
        data = data_file(self.settings.data, "train").parent
        if not self.version["revision"]:  # a hub data set keeps its name, a file gets a full path
            data = data.resolve()
        save_checkpoint(
            folder / "ckpt.pt", self.model, self.tokenizer, weights=weights, labels=self.labels,
            model_options=self.settings.model_options(), template=self.template._asdict(),
            max_length=self.settings.max_length, negative_factor=self.factor, pairs=self.pairs,
            temperature=self.temperature, run=folder.name, data=str(data), version=self.version,
            scores=scores,
        )  # fmt: skip
        if not self.valid:
            (folder / "valid.csv").unlink(missing_ok=True)  # of an earlier run
            return
        ids, gold = [row.id for row in self.valid_rows], [row.label for row in self.valid_rows]
        predicted = [self.labels[c] for c in self.probs.argmax(1)]
        write_predictions(folder / "valid.csv", ids, predicted, self.probs, gold)

    def log_evaluation(self, writer, step: int):
        from figures import log_evaluation  # matplotlib takes a second to import

        log_evaluation(writer, step, self.probs, self.gold, self.labels, self.valid_rows)

    def next_commands(self, folders: list[Path]) -> str:
        """Of several checkpoints infer.py takes the mean, so that there is nothing to vote on."""
        options = self.settings.arguments("amp", "skip_bad_rows", "label_order")
        command = ["python", "infer.py", *(str(folder / "ckpt.pt") for folder in folders), *options]
        command, writes = f"  {shlex.join(command)}", "It writes a submission into out/."
        try:
            data_file(data_file(self.settings.data, "train").parent, "test_data")
        except InputError:
            return f"{command} --data FILE\n{writes} FILE is what to predict: found no test_data."
        return f"{command}\n{writes}"


def read_focal_alpha(path: str, labels: list[str], device) -> torch.Tensor | None:
    """The alpha of each label, (n_labels,), from a JSON file {label: alpha}; None without one."""
    if not path:
        return None
    expected = "a JSON object {label: alpha}"
    given = read_json(path, expected)
    try:
        given = {compose(label): value for label, value in given.items()}
        unknown = [label for label in given if label not in labels]
        if unknown:
            raise ValueError(f"{unknown[0]!r} is not a label")
        return torch.tensor([float(given.get(label, 1)) for label in labels], device=device)
    except (ValueError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: expected {expected}: {error}") from error
