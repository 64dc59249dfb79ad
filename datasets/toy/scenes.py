"""What stands around a toy building in a picture: sky, ground and skyline behind it, people, trees and cars before it.

A picture in the making is uint8 [h, w, 3], BGR (cv2 draws smooth edges on bytes only). Sizes of things are parts of the
picture's height.
"""

from collections.abc import Sequence
from itertools import pairwise

import cv2
import numpy as np

SHIFT = 4  # fractional bits of the coordinates given to cv2
SKIES = ((230, 200, 165), (220, 214, 206), (200, 200, 205), (232, 216, 196), (190, 176, 168), (165, 165, 170))
GROUNDS = ((96, 128, 112), (150, 156, 160), (112, 114, 118), (150, 168, 176), (130, 142, 154), (84, 104, 92))


def _fixed(points: Sequence | np.ndarray) -> np.ndarray:
    return np.rint(np.asarray(points, np.float64) * (1 << SHIFT)).astype(np.int32)


def _colour(rng: np.random.Generator, options: tuple, spread: float) -> tuple[float, ...]:
    colour = np.asarray(options[int(rng.integers(len(options)))]) + rng.normal(0, spread, 3)
    return tuple(np.clip(colour * rng.uniform(0.8, 1.08), 5, 250).tolist())


def noise(rng: np.random.Generator, shape: tuple[int, int], cells: tuple[int, int]) -> np.ndarray:
    """Smooth noise float32 [h, w] of zero mean with about `cells` bumps down and across."""
    coarse = rng.standard_normal((max(2, cells[0]), max(2, cells[1])), np.float32)
    return cv2.resize(coarse, (shape[1], shape[0]), interpolation=cv2.INTER_CUBIC)


