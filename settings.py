"""Settings of a training run: their defaults, checks and command line, and the run's name.

    settings = parse_settings(Settings, "train.py", description)     # sys.argv
    settings.folder()                                                # runs/roberta-large-entity
    settings.resolve(hidden_size=1024, n_layers=24)     # --lr and --layer-decay for the encoder

TrainingSettings is what train.py and pretrain.py share; Settings adds what relations need.
"""

import argparse
import math
import os
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

from common import InputError, Parser
from data import MARKERS, PROMPTS, TYPE_NAMES

FILES = tuple[str, ...]  # the type of a setting that takes several files
GROUPS = ("data", "input", "model", "optimisation", "run")
SAMPLE = Path(__file__).parent / "sample"
DEMO = {
    "data": str(SAMPLE), "out": "runs/demo", "split": "stratified",
    "batch_size": 32, "epochs": 8, "lr": 1e-3, "layer_decay": 1.0,
}  # fmt: skip


def setting(default, group: str, help: str, *allowed, auto="", named=True):
    """A field of TrainingSettings.

    allowed: the choices of a text, or the limits of a number. auto: what the default None means.
    named: False if the setting is not part of the run's name and may change when a run resumes.
    """
    metadata = {"group": group, "help": help, "allowed": allowed}
    return field(default=default, metadata=metadata | {"auto": auto, "named": named})


@dataclass
class TrainingSettings:
    """Settings that every training has. Each is an option: --batch-size, --no-NAME for a switch."""

    # fmt: off
    data: str = setting("data", "data",
        "folder with train.csv and test_data.csv (or .tsv, .json, .jsonl, .parquet), a training "
        "file, or hub:OWNER/NAME@REVISION[:CONFIG][/SPLIT]")
    valid: str = setting("", "data", "validation file; none: train on all rows (default: a split)")
    limit: int = setting(0, "data",
        "number of training rows, the same rows for every seed; 0: all", 0, math.inf)
    skip_bad_rows: bool = setting(False, "data",
        "skip and count bad rows; otherwise the first is an error")
    max_length: int = setting(256, "input",
        "tokens per input; longer inputs are truncated far from the entities", 64, math.inf)
    model: str = setting("klue/roberta-large", "model",
        "encoder: a folder or a Hugging Face hub name")
    batch_size: int = setting(64, "optimisation",
        "sentences per optimiser step, over all processes", 1, math.inf)
    epochs: int = setting(5, "optimisation", "passes over the training rows", 1, math.inf)
    lr: float | None = setting(None, "optimisation",
        "peak learning rate", 1e-12, math.inf,
        auto="4e-5 for hidden size 1024, higher for smaller ones")
    layer_decay: float | None = setting(None, "optimisation",
        "learning rate of a layer relative to the layer above", 0.01, 1, auto="0.85 for 12 layers")
    warmup_ratio: float = setting(0.06, "optimisation",
        "share of the steps with linear warmup; linear decay to 0 follows", 0, 1)
    beta2: float = setting(0.98, "optimisation", "AdamW beta2", 0, 0.999999)
    weight_decay: float = setting(0.01, "optimisation",
        "AdamW weight decay; none on biases and norms", 0, math.inf)
    clip_norm: float = setting(1.0, "optimisation",
        "maximum gradient norm; 0: no clipping", 0, math.inf)
    seed: int = setting(42, "optimisation",
        "seed of batch order, new weights and dropout", 0, 2**32 - 1)
    seeds: int = setting(1, "run",
        "number of runs with consecutive seeds, each in a folder <run>-seed=N; prints the mean of "
        "their scores", 1, 100, named=False)
    amp: str = setting("auto", "run",
        "mixed precision; auto: bf16 if supported, else fp16 on a GPU and off on a CPU", "auto",
        "off", "bf16", "fp16")
    device: str = setting("auto", "run",
        "cpu, cuda or cuda:N; auto: a GPU if there is one", named=False)
    max_tokens: int = setting(16384, "run",
        "tokens per micro-batch on a device", 1, math.inf, named=False)
    eval_every: int = setting(0, "run",
        "steps between evaluations; 0: every epoch", 0, math.inf, named=False)
    patience: int = setting(0, "run",
        "stop after this many evaluations without a better score; 0: never", 0, math.inf)
    save_every: int = setting(0, "run",
        "steps between saves of last.pt; 0: only at evaluations", 0, math.inf, named=False)
    out: str = setting("", "run",
        "run folder (default: runs/<encoder>-<head>-<other settings>)", named=False)
    fresh: bool = setting(False, "run",
        "start over; otherwise the same command resumes from the run's last.pt", named=False)
    cuda_graphs: bool = setting(True, "run",
        "record training steps as CUDA graphs, and predictions: several times faster", named=False)
    deterministic: bool = setting(False, "run",
        "bit-identical results on a GPU too; slower", named=False)
    # fmt: on

    def check(self):
        """Raise InputError for invalid settings, before anything is loaded."""
        for f in fields(self):
            value, allowed = getattr(self, f.name), f.metadata["allowed"]
            if not allowed or not isinstance(value, (int, float)):
                continue
            low, high = allowed
            if not (math.isfinite(value) and low <= value <= high):
                limits = f"{low} to {high}" if high < math.inf else f"at least {low}"
                raise InputError(f"{option(f.name)}: found {value}, expected {limits}")
        if self.out and Path(self.out).resolve() == Path.cwd():
            raise InputError(f"--out {self.out}: found the current folder, expected a run's folder")
        if self.patience and self.valid == "none":
            raise InputError("--patience needs validation scores; --valid none has none")

    def name(self) -> str:
        """The run's name: encoder, head, and the settings that differ from their defaults."""
        model = Path(self.model)
        parent = model.parent.name if model.name == "encoder" else ""  # runs/tapt/encoder: tapt
        parts = [parent or model.name, self.kind]
        for f in fields(self):
            value = getattr(self, f.name)
            differs = value != f.default or (f.name == "fold" and self.folds)  # fold 0 is one too
            if differs and f.metadata["named"] and f.name not in ("model", "head"):
                if f.type == FILES:
                    value = "+".join(Path(path).name for path in value)
                value = Path(value).name if "/" in str(value) else value
                switch = {True: f.name, False: f"no_{f.name}"}
                parts.append(switch[value] if f.type is bool else f"{f.name}={value}")
        return "-".join(parts)

    def arguments(self, *names: str) -> list[str]:
        """The command-line arguments that give a program these settings, without the defaults."""
        values = {f.name: (getattr(self, f.name), f.default) for f in fields(self)}
        return [as_argument(name, values[name][0]) for name in names if len({*values[name]}) > 1]

    def folder(self) -> Path:
        return Path(self.out) if self.out else Path("runs") / self.name()

    def resolve(self, hidden_size: int, n_layers: int) -> "TrainingSettings":
        """Settings with a value for each None that depends on the size of the encoder.

        The learning rate follows ELECTRA's for its three sizes (Clark et al. 2020). The decay is
        the same from the top layer to the bottom layer, whatever the number of layers.
        """
        lr, decay = self.lr, self.layer_decay
        if lr is None:
            lr = float(f"{4e-5 * (1024 / hidden_size) ** 2:.2g}")
        if decay is None:
            decay = round(0.85 ** (12 / n_layers), 3)
        return replace(self, lr=lr, layer_decay=decay)


