"""Attribution on the report page: right maps in right places, and perturbation curves."""

import base64
import io

import numpy as np
import pytest
from PIL import Image
from test_perturbation import FACTS, answers
from test_report import make_store

from classlens.analysis.perturbation import summarise, write_result
from classlens.analysis.report import write_report
from classlens.analysis.report.attribution import centred, relevance_pictures, shares
from classlens.analysis.scan import scan_attribution


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    path = tmp_path_factory.mktemp("a") / "store"
    return make_store(path, seed=3, heads=2, reducers=("attribution",))


def decoded(uri):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))), dtype=int)


def test_maps_are_the_sum_and_the_blocks_side_by_side(store):
    pictures = relevance_pictures(store.path, 4)
    assert len(pictures) == 4
    keys = {key: image for image, key in store.keys.items()}
    for picture in pictures:
        frame = scan_attribution(store.path, images=[keys[picture.key]]).collect()
        blocks = frame.sort("block", "row", "col")["relevance"].to_numpy().reshape(3, 3, 4)
        heat = decoded(picture.heat)
        assert heat.shape == (3, 4 * 4, 3)
        redder = heat[..., 0] - heat[..., 2]
        for place, values in enumerate([blocks.astype(float).sum(0), *blocks]):
            shown = redder[:, 4 * place : 4 * place + 4]
            clear = np.abs(values) > 0.1 * np.abs(values).max()
            assert ((shown > 0) == (values > 0))[clear].all()
            peak = np.unravel_index(np.abs(values).argmax(), values.shape)
            end = [0xB2, 0x18, 0x2B] if values[peak] > 0 else [0x21, 0x66, 0xAC]
            assert heat[peak[0], 4 * place + peak[1]].tolist() == end
        assert picture.texts[0] == "all blocks"
        assert sum(float(t.split("· ")[1][:-1]) for t in picture.texts[1:]) == pytest.approx(
            100, abs=2
        )


def test_maps_of_nothing_are_white():
    assert (centred(np.zeros((2, 3, 3))) == 0.5).all()
    assert shares(np.zeros((2, 3, 3))) == ["0 · 0%", "1 · 0%"]


def test_the_page_has_maps_and_curves(store, tmp_path):
    write_result(tmp_path / "p.parquet", answers(), summarise(answers(), FACTS))
    write_result(tmp_path / "p.json", answers(), summarise(answers(), FACTS))
    page = write_report(
        [store.path],
        tmp_path / "report.html",
        n_images=3,
        permutations=10,
        perturbations=[tmp_path / "p.parquet", tmp_path / "p.json"],
    ).read_text()
    assert page.count("What attention takes from each patch") == 1
    assert page.count("--relevance:url(data:image/png") == 3
    assert page.count('id="perturbation-') == 2
    assert "Chefer" in page
    assert "Differences of the areas" in page


def test_a_page_without_them_has_neither(tmp_path):
    plain = make_store(tmp_path / "store", seed=0)
    page = write_report([plain.path], tmp_path / "r.html", n_images=2, permutations=10).read_text()
    assert "What attention takes" not in page
    assert "Perturbation test" not in page
    assert relevance_pictures(plain.path, 3) == []
