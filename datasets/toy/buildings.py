"""The toy buildings put up: a plan becomes textured cards in space.

A building stands on the ground plane y = 0 with its front in the plane z = 0, x to the right, y up and z away from
the viewer, its middle at x = 0. A card is a flat texture spanned over a parallelogram; cards are listed from back to
front, as a painter would lay them for any viewer in front of the facade.
"""

from dataclasses import dataclass

import cv2
import numpy as np

from datasets.toy.facades import SCALE, Painter, cap, door, masonry, ornament, tone, window
from datasets.toy.plans import GABLES, Plan, Tower

Vector = tuple[float, float, float]


@dataclass(frozen=True)
class Card:
    """`texture` uint8 [h, w, 4] (BGR, alpha) over `corners` [4, 3]: bottom left, bottom right, top right, top left,
    as seen from its front. An `upright` card turns about the vertical through its middle to face the viewer."""

    texture: np.ndarray
    corners: np.ndarray
    upright: bool = False


def _storeys(p: Painter, plan: Plan, bays: int, *, front: bool) -> None:
    """Windows of all storeys on one wall of the body, and the door on the front."""
    bay, y = p.width / bays, 0.0
    for level, storey in enumerate(plan.storeys):
        if plan.courses and level:
            p.rect(0, y - 0.1, p.width, y + 0.1, plan.trim)
        for i in range(bays):
            if not storey.rhythm[round(abs(i - (bays - 1) / 2)) % len(storey.rhythm)]:
                continue
            if front and level == 0 and i == plan.door_bay:
                continue
            middle, sill, tall = (i + 0.5) * bay, y + 0.2 * storey.height, storey.rise * storey.height
            window(p, storey.window, middle, sill, storey.width * bay, tall, plan.glass, plan.trim)
        y += storey.height
    if plan.pilasters:
        for i in range(bays + 1):
            x = min(max(i * bay, 0.15), p.width - 0.15)
            p.rect(x - 0.15, 0, x + 0.15, y, plan.trim)
    if plan.quoins:
        for k, low in enumerate(np.arange(0, y, 0.45)):
            long = 0.55 if k % 2 else 0.35
            p.rect(0, low, long, low + 0.4, plan.trim)
            p.rect(p.width - long, low, p.width, low + 0.4, plan.trim)
    if front:
        wide, tall = min(1.3, 0.6 * bay), 0.75 * plan.storeys[0].height
        door(p, plan.door, (plan.door_bay + 0.5) * bay, wide, tall, tone(plan.accent, 0.7), plan.trim)


def _crown(p: Painter, kind: str, y: float, top: float, plan: Plan) -> None:
    """What closes a wall above its eaves y; the alpha plane above y is empty until it is painted here."""
    w = p.width
    if kind == "gable":
        p.polygon([(0, y), (w, y), (w / 2, top)], plan.wall)
        p.line([(0, y), (w / 2, top), (w, y)], plan.trim, 0.22)
    elif kind == "steps":
        rise = (top - y) / 6
        for k in range(6):
            left, right, ledge = w * k / 12, w * (1 - k / 12), y + rise * (k + 0.85)
            p.rect(left, y + rise * (k - 0.01), right, y + rise * (k + 1), plan.wall)
            p.rect(left, ledge, left + w / 12, y + rise * (k + 1), plan.trim)
            p.rect(right - w / 12, ledge, right, y + rise * (k + 1), plan.trim)
    elif kind == "curved":
        t = np.linspace(0, 1, 20)
        half = w / 2 * (1 - t) * (1 + 0.45 * np.sin(t * 4 * np.pi))
        half = np.minimum(half, w / 2)
        edge = list(zip(w / 2 + half, y + (top - y) * t, strict=True))
        p.polygon([*edge, *[(w - a, b) for a, b in reversed(edge)]], plan.wall)
        p.line(edge, plan.trim, 0.2)
        p.line([(w - a, b) for a, b in edge], plan.trim, 0.2)
    elif kind == "battlement":
        p.rect(0, y, w, y + 0.35, plan.wall)
        count = max(2, round(w / 1.1))
        for k in range(count):
            p.rect(w * (k + 0.2) / count, y, w * (k + 0.8) / count, y + 0.95, plan.wall)
    elif kind == "balustrade":
        p.rect(0, y + 0.75, w, y + 0.95, plan.trim)
        for x in np.linspace(0.1, w - 0.1, max(3, round(w / 0.45))):
            p.rect(x - 0.09, y, x + 0.09, y + 0.8, plan.trim)
    else:
        p.rect(0, y, w, y + 0.3, plan.trim)
    if kind not in GABLES:
        p.rect(0, y - 0.15, w, y + 0.12, plan.trim)


