"""GeneratorPrior and FinediffCovariance: closed forms, fit once and stress many, folds, grids, workers, bad input."""

import pickle

import numpy as np
import pandas as pd
import pytest
from skfolio import RiskMeasure
from skfolio.model_selection import WalkForward, cross_val_predict
from skfolio.moments import BaseCovariance, EmpiricalCovariance, EWMu, ShrunkMu
from skfolio.optimization import MeanRisk
from skfolio.prior import BlackLitterman, EmpiricalPrior, EntropyPooling
from sklearn import config_context
from sklearn.base import BaseEstimator, clone
from sklearn.frozen import FrozenEstimator
from sklearn.model_selection import GridSearchCV
from sklearn.utils.estimator_checks import check_estimator, parametrize_with_checks

import finediff.generators
from finediff.covariance import (
    ClippedCovariance,
    QuadraticInverseShrinkage,
    RotationallyInvariantCovariance,
    ScenarioCovariance,
    StudentTCovariance,
    WindowEnsembleCovariance,
    clip,
)
from finediff.generators import (
    DDPMGenerator,
    FactorDiffusionGenerator,
    GaussianGenerator,
    RidgeScoreGenerator,
    SmoothedBootstrapGenerator,
    StudentTGenerator,
)
from finediff.integrations.skfolio import FinediffCovariance, GeneratorPrior
from finediff.markets import factor_market

SMALL = {"steps": 3, "width": 8, "depth": 1, "device": "cpu"}
WINDOWS = WindowEnsembleCovariance(windows=(40, 80), level_window=40)
COVARIANCES = [
    WINDOWS,
    QuadraticInverseShrinkage(),
    RotationallyInvariantCovariance(),
    ClippedCovariance(),
    StudentTCovariance(),
    ScenarioCovariance(GaussianGenerator(), clip),
]


@pytest.fixture(scope="module")
def panel(returns):
    return returns.iloc[-300:, :5]


@pytest.fixture(scope="module")
def fitted(panel):
    return GeneratorPrior(RidgeScoreGenerator(random_state=0), n_samples=2000).fit(panel)


class Counting(GaussianGenerator):
    """Counts fits in a list that clones share."""

    def __init__(self, *, covariance_estimator=None, random_state=None, fits=None):
        super().__init__(covariance_estimator=covariance_estimator, random_state=random_state)
        self.fits = fits

    _steered_by = ("stress",)

    def _fit(self, X, seed):
        self.fits.append(len(X))
        super()._fit(X, seed)

    def _sample(self, n, seed, stress=None):
        rows = super()._sample(n, seed)
        for asset, value in (stress or {}).items():
            rows[:, list(self.feature_names_in_).index(asset)] = value
        return rows


class Shared(list):
    """A list that deep copies of parameters do not copy."""

    def __deepcopy__(self, memo):
        return self


# ------------------------------------------------------------------------ moments of the scenarios


def minimum_variance(covariance):
    """Weights (d,), and what their variance is made of."""
    inverse = np.linalg.inv(covariance)
    total = inverse.sum()
    weights = inverse.sum(axis=1) / total
    return weights, inverse - np.outer(inverse.sum(axis=1), inverse.sum(axis=1)) / total, total


@pytest.mark.parametrize("m", [300, 3000, 100_000])
def test_minimum_variance_on_scenarios_approaches_the_closed_form(panel, m):
    """The variance of the weights from m Gaussian rows: Okhrin and Schmid (2006), Journal of Econometrics 134."""
    generator = GaussianGenerator(random_state=m).fit(panel)
    model = MeanRisk(
        risk_measure=RiskMeasure.VARIANCE,
        min_weights=None,
        prior_estimator=GeneratorPrior(FrozenEstimator(generator), n_samples=m),
    ).fit(panel)
    exact, R, total = minimum_variance(generator.covariance_)
    standard_error = np.sqrt(np.diag(R) / total / (m - len(exact) - 1))
    assert np.abs((model.weights_ - exact) / standard_error).max() < 4.5


