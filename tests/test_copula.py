"""Copulas against scipy's densities, quadrature, planted truths and what is known of their scenarios.

Tolerances are multiples of standard errors: |z| < 4.5 for the largest of tens of entries, p > 1e-3 for a test.
"""

import re

import numpy as np
import pytest
from scipy import integrate, stats
from sklearn.covariance import OAS, EmpiricalCovariance, ShrunkCovariance, ledoit_wolf
from sklearn.decomposition import FactorAnalysis
from sklearn.preprocessing import StandardScaler

from finediff.generators import CopulaGenerator
from finediff.generators.copula import EmpiricalMargins, StudentMargins, _fit_student_margins

CORRELATION = np.array([[1, 0.5, 0.2, -0.1], [0.5, 1, 0.3, 0.1], [0.2, 0.3, 1, 0.4], [-0.1, 0.1, 0.4, 1]])
LOCATION = np.array([0.001, 0.0, -0.002, 0.003])
SCALE = np.array([0.01, 0.02, 0.005, 0.03])
DOF = np.array([3.0, 4.0, 6.0, 10.0])
PAIRS = np.triu_indices(4, 1)


def scores(nu, n, seed=0, R=CORRELATION):
    rng = np.random.default_rng(seed)
    stretch = np.sqrt(nu / rng.chisquare(nu, (n, 1))) if nu < np.inf else 1.0
    return stretch * (rng.standard_normal((n, len(R))) @ np.linalg.cholesky(R).T)


def planted(nu, n, seed=0):
    """Rows of the copula of nu and CORRELATION whose margins are the ts above."""
    law = stats.t(nu) if nu < np.inf else stats.norm
    return LOCATION + SCALE * stats.t(DOF).ppf(law.cdf(scores(nu, n, seed)))


def law(nu, R, location, scale, dof, *, family="t"):
    """A generator with given parameters instead of learned ones."""
    generator = CopulaGenerator(family=family, random_state=0)
    d = len(R)
    generator.fit(0.01 * np.random.default_rng(0).standard_normal((100, d)))
    generator.dof_, generator.correlation_ = float(nu), np.asarray(R, dtype=float)
    generator.margins_ = StudentMargins(
        *(np.broadcast_to(a, d).astype(float) for a in (location, scale, dof))
    )
    return generator


# ---------------------------------------------------------------------------------------- margins


@pytest.mark.parametrize("n", [30, 3000])
def test_no_t_margin_of_scipy_is_likelier(n):
    dofs = np.repeat([2.5, 4.0, 8.0, 30.0], 5)
    rng = np.random.default_rng(0)
    Z = rng.standard_t(dofs, (n, len(dofs)))
    Z = (Z - Z.mean(0)) / Z.std(0)
    location, scale, dof = _fit_student_margins(Z)
    for j in range(len(dofs)):
        mine = stats.t.logpdf(Z[:, j], dof[j], location[j], scale[j]).mean()
        nu, l, s = stats.t.fit(Z[:, j])
        if 2.05 <= nu <= 100:
            assert mine > stats.t.logpdf(Z[:, j], nu, l, s).mean() - 1e-12
            if n == 3000 and nu < 20:  # where the likelihood is not flat
                np.testing.assert_allclose([dof[j], scale[j]], [nu, s], rtol=2e-3)
                assert location[j] == pytest.approx(l, abs=1e-3)
        else:  # the better end of the interval: scipy with its dof held there
            end = min(max(nu, 2.05), 100)
            _, l, s = stats.t.fit(Z[:, j], f0=end)
            assert mine > stats.t.logpdf(Z[:, j], end, l, s).mean() - 1e-12


