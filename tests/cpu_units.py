"""What the C++ kernels for CPUs can be tested with on this one."""

import pytest
import torch

from classlens.kernels import cpp
from classlens.kernels.tiles import DTYPES, UNITS, has_units, units_found

BFLOAT16, FLOAT32 = torch.bfloat16, torch.float32


def cases(*dtypes: torch.dtype):
    """Pairs of registers that multiply and a dtype; those that this machine lacks are skipped."""
    return [
        pytest.param(
            units,
            dtype,
            id=f"{units}-{str(dtype).removeprefix('torch.')}",
            marks=pytest.mark.skipif(
                cpp.compiler() is None or not has_units(units, dtype),
                reason=f"needs {units} for {dtype} and a C++ compiler",
            ),
        )
        for units in UNITS
        for dtype in dtypes or DTYPES
    ]


each_units = pytest.mark.parametrize(("units", "dtype"), cases())
each_units_bfloat16 = pytest.mark.parametrize(("units", "dtype"), cases(BFLOAT16))
needs_avx512 = pytest.mark.skipif(
    cpp.compiler() is None or not has_units("avx512", FLOAT32),
    reason="needs AVX-512 and a C++ compiler",
)
needs_units_bfloat16 = pytest.mark.skipif(
    units_found(BFLOAT16) is None,
    reason="needs AMX or AVX512_BF16, and a C++ compiler",
)
