"""finediff on the command line: the pipeline's verbs.

Panels come as CSV or Parquet (first column dates), results go to Parquet, CSV or a directory with a manifest.json
beside them; each appears whole or not at all. Bad input is one sentence on standard error and exit code 2.
"""

from __future__ import annotations

import signal
import sys
import warnings

# Importing the verbs attaches them, in the order of the help.
from finediff.cli import study  # noqa: F401  isort: skip
from finediff.cli import steps  # noqa: F401  isort: skip
from finediff.cli import portfolio  # noqa: F401  isort: skip
from finediff.cli import backtest  # noqa: F401  isort: skip
from finediff.cli.app import app
from finediff.cli.files import say


def main() -> None:
    """Entry point: bad input is one sentence and exit code 2."""
    # A polite kill unwinds like any other exit, so that partial files are removed on the way out.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    warnings.showwarning = lambda message, *_, **__: say(f"warning: {message}")
    try:
        app()
    except (ValueError, TypeError, OSError) as problem:
        say(f"error: {problem}")
        sys.exit(2)
    except KeyboardInterrupt:
        say("stopped: nothing was written")
        sys.exit(130)