def test_planted_margins_are_recovered():
    """As often as their standard errors say: the information of Lange, Little and Taylor (1989)."""
    n, d, m = 4000, 200, 4.0
    X = np.random.default_rng(0).standard_t(m, (n, d))
    sd = X.std(0)
    location, scale, dof = _fit_student_margins((X - X.mean(0)) / sd)
    location, scale = X.mean(0) + sd * location, sd * scale
    x = np.linspace(-60, 60, 400_001)
    p, h = stats.t.pdf(x, m), 1e-5
    slopes = np.stack(
        [
            (stats.t.logpdf(x, m, 0, np.exp(h)) - stats.t.logpdf(x, m, 0, np.exp(-h))) / (2 * h),
            (stats.t.logpdf(x, m + h) - stats.t.logpdf(x, m - h)) / (2 * h),
        ]
    )
    of_scale, of_dof = np.sqrt(np.diag(np.linalg.inv(np.trapezoid(slopes[:, None] * slopes * p, x))) / n)
    of_location = np.sqrt((m + 3) / (m + 1) / n)
    for z in (location / of_location, np.log(scale) / of_scale, (dof - m) / of_dof):
        assert abs(z.mean()) * np.sqrt(d) < 4.5  # no bias that 200 assets show
        assert z.std() == pytest.approx(1, abs=4.5 / np.sqrt(2 * d))


def test_each_margin_is_fitted_alone():
    Z = np.random.default_rng(0).standard_t(4, (500, 6))
    Z = (Z - Z.mean(0)) / Z.std(0)
    together = np.stack(_fit_student_margins(Z))
    for j in range(6):
        np.testing.assert_allclose(
            np.stack(_fit_student_margins(Z[:, [j]]))[:, 0], together[:, j], rtol=1e-12
        )


def test_normal_margins_reach_the_end_of_the_interval_and_few_rows_stay_finite():
    Z = stats.norm.ppf((np.arange(2000) + 0.5) / 2000)[:, None]
    assert _fit_student_margins(Z / Z.std())[2] == 100
    for n in (2, 3, 5):
        Z = np.random.default_rng(n).standard_t(2, (n, 50))
        location, scale, dof = _fit_student_margins((Z - Z.mean(0)) / Z.std(0))
        assert np.isfinite(location).all()
        assert ((scale >= 1e-3) & (scale < 10) & (dof >= 2.05) & (dof <= 100)).all()


@pytest.mark.filterwarnings("ignore::finediff.panel.PanelWarning")
@pytest.mark.parametrize("share", [0.7, 0.9])
@pytest.mark.parametrize("jitter", [0.0, 1e-5])
def test_a_stale_price_keeps_its_spread_and_leaves_the_others_alone(share, jitter, tmp_path):
    """Its t would have 1/150 of the standard deviation, and minimum risk would buy nothing else."""
    n, m, rng = 500, 40_000, np.random.default_rng(0)
    X = planted(5, n)
    moves = (rng.uniform(size=n) >= share) * 0.05 * rng.standard_normal(n) + jitter * rng.standard_normal(n)
    plain, beside = CopulaGenerator().fit(X), CopulaGenerator(random_state=0).fit(np.c_[X, moves])
    for name in ("location", "scale", "dof"):
        np.testing.assert_array_equal(getattr(beside.margins_, name)[:4], getattr(plain.margins_, name))
    assert list(beside.margins_.stale) == [4]
    draws = beside.sample(m)
    squares = (moves - moves.mean()) ** 2  # the standard error of the panel's own variance
    gap = draws[:, 4].var() - squares.mean()
    assert abs(gap) < squares.std() / np.sqrt(n)
    if not jitter:
        assert abs((draws[:, 4] == 0).mean() - (moves == 0).mean()) < 0.02
    # Of the others alone: whatever the stale one does.
    shifted = np.c_[X, moves + 0.1]
    values = beside.log_density(np.c_[X, moves])
    np.testing.assert_array_equal(values, beside.log_density(shifted))
    assert np.isfinite(values).all()
    loaded = CopulaGenerator.load(beside.save(tmp_path / "saved"))
    np.testing.assert_array_equal(loaded.sample(50), beside.sample(50))


def test_ordinary_returns_keep_their_t():
    """Heavy tails are no stale price, nor are the ties of coarse quotes."""
    X = 0.01 * np.random.default_rng(0).standard_t(3, (500, 100))
    for rows in (X, np.round(X, 3)):
        assert not len(CopulaGenerator(family="gaussian").fit(rows).margins_.stale)


