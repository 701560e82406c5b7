"""Cleaning, splits and folds, and the rows that the settings choose."""

import json
import re
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from common import InputError
from data import KLUE_LABELS, LABEL_ORDERS
from pretrain import PretrainingSettings, choose_sentences
from rows import read_rows
from settings import Settings
from splits import DATA_SEED, choose_rows, clean, fold, split, subsample
from tests.helpers import SAMPLE, row, write_rows

# --- cleaning ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("labels", "kept"),
    [
        (["per:title", "per:title"], "0"),  # the first of identical rows
        (["no_relation", "per:title"], "1"),  # a relation rather than none
        (["per:title", "no_relation"], "0"),
        (["per:title", "per:spouse"], "1"),  # the later of two relations
        (["per:title", "per:title", "per:spouse", "no_relation"], "2"),
    ],
)
def test_which_of_contradictory_rows_cleaning_keeps(labels, kept):
    sentence = "김은 이를 만났다"
    repeated = [row(sentence, "김", "이", label, id=str(i)) for i, label in enumerate(labels)]
    rows, removed = clean(repeated)
    assert [r.id for r in rows] == [kept]
    assert len(removed) == len(labels) - 1
    swapped = row(sentence, "이", "김", id="9")
    assert [r.id for r in clean([*repeated, swapped])[0]] == [kept, "9"]


def test_cleaning_keeps_rows_that_share_an_id_with_a_removed_one():
    rows = [row(text, "김", "이", id="7") for text in ("김은 이를 만났다", "김과 이", "김과 이")]
    assert clean(rows) == (rows[:2], rows[2:])
    assert clean(rows)[0][1] is rows[1]


# --- splits and folds -------------------------------------------------------------------------


def swapped(rows):
    """The rows with subject and object swapped: more rows of the same sentences."""
    return [r._replace(id=f"x{r.id}", subject=r.object, object=r.subject) for r in rows]


def share_of_negatives(rows):
    return np.mean([r.label == "no_relation" for r in rows])


@pytest.mark.parametrize(("share", "negative_share"), [(0.2, None), (0.1, 0.6)])
def test_a_split_is_by_sentence_and_has_the_wanted_labels(rows, share, negative_share):
    repeated = rows + swapped(rows[:400])
    train, valid = split(repeated, KLUE_LABELS, share, 1, negative_share)
    assert sorted(r.id for r in train + valid) == sorted(r.id for r in repeated)
    assert not {r.sentence for r in train} & {r.sentence for r in valid}
    assert abs(len(valid) / len(repeated) - share) < 0.03
    wanted = negative_share or share_of_negatives(repeated)
    assert abs(share_of_negatives(valid) - wanted) < 0.04
    assert split(repeated, KLUE_LABELS, share, 1, negative_share)[1] == valid
    assert split(repeated, KLUE_LABELS, share, 2, negative_share)[1] != valid


def made_up(n, seed=0):
    """Rows with correlated types, sources and labels. A third has a pair that other rows have."""
    random, out = np.random.default_rng(seed), []
    for i in range(n):
        kind = ("LOC", "DAT", "POH")[random.choice(3, p=(0.5, 0.4, 0.1))]
        label = "no_relation" if random.random() < 0.3 else "per:title"
        pair = i if random.random() < 0.67 else i % 40
        subject, obj = f"s{pair}", f"o{pair}"
        sentence, types = f"{subject} 및 {obj} {i}", ("PER", kind)
        made = row(sentence, subject, obj, label, id=str(i), types=types)
        in_wikitree = random.random() < (0.5 if kind == "POH" else 0.2)
        out.append(made._replace(source="wikitree" if in_wikitree else "wikipedia"))
    return out


def test_a_test_like_split_has_the_types_and_sources_of_the_test_set_and_shares_no_pair():
    rows = made_up(6000)
    like = [
        r
        for r in made_up(3000, seed=1)
        if (r.object.type, r.source) == ("POH", "wikitree") or int(r.id) % 4 == 0
    ]
    train, valid = split(rows, KLUE_LABELS, 0.1, 1, 0.6, like)
    pairs, in_train = ({(r.subject.word, r.object.word) for r in part} for part in (valid, train))
    assert not pairs & in_train
    assert 480 < len(valid) <= 600
    assert abs(share_of_negatives(valid) - 0.6) < 0.05
    for value in (lambda r: r.object.type, lambda r: r.source):
        plain, found, wanted = (Counter(map(value, part)) for part in (rows, valid, like))
        for name in wanted:
            assert abs(found[name] / len(valid) - wanted[name] / len(like)) < 0.03
        differences = [plain[name] / len(rows) - wanted[name] / len(like) for name in wanted]
        assert max(map(abs, differences)) > 0.03
    # some or all strata of the test set are not in the training rows; every row has its own source
    other = [r._replace(source="elsewhere") for r in like[:100]]
    own = [r._replace(source=r.id) for r in rows]
    for training, test in ((rows, like + other), (rows, other), (own, like), (own, ())):
        assert len(split(training, KLUE_LABELS, 0.1, 1, 0.6, test)[1]) > 480


