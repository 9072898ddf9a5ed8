"""What is learned of the factors' law: nothing where the base is right, the truth's own score where it is known."""

import itertools
import math

import pytest
import torch
from scipy import stats

from finediff.diffusion.exact import FactorScore, MixtureFactors, ScaleFactors
from finediff.diffusion.factor_residual import LEVELS, FactorPath, learn_factors, with_residual
from finediff.diffusion.likelihood import held_out_nats
from finediff.diffusion.process import VE, VP, Cosine, Linear
from finediff.diffusion.residual import features, interpolate
from finediff.diffusion.sample import ProbabilityFlow

D, K, N = 8, 3, 2000
V = torch.tensor([0.25, 2.5], dtype=torch.float64) / 1.375
U = torch.tensor([0.6, 1.4], dtype=torch.float64)
PROCESSES = [VP(), VE(), Cosine(), Linear()]
every_process = pytest.mark.parametrize("process", PROCESSES, ids=lambda p: type(p).__name__)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=seeded(seed))


def half(size):
    return torch.full((size,), 1 / size, dtype=torch.float64)


def with_law(law, process=None):
    B, own, mean = normal(D, K, seed=1), 0.1 + 0.5 * normal(D, seed=2) ** 2, 0.3 * normal(D, seed=3)
    return FactorScore(B, own, process or VP(), factors=law, mean=mean, scales=U, weights=half(2))


def base(process=None):
    """One volatility for all factors."""
    return with_law(ScaleFactors(V, half(2), K), process)


def truth(process=None):
    """Every factor has a volatility of its own, each with the base's margins: what a scale mixture cannot say."""
    covariances = torch.stack([torch.stack(v).diag() for v in itertools.product(V, repeat=K)])
    return with_law(MixtureFactors(half(2**K), torch.zeros(2**K, K).double(), covariances), process)


def learned(X, seed=5, model=None, **arguments):
    return learn_factors(
        model or base(), X, generator=seeded(seed), **({"draws": 4, "levels": 12} | arguments)
    )


@pytest.fixture(scope="module")
def planted():
    """Fitted to rows of the truth, and what cross-validation says."""
    return learned(truth().sample(N, seeded(1)))


def some_weights(seed=8, levels=5):
    return torch.linspace(*LEVELS, levels).double(), 0.05 * normal(levels, K, 18, seed=seed)


# ------------------------------------------------------------------------------------------- the path of noise


