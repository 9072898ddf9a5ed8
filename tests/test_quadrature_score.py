"""The deterministic loss is the mean of the random one; what it trains is nearer the truth; the door's own refusals."""

import re

import numpy as np
import pandas as pd
import pytest
import torch
from oracle import PROCESSES, each

from finediff.diffusion.deterministic import (
    ACTIVATIONS,
    DeterministicScoreMatching,
    OneHiddenLayer,
    minimise,
)
from finediff.diffusion.exact import GaussianScore, MixtureScore
from finediff.diffusion.likelihood import held_out_nats
from finediff.diffusion.objective import DenoisingScoreMatching, ExplicitScoreMatching, Times
from finediff.diffusion.process import VP, Cosine, as_time
from finediff.diffusion.score import NetworkScore
from finediff.diffusion.train import train
from finediff.generators import QuadratureScoreGenerator, ScenarioGenerator

every_activation = pytest.mark.parametrize("activation", ACTIVATIONS)
pairs_both_ways = pytest.mark.parametrize("pairs", ["product", "series"])
TIMES = (0.03, 0.2, 0.5, 0.9)  # log-SNR 6.5 to -8


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def rows(n=6, d=3):
    return torch.randn(n, d, dtype=torch.float64, generator=seeded(1))


def fixed_model(
    activation="tanh", *, d=3, width=4, levels=None, process=None, reading="v", precondition=True
):
    """A model of one hidden layer, none of whose weights is zero and no two directions alike."""
    generator = seeded(2)
    network = OneHiddenLayer(d, width, activation, levels=levels, generator=generator)
    with torch.no_grad():
        for p in (network.v, network.C, network.d):
            p.copy_(torch.randn(p.shape, dtype=torch.float64, generator=generator))
    return NetworkScore(network, process or VP(), reading, precondition=precondition)


def within(found, draws, errors=5.0):
    """Is found the mean of the independent draws, to so many standard errors?"""
    draws = draws.detach()
    return abs(float(found) - float(draws.mean())) < errors * float(draws.std()) / len(draws) ** 0.5


# ------------------------------------------------------------------------------------------- the loss


@pairs_both_ways
@every_activation
@pytest.mark.parametrize("reading", ["v", "score as published"])
def test_the_loss_is_the_mean_over_noise(activation, reading, pairs):
    """... of |x0_hat - x_0|^2 at fixed weights and times, by 5 standard errors of 20,000 draws a row."""
    published = reading != "v"
    model = fixed_model(activation, reading="score" if published else "v", precondition=not published)
    objective = DeterministicScoreMatching(nodes=64 if activation == "relu" else 24, pairs=pairs)
    x = rows()
    generator = seeded(3)
    for t in map(as_time, TIMES):
        many = x.repeat(10_000, 1)
        noise = torch.randn(many.shape, dtype=torch.float64, generator=generator)
        with torch.no_grad():
            draws = [
                (model.denoise(model.process.perturb(many, t, z), t) - many).square().sum(1)
                for z in (noise, -noise)
            ]
            found = objective.error(model, x, t)
        assert within(found / len(x), (sum(draws) / 2).reshape(-1, len(x)).mean(1))


@pytest.mark.parametrize("process", each(PROCESSES))
@pytest.mark.parametrize("time", ["input", "nodes"])
def test_the_integral_over_time_is_the_random_loss(process, time):
    """Gauss-Legendre on 48 times against 40,000 stratified ones, noise and all; tanh, L_simple."""
    objective = DeterministicScoreMatching(nodes=16, time_nodes=48, rule="legendre", pairs="series")
    levels = DeterministicScoreMatching(time_nodes=5).levels(process) if time == "nodes" else None
    model, x = fixed_model(levels=levels, process=process), rows(40)
    random = DenoisingScoreMatching("eps", antithetic=True)
    with torch.no_grad():
        draws = torch.stack([random(model, x.repeat(50, 1), None, seeded(s)) for s in range(20)])
        # Kinks at the five levels leave the rule an error of order 1/48^2.
        assert abs(float(objective(model, x) - draws.mean())) < 5 * float(draws.std()) / 20**0.5 + (
            2e-3 * float(draws.mean()) if time == "nodes" else 0
        )


