"""What the activations of a block's neurons come to over the image tokens of a batch.

    activations [N, T, F] → peak and mean of each image [N, F], counts of their codes [F, C],
    codes of some pairs of an image and a neuron [Q, G]

Shape letters: N images, T tokens, G patches, S tokens counted of an image, F neurons, C codes,
Q pairs of an image and a neuron.
"""

from typing import Literal

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from classlens.kernels.activation_codes import CODES, activation_codes
from classlens.kernels.neuron_sums_avx512 import neuron_sums_avx512, pair_codes_avx512

SumsImpl = Literal["torch", "avx512"]

COUNTED_AT_ONCE = 1 << 22
"""Activations whose codes are counted at once: they should not leave the caches."""


def neuron_sums(
    x: Float[Tensor, "N T F"],
    prefix: int,
    counted: Int[Tensor, "N S"],
    *,
    impl: SumsImpl = "torch",
) -> tuple[Float[Tensor, "N F"], Float[Tensor, "N F"], Int[Tensor, "F C"]]:
    """Peak and mean over the tokens behind the first ``prefix``, float32 [N, F] each, and how many
    of the ``counted`` activations have each code, int32 [F, C].

    The mean of an image with NaN is NaN, and its peak means nothing. Of means the last bits depend
    on the implementation.

    Args:
        x: [N, T, F], any floating dtype.
        prefix: tokens before the patches, less than T.
        counted: [N, S] the tokens that are counted of each image, in [0, T).
        impl: "torch" (any device) or "avx512" (bfloat16 on a CPU with AVX-512 and a C++ compiler).

    Raises:
        ValueError: an argument does not fit; the message says which and what to pass instead.
    """
    _check(x, prefix, impl)
    if impl == "avx512":
        return neuron_sums_avx512(x, prefix, counted)
    peak_NF, mean_NF = _peak_and_mean(x[:, prefix:])
    return peak_NF, mean_NF, _histogram(x, counted.long())


def pair_codes(
    x: Float[Tensor, "N T F"],
    prefix: int,
    images: Int[Tensor, " Q"],
    neurons: Int[Tensor, " Q"],
    *,
    impl: SumsImpl = "torch",
) -> UInt8[Tensor, "Q G"]:
    """The codes of pairs of an image and a neuron, at the tokens behind the first ``prefix``.

    Args:
        x, prefix, impl: as of `neuron_sums`.
        images, neurons: [Q], of each pair; in range, which is not checked. In order they are quick.

    Raises:
        ValueError: an argument does not fit; the message says which and what to pass instead.
    """
    _check(x, prefix, impl)
    if impl == "avx512":
        return pair_codes_avx512(x, prefix, images, neurons)
    return activation_codes(x[:, prefix:].transpose(1, 2)[images, neurons])


def _check(x: Tensor, prefix: int, impl: str) -> None:
    if not 0 <= prefix < x.shape[1]:
        raise ValueError(f"prefix={prefix} leaves none of {x.shape[1]} tokens; pass fewer")
    if impl not in ("torch", "avx512"):
        raise ValueError(f"impl={impl!r} is not torch or avx512; pass one of these")


def _peak_and_mean(x_NGF: Tensor) -> tuple[Tensor, Tensor]:
    if x_NGF.device.type != "cpu" or x_NGF.dtype == torch.float32:
        return x_NGF.amax(dim=1).float(), x_NGF.mean(dim=1, dtype=torch.float32)
    # A CPU converts an image once, and both reductions find it in the caches.
    images = (x_GF.float() for x_GF in x_NGF)
    parts = [(x_GF.amax(dim=0), x_GF.mean(dim=0)) for x_GF in images]
    peak_NF, mean_NF = (torch.stack(part) for part in zip(*parts, strict=True))
    return peak_NF, mean_NF


def _histogram(x_NTF: Tensor, counted_NS: Tensor) -> Tensor:
    N, S = counted_NS.shape
    F = x_NTF.shape[-1]
    first_F = torch.arange(F, dtype=torch.int32, device=x_NTF.device) * CODES
    counts = torch.zeros(F * CODES, dtype=torch.int32, device=x_NTF.device)
    at_once = max(1, COUNTED_AT_ONCE // max(1, S * F))
    for start in range(0, N, at_once):
        images = torch.arange(start, min(start + at_once, N), device=x_NTF.device)
        codes_NSF = activation_codes(x_NTF[images[:, None], counted_NS[images]])
        places = (codes_NSF.int() + first_F).flatten()
        counts += torch.bincount(places, minlength=len(counts))
    return counts.view(F, CODES)
