"""Fixtures: the sample's rows, a tiny encoder, and the programs as users run them."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # two tests run at a time
if "RE_GPU" not in os.environ:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # only tests/test_gpu.py uses a GPU

from checkpoint import save_checkpoint
from data import KLUE_LABELS, Template
from encoder import load_encoder, load_tokenizer
from model import RelationModel
from rows import read_rows
from sample.tiny_encoder import make_tiny_encoder
from tests.helpers import ROOT, SAMPLE


@pytest.fixture(scope="session")
def rows():
    return read_rows(SAMPLE / "train.csv")


@pytest.fixture(scope="session")
def encoder_folder(tmp_path_factory, rows):
    """A tiny BERT without dropout, and a tokenizer learned from the sample."""
    folder = tmp_path_factory.mktemp("encoder")
    texts = [Template().render(row).text for row in rows]
    more = "가까운 비틀즈와 조지 해리슨 [SUBJ-ORG] </o:person>"
    make_tiny_encoder(str(folder), [*texts, more], seed=0)
    config = json.loads((folder / "config.json").read_text())
    config |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="session")
def checkpoint(encoder_folder, tmp_path_factory):
    """A ckpt.pt with random weights."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("run") / "ckpt.pt"
    options = {"head": "entity", "norm": "layer"}
    model = RelationModel(load_encoder(str(encoder_folder)), 30, **options)
    save_checkpoint(
        path, model, load_tokenizer(str(encoder_folder)), labels=KLUE_LABELS, model_options=options,
        template=Template()._asdict(), max_length=128, negative_factor=1.0, temperature=2.0,
        run="run", data=str(path.parent), version={}, scores={},
    )  # fmt: skip
    return path


@pytest.fixture
def run(tmp_path):
    """run("train.py", "--demo", processes=2, code=0): run a program in an empty folder."""

    def run(program, *arguments, processes=1, code=0, **options):
        command = [sys.executable]
        if processes > 1:
            torchrun = ["-m", "torch.distributed.run", "--standalone"]
            command += [*torchrun, f"--nproc_per_node={processes}"]
        command += [str(ROOT / program), *map(str, arguments)]
        options |= {"capture_output": True, "text": True, "check": False, "timeout": 400}
        done = subprocess.run(command, cwd=tmp_path, **options)
        assert done.returncode == code, done.stdout + done.stderr
        return done

    return run


@pytest.fixture
def call(tmp_path, monkeypatch, capsys):
    """call(train, "--demo", code=0): run a program's main in an empty folder, in this process.

    Saves the start of another process. Returns what was printed (.out, .err).
    """
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def call(program, *arguments, code=0, **options):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [program.__file__, *map(str, arguments)])
        capsys.readouterr()
        try:
            program.main(**options)
            found = 0
        except SystemExit as error:
            found = error.code
        printed = capsys.readouterr()
        assert found == code, printed.out + printed.err
        return printed

    yield call
    for number, handler in handlers.items():
        signal.signal(number, handler)
