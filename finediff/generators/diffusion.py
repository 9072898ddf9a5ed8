"""Generators that learn a score network: DDPM and flow matching.

z = scaler_(x): per-asset standardised, then whitened symmetrically by the Ledoit-Wolf correlation
score_model_: E[z_0 | z_t] by a network added to the standard normal model, so that the untrained
generator is the Gaussian with the panel's shrunk covariance, and what is learned is the rest.
"""

from __future__ import annotations

import json
import numbers

import numpy as np
import torch

from finediff.diffusion.objective import DenoisingScoreMatching, FlowMatching
from finediff.diffusion.process import VP, Linear
from finediff.diffusion.score import NetworkScore
from finediff.diffusion.train import train
from finediff.generators.condition import ConditionEncoder
from finediff.generators.score import ScoreGenerator, on_device, part, threads
from finediff.generators.training import Checkpoint, progress_bar
from finediff.networks.mlp import MLP
from finediff.panel import Standardizer

LEAST_HELD_OUT = 20  # rows below which a held-out loss says nothing


class DiffusionGenerator(ScoreGenerator):
    """What `DDPMGenerator` and `FlowMatchingGenerator` share."""

    _steered_by = ("condition", "stress", "guidance")

    def __init__(
        self,
        *,
        process=None,
        sampler=None,
        width=128,
        depth=2,
        steps=2500,
        batch_size=128,
        learning_rate=2e-3,
        weight_decay=1e-2,
        held_out=0.1,
        patience=10,
        checkpoint=None,
        device=None,
        progress=None,
        random_state=None,
    ):
        self.process = process
        self.sampler = sampler
        self.width = width
        self.depth = depth
        self.steps = steps
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.held_out = held_out
        self.patience = patience
        self.checkpoint = checkpoint
        self.device = device
        self.progress = progress
        self.random_state = random_state

    def _fit(self, X: np.ndarray, seed: int, condition=None) -> None:
        self._check_arguments()
        self.condition_ = None if condition is None else ConditionEncoder().fit(condition, len(X))
        self.scaler_ = Standardizer(whiten=True).fit(X)
        z = self.scaler_.transform(X)
        # A constant asset stays constant, whatever the network says of it.
        self.scaler_.unwhitening_[:, np.abs(z).max(0) < 1e-9] = 0.0
        z = torch.as_tensor(z, dtype=torch.float32)
        on_cpu = torch.Generator().manual_seed(seed)
        self.score_model_ = self._build(X.shape[1], on_cpu)
        device = self.score_model_.device
        order = torch.randperm(len(z), generator=on_cpu)
        n_held_out = round(self.held_out * len(z))
        n_held_out = n_held_out if n_held_out >= LEAST_HELD_OUT else 0
        held_out, rows = z[order[:n_held_out]].to(device), z[order[n_held_out:]].to(device)
        known = [None, None]
        if self.condition_ is not None:
            encoded = torch.as_tensor(self.condition_.transform(condition, len(X)))
            known = [encoded[order[:n_held_out]].to(device), encoded[order[n_held_out:]].to(device)]
        # Another seed than the first weights have, or the first noise would be equal to them.
        again = int(torch.randint(2**62, (), generator=on_cpu))
        generator = torch.Generator(device=device).manual_seed(again)
        with threads(self.width):
            self.history_ = train(
                self.score_model_,
                rows,
                self._objective(),
                steps=self.steps,
                batch=self.batch_size,
                learning_rate=self.learning_rate,
                weight_decay=self.weight_decay,
                condition=known[1],
                held_out=held_out if n_held_out else None,
                held_out_condition=known[0],
                patience=self.patience,
                checkpoint=None if self.checkpoint is None else Checkpoint(self.checkpoint),
                progress=progress_bar(type(self).__name__, self.progress),
                generator=generator,
            )
        self.score_model_.requires_grad_(False).eval()

    def _check_arguments(self) -> None:
        if not 0 <= self.held_out < 1:
            raise ValueError(
                f"expected held_out to be a share in [0, 1), got {self.held_out!r}: .1 is the default"
            )
        for name, least in (("width", 1), ("depth", 0), ("steps", 1), ("batch_size", 1)):
            value = getattr(self, name)
            if not isinstance(value, numbers.Integral) or value < least:
                raise ValueError(f"expected {name} to be a whole number, at least {least}, got {value!r}")
        self._check_path()

    def _build(self, n_features: int, generator: torch.Generator) -> NetworkScore:
        n_conditions = 0 if self.condition_ is None else self.condition_.size
        network = MLP(n_features, self.width, self.depth, n_conditions=n_conditions, generator=generator)
        model = NetworkScore(network, self._process()).to(on_device(self.device))
        model.score_valid = self._objective().score_valid
        return model

    def _arrays(self) -> dict[str, np.ndarray]:
        network = {f"network/{k}": v.cpu().numpy() for k, v in self.score_model_.state_dict().items()}
        arrays = network | {f"scaler/{k}": v for k, v in self.scaler_.to_dict().items()}
        if self.condition_ is not None:
            arrays["condition"] = np.frombuffer(json.dumps(self.condition_.columns_).encode(), dtype=np.uint8)
        return arrays

    def _restore(self, arrays: dict[str, np.ndarray]) -> None:
        self.scaler_ = Standardizer.from_dict(part(arrays, "scaler/"))
        self.condition_ = None
        if "condition" in arrays:
            self.condition_ = ConditionEncoder()
            self.condition_.columns_ = json.loads(arrays["condition"].tobytes())
        self._restore_device()
        self.score_model_ = self._build(self.n_features_in_, torch.Generator())
        self.score_model_.load_state_dict({k: torch.tensor(v) for k, v in part(arrays, "network/").items()})
        self.score_model_.requires_grad_(False).eval()


