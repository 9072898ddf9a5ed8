"""Score networks behind the door: the untrained one is a known Gaussian, training keeps the variance, fits resume."""

import time

import numpy as np
import pytest
import torch

from finediff.diffusion.objective import DenoisingScoreMatching
from finediff.generators import DDPMGenerator, FlowMatchingGenerator
from finediff.panel import Standardizer, load_prices, random_split, to_returns

KINDS = [DDPMGenerator, FlowMatchingGenerator]
every_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(scope="module")
def halves():
    """The last 5,000 days of the bundled panel: a random half to learn from, the other to compare with."""
    return random_split(to_returns(load_prices()).iloc[-5000:], held_out=0.5, random_state=0)


def small(kind, **arguments):
    return kind(**{"steps": 300, "width": 16, "depth": 1, "device": "cpu", "random_state": 0, **arguments})


# -------------------------------------------------------------------------------------- untrained


@every_kind
def test_an_untrained_network_is_the_shrunk_gaussian(kind, returns):
    X, m = returns.iloc[:400, :6].to_numpy(), 20_000
    generator = small(kind, steps=1, learning_rate=1e-12).fit(X)
    draws = generator.sample(m)
    scaler = Standardizer(whiten=True).fit(X)
    root = scaler.unwhitening_ * scaler.scale_
    covariance = root.T @ root
    variance = np.diag(covariance)
    assert np.abs((draws.mean(0) - X.mean(0)) / np.sqrt(variance / m)).max() < 4.5
    standard_error = np.sqrt((covariance**2 + np.outer(variance, variance)) / m)
    z = (np.cov(draws.T) - covariance) / standard_error
    assert np.abs(z).max() < 4.5


@every_kind
def test_the_first_steps_do_no_harm(kind, returns):
    X = returns.iloc[:, :6]
    for steps in (1, 10):
        ratio = small(kind, steps=steps).fit(X).sample(4000).var() / X.var()
        assert ratio.between(0.8, 1.25).all()


# ---------------------------------------------------------------------------------------- trained


@every_kind
def test_a_short_training_keeps_the_variance(kind, returns):
    generator = kind(steps=300, device="cpu", random_state=0).fit(returns)
    ratio = generator.sample(4000).var() / returns.var()
    assert 0.8 < ratio.median() < 1.25
    assert ratio.max() < 10
    assert generator.history_.step == [100, 200, 300]
    assert len(generator.history_.held_out_loss) == 3


def test_the_default_ddpm_keeps_variances_and_correlations(halves):
    train, held_out = halves
    started = time.process_time()
    generator = DDPMGenerator(device="cpu", random_state=0).fit(train)
    fitted = time.process_time()
    scenarios = generator.sample(20_000)
    drawn = time.process_time()

    pairs = np.triu_indices(train.shape[1], 1)

    def correlation_error(a, b):
        return np.abs(np.corrcoef(a.T) - np.corrcoef(b.T))[pairs].mean()

    ratio = scenarios.var() / train.var()
    error, error_held_out = correlation_error(scenarios, train), correlation_error(scenarios, held_out)
    floor = correlation_error(train, held_out)
    print(
        f"\nDDPMGenerator on {train.shape}: fit {fitted - started:.1f} s, 20,000 scenarios {drawn - fitted:.1f} s "
        f"of CPU; best step {generator.history_.best_step}\nvariance ratio: median {ratio.median():.3f}, "
        f"{ratio.min():.3f} to {ratio.max():.3f}\nmean absolute correlation error: {error:.4f} to the training "
        f"rows, {error_held_out:.4f} to the held-out ones (training to held-out {floor:.4f})"
    )
    assert 0.9 < ratio.median() < 1.1
    assert error < 0.03
    assert error_held_out < floor + 0.02


def test_an_asset_that_never_moves_does_not_disturb_training(returns):
    X = returns.iloc[:, :5].assign(cash=0.0001)
    scenarios = small(DDPMGenerator).fit(X).sample(4000)
    assert (scenarios["cash"] == 0.0001).all()
    assert 0.8 < (scenarios.var() / X.var()).iloc[:5].median() < 1.25


