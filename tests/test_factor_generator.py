"""The factor-structured generator: its law against dense twins, two ways to draw it, gaps, units, stress, saving."""

import math
from copy import copy

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats

from finediff.covariance import ScenarioCovariance
from finediff.diffusion.exact import fit_factors
from finediff.diffusion.likelihood import held_out_nats
from finediff.diffusion.process import VP
from finediff.diffusion.sample import DPMSolver, ProbabilityFlow
from finediff.generators import FactorDiffusionGenerator, ScenarioGenerator
from finediff.markets import factor_market
from finediff.validation import cvm_portfolio_test

D, K = 20, 2
NAMES = [f"A{j:02d}" for j in range(D)]


def market(df=5):
    return factor_market(D, K, random_state=4, df=df, factor_share=0.5)


def panel(n=400, seed=1, df=5, missing=0.0) -> pd.DataFrame:
    return pd.DataFrame(market(df).sample(n, random_state=seed, missing=missing), columns=NAMES)


def separate(n, seed, k=3, df=4) -> pd.DataFrame:
    """Factors that are Student t each on its own: beyond one volatility for all of them."""
    rng, at = np.random.default_rng(seed), np.random.default_rng(7)
    B, own = at.normal(size=(D, k)), at.uniform(0.2, 1, D)
    F = rng.normal(size=(n, k)) if df is None else rng.standard_t(df, (n, k)) * math.sqrt((df - 2) / df)
    return pd.DataFrame(0.01 * (F @ B.T + rng.normal(size=(n, D)) * np.sqrt(own)), columns=NAMES)


def factor(**arguments):
    return FactorDiffusionGenerator(**{"random_state": 0, "device": "cpu"} | arguments)


@pytest.fixture(scope="module")
def fitted():
    return factor().fit(panel())


@pytest.fixture(scope="module")
def gappy():
    return factor(n_factors=K).fit(panel(missing=0.3))


@pytest.fixture(scope="module")
def learned():
    generator = factor(n_factors=3).fit(separate(1000, 1))
    assert generator.residual_ is not None
    return generator


def worst_z(values):
    values = np.asarray(values).reshape(len(values), -1)
    return float(np.abs(values.mean(0) / (values.std(0) / math.sqrt(len(values)))).max())


def days_of(generator):
    """(weight, covariance) of every Gaussian day, in returns, from the public parts."""
    fit, B, own = generator.fit_, generator.loadings_, np.diag(generator.idiosyncratic_variance_)
    for v, line in zip(fit.scales_common.tolist(), fit.weights.tolist()):
        for u, w in zip(fit.scales_own.tolist(), line):
            if w > 0:
                yield w, v * B @ B.T + u * own


def dense_log_density(generator, X):
    out = []
    for x in np.asarray(X):
        o = np.flatnonzero(~np.isnan(x) & generator.scaler_.moving_)
        each = [
            math.log(w) + stats.multivariate_normal(generator.mean_[o], S[np.ix_(o, o)]).logpdf(x[o])
            for w, S in days_of(generator)
        ]
        out.append(np.logaddexp.reduce(each))
    return np.array(out)


# ------------------------------------------------------------------------------------------- what is fitted


def test_the_parts_are_the_ones_stated(gappy):
    """Each asset to unit variance over what it has, the likeliest model, factor eigenvalues shrunk with trace kept."""
    X = panel(missing=0.3).to_numpy()
    mean, scale = np.nanmean(X, 0), np.nanstd(X, 0)
    fit = fit_factors(torch.tensor((X - mean) / scale), K)
    np.testing.assert_allclose(gappy.mean_, mean + scale * fit.mean.numpy(), rtol=1e-8, atol=1e-12)
    # Volatilities rarer than .05 days are dropped, and the others' mean is 1 again.
    kept = torch.where(fit.weights.sum(0) > 0.05 / len(X), fit.weights, 0.0)
    kept /= kept.sum()
    own, common = float(kept.sum(0) @ fit.scales_own), float(kept.sum(1) @ fit.scales_common)
    np.testing.assert_allclose(
        gappy.idiosyncratic_variance_, scale**2 * own * fit.variance.numpy(), rtol=1e-8
    )
    likeliest, ours = math.sqrt(common) * fit.loadings.numpy(), gappy.loadings_ / scale[:, None]
    before, after = (np.linalg.eigvalsh(B.T @ B) for B in (likeliest, ours))
    assert after.sum() == pytest.approx(before.sum(), rel=1e-10)
    assert after.max() / after.min() < before.max() / before.min()
    # Only the eigenvalues: the eigenvectors of B B' are those of the likeliest one.
    U, V = (np.linalg.svd(B, full_matrices=False)[0] for B in (likeliest, ours))
    np.testing.assert_allclose(np.abs(np.sum(U * V, 0)), 1, atol=1e-8)


