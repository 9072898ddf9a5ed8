"""Conditions and stresses at the door: what a generator is told, its scenarios follow."""

import json
import re

import numpy as np
import pandas as pd
import pytest

from finediff.generators import DDPMGenerator, FlowMatchingGenerator, GaussianGenerator
from finediff.generators.condition import ConditionEncoder

CORRELATION = np.array([[1.0, 0.6, 0.3], [0.6, 1.0, 0.5], [0.3, 0.5, 1.0]])


def market(n=3000, seed=0):
    """Three assets whose volatility is 1 % or 3 % by regime, and whose first mean moves with a level."""
    rng = np.random.default_rng(seed)
    regime = rng.choice(["calm", "wild"], n, p=[0.7, 0.3])
    level = rng.standard_normal(n)
    sd = np.where(regime == "wild", 0.03, 0.01)
    rows = rng.standard_normal((n, 3)) @ np.linalg.cholesky(CORRELATION).T * sd[:, None]
    rows[:, 0] += 0.005 * level
    return pd.DataFrame(rows, columns=list("ABC")), pd.DataFrame({"regime": regime, "level": level})


@pytest.fixture(scope="module")
def fitted():
    returns, condition = market()
    return DDPMGenerator(width=64, steps=900, random_state=0, progress=False).fit(
        returns, condition=condition
    )


def test_scenarios_follow_the_regime_and_the_level(fitted):
    """Regimes differ by a factor of three in volatility and a level of two moves the first mean by 1 %."""
    m = 6000
    draws = {
        (regime, level): fitted.sample(m, random_state=1, condition={"regime": regime, "level": level})
        for regime in ("calm", "wild")
        for level in (0.0, 2.0)
    }
    for (regime, level), rows in draws.items():
        sd = 0.01 if regime == "calm" else 0.03
        np.testing.assert_allclose(rows.std(), sd, rtol=0.2)
        assert rows["A"].mean() == pytest.approx(0.005 * level, abs=0.0025)
        assert rows["B"].mean() == pytest.approx(0, abs=0.0025)
        assert rows.corr().loc["A", "B"] == pytest.approx(0.6, abs=0.1)


def test_without_a_condition_the_law_is_the_mixture(fitted):
    returns, _ = market()
    np.testing.assert_allclose(fitted.sample(6000, random_state=1).std(), returns.std(), rtol=0.25)


def test_guidance_exaggerates(fitted):
    """Towards "wild" and away from the mixture: a positive weight makes wild days wilder."""
    told = {"regime": "wild", "level": 0.0}
    plain = fitted.sample(4000, random_state=2, condition=told)
    zero = fitted.sample(4000, random_state=2, condition=told, guidance=0.0)
    more = fitted.sample(4000, random_state=2, condition=told, guidance=0.5)
    pd.testing.assert_frame_equal(plain, zero)
    assert (more.std() > plain.std()).all()


def test_one_condition_a_scenario(fitted):
    condition = pd.DataFrame({"level": np.zeros(4000), "regime": ["calm"] * 2000 + ["wild"] * 2000})
    rows = fitted.sample(4000, random_state=3, condition=condition)
    assert (rows[2000:].std() / rows[:2000].std()).min() > 2


def test_conditions_survive_saving(fitted, tmp_path):
    fitted.save(tmp_path / "model")
    again = DDPMGenerator.load(tmp_path / "model")
    told = {"regime": "calm", "level": 1.0}
    one, two = (g.sample(50, random_state=4, condition=told) for g in (fitted, again))
    pd.testing.assert_frame_equal(one, two, check_exact=True)
    assert sorted(p.name for p in (tmp_path / "model").iterdir()) == ["arrays.safetensors", "generator.json"]


@pytest.mark.parametrize("kind", [DDPMGenerator, FlowMatchingGenerator])
def test_a_stress_holds_and_the_others_follow(kind):
    """An untrained network is the Gaussian of the panel, whose conditional law is known."""
    returns, _ = market()
    generator = kind(steps=1, learning_rate=1e-12, width=8, random_state=0, progress=False).fit(returns)
    m = 20_000
    rows = generator.sample(m, random_state=1, stress={"A": -0.05, "C": 0.01})
    np.testing.assert_allclose(rows["A"], -0.05, atol=1e-6)
    np.testing.assert_allclose(rows["C"], 0.01, atol=1e-6)
    mean, S = returns.mean().to_numpy(), np.cov(returns.T, ddof=0)
    known = [0, 2]
    gain = S[[1]][:, known] @ np.linalg.inv(S[np.ix_(known, known)])
    expected = mean[1] + (gain @ (np.array([-0.05, 0.01]) - mean[known]))[0]
    spread = np.sqrt(S[1, 1] - (gain @ S[known][:, [1]])[0, 0])
    assert rows["B"].mean() == pytest.approx(expected, abs=5 * spread / np.sqrt(m) + 0.01 * abs(expected))
    assert rows["B"].std() == pytest.approx(spread, rel=0.03)


