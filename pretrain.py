"""Continue an encoder's masked-language-model pre-training on the task's sentences (TAPT).

    python pretrain.py --model DIR --lr 2e-4 --batch-size 32 --epochs 2 --out runs/tapt
    python train.py --model runs/tapt/encoder                  # then fine-tune it

Reads the sentences of train.csv and test_data.csv, each once, without labels, markers or prompts
(task-adaptive pre-training, Gururangan et al. 2020). A tenth is held out. Writes encoder/, a
folder for --model, summary.json, TensorBoard events, and last.pt, from which the same command
resumes. The loop is that of train.py.
"""

# First: it handles Ctrl-C while the others are imported.
from common import InputError, atomic_write, exit_on_error

# isort: split

import math
import shlex
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModelForMaskedLM
from transformers.modeling_outputs import BaseModelOutput

from common import first_line
from data import version
from distributed import Worker
from encoder import FlatEncoder, load_model, load_tokenizer
from rows import data_file, read_rows, rows_to_predict
from settings import TrainingSettings, parse_settings, setting
from splits import DATA_SEED, subsample
from task import Task
from tokens import IGNORED, Batch, Example, collate, within_tokens
from train import run
from vocabulary import unknown_in_sentences

MASKED = 0.15  # share of the tokens that are masked


@dataclass
class PretrainingSettings(TrainingSettings):
    kind = "mlm"

    valid: str = setting("", "data",
        "file with sentences to hold out; none: hold out none (default: a tenth)")  # fmt: skip
    max_length: int = setting(256, "input",
        "tokens per sentence; the end of longer ones is cut off", 64, math.inf)  # fmt: skip
    limit: int = setting(0, "data",
        "number of sentences, those held out included; 0: all", 0, math.inf)  # fmt: skip
    layer_decay: float = setting(1.0, "optimisation",
        "learning rate of a layer relative to the layer above", 0.01, 1)  # fmt: skip


# --- data -------------------------------------------------------------------------------------


