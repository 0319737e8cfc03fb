"""Words, their agreement and CLIP scores against loops; the command on a small store."""

import json
from math import comb

import numpy as np
import polars as pl
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from safetensors.torch import save_file
from samples import sample, write_tar

from classlens.analysis.neurons.clip import (
    best_texts,
    exemplar_embeddings,
    masked,
    open_tower,
    resized,
)
from classlens.analysis.neurons.exemplars import exemplar_codes, masks, thresholds
from classlens.analysis.neurons.store_words import words_of_store
from classlens.analysis.neurons.subject import open_subject
from classlens.analysis.neurons.words import (
    agreement,
    clip_words,
    exemplar_words,
    join_words,
    promoted_words,
)
from classlens.cli import cli
from classlens.extractor.config import ExtractConfig
from classlens.extractor.pictures import read_pictures
from classlens.extractor.prepare import prepare
from classlens.extractor.run import extract

ARGS = {
    "img_size": 32,
    "patch_size": 8,
    "embed_dim": 48,
    "depth": 2,
    "num_heads": 3,
    "num_classes": 10,
    "mlp_ratio": 0.5,
}
MODEL, WEIGHTS = "vit_tiny_patch16_224", "random:3"
IMAGES, NEURONS, BLOCKS = 18, 24, 2


def test_promoted_words_equal_loops():
    subject = open_subject(MODEL, weights=WEIGHTS, model_args=ARGS)
    frame = promoted_words(subject, 1, top=3)
    state = {k: v.double().numpy() for k, v in subject.model.state_dict().items()}
    assert frame.height == NEURONS
    for j, row in enumerate(frame.iter_rows(named=True)):
        products = [
            float(np.sum(e * state["blocks.1.mlp.fc2.weight"][:, j])) for e in state["head.weight"]
        ]
        best = sorted(range(10), key=lambda c: (-products[c], c))[:3]
        assert (row["block"], row["neuron"], row["promoted"]) == (1, j, best)
        assert row["alignments"] == pytest.approx([products[c] for c in best], rel=1e-12)
        assert (row["promoted_class"], row["promoted_word"]) == (best[0], str(best[0]))
        assert row["promoted_words"] == [str(c) for c in best]
    assert len(promoted_words(subject, 0, top=99)["promoted"][0]) == 10


def naive_tail(count, drawn, marked, total):
    """P(at least ``count`` of ``drawn`` are marked), without replacement."""
    ways = sum(comb(marked, k) * comb(total - marked, drawn - k) for k in range(count, drawn + 1))
    return ways / comb(total, drawn)


def test_exemplar_words_equal_loops():
    rng = np.random.default_rng(0)
    frequency = np.array([4, 0, 9, 7, 3, 1])
    population = np.repeat(np.arange(6), frequency)
    labels = np.array([rng.permutation(population)[:5] for _ in range(60)])
    labels[0], labels[1], labels[2] = [2] * 5, [3, 2, 3, 2, 0], [4, 4, -1, -1, -1]
    labels[3] = -1
    frame = exemplar_words(7, labels, frequency, "abcdef")
    for j, row in enumerate(frame.iter_rows(named=True)):
        there = [c for c in labels[j] if c >= 0]
        assert (row["block"], row["neuron"], row["n_exemplars"]) == (7, j, len(there))
        if not there:
            assert row["exemplar_class"] is row["exemplar_word"] is row["exemplar_p"] is None
            assert row["exemplar_share"] is None
            continue
        best = min(range(6), key=lambda c: (-there.count(c), c))
        assert (row["exemplar_class"], row["exemplar_word"]) == (best, "abcdef"[best])
        assert row["exemplar_share"] == there.count(best) / len(there)
        tail = naive_tail(there.count(best), len(there), int(frequency[best]), 24)
        assert row["exemplar_p"] == pytest.approx(min(1, 5 * tail), rel=1e-9)
    assert frame["exemplar_class"].to_list()[:4] == [2, 2, 4, None]


