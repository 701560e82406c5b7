"""infer.py --export: the folder predicts as its checkpoint does, here and under onnxruntime."""

import json
import os
import re
import resource
import shutil
import sys
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
import transformers

import infer
from calibration import temper
from checkpoint import load_checkpoint, restore, save_checkpoint
from common import InputError
from data import KLUE_LABELS, Template
from encoder import load_encoder, load_tokenizer
from export import EXAMPLE, export, model_card, padded, write_onnx
from metrics import scale_negative
from model import RelationModel, predict
from predictor import Predictor
from sample.tiny_encoder import make_tiny_encoder
from tests.helpers import CPU, ROOT, encoder_of, examples_of, write_rows
from tokens import encode

SCORES = {"micro_f1": 70.0, "auprc": 60.0, "accuracy": 65.0, "absent": [], "step": 7}
NEEDS = "pip install -r requirements-dev.txt installs it"
LIKE_A_RUN = {"negative_factor": 1.7, "temperature": 1.4}


@pytest.fixture(scope="module")
def checkpoint(encoder_folder, tmp_path_factory):
    """A ckpt.pt with random weights, whose data lies in a private folder."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("run") / "ckpt.pt"
    options = {"head": "entity", "norm": "layer", "entity_embedding": "typed"}
    model = RelationModel(load_encoder(str(encoder_folder)), 30, **options)
    save_checkpoint(
        path, model, load_tokenizer(str(encoder_folder)), labels=KLUE_LABELS, model_options=options,
        template=Template()._asdict(), max_length=128, run="my-run", data=str(path.parent),
        version={"revision": None, "content": "abc"}, scores=SCORES, pairs=[["PER", "LOC"]],
        **LIKE_A_RUN,
    )  # fmt: skip
    return path


@pytest.fixture(scope="module")
def exported(checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("out") / "exported"
    export(load_checkpoint(checkpoint), folder, print)
    return folder


def run_onnx(path, inputs):
    onnxruntime = pytest.importorskip("onnxruntime", reason=NEEDS)
    session = onnxruntime.InferenceSession(str(path))
    assert [x.name for x in session.get_inputs()] == list(inputs)
    return session.run(["probabilities"], inputs)[0]


# --- the folder -------------------------------------------------------------------------------


def test_a_folder_predicts_as_its_checkpoint(call, checkpoint, rows, tmp_path):
    printed = call(infer, checkpoint, "--export", "folder").out
    assert printed.endswith(
        f"wrote folder from {checkpoint}; upload it with\n  hf upload OWNER/NAME folder\n"
    )
    write_rows(tmp_path / "test.csv", rows[:20])
    files = []
    for model in (checkpoint, "folder"):
        call(infer, model, "--data", "test.csv", "--amp", "off", "--out", "a.csv")
        files.append((tmp_path / "a.csv").read_bytes())
    assert files[0] == files[1]
    both = [Predictor(path, amp="off") for path in (checkpoint, tmp_path / "folder")]
    probs = [predictor.probabilities(rows[:20])[0] for predictor in both]
    np.testing.assert_array_equal(*probs)
    assert both[1].pairs == {("PER", "LOC")}


def test_transformers_reads_encoder_and_tokenizer(checkpoint, exported, rows):
    model, tokenizer = restore(load_checkpoint(checkpoint))
    encoder = transformers.AutoModel.from_pretrained(exported)
    read = transformers.AutoTokenizer.from_pretrained(exported)
    assert read(rows[0].sentence)["input_ids"] == tokenizer(rows[0].sentence)["input_ids"]
    weights = encoder.state_dict()
    for name, weight in model.encoder.state_dict().items():
        assert torch.equal(weights[name], weight)


def test_nothing_in_the_folder_names_a_private_path(checkpoint, encoder_folder, exported):
    for path in exported.iterdir():
        for private in (checkpoint.parent, encoder_folder):
            assert str(private).encode() not in path.read_bytes(), path
    assert json.loads((exported / "relation.json").read_text())["data"] == ""


def test_the_model_card_has_scores_version_and_licence(checkpoint, exported, tmp_path):
    """Only KLUE-RE of the hub is known to have KLUE's licence: the demo has its labels too."""
    card = huggingface_hub.ModelCard.load(exported / "README.md")
    assert (card.data.language, card.data.license) == ("ko", None)
    add = "Add the name and the licence of the training data here, and the licence above."
    for text in ("# my-run", "micro F1 70.00  AUPRC 60.00", "Version: content abc.", add,
                 "The labels are KLUE-RE's"):  # fmt: skip
        assert text in card.text
    assert "CC BY" not in card.text
    content = load_checkpoint(checkpoint)
    restored = restore(content)
    content |= {"data": "hub:klue/klue@1:re", "version": {"revision": "1", "content": "abc"}}
    card = huggingface_hub.ModelCard(model_card(content, *restored, onnx=True))
    assert card.data.license == "cc-by-sa-4.0"
    assert "KLUE-RE (`hub:klue/klue@1:re`), under CC BY-SA 4.0." in card.text
    assert "Version: revision 1, content abc." in card.text
    content |= {"labels": [f"label {i}" for i in range(30)], "scores": {"step": 7}}
    card = huggingface_hub.ModelCard(model_card(content, *restored, onnx=True))
    assert card.data.license is None
    assert "KLUE-RE's" not in card.text
    for text in (add, "None: the run had no validation rows.", "the scaling of `label 0`\nand the"):
        assert text in card.text
    export(content, tmp_path / "other", print)
    about = json.loads((tmp_path / "other/relation.json").read_text())
    assert about["data"] == "hub:klue/klue@1:re"


