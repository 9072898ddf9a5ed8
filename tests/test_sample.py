"""Samplers against the laws that they sample: exact moments on Gaussians, closed-form flows, published formulas."""

import itertools
import math
import sys
from dataclasses import dataclass, replace

import pytest
import torch
from oracle import EIGENVALUES, MEAN, PROCESSES, SAMPLERS, Counted, each, gaussian, moments
from scipy import stats

from finediff.diffusion.exact import GaussianScore, MixtureScore, ScaleMixtureScore
from finediff.diffusion.process import VE, VP, Cosine, Linear, Process, linear_betas
from finediff.diffusion.sample import (
    DDIM,
    DDPM,
    AnnealedLangevin,
    DPMSolver,
    EulerMaruyama,
    Langevin,
    PredictorCorrector,
    ProbabilityFlow,
)

L = torch.tensor(EIGENVALUES, dtype=torch.float64)
M = torch.tensor(MEAN, dtype=torch.float64)
DETERMINISTIC = {name: case for name, case in SAMPLERS.items() if not case.sampler.needs_score}
STOCHASTIC = {name: case for name, case in SAMPLERS.items() if case.sampler.needs_score}

every_process = pytest.mark.parametrize("process", each(PROCESSES))
every_sampler = pytest.mark.parametrize("case", each(SAMPLERS))


def level(process, t):
    """alpha, sigma and the variances of x_t for the Gaussian oracle."""
    alpha, sigma = process.alpha(t), process.sigma(t)
    return alpha, sigma, alpha**2 * L + sigma**2


def ends(sampler, process):
    grid = sampler.grid(process)
    return level(process, grid[0]), level(process, grid[-1])


def flow(sampler, process, start):
    """E[x_0 | x_tmin] at the end of the exact probability flow, which keeps (x_t - alpha_t m)/sd_t for a Gaussian."""
    (alpha_t, _, v_t), (alpha_s, _, v_s) = ends(sampler, process)
    return M + alpha_s * L / v_s * (v_s / v_t).sqrt() * (start - alpha_t * M)


def reversed_variance(sampler, process):
    """Variance of E[x_0 | x_tmin] where q(x_s | x_t) is sampled exactly, from the variance sigma_t^2 at the start."""
    (alpha_t, sigma_t, v_t), (alpha_s, _, v_s) = ends(sampler, process)
    pull = alpha_t * v_s / (alpha_s * v_t)
    return (alpha_s * L / v_s) ** 2 * (v_s + pull**2 * (sigma_t**2 - v_t))


def share_of_sd(sampler, process):
    """Worst error of a standard deviation and of a mean, in standard deviations."""
    mean, variance = moments(sampler, gaussian(process))
    return float(((variance / L).sqrt() - 1).abs().max()), float(((mean - M) / L.sqrt()).abs().max())


# ------------------------------------------------------------------ the law of the draws


@every_process
@every_sampler
def test_every_sampler_draws_the_law_of_every_process(case, process):
    """Means allow for what a path keeps of the data at t = 1: the start N(0, sigma^2 I) forgets alpha m."""
    sd, mean = share_of_sd(case.sampler, process)
    kept = (flow(case.sampler, process, torch.zeros_like(M)) - M) / L.sqrt()
    assert sd < case.tolerance
    assert mean < case.tolerance + float(kept.abs().max())


@every_process
def test_ddim_in_256_steps(process):
    assert share_of_sd(DDIM(256), process)[0] < 0.02


@pytest.mark.parametrize("sampler", [DDPM(16), DPMSolver(16, stochastic=True), DDPM(16, variance="beta")])
def test_exact_moments_agree_with_simulation(sampler, generator):
    """The recursion itself, against draws; at 16 steps the law is far from the model's, so that it is tested."""
    n, model = 100_000, gaussian(Linear())
    mean, variance = moments(sampler, model)
    draws = sampler(model.to(generator.device), (n, len(L)), generator=generator).cpu()
    assert ((draws.mean(0) - mean).abs() < 4 * (variance / n).sqrt()).all()
    assert ((draws.var(0) / variance - 1).abs() < 4 * math.sqrt(2 / n)).all()
    assert ((variance / L - 1).abs() > 0.05).any()


