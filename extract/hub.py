"""Weights that a library publishes: out of the hub's cache, or downloaded, or one line that says why not.

The libraries' own downloads try for about a minute without a network, even where the file is in the cache, and some
load what they get with gaps. So they are asked only which file they mean; it is then loaded like any other.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

from extract.download import FIRST_CONTACT_SECONDS, download_file, first_contact
from extract.spec import TeacherSpec
from storage.errors import ConfigError, DecantError, InputError, first_line


class Published(NamedTuple):
    """A file of weights that a library's table names: on the hub, or behind a plain URL."""

    repo: str = ""
    names: tuple[str, ...] = ()
    """Of the file in the repository, the better first; one of them is there."""
    revision: str | None = None
    url: str = ""

    def __str__(self) -> str:
        return f"{self.repo}/{self.names[0]}" if self.repo else self.url


def fetch_weights(spec: TeacherSpec) -> Path:
    """The file of a teacher whose weights come from the hub.

    Raises:
        InputError: it is not in the cache and cannot be downloaded; names the file and how to provide it.
        ConfigError: its library publishes no such weights.
    """
    published = _TABLES[spec.library](spec)
    if published.url:
        return _fetch_url(spec, published)
    return _cached(published) or _download(spec, published)


def _of_timm(spec: TeacherSpec) -> Published:
    import timm

    found = timm.get_pretrained_cfg(spec.model)
    if found is None or not found.has_weights:
        raise _unpublished(spec)
    if not found.hf_hub_id:
        return Published(url=found.url)
    repo, _, revision = found.hf_hub_id.partition("@")
    name = found.hf_hub_filename or "pytorch_model.bin"
    return Published(repo, _with_safetensors(name), revision or None)


def _of_open_clip(spec: TeacherSpec) -> Published:
    import open_clip

    tag = spec.weights.partition(":")[2]
    found = open_clip.get_pretrained_cfg(spec.model, tag)
    if not found:
        raise _unpublished(spec)
    if not found.get("hf_hub"):
        return Published(url=found["url"])
    repo, _, name = found["hf_hub"].rpartition("/")
    return Published(repo, _with_safetensors(name or "open_clip_pytorch_model.bin"))


_TABLES: dict[str, Callable[[TeacherSpec], Published]] = {"timm": _of_timm, "open_clip": _of_open_clip}


def _with_safetensors(name: str) -> tuple[str, ...]:
    safe = {"pytorch_model.bin": "model.safetensors", "open_clip_pytorch_model.bin": "open_clip_model.safetensors"}
    return tuple(dict.fromkeys((safe.get(name, f"{name.rpartition('.')[0]}.safetensors"), name)))


def _unpublished(spec: TeacherSpec) -> ConfigError:
    return ConfigError(
        f"{spec.library} publishes no weights {spec.weights} of {spec.model} (teacher {spec.name!r}); give your own "
        "with WEIGHTS=<file>"
    )


def _cached(published: Published) -> Path | None:
    """The file in the hub's cache. The hub is not asked whether there is a newer one: stores know their teacher by its
    tensors."""
    from huggingface_hub import try_to_load_from_cache

    for name in published.names:
        found = try_to_load_from_cache(published.repo, name, revision=published.revision)
        if isinstance(found, str):
            return Path(found)
    return None


def _download(spec: TeacherSpec, published: Published) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    refusals: list[Exception] = []
    for name in published.names:
        try:
            first_contact(partial(_ask_for, published, name))
            return Path(hf_hub_download(published.repo, name, revision=published.revision))
        except GatedRepoError as error:
            raise InputError(
                f"the weights of teacher {spec.name!r} ({published}) are given only to those who accept their licence: "
                f"accept it at https://huggingface.co/{published.repo}, then log in with `hf auth login`, or set "
                "HF_TOKEN; or give WEIGHTS=<file>"
            ) from error
        except RepositoryNotFoundError as error:
            raise InputError(
                f"the hub knows no {published.repo} (teacher {spec.name!r}), or not for you: log in with `hf auth "
                "login` if it is private; or give WEIGHTS=<file>"
            ) from error
        except LocalEntryNotFoundError as error:  # neither in the cache nor to be had: the network is lost
            raise _not_had(spec, published, error) from error
        except EntryNotFoundError as error:
            refusals.append(error)
        except Exception as error:  # of any of the libraries below the hub's
            raise _not_had(spec, published, error) from error
    raise _not_had(spec, published, refusals[-1]) from refusals[-1]


def _ask_for(published: Published, name: str) -> object:
    """One question, without the client's many retries; raises its error if there is no such file or no network."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    url = hf_hub_url(published.repo, name, revision=published.revision)
    return get_hf_file_metadata(url, timeout=FIRST_CONTACT_SECONDS / 2)


def _fetch_url(spec: TeacherSpec, published: Published) -> Path:
    import torch

    try:
        return download_file(published.url, Path(torch.hub.get_dir(), "checkpoints"))
    except DecantError:
        raise
    except Exception as error:  # of any of the libraries below urllib's
        raise _not_had(spec, published, error) from error


def _not_had(spec: TeacherSpec, published: Published, error: Exception) -> InputError:
    from huggingface_hub.constants import HF_HUB_CACHE

    first = first_line(error.__cause__ if isinstance(error, FileNotFoundError) and error.__cause__ else error)
    if published.repo:
        ways = (
            f"it is not in the cache {HF_HUB_CACHE} either. Where there is a network, `hf download {published.repo} "
            f"{published.names[0]}`; then give WEIGHTS=<file> here, or set HF_HOME to a folder with such a cache"
        )
    else:
        ways = "download it where there is a network, and give WEIGHTS=<file> here"
    return InputError(f"the weights of teacher {spec.name!r} are {published}, which cannot be had ({first}); {ways}")
