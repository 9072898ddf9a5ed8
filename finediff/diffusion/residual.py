"""A small learned correction of an exact base, along given directions: one ridge regression per noise level.

    eps_hat = eps_base + sum_q q f_q(x_t)' B_q(l),                     l = log-SNR
    f_q     = [1, v, P, vP, v tanh P, tanh(P - c), tanh(p - c), tanh(p/3 - c)],      c on knots
    P = q'(sqrt(a) o x),   p = q'x / sd(q'x_t),   a = E[1/c | x_t],   v = E[log tau | x_t]       (the base's `moments`)

B_q(l) regresses the noise that the base leaves, q'(z - eps_base), on f_q: normal equations at T levels, summed over
noises that are orthogonal and antithetic, shared between neighbouring levels by a Gaussian kernel, solved by
`fold_ridge`; between levels B is linear, and it fades to 0 within one level beyond them. Few features and the right
directions: the market's own repairs every portfolio; outputs per asset gained nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from finediff.diffusion.closed_form import fold_ridge
from finediff.diffusion.exact import ProductScaleMixtureScore
from finediff.diffusion.process import as_time, require
from finediff.diffusion.quadrature import orthogonal_normal
from finediff.diffusion.score import ScoreModel

LOG_SNR = (-6.0, 8.0)
_FINE, _COARSE = (-2.0, -1.0, 0.0, 1.0, 2.0), (-1.0, 0.0, 1.0)
_AT_ONCE = 2**16  # rows times assets perturbed at once


def features(P: Tensor, p: Tensor, day: Tensor) -> Tensor:
    """f (m, batch, 18) of P and p (m, batch), and v (batch,) or (m, batch)."""
    v = day.expand_as(P)
    fine, coarse = (torch.tensor(c).to(P) for c in (_FINE, _COARSE))
    plain = torch.stack([torch.ones_like(P), v, P, v * P, v * P.tanh()], 2)
    bent = (torch.tanh(u[..., None] - c) for u, c in ((P, fine), (p, fine), (p / 3, coarse)))
    return torch.cat([plain, *bent], 2)


def interpolate(l: Tensor, levels: Tensor, weights: Tensor) -> Tensor:
    """Weights (T, ...) of even levels at l (batch,), (batch, ...): linear between, 0 one step beyond the ends."""
    hats = (1 - ((l.clamp(-1e4, 1e4)[:, None] - levels) / (levels[1] - levels[0])).abs()).clamp(min=0)
    return torch.einsum("bt,t...->b...", hats, weights)


def share_levels(sums: Tensor, levels: Tensor, kernel: float) -> Tensor:
    """Sums (T, ...) of neighbouring levels averaged by a Gaussian of sd ``kernel`` levels."""
    share = torch.exp(-0.5 * ((levels[:, None] - levels) / (levels[1] - levels[0]) / kernel) ** 2)
    return torch.einsum("st,t...->s...", (share / share.sum(1, keepdim=True)).to(sums), sums)


def paired_noise(n: int, draws: int, d: int, generator, dtype) -> Tensor:
    """``draws`` noises (n draws, d) for each of n rows, next to each other: orthogonal, and in antithetic pairs."""
    half = orthogonal_normal(n * -(-draws // 2), d, generator, dtype=dtype).reshape(n, -1, d)
    return torch.cat([half, -half], 1)[:, :draws].reshape(-1, d)


class ResidualScore(ScoreModel):
    """An exact base and what it leaves along some directions.

    Parameters
    ----------
    base : ProductScaleMixtureScore
    directions : (m, d)
        q, unit rows.
    spreads : (m,)
        Standard deviation of q'x_0.
    levels : (T,)
        Increasing log-SNRs, evenly spaced.
    weights : (T, m, p)
        B, of the p features of each direction.

    Attributes
    ----------
    nats : float
        After `fit`: cross-validated nats a row gained over the base, 1/2 int gain dl.
    ridges : (T, m)
        After `fit`: the penalties chosen.
    """

    nats: float = 0.0
    ridges: Tensor | None = None

    def __init__(self, base: ProductScaleMixtureScore, directions, spreads, levels, weights) -> None:
        super().__init__()
        self.base, self.process = base, base.process
        for name, value in zip(
            ("directions", "spreads", "levels", "weights"), (directions, spreads, levels, weights)
        ):
            self.register_buffer(name, torch.as_tensor(value).to(base.own))

    def _features(self, x: Tensor, t, precision: Tensor, day: Tensor) -> Tensor:
        """f (m, batch, p)."""
        alpha, sigma = (level.reshape(-1) for level in self.process.levels(t, x))
        P = self.directions @ (precision.sqrt() * x).T
        p = (self.directions @ x.T) / (alpha**2 * self.spreads[:, None] ** 2 + sigma**2).sqrt()
        return features(P, p, day)

    def _interpolated(self, t, x: Tensor) -> Tensor:
        """B at each time, (1 or batch, m, p)."""
        return interpolate(self.process.log_snr(as_time(t)).reshape(-1).to(x), self.levels, self.weights)

    def _learned(self, x: Tensor, t, precision: Tensor, day: Tensor) -> Tensor:
        """eps_hat - eps_base, (batch, d)."""
        f, B = self._features(x, t, precision, day), self._interpolated(t, x)
        along = torch.einsum("mbp,bmp->bm", f, B.expand(len(x), -1, -1))
        return along @ self.directions

    def noise(self, x: Tensor, t, condition: Tensor | None = None) -> Tensor:
        precision, _, day = self.base.moments(x, t)
        return self.process.levels(t, x)[1] * x * precision + self._learned(x, t, precision, day)

    def score(self, x: Tensor, t, condition: Tensor | None = None) -> Tensor:
        return -self.noise(x, t) / self.process.levels(t, x)[1]

    def denoise(self, x: Tensor, t, condition: Tensor | None = None) -> Tensor:
        precision, gain, day = self.base.moments(x, t)
        return self.process.levels(t, x)[0] * x * gain + self._shift(x, t, precision, day)

    def _shift(self, x: Tensor, t, precision: Tensor, day: Tensor) -> Tensor:
        """What is learned, as a change of E[x_0|x_t]: 0 where alpha is, as B has faded there."""
        alpha, sigma = self.process.levels(t, x)
        return -sigma / alpha.clamp(min=1e-8) * self._learned(x, t, precision, day)

    def sample_posterior(self, x: Tensor, t, generator: torch.Generator | None = None) -> Tensor:
        """A draw of x_0 given x_t = x, (batch, d): the base's exact one, moved by what is learned of the mean."""
        precision, _, day = self.base.moments(x, t)
        return self.base.sample_posterior(x, t, generator) + self._shift(x, t, precision, day)

    @classmethod
    def fit(
        cls,
        base: ProductScaleMixtureScore,
        X: Tensor,
        directions,
        *,
        levels: int = 16,
        draws: int = 8,
        folds: int = 5,
        kernel: float = 1.0,
        ridges=None,
        generator: torch.Generator,
    ) -> ResidualScore:
        """Ridge regressions of the noise that the base leaves.

        Parameters
        ----------
        base : ProductScaleMixtureScore
            Fitted to X.
        X : (n, d)
            Rows in its coordinates, n >= folds.
        directions : (m, d)
            Unit rows.
        levels, draws : int
            T, log-SNRs from -6 to 8, and noises for each row and level.
        folds : int
            Of consecutive rows, for the penalty; a direction and level that does not gain is switched off.
        kernel : float
            Standard deviation, in levels, of the sharing of normal equations.
        ridges : sequence of floats, optional
            Candidates for the penalty, relative to the features' second moments.
        generator : torch.Generator
            Of the noise, on X's device.
        """
        require(X.ndim == 2 and len(X) >= folds >= 2, f"at least {folds} rows", tuple(X.shape), "one a fold")
        X, q = X.to(base.own), torch.atleast_2d(torch.as_tensor(directions)).to(base.own)
        nodes = torch.linspace(*LOG_SNR, levels, dtype=torch.float64)
        self = cls(base, q, (X @ q.T).std(0, correction=0), nodes, torch.zeros(levels, len(q), 18))
        G, R = [], []
        for t in base.process.time(nodes):
            sums = [self._normal_equations(part, t, draws, generator) for part in X.tensor_split(folds)]
            G.append(torch.stack([g for g, _ in sums], 1))
            R.append(torch.stack([r for _, r in sums], 1))
        G, R = (share_levels(torch.stack(a), nodes, kernel) / (draws * len(X)) for a in (G, R))
        found = fold_ridge(G, R, **({} if ridges is None else {"ridges": ridges}))
        self.weights.copy_(found.weights[..., 0])
        self.ridges = found.ridge
        self.nats = 0.5 * float(torch.trapezoid(found.gain[..., 0].sum(1), nodes))
        return self

    def _normal_equations(self, rows: Tensor, t: Tensor, draws: int, generator) -> tuple[Tensor, Tensor]:
        """Sums of f f' (m, p, p) and f y (m, p, 1) over rows and noises."""
        G = R = 0.0
        sigma = self.process.sigma(t).to(rows)
        for part in rows.split(max(1, _AT_ONCE // (draws * rows.shape[1]))):
            n, d = part.shape
            z = paired_noise(n, draws, d, generator, rows.dtype)
            x = self.process.perturb(part.repeat_interleave(draws, 0), t, z)
            precision, _, day = self.base.moments(x, t)
            f = self._features(x, t, precision, day)
            y = self.directions @ (z - sigma * x * precision).T
            G, R = G + f.mT @ f, R + f.mT @ y[..., None]
        return G, R
