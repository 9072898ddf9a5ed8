"""Densities, held-out nats, the evidence bound and the error budget, against laws whose densities are formulas."""

import itertools
import math
from dataclasses import astuple, replace
from unittest import mock

import numpy as np
import pytest
import torch
from oracle import PROCESSES, each

from finediff.diffusion.exact import GaussianScore, MixtureScore, ScaleMixtureScore
from finediff.diffusion.likelihood import elbo, error_budget, held_out_nats, log_prob
from finediff.diffusion.process import VP, Linear, linear_betas
from finediff.diffusion.sample import DDIM, DDPM, DPMSolver, ProbabilityFlow
from finediff.diffusion.score import ScoreModel

S = np.array([[1.0, 0.6, 0.2], [0.6, 1.5, 0.0], [0.2, 0.0, 0.4]])
SCALES, WEIGHTS = np.array([0.2, 0.5, 1.2, 3.0, 8.0]), np.array([0.25, 0.3, 0.3, 0.12, 0.03])
every_process = pytest.mark.parametrize("process", each(PROCESSES))


def gaussian(process, covariance=S, device="cpu"):
    return GaussianScore(np.zeros(len(covariance)), covariance, process).to(device)


def mixture(process, device="cpu"):
    """Centred, two lobes and a wide background."""
    means = np.array([[-1.0, 0.5, 0.0], [1.0, -0.5, 0.0], [0.0, 0.0, 0.0]])
    covariances = np.stack([0.4 * np.eye(3), 0.4 * np.eye(3), S])
    return MixtureScore(np.array([0.3, 0.3, 0.4]), means, covariances, process).to(device)


def heavy(process, device="cpu"):
    return ScaleMixtureScore(SCALES, WEIGHTS, np.zeros(3), S, process).to(device)


def standard_error(x):
    return float(x.std()) / math.sqrt(len(x))


class Shifted(ScoreModel):
    """A model whose eps_hat is off by b, for every noise level."""

    def __init__(self, model, b):
        super().__init__()
        self.model, self.process = model, model.process
        self.register_buffer("b", torch.tensor(b, dtype=model.dtype, device=model.device))

    def noise(self, x, t, condition=None):
        return self.model.noise(x, t, condition) + self.b

    def denoise(self, x, t, condition=None):
        alpha, sigma = self.process.alpha(t).to(x), self.process.sigma(t).to(x)
        return self.model.denoise(x, t, condition) - sigma / alpha * self.b


# ------------------------------------------------------------------ densities


@every_process
@pytest.mark.parametrize(
    ("law", "tolerance"), [(gaussian, 3e-5), (mixture, 1e-3)], ids=["gaussian", "mixture"]
)
def test_densities_are_the_exact_ones(process, law, tolerance, generator, device):
    """Mean error below 1e-3 nats; what remains is the noise at the clean end, 5e-5 of a unit's variance."""
    model = law(process, device=device)
    x = model.sample(1000, generator)
    error = log_prob(model, x, steps=40) - model.log_prob(x)
    assert abs(float(error.mean())) < tolerance
    assert float(error.abs().max()) < 1e-2


@pytest.mark.parametrize(
    "process", [VP(), Linear(), VP.from_betas(linear_betas())], ids=["VP", "Linear", "betas"]
)
def test_densities_converge_at_order_four(process, generator, device):
    """Against 160 steps, so that the noise at the clean end cancels; betas that jump cost no order."""
    model = mixture(process, device)
    x = model.sample(50, generator)
    finest = log_prob(model, x, steps=160)
    errors = [float((log_prob(model, x, steps=n) - finest).square().mean().sqrt()) for n in (10, 20, 40)]
    orders = [math.log2(coarse / fine) for coarse, fine in itertools.pairwise(errors)]
    assert min(orders) > 3.3


def test_densities_hold_far_in_the_tail(device):
    """At 10, 20 and 30 standard deviations, where log p is down to -450 nats."""
    model = gaussian(Linear(), device=device)
    ray = torch.tensor([[1.0, 0.6, 0.2]], dtype=torch.float64, device=device)
    x = ray * torch.tensor([[10.0], [20.0], [30.0]], dtype=torch.float64, device=device)
    torch.testing.assert_close(log_prob(model, x), model.log_prob(x), rtol=1e-3, atol=0)


