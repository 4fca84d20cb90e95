"""The files of a store or a data set behind a URL: `s3://`, `gs://`, `http://` and `https://`, read through fsspec.

Every object is asked for by byte ranges, many at once; nothing is kept here. Endpoint and credentials come from where
their libraries look for them (environment, profiles, ~/.netrc). Retries are decided in one place, so those of the
libraries are off: an answer that may pass is asked for again a few times, with growing, jittered pauses.
"""

import os
import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar
from urllib.parse import urlsplit

from blake3 import blake3

from storage.answers import MissingObjectError, to_error, understand
from storage.connect import CONCURRENT, EXTRAS, connect
from storage.errors import ConfigError, InputError, unknown_name
from storage.files import Piece, ends_early
from storage.fingerprint import FINGERPRINT_CHARS

JOIN_GAP_BYTES = 64 * 2**10
"""Pieces that lie this near to each other come in one request: less than what a request costs."""
MAX_JOINED_BYTES = 8 * 2**20
"""Larger joined pieces would come through one connection instead of several."""
MAX_IN_FLIGHT_BYTES = 64 * 2**20
"""Memory that answers take before they are copied to their targets, one larger piece left aside."""
MAX_WHOLE_BYTES = 2**30
"""No file that is read whole comes near it: the list of 10 M images has 0.6 GB."""
DIGEST_BLOCK_BYTES = 8 * 2**20
LEAST_BYTES_PER_SECOND = 50_000
"""A slower answer counts as none."""

Result = TypeVar("Result")

_INHERITED: list[Any] = []
"""Connections of the parent of a forked process. Closing them here would take them from the parent's event loop."""


class Span(NamedTuple):
    """A part of an object; `start` is negative, and `end` is None, for its last bytes."""

    name: str
    start: int
    end: int | None


