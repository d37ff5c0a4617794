"""tools/setup: which Python it finds, which build it takes, what it refuses, when it is done.

The machine is made up on a PATH of its own (a `uname`, a `python3`, an `nvidia-smi` that answer
what the case asks for), and so is the package installer, which notes its calls: nothing is
downloaded. The script, the Pythons that it starts, `venv` and the lock are the real ones.
"""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[2]
UTILITIES = [
    "sh",
    "dirname",
    "cat",
    "cmp",
    "cp",
    "date",
    "ls",
    "mkdir",
    "mv",
    "rm",
    "sleep",
    "touch",
]
BASE_PYTHON = getattr(sys, "_base_executable", sys.executable)
OLD = 'echo "no 3.11.7"'


class Machine:
    """A checkout and a PATH in a temporary folder."""

    def __init__(self, folder: Path) -> None:
        self.bin = folder / "bin"
        self.home = folder / "home"
        self.root = folder / "a checkout"
        for path in (self.bin, self.home, self.root / "tools", self.root / "requirements"):
            path.mkdir(parents=True)
        for name in UTILITIES:
            found = shutil.which(name)
            assert found, name
            (self.bin / name).symlink_to(found)
        shutil.copy(ROOT / "tools/setup", self.root / "tools/setup")
        for name in ("cpu", "cuda", "tpu", "floor"):
            (self.root / f"requirements/{name}.txt").write_text(f"# {name}\n")
        (self.root / "pyproject.toml").write_text("# as it was\n")
        self.uname("Linux", "x86_64")

    def command(self, name: str, script: str) -> Path:
        path = self.bin / name if "/" not in name else Path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        return path

    def uname(self, system: str, machine: str) -> None:
        self.command(
            "uname", f'case $1 in -s) echo "{system}" ;; -m) echo "{machine}" ;; *) exit 1 ;; esac'
        )

    def python(self, name: str = "python3.12", executable: str = BASE_PYTHON) -> Path:
        """A name for the Python that runs this test."""
        return self.command(name, f'exec "{executable}" "$@"')

    def uv(self, script: str = "") -> None:
        """A `uv` that notes its calls in `home/uv.log` and installs nothing."""
        log = f'echo "$@" >>"{self.home}/uv.log"'
        self.command("uv", f"case $1 in pip) {log}; {script or ':'} ;; python) exit 1 ;; esac")

    @property
    def uv_calls(self) -> list[str]:
        log = self.home / "uv.log"
        return log.read_text().splitlines() if log.exists() else []

    def start(self, *arguments: str, **environment: str) -> subprocess.Popen[str]:
        clean = {"PATH": str(self.bin), "HOME": str(self.home), **environment}
        return subprocess.Popen(
            [self.root / "tools/setup", *arguments],
            env=clean,
            cwd=self.home,
            text=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    def run(
        self, *arguments: str, code: int = 0, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        process = self.start(*arguments, **environment)
        out, err = process.communicate(timeout=60)
        assert process.returncode == code, out + err
        return subprocess.CompletedProcess(arguments, code, out, err)

    def plan(self, **environment: str) -> dict[str, str]:
        """What `--dry-run` says."""
        out = self.run("--dry-run", code=0, **environment).stdout
        return dict(line.split("=", 1) for line in out.splitlines())

    def refusal(self, **environment: str) -> str:
        """The one line with which it refuses."""
        result = self.run(code=2, **environment)
        assert result.stdout == ""
        assert result.stderr.count("\n") == 1, result.stderr
        return result.stderr


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def fake(version: str, path: str) -> str:
    """A Python that answers the probe as `version` would, from `path`."""
    return f'echo "yes {version} {path}"'


# --- which Python --------------------------------------------------------------------------------


def test_named_pythons_come_first_and_an_older_python3_is_passed_over(machine: Machine) -> None:
    machine.command("python3", OLD)
    machine.command("python3.12", fake("3.12.9", "/py/312"))
    assert machine.plan()["python"] == "/py/312"
    machine.command("python3.13", fake("3.13.2", "/py/313"))
    assert machine.plan()["python"] == "/py/313"


def test_the_plain_python3_serves_when_it_is_new_enough(machine: Machine) -> None:
    machine.python("python3")
    plan = machine.plan()
    assert plan["version"] == ".".join(map(str, sys.version_info[:3]))
    assert Path(plan["python"]).exists()


def test_a_shim_that_cannot_run_gives_way_to_pyenvs_own_versions(machine: Machine) -> None:
    for name in ("python3.12", "python3.13"):
        machine.command(name, f'echo "pyenv: {name}: command not found" >&2; exit 127')
    machine.command("python3", OLD)
    machine.command(f"{machine.home}/.pyenv/versions/3.11.7/bin/python", fake("3.11.7", "/never"))
    machine.command(f"{machine.home}/.pyenv/versions/3.12.1/bin/python", fake("3.12.1", "/py/one"))
    assert machine.plan()["python"] == "/py/one"
    elsewhere = machine.home / "elsewhere"
    machine.command(f"{elsewhere}/versions/3.14.0/bin/python", fake("3.14.0", "/py/two"))
    assert machine.plan(PYENV_ROOT=str(elsewhere))["python"] == "/py/two"


def test_uv_is_asked_last(machine: Machine) -> None:
    machine.command("python3", OLD)
    managed = machine.command(f"{machine.home}/managed/python", fake("3.13.7", "/py/managed"))
    machine.command("uv", f'case "$1 $2" in "python find") echo "{managed}" ;; esac')
    plan = machine.plan()
    assert (plan["python"], plan["installer"]) == ("/py/managed", "uv")


def test_no_python_is_one_line_that_names_what_was_seen(machine: Machine) -> None:
    machine.command("python3", OLD)
    line = machine.refusal()
    assert "python3 is 3.11.7" in line and "MEMTRAIN_PYTHON" in line
    assert not (machine.root / ".venv").exists()


def test_memtrain_python_is_obeyed_or_refused(machine: Machine) -> None:
    machine.python("python3.12")
    mine = machine.command("mine", fake("3.14.1", "/py/mine"))
    assert machine.plan(MEMTRAIN_PYTHON=str(mine))["python"] == "/py/mine"
    machine.command("mine", OLD)
    line = machine.refusal(MEMTRAIN_PYTHON=str(mine))
    assert "3.11.7" in line and str(mine) in line


# --- which machine, which build ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("system", "processor", "says"),
    [
        ("Darwin", "x86_64", "Intel Macs"),
        ("MINGW64_NT-10.0", "x86_64", "WSL 2"),
        ("Linux", "riscv64", "riscv64 is not supported"),
        ("FreeBSD", "amd64", "not supported"),
    ],
)
def test_refused_machines(machine: Machine, system: str, processor: str, says: str) -> None:
    machine.python()
    machine.uname(system, processor)
    assert says in machine.refusal()
    assert not (machine.root / ".venv").exists()


def test_a_translated_shell_on_apple_silicon_is_told_so(machine: Machine) -> None:
    machine.python()
    machine.uname("Darwin", "x86_64")
    machine.command("sysctl", "echo 1")
    assert "Rosetta" in machine.refusal()


def test_apple_silicon_takes_the_cpu_build(machine: Machine) -> None:
    machine.command("python3.12", fake("3.12.1", "/py/312"))
    machine.uname("Darwin", "arm64")
    assert machine.plan()["extra"] == "cpu"
    assert "no CUDA on macOS" in machine.refusal(MEMTRAIN_EXTRA="cuda")


@pytest.mark.parametrize(
    ("answer", "extra", "says"),
    [
        ("580.65.06, 9.0, NVIDIA H200", "cuda", "NVIDIA H200"),
        ("595.10, 12.0, GPU A\n595.10, 6.1, GPU B", "cuda", "GPU A"),
        ("570.124.04, 9.0, NVIDIA H100", "cpu", "driver 570.124.04 is too old"),
        ("590.10, 7.0, Tesla V100", "cpu", "compute capability 7.0"),
        ("590.10, [N/A], Odd", "cpu", "too old"),
        ("[N/A], 9.0, Odd", "cpu", "driver [N/A] is too old"),
        ("", "cpu", "shows no GPU"),
    ],
)
def test_the_build_follows_the_gpu(machine: Machine, answer: str, extra: str, says: str) -> None:
    machine.python()
    machine.command("nvidia-smi", f"printf '{answer}'" if answer else "exit 9")
    plan = machine.plan()
    assert plan["extra"] == extra
    assert says in plan["extra_why"]
    assert machine.plan(MEMTRAIN_EXTRA="cpu")["extra"] == "cpu"
    assert machine.plan(MEMTRAIN_EXTRA="cuda")["extra"] == "cuda"


def test_bad_wishes_and_arguments_are_one_line(machine: Machine) -> None:
    machine.python()
    assert "'gpu'" in machine.refusal(MEMTRAIN_EXTRA="gpu")
    assert "'--fats'" in machine.run("--fats", code=2).stderr


# --- what it does, and when it has nothing to do -------------------------------------------------


@pytest.fixture
def ready(machine: Machine) -> Machine:
    """A machine whose set-up has been done once."""
    machine.python()
    machine.uv()
    machine.run()
    assert (machine.root / ".venv/bin/python").exists()
    assert "--require-hashes" in machine.uv_calls[0]
    assert f"-r {machine.root}/requirements/cpu.txt" in machine.uv_calls[0]
    assert f"--no-deps --no-build-isolation --reinstall -e {machine.root}" in machine.uv_calls[1]
    (machine.home / "uv.log").unlink()
    return machine


def test_done_is_quick_starts_no_python_and_says_nothing(ready: Machine) -> None:
    ready.command("python3.12", "exit 1")
    ready.command("uv", "exit 1")
    times = []
    for _ in range(5):
        began = time.perf_counter()
        result = ready.run()
        times.append(time.perf_counter() - began)
        assert result.stdout + result.stderr == ""
    assert min(times) < 0.5, times
    assert ready.uv_calls == []


@pytest.mark.parametrize("name", ["requirements/cpu.txt", "pyproject.toml"])
def test_changed_inputs_are_installed_over(ready: Machine, name: str) -> None:
    (ready.root / ".venv/mine").touch()
    (ready.root / name).write_text("# changed\n")
    assert f"{name} has changed" in ready.run().stderr
    assert len(ready.uv_calls) == 2
    assert (ready.root / ".venv/mine").exists()
    assert ready.run().stderr == ""


def test_other_builds_do_not_concern_it(ready: Machine) -> None:
    (ready.root / "requirements/cuda.txt").write_text("# changed\n")
    assert ready.run().stderr == ""


def test_an_interrupted_set_up_is_made_anew(machine: Machine) -> None:
    machine.python()
    machine.uv("exit 7")
    assert "installation failed" in machine.run(code=1).stderr
    half_made = machine.root / ".venv/half-made"
    half_made.touch()
    machine.uv()
    assert "interrupted" in machine.run().stderr
    assert not half_made.exists()
    assert machine.run().stderr == ""


def test_an_interrupted_update_is_not_taken_for_done(ready: Machine) -> None:
    before = (ready.root / "requirements/cpu.txt").read_text()
    (ready.root / "requirements/cpu.txt").write_text("# changed\n")
    ready.uv("exit 7")
    ready.run(code=1)
    # Back to what the stamp of the first set-up described: half the packages may be the others.
    (ready.root / "requirements/cpu.txt").write_text(before)
    ready.uv()
    assert "interrupted" in ready.run().stderr


def test_an_environment_that_moved_or_lost_its_python_is_made_anew(ready: Machine) -> None:
    moved = ready.root.with_name("moved")
    ready.root.rename(moved)
    ready.root = moved
    assert "another folder" in ready.run().stderr
    (moved / ".venv/bin/python").unlink()
    assert "Python is gone" in ready.run().stderr
    assert ready.run().stderr == ""


def test_a_gpu_that_appears_changes_the_build_and_a_forced_build_stays(ready: Machine) -> None:
    ready.command("nvidia-smi", "echo 580.65.06, 9.0, NVIDIA H200")
    assert "taking the cuda build: found NVIDIA H200" in ready.run().stderr
    assert ready.run().stderr == ""
    assert "taking the cpu build" in ready.run(MEMTRAIN_EXTRA="cpu").stderr
    assert ready.run().stderr == ""
    assert "taking the cuda build" in ready.run(MEMTRAIN_EXTRA="auto").stderr
    assert ready.run().stderr == ""


def test_an_old_driver_is_looked_at_once_and_costs_no_installation(ready: Machine) -> None:
    ready.command("nvidia-smi", f'echo asked >>"{ready.home}/asked"; echo 550.1, 9.0, NVIDIA H100')
    ready.run()
    ready.run()
    assert ready.uv_calls == []
    asked = (ready.home / "asked").read_text().splitlines()
    assert len(asked) == 2  # once before the lock, once under it; not in the second run


def test_a_venv_of_the_users_own_is_kept(machine: Machine) -> None:
    machine.python()
    machine.uv()
    venv = machine.root / ".venv"
    subprocess.run([BASE_PYTHON, "-m", "venv", "--without-pip", venv], check=True)
    (venv / "mine").touch()
    assert "your own" in machine.run().stderr
    assert len(machine.uv_calls) == 2
    (machine.root / "pyproject.toml").write_text("# changed\n")
    machine.run()
    assert len(machine.uv_calls) == 4
    (venv / ".memtrain/stamp").unlink()
    machine.run()
    assert len(machine.uv_calls) == 6
    assert (venv / "mine").exists()
    assert machine.run().stderr == ""


def test_what_is_in_the_way_is_not_removed(machine: Machine) -> None:
    machine.python()
    venv = machine.root / ".venv"
    venv.mkdir()
    (venv / "letters").write_text("dear")
    assert "move it away" in machine.refusal()
    assert (venv / "letters").read_text() == "dear"
    shutil.rmtree(venv)
    venv.write_text("a file")
    assert "no folder" in machine.refusal()
    venv.unlink()
    machine.command(f"{venv}/bin/python", OLD)
    (venv / "pyvenv.cfg").touch()
    assert "3.11.7" in machine.refusal()


def test_two_at_once_take_turns(machine: Machine) -> None:
    machine.python()
    guard = machine.home / "at work"
    machine.uv(
        f'mkdir "{guard}" || echo CLASH >>"{machine.home}/uv.log"; sleep 0.4; rm -r "{guard}"'
    )
    processes = [machine.start() for _ in range(3)]
    errors = [process.communicate(timeout=60)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], errors
    # One did it, and the others found it done when their turn came.
    assert len(machine.uv_calls) == 2, machine.uv_calls
    assert sum("done in" in error for error in errors) == 1


def test_a_killed_set_up_leaves_no_lock(machine: Machine) -> None:
    machine.python()
    machine.uv(f'touch "{machine.home}/started"; exec sleep 1')
    first = machine.start()
    while not (machine.home / "started").exists():
        assert first.poll() is None
        time.sleep(0.02)
    first.kill()
    first.communicate()
    machine.uv()
    result = machine.run()
    assert "interrupted" in result.stderr and "done in" in result.stderr


def test_pip_is_the_installer_where_there_is_no_uv(machine: Machine) -> None:
    machine.python()
    machine.command("uv", "exit 127")  # a shim without its program
    assert machine.plan()["installer"] == "pip"


def test_a_dry_run_does_nothing(machine: Machine) -> None:
    machine.python()
    machine.uv()
    plan = machine.plan()
    assert (plan["action"], plan["installer"]) == ("make", "uv")
    assert sorted(os.listdir(machine.root)) == ["pyproject.toml", "requirements", "tools"]
    assert machine.uv_calls == []
