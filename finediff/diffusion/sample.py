"""How to generate: from x_1 ~ N(0, sigma(1)^2 I) down a decreasing grid of times; the end is E[x_0 | x_tmin].

From t to s < t, with x0 = x0_hat and eps = eps_hat at (x, t), z ~ N(0, I):
    DDIM(eta)     x_s = alpha_s x0 + sqrt(sigma_s^2 - eta^2 v^2) eps + eta v z,          eta = 1: DDPM
                  v^2 = (sigma_s^2/sigma_t^2) (sigma_t^2 - (alpha_t/alpha_s)^2 sigma_s^2)
    DPM-Solver++  DDIM(0 or 1) with x0 + (h/2h') (x0 - x0'): primes the step before, h in log(alpha/sigma)
    ODE           dx/dt = alpha' x0 + sigma' eps,   that is   d(x/r)/dtheta = (alpha eps - sigma x0)/r,
                  r^2 = alpha^2 + sigma^2, tan theta = sigma/alpha
    posterior     DDIM(1) with x0 drawn from P(x_0 | x_t), where the model can: its law at any number of steps
    reverse SDE   dx = [f x - g^2 score] dt + g dw
    Langevin      x <- x + a score + sqrt(2 a) z, at one time

Which one: `DPMSolver` or `ProbabilityFlow` for few evaluations, a deterministic map, or a score that is not
valid; `DDPM` where the score is good and evaluations are cheap; the others to compare with the papers.
A sampler is one `step`; nothing is kept on self; no sampler bounds |x|.
"""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from finediff.diffusion.process import Process, normal, require
from finediff.diffusion.score import ScoreModel, from_denoised


@dataclass(frozen=True)
class Sampler(ABC):
    """``steps`` steps down a grid of times, see `Process.grid`; the final E[x_0 | x_tmin] is one more evaluation."""

    steps: int = 64
    spacing: str = "log_snr"

    needs_score = True  # -eps_hat/sigma must be the score; a deterministic step asks for E[x_0 | x_t] only

    def __post_init__(self) -> None:
        require(self.steps >= 1, "at least 1 step (try 64)", self.steps)

    @property
    def evaluations(self) -> int | None:
        """Network evaluations of one draw; None where it depends on the model."""
        return self.steps + 1

    def grid(self, process: Process) -> Tensor:
        """Decreasing times (steps + 1,), float64."""
        return process.grid(self.steps, self.spacing)

    @abstractmethod
    def step(self, model: ScoreModel, x: Tensor, t: Tensor, s: Tensor, memory, *, condition, generator):
        """From x at time t to time s < t (both 0-d float64): returns (x_s, memory); memory starts as None."""

    @torch.no_grad()
    def __call__(
        self, model: ScoreModel, shape, *, condition=None, generator=None, start: Tensor | None = None
    ) -> Tensor:
        """Draws of x_0 of the given shape (n, d), in the model's dtype and on its device.

        ``start`` (n, d) is x at the grid's first time, in place of a draw of N(0, sigma^2 I). Raises
        ValueError where the sampler needs the score and the model's is not valid.
        """
        found = "one trained under optimal-transport pairing, for which -eps/sigma is not the score"
        advice = "use ProbabilityFlow, DPMSolver(stochastic=False) or DDIM(eta=0)"
        good = model.score_valid or not self.needs_score
        require(good, f"a model whose score is valid for {type(self).__name__}", found, advice)
        process, grid = model.process, self.grid(model.process)
        if start is None:
            like = torch.empty(shape, dtype=model.dtype, device=model.device)
            start = process.sigma(grid[0]).to(like) * normal(like, generator)
        require(tuple(start.shape) == tuple(shape), f"a start of shape {tuple(shape)}", tuple(start.shape))
        x, memory = start, None
        for t, s in itertools.pairwise(grid):
            x, memory = self.step(model, x, t, s, memory, condition=condition, generator=generator)
        return model.denoise(x, grid[-1], condition)


def _ddim(process: Process, x: Tensor, x0: Tensor, t, s, eta: float, generator, noise_at=None) -> Tensor:
    """DDIM(eta) from x_t = x to x_s with the given x0_hat; its noise is in units of sigma(noise_at or s)."""
    # v^2/sigma_s^2 = 1 - SNR_t/SNR_s: expm1 keeps the small difference exact.
    share = -torch.expm1(process.log_snr(t) - process.log_snr(s)) * eta**2
    eps = from_denoised(x0, x, t, process, "eps")
    sigma = process.sigma(s)
    x = process.alpha(s).to(x) * x0 + (sigma * (1 - share).clamp(min=0).sqrt()).to(x) * eps
    if eta:
        sigma = sigma if noise_at is None else process.sigma(noise_at)
        x = x + (sigma * share.sqrt()).to(x) * normal(x, generator)
    return x


