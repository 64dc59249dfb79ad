"""DOLG arranged for speed: the same function of the image, fewer operations, no gradients."""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.aspp import MultiAtrous
from model.attention import LocalBranch
from model.dolg import DOLG
from model.errors import ModelError
from model.folding import FusedConv, can_fuse, fold
from model.fusion import orthogonal_component
from model.resnet import BottleneckTransform, ResBlock, ResNet

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def for_inference(network: DOLG, *, precision: str = "fp32", compiled: bool = False) -> nn.Module:
    """A module for descriptors alone: float32 normalised BGR [B, 3, H, W] -> float32 [B, dim], not normalised.

    It lies on the network's device, and shares nothing with the network, which must be in eval mode. Precision is that
    of the convolutions; pooling, the sums over the attention and the linear layers are float32 in all of them. On a
    CPU bf16 is fast where the processor computes in it (AVX-512 BF16, AMX), fp16 hardly anywhere.

    At fp32 the descriptors keep within 1e-6 (1 - cosine) of the network's. See docs/performance.md for the others.
    """
    if precision not in DTYPES:
        raise ModelError(f"precision {precision!r} is none of {', '.join(DTYPES)}")
    assert not network.training, "BN is folded with its running statistics: eval mode"
    device = next(network.parameters()).device
    # The compiler finds fusions of its own in plain operations.
    fused = not compiled and can_fuse(device, DTYPES[precision])
    how = {"dtype": DTYPES[precision], "fused": fused}
    with torch.no_grad():
        arranged = _Descriptors(network, **how).to(device).requires_grad_(False).eval()
    if compiled:
        arranged.compile(dynamic=True)
    return Inference(arranged, exact=precision == "fp32")


class Inference(nn.Module):
    """Runs the arranged network, at fp32 without TF32, which cuDNN would take else."""

    def __init__(self, descriptors: nn.Module, *, exact: bool):
        super().__init__()
        self.descriptors = descriptors
        self.exact = exact

    @torch.inference_mode()
    def forward(self, images: Tensor) -> Tensor:
        images = images.contiguous(memory_format=torch.channels_last)
        cudnn = torch.backends.cudnn
        allowed = cudnn.allow_tf32
        if allowed and self.exact:
            cudnn.allow_tf32 = False
        try:
            return self.descriptors(images)
        finally:
            if allowed and self.exact:
                cudnn.allow_tf32 = True


class _Descriptors(nn.Module):
    def __init__(self, network: DOLG, *, dtype: torch.dtype, fused: bool):
        super().__init__()
        how = {"dtype": dtype, "fused": fused}
        self.dtype = dtype
        self.backbone = _Backbone(network.globalmodel, **how)
        self.pool_g = copy.deepcopy(network.pool_g).float()
        self.fc = copy.deepcopy(network.fc).float()
        self.fc_t = self.local = None
        if network.localmodel is not None:
            self.fc_t = copy.deepcopy(network.fc_t).float()
            self.local = _Local(network.localmodel, **how)

    def forward(self, images: Tensor) -> Tensor:
        f3, f4 = self.backbone(images.to(self.dtype))
        pooled = self.pool_g(f4.float())
        if self.local is None:
            return self.fc(pooled)
        global_ = self.fc_t(pooled)
        return self.fc(torch.cat([global_, orthogonal_component(self.local(f3), global_)], dim=1))


class _Backbone(nn.Module):
    def __init__(self, backbone: ResNet, *, dtype: torch.dtype, fused: bool):
        super().__init__()
        how = {"dtype": dtype, "fused": fused}
        self.stem = FusedConv.of(backbone.stem.conv, backbone.stem.bn, relu=True, **how)
        early = [*backbone.s1, *backbone.s2, *backbone.s3]
        self.to_f3 = nn.Sequential(*(_Block(block, **how) for block in early))
        self.to_f4 = nn.Sequential(*(_Block(block, **how) for block in backbone.s4))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        f3 = self.to_f3(F.max_pool2d(self.stem(images), 3, stride=2, padding=1))
        return f3, self.to_f4(f3)  # which begins with a projection, and so leaves f3 as it is


class _Block(nn.Module):
    """A `ResBlock`. Without projection it overwrites its input."""

    def __init__(self, block: ResBlock, *, dtype: torch.dtype, fused: bool):
        super().__init__()
        how = {"dtype": dtype, "fused": fused}
        f = block.f
        self.proj = None if block.proj is None else FusedConv.of(block.proj, block.bn, **how)
        self.inner = nn.Sequential(FusedConv.of(f.a, f.a_bn, relu=True, **how))
        last = f.b, f.b_bn
        if isinstance(f, BottleneckTransform):
            self.inner.append(FusedConv.of(f.b, f.b_bn, relu=True, **how))
            last = f.c, f.c_bn
        self.last = FusedConv.of(*last, relu=True, **how)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.proj is None else self.proj(x)
        return self.last(self.inner(x), shortcut)


