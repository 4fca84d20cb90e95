"""EfficientNet-Lite0 recognises photographs of ImageNet as this project decodes, crops, resizes and normalises them."""

import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from extract.backends import load_teacher
from extract.teachers import find_teacher
from storage.decode import decode_image
from storage.views import CentreCrop, Renderer

_FOOLBOX = find_spec("foolbox")
PICTURES = sorted(Path(_FOOLBOX.origin).parent.glob("data/imagenet_*.jpg")) if _FOOLBOX and _FOOLBOX.origin else []
"""Twenty photographs, `imagenet_<number>_<class>.jpg`; the package itself is never imported."""


@pytest.mark.skipif(not PICTURES, reason="needs the pictures of foolbox: pip install --no-deps foolbox==3.3.4")
def test_its_classifier_behind_our_pixels_knows_at_least_17_of_20() -> None:
    spec = find_teacher("efficientnet-lite0")
    teacher = load_teacher(spec, device="cpu")
    module: Any = teacher.module
    sampler, renderer = CentreCrop(), Renderer(kernel="bicubic")  # its own evaluation: 18; with bilinear 17
    views, labels = [], []
    for path in PICTURES:
        image = decode_image(path.read_bytes())
        view = sampler.view(path.name, 0, image.shape[:2])
        views.append(renderer.render_view(image, view, spec.input_px))
        [label] = re.findall(r"_(\d+)\.jpg", path.name)
        labels.append(int(label))
    tokens_BTC = teacher(torch.from_numpy(np.stack(views)))
    assert tokens_BTC.shape == (20, 49, 320)
    with torch.inference_mode():
        maps_BCHW = tokens_BTC.transpose(1, 2).unflatten(2, (7, 7))
        logits = module.forward_head(module.bn2(module.conv_head(maps_BCHW)))
    correct = int((logits.argmax(1) == torch.tensor(labels)).sum())
    assert correct >= 17, f"{correct} of {len(labels)}"
