"""Weights, laws of times, and what the losses are minimised by."""

import itertools
import math

import numpy as np
import pytest
import torch
from oracle import PROCESSES, each
from scipy import integrate, stats
from torch import nn

from finediff.diffusion.exact import GaussianScore, MixtureScore
from finediff.diffusion.objective import (
    DenoisingScoreMatching,
    ExplicitScoreMatching,
    FlowMatching,
    ImplicitScoreMatching,
    SlicedScoreMatching,
    Times,
    weight,
)
from finediff.diffusion.process import OU, VE, VP, Cosine, Interpolant, Linear, as_time, expand
from finediff.diffusion.sample import DDPM, ProbabilityFlow
from finediff.diffusion.score import READINGS, NetworkScore, ScoreModel, from_denoised, to_denoised
from finediff.generators import FlowMatchingGenerator

every_process = pytest.mark.parametrize("process", each(PROCESSES))
TIMES = torch.linspace(0.02, 0.98, 25, dtype=torch.float64)
EIGENVALUES = (0.3, 1.0, 2.5)


def gaussian(process, device="cpu"):
    """An exact model whose axes are not those of the coordinates."""
    generator = torch.Generator().manual_seed(3)
    turn = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64, generator=generator))[0]
    covariance = turn @ torch.diag(torch.tensor(EIGENVALUES, dtype=torch.float64)) @ turn.T
    return GaussianScore(torch.tensor([0.5, -1.0, 0.0], dtype=torch.float64), covariance, process).to(device)


class Bent(ScoreModel):
    """The exact model plus a function of x_t."""

    def __init__(self, exact, bend):
        super().__init__()
        self.exact, self.process, self.bend = exact, exact.process, bend

    def denoise(self, x, t, condition=None):
        return self.exact.denoise(x, t) + self.bend(x)


class Wavy(nn.Module):
    """A fixed smooth network, and one number that can be learned."""

    def __init__(self):
        super().__init__()
        self.offset = nn.Parameter(torch.tensor(0.1, dtype=torch.float64))

    def forward(self, x, level, condition):
        extra = 0 if condition is None else condition.sum(1, keepdim=True)
        return torch.sin(2 * x + level[:, None]) + self.offset + extra


# ------------------------------------------------------------------ weights


@every_process
@pytest.mark.parametrize("weighting", READINGS)
def test_weight_turns_the_error_of_x0_into_that_of_the_reading(process, weighting, device, generator):
    t = TIMES.to(device)
    a, b, x = torch.randn(3, len(t), 3, dtype=torch.float64, device=device, generator=generator)
    if weighting == "score":  # g^2 |score error|^2 is the likelihood weighting
        w = weight(process, t, "likelihood") / process.drift_diffusion(t)[1]
    else:
        w = weight(process, t, weighting)
    error = from_denoised(a, x, t, process, weighting) - from_denoised(b, x, t, process, weighting)
    torch.testing.assert_close(error.square().sum(1), w * (a - b).square().sum(1), rtol=1e-10, atol=0)
    # At x = 0 nothing cancels, and every digit is there.
    zero = torch.zeros_like(x)
    error = from_denoised(a, zero, t, process, weighting) - from_denoised(b, zero, t, process, weighting)
    torch.testing.assert_close(error.square().sum(1), w * (a - b).square().sum(1), rtol=1e-11, atol=0)


@every_process
def test_likelihood_weight_is_the_noise_loss_uniform_in_log_snr(process, device):
    """w_likelihood dt = w_eps |d log-SNR|, the slope of the log-SNR by central differences."""
    t, h = TIMES[:-1].to(device) + 1e-4, 1e-6  # off the kinks of the discrete paths
    slope = (process.log_snr(t + h) - process.log_snr(t - h)) / (2 * h)
    expected = weight(process, t, "eps") * -slope
    torch.testing.assert_close(weight(process, t, "likelihood"), expected, rtol=1e-6, atol=0)


@every_process
def test_min_snr_is_the_signal_to_noise_ratio_up_to_5(process, device):
    """min(SNR, 5) on x0 (Hang et al. 2023), with the noise weighting below the cap and x0's above it."""
    t = process.time(torch.linspace(-8, 8, 33)).to(device)
    snr = process.log_snr(t).exp()
    torch.testing.assert_close(weight(process, t, "min_snr"), snr.clamp(max=5), rtol=1e-12, atol=0)
    assert (snr > 5).any()
    assert (snr < 5).any()


def test_unknown_weights_and_laws_are_refused(generator):
    x = torch.ones(4, 1, dtype=torch.float64)
    with pytest.raises(ValueError, match="pairing"):
        FlowMatching(pairing="sorted").pair(x, x)
    with pytest.raises(ValueError, match="at least 1 probe"):
        ImplicitScoreMatching(probes=0)(gaussian(VP()), torch.ones(4, 3, dtype=torch.float64))
    with pytest.raises(ValueError, match="weighting"):
        weight(VP(), TIMES, "snr")
    with pytest.raises(ValueError, match="law of times"):
        Times("beta")(VP(), 4, generator=generator)


