"""How to steer: a guide wraps a model and is a model, so every guide runs under every sampler.

    classifier-free   x0 = (1 + w) x0_hat(x, y) - w x0_hat(x, none)             w = 0: plainly conditional
    classifier        x0 = x0_hat + w (sigma^2/alpha) grad_x log p(y | x_t, t)
    inpainting        x0 = x0_hat with the known coordinates put in             (replacement: biased)
    linear stress     x0 = x0_hat + C A' (A C A')^-1 (b - A x0_hat),            C = (sigma^2/alpha) d x0_hat/d x

C is the covariance of x_0 given x_t (Tweedie), so the last line is conditioning a Gaussian: exact where x_0 is
Gaussian, guidance otherwise. In a band lo <= A x_0 <= hi, b is the mean of the truncated normal.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor, nn

from finediff.diffusion.objective import Times
from finediff.diffusion.process import Process, as_time, expand
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


def _away_from_noise(process: Process, x: Tensor, t, t_last: float) -> tuple[Tensor, Tensor]:
    """x and t, or beyond t_last (alpha(t)/alpha(t_last)) x and t_last: what x tells of x_0 is linear in alpha x there.

    So E[x_0 | x_t] is the same but for a share alpha(t_last)^2, and alpha is not 0.
    """
    t = as_time(t)
    t_near = t.clamp(max=t_last)
    return expand(process.alpha(t) / process.alpha(t_near), x) * x, t_near


class ClassifierFreeGuidance(Guide):
    """Ho & Salimans 2022 (arXiv 2207.12598), shifted so that ``weight`` 0 is the plain conditional model.

    Parameters
    ----------
    model : ScoreModel
        Trained with conditions dropped at random (``condition=None`` is its unconditional law).
    weight : float
        Above 0 sharpens the condition; -1 drops it.
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

    Parameters
    ----------
    model : ScoreModel
    classifier : callable (x (batch, d), t (batch,)) -> logits (batch, classes)
        Of noisy rows, for example `train_classifier`'s.
    label : int
    weight : float
        1 is Bayes' rule where model and classifier are exact.
    """

    def __init__(self, model: ScoreModel, classifier, label: int, weight: float = 1.0) -> None:
        super().__init__(model)
        self.classifier, self.label, self.weight = classifier, label, weight
        # A classifier has seen no noisier rows than those of the grid, and 1/alpha magnifies its errors.
        self._t_last = float(self.process.time(self.process.log_snr_range()[0]))

    def denoise(self, x: Tensor, t, condition: Tensor | None = None) -> Tensor:
        x0 = self.model.denoise(x, t, condition)
        keep_graph = torch.is_grad_enabled() and x.requires_grad
        with torch.enable_grad():
            y = x if keep_graph else x.detach().requires_grad_(True)
            near, t = _away_from_noise(self.process, y, t, self._t_last)
            log_p = torch.log_softmax(self.classifier(near, t.to(x.device).expand(len(x))), 1)[:, self.label]
            (gradient,) = torch.autograd.grad(log_p.sum(), near, create_graph=keep_graph)
        return x0 + expand(self.weight * self.process.sigma(t) ** 2 / self.process.alpha(t), x) * gradient


class NoisyClassifier(nn.Module):
    """A small network p(y | x_t, t) = softmax(MLP(x_t / scale, log-SNR))."""

    def __init__(self, n_features: int, n_classes: int, process: Process, width: int, generator) -> None:
        super().__init__()
        sizes = [n_features + 1, width, width, n_classes]
        self.layers = nn.ModuleList()
        for n_in, n_out in itertools.pairwise(sizes):
            layer = torch.nn.utils.skip_init(nn.Linear, n_in, n_out)
            with torch.no_grad():
                layer.weight.copy_(torch.randn(n_out, n_in, generator=generator) / n_in**0.5)
                layer.bias.zero_()
            self.layers.append(layer)
        self.process = process

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        scale = expand((self.process.alpha(t) ** 2 + self.process.sigma(t) ** 2).sqrt(), x)
        level = (self.process.log_snr(t) / 10).clamp(-1.5, 1.5).to(x)
        h = torch.cat([x / scale, level[:, None]], 1)
        for layer in self.layers[:-1]:
            h = nn.functional.silu(layer(h))
        return self.layers[-1](h)


def train_classifier(
    process: Process,
    x: Tensor,
    labels: Tensor,
    *,
    width: int = 64,
    steps: int = 1500,
    batch: int = 256,
    learning_rate: float = 3e-3,
    generator: torch.Generator | None = None,
) -> NoisyClassifier:
    """Train p(y | x_t, t) by cross-entropy on noisy rows, times uniform in log-SNR.

    Parameters
    ----------
    process : Process
        The path along which rows are made noisy.
    x : (n, d)
        Of about unit scale; the classifier has its dtype and device.
    labels : (n,)
        Integers from 0.
    width : int
        Hidden units of the two layers.
    steps, batch, learning_rate : int, int, float
        AdamW, with a cosine schedule.
    generator : torch.Generator, optional
        On x's device; of the initial weights, the batches, times and noises.

    Returns
    -------
    NoisyClassifier
        Frozen: its parameters ask for no gradient.
    """
    generator = generator or torch.Generator(device=x.device)
    on_cpu = torch.Generator().manual_seed(
        int(torch.randint(2**31, (), generator=generator, device=x.device))
    )
    classifier = NoisyClassifier(x.shape[1], int(labels.max()) + 1, process, width, on_cpu).to(x)
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    times = Times()
    for _ in range(steps):
        rows = torch.randint(len(x), (min(batch, len(x)),), generator=generator, device=x.device)
        t = times(process, len(rows), device=x.device, generator=generator)
        noise = torch.randn(x[rows].shape, dtype=x.dtype, device=x.device, generator=generator)
        loss = nn.functional.cross_entropy(classifier(process.perturb(x[rows], t, noise), t), labels[rows])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
    return classifier.requires_grad_(False)


class Inpainting(Guide):
    """Replacement: the known coordinates of x0_hat are the given values (Song et al. 2021; Lugmayr et al. 2022).

    The known part of x_t then follows its own forward path exactly, but the unknown part is denoised as if by
    chance: the result is NOT the conditional law (on a correlated Gaussian the dependence on the known part is too
    weak; the tests show by how much). `LinearStress` with rows of the identity is the better choice.

    Parameters
    ----------
    known : (d,) bool
    values : (d,) or (batch, d)
        Entries outside ``known`` are ignored.
    """

    def __init__(self, model: ScoreModel, known, values) -> None:
        super().__init__(model)
        self.register_buffer("known", torch.as_tensor(known, dtype=torch.bool, device=model.device))
        self.register_buffer("values", self._as_buffer(values))
        if self.known.ndim != 1 or self.values.shape[-1:] != self.known.shape:
            raise ValueError(
                "expected known of shape (d,) and values of shape (d,) or (batch, d), got "
                f"{tuple(self.known.shape)} and {tuple(self.values.shape)}"
            )

    def denoise(self, x: Tensor, t, condition: Tensor | None = None) -> Tensor:
        return torch.where(self.known, self.values.to(x), self.model.denoise(x, t, condition))


class LinearStress(Guide):
    """A x_0 = b, or lo <= A x_0 <= hi: chosen assets or portfolios move by given amounts.

    Diffusion posterior sampling with Tweedie's covariance (Boys et al. 2023, arXiv 2310.06721). The constraint always
    holds. Of a heavy-tailed law stressed by 4 standard deviations the others' mean is right, and their spread 14 %
    too small (27 % with ``covariance``); between separate regimes it chooses the likelier too seldom (see the tests).

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

    Raises
    ------
    ValueError
        For wrong shapes, dependent rows, lo > hi, and a model with parameters but no ``covariance``.
    """

    def __init__(self, model: ScoreModel, A, b, covariance=None) -> None:
        super().__init__(model)
        self.register_buffer("A", torch.atleast_2d(self._as_buffer(A)))
        k, rank = len(self.A), int(torch.linalg.matrix_rank(self.A))
        if rank < k:
            raise ValueError(
                f"expected linearly independent rows in A, got {k} rows of rank {rank}: two stresses say "
                "something about the same portfolio"
            )
        for name, value in zip(("low", "high"), b if isinstance(b, tuple) else (b, b), strict=True):
            value = torch.atleast_1d(self._as_buffer(value))
            if value.shape[-1] != k or value.ndim > 2:
                raise ValueError(
                    f"expected b of shape ({k},) or (batch, {k}), one entry a row of A, got {tuple(value.shape)}"
                )
            self.register_buffer(name, value)
        if not (self.low <= self.high).all():
            raise ValueError(
                "expected lo <= hi in every band, got one the other way round, or NaN: swap them"
            )
        if covariance is None and any(True for _ in model.parameters()):
            raise ValueError(
                "expected covariance= for a model with parameters, got None, because the derivative of a trained "
                "network is too noisy to divide by: give the covariance of its training rows"
            )
        if covariance is not None:
            covariance = self._as_buffer(covariance)
            if covariance.shape != self.A.shape[1:] * 2:
                raise ValueError(
                    f"expected a covariance of the {self.A.shape[1]} columns of A, got shape {tuple(covariance.shape)}"
                )
            eigenvalues, eigenvectors = torch.linalg.eigh(covariance)
            self.register_buffer("eigenvalues", eigenvalues.clamp(min=0))
            self.register_buffer("eigenvectors", eigenvectors)
        self.known_covariance = covariance is not None
        self._t_last = float(self.process.time(-20.0))

    def denoise(self, x: Tensor, t, condition: Tensor | None = None) -> Tensor:
        moments = self._gaussian if self.known_covariance else self._tweedie
        x0, CA = moments(x, t, condition)
        mapped, ACA = x0 @ self.A.T, self.A @ CA
        deviation = torch.diagonal(ACA, dim1=1, dim2=2).clamp(min=1e-30).sqrt()
        gap = _truncated_mean(mapped, deviation, self.low, self.high) - mapped
        return x0 + (CA @ torch.linalg.solve(ACA, gap[:, :, None]))[:, :, 0]

    def _gaussian(self, x: Tensor, t, condition: Tensor | None) -> tuple[Tensor, Tensor]:
        """E[x_0 | x_t] (batch, d) and C A^T (batch, d, k), C = Cov(x_0 | x_t) as if x_0 were Gaussian."""
        t = as_time(t)
        noise = expand(self.process.sigma(t), x).reshape(-1, 1) ** 2
        signal = expand(self.process.alpha(t), x).reshape(-1, 1) ** 2
        variances = noise * self.eigenvalues / (signal * self.eigenvalues + noise)
        CA = (self.eigenvectors * variances[:, None, :]) @ (self.eigenvectors.T @ self.A.T)
        return self.model.denoise(x, t, condition), CA

    def _tweedie(self, x: Tensor, t, condition: Tensor | None) -> tuple[Tensor, Tensor]:
        """The same with C = (sigma^2/alpha) d E[x_0 | x_t] / d x."""
        keep_graph = torch.is_grad_enabled() and x.requires_grad
        with torch.enable_grad():
            y = x if keep_graph else x.detach().requires_grad_(True)
            near, t = _away_from_noise(self.process, y, t, self._t_last)
            x0 = self.model.denoise(near, t, condition)
            rows = [
                torch.autograd.grad(value.sum(), near, retain_graph=True, create_graph=keep_graph)[0]
                for value in (x0 @ self.A.T).unbind(1)
            ]
        CA = expand(self.process.sigma(t) ** 2 / self.process.alpha(t), x)[..., None] * torch.stack(rows, 2)
        return (x0, CA) if keep_graph else (x0.detach(), CA.detach())


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
