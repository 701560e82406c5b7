"""Which rows are trained on, and which are validated on.

    chosen = choose_rows(settings, print)       # reads, cleans and splits what --data names
    chosen.train, chosen.valid, chosen.labels

A sentence is never on both sides of a split. See docs/data.md for what each split is for.
"""

import warnings
from collections import Counter
from typing import NamedTuple

import numpy as np

from common import InputError
from data import (
    KLUE_LABELS,
    find_labels,
    note_unknown_types,
    version,
    with_known_labels,
    with_label_names,
)
from rows import Row, compose, data_file, read_rows, rows_to_predict
from settings import Settings

DATA_SEED = 42  # of --limit and the splits: runs with different seeds use the same rows


class ChosenRows(NamedTuple):
    train: list[Row]
    valid: list[Row]
    scaling: list[Row]  # rows on which the scaling of the negative label is fitted
    negative_share: float  # the negative label's share in their predictions
    labels: list[str]
    version: dict  # of the training file
    read: list[Row]  # all its rows, before cleaning and splitting
    unlabelled: list[Row]  # of test_data, if the settings need them


def choose_rows(settings: Settings, log) -> ChosenRows:
    """Read, clean and split the rows as the settings say; `log` prints a line."""
    skipped = [] if settings.skip_bad_rows else None
    path = data_file(settings.data, "train")
    rows = with_label_names(read_rows(path, skipped, log), settings.label_order, skipped)
    copies = repeated_ids(rows)
    if copies:
        log(f"{path}: {len(copies)} rows repeat the id of an earlier row: for training only")
    file_version = version(settings.data, rows)
    labels = find_labels(rows, compose(settings.negative_label))
    rows = with_known_labels(rows, labels, skipped)
    if not rows:
        raise InputError(f"{path}: all {len(skipped)} rows are bad; the first: {skipped[0]}")
    log(f"{path}: {len(rows)} rows, {len(labels)} labels")
    note_unknown_types(rows, labels, log)
    in_file = rows
    if settings.clean:
        rows, removed = clean(rows, labels[0])
        log(f"cleaning removed {len(removed)} duplicate or contradictory rows")
    share = settings.no_relation_share
    if share is None:
        own = sum(row.label == labels[0] for row in rows) / len(rows)
        share = 0.6 if labels == KLUE_LABELS else own
    test_like = settings.test_like()
    needed = test_like or settings.soft_labels
    unlabelled = rows_to_predict(settings.data, skipped, log) if needed else []
    like = unlabelled if test_like else []
    if settings.valid == "none":
        valid = []
    elif settings.valid:
        valid = read_rows(settings.valid, skipped, log, unique_ids=True)
        valid = with_label_names(valid, settings.label_order, skipped)
        valid = with_known_labels(valid, labels, skipped)
        held_out, n_rows = {row.sentence for row in valid}, len(rows)
        ids = {row.id for row in in_file if row.sentence in held_out}
        rows = [row for row in rows if row.id not in ids]
        if len(rows) < n_rows:
            found = f"left out {n_rows - len(rows)} training rows"
            log(
                f"{found}: their sentences are in {settings.valid}, or they are copies of such rows"
            )
    else:
        first = [row for row in rows if row.where not in copies]
        if settings.folds:
            _, valid = fold(first, settings.folds, settings.fold, DATA_SEED)
        elif test_like:
            _, valid = split(first, labels, 0.11, DATA_SEED, share, like)
        else:
            _, valid = split(first, labels, 0.2, DATA_SEED)
        rows, n_copies = without_valid(rows, valid, copies, pairs=test_like)
        if n_copies:
            log(f"left out {n_copies} rows that repeat a validation row's id, sentence or entities")
    rows = subsample(rows, settings.limit or len(rows))
    if skipped:
        log(f"bad rows left out: {len(skipped)}, the first: {skipped[0]}")
    if not rows or (not valid and settings.valid != "none"):
        found = f"{len(rows)} training rows and {len(valid)} validation rows"
        raise InputError(f"{path}: {found}, expected some of each")
    scaling = (like or valid) if test_like else []
    if test_like and not scaling:
        found = f"found no test_data and no validation rows to scale {labels[0]} on"
        if settings.no_relation_share is not None:
            raise InputError(f"--no-relation-share: {found}")
        log(f"{found}: its probability is not scaled")
    return ChosenRows(rows, valid, scaling, share, labels, file_version, in_file, unlabelled)


def repeated_ids(rows: list[Row]) -> set[str]:
    """The places (Row.where) of rows with the id of an earlier row: augmented copies of it."""
    first = {}
    return {row.where for row in rows if first.setdefault(row.id, row) is not row}


def without_valid(rows: list[Row], valid: list[Row], copies: set[str], pairs: bool):
    """(training rows, number of copies left out): neither the rows `valid`, nor copies that have
    the id, the sentence or, if `pairs`, both words of one of them."""

    def keys(row):
        words = {("words", row.subject.word, row.object.word)} if pairs else set()
        return {("id", row.id), ("sentence", row.sentence)} | words

    held_out, of_valid = {row.where for row in valid}, set().union(*map(keys, valid))
    rest = [row for row in rows if row.where not in held_out]
    train = [row for row in rest if row.where not in copies or keys(row).isdisjoint(of_valid)]
    return train, len(rest) - len(train)


def subsample(items: list, n: int) -> list:
    """At most n items, the same ones each time, in their order."""
    return [items[i] for i in sorted(np.random.default_rng(DATA_SEED).permutation(len(items))[:n])]


