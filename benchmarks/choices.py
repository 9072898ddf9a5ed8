"""Which process, objective and sampler should I use? Measured on the bundled panel, rows held out at random.

    python benchmarks/choices.py [--json]

Every model is the default network with the same budget; CPU seconds are of one thread. "nats" is the held-out
likelihood gained over a Gaussian with the Ledoit-Wolf covariance (I-MMSE), "sd" the median asset's standard deviation
over the held-out rows', "ED" the energy distance to the held-out rows times 1,000 (real rows: see the floor line).
"""

from __future__ import annotations

import json
import sys
import time

import numpy as np
import torch

from finediff.diffusion.exact import GaussianScore
from finediff.diffusion.likelihood import held_out_nats
from finediff.diffusion.objective import DenoisingScoreMatching, FlowMatching, Times
from finediff.diffusion.process import OU, VE, VP, Cosine, Interpolant, Linear, SubVP
from finediff.diffusion.sample import (
    DDIM,
    DDPM,
    AnnealedLangevin,
    DPMSolver,
    EulerMaruyama,
    PredictorCorrector,
    ProbabilityFlow,
)
from finediff.diffusion.score import NetworkScore
from finediff.diffusion.train import train
from finediff.networks.mlp import MLP
from finediff.panel import Standardizer, load_prices, random_split, to_returns
from finediff.validation import energy_distance

SEEDS = (0, 1)


def fit(rows, process, objective, seed, reading="v"):
    generator = torch.Generator().manual_seed(seed)
    model = NetworkScore(MLP(rows.shape[1], generator=generator), process, reading)
    order = torch.randperm(len(rows), generator=generator)
    began = time.process_time()
    cut = len(rows) // 10
    train(model, rows[order[cut:]], objective, held_out=rows[order[:cut]], generator=generator)
    return model.requires_grad_(False), time.process_time() - began


def judge(model, scaler, held_out, sampler, n=4000, seed=1):
    began = time.process_time()
    z = sampler(model, (n, held_out.shape[1]), generator=torch.Generator().manual_seed(seed))
    seconds = time.process_time() - began
    draws = scaler.inverse_transform(z.double().numpy())
    sd = float(np.median(draws.std(0) / held_out.std(0)))
    return sd, 1e3 * energy_distance(held_out, draws), seconds


def main() -> None:
    torch.set_num_threads(1)
    returns = to_returns(load_prices()).iloc[-5000:]
    results: dict[str, list] = {"models": [], "samplers": []}
    plans = [
        ("VP, noise (default of DDPM)", VP(), DenoisingScoreMatching("eps", antithetic=True), "v"),
        ("VP, noise, one sign", VP(), DenoisingScoreMatching("eps"), "v"),
        ("VP, v", VP(), DenoisingScoreMatching("v", antithetic=True), "v"),
        ("VP, min-SNR", VP(), DenoisingScoreMatching("min_snr", antithetic=True), "v"),
        ("VP, noise, uniform t", VP(), DenoisingScoreMatching("eps", Times("uniform"), antithetic=True), "v"),
        ("VP, noise, network reads eps", VP(), DenoisingScoreMatching("eps", antithetic=True), "eps"),
        ("VP, noise, network reads x0", VP(), DenoisingScoreMatching("eps", antithetic=True), "x0"),
        ("OU, noise", OU(), DenoisingScoreMatching("eps", antithetic=True), "v"),
        ("sub-VP, noise", SubVP(), DenoisingScoreMatching("eps", antithetic=True), "v"),
        ("VE, noise", VE(), DenoisingScoreMatching("eps", antithetic=True), "v"),
        ("Cosine, noise", Cosine(), DenoisingScoreMatching("eps", antithetic=True), "v"),
        ("Linear, noise", Linear(), DenoisingScoreMatching("eps", antithetic=True), "v"),
        ("Interpolant, noise", Interpolant(), DenoisingScoreMatching("eps", antithetic=True), "v"),
        ("Linear, velocity (default of flow matching)", Linear(), FlowMatching(antithetic=True), "v"),
        (
            "Linear, velocity, optimal transport",
            Linear(),
            FlowMatching(antithetic=True, pairing="optimal_transport"),
            "v",
        ),
    ]
    kept = None
    floors = []
    for name, process, objective, reading in plans:
        found = []
        for seed in SEEDS:
            rows, test = random_split(returns, 0.5, random_state=seed)
            scaler = Standardizer(whiten=True).fit(rows.to_numpy())
            z = torch.as_tensor(scaler.transform(rows.to_numpy()), dtype=torch.float32)
            model, seconds = fit(z, process, objective, seed, reading)
            held_out = torch.as_tensor(scaler.transform(test.to_numpy()), dtype=torch.float32)
            baseline = GaussianScore(torch.zeros(z.shape[1]), torch.eye(z.shape[1]), process)
            nats = held_out_nats(
                model, held_out, baseline, repeats=1, generator=torch.Generator().manual_seed(9)
            )
            sd, distance, _ = judge(model, scaler, test.to_numpy(), ProbabilityFlow(32))
            found.append((nats.gain, sd, distance, seconds))
            if kept is None or (name == plans[0][0] and len(floors) < len(SEEDS)):
                floors.append(1e3 * energy_distance(test.to_numpy(), rows.to_numpy()))
                kept = kept or (model, scaler, test.to_numpy())
        row = dict(zip(("nats", "sd", "ED", "fit s"), np.mean(found, axis=0).round(3).tolist()), name=name)
        results["models"].append(row)
        print(
            f"{name:45} nats {row['nats']:6.2f}   sd {row['sd']:.3f}   ED {row['ED']:.2f}   fit {row['fit s']:.1f} s"
        )
    print(f"floor: ED of the training rows {np.mean(floors):.2f}\n")
    for sampler in (
        ProbabilityFlow(8),
        ProbabilityFlow(16),
        ProbabilityFlow(32),
        ProbabilityFlow(16, method="rk4"),
        DDIM(64),
        DPMSolver(15),
        DPMSolver(31),
        DPMSolver(31, stochastic=True),
        DDPM(64),
        DDPM(1000),
        EulerMaruyama(1000),
        PredictorCorrector(250),
        AnnealedLangevin(100),
    ):
        sd, distance, seconds = judge(*kept, sampler)
        row = {
            "name": str(sampler),
            "evaluations": sampler.evaluations,
            "sd": sd,
            "ED": distance,
            "sample s": seconds,
        }
        results["samplers"].append(row)
        print(
            f"{row['name']:75} {row['evaluations']:5} evaluations   sd {sd:.3f}   ED {distance:.2f}   {seconds:.1f} s"
        )
    if "--json" in sys.argv:
        print(json.dumps(results))


if __name__ == "__main__":
    main()
