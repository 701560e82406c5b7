"""Decoders as encoders: a tiny random GPT-2 and Llama.

Their tokenizer has no classification, separator or padding token.
"""

import json

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

import infer
import train
from data import KLUE_LABELS, Template
from encoder import load_encoder, load_tokenizer
from model import RelationModel
from tests.helpers import SAMPLE
from tokens import collate, encode

SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
         "intermediate_size": 128}  # fmt: skip


@pytest.fixture(scope="session")
def decoder_folder(tmp_path_factory, rows):
    """decoder_folder("gpt2"), decoder_folder("llama"): a tiny decoder, a byte-level tokenizer."""
    folder = tmp_path_factory.mktemp("decoders")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=2000, special_tokens=["<end>"], initial_alphabet=alphabet
    )
    tokenizer.train_from_iterator([row.sentence for row in rows], trainer)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")
    torch.manual_seed(0)
    configs = {
        "gpt2": transformers.GPT2Config(
            n_embd=64,
            n_layer=2,
            n_head=4,
            n_positions=300,
            vocab_size=2000,
            bos_token_id=0,
            eos_token_id=0,
        ),
        "llama": transformers.LlamaConfig(**SIZES, num_key_value_heads=2, vocab_size=2000),
    }
    for name, config in configs.items():
        tokenizer.save_pretrained(folder / name)
        transformers.AutoModel.from_config(config).save_pretrained(folder / name)
    return lambda name: str(folder / name)


@pytest.mark.parametrize("marker", ["none", "entity_marker_punct", "typed_entity_marker"])
@pytest.mark.parametrize("prompt", ["none", "s_and_o", "problem"])
def test_tokenizers_without_special_tokens(decoder_folder, rows, marker, prompt):
    template, tokenizer = Template(marker, prompt), load_tokenizer(decoder_folder("gpt2"))
    assert tokenizer.pad_token is None
    tokenizer.add_tokens(template.added_tokens({"PER"}))
    examples, _ = encode(rows[:50], template, tokenizer, KLUE_LABELS, 256)
    for row, example in zip(rows, examples):
        r = template.render(row)
        end = "<end>" if r.before else ""
        text = tokenizer.decode(example.ids, clean_up_tokenization_spaces=False)
        assert text == r.before + end + r.text + r.after
        for who, entity in ((1, row.subject), (2, row.object)):
            assert entity.word in tokenizer.decode(example.ids[example.entities[0] == who])
            closing = r.text[r.spans[who - 1][2] : r.spans[who - 1][3]].strip() or entity.word
            token = tokenizer.decode([int(example.ids[example.marker_ends[who - 1]])])
            assert closing[-1] in token or "\ufffd" in token  # a part of a character


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_the_last_token_sees_the_whole_sentence(decoder_folder, rows, name):
    tokenizer = load_tokenizer(decoder_folder(name))
    model = RelationModel(load_encoder(decoder_folder(name)), 30, "cls").eval()
    template = Template("entity_marker_punct")
    (example,), _ = encode(rows[:1], template, tokenizer, KLUE_LABELS, 256)
    ids = example.ids.copy()
    middle = len(ids) // 2
    ids[middle] += 1
    states, changed = (
        model.encode(collate([e], np.array([0]))) for e in (example, example._replace(ids=ids))
    )
    torch.testing.assert_close(states[:middle], changed[:middle])
    assert (states[-1] - changed[-1]).abs().max() > 1e-4


def test_a_decoder_trains_and_predicts(call, decoder_folder, tmp_path):
    options = f"--data {SAMPLE} --model {decoder_folder('llama')} --limit 400 --split stratified"
    options += " --amp off --lr 5e-3 --epochs 4 --batch-size 16 --eval-every 1000 --out a"
    options += " --layer-decay 1"  # random weights: every layer learns at the full rate
    call(train, *options.split(), *"--head entity --entity-embedding plain".split())
    best = json.loads((tmp_path / "a" / "summary.json").read_text())["best"]
    assert best["micro_f1"] > 40
    assert "micro F1" in call(infer, "a/ckpt.pt").out
