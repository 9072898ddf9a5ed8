"""Generators as parts of other people's machines: scikit-learn's checks, skfolio's priors, frozen fits, workers."""

import pickle

import numpy as np
import pandas as pd
import pytest
from joblib import Parallel, delayed
from pandas.errors import InvalidIndexError
from skfolio import RiskMeasure
from skfolio.model_selection import WalkForward, cross_val_predict
from skfolio.optimization import MeanRisk
from skfolio.prior import SyntheticData
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.frozen import FrozenEstimator
from sklearn.utils.estimator_checks import parametrize_with_checks

from finediff.generators import (
    BootstrapGenerator,
    CopulaGenerator,
    DDPMGenerator,
    FactorDiffusionGenerator,
    FlowMatchingGenerator,
    GaussianGenerator,
    QuadratureScoreGenerator,
    RidgeScoreGenerator,
    SmoothedBootstrapGenerator,
    StudentTGenerator,
)

SMALL = {"steps": 3, "width": 8, "depth": 1, "device": "cpu"}
GENERATORS = [
    DDPMGenerator(**SMALL),
    FlowMatchingGenerator(**SMALL),
    QuadratureScoreGenerator(width=4, nodes=3, time_nodes=5, iterations=3, device="cpu"),
    RidgeScoreGenerator(device="cpu"),
    FactorDiffusionGenerator(device="cpu"),
    GaussianGenerator(),
    StudentTGenerator(),
    BootstrapGenerator(),
    BootstrapGenerator(method="stationary"),
    SmoothedBootstrapGenerator(),
    CopulaGenerator(),
    CopulaGenerator(margins="empirical"),
]


def expected_failed_checks(estimator):
    """None: every check of scikit-learn passes for every generator."""
    return {}


@pytest.mark.filterwarnings("ignore::finediff.panel.PanelWarning")
@parametrize_with_checks(GENERATORS, expected_failed_checks=expected_failed_checks)
def test_scikit_learn_checks(estimator, check):
    state = np.random.get_state()  # noqa: NPY002 (some checks draw from it themselves)
    check(estimator)
    np.random.set_state(state)  # noqa: NPY002


@pytest.fixture(scope="module")
def panel(returns):
    return returns.iloc[-300:, :5]


def minimum_cvar(generator, **arguments):
    prior = SyntheticData(distribution_estimator=generator, n_samples=400, **arguments)
    return MeanRisk(risk_measure=RiskMeasure.CVAR, prior_estimator=prior)


@pytest.mark.parametrize("generator", GENERATORS, ids=repr)
def test_skfolio_optimises_on_scenarios(generator, panel):
    model = minimum_cvar(clone(generator).set_params(random_state=0)).fit(panel)
    assert model.weights_.sum() == pytest.approx(1)
    scenarios = model.prior_estimator_.distribution_estimator_.sample(400)
    np.testing.assert_array_equal(model.prior_estimator_.return_distribution_.returns, scenarios)


def test_skfolio_walks_forward(panel):
    model = minimum_cvar(DDPMGenerator(**SMALL, random_state=0))
    walk = cross_val_predict(model, panel, cv=WalkForward(train_size=120, test_size=60))
    assert len(walk) == 3
    # A fold's weights depend on that fold's rows alone.
    alone = clone(model).fit(panel.iloc[60:180])
    np.testing.assert_allclose(walk[1].weights, alone.weights_, rtol=1e-12)


def test_skfolio_takes_a_frozen_fit(panel):
    """... which is how many sets of scenarios come from one training; an unfrozen one is cloned and fitted anew."""
    fitted = DDPMGenerator(**SMALL, random_state=0).fit(panel)
    other_rows = panel.iloc[:100]
    model = minimum_cvar(FrozenEstimator(fitted), sample_args={"random_state": 3}).fit(other_rows)
    used = model.prior_estimator_.return_distribution_.returns
    np.testing.assert_array_equal(used, fitted.sample(400, random_state=3))


def test_skfolio_gives_a_constant_asset_its_jitter_where_scenarios_are_an_array(panel):
    """skfolio refuses assets without variance and adds 1e-6 of noise to the constant scenarios of a stress."""
    X = panel.assign(cash=1e-4)
    model = minimum_cvar(GaussianGenerator(random_state=0)).fit(X.to_numpy())
    cash = model.prior_estimator_.return_distribution_.returns[:, 5]
    assert 0 < cash.std() < 2e-6
    assert model.weights_[5] > 0.99
    # Its SyntheticData indexes scenarios as an array, so a frame with a constant asset stops there.
    with pytest.raises(InvalidIndexError):
        minimum_cvar(GaussianGenerator(random_state=0)).fit(X)


@pytest.mark.parametrize("generator", GENERATORS, ids=repr)
def test_a_pickle_is_the_same_generator(generator, panel):
    fitted = clone(generator).set_params(random_state=0).fit(panel)
    pd.testing.assert_frame_equal(pickle.loads(pickle.dumps(fitted)).sample(20), fitted.sample(20))
    with pytest.raises(NotFittedError):
        clone(fitted).sample(20)


def test_workers_give_the_same_bits(panel):
    generators = [g(**SMALL, random_state=0) for g in (DDPMGenerator, FlowMatchingGenerator)]
    here = [generator.fit(panel).sample(20) for generator in generators]
    with Parallel(n_jobs=2) as workers:
        sampled = workers(delayed(generator.sample)(20) for generator in generators)
        fitted = workers(delayed(generator.fit)(panel) for generator in generators)
    for expected, drawn, generator in zip(here, sampled, fitted):
        pd.testing.assert_frame_equal(drawn, expected, check_exact=True)
        pd.testing.assert_frame_equal(generator.sample(20), expected, check_exact=True)
