"""Image files to pixels: checked, resized, several at a time."""

from __future__ import annotations

import io
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from math import isqrt
from typing import TYPE_CHECKING, NamedTuple

from kfo_ext.tasks.checks import check_count

if TYPE_CHECKING:
    from PIL.Image import Image

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm")
# Other modes, of 16 bits or floats, need a conversion that only the user can choose.
MODES = ("1", "L", "P", "RGB", "CMYK", "YCbCr")
TRANSPARENT = ("LA", "PA", "RGBA")
MOST_PIXELS = 1 << 26
# Number of images to prefetch.
AHEAD = 64


class Target(NamedTuple):
    """The format of a decoded image.

    Attributes:
        side: height and width in pixels; other images are resized with Lanczos, not cropped.
        channels: 1 (brightness) or 3 (red, green, blue).
        exact: refuse images of another size or mode.
    """

    side: int
    channels: int = 3
    exact: bool = False

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        return (self.channels, self.side, self.side)


def check_side(side: int) -> int:
    """The side; raises TypeError or ValueError unless images can be resized to it."""
    check_count("side", side, 1)
    if side * side > MOST_PIXELS:
        raise ValueError(f"side: expected at most {isqrt(MOST_PIXELS)} pixels, got {side}")
    return side


def is_image(name: str) -> bool:
    """Whether a file's name is that of an image."""
    return name.lower().endswith(SUFFIXES)


def pixels_of(content: bytes, name: str, target: Target) -> bytes:
    """Decode an image file.

    Args:
        content: the file's bytes.
        name: the file's name, for messages.
        target: the format to convert to.

    Returns:
        The pixels' bytes (C, H, W).

    Raises:
        ValueError: the file is damaged, too large, of an ambiguous mode, or not in the exact format.
    """  # noqa: DOC501  _Refused is a ValueError
    from PIL import Image as pillow
    from PIL import UnidentifiedImageError

    mode = "L" if target.channels == 1 else "RGB"
    try:
        with pillow.open(io.BytesIO(content)) as image:
            _check(image, name, target, mode)
            square = _opaque(image, name).convert(mode)
            if square.size != (target.side, target.side):
                square = square.resize((target.side, target.side), pillow.Resampling.LANCZOS)
            return b"".join(plane.tobytes() for plane in square.split())
    except _Refused:
        raise
    except UnidentifiedImageError as error:
        raise ValueError(f"{name} is no whole image: Pillow knows no such format") from error
    # Pillow's decoders raise errors of any type for a damaged file.
    except Exception as error:
        raise ValueError(f"{name} is no whole image ({type(error).__name__}: {error})") from error


class _Refused(ValueError):
    pass


def _check(image: Image, name: str, target: Target, mode: str) -> None:
    width, height = image.size
    if width * height > MOST_PIXELS:
        raise _Refused(f"{name}: expected at most {MOST_PIXELS} pixels, got {width} x {height}")
    if target.exact and (image.size != (target.side, target.side) or image.mode != mode):
        raise _Refused(
            f"{name}: expected {target.side} x {target.side} pixels of mode {mode}, got {width} x {height} of mode "
            f"{image.mode}"
        )
    if image.mode not in MODES + TRANSPARENT:
        raise _Refused(f"{name}: expected an image of 8 bits a channel ({', '.join(MODES)}), got mode {image.mode}")


def _opaque(image: Image, name: str) -> Image:
    """The image without its alpha channel, which must hide nothing: what lies under it has no defined colour."""
    if image.mode not in TRANSPARENT and "transparency" not in image.info:
        return image
    image = image.convert("RGBA")
    if image.getchannel("A").getextrema() != (255, 255):
        raise _Refused(f"{name}: expected an opaque image, got transparent pixels; lay it on a background first")
    return image.convert("RGB")


def decoded(
    read: Callable[[str], bytes], names: Sequence[str], target: Target, *, title: str, where: str
) -> Iterator[bytes]:
    """Decode images in parallel, with a progress bar on a terminal.

    Args:
        read: returns a file's content.
        names: the files to decode.
        target: the format to convert to.
        title: title of the progress bar.
        where: the name of the archive, for messages.

    Yields:
        The pixels' bytes of each image, in the order of the names.
    """
    from tqdm import tqdm

    def one(name: str) -> bytes:
        return pixels_of(read(name), f"{where}: {name}", target)

    workers = min(8, len(os.sched_getaffinity(0)))
    # disable=None: silent unless standard error is a terminal
    with (
        ThreadPoolExecutor(workers, thread_name_prefix="kfo-decode") as pool,
        tqdm(desc=title, total=len(names), unit="image", disable=None) as bar,
    ):
        rest = iter(names)
        pending = deque(pool.submit(one, name) for name in islice(rest, AHEAD))
        while pending:
            yield pending.popleft().result()
            pending.extend(pool.submit(one, name) for name in islice(rest, 1))
            bar.update()
