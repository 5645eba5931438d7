# pyright: strict
"""Where an image says what the model says of it: occlusion sensitivity, as a heat map over the image.

Parts of the image are hidden one after the other, and what the score of the explained label loses is written down where
it was hidden: Zeiler and Fergus, "Visualizing and Understanding Convolutional Networks" (ECCV 2014), section 4.2. It
asks nothing of the model but scores, so it explains every engine and precision as they answer.

The image is cut into at most 14 x 14 equal cells; a patch of 2 x 2 cells moves by one cell, so 169 variants at most are
scored, and each inner cell is hidden by four of them. Patches have the mean colour of the image: a plain grey would be
a new edge on a white page, and models look at edges.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from cnn_ray.errors import ArtifactError

CELLS = 14
"""Cells on each axis, fewer where the image has fewer pixels."""
PATCH_CELLS = 2
"""Cells that a patch hides on each axis."""
LONGEST_SIDE_PX = 640
"""Longest side of the drawn image."""
LEAST_SCALE = 0.01
"""The end of the colour scale is never below this drop: rounding must not look like evidence."""

_LEGEND_PX = 40
_LEAST_WIDTH_PX = 220  # the legend's words
_STRONGEST = 0.7  # share of the colour at the end of the scale
# Lightness falls from yellow to violet, so the order is seen without telling hues apart. The image is drawn grey.
_STOPS = np.array([(255, 237, 120), (240, 150, 30), (205, 45, 60), (95, 0, 110)], np.float32)

Pixels = npt.NDArray[np.uint8]
Heat = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Occlusion:
    """The occluded variants of one image, uint8 [H, W, 3] of the model's size, and what their scores mean together."""

    pixels: Pixels

    def __len__(self) -> int:
        """How many variants there are."""
        return len(self._boxes())

    def batches(self, batch_size: int) -> Iterator[Pixels]:
        """The variants in order, uint8 [n, H, W, 3] with n = batch_size but for the last; made as they are asked for,
        because 169 images of 600 px are 180 MB."""
        boxes = self._boxes()
        fill = np.round(np.mean(self.pixels, axis=(0, 1), dtype=np.float64)).astype(np.uint8)
        for start in range(0, len(boxes), batch_size):
            chosen = boxes[start : start + batch_size]
            variants = np.repeat(self.pixels[None], len(chosen), axis=0)
            for variant, (rows, columns) in zip(variants, chosen, strict=True):
                variant[rows, columns] = fill
            yield variants

    def heat(self, base_score: float, scores: npt.NDArray[np.float32]) -> Heat:
        """What the score drops when a pixel is hidden, float32 [H, W]: the mean over the patches that hide the pixel.
        Below zero where hiding raises the score.

        Args:
            base_score: score of the explained label for the whole image.
            scores: its score for each variant, [K] in the order of `batches`.

        Raises:
            ArtifactError: a score is not a number.
            ValueError: not one score per variant.
        """
        boxes = self._boxes()
        drops = np.float64(np.float32(base_score)) - np.asarray(scores, np.float64)
        if not np.isfinite(drops).all():
            raise ArtifactError(
                "Expected scores that are numbers, to explain them. Received: NaN or infinity. "
                "Next: publish the model again."
            )
        total, count = np.zeros(self.pixels.shape[:2]), np.zeros(self.pixels.shape[:2])
        for (rows, columns), drop in zip(boxes, drops, strict=True):
            total[rows, columns] += drop
            count[rows, columns] += 1
        return (total / count).astype(np.float32)

    def _boxes(self) -> list[tuple[slice, slice]]:
        height, width = self.pixels.shape[:2]
        return [(rows, columns) for rows in _spans(height) for columns in _spans(width)]


def drawn_size(width_px: int, height_px: int) -> tuple[int, int]:
    """(height, width) at which `overlay_png` draws an image of this original size: decode it at this size, too, for a
    drawing with all that can be seen, because the model's own input may be 32 px wide."""
    scale = LONGEST_SIDE_PX / max(width_px, height_px)
    return max(1, round(height_px * scale)), max(1, round(width_px * scale))


def overlay_png(pixels: Pixels, heat: Heat, width_px: int, height_px: int) -> bytes:
    """PNG of the image in its original proportions with the heat over it, and under it the scale in words and colours.

    The same arguments give the same bytes. Where hiding raises the score nothing is coloured.

    Args:
        pixels: the image, uint8 [h, w, 3] of any size; best that of `drawn_size`.
        heat: the drops of `Occlusion.heat`, float32 [H, W].
        width_px: width of the original image; with its height it gives the proportions.
        height_px: height of the original image.
    """
    high, wide = drawn_size(width_px, height_px)
    image = Image.fromarray(pixels).convert("L").resize((wide, high), Image.Resampling.LANCZOS)
    grey = 60 + np.asarray(image, np.float32)[..., None] * (195 / 255)  # dark pages too leave room for dark colours
    most = max(float(heat.max()), LEAST_SCALE)
    smooth = Image.fromarray(heat.astype(np.float32)).resize((wide, high), Image.Resampling.BILINEAR)
    share = np.clip(np.asarray(smooth, np.float32) / most, 0, 1)
    blended = _blended(grey, share)
    canvas = Image.new("RGB", (max(wide, _LEAST_WIDTH_PX), high + _LEGEND_PX), "white")
    canvas.paste(Image.fromarray(blended), ((canvas.width - wide) // 2, 0))
    _draw_legend(canvas, high, most)
    stream = io.BytesIO()
    canvas.save(stream, "PNG", optimize=False, compress_level=6)
    return stream.getvalue()


def _spans(length: int) -> list[slice]:
    """Where a patch lies on one axis: two cells each, one further each time; all cells are hidden at least once."""
    cells = min(CELLS, length)
    patch = min(PATCH_CELLS, max(cells - 1, 1))  # something stays to be seen
    edges = [round(k * length / cells) for k in range(cells + 1)]
    return [slice(edges[k], edges[k + patch]) for k in range(cells - patch + 1)]


def _blended(grey: npt.NDArray[np.float32], share: npt.NDArray[np.float32]) -> Pixels:
    """The grey image [h, w, 1] with the colour of each share [h, w] of the scale over it, uint8 [h, w, 3]."""
    at = share * (len(_STOPS) - 1)
    colour = np.stack([np.interp(at, range(len(_STOPS)), _STOPS[:, channel]) for channel in range(3)], axis=-1)
    weight = _STRONGEST * np.power(share, 0.8)[..., None]
    return np.round(grey * (1 - weight) + colour * weight).astype(np.uint8)


def _draw_legend(canvas: Image.Image, top: int, most: float) -> None:
    draw = ImageDraw.Draw(canvas)
    font = ImageFont.load_default(size=14)
    left, right = 8, canvas.width - 8
    ramp = np.tile(np.linspace(0, 1, right - left, dtype=np.float32), (9, 1))
    canvas.paste(Image.fromarray(_blended(np.full((*ramp.shape, 1), 235, np.float32), ramp)), (left, top + 6))
    end = f"{most:.2f}" if most >= 0.1 else f"{most:.3f}"
    draw.text((left, top + 20), "0", fill="#222", font=font)
    draw.text(((left + right) // 2, top + 20), "drop in score when hidden", fill="#222", font=font, anchor="ma")
    draw.text((right, top + 20), end, fill="#222", font=font, anchor="ra")
