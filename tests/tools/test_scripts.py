"""The other tools explain themselves, refuse what they do not know, and call what they say."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[2]
SCRIPTS = [
    "tools/setup",
    "tools/quickstart",
    "tools/test",
    "tools/lint",
    "tools/lock",
    "tools/aot",
    ".ci/run",
]
# A checkout in which set-up is done and every program notes how it was called.
STAND_IN = '#!/bin/sh\necho "${0##*/} $*" >>"$LOG"\n'


def run(command: list[str | Path], **options) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL, **options
    )


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_explains_itself_from_anywhere(script: str, tmp_path: Path) -> None:
    copy = tmp_path / script  # without an environment: help has to come at once
    copy.parent.mkdir()
    shutil.copy(ROOT / script, copy)
    for flag in ("-h", "--help"):
        result = run([copy, flag], cwd="/")
        assert result.returncode == 0, result.stderr
        assert result.stdout.startswith(f"usage: {script}")
        assert result.stderr == ""
    assert os.listdir(tmp_path) == [script.split("/")[0]]


@pytest.mark.parametrize("script", ["tools/setup", "tools/lint", "tools/lock", ".ci/run"])
def test_unknown_arguments_are_one_line(script: str) -> None:
    result = run([ROOT / script, "--no-such-thing"])
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1 and "--no-such-thing" in result.stderr


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    for name in ("tools/test", "tools/quickstart", ".ci/run"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    for name in ("tools/setup", ".venv/bin/python", ".venv/bin/ruff", ".venv-floor/bin/python"):
        stand_in = tmp_path / name
        stand_in.parent.mkdir(parents=True, exist_ok=True)
        stand_in.write_text(STAND_IN)
        stand_in.chmod(0o755)
    return tmp_path


def calls(checkout: Path, *command: str, code: int = 0, **environment: str) -> list[str]:
    """What `command` calls in the checkout, in order."""
    log = checkout / "log"
    log.unlink(missing_ok=True)
    variables = {**os.environ, "LOG": str(log), "MEMTRAIN_TEST_WORKERS": "2", **environment}
    variables.pop("MEMTRAIN_VENV", None)
    result = run([checkout / command[0], *command[1:]], env=variables)
    assert result.returncode == code, result.stderr
    return log.read_text().splitlines() if log.exists() else []


SPREAD = "-n 2 --dist loadfile --no-loadscope-reorder"


def test_test_chooses_by_marker_and_passes_the_rest_on(checkout: Path) -> None:
    started, *style, pytest_call = calls(checkout, "tools/test")
    assert started == "setup "
    assert [line.split()[:2] for line in style] == [["ruff", "check"], ["ruff", "format"]]
    assert pytest_call == f"python -m pytest {SPREAD} -m not slow"

    assert calls(checkout, "tools/test", "--fast", "tests/laws", "-k", "split")[-1] == (
        f"python -m pytest {SPREAD} -m not slow and not full tests/laws -k split"
    )
    assert calls(checkout, "tools/test", "--slow")[-1] == f"python -m pytest {SPREAD}"
    assert calls(checkout, "tools/test", "-n", "0")[-1] == "python -m pytest -m not slow -n 0"
    assert calls(checkout, "tools/test", MEMTRAIN_TEST_WORKERS="1")[-1] == (
        "python -m pytest -m not slow"
    )


def test_test_refuses_in_one_line(checkout: Path) -> None:
    assert calls(checkout, "tools/test", "--fast", "--slow", code=2) == []
    assert calls(checkout, "tools/test", "--parity", "--slow", code=2) == []


def test_test_compares_with_an_oracle_that_is_there(checkout: Path) -> None:
    call = calls(checkout, "tools/test", "--parity", "-x", MEMTRAIN_PARITY_PYTHON="/a/python")[-1]
    assert call == "python -m pytest -m parity tests/interop/test_parity.py -x"


def test_test_on_the_floor_uses_an_environment_of_its_own(checkout: Path) -> None:
    (checkout / "tools/setup").write_text(
        '#!/bin/sh\necho "setup ${MEMTRAIN_VENV##*/} $MEMTRAIN_EXTRA" >>"$LOG"\n'
    )
    python = checkout / ".venv-floor/bin/python"
    python.write_text(STAND_IN.replace("${0##*/}", "floor"))
    assert calls(checkout, "tools/test", "--floor", "--fast") == [
        "setup .venv-floor floor",
        f"floor -m pytest {SPREAD} -m not slow and not full",
    ]


@pytest.mark.parametrize(
    ("failing", "code", "ran"),
    [("tools/setup", 3, 0), (".venv/bin/ruff", 1, 1), (".venv/bin/python", 5, 1)],
)
@pytest.mark.parametrize("script", ["tools/test", ".ci/run"])
def test_a_failure_comes_through(
    checkout: Path, script: str, failing: str, code: int, ran: int
) -> None:
    (checkout / failing).write_text(STAND_IN + f"exit {code}\n")
    seen = calls(checkout, script, code=code)
    assert sum(line.startswith("python") for line in seen) == ran


def test_quickstart_sets_up_then_hands_over(checkout: Path) -> None:
    assert calls(checkout, "tools/quickstart", "--seed", "1") == [
        "setup ",
        "python -m memtrain.quickstart --seed 1",
    ]
    (checkout / "tools/setup").write_text(STAND_IN + "exit 2\n")
    assert calls(checkout, "tools/quickstart", code=2) == ["setup "]
