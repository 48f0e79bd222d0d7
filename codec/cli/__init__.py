"""The command line: one module a command, imported when the command runs.

    sgacodec ─► main ─► encode ┐                      ┌─► files    names of inputs and outputs, writing
                        decode ┴► batch ─► api.Codec ─┴─► output   messages, JSON, progress
                        info ───► bitstream           (no torch, no numpy)
                        models ─► models
                        eval, train

Nothing here imports torch, numpy or Pillow before a command needs it, so `--help` answers at once. The module
of a command holds it under the name `command`.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import os
from collections.abc import Iterator
from typing import Any

import click

from . import output, streams
from .exits import FAILED, INTERRUPTED, debugging, exit_code, one_line
from .output import Output

# name: its line in the list of commands (kept here, so that listing imports no command)
_COMMANDS = {
    "encode": "Compress images to .sga files.",
    "decode": "Turn .sga files back into images.",
    "info": "Show what .sga files hold, without decoding them.",
    "models": "List, show, import and verify models.",
    "eval": "Measure rate and distortion over images; write tables, plots and a report.",
    "train": "Train a model.",
}


class _LazyGroup(click.Group):
    """A group that imports a command when it is used, and prints every error as one line."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [name for name in _COMMANDS if importlib.util.find_spec(f"{__name__}.{name}")]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self.list_commands(ctx):
            return None
        command: click.Command = importlib.import_module(f".{cmd_name}", __name__).command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, _COMMANDS[name]) for name in self.list_commands(ctx)])

    def make_context(self, *args: Any, **kwargs: Any) -> click.Context:
        streams.fill_missing()
        with _errors_reported():
            return super().make_context(*args, **kwargs)

    def invoke(self, ctx: click.Context) -> object:
        with _errors_reported():
            result = super().invoke(ctx)
            streams.flush_output()
            return result


@contextlib.contextmanager
def _errors_reported() -> Iterator[None]:
    """Print an error of the block on standard error, and end the program with its exit code."""
    try:
        yield
    except (click.exceptions.Exit, click.Abort):
        streams.abandon_output()
        raise
    except click.ClickException as error:
        text = io.StringIO()
        error.show(text)
        for line in text.getvalue().split("\n")[:-1]:
            output.line(line, err=True)
        raise click.exceptions.Exit(error.exit_code) from None
    except KeyboardInterrupt:
        output.problem(Output(), "interrupted")
        raise click.exceptions.Exit(INTERRUPTED) from None
    except Exception as error:
        if debugging():
            raise
        streams.abandon_output()
        if isinstance(error, BrokenPipeError):  # the reader of standard output has gone
            raise click.exceptions.Exit(FAILED) from None
        output.problem(Output(), one_line(error))
        raise click.exceptions.Exit(exit_code(error)) from None


def _show_version(ctx: click.Context, param: click.Parameter, wanted: bool) -> None:
    if wanted and not ctx.resilient_parsing:
        from importlib.metadata import version

        click.echo(f"sgacodec {version('sgacodec')}")
        ctx.exit()


@click.group(
    cls=_LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Exit codes: 0 all done, 1 some input failed, 2 wrong usage, 3 not a valid .sga file or a damaged "
    "one, 4 model not found or damaged, 130 and 143 interrupted.",
)
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_show_version,
    help="Show the version.",
)
def main() -> None:
    """Neural image compression: small files that decode anywhere.

    \b
    sgacodec encode photo.png photo.sga
    sgacodec decode photo.sga photo.out.png
    """
    if "OMP_WAIT_POLICY" not in os.environ:  # OpenMP threads that wait longer sleep
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")
