"""Predict from Python: models that are loaded once and stay on the device.

predictor = Predictor("runs/roberta-large-entity/ckpt.pt")     # or several: their mean
predictor.predict([{"sentence": "…", "subject": "비틀즈", "object": "조지 해리슨"}])
predictor.triples("…", ["비틀즈", "조지 해리슨", "링고 스타"], threshold=0.5)
predictor(batch)       # a dict of columns: for datasets.Dataset.map and Ray Data's map_batches

See docs/python.md.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain, islice, permutations
from numbers import Real
from pathlib import Path
from threading import Lock
from typing import NamedTuple

import numpy as np
import transformers

from calibration import temper
from checkpoint import load_checkpoint, restore
from common import InputError, expect
from data import KLUE_LABELS, MARKERS, TYPES, Template
from distributed import Worker, local_device
from metrics import scale_negative
from model import predict
from rows import Entity, Row, Text, row_of, text_of
from tokens import encode
from vocabulary import unknown_in_rows

SLICE = 65_536  # rows that are tokens at a time, about 4 kB each


class Triple(NamedTuple):
    """A relation between two entities of a sentence."""

    subject: Entity
    relation: str
    object: Entity
    probability: float


class Model(NamedTuple):
    """A checkpoint, ready to predict; `content` is what it has besides its weights."""

    relation_model: object
    tokenizer: object
    template: Template
    content: dict


class Predictor:
    """The mean of the probabilities of one or more checkpoints.

    device: auto (a GPU if there is one), cpu, cuda or cuda:N. amp: auto, off, bf16 or fp16, as in
    train.py. max_tokens: tokens per batch, on a CPU at most 4096. calibrated: apply the
    temperatures of the checkpoints (older ones have none); False gives the probabilities that
    infer.py writes. Several threads may share one. Copies in other processes load the checkpoints
    again. Raises InputError for what is no checkpoint, for checkpoints with other labels, and for
    bad rows.
    """

    def __init__(self, checkpoints, device="auto", amp="auto", max_tokens=16384, calibrated=True):
        one = isinstance(checkpoints, (str, os.PathLike))
        self.paths = [str(path) for path in ([checkpoints] if one else checkpoints or ())]
        if not self.paths:
            raise InputError("checkpoints: found none, expected at least one")
        if len(set(map(os.path.realpath, self.paths))) < len(self.paths):
            raise InputError("checkpoints: found one twice, expected different ones")
        self.options = (device, amp, max_tokens, calibrated)
        self.calibrated = calibrated
        self.version = [version_of(path) for path in self.paths]
        self.worker, self.max_tokens = Worker(local_device(device)).with_precision(amp), max_tokens
        self.models, self.lock = [self._load(path) for path in self.paths], Lock()
        self.labels = self.models[0].content["labels"]
        for path, model in zip(self.paths, self.models):
            if model.content["labels"] != self.labels:
                found = "its labels, or their order, differ from those of"
                raise InputError(f"{path}: {found} {self.paths[0]}")
        markers = (MARKERS[model.template.marker] for model in self.models)
        self.needs_types = any("{" in marker[0][0] for marker in markers)
        pairs = [model.content.get("pairs") for model in self.models]  # old ones have none
        self.pairs = (
            {tuple(pair) for found in pairs for pair in found} if None not in pairs else None
        )
        pairs = sorted(self.pairs or (), key=str)
        self.known_types = list(dict.fromkeys((*TYPES, *chain.from_iterable(pairs))))
        is_klue = set(self.labels) == set(KLUE_LABELS)
        self.types = self.known_types if is_klue else None  # None: any

    def _load(self, path: str) -> Model:
        level = transformers.logging.get_verbosity()
        transformers.logging.set_verbosity_error()  # it warns of settings that have no effect
        content = load_checkpoint(path)
        relation_model, tokenizer = restore(content)
        transformers.logging.set_verbosity(level)
        content = {key: value for key, value in content.items() if key != "weights"}
        template = Template(**content["template"])
        return Model(relation_model.place(self.worker), tokenizer, template, content)

    def __reduce__(self):
        """What pickle copies, and what `datasets` hashes to find results that it has saved."""
        return Predictor, (self.paths, *self.options), {"version": self.version}

    # --- rows ---------------------------------------------------------------------------------

    def probabilities(self, rows: list[Row], progress: bool = False):
        """(probabilities (rows, labels), number of truncated rows for each checkpoint).

        progress: show a progress bar on stderr.
        """
        mean = np.zeros((len(rows), len(self.labels)))
        n_truncated, how = [0] * len(self.models), (self.worker, self.max_tokens)
        for start in range(0, len(rows), SLICE):
            some = slice(start, start + SLICE)
            with self.lock:  # a tokenizer and a model serve one thread at a time
                for number, (relation_model, tokenizer, template, about) in enumerate(self.models):
                    options = template, tokenizer, self.labels, about["max_length"]
                    examples, n = encode(rows[some], *options)
                    n_truncated[number] += n
                    probs = predict(relation_model, examples, *how, progress=progress)
                    probs = scale_negative(probs, about["negative_factor"])
                    if self.calibrated:
                        probs = temper(probs, about.get("temperature", 1.0))
                    mean[some] += probs / len(self.models)
        return mean, n_truncated

    def notes(self, rows: list[Row]) -> list[str]:
        """Lines about what the tokenizers do not know in these rows."""
        with self.lock:
            found = [unknown_in_rows(m.tokenizer, rows, m.template) for m in self.models]
        return list(dict.fromkeys(line for lines in found for line in lines))

    def predict(self, rows: list[dict]) -> list[dict]:
        """For each row its `label`, the `probability` of it, and `probabilities` by label.

        A row has a sentence, and subject and object as words, as words with offsets, or as
        subject_entity and object_entity of the competition.
        """
        is_list = isinstance(rows, Iterable) and not isinstance(rows, (str, Mapping))
        expect(is_list, "predict", "rows", rows, "a list of rows")
        found = [self._row(row, number, f"row {number}") for number, row in enumerate(rows)]
        probs, _ = self.probabilities(found)
        results = []
        for p, best in zip(probs.tolist(), probs.argmax(1)):
            probabilities = dict(zip(self.labels, p))
            results.append({"label": self.labels[best], "probability": p[best],
                            "probabilities": probabilities})  # fmt: skip
        return results

    def __call__(self, batch: dict[str, Sequence]) -> dict[str, Sequence]:
        """The columns of `batch` and pred_label, probability and probs, in the order of labels."""
        if not isinstance(batch, Mapping):
            raise InputError(f"batch: found a {type(batch).__name__}, expected a dict of columns")
        for name, values in batch.items():
            expected = "a list, one for each column: map(…, batched=True)"
            expect(not isinstance(values, str), "batch", name, values, expected)
        columns = {name: _as_list(values) for name, values in batch.items()}
        lengths = {name: len(values) for name, values in columns.items()}
        expect(len({*lengths.values()}) < 2, "batch", "rows", lengths, "columns of one length")
        records = [dict(zip(columns, values)) for values in zip(*columns.values())]
        ids = [f" (id {x['id']})" if x.get("id") is not None else "" for x in records]
        names = [f"row {n} of the batch{row_id}" for n, row_id in enumerate(ids)]
        found = [self._row(record, n, names[n]) for n, record in enumerate(records)]
        probs, _ = self.probabilities(found)
        predicted = [self.labels[best] for best in probs.argmax(1)]
        columns = {"pred_label": predicted, "probability": probs.max(1).tolist()}
        return {**batch, **columns, "probs": probs.tolist()}

    def _row(self, record: dict, number: int, where: str) -> Row:
        row, _, _ = row_of(record, number, where)
        self.check(row)
        return row

    # --- triples ------------------------------------------------------------------------------

    def triples(self, sentence: str, entities: Sequence, threshold: float = 0.5) -> list[Triple]:
        """The relations between the entities, of at least `threshold` probability.

        entities: words, or dicts of word and optionally start_idx, end_idx, type. Every ordered
        pair is predicted unless no training row has a relation between its types.
        """
        record = {"sentence": sentence, "entities": entities}
        text, _, _ = text_of(record, 0, "triples")
        self.check(text)
        is_share = isinstance(threshold, Real) and 0 <= threshold <= 1
        expect(is_share, "triples", "threshold", threshold, "a number from 0 to 1")
        (relations,), _ = self.relations([text], threshold)
        found = text.entities
        return [Triple(found[s], label, found[o], p) for s, label, o, p in relations]

    def relations(self, texts: list[Text], threshold: float, progress: bool = False):
        """(relations of each text, numbers of truncated rows): a relation is (number of the
        subject, label, number of the object, probability); see `triples`."""
        found, n_truncated = [[] for _ in texts], np.zeros(len(self.models), dtype=int)
        pairs = ((i, s, o) for i, text in enumerate(texts) for s, o in self.pairs_of(text))
        while some := list(islice(pairs, SLICE)):
            rows = [row_of_pair(texts[number], s, o) for number, s, o in some]
            probs, n = self.probabilities(rows, progress)
            n_truncated += n
            for (number, s, o), p in zip(some, probs):
                best = p.argmax()
                if best and p[best] >= threshold:  # the first label means no relation
                    found[number].append((s, self.labels[best], o, float(p[best])))
        return found, n_truncated.tolist()

    def pairs_of(self, text: Text):
        """Yield (number of the subject, of the object) for each ordered pair of entities that may
        have a relation."""
        for s, o in permutations(range(len(text.entities)), 2):
            subject, obj = text.entities[s], text.entities[o]
            types, same_span = (subject.type, obj.type), subject[1:3] == obj[1:3]
            # The pairs of the training rows tell nothing about types that are missing or unknown.
            is_new = not all(type_ in self.known_types for type_ in types)
            if (self.pairs is None or types in self.pairs or is_new) and not same_span:
                yield s, o

    def check(self, found: Row | Text):
        """Raise InputError if the markers need types, and an entity has none or an unknown one."""
        if not self.needs_types:
            return
        if isinstance(found, Row):
            named = {"subject": found.subject, "object": found.object}
        else:
            named = {f"entities[{k}]": entity for k, entity in enumerate(found.entities)}
        expected = f"one of {', '.join(self.types)}" if self.types else "a type"
        expected += ": the model's markers need it"
        for name, (*_, type_) in named.items():
            known = type_ in self.types if self.types else type_ is not None
            expect(known, f"{found.where}: {name}", "type", type_, expected)


def row_of_pair(text: Text, s: int, o: int) -> Row:
    """The row of two entities of a text, by their numbers."""
    entities = text.entities[s], text.entities[o]
    return Row("", text.sentence, *entities, None, "", text.where)


def version_of(path: str | Path) -> list[tuple[str, int, int]]:
    """(name, size, time of the last change) of a file, or of each file of a folder: another version
    has others."""
    path = Path(path)
    try:
        files = sorted(path.iterdir()) if path.is_dir() else [path]
        found = [(file.name, file.stat()) for file in files]
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    return [(name, about.st_size, about.st_mtime_ns) for name, about in found]


def _as_list(values) -> list:
    """A column as a list: NumPy's, pandas's and torch's have tolist, pyarrow's to_pylist."""
    convert = getattr(values, "tolist", None) or getattr(values, "to_pylist", None)
    return convert() if convert else list(values)
