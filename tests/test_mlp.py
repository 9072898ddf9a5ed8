"""The network: null at the start, linear in the tails, deaf to other rows and to global seeds."""

import math

import pytest
import torch
from torch.nn.functional import layer_norm, silu

from finediff.networks.mlp import MLP, linear


def network(d=5, width=24, depth=2, *, seed=0, shake=0.0, **settings):
    """An MLP in double precision; ``shake`` moves every weight, as training does."""
    generator = torch.Generator().manual_seed(seed)
    model = MLP(d, width, depth, generator=generator, **settings).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(shake * torch.randn(parameter.shape, dtype=torch.float64, generator=generator))
    return model


def inputs(n=40, d=5, seed=1):
    """(x, level, condition) with two conditions a row."""
    generator = torch.Generator().manual_seed(seed)
    x, condition = (torch.randn(n, k, dtype=torch.float64, generator=generator) for k in (d, 2))
    return x, torch.rand(n, dtype=torch.float64, generator=generator) * 3 - 1.5, condition


# ------------------------------------------------------------------ what it computes


@pytest.mark.parametrize("n_conditions", [0, 2])
def test_untrained_network_returns_exactly_nothing(n_conditions):
    x, level, condition = inputs()
    model = network(n_conditions=n_conditions)
    for size in (0.0, 1e-3, 1.0, 1e6):
        assert (model(size * x, level) == 0).all()
        if n_conditions:
            assert (model(size * x, level, condition) == 0).all()


def test_forward_is_the_printed_formula():
    """The equations of the module's docstring, one row at a time, scalars in plain arithmetic."""
    x, level, condition = inputs(6)
    x[3] *= 500  # beyond r = e^4
    model = network(shake=0.2, n_conditions=2, n_waves=3)
    found = model(x, level, condition)
    for i in range(6):
        r = math.sqrt(sum(float(v) ** 2 for v in x[i]) / 5 + 0.05)
        size = min(math.log(r), 4.0)
        features = [float(level[i]), size]
        for phase in (float(level[i]), size / 2):
            octaves = [phase * math.pi / 4 * 2**k for k in range(3)]
            features += [math.cos(angle) for angle in octaves] + [math.sin(angle) for angle in octaves]
        read = model.read_state(torch.tensor(features, dtype=torch.float64))
        e = silu(model.mix_state(silu(read)) + model.read_condition(condition[i]))
        y = x[i] / r
        h = model.read_x(y)
        for modulate, block in zip(model.modulate, model.blocks):
            a, b = modulate(e)[:24], modulate(e)[24:]
            h = h + block(silu(layer_norm(h, (24,)) * (1 + a) + b))
        expected = r * (model.write(silu(layer_norm(h, (24,)))) + model.gain(e) * y)
        # The frequencies are held in single precision: pi/4 to seven digits.
        torch.testing.assert_close(found[i], expected, rtol=1e-6, atol=1e-7)


def test_tails_are_linear():
    """out(c x)/c: of degree one exactly once r > e^4, bounded by a constant everywhere, and not zero."""
    x, level, _ = inputs()
    model = network(shake=0.2)
    ratios = {c: model(c * x, level) / c for c in (1.0, 1e3, 1e4, 1e6, 1e9, 1e12)}
    limit = ratios[1e12]
    for c in (1e3, 1e4, 1e6, 1e9):
        # What is left is the .05 under the root: relative size .05/(c |x|)^2.
        assert ((ratios[c] - limit).abs() / limit.norm(dim=1, keepdim=True)).max() < 1 / c**2 + 1e-9
    assert (limit.norm(dim=1) > 1e-3 * x.norm(dim=1)).all()
    for c, ratio in ratios.items():
        assert ratio.norm(dim=1).max() < 20 * limit.norm(dim=1).max(), c
    # The tail looks in every direction: opposite days are not forced to opposite answers.
    assert (model(-1e6 * x, level) / 1e6 + ratios[1e6]).abs().max() > 1e-3


def test_rows_do_not_hear_each_other():
    x, level, condition = inputs()
    model = network(shake=0.2, n_conditions=2)
    together = model(x, level, condition)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        model(x[order], level[order], condition[order]), together[order], rtol=1e-12, atol=1e-13
    )
    torch.testing.assert_close(model(x[:1], level[:1], condition[:1]), together[:1], rtol=1e-12, atol=1e-13)


# ------------------------------------------------------------------ conditions


def test_rows_of_nan_are_rows_without_a_condition():
    x, level, condition = inputs()
    model = network(shake=0.2, n_conditions=2)
    none, all_given = model(x, level), model(x, level, condition)
    assert torch.equal(model(x, level, torch.full_like(condition, math.nan)), none)
    some = condition.clone()
    some[::3] = math.nan
    some[1, 0] = math.nan  # one entry missing is a condition missing
    missing = some.isnan().any(1)
    found = model(x, level, some)
    torch.testing.assert_close(found[missing], none[missing], rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(found[~missing], all_given[~missing], rtol=1e-12, atol=1e-13)
    assert (all_given - none).abs().min(1).values.max() > 1e-3


def test_missing_conditions_leave_no_nan_in_the_gradients():
    """0 times NaN is NaN: a mask after the layer would poison every weight of the batch."""
    x, level, condition = inputs()
    condition[::2] = math.nan
    model = network(shake=0.2, n_conditions=2)
    model(x, level, condition).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.isfinite().all(), name
    for part in (model.no_condition, model.read_condition.weight):
        assert part.grad.abs().max() > 0


def test_conditions_without_a_place_for_them_are_refused():
    x, level, condition = inputs()
    with pytest.raises(ValueError, match="n_conditions=2"):
        network()(x, level, condition)


# ------------------------------------------------------------------ weights


@pytest.mark.parametrize("n_conditions", [0, 2])
def test_gradients_reach_every_weight_after_one_step(n_conditions):
    x, level, condition = inputs()
    condition[::2] = math.nan
    given = condition if n_conditions else None
    model = network(n_conditions=n_conditions)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    target = torch.sin(3 * x)

    def gradients():
        optimizer.zero_grad()
        (model(x, level, given) - target).square().mean().backward()
        return {name: parameter.grad.abs() for name, parameter in model.named_parameters()}

    at_zero = gradients()
    assert {name for name, size in at_zero.items() if size.max() > 0} == {
        "write.weight",
        "write.bias",
        "gain.weight",
        "gain.bias",
    }
    optimizer.step()
    for name, size in gradients().items():
        assert size.max() > 0, name
        if size.ndim == 2 and not name.startswith("read"):
            assert (size.sum(1) > 0).all(), f"{name}: a unit that learns nothing"


def test_seed_decides_the_weights_and_no_global_state_is_touched():
    """The global random states are watched by a fixture around every test."""
    a, b, c = (network(seed=seed, n_conditions=2).state_dict() for seed in (3, 3, 4))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(a["read_x.weight"], c["read_x.weight"])


def test_layers_start_with_the_variance_they_name(generator):
    layer = linear(300, 200, torch.Generator().manual_seed(0), gain=0.5)
    weights = layer.weight.detach()
    n = weights.numel()
    assert abs(float(weights.mean())) < 4 * 0.5 / math.sqrt(300 * n)
    assert abs(float(weights.var()) * 300 / 0.25 - 1) < 4 * math.sqrt(2 / n)
    assert (layer.bias == 0).all()
