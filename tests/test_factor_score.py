"""The factor-structured score against dense covariances, autograd, direct draws and rejection."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from finediff.diffusion.exact import FactorScore, GaussianScore, MixtureFactors, ScaleFactors
from finediff.diffusion.exact.missing import complete
from finediff.diffusion.process import VE, VP, Cosine, Linear

TOL = {"rtol": 1e-9, "atol": 1e-9}
D, K = 5, 2
V = torch.tensor([0.2, 1.0, 5.0], dtype=torch.float64)
U = torch.tensor([0.3, 1.0, 3.0], dtype=torch.float64)
W = torch.tensor(
    [[0.15, 0.1, 0.0], [0.05, 0.3, 0.1], [0.0, 0.1, 0.2]], dtype=torch.float64
)  # v along the rows
TIMES = (0.0, 0.05, 0.4, 0.9, torch.linspace(0.05, 0.95, 6).double())
PROCESSES = [VP(), VE(), Cosine(), Linear()]
every_process = pytest.mark.parametrize("process", PROCESSES, ids=lambda p: type(p).__name__)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=seeded(seed))


def eye(size):
    return torch.eye(size, dtype=torch.float64)


def parts(d=D, k=K):
    """B, diag D and the mean, none of them tidy."""
    return normal(d, k, seed=1), 0.2 + normal(d, seed=2) ** 2, 0.5 * normal(d, seed=3)


def heavy(process=None, d=D, k=K, W=W):
    """Factors and own parts with one volatility each, dependent through W."""
    B, own, mean = parts(d, k)
    days = W.sum(0)
    laws = [ScaleFactors(V, W[:, b] / days[b], k) for b in range(len(U))]
    return FactorScore(B, own, process or VP(), factors=laws, mean=mean, scales=U, weights=days)


def shifted(process):
    """Regimes of the factors, with means, that go with the own parts' volatility."""
    B, own, mean = parts()
    laws = [
        MixtureFactors(
            [0.7, 0.3], normal(2, K, seed=s), torch.stack([eye(K), s * torch.ones(K, K, dtype=torch.float64)])
        )
        for s in (4, 5, 6)
    ]
    return FactorScore(B, own, process, factors=laws, mean=mean, scales=U, weights=W.sum(0))


def days_of(model):
    """(weight, mean (d,), covariance (d, d)) of every Gaussian day of a model."""
    B, own, mean = model.loadings, model.idiosyncratic_variance, model.mean
    for u, weight, law in zip(model.scales, model.weights, model.laws):
        if isinstance(law, ScaleFactors):
            inner = [
                (w, torch.zeros(law.k).double(), v * eye(law.k)) for w, v in zip(law.weights, law.scales)
            ]
        else:
            inner = zip(law.weights, law.means, law.covariances)
        for w, m, S in inner:
            if weight * w > 0:
                yield weight * w, mean + B @ m, B @ S.double() @ B.T + u * own.diag()


def dense_log_density(model, x, t):
    """log p_t(x): the sum over days of normals with d x d covariances, row by row."""
    alpha, sigma = (v.reshape(-1, 1).expand(len(x), 1) for v in model.process.levels(t, x))
    logs = []
    for weight, m, S in days_of(model):
        C = alpha[:, :, None] ** 2 * S + sigma[:, :, None] ** 2 * eye(x.shape[1])
        gap = x - alpha * m
        square = (gap * torch.linalg.solve(C, gap)).sum(1)
        logs.append(weight.log() - 0.5 * (square + torch.logdet(2 * torch.pi * C)))
    return torch.stack(logs, 1).logsumexp(1)


def gradient(function, x):
    x = x.detach().requires_grad_(True)
    return torch.autograd.grad(function(x).sum(), x)[0]