def test_the_true_covariance_is_found_within_its_standard_error(gappy, fitted):
    """Against that of complete rows of the same length: late listings may cost what they miss, not more."""
    wanted = market().covariance
    for generator, X, most in ((fitted, panel(), 1.0), (gappy, panel(missing=0.3), 1.5)):
        error = np.linalg.norm(generator.covariance_ - wanted)
        assert error < most * np.linalg.norm(np.cov(panel().T) - wanted)
        standard = np.nanstd(X, 0) / np.sqrt(np.isfinite(X.to_numpy()).sum(0))
        assert (np.abs(generator.mean_ - market().mean) < 4 * standard).all()


@pytest.mark.parametrize("name", ["fitted", "gappy"])
def test_the_density_is_that_of_dense_covariances(name, request):
    generator = request.getfixturevalue(name)
    X = panel(25, seed=9)
    X = X.mask(np.random.default_rng(0).uniform(size=X.shape) < 0.3)
    X.iloc[3] = panel(1, seed=8).iloc[0]
    np.testing.assert_allclose(generator.log_density(X), dense_log_density(generator, X), rtol=1e-9)


def test_the_density_is_higher_on_other_days_than_a_gaussian_factor_model_s(fitted):
    test = panel(1000, seed=2)
    gain = fitted.log_density(test) - factor(n_factors=K, heavy_tails=False).fit(panel()).log_density(test)
    assert gain.mean() > 4 * gain.std() / math.sqrt(len(gain))


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("rule", ["auto", "eigenvalue ratio"])
def test_noise_has_no_factors_and_learns_nothing(rule, seed):
    rng = np.random.default_rng(seed)
    day = np.sqrt(2 / rng.chisquare(4, (400, 1))) if seed % 2 else 1.0
    generator = factor(n_factors=rule).fit(0.01 * day * rng.normal(size=(400, D)) * np.geomspace(0.3, 3, D))
    assert generator.n_factors_ == 0
    assert generator.loadings_.shape == (D, 0)
    assert generator.residual_nats_ == 0
    assert "0 factors" in generator.fit_summary_
    np.testing.assert_array_equal(generator.covariance_, np.diag(generator.idiosyncratic_variance_))


@pytest.mark.parametrize("rule", ["auto", "eigenvalue ratio"])
def test_the_planted_number_of_factors_is_found(rule):
    """Factors of about one size, which the spectrum needs."""
    X = separate(300, 2, df=None)
    X.iloc[:120, :5] = np.nan
    assert factor(n_factors=rule, residual=False).fit(X).n_factors_ == 3


@pytest.mark.parametrize("heavy_tails", [True, False])
@pytest.mark.parametrize("k", [0, 8, 10])
def test_more_factors_than_there_are_is_allowed(k, heavy_tails):
    """Up to one for each asset, on noise, where the likelihood sets some of them to nothing."""
    X = np.random.default_rng(0).normal(size=(300, 10)) / 100
    generator = factor(n_factors=k, heavy_tails=heavy_tails).fit(X)
    assert generator.n_factors_ <= k  # without those that came out empty
    scenarios = generator.sample(4000)
    # Of the panel, or of the truth, whose correlations are none: either is within their standard error of the panel.
    assert np.abs(np.corrcoef(scenarios.T) - np.corrcoef(X.T)).max() < 3.5 / math.sqrt(300)
    assert np.abs(scenarios.std(0) / X.std(0) - 1).max() < 0.15


def test_loadings_come_in_one_form(fitted):
    """As documented: columns close to orthogonal in the metric of the own variances, the strongest first."""
    B, own = fitted.loadings_, fitted.idiosyncratic_variance_
    G = B.T @ (B / own[:, None])
    lengths = np.diag(G)
    assert (np.diff(lengths) < 0).all()
    np.testing.assert_allclose(G / np.sqrt(np.outer(lengths, lengths)), np.eye(K), atol=0.05)


