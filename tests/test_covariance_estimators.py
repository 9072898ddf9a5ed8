"""The cleaners as estimators, and those that need the rows: constant correlation, Student t."""

import numpy as np
import pandas as pd
import pytest
from sklearn.base import clone
from sklearn.covariance import EmpiricalCovariance
from threadpoolctl import threadpool_limits

from finediff.covariance import (
    AnalyticalShrinkage,
    BlockCovariance,
    ClippedCovariance,
    ConstantCorrelationShrinkage,
    FactorAnalyticCovariance,
    QuadraticInverseShrinkage,
    RotationallyInvariantCovariance,
    StudentTCovariance,
    WindowEnsembleCovariance,
    analytical_shrinkage,
    block_correlation,
    clip,
    correlation_from_covariance,
    factor_analytic,
    quadratic_inverse_shrinkage,
    rie,
)

THIN = [
    (ClippedCovariance(), clip, {}),
    (ClippedCovariance(edge="fitted", level=0.05), clip, {"edge": "fitted", "level": 0.05}),
    (QuadraticInverseShrinkage(), quadratic_inverse_shrinkage, {}),
    (QuadraticInverseShrinkage(standardise=False), quadratic_inverse_shrinkage, {"standardise": False}),
    (AnalyticalShrinkage(), analytical_shrinkage, {}),
    (RotationallyInvariantCovariance(), rie, {}),
    (FactorAnalyticCovariance(k=2), factor_analytic, {"k": 2}),
    (BlockCovariance(), block_correlation, {}),
    (BlockCovariance(blocks=list("aabbbb")), block_correlation, {"blocks": list("aabbbb")}),
]
ALL = [estimator for estimator, _, _ in THIN]
ALL += [ConstantCorrelationShrinkage(), StudentTCovariance(), WindowEnsembleCovariance()]
each = pytest.mark.parametrize("estimator", ALL, ids=repr)


@pytest.fixture(autouse=True)
def one_thread():
    """Threads cost more than they save on matrices of this size."""
    with threadpool_limits(1):
        yield


@pytest.fixture
def frame():
    rng = np.random.default_rng(2)
    rows = 0.5 * rng.standard_normal((90, 1)) + rng.standard_normal((90, 6)) + 0.1
    return pd.DataFrame(rows * np.geomspace(0.005, 0.05, 6), columns=list("fedcba"))


@pytest.mark.parametrize(("estimator", "function", "options"), THIN, ids=[repr(row[0]) for row in THIN])
def test_thin_estimators_are_their_functions(frame, estimator, function, options):
    fitted = clone(estimator).fit(frame)
    np.testing.assert_allclose(fitted.covariance_, function(frame.cov(), 90, **options), rtol=1e-9)
    np.testing.assert_allclose(fitted.location_, frame.mean(), rtol=1e-12)
    centred = clone(estimator).set_params(assume_centered=True).fit(frame)
    second_moments = frame.T @ frame / 90
    np.testing.assert_allclose(centred.covariance_, function(second_moments, 91, **options), rtol=1e-9)
    np.testing.assert_array_equal(centred.location_, 0)


@each
def test_estimators_are_scikit_learn_s(frame, estimator):
    fitted = clone(estimator).fit(frame)
    assert list(fitted.feature_names_in_) == list(frame.columns)
    assert fitted.n_features_in_ == 6
    np.testing.assert_allclose(fitted.get_precision() @ fitted.covariance_, np.eye(6), atol=1e-8)
    plain = EmpiricalCovariance(assume_centered=fitted.assume_centered).fit(frame)
    plain.covariance_ = fitted.covariance_
    plain.precision_ = np.linalg.inv(fitted.covariance_)
    assert fitted.score(frame) == pytest.approx(plain.score(frame))
    bare = clone(estimator).fit(frame.to_numpy())
    np.testing.assert_array_equal(bare.covariance_, fitted.covariance_)
    assert not hasattr(bare, "feature_names_in_")


@each
def test_estimators_follow_order_and_currency(frame, estimator):
    if getattr(estimator, "blocks", None) is not None:
        pytest.skip("labels are by position")
    out = clone(estimator).fit(frame).covariance_
    order = [3, 0, 5, 1, 4, 2]
    turned = clone(estimator).fit(frame.iloc[:, order] * 100).covariance_
    np.testing.assert_allclose(turned / 1e4, out[np.ix_(order, order)], rtol=1e-5, atol=1e-10)


