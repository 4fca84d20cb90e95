"""What torch is asked for on a GPU, on machines without one."""

import pytest
import torch

from distill.device import repeatable
from storage.errors import ConfigError

GPU = torch.device("cuda")


def test_algorithms_are_repeatable_for_the_block() -> None:
    """Attention has both kinds, and takes the other one where torch is asked for no more than a warning."""
    with repeatable(GPU, wanted=True):
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.is_deterministic_algorithms_warn_only_enabled()
        assert not torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    assert not torch.are_deterministic_algorithms_enabled()
    for device, wanted in [(torch.device("cpu"), True), (GPU, False)]:
        with repeatable(device, wanted=wanted):
            assert not torch.are_deterministic_algorithms_enabled()


def test_what_cannot_be_repeated_is_said_with_the_setting() -> None:
    with (
        pytest.raises(ConfigError, match=r"put_.*does not have a deterministic.*distill\.run\.deterministic=false"),
        repeatable(GPU, wanted=True),
    ):
        torch.zeros(3).put_(torch.tensor([0]), torch.tensor([1.0]))
    assert not torch.are_deterministic_algorithms_enabled()
    with pytest.raises(RuntimeError, match="shapes"), repeatable(GPU, wanted=True):
        torch.ones(2, 3) @ torch.ones(2, 3)
