"""What stands around a training: the file it is resumed from, and the bar that shows it.

A checkpoint is one safetensors file: the tensors by owner, and the history and settings as JSON in its header.
"""

from __future__ import annotations

import json
import re
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from finediff.diffusion.process import require
from finediff.diffusion.train import History, Training
from finediff.provenance import whole_file


class Checkpoint:
    """A training's state in one file, written whole at each evaluation; for `finediff.diffusion.train.train`.

    Parameters
    ----------
    path : path
        A .safetensors file. If it exists, the training goes on from it.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def save(self, training: Training) -> None:
        """Write the state over that of the evaluation before."""
        model, optimizer, average = training.model, training.optimizer, training.average
        owners = {"model": model.state_dict(), "average": average.average, "best": training.best}
        owners |= {f"optimizer/{i}": state for i, state in optimizer.state_dict()["state"].items()}
        tensors = {f"{owner}/{k}": v for owner, state in owners.items() for k, v in state.items()}
        tensors["generator"] = training.generator.get_state()
        tensors = {k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}
        about = {"history": asdict(training.history), "signature": _signature(training.settings)}
        with whole_file(self.path) as partial:
            save_file(tensors, partial, metadata={"training": json.dumps(about)})

    def resume(self, training: Training) -> None:
        """Put the file's state back in place; raises ValueError if it is that of another training."""
        if not self.path.exists():
            return
        with safe_open(self.path, framework="pt") as file:
            about = json.loads(file.metadata()["training"])
            tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118 (not a dict)
        signature = _signature(training.settings)
        changed = ", ".join(name for name in signature if about["signature"].get(name) != signature[name])
        advice = "delete the file to start again, or call fit with the data and settings it was made with"
        found = f"one of another (different: {changed})"
        require(not changed, f"a checkpoint of this training in {self.path}", found, advice)

        def part(owner: str) -> dict[str, Tensor]:
            return {k.removeprefix(owner): v for k, v in tensors.items() if k.startswith(owner)}

        training.history, training.best = History(**about["history"]), part("best/")
        training.model.load_state_dict(part("model/"))
        for name, value in part("average/").items():
            training.average.average[name].copy_(value)
        training.average.updates = training.history.step[-1]
        groups = training.optimizer.state_dict()["param_groups"]
        state = {i: part(f"optimizer/{i}/") for group in groups for i in group["params"]}
        training.optimizer.load_state_dict(
            {"state": {i: s for i, s in state.items() if s}, "param_groups": groups}
        )
        training.generator.set_state(tensors["generator"])


def _signature(settings: dict) -> dict:
    """The settings as JSON holds them: rows by their checksum, objects by what they print."""

    def printed(thing) -> str:
        return re.sub(r" at 0x[0-9a-f]+", "", repr(thing))  # without addresses: the same in every process

    def checksum(rows: Tensor | None) -> int | None:
        return None if rows is None else zlib.crc32(rows.detach().cpu().numpy().tobytes())

    described = {name: printed(settings[name]) for name in ("objective", "process")}
    return settings | described | {"data": [checksum(rows) for rows in settings["data"]]}


def progress_bar(label: str = "training", wanted: bool | None = None) -> Callable:
    """A bar of that name with the time left on standard error, for ``train(progress=)``.

    ``wanted`` None: only where standard error is a terminal. rich is needed only where the bar is drawn.
    """

    @contextmanager
    def bar(todo: range) -> Iterator[Iterator[int]]:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn(label), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        console = Console(stderr=True)
        with Progress(*columns, console=console, transient=console.is_terminal) as drawn:
            task = drawn.add_task(label, total=todo.stop, completed=todo.start)

            def steps() -> Iterator[int]:
                for step in todo:
                    yield step
                    drawn.advance(task)

            yield steps()

    return bar if (sys.stderr.isatty() if wanted is None else wanted) else nullcontext
