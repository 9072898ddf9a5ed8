"""Manifests tell panels apart; files appear whole or not at all."""

import json
import os

import numpy as np
import pandas as pd
import pytest

from finediff.provenance import (
    data_hash,
    manifest,
    missing_packages,
    whole_directory,
    whole_file,
    write_manifest,
)


def panel() -> pd.DataFrame:
    return pd.DataFrame({"A": [0.01, 0.02], "B": [0.0, -0.01]}, index=pd.date_range("2020-01-01", periods=2))


def test_the_hash_sees_values_names_dates_and_order():
    base = panel()
    others = [
        base + 1e-19 * (base == 0.01),  # below one unit in the last place of .01: the same panel
        base.rename(columns={"A": "a"}),
        base.iloc[::-1],
        base[["B", "A"]],
        base.set_axis(base.index + pd.Timedelta(days=1)),
        base * (1 + 1e-15),
    ]
    hashes = [data_hash(other) for other in others]
    assert hashes[0] == data_hash(base) == data_hash(base.copy())
    assert len({data_hash(base), *hashes[1:]}) == len(others)


def test_a_manifest_is_json_with_everything_needed_to_repeat(tmp_path):
    about = manifest(command="fit", configuration={"steps": 5, "path": tmp_path}, seed=3, data=panel())
    write_manifest(tmp_path / "manifest.json", about)
    back = json.loads((tmp_path / "manifest.json").read_text())
    assert back == about
    assert back["configuration"] == {"steps": 5, "path": str(tmp_path)}
    assert back["data"] | {"sha256": ""} == {
        "sha256": "",
        "rows": 2,
        "assets": ["A", "B"],
        "first": "2020-01-01 00:00:00",
        "last": "2020-01-02 00:00:00",
    }
    assert back["versions"]["numpy"] == np.__version__
    assert missing_packages() == []


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    target = tmp_path / "deep" / "result.csv"
    with whole_file(target) as partial:
        partial.write_text("first")
        assert not target.exists()
    with pytest.raises(RuntimeError, match="half way"), whole_file(target) as partial:
        partial.write_text("second, but")
        raise RuntimeError("half way")
    assert target.read_text() == "first"
    assert os.listdir(target.parent) == ["result.csv"]
    with pytest.raises(ValueError, match="expected a file to write, got the directory"), whole_file(tmp_path):
        pass
    with pytest.raises(ValueError, match="expected a directory at"), whole_file(target / "x" / "y.csv"):
        pass


def test_a_directory_is_replaced_whole_or_not_at_all(tmp_path):
    target = tmp_path / "results"
    for text in ("first", "second"):
        with whole_directory(target, marker="manifest.json") as partial:
            (partial / "manifest.json").write_text(text)
            (partial / f"{text}.txt").write_text(text)
    assert sorted(os.listdir(target)) == ["manifest.json", "second.txt"]
    with pytest.raises(RuntimeError), whole_directory(target, marker="manifest.json") as partial:
        (partial / "manifest.json").write_text("third")
        raise RuntimeError
    assert (target / "manifest.json").read_text() == "second"
    assert os.listdir(tmp_path) == ["results"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "work.txt").write_text("years")
    with (
        pytest.raises(ValueError, match="nothing of yours is lost"),
        whole_directory(tmp_path / "mine", marker="manifest.json"),
    ):
        pass
    assert (tmp_path / "mine" / "work.txt").read_text() == "years"
