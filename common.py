"""What every program needs: errors, command lines, exit codes, reading and writing files.

Every program reports bad input as one line on stderr and exits with code 2:

    @exit_on_error
    def main():
        raise InputError("train.csv:3: label: found 'x', expected one of 30 labels")
"""

import argparse
import csv
import difflib
import functools
import glob
import importlib
import io
import json
import os
import re
import signal
import sys
import threading
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace


class InputError(Exception):
    """The user's input is wrong. The message is one line: place, field, found, expected."""


def expect(holds, where: str, field: str, found, expected: str):
    """Raise InputError unless `holds`; `where` is FILE or FILE:LINE."""
    if not holds:
        raise InputError(f"{where}: {field}: found {shorten(found)}, expected {expected}")


def expect_field(record: dict, where: str, *names: str):
    """Raise InputError unless the record has a field with one of these names."""
    if not {*names} & {*record}:
        found = f"found {shorten(', '.join(map(str, record)))}"
        raise InputError(f"{where}: no field {' or '.join(names)}; {found}")


def expect_new_id(row_id: str, line: int, line_of: dict[str, int], where: str):
    """Raise InputError if an earlier line has this id; else note its line in `line_of`."""
    unique = f"a unique id; line {line_of.get(row_id)} has it too"
    expect(row_id not in line_of, where, "id", row_id, unique)
    line_of[row_id] = line


def expand(pattern: str) -> list[str]:
    """The files that match a pattern, sorted.

    [pattern] if no file matches: reading it then raises an error that names it.
    """
    return sorted(glob.glob(pattern)) or [pattern]


def bar_options(hidden: bool, delayed: bool = False) -> dict:
    """Options of a tqdm bar: twice a second on a terminal, once a minute in a log file.

    A `delayed` bar appears after this time, so that short work shows none.
    """
    interval = 0.5 if sys.stderr.isatty() else 60
    return {"mininterval": interval, "delay": interval if delayed else 0, "disable": hidden}


def shorten(value) -> str:
    """At most 60 characters of repr(value), which escapes line breaks and lone surrogates."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an int of thousands of digits, nesting too deep
        text = f"a {type(value).__name__}"
    return text if len(text) <= 60 else f"{text[:57]}..."


def first_line(error: Exception) -> str:
    """The first line of another library's error message, at most 200 characters."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def printable(text: str) -> str:
    """Replace line breaks, escape sequences and other control characters by spaces."""
    return "".join(c if c.isprintable() else " " for c in text)


def is_text(value) -> bool:
    """Whether `value` is a string that can be encoded as UTF-8 (JSON allows lone surrogates)."""
    return isinstance(value, str) and not re.search("[\ud800-\udfff]", value)


# --- programs ---------------------------------------------------------------------------------


