"""The models whose law is known: every formula against autograd, scipy, quadrature-free identities and exact draws."""

import math

import numpy as np
import pytest
import torch
from scipy import integrate, stats

from finediff.diffusion.exact import (
    EmpiricalScore,
    FactorLaw,
    FactorScore,
    GaussianScore,
    MixtureFactors,
    MixtureScore,
    ScaleMixtureScore,
)
from finediff.diffusion.process import OU, VE, VP, Cosine, Interpolant, Linear, SubVP, as_time, expand
from finediff.diffusion.score import divergence

D = 3
PROCESSES = [VP(), OU(), SubVP(), VE(), Cosine(), Linear(), Interpolant()]


def tensor(*shape, seed=0, law="normal"):
    rng = np.random.default_rng(seed)
    return torch.tensor(rng.normal(size=shape) if law == "normal" else rng.uniform(0.3, 1.5, shape))


def covariance(d=D, seed=0):
    root = tensor(d, d, seed=seed) + torch.eye(d)
    return root @ root.T / 2 + 0.2 * torch.eye(d)


MEAN = torch.tensor([0.5, -0.3, 0.1], dtype=torch.float64)
SCALES = torch.tensor([0.2, 1.0, 6.0], dtype=torch.float64)
SCALE_WEIGHTS = torch.tensor([0.5, 0.4, 0.1], dtype=torch.float64)
WEIGHTS = torch.tensor([0.2, 1.0, 6.0]).double(), torch.tensor([0.5, 0.4, 0.1]).double()
WEIGHTS = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
MEANS, COVARIANCES = 2 * tensor(3, D, seed=5), torch.stack([covariance(seed=s) for s in (1, 2, 3)])
LOADINGS, IDIOSYNCRATIC = tensor(D, 2, seed=6), tensor(D, seed=7, law="uniform")


def regimes():
    covariances = torch.stack([covariance(2, s) for s in (4, 5, 6)])
    return MixtureFactors(WEIGHTS, 2 * tensor(3, 2, seed=8), covariances)


def heavy():
    return MixtureFactors.scales(SCALES, SCALE_WEIGHTS, [0.3, -1.0], covariance(2, 9))


SMOOTH = {
    "gaussian": lambda p: GaussianScore(MEAN, covariance(), p),
    "mixture": lambda p: MixtureScore(WEIGHTS, MEANS, COVARIANCES, p),
    "scales": lambda p: ScaleMixtureScore(SCALES, SCALE_WEIGHTS, MEAN, covariance(), p),
    "factor": lambda p: FactorScore(LOADINGS, IDIOSYNCRATIC, p, mean=MEAN),
    "factor regimes": lambda p: FactorScore(LOADINGS, IDIOSYNCRATIC, p, mean=MEAN, factors=regimes()),
    "factor scales": lambda p: FactorScore(LOADINGS, IDIOSYNCRATIC, p, factors=heavy()),
    "no factor": lambda p: FactorScore(torch.zeros(D, 0).double(), IDIOSYNCRATIC, p, mean=MEAN),
    "d factors": lambda p: FactorScore(tensor(D, D, seed=3), IDIOSYNCRATIC, p),
}
MODELS = SMOOTH | {"empirical": lambda p: EmpiricalScore(tensor(7, D, seed=4), p, chunk=3)}

every_model = pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)
every_smooth = pytest.mark.parametrize("build", SMOOTH.values(), ids=SMOOTH)
every_process = pytest.mark.parametrize("process", PROCESSES, ids=lambda p: type(p).__name__)


def relative(value, expected):
    """The largest error, absolute for values below 1 and relative to the largest above."""
    value, expected = value.detach(), expected.detach()
    return float((value - expected).abs().max() / (1 + expected.abs().max()))


def worst_z(values):
    """The largest |mean| / standard error over the columns of values (n, ...)."""
    values = values.reshape(len(values), -1)
    return float((values.mean(0) / (values.std(0) / math.sqrt(len(values)) + 1e-300)).abs().max())


# ------------------------------------------------------------------------------------------------- laws


@every_process
@every_model
def test_the_score_is_the_gradient_of_the_log_density(build, process, device):
    model, x = build(process).to(device), 2 * tensor(6, D, seed=11).to(device)
    for t in (0.05, 0.5, 0.98, 1.0, torch.linspace(0.1, 1.0, 6, dtype=torch.float64)):
        x = x.detach().requires_grad_(True)
        (gradient,) = torch.autograd.grad(model.log_prob(x, t).sum(), x)
        score = model.score(x, t)
        assert relative(score, gradient) < 1e-8
        alpha, sigma = (expand(f(as_time(t)), x) for f in (process.alpha, process.sigma))
        assert relative(sigma**2 * score, alpha * model.denoise(x, t) - x) < 1e-8
        assert relative(model.noise(x, t), -sigma * gradient) < 1e-8


