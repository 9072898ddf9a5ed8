"""Drawing without keeping: chunks, Parquet directories whole or not at all, moments in one pass; panels with gaps."""

import json
import sys
import tracemalloc

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from sklearn.exceptions import NotFittedError

from finediff.covariance import streaming_moments
from finediff.covariance.scenario import RunningMoments
from finediff.generators import (
    BootstrapGenerator,
    GaussianGenerator,
    RidgeScoreGenerator,
    ScenarioGenerator,
    StudentTGenerator,
    stream,
)
from finediff.risk import StreamingTails, expected_shortfall, var

RIDGE = {"directions": 1, "draws": 2, "levels": 4, "folds": 2, "device": "cpu"}
GENERATORS = {
    "Gaussian": GaussianGenerator(random_state=0),
    "Student t": StudentTGenerator(random_state=0),
    "stationary": BootstrapGenerator(method="stationary", random_state=0),
    "ridge": RidgeScoreGenerator(random_state=0, **RIDGE),
}
every_generator = pytest.mark.parametrize("name", GENERATORS)


class Recorder(ScenarioGenerator):
    """Normal numbers; notes how it was steered, takes gaps, and can be made to stop at a chunk."""

    _steered_by = ("condition", "stress")
    _takes_missing = True

    def __init__(self, *, random_state=None):
        self.random_state = random_state

    def _fit(self, X, seed):
        self.seen_, self.calls_, self.scenarios_, self.stop_ = X, [], None, None

    def _sample(self, n, seed, **steering):
        self.calls_.append((n, seed, steering))
        if self.stop_ is not None and len(self.calls_) > self.stop_[0]:
            raise self.stop_[1]
        rows = np.random.default_rng(seed).standard_normal((n, self.n_features_in_)) / 100
        return rows if self.scenarios_ is None else np.resize(self.scenarios_, rows.shape)

    def _arrays(self):
        return {}

    def _restore(self, arrays):
        pass


def panel(n=200, d=3, seed=0) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    returns = 0.01 * (rng.standard_t(6, (n, 1)) + rng.standard_t(6, (n, d)))
    return pd.DataFrame(
        returns, columns=[f"A{j}" for j in range(d)], index=pd.bdate_range("2021-01-04", periods=n)
    )


def recorder(d=3, seed=0) -> Recorder:
    return Recorder(random_state=seed).fit(panel(d=d))


def contents(folder) -> set:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


# ---------------------------------------------------------------------------------------- chunks


@every_generator
def test_chunks_are_the_same_draw_each_time_and_count_on(name):
    generator = GENERATORS[name].fit(panel())
    chunks = list(generator.sample_chunks(250, chunk=100, random_state=5))
    assert [len(rows) for rows in chunks] == [100, 100, 50]
    whole = pd.concat(chunks)
    assert whole.index.equals(pd.RangeIndex(250))
    assert whole.index.name == "scenario"
    assert list(whole.columns) == ["A0", "A1", "A2"]
    again = pd.concat(generator.sample_chunks(250, chunk=100, random_state=5))
    pd.testing.assert_frame_equal(whole, again, check_exact=True)
    longer = pd.concat(generator.sample_chunks(700, chunk=100, random_state=5))
    pd.testing.assert_frame_equal(longer[:200], whole[:200], check_exact=True)
    if name != "stationary":  # which repeats rows of the panel
        assert len(longer.drop_duplicates()) == 700
    assert not whole.equals(pd.concat(generator.sample_chunks(250, chunk=100, random_state=6)))


@every_generator
def test_chunks_have_the_law_of_one_draw(name):
    generator = GENERATORS[name].fit(panel())
    one = generator.sample(6000, random_state=1)
    many = pd.concat(generator.sample_chunks(6000, chunk=157, random_state=2))
    weights = np.random.default_rng(0).standard_normal((3, 12))
    p_values = [
        stats.cramervonmises_2samp(a, b).pvalue
        for a, b in zip((one @ weights).T.to_numpy(), (many @ weights).T.to_numpy())
    ]
    assert min(p_values) > 0.001 / len(p_values)


