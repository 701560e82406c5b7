"""Pretrained encoders: loading, and reading flat batches.

    tokenizer, encoder = load_tokenizer("klue/roberta-large"), load_encoder("klue/roberta-large")
    states = FlatEncoder(encoder).encode(batch)     # (T, hidden) for the T tokens of a Batch

Encoders on transformers' attention interface (BERT, RoBERTa, XLM-R, ELECTRA, ModernBERT, …, and
decoders such as GPT-2 and Llama) read flat batches through attention.py. Others (DeBERTa-v2) are
padded inside FlatEncoder.encode. Which way is right for an encoder is found by trying it.
"""

import math
import re
from pathlib import Path

import huggingface_hub
import numpy as np
import torch
from tokenizers import AddedToken
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModel, AutoTokenizer, PreTrainedModel

from attention import Dropout, LayerNorm, half_residual
from common import InputError, first_line
from data import Template
from distributed import DTYPES, Worker
from rows import Row
from tokens import Batch, Example, collate

huggingface_hub.utils.logging.set_verbosity_error()  # it logs each retry without a network

# Tested against the padded computation of transformers. Others are loaded if `_prove` allows it.
PROVEN = (
    "bert", "roberta", "xlm-r", "electra", "modernbert", "deberta-v2", "gpt2", "llama", "mistral",
    "qwen3",
)  # fmt: skip


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
    _, encoder, _ = load_model(AutoModel, name)
    n_embeddings = len(input_embeddings(encoder).weight)
    if added_tokens.start > n_embeddings:
        found = f"its tokenizer has {added_tokens.start} tokens, the encoder only {n_embeddings}"
        raise InputError(f"--model {name}: {found}; expected files of one encoder")
    if added_tokens:
        mean = input_embeddings(encoder).weight.detach()[: added_tokens.start].mean(0)
        if added_tokens.stop > n_embeddings:
            encoder.resize_token_embeddings(added_tokens.stop, mean_resizing=False)
        input_embeddings(encoder).weight.data[added_tokens.start : added_tokens.stop] = mean
    return encoder


def text_encoder(model: nn.Module) -> nn.Module:
    """The encoder of an encoder-decoder such as mT5 or BART; any other model as it is."""
    parts = (getattr(model, name, None) for name in ("encoder", "decoder"))
    return model.encoder if all(isinstance(part, PreTrainedModel) for part in parts) else model


def load_model(auto_class, name: str) -> tuple[nn.Module, nn.Module, bool]:
    """(model with fp32 weights, its encoder, whether weights of its head are new).

    InputError if the files do not have exactly the weights of the encoder that config.json
    describes: what is missing would be random.
    """
    options = {"dtype": torch.float32, "output_loading_info": True}
    model, info = from_pretrained(auto_class, name, ignore_mismatched_sizes=True, **options)
    encoder = text_encoder(model.base_model)
    for weight, found, expected in sorted(info["mismatched_keys"]):
        problem = f"{weight} has the shape {tuple(found)}, by config.json {tuple(expected)}"
        raise InputError(f"--model {name}: {problem}; expected files of one encoder")
    needed = {id(p) for n, p in encoder.named_parameters() if not n.startswith("pooler.")}
    names = [n for n, p in model.named_parameters(remove_duplicate=False) if id(p) in needed]
    if missing := sorted(set(names) & set(info["missing_keys"])):
        found = f"its files lack {len(missing)} of {len(names)} weights, such as {missing[0]}"
        raise InputError(f"--model {name}: {found}; they would be random")
    kinds = {re.sub(r"\d+", "N", n) for n in names}
    others = [n.removeprefix(f"{model.base_model_prefix}.") for n in info["unexpected_keys"]]
    if more := sorted(n for n in others if re.sub(r"\d+", "N", n) in kinds):
        found = f"its files have weights of more layers than its config.json, such as {more[0]}"
        raise InputError(f"--model {name}: {found}; correct config.json, or remove the weights")
    return model, encoder, bool(info["missing_keys"])


def input_embeddings(encoder: nn.Module) -> nn.Module:
    """The table of the tokens' embeddings; InputError for encoders without one."""
    try:
        embeddings = encoder.get_input_embeddings()
        assert embeddings.weight.ndim == 2
        return embeddings
    except (NotImplementedError, AttributeError, AssertionError) as error:
        raise _refusal(encoder, "has no table of token embeddings") from error