def worked_example(card: str) -> dict:
    return json.loads(re.search(r"^```json\n(.*?)^```", card, re.MULTILINE | re.DOTALL)[1])


def test_the_inputs_of_the_card_give_our_probabilities(exported):
    """Built with the exported tokenizer and ONNX's runtime alone."""
    pytest.importorskip("onnx", reason=NEEDS)
    card = (exported / "README.md").read_text(encoding="utf-8")
    example = worked_example(card)
    assert "`tokenizer(prompt, sentence)` gives these `input_ids`." in card
    texts = example.pop("prompt"), example.pop("sentence")
    assert texts[1].startswith("@ * person * 한태영 @ 의 생가가 있는 # ^ location ^ 인천 # 에는")
    tokenizer = transformers.AutoTokenizer.from_pretrained(exported)
    built = dict(tokenizer(*texts))
    assert set(built) == {"input_ids", "token_type_ids", "attention_mask"}
    assert built == {name: example[name] for name in built}
    tokens = np.array(tokenizer.convert_ids_to_tokens(example["input_ids"]))
    assert tokens[example["markers"]].tolist() == ["@", "#"]
    for row, numbers in zip(example["entities"], ((1, 2), (1, 3))):  # PER, LOC
        words = ["".join(tokens[np.array(row) == n]).replace("##", "") for n in numbers]
        assert words == ["한태영", "인천"]
        assert {*row} == {0, *numbers}
    types = "1 PER, 2 ORG, 3 LOC, 4 DAT, 5 POH, 6 NOH"
    assert f"({types}), 0 for others and elsewhere" in card
    assert types in (ROOT / "docs/python.md").read_text(encoding="utf-8")
    found = run_onnx(exported / "model.onnx", {k: np.array([v]) for k, v in example.items()})
    ours, _ = Predictor(exported, amp="off").probabilities([EXAMPLE])
    np.testing.assert_allclose(found, ours, atol=1e-5)


@pytest.mark.parametrize("options", [{"prompt": "none"}, {"prompt": "s_sep_o"},
                                     {"prompt": "problem", "marker": "none"}])  # fmt: skip
