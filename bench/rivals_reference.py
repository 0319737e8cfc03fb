"""The authors' extractor as a process that is asked to run: the other side of `bench rivals`.

Runs as a script under an interpreter that has the authors' packages and not ours, so it imports
nothing of classlens. Their files stay as they are; two names of theirs are given other values
while it runs, because the originals download: ``create_model`` makes the model from the local
weights, and ``AutoImageProcessor`` gives transformers' own `ViTImageProcessor`, whose defaults
(bilinear to 224 × 224 without a crop, mean = std = 0.5) are those of the checkpoints they name.
"""

from __future__ import annotations

import importlib
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

Extract = Callable[[Path], object]


def serve(load: Callable[[dict[str, Any]], Extract], packages: tuple[str, ...]) -> None:
    """Loads once, then extracts into every folder named by a line of the standard input.

    The settings are the first argument, as JSON. The standard output carries one JSON object when
    all is loaded, the versions of Python and ``packages``, and one for each folder: ``seconds``, of
    the extraction alone. What anything else prints goes to the standard error.
    """
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def reply(value: dict[str, Any]) -> None:
        replies.write(json.dumps(value) + "\n")
        replies.flush()

    extract = load(json.loads(sys.argv[1]))
    reply({"python": platform.python_version(), **{name: version(name) for name in packages}})
    for line in sys.stdin:
        out = Path(line.rstrip("\n"))
        started_s = time.perf_counter()
        extract(out)
        reply({"seconds": time.perf_counter() - started_s})


def load_reference(settings: dict[str, Any]) -> Extract:
    """Their extractor with its model loaded.

    Args:
        settings: ``reference`` (their checkout), ``model`` (their name of it), ``weights`` (a state
            dict), ``dataset`` (the folder that holds ImageNetS919), ``scratch`` (an empty folder),
            ``pixels`` (where the images as their model sees them are written, float32
            [N, 3, H, W]), ``coefficients`` (whether it saves attention maps, keys, values and MLP
            keys beside the scores, as it does for a pretrained model), ``threads``.
    """
    sys.path[0] = settings["reference"]  # in the place of this file's folder
    sys.dont_write_bytecode = True

    import numpy as np
    import torch

    torch.set_num_threads(settings["threads"])
    redirect_downloads(settings["weights"])
    theirs = importlib.import_module("src.extractor")
    model, dataset = settings["model"], Path(settings["dataset"])
    extractor = theirs.ViTExtractor(model, Path(settings["scratch"]), dataset, "cpu")
    extractor.pretrained = settings["coefficients"]

    images = [item["img"] for item in theirs.ImagenetDatasetS(dataset)]
    pixels = extractor.img_transform(images, return_tensors="pt")["pixel_values"]
    np.save(settings["pixels"], pixels.numpy())

    def extract(out: Path) -> None:
        extractor.project_path = out
        extractor.hs_path = out / "results" / "class_embed" / model
        extractor.hs_path.mkdir(parents=True)
        extractor.extract_hidden_states()

    return extract


def redirect_downloads(weights: str) -> None:
    """Has their loader take weights and image processor from this machine."""
    import torch
    from transformers import ViTImageProcessor  # pyright: ignore[reportMissingImports]

    loader: Any = importlib.import_module("src.models.load")
    create_model = loader.create_model

    def create_local(name: str, pretrained: bool) -> torch.nn.Module:
        model = create_model(name, pretrained=False)
        model.load_state_dict(torch.load(weights, map_location="cpu"))
        return model

    loader.create_model = create_local
    loader.AutoImageProcessor = SimpleNamespace(from_pretrained=lambda source: ViTImageProcessor())


if __name__ == "__main__":
    serve(load_reference, ("torch", "timm", "transformers"))