def load_tokenizer(name: str):
    """The fast tokenizer of an encoder, from a folder or the Hugging Face hub."""
    tokenizer = from_pretrained(AutoTokenizer, name)
    if not tokenizer.is_fast:
        needs = "a fast tokenizer, which knows the position of each token in the text"
        raise InputError(f"--model {name}: found a slow tokenizer, expected {needs}")
    tokenizer.backend_tokenizer.no_truncation()  # some tokenizer.json enable both
    tokenizer.backend_tokenizer.no_padding()
    if not tokenizer.backend_tokenizer.encode("가", add_special_tokens=False).ids:
        raise InputError(f"--model {name}: its tokenizer drops Hangul: '가' gives no token")
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

    Runs a few short sentences first, as `_prove` says. InputError if a sentence's states depend on
    the other sentences of its batch. `frozen` has the names of the parameters that never get a
    gradient.
    """

    def __init__(self, encoder: nn.Module, entity_embedding: str = "none"):
        super().__init__()
        if getattr(encoder, "pooler", None) is not None:
            encoder.pooler = nn.Identity()  # unused: its weights would get no gradient
        for module in list(encoder.modules()):
            for name, child in module.named_children():
                if type(child) is nn.Dropout:
                    setattr(module, name, Dropout(child.p))
                if type(child) is nn.LayerNorm:
                    child.__class__ = LayerNorm
        self.encoder = encoder
        encoder.config.use_cache = False
        self.pad_id = getattr(encoder.config, "pad_token_id", None) or 0
        self.has_segments = (getattr(encoder.config, "type_vocab_size", 0) or 0) > 1
        embeddings = getattr(encoder, "embeddings", None)
        if embeddings is not None:
            embeddings.register_forward_hook(half_residual)
        width = input_embeddings(encoder).weight.shape[1]
        sizes = {"none": (), "plain": (3,), "typed": (3, 7)}[entity_embedding]
        self.entity_embeddings = nn.ModuleList(nn.Embedding(n, width) for n in sizes)
        for table in self.entity_embeddings:
            nn.init.zeros_(table.weight)
        self._prove()

    def _prove(self):
        """Compare a sentence by itself, as transformers computes it, with the same in a batch.

        Sets is_flat, first_position, max_length, is_causal and `frozen`. Leaves the state of the
        random numbers as it was, and takes a fraction of a second.
        """
        was_training = {module: module.training for module in self.modules()}
        self.eval()
        try:
            with torch.random.fork_rng(devices=[]):
                self._compare_batch_and_sentence()
        finally:
            for module, training in was_training.items():
                module.training = training

    def _compare_batch_and_sentence(self):
        encoder, config = self.encoder, self.encoder.config
        has_flat = encoder._supports_attention_backend  # transformers has no public name
        attention = config._attn_implementation
        if attention == "flat":  # of an encoder that another model has used
            encoder.set_attn_implementation(attention := "eager")
        examples = _probe_examples(len(input_embeddings(encoder).weight), self.pad_id)
        batch, positions = collate(examples, np.arange(len(examples))), _Positions()
        try:
            with torch.no_grad(), positions:
                alone = self._encode_padded(collate(examples, [_PROBED]), embedded=False)
            width, _ = config.hidden_size, config.num_hidden_layers
        except Exception as error:  # the code of hundreds of models raises anything
            found = f"{type(error).__name__}: {first_line(error)}"
            raise _refusal(encoder, f"cannot read a sentence: {found}") from error
        if alone.shape != (len(examples[_PROBED].ids), width):
            raise _refusal(encoder, f"does not give one state of {width} per token")
        if not alone.isfinite().all():
            raise _refusal(encoder, "gives states that are not finite")
        first = dict.fromkeys((positions.first, 0)) if has_flat else ()
        problem = None
        for self.is_flat, self.first_position in [*((True, n) for n in first), (False, 0)]:
            if has_flat:
                encoder.set_attn_implementation("flat" if self.is_flat else attention)
            try:
                with torch.enable_grad():
                    states = self.encode(batch)
            except Exception as error:
                problem = problem or f"{type(error).__name__}: {first_line(error)}"
                continue
            split = states.detach().split(batch.lengths)
            gap = (split[_PROBED] - alone).abs().max() / alone.abs().max()
            if gap < 1e-4:
                break
            problem = f"changes a sentence's states by {gap:.2g} with the others of its batch"
            problem += ", or with --entity-embedding" if self.entity_embeddings else ""
        else:
            raise _refusal(encoder, problem)

        def differ(a, b) -> bool:
            return ((a - b).abs().max() / alone.abs().max()).item() > 1e-5

        _, other, one, start = split  # `other` has another last token, `start` another first one
        self.is_causal = not differ(one[:-1], other[:-1])
        if self.is_causal and not differ(one[1 : len(start)], start[1:]):
            raise _refusal(encoder, "does not look at the other tokens of a sentence")
        self.max_length = positions.rows - positions.first
        if not positions.found:
            limit = getattr(config, "max_position_embeddings", None) or 0
            self.max_length = limit if limit > 0 else math.inf
        self.probe, used = batch, _with_gradient(states)
        self.frozen = [
            name for name, p in encoder.named_parameters() if p.requires_grad and p not in used
        ]
        for name in self.frozen:
            encoder.get_parameter(name).requires_grad_(False)

    @torch.no_grad()
    def place(self, worker: Worker) -> "FlatEncoder":
        """Move to the worker's device; InputError if the encoder fails in its precision."""
        self.to(worker.device).eval()
        try:
            with worker.autocast():
                finite = self.encode(self.probe.to(worker.device)).isfinite().all()
            problem = None if finite else "its states are not finite"
        except RuntimeError as error:
            problem = first_line(error)
        if problem:
            name = {kind: name for name, kind in DTYPES.items()}[worker.amp]
            found = f"a {self.encoder.config.model_type} fails in this precision: {problem}"
            raise InputError(f"--amp {name}: {found}{'; try --amp off' if worker.amp else ''}")
        return self

    def encode(self, batch: Batch) -> torch.Tensor:
        """The last hidden states, (T, hidden)."""
        if not self.is_flat:
            return self._encode_padded(batch)
        segments = {"token_type_ids": batch.segments[None]} if self.has_segments else {}
        inputs = self._inputs(batch.ids[None], batch.entities[:, None])
        inputs |= {"position_ids": batch.positions[None] + self.first_position}
        return self.encoder(**inputs, **segments, flat=batch).last_hidden_state[0]

    def _encode_padded(self, batch: Batch, embedded: bool = True) -> torch.Tensor:
        """`encode` with padding; without `embedded` without entity embeddings."""
        tokens = torch.stack(
            [batch.ids, batch.segments, torch.ones_like(batch.ids), *batch.entities], 1
        )
        padded = pad_sequence(tokens.split(batch.lengths), batch_first=True)  # (B, longest, 5)
        ids, segments, mask, *entities = padded.unbind(2)
        ids = ids.masked_fill(mask == 0, self.pad_id)
        segments = {"token_type_ids": segments} if self.has_segments else {}
        inputs = self._inputs(ids, entities) if embedded else {"input_ids": ids}
        states = self.encoder(**inputs, **segments, attention_mask=mask).last_hidden_state
        return torch.cat([sentence[:n] for sentence, n in zip(states, batch.lengths)])

    def encode_only(self, batch: Batch, tokens: torch.Tensor) -> torch.Tensor:
        """encode(batch)[tokens], (N, hidden), for flat token indices (N,).

        In BERT's family the last layer works on each token by itself after its attention. That
        part is computed for `tokens` only.
        """
        family = self.encoder.config.model_type
        if not self.is_flat or family not in ("bert", "electra", "roberta", "xlm-roberta"):
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


