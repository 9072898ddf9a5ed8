"""finediff on the command line: the pipeline's verbs.

Panels come as CSV or Parquet (first column dates), results go to Parquet, CSV or a directory with a manifest.json
beside them; each appears whole or not at all. Bad input is one sentence on standard error and exit code 2.
"""

from __future__ import annotations

import sys
import warnings

import typer.main

# Importing the verbs attaches them, in the order of the help.
from finediff.cli import study  # noqa: F401  isort: skip
from finediff.cli import steps  # noqa: F401  isort: skip
from finediff.cli import portfolio  # noqa: F401  isort: skip
from finediff.cli import backtest  # noqa: F401  isort: skip
from finediff.cli.app import app
from finediff.cli.files import say
from finediff.cli.stops import (
    READER_LEFT,
    caught,
    drop_unwritten,
    open_streams,
    reader_left,
    stopped,
    watch_signals,
    worker_killed,
)
from finediff.cli.usage import UsageError, sentence


def main() -> None:
    """Entry point: bad input is one sentence and exit code 2, a stop one line and 128 plus the signal."""
    watch_signals()
    open_streams()
    warnings.showwarning = lambda message, *_, **__: say(f"warning: {message}")
    code = 0
    try:
        code = _run(sys.argv[1:])
        sys.stdout.flush()  # here, where a reader that left can still be answered
    except BrokenPipeError:
        if not reader_left():
            raise
        code = READER_LEFT
    except OSError as problem:
        drop_unwritten()
        if code <= 128:  # else it was stopped, perhaps with its terminal
            code = 2
            say(
                f"error: expected to write standard output, got an error ({problem.strerror}): send it elsewhere"
            )
    if code:
        sys.exit(code)


def _run(arguments: list[str]) -> int:
    """The exit code."""
    command = None
    try:
        command = typer.main.get_command(app)
        # Not app(): it would end a Ctrl-C in silence, and a wrong option in several lines.
        with command.make_context("finediff", list(arguments)) as context:
            command.invoke(context)
    except typer.Exit as end:
        return end.exit_code
    except UsageError as problem:
        if arguments:
            say(f"error: {sentence(problem, command, arguments)}")
        else:
            problem.show()  # the help
        return 2
    except BaseException as problem:
        caught()
        stop = stopped(problem)
        if stop is not None:
            say(stop[1])
            return stop[0]
        if isinstance(problem, BrokenPipeError) and reader_left():
            return READER_LEFT
        killed = worker_killed(problem)
        if killed is not None:
            say(f"error: {killed}")
            return 1
        if not isinstance(problem, ValueError | TypeError | OSError):
            raise
        say(f"error: {problem}")
        return 2
    finally:
        caught()
    return 0
