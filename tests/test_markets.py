"""Simulated markets: what is stated is what is drawn. Statistics are judged by their own standard errors."""

import dataclasses

import numpy as np
import pytest
from scipy.integrate import quad
from scipy.optimize import minimize
from scipy.stats import kurtosis, multivariate_normal, norm

from finediff.markets import (
    BlockMarket,
    FactorMarket,
    MixtureMarket,
    block_market,
    factor_market,
    garch_market,
    mixture_market,
)

MARKETS = {
    "factor": factor_market(6, 2, 1),
    "t": factor_market(6, 2, 2, df=12),
    "blocks of residuals": factor_market(7, 1, 3, residual_correlation=0.6, residual_group=3),
    "negative blocks": factor_market(7, 1, 3, residual_correlation=-0.4, residual_group=3),
    "band of residuals": factor_market(6, 2, 4, residual_correlation=-0.45),
    "t, blocks": factor_market(6, 2, 5, df=12, residual_correlation=0.3, residual_group=2),
    "block": block_market(2, 3, 6),
    "negative block": block_market(2, 3, 6, rho=-0.4),
    "mixture": mixture_market(5, 7),
    "garch": garch_market(5, 8, alpha=0.1, beta=0.6),
}
every_market = pytest.mark.parametrize("market", MARKETS.values(), ids=MARKETS)


def z_scores(draws, truth):
    """(mean - truth)/standard error, of independent draws (n, ...)."""
    return (draws.mean(axis=0) - truth) / (draws.std(axis=0, ddof=1) / np.sqrt(len(draws)))


def assert_standard_normal(z):
    """The largest of the |z|, by Bonferroni at 1 in 10,000."""
    assert np.abs(z).max() < norm.isf(0.5e-4 / np.size(z))


@every_market
def test_sample_has_the_stated_mean_and_covariance(market):
    if market is MARKETS["garch"]:  # squares depend on each other in time: blocks of 100 rows hardly do
        x = market.sample(100_000, 9)
        rows = x.reshape(1000, 100, -1)
        means = rows.mean(axis=1)
        products = np.einsum("bti,btj->bij", rows - market.mean, rows - market.mean) / 100
    else:
        means = market.sample(40_000, 9)
        centred = means - market.mean
        products = centred[:, :, None] * centred[:, None, :]
    upper = np.triu_indices(products.shape[1])
    assert_standard_normal(z_scores(means, market.mean))
    assert_standard_normal(z_scores(products, market.covariance)[upper])


@every_market
def test_covariance_is_symmetric_positive_definite_and_of_daily_size(market):
    S = market.covariance
    np.testing.assert_allclose(S, S.T, rtol=1e-12)
    assert np.linalg.eigvalsh(S).min() > 0
    sd = np.sqrt(np.diag(S))
    assert 0.001 < sd.min() < sd.max() < 0.1


@every_market
def test_seeds(market):
    a = market.sample(20, 5)
    assert np.array_equal(a, market.sample(20, 5))
    assert np.array_equal(a, market.sample(20, np.int64(5)))
    assert not np.array_equal(a, market.sample(20, 6))
    assert not np.array_equal(market.sample(20), market.sample(20))
    rng = np.random.default_rng(5)
    assert not np.array_equal(market.sample(20, rng), market.sample(20, rng))
    old = [market.sample(20, np.random.RandomState(3)) for _ in range(2)]
    assert np.array_equal(*old)


@every_market
def test_markets_cannot_be_changed(market):
    field = dataclasses.fields(market)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(market, field, 0)
    with pytest.raises(ValueError, match="read-only"):
        getattr(market, field)[0] = 0


@pytest.mark.parametrize(
    "make", [lambda s: factor_market(5, 2, s), lambda s: block_market(2, 3, s), lambda s: garch_market(5, s)]
)
def test_a_seed_builds_one_market(make):
    assert np.array_equal(make(3).covariance, make(3).covariance)
    assert not np.array_equal(make(3).covariance, make(4).covariance)
    assert not np.array_equal(make(None).covariance, make(None).covariance)


def test_a_seed_used_twice_does_not_tie_the_shocks_to_the_loadings():
    """With one stream for both, the residuals of the first row would be the loadings, number for number."""
    market = factor_market(2000, 1, 0)
    alone = dataclasses.replace(market, factor_mean=np.zeros(1), factor_covariance=1e-20 * np.eye(1))
    shocks = alone.sample(1, 0)[0] / np.sqrt(alone.idiosyncratic_variance)
    assert abs(np.corrcoef(shocks, market.loadings[:, 0])[0, 1]) < 4 / np.sqrt(2000)