MODELS = {
    "gaussian": lambda p: FactorScore(*parts()[:2], p, mean=parts()[2]),
    "heavy factors": lambda p: FactorScore(*parts()[:2], p, factors=ScaleFactors(V, W.sum(1), K)),
    "heavy own parts": lambda p: FactorScore(*parts()[:2], p, scales=U, weights=W.sum(0)),
    "both": heavy,
    "regimes": shifted,
    "no factor": lambda p: heavy(p, k=0),
    "d factors": lambda p: heavy(p, k=D),
    "one asset": lambda p: heavy(p, d=1, k=1),
}
every_model = pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)
x_of = lambda model, n=6, seed=9: 2 * normal(n, len(model.mean), seed=seed)  # noqa: E731


# ------------------------------------------------------------------------------------------------ laws


@every_process
@every_model
def test_density_and_score_are_those_of_dense_covariances(build, process):
    model = build(process)
    x = x_of(model)
    for t in TIMES:
        torch.testing.assert_close(model.log_prob(x, t), dense_log_density(model, x, t), **TOL)
        expected = gradient(lambda y, t=t: dense_log_density(model, y, t), x)
        torch.testing.assert_close(model.score(x, t), expected, **TOL)
        torch.testing.assert_close(gradient(lambda y, t=t: model.log_prob(y, t), x), expected, **TOL)


@every_process
@every_model
def test_tweedie(build, process):
    model = build(process)
    x = x_of(model)
    for t in (*TIMES, 1.0):
        alpha, sigma = process.levels(t, x)
        torch.testing.assert_close(
            alpha * model.denoise(x, t), x + sigma**2 * model.score(x, t), rtol=1e-9, atol=1e-9
        )
        torch.testing.assert_close(model.noise(x, t), -sigma * model.score(x, t), **TOL)


@every_model
def test_the_denoiser_is_bayes_rule_over_the_days(build):
    """E[x_0|x_t] as an average of Gaussian regressions, at times where Tweedie's division would lose digits."""
    model, process = build(VP()), VP()
    x = x_of(model)
    for t in (1e-4, 0.3, 0.999):
        alpha, sigma = process.levels(t, x)
        total, weights = 0.0, []
        for w, m, S in days_of(model):
            C = alpha**2 * S + sigma**2 * eye(len(m))
            law = torch.distributions.MultivariateNormal(alpha * m, C)
            weights.append(w * (law.log_prob(x) - dense_log_density(model, x, t)).exp())
            total = total + weights[-1][:, None] * (m + alpha * (x - alpha * m) @ torch.linalg.solve(C, S))
        torch.testing.assert_close(sum(weights), torch.ones(len(x)).double(), **TOL)
        torch.testing.assert_close(model.denoise(x, t), total, rtol=1e-8, atol=1e-8)


@every_process
@every_model
def test_rows_with_times_of_their_own_equal_rows_one_by_one(build, process):
    model, t = build(process), torch.tensor([0.0, 0.3, 0.8, 1.0]).double()
    x = x_of(model, 4)
    for name in ("denoise", "score", "log_prob", "posterior"):
        one_by_one = torch.cat([getattr(model, name)(x[i : i + 1], t[i]) for i in range(4)])
        torch.testing.assert_close(getattr(model, name)(x, t), one_by_one, rtol=1e-11, atol=1e-11)


def test_the_posterior_of_the_own_volatility_is_bayes_rule():
    model = heavy()
    x = x_of(model)
    dense = []
    for b in range(len(U)):
        one = FactorScore(*parts()[:2], VP(), factors=model.laws[b], mean=model.mean, scales=U[b : b + 1])
        dense.append(W.sum(0)[b].log() + dense_log_density(one, x, 0.2))
    torch.testing.assert_close(model.posterior(x, 0.2), torch.stack(dense, 1).softmax(1), **TOL)


