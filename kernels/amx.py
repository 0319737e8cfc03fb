"""What the kernels for CPUs with AMX, tile registers that multiply bfloat16, have in common.

They multiply bfloat16 as it is. A float32 value is three bfloat16 values whose sum it is, and a
product of two is six of theirs, added up in float32; the three that are left out are below 2⁻²³ of
it [Henry, Tang, Heinecke 2019, "Leveraging the bfloat16 artificial intelligence datatype for
higher-precision computations"].

Shape letters: C columns of a product, D its depth, P parts of a value.
"""

import ctypes
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import BFloat16, Float
from torch import Tensor
from torch.nn import functional as F

from classlens.kernels import cpp

FLAGS = ("-mamx-tile", "-mamx-bf16", "-mavx512bf16")
PANEL = 32  # columns, and values of the depth, of a group of tiles
TILE = 16  # columns of a tile
PARTS = {torch.bfloat16: 1, torch.float32: 3}  # of a value, in bfloat16


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


def functions(
    library: ctypes.CDLL, name: str, argtypes: Sequence[Any]
) -> dict[torch.dtype, Callable[..., None]]:
    """The functions of that name, ``NAME_DTYPE``, one for each dtype of activations."""
    found = {dtype: library[f"{name}_{str(dtype).removeprefix('torch.')}"] for dtype in PARTS}
    for function in found.values():
        function.argtypes, function.restype = argtypes, None
    return found


def on_amx(*tensors: Tensor) -> bool:
    """Whether all are on a CPU in one dtype of those that the kernels take."""
    kinds = {(tensor.device.type, tensor.dtype) for tensor in tensors}
    return kinds in [{("cpu", dtype)} for dtype in PARTS]


def pack_panels(
    weight_CD: Float[Tensor, "C D"],
) -> BFloat16[Tensor, "columns steps P 2 16 16 2"]:
    """The rows of a weight as the columns of a product, in the order that ``amx.hpp`` says; both
    sizes are filled up with zeros to multiples of 32."""
    classes, width = weight_CD.shape
    rest = F.pad(weight_CD, (0, -width % PANEL, 0, -classes % PANEL))
    parts = []
    for _ in range(PARTS[weight_CD.dtype]):
        parts.append(rest.to(torch.bfloat16))
        rest = rest - parts[-1]
    tiles = torch.stack(parts).unflatten(1, (-1, 2, TILE)).unflatten(4, (-1, TILE, 2))
    return tiles.permute(1, 4, 0, 2, 5, 3, 6).contiguous()