def backdrop(rng: np.random.Generator, shape: tuple[int, int], horizon: np.ndarray) -> np.ndarray:
    """Sky, clouds, a skyline and the ground; `horizon` [2, 2] holds two points (x, y), left and right, of that line."""
    whole, shape, horizon = shape, (shape[0] // 2, shape[1] // 2), horizon / 2  # it is soft: half the size will do
    height, width = shape
    (x0, y0), (x1, y1) = horizon
    left = y0 - (y1 - y0) / (x1 - x0) * x0
    right = y0 + (y1 - y0) / (x1 - x0) * (width - x0)
    level = (left + right) / 2
    sky = np.asarray(_colour(rng, SKIES, 8), np.float32)
    ramp = np.clip((np.arange(height, dtype=np.float32) - level) / height + 1, 0, 1)[:, None, None]
    light = np.broadcast_to(sky * (0.72 + 0.38 * ramp), (height, width, 3))
    if rng.random() < 0.6:
        cloud = np.clip(noise(rng, shape, (6, 4)) * rng.uniform(0.2, 0.6), 0, 0.8)[..., None]
        light = light + cloud * (245.0 * rng.uniform(0.8, 1.0) - light)
    picture = np.clip(light, 0, 255).astype(np.uint8)
    for _ in range(int(rng.integers(1, 4))):  # hills, trees or far houses, nearer and darker row by row
        tint = _colour(rng, (*GROUNDS, *SKIES[1:]), 10)
        steps = int(rng.integers(5, 14))
        rise = rng.uniform(0.02, 0.2) * height * np.abs(rng.normal(0.6, 0.5, steps))
        xs = np.linspace(0, width, steps)
        ridge = list(zip(xs, np.interp(xs, [0, width], [left, right]) - rise, strict=True))
        if rng.random() < 0.5:  # houses have flat tops
            ridge = [(x, y) for (left_x, y), (right_x, _) in pairwise(ridge) for x in (left_x, right_x)]
        cv2.fillPoly(picture, [_fixed([(0, left + 2), *ridge, (width, right + 2)])], tint, cv2.LINE_AA, SHIFT)
    ground = np.zeros(shape, np.uint8)
    far = max(height, level) + 4 * height
    cv2.fillPoly(ground, [_fixed([(0, left), (width, right), (width, far), (0, far)])], 1, cv2.LINE_8, SHIFT)
    soil = np.asarray(_colour(rng, GROUNDS, 12), np.float32)
    rough = 1 + rng.uniform(0.03, 0.12) * noise(rng, shape, (height // 5, width // 14))
    surface = np.clip(soil * rough[..., None], 0, 255).astype(np.uint8)
    if rng.random() < 0.5:  # a path or the lines of a street
        end = (rng.uniform(0.2, 0.8) * width, level)
        foot = rng.uniform(-0.2, 1.0) * width
        path = [end, (foot, height), (foot + rng.uniform(0.1, 0.6) * width, height)]
        cv2.fillPoly(surface, [_fixed(path)], _colour(rng, GROUNDS, 10), cv2.LINE_AA, SHIFT)
    picture[ground > 0] = surface[ground > 0]
    return cv2.resize(picture, (whole[1], whole[0]), interpolation=cv2.INTER_LINEAR)


class Foreground:
    """Things in front: painted into the picture, and cut out of the plane that says where the landmark is seen."""

    def __init__(self, picture: np.ndarray, seen: np.ndarray) -> None:
        self.picture, self.seen = picture, seen
        self.height, self.width = seen.shape

    def _polygon(self, points: Sequence | np.ndarray, colour: Sequence[float]) -> None:
        pixels = [_fixed(points)]
        cv2.fillPoly(self.picture, pixels, colour, cv2.LINE_AA, SHIFT)
        cv2.fillPoly(self.seen, pixels, 0, cv2.LINE_8, SHIFT)

    def _disc(self, x: float, y: float, rx: float, ry: float, colour: Sequence[float]) -> None:
        angle = np.linspace(0, 2 * np.pi, 15)[:-1]
        self._polygon(np.stack([x + rx * np.cos(angle), y + ry * np.sin(angle)], 1), colour)

    def _rect(self, x0: float, y0: float, x1: float, y1: float, colour: Sequence[float]) -> None:
        self._polygon([(x0, y0), (x1, y0), (x1, y1), (x0, y1)], colour)

    def add(self, kind: str, rng: np.random.Generator, *, size: float) -> None:
        """Put a tree, person, pole, car or hoarding somewhere; `size` is its height."""
        x, tall = rng.uniform(0, 1) * self.width, size * self.height
        foot = self.height * rng.uniform(0.86, 1.05)
        tint = np.asarray(rng.uniform(20, 190, 3))
        if kind == "tree":
            bark, leaf = (40, 52, 66), np.asarray(_colour(rng, ((50, 110, 70), (40, 80, 80), (60, 120, 150)), 12))
            self._rect(x - 0.04 * tall, foot - tall, x + 0.04 * tall, foot, bark)
            bare = rng.random() < 0.2
            for _ in range(10 if bare else 45):
                angle, radius = rng.uniform(0, 2 * np.pi), 0.33 * tall * np.sqrt(rng.random())
                cx, cy = x + radius * np.cos(angle), foot - tall + radius * np.sin(angle)
                if bare:
                    self._polygon([(x, foot - 0.55 * tall), (x + 0.02 * tall, foot - 0.55 * tall), (cx, cy)], bark)
                else:
                    r = tall * rng.uniform(0.05, 0.1)
                    self._disc(cx, cy, r, r, (leaf * rng.uniform(0.5, 1.25)).tolist())
        elif kind == "person":
            wide = 0.16 * tall
            self._rect(x - wide * 0.7, foot - 0.5 * tall, x + wide * 0.7, foot, (tint * 0.5).tolist())
            self._disc(x, foot - 0.62 * tall, wide, 0.24 * tall, tint.tolist())
            self._disc(x, foot - 0.92 * tall, 0.09 * tall, 0.09 * tall, (110, 140, 180))
        elif kind == "pole":
            thick, dark = max(1.5, 0.012 * tall), (tint * 0.35).tolist()
            self._rect(x - thick, foot - tall, x + thick, foot, dark)
            self._rect(x, foot - tall, x + 0.12 * tall, foot - tall + 2 * thick, dark)
            self._disc(x + 0.12 * tall, foot - tall + 3 * thick, 3 * thick, 2 * thick, (170, 210, 225))
        elif kind == "car":
            long, foot = 2.3 * tall, self.height * rng.uniform(0.93, 1.02)
            self._rect(x - long / 2, foot - 0.6 * tall, x + long / 2, foot - 0.12 * tall, tint.tolist())
            roof = [
                (x - 0.34 * long, foot - 0.58 * tall),
                (x + 0.36 * long, foot - 0.58 * tall),
                (x + 0.22 * long, foot - tall),
                (x - 0.2 * long, foot - tall),
            ]
            self._polygon(roof, (tint * 0.6).tolist())
            middle = foot - 0.72 * tall
            self._polygon([(0.9 * px + 0.1 * x, 0.9 * py + 0.1 * middle) for px, py in roof], (80, 76, 70))
            for side in (-0.3, 0.3):
                self._disc(x + side * long, foot - 0.14 * tall, 0.17 * tall, 0.17 * tall, (30, 30, 30))
        else:
            assert kind == "hoarding", kind
            wide = rng.uniform(0.5, 1.2) * tall
            self._rect(x - wide, foot - tall, x + wide, self.height, (tint * 0.6 + 60).tolist())
            self._rect(x - 0.8 * wide, foot - 0.85 * tall, x + 0.8 * wide, foot - 0.45 * tall, tint.tolist())