def test_implied_moments_have_no_sampling_error(panel):
    prior = GeneratorPrior(GaussianGenerator(random_state=0), n_samples=50, moments="implied")
    model = MeanRisk(risk_measure=RiskMeasure.VARIANCE, min_weights=None, prior_estimator=prior).fit(panel)
    distribution = model.prior_estimator_.return_distribution_
    generator = model.prior_estimator_.generator_
    np.testing.assert_array_equal(distribution.covariance, generator.covariance_)
    np.testing.assert_array_equal(distribution.mu, generator.mean_)
    assert distribution.returns.shape == (50, 5)
    np.testing.assert_allclose(model.weights_, minimum_variance(generator.covariance_)[0], atol=2e-4)


def test_the_moments_are_those_of_the_inner_prior(panel):
    inner = EmpiricalPrior(ShrunkMu(), FinediffCovariance(QuadraticInverseShrinkage()))
    prior = GeneratorPrior(GaussianGenerator(random_state=0), 400, inner).fit(panel)
    rows = GaussianGenerator(random_state=0).fit(panel).sample(400)
    expected = clone(inner).fit(rows).return_distribution_
    for name in ("mu", "covariance", "returns"):
        np.testing.assert_allclose(
            getattr(prior.return_distribution_, name), getattr(expected, name), rtol=1e-9, err_msg=name
        )
    assert list(prior.prior_estimator_.feature_names_in_) == list(panel.columns)


def test_views_stand_inside_and_around(panel):
    first = panel.columns[0]
    view = f"{first} == 0.002"
    generator = GaussianGenerator(random_state=0)
    inside = GeneratorPrior(generator, 1000, EntropyPooling(mean_views=[view])).fit(panel)
    around = EntropyPooling(prior_estimator=GeneratorPrior(generator, 1000), mean_views=[view]).fit(panel)
    for distribution in (inside.return_distribution_, around.return_distribution_):
        assert distribution.sample_weight.sum() == pytest.approx(1)
        assert distribution.sample_weight @ distribution.returns[:, 0] == pytest.approx(0.002, rel=1e-3)
    plain = GeneratorPrior(generator, 1000).fit(panel).return_distribution_.mu[0]
    tilted = GeneratorPrior(generator, 1000, BlackLitterman(views=[view])).fit(panel)
    assert plain < tilted.return_distribution_.mu[0] < 0.002


def test_a_constant_asset_stays_constant(panel):
    """skfolio's own prior stops at a frame with one; its scenarios, the moments' ripple aside, are the constant."""
    X = panel.assign(cash=1e-4, loan=2e-4)
    for moments in ("scenarios", "implied"):
        prior = GeneratorPrior(GaussianGenerator(random_state=0), 500, moments=moments).fit(X)
        distribution = prior.return_distribution_
        np.testing.assert_array_equal(distribution.returns[:, 5:], np.tile([1e-4, 2e-4], (500, 1)))
        np.testing.assert_allclose(distribution.mu[5:], [1e-4, 2e-4], rtol=1e-10)
        # The ripples have mean 0, the sd stated, and no correlation with each other.
        block = distribution.covariance[5:, 5:]
        np.testing.assert_allclose(block, 1e-12 * np.eye(2), rtol=3e-3, atol=1e-18)
    model = MeanRisk(prior_estimator=GeneratorPrior(GaussianGenerator(random_state=0), 500)).fit(X)
    assert model.weights_[5:].sum() > 0.99


def test_nothing_random_but_the_generator(panel):
    """Two draws agree where the generator or the prior is seeded, and only there."""
    draw = lambda **p: GeneratorPrior(**p, n_samples=20).fit(panel).return_distribution_.returns  # noqa: E731
    seeded, free = GaussianGenerator(random_state=0), GaussianGenerator()
    np.testing.assert_array_equal(draw(generator=seeded), draw(generator=seeded))
    np.testing.assert_array_equal(
        draw(generator=free, random_state=3), draw(generator=seeded, random_state=3)
    )
    assert (draw(generator=free) != draw(generator=free)).all()


