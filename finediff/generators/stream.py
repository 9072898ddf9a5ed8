"""More scenarios than fit into memory: drawn chunk by chunk, and written to a directory of Parquet files.

    chunk i of n/c:    rows i c .. (i + 1) c - 1, from a seed of its own, child i of the draw's SeedSequence
    moments            of what is written, merged chunk by chunk (`finediff.covariance.scenario.RunningMoments`)

The first scenarios of a long draw are therefore those of a short one with the same seed and chunk, and memory
is that of a few chunks whatever the number of scenarios.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path

import numpy as np
import pandas as pd
from sklearn.utils.validation import check_is_fitted

from finediff.covariance.scenario import RunningMoments
from finediff.generators.checks import positive_integer
from finediff.generators.training import progress_bar
from finediff.provenance import manifest, refuse_foreign, whole_directory

# Readers of Parquet directories pass over names that begin so.
MARKER = "_manifest.json"
_FORMAT = 1
_STREAM = 2  # beside the 0 of fit and the 1 of sample
_FILE = 2**28  # bytes: small chunks share a file, as row groups
_TILE = 128  # entries a side of the pieces that are transposed at once


@dataclass(frozen=True, eq=False)
class ScenarioDataset:
    """What was written, and its moments: of the numbers in the files.

    Attributes
    ----------
    path : Path
        The directory; ``pandas.read_parquet(path)`` or ``pyarrow.dataset.dataset(path)`` reads it.
    n_samples : int
    mean, standard_deviation : Series or array (d,)
        Returns per period; the latter with n - 1 in the denominator, NaN for one scenario.
    covariance : DataFrame or array (d, d), or None
        Where it was asked for.
    """

    path: Path
    n_samples: int
    mean: pd.Series | np.ndarray
    standard_deviation: pd.Series | np.ndarray
    covariance: pd.DataFrame | np.ndarray | None = None


class Streaming:
    """The part of `ScenarioGenerator` that draws without keeping."""

    def sample_chunks(
        self, n_samples, *, chunk=8192, random_state=None, condition=None, stress=None, guidance=None
    ) -> Iterator[pd.DataFrame | np.ndarray]:
        """Draw scenarios a chunk at a time, in memory that does not grow with their number.

        Parameters
        ----------
        n_samples : int
            Number of scenarios, at least 1.
        chunk : int
            Scenarios drawn at once. Same seed and same chunk, same bits; another chunk is another draw of the
            same law.
        random_state, condition, stress, guidance
            As in `sample`; what has one row for each scenario is cut into chunks.

        Returns
        -------
        iterator of DataFrame or ndarray (chunk, d)
            As `sample` gives them, the index counting on; the last may be shorter. Arguments are checked at once,
            before the first chunk is asked for.

        Examples
        --------
        >>> from finediff.generators import GaussianGenerator
        >>> returns = np.tile([[0.01, 0.0], [-0.01, 0.02], [0.0, 0.01]], (20, 1))
        >>> generator = GaussianGenerator(random_state=0).fit(returns)
        >>> [rows.shape for rows in generator.sample_chunks(1000, chunk=400)]
        [(400, 2), (400, 2), (200, 2)]
        """
        check_is_fitted(self)
        n = positive_integer("n_samples", n_samples, "try sample_chunks(100_000)")
        chunk = positive_integer("chunk", chunk, "the default is 8192 scenarios")
        steering = self._steering(condition=condition, stress=stress, guidance=guidance)
        _part_of_steering(steering, slice(0, min(chunk, n)), n)  # refuses now what it would refuse later
        entropy = self._seed(random_state, _STREAM)

        def drawn():
            for i, start in enumerate(range(0, n, chunk)):
                part = slice(start, min(start + chunk, n))
                child = np.random.SeedSequence(entropy, spawn_key=(i,))
                seed = int(child.generate_state(1, np.uint64)[0] >> 1)
                given = _part_of_steering(steering, part, n)
                yield self._framed(self._sample(part.stop - start, seed, **given), start)

        return drawn()

    def sample_to(
        self,
        path,
        n_samples,
        *,
        chunk=8192,
        random_state=None,
        dtype="float64",
        covariance=False,
        statistics=(),
        progress=False,
        condition=None,
        stress=None,
        guidance=None,
    ) -> ScenarioDataset:
        """Draw scenarios to disk: a directory of Parquet files, one column an asset.

        The directory appears whole or not at all. One written before is replaced, anything else is left alone.

        Parameters
        ----------
        path : path
            The directory. ``pandas.read_parquet`` and ``pyarrow.dataset`` read it; ``_manifest.json`` in it says what
            was drawn, from which generator and seed.
        n_samples, chunk, random_state, condition, stress, guidance
            As in `sample_chunks`, whose scenarios these are. Memory is about four chunks, 4 chunk d numbers.
        dtype : {"float64", "float32"}
            Of the files. float64 keeps every bit; float32 rounds to 7 digits and halves the disk space.
        covariance : bool
            Whether to accumulate it as well: n d^2 operations, far more than drawing from a factor model takes.
        statistics : object with ``update(rows)``, or several
            Each is given every chunk as it is written, so that one pass does all:
            `finediff.risk.StreamingTails()` for value at risk and expected shortfall.
        progress : bool or None
            A bar on standard error; None shows it on a terminal only.

        Returns
        -------
        ScenarioDataset
            With mean and standard deviation of what was written.

        Raises
        ------
        ValueError
            A path that is something else already, too little room on the disk, scenarios that are not finite, or
            arguments that `sample_chunks` refuses.

        Examples
        --------
        >>> import tempfile
        >>> from finediff.generators import GaussianGenerator
        >>> returns = np.tile([[0.01, 0.0], [-0.01, 0.02], [0.0, 0.01]], (20, 1))
        >>> generator = GaussianGenerator(random_state=0).fit(returns)
        >>> written = generator.sample_to(tempfile.mkdtemp(), 10_000, random_state=1)
        >>> pd.read_parquet(written.path).shape
        (10000, 2)
        """
        if dtype not in ("float64", "float32", np.float64, np.float32):
            raise ValueError(f"expected dtype 'float64' or 'float32', got {dtype!r}: choose one of them")
        statistics = tuple(statistics) if isinstance(statistics, Iterable) else (statistics,)
        strays = [one for one in statistics if not callable(getattr(one, "update", None))]
        if strays:
            raise ValueError(
                f"expected statistics with an update(rows) method, got {strays[0]!r}: [StreamingTails()]"
            )
        chunks = self.sample_chunks(
            n_samples,
            chunk=chunk,
            random_state=random_state,
            condition=condition,
            stress=stress,
            guidance=guidance,
        )
        path, dtype, d = Path(path), np.dtype(dtype), self.n_features_in_
        _refuse_place(path, n_samples * d * dtype.itemsize)
        names = [str(name) for name in getattr(self, "feature_names_in_", range(d))]
        moments, count = RunningMoments(d, full=covariance), -(-n_samples // chunk)
        with (
            whole_directory(path, marker=MARKER) as partial,
            _Parts(partial, names, n_samples, dtype, max(1, _FILE // (chunk * d * dtype.itemsize))) as parts,
            progress_bar("sampling", progress)(range(count)) as steps,
        ):
            for _ in steps:
                rows = next(chunks)
                if dtype != np.float64:
                    rows = rows.astype(dtype)
                columns = _transposed(np.asarray(rows))
                moments.update(columns, _centre(columns))
                parts.write(columns)
                for one in statistics:
                    one.update(rows)
                del rows, columns  # or the next chunk is drawn beside this one
            parts.close()
            about = self._about_dataset(random_state, parts, chunk, dtype)
            (partial / MARKER).write_text(json.dumps(about, indent=2) + "\n")
        return _dataset(path, moments, names if hasattr(self, "feature_names_in_") else None)

    def _about_dataset(self, random_state, parts: _Parts, chunk: int, dtype: np.dtype) -> dict:
        seed = self.random_state if random_state is None else random_state
        return manifest(
            command="sample_to",
            configuration=self.get_params(deep=False),
            seed=int(seed) if isinstance(seed, Integral) else None,
        ) | {
            "format": _FORMAT,
            "generator": type(self).__name__,
            "scenarios": parts.rows,
            "chunk": int(chunk),
            "dtype": dtype.name,
            "files": parts.files,
            "assets": parts.names,
        }


class _Parts:
    """part-00000.parquet, part-00001.parquet, ...: each a few chunks, so that no footer grows with their number.

    Plain and uncompressed: random digits shrink by 7 % at best, at twice the time.
    """

    def __init__(self, folder: Path, names: list[str], n: int, dtype: np.dtype, chunks_per_file: int) -> None:
        import pyarrow as pa

        self.folder, self.names, self.chunks_per_file = folder, names, chunks_per_file
        self.files: list[dict] = []
        self.rows = 0
        self._writer, self._chunks = None, 0
        schema = pa.Schema.from_pandas(pd.DataFrame(np.empty((0, len(names)), dtype), columns=names))
        about = json.loads(schema.metadata[b"pandas"])
        # The index of the whole directory; pandas passes over it where the length is another.
        about["index_columns"] = [
            {"kind": "range", "name": "scenario", "start": 0, "stop": int(n), "step": 1}
        ]
        self.schema = schema.with_metadata({b"pandas": json.dumps(about).encode()})

    def write(self, columns: np.ndarray) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        if self._writer is None:
            name = f"part-{len(self.files):05d}.parquet"
            self.files.append({"name": name, "rows": 0})
            self._writer = pq.ParquetWriter(
                self.folder / name,
                self.schema,
                compression="NONE",
                use_dictionary=False,
                write_statistics=False,
            )
        table = pa.Table.from_arrays([pa.array(column) for column in columns], schema=self.schema)
        self._writer.write_table(table, row_group_size=columns.shape[1])
        self.rows += columns.shape[1]
        self.files[-1]["rows"] += columns.shape[1]
        self._chunks += 1
        if self._chunks % self.chunks_per_file == 0:
            self.close()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def __enter__(self) -> _Parts:
        return self

    def __exit__(self, *_) -> None:
        self.close()


def _centre(columns: np.ndarray) -> np.ndarray:
    """Means (d,) of scenarios (d, k), or ValueError where one is not finite."""
    centre = columns.mean(axis=1, dtype=np.float64)
    if not np.isfinite(centre).all():
        raise ValueError(
            f"expected finite scenarios, got NaN or infinity for asset number {int(np.argmin(np.isfinite(centre)))}: "
            "check the panel, and choose dtype='float64' if its numbers are very large"
        )
    return centre


def _dataset(path: Path, moments: RunningMoments, names: list[str] | None) -> ScenarioDataset:
    spread = moments.covariance()
    mean, sd = moments.mean, np.sqrt(np.diag(spread) if moments.full else spread)
    covariance = spread if moments.full else None
    if names is not None:
        mean, sd = pd.Series(mean, names), pd.Series(sd, names)
        covariance = pd.DataFrame(spread, names, names) if moments.full else None
    return ScenarioDataset(path, moments.count, mean, sd, covariance)


def _transposed(rows: np.ndarray) -> np.ndarray:
    """Rows (k, d) as contiguous columns (d, k), piece by piece: five times quicker than numpy where d is large."""
    k, d = rows.shape
    columns = np.empty((d, k), rows.dtype)
    for top in range(0, k, _TILE):
        for left in range(0, d, _TILE):
            columns[left : left + _TILE, top : top + _TILE] = rows[top : top + _TILE, left : left + _TILE].T
    return columns


def _refuse_place(path: Path, size: int) -> None:
    """Raise ValueError for a directory that cannot be written, before anything is drawn."""
    refuse_foreign(path, MARKER)
    above = next(parent for parent in path.absolute().parents if parent.exists())
    if not above.is_dir():
        raise ValueError(f"expected a directory at {above}, got a file: choose another place for {path.name}")
    free = shutil.disk_usage(above).free
    if size > free:
        raise ValueError(
            f"expected {size / 1e9:,.1f} GB of room in {above}, got {free / 1e9:,.1f} GB: draw fewer scenarios, choose "
            "dtype='float32' or another disk"
        )


def _part_of_steering(steering: dict, part: slice, n: int) -> dict:
    """What steers the scenarios of one chunk out of n."""
    found = {**steering}
    if "condition" in steering:
        found["condition"] = _part_of_condition(steering["condition"], part, n)
    if isinstance(stress := steering.get("stress"), Mapping):
        found["stress"] = {asset: _part_of_stress(asset, value, part, n) for asset, value in stress.items()}
    return found


def _part_of_condition(condition, part: slice, n: int):
    if isinstance(condition, Mapping) or np.ndim(condition) == 0:
        return condition
    if len(condition) == n:
        return condition.iloc[part] if hasattr(condition, "iloc") else condition[part]
    if isinstance(condition, pd.DataFrame | pd.Series) or np.ndim(condition) == 2:
        if len(condition) != 1:
            raise ValueError(f"expected conditions for 1 or {n} scenarios, got {len(condition)} rows")
        return condition
    return pd.DataFrame([list(condition)])  # one condition for all, not a column of them


def _part_of_stress(asset, value, part: slice, n: int):
    if isinstance(value, tuple) and len(value) == 2:
        return tuple(_part_of_stress(asset, end, part, n) for end in value)
    if np.ndim(value) == 0:
        return value
    if np.shape(value) != (n,):
        raise ValueError(f"expected one return, a pair or {n} returns for {asset!r}, got {value!r}")
    return np.asarray(value)[part]
