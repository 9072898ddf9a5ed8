"""What does training as a linear solve save? CPU seconds of one thread, every ratio inside this run.

    python benchmarks/training.py [--json]

1. One Gram matrix G = mean_i E[phi(a_j) phi(a_k)], the inner step of a deterministic loss: Mehler's series and the
   closed forms against two-dimensional Gauss-Hermite, 12 x 12 nodes a row and pair (Lesniewski & Trigila 2025).
2. A score of a Gaussian mixture whose exact score is known, n = 2,000 rows. The unit is nats,

       KLb = 1/2 int E|eps_hat - eps_exact|^2 d log-SNR      (log-SNR from -5 to 8; a bound on the divergence)

   of the Gaussian base, of random features with a cross-validated solve (the search of bandwidths counted), of the
   same hidden layer refined by variable projection, and of the same network trained by Adam on Monte-Carlo losses:
   "plain" is the usual one (a random level and one noise a row), "stratified" the best we could write (every level
   in every step, noises in both signs). Both get the solve's bandwidth and the base for nothing, the best of their
   learning rates is taken, and only its own time is counted. Last a 3 x 128 perceptron.
3. Where it does not pay: Adam on the exact loss, and random features in more dimensions.
4. The same trainers on returns, 20 shares, 2,500 days for the fit and 2,500 others, at random, to judge: held-out
   nats a day over a Gaussian with the Ledoit-Wolf covariance of the training rows, by I-MMSE.
"""

from __future__ import annotations

import itertools
import json
import math
import sys
import time

import numpy as np
import torch
from scipy.stats import multivariate_normal
from sklearn.covariance import ledoit_wolf
from torch import nn

from finediff.diffusion.closed_form import RidgeScore, activate, correlations, fit_ridge_score, gram
from finediff.diffusion.closed_form.model import NormalEquations
from finediff.diffusion.exact import EmpiricalScore, GaussianScore, MixtureScore
from finediff.diffusion.likelihood import held_out_nats
from finediff.diffusion.objective import DenoisingScoreMatching, Times
from finediff.diffusion.process import VP
from finediff.diffusion.quadrature import gauss_hermite, gauss_hermite_2d
from finediff.diffusion.score import EMA, NetworkScore
from finediff.generators import DDPMGenerator, QuadratureScoreGenerator, RidgeScoreGenerator
from finediff.panel import Standardizer, load_prices, to_returns

F64 = torch.float64
PROCESS = VP()
# Loss, CPU seconds (a cosine schedule ends with them), learning rate.
TRIALS = [(kind, 5, rate) for kind in ("plain", "stratified") for rate in (3e-3, 1e-2, 3e-2)]
TRIALS += [("plain", 20, 1e-2), ("stratified", 20, 1e-2), ("stratified", 20, 3e-2)]
LEVELS = torch.linspace(-6, 9, 24, dtype=F64)  # of every model with an output layer per level


def seed(value: int) -> torch.Generator:
    return torch.Generator().manual_seed(value)


def seconds(function, repeats: int) -> float:
    """CPU seconds of one call, the least of several: what others do on the machine only adds."""
    function()
    found = []
    for _ in range(repeats):
        began = time.process_time()
        function()
        found.append(time.process_time() - began)
    return min(found)


# ------------------------------------------------------------------ 1. one Gram matrix


def quadrature_gram(means, scales, weights, activation, nodes=12):
    """The naive twin: a product rule for every row and pair j <= k; left factors kept, symmetry used."""
    n, h = means.shape
    rho = correlations(weights)
    points, mass = gauss_hermite(nodes)
    total = torch.empty(h, h, dtype=means.dtype)
    for j in range(h):
        left = activate(means[:, j, None] + scales[j] * points, activation) * mass
        total[j, j] = (left.square() / mass).sum() / n
        for k in range(j + 1, h):
            second = gauss_hermite_2d(nodes, rho[j, k])[0][:, 1]
            right = activate(means[:, k, None] + scales[k] * second, activation).view(n, nodes, nodes) @ mass
            total[j, k] = total[k, j] = (left * right).sum() / n
    return total