@pytest.mark.parametrize("name", ["fitted", "learned"])
def test_factors_go_with_the_loadings(name, request):
    """What the factors leave of a row is orthogonal to the loadings: the normal equations of least squares."""
    generator = request.getfixturevalue(name)
    X = panel(50, seed=3) if name == "fitted" else separate(50, 3)
    f = generator.factors(X)
    assert f.index.equals(X.index)
    left = X.to_numpy() - generator.mean_ - f.to_numpy() @ generator.loadings_.T
    slopes = left @ (generator.loadings_ / generator.idiosyncratic_variance_[:, None])
    size = np.abs(X.to_numpy() @ (generator.loadings_ / generator.idiosyncratic_variance_[:, None])).max()
    assert np.abs(slopes).max() < 1e-8 * size


# ----------------------------------------------------------------------------------------------- covariance


@pytest.mark.parametrize("name", ["fitted", "gappy"])
def test_the_closed_covariance_is_that_of_the_scenarios(name, request):
    generator = request.getfixturevalue(name)
    B, own = generator.loadings_, generator.idiosyncratic_variance_
    np.testing.assert_allclose(generator.covariance_, B @ B.T + np.diag(own), rtol=1e-12)
    total = sum(w * S for w, S in days_of(generator))
    # Volatilities so rare that they are dropped take a little of the variance along.
    np.testing.assert_allclose(total, generator.covariance_, rtol=5e-3)
    x = generator.sample(30_000, random_state=5).to_numpy() - generator.mean_
    assert worst_z(x) < 4.5
    assert worst_z(x[:, :, None] * x[:, None, :] - generator.covariance_) < 5


def test_the_learned_law_has_the_closed_covariance(learned):
    """... as far as 16,384 draws, of which most noise cancels, can tell."""
    x = learned.sample(30_000, random_state=5)
    spread = np.sqrt(np.diag(learned.covariance_))
    assert float(np.abs(x.var() / spread**2 - 1).max()) < 0.06
    assert np.abs((np.cov(x.T) - learned.covariance_) / np.outer(spread, spread)).max() < 0.06
    assert float(np.abs((x.mean() - learned.mean_) / spread).max()) < 0.03


def test_fitting_again_forgets(fitted):
    again = factor(n_factors=3, levels=12).fit(separate(1000, 1))
    assert again.residual_nats_ > 0
    assert not np.allclose(again.covariance_, fitted.covariance_)
    again.set_params(n_factors="auto", levels=16).fit(panel())
    np.testing.assert_array_equal(again.covariance_, fitted.covariance_)
    assert again.residual_nats_ == fitted.residual_nats_
    pd.testing.assert_frame_equal(again.sample(50), fitted.sample(50), check_exact=True)


def test_scenario_covariance_takes_the_closed_form(fitted):
    estimate = ScenarioCovariance(fitted, prefit=True, scale="scenarios").fit(panel())
    assert estimate.source_ == "implied"
    np.testing.assert_allclose(estimate.covariance_, fitted.covariance_, rtol=1e-12)
    np.testing.assert_allclose(estimate.location_, fitted.mean_, rtol=1e-12)


# -------------------------------------------------------------------------------------- two ways to one law


@pytest.mark.parametrize(
    ("name", "sampler"),
    [
        ("fitted", ProbabilityFlow(steps=32, method="heun")),
        ("gappy", DPMSolver(steps=24)),
        ("learned", DPMSolver(steps=24)),
    ],
)
def test_exact_scenarios_and_the_reverse_process_have_one_law(name, sampler, request):
    """Cramer-von Mises on 200 random portfolios, against splits of exact draws: the middle one of three draws."""
    generator, found = request.getfixturevalue(name), []
    other = copy(generator).set_params(sampler=sampler)
    for seed in range(3):
        exact = generator.sample(3000, random_state=10 + seed)
        process = other.sample(1200, random_state=20 + seed)
        result = cvm_portfolio_test(exact, process, n_portfolios=200, n_null=100, random_state=seed)
        print(f"\nrejected {result.rejection_rate:.3f}, null {result.null_mean:.3f}, p {result.p_value:.2f}")
        found.append(result.p_value)
        size = [np.sqrt(np.square((x - generator.mean_) / exact.std()).sum(axis=1)) for x in (exact, process)]
        assert stats.ks_2samp(*size).pvalue > 1e-3
    assert np.median(found) > 0.05


