"""Does streaming scenarios of 5,000 assets to disk keep up with writing random numbers, in memory that stays?

    python benchmarks/streaming.py [--json] [--assets 5000] [--scenarios 100000] [--folder DIR]

Speed: `sample_to` of a factor model, with and without tail statistics in the same pass, against the same files
filled with standard normal numbers; alternating, the median of three. Memory: the peak of a process that streams a
fifth of the scenarios, and of one that streams them all. The folder needs room for one dataset (4 GB); all is removed.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np

from finediff.generators import ScenarioGenerator
from finediff.panel import PanelWarning
from finediff.risk import StreamingTails

FACTORS = 20


class StandIn(ScenarioGenerator):
    """x = f B + sigma e with Gaussian f and e: the least a factor model does."""

    def __init__(self, *, random_state=None):
        self.random_state = random_state

    def _fit(self, X, seed):
        rng = np.random.default_rng(seed)
        self.loadings, self.sd = rng.standard_normal((FACTORS, X.shape[1])) / 200, X.std(0)

    def _sample(self, n, seed):
        rng = np.random.default_rng(seed)
        rows = rng.standard_normal((n, len(self.sd)))
        rows *= self.sd
        rows += rng.standard_normal((n, FACTORS)) @ self.loadings
        return rows

    def _arrays(self):
        return {"loadings": self.loadings, "sd": self.sd}

    def _restore(self, arrays):
        self.loadings, self.sd = arrays["loadings"], arrays["sd"]


class RandomNumbers(StandIn):
    """What it is measured against: standard normal numbers, nothing else."""

    def _sample(self, n, seed):
        return np.random.default_rng(seed).standard_normal((n, len(self.sd)))


def factor_model(X) -> ScenarioGenerator:
    try:
        from finediff.generators import FactorDiffusionGenerator
    except ImportError:
        return StandIn(random_state=0).fit(X)
    return FactorDiffusionGenerator(n_factors=FACTORS, random_state=0).fit(X)


def panel(d: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    common = rng.standard_normal((1260, FACTORS)) @ rng.standard_normal((FACTORS, d)) / 200
    return common + 0.01 * rng.standard_normal((1260, d))


def seconds(generator, n: int, folder: str, **more) -> np.ndarray:
    """Wall and CPU seconds."""
    with tempfile.TemporaryDirectory(dir=folder) as place:
        began = np.array([time.perf_counter(), time.process_time()])
        generator.sample_to(Path(place) / "scenarios", n, random_state=1, **more)
        return np.array([time.perf_counter(), time.process_time()]) - began


def peak(n: int, arguments) -> float:
    """Peak resident GB of a process that streams n scenarios of the stand-in, statistics included."""
    command = [sys.executable, __file__, "--assets", str(arguments.assets), "--folder", arguments.folder]
    done = subprocess.run([*command, "--peak", str(n)], capture_output=True, text=True, check=True)
    return float(done.stdout) / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--assets", type=int, default=5000)
    parser.add_argument("--scenarios", type=int, default=100_000)
    parser.add_argument("--folder", default=tempfile.gettempdir())
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--peak", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    n, d, folder = arguments.scenarios, arguments.assets, arguments.folder
    if arguments.peak:
        warnings.simplefilter("ignore", PanelWarning)
        small = 0.01 * np.random.default_rng(0).standard_normal((200, d))
        seconds(StandIn(random_state=0).fit(small), arguments.peak, folder, statistics=[StreamingTails()])
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
        return
    warnings.simplefilter("ignore", PanelWarning)  # fewer dates than assets, as it must be
    X = panel(d)
    model, noise = factor_model(X), RandomNumbers(random_state=0).fit(X)
    runs = {
        "random numbers": lambda: seconds(noise, n, folder),
        "scenarios": lambda: seconds(model, n, folder),
        "scenarios and tails": lambda: seconds(model, n, folder, statistics=[StreamingTails()]),
        "scenarios, float32": lambda: seconds(model, n, folder, dtype="float32"),
    }
    times = {name: [] for name in runs}
    for _ in range(arguments.repeats):
        for name, run in runs.items():
            times[name].append(run())
    median = {name: np.median(values, axis=0).tolist() for name, values in times.items()}
    found = {"generator": type(model).__name__, "assets": d, "scenarios": n, "wall and CPU seconds": median}
    found["speed"] = {name: median["random numbers"][0] / value[0] for name, value in median.items()}
    found["peak GB"] = {m: peak(m, arguments) for m in (n // 5, n)}
    print(f"{type(model).__name__}, {n:,} scenarios of {d:,} assets")
    for name, (wall, cpu) in median.items():
        print(f"{name:22} {wall:6.1f} s ({cpu:.1f} s CPU)   {found['speed'][name]:.2f} times the speed")
    for m, value in found["peak GB"].items():
        print(f"peak memory at {m:9,} scenarios: {value:.2f} GB")
    if arguments.json:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
