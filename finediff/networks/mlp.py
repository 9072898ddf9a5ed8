"""A multilayer perceptron for returns: (x, level, condition) -> R^d; nothing probabilistic in here.

Returns have tails, so the size of x is taken out, told to the network, and put back:

    r = sqrt(mean_j x_j^2 + .05),      y = x/r
    e = silu(MLP(waves(level), waves(min(log r, 4))) + embedding of the condition)
    h_0 = W_x y,      h_{l+1} = h_l + W_l silu(norm(h_l) (1 + a_l(e)) + b_l(e))
    out = r (W_o silu(norm(h_L)) + c(e) o y)                                        (o elementwise)

c(e) is a gain per asset that depends on the noise level and on how violent the day is: what the score of a
heavy-tailed law mostly is. Where r > e^4 = 55, e no longer changes and the output is of degree one in x: linear
tails. The last layers start at zero, so an untrained network returns 0.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import silu


def linear(n_in: int, n_out: int, generator: torch.Generator, gain: float = 1.0) -> nn.Linear:
    """A linear layer with N(0, gain^2/n_in) weights drawn from ``generator``; no global state is touched."""
    layer = torch.nn.utils.skip_init(nn.Linear, n_in, n_out)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(n_out, n_in, generator=generator) * (gain / math.sqrt(n_in)))
        layer.bias.zero_()
    return layer


class MLP(nn.Module):
    """The network described above.

    Parameters
    ----------
    n_features : int
        d, size of x and of the output.
    width, depth : int
        Hidden units and number of residual blocks.
    n_conditions : int
        Size of the condition vector; 0 for none. A missing condition is a learned vector of its own.
    n_waves : int
        Cosines and sines of the level and of log r, in octaves.
    generator : torch.Generator
        CPU generator of the initial weights.
    """

    def __init__(
        self,
        n_features: int,
        width: int = 128,
        depth: int = 2,
        *,
        n_conditions: int = 0,
        n_waves: int = 6,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        self.register_buffer("frequencies", math.pi / 4 * 2.0 ** torch.arange(n_waves), persistent=False)
        self.read_x = linear(n_features, width, generator)
        self.read_state = linear(4 * n_waves + 2, width, generator)
        self.mix_state = linear(width, width, generator)
        self.read_condition = linear(n_conditions, width, generator) if n_conditions else None
        self.no_condition = nn.Parameter(torch.zeros(width)) if n_conditions else None
        self.modulate = nn.ModuleList(linear(width, 2 * width, generator, gain=0.1) for _ in range(depth))
        self.blocks = nn.ModuleList(linear(width, width, generator) for _ in range(depth))
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.write = linear(width, n_features, generator, gain=0.0)
        self.gain = linear(width, n_features, generator, gain=0.0)

    def forward(self, x: Tensor, level: Tensor, condition: Tensor | None = None) -> Tensor:
        """x (batch, d), level (batch,), condition (batch, c) with NaN rows for "none", or None -> (batch, d)."""
        r = (x.square().mean(1, keepdim=True) + 0.05).sqrt()
        y = x / r
        state = torch.cat([level[:, None], r.log().clamp(max=4.0)], 1)
        angles = (state * state.new_tensor([1.0, 0.5]))[:, :, None] * self.frequencies
        waves = torch.cat([angles.cos(), angles.sin()], 2).flatten(1)
        e = self.mix_state(silu(self.read_state(torch.cat([state, waves], 1))))
        if self.read_condition is not None:
            e = e + self._embed(condition, x)
        elif condition is not None:
            raise ValueError(
                "expected no condition, got one, and this network was made without: give MLP n_conditions="
                f"{condition.shape[-1]}"
            )
        e = silu(e)
        h = self.read_x(y)
        for modulate, block in zip(self.modulate, self.blocks):
            a, b = modulate(e).chunk(2, 1)
            h = h + block(silu(self.norm(h) * (1 + a) + b))
        return r * (self.write(silu(self.norm(h))) + self.gain(e) * y)

    def _embed(self, condition: Tensor | None, x: Tensor) -> Tensor:
        if condition is None:
            return self.no_condition.expand(x.shape[0], -1)
        missing = condition.isnan().any(1, keepdim=True)
        given = self.read_condition(torch.where(missing, torch.zeros_like(condition), condition))
        return torch.where(missing, self.no_condition, given)
