"""The table of backbones: what MODEL.TYPE can be, and everything the rest of the code has to know of each.

A backbone is a class in a file of its own and a row here. The checks of a configuration read the table too, so torch is
not loaded before `layers` is called.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module


@dataclass(frozen=True)
class Size:
    """One depth of a family. f3 has stride 16, f4 has stride 32."""

    f3: int  # channels
    f4: int
    implied: Mapping[str, int | str] = field(default_factory=dict)  # settings that leave no choice at this depth
    unread: tuple[str, ...] = ()  # settings without effect at this depth


@dataclass(frozen=True)
class Backbone:
    """A family of backbones; settings are named by their configuration keys.

    `layers` returns the class, an `nn.Module` with

    - a keyword argument for every entry of `settings`;
    - `widths`: channels of the stages, the last two those of f3 and f4;
    - `forward`: normalised BGR images [B, 3, H, W] -> f3, f4;
    - `recognise`, static: a backbone's state dict -> the settings that its keys and shapes show, {} if it is not one of
      this family's.
    """

    title: str  # in messages, before the depth
    layers: Callable[[], type]
    settings: Mapping[str, str]  # constructor argument -> setting
    stages: tuple[str, ...]  # its submodules from input to output: TRAIN.FREEZE_AT n freezes the first n
    sizes: Mapping[int, Size]  # by MODEL.DEPTH
    flags: tuple[str, ...] = ()  # boolean settings that change what it computes, but no shape of its weights


_BASIC = Size(
    256,
    512,
    implied={"RESNET.TRANS_FUN": "basic_transform", "RESNET.NUM_GROUPS": 1, "RESNET.WIDTH_PER_GROUP": 64},
    unread=("RESNET.STRIDE_1X1",),  # basic blocks have no 1x1 convolution
)
_BOTTLENECK = Size(1024, 2048, implied={"RESNET.TRANS_FUN": "bottleneck_transform"})

BACKBONES: dict[str, Backbone] = {
    "resnet": Backbone(
        title="ResNet",
        layers=lambda: import_module("model.resnet").ResNet,
        settings={
            "depth": "MODEL.DEPTH",
            "groups": "RESNET.NUM_GROUPS",
            "width_per_group": "RESNET.WIDTH_PER_GROUP",
            "stride_1x1": "RESNET.STRIDE_1X1",
            "bn_eps": "BN.EPS",
            "bn_momentum": "BN.MOM",
            "zero_init_final_gamma": "BN.ZERO_INIT_FINAL_GAMMA",
            "relu_inplace": "MEM.RELU_INPLACE",
        },
        stages=("stem", "s1", "s2", "s3", "s4"),
        sizes={18: _BASIC, 34: _BASIC, 50: _BOTTLENECK, 101: _BOTTLENECK, 152: _BOTTLENECK},
        flags=("RESNET.STRIDE_1X1",),
    ),
}