def words_frame(promoted, exemplar, clip, blocks):
    frame = {"block": blocks, "neuron": range(len(blocks))}
    return pl.DataFrame(
        frame, schema_overrides={"block": pl.Int16, "neuron": pl.Int32}
    ).with_columns(
        pl.Series("promoted_class", promoted, pl.Int32),
        pl.Series("exemplar_class", exemplar, pl.Int32),
        pl.Series("clip_class", clip, pl.Int32),
    )


def wilson(k, n):
    z = 1.959963984540054
    centre, half = (
        k / n + z * z / (2 * n),
        z * np.sqrt(k / n * (1 - k / n) / n + (z / (2 * n)) ** 2),
    )
    return (centre - half) / (1 + z * z / n), (centre + half) / (1 + z * z / n)


def test_agreement_equals_loops():
    rng = np.random.default_rng(1)
    columns = {}
    for name in ("promoted", "exemplar", "clip"):
        classes = rng.integers(4, size=200).tolist()
        missing = set(rng.integers(200, size=0 if name == "promoted" else 40).tolist())
        columns[name] = [None if i in missing else c for i, c in enumerate(classes)]
    pairs = enumerate(zip(columns["promoted"], columns["exemplar"], strict=True))
    columns["exemplar"] = [p if i % 3 == 0 else e for i, (p, e) in pairs]
    blocks = [0] * 90 + [2] * 110
    joined = join_words(words_frame(*columns.values(), blocks))
    pairs = [("promoted", "exemplar"), ("promoted", "clip"), ("exemplar", "clip")]
    for i, count in enumerate(joined["agreeing"]):
        values = [(columns[x][i], columns[y][i]) for x, y in pairs]
        assert count == sum(a is not None and a == b for a, b in values)
    rows = agreement(joined).to_dicts()
    assert [(r["block"], r["first"], r["second"]) for r in rows] == [
        (block, *pair) for block in (0, 2, None) for pair in pairs
    ]
    for row in rows:
        both = [
            (a, b)
            for block, a, b in zip(
                blocks, columns[row["first"]], columns[row["second"]], strict=True
            )
            if row["block"] in (block, None) and a is not None and b is not None
        ]
        equal = sum(a == b for a, b in both)
        chance = sum(a == b for a, _ in both for _, b in both) / len(both) ** 2
        assert (row["n_neurons"], row["agreement"]) == (len(both), equal / len(both))
        assert row["chance"] == pytest.approx(chance, rel=1e-12)
        assert (row["low"], row["high"]) == pytest.approx(wilson(equal, len(both)), rel=1e-9)


def test_agreement_of_nothing_is_nan():
    [row, _] = agreement(
        join_words(words_frame([1], [None], [None], [0]).drop("clip_class"))
    ).to_dicts()
    assert row["n_neurons"] == 0
    assert all(np.isnan(row[name]) for name in ("agreement", "low", "high", "chance"))


def test_clip_words_meet_the_classes_of_the_same_name():
    texts = ("Dog", "lamp", "cat", "dog")
    names = ("cat", "dog", "DOG")
    frame = clip_words(3, np.array([3, 1, -1, 2]), np.array([0.5, 0.25, np.nan, 0.1]), texts, names)
    assert frame["clip_word"].to_list() == ["dog", "lamp", None, "cat"]
    assert frame["clip_class"].to_list() == [1, None, None, 0]
    assert frame["clip_score"].to_list() == [0.5, 0.25, None, 0.1]
    same = clip_words(3, np.array([2]), np.array([0.5]), names, names)
    assert same["clip_class"].to_list() == [2]  # by place where the lists are the same


