import pytest
import torch

from classlens.extractor.batch_size import largest_batch
from classlens.extractor.errors import ModelError


@pytest.mark.parametrize(("fits", "found"), [(1000, 512), (512, 512), (511, 256), (1, 1)])
def test_halves_until_it_fits(fits: int, found: int) -> None:
    tried = []

    def score(size: int) -> None:
        tried.append(size)
        if size > fits:
            raise torch.OutOfMemoryError("CUDA out of memory")

    assert largest_batch(score, 512) == found
    assert tried[-1] == found


def test_no_image_fits() -> None:
    def score(size: int) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(ModelError, match="smaller model"):
        largest_batch(score, 8)


def test_other_errors_are_not_swallowed() -> None:
    def score(size: int) -> None:
        raise RuntimeError("something else")

    with pytest.raises(RuntimeError, match="something else"):
        largest_batch(score, 8)