def test_missing_returns_go_to_generators_that_take_them(panel):
    X = panel.copy()
    X.iloc[:120, 2] = np.nan
    model = MeanRisk(
        prior_estimator=GeneratorPrior(FactorDiffusionGenerator(random_state=0, residual=False), 500)
    )
    assert model.fit(X).weights_.sum() == pytest.approx(1)
    assert np.isfinite(model.prior_estimator_.return_distribution_.returns).all()
    with pytest.raises(ValueError, match="got NaN"):
        GeneratorPrior(GaussianGenerator()).fit(X)


# ------------------------------------------------------------------------------- the implied contract


@pytest.fixture(scope="module")
def market():
    return factor_market(6, 2, random_state=0, df=6).sample(600, random_state=1)


STATED = [
    GaussianGenerator(random_state=0),
    StudentTGenerator(dof=9, random_state=0),
    SmoothedBootstrapGenerator(random_state=0),
    SmoothedBootstrapGenerator(bandwidth=1.0, random_state=0),
    FactorDiffusionGenerator(random_state=0),
    FactorDiffusionGenerator(heavy_tails=False, residual=False, random_state=0),
]


def test_every_class_that_states_a_covariance_is_in_the_list():
    classes = [getattr(finediff.generators, name) for name in finediff.generators.__all__]
    rows = np.random.default_rng(0).standard_normal((250, 2)) / 100
    saying = set()
    for kind in classes:
        if kind is finediff.generators.ScenarioGenerator:
            continue
        quick = {"steps": 2, "iterations": 2, "nodes": 3, "time_nodes": 5, "device": "cpu"}
        generator = kind(random_state=0)
        quick = {k: v for k, v in quick.items() if k in generator.get_params()}
        if hasattr(generator.set_params(**quick).fit(rows), "covariance_"):
            saying.add(kind)
    assert saying == {type(generator) for generator in STATED}


@pytest.mark.parametrize("generator", STATED, ids=lambda value: type(value).__name__)
def test_the_covariance_stated_is_that_of_the_scenarios(generator, market):
    generator = clone(generator).fit(market)
    m, seeds = 250_000, 4
    first, second, fourth = 0.0, 0.0, 0.0
    for seed in range(seeds):
        centred = np.asarray(generator.sample(m, random_state=seed)) - generator.mean_
        squares = centred**2
        first = first + centred.sum(axis=0)
        second, fourth = second + centred.T @ centred, fourth + squares.T @ squares
    m *= seeds
    drawn = second / m
    standard_error = np.sqrt((fourth / m - drawn**2) / m)
    assert np.abs((drawn - generator.covariance_) / standard_error).max() < 4.5
    assert np.abs(first / m / np.sqrt(np.diag(drawn) / m)).max() < 4.5


def test_moments_that_are_not_those_of_the_scenarios_are_refused(panel):
    class Off(GaussianGenerator):
        def _sample(self, n, seed):
            return super()._sample(n, seed) + 0.25 * np.sqrt(np.diag(self.covariance_))

    GeneratorPrior(Off(random_state=0)).fit(panel)
    with pytest.raises(ValueError, match="expected scenarios with the mean that the generator states"):
        GeneratorPrior(Off(random_state=0), moments="implied").fit(panel)


# ------------------------------------------------------------------------ fit once, stress many


