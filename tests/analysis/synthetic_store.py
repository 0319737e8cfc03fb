"""Small stores with random scores, written straight from the schema, and the frame they hold."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
import zarr
from zarr.codecs import BloscCodec, Crc32cCodec

from classlens.extractor import schema


@dataclass(frozen=True)
class Store:
    """A store on disk and its content: arrays by path, and the keys of planned images."""

    path: Path
    layout: schema.Layout
    arrays: dict[str, np.ndarray]
    keys: dict[int, str]
    committed: tuple[int, ...]


def make_layout(
    *,
    images_per_unit: list[int],
    blocks: int = 3,
    streams: tuple[str, ...] = ("resid", "attn", "mlp"),
    prefix_kinds: tuple[str, ...] = ("cls",),
    grid: tuple[int, int] = (2, 3),
    classes: int = 10,
    topk: int = 1,
    masks: bool = True,
    heads: int = 0,
    reducers: tuple[str, ...] = (),
    per_head: bool = False,
    tokens_removed: bool = False,
) -> schema.Layout:
    """A layout whose units are as long as the longest of ``images_per_unit``."""
    unit_images = max(images_per_unit)
    return schema.Layout(
        images=unit_images * len(images_per_unit),
        unit_images=unit_images,
        blocks=blocks,
        streams=streams,
        prefix_kinds=prefix_kinds,
        grid=grid,
        classes=classes,
        topk=topk,
        masks=masks,
        heads=heads,
        reducers=reducers,
        per_head=per_head,
        tokens_removed=tokens_removed,
    )


def random_arrays(
    layout: schema.Layout, images_per_unit: list[int], bad: dict[int, schema.Status], seed: int
) -> dict[str, np.ndarray]:
    """Random content of every array; fill values where there is no image or a bad one."""
    rng = np.random.default_rng(seed)
    position = np.arange(layout.images)
    planned = position % layout.unit_images < np.repeat(images_per_unit, layout.unit_images)
    status = np.where(planned, schema.Status.OK, schema.Status.ABSENT).astype(np.uint8)
    for image, value in bad.items():
        status[image] = value
    ok = status == schema.Status.OK
    arrays = {}
    for spec in schema.all_arrays(layout):
        shape = spec.shape(layout)
        dtype = np.dtype(spec.dtype)
        if spec.path == "images/status":
            values = status
        elif spec.path == "images/mask_fraction":
            values = rng.choice([0, 0, 51, 128, 255], shape).astype(dtype)
        elif spec.path == "memories/flags":
            values = rng.integers(0, 32, shape).astype(dtype)
        elif spec.path.startswith("attribution/"):
            values = rng.normal(0, 40, shape).astype(dtype)
        elif dtype.kind == "f":
            values = rng.normal(-2, 3, shape).astype(dtype)
            if not layout.tokens_removed:
                values[rng.random(shape) < 0.05] = np.nan
        elif spec.path == "scores/rank":
            scale = layout.classes * rng.random((1, *shape[1:3], 1)) + 0.3
            values = np.minimum(rng.exponential(scale, shape), layout.classes - 1).astype(dtype)
        else:
            values = rng.integers(0, layout.classes, shape).astype(dtype)
        if layout.tokens_removed and "token" in spec.axes:
            there = tokens_left(arrays["images/mask_fraction"], layout)
            values = np.where(there[:, None, None], values, np.array(spec.fill, dtype))
        values[~ok] = spec.fill if spec.path != "images/status" else status[~ok]
        arrays[spec.path] = values
    return arrays


def tokens_left(mask_fraction: np.ndarray, layout: schema.Layout) -> np.ndarray:
    """Tokens [N, T] of a store from which context was removed."""
    prefix = np.ones((len(mask_fraction), layout.prefix), bool)
    return np.concatenate([prefix, mask_fraction >= 128], axis=1)


def write_store(
    path: Path,
    layout: schema.Layout,
    images_per_unit: list[int],
    *,
    bad: dict[int, schema.Status] | None = None,
    uncommitted: tuple[int, ...] = (),
    seed: int = 0,
    content: dict[str, np.ndarray] | None = None,
) -> Store:
    """Write a store; units in ``uncommitted`` get data but no ledger file.

    content: whole arrays by path that take the place of random ones.
    """
    bad = bad or {}
    arrays = random_arrays(layout, images_per_unit, bad, seed) | (content or {})
    root = zarr.create_group(path, attributes={"classlens": attributes(layout)})
    for spec in schema.all_arrays(layout):
        shuffle = "shuffle" if spec.dtype == "float16" else "bitshuffle"
        array = root.create_array(
            spec.path,
            shape=spec.shape(layout),
            dtype=spec.dtype,
            shards=spec.shard(layout),
            chunks=spec.chunk(layout),
            compressors=[BloscCodec(cname="zstd", clevel=1, shuffle=shuffle), Crc32cCodec()],
            fill_value=spec.fill,
            config={"write_empty_chunks": True},
        )
        for unit in range(layout.units):
            rows = slice(unit * layout.unit_images, (unit + 1) * layout.unit_images)
            array[rows] = arrays[spec.path][rows]
    (path / schema.LEDGER_DIR).mkdir()
    committed = tuple(u for u in range(layout.units) if u not in uncommitted)
    for unit in committed:
        (path / schema.ledger_file(unit)).write_text(json.dumps({"unit": unit}))
    images = [
        unit * layout.unit_images + place
        for unit, count in enumerate(images_per_unit)
        for place in range(count)
    ]
    keys = {image: f"val_{image * 7919 % 100_000:05d}" for image in images}
    write_tables(path, layout, arrays, keys, images_per_unit)
    return Store(path, layout, arrays, keys, committed)


def attributes(layout: schema.Layout) -> dict:
    """The attributes a real store carries."""
    return {
        "format": schema.FORMAT_VERSION,
        "layout": layout.to_json(),
        "config": {},
        "fingerprint": {},
        "versions": {},
        "device": "cpu",
    }


def write_tables(
    path: Path,
    layout: schema.Layout,
    arrays: dict[str, np.ndarray],
    keys: dict[int, str],
    images_per_unit: list[int],
) -> None:
    """The manifest, the units table and the classes table."""
    images = list(keys)
    label = [int(arrays["images/label"][i]) for i in images]
    pl.DataFrame(
        {
            "image": images,
            "key": list(keys.values()),
            "unit": [i // layout.unit_images for i in images],
            "offset": [512 * (i + 1) for i in images],
            "size": [100 + i for i in images],
            "label": [None if value < 0 else value for value in label],
            "mask_id": [None] * len(images),
        },
        schema={
            "image": pl.Int64,
            "key": pl.String,
            "unit": pl.Int32,
            "offset": pl.Int64,
            "size": pl.Int64,
            "label": pl.Int32,
            "mask_id": pl.Int32,
        },
    ).write_parquet(path / schema.MANIFEST_FILE)
    units = len(images_per_unit)
    pl.DataFrame(
        {
            "unit": range(units),
            "shard": [f"/data/{unit:06d}.tar" for unit in range(units)],
            "start": [0] * units,
            "stop": [10_000] * units,
            "images": images_per_unit,
            "masks": [layout.masks] * units,
        },
        schema={
            "unit": pl.Int32,
            "shard": pl.String,
            "start": pl.Int64,
            "stop": pl.Int64,
            "images": pl.Int32,
            "masks": pl.Boolean,
        },
    ).write_parquet(path / schema.UNITS_FILE)
    pl.DataFrame(
        {"class": range(layout.classes), "name": [f"class {c}" for c in range(layout.classes)]},
        schema={"class": pl.Int32, "name": pl.String},
    ).write_parquet(path / schema.CLASSES_FILE)


def expected_frame(store: Store) -> pl.DataFrame:
    """Every row of ``scan``, in its order, built by plain indexing from the arrays."""
    layout = store.layout
    score = {p.split("/")[1]: a for p, a in store.arrays.items() if p.startswith("scores/")}
    columns = layout.grid[1]
    fill = np.iinfo(score["rank"].dtype).max
    rows = []
    for unit in store.committed:
        first = unit * layout.unit_images
        images = [
            i
            for i in range(first, first + layout.unit_images)
            if store.arrays["images/status"][i] == schema.Status.OK
        ]
        for block in range(layout.blocks):
            for s, stream in enumerate(layout.streams):
                for image in images:
                    for token in range(layout.tokens):
                        patch = token - layout.prefix
                        is_patch = patch >= 0
                        place = (image, block, s, token)
                        rank = int(score["rank"][place])
                        is_removed = layout.tokens_removed and rank == fill
                        fraction = None
                        if is_patch and layout.masks:
                            covered = store.arrays["images/mask_fraction"][image, patch]
                            fraction = np.float32(covered) / np.float32(255)
                        rows.append(
                            (
                                image,
                                store.keys[image],
                                int(store.arrays["images/label"][image]),
                                int(store.arrays["images/prediction"][image]),
                                block,
                                stream,
                                token,
                                "patch" if is_patch else layout.prefix_kinds[token],
                                patch // columns if is_patch else None,
                                patch % columns if is_patch else None,
                                fraction,
                                *(
                                    [None] * (4 + layout.topk)
                                    if is_removed
                                    else [
                                        rank,
                                        1 - rank / layout.classes,
                                        float(score["label_logit"][place]),
                                        float(score["label_logprob"][place]),
                                        *(
                                            int(score[f"top{k + 1}"][place])
                                            for k in range(layout.topk)
                                        ),
                                    ]
                                ),
                            )
                        )
    return pl.DataFrame(rows, schema=expected_schema(layout), orient="row")


def expected_schema(layout: schema.Layout) -> dict[str, pl.DataType]:
    """Names and types of ``scan``'s columns."""
    return {
        "image": pl.Int32(),
        "key": pl.String(),
        "label": pl.Int32(),
        "prediction": pl.Int32(),
        "block": pl.Int16(),
        "stream": pl.Enum(layout.streams),
        "token": pl.Int16(),
        "kind": pl.Enum(schema.TOKEN_KINDS),
        "row": pl.Int16(),
        "col": pl.Int16(),
        "mask_fraction": pl.Float32(),
        "rank": pl.Int32(),
        "identifiability": pl.Float64(),
        "label_logit": pl.Float32(),
        "label_logprob": pl.Float32(),
        **{f"top{k + 1}": pl.Int32() for k in range(layout.topk)},
    }
