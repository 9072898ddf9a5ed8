"""Factor analysis with volatilities and holes: against dense normals row by row, scikit-learn, planted truths, nulls."""

import math

import numpy as np
import pytest
import torch
from sklearn.decomposition import FactorAnalysis

from finediff.diffusion.exact import choose_factors, eigenvalue_ratio, fit_factors
from finediff.markets import factor_market

D, K = 8, 2


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def truth(d=D, k=K, seed=5):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(d, k)), rng.uniform(0.3, 1.5, d), rng.normal(size=d)


def rows(n=300, d=D, k=K, seed=0, df=None, holes=0.0):
    """m + sqrt(v) B f + sqrt(u) e with 1/v and 1/u Gamma of df degrees of freedom and mean 1 of v and u."""
    rng = np.random.default_rng(seed)
    B, own, mean = truth(d, k)
    v, u = np.ones((2, n, 1)) if df is None else (df - 2) / rng.chisquare(df, (2, n, 1))
    X = (
        mean
        + np.sqrt(v) * rng.normal(size=(n, k)) @ B.T
        + np.sqrt(u) * rng.normal(size=(n, d)) * np.sqrt(own)
    )
    X[rng.uniform(size=X.shape) < holes] = np.nan
    return torch.tensor(X)


def same(one, other, rtol=1e-8, atol=1e-8):
    for name in ("mean", "loadings", "variance", "weights", "scales_common", "scales_own"):
        torch.testing.assert_close(
            getattr(one, name), getattr(other, name), rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}"
        )


def dense_log_density(fit, X):
    """log p of what each row has: the sum over (v, u) of normals with dense covariances, one row at a time."""
    out, v, u = [], fit.scales_common[:, None, None, None], fit.scales_own[:, None, None]
    for x in X:
        o = ~x.isnan()
        if not o.any():
            out.append(torch.tensor(0.0).double())
            continue
        C = v * (fit.loadings[o] @ fit.loadings[o].T) + u * fit.variance[o].diag()
        logs = torch.distributions.MultivariateNormal(fit.mean[o], C).log_prob(x[o]) + fit.weights.log()
        out.append(logs.flatten().logsumexp(0))
    return torch.stack(out)


# -------------------------------------------------------------------------------------------- the likelihood


