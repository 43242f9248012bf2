"""SYN, the built-in data set: simple shapes whose difficulty is known, drawn with NumPy.

Ten classes of shapes on 32x32 color images. Each image has a difficulty in [0, 1], drawn
uniformly: with it the contrast falls, and noise, clutter and occlusion grow. Size, position,
rotation and colors are independent of it.
"""

from typing import NamedTuple

import numpy as np

CLASSES = (
    "disc", "ring", "square", "triangle", "star", "cross", "bar", "crescent", "half disc", "angle",
)  # fmt: skip
SIZE = 32  # pixels
NUM_TRAIN, NUM_TEST = 10_000, 2_000
SEED = 0
VERSION = 1  # to be raised with every change of the drawing, so that caches are drawn again

_CHUNK = 500  # images drawn at once: 500 float64 planes of 32x32 are 4 MB
_STROKES = 6  # distracting strokes at difficulty 1


class Drawing(NamedTuple):
    """Images (N, 3, 32, 32) in bytes, labels (N,) int64, difficulty (N,) float32 in [0, 1]."""

    images: np.ndarray
    labels: np.ndarray
    difficulty: np.ndarray


def draw(num_images: int, seed: int) -> Drawing:
    """Return images of equally many labels (up to rounding): the same bytes for the same seed."""
    random = np.random.default_rng(seed)
    labels = random.permutation(np.arange(num_images) % len(CLASSES))
    difficulty = random.random(num_images)
    images = [
        _draw_chunk(labels[i : i + _CHUNK], difficulty[i : i + _CHUNK], random)
        for i in range(0, num_images, _CHUNK)
    ]
    return Drawing(np.concatenate(images), labels, difficulty.astype(np.float32))


def _draw_chunk(labels: np.ndarray, difficulty: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Draw images (n, 3, 32, 32) in bytes."""
    n = len(labels)
    d = difficulty[:, None, None]
    image, ink = _colors(random, difficulty)
    center = random.uniform(-3, 3, (2, n, 1, 1))
    radius = random.uniform(8, 12, (n, 1, 1))
    x, y = _local_grid(center, random.uniform(0, 2 * np.pi, (n, 1, 1)))
    distance = np.empty((n, SIZE, SIZE))
    for label, name in enumerate(CLASSES):
        of_class = labels == label
        distance[of_class] = _distance(name, x[of_class], y[of_class], radius[of_class])
    shape = _coverage(distance)

    # Occlusion: a disc of background laid over the shape's rim, its radius growing to half of the shape's.
    angle = random.uniform(0, 2 * np.pi, (n, 1, 1))
    offset = 0.7 * radius
    hidden = np.hypot(x - offset * np.cos(angle), y - offset * np.sin(angle)) - 0.5 * d * radius
    shape *= 1 - _coverage(hidden)

    # Clutter: strokes in the shape's own color, here and there.
    for stroke in range(_STROKES):
        u, v = _local_grid(random.uniform(-15, 15, (2, n, 1, 1)), random.uniform(0, np.pi, (n, 1, 1)))
        length = random.uniform(3, 7, (n, 1, 1))
        drawn = d > (stroke + random.random((n, 1, 1))) / _STROKES
        shape = np.maximum(shape, _coverage(_box(u, v, length, 0.8)) * drawn)

    image = image + (ink - image) * shape[:, None]
    image = image + random.standard_normal(image.shape) * (4 + 15 * d[:, None])
    return np.clip(np.rint(image), 0, 255).astype(np.uint8)


def _colors(random: np.random.Generator, difficulty: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return backgrounds (n, 3, 32, 32), a gradient each, and ink colors (n, 3, 1, 1), in [0, 255]."""
    n = len(difficulty)
    base = random.uniform(70, 185, (n, 3, 1, 1))
    slope = random.uniform(-0.8, 0.8, (2, n, 3, 1, 1))
    row, column = np.mgrid[:SIZE, :SIZE] - (SIZE - 1) / 2
    background = base + slope[0] * row + slope[1] * column
    direction = random.standard_normal((n, 3, 1, 1))
    direction /= np.linalg.norm(direction, axis=1, keepdims=True)
    contrast = 110 - 50 * difficulty[:, None, None, None]
    return background, base + contrast * direction


def _local_grid(center: np.ndarray, angle: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return pixel coordinates relative to centers (2, n, 1, 1), turned by angles (n, 1, 1)."""
    row, column = np.mgrid[:SIZE, :SIZE] - (SIZE - 1) / 2
    row, column = row - center[0], column - center[1]
    cos, sin = np.cos(angle), np.sin(angle)
    return cos * column + sin * row, cos * row - sin * column


def _coverage(distance: np.ndarray) -> np.ndarray:
    """Turn signed distance from an outline, in pixels, inside negative, into coverage in [0, 1]."""
    return np.clip(0.5 - distance, 0, 1)


def _box(x: np.ndarray, y: np.ndarray, half_width, half_height) -> np.ndarray:
    return np.maximum(np.abs(x) - half_width, np.abs(y) - half_height)


def _distance(name: str, x: np.ndarray, y: np.ndarray, r: np.ndarray) -> np.ndarray:
    """Return (about) the signed distance of each pixel from the outline of a class's shape of radius r."""
    from_center = np.hypot(x, y)
    match name:
        case "disc":
            return from_center - 0.9 * r
        case "ring":
            return np.abs(from_center - 0.8 * r) - 0.2 * r
        case "square":
            return _box(x, y, 0.78 * r, 0.78 * r)
        case "triangle":
            sides = [np.cos(a) * x + np.sin(a) * y for a in np.arange(3) * 2 * np.pi / 3]
            return np.max(sides, axis=0) - 0.5 * r
        case "star":
            fifth = 2 * np.pi / 5
            angle = np.abs((np.arctan2(y, x) + np.pi) % fifth - fifth / 2)
            return 0.6 * (from_center - r * (1 - 0.6 * angle / (fifth / 2)))
        case "cross":
            return np.minimum(_box(x, y, r, 0.25 * r), _box(x, y, 0.25 * r, r))
        case "bar":
            return _box(x, y, r, 0.3 * r)
        case "crescent":
            return np.maximum(from_center - r, 0.75 * r - np.hypot(x - 0.5 * r, y))
        case "half disc":
            return np.maximum(from_center - r, -x)
        case "angle":
            arms = _box(x + 0.5 * r, y, 0.22 * r, 0.9 * r), _box(x, y + 0.68 * r, 0.72 * r, 0.22 * r)
            return np.minimum(*arms)
