"""A random volatility of each day, times one of each asset: a product scale mixture along a path, fitted by EM.

    x_0j = sqrt(tau u_j) e_j,  e ~ N(0, I):    P(tau = e^{kh}) = pi_k,  P(u_j = e^{lh}) = om_jl,  v_m = e^{mh}
    p(x_0) = sum_k pi_k prod_j sum_l om_jl N(x_0j; 0, v_{k+l})            one grid holds all products of two levels

Diffused, v becomes c = alpha^2 v + sigma^2. With B_jm = N(x_tj; 0, c_m) and (Om_j)_km = om_{j,m-k} all is matrix products:

    A_jk = sum_m (Om_j)_km B_jm,                      r_k = P(tau = v_k | x_t) = softmax_k(log pi_k + sum_j log A_jk)
    P_jm = P(tau u_j = v_m | x_t) = B_jm sum_k (r_k / A_jk) (Om_j)_km
    E[x_0j|x_t] = alpha x_tj sum_m P_jm v_m/c_m,      score_j = -x_tj sum_m P_jm/c_m

The cost is batch x d x K x M. Coordinates are independent given tau, so rows must be whitened first, and by the
symmetric root of a robust scatter: others lose .1 to .9 nats on returns. With one own level each it is
`ScaleMixtureScore` of the covariance I.
"""

from __future__ import annotations

import torch
from torch import Tensor

from finediff.diffusion.exact.gaussian import ExactScore, as_floating, as_shape, as_weights
from finediff.diffusion.exact.given import draw_given, pool_size, wide
from finediff.diffusion.process import Process, as_time, normal, require

STEP = 0.5  # between levels of log variance: half of it gains nothing, twice loses .08 nats on returns
# Numbers in a (d, rows, M) table: it stays in a core's cache, and memory does not grow with the rows.
_AT_ONCE = 2**18