# ------------------------------------------------------------------ times


# Antiderivatives of 1/sigma^2, where there is one in closed form.
ANTIDERIVATIVES = {
    Linear: lambda p, t: -1 / t,
    Interpolant: lambda p, t: np.log(t),
    Cosine: lambda p, t: -2 / np.pi / np.tan(np.pi * t / 2),
    OU: lambda p, t: np.log(np.expm1(2 * p.theta * t)) / p.s**2,
    VE: lambda p, t: (
        np.log(-np.expm1(-2 * np.log(p.sigma_max / p.sigma_min) * t))
        / (2 * np.log(p.sigma_max / p.sigma_min) * p.sigma_min**2)
    ),
}


def mass(process, t):
    """int_tmin^t du / sigma(u)^2."""
    t = t.cpu().numpy()
    t_min = float(process.time(process.log_snr_range()[1]))
    if type(process) in ANTIDERIVATIVES:
        F = ANTIDERIVATIVES[type(process)]
        return torch.as_tensor(F(process, t) - F(process, t_min))
    log_t = np.linspace(math.log(t_min), 0, 100_001)
    values = np.exp(log_t) / process.sigma(torch.as_tensor(np.exp(log_t))).numpy() ** 2
    return torch.as_tensor(
        np.interp(np.log(t), log_t, integrate.cumulative_simpson(values, x=log_t, initial=0))
    )


def uniforms(process, t, law):
    """The times as the values of their own distribution function."""
    noisy, clean = process.log_snr_range()
    if law == "log_snr":
        return (process.log_snr(t) - noisy) / (clean - noisy)
    if law == "importance":
        return (mass(process, t) / mass(process, torch.ones((), dtype=torch.float64))).to(t.device)
    t_min = process.time(clean).to(t.device)
    return (t - t_min) / (1 - t_min)


@every_process
@pytest.mark.parametrize("law", ["log_snr", "uniform", "importance"])
def test_times_have_the_law_they_name(process, law, device, generator):
    n = 4000
    independent = uniforms(
        process, Times(law, stratified=False)(process, n, device=device, generator=generator), law
    )
    assert stats.kstest(independent.cpu().numpy(), "uniform").pvalue > 1e-3
    stratified = uniforms(process, Times(law)(process, n, device=device, generator=generator), law)
    assert (
        stats.kstest(stratified.cpu().numpy(), "uniform").statistic < 1.2 / n + 1e-3
    )  # 1e-3: cells of the table
    # One time in each of 16 equal cells, and any one row's time has the whole law over many calls.
    draw = Times(law)
    calls = torch.stack([draw(process, 16, device=device, generator=generator) for _ in range(400)])
    calls = uniforms(process, calls, law)
    cells = (calls * 16).clamp(0, 15.999).floor().sort(1).values
    at_edge = (calls * 16 - (calls * 16).round()).abs() < 0.02  # cells of the table are 1/2048 wide
    expected = torch.arange(16.0, dtype=torch.float64, device=calls.device)
    assert ((cells == expected).all(1) | at_edge.any(1)).all()
    for row in (0, 5, 15):
        assert stats.kstest(calls[:, row].cpu().numpy(), "uniform").pvalue > 1e-3


def test_stratified_times_lower_the_variance_of_a_mean(generator):
    """Means of u over n = 16 times: 1/(12 n) where independent, 1/(12 n^2) where stratified."""
    n = 16
    for stratified, theory in ((False, 1 / (12 * n)), (True, 1 / (12 * n**2))):
        times = Times("uniform", stratified)
        calls = torch.stack([times(VP(), n, generator=generator) for _ in range(2000)])
        means = uniforms(VP(), calls, "uniform").mean(1)
        spread = (means - 0.5).square()
        assert abs(float(means.mean()) - 0.5) < 4 * (theory / len(calls)) ** 0.5
        assert abs(float(spread.mean()) - theory) < 4 * float(spread.std()) / len(calls) ** 0.5


@pytest.mark.parametrize("process", [VP(), VE(), Linear(), OU()], ids=["VP", "VE", "Linear", "OU"])
def test_importance_times_estimate_what_the_weight_1_over_sigma_squared_does(process, device, generator):
    """E_uniform f/sigma^2 = Z/(1 - t_min) E_importance f, on the x0-loss of the exact model."""
    n, model = 40_000, gaussian(process, device)
    x = model.sample(n, generator)
    uniform, importance = Times("uniform", stratified=False), Times("importance", stratified=False)
    again = torch.Generator(device=device).manual_seed(4)
    t = uniform(process, n, device=device, generator=again)
    again.manual_seed(4)
    weighted = DenoisingScoreMatching("x0", uniform).losses(model, x, generator=again) / process.sigma(t) ** 2
    total = float(mass(process, torch.ones((), dtype=torch.float64)))
    share = total / (1 - float(process.time(process.log_snr_range()[1])))
    drawn = share * DenoisingScoreMatching("x0", importance).losses(model, x, generator=generator)
    error = math.sqrt(float(weighted.var() + drawn.var()) / n)
    assert error < 0.15 * float(drawn.mean())
    assert abs(float(weighted.mean() - drawn.mean())) < 4 * error


