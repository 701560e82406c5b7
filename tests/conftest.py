"""What the tests share: the sample's rows, tiny encoders made on the spot, and the programs run as users run them."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SAMPLE = ROOT / "tests" / "sample"
sys.path.insert(0, str(ROOT))
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # two tests run at a time
if "RE_GPU" not in os.environ:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # only tests/test_gpu.py is about GPUs

from data import Template, read_rows  # noqa: E402
from tests.sample.tiny_encoder import make_tiny_encoder  # noqa: E402


@pytest.fixture(scope="session")
def rows():
    return read_rows(SAMPLE / "train.csv")


@pytest.fixture(scope="session")
def encoder_folder(tmp_path_factory, rows):
    """A tiny BERT with its tokenizer, learned from the sample; without dropout."""
    folder = tmp_path_factory.mktemp("encoder")
    texts = [Template().render(row).text for row in rows]
    make_tiny_encoder(str(folder), [*texts, "가까운 비틀즈와 조지 해리슨 [SUBJ-ORG] </o:person>"], seed=0)
    config = json.loads((folder / "config.json").read_text())
    config |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def run(tmp_path):
    """Runs a program in an empty folder: run("train.py", "--demo", processes=2, code=0) -> CompletedProcess."""

    def run(program, *arguments, processes=1, code=0, **kwargs):
        command = [sys.executable]
        if processes > 1:
            command += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        command += [str(ROOT / program), *map(str, arguments)]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=400, **kwargs)
        assert done.returncode == code, done.stdout + done.stderr
        return done

    return run


@pytest.fixture
def call(tmp_path, monkeypatch, capsys):
    """Runs a program in an empty folder, in this process, which saves its start: call(train, "--demo", code=0) ->
    what it printed, stdout and stderr."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def call(program, *arguments, code=0):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [program.__file__, *map(str, arguments)])
        capsys.readouterr()
        try:
            program.main()
            found = 0
        except SystemExit as error:
            found = error.code
        printed = capsys.readouterr()
        assert found == code, printed.out + printed.err
        return printed

    yield call
    for number, handler in handlers.items():
        signal.signal(number, handler)
