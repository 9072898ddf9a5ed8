"""How much does a draw lose when the network is asked 16 times instead of 1,000?

    python benchmarks/few_steps.py [--json]

Three default fits on the bundled panel (2,500 of the last 5,000 days at random, the rest held out), two sets of 4,000
draws each; the energy distance to the held-out days times 1,000, and the median asset's share of their volatility.
"""

from __future__ import annotations

import json
import sys

import numpy as np
import torch

from finediff.diffusion.sample import DDIM, DDPM, DPMSolver, ProbabilityFlow
from finediff.generators import DDPMGenerator
from finediff.panel import load_prices, random_split, to_returns
from finediff.validation import energy_distance

SAMPLERS = {
    "DPM-Solver++ 2M": DPMSolver(15),
    "DDIM": DDIM(15),
    "Heun": ProbabilityFlow(32),
    "DDPM": DDPM(1000),
}


def main() -> None:
    torch.set_num_threads(1)
    returns = to_returns(load_prices()).iloc[-5000:]
    found = {name: [] for name in SAMPLERS}
    floor = []
    for seed in range(3):
        rows, held_out = random_split(returns, 0.5, random_state=seed)
        test = held_out.to_numpy()
        floor.append(1e3 * energy_distance(test, rows.to_numpy()))
        generator = DDPMGenerator(random_state=seed, progress=False).fit(rows)
        for name, sampler in SAMPLERS.items():
            for draw in range(2):
                stream = torch.Generator().manual_seed(draw)
                z = sampler(generator.score_model_, (4000, test.shape[1]), generator=stream)
                x = generator.scaler_.inverse_transform(z.double().numpy())
                sd = float(np.median(x.std(0) / test.std(0)))
                found[name].append((1e3 * energy_distance(test, x), sd))
    table = {}
    for name, values in found.items():
        distance, sd = np.mean(values, axis=0)
        error = np.std([v[0] for v in values], ddof=1) / np.sqrt(len(values))
        table[name] = {"evaluations": SAMPLERS[name].evaluations, "ED": distance, "s.e.": error, "sd": sd}
        print(
            f"{name:16} {SAMPLERS[name].evaluations:5} evaluations   ED {distance:.3f} ({error:.3f})   sd {sd:.3f}"
        )
    ratio = table["DPM-Solver++ 2M"]["ED"] / table["DDPM"]["ED"]
    print(
        f"training rows themselves: ED {np.mean(floor):.3f}\nDPM-Solver++ at 16 evaluations over DDPM at 1,001: {ratio:.2f}"
    )
    if "--json" in sys.argv:
        print(json.dumps(table | {"ratio": ratio, "floor": float(np.mean(floor))}))


if __name__ == "__main__":
    main()