def test_a_stratified_split_does_not_avoid_sentences_with_several_rows(rows):
    sentences = [r for r in rows if not r.id.endswith("7")]
    doubled = sentences + swapped(sentences[:600])
    with_several = {r.sentence for r in sentences[:600]}
    _, valid = split(doubled, KLUE_LABELS, 0.2, 1)
    found, wanted = (np.mean([r.sentence in with_several for r in x]) for x in (valid, doubled))
    assert abs(found - wanted) < 0.15


def test_a_split_that_would_take_most_rows_of_a_label_is_an_error(rows):
    negatives = [r for r in rows if r.label == "no_relation"]
    few = [r for r in rows if r.label != "no_relation"] + negatives[:20]
    with pytest.raises(InputError, match=r"--no-relation-share 0\.6 takes over half of the 20"):
        split(few, KLUE_LABELS, 0.1, 1, 0.6)
    with pytest.raises(InputError, match="2 rows are too few to split"):
        split(rows[:2], KLUE_LABELS, 0.2, 1)


def test_folds_partition_the_rows_by_sentence_and_are_stratified(rows):
    rows = rows[:600] + swapped(rows[:100])
    folds = [fold(rows, 5, k, seed=42) for k in range(5)]
    held_out = [row.id for _, valid in folds for row in valid]
    assert sorted(held_out) == sorted(row.id for row in rows)
    share = {label: n / len(rows) for label, n in Counter(r.label for r in rows).items()}
    for train, valid in folds:
        assert not {r.sentence for r in train} & {r.sentence for r in valid}
        assert sorted(r.id for r in train + valid) == sorted(r.id for r in rows)
        found = Counter(r.label for r in valid)
        assert all(abs(found[label] / len(valid) - p) < 0.02 for label, p in share.items())
    assert fold(rows, 5, 2, seed=42) == folds[2]
    with pytest.raises(InputError, match="--folds 5: 3 rows"):
        fold(rows[:3], 5, 0, seed=42)


def test_a_subsample_keeps_the_order_and_contains_the_smaller_ones():
    items = list(range(100))
    few, more = subsample(items, 10), subsample(items, 30)
    assert (len(few), len(more)) == (10, 30)
    assert set(few) < set(more)
    assert few == sorted(few)
    assert subsample(items, 200) == items


# --- the rows of a run ------------------------------------------------------------------------


def test_no_sentence_of_a_validation_file_is_trained_on(tmp_path, capsys):
    lines = (SAMPLE / "train.csv").read_text(encoding="utf-8").splitlines(keepends=True)
    (tmp_path / "valid.csv").write_text("".join(lines[:40]), encoding="utf-8")
    settings = Settings(data=str(SAMPLE), valid=str(tmp_path / "valid.csv"))
    chosen = choose_rows(settings, print)
    assert (len(chosen.valid), chosen.negative_share) == (39, 0.6)
    assert {r.sentence for r in chosen.train}.isdisjoint(r.sentence for r in chosen.valid)
    printed = capsys.readouterr().out
    message = r"left out (39|[4-9]\d) training rows: their sentences are in .*valid.csv, or they"
    assert re.search(message, printed)
    with pytest.raises(InputError, match="0 training rows and"):
        choose_rows(replace(settings, valid=str(SAMPLE / "train.csv")), print)


def augmented(rows):
    """Each row, then a paraphrase of it with the same id."""
    for r in rows:
        yield r
        yield r._replace(sentence=f"{r.sentence} 한편 그렇다.")


@pytest.mark.parametrize("options", [{}, {"split": "stratified"}, {"folds": 5, "fold": 1}])
def test_copies_of_a_row_have_its_id_and_are_never_beside_it_in_validation(tmp_path, rows, options):
    write_rows(tmp_path / "train.csv", augmented(rows))
    messages = []
    chosen = choose_rows(Settings(data=str(tmp_path), **options), messages.append)
    text = "\n".join(messages)
    assert f"train.csv: {len(rows)} rows repeat the id of an earlier row: for training" in text
    valid_ids = [r.id for r in chosen.valid]
    assert len(set(valid_ids)) == len(valid_ids) > 100
    assert not any(r.sentence.endswith("한편 그렇다.") for r in chosen.valid)
    assert not set(valid_ids) & {r.id for r in chosen.train}
    copies = [r for r in chosen.train if r.sentence.endswith("한편 그렇다.")]
    left_out = int(re.search(r"left out (\d+) rows that repeat a validation row", text)[1])
    assert len(copies) + left_out <= len(rows)
    assert len(copies) > 0.6 * len(rows)
    if options == {}:
        pairs = [{(r.subject.word, r.object.word) for r in x} for x in (chosen.train, chosen.valid)]
        assert not pairs[0] & pairs[1]
    everything = choose_rows(Settings(data=str(tmp_path), valid="none", clean=False), print)
    assert len(everything.train) == 2 * len(rows)
    write_rows(tmp_path / "dev.csv", rows[:50])
    chosen = choose_rows(Settings(data=str(tmp_path), valid=str(tmp_path / "dev.csv")), print)
    assert not {r.id for r in chosen.train} & {r.id for r in rows[:50]}
    assert len(chosen.train) > 1.8 * len(rows)