def test_chunks_are_independent_of_each_other_and_of_sample():
    generator = GENERATORS["Gaussian"].fit(panel())
    chunks = [rows["A0"].to_numpy() for rows in generator.sample_chunks(8 * 4000, chunk=4000, random_state=0)]
    drawn = np.array([*chunks, generator.sample(4000, random_state=0)["A0"]])
    correlation = np.corrcoef(drawn)[np.triu_indices(len(drawn), 1)]
    assert np.abs(correlation).max() < 4.5 / np.sqrt(4000)


def test_arrays_come_as_arrays_and_streams_of_seeds_go_on():
    generator = GaussianGenerator(random_state=np.random.RandomState(0)).fit(panel().to_numpy())
    first = np.concatenate(list(generator.sample_chunks(10, chunk=4)))
    second = np.concatenate(list(generator.sample_chunks(10, chunk=4)))
    assert first.shape == (10, 3)
    assert not np.array_equal(first, second)
    unseeded = GaussianGenerator().fit(panel().to_numpy())
    assert not np.array_equal(next(unseeded.sample_chunks(5)), next(unseeded.sample_chunks(5)))


def test_what_has_a_row_for_each_scenario_is_cut():
    generator = recorder()
    regimes = pd.DataFrame({"vix": np.arange(10.0)}, index=pd.bdate_range("2024-01-01", periods=10))
    fixed, low, high = np.arange(10) / 100, np.arange(10) / 200, 0.5
    list(
        generator.sample_chunks(
            10, chunk=4, condition=regimes, stress={"A0": fixed, "A1": (low, high), "A2": 0.1}
        )
    )
    assert [call[0] for call in generator.calls_] == [4, 4, 2]
    steered = [call[2] for call in generator.calls_]
    pd.testing.assert_frame_equal(pd.concat([given["condition"] for given in steered]), regimes)
    np.testing.assert_array_equal(np.concatenate([given["stress"]["A0"] for given in steered]), fixed)
    np.testing.assert_array_equal(np.concatenate([given["stress"]["A1"][0] for given in steered]), low)
    assert all(given["stress"]["A1"][1] == 0.5 and given["stress"]["A2"] == 0.1 for given in steered)


@pytest.mark.parametrize("condition", [0.2, "calm", {"vix": 0.2}, pd.DataFrame({"vix": [0.2]})])
def test_one_condition_stands_for_all_chunks(condition):
    generator = recorder()
    list(generator.sample_chunks(10, chunk=4, condition=condition))
    assert all(call[2]["condition"] is condition for call in generator.calls_)


def test_a_list_is_one_condition_even_where_it_is_as_long_as_a_chunk():
    generator = recorder()
    list(generator.sample_chunks(8, chunk=2, condition=["calm", 0.2]))
    for _, _, given in generator.calls_:
        assert given["condition"].to_numpy().tolist() == [["calm", 0.2]]
    with pytest.raises(ValueError, match="expected conditions for 1 or 8 scenarios, got 2 rows"):
        generator.sample_chunks(8, chunk=2, condition=pd.DataFrame({"vix": [0.1, 0.2]}))


def test_a_stress_holds_in_every_chunk():
    generator = GENERATORS["ridge"].fit(panel())
    path = np.linspace(-0.05, 0.05, 50)
    rows = pd.concat(generator.sample_chunks(50, chunk=20, stress={"A1": path}))
    np.testing.assert_allclose(rows["A1"], path, atol=1e-6)


# ------------------------------------------------------------------------------------ round trips


@pytest.mark.parametrize("share", [1, 2**28], ids=["a file a chunk", "one file"])
def test_what_is_read_is_what_was_drawn(tmp_path, monkeypatch, share):
    monkeypatch.setattr(stream, "_FILE", share)
    generator = recorder()
    written = generator.sample_to(tmp_path / "deep" / "scenarios", 250, chunk=100, random_state=3)
    drawn = pd.concat(generator.sample_chunks(250, chunk=100, random_state=3))
    read = pd.read_parquet(written.path)
    pd.testing.assert_frame_equal(read, drawn, check_exact=True, check_column_type=False)
    pd.testing.assert_series_equal(pd.read_parquet(written.path, columns=["A1"])["A1"], drawn["A1"])
    files = sorted(written.path.glob("*.parquet"))
    assert len(files) == (3 if share == 1 else 1)
    parts = pd.concat([pd.read_parquet(file) for file in files], ignore_index=True)
    np.testing.assert_array_equal(parts, drawn)
    assert contents(tmp_path) == {"deep", "deep/scenarios", "deep/scenarios/_manifest.json"} | {
        f"deep/scenarios/{file.name}" for file in files
    }


