"""One photograph of a toy building: the camera, the painting of the scene, and what light and weather make of it."""

from dataclasses import dataclass

import cv2
import numpy as np

from datasets.toy.buildings import Card
from datasets.toy.scenes import Foreground, backdrop, noise
from datasets.toy.views import View

FINE = 2  # pictures are painted this many times larger and averaged down
OBSTACLES = ("tree", "tree", "person", "person", "pole", "car", "hoarding")
SIZES = {"tree": (0.4, 0.9), "person": (0.15, 0.45), "pole": (0.6, 1.1), "car": (0.1, 0.22), "hoarding": (0.1, 0.3)}


class Camera:
    """A pinhole camera before the building, turned so that the building lies in the frame as the view asks."""

    def __init__(self, view: View, cards: list[Card]) -> None:
        points = np.concatenate([c.corners for c in cards])
        low, high = points.min(0), points.max(0)
        size = float(max(high[0] - low[0], high[1]))
        target = np.array([(low[0] + high[0]) / 2, 0.45 * high[1], 0.5 * (low[2] + high[2])])
        yaw = np.deg2rad(view.yaw)
        away = np.array([np.sin(yaw), 0.0, -np.cos(yaw)]) * (view.distance * size + 0.5 * (high[2] - low[2]))
        self.place = target + away
        self.place[1] = view.lift * high[1] + 0.3
        forward = (target - self.place) / np.linalg.norm(target - self.place)
        right = np.cross([0.0, 1.0, 0.0], forward)
        right /= np.linalg.norm(right)
        self.right = right
        roll = np.deg2rad(view.roll)
        down = -np.cross(forward, right)
        turned = np.stack([np.cos(roll) * right + np.sin(roll) * down, np.cos(roll) * down - np.sin(roll) * right])
        self.axes = np.vstack([turned, forward])
        self.focal, self.middle = 1.0, np.zeros(2)
        flat = self.project(np.concatenate([self.corners(c) for c in cards]))
        extent = flat.max(0) - flat.min(0)
        frame = np.asarray(view.frame, np.float64) * FINE
        self.focal = view.fill * float(min(frame / extent))
        self.middle = frame * (0.5 + np.asarray(view.shift)) - self.focal * (flat.max(0) + flat.min(0)) / 2

    def corners(self, card: Card) -> np.ndarray:
        """The card's corners [4, 3], an upright card turned to the camera."""
        if not card.upright:
            return card.corners
        bottom = (card.corners[0] + card.corners[1]) / 2
        half = self.right * np.linalg.norm(card.corners[1] - card.corners[0]) / 2
        up = card.corners[3] - card.corners[0]
        return np.stack([bottom - half, bottom + half, bottom + half + up, bottom - half + up])

    def depth(self, points: np.ndarray) -> np.ndarray:
        return (points - self.place) @ self.axes[2]

    def project(self, points: np.ndarray) -> np.ndarray:
        """Points [n, 3] in front of the camera to positions [n, 2] in the picture."""
        local = (points - self.place) @ self.axes.T
        return local[:, :2] / local[:, 2:] * self.focal + self.middle

    def horizon(self) -> np.ndarray:
        ahead = self.axes[2] * (1, 0, 1) * 1e6
        return self.project(self.place + np.stack([ahead - self.right * 1e5, ahead + self.right * 1e5]))


def _quad(camera: Camera, card: Card) -> np.ndarray | None:
    """The card's corners in the picture, float32 [4, 2]; None where it is seen from behind or lies too near."""
    corners = camera.corners(card)
    if camera.depth(corners).min() < 0.5:
        return None
    quad = camera.project(corners)
    a, b = quad[2] - quad[0], quad[3] - quad[1]
    return quad.astype(np.float32) if a[0] * b[1] - a[1] * b[0] < 0 else None


def _warp(card: Card, quad: np.ndarray, shape: tuple[int, int]) -> tuple[tuple[slice, slice], np.ndarray] | None:
    """The card as it appears, uint8 [h, w, 4], and the part of the picture that it covers."""
    x0, y0 = np.maximum(np.floor(quad.min(0)).astype(int), 0)
    x1, y1 = np.minimum(np.ceil(quad.max(0)).astype(int) + 1, (shape[1], shape[0]))
    if x1 <= x0 or y1 <= y0:
        return None
    h, w = card.texture.shape[:2]
    source = np.array([(0, h), (w, h), (w, 0), (0, 0)], np.float32)
    matrix = cv2.getPerspectiveTransform(source, quad - np.array([x0, y0], np.float32))
    part = cv2.warpPerspective(card.texture, matrix, (int(x1 - x0), int(y1 - y0)))
    return (slice(y0, y1), slice(x0, x1)), part


def paint(picture: np.ndarray, cards: list[Card], camera: Camera, sun: float, seen: np.ndarray, value: int) -> None:
    """Lay the cards over the picture; `seen` (uint8) becomes `value` where they are."""
    for card in cards:
        quad = _quad(camera, card)
        warped = None if quad is None else _warp(card, quad, seen.shape)
        if warped is None:
            continue
        where, part = warped
        across = card.corners[1] - card.corners[0]
        shade = 1.0 if card.upright else 1 + 0.3 * sun * across[2] / (abs(across[0]) + abs(across[2]))
        alpha = part[..., 3:].astype(np.float32) * (1 / 255)
        region = picture[where]
        picture[where] = np.clip(region + alpha * (part[..., :3] * np.float32(shade) - region), 0, 255)
        seen[where][part[..., 3] > 127] = value