@pytest.mark.parametrize(
    ("rule", "law"), [("simpson", "log_snr"), ("simpson", "uniform"), ("legendre", "uniform")]
)
def test_times_and_weights_average_over_the_law(rule, law):
    objective = DeterministicScoreMatching(time_nodes=41, rule=rule, law=law)
    for process in (VP(), Cosine()):
        times, weights = objective.times(process)
        assert (times.diff() < 0).all()
        assert (weights > 0).all()
        assert float(weights.sum()) == pytest.approx(1)
        drawn = Times(law)(process, 4000, generator=seeded())
        assert float((weights * times).sum()) == pytest.approx(float(drawn.mean()), abs=2e-3)
        assert (objective.levels(process).diff() > 0).all()


@pytest.mark.parametrize("activation", ["silu", "tanh", "probit"])
def test_the_quadrature_converges_and_both_ways_agree(activation):
    model, x, t = fixed_model(activation), rows(), as_time(0.4)
    with torch.no_grad():
        exact = {
            pairs: float(DeterministicScoreMatching(nodes=48, pairs=pairs).error(model, x, t))
            for pairs in ("product", "series")
        }
        assert exact["product"] == pytest.approx(exact["series"], rel=1e-9)
        for pairs in exact:
            errors = [
                abs(float(DeterministicScoreMatching(nodes=q, pairs=pairs).error(model, x, t)) - exact[pairs])
                for q in (4, 8, 16)
            ]
            assert errors[2] < errors[1] < errors[0]
            assert errors[2] < 1e-4 * exact[pairs]


def test_a_naive_twin():
    """The loss of one row by a loop over units and nodes, written from the formula."""
    model, x, t, nodes = fixed_model(width=3), rows(1), as_time(0.3), 6
    network, process = model.network, model.process
    alpha, sigma = float(process.alpha(t)), float(process.sigma(t))
    level = float(process.log_snr(t)) / 10
    z, q = np.polynomial.hermite_e.hermegauss(nodes)
    q = q / q.sum()
    W, C, d_0, x0 = (a.detach().numpy() for a in (network.w, network.C[0], network.d[0], x[0]))
    b = (network.b + level * network.u).detach().numpy()
    mu, s = alpha * W @ x0 + b, sigma * np.linalg.norm(W, axis=1)
    total = sigma**2 * x0 @ x0 + alpha**2 * 3 + d_0 @ d_0 + 2 * sigma * d_0 @ x0
    for j in range(3):
        E = q @ np.tanh(mu[j] + s[j] * z)
        total += 2 * C[:, j] @ (d_0 + sigma * x0) * E
        total -= 2 * alpha * C[:, j] @ W[j] / np.linalg.norm(W[j]) * (q @ (z * np.tanh(mu[j] + s[j] * z)))
        total += C[:, j] @ C[:, j] * (q @ np.tanh(mu[j] + s[j] * z) ** 2)
        for k in range(j + 1, 3):
            rho = W[j] @ W[k] / np.linalg.norm(W[j]) / np.linalg.norm(W[k])
            for zq, wq in zip(z, q):
                for zr, wr in zip(z, q):
                    other = mu[k] + s[k] * (rho * zq + np.sqrt(1 - rho**2) * zr)
                    total += 2 * (C[:, j] @ C[:, k]) * wq * wr * np.tanh(mu[j] + s[j] * zq) * np.tanh(other)
    found = float(DeterministicScoreMatching(nodes=nodes, pairs="product").error(model, x, t).detach())
    assert found == pytest.approx(sigma**2 * total, rel=1e-12)


