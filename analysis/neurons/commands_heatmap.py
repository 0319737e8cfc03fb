"""``neurons heatmap``. Heavy modules are imported when it runs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from classlens.analysis.neurons.options import chosen_subject, parse_neuron, subject_options
from classlens.extractor.console import status as spinner
from classlens.extractor.errors import UsageError

if TYPE_CHECKING:
    import numpy as np

    from classlens.extractor.models import Subject


@click.command()
@subject_options
@click.option("--image", required=True, metavar="FILE|KEY",
              help="A picture, or the key of an image of STORE.")  # fmt: skip
@click.option("--class", "class_name", metavar="NAME|INDEX",
              help="Its top key neurons in every block  [default: the label of KEY]")  # fmt: skip
@click.option("--neuron", metavar="BLOCK:J", help="This neuron instead.")
@click.option("--top", default=5, show_default=True, type=click.IntRange(1),
              help="Neurons of the class in each block.")  # fmt: skip
@click.option("--out", required=True, type=click.Path(path_type=Path, dir_okay=False),
              help="The figure, a .png file.")  # fmt: skip
@click.option("--arrays", type=click.Path(path_type=Path, dir_okay=False),
              help="Also write pixels, blocks, neurons, activation, heat, mask, mean_heat and "
              "mean_mask: a .npz file.")  # fmt: skip
def heatmap(
    image: str,
    class_name: str | None,
    neuron: str | None,
    top: int,
    out: Path,
    arrays: Path | None,
    **source: Any,
) -> None:
    """Where key neurons are active on one image, block by block.

    Activations at the patches, before the activation function, laid over what the model sees of the
    picture. A row a block: the picture, the heat-map of the class's top neuron there, where it is
    above its 80th percentile, the mean of the top neurons of the blocks so far, where that is above
    its 80th percentile; then the further neurons.

    \b
    classlens neurons heatmap vit_base_patch16_224 --image tench.jpg --class tench --out heat.png
    classlens neurons heatmap STORE --image KEY --out heat.png --arrays heat.npz
    classlens neurons heatmap STORE --image KEY --neuron 10:56 --out neuron.png
    """
    from classlens.analysis.neurons.heatmap import heat_maps
    from classlens.analysis.neurons.heatmap_figure import draw

    for path, suffix in ((out, ".png"), (arrays, ".npz")):
        if path is not None and path.suffix != suffix:
            raise UsageError(f"{path} has no known form; give a {suffix} file.")
    if class_name is not None and neuron is not None:
        raise UsageError("--class and --neuron each choose what to draw; give one of them.")
    with spinner("Reading the weights and the picture"):
        subject = chosen_subject(**source)
        pixels, label = _pixels(source["source"], image, subject)
    if neuron is not None:
        block, j = parse_neuron(neuron, subject)
        blocks, chosen, captions = [block], [[j]], [[neuron]]
        title = f"Neuron {neuron} on {Path(image).name}"
    else:
        c = _class(subject, class_name, label)
        with spinner("Aligning"):
            chosen, captions = _of_class(subject, c, top)
        blocks = list(range(subject.blocks))
        title = f"Top key neurons of class {subject.class_names[c]} on {Path(image).name}"
    with spinner("Drawing"):
        maps = heat_maps(subject, pixels, blocks, _integers(chosen))
        draw(maps, title, captions).save(out)
        click.echo(f"written to {out}")
        if arrays is not None:
            maps.save(arrays)
            click.echo(f"written to {arrays}")


def _pixels(source: str, image: str, subject: Subject) -> tuple[np.ndarray, int | None]:
    """What the model sees of a picture, uint8 [H, W, 3], and its label in the store."""
    import numpy as np
    import polars as pl
    from PIL import Image

    from classlens.analysis.report.pictures import read_pixels
    from classlens.analysis.scan import scan_images

    if Path(source).is_dir() and not Path(image).is_file():
        found = scan_images(source).filter(pl.col("key") == image).collect()
        if found.is_empty():
            raise UsageError(
                f"{source} has no image {image!r}, nor is there such a file; `classlens query "
                f"{source} 'SELECT key FROM images'` lists its keys."
            )
        row = found.row(0, named=True)
        return read_pixels(subject.geometry.to_json(), row), row["label"]
    try:
        with Image.open(image) as file:
            picture = file.convert("RGB")
    except OSError as error:
        raise UsageError(f"--image {image} is no readable picture ({error}).") from error
    return np.asarray(subject.geometry.crop(picture)), None


def _class(subject: Subject, name: str | None, label: int | None) -> int:
    from classlens.analysis.neurons.subject import find_class

    if name is not None:
        return find_class(subject.class_names, name)
    if label is None or not 0 <= label < len(subject.class_names):
        raise UsageError("The image has no label here; add --class NAME or --neuron BLOCK:J.")
    return label


def _of_class(subject: Subject, c: int, top: int) -> tuple[list[list[int]], list[list[str]]]:
    """The top neurons of a class in every block, and what stands below their heat-maps."""
    from classlens.analysis.neurons.alignment import top_neurons

    tops = top_neurons(subject, top)
    neurons = tops.neurons[:, c].tolist()
    captions = [
        [f"{block}:{j}  E·v {value:+.3f}" for j, value in zip(of_block, values, strict=True)]
        for block, (of_block, values) in enumerate(zip(neurons, tops.alignment[:, c], strict=True))
    ]
    return neurons, captions


def _integers(neurons: list[list[int]]) -> np.ndarray:
    import numpy as np

    return np.array(neurons)
