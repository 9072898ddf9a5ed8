"""Training as a linear solve: every moment against draws or series, every fit against a brute-force refit."""

import math

import pytest
import torch
from oracle import PROCESSES

from finediff.diffusion.closed_form import (
    RidgeScore,
    activate,
    coefficients,
    cross,
    fit_ridge_score,
    fold_ridge,
    gram,
    moments,
)
from finediff.diffusion.closed_form.model import NormalEquations, _projected_loss
from finediff.diffusion.exact import GaussianScore, MixtureScore
from finediff.diffusion.likelihood import held_out_nats
from finediff.diffusion.process import VP, Linear
from finediff.diffusion.quadrature import gauss_hermite, gauss_hermite_2d

F64 = torch.float64
ACTIVATIONS = ("cos", "probit", "smooth_relu", "relu", "tanh", "silu", "softplus")
SMOOTH = tuple(a for a in ACTIVATIONS if a != "relu")
every_activation = pytest.mark.parametrize("activation", ACTIVATIONS)


def normals(*shape, seed=0, dtype=F64):
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def layer(h=6, d=3, n=4, largest=1.0, seed=0):
    """Unit weights w_j, two of them near-parallel, scales up to ``largest`` and means of two units."""
    w = normals(h, d, seed=seed)
    w[1] = w[0] + 0.1 * w[1]
    w = w / w.norm(dim=1, keepdim=True)
    scales = largest * torch.linspace(1, 0.2, h, dtype=F64)
    scales[1] = scales[0]
    return 2 * normals(n, h, seed=seed + 1), scales, w


def quadrature_gram(means, scales, w, activation, nodes=100):
    """The paper's way: a two-dimensional rule for every row and pair."""
    unit = w / w.norm(dim=1, keepdim=True)
    points, mass = gauss_hermite_2d(nodes, (unit @ unit.T).clamp(-1, 1))
    total = 0
    for mu in means:
        left = activate(mu[:, None, None] + scales[:, None, None] * points[..., 0], activation)
        right = activate(mu[:, None] + scales[:, None] * points[..., 1], activation)
        total = total + (left * right) @ mass / len(means)
    return total


# ------------------------------------------------------------------ moments


@pytest.fixture(scope="module")
def drawn():
    """A million noisy rows x_t of four rows x_0, their noise, and the pre-activations' exact means and scales."""
    x, alpha, sigma = normals(4, 3, seed=3), 0.8, 0.6
    weights, bias = 1.5 * normals(5, 3, seed=4), normals(5, seed=5)
    z = normals(250_000, 4, 3, seed=6)
    x_t = alpha * x + sigma * z
    means, scales = alpha * x @ weights.T + bias, sigma * weights.norm(dim=1)
    return x, alpha, sigma, weights, means, scales, z, x_t, x_t @ weights.T + bias


@every_activation
def test_moments_are_those_of_a_million_draws(activation, drawn):
    x, alpha, sigma, weights, means, scales, z, x_t, a = drawn
    assert scales.max() > 1.5
    phi = activate(a, activation)
    G, found = moments(means, scales, weights, x, alpha, sigma, activation, terms=60, nodes=80)
    for name, expected, factors in (
        ("gram", G, phi),
        ("noise", found.noise, z),
        ("data", found.data, x.expand_as(z)),
        ("state", found.state, x_t),
        ("mean", found.mean[:, None], torch.ones_like(z[..., :1])),
    ):
        # Strata: the rows x_0 are not drawn, so the error is that of the mean over each row's noise.
        mean = torch.einsum("sip,siq->ipq", phi, factors) / len(z)
        square = torch.einsum("sip,siq->ipq", phi**2, factors**2) / len(z)
        error = (square - mean**2).clamp(min=0).mean(0).sqrt() / (4 * len(z)) ** 0.5
        assert ((mean.mean(0) - expected).abs() <= 5 * error + 1e-9).all(), name


@pytest.mark.parametrize("activation", SMOOTH)
def test_series_reach_high_order_quadrature(activation):
    """At s <= 1: 12 terms to 1e-6, tanh to 1e-4 (24 terms: 1e-6), near-parallel weights included."""
    means, scales, w = layer()
    exact = quadrature_gram(means, scales, w, activation, nodes=150 if activation == "tanh" else 60)
    tolerance = {"tanh": 1e-4, "probit": 5e-6, "cos": 1e-14}.get(activation, 1e-6)
    assert (gram(means, scales, w, activation) - exact).abs().max() < tolerance
    if activation in ("tanh", "probit"):
        assert (gram(means, scales, w, activation, 24, 64) - exact).abs().max() < 1e-6


