"""Encoders of any family: each is computed right, or refused in one line before training."""

import copy
import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import train
from checkpoint import load_checkpoint, restore, save_checkpoint
from common import InputError
from distributed import Worker
from encoder import PROVEN, FlatEncoder, load_encoder, load_tokenizer, text_encoder
from model import RelationModel, predict
from pretrain import MaskedLanguageModel, load_language_model
from settings import Settings, parse_settings
from step import make_optimizer
from task import RelationTask
from tests.helpers import (
    CPU,
    DECODERS,
    FAMILIES,
    NO_DROPOUT,
    ONE_SEGMENT,
    SAMPLE,
    SMALL,
    encoder_of,
    examples_of,
)
from tokens import collate

SHORT = {"max_position_embeddings": 40}
T5 = {"vocab_size": 99, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
BART = {"vocab_size": 99, "d_model": 32, "encoder_layers": 2, "encoder_attention_heads": 4,
        "encoder_ffn_dim": 64, "decoder_layers": 1, "decoder_attention_heads": 4,
        "decoder_ffn_dim": 64, "max_position_embeddings": 40}  # fmt: skip
# (configuration, flat, causal, most tokens); none of them is proven
OTHERS = {
    "albert": (transformers.AlbertConfig(**SMALL, **SHORT, embedding_size=16), True, False, 40),
    "bart": (transformers.BartConfig(**BART), False, False, 40),
    "bloom": (
        transformers.BloomConfig(vocab_size=99, hidden_size=32, n_layer=2, n_head=4),
        False, True, np.inf),
    "deberta": (
        transformers.DebertaConfig(**SMALL, **NO_DROPOUT, **SHORT, relative_attention=True,
                                   pos_att_type=["p2c", "c2p"]),
        False, False, 40),
    "data2vec-text": (
        transformers.Data2VecTextConfig(**SMALL, **ONE_SEGMENT, max_position_embeddings=42),
        True, False, 40),
    "gemma2": (
        transformers.Gemma2Config(**SMALL, **SHORT, num_key_value_heads=2, head_dim=8,
                                  attn_logit_softcapping=0.5),
        False, True, 40),
    "layoutlm": (transformers.LayoutLMConfig(**SMALL, **SHORT), False, False, 40),
    "lilt": (
        transformers.LiltConfig(**SMALL | {"hidden_size": 48}, max_2d_position_embeddings=9,
                                max_position_embeddings=42, pad_token_id=1),
        False, False, 40),
    "longformer": (
        transformers.LongformerConfig(**SMALL, attention_window=8, pad_token_id=1,
                                      max_position_embeddings=42),
        False, False, 40),
    "luke": (
        transformers.LukeConfig(**SMALL, entity_vocab_size=9, entity_emb_size=16, pad_token_id=1,
                                max_position_embeddings=42),
        False, False, 40),
    "mobilebert": (
        transformers.MobileBertConfig(vocab_size=99, hidden_size=32, num_hidden_layers=2,
                                      num_attention_heads=4, intermediate_size=32,
                                      embedding_size=32, true_hidden_size=32,
                                      intra_bottleneck_size=32, **SHORT),
        False, False, 40),
    "mt5": (transformers.MT5Config(**T5), False, False, np.inf),
    "opt": (
        transformers.OPTConfig(vocab_size=99, hidden_size=32, num_hidden_layers=2, ffn_dim=64,
                               num_attention_heads=4, word_embed_proj_dim=32, **SHORT),
        True, True, 40),
    "squeezebert": (
        transformers.SqueezeBertConfig(**SMALL, **SHORT, embedding_size=32), False, False, 40),
    "xlnet": (
        transformers.XLNetConfig(vocab_size=99, d_model=32, n_layer=2, n_head=4, d_inner=64),
        False, False, np.inf),
}  # fmt: skip
REFUSED = {
    "canine": (
        transformers.CanineConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
                                  intermediate_size=64, num_hash_buckets=64),
        "has no table of token embeddings"),
    "convbert": (
        transformers.ConvBertConfig(**SMALL, embedding_size=32),
        "changes a sentence's states by .* with the others of its batch"),
    "fnet": (
        transformers.FNetConfig(vocab_size=99, hidden_size=32, num_hidden_layers=2,
                                intermediate_size=64),
        "changes a sentence's states by .* with the others of its batch"),
    "mra": (
        transformers.MraConfig(**SMALL), "does not look at the other tokens of a sentence"),
    "nystromformer": (
        transformers.NystromformerConfig(**SMALL, segment_means_seq_len=64, num_landmarks=8),
        "cannot read a sentence: RuntimeError: shape"),
    "reformer": (
        transformers.ReformerConfig(vocab_size=99, hidden_size=32, attn_layers=["local"],
                                    num_attention_heads=4, attention_head_size=8,
                                    axial_pos_embds=False, feed_forward_size=64),
        "does not give one state of 32 per token"),
}  # fmt: skip


