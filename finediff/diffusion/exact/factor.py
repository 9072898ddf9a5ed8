"""A linear factor model along a path: only the k-dimensional law of the factors needs to be known.

    R = m + B F + e,   F in R^k,   e ~ N(0, u D), D diagonal:   R_t = alpha R + sigma eps
    Lambda = alpha^2 u D + sigma^2 I (diagonal),   Gamma = (B^T Lambda^-1 B)^-1 (k x k),   r = R_t - alpha m
    f_hat = Gamma B^T Lambda^-1 r = alpha F + N(0, Gamma):  all that R_t says about F
    F_hat = E[F | f_hat],  from the law of the factors
    score    = -Lambda^-1 (r - alpha B F_hat)
    E[R|R_t] = m + B F_hat + alpha u D Lambda^-1 (r - alpha B F_hat)
    log p_t  = log p_fac(f_hat) + 1/2 log|2 pi Gamma| - 1/2 log|2 pi Lambda|
               - 1/2 (r - B f_hat)^T Lambda^-1 (r - B f_hat)
    R        = m + e + B (f_hat - Gamma_0 B^T (u D)^-1 e),     f_hat ~ p_fac at t = 0: the complement is independent

With grad log p_fac = -Gamma^-1 (f_hat - alpha F_hat) the score is that of the paper; this form divides by neither
alpha nor sigma. Where u is random, P(u = u_m) = w_m, all of this holds given u_m, and what is asked for is the average
over P(u_m | R_t).
No d x d matrix appears: batch x d x k at one time t, batch x d x k^2 where each row has its own.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from finediff.diffusion.exact.factor_law import FactorLaw, MixtureFactors, ScaleFactors, apply_rows
from finediff.diffusion.exact.gaussian import ExactScore, as_floating, as_shape, as_weights
from finediff.diffusion.exact.given import draw_given, pool_size
from finediff.diffusion.process import Process, normal, require

_IN_CACHE = 2**18  # entries of the panel drawn at once


class FactorScore(ExactScore):
    """The exact model of R = mean + B F + e (Chen, Xu, Xu & Zhang 2025, arXiv 2504.06566).

    Parameters
    ----------
    loadings : (d, k)
        B, of full column rank; k = 0 (independent assets) and k = d are fine.
    idiosyncratic_variance : (d,), positive
        The diagonal of D.
    process : Process
    factors : FactorLaw or sequence of M of them, optional
        The law of F, or its law given each u_m. Default: N(0, I).
    mean : (d,), optional
        m; 0 by default.
    scales, weights : (M,) positive, (M,) non-negative of sum 1, optional
        The values u_m of the multiplier of e's variance, one draw of it for all assets, and their probabilities.
        One scale an asset would break the split. Default: u = 1.
    """

    def __init__(
        self,
        loadings,
        idiosyncratic_variance,
        process: Process,
        *,
        factors: FactorLaw | Sequence[FactorLaw] | None = None,
        mean=None,
        scales=None,
        weights=None,
    ) -> None:
        loadings = as_floating(loadings)
        require(loadings.ndim == 2, "loadings of shape (d, k)", tuple(loadings.shape))
        loadings = as_shape("loadings", loadings, loadings.shape, loadings)
        d, k = loadings.shape
        variance = as_shape("an idiosyncratic variance", idiosyncratic_variance, (d,), loadings)
        advice = (
            "an asset without noise of its own makes them singular; give it a little, or use GaussianScore"
        )
        require((variance > 0).all(), "positive idiosyncratic variances", f"{variance.min():.3g}", advice)
        full = k == 0 or torch.linalg.matrix_rank(loadings / variance.sqrt()[:, None]) == k
        advice = "drop the factors that repeat others"
        require(full, f"loadings of full column rank {k}", "a lower one", advice)
        mean = as_shape("a mean", torch.zeros(d) if mean is None else mean, (d,), loadings)
        scales = as_floating([1.0] if scales is None else scales, loadings)
        good = scales.ndim == 1 and len(scales) > 0 and ((scales > 0) & scales.isfinite()).all()
        require(good, "positive finite scales of shape (M,)", scales, "they multiply the variance")
        weights = torch.full_like(scales, 1 / len(scales)) if weights is None else weights
        super().__init__(
            process,
            loadings=loadings,
            idiosyncratic_variance=variance,
            mean=mean,
            scales=scales,
            weights=as_weights(weights, len(scales), loadings),
        )
        if factors is None:
            factors = MixtureFactors.gaussian(loadings.new_zeros(k), torch.eye(k).to(loadings))
        laws = [factors] * len(scales) if isinstance(factors, FactorLaw) else list(factors)
        found, advice = f"{len(laws)} for {len(scales)} scales", "or one for all"
        require(len(laws) == len(scales), "a law of the factors for each scale", found, advice)
        sizes = {getattr(law, "k", k) for law in laws}
        require(sizes == {k}, f"laws of the {k} factors that the loadings have", f"laws of {sizes}")
        self.laws = nn.ModuleList(laws)

    @property
    def gamma(self) -> Tensor:
        """Gamma_0 = (B^T D^-1 B)^-1, (k, k): what one scenario leaves unknown of its factors, at u = 1."""
        return self._gamma(self.idiosyncratic_variance)

    def _gamma(self, noise: Tensor) -> Tensor:
        precision = (self.loadings.T / noise[..., None, :]) @ self.loadings
        return torch.cholesky_inverse(torch.linalg.cholesky(precision))

    def project(self, x: Tensor) -> Tensor:
        """f_hat = Gamma_0 B^T D^-1 (x - m), (batch, k): generalised least squares, the same at every u."""
        return ((x - self.mean) / self.idiosyncratic_variance) @ self.loadings @ self.gamma

    def _parts(self, x: Tensor, t) -> tuple[Tensor, Tensor, list, Tensor]:
        """r (batch, d), alpha, [(u D, Lambda, F_hat) for each u_m], log w_m p_t(x | u_m) (batch, M)."""
        alpha, sigma = self.process.levels(t, x)
        r, parts, logs = x - alpha * self.mean, [], []
        for u, weight, law in zip(self.scales, self.weights, self.laws):
            own = u * self.idiosyncratic_variance
            noise = alpha**2 * own + sigma**2
            gamma = self._gamma(noise)
            f = apply_rows(gamma, (r / noise) @ self.loadings)
            parts.append((own, noise, law.denoise(f, t, alpha, gamma)))
            if len(self.scales) > 1:
                logs.append(weight.log() + self._log_density(r, t, alpha, noise, gamma, f, law))
        return r, alpha, parts, torch.stack(logs, 1) if logs else torch.zeros_like(x[:, :1])

    def _log_density(self, r, t, alpha, noise, gamma, f, law) -> Tensor:
        residual = r - f @ self.loadings.T
        complement = (residual**2 / noise + torch.log(2 * torch.pi * noise)).sum(-1)
        return law.log_prob(f, t, alpha, gamma) + 0.5 * (torch.logdet(2 * torch.pi * gamma) - complement)

    def posterior(self, x: Tensor, t=0.0) -> Tensor:
        """P(u = u_m | x_t = x), (batch, M)."""
        return self._joint(x, t).softmax(1)

    def denoise(self, x: Tensor, t, condition: Tensor | None = None) -> Tensor:
        r, alpha, parts, logs = self._parts(x, t)
        total = self.mean
        for share, (own, noise, F) in zip(logs.softmax(1).T, parts):
            common = F @ self.loadings.T
            total = total + share[:, None] * (common + alpha * own / noise * (r - alpha * common))
        return total

    def score(self, x: Tensor, t, condition: Tensor | None = None) -> Tensor:
        r, alpha, parts, logs = self._parts(x, t)
        return sum(
            share[:, None] * (alpha * F @ self.loadings.T - r) / noise
            for share, (_, noise, F) in zip(logs.softmax(1).T, parts)
        )

    def log_prob(self, x: Tensor, t=0.0) -> Tensor:
        return self._joint(x, t).logsumexp(1)

    def _joint(self, x: Tensor, t) -> Tensor:
        """log w_m p_t(x | u_m), (batch, M)."""
        alpha, sigma = self.process.levels(t, x)
        r, logs = x - alpha * self.mean, []
        for u, weight, law in zip(self.scales, self.weights, self.laws):
            noise = alpha**2 * u * self.idiosyncratic_variance + sigma**2
            gamma = self._gamma(noise)
            f = apply_rows(gamma, (r / noise) @ self.loadings)
            logs.append(weight.log() + self._log_density(r, t, alpha, noise, gamma, f, law))
        return torch.stack(logs, 1)

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        m = torch.multinomial(self.weights, n, replacement=True, generator=generator)
        gamma, D, B = self.gamma, self.idiosyncratic_variance, self.loadings
        f, x = B.new_empty(n, B.shape[1]), B.new_empty(n, len(B))
        for i, law in enumerate(self.laws):
            rows = (m == i).nonzero()[:, 0]
            if len(rows):
                f[rows] = law.observe(len(rows), self.scales[i] * gamma, generator)
        sizes, back = self.scales.sqrt()[m, None], (B / D.sqrt()[:, None]) @ gamma
        step = max(1, _IN_CACHE // len(B))
        for part in (slice(i, i + step) for i in range(0, n, step)):
            e = normal(x[part], generator).mul_(sizes[part])
            part_f = f[part] - e @ back
            torch.addmm(self.mean, part_f, B.T, out=x[part])
            x[part].addcmul_(e, D.sqrt())
        return x

    def sample_given(
        self, A: Tensor, low: Tensor, high: Tensor, generator: torch.Generator | None = None
    ) -> Tensor:
        """Draws of x_0 given low <= A x_0 <= high, (n, d), exact; ValueError unless every law is a `ScaleFactors`.

        Parameters
        ----------
        A : (k, d)
            Linearly independent rows.
        low, high : (n, k)
            Equal where a value is wanted; infinite where a side is open.
        generator : torch.Generator, optional
            Of the draws.
        """
        known = all(isinstance(law, ScaleFactors) for law in self.laws)
        require(known, "ScaleFactors for every scale", "another law", "its conditional law has no formula")
        A, low, high, B, D = (
            value.double() for value in (A, low, high, self.loadings, self.idiosyncratic_variance)
        )
        joint = torch.cat([w * law.weights for w, law in zip(self.weights, self.laws)])
        v = torch.cat([law.scales for law in self.laws]).double()
        u = torch.cat([s.expand(len(law.scales)) for s, law in zip(self.scales, self.laws)]).double()
        # Every pair of volatilities as often as any other: with one wish, only which is drawn is left to chance.
        possible = joint.nonzero()[:, 0]
        pool = possible.repeat(max(1, pool_size(A, low, high) // len(possible)))
        v, u, log_weights = v[pool], u[pool], joint.double().log()[pool]
        AB, AD = A @ B, A * D
        root = torch.linalg.cholesky(v[:, None, None] * (AB @ AB.T) + u[:, None, None] * (AD @ A.T))
        shift = A @ self.mean.double()

        def complete(chosen: Tensor, y: Tensor) -> Tensor:
            F = v[chosen, None].sqrt() * normal(B.new_empty(len(y), B.shape[1]), generator)
            e = normal(D.expand(len(y), -1), generator) * (u[chosen, None] * D).sqrt()
            x = e + F @ B.T
            gap = torch.cholesky_solve((y - x @ A.T)[..., None], root[chosen])[..., 0]
            return x + v[chosen, None] * (gap @ AB) @ B.T + u[chosen, None] * (gap @ AD)

        x = draw_given(low - shift, high - shift, root, log_weights, complete, generator)
        return self.mean + x.to(self.mean)