def test_best_texts_equal_loops(monkeypatch):
    monkeypatch.setattr("classlens.analysis.neurons.clip.NEURONS_AT_A_TIME", 3)
    rng = np.random.default_rng(2)
    embeddings, texts = rng.normal(size=(11, 6)), rng.normal(size=(5, 6)) * 10
    embeddings[4] = np.nan
    found, scores = best_texts(embeddings, texts)
    known = [i for i in range(11) if i != 4]
    for i in range(11):
        if i == 4:
            assert found[i] == -1
            assert np.isnan(scores[i])
            continue
        of_text = []
        for t in texts:
            cosines = {n: embeddings[n] @ t / np.sqrt(t @ t) for n in known}
            of_text.append(cosines[i] - sum(cosines.values()) / len(known))
        assert found[i] == int(np.argmax(of_text))
        assert scores[i] == pytest.approx(max(of_text), rel=1e-9)
    nothing, score = best_texts(np.full((2, 6), np.nan), texts)
    assert nothing.tolist() == [-1, -1]
    assert np.isnan(score).all()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("words")


@pytest.fixture(scope="module")
def store(folder):
    tar = write_tar(folder / "shard.tar", [sample(i) for i in range(IMAGES)])
    config = ExtractConfig(
        model=MODEL, model_args=ARGS, weights=WEIGHTS, batch_size=4, reduce=("neurons",)
    )
    extract(prepare(config, [str(tar)]), folder / "store")
    return folder / "store"


@pytest.fixture(scope="module")
def texts(folder):
    """Seven texts of the tower's width; three are names of the model's classes."""
    path = folder / "texts.safetensors"
    embeddings = torch.randn(7, 24, generator=torch.Generator().manual_seed(0))
    names = ["3", "dog", "lamp", "0", "7", "tree", "sea"]
    save_file({"embeddings": embeddings}, path, {"names": json.dumps(names)})
    return path


TOWER_ARGS = {"img_size": 40, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2,
              "num_classes": 24}  # fmt: skip


@pytest.fixture(scope="module")
def tower(texts):
    return open_tower(MODEL, "random:8", texts, model_args=TOWER_ARGS)