def test_the_texts_of_the_card_give_its_ids(checkpoint, options):
    content = load_checkpoint(checkpoint)
    model, tokenizer = restore(content)
    content["template"] |= options
    card = model_card(content, model, tokenizer, onnx=True)
    example = worked_example(card)
    texts = [text for text in (example["prompt"], example["sentence"]) if text]
    assert f"`tokenizer({'prompt, ' * (len(texts) - 1)}sentence)` gives these" in card
    assert tokenizer(*texts)["input_ids"] == example["input_ids"]


def test_the_card_of_a_decoder(checkpoint):
    """Its tokenizer puts no separator between the segments, and the states are at the ends."""
    content = load_checkpoint(checkpoint)
    _, tokenizer = restore(content)
    model = RelationModel(encoder_of("llama"), 30, head="entity", entity_embedding="plain")
    tokenizer.backend_tokenizer.post_processor = None
    tokenizer.eos_token = "[SEP]"
    card = model_card(content, model, tokenizer, onnx=True)
    example = worked_example(card)
    assert "`tokenizer(prompt, sentence)` gives other `input_ids`: tokenize each text with" in card
    ids = [tokenizer(example[name], add_special_tokens=False)["input_ids"]
           for name in ("prompt", "sentence")]  # fmt: skip
    assert [*ids[0], tokenizer.eos_token_id, *ids[1]] == example["input_ids"]
    tokens = np.array(tokenizer.convert_ids_to_tokens(example["input_ids"]))
    assert example["markers"] == [np.flatnonzero(tokens == x)[-1] for x in "@#"]  # the closing ones
    assert "the last token of the subject's closing marker" in card
    assert "the second has no effect" in card
    assert "pooler" not in card


def test_the_example_of_the_card_runs_as_it_stands(exported, monkeypatch, capsys):
    card = (exported / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"^```python\n(.*?)^```", card, re.MULTILINE | re.DOTALL)
    monkeypatch.chdir(exported)
    exec(code, {})
    assert capsys.readouterr().out.split()[0] in KLUE_LABELS
    assert 'the repository "Korean relation extraction on KLUE-RE"' in card
    assert "# Korean relation extraction on KLUE-RE\n" in (ROOT / "README.md").read_text("utf-8")


@pytest.mark.parametrize("family", ["bert", "roberta", "xlm-r", "electra"])
def test_the_card_says_how_to_leave_out_the_pooler(checkpoint, family, tmp_path, caplog):
    content, model = load_checkpoint(checkpoint), RelationModel(encoder_of(family), 30)
    _, tokenizer = restore(content)
    card = model_card(content, model, tokenizer, onnx=True)
    has_none = 'AutoModel.from_pretrained(".", add_pooling_layer=False)' in card
    assert has_none == (family != "electra")
    model.encoder.save_pretrained(tmp_path)
    options = {"add_pooling_layer": False} if has_none else {}
    _, about = transformers.AutoModel.from_pretrained(tmp_path, output_loading_info=True, **options)
    assert not about["missing_keys"]


def test_the_files_have_the_modes_of_the_umask(checkpoint, tmp_path):
    before = os.umask(0o027)
    try:
        export(load_checkpoint(checkpoint), tmp_path / "out", print)
        make_tiny_encoder(str(tmp_path / "tiny"), ["가"], seed=0)
    finally:
        os.umask(before)
    for path in [*(tmp_path / "out").iterdir(), *(tmp_path / "tiny").iterdir()]:
        assert path.stat().st_mode & 0o777 == 0o640, path


def test_an_exported_model_does_not_know_its_data(call, checkpoint, rows, tmp_path):
    """Not the folder data that happens to be there; nor does it replace the run's predictions."""
    export(load_checkpoint(checkpoint), tmp_path / "v2", print)
    (tmp_path / "data").mkdir()
    write_rows(tmp_path / "data/test_data.csv", rows[:3])
    refused = call(infer, "v2", code=2).err
    expected = "--data: expected a file: an exported model does not know its data"
    assert refused == f"infer.py: {expected}\n"
    assert "out/v2.csv: 3 rows" in call(infer, "v2", "--data", "data").out
    assert "out/v2+my-run.csv: 3" in call(infer, "v2", checkpoint, "--data", "data").out


