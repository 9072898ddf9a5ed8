"""ScenarioCovariance: the implied covariance, the error of drawing it, and what is refused."""

import numpy as np
import pandas as pd
import pytest
from sklearn.base import BaseEstimator, clone
from sklearn.utils import check_random_state
from threadpoolctl import threadpool_limits

from finediff.covariance import (
    ScenarioCovariance,
    clip,
    correlation_from_covariance,
    quadratic_inverse_shrinkage,
)
from finediff.generators import GaussianGenerator, StudentTGenerator


@pytest.fixture(autouse=True)
def one_thread():
    """Threads cost more than they save on matrices of this size."""
    with threadpool_limits(1):
        yield


@pytest.fixture
def frame():
    rng = np.random.default_rng(6)
    rows = (rng.standard_normal((250, 1)) + rng.standard_normal((250, 6))) * np.geomspace(0.005, 0.03, 6)
    return pd.DataFrame(rows + 1e-3, columns=list("uvwxyz"))


class Law(BaseEstimator):
    """N(0.01, covariance) or, with dof, a Student t of that covariance; says so if `implied`."""

    def __init__(self, covariance, implied=True, dof=None, mean=True):
        self.covariance = covariance
        self.implied = implied
        self.dof = dof
        self.mean = mean

    def fit(self, X, y=None):
        if self.implied:
            self.covariance_ = self.covariance
        if self.mean:
            self.mean_ = np.full(len(self.covariance), 0.01)
        self.drawn_ = 0
        return self

    def sample(self, n_samples=1000, *, random_state=None):
        self.drawn_ += n_samples
        rng = check_random_state(random_state)
        z = rng.standard_normal((n_samples, len(self.covariance))) @ np.linalg.cholesky(self.covariance).T
        if self.dof is not None:
            z *= np.sqrt((self.dof - 2) / rng.chisquare(self.dof, (n_samples, 1)))
        return 0.01 + z


TRUTH = (0.4 + 0.6 * np.eye(6)) * np.outer(*[np.geomspace(1, 3, 6)] * 2)


def test_the_implied_covariance_is_taken_without_drawing(frame):
    model = ScenarioCovariance(Law(TRUTH), scale="scenarios").fit(frame)
    np.testing.assert_array_equal(model.covariance_, TRUTH)
    np.testing.assert_array_equal(model.location_, 0.01)
    assert model.source_ == "implied"
    assert model.sampling_error_ == 0
    assert model.generator_.drawn_ == 0
    scaled = ScenarioCovariance(Law(TRUTH)).fit(frame)
    np.testing.assert_allclose(scaled.correlation_, correlation_from_covariance(TRUTH), rtol=1e-12)
    np.testing.assert_allclose(np.diag(scaled.covariance_), frame.var(), rtol=1e-12)
    np.testing.assert_allclose(scaled.location_, frame.mean(), rtol=1e-12)


def test_without_an_implied_covariance_scenarios_are_drawn(frame):
    drawn = ScenarioCovariance(Law(TRUTH, implied=False), n_scenarios=4000, random_state=1)
    asked = ScenarioCovariance(Law(TRUTH), n_scenarios=4000, random_state=1, source="samples")
    models = [clone(model).fit(frame) for model in (drawn, asked)]
    for model in models:
        assert model.source_ == "samples"
        assert model.generator_.drawn_ == 4000
    np.testing.assert_array_equal(models[0].covariance_, models[1].covariance_)
    lost = ScenarioCovariance(Law(TRUTH, mean=False), scale="scenarios", n_scenarios=4000).fit(frame)
    assert np.abs(lost.location_ - 0.01).max() < 5 * np.sqrt(TRUTH.max() / 4000)
    np.testing.assert_array_equal(lost.covariance_, TRUTH)


@pytest.mark.parametrize(("m", "chunk"), [(8000, 2048), (8000, 70), (500, 2048)])
def test_the_sampling_error_is_that_of_gaussian_rows(frame, m, chunk):
    """E |S - Sigma|^2 = (|Sigma|^2 + (tr Sigma)^2)/(m - 1) in the Frobenius norm."""
    exact = np.sqrt(((TRUTH**2).sum() + np.trace(TRUTH) ** 2) / (m - 1)) / np.linalg.norm(TRUTH)
    law = Law(TRUTH, implied=False)
    stated, made = [], []
    for seed in range(12):
        model = ScenarioCovariance(law, n_scenarios=m, chunk=chunk, scale="scenarios", random_state=seed)
        model.fit(frame)
        stated.append(model.sampling_error_)
        made.append(np.linalg.norm(model.covariance_ - TRUTH) / np.linalg.norm(TRUTH))
    assert np.mean(stated) == pytest.approx(exact, rel=0.12)
    assert np.sqrt(np.mean(np.square(made))) == pytest.approx(exact, rel=0.5)


