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

import importlib
import importlib.util
import os
import sys

import click

from .exits import FAILED, INTERRUPTED, debugging, exit_code, one_line

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

    def invoke(self, ctx: click.Context) -> object:
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()
            return result
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except KeyboardInterrupt:
            click.echo("sgacodec: interrupted", err=True)
            ctx.exit(INTERRUPTED)
        except Exception as error:
            if debugging():
                raise
            _abandon_stdout()
            if isinstance(error, BrokenPipeError):  # the reader of standard output has gone
                ctx.exit(FAILED)
            click.echo(f"sgacodec: {one_line(error)}", err=True)
            ctx.exit(exit_code(error))


def _abandon_stdout() -> None:
    """Redirect standard output to /dev/null, so that Python does not try to flush it again at exit."""
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _show_version(ctx: click.Context, param: click.Parameter, wanted: bool) -> None:
    if wanted and not ctx.resilient_parsing:
        from importlib.metadata import version

        click.echo(f"sgacodec {version('sgacodec')}")
        ctx.exit()


@click.group(
    cls=_LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Exit codes: 0 all done, 1 some input failed, 2 wrong usage, 3 not a valid .sga file or a damaged "
    "one, 4 model not found or damaged, 130 interrupted.",
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