@pairs_both_ways
@every_activation
def test_the_gradient_is_that_of_the_loss(activation, pairs):
    """... by central differences along a random direction; for one asset too, where all directions are parallel."""
    for d in (3, 1):
        model, x, t = fixed_model(activation, d=d), rows(d=d), as_time(0.4)
        objective = DeterministicScoreMatching(nodes=7, pairs=pairs)
        parameters = list(model.parameters())
        direction = [torch.randn(p.shape, dtype=torch.float64, generator=seeded(4)) for p in parameters]
        gradient = torch.autograd.grad(objective.error(model, x, t), parameters)
        slope = sum(float((g * v).sum()) for g, v in zip(gradient, direction))
        ends = []
        for step in (-1e-6, 1e-6):
            with torch.no_grad():
                for p, v in zip(parameters, direction):
                    p += step * v
                ends.append(float(objective.error(model, x, t)))
                for p, v in zip(parameters, direction):
                    p -= step * v
        assert slope == pytest.approx((ends[1] - ends[0]) / 2e-6, rel=1e-5)


@pytest.mark.parametrize("activation", ["silu", "tanh"])
def test_the_gradient_is_the_mean_of_the_random_one(activation):
    model, x, t = fixed_model(activation), rows(), as_time(0.3)
    parameters = list(model.parameters())
    objective = DeterministicScoreMatching(nodes=24)
    exact = torch.cat([g.flatten() for g in torch.autograd.grad(objective.error(model, x, t), parameters)])
    generator, draws = seeded(5), []
    for _ in range(100):
        many = x.repeat(100, 1)
        z = torch.randn(many.shape, dtype=torch.float64, generator=generator)
        loss = (model.denoise(model.process.perturb(many, t, z), t) - many).square().sum() / 100
        draws.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)]))
    draws = torch.stack(draws)
    z = (exact - draws.mean(0)) / (draws.std(0) / len(draws) ** 0.5)
    assert z.abs().max() < 5
    assert float(z.square().mean()) < 3


def test_blocks_of_rows_add_up(monkeypatch):
    model, x = fixed_model(), rows(50)
    objective = DeterministicScoreMatching(nodes=4, time_nodes=3, pairs="product")
    whole = float(objective(model, x).detach())
    monkeypatch.setattr("finediff.diffusion.deterministic._BLOCK", 2000)
    assert sum(1 for _ in objective.blocks(model, x)) > 6
    assert float(objective(model, x).detach()) == pytest.approx(whole, rel=1e-12)


def test_weights_of_the_hidden_layer_stay_below_the_bound():
    network = OneHiddenLayer(5, 3, bound=1.5, generator=seeded())
    with torch.no_grad():
        network.v.mul_(1000)
    assert network.w.norm(dim=1).max() < 1.5
    assert network.w.norm(dim=1).min() > 1.49


def test_output_weights_are_linear_between_nodes_and_constant_beyond():
    objective = DeterministicScoreMatching(time_nodes=5)
    levels = objective.levels(VP())
    network = fixed_model(levels=levels).network
    x = rows(7)
    at = [network(x, level.expand(7)) for level in levels]
    halfway = network(x, ((levels[1] + levels[2]) / 2).expand(7))
    torch.testing.assert_close(halfway, (at[1] + at[2]) / 2)
    torch.testing.assert_close(network(x, (levels[-1] + 0.3).expand(7)), at[-1])
    torch.testing.assert_close(network(x, (levels[0] - 0.3).expand(7)), at[0])
    mixed = network(x, torch.cat([levels, levels[:2]]))
    torch.testing.assert_close(mixed[3], at[3][3])


# ---------------------------------------------------------------------------------------- training


