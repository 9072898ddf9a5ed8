"""Generators that hold a score model: sampling, steering and what they share.

x = scaler_^-1(z),   z by a sampler of score_model_; a stress {asset: return} is a linear constraint A z = b
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import contextmanager

import numpy as np
import torch

from finediff.diffusion.guide import ClassifierFreeGuidance, LinearStress
from finediff.diffusion.process import VP, Process
from finediff.diffusion.sample import ProbabilityFlow, Sampler
from finediff.diffusion.score import ScoreModel
from finediff.generators.base import ScenarioGenerator

_CHUNK = 8192  # rows sampled at once: bounds memory, and fixed so that it does not change the draws


class ScoreGenerator(ScenarioGenerator):
    """A fitted one has ``score_model_``, ``scaler_`` and, where conditions are known to it, ``condition_``."""

    condition_ = None
    width = 1  # hidden units, which decide on threads

    def _process(self):
        return VP() if self.process is None else self.process

    def _check_path(self) -> None:
        """ValueError unless ``process`` and ``sampler`` are of their kinds."""
        for name, kind, example in (
            ("process", Process, "VP()"),
            ("sampler", Sampler, "DPMSolver(steps=32)"),
        ):
            value = getattr(self, name)
            if value is not None and not isinstance(value, kind):
                raise ValueError(
                    f"expected {name} to be a {kind.__name__} or None, got {value!r}: try {example}"
                )

    def _restore_device(self) -> torch.device:
        """The device asked for, or this machine's where the generator was saved beside another accelerator."""
        try:
            return on_device(self.device)
        except ValueError:
            self.device = None
            return on_device(None)

    def _scaled_covariance(self) -> torch.Tensor:
        """Of the rows z, (d, d): the scaler whitens, so the identity."""
        return torch.eye(self.n_features_in_)

    def _draw(self, model: ScoreModel, n: int, condition, generator: torch.Generator) -> torch.Tensor:
        """n rows z of the model, which may be steered."""
        shape = (n, self.n_features_in_)
        return self._sampler()(model, shape, condition=condition, generator=generator)

    def _sampler(self):
        return ProbabilityFlow(steps=32) if self.sampler is None else self.sampler

    def _draw_stressed(self, model: ScoreModel, A, low, high, condition, generator) -> torch.Tensor:
        """Rows z with low <= A z <= high, (n, k)."""
        steered = LinearStress(model, A, (low, high), covariance=self._scaled_covariance().to(A))
        return self._draw(steered, len(low), condition, generator)

    @property
    def evaluations_(self) -> int:
        """Network evaluations for one draw."""
        return self._sampler().evaluations

    def _sample(self, n: int, seed: int, condition=None, stress=None, guidance=0.0) -> np.ndarray:
        model = self.score_model_
        known = self._known(condition, n)
        if guidance and known is None:
            raise ValueError(
                "expected a condition to guide towards, got guidance without one: give condition=..."
            )
        if guidance:
            model = ClassifierFreeGuidance(model, guidance)
        generator = torch.Generator(device=model.device).manual_seed(seed)
        constraint = self._constraint(stress, n)
        draws = []
        for start in range(0, n, _CHUNK):
            part = slice(start, min(start + _CHUNK, n))
            given = None if known is None else known[part].to(model.device)
            with threads(self.width):
                if constraint is None:
                    z = self._draw(model, part.stop - part.start, given, generator)
                else:
                    A, low, high = (value.to(model.device) for value in constraint)
                    z = self._draw_stressed(model, A, low[part], high[part], given, generator)
            draws.append(self._returns(z.cpu().double().numpy()))
        return draws[0] if len(draws) == 1 else np.concatenate(draws)

    def _returns(self, z: np.ndarray) -> np.ndarray:
        """In the units of the panel; z may be overwritten."""
        return self.scaler_.inverse_transform(z)

    def _known(self, condition, n: int) -> torch.Tensor | None:
        if condition is None:
            return None
        if self.condition_ is None:
            raise ValueError(
                "expected no condition, got one: the generator was fitted without; fit(X, condition=...)"
            )
        return torch.as_tensor(self.condition_.transform(condition, n))

    def _constraint(self, stress, n: int):
        """A z = b in scaled coordinates as (A (k, d), low (n, k), high (n, k)), from {asset: return or band}."""
        if stress is None:
            return None
        if not isinstance(stress, Mapping) or not stress:
            raise ValueError(
                f"expected stress as a mapping of assets to returns, got {stress!r}: {{'SPY': -0.07}}"
            )
        if self._numbered:
            raise ValueError(
                "expected assets named by text to stress one of them, got numbers that are not their positions: "
                "fit(X.rename(columns=str))"
            )
        names = list(getattr(self, "feature_names_in_", range(self.n_features_in_)))
        rows, low, high = [], [], []
        # x = mean + z M, so asset j is the constraint z M[:, j] = x_j - mean_j, in its own units of scale.
        origin = self.scaler_.inverse_transform(np.zeros((1, self.n_features_in_)))[0]
        M = self.scaler_.inverse_transform(np.eye(self.n_features_in_)) - origin
        for asset, value in stress.items():
            if asset not in names:
                raise ValueError(
                    f"expected an asset of the panel, got {asset!r}: it has {', '.join(map(str, names[:8]))}..."
                )
            j = names.index(asset)
            size = np.linalg.norm(M[:, j])
            if size == 0:
                raise ValueError(f"expected an asset that moves, got a stress of {asset!r}, which never did")
            ends = value if isinstance(value, tuple) and len(value) == 2 else (value, value)
            for end, side in zip(ends, (low, high)):
                end = np.asarray(end, dtype=np.float64)
                if end.shape not in ((), (n,)) or np.isnan(end).any():
                    raise ValueError(
                        f"expected one return, a pair or {n} returns for {asset!r}, got {value!r}"
                    )
                if (end[np.isfinite(end)] <= -1).any():
                    raise ValueError(
                        f"expected returns above -1 (fractions) for {asset!r}, got {value!r}: -7 per cent is -0.07"
                    )
                side.append((np.broadcast_to(end, n) - origin[j]) / size)
            if (low[-1] > high[-1]).any():
                raise ValueError(f"expected a band (low, high) for {asset!r}, got {value!r}: turn it round")
            rows.append(M[:, j] / size)
        as_tensor = lambda value: torch.as_tensor(np.array(value), dtype=torch.float32)  # noqa: E731
        return as_tensor(rows), as_tensor(low).T.contiguous(), as_tensor(high).T.contiguous()


def part(arrays: dict[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    """Saved arrays whose names start so, without it."""
    return {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}


@contextmanager
def threads(width: int):
    """One thread for small networks on a CPU, then as many as before.

    Their products are too small to share: a second thread doubles the CPU time on an idle machine, and on a busy
    one the threads wait for each other (500 steps of the default network: 3.3 s with one, 314 s with two).
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1 if width <= 256 else before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def on_device(device) -> torch.device:
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"expected a device torch can use here, got {device!r} ({str(error).splitlines()[0]}): "
            "try device='cpu'"
        ) from None


def devices() -> dict[str, str]:
    """What training would run on, in words."""
    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "none (the CPU is used)"
    return {
        "GPU": gpu,
        "threads": f"{torch.get_num_threads()} for large networks, 1 for those up to 256 units wide",
    }
