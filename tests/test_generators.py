"""The door between panels and models: what goes in, what comes out, units, seeds, saving, refusals."""

import json
import re
import shutil

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from sklearn.base import clone
from sklearn.covariance import OAS, EmpiricalCovariance, MinCovDet, ShrunkCovariance
from sklearn.exceptions import NotFittedError

import finediff.generators.base as base
from finediff.diffusion.process import VP, Cosine, Interpolant, linear_betas
from finediff.diffusion.sample import DDIM, ProbabilityFlow
from finediff.generators import (
    BootstrapGenerator,
    CopulaGenerator,
    DDPMGenerator,
    FactorDiffusionGenerator,
    FlowMatchingGenerator,
    GaussianGenerator,
    QuadratureScoreGenerator,
    RidgeScoreGenerator,
    ScenarioGenerator,
    SmoothedBootstrapGenerator,
    StudentTGenerator,
)
from finediff.panel import PanelWarning

SMALL = {"steps": 5, "width": 8, "depth": 1, "device": "cpu"}
CLASSICAL = {
    "Gaussian": (GaussianGenerator, {}),
    "Student t": (StudentTGenerator, {}),
    "bootstrap": (BootstrapGenerator, {}),
    "stationary": (BootstrapGenerator, {"method": "stationary"}),
    "smoothed": (SmoothedBootstrapGenerator, {}),
    "t copula": (CopulaGenerator, {}),
    "empirical copula": (CopulaGenerator, {"family": "gaussian", "margins": "empirical"}),
}
NETWORKS = {
    "DDPM": (DDPMGenerator, SMALL),
    "flow": (FlowMatchingGenerator, SMALL),
    "quadrature": (
        QuadratureScoreGenerator,
        {"width": 4, "nodes": 3, "time_nodes": 5, "iterations": 3, "device": "cpu"},
    ),
    "factor": (FactorDiffusionGenerator, {"draws": 2, "levels": 4, "folds": 2, "device": "cpu"}),
    "ridge": (RidgeScoreGenerator, {"directions": 1, "draws": 2, "levels": 4, "folds": 2, "device": "cpu"}),
}
GENERATORS = CLASSICAL | NETWORKS
every_generator = pytest.mark.parametrize("name", GENERATORS)


def make(name, **more):
    kind, arguments = GENERATORS[name]
    return kind(**{"random_state": 0, **arguments, **more})


def panel(n=120, d=4, seed=0) -> pd.DataFrame:
    """Correlated, heavy-tailed daily returns whose assets differ in mean and scale."""
    rng = np.random.default_rng(seed)
    common, own = rng.standard_t(6, (n, 1)), rng.standard_t(6, (n, d))
    scale = 0.008 * 1.5 ** (np.arange(d) % 4)
    index = pd.bdate_range("2021-01-04", periods=n, name="Date")
    return pd.DataFrame(
        0.0005 + scale * (0.6 * common + 0.6 * own), index=index, columns=[f"A{j}" for j in range(d)]
    )


# ------------------------------------------------------------------------------------ in and out


@every_generator
def test_frame_in_frame_out(name):
    scenarios = make(name).fit(panel()).sample(7)
    assert list(scenarios.columns) == ["A0", "A1", "A2", "A3"]
    assert scenarios.index.equals(pd.RangeIndex(7))
    assert scenarios.index.name == "scenario"
    assert (scenarios.dtypes == np.float64).all()
    assert np.isfinite(scenarios.to_numpy()).all()


@every_generator
def test_array_in_array_out_with_the_same_numbers(name):
    X = panel()
    scenarios = make(name).fit(X.to_numpy()).sample(7)
    assert isinstance(scenarios, np.ndarray)
    np.testing.assert_array_equal(scenarios, make(name).fit(X).sample(7))
    np.testing.assert_array_equal(scenarios, make(name).fit(X.to_numpy().tolist()).sample(7))
    unnamed = make(name).fit(X.set_axis(range(4), axis=1)).sample(7)
    np.testing.assert_array_equal(scenarios, unnamed)