# ------------------------------------------------------------------ factors


def test_loadings_and_residuals_add_up():
    market = factor_market(30, 4, 0)
    L, F, D = market.loadings, market.factor_covariance, np.diag(market.idiosyncratic_variance)
    np.testing.assert_allclose(market.covariance, L @ F @ L.T + D, rtol=1e-12)
    np.testing.assert_allclose(market.mean, L @ market.factor_mean)
    np.testing.assert_allclose(np.sqrt(np.diag(F) * 252), 1.5 * market.factor_mean * 252)  # the paper's ratio
    explained = 1 - market.idiosyncratic_variance / np.diag(market.covariance)
    np.testing.assert_allclose(market.factor_share, explained)


def test_published_numbers_of_the_factor_market():
    """Expectations over markets: of a uniform square u^2/3, so factors explain 0.12 of 0.12 + 0.16/3."""
    markets = [factor_market(100, 16, seed, periods_per_year=1) for seed in range(300)]
    factors = np.array([np.trace(m.loadings @ m.factor_covariance @ m.loadings.T) / 100 for m in markets])
    residuals = np.array([m.idiosyncratic_variance.mean() for m in markets])
    assert_standard_normal(z_scores(factors, 16 * 2.25 * 0.01 / 3))
    assert_standard_normal(z_scores(residuals, 0.16 / 3))
    daily = factor_market(100, 16, 0)
    np.testing.assert_allclose(daily.covariance * 252, markets[0].covariance)
    np.testing.assert_allclose(daily.mean * 252, markets[0].mean)


def test_factor_share_is_met():
    market = factor_market(50, 3, 0, factor_share=0.5042)
    S = market.covariance
    assert 1 - market.idiosyncratic_variance.sum() / np.trace(S) == pytest.approx(0.5042)
    assert np.array_equal(market.loadings, factor_market(50, 3, 0).loadings)


def test_heavy_tails_keep_the_covariance_and_have_the_stated_kurtosis():
    light, heavy = factor_market(8, 2, 0), factor_market(8, 2, 0, df=20)
    assert np.array_equal(light.covariance, heavy.covariance)
    assert np.array_equal(light.excess_kurtosis, np.zeros(8))
    blocks = [(heavy.sample(20_000, seed), light.sample(20_000, seed)) for seed in range(40)]
    assert_standard_normal(z_scores(np.array([kurtosis(h) for h, _ in blocks]), heavy.excess_kurtosis))
    assert_standard_normal(z_scores(np.array([kurtosis(g) for _, g in blocks]), np.zeros(8)))
    assert (heavy.excess_kurtosis > 0.15).all()
    assert np.isinf(factor_market(8, 2, 0, df=4).excess_kurtosis).all()


def test_each_part_has_one_scale_a_row():
    """Without factors: residuals alone are a multivariate t, with kurtosis 6/(df - 4)."""
    market = FactorMarket(
        loadings=np.zeros((3, 1)),
        factor_mean=np.zeros(1),
        factor_covariance=np.eye(1),
        idiosyncratic_variance=np.ones(3),
        df=12,
    )
    np.testing.assert_allclose(market.excess_kurtosis, 6 / 8)
    x = market.sample(100_000, 0)
    # E x_i^2 x_j^2 = E s^4 = (df - 2)/(df - 4): one scale; it would be 1 with a scale for each asset.
    assert_standard_normal(z_scores(x[:, [0, 0, 1]] ** 2 * x[:, [1, 2, 2]] ** 2, 10 / 8))


def test_residual_correlations_are_as_stated():
    def correlation(**options):
        market = factor_market(5, 1, 0, **options)
        R, sd = market.residual_covariance, np.sqrt(market.idiosyncratic_variance)
        L = market.loadings
        np.testing.assert_allclose(market.covariance, L @ market.factor_covariance @ L.T + R)
        return R / np.outer(sd, sd)

    band = [
        [1, 0.5, 0, 0, 0],
        [0.5, 1, 0.5, 0, 0],
        [0, 0.5, 1, 0.5, 0],
        [0, 0, 0.5, 1, 0.5],
        [0, 0, 0, 0.5, 1],
    ]
    pairs = [[1, 0.7, 0, 0, 0], [0.7, 1, 0, 0, 0], [0, 0, 1, 0.7, 0], [0, 0, 0.7, 1, 0], [0, 0, 0, 0, 1]]
    np.testing.assert_allclose(correlation(residual_correlation=0.5), band)
    np.testing.assert_allclose(correlation(residual_correlation=0.7, residual_group=2), pairs, atol=1e-15)
    np.testing.assert_allclose(correlation(residual_group=2), np.eye(5))
    for options in ({"residual_correlation": -0.5}, {"residual_correlation": 0.99, "residual_group": 5}):
        assert np.linalg.eigvalsh(factor_market(200, 3, 0, **options).residual_covariance).min() > 0


