"""How to generate: from x_1 ~ N(0, sigma(1)^2 I) down a decreasing grid of times; the end is E[x_0 | x_tmin].

From t to s < t, with x0 = x0_hat and eps = eps_hat at (x, t), z ~ N(0, I), lambda = log(alpha/sigma):
    DDIM(eta)     x_s = alpha_s x0 + sqrt(sigma_s^2 - eta^2 v^2) eps + eta v z,         eta = 1: DDPM
                  v^2 = (sigma_s^2/sigma_t^2) (sigma_t^2 - (alpha_t/alpha_s)^2 sigma_s^2)
    ODE           dx/dt = u(x, t) = alpha' x0 + sigma' eps,   or  d(x/r)/dtheta = (alpha eps - sigma x0)/r
    reverse SDE   dx = [f x - g^2 score] dt + g dw
    DPM-Solver++  DDIM(0) or DDIM(1) with x0 + (h/2h') (x0 - x0'), primes the step before, h in lambda
    Langevin      x <- x + a score + sqrt(2 a) z, at one time

Which one: `DPMSolver` for few evaluations, `ProbabilityFlow` where the map from noise to data must be
deterministic or the score is not valid, `DDPM` where the score is good and evaluations are cheap.
A sampler is one `step`; nothing is kept on self; no sampler bounds |x|.
"""

from __future__ import annotations

import math
import numbers
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from finediff.diffusion.process import Process, expand
from finediff.diffusion.score import ScoreModel, from_denoised


@dataclass(frozen=True)
class Sampler(ABC):
    """Steps down a grid of times.

    Parameters
    ----------
    steps : int
        Intervals of the grid; the final E[x_0 | x_tmin] is one more network evaluation.
    spacing : str
        See `Process.grid`.
    """

    steps: int = 64
    spacing: str = "log_snr"

    def __post_init__(self) -> None:
        _require_count("steps", self.steps)

    @property
    def needs_score(self) -> bool:
        """Whether -eps_hat/sigma must be the score; E[x_0|x_t] alone is enough for a deterministic sampler."""
        return True

    @property
    def evaluations(self) -> int | None:
        """Network evaluations of one draw; None where the model decides (see `Counted`)."""
        return self.steps + 1

    def grid(self, process: Process) -> Tensor:
        """Decreasing times, (steps + 1,), float64."""
        return process.grid(self.steps, self.spacing)

    @abstractmethod
    def step(self, model: ScoreModel, x: Tensor, t: Tensor, s: Tensor, memory, *, condition, generator):
        """From x at time t to time s < t (both 0-d float64): returns (x_s, memory); memory starts as None."""

    @torch.no_grad()
    def __call__(
        self,
        model: ScoreModel,
        shape: tuple[int, ...],
        *,
        condition: Tensor | None = None,
        generator: torch.Generator | None = None,
        start: Tensor | None = None,
    ) -> Tensor:
        """Draws of x_0 of the given shape (n, d), in the model's dtype and on its device.

        Parameters
        ----------
        model : ScoreModel
        shape : (n, d)
        condition : Tensor (n, ...), optional
            Handed to the model.
        generator : torch.Generator, optional
            On the model's device.
        start : Tensor (n, d), optional
            x at the first time of the grid, in place of a draw of N(0, sigma^2 I).

        Raises
        ------
        ValueError
            Where the sampler needs the score and the model's is not valid, or start has another shape.
        """
        if self.needs_score and not model.score_valid:
            raise ValueError(
                f"{type(self).__name__} expected a model whose score is valid, got one trained under "
                "optimal-transport pairing, for which -eps/sigma is not the score: use ProbabilityFlow, DDIM(eta=0) "
                "or DPMSolver(stochastic=False)"
            )
        if start is not None and tuple(start.shape) != tuple(shape):
            raise ValueError(f"expected a start of shape {tuple(shape)}, got {tuple(start.shape)}")
        process, grid = model.process, self.grid(model.process)
        if start is None:
            start = torch.randn(shape, dtype=model.dtype, device=model.device, generator=generator)
            start = expand(process.sigma(grid[0]), start) * start
        x, memory = start, None
        for t, s in zip(grid[:-1], grid[1:]):
            x, memory = self.step(model, x, t, s, memory, condition=condition, generator=generator)
        return model.denoise(x, grid[-1], condition)


def _require_count(name: str, value) -> None:
    if not isinstance(value, numbers.Integral) or value < 1:
        raise ValueError(f"expected {name} to be an integer of at least 1, got {value!r}")


def _require_positive(name: str, value) -> None:
    if not (0 < value < math.inf):
        raise ValueError(f"expected {name} to be a positive number, got {value!r}")


def _require_one_of(name: str, value, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"expected {name} to be one of {allowed}, got {value!r}")


