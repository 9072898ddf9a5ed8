"""What a factor model's law of F leaves unlearned: a regression in k dimensions, whatever the number of assets.

    s^2 = sigma^2/alpha^2,   D_u = u D,   Gamma(s) = (B^T (D_u + s^2 I)^-1 B)^-1,   Gamma(0) = u Gamma_0
    f = f_hat/alpha = f_0 + N(0, N(s)),   f_0 = F + N(0, Gamma(0)),
    N(s) = Gamma(s) - Gamma(0) = Gamma(0) B^T diag(s^2/(D_u (D_u + s^2))) B Gamma(s)      (no difference of neighbours)
    score of f = score of the base - N^-1/2 h(f, l),      l = -log|N|/k: the log-SNR of the factors
    draws of f_0:  f <- E + N_s^1/2 N_t^-1/2 (f - E) from level to level, E = E[f_0|f] extrapolated: the probability flow

The base is `ScaleFactors`; h has the features of `finediff.diffusion.residual` along each factor, on f whitened by the
base, and is solved for at T levels. f_0 is observed (`FactorScore.project`), so h is trained on n rows of k numbers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from finediff.diffusion.closed_form import fold_ridge
from finediff.diffusion.exact import FactorLaw, FactorScore, ScaleFactors
from finediff.diffusion.process import normal, require
from finediff.diffusion.residual import features, interpolate, paired_noise, share_levels

LEVELS = (-6.0, 8.0)  # of l
_STEPS = 24  # of the flow
_GRID = 128  # values of s^2 between which the levels are looked for
_TINY = 1e-300
_MARGIN = 1.0  # standard errors over the folds: without it Gaussian factors get a residual too


@dataclass(frozen=True)
class Node:
    """One level l of one u: N, Gamma(s), N^1/2 and N^-1/2, all (k, k)."""

    level: float
    noise: Tensor
    gamma: Tensor
    root: Tensor
    inverse_root: Tensor


class FactorPath:
    """N(s) of a factor model as a function of its level; for any u, since N_u(s^2) = u N_1(s^2/u).

    Every matrix is B^T diag(w) B for some w: one product of the w with the d x k^2 entries of B_j B_j^T.
    """

    def __init__(self, model: FactorScore) -> None:
        B, self.D = model.loadings.double(), model.idiosyncratic_variance.double()
        self.k, self.gamma_0 = B.shape[1], model.gamma.double()
        self.squares = (B[:, :, None] * B[:, None, :]).flatten(1)
        low = float(self.D.min().log()) - 16
        high = float(max(self.D.max(), B.square().sum()).log()) + 12
        self.log_s2 = torch.linspace(low, high, _GRID, dtype=torch.float64, device=B.device)
        self.levels = self._level(self._matrices(self.log_s2)[0])

    def _matrices(self, log_s2: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """N, Gamma and N' at u = 1, each (S, k, k), for log s^2 (S,)."""
        D, s2 = self.D, log_s2.exp()[:, None]
        weights = torch.cat([1 / (D + s2), s2 / (D * (D + s2)), 1 / (D + s2) ** 2])
        precision, gained, change = (weights @ self.squares).reshape(3, -1, self.k, self.k)
        gamma = torch.cholesky_inverse(torch.linalg.cholesky(precision))
        noise = self.gamma_0 @ gained @ gamma
        return (noise + noise.mT) / 2, gamma, gamma @ change @ gamma

    def _level(self, noise: Tensor) -> Tensor:
        return -torch.logdet(noise) / self.k

    def nodes(self, levels: Tensor, u: float) -> list[Node]:
        """At l = levels (T,), for the given u."""
        wanted = levels.to(self.levels) + math.log(u)
        i = torch.searchsorted(-self.levels, -wanted).clamp(1, _GRID - 1)  # levels fall as s^2 grows
        share = (self.levels[i - 1] - wanted) / (self.levels[i - 1] - self.levels[i])
        log_s2 = torch.lerp(self.log_s2[i - 1], self.log_s2[i], share)
        for _ in range(3):  # Newton
            noise, _, change = self._matrices(log_s2)
            slope = -log_s2.exp() * _trace(torch.linalg.solve(noise, change)) / self.k
            log_s2 = log_s2 - (self._level(noise) - wanted) / slope
        noise, gamma, _ = self._matrices(log_s2)
        values, V = torch.linalg.eigh(noise * u)
        root = values.clamp(min=_TINY).sqrt()[:, None, :]
        found = zip(levels.tolist(), noise * u, gamma * u, (V * root) @ V.mT, (V / root) @ V.mT)
        return [Node(*node) for node in found]


def _trace(matrices: Tensor) -> Tensor:
    return matrices.diagonal(dim1=-2, dim2=-1).sum(-1)


