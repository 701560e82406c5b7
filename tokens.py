"""From rows to token ids, and from token ids to flat batches.

    examples, n_truncated = encode(rows, Template(), tokenizer, labels, max_length=256)
    for indices in epoch_batches(lengths, 64, seed=42, epoch=0):     # of similar length
        batch = collate(examples, indices)

The sentences of a batch are concatenated, without padding: batch.ids has shape (T,).
"""

import math
from bisect import bisect_left, bisect_right
from dataclasses import dataclass, fields, replace
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from common import InputError
from data import PROMPTS, TYPES, Rendered, Template
from rows import Row, normalized

# --- rows to token ids ------------------------------------------------------------------------


class Example(NamedTuple):
    """A row as L tokens."""

    ids: np.ndarray  # (L,) token ids
    segments: np.ndarray  # (L,) token_type_ids, 0 or 1
    marker_starts: tuple[int, int]  # first tokens of the subject's and the object's opening marker
    label: int  # class number, -1 if unknown
    marker_ends: tuple[int, int]  # last tokens of their closing markers
    entities: np.ndarray  # (2, L): 1 subject, 2 object, else 0; 1 + number of the type or 0
    words: np.ndarray | None = None  # (L,) word number, -1 for special tokens; for pre-training
    targets: np.ndarray | None = None  # (n_labels,) soft target, in place of the label