def _normal(x: Tensor, generator: torch.Generator | None) -> Tensor:
    return torch.randn(x.shape, dtype=x.dtype, device=x.device, generator=generator)


def _fresh(process: Process, t: Tensor, s: Tensor) -> Tensor:
    """v^2/sigma_s^2 = 1 - SNR_t/SNR_s: the share of x_s's noise that x_t does not know, exact when small."""
    return -torch.expm1(process.log_snr(t) - process.log_snr(s))


def _ddim(process: Process, x: Tensor, x0: Tensor, t, s, eta: float, generator) -> Tensor:
    """DDIM(eta) from x_t = x to x_s with the given x0_hat."""
    sigma, share = process.sigma(s), _fresh(process, t, s) * eta**2
    eps = from_denoised(x0, x, t, process, "eps")
    mean = process.alpha(s).to(x) * x0 + (sigma * (1 - share).clamp(min=0).sqrt()).to(x) * eps
    return mean + (sigma * share.sqrt()).to(x) * _normal(x, generator) if eta else mean


@dataclass(frozen=True)
class DDIM(Sampler):
    """Song, Meng & Ermon 2021 (arXiv 2010.02502): eta = 0 deterministic, eta = 1 ancestral. Order 1.

    Parameters
    ----------
    eta : float in [0, 1]
    """

    eta: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.eta <= 1:
            raise ValueError(
                f"expected eta in [0, 1], got {self.eta!r}: 1 already adds all the noise of the ancestral step"
            )

    @property
    def needs_score(self) -> bool:
        return self.eta > 0

    def step(self, model, x, t, s, memory, *, condition, generator):
        x0 = model.denoise(x, t, condition)
        return _ddim(model.process, x, x0, t, s, self.eta, generator), None


@dataclass(frozen=True)
class DDPM(Sampler):
    """Ancestral sampling (Ho, Jain & Abbeel 2020, arXiv 2006.11239).

    Parameters
    ----------
    variance : {"posterior", "beta"}
        Noise added from t to s: v^2, that of q(x_s | x_t, x_0), or that of q(x_t | x_s), the larger
        sigma_t^2 - (alpha_t/alpha_s)^2 sigma_s^2. The mean is the same.
    """

    steps: int = 1000
    variance: Literal["posterior", "beta"] = "posterior"

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_one_of("variance", self.variance, ("posterior", "beta"))

    def step(self, model, x, t, s, memory, *, condition, generator):
        process, x0 = model.process, model.denoise(x, t, condition)
        if self.variance == "posterior":
            return _ddim(process, x, x0, t, s, 1.0, generator), None
        share, eps = _fresh(process, t, s), from_denoised(x0, x, t, process, "eps")
        mean = process.alpha(s).to(x) * x0 + (process.sigma(s) * (1 - share).sqrt()).to(x) * eps
        return mean + (process.sigma(t) * share.sqrt()).to(x) * _normal(x, generator), None


@dataclass(frozen=True)
class ProbabilityFlow(Sampler):
    """The probability-flow ODE (Song et al. 2021, arXiv 2011.13456), integrated in the angle of the noise.

    dx/dt = f x - g^2 score/2 is, on every path, d(x/r)/dtheta = v/r with r^2 = alpha^2 + sigma^2 and
    tan theta = sigma/alpha: smooth where f is infinite (alpha = 0) and where alpha' jumps (`DiscreteVP`).

    Parameters
    ----------
    method : {"heun", "euler", "rk4", "adaptive"}
        Orders 2, 1, 4 with 2, 1, 4 network evaluations a step. "adaptive": Dormand & Prince's 5(4) pair
        through torchdiffeq (``pip install 'finediff[ode]'``), from t = 1 to t_min in steps of its own choice:
        ``steps`` and ``spacing`` are not used and ``evaluations`` is None.
    rtol, atol : float
        Tolerances of "adaptive", of the batch's root mean square.
    """

    method: Literal["heun", "euler", "rk4", "adaptive"] = "heun"
    rtol: float = 1e-5
    atol: float = 1e-5

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_one_of("method", self.method, ("heun", "euler", "rk4", "adaptive"))
        _require_positive("rtol", self.rtol)
        _require_positive("atol", self.atol)

    @property
    def needs_score(self) -> bool:
        return False

    @property
    def evaluations(self) -> int | None:
        stages = {"euler": 1, "heun": 2, "rk4": 4}
        return self.steps * stages[self.method] + 1 if self.method in stages else None

    def grid(self, process: Process) -> Tensor:
        return process.grid(1) if self.method == "adaptive" else super().grid(process)

    def step(self, model, x, t, s, memory, *, condition, generator):
        process = model.process

        def polar(t: Tensor) -> tuple[Tensor, Tensor]:
            return torch.hypot(process.alpha(t), process.sigma(t)), torch.atan2(process.sigma(t), process.alpha(t))

        def time(theta: Tensor) -> Tensor:
            return process.time(-2 * torch.log(torch.tan(theta)))

        def slope(y: Tensor, t: Tensor) -> Tensor:
            r = polar(t)[0].to(y)
            return from_denoised(model.denoise(r * y, t, condition), r * y, t, process, "v") / r

        (r, start), (r_end, end) = polar(t), polar(s)
        y, h = x / r.to(x), float(end - start)
        if self.method == "adaptive":
            y = _dopri5(lambda theta, y: slope(y, time(theta.cpu())), y, start, end, self.rtol, self.atol)
            return r_end.to(x) * y, None
        first = slope(y, t)
        if self.method == "euler":
            y = y + h * first
        elif self.method == "heun":
            y = y + h / 2 * (first + slope(y + h * first, s))
        else:
            middle = time((start + end) / 2)
            second = slope(y + h / 2 * first, middle)
            third = slope(y + h / 2 * second, middle)
            y = y + h / 6 * (first + 2 * second + 2 * third + slope(y + h * third, s))
        return r_end.to(x) * y, None


