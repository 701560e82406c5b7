"""The model: a pretrained encoder over flat batches, and a head that predicts the relation.

    tokenizer, encoder = load_tokenizer("klue/roberta-large"), load_encoder("klue/roberta-large")
    model = RelationModel(encoder, n_labels=30, head="bilstm")
    logits = model(batch)                                     # (B, 30), in the order of the batch
    loss = relation_loss(logits, batch.labels).sum()
    probs = predict(model, examples, Worker(torch.device("cpu")))      # (N, 30)

Encoders on transformers' attention interface (BERT, RoBERTa, XLM-R, ELECTRA, ModernBERT, …, and
decoders such as GPT-2 and Llama) read flat batches through attention.py. Others (DeBERTa-v2) are
padded inside FlatEncoder.encode.
"""

import math
import sys
from pathlib import Path

import huggingface_hub
import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import AddedToken
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pad_sequence
from tqdm import tqdm
from transformers import AutoModel, AutoTokenizer

from attention import Dropout, half_on_cpu, last_rnn_states_on_cpu
from common import InputError, first_line
from data import Template
from distributed import Worker
from rows import Row
from tokens import Batch, Example, collate, to_device, within_tokens

# --- pretrained encoders ----------------------------------------------------------------------

huggingface_hub.utils.logging.set_verbosity_error()  # it logs each retry without a network


def from_pretrained(auto_class, name: str, **options):
    """auto_class.from_pretrained for a folder or a hub name; any failure is an InputError."""
    try:
        return auto_class.from_pretrained(name, trust_remote_code=False, **options)
    except Exception as error:  # transformers, the hub and safetensors raise many kinds
        is_path = name.count("/") > 1 or name[:1] in "/."  # hub names have at most one slash
        found = "no such folder" if is_path and not Path(name).exists() else first_line(error)
        has_file = (Path(name) / "tokenizer.json").exists()
        if auto_class is AutoTokenizer and Path(name).is_dir() and not has_file:
            found = "no tokenizer.json in it"  # transformers' message does not name the file
        expected = "expected an encoder's folder or a name on the Hugging Face hub"
        raise InputError(f"--model {name}: {expected}: {found}") from error


def load_encoder(name: str, added_tokens: range = range(0)) -> nn.Module:
    """A pretrained encoder with fp32 weights, from a folder or the Hugging Face hub.

    The embeddings of `added_tokens`, ids that follow the pretrained ones, start as the mean of the
    pretrained embeddings.
    """
    encoder = from_pretrained(AutoModel, name, dtype=torch.float32)
    if added_tokens:
        mean = encoder.get_input_embeddings().weight.detach()[: added_tokens.start].mean(0)
        if added_tokens.stop > encoder.get_input_embeddings().num_embeddings:
            encoder.resize_token_embeddings(added_tokens.stop, mean_resizing=False)
        encoder.get_input_embeddings().weight.data[added_tokens.start : added_tokens.stop] = mean
    return encoder


def load_tokenizer(name: str):
    """The fast tokenizer of an encoder, from a folder or the Hugging Face hub."""
    tokenizer = from_pretrained(AutoTokenizer, name)
    if not tokenizer.is_fast:
        needs = "a fast tokenizer, which knows the position of each token in the text"
        raise InputError(f"--model {name}: found a slow tokenizer, expected {needs}")
    tokenizer.backend_tokenizer.no_truncation()  # some tokenizer.json enable both
    tokenizer.backend_tokenizer.no_padding()
    return tokenizer


def add_markers(tokenizer, template: Template, rows: list[Row]):
    """Add the template's markers to the tokenizer, for the entity types of these rows."""
    types = {entity.type for row in rows for entity in (row.subject, row.object) if entity.type}
    tokens = [AddedToken(token, normalized=False) for token in template.added_tokens(types)]
    tokenizer.add_tokens(tokens)


