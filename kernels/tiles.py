"""What the C++ kernels for CPUs have in common: their operands in tiles, and who multiplies these.

Either tile registers (AMX), which multiply bfloat16: a float32 value is three bfloat16 values whose
sum it is, and a product of two is six of theirs, added up in float32; the three that are left out
are below 2⁻²³ of it [Henry, Tang, Heinecke 2019, "Leveraging the bfloat16 artificial intelligence
datatype for higher-precision computations"]. Or vector registers (AVX-512), which multiply float32
as it is, and bfloat16 where the CPU has AVX512_BF16. All sums are float32.

Shape letters: C columns of a product, D its depth, P parts of a value.
"""

import ctypes
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from classlens.kernels import cpp

Units = Literal["amx", "avx512"]
UNITS: tuple[Units, ...] = get_args(Units)
FLAGS = {"amx": ("-mamx-tile", "-mamx-bf16", "-mavx512bf16"), "avx512": ("-mavx512bf16",)}
PANEL = 32  # columns, and values of the depth, of a group of tiles
TILE = 16  # columns of a tile
DTYPES = (torch.bfloat16, torch.float32)
PARTS_AMX = 3  # of a float32 value, in bfloat16


def has_units(units: Units, dtype: torch.dtype) -> bool:
    """Whether this CPU has registers that multiply such values, and the system grants them."""
    if dtype not in DTYPES:
        return False
    needed = ["avx512_f", "avx512_bw", "avx512_vl"]
    if units == "amx":
        needed += ["amx_tile", "amx_bf16"]
    elif dtype == torch.bfloat16:
        needed += ["avx512_bf16"]
    capabilities = torch.cpu.get_capabilities()
    found = all(capabilities.get(name, False) for name in needed)
    return found and (units != "amx" or _tiles_granted())


@functools.cache
def _tiles_granted() -> bool:
    """Asks Linux for the tile registers, which a process does not have from the start."""
    arch_prctl, request_permission, tile_data = 158, 0x1023, 18
    system_call = ctypes.CDLL(None).syscall
    system_call.argtypes, system_call.restype = (ctypes.c_long,) * 3, ctypes.c_long
    return system_call(arch_prctl, request_permission, tile_data) == 0


def units_found(dtype: torch.dtype) -> Units | None:
    """The registers that multiply such values fastest on this CPU; None if there are none, or no
    C++ compiler is at hand."""
    if cpp.compiler() is None:
        return None
    return next((units for units in UNITS if has_units(units, dtype)), None)


def load(source: Path, units: Units) -> ctypes.CDLL:
    """The library of a source that includes ``tiles.hpp``; errors as `cpp.load`."""
    return cpp.load(source, FLAGS[units])


def functions(
    library: ctypes.CDLL, name: str, argtypes: Sequence[Any]
) -> dict[torch.dtype, Callable[..., None]]:
    """The functions of that name, ``NAME_DTYPE``, one for each dtype of activations."""
    found = {dtype: library[f"{name}_{str(dtype).removeprefix('torch.')}"] for dtype in DTYPES}
    for function in found.values():
        function.argtypes, function.restype = argtypes, None
    return found


def require(units: Units, *tensors: Tensor) -> None:
    """Refuses operands that are not all on a CPU in one dtype of those that the kernels take.

    Raises:
        ValueError: they are not.
        RuntimeError: this CPU does not multiply them in these registers.
    """
    kinds = {(tensor.device.type, tensor.dtype) for tensor in tensors}
    if kinds not in [{("cpu", dtype)} for dtype in DTYPES]:
        given = ", ".join(sorted(f"{dtype} on {device}" for device, dtype in kinds))
        raise ValueError(
            f"impl={units!r} takes all in bfloat16 or all in float32, on a CPU, not {given}; pass "
            "impl='torch'"
        )
    dtype = tensors[0].dtype
    if not has_units(units, dtype):
        raise RuntimeError(f"this CPU has no {units} for {dtype}; pass impl='torch'")


def pack_panels(weight_CD: Float[Tensor, "C D"], units: Units) -> Float[Tensor, "*panels"]:
    """The rows of a weight as the columns of a product, in the order that ``tiles.hpp`` says,
    [C / 32, D / 32, P, 2, 16, 32] of 16 bits; both sizes are filled up with zeros."""
    classes, width = weight_CD.shape
    rest = F.pad(weight_CD, (0, -width % PANEL, 0, -classes % PANEL))
    tiles = rest.unflatten(1, (-1, TILE, 2)).unflatten(0, (-1, 2, TILE))  # [C, 2, 16, D, 16, 2]
    if units == "avx512" and weight_CD.dtype == torch.float32:
        return tiles.permute(0, 3, 5, 1, 4, 2).contiguous()  # the first and the second of a pair
    parts = []
    for _ in range(PARTS_AMX if weight_CD.dtype == torch.float32 else 1):
        parts.append(tiles.to(torch.bfloat16))
        tiles = tiles - parts[-1]
    return torch.stack(parts).permute(1, 4, 0, 2, 5, 3, 6).contiguous()
