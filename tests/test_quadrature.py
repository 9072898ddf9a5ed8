"""Rules: exactness, orders, the closed form. Draws: each row normal, orthogonal blocks, less variance, same bits."""

import math

import numpy as np
import pytest
import torch
from scipy import integrate, special, stats

from finediff.diffusion.quadrature import (
    antithetic_normal,
    gauss_hermite,
    gauss_hermite_2d,
    gauss_legendre,
    orthogonal_normal,
    simpson,
    sobol_normal,
)

DRAWS = {
    "antithetic": antithetic_normal,
    "orthogonal": orthogonal_normal,
    "orthogonal, antithetic": lambda *a, **k: orthogonal_normal(*a, **k, antithetic=True),
    "Sobol": sobol_normal,
}
every_draw = pytest.mark.parametrize("name", DRAWS)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def moment(degree):
    """E Z^degree, Z ~ N(0, 1)."""
    return 0.0 if degree % 2 else float(special.factorial2(degree - 1)) if degree else 1.0


# ------------------------------------------------------------------------------------------ rules


@pytest.mark.parametrize("nodes", [1, 2, 3, 5, 8, 16])
def test_gauss_hermite_is_exact_to_its_degree_and_no_further(nodes):
    points, weights = gauss_hermite(nodes)
    assert points.dtype == weights.dtype == torch.float64
    for degree in range(2 * nodes):
        size = max(moment(degree), moment(degree + 1), 1.0)
        assert abs(float((weights * points**degree).sum()) - moment(degree)) < 1e-11 * size
    missed = moment(2 * nodes) - float((weights * points ** (2 * nodes)).sum())
    assert missed == pytest.approx(math.factorial(nodes), rel=1e-6)  # E of the monic He_Q, squared


def test_gauss_hermite_is_symmetric_increasing_and_usable_with_many_nodes():
    for nodes in (2, 7, 64, 200):
        points, weights = gauss_hermite(nodes)
        assert (points.diff() > 0).all()
        torch.testing.assert_close(points, -points.flip(0), rtol=0, atol=1e-12)
        assert float(weights.sum()) == pytest.approx(1, abs=1e-14)
        assert float((weights * points.cos()).sum()) == pytest.approx(
            math.exp(-0.5), abs=1e-1 if nodes < 3 else 1e-3
        )


def test_the_error_of_gauss_hermite_is_governed_by_the_scale():
    """The trap: tanh(s Z + .4)^2 at 16 nodes is right to 1e-4 for s = 1 and to no better than 1e-2 for s = 3."""
    error = {}
    for s in (0.3, 1.0, 3.0):
        exact = integrate.quad(
            lambda z, s=s: math.tanh(s * z + 0.4) ** 2 * stats.norm.pdf(z), -12, 12, limit=200
        )[0]
        points, weights = gauss_hermite(16)
        error[s] = abs(float((weights * torch.tanh(s * points + 0.4).square()).sum()) - exact)
    assert error[0.3] < 1e-10
    assert 1e-7 < error[1.0] < 3e-4
    assert 1e-3 < error[3.0] < 0.1


@pytest.mark.parametrize("rho", [-1.0, -0.7, 0.0, 0.3, 0.98, 1.0])
def test_the_correlated_rule_is_exact_to_total_degree(rho):
    points, weights = gauss_hermite_2d(4, rho)
    assert points.shape == (16, 2)
    one, two = points.T
    # E Z1^a Z2^b by Z2 = rho Z1 + sqrt(1 - rho^2) Z.
    for a in range(8):
        for b in range(8 - a):
            exact = sum(
                math.comb(b, k) * rho ** (b - k) * (1 - rho**2) ** (k / 2) * moment(a + b - k) * moment(k)
                for k in range(b + 1)
            )
            assert float((weights * one**a * two**b).sum()) == pytest.approx(exact, abs=1e-6 * 105)


def test_the_correlated_rule_knows_a_closed_form_and_takes_many_correlations():
    """E Phi(Z1) Phi(Z2) = 1/4 + arcsin(rho/2)/(2 pi) (Sheppard)."""
    rho = torch.linspace(-1, 1, 21, dtype=torch.float64).reshape(3, 7)
    points, weights = gauss_hermite_2d(16, rho)
    assert points.shape == (3, 7, 256, 2)
    found = torch.special.ndtr(points).prod(-1) @ weights
    torch.testing.assert_close(found, 0.25 + (rho / 2).arcsin() / (2 * math.pi), rtol=0, atol=1e-6)
    torch.testing.assert_close(points[0, 0, :, 0], gauss_hermite(16)[0].repeat_interleave(16))
    alone = gauss_hermite_2d(16, float(rho[1, 2]))[0]
    torch.testing.assert_close(points[1, 2], alone, rtol=0, atol=0)


