"""The rivals against closed forms: moments, likelihoods, distances, counts of rows and lengths of blocks.

Tolerances are multiples of standard errors: |z| < 4.5 for the largest of tens of entries, p > 1e-3 for a test.
"""

import numpy as np
import pytest
from arch.bootstrap import optimal_block_length
from scipy import stats
from scipy.optimize import minimize_scalar
from sklearn.covariance import EmpiricalCovariance, ShrunkCovariance, ledoit_wolf

from finediff.generators import (
    BootstrapGenerator,
    GaussianGenerator,
    SmoothedBootstrapGenerator,
    StudentTGenerator,
)
from finediff.generators.classical import _mahalanobis, _t_log_likelihood

CORRELATION = np.array([[1, 0.5, 0.2, -0.1], [0.5, 1, 0.3, 0.1], [0.2, 0.3, 1, 0.4], [-0.1, 0.1, 0.4, 1]])
SD = np.array([0.01, 0.02, 0.005, 0.03])
MEAN = np.array([0.001, 0.0, -0.002, 0.003])
SCATTER = CORRELATION * np.outer(SD, SD)


def planted(dof, n=4000, seed=0):
    rng = np.random.default_rng(seed)
    stretch = np.sqrt(dof / rng.chisquare(dof, (n, 1))) if dof < np.inf else 1.0
    return MEAN + stretch * (rng.standard_normal((n, 4)) @ np.linalg.cholesky(SCATTER).T)


def mean_log_likelihood(X, mean, scatter, dof):
    return stats.multivariate_t(loc=mean, shape=scatter, df=dof).logpdf(X).mean()


# --------------------------------------------------------------------------------------- Gaussian


def test_the_gaussian_has_the_moments_of_its_estimator():
    X = planted(5, n=300)
    sd = X.std(0)
    shrunk = ledoit_wolf((X - X.mean(0)) / sd)[0] * np.outer(sd, sd)
    for estimator, covariance in (
        (None, shrunk),
        (EmpiricalCovariance(), np.cov(X.T, ddof=0)),
        (ShrunkCovariance(shrinkage=1.0), np.diag(X.var(0))),
    ):
        generator = GaussianGenerator(covariance_estimator=estimator).fit(X)
        np.testing.assert_allclose(generator.mean_, X.mean(0), rtol=1e-12)
        np.testing.assert_allclose(generator.covariance_, covariance, rtol=1e-10, atol=1e-18)


def test_gaussian_scenarios_follow_the_normal_law():
    m = 50_000
    generator = GaussianGenerator(random_state=0).fit(planted(5, n=300))
    draws, mean, C = generator.sample(m), generator.mean_, generator.covariance_
    assert np.abs((draws.mean(0) - mean) / np.sqrt(np.diag(C) / m)).max() < 4.5
    standard_error = np.sqrt((C**2 + np.outer(np.diag(C), np.diag(C))) / m)
    assert np.abs((np.cov(draws.T) - C) / standard_error).max() < 4.5
    distance = _mahalanobis(draws - mean, C)[0]
    assert stats.kstest(distance, stats.chi2(4).cdf).pvalue > 1e-3


# -------------------------------------------------------------------------------------- Student t


def test_student_scenarios_follow_the_t_law():
    """q/d ~ F(d, nu), the direction is uniform: together they are the multivariate t."""
    generator = StudentTGenerator(dof=6, random_state=0).fit(planted(6, n=500))
    whitened = np.linalg.solve(
        np.linalg.cholesky(generator.scatter_), (generator.sample(50_000) - generator.mean_).T
    ).T
    q = (whitened**2).sum(1)
    assert stats.kstest(q / 4, stats.f(4, 6).cdf).pvalue > 1e-3
    directions = whitened / np.sqrt(q)[:, None]
    for j in range(4):  # the square of a coordinate of a uniform direction in R^4 is Beta(1/2, 3/2)
        assert stats.kstest(directions[:, j] ** 2, stats.beta(0.5, 1.5).cdf).pvalue > 1e-3
    products = (directions.T @ directions / len(q))[np.triu_indices(4, 1)]
    assert np.abs(products * np.sqrt(len(q) * 24)).max() < 4.5  # E u_i^2 u_j^2 = 1/24
    assert stats.spearmanr(q, directions[:, 0] ** 2).pvalue > 1e-3