# ------------------------------------------------------------------ missing values


@every_market
@pytest.mark.parametrize("missing", [0.4, (0.4, 0), (0, 1), (1, 1)])
def test_missing_values_lead_or_trail(market, missing):
    n, whole = 31, market.sample(31, 2)
    x = market.sample(n, 2, missing=missing)
    gap = np.isnan(x)
    assert np.array_equal(x[~gap], whole[~gap])
    switches = np.diff(gap.astype(int), axis=0)
    assert ((switches == -1).sum(axis=0) <= 1).all()  # begins once
    assert ((switches == 1).sum(axis=0) <= 1).all()  # ends once
    first, last = (~gap).argmax(axis=0), n - 1 - (~gap)[::-1].argmax(axis=0)
    assert (~gap).any(axis=0).all()
    assert ((~gap).sum(axis=0) == last - first + 1).all()  # and no hole in between
    late, dead = (missing, missing) if np.isscalar(missing) else missing
    assert gap[0].sum() == round(late * x.shape[1])
    assert gap[-1].sum() == round(dead * x.shape[1])
    assert max(first.max(), (n - 1 - last).max()) <= 15


def test_gaps_are_uniform_and_their_assets_random():
    market = factor_market(4000, 1, 0)
    gap = np.isnan(market.sample(11, 0, missing=0.5))
    lengths = gap[:5].sum(axis=0)[gap[0]]
    counts = np.bincount(lengths, minlength=6)[1:]
    assert ((counts - 400) ** 2 / 400).sum() < 23.5  # chi-square, 4 degrees of freedom, 1 in 10,000
    both = (gap[0] & gap[-1]).sum()
    assert abs(both - 1000) < 4 * np.sqrt(4000 / 16)


# ------------------------------------------------------------------ blocks


def test_block_market_is_the_published_one():
    market = block_market(periods_per_year=1, random_state=0)
    sd = np.sqrt(np.diag(market.covariance))
    C = market.covariance / np.outer(sd, sd)
    np.testing.assert_allclose(C, np.kron(np.eye(5), 0.5 * np.eye(10) + 0.5), atol=1e-12)
    big = block_market(200, 100, 0, periods_per_year=1)
    assert 0.05 < big.volatility.min() < 0.051
    assert 0.199 < big.volatility.max() < 0.2
    ratio = big.mean / big.volatility
    assert_standard_normal(z_scores(ratio, 0.5))
    assert_standard_normal(z_scores((ratio - 0.5) ** 2, 0.04))
    np.testing.assert_allclose(block_market(random_state=0).mean * 252, market.mean)
    np.testing.assert_allclose(block_market(random_state=0).covariance * 252, market.covariance)


@pytest.mark.parametrize("rho", [-0.3, 0.0, 0.5, 0.9])
def test_block_weights_are_the_best(rho):
    market = block_market(2, 4, 1, rho=rho, periods_per_year=1)
    S, m = market.covariance, market.mean
    v = np.arange(8.0)
    np.testing.assert_allclose(S @ market.solve(v), v, atol=1e-10)
    budget = {"type": "eq", "fun": lambda w: w.sum() - 1}
    start = np.full(8, 1 / 8)
    options = {"ftol": 1e-15, "maxiter": 500}
    least = minimize(lambda w: 100 * w @ S @ w, start, constraints=budget, options=options)
    np.testing.assert_allclose(market.minimum_variance_weights(), least.x, atol=1e-5)

    def sharpe(w, risk_free=0.0):
        return (w @ m - risk_free) / np.sqrt(w @ S @ w)

    best = minimize(lambda w: -sharpe(w), start, constraints=budget, options=options)
    np.testing.assert_allclose(market.tangency_weights(), best.x, atol=1e-4)
    w = market.tangency_weights(-0.01)
    assert w.sum() == pytest.approx(1)
    assert sharpe(w, -0.01) == pytest.approx(np.sqrt((m + 0.01) @ np.linalg.solve(S, m + 0.01)))


def test_tangency_refuses_the_worst_portfolio():
    market = block_market(2, 4, 1)
    with pytest.raises(ValueError, match=r"expected 1' S\^-1 \(m - r\) > 0 .* got -\d"):
        market.tangency_weights(risk_free=1.0)


# ------------------------------------------------------------------ mixture