def test_masked_picture_shows_the_mask_and_the_mean(tower):
    pixels = np.random.default_rng(3).integers(0, 256, (32, 32, 3), np.uint8)
    mask = np.zeros((4, 4), bool)
    mask[0, 1], mask[3, 2] = True, True
    view = resized(pixels, tower.geometry)
    expected = np.asarray(Image.fromarray(pixels).resize((40, 40), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(view, expected)
    [nothing, seen] = masked(view, np.stack([~mask & mask, mask]), tower.geometry)
    mean = [round(255 * m) for m in tower.geometry.mean]
    for y in range(40):
        for x in range(40):
            inside = mask[int((y + 0.5) / 10), int((x + 0.5) / 10)]
            assert seen[y, x].tolist() == (expected[y, x].tolist() if inside else mean)
            assert nothing[y, x].tolist() == mean


def naive_embedding(tower, pixels):
    mean, std = torch.tensor(tower.geometry.mean), torch.tensor(tower.geometry.std)
    image = ((torch.tensor(pixels).float() / 255 - mean) / std).permute(2, 0, 1)[None]
    with torch.inference_mode():
        found = tower.scorer.model(image)[0].double().numpy()
    return found / np.sqrt(found @ found)


def test_embeddings_equal_a_loop_over_neurons(store, tower, monkeypatch):
    monkeypatch.setattr("classlens.analysis.neurons.clip.BATCH", 4)
    from classlens.extractor.prepare import prepare_again

    prepared = prepare_again(store)
    [pictures] = read_pictures(prepared, IMAGES)
    rng = np.random.default_rng(4)
    images = np.array([rng.permutation(IMAGES)[:6] for _ in range(9)])
    images[2, 3:], images[5] = -1, -1
    inside = rng.random((9, 6, 16)) < 0.4
    told = []
    found = exemplar_embeddings(
        tower, prepared, images, inside, progress=lambda done, total: told.append((done, total))
    )
    for n in range(9):
        parts = []
        for e, image in enumerate(images[n]):
            if image >= 0:
                view = resized(pictures.pixels[image].numpy(), tower.geometry)
                [seen] = masked(view, inside[n, e].reshape(1, 4, 4), tower.geometry)
                parts.append(naive_embedding(tower, seen))
        if n == 5:
            assert np.isnan(found[n]).all()
            continue
        # float32 forward passes of other batch sizes; the embeddings are of length 1.
        np.testing.assert_allclose(found[n], np.mean(parts, axis=0), rtol=0, atol=1e-5)
    assert told[-1] == (9 * 6 - 3 - 6,) * 2


def test_words_of_a_store_equal_their_parts(store, tower):
    from classlens.extractor.prepare import prepare_again

    found = words_of_store(store, tower=tower)
    assert found.height == BLOCKS * NEURONS
    prepared = prepare_again(store)
    label_of = {r["image"]: r["label"] for r in prepared.plan.manifest.to_dicts()}
    frequency = np.bincount(list(label_of.values()), minlength=10)
    cuts, _ = thresholds(store, 0.99)
    images, inside = [], []
    for block in range(BLOCKS):
        _, images_FX, codes_FXG = exemplar_codes(store, block)
        images.append(images_FX)
        inside.append(masks(codes_FXG, cuts[block]))
        labels = np.array([[label_of.get(i, -1) for i in row] for row in images_FX.tolist()])
        subject = prepared.subject
        expected = promoted_words(subject, block).join(
            exemplar_words(block, labels, frequency, subject.class_names), on=["block", "neuron"]
        )
        here = found.filter(pl.col("block") == block)
        assert here.select(expected.columns).equals(expected)
    embeddings = exemplar_embeddings(
        tower, prepared, np.concatenate(images), np.concatenate(inside)
    )
    texts, scores = best_texts(embeddings, tower.texts)
    assert found["clip_word"].to_list() == [tower.names[t] for t in texts]
    np.testing.assert_array_equal(found["clip_score"].to_numpy(), scores)
    named = {name: int(name) for name in tower.names if name.isdecimal()}
    assert found["clip_class"].to_list() == [named.get(tower.names[t]) for t in texts]
    one = words_of_store(store, [1])
    assert one["block"].unique().to_list() == [1]
    assert "clip_word" not in one.columns


def run(*arguments):
    return CliRunner().invoke(cli, ["neurons", "words", *arguments], catch_exceptions=False)


def test_command(store, tmp_path):
    out = tmp_path / "words.parquet"
    result = run(str(store), "--out", str(out), "--json")
    assert result.exit_code == 0, result.output
    expected = words_of_store(store)
    assert pl.read_parquet(out).equals(expected)
    saved = json.loads(result.stdout)
    assert saved["words"] == expected.to_dicts()
    assert saved["agreement"] == agreement(expected).to_dicts()
    shown = run(str(store), "--limit", "3").stdout
    share = 100 * agreement(expected)["agreement"][-1]
    assert f"all {share:.1f}" in " ".join(shown.split())


def test_command_with_a_tower_of_timm(store, folder):
    path = folder / "wide.safetensors"
    embeddings = torch.randn(5, 1000, generator=torch.Generator().manual_seed(1))
    save_file({"embeddings": embeddings}, path, {"names": json.dumps(["0", "1", "2", "3", "?"])})
    result = run(str(store), "--blocks", "1", "--clip-model", "test_vit", "--clip-weights",
                 "random:1", "--clip-classes", str(path), "--device", "cpu", "--json")  # fmt: skip
    assert result.exit_code == 0, result.output
    tower = open_tower("test_vit", "random:1", path)
    expected = words_of_store(store, [1], tower=tower)
    saved = json.loads(result.stdout)
    assert saved["words"] == expected.to_dicts()
    assert len(saved["agreement"]) == 2 * 3
    assert set(expected["clip_word"]) <= {"0", "1", "2", "3", "?"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--clip-model", "test_vit"], "give both or neither"),
        (["--blocks", "2"], "There is no block 2"),
        (["--blocks", "x"], "--blocks takes"),
    ],
)
def test_usage_errors(store, options, message):
    result = run(str(store), *options)
    assert result.exit_code == 2
    assert message in result.stderr