def test_other_readers_of_datasets(tmp_path):
    import pyarrow.dataset

    generator = recorder()
    generator.sample_to(tmp_path / "scenarios", 250, chunk=100, random_state=3)
    dataset = pyarrow.dataset.dataset(tmp_path / "scenarios")
    assert dataset.count_rows() == 250
    batches = [batch.num_rows for batch in dataset.to_batches(columns=["A0"])]
    assert sum(batches) == 250
    assert max(batches) <= 100


def test_every_bit_is_kept(tmp_path):
    odd = np.array([0.0, -0.0, 5e-324, -2.2e-308, 1e150, -1.0, 0.1, np.nextafter(0.1, 1), 1e-17])
    generator = Recorder(random_state=0).fit(panel().to_numpy())
    generator.scenarios_ = odd
    path = generator.sample_to(tmp_path / "s", 9, chunk=2).path
    read = pd.read_parquet(path)
    assert list(read.columns) == ["0", "1", "2"]
    drawn = np.concatenate(list(generator.sample_chunks(9, chunk=2)))
    np.testing.assert_array_equal(read.to_numpy().copy().view(np.int64), drawn.view(np.int64))


def test_single_precision_rounds_and_halves(tmp_path):
    generator = recorder(d=40)
    double = generator.sample_to(tmp_path / "double", 4000, chunk=1000, random_state=1)
    single = generator.sample_to(tmp_path / "single", 4000, chunk=1000, random_state=1, dtype="float32")
    read = pd.read_parquet(single.path)
    assert (read.dtypes == np.float32).all()
    np.testing.assert_array_equal(read, pd.read_parquet(double.path).astype(np.float32))
    size = [sum(file.stat().st_size for file in one.path.glob("*.parquet")) for one in (single, double)]
    assert size[0] < 0.6 * size[1]
    np.testing.assert_allclose(single.mean, read.astype(float).mean(), rtol=1e-9, atol=1e-12)


def test_the_manifest_says_what_it_is(tmp_path):
    recorder().sample_to(tmp_path / "s", 250, chunk=100, random_state=np.int64(7))
    about = json.loads((tmp_path / "s/_manifest.json").read_text())
    assert (about["generator"], about["scenarios"], about["chunk"], about["seed"]) == (
        "Recorder",
        250,
        100,
        7,
    )
    assert about["assets"] == ["A0", "A1", "A2"]
    assert about["dtype"] == "float64"
    assert sum(file["rows"] for file in about["files"]) == 250
    assert about["versions"]["finediff"]
    recorder().sample_to(tmp_path / "s", 5, random_state=np.random.RandomState(0))
    assert json.loads((tmp_path / "s/_manifest.json").read_text())["seed"] is None


def test_columns_numbered_by_the_panel_get_their_positions(tmp_path):
    generator = GaussianGenerator(random_state=0).fit(panel().set_axis([7, 8, 9], axis=1))
    path = generator.sample_to(tmp_path / "s", 10).path
    assert list(pd.read_parquet(path).columns) == ["0", "1", "2"]


# ----------------------------------------------------------------------------- whole or not at all


@pytest.mark.parametrize("error", [RuntimeError("the power went"), KeyboardInterrupt(), MemoryError()])
def test_an_interrupted_draw_leaves_what_was_there(tmp_path, monkeypatch, error):
    monkeypatch.setattr(stream, "_FILE", 1)
    generator = recorder()
    generator.stop_ = 2, error
    with pytest.raises(type(error)):
        generator.sample_to(tmp_path / "new", 500, chunk=100)
    assert contents(tmp_path) == set()
    generator.stop_ = None
    former = generator.sample_to(tmp_path / "old", 150, chunk=100, random_state=1)
    before, rows = contents(tmp_path), pd.read_parquet(former.path)
    generator.calls_, generator.stop_ = [], (2, error)
    with pytest.raises(type(error)):
        generator.sample_to(tmp_path / "old", 500, chunk=100)
    assert contents(tmp_path) == before
    pd.testing.assert_frame_equal(pd.read_parquet(former.path), rows)


def test_a_failing_statistic_leaves_nothing(tmp_path):
    class Failing:
        def update(self, rows):
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        recorder().sample_to(tmp_path / "s", 10, statistics=[Failing()])
    assert contents(tmp_path) == set()


