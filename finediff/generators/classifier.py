"""Classifiers of noisy rows, which steer a model by `finediff.diffusion.guide.ClassifierGuidance`.

p(y | x_t, t) = softmax(network(x_t / r, log-SNR)),      minimised: -E log p(y | x_t, t), t uniform in log-SNR
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from finediff.diffusion.objective import Times
from finediff.diffusion.process import Process, normal
from finediff.diffusion.score import network_input
from finediff.diffusion.train import train
from finediff.networks.mlp import linear


class NoisyClassifier(nn.Module):
    """A small network: x (batch, d) and t (batch,) -> logits (batch, classes); ``generator`` is on the CPU."""

    def __init__(self, n_features: int, n_classes: int, process: Process, width: int, generator) -> None:
        super().__init__()
        self.process = process
        self.network = nn.Sequential(
            linear(n_features + 1, width, generator),
            nn.SiLU(),
            linear(width, width, generator),
            nn.SiLU(),
            linear(width, n_classes, generator),
        )

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        x, level = network_input(x, t, self.process)
        return self.network(torch.cat([x, level[:, None]], 1))


def train_classifier(
    process: Process,
    x: Tensor,
    labels: Tensor,
    *,
    width: int = 64,
    steps: int = 1500,
    batch: int = 256,
    learning_rate: float = 3e-3,
    generator: torch.Generator | None = None,
) -> NoisyClassifier:
    """Train p(y | x_t, t) by cross-entropy on noisy rows.

    Parameters
    ----------
    process : Process
        The path along which rows are made noisy.
    x, labels : (n, d), (n,)
        Rows of about unit scale, whose dtype and device the classifier has, and integers from 0.
    width : int
        Hidden units of the two layers.
    steps, batch, learning_rate : int, int, float
        As in `finediff.diffusion.train.train`.
    generator : torch.Generator, optional
        On x's device; of the initial weights, the batches, times and noises.

    Returns
    -------
    NoisyClassifier
        Frozen: its parameters ask for no gradient.
    """
    generator = generator or torch.Generator(device=x.device)
    seed = int(torch.randint(2**31, (), generator=generator, device=x.device))
    on_cpu = torch.Generator().manual_seed(seed)
    classifier = NoisyClassifier(x.shape[1], int(labels.max()) + 1, process, width, on_cpu).to(x)
    budget = {"steps": steps, "batch": batch, "learning_rate": learning_rate}
    train(classifier, x, _cross_entropy, condition=labels, generator=generator, **budget)
    return classifier.requires_grad_(False)


def _cross_entropy(classifier: NoisyClassifier, x: Tensor, labels: Tensor, generator) -> Tensor:
    t = Times()(classifier.process, len(x), device=x.device, generator=generator)
    x_t = classifier.process.perturb(x, t, normal(x, generator))
    return nn.functional.cross_entropy(classifier(x_t, t), labels)
