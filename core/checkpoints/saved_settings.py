"""The configuration that a weight file carries: what of it its own run used, and what differs from ours."""

from collections.abc import Iterator, Mapping
from pathlib import Path

from yacs.config import CfgNode

from core.base.errors import UserError
from core.base.safe_yaml import YamlError, read_yaml
from model.backbones import BACKBONES

FITTING = "pretrained/README.md names ImageNet weights that fit"
OTHER_FAMILIES = {"regnet": "a RegNet", "effnet": "an EfficientNet", "vit": "a vision transformer"}
# pycls builds its published ResNets as `anynet`: what their shapes do not show must be as in a ResNet.
ANYNET = {
    "STEM_TYPE": ("res_stem_in",),
    "BLOCK_TYPE": ("res_bottleneck_block", "res_basic_block"),
    "STRIDES": ([1, 2, 2, 2],),
    "SE_ON": (False,),
}


def read_saved(cfg: object) -> tuple[Mapping, str | None]:
    """A file's `cfg` (YAML, or a mapping) as a tree, empty where there is none; and why it cannot be read."""
    if isinstance(cfg, str):
        try:
            cfg = read_yaml(cfg)
        except YamlError as error:
            return {}, str(error)
    if cfg is None or isinstance(cfg, Mapping):
        return cfg or {}, None
    return {}, f"it is a {type(cfg).__name__}"


def network_settings(saved: Mapping, *, source: str) -> dict[str, bool | float]:
    """Settings of ours that change what a network computes without changing a shape, as the saved run used them.

    A saved configuration also holds settings that its run never read: `RESNET.*` of an `anynet`, say.
    Raises `UserError` for a family of networks that model/backbones.py does not have.
    """
    used: dict[str, bool | float] = {}
    kind = _at(saved, "MODEL.TYPE")
    if isinstance(kind, str) and kind in OTHER_FAMILIES and kind not in BACKBONES:
        family = OTHER_FAMILIES[kind]
        raise UserError(f"{source}: weights of {family} (MODEL.TYPE {kind}), not of a ResNet; {FITTING}")
    activation = _at(saved, "MODEL.ACTIVATION_FUN")
    if isinstance(activation, str) and activation.lower() != "relu":
        raise UserError(f"{source}: trained with MODEL.ACTIVATION_FUN {activation}, here it is relu; {FITTING}")
    if kind == "anynet":
        _check_anynet(_at(saved, "ANYNET"), source)
        if _at(saved, "ANYNET.BLOCK_TYPE") != "res_basic_block":
            used["RESNET.STRIDE_1X1"] = False  # its stride is in the 3x3 convolution
    else:
        flags = {key: _at(saved, key) for key in _flags(kind or "resnet", _at(saved, "MODEL.DEPTH"))}
        used |= {key: value for key, value in flags.items() if isinstance(value, bool)}
    if (eps := _number(_at(saved, "BN.EPS"))) is not None:
        used["BN.EPS"] = eps
    return used


def _number(value: object) -> float | None:
    try:  # 1e-5, without a dot, is text to YAML
        return float(value) if isinstance(value, int | float | str) and not isinstance(value, bool) else None
    except ValueError:
        return None


def _flags(kind: object, depth: object) -> list[str]:
    """The flags (see `Backbone`) that a network of this MODEL.TYPE and MODEL.DEPTH reads."""
    backbone = BACKBONES.get(kind) if isinstance(kind, str) else None
    if backbone is None:
        return []
    size = backbone.sizes.get(depth) if isinstance(depth, int) else None
    return [key for key in backbone.flags if size is None or key not in size.unread]


def _check_anynet(anynet: object, source: str) -> None:
    for name, allowed in ANYNET.items():
        there = anynet.get(name, allowed[0]) if isinstance(anynet, Mapping) else allowed[0]
        if there not in allowed:
            raise UserError(f"{source}: trained with ANYNET.{name} {there}, a ResNet has {allowed[0]}; {FITTING}")


def check_saved_settings(saved_cfg: object, cfg: CfgNode, path: Path) -> list[str]:
    """Hold `cfg` against a weight file's own configuration, in what the shapes of its weights do not show.

    Raises `UserError` naming the file and the key to set. Notes say what could not be checked.
    """
    saved, fault = read_saved(saved_cfg)
    if fault:
        return [f"{path}: its saved configuration cannot be read ({fault}): STRIDE_1X1 and BN.EPS are not checked"]
    for key, there in network_settings(saved, source=str(path)).items():
        here = _at(cfg, key)
        if there != here:
            raise UserError(f"{path}: trained with {key} {there}, here it is {here}: set {key} {there}")
    kind = _at(saved, "MODEL.TYPE")
    if kind not in (None, "anynet", *BACKBONES):
        return [f"{path}: trained with MODEL.TYPE {kind}, which is not known here: STRIDE_1X1 is not checked"]
    return []


def changed_settings(saved_cfg: object, cfg: CfgNode) -> list[tuple[str, object, object]]:
    """(key, value there, value here) of every key that a saved configuration has with another value."""
    return list(_differences(read_saved(saved_cfg)[0], cfg, ""))


def _differences(saved: object, cfg: CfgNode, prefix: str) -> Iterator[tuple[str, object, object]]:
    if not isinstance(saved, Mapping):
        return
    for name, here in cfg.items():
        if isinstance(here, CfgNode):
            yield from _differences(saved.get(name), here, f"{prefix}{name}.")
        elif name in saved and saved[name] != here:
            yield f"{prefix}{name}", saved[name], here


def _at(tree: object, key: str) -> object:
    for name in key.split("."):
        tree = tree.get(name) if isinstance(tree, Mapping) else None
    return tree