# ---------------------------------------------------------------------------------------- density


@pytest.mark.parametrize("nu", [2.05, 3.0, 8.0, 100.0])
def test_with_one_dof_it_is_the_multivariate_t(nu):
    generator = law(nu, CORRELATION, LOCATION, SCALE, nu)
    X = LOCATION + SCALE * scores(3.0, 500)
    expected = stats.multivariate_t(LOCATION, CORRELATION * np.outer(SCALE, SCALE), df=nu).logpdf(X)
    np.testing.assert_allclose(generator.log_density(X), expected, rtol=1e-9)


def test_a_gaussian_copula_of_nearly_normal_margins_is_nearly_normal():
    """The gap is of order 1/dof: ten times the dof, a tenth of the gap."""
    X = LOCATION + SCALE * scores(np.inf, 500)
    expected = stats.multivariate_normal(LOCATION, CORRELATION * np.outer(SCALE, SCALE)).logpdf(X)
    gaps = []
    for dof in (1e2, 1e3, 1e4):
        generator = law(np.inf, CORRELATION, LOCATION, SCALE, dof, family="gaussian")
        gaps.append(np.abs(generator.log_density(X) - expected).mean())
    np.testing.assert_allclose(np.divide(gaps[:-1], gaps[1:]), 10, rtol=0.1)
    assert gaps[-1] < 1e-3


def test_without_correlation_a_gaussian_copula_is_the_product_of_its_margins():
    generator = law(np.inf, np.eye(4), LOCATION, SCALE, DOF, family="gaussian")
    X = planted(5, 200)
    expected = stats.t.logpdf(X, DOF, LOCATION, SCALE).sum(1)
    np.testing.assert_allclose(generator.log_density(X), expected, rtol=1e-9)


@pytest.mark.parametrize("nu", [3.0, 8.0])
def test_one_asset_has_the_density_of_its_margin(nu):
    generator = law(nu, np.eye(1), 0.001, 0.02, 4.0)
    x = np.linspace(-1, 1, 201)
    np.testing.assert_allclose(
        generator.log_density(x[:, None]), stats.t.logpdf(x, 4, 0.001, 0.02), rtol=1e-9
    )
    total, _ = integrate.quad(lambda x: np.exp(generator.log_density([[x]])[0]), -1, 1, points=[0.001])
    assert total == pytest.approx(stats.t(4, 0.001, 0.02).cdf(1) - stats.t(4, 0.001, 0.02).cdf(-1), rel=1e-7)


@pytest.mark.parametrize("nu", [2.5, 8.0, np.inf])
def test_two_assets_have_a_density_of_integral_one(nu):
    """Gauss-Legendre in x = l + 0.01 sinh(u), which reaches out to 200 times the scale."""
    family = "gaussian" if np.isinf(nu) else "t"
    R = [[1, 0.6], [0.6, 1]]
    generator = law(nu, R, [0.0, 0.002], 0.01, [5.0, 8.0], family=family)
    nodes, weights = np.polynomial.legendre.leggauss(200)
    u, w = 6 * nodes, 6 * weights * 0.01 * np.cosh(6 * nodes)
    x = np.stack(np.meshgrid(0.01 * np.sinh(u), 0.002 + 0.01 * np.sinh(u), indexing="ij"), -1)
    p = np.exp(generator.log_density(x.reshape(-1, 2))).reshape(200, 200)
    assert w @ p @ w == pytest.approx(1, abs=1e-6)
    # The integral over the second asset is the margin of the first.
    inside = np.abs(u) < 3
    expected = stats.t.pdf(0.01 * np.sinh(u[inside]), 5, 0, 0.01)
    np.testing.assert_allclose((p @ w)[inside], expected, rtol=1e-5)


