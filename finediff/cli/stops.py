"""How a command ends early: stopped by a signal, without a worker, or left by whoever read its output."""

from __future__ import annotations

import atexit
import os
import re
import select
import signal
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import BrokenExecutor
from contextlib import contextmanager

READER_LEFT = 141  # what a shell reports of a program that wrote to a pipe without a reader: 128 + SIGPIPE
_LOST = "nothing was written"
# A terminal that closes and an impatient Ctrl-C send several; the way out is not interrupted by the others. But the
# first may be lost (what is raised while an object is deleted is) or end in a wait for workers that are gone: it is
# raised again until the way out has been found.
_DEAF = 5.0  # seconds
_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


class Terminated(KeyboardInterrupt):
    """A polite kill, or a closed terminal. It unwinds as Ctrl-C does, so that partial files are removed on the way out."""

    def __init__(self, number: int):
        super().__init__()
        self.number = number


def watch_signals() -> None:
    """From here on a polite kill and a closed terminal are exceptions, and the first signal is the one that counts."""
    last = float("-inf")

    def stop(number, _):
        nonlocal last
        if time.monotonic() - last < _DEAF:
            return
        last = time.monotonic()
        _again(number)
        raise KeyboardInterrupt if number == signal.SIGINT else Terminated(number)

    # What is ignored stays so: nohup, a job in the background.
    watched = [number for number in _SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    for number in watched:
        signal.signal(number, stop)

    def ignore():
        for number in watched:
            signal.signal(number, signal.SIG_IGN)

    # Python's last steps would restore the defaults, and a signal then change the exit code.
    atexit.register(ignore)


def _again(number: int) -> None:
    """Send the signal anew after a while, and so on, until `caught`."""
    if not hasattr(signal, "setitimer"):
        return

    def remind(*_):
        raise KeyboardInterrupt if number == signal.SIGINT else Terminated(number)

    signal.signal(signal.SIGALRM, remind)
    signal.setitimer(signal.ITIMER_REAL, _DEAF, _DEAF)


def caught() -> None:
    """The way out is found."""
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_REAL, 0)


def open_streams() -> None:
    """A stream that was closed (``finediff check p.csv >&-``) is None: from here on it takes what it is given."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 (open until the end)


@contextmanager
def kept(sentence: Callable[[], str]) -> Iterator[None]:
    """Of work that a stop does not lose whole: ``sentence`` says what is left of it, and how to go on."""
    try:
        yield
    except BaseException as problem:
        stop = _stop(problem) or _without_worker(problem)
        if stop is not None:
            stop.add_note(sentence())
        raise


def stopped(problem: BaseException) -> tuple[int, str] | None:
    """Exit code and sentence where a signal is behind ``problem``, else None."""
    stop = _stop(problem)
    if stop is None:
        return None
    number = stop.number if isinstance(stop, Terminated) else signal.SIGINT
    return 128 + number, f"stopped: {_note(stop)}"


def worker_killed(problem: BaseException) -> str | None:
    """The sentence where the end of a worker is behind ``problem``, else None."""
    death = _without_worker(problem)
    if death is None:
        return None
    how = re.search(r"(SIG[A-Z]+)\(", str(death))
    return (
        f"expected the workers to live, got one killed by the system{f' ({how[1]})' if how else ''}, usually because memory "
        f"ran out: choose fewer --jobs; {_note(death)}"
    )


def reader_left() -> bool:
    """Whether standard output or standard error is a pipe that nobody reads; what is left for it is dropped."""
    left = False
    for stream in (sys.stdout, sys.stderr):
        if _unread(stream):
            drop(stream)
            left = True
    return left


def drop(stream) -> None:
    """What could not be written, and what follows, goes nowhere: Python flushes once more on its way out."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def drop_unwritten() -> None:
    """`drop` for the streams that cannot be written, as on a full disk."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            drop(stream)


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


def _note(problem: BaseException) -> str:
    return next(iter(getattr(problem, "__notes__", [])), _LOST)


def _without_worker(problem: BaseException) -> BaseException | None:
    # By its name: joblib takes long to import, and keeps it in a module of its own.
    named = type(problem).__name__ == "TerminatedWorkerError"
    return problem if named and isinstance(problem, BrokenExecutor) else None


def _stop(problem: BaseException | None) -> KeyboardInterrupt | None:
    """The signal in a chain of errors: Ctrl-C reaches the workers too, and their end may be what is raised."""
    while problem is not None and not isinstance(problem, KeyboardInterrupt):
        problem = problem.__cause__ or problem.__context__
    return problem