def mixture(d, process):
    """A mixture of mean 0 and covariance I, whose law the standard normal model does not know."""
    if d == 1:
        weights = torch.tensor([0.3, 0.7], dtype=torch.float64)
        means, variances = torch.tensor([[-1.2], [0.6]], dtype=torch.float64), (0.1, 0.3)
    else:
        weights = torch.tensor([0.4, 0.35, 0.25], dtype=torch.float64)
        means = torch.tensor([[-1.2, -0.2], [0.9, 0.9], [0.5, -1.3]], dtype=torch.float64)
        variances = (0.05, 0.15, 0.1)
    covariances = torch.stack([v * torch.eye(d, dtype=torch.float64) for v in variances])
    mean = weights @ means
    second = torch.einsum("m,mij->ij", weights, covariances + means[:, :, None] * means[:, None])
    root = torch.linalg.inv(torch.linalg.cholesky(second - torch.outer(mean, mean)))
    return MixtureScore(weights, (means - mean) @ root.T, root @ covariances @ root.T, process)


def kl_bound(model, oracle):
    """1/2 int E|eps_hat - eps*|^2 d log-SNR, nats: a bound on KL(p, model)."""
    low, high = oracle.process.log_snr_range()
    x = oracle.sample(20_000, seeded(9))
    with torch.no_grad():
        error = ExplicitScoreMatching(oracle)(model, x, generator=seeded(10))
    return (high - low) / 2 * x.shape[1] * float(error)


@pytest.mark.parametrize(
    ("d", "time", "optimizer", "share"),
    [
        (1, "input", "lbfgs", 0.5),
        (1, "nodes", "lbfgs", 0.5),
        (2, "input", "lbfgs", 0.5),
        (2, "nodes", "lbfgs", 0.35),
        (2, "nodes", "adam", 0.7),
    ],
)
def test_training_comes_nearer_a_known_mixture(d, time, optimizer, share):
    oracle = mixture(d, VP())
    x = oracle.sample(400, seeded(7))
    objective = DeterministicScoreMatching(nodes=8, time_nodes=9)
    levels = objective.levels(VP()) if time == "nodes" else None
    model = NetworkScore(OneHiddenLayer(d, 12, "tanh", levels=levels, generator=seeded(8)), VP())
    base = kl_bound(model, oracle)
    history = minimise(model, x, objective, optimizer=optimizer, iterations=50, ridge=1e-5)
    found = kl_bound(model, oracle)
    print(
        f"\n{d}-D, {time}, {optimizer}: KL bound {base:.3f} -> {found:.3f} nats, loss {history.train_loss[::10]}"
    )
    assert found < share * base


def test_nothing_is_found_in_the_standard_normal():
    """A null case: the held-out loss keeps the start, or all but."""
    x = torch.randn(600, 2, dtype=torch.float64, generator=seeded(11))
    model = NetworkScore(OneHiddenLayer(2, 12, generator=seeded(8)), VP())
    truth = GaussianScore(torch.zeros(2).double(), torch.eye(2).double(), VP())
    objective = DeterministicScoreMatching(nodes=6, time_nodes=9)
    history = minimise(model, x[:300], objective, held_out=x[300:], patience=3, ridge=1e-3)
    assert history.stopped == "early"
    assert kl_bound(model, truth) < 0.05


@pytest.mark.parametrize("optimizer", ["lbfgs", "adam"])
def test_training_is_the_same_to_the_bit_and_keeps_the_best(optimizer):
    x, weights = mixture(2, VP()).sample(200, seeded(7)), []
    objective = DeterministicScoreMatching(nodes=4, time_nodes=5)
    for _ in range(2):
        model = NetworkScore(OneHiddenLayer(2, 6, generator=seeded(8)), VP())
        history = minimise(
            model, x[:100], objective, optimizer=optimizer, iterations=12, held_out=x[100:], patience=None
        )
        weights.append([p.detach().clone() for p in model.parameters()])
        assert history.step == list(range(1, 13))
        assert history.stopped == "budget"
        best = min(history.held_out_loss)
        assert history.held_out_loss[history.best_step - 1] == best
        with torch.no_grad():
            assert float(objective(model, x[100:])) == best
    assert all(torch.equal(a, b) for a, b in zip(*weights))