@pytest.mark.parametrize("process", [VE(), Linear()])
def test_langevin_reaches_its_own_stationary_variance(process):
    """x <- (1 - a/V) x + sqrt(2a) z keeps 2a / (1 - (1 - a/V)^2) = V / (1 - a/2V)."""
    a, sampler = 0.05, Langevin(1000, step_size=0.05, log_snr=5.0)
    mean, variance = moments(sampler, gaussian(process))
    alpha, _, v = level(process, sampler.grid(process)[0])
    torch.testing.assert_close(variance, (alpha * L / v) ** 2 * v / (1 - a / (2 * v)), rtol=1e-9, atol=0)
    torch.testing.assert_close(mean, M, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "sampler", [AnnealedLangevin(), AnnealedLangevin(100, inner_steps=10, step_size=0.5)]
)
def test_annealed_langevin_lags_behind_its_levels_as_computed(sampler):
    """In u = (sigma/alpha)^2 its excess variance obeys d(excess)/du = 2G excess/(l + u) - 1 - G c u/(l + u)."""
    ratio = 20 / sampler.steps
    g = sampler.inner_steps * sampler.step_size / ratio
    excess = moments(sampler, gaussian(Linear()))[1] / L - 1
    expected = (1 + sampler.step_size / 2) / (2 * g - 1)
    torch.testing.assert_close(excess, torch.full_like(L, expected), rtol=0.1, atol=1e-3)


def test_predictor_corrector_keeps_a_bias_that_snr_governs():
    """2.9 % at Song's .16 whatever the steps, a tenth of it at .05: it goes with snr^2."""
    small, *large = (
        share_of_sd(PredictorCorrector(steps, snr=snr), VP())[0]
        for steps, snr in ((1000, 0.05), (500, 0.16), (1000, 0.16))
    )
    assert large == pytest.approx([0.029, 0.029], abs=0.003)
    assert large[1] / small == pytest.approx((0.16 / 0.05) ** 2, rel=0.1)


DIRECTIONS = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, -0.8]], dtype=torch.float64)
MIXTURE = (
    torch.tensor([0.3, 0.7], dtype=torch.float64),
    torch.tensor([[-1.2, 0.4], [0.6, -0.3]], dtype=torch.float64),
    torch.tensor([[[0.1, 0.05], [0.05, 0.2]], [[0.4, -0.2], [-0.2, 0.3]]], dtype=torch.float64),
)


@pytest.mark.parametrize("process", [VP(), Linear(), VE()], ids=repr)
@pytest.mark.parametrize(
    "sampler",
    [
        ProbabilityFlow(64),
        DPMSolver(64),
        DPMSolver(128, stochastic=True),
        DDPM(500),
        EulerMaruyama(500),
        PredictorCorrector(250),
    ],
    ids=lambda sampler: type(sampler).__name__,
)
def test_two_regimes(sampler, process, generator):
    """Every projection of a mixture is a mixture of two normals: Kolmogorov-Smirnov on three of them."""
    weights, means, covariances = MIXTURE
    model = MixtureScore(*MIXTURE, process).to(generator.device)
    draws = sampler(model, (2500, 2), generator=generator).cpu()
    for u in DIRECTIONS:
        scale = (u @ covariances @ u).sqrt()

        def cdf(x, u=u, scale=scale):
            return (weights * torch.special.ndtr((torch.as_tensor(x)[:, None] - means @ u) / scale)).sum(1)

        assert stats.kstest((draws @ u).numpy(), lambda x: cdf(x).numpy()).pvalue > 1e-3


