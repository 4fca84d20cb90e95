"""Parts of a file as a file, for libraries that seek in one."""

import io
from collections.abc import Mapping


class FileParts(io.RawIOBase):
    """A file of which only some parts are at hand; all others read as its end."""

    def __init__(self, num_bytes: int, parts: Mapping[int, bytes]) -> None:
        """`num_bytes`: of the whole file. `parts`: by their offset."""
        self._num_bytes, self._parts, self._place = num_bytes, parts, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._place

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._place = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._num_bytes}[whence]
        return self._place

    def read(self, size: int = -1) -> bytes:
        for start, data in self._parts.items():
            inside = self._place - start
            if 0 <= inside < len(data):
                end = len(data) if size < 0 else inside + size
                self._place += min(end, len(data)) - inside
                return data[inside:end]
        return b""
