"""The generator without a network: units, order, seeds, saving, stress, small panels, tails, nothing copied."""

import contextlib
import json

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats

from finediff.diffusion.exact import ProductScaleMixtureScore
from finediff.diffusion.process import VP, Cosine, Linear
from finediff.diffusion.residual import LOG_SNR, ResidualScore
from finediff.diffusion.sample import DDIM, PosteriorSampling, ProbabilityFlow
from finediff.generators import DDPMGenerator, RidgeScoreGenerator, ScenarioGenerator
from finediff.generators.base import _FIT as FIT
from finediff.generators.ridge_score import LearnedLevels
from finediff.memorisation import memorised_fraction
from finediff.panel import PanelWarning, RobustStandardizer, load_prices, to_returns


def market(n=600, d=6, seed=0):
    """A volatility of the day, one of each asset, and a factor whose falls are larger than its rises."""
    rng = np.random.default_rng(seed)
    factor = rng.normal(size=(n, 1))
    factor = np.where(factor < 0, 1.4 * factor, factor)
    own = rng.normal(size=(n, d)) * np.exp(0.4 * rng.normal(size=(n, d)))
    day = np.exp(0.5 * rng.normal(size=(n, 1)))
    X = 0.01 * np.geomspace(0.6, 1.8, d) * day * (0.7 * factor + 0.6 * own) + 0.0003
    return pd.DataFrame(X, columns=list("ABCDEFGHIJKLMNOPQRSTUVWXYZ")[:d])


def ridge(**arguments):
    return RidgeScoreGenerator(**{"random_state": 0, "device": "cpu"} | arguments)


@pytest.fixture(scope="module")
def fitted():
    generator = ridge().fit(market())
    assert isinstance(generator.score_model_, ResidualScore)
    return generator


@pytest.fixture(scope="module")
def bundled():
    """Fitted to all but every fifth of the last 2,500 days of every other asset, and the days held out."""
    X = to_returns(load_prices()).iloc[-2500:, ::2]
    held_out = np.arange(len(X)) % 5 == 0
    return ridge().fit(X[~held_out]), X[~held_out], X[held_out]


# ----------------------------------------------------------------------------------- what is fitted


