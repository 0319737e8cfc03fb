import csv
import json
import os
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
import zarr
from click.testing import CliRunner

from classlens.bench import rivals_reference
from classlens.bench.fidelity import read_pictures
from classlens.bench.photographs import write_photographs
from classlens.bench.rivals import (
    OURS,
    REFERENCE_FILES,
    Rival,
    check_interpreter,
    check_reference,
    rivals,
    write_weights,
)
from classlens.bench.rivals_check import (
    STREAMS,
    check,
    check_pixels,
    compare,
    read_reference_pixels,
    read_reference_ranks,
    write_data_set,
)
from classlens.extractor.config import ExtractConfig
from classlens.extractor.errors import ClasslensError, UsageError
from classlens.extractor.prepare import Prepared, prepare
from classlens.extractor.run import extract
from classlens.extractor.store import verify

REFERENCE = os.environ.get("CLASSLENS_REFERENCE")
REFERENCE_PYTHON = os.environ.get("CLASSLENS_REFERENCE_PYTHON")


def run(*arguments):
    result = CliRunner().invoke(rivals, [str(a) for a in arguments], standalone_mode=False)
    if result.exception is not None:
        raise result.exception
    return result.stdout


def checkout(folder: Path) -> Path:
    for name in REFERENCE_FILES:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


def interpreter(folder: Path, line: str) -> Path:
    file = folder / "python"
    file.write_text(f"#!/bin/sh\n{line}\n")
    file.chmod(0o755)
    return file


def test_a_folder_that_is_no_checkout_is_refused(tmp_path):
    check_reference(checkout(tmp_path))
    (tmp_path / "src/models/load.py").unlink()
    with pytest.raises(UsageError, match=r"\(src/models/load\.py not found\); clone github"):
        run("--reference", tmp_path, "--reference-python", sys.executable)


def test_an_interpreter_without_their_timm_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"has timm 1\..*needs 0\.6\.13"):
        run("--reference", checkout(tmp_path), "--reference-python", sys.executable)
    with pytest.raises(UsageError, match=r"has timm none.*needs 0\.6\.13"):
        check_interpreter(interpreter(tmp_path, "exit 1"))
    with pytest.raises(UsageError, match="does not run"):
        check_interpreter(tmp_path / "src/extractor.py")
    check_interpreter(interpreter(tmp_path, "echo 0.6.13"))


def test_images_come_five_a_class(tmp_path):
    with pytest.raises(UsageError, match="--images is 12; give a multiple of 5"):
        run("--reference", tmp_path, "--reference-python", sys.executable, "--images", 12)


def tiny(folder: Path) -> Prepared:
    """Ten photographs of two classes in one shard, and a model of two blocks."""
    shards = write_photographs(folder / "shards", 10, 10, 2)
    size = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
    config = ExtractConfig(
        model="vit_tiny_patch16_224",
        model_args={**size, "num_classes": 10},
        weights="random:0",
        geometry="squash",
        streams=tuple(STREAMS),
        batch_size=10,
    )
    return prepare(config, [str(shards)])


