"""`sgacodec decode`: .sga files to images."""

from __future__ import annotations

import contextlib
import functools
import io
import math
import os
from collections.abc import Generator, Iterator
from dataclasses import dataclass, replace

import click

from . import batch, engines, files, options, output
from .batch import Outcome
from .engines import Engine
from .files import Task
from .storage import STREAM, is_standard_output, read_sga


@dataclass(frozen=True)
class Job:
    """Options that a worker process needs."""

    model: str | None
    device: str
    max_pixels: int
    format: str | None
    strip: bool
    pixels: int = 0  # to be decoded by a process, at least


@click.command(short_help="Turn .sga files back into images.")
@click.argument("names", nargs=-1, metavar="IN... [OUT]")
@click.option("--format", metavar="png|ppm|...", help="Type of the images.  [default: by OUT's name, else png]")
@options.model_options
@options.batch_options
@click.option(
    "--strip", is_flag=True, help="Drop ICC profile, EXIF and XMP; convert to sRGB and apply the orientation."
)
@options.console_options
@click.pass_context
def command(
    ctx: click.Context,
    names: tuple[str, ...],
    format: str | None,
    model: str | None,
    device: str,
    max_pixels: int,
    out_dir: str | None,
    files_from: str | None,
    jobs: int | None,
    engine: str,
    address: str | None,
    no_overwrite: bool,
    strip: bool,
    json: bool,
    quiet: bool,
    verbose: int,
) -> None:
    """Turn .sga files back into images.

    IN and OUT may be URLs, or - for standard input and output. With --out-dir every name is an input, and photo.sga
    becomes DIR/photo.png. A folder stands for all .sga files in it and in its subfolders, which are kept in DIR; hidden
    ones and links to folders are left out. Existing files are overwritten unless --no-overwrite is given. The model is
    found by the id in the file; where it is not installed, give its file with --model. Metadata that the type of the
    image cannot hold are converted, or dropped with a warning; transparency that it cannot hold is an error.

    Files of fewer than 16 megapixels in all are decoded with numpy on the CPU, as torch takes seconds to start. More
    are decoded with torch if it is installed, on a GPU if there is one. Standard input, pipes, URLs and all files with
    --engine ray are decoded with numpy. --device cuda always uses the GPU.

    \b
    sgacodec decode photo.sga photo.out.png
    sgacodec decode small --out-dir large --format ppm
    cat photo.sga | sgacodec decode - - > photo.out.png
    """
    extension = f".{format.lstrip('.').lower()}" if format else ".png"
    tasks = files.plan(names, files_from, out_dir, files.decoding(extension), (model,))
    batch.divide_threads(min(jobs or 1, len(tasks)) if engine == "local" else 1)  # Ray divides the CPUs itself
    out = options.output(json, quiet, verbose, any(is_standard_output(task.destination) for task in tasks))
    _check_format(extension if format or tasks[0].destination == STREAM else tasks[0].destination)
    if no_overwrite:
        tasks = batch.absent_outputs(tasks, out)
    if not tasks:
        ctx.exit()
    runner = engines.chosen(engine, jobs, address, device, tasks)
    pixels = _pixels(tasks, runner.processes) if runner.name == "local" else 0
    job = Job(model, device, max_pixels, format, strip, pixels)
    with batch.stoppable(), output.progress(out, "decode", len(tasks)):
        ctx.exit(batch.finish(_outcomes(tasks, job, runner, out), out, _describe))


def _check_format(name: str) -> None:
    """Raise a usage error if images of this type cannot be written."""
    from ..image_writer import writable_format

    suffix = os.path.splitext("x" + name)[1].lower() or ".png"
    if writable_format(suffix) is None:
        raise click.UsageError(f"cannot write images of type '{suffix[1:]}'")


def _pixels(tasks: list[Task], jobs: int) -> int:
    """Pixels of the files that a process decodes, as far as they are needed to choose a decoder; 0 for streams."""
    from ..bitstream import HEAD_BYTES, stated_size
    from ..decoding import MANY

    found = 0
    for task in tasks:
        with contextlib.suppress(OSError):
            if os.path.isfile(task.source):  # a pipe could not be read again
                with open(task.source, "rb") as file:
                    found += math.prod(stated_size(file.read(HEAD_BYTES)))
        if found >= jobs * MANY:
            return MANY
    return 0


def _describe(outcome: Outcome) -> str:
    report = outcome.report
    return f"{report['width']}×{report['height']}, {report['seconds']:.2f} s"


# ------------------------------------------------------------------------------------------------------- work


def _outcomes(tasks: list[Task], job: Job, engine: Engine, out: output.Output) -> Generator[Outcome, None, None]:
    if engine.elsewhere:
        work = functools.partial(decode_files, job=replace(job, model=batch.found_model(job.model)))
        yield from engines.outcomes(work, tasks, engine, job.device, out)
        return
    batch.open_decoder(job.model, job.device, job.pixels)  # an error here is one for all files
    yield from decode_files(tasks, job)


def decode_files(tasks: list[Task], job: Job) -> Iterator[Outcome]:
    """Decode files to the bytes of image files, here or in a worker process."""
    return (decode_file(task, job) for task in tasks)


def decode_file(task: Task, job: Job) -> Outcome:
    """Decode one file to the bytes of an image file."""
    from ..image import stripped
    from ..image_writer import write_image

    try:
        data = read_sga(task.source, job.max_pixels)
        decoded = batch.open_decoder(job.model, job.device, job.pixels).decode(data, max_pixels=job.max_pixels)
        picture = stripped(decoded.picture) if job.strip else decoded.picture
        image = io.BytesIO()
        written = write_image(picture, image, job.format or extension_of(task.destination))
    except Exception as error:
        return batch.failure(task, error)
    figures = {"width": written.width, "height": written.height, "format": written.format, "bytes": written.bytes}
    return Outcome(task, image.getvalue(), decoded.report | figures, picture.warnings + written.warnings)


def extension_of(destination: str) -> str | None:
    """The image type in the name of an output; None if it has no extension."""
    return os.path.splitext(destination)[1].lstrip(".") or None