@every_generator
def test_the_panel_is_neither_kept_nor_changed(name):
    X = panel().to_numpy(copy=True)
    before = X.copy()
    generator = make(name).fit(X)
    first = generator.sample(5)
    np.testing.assert_array_equal(X, before)
    X[:] = 7.0
    first += 1.0  # a caller may write into the scenarios
    np.testing.assert_array_equal(generator.sample(5), make(name).fit(before).sample(5))


@every_generator
def test_one_asset(name):
    X = panel(d=1)
    scenarios = make(name).fit(X).sample(2000)
    assert scenarios.shape == (2000, 1)
    assert 0.5 < scenarios["A0"].var() / X["A0"].var() < 2


@every_generator
def test_a_constant_asset_comes_back_exactly_and_leaves_the_others_alone(name):
    X = panel()
    with_cash = X.assign(cash=0.1).loc[:, ["A0", "A1", "cash", "A2", "A3"]]  # .1 is no sum of powers of two
    scenarios = make(name).fit(with_cash).sample(3000)
    assert (scenarios["cash"] == 0.1).all()
    ratio = scenarios.drop(columns="cash").var() / X.var()
    assert ratio.between(0.6, 1.6).all()


@pytest.mark.parametrize("name", ["Gaussian", "Student t"])
def test_a_constant_asset_has_no_part_in_the_estimate(name):
    X = panel()
    alone, with_cash = make(name).fit(X), make(name).fit(X.assign(cash=0.1))
    np.testing.assert_array_equal(with_cash.mean_, [*alone.mean_, 0.1])
    np.testing.assert_array_equal(with_cash.covariance_[:4, :4], alone.covariance_)
    assert not with_cash.covariance_[4].any()


@every_generator
def test_fewer_rows_than_assets(name):
    X = pd.DataFrame(np.random.default_rng(0).standard_normal((30, 50)) / 100)
    with pytest.warns(PanelWarning, match="got 30"):
        generator = make(name).fit(X)
    ratio = np.median(generator.sample(3000).var(0) / X.var(ddof=0))
    assert 0.8 < ratio < 1.25


@every_generator
def test_two_rows_are_enough_and_one_scenario_is_allowed(name):
    with pytest.warns(PanelWarning, match="got 2"):
        generator = make(name).fit(panel(n=2))
    assert np.isfinite(generator.sample(1).to_numpy()).all()


# ----------------------------------------------------------------------------------- equivariance


@pytest.mark.filterwarnings("ignore::finediff.panel.PanelWarning")
@every_generator
@pytest.mark.parametrize("factor", [1e-3, 1e3, [1e-3, 1.0, 20.0, 1e3]], ids=["1e-3", "1e3", "per asset"])
def test_a_change_of_units_changes_the_units_of_the_same_scenarios(name, factor):
    X = panel().to_numpy()
    expected = make(name).fit(X).sample(200)
    rescaled = make(name).fit(X * factor).sample(200) / factor
    tolerance = 1e-5 if name in NETWORKS else 1e-10  # float32 below, float64
    np.testing.assert_allclose(rescaled, expected, rtol=tolerance, atol=tolerance * X.std(0).min())


@pytest.mark.filterwarnings("ignore::finediff.panel.PanelWarning")
@every_generator
def test_a_binary_change_of_units_is_exact(name):
    X = panel().to_numpy()
    factor = 2.0 ** np.array([-10, 0, 3, 10])
    np.testing.assert_array_equal(
        make(name).fit(X * factor).sample(50), make(name).fit(X).sample(50) * factor
    )


@every_generator
def test_a_shift_of_the_mean_shifts_the_same_scenarios(name):
    X = panel().to_numpy()
    shift = np.array([0.01, -0.02, 0.0, 0.005])
    arguments = {"block_length": 5.0} if name == "stationary" else {}  # else chosen by the squared returns
    expected = make(name, **arguments).fit(X).sample(200) + shift
    tolerance = 1e-5 if name in NETWORKS else 1e-10
    shifted = make(name, **arguments).fit(X + shift).sample(200)
    np.testing.assert_allclose(shifted, expected, rtol=tolerance, atol=tolerance * X.std(0).min())


