"""The model: tokens in flat batches, an encoder, a head that reads the relation off its states, their checkpoint.

Sentences lie end to end, so no token is padding. Encoders built on transformers' attention interface (BERT, RoBERTa,
XLM-R, ELECTRA, ModernBERT, ...) run on that as they are: `flat_attention`, registered there under the name "flat",
lets each sentence attend to itself alone. The others (DeBERTa-v2) are padded inside `RelationModel`.

    tokenizer, encoder = load_tokenizer("klue/roberta-large"), load_encoder("klue/roberta-large")
    model = RelationModel(encoder, n_labels=30, head="bilstm")
    examples, n_cut = encode(rows, Template(), tokenizer, KLUE_LABELS, max_length=256)
    batch = collate(examples, range(64))
    logits = model(batch)                                                  # (64, 30)
    loss = relation_loss(logits, batch.labels).sum()

    checkpoint = load_checkpoint("runs/demo/ckpt.pt")                      # tensors and plain values, no code is run
    model, tokenizer = restore(checkpoint)
"""

import json
import math
import tempfile
from bisect import bisect_right
from dataclasses import dataclass, fields, replace
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import PackedSequence
from transformers import AttentionInterface, AutoConfig, AutoModel, AutoTokenizer
from transformers.masking_utils import AttentionMaskInterface

from data import PROMPTS, InputError, Row, Template, atomic_write

# --- tokens ------------------------------------------------------------------------------------------------------


class Example(NamedTuple):
    """A row for the encoder: token ids (L,), their segment 0 or 1 (L,), the tokens at which the marks of subject and
    object open, and the label's number (-1 where there is none)."""

    ids: np.ndarray
    types: np.ndarray
    marks: tuple[int, int]
    label: int


