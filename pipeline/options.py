"""The options of the command line: one word each, which means the same in every command."""

from collections.abc import Callable
from pathlib import Path

import click

from pipeline.presets import PRESETS

Command = Callable[..., None]

WORK = click.option(
    "--work", default="runs", show_default=True, type=click.Path(path_type=Path), help="Folder for all results."
)
READ_DATA = click.option(
    "--read-data", default="100%", show_default=True, metavar="PERCENT",
    help="How much of the data to read and compare, by random shards; 0% looks at the structure alone, in seconds.",
)  # fmt: skip
ENCODING = click.option(
    "--encoding", metavar="NAME", help="fp16, int8 (half the bytes), bit_round or zstd (for archives)."
)
WHITENING = click.option(
    "--whitening", metavar="NAME", help="layer_norm (the paper's), mean_std, pca (both fitted on a sample) or none."
)
LAYOUT = click.option(
    "--layout", type=click.Choice(["zarr", "wds"]), help="Zarr arrays, or WebDataset tars with the rendered views."
)
EXECUTOR = click.option(
    "--executor", type=click.Choice(["ray", "process", "inline"]),
    help="Where extraction runs: Ray's actors, processes of this machine, or this process.",
)  # fmt: skip
RAY_ADDRESS = click.option(
    "--ray-address",
    metavar="ADDRESS",
    help="Extract (or distil, with --launcher ray) on this Ray cluster (`auto`: the one that runs here).",
)
RETRY_FAILED = click.option(
    "--retry-failed", is_flag=True, help="Extract shards again that earlier commands gave up; others are kept."
)

TRIAL = click.option(
    "--trial", type=click.FloatRange(min=0), default=20.0, show_default=True, metavar="SECONDS",
    help="How long the extraction is tried, to tell how long it would take; 0 for not at all.",
)  # fmt: skip

_OF_STAGES = (
    click.option("--preset", help=f"Settings to start from: {', '.join(PRESETS)}."),
    click.option(
        "--teacher",
        help="A name of `decant teachers`, timm:NAME, open_clip:NAME/TAG or FILE.py; several with commas "
        "(extract, plan, run: a store each; distill: a student of all).",
    ),
    click.option(
        "--weights", help="A local file with the teacher's weights, `random`, or `hub`; one for each teacher."
    ),
    click.option("--data", help="A folder of class folders, or tars or Parquet files of images: a path or a URL."),
    click.option("--views", type=int, help="Stored views an image."),
    LAYOUT,
    ENCODING,
    WHITENING,
    click.option(
        "--store",
        help="Train from this finished store, a path or URL, instead of extracting one; several with commas: from all.",
    ),
    click.option(
        "--online/--no-online", default=None,
        help="Train without a store: the teacher works in every step. A control; slower and larger.",
    ),
    click.option("--student", help="vit-ti, vit-s, vit-b, vit-l, swinv2-b, swinv2-g, toy, or timm:NAME."),
    click.option("--gpus", type=click.IntRange(min=1), help="Processes that distil together, one a GPU."),
    click.option(
        "--launcher", type=click.Choice(["torchrun", "ray"]), help="Who starts them: torchrun, or Ray on a cluster.",
    ),
    click.option(
        "--accumulate", type=click.IntRange(min=1),
        help="Parts that each of them computes its share of a batch in: less memory, the same step.",
    ),
    click.option("--seeds", type=int, help="Fine-tune with this many seeds."),
    EXECUTOR,
    RAY_ADDRESS,
    click.option(
        "--set", "assignments", multiple=True, metavar="NAME=VALUE",
        help="Any setting, such as distill.epochs=30; repeatable.",
    ),
    WORK,
    click.option("--force", is_flag=True, help="Run the named stage again even if it is up to date."),
    click.option("--join", is_flag=True, help="Help where another command is filling the same store."),
    RETRY_FAILED,
)  # fmt: skip


def stage_options(command: Command) -> Command:
    """The options that every stage command takes."""
    for option in reversed(_OF_STAGES):
        command = option(command)
    return command