def test_a_dataset_is_replaced_whole(tmp_path):
    generator = recorder()
    generator.sample_to(tmp_path / "s", 500, chunk=100)
    generator.sample_to(tmp_path / "s", 50, chunk=100)
    assert len(pd.read_parquet(tmp_path / "s")) == 50
    assert contents(tmp_path) == {"s", "s/_manifest.json", "s/part-00000.parquet"}
    (tmp_path / "empty").mkdir()
    generator.sample_to(tmp_path / "empty", 5)
    assert len(pd.read_parquet(tmp_path / "empty")) == 5


def test_what_is_not_a_dataset_is_left_alone(tmp_path):
    generator = recorder()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.tex").write_text("years of work")
    for place in ("mine", "mine/thesis.tex"):
        with pytest.raises(ValueError, match="so that nothing of yours is lost"):
            generator.sample_to(tmp_path / place, 10)
    with pytest.raises(
        ValueError, match=r"expected a directory at .*thesis\.tex, got a file: choose another"
    ):
        generator.sample_to(tmp_path / "mine/thesis.tex/scenarios", 10)
    assert contents(tmp_path) == {"mine", "mine/thesis.tex"}
    assert not generator.calls_


# ------------------------------------------------------------------------------------- in one pass


@pytest.mark.parametrize("shift", [0.0, 1e4], ids=["returns", "far from zero"])
def test_moments_are_those_of_the_files(tmp_path, shift):
    generator = Recorder(random_state=0).fit(panel().to_numpy())
    generator.scenarios_ = shift + np.random.default_rng(1).standard_normal((700, 3)) / 100
    written = generator.sample_to(tmp_path / "s", 700, chunk=700, covariance=True)
    chunked = recorder().sample_to(tmp_path / "t", 950, chunk=100, covariance=True)
    slim = recorder().sample_to(tmp_path / "t", 950, chunk=100)
    for found in (written, chunked):
        rows = pd.read_parquet(found.path).to_numpy() if found is chunked else generator.scenarios_
        np.testing.assert_allclose(found.mean, rows.mean(0), rtol=1e-11, atol=1e-16)
        np.testing.assert_allclose(found.standard_deviation, rows.std(0, ddof=1), rtol=1e-7)
        np.testing.assert_allclose(found.covariance, np.cov(rows.T), rtol=1e-6, atol=1e-12)
    assert slim.covariance is None
    np.testing.assert_allclose(slim.standard_deviation, chunked.standard_deviation, rtol=1e-12)
    assert list(slim.mean.index) == list(chunked.covariance.columns) == ["A0", "A1", "A2"]
    count, mean, covariance = streaming_moments(recorder().sample_chunks(950, chunk=100))
    assert count == chunked.n_samples == 950
    np.testing.assert_allclose(mean, chunked.mean, rtol=1e-12, atol=1e-18)
    np.testing.assert_allclose(covariance, chunked.covariance, rtol=1e-11)


def test_moments_far_from_zero_survive_merging():
    moments = {full: RunningMoments(2, full) for full in (False, True)}
    rows = 1e6 + np.random.default_rng(0).standard_normal((1000, 2))
    for part in np.array_split(rows, 7):
        for one in moments.values():
            one.update(np.ascontiguousarray(part.T))
    for one in moments.values():
        found = stream._dataset(None, one, None).standard_deviation
        np.testing.assert_allclose(found, rows.std(0, ddof=1), rtol=1e-9)


def test_files_and_covariances_merge_by_one_formula(tmp_path, monkeypatch):
    """To the last bits of the rows' layout; and a chunk that the one home forgets is missed in both."""
    written = recorder().sample_to(tmp_path / "s", 950, chunk=100, covariance=True)
    count, mean, covariance = streaming_moments(recorder().sample_chunks(950, chunk=100))
    assert count == written.n_samples
    np.testing.assert_allclose(written.mean, mean, rtol=1e-12, atol=1e-18)
    np.testing.assert_allclose(written.covariance, covariance, rtol=1e-12, atol=1e-18)
    update, seen = RunningMoments.update, []

    def forgetful(self, columns, centre=None):
        seen.append(columns.shape)
        if len(seen) % 10 != 1:
            update(self, columns, centre)

    monkeypatch.setattr(RunningMoments, "update", forgetful)
    assert recorder().sample_to(tmp_path / "t", 950, chunk=100).mean is not None
    assert streaming_moments(recorder().sample_chunks(950, chunk=100))[0] == 850
    assert len(seen) == 20


