"""A folder of good photographs among which lies every kind of broken file: in = ok + rejected, nothing silent."""

import re

import numpy as np
import pytest
import torch
from torch import nn

from datasets.images.files import EXTENSIONS
from evaler.extraction import command as extract
from evaler.features import store as features
from evaler.features.provenance import Provenance
from tests import broken_inputs
from tests.small_run import photograph, write_image


class Mean(nn.Module):
    """A descriptor that tells pictures apart and takes any size."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 6, generator=torch.Generator().manual_seed(0)), requires_grad=False)

    def forward(self, images):
        return torch.cat([images.mean(dim=(2, 3)), images.square().mean(dim=(2, 3))], dim=1) @ self.weight.T + 1


@pytest.mark.parametrize("workers", [0, 2])
def test_every_file_is_described_or_rejected_with_its_reason(tmp_path, monkeypatch, workers):
    folder = tmp_path / "photos"
    folder.mkdir()
    kinds = {f"{i:03d}-{k.name}": k for i, k in enumerate(broken_inputs.kinds()) if not k.heavy}
    kinds = {name: kind for name, kind in kinds.items() if name.lower().endswith(EXTENSIONS)}
    for name, kind in kinds.items():
        kind.write(folder / name)
    names = sorted([*kinds, *(f"good-{i}.jpg" for i in range(9))])
    for i in range(9):
        write_image(folder / f"good-{i}.jpg", photograph(i))
    # Some are named by a list only: pipes and folders are not what a search of a folder counts as images.
    (folder / "list.txt").write_text("".join(f"{name}\n" for name in names))
    provenance = Provenance(weights="none", weights_sha256="0", batch_size=1, device="CPU")
    monkeypatch.setattr(extract, "load_network", lambda cfg: (Mean().eval(), provenance))
    (tmp_path / "some.yaml").touch()
    settings = {"OUT_DIR": tmp_path, "INFER.IMAGES": folder / "list.txt", "INFER.SCALES": "[1]", "INFER.MIN_SIDE": 1}
    settings |= {"INFER.SKIP_BROKEN": 1000, "INFER.MAX_ASPECT": 1e6, "INFER.NUM_WORKERS": workers}
    settings |= {"MODEL.HEADS.REDUCTION_DIM": 8, "INFER.CHUNK_SIZE": 20, "NUM_GPUS": 0}
    extract.main(["--cfg", str(tmp_path / "some.yaml"), *(str(part) for pair in settings.items() for part in pair)])

    found = features.load(tmp_path / "features" / "list", "images")
    rejected = {rejection.name: rejection.reason for rejection in found.rejected}
    assert sorted([*found.names, *rejected]) == names and len(kinds) >= 100
    assert set(rejected) == {name for name, kind in kinds.items() if kind.refused}
    for name, reason in rejected.items():
        assert re.search(kinds[name].refused, reason), (name, reason)
        assert str(tmp_path) not in reason
    for name, size in zip(found.names, found.sizes.tolist(), strict=True):
        if name in kinds and kinds[name].pixels is not None:
            assert size == list(kinds[name].pixels.shape[1::-1]), name
    assert np.isfinite(found.vectors).all()