@dataclass
class Settings(TrainingSettings):
    """Settings of train.py."""

    # fmt: off
    split: str = setting("test-like", "data",
        "validation rows: a tenth, like KLUE-RE's test set, or a fifth, stratified by label",
        "test-like", "stratified")
    folds: int = setting(0, "data",
        "number of folds for cross-validation; 0: use --split", 0, math.inf)
    fold: int = setting(0, "data", "the fold to validate on, from 0", 0, math.inf)
    no_relation_share: float | None = setting(None, "data",
        "share of the negative label in test-like validation rows and predictions", 0.01, 1,
        auto="0.6 for KLUE-RE's labels, the training file's share for others")
    soft_labels: tuple[str, ...] = setting((), "data",
        "files id,pred_label,probs with soft targets for the rows of these ids; rows of test_data "
        "that have some are added to the training rows")
    soft_mix: float = setting(0.5, "data",
        "share of the probabilities in the target of a training row; the rest is its label", 0, 1)
    soft_weight: float = setting(1.0, "data",
        "weight of a row of test_data; a training row has 1", 1e-6, math.inf)
    drop: str = setting("", "data",
        "CSV file with the ids of training rows to leave out; validation rows stay")
    relabel: str = setting("", "data",
        "CSV file id,new_label with other labels for training rows; validation rows keep theirs")
    clean: bool = setting(True, "data", "remove duplicate and contradictory training rows")
    negative_label: str = setting("no_relation", "data", "the label that means no relation")
    label_order: str = setting("", "data",
        "what labels that are class numbers mean: competition, klue (its order on the Hugging Face "
        "hub), or a JSON file with a list of names")
    marker: str = setting("typed_entity_marker_punct", "input", "entity marker", *MARKERS)
    prompt: str = setting("s_and_o", "input", "prompt around the sentence", *PROMPTS)
    type_names: str = setting("en", "input", "language of entity types in markers", *TYPE_NAMES)
    head: str = setting("entity", "model", "pooling", "cls", "entity", "bilstm", "bigru")
    norm: str = setting("layer", "model",
        "normalisation before the classifier", "layer", "batch", "none")
    gelu: bool = setting(False, "model", "GELU before the classifier")
    dropout: float = setting(0.0, "model", "dropout before the classifier", 0, 0.99)
    entity_embedding: str = setting("none", "model",
        "add learned embeddings of subject and object; typed: of their types too", "none", "plain",
        "typed")
    label_smoothing: float = setting(0.0, "optimisation",
        "label smoothing of the cross entropy", 0, 1)
    focal_gamma: float = setting(0.0, "optimisation",
        "gamma of the focal loss; 0: cross entropy", 0, math.inf)
    focal_alpha: str = setting("", "optimisation",
        "JSON file {label: alpha} for the focal loss; other labels have 1")
    best_metric: str = setting("micro_f1", "run", "score that selects ckpt.pt", "micro_f1", "auprc")
    demo: bool = setting(False, "run",
        "train a tiny encoder from scratch on sample/, with settings of its own", named=False)
    # fmt: on

    @property
    def kind(self) -> str:
        return self.head

    def check(self):
        super().check()
        if self.label_smoothing and (self.focal_gamma or self.focal_alpha):
            raise InputError("--label-smoothing excludes --focal-gamma and --focal-alpha")
        if self.soft_labels and (self.label_smoothing or self.focal_gamma or self.focal_alpha):
            raise InputError("--soft-labels excludes --label-smoothing and the focal loss")
        if len(set(map(os.path.realpath, self.soft_labels))) < len(self.soft_labels):
            raise InputError("--soft-labels: found a file twice, expected different ones")
        defaults = Settings.soft_mix, Settings.soft_weight
        if not self.soft_labels and (self.soft_mix, self.soft_weight) != defaults:
            raise InputError("--soft-mix and --soft-weight need --soft-labels")
        if self.folds == 1:
            raise InputError("--folds: found 1, expected at least 2")
        if self.folds and self.valid:
            raise InputError("--folds and --valid exclude each other")
        if self.fold and self.fold >= self.folds:
            raise InputError(f"--fold: found {self.fold}, expected less than --folds {self.folds}")
        if self.no_relation_share is not None and not self.test_like():
            raise InputError("--no-relation-share needs --split test-like, and no --folds")
        if self.demo and self.model != Settings.model:
            raise InputError(f"--model {self.model}: --demo makes its own encoder")

    def test_like(self) -> bool:
        """Whether validation rows and predictions should resemble KLUE-RE's test set."""
        return self.split == "test-like" and not self.folds

    def model_options(self) -> dict:
        """What shapes the model besides the encoder: the options of model.RelationModel."""
        names = ("head", "norm", "gelu", "dropout", "entity_embedding")
        return {name: getattr(self, name) for name in names}