def test_gradients_flow_through_the_correlation():
    """d/d rho E f(Z1) f(Z2) = E f'(Z1) f'(Z2) (Price), and finite at the ends."""
    rho = torch.tensor([-1.0, -0.5, 0.2, 0.9, 1.0], dtype=torch.float64, requires_grad=True)
    points, weights = gauss_hermite_2d(24, rho)
    (slope,) = torch.autograd.grad((points.sin().prod(-1) @ weights).sum(), rho)
    exact = math.exp(-1) * torch.cosh(rho.detach())
    torch.testing.assert_close(slope[1:4], exact[1:4], rtol=1e-10, atol=0)
    assert slope.isfinite().all()


@pytest.mark.parametrize("rule", [simpson, gauss_legendre])
def test_time_rules_are_exact_to_their_degree(rule):
    nodes, degree = (3, 3) if rule is simpson else (4, 7)
    times, weights = rule(-1.0, 2.5, nodes)
    for k in range(degree + 1):
        assert float((weights * times**k).sum()) == pytest.approx(
            (2.5 ** (k + 1) - (-1.0) ** (k + 1)) / (k + 1)
        )
    k = degree + 1
    assert abs(float((weights * times**k).sum()) - (2.5 ** (k + 1) - (-1.0) ** (k + 1)) / (k + 1)) > 1e-3


def test_simpson_has_order_four_and_its_ends():
    errors = []
    for nodes in (5, 9, 17, 33):
        times, weights = simpson(0.0, 2.0, nodes)
        assert (float(times[0]), float(times[-1])) == (0.0, 2.0)
        errors.append(abs(float((weights * times.exp()).sum()) - math.expm1(2)))
    assert np.log2(np.divide(errors[:-1], errors[1:])) == pytest.approx(4, abs=0.1)
    times, weights = simpson(0, 2, 9)
    assert float((weights * times.exp()).sum()) == pytest.approx(
        integrate.simpson(np.exp(times.numpy()), x=times.numpy()), rel=1e-14
    )


def test_gauss_legendre_converges_faster_than_any_order():
    errors = []
    for nodes in (2, 4, 6):
        times, weights = gauss_legendre(0.0, 2.0, nodes)
        errors.append(abs(float((weights * times.exp()).sum()) - math.expm1(2)))
    assert errors[0] < 0.03
    assert errors[1] < 1e-6
    assert errors[2] < 1e-11


@pytest.mark.parametrize(
    ("call", "fragment"),
    [
        (lambda: gauss_hermite(0), "expected nodes to be a whole number, at least 1, got 0"),
        (lambda: gauss_hermite(2.5), "got 2.5"),
        (lambda: gauss_hermite(True), "got True"),
        (lambda: gauss_hermite_2d(0), "nodes"),
        (lambda: gauss_hermite_2d(4, 1.2), "expected correlations in"),
        (lambda: gauss_hermite_2d(4, float("nan")), "expected correlations in"),
        (lambda: simpson(0, 1, 4), "expected an odd number of nodes, got 4"),
        (lambda: simpson(0, 1, 1), "at least 3"),
        (lambda: simpson(1, 0, 3), "expected finite ends low < high, got 1 and 0"),
        (lambda: gauss_legendre(0, math.inf, 3), "finite"),
        (lambda: gauss_legendre(0, 1, 0), "at least 1"),
        (lambda: antithetic_normal(0, 2, seeded(0)), "expected n to be"),
        (lambda: orthogonal_normal(3, 0, seeded(0)), "expected d to be"),
        (lambda: sobol_normal(3, 30_000, seeded(0)), "up to 21201"),
    ],
)
def test_bad_arguments_are_one_sentence(call, fragment):
    with pytest.raises(ValueError, match="expected") as caught:
        call()
    assert fragment in str(caught.value)
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------------------------------ draws


