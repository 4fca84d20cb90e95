"""Every test that docs/faults.md names is there."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_the_tests_that_are_named_exist() -> None:
    rows = [line for line in (ROOT / "docs" / "faults.md").read_text().splitlines() if line.startswith("| ")][1:]
    assert len(rows) > 25
    known = {
        node.name
        for path in (ROOT / "tests").glob("test_*.py")
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef)
    }
    for row in rows:
        named = re.findall(r"`(test_\w+)`", row.rpartition("|")[0].rpartition("|")[2])
        assert named, row
        assert not set(named) - known, row