@pytest.mark.parametrize("name", ["Gaussian", "Student t"])
def test_the_order_of_the_assets_does_not_matter(name):
    X, order = panel().to_numpy(), np.array([2, 0, 3, 1])
    one, other = make(name).fit(X), make(name).fit(X[:, order])
    np.testing.assert_allclose(other.mean_, one.mean_[order], rtol=1e-10)
    np.testing.assert_allclose(other.covariance_, one.covariance_[np.ix_(order, order)], rtol=1e-10)
    if name == "Student t":
        assert other.dof_ == pytest.approx(one.dof_, rel=1e-6)


@pytest.mark.parametrize("name", ["bootstrap", "stationary"])
def test_the_order_of_the_assets_does_not_matter_to_a_bootstrap(name):
    X, order = panel().to_numpy(), np.array([2, 0, 3, 1])
    np.testing.assert_array_equal(
        make(name).fit(X[:, order]).sample(300), make(name).fit(X).sample(300)[:, order]
    )


# ------------------------------------------------------------------------------------------ seeds


@every_generator
def test_same_seed_same_bits_another_seed_others(name):
    X = panel()
    first, again = make(name).fit(X), make(name).fit(X)
    pd.testing.assert_frame_equal(first.sample(50), again.sample(50), check_exact=True)
    pd.testing.assert_frame_equal(first.sample(50), first.sample(50), check_exact=True)
    assert not first.sample(50).equals(first.sample(50, random_state=1))
    pd.testing.assert_frame_equal(
        first.sample(50, random_state=1), again.sample(50, random_state=1), check_exact=True
    )
    assert not first.sample(50).equals(make(name, random_state=1).fit(X).sample(50))


@pytest.mark.parametrize("name", NETWORKS)
def test_the_seed_of_the_fit_decides_the_weights(name):
    X = panel()
    one, same, other = (make(name, random_state=seed).fit(X) for seed in (0, 0, 1))
    for a, b, c in zip(*(generator.score_model_.parameters() for generator in (one, same, other))):
        assert (a == b).all()
        assert not a.any() or not (a == c).all()


@every_generator
def test_fit_and_sample_have_streams_of_their_own(name):
    generator = make(name)
    assert generator._seed(None, base._FIT) != generator._seed(None, base._SAMPLE)
    assert generator._seed(0, base._SAMPLE) == generator._seed(None, base._SAMPLE)


@every_generator
def test_no_seed_varies(name):
    """... and takes nothing from the global states, which a fixture watches in every test."""
    generator = make(name, random_state=None).fit(panel())
    assert not generator.sample(50).equals(generator.sample(50))
    pd.testing.assert_frame_equal(generator.sample(50, random_state=3), generator.sample(50, random_state=3))


@every_generator
def test_a_random_state_is_a_stream(name):
    X = panel()
    generator = make(name, random_state=np.random.RandomState(0)).fit(X)
    first, second = generator.sample(50), generator.sample(50)
    assert not first.equals(second)
    again = make(name, random_state=np.random.RandomState(0)).fit(X)
    pd.testing.assert_frame_equal(again.sample(50), first, check_exact=True)


@pytest.mark.parametrize(
    "state",
    [np.random.default_rng(0), -1, 2**32, "0", 0.5],
    ids=lambda state: (
        f"{type(state).__name__}-{state}" if isinstance(state, (int, float, str)) else type(state).__name__
    ),
)
def test_other_random_states_are_refused(state):
    with pytest.raises(ValueError, match=r"expected random_state to be None, an integer .* got"):
        make("Gaussian", random_state=state).fit(panel())
    with pytest.raises(ValueError, match="expected random_state"):
        make("Gaussian").fit(panel()).sample(5, random_state=state)


@pytest.mark.parametrize("name", NETWORKS)
def test_many_scenarios_are_drawn_in_parts_that_differ(name):
    generator = make(name, sampler=DDIM(steps=2)).fit(panel().to_numpy())
    draws = generator.sample(2 * 8192 + 100)
    assert len(np.unique(draws, axis=0)) == len(draws)
    np.testing.assert_array_equal(draws[:8192], generator.sample(8192))


# ---------------------------------------------------------------------------------- save and load

