"""Arrays of images as pictures a person can look at, and the style of all plots."""

import io
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from ncsn import images
from pipeline._store import replacing

SIDE = 480  # pixels a picture should have at least, on its longer side
STYLE: dict[Any, Any] = {
    "svg.hashsalt": "ncsn",  # names inside an SVG are random without it
    "font.size": 9,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "0.93",
    "axes.edgecolor": "0.6",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "legend.frameon": False,
}


def grid_picture(tiles: Tensor, columns: int) -> Image.Image:
    """Tile uint8 images (N, C, H, W) into one picture, each pixel enlarged by a whole factor."""
    canvas = images.grid(tiles, columns)
    factor = max(1, -(-SIDE // max(canvas.shape[1:])))
    canvas = canvas.repeat_interleave(factor, 1).repeat_interleave(factor, 2)
    pixels = canvas.permute(1, 2, 0).contiguous().numpy()
    return Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)


def save_gif(frames: list[Tensor], columns: int, path: Path, *, seconds: float = 4.0) -> None:
    """Write an animation of grids of uint8 images (N, C, H, W); the last frame stays for two seconds."""
    pictures = [grid_picture(frame, columns).convert("P", palette=Image.Palette.ADAPTIVE) for frame in frames]
    durations = [max(20, round(1000 * seconds / len(frames)))] * (len(frames) - 1) + [2000]
    with replacing(path) as part:
        pictures[0].save(
            part, format="gif", save_all=True, append_images=pictures[1:], duration=durations, loop=0, optimize=False
        )


def save_png(picture: Image.Image, path: Path) -> None:
    """Write a PNG atomically."""
    with replacing(path) as part:
        part.write_bytes(png_bytes(picture))


def png_bytes(picture: Image.Image) -> bytes:
    """The picture as the content of a PNG file."""
    file = io.BytesIO()
    picture.save(file, format="png")
    return file.getvalue()


def side_by_side(pictures: list[Image.Image], gap: int = 8) -> Image.Image:
    """Pictures of one height and kind in a row, on white."""
    width = sum(picture.width for picture in pictures) + gap * (len(pictures) - 1)
    row = Image.new(pictures[0].mode, (width, pictures[0].height), "white")
    left = 0
    for picture in pictures:
        row.paste(picture, (left, 0))
        left += picture.width + gap
    return row
