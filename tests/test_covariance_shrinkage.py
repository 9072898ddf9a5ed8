"""Nonlinear shrinkage, factors, blocks: published formulas by loops, known truths, every ratio of rows to assets."""

import cmath
import math

import numpy as np
import pandas as pd
import pytest
from threadpoolctl import threadpool_limits

from finediff.covariance import (
    analytical_shrinkage,
    block_correlation,
    clip,
    correlation_from_covariance,
    factor_analytic,
    fitted_edge,
    matched_diagonal_shrinkage,
    n_factors,
    noise_edge,
    quadratic_inverse_shrinkage,
    rie,
)
from finediff.covariance.spectrum import analytical, quadratic_inverse, rotationally_invariant, shrink

NONLINEAR = [quadratic_inverse_shrinkage, analytical_shrinkage, rie]
CLEANERS = [*NONLINEAR, clip, factor_analytic, block_correlation]
FORMULAS = [quadratic_inverse, analytical, rotationally_invariant]


@pytest.fixture(autouse=True)
def one_thread():
    """Threads cost more than they save on matrices of this size."""
    with threadpool_limits(1):
        yield


@pytest.fixture
def rng():
    return np.random.default_rng(5)


def panel(rng, n, d):
    """One market factor, volatilities spread over a factor of ten."""
    rows = rng.standard_normal((n, 1)) + rng.standard_normal((n, d)) * rng.uniform(0.7, 2, d)
    return rows * np.geomspace(0.003, 0.03, d)


# ------------------------------------------------------------------ published formulas, by loops


def naive_qis(values, n):
    """Ledoit and Wolf (2022), section 4: the Stein shrinker of the inverse eigenvalues, its conjugate, its amplitude."""
    p = len(values)
    c = p / n
    h = min(c * c, 1 / c / c) ** 0.35 / p**0.35
    mu = [1 / v for v in values[max(0, p - n) :]]
    out = []
    for x in mu:
        theta = sum(y * (y - x) / ((y - x) ** 2 + h * h * y * y) for y in mu) / len(mu)
        eta = sum(y * h * y / ((y - x) ** 2 + h * h * y * y) for y in mu) / len(mu)
        amplitude = theta**2 + eta**2
        if p <= n:
            out.append(1 / ((1 - c) ** 2 * x + 2 * c * (1 - c) * x * theta + c * c * x * amplitude))
        else:
            out.append(1 / (x * amplitude))
    null = [1 / ((c - 1) * (sum(mu) / len(mu)))] * (p - len(mu)) if p > n else []
    return null + out


def naive_analytical(values, n):
    """Ledoit and Wolf (2020), section 4.7, equations for f-tilde and its Hilbert transform."""
    p = len(values)
    c, h = p / n, n ** (-1 / 3)
    top = values[max(0, p - n) :]
    out = []
    for x in top:
        f = hilbert = 0.0
        for y in top:
            u = (x - y) / (h * y)
            f += 3 / (4 * math.sqrt(5)) * max(0.0, 1 - u * u / 5) / (h * y) / len(top)
            part = -3 * u / (10 * math.pi)
            if abs(u) != math.sqrt(5):
                log = math.log(abs((math.sqrt(5) - u) / (math.sqrt(5) + u)))
                part += 3 / (4 * math.sqrt(5) * math.pi) * (1 - u * u / 5) * log
            hilbert += part / (h * y) / len(top)
        if p <= n:
            out.append(x / ((math.pi * c * x * f) ** 2 + (1 - c - math.pi * c * x * hilbert) ** 2))
        else:
            out.append(1 / (math.pi**2 * x * (f**2 + hilbert**2)))
    if p <= n:
        return out
    log = math.log((1 + math.sqrt(5) * h) / abs(1 - math.sqrt(5) * h))
    mean = sum(1 / x for x in top) / len(top)
    at_zero = (3 / (10 * h * h) + 3 / (4 * math.sqrt(5) * h) * (1 - 1 / (5 * h * h)) * log) * mean / math.pi
    return [1 / (math.pi * (p - n) / n * at_zero)] * (p - n) + out