def test_far_out_the_density_stays_finite_and_falls():
    for family in ("t", "gaussian"):
        generator = CopulaGenerator(family=family).fit(planted(5, 500))
        X = LOCATION + np.array([[1.0], [10.0], [100.0], [1000.0]]) * SCALE * [1, -1, 1, -1]
        values = generator.log_density(X)
        assert np.isfinite(values).all()
        assert (np.diff(values) < 0).all()


def test_the_density_counts_nats_in_the_units_of_the_returns():
    X = planted(5, 400)
    expected = CopulaGenerator().fit(X).log_density(X)
    factor = np.array([0.25, 0.5, 2.0, 0.125])
    rescaled = CopulaGenerator().fit(X * factor).log_density(X * factor) + np.log(factor).sum()
    np.testing.assert_allclose(rescaled, expected, rtol=1e-9)
    shift = np.array([0.01, -0.02, 0.0, 0.005])
    np.testing.assert_allclose(CopulaGenerator().fit(X + shift).log_density(X + shift), expected, rtol=1e-9)
    order = np.array([2, 0, 3, 1])
    np.testing.assert_allclose(
        CopulaGenerator().fit(X[:, order]).log_density(X[:, order]), expected, rtol=1e-9
    )


def test_a_constant_asset_has_no_part_in_the_density():
    X = planted(5, 300)
    cash = np.full((300, 1), 0.1)
    alone, beside = CopulaGenerator().fit(X), CopulaGenerator().fit(np.hstack([X, cash]))
    np.testing.assert_array_equal(beside.correlation_[:4, :4], alone.correlation_)
    np.testing.assert_array_equal(beside.correlation_[4], [0, 0, 0, 0, 1])
    margins = beside.margins_
    assert (margins.location[4], margins.scale[4], margins.dof[4]) == (0.1, 0.0, np.inf)
    cash[7] = 0.2
    values = beside.log_density(np.hstack([X, cash]))
    assert values[7] == -np.inf
    np.testing.assert_array_equal(np.delete(values, 7), np.delete(alone.log_density(X), 7))


# ----------------------------------------------------------------------------------------- copula


@pytest.mark.parametrize("margins", ["t", "empirical"])
@pytest.mark.parametrize("nu", [4.0, 8.0])
def test_a_planted_t_copula_is_recovered(nu, margins):
    n, panels = 2000, 8
    fits = [CopulaGenerator(margins=margins).fit(planted(nu, n, seed)) for seed in range(panels)]
    # Errors of the mean of the panels by their own spread: no formula is needed for the two-stage estimate.
    dofs = np.array([fitted.dof_ for fitted in fits])
    assert abs(dofs.mean() - nu) < 4.5 * dofs.std(ddof=1) / np.sqrt(panels)
    assert dofs.std() < 0.15 * nu
    R = np.array([fitted.correlation_[PAIRS] for fitted in fits])
    # Lange, Little & Taylor 1989: as for the normal law, but for the factor (nu + d + 2)/(nu + d).
    standard_error = np.sqrt((nu + 6) / (nu + 4) / n) * (1 - CORRELATION[PAIRS] ** 2)
    # Shrinkage takes a share of about 1 % away; the standard error of one panel is 3 to 5 times that.
    assert np.abs((R.mean(0) - CORRELATION[PAIRS]) / standard_error * np.sqrt(panels)).max() < 4.5
    assert np.abs((R - CORRELATION[PAIRS]) / standard_error).max() < 4.5


@pytest.mark.parametrize("seed", range(2))
def test_a_gaussian_copula_gives_a_nearly_gaussian_t(seed):
    assert CopulaGenerator().fit(planted(np.inf, 3000, seed)).dof_ > 40


def test_the_likelihood_is_highest_at_the_fit():
    X = planted(5, 3000)
    fitted = CopulaGenerator(correlation=EmpiricalCovariance(assume_centered=True)).fit(X)
    nu, R, best = fitted.dof_, fitted.correlation_, fitted.log_density(X).mean()
    for step in (0.95, 1.05):
        fitted.dof_ = step * nu
        assert fitted.log_density(X).mean() < best
    fitted.dof_ = nu
    for i, j in zip(*PAIRS):
        for step in (-0.03, 0.03):
            fitted.correlation_ = R.copy()
            fitted.correlation_[[i, j], [j, i]] += step
            assert fitted.log_density(X).mean() < best


