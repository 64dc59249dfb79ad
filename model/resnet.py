"""ResNet and ResNeXt backbones with the parameter names of pycls.

He et al., Deep Residual Learning for Image Recognition (CVPR 2016); Xie et al., Aggregated Residual Transformations
for Deep Neural Networks (CVPR 2017). Names follow pycls (https://github.com/facebookresearch/pycls), so that its
ImageNet weights and the published DOLG weights load.
"""

import copy
import math
import re
from collections.abc import Mapping

from torch import Tensor, nn

from model.folding import FusedConv, How

BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}
BASIC_DEPTHS = (18, 34)
STEM_WIDTH = 64
BASIC_WIDTHS = (64, 128, 256, 512)
BOTTLENECK_WIDTHS = (256, 512, 1024, 2048)


class BasicTransform(nn.Module):
    """3x3, BN, ReLU, 3x3, BN."""

    def __init__(self, in_width: int, out_width: int, stride: int, *, bn: dict, inplace: bool):
        super().__init__()
        self.a = nn.Conv2d(in_width, out_width, 3, stride=stride, padding=1, bias=False)
        self.a_bn = nn.BatchNorm2d(out_width, **bn)
        self.a_relu = nn.ReLU(inplace=inplace)
        self.b = nn.Conv2d(out_width, out_width, 3, padding=1, bias=False)
        self.b_bn = nn.BatchNorm2d(out_width, **bn)

    @property
    def convolutions(self) -> list[tuple[nn.Conv2d, nn.BatchNorm2d]]:
        return [(self.a, self.a_bn), (self.b, self.b_bn)]

    def forward(self, x: Tensor) -> Tensor:
        return self.b_bn(self.b(self.a_relu(self.a_bn(self.a(x)))))


class BottleneckTransform(nn.Module):
    """1x1, BN, ReLU, 3x3, BN, ReLU, 1x1, BN."""

    def __init__(
        self,
        in_width: int,
        out_width: int,
        stride: int,
        *,
        inner_width: int,
        groups: int,
        stride_1x1: bool,
        bn: dict,
        inplace: bool,
    ):
        super().__init__()
        stride_a, stride_b = (stride, 1) if stride_1x1 else (1, stride)
        self.a = nn.Conv2d(in_width, inner_width, 1, stride=stride_a, bias=False)
        self.a_bn = nn.BatchNorm2d(inner_width, **bn)
        self.a_relu = nn.ReLU(inplace=inplace)
        self.b = nn.Conv2d(inner_width, inner_width, 3, stride=stride_b, padding=1, groups=groups, bias=False)
        self.b_bn = nn.BatchNorm2d(inner_width, **bn)
        self.b_relu = nn.ReLU(inplace=inplace)
        self.c = nn.Conv2d(inner_width, out_width, 1, bias=False)
        self.c_bn = nn.BatchNorm2d(out_width, **bn)

    @property
    def convolutions(self) -> list[tuple[nn.Conv2d, nn.BatchNorm2d]]:
        return [(self.a, self.a_bn), (self.b, self.b_bn), (self.c, self.c_bn)]

    def forward(self, x: Tensor) -> Tensor:
        x = self.a_relu(self.a_bn(self.a(x)))
        x = self.b_relu(self.b_bn(self.b(x)))
        return self.c_bn(self.c(x))


class ResBlock(nn.Module):
    """relu(shortcut(x) + f(x)); the shortcut is a 1x1 convolution `proj` where width or stride change."""

    def __init__(self, in_width: int, out_width: int, stride: int, transform: nn.Module, *, bn: dict, inplace: bool):
        super().__init__()
        self.proj = None
        if in_width != out_width or stride != 1:
            self.proj = nn.Conv2d(in_width, out_width, 1, stride=stride, bias=False)
            self.bn = nn.BatchNorm2d(out_width, **bn)
        self.f = transform
        self.relu = nn.ReLU(inplace=inplace)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.proj is None else self.bn(self.proj(x))
        return self.relu(shortcut + self.f(x))


class ArrangedBlock(nn.Module):
    """`ResBlock` for inference. Without projection it overwrites its input."""

    def __init__(self, block: ResBlock, how: How):
        super().__init__()
        self.proj = None if block.proj is None else FusedConv.of(block.proj, block.bn, how=how)
        *inner, last = block.f.convolutions
        self.inner = nn.Sequential(*(FusedConv.of(conv, bn, how=how, relu=True) for conv, bn in inner))
        self.last = FusedConv.of(*last, how=how, relu=True)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.proj is None else self.proj(x)
        return self.last(self.inner(x), shortcut)


