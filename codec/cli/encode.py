"""`sgacodec encode`: images to .sga files."""

from __future__ import annotations

import functools
import os
import stat
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import click

from ..batching import batch_key, batch_size
from ..settings import LADDER, Settings
from . import batch, encoder_options, engines, files, options, output, processes, storage, urls
from .batch import Outcome
from .engines import Engine
from .files import Task
from .storage import STREAM

if TYPE_CHECKING:
    import numpy as np

    from ..api import Codec
    from ..picture import Picture

PENDING = 16  # pictures kept in memory until a batch is full


@dataclass(frozen=True)
class Job:
    """Options that a worker process needs."""

    settings: Settings
    model: str | None
    device: str
    strip: bool
    max_pixels: int
    roi: str | None
    processes: int = 1  # that share this machine


@dataclass(frozen=True)
class Input:
    """A picture to encode, and the weights of its pixels."""

    task: Task
    picture: Picture
    weights: np.ndarray | None


@click.command(short_help="Compress images to .sga files.")
@click.argument("names", nargs=-1, metavar="IN... [OUT]")
@encoder_options.encoder_options
@click.option(
    "--roi",
    metavar="MASK",
    type=click.Path(exists=True, dir_okay=False),
    help="Weight map, an image of the input's size: grey levels are weights of the distortion; with --metric ms-ssim, "
    "0 leaves pixels out and all others count alike. EXIF orientation is applied to it as to the image.",
)
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
    model: str | None,
    device: str,
    max_pixels: int,
    roi: str | None,
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
    **chosen: Any,
) -> None:
    """Compress images to .sga files.

    IN and OUT may be URLs, or - for standard input and output. With --out-dir every name is an input, and photo.png
    becomes DIR/photo.sga. A folder stands for all images in it and in its subfolders, which are kept in DIR; hidden
    ones and links to folders are left out. Existing files are overwritten unless --no-overwrite is given.

    \b
    sgacodec encode photo.png photo.sga
    sgacodec encode photo.png photo.sga --target-size 40000 --effort 4
    sgacodec encode *.jpg --out-dir small --json
    find . -name '*.png' -print0 | sgacodec encode --files-from - --out-dir small
    """
    settings = encoder_options.settings_of(chosen)
    if roi is not None and not settings.refines:
        raise click.UsageError("--roi has no meaning without refinement")
    tasks = files.plan(names, files_from, out_dir, files.ENCODING, (roi, model))
    out = options.output(json, quiet, verbose, any(storage.is_standard_output(task.destination) for task in tasks))
    low, high = LADDER
    if settings.level_lambda is None and not low <= settings.lmbda <= high:
        output.note(out, f"warning: lambda is outside the models' range of {low} to {high}; the nearest level is used")
    if no_overwrite:
        tasks = batch.absent_outputs(tasks, out)
    if not tasks:
        ctx.exit()
    runner = engines.chosen(engine, jobs, address, device, tasks)
    job = Job(settings, model, device, strip, max_pixels, roi, runner.processes)
    with batch.stoppable(), output.progress(out, "encode", len(tasks)):
        ctx.exit(batch.finish(_outcomes(tasks, job, runner, out), out, _describe))


def _describe(outcome: Outcome) -> str:
    report = outcome.report
    quality = "lossless" if report["psnr"] is None else f"{report['psnr']:.2f} dB"
    return (
        f"{report['width']}×{report['height']}, {report['bytes']} bytes, {report['bpp']:.4f} bpp, "
        f"{quality}, {report['seconds']:.1f} s"
    )


# ------------------------------------------------------------------------------------------------------- work


def _outcomes(tasks: list[Task], job: Job, engine: Engine, out: output.Output) -> Generator[Outcome, None, None]:
    if engine.elsewhere:
        roi = job.roi and os.path.abspath(job.roi)  # workers may have other working folders
        job = replace(job, model=batch.found_model(job.model), roi=roi)
        work = functools.partial(encode_files, job=job, step=processes.step)
        yield from engines.outcomes(work, tasks, engine, job.device, out)
        return

    batch.open_codec(job.model, job.device, job.processes)  # an error here is one for all files
    yield from encode_files(tasks, job, functools.partial(output.step, out))