# ------------------------------------------------------------------ what minimises


def posterior_loss(process, weighting, law, nodes=20_001):
    """E w(t) Var(x_0 | x_t)/d of the exact model, by the trapezoidal rule over the law of the times."""
    noisy, clean = process.log_snr_range()
    u = torch.linspace(0, 1, nodes, dtype=torch.float64)
    if law == "log_snr":
        t = process.time(noisy + u * (clean - noisy))
    else:
        t = process.time(clean) + u * (1 - process.time(clean))
        t[-1] = min(float(t[-1]), 1 - 1e-9)  # eps weights are 0 infinity at alpha = 0, a set of measure zero
    alpha, sigma = process.alpha(t), process.sigma(t)
    values = torch.tensor(EIGENVALUES, dtype=torch.float64)[:, None]
    variance = (values * sigma**2 / (alpha**2 * values + sigma**2)).mean(0)
    return float(torch.trapezoid(weight(process, t, weighting) * variance, u))


LOSSES = [
    (VP(), "eps", "log_snr"),
    (VP(), "x0", "log_snr"),
    (VP(), "v", "log_snr"),
    (VP(), "v", "uniform"),
    (Linear(), "velocity", "uniform"),
    (Linear(), "eps", "log_snr"),
    (OU(), "velocity", "log_snr"),
    (VE(), "eps", "log_snr"),
    (VP(), "likelihood", "uniform"),
]


@pytest.mark.parametrize(("process", "weighting", "law"), LOSSES)
def test_exact_model_has_the_posterior_variance_as_its_loss(process, weighting, law, device, generator):
    n = 40_000
    model = gaussian(process, device)
    objective = DenoisingScoreMatching(weighting, Times(law))
    losses = objective.losses(model, model.sample(n, generator), generator=generator)
    z = (float(losses.mean()) - posterior_loss(process, weighting, law)) / (float(losses.std()) / n**0.5)
    assert abs(z) < 4


@pytest.mark.parametrize(("process", "weighting", "law"), LOSSES)
def test_any_other_model_is_worse_by_exactly_what_it_adds(process, weighting, law, device, generator):
    """E w |x0_hat + h(x_t) - x_0|^2 = E w |x0_hat - x_0|^2 + E w |h(x_t)|^2: the error is orthogonal to every h."""
    n, seed = 40_000, 11
    exact = gaussian(process, device)
    objective = DenoisingScoreMatching(weighting, Times(law))
    x = exact.sample(n, generator)

    def losses(model):
        again = torch.Generator(device=device).manual_seed(seed)
        return objective.losses(model, x, generator=again)

    best = losses(exact)
    again = torch.Generator(device=device).manual_seed(seed)
    t = objective.times(process, n, device=device, generator=again)
    noisy = process.perturb(x, t, torch.randn(n, 3, dtype=x.dtype, device=device, generator=again))
    w = weight(process, t, weighting)
    for bend in (
        lambda y: torch.full_like(y, 0.3),
        lambda y: 0.1 * y / (1 + y.square()),
        lambda y: 0.2 * torch.sin(y.roll(1, 1)),
    ):
        added = w * bend(noisy).square().mean(1)
        worse = losses(Bent(exact, bend)) - best
        cross = worse - added
        assert abs(float(cross.mean())) < 4 * float(cross.std()) / n**0.5
        assert float(added.mean()) > 0


def test_the_optimum_is_found_from_both_sides():
    """d loss/d(gain) of the exact Gaussian model changes its sign at the exact gain."""
    exact = gaussian(VP())
    x = exact.sample(20_000, torch.Generator().manual_seed(0))

    def loss(gain):
        model = Bent(exact, lambda y: gain * y)
        return float(DenoisingScoreMatching("x0")(model, x, generator=torch.Generator().manual_seed(1)))

    assert loss(-0.05) > loss(0.0) < loss(0.05)


# ------------------------------------------------------------------ naive twins


def by_hand(objective, model, x, seed, target):
    """The same draws in the same order, and the regression as a paper prints it."""
    generator = torch.Generator(device=x.device).manual_seed(seed)
    t = objective.times(model.process, len(x), device=x.device, generator=generator)
    eps = torch.randn(x.shape, dtype=x.dtype, device=x.device, generator=generator)
    process = model.process
    total = 0.0
    for row in range(len(x)):
        alpha, sigma = float(process.alpha(t[row])), float(process.sigma(t[row]))
        noisy = alpha * x[row] + sigma * eps[row]
        denoised = model.denoise(noisy[None], t[row])[0]
        total += target(process, float(t[row]), x[row], eps[row], denoised, noisy)
    return float(total) / x.numel()


