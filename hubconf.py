"""For torch.hub: `describe = torch.hub.load(REPOSITORY, "dolg", weights="weights.pyth", source="local")`."""

dependencies = ["torch", "numpy", "cv2", "yacs", "tqdm"]


def dolg(weights: str, **options):
    """A callable from photographs to descriptors float32 [N, 512]; `weights` is a file or an http(s) address.

    Options and what it takes: `load` and `Describer` in evaler/describer.py.
    """
    from evaler.describer import load

    return load(weights, **options)
