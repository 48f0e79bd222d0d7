"""Keep the figures of README.md and docs/*.md equal to the results in docs/results/.

    python -m sgacodec.evaluate.regenerate            # rewrite the marked figures
    python -m sgacodec.evaluate.regenerate --check    # exit code 1 if they differ

A figure stands between two comments, of which the first names a function of `figures.py` and its arguments:

    <!-- measured: bd-rate kodak-lite-none kodak-jpeg -->−53.7 %<!-- end -->

A marker that begins a line is a block of its own, as Markdown has it: a table or a plot, between empty lines.
`python -m sgacodec.evaluate.studies` measures the results anew.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import click

from ..atomic import write_whole
from .figures import figure

RESULTS = Path("docs") / "results"
_MARKER = re.compile(r"<!-- measured: (.+?) -->(.*?)<!-- end -->", re.DOTALL)


def pages(root: Path) -> list[Path]:
    """The documents of a checkout that may have figures."""
    return [root / "README.md", *sorted((root / "docs").glob("*.md"))]


def regenerated(text: str, results: Path) -> str:
    """The text with all of its figures computed anew.

    Raises
    ------
    ValueError
        If a figure cannot be computed; the message names the marker.
    """

    def replaced(match: re.Match[str]) -> str:
        words = shlex.split(match[1])
        try:
            content = figure(results, words[0], words[1:])
        except (ValueError, OSError) as error:
            raise ValueError(f"<!-- measured: {match[1]} -->: {error}") from error
        if match.start() == 0 or text[match.start() - 1] == "\n":
            content = f"\n\n{content}\n\n"
        elif "\n" in content:
            raise ValueError(f"<!-- measured: {match[1]} -->: a table must begin a line")
        return f"<!-- measured: {match[1]} -->{content}<!-- end -->"

    if text.count("<!-- measured:") != len(_MARKER.findall(text)):
        raise ValueError("a marker without <!-- end -->")
    return _MARKER.sub(replaced, text)


@click.command()
@click.option("--check", is_flag=True, help="Change nothing; exit code 1 if a page is out of date.")
@click.option(
    "--root",
    metavar="DIR",
    default=".",
    show_default=True,
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="The checkout.",
)
@click.pass_context
def main(ctx: click.Context, check: bool, root: Path) -> None:
    """Rewrite the measured figures of README.md and docs/*.md from docs/results/."""
    outdated = 0
    for page in pages(root):
        text = page.read_text(encoding="utf-8")
        try:
            new = regenerated(text, root / RESULTS)
        except ValueError as error:
            raise click.ClickException(f"{page}: {error}") from None
        if new == text:
            continue
        outdated += 1
        click.echo(f"{page}: {'out of date' if check else 'rewritten'}")
        if not check:
            write_whole(page, new.encode())
    ctx.exit(1 if check and outdated else 0)


if __name__ == "__main__":
    main()