class RemoteFiles:
    """The files below a URL. Nothing is opened before the first use, and each process opens connections of its own."""

    def __init__(self, url: str, *, timeout_seconds: float = 30.0, attempts: int = 5) -> None:
        """
        Args:
            timeout_seconds: how long a server may say nothing.
            attempts: how often an answer that may pass is asked for.

        Raises:
            ConfigError: a URL that stores and data sets cannot have.
        """
        parts = urlsplit(url)
        self.scheme = parts.scheme.lower()
        if self.scheme not in EXTRAS:
            raise unknown_name("kind of URL", self.scheme, EXTRAS)
        self.location = f"{self.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}".rstrip("/")
        if not parts.netloc or parts.query or parts.fragment:
            raise ConfigError(
                f"{self.location} is no URL of a store or of data; expected {self.scheme}://<bucket or host>/<folder>"
            )
        self._url = f"{self.scheme}://{parts.netloc}{parts.path}".rstrip("/")
        self._secrets = (parts.password,) if parts.password else ()
        self.timeout_seconds, self.attempts = timeout_seconds, attempts
        self._held: tuple[int, Any] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"url": self._url, "timeout_seconds": self.timeout_seconds, "attempts": self.attempts}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def path(self, name: str) -> str:
        """What fsspec calls a file of the store."""
        return f"{self._url}/{name}" if name else self._url

    # ---- the protocol `Files` ----------------------------------------------------------------------------------------

    def read(self, name: str) -> bytes:
        """A whole small file.

        Raises:
            DamagedError: it is missing.
            InputError: the server refuses, or cannot be reached.
        """
        span = Span(name, 0, MAX_WHOLE_BYTES)
        data = self.fetch([span])[span]
        if len(data) == MAX_WHOLE_BYTES:
            raise InputError(f"{self.location}/{name} is larger than 1 GB, which no such file of a store is")
        return data

    def read_end(self, name: str, num_bytes: int) -> bytes:
        """The last bytes of a file; fewer when it is shorter."""
        span = Span(name, -num_bytes, None)
        return self.fetch([span])[span]

    def read_pieces(self, pieces: Iterable[Piece]) -> None:
        """Fill the targets of all pieces; those that lie near to each other come in one request.

        Raises:
            DamagedError: a file is missing or ends too early.
            InputError: the server refuses, or cannot be reached.
        """
        for joined in _in_groups(_joined([piece for piece in pieces if piece.num_bytes])):
            found = self.fetch([span for span, _ in joined])
            for span, members in joined:
                data = memoryview(found[span])
                for name, offset, targets, num_bytes in members:
                    part = data[offset - span.start : offset - span.start + num_bytes]
                    if len(part) != num_bytes:
                        raise ends_early(f"{self.location}/{name}", offset + num_bytes)
                    _fill(targets, part)

    def hint(self, spans: Sequence[tuple[str, int, int]]) -> None:
        """Nothing: object stores have no read-ahead."""

    def exists(self, name: str) -> bool:
        try:
            self.fetch([Span(name, 0, 1)])  # not a HEAD: its refusals say nothing of the reason
        except MissingObjectError:
            return False
        return True

    def size(self, name: str) -> int | None:
        """Bytes of a file; None when there is no such file."""
        info = self.info(name)
        return None if info is None else int(info["size"])

    def info(self, name: str) -> dict[str, Any] | None:
        """What the server says of a file, its `size` among that; None when there is no such file."""
        try:
            info: dict[str, Any] = self.ask(
                name, lambda system, seconds: system.info(self.path(name), timeout=seconds)
            )  # fmt: skip
        except MissingObjectError:
            return None
        if info["type"] != "file":
            return None
        if info["size"] is None:
            raise InputError(f"{self.location}/{name}: the server does not say how long it is; use another server")
        return info

    def digest(self, name: str) -> str:
        """Content hash of a file of any size, read in blocks.

        Raises:
            DamagedError: it is missing, or became shorter meanwhile.
        """
        size = self.size(name)
        if size is None:
            self.fetch([Span(name, 0, 1)])
        hasher, total = blake3(max_threads=blake3.AUTO), size or 0
        for first in range(0, total, MAX_IN_FLIGHT_BYTES // 2):
            starts = range(first, min(first + MAX_IN_FLIGHT_BYTES // 2, total), DIGEST_BLOCK_BYTES)
            spans = [Span(name, start, min(start + DIGEST_BLOCK_BYTES, total)) for start in starts]
            blocks = self.fetch(spans)
            for span in spans:
                if len(blocks[span]) != (span.end or 0) - span.start:
                    raise ends_early(f"{self.location}/{name}", total)
                hasher.update(blocks[span])
        return hasher.hexdigest()[:FINGERPRINT_CHARS]

    def names(self, folder: str) -> list[str]:
        """Sorted names of the files in a folder of the store; none when there is no such folder.

        Raises:
            InputError: the server has no listings.
        """
        if EXTRAS[self.scheme] == "http":
            raise InputError(
                f"{self.location}: folders cannot be listed over {self.scheme}, so only finished stores can be read "
                "(those with a manifest.json); finish the store first, or read it from its disk or bucket"
            )
        try:
            found = self.ask(folder, lambda system, seconds: system.ls(self.path(folder), detail=True, timeout=seconds))
        except MissingObjectError:
            return []
        return sorted(entry["name"].rsplit("/", 1)[-1] for entry in found if entry["type"] == "file")

    # ---- asking ------------------------------------------------------------------------------------------------------

    def ask(self, name: str, question: Callable[[Any, float], Result], num_bytes: int = 0) -> Result:
        """Ask the file system about an object, again where the answer may pass.

        Args:
            question: called with the file system and the seconds that the whole answer may take.
            num_bytes: that go over the wire.
        """
        system = self._system()
        deadline_seconds = 4 * self.timeout_seconds + num_bytes / LEAST_BYTES_PER_SECOND
        for attempt in range(1, self.attempts + 1):
            try:
                return question(system, deadline_seconds)
            except Exception as error:
                found = error.__cause__ if isinstance(error, _FailedError) and error.__cause__ else error
                where = error.args[0] if isinstance(error, _FailedError) else name
                if attempt == self.attempts or understand(found).meaning != "again":
                    raise to_error(
                        found, f"{self.location}/{where}", self.scheme, attempt, self._secrets
                    ) from self._printable(found)
                time.sleep(2**attempt * random.uniform(0.05, 0.15))  # 0.1 s, 0.2 s, ...
        raise AssertionError("unreachable")

    def _printable(self, error: BaseException) -> BaseException | None:
        """The cause to keep for a traceback; none where it could hold a password."""
        return None if self._secrets else error

    def fetch(self, spans: Sequence[Span]) -> dict[Span, bytes]:
        """The bytes of spans, fewer where an object ends. Only what failed is asked for again."""
        found: dict[Span, bytes] = {}

        def fetch_rest(system: Any, seconds: float) -> None:
            rest = [span for span in dict.fromkeys(spans) if span not in found]
            names, starts, ends = zip(*rest, strict=True)
            answers = system.cat_ranges(
                [self.path(name) for name in names], list(starts), list(ends), on_error="return",
                batch_size=CONCURRENT, timeout=seconds,
            )  # fmt: skip
            failed: dict[Span, BaseException] = {}
            for span, answer in zip(rest, answers, strict=True):
                if not isinstance(answer, BaseException):
                    found[span] = bytes(answer)
                elif understand(answer).meaning == "past the end":
                    found[span] = b""
                else:
                    failed[span] = answer
            if failed:  # what cannot pass is told first
                span = min(failed, key=lambda span: understand(failed[span]).meaning == "again")
                raise _FailedError(span.name) from failed[span]

        expected = sum(span.end - span.start for span in spans if span.end is not None)
        self.ask(spans[0].name, fetch_rest, min(expected, MAX_WHOLE_BYTES))
        return found

    def _system(self) -> Any:
        """This process's file system."""
        held = self._held
        if held is None or held[0] != os.getpid():
            if held is not None:
                _INHERITED.append(held)
            held = self._held = os.getpid(), connect(self.scheme, self.location, self.timeout_seconds)
        return held[1]


class _FailedError(Exception):
    """One of many requests failed, about the object that is named; the cause says how."""


def _joined(pieces: Sequence[Piece]) -> Iterator[tuple[Span, list[Piece]]]:
    """Spans that cover all pieces, and the pieces in each."""
    span, members = None, list[Piece]()
    for piece in sorted(pieces, key=lambda piece: (piece.name, piece.offset)):
        end = piece.offset + piece.num_bytes
        if span is not None and span.end is not None and span.name == piece.name:
            reach = max(span.end, end)
            if piece.offset - span.end <= JOIN_GAP_BYTES and reach - span.start <= MAX_JOINED_BYTES:
                span = span._replace(end=reach)
                members.append(piece)
                continue
        if span is not None:
            yield span, members
        span, members = Span(piece.name, piece.offset, end), [piece]
    if span is not None:
        yield span, members


def _in_groups(joined: Iterator[tuple[Span, list[Piece]]]) -> Iterator[list[tuple[Span, list[Piece]]]]:
    """Spans to ask for at a time."""
    group, num_bytes = list[tuple[Span, list[Piece]]](), 0
    for span, members in joined:
        length = (span.end or 0) - span.start
        if group and num_bytes + length > MAX_IN_FLIGHT_BYTES:
            yield group
            group, num_bytes = [], 0
        group.append((span, members))
        num_bytes += length
    if group:
        yield group


def _fill(targets: Sequence[Any], data: memoryview) -> None:
    """Copy bytes into buffers, one after the other."""
    for target in targets:
        place = memoryview(target).cast("B")
        place[:] = data[: len(place)]
        data = data[len(place) :]