@pytest.mark.parametrize("process", [VP(), OU(), SubVP(), VE(), Cosine()], ids=lambda p: type(p).__name__)
@every_model
def test_the_densities_solve_the_fokker_planck_equation(build, process):
    # d log p/dt = -f (d + <x, s>) + g^2/2 (div s + |s|^2): with p_0 right, p_t is right at every t.
    model, x = build(process), 1.5 * tensor(5, D, seed=12)
    for t in (0.2, 0.7):
        time = torch.tensor(t, dtype=torch.float64, requires_grad=True)
        rate = torch.stack(
            [torch.autograd.grad(v, time, retain_graph=True)[0] for v in model.log_prob(x, time)]
        )
        f, g2 = process.drift_diffusion(t)
        score = model.score(x, t)
        flow = divergence(lambda y, t=t: model.score(y, t), x) + (score**2).sum(1)
        assert relative(-f * (D + (x * score).sum(1)) + g2 / 2 * flow, rate) < 1e-8


@every_process
@every_model
def test_rows_with_times_of_their_own_equal_rows_one_by_one(build, process):
    model, x, t = build(process), tensor(4, D, seed=13), torch.tensor([0.1, 0.4, 0.8, 1.0]).double()
    for name in ("denoise", "score", "log_prob"):
        one_by_one = torch.cat([getattr(model, name)(x[i : i + 1], t[i]) for i in range(4)])
        assert relative(getattr(model, name)(x, t), one_by_one) < 1e-10


@every_process
@every_smooth
def test_the_ends_of_time(build, process):
    model, x = build(process), 2 * tensor(5, D, seed=14)
    assert relative(model.denoise(x, 0.0), x) < 1e-12
    y = x.clone().requires_grad_(True)
    assert relative(model.score(x, 0.0), torch.autograd.grad(model.log_prob(y).sum(), y)[0]) < 1e-10
    if float(process.alpha(1.0)) == 0:
        draws = model.sample(20_000, torch.Generator().manual_seed(0))
        assert worst_z(draws - model.denoise(x[:1], 1.0)) < 4.5  # with no data left, the mean
        normal = stats.norm.logpdf(x.numpy(), scale=float(process.sigma(1.0))).sum(1)
        np.testing.assert_allclose(model.log_prob(x, 1.0), normal, rtol=1e-12)


@pytest.mark.parametrize("process", [VP(), VE(), Linear()], ids=lambda p: type(p).__name__)
@every_model
def test_the_error_of_the_denoiser_is_orthogonal_to_functions_of_x_t(build, process, generator, device):
    model, n = build(process).to(device), 20_000
    x0 = model.sample(n, generator)
    for t in (0.1, 0.5) if not isinstance(process, VE) else (0.4, 0.55):
        noise = torch.randn(x0.shape, dtype=x0.dtype, device=device, generator=generator)
        x = process.perturb(x0, t, noise)
        error = x0 - model.denoise(x, t)
        tests = torch.cat([torch.ones_like(x[:, :1]), x, x.tanh(), (x**2).sum(1, keepdim=True).sqrt()], 1)
        assert worst_z(error[:, :, None] * tests[:, None, :]) < 4.5
        # Power: a gain 20 % off is seen at once.
        assert worst_z((x0 - 0.8 * model.denoise(x, t))[:, :, None] * x[:, None, :]) > 4.5


# ------------------------------------------------------------------------------------- against scipy


def noised_moments(process, t, mean, cov):
    alpha, sigma = float(process.alpha(t)), float(process.sigma(t))
    return alpha * np.asarray(mean), alpha**2 * np.asarray(cov) + sigma**2 * np.eye(len(mean))