class Stem(nn.Module):
    """7x7 stride 2, BN, ReLU, 3x3 max-pool stride 2: [B, 3, H, W] -> [B, 64, H/4, W/4]."""

    def __init__(self, *, bn: dict, inplace: bool):
        super().__init__()
        self.conv = nn.Conv2d(3, STEM_WIDTH, 7, stride=2, padding=3, bias=False)
        self.bn = nn.BatchNorm2d(STEM_WIDTH, **bn)
        self.relu = nn.ReLU(inplace=inplace)
        self.pool = nn.MaxPool2d(3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(self.relu(self.bn(self.conv(x))))


class ResNet(nn.Module):
    """Backbone of DOLG: the maps f3 and f4, no classifier.

    Args:
        depth: 18 or 34 (basic blocks), 50, 101 or 152 (bottleneck blocks).
        groups: groups of the bottleneck's 3x3 convolution; above 1 this is a ResNeXt.
        width_per_group: inner width of a first-stage bottleneck is `groups * width_per_group`.
        stride_1x1: stride in the bottleneck's first 1x1 convolution instead of its 3x3.
        zero_init_final_gamma: scale 0 in the last BN of each block, so that it starts as the identity.

    Convolutions start normal(0, sqrt(2 / (k * k * out))), BN scales at 1.
    """

    def __init__(
        self,
        depth: int,
        *,
        groups: int = 1,
        width_per_group: int = 64,
        stride_1x1: bool = False,
        bn_eps: float = 1e-5,
        bn_momentum: float = 0.1,
        zero_init_final_gamma: bool = False,
        relu_inplace: bool = True,
    ):
        super().__init__()
        bn = {"eps": bn_eps, "momentum": bn_momentum}
        basic = depth in BASIC_DEPTHS
        widths = BASIC_WIDTHS if basic else BOTTLENECK_WIDTHS
        self.widths = widths
        self.stem = Stem(bn=bn, inplace=relu_inplace)
        in_width = STEM_WIDTH
        for stage, (blocks, width) in enumerate(zip(BLOCKS[depth], widths, strict=True)):
            layers = nn.Sequential()
            for block in range(blocks):
                stride = 2 if block == 0 and stage > 0 else 1
                if basic:
                    transform = BasicTransform(in_width, width, stride, bn=bn, inplace=relu_inplace)
                else:
                    transform = BottleneckTransform(
                        in_width,
                        width,
                        stride,
                        inner_width=groups * width_per_group * 2**stage,
                        groups=groups,
                        stride_1x1=stride_1x1,
                        bn=bn,
                        inplace=relu_inplace,
                    )
                layers.add_module(
                    f"b{block + 1}", ResBlock(in_width, width, stride, transform, bn=bn, inplace=relu_inplace)
                )
                in_width = width
            self.add_module(f"s{stage + 1}", layers)
        init_convolutions(self)
        if zero_init_final_gamma:
            for module in self.modules():
                if isinstance(module, ResBlock):
                    nn.init.zeros_(module.f.convolutions[-1][1].weight)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """[B, 3, H, W] -> f3 [B, widths[2], ~H/16, ~W/16], f4 [B, widths[3], ~H/32, ~W/32]."""
        f3 = self.s3(self.s2(self.s1(self.stem(images))))
        return f3, self.s4(f3)

    def arranged(self, how: How) -> "ArrangedResNet":
        return ArrangedResNet(self, how)

    @staticmethod
    def recognise(state: Mapping[str, Tensor]) -> dict[str, object]:
        """The settings that keys and shapes of a backbone's state dict show, by their configuration keys."""
        names = [{match[1] for key in state if (match := re.match(rf"s{n}\.(b\d+)\.", key))} for n in (1, 2, 3, 4)]
        blocks = tuple(len(stage) for stage in names)
        basic = "s1.b1.f.c.weight" not in state
        facts: dict[str, object] = {}
        if all(blocks):
            depths = [d for d in BLOCKS if BLOCKS[d] == blocks and (d in BASIC_DEPTHS) == basic]
            kind = "basic" if basic else "bottleneck"
            facts["MODEL.DEPTH"] = depths[0] if depths else f"unknown ({kind} blocks {list(blocks)})"
        inner = state.get("s1.b1.f.b.weight")
        if not basic and inner is not None and inner.dim() == 4 and inner.numel():
            facts |= {"RESNET.NUM_GROUPS": inner.shape[0] // inner.shape[1], "RESNET.WIDTH_PER_GROUP": inner.shape[1]}
        return facts


class ArrangedResNet(nn.Module):
    """`ResNet` for inference: batch norm within the convolutions, ReLU and the sum of a block fused into them."""

    def __init__(self, backbone: ResNet, how: How):
        super().__init__()
        stem = FusedConv.of(backbone.stem.conv, backbone.stem.bn, how=how, relu=True)
        early = [ArrangedBlock(block, how) for block in (*backbone.s1, *backbone.s2, *backbone.s3)]
        self.to_f3 = nn.Sequential(stem, copy.deepcopy(backbone.stem.pool), *early)
        self.to_f4 = nn.Sequential(*(ArrangedBlock(block, how) for block in backbone.s4))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        f3 = self.to_f3(images)
        return f3, self.to_f4(f3)  # which begins with a projection, and so leaves f3 as it is


def init_convolutions(module: nn.Module) -> None:
    """Draw every convolution's weight from normal(0, sqrt(2 / (k * k * out))), as pycls does; biases stay."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            fan_out = layer.kernel_size[0] * layer.kernel_size[1] * layer.out_channels
            nn.init.normal_(layer.weight, std=math.sqrt(2.0 / fan_out))
