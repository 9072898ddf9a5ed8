"""Has it memorised? A training callback that watches the road from learning to copying.

    dial(step) = (L_held_out - L_train) / (L_held_out - L_empirical),      0: generalises, 1: the training rows' own score
    memorised  = share of draws with nearest / second-nearest training row below 1/3;  floor: that of held-out rows
    tau_gen    = step of the least held-out loss,     tau_mem = first step with memorised > floor + 5 %

L_train is the loss on training rows, L_empirical that of the exact minimiser of the training loss, which returns
training rows (`EmpiricalScore`), on the same times and noise. In d dimensions a share of about 3^-d of fresh rows has
a ratio below 1/3. The time between tau_gen and tau_mem grows with the number of rows (Bonnaire et al. 2025, arXiv
2505.17638).
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from finediff.diffusion.exact import EmpiricalScore
from finediff.diffusion.sample import ProbabilityFlow, Sampler
from finediff.diffusion.train import Evaluation


class MemorisationMonitor:
    """Callback of `finediff.diffusion.train.train`; it draws from its own generator and leaves the training as it is.

    Parameters
    ----------
    train, held_out : (n, d), (m, d)
        Rows in the model's coordinates.
    objective : callable
        The training's; optimal-transport pairing, of which `EmpiricalScore` is not the minimiser, is refused.
    n_draws : int
        Draws per look.
    every : int
        Evaluations between two looks.
    ratio, onset : float
        A draw is a copy below this ratio; memorisation has begun this share of copies above the floor.
    stop : {"held_out", "onset", None}
        "held_out": stop once the held-out loss has not improved for ``patience`` looks; "onset": once
        memorisation has begun; None: only watch.
    sampler : Sampler, optional
        `ProbabilityFlow(24)`.
    seed : int

    Attributes
    ----------
    step, train_loss, held_out_loss, memorised, dial : lists, one entry a look
    floor : float
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
        if not getattr(objective, "score_valid", True):
            raise ValueError(
                f"expected independent pairs, got {objective}, because the dial's end is the minimiser under "
                "independent pairs: do train with pairing='independent' to watch memorisation"
            )
        if len(train) < 2 or len(held_out) < 1:
            raise ValueError(
                f"expected 2 training rows and 1 held-out row or more, got {len(train)} and {len(held_out)}"
            )
        self.rows, self.held_out, self.objective = train, held_out, objective
        self.n_draws, self.every, self.ratio, self.onset = n_draws, every, ratio, onset
        self.stop, self.patience, self.seed = stop, patience, seed
        self.sampler = sampler or ProbabilityFlow(24)
        self.floor = copied_share(held_out, train, ratio)
        self.step: list[int] = []
        self.train_loss, self.held_out_loss, self.memorised, self.dial = ([], [], [], [])
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
        draws = self.sampler(model, (self.n_draws, self.rows.shape[1]), generator=self._generator())
        self.step.append(evaluation.step)
        self.train_loss.append(train)
        self.held_out_loss.append(held_out)
        self.dial.append((held_out - train) / (held_out - self._empirical))
        self.memorised.append(copied_share(draws, self.rows, self.ratio))
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

    @torch.no_grad()
    def _loss(self, model, rows: Tensor, repeats: int = 4) -> float:
        generator = self._generator()
        many = rows.repeat(repeats, 1)
        order = torch.randperm(len(many), generator=generator, device=rows.device)
        return float(self.objective(model, many[order], None, generator))

    def _generator(self) -> torch.Generator:
        return torch.Generator(device=self.rows.device).manual_seed(self.seed)


def copied_share(draws: Tensor, rows: Tensor, ratio: float = 1 / 3) -> float:
    """Share of draws (m, d) that are closer to one row (n, d) than ``ratio`` times their distance to the next.

    A draw that equals two rows is a copy too.
    """
    nearest = torch.cdist(draws, rows).topk(2, dim=1, largest=False).indices
    # cdist loses digits where a draw is a copy; the two winners are measured again by subtraction.
    first, second = (draws[:, None] - rows[nearest]).norm(dim=2).sort(1).values.T
    return float(((first < ratio * second) | (second == 0)).double().mean())