def gram_speed() -> list[dict]:
    results = []
    for n, h, part in ((1000, 16, 1000), (2000, 64, 100)):
        weights = torch.randn(h, 20, dtype=F64, generator=seed(1))
        weights /= weights.norm(dim=1, keepdim=True)
        means = 1.5 * torch.randn(n, h, dtype=F64, generator=seed(2))
        scales = torch.linspace(0.3, 1.0, h, dtype=F64)
        for activation, terms, nodes in (("tanh", 8, 12), ("smooth_relu", 8, 12), ("cos", 8, 12)):
            few = means[:25]
            exact = gram(few, scales, weights, activation, 48, 100)
            ours, naive = (
                float((g - exact).abs().max())
                for g in (
                    gram(few, scales, weights, activation, terms, nodes),
                    quadrature_gram(few, scales, weights, activation),
                )
            )
            fast = seconds(lambda: gram(means, scales, weights, activation, terms, nodes), 15)  # noqa: B023
            rows = means[:part]
            slow = seconds(lambda: quadrature_gram(rows, scales, weights, activation), 3) * n / part  # noqa: B023
            row = {"activation": activation, "n": n, "h": h, "ms": 1e3 * fast, "quadrature ms": 1e3 * slow}
            row |= {"ratio": slow / fast, "error": ours, "quadrature error": naive, "rows timed": part}
            results.append(row)
            print(
                f"{activation:12} n {n} h {h:3}   {1e3 * fast:7.2f} ms   2-D quadrature {1e3 * slow:8.0f} ms"
                f"{'' if part == n else f' (from {part} rows)'}   x {slow / fast:6.0f}   error {ours:.0e} and {naive:.0e}"
            )
    return results


# ------------------------------------------------------------------ 2. trainers on a known law


def mixture(d: int) -> MixtureScore:
    """Four or five lobes of full covariance, standardised; the same for everyone."""
    generator, lobes = seed(0), 4 if d == 2 else 5
    means = 2 * torch.randn(lobes, d, dtype=F64, generator=generator)
    roots = torch.randn(lobes, d, d, dtype=F64, generator=generator) / math.sqrt(d)
    covariances = 0.3 * roots @ roots.mT + 0.1 * torch.eye(d, dtype=F64)
    weights = torch.full((lobes,), 1 / lobes, dtype=F64)
    centred = means - weights @ means
    variance = torch.einsum("m,mii->i", weights, covariances) + weights @ centred**2
    scale = torch.diag(variance.rsqrt())
    return MixtureScore(weights, centred @ scale, scale @ covariances @ scale, PROCESS)


class Problem:
    """A mixture, its rows, a Gaussian base, and the distance of a model from the truth."""

    def __init__(self, d: int, n: int = 2000) -> None:
        self.d, self.law = d, mixture(d)
        self.rows = self.law.sample(n, seed(1))
        self.base = GaussianScore(self.rows.mean(0), torch.cov(self.rows.T), PROCESS)
        self.noisy, test = [], self.law.sample(4000, seed(2))
        generator = seed(3)
        for level in torch.linspace(-5, 8, 27, dtype=F64):
            t = PROCESS.time(level)
            x = PROCESS.perturb(test, t, torch.randn(test.shape, dtype=F64, generator=generator))
            self.noisy.append((t, x, self.law.noise(x, t)))

    @torch.no_grad()
    def distance(self, model) -> float:
        """KLb in nats, trapezoid rule."""
        dtype = getattr(model, "network_dtype", F64)
        errors = [
            float((model.noise(x.to(dtype), t).double() - exact).square().sum(1).mean())
            for t, x, exact in self.noisy
        ]
        return 0.5 * 13 / 26 * (sum(errors) - (errors[0] + errors[-1]) / 2)


