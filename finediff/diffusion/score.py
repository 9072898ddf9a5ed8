"""What is learned: a model of the score in the currency E[x_0 | x_t].

    eps_hat  = (x_t - alpha x0_hat)/sigma          score = -eps_hat/sigma
    v        = alpha eps_hat - sigma x0_hat        velocity u = alpha' x0_hat + sigma' eps_hat

Each reading determines the others wherever alpha, sigma > 0; `to_denoised` and `from_denoised` are the one place
where they are converted. Samplers and guides ask for x0_hat only, and divide by sigma, never by alpha.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from finediff.diffusion.process import Process, as_time, expand, normal, require

Reading = Literal["x0", "eps", "score", "v", "velocity"]
READINGS = get_args(Reading)
MAX_LEVEL = 1.5


def network_input(x: Tensor, t: Tensor, process: Process) -> tuple[Tensor, Tensor]:
    """x (batch, d) scaled to unit variance, and log-SNR / 10 (batch,), an even coordinate of the noise on every path."""
    level = (process.log_snr(t) / 10).clamp(-MAX_LEVEL, MAX_LEVEL).to(x)
    return x / expand(process.radius(t), x), level


def from_denoised(x0: Tensor, x: Tensor, t, process: Process, reading: Reading) -> Tensor:
    """The given reading of E[x_0|x_t] = x0 at x_t = x; needs sigma > 0."""
    require(reading in READINGS, f"a reading among {READINGS}", repr(reading))
    alpha, sigma = process.levels(t, x)
    if reading == "x0":
        return x0
    eps = (x - alpha * x0) / sigma
    if reading == "eps":
        return eps
    if reading == "score":
        return -eps / sigma
    if reading == "v":
        return alpha * eps - sigma * x0
    d_alpha, d_sigma = (expand(rate, x) for rate in process.rates(t))
    return d_alpha * x0 + d_sigma * eps


def to_denoised(value: Tensor, x: Tensor, t, process: Process, reading: Reading) -> Tensor:
    """E[x_0|x_t] from any reading of it at x_t = x.

    "eps" and "score" divide by alpha, and so does "velocity" where alpha' goes to 0 with it (VP, OU).
    """
    require(reading in READINGS, f"a reading among {READINGS}", repr(reading))
    alpha, sigma = process.levels(t, x)
    if reading == "x0":
        return value
    if reading == "eps":
        return (x - sigma * value) / alpha
    if reading == "score":
        return (x + sigma**2 * value) / alpha
    if reading == "v":
        return (alpha * x - sigma * value) / (alpha**2 + sigma**2)
    d_alpha, d_sigma = (expand(rate, x) for rate in process.rates(t))
    return (sigma * value - d_sigma * x) / (sigma * d_alpha - d_sigma * alpha)


class ScoreModel(nn.Module, ABC):
    """A law of x_0 known through E[x_0 | x_t] along a `Process`.

    ``score_valid`` is False where -eps_hat/sigma is not the score (optimal-transport pairing): samplers that need it
    refuse.
    """

    process: Process
    score_valid: bool = True

    @abstractmethod
    def denoise(self, x: Tensor, t, condition: Tensor | None = None) -> Tensor:
        """E[x_0 | x_t = x]: x (batch, d), t () or (batch,) in [0, 1] -> (batch, d)."""

    def noise(self, x: Tensor, t, condition: Tensor | None = None) -> Tensor:
        """eps_hat = E[eps | x_t = x], (batch, d)."""
        return from_denoised(self.denoise(x, t, condition), x, t, self.process, "eps")

    def score(self, x: Tensor, t, condition: Tensor | None = None) -> Tensor:
        """grad log p_t(x), (batch, d)."""
        return from_denoised(self.denoise(x, t, condition), x, t, self.process, "score")

    def velocity(self, x: Tensor, t, condition: Tensor | None = None) -> Tensor:
        """u = dx/dt of the probability-flow ODE, (batch, d)."""
        return from_denoised(self.denoise(x, t, condition), x, t, self.process, "velocity")

    @property
    def _anchor(self) -> Tensor:
        return next(itertools.chain(self.parameters(), self.buffers()), torch.empty(0))

    @property
    def dtype(self) -> torch.dtype:
        return self._anchor.dtype

    @property
    def device(self) -> torch.device:
        return self._anchor.device


class NetworkScore(ScoreModel):
    """A network read as one of the five quantities.

    "eps" and "score" divide by alpha: where it goes to 0, they are read at log-SNR -15, where the level ends too.

    Parameters
    ----------
    network : nn.Module
        Called as ``network(x, level, condition)``, x (batch, d) and level (batch,) from `network_input`.
    process : Process
    reading : {"v", "x0", "eps", "score", "velocity"}
        What the network's output is. "v" needs no division by alpha.
    precondition : bool
        Add to the output what the reading would be if x_0 were N(0, I), so that a network that returns 0 (an
        untrained one) is the standard normal model. For "v" on a variance-preserving path that reading is 0.
    """

    def __init__(self, network, process: Process, reading: Reading = "v", *, precondition=True) -> None:
        super().__init__()
        require(reading in READINGS, f"a reading among {READINGS}", repr(reading))
        self.network, self.process, self.reading, self.precondition = network, process, reading, precondition
        self._t_read = float(process.time(-10 * MAX_LEVEL)) if reading in ("eps", "score") else 1.0

    def denoise(self, x: Tensor, t, condition: Tensor | None = None) -> Tensor:
        t = as_time(t).expand(x.shape[0])
        output = self.network(*network_input(x, t, self.process), condition)
        t_read = t.clamp(max=self._t_read)
        if not self.precondition:
            return to_denoised(output, x, t_read, self.process, self.reading)
        alpha, sigma = self.process.levels(t, x)
        standard = alpha / (alpha**2 + sigma**2) * x
        # By linearity of the readings, adding the normal model's reading to the output is adding to its x0_hat
        # what the output alone would say at x = 0: no reading needs an extra division.
        return standard + to_denoised(output, torch.zeros_like(x), t_read, self.process, self.reading)


class EMA:
    """Exponential moving average of a module's parameters: average <- decay average + (1 - decay) value.

    The decay is capped at (1 + n)/(10 + n) after n updates, so that the start is forgotten.
    """

    def __init__(self, module: nn.Module, decay: float = 0.999) -> None:
        self.decay, self.updates = decay, 0
        self.average = {k: v.detach().clone() for k, v in module.state_dict().items()}

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        for name, value in module.state_dict().items():
            if value.is_floating_point():
                self.average[name].lerp_(value.detach(), 1 - decay)
            else:
                self.average[name].copy_(value)


def directions(x: Tensor, probes: int | None, *, law: str = "rademacher", generator=None) -> Iterable[Tensor]:
    """Directions v (batch, d) over which v' J v adds up to the trace of J: the axes, or ``probes`` random ones.

    Of ``law`` "rademacher" or "gaussian", the mean over random ones is unbiased (Hutchinson 1990); Rademacher has the
    smaller variance.
    """
    require(law in ("rademacher", "gaussian"), "a law of probes 'rademacher' or 'gaussian'", repr(law))
    require(probes is None or probes >= 1, "at least 1 probe, or None for the exact trace", probes)
    if probes is None:
        return torch.eye(x.shape[1]).to(x)[:, None].expand(-1, *x.shape)
    draws = (normal(x.detach(), generator) for _ in range(probes))
    return (z.sign() for z in draws) if law == "rademacher" else draws


def divergence(function, x: Tensor, *, probes: int | None = None, law="rademacher", generator=None) -> Tensor:
    """div f(x) = sum_j d f_j / d x_j, (batch,), by vector-Jacobian products along `directions`.

    ``function`` maps x (batch, d) to (batch, d), row by row; the generator of the probes is on x's device.
    """
    along, total = directions(x, probes, law=law, generator=generator), x.new_zeros(len(x))
    with torch.enable_grad():
        x = x.detach().requires_grad_(True)
        value = function(x)
        if not value.requires_grad:
            return total
        for v in along:
            (product,) = torch.autograd.grad(value, x, v, retain_graph=True, materialize_grads=True)
            total = total + (product * v).sum(1)
    return total.detach() / (probes or 1)