class ProductScaleMixtureScore(ExactScore):
    """The exact model of centred coordinates that share one volatility and have one each.

    A product of two scale mixtures of normals (Andrews & Mallows 1974, JRSS B 36).

    Parameters
    ----------
    common : (K,), non-negative, sum 1
        pi: probabilities of the day's variances e^{kh}, k = -(K//2), ..., K - 1 - K//2.
    own : (d, L), non-negative, rows of sum 1
        om: probabilities of each coordinate's own variance e^{lh}, l = -(L//2), ..., L - 1 - L//2.
    step : float
        h, the distance between two levels of log variance.
    process : Process

    Attributes
    ----------
    variances : (K + L - 1,)
        v_m, of the whole grid.
    likelihoods : tuple of floats
        After `fit`: the log likelihood at each iteration, mean nats a row. Empty otherwise.
    """

    likelihoods: tuple[float, ...] = ()

    def __init__(self, common, own, step: float, process: Process) -> None:
        own = as_floating(own)
        require(own.ndim == 2 and own.numel() > 0, "own weights of shape (d, L)", tuple(own.shape))
        own = torch.stack([as_weights(row, own.shape[1], own) for row in own])
        common = as_floating(common, own)
        common = as_weights(common, common.numel(), own)
        require(step > 0, "a positive step between levels of log variance", step)
        of_day, of_asset = (_levels(count, step, own) for count in (len(common), own.shape[1]))
        super().__init__(
            process,
            common=common,
            own=own,
            bands=_bands(own, len(common)),
            log_common=of_day,
            variances=torch.cat([of_asset + of_day[0], of_day[1:] + of_asset[-1]]).exp(),
        )
        self.step = float(step)

    @property
    def covariance(self) -> Tensor:
        """Of x_0, (d, d): diagonal."""
        return torch.diag((self.common @ self.bands) @ self.variances)

    def _densities(self, x: Tensor, t) -> tuple[Tensor, Tensor, Tensor]:
        """B (d, batch, M) over its bound, the log of that summed over coordinates (batch,), c (1 or batch, M)."""
        alpha, sigma = (level.reshape(-1, 1) for level in self.process.levels(t, x))
        c = alpha**2 * self.variances + sigma**2
        square, constant = x.T.square(), torch.log(2 * torch.pi * c)
        # N(x; 0, c) is largest at c = x^2: that bound is taken out, so that far tails do not underflow.
        nearest = torch.minimum(torch.maximum(square, c[:, 0]), c[:, -1]).detach()
        volume = torch.log(2 * torch.pi * nearest)
        bound = volume + square / nearest
        # One difference of the two quadratic terms: of each alone, far out, rounding is larger than the difference.
        logs = volume[..., None] - constant + square[..., None] * (1 / nearest[..., None] - 1 / c)
        B = torch.exp(0.5 * logs)
        return B, -0.5 * bound.sum(0), c

    def _joint(self, B: Tensor) -> tuple[Tensor, Tensor]:
        """A (d, batch, K), and log pi_k p_t(x|k) over the bound (batch, K)."""
        A = (B @ self.bands.mT).clamp(min=torch.finfo(B.dtype).tiny)
        return A, self.common.log() + A.log().sum(0)

    def _blocks(self, x: Tensor, t):
        """Rows and their times, few enough at once for the tables to stay small."""
        t, size = as_time(t), max(1, _AT_ONCE // (x.shape[1] * len(self.variances)))
        for rows in range(0, max(len(x), 1), size):
            part = slice(rows, rows + size)
            yield x[part], t[part] if t.ndim else t

    def moments(self, x: Tensor, t) -> tuple[Tensor, Tensor, Tensor]:
        """What x_t = x says of the volatilities.

        Returns
        -------
        precision, gain : (batch, d)
            E[1/c | x_t], so that score = -precision x; E[v/c | x_t], so that E[x_0|x_t] = alpha gain x.
        log_common : (batch,)
            E[log tau | x_t], the day's log variance.
        """
        found = []
        for rows, times in self._blocks(x, t):
            B, _, c = self._densities(rows, times)
            A, joint = self._joint(B)
            r = joint.softmax(1)
            P = ((r / A) @ self.bands) * B
            of_each = torch.stack([1 / c, self.variances / c], 2)
            # One time for all rows, as in a sampler, is one product with a matrix of two columns.
            both = P @ of_each[0] if len(c) == 1 else torch.einsum("jbm,bmi->jbi", P, of_each)
            found.append((both[..., 0].T, both[..., 1].T, r @ self.log_common))
        return tuple(torch.cat(values) for values in zip(*found))

    def denoise(self, x: Tensor, t, condition: Tensor | None = None) -> Tensor:
        return self.process.levels(t, x)[0] * x * self.moments(x, t)[1]

    def score(self, x: Tensor, t, condition: Tensor | None = None) -> Tensor:
        return -x * self.moments(x, t)[0]

    def posterior(self, x: Tensor, t) -> Tensor:
        """P(tau = e^{kh} | x_t = x), (batch, K)."""
        return torch.cat(
            [self._joint(self._densities(*block)[0])[1].softmax(1) for block in self._blocks(x, t)]
        )

    def log_prob(self, x: Tensor, t=0.0) -> Tensor:
        tables = (self._densities(*block) for block in self._blocks(x, t))
        return torch.cat([self._joint(B)[1].logsumexp(1) + bound for B, bound, _ in tables])

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        k = torch.multinomial(self.common, n, replacement=True, generator=generator)
        m = k[:, None] + torch.multinomial(self.own, n, replacement=True, generator=generator).T
        return self.variances[m].sqrt() * normal(self.own[None, :, 0], generator, n)

    def sample_posterior(self, x: Tensor, t, generator: torch.Generator | None = None) -> Tensor:
        """One exact draw of x_0 given x_t = x for each row, (batch, d): tau, then each u_j, then a Gaussian."""
        draws = []
        for rows, times in self._blocks(x, t):
            B = self._densities(rows, times)[0]
            joint = self._joint(B)[1]
            k = torch.multinomial(joint.softmax(1), 1, generator=generator)[:, 0]
            P = (B * self.bands[:, k]).reshape(-1, len(self.variances))
            m = torch.multinomial(P, 1, generator=generator).reshape(x.shape[1], len(rows)).T
            alpha, sigma = self.process.levels(times, rows)
            v = self.variances[m]
            c = alpha**2 * v + sigma**2
            draws.append(alpha * v / c * rows + sigma * (v / c).sqrt() * normal(rows, generator))
        return torch.cat(draws)

    def sample_given(
        self, A: Tensor, low: Tensor, high: Tensor, generator: torch.Generator | None = None
    ) -> Tensor:
        """Draws of x_0 given low <= A x_0 <= high, (n, d): volatilities first, so a violent wish means a violent day.

        Given all variances x_0 is Gaussian. They are drawn from a pool, wider than their law, with probabilities
        proportional to their law's times that of the wish (sampling importance resampling: Rubin 1987; bands by the
        sequential rule of Geweke, Hajivassiliou and Keane); A x_0 and then x_0 follow exactly.

        Parameters
        ----------
        A : (k, d)
            Linearly independent rows.
        low, high : (n, k)
            Equal where a value is wanted; infinite where a side is open.
        generator : torch.Generator, optional
            Of the draws.
        """
        A, low, high = (value.double() for value in (A, low, high))
        variances, log_weights = self._pool(A, pool_size(A, low, high), generator)
        S = (A * variances[:, None, :]) @ A.T
        root = torch.linalg.cholesky(S)

        def complete(chosen: Tensor, y: Tensor) -> Tensor:
            v = variances[chosen]
            x = v.sqrt() * normal(v, generator)
            gap = torch.cholesky_solve((y - x @ A.T)[..., None], root[chosen])
            return x + v * (gap[..., 0] @ A)

        return draw_given(low, high, root, log_weights, complete, generator).to(self.own)

    def _pool(self, A: Tensor, count: int, generator) -> tuple[Tensor, Tensor]:
        """Variances (count, d) and log weights of draws that are wide for the day and for the assets A is mostly of."""

        level, log_weights = wide(self.common, count, generator)
        own = torch.multinomial(self.own, count, replacement=True, generator=generator).T.contiguous()
        for j in set(A.abs().argmax(1).tolist()):
            own[:, j], more = wide(self.own[j], count, generator)
            log_weights = log_weights + more
        return self.variances.double()[level[:, None] + own], log_weights

    @classmethod
    def fit(
        cls,
        X,
        process: Process,
        *,
        step: float = STEP,
        n_common: int = 12,
        n_own: int = 13,
        iterations: int = 60,
        prior: float = 2.0,
    ) -> ProductScaleMixtureScore:
        """Both laws of the variances by EM (Dempster, Laird & Rubin 1977, JRSS B 39): matrix products only.

        Parameters
        ----------
        X : (n, d) array or tensor
            Whitened rows of about unit scale: the grid reaches from e^{-5.75} to e^{5.75} by default.
        process : Process
            The path along which the law is then diffused; the fit does not depend on it.
        step, n_common, n_own : float, int, int
            The grid: h, K and L.
        iterations : int
            Of EM.
        prior : float
            Rows' worth of a log-normal law of variance h^2 (L/6)^2 that each coordinate's own law is drawn towards;
            the day's law is drawn towards one like it by one row's worth.

        Raises
        ------
        ValueError
            For X that is not a finite (n, d) matrix with n >= 2.
        """
        X = as_floating(X)
        require(X.ndim == 2 and len(X) >= 2, "X of shape (n, d) with n >= 2", tuple(X.shape))
        rows = as_shape("X", X, X.shape, X)
        counts = (n_common, n_own, iterations)
        require(min(counts) >= 1, "at least 1 level of each kind and 1 iteration", counts)
        start = torch.softmax(-0.5 * (_levels(n_own, 1.0, rows) * 6 / n_own) ** 2, 0)
        day = torch.softmax(-0.5 * (_levels(n_common, 1.0, rows) * 6 / n_common) ** 2, 0)
        model = cls(rows.new_ones(n_common) / n_common, start.expand(X.shape[1], -1), step, process)
        # B does not change from one iteration to the next: n d M numbers are kept, and all else is in blocks.
        tables = [model._densities(*block)[:2] for block in model._blocks(rows, 0.0)]
        trace = []
        for _ in range(iterations):
            days, counts, value = model._counts(tables)
            trace.append(value / len(rows))
            own = counts + prior * start
            days = days + day
            model = cls(days / days.sum(), own / own.sum(1, keepdim=True), step, process)
        model.likelihoods = tuple(trace)
        return model

    def _counts(self, tables: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor, float]:
        """Expected days on each common level (K,), days on each own level (d, L), and the log likelihood."""
        days, pairs, value = torch.zeros_like(self.common), torch.zeros_like(self.bands), 0.0
        for B, bound in tables:
            A, joint = self._joint(B)
            r = joint.softmax(1)
            days, value = days + r.sum(0), value + float((joint.logsumexp(1) + bound).sum())
            pairs += (r / A).mT @ B
        pairs, K = pairs * self.bands, len(self.common)
        levels = range(self.own.shape[1])
        return days, torch.stack([pairs.diagonal(level, 1, 2)[:, :K].sum(1) for level in levels], 1), value


def _levels(count: int, step: float, like: Tensor) -> Tensor:
    """step times -(count//2), ..., count - 1 - count//2."""
    return step * (torch.arange(count, dtype=like.dtype, device=like.device) - count // 2)


def _bands(own: Tensor, n_common: int) -> Tensor:
    """(Om_j)_km = om_{j,m-k}, (d, K, K + L - 1): each row of Om_j is om_j one place further."""
    bands = own.new_zeros(len(own), n_common, n_common + own.shape[1] - 1)
    for k in range(n_common):
        bands[:, k, k : k + own.shape[1]] = own
    return bands
