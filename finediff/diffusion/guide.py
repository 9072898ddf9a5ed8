"""How to steer: a guide wraps a model and is a model, so every guide runs under every sampler.

    classifier-free   x0 = (1 + w) x0_hat(x, y) - w x0_hat(x, none)             w = 0: plainly conditional
    classifier        x0 = x0_hat + w (sigma^2/alpha) grad_x log p(y | x_t, t)
    inpainting        x0 = x0_hat with the known coordinates put in             (replacement: biased)
    linear stress     x0 = x0_hat + C A' (A C A')^-1 (b - A x0_hat),            C = (sigma^2/alpha) d x0_hat/d x

C is the covariance of x_0 given x_t (Tweedie), so the last line is conditioning a Gaussian: exact where x_0 is
Gaussian, guidance otherwise. In a band lo <= A x_0 <= hi, b is the mean of the truncated normal.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from finediff.diffusion.process import Process, as_time, expand, require
from finediff.diffusion.score import ScoreModel


class Guide(ScoreModel):
    """A model that wraps another one; it is differentiable in x, so guides nest and have a `log_prob`."""

    def __init__(self, model: ScoreModel) -> None:
        super().__init__()
        self.model, self.process = model, model.process

    @property
    def score_valid(self) -> bool:
        return self.model.score_valid

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    @property
    def device(self) -> torch.device:
        return self.model.device

    def _as_buffer(self, value) -> Tensor:
        return torch.as_tensor(value, dtype=self.model.dtype, device=self.model.device)


def _tweedie(process: Process, x: Tensor, t, t_last: float, function) -> tuple[Tensor, Tensor]:
    """The value of ``function(x, t) -> value, columns (batch, k)``, and sigma^2/alpha d columns/d x, (batch, d, k).

    Beyond t_last they are read at t_last and (alpha(t)/alpha(t_last)) x: what x tells of x_0 is linear in alpha x
    there, so E[x_0 | x_t] is the same but for a share alpha(t_last)^2, and alpha is not 0.
    """
    keep_graph = torch.is_grad_enabled() and x.requires_grad
    t, near_t = as_time(t), as_time(t).clamp(max=t_last)
    with torch.enable_grad():
        y = x if keep_graph else x.detach().requires_grad_(True)
        near = expand(process.alpha(t) / process.alpha(near_t), x) * y
        value, columns = function(near, near_t)
        gradients = [
            torch.autograd.grad(column.sum(), near, retain_graph=True, create_graph=keep_graph)[0]
            for column in columns.unbind(1)
        ]
    factor = expand(process.sigma(near_t) ** 2 / process.alpha(near_t), x)[..., None]
    return value if keep_graph else value.detach(), factor * torch.stack(gradients, 2)


class ClassifierFreeGuidance(Guide):
    """Ho & Salimans 2022 (arXiv 2207.12598), shifted so that ``weight`` 0 is the plain conditional model.

    A weight above 0 sharpens the condition; -1 drops it. The model is one trained with conditions dropped at random:
    ``condition=None`` is its unconditional law.
    """

    def __init__(self, model: ScoreModel, weight: float = 0.0) -> None:
        super().__init__(model)
        self.weight = weight

    def denoise(self, x: Tensor, t, condition: Tensor | None = None) -> Tensor:
        given = self.model.denoise(x, t, condition)
        if self.weight == 0 or condition is None:
            return given
        return (1 + self.weight) * given - self.weight * self.model.denoise(x, t, None)


class ClassifierGuidance(Guide):
    """Dhariwal & Nichol 2021 (arXiv 2105.05233): the score plus ``weight`` times the classifier's.

    ``classifier`` maps noisy rows x (batch, d) and t (batch,) to logits (batch, classes), as
    `finediff.generators.classifier.train_classifier` makes one; ``label`` is the class wanted. Weight 1 is Bayes' rule
    where model and classifier are exact.
    """

    def __init__(self, model: ScoreModel, classifier, label: int, weight: float = 1.0) -> None:
        super().__init__(model)
        self.classifier, self.label, self.weight = classifier, label, weight
        # A classifier has seen no noisier rows than those of the grid, and 1/alpha magnifies its errors.
        self._t_last = float(self.process.time(self.process.log_snr_range()[0]))

    def denoise(self, x: Tensor, t, condition: Tensor | None = None) -> Tensor:
        def log_p(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
            found = torch.log_softmax(self.classifier(x, t.to(x.device).expand(len(x))), 1)
            return found, found[:, [self.label]]

        _, gradient = _tweedie(self.process, x, t, self._t_last, log_p)
        return self.model.denoise(x, t, condition) + self.weight * gradient[:, :, 0]


class Inpainting(Guide):
    """Replacement: the known coordinates of x0_hat are the given values (Song et al. 2021; Lugmayr et al. 2022).

    The known part of x_t then follows its own forward path exactly, but the unknown part is denoised as if by
    chance: the result is NOT the conditional law (on a correlated Gaussian the dependence on the known part is too
    weak; the tests show by how much). `LinearStress` with rows of the identity is the better choice.

    ``known`` (d,) says which, ``values`` (d,) or (batch, d) are theirs; entries outside ``known`` are ignored.
    """

    def __init__(self, model: ScoreModel, known, values) -> None:
        super().__init__(model)
        self.register_buffer("known", torch.as_tensor(known, dtype=torch.bool, device=model.device))
        self.register_buffer("values", self._as_buffer(values))
        fits = self.known.ndim == 1 and self.values.shape[-1:] == self.known.shape
        found = f"{tuple(self.known.shape)} and {tuple(self.values.shape)}"
        require(fits, "known of shape (d,) and values of shape (d,) or (batch, d)", found)

    def denoise(self, x: Tensor, t, condition: Tensor | None = None) -> Tensor:
        return torch.where(self.known, self.values.to(x), self.model.denoise(x, t, condition))


class LinearStress(Guide):
    """A x_0 = b, or lo <= A x_0 <= hi: chosen assets or portfolios move by given amounts.

    Diffusion posterior sampling with Tweedie's covariance (Boys et al. 2023, arXiv 2310.06721). The constraint always
    holds. Of a heavy-tailed law stressed by 4 standard deviations the others' mean is right, and their spread 14 %
    too small (27 % with ``covariance``); between separate regimes it chooses the likelier too seldom (see the tests).

    Raises ValueError for wrong shapes, dependent rows, lo > hi, and a model with parameters but no ``covariance``.

    Parameters
    ----------
    model : ScoreModel
    A : (k, d)
        One row a constraint, linearly independent.
    b : (k,) or (batch, k), or a pair (lo, hi) of those
        A pair is a band; -inf and inf leave a side open. With several bands each target is the truncated mean of
        its own margin: exact for one constraint on a Gaussian, an approximation for more.
    covariance : (d, d), optional
        None: Tweedie's Cov(x_0 | x_t) by automatic differentiation, one product a constraint; for exact models.
        S, the covariance of the rows: Cov(x_0 | x_t) = sigma^2 S (alpha^2 S + sigma^2 I)^-1, without derivatives.
        For networks: their slopes at high noise are errors, which the division magnifies a thousandfold.
    """

    def __init__(self, model: ScoreModel, A, b, covariance=None) -> None:
        super().__init__(model)
        self.register_buffer("A", torch.atleast_2d(self._as_buffer(A)))
        (k, d), rank = self.A.shape, int(torch.linalg.matrix_rank(self.A))
        advice = "two stresses say something about the same portfolio"
        require(rank == k, "linearly independent rows in A", f"{k} rows of rank {rank}", advice)
        for name, value in zip(("low", "high"), b if isinstance(b, tuple) else (b, b), strict=True):
            value = torch.atleast_1d(self._as_buffer(value))
            fits = value.shape[-1] == k and value.ndim <= 2
            require(fits, f"b of shape ({k},) or (batch, {k}), one entry a row of A", tuple(value.shape))
            self.register_buffer(name, value)
        ordered = (self.low <= self.high).all()
        require(ordered, "lo <= hi in every band", "one the other way round, or NaN", "swap them")
        self.known_covariance = covariance is not None
        self._t_last = float(self.process.time(-20.0))
        good = self.known_covariance or not any(True for _ in model.parameters())
        found = "None, because the derivative of a trained network is too noisy to divide by"
        require(good, "covariance= for a model with parameters", found, "give that of its training rows")
        if self.known_covariance:
            covariance = self._as_buffer(covariance)
            fits = covariance.shape == (d, d)
            require(fits, f"a covariance of the {d} columns of A", f"shape {tuple(covariance.shape)}")
            eigenvalues, eigenvectors = torch.linalg.eigh(covariance)
            self.register_buffer("eigenvalues", eigenvalues.clamp(min=0))
            self.register_buffer("eigenvectors", eigenvectors)

    def denoise(self, x: Tensor, t, condition: Tensor | None = None) -> Tensor:
        def mapped_x0(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
            x0 = self.model.denoise(x, t, condition)
            return x0, x0 @ self.A.T

        if self.known_covariance:
            x0, CA = self.model.denoise(x, t, condition), self._gaussian(x, t)
        else:
            x0, CA = _tweedie(self.process, x, t, self._t_last, mapped_x0)
        mapped, ACA = x0 @ self.A.T, self.A @ CA
        deviation = torch.diagonal(ACA, dim1=1, dim2=2).clamp(min=1e-30).sqrt()
        gap = _truncated_mean(mapped, deviation, self.low, self.high) - mapped
        return x0 + (CA @ torch.linalg.solve(ACA, gap[:, :, None]))[:, :, 0]

    def _gaussian(self, x: Tensor, t) -> Tensor:
        """C A^T (batch, d, k), C = Cov(x_0 | x_t) as if x_0 were Gaussian."""
        signal, noise = (level.reshape(-1, 1) ** 2 for level in self.process.levels(t, x))
        variances = noise * self.eigenvalues / (signal * self.eigenvalues + noise)
        return (self.eigenvectors * variances[:, None, :]) @ (self.eigenvectors.T @ self.A.T)


def _truncated_mean(mean: Tensor, deviation: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """E[z | low <= z <= high] of z ~ N(mean, deviation^2): low where low = high, stable in the tails.

    (phi(a) - phi(b))/(Phi(b) - Phi(a)) with phi(a) divided out: (1 - q)/(M(a) - q M(b)), q = phi(b)/phi(a), and
    M(a) = Phi(-a)/phi(a) Mills' ratio. Its derivatives are finite too, for open bands as well.
    """

    def edge(value: Tensor, if_open: float) -> Tensor:
        closed = value.isfinite()
        return torch.where(closed, (torch.where(closed, value, mean) - mean) / deviation, if_open)

    a, b = edge(low, -1e18), edge(high, 1e18)
    # By symmetry, work where the band lies to the right of the mean.
    flip = a + b < 0
    a, b = torch.where(flip, -b, a).clamp(min=-10), torch.where(flip, -a, b)
    b = torch.minimum(b, a.abs() + 1000)
    # A band that is too narrow to be told from a point takes its middle.
    narrow = b - a < 1e-3
    end = torch.where(narrow, a + 1 + 2 * a.abs(), b)
    fall = -(end - a) * (end + a) / 2
    wide = -torch.expm1(fall) / (_mills(a) - torch.exp(fall) * _mills(end))
    shift = torch.where(narrow, (a + b) / 2, wide)
    value = mean + deviation * torch.where(flip, -shift, shift)
    return torch.where(low == high, low.expand_as(value), torch.maximum(torch.minimum(value, high), low))


def _mills(z: Tensor) -> Tensor:
    return math.sqrt(math.pi / 2) * torch.special.erfcx(z / math.sqrt(2))
