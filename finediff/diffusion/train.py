"""How to minimise: one loop.

AdamW on random batches, learning rate warmed up then lowered by a cosine; gradients clipped; an exponential
moving average of the weights is what is evaluated, kept and sampled from. The held-out loss is computed on
the same times and noise each time, so that its changes are the model's. Training stops when it has not
improved for `patience` evaluations, and the best average is put into the model.
"""

from __future__ import annotations

import json
import math
import os
import re
import sys
import zlib
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from finediff.diffusion.process import require
from finediff.diffusion.score import EMA, ScoreModel


@dataclass
class History:
    """What training saw: one entry per evaluation.

    Attributes
    ----------
    step : list of int
    train_loss : list of float
        Mean of the batches since the last evaluation.
    held_out_loss : list of float
        Loss of the averaged weights on the held-out rows; empty where there are none.
    best_step : int
        Step of the weights that were kept.
    stopped : str
        "budget" (all steps were used), "early" (no improvement, or a callback asked) or "" (unfinished).
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
    checkpoint: str | Path | None = None,
    progress: bool | None = None,
    label: str = "training",
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
        Returns the loss of a batch, a scalar; see `finediff.diffusion.objective`.
    steps, batch : int
        Updates of the weights, and rows drawn (with replacement) for each; at most n.
    learning_rate, weight_decay, ema_decay : float
        Of AdamW (the highest rate of the schedule), and of `EMA`.
    held_out : (n_held_out, d), optional
        Rows for early stopping; without them the whole budget is used.
    condition, held_out_condition : (n, c), (n_held_out, c), optional
        What goes with each row.
    evaluate_every, patience : int
        Updates between evaluations (the last is always evaluated), and evaluations without improvement before
        stopping; with patience None it never stops early.
    callbacks : functions of `Evaluation`
        Return True to stop.
    checkpoint : path, optional
        A .safetensors file written whole at each evaluation. If it exists, training goes on from it and ends
        with the weights that an uninterrupted run ends with.
    progress, label : bool, str
        A bar of that name with the time left on standard error; by default where that is a terminal.
    generator : torch.Generator, optional
        On the model's device; the source of batches, times and noise.

    Returns
    -------
    History

    Raises
    ------
    ValueError
        If the loss is not finite, or the checkpoint belongs to another training.
    """
    generator = generator or torch.Generator(device=model.device)
    weights = list(model.parameters())
    optimizer = torch.optim.AdamW(weights, lr=learning_rate, weight_decay=weight_decay, betas=(0.9, 0.99))
    average, best, history = EMA(model, ema_decay), {}, History()
    # Its own seed, drawn before the first step: the held-out noise is the same at every evaluation.
    held_out_seed = int(torch.randint(2**31, (), generator=generator, device=model.device))
    signature = {
        "data": [_fingerprint(a) for a in (x, condition, held_out, held_out_condition)],
        "objective": _described(objective),
        "process": _described(getattr(model, "process", None)),
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
    if checkpoint is not None and Path(checkpoint).exists():
        history, best = _resume(Path(checkpoint), signature, model, optimizer, average, generator)

    losses = []
    todo = range(average.updates, 0 if history.stopped else steps)
    # Closed at once on an error: a bar left to the garbage collector goes on drawing while the traceback lives.
    with closing(_bar(todo, steps, progress, label)) as numbers:
        for done in numbers:
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

            train_loss, loss_now = float(torch.stack(losses).mean()), None
            losses.clear()
            advice = f"lower the learning rate ({learning_rate:g}), or check the rows for extreme values"
            require(math.isfinite(train_loss), "a finite loss", f"{train_loss} at step {step}", advice)
            improved = True
            if held_out is not None:
                loss_now = _held_out_loss(
                    model, average, held_out, held_out_condition, objective, held_out_seed
                )
                advice = "check the held-out rows for missing or extreme values"
                found = f"{loss_now} at step {step}"
                require(math.isfinite(loss_now), "a finite held-out loss", found, advice)
                improved = loss_now < min(history.held_out_loss, default=math.inf)
                history.held_out_loss.append(loss_now)
            history.step.append(step)
            history.train_loss.append(train_loss)
            if improved:
                best, history.best_step = {k: v.clone() for k, v in average.average.items()}, step
            since_best = len(history.step) - 1 - history.step.index(history.best_step)
            told = Evaluation(step, steps, train_loss, loss_now, model, average.average)
            asked_to_stop = [callback(told) for callback in callbacks]
            if any(asked_to_stop) or (patience is not None and since_best >= patience):
                history.stopped = "early"
            elif step == steps:
                history.stopped = "budget"
            if checkpoint is not None:
                _save(Path(checkpoint), signature, history, best, model, optimizer, average, generator)
            if history.stopped:
                break
    if best:
        model.load_state_dict(best)
    return history


def _fingerprint(rows: Tensor | None) -> int | None:
    return None if rows is None else zlib.crc32(rows.detach().cpu().numpy().tobytes())


def _described(thing) -> str:
    """What prints the same in every process that builds the same thing: a repr without its addresses."""
    return re.sub(r" at 0x[0-9a-f]+", "", repr(thing))


def _bar(todo: range, steps: int, progress: bool | None, label: str):
    """The steps, behind a progress bar where one is wanted; rich is only needed there."""
    if not (sys.stderr.isatty() if progress is None else progress):
        yield from todo
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn(label), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=console.is_terminal) as bar:
        task = bar.add_task(label, total=steps, completed=todo.start)
        for step in todo:
            yield step
            bar.advance(task)