class FlatEncoder(nn.Module):
    """A pretrained encoder that reads flat batches; the base of all models.

    entity_embedding "plain" adds a learned vector for subject, object and neither to the input
    embeddings, "typed" another one for the entity's type. Both start at zero.
    """

    def __init__(self, encoder: nn.Module, entity_embedding: str = "none"):
        super().__init__()
        if getattr(encoder, "pooler", None) is not None:
            encoder.pooler = None  # unused: its weights would get no gradient
        for module in list(encoder.modules()):
            for name, child in module.named_children():
                if type(child) is nn.Dropout:
                    setattr(module, name, Dropout(child.p))
        self.encoder = encoder
        self.is_causal = any(getattr(module, "is_causal", False) for module in encoder.modules())
        if self.is_causal:
            encoder.config.use_cache = False
        self.is_flat = encoder._supports_attention_backend  # transformers has no public name
        if self.is_flat:
            encoder.set_attn_implementation("flat")
        self.has_segments = (getattr(encoder.config, "type_vocab_size", 0) or 0) > 1
        embeddings = getattr(encoder, "embeddings", None)
        if embeddings is not None:
            embeddings.register_forward_hook(half_on_cpu)
        # RoBERTa's family counts positions from padding_idx + 1
        from_padding = hasattr(embeddings, "create_position_ids_from_input_ids")
        self.first_position = embeddings.padding_idx + 1 if from_padding else 0
        positions = getattr(encoder.config, "max_position_embeddings", math.inf)
        self.max_length = positions - self.first_position

        width = encoder.get_input_embeddings().embedding_dim
        sizes = {"none": (), "plain": (3,), "typed": (3, 7)}[entity_embedding]
        self.entity_embeddings = nn.ModuleList(nn.Embedding(n, width) for n in sizes)
        for table in self.entity_embeddings:
            nn.init.zeros_(table.weight)

    def encode(self, batch: Batch) -> torch.Tensor:
        """The last hidden states, (T, hidden)."""
        if self.is_flat:
            segments = {"token_type_ids": batch.segments[None]} if self.has_segments else {}
            inputs = self._inputs(batch.ids[None], batch.entities[:, None])
            inputs |= {"position_ids": batch.positions[None] + self.first_position}
            return self.encoder(**inputs, **segments, flat=batch).last_hidden_state[0]
        tokens = torch.stack(
            [batch.ids, batch.segments, torch.ones_like(batch.ids), *batch.entities], 1
        )
        padded = pad_sequence(tokens.split(batch.lengths), batch_first=True)  # (B, longest, 5)
        ids, segments, mask, *entities = padded.unbind(2)
        segments = {"token_type_ids": segments} if self.has_segments else {}
        inputs = self._inputs(ids, entities)
        states = self.encoder(**inputs, **segments, attention_mask=mask).last_hidden_state
        return torch.cat([sentence[:n] for sentence, n in zip(states, batch.lengths)])

    def encode_only(self, batch: Batch, tokens: torch.Tensor) -> torch.Tensor:
        """encode(batch)[tokens], (N, hidden), for flat token indices (N,).

        In BERT's family the last layer works on each token by itself after its attention. That
        part is computed for `tokens` only.
        """
        if self.encoder.config.model_type not in ("bert", "electra", "roberta", "xlm-roberta"):
            return self.encode(batch)[tokens]
        output = self.encoder.encoder.layer[-1].attention.output
        select = output.register_forward_pre_hook(lambda _, x: tuple(s[:, tokens] for s in x))
        with select:
            return self.encode(batch)

    def _inputs(self, ids: torch.Tensor, entities) -> dict:
        """The encoder's input: ids (B, L), or embeddings (B, L, width) if entities have some."""
        if not self.entity_embeddings:
            return {"input_ids": ids}
        added = sum(table(which) for table, which in zip(self.entity_embeddings, entities))
        return {"inputs_embeds": self.encoder.get_input_embeddings()(ids) + added}


# --- heads ------------------------------------------------------------------------------------


