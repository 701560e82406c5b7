"""The scores against a computation of their own, from their definitions, and what is behind them."""

import itertools
import math
from collections import Counter

import numpy as np
import pytest

from data import InputError
from metrics import (
    Predictions,
    bootstrap,
    bootstrap_weights,
    compare,
    confusion_table,
    describe,
    error_table,
    gold_classes,
    group_table,
    label_table,
    mcnemar,
    score,
    score_table,
    verdict,
    weighted_scores,
    worst_mistakes,
)


def independent(probs, gold):
    """Micro F1 by counting, AUPRC by walking down each class's ranking."""
    predicted = probs.argmax(1)
    hit = sum(p == g != 0 for p, g in zip(predicted, gold))
    precision, recall = hit / max(1, (predicted != 0).sum()), hit / max(1, (gold != 0).sum())
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
        areas.append(sum((r2 - r1) * (p1 + p2) / 2 for (r1, p1), (r2, p2) in itertools.pairwise(points)))
    f1 = 2 * precision * recall / (precision + recall) if hit else 0.0
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
    expected = independent(probs, gold)
    np.testing.assert_allclose([found["micro_f1"], found["auprc"], found["accuracy"]], expected, rtol=1e-9)
    assert found["absent"] == [c for c in range(30) if c not in gold]


def test_no_relation_counts_in_the_auprc_and_not_in_the_f1():
    probs = np.array([[0.9, 0.1, 0.0], [0.9, 0.1, 0.0], [0.2, 0.8, 0.0]])
    right = score(probs, np.array([0, 0, 1]))
    assert (right["micro_f1"], right["auprc"], right["accuracy"]) == (100, 100, 100)
    missed = score(probs, np.array([0, 1, 1]))
    assert missed["micro_f1"] == pytest.approx(100 * 2 / 3)
    assert score(probs[:2], np.array([0, 0]))["micro_f1"] == 0


def test_classes_left_out_are_said():
    scores = score(np.eye(3)[[0, 1]], np.array([0, 1]))
    assert describe(scores, ["no_relation", "a", "b"]).endswith("(AUPRC without b: no such row)")


# --- what is behind the scores -----------------------------------------------------------------------------------

LABELS = ["no_relation", "a", "b", "c", "d"]


def predictions(seed, n=200, classes=5, sharpness=2.0, decimals=3):
    """(probs, gold) of a model that is right more often the larger `sharpness`."""
    random = np.random.default_rng(seed)
    gold = random.integers(0, classes, n)
    logits = random.normal(size=(n, classes))
    logits[np.arange(n), gold] += sharpness
    probs = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    return probs.round(decimals), gold


@pytest.mark.parametrize("decimals", [1, 8])  # 1: many ties
def test_weighted_scores_are_those_of_rows_as_often_as_they_weigh(decimals):
    probs, gold = predictions(0, decimals=decimals)
    gold[:3], gold[gold == 4] = 4, 3  # a rare label
    gold[:3] = 4
    weights = np.random.default_rng(1).multinomial(len(gold), np.full(len(gold), 1 / len(gold)), 20).T.astype(float)
    predicted = np.where(probs[:, 2] == probs.max(1), 2, probs.argmax(1))  # ties may be anybody's
    found = weighted_scores(probs, predicted, gold, weights)
    for i in range(20):
        rows = np.repeat(np.arange(len(gold)), weights[:, i].astype(int))
        expected = score(probs[rows], gold[rows], predicted[rows])
        for name in ("micro_f1", "auprc", "accuracy"):
            assert found[name][i] == pytest.approx(expected[name], abs=1e-9), name


def test_bootstrap_draws_all_rows_alike_and_the_same_ones_each_time():
    weights = np.concatenate(list(bootstrap_weights(50, 250)), axis=1)
    assert weights.shape == (50, 250)
    assert set(weights.sum(0)) == {50}
    assert abs(weights.mean(1) - 1).max() < 0.35
    assert 0.8 < weights.var(1).mean() < 1.2
    probs, gold = predictions(0)
    drawn = [bootstrap(probs, probs.argmax(1), gold, 10)["auprc"] for _ in range(2)]
    np.testing.assert_array_equal(*drawn)


def test_intervals_hold_what_they_say():
    """The accuracy's interval against the normal approximation; all intervals hold their score."""
    probs, gold = predictions(3, n=1000)
    table = {line["score"]: line for line in score_table(probs, probs.argmax(1), gold)}
    assert all(line["from"] < line["value"] < line["to"] for line in table.values())
    accuracy = table["accuracy"]["value"] / 100
    half = 196 * math.sqrt(accuracy * (1 - accuracy) / 1000)
    assert table["accuracy"]["to"] - table["accuracy"]["from"] == pytest.approx(2 * half, rel=0.15)


