"""Scores against an independent computation, files of predictions, scaling of no_relation."""

import itertools

import numpy as np
import pytest

from common import InputError
from data import KLUE_LABELS
from metrics import (
    Predictions,
    class_names,
    describe,
    gold_classes,
    negative_factor,
    read_predictions,
    read_summary,
    scale_negative,
    score,
    write_predictions,
)

# --- scores -----------------------------------------------------------------------------------


def independent_scores(probs, gold):
    """Micro F1 by counting, AUPRC by going through each class's thresholds, accuracy."""
    predicted = probs.argmax(1)
    hits = sum(p == g != 0 for p, g in zip(predicted, gold))
    precision, recall = hits / max(1, (predicted != 0).sum()), hits / max(1, (gold != 0).sum())
    areas = []
    for c in range(probs.shape[1]):
        positives = (gold == c).sum()
        if not positives:
            continue
        points = [(0.0, 1.0)]  # recall 0, precision 1
        for threshold in np.unique(probs[:, c])[::-1]:
            taken = probs[:, c] >= threshold
            right = (taken & (gold == c)).sum()
            points.append((right / positives, right / taken.sum()))
            if right == positives:
                break
        areas.append(
            sum((r2 - r1) * (p1 + p2) / 2 for (r1, p1), (r2, p2) in itertools.pairwise(points))
        )
    f1 = 2 * precision * recall / (precision + recall) if hits else 0.0
    return 100 * f1, 100 * np.mean(areas), 100 * (predicted == gold).mean()


@pytest.mark.parametrize("seed", range(20))
def test_scores_match_an_independent_computation(seed):
    random = np.random.default_rng(seed)
    n = int(random.integers(20, 300))
    gold = random.integers(0, 30, n)
    logits = random.normal(size=(n, 30))
    logits[np.arange(n), gold] += random.uniform(0, 4)
    probs = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    if seed % 2:
        probs = probs.round(2)  # ties
    found = score(probs, gold)
    expected = independent_scores(probs, gold)
    values = [found["micro_f1"], found["auprc"], found["accuracy"]]
    np.testing.assert_allclose(values, expected, rtol=1e-9)
    assert found["absent"] == [c for c in range(30) if c not in gold]


def test_no_relation_counts_in_the_auprc_but_not_in_the_f1():
    probs = np.array([[0.9, 0.1, 0.0], [0.9, 0.1, 0.0], [0.2, 0.8, 0.0]])
    right = score(probs, np.array([0, 0, 1]))
    assert (right["micro_f1"], right["auprc"], right["accuracy"]) == (100, 100, 100)
    missed = score(probs, np.array([0, 1, 1]))
    assert missed["micro_f1"] == pytest.approx(100 * 2 / 3)
    assert score(probs[:2], np.array([0, 0]))["micro_f1"] == 0


def test_labels_left_out_of_the_auprc_are_named():
    scores = score(np.eye(3)[[0, 1]], np.array([0, 1]))
    line = describe(scores, ["no_relation", "a", "b"])
    assert line.endswith("(AUPRC without b: no such row)")


# --- files ------------------------------------------------------------------------------------


def test_files_of_predictions_are_read_as_written(tmp_path):
    probs, labels = np.random.default_rng(0).dirichlet(np.ones(30), 3), list(KLUE_LABELS[:3])
    for gold in (None, labels):
        write_predictions(tmp_path / "out" / "a.csv", ["x", "y", "z"], labels, probs, gold)
        found = read_predictions(str(tmp_path / "out" / "a.csv"))
        assert (found.ids, found.predicted, found.gold) == (["x", "y", "z"], labels, gold)
        assert found.lines == [2, 3, 4]
        np.testing.assert_array_equal(found.probs, probs)
    assert read_summary(tmp_path) == {}


def test_class_names_are_given_or_those_of_klue_re_or_found_in_the_predictions():
    probs = np.eye(30)[[3, 0]]
    file = Predictions("f.csv", ["0", "1"], [KLUE_LABELS[3], KLUE_LABELS[0]], probs, [2, 3], None)
    assert class_names([file]) == dict(enumerate(KLUE_LABELS))
    other = file._replace(predicted=["x", "none"])
    assert class_names([other]) == {3: "x", 0: "none"}
    numbered = [f"label {c}" for c in range(30)]
    named = file._replace(predicted=["label 3", "label 0"])
    assert class_names([named], numbered) == dict(enumerate(numbered))
    with pytest.raises(
        InputError, match=r"f.csv:2: pred_label: found 'x', expected one of 30 labels"
    ):
        class_names([other], numbered)
    wrong = file._replace(predicted=["label 3", "label 1"])
    printed = []
    class_names([wrong], numbered, printed.append)
    assert printed == [
        "f.csv: the label of 1 of 2 rows is not the one with the highest probability"
    ]
    with pytest.raises(
        InputError, match=r"f.csv:2: pred_label: found 'label 0', expected 'label 3'"
    ):
        class_names([file._replace(predicted=["label 0", "label 0"])], numbered)


def test_gold_labels_that_do_not_fit_are_named():
    file = Predictions("f.csv", ["0", "1"], ["a", "b"], np.eye(2), [2, 3], ["a", "b"])
    names = {0: "a", 1: "b"}
    assert gold_classes(file, names).tolist() == [0, 1]
    told = [("g.csv:2", "a"), ("g.csv:3", "a")]
    with pytest.raises(InputError, match=r"f.csv:3: label: found 'b', expected 'a' as in g.csv:3"):
        gold_classes(file, names, told)
    told = [("g.csv:2", "a"), ("g.csv:3", "17")]
    with pytest.raises(InputError, match=r"g.csv:3: label: found '17', expected one of 2 known"):
        gold_classes(file, names, told)
    assert gold_classes(file._replace(gold=None), names, told[:1] * 2).tolist() == [0, 0]
    with pytest.raises(InputError, match=r"f.csv:3: label: found 'b', expected one"):
        gold_classes(file, {0: "a"})
    with pytest.raises(InputError, match="--gold"):
        gold_classes(file._replace(gold=None), names)


# --- share of the negative label --------------------------------------------------------------


def test_the_negative_label_gets_its_share_and_the_others_keep_their_order():
    probs = np.random.default_rng(0).dirichlet(np.ones(5), 1000)
    assert (probs.argmax(1) == 0).mean() < 0.25
    for share in (0.1, 0.6, 0.9):
        scaled = scale_negative(probs, negative_factor(probs, share))
        assert abs((scaled.argmax(1) == 0).mean() - share) < 0.002
        np.testing.assert_allclose(scaled.sum(1), 1)
        np.testing.assert_allclose(scaled[:, 1:] / scaled[:, 1:2], probs[:, 1:] / probs[:, 1:2])
    np.testing.assert_array_equal(scale_negative(probs, 1.0), probs / probs.sum(1, keepdims=True))
    certain = np.eye(5)[np.arange(10) % 5]  # the negative label has probability 0 in 8 of 10 rows
    assert np.isfinite(scale_negative(certain, negative_factor(certain, 0.9))).all()