def test_the_loss_serves_the_common_training_loop():
    model = NetworkScore(OneHiddenLayer(2, 6, generator=seeded(8)), VP())
    objective = DeterministicScoreMatching(nodes=4, time_nodes=5)
    x = mixture(2, VP()).sample(200, seeded(7))
    before = float(objective(model, x).detach())
    train(model, x, objective, steps=40, learning_rate=0.03, generator=seeded())
    assert float(objective(model, x).detach()) < before


@pytest.mark.parametrize(
    ("call", "fragment"),
    [
        (lambda: OneHiddenLayer(2, 3, "gelu", generator=seeded()), "expected an activation among"),
        (lambda: OneHiddenLayer(2, 3, bound=0, generator=seeded()), "bound"),
        (
            lambda: DeterministicScoreMatching(nodes=0),
            "expected nodes to be a whole number, at least 1, got 0",
        ),
        (lambda: DeterministicScoreMatching(time_nodes=8), "expected an odd number of nodes, got 8"),
        (lambda: DeterministicScoreMatching(rule="trapezoid"), "expected a rule 'simpson' or 'legendre'"),
        (lambda: DeterministicScoreMatching(law="beta"), "expected a law"),
        (lambda: DeterministicScoreMatching(pairs="all"), "expected pairs"),
        (lambda: DeterministicScoreMatching()(fixed_model(), rows(), rows()), "expected no condition"),
        (lambda: fixed_model().denoise(rows(), 0.5, rows()), "expected no condition"),
        (lambda: minimise(fixed_model(), rows(), DeterministicScoreMatching(), iterations=0), "at least 1"),
        (lambda: minimise(fixed_model(), rows(), DeterministicScoreMatching(), optimizer="sgd"), "optimizer"),
        (
            lambda: minimise(fixed_model(), rows() * torch.nan, DeterministicScoreMatching()),
            "expected a finite loss, got nan",
        ),
    ],
)
def test_bad_arguments_are_one_sentence(call, fragment):
    with pytest.raises(ValueError, match="expected") as caught:
        call()
    assert fragment in str(caught.value)
    assert "\n" not in str(caught.value)


# --------------------------------------------------------------------------------------- the door

SMALL = {"width": 6, "nodes": 4, "time_nodes": 5, "iterations": 6, "device": "cpu"}


def panel(n=150, d=4):
    rng = np.random.default_rng(0)
    X = 0.01 * (0.6 * rng.standard_t(4, (n, 1)) + 0.6 * rng.standard_t(4, (n, d)))
    return pd.DataFrame(X, columns=list("ABCDEFGH")[:d])


