from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True, scope="package")
def one_thread() -> Iterator[None]:
    """The inputs are tiny, and threads on a shared machine wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def poisoned_empty(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """Fill what torch.empty returns with values that no result has; lists the tensors made."""
    made: list[torch.Tensor] = []
    original = torch.empty

    def empty(*args: object, **kwargs: object) -> torch.Tensor:
        tensor = original(*args, **kwargs)
        tensor.fill_(-(2**20) - 1)
        made.append(tensor)
        return tensor

    monkeypatch.setattr(torch, "empty", empty)
    return made
