"""Weights from the hub: out of its cache without a network, or one line within seconds that says what is missing."""

import hashlib
import re
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import open_clip
import pytest
import safetensors.torch
import timm
import torch

from extract import download, hub
from extract.backends import load_teacher
from extract.hub import fetch_weights
from extract.spec import TeacherSpec
from extract.teachers import TEACHERS, find_teacher
from extract.weights import tensor_fingerprint
from storage.errors import ConfigError, InputError

HUB = [spec for spec in TEACHERS.values() if spec.weights.startswith("hub")]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub's files."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)


def put(cache: Path, repo: str, name: str, data: bytes) -> Path:
    """A file in a cache as the hub's client lays it out: a blob, and a link to it in a snapshot of a revision."""
    folder, commit = cache / f"models--{repo.replace('/', '--')}", "0" * 39 + "1"
    blob = folder / "blobs" / hashlib.sha256(data).hexdigest()
    link = folder / "snapshots" / commit / name
    for path, content in ((blob, data), (folder / "refs" / "main", commit.encode())):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(blob)
    return link


# ---- which file ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", HUB, ids=lambda spec: spec.name)
def test_every_row_names_a_file_of_the_hub(spec: TeacherSpec, cache: Path, no_network: None) -> None:
    with pytest.raises(InputError, match=rf"teacher '{re.escape(spec.name)}' are [\w.-]+/[\w.-]+/\w+\.safetensors, "):
        fetch_weights(spec)


def test_the_file_is_the_one_that_the_library_would_load(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def record(repo_id: str, filename: str, **options: Any) -> str:
        asked.append(f"{repo_id}/{filename}")
        raise RuntimeError("enough")

    for module in (timm.models._hub, open_clip.pretrained):
        monkeypatch.setattr(module, "hf_hub_download", record)
    monkeypatch.setattr(hub, "_ask_for", lambda published, name: record(published.repo, name))
    calls: dict[str, Callable[[], object]] = {
        "dino-s": lambda: timm.create_model("vit_small_patch16_224.dino", pretrained=True),
        "clip-b": lambda: open_clip.create_model("ViT-B-16-quickgelu", pretrained="openai"),
    }
    for name, call in calls.items():
        asked.clear()
        with pytest.raises(RuntimeError):
            call()
        [theirs, *_] = asked
        asked.clear()
        with pytest.raises(InputError, match="enough"):
            fetch_weights(find_teacher(name))
        assert asked == [theirs]


def test_weights_that_no_library_has_are_refused() -> None:
    for name, change in (("dino-s", {"model": "swinv2_cr_giant_224"}), ("clip-b", {"weights": "hub:nobody"})):
        with pytest.raises(ConfigError, match="publishes no weights"):
            fetch_weights(find_teacher(name).model_copy(update=change))


# ---- from the cache --------------------------------------------------------------------------------------------------

TINY_VIT = find_teacher("dino-s").model_copy(update={"options": {"depth": 1, "embed_dim": 24, "num_heads": 2}})


def test_a_timm_file_in_the_cache_needs_no_network(cache: Path, no_network: None) -> None:
    spec = TINY_VIT.model_copy(update={"channels": 24})
    torch.manual_seed(5)
    state = timm.create_model("vit_small_patch16_224", num_classes=0, **spec.options).state_dict()
    path = put(cache, "timm/vit_small_patch16_224.dino", "model.safetensors", safetensors.torch.save(state))
    started = time.monotonic()
    assert load_teacher(spec, device="cpu").fingerprint == tensor_fingerprint(state)
    assert time.monotonic() - started < 5
    assert fetch_weights(spec) == path


def test_an_open_clip_file_in_the_cache_needs_no_network(cache: Path, no_network: None) -> None:
    spec = find_teacher("clip-b").model_copy(update={"options": {"width": 64, "layers": 1}, "channels": 64})
    config = open_clip.get_model_config("ViT-B-16-quickgelu")
    vision = config["vision_cfg"] | spec.options
    torch.manual_seed(5)
    model = open_clip.CLIP(config["embed_dim"], vision, config["text_cfg"] | {"layers": 1}, quick_gelu=True)
    data = safetensors.torch.save(model.state_dict())
    put(cache, "timm/vit_base_patch16_clip_224.openai", "open_clip_model.safetensors", data)
    assert load_teacher(spec, device="cpu").fingerprint == tensor_fingerprint(model.visual.state_dict())


def test_an_older_file_beside_no_safetensors_is_taken_too(cache: Path, no_network: None, tmp_path: Path) -> None:
    spec = TINY_VIT.model_copy(update={"channels": 24})
    state = timm.create_model("vit_small_patch16_224", num_classes=0, **spec.options).state_dict()
    torch.save(state, tmp_path / "weights")
    put(cache, "timm/vit_small_patch16_224.dino", "pytorch_model.bin", (tmp_path / "weights").read_bytes())
    assert load_teacher(spec, device="cpu").fingerprint == tensor_fingerprint(state)


def test_a_file_with_gaps_is_refused_from_the_hub_too(cache: Path, no_network: None) -> None:
    state = timm.create_model("vit_small_patch16_224", num_classes=0, **TINY_VIT.options).state_dict()
    del state["norm.bias"]
    put(cache, "timm/vit_small_patch16_224.dino", "model.safetensors", safetensors.torch.save(state))
    with pytest.raises(InputError, match=r"missing 1 \(norm\.bias\)"):
        load_teacher(TINY_VIT.model_copy(update={"channels": 24}))


# ---- no network ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("clip-b", "timm/vit_base_patch16_clip_224.openai open_clip_model.safetensors"),
        ("dino-s", "timm/vit_small_patch16_224.dino model.safetensors"),
    ],
)
def test_no_network_is_one_line_within_seconds(name: str, file: str, cache: Path, no_network: None) -> None:
    started = time.monotonic()
    with pytest.raises(InputError) as caught:
        load_teacher(find_teacher(name))
    assert time.monotonic() - started < 5
    message = str(caught.value)
    for part in (
        repr(name),
        "Name or service not known",
        f"hf download {file}",
        "WEIGHTS=<file>",
        "HF_HOME",
        str(cache),
    ):
        assert part in message
    assert "\n" not in message