# --- command line -----------------------------------------------------------------------------


def option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def as_argument(name: str, value) -> str:
    """A setting with its value, as a command-line argument."""
    if isinstance(value, bool):
        return option(name if value else f"no_{name}")
    return f"{option(name)}={value}"


def parse_settings(kind: type, program: str, description: str, arguments=None):
    """The `kind` of TrainingSettings that the command line asks for (default: sys.argv)."""
    how = {"usage": f"{program} [options]", "argument_default": argparse.SUPPRESS}
    parser = Parser(prog=program, description=description, **how)
    groups = {name: parser.add_argument_group(name) for name in GROUPS}
    for f in fields(kind):
        number = {int: int, float: float, float | None: float}.get(f.type)
        how = {"type": number or str, "metavar": "N" if number is int else "X" if number else None}
        if not number:
            how["choices"] = f.metadata["allowed"] or None
        if f.type == FILES:
            how = {"nargs": "+", "metavar": "FILE"}
        if f.type is bool:
            how = {"action": argparse.BooleanOptionalAction}
        default = f.metadata["auto"] or f.default
        shown = "" if default in ("", ()) else f" (default: {default})"
        help = (f.metadata["help"] + shown).replace("%", "%%")
        groups[f.metadata["group"]].add_argument(option(f.name), help=help, **how)
    given = vars(parser.parse_args(arguments))
    given = {name: tuple(x) if isinstance(x, list) else x for name, x in given.items()}
    is_demo = given.get("demo")
    settings = kind(**(DEMO | given if is_demo else given))
    settings.check()
    if is_demo:  # train.py makes it
        settings.model = str(settings.folder() / "tiny_encoder")
    return settings
