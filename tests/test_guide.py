"""Guides: exact where conditioning is (a Gaussian, Bayes' rule), and how far off where it is not."""

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from oracle import GUIDES, PROCESSES, SAMPLERS, each
from scipy import stats
from torch import nn

from finediff.diffusion.exact import GaussianScore, MixtureScore, ScaleMixtureScore
from finediff.diffusion.guide import (
    ClassifierFreeGuidance,
    ClassifierGuidance,
    Inpainting,
    LinearStress,
)
from finediff.diffusion.likelihood import log_prob
from finediff.diffusion.process import VP, Linear
from finediff.diffusion.sample import DDIM, DPMSolver, ProbabilityFlow, Resampled
from finediff.diffusion.score import ScoreModel
from finediff.generators.classifier import train_classifier

INF = math.inf
TIMES = (0.02, 0.3, 0.7, 0.98)
MEAN = np.array([0.2, -0.1, 0.3, 0.0])
ROOT = np.array([[1.0, 0, 0, 0], [0.6, 1.0, 0, 0], [0.3, -0.2, 0.5, 0], [-0.4, 0.3, 0.1, 0.7]])
COVARIANCE = ROOT @ ROOT.T
STRESSES = {
    "asset": ([[1.0, 0, 0, 0]], [-2.0]),
    "portfolio": ([[0.25, 0.25, 0.25, 0.25]], [1.0]),
    "two": ([[0, 1.0, 0, 0], [1.0, 0, -1.0, 0.5]], [1.0, -0.5]),
    "three": ([[1.0, 0, 0, 0], [0, 1.0, 1.0, 0], [0, 0, 0, 2.0]], [-1.0, 0.0, 1.5]),
}
every_process = pytest.mark.parametrize("process", each(PROCESSES))
every_stress = pytest.mark.parametrize(("A", "b"), [pytest.param(*v, id=k) for k, v in STRESSES.items()])
every_guide = pytest.mark.parametrize("guide", each(GUIDES))


def gaussian(process, device="cpu"):
    return GaussianScore(MEAN, COVARIANCE, process).to(device)


def conditioned(A, b):
    """Mean and covariance of N(MEAN, COVARIANCE) given A x = b."""
    A, b = np.array(A), np.array(b)
    gain = COVARIANCE @ A.T @ np.linalg.inv(A @ COVARIANCE @ A.T)
    return MEAN + gain @ (b - A @ MEAN), COVARIANCE - gain @ A @ COVARIANCE


def noisy(process, t, generator, device="cpu", n=16):
    x0 = gaussian(process, device).sample(n, generator)
    return process.perturb(x0, t, torch.randn(x0.shape, dtype=x0.dtype, device=device, generator=generator))


class Labelled(ScoreModel):
    """A mixture of two Gaussians whose condition (batch,) names the component; None is the mixture."""

    WEIGHTS, MEANS = (0.4, 0.6), ((-0.8, 0.0), (0.8, 0.5))
    COVARIANCES = (((0.8, 0.3), (0.3, 0.6)), ((0.5, -0.2), (-0.2, 0.9)))

    def __init__(self, process, device="cpu"):
        super().__init__()
        self.process = process
        self.mixture = MixtureScore(np.array(self.WEIGHTS), np.array(self.MEANS), self.COVARIANCES, process)
        parts = zip(self.MEANS, self.COVARIANCES)
        self.parts = nn.ModuleList(GaussianScore(np.array(m), np.array(c), process) for m, c in parts)
        self.to(device)

    def denoise(self, x, t, condition=None):
        if condition is None:
            return self.mixture.denoise(x, t)
        return torch.stack([part.denoise(x, t) for part in self.parts])[condition, torch.arange(len(x))]

    def classify(self, x, t):
        """log w_m + log p_t(x | m), (batch, 2): logits of the exact classifier."""
        joint = [math.log(w) + part.log_prob(x, t) for w, part in zip(self.WEIGHTS, self.parts)]
        return torch.stack(joint, 1)