@dataclass(frozen=True)
class DDIM(Sampler):
    """Song, Meng & Ermon 2021 (arXiv 2010.02502). Order 1. ``eta`` in [0, 1] is the share of the ancestral noise."""

    eta: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 <= self.eta <= 1, "eta in [0, 1], where 1 adds all the ancestral noise", self.eta)

    @property
    def needs_score(self) -> bool:
        return self.eta > 0

    def step(self, model, x, t, s, memory, *, condition, generator):
        x0 = model.denoise(x, t, condition)
        return _ddim(model.process, x, x0, t, s, self.eta, generator), None


@dataclass(frozen=True)
class DDPM(Sampler):
    """Ancestral sampling (Ho, Jain & Abbeel 2020, arXiv 2006.11239). Order 1.

    ``variance`` of the noise added from t to s: "posterior" is v^2, that of q(x_s | x_t, x_0), "beta" that of
    q(x_t | x_s), the larger sigma_t^2 - (alpha_t/alpha_s)^2 sigma_s^2. The mean is the same.
    """

    steps: int = 1000
    variance: Literal["posterior", "beta"] = "posterior"

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.variance in ("posterior", "beta"), "variance 'posterior' or 'beta'", repr(self.variance))

    def step(self, model, x, t, s, memory, *, condition, generator):
        x0, noise_at = model.denoise(x, t, condition), t if self.variance == "beta" else s
        return _ddim(model.process, x, x0, t, s, 1.0, generator, noise_at), None


@dataclass(frozen=True)
class PosteriorSampling(Sampler):
    """Ancestral steps around draws of x_0 in place of E[x_0 | x_t]: the model's own law at any number of steps.

    For models with ``sample_posterior(x, t, generator)``: the scale mixtures, and `ResidualScore`, whose draws are
    its base's, moved. `DDPM` puts a Gaussian there, which of heavy-tailed rows has the wrong spread: at 64 steps a
    tenth of the standard deviation is lost.
    """

    steps: int = 12

    def step(self, model, x, t, s, memory, *, condition, generator):
        draw = getattr(model, "sample_posterior", None)
        advice = "use DDPM, or an exact model such as ScaleMixtureScore"
        require(draw is not None, "a model with sample_posterior", type(model).__name__, advice)
        return _ddim(model.process, x, draw(x, t, generator), t, s, 1.0, generator), None


@dataclass(frozen=True)
class Resampled(DDPM):
    """Ancestral steps, each taken ``repeats`` times with x_s noised back to t between (Lugmayr et al. 2022, RePaint).

    Under `Inpainting` the unknown coordinates so come to agree with the known ones (arXiv 2201.09865).
    """

    steps: int = 250
    repeats: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.repeats >= 1, "at least 1 repeat", self.repeats)

    @property
    def evaluations(self) -> int:
        return self.steps * self.repeats + 1

    def step(self, model, x, t, s, memory, *, condition, generator):
        process = model.process
        kept = process.alpha(t) / process.alpha(s)
        added = (process.sigma(t) ** 2 - kept**2 * process.sigma(s) ** 2).clamp(min=0).sqrt()
        for repeat in range(self.repeats):
            if repeat:
                x = kept.to(x) * x + added.to(x) * normal(x, generator)
            x, memory = super().step(model, x, t, s, memory, condition=condition, generator=generator)
        return x, memory


def angular_velocity(model: ScoreModel, y: Tensor, t: Tensor, condition: Tensor | None = None) -> Tensor:
    """dy/dtheta of y = x/r along the ODE, (batch, d)."""
    r = model.process.radius(t).to(y)
    return from_denoised(model.denoise(r * y, t, condition), r * y, t, model.process, "v") / r


def runge_kutta(slope, y: Tensor, h: float, t: Tensor, middle: Tensor, s: Tensor) -> Tensor:
    """One step of the classical method of order 4 (Kutta 1901) from t to s, h apart; slope(y, t)."""
    first = slope(y, t)
    second = slope(y + h / 2 * first, middle)
    third = slope(y + h / 2 * second, middle)
    return y + h / 6 * (first + 2 * second + 2 * third + slope(y + h * third, s))


