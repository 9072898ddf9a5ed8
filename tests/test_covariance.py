import numpy as np
import pandas as pd
import pytest
from scipy.integrate import quad
from sklearn.base import BaseEstimator, clone
from sklearn.utils import check_random_state
from threadpoolctl import threadpool_limits

from finediff.covariance import (
    ScenarioCovariance,
    clip,
    correlation_from_covariance,
    marchenko_pastur,
    n_factors,
    noise_edge,
    rescale,
    streaming_moments,
    tracy_widom_cdf,
    tracy_widom_quantile,
)

SIZES = [(500, 100), (75, 50), (51, 50), (50, 50), (49, 50), (20, 50), (3, 10), (250, 1)]


@pytest.fixture(autouse=True)
def one_thread():
    """Threads cost more than they save on matrices of this size."""
    with threadpool_limits(1):
        yield


@pytest.fixture
def rng():
    return np.random.default_rng(11)


def factor_panel(rng, n, d, k=3, strength=1.0):
    """k factors of equal strength on every asset, volatilities spread over a factor of ten."""
    loadings = strength * rng.choice([-1.0, 1.0], (k, d))
    rows = rng.standard_normal((n, k)) @ loadings + rng.standard_normal((n, d))
    return rows * np.geomspace(0.003, 0.03, d)


def naive_clip(covariance, edge):
    """The definition, entry by entry."""
    d = len(covariance)
    sd = [covariance[i, i] ** 0.5 for i in range(d)]
    corr = np.array([[covariance[i, j] / sd[i] / sd[j] for j in range(d)] for i in range(d)])
    values, vectors = np.linalg.eigh(corr)
    low = [v for v in values if v <= edge]
    new = [sum(low) / len(low) if v <= edge else v for v in values]
    out = np.zeros((d, d))
    for i in range(d):
        for j in range(d):
            out[i, j] = sum(new[k] * vectors[i, k] * vectors[j, k] for k in range(d))
    unit = [out[i, i] ** 0.5 for i in range(d)]
    return np.array([[out[i, j] / unit[i] / unit[j] * sd[i] * sd[j] for j in range(d)] for i in range(d)])


@pytest.mark.parametrize("ratio", [0.1, 0.5, 0.99, 1.0, 1.01, 2.0, 10.0])
def test_marchenko_pastur_is_a_law(ratio):
    law = marchenko_pastur(round(1000 * ratio), 1000, variance=2.0)

    def moment(power):
        # lambda = lower + width sin^2 removes the singular edges
        width = law.upper - law.lower

        def integrand(u):
            x = law.lower + width * np.sin(u) ** 2
            return law.pdf(x) * x**power * width * np.sin(2 * u)

        return quad(integrand, 0, np.pi / 2, limit=200)[0]

    assert law.mass_at_zero == pytest.approx(max(0, 1 - 1 / ratio))
    assert moment(0) == pytest.approx(1 - law.mass_at_zero, abs=1e-7)
    assert moment(1) == pytest.approx(2.0, rel=1e-7)
    assert moment(2) == pytest.approx(4.0 * (1 + ratio), rel=1e-7)
    assert law.cdf(law.upper) == pytest.approx(1)
    assert law.cdf(-1e-9) == 0
    assert law.cdf(law.lower * 0.99) == pytest.approx(law.mass_at_zero, abs=1e-12)
    x = np.linspace(law.lower, law.upper, 23)[1:-1]
    h = 1e-6 * law.upper
    np.testing.assert_allclose((law.cdf(x + h) - law.cdf(x - h)) / (2 * h), law.pdf(x), rtol=1e-5)


def test_marchenko_pastur_matches_a_spectrum(rng):
    rows = rng.standard_normal((300, 600))
    values = np.linalg.eigvalsh(rows.T @ rows / 300)
    law = marchenko_pastur(600, 300)
    empirical = np.searchsorted(np.sort(values), [0.5, 1, 2, 3, 4, 5], side="right") / 600
    np.testing.assert_allclose(law.cdf([0.5, 1, 2, 3, 4, 5]), empirical, atol=0.005)


