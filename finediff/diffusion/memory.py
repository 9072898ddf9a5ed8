"""Has it memorised? A training callback that watches the road from learning to copying.

    dial(step) = (L_held_out - L_train) / (L_held_out - L_empirical),      0: generalises, 1: the training rows' own score
    memorised  = share of draws with nearest / second-nearest training row below 1/3
    tau_gen    = step of the least held-out loss,     tau_mem = first step with more than 5 % memorised

L_train is the loss on training rows, L_empirical that of the exact minimiser of the training loss, which returns
training rows (`EmpiricalScore`); all three on the same times and noise. The time between tau_gen and tau_mem grows with
the number of rows (Bonnaire et al. 2025, arXiv 2505.17638).
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from finediff.diffusion.exact import EmpiricalScore
from finediff.diffusion.sample import ProbabilityFlow, Sampler
from finediff.diffusion.train import Evaluation


class MemorisationMonitor:
    """Callback of `finediff.diffusion.train.train`.

    Parameters
    ----------
    train, held_out : (n, d), (m, d)
        Rows in the model's coordinates.
    objective : the training's
    n_draws : int
        Draws per evaluation.
    every : int
        Evaluations between two looks.
    ratio, onset : float
        A draw is a copy below this ratio; memorisation has begun above this share of copies.
    stop : {"held_out", "onset", None}
        "held_out": stop once the held-out loss has not improved for ``patience`` looks; "onset": once
        memorisation has begun; None: only watch.
    sampler : Sampler, optional
        `ProbabilityFlow(24)`.
    seed : int

    Attributes
    ----------
    step, train_loss, held_out_loss, memorised, dial : lists, one entry a look
    """

    def __init__(
        self,
        train: Tensor,
        held_out: Tensor,
        objective,
        *,
        n_draws: int = 500,
        every: int = 1,
        ratio: float = 1 / 3,
        onset: float = 0.05,
        stop: str | None = "held_out",
        patience: int = 5,
        sampler: Sampler | None = None,
        seed: int = 0,
    ) -> None:
        if stop not in ("held_out", "onset", None):
            raise ValueError(f"expected stop to be 'held_out', 'onset' or None, got {stop!r}")
        self.rows, self.held_out, self.objective = train, held_out, objective
        self.n_draws, self.every, self.ratio, self.onset = n_draws, every, ratio, onset
        self.stop, self.patience, self.seed = stop, patience, seed
        self.sampler = sampler or ProbabilityFlow(24)
        self.step: list[int] = []
        self.train_loss: list[float] = []
        self.held_out_loss: list[float] = []
        self.memorised: list[float] = []
        self.dial: list[float] = []
        self._empirical: float | None = None
        self._calls = 0

    def __call__(self, evaluation: Evaluation) -> bool:
        self._calls += 1
        if (self._calls - 1) % self.every:
            return False
        model = copy.deepcopy(evaluation.model)
        model.load_state_dict(evaluation.average)
        if self._empirical is None:
            self._empirical = self._loss(EmpiricalScore(self.rows, model.process), self.rows)
        held_out, train = self._loss(model, self.held_out), self._loss(model, self.rows)
        self.step.append(evaluation.step)
        self.train_loss.append(train)
        self.held_out_loss.append(held_out)
        self.dial.append((held_out - train) / (held_out - self._empirical))
        draws = self.sampler(model, (self.n_draws, self.rows.shape[1]), generator=self._generator())
        self.memorised.append(copied_share(draws, self.rows, self.ratio))
        if self.stop == "held_out":
            best = self.held_out_loss.index(min(self.held_out_loss))
            return len(self.held_out_loss) - 1 - best >= self.patience
        return self.stop == "onset" and self.tau_mem is not None

    @property
    def tau_gen(self) -> int | None:
        """Step of the least held-out loss so far."""
        return self.step[self.held_out_loss.index(min(self.held_out_loss))] if self.step else None

    @property
    def tau_mem(self) -> int | None:
        """First step at which more than ``onset`` of the draws were copies; None if not yet."""
        return next((step for step, share in zip(self.step, self.memorised) if share > self.onset), None)

    @torch.no_grad()
    def _loss(self, model, rows: Tensor, repeats: int = 4) -> float:
        generator = self._generator()
        many = rows.repeat(repeats, 1)
        order = torch.randperm(len(many), generator=generator, device=rows.device)
        return float(self.objective(model, many[order], None, generator))

    def _generator(self) -> torch.Generator:
        return torch.Generator(device=self.rows.device).manual_seed(self.seed)


def copied_share(draws: Tensor, rows: Tensor, ratio: float = 1 / 3) -> float:
    """Share of draws (m, d) that are closer to one row (n, d) than ``ratio`` times their distance to the next."""
    nearest = torch.cdist(draws, rows).topk(2, dim=1, largest=False).values
    return float((nearest[:, 0] < ratio * nearest[:, 1]).double().mean())