BY_URL = find_teacher("dino-s").model_copy(update={"model": "vit_huge_patch14_gap_224.in1k_ijepa"})
"""A row whose weights are behind a plain URL."""


def test_a_silent_name_server_is_not_waited_for(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "FIRST_CONTACT_SECONDS", 0.2)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: time.sleep(3))
    for spec in (find_teacher("dino-s"), BY_URL):
        started = time.monotonic()
        with pytest.raises(InputError, match="no answer within 0 s"):
            fetch_weights(spec)
        assert time.monotonic() - started < 2


def test_a_plain_url_is_named_too(no_network: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(
        InputError, match=r"are https://dl\.fbaipublicfiles\.com/\S+, which cannot be had .*Name or serv"
    ):
        fetch_weights(BY_URL)
    assert not list(tmp_path.rglob("*.tar*"))


class Answer:
    """As much of an HTTP answer as the hub's errors look at."""

    def __init__(self, status: int) -> None:
        self.status_code, self.headers, self.request = status, {}, None


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (
            huggingface_hub.errors.GatedRepoError,
            r"accept it at https://huggingface\.co/timm/\S+, then log in with `hf auth",
        ),
        (huggingface_hub.errors.RepositoryNotFoundError, "the hub knows no timm/.*log in"),
    ],
)
def test_a_refusal_of_the_hub_says_what_to_do(
    error: Any, told: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object) -> None:
        raise error("403 or 401", response=Answer(403))

    monkeypatch.setattr(hub, "_ask_for", refuse)
    with pytest.raises(InputError, match=told) as caught:
        fetch_weights(find_teacher("dinov3-b"))
    assert "WEIGHTS=<file>" in str(caught.value)


def test_a_network_that_is_lost_is_no_missing_file(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub's client says of both that there is no such entry."""
    asked: list[str] = []

    def ask(published: hub.Published, name: str) -> None:
        asked.append(name)
        if len(asked) > 1:
            raise huggingface_hub.errors.EntryNotFoundError("404", response=Answer(404))

    def lose(*args: object, **options: object) -> None:
        raise huggingface_hub.errors.LocalEntryNotFoundError("not in the cache") from OSError("connection reset")

    monkeypatch.setattr(hub, "_ask_for", ask)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lose)
    with pytest.raises(InputError, match=r"cannot be had \(connection reset\)"):
        fetch_weights(find_teacher("dino-s"))
    assert asked == ["model.safetensors"]
