"""Where a result comes from, and how it reaches the disk: manifests, and files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import shutil
import subprocess
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import pandas as pd

PACKAGES = (
    "finediff torch numpy scipy pandas scikit-learn statsmodels arch cvxpy-base clarabel skfolio yfinance pyarrow "
    "safetensors typer rich jinja2 matplotlib joblib"
).split()


def package_versions() -> dict[str, str | None]:
    """Installed versions of everything finediff builds on; None where a package is missing."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def data_hash(frame: pd.DataFrame) -> str:
    """SHA-256 of a panel's names, index and values, as hexadecimal; independent of the file it came from."""
    digest = hashlib.sha256()
    for part in (map(str, frame.columns), map(str, frame.index)):
        digest.update("\x1f".join(part).encode())
    digest.update(np.ascontiguousarray(frame.to_numpy(dtype=np.float64)).tobytes())
    return digest.hexdigest()


def source_commit() -> str | None:
    """Commit of the source tree finediff runs from, "-dirty" where it was changed; None for an installed copy."""
    here = Path(__file__).resolve().parent

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(here), *arguments], capture_output=True, text=True, timeout=10, check=True
        )
        return done.stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")) != here.parent:
            return None
        return git("rev-parse", "HEAD") + ("-dirty" if git("status", "--porcelain") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def manifest(*, command: str, configuration: dict, seed, data: pd.DataFrame | None = None) -> dict:
    """Everything needed to repeat a result: data hash, versions, commit, configuration, seed, time (UTC)."""
    about: dict = {
        "command": command,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "seed": seed,
        "configuration": {
            k: v if isinstance(v, int | float | bool | type(None)) else str(v)
            for k, v in configuration.items()
        },
        "commit": source_commit(),
        "platform": f"{platform.system()} {platform.machine()}",
        "versions": package_versions(),
    }
    if data is not None:
        about["data"] = {
            "sha256": data_hash(data),
            "rows": len(data),
            "assets": [str(name) for name in data.columns],
            "first": str(data.index[0]) if len(data) else None,
            "last": str(data.index[-1]) if len(data) else None,
        }
    return about


@contextlib.contextmanager
def whole_file(path) -> Iterator[Path]:
    """A name to write to beside ``path``; on success it takes the place of ``path``, otherwise it is removed.

    Examples
    --------
    >>> import tempfile
    >>> target = Path(tempfile.mkdtemp()) / "result.txt"
    >>> with whole_file(target) as partial:
    ...     _ = partial.write_text("complete")
    >>> target.read_text()
    'complete'
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"expected a file to write, got the directory {path}: give a file name in it")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise ValueError(
            f"expected a directory at {path.parent}, got a file: choose another place for {path.name}"
        ) from None
    partial = path.with_name(f".{path.stem}.{uuid.uuid4().hex[:8]}.partial{path.suffix}")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def refuse_foreign(path: Path, marker: str) -> None:
    """Raise ValueError where a directory of results would replace something that is not one; costs nothing, ask first."""
    if path.exists() and not (path / marker).exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(
            f"expected a new directory, or one written before (it holds {marker}), got {path}: choose another name, "
            "so that nothing of yours is lost"
        )


@contextlib.contextmanager
def whole_directory(path, *, marker: str) -> Iterator[Path]:
    """As `whole_file` for a directory of results; an old one is replaced only if it holds the file ``marker``."""
    path = Path(path)
    refuse_foreign(path, marker)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.partial")
    partial.mkdir()
    try:
        yield partial
        if path.exists():
            old = partial.with_suffix(".old")
            os.replace(path, old)
            os.replace(partial, path)
            shutil.rmtree(old)
        else:
            os.replace(partial, path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_manifest(path, about: dict) -> None:
    """Write a manifest as JSON, whole."""
    with whole_file(path) as partial:
        partial.write_text(json.dumps(about, indent=2) + "\n")


def missing_packages() -> list[str]:
    """Names among finediff's dependencies that are not installed."""
    return [name for name, found in package_versions().items() if found is None]