# --- what the first sentences show ---------------------------------------------------------------

_PROBED = 2  # of `_probe_examples`: it has neighbours on both sides, and padding


def _probe_examples(vocabulary: int, pad_id: int) -> list[Example]:
    """Sentences of 7, 6, 6 and 4 tokens; the third repeats the second but for its last token, the
    fourth repeats the start of the third but for its first token."""
    ids = np.random.default_rng(0).permutation(vocabulary)[:16]
    ids = np.resize(ids[ids != pad_id], 15)
    sentence = ids[7:13]
    other, start = np.append(sentence[:-1], ids[13]), np.append(ids[14], sentence[1:4])
    return [
        Example(x, np.arange(len(x)) // 3 % 2, (1, 2), 0, (1, 2), np.zeros((2, len(x)), dtype=int))
        for x in (ids[:7], other, sentence, start)
    ]


class _Positions(TorchDispatchMode):
    """Sees the table of learned positions: looked up at consecutive indices from `first`."""

    found, first, rows = False, 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.embedding.default:
            table, indices = args[:2]
            first, *others = indices.flatten().tolist()[:6]
            if len(others) == 5 and others == list(range(first + 1, first + 6)):
                self.found, self.first, self.rows = True, first, len(table)
        return function(*args, **(kwargs or {}))


def _with_gradient(output: torch.Tensor) -> set[torch.Tensor]:
    """The parameters that `output` depends on, from autograd's graph."""
    todo, seen, found = [output.grad_fn], set(), set()
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        found.add(getattr(node, "variable", None))
        todo += [following for following, _ in node.next_functions]
    return found


def _refusal(encoder: nn.Module, problem: str) -> InputError:
    kind = encoder.config.model_type
    name = encoder.name_or_path
    found = f"{'--model ' + name + ': ' if name else ''}found a {kind}, which {problem}"
    return InputError(f"{found}; expected one of the families {', '.join(PROVEN)}")
