"""Scatter of heavy-tailed rows: fixed points, equivariance, planted factors, and the map to unit scale built on it."""

import math

import numpy as np
import pytest
from scipy import stats
from sklearn.covariance import ledoit_wolf
from sklearn.decomposition import FactorAnalysis

from finediff.panel import RobustStandardizer, Standardizer
from finediff.panel.scatter import _moving_rows, factor_analysis, robust_scatter, squared_distances, tyler

D = 4


def covariance(d=D, seed=0):
    root = np.random.default_rng(seed).normal(size=(d, d))
    return root @ root.T / d + 0.3 * np.eye(d)


def t_rows(n, scatter, dof=3, seed=0):
    rng = np.random.default_rng(seed)
    gaussian = rng.normal(size=(n, len(scatter))) @ np.linalg.cholesky(scatter).T
    return gaussian / np.sqrt(rng.chisquare(dof, (n, 1)) / dof)


def factor_market(n, d, k=2, dof=4, seed=0):
    """Rows of unit scale with k factors, one volatility a day and the planted scatter."""
    rng = np.random.default_rng(100 + d)
    L = rng.normal(size=(d, k)) * 0.4 + np.eye(1, k) * 0.7
    scatter = L @ L.T + np.diag(rng.uniform(0.3, 0.8, d))
    size = np.sqrt(np.diag(scatter))
    return t_rows(n, scatter / np.outer(size, size), dof, seed), scatter / np.outer(size, size)


def of_trace(S):
    return S * len(S) / np.trace(S)


# ---------------------------------------------------------------------------------------------- Tyler


@pytest.mark.parametrize("shrinkage", [0.0, 0.1, 0.6])
def test_the_fixed_point_is_reached(shrinkage):
    X = t_rows(200, covariance(), seed=1)
    S = tyler(X, shrinkage, iterations=500, tolerance=1e-13)
    q = np.array([x @ np.linalg.inv(S) @ x for x in X])  # written out
    new = sum(D / len(X) * np.outer(x, x) / qi for x, qi in zip(X, q))
    np.testing.assert_allclose(S, of_trace((1 - shrinkage) * new + shrinkage * np.eye(D)), atol=1e-10)
    assert np.trace(S) == pytest.approx(D, rel=1e-12)
    np.testing.assert_allclose(squared_distances(X, S), q, rtol=1e-10)


