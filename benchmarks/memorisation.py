"""When does a network begin to copy its training rows, and how does that grow with their number?

    python benchmarks/memorisation.py [--assets 20] [--json]

A deliberately large network without weight decay is trained past its best on n days of five or more shares;
memorisation begins when 5 % of its draws lie on a training row (nearest / second-nearest distance below 1/3). The dial,
the share of the way from the held-out loss to the training rows' own score, is followed beside it; a run ends at
either. Bonnaire et al. 2025 (arXiv 2505.17638) find the step of onset to grow linearly in n, and the step of the least
held-out loss hardly.
"""

from __future__ import annotations

import itertools
import json
import math
import sys
import time

import numpy as np
import torch

from finediff.diffusion.memory import MemorisationMonitor
from finediff.diffusion.objective import DenoisingScoreMatching
from finediff.diffusion.process import VP
from finediff.diffusion.score import NetworkScore
from finediff.diffusion.train import train
from finediff.networks.mlp import MLP
from finediff.panel import Standardizer, load_prices, random_split, to_returns

# So many steps that the learning rate, lowered by a cosine over all of them, is constant where it matters.
SIZES, STEPS = (250, 500, 1000, 2000), 1_000_000
SHARES = (0.25, 0.5, 0.75)  # of the way to the training rows' own score


def crossing(monitor: MemorisationMonitor, share: float) -> int | None:
    """First step at which the dial was above a share; between two looks, on the line that joins them."""
    looks = list(zip(monitor.step, monitor.dial))
    for (s0, d0), (s1, d1) in itertools.pairwise(looks):
        if d0 < share <= d1:
            return round(s0 + (s1 - s0) * (share - d0) / (d1 - d0))
    return None


def main() -> None:
    torch.set_num_threads(1)
    assets = int(sys.argv[sys.argv.index("--assets") + 1]) if "--assets" in sys.argv else 5
    returns = to_returns(load_prices(start="2000-01-01")).iloc[:, :assets]
    pool, test = random_split(returns, 0.4, random_state=0)
    found = []
    for n in SIZES:
        rows = pool.sample(n, random_state=0).to_numpy()
        scaler = Standardizer(whiten=True).fit(rows)
        z, held_out = (
            torch.as_tensor(scaler.transform(x), dtype=torch.float32) for x in (rows, test.to_numpy())
        )
        generator = torch.Generator().manual_seed(0)
        model = NetworkScore(MLP(assets, 256, 3, generator=generator), VP())
        objective = DenoisingScoreMatching("eps")
        monitor = MemorisationMonitor(z, held_out, objective, stop="onset", n_draws=1000)
        began = time.process_time()
        train(
            model,
            z,
            objective,
            steps=STEPS,
            batch=128,
            learning_rate=1e-3,
            weight_decay=0.0,
            ema_decay=0.99,
            patience=None,
            evaluate_every=n,
            callbacks=[monitor, lambda _, monitor=monitor: monitor.dial[-1] > SHARES[-1]],
            generator=generator,
        )
        row = {
            "n": n,
            "tau_gen": monitor.tau_gen,
            "tau_mem": monitor.tau_mem,
            "dial at onset": monitor.dial[-1],
            **{f"dial {share}": crossing(monitor, share) for share in SHARES},
        }
        found.append(row | {"cpu s": time.process_time() - began})
        print(
            f"n {n:5}   least held-out loss at step {row['tau_gen']:6}   onset of copying at step {row['tau_mem'] or '-':>6}"
            f" (dial {row['dial at onset']:.2f})   dial"
            + "".join(f"   {share:g} at {row[f'dial {share}'] or '-':>6}" for share in SHARES)
            + f"   {found[-1]['cpu s']:.0f} s",
            flush=True,
        )
    for name in ("tau_mem", *(f"dial {share}" for share in SHARES)):
        known = [(math.log(row["n"]), math.log(row[name])) for row in found if row[name]]
        if len(known) > 1:
            print(f"{name:9} grows as n^{np.polyfit(*np.array(known).T, 1)[0]:.2f}")
    if "--json" in sys.argv:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