def test_hutchinson_is_unbiased(generator, device):
    """Over 100 draws of one probe a row the mean is the exact trace's; four probes have a quarter of the variance."""
    model = mixture(Linear(), device)
    x = model.sample(20, generator)
    exact, many = log_prob(model, x, steps=15), x.repeat(100, 1)
    one, four = (
        log_prob(model, many, steps=15, probes=k, generator=generator).reshape(100, 20) - exact
        for k in (1, 4)
    )
    z = one.mean(0) / one.std(0) * 10
    assert z.abs().max() < 4
    assert abs(float(z.mean())) * math.sqrt(20) < 4
    assert float(four.var(0).mean() / one.var(0).mean()) == pytest.approx(0.25, rel=0.2)


def test_densities_integrate_to_one(device):
    """Of a model that is nobody's denoiser: the density is that of the ODE's own law."""
    model = Shifted(gaussian(VP(), np.eye(1), device), [0.3])
    x = torch.linspace(-9, 9, 361, dtype=torch.float64, device=device)
    assert float(torch.trapezoid(log_prob(model, x[:, None], steps=60).exp(), x)) == pytest.approx(
        1, abs=1e-4
    )


def test_probes_are_reproducible(generator):
    model, x = mixture(VP()), mixture(VP()).sample(5, generator)
    draws = [
        log_prob(model, x, steps=5, probes=1, generator=torch.Generator().manual_seed(s)) for s in (0, 0, 1)
    ]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


# ------------------------------------------------------------------ held-out nats


@pytest.mark.parametrize("process", [VP(), Linear()], ids=repr)
@pytest.mark.parametrize("rows", ["its own", "Student's t"])
def test_nats_are_the_difference_of_log_densities(process, rows, generator, device):
    """A scale mixture against the Gaussian of its covariance, to .02 nats: on its draws, and on t of 4 degrees."""
    model = heavy(process, device)
    baseline = gaussian(process, S * float(WEIGHTS @ SCALES), device)
    x = model.sample(2000, generator)
    if rows == "Student's t":
        normal = gaussian(process, device=device).sample(2000, generator)
        chi2 = torch.randn(2000, 4, dtype=x.dtype, device=device, generator=generator).square().mean(1)
        x = normal / chi2.sqrt()[:, None]
    truth = model.log_prob(x) - baseline.log_prob(x)
    found = held_out_nats(model, x, baseline, generator=generator)
    assert abs(found.gain - float(truth.mean())) < 0.02 + 3 * standard_error(found.rows - truth)
    assert found.gain > 5 * found.standard_error
    assert found.standard_error == pytest.approx(standard_error(found.rows), rel=1e-12)
    assert found.rows.shape == (2000,)


def test_a_model_wins_nothing_over_itself(generator):
    x = heavy(VP()).sample(100, generator)
    found = held_out_nats(gaussian(VP()), x, gaussian(VP()), generator=generator)
    assert found.gain == 0
    assert found.standard_error == 0
    assert (found.rows == 0).all()


def test_nats_of_a_wrong_scale_are_the_divergence(generator, device):
    """Gaussians: KL(N(0, S) | N(0, 1.5 S)) = d/2 (1/1.5 - 1 + log 1.5)."""
    model, wrong = gaussian(Linear(), device=device), gaussian(Linear(), 1.5 * S, device)
    x = model.sample(4000, generator)
    truth = 1.5 * (1 / 1.5 - 1 + math.log(1.5))
    found = held_out_nats(model, x, wrong, generator=generator, repeats=2)
    assert abs(found.gain - truth) < 4 * found.standard_error + 0.005


def test_noise_comes_in_pairs_of_opposite_sign(generator):
    """So an eps_hat that is off by a constant b loses 13/2 |b|^2 to a model that is odd in x, without scatter."""
    model, b = gaussian(VP()), [0.3, -0.2, 0.1]
    x = torch.zeros(5, 3, dtype=torch.float64)
    found = held_out_nats(Shifted(model, b), x, model, generator=generator, repeats=1)
    expected = torch.full_like(found.rows, -13 / 2 * sum(value**2 for value in b))
    torch.testing.assert_close(found.rows, expected, rtol=1e-10, atol=0)


def test_the_integral_is_simpson_s():
    """An integrand of third degree in log-SNR is integrated without error, by any odd number of nodes."""

    class Level(ScoreModel):
        """eps_hat = 0, or the square root of a cubic that is positive on -5..8."""

        def __init__(self, on):
            super().__init__()
            self.on, self.process = on, VP()

        def denoise(self, x, t, condition=None):
            raise NotImplementedError

        def noise(self, x, t, condition=None):
            level = self.process.log_snr(t)
            return self.on * (200 + level**3).sqrt() * torch.ones_like(x)

    expected = -0.5 * (200 * 13 + (8**4 - 5**4) / 4)
    for nodes in (3, 5, 27):
        x = torch.zeros(1, 1, dtype=torch.float64)
        generator = torch.Generator().manual_seed(0)
        found = held_out_nats(Level(1.0), x, Level(0.0), nodes=nodes, repeats=1, generator=generator)
        assert found.gain == pytest.approx(expected, rel=1e-9)


