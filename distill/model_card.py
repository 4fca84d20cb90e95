"""The README.md of an exported student: what it is, what it learnt from, how to load it."""

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from distill.student import IMAGENET_MEAN, IMAGENET_STD
from distill.token_layout import TokenLayout


class Origin(NamedTuple):
    """What is known of a student beside its own file."""

    teacher: str = ""
    licence: str = ""
    """Of the teacher's weights."""
    made_with: str = ""
    """Versions of this program and of libraries."""


class Card(NamedTuple):
    """What a card tells."""

    name: str
    architecture: str
    arguments: dict[str, Any]
    """Of `timm.create_model`, beside the architecture and `num_classes=0`."""
    input_px: int
    layout: TokenLayout
    num_parameters: int
    facts: Mapping[str, str]
    """From the student's file."""
    origin: Origin
    has_timm: bool
    onnx_opset: int | None
    """None where there is no ONNX graph."""

    def to_markdown(self) -> str:
        """With the front matter that Hugging Face's hub reads."""
        sections = [_FRONT, f"# {self.name}\n", _INTRODUCTION, _table(self._rows())]
        values = {
            "architecture": self.architecture, "arguments": _call(self.arguments), "px": self.input_px,
            "tokens": self.num_tokens, "channels": self.layout.width, "opset": self.onnx_opset,
        }  # fmt: skip
        if self.has_timm:
            sections.append(_WITH_TIMM.format_map(values))
        if self.onnx_opset is not None:
            sections.append(_WITH_ONNX.format_map(values))
        return "\n".join([*sections, _LICENCE])

    @property
    def num_tokens(self) -> int:
        height, width = self.layout.grid_hw
        return self.layout.num_prefix_tokens + height * width

    def _rows(self) -> dict[str, str]:
        not_known = "not recorded"
        mean, std = (", ".join(f"{value:g}" for value in values) for values in (IMAGENET_MEAN, IMAGENET_STD))
        rows = {
            "network": f"timm's {self.architecture} with {_call(self.arguments)}",
            "parameters": f"{self.num_parameters / 1e6:,.1f} M",
            "input": f"{self.input_px} x {self.input_px} px, mean {mean}, std {std}",
            "output": f"{self.num_tokens} tokens of {self.layout.width} channels: {_parts(self.layout)}",
            "teacher": self.origin.teacher or not_known,
            "licence of the teacher's weights": self.origin.licence or not_known,
        }
        rows |= {_LABELS.get(key, key.replace("_", " ")): text for key, text in sorted(self.facts.items())}
        return rows | ({"made with": self.origin.made_with} if self.origin.made_with else {})


_FRONT = """---
library_name: timm
pipeline_tag: image-feature-extraction
tags:
- timm
- feature-distillation
- image-feature-extraction
---
"""
_INTRODUCTION = """A vision backbone without a head, made by feature distillation (Wei et al. 2022, arXiv 2205.14141):
it was trained to predict the whitened last feature map of a frozen teacher. The linear layer that maps its tokens to
the teacher's width is not part of it. It is meant to be fine-tuned.
"""
_WITH_TIMM = """## With timm

From a folder of this machine, or from the hub as `hf-hub:USER/NAME`:

```python
import timm
student = timm.create_model("local-dir:FOLDER", pretrained=True).eval()
features = student.forward_features(images)  # the {tokens} tokens of {channels} channels, in the network's own order
```

For a classifier of 10 classes to be fine-tuned add `num_classes=10, global_pool="avg"`. By its name and the file of
weights the student is

```python
student = timm.create_model(
    "{architecture}", checkpoint_path="FOLDER/model.safetensors", num_classes=0,
    {arguments},
).eval()
```

`transformers.AutoModel.from_pretrained("FOLDER", do_pooling=False)` reads the folder, too, where timm is installed.
"""
_WITH_ONNX = """## With ONNX

`model.onnx` (opset {opset}) takes `images` (B, 3, {px}, {px}) float32, normalised as above, for any B, and gives
`tokens` (B, {tokens}, {channels}).

```python
import onnxruntime
tokens = onnxruntime.InferenceSession("model.onnx").run(["tokens"], {{"images": images}})[0]
```
"""
_LICENCE = """## Licence

A student learns from its teacher's outputs. Whether the licence of the teacher's weights covers it, and that of the
images that it was trained on, is for whoever publishes it to find out.
"""
_LABELS = {"store": "store that it learnt from (fingerprint)"}


def _parts(layout: TokenLayout) -> str:
    registers = layout.num_prefix_tokens - layout.has_cls
    prefix = [*(["CLS"] if layout.has_cls else []), *([f"{registers} registers"] if registers else [])]
    height, width = layout.grid_hw
    return ", then ".join([*prefix, f"a grid of {height} x {width}"])


def _call(arguments: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in arguments.items())


def _table(rows: Mapping[str, str]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {label} | {_plain(text)} |" for label, text in rows.items()), ""])


def _plain(text: str) -> str:
    """JSON as words; nothing in it can end a cell of the table."""
    try:
        value = json.loads(text)
    except ValueError:
        value = text
    words = ", ".join(f"{name} {part}" for name, part in value.items()) if isinstance(value, dict) else text
    return words.replace("|", "/").replace("\n", " ")