def test_scenarios_have_the_law_of_the_density():
    """Kolmogorov-Smirnov on portfolios against the mixture of days."""
    generator = factor(n_factors=K, residual=False).fit(panel(200))
    x = generator.sample(20_000).to_numpy()
    days = list(days_of(generator))
    for w in np.random.default_rng(0).normal(size=(4, D)):
        m, s = generator.mean_ @ w, [math.sqrt(w @ S @ w) for _, S in days]
        cdf = lambda y, m=m, s=s: sum(p * stats.norm.cdf(y, m, c) for (p, _), c in zip(days, s))  # noqa: E731
        assert stats.kstest(x @ w, cdf).pvalue > 1e-3


# ------------------------------------------------------------------------------------------ the learned part


def test_separate_tails_of_the_factors_are_learned(learned):
    """On days not seen, by I-MMSE over the base's score; cross-validation said so."""
    base = factor(n_factors=3, residual=False).fit(separate(1000, 1))
    assert base.residual_nats_ == 0
    z = torch.tensor(learned.scaler_.transform(separate(1500, 2).to_numpy()))
    gain = held_out_nats(
        learned.score_model_, z, base.score_model_, repeats=1, generator=torch.Generator().manual_seed(1)
    )
    print(
        f"\n{learned.residual_nats_:.4f} cross-validated, {gain.gain:.4f} +- {gain.standard_error:.4f} held out"
    )
    assert gain.gain > 3 * gain.standard_error
    assert learned.residual_nats_ == pytest.approx(gain.gain, abs=4 * gain.standard_error)
    assert f"{learned.residual_nats_:.3f} nats" in learned.fit_summary_


def test_gaussian_factors_learn_nothing():
    """... on most panels, and next to nothing where chance says otherwise."""
    generators = [factor(n_factors=3).fit(separate(400, seed, df=None)) for seed in range(3)]
    found = [g.residual_nats_ for g in generators]
    print(f"\n{found}")
    assert np.median(found) == 0
    assert max(found) < 0.005
    for generator, nats in zip(generators, found):
        assert (generator.residual_ is None) == (nats == 0)
        assert ("no residual" in generator.fit_summary_) == (nats == 0)


def test_gaps_do_not_stop_the_regression(learned):
    X = separate(1000, 1)
    X.iloc[:300, :4] = np.nan
    X.iloc[800:, 6:9] = np.nan
    generator = factor(n_factors=3).fit(X)
    assert generator.residual_nats_ == pytest.approx(learned.residual_nats_, rel=0.7)


def test_few_rows_learn_nothing():
    assert factor(n_factors=3).fit(separate(199, 1)).residual_nats_ == 0


# ------------------------------------------------------------------------------------------- equivariance


def test_permuted_assets_permute_the_parameters_and_the_law(fitted):
    order = np.random.default_rng(3).permutation(D)
    other = factor().fit(panel().iloc[:, order])
    np.testing.assert_allclose(other.loadings_, fitted.loadings_[order], rtol=1e-8, atol=1e-10)
    np.testing.assert_allclose(
        other.idiosyncratic_variance_, fitted.idiosyncratic_variance_[order], rtol=1e-8
    )
    np.testing.assert_allclose(other.mean_, fitted.mean_[order], rtol=1e-8, atol=1e-12)
    np.testing.assert_allclose(other.fit_.weights, fitted.fit_.weights, atol=1e-8)
    one, two = fitted.sample(4000), other.sample(4000)[NAMES]
    for w in np.random.default_rng(0).normal(size=(4, D)):
        assert stats.ks_2samp(one @ w, two @ w).pvalue > 1e-3


