"""Codes of tensors against the specification, and the specification against its words."""

import numpy as np
import pytest
import torch

from classlens.extractor.codes import FINITE, codes_of, lower_edges, representatives
from classlens.kernels.activation_codes import activation_codes

EDGES = lower_edges()[1:]


def values() -> np.ndarray:
    """Every edge with its neighbours, every power of two, and noise of all sizes."""
    below, above = (np.nextafter(EDGES, np.float32(side)) for side in (-np.inf, np.inf))
    powers = np.float32(2.0) ** np.arange(-140, 120, dtype=np.float32)
    noise = np.random.default_rng(0).standard_normal(20_000).astype(np.float32)
    scaled = noise * np.float32(2.0) ** np.random.default_rng(1).integers(-30, 8, len(noise))
    special = np.array([0.0, -0.0, np.inf, -np.inf, 1e-45, -1e-45], np.float32)
    return np.concatenate([below, EDGES, above, powers, -powers, scaled, special]).astype("f4")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_tensors_have_the_codes_of_the_specification(dtype):
    x = torch.from_numpy(values()).to(dtype)
    assert np.array_equal(activation_codes(x).numpy(), codes_of(x.float().numpy()))


def test_codes_keep_the_order_and_all_occur():
    ordered = np.sort(values())
    codes = codes_of(ordered)
    assert (np.diff(codes.astype(int)) >= 0).all()
    assert len(np.unique(codes)) == 256
    assert codes_of(np.float32(-0.0)) == codes_of(np.float32(0.0)) == 128


def test_an_edge_is_the_smallest_value_of_its_code():
    assert lower_edges()[0] == -np.inf
    assert np.array_equal(codes_of(EDGES), np.arange(1, 256))
    assert np.array_equal(codes_of(np.nextafter(EDGES, np.float32(-np.inf))), np.arange(255))
    x = values()
    for code in range(255):
        assert np.array_equal(codes_of(x) > code, x >= lower_edges()[code + 1])


def test_widths_are_as_stated():
    x = values()
    inside = np.abs(x) < FINITE
    codes = codes_of(x[inside])
    assert codes.min() == 1
    assert codes.max() == 254
    width = EDGES[codes].astype(np.float64) - EDGES[codes - 1]
    assert (width <= (np.abs(x[inside]) + 0.125) / 16 * (1 + 1e-6)).all()
    assert (np.abs(representatives(codes) - x[inside]) <= width * (0.5 + 1e-6)).all()
    assert np.array_equal(codes_of(representatives(np.arange(256))), np.arange(256))
    assert np.array_equal(codes_of([FINITE, -FINITE, 1e9, -1e9]), [255, 0, 255, 0])