@every_kind
def test_few_rows_are_all_trained_on(kind, returns):
    """A tenth of 150 rows is too few to stop early by."""
    generator = small(kind, steps=10).fit(returns.iloc[:150])
    assert generator.history_.held_out_loss == []
    assert small(kind, steps=10).fit(returns.iloc[:200]).history_.held_out_loss != []
    assert small(kind, steps=10, held_out=0).fit(returns).history_.held_out_loss == []


def test_evaluations_are_counted(returns):
    generator = small(DDPMGenerator, steps=1).fit(returns.iloc[:100])
    calls = []
    handle = generator.score_model_.network.register_forward_hook(lambda *_: calls.append(1))
    generator.sample(3)
    handle.remove()
    assert len(calls) == generator.evaluations_ == 65


def test_the_number_of_threads_is_put_back(returns):
    before = torch.get_num_threads()
    small(DDPMGenerator, steps=1).fit(returns.iloc[:100]).sample(3)
    assert torch.get_num_threads() == before


# ------------------------------------------------------------------------------------- checkpoint


class PowerCut(Exception):
    """Ends a training from outside."""


def interrupt(monkeypatch, after):
    """Let the loss be asked for ``after`` times, then never again."""
    whole, calls = DenoisingScoreMatching.__call__, []

    def loss(self, *arguments):
        calls.append(1)
        if len(calls) > after:
            raise PowerCut
        return whole(self, *arguments)

    monkeypatch.setattr(DenoisingScoreMatching, "__call__", loss)


@every_kind
@pytest.mark.parametrize("after", [50, 250])
def test_an_interrupted_fit_goes_on_to_the_same_weights(kind, after, returns, tmp_path, monkeypatch):
    X = returns.iloc[:400, :5]
    whole = small(kind).fit(X)
    generator = small(kind, checkpoint=tmp_path / "fit.safetensors")
    with monkeypatch.context() as patch:
        interrupt(patch, after)
        with pytest.raises(PowerCut):
            generator.fit(X)
    assert (tmp_path / "fit.safetensors").exists() == (after > 100)
    resumed = generator.fit(X)
    assert resumed.history_ == whole.history_
    for a, b in zip(whole.score_model_.parameters(), resumed.score_model_.parameters()):
        assert torch.equal(a, b)
    np.testing.assert_array_equal(whole.sample(50), resumed.sample(50))


def test_a_finished_fit_is_read_from_its_checkpoint(returns, tmp_path, monkeypatch):
    X = returns.iloc[:300, :5]
    generator = small(DDPMGenerator, steps=100, checkpoint=tmp_path / "fit.safetensors").fit(X)
    expected = generator.sample(50)
    interrupt(monkeypatch, after=0)
    np.testing.assert_array_equal(generator.fit(X).sample(50), expected)


def test_a_checkpoint_of_another_training_is_refused(returns, tmp_path):
    X = returns.iloc[:300, :5]
    arguments = {"steps": 20, "checkpoint": tmp_path / "fit.safetensors"}
    small(DDPMGenerator, **arguments).fit(X)
    tilted = X.copy()
    tilted.iloc[100] *= 1.01
    others = {
        "other rows, as many": (small(DDPMGenerator, **arguments), returns.iloc[300:600, :5]),
        "one row changed": (small(DDPMGenerator, **arguments), tilted),
        "another seed": (small(DDPMGenerator, **arguments, random_state=1), X),
        "another width": (small(DDPMGenerator, **arguments, width=32), X),
        "another rate": (small(DDPMGenerator, **arguments, learning_rate=1e-3), X),
        "another model": (small(FlowMatchingGenerator, **arguments), X),
    }
    for generator, rows in others.values():
        with pytest.raises(ValueError, match="expected a checkpoint of this training"):
            generator.fit(rows)