@pytest.mark.filterwarnings("ignore::finediff.panel.PanelWarning")
@pytest.mark.parametrize("missing", [0.0, 0.3])
def test_units_come_back_as_they_went_in(missing):
    X, unit = panel(200, missing=missing), np.geomspace(1e-3, 1e3, D)
    one, other = (factor(n_factors=K, residual=False).fit(Y) for Y in (X, X * unit))
    np.testing.assert_allclose(other.sample(200) / unit, one.sample(200), rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(other.covariance_ / np.outer(unit, unit), one.covariance_, rtol=1e-7)
    entries = np.isfinite(X).to_numpy() @ np.log(unit)
    np.testing.assert_allclose(other.log_density(X * unit), one.log_density(X) - entries, rtol=1e-7)


# --------------------------------------------------------------------------------------- gaps and constants


def test_a_date_without_any_return_says_nothing():
    X = panel(200, missing=0.2)
    rows = np.insert(X.to_numpy(), [0, 120, 120, 200], np.nan, axis=0)
    one, other = factor(n_factors=K).fit(X.to_numpy()), factor(n_factors=K).fit(rows)
    assert other.n_samples_fit_ == 204
    np.testing.assert_array_equal(one.sample(100), other.sample(100))
    assert other.log_density(rows)[0] == pytest.approx(0, abs=1e-12)


def test_late_listings_are_used():
    """One of two thirds of the rows is a shorter panel: it changes the others' parameters, and every entry counts."""
    X = panel(400)
    gaps = X.copy()
    gaps.iloc[:250, 3] = np.nan
    one, other, without = (
        factor(n_factors=K, residual=False).fit(Y) for Y in (X, gaps, gaps.drop(columns="A03"))
    )
    rest = [j for j in range(D) if j != 3]
    closer = np.linalg.norm((other.covariance_ - one.covariance_)[np.ix_(rest, rest)])
    assert closer < 0.15 * np.linalg.norm(one.covariance_[np.ix_(rest, rest)])
    gap = np.abs(without.covariance_ - other.covariance_[np.ix_(rest, rest)]).max()
    assert 0 < gap < 0.1 * np.abs(without.covariance_).max()
    short = gaps["A03"].iloc[250:]
    assert other.mean_[3] == pytest.approx(short.mean(), abs=2 * short.std() / math.sqrt(150))


def test_constant_assets_come_back_exactly_and_leave_the_others_alone():
    X = panel(300)
    with_cash = X.assign(cash=0.1, gold=-0.003)[["cash", *NAMES[:10], "gold", *NAMES[10:]]]
    with_cash.loc[:40, "gold"] = np.nan
    alone, generator = factor(n_factors=K).fit(X), factor(n_factors=K).fit(with_cash)
    scenarios = generator.sample(500)
    assert (scenarios["cash"] == 0.1).all()
    assert (scenarios["gold"] == -0.003).all()
    moving = [name in NAMES for name in with_cash]
    np.testing.assert_allclose(generator.covariance_[np.ix_(moving, moving)], alone.covariance_, rtol=1e-10)
    still = np.flatnonzero(~np.array(moving))
    assert not generator.covariance_[still].any()
    assert not generator.loadings_[still].any()
    assert generator.mean_[still].tolist() == [0.1, -0.003]
    np.testing.assert_allclose(generator.log_density(with_cash), alone.log_density(X), rtol=1e-10)
    with pytest.raises(ValueError, match="expected an asset that moves, got a stress of 'cash'"):
        generator.sample(5, stress={"cash": -0.1})
    stressed = generator.sample(50, stress={"A03": -0.02})
    np.testing.assert_allclose(stressed["A03"], -0.02, rtol=1e-6)
    assert (stressed["cash"] == 0.1).all()


# ------------------------------------------------------------------------------------------------- stress


def test_a_gaussian_stress_has_the_conditional_law():
    generator = factor(n_factors=K, heavy_tails=False, residual=False).fit(panel(df=None))
    m, S, n = generator.mean_, generator.covariance_, 20_000
    A, b = np.eye(D)[[2, 7]], np.array([-0.03, 0.02])
    x = generator.sample(n, stress={"A02": -0.03, "A07": 0.02}).to_numpy()
    np.testing.assert_allclose(x @ A.T, np.tile(b, (n, 1)), rtol=1e-6)
    gain = S @ A.T @ np.linalg.inv(A @ S @ A.T)
    rest = [j for j in range(D) if j not in (2, 7)]
    gap = (x - (m + gain @ (b - A @ m)))[:, rest]
    assert worst_z(gap) < 4.5
    conditional = (S - gain @ A @ S)[np.ix_(rest, rest)]
    assert worst_z(gap[:, :, None] * gap[:, None, :] - conditional) < 5


def test_a_stress_of_heavy_tails_makes_all_assets_loud(fitted):
    """A fall by eight standard deviations comes on a loud day: mixture weights and moments by dense algebra."""
    sd = math.sqrt(fitted.covariance_[0, 0])
    b = fitted.mean_[0] - 8 * sd
    x = fitted.sample(8000, stress={"A00": b}).to_numpy()
    np.testing.assert_allclose(x[:, 0], b, rtol=1e-6)
    logs, means, variances = [], [], []
    for w, S in days_of(fitted):
        logs.append(math.log(w) + stats.norm.logpdf(b, fitted.mean_[0], math.sqrt(S[0, 0])))
        means.append(fitted.mean_ + S[0] / S[0, 0] * (b - fitted.mean_[0]))
        variances.append(np.diag(S) - S[0] ** 2 / S[0, 0])
    p = np.exp(np.array(logs) - np.logaddexp.reduce(logs))
    for j in (1, 6, 13):
        cdf = lambda y, j=j: sum(  # noqa: E731
            q * stats.norm.cdf(y, m[j], math.sqrt(v[j])) for q, m, v in zip(p, means, variances)
        )
        assert stats.kstest(x[:, j], cdf).pvalue > 1e-3
    assert x[:, 1:].std() > 1.5 * fitted.sample(2000).to_numpy()[:, 1:].std()


def test_bands_and_rows_of_their_own(fitted, learned):
    for generator in (fitted, learned):
        wishes = np.linspace(-0.02, 0.02, 60)
        x = generator.sample(60, stress={"A01": wishes, "A05": (0.0, np.inf)})
        np.testing.assert_allclose(x["A01"], wishes, rtol=1e-6, atol=1e-9)
        assert (x["A05"] >= -1e-9).all()
    x = fitted.sample(3000, stress={"A04": (-np.inf, -0.01)})["A04"].to_numpy()
    all_of = fitted.sample(60_000, random_state=3)["A04"].to_numpy()
    assert stats.ks_2samp(x, all_of[all_of <= -0.01]).pvalue > 1e-3


def test_scenarios_of_an_extreme_band_are_not_copies(fitted):
    """... of the stressed return: rows share a volatility, but not what they do with it."""
    low = float(-6 * panel()["A00"].std())
    x = fitted.sample(8192, stress={"A00": (-0.99, low)})
    assert len(np.unique(x["A00"])) > 0.95 * len(x)


def test_a_sampler_is_steered_by_a_stress_too():
    generator = factor(n_factors=K, sampler=DPMSolver(steps=12)).fit(panel(200))
    np.testing.assert_allclose(generator.sample(30, stress={"A00": -0.02})["A00"], -0.02, rtol=1e-4)


# ------------------------------------------------------------------------------------------ seeds and saving


@pytest.mark.parametrize("name", ["fitted", "gappy", "learned"])
def test_loading_gives_back_the_same_bits(name, request, tmp_path):
    generator = request.getfixturevalue(name)
    loaded = ScenarioGenerator.load(generator.save(tmp_path / "saved"))
    assert repr(loaded) == repr(generator)
    pd.testing.assert_frame_equal(loaded.sample(200), generator.sample(200), check_exact=True)
    for stress in ({"A00": -0.02}, {"A00": (-0.5, -0.02)}):
        one, two = (g.sample(40, stress=stress) for g in (loaded, generator))
        pd.testing.assert_frame_equal(one, two, check_exact=True)
    X = panel(20, seed=5)
    np.testing.assert_array_equal(loaded.log_density(X), generator.log_density(X))
    for attribute in ("covariance_", "loadings_", "idiosyncratic_variance_", "mean_"):
        np.testing.assert_array_equal(getattr(loaded, attribute), getattr(generator, attribute))
    assert loaded.residual_nats_ == generator.residual_nats_
    assert loaded.fit_summary_ == generator.fit_summary_
    again = ScenarioGenerator.load(loaded.save(tmp_path / "again"))
    pd.testing.assert_frame_equal(again.sample(50), generator.sample(50), check_exact=True)


def test_loading_gives_back_the_summary_of_the_fit(fitted, tmp_path):
    loaded = ScenarioGenerator.load(fitted.save(tmp_path / "saved"))
    assert loaded.fit_.bic == fitted.fit_.bic
    assert loaded.fit_.log_likelihoods == fitted.fit_.log_likelihoods


def test_the_exact_score_is_built_once_a_fit(monkeypatch, tmp_path):
    """... however often it is asked for, anew after a refit or loading, and it is not among what is saved."""
    built, build = [], FactorDiffusionGenerator._model

    def counted(self, *args, **kwargs):
        built.append(1)
        return build(self, *args, **kwargs)

    monkeypatch.setattr(FactorDiffusionGenerator, "_model", counted)
    X, Y = panel(200), panel(200, seed=9)
    generator = factor(n_factors=1, residual=False).fit(X)
    first, again = generator.mean_, generator.mean_
    generator.factors(X)
    generator.sample(5, stress={NAMES[0]: -0.05})
    assert len(built) == 1
    np.testing.assert_array_equal(first, again)
    generator.fit(Y)
    fresh = factor(n_factors=1, residual=False).fit(Y)
    np.testing.assert_array_equal(generator.mean_, fresh.mean_)
    np.testing.assert_array_equal(generator.factors(X), fresh.factors(X))
    assert np.abs(generator.mean_ - first).max() > 0
    assert not [name for name in generator._arrays() if "base" in name]
    loaded = ScenarioGenerator.load(generator.save(tmp_path / "saved"))
    built.clear()
    np.testing.assert_array_equal(loaded.mean_, generator.mean_)
    np.testing.assert_array_equal(loaded.factors(X), generator.factors(X))
    assert not built


def test_same_seed_same_bits():
    small = {"n_factors": 3, "levels": 12}
    one, again, other = (factor(**small, random_state=s).fit(separate(1000, 1)) for s in (0, 0, 1))
    assert one.residual_nats_ > 0
    pd.testing.assert_frame_equal(again.sample(100), one.sample(100), check_exact=True)
    assert not one.sample(100).equals(one.sample(100, random_state=1))
    assert torch.equal(
        other.fit_.loadings, one.fit_.loadings
    )  # the maximum has no seed, the regression has one
    assert other.residual_nats_ != one.residual_nats_


def test_scenarios_stream_to_disk(gappy, tmp_path):
    gappy.sample_to(tmp_path / "scenarios", 500, chunk=200, random_state=1)
    stored = pd.read_parquet(tmp_path / "scenarios")
    whole = pd.concat(gappy.sample_chunks(500, chunk=200, random_state=1))
    assert list(stored.columns) == NAMES
    np.testing.assert_array_equal(stored, whole)


# ----------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"n_factors": D + 1},
            f"expected at most {D} factors for 100 rows of {D} moving assets, got {D + 1}",
        ),
        ({"n_factors": -1}, "expected n_factors to be a whole number, at least 0"),
        ({"n_factors": 2.0}, "expected n_factors to be a whole number"),
        ({"n_factors": True}, "expected n_factors to be a whole number"),
        ({"n_factors": "bic"}, "got 'bic'"),
        ({"n_factors": None}, "got None"),
        ({"draws": 1}, "expected draws to be a whole number, at least 2, got 1"),
        ({"levels": 1.5}, "expected levels to be a whole number, at least 2, got 1.5"),
        ({"folds": True}, "expected folds to be a whole number"),
        ({"sampler": "exact"}, "expected sampler to be a Sampler or None, got 'exact'"),
        ({"process": VP}, "expected process to be a Process or None"),
        ({"device": "abacus"}, "expected a device torch can use here"),
    ],
)
def test_bad_arguments_are_refused_in_one_sentence(arguments, message):
    with pytest.raises(ValueError, match=message) as caught:
        factor(**arguments).fit(panel(100))
    assert "\n" not in str(caught.value)


def test_fewer_rows_than_factors_are_refused():
    with (
        pytest.raises(
            ValueError, match=f"expected at most 9 factors for 10 rows of {D} moving assets, got 10"
        ),
        pytest.warns(),
    ):
        factor(n_factors=10).fit(panel(10))


def test_bad_panels_are_refused(fitted):
    X = panel(100)
    X["A03"] = np.nan
    with pytest.raises(ValueError, match="A03"):
        factor().fit(X)
    X = panel(100)
    X.iloc[3, 4] = np.inf
    with pytest.raises(ValueError, match="inf"):
        factor().fit(X)
    with pytest.raises(ValueError, match="NaN"):
        fitted.factors(panel(10, missing=0.5))
    with pytest.raises(ValueError, match="condition"):
        fitted.sample(5, condition=1.0)