# ------------------------------------------------------------------ orders of convergence


def observed_order(errors, steps):
    return math.log(errors[0] / errors[1]) / math.log(steps[1] / steps[0])


@every_process
@pytest.mark.parametrize("case", each(DETERMINISTIC))
def test_order_of_the_flow(case, process):
    """Towards the exact flow from t = 1 to t_min, on the default grid: at least the order in theory."""
    steps = (32, 64) if case.order == 4 else (32, 128)
    start = torch.tensor([[1.0] * 4, [-2.0, 0.5, 1.5, -0.5]], dtype=torch.float64) * process.sigma(1.0)
    exact = flow(case.sampler, process, start)
    errors = []
    for n in steps:
        draws = replace(case.sampler, steps=n)(gaussian(process), start.shape, start=start)
        errors.append(float((draws - exact).abs().max()))
    assert observed_order(errors, steps) > case.order - 0.15


@every_process
@pytest.mark.parametrize("case", each({k: c for k, c in STOCHASTIC.items() if c.order}))
def test_order_of_the_variance(case, process):
    steps = (64, 256)
    errors = []
    for n in steps:
        sampler = replace(case.sampler, steps=n)
        variance = moments(sampler, gaussian(process))[1]
        errors.append(float((variance / reversed_variance(sampler, process) - 1).abs().max()))
    assert observed_order(errors, steps) > case.order - 0.15


