"""The conditions of a toy photograph: where the camera stands, light, weather, and what stands in the way."""

from dataclasses import dataclass

import numpy as np

FRAMES = ((160, 120), (120, 160), (136, 136), (168, 112))  # width, height of a finished picture


@dataclass(frozen=True)
class View:
    """Conditions of a picture. Angles in degrees, lengths in parts of the building's size, the rest in 0..1."""

    frame: tuple[int, int]
    yaw: float
    roll: float
    lift: float  # height of the camera
    distance: float
    fill: float  # size of the building in the frame; above 1 it is cropped
    shift: tuple[float, float]  # of the building's middle in the frame
    gain: tuple[float, float, float]  # white balance, BGR
    saturation: float
    contrast: float
    brightness: float
    sun: float  # -1..1: light from the left or the right
    shadow: float
    dusk: float
    haze: float
    rain: float
    blur: float  # pixels
    grain: float
    quality: int  # of the JPEG
    obstacles: int
    neighbours: int

    @property
    def severity(self) -> float:
        """How much the conditions change the look of the building, about 0..1; cropping and occlusion not counted."""
        small = max(0.0, 0.55 - self.fill)
        return (
            0.45 * abs(self.yaw) / 50
            + 0.25 * self.dusk
            + 0.5 * self.haze
            + 0.15 * self.rain
            + 0.8 * small
            + 0.12 * self.blur
            + 0.12 * self.shadow
            + 0.1 * (self.quality < 35)
            + 0.01 * abs(self.roll)
        )


def draw_view(rng: np.random.Generator, level: float, aspect: float) -> View:
    """Random conditions, from kind (`level` 0) to cruel (1), for a building of this width over height."""

    def some(chance: float, low: float, high: float) -> float:
        value = rng.uniform(low, high) * (0.4 + 0.6 * level)
        return value if rng.random() < chance * (0.25 + 0.75 * level) else 0.0

    crop = rng.random() < 0.1 + 0.25 * level
    fill = 1 + rng.uniform(0.05, 0.25 + 1.7 * level**2) if crop else rng.uniform(0.92 - 0.4 * level, 1.06)
    reach = (0.02 + 0.11 * level) * max(1.0, fill)
    warmth, tint = rng.normal(0, 0.03 + 0.07 * level), rng.normal(0, 0.03)
    fitting = [f for f in FRAMES if 0.7 < f[0] / f[1] / aspect < 1.43] if rng.random() < 0.75 else []
    frames = fitting or FRAMES
    return View(
        frame=frames[int(rng.integers(len(frames)))],
        yaw=rng.uniform(-1, 1) * (12 + 33 * level),
        roll=rng.normal(0, 1 + 3 * level),
        lift=rng.uniform(0.05, 0.35 + 0.4 * level),
        distance=rng.uniform(1.4, 3.5),
        fill=fill,
        shift=(rng.uniform(-1, 1) * reach, rng.uniform(-1, 1) * reach),
        gain=(1 - warmth, 1 + tint, 1 + warmth),
        saturation=0.0 if rng.random() < 0.08 * level else rng.uniform(0.7, 1.25),
        contrast=rng.uniform(0.8, 1.2),
        brightness=rng.uniform(0.8, 1.15),
        sun=rng.uniform(-1, 1),
        shadow=some(0.5, 0.3, 0.8),
        dusk=some(0.3, 0.4, 0.9),
        haze=some(0.4, 0.2, 0.6),
        rain=some(0.3, 0.4, 1.0),
        blur=some(0.5, 0.4, 1.2),
        grain=rng.uniform(0.5, 2 + 5 * level),
        quality=int(rng.uniform(85 - 60 * level, 95)),
        obstacles=int(rng.integers(0, 2 + round(2.5 * level))),
        neighbours=int(rng.integers(0, 3)),
    )