def naive_rie(values, n):
    """Bun, Bouchaud and Potters (2017), section 8.1 with the inverse-Wishart Gamma, for n > p and mean eigenvalue 1."""
    p, q = len(values), len(values) / n
    least = values[0]
    kappa = 2 * least / ((1 - q - least) ** 2 - 4 * q * least)
    spread = math.sqrt((2 * kappa + 1) * (2 * q * kappa + 1))
    lower, upper = ((1 + q) * kappa + 1 - spread) / kappa, ((1 + q) * kappa + 1 + spread) / kappa
    out = []
    for k, x in enumerate(values):
        z = x - 1j / math.sqrt(p)
        s = sum(1 / (z - y) for j, y in enumerate(values) if j != k) / p
        xi = x / abs(1 - q + q * z * s) ** 2
        g = z * (1 + kappa) - kappa * (1 - q) - kappa * cmath.sqrt(z - lower) * cmath.sqrt(z - upper)
        g /= z * (z + 2 * q * kappa)
        truth = 1 + (x - 1) / (1 + 2 * q * kappa)
        gamma = abs(1 - q + q * z * g) ** 2 / (x / truth)
        out.append(xi * gamma if gamma > 1 else xi)
    return out


@pytest.mark.parametrize(
    ("formula", "naive", "sizes"),
    [
        (quadratic_inverse, naive_qis, [(60, 12), (30, 12), (9, 12), (4, 12), (40, 1)]),
        (analytical, naive_analytical, [(60, 12), (30, 12), (9, 12), (13, 20)]),
        (rotationally_invariant, naive_rie, [(60, 12), (30, 12)]),
    ],
)
def test_formulas_equal_their_published_twins(rng, formula, naive, sizes):
    for n, d in sizes:
        values = np.linalg.eigvalsh(np.cov(panel(rng, n + 1, d), rowvar=False).reshape(d, d))
        values = np.maximum(values, 0) / values.mean()
        np.testing.assert_allclose(formula(values, n), naive(list(values), n), rtol=1e-8)


def test_functions_apply_the_formulas(rng):
    """Trace kept on the covariance; on the correlation variances are kept and the rest follows."""
    twins = zip(NONLINEAR, (naive_qis, naive_analytical, naive_rie))
    for function, naive in twins:
        S = np.cov(panel(rng, 61, 12), rowvar=False)
        values, U = np.linalg.eigh(S)
        delta = np.array(naive(list(values / values.mean()), 60))
        delta *= values.sum() / delta.sum()
        np.testing.assert_allclose(
            function(S, 61, standardise=False), (U * delta) @ U.T, rtol=1e-6, atol=1e-12
        )
        sd = np.sqrt(np.diag(S))
        values, U = np.linalg.eigh(S / np.outer(sd, sd))
        C = (U * naive(list(values), 60)) @ U.T
        unit = sd / np.sqrt(np.diag(C))
        np.testing.assert_allclose(function(S, 61), C * np.outer(unit, unit), rtol=1e-6, atol=1e-12)


# ------------------------------------------------------------------ known truths


@pytest.mark.parametrize(
    ("formula", "bandwidth"), [(quadratic_inverse, 0.076), (analytical, 0.0), (rotationally_invariant, 0.1)]
)
def test_spikes_shrink_to_the_variance_of_their_eigenvectors(formula, bandwidth):
    """Spikes of 10 and 5 over a bulk of 1: delta against u' Sigma u, paired.

    QIS and RIE look at the spectrum through a kernel of relative width h = c^0.7 d^-0.35 and d^-1/2, which blurs a
    spike by no more than that; the analytical kernel ends, and its spikes are exact.
    """
    d, n, panels = 100, 400, 50
    truth = np.ones(d)
    truth[:2] = 10, 5
    rng = np.random.default_rng(3)
    error, raw = [], []
    for _ in range(panels):
        values, U = np.linalg.eigh(np.cov(rng.standard_normal((n + 1, d)) * np.sqrt(truth), rowvar=False))
        oracle = truth @ U[:, -2:] ** 2
        error.append(shrink(formula, values, n)[-2:] / oracle - 1)
        raw.append(values[-2:] / oracle - 1)
    error, raw = np.array(error), np.array(raw)
    standard_error = error.std(axis=0, ddof=1) / np.sqrt(panels)
    assert (np.abs(error.mean(axis=0)) < bandwidth + 3 * standard_error).all()
    assert np.abs(error.mean(axis=0))[0] < raw.mean(axis=0)[0] - 3 * standard_error[0]