@each
def test_bad_rows_are_refused(frame, estimator):
    with pytest.raises(ValueError, match="minimum of 3"):
        clone(estimator).fit(frame.iloc[:2])
    hole = frame.copy()
    hole.iloc[7, 2] = np.nan
    with pytest.raises(ValueError, match="got NaN in X at row 7, column 'd'"):
        clone(estimator).fit(hole)
    still = frame.copy()
    still["d"] = 0.01
    with pytest.raises(ValueError, match="drop it"):
        clone(estimator).fit(still)


# ------------------------------------------------------------------ constant correlation


def naive_constant_correlation(rows):
    """Ledoit and Wolf (2004), appendix B, sums written out; S divided by n."""
    n, d = rows.shape
    y = rows - rows.mean(axis=0)
    s = [[sum(y[t, i] * y[t, j] for t in range(n)) / n for j in range(d)] for i in range(d)]
    pairs = [(i, j) for i in range(d) for j in range(i + 1, d)]
    r_bar = sum(s[i][j] / (s[i][i] * s[j][j]) ** 0.5 for i, j in pairs) / len(pairs)
    f = [[s[i][i] if i == j else r_bar * (s[i][i] * s[j][j]) ** 0.5 for j in range(d)] for i in range(d)]
    pi = rho = gamma = 0.0
    for i in range(d):
        for j in range(d):
            p_ij = sum((y[t, i] * y[t, j] - s[i][j]) ** 2 for t in range(n)) / n
            pi += p_ij
            gamma += (f[i][j] - s[i][j]) ** 2
            if i == j:
                rho += p_ij
                continue
            theta = [
                sum((y[t, k] ** 2 - s[k][k]) * (y[t, i] * y[t, j] - s[i][j]) for t in range(n)) / n
                for k in (i, j)
            ]
            rho += r_bar / 2 * ((s[j][j] / s[i][i]) ** 0.5 * theta[0] + (s[i][i] / s[j][j]) ** 0.5 * theta[1])
    a = max(0.0, min(1.0, (pi - rho) / gamma / n))
    return a, a * np.array(f) + (1 - a) * np.array(s)


@pytest.mark.parametrize("n", [90, 20, 4])
def test_constant_correlation_equals_its_published_twin(frame, n):
    rows = frame.to_numpy()[:n]
    fitted = ConstantCorrelationShrinkage().fit(rows)
    shrinkage, covariance = naive_constant_correlation(rows)
    assert fitted.shrinkage_ == pytest.approx(shrinkage, rel=1e-9)
    np.testing.assert_allclose(fitted.covariance_, covariance * n / (n - 1), rtol=1e-9)


def test_constant_correlation_shrinks_fully_where_it_is_true_and_little_where_not():
    rng = np.random.default_rng(0)
    common = [rng.standard_normal((100, 1)) + rng.standard_normal((100, 40)) for _ in range(10)]
    assert np.mean([ConstantCorrelationShrinkage().fit(rows).shrinkage_ for rows in common]) > 0.9
    two = [np.repeat(rng.standard_normal((2000, 2)), 20, axis=1) + rng.standard_normal((2000, 40))]
    assert ConstantCorrelationShrinkage().fit(two[0]).shrinkage_ < 0.02


# ------------------------------------------------------------------ Student t


def student_rows(rng, n, truth, dof):
    z = rng.standard_normal((n, len(truth))) @ np.linalg.cholesky(truth).T
    return z * np.sqrt((dof - 2) / rng.chisquare(dof, (n, 1)))


def test_student_solves_its_equations():
    """With the density of a t given, the estimate is a fixed point of the published steps, written out."""
    rng = np.random.default_rng(0)
    truth = 0.4 + 0.6 * np.eye(5)
    rows = student_rows(rng, 200, truth, 4.0)
    fitted = StudentTCovariance(dof=4.0, tol=1e-12, max_iter=2000).fit(rows)
    sd = rows.std(axis=0, ddof=1)
    Z = (rows - rows.mean(axis=0)) / sd
    mean, V = np.zeros(5), np.eye(5)
    for _ in range(400):
        q = [(z - mean) @ np.linalg.inv(V) @ (z - mean) for z in Z]
        w = np.array([(4 + 5) / (4 + value) for value in q])
        mean = sum(wi * z for wi, z in zip(w, Z)) / w.sum()
        scatter = sum(wi * np.outer(z - mean, z - mean) for wi, z in zip(w, Z)) / len(Z)
        V = quadratic_inverse_shrinkage(scatter, 200)
    expected = correlation_from_covariance(V) * np.outer(sd, sd)
    np.testing.assert_allclose(fitted.covariance_, expected, rtol=1e-6)
    np.testing.assert_allclose(np.diag(fitted.covariance_), rows.var(axis=0, ddof=1), rtol=1e-9)


