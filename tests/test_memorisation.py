import tracemalloc

import numpy as np
import pandas as pd
import pytest

from finediff.memorisation import distance_ratio, memorised_fraction, nearest_neighbour_ratio


@pytest.fixture
def rng():
    return np.random.default_rng(5)


def naive_ratio(samples, train):
    """The definition, row by row."""
    scale = train.std(axis=0)
    out = []
    for x in samples:
        d = np.sort([np.sqrt((((x - y) / scale) ** 2).sum()) for y in train])
        out.append(d[0] / d[1] if d[1] > 0 else 0.0)
    return np.array(out)


@pytest.mark.parametrize("d", [1, 3, 40])
def test_matches_the_definition(rng, d):
    train, samples = rng.standard_t(4, (80, d)) * 0.01 + 0.3, rng.standard_t(4, (50, d)) * 0.01 + 0.3
    np.testing.assert_allclose(
        nearest_neighbour_ratio(samples, train), naive_ratio(samples, train), rtol=1e-9
    )


def test_copies_are_memorised_entirely(rng):
    # A large offset is where |x|^2 - 2xy + |y|^2 would lose the zero.
    train = 1e3 + rng.standard_normal((300, 10)) * 1e-2
    copies = train[rng.integers(0, 300, 500)]
    assert memorised_fraction(copies, train) == 1.0
    assert np.all(nearest_neighbour_ratio(copies, train) == 0.0)
    assert distance_ratio(copies, 1e3 + rng.standard_normal((200, 10)) * 1e-2, train) == 0.0


def test_fresh_draws_of_the_same_law_are_not_memorised(rng):
    train, held_out, fresh = (rng.standard_normal((1500, 20)) for _ in range(3))
    assert memorised_fraction(fresh, train) == 0.0
    # The median of 1500 distances, each with a relative sd of about .12, is known to .4 %.
    assert distance_ratio(fresh, held_out, train) == pytest.approx(1.0, abs=0.03)


def test_the_fraction_is_that_of_the_copies(rng):
    train, fresh = rng.standard_normal((400, 15)), rng.standard_normal((60, 15))
    samples = np.vstack([train[:40] + 1e-3, fresh])
    assert memorised_fraction(samples, train) == pytest.approx(0.4)


@pytest.mark.parametrize("d", [1, 2, 3])
def test_fresh_rows_follow_the_power_law(rng, d):
    # Poisson points: the inner ball holds one of the two nearest with probability ratio^d.
    train, fresh = rng.uniform(size=(20_000, d)), rng.uniform(0.1, 0.9, size=(3000, d))
    p = 3.0**-d
    assert memorised_fraction(fresh, train) == pytest.approx(p, abs=4 * np.sqrt(p * (1 - p) / 3000))


def test_duplicates_in_train(rng):
    train = rng.standard_normal((50, 4))
    doubled = np.vstack([train, train])
    assert np.all(nearest_neighbour_ratio(train, doubled) == 0.0)
    # A fresh row between duplicates sees two equal distances.
    fresh = rng.standard_normal((30, 4))
    np.testing.assert_allclose(nearest_neighbour_ratio(fresh, doubled), 1.0)


def test_a_constant_asset_does_not_divide_by_zero(rng):
    train, samples = rng.standard_normal((60, 3)), rng.standard_normal((20, 3))
    padded = [np.column_stack([a, np.zeros(len(a))]) for a in (samples, train)]
    np.testing.assert_allclose(nearest_neighbour_ratio(*padded), nearest_neighbour_ratio(samples, train))


def test_permuting_and_rescaling_assets_changes_nothing(rng):
    train, held_out, samples = (rng.standard_t(3, (150, 6)) for _ in range(3))
    order, scale = rng.permutation(6), np.exp(rng.standard_normal(6) * 3)
    moved = [(a * scale + 7.0)[:, order] for a in (samples, held_out, train)]
    base = nearest_neighbour_ratio(samples, train)
    np.testing.assert_allclose(nearest_neighbour_ratio(moved[0], moved[2]), base, rtol=1e-8)
    assert distance_ratio(*moved) == pytest.approx(distance_ratio(samples, held_out, train), rel=1e-8)
    assert not np.allclose(nearest_neighbour_ratio(samples * scale, train * scale, standardize=False), base)


def test_memory_stays_bounded(rng):
    train, samples = rng.standard_normal((4000, 5)), rng.standard_normal((8000, 5))
    tracemalloc.start()
    nearest_neighbour_ratio(samples, train)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 0.6 * 8 * len(train) * len(samples)


def test_frames_are_welcome(rng):
    train, samples = rng.standard_normal((40, 2)), rng.standard_normal((10, 2))
    frames = [pd.DataFrame(a, columns=["A", "B"]) for a in (samples, train)]
    np.testing.assert_array_equal(nearest_neighbour_ratio(*frames), nearest_neighbour_ratio(samples, train))


def test_refusals(rng):
    train = rng.standard_normal((40, 2))
    with pytest.raises(ValueError, match="2 assets of train, got 3"):
        nearest_neighbour_ratio(np.zeros((4, 3)), train)
    with pytest.raises(ValueError, match="at least 2 rows in train, got 1"):
        nearest_neighbour_ratio(train, train[:1])
    with pytest.raises(ValueError, match=r"column 'B'"):
        nearest_neighbour_ratio(pd.DataFrame({"A": [0.0], "B": [np.nan]}), train)
    with pytest.raises(ValueError, match=r"shape \(40,\)"):
        nearest_neighbour_ratio(train[:, 0], train)
    with pytest.raises(ValueError, match="never saw"):
        distance_ratio(train, train, train)
    with pytest.raises(ValueError, match=r"ratio in \(0, 1\]"):
        memorised_fraction(train, train, 0.0)