@pytest.mark.parametrize("formula", FORMULAS)
@pytest.mark.parametrize(("n", "d"), [(200, 100), (100, 100), (50, 100)])
def test_shrinkage_nearly_reaches_the_oracle(formula, n, d):
    """Loss to the truth, as a share of the way from the sample to the best rotationally invariant estimate."""
    truth = np.repeat([1.0, 3.0, 10.0], [d - 2 * (2 * d // 5), 2 * d // 5, 2 * d // 5])
    sample = shrunk = oracle = 0.0
    rng = np.random.default_rng(0)
    for _ in range(5):
        values, U = np.linalg.eigh(np.cov(rng.standard_normal((n + 1, d)) * np.sqrt(truth), rowvar=False))
        values = np.maximum(values, 0)
        best = truth @ U**2
        rest = (truth**2).sum() - (best**2).sum()
        sample += ((values - best) ** 2).sum() + rest
        shrunk += ((shrink(formula, values, n) - best) ** 2).sum() + rest
        oracle += rest
    # RIE was not made for fewer rows than assets and leaves a sixth of the way
    least = 0.93 if formula is not rotationally_invariant or n > d else 0.8
    assert (sample - shrunk) / (sample - oracle) > least


def test_rie_finds_the_linear_shrinkage_of_an_inverse_wishart():
    """There the truth is linear, 1 + (lambda - 1)/(1 + 2 q kappa); Gamma mends the smallest eigenvalues."""
    d, n, rows = 200, 400, 400
    rng = np.random.default_rng(1)
    kappa = (1 - d / rows) / (2 * d / rows)
    W = rng.standard_normal((rows, d))
    truth = (1 - d / rows) * np.linalg.inv(W.T @ W / rows)
    X = rng.standard_normal((n, d)) @ np.linalg.cholesky(truth).T
    values = np.linalg.eigvalsh(X.T @ X / n)
    linear = 1 + (values - 1) / (1 + 2 * d / n * kappa)
    ratio = rotationally_invariant(values, n) / linear
    assert abs(ratio[:20].mean() - 1) < 0.05
    assert abs(ratio.mean() - 1) < 0.05
    z = values - 1j / np.sqrt(d)
    apart = z[:, None] - values
    np.fill_diagonal(apart, np.inf)
    bare = values / np.abs(1 - d / n + d / n * z * (1 / apart).mean(axis=1)) ** 2
    assert (bare / linear)[:20].mean() < 0.9


@pytest.mark.parametrize("function", NONLINEAR)
def test_noise_has_no_structure(function):
    """Independent assets: the shrunk correlation is much nearer to the identity than the sample's."""
    for n, d in ((200, 40), (41, 40), (25, 40)):
        S = np.cov(np.random.default_rng(n).standard_normal((n, d)) * np.geomspace(0.01, 1, d), rowvar=False)
        off = ~np.eye(d, dtype=bool)
        before, after = (np.square(correlation_from_covariance(M)[off]).mean() for M in (S, function(S, n)))
        assert after < 0.3 * before


def test_blocks_are_found_and_averaged():
    d, size, n = 30, 6, 150
    labels = np.arange(d) // size
    C = np.where(labels[:, None] == labels, 0.5, 0.0) + 0.5 * np.eye(d)
    for seed in range(10):
        rng = np.random.default_rng(seed)
        order = rng.permutation(d)
        truth = C[np.ix_(order, order)] * 1e-4
        S = np.cov(rng.standard_normal((n, d)) @ np.linalg.cholesky(truth).T, rowvar=False)
        found = block_correlation(S, n)
        np.testing.assert_allclose(
            found, block_correlation(S, n, blocks=labels[order]), rtol=1e-9, atol=1e-15
        )
        corr, raw = correlation_from_covariance(found), correlation_from_covariance(S)
        inside = (labels[order] == 2)[:, None] & (labels[order] == 2) & ~np.eye(d, dtype=bool)
        assert corr[inside].min() == pytest.approx(corr[inside].max())
        assert corr[inside][0] == pytest.approx(raw[inside].mean())
        across = (labels[order] == 2)[:, None] & (labels[order] == 4)
        assert corr[across].max() == pytest.approx(raw[across].mean())


def test_one_block_is_found_in_a_market_of_one_correlation():
    rows = np.random.default_rng(0).standard_normal((400, 13)) + np.random.default_rng(1).standard_normal(
        (400, 1)
    )
    out = correlation_from_covariance(block_correlation(np.cov(rows, rowvar=False), 400))
    off = out[~np.eye(13, dtype=bool)]
    assert np.ptp(off) < 1e-12
    assert off[0] == pytest.approx(0.5, abs=4 * 0.5 / np.sqrt(400))


def test_factor_analysis_finds_loadings_and_residuals(rng):
    """At the truth itself it stays; from rows the residual variances come within sampling error."""
    d, k, n = 24, 2, 4000
    L = rng.standard_normal((d, k)) * 0.6
    truth = L @ L.T + np.diag(rng.uniform(0.3, 1.0, d))
    np.testing.assert_allclose(factor_analytic(truth, n, k=k, tol=1e-12), truth, atol=1e-5)
    S = np.cov(rng.standard_normal((n, d)) @ np.linalg.cholesky(truth).T, rowvar=False)
    fitted = factor_analytic(S, n)
    np.testing.assert_allclose(np.diag(fitted), np.diag(S), rtol=1e-9)
    assert np.linalg.norm(fitted - truth) < np.linalg.norm(S - truth)
    weights, best = np.linalg.solve(fitted, np.ones(d)), 1 / np.linalg.solve(truth, np.ones(d)).sum()
    assert weights @ truth @ weights / weights.sum() ** 2 / best < 1 + 3 * k / n * np.sqrt(d)


def test_factor_analysis_agrees_with_scikit_learn(rng):
    from sklearn.decomposition import FactorAnalysis

    Z = rng.standard_normal((500, 2)) @ rng.standard_normal((2, 10)) + rng.standard_normal((500, 10))
    Z = (Z - Z.mean(axis=0)) / Z.std(axis=0)
    C = Z.T @ Z / 500
    theirs = FactorAnalysis(2, tol=1e-10, max_iter=5000, svd_method="lapack").fit(Z).get_covariance()
    np.testing.assert_allclose(factor_analytic(C, 500, k=2), correlation_from_covariance(theirs), atol=2e-4)


# ------------------------------------------------------------------ the fitted edge


@pytest.mark.parametrize(("n", "d"), [(500, 100), (75, 50), (60, 100)])
def test_fitted_edge_leaves_noise_alone(n, d):
    found = sum(
        n_factors(np.cov(np.random.default_rng(s).standard_normal((n, d)), rowvar=False), n, edge="fitted")
        > 0
        for s in range(60)
    )
    assert found <= 4


def test_fitted_edge_makes_room_for_weak_factors():
    """A market factor takes 40 % of the variance, so that the noise is 0.6 and a weaker factor stands out."""
    d, n = 60, 300
    plain = fitted = 0
    variance = []
    for seed in range(20):
        rng = np.random.default_rng(seed)
        rows = rng.standard_normal((n, d)) + np.sqrt(2 / 3) * rng.standard_normal((n, 1))
        rows = rows + 0.22 * rng.choice([-1, 1], d) * rng.standard_normal((n, 1))
        S = np.cov(rows, rowvar=False)
        plain += n_factors(S, n) == 2
        fitted += n_factors(S, n, edge="fitted") == 2
        values = np.linalg.eigvalsh(correlation_from_covariance(S))
        edge, v = fitted_edge(values, n)
        variance.append(v)
        assert edge == pytest.approx(v * noise_edge(d, n))
    assert np.mean(variance) == pytest.approx(1 / (1 + 2 / 3 + 0.22**2), rel=0.02)
    assert fitted >= 18
    assert plain < fitted


# ------------------------------------------------------------------ equivariance


@pytest.mark.parametrize("n", [100, 21, 20, 12])
@pytest.mark.parametrize("function", NONLINEAR)
def test_shrinkage_of_a_covariance_turns_with_it(rng, function, n):
    d = 20
    S = np.cov(panel(rng, n, d), rowvar=False)
    Q = np.linalg.qr(rng.standard_normal((d, d)))[0]
    turned = function(Q @ S @ Q.T, n, standardise=False)
    np.testing.assert_allclose(
        Q.T @ turned @ Q, function(S, n, standardise=False), rtol=0, atol=1e-8 * S.max()
    )
    np.testing.assert_allclose(
        function(1e4 * S, n, standardise=False), 1e4 * function(S, n, standardise=False), rtol=1e-7
    )


@pytest.mark.parametrize("n", [100, 20, 12])
@pytest.mark.parametrize("function", CLEANERS)
def test_cleaners_follow_order_and_units(rng, function, n):
    d = 20
    S = np.cov(panel(rng, n, d), rowvar=False)
    out = function(S, n)
    np.testing.assert_allclose(np.diag(out), np.diag(S), rtol=1e-10)
    np.testing.assert_array_equal(out, out.T)
    order, units = rng.permutation(d), np.geomspace(1e-3, 1e3, d)
    unit = np.sqrt(np.outer(np.diag(S), np.diag(S)))
    mixed = function(S[np.ix_(order, order)], n) / unit[np.ix_(order, order)]
    np.testing.assert_allclose(mixed, (out / unit)[np.ix_(order, order)], rtol=0, atol=1e-6)
    scaled = function(S * np.outer(units, units), n) / np.outer(units, units)
    np.testing.assert_allclose(scaled / unit, out / unit, rtol=0, atol=1e-6)


@pytest.mark.parametrize("function", CLEANERS)
def test_frames_in_frames_out(rng, function):
    frame = pd.DataFrame(panel(rng, 60, 4), columns=["b", "a", "d", "c"]).cov()
    out = function(frame, 60)
    assert list(out.index) == list(out.columns) == ["b", "a", "d", "c"]
    np.testing.assert_array_equal(out, function(frame.to_numpy(), 60))


# ------------------------------------------------------------------ as many rows as assets, fewer, one more


def truths(d, rng):
    labels = np.arange(d) // 10
    sd = rng.uniform(0.05, 0.2, d)
    yield (np.where(labels[:, None] == labels, 0.5, 0.0) + 0.5 * np.eye(d)) * np.outer(sd, sd)
    L = rng.standard_normal((d, 3)) * [0.8, 0.4, 0.3] + [0.7, 0, 0]
    yield L @ L.T + np.diag(rng.uniform(0.1, 2, d))


@pytest.mark.parametrize("function", CLEANERS)
def test_minimum_variance_never_explodes(function):
    """Realised over attainable variance: the sample's is (N + 1)/(N - d) for N > d, infinite at N = d."""
    d = 40
    worst = {}
    for n in (20, 30, 38, 39, 40, 41, 42, 43, 50, 60):
        rng = np.random.default_rng(n)
        for _ in range(3):
            for truth in truths(d, rng):
                S = np.cov(rng.standard_normal((n, d)) @ np.linalg.cholesky(truth).T, rowvar=False)
                weights = np.linalg.solve(function(S, n), np.ones(d))
                ratio = (
                    weights @ truth @ weights / weights.sum() ** 2 * np.linalg.solve(truth, np.ones(d)).sum()
                )
                worst[n] = max(worst.get(n, 0), ratio)
    # The volatility is at most twice the attainable one, nowhere near infinity.
    assert max(worst.values()) < 4
    if function in NONLINEAR:
        assert max(worst[n] for n in (38, 39, 40, 41, 42, 43)) < 2.6


@pytest.mark.parametrize("formula", [quadratic_inverse, analytical])
def test_the_published_formulas_do_explode(formula):
    """The reason for the subsets of rows: at N = d the formula itself realises several times the variance."""
    d, rng = 40, np.random.default_rng(0)
    bare, safe = [], []
    for _ in range(6):
        values, U = np.linalg.eigh(np.cov(rng.standard_normal((d + 1, d)), rowvar=False))
        for found, delta in ((bare, formula(values, d)), (safe, shrink(formula, values, d))):
            weights = U @ ((U.T @ np.ones(d)) / delta)
            found.append(d * (weights @ weights) / weights.sum() ** 2)
    assert np.mean(bare) > 1.5
    assert np.max(safe) < 1.25


@pytest.mark.parametrize("function", CLEANERS)
@pytest.mark.parametrize(("n", "d"), [(3, 1), (3, 2), (3, 3), (4, 2), (3, 30), (400, 1), (400, 2)])
def test_the_smallest_panels_give_a_covariance(rng, function, n, d):
    S = np.cov(rng.standard_normal((n, d)), rowvar=False).reshape(d, d)
    out = function(S, n)
    np.testing.assert_allclose(np.diag(out), np.diag(S), rtol=1e-9)
    assert np.linalg.eigvalsh(out)[0] > 0


@pytest.mark.parametrize("function", CLEANERS)
def test_copies_of_an_asset_are_survived(rng, function):
    rows = panel(rng, 100, 6)[:, [0, 1, 2, 3, 4, 5, 5]]
    out = function(np.cov(rows, rowvar=False), 100)
    assert np.isfinite(out).all()
    assert np.linalg.eigvalsh(out)[0] >= -1e-12 * np.linalg.eigvalsh(out)[-1]
    assert correlation_from_covariance(out)[5, 6] > correlation_from_covariance(out)[4, 6]


# ------------------------------------------------------------------ the comparator


def test_matched_shrinkage_has_the_same_intensity(rng):
    S = np.cov(panel(rng, 60, 20), rowvar=False)
    target = quadratic_inverse_shrinkage(S, 60)
    by_condition, a = matched_diagonal_shrinkage(S, target)
    conditions = [np.linalg.cond(correlation_from_covariance(M)) for M in (by_condition, target)]
    assert conditions[0] == pytest.approx(conditions[1], rel=1e-9)
    s2 = a / (1 - a)
    np.testing.assert_allclose(by_condition, (S + s2 * np.diag(np.diag(S))) / (1 + s2), rtol=1e-12)
    by_mass, b = matched_diagonal_shrinkage(S, target, match="correlation")
    masses = [np.square(correlation_from_covariance(M)).sum() for M in (by_mass, target)]
    assert masses[0] == pytest.approx(masses[1], rel=1e-9)
    assert 0 < b < a < 1


@pytest.mark.parametrize("match", ["condition", "correlation"])
def test_matched_shrinkage_recovers_a_known_one(rng, match):
    for n in (60, 15):
        S = np.cov(panel(rng, n, 20), rowvar=False)
        blended = 0.7 * S + 0.3 * np.diag(np.diag(S))
        units = np.outer(*[rng.uniform(0.5, 2, 20)] * 2)
        out, a = matched_diagonal_shrinkage(S, blended * units, match=match)
        assert a == pytest.approx(0.3)
        np.testing.assert_allclose(out, blended, rtol=1e-9)
        assert matched_diagonal_shrinkage(blended, S, match=match)[1] == 0
        assert matched_diagonal_shrinkage(S, np.diag(np.diag(S)), match=match)[1] == pytest.approx(1)


# ------------------------------------------------------------------ bad input


BAD = [
    (np.ones((2, 3)), 10, "shape"),
    (np.diag([1.0, 0.0]), 10, "positive variances"),
    (np.array([[1.0, 0.5], [0.2, 1.0]]), 10, "symmetric"),
    (np.array([[1.0, 2.0], [2.0, 1.0]]), 10, "semi-definite"),
    (np.array([[1.0, np.nan], [np.nan, 1.0]]), 10, "finite"),
    (np.eye(2), 2, "n_samples"),
    (np.eye(2), 10.5, "n_samples"),
    (np.eye(2), np.nan, "n_samples"),
]


@pytest.mark.parametrize("function", CLEANERS)
@pytest.mark.parametrize(("covariance", "n", "match"), BAD)
def test_bad_covariances_are_refused(function, covariance, n, match):
    with pytest.raises(ValueError, match=match):
        function(covariance, n)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: factor_analytic(np.eye(3), 10, k=3), "from 0 to d - 1 = 2, got 3"),
        (lambda: factor_analytic(np.eye(3), 10, k=0.5), "number of factors"),
        (lambda: block_correlation(np.eye(3), 10, blocks=[0, 1]), "one label for each of 3 assets"),
        (lambda: matched_diagonal_shrinkage(np.eye(3), np.eye(2)), "for the assets"),
        (lambda: matched_diagonal_shrinkage(np.eye(3), np.eye(3), match="trace"), "match"),
        (lambda: noise_edge(10, 100, edge="fitted"), "pass it to clip"),
        (lambda: clip(np.eye(3), 10, edge="kde"), "edge"),
    ],
)
def test_bad_arguments_are_refused(call, match):
    with pytest.raises(ValueError, match=match):
        call()
