"""Connections to what is behind a URL: one fsspec file system, with its settings, for each kind.

Nothing is shared with other users of fsspec in the process, and no listing is kept. The libraries' own retries are off
where they can be: they would multiply with ours.
"""

from collections.abc import Callable
from typing import Any

from storage.errors import ConfigError, InputError

EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs", "http": "http", "https": "http"}
"""URL schemes, and the extra of this package that installs what they need."""
CONCURRENT = 32
"""Requests at a time; object stores answer each in 10 to 100 ms whatever its size."""


def connect(scheme: str, location: str, timeout_seconds: float) -> Any:
    """A file system that shares nothing with others.

    Raises:
        ConfigError: the package for it is not installed.
    """
    try:
        import fsspec

        kind = fsspec.get_filesystem_class(scheme)
        if EXTRAS[scheme] == "gcs":
            from gcsfs.core import GCSFileSystem

            kind = GCSFileSystem  # the package's newer default asks over gRPC first, which may take a minute
        options = _OPTIONS[EXTRAS[scheme]](location, timeout_seconds)
    except ImportError as error:
        extra = EXTRAS[scheme]
        raise ConfigError(
            f"reading {location} takes more packages ({error}): pip install 'decant-fd[{extra}]'"
        ) from error
    system = kind(**options, use_listings_cache=False, skip_instance_cache=True)
    if EXTRAS[scheme] == "s3":
        system.retries = 1  # how often s3fs asks; see `RemoteFiles.ask`
    return system


def _s3_options(location: str, timeout_seconds: float) -> dict[str, Any]:
    settings = {"connect_timeout": timeout_seconds, "read_timeout": timeout_seconds, "max_pool_connections": CONCURRENT}
    return {"config_kwargs": settings | {"retries": {"total_max_attempts": 1}}}


def _gcs_options(location: str, timeout_seconds: float) -> dict[str, Any]:
    return {"requests_timeout": _silence(timeout_seconds)}


def _http_options(location: str, timeout_seconds: float) -> dict[str, Any]:
    async def refuse_more_than_asked(response: Any) -> None:
        """A server that knows no ranges answers with the whole object, which may be any number of gigabytes."""
        start, end = _asked(response.request_info.headers.get("Range"))
        if start is None or response.status not in (200, 206):
            return
        wanted = -start if end is None else end - start
        length = response.content_length
        if length is None or length > wanted or (response.status == 200 and start > 0):
            response.close()
            raise InputError(
                f"{location}: asked for {wanted:,} bytes of {response.url.name}, the server sends "
                f"{length if length is None else f'{length:,}'}: it does not answer byte ranges; use one that does"
            )

    return {
        "client_kwargs": {
            "timeout": _silence(timeout_seconds),
            "headers": {"Accept-Encoding": "identity"},  # a range of compressed bytes is of no use
            "trust_env": True,  # proxies, ~/.netrc
            "raise_for_status": refuse_more_than_asked,
        }
    }


_OPTIONS: dict[str, Callable[[str, float], dict[str, Any]]] = {
    "s3": _s3_options, "gcs": _gcs_options, "http": _http_options,
}  # fmt: skip


def _silence(timeout_seconds: float) -> Any:
    """How long aiohttp waits for a connection, and for the next bytes."""
    import aiohttp

    return aiohttp.ClientTimeout(total=None, sock_connect=timeout_seconds, sock_read=timeout_seconds)


def _asked(header: str | None) -> tuple[int | None, int | None]:
    """Start and end of a Range header as `Span` has them; None and None for no range."""
    if not header:
        return None, None
    first, _, last = header.removeprefix("bytes=").partition("-")
    return (int(first), int(last) + 1) if first else (-int(last), None)
