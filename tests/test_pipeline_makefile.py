"""`make <command>` is `python -m pipeline <command>` with the same words."""

import os
import re
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.cli import cli

ROOT = Path(__file__).resolve().parent.parent
Make = Callable[..., str]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Run make beside an environment that is set up, whatever make this test itself was started by."""
    (tmp_path / "venv").mkdir()
    (tmp_path / "venv" / ".installed").touch()

    def run(*arguments: str, **variables: str) -> str:
        environment = {"PATH": os.environ["PATH"]} | variables
        done = subprocess.run(
            ["make", f"VENV={tmp_path / 'venv'}", *arguments],
            cwd=ROOT, env=environment, capture_output=True, text=True, timeout=30, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def words(printed: str) -> list[str]:
    """The arguments of the last command that make would run."""
    command = shlex.split(printed.strip().splitlines()[-1])
    assert command[0].endswith("venv/bin/python")
    assert command[1:3] == ["-m", "pipeline"]
    return command[3:]


def test_variables_become_options(make: Make) -> None:
    assert words(make("-n", "extract", "TEACHER=clip-l", "DATA=x", "SET=a.b=1 c.d=2")) == [
        "extract", "--teacher", "clip-l", "--data", "x", "--set", "a.b=1", "--set", "c.d=2",
    ]  # fmt: skip


def test_every_variable_has_its_option(make: Make) -> None:
    given = {
        "PRESET": "smoke", "TEACHER": "toy", "WEIGHTS": "w.pt", "DATA": "d", "VIEWS": "3", "LAYOUT": "wds",
        "ENCODING": "int8", "WHITENING": "pca", "STORE": "s3://b/store", "STUDENT": "toy", "SEEDS": "2",
        "GPUS": "8", "LAUNCHER": "ray", "ACCUMULATE": "2", "EXECUTOR": "process", "RAY": "10.0.0.1:6379", "WORK": "w",
    }  # fmt: skip
    flags = {"ONLINE": "--online", "FORCE": "--force", "JOIN": "--join", "RETRY_FAILED": "--retry-failed"}
    option = {name: f"--{name.lower()}" for name in given} | {"RAY": "--ray-address"}
    variables = [f"{name}={value}" for name, value in given.items()] + [f"{name}=1" for name in flags]
    expected = [word for name, value in given.items() for word in (option[name], value)]
    assert words(make("-n", "run", *variables)) == ["run", *expected, *flags.values()]
    options = {option for parameter in cli.commands["run"].params for option in parameter.opts}
    assert options == {*option.values(), *flags.values(), "--set"}


@pytest.mark.parametrize(
    "data", ["/with a space/images", "it's", '"quoted"', "{000..009}.tar", "*.tar", "a;b", "~/images"]
)
def test_the_shell_leaves_values_alone(make: Make, data: str) -> None:
    assert words(make("-n", "run", f"DATA={data}")) == ["run", "--data", data]


def test_json_values(make: Make) -> None:
    assert words(make("-n", "run", 'SET=finetune.starts=["distilled"] finetune.seeds=[0,1]')) == [
        "run", "--set", 'finetune.starts=["distilled"]', "--set", "finetune.seeds=[0,1]",
    ]  # fmt: skip


@pytest.mark.parametrize(("value", "forced"), [("1", True), ("yes", True), ("", False), ("0", False), ("no", False)])
def test_force(make: Make, value: str, forced: bool) -> None:
    assert words(make("-n", "distill", f"FORCE={value}")) == ["distill", *(["--force"] if forced else [])]


@pytest.mark.parametrize(("value", "word"), [("1", ["--online"]), ("0", ["--no-online"]), ("", [])])
def test_a_switch_can_be_put_back(make: Make, value: str, word: list[str]) -> None:
    assert words(make("-n", "distill", f"ONLINE={value}")) == ["distill", *word]


def test_every_command_of_the_program_has_its_target(make: Make) -> None:
    for command in cli.commands:
        taken = words(make("-n", command, "WORK=w", "SEEDS=2"))
        assert taken[0] == command
        options = {option for parameter in cli.commands[command].params for option in parameter.opts}
        assert ("--work" in taken) == ("--work" in options)
        assert ("--seeds" in taken) == ("--seeds" in options)


def test_store_commands_take_their_words(make: Make) -> None:
    assert words(make("-n", "verify", "STORE=a b", "READ_DATA=5%")) == ["verify", "a b", "--read-data", "5%"]
    assert words(make("-n", "repair", "WORK=w", "READ_DATA=0%")) == ["repair", "--work", "w", "--read-data", "0%"]
    given = ["FROM=it's", "TO=s3://b/x", "LAYOUT=wds", "ENCODING=int8", "DATA=d"]
    options = ["--layout", "wds", "--encoding", "int8", "--data", "d"]
    assert words(make("-n", "convert", *given)) == ["convert", "it's", "s3://b/x", *options]
    assert words(make("-n", "upload", *given)) == ["upload", "it's", "s3://b/x"]


def test_student_commands_take_their_words(make: Make) -> None:
    given = ["FROM=it's", "TO=a b", "FORMAT=both", "TEACHER=clip-b", "FORCE=1"]
    assert words(make("-n", "export", *given)) == ["export", "it's", "a b", "--format", "both", "--force"]
    assert words(make("-n", "import", *given)) == ["import", "it's", "a b", "--teacher", "clip-b", "--force"]


def test_help_lists_every_target(make: Make) -> None:
    printed = make()
    assert printed == make("help")
    listed = dict(line.split(maxsplit=2)[1:] for line in printed.splitlines() if line.startswith("  make "))
    text = (ROOT / "Makefile").read_text()
    phony = re.search(r"^\.PHONY: (.*)$", text, re.MULTILINE)
    stages = re.search(r"^STAGE_COMMANDS := (.*)$", text, re.MULTILINE)
    assert phony
    assert stages
    targets = set(phony[1].replace("$(STAGE_COMMANDS)", stages[1]).split())
    assert set(listed) == targets
    assert set(cli.commands) <= targets
    assert all(listed.values())


def test_a_new_requirement_is_installed_first(make: Make, tmp_path: Path) -> None:
    assert "pip install" not in make("-n", "run")
    os.utime(tmp_path / "venv" / ".installed", (1, 1))
    printed = make("-n", "run")
    assert "pip install" in printed
    assert words(printed) == ["run"]


def test_tests_run_on_one_thread(make: Make) -> None:
    assert "OMP_NUM_THREADS=1" in make("-n", "test")
