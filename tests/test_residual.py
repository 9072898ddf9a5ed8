"""What is learned beside an exact base: nothing where the base is right, planted defects where it is not."""

import math
from unittest import mock

import pytest
import torch

from finediff.diffusion.exact import GaussianScore, ProductScaleMixtureScore
from finediff.diffusion.likelihood import held_out_nats
from finediff.diffusion.process import VP, Cosine, Linear, Process
from finediff.diffusion.residual import LOG_SNR, ResidualScore
from finediff.diffusion.sample import PosteriorSampling, ProbabilityFlow
from finediff.diffusion.score import from_denoised

D, N = 4, 2000
MARKET = torch.full((1, D), D**-0.5, dtype=torch.float64)
COMMON = torch.tensor([0.1, 0.2, 0.4, 0.2, 0.1], dtype=torch.float64)
OWN = torch.tensor([[0.3, 0.4, 0.3]], dtype=torch.float64).expand(D, -1)


def base(process=None):
    return ProductScaleMixtureScore(COMMON, OWN, 0.6, process or VP())


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def bent(x):
    """Falls of the market are half as large again as the base says, rises as large as it says."""
    along = x @ MARKET.T
    return x + 0.5 * along.clamp(max=0) * MARKET


def heavier(x):
    """The market moves as a power of what the base says."""
    along = x @ MARKET.T
    return x + (along.sign() * along.abs() ** 1.4 - along) * MARKET


def learned(X, on=None, directions=MARKET, seed=5, **arguments):
    arguments = {"draws": 4, "levels": 12} | arguments
    return ResidualScore.fit(on or base(), X, directions, generator=seeded(seed), **arguments)


@pytest.fixture(scope="module")
def planted():
    """Fitted to planted defects, and rows that were not seen."""
    rows = lambda seed: bent(base().sample(N, seeded(seed)))  # noqa: E731
    return learned(rows(1)), rows(2)


# ---------------------------------------------------------------------------------------------- laws