def clean(rows: list[Row], negative: str = "no_relation") -> tuple[list[Row], list[Row]]:
    """(rows without duplicates and contradictions, rows removed).

    Of identical rows the first is kept. Of rows that differ only in the label, the row with a
    relation is kept; of two different relations the later one. The authors of the wrap-up report
    decided the same by hand.
    """
    distinct, kept = {}, {}
    for row in rows:
        distinct.setdefault((row.sentence, row.subject, row.object, row.label), row)
    for (*key, label), row in distinct.items():
        if label != negative or tuple(key) not in kept:
            kept[tuple(key)] = row
    which = {id(row) for row in kept.values()}  # objects, since the ids of rows may repeat
    removed = [row for row in rows if id(row) not in which]
    return [row for row in rows if id(row) in which], removed


def fold(rows: list[Row], folds: int, number: int, seed: int) -> tuple[list[Row], list[Row]]:
    """(train, valid) for fold `number` (from 0) of `folds`, stratified by label.

    The folds partition the rows; all rows of a sentence are in the same fold.
    """
    from sklearn.model_selection import StratifiedGroupKFold  # takes a second to import

    splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
    labels, sentences = [row.label for row in rows], [row.sentence for row in rows]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # some labels of KLUE-RE have fewer rows than folds
            train, valid = list(splitter.split(labels, labels, sentences))[number]
    except ValueError as error:
        found = f"{len(rows)} rows with {len(set(sentences))} sentences are too few"
        raise InputError(f"--folds {folds}: {found}") from error
    return [rows[i] for i in train], [rows[i] for i in valid]


def split(
    rows: list[Row], labels: list[str], share: float, seed: int, negative_share=None, like=()
):
    """(train, valid): valid has about `share` of the rows, whole sentences, stratified by label.

    With `negative_share`, valid resembles KLUE-RE's test set, as far as the rows allow: the
    negative label, labels[0], has that share; entity types and sources are distributed as in the
    rows `like`; and no pair of subject and object is on both sides. In KLUE-RE 3 % of the test
    rows have a pair of the training rows, but 61 % of the training rows share theirs with another.
    """
    negative = np.array([row.label == labels[0] for row in rows])
    strata, wanted = [_stratum(row) for row in rows], Counter(map(_stratum, like))
    if negative_share is None or wanted.keys().isdisjoint(strata):
        strata, wanted = [None] * len(rows), Counter([None])
    weights, parent = np.full(len(rows), 1 / max(len(rows), 1)), {}
    if negative_share is not None:
        if share * negative_share * len(rows) > negative.sum() / 2:
            found = f"takes over half of the {negative.sum()} {labels[0]} rows"
            hint = "use --split stratified"
            raise InputError(f"--no-relation-share {negative_share} {found}; {hint}")
        weights = _raked_weights(strata, wanted, negative, negative_share)
        for row in rows:  # rows that share a sentence or a pair of entities form one group
            parent[_root(parent, row.sentence)] = _root(parent, (row.subject.word, row.object.word))

    # How many rows of each label, and of each stratum, valid has room for.
    expected = (share * len(rows) * weights).clip(max=0.5)  # at most half of any kind of row
    keys_of = [(row.label, (row.label == labels[0], s)) for row, s in zip(rows, strata)]
    room, groups = Counter(), {}
    for i, keys in enumerate(keys_of):
        groups.setdefault(_root(parent, rows[i].sentence), []).append(i)
        for key in keys:
            room[key] += expected[i]
    room = {key: round(n) for key, n in room.items()}

    # Take groups in random order while there is room for all their rows.
    groups, chosen = list(groups.values()), set()
    order = np.random.default_rng(seed).permutation(len(groups))
    if negative_share is not None:  # small groups first, since test rows share little
        order = sorted(order, key=lambda i: len(groups[i]))
    for i in order:
        need = Counter(key for row in groups[i] for key in keys_of[row])
        if all(room[key] >= n for key, n in need.items()):
            chosen.update(groups[i])
            for key, n in need.items():
                room[key] -= n
    if not chosen or len(chosen) == len(rows):
        raise InputError(f"{len(rows)} rows are too few to split; use --valid FILE")
    return [row for i, row in enumerate(rows) if i not in chosen], [rows[i] for i in sorted(chosen)]


def _root(parent: dict, node):
    """The root of the union-find tree that contains `node`."""
    while parent.get(node, node) != node:
        node = parent[node]
    return node


def _stratum(row: Row) -> tuple:
    return row.subject.type, row.object.type, row.source


def _raked_weights(strata: list, wanted: Counter, negative: np.ndarray, negative_share: float):
    """Row weights (N,) with sum 1 and two given marginals (iterative proportional fitting).

    Under the weights, strata are distributed as in `wanted`, and negative rows have their share.
    """
    number = {stratum: i for i, stratum in enumerate(wanted)}
    stratum_of = np.array([number.get(stratum, len(number)) for stratum in strata])
    marginals = [
        (stratum_of, np.array([*wanted.values(), 0.0])),
        (negative.astype(int), np.array([1 - negative_share, negative_share])),
    ]
    weights = np.ones(len(strata))
    for _ in range(100):
        for which, target in marginals:
            found = np.bincount(which, weights, len(target))
            weights *= np.divide(target, found, out=np.zeros_like(target), where=found > 0)[which]
    return weights / weights.sum()
