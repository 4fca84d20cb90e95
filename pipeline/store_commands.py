"""The commands about stores: verify, repair, convert, upload, join."""

import importlib
import math
import re
import time
from pathlib import Path
from typing import Any

import click

from extract.config import ExecutionConfig
from pipeline import provenance
from pipeline.audit import audit_stores
from pipeline.options import ENCODING, EXECUTOR, LAYOUT, RAY_ADDRESS, READ_DATA, WORK
from pipeline.progress import show_progress
from pipeline.repair import Health, examine_store, repair_store
from pipeline.screen import console
from pipeline.workspace import open_workspace
from storage.encodings import find_encoding
from storage.errors import ConfigError, DamagedError
from storage.token_subset import TokenSubset


def parse_percent(text: str) -> float:
    """`5%` to 0.05.

    Raises:
        ConfigError: not a percentage.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*%", text.strip())
    if not match or float(match[1]) > 100:
        raise ConfigError(f"READ_DATA is {text!r}, expected a percentage such as 5% (0% for the structure alone)")
    return float(match[1]) / 100


def _locations(work: Path, stores: tuple[str, ...]) -> list[str]:
    """The named stores, or all of a work folder."""
    return list(stores) or [str(store) for store in open_workspace(work).stores()]


def _local(location: str, advice: str) -> Path:
    """A folder of this machine.

    Raises:
        ConfigError: a URL, which can only be read.
    """
    path = location.removeprefix("file://")
    if "://" in path:
        raise ConfigError(f"{location} is a URL, and stores behind URLs are read-only; {advice}")
    return Path(path)


def _subset(fraction: float) -> TokenSubset | None:
    if math.isnan(fraction):
        raise ConfigError("--token-fraction is nan, expected a share above 0 and up to 1")
    return TokenSubset.of(fraction, seed=0)


@click.command(help="Compare stores, of the work folder or named ones, with what was committed; changes nothing.")
@click.argument("stores", nargs=-1)
@READ_DATA
@WORK
def verify(stores: tuple[str, ...], read_data: str, work: Path) -> None:
    fraction = parse_percent(read_data)
    locations = _locations(work, stores)
    num_damaged = 0
    for location in locations:
        health = _examine(location, fraction)
        num_damaged += len(health.damaged_shards)
    if num_damaged:
        error = DamagedError(
            f"{num_damaged} parts of the stores are damaged or missing; run `make repair`, which makes only these again"
        )
        error.then = provenance.command_line().replace(" verify", " repair", 1)
        raise error
    if not locations:
        console.print(f"no store in {work}")
        return
    partly = "" if fraction == 1 else f" as far as {read_data} of the data tell" if fraction else " in structure"
    console.print(f"{len(locations)} stores are whole{partly}")


@click.command(help="Make again what is damaged of the stores, of the work folder or named ones, and nothing else.")
@click.argument("stores", nargs=-1)
@READ_DATA
@WORK
def repair(stores: tuple[str, ...], read_data: str, work: Path) -> None:
    workspace, fraction = open_workspace(work), parse_percent(read_data)
    num_repaired = 0
    for store in [_local(place, "repair the folder that it was uploaded from") for place in _locations(work, stores)]:
        health = _examine(str(store), fraction)
        if health.damage:
            with show_progress("repair", console=console) as progress:
                repair_store(workspace, store, health, progress)
            num_repaired += len(health.damaged_shards)
    console.print(f"{num_repaired} parts were made again" if num_repaired else "nothing to repair")


def _examine(location: str, fraction: float) -> Health:
    with show_progress("verify", console=console) as progress:
        return examine_store(location, fraction=fraction, seed=time.time_ns(), progress=progress)


@click.command(help="Copy a store (a path or URL) to another layout or encoding at TARGET; needs no teacher.")
@click.argument("source")
@click.argument("target")
@LAYOUT
@ENCODING
@click.option(
    "--token-fraction", type=click.FloatRange(0, 1, min_open=True), help="Keep this share of each view's tokens."
)
@click.option("--views/--no-views", "keep_views", default=None, help="Keep rendered views; the default is as SOURCE.")
@click.option("--data", default="", help="Where the images lie, for views that SOURCE does not have.")
def convert(
    source: str, target: str, layout: Any, encoding: str | None, token_fraction: float | None,
    keep_views: bool | None, data: str,
) -> None:  # fmt: skip
    from storage.convert import convert_store, plan_conversion
    from storage.reader import open_store

    root = _local(target, "convert to a folder, then `upload` that")
    store = open_store(source, check="always")
    plan = plan_conversion(
        store,
        backend=layout or store.plan.backend,
        encoding=find_encoding(encoding) if encoding else None,
        token_subset=None if token_fraction is None else _subset(token_fraction),
        keep_views=keep_views,
    )
    with show_progress("convert", console=console) as progress:
        manifest = convert_store(store, root, plan, images_location=data, progress=progress)
    console.print(
        f"{target}: {plan.backend}, {plan.encoding.kind}, {manifest.num_records:,} records, "
        f"{manifest.num_bytes / 1e9:,.2f} GB ({store.manifest.num_bytes / 1e9:,.2f} GB in {source})"
    )


@click.command(help="Copy the finished store SOURCE to an object store, such as s3://bucket/store.")
@click.argument("source", type=click.Path(path_type=Path))
@click.argument("url")
def upload(source: Path, url: str) -> None:
    from storage.upload import upload_store

    with show_progress("upload", console=console) as progress:
        upload_store(source, url, progress)
    console.print(f"{url} holds the store; train from it with STORE={url}")


@click.command(
    help="Make random records of stores again, of the work folder or named ones, and compare; changes nothing."
)
@click.argument("stores", nargs=-1)
@click.option(
    "--n", "records", type=click.IntRange(min=1), default=64, show_default=True, help="Records of each store."
)
@click.option("--seed", type=int, help="Which records; by default others each time.")
@WORK
def audit(stores: tuple[str, ...], records: int, seed: int | None, work: Path) -> None:
    workspace = open_workspace(work)
    places = [_local(place, "audit the folder that it was uploaded from") for place in _locations(work, stores)]
    if not places:
        console.print(f"no store in {work}")
        return
    with show_progress("audit", console) as progress:
        audit_stores(
            workspace, places, num_records=records, seed=time.time_ns() % 2**32 if seed is None else seed,
            progress=progress,
        )  # fmt: skip


@click.command(help="Help to fill a store that another command is filling, from the path of its folder alone.")
@click.argument("store")
@click.option("--teacher", metavar="FILE.py", help="Where a Python file makes the store's teacher: run that file.")
@EXECUTOR
@RAY_ADDRESS
def join(store: str, teacher: str | None, executor: str | None, ray_address: str | None) -> None:
    root = _local(store, "join where its folder is")
    named = {"executor": executor, "ray_address": ray_address}
    run = ExecutionConfig.checked({name: value for name, value in named.items() if value is not None}, "options")
    with show_progress("join", console) as progress:
        did = importlib.import_module("extract.join").join_store(root, run, progress, teacher=teacher)
    console.print(f"{root} is finished; {did.get('shards', 0):,} shards of it were made here", soft_wrap=True)


COMMANDS = (verify, repair, audit, convert, upload, join)