def other(family: str):
    """A tiny encoder with random weights, large enough for the sentences to differ."""
    torch.manual_seed(0)
    model = transformers.AutoModel.from_config(copy.deepcopy(OTHERS[family][0]))
    return text_encoder(model).eval()


# --- the states -----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", OTHERS)
def test_other_families_give_the_states_of_transformers(family):
    _, flat, causal, max_length = OTHERS[family]
    encoder = other(family)
    reference = copy.deepcopy(encoder)
    model = RelationModel(encoder, 30, "entity").eval()
    assert (model.is_flat, model.is_causal, model.max_length) == (flat, causal, max_length)
    examples = examples_of((7, 30, 7, 13, 40))
    batch = collate(examples, np.arange(5))
    states = model.encode(batch).split(batch.lengths)
    for found, index in zip(states, batch.indices):
        ids, segments = (torch.from_numpy(x)[None] for x in examples[index][:2])
        inputs = {"token_type_ids": segments} if model.has_segments else {}
        inputs |= {"attention_mask": torch.ones_like(ids)}
        expected = reference(input_ids=ids, **inputs).last_hidden_state[0]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("head", ["cls", "entity", "bilstm"])
@pytest.mark.parametrize("family", FAMILIES | DECODERS | OTHERS)
def test_a_prediction_does_not_depend_on_the_batch(family, head):
    encoder = other(family) if family in OTHERS else encoder_of(family)
    model, examples = RelationModel(encoder, 30, head), examples_of((9, 4, 17, 9, 30, 22, 4))
    together, alone = predict(model, examples, CPU), predict(model, examples, CPU, max_tokens=1)
    np.testing.assert_allclose(together, alone, atol=1e-5)


@pytest.mark.parametrize("family", REFUSED)
def test_encoders_that_cannot_be_right_are_refused(family):
    config, problem = REFUSED[family]
    torch.manual_seed(0)
    encoder = transformers.AutoModel.from_config(copy.deepcopy(config))
    with pytest.raises(InputError, match=f"found a {family}, which {problem}") as raised:
        FlatEncoder(encoder)
    assert "expected one of the families bert, roberta" in str(raised.value)
    assert "\n" not in str(raised.value)


def test_embeddings_that_are_not_what_the_encoder_reads_are_refused():
    config = transformers.EsmConfig(**SMALL, pad_token_id=1, mask_token_id=4)
    torch.manual_seed(0)
    encoder = transformers.AutoModel.from_config(config)  # it scales the embeddings of token ids
    assert RelationModel(copy.deepcopy(encoder), 30).first_position == 2
    with pytest.raises(InputError, match="or with --entity-embedding; expected one of"):
        RelationModel(encoder, 30, entity_embedding="plain")


def test_the_families_that_a_refusal_names_are_the_tested_ones():
    assert (*FAMILIES, *DECODERS) == PROVEN


class AddNeighbour(torch.nn.Module):
    """Adds the state of the token before: across sentences in a flat batch."""

    def __init__(self, wraps: bool):
        super().__init__()
        self.wraps = wraps

    def forward(self, x):
        before = x.roll(1, 1)
        if not self.wraps:
            before[:, 0] = 0
        return x + before


def test_the_padded_way_is_used_where_only_the_flat_one_mixes_sentences():
    encoder = encoder_of("bert")
    encoder.embeddings.dropout = AddNeighbour(wraps=False)
    model = FlatEncoder(encoder)
    assert not model.is_flat
    batch, tokens = collate(examples_of((9, 4)), np.arange(2)), torch.tensor([0, 8, 9, 12])
    torch.testing.assert_close(model.encode_only(batch, tokens), model.encode(batch)[tokens])
    encoder.embeddings.dropout = AddNeighbour(wraps=True)  # padding reaches the first token
    with pytest.raises(InputError, match="changes a sentence's states"):
        FlatEncoder(encoder)


def test_the_first_sentences_leave_no_trace():
    encoder = transformers.AutoModel.from_config(transformers.BertConfig(**SMALL)).train()
    encoder.encoder.layer[1].eval()
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    model = FlatEncoder(encoder)
    assert torch.equal(torch.rand(3), expected)
    assert model.training
    assert encoder.encoder.layer[0].training
    assert not encoder.encoder.layer[1].training
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("family", OTHERS)
def test_other_families_can_be_restored(family, tmp_path, encoder_folder):
    tokenizer, options = load_tokenizer(str(encoder_folder)), {"head": "entity"}
    model, examples = RelationModel(other(family), 3, **options), examples_of((9, 4, 17))
    rest = {"labels": ["a", "b", "c"], "model_options": options}
    save_checkpoint(tmp_path / "ckpt.pt", model, tokenizer, **rest)
    restored, _ = restore(load_checkpoint(tmp_path / "ckpt.pt"))
    np.testing.assert_array_equal(predict(restored, examples, CPU), predict(model, examples, CPU))