def assert_gaussian(x, mean, covariance, sd=4.5):
    """z-tests of mean and covariance of the rows x; in directions without variance equality to 1e-6."""
    values, vectors = np.linalg.eigh(covariance)
    free = values > 1e-9
    z = (x.numpy(force=True) - mean) @ vectors
    assert abs(z[:, ~free]).max(initial=0) < 1e-6
    z = z[:, free] / np.sqrt(values[free])
    n = len(z)
    assert abs(z.mean(0)).max() * math.sqrt(n) < sd
    errors = (z.T @ z / n - np.eye(z.shape[1])) / np.sqrt((1 + np.eye(z.shape[1])) / n)
    assert abs(errors).max() < sd


# ------------------------------------------------------------------ linear stress of a Gaussian


@every_process
@every_stress
@pytest.mark.parametrize("known", [False, True], ids=["tweedie", "covariance"])
def test_a_stressed_gaussian_is_the_conditional_gaussian(process, A, b, known, generator, device):
    guide = LinearStress(gaussian(process, device), A, b, covariance=COVARIANCE if known else None)
    exact = GaussianScore(*conditioned(A, b), process).to(device)
    for t in (*TIMES, 1.0):
        x = noisy(process, t, generator, device)
        torch.testing.assert_close(guide.denoise(x, t), exact.denoise(x, t), rtol=1e-8, atol=1e-8)


