"""Settings on another device than the one they were made for."""

import pytest
from variants import config

from classlens.extractor import prepare as preparation
from classlens.extractor.prepare import prepare, prepare_again
from classlens.extractor.run import extract


def test_on_another_device_what_is_set_for_speed_falls_away():
    fast = config(
        "cls", device="cuda", cuda_graph=True, compile=True, batch_size=64, decode_threads=3, topk=2
    )
    there = fast.on("cpu")
    assert there == config("cls", device="cpu", batch_size=None, topk=2)
    assert there.content() == fast.content()
    assert fast.on("cuda") is fast


@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_a_store_made_with_a_cuda_graph_is_prepared_again_on_a_cpu(
    device, make_shards, tmp_path, monkeypatch
):
    shards = [str(path) for path in make_shards((2,))]
    extract(prepare(config("cls"), shards), tmp_path / "store")
    saved = preparation.read_attributes(tmp_path / "store")
    saved["config"] |= {"device": device, "cuda_graph": True, "batch_size": 512}
    monkeypatch.setattr(preparation, "read_attributes", lambda store: saved)
    again = prepare_again(tmp_path / "store", device="cpu").config
    assert (again.device, again.cuda_graph, again.batch_size) == ("cpu", False, None)
