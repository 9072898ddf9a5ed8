"""A score model with one hidden layer, trained by linear solves; its inner weights random or refined by L-BFGS.

    y = c^-1/2 U' (x - alpha m),   c = alpha^2 l + sigma^2               base: N(m, U diag(l) U'), exact and linear
    eps_hat = eps_base + (alpha sigma/r^2) U B(log-SNR)' phi(W y + b),   B linear between the noise levels of the fit
    R = E[phi (z - eps_base)'],     per level: (G + lambda D) B = R

The residual vanishes with alpha sigma at both ends, so beyond the first and last level B stays constant. Variable
projection (Golub & Pereyra 1973): the loss as a function of (W, b) alone, B solved inside,

    L(W, b) = sum_levels w min_B [ tr B' (G + lambda I) B - 2 tr B' R ],      dL = dL at B frozen        (envelope)

so the gradient needs derivatives of G and R only. Minimised to the end the rows are memorised: the weights kept are
those whose exact loss on held-out rows is least.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from finediff.diffusion.closed_form.hermite import Activation, activate
from finediff.diffusion.closed_form.moments import moments
from finediff.diffusion.closed_form.solve import RIDGES, fold_ridge
from finediff.diffusion.process import as_time, expand, require
from finediff.diffusion.score import ScoreModel

# Pre-activations held at once: few on a CPU, whose cache they should fit; all levels at once on an accelerator.
_CHUNK = {"cpu": 2**18}
_CHUNK_ELSEWHERE = 2**27


class RidgeScore(ScoreModel):
    """Gaussian base plus a residual that is linear in features phi(W y + b), one output layer per noise level.

    Parameters
    ----------
    base : GaussianScore
        With ``mean`` (d,), ``eigenvalues`` (d,), ``eigenvectors`` (d, d); the model is on its process.
    weights, bias : (h, d), (h,)
        W and b of the hidden layer; the input y has unit covariance at every level under the base.
    log_snr : (T,)
        Levels of the fit, increasing.
    output : (T, h, d)
        B at those levels, for coordinates y.
    activation : Activation
    """

    def __init__(
        self,
        base: ScoreModel,
        weights: Tensor,
        bias: Tensor,
        log_snr: Tensor,
        output: Tensor,
        activation: Activation = "cos",
    ) -> None:
        super().__init__()
        expected = (len(log_snr), *weights.shape)
        require(output.shape == expected, f"an output layer of shape {expected}", tuple(output.shape))
        increasing = len(log_snr) >= 2 and (log_snr.diff() > 0).all()
        require(increasing, "2 or more increasing log_snr", log_snr.tolist(), "sort the levels")
        self.base, self.process, self.activation = base, base.process, activation
        for name, value in {"weights": weights, "bias": bias, "log_snr": log_snr, "output": output}.items():
            self.register_buffer(name, value.detach().to(base.mean))

    def denoise(self, x: Tensor, t, condition: Tensor | None = None) -> Tensor:
        _, sigma, square = self._levels(x, t)
        return self.base.denoise(x, t) - sigma**2 / square * self._residual(x, t)

    def noise(self, x: Tensor, t, condition: Tensor | None = None) -> Tensor:
        alpha, sigma, square = self._levels(x, t)
        return self.base.noise(x, t) + alpha * sigma / square * self._residual(x, t)

    def score(self, x: Tensor, t, condition: Tensor | None = None) -> Tensor:
        alpha, _, square = self._levels(x, t)
        return self.base.score(x, t) - alpha / square * self._residual(x, t)

    def _levels(self, x: Tensor, t) -> tuple[Tensor, Tensor, Tensor]:
        alpha, sigma = self.process.levels(t, x)
        return alpha, sigma, alpha**2 + sigma**2

    def _residual(self, x: Tensor, t) -> Tensor:
        """U B(log-SNR)' phi, (batch, d)."""
        t = as_time(t)
        alpha, sigma = self.process.levels(t, x)
        y = ((x - alpha * self.base.mean) @ self.base.eigenvectors) * _whitener(self.base, alpha, sigma)
        phi = activate(y @ self.weights.T + self.bias, self.activation)
        level = self.process.log_snr(t).to(self.log_snr).clamp(self.log_snr[0], self.log_snr[-1])
        right = torch.searchsorted(self.log_snr, level.contiguous()).clamp(1, len(self.log_snr) - 1)
        low, high = self.log_snr[right - 1], self.log_snr[right]
        share = (level - low) / (high - low)
        if t.ndim == 0:
            B = torch.lerp(self.output[right - 1], self.output[right], share)
            return phi @ B @ self.base.eigenvectors.T
        residual = torch.zeros_like(x)
        for k in torch.cat([right - 1, right]).unique().tolist():
            weight = torch.where(right == k, share, torch.where(right == k + 1, 1 - share, 0.0))
            rows = (weight != 0).nonzero()[:, 0]
            residual[rows] += expand(weight[rows], x[rows]) * (phi[rows] @ self.output[k])
        return residual @ self.base.eigenvectors.T