def test_the_covariance_is_the_scatter_stretched():
    generator = StudentTGenerator(dof=6).fit(planted(6))
    np.testing.assert_allclose(generator.covariance_, 1.5 * generator.scatter_, rtol=1e-14)


@pytest.mark.parametrize("dof", [2.05, 5.0, 100.0])
def test_the_likelihood_is_that_of_scipy(dof):
    X = planted(5, n=200)
    q, log_det = _mahalanobis(X - MEAN, SCATTER)
    expected = mean_log_likelihood(X, MEAN, SCATTER, dof)
    assert _t_log_likelihood(q, log_det, dof, 4) == pytest.approx(expected, rel=1e-12)


def test_one_asset_agrees_with_the_maximum_likelihood_of_scipy():
    x = stats.t(4, loc=0.001, scale=0.01).rvs(3000, random_state=1)
    fitted = StudentTGenerator(tol=1e-12, max_iter=2000).fit(x[:, None])
    dof, mean, scale = stats.t.fit(x)
    assert fitted.dof_ == pytest.approx(dof, rel=1e-4)
    assert fitted.mean_[0] == pytest.approx(mean, abs=1e-4 * scale)
    assert fitted.scatter_[0, 0] ** 0.5 == pytest.approx(scale, rel=1e-4)


def test_the_likelihood_is_highest_at_the_fit():
    X = planted(5)
    fitted = StudentTGenerator(tol=1e-12, max_iter=2000).fit(X)
    best = mean_log_likelihood(X, fitted.mean_, fitted.scatter_, fitted.dof_)
    twin = minimize_scalar(
        lambda dof: -mean_log_likelihood(X, fitted.mean_, fitted.scatter_, dof),
        bounds=(2.05, 100),
        method="bounded",
        options={"xatol": 1e-8},
    )
    assert fitted.dof_ == pytest.approx(twin.x, rel=1e-5)
    for step in (-1, 1):
        assert mean_log_likelihood(X, fitted.mean_, fitted.scatter_, fitted.dof_ + 0.05 * step) < best
        # The share of shrinkage in the scatter costs 1 % of scale here; with one asset there is none (above).
        assert mean_log_likelihood(X, fitted.mean_, fitted.scatter_ * 1.1**step, fitted.dof_) < best
        for j in range(4):
            moved = fitted.mean_ + 0.02 * step * SD * (np.arange(4) == j)
            assert mean_log_likelihood(X, moved, fitted.scatter_, fitted.dof_) < best


def test_each_step_raises_the_likelihood():
    X = planted(3)
    values = []
    for steps in (1, 2, 3, 5, 8, 13, 21):
        fitted = StudentTGenerator(max_iter=steps).fit(X)
        values.append(mean_log_likelihood(X, fitted.mean_, fitted.scatter_, fitted.dof_))
    assert (np.diff(values) > -1e-7).all()
    assert values[-1] > values[0] + 0.001


def standard_errors(dof, n, d=4, sample=100_000):
    """Of the maximum likelihood estimates of (nu, log scale), from the scores of a large sample."""
    x = stats.multivariate_t(df=dof, shape=np.eye(d), seed=0).rvs(sample)

    def log_density(nu, log_scale):
        return stats.multivariate_t(df=nu, shape=np.exp(2 * log_scale) * np.eye(d)).logpdf(x)

    h = 1e-4
    scores = np.stack(
        [
            (log_density(dof + h, 0) - log_density(dof - h, 0)) / (2 * h),
            (log_density(dof, h) - log_density(dof, -h)) / (2 * h),
        ]
    )
    return np.sqrt(np.diag(np.linalg.inv(scores @ scores.T / sample)) / n)


def test_a_planted_t_is_recovered():
    n, dof = 4000, 5.0
    X = planted(dof, n)
    fitted = StudentTGenerator().fit(X)
    of_dof, of_log_scale = standard_errors(dof, n)
    assert 0.1 < of_dof < 0.4
    assert abs(fitted.dof_ - dof) < 4 * of_dof
    log_scale = np.mean(np.log(np.diag(fitted.scatter_) / np.diag(SCATTER))) / 2
    assert abs(log_scale) < 4 * of_log_scale
    sd = np.sqrt(np.diag(fitted.scatter_))
    # Lange, Little & Taylor 1989: as for the normal law, but for the factor (nu + d + 2)/(nu + d).
    standard_error = np.sqrt(11 / 9 / n) * (1 - CORRELATION**2)
    z = (fitted.scatter_ / np.outer(sd, sd) - CORRELATION)[np.triu_indices(4, 1)]
    assert np.abs(z / standard_error[np.triu_indices(4, 1)]).max() < 4.5
    assert np.abs((fitted.mean_ - MEAN) / (SD * np.sqrt(11 / 9 / n))).max() < 4.5