def test_an_older_checkpoint_has_no_temperature(checkpoint, tmp_path, rows):
    content = load_checkpoint(checkpoint)
    del content["temperature"], content["pairs"]
    export(content, tmp_path / "old", print)
    raw, calibrated = (
        Predictor(tmp_path / "old", amp="off", calibrated=c).probabilities(rows[:3])[0]
        for c in (False, True)
    )
    np.testing.assert_allclose(raw, calibrated)


# --- what cannot be written or read -----------------------------------------------------------


def test_a_folder_with_files_is_left_alone(call, checkpoint, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/README.md").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for name, found in (("mine", "files in it"), ("file", "a file")):
        refused = call(infer, checkpoint, "--export", name, code=2).err
        assert f"--export {name}: found {found}, expected a new or an empty folder" in refused
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["README.md"]
    for more, expected in (
        (("--data", "x"), "--data: --export predicts nothing"),
        ((tmp_path / "b.pt",), "--export: found 2 checkpoints, expected one"),
    ):
        assert expected in call(infer, checkpoint, *more, "--export", "new", code=2).err
    refused = call(infer, checkpoint, "--export", "file/below", code=2).err
    assert "--export file/below: cannot be written: Not a directory" in refused
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "mine"]


def test_the_current_folder_is_not_replaced(checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"--export \.: found the current folder, expected a new"):
        export(load_checkpoint(checkpoint), Path(), print)


def test_a_full_disk_is_one_line_and_leaves_no_folder(checkpoint, tmp_path):
    content, before = load_checkpoint(checkpoint), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, before[1]))  # below model.safetensors
    try:
        with pytest.raises(InputError, match=r"--export \S+: cannot be written: .*File too large"):
            export(content, tmp_path / "out", print)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(tmp_path.iterdir())


def test_an_encoder_that_transformers_would_not_read_back_is_refused(checkpoint, tmp_path):
    small = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
    config = transformers.MT5Config(**small, vocab_size=99, dropout_rate=0)
    model = RelationModel(transformers.AutoModel.from_config(config).encoder, 30)
    content = load_checkpoint(checkpoint) | {"model_options": {"head": "cls"}}
    content |= {"encoder": json.dumps(config.to_dict()), "weights": model.state_dict()}
    with pytest.raises(InputError, match=r"its files lack|is not read back"):
        export(content, tmp_path / "out", print)
    assert not list(tmp_path.iterdir())


def test_a_damaged_folder_is_one_line(call, exported, tmp_path):
    relation = json.loads((exported / "relation.json").read_text(encoding="utf-8"))
    marker = {"template": {"marker": "x"}}
    for file, text, expected in (
        (
            "relation.json",
            relation | {"max_length": "9"},
            "max_length: found '9', expected the type int",
        ),
        ("relation.json", relation | {"negative_factor": []}, "found [], expected a number"),
        ("relation.json", relation | {"temperature": 0}, "found 0, expected a number above 0"),
        ("relation.json", relation | marker, "template: marker: found 'x', expected one of none, "),
        ("relation.json", relation | {"model_options": {"x": 1}}, "cannot be made: TypeError: "),
        ("config.json", "{", "the model of the run 'my-run' cannot be made: JSONDecodeError: "),
        ("tokenizer.json", "{}", "the model of the run 'my-run' cannot be made: KeyError: "),
        ("head.safetensors", "x", "head.safetensors: cannot be read: "),
        ("relation.json", "{", "relation.json: expected what infer.py --export writes"),
        ("relation.json", '{"format": "9"}', "relation.json: found format '9', expected"),
        ("relation.json", '{"format": "relation model 4"}', "keys: found"),
    ):
        folder = tmp_path / "damaged"
        shutil.copytree(exported, folder, dirs_exist_ok=True)
        (folder / file).write_text(text if isinstance(text, str) else json.dumps(text))
        assert expected in call(infer, folder, "--data", "x", code=2).err
    (tmp_path / "empty").mkdir()
    assert "empty: cannot be read: Is a directory" in call(infer, tmp_path / "empty", code=2).err


