"""One HTML page of a set that works from a file, without a network: scores, curves, ranked lists, attention."""

import base64
import hashlib
import json
import re
import sys
from collections.abc import Mapping
from html import escape
from pathlib import Path

from core.arguments import parse
from core.base.arguments import Parser
from core.base.errors import UserError, entry_point
from core.base.files import atomic_write
from core.config import load_cfg
from evaler.pages.content import FOLDERS, Run, own_page, revisited_page
from evaler.pages.pictures import Shown
from evaler.refinement.steps import Refinement
from evaler.sources.images import DISTRACTORS

SOURCES = Path(__file__).parent / "web"
FOLDERS_OF_A_PATH = re.compile(r"(?<![\w/])(?:~|\.{1,2})?/(?:[^/:]*/)*")  # from its first slash to its last
OWN_QUERIES = 70  # images of one's own that are asked for, as many as ROxford has queries


def page_bytes(content: Mapping) -> bytes:
    """The page of what `report_content` gives. All is inside it, and it may load nothing from elsewhere."""
    html, style, script = ((SOURCES / f"page.{kind}").read_text(encoding="utf-8") for kind in ("html", "css", "js"))
    # Names of files come from anywhere: within the JSON no tag can begin, and only our own script runs.
    data = json.dumps(without_places(content), separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    parts = {"TITLE": escape(content["title"]), "DIGEST": digest, "STYLE": style, "SCRIPT": script, "DATA": data}
    before, *rest = html.split("@@")  # text, name, text, name, ..., text
    texts = (parts[name] + text for name, text in zip(rest[::2], rest[1::2], strict=True))
    return (before + "".join(texts)).encode()


def without_places(content: Mapping) -> dict:
    """The content as it may be mailed: of paths in runs, cards and notes only the last name is left."""
    names = [Path(one["name"]).name if "/" in one["name"] else one["name"] for one in content["runs"]]
    if len(set(names)) < len(names):
        names = [f"{name} ({number})" for number, name in enumerate(names, start=1)]
    runs = [
        one | {"name": name, "card": {key: _last_name(value) for key, value in one["card"].items()}}
        for name, one in zip(names, content["runs"], strict=True)
    ]
    return {**content, "runs": runs, "notes": [FOLDERS_OF_A_PATH.sub("", note) for note in content["notes"]]}


def _last_name(value: object) -> object:
    return Path(value).name if isinstance(value, str) and value.startswith(("/", "~", "./", "../")) else value


@entry_point
def main(argv: list[str] | None = None) -> None:
    parser = Parser(
        description="Write a page with scores, curves and ranked lists of INFER.DATASETS, or of INFER.IMAGES."
    )
    parser.add_argument("--cfg", required=True, type=Path, metavar="FILE", help="YAML file of settings")
    parser.add_argument("--against", type=Path, metavar="OUT_DIR", help="a second run, shown beside that in OUT_DIR")
    parser.add_argument("--unprocessed", action="store_true", help="beside SCORE's post-processing show none")
    parser.add_argument("--top", type=int, default=20, metavar="K", help="results shown of each query (default 20)")
    parser.add_argument(
        "--queries", type=int, metavar="N", help=f"show so many, 0: all (default: all, {OWN_QUERIES} of INFER.IMAGES)"
    )
    parser.add_argument(
        "--labels", default="", metavar="CSV", help=f"of INFER.IMAGES: path,label; or `{FOLDERS}` (default: none)"
    )
    parser.add_argument("--no-attention", action="store_true", help="leave the attention maps out")
    parser.add_argument("--out", type=Path, metavar="FILE.html", help="default: OUT_DIR/reports/<set>.html")
    args, settings = parse(parser, argv)
    if args.top < 1 or (args.queries or 0) < 0:
        parser.error("--top must be at least 1, --queries 0 or more")
    if args.out and args.out.suffix != ".html":
        parser.error(f"--out {args.out}: must end with .html")
    cfg = load_cfg(args.cfg, settings)
    refinement = Refinement.of(cfg)
    own_images = bool(cfg.INFER.IMAGES)
    names = [] if own_images else [name for name in cfg.INFER.DATASETS if name != DISTRACTORS]
    if args.labels and not own_images:
        raise UserError("--labels is for INFER.IMAGES; the sets of INFER.DATASETS have their own")
    if own_images and refinement:
        raise UserError("SCORE's post-processing is not applied to INFER.IMAGES; leave it out")
    if args.unprocessed and (args.against or not refinement):
        raise UserError(
            "--unprocessed compares one run with and without refinement: set a key of SCORE, leave --against out"
        )
    if not own_images and not names:
        raise UserError("nothing to show: name sets in INFER.DATASETS, or images in INFER.IMAGES")
    if args.out and len(names) > 1:
        raise UserError(f"--out names one page, INFER.DATASETS {len(names)} sets; name one of them")
    first = Run(str(cfg.OUT_DIR), Path(cfg.OUT_DIR), refinement)
    runs = [first]
    if args.unprocessed:
        runs = [
            Run(f"{cfg.OUT_DIR}, as extracted", first.out_dir),
            Run(f"{cfg.OUT_DIR}, processed", first.out_dir, refinement),
        ]
    elif args.against:
        runs.append(Run(str(args.against), args.against, refinement))
    queries = args.queries if args.queries is not None else OWN_QUERIES if own_images else 0
    shown = Shown(top=args.top, queries=queries, attention=not args.no_attention)
    for name in names or [None]:
        content = revisited_page(cfg, name, runs, shown) if name else own_page(cfg, runs, shown, labels=args.labels)
        behind = "_with_distractors" if name and DISTRACTORS in cfg.INFER.DATASETS else ""
        suffix = f"{behind}{'_processed' if refinement else ''}"
        path = args.out or first.out_dir / "reports" / f"{name or content['title']}{suffix}.html"
        data = page_bytes(content)
        with atomic_write(path) as file:
            file.write(data)
        for note in content["notes"]:
            print(f"note: {note}", file=sys.stderr)
        print(f"{path}: {len(content['queries'])} queries, {len(content['images'])} pictures, {len(data) / 1e6:.1f} MB")