def _dopri5(slope, y: Tensor, start: Tensor, end: Tensor, rtol: float, atol: float) -> Tensor:
    try:
        from torchdiffeq import odeint
    except ImportError as error:
        raise ImportError(
            "ProbabilityFlow(method='adaptive') expected the package torchdiffeq, which is not installed: "
            "pip install 'finediff[ode]', or use method='rk4'"
        ) from error
    span = torch.stack([start, end]).to(y.device)
    return odeint(slope, y, span, method="dopri5", rtol=rtol, atol=atol)[-1]


@dataclass(frozen=True)
class DPMSolver(Sampler):
    """DPM-Solver++(2M) (Lu et al. 2022, arXiv 2211.01095): order 2 at one evaluation a step.

    DDIM with x0_hat carried along the line through its last two values, x0 + (h/2h') (x0 - x0').

    Parameters
    ----------
    stochastic : bool
        False: the ODE. True: SDE-DPM-Solver++(2M), the ancestral step with the same x0_hat.
    """

    stochastic: bool = False

    @property
    def needs_score(self) -> bool:
        return self.stochastic

    def step(self, model, x, t, s, memory, *, condition, generator):
        process, x0 = model.process, model.denoise(x, t, condition)
        h = float(process.log_snr(s) - process.log_snr(t)) / 2
        ahead = x0
        if memory is not None:
            last, ratio = memory[0], h / (2 * memory[1])
            # The step before is infinite from alpha = 0: its ratio is 0, and this one is of first order.
            if math.isfinite(ratio):
                ahead = x0 + ratio * (x0 - last)
        return _ddim(process, x, ahead, t, s, float(self.stochastic), generator), (x0, h)


def _finite_grid(process: Process, steps: int, spacing: str) -> Tensor:
    """The grid, started at its noisiest log-SNR where t = 1 is noisier still: f, g^2 and 1/alpha are finite."""
    return process.grid(steps, spacing).clamp(max=float(process.time(process.log_snr_range()[0])))


def _euler_maruyama(model: ScoreModel, x: Tensor, t, s, condition, generator) -> Tensor:
    (f, g2), h = model.process.drift_diffusion(t), s - t
    x = x + (h * f).to(x) * x - (h * g2).to(x) * model.score(x, t, condition)
    return x + (-h * g2).sqrt().to(x) * _normal(x, generator)


@dataclass(frozen=True)
class EulerMaruyama(Sampler):
    """The reverse SDE dx = [f x - g^2 score] dt + g dw (Song et al. 2021, arXiv 2011.13456). Weak order 1.

    f and g^2 are infinite where alpha = 0 (t = 1 of Linear, Cosine, Interpolant), so the grid starts at its
    noisiest log-SNR, -10, where x is N(0, sigma^2 I) to 5e-5 of a unit variance.
    """

    steps: int = 1000

    def grid(self, process: Process) -> Tensor:
        return _finite_grid(process, self.steps, self.spacing)

    def step(self, model, x, t, s, memory, *, condition, generator):
        return _euler_maruyama(model, x, t, s, condition, generator), None


def _langevin(score: Tensor, x: Tensor, a, z: Tensor) -> Tensor:
    return x + a * score + (2 * a) ** 0.5 * z


