"""A file behind a plain URL: the whole file or none, or an error within seconds where there is no network."""

import contextlib
import hashlib
import os
import re
import threading
from collections.abc import Callable
from concurrent.futures import Future
from http.client import HTTPResponse
from pathlib import Path
from typing import TypeVar
from urllib.parse import urlsplit
from urllib.request import Request, build_opener

from storage.atomic import disk_errors, make_folder, private_name, publish

FIRST_CONTACT_SECONDS = 10.0
"""For a name server and a machine to answer at all; afterwards a download may take what it takes."""
_SILENCE_SECONDS = 30.0
"""Without a byte, in a download."""
_CHUNK_BYTES = 2**20

Answer = TypeVar("Answer")


def download_file(url: str, folder: Path) -> Path:
    """The file behind a URL: out of a folder, or downloaded into it.

    Files are kept under their URL's digest and name, so that none is taken for another one of the same name.

    Raises:
        OSError: no network, no such file, a lost connection, or other bytes than the URL says.
        DiskError: it cannot be written.
    """
    target = folder / f"{hashlib.sha256(url.encode()).hexdigest()[:12]}-{Path(urlsplit(url).path).name}"
    if target.is_file():
        return target
    request = Request(url, headers={"User-Agent": "decant"})
    with first_contact(lambda: build_opener().open(request, timeout=_SILENCE_SECONDS)) as answer:
        make_folder(folder)
        private = private_name(target)
        try:
            _receive(answer, private, sha256_in(url))
            publish(private, target)
        finally:
            private.unlink(missing_ok=True)
    return target


def _receive(answer: HTTPResponse, private: Path, sha256: str) -> None:
    """Raises OSError: other bytes than were announced. A connection that is lost looks like the end of a file."""
    announced, num_bytes, digest = answer.headers["Content-Length"], 0, hashlib.sha256()
    with contextlib.ExitStack() as stack:
        with disk_errors(private):
            file = stack.enter_context(private.open("wb"))
        while chunk := answer.read(_CHUNK_BYTES):
            num_bytes += len(chunk)
            digest.update(chunk)
            with disk_errors(private, int(announced or 0)):
                file.write(chunk)
        with disk_errors(private):
            file.flush()
            os.fsync(file.fileno())
    if announced is not None and num_bytes != int(announced):
        raise OSError(f"the connection was lost after {num_bytes} of {announced} bytes")
    if not digest.hexdigest().startswith(sha256):
        raise OSError(f"its {num_bytes} bytes have the sha256 {digest.hexdigest()}, expected {sha256} as in its name")


def sha256_in(url: str) -> str:
    """The file's sha256, or the first digits of it, where the URL has them; empty where not.

    torch's custom is a name that ends with `-<8 digits or more>`, OpenAI's a folder of 64 digits. Digits only are a
    date.
    """
    *folders, name = urlsplit(url).path.split("/")
    found = re.search(r"-([0-9a-f]{8,64})\.\w+$", name)
    if found and not found[1].isdecimal():
        return found[1]
    return next((folder for folder in folders if re.fullmatch(r"[0-9a-f]{64}", folder)), "")


def first_contact(ask: Callable[[], Answer]) -> Answer:
    """What `ask` returns, or its error, or TimeoutError: a name server's silence has no other limit."""
    answer: Future[Answer] = Future()

    def work() -> None:
        try:
            answer.set_result(ask())
        except BaseException as error:
            answer.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    try:
        return answer.result(timeout=FIRST_CONTACT_SECONDS)
    except TimeoutError as error:
        raise TimeoutError(f"no answer within {FIRST_CONTACT_SECONDS:.0f} s") from error
