"""Temperatures are found again, and the tables agree with a count."""

import math

import numpy as np
import pytest

from calibration import (
    THRESHOLDS,
    cross_fitted,
    expected_calibration_error,
    fit_temperature,
    reliability_table,
    temper,
    threshold_table,
)
from metrics import scale_negative


def drawn(temperature: float, n=4000, seed=0):
    """(probs, gold): gold is drawn with the probabilities, which then get 1 / temperature."""
    random = np.random.default_rng(seed)
    probs = random.dirichlet(np.full(5, 0.5), n)
    gold = (random.random((n, 1)) > probs.cumsum(1)).sum(1).clip(max=4)
    return temper(probs, 1 / temperature), gold


@pytest.mark.parametrize("temperature", [0.5, 1, 2.5])
def test_the_temperature_of_drawn_rows_is_found(temperature):
    probs, gold = drawn(temperature)
    assert fit_temperature(probs, gold) == pytest.approx(temperature, rel=0.05)


def test_a_temperature_keeps_the_order_of_the_classes_and_probabilities_of_zero():
    probs, _ = drawn(1, 50)
    np.testing.assert_allclose(temper(probs, 1), probs)
    for temperature in (0.2, 5):
        changed = temper(probs, temperature)
        np.testing.assert_array_equal(changed.argsort(1), probs.argsort(1))
        np.testing.assert_allclose(changed.sum(1), 1)
    logits = np.log(probs)
    softmax = np.exp(logits / 2) / np.exp(logits / 2).sum(1, keepdims=True)
    np.testing.assert_allclose(temper(probs, 2), softmax)
    np.testing.assert_array_equal(temper(np.eye(3), 0.2), np.eye(3))
    assert np.isfinite(temper(np.array([[1e-300, 1 - 1e-300]]), 0.2)).all()


def test_a_temperature_after_the_factor_keeps_the_share_of_the_negative_label():
    probs, _ = drawn(1, 500)
    scaled = scale_negative(probs, 2.0)
    np.testing.assert_array_equal(temper(scaled, 3).argmax(1), scaled.argmax(1))
    before = scale_negative(temper(probs, 3), 2.0)  # the other order would change labels
    assert (before.argmax(1) != scaled.argmax(1)).any()


def test_certain_rows_and_no_rows_have_a_temperature():
    assert fit_temperature(np.eye(3), np.arange(3)) > 0.19  # all right
    assert fit_temperature(np.eye(3), np.array([1, 2, 0])) < 5.01  # all wrong, with probability 0
    assert fit_temperature(np.empty((0, 3)), np.empty(0, int)) == 1
    np.testing.assert_allclose(cross_fitted(np.full((1, 4), 0.25), np.zeros(1, int)), 0.25)


def test_cross_fitting_lowers_the_error_of_overconfident_rows_without_looking_at_a_row_itself():
    probs, gold = drawn(2)
    errors = []
    for p in (probs, cross_fitted(probs, gold)):
        errors.append(expected_calibration_error(p.max(1), p.argmax(1) == gold))
    assert errors[0] > 5
    assert errors[1] < 2.5
    other = gold.copy()
    other[0] = (gold[0] + 1) % 5  # its half's own temperature does not depend on it
    assert np.array_equal(cross_fitted(probs, gold)[0], cross_fitted(probs, other)[0])


def test_reliability_and_its_error_by_hand():
    confidence, right = np.array([0.5, 0.52, 0.99, 1.0]), np.array([True, False, True, True])
    table = reliability_table(confidence, right)
    assert [(line["probability"], line["rows"]) for line in table] == [
        ("0.47 to 0.53", 2), ("0.93 to 1.00", 2),
    ]  # fmt: skip
    assert [line["accuracy"] for line in table] == [50, 100]
    assert expected_calibration_error(confidence, right) == pytest.approx((1 + 0.5) / 2)


def test_thresholds_by_hand():
    gold, predicted = np.array([1, 1, 2, 0, 0]), np.array([1, 2, 0, 2, 0])
    table = threshold_table(np.array([0.9, 0.6, 0.99, 0.55, 0.99]), predicted, gold)
    assert [line["threshold"] for line in table] == list(THRESHOLDS)
    kept = {line["threshold"]: line for line in table}
    columns = ("precision", "recall", "rows kept", "% of the rows")
    assert [kept[0][c] for c in columns] == pytest.approx([100 / 3, 100 / 3, 3, 60])
    assert [kept[0.6][c] for c in columns] == pytest.approx([50, 100 / 3, 2, 40])
    assert [kept[0.9][c] for c in columns] == pytest.approx([100, 100 / 3, 1, 20])
    assert kept[0.95]["rows kept"] == 0
    assert math.isnan(kept[0.95]["precision"])
    assert math.isnan(threshold_table(np.ones(1), np.ones(1), np.zeros(1))[0]["recall"])