def _whitener(base: ScoreModel, alpha: Tensor, sigma: Tensor) -> Tensor:
    """c^-1/2: alpha, sigma (..., 1) or () -> (..., d)."""
    variance = alpha**2 * base.eigenvalues + sigma**2
    return variance.clamp(min=torch.finfo(variance.dtype).tiny).rsqrt()


@dataclass(frozen=True)
class NormalEquations:
    """Rows in the base's eigenbasis, (n, d), and the noise levels of a fit, each (T,)."""

    rows: Tensor
    eigenvalues: Tensor
    alpha: Tensor
    sigma: Tensor

    @property
    def size(self) -> Tensor:
        """(alpha sigma/r^2)^2: what the square of B' phi is multiplied by in the loss, (T,) float64."""
        return (self.alpha * self.sigma / (self.alpha**2 + self.sigma**2)).double() ** 2

    def chunks(self, h: int) -> Iterator[slice]:
        limit = _CHUNK.get(self.rows.device.type, _CHUNK_ELSEWHERE)
        size = max(1, limit // (len(self.rows) * h))
        for start in range(0, len(self.alpha), size):
            yield slice(start, min(start + size, len(self.alpha)))

    def equations(
        self, rows: Tensor, at: slice, weights: Tensor, bias: Tensor, activation: Activation, terms: int
    ) -> tuple[Tensor, Tensor]:
        """Means over rows of G (T', h, h) and of R / (alpha sigma/r^2) (T', h, d), so that B multiplies phi."""
        alpha, sigma = self.alpha[at], self.sigma[at]
        variance = alpha[:, None] ** 2 * self.eigenvalues + sigma[:, None] ** 2
        scaled = weights * variance.rsqrt()[:, None, :]  # (T', h, d), acting on x - alpha m in the eigenbasis
        means = rows @ (alpha[:, None, None] * scaled).mT + bias
        scales = sigma[:, None] * scaled.square().sum(-1).sqrt()
        G, found = moments(means, scales, scaled, rows, alpha, sigma, activation, terms)
        # E[phi (z - sigma x/c)']; the share of E[phi z'] left is alpha^2 l/c = 1 - sigma^2/c.
        factor = (alpha / variance.T).T
        R = factor[:, None, :] * (
            (alpha[:, None] * self.eigenvalues)[:, None, :] * found.noise - sigma[:, None, None] * found.data
        )
        return G, R * ((alpha**2 + sigma**2) / (alpha * sigma))[:, None, None]


@dataclass(frozen=True)
class RidgeHistory:
    """How a `RidgeScore` was fitted.

    Attributes
    ----------
    candidates : list of float
        Cross-validated nats of each bandwidth, from every third level; empty where there was one.
    bandwidth : float
        The one chosen.
    ridge, gain : (T,)
        lambda, relative to diag G, and cross-validated gain in E|z - eps_hat|^2 per noise level; 0 is off.
    nats : float
        Cross-validated gain over the base, 1/2 int gain d log-SNR, of the final weights. After a refinement it
        flatters: W and b have seen all folds.
    held_out : list of float
        Loss on held-out rows at each evaluation of the refinement, nats over the base with the sign of a loss.
    """

    candidates: list[float]
    bandwidth: float
    ridge: Tensor
    gain: Tensor
    nats: float
    held_out: list[float] = field(default_factory=list)


def fit_ridge_score(
    x: Tensor,
    base: ScoreModel,
    *,
    n_features: int = 64,
    bandwidths: Sequence[float] = (0.5, 1.0, 2.0),
    activation: Activation = "cos",
    log_snr: tuple[float, float] = (-6.0, 9.0),
    n_levels: int = 24,
    folds: int = 5,
    ridges: Sequence[float] = RIDGES,
    margin: float = 2.0,
    evaluations: int = 0,
    terms: int = 12,
    generator: torch.Generator | None = None,
) -> tuple[RidgeScore, RidgeHistory]:
    """Fit a `RidgeScore`: random features, one exact ridge per noise level, optionally refined by L-BFGS.

    Products are in x's dtype, solves in float64. Deterministic given the generator's state.

    Parameters
    ----------
    x : (n, d)
        Rows of x_0, on the base's device. Folds are contiguous blocks of them: shuffle unless order matters.
    base : GaussianScore
        Any model with ``mean``, ``eigenvalues``, ``eigenvectors`` whose score is that of the Gaussian.
    n_features : int
        h. Cost per level n h^2; memorises less than it seems, because lambda is cross-validated.
    bandwidths : sequence of floats
        Candidate standard deviations of the weights, in units of one whitened coordinate; the best by nats stays.
    activation, terms : Activation, int
        As in `gram`.
    log_snr, n_levels : pair of floats, int
        Range and number of noise levels, equally spaced.
    folds, ridges, margin : int, sequence of floats, float
        As in `fold_ridge`. With 2 folds in place of 5 the solves cost half, and the fit is little worse.
    evaluations : int
        Most evaluations of the loss and its gradient in refining W and b; 0 keeps them random. 30 are enough.
    generator : torch.Generator, optional
        Of the features, on x's device.

    Returns
    -------
    RidgeScore, RidgeHistory
    """
    require(
        x.ndim == 2 and len(x) >= folds >= 2, "rows (n, d), n >= folds >= 2", f"{tuple(x.shape)}, {folds}"
    )
    require(
        n_levels >= 2 and log_snr[0] < log_snr[1],
        "2 levels or more in a range low < high",
        (n_levels, log_snr),
    )
    require(len(bandwidths) > 0, "at least one bandwidth", bandwidths, "1.0 is of the size of the data")
    points = torch.linspace(*log_snr, n_levels, dtype=torch.float64)
    t = base.process.time(points)
    rows = (x - base.mean.to(x)) @ base.eigenvectors.to(x)
    alpha, sigma = base.process.alpha(t).to(x), base.process.sigma(t).to(x)
    levels = NormalEquations(rows, base.eigenvalues.to(x), alpha, sigma)
    half_step = 0.5 * (log_snr[1] - log_snr[0]) / (n_levels - 1)

    shape = (n_features, x.shape[1])
    like = {"dtype": torch.float64, "device": x.device, "generator": generator}
    directions, phase = torch.randn(shape, **like).to(x), torch.rand(n_features, **like).to(x)
    options = activation, terms, folds, ridges, margin
    candidates = [(bandwidth * directions, _bias(phase, bandwidth, activation)) for bandwidth in bandwidths]
    # A third of the levels tells bandwidths apart and carries the refinement; the last solve has all.
    third = slice(1, None, 3)
    few, step = replace(levels, alpha=alpha[third], sigma=sigma[third]), 3 * half_step
    nats, best = [], 0
    if len(candidates) > 1:
        nats = [step * float(_solve(few, *layer, *options)[2].sum()) for layer in candidates]
        best = max(range(len(nats)), key=nats.__getitem__)
    layer, held_out = candidates[best], []
    if evaluations:
        ridge = _solve(few, *layer, *options)[1]
        layer, held_out = _refine(few, *layer, activation, terms, ridge, step * few.size, evaluations)
    output, ridge, gain = _solve(levels, *layer, *options)
    history = RidgeHistory(
        nats, float(bandwidths[best]), ridge, gain, half_step * float(gain.sum()), held_out
    )
    return RidgeScore(base, *layer, points, output, activation), history


def _bias(phase: Tensor, bandwidth: float, activation: Activation) -> Tensor:
    """A uniform phase for cos; kinks spread over the data (|y| <= 3) for the others."""
    return 2 * torch.pi * phase if activation == "cos" else bandwidth * (6 * phase - 3)


def _solve(levels, weights, bias, activation, terms, folds, ridges, margin) -> tuple[Tensor, Tensor, Tensor]:
    """`fold_ridge` of all levels: B (T, h, d), lambda (T,) and the gain in E|z - eps_hat|^2 (T,)."""
    n, found = len(levels.rows), []
    for at in levels.chunks(len(weights)):
        parts = [
            [len(rows) / n * a for a in levels.equations(rows, at, weights, bias, activation, terms)]
            for rows in levels.rows.tensor_split(folds)
        ]
        fit = fold_ridge(*(torch.stack(a, 1) for a in zip(*parts)), ridges, margin=margin)
        found.append((fit.weights, fit.ridge, levels.size[at] * fit.gain.sum(-1)))
    return tuple(torch.cat(a) for a in zip(*found))


class _Stop(Exception):
    pass


def _projected_loss(G: Tensor, R: Tensor, ridge: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """sum w min_B [tr B'(G + ridge)B - 2 tr B'R], whose gradient is taken at B frozen, and B (T', h, d)."""
    with torch.no_grad():
        eye = torch.eye(G.shape[-1], dtype=torch.float64, device=G.device)
        factor = torch.linalg.cholesky(G.double() + ridge[:, None, None] * eye)
        B = torch.cholesky_solve(R.double(), factor)
        penalty = (ridge * B.square().sum((-1, -2)) * weight).sum()
    return _quadratic(G, R, B, weight) + penalty, B


def _quadratic(G: Tensor, R: Tensor, B: Tensor, weight: Tensor) -> Tensor:
    G, R = G.double(), R.double()
    return (weight[:, None, None] * B * (G @ B - 2 * R)).sum()


def _refine(levels, weights, bias, activation, terms, ridge, weight, evaluations, patience: int = 10):
    """W and b by L-BFGS on four fifths of the rows, kept where the exact loss of the rest is least."""
    cut = len(levels.rows) // 5
    training, rest = levels.rows[cut:], levels.rows[:cut]
    parameters = [weights.clone().requires_grad_(True), bias.clone().requires_grad_(True)]
    best, history, absolute = None, [], {}
    # Roundoff may leave G with eigenvalues of -h eps.
    ridge = ridge.clamp(min=len(weights) * torch.finfo(weights.dtype).eps)
    optimizer = torch.optim.LBFGS(
        parameters, max_iter=evaluations, max_eval=evaluations, history_size=20, line_search_fn="strong_wolfe"
    )

    def closure() -> float:
        nonlocal best
        optimizer.zero_grad()
        loss = held = 0.0
        for at in levels.chunks(len(weights)):
            G, R = levels.equations(training, at, *parameters, activation, terms)
            if at.start not in absolute:
                # Fixed from here on: the loss must stay the same function of W and b.
                mean = G.detach().diagonal(dim1=-2, dim2=-1).mean(-1).double()
                absolute[at.start] = ridge[at] * mean
            part, B = _projected_loss(G, R, absolute[at.start], weight[at])
            part.backward()
            loss += float(part.detach())
            with torch.no_grad():
                left = levels.equations(rest, at, *parameters, activation, terms)
                held += float(_quadratic(*left, B, weight[at]))
        history.append(held)
        if best is None or held < min(history[:-1]):
            best = [p.detach().clone() for p in parameters]
        if len(history) >= evaluations or len(history) - history.index(min(history)) > patience:
            raise _Stop
        return loss

    with contextlib.suppress(_Stop):
        optimizer.step(closure)
    return best, history
