"""What an operation must cost at least: the yardstick beside which benchmarks put a time."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Cost:
    """Floating-point operations (a multiply-add counts two) and bytes moved to and from memory.

    The bytes are the least possible: every input read once, every output written once.
    """

    flops: int
    bytes: int

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.flops + other.flops, self.bytes + other.bytes)

    def __mul__(self, times: int) -> "Cost":
        return Cost(self.flops * times, self.bytes * times)


def class_scores_cost(
    *,
    images: int,
    tokens: int,
    width: int,
    classes: int,
    topk: int = 1,
    logsumexp: bool = True,
    bytes_per_value: int = 2,
) -> Cost:
    """Cost of one call of `classlens.kernels.class_scores.class_scores`.

    The operations are those of the projection; statistics and comparisons are not counted.
    ``bytes_per_value`` is that of the hidden states and the weight; results take 4 bytes each.
    """
    rows = images * tokens
    read = bytes_per_value * (rows * width + classes * width) + 4 * classes + 8 * images
    written = 4 * rows * (2 + int(logsumexp) + topk)
    return Cost(flops=2 * rows * width * classes, bytes=read + written)


def vit_forward_cost(
    *,
    images: int,
    image_size: int = 224,
    patch_size: int = 16,
    prefix_tokens: int = 1,
    depth: int = 12,
    width: int = 768,
    mlp_width: int = 3072,
    classes: int = 1000,
    bytes_per_value: int = 2,
) -> Cost:
    """Cost of the forward pass of a plain ViT; the defaults are ViT-B/16's.

    The operations are those of the matrix products. The bytes are weights, pixels and logits:
    what remains if every activation stays on the chip.
    """
    patches = (image_size // patch_size) ** 2
    tokens = patches + prefix_tokens
    patch_values = 3 * patch_size**2
    block_weights = 4 * width**2 + 2 * width * mlp_width
    block_flops = 2 * tokens * block_weights + 4 * tokens**2 * width
    embed_flops = 2 * patches * patch_values * width
    head_flops = 2 * width * classes
    weights = depth * block_weights + patch_values * width + tokens * width + width * classes
    per_image = 3 * image_size**2 + classes
    return Cost(
        flops=images * (depth * block_flops + embed_flops + head_flops),
        bytes=bytes_per_value * (weights + images * per_image),
    )