def noise_loss(process, t, x0, eps, denoised, noisy):
    alpha, sigma = float(process.alpha(t)), float(process.sigma(t))
    return ((noisy - alpha * denoised) / sigma - eps).square().sum()


def v_loss(process, t, x0, eps, denoised, noisy):
    alpha, sigma = float(process.alpha(t)), float(process.sigma(t))
    v = alpha * (noisy - alpha * denoised) / sigma - sigma * denoised
    return (v - (alpha * eps - sigma * x0)).square().sum()


def velocity_loss(process, t, x0, eps, denoised, noisy):
    d_alpha, d_sigma = (float(rate) for rate in process.rates(t))
    alpha, sigma = float(process.alpha(t)), float(process.sigma(t))
    u = d_alpha * denoised + d_sigma * (noisy - alpha * denoised) / sigma
    return (u - (d_alpha * x0 + d_sigma * eps)).square().sum()


def score_loss(process, t, x0, eps, denoised, noisy):
    alpha, sigma = float(process.alpha(t)), float(process.sigma(t))
    score = (alpha * denoised - noisy) / sigma**2
    return float(process.drift_diffusion(t)[1]) * (score + eps / sigma).square().sum()


@pytest.mark.parametrize(
    ("objective", "target"),
    [
        (DenoisingScoreMatching(), noise_loss),
        (DenoisingScoreMatching("v"), v_loss),
        (DenoisingScoreMatching("velocity"), velocity_loss),
        (DenoisingScoreMatching("likelihood", Times("uniform", stratified=False)), score_loss),
        (FlowMatching(), velocity_loss),
    ],
)
@pytest.mark.parametrize("process", [VP(), VE(), Linear()], ids=["VP", "VE", "Linear"])
@pytest.mark.parametrize("reading", ["v", "eps"])
def test_losses_are_the_published_regressions(objective, target, process, reading, device, generator):
    x = torch.randn(24, 3, dtype=torch.float64, device=device, generator=generator)
    model = NetworkScore(Wavy(), process, reading).to(device)
    with torch.no_grad():
        loss = objective(model, x, generator=torch.Generator(device=device).manual_seed(5))
        assert float(loss) == pytest.approx(by_hand(objective, model, x, 5, target), rel=1e-8)


def test_flow_matching_on_the_linear_path_regresses_on_noise_minus_data(device, generator):
    x = torch.randn(200, 3, dtype=torch.float64, device=device, generator=generator)
    model = NetworkScore(Wavy(), Linear(), "velocity", precondition=False).to(device)
    model.requires_grad_(False)
    loss = FlowMatching()(model, x, generator=torch.Generator(device=device).manual_seed(5))
    again = torch.Generator(device=device).manual_seed(5)
    t = Times("uniform")(Linear(), 200, device=device, generator=again)
    eps = torch.randn(x.shape, dtype=x.dtype, device=device, generator=again)
    noisy = (1 - t[:, None]) * x + t[:, None] * eps
    scale = ((1 - t) ** 2 + t**2).sqrt()[:, None]
    network_output = model.network(noisy / scale, Linear().log_snr(t).clamp(-15, 15) / 10, None)
    assert float(loss) == pytest.approx(float((network_output - (eps - x)).square().mean()), rel=1e-10)


@pytest.mark.parametrize("antithetic", [False, True])
def test_conditions_stay_with_their_rows(antithetic, device, generator):
    """A model told x_0 itself has no loss; a model told another row's has one."""

    class Told(ScoreModel):
        process = VP()

        def denoise(self, x, t, condition=None):
            return condition

    x = torch.randn(50, 3, dtype=torch.float64, device=device, generator=generator)
    objective = DenoisingScoreMatching(antithetic=antithetic, condition_dropout=0.0)
    assert float(objective(Told(), x, x, generator)) == 0
    assert float(objective(Told(), x, x.roll(1, 0), generator)) > 0.1


# ------------------------------------------------------------------ antithetic noise


@pytest.mark.parametrize("process", [VP(), Linear()], ids=["VP", "Linear"])
def test_antithetic_noise_leaves_the_expectation(process, device, generator):
    n = 40_000
    model = NetworkScore(Wavy(), process).to(device)
    x = gaussian(process, device).sample(n, generator)
    with torch.no_grad():
        plain = DenoisingScoreMatching("x0").losses(model, x, generator=generator)
        paired = DenoisingScoreMatching("x0", antithetic=True).losses(model, x, generator=generator)
    assert len(paired) == 2 * n
    paired = paired.reshape(2, n).mean(0)
    error = math.sqrt(float(plain.var() + paired.var()) / n)
    assert abs(float(plain.mean() - paired.mean())) < 4 * error