def test_a_stress_is_held_exactly(fitted, panel):
    a, b, c = panel.columns[:3]
    path = np.linspace(-0.03, 0.03, 2000)
    prior = fitted.stressed({a: -0.07, b: (-0.02, -0.01), c: path})
    distribution = prior.return_distribution_
    assert (distribution.returns[:, 0] == -0.07).all()
    assert distribution.mu[0] == pytest.approx(-0.07, rel=1e-10)
    assert distribution.returns[:, 1].min() >= -0.02
    assert distribution.returns[:, 1].max() <= -0.01
    np.testing.assert_array_equal(distribution.returns[:, 2], path)
    others = fitted.stressed({a: -0.07}).return_distribution_.mu[1:] - fitted.return_distribution_.mu[1:]
    assert (others < -0.005).all()  # the crash takes the others along
    # In the constructor it is the same law and, by the same random numbers, the same scenarios.
    stressed = clone(fitted).set_params(stress=prior.stress).fit(panel)
    np.testing.assert_array_equal(stressed.return_distribution_.returns, distribution.returns)


def test_a_portfolio_meets_a_stress(fitted, panel):
    crash = fitted.stressed({panel.columns[0]: -0.07})
    model = MeanRisk(risk_measure=RiskMeasure.CVAR).fit(panel)
    loss = model.predict(crash.return_distribution_)
    np.testing.assert_allclose(loss.returns, crash.return_distribution_.returns @ model.weights_, rtol=1e-12)


@pytest.mark.parametrize("generator", [DDPMGenerator(**SMALL, random_state=0), FactorDiffusionGenerator()])
def test_guided_generators_hold_a_stress_too(generator, panel):
    prior = GeneratorPrior(generator, 300, stress={panel.columns[1]: 0.05}, random_state=1).fit(panel)
    assert (prior.return_distribution_.returns[:, 1] == 0.05).all()


def test_arrays_are_stressed_by_number(panel):
    prior = GeneratorPrior(RidgeScoreGenerator(random_state=0), 200, stress={2: -0.1}).fit(panel.to_numpy())
    assert (prior.return_distribution_.returns[:, 2] == -0.1).all()


def test_nothing_is_fitted_again(panel):
    fits, name = Shared(), panel.columns[0]
    prior = GeneratorPrior(Counting(random_state=0, fits=fits), 100).fit(panel)
    assert fits == [300]
    stressed = [prior.stressed({name: size}) for size in np.linspace(-0.1, 0.1, 20)]
    again = stressed[0].stressed({name: -0.2}).stressed(None)
    np.testing.assert_array_equal(again.return_distribution_.returns, prior.return_distribution_.returns)
    for one in stressed[:3]:
        for risk in (RiskMeasure.CVAR, RiskMeasure.VARIANCE):
            model = MeanRisk(risk_measure=risk, prior_estimator=one).fit(panel.iloc[-50:])
            used = model.prior_estimator_.return_distribution_.returns
            np.testing.assert_array_equal(used, one.return_distribution_.returns)
    assert not isinstance(again.generator.estimator, FrozenEstimator)
    assert fits == [300]


def test_implied_moments_are_not_those_under_a_stress(panel):
    fits, stress = Shared(), {panel.columns[0]: -0.07}
    prior = GeneratorPrior(Counting(random_state=0, fits=fits), 100, moments="implied").fit(panel)
    with pytest.raises(ValueError, match="moments='scenarios'"):
        prior.stressed(stress)
    prior.set_params(moments="scenarios").stressed(stress)
    assert fits == [300]


def test_a_condition_goes_to_the_generator(panel):
    regime = pd.Series(np.where(np.arange(300) < 150, "calm", "wild"), panel.index)
    with config_context(enable_metadata_routing=True):
        generator = DDPMGenerator(**SMALL, random_state=0).set_fit_request(condition=True)
        prior = GeneratorPrior(generator, 50, condition="calm").fit(panel, condition=regime)
    expected = DDPMGenerator(**SMALL, random_state=0).fit(panel, condition=regime)
    for wanted, found in (("calm", prior), ("wild", prior.stressed(None, condition="wild"))):
        np.testing.assert_array_equal(
            found.return_distribution_.returns, expected.sample(50, condition=wanted)
        )


# ------------------------------------------------------------------------ folds, grids, workers


