"""The network as it is trained: descriptor and classification head in one forward, as DDP wants it."""

from torch import Tensor, nn

from model.dolg import DOLG
from model.margin import CosineHead


class Classifier(DOLG):
    """DOLG with a head `desc_cls` on its descriptor.

    A subclass rather than a wrapper, so that the parameters keep the flat names of the published weights. Inference
    uses `DOLG` and needs neither head nor labels.
    """

    def __init__(self, backbone: nn.Module, head: CosineHead, **descriptor):
        super().__init__(backbone, **descriptor)
        self.desc_cls = head

    def forward(  # type: ignore[override]  # whoever has labels knows that this is a classifier
        self, images: Tensor, labels: Tensor | None = None
    ) -> tuple[Tensor, Tensor] | Tensor:
        """Images [B, 3, H, W] and labels [B] -> the head's loss [] and ranks [B]; see `CosineHead.loss`.

        Without labels: scaled plain cosines [B, classes].
        """
        descriptors = self.descriptors(images)
        return self.desc_cls(descriptors) if labels is None else self.desc_cls.loss(descriptors, labels)

    def descriptors(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] -> descriptors [B, dim], as `DOLG` gives them."""
        return super().forward(images)