def test_rows_are_judged_one_by_one(generator):
    """With the noise permuted along, a permutation of rows permutes the gains."""
    model, baseline = heavy(VP()), gaussian(VP())
    x = model.sample(20, generator)
    order, draws = torch.randperm(20, generator=generator), []
    noise = torch.randn(27, 20, 3, dtype=x.dtype, generator=generator)
    for rows in (torch.arange(20), order):
        source = iter(noise[:, rows])
        with mock.patch.object(torch, "randn", lambda *_, source=source, **__: next(source)):
            draws.append(held_out_nats(model, x[rows], baseline, repeats=1).rows)
    torch.testing.assert_close(draws[1], draws[0][order], rtol=1e-12, atol=1e-12)


def test_models_that_cannot_be_compared_are_refused(generator):
    x = torch.zeros(4, 3, dtype=torch.float64)
    with pytest.raises(ValueError, match="two models on one process"):
        held_out_nats(gaussian(VP()), x, gaussian(Linear()), generator=generator)
    with pytest.raises(ValueError, match="odd number of nodes"):
        held_out_nats(gaussian(VP()), x, gaussian(VP()), nodes=26, generator=generator)


# ------------------------------------------------------------------ evidence lower bound


@pytest.mark.parametrize("process", [VP(), Linear()], ids=repr)
@pytest.mark.parametrize("law", [gaussian, heavy])
def test_the_bound_lies_below_and_tightens(process, law, generator, device):
    """The gap to the mean log-density falls as 1/steps: the sum is a Riemann sum of a falling integrand."""
    model = law(process, device=device)
    x = model.sample(4000, generator)
    truth = float(model.log_prob(x).mean())
    gaps = [truth - elbo(model, x, steps=n, generator=generator).total for n in (20, 40, 80, 160)]
    assert gaps[-1] > 0
    orders = [math.log2(coarse / fine) for coarse, fine in itertools.pairwise(gaps)]
    assert min(orders) > 0.9
    assert orders[-1] < 1.2


@every_process
def test_the_three_terms_of_a_gaussian(process, generator, device):
    """E|x0_hat - x_0|^2 = sum_j l_j sigma^2/(alpha^2 l_j + sigma^2), the rest is algebra."""
    model, steps = gaussian(process, device=device), 30
    x = model.sample(20_000, generator)
    found = elbo(model, x, steps=steps, generator=generator)
    snr = [float((process.alpha(t) / process.sigma(t)) ** 2) for t in process.grid(steps)]
    values = np.linalg.eigvalsh(S)
    losses = [(values / (1 + r * values)).sum() for r in snr]
    diffusion = sum((b - a) * loss / 2 for a, b, loss in zip(snr, snr[1:], losses))
    assert found.prior == pytest.approx(snr[0] * float(x.square().sum(1).mean()) / 2, rel=1e-10)
    assert found.diffusion == pytest.approx(diffusion, rel=0.01)
    assert found.reconstruction == pytest.approx(1.5 * math.log(2 * math.pi * math.e / snr[-1]), rel=1e-10)
    assert found.total == -sum(astuple(found))


# ------------------------------------------------------------------ error budget


@pytest.mark.parametrize("process", [VP(), Linear()], ids=repr)
def test_the_score_error_of_a_wrong_scale_has_a_closed_form(process, generator, device):
    """eps_hat = sigma x_t/c, c = alpha^2 l + sigma^2: E|difference|^2 = sum_j sigma^2 c_j (1/c_j - 1/c'_j)^2."""
    model, oracle = gaussian(process, 2 * S, device), gaussian(process, device=device)
    x = oracle.sample(4000, generator)
    found = error_budget(model, x, oracle=oracle, generator=generator, n_draws=10)
    levels, l = np.linspace(-5, 8, 2001)[:, None], np.linalg.eigvalsh(S)
    alpha2, sigma2 = 1 / (1 + np.exp(-levels)), 1 / (1 + np.exp(levels))
    c, wrong = alpha2 * l + sigma2, 2 * alpha2 * l + sigma2
    truth = np.trapezoid((sigma2 * c * (1 / c - 1 / wrong) ** 2).sum(1), levels[:, 0]) / 2
    assert abs(found.score - truth) < 4 * found.score_standard_error
    assert found.score_standard_error < 0.05 * truth