def test_antithetic_noise_lowers_the_variance_of_the_gradient():
    """At the same number of network rows, on N(0, 1) data and a v-network that returns a constant.

    The gradient of the noise loss there is -2 mean alpha^2 v with v = alpha eps - sigma x_0. Pairs cancel the eps
    part, so the variance goes from (A + B)/(2 n) to B/n, A = E alpha^6 and B = E alpha^4 sigma^2 over the times.
    """
    process, n, calls = VP(), 16, 800

    class Offset(nn.Module):
        def __init__(self):
            super().__init__()
            self.value = nn.Parameter(torch.zeros((), dtype=torch.float64))

        def forward(self, x, level, condition):
            return self.value.expand_as(x)

    model = NetworkScore(Offset(), process)
    generator = torch.Generator().manual_seed(0)
    log_snr = torch.linspace(*process.log_snr_range(), 20_001, dtype=torch.float64)
    alpha, sigma = process.alpha(process.time(log_snr)), process.sigma(process.time(log_snr))
    A, B = float((alpha**6).mean()), float((alpha**4 * sigma**2).mean())

    def gradients(objective, rows):
        found = []
        for _ in range(calls):
            x = torch.randn(rows, 1, dtype=torch.float64, generator=generator)
            (slope,) = torch.autograd.grad(objective(model, x, generator=generator), model.network.value)
            found.append(float(slope))
        return np.array(found)

    plain = gradients(DenoisingScoreMatching("eps"), 2 * n)
    paired = gradients(DenoisingScoreMatching("eps", antithetic=True), n)
    for found, theory in ((plain, 4 * (A + B) / (2 * n)), (paired, 4 * B / n)):
        assert abs(found.mean()) < 4 * math.sqrt(theory / calls)
        squares = found**2
        assert abs(squares.mean() - theory) < 4 * squares.std() / math.sqrt(calls)
    assert B / n < (A + B) / (2 * n) / 4


# ------------------------------------------------------------------ without a target, and against the truth


class Learnable(ScoreModel):
    """A wrong Gaussian score with a learnable shift and scale, and a bend whose Jacobian is not diagonal."""

    def __init__(self, process):
        super().__init__()
        self.process = process
        self.shift = nn.Parameter(torch.tensor([1.2, -0.8], dtype=torch.float64))
        self.log_scale = nn.Parameter(torch.tensor([1.0, -1.0], dtype=torch.float64))
        self.bend = nn.Parameter(torch.tensor([1.0, -0.8], dtype=torch.float64))
        self.register_buffer("mixing", torch.tensor([[0.6, 0.9], [-0.7, 0.5]], dtype=torch.float64))

    def score(self, x, t, condition=None):
        alpha, sigma = expand(self.process.alpha(t), x), expand(self.process.sigma(t), x)
        normal = -(x - alpha * self.shift) / (alpha**2 * self.log_scale.exp() + sigma**2)
        return normal + alpha * self.bend * torch.sin(x @ self.mixing)

    def denoise(self, x, t, condition=None):
        return to_denoised(self.score(x, t), x, t, self.process, "score")


def skewed(process, device="cpu"):
    means = torch.tensor([[1.5, 0.5], [-0.5, -0.2]], dtype=torch.float64)
    covariances = torch.tensor([[[0.3, 0.1], [0.1, 0.2]], [[0.8, -0.4], [-0.4, 0.7]]], dtype=torch.float64)
    return MixtureScore(torch.tensor([0.3, 0.7], dtype=torch.float64), means, covariances, process).to(device)


@pytest.mark.parametrize("process", [VP(), Linear()], ids=["VP", "Linear"])
def test_all_score_matching_losses_have_one_gradient(process, device, generator):
    """DSM = 2 ISM + 1 = ESM + const in expectation, with the exact, Hutchinson's and both sliced divergences.

    All of them draw the same times and noise from one seed, so the differences have little variance.
    """
    oracle, model = skewed(process, device), Learnable(process).to(device)
    objectives = [
        (1, DenoisingScoreMatching()),
        (2, ImplicitScoreMatching()),
        (2, ImplicitScoreMatching(probes=2)),
        (2, SlicedScoreMatching()),
        (2, SlicedScoreMatching(probes=2, variance_reduced=False)),
        (1, ExplicitScoreMatching(oracle)),
    ]
    batches, found = 80, []
    for seed in range(batches):
        x = oracle.sample(500, generator)
        for factor, objective in objectives:
            again = torch.Generator(device=device).manual_seed(seed)
            loss = factor * objective(model, x, None, again)
            slopes = torch.autograd.grad(loss, list(model.parameters()))
            found.append(torch.cat([loss.detach().reshape(1), *(slope.reshape(-1) for slope in slopes)]))
    found = torch.stack(found).reshape(batches, len(objectives), -1)

    def z(values):
        return values.mean(0) / (values.std(0) / batches**0.5)

    reference = found[:, 0]
    assert (z(reference).abs() > 8).all()
    for i in range(1, len(objectives)):
        difference = found[:, i] - reference
        assert (difference.std(0) > 0).all()  # other numbers, the same mean
        assert (z(difference[:, 1:]).abs() < 4.5).all(), objectives[i]
        if objectives[i][0] == 2:
            assert abs(float(z(difference[:, :1] + 1))) < 4.5