@pytest.mark.parametrize("t", [0.0, 0.2, 0.9])
def test_the_law_of_factors_seen_through_any_noise(t):
    """score and whitening of `moments`, log density and regression of `ScaleFactors`, gamma a matrix."""
    root, f, alpha = normal(3, 3, seed=4), 2 * normal(7, 3, seed=5), torch.tensor(1 - t).double()
    gamma, law = root @ root.T + 0.1 * eye(3), ScaleFactors(V, W.sum(1), 3)
    days = [alpha**2 * v * eye(3) + gamma for v in V]
    normals = [torch.distributions.MultivariateNormal(torch.zeros(3).double(), C) for C in days]
    joint = torch.stack([w.log() + n.log_prob(f) for w, n in zip(W.sum(1), normals)], 1)
    P = joint.softmax(1)
    torch.testing.assert_close(law.log_prob(f, t, alpha, gamma), joint.logsumexp(1), **TOL)
    solved = torch.stack([torch.linalg.solve(C, f.T).T for C in days], 1)
    score, white, day = law.moments(f, alpha.expand(7, 1), gamma)
    torch.testing.assert_close(score, -(P[:, :, None] * solved).sum(1), **TOL)
    torch.testing.assert_close(day, P @ V.log(), **TOL)
    precision = torch.einsum("bm,mkl->bkl", P, torch.stack([torch.linalg.inv(C) for C in days]))
    values, vectors = torch.linalg.eigh(precision)
    expected = torch.einsum("bkl,bl,bml,bm->bk", vectors, values.sqrt(), vectors, f)
    torch.testing.assert_close(white, expected, rtol=1e-8, atol=1e-8)
    regressed = alpha * (P[:, :, None] * V[:, None] * solved).sum(1)
    torch.testing.assert_close(law.denoise(f, t, alpha, gamma), regressed, **TOL)


# --------------------------------------------------------------------------- special cases and equivariance


@pytest.mark.parametrize("k", [0, 2, D])
def test_one_volatility_of_one_is_the_gaussian_of_the_covariance(k):
    B, own, mean = parts(k=k)
    dense = GaussianScore(mean, B @ B.T + own.diag(), VP())
    x = normal(6, D)
    for factors in (None, ScaleFactors([1.0], [1.0], k)):
        model = FactorScore(B, own, VP(), factors=factors, mean=mean)
        for name in ("score", "denoise", "log_prob"):
            torch.testing.assert_close(getattr(model, name)(x, 0.3), getattr(dense, name)(x, 0.3), **TOL)


def test_turned_loadings_are_the_same_law():
    """Factors without directions of their own: B Q has the law of B."""
    model, Q = heavy(), torch.linalg.qr(normal(K, K, seed=8))[0]
    turned = FactorScore(
        model.loadings @ Q,
        model.idiosyncratic_variance,
        VP(),
        factors=list(model.laws),
        mean=model.mean,
        scales=U,
        weights=W.sum(0),
    )
    x = x_of(model)
    for t in (0.0, 0.4):
        torch.testing.assert_close(turned.log_prob(x, t), model.log_prob(x, t), **TOL)
        torch.testing.assert_close(turned.denoise(x, t), model.denoise(x, t), **TOL)
    torch.testing.assert_close(turned.project(x), model.project(x) @ Q, **TOL)


def test_permuted_assets_permute():
    model, order = heavy(), [3, 0, 4, 1, 2]
    B, own, mean = (value[order] for value in parts())
    other = FactorScore(B, own, VP(), factors=list(model.laws), mean=mean, scales=U, weights=W.sum(0))
    x = x_of(model)
    for t in (0.0, 0.4):
        torch.testing.assert_close(other.score(x[:, order], t), model.score(x, t)[:, order], **TOL)
        torch.testing.assert_close(other.denoise(x[:, order], t), model.denoise(x, t)[:, order], **TOL)


def test_float32_is_enough():
    exact, single = heavy(), heavy().float()
    x = x_of(exact, 50)
    for t in (0.02, 0.4, 0.98):
        for name in ("denoise", "noise"):
            value = getattr(single, name)(x.float(), t)
            assert value.dtype == torch.float32
            torch.testing.assert_close(value.double(), getattr(exact, name)(x, t), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        single.sample(9, seeded()).double().mean(), single.sample(9, seeded()).double().mean()
    )