# --- gradients and learning rates -----------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES | DECODERS | OTHERS)
def test_parameters_without_a_gradient_are_frozen(family):
    encoder = other(family) if family in OTHERS else encoder_of(family)
    model = RelationModel(encoder, 30, "entity", entity_embedding="typed").train()
    assert bool(model.frozen) == (family in ("lilt", "longformer", "luke", "xlnet"))
    model(collate(examples_of((9, 17)), np.arange(2))).sum().backward()
    without = {name for name, p in model.named_parameters() if p.grad is None}
    assert without == {f"encoder.{name}" for name in model.frozen}
    optimizer = make_optimizer(model, Settings(lr=1e-3, layer_decay=0.9))
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert trained == {id(p) for p in model.parameters() if p.requires_grad}


def test_layers_that_share_weights_are_not_taken_for_the_lowest():
    model = RelationModel(other("albert"), 30)
    optimizer = make_optimizer(model, Settings(lr=1e-3, layer_decay=0.5))
    scale = {id(p): group["scale"] for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        shared = ".albert_layers." in name
        expected = 0.5 if shared else 0.25 if name.startswith("encoder.") else 1
        assert scale[id(parameter)] == expected, name


def test_the_norm_after_the_last_layer_belongs_to_it():
    for family, name in (("mt5", "final_layer_norm"), ("opt", "decoder.final_layer_norm")):
        model = RelationModel(other(family), 30)
        optimizer = make_optimizer(model, Settings(lr=1e-3, layer_decay=0.5))
        scale = {id(p): group["scale"] for group in optimizer.param_groups for p in group["params"]}
        assert scale[id(model.encoder.get_parameter(f"{name}.weight"))] == 0.5


# --- precision ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("amp", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_an_encoder_that_fails_in_half_precision_is_refused(amp, dtype):
    model, worker = FlatEncoder(other("deberta")), Worker(torch.device("cpu"), dtype)
    with pytest.raises(InputError, match=f"--amp {amp}: a deberta fails in this .*: value cannot"):
        model.place(worker)
    model.place(CPU)
    FlatEncoder(other("lilt")).place(worker)


def test_states_that_overflow_are_refused():
    encoder = other("mt5")
    encoder.final_layer_norm.weight.data *= 1e30
    model = FlatEncoder(encoder)
    model.place(CPU)
    encoder.final_layer_norm.weight.data *= 1e30
    with pytest.raises(InputError, match=r"--amp off: a mt5 fails .*: its states are not finite$"):
        model.place(CPU)


# --- folders --------------------------------------------------------------------------------------


def test_mt5_is_loaded_as_its_text_encoder(tmp_path):
    torch.manual_seed(0)
    whole = transformers.AutoModel.from_config(OTHERS["mt5"][0])
    whole.save_pretrained(tmp_path)
    encoder = load_encoder(str(tmp_path), range(99, 101))
    assert type(encoder) is type(whole.encoder)
    torch.testing.assert_close(encoder.get_input_embeddings().weight[:99], whole.shared.weight)
    assert FlatEncoder(encoder).encode(collate(examples_of((9, 5)), [0, 1])).shape == (14, 32)


def test_missing_weights_are_not_random_without_a_word(encoder_folder, tmp_path):
    transformers.AutoModel.from_pretrained(encoder_folder).save_pretrained(tmp_path)
    weights, file = load_file(tmp_path / "model.safetensors"), tmp_path / "model.safetensors"
    renamed = {name.replace("Norm.weight", "Norm.scale"): w for name, w in weights.items()}
    save_file(renamed, file, {"format": "pt"})
    with pytest.raises(InputError, match=r"its files lack 5 of 37 weights, such as embeddings.Lay"):
        load_encoder(str(tmp_path))
    save_file({f"bert.{name}": w for name, w in weights.items()}, file, {"format": "pt"})
    load_encoder(str(tmp_path))  # of a model with a head


def test_fewer_layers_than_the_weights_have_are_refused(encoder_folder, tmp_path):
    folder = tmp_path / "encoder"
    transformers.AutoModelForMaskedLM.from_pretrained(encoder_folder).save_pretrained(folder)
    load_encoder(str(folder))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
    with pytest.raises(InputError, match=r"more layers than its config.json, such as encoder.lay"):
        load_encoder(str(folder))


@pytest.mark.parametrize("n", [100, 600])
def test_a_config_with_other_sizes_than_the_weights_names_the_weight(encoder_folder, tmp_path, n):
    load_encoder(str(encoder_folder)).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"max_position_embeddings": n}))
    found = rf"position_embeddings.weight has the shape \(512, 128\), by config.json \({n}, 128\);"
    for load in (load_encoder, load_language_model):
        with pytest.raises(InputError, match=found):
            load(str(tmp_path))