@pytest.mark.parametrize("process", [VP(), VE()], ids=["VP", "VE"])
def test_implicit_loss_by_hand(process, device, generator):
    """Row by row, with the whole Jacobian."""
    model, times = Learnable(process).to(device).requires_grad_(False), Times()
    x = torch.randn(6, 2, dtype=torch.float64, device=device, generator=generator)
    again = torch.Generator(device=device).manual_seed(2)
    t = times(process, 6, device=device, generator=again)
    x_t = process.perturb(x, t, torch.randn(x.shape, dtype=x.dtype, device=device, generator=again))
    total = 0.0
    for i in range(6):
        jacobian = torch.autograd.functional.jacobian(lambda y, i=i: model.score(y[None], t[i])[0], x_t[i])
        size = model.score(x_t[i][None], t[i])[0].square().sum()
        total += float(process.sigma(t[i])) ** 2 * float(size / 2 + jacobian.trace())
    loss = ImplicitScoreMatching(times=times)(model, x, None, torch.Generator(device=device).manual_seed(2))
    assert float(loss.detach()) == pytest.approx(total / 12, rel=1e-9)


def test_the_exact_divergence_is_the_mean_of_the_probes(device, generator):
    """Unbiased where the Jacobian is full; exact with one probe where it is diagonal, since v_j^2 = 1."""
    model = Learnable(VP()).to(device).requires_grad_(False)
    x = skewed(VP(), device).sample(50, generator)

    def loss(objective, seed):
        with torch.no_grad():
            return float(objective(model, x, None, torch.Generator(device=device).manual_seed(seed)))

    seeds = range(150)
    exact = np.array([loss(ImplicitScoreMatching(), seed) for seed in seeds])
    few = np.array([loss(ImplicitScoreMatching(probes=1), seed) for seed in seeds]) - exact
    many = np.array([loss(ImplicitScoreMatching(probes=16), seed) for seed in seeds]) - exact
    for difference in (few, many):
        assert abs(difference.mean()) < 4 * difference.std() / len(seeds) ** 0.5
    assert many.std() == pytest.approx(few.std() / 4, rel=0.25)
    model.bend.zero_()
    assert loss(ImplicitScoreMatching(probes=1), 3) == pytest.approx(
        loss(ImplicitScoreMatching(), 3), rel=1e-12
    )
    assert loss(SlicedScoreMatching(), 3) == loss(ImplicitScoreMatching(probes=1), 3)
    same = SlicedScoreMatching(probes=None, variance_reduced=False)  # along the axes nothing is random
    assert loss(same, 3) == pytest.approx(loss(ImplicitScoreMatching(), 3), rel=1e-12)


@pytest.mark.parametrize("process", [VP(), Linear(), VE()], ids=["VP", "Linear", "VE"])
def test_explicit_loss_is_the_error_itself(process, device, generator):
    """0 for the oracle; E sigma^2 c (1/c' - 1/c)^2, c = alpha^2 l + sigma^2, for a variance l' in the place of l."""
    n, l, wrong = 40_000, 0.7, 1.9
    eye = torch.eye(2, dtype=torch.float64)
    oracle = GaussianScore([0.3, -0.1], l * eye, process).to(device)
    model = GaussianScore([0.3, -0.1], wrong * eye, process).to(device)
    x = oracle.sample(n, generator)
    assert float(ExplicitScoreMatching(oracle)(oracle, x, None, generator)) == 0
    noisy, clean = process.log_snr_range()
    t = process.time(torch.linspace(noisy, clean, 4001, dtype=torch.float64))
    alpha, sigma = process.alpha(t), process.sigma(t)
    c, other = alpha**2 * l + sigma**2, alpha**2 * wrong + sigma**2
    u = torch.linspace(0, 1, 4001, dtype=torch.float64)
    expected = float(torch.trapezoid(sigma**2 * c * (1 / other - 1 / c) ** 2, u))
    batches = [float(ExplicitScoreMatching(oracle)(model, part, None, generator)) for part in x.split(500)]
    assert abs(np.mean(batches) - expected) < 4 * np.std(batches) / len(batches) ** 0.5
    assert np.std(batches) / len(batches) ** 0.5 < 0.02 * expected


# ------------------------------------------------------------------ optimal-transport pairing

TRANSPORT = FlowMatching(pairing="optimal_transport")


def cost(x, noise):
    return float((x - noise).square().sum())


@pytest.mark.parametrize("d", [1, 3])
def test_optimal_pairing_is_the_best_permutation(d, dtype, device, generator):
    for _ in range(20):
        x, noise = torch.randn(2, 5, d, dtype=dtype, device=device, generator=generator)
        paired = TRANSPORT.pair(x, noise)
        best = min(cost(x, noise[list(order)]) for order in itertools.permutations(range(5)))
        assert cost(x, paired) == pytest.approx(best, rel=1e-4 if dtype == torch.float32 else 1e-12)
    for n in (1, 40):
        x, noise = torch.randn(2, n, d, dtype=dtype, device=device, generator=generator)
        paired = TRANSPORT.pair(x, noise)
        assert sorted(paired.tolist()) == sorted(noise.tolist())
        assert cost(x, paired) <= cost(x, noise)
        assert torch.equal(FlowMatching().pair(x, noise), noise)


