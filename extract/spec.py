"""What is known about a teacher before its weights are loaded."""

from typing import Any, Literal, Self

from pydantic import Field, PositiveFloat, model_validator

from storage.errors import ConfigError
from storage.records import FeatureSpec
from storage.schema import Schema

Triple = tuple[float, float, float]

Tap = Literal["final_norm", "block", "projected"]
"""Which of a teacher's tokens are the target, prefix tokens included:
`final_norm`: of a block, through the teacher's own final norm, applied to every token (the paper's);
`block`: of a block, as it leaves them; for networks without a final norm, and convolutional ones;
`projected`: `final_norm`, then CLIP's projection into the space that it shares with text."""

Precision = Literal["float32", "bfloat16", "float16"]
"""Of a teacher's matrix products and convolutions."""

IMAGENET_MEAN: Triple = (0.485, 0.456, 0.406)
IMAGENET_STD: Triple = (0.229, 0.224, 0.225)


class TeacherSpec(Schema):
    """A teacher as a row of data. Nothing asks for its name."""

    name: str
    library: Literal["timm", "open_clip", "python", "toy"] = "python"
    model: str = ""
    """The library's name of the architecture, with timm's tag."""
    options: dict[str, Any] = {}
    """Arguments for the library's builder, where its own model differs from the upstream one."""
    weights: str = Field(default="module", pattern=r"^(hub(:.+)?|package:[^:]+:.+|file|module|random)$")
    """Where they come from: `hub` or `hub:<tag>`: the library downloads them; `package:<module>:<path>`: a file inside
    an installed package; `file`: on no hub, the user has one; `module`: the module brings its own;
    `random`: none, from a seed."""
    code_digest: str = ""
    """Of the user's file that makes it, and of the modules beside it that it imports."""
    checkpoint_branch: str = ""
    """Of upstream files that hold several networks (`student`, `teacher`), the one that is the teacher."""
    left_out: tuple[str, ...] = ()
    """What tensors of upstream files begin with that do nothing for the tokens: heads, decoders. Names as they are
    after the library's own conversion, which may need those tensors to know the file."""
    state_keys: Literal["by_name", "by_position"] = "by_name"
    """How tensors of a weights file find their places; `by_position` for files with another library's names."""
    input_px: int = Field(ge=1)
    patch_px: int = Field(ge=1)
    """Input pixels a token of the grid, in each direction; of a hierarchical network, at its last stage."""
    channels: int = Field(ge=1)
    num_prefix_tokens: int = Field(default=0, ge=0)
    """CLS and registers, in front of the grid."""
    stage_channels: tuple[int, ...] = ()
    """Of a hierarchical network: the channels of each stage. A stage's grid has twice the next one's side."""
    projected_channels: int | None = None
    """Width of the space shared with text."""
    mean: Triple = IMAGENET_MEAN
    std: tuple[PositiveFloat, PositiveFloat, PositiveFloat] = IMAGENET_STD
    tap: Tap = "final_norm"
    block: int = -1
    """Counted from 0, or from the end if negative; of a hierarchical network, the stage."""
    licence: str = "unknown"
    """Of the weights."""
    paper: bool = False
    """One of the paper's teachers, or its sibling of another size."""
    million_parameters: float = 0
    gflops: float = 0
    """Floating-point operations of one view's forward pass at `input_px`, in 10^9; a multiply-add counts as two."""

    @model_validator(mode="after")
    def _check_stages(self) -> Self:
        stages = self.stage_channels
        if stages and not (-len(stages) <= self.block < len(stages) and stages[self.block] == self.channels):
            raise ValueError(
                f"stage_channels are {list(stages)}, but channels is {self.channels} and block {self.block}; channels "
                "are those of the stage that block names"
            )
        return self

    def feature_spec(self, input_px: int | None = None) -> FeatureSpec:
        """The shape of its tokens at `input_px` (None: its own size)."""
        side = (input_px or self.input_px) // self.patch_px
        return FeatureSpec(
            teacher=self.name, num_prefix_tokens=self.num_prefix_tokens, grid_hw=(side, side), channels=self.channels
        )

    def at(self, *, input_px: int | None = None, tap: Tap | None = None, block: int | None = None) -> Self:
        """The same teacher with another input size or tapped elsewhere; None leaves a setting as it is.

        Raises:
            ConfigError: no such tap or stage here, or a size that its patches do not divide.
        """
        changes: dict[str, Any] = {
            name: value for name, value in (("input_px", input_px), ("tap", tap), ("block", block)) if value is not None
        }
        if self.code_digest and changes:
            raise ConfigError(
                f"teacher {self.name!r} comes from {self.model}, which decides its input size and its tokens; "
                f"change them there and leave out {', '.join(f'extract.{name}' for name in changes)}"
            )
        if changes.get("tap", self.tap) == "projected" and self.tap != "projected":
            if self.projected_channels is None:
                raise ConfigError(
                    f"teacher {self.name!r} has no projection into a space shared with text; extract.tap can be "
                    "final_norm or block"
                )
            changes["channels"] = self.projected_channels
        if block is not None and self.stage_channels:
            changes |= self._stage(block, changes.get("tap", self.tap))
        moved = self.model_copy(update=changes)
        if moved.input_px % moved.patch_px:
            raise ConfigError(
                f"teacher {self.name!r} has patches of {moved.patch_px} px, which do not divide "
                f"extract.input_px={moved.input_px}; take {_nearest(moved.input_px, moved.patch_px)}"
            )
        return moved

    def block_index(self, count: int, kind: str = "blocks") -> int:
        """Which of a network's `count` blocks, or stages, is tapped, counted from 0.

        Raises:
            ConfigError: no such block.
        """
        if not -count <= self.block < count:
            raise ConfigError(
                f"teacher {self.name!r} ({self.model}) has {count} {kind}; extract.block can be 0 to {count - 1}, or "
                f"-1 to {-count} from the end, found {self.block}"
            )
        return self.block % count

    def _stage(self, block: int, tap: Tap) -> dict[str, int]:
        """What a tap at another stage changes; the stage itself is counted from the end, however it was named."""
        count = len(self.stage_channels)
        wanted = self.model_copy(update={"block": block}).block_index(count, "stages")
        if tap == "final_norm" and wanted != count - 1:
            raise ConfigError(
                f"the final norm of teacher {self.name!r} is for its last stage only; for stage {wanted} use "
                "extract.tap=block"
            )
        known = self.block % count
        if wanted == known:
            return {"block": self.block}
        patch_px = self.patch_px * 2**wanted // 2**known
        return {"patch_px": patch_px, "channels": self.stage_channels[wanted], "block": wanted - count}

    def identity(self) -> dict[str, Any]:
        """What decides its tokens, beside the weights' tensors: the part that a store's plan holds."""
        fields = {"name", "library", "input_px", "patch_px", "channels", "num_prefix_tokens"}
        fields |= {"mean", "std", "tap", "block"}
        fields |= {"code_digest"} if self.code_digest else {"model", "options"}  # wherever the file lies
        return self.model_dump(mode="json", include=fields)


def _nearest(px: int, patch_px: int) -> int:
    """The multiple of the patch's side that is nearest."""
    return max(1, round(px / patch_px)) * patch_px
