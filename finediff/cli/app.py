"""The command line's application object, to which the verbs attach themselves."""

from __future__ import annotations

import typer

app = typer.Typer(
    name="finediff",
    help="Market scenarios from diffusion and flow models, up to a risk report.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
