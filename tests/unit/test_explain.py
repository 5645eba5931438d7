"""The heat lies where the model looks, nowhere else, and a map without evidence is blank."""

import io

import numpy as np
import pytest
from PIL import Image

from cnn_ray.errors import ArtifactError
from cnn_ray.explain import LEAST_SCALE, LONGEST_SIDE_PX, Occlusion, drawn_size, overlay_png


def textured(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def explained(pixels: np.ndarray, score, batch_size: int = 50) -> np.ndarray:
    """The heat of a predictor given as score(image) -> float."""
    occlusion = Occlusion(pixels)
    scores = [score(variant) for batch in occlusion.batches(batch_size) for variant in batch]
    return occlusion.heat(score(pixels), np.array(scores, np.float32))


def looks_at(pixels: np.ndarray, top: int, bottom: int, left: int, right: int):
    """A predictor of 1.0 while the region is untouched, lower the more of it is hidden."""
    own = pixels[top:bottom, left:right].copy()
    return lambda image: float(np.mean(image[top:bottom, left:right] == own))


def drawn(png: bytes) -> np.ndarray:
    image = Image.open(io.BytesIO(png))
    assert (image.format, image.mode) == ("PNG", "RGB")
    return np.asarray(image)


@pytest.mark.parametrize(("height", "width"), [(32, 32), (224, 224), (61, 97), (299, 150)])
def test_the_heat_is_where_the_predictor_looks(height, width):
    pixels = textured(height, width)
    top, bottom, left, right = height // 2, height * 3 // 4, width // 8, width // 3

    heat = explained(pixels, looks_at(pixels, top, bottom, left, right))

    assert heat.shape == (height, width)
    assert heat.dtype == np.float32
    row, column = np.unravel_index(heat.argmax(), heat.shape)
    assert top <= row < bottom
    assert left <= column < right
    reach_y, reach_x = -(-height * 2 // 14), -(-width * 2 // 14)  # a patch that touches the region reaches this far
    outside = np.ones_like(heat, bool)
    outside[max(top - reach_y, 0) : bottom + reach_y, max(left - reach_x, 0) : right + reach_x] = False
    assert outside.any()
    assert np.all(heat[outside] == 0)
    assert heat[top:bottom, left:right].min() > 0


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 40), (2, 3), (13, 14), (15, 600), (224, 224)])
def test_each_pixel_is_hidden_in_at_most_200_variants(height, width):
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[0, 0] = 255 if height * width > 1 else 0
    occlusion = Occlusion(textured(height, width, seed=3))
    fill = np.round(occlusion.pixels.mean((0, 1))).astype(np.uint8)

    variants = np.concatenate(list(occlusion.batches(64)))

    assert len(variants) == len(occlusion) <= 200
    assert variants.dtype == np.uint8
    hidden = (variants == fill).all(axis=-1)
    assert hidden.any(axis=0).all()
    if height * width > 1:
        assert not hidden.all(axis=(1, 2)).any(), "something stays to be seen"
    for variant, mask in zip(variants, hidden, strict=True):
        assert np.array_equal(variant[~mask], occlusion.pixels[~mask])


def test_batches_have_the_asked_size_and_the_same_variants():
    occlusion = Occlusion(textured(40, 50))

    one, many = list(occlusion.batches(1)), list(occlusion.batches(64))

    assert [len(batch) for batch in many] == [64, 64, 41]
    assert np.array_equal(np.concatenate(one), np.concatenate(many))


def test_the_heat_is_the_mean_drop_over_the_patches_that_hide_a_pixel():
    occlusion = Occlusion(textured(28, 28))
    scores = np.random.default_rng(1).random(len(occlusion)).astype(np.float32)

    heat = occlusion.heat(0.75, scores)

    grid = 0.75 - scores.reshape(13, 13)  # patch (r, c) hides the cells (r..r+1, c..c+1) of 2 px each
    assert heat[0, 0] == pytest.approx(grid[0, 0], abs=1e-6)
    assert heat[12, 20] == pytest.approx(grid[5:7, 9:11].mean(), abs=1e-6)
    assert heat[27, 13] == pytest.approx(grid[12, 5:7].mean(), abs=1e-6)


def test_a_constant_predictor_and_a_plain_image_give_a_blank_map():
    page, plain = textured(64, 64), np.full((64, 64, 3), 255, np.uint8)
    blank = np.zeros((64, 64), np.float32)

    for pixels, score in ((page, lambda image: 0.7), (plain, lambda image: float(image.mean() / 255))):
        heat = explained(pixels, score)
        assert np.all(heat == 0)
        assert overlay_png(pixels, heat, 64, 64) == overlay_png(pixels, blank, 64, 64)
    picture = drawn(overlay_png(page, blank, 64, 64))[:LONGEST_SIDE_PX]
    assert np.all(picture == picture[..., :1]), "grey: nothing is coloured"


def test_rounding_is_not_drawn_as_evidence_and_evidence_is():
    pixels = np.full((32, 32, 3), 255, np.uint8)
    noise = np.random.default_rng(0).uniform(0, 1e-6, (32, 32)).astype(np.float32)
    heat = np.zeros((32, 32), np.float32)
    heat[:16, :16] = 0.4

    faint = drawn(overlay_png(pixels, noise, 32, 32))[:LONGEST_SIDE_PX].astype(int)
    seen = drawn(overlay_png(pixels, heat, 32, 32))[:LONGEST_SIDE_PX].astype(int)

    assert noise.max() < LEAST_SCALE
    assert np.abs(faint - 255).max() <= 3
    assert np.abs(seen[:300, :300] - 255).max() > 100
    assert np.all(seen[340:, 340:] == 255)


def test_where_hiding_raises_the_score_nothing_is_coloured():
    pixels = textured(32, 32)

    against = drawn(overlay_png(pixels, np.full((32, 32), -0.5, np.float32), 32, 32))

    assert np.all(against[:LONGEST_SIDE_PX] == against[:LONGEST_SIDE_PX, :, :1])


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
def test_scores_that_are_no_numbers_are_refused(wrong):
    occlusion = Occlusion(textured(32, 32))
    scores = np.full(len(occlusion), 0.5, np.float32)

    with pytest.raises(ArtifactError, match="Expected scores that are numbers"):
        occlusion.heat(wrong, scores)
    scores[7] = wrong
    with pytest.raises(ArtifactError, match="Expected scores that are numbers"):
        occlusion.heat(0.5, scores)
    with pytest.raises(ValueError, match="zip"):
        occlusion.heat(0.5, scores[:3] * 0)


@pytest.mark.parametrize(
    ("width", "height", "drawn_width", "drawn_height"),
    [(1366, 768, 640, 360), (360, 800, 288, 640), (20_000, 1, 640, 1), (1, 20_000, 1, 640), (30, 30, 640, 640)],
)
def test_the_overlay_has_the_original_proportions(width, height, drawn_width, drawn_height):
    pixels, heat = textured(32, 32), np.zeros((32, 32), np.float32)

    assert drawn_size(width, height) == (drawn_height, drawn_width)
    png = overlay_png(pixels, heat, width, height)

    picture = drawn(png)
    assert png == overlay_png(pixels.copy(), heat.copy(), width, height), "deterministic"
    assert picture.shape[1] == max(drawn_width, 220)
    legend = picture[drawn_height:]
    assert 20 <= len(legend) <= 60
    assert len(np.unique(legend.reshape(-1, 3), axis=0)) > 50, "the scale is drawn"
    assert len(png) < 2**20