@pytest.mark.parametrize("process", [VP(), Cosine(), Linear()], ids=lambda p: type(p).__name__)
def test_the_readings_agree(process):
    model = learned(bent(base().sample(400, seeded(1))), base(process))
    assert model.weights.any()
    x = 2 * torch.randn(6, D, dtype=torch.float64, generator=seeded())
    for t in (
        *process.time(torch.tensor([-5.0, 0.0, 3.0, 7.5]).double()),
        torch.linspace(0.1, 0.9, 6).double(),
    ):
        sigma = process.levels(t, x)[1]
        noise = from_denoised(model.denoise(x, t), x, t, process, "eps")
        torch.testing.assert_close(model.noise(x, t), noise, rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(model.score(x, t), -model.noise(x, t) / sigma, rtol=1e-12, atol=0)


def test_what_is_learned_lies_along_the_directions(planted):
    model, rows = planted
    change = model.noise(rows, 0.4) - model.base.noise(rows, 0.4)
    torch.testing.assert_close(change @ MARKET.T @ MARKET, change, rtol=1e-10, atol=1e-12)
    assert float(change.abs().max()) > 0.01


@pytest.mark.parametrize("process", [VP(), Linear()], ids=lambda p: type(p).__name__)
def test_beyond_the_levels_it_is_the_base_and_between_them_linear(process):
    model = learned(bent(base().sample(400, seeded(1))), base(process))
    x = torch.randn(5, D, dtype=torch.float64, generator=seeded())
    gap = float(model.levels[1] - model.levels[0])
    outside = process.time(torch.tensor([LOG_SNR[0] - 1.01 * gap, LOG_SNR[1] + 1.01 * gap, 18.0]).double())
    for t in (*outside, torch.tensor(1.0) if isinstance(process, Linear) else outside[0]):
        torch.testing.assert_close(model.denoise(x, t), model.base.denoise(x, t), rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(model.noise(x, t), model.base.noise(x, t), rtol=1e-12, atol=1e-14)
    # Rows of their own times, in, between and beyond the levels, are those rows one by one.
    t = process.time(torch.tensor([-12.0, -6.0, 0.3, 7.99, 8.5]).double())
    one_by_one = torch.cat([model.noise(x[i : i + 1], t[i]) for i in range(5)])
    torch.testing.assert_close(model.noise(x, t), one_by_one, rtol=1e-10, atol=1e-12)
    # B is linear in the log-SNR: a quarter of the way it is a quarter of the way.
    at = process.time(model.levels[3] + 0.25 * gap)
    torch.testing.assert_close(
        model._interpolated(at, x)[0], 0.75 * model.weights[3] + 0.25 * model.weights[4], rtol=1e-6, atol=1e-9
    )


def test_the_weights_are_least_squares_on_the_rows_that_were_seen():
    """Without sharing and penalty: lstsq on the same features and targets, caught on their way."""
    X, noises, seen = bent(base().sample(300, seeded(1))), [], []
    perturb, features = Process.perturb, ResidualScore._features

    def watched(self, x0, t, z):
        noises.append(z)
        return perturb(self, x0, t, z)

    def watched_features(self, x, t, *rest):
        seen.append((x, t, features(self, x, t, *rest)[0]))
        return seen[-1][-1][None]

    with (
        mock.patch.object(Process, "perturb", watched),
        mock.patch.object(ResidualScore, "_features", watched_features),
    ):
        model = learned(X, levels=3, folds=2, kernel=1e-3, ridges=[1e-14], draws=8)
    for level in range(3):
        parts = slice(2 * level, 2 * level + 2)
        f = torch.cat([f for *_, f in seen[parts]])
        y = [(z - model.base.noise(x, t)) @ MARKET.T for z, (x, t, _) in zip(noises[parts], seen[parts])]
        expected = f @ torch.linalg.lstsq(f, torch.cat(y), driver="gelsd").solution
        if not model.weights[level].any():
            continue  # switched off
        torch.testing.assert_close(f @ model.weights[level, 0][:, None], expected, rtol=1e-2, atol=1e-3)
    assert model.weights.any()


# ----------------------------------------------------------------------------------------- null cases


def test_where_the_base_is_right_little_is_learned():
    model = learned(base().sample(N, seeded(1)))
    found = held_out_nats(model, base().sample(N, seeded(2)), base(), repeats=2, generator=seeded(3))
    print(f"\n{model.nats:.5f} cross-validated, {found.gain:.5f} +- {found.standard_error:.5f} held out")
    assert abs(model.nats) < 2e-3
    assert abs(found.gain) < 2 * found.standard_error + 1e-3


def test_a_huge_penalty_leaves_the_base():
    X, x = bent(base().sample(400, seeded(1))), base().sample(5, seeded(2))
    model = learned(X, ridges=[1e12])
    torch.testing.assert_close(model.denoise(x, 0.4), base().denoise(x, 0.4), rtol=1e-9, atol=1e-9)
    assert abs(model.nats) < 1e-9


def test_without_weights_it_is_the_base():
    model = ResidualScore(base(), MARKET, [1.0], torch.linspace(-6, 8, 3), torch.zeros(3, 1, 18))
    x = base().sample(50, seeded())
    for t in (0.01, 0.5, 0.99):
        torch.testing.assert_close(model.denoise(x, t), base().denoise(x, t), rtol=0, atol=0)
        assert torch.equal(model.sample_posterior(x, t, seeded(1)), base().sample_posterior(x, t, seeded(1)))


# ------------------------------------------------------------------------------------ planted defects


def test_a_skewed_market_is_repaired(planted):
    model, rows = planted
    found = held_out_nats(model, rows, model.base, repeats=2, generator=seeded(3))
    print(f"\n{model.nats:.4f} cross-validated, {found.gain:.4f} +- {found.standard_error:.4f} held out")
    assert found.gain > 4 * found.standard_error
    assert model.nats == pytest.approx(found.gain, abs=4 * found.standard_error)


def test_it_repairs_what_a_fitted_base_leaves():
    """The base is symmetric, whatever it is fitted to."""
    rows = [bent(base().sample(N, seeded(seed))) for seed in (1, 2)]
    fitted = ProductScaleMixtureScore.fit(rows[0], VP(), iterations=20)
    model = learned(rows[0], fitted)
    found = held_out_nats(model, rows[1], fitted, repeats=2, generator=seeded(3))
    assert found.gain > 3 * found.standard_error
    assert model.nats == pytest.approx(found.gain, abs=4 * found.standard_error)


def test_heavier_tails_of_the_market_are_repaired():
    rows = [heavier(base().sample(N, seeded(seed))) for seed in (1, 2)]
    model = learned(rows[0])
    found = held_out_nats(model, rows[1], base(), repeats=2, generator=seeded(3))
    assert found.gain > 4 * found.standard_error


def test_the_wrong_direction_finds_less(planted):
    model, _ = planted
    across = torch.tensor([[1.0, -1.0, 0.0, 0.0]]).double() / math.sqrt(2)
    other = learned(bent(base().sample(N, seeded(1))), directions=across)
    assert other.nats < 0.2 * model.nats
    both = learned(bent(base().sample(N, seeded(1))), directions=torch.cat([MARKET, across]))
    assert both.nats == pytest.approx(model.nats + other.nats, abs=0.3 * model.nats)


def test_draws_have_the_planted_skew(planted):
    """The market's third moment: of the base's draws 0; of rows what was planted; of the model's draws near it."""
    model, _ = planted

    def skew(x):
        along = x @ MARKET.T
        return float((along - along.mean()).pow(3).mean() / along.std() ** 3)

    wanted = skew(bent(base().sample(200_000, seeded(7))))
    process, n = model.process, 4000
    start = process.time(torch.tensor(LOG_SNR[0], dtype=torch.float64))
    noise = torch.randn(n, D, dtype=torch.float64, generator=seeded(1))
    first = process.perturb(base().sample(n, seeded(2)), start, noise)

    class Levels(ProbabilityFlow):
        def grid(self, process):
            return process.time(torch.linspace(*LOG_SNR, self.steps + 1, dtype=torch.float64))

    class Draws(PosteriorSampling):
        grid = Levels.grid

    for sampler in (Levels(16), Draws(16)):
        draws = sampler(model, (n, D), generator=seeded(3), start=first)
        print(f"\n{type(sampler).__name__}: skew {skew(draws):.2f} of {wanted:.2f}")
        assert 0.4 * wanted > skew(draws) > 1.8 * wanted


# ---------------------------------------------------------------------------------------- equivariance


def test_permuted_coordinates_permute():
    """Evaluation exactly; the fit's noise goes with the coordinate, so there the learned curve alone, within noise."""
    order = [2, 0, 3, 1]
    own = torch.softmax(torch.randn(D, 3, dtype=torch.float64, generator=seeded()), 1)
    q = torch.nn.functional.normalize(torch.randn(2, D, dtype=torch.float64, generator=seeded(1)))
    weights = torch.randn(3, 2, 18, dtype=torch.float64, generator=seeded(2))
    x = base().sample(6, seeded(3))
    one, other = (
        ResidualScore(
            ProductScaleMixtureScore(COMMON, own[o], 0.6, VP()),
            q[:, o],
            [1.0, 1.3],
            [-6.0, 1.0, 8.0],
            weights,
        )
        for o in (list(range(D)), order)
    )
    for t in (0.1, 0.4, 0.8):
        torch.testing.assert_close(
            other.denoise(x[:, order], t), one.denoise(x, t)[:, order], rtol=1e-10, atol=1e-12
        )


@pytest.mark.parametrize(
    "draws",
    [
        2,
        4,
        3,
    ],
)
def test_every_row_gets_the_same_number_of_noises(draws):
    X, seen = base().sample(20, seeded(1)), []
    kept = Process.perturb

    def watched(self, x0, t, z):
        seen.append(x0)
        return kept(self, x0, t, z)

    with mock.patch.object(Process, "perturb", watched):
        learned(X, draws=draws, levels=2, folds=2)
    counts = torch.cat(seen).unique(dim=0, return_counts=True)[1]
    assert counts.tolist() == [2 * draws] * 20


def test_small_blocks_are_as_good(planted, monkeypatch):
    """Other blocks draw other noise: the gain is the same, within its noise."""
    model, _ = planted
    monkeypatch.setattr("finediff.diffusion.residual._AT_ONCE", 600)
    other = learned(bent(base().sample(N, seeded(1))))
    assert other.nats == pytest.approx(model.nats, rel=0.3)


def test_the_same_generator_gives_the_same_bits():
    X = bent(base().sample(300, seeded(1)))
    assert torch.equal(learned(X).weights, learned(X).weights)
    assert not torch.equal(learned(X).weights, learned(X, seed=6).weights)


@pytest.mark.parametrize(("rows", "folds"), [(3, 5), (50, 1)])
def test_too_few_rows_or_folds_are_refused(rows, folds):
    with pytest.raises(ValueError, match=r"expected at least .* rows, got"):
        learned(base().sample(rows, seeded()), folds=folds)


def test_another_base_may_not_be_judged_on_another_path(planted):
    with pytest.raises(ValueError, match="expected two models on one process"):
        held_out_nats(planted[0], planted[1], GaussianScore(torch.zeros(D), torch.eye(D), Linear()))
