"""docs/cli.md, generated from the commands: `python -m sgacodec.cli.manual > docs/cli.md`."""

from __future__ import annotations

import inspect
from typing import Any

import click

from . import main

_INTRODUCTION = """\
# Command line

<!-- Generated: python -m sgacodec.cli.manual > docs/cli.md -->

{text}

## Exit codes

| code | meaning |
|---|---|
| 0 | all done |
| 1 | some input could not be read, encoded, decoded or written |
| 2 | wrong usage; nothing was done |
| 3 | not a valid .sga file, or a damaged one |
| 4 | a model was not found, or is damaged |
| 130, 143 | interrupted by Ctrl-C, by SIGTERM; no partial output is left |

Several inputs are independent: one that fails does not stop the others. When all failures are of one kind,
the exit code is theirs; when they are mixed, it is 1. An output that `--no-overwrite` keeps is not a failure.

## Streams

Results go to standard output, one line per file (`--json`: one object per file), warnings and errors to standard error.
When image or file data goes to standard output, everything else goes to standard error. A progress bar is shown only
when standard error is a terminal. An object of a failed input has the keys `input`, `output` (null; not with `info`)
and `error`, one of an output that `--no-overwrite` kept `input`, `output` and `skipped`; a number that is not finite is
`null`. If a standard stream is closed or cannot be written, `encode` and `decode` go on without its messages (a full
disk is reported on standard error, once); it is an error only if image or file data must go through it. `info` ends
with exit code 1, as printing them is all that it does. Lines come in the order in which files are finished: images that
are refined as one batch finish together.

Outputs are written to a temporary file in the same folder, flushed to disk (`fsync`) and renamed, so a file under its
own name is complete, even after a power failure. `fsync` costs about 3 ms per file (200 files of 30 kB on a virtual
disk with ext4: 11 ms each with it, 8 ms without). A file that replaces an older one gets its permission bits. Anything
that is not a regular file (`/dev/null`, a named pipe) is written directly; a symbolic link is followed. How remote
stores (URLs) are written is described in [pipelines.md](pipelines.md). An output that would overwrite a file which the
same command reads (an input, a mask, a list, a model) is wrong usage.

## Image formats

`encode` reads what Pillow reads: PNG, JPEG, WebP, AVIF, TIFF, GIF, BMP, PPM, JPEG 2000, QOI and more; HEIC if
`pillow-heif` is installed, and JPEG XL if `pillow-jxl-plugin` is. Of animations and documents the first frame or page
is kept. Samples of more than 8 bits are reduced to 8, and CMYK is converted to RGB. A PNG gamma (gAMA) is converted to
the transfer function of sRGB; primaries without an ICC profile (cHRM, cICP) are stored as an ICC profile. TIFF files
with planar configuration that Pillow would misread, such as uncompressed 16-bit ones, are refused. `decode` writes:

| format | colours | ICC, EXIF, XMP | transparency |
|---|---|---|---|
| PNG, TIFF, WebP | lossless | kept | yes |
| JPEG | quality 95, 4:4:4 | kept, EXIF and XMP up to 64 kB | no |
| AVIF | quality 100, 4:4:4: differences of 2 or 3 of 255 | kept | lossless |
| JPEG 2000, TGA, QOI, SGI, DDS | lossless | no | yes |
| ICO | lossless, up to 256 pixels a side | no | yes |
| BMP, PPM, PCX, IM | lossless | no | no |
| PGM | grey images only, lossless | no | no |
| GIF | 256 colours; grey is lossless | no | no |
| PDF | JPEG, quality 95 | no | no |

Where a format has no ICC profile (WebP and AVIF: none of grey images), colours are converted to sRGB; where it has no
EXIF, the orientation is applied to the pixels. A warning tells what was converted or dropped. Transparency that a
format cannot hold is an error. The resolution (pixels per inch) is kept in EXIF, and written to PNG, JPEG, TIFF, BMP
and PDF in their own way, too. An image that is larger than the format allows is an error. The width and height that
`decode` reports are those of the written file.

## Environment

| variable | meaning |
|---|---|
| `SGACODEC_MODELS` | folder of imported and trained models; default: `sgacodec/models` in the user's data folder |
| `SGACODEC_TRACE=1` | the same as `-vv`: log a hash of each decoding stage |
| `SGACODEC_DEBUG=1` | a traceback in place of one line, for bug reports |
| `GOMP_SPINCOUNT` | spin count of waiting OpenMP threads (GNU libgomp); 10000, unless `OMP_WAIT_POLICY` is set |
| `OMP_NUM_THREADS` | number of CPU threads; beside other busy programs, fewer can be faster |
| `OPENBLAS_NUM_THREADS` | threads of numpy's BLAS when decoding; 1 unless it is set |
| `RAY_ADDRESS` | address of the Ray cluster for `--engine ray` |
"""


def manual() -> str:
    """The whole page."""
    parts = [_INTRODUCTION.format(text=_prose(main))]
    context = click.Context(main, info_name="sgacodec")
    for name in main.list_commands(context):
        command = main.get_command(context, name)
        if command is not None:
            parts += _sections(command, f"sgacodec {name}", "##")
    return "\n".join(parts)


def _sections(command: click.Command, path: str, heading: str) -> list[str]:
    parts = [f"{heading} {path}\n"]
    if isinstance(command, click.Group):
        parts.append(_prose(command) + "\n")
        for name in command.commands:
            parts += _sections(command.commands[name], f"{path} {name}", heading + "#")
        return parts
    arguments = " ".join(str(_metavar(p)) for p in command.params if isinstance(p, click.Argument))
    parts.append(f"```\n{path} [OPTIONS] {arguments}".rstrip() + "\n```\n")
    parts.append(_prose(command) + "\n")
    options = [p for p in command.params if isinstance(p, click.Option) and not p.hidden]
    if options:
        parts.append("| option | meaning |\n|---|---|")
        parts += [f"| {_spelling(option)} | {_meaning(option)} |" for option in options]
        parts.append("")
    return parts


def _prose(command: click.Command) -> str:
    """The help text as Markdown: paragraphs that click does not wrap are examples."""
    paragraphs = inspect.cleandoc(command.help or "").split("\n\n")
    return "\n\n".join(
        f"```sh\n{text.removeprefix(chr(8)).strip()}\n```" if text.startswith("\b") else text for text in paragraphs
    )


def _metavar(parameter: click.Parameter) -> str:
    if parameter.metavar is not None:
        return parameter.metavar
    if isinstance(parameter.type, click.Choice):
        return "|".join(str(choice) for choice in parameter.type.choices)
    name = str(parameter.name if isinstance(parameter, click.Argument) else parameter.type.name).upper()
    return name + "..." if parameter.nargs == -1 else name


def _spelling(option: click.Option) -> str:
    takes_none = option.is_flag or option.count
    text = f"`{', '.join([*option.opts, *option.secondary_opts])}{'' if takes_none else ' ' + _metavar(option)}`"
    return text.replace("|", "\\|")


def _meaning(option: click.Option) -> str:
    text = " ".join((option.help or "").split()).replace("|", "\\|")
    default: Any = option.default
    if option.show_default and default is not None and (option.secondary_opts or not option.is_flag):
        if isinstance(default, (list, tuple)):
            default = ", ".join(str(value) for value in default)
        text += f" [default: {('off', 'on')[default] if option.is_flag else default}]"
    if option.required:
        text += " [required]"
    return text


if __name__ == "__main__":
    print(manual(), end="")