@pytest.mark.parametrize("u", [0.6, 1.4])
def test_the_nodes_are_the_noises_of_the_projection(u):
    """N(s) = Gamma(s) - Gamma(0) by dense inverses, at the levels asked for, with its roots."""
    model, levels = base(), torch.linspace(*LEVELS, 7).double()
    own, B = u * model.idiosyncratic_variance, model.loadings
    gamma = lambda s2: torch.linalg.inv(B.T @ (B / (own + s2)[:, None]))  # noqa: E731
    nodes = FactorPath(model).nodes(levels, u)
    for level, node in zip(levels.tolist(), nodes):
        assert -float(torch.logdet(node.noise)) / K == pytest.approx(level, abs=1e-9)
        # Which s? The one that has this Gamma: bisection on its trace.
        low, high = -40.0, 40.0
        for _ in range(200):
            middle = (low + high) / 2
            low, high = (
                (middle, high)
                if float(gamma(math.exp(middle)).trace() - node.gamma.trace()) < 0
                else (low, middle)
            )
        torch.testing.assert_close(node.gamma, gamma(math.exp(low)), rtol=1e-8, atol=1e-10)
        torch.testing.assert_close(node.noise, node.gamma - gamma(0.0), rtol=1e-4, atol=1e-9)
        torch.testing.assert_close(node.root @ node.root, node.noise, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(
            node.root @ node.inverse_root, torch.eye(K, dtype=torch.float64), rtol=1e-8, atol=1e-8
        )


def test_small_noises_keep_their_digits():
    """Where Gamma(s) and Gamma(0) agree to twelve digits: N is s^2 Gamma_0 B' D^-2 B Gamma_0 there."""
    model = base()
    B, own, gamma = model.loadings, model.idiosyncratic_variance, model.gamma
    node = FactorPath(model).nodes(torch.tensor([26.0]).double(), 1.0)[0]
    shape = gamma @ B.T @ (B / own[:, None] ** 2) @ gamma
    s2 = math.exp((-26.0 * K - float(torch.logdet(shape))) / K)
    torch.testing.assert_close(node.noise, s2 * shape, rtol=1e-8, atol=0)


# ------------------------------------------------------------------------------------------------------- laws


@every_process
def test_the_score_is_the_base_s_and_what_was_regressed(process):
    """Score of R by the paper's formula, where alpha grad log p_fac is the base's less N^-1/2 h, h by hand."""
    plain, (levels, weights) = base(process), some_weights()
    plain = FactorScore(
        plain.loadings,
        plain.idiosyncratic_variance,
        process,
        factors=plain.laws[0],
        mean=plain.mean,
        scales=[1.3],
    )
    model, x = with_residual(plain, levels, weights), normal(9, D, seed=4) * 2
    B, own, law = plain.loadings, 1.3 * plain.idiosyncratic_variance, plain.laws[0]
    for t in (0.05, 0.4, 0.8, torch.linspace(0.05, 0.9, 9).double()):
        alpha, sigma = (value.reshape(-1).expand(9) for value in process.levels(t, x))
        for i in range(9):
            a, s2 = alpha[i], (sigma[i] / alpha[i]) ** 2
            noise = a**2 * own + sigma[i] ** 2
            gamma_s = torch.linalg.inv(B.T @ (B / (own + s2)[:, None]))
            gain = gamma_s - torch.linalg.inv(B.T @ (B / own[:, None]))
            values, E = torch.linalg.eigh(gain)
            r = x[i] - a * plain.mean
            f = gamma_s @ B.T @ (r / (own + s2)) / a
            score, P, day = law.moments(f[None], torch.ones(1, 1).double(), gamma_s)
            phi = features(P.T, (f / (1 + gamma_s.diagonal()).sqrt())[:, None], day)
            at = interpolate(-values.log().mean()[None], levels, weights)
            h = torch.einsum("kbp,bkp->bk", phi, at)[0]
            score = score[0] - E @ ((E.T @ h) / values.sqrt())
            # f_hat/alpha has this score, f_hat that over alpha; Gamma_t = alpha^2 Gamma(s).
            expected = (B @ (a**2 * gamma_s) @ score / a - (r - a * B @ f)) / noise
            time = t if isinstance(t, float) else t[i]
            torch.testing.assert_close(model.score(x[i : i + 1], time)[0], expected, rtol=1e-6, atol=1e-6)
        one_by_one = [model.denoise(x[i : i + 1], t if isinstance(t, float) else t[i]) for i in range(9)]
        torch.testing.assert_close(model.denoise(x, t), torch.cat(one_by_one), rtol=1e-7, atol=1e-9)
        alpha, sigma = process.levels(t, x)
        torch.testing.assert_close(
            alpha * model.denoise(x, t), x + sigma**2 * model.score(x, t), rtol=1e-9, atol=1e-9
        )
    assert not torch.allclose(model.score(x, 0.4), plain.score(x, 0.4), atol=1e-3)


@every_process
def test_at_the_ends_of_time_it_is_the_base(process):
    """... beyond the levels, where VP and VE end too with levels so near to each other."""
    model, plain = with_residual(base(process), *some_weights(levels=29)), base(process)
    x = normal(5, D, seed=4)
    for t in (0.0, 1e-9, 1.0):
        value = model.denoise(x, t)
        torch.testing.assert_close(value, plain.denoise(x, t), rtol=1e-9, atol=1e-9)
        assert model.score(x, max(t, 1e-9)).isfinite().all()


def test_permuted_assets_permute():
    order, (levels, weights), plain = torch.randperm(D, generator=seeded(2)), some_weights(), base()
    other = FactorScore(
        plain.loadings[order],
        plain.idiosyncratic_variance[order],
        VP(),
        factors=list(plain.laws),
        mean=plain.mean[order],
        scales=U,
        weights=half(2),
    )
    one, other = with_residual(plain, levels, weights), with_residual(other, levels, weights)
    x = normal(6, D, seed=4)
    for t in (0.05, 0.4, 0.8):
        torch.testing.assert_close(
            other.denoise(x[:, order], t), one.denoise(x, t)[:, order], rtol=1e-7, atol=1e-9
        )


# -------------------------------------------------------------------------------------------------- null cases


@every_process
def test_without_weights_the_score_is_the_base_s(process):
    model, plain = with_residual(base(process), [-6.0, 1.0, 8.0], torch.zeros(3, K, 18)), base(process)
    x = 2 * normal(9, D, seed=4)
    for t in (0.0, 0.01, 0.4, 0.97, torch.linspace(0.02, 0.98, 9).double()):
        assert torch.equal(model.denoise(x, t), plain.denoise(x, t))
        assert torch.equal(model.score(x, t), plain.score(x, t))
        assert torch.equal(model.log_prob(x, t), plain.log_prob(x, t))


def test_without_weights_draws_are_the_base_s():
    """24 steps of the flow are a map of the base's law to itself, up to their error."""
    model = with_residual(base(), [-6.0, 8.0], torch.zeros(2, K, 18))
    one, two = (m.sample(20_000, seeded(s)) for m, s in ((model, 1), (base(), 2)))
    for seed in range(3):
        w = normal(D, seed=seed)
        assert stats.ks_2samp(one @ w, two @ w).pvalue > 1e-3
    f, g = (base().project(x) for x in (one, two))
    for statistic in (lambda f: f.square().sum(1), lambda f: f[:, 0], lambda f: (f[:, 0] * f[:, 1]).abs()):
        assert stats.ks_2samp(statistic(f), statistic(g)).pvalue > 1e-3
    ratio = f.var(0) / g.var(0)
    error = 2 * math.sqrt(4 / 20_000)
    assert float((ratio - 1).abs().max()) < 0.01 + 4 * error


@pytest.mark.parametrize("seed", [1, 2])
def test_where_the_base_is_right_little_is_learned(seed):
    model, nats = learned(base().sample(N, seeded(seed)))
    found = held_out_nats(model, base().sample(N, seeded(9)), base(), repeats=1, generator=seeded(3))
    print(f"\n{nats:.5f} cross-validated, {found.gain:.5f} +- {found.standard_error:.5f} held out")
    assert nats < 4e-3
    assert abs(found.gain) < 2 * found.standard_error + 2e-3


def test_gaussian_factors_learn_nothing():
    law = ScaleFactors([1.0], [1.0], K)
    model, nats = learned(with_law(law).sample(N, seeded(1)), model=with_law(law))
    assert nats < 1e-3 * K
    x = normal(5, D, seed=4)
    torch.testing.assert_close(model.denoise(x, 0.3), with_law(law).denoise(x, 0.3), rtol=0.02, atol=0.02)


# ------------------------------------------------------------------------------------------- a truth to be found


def test_what_the_base_misses_is_learned(planted):
    """Held out, in nats by I-MMSE, beside what the true law has over the base by its density."""
    model, nats = planted
    x = truth().sample(2000, seeded(2))
    possible = truth().log_prob(x) - base().log_prob(x)
    found = held_out_nats(model, x, base(), repeats=1, generator=seeded(3))
    print(f"\n{nats:.4f} cross-validated, {found.gain:.4f} +- {found.standard_error:.4f} held out,", end=" ")
    print(f"{float(possible.mean()):.4f} possible")
    assert found.gain > 4 * found.standard_error
    assert nats == pytest.approx(found.gain, abs=4 * found.standard_error + 0.1 * found.gain)
    assert 0.6 * float(possible.mean()) < found.gain < float(possible.mean()) + 4 * found.standard_error


@pytest.mark.parametrize("t", [0.05, 0.2, 0.4])
def test_the_score_is_nearer_to_the_truth(planted, t):
    x0 = truth().sample(3000, seeded(4))
    x = VP().perturb(x0, t, normal(3000, D, seed=5))
    error = lambda m: float((m.noise(x, t) - truth().noise(x, t)).square().sum(1).mean())  # noqa: E731
    assert error(planted[0]) < 0.5 * error(base())


def test_draws_have_the_law_that_was_learned(planted):
    """Squares of the true factors are uncorrelated, the base's are not; margins are those of both."""
    model, n = planted[0], 20_000
    f, g, right = (base().project(m.sample(n, seeded(s))) for m, s in ((model, 1), (base(), 2), (truth(), 3)))

    def dependence(f):
        z = f.square().clamp(max=float(right.square().quantile(0.99)))
        C = torch.corrcoef(z.T)
        return float((C - torch.eye(K)).abs().sum() / (K * (K - 1)))

    print(
        f"\ncorrelation of squares {dependence(f):.3f}, base {dependence(g):.3f}, truth {dependence(right):.3f}"
    )
    assert dependence(f) < 0.35 * dependence(g)
    # A base that is right along every axis stays about right there.
    scale = right.std(0)
    for j in range(K):
        assert stats.ks_2samp(f[:, j] / scale[j], right[:, j] / scale[j]).statistic < 0.03
    assert float((f.var(0) / right.var(0) - 1).abs().max()) < 0.1


def test_the_reverse_process_has_the_same_law(planted):
    model, n = planted[0], 5000
    one = model.sample(n, seeded(1))
    start = normal(n, D, seed=2)
    two = ProbabilityFlow(48)(model, (n, D), start=start)
    for seed in range(6):
        w = normal(D, seed=seed)
        assert stats.ks_2samp(one @ w, two @ w).pvalue > 1e-3
    f, g = (base().project(x) for x in (one, two))
    for statistic in (lambda f: f.square().sum(1), lambda f: f.abs().amin(1), lambda f: f.prod(1)):
        assert stats.ks_2samp(statistic(f), statistic(g)).pvalue > 1e-3


def test_rows_with_one_factor():
    """k = 1: a mixture that the base does not have, skew among it, is found."""
    B, own = normal(5, 1, seed=1), torch.full((5,), 0.2).double()
    skew = MixtureFactors([0.3, 0.7], [[-1.4], [0.6]], [[[0.4]], [[0.3]]])
    true, plain = (FactorScore(B, own, VP(), factors=law) for law in (skew, ScaleFactors([1.2], [1.0], 1)))
    model, nats = learned(true.sample(N, seeded(1)), model=plain)
    assert nats > 0
    for t in (0.1, 0.3):
        x = VP().perturb(true.sample(3000, seeded(2)), t, normal(3000, 5, seed=3))
        errors = [float((m.noise(x, t) - true.noise(x, t)).square().sum(1).mean()) for m in (model, plain)]
        assert errors[0] < 0.3 * errors[1]
    f = lambda m, s: plain.project(m.sample(8000, seeded(s)))[:, 0].numpy()  # noqa: E731
    assert stats.skew(f(model, 4)) == pytest.approx(stats.skew(f(true, 5)), abs=0.15)


# --------------------------------------------------------------------------------------- seeds and refusals


def test_the_same_generator_gives_the_same_bits(planted):
    again = learned(truth().sample(N, seeded(1)))
    assert again[1] == planted[1]
    assert torch.equal(again[0].laws[0].weights, planted[0].laws[0].weights)
    assert learned(truth().sample(N, seeded(1)), seed=6)[1] != planted[1]


def test_single_precision_draws(planted):
    model = with_residual(base(), planted[0].laws[0].levels, planted[0].laws[0].weights).float()
    x = model.sample(5000, seeded(1))
    assert x.dtype == torch.float32
    w = normal(D, seed=3)
    assert stats.ks_2samp(x.double() @ w, planted[0].sample(5000, seeded(2)) @ w).pvalue > 1e-3


def test_another_noise_is_refused(planted):
    with pytest.raises(ValueError, match="expected the noise of the model that the law was learned in"):
        planted[0].laws[0].observe(5, 2 * base().gamma, seeded())


@pytest.mark.parametrize(("rows", "folds"), [(3, 5), (50, 1)])
def test_too_few_rows_or_folds_are_refused(rows, folds):
    with pytest.raises(ValueError, match=r"expected at least .* rows, got"):
        learned(base().sample(rows, seeded()), folds=folds)


def test_what_is_learned_does_not_know_a_stress():
    A, b = torch.eye(D, dtype=torch.float64)[:1], torch.zeros(3, 1).double()
    model = with_residual(base(), *some_weights())
    with pytest.raises(ValueError, match="expected ScaleFactors for every scale, got another law"):
        model.sample_given(A, b, b, seeded())
    x = normal(3, D)
    assert torch.equal(model.log_prob(x), base().log_prob(x))
