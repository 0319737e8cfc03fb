"""A pytest plugin, ``-p emulated_amx``: the kernels for AMX on a CPU without, by emulation.

For a process of its own: no other registers are found in it.
"""

from pathlib import Path

HEADER = Path(__file__).with_suffix(".hpp")


def pytest_configure() -> None:
    from classlens.kernels import tiles  # not before jaxtyping watches the package

    tiles.FLAGS["amx"] = (*tiles.FLAGS["avx512"], "-include", str(HEADER))
    tiles.has_units = lambda units, dtype: units == "amx" and dtype in tiles.DTYPES
