"""Flat parts of the toy buildings, painted with cv2: walls, windows, doors, gables, domes, ornaments.

Everything is drawn in building units (about a third of a storey), with x to the right and y upwards, so that the
callers never see pixels. Colours are BGR tuples of 0..255.
"""

from collections.abc import Sequence

import cv2
import numpy as np

SCALE = 30  # texture pixels per building unit
SHIFT = 4  # fractional bits of the coordinates given to cv2, for edges finer than a pixel
Colour = tuple[float, float, float]
Points = Sequence[tuple[float, float]]

WINDOWS = ("plain", "cross", "arch", "pointed", "round", "twin", "hood", "shutters", "grid", "fan")
MASONRY = ("plain", "brick", "blocks", "stripes", "timber", "panels")


def tone(colour: Colour, factor: float) -> Colour:
    """The colour made lighter (factor above 1) or darker."""
    blue, green, red = (float(min(255.0, max(0.0, c * factor))) for c in colour)
    return blue, green, red


class Painter:
    """A picture of `width` x `height` units with an alpha plane; alpha starts full, or empty for cut-out parts."""

    def __init__(self, width: float, height: float, colour: Colour, *, empty: bool = False) -> None:
        self.width, self.height = width, height
        shape = (max(2, round(height * SCALE)), max(2, round(width * SCALE)))
        self.image = np.empty((*shape, 3), np.uint8)
        self.image[:] = colour
        self.alpha = np.full(shape, 0 if empty else 255, np.uint8)

    def _pixels(self, points: Points) -> np.ndarray:
        xy = np.asarray(points, np.float64) * (SCALE, -SCALE) + (0, self.image.shape[0])
        return np.rint((xy - 0.5) * (1 << SHIFT)).astype(np.int32)

    def polygon(self, points: Points, colour: Colour) -> None:
        pixels = [self._pixels(points)]
        cv2.fillPoly(self.image, pixels, colour, cv2.LINE_AA, SHIFT)
        cv2.fillPoly(self.alpha, pixels, 255, cv2.LINE_AA, SHIFT)

    def rect(self, x0: float, y0: float, x1: float, y1: float, colour: Colour) -> None:
        self.polygon([(x0, y0), (x1, y0), (x1, y1), (x0, y1)], colour)

    def line(self, points: Points, colour: Colour, width: float = 0.05) -> None:
        thickness = max(1, round(width * SCALE))
        cv2.polylines(self.image, [self._pixels(points)], False, colour, thickness, cv2.LINE_AA, SHIFT)

    def disc(self, x: float, y: float, rx: float, ry: float, colour: Colour) -> None:
        angle = np.linspace(0, 2 * np.pi, 25)[:-1]
        self.polygon(list(zip(x + rx * np.cos(angle), y + ry * np.sin(angle), strict=True)), colour)

    def weather(self, rng: np.random.Generator, strength: float) -> None:
        """Stains and grain, so that a wall is never one flat colour."""
        height, width = self.alpha.shape
        coarse = rng.normal(0, 1, (max(2, height // 24), max(2, width // 24))).astype(np.float32)
        field = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
        field = field + 0.6 * rng.standard_normal((height, width), np.float32)
        self.image = np.clip(self.image * (1 + strength * field)[..., None], 0, 255).astype(np.uint8)


def outline(kind: str, x: float, y: float, width: float, height: float) -> list[tuple[float, float]]:
    """Outline of an opening that stands on (x, y), x being its middle: square, round-headed, pointed or a disc."""
    half = width / 2
    if kind == "round":
        angle = np.linspace(0, 2 * np.pi, 21)[:-1]
        radius = min(half, height / 2)
        return list(zip(x + radius * np.cos(angle), y + height / 2 + radius * np.sin(angle), strict=True))
    if kind == "arch":
        rise = min(half, height)
        angle = np.linspace(0, np.pi, 13)
        head = list(zip(x + half * np.cos(angle), y + height - rise + rise * np.sin(angle), strict=True))
    elif kind == "pointed":
        rise = min(1.5 * half, height)
        t = np.linspace(0, 1, 6)
        bow = half * (1 - t**1.7)
        left = list(zip(x + bow, y + height - rise + rise * t, strict=True))
        head = left + [(2 * x - px, py) for px, py in reversed(left[:-1])]
    else:
        head = [(x + half, y + height), (x - half, y + height)]
    return [(x - half, y), (x + half, y), *head]


def window(p: Painter, kind: str, x: float, y: float, width: float, height: float, glass: Colour, trim: Colour) -> None:
    """One window of the kinds in WINDOWS, standing on (x, y) with its frame around it."""
    shape = {"arch": "arch", "fan": "arch", "pointed": "pointed", "round": "round"}.get(kind, "square")
    frame = 0.11
    if kind == "shutters":
        for side in (-1, 1):
            p.rect(x + side * width * 0.5, y, x + side * width * 0.92, y + height, tone(trim, 0.55))
    if kind == "twin":
        p.polygon(outline("arch", x, y - frame, width + 2 * frame, height + 2 * frame), trim)
        for side in (-1, 1):
            p.polygon(outline("arch", x + side * width * 0.26, y, width * 0.42, height * 0.72), glass)
        p.disc(x, y + height * 0.82, width * 0.13, width * 0.13, glass)
        return
    p.polygon(outline(shape, x, y - frame, width + 2 * frame, height + 2 * frame), trim)
    p.polygon(outline(shape, x, y, width, height), glass)
    if kind in ("cross", "hood", "grid"):
        p.line([(x, y), (x, y + height)], trim, 0.07)
        p.line([(x - width / 2, y + height * 0.62), (x + width / 2, y + height * 0.62)], trim, 0.07)
    if kind == "grid":
        p.line([(x - width / 2, y + height * 0.3), (x + width / 2, y + height * 0.3)], trim, 0.07)
    if kind == "hood":
        top = y + height + frame
        p.polygon([(x - width * 0.75, top), (x + width * 0.75, top), (x, top + width * 0.5)], trim)
    if kind == "fan":
        p.rect(x - width / 2, y + height * 0.55, x + width / 2, y + height * 0.62, trim)
    if kind in ("arch", "pointed", "round"):
        p.line([(x, y), (x, y + height)], trim, 0.06)
    if kind == "plain":
        p.rect(x - width * 0.7, y - 2 * frame, x + width * 0.7, y - frame, trim)


def door(p: Painter, kind: str, x: float, width: float, height: float, leaf: Colour, trim: Colour) -> None:
    """A door on the ground line: plain, arch, pointed, or a portal of receding arches with steps."""
    shape = "arch" if kind == "portal" else kind
    rings = (0.45, 0.3, 0.15) if kind == "portal" else (0.16,)
    for i, ring in enumerate(rings):
        p.polygon(outline(shape, x, 0, width + 2 * ring, height + ring), tone(trim, 1 - 0.18 * (i % 2)))
    p.polygon(outline(shape, x, 0, width, height), leaf)
    p.line([(x, 0), (x, height)], tone(leaf, 0.6), 0.05)
    if kind == "portal":
        p.rect(x - width, 0, x + width, 0.16, tone(trim, 0.85))


def masonry(p: Painter, kind: str, wall: Colour, second: Colour, bay: float) -> None:
    """The pattern of the wall, one of MASONRY; `bay` is the distance of the timber posts."""
    w, h = p.width, p.height
    dark = tone(wall, 0.68)
    if kind in ("brick", "blocks"):
        course = 0.36 if kind == "brick" else 0.8
        for row, y in enumerate(np.arange(course, h, course)):
            p.line([(0, y), (w, y)], dark, 0.07)
            for x in np.arange(course * (1 + row % 2), w, 2 * course):
                p.line([(x, y), (x, y - course)], dark, 0.07)
    elif kind == "stripes":
        for y in np.arange(0.5, h, 1.0):
            p.rect(0, y, w, y + 0.5, second)
    elif kind == "timber":
        for y in np.arange(0.05, h, 1.5):
            p.line([(0, y), (w, y)], second, 0.16)
        for i, x in enumerate(np.arange(0, w + 0.1, bay)):
            p.line([(x, 0), (x, h)], second, 0.16)
            for y in np.arange(0, h, 1.5):
                ends = [(x, y), (x + bay, y + 1.5)] if (i + int(y)) % 2 else [(x + bay, y), (x, y + 1.5)]
                p.line(ends, second, 0.1)
    elif kind == "panels":
        for x in np.arange(0, w, bay / 2):
            p.line([(x, 0), (x, h)], dark, 0.14)


def cap(kind: str, width: float, height: float, colour: Colour, trim: Colour) -> Painter:
    """The top of a tower or drum, cut out: spire, onion, dome, lantern (a dome with a small tower) or pyramid."""
    p = Painter(width, height, colour, empty=True)
    mid, half = width / 2, width / 2
    if kind == "spire":
        p.polygon([(mid - 0.82 * half, 0), (mid + 0.82 * half, 0), (mid, height)], colour)
        p.polygon([(mid, 0), (mid + 0.82 * half, 0), (mid, height)], tone(colour, 0.75))
    elif kind == "pyramid":
        p.polygon([(0, 0), (width, 0), (mid + 0.12, height * 0.9), (mid - 0.12, height * 0.9)], colour)
        p.polygon([(mid, 0), (width, 0), (mid + 0.12, height * 0.9), (mid, height * 0.9)], tone(colour, 0.75))
    else:
        body = height * {"onion": 0.78, "dome": 0.85, "lantern": 0.6}[kind]
        t = np.linspace(0, 1, 15)
        if kind == "onion":
            bulge = half * np.interp(t, [0, 0.12, 0.32, 0.55, 0.8, 1], [0.6, 0.86, 1, 0.72, 0.2, 0.04])
        else:
            bulge = half * np.sqrt(np.maximum(0, 1 - t**2.2)) * 0.97
        right = list(zip(mid + bulge, body * t, strict=True))
        p.polygon([*right, *[(2 * mid - x, y) for x, y in reversed(right)]], colour)
        lit = list(zip(mid + bulge * 0.45, body * t, strict=True))
        p.polygon([*right, *reversed(lit)], tone(colour, 0.76))
        for part in (-0.55, 0.0, 0.55):
            p.line(list(zip(mid + bulge * part, body * t, strict=True)), tone(colour, 0.62), 0.06)
        if kind == "lantern":
            p.rect(mid - 0.2 * half, body * 0.97, mid + 0.2 * half, height * 0.82, trim)
            p.rect(mid - 0.08 * half, body, mid + 0.08 * half, height * 0.78, tone(trim, 0.4))
            p.polygon([(mid - 0.26 * half, height * 0.82), (mid + 0.26 * half, height * 0.82), (mid, height)], colour)
    p.rect(mid - 0.05, height * 0.75, mid + 0.05, height, tone(trim, 0.8))
    return p


def ornament(p: Painter, kind: str, x: float, y: float, size: float, trim: Colour, accent: Colour) -> None:
    """A centre piece around (x, y): rose window, clock, crest, niche with a statue, banner or sunburst."""
    r = size / 2
    dark = (38.0, 34.0, 34.0)
    if kind in ("rose", "clock", "sun"):
        p.disc(x, y, r, r, trim)
        p.disc(x, y, r * 0.82, r * 0.82, {"rose": dark, "clock": (225, 235, 238), "sun": accent}[kind])
    if kind == "rose":
        for angle in np.arange(8) * np.pi / 4:
            p.line([(x, y), (x + r * np.cos(angle), y + r * np.sin(angle))], trim, 0.07)
        p.disc(x, y, r * 0.28, r * 0.28, accent)
    elif kind == "clock":
        p.line([(x, y + r * 0.65), (x, y), (x + r * 0.4, y - r * 0.25)], dark, 0.11)
    elif kind == "sun":
        for angle in np.arange(6) * np.pi / 6:
            dx, dy = r * np.cos(angle), r * np.sin(angle)
            p.line([(x - dx, y - dy), (x + dx, y + dy)], trim, 0.09)
    elif kind == "crest":
        p.polygon([(x - r, y + r), (x + r, y + r), (x + r, y - 0.2 * r), (x, y - r), (x - r, y - 0.2 * r)], trim)
        p.polygon([(x, y + 0.8 * r), (x + 0.8 * r, y + 0.8 * r), (x + 0.8 * r, y - 0.1 * r), (x, y - 0.8 * r)], accent)
    elif kind == "niche":
        p.polygon(outline("arch", x, y - r, size * 0.7, size * 1.2), tone(trim, 0.45))
        p.rect(x - 0.12 * size, y - r, x + 0.12 * size, y + 0.25 * size, trim)
        p.disc(x, y + 0.37 * size, 0.11 * size, 0.13 * size, trim)
    elif kind == "banner":
        side, low = 0.6 * r, y - 1.6 * r
        p.polygon([(x - side, y + r), (x + side, y + r), (x + side, low), (x, y - 1.1 * r), (x - side, low)], accent)
        p.rect(x - 0.6 * r, y + 0.1 * r, x + 0.6 * r, y + 0.4 * r, trim)