def test_tracy_widom_matches_published_constants():
    """Mean, variance and quantiles of F_1 as tabulated by Bornemann (2010) and Prahofer."""
    x, w = np.polynomial.legendre.leggauss(60)
    left, right = 5 * (x - 1), 7 * (x + 1)
    lower, upper = 5 * w * tracy_widom_cdf(left), 7 * w * (1 - tracy_widom_cdf(right))
    mean = upper.sum() - lower.sum()
    second = 2 * (right * upper).sum() - 2 * (left * lower).sum()
    assert mean == pytest.approx(-1.2065335745820, abs=1e-10)
    assert second - mean**2 == pytest.approx(1.607781034581, abs=1e-10)
    assert tracy_widom_quantile(0.95) == pytest.approx(0.9793, abs=5e-5)
    assert tracy_widom_quantile(0.99) == pytest.approx(2.0234, abs=5e-5)
    assert tracy_widom_cdf(tracy_widom_quantile(0.3)) == pytest.approx(0.3, abs=1e-12)
    grid = tracy_widom_cdf(np.linspace(-12, 20, 65).reshape(5, 13))
    assert grid.shape == (5, 13)
    assert (np.diff(grid.ravel()) >= -1e-14).all()


def test_edge_has_its_level_on_a_covariance(rng):
    """Johnstone's statement is about the covariance of noise with unit variance."""
    n, d, panels = 80, 40, 1500
    top = [np.linalg.eigvalsh(np.cov(rng.standard_normal((n, d)), rowvar=False))[-1] for _ in range(panels)]
    for level in (0.05, 0.2):
        rate = np.mean(np.array(top) > noise_edge(d, n, level=level))
        # finite-size bias of the law is below a third of the level here; the rest is binomial
        assert abs(rate - level) < level / 3 + 3 * np.sqrt(level / panels)


@pytest.mark.parametrize(("n", "d"), [(75, 50), (500, 100)])
def test_noise_has_no_factor(n, d):
    bulk = default = 0
    for seed in range(100):
        rows = np.random.default_rng(seed).standard_normal((n, d)) * np.geomspace(0.001, 0.1, d)
        cov = np.cov(rows, rowvar=False)
        found = n_factors(cov, n)
        default += found > 0
        bulk += n_factors(cov, n, edge="bulk") > 0
        if found == 0 and seed < 5:
            np.testing.assert_allclose(clip(cov, n), np.diag(np.diag(cov)), rtol=1e-10, atol=1e-14)
    assert default <= 5
    assert default <= bulk <= 20


def test_shared_volatility_is_outside_the_theory(rng):
    """Uncorrelated multivariate Student-t rows look like factors until the common volatility is removed."""
    rows = rng.standard_normal((500, 60)) / np.sqrt(rng.chisquare(5, (500, 1)) / 5)
    assert n_factors(np.cov(rows, rowvar=False), 500) > 0
    rows = rows / rows.std(axis=1, keepdims=True)
    assert n_factors(np.cov(rows, rowvar=False), 500) == 0


def test_planted_factors_are_found():
    for seed in range(10):
        rows = factor_panel(np.random.default_rng(seed), 500, 100, strength=0.5)
        assert n_factors(np.cov(rows, rowvar=False), 500) == 3


@pytest.mark.parametrize(("n", "d"), SIZES)
def test_clip_laws(rng, n, d):
    rows = factor_panel(rng, n, d, strength=0.5)
    cov = np.atleast_2d(np.cov(rows, rowvar=False))
    out = clip(cov, n)
    np.testing.assert_allclose(np.diag(out), np.diag(cov), rtol=1e-12)
    np.testing.assert_array_equal(out, out.T)
    corr = correlation_from_covariance(out)
    np.testing.assert_array_equal(np.diag(corr), 1.0)
    values = np.linalg.eigvalsh(corr)
    assert values.sum() == pytest.approx(d)
    assert values[0] > 0.05
    assert values[-1] / values[0] < 20 * d
    twice = clip(out, n)
    assert n_factors(out, n) == n_factors(cov, n)
    assert np.linalg.norm(twice - out) < 0.1 * np.linalg.norm(out)