def _wall(plan: Plan, width: float, height: float, top: float, crown: str, rng: np.random.Generator) -> Painter:
    """A wall with its masonry up to the eaves and the open space above them, in which `crown` is painted."""
    p = Painter(width, height + top, plan.wall)
    masonry(p, plan.masonry, plan.wall, tone(plan.trim, 0.8), plan.bay)
    p.rect(0, 0, width, 0.25, tone(plan.wall, 0.7))
    if top > 0:
        p.alpha[: p.image.shape[0] - round(height * SCALE)] = 0
        _crown(p, crown, height, height + top, plan)
    p.weather(rng, 0.035)
    return p


def _card(
    p: Painter, origin: Vector, along: Vector, up: Vector | None = None, *, upright: bool = False, shade: float = 1.0
) -> Card:
    """Span the painted texture from `origin` (its bottom left corner) along two directions, by default straight up."""
    o, a = np.asarray(origin, np.float64), np.asarray(along, np.float64)
    u = np.asarray(up if up is not None else (0.0, p.height, 0.0), np.float64)
    image = p.image if shade == 1.0 else cv2.convertScaleAbs(p.image, alpha=shade)
    return Card(np.dstack([image, p.alpha]), np.stack([o, o + a, o + a + u, o + u]), upright)


def _roof(plan: Plan, rng: np.random.Generator) -> list[Card]:
    """The slopes of the roof: two sideways behind a gable, else up to three that lean backwards; none if it is flat."""
    width, depth, eaves, rise = plan.width, plan.depth, plan.height, plan.roof_height
    if plan.roof in GABLES:
        lean, inset, rise = width / 2, 0.0, rise * (0.8 if plan.roof == "curved" else 0.96)
    elif plan.roof in ("hip", "mansard"):
        lean = inset = 0.4 if plan.roof == "mansard" else min(width, depth) / 2
    else:
        return []

    def slope(length: float, cut: float, dormers: int) -> Painter:
        p = Painter(length, float(np.hypot(rise, lean)), plan.roof_colour, empty=True)
        corners = [(0, 0), (length, 0), (length - cut, p.height), (cut, p.height)]
        p.polygon(corners, plan.roof_colour)
        for y in np.arange(0.3, p.height, 0.35):
            p.line([(0, y), (length, y)], tone(plan.roof_colour, 0.84), 0.06)
        for k in range(dormers):
            x = length * (k + 1) / (dormers + 1)
            p.rect(x - 0.45, 0.25, x + 0.45, 1.25, plan.wall)
            p.polygon([(x - 0.6, 1.2), (x + 0.6, 1.2), (x, 1.75)], plan.trim)
            p.rect(x - 0.25, 0.35, x + 0.25, 1.1, plan.glass)
        p.weather(rng, 0.05)
        return p

    side = slope(depth, inset, 0)
    cards = [
        _card(side, (width / 2, eaves, 0), (0, 0, depth), (-lean, rise, 0), shade=0.85),
        _card(side, (-width / 2, eaves, depth), (0, 0, -depth), (lean, rise, 0), shade=1.05),
    ]
    if plan.roof not in GABLES:
        front = slope(width, inset, plan.dormers)
        cards.append(_card(front, (-width / 2, eaves, 0), (width, 0, 0), (0, rise, lean)))
    return cards


def _box(
    front: Painter, side: Painter, x: float, z: float, depths: tuple[float, float], base: float = 0.0
) -> list[Card]:
    """Left wall, right wall and front of a box around x; the front stands at z, the walls go back by their depths."""
    half = front.width / 2
    return [
        _card(side, (x - half, base, z + depths[0]), (0, 0, -depths[0]), shade=1.06),
        _card(side, (x + half, base, z), (0, 0, depths[1]), shade=0.8),
        _card(front, (x - half, base, z), (front.width, 0, 0)),
    ]


def _tower(plan: Plan, tower: Tower, rng: np.random.Generator) -> list[Card]:
    """A tower that stands a little out of the facade; below the eaves only that little of its inner sides is seen."""
    out, w = 0.25, tower.width
    crown, top = ("battlement", 1.0) if tower.cap == "battlement" else ("", 0.0)

    def wall(height: float, first: float) -> Painter:
        p = _wall(plan, w, height, top, crown, rng)
        for y in np.arange(first, height - 1.4, tower.gap):
            window(p, tower.window, w / 2, y, w * 0.36, min(1.3, 0.6 * tower.gap), plan.glass, plan.trim)
        p.rect(0, height - 0.3, w, height - 0.05, plan.trim)
        return p

    front, upper = wall(tower.height, 1.2), wall(tower.height - plan.height, 0.4)
    ornament(front, tower.ornament, w / 2, tower.height - 1.3, 0.62 * w, plan.trim, plan.accent)
    if abs(tower.x) < 0.1:  # it hides the middle of the facade, so it has a door of its own
        door(front, plan.door, w / 2, 0.45 * w, 0.75 * plan.storeys[0].height, tone(plan.accent, 0.7), plan.trim)
    low = Painter(out, plan.height, tone(plan.wall, 0.9))
    free = (tower.x - w / 2 < -plan.width / 2 + 0.01, tower.x + w / 2 > plan.width / 2 - 0.01)
    cards = _box(front, upper, tower.x, -out, (w, w), plan.height)[:2]
    tall = wall(plan.height, 1.2)
    for k, card in enumerate(_box(front, low, tower.x, -out, (out, out))):
        if k < 2 and free[k]:
            card = _box(front, tall, tower.x, -out, (w, w))[k]
        cards.append(card)
    if tower.cap != "battlement":
        over = w * (1.02 if tower.cap == "spire" else 1.16)
        roof = cap(tower.cap, over, tower.cap_height, plan.roof_colour, plan.trim)
        cards.append(_card(roof, (tower.x - over / 2, tower.height, w / 2 - out), (over, 0, 0), upright=True))
    return cards