STAGES = {"heun": 2, "euler": 1, "rk4": 4, "adaptive": None}


@dataclass(frozen=True)
class ProbabilityFlow(Sampler):
    """The probability-flow ODE (Song et al. 2021, arXiv 2011.13456), integrated in the angle theta.

    In theta it is the same equation on every path, smooth where f is infinite (alpha = 0) and where beta
    jumps (`DiscreteVP`); in t Heun and RK4 lose their orders there.

    ``method`` "heun", "euler", "rk4": orders 2, 1, 4 with 2, 1, 4 evaluations a step. "adaptive": Dormand & Prince's
    5(4) pair through torchdiffeq (``pip install 'finediff[ode]'``) to tolerances ``rtol``, ``atol`` of the batch's root
    mean square; ``steps`` and ``spacing`` are then not used.
    """

    method: Literal["heun", "euler", "rk4", "adaptive"] = "heun"
    rtol: float = 1e-5
    atol: float = 1e-5

    needs_score = False

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.method in STAGES, f"a method among {tuple(STAGES)}", repr(self.method))
        require(self.rtol > 0 and self.atol > 0, "positive rtol and atol", (self.rtol, self.atol))

    @property
    def evaluations(self) -> int | None:
        return None if self.method == "adaptive" else self.steps * STAGES[self.method] + 1

    def grid(self, process: Process) -> Tensor:
        return process.grid(1) if self.method == "adaptive" else super().grid(process)

    def step(self, model, x, t, s, memory, *, condition, generator):
        process, start, end = model.process, model.process.angle(t), model.process.angle(s)
        y, h = x / process.radius(t).to(x), float(end - start)

        def slope(y: Tensor, t: Tensor) -> Tensor:
            return angular_velocity(model, y, t, condition)

        if self.method == "adaptive":
            span = torch.stack([start, end]).to(x.device)
            at = process.time_of_angle
            y = _dopri5(lambda theta, y: slope(y, at(theta.cpu())), y, span, self.rtol, self.atol)
        elif self.method == "euler":
            y = y + h * slope(y, t)
        elif self.method == "heun":
            first = slope(y, t)
            y = y + h / 2 * (first + slope(y + h * first, s))
        else:
            y = runge_kutta(slope, y, h, t, process.time_of_angle((start + end) / 2), s)
        return process.radius(s).to(x) * y, None


def _dopri5(slope, y: Tensor, span: Tensor, rtol: float, atol: float) -> Tensor:
    try:
        from torchdiffeq import odeint
    except ImportError as error:
        remedy = "pip install 'finediff[ode]', or use method='rk4'"
        raise ImportError(f"expected torchdiffeq for method='adaptive', got none: {remedy}") from error
    options = {"step_t": span[1:]}  # else its last step reaches beyond the end, where theta has no t
    return odeint(slope, y, span, method="dopri5", rtol=rtol, atol=atol, options=options)[-1]


@dataclass(frozen=True)
class DPMSolver(Sampler):
    """DPM-Solver++(2M) (Lu et al. 2022, arXiv 2211.01095): order 2 at one evaluation a step.

    ``stochastic``: SDE-DPM-Solver++(2M), the ancestral step with the same extrapolated x0_hat; else the ODE.
    """

    stochastic: bool = False

    @property
    def needs_score(self) -> bool:
        return self.stochastic

    def step(self, model, x, t, s, memory, *, condition, generator):
        process, x0 = model.process, model.denoise(x, t, condition)
        h, ahead = process.log_snr(s) - process.log_snr(t), x0
        # After alpha = 0 the step before is infinite and the ratio 0: this step is of first order.
        if memory is not None and torch.isfinite(ratio := h / (2 * memory[1])):
            ahead = x0 + ratio.to(x) * (x0 - memory[0])
        return _ddim(process, x, ahead, t, s, float(self.stochastic), generator), (x0, h)


def _langevin(model: ScoreModel, x: Tensor, t: Tensor, a: float, condition, generator) -> Tensor:
    return x + a * model.score(x, t, condition) + math.sqrt(2 * a) * normal(x, generator)


class _FiniteStart(Sampler):
    """Starts no noisier than log-SNR -10, N(0, sigma^2 I) to 5e-5: there f, g^2 and 1/alpha are finite."""

    def grid(self, process: Process) -> Tensor:
        return super().grid(process).clamp(max=float(process.time(process.log_snr_range()[0])))


