"""Plans of the toy buildings: everything that is distinctive about a building, drawn from a random generator."""

from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np

from datasets.toy.facades import MASONRY, WINDOWS, Colour, tone

# Walls and roofs may have any hue, but every picture has its own light and white balance: colour helps, as it does in a
# town of painted houses, and a landmark is known for sure only by its colours and its shape together.
ACCENTS: tuple[Colour, ...] = ((50, 50, 170), (160, 90, 40), (60, 130, 60), (40, 160, 210), (120, 50, 120))
GABLES = ("gable", "steps", "curved")
ROOF_KINDS = (*GABLES, "hip", "mansard", "flat", "battlement", "balustrade")
CAPS = ("spire", "pyramid", "onion", "dome", "lantern", "battlement")
T = TypeVar("T")


@dataclass(frozen=True)
class Storey:
    height: float
    window: str
    width: float  # of a window, as a part of its bay
    rise: float  # height of a window, as a part of the storey
    rhythm: tuple[bool, ...]  # which bays have a window, repeated from the middle outwards


@dataclass(frozen=True)
class Tower:
    x: float  # of its middle
    width: float
    height: float
    cap: str
    cap_height: float
    window: str
    gap: float  # distance of its windows upwards
    ornament: str


@dataclass(frozen=True)
class Plan:
    """All that is distinctive about a building. Lengths are in units, see toy_facades."""

    wall: Colour
    trim: Colour
    roof_colour: Colour
    glass: Colour
    accent: Colour
    masonry: str
    bays: int
    bay: float
    depth: float
    storeys: tuple[Storey, ...]
    roof: str
    roof_height: float
    dormers: int
    chimneys: tuple[float, ...]  # places along the ridge, as parts of the width
    towers: tuple[Tower, ...]
    dome: tuple[str, float, float] | None  # kind, width, height
    portico: tuple[int, float, float, bool] | None  # columns, width, height, pediment
    door: str
    door_bay: int
    ornament: str
    ornament_size: float
    pilasters: bool
    courses: bool
    quoins: bool

    @property
    def width(self) -> float:
        return self.bays * self.bay

    @property
    def height(self) -> float:
        """Up to the eaves."""
        return sum(s.height for s in self.storeys)


def _pick(rng: np.random.Generator, options: tuple[T, ...]) -> T:
    return options[int(rng.integers(len(options)))]


def _jitter(rng: np.random.Generator, colour: Colour, spread: float) -> Colour:
    blue, green, red = (c + rng.normal(0, spread) for c in colour)
    return tone((blue, green, red), rng.uniform(0.85, 1.12))


def _paint(rng: np.random.Generator, light: float, dark: float, *, most: float = 0.62) -> Colour:
    """Any hue, from nearly grey up to `most` vivid."""
    hue, vivid, value = rng.uniform(0, 6), rng.uniform(0.06, most), rng.uniform(dark, light)
    blue, green, red = (value * (1 - vivid * float(np.clip(abs((hue + k) % 6 - 3) - 1, 0, 1))) for k in (0, 2, 4))
    return blue, green, red


def _towers(rng: np.random.Generator, width: float, height: float) -> tuple[Tower, ...]:
    layout = _pick(rng, ("none", "none", "pair", "pair", "side", "middle", "flank", "three"))
    if layout == "none":
        return ()
    base = Tower(
        x=0.0,
        width=min(rng.uniform(1.8, 3.0), 0.36 * width),
        height=height + rng.uniform(1.2, 0.45 * width),
        cap=_pick(rng, CAPS),
        cap_height=rng.uniform(1.5, 4.5),
        window=_pick(rng, WINDOWS),
        gap=rng.uniform(1.8, 3.4),
        ornament=_pick(rng, ("none", "clock", "rose", "sun", "banner")),
    )
    edge = width / 2 - base.width / 2 + 0.2
    if layout == "flank":
        edge += base.width * 0.7
    places = {
        "pair": (-edge, edge),
        "flank": (-edge, edge),
        "side": (edge * _pick(rng, (-1, 1)),),
        "middle": (0.0,),
        "three": (-edge, edge, 0.0),
    }[layout]
    towers = [replace(base, x=x) for x in places]
    if layout == "three":
        taller, top = base.height + rng.uniform(1, 3), _pick(rng, CAPS)
        towers[2] = replace(
            base,
            x=0.0,
            width=1.2 * base.width,
            height=taller,
            cap=top,
            cap_height=rng.uniform(1.5, 4.5),
            ornament="clock",
        )
    elif len(towers) == 2 and rng.random() < 0.25:  # like Chartres: two unequal towers
        top = _pick(rng, CAPS)
        towers[1] = replace(towers[1], height=base.height + 2.5, cap=top, cap_height=1.3 * base.cap_height)
    return tuple(towers)