def _dome(plan: Plan, kind: str, width: float, height: float, rng: np.random.Generator) -> Card:
    drum = 2.0
    p = Painter(width, height + drum, plan.wall, empty=True)
    top = cap(kind, width, height, plan.roof_colour, plan.trim)
    rows = top.image.shape[0]
    p.image[:rows], p.alpha[:rows] = top.image, top.alpha
    p.rect(0.06 * width, 0, 0.94 * width, drum, plan.wall)
    for x in np.linspace(0.06, 0.94, 6)[:-1] + 0.088:
        window(p, "arch", x * width, 0.5, 0.08 * width, 1.0, plan.glass, plan.trim)
    p.rect(0, drum - 0.2, width, drum + 0.05, plan.trim)
    p.weather(rng, 0.03)
    base = plan.height + (0.6 * plan.roof_height if plan.roof in ("hip", "mansard") else 0.1)
    return _card(p, (-width / 2, base, 0.5 * plan.depth), (width, 0, 0), upright=True)


def _portico(plan: Plan, columns: int, width: float, height: float, pediment: bool) -> Card:
    p = Painter(width, height + (0.22 * width if pediment else 0.5), plan.trim, empty=True)
    stone, shade = tone(plan.wall, 1.12), tone(plan.wall, 0.75)
    for x in np.linspace(0.35, width - 0.35, columns):
        p.rect(x - 0.22, 0, x + 0.22, height, stone)
        p.rect(x + 0.08, 0, x + 0.22, height, shade)
        p.rect(x - 0.32, height - 0.25, x + 0.32, height, stone)
    p.rect(0, 0, width, 0.3, shade)
    p.rect(0, height - 0.05, width, height + 0.45, stone)
    p.line([(0, height), (width, height)], shade, 0.08)
    if pediment:
        p.polygon([(0, height + 0.4), (width, height + 0.4), (width / 2, p.height)], stone)
        p.polygon([(0.2 * width, height + 0.5), (0.8 * width, height + 0.5), (width / 2, p.height - 0.35)], shade)
    return _card(p, (-width / 2, 0, -1.0), (width, 0, 0))


def build(plan: Plan, rng: np.random.Generator) -> list[Card]:
    """Put up a plan; `rng` only stains the walls."""
    width, height = plan.width, plan.height
    gabled = plan.roof in GABLES
    top = plan.roof_height if gabled else {"battlement": 1.0, "balustrade": 1.0}.get(plan.roof, 0.35)
    front = _wall(plan, width, height, top, plan.roof, rng)
    _storeys(front, plan, plan.bays, front=True)
    size = min(plan.ornament_size, 0.3 * width)
    centre = height + 0.3 * top if gabled else height - plan.storeys[-1].height / 2
    ornament(front, plan.ornament, width / 2, centre, size, plan.trim, plan.accent)
    flank = _wall(plan, plan.depth, height, 0.0 if gabled else top, "" if gabled else plan.roof, rng)
    _storeys(flank, plan, max(1, round(plan.depth / plan.bay)), front=False)

    cards = []
    if plan.dome is not None:
        cards.append(_dome(plan, *plan.dome, rng))
    for place in plan.chimneys:
        stack = Painter(0.7, 2.2, tone(plan.wall, 0.8))
        stack.rect(-0.1, 1.9, 0.8, 2.1, plan.trim)
        base = height + (0.7 * plan.roof_height if plan.roof in ("hip", "mansard") else 0.0)
        cards.append(_card(stack, (width * (place - 0.5), base, plan.depth / 2), (0.7, 0, 0), upright=True))
    cards += _roof(plan, rng)
    cards += _box(front, flank, 0.0, 0.0, (plan.depth, plan.depth))
    if plan.portico is not None:
        cards.append(_portico(plan, *plan.portico))
    for tower in plan.towers:
        cards += _tower(plan, tower, rng)
    return cards