def test_series_of_cos_sums_to_the_closed_gram():
    means, scales, w = layer(largest=2.0)
    A = coefficients(means, scales, "cos", 60)
    rho = w @ w.T
    series = sum(rho**p * (a.T @ a) for p, a in enumerate(A)) / len(means)
    torch.testing.assert_close(series, gram(means, scales, w), rtol=1e-12, atol=1e-12)


@every_activation
def test_coefficients_are_their_integrals(activation):
    """By a fine rectangle rule, which knows nothing of Hermite."""
    means, scales, _ = layer(largest=1.5)
    z = torch.linspace(-12, 12, 24_001, dtype=F64)
    he = [torch.ones_like(z), z]
    for p in range(1, 5):
        he.append(z * he[p] - p * he[p - 1])
    phi = activate(means[..., None] + scales[:, None] * z, activation)
    density = torch.exp(-(z**2) / 2) / math.sqrt(2 * math.pi) * (z[1] - z[0])
    found = coefficients(means, scales, activation, 6, 80)
    for p in range(6):
        expected = (phi * (he[p] * density)).sum(-1) / math.factorial(p) ** 0.5
        torch.testing.assert_close(found[p], expected, rtol=0, atol=1e-5 if activation == "tanh" else 1e-6)


@every_activation
@pytest.mark.parametrize("terms", [2, 5, 12])
def test_grams_are_positive_semidefinite(activation, terms):
    """Duplicates, opposites, near-parallel and zero weights, at any cut and any scale."""
    means, scales, w = layer(h=8, largest=4.0)
    w[2], w[3], w[4] = w[0], -w[0], 0.0
    scales[2:4], scales[4] = scales[0], 0.0
    means[:, 2] = means[:, 0]
    G = gram(means, scales, w, activation, terms, 16)
    torch.testing.assert_close(G, G.T)
    assert float(torch.linalg.eigvalsh(G)[0]) > -1e-13 * float(G.diagonal().max()) * 8
    if activation != "cos":
        # What is cut off is positive semidefinite as well.
        more = gram(means, scales, w, activation, terms + 4, 16) - G
        if activation in ("probit", "smooth_relu"):
            assert float(torch.linalg.eigvalsh(more)[0]) > -1e-12


@pytest.mark.parametrize("activation", ["relu", "tanh", "silu", "softplus"])
def test_diagonals_are_exact_at_any_cut(activation):
    means, scales, w = layer(largest=3.0)
    points, mass = gauss_hermite(40)
    second = (activate(means[..., None] + scales[:, None] * points, activation) ** 2 @ mass).mean(0)
    found = gram(means, scales, w, activation, 3, 40).diagonal()
    torch.testing.assert_close(found, second, rtol=0.01 if activation == "relu" else 1e-12, atol=0)


@every_activation
def test_a_zero_weight_is_a_constant(activation):
    means, scales, w = layer()
    w[0], scales[0] = 0.0, 0.0
    means[:, 0] = means[0, 0]
    found = cross(means, scales, w, normals(4, 3), 0.8, 0.6, activation)
    constant = activate(means[0, 0], activation)
    torch.testing.assert_close(found.mean[0], constant)
    G = gram(means, scales, w, activation)
    torch.testing.assert_close(G[0], constant * found.mean)
    assert (found.noise[0] == 0).all()


@every_activation
def test_batches_of_levels_and_rows_equal_loops(activation):
    x, weights = normals(2, 5, 3), normals(6, 3, seed=2)  # two windows of five rows
    alpha, sigma = (
        torch.tensor([[0.9], [0.5], [0.1]], dtype=F64),
        torch.tensor([[0.3], [0.8], [1.0]], dtype=F64),
    )
    means, scales = (
        alpha[..., None, None] * x @ weights.T,
        (sigma[..., None] * weights.norm(dim=1)).expand(3, 2, 6),
    )
    G, found = moments(means, scales, weights, x, alpha.expand(3, 2), sigma.expand(3, 2), activation)
    for i in range(3):
        for j in range(2):
            one = means[i, j], scales[i, j], weights
            torch.testing.assert_close(G[i, j], gram(*one, activation))
            alone = cross(*one, x[j], float(alpha[i]), float(sigma[i]), activation)
            for name in ("noise", "data", "state", "mean"):
                torch.testing.assert_close(getattr(found, name)[i, j], getattr(alone, name))
    # Sums over rows add.
    parts = [gram(a, scales[0, 0], weights, activation) * len(a) for a in (means[0, 0, :2], means[0, 0, 2:])]
    torch.testing.assert_close(sum(parts) / 5, G[0, 0])