def test_a_scaling_without_rows_to_fit_it_on_is_named(tmp_path, rows):
    write_rows(tmp_path / "train.csv", rows)
    messages = []
    settings = Settings(data=str(tmp_path), valid="none")
    assert not choose_rows(settings, messages.append).scaling
    found = "found no test_data and no validation rows to scale no_relation on"
    assert f"{found}: its probability is not scaled" in messages
    with pytest.raises(InputError, match=f"--no-relation-share: {found}"):
        choose_rows(replace(settings, no_relation_share=0.6), print)
    choose_rows(replace(settings, split="stratified"), messages.append)
    assert sum(found in text for text in messages) == 1


def test_a_fold_is_taken_from_the_cleaned_rows():
    chosen = choose_rows(Settings(data=str(SAMPLE), folds=5, fold=3), print)
    cleaned, _ = clean(read_rows(SAMPLE / "train.csv"))
    assert (chosen.train, chosen.valid) == fold(cleaned, 5, 3, DATA_SEED)
    assert chosen.scaling == []


@pytest.mark.parametrize(
    ("choose", "kind"), [(choose_rows, Settings), (choose_sentences, PretrainingSettings)]
)
def test_bad_rows_are_an_error_unless_they_are_skipped(tmp_path, choose, kind):
    lines = (SAMPLE / "train.csv").read_text(encoding="utf-8").splitlines(keepends=True)
    content = "".join([*lines, "bad,a,b,c,no_relation,\n"])
    (tmp_path / "train.csv").write_text(content, encoding="utf-8")
    settings, messages = kind(data=str(tmp_path)), []
    with pytest.raises(InputError, match=rf"train.csv:{len(lines) + 1}: "):
        choose(settings, messages.append)
    choose(replace(settings, skip_bad_rows=True), messages.append)
    assert any(text.startswith("bad rows left out: 1, the first: ") for text in messages)


def test_class_numbers_in_training_and_validation_files_get_their_names(tmp_path, rows):
    some = {"train": rows[:300], "valid": rows[300:400]}
    for name, part in some.items():
        written = [r._replace(label=LABEL_ORDERS["klue"].index(r.label)) for r in part]
        write_rows(tmp_path / f"{name}.csv", written)
    settings = Settings(data=str(tmp_path), valid=str(tmp_path / "valid.csv"), label_order="klue")
    chosen = choose_rows(settings, print)
    assert [r.label for r in chosen.valid] == [r.label for r in some["valid"]]
    assert [r.label for r in chosen.train] == [r.label for r in some["train"]]
    with pytest.raises(
        InputError, match=r"train.csv:2: label: found 24, a class number, .*--label"
    ):
        choose_rows(replace(settings, label_order=""), print)


def test_if_all_training_rows_are_bad_the_message_says_why(tmp_path, rows):
    write_rows(tmp_path / "train.csv", [r._replace(label="") for r in rows[:9]])
    with pytest.raises(InputError, match=r"train.csv: all 9 rows are bad; the first: .*csv:2: lab"):
        choose_rows(Settings(data=str(tmp_path), skip_bad_rows=True), print)


def test_the_share_of_negatives_is_given_or_that_of_the_file_or_of_klue_re(tmp_path, rows):
    names = {"no_relation": "none", "per:title": "직함"}
    own = [
        {
            "guid": r.id,
            "sentence": r.sentence,
            "subject_entity": dict(zip(("word", "start_idx", "end_idx"), r.subject)),
            "object_entity": dict(zip(("word", "start_idx", "end_idx"), r.object)),
            "label": names[r.label],
        }
        for r in rows
        if r.label in names
    ]
    for name in ("train", "test_data"):
        lines = "\n".join(json.dumps(r) for r in own)
        (tmp_path / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    settings = Settings(data=str(tmp_path), negative_label="none")
    chosen = choose_rows(settings, print)
    found = [r.label == "none" for r in chosen.train + chosen.valid]
    assert chosen.negative_share == pytest.approx(np.mean(found))
    assert chosen.labels == ["none", "직함"]
    assert len(chosen.scaling) == len(own)
    sample = Settings(data=str(SAMPLE))
    assert choose_rows(sample, print).negative_share == 0.6
    assert choose_rows(replace(sample, no_relation_share=0.4), print).negative_share == 0.4


def test_a_limit_leaves_the_validation_rows_unchanged():
    settings = Settings(data=str(SAMPLE))
    whole, limited = choose_rows(settings, print), choose_rows(replace(settings, limit=50), print)
    assert len(limited.train) == 50
    assert {r.id for r in limited.train} < {r.id for r in whole.train}
    assert limited.valid == whole.valid
    everything = choose_rows(replace(settings, valid="none"), print)
    assert (len(everything.train), everything.valid) == (len(whole.train + whole.valid), [])