SAVED = {
    **GENERATORS,
    "betas and DDIM": (
        DDPMGenerator,
        SMALL | {"process": VP.from_betas(linear_betas(50)), "sampler": DDIM(steps=5, eta=1.0)},
    ),
    "cosine": (DDPMGenerator, SMALL | {"process": Cosine(), "sampler": ProbabilityFlow(4, method="euler")}),
    "interpolant": (FlowMatchingGenerator, SMALL | {"process": Interpolant(), "held_out": 0.3}),
    "empirical": (GaussianGenerator, {"covariance_estimator": EmpiricalCovariance()}),
    "shrunk": (GaussianGenerator, {"covariance_estimator": ShrunkCovariance(shrinkage=0.3)}),
    "OAS": (GaussianGenerator, {"covariance_estimator": OAS(store_precision=False)}),
    "robust": (GaussianGenerator, {"covariance_estimator": MinCovDet(random_state=0)}),
    "fixed dof": (StudentTGenerator, {"dof": 4}),
    "OAS copula": (CopulaGenerator, {"correlation": OAS()}),
    "long blocks": (BootstrapGenerator, {"method": "stationary", "block_length": 12.5}),
}


@pytest.mark.parametrize("name", SAVED)
def test_loading_gives_back_the_same_bits(name, tmp_path):
    kind, arguments = SAVED[name]
    fitted = kind(random_state=0, **arguments).fit(panel())
    assert fitted.save(tmp_path / "deep" / "saved") == tmp_path / "deep" / "saved"
    assert sorted(p.name for p in (tmp_path / "deep").rglob("*")) == [
        "arrays.safetensors",
        "generator.json",
        "saved",
    ]
    for loaded in (kind.load(tmp_path / "deep" / "saved"), ScenarioGenerator.load(tmp_path / "deep/saved")):
        assert type(loaded) is kind
        assert repr(loaded) == repr(fitted)
        assert (loaded.n_features_in_, loaded.n_samples_fit_) == (4, 120)
        np.testing.assert_array_equal(loaded.feature_names_in_, fitted.feature_names_in_)
        pd.testing.assert_frame_equal(loaded.sample(50), fitted.sample(50), check_exact=True)
        clone(loaded).fit(panel())


def test_a_panel_without_names_and_a_stream_of_seeds(tmp_path):
    X = panel().to_numpy()
    make("Gaussian", random_state=np.random.RandomState(0)).fit(X).save(tmp_path / "saved")
    loaded = GaussianGenerator.load(tmp_path / "saved")
    assert loaded.random_state is None  # a stream cannot be stored
    assert isinstance(loaded.sample(3, random_state=0), np.ndarray)


@pytest.mark.parametrize("name", ["Gaussian", "DDPM"])
def test_a_constant_asset_survives_saving(name, tmp_path):
    fitted = make(name).fit(panel().assign(cash=0.1))
    fitted.save(tmp_path / "saved")
    loaded = ScenarioGenerator.load(tmp_path / "saved")
    assert (loaded.sample(100)["cash"] == 0.1).all()


def test_a_generator_saved_on_a_missing_accelerator_loads(tmp_path):
    fitted = make("DDPM").fit(panel())
    fitted.save(tmp_path / "saved")
    edit(tmp_path / "saved", lambda about: about["parameters"].update(device="cuda:99"))
    loaded = DDPMGenerator.load(tmp_path / "saved")
    assert loaded.device is None
    pd.testing.assert_frame_equal(loaded.sample(20), fitted.sample(20), rtol=1e-4, atol=1e-6)


def test_another_class_is_refused(tmp_path):
    make("Gaussian").fit(panel()).save(tmp_path / "saved")
    with pytest.raises(
        ValueError, match=r"expected a saved DDPMGenerator, got a GaussianGenerator .* use Gau"
    ):
        DDPMGenerator.load(tmp_path / "saved")