VARIANTS = {
    "default": {},
    "time as input": {"time": "input"},
    "as published": {"time": "input", "pairs": "product"},
    "Adam": {"optimizer": "adam"},
    "Legendre": {"rule": "legendre", "time_nodes": 4},
    "cosine path": {"process": Cosine()},
    **{name: {"activation": name} for name in ACTIVATIONS},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_every_option_fits_samples_and_is_saved_to_the_bit(name, tmp_path):
    fitted = QuadratureScoreGenerator(**SMALL | VARIANTS[name], random_state=0).fit(panel())
    again = QuadratureScoreGenerator(**SMALL | VARIANTS[name], random_state=0).fit(panel())
    scenarios = fitted.sample(400)
    assert scenarios.equals(again.sample(400))
    assert (scenarios.var() / panel().var()).between(0.4, 2.5).all()
    loaded = ScenarioGenerator.load(fitted.save(tmp_path / "saved"))
    assert loaded.sample(400).equals(scenarios)
    assert repr(loaded) == repr(fitted)
    assert fitted.score_model_.score_valid
    assert fitted.score_model_.dtype == torch.float64


def test_a_strong_ridge_leaves_the_shrunk_gaussian():
    generator = QuadratureScoreGenerator(**SMALL | {"ridge": 1e6}, random_state=0).fit(panel())
    z = torch.randn(50, 4, dtype=torch.float64, generator=seeded())
    for t in (0.1, 0.5, 0.9):
        alpha = generator.score_model_.process.alpha(as_time(t))
        torch.testing.assert_close(generator.score_model_.denoise(z, t), alpha * z, rtol=0, atol=1e-5)


def test_heavy_tails_are_learned(returns):
    """Held-out nats over the Gaussian from which it starts, five assets."""
    X = returns.iloc[:, :5]
    order = np.random.default_rng(0).permutation(len(X))
    train_rows, test_rows = X.iloc[order[:1000]], X.iloc[order[1000:]]
    arguments = SMALL | {"width": 15, "nodes": 6, "time_nodes": 9, "iterations": 40}
    generator = QuadratureScoreGenerator(**arguments, random_state=0).fit(train_rows)
    z = torch.as_tensor(generator.scaler_.transform(test_rows))
    base = GaussianScore(torch.zeros(5).double(), torch.eye(5).double(), VP())
    found = held_out_nats(generator.score_model_, z, base, generator=seeded())
    print(f"\n{found.gain:.3f} +- {found.standard_error:.3f} nats over the Gaussian")
    assert found.gain > 2 * found.standard_error
    assert (
        generator.history_.held_out_loss[generator.history_.best_step - 1]
        < generator.history_.held_out_loss[0]
    )


def test_stress_holds_and_there_is_no_condition():
    generator = QuadratureScoreGenerator(**SMALL, random_state=0).fit(panel())
    scenarios = generator.sample(50, stress={"A": -0.03})
    np.testing.assert_allclose(scenarios["A"], -0.03, rtol=1e-6)
    with pytest.raises(ValueError, match="expected no condition for QuadratureScoreGenerator"):
        QuadratureScoreGenerator(**SMALL).fit(panel(), condition=np.zeros(150))


BAD = [
    ({"activation": "gelu"}, "expected activation to be one of 'tanh', 'silu'"),
    ({"nodes": 0}, "expected nodes to be a whole number, at least 1, got 0"),
    ({"nodes": 2.5}, "nodes"),
    ({"time_nodes": 8}, "expected time_nodes to be odd and at least 3"),
    ({"time_nodes": 1}, "time_nodes"),
    ({"width": 0}, "expected width to be a whole number, at least 1, got 0"),
    ({"iterations": 0}, "iterations"),
    ({"time": "weights"}, "expected time to be one of 'input', 'nodes', got 'weights'"),
    ({"rule": "romberg"}, "rule"),
    ({"pairs": None}, "pairs"),
    ({"optimizer": "sgd"}, "expected optimizer to be one of 'lbfgs', 'adam', got 'sgd'"),
    ({"ridge": -1.0}, "ridge"),
    ({"weight_bound": 0}, "weight_bound"),
    ({"weight_bound": np.inf}, "weight_bound"),
    ({"learning_rate": np.nan}, "learning_rate"),
    ({"held_out": 1}, "expected held_out to be a share in [0, 1), got 1"),
    ({"process": "VP"}, "expected process to be a Process or None, got 'VP': try VP()"),
    ({"sampler": "heun"}, "sampler"),
    ({"device": "abacus"}, "try device='cpu'"),
]


@pytest.mark.parametrize(("arguments", "fragment"), BAD)
def test_bad_arguments_are_refused_by_fit(arguments, fragment):
    generator = QuadratureScoreGenerator(**SMALL | arguments)
    with pytest.raises(ValueError, match=re.escape(fragment)) as caught:
        generator.fit(panel())
    assert "\n" not in str(caught.value)