@pytest.mark.parametrize("seed", range(3))
def test_normal_data_give_a_nearly_normal_t(seed):
    X = planted(np.inf, seed=seed)
    fitted = StudentTGenerator().fit(X)
    assert fitted.dof_ > 50
    np.testing.assert_allclose(np.diag(fitted.covariance_), X.var(0), rtol=0.02)


def test_a_given_dof_is_kept():
    assert StudentTGenerator(dof=3).fit(planted(8)).dof_ == 3.0


# -------------------------------------------------------------------------------------- bootstrap


def row_numbers(generator, n, m, d=3):
    """Which rows of an n-row panel the m scenarios are; fails if one is none of them."""
    X = np.random.default_rng(1).standard_normal((n, d)) / 100
    draws = generator.fit(X).sample(m)
    order = np.argsort(X[:, 0])
    numbers = order[np.searchsorted(X[order, 0], draws[:, 0])]
    np.testing.assert_array_equal(draws, X[numbers])
    return numbers


def test_the_bootstrap_draws_every_row_as_often():
    counts = np.bincount(row_numbers(BootstrapGenerator(random_state=0), 60, 30_000), minlength=60)
    assert stats.chisquare(counts).pvalue > 1e-3


def test_the_bootstrap_draws_independently():
    n, m = 60, 30_000
    numbers = row_numbers(BootstrapGenerator(random_state=0), n, m)
    pairs = np.bincount((np.diff(numbers) % n), minlength=n)
    assert stats.chisquare(pairs).pvalue > 1e-3


@pytest.mark.parametrize("block_length", [1.0, 5.0, 20.0])
def test_stationary_blocks_have_geometric_lengths(block_length):
    n, m = 2000, 40_000
    numbers = row_numbers(
        BootstrapGenerator(method="stationary", block_length=block_length, random_state=0), n, m
    )
    ends = np.flatnonzero((np.diff(numbers) - 1) % n)
    lengths = np.diff(ends)
    p = (1 - 1 / n) / block_length  # a new block may by chance begin where the old one ends
    standard_error = np.sqrt((1 - p) / p**2 / len(lengths))
    assert abs(lengths.mean() - 1 / p) < 4 * standard_error + 1e-12
    if block_length > 1:
        edges = stats.geom(p).ppf(np.linspace(0, 1, 11)[1:-1])
        cells = np.concatenate([[0], np.unique(edges), [np.inf]])
        observed = np.histogram(lengths, cells + 0.5)[0]
        expected = np.diff(stats.geom(p).cdf(cells)) * len(lengths)
        assert stats.chisquare(observed, expected).pvalue > 1e-3


def test_stationary_blocks_draw_every_row_as_often():
    """Counts of rows far apart are independent: one row in each ten blocks' lengths."""
    n, m, length = 1000, 200_000, 5.0
    numbers = row_numbers(BootstrapGenerator(method="stationary", block_length=length, random_state=0), n, m)
    counts = np.bincount(numbers, minlength=n)[:: int(10 * length)]
    # A block covers a given row as often as it begins in the rows before it, thinned geometrically: Poisson.
    assert np.abs(counts - m / n).max() < 4.5 * np.sqrt(m / n)


def test_the_default_block_length_is_that_of_the_squared_returns():
    rng = np.random.default_rng(0)
    log_volatility = np.zeros(2000)
    for t in range(1, 2000):
        log_volatility[t] = 0.97 * log_volatility[t - 1] + 0.2 * rng.standard_normal()
    X = 0.01 * np.exp(log_volatility)[:, None] * rng.standard_normal((2000, 3))
    clustered = BootstrapGenerator(method="stationary").fit(X).block_length_
    assert clustered == pytest.approx(optimal_block_length(X**2)["stationary"].mean())
    shuffled = BootstrapGenerator(method="stationary").fit(rng.permutation(X)).block_length_
    assert shuffled < 5 < clustered
    assert BootstrapGenerator().fit(X).block_length_ == 1.0