# --- ONNX -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "head", "embedding"),
    [("bert", "entity", "none"), ("roberta", "cls", "typed"), ("xlm-r", "bilstm", "none"),
     ("electra", "bigru", "plain"), ("modernbert", "entity", "none"), ("deberta-v2", "cls", "none"),
     ("gpt2", "entity", "none"), ("llama", "cls", "none"), ("mistral", "entity", "none"),
     ("qwen3", "bilstm", "none")],
)  # fmt: skip
def test_onnx_gives_our_probabilities(family, head, embedding, tmp_path):
    pytest.importorskip("onnx", reason=NEEDS)
    model = RelationModel(encoder_of(family), 30, head=head, entity_embedding=embedding).eval()
    for table in model.entity_embeddings:  # they start at zero
        torch.nn.init.normal_(table.weight)
    batches = [examples_of(lengths, seed=3) for lengths in ([9, 30, 5, 17, 12], [7], [4, 4])]
    assert write_onnx(model, LIKE_A_RUN, tmp_path / "model.onnx") is None
    for examples in batches:  # afterwards: the model must predict as before
        probs = scale_negative(predict(model, examples, CPU), 1.7)
        found = run_onnx(tmp_path / "model.onnx", padded(examples, model))
        np.testing.assert_allclose(found, temper(probs, 1.4), atol=1e-5)


def test_onnx_of_a_folder_gives_the_probabilities_of_rows(exported, rows):
    pytest.importorskip("onnx", reason=NEEDS)
    content = load_checkpoint(exported)
    model, tokenizer = restore(content)
    template = Template(**content["template"])
    examples, _ = encode(rows[:16], template, tokenizer, content["labels"], content["max_length"])
    found = run_onnx(exported / "model.onnx", padded(examples, model))
    ours, _ = Predictor(exported, amp="off").probabilities(rows[:16])
    np.testing.assert_allclose(found, ours, atol=1e-5)


def test_the_snippets_of_the_docs(checkpoint, tmp_path, monkeypatch, capsys):
    pytest.importorskip("onnx", reason=NEEDS)
    pytest.importorskip("onnxruntime", reason=NEEDS)
    section = (ROOT / "docs/python.md").read_text(encoding="utf-8").split("\n## Export\n")[1]
    snippets = re.findall(r"^```python\n(.*?)^```", section.split("\n## ")[0], re.M | re.S)
    (tmp_path / "runs/demo").mkdir(parents=True)
    shutil.copy(checkpoint, tmp_path / "runs/demo/ckpt.pt")
    monkeypatch.chdir(tmp_path)
    for snippet in snippets:
        exec(snippet, names := {})
    predictor = Predictor("exported", amp="off")
    (expected,) = predictor.probabilities([names["row"]])[0]
    best = expected.argmax()
    printed = capsys.readouterr().out.splitlines()[-1].split()
    assert (printed[0], float(printed[1])) == (
        KLUE_LABELS[best], pytest.approx(expected[best], abs=1e-4)
    )  # fmt: skip


def test_without_the_package_onnx_the_rest_is_written(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    said = []
    export(load_checkpoint(checkpoint), tmp_path / "out", said.append)
    expected = "no model.onnx: it needs the package onnx: pip install -r requirements-dev.txt"
    assert said == [expected]
    assert not (tmp_path / "out/model.onnx").exists()
    assert "onnx" not in (tmp_path / "out/README.md").read_text(encoding="utf-8")
    assert (tmp_path / "out/head.safetensors").exists()