def test_the_gaussian_copula_has_the_correlation_of_its_normal_scores():
    X = planted(5, 300)
    p = (stats.rankdata(X, axis=0) - 0.5) / 300
    y = stats.norm.ppf(p)
    for estimator, covariance in (
        (None, ledoit_wolf(y, assume_centered=True)[0]),
        (EmpiricalCovariance(), np.cov(y.T, ddof=0)),
        (OAS(assume_centered=True), OAS(assume_centered=True).fit(y).covariance_),
        (FactorAnalysis(1), FactorAnalysis(1).fit(y).get_covariance()),
        (ShrunkCovariance(shrinkage=1.0), np.eye(4)),
    ):
        generator = CopulaGenerator(family="gaussian", margins="empirical", correlation=estimator).fit(X)
        sd = np.sqrt(np.diag(covariance))
        np.testing.assert_allclose(generator.correlation_, covariance / np.outer(sd, sd), atol=1e-7)
        assert generator.dof_ == np.inf


def test_a_monotone_change_of_an_asset_leaves_an_empirical_copula_as_it_is():
    X = planted(5, 300)
    one = CopulaGenerator(margins="empirical").fit(X)
    other = CopulaGenerator(margins="empirical").fit(np.column_stack([np.expm1(X[:, 0]), X[:, 1:] ** 3]))
    np.testing.assert_array_equal(one.correlation_, other.correlation_)
    assert one.dof_ == other.dof_


@pytest.mark.filterwarnings("ignore::finediff.panel.PanelWarning")
@pytest.mark.parametrize("n", [2, 5, 30])
@pytest.mark.parametrize("family", ["t", "gaussian"])
def test_fewer_rows_than_assets(n, family):
    X = 0.01 * np.random.default_rng(0).standard_t(4, (n, 30))
    fitted = CopulaGenerator(family=family).fit(X)
    np.testing.assert_allclose(np.diag(fitted.correlation_), 1, rtol=1e-12)
    assert np.linalg.eigvalsh(fitted.correlation_).min() > 0
    assert np.isfinite(fitted.sample(20)).all()
    assert np.isfinite(fitted.log_density(X)).all()


# -------------------------------------------------------------------------------------- scenarios


@pytest.mark.parametrize("nu", [3.0, 8.0, np.inf])
def test_scenarios_follow_the_law(nu):
    m = 40_000
    family = "gaussian" if np.isinf(nu) else "t"
    draws = law(nu, CORRELATION, LOCATION, SCALE, DOF, family=family).sample(m)
    for j in range(4):
        margin = stats.t(DOF[j], LOCATION[j], SCALE[j])
        assert stats.kstest(draws[:, j], margin.cdf).pvalue > 1e-3
    for i, j in zip(*PAIRS):  # Lindskog, McNeil & Schmock 2003: of every elliptical copula
        tau = stats.kendalltau(draws[:4000, i], draws[:4000, j]).statistic
        assert abs(tau - 2 / np.pi * np.arcsin(CORRELATION[i, j])) < 4.5 * 2 / 3 / np.sqrt(4000) * 1.3
    if np.isfinite(nu):  # back to the scores: q/d ~ F(d, nu)
        y = stats.t(nu).ppf(stats.t(DOF, LOCATION, SCALE).cdf(draws))
        q = (y * np.linalg.solve(CORRELATION, y.T).T).sum(1)
        assert stats.kstest(q / 4, stats.f(4, nu).cdf).pvalue > 1e-3


def test_the_mean_log_density_of_its_own_scenarios_is_the_entropy():
    """Margins and copula of one dof: minus the entropy of a multivariate t (a null case for sampler and density)."""
    generator = law(5.0, CORRELATION, LOCATION, SCALE, 5.0)
    values = generator.log_density(generator.sample(40_000))
    entropy = stats.multivariate_t(LOCATION, CORRELATION * np.outer(SCALE, SCALE), df=5).entropy()
    assert abs(values.mean() + entropy) < 4.5 * values.std() / 200