def test_the_parts_are_the_ones_stated(fitted):
    """scaler, EM and ridge, each by hand from the rows and the same seed."""
    X = market().to_numpy()
    scaler = RobustStandardizer().fit(X)
    z = torch.tensor(scaler.transform(X), dtype=torch.float32)
    base = ProductScaleMixtureScore.fit(z, VP())
    torch.testing.assert_close(fitted.base_.own, base.own, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(fitted.base_.common, base.common, rtol=1e-5, atol=1e-7)
    seen = fitted.score_model_
    assert abs(seen.directions[0].double().numpy() @ scaler.axes_[0]) == pytest.approx(1, rel=1e-5)
    noise = torch.Generator().manual_seed(fitted._seed(0, FIT))
    by_hand = ResidualScore.fit(base, z, torch.tensor(scaler.axes_[:1].copy()), draws=4, generator=noise)
    torch.testing.assert_close(seen.weights, by_hand.weights, rtol=1e-3, atol=1e-4)
    assert fitted.residual_nats_ == pytest.approx(by_hand.nats, rel=1e-3)


@pytest.mark.parametrize(("n", "directions"), [(199, 0), (200, 1), (999, 1), (1000, 5)])
def test_few_rows_learn_few_directions(n, directions):
    generator = ridge(draws=2, levels=4).fit(market(n))
    if directions:
        assert len(generator.score_model_.directions) == directions
    else:
        assert generator.score_model_ is generator.base_
        assert generator.residual_nats_ == 0


def test_without_directions_scenarios_are_draws_of_the_base():
    generator = ridge(directions=0).fit(market())
    z = generator.scaler_.transform(generator.sample(20_000))
    twin = generator.base_.sample(20_000, torch.Generator().manual_seed(9)).numpy()
    for j in range(6):
        assert stats.ks_2samp(z[:, j], twin[:, j]).pvalue > 1e-3
    assert stats.ks_2samp((z**2).sum(1), (twin**2).sum(1)).pvalue > 1e-3


def test_the_default_sampler_of_an_idle_residual_draws_the_base(fitted):
    """Heun over the learned levels, from exact draws there, is a map from the base's law to itself."""
    n, base = 5000, fitted.base_
    sampler = LearnedLevels()
    assert len(sampler.grid(VP())) == 25
    noise, exact = (
        torch.randn(n, 6, generator=torch.Generator().manual_seed(1)),
        base.sample(n, torch.Generator().manual_seed(2)),
    )
    start = base.process.perturb(exact, base.process.time(torch.tensor(LOG_SNR[0]).double()), noise)
    draws = sampler(base, (n, 6), start=start)
    other = base.sample(n, torch.Generator().manual_seed(3))
    for f in (lambda x: x[:, 0], lambda x: x.sum(1), lambda x: x.square().sum(1)):
        assert stats.ks_2samp(f(draws), f(other)).pvalue > 1e-3
    ratio = draws.std(0) / base.covariance.diagonal().sqrt()
    assert float((ratio - 1).abs().max()) < 0.05


def test_planted_falls_are_larger_than_rises_in_scenarios(fitted):
    """The base is symmetric; the residual finds the skew of the equally weighted portfolio."""
    portfolio = lambda g: g.sample(5000).mean(axis=1)  # noqa: E731
    wanted = stats.skew(market(50_000, seed=1).mean(axis=1))
    found, symmetric = stats.skew(portfolio(fitted)), stats.skew(portfolio(ridge(directions=0).fit(market())))
    print(f"\nskew {found:.2f}, base {symmetric:.2f}, planted {wanted:.2f}")
    assert found < symmetric - 0.2
    assert fitted.residual_nats_ > 0


# --------------------------------------------------------------------------------------- equivariance


@pytest.mark.parametrize("factor", [1e-3, 1e3, np.geomspace(1e-2, 1e2, 6)], ids=["1e-3", "1e3", "per asset"])
@pytest.mark.filterwarnings("ignore::finediff.panel.PanelWarning")
def test_units_come_back_as_they_went_in(fitted, factor):
    X = market()
    rescaled = ridge().fit(X * factor).sample(300) / factor
    np.testing.assert_allclose(rescaled, fitted.sample(300), rtol=2e-3, atol=2e-3 * X.std().min())


@pytest.mark.filterwarnings("ignore::finediff.panel.PanelWarning")
def test_binary_units_are_exact(fitted):
    factor = 2.0 ** np.arange(-3, 3)
    assert (ridge().fit(market() * factor).sample(200) / factor).equals(fitted.sample(200))


def test_permuted_assets_permute_the_parameters(fitted):
    order = [3, 0, 5, 1, 4, 2]
    other = ridge().fit(market().iloc[:, order])
    np.testing.assert_allclose(other.scaler_.scale_, fitted.scaler_.scale_[order], rtol=1e-6)
    np.testing.assert_allclose(
        other.scaler_.unwhitening_, fitted.scaler_.unwhitening_[np.ix_(order, order)], atol=1e-6
    )
    torch.testing.assert_close(other.base_.own, fitted.base_.own[order], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(other.base_.common, fitted.base_.common, rtol=1e-3, atol=1e-4)
    # The market's direction goes along, up to its sign; what is regressed on it has other noise.
    turned = fitted.score_model_.directions[:, order]
    assert float((other.score_model_.directions @ turned.T).abs()) == pytest.approx(1, abs=1e-4)
    assert other.residual_nats_ == pytest.approx(fitted.residual_nats_, rel=0.4)


# ------------------------------------------------------------------------------------ seeds and saving


def test_same_seed_same_bits(fitted):
    again = ridge().fit(market())
    pd.testing.assert_frame_equal(again.sample(200), fitted.sample(200), check_exact=True)
    assert not fitted.sample(200).equals(fitted.sample(200, random_state=1))
    assert not fitted.sample(200).equals(ridge(random_state=1).fit(market()).sample(200))


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"directions": 0},
        {"directions": 3, "process": Cosine()},
        {"process": Linear(), "sampler": PosteriorSampling(6)},
        {"directions": 0, "sampler": ProbabilityFlow(8)},
        {"sampler": DDIM(steps=6, eta=1.0)},
    ],
    ids=str,
)
def test_loading_gives_back_the_same_bits(arguments, tmp_path):
    fitted = ridge(draws=2, levels=6, **arguments).fit(market())
    loaded = ScenarioGenerator.load(fitted.save(tmp_path / "saved"))
    assert repr(loaded) == repr(fitted)
    assert loaded.residual_nats_ == fitted.residual_nats_
    pd.testing.assert_frame_equal(loaded.sample(200), fitted.sample(200), check_exact=True)
    if isinstance(fitted.sampler, PosteriorSampling):
        with pytest.raises(ValueError, match="expected a model with sample_posterior, got LinearStress"):
            loaded.sample(20, stress={"A": -0.02})
        return
    stress = {"A": -0.02}
    pd.testing.assert_frame_equal(
        loaded.sample(20, stress=stress), fitted.sample(20, stress=stress), check_exact=True
    )
    # ... and what is loaded is saved to the same bits again
    again = ScenarioGenerator.load(loaded.save(tmp_path / "again"))
    pd.testing.assert_frame_equal(again.sample(50), fitted.sample(50), check_exact=True)