def encode(rows: list[Row], template: Template, tokenizer, labels: list[str], max_length: int):
    """(examples, number of sentences cut) for a fast Hugging Face tokenizer.

    An input over `max_length` tokens loses context, never an entity or a mark: kept are the marks, then the words of
    the entities, then the tokens nearest to either. A prompt takes at most a quarter of it on each side.
    """
    if not rows:
        return [], 0  # tokenizers do not take an empty list
    rendered = [template.render(row, tokenizer.sep_token or tokenizer.eos_token or "") for row in rows]
    number = {label: i for i, label in enumerate(labels)}
    start, middle, end, types = _special_tokens(tokenizer, pair=bool(PROMPTS[template.prompt][0]))
    before, after = (
        [_cut_middle(ids, max_length // 4) for ids in _tokens(tokenizer, texts)["input_ids"]]
        for texts in ([r.before for r in rendered], [r.after for r in rendered])
    )
    texts = _tokens(tokenizer, [r.text for r in rendered], return_offsets_mapping=True)
    examples, n_cut = [], 0
    for i, r in enumerate(rendered):
        ids, offsets = texts["input_ids"][i], texts["offset_mapping"][i]
        # the last token that starts where a mark opens, or before: a "▁" of its own may start there too
        marks = [max(bisect_right(offsets, (span[0], math.inf)) - 1, 0) for span in r.spans]
        room = max_length - len(start) - len(before[i]) - len(middle) - len(after[i]) - len(end)
        if len(ids) > room:
            keep = _nearest_to_marks(np.array(offsets), r.spans, room, rows[i].where)
            ids = [ids[k] for k in keep]
            marks = [max(bisect_right(keep, mark) - 1, 0) for mark in marks]
            n_cut += 1
        first = len(start) + len(before[i]) + len(middle)
        ids = start + before[i] + middle + ids + after[i] + end
        segments = np.full(len(ids), types[1], dtype=np.int64)
        segments[:first] = types[0]
        marks = (first + marks[0], first + marks[1])
        examples.append(Example(np.array(ids, dtype=np.int64), segments, marks, number.get(rows[i].label, -1)))
    return examples, n_cut


def _tokens(tokenizer, texts: list[str], **extra):
    return tokenizer(texts, add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False, **extra)


def _special_tokens(tokenizer, pair: bool):
    """The tokens that a tokenizer puts before, between and after its segments, and the segments' type ids."""
    first, second = _tokens(tokenizer, ["가", "나"])["input_ids"]
    if not pair:
        ids = tokenizer("나")["input_ids"]
        at = next(i for i in range(len(ids)) if ids[i : i + len(second)] == second)
        return ids[:at], [], ids[at + len(second) :], (0, 0)
    both = tokenizer("가", "나")
    ids, kinds = both["input_ids"], both.get("token_type_ids")
    one = next(i for i in range(len(ids)) if ids[i : i + len(first)] == first)
    two = next(i for i in range(one + len(first), len(ids)) if ids[i : i + len(second)] == second)
    types = (kinds[one], kinds[two]) if kinds else (0, 0)
    return ids[:one], ids[one + len(first) : two], ids[two + len(second) :], types


def _cut_middle(ids: list[int], room: int) -> list[int]:
    return ids if len(ids) <= room else ids[: room - room // 2] + ids[len(ids) - room // 2 :]


def _nearest_to_marks(offsets: np.ndarray, spans, room: int, where: str) -> list[int]:
    """The `room` tokens to keep, ascending: marks first, then words by distance from their marks, then context."""
    starts, ends = offsets[:, 0], np.maximum(offsets[:, 1], offsets[:, 0] + 1)
    rank = np.full(len(offsets), 2)
    distance = np.full(len(offsets), np.iinfo(np.int64).max)
    for opening, word, word_end, closing in spans:
        rank[(starts < word_end) & (ends > word) & (rank > 1)] = 1
        rank[((starts < word) & (ends > opening)) | ((starts < closing) & (ends > word_end))] = 0
        for edge in (word, word_end):
            distance = np.minimum(distance, np.where(starts < edge, edge - ends, starts - edge).clip(0))
    if (rank == 0).sum() > room:
        raise InputError(f"{where}: the marks of both entities take more than {room} tokens; raise --max-length")
    return np.sort(np.lexsort((distance, rank))[:room]).tolist()


# --- flat batches ------------------------------------------------------------------------------------------------


@dataclass
class Batch:
    """B sentences end to end, T tokens in all, the longest sentence first, so that equal lengths are neighbours.

    `packing` sorts tokens by position and then by sentence: the order of torch's PackedSequence, whose `batch_sizes`
    stay on the CPU, as it demands.
    """

    ids: torch.Tensor  # (T,) token ids
    types: torch.Tensor  # (T,) segment 0 or 1
    positions: torch.Tensor  # (T,) a token's place in its sentence, from 0
    offsets: torch.Tensor  # (B + 1,) int32: sentence i is tokens offsets[i] to offsets[i + 1]
    marks: torch.Tensor  # (B, 2) flat index of the opening marks of subject and object
    labels: torch.Tensor  # (B,) numbers of labels, -1 where unknown
    packing: torch.Tensor  # (T,) flat indices, time-major
    batch_sizes: torch.Tensor  # (longest,) how many sentences have a token at each position; on the CPU
    lengths: list[int]  # (B,) tokens a sentence, descending
    rows: np.ndarray  # (B,) which of the examples each sentence is

    def to(self, device: torch.device) -> "Batch":
        """The batch on `device`; to a GPU by way of pinned memory, so that the copy does not hold up the program."""
        if device.type == "cpu":
            return self
        moved = {f.name: getattr(self, f.name).pin_memory().to(device, non_blocking=True) for f in fields(self)[:7]}
        return replace(self, **moved)


def collate(examples: list[Example], rows: np.ndarray) -> Batch:
    """The flat batch of the examples with these indices."""
    rows = np.array(sorted(rows, key=lambda i: (-len(examples[i].ids), i)))
    chosen = [examples[i] for i in rows]
    lengths = np.array([len(e.ids) for e in chosen])
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    positions = np.concatenate([np.arange(n) for n in lengths])
    return Batch(
        ids=torch.from_numpy(np.concatenate([e.ids for e in chosen])),
        types=torch.from_numpy(np.concatenate([e.types for e in chosen])),
        positions=torch.from_numpy(positions),
        offsets=torch.from_numpy(offsets.astype(np.int32)),
        marks=torch.from_numpy(np.array([e.marks for e in chosen]) + offsets[:-1, None]),
        labels=torch.tensor([e.label for e in chosen]),
        packing=torch.from_numpy(np.argsort(positions, kind="stable")),
        batch_sizes=torch.from_numpy(np.bincount(positions)),
        lengths=lengths.tolist(),
        rows=rows,
    )


def within_tokens(rows: np.ndarray, lengths: np.ndarray, max_tokens: int) -> list[np.ndarray]:
    """`rows` cut, longest sentences first, into runs of at most `max_tokens` tokens (or of a single sentence)."""
    runs, room = [], -1
    for row in sorted(rows, key=lambda i: (-lengths[i], i)):
        if lengths[row] > room:
            runs.append([])
            room = max_tokens
        runs[-1].append(row)
        room -= lengths[row]
    return [np.array(run) for run in runs]


# --- attention ---------------------------------------------------------------------------------------------------


def flat_attention(module, query, key, value, attention_mask, *, flat: Batch, scaling=None, sliding_window=None, **_):
    """Attention of each sentence of a flat batch to itself; transformers' attention interface.

    query, key, value: (1, heads, T, width); returns (1, T, heads, width) and no weights. `sliding_window` w lets a
    token see those nearer than w places. There is no dropout on the attention weights: the kernel for flat batches
    has none, and training is to be the same on every device.
    """
    if query.is_cuda and query.dtype != torch.float32 and torch.cuda.get_device_capability(query.device) >= (8, 0):
        from torch.nn.attention.varlen import varlen_attn  # needs a GPU build of torch

        window = (-1, -1) if sliding_window is None else (sliding_window - 1, sliding_window - 1)
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
        longest = flat.lengths[0]
        out = varlen_attn(q, k, v, flat.offsets, flat.offsets, longest, longest, scale=scaling, window_size=window)
        return out[None], None
    groups = [(length, len(list(same))) for length, same in groupby(flat.lengths)]
    # one split, not a slice a group: the backward pass of each slice would fill a tensor of all tokens
    split = [x[0].split([length * count for length, count in groups], 1) for x in (query, key, value)]
    pieces = []
    for (length, _), *qkv in zip(groups, *split):
        q, k, v = (x.unflatten(1, (-1, length)) for x in qkv)  # (heads, sentences, length, width)
        mask = None
        if sliding_window is not None and length > sliding_window:
            place = torch.arange(length, device=query.device)
            mask = (place[:, None] - place[None]).abs() < sliding_window
        pieces.append(_attend(q, k, v, mask, scaling or q.shape[-1] ** -0.5).flatten(1, 2))
    return torch.cat(pieces, 1).transpose(0, 1)[None], None


def _attend(q, k, v, mask, scaling):
    if q.is_cuda or mask is not None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scaling)
    # on CPUs torch's fused kernel takes four times as long to train on sentences this short
    return ((q * scaling) @ k.transpose(-1, -2)).softmax(-1) @ v


AttentionInterface.register("flat", flat_attention)
AttentionMaskInterface.register("flat", lambda *args, **kwargs: None)  # else a mask of T x T is built


# --- the model ---------------------------------------------------------------------------------------------------


def load_encoder(name: str, added_tokens: range = range(0)) -> nn.Module:
    """A pretrained encoder by its folder or its name on the Hugging Face hub, with fp32 weights whatever the files
    hold. The embeddings of `added_tokens`, ids behind those that the encoder has learned, start as their mean."""
    try:
        encoder = AutoModel.from_pretrained(name, dtype=torch.float32, trust_remote_code=False)
    except Exception as error:  # of many kinds: transformers', the hub's, safetensors'
        raise _cannot_load(name, error) from error
    if added_tokens:
        mean = encoder.get_input_embeddings().weight.detach()[: added_tokens.start].mean(0)
        if added_tokens.stop > encoder.get_input_embeddings().num_embeddings:
            encoder.resize_token_embeddings(added_tokens.stop, mean_resizing=False)
        encoder.get_input_embeddings().weight.data[added_tokens.start : added_tokens.stop] = mean
    return encoder


def load_tokenizer(name: str):
    """The fast tokenizer of an encoder by its folder or its name on the Hugging Face hub."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as error:
        raise _cannot_load(name, error) from error
    if not tokenizer.is_fast:
        raise InputError(f"--model {name}: its tokenizer has no fast version, which tells where in the text tokens are")
    return tokenizer


def _cannot_load(name: str, error: Exception) -> InputError:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
    return InputError(f"--model {name}: expected an encoder's folder or a name on the Hugging Face hub: {reason}")


class BatchNorm(nn.BatchNorm1d):
    """Batch normalisation that takes a sentence by itself, which has no variance, by the running statistics."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if len(x) > 1:
            return super().forward(x)
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)


class Dropout(nn.Dropout):
    """Dropout whose mask costs a tenth on CPUs: torch draws a number for each value there, this cuts 64 random bits
    into four. The probability is met to 1/65536."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.is_cuda or not self.training or self.p == 0:
            return super().forward(x)
        bits = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None).view(torch.int16)
        kept = (bits[: x.numel()] >= round(self.p * 65536) - 32768).view(x.shape)
        return x * (kept.to(x.dtype) / (1 - self.p))


class RelationModel(nn.Module):
    """Encoder and head; maps a Batch to logits (B, n_labels).

    head: "cls" reads the first token; "entity" the first token and the opening marks of subject and object; "bilstm"
    and "bigru" the last forward and the last backward state of an RNN over the sentence. norm ("layer", "batch",
    "none"), gelu and dropout act on what is read, before the classifier.
    """

    def __init__(self, encoder, n_labels: int, head="cls", norm="layer", gelu=False, dropout=0.0):
        super().__init__()
        if getattr(encoder, "pooler", None) is not None:
            encoder.pooler = None  # no head reads it, and its weights would get no gradient
        for module in list(encoder.modules()):
            for name, child in module.named_children():
                if type(child) is nn.Dropout:
                    setattr(module, name, Dropout(child.p))
        self.encoder, self.head = encoder, head
        self.is_flat = encoder._supports_attention_backend
        if self.is_flat:
            encoder.set_attn_implementation("flat")
        self.has_types = (getattr(encoder.config, "type_vocab_size", 0) or 0) > 1
        embeddings = getattr(encoder, "embeddings", None)
        # RoBERTa and its family count positions from the padding id on
        shifted = hasattr(embeddings, "create_position_ids_from_input_ids")
        self.first_position = embeddings.padding_idx + 1 if shifted else 0
        self.longest = getattr(encoder.config, "max_position_embeddings", math.inf) - self.first_position

        hidden = encoder.config.hidden_size
        width = {"cls": hidden, "entity": 3 * hidden, "bilstm": 2 * hidden, "bigru": 2 * hidden}[head]
        if head in ("bilstm", "bigru"):
            self.rnn = (nn.LSTM if head == "bilstm" else nn.GRU)(hidden, hidden, bidirectional=True)
            for name, weight in self.rnn.named_parameters():
                nn.init.xavier_normal_(weight) if "weight" in name else nn.init.zeros_(weight)
        norms = {"layer": nn.LayerNorm, "batch": BatchNorm, "none": nn.Identity}
        self.norm = norms[norm](width)
        self.activation = nn.GELU() if gelu else nn.Identity()
        self.dropout = Dropout(dropout)
        self.classifier = nn.Linear(width, n_labels)
        nn.init.kaiming_normal_(self.classifier.weight)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, batch: Batch) -> torch.Tensor:
        states = self.encode(batch)
        first = batch.offsets[:-1].long()
        if self.head == "cls":
            features = states[first]
        elif self.head == "entity":
            features = states[torch.cat([first[:, None], batch.marks], 1)].flatten(1)
        else:
            features = self._last_states(states, batch)
        return self.classifier(self.dropout(self.activation(self.norm(features))))

    def encode(self, batch: Batch) -> torch.Tensor:
        """The last hidden states of the encoder, (T, hidden)."""
        types = {"token_type_ids": batch.types[None]} if self.has_types else {}
        if self.is_flat:
            positions = batch.positions[None] + self.first_position
            out = self.encoder(input_ids=batch.ids[None], position_ids=positions, flat=batch, **types)
            return out.last_hidden_state[0]
        places = torch.arange(batch.lengths[0], device=batch.ids.device)
        real = places[None] < batch.offsets.diff()[:, None]  # (B, longest)
        padding = torch.full(real.shape, self.encoder.config.pad_token_id or 0, device=real.device)
        ids = padding.masked_scatter(real, batch.ids)
        types = {k: torch.zeros_like(padding).masked_scatter(real, v) for k, v in types.items()}
        return self.encoder(input_ids=ids, attention_mask=real.long(), **types).last_hidden_state[real]

    def _last_states(self, states: torch.Tensor, batch: Batch) -> torch.Tensor:
        """The RNN's forward state at the last token of each sentence beside the backward one at its first token,
        (B, 2 x hidden)."""
        if states.is_cuda:
            with torch.autocast("cuda", enabled=False):  # which would run it in fp16 also where bf16 is asked for
                _, last = self.rnn(PackedSequence(states[batch.packing].float(), batch.batch_sizes))
            last = last[0] if self.head == "bilstm" else last  # (2 directions, B, hidden)
            return torch.cat([last[0], last[1]], 1)
        # torch's CPU kernels take three times as long for packed sequences as for padded ones, and a batch has
        # sentences of like length. Each direction runs by itself, the backward one over the sentences reversed.
        first, lengths = batch.offsets[:-1].long(), torch.tensor(batch.lengths)
        places = torch.minimum(torch.arange(batch.lengths[0])[:, None], lengths - 1)  # (longest, B)
        last = []
        # half precision only to predict: its gradients would lose what sums up over a sentence
        half = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16
        dtype = torch.bfloat16 if half and not torch.is_grad_enabled() else torch.float32
        with torch.autocast("cpu", enabled=False):
            for weights, order in (
                (self.rnn._flat_weights[:4], first + places),
                (self.rnn._flat_weights[4:], first + lengths - 1 - places),
            ):
                weights = [w.to(dtype) for w in weights]
                zero = states.new_zeros(1, len(lengths), states.shape[1], dtype=dtype)
                run, start = (torch.lstm, (zero, zero)) if self.head == "bilstm" else (torch.gru, zero)
                out = run(states[order].to(dtype), start, weights, True, 1, 0.0, self.training, False, False)[0]
                last.append(out[lengths - 1, torch.arange(len(lengths))])
        return torch.cat(last, 1)


def relation_loss(logits, labels, label_smoothing=0.0, focal_gamma=0.0, focal_alpha=None) -> torch.Tensor:
    """The loss of each sentence, (B,): cross entropy, or with focal_gamma > 0 or focal_alpha the focal loss of
    Lin et al. 2017 on the softmax, FL(p_t) = -alpha_t (1 - p_t)^gamma log p_t; focal_alpha: (n_labels,) or None."""
    logits = logits.float()
    if not focal_gamma and focal_alpha is None:
        return F.cross_entropy(logits, labels, label_smoothing=label_smoothing, reduction="none")
    log_p = logits.log_softmax(1).gather(1, labels[:, None])[:, 0]
    loss = -((1 - log_p.exp()) ** focal_gamma) * log_p
    return loss if focal_alpha is None else focal_alpha[labels] * loss


# --- checkpoint --------------------------------------------------------------------------------------------------

MODEL_FORMAT, PROGRESS_FORMAT = "relation model 1", "training progress 1"


def save_tensors(path: str | Path, content: dict, keep: Path | None = None):
    """Writes a dict of tensors and plain values atomically; what was at `path` goes to `keep` if given."""
    with atomic_write(path, "wb", keep) as file:
        try:
            torch.save(content, file)
        except RuntimeError as error:  # torch covers up why a write failed
            if not isinstance(error.__context__, OSError):
                raise
            raise error.__context__ from error


def save_checkpoint(path: str | Path, model: RelationModel, tokenizer, labels: list[str], **more):
    """Writes all that `infer.py` needs; `more` (settings, run, data, ...) takes tensors and plain values only."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        files = {f.name: f.read_text(encoding="utf-8") for f in Path(folder).iterdir()}
    content = {
        "format": MODEL_FORMAT,
        "weights": model.state_dict(),
        "encoder": json.dumps(model.encoder.config.to_dict()),
        "tokenizer": files,
        "labels": labels,
        **more,
    }
    save_tensors(path, content)


class DamagedFile(InputError):
    """A file that is not whole, or not one of ours at all."""


def load_checkpoint(path: str | Path, format: str = MODEL_FORMAT) -> dict:
    """The content of a checkpoint, on the CPU; only tensors and plain values are read (weights_only)."""
    try:
        open(path, "rb").close()
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of any kind: the file may hold anything
        raise DamagedFile(f"{path}: truncated, or not a checkpoint of train.py") from error
    found = content.get("format") if isinstance(content, dict) else None
    if found != format:
        raise InputError(f"{path}: found format {str(found)[:40]!r}, expected {format!r} as this train.py writes it")
    return content


def restore(checkpoint: dict):
    """(model, tokenizer) of a checkpoint; needs no network."""
    with tempfile.TemporaryDirectory() as folder:
        for name, text in checkpoint["tokenizer"].items():
            if Path(name).name != name:
                raise InputError(f"tokenizer file {name!r} of the checkpoint: expected a name without folders")
            (Path(folder) / name).write_text(text, encoding="utf-8")
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    config = AutoConfig.for_model(**json.loads(checkpoint["encoder"]))
    encoder = AutoModel.from_config(config, dtype=torch.float32, trust_remote_code=False)
    settings = {key: checkpoint["settings"][key] for key in ("head", "norm", "gelu", "dropout")}
    model = RelationModel(encoder, len(checkpoint["labels"]), **settings)
    model.load_state_dict(checkpoint["weights"])
    return model, tokenizer
