"""Pillow plugin: after `import sgacodec.pillow_plugin`, Pillow opens and saves .sga files.

    Image.open("x.sga")  the file is read and its checksum verified; size, mode and `info` are known
    im.load()            the pixels are decoded, on the CPU and without torch
    im.save("x.sga", lmbda=0.0075, method="ssl", steps=100)
                         options are the fields of `Settings`, and model, device, roi (H, W), icc_profile, exif, xmp

`Image.save` empties the file before it is encoded, as for every format: an error or an interruption loses an old file
of the name. `sgacodec encode` keeps it until the new one is complete.

ICC profile, EXIF and XMP are in `im.info` as "icc_profile", "exif" and "xmp", and are saved from there.
"""

from __future__ import annotations

import functools
import warnings
from dataclasses import fields
from typing import IO, TYPE_CHECKING, Any

from PIL import Image, ImageFile

from .bitstream import DEFAULT_MAX_PIXELS, MAGIC, FormatError, read, read_stream
from .image import to_picture
from .metadata import read_metadata, resolution
from .pillow import as_image, load_8_bit
from .settings import Settings

if TYPE_CHECKING:
    from .api import Codec

FORMAT = "SGA"
EXTENSION = ".sga"
MIME = "image/x-sga"

_ANY_SIZE = 2**64  # Pillow has a limit of its own, Image.MAX_IMAGE_PIXELS
_SETTINGS = tuple(field.name for field in fields(Settings))


class SgaImageFile(ImageFile.ImageFile):
    """An opened .sga file, decoded when its pixels are needed."""

    format = FORMAT
    format_description = "sgacodec"

    def _open(self) -> None:
        assert self.fp is not None
        try:
            self._content: bytes | None = read_stream(self.fp, _ANY_SIZE)  # type: ignore[arg-type]
            file = read(self._content, _ANY_SIZE)
        except FormatError as error:
            raise OSError(str(error)) from None
        self._size = file.width, file.height
        self._mode = ("L" if file.grey else "RGB") if file.alpha is None else ("LA" if file.grey else "RGBA")
        if file.icc is not None:
            self.info["icc_profile"] = file.icc
        if file.exif is not None:
            self.info["exif"] = b"Exif\0\0" + file.exif
        if file.xmp is not None:
            self.info["xmp"] = file.xmp
        dpi = resolution(file.exif)
        if dpi is not None:
            self.info["dpi"] = dpi

    def load(self) -> Any:
        """Decode the pixels.

        Raises
        ------
        OSError
            When the file is damaged, or its model is not installed.
        """
        if self._content is not None:
            from .decoding import shared_decoder

            limit = max(DEFAULT_MAX_PIXELS, self.width * self.height)
            try:
                picture = shared_decoder().decode(self._content, max_pixels=limit).picture
            except (LookupError, ValueError) as error:
                raise OSError(str(error)) from error
            self.im = as_image(picture).im
            self._content = None
            if self._exclusive_fp and self.fp is not None:
                self.fp.close()
            self.fp = None
        return Image.Image.load(self)


def _accept(prefix: bytes) -> bool:
    return prefix.startswith(MAGIC)


def _save(im: Image.Image, fp: IO[bytes], filename: str | bytes) -> None:
    """Encode an image; what cannot be kept is a warning.

    Raises
    ------
    ValueError
        For settings that are invalid or contradict each other, and samples that cannot be coded.
    ModuleNotFoundError
        When torch is not installed.
    """
    options = im.encoderinfo
    settings = Settings(**{name: options[name] for name in _SETTINGS if name in options})
    settings.validate()
    codec = _codec(options.get("model"), options.get("device", "auto"))
    eight, notes = load_8_bit(im)
    icc, exif, xmp = read_metadata(im)
    if "icc_profile" in options:
        icc = options["icc_profile"] or None
    if "exif" in options:
        exif = options["exif"] or None
        exif = exif.tobytes() if isinstance(exif, Image.Exif) else exif
        exif = exif and exif.removeprefix(b"Exif\0\0")
    if "xmp" in options:
        xmp = options["xmp"] or None
        xmp = xmp.encode() if isinstance(xmp, str) else xmp
    picture = to_picture(eight, icc, exif, xmp, notes)
    encoded = codec.encode([picture], settings, rois=[options.get("roi")])[0]
    for note in (*picture.warnings, *encoded.warnings):
        warnings.warn(note, stacklevel=2)
    fp.write(encoded.data)


@functools.lru_cache(maxsize=2)
def _codec(model: str | None, device: str) -> Codec:
    from . import Codec  # says what to install where torch is missing

    return Codec(model, device)


Image.register_open(FORMAT, SgaImageFile, _accept)
Image.register_save(FORMAT, _save)
Image.register_extension(FORMAT, EXTENSION)
Image.register_mime(FORMAT, MIME)
