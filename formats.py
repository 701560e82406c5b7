"""The formats that rows are read from: CSV, TSV, JSON, JSON lines, Parquet, the Hugging Face hub.

    path = data_file("data", "train")                  # data/train.csv, or another format
    for line, record in read_records(path, columns):   # dicts; rows.read_rows checks them

See docs/data.md.
"""

import json
import re
from pathlib import Path

from common import (
    InputError,
    expect,
    first_line,
    open_text,
    optional_import,
    parse_json,
    read_csv,
)

HUB = re.compile(r"hub:([^@]+)@([^:@]+)(?::([^:@/]+))?")  # name or folder, revision, config
# HUB/SPLIT. A revision may contain a slash too: without a config, only these splits are taken
HUB_SPLIT = re.compile(r"hub:[^@]+@[^:@]+(:[^:@/]+/[^:@/]+|/(train|dev|validation|test|test_data))")
SUFFIXES = (".csv", ".tsv", ".json", ".jsonl", ".parquet")


class MissingSplit(InputError):
    """A data set of the hub does not have the split."""


# --- files ------------------------------------------------------------------------------------


def data_file(data: str | Path, stem: str) -> Path:
    """The file that `data` means: `data` itself, or the file `stem` of a data folder.

    For a hub data set the "path" is HUB/SPLIT, where `stem` names the split if `data` does not.
    """
    if str(data).startswith("hub:"):
        has_split = HUB_SPLIT.fullmatch(str(data))
        return Path(str(data)) if has_split else Path(str(data), stem)
    if (path := file_in(Path(data), stem)) is None:
        found = f"no {stem}.csv, .tsv, .json, .jsonl or .parquet"
        found = "no such file" if Path(data).suffix in SUFFIXES else found
        raise InputError(f"{data}: {found}; --data names another folder or file")
    return path


def file_in(folder: Path, stem: str) -> Path | None:
    """The file `stem` of a folder, or the "folder" itself if it is a file; None without one."""
    candidates = [folder, *(folder / f"{stem}{suffix}" for suffix in SUFFIXES)]
    found = [path for path in candidates if path.is_file()]
    if len(found) > 1:
        names = f"{found[0].name} and {found[1].name}"
        raise InputError(f"{folder}: found {names}, expected one of them; --data may name a file")
    return found[0] if found else None


# --- records ----------------------------------------------------------------------------------


def read_records(path: Path, columns: list[str]):
    """Yield (line, fields) for each record of a file. `columns`: names that a CSV must have.

    The line is the record's number in a JSON list, a Parquet file and a hub data set. For a CSV
    record with a wrong number of cells, (line, InputError) is yielded.
    """
    suffix = path.suffix.lower()
    if str(path).startswith("hub:"):
        yield from _hub_records(path)
    elif suffix in (".json", ".jsonl"):
        yield from _json_records(path)
    elif suffix == ".parquet":
        yield from _parquet_records(path)
    else:
        yield from read_csv(path, columns, with_bad=True)


def _json_records(path: Path):
    """Yield (line, fields) of a JSON list, or of JSON lines, whatever the name of the file."""
    with open_text(path, "\n") as file:
        first = next((line for line in file if line.strip()), "")
    is_list = first.lstrip().startswith("[")
    with open_text(path, "\n") as file:
        for number, piece in enumerate([file.read()] if is_list else file, 1):
            try:
                if piece.strip():
                    content = parse_json(piece)
                    yield from enumerate(content, 1) if is_list else [(number, content)]
            except (ValueError, RecursionError) as error:
                line = getattr(error, "lineno", 1) if is_list else number
                expected = "expected a JSON list, or an object on each line"
                reason = getattr(error, "msg", error)  # without Python's own line number
                raise InputError(f"{path}:{line}: {expected}: {reason}") from error


def _parquet_records(path: Path):
    """Yield (number, fields) of a Parquet file; those of the hub know the names of labels."""
    parquet = optional_import("pyarrow.parquet", "a .parquet file")
    try:
        with parquet.ParquetFile(path, page_checksum_verification=True) as file:
            columns = file.schema_arrow.names
            twice = [name for name in set(columns) if columns.count(name) > 1]
            expect(not twice, str(path), "columns", ", ".join(twice), "each column once")
            about = json.loads((file.schema_arrow.metadata or {}).get(b"huggingface", "{}"))
            names = about.get("info", {}).get("features", {}).get("label", {}).get("names")
            batches = file.iter_batches(1024)
            records = (record for batch in batches for record in batch.to_pylist())
            yield from enumerate(_with_names(records, names), 1)
    except (OSError, ValueError, NotImplementedError, OverflowError) as error:
        # pyarrow's own errors are subclasses of these; a time may be too late for Python
        raise InputError(f"{path}: expected a Parquet file: {first_line(error)}") from error


def _hub_records(path: Path):
    """Yield (number, fields) of HUB/SPLIT, read by the `datasets` library.

    Split test_data is the data set's "test", or "validation" if it has no test split, as KLUE.
    """
    spec, split = str(path.parent), path.name
    if not (found := HUB.fullmatch(spec)):
        expected = "hub:OWNER/NAME@REVISION[:CONFIG], for a validation file followed by /SPLIT"
        raise InputError(f"{spec}: expected {expected}")
    name, revision, config = found.groups()
    datasets = optional_import("datasets", "hub:")
    datasets.disable_progress_bars()
    optional_import("huggingface_hub", "hub:").utils.logging.set_verbosity_error()  # log no retry
    try:
        splits = datasets.load_dataset(name, config, revision=revision)
    except Exception as error:  # the hub, the network and the files raise many kinds
        message = f"cannot be read from the Hugging Face hub: {first_line(error)}"
        raise InputError(f"{spec}: {message}") from error
    if split == "test_data":
        split = "test" if "test" in splits else "validation"
    if split not in splits:
        raise MissingSplit(f"{spec}: splits: found {sorted(splits)}, expected {split}")
    label = splits[split].features.get("label")
    names = label.names if isinstance(label, datasets.ClassLabel) else None
    yield from enumerate(_with_names(splits[split], names), 1)


def _with_names(records, names: list[str] | None):
    """The records; with `names`, their labels by name. -1 stays, which means no label."""
    for record in records:
        if names and record.get("label") in range(len(names)):
            record["label"] = names[int(record["label"])]
        yield record
