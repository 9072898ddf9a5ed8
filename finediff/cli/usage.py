"""A command called wrongly, as one sentence: expected, got, why, what to do.

typer explains itself in several lines that differ from version to version. Here only the kind of error and the
command it happened in are asked of it; options, choices and ranges are read from the signature of the verb.
"""

from __future__ import annotations

import difflib
import inspect
import re
from enum import Enum
from typing import Annotated, get_args, get_origin, get_type_hints

import typer

UsageError = typer.BadParameter.__base__  # has no name of its own in typer
_KINDS = {int: "a whole number", float: "a number", bool: "true or false"}


def sentence(problem, command, arguments: list[str]) -> str:
    """What was wrong with ``arguments``.

    Parameters
    ----------
    problem : UsageError
        As typer raised it.
    command : Group
        finediff itself.
    arguments : list of str
        As they were typed.
    """
    verb = next((command.commands[word] for word in arguments if word in command.commands), command)
    name = "finediff" if verb is command else f"finediff {verb.name}"
    kind, message = type(problem).__name__, problem.format_message()
    look = f"{name} --help"
    if kind == "NoSuchOption":
        known = [option for p in verb.params for option in (*p.opts, *p.secondary_opts) if option[0] == "-"]
        return f"expected an option of {name}, got {problem.option_name}: {_nearest(problem.option_name, [*known, '--help'], look)}"
    if kind == "MissingParameter" and problem.param is not None:
        what = f" ({problem.param.help.rstrip('.')})" if getattr(problem.param, "help", None) else ""
        return f"expected {problem.param.name}{what} after {name}, got none: {look} shows how"
    if kind == "BadOptionUsage" and "requires" in message:
        return f"expected a value after {problem.option_name}, got none: {look} says what it takes"
    if kind == "BadOptionUsage":
        return f"expected {problem.option_name} without a value, got one: leave it out"
    if "unexpected extra argument" in message:
        extra = re.search(r"\(([^()]*)\)$", message)
        wanted = [p.name for p in verb.params if p.param_type_name == "argument"]
        return (
            f"expected {' '.join(wanted) or 'no argument'} after {name}, got {extra[1] if extra else 'more'} besides: "
            f"every other option begins with --, see {look}"
        )
    if verb is command:
        word = next((word for word in arguments if word[:1] != "-"), "")
        return f"expected a command of finediff, got {word!r}: {_nearest(word, list(command.commands), look)}"
    if getattr(problem, "param", None) is not None:
        return _wrong_value(problem.param, verb, arguments, message, look)
    return f"expected other arguments of {name}, got an error ({' '.join(message.split())}): see {look}"


def _wrong_value(param, verb, arguments, message, look) -> str:
    """Of an option whose value has the wrong type, is out of its range, or is none of its choices."""
    hint = get_type_hints(inspect.unwrap(verb.callback), include_extras=True)[param.name]
    types, option = list(_types(hint)), max(param.opts, key=len)
    values = list(_given(param.opts, arguments))
    choices = [choice.value for kind in types if issubclass(kind, Enum) for choice in kind]
    if choices:
        got = next((value for value in values if value not in choices), "none of them")
        return f"expected {option} among {', '.join(choices)}, got {got!r}: {_nearest(got, choices)}"
    number = next((_KINDS[kind] for kind in types if kind in _KINDS), None)
    if number is None or not values:
        return f"expected another value of {option}, got an error ({' '.join(message.split())}): see {look}"
    info = get_args(hint)[1] if get_origin(hint) is Annotated else None
    low, high = getattr(info, "min", None), getattr(info, "max", None)
    ends = [f"{word} {end}" for word, end in (("at least", low), ("at most", high)) if end is not None]
    wanted = number + (f", {' and '.join(ends)}" if ends else "")
    return f"expected {option} to be {wanted}, got {values[-1]!r}: correct it, or see {look}"


def _types(hint):
    """The plain classes in a type: int of ``Annotated[list[int] | None, ...]``."""
    if get_origin(hint) is Annotated:
        hint = get_args(hint)[0]
    if isinstance(hint, type) and get_origin(hint) is None:
        yield hint
        return
    for part in get_args(hint):
        yield from _types(part)


def _given(options, arguments):
    """Values of an option as they were typed."""
    for word, following in zip(arguments, [*arguments[1:], ""]):
        for option in options:
            if word == option:
                yield following
            elif word.startswith(f"{option}="):
                yield word[len(option) + 1 :]
            elif len(option) == 2 and word.startswith(option):
                yield word[2:]


def _nearest(word: str, known: list[str], look: str = "") -> str:
    """The remedy for a misspelt word."""
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.65)
    return (
        f"did you mean {near[0]}?"
        if near
        else f"{look} lists what there is"
        if look
        else "choose one of them"
    )