def test_bands_and_one_value_a_scenario():
    returns, _ = market()
    generator = DDPMGenerator(steps=1, width=8, random_state=0, progress=False).fit(returns)
    band = generator.sample(3000, random_state=1, stress={"A": (-0.05, -0.03)})["A"]
    assert -0.05 <= band.min() < -0.045
    assert -0.034 < band.max() <= -0.03
    path = np.linspace(-0.1, 0.1, 3000)
    np.testing.assert_allclose(generator.sample(3000, stress={"B": path})["B"], path, atol=1e-6)
    open_side = generator.sample(3000, random_state=1, stress={"A": (-np.inf, -0.04)})["A"]
    assert open_side.max() <= -0.04 + 1e-6


BAD = [
    ({"condition": {"regime": "flat", "level": 0.0}}, "one of ['calm', 'wild'], got 'flat'"),
    ({"condition": 3.0}, "expected conditions ['regime', 'level'] for 1 or 5 rows"),
    ({"condition": {"regime": "calm", "level": np.inf}}, "expected a finite 'level'"),
    ({"stress": {"Z": -0.1}}, "expected an asset of the panel, got 'Z'"),
    ({"stress": {"A": -7}}, "expected returns above -1 (fractions) for 'A'"),
    ({"guidance": 1.0}, "guidance without one"),
    ({"stress": -0.1}, "expected stress as a mapping"),
    ({"stress": {"A": [0.1, 0.2, 0.3]}}, "expected one return, a pair or 5 returns for 'A'"),
    ({"stress": {"A": (0.1, -0.1)}}, "expected a band"),
]


@pytest.mark.parametrize(("steering", "said"), BAD, ids=[said[:30] for _, said in BAD])
def test_bad_steering_is_refused(fitted, steering, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        fitted.sample(5, **steering)


def test_what_cannot_be_steered_says_so():
    returns, condition = market(100)
    with pytest.raises(ValueError, match="expected no condition for GaussianGenerator"):
        GaussianGenerator(random_state=0).fit(returns, condition=condition)
    with pytest.raises(ValueError, match="expected no stress for GaussianGenerator"):
        GaussianGenerator(random_state=0).fit(returns).sample(5, stress={"A": 0.0})
    with pytest.raises(ValueError, match="fitted without"):
        DDPMGenerator(steps=1, width=8, random_state=0).fit(returns).sample(5, condition=1.0)
    with pytest.raises(ValueError, match="the dates of the panel in its order"):
        DDPMGenerator(steps=1, width=8).fit(returns, condition=condition.iloc[::-1])
    with pytest.raises(ValueError, match="one row of conditions for each of 100 rows"):
        DDPMGenerator(steps=1, width=8).fit(returns, condition=condition[:50])


def test_the_encoder_standardises_and_marks():
    frame = pd.DataFrame({"x": [1.0, 2.0, 3.0, 6.0], "up": [True, False, True, True], "name": list("baab")})
    encoder = ConditionEncoder().fit(frame, 4)
    code = encoder.transform(frame, 4)
    assert encoder.size == code.shape[1] == 5
    np.testing.assert_allclose(code[:, 0].mean(), 0, atol=1e-6)
    np.testing.assert_allclose(code[:, 0].std(), 1, rtol=1e-6)
    np.testing.assert_array_equal(code[:, 1:].sum(1), 2)
    np.testing.assert_array_equal(code[:, 3:].argmax(1), [1, 0, 0, 1])
    assert json.loads(json.dumps(encoder.columns_)) == encoder.columns_
    shuffled = encoder.transform(frame[["name", "x", "up"]], 4)
    np.testing.assert_array_equal(shuffled, code)
    for bad, said in (
        (frame.assign(x=[1.0, np.nan, 2.0, 3.0]), "1 missing in column 'x'"),
        (frame.assign(x=1.0), "finite conditions that vary"),
    ):
        with pytest.raises(ValueError, match=said):
            ConditionEncoder().fit(bad, 4)
