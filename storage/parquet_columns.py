"""Which columns of a Parquet file hold images, their labels and their names, told by their types and names."""

import json
from typing import Any, NamedTuple

from storage.errors import InputError

IMAGE_NAMES = ("image", "img", "jpg", "jpeg", "png", "webp", "picture", "bytes", "image_bytes")
LABEL_NAMES = ("label", "labels", "fine_label", "class", "cls", "target", "category")
"""The first one that is there is taken."""


class ImageColumns(NamedTuple):
    """Paths of columns inside the file; empty for one that it has not."""

    image: str
    name: str
    label: str
    classes: tuple[str, ...]
    """Names of the labels, where the file tells them."""

    @property
    def leaves(self) -> tuple[str, str, str]:
        return self.image, self.name, self.label


def find_columns(place: str, metadata: Any, leaves: list[str]) -> ImageColumns:
    """What to read of a file.

    An image is a struct {bytes, path}, as Hugging Face's `datasets` writes it, or else a binary column with a usual
    name. A label is an integer or a text in a column with a usual name; `datasets` says in the footer what the integers
    are called.

    Raises:
        InputError: there is no such column, or more than one.
    """
    import pyarrow

    try:
        fields = list(metadata.schema.to_arrow_schema())
    except pyarrow.ArrowException as error:
        raise InputError(f"{place} has columns that cannot be read ({error}); expected a column of images") from error
    types = pyarrow.types
    structs = [field.name for field in fields if types.is_struct(field.type) and _has_bytes(field.type)]
    plain = [field.name for field in fields if field.name in IMAGE_NAMES and _is_binary(field.type)]
    found = structs or plain
    if len(found) > 1:
        found = [name for name in IMAGE_NAMES if name in found][:1]
    if not found:
        listed = ", ".join(f"{field.name}: {field.type}" for field in fields)
        raise InputError(
            f"{place} has no one column of images; expected a struct {{bytes, path}}, or a binary column called "
            f"{' or '.join(IMAGE_NAMES)}; found {listed:.300}"
        )
    image, name = (f"{found[0]}.bytes", f"{found[0]}.path") if structs else (found[0], "")
    features = _features(metadata.metadata)
    labels = {field.name for field in fields if types.is_integer(field.type) or _is_text(field.type)}
    label = next((name for name in LABEL_NAMES if name in labels), "")
    columns = ImageColumns(image, name if name in leaves else "", label, _class_names(features.get(label)))
    if any(leaf and leaves.count(leaf) != 1 for leaf in columns.leaves):
        raise InputError(f"{place} has several columns of one name among {', '.join(filter(None, columns.leaves))}")
    return columns


def _has_bytes(struct: Any) -> bool:
    return struct.get_field_index("bytes") >= 0 and _is_binary(struct.field("bytes").type)


def _is_binary(kind: Any) -> bool:
    import pyarrow

    return bool(pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind))


def _is_text(kind: Any) -> bool:
    import pyarrow

    kind = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
    return bool(pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind))


def _features(metadata: dict[bytes, bytes] | None) -> dict[str, Any]:
    """What `datasets` says of the columns; nothing where it does not, or not in a known way."""
    try:
        features = json.loads((metadata or {})[b"huggingface"])["info"]["features"]
    except (KeyError, ValueError, TypeError, RecursionError):
        return {}
    return features if isinstance(features, dict) else {}


def _class_names(feature: Any) -> tuple[str, ...]:
    names = feature.get("names") if isinstance(feature, dict) else None
    return tuple(names) if isinstance(names, list) and all(map(_is_name, names)) else ()


def _is_name(text: Any) -> bool:
    """Whether it is text that can be written; half a surrogate pair, which JSON can hold, is not."""
    return isinstance(text, str) and text.encode(errors="ignore").decode() == text