def test_a_t_copula_crashes_together_and_a_gaussian_one_does_not():
    """Both assets in the lowest 1/2000 at once: the tail dependence of Demarta & McNeil (2005), and nearly 0."""
    rho, nu, m, share = 0.5, 3.0, 200_000, 1 / 2000
    limit = 2 * stats.t.cdf(-np.sqrt((nu + 1) * (1 - rho) / (1 + rho)), nu + 1)
    both = {}
    for family, dof in (("t", nu), ("gaussian", np.inf)):
        draws = law(dof, [[1, rho], [rho, 1]], 0, 0.01, 4.0, family=family).sample(m)
        both[family] = (draws < stats.t(4, 0, 0.01).ppf(share)).all(1).mean() / share
    standard_error = np.sqrt(limit / (m * share))
    assert abs(both["t"] - limit) < 4.5 * standard_error
    assert both["gaussian"] < limit / 2


def test_empirical_scenarios_have_the_quantiles_of_the_panel_and_never_leave_its_range():
    X = planted(5, 400)
    generator = CopulaGenerator(margins="empirical", random_state=0).fit(X)
    assert isinstance(generator.margins_, EmpiricalMargins)
    m = 40_000
    draws = generator.sample(m)
    assert (draws >= X.min(0)).all()
    assert (draws <= X.max(0)).all()
    assert np.abs((draws.mean(0) - X.mean(0)) / X.std(0) * np.sqrt(m)).max() < 4.5
    for level in (0.05, 0.5, 0.95):
        wanted = np.quantile(X, level, axis=0, method="hazen")
        below = (draws <= wanted).mean(0)
        assert np.abs((below - level) / np.sqrt(level * (1 - level) / m)).max() < 4.5


# ------------------------------------------------------------------------------------------ doors


@pytest.mark.parametrize("margins", ["t", "empirical"])
def test_what_was_learned_survives_saving(margins, tmp_path):
    X = np.hstack([planted(5, 300), np.full((300, 1), 0.1)])
    fitted = CopulaGenerator(margins=margins, correlation=OAS(), random_state=0).fit(X)
    fitted.save(tmp_path / "saved")
    loaded = CopulaGenerator.load(tmp_path / "saved")
    assert loaded.dof_ == fitted.dof_
    assert repr(loaded) == repr(fitted)
    np.testing.assert_array_equal(loaded.correlation_, fitted.correlation_)
    np.testing.assert_array_equal(loaded.sample(50), fitted.sample(50))
    if margins == "t":
        np.testing.assert_array_equal(loaded.log_density(X), fitted.log_density(X))


BAD_ARGUMENTS = [
    ({"family": "clayton"}, "expected family 't' or 'gaussian', got 'clayton'"),
    ({"margins": "kernel"}, "expected margins 't' or 'empirical', got 'kernel'"),
    ({"correlation": np.eye(4)}, "expected correlation to be a scikit-learn covariance estimator or None"),
    ({"correlation": OAS}, "expected correlation to be a scikit-learn covariance estimator or None"),
    ({"correlation": StandardScaler()}, "got StandardScaler(), which has neither: pass one"),
]


@pytest.mark.parametrize(("arguments", "fragment"), BAD_ARGUMENTS)
def test_bad_arguments_are_refused_by_fit(arguments, fragment):
    with pytest.raises(ValueError, match=re.escape(fragment)) as caught:
        CopulaGenerator(**arguments).fit(planted(5, 100))
    assert len(str(caught.value)) < 300


def test_no_density_without_one():
    X = planted(5, 100)
    with pytest.raises(ValueError, match="expected margins='t' for a density, got empirical margins"):
        CopulaGenerator(margins="empirical").fit(X).log_density(X)
    with pytest.raises(ValueError, match="3 features"):
        CopulaGenerator().fit(X).log_density(X[:, :3])