def test_a_language_model_whose_encoder_has_no_weights_is_refused(encoder_folder, tmp_path):
    config = load_encoder(str(encoder_folder)).config
    model = transformers.AutoModelForMaskedLM.from_config(config)
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    kept = {name: w for name, w in weights.items() if ".layer.1." not in name}
    save_file(kept, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"lack 16 of 38 weights, such as bert.encoder.layer.1."):
        load_language_model(str(tmp_path))


def test_language_models_that_need_more_than_states_are_refused():
    torch.manual_seed(0)
    model = transformers.AutoModelForMaskedLM.from_config(OTHERS["longformer"][0])
    with pytest.raises(InputError, match="the language-model head of a longformer fails: "):
        MaskedLanguageModel(model)


def test_weights_of_another_version_are_one_line(encoder_folder, tmp_path):
    tokenizer, options = load_tokenizer(str(encoder_folder)), {"head": "entity"}
    model = RelationModel(load_encoder(str(encoder_folder)), 3, **options)
    rest = {"labels": ["a", "b", "c"], "model_options": options}
    save_checkpoint(tmp_path / "ckpt.pt", model, tokenizer, **rest)
    content = load_checkpoint(tmp_path / "ckpt.pt")
    content["weights"]["encoder.old_name"] = content["weights"].popitem()[1]
    with pytest.raises(InputError, match=r"weights do not fit transformers .*: Missing key"):
        restore(content)


def test_a_tokenizer_with_more_tokens_than_the_encoder_is_refused(encoder_folder):
    n = load_encoder(str(encoder_folder)).get_input_embeddings().num_embeddings
    load_encoder(str(encoder_folder), range(n, n))
    for added in (range(n + 1, n + 1), range(n + 1, n + 5)):
        with pytest.raises(InputError, match=f"its tokenizer has {n + 1} tokens, the .* only {n};"):
            load_encoder(str(encoder_folder), added)


# --- programs -------------------------------------------------------------------------------------


@pytest.fixture
def longformer_folder(encoder_folder, tmp_path):
    """A tiny Longformer, whose weights for global attention never get a gradient."""
    folder = tmp_path / "longformer"
    tokenizer = load_tokenizer(str(encoder_folder))
    tokenizer.save_pretrained(folder)
    sizes = {"vocab_size": len(tokenizer), "attention_window": 32, "max_position_embeddings": 258}
    config = transformers.LongformerConfig(**SMALL | sizes, pad_token_id=1, type_vocab_size=2)
    torch.manual_seed(0)
    transformers.AutoModel.from_config(config).save_pretrained(folder)
    return folder


def test_frozen_weights_are_said_and_a_run_with_them_resumes(call, longformer_folder):
    options = f"--data {SAMPLE} --model {longformer_folder} --limit 40 --batch-size 20 --epochs 2"
    options += " --valid none --amp off --eval-every 1 --out a"

    def stop(step):
        if step == 3:
            sys.exit(9)

    def main():
        train.run(parse_settings(Settings, "train.py", ""), RelationTask, stop)

    stopped = SimpleNamespace(__file__=train.__file__, main=main)
    found = call(stopped, *options.split(), code=9)
    line = "18 weights of the encoder have no effect and are frozen, such as encoder.layer.0"
    assert line in found.out + found.err
    assert "resuming after step 3" in call(train, *options.split()).out


@pytest.mark.slow
def test_frozen_weights_do_not_stop_two_processes(run, longformer_folder):
    options = f"--data {SAMPLE} --model {longformer_folder} --limit 40 --batch-size 20 --epochs 2"
    run("train.py", *options.split(), "--valid", "none", "--amp", "off", processes=2)


def test_a_tokenizer_far_smaller_than_the_encoder_is_said(call, encoder_folder, tmp_path):
    load_encoder(str(encoder_folder), range(4000, 8000)).save_pretrained(tmp_path / "encoder")
    load_tokenizer(str(encoder_folder)).save_pretrained(tmp_path / "encoder")
    options = f"--data {SAMPLE} --model encoder --limit 20 --batch-size 20 --epochs 1 --amp off"
    printed = call(train, *options.split(), "--valid", "none")
    assert "tokens, the encoder embeddings for 8000; are their files of" in printed.out
