"""Finished windows on disk: a run that was killed goes on, and ends in the same files byte for byte.

    job.json             what is computed from what, and its fingerprint
    parts/               one safetensors file a task: weights (k, d), numbers of the windows, CPU seconds
    returns.parquet      daily returns of the strategies, when all is done
    weights.parquet      weights by strategy and date

Every file appears whole or not at all. A directory of another job is refused.
"""

import dataclasses
import functools
import hashlib
import json
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pandas as pd
from safetensors.numpy import load_file, save_file

from finediff.provenance import data_hash, whole_file


def describe(thing, depth=0):
    """What a strategy is made of, as JSON holds it: equal for equal settings, in every process.

    Parameters
    ----------
    thing : object
        Numbers, text, arrays (by their hash), tables, functions (by their code), estimators (by their parameters),
        dataclasses, and objects (by their attributes).
    depth : int
        How far down; beyond 12 only the class is told.

    Returns
    -------
    object
        Of lists, dicts, text and numbers.
    """
    if thing is None or isinstance(thing, bool | int | str):
        return thing
    if isinstance(thing, float):
        return repr(thing)
    if isinstance(thing, np.generic):
        return describe(thing.item(), depth)
    if isinstance(thing, np.ndarray):
        return [str(thing.dtype), list(thing.shape), _hash(np.ascontiguousarray(thing))]
    if isinstance(thing, pd.DataFrame | pd.Series | pd.Index):
        keys = pd.util.hash_pandas_object(thing).to_numpy()
        return [type(thing).__name__, *map(str, getattr(thing, "columns", [])), _hash(keys)]
    kind = f"{type(thing).__module__}.{type(thing).__qualname__}"
    if depth > 12:
        return kind
    deeper = functools.partial(describe, depth=depth + 1)
    if isinstance(thing, dict):
        return {str(key): deeper(value) for key, value in thing.items()}
    if isinstance(thing, list | tuple):
        return [deeper(value) for value in thing]
    if isinstance(thing, set | frozenset):
        return sorted(json.dumps(deeper(value), sort_keys=True) for value in thing)
    if isinstance(thing, type):
        return f"{thing.__module__}.{thing.__qualname__}"
    if isinstance(thing, functools.partial):
        return [kind, deeper(thing.func), deeper(thing.args), deeper(thing.keywords)]
    if isinstance(thing, np.random.RandomState):
        return [kind, deeper(thing.get_state())]
    code = getattr(thing, "__code__", None)
    if code is not None:
        held = [cell.cell_contents for cell in thing.__closure__ or ()]
        constants = [value for value in code.co_consts if not hasattr(value, "co_code")]
        name = f"{thing.__module__}.{thing.__qualname__}"
        held += [thing.__defaults__, thing.__kwdefaults__]
        return [name, _hash(code.co_code), deeper(constants), deeper(list(code.co_names)), deeper(held)]
    if hasattr(thing, "get_params"):
        return {"of": kind, **deeper(thing.get_params(deep=False))}
    if dataclasses.is_dataclass(thing):
        return {"of": kind, **{f.name: deeper(getattr(thing, f.name)) for f in dataclasses.fields(thing)}}
    return {"of": kind, **deeper(getattr(thing, "__dict__", {}))}


def _hash(buffer):
    return hashlib.sha256(buffer).hexdigest()


class Store:
    """A directory of finished windows.

    Parameters
    ----------
    path : path
        New, empty, or of the same job.
    returns : DataFrame (n, d)
    strategies : dict of Strategy
    settings : dict
        All else that the numbers depend on.

    Raises
    ------
    ValueError
        A directory of another job, or of something else.
    """

    def __init__(self, path, returns, strategies, settings):
        self.path = Path(path)
        self.parts = self.path / "parts"
        about = {
            "finediff": version("finediff"),
            "returns": data_hash(returns),
            "assets": [str(name) for name in returns.columns],
            "strategies": [[str(name), describe(strategy)] for name, strategy in strategies.items()],
            "settings": describe(settings),
        }
        self._claim(about)

    def _claim(self, about):
        job = self.path / "job.json"
        text = json.dumps(about, indent=1, sort_keys=True)
        whole = (
            json.dumps({"fingerprint": _hash(text.encode()), "job": about}, indent=1, sort_keys=True) + "\n"
        )
        if job.exists():
            try:
                found = json.loads(job.read_text())["job"]
            except (ValueError, KeyError, TypeError):
                found = {}
            changed = [name for name in about if found.get(name) != about[name]]
            if changed:
                raise ValueError(
                    f"expected a store of this back-test in {self.path}, got one of another (different: "
                    f"{', '.join(changed)}), because its windows would be mixed with these; do name another directory, or "
                    "delete it to start again."
                )
            return
        if self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
            raise ValueError(
                f"expected a new or empty directory, or a store of this back-test, got {self.path}, because it holds "
                "something else (no job.json); do name another directory."
            )
        with whole_file(job) as partial:
            partial.write_text(whole)

    def load(self):
        """Finished windows: {(number of the strategy, number of the window): (weights (d,), seconds)}."""
        done = {}
        # A name of a half-written file begins with a dot.
        for file in sorted(self.parts.glob("[0-9]*.safetensors")):
            part = load_file(file)
            number = int(file.name.partition("-")[0])
            for window, weights, seconds in zip(
                part["windows"], part["weights"], part["seconds"], strict=True
            ):
                done[number, int(window)] = weights, float(seconds)
        return done

    def save(self, number, windows, weights, seconds):
        """Keep the windows of a task.

        Parameters
        ----------
        number : int
            Of the strategy.
        windows : sequence of int
            Their numbers.
        weights : (k, d) array
            Of all assets.
        seconds : sequence of float
            CPU time of each.
        """
        part = {
            "windows": np.asarray(windows, np.int64),
            "weights": np.ascontiguousarray(weights, np.float64),
            "seconds": np.asarray(seconds, np.float64),
        }
        with whole_file(self.parts / f"{number:04d}-{windows[0]:06d}.safetensors") as partial:
            save_file(part, partial)

    def finish(self, returns, weights):
        """Write the tables; they hold numbers alone, so that equal runs end in equal files.

        Parameters
        ----------
        returns : DataFrame (n, k)
            By date.
        weights : DataFrame (k * w, d)
            By strategy and date.
        """
        for name, table in (("returns", returns), ("weights", weights)):
            table = table.set_axis([str(column) for column in table.columns], axis=1)
            with whole_file(self.path / f"{name}.parquet") as partial:
                table.to_parquet(partial)