@pytest.mark.parametrize(("n", "d"), [(60, 12), (12, 12), (8, 12)])
@pytest.mark.parametrize("edge", ["tracy-widom", "bulk"])
def test_clip_matches_the_definition(rng, n, d, edge):
    cov = np.cov(factor_panel(rng, n, d, k=1), rowvar=False)
    np.testing.assert_allclose(
        clip(cov, n, edge=edge), naive_clip(cov, noise_edge(d, n, edge=edge)), rtol=1e-9, atol=1e-16
    )


def test_clip_is_equivariant(rng):
    cov = np.cov(factor_panel(rng, 120, 30), rowvar=False)
    order, units = rng.permutation(30), np.geomspace(1e-5, 1e5, 30) * rng.choice([-1, 1], 30)
    out = clip(cov, 120)
    np.testing.assert_allclose(clip(cov[np.ix_(order, order)], 120), out[np.ix_(order, order)], rtol=1e-9)
    scaled = clip(cov * units * units[:, None], 120)
    np.testing.assert_allclose(scaled / units / units[:, None], out, rtol=1e-9, atol=1e-16)


def test_clip_brings_the_covariance_closer_to_the_truth(rng):
    d, n = 60, 90
    loadings = rng.standard_normal((2, d))
    truth = loadings.T @ loadings + np.eye(d)
    raw = clipped = 0.0
    for _ in range(20):
        sample = np.cov(rng.multivariate_normal(np.zeros(d), truth, n, method="cholesky"), rowvar=False)
        true_weights, weights = (
            np.linalg.solve(truth, np.ones(d)),
            np.linalg.solve(clip(sample, n), np.ones(d)),
        )
        noisy = np.linalg.solve(sample, np.ones(d))
        best = 1 / true_weights.sum()
        raw += noisy @ truth @ noisy / noisy.sum() ** 2 / best
        clipped += weights @ truth @ weights / weights.sum() ** 2 / best
    assert clipped / 20 < 1.3
    assert clipped < 0.6 * raw


def test_frames_keep_their_names(rng):
    frame = pd.DataFrame(rng.standard_normal((60, 3)), columns=["b", "a", "c"]).cov()
    for out in (clip(frame, 60), correlation_from_covariance(frame), rescale(frame, [1.0, 2.0, 3.0])):
        assert list(out.index) == list(out.columns) == ["b", "a", "c"]
    np.testing.assert_array_equal(clip(frame, 60), clip(frame.to_numpy(), 60))
    single = clip(frame.to_numpy(np.float32), 60)
    np.testing.assert_allclose(single, clip(frame, 60), rtol=1e-6, atol=1e-6)


BAD = [
    (np.ones((2, 3)), 10, "shape"),
    (np.diag([1.0, 0.0]), 10, "positive variances"),
    (np.array([[1.0, 0.5], [0.2, 1.0]]), 10, "symmetric"),
    (np.array([[1.0, 2.0], [2.0, 1.0]]), 10, "semi-definite"),
    (np.array([[1.0, np.nan], [np.nan, 1.0]]), 10, "finite"),
    (pd.DataFrame(np.eye(2), index=["a", "b"], columns=["a", "c"]), 10, "index equals"),
    (np.eye(2), 2, "n_samples"),
    (np.eye(2), 10.5, "n_samples"),
    (np.eye(2), np.nan, "n_samples"),
]