class _Local(nn.Module):
    """The mean over space of what `LocalBranch` gives: f3 [B, C, H, W] -> float32 [B, C]."""

    def __init__(self, local: LocalBranch, *, dtype: torch.dtype, fused: bool):
        super().__init__()
        how = {"dtype": dtype, "fused": fused}
        self.aspp = None if local.aspp is None else _MultiAtrous(local.aspp, **how)
        self.conv1 = FusedConv.of(local.conv1, local.bn, **how)
        self.conv2 = nn.Linear(local.conv1.out_channels, 1)
        self.conv2.weight.copy_(local.conv2.weight.flatten(1))
        self.conv2.bias.copy_(local.conv2.bias)

    def forward(self, f3: Tensor) -> Tensor:
        x = self.conv1(f3 if self.aspp is None else self.aspp(f3))
        x = x.permute(0, 2, 3, 1).flatten(1, 2).float()  # [B, H W, C]
        attention = F.softplus(self.conv2(F.relu(x)))
        # The maps themselves need not be normalised and weighed if the sum over them is.
        length = torch.linalg.vector_norm(x, dim=2, keepdim=True).clamp_min(1e-12)
        return ((attention / length).mT @ x).squeeze(1) / x.shape[1]


class _MultiAtrous(nn.Module):
    """`MultiAtrous`, whose last convolution is applied to each branch, which need not be put side by side then.

    There is no ReLU between: image average and 1x1 branch, both 1x1 convolutions of f3, are multiplied with their part
    of it beforehand, or become a bias. On a CPU so are the middle taps of the 3x3 convolutions: what is left are 2x3
    and 1x2 taps, and 15% less work. (Rows of taps outside the image are skipped by oneDNN, columns are not.)
    """

    def __init__(self, aspp: MultiAtrous, *, dtype: torch.dtype, fused: bool):
        super().__init__()
        how = {"dtype": dtype, "fused": fused}
        weight, bias = fold(aspp.conv_after[0])
        image, *parts = weight.split([part.out_channels for part in (aspp.im_pool[1], *aspp.aspp)], dim=1)
        self.im_pool = copy.deepcopy(aspp.im_pool).float()
        self.im_pool_after = nn.Linear(image.shape[1], image.shape[0])
        self.im_pool_after.weight.copy_(image.flatten(1))
        middle = 0
        self.branches = nn.ModuleList()
        for conv, part in zip(aspp.aspp, parts, strict=True):
            taps, tap_bias = fold(conv)
            bias = bias + part.flatten(1) @ tap_bias
            if taps.shape[2:] == (1, 1):
                middle = middle + _product(part, taps)
                continue
            dilation = conv.dilation[0]
            if fused:
                middle = middle + _product(part, taps[:, :, 1:2, 1:2])
                sides = [
                    FusedConv(taps[:, :, ::2], padding=(dilation,) * 2, dilation=(2 * dilation, dilation), **how),
                    FusedConv(taps[:, :, 1:2, ::2], padding=(0, dilation), dilation=(1, 2 * dilation), **how),
                ]
            else:
                sides = [FusedConv(taps, padding=(dilation,) * 2, dilation=(dilation,) * 2, **how)]
            last = len(self.branches) == len(parts) - 2
            self.branches.append(nn.ModuleList([*sides, FusedConv(part, relu=last, **how)]))
        self.middle = FusedConv(middle, **how)
        self.im_pool_after.bias.copy_(bias)

    def forward(self, f3: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C', H, W]."""
        image = self.im_pool_after(self.im_pool(f3.float().mean(dim=(2, 3), keepdim=True)).flatten(1))
        out = self.middle(f3)
        out += image[:, :, None, None].to(out.dtype)
        for *sides, after in self.branches:
            branch = None
            for side in sides:
                branch = side(f3, branch)
            out = after(branch, out)
        return out


def _product(after: Tensor, before: Tensor) -> Tensor:
    """Weights of the 1x1 convolution that equals `after` after `before`: [O, M, 1, 1], [M, I, 1, 1] -> [O, I, 1, 1]."""
    return (after.flatten(1) @ before.flatten(1))[:, :, None, None]
