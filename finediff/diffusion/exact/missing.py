"""Missing entries of a panel, drawn from their law given the entries beside them."""

from __future__ import annotations

import torch
from torch import Tensor

from finediff.diffusion.exact.factor import FactorScore
from finediff.diffusion.exact.factor_fit import Rows
from finediff.diffusion.process import normal


def complete(model: FactorScore, X: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """X (n, d) with one draw of every missing entry given the row's others, under the model at t = 0.

    The model's laws are `ScaleFactors`. A row that sees fewer assets than there are factors says too little and is left
    out.
    """
    data = Rows(X)
    if data.complete:
        return X
    filled, one, least = X.clone(), X.new_ones(1), max(1, model.loadings.shape[1])
    for q, seen in enumerate(data.patterns.bool()):
        if seen.all() or seen.sum() < least:
            continue
        part = FactorScore(
            model.loadings[seen],
            model.idiosyncratic_variance[seen],
            model.process,
            factors=list(model.laws),
            mean=model.mean[seen],
            scales=model.scales,
            weights=model.weights,
        )
        rows = (data.index == q).nonzero()[:, 0]
        x = X[rows][:, seen]
        day = torch.multinomial(part.posterior(x), 1, generator=generator)[:, 0]
        f, gamma = part.project(x), part.gamma
        for m in day.unique().tolist():
            here, u = day == m, model.scales[m]
            F = model.laws[m].sample_posterior(f[here], one, u * gamma, generator)
            e = normal(X[rows[here]], generator) * (u * model.idiosyncratic_variance).sqrt()
            drawn = model.mean + F @ model.loadings.T + e
            filled[rows[here]] = torch.where(seen, X[rows[here]], drawn)
    return filled[data.sizes >= least]
