"""The noise paths against their published SDEs, their own algebra, and simulation."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy import integrate

from finediff.diffusion.exact import GaussianScore
from finediff.diffusion.process import (
    OU,
    VE,
    VP,
    Cosine,
    DiscreteVP,
    Interpolant,
    Linear,
    SubVP,
    cosine_betas,
    linear_betas,
    quadratic_betas,
)

K = 40  # steps of the discrete paths; the times below avoid their kinks at k/K
VE_RATIO = math.log(100.0 / 0.01)


def vp_beta(t):
    return 0.1 + 19.9 * t


def vp_integral(t):
    return 0.1 * t + 19.9 * t**2 / 2


def discrete(betas):
    """Published reading of a discrete DDPM in continuous time: beta constant on each step."""
    rate = -K * np.log1p(-betas.numpy())

    def f_g2(t):
        beta = rate[np.minimum(np.floor(np.asarray(t) * K).astype(int), K - 1)]
        return -beta / 2, beta

    return f_g2


LINEAR_BETAS, QUADRATIC_BETAS, COSINE_BETAS = (
    linear_betas(K, 1e-3, 0.4),
    quadratic_betas(K, 1e-3, 0.4),
    cosine_betas(K),
)

# Each path beside the f and g^2 printed for it (Song et al. 2021 for VP, VE, sub-VP and OU; the others by hand).
PUBLISHED = {
    "VP": (VP(), lambda t: (-vp_beta(t) / 2, vp_beta(t))),
    "DiscreteVP linear": (VP.from_betas(LINEAR_BETAS), discrete(LINEAR_BETAS)),
    "DiscreteVP quadratic": (VP.from_betas(QUADRATIC_BETAS), discrete(QUADRATIC_BETAS)),
    "DiscreteVP cosine": (VP.from_betas(COSINE_BETAS), discrete(COSINE_BETAS)),
    "OU": (OU(), lambda t: (-5.0 + 0 * t, 10.0 + 0 * t)),
    "OU slow": (OU(theta=1.5, s=0.7), lambda t: (-1.5 + 0 * t, 0.49 + 0 * t)),
    "SubVP": (
        SubVP(),
        lambda t: (-vp_beta(t) / 2, vp_beta(t) * -np.expm1(-2 * vp_integral(t))),
    ),
    "VE": (VE(), lambda t: (0 * t, 0.01**2 * np.exp(2 * VE_RATIO * t) * 2 * VE_RATIO)),
    "Cosine": (
        Cosine(),
        lambda t: (-np.pi / 2 * np.tan(np.pi * t / 2), np.pi * np.tan(np.pi * t / 2)),
    ),
    "Linear": (Linear(), lambda t: (-1 / (1 - t), 2 * t / (1 - t))),
    "Interpolant": (Interpolant(), lambda t: (-1 / (1 - t), (1 + t) / (1 - t))),
}
PROCESSES = {name: process for name, (process, _) in PUBLISHED.items()}
SPACINGS = ("log_snr", "uniform", "quadratic", "karras")

every_process = pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES.keys())
every_formula = pytest.mark.parametrize(("process", "published"), PUBLISHED.values(), ids=PUBLISHED.keys())


def inner_times(device="cpu"):
    """Times off the ends and off the kinks of the discrete paths."""
    return (torch.arange(K, dtype=torch.float64, device=device) + 0.37) / K


def relative(found, expected):
    found, expected = torch.as_tensor(found).cpu(), torch.as_tensor(expected).cpu()
    return float(((found - expected).abs() / expected.abs().clamp(min=1e-300)).max())


def test_every_listed_process_has_its_formula_here():
    from oracle import PROCESSES as listed

    assert {type(process) for process in listed.values()} == {type(process) for process in PROCESSES.values()}


# ------------------------------------------------------------------ laws


@every_process
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_paths_run_from_data_to_noise(process, dtype, device):
    t = torch.linspace(0, 1, 2001, dtype=dtype, device=device)
    alpha, sigma = process.alpha(t), process.sigma(t)
    assert alpha[0] == 1
    assert sigma[0] == 0
    assert (alpha.diff() <= 0).all()
    assert (sigma.diff() > 0).all() or (process == Cosine() and (sigma.diff() >= 0).all())
    assert (alpha >= 0).all()
    assert (process.log_snr(t).diff() < 0).all()
    assert process.log_snr(t)[0] == math.inf


@every_process
def test_any_shape_and_floating_dtype(process, device):
    t = inner_times(device)

    def all_of(s):
        return [
            process.alpha(s),
            process.sigma(s),
            process.log_snr(s),
            *process.rates(s),
            *process.drift_diffusion(s),
        ]

    flat = all_of(t)
    for cube, value in zip(all_of(t.reshape(2, 5, 4)), flat):
        assert torch.equal(cube.reshape(-1), value)
    for scalar, number, value in zip(all_of(t[3]), all_of(float(t[3])), flat):
        assert scalar.shape == number.shape == ()
        assert number.dtype == torch.float64
        torch.testing.assert_close(scalar, value[3], rtol=1e-14, atol=0)
        torch.testing.assert_close(number, value[3].cpu(), rtol=1e-14, atol=0)
    for single, value in zip(all_of(t.float()), flat):
        assert single.dtype == torch.float32
        torch.testing.assert_close(
            single.double(), value, rtol=2e-5, atol=1e-6 * max(1.0, float(value.abs().max()))
        )


@every_process
def test_rates_carry_no_gradient_and_work_without_it(process):
    t = inner_times().requires_grad_(True)
    with_grad = process.rates(t)
    with torch.no_grad():
        without = process.rates(t)
    for a, b in zip(with_grad, without):
        assert not a.requires_grad
        assert torch.equal(a, b)


# ------------------------------------------------------------------ closed forms


@every_formula
def test_f_and_g2_are_the_published_ones(process, published, device):
    t = inner_times(device)
    f, g2 = process.drift_diffusion(t)
    f_expected, g2_expected = published(t.cpu().numpy())
    if np.all(f_expected == 0):
        assert (f == 0).all()
    else:
        assert relative(f, f_expected) < 1e-12
    assert relative(g2, g2_expected) < 1e-12


@every_formula
def test_f_and_g2_have_their_limits_at_time_zero(process, published):
    f, g2 = process.drift_diffusion(0.0)
    f_expected, g2_expected = published(np.float64(0.0))
    assert float(f) == pytest.approx(f_expected, rel=1e-12, abs=1e-12)
    assert float(g2) == pytest.approx(g2_expected, rel=1e-12, abs=1e-12)


@every_formula
def test_alpha_and_sigma_solve_the_published_sde(process, published):
    """alpha = exp(int f), sigma^2 = int g^2 (alpha(t)/alpha(s))^2 ds, by quadrature of the published f and g^2."""
    smooth = (
        np.arange(K) / K if isinstance(process, DiscreteVP) else np.zeros(1)
    )  # where each smooth piece starts

    def f(s):
        return published(s)[0]

    until = np.cumsum([0.0, *(integrate.quad(f, a, b)[0] for a, b in pairwise(smooth))])

    def log_alpha(t):
        piece = np.searchsorted(smooth, t, side="right") - 1
        return until[piece] + integrate.quad(f, smooth[piece], t)[0]

    for t in (0.137, 0.512, 0.913):

        def kept(s, t=t):
            return published(s)[1] * math.exp(2 * (log_alpha(t) - log_alpha(s)))

        pieces = pairwise([*smooth[smooth < t], t])
        variance = sum(integrate.quad(kept, a, b, epsabs=1e-13)[0] for a, b in pieces)
        assert float(process.alpha(t)) == pytest.approx(math.exp(log_alpha(t)), rel=1e-9)
        assert float(process.sigma(t)) == pytest.approx(math.sqrt(variance), rel=1e-9)


@every_formula
def test_rates_are_closed_forms_and_finite_differences(process, published, device):
    t = inner_times(device)
    d_alpha, d_sigma = process.rates(t)
    f, g2 = (torch.as_tensor(value, device=device) for value in published(t.cpu().numpy()))
    alpha, sigma = process.alpha(t), process.sigma(t)
    torch.testing.assert_close(d_alpha, f * alpha, rtol=1e-12, atol=0)
    # sigma' = (g^2 + 2 f sigma^2)/(2 sigma) subtracts two numbers where sigma hardly moves.
    size = (g2 + 2 * f.abs() * sigma**2) / (2 * sigma)
    assert ((d_sigma - (g2 + 2 * f * sigma**2) / (2 * sigma)).abs() / size).max() < 1e-12
    h = 1e-6
    for rate, function in ((d_alpha, process.alpha), (d_sigma, process.sigma)):
        difference = (function(t + h) - function(t - h)) / (2 * h)
        assert ((rate - difference).abs() / (1 + rate.abs())).max() < 1e-6


def test_noise_keeps_its_digits_near_time_zero():
    """sqrt(1 - alpha^2) at t = 1e-13 would have two digits left; the series of expm1 gives the right ones."""
    t = 1e-13
    for process, expected in (
        (VP(), math.sqrt(0.1 * t)),
        (SubVP(), 0.1 * t),
        (OU(), math.sqrt(10 * t)),
        (VE(), 0.01 * math.sqrt(2 * VE_RATIO * t)),
    ):
        assert float(process.sigma(t)) == pytest.approx(expected, rel=1e-11)


@pytest.mark.parametrize("betas", [LINEAR_BETAS, QUADRATIC_BETAS, COSINE_BETAS, linear_betas(1000)])
def test_discrete_path_is_the_product_of_one_minus_beta(betas, device):
    process = VP.from_betas(betas.tolist())
    product = np.concatenate([[1.0], np.cumprod(1 - betas.numpy())])
    k = torch.arange(len(betas) + 1, dtype=torch.float64, device=device) / len(betas)
    assert relative(process.alpha(k) ** 2, product) < 1e-13
    assert relative(process.sigma(k[1:]) ** 2, 1 - product[1:]) < 1e-11  # 1 - product is the worse of the two


def test_discrete_path_in_single_precision_keeps_its_rates():
    process = VP.from_betas(linear_betas(1000))
    t = (torch.arange(1000) + 0.5) / 1000
    f, g2 = process.drift_diffusion(t)
    beta = -1000 * torch.log1p(-linear_betas(1000))
    assert relative(g2.double(), beta) < 2e-5
    assert relative(f.double(), -beta / 2) < 2e-5


def test_betas_are_the_published_ones():
    linear, quadratic = linear_betas(1000), quadratic_betas(1000)
    for betas in (linear, quadratic):
        assert float(betas[0]) == pytest.approx(1e-4)
        assert float(betas[-1]) == pytest.approx(0.02)
    assert linear.diff().std() < 1e-15
    assert quadratic.sqrt().diff().std() < 1e-15
    # Nichol & Dhariwal 2021, eq. 17: alpha-bar_k = f(k)/f(0), f(k) = cos^2((k/K + s)/(1 + s) pi/2), up to the clip.
    betas, steps = cosine_betas(500), 500
    f = np.cos((np.arange(steps + 1) / steps + 0.008) / 1.008 * np.pi / 2) ** 2
    found = VP.from_betas(betas).alpha(torch.arange(steps, dtype=torch.float64) / steps) ** 2
    assert relative(found, f[:steps] / f[0]) < 1e-11
    assert float(betas.max()) == 0.999


def test_linear_ddpm_tends_to_vp_at_order_one():
    t = torch.linspace(0, 1, 33, dtype=torch.float64)
    errors = []
    for steps in (512, 1024, 2048, 4096):
        process = VP.from_betas(linear_betas(steps, 0.1 / steps, 20 / steps))
        errors.append(float((torch.log(process.alpha(t)) - torch.log(VP().alpha(t))).abs().max()))
    orders = np.log2(np.array(errors[:-1]) / errors[1:])
    assert np.abs(orders - 1).max() < 0.05
    assert errors[-1] < 0.02


def test_cosine_is_exactly_data_and_exactly_noise():
    for dtype in (torch.float32, torch.float64):
        one = torch.ones((), dtype=dtype)
        assert Cosine().alpha(one) == 0
        assert Cosine().log_snr(one) == -math.inf
    t = inner_times()
    assert relative(Cosine().alpha(t), torch.cos(math.pi / 2 * t)) < 1e-14


# ------------------------------------------------------------------ log-SNR and grids


@every_process
def test_log_snr_and_time_are_inverse(process, device):
    t = torch.linspace(0.004, 0.996, 249, dtype=torch.float64, device=device).reshape(3, 83)
    torch.testing.assert_close(process.time(process.log_snr(t)), t, rtol=1e-12, atol=1e-12)
    noisy, clean = process.log_snr_range()
    level = torch.linspace(noisy, clean, 101, dtype=torch.float64, device=device)
    torch.testing.assert_close(process.log_snr(process.time(level)), level, rtol=0, atol=1e-11)
    # Far into the data a path is a power of t, and relative digits count.
    assert process.log_snr(process.time(20.0)) == pytest.approx(20.0, abs=1e-11)
    assert process.time(-1e9) == 1
    assert process.time(-math.inf) == 1
    assert 0 <= process.time(math.inf) < 1e-20


@every_process
def test_range_of_the_default_grid(process):
    noisy, clean = process.log_snr_range()
    assert clean == 10
    assert noisy == max(-10, float(process.log_snr(1.0)))


@every_process
@pytest.mark.parametrize("spacing", SPACINGS)
def test_grids(process, spacing):
    t_min = float(process.time(10.0))
    grids = {steps: process.grid(steps, spacing) for steps in (1, 7, 14, 64)}
    for steps, grid in grids.items():
        assert grid.shape == (steps + 1,)
        assert grid.dtype == torch.float64
        assert grid[0] == 1
        assert float(grid[-1]) == pytest.approx(t_min, rel=1e-10)
        assert (grid.diff() < 0).all()
    torch.testing.assert_close(grids[14][::2], grids[7], rtol=1e-10, atol=0)
    even = {
        "log_snr": process.log_snr,
        "karras": lambda t: torch.exp(-process.log_snr(t) / 14),
        "uniform": lambda t: t,
        "quadratic": torch.sqrt,
    }[spacing]
    coordinate = even(grids[64])
    if spacing in ("log_snr", "karras") and process.alpha(1.0) < math.exp(-5) * process.sigma(1.0):
        # The range of the levels ends before t = 1 does; the first node stands for its noisy end.
        coordinate[0] = even(process.time(-10.0))
    steps = coordinate.diff()
    assert ((steps - steps.mean()).abs() < 1e-9 * steps.abs().mean() + 1e-13).all()


def test_karras_grid_is_the_published_one():
    """Karras et al. 2022, eq. 5 with rho = 7, on sigma/alpha."""
    process, steps = VP(), 18
    grid = process.grid(steps, "karras")
    ratio = (process.sigma(grid) / process.alpha(grid)).numpy()
    largest, smallest = math.exp(5.0), math.exp(-5.0)
    i = np.arange(steps + 1)
    expected = (largest ** (1 / 7) + i / steps * (smallest ** (1 / 7) - largest ** (1 / 7))) ** 7
    np.testing.assert_allclose(ratio[1:], expected[1:], rtol=1e-10)


# ------------------------------------------------------------------ what perturb draws


@every_process
def test_perturb_is_affine_row_by_row(process, device, generator):
    x0, noise = torch.randn(2, 40, 3, dtype=torch.float64, device=device, generator=generator)
    t = inner_times(device)
    x = process.perturb(x0, t, noise)
    for i in (0, 17, 39):
        expected = process.alpha(float(t[i])).item() * x0[i] + process.sigma(float(t[i])).item() * noise[i]
        torch.testing.assert_close(x[i], expected, rtol=1e-13, atol=1e-13)
    cube = process.perturb(x0.reshape(40, 3, 1), t, noise.reshape(40, 3, 1))
    assert torch.equal(cube.reshape(40, 3), x)
    assert torch.equal(process.perturb(x0, t[5], noise)[5], x[5])
    assert process.perturb(x0.float(), t, noise.float()).dtype == torch.float32


@every_process
def test_perturb_has_the_mean_and_variance_of_the_path(process, device, generator):
    n, t = 20_000, 0.31
    x0 = torch.tensor([-1.0, 0.0, 2.5], dtype=torch.float64, device=device).expand(n, 3)
    x = process.perturb(x0, t, torch.randn(n, 3, dtype=torch.float64, device=device, generator=generator))
    alpha, sigma = float(process.alpha(t)), float(process.sigma(t))
    z_mean = (x.mean(0) - alpha * x0[0]) / (sigma / n**0.5)
    z_variance = (x.var(0) - sigma**2) / (sigma**2 * (2 / n) ** 0.5)
    assert z_mean.abs().max() < 4
    assert z_variance.abs().max() < 4


@every_process
def test_moments_of_euler_maruyama_converge_to_the_path_at_order_one(process):
    """x_{k+1} = (1 + f h) x_k + g sqrt(h) z: its mean and variance are recursions, no simulation needed."""
    errors = []
    for steps in (240, 480, 960):  # multiples of the 24 steps of the discrete paths up to t = .6
        h = 0.6 / steps
        f, g2 = process.drift_diffusion((torch.arange(steps, dtype=torch.float64) + 1e-9) * h)
        mean, variance = 1.0, 0.0
        for factor, added in zip((1 + f * h).tolist(), (g2 * h).tolist()):
            mean, variance = factor * mean, factor**2 * variance + added
        end_alpha, end_variance = float(process.alpha(0.6)), float(process.sigma(0.6)) ** 2
        errors.append((abs(mean - end_alpha), abs(variance / end_variance - 1)))
    errors = np.array(errors)
    for column in errors.T:
        if column.max() < 1e-12:
            continue  # VE has no drift: its mean is exact
        assert np.abs(np.log2(column[:-1] / column[1:]) - 1).max() < 0.15
    assert errors[-1].max() < 0.02


def test_euler_maruyama_paths_reproduce_alpha_and_sigma(device, generator):
    process, n, steps = VP(), 8000, 800
    h = 0.5 / steps
    x = torch.full((n,), 2.0, dtype=torch.float64, device=device)
    for k in range(steps):
        f, g2 = (float(value) for value in process.drift_diffusion((k + 0.5) * h))
        x = (
            x
            + f * x * h
            + (g2 * h) ** 0.5 * torch.randn(n, dtype=x.dtype, device=device, generator=generator)
        )
    alpha, sigma = float(process.alpha(0.5)), float(process.sigma(0.5))
    assert abs(float(x.mean()) - 2 * alpha) < 4 * sigma / n**0.5
    assert abs(float(x.var()) - sigma**2) < 4 * sigma**2 * (2 / n) ** 0.5


# ------------------------------------------------------------------ the stochastic interpolant


@pytest.mark.parametrize("t", [0.2, 0.5, 0.8])
def test_interpolant_target_needs_the_derivative_of_its_noise(t, device, generator):
    """Regression of z - x_0, with and without d/dt sqrt(t (1 - t)) xi, on x_t against the exact velocity.

    For Gaussian x_0 both conditional means are linear in x_t, so ordinary least squares finds them. Left out, the
    term shifts the slope by (1/2 - t)/Var(x_t).
    """
    n, mean, variance = 200_000, 0.4, 2.0
    process = Interpolant()
    model = GaussianScore(
        torch.tensor([mean], dtype=torch.float64), torch.tensor([[variance]], dtype=torch.float64), process
    )
    x0, z, xi = torch.randn(3, n, dtype=torch.float64, device=device, generator=generator)
    x0 = mean + variance**0.5 * x0
    x = (1 - t) * x0 + t * z + (t * (1 - t)) ** 0.5 * xi
    variance_t = (1 - t) ** 2 * variance + t
    assert abs(float(x.var()) - variance_t) < 4 * variance_t * (2 / n) ** 0.5

    at = model.velocity(torch.tensor([[0.0], [1.0]], dtype=torch.float64), t)[:, 0]
    exact = np.array([float(at[0]), float(at[1] - at[0])])
    without = z - x0
    complete = without + (1 - 2 * t) / (2 * (t * (1 - t)) ** 0.5) * xi

    def z_scores(target, expected):
        design = np.stack([np.ones(n), x.cpu().numpy()], 1)
        target = target.cpu().numpy()
        inverse = np.linalg.inv(design.T @ design)
        coefficients = inverse @ design.T @ target
        residual = target - design @ coefficients
        errors = np.sqrt(np.diag(inverse) * residual.var())
        return (coefficients - expected) / errors

    assert np.abs(z_scores(complete, exact)).max() < 4
    bias = -(0.5 - t) / variance_t
    biased = exact + bias * np.array([-(1 - t) * mean, 1.0])
    assert np.abs(z_scores(without, biased)).max() < 4
    if t != 0.5:
        assert np.abs(z_scores(without, exact))[1] > 50


# ------------------------------------------------------------------ refusals


def test_wrong_grids_and_betas_are_refused():
    with pytest.raises(ValueError, match="at least 1 step"):
        VP().grid(0)
    with pytest.raises(ValueError, match="spacing"):
        VP().grid(4, "geometric")
    for betas in ([], [0.1, 1.0], [0.0, 0.1], [-0.1], [0.1, math.nan]):
        with pytest.raises(ValueError, match=r"betas in \(0, 1\)"):
            VP.from_betas(betas)
