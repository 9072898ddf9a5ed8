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
        "budget" (all steps were used), "early" (the held-out loss stopped improving, or a callback
        asked to stop) or "" (unfinished).
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
    learning_rate, weight_decay : float
        Of AdamW; the rate is the highest of its schedule.
    ema_decay : float
        See `EMA`.
    held_out : (n_held_out, d), optional
        Rows for early stopping; without them the whole budget is used.
    condition, held_out_condition : (n, c), (n_held_out, c), optional
        What goes with each row.
    evaluate_every : int
        Updates between evaluations; the last update is always evaluated.
    patience : int or None
        Evaluations without improvement before stopping; None never stops early.
    callbacks : functions of `Evaluation`
        Return True to stop.
    checkpoint : path, optional
        A .safetensors file written whole at each evaluation. If it exists, training goes on from it and ends
        with the weights that an uninterrupted run ends with.
    progress : bool, optional
        A bar with the time left on standard error; by default where that is a terminal.
    label : str
        Name on the bar.
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
    average = EMA(model, ema_decay)
    best, best_loss, since_best, history, start = None, math.inf, 0, History(), 0
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
        saved = _Checkpoint.read(Path(checkpoint), signature)
        start, best_loss, since_best, history = saved.step, saved.best_loss, saved.since_best, saved.history
        saved.restore(model, optimizer, average, generator)
        best = saved.best

    running, count = torch.zeros((), device=model.device), 0
    # Closed at once on an error: a bar left to the garbage collector goes on drawing while the traceback lives.
    with closing(_bar(range(start, 0 if history.stopped else steps), steps, progress, label)) as todo:
        for step in todo:
            rate = (
                learning_rate
                * min(1.0, (step + 1) / min(200, steps))
                * 0.5
                * (1 + math.cos(math.pi * step / steps))
            )
            for group in optimizer.param_groups:
                group["lr"] = rate
            rows = torch.randint(len(x), (min(batch, len(x)),), device=x.device, generator=generator)
            loss = objective(model, x[rows], None if condition is None else condition[rows], generator)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            average.update(model)
            running, count = running + loss.detach(), count + 1

            if (step + 1) % evaluate_every == 0 or step + 1 == steps:
                train_loss = float(running / count)
                running, count = torch.zeros((), device=model.device), 0
                if not math.isfinite(train_loss):
                    raise ValueError(
                        f"expected a finite loss, got {train_loss} at step {step + 1}: lower the learning rate "
                        f"({learning_rate:g}), or check the rows for extreme values"
                    )
                history.step.append(step + 1)
                history.train_loss.append(train_loss)
                loss_now = None
                if held_out is not None:
                    loss_now = _held_out_loss(
                        model, average, held_out, held_out_condition, objective, held_out_seed
                    )
                    if not math.isfinite(loss_now):
                        raise ValueError(
                            f"expected a finite held-out loss, got {loss_now} at step {step + 1}: check the "
                            "held-out rows for missing or extreme values"
                        )
                    history.held_out_loss.append(loss_now)
                if loss_now is None or loss_now < best_loss:
                    best = {k: v.clone() for k, v in average.average.items()}
                    best_loss, since_best, history.best_step = (
                        loss_now if loss_now is not None else math.inf,
                        0,
                        step + 1,
                    )
                else:
                    since_best += 1
                told = Evaluation(step + 1, steps, train_loss, loss_now, model, average.average)
                asked_to_stop = [callback(told) for callback in callbacks]
                if any(asked_to_stop) or (patience is not None and since_best >= patience):
                    history.stopped = "early"
                elif step + 1 == steps:
                    history.stopped = "budget"
                if checkpoint is not None:
                    _Checkpoint(step + 1, best_loss, since_best, history, signature, best).write(
                        Path(checkpoint), model, optimizer, average, generator
                    )
                if history.stopped:
                    break
    if best is not None:
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
    rows = rows.repeat(repeats, 1)
    condition = None if condition is None else condition.repeat(repeats, 1)
    # Shuffled, because times are stratified in the order of the rows and rows may be ordered in time.
    order = torch.randperm(len(rows), generator=generator, device=rows.device)
    loss = float(objective(model, rows[order], None if condition is None else condition[order], generator))
    model.load_state_dict(current)
    return loss


@dataclass
class _Checkpoint:
    """A training on disk: every tensor in one safetensors file, everything else as JSON in its header."""

    step: int
    best_loss: float
    since_best: int
    history: History
    signature: dict
    best: dict[str, Tensor] | None
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def write(self, path: Path, model, optimizer, average: EMA, generator: torch.Generator) -> None:
        tensors = {f"model/{k}": v for k, v in model.state_dict().items()}
        tensors |= {f"average/{k}": v for k, v in average.average.items()}
        tensors |= {f"best/{k}": v for k, v in (self.best or {}).items()}
        for i, state in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer/{i}/{k}": v for k, v in state.items()}
        tensors["generator"] = generator.get_state()
        about = {
            "step": self.step,
            "best_loss": self.best_loss,
            "since_best": self.since_best,
            "history": asdict(self.history),
            "signature": self.signature,
            "average_updates": average.updates,
        }
        partial = path.with_name(path.name + ".partial")
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(
            {k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()},
            partial,
            metadata={"training": json.dumps(about)},
        )
        os.replace(partial, path)

    @classmethod
    def read(cls, path: Path, signature: dict) -> _Checkpoint:
        with safe_open(path, framework="pt") as file:
            about = json.loads(file.metadata()["training"])
            tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118 (not a dict)
        found = about["signature"]
        changed = [name for name in signature if found.get(name) != signature[name]]
        if changed:
            raise ValueError(
                f"expected a checkpoint of this training in {path}, got one of another (different: "
                f"{', '.join(changed)}): delete the file to start again, or call fit with the data and settings it "
                "was made with"
            )
        best = {k.removeprefix("best/"): v for k, v in tensors.items() if k.startswith("best/")} or None
        history = History(**about["history"])
        saved = cls(about["step"], about["best_loss"], about["since_best"], history, signature, best, tensors)
        saved.average_updates = about["average_updates"]
        return saved

    def restore(self, model, optimizer, average: EMA, generator: torch.Generator) -> None:
        def part(prefix: str) -> dict[str, Tensor]:
            return {k.removeprefix(prefix): v for k, v in self.tensors.items() if k.startswith(prefix)}

        model.load_state_dict(part("model/"))
        for name, value in part("average/").items():
            average.average[name].copy_(value)
        average.updates = self.average_updates
        state: dict[int, dict] = {}
        for name, value in part("optimizer/").items():
            index, key = name.split("/")
            state.setdefault(int(index), {})[key] = value
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
        generator.set_state(self.tensors["generator"])