class LayerPerLevel(nn.Module):
    """The network of `RidgeScore` with free weights: hidden layer shared, output layers (T, h, d) from zero."""

    def __init__(self, problem: Problem, h: int, bandwidth: float, activation: str) -> None:
        super().__init__()
        base, t = problem.base, PROCESS.time(LEVELS)
        self.base, self.activation = base, activation
        self.rows = ((problem.rows - base.mean) @ base.eigenvectors).float()
        self.alpha, self.sigma = PROCESS.alpha(t).float(), PROCESS.sigma(t).float()
        self.variance = self.alpha[:, None] ** 2 * base.eigenvalues.float() + self.sigma[:, None] ** 2
        generator = seed(4)
        self.weights = nn.Parameter(bandwidth * torch.randn(h, problem.d, generator=generator))
        phase = torch.rand(h, generator=generator)
        self.bias = nn.Parameter(2 * torch.pi * phase if activation == "cos" else bandwidth * (6 * phase - 3))
        self.output = nn.Parameter(torch.zeros(len(t), h, problem.d))

    def loss(self, generator, pairs: int = 8):
        """Monte-Carlo denoising loss of every level at once, noises in antithetic pairs, float32."""
        shape = (len(self.alpha), pairs)
        rows = self.rows[torch.randint(len(self.rows), shape, generator=generator)].repeat(1, 2, 1)
        z = torch.randn(*shape, rows.shape[-1], generator=generator)
        z = torch.cat([z, -z], 1)
        alpha, sigma = self.alpha[:, None, None], self.sigma[:, None, None]
        x, variance = alpha * rows + sigma * z, self.variance[:, None]
        phi = activate(x * variance.rsqrt() @ self.weights.T + self.bias, self.activation)
        size = alpha * sigma / (alpha**2 + sigma**2)
        return (z - sigma * x / variance - size * (phi @ self.output)).square().sum(-1).mean()

    def plain_loss(self, generator, batch: int = 256):
        """The usual loss: for each row one level and one noise."""
        level = torch.randint(len(self.alpha), (batch,), generator=generator)
        rows = self.rows[torch.randint(len(self.rows), (batch,), generator=generator)]
        z = torch.randn(rows.shape, generator=generator)
        alpha, sigma, variance = self.alpha[level, None], self.sigma[level, None], self.variance[level]
        x = alpha * rows + sigma * z
        phi = activate(x * variance.rsqrt() @ self.weights.T + self.bias, self.activation)
        size = alpha * sigma / (alpha**2 + sigma**2)
        out = torch.bmm(phi[:, None], self.output[level])[:, 0]
        return (z - sigma * x / variance - size * out).square().sum(-1).mean()

    def exact_loss(self, generator):
        """The expectation of both over the noise, in closed form: no noise is left, all rows in every step."""
        every = NormalEquations(self.rows, self.base.eigenvalues.float(), self.alpha, self.sigma)
        G, R = every.equations(self.rows, slice(None), self.weights, self.bias, self.activation, 12)
        B = self.output
        return (every.size[:, None, None].float() * B * (G @ B - 2 * R)).sum() / len(self.alpha)

    def model(self):
        return RidgeScore(self.base, self.weights, self.bias, LEVELS, self.output, self.activation)


class Perceptron(nn.Module):
    """3 x 128, SiLU, the level told by waves."""

    def __init__(self, d: int) -> None:
        super().__init__()
        generator, sizes = seed(5), (d + 9, 128, 128, 128, d)
        self.layers = nn.ModuleList(nn.utils.skip_init(nn.Linear, a, b) for a, b in itertools.pairwise(sizes))
        for layer in self.layers:
            bound = layer.in_features**-0.5
            nn.init.uniform_(layer.weight, -bound, bound, generator=generator)
            nn.init.zeros_(layer.bias)
        nn.init.zeros_(self.layers[-1].weight)

    def forward(self, x, level, condition=None):
        waves = [f(math.pi * k / 2 * level) for k in range(1, 5) for f in (torch.cos, torch.sin)]
        x = torch.cat([x, torch.stack([level, *waves], 1)], 1)
        for layer in self.layers[:-1]:
            x = nn.functional.silu(layer(x))
        return self.layers[-1](x)


def adam(module, loss, judge, rate, budget) -> list[tuple[float, float]]:
    """(CPU seconds, KLb) along a cosine schedule that ends with the budget; averaged weights, judging not counted."""
    optimizer = torch.optim.Adam(module.parameters(), lr=rate, betas=(0.9, 0.99))
    average, generator, path = EMA(module, 0.998), seed(6), []
    used, marks = 0.0, [budget * 2 ** (-k / 2) for k in range(11, -1, -1)]
    began = time.process_time()
    while marks:
        now = used + time.process_time() - began
        if now >= marks[0]:
            current = {k: v.clone() for k, v in module.state_dict().items()}
            module.load_state_dict(average.average)
            path.append((now, judge()))
            module.load_state_dict(current)
            while marks and now >= marks[0]:
                marks.pop(0)
            used, began = now, time.process_time()
        for group in optimizer.param_groups:
            group["lr"] = rate * (1 + math.cos(math.pi * min(now / budget, 1))) / 2
        optimizer.zero_grad(set_to_none=True)
        loss(generator).backward()
        optimizer.step()
        average.update(module)
    return path


def time_to(paths, level: float) -> float:
    """CPU seconds at which some path is first at the level; infinite if none is."""
    return min((s for path in paths for s, value in path if value <= level), default=math.inf)


def along(path) -> str:
    return "   ".join(f"{value:.3f} @ {s:.1f}" for s, value in path[1::2])