@every_activation
def test_gradients_are_finite_differences(activation):
    means, scales, w = (a.requires_grad_(True) for a in layer(h=3, n=2))
    x = normals(2, 3, seed=8)

    def function(means, scales, w):
        G, found = moments(means, scales, w, x, 0.8, 0.6, activation, 6, 12)
        return G, found.state

    assert torch.autograd.gradcheck(function, (means, scales, w), atol=1e-6)


@every_activation
def test_single_precision_is_close(activation):
    means, scales, w = layer(h=32, n=200)
    exact = gram(means, scales, w, activation)
    single = gram(means.float(), scales.float(), w.float(), activation)
    assert single.dtype == torch.float32
    assert (single - exact).abs().max() < 5e-6 * exact.abs().max()


def test_moments_refuse_what_they_cannot_hold():
    means, scales, w = layer()
    with pytest.raises(ValueError, match="activation"):
        gram(means, scales, w, "sine")
    with pytest.raises(ValueError, match="12 nodes"):
        gram(means, scales, w, "tanh", 12, 8)
    with pytest.raises(ValueError, match="2 terms"):
        gram(means, scales, w, "probit", 1)


# ------------------------------------------------------------------ ridge with exact cross-validation

RIDGES = (1e-6, 1e-3, 1e-1, 1.0, 10.0)


