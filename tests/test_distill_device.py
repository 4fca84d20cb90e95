"""What torch is asked for on a GPU, on machines without one."""

import pytest
import torch

from distill.device import check_gpus, choose_device, repeatable
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


def test_a_gpu_that_is_not_there_is_not_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto") == choose_device("cpu") == torch.device("cpu")
    with pytest.raises(ConfigError, match=r"run\.device=cuda .* no GPU"):
        choose_device("cuda")


def test_every_process_needs_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    with pytest.raises(ConfigError, match=r"8 processes .* has 4; set GPUS=4"):
        check_gpus("auto", 8)
    check_gpus("auto", 4)
    check_gpus("cpu", 8)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    check_gpus("auto", 8)