def known_law(d: int, trials=TRIALS, perceptron_budget=20.0) -> dict:
    problem = Problem(d)
    judged = problem.distance
    result = {
        "d": d,
        "base": judged(problem.base),
        "rows memorised": judged(EmpiricalScore(problem.rows, PROCESS)),
        "solves": [],
        "adam": [],
    }
    print(
        f"\n{d}-D mixture, n 2000   Gaussian base {result['base']:.3f}   the rows themselves {result['rows memorised']:.2f}"
    )

    for name, h, folds, evaluations in (
        ("random features, one solve", 64, 5, 0),
        ("random features, one solve", 128, 2, 0),
        ("random features, one solve", 256, 2, 0),
        ("variable projection", 64, 5, 30),
    ):
        began = time.process_time()
        model, history = fit_ridge_score(
            problem.rows.float(),
            problem.base,
            n_features=h,
            folds=folds,
            bandwidths=(0.5, 1.0, 2.0, 4.0),
            evaluations=evaluations,
            generator=seed(7),
        )
        row = {"name": name, "h": h, "seconds": time.process_time() - began, "KLb": judged(model)}
        row |= {"bandwidth": history.bandwidth}
        result["solves"].append(row)
        print(
            f"  {name:28} h {h:3}   {row['seconds']:6.2f} s   KLb {row['KLb']:.4f}   bandwidth {row['bandwidth']:g}"
        )

    bandwidth, paths = result["solves"][0]["bandwidth"], {"plain": [], "stratified": []}
    for kind, budget, rate in trials:
        network = LayerPerLevel(problem, 64, bandwidth, "cos")
        loss = network.plain_loss if kind == "plain" else network.loss
        path = adam(network, loss, lambda: judged(network.model()), rate, budget)  # noqa: B023
        paths[kind].append(path)
        result["adam"].append({"loss": kind, "rate": rate, "budget": budget, "path": path})
        print(f"  Adam, {kind:10} rate {rate:<5g} {budget:2g} s:   {along(path)}", flush=True)
    for row in result["solves"]:
        line = f"  {row['name']:26} h {row['h']:3}   KLb {row['KLb']:.4f} in {row['seconds']:5.2f} s"
        for kind, found in paths.items():
            row[kind] = reach = time_to(found, row["KLb"])
            longest = max(path[-1][0] for path in found)
            times = f"{reach:.1f} s, x {reach / row['seconds']:.0f}"
            late = f"not in {longest:.0f} s, x > {longest / row['seconds']:.0f}"
            line += f"   {kind} Adam: {times if reach < math.inf else late}"
        print(line)
    network = NetworkScore(Perceptron(d), PROCESS, "v")
    network.network_dtype = torch.float32
    objective, rows = DenoisingScoreMatching("eps", Times(), antithetic=True), problem.rows.float()

    def loss(generator):
        return objective(
            network, rows[torch.randint(len(rows), (128,), generator=generator)], None, generator
        )

    path = adam(network, loss, lambda: judged(network), 3e-3, perceptron_budget)
    result["perceptron"] = path
    print(f"  perceptron 3 x 128, Adam:   {along(path)}")
    return result


# ------------------------------------------------------------------ 3. where it does not pay


def exact_loss_by_adam(d: int = 2, budget: float = 10.0) -> dict:
    """The deterministic loss minimised by Adam on all weights, against the Monte-Carlo one, for the same seconds."""
    problem, result = Problem(d), {}
    for name in ("exact_loss", "loss"):
        best = None
        for rate in (1e-2, 3e-2):
            network = LayerPerLevel(problem, 64, 2.0, "cos")
            judge = lambda network=network: problem.distance(network.model())  # noqa: E731
            path = adam(network, getattr(network, name), judge, rate, budget)
            best = path if best is None or path[-1][1] < best[-1][1] else best
        result[name] = best
        what = "exact, all rows" if name == "exact_loss" else "Monte Carlo, stratified"
        print(f"  Adam on the {what:24} loss:   {along(best)}", flush=True)
    return result


def more_dimensions() -> list[dict]:
    """Share of the Gaussian base's KLb that is left, by d."""
    results = []
    for d in (2, 5, 10, 20):
        problem = Problem(d)
        row = {"d": d, "base": problem.distance(problem.base)}
        for name, h, evaluations in (("random 64", 64, 0), ("random 256", 256, 0), ("refined 64", 64, 30)):
            model, _ = fit_ridge_score(
                problem.rows.float(),
                problem.base,
                n_features=h,
                folds=2,
                bandwidths=(0.25, 0.5, 1.0, 2.0, 4.0),
                evaluations=evaluations,
                generator=seed(7),
            )
            row[name] = problem.distance(model) / row["base"]
        results.append(row)
        shares = "   ".join(f"{k} {100 * v:5.1f} %" for k, v in row.items() if k not in ("d", "base"))
        print(f"  d {d:2}   base {row['base']:6.2f} nats   left: {shares}", flush=True)
    return results


