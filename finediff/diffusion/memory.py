"""Has it memorised? A training callback that watches the road from learning to copying.

    dial(step) = (L_held_out - L_train) / (L_held_out - L_empirical),      0: generalises, 1: the training rows' own score
    memorised  = share of draws with nearest / second-nearest training row below 1/3;  floor: that of held-out rows
    tau_gen    = step of the least held-out loss,     tau_mem = first step with memorised > floor + 5 %

L_train is the loss on training rows, L_empirical that of the exact minimiser of the training loss, which returns
training rows (`EmpiricalScore`), on the same times and noise. Of fresh rows in d dimensions about 3^-d have a ratio
below 1/3. The time from tau_gen to tau_mem grows with the number of rows (Bonnaire et al. 2025, arXiv 2505.17638).
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from typing import Literal

import torch
from torch import Tensor

from finediff.diffusion.exact import EmpiricalScore
from finediff.diffusion.process import require
from finediff.diffusion.sample import ProbabilityFlow, Sampler
from finediff.diffusion.train import Evaluation, fixed_loss


@dataclass(eq=False, repr=False)
class MemorisationMonitor:
    """Callback of `finediff.diffusion.train.train`; it has its own generator, and leaves the training as it is.

    Parameters
    ----------
    train, held_out : (n, d), (m, d)
        Rows in the model's coordinates.
    objective : the training's
        Optimal-transport pairing, of whose loss `EmpiricalScore` is not the minimiser, is refused.
    n_draws, every : int
        Draws per look, and evaluations between two looks.
    ratio, onset : float
        A draw is a copy below this ratio; memorisation has begun this share of copies above the floor.
    stop : {"held_out", "onset", None}
        "held_out": stop once the held-out loss has not improved for ``patience`` looks; "onset": once
        memorisation has begun; None: only watch.

    Attributes
    ----------
    step, train_loss, held_out_loss, memorised, dial : lists, one entry a look
    floor : float
    """

    train: Tensor
    held_out: Tensor
    objective: Callable
    _: KW_ONLY
    n_draws: int = 500
    every: int = 1
    ratio: float = 1 / 3
    onset: float = 0.05
    stop: Literal["held_out", "onset"] | None = "held_out"
    patience: int = 5
    sampler: Sampler | None = None  # ProbabilityFlow(24)
    seed: int = 1757  # an unlikely seed of a simulated panel, whose rows the draws' noise would repeat

    def __post_init__(self) -> None:
        stops = ("held_out", "onset", None)
        require(self.stop in stops, f"stop among {stops}", repr(self.stop))
        advice = "the dial's end 1 is the minimiser under those, train with pairing='independent'"
        require(getattr(self.objective, "score_valid", True), "independent pairs", self.objective, advice)
        self.floor = copied_share(self.held_out, self.train, self.ratio)
        self.step, self.train_loss, self.held_out_loss, self.memorised, self.dial = [], [], [], [], []
        self._calls, self._empirical = 0, None

    def __call__(self, evaluation: Evaluation) -> bool:
        self._calls += 1
        if (self._calls - 1) % self.every:
            return False
        model = copy.deepcopy(evaluation.model)
        model.load_state_dict(evaluation.average)
        if self._empirical is None:
            self._empirical = self._loss(EmpiricalScore(self.train, model.process), self.train)
        held_out, train = self._loss(model, self.held_out), self._loss(model, self.train)
        sampler = self.sampler or ProbabilityFlow(24)
        generator = torch.Generator(device=self.train.device).manual_seed(self.seed)
        draws = sampler(model, (self.n_draws, self.train.shape[1]), generator=generator)
        self.step.append(evaluation.step)
        self.train_loss.append(train)
        self.held_out_loss.append(held_out)
        self.dial.append((held_out - train) / (held_out - self._empirical))
        self.memorised.append(copied_share(draws, self.train, self.ratio))
        if self.stop == "held_out":
            return len(self.step) - 1 - self._best >= self.patience
        return self.stop == "onset" and self.tau_mem is not None

    @property
    def _best(self) -> int:
        return self.held_out_loss.index(min(self.held_out_loss))

    @property
    def tau_gen(self) -> int | None:
        """Step of the least held-out loss so far; None before the first look."""
        return self.step[self._best] if self.step else None

    @property
    def tau_mem(self) -> int | None:
        """First step at which the share of copies was more than ``onset`` above the floor; None if not yet."""
        limit = self.floor + self.onset
        return next((step for step, share in zip(self.step, self.memorised) if share > limit), None)

    def _loss(self, model, rows: Tensor) -> float:
        return fixed_loss(self.objective, model, rows, seed=self.seed)


def copied_share(draws: Tensor, rows: Tensor, ratio: float = 1 / 3) -> float:
    """Share of draws (m, d) nearer to one row (n, d) than ``ratio`` times the next, or equal to two rows."""
    require(len(draws) and len(rows) > 1, "draws and at least 2 rows", f"{len(draws)} and {len(rows)}")
    nearest = torch.cdist(draws, rows).topk(2, dim=1, largest=False).indices
    # cdist loses digits where a draw is a copy; the two winners are measured again by subtraction.
    first, second = (draws[:, None] - rows[nearest]).norm(dim=2).sort(1).values.T
    return float(((first < ratio * second) | (second == 0)).double().mean())
