"""When does a network begin to copy its training rows, and how does that grow with their number?

    python benchmarks/memorisation.py [--json]

A deliberately large network without weight decay is trained past its best on n days of five shares; memorisation
begins when 5 % of its draws lie on a training row (nearest / second-nearest distance below 1/3). Bonnaire et al. 2025
(arXiv 2505.17638) find the step of onset to grow linearly in n, and the step of the least held-out loss hardly.
"""

from __future__ import annotations

import json
import math
import sys
import time

import torch

from finediff.diffusion.memory import MemorisationMonitor
from finediff.diffusion.objective import DenoisingScoreMatching
from finediff.diffusion.process import VP
from finediff.diffusion.score import NetworkScore
from finediff.diffusion.train import train
from finediff.networks.mlp import MLP
from finediff.panel import Standardizer, load_prices, random_split, to_returns

# So many steps that the learning rate, lowered by a cosine over all of them, is constant where it matters.
ASSETS, SIZES, STEPS = 5, (250, 500, 1000, 2000), 1_000_000


def main() -> None:
    torch.set_num_threads(1)
    returns = to_returns(load_prices(start="2000-01-01")).iloc[:, :ASSETS]
    pool, test = random_split(returns, 0.4, random_state=0)
    found = []
    for n in SIZES:
        rows = pool.sample(n, random_state=0).to_numpy()
        scaler = Standardizer(whiten=True).fit(rows)
        z, held_out = (
            torch.as_tensor(scaler.transform(x), dtype=torch.float32) for x in (rows, test.to_numpy())
        )
        generator = torch.Generator().manual_seed(0)
        model = NetworkScore(MLP(ASSETS, 256, 3, generator=generator), VP())
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
            callbacks=[monitor],
            generator=generator,
            progress=False,
        )
        row = {
            "n": n,
            "tau_gen": monitor.tau_gen,
            "tau_mem": monitor.tau_mem,
            "dial at onset": monitor.dial[-1],
        }
        found.append(row | {"cpu s": time.process_time() - began})
        print(
            f"n {n:5}   least held-out loss at step {row['tau_gen']:6}   onset of copying at step {row['tau_mem'] or '-':>6}"
            f"   dial {row['dial at onset']:.2f}   {found[-1]['cpu s']:.0f} s",
            flush=True,
        )
    known = [(math.log(row["n"]), math.log(row["tau_mem"])) for row in found if row["tau_mem"]]
    if len(known) > 1:
        mean_n, mean_t = (sum(values) / len(known) for values in zip(*known))
        slope = sum((a - mean_n) * (b - mean_t) for a, b in known) / sum((a - mean_n) ** 2 for a, _ in known)
        print(f"onset grows as n^{slope:.2f}")
    if "--json" in sys.argv:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
