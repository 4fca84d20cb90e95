"""Free memory as the system and a container tell it."""

from pathlib import Path

import pytest

from extract.free_memory import free_memory_bytes

KB, GB = 1024, 2**30


@pytest.fixture
def meminfo(tmp_path: Path) -> Path:
    """A machine whose memory is nearly all page cache."""
    (tmp_path / "meminfo").write_text(
        f"MemTotal:       {24 * GB // KB} kB\nMemFree:          {GB // KB} kB\nMemAvailable:   {20 * GB // KB} kB\n"
    )
    return tmp_path / "meminfo"


@pytest.fixture
def group(tmp_path: Path) -> Path:
    (tmp_path / "cgroup" / "memory").mkdir(parents=True)
    return tmp_path / "cgroup"


def test_the_page_cache_is_free(meminfo: Path, group: Path) -> None:
    assert free_memory_bytes(meminfo, group) == 20 * GB


def test_a_container_of_version_2(meminfo: Path, group: Path) -> None:
    (group / "memory.max").write_text(f"{8 * GB}\n")
    (group / "memory.current").write_text(f"{6 * GB}\n")
    assert free_memory_bytes(meminfo, group) == 2 * GB
    (group / "memory.stat").write_text(f"anon 5\ninactive_file {3 * GB}\n")
    assert free_memory_bytes(meminfo, group) == 5 * GB
    (group / "memory.max").write_text("max\n")
    assert free_memory_bytes(meminfo, group) == 20 * GB


def test_a_container_of_version_1(meminfo: Path, group: Path) -> None:
    (group / "memory" / "memory.limit_in_bytes").write_text(f"{4 * GB}\n")
    (group / "memory" / "memory.usage_in_bytes").write_text(f"{5 * GB}\n")
    assert free_memory_bytes(meminfo, group) == 0, "more is used than the limit for a moment"
    (group / "memory" / "memory.limit_in_bytes").write_text("9223372036854771712\n")
    assert free_memory_bytes(meminfo, group) == 20 * GB


def test_a_system_without_such_files(tmp_path: Path) -> None:
    assert free_memory_bytes(tmp_path / "nothing", tmp_path / "nowhere") > 0


def test_here() -> None:
    assert free_memory_bytes() > 100 * 2**20