@dataclass(frozen=True)
class PredictorCorrector(Sampler):
    """After each step, Langevin steps at the new time of size 2 (snr |z|/|score|)^2 (Song et al. 2021, arXiv 2011.13456).

    The norms are averaged over the batch, so that a draw depends a little on the size of its batch.

    Parameters
    ----------
    snr : float
        Signal-to-noise ratio of a Langevin step. It leaves a bias: .3 % of a standard deviation at .05,
        2.9 % at Song's .16, whatever the number of steps.
    corrector_steps : int
        Langevin steps after each predictor step.
    predictor : {"ancestral", "euler_maruyama"}
        DDIM(eta=1), or the reverse SDE.
    """

    steps: int = 1000
    snr: float = 0.05
    corrector_steps: int = 1
    predictor: Literal["ancestral", "euler_maruyama"] = "ancestral"

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_positive("snr", self.snr)
        _require_count("corrector_steps", self.corrector_steps)
        _require_one_of("predictor", self.predictor, ("ancestral", "euler_maruyama"))

    @property
    def evaluations(self) -> int:
        return self.steps * (1 + self.corrector_steps) + 1

    def grid(self, process: Process) -> Tensor:
        if self.predictor == "euler_maruyama":
            return _finite_grid(process, self.steps, self.spacing)
        return super().grid(process)

    def step(self, model, x, t, s, memory, *, condition, generator):
        if self.predictor == "euler_maruyama":
            x = _euler_maruyama(model, x, t, s, condition, generator)
        else:
            x = _ddim(model.process, x, model.denoise(x, t, condition), t, s, 1.0, generator)
        for _ in range(self.corrector_steps):
            score, z = model.score(x, s, condition), _normal(x, generator)
            a = 2 * (self.snr * z.norm(dim=-1).mean() / score.norm(dim=-1).mean()) ** 2
            x = _langevin(score, x, a, z)
        return x, None


@dataclass(frozen=True)
class AnnealedLangevin(Sampler):
    """Langevin steps at each noise level, from the noisiest down (NCSN: Song & Ermon 2019, arXiv 1907.05600).

    At each time of the grid ``inner_steps`` steps of size step_size sigma^2. Between levels x is multiplied by
    alpha_s/alpha_t, which carries its data part to the new level (outside VE, without it 25 % are lost).

    Parameters
    ----------
    inner_steps : int
    step_size : float in (0, 2)
        In units of sigma^2; a level's own variance is too large by a factor 1/(1 - step_size/2) where noise
        dominates, and right where data does.
    """

    inner_steps: int = 5
    step_size: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_count("inner_steps", self.inner_steps)
        if not 0 < self.step_size < 2:
            raise ValueError(f"expected step_size in (0, 2), where Langevin is stable, got {self.step_size!r}")

    @property
    def evaluations(self) -> int:
        return self.steps * self.inner_steps + 1

    def grid(self, process: Process) -> Tensor:
        return _finite_grid(process, self.steps, self.spacing)

    def step(self, model, x, t, s, memory, *, condition, generator):
        process = model.process
        x = (process.alpha(s) / process.alpha(t)).to(x) * x
        a = self.step_size * float(process.sigma(s)) ** 2
        for _ in range(self.inner_steps):
            x = _langevin(model.score(x, s, condition), x, a, _normal(x, generator))
        return x, None


@dataclass(frozen=True)
class Langevin(Sampler):
    """Unadjusted Langevin dynamics at one noise level (Roberts & Tweedie 1996, Bernoulli 2(4)).

    In a direction of variance V (noise included) its law tends to the variance V/(1 - step_size/(2 V)), in
    some V/step_size steps. The draw is E[x_0 | x] at that level.

    Parameters
    ----------
    steps : int
    step_size : float
        a of x + a score + sqrt(2 a) z, in x's squared units; stable below twice the least V.
    log_snr : float
        The noise level, log(alpha^2/sigma^2).
    """

    steps: int = 1000
    step_size: float = 0.01
    log_snr: float = 6.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_positive("step_size", self.step_size)
        if not math.isfinite(self.log_snr):
            raise ValueError(f"expected a finite log_snr, got {self.log_snr!r}: 6 is noise of 5 % of a unit")

    def grid(self, process: Process) -> Tensor:
        return process.time(self.log_snr).expand(self.steps + 1)

    def step(self, model, x, t, s, memory, *, condition, generator):
        return _langevin(model.score(x, s, condition), x, self.step_size, _normal(x, generator)), None


class Counted(ScoreModel):
    """A model that counts its evaluations, the cost of a sampler.

    Attributes
    ----------
    evaluations : int
    """

    def __init__(self, model: ScoreModel) -> None:
        super().__init__()
        self.model, self.process, self.score_valid = model, model.process, model.score_valid
        self.evaluations = 0

    def denoise(self, x: Tensor, t, condition: Tensor | None = None) -> Tensor:
        self.evaluations += 1
        return self.model.denoise(x, t, condition)