@pytest.mark.parametrize("method", ["euler", "heun", "rk4"])
def test_the_flow_is_the_same_on_every_path_of_equal_log_snr(method):
    """In the angle nothing but log-SNR enters: VP, OU, sub-VP and a discrete DDPM give one answer, kinks or not."""
    sampler = ProbabilityFlow(20, method=method)
    start = torch.ones(1, 4, dtype=torch.float64)
    draws = [
        sampler(gaussian(process), (1, 4), start=start * process.sigma(1.0))
        for process in (Cosine(), VP(beta_max=60.0), VP.from_betas(linear_betas(last=0.06)))
    ]
    for other in draws[1:]:
        torch.testing.assert_close(other, draws[0], rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------ published formulas


def test_ddpm_is_ho_jain_and_abbeel():
    """Their equations 6 and 7, on their betas: the posterior q(x_{k-1} | x_k, x_0) and its variance."""
    betas = linear_betas()
    abar = torch.cumprod(1 - betas, 0)
    process, x = VP.from_betas(betas), torch.linspace(-2, 2, 8, dtype=torch.float64).reshape(2, 4)
    model = gaussian(process)
    for k in (2, 500, 1000):
        t, s = (torch.tensor(j / 1000, dtype=torch.float64) for j in (k, k - 1))
        beta, now, before = betas[k - 1], abar[k - 1], abar[k - 2]
        x0 = model.denoise(x, t)
        mean = (before.sqrt() * beta * x0 + (1 - beta).sqrt() * (1 - before) * x) / (1 - now)
        for variance, expected in (("posterior", (1 - before) / (1 - now) * beta), ("beta", beta)):
            generator, twin = (torch.Generator().manual_seed(3) for _ in range(2))
            drawn, _ = DDPM(variance=variance).step(model, x, t, s, None, condition=None, generator=generator)
            z = torch.randn(x.shape, dtype=x.dtype, generator=twin)
            torch.testing.assert_close(drawn, mean + expected.sqrt() * z, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim_is_song_meng_and_ermon(eta):
    """Their equations 12 and 16: the noise is eta sqrt((1 - abar_s)/(1 - abar_t)) sqrt(1 - abar_t/abar_s)."""
    process, x = VP(), torch.linspace(-2, 2, 8, dtype=torch.float64).reshape(2, 4)
    model, (t, s) = gaussian(process), torch.tensor([0.6, 0.45], dtype=torch.float64)
    now, before, x0 = process.alpha(t) ** 2, process.alpha(s) ** 2, model.denoise(x, t)
    added = eta * ((1 - before) / (1 - now) * (1 - now / before)).sqrt()
    eps = (x - now.sqrt() * x0) / (1 - now).sqrt()
    generator, twin = (torch.Generator().manual_seed(3) for _ in range(2))
    drawn, _ = DDIM(eta=eta).step(model, x, t, s, None, condition=None, generator=generator)
    z = torch.randn(x.shape, dtype=x.dtype, generator=twin)
    expected = before.sqrt() * x0 + (1 - before - added**2).sqrt() * eps + added * z
    torch.testing.assert_close(drawn, expected, rtol=1e-9, atol=1e-9)


def test_dpm_solver_is_algorithm_2_of_lu_et_al():
    """x_s = sigma_s/sigma_t x - alpha_s (e^-h - 1) D,  D = (1 + 1/2r) x0 - 1/(2r) x0',  r = h'/h."""
    process, sampler = VP(), DPMSolver(12, spacing="karras")
    model, grid = gaussian(process), sampler.grid(process)
    half_log_snr = process.log_snr(grid) / 2
    x = start = torch.tensor([[0.3, -1.0, 2.0, 0.7]], dtype=torch.float64)
    last = None
    for i, (t, s) in enumerate(itertools.pairwise(grid)):
        h, x0 = half_log_snr[i + 1] - half_log_snr[i], model.denoise(x, t)
        d = x0
        if i:
            r = (half_log_snr[i] - half_log_snr[i - 1]) / h
            d = (1 + 1 / (2 * r)) * x0 - last / (2 * r)
        x = process.sigma(s) / process.sigma(t) * x - process.alpha(s) * torch.expm1(-h) * d
        last = x0
    draws = sampler(model, (1, 4), start=start)
    torch.testing.assert_close(draws, model.denoise(x, grid[-1]), rtol=1e-9, atol=1e-9)


@every_process
def test_ddim_with_all_its_noise_is_ddpm(process):
    draws = [
        sampler(gaussian(process), (5, 4), generator=torch.Generator().manual_seed(1))
        for sampler in (DDIM(30, eta=1.0), DDPM(30))
    ]
    assert torch.equal(*draws)


@every_process
@pytest.mark.parametrize("stochastic", [False, True])
def test_the_first_step_of_dpm_solver_is_ddim(process, stochastic):
    """And the second too where the first came from alpha = 0, whose log-SNR is infinite."""
    model, solver = gaussian(process), DPMSolver(8, stochastic=stochastic)
    ddim, grid = DDIM(8, eta=float(stochastic)), solver.grid(process)
    x, memory = torch.ones(3, 4, dtype=torch.float64), None
    first_order = 2 if process.alpha(1.0) == 0 else 1
    for step, (t, s) in enumerate(itertools.pairwise(grid[:4])):
        generator, twin = (torch.Generator().manual_seed(step) for _ in range(2))
        expected, _ = ddim.step(model, x, t, s, None, condition=None, generator=twin)
        x, memory = solver.step(model, x, t, s, memory, condition=None, generator=generator)
        assert torch.equal(x, expected) == (step < first_order)


# ------------------------------------------------------------------ tails and units: nothing bounds |x|


@dataclass(frozen=True)
class Rescaled(Process):
    """The path of c x_0 where the base is that of x_0: the same times, c times the noise."""

    base: Process
    c: float

    def alpha(self, t):
        return self.base.alpha(t)

    def sigma(self, t):
        return self.c * self.base.sigma(t)

    def log_snr_range(self):
        return tuple(end - 2 * math.log(self.c) for end in self.base.log_snr_range())


@pytest.mark.parametrize("base", [VE(), Linear()], ids=repr)
@every_sampler
def test_draws_follow_the_unit_of_the_data(case, base):
    """c x_0 under c times the noise gives c times the draws; the ODE's angle knows the unit, so it only converges."""
    ode = isinstance(case.sampler, ProbabilityFlow)
    c, steps, rtol = (2.0, 64, 5e-2) if ode else (1e3, 20, 1e-6)
    sampler = replace(case.sampler, steps=steps)
    draws = [
        sampler(model, (6, 4), generator=torch.Generator().manual_seed(5))
        for model in (
            gaussian(base),
            GaussianScore(c * M, torch.diag(c**2 * L), Rescaled(base, c)),
        )
    ]
    torch.testing.assert_close(draws[1], c * draws[0], rtol=rtol, atol=rtol * c)


@pytest.mark.parametrize(
    "sampler", [ProbabilityFlow(64), DPMSolver(96), DPMSolver(96, stochastic=True), DDPM(300)]
)
def test_heavy_tails_survive(sampler, generator):
    """One day in fifty has ten times the volatility: as many draws beyond 8 and 20 calm deviations as there should be."""
    n, scales, weights = 20_000, (0.5, 50.0), (0.98, 0.02)
    model = ScaleMixtureScore(
        torch.tensor(scales, dtype=torch.float64), weights, [0.0], torch.eye(1, dtype=torch.float64), VP()
    )
    draws = sampler(model.to(generator.device), (n, 1), generator=generator).cpu().abs()
    for bound in (8 * math.sqrt(0.5), 20 * math.sqrt(0.5)):
        p = sum(w * 2 * stats.norm.sf(bound / math.sqrt(v)) for v, w in zip(scales, weights))
        assert abs(float((draws > bound).double().mean()) - p) < 4 * math.sqrt(p / n)


# ------------------------------------------------------------------ what is promised to the caller


@every_sampler
def test_a_seed_fixes_the_draws(case, device, dtype):
    sampler, model = replace(case.sampler, steps=6), gaussian(VP(), dtype=dtype).to(device)
    a, b, c = (
        sampler(model, (5, 4), generator=torch.Generator(device).manual_seed(seed)) for seed in (1, 1, 2)
    )
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    assert (a.dtype, a.device.type) == (dtype, device.type)


@pytest.mark.parametrize("case", each(DETERMINISTIC))
def test_single_precision_is_enough(case, device):
    sampler = replace(case.sampler, steps=32)
    start = torch.linspace(-2, 2, 20, dtype=torch.float64).reshape(5, 4)
    for process in (VP(), Linear()):
        single, double = (
            sampler(gaussian(process, dtype=dtype).to(device), (5, 4), start=start.to(device, dtype)).cpu()
            for dtype in (torch.float32, torch.float64)
        )
        torch.testing.assert_close(single.double(), double, rtol=2e-3, atol=2e-3)


@every_sampler
def test_evaluations_are_counted(case):
    for steps in (1, 7):
        sampler, model = replace(case.sampler, steps=steps), Counted(gaussian(Cosine()))
        sampler(model, (3, 4), generator=torch.Generator().manual_seed(0))
        assert model.evaluations == sampler.evaluations


def test_evaluations_of_correctors_and_plain_langevin():
    for sampler, expected in (
        (PredictorCorrector(5, corrector_steps=3), 21),
        (AnnealedLangevin(5, inner_steps=2), 11),
        (Langevin(5), 6),
    ):
        model = Counted(gaussian(VP()))
        sampler(model, (3, 4), generator=torch.Generator().manual_seed(0))
        assert (model.evaluations, sampler.evaluations) == (expected, expected)


@every_sampler
def test_a_model_without_a_score_is_refused_where_the_score_is_used(case, generator):
    model = gaussian(VP())
    model.score_valid = False
    sampler = replace(case.sampler, steps=3)
    if sampler.needs_score:
        with pytest.raises(ValueError, match="expected a model whose score is valid"):
            sampler(model, (2, 4))
    else:
        sampler(model, (2, 4), start=torch.ones(2, 4, dtype=torch.float64))


def test_exactly_the_stochastic_samplers_need_the_score():
    assert set(DETERMINISTIC) == {"DDIM", "Euler", "Heun", "RK4", "DPMSolver"}
    assert Langevin().needs_score


@pytest.mark.parametrize("case", each(DETERMINISTIC))
def test_axes_have_no_role(case):
    """Rotated data and a rotated start give rotated draws."""
    q, _ = torch.linalg.qr(torch.tensor([[(i + 1.0) ** j for i in range(4)] for j in range(4)]).double())
    start, sampler = (
        torch.linspace(-1, 2, 12, dtype=torch.float64).reshape(3, 4),
        replace(case.sampler, steps=9),
    )
    plain = sampler(gaussian(Cosine()), (3, 4), start=start)
    rotated = sampler(GaussianScore(q @ M, q @ torch.diag(L) @ q.T, Cosine()), (3, 4), start=start @ q.T)
    torch.testing.assert_close(rotated, plain @ q.T, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "build",
    [
        lambda: DDIM(0),
        lambda: DPMSolver(-3),
        lambda: DDIM(eta=1.5),
        lambda: DDIM(eta=-0.1),
        lambda: DDIM(eta=math.nan),
        lambda: DDPM(variance="learned"),
        lambda: ProbabilityFlow(method="midpoint"),
        lambda: ProbabilityFlow(rtol=0.0),
        lambda: ProbabilityFlow(atol=-1.0),
        lambda: PredictorCorrector(snr=0.0),
        lambda: PredictorCorrector(corrector_steps=0),
        lambda: PredictorCorrector(predictor="heun"),
        lambda: AnnealedLangevin(inner_steps=0),
        lambda: AnnealedLangevin(step_size=2.0),
        lambda: Langevin(step_size=0.0),
        lambda: Langevin(log_snr=math.inf),
        lambda: DDIM(spacing="even")(gaussian(VP()), (2, 4)),
        lambda: DDIM()(gaussian(VP()), (2, 4), start=torch.zeros(3, 4)),
    ],
)
def test_wrong_parameters_are_refused(build):
    with pytest.raises(ValueError, match="expected"):
        build()


# ------------------------------------------------------------------ the adaptive method, an optional extra


@every_process
def test_adaptive_steps_meet_their_tolerance(process):
    pytest.importorskip("torchdiffeq")
    start = torch.tensor([[1.0] * 4, [-2.0, 0.5, 1.5, -0.5]], dtype=torch.float64) * process.sigma(1.0)
    costs = []
    for tolerance in (1e-4, 1e-8):
        sampler, model = (
            ProbabilityFlow(method="adaptive", rtol=tolerance, atol=tolerance),
            Counted(gaussian(process)),
        )
        draws = sampler(model, start.shape, start=start)
        torch.testing.assert_close(draws, flow(sampler, process, start), rtol=0, atol=30 * tolerance)
        costs.append(model.evaluations)
    assert sampler.evaluations is None
    assert 20 < costs[0] < costs[1] < 1000


def test_adaptive_steps_in_single_precision(device):
    pytest.importorskip("torchdiffeq")
    start, sampler = torch.ones(1, 4, device=device), ProbabilityFlow(method="adaptive", rtol=1e-4, atol=1e-4)
    draws = sampler(gaussian(Linear(), dtype=torch.float32).to(device), (1, 4), start=start)
    assert draws.dtype == torch.float32
    exact = flow(sampler, Linear(), torch.ones(1, 4, dtype=torch.float64))
    torch.testing.assert_close(draws.cpu().double(), exact, rtol=0, atol=5e-3)


def test_a_missing_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchdiffeq", None)
    with pytest.raises(ImportError, match=r"finediff\[ode\]"):
        ProbabilityFlow(method="adaptive")(
            gaussian(VP()), (1, 4), start=torch.ones(1, 4, dtype=torch.float64)
        )
