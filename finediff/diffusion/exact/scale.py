"""One random volatility a day: a Gaussian scale mixture along a path, fitted by EM.

    x_0 = m + sqrt(v) y,   y ~ N(0, S),   P(v = v_k) = w_k on a grid;     S = U diag(l) U^T
    c_kj = alpha^2 v_k l_j + sigma^2,    z = U^T (x_t - alpha m):         all scales share the eigenvectors U
    P(v_k | x_t) = softmax_k [ log w_k - 1/2 sum_j (z_j^2 / c_kj + log c_kj) ]
    E[x_0|x_t] = m + U (z o sum_k P(v_k|x_t) alpha v_k l / c_k),    score = -U (z o sum_k P(v_k|x_t) / c_k)
    x_0 | x_t, v_k ~ N( m + U (alpha v_k l / c_k) z,  U diag(v_k l sigma^2 / c_k) U^T )

The cost is batch x M x d beside two products with U. A fine grid stands for any law of v: Student's t among them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from finediff.diffusion.exact.gaussian import ExactScore, as_floating, as_shape, as_weights, eigen, noised
from finediff.diffusion.process import Process, normal, require

# Shrinkages that `fit` chooses among: 0, and steps over which the likelihood changes little.
LADDER = (0.0, 0.01, 0.03, 0.1, 0.3, 0.5, 0.7, 0.9)


class ScaleMixtureScore(ExactScore):
    """The exact model of a Gaussian scale mixture (Andrews & Mallows 1974, JRSS B 36).

    The denoiser is that of Portilla, Strela, Wainwright & Simoncelli 2003, IEEE Trans. Image Processing 12.

    Parameters
    ----------
    scales, weights : (M,) positive, (M,) non-negative of sum 1
        The values v_k of the variance's multiplier, and their probabilities.
    mean, covariance : (d,), (d, d) symmetric positive semidefinite
        m and S: the covariance of x_0 where sum_k w_k v_k = 1.
    process : Process

    Attributes
    ----------
    likelihoods : tuple of floats
        After `fit`: the objective of EM at each iteration, mean nats a row. Empty otherwise.
    shrinkage, leave_one_out : float or None
        After `fit`: the share of the diagonal target, and the leave-one-out likelihood, mean nats a row.
    """

    likelihoods: tuple[float, ...] = ()
    shrinkage: float | None = None
    leave_one_out: float | None = None

    def __init__(self, scales, weights, mean, covariance, process: Process) -> None:
        covariance = as_floating(covariance)
        eigenvalues, eigenvectors = eigen(covariance)
        scales = _as_scales(scales, covariance)
        super().__init__(
            process,
            scales=scales,
            weights=as_weights(weights, len(scales), covariance),
            mean=as_shape("a mean", mean, covariance.shape[:1], covariance),
            eigenvalues=eigenvalues,
            eigenvectors=eigenvectors,
        )

    @property
    def covariance(self) -> Tensor:
        """S, (d, d)."""
        return (self.eigenvectors * self.eigenvalues) @ self.eigenvectors.T

    def _components(self, x: Tensor, t) -> tuple[Tensor, Tensor, Tensor]:
        """z (batch, d), c (M, d) or (batch, M, d), and log w_k N(x; ..., c_k) (batch, M)."""
        alpha, _ = self.process.levels(t, x)
        z = (x - alpha * self.mean) @ self.eigenvectors
        variance = noised(self.scales[:, None] * self.eigenvalues, *self.process.levels(t, x[:, None]))
        quadratic = torch.einsum("bj,...kj->bk" if variance.ndim == 2 else "bj,bkj->bk", z**2, 1 / variance)
        logs = torch.log(2 * torch.pi * variance).sum(-1)
        return z, variance, self.weights.log() - 0.5 * (quadratic + logs)

    def _average(self, weights: Tensor, values: Tensor) -> Tensor:
        """sum_k weights_k values_k: (batch, M) and (M, d) or (batch, M, d) -> (batch, d)."""
        return weights @ values if values.ndim == 2 else (weights[:, None] @ values)[:, 0]

    def posterior(self, x: Tensor, t) -> Tensor:
        """P(v = v_k | x_t = x), (batch, M)."""
        return self._components(x, t)[2].softmax(1)

    def denoise(self, x: Tensor, t, condition: Tensor | None = None) -> Tensor:
        alpha, _ = self.process.levels(t, x)
        z, variance, joint = self._components(x, t)
        wanted = self._average(joint.softmax(1), self.scales[:, None] / variance)
        return self.mean + (z * alpha * self.eigenvalues * wanted) @ self.eigenvectors.T

    def score(self, x: Tensor, t, condition: Tensor | None = None) -> Tensor:
        z, variance, joint = self._components(x, t)
        return -(z * self._average(joint.softmax(1), 1 / variance)) @ self.eigenvectors.T

    def log_prob(self, x: Tensor, t=0.0) -> Tensor:
        return self._components(x, t)[2].logsumexp(1)

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        k = torch.multinomial(self.weights, n, replacement=True, generator=generator)
        z = normal(self.mean[None], generator, n)
        return self.mean + ((self.scales[k, None] * self.eigenvalues).sqrt() * z) @ self.eigenvectors.T

    def sample_posterior(self, x: Tensor, t, generator: torch.Generator | None = None) -> Tensor:
        """One exact draw of x_0 given x_t = x for each row, (batch, d): a scale from its posterior, then a Gaussian.

        In an SDE sampler this replaces the Gaussian of DDPM around E[x_0|x_t], which has the wrong spread.
        """
        alpha, sigma = self.process.levels(t, x)
        z, variance, joint = self._components(x, t)
        k = torch.multinomial(joint.softmax(1), 1, generator=generator)[:, 0]
        c = variance[k] if variance.ndim == 2 else variance[torch.arange(len(x), device=x.device), k]
        prior = self.scales[k, None] * self.eigenvalues
        y = alpha * prior / c * z + sigma * (prior / c).sqrt() * normal(z, generator)
        return self.mean + y @ self.eigenvectors.T

    @classmethod
    def fit(
        cls,
        X,
        process: Process,
        *,
        scales=None,
        n_scales: int = 16,
        shrinkage: float | None = None,
        iterations: int = 200,
        tolerance: float = 1e-6,
    ) -> ScaleMixtureScore:
        """Maximum likelihood of mean, covariance and weights by EM (Dempster, Laird & Rubin 1977, JRSS B 39).

        E: P(v_k | x_i), hence r_i = E[1/v | x_i].  M: w_k = mean_i P(v_k | x_i), m = sum r_i x_i / sum r_i,
        S = (1 - s) mean_i r_i (x_i - m)(x_i - m)^T + s T: loud days count less. At the end the scales are divided
        by their mean, so that S is the covariance of x. Raises ValueError where S is singular and not shrunk.

        Parameters
        ----------
        X : (n, d)
            Returns, one row a date, scaled so that the path's noise levels fit them.
        process : Process
            The path along which the law is then diffused; the fit does not depend on it.
        scales, n_scales : (M,), int
            The grid, in units of the sample covariance, or the size of a default one, see `default_scales`.
        shrinkage : float in [0, 1), optional
            s, the share of T = the diagonal of the sample covariance; default: that of ``LADDER`` with the best
            leave-one-out likelihood. EM never decreases (1 - s) log-likelihood - s/2 (log|S| + tr S^-1 T). With n
            near or below d a small s fits each row with its own direction, leaves no volatility to be seen, and
            loses to a Gaussian: .5 to .9 is right there.
        iterations, tolerance : int, float
            EM stops after so many, or when one gains less, in nats a row.
        """
        X = as_floating(X)
        require(X.ndim == 2 and len(X) >= 2, "X of shape (n, d) with n >= 2", tuple(X.shape))
        good = shrinkage is None or 0 <= shrinkage < 1
        require(good, "a shrinkage in [0, 1) or None", shrinkage)
        require(iterations >= 1, "at least 1 iteration", iterations)
        rows = as_shape("X", X, X.shape, X).double()
        scales = None if scales is None else _as_scales(scales, rows)
        model = None
        for s in LADDER if shrinkage is None else (shrinkage,):
            fitted = _expectation_maximisation(rows, scales, n_scales, s, iterations, tolerance)
            if fitted is not None and (model is None or fitted[-1] > model.leave_one_out):
                model = cls(*fitted[:-2], process)
                model.shrinkage, model.likelihoods, model.leave_one_out = s, *fitted[-2:]
        found = f"a singular one from X of shape {tuple(X.shape)} with shrinkage={shrinkage}"
        advice = "rows are too few, or columns constant or alike; drop those, or let shrinkage=None choose"
        require(model is not None, "a covariance of full rank", found, advice)
        return model.to(X)


def _as_scales(scales, like: Tensor) -> Tensor:
    scales = as_floating(scales, like)
    good = scales.ndim == 1 and len(scales) > 0 and ((scales > 0) & scales.isfinite()).all()
    require(good, "positive finite scales of shape (M,)", scales, "they multiply the variance")
    return scales


def default_scales(q: Tensor, count: int) -> Tensor:
    """An even grid of log v over the range of the rows' own volatilities q_i = |x_i|^2_S / d, (count,).

    No row is likelier under a v beyond the largest q or below the smallest; in few dimensions q comes close
    to 0 by chance, so the grid starts no lower than exp(-5) times the median.
    """
    require(count >= 1, "at least 1 scale", count, "use n_scales=16")
    high = q.max().log().item()
    low = max(q.min().log().item(), q.median().log().item() - 5, high - 20)
    if count == 1 or not low < high:
        return q.mean().reshape(1)
    return torch.exp(torch.linspace(low, high, count, dtype=q.dtype, device=q.device))


def _expectation_maximisation(X, scales, n_scales, shrinkage, iterations, tolerance):
    """Scales, weights, mean, covariance, objectives and leave-one-out likelihood; None if the covariance is singular."""
    n, d = X.shape
    mean, raw = X.mean(0), torch.atleast_2d(torch.cov(X.T, correction=0))
    deviations, target = raw.diagonal().sqrt(), raw.diagonal().diag()
    covariance = (1 - shrinkage) * raw + shrinkage * target
    weights, v, trace = None, scales, []
    while True:
        root, failed = torch.linalg.cholesky_ex(covariance)
        # Against each column's own deviation: a panel in mixed units is not singular. Roundoff leaves about 1e-8.
        if failed or not (root.diagonal() > 1e-6 * deviations).all():
            return None
        q = torch.linalg.solve_triangular(root, (X - mean).T, upper=False).square().sum(0)
        if weights is None:
            v = default_scales(q / d, n_scales) if v is None else v
            weights = torch.full_like(v, 1 / len(v))
        log_det = 2 * root.diagonal().log().sum()
        prior = log_det + torch.cholesky_solve(target, root).trace()
        joint = _joint(weights, v, q, log_det, d)
        trace.append(float((1 - shrinkage) * joint.logsumexp(1).mean() - shrinkage / 2 * prior))
        posterior = joint.softmax(1)
        r = posterior @ (1 / v)
        if len(trace) > iterations or (len(trace) > 1 and trace[-1] - trace[-2] < tolerance):
            break
        weights, mean = posterior.mean(0), r @ X / r.sum()
        centred = X - mean
        covariance = (1 - shrinkage) * (centred.T * r) @ centred / n + shrinkage * target
    # Without its own row the covariance is a rank-one change: q -> q/(1 - h), log|S| -> log|S| + log(1 - h).
    kept = (1 - (1 - shrinkage) * r * q / n).clamp(min=1e-12)
    held_out = _joint(weights, v, q / kept, log_det + kept.log(), d).logsumexp(1).mean()
    unit = weights @ v
    return v / unit, weights, mean, covariance * unit, tuple(trace), float(held_out)


def _joint(weights: Tensor, v: Tensor, q: Tensor, log_det: Tensor, d: int) -> Tensor:
    """log w_k N(x_i; m, v_k S), (n, M), from q_i = (x_i - m)^T S^-1 (x_i - m)."""
    normal = q[:, None] / v + d * torch.log(2 * torch.pi * v) + log_det.reshape(-1, 1)
    return weights.log() - 0.5 * normal