def test_what_is_not_fitted_or_not_storable_is_not_saved(tmp_path):
    with pytest.raises(NotFittedError):
        make("Gaussian").save(tmp_path / "saved")

    class Mine(EmpiricalCovariance):
        pass

    fitted = make("Gaussian", covariance_estimator=Mine()).fit(panel())
    with pytest.raises(ValueError, match=r"got covariance_estimator=Mine\(\), which cannot be saved"):
        fitted.save(tmp_path / "saved")
    fitted.set_params(covariance_estimator=ShrunkCovariance(shrinkage=np.eye(2)))
    with pytest.raises(ValueError, match=r"got covariance_estimator__shrinkage=array"):
        fitted.save(tmp_path / "saved")
    assert not any(tmp_path.iterdir())


def test_a_foreign_directory_is_not_overwritten(tmp_path):
    fitted = make("Gaussian").fit(panel())
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("all my work")
    with pytest.raises(ValueError, match="choose another name"):
        fitted.save(tmp_path / "mine")
    with pytest.raises(ValueError, match="choose another name"):
        fitted.save(tmp_path / "mine" / "thesis.txt")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "all my work"


def test_overwriting_replaces_all_or_nothing(tmp_path, monkeypatch):
    old, new = make("Gaussian").fit(panel()), make("Student t").fit(panel())
    old.save(tmp_path / "saved")

    def full_disk(*_, **__):
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(base.json, "dumps", full_disk)  # after the arrays are written
        with pytest.raises(OSError, match="no space"):
            new.save(tmp_path / "saved")
    assert [p.name for p in tmp_path.iterdir()] == ["saved"]
    pd.testing.assert_frame_equal(ScenarioGenerator.load(tmp_path / "saved").sample(5), old.sample(5))
    new.save(tmp_path / "saved")
    assert [p.name for p in tmp_path.iterdir()] == ["saved"]
    assert sorted(p.name for p in (tmp_path / "saved").iterdir()) == ["arrays.safetensors", "generator.json"]
    pd.testing.assert_frame_equal(ScenarioGenerator.load(tmp_path / "saved").sample(5), new.sample(5))


def edit(directory, change):
    about = json.loads((directory / "generator.json").read_text())
    change(about)
    (directory / "generator.json").write_text(json.dumps(about))


def cut(name, share):
    def damage(directory):
        whole = (directory / name).read_bytes()
        (directory / name).write_bytes(whole[: int(share * len(whole))])

    return damage


def flip_a_bit(directory):
    whole = bytearray((directory / "arrays.safetensors").read_bytes())
    whole[-3] ^= 1
    (directory / "arrays.safetensors").write_bytes(bytes(whole))


def swap_arrays(directory):
    make("Gaussian").fit(panel(seed=1)).save(directory.parent / "other")
    shutil.copy(directory.parent / "other" / "arrays.safetensors", directory)


def other_module(target):
    return lambda d: edit(d, lambda about: about["parameters"].update(covariance_estimator=target))


