"""Five readings of one quantity, networks read as them, their averages, and divergences."""

import math

import pytest
import torch
from oracle import PROCESSES, each
from torch import nn

from finediff.diffusion.exact import GaussianScore
from finediff.diffusion.process import VP, Linear
from finediff.diffusion.score import EMA, READINGS, NetworkScore, divergence, from_denoised, to_denoised

TIMES = torch.linspace(0.02, 0.98, 13, dtype=torch.float64)
every_process = pytest.mark.parametrize("process", each(PROCESSES))
every_reading = pytest.mark.parametrize("reading", READINGS)


class Constant(nn.Module):
    """A network that returns one value, and remembers what it was given."""

    def __init__(self, value: float = 0.0):
        super().__init__()
        self.value = value

    def forward(self, x, level, condition):
        self.given = x, level, condition
        return torch.full_like(x, self.value)


class Noise(nn.Module):
    """A young network: small outputs that have nothing to do with x."""

    def forward(self, x, level, condition):
        return 0.01 * torch.sin(1000 * x)


def normal_model(process, d, device="cpu"):
    return GaussianScore(torch.zeros(d, dtype=torch.float64), torch.eye(d, dtype=torch.float64), process).to(
        device
    )


@pytest.fixture
def points(device, generator):
    """(x_0 hat, x_t) for all of TIMES, two rows each."""
    return torch.randn(2, 2 * len(TIMES), 3, dtype=torch.float64, device=device, generator=generator)


@pytest.fixture
def times(device):
    return TIMES.repeat_interleave(2).to(device)


# ------------------------------------------------------------------ readings


@every_process
@every_reading
@pytest.mark.parametrize("other", READINGS)
def test_round_trips_between_readings(process, reading, other, points, times):
    x0, x = points
    x = x * (process.alpha(times) ** 2 + process.sigma(times) ** 2).sqrt()[:, None]
    value = from_denoised(x0, x, times, process, reading)
    torch.testing.assert_close(to_denoised(value, x, times, process, reading), x0, rtol=1e-12, atol=1e-12)
    there = from_denoised(to_denoised(value, x, times, process, reading), x, times, process, other)
    back = from_denoised(to_denoised(there, x, times, process, other), x, times, process, reading)
    assert ((back - value).abs() / value.abs().max(1, keepdim=True)[0]).max() < 1e-11


@every_process
def test_readings_are_what_their_names_say(process, points, times):
    """Each against its definition in terms of x_0 and eps, and the velocity against the probability-flow ODE."""
    x0, eps = points
    alpha, sigma = process.alpha(times)[:, None], process.sigma(times)[:, None]
    x = process.perturb(x0, times, eps)
    read = {reading: from_denoised(x0, x, times, process, reading) for reading in READINGS}
    for found, expected in (
        (read["x0"], x0),
        (read["eps"], eps),
        (read["score"], -(x - alpha * x0) / sigma**2),
        (read["v"], alpha * eps - sigma * x0),
        (x, alpha * read["x0"] + sigma * read["eps"]),
    ):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    f, g2 = (rate[:, None] for rate in process.drift_diffusion(times))
    flow = f * x - g2 / 2 * read["score"]
    size = (f * x).abs() + (g2 / 2 * read["score"]).abs()
    assert ((read["velocity"] - flow).abs() / size).max() < 1e-9


@every_process
def test_velocity_moves_a_noisy_point_along_its_path(process, points):
    """u at (x_t, x_0) is d/dt (alpha x_0 + sigma eps), by central differences."""
    x0, eps = points
    t, h = torch.tensor(0.4321, dtype=torch.float64), 1e-6
    moved = (process.perturb(x0, t + h, eps) - process.perturb(x0, t - h, eps)) / (2 * h)
    found = from_denoised(x0, process.perturb(x0, t, eps), t, process, "velocity")
    torch.testing.assert_close(found, moved, rtol=1e-7, atol=1e-7)


