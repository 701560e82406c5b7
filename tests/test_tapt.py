"""Masked tokens: which ones, the model that guesses them, and runs with --objective mlm."""

import copy
import json

import numpy as np
import pytest
import torch
import transformers

import train
from data import InputError, read_rows
from model import (
    MaskedLanguageModel,
    collate_masked,
    encode_sentences,
    load_encoder,
    load_language_model,
    load_tokenizer,
    n_masked,
)
from tests.conftest import SAMPLE
from tests.test_model import FAMILIES


@pytest.fixture
def sentences(encoder_folder, rows):
    tokenizer = load_tokenizer(str(encoder_folder))
    examples, n_cut = encode_sentences([row.sentence for row in rows], tokenizer, 256)
    assert n_cut == 0
    return examples, tokenizer


def test_sentences_are_tokenized_by_themselves_and_cut(encoder_folder, rows):
    tokenizer = load_tokenizer(str(encoder_folder))
    texts = [rows[0].sentence, rows[1].sentence * 30, rows[2].sentence]
    examples, n_cut = encode_sentences(texts, tokenizer, 64)
    assert (len(examples), n_cut) == (3, 1)
    for text, example in zip(texts, examples):
        numbers = example.words
        assert example.ids.tolist() == tokenizer(text, truncation=True, max_length=64)["input_ids"]
        assert numbers[0] == numbers[-1] == -1
        pieces = tokenizer.convert_ids_to_tokens(example.ids[1:-1].tolist())
        assert [piece.startswith("##") for piece in pieces[1:]] == (np.diff(numbers[1:-1]) == 0).tolist()


def test_fifteen_percent_are_masked_by_whole_words(sentences):
    examples, tokenizer = sentences
    rows = np.arange(500)
    batch, places, true = collate_masked(examples, rows, [42, 7], tokenizer)
    original = np.concatenate([examples[row].ids for row in batch.indices])
    assert (original[places] == true.numpy()).all()
    others = np.setdiff1d(np.arange(len(original)), places)
    assert (batch.ids.numpy()[others] == original[others]).all()
    n_real = sum((examples[row].words >= 0).sum() for row in rows)
    assert len(places) == sum(n_masked(examples[row]) for row in rows)
    assert len(places) / n_real == pytest.approx(0.15, abs=0.01)
    seen = batch.ids[places]
    assert (seen == tokenizer.mask_token_id).float().mean() == pytest.approx(0.8, abs=0.03)
    assert (seen == true).float().mean() == pytest.approx(0.1, abs=0.03)
    assert not set(true.tolist()) & {tokenizer.cls_token_id, tokenizer.sep_token_id}
    # whole words: at most one word of a sentence is masked in part
    chosen = np.zeros(len(original), dtype=bool)
    chosen[places] = True
    for row, start in zip(batch.indices, batch.offsets.tolist()):
        masked = chosen[start : start + len(examples[row].words)]
        in_part = [w for w in range(examples[row].words.max() + 1) if 0 < masked[examples[row].words == w].mean() < 1]
        assert len(in_part) <= 1


def test_what_is_masked_depends_on_seed_step_and_sentence_alone(sentences):
    examples, tokenizer = sentences
    whole, _, _ = collate_masked(examples, np.arange(10), [42, 7], tokenizer)
    for part in (np.arange(5), np.array([9, 3])):
        batch, _, _ = collate_masked(examples, part, [42, 7], tokenizer)
        for i, row in enumerate(batch.indices):
            (j,) = np.flatnonzero(whole.indices == row)
            a, b = (x.ids[x.offsets[k] : x.offsets[k + 1]] for x, k in ((batch, i), (whole, j)))
            assert torch.equal(a, b)
    for key in ([42, 8], [43, 7]):
        assert not torch.equal(collate_masked(examples, np.arange(10), key, tokenizer)[0].ids, whole.ids)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_the_architectures_own_model(family, sentences):
    torch.manual_seed(0)
    config = copy.deepcopy(FAMILIES[family])
    config.vocab_size = 4000
    whole = transformers.AutoModelForMaskedLM.from_config(config).eval()
    model = MaskedLanguageModel(copy.deepcopy(whole)).eval()
    examples, tokenizer = sentences
    batch, places, _ = collate_masked(examples, np.array([5]), [1], tokenizer)
    logits = model(batch, places)
    torch.testing.assert_close(logits, whole(batch.ids[None]).logits[0, places], rtol=1e-4, atol=1e-5)
    logits.square().sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_a_missing_head_is_new_and_tied(encoder_folder, tmp_path):
    found, is_new = load_language_model(str(encoder_folder))
    assert is_new
    assert found.get_output_embeddings().weight is found.get_input_embeddings().weight
    found.save_pretrained(tmp_path)
    again, is_new = load_language_model(str(tmp_path))
    assert not is_new
    assert torch.equal(again.cls.predictions.transform.dense.weight, found.cls.predictions.transform.dense.weight)
    transformers.GPT2Model(transformers.GPT2Config(n_embd=8, n_layer=1, n_head=1)).save_pretrained(tmp_path / "gpt2")
    with pytest.raises(InputError, match=r"--model .*gpt2"):
        load_language_model(str(tmp_path / "gpt2"))