@pytest.mark.parametrize("k", [0, 2, D])
@pytest.mark.parametrize("heavy_tails", [True, False])
@pytest.mark.parametrize("holes", [0.0, 0.4])
def test_the_likelihood_is_that_of_dense_covariances_row_by_row(k, heavy_tails, holes):
    X = rows(40, df=4, holes=holes)
    X[7] = torch.nan if holes else X[7]
    fit = fit_factors(X, k, heavy_tails=heavy_tails, iterations=20)
    expected = dense_log_density(fit, X)
    torch.testing.assert_close(fit.log_density(X), expected, rtol=1e-9, atol=1e-9)
    assert fit.log_likelihoods[-1] == pytest.approx(float(expected.mean()), abs=1e-9)
    other = rows(5, df=3, seed=9, holes=0.3)
    torch.testing.assert_close(fit.log_density(other), dense_log_density(fit, other), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("k", [0, 2])
@pytest.mark.parametrize("heavy_tails", [True, False])
@pytest.mark.parametrize("holes", [0.0, 0.3])
def test_the_likelihood_never_decreases(k, heavy_tails, holes):
    """... but for the one row's worth of prior days, which cannot lose more than it holds."""
    X, n = rows(200, df=4, holes=holes), 200
    trace = np.array(
        fit_factors(X, k, heavy_tails=heavy_tails, tolerance=-1.0, iterations=40).log_likelihoods
    )
    assert len(trace) == 41
    assert (np.diff(trace) > (-0.05 / n if heavy_tails else -1e-10)).all()
    assert trace[-1] > trace[0] + 0.01 or not (k or heavy_tails)


@pytest.mark.parametrize("holes", [0.0, 0.2])
@pytest.mark.parametrize("heavy_tails", [True, False])
def test_the_end_is_a_maximum(heavy_tails, holes):
    """Gradients of the dense likelihood in B, D and m vanish, by autograd of nothing of the code's."""
    X = rows(60, d=4, k=1, df=4, holes=holes)
    fit = fit_factors(X, 1, heavy_tails=heavy_tails, iterations=500, tolerance=1e-15)
    B, log_own, mean = (v.clone().requires_grad_(True) for v in (fit.loadings, fit.variance.log(), fit.mean))
    total = 0.0
    for x in X:
        o = ~x.isnan()
        if not o.any():
            continue
        C = fit.scales_common[:, None, None, None] * (B[o] @ B[o].T) + fit.scales_own[
            :, None, None
        ] * torch.diag(log_own[o].exp())
        logs = torch.distributions.MultivariateNormal(mean[o], C).log_prob(x[o]) + fit.weights.log()
        total = total + logs.flatten().logsumexp(0)
    for slope in torch.autograd.grad(total / len(X), (B, log_own, mean)):
        assert float(slope.abs().max()) < 5e-4


def test_the_weights_of_days_are_their_mean_posterior():
    """... with one row's worth of prior, so that the end is a fixed point."""
    X, n = rows(60, df=3, seed=4), 60
    fit = fit_factors(X, 1, iterations=600, tolerance=1e-15)
    covariances = (
        fit.scales_common[:, None, None, None] * (fit.loadings @ fit.loadings.T)
        + fit.scales_own[:, None, None] * fit.variance.diag()
    )
    law = torch.distributions.MultivariateNormal(fit.mean, covariances)
    joint = law.log_prob(X[:, None, None]) + fit.weights.log()
    posterior = joint.flatten(1).softmax(1).sum(0).reshape_as(fit.weights)
    prior = (n + 1) * fit.weights - posterior
    assert float(prior.abs().sum()) == pytest.approx(1, abs=0.1)
    assert float((fit.weights @ fit.scales_own).sum() - 1) == pytest.approx(0, abs=1e-12)
    assert float((fit.scales_common @ fit.weights).sum() - 1) == pytest.approx(0, abs=1e-12)


# ---------------------------------------------------------------------------------------- scikit-learn's twin


@pytest.mark.parametrize(("n", "d", "k"), [(300, 8, 2), (60, 12, 3), (400, 6, 1), (25, 20, 2)])
def test_gaussian_rows_are_scikit_learn_s_factor_analysis(n, d, k):
    X = rows(n, d, k)
    ours = fit_factors(X, k, heavy_tails=False, iterations=20_000, tolerance=1e-13)
    theirs = FactorAnalysis(k, tol=1e-12, max_iter=20_000, svd_method="lapack").fit(X.numpy())
    # scikit-learn adds 1e-12 to variances and stops by its own rule; a maximum above its own is allowed.
    assert ours.log_likelihoods[-1] == pytest.approx(theirs.score(X.numpy()), abs=1e-6)
    np.testing.assert_allclose(ours.variance, theirs.noise_variance_, rtol=1e-3, atol=1e-4)
    covariance = ours.loadings @ ours.loadings.T + ours.variance.diag()
    np.testing.assert_allclose(covariance, theirs.get_covariance(), atol=2e-4 * float(covariance.max()))
    np.testing.assert_allclose(ours.mean, X.mean(0), atol=1e-6)


def test_one_asset_and_no_factor_is_the_normal_law():
    X = rows(50, 1, 1)
    fit = fit_factors(X, 0, heavy_tails=False)
    assert float(fit.mean) == pytest.approx(float(X.mean()), rel=1e-12)
    assert float(fit.variance) == pytest.approx(float(X.var(correction=0)), rel=1e-12)
    free = 2 * math.log(50)
    assert fit.bic == pytest.approx(-2 * float(fit.log_density(X).sum()) + free, rel=1e-12)


@pytest.mark.parametrize("k", [1, 3])
def test_bic_counts_what_is_free(k):
    """Mean, own variance and loadings up to a rotation; the days' laws cost the same at every k."""
    X = rows(100)
    fit = fit_factors(X, k, heavy_tails=False)
    free = 2 * D + D * k - k * (k - 1) // 2
    assert fit.bic == pytest.approx(-2 * float(fit.log_density(X).sum()) + free * math.log(100), rel=1e-10)
    gaps = [
        fit_factors(X, k).bic + 2 * float(fit_factors(X, k).log_density(X).sum()) - math.log(100) * free,
        fit_factors(X, 0).bic + 2 * float(fit_factors(X, 0).log_density(X).sum()) - math.log(100) * 2 * D,
    ]
    assert gaps[0] == pytest.approx(gaps[1], abs=1e-6)


# ----------------------------------------------------------------------------------------------- canonical form


@pytest.mark.parametrize("holes", [0.0, 0.2])
def test_loadings_come_in_one_form(holes):
    fit = fit_factors(rows(df=5, holes=holes, k=3), 3)
    scaled = fit.loadings / fit.variance.sqrt()[:, None]
    lengths = scaled.square().sum(0)
    torch.testing.assert_close(
        scaled.T @ scaled, lengths.diag(), rtol=1e-10, atol=1e-10 * float(lengths.max())
    )
    assert (lengths.diff() < 0).all()
    assert (scaled.sum(0) > 0).all()


# ---------------------------------------------------------------------------------------------------- equivariance


@pytest.mark.parametrize("holes", [0.0, 0.3])
@pytest.mark.parametrize("heavy_tails", [True, False])
def test_permuted_assets_permute_the_parameters(heavy_tails, holes):
    X, order = rows(df=4, holes=holes), torch.randperm(D, generator=seeded(1))
    one = fit_factors(X, K, heavy_tails=heavy_tails)
    other = fit_factors(X[:, order], K, heavy_tails=heavy_tails)
    for name in ("mean", "loadings", "variance"):
        torch.testing.assert_close(getattr(other, name), getattr(one, name)[order], rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(other.weights, one.weights, rtol=1e-8, atol=1e-8)
    assert other.bic == pytest.approx(one.bic, rel=1e-10)


@pytest.mark.parametrize("holes", [0.0, 0.3])
def test_units_of_the_assets_are_units_of_the_parameters(holes):
    X, unit = rows(df=4, holes=holes), torch.logspace(-3, 3, D, dtype=torch.float64)
    one, other = fit_factors(X, K), fit_factors(X * unit + 2 * unit, K)
    torch.testing.assert_close(other.mean / unit, one.mean + 2, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(other.loadings / unit[:, None], one.loadings, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(other.variance / unit**2, one.variance, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(other.weights, one.weights, rtol=1e-7, atol=1e-7)
    # Every entry of X brings one log unit.
    moved = -2 * ((~X.isnan()).double() @ -unit.log()).sum()
    assert other.bic == pytest.approx(one.bic + float(moved), rel=1e-6)


def test_the_order_of_the_rows_does_not_matter_to_the_maximum():
    X, settings = rows(), {"heavy_tails": False, "iterations": 3000, "tolerance": 1e-14}
    one, other = (fit_factors(x, K, **settings) for x in (X, X.flip(0)))
    same(one, other, rtol=1e-4, atol=1e-5)
    assert other.log_likelihoods[-1] == pytest.approx(one.log_likelihoods[-1], abs=1e-10)


# --------------------------------------------------------------------------------------------------- missing entries


def test_nothing_missing_is_the_complete_fit():
    """The path for holes, taken because of one extra row in which nothing is seen, ends where the other ends."""
    X = rows(df=4)
    for heavy_tails in (True, False):
        settings = {"heavy_tails": heavy_tails, "iterations": 40, "tolerance": -1.0}
        complete, holes = fit_factors(X, K, **settings), Rowless(X, K, settings)
        for name in ("mean", "loadings", "variance", "weights"):
            torch.testing.assert_close(
                getattr(holes, name),
                getattr(complete, name),
                rtol=1e-6,
                atol=1e-7,
                msg=lambda m, n=name: f"{n}: {m}",
            )


def Rowless(X, k, settings):
    """The same rows through the code for patterns."""
    import finediff.diffusion.exact.factor_fit as module

    class Patterned(module.Rows):
        def __init__(self, X):
            super().__init__(X)
            self.complete = False
            self.patterns, self.index = torch.unique(self.mask, dim=0, return_inverse=True)

    kept = module.Rows
    module.Rows = Patterned
    try:
        return fit_factors(X, k, **settings)
    finally:
        module.Rows = kept


def test_a_row_in_which_nothing_is_seen_says_nothing():
    X = rows(150, df=4, holes=0.2)
    more = torch.cat([X[:70], torch.full((5, D), torch.nan).double(), X[70:]])
    settings = {"heavy_tails": False, "iterations": 3000, "tolerance": 1e-14}
    one, other = fit_factors(X, 1, **settings), fit_factors(more, 1, **settings)
    for name in ("mean", "loadings", "variance"):
        torch.testing.assert_close(getattr(other, name), getattr(one, name), rtol=1e-4, atol=1e-4)


def test_late_listings_and_deaths_leave_the_truth_within_its_standard_errors():
    """Mean, covariance of every pair and own variances, over repeated panels; dropping dates would lose most of them."""
    market = factor_market(8, 1, random_state=3, periods_per_year=1)
    found = []
    for seed in range(16):
        X = torch.tensor(market.sample(400, random_state=seed, missing=0.3))
        assert X.isnan().any()
        fit = fit_factors(X, 1, heavy_tails=False)
        covariance = fit.loadings @ fit.loadings.T + fit.variance.diag()
        found.append(torch.cat([fit.mean, covariance.flatten(), fit.variance]))
    found = torch.stack(found)
    wanted = torch.cat(
        [
            torch.tensor(v.copy()).flatten()
            for v in (market.mean, market.covariance, market.idiosyncratic_variance)
        ]
    )
    error = found.std(0) / math.sqrt(len(found))
    # The likelihood's variances are small by about (k + 1)/n of themselves.
    z = (found.mean(0) - wanted).abs() / (error + 1.5 / 300 * wanted.abs())
    print(f"\nlargest z {float(z.max()):.2f}")
    assert float(z.max()) < 4


def test_holes_cost_less_than_the_rows_that_they_are_in():
    """The covariance from all entries is nearer than that of the dates on which all assets are listed."""
    market = factor_market(8, 1, random_state=3, periods_per_year=1)
    wanted, errors = torch.tensor(market.covariance), []
    for seed in range(12):
        X = torch.tensor(market.sample(200, random_state=100 + seed, missing=0.3))
        fits = (fit_factors(Y, 1, heavy_tails=False) for Y in (X, X[~X.isnan().any(1)]))
        errors.append([float((f.loadings @ f.loadings.T + f.variance.diag() - wanted).norm()) for f in fits])
    gain = np.diff(errors)[:, 0]
    assert gain.mean() > 2 * gain.std() / math.sqrt(len(gain))


def test_a_column_with_few_entries_keeps_finite_parameters():
    X = rows(100, df=4)
    X[:-3, 0] = torch.nan
    fit = fit_factors(X, 3)
    assert fit.loadings.isfinite().all()
    assert (fit.variance > 0).all()
    seen = X[:, 1:]
    alone = fit_factors(seen, 3)
    torch.testing.assert_close(
        (fit.loadings @ fit.loadings.T)[1:, 1:], alone.loadings @ alone.loadings.T, rtol=0.1, atol=0.1
    )


# ------------------------------------------------------------------------------------------------------- heavy tails


LOG_V, LOG_U = 1.0, 0.5


def two_point(n, d, k, seed):
    """v = e^-1 or e, u = e^-.5 or e^.5, as likely and independent."""
    rng = np.random.default_rng(seed)
    B, own, mean = truth(d, k)
    v, u = (np.exp(size * rng.choice([-1.0, 1.0], (n, 1))) for size in (LOG_V, LOG_U))
    return torch.tensor(
        mean
        + np.sqrt(v) * rng.normal(size=(n, k)) @ B.T
        + np.sqrt(u) * rng.normal(size=(n, d)) * np.sqrt(own)
    )


@pytest.fixture(scope="module")
def planted():
    return fit_factors(two_point(1000, 12, 4, 1), 4)


def test_planted_volatilities_are_recovered(planted):
    """E[v^2]/E[v]^2 is a third of a factor's kurtosis: cosh(2 h)/cosh(h)^2; covariance with E[v] = E[u] = 1."""
    B, own, _ = truth(12, 4)
    covariance = planted.loadings @ planted.loadings.T + planted.variance.diag()
    wanted = torch.tensor(math.cosh(LOG_V) * B @ B.T + math.cosh(LOG_U) * np.diag(own))
    assert float((covariance - wanted).norm() / wanted.norm()) < 0.1
    for scales, weights, size, dimensions in (
        (planted.scales_common, planted.weights.sum(1), LOG_V, 4),
        (planted.scales_own, planted.weights.sum(0), LOG_U, 8),
    ):
        assert float(weights @ scales) == pytest.approx(1, abs=1e-12)
        expected = math.cosh(2 * size) / math.cosh(size) ** 2
        # Of a mean of 1,000 squared chi-squares in so many dimensions, each a relative error of about 2/sqrt(k).
        error = expected * 3 / math.sqrt(1000 * dimensions)
        found = float(weights @ scales**2)
        print(f"\nE[v^2] {found:.3f}, planted {expected:.3f} +- {error:.3f}")
        assert found == pytest.approx(expected, abs=4 * error)
    dependent = planted.weights - planted.weights.sum(1)[:, None] * planted.weights.sum(0)
    correlation = planted.scales_common.log() @ dependent @ planted.scales_own.log()
    assert abs(float(correlation)) < 0.15 * LOG_V * LOG_U


def test_the_fitted_law_is_nearly_as_likely_as_the_true_one(planted):
    """On rows not seen, in nats: half the number of parameters over the rows, and no more than twice that."""
    B, own, mean = (torch.tensor(v) for v in truth(12, 4))
    test = two_point(3000, 12, 4, 2)
    days = [
        torch.distributions.MultivariateNormal(
            mean, math.exp(a * LOG_V) * B @ B.T + math.exp(b * LOG_U) * own.diag()
        ).log_prob(test)
        for a in (-1, 1)
        for b in (-1, 1)
    ]
    loss = torch.stack(days, 1).logsumexp(1) - math.log(4) - planted.log_density(test)
    free = (12 * 6 - 6 + 24) / (2 * 1000)
    print(f"\n{float(loss.mean()):.4f} nats below the truth, {free:.4f} expected")
    assert -4 * float(loss.std()) / math.sqrt(3000) < float(loss.mean()) < 2 * free


def test_one_volatility_for_all_is_seen_as_one():
    """v = u on every day: the joint law lies along the diagonal."""
    rng, n = np.random.default_rng(2), 800
    mean = torch.tensor(truth(12, 3)[2])
    size = torch.tensor(np.exp(0.7 * rng.normal(size=(n, 1))))
    fit = fit_factors(mean + size * (rows(n, 12, 3, seed=2) - mean), 3)
    W = fit.weights
    a, b = fit.scales_common.log(), fit.scales_own.log()
    a, b = a - W.sum(1) @ a, b - W.sum(0) @ b
    correlation = a @ W @ b / ((W.sum(1) @ a**2) * (W.sum(0) @ b**2)).sqrt()
    assert float(correlation) > 0.9


def test_gaussian_rows_find_little_spread_of_volatility():
    X = rows(1000, 10, 3, seed=1)
    fit, gaussian = (fit_factors(X, 3, heavy_tails=heavy) for heavy in (True, False))
    for scales, weights in ((fit.scales_common, fit.weights.sum(1)), (fit.scales_own, fit.weights.sum(0))):
        print(f"\nkurtosis {3 * float(weights @ scales**2):.3f}")
        assert 3 * float(weights @ scales**2) < 3.4
    assert fit.log_likelihoods[-1] - gaussian.log_likelihoods[-1] < 0.01


def test_the_heavier_law_is_likelier_on_rows_not_seen():
    X, test = rows(600, df=4, seed=1), rows(600, df=4, seed=2)
    gain = fit_factors(X, 2).log_density(test) - fit_factors(X, 2, heavy_tails=False).log_density(test)
    assert float(gain.mean()) > 4 * float(gain.std()) / math.sqrt(600)
    X, test = rows(600), rows(600, seed=2)
    loss = fit_factors(X, 2).log_density(test) - fit_factors(X, 2, heavy_tails=False).log_density(test)
    assert abs(float(loss.mean())) < 0.02


# ----------------------------------------------------------------------------------------------- how many factors


NOISE = {
    "gaussian": lambda rng, n, d: rng.normal(size=(n, d)),
    "t(6) entries": lambda rng, n, d: rng.standard_t(6, (n, d)),
    "t(4) days": lambda rng, n, d: rng.normal(size=(n, d)) / np.sqrt(rng.chisquare(4, (n, 1)) / 4),
}


@pytest.mark.parametrize("law", NOISE)
@pytest.mark.parametrize("seed", range(2))
def test_no_factors_in_none_out(law, seed):
    X = torch.tensor(NOISE[law](np.random.default_rng(seed), 300, 20) * np.geomspace(0.1, 10, 20))
    assert choose_factors(X).loadings.shape[1] == 0
    assert eigenvalue_ratio(X) == 0
    if law == "gaussian":
        assert choose_factors(X, heavy_tails=False).loadings.shape[1] == 0


@pytest.mark.parametrize("seed", range(8))
def test_loud_entries_are_no_factor_to_the_spectrum(seed):
    """Infinite kurtosis, each entry on its own: the likelihood may see a factor of one asset, the spectrum does not."""
    assert eigenvalue_ratio(torch.tensor(np.random.default_rng(seed).standard_t(4, (300, 20)))) == 0


@pytest.mark.parametrize(("df", "k", "holes"), [(None, 1, 0.0), (None, 3, 0.2), (4, 1, 0.2), (4, 3, 0.0)])
def test_the_planted_number_of_factors_is_found(df, k, holes):
    X = rows(400, 20, k, df=df, seed=k, holes=holes)
    fit = choose_factors(X)
    assert fit.loadings.shape == (20, k)
    assert eigenvalue_ratio(X) == k
    # The one chosen is fitted to the end, from wherever the counting left it.
    assert fit.log_likelihoods[-1] > fit_factors(X, k).log_likelihoods[-1] - 1e-3


def test_a_limit_on_the_number_is_kept():
    X = rows(400, 20, 3, seed=3)
    assert choose_factors(X, most=2).loadings.shape[1] == 2
    assert choose_factors(X, most=0).loadings.shape[1] == 0
    assert eigenvalue_ratio(X, most=2) <= 2


# ------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("X", "k", "message"),
    [
        (torch.zeros(5), 1, "expected X of shape"),
        (rows(10), -1, "expected 0 to 8 factors for 10 rows of 8 assets, got -1"),
        (rows(10), 9, "expected 0 to 8 factors"),
        (rows(5), 5, "expected 0 to 4 factors"),
        (rows(10) * torch.tensor([1.0, 0, 1, 1, 1, 1, 1, 1]), 1, "expected columns that vary"),
        (torch.where(torch.arange(80).reshape(10, 8) % 8 == 0, torch.nan, rows(10)), 1, "at least 2 entries"),
    ],
)
def test_wrong_arguments_are_refused(X, k, message):
    with pytest.raises(ValueError, match=message) as caught:
        fit_factors(X, k)
    assert "\n" not in str(caught.value)