def test_an_exact_model_has_no_score_error(generator, device):
    model, oracle = heavy(VP(), device), heavy(VP(), device)
    x = oracle.sample(1000, generator)
    assert error_budget(model, x, oracle=oracle, generator=generator, n_draws=10).score < 1e-20


@pytest.mark.parametrize(
    ("sampler", "order"),
    [
        pytest.param(ProbabilityFlow(), 2, id="Heun"),
        pytest.param(DDIM(), 1, id="DDIM"),
        pytest.param(DPMSolver(), 2, id="DPMSolver"),
    ],
)
def test_discretisation_falls_by_the_order_of_the_sampler(sampler, order, generator, device):
    model, found = gaussian(Linear(), device=device), []
    x = model.sample(50, generator)
    for steps in (24, 48):
        draw = replace(sampler, steps=steps)
        found.append(error_budget(model, x, sampler=draw, oracle=model, n_draws=300, generator=generator))
    ratio = found[0].discretisation / found[1].discretisation
    assert math.log2(ratio) == pytest.approx(order, abs=0.35)


def test_discretisation_is_in_units_of_the_standard_deviation(generator, device):
    """DDIM is linear on N(0, S): one start (1, 1, 1) in the eigenvectors tells what becomes of all the others."""
    model, n = gaussian(Linear(), device=device), 20
    x = model.sample(50, generator)
    found = error_budget(model, x, sampler=DDIM(n), oracle=model, n_draws=4000, generator=generator)
    values = torch.linalg.eigvalsh(torch.as_tensor(S)).to(device)
    maps = []
    for steps in (n, 4 * n):
        y = torch.ones(1, 3, dtype=torch.float64, device=device)
        along = GaussianScore(np.zeros(3), torch.diag(values), model.process)
        maps.append(DDIM(steps)(along, (1, 3), start=y))
    truth = math.sqrt(float((maps[0] - maps[1]).square().mean() / maps[1].square().mean()))
    assert found.discretisation == pytest.approx(truth, rel=0.05)


@every_process
def test_the_start_has_a_closed_form(process, generator):
    """alpha(1)^2 E|x_0|^2 / (2 sigma(1)^2): 0 where alpha(1) = 0, an upper bound of the exact divergence elsewhere."""
    model = gaussian(process)
    x = model.sample(500, generator)
    found = error_budget(
        model, x, oracle=model, generator=generator, n_draws=10, sampler=DDIM(4)
    ).initialisation
    ratio = float(process.alpha(1.0) / process.sigma(1.0)) ** 2
    assert found == pytest.approx(ratio * float(x.square().sum(1).mean()) / 2, rel=1e-9)
    exact = sum(ratio * v - math.log1p(ratio * v) for v in np.linalg.eigvalsh(S)) / 2
    assert exact <= found


@pytest.mark.parametrize("law", [gaussian, heavy])
def test_without_an_oracle_nothing_is_found_in_an_exact_model(law, generator, device):
    """Over four panels of 600 rows: never significantly positive, and never far below 0 either."""
    model = law(VP(), device=device)
    for _ in range(4):
        found = error_budget(model, model.sample(600, generator), generator=generator, n_draws=10)
        assert found.score < 3 * found.score_standard_error + 1e-12
        assert found.score > -0.015


@pytest.mark.parametrize("process", [VP(), Linear()], ids=repr)
def test_without_an_oracle_an_affine_bias_is_found(process, generator, device):
    """A constant b in eps_hat is worth 13/2 |b|^2 nats; a wrong scale, its divergence at least in part."""
    model, b = gaussian(process, device=device), [0.2, -0.1, 0.1]
    x = model.sample(2000, generator)
    truth = 13 / 2 * sum(value**2 for value in b)
    found = error_budget(Shifted(model, b), x, generator=generator, n_draws=10)
    assert found.score > 5 * found.score_standard_error
    assert found.score < truth + 3 * found.score_standard_error
    assert found.score > 0.8 * truth
    found = error_budget(gaussian(process, 2 * S, device), x, generator=generator, n_draws=10)
    assert found.score > 5 * found.score_standard_error
    assert found.score < 1.5 * (0.5 - 1 + math.log(2)) + 3 * found.score_standard_error


@pytest.mark.parametrize("sampler", [DDPM(10), ProbabilityFlow(method="adaptive")], ids=repr)
def test_samplers_whose_draws_cannot_be_repeated_are_refused(sampler, generator):
    model = gaussian(VP())
    with pytest.raises(ValueError, match="deterministic sampler on a fixed grid"):
        error_budget(model, model.sample(10, generator), sampler=sampler, generator=generator)
