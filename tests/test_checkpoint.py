"""ckpt.pt: what it restores, which files are rejected, and that no code in it runs."""

import pickle
from contextlib import nullcontext

import numpy as np
import pytest
import torch

from checkpoint import (
    MODEL_FORMAT,
    PROGRESS_FORMAT,
    DamagedFile,
    Saver,
    load_checkpoint,
    restore,
    save_checkpoint,
    save_stream,
)
from common import InputError
from encoder import load_encoder, load_tokenizer
from model import RelationModel, predict
from tests.helpers import CPU, examples_of


@pytest.fixture
def checkpoint(tmp_path, encoder_folder):
    """(path of a ckpt.pt, its model, its tokenizer)."""
    tokenizer = load_tokenizer(str(encoder_folder))
    tokenizer.add_tokens(["[E1]"])
    encoder = load_encoder(str(encoder_folder), range(len(tokenizer) - 1, len(tokenizer)))
    options = {"head": "bigru", "norm": "batch", "gelu": True, "entity_embedding": "typed"}
    model = RelationModel(encoder, 3, **options)
    path, labels = tmp_path / "ckpt.pt", ["a", "b", "c"]
    save_checkpoint(path, model, tokenizer, labels=labels, model_options=options, run="mine")
    return path, model, tokenizer


def test_a_checkpoint_restores_model_and_tokenizer(checkpoint):
    path, model, tokenizer = checkpoint
    content = load_checkpoint(path)
    assert content["run"] == "mine"
    restored, restored_tokenizer = restore(content)
    assert not restored.training
    examples = examples_of((9, 4, 17))
    np.testing.assert_array_equal(predict(model, examples, CPU), predict(restored, examples, CPU))
    text = "[E1] 비틀즈"
    assert restored_tokenizer(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert restored_tokenizer.sep_token == "[SEP]"


def test_truncated_and_foreign_files_are_rejected_by_name(checkpoint, tmp_path):
    content = checkpoint[0].read_bytes()
    (tmp_path / "half.pt").write_bytes(content[: len(content) // 2])
    (tmp_path / "text.pt").write_text("hello")
    (tmp_path / "empty.pt").write_text("")
    torch.save({"weights": {}}, tmp_path / "foreign.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save({"format": PROGRESS_FORMAT}, tmp_path / "progress.pt")
    torch.save({"format": "relation model 1"}, tmp_path / "old.pt")
    for name, problem in (
        ("half.pt", "truncated, or not a checkpoint"),
        ("text.pt", "truncated, or not a checkpoint"),
        ("empty.pt", "truncated, or not a checkpoint"),
        ("foreign.pt", f"found format 'None', expected {MODEL_FORMAT!r}"),
        ("list.pt", f"found format 'None', expected {MODEL_FORMAT!r}"),
        ("progress.pt", f"found format {PROGRESS_FORMAT!r}, expected {MODEL_FORMAT!r}"),
        ("old.pt", f"found format 'relation model 1', expected {MODEL_FORMAT!r}"),
        ("absent.pt", "cannot be read: No such file"),
    ):
        with pytest.raises(InputError, match=f"{name}: {problem}") as raised:
            load_checkpoint(tmp_path / name)
        assert "\n" not in str(raised.value)
        assert isinstance(raised.value, DamagedFile) == problem.startswith("truncated")
    with pytest.raises(InputError, match=f"found format {MODEL_FORMAT!r}"):
        load_checkpoint(checkpoint[0], PROGRESS_FORMAT)


class Malicious:
    def __reduce__(self):
        return (open, ("planted", "w"))


def test_code_in_a_checkpoint_does_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"format": MODEL_FORMAT, "weights": Malicious()}, "bad.pt")
    (tmp_path / "raw.pt").write_bytes(pickle.dumps(Malicious(), protocol=2))
    for name in ("bad.pt", "raw.pt"):
        with pytest.raises(InputError, match=name):
            load_checkpoint(name)
    assert not (tmp_path / "planted").exists()


def test_tokenizer_files_of_a_checkpoint_stay_in_their_folder(checkpoint, tmp_path):
    content = load_checkpoint(checkpoint[0])
    for name in (str(tmp_path / "planted"), "../planted"):
        content["tokenizer"] = {name: "{}"}
        with pytest.raises(InputError, match="planted"):
            restore(content)
    assert not (tmp_path / "planted").exists()


def test_saves_in_a_thread_see_the_states_of_their_time_and_raise_in_wait():
    saver, weight, found = Saver(torch.device("cuda")), torch.zeros(3), []

    def save(name, states):
        if name == "full":
            raise OSError("disk full")
        found.append((name, states["weight"].tolist()))

    for name in ("first", "second"):
        saver({"weight": weight}, save, name)
        weight += 1
    saver.wait()
    assert found == [("first", [0, 0, 0]), ("second", [1, 1, 1])]
    saver({"weight": weight}, save, "full")
    with pytest.raises(OSError, match="disk full"):
        saver.wait()


def test_after_a_failed_save_no_later_one_is_written():
    """last.pt must not name a best model that was not written."""
    saver, found = Saver(torch.device("cuda")), []

    def fail(states):
        raise OSError("disk full")

    saver({}, fail)
    saver({}, found.append)
    with pytest.raises(OSError, match="disk full"):
        saver.wait()
    saver.thread.shutdown()
    assert not found


def test_a_save_waits_for_the_gpu_that_has_the_states(monkeypatch):
    """The current GPU of a new thread is the first one."""
    waited = []

    class Stream:
        def __init__(self, device):
            self.device = device

        def wait_stream(self, other):
            waited.append(other)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    first = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "default_stream", lambda device=first: device)
    save_stream.cache_clear()
    saver = Saver(torch.device("cuda", 1))
    assert saver.stream is Saver(torch.device("cuda", 1)).stream
    saver({}, lambda states: None)
    saver.wait()
    assert waited == [torch.device("cuda", 1)]
    save_stream.cache_clear()
