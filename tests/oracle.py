"""The lists that the laws run over, and the models whose law is known: adding a class is adding a line here."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from unittest import mock

import pytest
import torch

from finediff.diffusion.exact import GaussianScore
from finediff.diffusion.guide import ClassifierFreeGuidance, ClassifierGuidance, Inpainting, LinearStress
from finediff.diffusion.process import (
    OU,
    VE,
    VP,
    Cosine,
    Interpolant,
    Linear,
    Process,
    SubVP,
    linear_betas,
)
from finediff.diffusion.sample import (
    DDIM,
    DDPM,
    AnnealedLangevin,
    DPMSolver,
    EulerMaruyama,
    PredictorCorrector,
    ProbabilityFlow,
    Resampled,
    Sampler,
)
from finediff.diffusion.score import ScoreModel

PROCESSES: dict[str, Process] = {
    "VP": VP(),
    "OU": OU(),
    "SubVP": SubVP(),
    "VE": VE(),
    "Cosine": Cosine(),
    "Linear": Linear(),
    "Interpolant": Interpolant(),
    "from_betas": VP.from_betas(linear_betas()),
}


@dataclass(frozen=True)
class Case:
    """What is known of a sampler: its order, and how near its law comes to the model's.

    order is that of the map from noise to data (deterministic) or of the variance (stochastic), None where
    refining the grid does not make it exact. tolerance is a share of every standard deviation.
    """

    sampler: Sampler
    order: int | None
    tolerance: float = 0.01


# High orders are held to the tolerance at fewer than the 1,000 steps of the others.
SAMPLERS: dict[str, Case] = {
    "DDIM": Case(DDIM(1000), 1),
    "DDIM(.5)": Case(DDIM(1000, eta=0.5), 1),
    "DDPM": Case(DDPM(1000), 1),
    "DDPM(beta)": Case(DDPM(1000, variance="beta"), 1),
    "Resampled": Case(Resampled(500, repeats=2), None),
    "Euler": Case(ProbabilityFlow(512, method="euler"), 1),
    "Heun": Case(ProbabilityFlow(64, method="heun"), 2),
    "RK4": Case(ProbabilityFlow(24, method="rk4"), 4),
    "DPMSolver": Case(DPMSolver(64), 2),
    "DPMSolver(SDE)": Case(DPMSolver(64, stochastic=True), 2),
    "EulerMaruyama": Case(EulerMaruyama(1000), 1),
    "PredictorCorrector": Case(PredictorCorrector(1000), None),
    "PredictorCorrector(SDE)": Case(PredictorCorrector(1000, predictor="euler_maruyama"), None),
    "AnnealedLangevin": Case(AnnealedLangevin(), None, 0.06),
}

EIGENVALUES = (0.3, 0.8, 1.4, 2.5)
MEAN = (0.5, -1.0, 0.0, 2.0)


def gaussian(process: Process, eigenvalues=EIGENVALUES, mean=MEAN, dtype=torch.float64) -> GaussianScore:
    """The oracle x_0 ~ N(mean, diag(eigenvalues))."""
    return GaussianScore(
        torch.tensor(mean, dtype=dtype), torch.diag(torch.tensor(eigenvalues, dtype=dtype)), process
    )


class Counted(ScoreModel):
    """A model that counts its ``evaluations``: what a draw has cost."""

    def __init__(self, model: ScoreModel) -> None:
        super().__init__()
        self.model, self.process, self.score_valid = model, model.process, model.score_valid
        self.evaluations = 0

    def denoise(self, x: torch.Tensor, t, condition=None) -> torch.Tensor:
        self.evaluations += 1
        return self.model.denoise(x, t, condition)


def each(table: dict):
    """Parametrise over a table's values, named by its keys."""
    return [pytest.param(value, id=key) for key, value in table.items()]


def hadamard(size: int) -> torch.Tensor:
    """Orthogonal columns of +-1, the first all 1 (Sylvester); size a power of 2."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix


def moments(
    sampler: Sampler, model: ScoreModel, d: int = len(EIGENVALUES)
) -> tuple[torch.Tensor, torch.Tensor]:
    """Exact mean and variance (d,) of a sampler's draws, where its step is linear and keeps coordinates apart.

    Each step runs on a small batch whose empirical means and covariances are those of the state (x and what
    memory holds of its shape), every normal draw replaced by fresh columns orthogonal to all the others: the
    moments of the result are then exact, with no Monte-Carlo error. The state is laid out anew at each step.
    """
    columns = hadamard(64)[:, 1:]
    process, grid = model.process, sampler.grid(model.process)
    used = 0

    def fresh(shape, **_):
        nonlocal used
        used += d
        assert used <= columns.shape[1], "the design has too few columns"
        return columns[:, used - d : used]

    x, memory = process.sigma(grid[0]) * fresh(None), None
    with mock.patch.object(torch, "randn", fresh):
        for t, s in itertools.pairwise(grid):
            held = [
                i for i, m in enumerate(memory or ()) if isinstance(m, torch.Tensor) and m.shape == x.shape
            ]
            state = torch.stack([x, *(memory[i] for i in held)])
            mean = state.mean(1, keepdim=True)
            used, k = 0, len(state)
            basis = torch.stack([fresh(None) for _ in range(k)])
            if k == 1:
                x = mean[0] + (state[0] - mean[0]).square().mean(0).sqrt() * basis[0]
            else:
                covariance = torch.einsum("knd,lnd->dkl", state - mean, state - mean) / len(columns)
                # Perfectly correlated parts are allowed: a root by eigenvalues needs no positive definiteness.
                values, vectors = torch.linalg.eigh(covariance)
                root = vectors * values.clamp(min=0).sqrt()[:, None, :]
                x, *rest = mean + torch.einsum("dkl,lnd->knd", root, basis)
                memory = tuple(rest[held.index(i)] if i in held else m for i, m in enumerate(memory))
            x, memory = sampler.step(model, x, t, s, memory, condition=None, generator=None)
    x0 = model.denoise(x, grid[-1])
    return x0.mean(0), x0.var(0, correction=0)


def halves(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """Logits (batch, 2) of a classifier of rising and falling days."""
    return torch.stack([x.sum(1), -x.sum(1)], 1) * (1 - t[:, None]).to(x)


# What wraps a model of four assets into a guided one.
GUIDES = {
    "ClassifierFreeGuidance": lambda model: ClassifierFreeGuidance(model, 1.0),
    "ClassifierGuidance": lambda model: ClassifierGuidance(model, halves, 1, 0.5),
    "Inpainting": lambda model: Inpainting(model, [True, False, False, False], [-1.0, 0, 0, 0]),
    "LinearStress": lambda model: LinearStress(model, [[1.0, 0, 0, 0], [0, 0.5, 0.5, 0]], [-1.0, 0.5]),
    "LinearStress(band)": lambda model: LinearStress(model, [0.25, 0.25, 0.25, 0.25], (0.3, float("inf"))),
    "LinearStress(covariance)": lambda model: LinearStress(model, [1.0, 0, 0, 0], [-1.0], torch.eye(4)),
}