def encode_files(tasks: list[Task], job: Job, step: Callable[[Any], None] | None = None) -> Iterator[Outcome]:
    """Encode files, here or in a worker process; those that can be refined as one batch are kept until it is full."""
    pending: dict[tuple[int, int, bool], list[Input]] = {}  # by `batch_key`
    for task in tasks:
        try:
            codec = batch.open_codec(job.model, job.device, job.processes)
            read = read_input(task, job)
        except Exception as error:
            yield batch.failure(task, error)
            continue
        key = batch_key(read.picture)
        pending.setdefault(key, []).append(read)
        if len(pending[key]) >= batch_size(*key[:2], codec.device.type == "cuda", job.settings):
            yield from _encode(codec, pending.pop(key), job, step)
        elif sum(map(len, pending.values())) == PENDING:
            yield from _encode(codec, pending.pop(next(iter(pending))), job, step)
    for inputs in pending.values():
        yield from _encode(codec, inputs, job, step)


def _encode(
    codec: Codec, inputs: list[Input], job: Job, step: Callable[[Any], None] | None
) -> Generator[Outcome, None, None]:
    """Encode pictures of one padded shape together; one by one if that fails."""
    try:
        rois = [one.weights for one in inputs] if job.roi else None
        encoded = codec.encode([one.picture for one in inputs], job.settings, rois=rois, progress=step)
    except Exception as error:
        if len(inputs) == 1:
            yield batch.failure(inputs[0].task, error)
            return
        for one in inputs:
            yield from _encode(codec, [one], job, step)
        return
    for one, result in zip(inputs, encoded, strict=True):
        notes = (*one.picture.warnings, *result.warnings, *_size_warning(one.task, result.data))
        yield Outcome(one.task, result.data, result.report, notes)


def _size_warning(task: Task, data: bytes) -> tuple[str, ...]:
    """A warning when the output is larger than the input file, if that has a known size."""
    size = task.size
    try:
        if size is None and task.source != STREAM and not urls.is_url(task.source):
            status = os.stat(task.source)
            size = status.st_size if stat.S_ISREG(status.st_mode) else None
    except OSError:  # removed since
        return ()
    if size is None or len(data) <= size:
        return ()
    return (f"the output is larger than the input: {len(data)} bytes, not {size}",)


def read_input(task: Task, job: Job) -> Input:
    """Read an input image, and the weights of its pixels if there is a mask."""
    from ..image import read_image, stripped
    from ..metadata import orientation, turned

    if task.source == STREAM or urls.is_url(task.source):
        with storage.opened(task.source) as stream:
            picture = read_image(stream, max_pixels=job.max_pixels)
    else:
        picture = read_image(task.source, max_pixels=job.max_pixels)
    weights = None if job.roi is None else read_roi(job.roi, picture, job.max_pixels)
    if job.strip:
        if weights is not None:
            weights = turned(weights, orientation(picture.exif, picture.xmp))
        picture = stripped(picture)
    return Input(task, picture, weights)


def read_roi(name: str, picture: Picture, max_pixels: int) -> np.ndarray:
    """Read the weights of a picture's pixels: (H, W) float32 in 0..1.

    A mask with an orientation of its own belongs to the picture as that is shown, and so does one that fits only then;
    any other belongs to the picture's pixels as they are stored.
    """
    import numpy as np

    from ..image import read_image
    from ..metadata import orientation, turned, turned_back
    from ..picture import ImageError

    mask = read_image(name, max_pixels=max_pixels)
    weights: np.ndarray = mask.pixels.mean(axis=2, dtype=np.float32) / 255
    turn, own = orientation(picture.exif, picture.xmp), orientation(mask.exif, mask.xmp)
    stored = picture.pixels.shape[:2]
    shown = stored[::-1] if turn in (5, 6, 7, 8) else stored
    if own is not None or (weights.shape != stored and weights.shape == shown):
        weights = turned_back(turned(weights, own), turn)
    if weights.shape != stored:
        sizes = [f"{shape[1]}×{shape[0]}" for shape in (mask.pixels.shape, picture.pixels.shape)]
        raise ImageError(f"the mask {name} has {sizes[0]} pixels and the image {sizes[1]}")
    return weights
