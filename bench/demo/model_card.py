"""What the demo model is: everything a loader needs besides the weights. Imports no torch."""

from pathlib import Path
from typing import Any

MODEL_NAME = "vit_tiny_patch16_224"
MODEL_ARGS: dict[str, Any] = {
    "img_size": 64,
    "patch_size": 8,
    "embed_dim": 128,
    "depth": 8,
    "num_heads": 4,
    "num_classes": 100,
}
MEAN = (0.4, 0.4, 0.4)
STD = (0.27, 0.27, 0.27)
WEIGHTS = Path(__file__).with_name("model.safetensors")