MLM = f"--objective mlm --data {SAMPLE} --limit 200 --amp off --batch-size 20 --lr 1e-3 --epochs 3 --max-length 64"


def test_pre_training_goes_on_and_its_encoder_is_fine_tuned(call, encoder_folder, tmp_path):
    done = call(train, *MLM.split(), "--model", encoder_folder, "--out", "tapt", "--save-every", "5")
    assert "a new one, tied to its embeddings" in done.out
    summary = json.loads((tmp_path / "tapt" / "summary.json").read_text())
    losses = [scores["loss"] for scores in summary["evaluations"]]
    assert len(losses) == 3
    assert summary["best"]["loss"] == min(losses) < losses[0] - 0.1
    assert summary["best"]["perplexity"] == pytest.approx(np.exp(summary["best"]["loss"]))
    before, after = load_encoder(str(encoder_folder)), load_encoder(str(tmp_path / "tapt" / "encoder"))
    last = torch.load(tmp_path / "tapt" / "last.pt", weights_only=True)["weights"]
    weights = after.state_dict()
    assert all(torch.equal(weights[k], last[f"encoder.{k}"]) for k in weights if not k.startswith("pooler"))
    assert not torch.equal(before.get_input_embeddings().weight, after.get_input_embeddings().weight)

    # goes on from a save before the last as if nothing had happened
    whole = (tmp_path / "tapt" / "encoder" / "model.safetensors").read_bytes()
    (tmp_path / "tapt" / "last.pt").unlink()
    (tmp_path / "tapt" / "encoder" / "model.safetensors").unlink()
    done = call(train, *MLM.split(), "--model", encoder_folder, "--out", "tapt", "--save-every", "5")
    assert "going on after step" in done.out
    assert (tmp_path / "tapt" / "encoder" / "model.safetensors").read_bytes() == whole

    settings = f"--data {SAMPLE} --limit 200 --split stratified --amp off --epochs 1 --lr 1e-3"
    call(train, *settings.split(), "--model", "tapt/encoder", "--out", "fine")
    assert (tmp_path / "fine" / "ckpt.pt").exists()


def test_what_is_held_out_is_not_trained_on(rows):
    sentences, valid, _ = train.choose_sentences(train.Settings(data=str(SAMPLE), objective="mlm"), print)
    assert set(sentences).isdisjoint(valid)
    assert len(valid) == (len(sentences) + len(valid)) // 10
    assert {*sentences, *valid} == {row.sentence for row in [*rows, *read_rows(SAMPLE / "test_data.csv")]}


def test_processes_and_parts_do_not_change_what_is_learned(call, run, encoder_folder, tmp_path):
    call(train, *MLM.split(), "--model", encoder_folder, "--out", "one")
    run("train.py", *MLM.split(), "--model", encoder_folder, "--out", "two", "--max-tokens", "200", processes=2)
    one, two = (torch.load(tmp_path / name / "last.pt", weights_only=True) for name in ("one", "two"))
    for name, value in one["weights"].items():
        torch.testing.assert_close(value, two["weights"][name], rtol=0, atol=5e-4)
    assert one["progress"]["best"]["loss"] == pytest.approx(two["progress"]["best"]["loss"], abs=1e-3)


def test_a_demo_leaves_the_encoder_that_it_has_trained_as_it_is(call, tmp_path):
    weights = []
    for _ in range(2):  # the second time it has been to its end
        call(train, *"--demo --objective mlm --epochs 1 --limit 200 --out demo".split())
        weights.append((tmp_path / "demo" / "encoder" / "model.safetensors").read_bytes())
    assert weights[0] == weights[1]
