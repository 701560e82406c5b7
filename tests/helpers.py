"""What several test modules share: paths, rows, tiny encoders, examples."""

import ast
import copy
import csv
import shlex
import shutil
import unicodedata
from collections import Counter
from pathlib import Path

import numpy as np
import torch
import transformers

from distributed import Worker
from rows import ENTITY_FIELDS, Entity, Row
from tokens import Example

ROOT = Path(__file__).parents[1]
SAMPLE = ROOT / "sample"
CPU = Worker(torch.device("cpu"))
BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)


def next_commands(printed: str) -> list[list[str]]:
    """The words of each command that a program prints for the user to go on with."""
    return [shlex.split(line) for line in printed.splitlines() if line.startswith("  python ")]


# --- encoders -----------------------------------------------------------------------------------

SMALL = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4,
         "intermediate_size": 64, "vocab_size": 99}  # fmt: skip
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
ONE_SEGMENT = {"type_vocab_size": 1, "pad_token_id": 1}
FAMILIES = {
    "bert": transformers.BertConfig(**SMALL, **NO_DROPOUT),
    "roberta": transformers.RobertaConfig(**SMALL, **NO_DROPOUT, **ONE_SEGMENT),
    "xlm-r": transformers.XLMRobertaConfig(**SMALL, **NO_DROPOUT, **ONE_SEGMENT),
    "electra": transformers.ElectraConfig(**SMALL, **NO_DROPOUT, embedding_size=16),
    # windows of 8 tokens, shorter than the sentences
    "modernbert": transformers.ModernBertConfig(
        **SMALL, local_attention=8, pad_token_id=0, bos_token_id=1, eos_token_id=2, cls_token_id=1,
        sep_token_id=2),
    "deberta-v2": transformers.DebertaV2Config(
        **SMALL, **NO_DROPOUT, relative_attention=True, position_buckets=8,
        pos_att_type=["p2c", "c2p"], type_vocab_size=2),
}  # fmt: skip
DECODERS = {
    "gpt2": transformers.GPT2Config(n_embd=32, n_layer=3, n_head=4, vocab_size=99, resid_pdrop=0.0,
                                    embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0),
    "llama": transformers.LlamaConfig(**SMALL, num_key_value_heads=2),
    "mistral": transformers.MistralConfig(**SMALL, num_key_value_heads=2, sliding_window=8),
    "qwen3": transformers.Qwen3Config(**SMALL, num_key_value_heads=1, head_dim=8),
}  # fmt: skip


def encoder_of(family: str):
    """A tiny encoder with random weights."""
    torch.manual_seed(0)
    return transformers.AutoModel.from_config(copy.deepcopy((FAMILIES | DECODERS)[family]))


def examples_of(lengths, seed=0) -> list[Example]:
    """Random examples of these lengths, for a vocabulary of 99."""
    random = np.random.default_rng(seed)
    return [
        Example(
            random.integers(5, 99, n), np.sort(random.integers(0, 2, n)), (1, n - 2),
            int(random.integers(30)), (2, n - 1),
            np.stack([random.integers(0, 3, n), random.integers(0, 7, n)]),
        )
        for n in lengths
    ]  # fmt: skip


# --- rows ---------------------------------------------------------------------------------------


def row(sentence, subject, object, label="no_relation", id="0", types=("PER", "ORG")) -> Row:
    """A row with entities at the first occurrence of a word, or at (word, start)."""
    entities = []
    for found, kind in ((subject, types[0]), (object, types[1])):
        word, start = found if isinstance(found, tuple) else (found, sentence.index(found))
        entities.append(Entity(word, start, start + len(word) - 1, kind))
    return Row(id, sentence, *entities, label, "", f"f:{id}")


def nfd(text):
    return unicodedata.normalize("NFD", text)


def decomposed(row):
    """The row in NFD, with offsets that count the characters of the NFD."""

    def entity(e):
        start, word = len(nfd(row.sentence[: e.start])), nfd(e.word)
        return Entity(word, start, start + len(word) - 1, e.type and nfd(e.type))

    sentence, label = nfd(row.sentence), row.label and nfd(row.label)
    entities = entity(row.subject), entity(row.object)
    return Row(row.id, sentence, *entities, label, nfd(row.source), row.where)


def write_rows(path, rows):
    """Write rows in the competition's format."""
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "sentence", "subject_entity", "object_entity", "label", "source"])
        for r in rows:
            entities = (dict(zip(ENTITY_FIELDS, e)) for e in (r.subject, r.object))
            writer.writerow([r.id, r.sentence, *entities, r.label, r.source])


def repeats_counted_from_the_file(path) -> list[int]:
    """Rows that repeat an earlier row's sentence, with object, subject, both, both and label."""
    with open(path, encoding="utf-8-sig", newline="") as file:
        fields = "sentence", "object_entity", "subject_entity", "label"
        cells = [tuple(record[field] for field in fields) for record in csv.DictReader(file)]
    entity = {text: tuple(sorted(ast.literal_eval(text).items())) for r in cells for text in r[1:3]}
    rows = [(sentence, entity[o], entity[s], label) for sentence, o, s, label in cells]
    parts = [[0], [0, 1], [0, 2], [0, 1, 2], [0, 1, 2, 3]]
    counts = [Counter(tuple(r[i] for i in part) for r in rows) for part in parts]
    return [sum(n - 1 for n in count.values()) for count in counts]