def test_heavy_tails_show_in_the_sampling_error(frame):
    """Student t with 5 degrees of freedom: fourth moments three times those of a Gaussian."""
    errors = [
        np.mean(
            [
                ScenarioCovariance(Law(TRUTH, False, dof), random_state=s).fit(frame).sampling_error_
                for s in range(6)
            ]
        )
        for dof in (None, 5.0)
    ]
    assert errors[1] > 1.3 * errors[0]


def test_few_scenarios_state_no_error(frame):
    assert np.isnan(ScenarioCovariance(Law(TRUTH, False), n_scenarios=7).fit(frame).sampling_error_)
    assert ScenarioCovariance(Law(TRUTH, False), n_scenarios=8).fit(frame).sampling_error_ > 0


@pytest.mark.parametrize("generator", [GaussianGenerator(), StudentTGenerator()], ids=repr)
def test_implied_and_drawn_agree_for_the_classical_generators(frame, generator):
    options = {"scale": "scenarios", "random_state": 0, "n_scenarios": 40_000}
    implied = ScenarioCovariance(generator, **options).fit(frame)
    drawn = ScenarioCovariance(generator, source="samples", **options).fit(frame)
    gap = np.linalg.norm(implied.covariance_ - drawn.covariance_) / np.linalg.norm(implied.covariance_)
    assert gap < 4 * drawn.sampling_error_
    np.testing.assert_allclose(implied.location_, implied.generator_.mean_)


@pytest.mark.parametrize("cleaner", [clip, quadratic_inverse_shrinkage])
def test_the_cleaner_follows_the_generator_in_one_argument(frame, cleaner):
    raw = ScenarioCovariance(Law(TRUTH)).fit(frame)
    cleaned = ScenarioCovariance(Law(TRUTH), cleaner).fit(frame)
    np.testing.assert_array_equal(cleaned.covariance_, cleaner(raw.covariance_, len(frame)))


def test_frames_must_agree(frame):
    names = list(frame.columns)
    fine = pd.DataFrame(TRUTH, names, names)
    np.testing.assert_array_equal(
        ScenarioCovariance(Law(fine), scale="scenarios").fit(frame).covariance_, TRUTH
    )
    with pytest.raises(ValueError, match="another order"):
        ScenarioCovariance(Law(pd.DataFrame(TRUTH, names[::-1], names[::-1]))).fit(frame)


@pytest.mark.parametrize(
    ("model", "match"),
    [
        (ScenarioCovariance(Law(TRUTH), source="both"), "source"),
        (ScenarioCovariance(Law(TRUTH[:5, :5])), "other assets"),
        (ScenarioCovariance(Law(np.zeros((6, 6)))), "positive variances"),
        (ScenarioCovariance(Law(np.full((6, 6), np.nan))), "finite"),
    ],
)
def test_bad_implied_covariances_are_refused(frame, model, match):
    with pytest.raises(ValueError, match=match):
        model.fit(frame)


def test_a_generator_that_takes_missing_returns_may_have_them():
    from finediff.generators import FactorDiffusionGenerator

    rng = np.random.default_rng(0)
    X = 0.01 * (rng.standard_normal((400, 1)) + rng.standard_normal((400, 6)))
    X[:250, 0] = np.nan
    generator = FactorDiffusionGenerator(n_factors=1, residual=False, random_state=0)
    found = ScenarioCovariance(generator).fit(X)
    assert np.allclose(np.diag(found.covariance_), np.nanvar(X, axis=0, ddof=1))
    implied = generator.fit(X).covariance_
    correlation = implied / np.sqrt(np.outer(np.diag(implied), np.diag(implied)))
    assert np.allclose(found.correlation_, correlation)
    X[3, 2] = np.inf
    with pytest.raises(ValueError, match="infinity"):
        ScenarioCovariance(generator).fit(X)