def test_each_row_has_its_own_stress_and_time(generator, device):
    A, t = STRESSES["two"][0], torch.tensor(TIMES, dtype=torch.float64)
    b = torch.randn(4, 2, dtype=torch.float64, device=device, generator=generator)
    x = noisy(VP(), t, generator, device, n=4)
    found = LinearStress(gaussian(VP(), device), A, b).denoise(x, t)
    for i in range(4):
        exact = GaussianScore(*conditioned(A, b[i].tolist()), VP()).to(device)
        torch.testing.assert_close(found[[i]], exact.denoise(x[[i]], t[i]), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(
    ("sampler", "n"),
    [
        pytest.param(ProbabilityFlow(48), 8000, id="Heun"),
        pytest.param(DDIM(400, eta=1.0), 2000, id="DDIM(eta=1)"),
        pytest.param(DPMSolver(100, stochastic=True), 4000, id="DPMSolver(SDE)"),
    ],
)
@pytest.mark.parametrize("process", [VP(), Linear()], ids=repr)
def test_stressed_draws_have_the_conditional_moments(sampler, n, process, generator, device):
    A, b = STRESSES["two"]
    x = sampler(LinearStress(gaussian(process, device), A, b), (n, 4), generator=generator)
    assert_gaussian(x, *conditioned(A, b))


# ------------------------------------------------------------------ bands

BANDS = {
    "two sides": (-0.5, 1.0),
    "narrow": (0.3, 0.31),
    "above": (1.0, INF),
    "below": (-INF, -2.0),
    "12 sd up": (12.0, 13.0),
    "12 sd down": (-INF, -12.0),
    "open": (-INF, INF),
}
every_band = pytest.mark.parametrize("band", each(BANDS))


@every_band
@pytest.mark.parametrize("t", [0.2, 0.5, 0.9])
def test_a_band_is_exact_by_numerical_integration(band, t):
    """E[x_0 | x_t, lo <= a x_0 <= hi] in two dimensions, by Gauss-Legendre on p(x_0) N(x_t; alpha x_0, sigma^2)."""
    process, S, x_t = Linear(), np.array([[1.0, 0.5], [0.5, 0.8]]), np.array([0.4, -0.3])
    a = np.array([0.6, 0.8])
    sd = math.sqrt(a @ S @ a)
    lo, hi = band[0] * sd, band[1] * sd
    guide = LinearStress(GaussianScore(np.zeros(2), S, process), a, (lo, hi))
    found = guide.denoise(torch.tensor(x_t)[None], t)[0].numpy()

    def log_joint(x0):
        residual = x_t - float(process.alpha(t)) * x0
        quadratic = np.einsum("...i,ij,...j", x0, np.linalg.inv(S), x0)
        return -0.5 * (quadratic + (residual**2).sum(-1) / float(process.sigma(t)) ** 2)

    nodes, weights = np.polynomial.legendre.leggauss(400)
    # Panels on an open side end where nothing is left, 8 deviations on.
    lo, hi = max(lo, min(-8, hi - 2)), min(hi, max(8, lo + 2))
    u = (lo + hi) / 2 + (hi - lo) / 2 * nodes
    v = 15 * nodes
    x0 = u[:, None, None] * a + v[None, :, None] * np.array([-0.8, 0.6])
    log_p = log_joint(x0)
    p = np.exp(log_p - log_p.max()) * weights[:, None] * weights
    np.testing.assert_allclose(found, np.einsum("uv,uvd->d", p, x0) / p.sum(), atol=1e-6)


@pytest.mark.parametrize("band", [(-1.0, 0.3), (0.8, INF)], ids=str)
def test_draws_in_a_band_are_those_of_rejection_sampling(band, generator, device):
    model, a = gaussian(VP(), device), torch.tensor([0.5, 0.5, 0.0, 0.5], dtype=torch.float64, device=device)
    x = ProbabilityFlow(64)(LinearStress(model, a, band), (4000, 4), generator=generator)
    accepted = model.sample(40_000, generator)
    accepted = accepted[(accepted @ a > band[0]) & (accepted @ a < band[1])][:4000]
    for direction in torch.cat([torch.eye(4, dtype=x.dtype, device=device), a[None]]):
        p = stats.ks_2samp((x @ direction).numpy(force=True), (accepted @ direction).numpy(force=True)).pvalue
        assert p > 1e-3


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("sampler", [ProbabilityFlow(32), DPMSolver(32, stochastic=True)], ids=["ODE", "SDE"])
def test_draws_stay_inside_a_band_far_out_in_the_tail(sampler, dtype, generator, device):
    low, high = 12.0, 12.5  # the first asset's standard deviation is 1
    guide = LinearStress(gaussian(VP(), device).to(dtype), [[1.0, 0, 0, 0]], ([low], [high]))
    x = sampler(guide, (500, 4), generator=generator)
    assert x.isfinite().all()
    assert x.dtype == dtype
    tolerance = 50 * torch.finfo(dtype).eps * high
    assert ((x[:, 0] >= low - tolerance) & (x[:, 0] <= high + tolerance)).all()


@every_stress
def test_a_band_without_width_is_a_fixed_stress(A, b, generator):
    model, x = gaussian(VP()), noisy(VP(), 0.4, generator)
    fixed, band = (LinearStress(model, A, value).denoise(x, 0.4) for value in (b, (b, b)))
    assert torch.equal(fixed, band)
    hair = LinearStress(model, A, (b, [value + 1e-9 for value in b])).denoise(x, 0.4)
    torch.testing.assert_close(hair, fixed, rtol=0, atol=1e-7)


def test_a_band_open_on_both_sides_changes_nothing(generator):
    model, x = gaussian(VP()), noisy(VP(), 0.4, generator)
    guide = LinearStress(model, STRESSES["two"][0], ([-INF, -INF], [INF, INF]))
    torch.testing.assert_close(guide.denoise(x, 0.4), model.denoise(x, 0.4), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("A", "b", "match"),
    [
        ([[1.0, 0, 0, 0], [2.0, 0, 0, 0]], [1.0, 2.0], "linearly independent"),
        ([[1.0, 0, 0, 0]], [1.0, 2.0], "one entry a row"),
        ([[1.0, 0, 0, 0], [0, 1.0, 0, 0]], [1.0], "one entry a row"),
        ([[1.0, 0, 0, 0]], ([1.0], [0.0]), "lo <= hi"),
        ([[1.0, 0, 0, 0]], [math.nan], "NaN"),
    ],
)
def test_stresses_that_mean_nothing_are_refused(A, b, match):
    with pytest.raises(ValueError, match=match):
        LinearStress(gaussian(VP()), A, b)


def test_a_covariance_of_other_assets_is_refused():
    with pytest.raises(ValueError, match="covariance of the 4 columns"):
        LinearStress(gaussian(VP()), [[1.0, 0, 0, 0]], [1.0], covariance=np.eye(3))


# ------------------------------------------------------------------ linear stress beyond Gaussians


def test_a_stressed_mixture_keeps_the_constraint_but_not_the_law(generator, device):
    """Two Gaussians of variance .5 at -(1, 1) and (1, 1), x_1 = .5: P(x_2 > 0) is 82 %; of the draws it is 69 %.

    Without a stress it would be 50 %, by replacement 58 %.
    """
    means, covariances = np.array([[-1.0, -1.0], [1.0, 1.0]]), np.stack([np.eye(2) / 2] * 2)
    model = MixtureScore(np.array([0.5, 0.5]), means, covariances, Linear()).to(device)
    densities = stats.norm.pdf(0.5, means[:, 0], math.sqrt(0.5))
    truth = densities @ stats.norm.sf(0, means[:, 1], math.sqrt(0.5)) / densities.sum()
    n, found = 4000, []
    for guide in (LinearStress(model, [1.0, 0.0], [0.5]), Inpainting(model, [True, False], [0.5, 0.0])):
        x = ProbabilityFlow(48)(guide, (n, 2), generator=generator)
        torch.testing.assert_close(x[:, 0], torch.full_like(x[:, 0], 0.5), rtol=0, atol=1e-9)
        found.append(float((x[:, 1] > 0).double().mean()))
    error = math.sqrt(0.25 / n)
    assert truth == pytest.approx(0.82, abs=0.005)
    assert found[0] < truth - 5 * error
    assert found == pytest.approx([0.69, 0.58], abs=4 * error)


def test_a_stressed_heavy_tail_has_the_mean_but_not_all_of_the_spread(generator, device):
    """x_1 = 4 on a scale mixture of correlation .6: mean 2.4 comes out; of the spread 1.80, 1.54 does.

    With the covariance in place of Tweedie's, 1.31: a violent day is not recognised as such.
    """
    v, w = np.array([0.25, 0.5, 1, 2, 4, 8]), np.array([0.25, 0.25, 0.25, 0.15, 0.07, 0.03])
    S, x1, n = np.array([[1, 0.6], [0.6, 1]]), 4.0, 4000
    model = ScaleMixtureScore(v, w, np.zeros(2), S, VP()).to(device)
    posterior = w * stats.norm.pdf(x1, 0, np.sqrt(v))
    truth = math.sqrt(posterior @ v / posterior.sum() * (1 - 0.6**2))
    assert truth == pytest.approx(1.80, abs=0.005)
    for covariance, expected in ((None, 1.54), (S, 1.31)):
        guide = LinearStress(model, [1.0, 0.0], [x1], covariance)
        x = ProbabilityFlow(48)(guide, (n, 2), generator=generator)[:, 1]
        assert float(x.mean()) == pytest.approx(0.6 * x1, abs=0.15)
        assert float(x.std()) == pytest.approx(expected, abs=0.08)


class Skewed(ScoreModel):
    """A denoiser that is no gradient, as a network's is not: its Jacobian is not symmetric."""

    def __init__(self, process):
        super().__init__()
        self.process = process
        self.register_buffer("M", torch.tensor([[0.5, 0.3, 0], [-0.2, 0.6, 0.1], [0.2, 0, 0.4]]).double())

    def denoise(self, x, t, condition=None):
        return torch.tanh(x) @ self.M.T


def test_several_stresses_hold_where_the_jacobian_is_not_symmetric(generator):
    A, b = torch.tensor([[1.0, 0, 0], [0, 1.0, 1.0]], dtype=torch.float64), [-1.0, 0.5]
    x = torch.randn(8, 3, dtype=torch.float64, generator=generator)
    found = LinearStress(Skewed(VP()), A, b).denoise(x, 0.5) @ A.T
    torch.testing.assert_close(found, torch.tensor(b, dtype=found.dtype).expand(8, 2), rtol=0, atol=1e-12)


class Rough(ScoreModel):
    """An exact model with a network's kind of error: .02 in v, with a slope of .1."""

    def __init__(self, exact):
        super().__init__()
        self.exact, self.process = exact, exact.process
        self.size = nn.Parameter(torch.full((), 0.02, dtype=torch.float64), requires_grad=False)

    def denoise(self, x, t, condition=None):
        return self.exact.denoise(x, t) - self.process.sigma(t) * self.size * torch.sin(5 * x.flip(1))


def test_a_network_is_stressed_with_its_covariance(generator, device):
    """By differentiation the same draws would lie up to several hundred standard deviations out."""
    A, b = STRESSES["asset"]
    rough = Rough(gaussian(VP(), device)).to(device)
    with pytest.raises(ValueError, match="expected covariance= for a model with parameters"):
        LinearStress(rough, A, b)
    x = ProbabilityFlow(48)(LinearStress(rough, A, b, COVARIANCE), (4000, 4), generator=generator)
    mean, covariance = conditioned(A, b)
    sd = np.sqrt(covariance.diagonal()[1:])
    assert (x[:, 0] - b[0]).abs().max() < 1e-9
    assert (abs(x.mean(0).numpy(force=True) - mean)[1:] / sd).max() < 0.1
    assert abs(x.std(0).numpy(force=True)[1:] / sd - 1).max() < 0.1


# ------------------------------------------------------------------ inpainting


@pytest.mark.parametrize("sampler", [ProbabilityFlow(64), DPMSolver(64, stochastic=True)], ids=["ODE", "SDE"])
def test_replacement_is_biased_and_a_linear_stress_is_not(sampler, generator, device):
    """Correlation .8, x_1 = 1.5: x_2 is N(1.2, .6^2). Replacement gives a mean of .48 by the ODE and .74 by an SDE.

    Its standard deviations are .83 and .74; those of the stress 1.19 and .60.
    """
    model = GaussianScore(np.zeros(2), np.array([[1.0, 0.8], [0.8, 1.0]]), VP()).to(device)
    x = sampler(Inpainting(model, [True, False], [1.5, math.nan]), (4000, 2), generator=generator)
    assert (x[:, 0] == 1.5).all()
    expected = 0.74 if sampler.needs_score else 0.48
    assert float(x[:, 1].mean()) == pytest.approx(expected, abs=4 * 0.83 / math.sqrt(4000))
    x = sampler(LinearStress(model, [1.0, 0.0], [1.5]), (4000, 2), generator=generator)
    assert_gaussian(x, np.array([1.5, 1.2]), np.diag([0.0, 0.36]))


def test_inpainting_takes_values_row_by_row_and_refuses_other_shapes(generator):
    model, x = gaussian(VP()), noisy(VP(), 0.5, generator)
    values = torch.randn(16, 4, dtype=torch.float64, generator=generator)
    found = Inpainting(model, [True, False, True, False], values).denoise(x, 0.5)
    assert torch.equal(found[:, ::2], values[:, ::2])
    assert torch.equal(found[:, 1::2], model.denoise(x, 0.5)[:, 1::2])
    with pytest.raises(ValueError, match="expected known of shape"):
        Inpainting(model, [True, False, True, False], [1.0, 2.0])


def test_resampling_mends_most_of_the_bias_of_replacement(generator):
    """Correlation .8, x1 = 1.5, so E[x2] = 1.2: one pass of 100 steps says about .7, ten passes a step about 1.1."""
    covariance = torch.tensor([[1.0, 0.8], [0.8, 1.0]], dtype=torch.float64)
    model = GaussianScore(torch.zeros(2, dtype=torch.float64), covariance, VP())
    guide = Inpainting(model, [True, False], [1.5, 0.0])
    means = [
        float(Resampled(100, repeats=repeats)(guide, (4000, 2), generator=generator)[:, 1].mean())
        for repeats in (1, 10)
    ]
    standard_error = 0.6 / 4000**0.5
    assert means[0] < 1.2 - 20 * standard_error
    assert abs(means[1] - 1.2) < 0.35 * abs(means[0] - 1.2)


# ------------------------------------------------------------------ classifier-free guidance


@pytest.fixture
def labelled(device):
    return Labelled(VP(), device)


def test_weight_zero_is_the_conditional_law(labelled, generator, device):
    label = torch.ones(4000, dtype=torch.long, device=device)
    guide = ClassifierFreeGuidance(labelled, 0.0)
    x = DPMSolver(100, stochastic=True)(guide, (4000, 2), condition=label, generator=generator)
    assert_gaussian(x, np.array(labelled.MEANS[1]), np.array(labelled.COVARIANCES[1]))


@pytest.mark.parametrize("weight", [-1.0, 0.0, 0.7, 3.0])
def test_noises_are_combined_as_published(labelled, weight, generator, device):
    """eps = (1 + w) eps(x, y) - w eps(x, none); w = -1 is the model without the condition."""
    x = torch.randn(32, 2, dtype=torch.float64, device=device, generator=generator)
    label = torch.arange(32, device=device) % 2
    for t in TIMES:
        given, free = labelled.noise(x, t, label), labelled.noise(x, t)
        found = ClassifierFreeGuidance(labelled, weight).noise(x, t, label)
        torch.testing.assert_close(found, (1 + weight) * given - weight * free, rtol=1e-12, atol=1e-12)
        assert torch.equal(ClassifierFreeGuidance(labelled, weight).denoise(x, t), labelled.denoise(x, t))


def test_weight_sharpens(labelled, generator, device):
    """79, 98 and 100 % of the draws are taken for their label at w = 0, 1, 3; the ellipse's area halves twice."""
    label = torch.zeros(3000, dtype=torch.long, device=device)
    shares, spreads = [], []
    for weight in (0.0, 1.0, 3.0):
        guide = ClassifierFreeGuidance(labelled, weight)
        x = ProbabilityFlow(32)(guide, (3000, 2), condition=label, generator=generator)
        shares.append(float((labelled.mixture.posterior(x, 0.0)[:, 0] > 0.5).double().mean()))
        spreads.append(float(torch.cov(x.T).logdet()))
    assert shares[0] + 0.05 < shares[1] < shares[2] - 0.005
    assert spreads[0] > spreads[1] + 0.2 > spreads[2] + 0.4


# ------------------------------------------------------------------ classifier guidance


@every_process
@pytest.mark.parametrize("label", [0, 1])
def test_bayes_rule(process, label, generator, device):
    """score of p(x_t) + grad log p(y | x_t) = score of p(x_t | y)."""
    model = Labelled(process, device)
    guide = ClassifierGuidance(model, model.classify, label)
    x0 = model.mixture.sample(64, generator)
    for t in TIMES:
        x = process.perturb(x0, t, torch.randn(x0.shape, dtype=x0.dtype, device=device, generator=generator))
        torch.testing.assert_close(
            guide.denoise(x, t), model.parts[label].denoise(x, t), rtol=1e-8, atol=1e-8
        )
    # At t = 1 of a path whose alpha is 0 there, the gradient of the grid's noisiest level stands for a limit.
    torch.testing.assert_close(guide.denoise(x, 1.0), model.parts[label].denoise(x, 1.0), rtol=0, atol=1e-3)


@pytest.mark.parametrize("process", [VP(), Linear()], ids=repr)
def test_classifier_guided_draws_are_the_component(process, generator, device):
    model = Labelled(process, device)
    x = ProbabilityFlow(48)(ClassifierGuidance(model, model.classify, 0), (4000, 2), generator=generator)
    assert_gaussian(x, np.array(model.MEANS[0]), np.array(model.COVARIANCES[0]))


def test_a_guided_model_has_the_density_that_bayes_says(generator, device):
    """The divergence of a guided velocity goes through the guide's own gradient: second derivatives."""
    model = Labelled(Linear(), device)
    x = model.parts[0].sample(200, generator)
    found = log_prob(ClassifierGuidance(model, model.classify, 0), x, steps=30)
    torch.testing.assert_close(found, model.parts[0].log_prob(x), rtol=0, atol=2e-3)


@pytest.fixture(scope="module")
def trained():
    model, generator = Labelled(VP()), torch.Generator().manual_seed(1)
    labels = torch.multinomial(torch.tensor(model.WEIGHTS), 4000, replacement=True, generator=generator)
    rows = torch.stack([part.sample(4000, generator) for part in model.parts])[labels, torch.arange(4000)]
    return model, train_classifier(model.process, rows.float(), labels, generator=generator)


def test_a_trained_classifier_comes_close_to_bayes(trained):
    model, classifier = trained
    generator, n = torch.Generator().manual_seed(2), 20_000
    labels = torch.multinomial(torch.tensor(model.WEIGHTS), n, replacement=True, generator=generator)
    x0 = torch.stack([part.sample(n, generator) for part in model.parts])[labels, torch.arange(n)]
    for log_snr in (-8.0, -2.0, 0.0, 2.0, 6.0):
        t = model.process.time(log_snr)
        x = model.process.perturb(x0, t, torch.randn(x0.shape, dtype=x0.dtype, generator=generator))
        losses = [
            nn.functional.cross_entropy(logits, labels, reduction="none").double()
            for logits in (classifier(x.float(), t.expand(n)), model.classify(x, t))
        ]
        excess = losses[0] - losses[1]
        assert -4 * excess.std() / math.sqrt(n) < excess.mean() < 0.02


def test_a_trained_classifier_guides(trained):
    model, classifier = trained
    guide = ClassifierGuidance(copy.deepcopy(model).float(), classifier, 0)
    x = ProbabilityFlow(32)(guide, (2000, 2), generator=torch.Generator().manual_seed(3)).double()
    mean, variance = torch.tensor(model.MEANS[0]), torch.tensor(model.COVARIANCES[0]).diagonal()
    assert ((x.mean(0) - mean).abs() < 0.1).all()
    assert ((x.var(0) / variance - 1).abs() < 0.15).all()


def test_classifiers_are_reproducible():
    x, labels = torch.linspace(-2, 2, 64)[:, None].repeat(1, 2), torch.arange(64) // 32
    one, same, other = (
        train_classifier(VP(), x, labels, steps=5, generator=torch.Generator().manual_seed(seed))(
            x, torch.full((64,), 0.5)
        )
        for seed in (0, 0, 1)
    )
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


# ------------------------------------------------------------------ laws of every guide


@every_guide
@pytest.mark.parametrize("sampler", ["Heun", "DPMSolver", "DDPM", "PredictorCorrector"])
def test_every_guide_runs_under_every_sampler(guide, sampler, generator, device):
    """Few steps and many agree on the mean: a guide is a model like another."""
    guided = guide(gaussian(Linear(), device))
    n, means = 2000, []
    for steps in (32, 64):
        draw = replace(SAMPLERS[sampler].sampler, steps=steps)
        x = draw(guided, (n, 4), generator=torch.Generator(device=device).manual_seed(5))
        means.append(x.mean(0))
    assert ((means[0] - means[1]).abs() < 0.05 + 5 * x.std(0) * math.sqrt(2 / n)).all()


@every_guide
def test_rows_do_not_see_each_other(guide, generator, device):
    guided, t = guide(gaussian(VP(), device)), torch.linspace(0.1, 0.9, 16, dtype=torch.float64)
    x, order = (
        noisy(VP(), t, generator, device),
        torch.randperm(16, generator=torch.Generator().manual_seed(0)),
    )
    together = guided.denoise(x, t)
    torch.testing.assert_close(guided.denoise(x[order], t[order]), together[order], rtol=1e-11, atol=1e-11)
    for i in (0, 9):
        torch.testing.assert_close(guided.denoise(x[[i]], t[i]), together[[i]], rtol=1e-11, atol=1e-11)


@every_guide
def test_guides_are_differentiable(guide, generator, device):
    """So they nest and have a density: the derivative in x is that of finite differences."""
    guided, x = guide(gaussian(VP(), device)), noisy(VP(), 0.4, generator, device, n=3).requires_grad_(True)
    assert torch.autograd.gradcheck(lambda x: guided.denoise(x, 0.4), x)
    assert not guided.denoise(x.detach(), 0.4).requires_grad


@pytest.mark.parametrize("b", [[0.5], ([0.2], [0.6])], ids=["fixed", "band"])
def test_a_stressed_mixture_is_differentiable(b, generator):
    """There Tweedie's covariance depends on x too, and has a derivative of its own."""
    guide = LinearStress(Labelled(VP()), [1.0, -1.0], b)
    x = torch.randn(3, 2, dtype=torch.float64, generator=generator).requires_grad_(True)
    assert torch.autograd.gradcheck(lambda x: guide.denoise(x, 0.4), x)


@every_guide
def test_validity_of_the_score_passes_through(guide):
    model = gaussian(VP())
    guided = guide(model)
    assert guided.score_valid
    model.score_valid = False
    assert not guided.score_valid
    with pytest.raises(ValueError, match="whose score is valid"):
        DDIM(4, eta=1.0)(guided, (2, 4))


@every_guide
def test_single_precision_agrees_with_double(guide, generator, device):
    model = gaussian(Linear(), device)
    guided, single = guide(model), guide(copy.deepcopy(model).float())
    assert single.dtype == torch.float32
    for t in (*TIMES, 1.0):
        x = noisy(Linear(), t, generator, device)
        found = single.denoise(x.float(), t)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), guided.denoise(x, t), rtol=1e-3, atol=1e-3)