class DDPMGenerator(DiffusionGenerator):
    """Denoising diffusion (Ho, Jain & Abbeel 2020, arXiv 2006.11239; Song et al. 2021, arXiv 2011.13456).

    Denoising score matching with the noise loss (L_simple), times uniform in log-SNR (the law of the
    likelihood), antithetic noise; sampled by the probability-flow ODE.

    Parameters
    ----------
    process : Process, optional
        Noise path; `VP()` by default.
    sampler : Sampler, optional
        `ProbabilityFlow(steps=32)` (Heun, 65 network evaluations) by default: a network stopped early loses a
        fifth to a third of the variance under ancestral sampling (`DDPM`), and keeps it under the ODE.
    width, depth : int
        Hidden units and residual blocks of the network.
    steps, batch_size, learning_rate, weight_decay :
        Training budget and optimiser; see `finediff.diffusion.train.train`.
    held_out : float
        Share of rows, at random, for early stopping; unused where it is fewer than 20 rows.
    patience : int or None
        Evaluations (one each 100 steps) without improvement before training stops.
    checkpoint : path, optional
        File from which an interrupted fit goes on, to the same weights.
    device : str, optional
        "cpu", "cuda", ...; the GPU where there is one by default.
    progress : bool, optional
        Progress bar with time left; by default only on a terminal.
    random_state : None, int or RandomState

    Attributes
    ----------
    score_model_ : ScoreModel
        In scaled coordinates: ``.process``, ``.denoise(z, t)``.
    scaler_ : Standardizer
        z = scaler_.transform(x), exactly invertible.
    condition_ : ConditionEncoder or None
    history_ : History
        Losses; not saved.

    Examples
    --------
    >>> import numpy as np
    >>> returns = np.random.default_rng(0).standard_t(5, size=(200, 3)) / 100
    >>> DDPMGenerator(steps=20, random_state=0).fit(returns).sample(5, random_state=1).shape
    (5, 3)
    """

    def _process(self):
        return VP() if self.process is None else self.process

    def _objective(self):
        return DenoisingScoreMatching("eps", antithetic=True)


class FlowMatchingGenerator(DiffusionGenerator):
    """Flow matching (Lipman et al. 2023, arXiv 2210.02747): regression on the velocity of the linear path.

    Parameters and attributes as in `DDPMGenerator`; the path is `Linear()`, times are uniform in t.
    """

    def _process(self):
        return Linear() if self.process is None else self.process

    def _objective(self):
        return FlowMatching(antithetic=True)
