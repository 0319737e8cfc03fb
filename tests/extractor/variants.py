"""One small random model for each kind of Vision Transformer that is supported."""

from classlens.extractor.config import ExtractConfig

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3}
GAP = {"class_token": False, "global_pool": "avg"}

# Name: (timm name, further model arguments, kinds of the prefix tokens).
VARIANTS = {
    "cls": ("vit_tiny_patch16_224", {}, ("cls",)),
    "gap": ("vit_tiny_patch16_224", GAP, ()),
    "registers": ("vit_tiny_patch16_224", {"reg_tokens": 4}, ("cls", *("register",) * 4)),
    "registers-layerscale-gap": (
        "vit_tiny_patch16_224",
        {**GAP, "reg_tokens": 4, "init_values": 0.1},
        ("register",) * 4,
    ),
    "distilled": ("deit_tiny_distilled_patch16_224", {}, ("cls", "dist")),
    "post-norm-gap": ("vit_base_patch16_rpn_224", {}, ()),
    "qk-norm": ("vit_tiny_patch16_224", {"qk_norm": True}, ("cls",)),
    "norm-pre": ("vit_tiny_patch16_224", {"pre_norm": True}, ("cls",)),
}


def config(variant: str, **settings) -> ExtractConfig:
    """The extraction settings for one variant, random weights, 10 classes."""
    name, extra, _ = VARIANTS[variant]
    settings = {
        "model_args": {**SMALL, "num_classes": 10, **extra},
        "weights": "random:3",
        "batch_size": 4,
        **settings,
    }
    return ExtractConfig(model=name, **settings)