def test_in_one_dimension_the_optimal_pairing_is_the_monotone_map(device, generator):
    x, noise = torch.randn(2, 300, 1, dtype=torch.float64, device=device, generator=generator)
    paired = TRANSPORT.pair(x, noise)
    assert torch.equal(paired[x[:, 0].argsort()], noise.sort(0).values)


def test_each_condition_keeps_its_noise_law(device, generator):
    """Within each condition the paired noise is N(0, I): matched inside it. Matched across, its mean moves."""
    names = torch.tensor([0, 0, 1, 2], device=device).repeat(32)
    condition = torch.nn.functional.one_hot(names).double()
    centres = torch.tensor([[1.5, 0.0], [-1.5, 0.5], [0.0, -2.0]], dtype=torch.float64, device=device)
    kept, mixed = [], []
    for _ in range(60):
        noise, jitter = torch.randn(2, 128, 2, dtype=torch.float64, device=device, generator=generator)
        x = centres[names] + 0.5 * jitter
        kept.append(TRANSPORT.pair(x, noise, condition))
        mixed.append(TRANSPORT.pair(x, noise))
        for name in range(3):
            mine = names == name
            assert sorted(kept[-1][mine].tolist()) == sorted(noise[mine].tolist())
            assert torch.equal(kept[-1][mine], TRANSPORT.pair(x[mine], noise[mine]))
    kept, mixed = torch.stack(kept), torch.stack(mixed)
    for name in range(3):
        mine = kept[:, names == name].reshape(-1, 2)
        n = len(mine)
        assert (mine.mean(0).abs() < 4 / n**0.5).all()
        assert ((mine.square().mean(0) - 1).abs() < 4 * (2 / n) ** 0.5).all()
        assert abs(float(mine.prod(1).mean())) < 4 / n**0.5
        naive = mixed[:, names == name].reshape(-1, 2)
        assert float(naive.mean(0).abs().max()) > 20 / n**0.5
    couples = (torch.arange(128, device=device) // 2)[:, None].double()
    paired = TRANSPORT.pair(x, noise, couples)
    for first in range(0, 128, 2):
        couple = slice(first, first + 2)
        assert torch.equal(paired[couple], TRANSPORT.pair(x[couple], noise[couple]))
    # A condition of its own for each row leaves nothing to match.
    assert torch.equal(TRANSPORT.pair(x, noise, x), noise)


class Monotone(ScoreModel):
    """N(0, s^2) under x_0 = s eps: x_t = (alpha s + sigma) eps, so x0_hat = s x_t / (alpha s + sigma)."""

    def __init__(self, s, process):
        super().__init__()
        self.process, self.s = process, nn.Parameter(torch.tensor(s, dtype=torch.float64))

    def denoise(self, x, t, condition=None):
        t = as_time(t)
        alpha, sigma = expand(self.process.alpha(t), x), expand(self.process.sigma(t), x)
        return self.s * x / (alpha * self.s + sigma)


@pytest.mark.parametrize("antithetic", [False, True])
@pytest.mark.parametrize("process", [Linear(), VP()], ids=["Linear", "VP"])
def test_optimal_pairing_straightens_the_paths(antithetic, process, device, generator):
    """What is left of |u - target|^2 is the variance of the target given x_t, and the monotone map has none.

    With both signs of a noise too: the negative of an optimal pairing would be the worst one.
    """
    s, n = 2.0, 500
    x = s * torch.randn(n, 1, dtype=torch.float64, device=device, generator=generator)
    independent = FlowMatching(antithetic=antithetic)
    straight = FlowMatching(antithetic=antithetic, pairing="optimal_transport")
    exact = GaussianScore([0.0], [[s**2]], process).to(device)
    with torch.no_grad():
        bent_loss = float(independent(exact, x, None, generator))
        loss = float(straight(Monotone(s, process).to(device), x, None, generator))
        wrong = float(straight(exact, x, None, generator))
    assert loss < 0.05 * bent_loss
    assert loss < 0.2 * wrong  # the exact posterior mean of independent pairs is no minimiser any more


def test_optimal_pairing_lowers_the_variance_of_the_target_in_three_dimensions(device, generator):
    """Residual variance of eps - x_0 regressed on x_t: for independent pairs the closed form, below it otherwise."""
    n, l = 512, torch.tensor(EIGENVALUES, dtype=torch.float64, device=device)
    for t in (0.25, 0.5, 0.75):
        left = {"independent": [], "optimal_transport": []}
        for _ in range(3):
            x, noise = torch.randn(2, n, 3, dtype=torch.float64, device=device, generator=generator)
            x = x * l.sqrt()
            for pairing, values in left.items():
                eps = FlowMatching(pairing=pairing).pair(x, noise)
                x_t, target = (1 - t) * x + t * eps, eps - x
                fit = torch.linalg.lstsq(x_t, target).solution
                values.append((target - x_t @ fit).square().mean(0))
        closed = l / ((1 - t) ** 2 * l + t**2)  # Var(eps - x_0 | x_t)
        independent, straight = (torch.stack(v).mean(0) for v in left.values())
        torch.testing.assert_close(independent, closed, rtol=4 * (2 / (3 * n)) ** 0.5, atol=0)
        assert (straight < 0.35 * closed).all()


def test_readings_stay_right_and_the_score_does_not(device, generator):
    """x0_hat, eps_hat and u are the conditional means under the pairing; -eps_hat/sigma is not grad log p_t.

    By least squares on paired rows of N(0, s^2). Ancestral sampling, which takes it for the score, ends at a
    standard deviation of s/sqrt(3): with r = sigma/alpha and q = s + r its variance is V q^2 of x_t/alpha,
    -dV/dq = -2 V/q + 2 (q - s)/q^2 and V = 1 at q = infinity, so V = 1 - 2 s/(3 q), and q = s at the end.
    """
    s, n, process = 2.0, 2000, Linear()
    model = Monotone(s, process).to(device).requires_grad_(False)
    x, noise = torch.randn(2, n, 1, dtype=torch.float64, device=device, generator=generator)
    x = s * x
    eps = TRANSPORT.pair(x, noise)
    for t in (0.2, 0.5, 0.8):
        t = torch.tensor(t, dtype=torch.float64, device=device)
        x_t = process.perturb(x, t, eps)
        one = torch.ones_like(x_t)
        for reading, target in ((model.denoise, x), (model.noise, eps), (model.velocity, eps - x)):
            slope = (x_t * target).sum() / x_t.square().sum()
            assert float(slope) == pytest.approx(float(reading(one, t)[0, 0]), abs=0.06)
        variance = float((process.alpha(t) * s + process.sigma(t)) ** 2)  # of x_t, under the pairing
        mistaken = float(model.score(one, t)[0, 0])
        assert abs(mistaken + 1 / variance) > 0.3 / variance

    def spread(sampler, n=6000):
        return float(sampler(model, (n, 1), generator=generator).std()) / s

    error = (1 / (2 * 6000)) ** 0.5
    assert abs(spread(ProbabilityFlow(64)) - 1) < 4 * error + 0.01
    assert abs(spread(DDPM(250)) - 3**-0.5) < 4 * error + 0.01  # 42 % are lost
    model.score_valid = False
    with pytest.raises(ValueError, match="score is valid"):
        spread(DDPM(4))
    assert spread(ProbabilityFlow(4)) > 0.9


def test_a_generator_trained_on_optimal_pairs_says_that_it_has_no_score(rng):
    class Straight(FlowMatchingGenerator):
        def _objective(self):
            return FlowMatching(antithetic=True, pairing="optimal_transport")

    X = 0.02 * rng.standard_normal((600, 1))
    straight = Straight(width=16, depth=1, steps=300, batch_size=64, device="cpu", random_state=0).fit(X)
    assert straight.score_model_.score_valid is False
    straight._restore(straight._arrays())
    assert straight.score_model_.score_valid is False
    assert FlowMatchingGenerator(steps=1, device="cpu").fit(X).score_model_.score_valid is True

    assert straight.sample(4000, random_state=1).std() == pytest.approx(X.std(), rel=0.1)
    straight.set_params(sampler=DDPM(64))
    with pytest.raises(ValueError, match="score is valid"):
        straight.sample(4, random_state=1)
    straight.score_model_.score_valid = True
    assert straight.sample(4000, random_state=1).std() < 0.75 * X.std()


# ------------------------------------------------------------------ withheld conditions


@pytest.mark.parametrize("antithetic", [False, True])
def test_conditions_are_withheld_in_the_share_asked_for(antithetic, device, generator):
    heard = []

    class Listener(ScoreModel):
        process = VP()

        def denoise(self, x, t, condition=None):
            heard.append(condition)
            return x

    n = 4000
    x = torch.randn(n, 2, dtype=torch.float64, device=device, generator=generator)
    condition = torch.randn(n, 3, dtype=torch.float64, device=device, generator=generator)
    copies = 2 if antithetic else 1
    for share in (0.0, 0.1, 0.6, 1.0):
        DenoisingScoreMatching(antithetic=antithetic, condition_dropout=share)(
            Listener(), x, condition, generator
        )
        told = heard.pop().reshape(copies, n, 3)
        missing = told.isnan()
        assert torch.equal(missing.any(2), missing.all(2))  # whole rows
        assert torch.equal(missing[0], missing[-1])  # both signs of a row
        assert torch.equal(told[~missing], condition.expand(copies, n, 3)[~missing])
        found = float(missing[0, :, 0].double().mean())
        assert abs(found - share) <= 4 * (share * (1 - share) / n) ** 0.5
    DenoisingScoreMatching(condition_dropout=1.0)(Listener(), x, None, generator)
    assert heard.pop() is None
