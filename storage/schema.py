"""Frozen, checked records that are equal to their JSON: configurations, manifests, results."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from storage.errors import ConfigError, DamagedError
from storage.fingerprint import digest_bytes


class Schema(BaseModel):
    """A frozen record. Unknown keys, NaN and infinity are refused; a field's docstring is its help text."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)

    not_identity: ClassVar[frozenset[str]] = frozenset()
    """Fields that say how or where to work and cannot change a result; left out of fingerprints."""

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """A copy with some fields changed; what was computed from the fields before is forgotten."""
        copy = super().model_copy(update=update, deep=deep)
        for name in vars(copy).keys() - type(self).model_fields.keys():
            del vars(copy)[name]
        return copy

    def identity(self) -> dict[str, Any]:
        """The JSON of everything that can change a result."""
        return self.model_dump(mode="json", exclude=set(self.not_identity))

    def to_json(self) -> dict[str, Any]:
        return self.model_dump(mode="json")

    @classmethod
    def from_file(cls, path: Path | str, text: bytes) -> Self:
        """Parse a file that this program wrote earlier.

        Raises:
            DamagedError: it is not what was written.
        """
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            raise DamagedError(f"{path} is not a valid {cls.__name__}: {first_problem(error)}") from error

    @classmethod
    def checked(cls, values: Any, where: str) -> Self:
        """Build from plain values given by a user.

        Raises:
            ConfigError: names the setting, the value and what was expected.
        """
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise ConfigError(f"{where}: {first_problem(error)}") from error


class Sealed(Schema):
    """A record whose file ends with a digest of all before it: JSON with a flipped bit often is valid JSON still."""

    remedy: ClassVar[str] = "run `make verify`, then `make extract`"
    """What to do about a damaged file."""

    def to_file(self, *, indent: int | None = 1) -> bytes:
        """The bytes of its file; long lists take no `indent`."""
        text = json.dumps(self.to_json(), indent=indent, sort_keys=True, allow_nan=False)
        body = text.removesuffix("}").rstrip().encode()
        return body + _seal(body)

    @classmethod
    def from_file(cls, path: Path | str, text: bytes) -> Self:
        """Parse a file that this program wrote earlier.

        Raises:
            DamagedError: a byte of it has changed.
        """
        json_text = unsealed(text)
        if json_text is None:
            raise DamagedError(f"{path} does not match its own digest: damaged, or changed by hand; {cls.remedy}")
        return super().from_file(path, json_text)


def unsealed(text: bytes) -> bytes | None:
    """The JSON of a sealed file, without its digest; None when that does not match."""
    body = text[: -len(_seal(b""))]
    return body + b"}" if text == body + _seal(body) else None


def _seal(body: bytes) -> bytes:
    return b',\n "digest": "' + digest_bytes(body).encode() + b'"\n}\n'


def first_problem(error: ValidationError) -> str:
    """One line for the first thing that pydantic did not like."""
    problem = error.errors(include_url=False)[0]
    field = ".".join(str(part) for part in problem["loc"])
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    found = "" if problem["type"] in ("missing", "extra_forbidden") else f", found {problem['input']!r:.80}"
    return f"{field or 'value'}: {problem['msg']}{found}{more}"