def models():
    prior = GeneratorPrior(RidgeScoreGenerator(random_state=0), 300)
    ensemble = EmpiricalPrior(covariance_estimator=FinediffCovariance(WINDOWS))
    return [
        MeanRisk(risk_measure=RiskMeasure.CVAR, prior_estimator=prior),
        MeanRisk(prior_estimator=ensemble),
    ]


@pytest.mark.parametrize("model", models(), ids=["scenarios", "ensemble"])
def test_a_walk_does_not_look_ahead(model, panel):
    walk = WalkForward(train_size=120, test_size=60)
    before = cross_val_predict(model, panel, cv=walk)
    X = panel.copy()
    X.iloc[180:] = X.iloc[180:].to_numpy()[::-1] * [1, -1, 2, 0.5, 1]
    after = cross_val_predict(model, X, cv=walk)
    np.testing.assert_array_equal(before[0].weights, after[0].weights)  # trained on rows 0 to 119
    np.testing.assert_array_equal(before[1].weights, after[1].weights)  # 60 to 179
    np.testing.assert_array_equal(before[0].returns, after[0].returns)
    assert np.abs(before[2].weights - after[2].weights).max() > 0.01
    alone = clone(model).fit(panel.iloc[60:180])
    np.testing.assert_allclose(before[1].weights, alone.weights_, rtol=1e-9, atol=1e-12)


def test_two_workers_give_the_same_walk(panel):
    walk = WalkForward(train_size=120, test_size=60)
    for model in models():
        here, there = (cross_val_predict(model, panel, cv=walk, n_jobs=n) for n in (1, 2))
        np.testing.assert_allclose(
            [p.weights for p in here], [p.weights for p in there], rtol=1e-9, atol=1e-12
        )


def test_grids_reach_inside(panel):
    model = MeanRisk(prior_estimator=EmpiricalPrior(covariance_estimator=FinediffCovariance(WINDOWS)))
    path = "prior_estimator__covariance_estimator__estimator"
    grid = {
        path: [QuadraticInverseShrinkage(), WINDOWS],
        "prior_estimator__covariance_estimator__nearest": [False],
    }
    walk = WalkForward(train_size=120, test_size=60)
    search = GridSearchCV(model, grid, cv=walk).fit(panel)
    assert len(search.cv_results_["params"]) == 2
    inner = search.best_estimator_.prior_estimator_.covariance_estimator_
    assert type(inner.estimator_) is type(search.best_params_[path])
    search = GridSearchCV(model, {f"{path}__diagonal": [0.0, 1.0]}, cv=walk).fit(panel)
    scores = search.cv_results_["mean_test_score"]
    assert scores[0] != scores[1]
    model = MeanRisk(prior_estimator=GeneratorPrior(SmoothedBootstrapGenerator(random_state=0), 100))
    search = GridSearchCV(model, {"prior_estimator__generator__bandwidth": [0.1, 3.0]}, cv=walk).fit(panel)
    assert search.best_estimator_.prior_estimator_.generator_.bandwidth in (0.1, 3.0)


def test_a_pickle_is_the_same_prior(fitted, panel):
    again = pickle.loads(pickle.dumps(fitted))
    stress = {panel.columns[0]: -0.07}
    np.testing.assert_array_equal(
        again.stressed(stress).return_distribution_.returns,
        fitted.stressed(stress).return_distribution_.returns,
    )


def test_parameters_go_round():
    prior = GeneratorPrior(
        GaussianGenerator(), 7, EmpiricalPrior(), {"a": 1.0}, "calm", "scenarios", random_state=4
    )
    copy = clone(prior)
    for name, value in prior.get_params(deep=False).items():
        same = getattr(copy, name)
        assert same == value or (type(same) is type(value) and same is not value), name
    assert copy.set_params(generator__random_state=9).generator.random_state == 9
    assert prior.generator.random_state is None
    wrapped = FinediffCovariance(QuadraticInverseShrinkage(standardise=False), False, True, 7)
    copy = clone(wrapped)
    assert (copy.nearest, copy.higham, copy.higham_max_iteration) == (False, True, 7)
    assert copy.get_params()["estimator__standardise"] is False