@torch.no_grad()
def _held_out_loss(
    model, average: EMA, rows: Tensor, condition, objective, seed: int, repeats: int = 4
) -> float:
    generator = torch.Generator(device=model.device).manual_seed(seed)
    current = {k: v.clone() for k, v in model.state_dict().items()}
    model.load_state_dict(average.average)
    # Shuffled, because times are stratified in the order of the rows and rows may be ordered in time.
    order = torch.randperm(repeats * len(rows), generator=generator, device=rows.device) % len(rows)
    loss = float(objective(model, rows[order], None if condition is None else condition[order], generator))
    model.load_state_dict(current)
    return loss


# A checkpoint is one safetensors file: the tensors by owner, and the rest as JSON in its header.


def _save(path: Path, signature, history, best, model, optimizer, average: EMA, generator) -> None:
    owners = {"model": model.state_dict(), "average": average.average, "best": best}
    owners |= {f"optimizer/{i}": state for i, state in optimizer.state_dict()["state"].items()}
    tensors = {f"{owner}/{k}": v for owner, state in owners.items() for k, v in state.items()}
    tensors["generator"] = generator.get_state()
    tensors = {k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}
    about = json.dumps({"history": asdict(history), "signature": signature})
    partial = path.with_name(path.name + ".partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, partial, metadata={"training": about})
    os.replace(partial, path)


def _resume(path: Path, signature, model, optimizer, average: EMA, generator) -> tuple[History, dict]:
    """Put a checkpoint's state back in place; returns its history and its best weights."""
    with safe_open(path, framework="pt") as file:
        about = json.loads(file.metadata()["training"])
        tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118 (not a dict)
    changed = ", ".join(name for name in signature if about["signature"].get(name) != signature[name])
    advice = "delete the file to start again, or call fit with the data and settings it was made with"
    found = f"one of another (different: {changed})"
    require(not changed, f"a checkpoint of this training in {path}", found, advice)

    def part(owner: str) -> dict[str, Tensor]:
        return {k.removeprefix(owner): v for k, v in tensors.items() if k.startswith(owner)}

    history = History(**about["history"])
    model.load_state_dict(part("model/"))
    for name, value in part("average/").items():
        average.average[name].copy_(value)
    average.updates = history.step[-1]
    groups = optimizer.state_dict()["param_groups"]
    state = {i: part(f"optimizer/{i}/") for group in groups for i in group["params"]}
    optimizer.load_state_dict({"state": {i: s for i, s in state.items() if s}, "param_groups": groups})
    generator.set_state(tensors["generator"])
    return history, part("best/")