def test_tables_match_a_count():
    probs, gold = predictions(4)
    predicted = probs.argmax(1)
    pairs = Counter(zip(gold.tolist(), predicted.tolist()))
    for c, line in enumerate(label_table(predicted, gold, LABELS)):
        of_truth, found = (
            sum(n for (g, _), n in pairs.items() if g == c),
            sum(n for (_, p), n in pairs.items() if p == c),
        )
        assert (line["label"], line["rows"], line["predicted"]) == (LABELS[c], of_truth, found)
        assert line["recall"] == pytest.approx(100 * pairs[c, c] / of_truth)
        assert line["precision"] == pytest.approx(100 * pairs[c, c] / found)
    top = confusion_table(predicted, gold, LABELS, 3)
    counts = sorted((n for (g, p), n in pairs.items() if g != p), reverse=True)
    assert [line["count"] for line in top] == counts[:3]
    assert all(pairs[LABELS.index(line["true"]), LABELS.index(line["predicted"])] == line["count"] for line in top)
    errors = {line["what"]: line["rows"] for line in error_table(predicted, gold)}
    tp, fp, fn = (errors[name] for name in ("relations found (TP)", "false positives (FP)", "false negatives (FN)"))
    assert 200 * tp / (2 * tp + fp + fn) == pytest.approx(score(probs, gold)["micro_f1"])
    assert errors["a relation missed"] == sum(n for (g, p), n in pairs.items() if g and not p)


def test_groups_and_worst_mistakes():
    probs, gold = predictions(5)
    predicted, group = probs.argmax(1), np.arange(200) % 3
    table = group_table("third", ["x", "y", "z", "empty"], group, predicted, gold)
    assert [line["third"] for line in table] == ["x", "y", "z"]
    assert [line["rows"] for line in table] == [67, 67, 66]
    for i, line in enumerate(table):
        expected = score(probs[group == i], gold[group == i])
        assert line["micro F1"] == pytest.approx(expected["micro_f1"])
        assert line["accuracy"] == pytest.approx(expected["accuracy"])
        assert line["from"] < line["micro F1"] < line["to"]
    nothing = group_table("all", ["x"], np.zeros(2, int), np.zeros(2, int), np.zeros(2, int))[0]
    assert (math.isnan(nothing["micro F1"]), nothing["accuracy"]) == (True, 100)
    worst = worst_mistakes(probs, predicted, gold, 5)
    of_truth = probs[np.arange(200), gold]
    assert all(predicted[i] != gold[i] for i in worst)
    assert sorted(of_truth[predicted != gold])[:5] == of_truth[worst].tolist()


# --- is one better? ----------------------------------------------------------------------------------------------


def run(probs):
    return probs, probs.argmax(1)


def test_a_better_model_is_told_from_luck():
    probs, gold = predictions(6, n=400, sharpness=3.0)
    good, bad = run(probs), run(predictions(6, n=400, sharpness=1.0)[0])  # the same rows and noise
    table, differences = compare([bad], [good], gold, draws=200)
    assert list(differences) == ["micro_f1", "auprc", "accuracy"]
    for line in table:
        assert line["B - A"] == pytest.approx(line["B"] - line["A"])
        assert 0 < line["from"] < line["B - A"] < line["to"]
        assert line["p"] == pytest.approx(2 / 201)
        assert "B is ahead" in verdict(line)
        assert "hardly by luck" in verdict(line)
    same, _ = compare([good], [good], gold, draws=200)
    assert [(line["B - A"], line["p"], line["from"]) for line in same] == [(0, 1, 0)] * 3
    assert verdict(same[0]) == "micro F1: no difference"
    other = probs.copy()
    other[:2] = other[2:4]  # two rows differ
    line = compare([good], [run(other)], gold, draws=200)[0][2]
    assert line["p"] > 0.05
    assert "could be luck" in verdict(line)


def test_seeds_that_spread_widen_the_interval():
    runs = [run(predictions(7, n=400, sharpness=s)[0]) for s in (1.0, 2.0, 3.0)]
    gold = predictions(7, n=400)[1]
    line = compare(runs, runs[1:2], gold, draws=300)[0][2]
    accuracies = [score(probs, gold)["accuracy"] for probs, _ in runs]
    assert line["A"] == pytest.approx(np.mean(accuracies))
    assert line["A ± SD"] == pytest.approx(np.std(accuracies, ddof=1))
    assert "B ± SD" not in line
    alone = compare(runs[:1], runs[1:2], gold, draws=300)[0][2]
    assert line["to"] - line["from"] > alone["to"] - alone["from"]


def test_mcnemar_is_a_coins_throw():
    expected = 2 * sum(math.comb(10, k) for k in range(3)) / 2**10
    assert mcnemar(2, 8) == pytest.approx(expected)
    assert mcnemar(0, 0) == 1


def test_gold_labels_that_do_not_fit_are_named():
    file = Predictions("f.csv", ["0", "1"], ["a", "a"], np.eye(2), [2, 3], ["a", "b"])
    names = {0: "a", 1: "b"}
    assert gold_classes(file, names, None).tolist() == [0, 1]
    for labels, message in ((["a", "a"], "f.csv:3: label: found 'b', expected 'a'"), (None, "found 'b', expected one")):
        with pytest.raises(InputError, match=message):
            gold_classes(file, names if labels else {0: "a"}, labels)
    with pytest.raises(InputError, match="--gold"):
        gold_classes(file._replace(gold=None), names, None)