class LearnedFactors(FactorLaw):
    """The law of the factors given u, with what a regression adds to its score.

    Known through noise alone: ``sample`` is the base's. ``log_prob`` is the base's too; with h it has no formula.

    Parameters
    ----------
    base : ScaleFactors
        The law of F given u.
    gamma : (k, k)
        u Gamma_0.
    levels, weights : (T,), (T, k, 18)
        Where h was solved for, and the weights of its features.
    path : sequence of Node
        At this u, most noise first; levels even.
    """

    def __init__(self, base: ScaleFactors, gamma: Tensor, levels: Tensor, weights: Tensor, path) -> None:
        super().__init__()
        self.base, self.path, self.k = base, list(path), base.k
        for name, value in (("gamma", gamma), ("levels", levels), ("weights", weights)):
            self.register_buffer(name, torch.as_tensor(value).to(base.scales))

    def _score(self, f: Tensor, gamma: Tensor, inverse_root: Tensor, level: Tensor) -> Tensor:
        """Score of f_0 + N(0, N) at f (batch, k); N^-1/2 and l of one level or of every row."""
        score, P, day = self.base.moments(f, torch.ones_like(f[:, :1]), gamma)
        weights = interpolate(level, self.levels.to(f), self.weights.to(f))
        phi = _features(f, P, day, gamma)
        if len(weights) == 1:
            h = torch.bmm(phi, weights[0, :, :, None])[..., 0].T
        else:
            h = torch.einsum("kbp,bkp->bk", phi, weights)
        return score - torch.einsum("...kl,...l->...k", inverse_root, h)

    def denoise(self, f: Tensor, t, alpha: Tensor, gamma: Tensor) -> Tensor:
        standard = self.base.denoise(f, t, alpha, gamma)
        scale = alpha.clamp(min=1e-6)
        gamma_s = gamma / scale[..., None] ** 2 if alpha.ndim == 2 else gamma / scale**2
        values, V = torch.linalg.eigh(gamma_s - self.gamma)
        values = values.clamp(min=torch.finfo(values.dtype).tiny ** 0.5)
        inverse = (V / values.sqrt()[..., None, :]) @ V.mT
        level = -values.log().mean(-1).reshape(-1)
        base = self.base.moments(f / scale, torch.ones_like(f[:, :1]), gamma_s)[0]
        learned = self._score(f / scale, gamma_s, inverse, level) - base
        # E[F | f] = (f + gamma score)/alpha in the scale of f, where scores are those of f/alpha over alpha.
        return standard + torch.einsum("...kl,...l->...k", gamma_s, learned)

    def log_prob(self, f: Tensor, t, alpha: Tensor, gamma: Tensor) -> Tensor:
        return self.base.log_prob(f, t, alpha, gamma)

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        return self.base.sample(n, generator)

    def observe(self, n: int, gamma: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Draws of f_0 = F + N(0, gamma), (n, k), from exact draws of the base at the first level, along the flow."""
        own = torch.allclose(gamma, self.gamma, rtol=1e-4, atol=1e-6 * float(self.gamma.abs().max()))
        require(own, "the noise of the model that the law was learned in", "another", "use gamma=u Gamma_0")
        return self._flow(self._start(n, gamma, generator)).to(gamma)

    def _start(self, n: int, gamma: Tensor, generator) -> Tensor:
        """Exact draws of the base at the first level; in float32, what was learned has fewer digits."""
        f = self.base.observe(n, gamma, generator)
        return (f + normal(f, generator) @ self.path[0].root.to(f).T).float()

    def _flow(self, f: Tensor) -> Tensor:
        found, before = self._denoise(f, self.path[0]), None
        for here, there in zip(self.path, self.path[1:]):
            aim = found if before is None else 1.5 * found - 0.5 * before
            f = aim + (f - aim) @ (there.root @ here.inverse_root).to(f).T
            found, before = self._denoise(f, there), found
        return found

    def _denoise(self, f: Tensor, node: Node) -> Tensor:
        """E[f_0 | f], (batch, k)."""
        level = f.new_tensor([node.level])
        score = self._score(f, node.gamma.to(f), node.inverse_root.to(f), level)
        return f + score @ node.noise.to(f).T


def _features(f: Tensor, P: Tensor, day: Tensor, gamma: Tensor) -> Tensor:
    """(k, batch, 18), along each factor."""
    spread = (1 + gamma.diagonal(dim1=-2, dim2=-1)).sqrt()
    return features(P.T, (f / spread).T, day)


def with_residual(model: FactorScore, levels, weights) -> FactorScore:
    """The model whose laws are learned: its own, `ScaleFactors`, with the regression's weights (T, k, 18)."""
    path = FactorPath(model)
    steps = torch.linspace(*LEVELS, _STEPS + 1, dtype=torch.float64)
    laws = [
        LearnedFactors(law, u * model.gamma, levels, weights, path.nodes(steps, float(u)))
        for u, law in zip(model.scales, model.laws)
    ]
    return FactorScore(
        model.loadings,
        model.idiosyncratic_variance,
        model.process,
        factors=laws,
        mean=model.mean,
        scales=model.scales,
        weights=model.weights,
    )


def change_of_moments(model: FactorScore, draws: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """What the regression adds to the mean (k,) and the covariance (k, k) of the factors.

    From flows with and without it that start at the same points: most of the noise of either cancels.
    """
    k = model.loadings.shape[1]
    zeros = model.loadings.new_zeros
    sums = {name: [zeros(k), zeros(k, k)] for name in ("learned", "base")}
    for share, u, law in zip(model.weights, model.scales, model.laws):
        plain = LearnedFactors(law.base, law.gamma, law.levels, torch.zeros_like(law.weights), law.path)
        start = law._start(max(64, round(draws * float(share))), u * model.gamma, generator)
        for name, f in (("learned", law._flow(start)), ("base", plain._flow(start))):
            f = f.to(model.loadings)
            sums[name][0] += share * f.mean(0)
            sums[name][1] += share * f.T @ f / len(f)
    (mean, square), (base_mean, base_square) = sums["learned"], sums["base"]
    change = square - torch.outer(mean, mean) - base_square + torch.outer(base_mean, base_mean)
    return mean - base_mean, (change + change.T) / 2


def learn_factors(
    model: FactorScore,
    X: Tensor,
    *,
    levels: int = 16,
    draws: int = 4,
    folds: int = 5,
    kernel: float = 1.0,
    generator: torch.Generator,
) -> tuple[FactorScore, float]:
    """Ridge regressions of the noise that the base leaves in the k dimensions of the factors.

    Parameters
    ----------
    model : FactorScore
        Whose laws are `ScaleFactors`, fitted to X; k >= 1.
    X : (n, d)
        Rows in its coordinates, n >= folds, complete.
    levels, draws : int
        T, values of l from -6 to 8; noises for each row and level.
    folds : int
        Of consecutive rows, for the penalty; a factor and level that does not gain is switched off.
    kernel : float
        Standard deviation, in levels, of the sharing of normal equations.
    generator : torch.Generator
        Of the noise, on X's device.

    Returns
    -------
    FactorScore, float
        The learned model, and the cross-validated nats a row that it gains, 1/2 int gain dl: exact where the factors'
        noises keep their shape along the path. Where nothing is gained the model is the one that came.
    """
    require(X.ndim == 2 and len(X) >= folds >= 2, f"at least {folds} rows", tuple(X.shape), "one a fold")
    f0, path = model.project(X), FactorPath(model)
    chosen = torch.multinomial(model.posterior(X), 1, generator=generator)[:, 0]
    knots = torch.linspace(*LEVELS, levels, dtype=torch.float64)
    G, R = [], []
    for at in zip(*(path.nodes(knots, float(u)) for u in model.scales)):
        sums = [
            _normal_equations(model, at, rows, day, draws, generator)
            for rows, day in zip(f0.tensor_split(folds), chosen.tensor_split(folds))
        ]
        G.append(torch.stack([g for g, _ in sums], 1))
        R.append(torch.stack([r for _, r in sums], 1))
    G, R = (share_levels(torch.stack(a), knots, kernel) / (draws * len(X)) for a in (G, R))
    found = fold_ridge(G, R, margin=_MARGIN)
    nats = 0.5 * float(torch.trapezoid(found.gain[..., 0].sum(1), knots))
    return (with_residual(model, knots, found.weights[..., 0]), nats) if nats > 0 else (model, 0.0)


def _normal_equations(model, at, rows: Tensor, day: Tensor, draws: int, generator) -> tuple[Tensor, Tensor]:
    """Sums of f f' (k, 18, 18) and f y (k, 18, 1) over rows and noises, y the noise that the base leaves."""
    G = R = 0.0
    for m, (law, node) in enumerate(zip(model.laws, at)):
        part = rows[day == m]
        if not len(part):
            continue
        z = paired_noise(len(part), draws, rows.shape[1], generator, rows.dtype)
        f = part.repeat_interleave(draws, 0) + z @ node.root.T
        score, P, v = law.moments(f, torch.ones_like(f[:, :1]), node.gamma)
        phi = _features(f, P, v, node.gamma)
        y = (z + score @ node.root.T).T
        G, R = G + phi.mT @ phi, R + phi.mT @ y[..., None]
    return G, R