def test_mixture_density_is_scipys():
    market = mixture_market(4, 0)
    x = market.sample(200, 1)
    parts = zip(market.probabilities, market.means, market.covariances)
    density = sum(p * multivariate_normal(m, S).pdf(x) for p, m, S in parts)
    np.testing.assert_allclose(market.log_density(x), np.log(density), rtol=1e-10)


def test_mixture_density_integrates_to_one_and_to_its_moments():
    market = mixture_market(1, 0)
    sd = float(np.sqrt(market.covariances[1, 0, 0]))

    def moment(power):
        f = lambda x: float(np.exp(market.log_density([[x]]))[0]) * x**power  # noqa: E731
        return quad(f, -12 * sd, 12 * sd, points=[0, -sd, sd], limit=200)[0]

    assert moment(0) == pytest.approx(1, abs=1e-9)
    assert moment(1) == pytest.approx(market.mean[0], abs=1e-12)
    assert moment(2) - moment(1) ** 2 == pytest.approx(market.covariance[0, 0], rel=1e-8)


def test_mixture_of_one_regime_is_gaussian():
    S = np.array([[[2.0, 0.5], [0.5, 1.0]]])
    market = MixtureMarket(probabilities=np.ones(1), means=np.array([[1.0, 2.0]]), covariances=S)
    np.testing.assert_allclose(market.covariance, S[0])
    assert kurtosis(market.sample(50_000, 0)) == pytest.approx(0, abs=4.5 * np.sqrt(24 / 50_000))


def test_crisis_is_rare_wild_and_correlated():
    market = mixture_market(3, 0, crisis_probability=0.05, crisis_volatility=4, correlations=(0.1, 0.8))
    sd = np.sqrt(market.covariances[:, range(3), range(3)])
    np.testing.assert_allclose(sd[1], 4 * sd[0])
    np.testing.assert_allclose(market.covariances[:, 0, 1] / (sd[:, 0] * sd[:, 1]), [0.1, 0.8])
    np.testing.assert_allclose(market.probabilities, [0.95, 0.05])
    assert (market.means[0] > 0).all()
    assert (market.means[1] < 0).all()


# ------------------------------------------------------------------ GARCH


def test_garch_squares_decay_as_theory_says():
    market = garch_market(4, 0, alpha=0.12, beta=0.7, correlation=0.4)
    lags = range(1, 7)
    found = []
    for seed in range(60):
        y = (market.sample(4000, seed) ** 2) / np.diag(market.covariance) - 1  # the true mean: no bias
        found.append([[(y[k:] * y[:-k]).mean(axis=0) for k in lags], [(y * y).mean(axis=0)] * 6])
    covariance, variance = np.array(found).transpose(1, 0, 2, 3)
    theory = np.array([market.square_autocorrelation(k) for k in lags])
    assert_standard_normal(z_scores(covariance - theory * variance, 0))
    np.testing.assert_allclose(theory[1:] / theory[:-1], 0.82)
    assert_standard_normal(z_scores(variance[:, 0] - 2, market.excess_kurtosis))


def test_garch_of_one_asset_is_the_textbook_one():
    a, b = 0.1, 0.8
    market = garch_market(1, 0, alpha=a, beta=b)
    # Bollerslev (1986): rho_1 = a (1 - a b - b^2)/(1 - 2 a b - b^2)
    assert market.square_autocorrelation(1)[0] == pytest.approx(
        a * (1 - a * b - b**2) / (1 - 2 * a * b - b**2)
    )
    assert market.excess_kurtosis == pytest.approx(6 * a**2 / (1 - b**2 - 2 * a * b - 3 * a**2))


def test_garch_path_obeys_the_recursion_and_its_correlation_is_constant():
    market = garch_market(3, 0, alpha=0.1, beta=0.85, correlation=0.5)
    x, u = market.path(20_000, 1)
    assert np.array_equal(x, market.sample(20_000, 1))
    zeta2 = x.sum(axis=1) ** 2 / u / market.covariance.sum()
    np.testing.assert_allclose(u[1:], 0.05 + (0.1 * zeta2[:-1] + 0.85) * u[:-1])
    z = x / np.sqrt(np.outer(u, np.diag(market.covariance)))
    calm = u < np.median(u)
    for rows in (z[calm], z[~calm]):
        products = rows[:, [0, 0, 1]] * rows[:, [1, 2, 2]]
        assert_standard_normal(z_scores(products, 0.5))


def test_garch_starts_in_its_law():
    """The first multiplier of many paths has the stationary variance: E u^2 = 1 + excess kurtosis/3."""
    market = garch_market(1, 0, alpha=0.15, beta=0.6)
    first = np.array([market.path(1, seed)[1][0] for seed in range(3000)])
    assert_standard_normal(z_scores(first, 1.0))
    assert_standard_normal(z_scores(first**2, 1 + market.excess_kurtosis / 3))