# ----------------------------------------------------------------------------- smoothed bootstrap


@pytest.mark.parametrize("bandwidth", [0.15, 0.35, 2.0])
def test_the_smoothed_bootstrap_keeps_mean_and_covariance(bandwidth):
    X, m, h2 = planted(8, n=300), 50_000, bandwidth**2
    generator = SmoothedBootstrapGenerator(bandwidth=bandwidth, random_state=0).fit(X)
    sd, C = X.std(0), np.cov(X.T, ddof=0)
    S = ledoit_wolf((X - X.mean(0)) / sd)[0] * np.outer(sd, sd)
    np.testing.assert_allclose(generator.kernel_covariance_, S, rtol=1e-10, atol=1e-18)
    expected = (C + h2 * S) / (1 + h2)
    np.testing.assert_allclose(generator.covariance_, expected, rtol=1e-10, atol=1e-18)
    np.testing.assert_allclose(np.diag(expected), np.diag(C), rtol=1e-12)  # the variances are kept exactly
    centred = generator.sample(m) - X.mean(0)
    assert np.abs(centred.mean(0) / sd * np.sqrt(m)).max() < 4.5
    products = centred[:, :, None] * centred[:, None]
    assert np.abs((products.mean(0) - expected) / products.std(0) * np.sqrt(m)).max() < 4.5


def test_the_smoothed_bootstrap_is_saved_with_both_covariances(tmp_path):
    X = np.column_stack([planted(8, n=300), np.full(300, 1e-4)])
    generator = SmoothedBootstrapGenerator(random_state=0).fit(X)
    again = SmoothedBootstrapGenerator.load(generator.save(tmp_path / "saved"))
    for name in ("covariance_", "kernel_covariance_"):
        np.testing.assert_array_equal(getattr(again, name), getattr(generator, name))
        assert not getattr(again, name)[4].any()  # an asset that never moved
    np.testing.assert_array_equal(again.sample(20), generator.sample(20))


def test_the_smoothed_bootstrap_is_a_mixture_of_normals_about_the_rows():
    X, h = planted(4, n=200), 0.3
    draws = SmoothedBootstrapGenerator(bandwidth=h, random_state=0).fit(X).sample(20_000)
    inward = 1 / np.sqrt(1 + h**2)
    centres = X.mean(0) + inward * (X - X.mean(0))
    for j in range(4):
        components = stats.norm(centres[:, j], inward * h * X[:, j].std())
        assert stats.kstest(draws[:, j], lambda x, c=components: c.cdf(x[:, None]).mean(1)).pvalue > 1e-3


def test_a_smoothed_scenario_lies_about_its_row_as_the_covariance_says():
    X, h = planted(4, n=50), 1e-4  # so little that the nearest row is the row
    generator = SmoothedBootstrapGenerator(bandwidth=h, random_state=0).fit(X)
    draws, inward = generator.sample(5000), 1 / np.sqrt(1 + h**2)
    centres = X.mean(0) + inward * (X - X.mean(0))
    whitener = np.linalg.inv(np.linalg.cholesky(generator.kernel_covariance_)).T / (inward * h)
    q = (((draws[:, None] - centres) @ whitener) ** 2).sum(2)
    assert stats.kstest(q.min(1), stats.chi2(4).cdf).pvalue > 1e-3
    assert stats.chisquare(np.bincount(q.argmin(1), minlength=50)).pvalue > 1e-3


def test_without_noise_it_is_the_bootstrap():
    rows = row_numbers(SmoothedBootstrapGenerator(bandwidth=0, random_state=0), 60, 30_000)
    assert stats.chisquare(np.bincount(rows, minlength=60)).pvalue > 1e-3


def test_the_default_bandwidth_is_the_rule_of_silverman():
    X = planted(5, n=2500)
    assert SmoothedBootstrapGenerator().fit(X).bandwidth_ == pytest.approx(1.06 * 2500 ** (-1 / 5), rel=2e-3)


@pytest.mark.parametrize("bandwidth", [-0.1, np.inf, np.nan, "silverman"])
def test_other_bandwidths_are_refused(bandwidth):
    with pytest.raises(ValueError, match="expected a finite bandwidth of at least 0, got"):
        SmoothedBootstrapGenerator(bandwidth=bandwidth).fit(planted(5, n=100))