def encode(rows: list[Row], template: Template, tokenizer, labels: list[str], max_length: int):
    """(examples, number of truncated rows), with a fast Hugging Face tokenizer.

    A prompt gets at most a quarter of `max_length` on each side. Of a sentence that does not fit
    into the rest, markers are kept first, then the words of the entities, then the tokens nearest
    to an entity. Raises InputError if the markers alone do not fit, or as `normalized` does.
    """
    rows = [normalized(row) for row in rows]  # rows made in Python too
    backend = tokenizer.backend_tokenizer  # twice as fast as calling the tokenizer itself
    separator = tokenizer.sep_token or tokenizer.eos_token or ""
    rendered = [template.render(row, separator) for row in rows]
    number = {label: i for i, label in enumerate(labels)}
    has_pair = bool(PROMPTS[template.prompt][0])
    start, middle, end, segment_ids = _special_tokens(tokenizer, has_pair)
    before, after = (
        [
            _cut_middle(text.ids, max_length // 4)
            for text in backend.encode_batch_fast(texts, add_special_tokens=False)
        ]
        for texts in ([r.before for r in rendered], [r.after for r in rendered])
    )
    texts = backend.encode_batch([r.text for r in rendered], add_special_tokens=False)
    examples, n_truncated = [], 0
    for i, r in enumerate(rendered):
        ids, offsets = texts[i].ids, texts[i].offsets
        starts, ends = _marker_tokens(offsets, r)
        entities = _entity_tokens(offsets, r.spans, rows[i], template.marker == "entity_mask")
        room = max_length - len(start) - len(before[i]) - len(middle) - len(after[i]) - len(end)
        if len(ids) > room:
            keep = _tokens_to_keep(np.array(offsets), r.spans, room, rows[i].where)
            ids = [ids[k] for k in keep]
            starts, ends = ([max(bisect_right(keep, t) - 1, 0) for t in x] for x in (starts, ends))
            entities = entities[:, keep]
            n_truncated += 1
        n_before, n_after = len(start) + len(before[i]) + len(middle), len(after[i]) + len(end)
        ids = start + before[i] + middle + ids + after[i] + end
        segments = np.full(len(ids), segment_ids[1], dtype=np.int64)
        segments[:n_before] = segment_ids[0]
        inside, entities = entities, np.zeros((2, len(ids)), dtype=np.int64)
        entities[:, n_before : len(ids) - n_after] = inside
        starts, ends = ((n_before + x[0], n_before + x[1]) for x in (starts, ends))
        label = number.get(rows[i].label, -1)
        ids = np.array(ids, dtype=np.int64)
        examples.append(Example(ids, segments, starts, label, ends, entities))
    return examples, n_truncated


def _special_tokens(tokenizer, pair: bool):
    """The special tokens before, between and after the segments, and the two segment ids."""
    text, last = tokenizer("가", "나" if pair else None), int(pair)
    ids, type_ids = text["input_ids"], text.get("token_type_ids")
    segment = text.sequence_ids()  # None for special tokens
    first, second = segment.index(0), segment.index(last)
    first_end, second_end = first + segment.count(0), second + segment.count(last)
    before, between, after = ids[:first], ids[first_end:second], ids[second_end:]
    if pair and not between and tokenizer.eos_token_id is not None:
        between = [tokenizer.eos_token_id]  # decoders' tokenizers do not separate segments
    return before, between, after, (type_ids[first], type_ids[second]) if type_ids else (0, 0)


def _cut_middle(ids: list[int], room: int) -> list[int]:
    return ids if len(ids) <= room else ids[: room - room // 2] + ids[len(ids) - room // 2 :]


def _marker_tokens(offsets: list[tuple], r: Rendered) -> tuple[list[int], list[int]]:
    """The first tokens of the opening markers and the last tokens of the closing markers."""
    # The last token at or before the marker's start: a lone "▁" may start at the same offset.
    starts = [max(bisect_right(offsets, (span[0], math.inf)) - 1, 0) for span in r.spans]
    stops = [len(r.text[: span[3]].rstrip()) for span in r.spans]
    return starts, [max(bisect_left(offsets, (stop,)) - 1, 0) for stop in stops]


def _entity_tokens(offsets: list[tuple], spans, row: Row, masked: bool) -> np.ndarray:
    """Entity and type of each token, (2, L), as in Example; of two that overlap, the shorter."""
    entities = np.zeros((2, len(offsets)), dtype=np.int64)
    found = zip((1, 2), (row.subject, row.object), spans)
    for who, entity, (opening, word, word_end, _) in sorted(found, key=lambda x: -len(x[1].word)):
        start, end = (opening, word) if masked else (word, word_end)
        first = bisect_left(offsets, (start,))
        first -= first > 0 and offsets[first - 1][1] > start  # a token that the word starts inside
        inside = slice(first, bisect_left(offsets, (end,)))
        entities[0, inside] = who
        entities[1, inside] = TYPES.index(entity.type) + 1 if entity.type in TYPES else 0
    return entities


def _tokens_to_keep(offsets: np.ndarray, spans, room: int, where: str) -> list[int]:
    """The `room` tokens to keep, ascending: markers, then entity words, then nearby context."""
    starts, ends = offsets[:, 0], np.maximum(offsets[:, 1], offsets[:, 0] + 1)
    priority = np.full(len(offsets), 2)  # 0: marker, 1: word of an entity, 2: context
    distance = np.full(len(offsets), np.iinfo(np.int64).max)  # in characters, to an entity's edge
    for opening, word, word_end, closing in spans:
        priority[(starts < word_end) & (ends > word) & (priority > 1)] = 1
        in_opening = (starts < word) & (ends > opening)
        in_closing = (starts < closing) & (ends > word_end)
        priority[in_opening | in_closing] = 0
        for edge in (word, word_end):
            gap = np.where(starts < edge, edge - ends, starts - edge).clip(0)
            distance = np.minimum(distance, gap)
    if (priority == 0).sum() > room:
        raise InputError(f"{where}: the entity markers need over {room} tokens; raise --max-length")
    return np.sort(np.lexsort((distance, priority))[:room]).tolist()


# --- flat batches -----------------------------------------------------------------------------


IGNORED = -100  # the label of a missing sentence, which no loss counts


@dataclass
class Batch:
    """B sentences with T tokens in all, longest first: equal lengths are neighbours.

    A padded batch has padding sentences after the B, which only the encoder sees.
    """

    ids: torch.Tensor  # (T,) token ids
    segments: torch.Tensor  # (T,) token_type_ids
    entities: torch.Tensor  # (2, T) as in Example
    positions: torch.Tensor  # (T,) position in the sentence, from 0
    offsets: torch.Tensor  # (B + 1,) int32; sentence i is tokens offsets[i] to offsets[i + 1]
    marker_starts: torch.Tensor  # (B, 2) indices into ids
    marker_ends: torch.Tensor  # (B, 2) indices into ids
    labels: torch.Tensor  # (B,) class numbers, -1 if unknown
    lengths: list[int]  # tokens per sentence that has some, descending before the padding
    longest: int  # at least the largest of `lengths`
    indices: np.ndarray  # (B,) which example each sentence is
    targets: torch.Tensor | None = None  # (B, n_labels) in place of the labels

    def tensors(self) -> dict[str, torch.Tensor]:
        named = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: value for name, value in named.items() if isinstance(value, torch.Tensor)}

    def to(self, device: torch.device) -> "Batch":
        return replace(self, **{k: to_device(v, device) for k, v in self.tensors().items()})

    def copy_to(self, other: "Batch"):
        """Copy the tensors into those of a batch with the same shapes."""
        for name, tensor in self.tensors().items():
            target = getattr(other, name)
            target.copy_(tensor.pin_memory() if target.is_cuda else tensor, non_blocking=True)

    def pad(self, n_tokens: int, n_sentences: int, longest: int) -> "Batch":
        """Pad to T = n_tokens and B = n_sentences: a CUDA graph needs constant shapes.

        Added sentences are empty and have the label IGNORED and zero targets. At least one token is
        added. Added tokens form padding sentences of at most PAD_LENGTH tokens, whose number
        depends on n_tokens only.
        """
        n, size = len(self.labels), len(self.ids)
        missing, n_padding = n_tokens - size, padding_step(n_tokens - 1) // PAD_LENGTH
        assert 0 < missing <= n_padding * PAD_LENGTH, (size, n_tokens)
        ends = [min(size + PAD_LENGTH * (i + 1), n_tokens) for i in range(n_padding)]
        ends = torch.tensor([size] * (n_sentences - n) + ends, dtype=torch.int32)
        lengths = torch.diff(ends, prepend=torch.tensor([size])).tolist()
        tokens = {name: F.pad(getattr(self, name), (0, missing)) for name in TOKEN_FIELDS}
        sentences = (0, 0, 0, n_sentences - n)
        return replace(
            self,
            **tokens,
            offsets=torch.cat([self.offsets, ends]),
            marker_starts=F.pad(self.marker_starts, sentences),
            marker_ends=F.pad(self.marker_ends, sentences),
            labels=F.pad(self.labels, sentences[2:], value=IGNORED),
            lengths=self.lengths + [length for length in lengths if length],
            longest=longest,
            targets=None if self.targets is None else F.pad(self.targets, sentences),
        )


TOKEN_FIELDS = ("ids", "segments", "entities", "positions")
PAD_LENGTH = 128  # tokens of a padding sentence; attention works in blocks of this size


def padding_step(n_tokens: int) -> int:
    return max(PAD_LENGTH, 2 ** (n_tokens.bit_length() - 4))


def padded_size(n_tokens: int) -> int:
    """The size that a batch is padded to: at least one token more, eight sizes per octave.

    So few sizes need few graphs, and padding is about 4 % of the tokens.
    """
    step = padding_step(n_tokens)
    return n_tokens // step * step + step


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy to `device`; to a GPU through pinned memory, so that the copy is asynchronous."""
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


def collate(examples: list[Example], indices: np.ndarray) -> Batch:
    """The flat batch of the examples with these indices."""
    indices = np.array(sorted(indices, key=lambda i: (-len(examples[i].ids), i)))
    chosen = [examples[i] for i in indices]
    lengths = np.array([len(e.ids) for e in chosen])
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    first = offsets[:-1, None]  # (B, 1)
    has_targets = chosen[0].targets is not None
    return Batch(
        ids=torch.from_numpy(np.concatenate([e.ids for e in chosen])),
        segments=torch.from_numpy(np.concatenate([e.segments for e in chosen])),
        entities=torch.from_numpy(np.concatenate([e.entities for e in chosen], 1)),
        positions=torch.from_numpy(np.concatenate([np.arange(n) for n in lengths])),
        offsets=torch.from_numpy(offsets.astype(np.int32)),
        marker_starts=torch.from_numpy(np.array([e.marker_starts for e in chosen]) + first),
        marker_ends=torch.from_numpy(np.array([e.marker_ends for e in chosen]) + first),
        labels=torch.tensor([e.label for e in chosen]),
        lengths=lengths.tolist(),
        longest=int(lengths[0]),
        indices=indices,
        targets=torch.from_numpy(np.stack([e.targets for e in chosen])) if has_targets else None,
    )


def within_tokens(indices: np.ndarray, lengths: np.ndarray, max_tokens: int) -> list[np.ndarray]:
    """Split `indices`, longest first, into groups of at most `max_tokens` tokens.

    A longer sentence is a group of its own.
    """
    groups, room = [], -1
    for index in sorted(indices, key=lambda i: (-lengths[i], i)):
        if lengths[index] > room:
            groups.append([])
            room = max_tokens
        groups[-1].append(index)
        room -= lengths[index]
    return [np.array(group) for group in groups]


def epoch_batches(lengths: np.ndarray, batch_size: int, seed: int, epoch: int) -> list[np.ndarray]:
    """The indices of all examples in batches of similar length: a pure function of its arguments.

    Sorting within pools of 50 batches keeps the order random, with few lengths in a batch.
    """
    random = np.random.default_rng([seed, epoch])
    order = random.permutation(len(lengths))
    pool = 50 * batch_size
    pools = [order[i : i + pool] for i in range(0, len(order), pool)]
    order = np.concatenate([p[np.argsort(lengths[p], kind="stable")] for p in pools])
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    return [batches[i] for i in random.permutation(len(batches))]