@every_draw
@pytest.mark.parametrize(("n", "d"), [(1, 1), (1, 4), (2, 3), (7, 3), (6, 3), (64, 1), (5, 40)])
def test_any_number_of_rows_the_same_seed_and_bits(name, n, d):
    draw = DRAWS[name]
    z = draw(n, d, seeded(0))
    assert z.shape == (n, d)
    assert z.dtype == torch.float64
    assert z.isfinite().all()
    assert torch.equal(z, draw(n, d, seeded(0)))
    assert not torch.equal(z, draw(n, d, seeded(1)))
    stream = seeded(0)
    assert not torch.equal(draw(n, d, stream), draw(n, d, stream))
    assert draw(n, d, seeded(0), dtype=torch.float32).dtype == torch.float32


@every_draw
@pytest.mark.parametrize("row", [0, 1, 6])
def test_every_row_is_standard_normal_over_seeds(name, row):
    """... so the mean of any function over the rows is unbiased: Kolmogorov-Smirnov on two directions, and chi^2."""
    d, seeds = 3, 1500
    rows = torch.stack([DRAWS[name](7, d, seeded(1000 + s))[row] for s in range(seeds)])
    mixed = rows @ torch.tensor([2.0, -1.0, 2.0], dtype=torch.float64) / 3
    for sample, law in (
        (rows[:, 0], stats.norm.cdf),
        (mixed, stats.norm.cdf),
        (rows.square().sum(1), stats.chi2(d).cdf),
    ):
        assert stats.kstest(sample.numpy(), law).pvalue > 1e-4


@every_draw
def test_means_are_unbiased_and_less_noisy(name):
    """E exp(a.z)/e^(|a|^2/2) = 1, over 400 seeds; and E cos(a.z), whose variance plain draws leave at 1/n."""
    d, n, seeds = 4, 16, 400
    a = torch.tensor([0.5, -0.3, 0.2, 0.4], dtype=torch.float64)
    size = float(a.square().sum())
    z = torch.stack([DRAWS[name](n, d, seeded(s)) for s in range(seeds)])
    skewed = ((z @ a).exp() / math.exp(size / 2)).mean(1)
    even = ((z @ a).cos() / math.exp(-size / 2)).mean(1)
    for found in (skewed, even):
        assert abs(float(found.mean()) - 1) < 4.5 * float(found.std()) / math.sqrt(seeds)
    plain = math.expm1(size) / n
    if name != "orthogonal":  # it does nothing for the linear part of a function
        assert float(skewed.var()) < 0.5 * plain
    if name != "antithetic":
        different = n / 2 if "antithetic" in name else n  # a pair is one draw of an even function
        plain = ((1 + math.exp(-2 * size)) / 2 - math.exp(-size)) / math.exp(-size) / different
        assert float(even.var()) < 0.7 * plain


@every_draw
def test_rows_with_both_signs_cancel_odd_functions(name):
    z = DRAWS[name](10, 3, seeded(0))
    if "antithetic" in name:
        assert torch.equal(z[5:], -z[:5])
        assert torch.equal(DRAWS[name](9, 3, seeded(0)), z[:9])
    else:
        assert not torch.equal(z[5:], -z[:5])


@pytest.mark.parametrize("n", [5, 15, 12])
def test_blocks_are_orthogonal(n):
    z = orthogonal_normal(n, 5, seeded(2))
    for block in z.split(5):
        gram = block @ block.T
        assert (gram - torch.diag(gram.diagonal())).abs().max() < 1e-13
    if n > 5:
        assert (z[:5] @ z[5:].T).abs().max() > 1e-3


def test_directions_are_independent_of_lengths_and_uniform():
    z = orthogonal_normal(20_000, 2, seeded(0))
    length, angle = z.norm(dim=1), torch.atan2(z[:, 1], z[:, 0])
    assert stats.kstest(angle.numpy()[::2], stats.uniform(-math.pi, 2 * math.pi).cdf).pvalue > 1e-4
    assert abs(stats.spearmanr(length[::2], angle[::2]).statistic) < 4.5 / math.sqrt(10_000)
    assert abs(stats.spearmanr(length[::2], length[1::2]).statistic) < 4.5 / math.sqrt(10_000)


def test_sobol_beats_the_square_root_of_n():
    """RMS error of E exp(mean z) in five dimensions falls by far more than 4 from 256 to 4096 rows."""
    root = []
    for n in (256, 4096):
        found = [float(sobol_normal(n, 5, seeded(s)).mean(1).exp().mean()) for s in range(40)]
        root.append(math.sqrt(np.mean(np.square(np.subtract(found, math.exp(0.1))))))
    assert root[0] < 0.25 * math.sqrt(math.exp(0.2) * math.expm1(0.2) / 256)
    assert root[0] / root[1] > 8
