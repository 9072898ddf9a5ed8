"""How to minimise: one loop.

AdamW on random batches, learning rate warmed up then lowered by a cosine; gradients clipped; an exponential
moving average of the weights is what is evaluated, kept and sampled from. The held-out loss is computed on
the same times and noise each time, so that its changes are the model's. Training stops when it has not
improved for `patience` evaluations, and the best average is put into the model.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor

from finediff.diffusion.process import require
from finediff.diffusion.score import EMA, ScoreModel


@dataclass
class History:
    """What training saw: one entry per evaluation.

    ``train_loss`` is the mean of the batches since the last evaluation, ``held_out_loss`` that of the averaged weights
    on the held-out rows (empty where there are none), ``best_step`` the step of the weights that were kept, and
    ``stopped`` "budget" (all steps were used), "early" (no improvement, or a callback asked) or "" (unfinished).
    """

    step: list[int] = field(default_factory=list)
    train_loss: list[float] = field(default_factory=list)
    held_out_loss: list[float] = field(default_factory=list)
    best_step: int = 0
    stopped: str = ""


@dataclass(frozen=True)
class Evaluation:
    """What a callback is told after each evaluation; returning True from the callback stops the training."""

    step: int
    steps: int
    train_loss: float
    held_out_loss: float | None
    model: ScoreModel
    average: dict[str, Tensor]


@dataclass
class Training:
    """All that the next step depends on: what a checkpoint keeps and puts back.

    ``settings`` tell one training from another: rows and conditions, objective, process, shapes of the weights, the
    numbers, and the seed of the held-out noise. ``best`` is the best average of the weights so far.
    """

    settings: dict
    model: ScoreModel
    optimizer: torch.optim.Optimizer
    average: EMA
    generator: torch.Generator
    history: History = field(default_factory=History)
    best: dict[str, Tensor] = field(default_factory=dict)


def train(
    model: ScoreModel,
    x: Tensor,
    objective,
    *,
    steps: int = 2500,
    batch: int = 128,
    learning_rate: float = 2e-3,
    weight_decay: float = 1e-2,
    ema_decay: float = 0.998,
    held_out: Tensor | None = None,
    condition: Tensor | None = None,
    held_out_condition: Tensor | None = None,
    evaluate_every: int = 100,
    patience: int | None = 10,
    callbacks: Sequence[Callable[[Evaluation], bool | None]] = (),
    checkpoint=None,
    progress: Callable[[range], AbstractContextManager[Iterable[int]]] = nullcontext,
    generator: torch.Generator | None = None,
) -> History:
    """Train ``model`` in place on rows ``x`` by ``objective(model, rows, condition, generator)``.

    Parameters
    ----------
    model : ScoreModel
        Its parameters are the weights; it ends with the best average of them.
    x : (n, d)
        Rows to learn from, on the model's device.
    objective : callable
        Returns the loss of a batch, a scalar; see `finediff.diffusion.objective.Objective`.
    steps, batch : int
        Updates of the weights, and rows drawn (with replacement) for each; at most n.
    learning_rate, weight_decay, ema_decay : float
        Of AdamW (the highest rate of the schedule), and of `EMA`.
    held_out : (n_held_out, d), optional
        Rows for early stopping; without them the whole budget is used.
    condition, held_out_condition : (n, ...), (n_held_out, ...), optional
        What goes with each row.
    evaluate_every, patience : int
        Updates between evaluations (the last is always evaluated), and evaluations without improvement before
        stopping; with patience None it never stops early.
    callbacks : functions of `Evaluation`
        Return True to stop.
    checkpoint : object with ``resume(training)`` and ``save(training)``, optional
        Given the `Training` before the first step and after each evaluation; what it puts back is gone on with, to
        the weights that an uninterrupted run ends with. `finediff.generators.training.Checkpoint` is one.
    progress : callable
        Range of the steps to come -> context manager that gives them one by one, and draws what it likes.
    generator : torch.Generator, optional
        On the model's device; the source of batches, times and noise.

    Raises
    ------
    ValueError
        If the loss is not finite, or the checkpoint belongs to another training.
    """
    generator = generator or torch.Generator(device=x.device)
    weights = list(model.parameters())
    optimizer = torch.optim.AdamW(weights, lr=learning_rate, weight_decay=weight_decay, betas=(0.9, 0.99))
    # Its own seed, drawn before the first step: the held-out noise is the same at every evaluation.
    held_out_seed = int(torch.randint(2**31, (), generator=generator, device=x.device))
    settings = {
        "data": (x, condition, held_out, held_out_condition),
        "objective": objective,
        "process": model.process,
        "weights": [list(w.shape) for w in weights],
        "steps": steps,
        "batch": batch,
        "learning_rate": learning_rate,
        "weight_decay": weight_decay,
        "ema_decay": ema_decay,
        "evaluate_every": evaluate_every,
        "patience": patience,
        "seed": held_out_seed,
    }
    training = Training(settings, model, optimizer, EMA(model, ema_decay), generator)
    if checkpoint is not None:
        checkpoint.resume(training)

    history, average, averaged, losses = training.history, training.average, copy.deepcopy(model), []
    with progress(range(average.updates, average.updates if history.stopped else steps)) as todo:
        for done in todo:
            warm = min(1.0, (done + 1) / min(200, steps))
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * warm * (1 + math.cos(math.pi * done / steps)) / 2
            rows = torch.randint(len(x), (min(batch, len(x)),), device=x.device, generator=generator)
            loss = objective(model, x[rows], None if condition is None else condition[rows], generator)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            average.update(model)
            losses.append(loss.detach())
            step = done + 1
            if step % evaluate_every and step < steps:
                continue

            train_loss, loss_now, improved = float(torch.stack(losses).mean()), None, True
            losses.clear()
            advice = f"lower the learning rate ({learning_rate:g}), or check the rows for extreme values"
            require(math.isfinite(train_loss), "a finite loss", f"{train_loss} at step {step}", advice)
            if held_out is not None:
                averaged.load_state_dict(average.average)
                loss_now = fixed_loss(objective, averaged, held_out, held_out_condition, seed=held_out_seed)
                advice, found = (
                    "check the held-out rows for missing or extreme values",
                    f"{loss_now} at step {step}",
                )
                require(math.isfinite(loss_now), "a finite held-out loss", found, advice)
                improved = loss_now < min(history.held_out_loss, default=math.inf)
                history.held_out_loss.append(loss_now)
            history.step.append(step)
            history.train_loss.append(train_loss)
            if improved:
                training.best, history.best_step = {k: v.clone() for k, v in average.average.items()}, step
            since_best = len(history.step) - 1 - history.step.index(history.best_step)
            told = Evaluation(step, steps, train_loss, loss_now, model, average.average)
            asked_to_stop = [callback(told) for callback in callbacks]
            if any(asked_to_stop) or (patience is not None and since_best >= patience):
                history.stopped = "early"
            elif step == steps:
                history.stopped = "budget"
            if checkpoint is not None:
                checkpoint.save(training)
            if history.stopped:
                break
    if training.best:
        model.load_state_dict(training.best)
    return history


@torch.no_grad()
def fixed_loss(objective, model, rows: Tensor, condition=None, *, seed: int, repeats: int = 4) -> float:
    """Mean loss over copies of the rows, on the times and noise of one seed: only the model can change it."""
    generator = torch.Generator(device=rows.device).manual_seed(seed)
    # Shuffled, because times are stratified in the order of the rows and rows may be ordered in time.
    order = torch.randperm(repeats * len(rows), generator=generator, device=rows.device) % len(rows)
    return float(objective(model, rows[order], None if condition is None else condition[order], generator))
