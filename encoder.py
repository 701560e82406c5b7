"""Pretrained encoders: loading, and reading flat batches.

    tokenizer, encoder = load_tokenizer("klue/roberta-large"), load_encoder("klue/roberta-large")
    states = FlatEncoder(encoder).encode(batch)     # (T, hidden) for the T tokens of a Batch

Encoders on transformers' attention interface (BERT, RoBERTa, XLM-R, ELECTRA, ModernBERT, …, and
decoders such as GPT-2 and Llama) read flat batches through attention.py. Others (DeBERTa-v2) are
padded inside FlatEncoder.encode.
"""

import math
from pathlib import Path

import huggingface_hub
import torch
from tokenizers import AddedToken
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModel, AutoTokenizer

from attention import Dropout, LayerNorm, half_residual
from common import InputError, first_line
from data import Template
from rows import Row
from tokens import Batch

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
                if type(child) is nn.LayerNorm:
                    child.__class__ = LayerNorm
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
            embeddings.register_forward_hook(half_residual)
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
