"""Training targets: edited labels (--drop, --relabel) and soft targets (--soft-labels).

    rows = edited(settings, chosen, print)                      # --drop, --relabel
    rows, targets = with_targets(settings, chosen, rows, print)  # --soft-labels

A row is named by its id, which stands for its augmented copies too. Validation rows stay as they
are: scores with and without an edit are comparable.
"""

import numpy as np

from common import InputError, expect, read_csv
from metrics import Predictions, class_names, read_predictions
from rows import Row, compose, data_file
from settings import Settings
from splits import ChosenRows

# --- rows to drop and to relabel --------------------------------------------------------------


def edited(settings: Settings, chosen: ChosenRows, log) -> list[Row]:
    """The training rows without those of --drop, and with the labels of --relabel.

    InputError for ids that the training file lacks, and for labels that are not its labels.
    """
    rows = chosen.train
    if settings.drop:
        listed = read_edits(settings.drop, chosen)
        rows = [row for row in rows if row.id not in listed]
        if not rows:
            raise InputError(f"{settings.drop}: it has all training rows, expected some of them")
        log(f"{settings.drop}: dropped {len(chosen.train) - len(rows)} training rows")
        note_others(settings.drop, listed, chosen.train, log)
    if settings.relabel:
        listed, before = read_edits(settings.relabel, chosen, with_label=True), rows
        rows = [row._replace(label=listed.get(row.id, row.label)) for row in rows]
        changed = sum(old.label != new.label for old, new in zip(before, rows))
        log(f"{settings.relabel}: changed the label of {changed} training rows")
        note_others(settings.relabel, listed, before, log)
    return rows


def read_edits(path: str, chosen: ChosenRows, with_label: bool = False) -> dict[str, str]:
    """{id: new label} of a CSV file id,new_label; without `with_label`, the ids are enough.

    If it has a column label, those must be the labels of the training file: so the edits of another
    file are an error.
    """
    label_of, new = {row.id: row.label for row in reversed(chosen.read)}, {}
    for line, cells in read_csv(path, ("id", "new_label") if with_label else ("id",)):
        where, row_id = f"{path}:{line}", cells["id"]
        expect(row_id in label_of, where, "id", row_id, "an id of the training file")
        expect(row_id not in new, where, "id", row_id, "each id once")
        label = compose(cells.get("label", label_of[row_id]).strip())
        expected = f"{label_of[row_id]!r} as in the training file"
        expect(label == label_of[row_id], where, "label", label, expected)
        new[row_id] = compose(cells.get("new_label", "").strip())
        if with_label:
            expected = f"one of {len(chosen.labels)} labels such as {', '.join(chosen.labels[:2])}"
            expect(new[row_id] in chosen.labels, where, "new_label", new[row_id], expected)
    if not new:
        raise InputError(f"{path}: no rows")
    return new


def note_others(path: str, listed, train: list[Row], log):
    """Say how many of the `listed` ids have no training row."""
    if others := len(set(listed) - {row.id for row in train}):
        why = "validation rows, or left out by --clean, --limit or --drop"
        log(f"{path}: {others} of its {len(listed)} rows are not trained on ({why})")


# --- soft targets -----------------------------------------------------------------------------


def with_targets(settings: Settings, chosen: ChosenRows, rows: list[Row], log):
    """(rows, targets (N, n_labels)), or (rows, None) without --soft-labels.

    The target of a training row with probabilities is a mixture of them and its label. Rows of
    test_data that have some follow the training rows: their targets sum to --soft-weight. Of files
    that have the same row, the mean is taken. InputError for ids that are nowhere, and for
    probabilities of other labels.
    """
    if not settings.soft_labels:
        return rows, None
    train, labels, mix = data_file(settings.data, "train"), chosen.labels, settings.soft_mix
    read = {str(train): chosen.read, "test_data": chosen.unlabelled}
    ids_of = {place: {row.id for row in its_rows} for place, its_rows in read.items()}
    found = {place: {} for place in read}  # {place: {id: [probs (C,)]}}
    for path in settings.soft_labels:
        file = read_probabilities(path, labels, str(train), log)
        place = place_of(file, ids_of)
        if place == str(train):
            check_labels(file, chosen.read, log)
        for row_id, probs in zip(file.ids, file.probs):
            found[place].setdefault(row_id, []).append(probs / probs.sum())
    held_out = {row.sentence for row in chosen.valid}
    more = [row for row in chosen.unlabelled if row.id in found["test_data"]]
    extra = [row._replace(label=None) for row in more if row.sentence not in held_out]
    targets = np.zeros((len(rows) + len(extra), len(labels)), dtype=np.float32)
    soft, n_soft = found[str(train)], 0
    for target, row in zip(targets, rows):
        target[labels.index(row.label)] = 1
        if row.id in soft:
            target[:] = mix * np.mean(soft[row.id], 0) + (1 - mix) * target
            n_soft += 1
    for target, row in zip(targets[len(rows) :], extra):
        target[:] = settings.soft_weight * np.mean(found["test_data"][row.id], 0)
    log(f"soft targets: {n_soft} of {len(rows)} training rows, and {len(extra)} rows of test_data")
    if len(extra) < len(more):
        n = len(more) - len(extra)
        log(f"left out {n} rows of test_data whose sentences are validation sentences")
    note_others("--soft-labels", soft, rows, log)
    return rows + extra, targets


def read_probabilities(path: str, labels: list[str], place: str, log) -> Predictions:
    """A file of predictions for these labels, which are those of `place`; others raise.

    `log` is told of predicted labels that are not the most probable ones.
    """
    file = read_predictions(path)
    n_classes, expected = file.probs.shape[1], f"the {len(labels)} labels of {place}"
    expect(n_classes == len(labels), path, "probabilities per row", n_classes, expected)
    class_names([file], labels, lambda text: log(f"{text}; the probabilities are used"))
    return file


def place_of(file: Predictions, ids_of: dict[str, set[str]]) -> str:
    """Which of the places the rows of a file are from, by their ids.

    Ids of two files may be the same numbers. Then a file that has all ids of one place is of it.
    """
    train, *_ = ids_of
    ids = set(file.ids)
    places = [train] if file.gold else list(ids_of)  # only training rows have a label
    fitting = [place for place in places if ids <= ids_of[place]]
    whole = [place for place in fitting if ids == ids_of[place]]
    for found in (fitting, whole):
        if len(found) == 1:
            return found[0]
    if fitting:
        found = f"its {len(ids)} ids are ids of {' and of '.join(fitting)}"
        raise InputError(
            f"{file.path}: {found}, expected all ids of one of them, or a column label"
        )
    nearest = max(places, key=lambda place: len(ids & ids_of[place]))
    for line, row_id in zip(file.lines, file.ids):
        expected = f"an id of {' or '.join(places)}, all of one file"
        expect(row_id in ids_of[nearest], f"{file.path}:{line}", "id", row_id, expected)


def check_labels(file: Predictions, rows: list[Row], log):
    """Compare a file with the training rows that have its ids; other labels raise InputError.

    Ids do not prove that it is of these rows. If it has no labels, `log` is told how many of its
    predictions are right.
    """
    first = {row.id: row for row in reversed(rows)}  # the others with an id are copies
    for line, row_id, label in zip(file.lines, file.ids, file.gold or []):
        row = first[row_id]
        expected = f"{row.label!r} as in {row.where}"
        expect(label == row.label, f"{file.path}:{line}", "label", label, expected)
    if not file.gold:
        n = sum(first[row_id].label == label for row_id, label in zip(file.ids, file.predicted))
        log(f"{file.path}: {n} of its {len(file.ids)} predictions are the training rows' labels")
