"""Weights, laws of times, and what the losses are minimised by."""

import math

import numpy as np
import pytest
import torch
from oracle import PROCESSES, each
from scipy import stats
from torch import nn

from finediff.diffusion.exact import GaussianScore
from finediff.diffusion.objective import DenoisingScoreMatching, FlowMatching, Times, weight
from finediff.diffusion.process import OU, VE, VP, Linear
from finediff.diffusion.score import READINGS, NetworkScore, ScoreModel, from_denoised

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


def test_unknown_weights_and_laws_are_refused(generator):
    with pytest.raises(ValueError, match="weighting"):
        weight(VP(), TIMES, "snr")
    with pytest.raises(ValueError, match="law of times"):
        Times("beta")(VP(), 4, generator=generator)


# ------------------------------------------------------------------ times


def uniforms(process, t, law):
    """The times as the values of their own distribution function."""
    noisy, clean = process.log_snr_range()
    if law == "log_snr":
        return (process.log_snr(t) - noisy) / (clean - noisy)
    t_min = process.time(clean).to(t.device)
    return (t - t_min) / (1 - t_min)


@every_process
@pytest.mark.parametrize("law", ["log_snr", "uniform"])
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
