"""Model names, `R<depth>_<dataset>`, and what they stand for."""

import re
from typing import NamedTuple

from models.lab import syn

NUM_CLASSES = {"C10": 10, "C100": 100, "SYN": len(syn.CLASSES), "ImgNet": 1000}
IMAGENET_LAYERS = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}


class ModelName(NamedTuple):
    """A model name taken apart."""

    depth: int
    dataset: str
    layer_config: tuple[int, ...]  # blocks per segment
    num_classes: int
    image_size: int  # pixels


def parse_model(model: str) -> ModelName:
    """Take a model name `R<depth>_<dataset>` apart. ValueError, saying what is allowed, for others."""
    match = re.fullmatch(r"R([1-9]\d*)_([A-Za-z0-9]+)", str(model))
    depth, dataset = (int(match[1]), match[2]) if match else (0, "")
    if dataset == "ImgNet" and depth in IMAGENET_LAYERS:
        return ModelName(depth, dataset, IMAGENET_LAYERS[depth], NUM_CLASSES[dataset], 224)
    if dataset in ("C10", "C100", "SYN") and depth >= 8 and depth % 6 == 2:
        return ModelName(depth, dataset, ((depth - 2) // 6,) * 3, NUM_CLASSES[dataset], 32)
    raise ValueError(
        f"unknown model {model!r}: expected R<depth>_<dataset>, with depth 8, 14, 20, 32, ... 110 "
        "(6n+2) for the datasets C10, C100 and SYN, and depth 50, 101 or 152 for ImgNet"
    )