def panel(batch=(), n=60, p=7, q=3, K=4, signal=0.5, seed=0):
    """Features (*batch, K, n/K, p) of unequal sizes, targets (*batch, K, n/K, q), and the folds' sums."""
    phi = normals(*batch, K, n // K, p, seed=seed) * torch.arange(1, p + 1)
    y = signal * phi @ normals(p, q, seed=seed + 1) / p + normals(*batch, K, n // K, q, seed=seed + 2)
    return phi, y, phi.mT @ phi, phi.mT @ y


def refit(phi, y, ridge, scale):
    """The naive twin: one solve with explicit rows."""
    G = phi.T @ phi
    D = (
        torch.diag(G.diagonal())
        if scale == "diagonal"
        else torch.eye(len(G), dtype=F64) * G.diagonal().mean()
    )
    return torch.linalg.solve(G + ridge * D, phi.T @ y)


@pytest.mark.parametrize("scale", ["diagonal", "trace"])
@pytest.mark.parametrize("per_output", [False, True])
def test_folds_equal_brute_force_refits(scale, per_output):
    phi, y, G, R = panel()
    found = fold_ridge(G, R, RIDGES, scale=scale, per_output=per_output)
    gains = torch.zeros(len(RIDGES), 4, 3, dtype=F64)
    for i, ridge in enumerate(RIDGES):
        for f in range(4):
            others = [k for k in range(4) if k != f]
            B = refit(phi[others].flatten(0, 1), y[others].flatten(0, 1), ridge, scale)
            gains[i, f] = (y[f].square() - (y[f] - phi[f] @ B).square()).sum(0)
    if per_output:
        best = gains.sum(1).argmax(0)
        expected = torch.stack([gains[best[j], :, j] for j in range(3)], 1)
    else:
        best = gains.sum((1, 2)).argmax().expand(3)
        expected = gains[best[0]]
    torch.testing.assert_close(found.fold_gain, expected)
    torch.testing.assert_close(found.ridge.expand(3), torch.tensor(RIDGES, dtype=F64)[best])
    B = torch.stack(
        [refit(phi.flatten(0, 1), y.flatten(0, 1), RIDGES[best[j]], scale)[:, j] for j in range(3)], 1
    )
    on = (expected.sum(0) > 0) if per_output else (expected.sum() > 0).expand(3)
    assert on.all()
    torch.testing.assert_close(found.weights, B)
    torch.testing.assert_close(found.gain, expected.sum(0))


@pytest.mark.parametrize("per_output", [False, True])
def test_batches_equal_loops(per_output):
    _, _, G, R = panel((2, 3), signal=0.1)
    together = fold_ridge(G, R, RIDGES, per_output=per_output)
    for i in range(2):
        for j in range(3):
            alone = fold_ridge(G[i, j], R[i, j], RIDGES, per_output=per_output)
            for name in ("weights", "ridge", "gain", "fold_gain"):
                torch.testing.assert_close(getattr(together, name)[i, j], getattr(alone, name))


def test_noise_switches_blocks_off():
    """No signal: where the gain is not positive the weights are 0; with a margin few blocks are left on."""
    _, _, G, R = panel((200,), signal=0.0, n=400)
    found = fold_ridge(G, R)
    off = found.fold_gain.sum((-1, -2)) <= 0
    assert off.any()
    assert (found.weights[off] == 0).all()
    assert (found.gain[off] == 0).all()
    assert (found.gain[~off].sum(-1) > 0).all()
    strict = fold_ridge(G, R, margin=2.0)
    assert float((strict.gain.sum(-1) > 0).double().mean()) < 0.1
    _, _, G, R = panel((200,), signal=0.5, n=400)
    assert (fold_ridge(G, R, margin=2.0).gain.sum(-1) > 0).all()


def test_outputs_are_switched_off_one_by_one():
    phi, _, G, R = panel(n=400)
    noise = normals(4, 100, 1, seed=9)
    R = torch.cat([R, phi.mT @ noise], -1)
    found = fold_ridge(G, R, per_output=True, margin=1.0)
    assert (found.weights[:, 3] == 0).all()
    torch.testing.assert_close(found.weights[:, :3], fold_ridge(G, R[..., :3], per_output=True).weights)


def test_rescaling_features_and_a_feature_that_is_zero_change_nothing():
    _, _, G, R = panel()
    scales = torch.logspace(-3, 3, 7, dtype=F64)
    plain = fold_ridge(G, R)
    scaled = fold_ridge(scales[:, None] * G * scales, scales[:, None] * R)
    torch.testing.assert_close(scaled.weights * scales[:, None], plain.weights)
    torch.testing.assert_close(scaled.gain, plain.gain)
    wider_G, wider_R = torch.zeros(4, 8, 8, dtype=F64), torch.zeros(4, 8, 3, dtype=F64)
    wider_G[:, :7, :7], wider_R[:, :7] = G, R
    wider = fold_ridge(wider_G, wider_R)
    torch.testing.assert_close(wider.weights[:7], plain.weights)
    assert (wider.weights[7] == 0).all()


def test_single_precision_sums_are_solved_in_double():
    _, _, G, R = panel()
    single, double = fold_ridge(G.float(), R.float(), RIDGES), fold_ridge(G, R, RIDGES)
    assert single.weights.dtype == F64
    torch.testing.assert_close(single.weights, double.weights, rtol=1e-4, atol=1e-5)


def test_wrong_sums_are_refused():
    _, _, G, R = panel()
    with pytest.raises(ValueError, match=r"K >= 2.*\(1, 7, 7\)"):
        fold_ridge(G[:1], R[:1])
    with pytest.raises(ValueError, match="expected R of shape"):
        fold_ridge(G, R[:, :5])
    with pytest.raises(ValueError, match="finite"):
        fold_ridge(G, R * torch.inf)
    with pytest.raises(ValueError, match="scale"):
        fold_ridge(G, R, scale="none")


# ------------------------------------------------------------------ the model


def two_moons(process, dtype=F64):
    """Three lobes in the plane, and a Gaussian base of the same mean and covariance."""
    means = torch.tensor([[-1.2, 0.4], [0.9, 0.8], [0.2, -1.1]], dtype=dtype)
    covariances = torch.stack([torch.tensor([[0.15, c], [c, 0.1]], dtype=dtype) for c in (0.08, -0.05, 0.0)])
    law = MixtureScore(torch.tensor([0.4, 0.3, 0.3], dtype=dtype), means, covariances, process)
    rows = law.sample(900, torch.Generator().manual_seed(1))
    return law, rows, GaussianScore(rows.mean(0), torch.cov(rows.T), process)


def fitted(process=VP(), **options):  # noqa: B008
    law, rows, base = two_moons(process)
    options = {
        "n_features": 24,
        "bandwidths": (2.0,),
        "generator": torch.Generator().manual_seed(2),
    } | options
    return (law, rows, base, *fit_ridge_score(rows, base, **options))


@torch.no_grad()
def distance(model, law, nodes=14, n=1500):
    """1/2 int E|eps_model - eps_law|^2 d log-SNR, a bound on the divergence in nats."""
    total, generator = 0.0, torch.Generator().manual_seed(5)
    for level in torch.linspace(-5, 8, nodes, dtype=F64):
        t = law.process.time(level)
        x0 = law.sample(n, generator)
        x = law.process.perturb(x0, t, torch.randn(x0.shape, dtype=F64, generator=generator))
        total += float((model.noise(x, t) - law.noise(x, t)).square().sum(1).mean())
    return total / 2 * 13 / (nodes - 1)


@pytest.mark.parametrize("name", PROCESSES)
def test_a_solve_learns_the_score_on_every_path(name):
    law, _, base, model, history = fitted(PROCESSES[name])
    assert distance(model, law) < 0.25 * distance(base, law)
    assert history.nats > 0.5


def test_the_loss_is_the_one_of_the_model():
    """B'GB - 2 B'R at a level is E|z - eps_hat|^2 - E|z - eps_base|^2 over the rows and all noise."""
    _, rows, base, model, _ = fitted()
    k = 12
    t = model.process.time(model.log_snr[k])
    alpha, sigma = model.process.alpha(t)[None], model.process.sigma(t)[None]
    levels = NormalEquations((rows - base.mean) @ base.eigenvectors, base.eigenvalues, alpha, sigma)
    G, R = levels.equations(levels.rows, slice(0, 1), model.weights, model.bias, "cos", 12)
    B = model.output[k]
    loss = float(levels.size * (B * (G[0] @ B - 2 * R[0])).sum())
    z = normals(400, *rows.shape, seed=7)
    x = model.process.perturb(rows, t, z).flatten(0, 1)
    noise = z.flatten(0, 1)
    change = (noise - model.noise(x, t)).square().sum(1) - (noise - base.noise(x, t)).square().sum(1)
    change = change.unflatten(0, (400, -1)).mean(1)
    assert loss < -0.01
    assert abs(float(change.mean()) - loss) < 5 * float(change.std()) / 20


def test_cross_validated_nats_are_held_out_nats():
    law, _, base, model, history = fitted(n_features=48)
    test = law.sample(3000, torch.Generator().manual_seed(11))
    nats = held_out_nats(
        model, test, base, log_snr=(-6, 9), nodes=31, repeats=1, generator=torch.Generator().manual_seed(3)
    )
    assert abs(nats.gain - history.nats) < 4 * nats.standard_error * (1 + 3000 / 900) ** 0.5


def test_readings_agree_and_ends_are_finite():
    _, rows, _, model, _ = fitted(Linear())
    for t in (1e-3, 0.3, 0.999):
        alpha, sigma = model.process.alpha(t), model.process.sigma(t)
        torch.testing.assert_close(model.noise(rows, t), (rows - alpha * model.denoise(rows, t)) / sigma)
        torch.testing.assert_close(model.score(rows, t), -model.noise(rows, t) / sigma)
    assert model.denoise(rows, 1.0).isfinite().all()
    assert model.score(rows, 0.0).isfinite().all()
    torch.testing.assert_close(model.denoise(rows, 0.0), rows)


def test_levels_are_interpolated():
    """At a level its own B; between two the mean of what each says; one time a row as a single time for all."""
    _, rows, base, model, _ = fitted()
    times = model.process.time(torch.linspace(-8, 11, 23, dtype=F64))
    t = times[torch.arange(len(rows)) % 23]
    together = model.noise(rows, t)
    for k in range(23):
        torch.testing.assert_close(together[k::23], model.noise(rows[k::23], times[k]))
    k = 9
    halves = (model.log_snr[k] + model.log_snr[k + 1]) / 2
    alone = [
        RidgeScore(base, model.weights, model.bias, model.log_snr[:2], model.output[[j, j]])
        for j in (k, k + 1)
    ]
    t = model.process.time(halves)
    torch.testing.assert_close(model.noise(rows, t), sum(m.noise(rows, t) for m in alone) / 2)


def test_gaussian_rows_switch_the_residual_off():
    """Null case: with nothing beyond the base, the model stays the base on most levels and within .005 nats."""
    off = []
    for seed in range(4):
        rows = normals(500, 3, seed=seed)
        base = GaussianScore(rows.mean(0), torch.cov(rows.T), VP())
        generator = torch.Generator().manual_seed(seed)
        model, history = fit_ridge_score(rows, base, n_features=32, generator=generator)
        off.append(float((history.gain == 0).double().mean()))
        assert history.nats < 0.005
        blocks = model.output.square().sum((1, 2))
        assert (blocks[history.gain == 0] == 0).all()
    assert sum(off) / 4 > 0.8


def test_fits_do_not_depend_on_units_or_axes():
    """Rows rotated, scaled and moved: the same model, moved with them."""
    _, rows, base, model, _ = fitted()
    turn = torch.linalg.qr(normals(2, 2, seed=4))[0]
    moved = rows @ turn.T + 3.0
    covariance = turn @ torch.cov(rows.T) @ turn.T
    other_base = GaussianScore(moved.mean(0), covariance, base.process)
    # Eigenvectors are known up to sign; the features are tied to them.
    sign = ((turn @ base.eigenvectors) * other_base.eigenvectors).sum(0).sign()
    other_base.eigenvectors *= sign
    other, _ = fit_ridge_score(
        moved, other_base, n_features=24, bandwidths=(2.0,), generator=torch.Generator().manual_seed(2)
    )
    t = base.process.time(1.0)
    shift = 3.0 * base.process.alpha(t)
    torch.testing.assert_close(
        other.score(rows @ turn.T + shift, t), model.score(rows, t) @ turn.T, rtol=1e-5, atol=1e-5
    )


def test_single_precision_products_fit_as_well():
    law, rows, base, model, _ = fitted()
    parts = {"n_features": 24, "bandwidths": (2.0,)}
    w, b = model.weights, model.bias
    levels = NormalEquations((rows - base.mean) @ base.eigenvectors, base.eigenvalues, *_paths(model))
    double = levels.equations(levels.rows, slice(0, 24), w, b, "cos", 12)
    single = NormalEquations(
        *(a.float() for a in (levels.rows, levels.eigenvalues, levels.alpha, levels.sigma))
    )
    for a, e in zip(single.equations(single.rows, slice(0, 24), w.float(), b.float(), "cos", 12), double):
        assert (a - e).abs().max() < 1e-5 * e.abs().max()
    quick, _ = fit_ridge_score(rows.float(), base, **parts, generator=torch.Generator().manual_seed(3))
    assert quick.output.dtype == F64
    assert distance(quick, law) < 0.25 * distance(base, law)


def _paths(model):
    t = model.process.time(model.log_snr)
    return model.process.alpha(t), model.process.sigma(t)


# ------------------------------------------------------------------ variable projection


@pytest.mark.parametrize("activation", ["cos", "smooth_relu", "tanh"])
def test_the_envelope_gradient_is_that_of_the_solved_loss(activation):
    """B frozen at its optimum, against autograd through the solve and against finite differences."""
    _, rows, base, model, _ = fitted()
    levels = NormalEquations((rows[:50] - base.mean) @ base.eigenvectors, base.eigenvalues, *_paths(model))
    at, ridge, weight = (
        slice(10, 12),
        torch.tensor([1e-2, 1e-1], dtype=F64),
        torch.tensor([1.0, 0.5], dtype=F64),
    )

    def equations(w, b):
        return levels.equations(levels.rows, at, w, b, activation, 8)

    def solved(w, b):
        G, R = equations(w, b)
        B = torch.linalg.solve(G + ridge[:, None, None] * torch.eye(6, dtype=F64), R)
        return -(weight[:, None, None] * B * R).sum()

    w, b = (normals(6, 2, seed=1)).requires_grad_(True), normals(6, seed=2).requires_grad_(True)
    loss, _ = _projected_loss(*equations(w, b), ridge, weight)
    torch.testing.assert_close(loss.detach(), solved(w, b).detach())
    found = torch.autograd.grad(loss, (w, b))
    for one, other in zip(found, torch.autograd.grad(solved(w, b), (w, b))):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-10)
    step = torch.zeros_like(w)
    step[2, 1] = 1e-5
    difference = (solved(w + step, b) - solved(w - step, b)) / 2e-5
    torch.testing.assert_close(found[0][2, 1], difference.detach(), rtol=1e-5, atol=1e-8)


def test_refined_weights_are_better_and_the_budget_is_kept():
    law, _, _, model, _ = fitted(bandwidths=(1.0,))
    *_, better, history = fitted(bandwidths=(1.0,), evaluations=12)
    assert len(history.held_out) <= 12
    assert min(history.held_out) < history.held_out[0]
    assert distance(better, law) < 0.8 * distance(model, law)