def test_one_scenario_has_a_mean_alone(tmp_path):
    written = recorder().sample_to(tmp_path / "s", 1)
    assert np.isfinite(written.mean).all()
    assert written.standard_deviation.isna().all()


def test_tails_in_the_same_pass(tmp_path):
    generator = GENERATORS["Student t"].fit(panel())
    tails, equal = StreamingTails(), StreamingTails({"equal": pd.Series(1 / 3, ["A2", "A1", "A0"])})
    path = generator.sample_to(tmp_path / "s", 5000, chunk=1000, statistics=[tails, equal]).path
    rows = pd.read_parquet(path)
    assert tails.count == equal.count == 5000
    alone = StreamingTails()
    generator.sample_to(tmp_path / "s", 5000, chunk=1000, statistics=alone)
    pd.testing.assert_frame_equal(alone.table(), tails.table(), check_exact=True)
    for level in (0.01, 0.05):
        pd.testing.assert_series_equal(tails.var(level), var(rows, level), rtol=2**-7)
        exact = expected_shortfall(rows.mean(axis=1), level)
        assert equal.expected_shortfall(level)["equal"] == pytest.approx(exact, rel=2**-7)


def test_memory_does_not_grow_with_the_number_of_scenarios(tmp_path):
    generator = recorder(d=50)
    generator.sample_to(tmp_path / "warm", 10)

    def peak(n):
        generator.calls_ = []
        tracemalloc.start()
        generator.sample_to(tmp_path / "s", n, chunk=500, statistics=[StreamingTails()])
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    few, many = peak(2000), peak(20_000)
    assert many < 1.05 * few
    assert many < 5 * 500 * 50 * 8 + 4e6  # the tails keep 24 kB an asset


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (3, 300), (300, 3), (128, 256), (129, 257)])
def test_transposing_piece_by_piece(rows, columns):
    x = np.random.default_rng(0).standard_normal((rows, columns))
    found = stream._transposed(x)
    np.testing.assert_array_equal(found, x.T)
    assert found.flags.c_contiguous


def test_a_bar_on_request(tmp_path, capsys):
    recorder().sample_to(tmp_path / "s", 30, chunk=10, progress=True)
    assert "sampling" in capsys.readouterr().err
    recorder().sample_to(tmp_path / "s", 30, chunk=10)
    assert capsys.readouterr() == ("", "")


# --------------------------------------------------------------------------------------- bad input


BAD = [
    ({"n_samples": 0}, "expected n_samples to be a positive integer, got 0"),
    ({"n_samples": 2.5}, "expected n_samples to be a positive integer, got 2.5"),
    ({"n_samples": True}, "expected n_samples to be a positive integer, got True"),
    ({"chunk": 0}, "expected chunk to be a positive integer, got 0"),
    ({"chunk": None}, "expected chunk to be a positive integer, got None"),
    ({"dtype": "float16"}, "expected dtype 'float64' or 'float32', got 'float16'"),
    ({"dtype": int}, "expected dtype 'float64' or 'float32'"),
    ({"random_state": -1}, "expected random_state"),
    ({"guidance": 1.0}, "expected no guidance for Recorder"),
    ({"statistics": [len]}, r"expected statistics with an update\(rows\) method"),
    ({"stress": {"A0": [0.1, 0.2]}}, "expected one return, a pair or 10 returns for 'A0'"),
    ({"n_samples": 10**15}, "GB of room in .* draw fewer scenarios, choose dtype='float32'"),
]


@pytest.mark.parametrize(("change", "message"), BAD)
def test_bad_arguments_are_refused_before_anything_is_drawn(tmp_path, change, message):
    generator = recorder()
    with pytest.raises(ValueError, match=message):
        generator.sample_to(tmp_path / "s", **{"n_samples": 10, **change})
    assert not generator.calls_
    assert contents(tmp_path) == set()
    if not {"dtype", "statistics"} & set(change) and change.get("n_samples") != 10**15:
        with pytest.raises(ValueError, match=message):
            generator.sample_chunks(**{"n_samples": 10, **change})  # not only at the first chunk