@every_process
def test_score_has_the_sign_of_the_gradient_of_the_log_density(process, device):
    """E[x_0 | x_t] of a normal law, against the gradient of torch's own log-density of x_t."""
    mean = torch.tensor([0.5, -1.0], dtype=torch.float64, device=device)
    covariance = torch.tensor([[2.0, 0.6], [0.6, 0.5]], dtype=torch.float64, device=device)
    model = GaussianScore(mean, covariance, process)
    for t in (0.1, 0.6, 0.95):
        alpha, sigma = float(process.alpha(t)), float(process.sigma(t))
        law = torch.distributions.MultivariateNormal(
            alpha * mean, alpha**2 * covariance + sigma**2 * torch.eye(2, dtype=torch.float64, device=device)
        )
        x = (
            alpha * mean + torch.tensor([[0.3, 0.7], [-2.0, 1.0]], dtype=torch.float64, device=device)
        ).requires_grad_()
        (gradient,) = torch.autograd.grad(law.log_prob(x).sum(), x)
        x = x.detach()
        score = model.score(x, t)
        torch.testing.assert_close(score, gradient, rtol=1e-8, atol=1e-10)
        torch.testing.assert_close(model.noise(x, t), -sigma * gradient, rtol=1e-8, atol=1e-10)
        f, g2 = (float(value) for value in process.drift_diffusion(t))
        flow = f * x - g2 / 2 * gradient
        torch.testing.assert_close(model.velocity(x, t), flow, rtol=1e-7, atol=1e-8 * (1 + abs(f) + g2))


def test_unknown_readings_are_refused():
    x = torch.zeros(1, 1, dtype=torch.float64)
    for call in (
        lambda: from_denoised(x, x, 0.5, VP(), "epsilon"),
        lambda: to_denoised(x, x, 0.5, VP(), "epsilon"),
        lambda: NetworkScore(Constant(), VP(), "epsilon"),
    ):
        with pytest.raises(ValueError, match="reading"):
            call()


# ------------------------------------------------------------------ networks


@every_process
@every_reading
def test_untrained_network_is_the_standard_normal_model_at_every_time(process, reading, device, generator):
    t = torch.cat([process.grid(9), TIMES]).to(device)  # the grid holds both ends, t = 1 among them
    x = torch.randn(len(t), 4, dtype=torch.float64, device=device, generator=generator)
    x = x * (process.alpha(t) ** 2 + process.sigma(t) ** 2).sqrt()[:, None]
    untrained, exact = NetworkScore(Constant(), process, reading), normal_model(process, 4, device)
    for name in ("denoise", "noise", "velocity"):
        found, expected = getattr(untrained, name)(x, t), getattr(exact, name)(x, t)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(untrained.score(x, t), exact.score(x, t), rtol=1e-10, atol=1e-8)
    torch.testing.assert_close(untrained.denoise(x, 1.0), exact.denoise(x, 1.0), rtol=1e-10, atol=1e-10)


@every_process
@every_reading
def test_output_is_added_to_the_reading_of_the_normal_model(process, reading, points, times):
    x, _ = points
    model, exact = NetworkScore(Constant(0.3), process, reading), normal_model(process, 3, x.device)
    found = from_denoised(model.denoise(x, times), x, times, process, reading)
    expected = from_denoised(exact.denoise(x, times), x, times, process, reading) + 0.3
    assert ((found - expected).abs() / (1 + expected.abs())).max() < 1e-9


@every_process
@every_reading
def test_without_preconditioning_the_output_is_the_reading(process, reading, points, times):
    x, _ = points
    model = NetworkScore(Constant(0.3), process, reading, precondition=False)
    found = from_denoised(model.denoise(x, times), x, times, process, reading)
    tolerance = 1e-10 * (1 + x.abs().max() / process.sigma(times).min() ** 2)
    assert (found - 0.3).abs().max() < tolerance


@every_process
@pytest.mark.parametrize("precondition", [True, False])
@every_reading
def test_a_young_network_is_harmless_at_the_end(process, reading, precondition, device, generator):
    """Outputs of .01 move E[x_0|x_1] by .01 at most where nothing is divided by alpha, and by a bounded amount else."""
    x = torch.randn(50, 3, dtype=torch.float64, device=device, generator=generator) * process.sigma(1.0).to(
        device
    )
    model = NetworkScore(Noise(), process, reading, precondition=precondition)
    end = model.denoise(x, 1.0)
    assert end.isfinite().all()
    if precondition:
        away = (end - normal_model(process, 3, device).denoise(x, 1.0)).abs().max()
        # eps at log-SNR -15 is e^7.5 of x_0, a score is in units of 1/sigma, a velocity in units of alpha'.
        largest = {"v": 1, "x0": 1, "velocity": 50, "eps": math.exp(7.5), "score": 1e4}[reading]
        assert away <= 0.01 * largest


