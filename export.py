"""Write a checkpoint as a folder that other programs read: `python infer.py CKPT --export DIR`.

    export(load_checkpoint("runs/demo/ckpt.pt"), Path("exported"), print)
    content = load_checkpoint("exported")     # as of ckpt.pt: Predictor and infer.py take either
    inputs = padded(examples, model)          # what model.onnx reads

The folder has the encoder and the tokenizer as `save_pretrained` writes them, head.safetensors (all
other weights), relation.json (labels, template, scores, …), README.md (a model card) and
model.onnx.
"""

import json
import math
import os
import shutil
import warnings
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn

from checkpoint import HEAD_FILE, RELATION_FILE, load_checkpoint, restore
from common import InputError, first_line
from data import KLUE_LABELS, TYPES, Template
from encoder import load_encoder
from metrics import describe
from model import RelationModel
from rows import Entity, Row
from tokens import Example, encode

OPSET = 17  # of ONNX 1.12, from 2022: old runtimes read it too


def export(checkpoint: dict, folder: Path, log):
    """Write a folder for the content of a ckpt.pt; `log` prints why model.onnx is missing.

    It appears as a whole or not at all. InputError if it exists and is not empty, or if
    transformers would not read the same encoder from it.
    """
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        found = "files in it" if folder.is_dir() else "a file"
        raise InputError(f"--export {folder}: found {found}, expected a new or an empty folder")
    if folder.resolve() == Path.cwd():  # it is replaced, and the shell would stay in the old one
        raise InputError(f"--export {folder}: found the current folder, expected a new one")
    model, tokenizer = restore(checkpoint)
    temporary = folder.with_name(f".{folder.name}.tmp")
    try:
        shutil.rmtree(temporary, ignore_errors=True)  # of an export that was killed
        temporary.mkdir(parents=True)
        for name, text in checkpoint["tokenizer"].items():
            (temporary / name).write_text(text, encoding="utf-8")
        model.encoder.save_pretrained(temporary, max_shard_size="1TB")
        weights = model.state_dict()
        head = {name: w for name, w in weights.items() if not name.startswith("encoder.")}
        save_file(head, temporary / HEAD_FILE)
        for path in temporary.glob("*.safetensors"):  # written for their owner only
            shutil.copymode(temporary / "config.json", path)
        left_out = ("weights", "encoder", "tokenizer")
        about = {key: value for key, value in checkpoint.items() if key not in left_out}
        if not about["data"].startswith("hub:"):
            about["data"] = ""  # the path may be private
        text = json.dumps(
            about | {"tokenizer_files": [*checkpoint["tokenizer"]]}, ensure_ascii=False, indent=1
        )
        (temporary / RELATION_FILE).write_text(text, encoding="utf-8")
        _check(temporary, weights)
        problem = write_onnx(model, checkpoint, temporary / "model.onnx")
        if problem:
            log(f"no model.onnx: {problem}")
        card = model_card(checkpoint, model, tokenizer, onnx=not problem)
        (temporary / "README.md").write_text(card, encoding="utf-8")
        os.replace(temporary, folder)
    except (OSError, SafetensorError) as error:
        found = getattr(error, "strerror", None) or first_line(error)
        raise InputError(f"--export {folder}: cannot be written: {found}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _check(folder: Path, weights: dict):
    """InputError unless Predictor and transformers read the same weights from the folder."""
    found = load_checkpoint(folder)["weights"]
    by_transformers = load_encoder(str(folder)).state_dict()
    for name, weight in weights.items():
        both = [found.get(name)]
        if name.startswith("encoder."):
            both.append(by_transformers.get(name.removeprefix("encoder.")))
        if not all(w is not None and torch.equal(w, weight) for w in both):
            problem = f"the weight {name} is not read back as it was written"
            raise InputError(f"--export {folder}: {problem}; this encoder cannot be exported")


# --- ONNX -------------------------------------------------------------------------------------


class PaddedModel(nn.Module):
    """A RelationModel on padded batches, which is what model.onnx computes.

    forward takes the inputs that `input_shapes` names, in this order, and returns probabilities
    (B, n_labels). The factor of no_relation and the temperature are a shift and a scale of logits.
    """

    def __init__(self, model: RelationModel, negative_factor: float, temperature: float):
        super().__init__()
        self.model, self.names, self.temperature = model, list(input_shapes(model)), temperature
        shift = torch.zeros(model.classifier.out_features)
        shift[0] = math.log(max(negative_factor, 1e-30))
        self.register_buffer("shift", shift)
        if hasattr(model, "rnn"):
            self.directions = nn.ModuleList(
                one_direction(model.rnn, end) for end in ("", "_reverse")
            )

    def forward(self, *inputs) -> torch.Tensor:
        given, model = dict(zip(self.names, inputs)), self.model
        ids, mask = given["input_ids"], given["attention_mask"]
        entities = given["entities"].unbind(1) if "entities" in given else ()
        segments = {name: given[name] for name in ("token_type_ids",) if name in given}
        read = model._inputs(ids, entities) | segments
        states = model.encoder(**read, attention_mask=mask).last_hidden_state
        if hasattr(model, "rnn"):
            features = self.last_rnn_states(states, mask)
        else:
            last = mask.sum(1, keepdim=True) - 1
            tokens = last if model.is_causal else torch.zeros_like(last)
            tokens = torch.cat([tokens, given["markers"]], 1) if "markers" in given else tokens
            tokens = tokens[:, :, None].expand(-1, -1, states.shape[2])
            features = states.gather(1, tokens).flatten(1)
        return ((model.classify(features) + self.shift) / self.temperature).softmax(1)

    def last_rnn_states(self, states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """The last state of either direction: the second runs over the reversed sentences."""
        last = mask.sum(1, keepdim=True) - 1
        position = mask.cumsum(1) - 1  # padding repeats the last one
        found = []
        for rnn, order in zip(self.directions, (position, last - position)):
            out, _ = rnn(states.gather(1, order[:, :, None].expand_as(states)))
            found.append(out.gather(1, last[:, :, None].expand(-1, -1, out.shape[2]))[:, 0])
        return torch.cat(found, 1)


def one_direction(rnn: nn.RNNBase, ending: str) -> nn.RNNBase:
    """The RNN of one direction of a bidirectional one, whose weights' names have this ending."""
    one = type(rnn)(rnn.input_size, rnn.hidden_size, batch_first=True)
    one.load_state_dict({name: rnn.state_dict()[name + ending] for name in one.state_dict()})
    return one


def input_shapes(model: RelationModel) -> dict[str, dict[int, str]]:
    """The inputs of model.onnx and their dimensions that vary: the batch B and its length L."""
    shape = {0: "batch", 1: "length"}
    shapes = {"input_ids": shape, "attention_mask": shape}
    shapes |= {"token_type_ids": shape} if model.has_segments else {}
    shapes |= {"markers": {0: "batch"}} if model.head == "entity" else {}
    return shapes | ({"entities": {0: "batch", 2: "length"}} if model.entity_embeddings else {})


def padded(examples: list[Example], model: RelationModel) -> dict[str, np.ndarray]:
    """The inputs of model.onnx for examples of `tokens.encode`, padded on the right.

    input_ids, attention_mask, token_type_ids (B, L); markers (B, 2), the positions of the tokens
    that the head `entity` reads beside the first one; entities (B, 2, L), subject, object or
    neither and type, for entity embeddings.
    """
    longest = max(len(example.ids) for example in examples)

    def pad(rows: list, value: int = 0) -> np.ndarray:
        return np.stack([np.pad(x, (0, longest - len(x)), constant_values=value) for x in rows])

    ends = [e.marker_ends if model.is_causal else e.marker_starts for e in examples]
    inputs = {
        "input_ids": pad([e.ids for e in examples], model.pad_id),
        "attention_mask": pad([np.ones(len(e.ids)) for e in examples]),
        "token_type_ids": pad([e.segments for e in examples]),
        "markers": np.array(ends),
        "entities": np.stack([pad([e.entities[i] for e in examples]) for i in (0, 1)], 1),
    }
    return {name: inputs[name].astype(np.int64) for name in input_shapes(model)}


def write_onnx(model: RelationModel, checkpoint: dict, path: Path) -> str | None:
    """Write model.onnx; returns why that was not possible, if so."""
    if model.is_flat:
        model.encoder.set_attn_implementation("eager")
    factor, temperature = checkpoint["negative_factor"], checkpoint.get("temperature", 1.0)
    ids, two = np.arange(3, 9), np.zeros((2, 6), int)
    some = [Example(ids[:n], two[0, :n], (1, 2), 0, (2, 3), two[:, :n]) for n in (6, 4)]
    inputs = tuple(map(torch.from_numpy, padded(some, model).values()))
    shapes = input_shapes(model)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # it warns of its age, and of each traced shape
            # The exporter that torch prefers, dynamo=True, takes half a minute for what takes this
            # one a second, needs onnxscript too, and does not write the RNNs.
            torch.onnx.export(
                PaddedModel(model, factor, temperature).eval(), inputs, str(path), dynamo=False,
                opset_version=OPSET, input_names=list(shapes), output_names=["probabilities"],
                dynamic_axes=shapes | {"probabilities": {0: "batch"}},
            )  # fmt: skip
    except torch.onnx.OnnxExporterError as error:  # without the package, or of one of its operators
        found = first_line(error)
        install = "it needs the package onnx: pip install -r requirements-dev.txt"
        return install if "not installed" in found else found
    finally:
        if model.is_flat:
            model.encoder.set_attn_implementation("flat")
    return None


# --- model card -------------------------------------------------------------------------------

SENTENCE = "한태영의 생가가 있는 인천에는 해마다 많은 방문객이 찾아온다."
EXAMPLE = Row("0", SENTENCE, Entity("한태영", 0, 2, "PER"), Entity("인천", 12, 13, "LOC"),
              None, "", "example")  # fmt: skip

CARD = """---
language: ko
pipeline_tag: text-classification
tags: [relation-extraction]
{licence}
---

# {run}

Relation extraction: which of {n_labels} relations holds between two marked entities of a sentence.
`relation.json` lists them.

## Scores

{scores}

## Data

{data}

Version: {version}.

## Files

| file | content |
|---|---|
| `config.json`, `model.safetensors` | the encoder, for transformers' `AutoModel` |
| `tokenizer.json`, … | its tokenizer, for `AutoTokenizer` |
| `head.safetensors` | the weights of the head |
| `relation.json` | labels, head's options, template, scaling of `{negative}`, temperature, scores |
{onnx}
Of the encoder's outputs use `last_hidden_state`.{pooler}

## Use

Get the repository "Korean relation extraction on KLUE-RE", whose programs trained this model, and
put it on `PYTHONPATH`. Then, in this folder:

```python
from predictor import Predictor

row = {{
    "sentence": "{sentence}",
    "subject": "한태영",
    "subject_type": "PER",
    "object": "인천",
    "object_type": "LOC",
}}
(result,) = Predictor(".").predict([row])
print(result["label"], result["probability"])
```

## Input

The input is a prompt and the sentence with its markers: the two segments of the tokenizer, or one
if the prompt is empty. The template is {template}.
The section "Input" of docs/model.md in the repository has its rules: the names of the types, the
particles of the prompt, the spaces. `Predictor` shortens an input to {max_length} tokens. The row
above becomes, without the dimension of the batch:

```json
{{
{example}
}}
```

{how}

All inputs are int64. They are padded on the right: `input_ids` with the token {pad_id}, all others,
`attention_mask` too, with 0.

| input | shape | content |
|---|---|---|
{inputs}
"""

ONNX = """| `model.onnx` | encoder and head: from the inputs below to `probabilities` (batch, {}) |

The probabilities of `model.onnx` are in the order of the labels, and include the scaling of `{}`
and the temperature.
"""
KLUE = """The labels are KLUE-RE's (Park et al. 2021, KLUE: Korean Language Understanding
Evaluation)."""
POOLER = """ The pooler is not part of it:
`AutoModel.from_pretrained(".", add_pooling_layer=False)`."""


def model_card(checkpoint: dict, model: RelationModel, tokenizer, onnx: bool) -> str:
    """The README.md of the folder."""
    labels, version, scores = (checkpoint[key] for key in ("labels", "version", "scores"))
    has_scores = "micro_f1" in scores
    text = f"On the validation rows of the run: {describe(scores, labels)}." if has_scores else ""
    licence = "# license: add that of the training data"
    data = "Add the name and the licence of the training data here, and the licence above."
    if labels == KLUE_LABELS:  # the demo's too: they do not tell whose the rows are
        if checkpoint["data"].startswith("hub:klue/klue@"):
            licence = "license: cc-by-sa-4.0"
            data = f"KLUE-RE (`{checkpoint['data']}`), under CC BY-SA 4.0."
        data += f" {KLUE}"
    found = ", ".join(f"{name} {value}" for name, value in version.items() if value)
    example, how = _worked_example(checkpoint, model, tokenizer)
    return CARD.format(
        run=checkpoint["run"], n_labels=len(labels), version=found or "unknown", licence=licence,
        data=f"{data} The licence of the pretrained encoder holds too.",
        scores=text or "None: the run had no validation rows.", negative=labels[0],
        template=", ".join(f"{k} `{v}`" for k, v in checkpoint["template"].items()),
        onnx=ONNX.format(len(labels), labels[0]) if onnx else "", sentence=SENTENCE,
        pooler=POOLER if hasattr(model.encoder, "pooler") else "",
        max_length=checkpoint["max_length"], pad_id=model.pad_id, example=example, how=how,
        inputs="\n".join(_described_inputs(model)),
    )  # fmt: skip


def _worked_example(checkpoint: dict, model: RelationModel, tokenizer) -> tuple[str, str]:
    """(texts and inputs of EXAMPLE as lines of JSON, how the tokenizer makes ids of the texts)."""
    template = Template(**checkpoint["template"])
    examples, _ = encode([EXAMPLE], template, tokenizer, checkpoint["labels"], max_length=512)
    found = template.render(EXAMPLE, tokenizer.sep_token or tokenizer.eos_token or "")
    texts = {"prompt": found.before, "sentence": found.text + found.after}
    inputs = {name: array[0].tolist() for name, array in padded(examples, model).items()}
    lines = [f' "{k}": {json.dumps(v, ensure_ascii=False)}' for k, v in (texts | inputs).items()]
    segments = {name: text for name, text in texts.items() if text}
    how = f"`tokenizer({', '.join(segments)})` gives "
    if tokenizer(*segments.values())["input_ids"] == inputs["input_ids"]:
        return ",\n".join(lines), how + "these `input_ids`."
    how += "other `input_ids`: tokenize each text with `add_special_tokens=False`, and add the "
    return ",\n".join(lines), how + "special tokens as above."


def _described_inputs(model: RelationModel) -> list[str]:
    """A row of the card's table for each input."""
    token, marker = ("last", "closing") if model.is_causal else ("first", "opening")
    types = ", ".join(f"{number} {type_}" for number, type_ in enumerate(TYPES, 1))
    second = f"the numbers of their types ({types}), 0 for others and elsewhere"
    if len(model.entity_embeddings) < 2:
        second = "no effect"
    content = {
        "input_ids": "tokens of prompt and sentence",
        "attention_mask": "1 for tokens, 0 for padding",
        "token_type_ids": "the tokenizer's numbers of the segments; 0 if it gives none",
        "markers": f"position of the {token} token of the subject's {marker} marker (without one, "
        "of its word), then of the object's",
        "entities": "the first row has 1 at the tokens of the subject's word (or of what replaces "
        "it), 2 at the object's, 0 elsewhere; where they overlap, the shorter one's number; the "
        f"second has {second}",
    }
    # the second dimension is 2 where it does not vary
    shapes = {name: sorted(({1: 2} | x).items()) for name, x in input_shapes(model).items()}
    return [
        f"| `{name}` | {', '.join(str(n) for _, n in shape)} | {content[name]} |"
        for name, shape in shapes.items()
    ]
