"""The scores against a computation of their own, from their definitions."""

import itertools

import numpy as np
import pytest

from metrics import describe, score


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