@every_process
def test_network_sees_unit_variance_and_an_even_level(process, device, generator):
    n = 20_000
    x0, eps = torch.randn(2, n, 1, dtype=torch.float64, device=device, generator=generator)
    network = Constant()
    model = NetworkScore(network, process)
    for t in (0.003, 0.2, 0.7, 1.0):
        condition = torch.ones(n, 2)
        model.denoise(process.perturb(x0, t, eps), t, condition)
        x, level, given = network.given
        assert abs(float(x.var()) - 1) < 4 * (2 / n) ** 0.5
        expected = min(max(float(process.log_snr(t)) / 10, -1.5), 1.5)
        torch.testing.assert_close(level, torch.full((n,), expected, dtype=torch.float64, device=device))
        assert given is condition
    model.denoise(x0.float(), torch.full((n,), 0.3, dtype=torch.float64))
    assert network.given[1].dtype == torch.float32


def test_rows_are_read_at_their_own_times(points, times):
    """Equivariance: permuting rows with their times permutes the answer; one row at a time gives the same."""
    x, _ = points
    for process in (VP(), Linear()):
        model = NetworkScore(Noise(), process, "velocity")
        together = model.denoise(x, times)
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0)).to(x.device)
        torch.testing.assert_close(
            model.denoise(x[order], times[order]), together[order], rtol=1e-12, atol=1e-13
        )
        for i in (0, 7, 25):
            alone = model.denoise(x[i : i + 1], float(times[i]))
            torch.testing.assert_close(alone[0], together[i], rtol=1e-12, atol=1e-13)


# ------------------------------------------------------------------ the moving average


def test_average_is_the_published_recursion(generator):
    module = nn.Linear(3, 2, dtype=torch.float64, device="meta").to_empty(device="cpu")
    values = torch.randn(60, 2, 3, dtype=torch.float64, generator=generator)

    def put(value):
        with torch.no_grad():
            module.weight.copy_(value)
            module.bias.zero_()

    put(values[0])
    ema = EMA(module, decay=0.8)
    weights = torch.zeros(60, dtype=torch.float64)
    weights[0] = 1.0
    for n, value in enumerate(values[1:], start=1):
        put(value)
        ema.update(module)
        decay = min(0.8, (1 + n) / (10 + n))
        weights *= decay
        weights[n] += 1 - decay
    assert float(weights.sum()) == pytest.approx(1)
    expected = (weights[:, None, None] * values).sum(0)
    torch.testing.assert_close(ema.average["weight"], expected, rtol=1e-13, atol=1e-14)
    assert not ema.average["weight"].requires_grad
    # A constant is left where it is, at the rate prod(decay): 0.8 per update once the cap binds.
    before = ema.average["weight"].clone()
    for _ in range(10):
        ema.update(module)
    torch.testing.assert_close(
        ema.average["weight"] - values[-1], 0.8**10 * (before - values[-1]), rtol=1e-12, atol=1e-14
    )


def test_average_copies_counters():
    """An integer buffer has no average: it is carried along."""
    module = nn.BatchNorm1d(2)
    ema = EMA(module)
    module.num_batches_tracked += 7
    ema.update(module)
    assert ema.average["num_batches_tracked"] == 7


# ------------------------------------------------------------------ divergence


def wavy(x):
    """R^4 -> R^4, far from linear, rows on their own."""
    mixing = torch.tensor(
        [[1.0, -0.3, 0.2, 0.0], [0.5, 0.4, -1.0, 0.3], [0.0, 0.7, 0.6, -0.2], [-0.8, 0.1, 0.3, 0.9]],
        dtype=x.dtype,
        device=x.device,
    )
    return torch.tanh(x @ mixing.T) * x.square().sum(1, keepdim=True) + torch.sin(3 * x)


