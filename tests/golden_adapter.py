"""What `compare.py` of the goldens calls: glue to the functions that train.py, infer.py and evaluate.py use.

python compare.py --candidate tests/golden_adapter.py --prec f32
DT=f64 python compare.py --candidate tests/golden_adapter.py --prec f64
"""

import copy
import os
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from core import builders
from core.config import load_cfg
from core.optimizer import set_learning_rate
from core.schedule import learning_rate
from datasets import transforms
from datasets.images import decode as image
from evaler.extraction.multiscale import describe
from evaler.sources.images import crop
from model.fusion import orthogonal_component
from model.margin import build_head
from model.weights.loading import load_strict
from revisitop import average_precision, protocol

DTYPE = torch.float64 if os.environ.get("DT") == "f64" else torch.float32
HEADS = {"curricular": "curricularface", "arcface": "arcface"}

decode = image.decode
preprocess = transforms.preprocess
transform_test = transforms.transform_test
compute_map = average_precision.compute_map
evaluate = protocol.evaluate


def transform_train(bgr, box_yxhw, hflip, alpha3, size):
    return transforms.transform_train(bgr, transforms.TrainDraw(tuple(box_yxhw), hflip, tuple(alpha3)), size)


def _cfg(variant):
    published = {
        "MODEL.DEPTH": variant["depth"],
        "MODEL.WITH_MA": variant["with_ma"],
        "MODEL.NUM_CLASSES": variant["num_classes"],
        "MODEL.HEADS.CLS_LAYER": "curricularface",
        "MODEL.HEADS.SCALE": 30,
        "RESNET.STRIDE_1X1": False,
        "OPTIM.WEIGHT_DECAY": 1e-4,
    }
    return load_cfg(None, [str(part) for setting in published.items() for part in setting])


def _load(network, weights):
    load_strict(network, {key: torch.from_numpy(np.asarray(value)) for key, value in weights.items()}, source="recipe")
    return network.to(DTYPE)


def build(variant, weights):
    return _load(builders.build_descriptor(_cfg(variant)), weights).eval()


@torch.no_grad()
def forward(built, x):
    seen = {}
    hooks = [
        module.register_forward_hook(lambda _, __, output, name=name: seen.update({name: output}))
        for name, module in built.named_children()
    ]
    descriptor = built(torch.from_numpy(x).to(DTYPE))
    for hook in hooks:
        hook.remove()
    (f3, f4), (local, attention), g = seen["globalmodel"], seen["localmodel"], seen["fc_t"]
    orthogonal = orthogonal_component(local, g)
    maps = {"f3": f3, "f4": f4, "fl": local, "att": attention[0], "orth": orthogonal}
    vectors = {"gem": seen["pool_g"], "fg": g, "fo": orthogonal.mean(dim=(2, 3)), "feat": descriptor}
    return {name: value.numpy() for name, value in (maps | vectors).items()}


def extract(built, image_path, bbox):
    return describe(built, crop(image.decode(image_path), bbox), scales=load_cfg(None).INFER.SCALES).numpy()


def head(kind, W, x, y, s, m, t):
    def layer():
        layer = build_head(HEADS[kind], W.shape[1], W.shape[0], scale=s, margin=m)
        state = {"weight": torch.from_numpy(W)}
        if kind == "curricular":
            state["t"] = torch.tensor([t], dtype=torch.float64)
        layer.to(DTYPE).load_state_dict(state)
        return layer

    x = torch.from_numpy(x).to(DTYPE).requires_grad_()
    y = torch.from_numpy(y)
    trained = layer()
    loss, _ = trained.loss(x, y)
    loss.backward()
    result = {"logits": layer()(x, y).detach(), "loss": loss.detach(), "gx": x.grad, "gW": trained.weight.grad}
    if kind == "curricular":
        result["t"] = trained.t
    return {name: value.numpy() for name, value in result.items()}


def train(variant, weights, batches, lrs):
    cfg = _cfg(variant)
    network = _load(builders.build_classifier(cfg), weights).train()
    optimizer = builders.build_optimizer(cfg, network)
    step = builders.build_step(cfg, network, optimizer)
    descriptors = []
    network.fc.register_forward_hook(lambda _, __, output: descriptors.append(output.detach()))
    losses, logits = [], []
    for (images, labels), rate in zip(batches, lrs, strict=True):
        set_learning_rate(optimizer, rate)
        labels = torch.from_numpy(labels)
        before = copy.deepcopy(network.desc_cls)  # the step renews t and the weights
        loss, _ = step(torch.from_numpy(images).to(DTYPE), labels)
        losses.append(loss)
        logits.append(before(descriptors[-1], labels).detach())
    state = {key: value.numpy() for key, value in network.state_dict().items()}
    return {"loss": torch.stack(losses).numpy(), "logits": torch.stack(logits).numpy(), "state": state}


def lr(policy, optim):
    settings = {key.lower(): value for key, value in optim.items()}
    return [learning_rate(epoch, policy=policy, **settings) for epoch in range(optim["MAX_EPOCH"])]