def test_one_saved_on_a_missing_accelerator_loads(fitted, tmp_path):
    path = fitted.save(tmp_path / "saved") / "generator.json"
    about = json.loads(path.read_text())
    about["parameters"]["device"] = "cuda:99"
    path.write_text(json.dumps(about))
    loaded = ScenarioGenerator.load(tmp_path / "saved")
    assert loaded.device is None
    pd.testing.assert_frame_equal(loaded.sample(20), fitted.sample(20), rtol=1e-3, atol=1e-5)


# ---------------------------------------------------------------------------------------------- stress


def test_a_stress_holds_and_the_others_move_along(fitted):
    """... by about the conditional mean of the panel's own days like it, here of a Gaussian."""
    X, n = market(), 2000
    low = float(X["B"].mean() - 2 * X["B"].std())
    scenarios = fitted.sample(n, stress={"B": low})
    np.testing.assert_allclose(scenarios["B"], low, rtol=1e-5)
    C = X.cov()
    expected = X.mean() + C["B"] / C.loc["B", "B"] * (low - X["B"].mean())
    others = [name for name in X if name != "B"]
    ratio = (scenarios.mean()[others] - X.mean()[others]) / (expected - X.mean())[others]
    print(f"\nthe others move by {ratio.min():.2f} to {ratio.max():.2f} of the conditional mean")
    assert ratio.between(0.75, 1.3).all()
    # The base's own conditional spread, of a loud day, is larger than a Gaussian's; LinearStress loses some of it.
    left = np.sqrt(np.diag(C) - C["B"] ** 2 / C.loc["B", "B"])[others]
    assert (scenarios[others].std() > 0.8 * left).all()


def test_stresses_of_two_assets_and_of_a_band_hold(fitted):
    scenarios = fitted.sample(200, stress={"A": -0.02, "F": (0.0, np.inf)})
    np.testing.assert_allclose(scenarios["A"], -0.02, rtol=1e-4)
    assert (scenarios["F"] > -1e-6).all()


def test_a_stress_without_residual_holds():
    scenarios = ridge(directions=0).fit(market()).sample(200, stress={"C": -0.03})
    np.testing.assert_allclose(scenarios["C"], -0.03, rtol=1e-5)


# -------------------------------------------------------------------------------------- small panels


@pytest.mark.parametrize(("n", "d"), [(30, 5), (20, 26), (2, 3), (40, 1)])
def test_few_rows(n, d):
    X = market(n, d)
    with pytest.warns(PanelWarning, match=f"got {n}"):
        generator = ridge().fit(X)
    scenarios = generator.sample(2000)
    ratio = np.median(scenarios.var() / X.var())
    assert generator.score_model_ is generator.base_
    assert 0.4 < ratio < 2.5