def test_student_finds_the_degrees_of_freedom():
    rng = np.random.default_rng(1)
    truth = 0.3 + 0.7 * np.eye(10)
    found = [StudentTCovariance().fit(student_rows(rng, 2000, truth, 5.0)).dof_ for _ in range(8)]
    assert np.mean(found) == pytest.approx(5.0, abs=4 * np.std(found, ddof=1) / np.sqrt(8) + 0.1)


def test_student_on_gaussian_rows_is_nonlinear_shrinkage():
    rng = np.random.default_rng(2)
    rows = rng.standard_normal((500, 10)) + rng.standard_normal((500, 1))
    student, plain = StudentTCovariance().fit(rows), QuadraticInverseShrinkage().fit(rows)
    assert student.dof_ > 40
    gap = np.linalg.norm(student.covariance_ - plain.covariance_) / np.linalg.norm(plain.covariance_)
    assert gap < 0.02


def test_student_is_better_where_days_are_wild():
    """Correlations of rows with 3 degrees of freedom, paired over panels."""
    rng = np.random.default_rng(3)
    d = 20
    truth = 0.4 + 0.6 * np.eye(d)
    gains = []
    for _ in range(20):
        rows = student_rows(rng, 120, truth, 3.0)
        errors = [
            np.linalg.norm(correlation_from_covariance(e.fit(rows).covariance_) - truth)
            for e in (QuadraticInverseShrinkage(), StudentTCovariance())
        ]
        gains.append(errors[0] - errors[1])
    assert np.mean(gains) > 3 * np.std(gains, ddof=1) / np.sqrt(len(gains))


@pytest.mark.parametrize("dof", [0, -1.0, np.inf, np.nan])
def test_impossible_degrees_of_freedom_are_refused(frame, dof):
    with pytest.raises(ValueError, match="expected a finite dof above 0"):
        StudentTCovariance(dof=dof).fit(frame)


@pytest.mark.parametrize("estimator", [ConstantCorrelationShrinkage(), StudentTCovariance()], ids=repr)
def test_minimum_variance_never_explodes(estimator):
    """Realised over attainable variance at n = d, n < d and n = d +- 1."""
    d = 30
    for n in (12, 28, 29, 30, 31, 32, 45):
        rng = np.random.default_rng(n)
        truth = (0.4 + 0.6 * np.eye(d)) * np.outer(*[rng.uniform(0.5, 2, d)] * 2)
        rows = rng.standard_normal((n, d)) @ np.linalg.cholesky(truth).T
        weights = np.linalg.solve(clone(estimator).fit(rows).covariance_, np.ones(d))
        ratio = weights @ truth @ weights / weights.sum() ** 2 * np.linalg.solve(truth, np.ones(d)).sum()
        assert ratio < 3


MANY = [estimator for estimator in ALL if estimator._closed_form]


def test_which_are_closed_forms():
    """Those that back-tests compute for many windows at once: an accidental loss of one costs time only."""
    assert {type(e).__name__ for e in MANY} == {
        "ClippedCovariance",
        "QuadraticInverseShrinkage",
        "AnalyticalShrinkage",
        "RotationallyInvariantCovariance",
        "ConstantCorrelationShrinkage",
        "WindowEnsembleCovariance",
    }


@pytest.mark.parametrize("estimator", [*MANY, StudentTCovariance()], ids=str)
@pytest.mark.parametrize("shape", [(9, 60, 5), (4, 5, 6), (3, 6, 6), (2, 200, 1), (20, 9, 8)])
def test_many_panels_have_the_bits_of_one_by_one(estimator, shape):
    rng = np.random.default_rng(1)
    panels = rng.standard_normal(shape) + rng.standard_normal((*shape[:2], 1))
    locations, covariances = clone(estimator).fit_many(panels)
    for panel, location, covariance in zip(panels, locations, covariances, strict=True):
        fitted = clone(estimator).fit(panel)
        np.testing.assert_array_equal(covariance, fitted.covariance_)
        np.testing.assert_array_equal(location, fitted.location_)


@pytest.mark.parametrize("wrong", [np.zeros((5, 4)), np.full((2, 9, 3), np.nan), np.zeros((2, 2, 3))])
def test_what_is_no_stack_of_panels_is_refused(wrong):
    with pytest.raises(ValueError, match="panels"):
        QuadraticInverseShrinkage().fit_many(wrong)
