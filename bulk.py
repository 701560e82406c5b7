"""Files of any length: read, predicted and written in chunks, in bounded memory.

parts = Parts([out], key, worker, print)                 # the chunks that are done already
predict_chunks(chunks, predict_chunk, parts, worker, n_rows, size)
parts.join([HEADER])                                     # writes `out`

A killed run resumes after its last whole chunk. The processes of torchrun share the chunks.
"""

import fcntl
import json
import math
import os
import shutil
import weakref
from collections.abc import Callable, Iterator
from hashlib import sha256
from itertools import islice
from pathlib import Path

from tqdm import tqdm

from common import InputError, atomic_write, bar_options, csv_text
from distributed import Worker
from predictor import Predictor, version_of
from rows import ENTITY_FIELDS, Row, Text

CHUNK = {"cpu": 4096, "cuda": 16_384}  # rows
PAIRS = 8  # about as many rows as a sentence has, whose entities are paired


def chunk_size(n_rows: int, worker: Worker, of_texts: bool) -> int:
    """Rows, or sentences of triples, of a chunk; a small file has a chunk for each process."""
    size = CHUNK[worker.device.type] // (PAIRS if of_texts else 1)
    return max(1, min(size, math.ceil(n_rows / worker.world_size)))


class Skipped(list):
    """Messages about bad rows: the first 20, and the number of all."""

    n = 0

    def append(self, message: str):
        self.n += 1
        if len(self) < 20:
            super().append(message)


def key_of(path: Path, predictor: Predictor, *options) -> str:
    """What an unfinished output depends on: input, checkpoints, options. A hub data set is its
    name."""
    source = None if str(path).startswith("hub:") else version_of(path)
    found = [str(path), source, predictor.paths, predictor.version, str(predictor.worker.amp)]
    return sha256(json.dumps([*found, *options]).encode()).hexdigest()


class Parts:
    """The finished chunks of one or more files, in a folder beside the first of them.

    Files of another `key` are removed, and `log` says so.
    """

    def __init__(self, outs: list[Path], key: str, worker: Worker, log):
        self.outs = outs
        self.folder = outs[0].with_name(f".{outs[0].name}.parts")
        known, key_file = "", self.folder / "key"
        if worker.rank == 0:
            self._lock()
        if key_file.is_file():
            known = key_file.read_text(encoding="utf-8", errors="replace")
        worker.barrier()  # every process must have read it
        if worker.rank == 0 and known != key:
            if known:
                found = "were written with another input, checkpoint or options"
                log(f"{self.folder}: its chunks {found}: starting over")
            for path in self.folder.iterdir():
                path.unlink()
            with atomic_write(key_file) as file:
                file.write(key)
        worker.barrier()
        self.done = {int(path.name) for path in self.folder.iterdir() if path.name.isdigit()}
        worker.barrier()
        if self.done:
            log(f"{self.folder}: resuming; finished chunks: {len(self.done)}")

    def _lock(self):
        """Lock the folder until this object or the process ends."""
        self.folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.folder, os.O_RDONLY)
        weakref.finalize(self, os.close, descriptor)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            message = "another process is writing it; wait, or use another name"
            raise InputError(f"{self.outs[0]}: {message}") from error

    def path(self, number: int, output: int) -> Path:
        return self.folder / (f"{number}-{output}" if output else str(number))

    def write(self, number: int, texts: list[str], n_truncated: list[int]):
        """Write a chunk: a text for each file. The first file is the last one written."""
        for output, text in reversed([*enumerate(texts)]):
            with atomic_write(self.path(number, output)) as file:
                file.write((json.dumps(n_truncated) + "\n" if output == 0 else "") + text)
        self.done.add(number)

    def join(self, headers: list[str], n_chunks: int) -> list[int]:
        """Write the files and remove the folder; the numbers of truncated rows."""
        total = None
        for output, (out, header) in reversed([*enumerate(zip(self.outs, headers))]):
            with atomic_write(out) as file:
                file.write(header)
                for number in range(n_chunks):
                    with open(self.path(number, output), encoding="utf-8", newline="") as part:
                        if output == 0:
                            counts = json.loads(part.readline())
                            total = [a + b for a, b in zip(total or [0] * len(counts), counts)]
                        shutil.copyfileobj(part, file)
        shutil.rmtree(self.folder)
        return total


def predict_chunks(chunks: Iterator[list], predict_chunk: Callable, parts: Parts, worker: Worker,
                   n_rows: int, size: int) -> int:  # fmt: skip
    """Predict the chunks that are not done yet; returns the number of all, of `size` rows each.

    predict_chunk(rows) returns what Parts.write takes. Every process reads all chunks and predicts
    its share; an error in one of them is raised in all, so that the first one can report it.
    """
    how = bar_options(worker.rank > 0, delayed=True)
    number, n_done = 0, min(len(parts.done) * size, n_rows)  # for the speed of this process
    with tqdm(total=n_rows, initial=n_done, unit="row", leave=False, **how) as bar:
        while True:
            error, first = None, number
            try:
                for rank, rows in enumerate(islice(chunks, worker.world_size)):
                    is_done = number in parts.done
                    if rank == worker.rank and not is_done:
                        parts.write(number, *predict_chunk(rows))
                    number += 1
                    bar.update(0 if is_done else len(rows))
            except InputError as found:
                error = str(found)
            if errors := [message for message in worker.gather(error) if message]:
                if worker.rank == 0 and not any(parts.folder.glob("[0-9]*")):
                    shutil.rmtree(parts.folder)
                raise InputError(errors[0])
            if number == first:
                return number


# --- output -----------------------------------------------------------------------------------

PREDICTIONS = "id,pred_label,probs\n"


def predictions(rows: list[Row], predictor: Predictor, progress: bool):
    """The lines of a submission for these rows, and the numbers of truncated rows."""
    probs, n_truncated = predictor.probabilities(rows, progress)
    predicted = [predictor.labels[best] for best in probs.argmax(1)]
    cells = zip([row.id for row in rows], predicted, map(json.dumps, probs.tolist()))
    return [csv_text(cells)], n_truncated


# Relationships and nodes, in the columns of neo4j-admin database import.
NEO4J = (":START_ID,:END_ID,:TYPE,probability:float,sentence\n", ":ID,name,:LABEL\n")


def triples(texts: list[Text], predictor: Predictor, threshold: float, as_csv: bool,
            progress: bool):  # fmt: skip
    """The triples of these texts: JSON lines, or CSV of relationships and of nodes."""
    found, n_truncated = predictor.relations(texts, threshold, progress)
    lines, edges, nodes = [], [], {}
    for text, relations in zip(texts, found):
        for s, label, o, probability in relations:
            pair = [text.entities[s], text.entities[o]]
            if as_csv:
                ids = [f"{e.word}:{e.type}" if e.type else e.word for e in pair]
                edges.append([*ids, label, probability, text.id])
                named = ((e.word, e.type or "Entity") for e in pair)
                nodes |= dict(zip(ids, named))
            else:
                subject, obj = (dict(zip(ENTITY_FIELDS, e)) for e in pair)
                line = {"id": text.id, "subject": subject, "relation": label, "object": obj}
                line["probability"] = probability
                lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    if not as_csv:
        return ["".join(lines)], n_truncated
    return [csv_text(edges), csv_text([id_, *node] for id_, node in nodes.items())], n_truncated