def test_a_constant_asset_comes_back_and_leaves_the_others_alone(fitted):
    X = market()
    with_cash = X.assign(cash=0.1).loc[:, ["A", "B", "cash", "C", "D", "E", "F"]]
    generator = ridge().fit(with_cash)
    scenarios = generator.sample(2000)
    assert (scenarios["cash"] == 0.1).all()
    ratio = scenarios.drop(columns="cash").std() / fitted.sample(2000).std()
    assert ratio.between(0.85, 1.15).all()
    stressed = generator.sample(50, stress={"A": -0.02})
    np.testing.assert_allclose(stressed["A"], -0.02, rtol=1e-5)
    assert (stressed["cash"] == 0.1).all()


def test_a_constant_asset_says_nothing_of_the_day():
    """The laws of the others are those of the panel without it."""
    X = market(150, 3)
    alone, with_cash = ridge().fit(X), ridge().fit(X.assign(cash=0.1))
    torch.testing.assert_close(with_cash.base_.common, alone.base_.common, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(with_cash.base_.own[:3], alone.base_.own, rtol=1e-3, atol=1e-3)
    assert (with_cash.sample(4000).std()[:3] / alone.sample(4000).std()).between(0.9, 1.1).all()


@pytest.mark.parametrize(("n", "d", "most"), [(30, 50, 1.35), (120, 4, 1.25)])
def test_few_gaussian_rows_keep_their_spread(n, d, most):
    """What the prior adds to the variance of rows without tails."""
    X = np.random.default_rng(0).normal(size=(n, d)) / 100
    with pytest.warns(PanelWarning) if n < 50 else contextlib.nullcontext():
        generator = ridge().fit(X)
    assert 0.8 < np.median(generator.sample(8000).var(0) / X.var(0)) < most


# ----------------------------------------------------------------------------------- the bundled panel


def test_spread_and_tails_of_the_bundled_panel_are_nearer_than_a_networks(bundled):
    """... than those of a small DDPM; and the spread of the typical asset is within a tenth."""
    generator, X, _ = bundled
    ours = generator.sample(3000)
    network = (
        DDPMGenerator(
            steps=150, width=64, sampler=ProbabilityFlow(16), random_state=0, device="cpu", progress=False
        )
        .fit(X)
        .sample(3000)
    )
    log_kurtosis = lambda Y: np.log(stats.kurtosis(Y, fisher=False))  # noqa: E731
    gaps = [np.abs(log_kurtosis(Y) - log_kurtosis(X)).mean() for Y in (ours, network)]
    ratio = ours.var() / X.var()
    print(f"\nvariance ratio {ratio.min():.2f} to {ratio.max():.2f}, mean {ratio.mean():.3f};", end=" ")
    print(f"log kurtosis off by {gaps[0]:.2f}, of the network by {gaps[1]:.2f}")
    assert ratio.mean() == pytest.approx(1, abs=0.1)
    assert ratio.between(0.65, 1.4).all()
    assert gaps[0] < gaps[1]
    assert generator.residual_nats_ > 0
    difference = np.corrcoef(ours.T) - np.corrcoef(X.T)
    assert np.sqrt((difference**2).mean()) < 0.06


def test_nothing_is_memorised(bundled):
    generator, X, held_out = bundled
    found, fresh = memorised_fraction(generator.sample(2000), X), memorised_fraction(held_out, X)
    error = np.sqrt((fresh * (1 - fresh) + 1e-3) / len(held_out))
    print(f"\nmemorised {found:.4f}, of held-out rows {fresh:.4f}")
    assert found <= fresh + 3 * error
    # In two dimensions, where chance brings rows together, the comparison has something to compare.
    few = ridge().fit(X.iloc[:, :2])
    found, fresh = (
        memorised_fraction(few.sample(2000), X.iloc[:, :2]),
        memorised_fraction(held_out.iloc[:, :2], X.iloc[:, :2]),
    )
    assert fresh > 0.01
    assert found <= fresh + 3 * np.sqrt(fresh / len(held_out) + fresh / 2000)


# -------------------------------------------------------------------------------------------- refusals

BAD = [
    ({"draws": 1}, "expected draws to be a whole number, at least 2, got 1"),
    ({"draws": 2.5}, "expected draws to be a whole number, at least 2, got 2.5"),
    ({"levels": 1}, "expected levels to be a whole number, at least 2, got 1"),
    ({"folds": 1}, "expected folds to be a whole number, at least 2, got 1"),
    ({"folds": True}, "expected folds to be a whole number"),
    ({"directions": -1}, "expected directions to be a whole number, at least 0, got -1"),
    ({"directions": "market"}, "expected directions to be a whole number, at least 0, got 'market'"),
    ({"process": "VP"}, "expected process to be a Process or None, got 'VP'"),
    ({"sampler": "ddim"}, "expected sampler to be a Sampler or None, got 'ddim'"),
    ({"device": "abacus"}, "expected a device torch can use here, got 'abacus'"),
    ({"directions": 1, "folds": 700}, "expected at least 700 rows, got"),
]


@pytest.mark.parametrize(("arguments", "fragment"), BAD, ids=lambda value: str(value)[:30])
def test_bad_arguments_are_one_sentence(arguments, fragment):
    with pytest.raises(ValueError, match="expected") as caught:
        ridge(**arguments).fit(market())
    assert fragment in str(caught.value)
    assert "\n" not in str(caught.value)


def test_conditions_and_unknown_assets_are_refused(fitted):
    with pytest.raises(ValueError, match="expected no condition for RidgeScoreGenerator"):
        ridge().fit(market(), condition=np.zeros(600))
    with pytest.raises(ValueError, match="expected an asset of the panel, got 'Z'"):
        fitted.sample(5, stress={"Z": -0.1})


def test_the_density_is_the_base_s_in_the_units_of_the_returns():
    """It integrates to one, changes with units as a density must, and leaves out what never moved."""
    X = market(300, 1)
    generator = RidgeScoreGenerator(directions=0, random_state=0).fit(X)
    grid = np.linspace(-40, 40, 40_001)[:, None] * X.to_numpy().std()
    density = np.exp(generator.log_density(pd.DataFrame(grid, columns=X.columns)))
    total = density.sum() * (grid[1, 0] - grid[0, 0])
    assert abs(total - 1) < 1e-3
    X = market(300, 3)
    here = RidgeScoreGenerator(directions=0, random_state=0).fit(X).log_density(X)
    there = RidgeScoreGenerator(directions=0, random_state=0).fit(X / 2).log_density(X / 2)
    np.testing.assert_allclose(there, here + 3 * np.log(2), atol=1e-4)
    cash = RidgeScoreGenerator(directions=0, random_state=0).fit(X.assign(cash=0.01))
    np.testing.assert_allclose(cash.log_density(X.assign(cash=0.01)), here, atol=1e-3)


def test_numbered_columns_are_no_positions(tmp_path):
    """A stress of column 2 must not fall on the third asset, nor after loading."""
    X = market(60, 3).set_axis([2, 0, 1], axis=1)
    generator = RidgeScoreGenerator(random_state=0).fit(X)
    for fitted in (generator, RidgeScoreGenerator.load(generator.save(tmp_path / "model"))):
        with pytest.raises(ValueError, match="named by text"):
            fitted.sample(3, stress={2: -0.1})


def test_an_asset_that_only_rounds_says_nothing():
    """A constant up to its last bits is as good as a constant."""
    X = market(150, 3)
    cash = np.where(np.arange(len(X)) % 2, 0.1, 0.1 * (1 + 2e-16))
    draws = [
        RidgeScoreGenerator(directions=0, random_state=0).fit(X.assign(cash=c)).sample(500)
        for c in (0.1, cash)
    ]
    np.testing.assert_allclose(draws[1].iloc[:, :3], draws[0].iloc[:, :3], rtol=1e-4, atol=1e-7)
