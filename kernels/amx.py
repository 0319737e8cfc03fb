"""What the kernels for CPUs with AMX, tile registers that multiply bfloat16, have in common.

Shape letters: C columns of a product, D its depth.
"""

import ctypes
from pathlib import Path

import torch
from jaxtyping import BFloat16
from torch import Tensor
from torch.nn import functional as F

from classlens.kernels import cpp

FLAGS = ("-mamx-tile", "-mamx-bf16", "-mavx512bf16")
PANEL = 32  # columns, and values of the depth, of a group of tiles
TILE = 16  # columns of a tile


def has_amx() -> bool:
    """Whether this CPU has AMX for bfloat16."""
    return bool(torch.cpu.get_capabilities().get("amx_bf16"))


def amx_found() -> bool:
    """Whether this CPU has AMX for bfloat16 and a C++ compiler is at hand."""
    return has_amx() and cpp.compiler() is not None


def load(source: Path) -> ctypes.CDLL:
    """The library of a source that includes ``amx.hpp``, and tile registers for this process.

    Raises:
        RuntimeError: no compiler, or it fails; or the system grants no tile registers.
    """
    library = cpp.load(source, FLAGS)
    library.request_tiles.restype = ctypes.c_long
    if library.request_tiles() != 0:
        raise RuntimeError("the system grants no AMX tile registers; pass impl='torch'")
    return library


def pack_panels(weight_CD: BFloat16[Tensor, "C D"]) -> BFloat16[Tensor, "columns steps 2 16 16 2"]:
    """The rows of a weight as the columns of a product, in the order that ``amx.hpp`` says; both
    sizes are filled up with zeros to multiples of 32."""
    classes, width = weight_CD.shape
    padded = F.pad(weight_CD, (0, -width % PANEL, 0, -classes % PANEL))
    tiles = padded.unflatten(0, (-1, 2, TILE)).unflatten(3, (-1, TILE, 2))
    return tiles.permute(0, 3, 1, 4, 2, 5).contiguous()