@dataclass(frozen=True)
class EulerMaruyama(_FiniteStart):
    """The reverse SDE (Song et al. 2021, arXiv 2011.13456; Anderson 1982), in steps of t. Weak order 1."""

    steps: int = 1000

    def step(self, model, x, t, s, memory, *, condition, generator):
        (f, g2), h = model.process.drift_diffusion(t), s - t
        x = x + (h * f).to(x) * x - (h * g2).to(x) * model.score(x, t, condition)
        return x + (-h * g2).sqrt().to(x) * normal(x, generator), None


@dataclass(frozen=True)
class PredictorCorrector(_FiniteStart):
    """After each step, Langevin steps of size 2 (snr |z|/|score|)^2 (Song et al. 2021, arXiv 2011.13456).

    The norms are means over the batch, so a draw depends a little on the batch that it is in. ``snr`` leaves a bias
    at any number of steps: .3 % of the standard deviation at .05, 2.9 % at Song's .16. ``corrector_steps`` are taken
    at each new time; the ``predictor`` is DDIM(eta=1), "ancestral", or the reverse SDE, "euler_maruyama".
    """

    steps: int = 1000
    snr: float = 0.05
    corrector_steps: int = 1
    predictor: Literal["ancestral", "euler_maruyama"] = "ancestral"

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.snr > 0, "a positive snr", self.snr)
        require(self.corrector_steps >= 1, "at least 1 corrector step", self.corrector_steps)
        allowed = ("ancestral", "euler_maruyama")
        require(self.predictor in allowed, f"a predictor among {allowed}", repr(self.predictor))

    @property
    def evaluations(self) -> int:
        return self.steps * (1 + self.corrector_steps) + 1

    def step(self, model, x, t, s, memory, *, condition, generator):
        predictor = DDIM(eta=1.0) if self.predictor == "ancestral" else EulerMaruyama()
        x, _ = predictor.step(model, x, t, s, None, condition=condition, generator=generator)
        for _ in range(self.corrector_steps):
            score, z = model.score(x, s, condition), normal(x, generator)
            a = 2 * (self.snr * z.norm(dim=-1).mean() / score.norm(dim=-1).mean()) ** 2
            x = x + a * score + (2 * a).sqrt() * z
        return x, None


@dataclass(frozen=True)
class AnnealedLangevin(_FiniteStart):
    """Langevin steps at each noise level, noisiest first (NCSN: Song & Ermon 2019, arXiv 1907.05600).

    Between levels x is multiplied by alpha_s/alpha_t, which carries its data part along (VE: 1). A Gaussian
    comes out with too much variance, by a share of about (1 + step_size/2)/(2G - 1), where
    G = inner_steps step_size / (log-SNR from level to level): 4.7 % by default.

    ``inner_steps`` are taken at each of the ``steps`` levels; ``step_size`` in (0, 2) is in units of sigma^2.
    """

    steps: int = 200
    inner_steps: int = 5
    step_size: float = 0.25

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.inner_steps >= 1, "at least 1 inner step", self.inner_steps)
        require(0 < self.step_size < 2, "step_size in (0, 2), where Langevin is stable", self.step_size)

    @property
    def evaluations(self) -> int:
        return self.steps * self.inner_steps + 1

    def step(self, model, x, t, s, memory, *, condition, generator):
        process = model.process
        x = (process.alpha(s) / process.alpha(t)).to(x) * x
        a = self.step_size * float(process.sigma(s)) ** 2
        for _ in range(self.inner_steps):
            x = _langevin(model, x, s, a, condition, generator)
        return x, None


@dataclass(frozen=True)
class Langevin(Sampler):
    """Unadjusted Langevin dynamics at one noise level (Roberts & Tweedie 1996, Bernoulli 2(4)).

    In a direction of variance V (noise included) x tends to the variance V/(1 - step_size/(2V)), in some
    V/step_size steps. The draw is E[x_0 | x]; the start is N(0, sigma^2 I) unless given.

    ``step_size`` is in x's squared units and stable below twice the least V; ``log_snr`` is the noise level.
    """

    steps: int = 1000
    step_size: float = 0.01
    log_snr: float = 6.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.step_size > 0, "a positive step_size", self.step_size)
        require(math.isfinite(self.log_snr), "a finite log_snr (6 is noise of 5 % of a unit)", self.log_snr)

    def grid(self, process: Process) -> Tensor:
        return process.time(self.log_snr).expand(self.steps + 1)

    def step(self, model, x, t, s, memory, *, condition, generator):
        return _langevin(model, x, s, self.step_size, condition, generator), None