# --------------------------------------------------------------------------------------------- exact draws


def direct(model, n, seed):
    """m + B sqrt(v) f + sqrt(u) e, written down."""
    rng = np.random.default_rng(seed)
    B, own, mean = (np.asarray(v) for v in (model.loadings, model.idiosyncratic_variance, model.mean))
    cells = rng.choice(W.numel(), n, p=W.flatten().numpy())
    v, u = V.numpy()[cells // len(U)], U.numpy()[cells % len(U)]
    f, e = rng.standard_normal((n, B.shape[1])), rng.standard_normal((n, len(B)))
    return mean + np.sqrt(v)[:, None] * f @ B.T + np.sqrt(u * 1.0)[:, None] * np.sqrt(own) * e


def mixture_cdf(model, w):
    weights, means, sds = zip(
        *((float(p), float(m @ w), math.sqrt(float(w @ S @ w))) for p, m, S in days_of(model))
    )
    return lambda y: sum(p * stats.norm.cdf(y, m, s) for p, m, s in zip(weights, means, sds))


def worst_z(values):
    """The largest |mean| over its standard error, over the columns of values (n, ...)."""
    values = torch.as_tensor(values).reshape(len(values), -1)
    return float((values.mean(0) / (values.std(0) / math.sqrt(len(values)))).abs().max())


def covariance_of(model):
    mean = sum(p * m for p, m, _ in days_of(model))
    return mean, sum(p * (S + torch.outer(m - mean, m - mean)) for p, m, S in days_of(model))


@every_model
def test_draws_have_the_law(build):
    """Every entry of mean and covariance, Kolmogorov-Smirnov along single assets and mixed portfolios."""
    model, n = build(VP()), 40_000
    x = model.sample(n, seeded(1))
    mean, covariance = covariance_of(model)
    centred = x - mean
    assert worst_z(centred) < 4.5
    assert worst_z(centred[:, :, None] * centred[:, None, :] - covariance) < 4.5
    for seed in range(4):
        w = normal(len(mean), seed=seed)
        w = w if seed else eye(len(mean)).double()[0]
        assert stats.kstest((x @ w).numpy(), mixture_cdf(model, w)).pvalue > 1e-3


def test_draws_are_those_of_factors_and_own_parts_added_up():
    """Also jointly: sizes of the part along the factors and across it, and their product."""
    model, n = heavy(), 30_000
    one, two = model.sample(n, seeded(3)), torch.as_tensor(direct(model, n, 4))
    across = lambda x: (x - model.mean) - model.project(x) @ model.loadings.T  # noqa: E731
    for f in (
        lambda x: model.project(x).square().sum(1),
        lambda x: across(x).square().sum(1),
        lambda x: model.project(x).square().sum(1) * across(x).square().sum(1),
        lambda x: (x - model.mean).amax(1),
    ):
        assert stats.ks_2samp(f(one), f(two)).pvalue > 1e-3


def test_the_formula_needs_its_complement():
    """r = B f + (I - B Gamma B' D^-1) e has covariance B B' + D by algebra; B f + e counts B Gamma B' twice."""
    B, own, _ = parts()
    model = FactorScore(B, own, VP())
    gamma = model.gamma
    torch.testing.assert_close(gamma, torch.linalg.inv(B.T @ (B / own[:, None])), **TOL)
    P = eye(D) - B @ gamma @ B.T / own
    seen = B @ (eye(K) + gamma) @ B.T
    torch.testing.assert_close(seen + P @ own.diag() @ P.T, B @ B.T + own.diag(), **TOL)
    x = model.sample(40_000, seeded(5))
    assert worst_z(x[:, :, None] * x[:, None, :] - (B @ B.T + own.diag())) < 4.5
    f = model.laws[0].observe(40_000, gamma, seeded(6))
    naive = f @ B.T + normal(40_000, D, seed=7) * own.sqrt()
    assert worst_z(naive[:, :, None] * naive[:, None, :] - (B @ B.T + own.diag())) > 20
    assert worst_z(naive[:, :, None] * naive[:, None, :] - (seen + own.diag())) < 4.5


def test_what_is_seen_of_the_factors_and_the_complement():
    """f_hat of a draw has the law of F + N(0, u Gamma_0), and given u the complement is independent of it."""
    B, own, mean = parts()
    model = FactorScore(B, own, VP(), factors=ScaleFactors(V, W.sum(1), K), mean=mean)
    x = model.sample(40_000, seeded(8))
    f = model.project(x)
    law, gamma = model.laws[0], model.gamma
    for seed in range(3):
        w = normal(K, seed=seed)
        sds = [math.sqrt(float(w @ (v * eye(K) + gamma) @ w)) for v in V]
        cdf = lambda y, sds=sds: sum(float(p) * stats.norm.cdf(y, 0, s) for p, s in zip(W.sum(1), sds))  # noqa: E731
        assert stats.kstest((f @ w).numpy(), cdf).pvalue > 1e-3
        assert stats.kstest((law.observe(20_000, gamma, seeded(seed)) @ w).numpy(), cdf).pvalue > 1e-3
    rest = (x - mean) - f @ B.T
    assert worst_z(rest[:, :, None] * f[:, None, :]) < 4.5
    squares = rest.square() - rest.square().mean(0)
    assert worst_z(squares[:, :, None] * (f.square() - f.square().mean(0))[:, None, :]) < 4.5


def test_small_parts_in_cache_are_the_same_law(monkeypatch):
    monkeypatch.setattr("finediff.diffusion.exact.factor._IN_CACHE", 7 * D)
    model = heavy()
    x = model.sample(20_000, seeded(2))
    w = normal(D, seed=3)
    assert stats.kstest((x @ w).numpy(), mixture_cdf(model, w)).pvalue > 1e-3
    assert len(torch.unique(x, dim=0)) == len(x)


def test_draws_of_factors_given_what_is_seen():
    """Given f the pair (F, F') is exchangeable: the moments of draws with functions of f are those of F."""
    law, n, gamma = ScaleFactors(V, W.sum(1), 2), 60_000, torch.tensor([[0.8, 0.3], [0.3, 0.5]]).double()
    F = law.sample(n, seeded(1))
    for alpha in (torch.tensor(1.0).double(), torch.rand(n, 1, dtype=torch.float64, generator=seeded(2))):
        f = alpha * F + normal(n, 2, seed=3) @ torch.linalg.cholesky(gamma).T
        at = gamma if alpha.ndim == 0 else gamma.expand(n, 2, 2)
        again = law.sample_posterior(f, alpha, at, seeded(4))
        assert worst_z(again - law.denoise(f, 0.5, alpha, at)) < 4.5
        given = torch.stack([torch.ones(n).double(), f[:, 0].tanh(), f.norm(dim=1)], 1)
        gap = again[:, :, None] * again[:, None, :] - F[:, :, None] * F[:, None, :]
        assert worst_z(gap.reshape(n, -1, 1) * given[:, None, :]) < 4.5
        assert stats.ks_2samp(again.square().sum(1), F.square().sum(1)).pvalue > 1e-3


# ----------------------------------------------------------------------------------------- given a wish


def rejected(model, keep, n=400_000, seed=11):
    x = model.sample(n, seeded(seed))
    return x[keep(x)]


def same_law(one, two, directions=3):
    d = one.shape[1]
    for seed in range(directions):
        w = normal(d, seed=20 + seed)
        assert stats.ks_2samp(one @ w, two @ w).pvalue > 1e-3
    size = lambda x: (x - two.mean(0)).square().sum(1)  # noqa: E731
    assert stats.ks_2samp(size(one), size(two)).pvalue > 1e-3


INF = math.inf
BANDS = {
    "one asset falls": ([[1.0, 0, 0, 0, 0]], [-INF], [-2.5]),
    "between": ([[0, 0, 1.0, 0, 0]], [0.5], [1.0]),
    "a portfolio": ([[0.4, 0.1, 0.1, 0.2, 0.2]], [1.0], [INF]),
    "two at once": ([[1.0, 0, 0, 0, 0], [0, 0, 0, 1.0, 0]], [-INF, 0.2], [-0.5, 1.5]),
}


@pytest.mark.parametrize("case", BANDS)
def test_bands_are_those_of_rejection(case):
    A, low, high = (torch.tensor(value, dtype=torch.float64) for value in BANDS[case])
    model, n = heavy(), 6000
    x = model.sample_given(A, low.expand(n, -1), high.expand(n, -1), seeded(1))
    y = x @ A.T
    assert (y >= low - 1e-12).all()
    assert (y <= high + 1e-12).all()
    twin = rejected(model, lambda z: ((z @ A.T >= low) & (z @ A.T <= high)).all(1))
    assert len(twin) > 2000
    same_law(x, twin)


def given_point(model, A, b):
    """Weights, means and covariances of the days of x given A x = b: Gaussian conditioning, dense."""
    out = []
    for p, m, S in days_of(model):
        C = A @ S @ A.T
        gain = torch.linalg.solve(C, A @ S).T
        law = torch.distributions.MultivariateNormal(A @ m, C)
        out.append((float(p.log() + law.log_prob(b)), m + gain @ (b - A @ m), S - gain @ A @ S))
    logs = np.array([entry[0] for entry in out])
    weights = np.exp(logs - logs.max())
    return weights / weights.sum(), [m for _, m, _ in out], [S for *_, S in out]


@pytest.mark.parametrize("b", [[-1.0, 0.4], [-9.0, 8.0], [0.2, 0.1]], ids=str)
def test_points_hold_exactly_and_the_others_have_their_conditional_law(b):
    model, n = heavy(), 20_000
    A = torch.tensor([[1.0, 0, 0, 0, 0], [0, 0.5, 0.5, 0, 0]], dtype=torch.float64)
    b = torch.tensor(b, dtype=torch.float64)
    x = model.sample_given(A, b.expand(n, -1), b.expand(n, -1), seeded(2))
    torch.testing.assert_close(x @ A.T, b.expand(n, -1), rtol=0, atol=1e-12)
    weights, means, covariances = given_point(model, A, b)
    for seed in range(3):
        w = normal(D, seed=30 + seed)
        m, s = np.array([float(m @ w) for m in means]), [math.sqrt(float(w @ S @ w)) for S in covariances]
        cdf = lambda y, m=m, s=s: sum(p * stats.norm.cdf(y, a, c) for p, a, c in zip(weights, m, s))  # noqa: E731
        assert stats.kstest((x @ w).numpy(), cdf).pvalue > 1e-3


def test_every_row_may_have_a_wish_of_its_own():
    """Rows drawn from the model, one asset kept, the others drawn again: the law is the model's."""
    model, n = heavy(), 1500
    A = eye(D)[:1]
    first = model.sample(n, seeded(3))[:, :1]
    x = model.sample_given(A, first, first, seeded(4))
    torch.testing.assert_close(x[:, :1], first, rtol=0, atol=1e-12)
    for seed in range(4):
        w = normal(D, seed=seed)
        assert stats.kstest((x @ w).numpy(), mixture_cdf(model, w)).pvalue > 1e-3


@pytest.mark.parametrize("k", [0, D])
def test_wishes_without_factors_and_with_as_many_as_assets(k):
    model, n = heavy(k=k), 5000
    A, high = eye(D)[:1], torch.full((n, 1), -1.0).double()
    x = model.sample_given(A, torch.full_like(high, -INF), high, seeded(5))
    same_law(x, rejected(model, lambda z: z[:, 0] <= -1))


def test_a_band_has_draws_of_its_own_for_every_row():
    """... also where only the loudest days meet it."""
    model, n = heavy(), 4000
    A, high = eye(D)[:1], torch.full((n, 1), -15.0).double()
    x = model.sample_given(A, torch.full_like(high, -INF), high, seeded(6))
    assert len(torch.unique(x[:, 0])) > 0.8 * n


def test_a_wish_needs_laws_that_have_a_conditional_one():
    A, b = eye(D)[:1], torch.zeros(3, 1).double()
    with pytest.raises(ValueError, match="expected ScaleFactors for every scale, got another law"):
        shifted(VP()).sample_given(A, b, b, seeded())


# --------------------------------------------------------------------------------------- missing entries


def test_completed_rows_have_the_law():
    """Rows of the model with holes at random, filled again, are rows of the model; what was seen stays."""
    model, n = heavy(), 30_000
    X = model.sample(n, seeded(1))
    holes = torch.rand(n, D, generator=seeded(2)) < 0.4
    holes[:, 0] &= holes[:, 1:].sum(1) < 2
    X[holes] = torch.nan
    filled = complete(model, X, seeded(3))
    kept = (~holes).sum(1) >= K
    assert 0.5 < float(kept.double().mean()) < 1
    assert len(filled) == int(kept.sum())
    # The pattern is independent of the values, so rows that are left out do not change the law.
    assert torch.equal(filled[~holes[kept]], X[kept][~holes[kept]])
    for seed in range(4):
        w = normal(D, seed=seed)
        assert stats.kstest((filled @ w).numpy(), mixture_cdf(model, w)).pvalue > 1e-3
    mean, covariance = covariance_of(model)
    centred = filled - mean
    assert worst_z(centred[:, :, None] * centred[:, None, :] - covariance) < 4.5


def test_filled_entries_have_their_conditional_law():
    model, n = heavy(), 20_000
    row = torch.tensor([-1.5, torch.nan, 0.3, 1.0, torch.nan], dtype=torch.float64)
    filled = complete(model, row.expand(n, -1), seeded(4))
    A = eye(D)[[0, 2, 3]]
    weights, means, covariances = given_point(model, A, row[[0, 2, 3]])
    for w in normal(3, D, seed=5):
        m, s = [float(m @ w) for m in means], [math.sqrt(float(w @ S @ w)) for S in covariances]
        cdf = lambda y, m=m, s=s: sum(p * stats.norm.cdf(y, a, c) for p, a, c in zip(weights, m, s))  # noqa: E731
        assert stats.kstest((filled @ w).numpy(), cdf).pvalue > 1e-3


def test_without_holes_and_without_factors():
    model = heavy(k=0)
    X = model.sample(50, seeded(1))
    assert complete(model, X, seeded()) is X
    X[:, 1] = torch.nan
    filled = complete(model, X.expand(50, -1), seeded(2))
    assert torch.equal(filled[:, [0, 2, 3, 4]], X[:, [0, 2, 3, 4]])
    assert filled.isfinite().all()


# --------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ScaleFactors([1.0, 0.0], [0.5, 0.5], 2), "expected positive finite scales"),
        (lambda: ScaleFactors([1.0, 2.0], [0.5, 0.6], 2), "sum 1"),
        (
            lambda: FactorScore(np.ones((3, 1)), np.ones(3), VP(), scales=[1.0, -1.0]),
            "positive finite scales",
        ),
        (lambda: FactorScore(np.ones((3, 1)), np.ones(3), VP(), scales=[1, 2.0], weights=[1.0]), "weights"),
        (
            lambda: FactorScore(
                np.ones((3, 1)), np.ones(3), VP(), scales=[1, 2.0], factors=[ScaleFactors([1.0], [1.0], 1)]
            ),
            "expected a law of the factors for each scale, got 1 for 2 scales",
        ),
        (
            lambda: FactorScore(np.ones((3, 1)), np.ones(3), VP(), factors=ScaleFactors([1.0], [1.0], 2)),
            "factors",
        ),
    ],
)
def test_wrong_arguments_are_refused(call, message):
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)