# ------------------------------------------------------------------ 4. a real panel


def real_panel() -> list[dict]:
    """Network by quadrature, random features, a refined layer, a network by Adam, and the flagship."""
    X = to_returns(load_prices()).iloc[-5000:].to_numpy()
    X = (
        0.01 * (X - X.mean(0)) / X.std(0)
    )  # fractions, one scale for all: what is gained over a Gaussian stays
    rows = np.random.default_rng(0).permutation(len(X))
    train, test = X[rows[:2500]], X[rows[2500:]]
    whiten = Standardizer(whiten=True).fit(train)
    z = torch.as_tensor(whiten.transform(train), dtype=torch.float32)
    base = GaussianScore(z.double().mean(0), torch.eye(20, dtype=F64), PROCESS)
    gauss = multivariate_normal(train.mean(0), ledoit_wolf(train)[0]).logpdf(test)

    def ridge_score(features, evaluations):
        return fit_ridge_score(
            z,
            base,
            n_features=features,
            folds=2,
            bandwidths=(0.05, 0.1, 0.25, 0.5, 1.0),
            evaluations=evaluations,
            generator=seed(7),
        )[0]

    def quadrature(pairs):
        return QuadratureScoreGenerator(width=12, iterations=15, pairs=pairs, random_state=0).fit(train)

    plans = [
        ("quadrature, product rule, 12 units, 15 steps", lambda: quadrature("product")),
        ("quadrature, Mehler's series, the same", lambda: quadrature("series")),
        ("quadrature, series, default", lambda: QuadratureScoreGenerator(random_state=0).fit(train)),
        ("random features, 64, one solve", lambda: ridge_score(64, 0)),
        ("random features, 256, one solve", lambda: ridge_score(256, 0)),
        ("variable projection, 64", lambda: ridge_score(64, 30)),
        ("perceptron by Adam, default DDPM", lambda: DDPMGenerator(random_state=0).fit(train)),
        ("exact base alone", lambda: RidgeScoreGenerator(directions=0, random_state=0).fit(train)),
        ("exact base and ridge residual", lambda: RidgeScoreGenerator(random_state=0).fit(train)),
    ]
    results = []
    for name, fit in plans:
        began = time.process_time()
        model = fit()
        used = time.process_time() - began
        scaler, score = getattr(model, "scaler_", whiten), getattr(model, "score_model_", model)
        dtype = F64 if name.startswith("quadrature") else torch.float32
        held_out, known = torch.as_tensor(scaler.transform(test), dtype=dtype), getattr(model, "base_", None)
        if known is None:
            law = multivariate_normal(np.zeros(20))
            known = GaussianScore(torch.zeros(20, dtype=dtype), torch.eye(20, dtype=dtype), PROCESS)
            exact = law.logpdf(held_out.numpy())
        else:
            exact = known.log_prob(held_out).double().numpy()
        own = exact + scaler.log_abs_det() - gauss
        gain = torch.zeros(1)
        if score is not known:
            gain = held_out_nats(
                score, held_out, known, log_snr=(-6.9, 8.9), nodes=41, repeats=1, generator=seed(9)
            ).rows
        row = {"name": name, "seconds": used, "nats": float((own + gain.numpy()).mean())}
        results.append(row)
        print(f"  {name:46} {row['seconds']:7.2f} s   {row['nats']:6.3f} nats", flush=True)
    return results


def main() -> None:
    torch.set_num_threads(1)
    print("1. One Gram matrix, d 20, scales sigma |w| from .3 to 1")
    results = {"gram": gram_speed()}
    print("\n2. A score whose truth is known")
    results["known law"] = [known_law(d) for d in (2, 5)]
    print(
        "\n3. Where it does not pay: the exact loss without the solve, and random features in more dimensions"
    )
    results["exact loss by Adam"] = exact_loss_by_adam()
    results["dimensions"] = more_dimensions()
    print("\n4. The same on returns: 20 shares, 2,500 days")
    results["real panel"] = real_panel()
    print(VERDICT)
    if "--json" in sys.argv:
        print(json.dumps(results))


VERDICT = """
What pays is the linear solve, not the determinism of the gradient: Adam on the exact loss is slower than Adam on a
Monte-Carlo one. Ratios depend on the baseline: a loop that sees every level, with both signs of the noise, is several
times faster than the usual one. Random features are for two or three dimensions: from five on a short training of the
hidden layer beats 256 of them, and at d = 20 they remove a sixth. The perceptron, stopped in time, ends lower than
every one-hidden-layer model here; in 5-D it has begun to memorise by the end of its budget."""


if __name__ == "__main__":
    main()
