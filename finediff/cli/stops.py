"""How a command ends early: stopped by a signal, or left by whoever read its output."""

from __future__ import annotations

import os
import select
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

READER_LEFT = 141  # what a shell reports of a program that wrote to a pipe without a reader: 128 + SIGPIPE
_LOST = "nothing was written"


class Terminated(KeyboardInterrupt):
    """A polite kill. It unwinds as Ctrl-C does, so that partial files are removed on the way out."""


def watch_signals() -> None:
    """From here on a polite kill is an exception."""

    def terminate(*_):
        raise Terminated

    signal.signal(signal.SIGTERM, terminate)


@contextmanager
def kept(sentence: Callable[[], str]) -> Iterator[None]:
    """Of work that a stop does not lose whole: ``sentence`` says what is left of it, and how to go on."""
    try:
        yield
    except BaseException as problem:
        stop = _stop(problem)
        if stop is not None:
            stop.add_note(sentence())
        raise


def stopped(problem: BaseException) -> tuple[int, str] | None:
    """Exit code and sentence where a signal is behind ``problem``, else None."""
    stop = _stop(problem)
    if stop is None:
        return None
    number = signal.SIGTERM if isinstance(stop, Terminated) else signal.SIGINT
    return 128 + number, f"stopped: {next(iter(getattr(stop, '__notes__', [])), _LOST)}"


def reader_left() -> bool:
    """Whether standard output or standard error is a pipe that nobody reads; what is left for it is dropped."""
    left = False
    for stream in (sys.stdout, sys.stderr):
        if _unread(stream):
            # Python flushes once more on its way out, and would complain there.
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
            left = True
    return left


def _unread(stream) -> bool:
    try:
        stream.flush()
    except BrokenPipeError:
        return True
    try:
        # Without a buffer nothing is left that a flush could fail on.
        poll = select.poll()
        poll.register(stream.fileno(), 0)
        return any(event & select.POLLERR for _, event in poll.poll(0))
    except (AttributeError, OSError, ValueError):  # no such call on Windows, no file behind the stream
        return False


def _stop(problem: BaseException | None) -> KeyboardInterrupt | None:
    """The signal in a chain of errors: Ctrl-C reaches the workers too, and their end may be what is raised."""
    while problem is not None and not isinstance(problem, KeyboardInterrupt):
        problem = problem.__cause__ or problem.__context__
    return problem
