"""Error messages, exit codes, command lines and atomic writes."""

import os
import signal
import subprocess
import sys
from dataclasses import fields

import pytest

from common import (
    OPTION_OF,
    InputError,
    Parser,
    atomic_write,
    exit_on_error,
    optional_import,
    read_json,
)
from settings import Settings, option
from tests.helpers import ROOT


def fail_with(message):
    @exit_on_error
    def main():
        raise InputError(message)

    with pytest.raises(SystemExit) as raised:
        main()
    assert raised.value.code == 2


def test_an_error_message_is_one_line_without_control_characters(capsys):
    fail_with("train.csv:3: label: found a\x1b[2J\nb\r\u2028c")
    assert capsys.readouterr().err.endswith(": train.csv:3: label: found a [2J b  c\n")


def test_only_local_rank_0_prints_the_error_message(capsys, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    fail_with("train.csv:3: label")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("--batch_size 8", "--batch-size"),
        ("--batch-sizes 8", "--batch-size"),
        ("--per_device_train_batch_size=8", "--batch-size"),
        ("-lr 1", "--lr"),
        ("--learning_rate 1", "--lr"),
        ("--learning-rate 1", "--lr"),
        ("--num_train_epochs 3", "--epochs"),
        ("--output_dir x", "--out"),
        ("--model_name_or_path x", "--model"),
        ("--train_file x", "--data"),
        ("--fp16", "--amp fp16"),
        ("--weight_decay 0", "--weight-decay"),
        ("--warmup_steps 10", "--warmup-ratio"),
    ],
)
def test_an_unknown_option_suggests_what_was_meant(given, meant):
    parser = Parser(prog="train.py")
    for name in "amp batch-size data epochs lr model out warmup-ratio weight-decay".split():
        parser.add_argument(f"--{name}")
    with pytest.raises(InputError) as raised:
        parser.parse_args(given.split())
    expected = f"unrecognized arguments: {given}; did you mean {meant}? train.py -h"
    assert str(raised.value).startswith(expected)


def test_the_names_of_others_stand_for_options_that_a_program_has():
    train = {option(f.name).removeprefix("--") for f in fields(Settings)}
    assert {meant.split()[0] for meant in OPTION_OF.values()} <= train


def test_a_parser_takes_no_abbreviations():
    parser = Parser(prog="train.py")
    parser.add_argument("--batch-size", type=int)
    with pytest.raises(InputError, match="unrecognized arguments: --batch 8"):
        parser.parse_args(["--batch", "8"])


def test_an_unknown_option_of_a_command_suggests_that_commands_options():
    parser = Parser(prog="report.py")
    commands = parser.add_subparsers(required=True)
    commands.add_parser("errors").add_argument("--gold")
    commands.add_parser("data").add_argument("--old")
    expected = r"arguments: --golden x; did you mean --gold\? report.py errors -h lists"
    with pytest.raises(InputError, match=expected):
        parser.parse_args(["errors", "--golden", "x"])


def test_an_optional_package_that_is_missing_is_named_with_the_command_that_installs_it():
    expected = "hub: needs the package no_such_package: pip install -r requirements-dev.txt"
    with pytest.raises(InputError, match=expected):
        optional_import("no_such_package", "hub:")


@pytest.mark.parametrize("content", ["{", "[" * 100_000])
def test_bad_json_is_an_input_error_of_one_line(tmp_path, content):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(InputError, match=r"a.json: expected a list: ") as raised:
        read_json(tmp_path / "a.json", "a list")
    assert "\n" not in str(raised.value)


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("old")

    def fail_half_way():
        with atomic_write(path) as file:
            file.write("new")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail_half_way()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
    with atomic_write(path, keep=tmp_path / "b.csv") as file:
        file.write("new")
    assert path.read_text() == "new"
    assert (tmp_path / "b.csv").read_text() == "old"
    assert sorted(tmp_path.iterdir()) == [path, tmp_path / "b.csv"]
    for folder in (tmp_path, ".", "/"):
        found = "expected the name of a file, found a folder"
        with pytest.raises(InputError, match=found), atomic_write(folder):
            pass
    with pytest.raises(InputError, match="cannot be written"), atomic_write(path / "below"):
        pass


@pytest.mark.parametrize("program", ["train", "pretrain", "infer", "ensemble", "report", "sweep"])
def test_ctrl_c_during_the_imports_is_one_line(tmp_path, program):
    (tmp_path / "numpy.py").write_text("import time; print('here', flush=True); time.sleep(60)")
    command = [sys.executable, ROOT / f"{program}.py"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    with subprocess.Popen(command, env=environment, **pipes) as process:
        assert process.stdout.readline() == "here\n"
        process.send_signal(signal.SIGINT)
        _, printed = process.communicate(timeout=30)
    assert (process.returncode, printed) == (130, f"{program}.py: interrupted\n")


def test_ctrl_c_after_the_imports_is_one_line(capsys):
    @exit_on_error
    def main():
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(SystemExit, match="130"):
        main()
    assert capsys.readouterr().err.endswith(": interrupted\n")