def test_an_unfitted_generator_and_broken_scenarios(tmp_path):
    with pytest.raises(NotFittedError):
        Recorder().sample_chunks(10)
    with pytest.raises(NotFittedError):
        Recorder().sample_to(tmp_path / "s", 10)
    generator = recorder()
    generator.scenarios_ = np.array([0.0, np.nan, 0.0])
    with pytest.raises(ValueError, match="expected finite scenarios, got NaN or infinity for asset number 1"):
        generator.sample_to(tmp_path / "s", 10)
    assert contents(tmp_path) == set()


# -------------------------------------------------------------------------------- the command line


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    from finediff.cli import main

    GENERATORS["Gaussian"].fit(panel()).save(tmp_path / "model")

    def call(*arguments):
        monkeypatch.setattr(
            sys, "argv", ["finediff", "sample", str(tmp_path / "model"), *map(str, arguments)]
        )
        try:
            main()
            code = 0
        except SystemExit as stop:
            code = stop.code or 0
        return code, *capsys.readouterr()

    return call


def test_a_name_without_ending_is_a_directory(run, tmp_path):
    out = tmp_path / "scenarios"
    code, text, error = run("-n", 300, "--chunk", 100, "--seed", 3, "--out", out)
    assert (code, error) == (0, "")
    assert text == f"300 scenarios of 3 assets, independent in time: {out}\n"
    drawn = pd.concat(GENERATORS["Gaussian"].sample_chunks(300, chunk=100, random_state=3))
    np.testing.assert_array_equal(pd.read_parquet(out), drawn)
    assert run("-n", 20, "--float32", "--out", out)[0] == 0
    assert pd.read_parquet(out)["A0"].dtype == np.float32
    code, _, error = run("-n", 20, "--out", tmp_path / "model")
    assert code == 2
    assert "nothing of yours is lost" in error
    code, _, error = run("-n", 20, "--float32", "--out", tmp_path / "s.parquet")
    assert code == 2
    assert "expected --float32 with a directory" in error
    assert not (tmp_path / "s.parquet").exists()


# ------------------------------------------------------------------------------------------- gaps


def with_gaps() -> pd.DataFrame:
    X = panel()
    X.iloc[:50, 1] = np.nan
    X.iloc[7] = np.nan
    return X


def test_a_generator_that_takes_gaps_meets_them():
    X = with_gaps()
    generator = Recorder(random_state=0).fit(X)
    np.testing.assert_array_equal(generator.seen_, X)
    np.testing.assert_array_equal(Recorder().fit(X.to_numpy()).seen_, X)
    np.testing.assert_array_equal(Recorder().fit(X.to_numpy().tolist()).seen_, X)
    np.testing.assert_array_equal(Recorder().fit(X.astype("Float64")).seen_, X)
    assert generator.n_samples_fit_ == len(X)
    assert generator.__sklearn_tags__().input_tags.allow_nan
    with pytest.raises(ValueError, match="got NaN \\(a missing value\\) in column 'A0'"):
        GENERATORS["Gaussian"].fit(X)
    assert not GENERATORS["Gaussian"].__sklearn_tags__().input_tags.allow_nan


def test_what_a_gap_does_not_excuse():
    X = with_gaps()
    for bad, message in (
        (X.assign(A2=np.nan), "expected a return of each asset, got none in column 'A2' \\(number 2\\)"),
        (X.assign(A2=np.inf), "got infinity \\(inf\\) in column 'A2'"),
        (X.assign(A2="high"), "got text in column 'A2'"),
        (X.assign(A2=X.index), "got dates in column 'A2'"),
        (X * 0, "expected returns that vary, got the same row 200 times"),
    ):
        with pytest.raises(ValueError, match=message):
            Recorder().fit(bad)
    for rows in (X.assign(A2=np.nan).to_numpy(), X.assign(A2=np.nan).to_numpy().tolist()):
        with pytest.raises(ValueError, match="got none in column 2 \\(number 2\\)"):
            Recorder().fit(rows)


@pytest.mark.filterwarnings("error")
def test_guesses_look_past_gaps():
    Recorder().fit(with_gaps())
    prices = 100 * (1 + with_gaps()).cumprod()
    with pytest.warns(UserWarning, match="look like prices"):
        Recorder().fit(prices)