@pytest.mark.filterwarnings("ignore::finediff.panel.PanelWarning")
@parametrize_with_checks([GeneratorPrior(GaussianGenerator(), n_samples=50)])
def test_scikit_learn_checks(estimator, check):
    state = np.random.get_state()  # noqa: NPY002 (some checks draw from it themselves)
    check(estimator)
    np.random.set_state(state)  # noqa: NPY002


# ---------------------------------------------------------------------------------- covariances


@pytest.mark.parametrize("estimator", COVARIANCES, ids=lambda value: type(value).__name__)
def test_every_covariance_serves_skfolio(estimator, panel):
    wrapped = FinediffCovariance(estimator)
    assert isinstance(wrapped, BaseCovariance)
    alone = clone(estimator).fit(panel)
    model = MeanRisk(min_weights=None, prior_estimator=EmpiricalPrior(covariance_estimator=wrapped)).fit(
        panel
    )
    used = model.prior_estimator_.covariance_estimator_
    np.testing.assert_array_equal(used.covariance_, alone.covariance_)
    np.testing.assert_array_equal(used.location_, alone.location_)
    assert list(used.feature_names_in_) == list(panel.columns)
    np.testing.assert_allclose(model.weights_, minimum_variance(alone.covariance_)[0], atol=5e-4)
    np.testing.assert_allclose(pickle.loads(pickle.dumps(used)).score(panel), used.score(panel), rtol=1e-14)
    assert used.score(panel) > EmpiricalCovariance().fit(panel * 3).score(panel)


def test_the_default_is_the_window_ensemble(panel):
    np.testing.assert_array_equal(
        FinediffCovariance().fit(panel).covariance_, WindowEnsembleCovariance().fit(panel).covariance_
    )


def test_a_singular_covariance_becomes_the_nearest_that_is_not(panel):
    class Sample(BaseEstimator):
        def fit(self, X, y=None):
            self.covariance_ = np.cov(np.asarray(X).T)
            return self

    few = panel.iloc[:4]  # of rank 3
    with pytest.warns(UserWarning, match="positive definite"):
        repaired = FinediffCovariance(Sample()).fit(few)
    assert np.linalg.eigvalsh(repaired.covariance_).min() > 0
    np.testing.assert_allclose(np.diag(repaired.covariance_), few.var(), rtol=1e-10)
    np.testing.assert_array_equal(repaired.location_, few.to_numpy().mean(axis=0))
    left = FinediffCovariance(Sample(), nearest=False).fit(few)
    np.testing.assert_array_equal(left.covariance_, np.cov(few.to_numpy().T))


@pytest.mark.filterwarnings("ignore")
def test_scikit_learn_checks_the_covariance():
    """One fails for finediff's own sentence about a missing value, which names row and column."""
    state = np.random.get_state()  # noqa: NPY002 (some checks draw from it themselves)
    results = check_estimator(FinediffCovariance(QuadraticInverseShrinkage()), on_fail=None)
    np.random.set_state(state)  # noqa: NPY002
    assert {r["check_name"] for r in results if r["status"] == "failed"} <= {"check_estimators_nan_inf"}


# ------------------------------------------------------------------------------------- bad input


class Stub(BaseEstimator):
    """Scenarios as given."""

    def __init__(self, rows=None, covariance=None):
        self.rows = rows
        self.covariance = covariance

    def fit(self, X, y=None):
        self.fitted_ = True
        if self.covariance is not None:
            self.covariance_ = self.covariance
        return self

    def sample(self, n_samples=1000):
        return self.rows


class Deaf(Counting):
    """Takes a stress and does not follow it."""

    def _sample(self, n, seed, stress=None):
        return super()._sample(n, seed)


