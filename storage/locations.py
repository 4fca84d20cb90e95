"""Where a store is, as a user says it."""

from pathlib import Path

from storage.files import Files, LocalFiles


def open_files(location: Path | str) -> Files:
    """The files at a path or at a URL that fsspec knows (`s3://`, `gs://`, `https://`)."""
    text = str(location)
    if "://" in text and not text.startswith("file://"):
        from storage.remote import RemoteFiles  # and all that it imports, which a disk does not need

        return RemoteFiles(text)
    return LocalFiles(Path(text.removeprefix("file://")))
