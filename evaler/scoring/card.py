"""The result card: what a score was measured on and with, so that nobody compares two that cannot be compared."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from core.base.version import code_version
from evaler.features.provenance import Provenance
from evaler.sources.images import DISTRACTORS
from revisitop.groundtruth import OFFICIAL_SHA256

COMPLETE = 1_001_001  # images of R1M
# mAP of DOLG, Medium and Hard, as its authors published them (Yang et al., ICCV 2021, and their release):
# depth, queries cropped or not -> set, with R1M or not -> scores.
PUBLISHED = {
    (50, True): {
        ("roxford5k", False): (81.20, 62.55),
        ("roxford5k", True): (71.36, 47.34),
        ("rparis6k", False): (90.07, 79.20),
        ("rparis6k", True): (78.99, 59.75),
    },
    (101, True): {
        ("roxford5k", False): (82.37, 64.93),
        ("roxford5k", True): (73.63, 51.57),
        ("rparis6k", False): (90.97, 81.71),
        ("rparis6k", True): (80.44, 62.95),
    },
    (50, False): {
        ("roxford5k", False): (82.38, 62.92),
        ("roxford5k", True): (77.78, 55.48),
        ("rparis6k", False): (90.94, 80.48),
        ("rparis6k", True): (82.16, 65.77),
    },
    (101, False): {
        ("roxford5k", False): (83.22, 64.83),
        ("roxford5k", True): (78.96, 57.86),
        ("rparis6k", False): (91.64, 82.56),
        ("rparis6k", True): (82.89, 67.34),
    },
}
PUBLISHED_SCALES = [0.3535, 0.5, 0.7071, 1.0, 1.4142]


def make_card(
    name: str,
    database: Mapping,
    *,
    queries: int,
    distractors: int = 0,
    ground_truth_sha256: str,
    post_processing: Sequence[str] = (),
) -> dict:
    """The card of one score, JSON-able, from the manifest of what is searched; what that does not tell is None."""
    how: Provenance = database["provenance"]
    keys = ("precision", "resize", "depth", "fusion", "with_ma", "weights", "weights_sha256")
    return {
        "set": name,
        "queries": queries,
        "gallery": database["count"],
        "distractors": distractors,
        "queries_cropped": how.crop_query,
        "scales": None if how.scales is None else list(how.scales),
        **({"backbone": how.backbone} if how.backbone else {}),
        **{key: getattr(how, key) for key in keys},
        "dim": database["dim"],
        "dtype": database["dtype"],
        "post_processing": list(post_processing),
        "ground_truth_sha256": ground_truth_sha256,
        "ground_truth_official": OFFICIAL_SHA256[name] == ground_truth_sha256 if name in OFFICIAL_SHA256 else None,
        "extracted_by": how.code_version,
        "scored_by": code_version(),
    }


def with_distractors(count: int) -> str:
    """What stands behind a set's name: `+1M` for all images of R1M and for nothing else."""
    if not count:
        return ""
    return "+1M" if count == COMPLETE else f" + {count:,} distractors (not {DISTRACTORS}: that is {COMPLETE:,})"


def line(card: Mapping) -> str:
    """The card in one line, to be quoted with a score."""
    cropped = {True: "queries cropped", False: "queries not cropped"}.get(card["queries_cropped"], "crop unknown")
    scales = f"{len(card['scales'])} scales" if card["scales"] else "scales unknown"
    weights = f"weights {(card['weights_sha256'] or 'unknown')[:8]}"
    after = " + ".join(card["post_processing"]) or "no post-processing"
    official = {False: ", NOT the official labels"}.get(card["ground_truth_official"], "")
    family = f"{card['backbone']} " if card.get("backbone") else "R"
    network = f"{family}{card['depth']} {card['fusion']}{' MA' if card['with_ma'] else ''}"
    parts = [
        f"{card['set']}{with_distractors(card['distractors'])}",
        network if card["depth"] else "network unknown",
        weights,
        cropped,
        scales,
        f"{card['precision'] or 'precision unknown'} {card['resize'] or ''}".strip(),
        f"{card['dim']}-d {card['dtype']}",
        after,
        f"labels {card['ground_truth_sha256'][:8]}{official}",
        f"code {card['extracted_by'] or 'unknown'}, {card['scored_by']}",
    ]
    return " | ".join(parts)


def published(card: Mapping) -> tuple[float, float] | None:
    """mAP Medium and Hard that DOLG's authors report for this set, depth, crop and number of distractors, if any."""
    if card.get("backbone") or card["fusion"] != "orthogonal" or card["post_processing"]:
        return None
    if card["distractors"] not in (0, COMPLETE) or card["scales"] != PUBLISHED_SCALES:
        return None
    scores = PUBLISHED.get((card["depth"], card["queries_cropped"]), {})
    return scores.get((card["set"], card["distractors"] > 0))


def network_name(weights: str | None, sha256: str | None) -> str:
    """File name and the beginning of the sha256."""
    name = Path(weights or "unknown").name
    return f"{name} (sha256 {sha256[:8]})" if sha256 else name