ROWS = np.random.default_rng(0).standard_normal((20, 5)) / 100
HOLE = np.where(np.arange(100).reshape(20, 5) == 33, np.nan, ROWS)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"generator": 3}, "expected a generator with fit and sample, got 3"),
        ({"generator": QuadraticInverseShrinkage()}, "expected a generator with fit and sample"),
        ({"n_samples": 0}, "n_samples"),
        ({"n_samples": 2.5}, "n_samples"),
        ({"n_samples": 1}, "a covariance needs two rows"),
        ({"moments": "samples"}, "expected moments 'scenarios' or 'implied', got 'samples'"),
        ({"moments": "implied", "stress": {"a": 0.1}}, "expected no stress with implied moments"),
        ({"moments": "implied", "condition": "calm"}, "expected no condition with implied moments"),
        ({"moments": "implied", "prior_estimator": EmpiricalPrior()}, "expected no prior_estimator with"),
        ({"moments": "implied", "generator": Stub(ROWS)}, r"covariance_ of shape \(5, 5\), got .* with none"),
        ({"moments": "implied", "generator": Stub(ROWS, np.eye(4))}, r"got .* with \(4, 4\)"),
        ({"prior_estimator": EmpiricalCovariance()}, "expected prior_estimator to be a prior of skfolio"),
        (
            {"prior_estimator": EmpiricalPrior(covariance_estimator=FinediffCovariance())},
            "does not read the order",
        ),
        (
            {"prior_estimator": EmpiricalPrior(covariance_estimator=FinediffCovariance(WINDOWS))},
            "does not read the order",
        ),
        ({"prior_estimator": EmpiricalPrior(EWMu())}, "does not read the order"),
        ({"generator": Stub(ROWS[:10])}, r"expected scenarios of shape \(20, 5\), got \(10, 5\)"),
        ({"generator": Stub(HOLE)}, "expected finite scenarios, got nan in scenario 6 of 'AMD'"),
        (
            {"generator": Stub(pd.DataFrame(ROWS, columns=list("vwxyz")))},
            "expected scenarios of the assets of X in their order",
        ),
        ({"generator": Stub(ROWS), "random_state": 1}, "expected no random_state for this generator"),
        ({"generator": Stub(ROWS), "stress": {"AMD": 0.1}}, "expected no stress for this generator"),
        ({"stress": {"AMD": 0.1}}, "expected no stress for GaussianGenerator"),
        ({"generator": RidgeScoreGenerator(), "stress": {"SPY": 0.1}}, "expected an asset of the panel"),
        ({"generator": Deaf(fits=Shared()), "stress": {"AMD": 0.1}}, "does not follow it"),
        ({"random_state": "seed"}, "expected random_state to be None"),
    ],
)
def test_bad_priors_are_refused_with_a_sentence(panel, arguments, match):
    X = panel.set_axis(["AAPL", "SPX", "MSFT", "AMD", "XOM"], axis=1)
    with pytest.raises(ValueError, match=match):
        GeneratorPrior(**({"generator": GaussianGenerator(), "n_samples": 20} | arguments)).fit(X)


@pytest.mark.parametrize(
    ("estimator", "match"),
    [
        (clip, "expected an estimator with fit"),
        (Stub(), r"expected an estimator with a covariance_ of shape \(5, 5\) after fit, got .* none"),
        (Stub(covariance=np.eye(3)), r"with \(3, 3\)"),
    ],
)
def test_bad_covariances_are_refused_with_a_sentence(panel, estimator, match):
    with pytest.raises(ValueError, match=match):
        FinediffCovariance(estimator).fit(panel)


def test_a_frozen_generator_of_other_assets_is_refused(panel):
    other = FrozenEstimator(GaussianGenerator().fit(panel.iloc[:, ::-1]))
    with pytest.raises(ValueError, match="a frozen generator fitted on others"):
        GeneratorPrior(other).fit(panel)
    narrow = FrozenEstimator(GaussianGenerator().fit(panel.to_numpy()[:, :3]))
    with pytest.raises(ValueError, match=r"got \(5000, 3\)"):
        GeneratorPrior(narrow).fit(panel)