def test_garch_without_memory_is_gaussian():
    x, u = garch_market(2, 0, alpha=0, beta=0).path(50, 0)
    assert x.shape == (50, 2)
    assert np.array_equal(u, np.ones(50))


# ------------------------------------------------------------------ large, and refused


def test_large_markets_need_no_large_matrix(monkeypatch):
    market = factor_market(2048, 16, 0, df=5, residual_correlation=0.3, residual_group=8)
    largest = []
    monkeypatch.setattr(np, "eye", lambda *a, **k: largest.append(a))  # every (d, d) here begins with one
    assert market.sample(100, 0, missing=0.1).shape == (100, 2048)
    assert not largest


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: factor_market(0, 1), "expected d to be a whole number, at least 1, got 0."),
        (lambda: factor_market(2.5, 1), "expected d to be a whole number, at least 1, got 2.5."),
        (lambda: factor_market(5, True), "expected k to be a whole number, at least 1, got True."),
        (lambda: factor_market(5, 6), "expected k to be at most d = 5, got 6."),
        (lambda: factor_market(5, 2, df=2), "expected a finite df above 2"),
        (lambda: factor_market(5, 2, df=np.inf), "or None for Gaussian returns, got inf."),
        (lambda: factor_market(5, 2, residual_correlation=0.6), "from -0.5 to 0.5"),
        (lambda: factor_market(5, 2, residual_correlation=1, residual_group=2), "between -1 and 1"),
        (lambda: factor_market(5, 2, residual_correlation=-0.5, residual_group=3), "between -0.5 and 1"),
        (lambda: factor_market(5, 2, residual_group=0), "expected residual_group to be a whole number"),
        (lambda: factor_market(5, 2, factor_share=1), "expected factor_share between 0 and 1, got 1."),
        (lambda: factor_market(5, 2, periods_per_year=0), "expected a positive periods_per_year, got 0."),
        (lambda: factor_market(5, 2, "x"), "expected random_state to be None, an int >= 0"),
        (lambda: factor_market(5, 2, -1), "expected random_state to be None, an int >= 0"),
        (lambda: block_market(0), "expected groups to be a whole number"),
        (lambda: block_market(2, 3, rho=-0.5), "expected rho between -0.5 and 1"),
        (lambda: block_market(2, 3, rho=np.nan), "positive definite for 3 assets"),
        (lambda: block_market(2, 3, periods_per_year=-1), "expected a positive periods_per_year"),
        (lambda: mixture_market(3, crisis_probability=0), "expected crisis_probability between 0 and 1"),
        (lambda: mixture_market(3, crisis_volatility=0), "expected a positive crisis_volatility"),
        (lambda: mixture_market(3, correlations=0.2), "expected two correlations"),
        (lambda: mixture_market(3, correlations=(0.2, 1)), "expected correlations between -0.5 and 1"),
        (lambda: mixture_market(3, 0).log_density(np.zeros(3)), "expected rows of 3 assets, got (3,)."),
        (lambda: garch_market(3, alpha=0.2, beta=0.8), "alpha + beta <= 0.9999, got (0.2, 0.8)."),
        (lambda: garch_market(3, alpha=-0.1), "expected alpha, beta >= 0"),
        (lambda: garch_market(3, correlation=1), "expected correlation between -0.5 and 1"),
        (lambda: garch_market(3, alpha=0.5, beta=0.4).square_autocorrelation(1), "moments are infinite"),
        (lambda: garch_market(3).square_autocorrelation(0), "expected lag to be a whole number"),
        (lambda: block_market().sample(0), "expected n to be a whole number, at least 1, got 0."),
        (lambda: block_market().sample(5, missing=1.5), "expected missing to be one or two shares"),
        (lambda: block_market().sample(5, missing=(0, 0, 0)), "expected missing to be one or two shares"),
        (lambda: block_market().sample(5, missing=np.nan), "expected missing to be one or two shares"),
        (
            lambda: block_market().sample(2, missing=0.5),
            "expected at least 3 rows with missing values, got 2.",
        ),
    ],
)
def test_bad_input_is_refused_in_a_sentence(call, sentence):
    with pytest.raises(ValueError, match=r"^expected ") as error:
        call()
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


def test_a_market_of_ones_own():
    market = BlockMarket(mean=np.zeros(4), volatility=np.full(4, 0.01), group_size=2, rho=0.5)
    np.testing.assert_allclose(market.minimum_variance_weights(), 0.25)
