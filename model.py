"""The model: tokens in flat batches, an encoder, a head that reads the relation off its states, their checkpoint.

Sentences lie end to end, so no token is padding. Encoders built on transformers' attention interface (BERT, RoBERTa,
XLM-R, ELECTRA, ModernBERT, ...; decoders such as GPT-2 and Llama too) run on that as they are: `flat_attention`,
registered there under the name "flat", lets each sentence attend to itself alone. The others (DeBERTa-v2) are padded
inside `FlatEncoder`, on which `RelationModel` and, for pre-training, `MaskedLanguageModel` are built.

    tokenizer, encoder = load_tokenizer("klue/roberta-large"), load_encoder("klue/roberta-large")
    model = RelationModel(encoder, n_labels=30, head="bilstm")
    examples, n_cut = encode(rows, Template(), tokenizer, KLUE_LABELS, max_length=256)
    batch = collate(examples, range(64))
    logits = model(batch)                                                  # (64, 30), in the order of batch.indices
    loss = relation_loss(logits, batch.labels).sum()

    checkpoint = load_checkpoint("runs/demo/ckpt.pt")                      # tensors and plain values, no code is run
    model, tokenizer = restore(checkpoint)                                 # infer.predict_rows does this and predicts
"""

import json
import math
import shutil
import tempfile
from bisect import bisect_left, bisect_right
from dataclasses import dataclass, fields, replace
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import huggingface_hub
import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import AddedToken
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pad_sequence
from transformers import AttentionInterface, AutoConfig, AutoModel, AutoModelForMaskedLM, AutoTokenizer
from transformers.modeling_outputs import BaseModelOutput

from data import PROMPTS, TYPE_NAMES, InputError, Row, Template, atomic_write, first_line

# --- tokens ------------------------------------------------------------------------------------------------------


class Example(NamedTuple):
    """A row for the encoder, of L tokens."""

    ids: np.ndarray  # (L,) token ids
    segments: np.ndarray  # (L,) 0 or 1, as token_type_ids
    openings: tuple[int, int]  # the tokens at which the marks of subject and object open
    label: int  # its number, -1 where there is none
    closings: tuple[int, int]  # the last tokens of the closing marks
    entities: np.ndarray  # (2, L) of none 0, of the subject 1, the object 2; its type, 1 + place in TYPE_NAMES, or 0
    words: np.ndarray | None = None  # (L,) to mask tokens: the number of a token's word, -1 for special tokens