DAMAGED = {
    # damage, fragment of the message
    "gone": (shutil.rmtree, "without generator.json"),
    "empty": (lambda d: [p.unlink() for p in d.iterdir()], "without generator.json"),
    "no arrays": (lambda d: (d / "arrays.safetensors").unlink(), "without arrays.safetensors"),
    "half the arrays": (cut("arrays.safetensors", 0.5), "not the file that was saved"),
    "no bytes": (cut("arrays.safetensors", 0), "not the file that was saved"),
    "one bit": (flip_a_bit, "not the file that was saved"),
    "others' arrays": (swap_arrays, "not the file that was saved"),
    "half the text": (cut("generator.json", 0.5), "cannot be read"),
    "other json": (lambda d: (d / "generator.json").write_text("[1, 2]"), "cannot be read"),
    "no class": (lambda d: edit(d, lambda about: about.pop("class")), "cannot be read"),
    "binary": (lambda d: (d / "generator.json").write_bytes(b"\xff\xfe\x00"), "cannot be read"),
    "newer": (lambda d: edit(d, lambda about: about.update(format=99)), "expected format 1, got 99"),
    "unknown class": (lambda d: edit(d, lambda about: about.update({"class": "Magic"})), "got a Magic"),
    "unknown argument": (
        lambda d: edit(d, lambda about: about["parameters"].update(a=1)),
        "does not describe",
    ),
    "no names": (lambda d: edit(d, lambda about: about.pop("feature_names_in")), "does not describe"),
    "other class": (
        lambda d: edit(d, lambda about: about.update({"class": "StudentTGenerator"})),
        "does not describe",
    ),
    "a module": (other_module({"of": "subprocess:Popen", "args": "true"}), "known classes"),
    "a function": (other_module({"of": "finediff.diffusion.process:as_time", "t": 1}), "known classes"),
    "an import": (other_module({"of": "finediff.diffusion.process:dataclass"}), "known classes"),
    "a base class": (other_module({"of": "finediff.diffusion.process:Process"}), "known classes"),
    "a covariance function": (other_module({"sklearn.covariance": "oas", "X": 1}), "known classes"),
    "nothing": (other_module({"x": 1}), "does not describe"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_directory_is_refused_in_one_sentence(case, tmp_path):
    damage, fragment = DAMAGED[case]
    make("Gaussian").fit(panel()).save(tmp_path / "saved")
    damage(tmp_path / "saved")
    with pytest.raises(ValueError, match=re.escape(fragment)) as caught:
        ScenarioGenerator.load(tmp_path / "saved")
    assert str(caught.value).startswith("expected ")
    assert str(tmp_path / "saved") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_network_of_another_shape_is_refused(tmp_path):
    make("DDPM").fit(panel()).save(tmp_path / "saved")
    edit(tmp_path / "saved", lambda about: about["parameters"].update(width=16))
    with pytest.raises(ValueError, match="does not describe one"):
        DDPMGenerator.load(tmp_path / "saved")


# -------------------------------------------------------------------------------------- bad input


def put(value, row=7, column=1):
    X = panel().astype(object) if isinstance(value, str) else panel()
    X.iloc[row, column] = value
    return X


BAD_PANELS = {
    # panel, error, fragments of the message
    "NaN": (put(np.nan), ValueError, ["NaN", "'A1'", "2021-01-13", "1 in all"]),
    "NaN in an array": (put(np.nan).to_numpy(), ValueError, ["NaN", "column 1", "first at 7"]),
    "inf": (put(np.inf), ValueError, ["inf", "'A1'", "2021-01-13"]),
    "minus inf": (put(-np.inf).to_numpy(), ValueError, ["inf", "column 1", "first at 7"]),
    "text": (put("n/a"), ValueError, ["text", "'A1'", "2021-01-13"]),
    "a column of text": (panel().assign(sector="tech"), ValueError, ["text", "'sector'", "120 in all"]),
    "dates": (panel().reset_index(), ValueError, ["dates", "'Date'", "index"]),
    "complex": (panel().to_numpy() * 1j, ValueError, ["omplex"]),
    "one row": (panel().iloc[:1], ValueError, ["1 sample", "minimum of 2"]),
    "no rows": (panel().iloc[:0], ValueError, ["0 sample"]),
    "no columns": (panel().iloc[:, :0], ValueError, ["at least one asset", "(120, 0)"]),
    "a series": (panel()["A0"], ValueError, ["Series"]),
    "a vector": (panel()["A0"].to_numpy(), ValueError, ["2D", "1D"]),
    "a cube": (np.zeros((3, 4, 5)), ValueError, ["dim 3"]),
    "nothing": (None, ValueError, ["2D"]),
    "a name twice": (panel().set_axis(list("ABBC"), axis=1), ValueError, ["each asset once", "'B'"]),
    "mixed names": (panel().set_axis(["A", "B", 3, 4], axis=1), TypeError, ["string"]),
    "no variation": (panel() * 0 + 0.1, ValueError, ["vary", "120 times"]),
}


@pytest.mark.parametrize("case", BAD_PANELS)
@pytest.mark.parametrize("name", ["Gaussian", "DDPM"])
def test_bad_panels_are_refused_by_name(name, case):
    X, error, fragments = BAD_PANELS[case]
    with pytest.raises(error) as caught:
        make(name).fit(X)
    for fragment in fragments:
        assert fragment in str(caught.value)


SUSPECT_PANELS = {
    "prices": (100 * (1 + panel(300)).cumprod(), "prices"),
    "percent": (100 * panel(300), "per cent|percent"),
    "few": (panel(20), "got 20"),
}


@pytest.mark.parametrize("case", SUSPECT_PANELS)
@pytest.mark.parametrize("as_array", [False, True])
def test_suspect_panels_are_fitted_with_a_warning_at_the_caller(case, as_array):
    X, fragment = SUSPECT_PANELS[case]
    with pytest.warns(PanelWarning, match=f"(?i){fragment}") as caught:
        make("Gaussian").fit(X.to_numpy() if as_array else X)
    assert {warning.filename for warning in caught} == {__file__}


@every_generator
def test_sample_before_fit(name):
    with pytest.raises(NotFittedError):
        make(name).sample(10)


@pytest.mark.parametrize("n_samples", [0, -1, 2.5, "10", None, np.nan])
def test_bad_numbers_of_scenarios(n_samples):
    with pytest.raises(ValueError, match="expected n_samples to be a positive integer, got"):
        make("Gaussian").fit(panel()).sample(n_samples)


def test_an_integer_of_numpy_is_an_integer():
    assert make("Gaussian").fit(panel()).sample(np.int64(5)).shape == (5, 4)


BAD_ARGUMENTS = [
    # generator, arguments, fragment of the message
    ("DDPM", {"device": "cuda:99"}, "expected a device torch can use here, got 'cuda:99'"),
    ("DDPM", {"device": "abacus"}, "try device='cpu'"),
    ("DDPM", {"held_out": 1.5}, "expected held_out to be a share in [0, 1), got 1.5"),
    ("flow", {"held_out": -0.1}, "held_out"),
    ("DDPM", {"held_out": np.nan}, "held_out"),
    ("DDPM", {"steps": 0}, "expected steps to be a whole number, at least 1, got 0"),
    ("flow", {"steps": 2.5}, "steps"),
    ("DDPM", {"width": 0}, "width"),
    ("DDPM", {"depth": -1}, "depth"),
    ("DDPM", {"batch_size": "all"}, "batch_size"),
    ("DDPM", {"sampler": "ddim"}, "expected sampler to be a Sampler or None, got 'ddim'"),
    ("flow", {"process": Cosine}, "expected process to be a Process or None, got <class"),
    ("Student t", {"dof": 1}, "expected a finite dof above 2, got 1"),
    ("Student t", {"dof": 2}, "dof"),
    ("Student t", {"dof": np.inf}, "GaussianGenerator"),
    ("bootstrap", {"method": "block"}, "expected method 'iid' or 'stationary', got 'block'"),
    ("stationary", {"block_length": 0.5}, "expected a block_length of at least 1 row, got 0.5"),
    ("bootstrap", {"block_length": 5}, "use method='stationary'"),
    ("smoothed", {"bandwidth": -0.1}, "expected a finite bandwidth of at least 0, got -0.1"),
    ("t copula", {"family": "clayton"}, "expected family 't' or 'gaussian', got 'clayton'"),
]


@pytest.mark.parametrize(("name", "arguments", "fragment"), BAD_ARGUMENTS)
def test_bad_arguments_are_refused_by_fit(name, arguments, fragment):
    generator = make(name, **arguments)  # not by the constructor: scikit-learn's rule
    with pytest.raises(ValueError, match=re.escape(fragment)):
        generator.fit(panel())


def test_training_that_diverges_says_so():
    with pytest.raises(ValueError, match="expected a finite loss"):
        make("DDPM", learning_rate=1e30, steps=50).fit(panel())


@every_generator
def test_fitting_again_forgets(name):
    again = make(name).fit(panel(seed=1, d=3)).fit(panel())
    pd.testing.assert_frame_equal(again.sample(20), make(name).fit(panel()).sample(20), check_exact=True)


@every_generator
def test_a_panel_with_ties_and_a_copy_of_an_asset(name):
    """Rounded prices give ties, two share classes give a singular covariance."""
    X = panel().round(3)
    X = X.assign(copy=X["A0"])
    scenarios = make(name).fit(X).sample(3000)
    assert stats.spearmanr(scenarios["A0"], scenarios["copy"]).statistic > 0.8