def _area(cards: list[Card], camera: Camera) -> float:
    """Area in pixels that the building would cover in a boundless picture, from a coarse mask."""
    quads = [(c, q) for c in cards if (q := _quad(camera, c)) is not None]
    corners = np.concatenate([q for _, q in quads])
    low, extent = corners.min(0), float((corners.max(0) - corners.min(0)).max())
    scale = 128 / extent
    mask = np.zeros((130, 130), np.uint8)
    for card, quad in quads:
        warped = _warp(card, (quad - low) * np.float32(scale), mask.shape)
        if warped is not None:
            mask[warped[0]] |= warped[1][..., 3] > 127
    return float(np.count_nonzero(mask)) / scale**2


def _shade(rng: np.random.Generator, picture: np.ndarray, seen: np.ndarray, strength: float) -> None:
    """The shadow of something outside the picture on the landmark, with an oblique soft edge."""
    height, width = seen.shape
    angle = rng.uniform(0, 2 * np.pi)
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    side = (x / width - rng.uniform(0.3, 0.7)) * np.cos(angle) + (y / height - rng.uniform(0.3, 0.7)) * np.sin(angle)
    dark = np.clip(side * 40, 0, 1) * strength * 0.75
    picture[:] = picture * (1 - (dark * (seen > 0))[..., None])


def _develop(rng: np.random.Generator, picture: np.ndarray, view: View) -> np.ndarray:
    """Weather, light and the camera's own faults on the finished scene; gives uint8 [h, w, 3]."""
    height, width = picture.shape[:2]
    picture = picture.astype(np.float32)
    if view.haze > 0:
        veil = np.clip(view.haze + 0.1 * noise(rng, (height, width), (4, 4)), 0, 0.9)[..., None]
        picture = picture + veil * (np.float32(210.0) - picture)
    if view.rain > 0:
        streaks = np.zeros((height, width), np.uint8)
        lean = rng.uniform(-0.4, 0.4)
        for x, y, length in rng.uniform(0, 1, (int(140 * view.rain), 3)) * (width, height, 0.14 * height):
            cv2.line(streaks, (int(x), int(y)), (int(x + lean * length), int(y + length)), 255, 1, cv2.LINE_AA)
        picture = picture * (1 - 0.2 * view.rain) + (streaks * np.float32(0.4 * view.rain))[..., None]
    picture = cv2.resize(picture, view.frame, interpolation=cv2.INTER_AREA)
    grey = picture.mean(2, keepdims=True)
    picture = grey + view.saturation * (picture - grey)
    picture = (picture - 120) * view.contrast + 120 * view.brightness
    if view.saturation > 0:
        picture = picture * np.asarray(view.gain, np.float32)
    if view.dusk > 0:
        tint = np.asarray((0.75, 0.5, 0.5) if rng.random() < 0.5 else (0.4, 0.5, 0.75), np.float32)
        picture = picture * (1 + view.dusk * (tint - 1))
    if view.blur > 0:
        picture = cv2.GaussianBlur(picture, (0, 0), view.blur)
        if rng.random() < 0.3:
            kernel = np.full((1, 5), 0.2, np.float32)
            picture = cv2.filter2D(picture, -1, kernel if rng.random() < 0.7 else kernel.T)
    picture = picture + view.grain * rng.standard_normal(picture.shape, np.float32)
    return np.clip(picture, 0, 255).astype(np.uint8)


@dataclass(frozen=True)
class Photo:
    image: np.ndarray  # uint8 [h, w, 3], BGR
    visible: float  # part of the landmark that is in the frame and not hidden, 0..1
    area: float  # part of the frame that it covers
    box: tuple[float, float, float, float] | None  # x1, y1, x2, y2 around what is visible


def take(rng: np.random.Generator, cards: list[Card], view: View, others: list[list[Card]]) -> Photo:
    """Photograph a building with `others` as its neighbours, which are put beside it."""
    camera = Camera(view, cards)
    size = (view.frame[1] * FINE, view.frame[0] * FINE)
    picture = backdrop(rng, size, camera.horizon())
    seen = np.zeros(size, np.uint8)
    edge = np.concatenate([c.corners for c in cards])
    low, high = edge.min(0)[0], edge.max(0)[0]
    scene = [(cards, 255)]
    for k, other in enumerate(others):
        corners = np.concatenate([c.corners for c in other])
        gap = rng.uniform(0.1, 3.0)
        x = high + gap - corners.min(0)[0] if k % 2 else low - gap - corners.max(0)[0]
        moved = np.array([x, 0.0, rng.uniform(0, 4.0)])
        scene.append(([Card(c.texture, c.corners + moved, c.upright) for c in other], 0))
    scene.sort(key=lambda item: -float(camera.depth(np.concatenate([c.corners for c in item[0]])).mean()))
    for parts, value in scene:
        paint(picture, parts, camera, view.sun, seen, value)
    if view.shadow > 0:
        _shade(rng, picture, seen, view.shadow)
    front = Foreground(picture, seen)
    for _ in range(view.obstacles):
        kind = str(rng.choice(OBSTACLES))
        front.add(kind, rng, size=rng.uniform(*SIZES[kind]))
    rows, columns = np.nonzero(seen)
    box = None
    if rows.size:
        x1, y1, x2, y2 = columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
        box = (float(x1) / FINE, float(y1) / FINE, float(x2) / FINE, float(y2) / FINE)
    visible = min(1.0, rows.size / max(_area(cards, camera), 1.0))
    return Photo(_develop(rng, picture, view), visible, rows.size / seen.size, box)