def choose_sentences(settings: TrainingSettings, log) -> tuple[list[str], list[str], dict]:
    """(training sentences, held-out sentences, version of the data), each sentence once."""
    skipped = [] if settings.skip_bad_rows else None
    path = data_file(settings.data, "train")
    rows = read_rows(path, skipped, log)
    others = rows_to_predict(settings.data, skipped, log)
    sentences = list(dict.fromkeys(row.sentence for row in rows + others))
    log(f"{path}{' and test_data' if others else ''}: {len(sentences)} sentences")
    sentences, valid = subsample(sentences, settings.limit or len(sentences)), []
    if settings.valid == "":
        valid = subsample(sentences, max(1, len(sentences) // 10))
    elif settings.valid != "none":
        valid_rows = read_rows(settings.valid, skipped, log)
        valid = list(dict.fromkeys(row.sentence for row in valid_rows))
    held_out = set(valid)
    sentences = [sentence for sentence in sentences if sentence not in held_out]
    if skipped:
        log(f"bad rows left out: {len(skipped)}, the first: {skipped[0]}")
    if not sentences:
        raise InputError(f"{path}: no sentence is left to train on; all are held out")
    return sentences, valid, version(settings.data, rows + others)


def encode_sentences(sentences: list[str], tokenizer, max_length: int):
    """(examples, number of truncated sentences) of plain sentences."""
    backend = tokenizer.backend_tokenizer
    backend.enable_truncation(max_length)
    texts = backend.encode_batch(sentences)
    backend.no_truncation()
    examples = []
    for text in texts:
        ids = np.array(text.ids, dtype=np.int64)
        words = np.array([-1 if number is None else number for number in text.word_ids])
        real = words >= 0
        if words.max(initial=0) == 0:  # the tokenizer does not know words: each token is one
            words[real] = np.arange(real.sum())
        segments, entities = np.zeros_like(ids), np.zeros((2, len(ids)), dtype=np.int64)
        examples.append(Example(ids, segments, (0, 0), -1, (0, 0), entities, words))
    return examples, sum(bool(text.overflowing) for text in texts)


def n_masked(example: Example) -> int:
    """How many tokens of a sentence are masked: 15 %, at least one."""
    return max(1, round(MASKED * (example.words >= 0).sum()))


@dataclass(kw_only=True)  # Batch has a field with a default
class MaskedBatch(Batch):
    tokens: torch.Tensor  # (M,) flat indices of the masked tokens
    true_ids: torch.Tensor  # (M,) their ids before masking

    def pad(self, n_tokens: int, n_sentences: int, longest: int) -> "MaskedBatch":
        padded = super().pad(n_tokens, n_sentences, longest)
        missing = math.ceil(MASKED * n_tokens) + n_sentences - len(self.tokens)
        true_ids = F.pad(self.true_ids, (0, missing), value=IGNORED)
        return replace(padded, tokens=F.pad(self.tokens, (0, missing)), true_ids=true_ids)


def collate_masked(examples: list[Example], indices, key: list[int], tokenizer) -> MaskedBatch:
    """The flat batch of these examples with masked tokens.

    Of the chosen tokens 80 % become the mask token, 10 % a random token, and 10 % stay as they are
    (Devlin et al. 2019). Whole words are chosen; the last one may be masked in part. The masking
    is a pure function of `key`, the example and its index.
    """
    masked, positions = {}, {}
    for index in indices:
        random, example = np.random.default_rng([*key, index]), examples[index]
        order = random.permutation(example.words.max() + 1)[example.words]  # by word, at random
        order[example.words < 0] = len(order)
        chosen = np.argsort(order, kind="stable")[: n_masked(example)]
        draw, ids = random.random(len(chosen)), example.ids.copy()
        any_ids = random.integers(len(tokenizer), size=len(chosen))
        ids[chosen] = np.where(draw < 0.9, any_ids, ids[chosen])
        ids[chosen[draw < 0.8]] = tokenizer.mask_token_id
        masked[index], positions[index] = example._replace(ids=ids), chosen
    batch = collate(masked, indices)
    starts = batch.offsets.tolist()
    flat = np.concatenate([start + positions[i] for start, i in zip(starts, batch.indices)])
    true = np.concatenate([examples[i].ids[positions[i]] for i in batch.indices])
    return MaskedBatch(
        **vars(batch), tokens=torch.from_numpy(flat), true_ids=torch.from_numpy(true)
    )


# --- model ------------------------------------------------------------------------------------


class MaskedLanguageModel(FlatEncoder):
    """Encoder and language-model head of any architecture in transformers.

    Maps a MaskedBatch to the logits of its masked tokens, (M, vocabulary).
    """

    def __init__(self, language_model: nn.Module):
        super().__init__(language_model.base_model)
        self.head = language_model
        setattr(language_model, language_model.base_model_prefix, _GivenStates())
        try:
            with torch.no_grad():
                one = torch.tensor([1])
                self(MaskedBatch(**vars(self.probe), tokens=one, true_ids=one))
        except Exception as error:  # a head may need more than the states
            kind, found = language_model.config.model_type, first_line(error)
            raise InputError(
                f"--model: the language-model head of a {kind} fails: {found}"
            ) from error

    def forward(self, batch: MaskedBatch) -> torch.Tensor:
        return self.head(inputs_embeds=self.encode_only(batch, batch.tokens)[None]).logits[0]


class _GivenStates(nn.Module):
    """Replaces the encoder inside a language model: returns the states that it is given."""

    def forward(self, *_, inputs_embeds, **__):
        return BaseModelOutput(last_hidden_state=inputs_embeds)


def load_language_model(name: str) -> tuple[nn.Module, bool]:
    """(masked language model, whether its head is new), from a folder or the Hugging Face hub.

    A head that the files do not have is initialised, and tied to the input embeddings.
    """
    model, encoder, head_is_new = load_model(AutoModelForMaskedLM, name)
    if encoder is not model.base_model:
        expected = "expected an encoder without a decoder"
        raise InputError(f"--model {name}: found a {model.config.model_type}, {expected}")
    return model, head_is_new


# --- task -------------------------------------------------------------------------------------


class MaskedTokenTask(Task):
    """Masked tokens of unlabelled sentences."""

    def __init__(self, settings: PretrainingSettings, worker: Worker, log):
        super().__init__(settings, worker, log)
        sentences, valid, data_version = choose_sentences(settings, log)
        self.about = {"version": data_version}
        self.tokenizer = load_tokenizer(settings.model)
        if self.tokenizer.mask_token is None:
            raise InputError(f"--model {settings.model}: its tokenizer has no mask token")
        max_length = settings.max_length
        self.examples, n_cut = encode_sentences(sentences, self.tokenizer, max_length)
        self.valid, n_valid_cut = encode_sentences(valid, self.tokenizer, max_length)
        self.lengths = np.array([len(example.ids) for example in self.examples])
        self.n_targets = np.array([n_masked(example) for example in self.examples])
        self.n_valid_tokens = sum(len(example.ids) for example in self.valid)
        self.log_lengths("sentences", len(valid), n_cut + n_valid_cut)
        for line in unknown_in_sentences(self.tokenizer, sentences):
            log(line)

        torch.manual_seed(settings.seed)
        language_model, head_is_new = load_language_model(settings.model)
        self.set_model(MaskedLanguageModel(language_model))
        if head_is_new:
            log("the encoder's files have no masked-language-model head: a new one is trained")
        self.set_hash([*self.examples, *self.valid], len(self.valid))

    def batch(self, indices: np.ndarray, step: int) -> MaskedBatch:
        """These examples with other masked tokens in each step."""
        return collate_masked(self.examples, indices, [self.settings.seed, step], self.tokenizer)

    def loss(self, model, batch: MaskedBatch) -> torch.Tensor:
        with self.worker.autocast():
            logits = model(batch)
        return F.cross_entropy(logits.float(), batch.true_ids, reduction="sum")

    @torch.inference_mode()
    def evaluate(self, max_tokens: int) -> dict:
        """Mean loss and perplexity over the same masked tokens of the held-out sentences."""
        if not self.valid:
            return {}
        self.model.eval()
        worker, lengths = self.worker, np.array([len(e.ids) for e in self.valid])
        batches = within_tokens(np.arange(len(lengths)), lengths, max_tokens)
        total = torch.zeros((), dtype=torch.float64, device=worker.device)
        for indices in batches[worker.rank :: worker.world_size]:
            batch = collate_masked(self.valid, indices, [DATA_SEED], self.tokenizer)
            total += self.loss(self.model, batch.to(worker.device))
        loss = worker.sum(total).item() / sum(map(n_masked, self.valid))
        if not math.isfinite(loss):
            raise InputError(f"the validation loss is {loss}; try --amp off")
        return {"loss": loss, "perplexity": math.exp(min(loss, 100))}

    def merit(self, scores: dict) -> float:
        return -scores["loss"]

    def describe(self, scores: dict) -> str:
        return "masked tokens: loss {loss:.4f}  perplexity {perplexity:.2f}".format(**scores)

    def save(self, folder: Path, scores: dict, weights: dict):
        """Write encoder/, a folder that load_encoder and load_tokenizer take."""
        with tempfile.TemporaryDirectory() as temporary:
            start = "encoder."
            weights = {k.removeprefix(start): v for k, v in weights.items() if k.startswith(start)}
            self.model.encoder.save_pretrained(temporary, state_dict=weights)
            self.tokenizer.save_pretrained(temporary)
            for path in Path(temporary).iterdir():
                with atomic_write(folder / "encoder" / path.name, "wb") as file:
                    file.write(path.read_bytes())

    def next_commands(self, folders: list[Path]) -> str:
        options = self.settings.arguments("data", "skip_bad_rows", "max_length", "amp")
        commands = [
            ["python", "train.py", *options, f"--model={folder / 'encoder'}"] for folder in folders
        ]
        return "\n".join(f"  {shlex.join(command)}" for command in commands)


@exit_on_error
def main():
    run(parse_settings(PretrainingSettings, "pretrain.py", __doc__), MaskedTokenTask)


if __name__ == "__main__":
    main()