def test_a_stress_of_a_classifier_free_model(labelled, generator, device):
    """w = 0: exactly the conditional Gaussian of the component; w = 1: the stress holds all the same."""
    label, x1 = torch.ones(4000, dtype=torch.long, device=device), -0.5
    (m1, m2), ((s11, s12), (_, s22)) = labelled.MEANS[1], labelled.COVARIANCES[1]
    mean, variance = m2 + s12 / s11 * (x1 - m1), s22 - s12**2 / s11
    for weight in (0.0, 1.0):
        guide = LinearStress(ClassifierFreeGuidance(labelled, weight), [[1.0, 0.0]], [x1])
        x = ProbabilityFlow(48)(guide, (4000, 2), condition=label, generator=generator)
        assert (x[:, 0] - x1).abs().max() < 1e-9
        if weight == 0:
            assert_gaussian(x, np.array([x1, mean]), np.diag([0.0, variance]))


def test_two_stresses_nested_are_two_stresses(generator):
    """On a Gaussian, conditioning in turn is conditioning at once."""
    (first, second), b = STRESSES["two"]
    x, model = noisy(VP(), 0.4, generator), gaussian(VP())
    inner = LinearStress(model, [first], b[:1])
    nested = LinearStress(inner, [second], b[1:]).denoise(x, 0.4)
    torch.testing.assert_close(
        nested, LinearStress(model, [first, second], b).denoise(x, 0.4), rtol=1e-9, atol=1e-9
    )