def test_at_no_shrinkage_it_follows_every_linear_map():
    X, A = t_rows(200, covariance(), seed=1), np.random.default_rng(2).normal(size=(D, D))
    exact = {"iterations": 1000, "tolerance": 1e-13}
    S = tyler(X, 0.0, **exact)
    np.testing.assert_allclose(tyler(X @ A.T, 0.0, **exact), of_trace(A @ S @ A.T), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("shrinkage", [None, 0.0, 0.3])
def test_only_the_directions_of_the_rows_count(shrinkage):
    X = t_rows(200, covariance(), seed=1)
    sizes = np.exp(3 * np.random.default_rng(2).normal(size=(200, 1)))
    np.testing.assert_allclose(tyler(X * sizes, shrinkage), tyler(X, shrinkage), rtol=1e-8, atol=1e-10)
    with_zeros = np.insert(X, 5, 0.0, axis=0)
    np.testing.assert_allclose(tyler(with_zeros, shrinkage), tyler(X, shrinkage), rtol=1e-12)


def test_it_turns_with_the_axes():
    X = t_rows(150, covariance(), seed=1)
    turn = np.linalg.qr(np.random.default_rng(3).normal(size=(D, D)))[0]
    np.testing.assert_allclose(tyler(X @ turn), turn.T @ tyler(X) @ turn, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("dof", [1, 3, 50])
def test_it_finds_the_scatter_of_a_multivariate_t_within_its_standard_error(dof):
    """Of the entries: asymptotically (1 + 2/d)/n of the Gaussian's doubled variance (Tyler 1987), whatever the tails."""
    n, scatter = 20_000, of_trace(covariance())
    S = tyler(t_rows(n, scatter, dof, seed=4), 0.0)
    spread = np.sqrt((1 + 2 / D) / n * (np.outer(np.diag(scatter), np.diag(scatter)) + scatter**2))
    assert (np.abs(S - scatter) < 4 * spread).all()
    assert (np.abs(S - scatter) / spread).mean() > 0.1


def test_full_shrinkage_is_the_identity():
    np.testing.assert_allclose(tyler(t_rows(50, covariance()), 1.0), np.eye(D), rtol=0, atol=1e-15)


@pytest.mark.parametrize(("n", "shrinkage"), [(50, -0.1), (50, 1.1), (3, 0.0), (4, 0.0), (50, math.nan)])
def test_bad_shrinkages_are_one_sentence(n, shrinkage):
    with pytest.raises(ValueError, match=r"expected a shrinkage in .*, got .*: None chooses one") as caught:
        tyler(t_rows(n, covariance()), shrinkage)
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------------------------- factor analysis


def test_exact_factors_are_recovered():
    rng = np.random.default_rng(0)
    L, D_ = rng.normal(size=(12, 2)), rng.uniform(0.3, 1.5, 12)
    found, variances = factor_analysis(L @ L.T + np.diag(D_), 2, iterations=5000, tolerance=1e-13)
    np.testing.assert_allclose(found @ found.T, L @ L.T, atol=1e-8)
    np.testing.assert_allclose(variances, D_, atol=1e-8)


def test_a_diagonal_has_no_factors():
    variances = np.array([0.5, 1.0, 2.0, 3.0])
    L, D_ = factor_analysis(np.diag(variances), 1)
    np.testing.assert_allclose(L, 0, atol=1e-7)
    np.testing.assert_allclose(D_, variances, rtol=1e-12)


def log_likelihood(C, S):
    return -0.5 * (np.linalg.slogdet(S)[1] + np.trace(np.linalg.solve(S, C)))


@pytest.mark.parametrize("k", [1, 2])
def test_it_is_as_likely_as_scikit_learns(k):
    X = factor_market(400, 12, seed=1)[0]
    X = X - X.mean(0)
    C = X.T @ X / len(X)
    theirs = FactorAnalysis(k, tol=1e-5, max_iter=5000, svd_method="lapack").fit(X)
    best = log_likelihood(C, theirs.get_covariance())
    L, D_ = factor_analysis(C, k, iterations=1000, tolerance=1e-8)
    assert log_likelihood(C, L @ L.T + np.diag(D_)) > best - 1e-6
    L, D_ = factor_analysis(C, k)  # the default stops early
    assert log_likelihood(C, L @ L.T + np.diag(D_)) > best - 1e-3


def test_factors_follow_units_and_the_order_of_the_assets():
    C, units, order = covariance(9, 1), np.geomspace(1e-3, 1e3, 9), np.random.default_rng(0).permutation(9)
    L, D_ = factor_analysis(C, 2)
    L_scaled, D_scaled = factor_analysis(C * np.outer(units, units), 2)
    np.testing.assert_allclose(L_scaled @ L_scaled.T, L @ L.T * np.outer(units, units), rtol=1e-7)
    np.testing.assert_allclose(D_scaled, D_ * units**2, rtol=1e-8)
    L_turned, D_turned = factor_analysis(C[np.ix_(order, order)], 2)
    np.testing.assert_allclose(L_turned @ L_turned.T, (L @ L.T)[np.ix_(order, order)], rtol=1e-8, atol=1e-10)
    np.testing.assert_allclose(D_turned, D_[order], rtol=1e-8)


# ------------------------------------------------------------------------------------- robust scatter


@pytest.mark.parametrize("d", [2, 9, 20])
def test_the_order_of_the_assets_does_not_matter(d):
    X, order = factor_market(200, d)[0], np.random.default_rng(1).permutation(d)
    np.testing.assert_allclose(
        robust_scatter(X[:, order]), robust_scatter(X)[np.ix_(order, order)], rtol=1e-6, atol=1e-8
    )


def test_small_panels_get_tylers():
    for X in (factor_market(200, 2)[0], factor_market(15, 9)[0]):
        np.testing.assert_array_equal(robust_scatter(X), tyler(X))


@pytest.mark.parametrize(("n", "d"), [(250, 20), (400, 40), (60, 60)])
def test_it_beats_ledoit_and_wolfs_and_tylers_on_fresh_rows(n, d):
    """Likelihood of fresh rows under a t law, and of their directions alone, of several planted markets."""
    gains = []
    for seed in range(5):
        X, scatter = factor_market(n, d, seed=seed)
        fresh = factor_market(2000, d, seed=100 + seed)[0]
        candidates = [robust_scatter(X), tyler(X), ledoit_wolf(X, assume_centered=True)[0], scatter]
        gains.append([directional(fresh, S) for S in candidates])
    robust, plain, ledoit, truth = np.transpose(gains)
    print(
        f"\nbelow the truth: robust {(truth - robust).mean():.3f}, Tyler {(truth - plain).mean():.3f}", end=""
    )
    print(f", Ledoit-Wolf {(truth - ledoit).mean():.3f} nats a row")
    assert (robust > plain).all()
    assert (robust > ledoit).all()
    assert (robust < truth).all()


def directional(X, S):
    """Mean log likelihood of the rows' directions: it does not ask for the size of S (angular Gaussian)."""
    return -0.5 * np.linalg.slogdet(S)[1] - len(S) / 2 * np.log(squared_distances(X, S)).mean()


def test_on_gaussian_rows_it_is_no_worse_than_ledoit_and_wolfs():
    X, _ = factor_market(250, 20, dof=1e9, seed=3)
    S, ledoit = robust_scatter(X), ledoit_wolf(X, assume_centered=True)[0]
    assert directional(factor_market(4000, 20, dof=1e9, seed=4)[0], S) > directional(
        factor_market(4000, 20, dof=1e9, seed=4)[0], ledoit
    )


@pytest.mark.parametrize(("n", "d"), [(30, 50), (50, 50), (2, 7), (1, 3)])
def test_fewer_rows_than_assets_give_a_positive_scatter(n, d):
    """... nearer to the truth's directions than no scatter at all."""
    X, _ = factor_market(n, d, seed=2)
    S = robust_scatter(X)
    assert np.linalg.eigvalsh(S)[0] > 0
    np.testing.assert_allclose(S, S.T, atol=1e-12)
    if n > 10:
        fresh = factor_market(1000, d, seed=9)[0]
        assert directional(fresh, S) > directional(fresh, np.eye(d)) + 0.5


def test_rows_of_zeros_say_nothing():
    X = factor_market(100, 9)[0]
    np.testing.assert_array_equal(_moving_rows(np.vstack([X, np.zeros((3, 9))])), X)
    np.testing.assert_array_equal(robust_scatter(np.vstack([X, np.zeros((3, 9))])), robust_scatter(X))


# -------------------------------------------------------------------------------------- unit scale


def panel(n=300, d=9, seed=0):
    return 0.01 * factor_market(n, d, seed=seed)[0] * np.geomspace(0.3, 3, d) + 0.0004


@pytest.mark.parametrize("shape", [(300, 9), (30, 50), (2, 3), (40, 1)])
def test_the_round_trip_is_exact(shape):
    X = panel(*shape)
    scaler = RobustStandardizer().fit(X)
    np.testing.assert_allclose(scaler.inverse_transform(scaler.transform(X)), X, rtol=1e-9, atol=1e-14)
    again = Standardizer.from_dict(scaler.to_dict())
    np.testing.assert_array_equal(again.transform(X), scaler.transform(X))
    assert scaler.log_abs_det() == again.log_abs_det()


def test_z_has_the_mean_log_square_of_a_normal():
    X = panel()
    Z = RobustStandardizer().fit(X).transform(X)
    assert np.log(Z**2).mean() == pytest.approx(-1.2704, abs=1e-4)
    assert -np.euler_gamma - math.log(2) == pytest.approx(-1.2704, abs=1e-4)  # digamma(1/2) + log 2


def test_of_normal_rows_it_is_the_ordinary_map():
    X = np.random.default_rng(0).multivariate_normal(np.zeros(3), covariance(3), 40_000)
    Z = RobustStandardizer().fit(X).transform(X)
    spread = np.sqrt((1 + np.eye(3)) / len(X))
    assert (np.abs(Z.T @ Z / len(X) - np.eye(3)) < 5 * spread).all()


def test_units_do_not_matter():
    X, units = panel(), np.geomspace(1e-3, 1e3, 9)
    one, other = (RobustStandardizer().fit(Y) for Y in (X, X * units + 7 * units))
    np.testing.assert_allclose(other.transform(X * units + 7 * units), one.transform(X), rtol=1e-6, atol=1e-7)
    exact = RobustStandardizer().fit(X * 2.0 ** np.arange(9))
    np.testing.assert_array_equal(exact.transform(X * 2.0 ** np.arange(9)), one.transform(X))


def test_the_order_of_the_assets_permutes_z():
    X, order = panel(), np.random.default_rng(1).permutation(9)
    one, other = (RobustStandardizer().fit(Y) for Y in (X, X[:, order]))
    np.testing.assert_allclose(other.transform(X[:, order]), one.transform(X)[:, order], rtol=1e-6, atol=1e-7)


def test_constant_assets_take_no_part():
    X = panel()
    with_cash = np.insert(X, 4, 0.1, axis=1)
    alone, scaler = RobustStandardizer().fit(X), RobustStandardizer().fit(with_cash)
    Z, others = scaler.transform(with_cash), np.arange(10) != 4
    assert not Z[:, 4].any()
    np.testing.assert_array_equal(Z[:, others], alone.transform(X))
    np.testing.assert_allclose(scaler.inverse_transform(Z)[:, 4], 0.1, rtol=0, atol=0)
    np.testing.assert_array_equal(scaler.axes_[4], [0.0] * 4 + [1.0] + [0.0] * 5)
    np.testing.assert_array_equal(scaler.axes_[0, others], alone.axes_[0])


def test_one_crash_changes_little():
    X = panel()
    crashed = X.copy()
    crashed[50] = -0.5
    one, other = RobustStandardizer().fit(X), RobustStandardizer().fit(crashed)
    np.testing.assert_allclose(other.scale_, one.scale_, rtol=0.1)
    sample = Standardizer(whiten=True).fit(crashed).scale_ / Standardizer(whiten=True).fit(X).scale_
    assert sample.max() > 1.5


def test_the_markets_axis_is_first():
    """Of a market with one strong factor: its loadings, in whitened coordinates; the axes are orthonormal."""
    rng = np.random.default_rng(0)
    loadings = np.linspace(0.6, 0.9, 9)
    correlation = np.outer(loadings, loadings) + np.diag(1 - loadings**2)
    X = 0.01 * t_rows(2000, correlation, 4, seed=1)
    scaler = RobustStandardizer().fit(X)
    market = np.linalg.eigh(correlation)[1][:, -1]
    assert abs(scaler.axes_[0] @ market) > 0.995
    np.testing.assert_allclose(scaler.axes_ @ scaler.axes_.T, np.eye(9), atol=1e-10)
    Z = scaler.transform(X)
    equal = X @ rng.uniform(0.9, 1.1, 9)
    assert abs(stats.pearsonr(Z @ scaler.axes_[0], equal).statistic) > 0.95
    # Along its axes the map is diagonal: values of C fall from the first to the last.
    values = np.einsum("ij,jk,ik->i", scaler.axes_, scaler.unwhitening_ @ scaler.unwhitening_, scaler.axes_)
    assert (np.diff(values) <= 1e-12).all()


@pytest.mark.parametrize(
    ("X", "fragment"),
    [
        (np.zeros(5), "expected an array (n, d)"),
        (np.zeros((1, 3)), "n >= 2 rows"),
        (np.array([[0.1, np.nan], [0.2, 0.3]]), "expected finite returns, got nan in row 0, column 1"),
    ],
)
def test_bad_panels_are_one_sentence(X, fragment):
    with pytest.raises(ValueError, match="expected") as caught:
        RobustStandardizer().fit(X)
    assert fragment in str(caught.value)
    assert "\n" not in str(caught.value)