class BatchNorm(nn.BatchNorm1d):
    """Batch normalisation that uses the running statistics for a batch of one sentence."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if len(x) > 1:
            return super().forward(x)
        statistics = (self.running_mean, self.running_var)
        return F.batch_norm(x, *statistics, self.weight, self.bias, eps=self.eps)


NORMS = {"layer": nn.LayerNorm, "batch": BatchNorm, "none": nn.Identity}


class RelationModel(FlatEncoder):
    """Encoder, pooling and classifier: maps a Batch to logits (B, n_labels).

    Pooling by head: "cls" takes the first token; "entity" the first token and the first token of
    both opening markers; "bilstm" and "bigru" the final forward and backward state of an RNN over
    the sentence. In a decoder, which sees earlier tokens only, "cls" takes the last token and
    "entity" the last token and the ends of the closing markers.
    """

    def __init__(self, encoder, n_labels: int, head="cls", norm="layer", gelu=False, dropout=0.0,
                 entity_embedding="none"):  # fmt: skip
        super().__init__(encoder, entity_embedding)
        self.head = head
        hidden = encoder.config.hidden_size
        width = hidden * {"cls": 1, "entity": 3, "bilstm": 2, "bigru": 2}[head]
        if head in ("bilstm", "bigru"):
            rnn = nn.GRU if head == "bigru" else nn.LSTM
            self.rnn = rnn(hidden, hidden, bidirectional=True)
            for name, weight in self.rnn.named_parameters():
                nn.init.xavier_normal_(weight) if "weight" in name else nn.init.zeros_(weight)
        self.norm = NORMS[norm](width)
        self.activation = nn.GELU() if gelu else nn.Identity()
        self.dropout = Dropout(dropout)
        self.classifier = nn.Linear(width, n_labels)
        nn.init.kaiming_normal_(self.classifier.weight)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, batch: Batch) -> torch.Tensor:
        return self.classifier(self.dropout(self.activation(self.norm(self.pool(batch)))))

    def pool(self, batch: Batch) -> torch.Tensor:
        """The features that the head reads, (B, width)."""
        token, markers = batch.offsets[:-1].long(), batch.marker_starts
        if self.is_causal:
            token, markers = batch.offsets[1:].long() - 1, batch.marker_ends
        if self.head == "cls":
            return self.encode_only(batch, token)
        if self.head == "entity":
            tokens = torch.cat([token[:, None], markers], 1)  # (B, 3)
            return self.encode_only(batch, tokens.flatten()).view(len(tokens), -1)
        states = self.encode(batch)
        if not states.is_cuda:
            return last_rnn_states_on_cpu(self.rnn, states, batch)
        order = batch.positions.argsort(stable=True)  # PackedSequence: by position, then sentence
        longer = torch.tensor(batch.lengths) > torch.arange(batch.lengths[0])[:, None]
        sizes = longer.sum(1)  # PackedSequence needs it on the CPU
        with torch.autocast("cuda", enabled=False):  # autocast would use fp16, also with bf16
            _, last = self.rnn(PackedSequence(states[order].float(), sizes))
        last = last if self.head == "bigru" else last[0]  # (2, B, hidden)
        return torch.cat([last[0], last[1]], 1)


def relation_loss(logits, labels, label_smoothing=0.0, focal_gamma=0.0, focal_alpha=None):
    """The loss of each sentence, (B,), for logits (B, n_labels) and labels (B,).

    Cross entropy; with focal_gamma the focal loss on the softmax,
    FL(p_t) = -alpha_t (1 - p_t)^gamma log p_t (Lin et al. 2017). focal_alpha (n_labels,) weights
    the labels in both.
    """
    logits = logits.float()
    smoothing = {"label_smoothing": label_smoothing, "reduction": "none"}
    loss = F.cross_entropy(logits, labels, focal_alpha, **smoothing)
    if not focal_gamma:
        return loss
    p_t = logits.softmax(1).gather(1, labels[:, None])[:, 0]
    return loss * (1 - p_t) ** focal_gamma


@torch.inference_mode()
def predict(model: RelationModel, examples: list[Example], worker: Worker, max_tokens=16384):
    """Probabilities (N, n_labels) in float64, in the order of the examples, on every rank.

    Each rank computes a part. InputError if a probability is not finite.
    """
    model.eval()
    if worker.device.type == "cpu":
        max_tokens = min(max_tokens, 4096)  # fits the caches: a tenth faster than 16,384
    lengths = np.array([len(e.ids) for e in examples])
    batches = within_tokens(np.arange(len(examples)), lengths, max_tokens)
    batches = batches[worker.rank :: worker.world_size]
    shape = len(examples), model.classifier.out_features
    probs = torch.zeros(*shape, dtype=torch.float64, device=worker.device)
    interval = 0.5 if sys.stderr.isatty() else 60  # seconds; a log file needs few lines
    how = {"mininterval": interval, "delay": interval, "disable": worker.rank > 0}
    for indices in tqdm(batches, unit="batch", leave=False, **how):
        batch = collate(examples, indices).to(worker.device)
        with worker.autocast():
            logits = model(batch)
        rows = to_device(torch.from_numpy(batch.indices), worker.device)
        probs[rows] = logits.double().softmax(1)
    probs = worker.sum(probs).cpu().numpy()
    if not np.isfinite(probs).all():
        n_bad = (~np.isfinite(probs)).any(1).sum()
        raise InputError(f"{n_bad} rows have probabilities that are not finite; try --amp off")
    return probs