@pytest.mark.parametrize(("covariance", "n", "match"), BAD)
def test_bad_covariances_are_refused(covariance, n, match):
    with pytest.raises(ValueError, match=match):
        clip(covariance, n)
    with pytest.raises(ValueError, match=match):
        n_factors(covariance, n)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: noise_edge(10, 100, edge="kde"), "edge"),
        (lambda: noise_edge(10, 100, level=0), "level"),
        (lambda: noise_edge(0, 100), "asset"),
        (lambda: marchenko_pastur(0, 10), "asset"),
        (lambda: marchenko_pastur(5, 10, variance=0), "variance"),
        (lambda: tracy_widom_quantile(1.0), "probability"),
        (lambda: rescale(np.eye(2), np.ones((2, 1))), "shapes"),
        (lambda: streaming_moments([np.ones((1, 3))]), "two rows"),
    ],
)
def test_bad_arguments_are_refused(call, match):
    with pytest.raises(ValueError, match=match):
        call()


@pytest.mark.parametrize("offset", [0.0, 1e7])
def test_streaming_equals_one_shot(rng, offset):
    rows = rng.standard_normal((1001, 7)) @ rng.standard_normal((7, 7)) + offset
    count, mean, cov = streaming_moments(np.array_split(rows, [1, 2, 300, 300, 777]))
    assert count == 1001
    np.testing.assert_allclose(mean, rows.mean(axis=0), rtol=1e-12, atol=1e-12)
    tolerance = 1e-12 if offset == 0 else 1e-8
    np.testing.assert_allclose(cov, np.cov(rows, rowvar=False), rtol=tolerance, atol=tolerance)


class Normal(BaseEstimator):
    """Generator whose law is known: N(mean, factor^2 covariance) of the rows it saw."""

    def __init__(self, factor=1.0):
        self.factor = factor

    def fit(self, X, y=None):
        self.columns_ = X.columns if isinstance(X, pd.DataFrame) else None
        rows = np.asarray(X)
        self.mean_, self.root_ = rows.mean(axis=0), np.linalg.cholesky(np.cov(rows, rowvar=False))
        self.sizes_ = []
        return self

    def sample(self, n_samples=1000, *, random_state=None):
        self.sizes_.append(n_samples)
        z = check_random_state(random_state).standard_normal((n_samples, len(self.mean_)))
        rows = self.mean_ + self.factor * z @ self.root_.T
        return rows if self.columns_ is None else pd.DataFrame(rows, columns=self.columns_)


def test_scenarios_recover_the_law_of_the_generator(rng):
    rows = factor_panel(rng, 300, 8)
    m = 20_000
    model = ScenarioCovariance(Normal(factor=1.5), n_scenarios=m, scale="scenarios", random_state=0).fit(rows)
    truth = 2.25 * np.cov(rows, rowvar=False)
    variance = np.diag(truth)
    error = np.sqrt((truth**2 + variance * variance[:, None]) / m)
    assert (np.abs(model.covariance_ - truth) < 4.5 * error).all()
    assert (np.abs(model.location_ - rows.mean(axis=0)) < 4.5 * np.sqrt(variance / m)).all()


def test_scale_and_location_stay_with_the_data(rng):
    rows = factor_panel(rng, 200, 6)
    model = ScenarioCovariance(Normal(factor=3.0), n_scenarios=5000, random_state=0).fit(rows)
    np.testing.assert_allclose(np.diag(model.covariance_), rows.var(axis=0, ddof=1), rtol=1e-12)
    np.testing.assert_allclose(model.location_, rows.mean(axis=0), rtol=1e-12)
    truth = np.corrcoef(rows, rowvar=False)
    off = ~np.eye(6, dtype=bool)
    z = (model.correlation_ - truth)[off] / ((1 - truth[off] ** 2) / np.sqrt(5000))
    assert np.abs(z).max() < 4.5


