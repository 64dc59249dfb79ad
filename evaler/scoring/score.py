"""One score record, whatever the protocol: what every scoring command writes, and `compare.py` and `report.py` read.

As JSON it is one object. `protocol`, `metric` and `settings` (key -> name) say what the rest is. Under the key of each
setting stand its values in percent, and in its `aps` the value of each of `query_names`, null for a query that does not
count; their mean is the metric. The card holds what makes two scores comparable, and what else a protocol counts stands
beside it. A file without `protocol` is one of evaluate.py of an older version.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from core.base.errors import UserError
from core.base.json_files import write_json
from evaler.features.provenance import Provenance
from revisitop.protocol import SETTING_NAMES

REVISITED = "revisited"
# What makes two scores incomparable; everything else on the card is what one may want to compare.
RESERVED = (
    "unit",
    "dataset",
    "provenance",
    "query_names",
    "ground_truth_sha256",
    "card",
    "protocol",
    "metric",
    "settings",
)
SAME = ("set", "gallery", "distractors", "ground_truth_sha256")


class ScoreError(UserError):
    """A file that is no score; the message is one line."""


@dataclass(frozen=True)
class Setting:
    """One row of a score. values: in percent, None where no query counts; per_query: of each query, None likewise."""

    name: str
    values: dict
    per_query: list[float | None]

    @property
    def counted(self) -> int:
        """Queries that count."""
        return sum(value is not None for value in self.per_query)


@dataclass(frozen=True, kw_only=True)
class Score:
    """metric: the key of `Setting.values` that is the mean of `Setting.per_query`; counts: see the protocol."""

    protocol: str
    metric: str
    dataset: str
    query_names: list[str]
    settings: dict[str, Setting]
    card: dict
    provenance: Provenance = field(default_factory=Provenance)
    counts: dict = field(default_factory=dict)

    def columns(self, setting: str) -> dict[str, float | None]:
        """Head -> value of the row of a setting."""
        row: dict[str, float | None] = {}
        for key, value in self.settings[setting].values.items():
            if key == "mP@k":
                row |= {f"mP@{kappa}": one for kappa, one in zip(self.counts["kappas"], value, strict=True)}
            elif not isinstance(value, list):
                row[key] = value
        return row

    def to_json(self) -> dict:
        return {
            "unit": "percent",
            "dataset": self.dataset,
            **self.counts,
            **{key: setting.values | {"aps": setting.per_query} for key, setting in self.settings.items()},
            "provenance": self.provenance.to_json(),
            "query_names": self.query_names,
            "ground_truth_sha256": self.card["ground_truth_sha256"],
            "card": self.card,
            "protocol": self.protocol,
            "metric": self.metric,
            "settings": {key: setting.name for key, setting in self.settings.items()},
        }

    def write(self, path: Path) -> None:
        write_json(path, self.to_json())

    @classmethod
    def from_json(cls, record: object, source: str) -> "Score":
        """Raises `ScoreError` that begins with the source."""
        if isinstance(record, dict) and "query_names" not in record and {"task", "recall@1"} & record.keys():
            raise ScoreError(f"{source}: not a score with the values of each query (an older version); score again")
        names = _names(record)
        if not isinstance(record, dict) or names is None or not _is_score(record, names):
            raise ScoreError(f"{source}: not a score of evaler/evaluate*.py, or one of an older version; score again")
        return cls(
            protocol=record.get("protocol", REVISITED),
            metric=record.get("metric", "mAP"),
            dataset=record.get("dataset", record["card"]["set"]),
            query_names=record["query_names"],
            settings={
                key: Setting(name, {head: v for head, v in record[key].items() if head != "aps"}, record[key]["aps"])
                for key, name in names.items()
            },
            card=record["card"],
            provenance=Provenance.from_json(record.get("provenance", {})),
            counts={key: value for key, value in record.items() if key not in {*RESERVED, *names}},
        )


def read(path: Path) -> Score:
    """A score that a scoring command has written. Raises `ScoreError` naming the file."""
    try:
        record = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ScoreError(f"{path}: no such file; evaler/evaluate.py writes OUT_DIR/scores/<set>.json") from None
    except (OSError, ValueError, RecursionError):
        raise ScoreError(f"{path}: not the JSON of a score") from None
    return Score.from_json(record, str(path))


def _names(record: object) -> Mapping[str, str] | None:
    """Key -> name of its settings; None for what is no score."""
    if not isinstance(record, dict):
        return None
    names = record.get("settings", SETTING_NAMES)
    texts = isinstance(names, dict) and names and all(isinstance(name, str) for name in names.values())
    return names if texts and not names.keys() & set(RESERVED) else None


def _is_score(record: dict, names: Mapping[str, str]) -> bool:
    card, queries = record.get("card"), record.get("query_names")
    texts = [record.get("protocol", REVISITED), record.get("metric", "mAP"), record.get("dataset", "")]
    return (
        isinstance(card, dict)
        and set(SAME) <= card.keys()
        and isinstance(queries, list)
        and bool(queries)
        and all(isinstance(name, str) for name in (*queries, *texts))
        and isinstance(record.get("provenance", {}), dict)
        and all(_are_values(record.get(setting), len(queries)) for setting in names)
    )


def _are_values(values: object, count: int) -> bool:
    of_query = values.get("aps") if isinstance(values, dict) else None
    if not isinstance(of_query, list) or len(of_query) != count:
        return False
    return all(value is None or (type(value) in (int, float) and 0 <= value <= 100) for value in of_query)