def write_as_authors(out: Path, ranks_NLST: np.ndarray, order: pl.Series) -> None:
    """Files as their extractor leaves them: a folder for each class of five images."""
    for c, images in enumerate(np.split(order.to_numpy(), len(order) // 5)):
        folder = out / "results" / "class_embed" / "vit" / f"n{c:08d}"
        folder.mkdir(parents=True)
        for b in range(ranks_NLST.shape[1]):
            for s, name in enumerate(STREAMS.values()):
                ranks_NT = torch.from_numpy(ranks_NLST[images, b, s].astype(np.int64))
                torch.save(ranks_NT, folder / f"pos_{name}_{b}.pt")


def test_the_data_set_is_laid_out_class_by_class(tmp_path):
    order = write_data_set(tmp_path, tiny(tmp_path))
    assert order.to_list() == [0, 2, 4, 6, 8, 1, 3, 5, 7, 9]
    root = tmp_path / "ImageNetS919"
    with (root / "validation_stim_info.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["img_name"] for row in rows] == [f"{i:06d}.JPEG" for i in order]
    assert [int(row["index"]) for row in rows] == [0] * 5 + [1] * 5
    assert [int(row["img_index"]) for row in rows] == [0, 1, 2, 3, 4] * 2
    synsets = (root / "LOC_synset_mapping.txt").read_text().splitlines()
    assert [synsets.index(f"{row['imagenet_id']} {row['cat']}") for row in rows[4:6]] == [0, 1]
    pictures = [root / "validation" / row["imagenet_id"] / row["img_name"] for row in rows]
    assert len({picture.read_bytes() for picture in pictures}) == 10


def test_ranks_and_pixels_come_back_in_our_order_and_are_checked(tmp_path):
    prepared = tiny(tmp_path)
    store = tmp_path / "store"
    extract(prepared, store)
    ours = np.asarray(zarr.open_array(str(store / "scores/rank"), mode="r")[...])
    order = write_data_set(tmp_path, prepared)
    write_as_authors(tmp_path / "theirs", ours, order)
    ranks = read_reference_ranks(tmp_path / "theirs", "vit", order)
    assert (ranks == ours).all()

    pixels = read_pictures(prepared, 10)[0].permute(0, 3, 1, 2).float() / 127.5 - 1
    np.save(tmp_path / "pixels.npy", pixels.numpy()[order.to_numpy()])
    pixels = read_reference_pixels(tmp_path / "pixels.npy", order)
    found = check(prepared, store, ranks, pixels)
    assert (found["ranks"], found["equal_ranks"], found["in_bracket"]) == (
        10 * 2 * 3 * 17,
        1,
        1,
    )
    assert found["pixel_change_max"] < 1e-6

    with pytest.raises(AssertionError, match="of the ranks equal the authors'"):
        check(prepared, store, (ranks + 1) % 10, pixels)
    pixels[3, 1, 2, 2] += 2 / 255
    with pytest.raises(AssertionError, match="of the pixels differ"):
        check(prepared, store, ranks, pixels)


def test_shares_of_equal_ranks():
    ours = np.array([4, 5, 6, 0])
    found = compare(ours, np.array([4, 6, 9, 1]), ours, ours + 1, 10)
    assert (found["ranks"], found["equal_ranks"], found["in_bracket"]) == (4, 0.25, 0.75)
    assert (found["rank_change_max"], found["rank0_agreement"]) == (3, 0.75)
    with pytest.raises(AssertionError, match="1 ranks of ours lie outside"):
        compare(ours, ours, np.array([4, 5, 7, 0]), ours + 1, 10)
    with pytest.raises(AssertionError, match="shape"):
        compare(ours, ours[:3], ours, ours, 10)


def test_pixels_differ_by_the_rounding_of_their_normalisation():
    ours = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, axis=3)
    theirs = (ours.transpose(0, 3, 1, 2) / np.float32(255) - np.float32(0.5)) / np.float32(0.5)
    assert theirs.dtype == np.float32
    # The quotient errs by 2⁻²⁵ at most, the difference by 2⁻²⁶, and the last step doubles both.
    assert check_pixels(ours, theirs) <= 1.5 * 2.0**-24


def serving(tmp_path: Path, body: str) -> list[str]:
    """A command that serves a ``load`` whose extraction runs ``body``."""
    script = tmp_path / "served.py"
    script.write_text(
        f"import sys; sys.path.insert(0, {str(Path(rivals_reference.__file__).parent)!r})\n"
        "from rivals_reference import serve\n"
        "def load(settings):\n"
        "    print('noise while loading')\n"
        "    def extract(out):\n"
        f"        {body}\n"
        "    return extract\n"
        "serve(load, ())\n"
    )
    return [sys.executable, str(script)]


def test_a_process_extracts_again_and_again(tmp_path):
    body = "print('noise'); out.mkdir(); (out / 'ranks').write_bytes(bytes(settings['size']))"
    with Rival("a, b", serving(tmp_path, body), {"size": 20}, tmp_path) as rival:
        rival.extract()
        rival.seconds += [rival.extract(), rival.extract()]
    assert set(rival.versions) == {"python"}
    figures = rival.figures(images=10, authors_s=60.0, floor_s=0.0)
    assert figures["bytes_per_image"] == 2
    assert figures["images_per_s"] > 0
    assert figures["share_of_peak"] == 0
    assert [f.name for f in tmp_path.iterdir() if f.is_dir()] == ["a-b-out"]


@pytest.mark.parametrize("name", ["loading", "extracting"])
def test_a_process_that_ends_shows_its_last_lines(tmp_path, name):
    command = serving(tmp_path, "raise RuntimeError('no such layer')")
    if name == "loading":
        command = [sys.executable, "-c", "raise RuntimeError('no such layer')"]
    with (
        pytest.raises(ClasslensError, match=r"process of them ended with exit status 1.*\n.*") as e,
        Rival("them", command, {}, tmp_path) as rival,
    ):
        rival.extract()
    assert "RuntimeError: no such layer" in str(e.value)


def test_our_side_extracts_what_it_is_told(tmp_path):
    prepared = tiny(tmp_path)
    settings = {
        "config": prepared.config.to_json(),
        "shards": str(tmp_path / "shards"),
        "threads": 1,
    }
    with Rival("ours", [sys.executable, "-c", OURS], settings, tmp_path) as rival:
        rival.extract()
    assert verify(rival.out) == []


def test_random_weights_leave_no_parameter_at_its_start(tmp_path):
    write_weights("vit_tiny_patch16_224", tmp_path / "weights.pt")
    state = torch.load(tmp_path / "weights.pt", weights_only=True)
    assert all(tensor.std() > 0.01 for name, tensor in state.items() if name != "cls_token")


@pytest.mark.slow
@pytest.mark.skipif(
    REFERENCE is None or REFERENCE_PYTHON is None,
    reason="CLASSLENS_REFERENCE and CLASSLENS_REFERENCE_PYTHON name no checkout and interpreter",
)
def test_ranks_agree_with_the_authors():
    arguments = ["--reference", REFERENCE, "--reference-python", REFERENCE_PYTHON, "--json"]
    arguments += ["--model", "vit_b_32", "--dtype", "float32", "--images", "5", "--rounds", "1"]
    arguments += ["--batch-size", "5"]
    result = json.loads(run(*arguments))
    authors, scores_only, ours = result["rows"]
    assert result["machine"]["reference_timm"] == "0.6.13"
    assert authors["bytes_per_image"] > scores_only["bytes_per_image"] > ours["bytes_per_image"]
    assert ours["ranks"] == 5 * 12 * 3 * 50
    assert ours["equal_ranks"] > 0.99
