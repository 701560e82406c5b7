"""Error messages, exit codes, command lines and atomic writes."""

import pytest

from common import InputError, Parser, atomic_write, exit_on_error, optional_import, read_json


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


def test_a_parser_suggests_options_and_takes_no_abbreviations():
    parser = Parser(prog="train.py")
    parser.add_argument("--batch-size", type=int)
    hint = r"unrecognized arguments: --batch_size 8; did you mean --batch-size\? train.py -h"
    with pytest.raises(InputError, match=hint):
        parser.parse_args(["--batch_size", "8"])
    with pytest.raises(InputError, match="unrecognized arguments: --batch 8"):
        parser.parse_args(["--batch", "8"])


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
    with pytest.raises(InputError, match="cannot be written"), atomic_write(path / "below"):
        pass