def _portico(rng: np.random.Generator, width: float, height: float) -> tuple[int, float, float, bool]:
    columns = int(rng.integers(3, 7))
    return columns, width * rng.uniform(0.4, 0.85), rng.uniform(0.45, 0.85) * height, bool(rng.random() < 0.65)


def draw_plan(rng: np.random.Generator, *, plain: bool = False) -> Plan:
    """A random building; `plain` gives an ordinary house without towers, dome, portico or ornament."""
    wall = _paint(rng, 240, 105, most=0.25 if plain else 0.62)
    trim = _pick(rng, (tone(wall, 0.5), tone(wall, 0.65), tone(wall, 1.4), (228, 232, 235), _paint(rng, 235, 60)))
    bays, bay = int(rng.integers(2, 5) if plain else rng.integers(3, 7)), rng.uniform(1.7, 2.6)
    kinds = [_pick(rng, ("plain", "cross", "shutters", "grid") if plain else WINDOWS) for _ in range(4)]
    storeys: list[Storey] = []
    for level in range(int(rng.integers(2, 4 if plain else 6))):
        if sum(s.height for s in storeys) > 1.1 * bays * bay:
            break  # a slender building would be a stripe in most frames
        if level and rng.random() < 0.5:
            kinds[level % 4] = kinds[level % 4 - 1]
        rhythm = (True,) if plain else _pick(rng, ((True,), (True,), (True, True, False), (False, True), (True, False)))
        tall, wide, rise = rng.uniform(1.7, 2.9 if level < 2 else 2.2), rng.uniform(0.34, 0.66), rng.uniform(0.45, 0.7)
        storeys.append(Storey(tall, kinds[level % 4], wide, rise, rhythm))
    width, height = bays * bay, sum(s.height for s in storeys)
    roof = _pick(rng, ("gable", "hip", "mansard", "hip") if plain else ROOF_KINDS)
    grand = not plain
    kinds_of_dome = ("dome", "lantern", "onion")
    has_dome = grand and roof not in GABLES and rng.random() < 0.45
    has_portico = grand and bays >= 3 and rng.random() < 0.35
    return Plan(
        wall=wall,
        trim=trim,
        roof_colour=_paint(rng, 165, 50, most=0.3 if plain else 0.62),
        accent=_pick(rng, ACCENTS),
        glass=_jitter(rng, _pick(rng, ((70, 58, 50), (46, 44, 46), (96, 84, 70))), 5),
        masonry=_pick(rng, ("plain", "brick", "plain", "timber") if plain else MASONRY),
        bays=bays,
        bay=bay,
        depth=rng.uniform(0.5, 1.0) * width,
        storeys=tuple(storeys),
        roof=roof,
        roof_height=width * rng.uniform(0.25, 0.6) if roof in GABLES else rng.uniform(1.2, 3.2),
        dormers=int(rng.integers(0, 4)) if roof in ("hip", "mansard") else 0,
        chimneys=tuple(rng.uniform(0.1, 0.9, int(rng.integers(0, 4))).tolist()),
        towers=_towers(rng, width, height) if grand else (),
        dome=(_pick(rng, kinds_of_dome), width * rng.uniform(0.35, 0.65), rng.uniform(3, 6.5)) if has_dome else None,
        portico=_portico(rng, width, height) if has_portico else None,
        door=_pick(rng, ("plain", "arch", "pointed", "portal")),
        door_bay=int(rng.integers(bays)) if rng.random() < 0.4 else bays // 2,
        ornament=_pick(rng, ("none", "rose", "clock", "sun", "crest", "niche", "banner")) if grand else "none",
        ornament_size=rng.uniform(1.2, 2.6),
        pilasters=bool(grand and rng.random() < 0.35),
        courses=bool(rng.random() < 0.5),
        quoins=bool(rng.random() < 0.35),
    )