def end(code: int, message: str, leave=sys.exit):
    """Print the message as one line on stderr (local rank 0) and exit."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(printable(f"{Path(sys.argv[0]).name}: {message}"), file=sys.stderr, flush=True)
    leave(code)


def exit_on_error(main):
    """Report InputError and OSError as one line on stderr and exit with code 2; 130 for Ctrl-C."""

    @functools.wraps(main)
    def program(*args, **kwargs):
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, signal.default_int_handler)  # from here on we clean up
        try:
            main(*args, **kwargs)
            sys.stdout.flush()
        except KeyboardInterrupt:
            end(130, "interrupted")
        except (InputError, OSError) as error:
            if isinstance(error, BrokenPipeError):  # the interpreter's final flush would fail too
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            end(2, str(error))

    return program


# Programs import this module first: importing torch takes seconds, and Ctrl-C would print where.
# Other programs that import these modules keep their own handler.
if Path(sys.argv[0]).resolve().parent == Path(__file__).resolve().parent:
    signal.signal(signal.SIGINT, lambda *_: end(130, "interrupted", os._exit))

# Names that Hugging Face's Trainer and its examples give to our options.
OPTION_OF = {
    "adam-beta2": "beta2",
    "batch-size": "max-tokens",  # in infer.py
    "bf16": "amp bf16",
    "eval-steps": "eval-every",
    "fp16": "amp fp16",
    "label-smoothing-factor": "label-smoothing",
    "learning-rate": "lr",
    "max-grad-norm": "clip-norm",
    "max-seq-length": "max-length",
    "max-train-samples": "limit",
    "model-name-or-path": "model",
    "num-train-epochs": "epochs",
    "output-dir": "out",
    "overwrite-output-dir": "fresh",
    "per-device-eval-batch-size": "max-tokens",
    "per-device-train-batch-size": "batch-size",
    "save-steps": "save-every",
    "test-file": "data",
    "train-file": "data",
    "validation-file": "valid",
    "warmup-steps": "warmup-ratio",
}


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that raises InputError and suggests the closest option name."""

    def __init__(self, **options):
        options |= {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
        super().__init__(**options)

    def parse_known_args(self, args=None, namespace=None):
        """Of a command too, whose unknown options argparse would leave to the main parser."""
        found, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return found, unknown

    def error(self, message: str):
        unknown = re.match(r"unrecognized arguments: --?([\w-]+)", message)
        hint = self._suggestion(unknown[1].replace("_", "-")) if unknown else ""
        raise InputError(f"{message}; {hint}{self.prog} -h lists all options")

    def _suggestion(self, name: str) -> str:
        known = self._option_string_actions
        if name.startswith("resume") and "--fresh" in known:
            return "the same command resumes by itself; "
        meant = [f"--{name}", f"--{OPTION_OF.get(name)}"]
        meant = [option for option in meant if option.split()[0] in known]
        meant += difflib.get_close_matches(f"--{name}", known, n=1)
        return f"did you mean {meant[0]}? " if meant else ""


def optional_import(package: str, feature: str):
    """Import a package of requirements-dev.txt; InputError names the command that installs it."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        install = "pip install -r requirements-dev.txt"
        raise InputError(f"{feature} needs the package {package}: {install}") from error


# --- files ------------------------------------------------------------------------------------


@contextmanager
def atomic_write(path: str | Path, mode: str = "w", keep: Path | None = None):
    """Write to a temporary file and rename it over `path` on success.

    With `keep`, the old file is renamed to it first. Raises InputError if the file cannot be
    written; the old file is then unchanged.
    """
    path = Path(path)
    text = {} if "b" in mode else {"encoding": "utf-8", "newline": ""}
    try:
        if path.is_dir():
            raise InputError(f"{path}: expected the name of a file, found a folder")
        temporary = path.with_name(f".{path.name}.tmp")  # a fixed name: the next write replaces it
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, mode, **text) as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            if keep and path.exists():
                os.replace(path, keep)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror or error}") from error


@contextmanager
def open_text(path: str | Path, newline: str = ""):
    """Open a UTF-8 file, with or without a byte order mark, to read it line by line."""
    try:
        with open(path, encoding="utf-8-sig", newline=newline) as file:
            yield file
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError:
        read_text(path)  # raises an InputError that names the line
        raise


def read_text(path: str | Path) -> str:
    """Read a UTF-8 file, with or without a byte order mark."""
    try:
        content = Path(path).read_bytes()
        return content.decode("utf-8-sig")
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        found = f"found byte {content[error.start]:#04x}, expected UTF-8 text"
        raise InputError(f"{path}:{line}: {found}; {_what_it_is(content)}") from error


SIGNATURES = {
    b"PAR1": "a Parquet file: name it .parquet",
    b"ARROW1": "an Arrow file",
    b"PK\x03\x04": "a checkpoint, or an Excel sheet: save that as CSV",
    b"\xd0\xcf\x11\xe0": "an old Excel sheet: save it as CSV",
    b"\x1f\x8b": "a gzip archive: decompress it first",
    b"\x80": "a pickle",
    b"SQLite": "a database",
}


def _what_it_is(content: bytes) -> str:
    """What a file that is not UTF-8 seems to be, and what to do."""
    for signature, kind in SIGNATURES.items():
        if content.startswith(signature):
            return f"it seems to be {kind}"
    start = content[:400]  # without a byte order mark, UTF-16 has a zero in each ASCII character
    if start.startswith((b"\xff\xfe", b"\xfe\xff")) or 5 * start.count(0) > len(start):
        return "it seems to be UTF-16: save it as UTF-8"
    if b"\0" in content:
        return "it is not a text file"
    try:
        content.decode("cp949")
    except UnicodeDecodeError:
        return "save it as UTF-8"
    return "it seems to be cp949 (EUC-KR): save it as UTF-8"


def parse_json(text: str):
    """json.loads; an object with a key twice is a ValueError, not the last of its values."""

    def unique(pairs):
        if len(dict(pairs)) < len(pairs):
            raise ValueError(f"an object has a key twice: {shorten([key for key, _ in pairs])}")
        return dict(pairs)

    return json.loads(text, object_pairs_hook=unique)


def read_json(path: str | Path, expected: str):
    """Read a JSON file; `expected` describes its content in the error message."""
    try:
        return parse_json(read_text(path))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: expected {expected}: {first_line(error)}") from error


def read_csv(path: str | Path, columns: tuple[str, ...], with_bad: bool = False):
    """Yield (line, {column: cell}) for each record of a CSV or TSV file with these columns.

    "subject_entity or subject" stands for either. The file is read line by line.
    A record with a wrong number of cells is an error, or `with_bad` is yielded as (line, error).
    """
    csv.field_size_limit(2**31 - 1)  # the largest C long of every platform
    delimiter = "\t" if Path(path).suffix.lower() == ".tsv" else ","
    line, header = 1, None
    try:
        with open_text(path) as file:
            reader = csv.reader(file, strict=True, delimiter=delimiter)
            for cells in reader:
                if header is None:
                    header = _header(cells, columns, f"{path}:1")
                elif cells and len(cells) != len(header):
                    expected = f"{len(header)} cells as in the header"
                    found = f"row: found {shorten(cells)}, expected {expected}"
                    error = InputError(f"{path}:{line}: {found}")
                    if not with_bad:
                        raise error
                    yield line, error
                elif cells:
                    yield line, dict(zip(header, cells, strict=True))
                line = reader.line_num + 1  # a quoted cell may span several lines
    except csv.Error as error:
        raise InputError(f"{path}:{line}: broken CSV: {error}") from error


def csv_writer(file):
    """A csv.writer whose records end with "\\n".

    With that as its lineterminator, csv would not quote "\\r", which ends a record when it is read.
    """
    write = lambda line: file.write(line.removesuffix("\r\n") + "\n")  # noqa: E731
    return csv.writer(SimpleNamespace(write=write))


def csv_text(records) -> str:
    """The records as the text of a CSV file."""
    text = io.StringIO(newline="")
    csv_writer(text).writerows(records)
    return text.getvalue()


def _header(cells: list[str], columns: tuple[str, ...], where: str) -> list[str]:
    header = [name.strip() for name in cells]
    missing = (column for column in columns if not {*column.split(" or ")} & {*header})
    missing = ", ".join(missing)
    expect(not missing, where, "header", ",".join(header), f"a column {missing}")
    twice = [name for name, n in Counter(header).items() if n > 1 and name]
    expect(not twice, where, "header", ", ".join(twice), "each column once")
    return header