def encode(rows: list[Row], template: Template, tokenizer, labels: list[str], max_length: int):
    """(examples, number of sentences cut) for a fast Hugging Face tokenizer.

    Of an input over `max_length` tokens the marks are kept, then the words of the entities (where they do not fit,
    their ends), then the tokens nearest to either. A prompt takes at most a quarter of it on each side. Raises
    InputError where the marks alone take more.
    """
    backend = tokenizer.backend_tokenizer  # transformers' own call takes twice the time around it
    rendered = [template.render(row, tokenizer.sep_token or tokenizer.eos_token or "") for row in rows]
    number = {label: i for i, label in enumerate(labels)}
    start, middle, end, segment_ids = _special_tokens(tokenizer, pair=bool(PROMPTS[template.prompt][0]))
    type_number = {type: i for i, type in enumerate(TYPE_NAMES["en"], 1)}
    before, after = (
        [_cut_middle(text.ids, max_length // 4) for text in backend.encode_batch_fast(texts, add_special_tokens=False)]
        for texts in ([r.before for r in rendered], [r.after for r in rendered])
    )
    texts = backend.encode_batch([r.text for r in rendered], add_special_tokens=False)
    examples, n_cut = [], 0
    for i, r in enumerate(rendered):
        ids, offsets = texts[i].ids, texts[i].offsets
        # the last token that starts where a mark opens, or before: a "▁" of its own may start there too
        openings = [max(bisect_right(offsets, (span[0], math.inf)) - 1, 0) for span in r.spans]
        closings = [max(bisect_left(offsets, (len(r.text[: span[3]].rstrip()),)) - 1, 0) for span in r.spans]
        entities = _entities(offsets, r.spans, rows[i], template.marker == "entity_mask", type_number)
        room = max_length - len(start) - len(before[i]) - len(middle) - len(after[i]) - len(end)
        if len(ids) > room:
            keep = _nearest_to_marks(np.array(offsets), r.spans, room, rows[i].where)
            ids = [ids[k] for k in keep]
            openings, closings = ([max(bisect_right(keep, m) - 1, 0) for m in both] for both in (openings, closings))
            entities = entities[:, keep]
            n_cut += 1
        first, last = len(start) + len(before[i]) + len(middle), len(after[i]) + len(end)
        ids = start + before[i] + middle + ids + after[i] + end
        segments = np.full(len(ids), segment_ids[1], dtype=np.int64)
        segments[:first] = segment_ids[0]
        openings, closings = ((first + tokens[0], first + tokens[1]) for tokens in (openings, closings))
        entities = np.concatenate([np.zeros((2, first), int), entities, np.zeros((2, last), int)], 1)
        label = number.get(rows[i].label, -1)
        examples.append(Example(np.array(ids, dtype=np.int64), segments, openings, label, closings, entities))
    return examples, n_cut


def _entities(offsets: list[tuple], spans, row: Row, masked: bool, type_number: dict[str, int]) -> np.ndarray:
    """Which entity each token belongs to, and its type (2, L). Where they overlap it is the shorter one's."""
    entities = np.zeros((2, len(offsets)), dtype=np.int64)
    pairs = zip((1, 2), (row.subject, row.object), spans)
    for who, entity, (opening, word, word_end, _) in sorted(pairs, key=lambda pair: -len(pair[1].word)):
        start, end = (opening, word) if masked else (word, word_end)  # the mark stands for the word
        first = bisect_left(offsets, (start,))
        first -= first > 0 and offsets[first - 1][1] > start  # the token that the word begins in
        inside = slice(first, bisect_left(offsets, (end,)))
        entities[0, inside], entities[1, inside] = who, type_number.get(entity.type, 0)
    return entities


def encode_sentences(sentences: list[str], tokenizer, max_length: int):
    """(examples, number of sentences cut) of sentences by themselves: no entities, marks and prompts."""
    backend = tokenizer.backend_tokenizer
    backend.enable_truncation(max_length)
    found = backend.encode_batch(sentences)
    backend.no_truncation()
    examples = []
    for text in found:
        ids = np.array(text.ids, dtype=np.int64)
        words = np.array([-1 if number is None else number for number in text.word_ids])
        real = words >= 0
        if words.max(initial=0) == 0:  # this tokenizer does not tell words: each token is one
            words[real] = np.arange(real.sum())
        segments, entities = np.zeros_like(ids), np.zeros((2, len(ids)), dtype=np.int64)
        examples.append(Example(ids, segments, (0, 0), -1, (0, 0), entities, words))
    return examples, sum(bool(text.overflowing) for text in found)


def n_masked(example: Example) -> int:
    """How many tokens of a sentence are masked: 15 %, at least one."""
    return max(1, round(0.15 * (example.words >= 0).sum()))


def collate_masked(examples: list[Example], indices, key: list[int], tokenizer):
    """(the flat batch of these examples with tokens masked, flat indices of those (M,), their true ids (M,)).

    As Devlin et al. 2019: of the tokens chosen 80 % become the mask token, 10 % any token, 10 % stay. They are chosen
    by whole words, the last one in part where it has more tokens than are left to mask. What is masked is a pure
    function of `key`, the example and its index.
    """
    masked, places = {}, {}
    for index in indices:
        random, example = np.random.default_rng([*key, index]), examples[index]
        order = random.permutation(example.words.max() + 1)[example.words]  # in random order, a word's tokens together
        order[example.words < 0] = len(order)
        chosen = np.argsort(order, kind="stable")[: n_masked(example)]
        fate, ids = random.random(len(chosen)), example.ids.copy()
        ids[chosen] = np.where(fate < 0.9, random.integers(len(tokenizer), size=len(chosen)), ids[chosen])
        ids[chosen[fate < 0.8]] = tokenizer.mask_token_id
        masked[index], places[index] = example._replace(ids=ids), chosen
    batch = collate(masked, indices)
    flat = np.concatenate([start + places[index] for start, index in zip(batch.offsets.tolist(), batch.indices)])
    true = np.concatenate([examples[index].ids[places[index]] for index in batch.indices])
    return batch, torch.from_numpy(flat), torch.from_numpy(true)


def _special_tokens(tokenizer, pair: bool):
    """The tokens that a tokenizer puts before, between and after its segments, and the ids of the segments."""
    text, last = tokenizer("가", "나" if pair else None), int(pair)
    ids, type_ids, segment = text["input_ids"], text.get("token_type_ids"), text.sequence_ids()  # None: special token
    first, second = segment.index(0), segment.index(last)
    before, between, after = ids[:first], ids[first + segment.count(0) : second], ids[second + segment.count(last) :]
    if pair and not between and tokenizer.eos_token_id is not None:  # as a decoder's, which would run them together
        between = [tokenizer.eos_token_id]
    return before, between, after, (type_ids[first], type_ids[second]) if type_ids else (0, 0)


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
    """B sentences end to end, T tokens in all, the longest sentence first, so that equal lengths are neighbours."""

    ids: torch.Tensor  # (T,) token ids
    segments: torch.Tensor  # (T,) segment 0 or 1
    entities: torch.Tensor  # (2, T) what a token belongs to and the entity's type, as in Example
    positions: torch.Tensor  # (T,) a token's place in its sentence, from 0
    offsets: torch.Tensor  # (B + 1,) int32: sentence i is tokens offsets[i] to offsets[i + 1]
    openings: torch.Tensor  # (B, 2) flat index of the opening marks of subject and object
    closings: torch.Tensor  # (B, 2) flat index of the last tokens of their closing marks
    labels: torch.Tensor  # (B,) numbers of labels, -1 where unknown
    lengths: list[int]  # (B,) tokens a sentence, descending
    indices: np.ndarray  # (B,) which of the examples each sentence is

    def to(self, device: torch.device) -> "Batch":
        """The batch on `device`."""
        tensors = {f.name: to_device(getattr(self, f.name), device) for f in fields(self) if f.type is torch.Tensor}
        return replace(self, **tensors)


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The tensor on `device`; to a GPU by way of pinned memory, so that the copy does not hold up the program."""
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


def collate(examples: list[Example], indices: np.ndarray) -> Batch:
    """The flat batch of the examples with these indices."""
    indices = np.array(sorted(indices, key=lambda i: (-len(examples[i].ids), i)))
    chosen = [examples[i] for i in indices]
    lengths = np.array([len(e.ids) for e in chosen])
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    return Batch(
        ids=torch.from_numpy(np.concatenate([e.ids for e in chosen])),
        segments=torch.from_numpy(np.concatenate([e.segments for e in chosen])),
        entities=torch.from_numpy(np.concatenate([e.entities for e in chosen], 1)),
        positions=torch.from_numpy(np.concatenate([np.arange(n) for n in lengths])),
        offsets=torch.from_numpy(offsets.astype(np.int32)),
        openings=torch.from_numpy(np.array([e.openings for e in chosen]) + offsets[:-1, None]),
        closings=torch.from_numpy(np.array([e.closings for e in chosen]) + offsets[:-1, None]),
        labels=torch.tensor([e.label for e in chosen]),
        lengths=lengths.tolist(),
        indices=indices,
    )


def within_tokens(indices: np.ndarray, lengths: np.ndarray, max_tokens: int) -> list[np.ndarray]:
    """`indices` cut, longest sentences first, into runs of at most `max_tokens` tokens (or of a single sentence)."""
    runs, room = [], -1
    for index in sorted(indices, key=lambda i: (-lengths[i], i)):
        if lengths[index] > room:
            runs.append([])
            room = max_tokens
        runs[-1].append(index)
        room -= lengths[index]
    return [np.array(run) for run in runs]


# --- attention ---------------------------------------------------------------------------------------------------


class Softmax(torch.autograd.Function):
    """Softmax over the last dimension for CPUs, computed in fp32: torch's own takes up to three times as long in bf16
    where its length is no multiple of 32. The backward pass needs no fp32."""

    @staticmethod
    def forward(ctx, x: torch.Tensor) -> torch.Tensor:
        probs = x.float().softmax(-1).to(x.dtype)
        ctx.save_for_backward(probs)
        return probs

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> torch.Tensor:
        (probs,) = ctx.saved_tensors
        return torch._softmax_backward_data(grad, probs, -1, probs.dtype)


@torch.compiler.disable  # else each new set of lengths would be compiled anew
def flat_attention(module, query, key, value, attention_mask, *, flat: Batch, scaling=None, sliding_window=None, **_):
    """Attention of each sentence of a flat batch to itself; transformers' attention interface.

    query, key, value: (1, heads, T, width), where each head of key and value may serve several of the query's; returns
    (1, T, heads, width) and no weights. `sliding_window` w lets a token see those nearer than w places; in a module
    that is causal it sees none after itself. There is no dropout on the attention weights: the kernel for flat
    batches has none, and training is to be the same on every device.
    """
    query, key = query.to(value.dtype), key.to(value.dtype)  # rotary embeddings are computed in fp32
    causal, shared = getattr(module, "is_causal", False), query.shape[1] // key.shape[1]
    if shared > 1:
        key, value = (x.repeat_interleave(shared, 1) for x in (key, value))
    fits = query.is_cuda and query.dtype != torch.float32 and query.shape[-1] % 8 == 0 and query.shape[-1] <= 256
    if fits and torch.cuda.get_device_capability(query.device) >= (8, 0):
        from torch.nn.attention.varlen import varlen_attn  # needs a GPU build of torch

        window = (-1, -1) if sliding_window is None else (sliding_window - 1, sliding_window - 1)
        window = (window[0], 0) if causal else window
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
        longest = flat.lengths[0]
        out = varlen_attn(q, k, v, flat.offsets, flat.offsets, longest, longest, scale=scaling, window_size=window)
        return out[None], None
    groups = [(length, len(list(same))) for length, same in groupby(flat.lengths)]
    scale = scaling or query.shape[-1] ** -0.5
    # one split, not a slice a group: the backward pass of each slice would fill a tensor of all tokens
    split = [x[0].split([length * count for length, count in groups], 1) for x in (query * scale, key, value)]
    pieces = []
    for (length, _), *qkv in zip(groups, *split):
        q, k, v = (x.unflatten(1, (-1, length)) for x in qkv)  # (heads, sentences, length, width)
        mask, reach = None, (sliding_window or length) - 1
        if causal or reach < length - 1:
            mask = torch.ones(length, length, dtype=torch.bool, device=query.device)
            mask = mask.triu(-reach).tril(0 if causal else reach)
        if q.is_cuda or mask is not None:
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=1)
        else:  # on CPUs torch's fused kernel takes four times as long to train on sentences this short
            out = Softmax.apply(q @ k.transpose(-1, -2)) @ v
        pieces.append(out.flatten(1, 2).transpose(0, 1))
    return torch.cat(pieces)[None], None


huggingface_hub.utils.logging.set_verbosity_error()  # else it tells of each of its tries without a network
AttentionInterface.register("flat", flat_attention)  # and no kind of mask with it: then transformers builds none


# --- the model ---------------------------------------------------------------------------------------------------


def load_encoder(name: str, added_tokens: range = range(0)) -> nn.Module:
    """A pretrained encoder by its folder or its name on the Hugging Face hub, with fp32 weights whatever the files
    hold. The embeddings of `added_tokens`, ids behind those that the encoder has learned, start as the mean of the
    learned ones."""
    encoder = _load(AutoModel, name, dtype=torch.float32)
    if added_tokens:
        mean = encoder.get_input_embeddings().weight.detach()[: added_tokens.start].mean(0)
        if added_tokens.stop > encoder.get_input_embeddings().num_embeddings:
            encoder.resize_token_embeddings(added_tokens.stop, mean_resizing=False)
        encoder.get_input_embeddings().weight.data[added_tokens.start : added_tokens.stop] = mean
    return encoder


def load_language_model(name: str):
    """(masked language model, whether its head is new) by the encoder's folder or name: a head that the files do not
    have starts from nothing, tied to the input embeddings as the architecture has it."""
    model, info = _load(AutoModelForMaskedLM, name, dtype=torch.float32, output_loading_info=True)
    return model, bool(info["missing_keys"])


def load_tokenizer(name: str):
    """The fast tokenizer of an encoder by its folder or its name on the Hugging Face hub."""
    tokenizer = _load(AutoTokenizer, name)
    if not tokenizer.is_fast:
        raise InputError(f"--model {name}: its tokenizer has no fast version, which tells where in the text tokens are")
    tokenizer.backend_tokenizer.no_truncation()  # which some files ask for, as for padding
    tokenizer.backend_tokenizer.no_padding()
    return tokenizer


def add_markers(tokenizer, template: Template, rows: list[Row]):
    """Makes the markers that need it tokens of their own, for the entity types of these rows."""
    types = {entity.type for row in rows for entity in (row.subject, row.object) if entity.type}
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in template.added_tokens(types)])


def _load(kind, name: str, **options):
    """What transformers loads by an encoder's folder or its name on the hub."""
    try:
        return kind.from_pretrained(name, trust_remote_code=False, **options)
    except Exception as error:  # of many kinds: transformers', the hub's, safetensors'
        # the hub's names have one slash at most, and none in front
        is_missing = (name.count("/") > 1 or name[:1] in "/.") and not Path(name).exists()
        found = "no such folder" if is_missing else first_line(error)
        if kind is AutoTokenizer and Path(name).is_dir() and not (Path(name) / "tokenizer.json").exists():
            found = "no tokenizer.json in it"  # transformers' first line names nothing
        text = "expected an encoder's folder or a name on the Hugging Face hub"
        raise InputError(f"--model {name}: {text}: {found}") from error


class BatchNorm(nn.BatchNorm1d):
    """Batch normalisation that takes a sentence by itself, which has no variance, by the running statistics."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if len(x) > 1:
            return super().forward(x)
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)


class Dropout(nn.Dropout):
    """Dropout whose mask costs a fifth on CPUs: torch draws a number for each value there, this cuts 64 random bits
    into four. The probability is met to 1/65536."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.is_cuda or not self.training or self.p == 0 or torch.compiler.is_compiling():
            return super().forward(x)
        random = np.random.SFC64(int(torch.randint(2**62, ()))).random_raw(-(-x.numel() // 4)).view(np.int16)
        kept = torch.from_numpy(random)[: x.numel()].view(x.shape).ge_(round(self.p * 65536) - 32768)
        if x.dtype == torch.bfloat16:  # 0 or the bits of 1 / (1 - p): turning 0 and 1 into bf16 takes six times as long
            scale = torch.tensor(1 / (1 - self.p), dtype=torch.bfloat16).view(torch.int16)
            return x * kept.mul_(scale).view(torch.bfloat16)
        return x * (kept.to(x.dtype) / (1 - self.p))


def half_on_cpu(module, inputs, output: torch.Tensor) -> torch.Tensor:
    """Forward hook of the embeddings: under autocast the sum that runs through the layers stays in half precision on
    CPUs, where adding, normalising and casting it in fp32 takes a tenth of a step. (CUDA's autocast norms in fp32.)"""
    if output.is_cuda or not torch.is_autocast_enabled("cpu"):
        return output
    return output.to(torch.get_autocast_dtype("cpu"))


class FlatEncoder(nn.Module):
    """A pretrained encoder that reads flat batches; what models are built on.

    entity_embedding: "plain" adds a learned vector for subject, object and neither to the input embeddings, "typed" one
    for the entity's type too; they start at zero. `is_causal`: a decoder, whose tokens see none after them.
    """

    def __init__(self, encoder, entity_embedding="none"):
        super().__init__()
        if getattr(encoder, "pooler", None) is not None:
            encoder.pooler = None  # no head reads it, and its weights would get no gradient
        for module in list(encoder.modules()):
            for name, child in module.named_children():
                if type(child) is nn.Dropout:
                    setattr(module, name, Dropout(child.p))
        self.encoder = encoder
        self.is_causal = any(getattr(module, "is_causal", False) for module in encoder.modules())
        if self.is_causal:
            encoder.config.use_cache = False  # keys and values kept for words to come
        self.is_flat = encoder._supports_attention_backend
        if self.is_flat:
            encoder.set_attn_implementation("flat")
        self.has_segments = (getattr(encoder.config, "type_vocab_size", 0) or 0) > 1
        embeddings = getattr(encoder, "embeddings", None)
        if embeddings is not None:
            embeddings.register_forward_hook(half_on_cpu)
        # RoBERTa and its family count positions from the padding id on
        shifted = hasattr(embeddings, "create_position_ids_from_input_ids")
        self.first_position = embeddings.padding_idx + 1 if shifted else 0
        self.longest = getattr(encoder.config, "max_position_embeddings", math.inf) - self.first_position

        width, tables = encoder.get_input_embeddings().embedding_dim, {"none": (), "plain": (3,), "typed": (3, 7)}
        self.entity_embeddings = nn.ModuleList(nn.Embedding(n, width) for n in tables[entity_embedding])
        for table in self.entity_embeddings:
            nn.init.zeros_(table.weight)

    def compile_layers(self):
        """Has torch.compile fuse what the layers do around their attention, at once for any number of tokens. The last
        one, which `encode_only` cuts short, stays as it is."""
        torch._dynamo.config.optimize_ddp = False  # it would cut graphs for the exchange of gradients within a layer
        depth = self.encoder.config.num_hidden_layers
        lists = (module for module in self.encoder.modules() if isinstance(module, nn.ModuleList))
        for layer in next(layers for layers in lists if len(layers) == depth)[:-1]:
            layer.compile(dynamic=True)

    def encode(self, batch: Batch) -> torch.Tensor:
        """The last hidden states of the encoder, (T, hidden)."""
        if self.is_flat:
            segments = {"token_type_ids": batch.segments[None]} if self.has_segments else {}
            positions = batch.positions[None] + self.first_position
            inputs = self._inputs(batch.ids[None], batch.entities[:, None])
            return self.encoder(**inputs, position_ids=positions, flat=batch, **segments).last_hidden_state[0]
        tokens = torch.stack([batch.ids, batch.segments, torch.ones_like(batch.ids), *batch.entities], 1)
        ids, segments, real, *entities = pad_sequence(tokens.split(batch.lengths), batch_first=True).unbind(2)
        segments = {"token_type_ids": segments} if self.has_segments else {}
        states = self.encoder(**self._inputs(ids, entities), attention_mask=real, **segments).last_hidden_state
        return torch.cat([sentence[:n] for sentence, n in zip(states, batch.lengths)])

    def encode_only(self, batch: Batch, tokens: torch.Tensor) -> torch.Tensor:
        """`encode(batch)[tokens]`, (N, hidden), for the flat indices of some tokens (N,). What the last layer of BERT
        and its family does after its attention it does to each token by itself: it is left out for all others."""
        if self.encoder.config.model_type not in ("bert", "electra", "roberta", "xlm-roberta"):
            return self.encode(batch)[tokens]
        after_attention = self.encoder.encoder.layer[-1].attention.output
        with after_attention.register_forward_pre_hook(lambda _, states: tuple(x[:, tokens] for x in states)):
            return self.encode(batch)

    def _inputs(self, ids: torch.Tensor, entities: torch.Tensor) -> dict:
        """Token ids (B, L), or their embeddings with those of the entities (2, B, L) added."""
        if not self.entity_embeddings:
            return {"input_ids": ids}
        added = sum(table(which) for table, which in zip(self.entity_embeddings, entities))
        return {"inputs_embeds": self.encoder.get_input_embeddings()(ids) + added}


class RelationModel(FlatEncoder):
    """Encoder and head; maps a Batch to logits (B, n_labels).

    head: "cls" reads the first token, "entity" the opening marks of subject and object too; in a decoder, where only
    later tokens know, they read the last token and the closing marks instead. "bilstm" and "bigru" read the last
    forward and the last backward state of an RNN over the sentence. norm ("layer", "batch", "none"), gelu and dropout
    act on what is read, before the classifier.
    """

    def __init__(
        self, encoder, n_labels: int, head="cls", norm="layer", gelu=False, dropout=0.0, entity_embedding="none"
    ):
        super().__init__(encoder, entity_embedding)
        self.head = head
        hidden = encoder.config.hidden_size
        width = hidden * {"cls": 1, "entity": 3, "bilstm": 2, "bigru": 2}[head]
        if head in ("bilstm", "bigru"):
            self.rnn = (nn.GRU if head == "bigru" else nn.LSTM)(hidden, hidden, bidirectional=True)
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
        # the token that knows the whole sentence, and the marks that know their entity
        token, marks = batch.offsets[:-1].long(), batch.openings
        if self.is_causal:
            token, marks = batch.offsets[1:].long() - 1, batch.closings
        if self.head == "cls":
            features = self.encode_only(batch, token)
        elif self.head == "entity":
            tokens = torch.cat([token[:, None], marks], 1)
            features = self.encode_only(batch, tokens.flatten()).view(len(tokens), -1)
        else:
            features = self._last_states(self.encode(batch), batch)
        return self.classifier(self.dropout(self.activation(self.norm(features))))

    def _last_states(self, states: torch.Tensor, batch: Batch) -> torch.Tensor:
        """The RNN's forward state at the last token of each sentence beside the backward one at its first token,
        (B, 2 x hidden)."""
        lengths = torch.tensor(batch.lengths)
        if states.is_cuda:
            order = batch.positions.argsort(stable=True)  # by position, then by sentence, as PackedSequence has it
            sizes = (lengths > torch.arange(batch.lengths[0])[:, None]).sum(1)  # on the CPU, as it demands
            with torch.autocast("cuda", enabled=False):  # which would run it in fp16 also where bf16 is asked for
                _, last = self.rnn(PackedSequence(states[order].float(), sizes))
            last = last if self.head == "bigru" else last[0]  # (2 directions, B, hidden)
            return torch.cat([last[0], last[1]], 1)
        # torch's CPU kernels take three times as long for packed sequences as for padded ones, and a batch has
        # sentences of like length. Each direction runs by itself, the backward one over the sentences reversed.
        first = batch.offsets[:-1].long()
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
                run, start = (torch.gru, zero) if self.head == "bigru" else (torch.lstm, (zero, zero))
                out = run(states[order].to(dtype), start, weights, True, 1, 0.0, self.training, False, False)[0]
                last.append(out[lengths - 1, torch.arange(len(lengths))])
        return torch.cat(last, 1)


class MaskedLanguageModel(FlatEncoder):
    """Encoder and the head that guesses masked tokens, of any architecture that transformers has one for; maps a Batch
    and the flat indices of the masked tokens (M,) to logits (M, vocabulary)."""

    def __init__(self, language_model):
        super().__init__(language_model.base_model)
        self.head = language_model
        setattr(language_model, language_model.base_model_prefix, _GivenStates())

    def forward(self, batch: Batch, places: torch.Tensor) -> torch.Tensor:
        return self.head(inputs_embeds=self.encode_only(batch, places)[None]).logits[0]


class _GivenStates(nn.Module):
    """Stands where a language model has its encoder: hands on the states that it is given."""

    def forward(self, *_, inputs_embeds, **__):
        return BaseModelOutput(last_hidden_state=inputs_embeds)


def relation_loss(logits, labels, label_smoothing=0.0, focal_gamma=0.0, focal_alpha=None) -> torch.Tensor:
    """The loss of each sentence, (B,): cross entropy, or with focal_gamma > 0 or focal_alpha the focal loss of
    Lin et al. 2017 on the softmax, FL(p_t) = -alpha_t (1 - p_t)^gamma log p_t; focal_alpha: (n_labels,) or None."""
    logits = logits.float()
    loss = F.cross_entropy(logits, labels, focal_alpha, label_smoothing=label_smoothing, reduction="none")
    return loss * (1 - logits.softmax(1).gather(1, labels[:, None])[:, 0]) ** focal_gamma if focal_gamma else loss


# --- checkpoint --------------------------------------------------------------------------------------------------

MODEL_FORMAT, PROGRESS_FORMAT = "relation model 3", "training progress 1"


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
    """Writes what `infer.py` needs, if `more` has settings, run, data and negative_factor: tensors and plain values."""
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


def save_encoder(folder: Path, model: FlatEncoder, tokenizer):
    """Writes the encoder as a folder that `load_encoder` and `load_tokenizer` take, each file atomically."""
    with tempfile.TemporaryDirectory() as beside:
        model.encoder.save_pretrained(beside)
        tokenizer.save_pretrained(beside)
        for path in Path(beside).iterdir():
            with atomic_write(folder / path.name, "wb") as file, open(path, "rb") as written:
                shutil.copyfileobj(written, file)


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
    """(model, to predict with, and tokenizer) of a checkpoint; needs no network."""
    with tempfile.TemporaryDirectory() as folder:
        for name, text in checkpoint["tokenizer"].items():
            if Path(name).name != name:
                raise InputError(f"tokenizer file {name!r} of the checkpoint: expected a name without folders")
            (Path(folder) / name).write_text(text, encoding="utf-8")
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    config = AutoConfig.for_model(**json.loads(checkpoint["encoder"]))
    encoder = AutoModel.from_config(config, dtype=torch.float32, trust_remote_code=False)
    names = ("head", "norm", "gelu", "dropout", "entity_embedding")
    settings = {key: value for key, value in checkpoint["settings"].items() if key in names}
    model = RelationModel(encoder, len(checkpoint["labels"]), **settings)
    model.load_state_dict(checkpoint["weights"])
    return model.eval(), tokenizer