@pytest.mark.parametrize("t", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("process", [VP(), VE(), Linear()], ids=lambda p: type(p).__name__)
def test_densities_equal_scipy_s(process, t):
    x = 2 * tensor(9, D, seed=15).numpy()

    def density(weights, means, covariances):
        each = [
            stats.multivariate_normal(*noised_moments(process, t, m, c)).pdf(x)
            for m, c in zip(means, covariances)
        ]
        return np.log(np.asarray(weights) @ np.array(each))

    B, E = LOADINGS.numpy(), np.diag(IDIOSYNCRATIC)
    expected = {
        "gaussian": density([1.0], [MEAN], [covariance()]),
        "mixture": density(WEIGHTS, MEANS, COVARIANCES),
        "scales": density(SCALE_WEIGHTS, [MEAN] * 3, [v * covariance() for v in SCALES]),
        "factor": density([1.0], [MEAN], [B @ B.T + E]),
        "factor regimes": density(
            WEIGHTS,
            MEAN.numpy() + regimes().means.numpy() @ B.T,
            [B @ c.numpy() @ B.T + E for c in regimes().covariances],
        ),
        "factor scales": density(
            SCALE_WEIGHTS,
            [B @ [0.3, -1.0]] * 3,
            [B @ (v * covariance(2, 9)).numpy() @ B.T + E for v in SCALES],
        ),
    }
    for name, value in expected.items():
        np.testing.assert_allclose(
            SMOOTH[name](process).log_prob(torch.tensor(x), t), value, rtol=1e-9, err_msg=name
        )


def test_a_fine_grid_of_scales_is_student_s_t():
    nu = 4.0
    log_v = np.linspace(-5, 14, 400)
    # 1/v ~ Gamma(nu/2, rate nu/2): its density in log v on an even grid.
    weights = stats.gamma(nu / 2, scale=2 / nu).pdf(np.exp(-log_v)) * np.exp(-log_v)
    model = ScaleMixtureScore(np.exp(log_v), weights / weights.sum(), MEAN, covariance(), VP())
    x = 3 * tensor(20, D, seed=16)
    law = stats.multivariate_t(MEAN.numpy(), covariance().numpy(), df=nu)
    np.testing.assert_allclose(model.log_prob(x), law.logpdf(x.numpy()), rtol=1e-6)


def test_the_denoiser_of_a_scale_mixture_by_numerical_integration():
    process, t, x = VP(), 0.3, 1.7
    model = ScaleMixtureScore(SCALES, SCALE_WEIGHTS, [0.4], [[0.8]], process)
    alpha, sigma = float(process.alpha(t)), float(process.sigma(t))

    def joint(x0):
        prior = sum(
            float(w) * stats.norm.pdf(x0, 0.4, math.sqrt(0.8 * float(v)))
            for v, w in zip(SCALES, SCALE_WEIGHTS)
        )
        return prior * stats.norm.pdf(x, alpha * x0, sigma)

    total = integrate.quad(joint, -20, 20, points=[0, 2], epsabs=1e-12, limit=200)[0]
    mean = (
        integrate.quad(lambda x0: x0 * joint(x0), -20, 20, points=[0, 2], epsabs=1e-12, limit=200)[0] / total
    )
    point = torch.tensor([[x]], dtype=torch.float64)
    assert model.log_prob(point, t).item() == pytest.approx(math.log(total), abs=1e-8)
    assert model.denoise(point, t).item() == pytest.approx(mean, abs=1e-8)


@pytest.mark.parametrize("t", [0.02, 0.3])
def test_the_empirical_density_by_hand(t):
    rows, x, process = tensor(7, D, seed=4).numpy(), tensor(5, D, seed=17).numpy(), VP()
    alpha, sigma = float(process.alpha(t)), float(process.sigma(t))
    each = stats.norm.logpdf(x[:, None], alpha * rows, sigma).sum(2)
    weights = np.exp(each - each.max(1, keepdims=True))
    model = MODELS["empirical"](process)
    np.testing.assert_allclose(
        model.log_prob(torch.tensor(x), t), np.logaddexp.reduce(each, 1) - math.log(7), rtol=1e-9
    )
    np.testing.assert_allclose(
        model.denoise(torch.tensor(x), t), weights @ rows / weights.sum(1, keepdims=True), atol=1e-12
    )


# ------------------------------------------------------------------------- one model inside the other


@pytest.mark.parametrize("t", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("process", [VP(), Linear()], ids=lambda p: type(p).__name__)
def test_special_cases_are_the_gaussian(process, t):
    gaussian, x = GaussianScore(MEAN, covariance(), process), 2 * tensor(6, D, seed=18)
    scaled = ScaleMixtureScore([2.0], [1.0], MEAN, covariance() / 2, process)
    one = MixtureScore([1.0], MEAN[None], covariance()[None], process)
    for name in ("denoise", "score", "log_prob"):
        for model in (scaled, one):
            assert relative(getattr(model, name)(x, t), getattr(gaussian, name)(x, t)) < 1e-12


@pytest.mark.parametrize("k", [0, 1, 4, 12])
def test_factor_model_equals_the_gaussian_of_its_covariance(k):
    d, S = 12, covariance(k, 2) if k else torch.zeros(0, 0).double()
    B, variance, mean = tensor(d, k, seed=1), tensor(d, seed=2, law="uniform"), tensor(d, seed=3)
    factors = MixtureFactors.gaussian(tensor(k, seed=4), S)
    x, shift = 3 * tensor(8, d, seed=5), B @ tensor(k, seed=4)
    for process in (VP(), VE(), Linear()):
        model = FactorScore(B, variance, process, factors=factors, mean=mean)
        dense = GaussianScore(mean + shift, B @ S @ B.T + variance.diag(), process)
        for t in (0.0, 0.2, 1.0, torch.linspace(0, 1, 8, dtype=torch.float64)):
            for name in ("denoise", "score", "log_prob"):
                assert relative(getattr(model, name)(x, t), getattr(dense, name)(x, t)) < 1e-10


def test_the_factor_score_is_the_formula_of_the_paper():
    # Chen et al. 2025: Lambda^-1 B Gamma grad log p_fac(f_hat) - Lambda^-1 (r - B f_hat), the gradient by autograd.
    model, r, t = (
        FactorScore(LOADINGS, IDIOSYNCRATIC, VP(), factors=regimes()),
        2 * tensor(6, D, seed=19),
        0.3,
    )
    alpha, sigma = VP().alpha(t), VP().sigma(t)
    noise = alpha**2 * IDIOSYNCRATIC + sigma**2
    gamma = torch.linalg.inv(LOADINGS.T / noise @ LOADINGS)
    f = ((r / noise) @ LOADINGS @ gamma).requires_grad_(True)
    (gradient,) = torch.autograd.grad(regimes().log_prob(f, t, alpha, gamma).sum(), f)
    expected = (gradient @ gamma @ LOADINGS.T - r + f.detach() @ LOADINGS.T) / noise
    assert relative(model.score(r, t), expected) < 1e-12


def test_a_factor_law_of_one_s_own():
    class Coins(FactorLaw):
        """F = -1 or 1: E[F | f] = tanh(alpha f / gamma)."""

        def denoise(self, f, t, alpha, gamma):
            return torch.tanh(alpha * f / gamma[..., 0])

        def log_prob(self, f, t, alpha, gamma):
            normal = torch.distributions.Normal(0.0, gamma[..., 0, 0].sqrt())
            return torch.logaddexp(
                normal.log_prob(f[:, 0] - alpha), normal.log_prob(f[:, 0] + alpha)
            ) - math.log(2)

        def sample(self, n, generator=None):
            return 2.0 * torch.randint(2, (n, 1), generator=generator).double() - 1

    model = FactorScore(LOADINGS[:, :1], IDIOSYNCRATIC, VP(), factors=Coins())
    b = LOADINGS[:, 0]
    mixture = MixtureScore([0.5, 0.5], torch.stack([b, -b]), IDIOSYNCRATIC.diag().expand(2, D, D), VP())
    x = tensor(5, D, seed=20)
    for name in ("denoise", "score", "log_prob"):
        assert relative(getattr(model, name)(x, 0.3), getattr(mixture, name)(x, 0.3)) < 1e-12


@pytest.mark.parametrize("t", [0.0, 0.3])
def test_permuting_the_assets_permutes_the_score(t):
    p, x = torch.tensor([2, 0, 1]), 2 * tensor(6, D, seed=21)
    pairs = [
        (
            SMOOTH["factor regimes"](VP()),
            FactorScore(LOADINGS[p], IDIOSYNCRATIC[p], VP(), mean=MEAN[p], factors=regimes()),
        ),
        (SMOOTH["mixture"](VP()), MixtureScore(WEIGHTS, MEANS[:, p], COVARIANCES[:, p][:, :, p], VP())),
        (
            SMOOTH["scales"](VP()),
            ScaleMixtureScore(SCALES, SCALE_WEIGHTS, MEAN[p], covariance()[p][:, p], VP()),
        ),
    ]
    for model, permuted in pairs:
        assert relative(permuted.score(x[:, p], t), model.score(x, t)[:, p]) < 1e-10
        assert relative(permuted.log_prob(x[:, p], t), model.log_prob(x, t)) < 1e-10


def test_the_empirical_model_is_a_mixture_of_points_whatever_the_chunk():
    rows, x = 100 + tensor(50, D, seed=22), 90 + 3 * tensor(8, D, seed=23)
    points = MixtureScore(torch.full((50,), 1 / 50), rows, torch.zeros(50, D, D).double(), VP())
    for t in (0.01, 0.3, 1.0, torch.linspace(0.01, 1, 8, dtype=torch.float64)):
        for chunk in (1, 7, 50, 1000):
            model = EmpiricalScore(rows, VP(), chunk=chunk)
            assert relative(model.denoise(x, t), points.denoise(x, t)) < 1e-9
            assert relative(model.log_prob(x, t), points.log_prob(x, t)) < 1e-9


def test_without_noise_the_empirical_model_returns_the_nearest_row():
    rows, x = tensor(300, 5, seed=24), 2 * tensor(40, 5, seed=25)
    nearest = rows[torch.cdist(x, rows).argmin(1)]
    model = EmpiricalScore(rows, VP(), chunk=64)
    drawn = model.sample(500, torch.Generator().manual_seed(0))
    assert torch.cdist(drawn, rows).amin(1).max() < 1e-6
    for t in (0.0, 1e-7):
        torch.testing.assert_close(model.denoise(x, t), nearest, rtol=0, atol=1e-10)
    torch.testing.assert_close(model.float().denoise(x.float(), 0.0), nearest.float(), rtol=0, atol=1e-5)


# -------------------------------------------------------------------------------------- exact draws


@every_model
def test_draws_have_the_first_two_moments_of_the_law(build, generator):
    # The law's own mean and covariance, read from its denoiser where sigma dominates: E[x_0] = E[x_0|x_t], alpha = 0.
    model = build(Linear())
    x = model.sample(40_000, generator)
    mean = model.denoise(x[:1], 1.0)
    centred = x - mean
    assert worst_z(centred) < 4.5
    # Tweedie of the second order: d E[x_0|x_t] / d x_t -> alpha Cov / sigma^2 as alpha -> 0.
    t, h = 1 - 1e-5, 1e-2
    steps = h * torch.eye(D).double()
    slope = (model.denoise(steps, t) - model.denoise(-steps, t)) / (2 * h) / 1e-5
    assert worst_z(centred[:, :, None] * centred[:, None, :] - slope) < 4.5


def test_mahalanobis_distances_of_draws_have_their_law(generator):
    inverse = torch.linalg.inv(covariance())
    gaussian = SMOOTH["gaussian"](VP()).sample(20_000, generator) - MEAN
    q = torch.einsum("ni,ij,nj->n", gaussian, inverse, gaussian).numpy()
    assert stats.kstest(q, stats.chi2(D).cdf).pvalue > 1e-3
    scaled = SMOOTH["scales"](VP()).sample(20_000, generator) - MEAN
    q = torch.einsum("ni,ij,nj->n", scaled, inverse, scaled).numpy()
    assert (
        stats.kstest(
            q, lambda q: SCALE_WEIGHTS.numpy() @ stats.chi2(D).cdf(q / SCALES.numpy()[:, None])
        ).pvalue
        > 1e-3
    )
    assert stats.kstest(q, stats.chi2(D, scale=float(SCALES @ SCALE_WEIGHTS)).cdf).pvalue < 1e-10


@pytest.mark.parametrize("name", ["mixture", "factor regimes", "factor scales"])
def test_margins_of_draws_have_their_law(name, generator):
    model = SMOOTH[name](VP())
    x = model.sample(20_000, generator).numpy()
    B = LOADINGS.numpy()
    law = {
        "mixture": (WEIGHTS, MEANS, COVARIANCES),
        "factor regimes": (
            WEIGHTS,
            MEAN.numpy() + regimes().means.numpy() @ B.T,
            B @ regimes().covariances.numpy() @ B.T + np.diag(IDIOSYNCRATIC),
        ),
        "factor scales": (
            SCALE_WEIGHTS,
            heavy().means.numpy() @ B.T,
            B @ heavy().covariances.numpy() @ B.T + np.diag(IDIOSYNCRATIC),
        ),
    }[name]
    weights, means, covariances = (np.asarray(part) for part in law)
    for w in [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [1.0, -1.0, 0.5]]:
        m, s = means @ w, np.sqrt(np.einsum("i,mij,j->m", w, covariances, w))
        assert (
            stats.kstest(
                x @ w, lambda y, m=m, s=s: weights @ stats.norm.cdf((y - m[:, None]) / s[:, None])
            ).pvalue
            > 1e-3
        )


@pytest.mark.parametrize("times", [0.02, 0.15, 1.0, "own"])
def test_draws_from_the_posterior_leave_the_law_as_it_is(times, generator):
    process, n = VP(), 20_000
    model = SMOOTH["scales"](process)
    t = torch.rand(n, dtype=torch.float64, generator=generator) if times == "own" else times
    x0 = model.sample(n, generator)
    x = process.perturb(x0, t, torch.randn(x0.shape, dtype=x0.dtype, generator=generator))
    again = model.sample_posterior(x, t, generator)
    assert worst_z(again - model.denoise(x, t)) < 4.5
    centred = again - MEAN
    second = float(SCALES @ SCALE_WEIGHTS) * covariance()
    assert worst_z(centred[:, :, None] * centred[:, None, :] - second) < 4.5
    q = torch.einsum("ni,ij,nj->n", centred, torch.linalg.inv(covariance()), centred).numpy()
    assert (
        stats.kstest(
            q, lambda q: SCALE_WEIGHTS.numpy() @ stats.chi2(D).cdf(q / SCALES.numpy()[:, None])
        ).pvalue
        > 1e-3
    )
    # Given x_t the pair (x_0, x_0') is exchangeable: second moments given functions of x_t agree.
    weight = torch.stack([torch.ones(n).double(), x.norm(dim=1), x[:, 0].tanh()], 1)
    products = again[:, :, None] * again[:, None, :] - x0[:, :, None] * x0[:, None, :]
    assert worst_z(products.reshape(n, -1, 1) * weight[:, None, :]) < 4.5
    assert relative(model.sample_posterior(x[:5], 0.0, generator), x[:5]) < 1e-12


def test_the_posterior_of_the_scale_is_bayes_rule():
    model, x, process = SMOOTH["scales"](VP()), 2 * tensor(6, D, seed=26), VP()
    each = [
        stats.multivariate_normal(*noised_moments(process, 0.2, MEAN, v * covariance())).pdf(x.numpy())
        for v in SCALES
    ]
    joint = np.array(each).T * SCALE_WEIGHTS.numpy()
    np.testing.assert_allclose(model.posterior(x, 0.2), joint / joint.sum(1, keepdims=True), rtol=1e-9)
    torch.testing.assert_close(model.posterior(x, 0.2), model.posterior(x, torch.full((6,), 0.2).double()))
    # A loud day is a loud day: far away the largest scale is certain, and at pure noise nothing is known.
    assert model.posterior(1e3 * x, 0.01)[:, -1].min() > 1 - 1e-9
    weights = ScaleMixtureScore(SCALES, SCALE_WEIGHTS, MEAN, covariance(), Linear()).posterior(x, 1.0)
    torch.testing.assert_close(weights, SCALE_WEIGHTS.expand(6, 3))


# --------------------------------------------------------------------------------- fitting by EM


def student(n, d, seed, nu=4):
    rng = np.random.default_rng(seed)
    root = np.random.default_rng(99).normal(size=(d, d)) / math.sqrt(d) + np.eye(d)
    scale = np.ones(n) if nu is None else rng.chisquare(nu, n) / nu
    return rng.normal(size=(n, d)) @ root.T / np.sqrt(scale)[:, None] + 0.1


def gain_over_gaussian(train, test, **options):
    """Held-out nats a row over the Gaussian with the sample covariance: mean and standard error."""
    model = ScaleMixtureScore.fit(train, VP(), **options)
    gaussian = GaussianScore(train.mean(0), np.cov(train.T), VP())
    gain = model.log_prob(torch.as_tensor(test)) - gaussian.log_prob(torch.as_tensor(test))
    return float(gain.mean()), float(gain.std() / math.sqrt(len(gain)))


@pytest.mark.parametrize(
    ("n", "d", "shrinkage"), [(400, 6, 0.0), (400, 6, 0.2), (30, 40, 0.3), (200, 1, 0.0)]
)
def test_the_likelihood_never_decreases(n, d, shrinkage):
    X = student(n, d, seed=1)
    model = ScaleMixtureScore.fit(X, VP(), shrinkage=shrinkage, tolerance=0.0, iterations=60)
    steps = np.diff(model.likelihoods)
    assert len(steps) >= 20
    assert steps.min() > -1e-10
    # In the model's own units: EM's S is covariance/unit, and a common factor of S and 1/v changes no density.
    likelihood = float(model.log_prob(torch.as_tensor(X)).mean())
    if shrinkage == 0:
        assert model.likelihoods[-1] == pytest.approx(likelihood, abs=1e-9)
    assert float(model.scales @ model.weights) == pytest.approx(1.0, abs=1e-12)


def test_the_fit_is_a_stationary_point_of_the_likelihood():
    # In the mean: sum of scores 0. In the covariance: the virial, mean (x - m) score^T = -I.
    X = torch.as_tensor(student(300, 4, seed=2) ** 2)  # skewed, so that the fitted mean is not the average
    model = ScaleMixtureScore.fit(X, VP(), shrinkage=0.0, tolerance=0.0, iterations=2000)
    score = model.score(X, 0.0)
    assert (score.mean(0) * model.covariance.diagonal().sqrt()).abs().max() < 1e-4
    assert ((X - model.mean).T @ score / len(X) + torch.eye(4)).abs().max() < 1e-4
    gradient = (
        model.posterior(X, 0.0).mean(0) / model.weights
    )  # of the weights: 1 where positive, at most 1 else
    kept = model.weights > 1e-3
    torch.testing.assert_close(gradient[kept], torch.ones_like(gradient[kept]), rtol=0, atol=1e-3)


def test_em_recovers_planted_weights():
    scales, weights = torch.tensor([[0.1, 1.0, 8.0], [0.3, 0.55, 0.15]], dtype=torch.float64)
    d, n = 12, 6000
    planted = ScaleMixtureScore(scales, weights, tensor(d, seed=1), covariance(d, 2), VP())
    X = planted.sample(n, torch.Generator().manual_seed(3))
    model = ScaleMixtureScore.fit(X, VP(), scales=scales)
    standard_error = (weights * (1 - weights) / n).sqrt()
    assert ((model.weights - weights).abs() / standard_error).max() < 4.5
    unit = scales @ weights
    torch.testing.assert_close(model.scales, scales / unit, rtol=0.1, atol=0)
    scatter = model.covariance / (covariance(d, 2) * unit)
    assert (scatter.diagonal() - 1).abs().max() < 0.12
    assert relative(model.mean, planted.mean) < 0.05


def test_em_beats_the_gaussian_on_heavy_tails_and_ties_on_a_gaussian():
    gain, error = gain_over_gaussian(student(1500, 8, 1), student(3000, 8, 2))
    truth = stats.multivariate_t(np.full(8, 0.1), ROOT8 @ ROOT8.T, df=4).logpdf(student(3000, 8, 2))
    best = truth - stats.multivariate_normal(
        student(1500, 8, 1).mean(0), np.cov(student(1500, 8, 1).T)
    ).logpdf(student(3000, 8, 2))
    assert gain > 5 * error
    assert best.mean() - 0.05 < gain < best.mean() + 0.01  # all but .05 nats of what the true law gains
    null, _ = gain_over_gaussian(student(1500, 8, 1, None), student(3000, 8, 2, None))
    assert abs(null) < 0.02


ROOT8 = np.random.default_rng(99).normal(size=(8, 8)) / math.sqrt(8) + np.eye(8)


@pytest.mark.parametrize("n", [25, 40, 100])
def test_the_leave_one_out_choice_holds_out_of_sample(n):
    train, test = student(n, 20, 4), torch.as_tensor(student(2000, 20, 5))
    chosen = ScaleMixtureScore.fit(train, VP())
    nats = {
        s: float(ScaleMixtureScore.fit(train, VP(), shrinkage=s).log_prob(test).mean())
        for s in (0.01, 0.1, 0.5, 0.9)
    }
    value = float(chosen.log_prob(test).mean())
    assert value > max(nats.values()) - 0.5
    assert value >= nats[0.01]


def test_leave_one_out_equals_leaving_one_out():
    X, s = torch.as_tensor(student(12, 9, 6)), 0.3
    model = ScaleMixtureScore.fit(X, VP(), shrinkage=s)
    r, total = model.posterior(X, 0.0) @ (1 / model.scales), 0.0
    for i in range(12):
        c = X[i] - model.mean
        without = model.covariance - (1 - s) * r[i] / 12 * torch.outer(c, c)
        total += ScaleMixtureScore(model.scales, model.weights, model.mean, without, VP()).log_prob(
            X[i : i + 1]
        )
    assert model.leave_one_out == pytest.approx(float(total / 12), abs=1e-8)


@pytest.mark.parametrize(("n", "d"), [(19, 20), (20, 20), (21, 20), (22, 20), (60, 100)])
def test_few_rows(n, d):
    train, test = student(n, d, 7), torch.as_tensor(student(500, d, 8))
    model = ScaleMixtureScore.fit(train, VP())
    variance = torch.as_tensor(train).var(0, correction=0)
    diagonal = GaussianScore(train.mean(0), variance.diag(), VP())
    assert (model.log_prob(test) - diagonal.log_prob(test)).mean() > 0.5
    if n <= d:
        with pytest.raises(ValueError, match="full rank"):
            ScaleMixtureScore.fit(train, VP(), shrinkage=0.0)


def test_the_fit_follows_units_and_order_of_the_assets():
    X, x = student(200, 5, 9), torch.as_tensor(student(10, 5, 10))
    units, order = torch.tensor([1e-3, 1.0, 50.0, 0.2, 7.0]).double(), torch.tensor([3, 1, 4, 0, 2])
    model, moved = (ScaleMixtureScore.fit(data, VP()) for data in (X, X[:, order] * units.numpy()))
    assert relative(moved.log_prob(x[:, order] * units), model.log_prob(x) - units.log().sum()) < 1e-7


def test_it_beats_the_gaussian_on_the_panel(returns):
    panel = returns.to_numpy()
    gains = []
    for seed in range(3):
        rows = np.random.default_rng(seed).permutation(len(panel))
        train, test = panel[rows[:750]], panel[rows[750:]]
        mean, deviation = train.mean(0), train.std(0)
        gains.append(gain_over_gaussian((train - mean) / deviation, (test - mean) / deviation)[0])
    assert min(gains) > 1.5


# ------------------------------------------------------------------------- precision, extremes, errors


@every_model
def test_float32_is_enough(build):
    x, process = 2 * tensor(50, D, seed=27), VP()
    exact, single = build(process), build(process).float()
    assert single.dtype == torch.float32
    for t in (0.02, 0.3, 1.0, torch.linspace(0.02, 1, 50)):
        for name in ("denoise", "noise"):
            value = getattr(single, name)(x.float(), t)
            assert value.dtype == torch.float32
            assert relative(value.double(), getattr(exact, name)(x, t)) < 1e-4
    draws = single.sample(7, torch.Generator().manual_seed(0))
    assert draws.shape == (7, D)
    assert draws.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@every_model
def test_far_points_stay_finite(build, dtype):
    x = torch.tensor([[1e6, -1e6, 1e6], [0.0, 1e6, 0.0], [1e-6, 0.0, 0.0]], dtype=dtype)
    for process in (VP(), VE(), Linear()):
        model = build(process).to(dtype)
        for t in (1e-3, 0.5, 1.0):
            for name in ("denoise", "score", "log_prob"):
                assert getattr(model, name)(x, t).isfinite().all(), (name, t)
        assert model.denoise(x, 0.0).isfinite().all()


def test_a_singular_covariance_is_projected_on_its_support():
    S = torch.outer(MEAN, MEAN)
    x = tensor(4, D, seed=28)
    projected = (x @ MEAN)[:, None] * MEAN / (MEAN @ MEAN)
    for model in (
        GaussianScore(torch.zeros(D), S, VP()),
        ScaleMixtureScore(SCALES, SCALE_WEIGHTS, torch.zeros(D), S, VP()),
        MixtureScore([0.5, 0.5], torch.zeros(2, D), torch.stack([S, 2 * S]), VP()),
    ):
        torch.testing.assert_close(model.denoise(x, 0.0), projected)
        torch.testing.assert_close(model.denoise(x, 1e-9), projected, rtol=0, atol=1e-6)


@every_model
def test_a_seed_fixes_the_draws_and_a_saved_state_the_model(build):
    model, other = build(VP()), build(VP())
    draws = [model.sample(5, torch.Generator().manual_seed(s)) for s in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    for buffer in other.buffers():
        buffer.zero_()
    other.load_state_dict(model.state_dict())
    x = tensor(4, D, seed=29)
    assert torch.equal(other.denoise(x, 0.3), model.denoise(x, 0.3))


I3 = np.eye(3)
INDEFINITE = np.diag([1.0, 1.0, -1.0])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: GaussianScore(np.zeros(3), np.zeros((3, 2)), VP()), "shape"),
        (lambda: GaussianScore(np.zeros(2), I3, VP()), "a mean of shape"),
        (lambda: GaussianScore(np.zeros(3), INDEFINITE, VP()), "semidefinite"),
        (lambda: GaussianScore(np.zeros(3), np.triu(np.ones((3, 3))), VP()), "symmetric"),
        (lambda: GaussianScore(np.zeros(3), I3 * np.nan, VP()), "finite"),
        (lambda: MixtureScore([1.0], np.zeros((1, 3)), I3, VP()), "one a component"),
        (lambda: MixtureScore([0.5, 0.6], np.zeros((2, 3)), np.stack([I3, I3]), VP()), "sum 1"),
        (lambda: MixtureScore([1.5, -0.5], np.zeros((2, 3)), np.stack([I3, I3]), VP()), "weights >= 0"),
        (lambda: MixtureScore([0.5, 0.5], np.zeros((3, 3)), np.stack([I3, I3]), VP()), "means of shape"),
        (
            lambda: MixtureScore([0.5, 0.5], np.zeros((2, 3)), np.stack([I3, INDEFINITE]), VP()),
            "semidefinite",
        ),
        (lambda: ScaleMixtureScore([1.0, -1.0], [0.5, 0.5], np.zeros(3), I3, VP()), "positive finite scales"),
        (lambda: ScaleMixtureScore([1.0, 2.0], [1.0], np.zeros(3), I3, VP()), "weights of shape"),
        (lambda: ScaleMixtureScore([1.0], [1.0], np.zeros(4), I3, VP()), "a mean of shape"),
        (lambda: ScaleMixtureScore([1.0], [1.0], np.zeros(3), np.stack([I3, I3]), VP()), "shape"),
        (lambda: ScaleMixtureScore.fit(np.zeros(5), VP()), "n >= 2"),
        (lambda: ScaleMixtureScore.fit(np.full((5, 2), np.nan), VP()), "finite X"),
        (lambda: ScaleMixtureScore.fit(student(50, 3, 1), VP(), shrinkage=1.0), "shrinkage in"),
        (lambda: ScaleMixtureScore.fit(student(50, 3, 1), VP(), iterations=0), "iteration"),
        (lambda: ScaleMixtureScore.fit(student(50, 3, 1), VP(), n_scales=0), "n_scales"),
        (lambda: ScaleMixtureScore.fit(student(50, 3, 1), VP(), scales=[0.0, 1.0]), "positive finite scales"),
        (lambda: ScaleMixtureScore.fit(student(50, 3, 1) * [1, 1, 0], VP()), "full rank"),
        (lambda: FactorScore(np.ones(3), np.ones(3), VP()), "loadings of shape"),
        (lambda: FactorScore(np.ones((3, 1)), np.ones(2), VP()), "idiosyncratic variance of shape"),
        (lambda: FactorScore(np.ones((3, 1)), [1.0, 0.0, 1.0], VP()), "positive idiosyncratic"),
        (lambda: FactorScore(np.ones((3, 2)), np.ones(3), VP()), "full column rank"),
        (lambda: FactorScore(np.ones((3, 4)), np.ones(3), VP()), "full column rank"),
        (lambda: FactorScore(np.ones((3, 1)), np.ones(3), VP(), mean=np.zeros(2)), "a mean of shape"),
        (lambda: MixtureFactors([1.0], np.zeros((1, 2)), np.eye(2)), "one a component"),
        (lambda: EmpiricalScore(np.zeros(3), VP()), "rows of shape"),
        (lambda: EmpiricalScore(np.zeros((0, 3)), VP()), "rows of shape"),
        (lambda: EmpiricalScore(np.zeros((4, 3)), VP(), chunk=0), "chunk"),
    ],
)
def test_wrong_arguments_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