def test_exact_trace_is_that_of_the_jacobian(device, generator):
    x = torch.randn(20, 4, dtype=torch.float64, device=device, generator=generator)
    jacobian = torch.func.vmap(torch.func.jacrev(lambda row: wavy(row[None])[0]))(x)
    expected = jacobian.diagonal(dim1=1, dim2=2).sum(1)
    torch.testing.assert_close(divergence(wavy, x), expected, rtol=1e-12, atol=1e-12)


def test_divergence_of_linear_maps_and_of_the_gaussian_score(device, generator):
    x = torch.randn(5, 4, dtype=torch.float64, device=device, generator=generator)
    A = torch.randn(4, 4, dtype=torch.float64, device=device, generator=generator)
    trace = A.trace().expand(5)
    torch.testing.assert_close(divergence(lambda y: y @ A.T, x), trace)
    with torch.no_grad():
        torch.testing.assert_close(divergence(lambda y: y @ A.T, x), trace)
    covariance, t = A @ A.T, 0.3
    model = GaussianScore(torch.ones(4, dtype=torch.float64, device=device), covariance, VP())
    alpha, sigma = float(VP().alpha(t)), float(VP().sigma(t))
    precision = torch.linalg.inv(
        alpha**2 * covariance + sigma**2 * torch.eye(4, dtype=A.dtype, device=device)
    )
    torch.testing.assert_close(divergence(lambda y: model.score(y, t), x), -precision.trace().expand(5))


def test_divergence_of_what_does_not_move_is_zero(device):
    x = torch.ones(3, 2, dtype=torch.float64, device=device)
    parameter = nn.Parameter(torch.ones(2, dtype=torch.float64, device=device))
    for constant in (torch.zeros_like, lambda y: parameter.expand(3, 2)):
        for probes in (None, 2):
            found = divergence(constant, x, probes=probes, generator=torch.Generator(device=device))
            assert torch.equal(found, torch.zeros(3, dtype=torch.float64, device=device))


def test_rademacher_probes_are_exact_on_diagonal_maps(device, generator):
    x = torch.randn(30, 4, dtype=torch.float64, device=device, generator=generator)
    scale = torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64, device=device)
    found = divergence(lambda y: scale * y**3, x, probes=1, generator=generator)
    torch.testing.assert_close(found, (3 * scale * x**2).sum(1), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("law", "probes"), [("rademacher", 1), ("rademacher", 3), ("gaussian", 1)])
def test_hutchinson_is_unbiased_with_the_variance_of_theory(law, probes, device, generator):
    """For symmetric A: variance 2 (|A|_F^2 - sum a_ii^2) per Rademacher probe, 2 |A|_F^2 per Gaussian one."""
    A = torch.tensor(
        [[1.0, 0.8, -0.5], [0.8, -2.0, 0.3], [-0.5, 0.3, 1.5]], dtype=torch.float64, device=device
    )
    n = 20_000
    x = torch.zeros(n, 3, dtype=torch.float64, device=device)
    found = divergence(lambda y: y @ A.T, x, probes=probes, law=law, generator=generator)
    theory = 2 * (A.square().sum() - (A.diagonal().square().sum() if law == "rademacher" else 0)) / probes
    assert abs(float(found.mean() - A.trace())) < 4 * float(theory / n) ** 0.5
    squares = (found - A.trace()).square()
    assert abs(float(squares.mean() - theory)) < 4 * float(squares.std()) / n**0.5


def test_hutchinson_is_unbiased_on_a_curved_map(device, generator):
    n = 20_000
    x = torch.tensor([[0.4, -1.0, 0.7, 0.2]], dtype=torch.float64, device=device)
    found = divergence(wavy, x.expand(n, 4), probes=1, generator=generator)
    assert abs(float(found.mean() - divergence(wavy, x)[0])) < 4 * float(found.std()) / n**0.5


def test_wrong_probes_are_refused():
    x = torch.zeros(1, 2)
    with pytest.raises(ValueError, match="law"):
        divergence(torch.sin, x, probes=1, law="uniform")
    with pytest.raises(ValueError, match="at least 1 probe"):
        divergence(torch.sin, x, probes=0)