def test_streams_are_bounded_distinct_and_reproducible(rng):
    rows = factor_panel(rng, 100, 4)
    make = ScenarioCovariance(Normal(), n_scenarios=1000, chunk=300, random_state=3)
    one, two = clone(make).fit(rows), clone(make).fit(rows)
    assert one.generator_.sizes_ == [300, 300, 300, 100]
    assert not hasattr(make.generator, "mean_")
    np.testing.assert_array_equal(one.covariance_, two.covariance_)
    chunks = list(one._draw(None))
    assert not np.isclose(chunks[0], chunks[1]).any()
    np.testing.assert_allclose(
        one.correlation_, np.corrcoef(np.concatenate(chunks), rowvar=False), rtol=0, atol=1e-12
    )
    state = [clone(make).set_params(random_state=np.random.RandomState(s)).fit(rows) for s in (1, 1, 2)]
    np.testing.assert_array_equal(state[0].covariance_, state[1].covariance_)
    assert not np.array_equal(state[0].covariance_, state[2].covariance_)
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    clone(make).set_params(random_state=None).fit(rows)
    np.testing.assert_array_equal(before, np.random.get_state()[1])  # noqa: NPY002


def test_cleaner_sees_the_real_rows(rng):
    frame = pd.DataFrame(rng.standard_normal((75, 50)) * 0.01).rename(columns=str)
    raw = ScenarioCovariance(Normal(), n_scenarios=20_000, random_state=0).fit(frame)
    assert list(raw.feature_names_in_) == list(frame.columns)
    # the generator learned the noise of 75 rows: the synthetic count would call it signal
    assert n_factors(raw.covariance_, 20_000) > 5
    model = ScenarioCovariance(Normal(), cleaner=clip, n_scenarios=20_000, random_state=0).fit(frame)
    np.testing.assert_allclose(model.covariance_, np.diag(frame.var()), rtol=1e-10, atol=1e-14)


def test_prefit_uses_the_generator_as_it_is(rng):
    generator = Normal().fit(factor_panel(rng, 100, 4))
    model = ScenarioCovariance(generator, prefit=True, n_scenarios=500, random_state=0)
    assert model.fit(rng.standard_normal((30, 4))).generator_ is generator
    with pytest.raises(ValueError, match="other assets"):
        model.fit(rng.standard_normal((30, 5)))


class Broken(Normal):
    """A generator that returns a hole or another order of the assets."""

    def __init__(self, factor=1.0, fault=""):
        super().__init__(factor)
        self.fault = fault

    def sample(self, n_samples=1000, *, random_state=None):
        rows = super().sample(n_samples, random_state=random_state)
        if self.fault == "hole":
            rows.iloc[2, 1] = np.inf
        return rows[rows.columns[::-1]] if self.fault == "order" else rows


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"scale": "both"}, "scale"),
        ({"n_scenarios": 1}, "n_scenarios"),
        ({"chunk": 0}, "chunk"),
        ({"generator": Normal(factor=0.0)}, "scenarios that vary"),
    ],
)
def test_bad_settings_are_refused(rng, change, match):
    model = ScenarioCovariance(Normal(), n_scenarios=50).set_params(**change)
    with pytest.raises(ValueError, match=match):
        model.fit(rng.standard_normal((30, 3)) + 1e-9)


def test_holes_are_named(rng):
    frame = pd.DataFrame(rng.standard_normal((30, 2)), columns=["SPY", "TLT"])
    frame.iloc[4, 1] = np.nan
    with pytest.raises(ValueError, match=r"row 4, column 'TLT'"):
        ScenarioCovariance(Normal(), n_scenarios=50).fit(frame)
    frame.iloc[4, 1] = 0.0
    with pytest.raises(
        ValueError, match=r"infinity \(inf\) in chunk 0 of the scenarios at row 2, column 'TLT'"
    ):
        ScenarioCovariance(Broken(fault="hole"), n_scenarios=50).fit(frame)
    with pytest.raises(ValueError, match="another order"):
        ScenarioCovariance(Broken(fault="order"), n_scenarios=50).fit(frame)
