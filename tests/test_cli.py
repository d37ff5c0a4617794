"""The command line: what it prints where, exit codes, one line for every error, and the doctor."""

import errno
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from memtrain import commands, runtime
from memtrain.cli import main
from memtrain.commands import parse_seeds, spread_set
from memtrain.console import as_json, as_text
from memtrain.doctor import supported
from memtrain.errors import BadInput, PeerLost, Preempted, StorageFailed


COMMANDS = ["train", "export", "import", "generate", "evaluate", "report", "plan", "doctor"]


@dataclass(frozen=True, kw_only=True)
class Probe:
    """A command that does what a test asks of it."""

    json: bool = False

    action: ClassVar[list[Callable[[], Any]]] = []

    def run(self) -> dict[str, Any]:
        return self.action[0]()


@pytest.fixture
def probe(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Adds the command `probe` that does what it is given."""
    monkeypatch.setitem(commands.COMMANDS, "probe", Probe)
    return lambda action: monkeypatch.setattr(Probe, "action", [action])


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs code in a new Python, without what the tests' own environment sets for JAX."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_", "MEMTRAIN_"))}
    return subprocess.run(
        [sys.executable, "-c", code],
        env=kept | {"JAX_PLATFORMS": "cpu"} | environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


# Help


def test_help_is_quick_and_imports_no_jax():
    code = f"""
import sys, time
from memtrain.cli import main
assert main(["--help"]) == 0
print(time.process_time(), file=sys.stderr)
for command in {COMMANDS}:
    print("#", command)
    assert main([command, "--help"]) == 0
assert main(["train", "no/recipe.py", "--set", "a=1"]) == 2
loaded = {{"jax", "flax", "orbax", "grain", "numpy"}} & set(sys.modules)
assert not loaded, loaded
"""
    done = python(code)
    assert done.returncode == 0, done.stderr
    assert float(done.stderr.splitlines()[0]) < 1.0  # CPU seconds, from Python's start.
    overview, *helps = re.split(r"^# \w+\n", done.stdout, flags=re.MULTILINE)
    assert all(command in overview for command in COMMANDS)
    wanted = {
        "train": "RECIPE --run-dir --set --seeds --json",
        "export": "RUN --step --out --huggingface --json",
        "import": "FOLDER --out --dtype --json",
        "generate": "ARTIFACT --prompt --max-tokens --temperature --top-k --top-p --seed --without",
        "evaluate": "RUN|ARTIFACT --task --data --without --set --json",
        "report": "RUN --json",
        "plan": "RECIPE --target --set --sweep --plot --compile --no-compile --shardings --json",
        "doctor": "--json",
    }
    for command, text in zip(COMMANDS, helps, strict=True):
        assert not [option for option in wanted[command].split() if option not in text]


def test_version(capsys: pytest.CaptureFixture[str]):
    assert main(["--version"]) == 0
    assert re.fullmatch(r"memtrain \d+\.\d+\.\d+\n", capsys.readouterr().out)


# Bad input


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("", "expected a command first: train, export,"),
        ("--json", "expected a command first: train, export,"),
        ("trian", "unknown command 'trian': did you mean 'train'?"),
        ("zzz", "unknown command 'zzz': there are train, export,"),
        ("train", "missing RECIPE; see memtrain train --help"),
        ("train r.py --jsn", "unknown option --jsn: did you mean --json?"),
        ("train r.py --zzz", "unknown option --zzz; see memtrain train --help"),
        ("train r.py other.py", "unexpected 'other.py': give a value after its option"),
        ("train r.py --set", "--set needs a value"),
        ("export run", "missing --out MODEL.MTX or --huggingface FOLDER"),
        ("export run --out m --huggingface f", "only one of --out MODEL.MTX or --huggingface"),
        ("export run --huggingface f --dtype float32", "--dtype: --huggingface writes parameters"),
        ("import model", "missing --out MODEL.MTX; see memtrain import --help"),
        ("import {tmp}/none --out {tmp}/m", "there is no folder {tmp}/none"),
        ("export run --out m --step x", "--step: expected a whole number, got 'x'"),
        ("export run --out m --step=x", "--step: expected a whole number, got 'x'"),
        ("generate a --prompt p --temprature 1", "unknown option --temprature: did you mean"),
        ("generate a --prompt p --top-p much", "--top-p: expected a number, got 'much'"),
        ("evaluate a --task bqb", "--task: expected one of associative, bpb, copy, facts, "),
        # What the options say is checked before anything heavy is imported.
        ("train {tmp}/no.py", "there is no recipe {tmp}/no.py: a recipe is path/to/file.py"),
        ("train {tmp}/raises.py", "{tmp}/raises.py:1: ZeroDivisionError: division by zero"),
        (
            "train {tmp}/good.py --set train.num_stepz=1",
            "unknown key 'train.num_stepz': did you mean 'train.num_steps'?",
        ),
        (
            "train {tmp}/good.py --set train.seed=1 train.num_steps=many",
            "train.num_steps: expected a whole number, got 'many'",
        ),
        ("train {tmp}/good.py --set train.batch_size=3 --set mesh.data=2", "train.batch_size=3 c"),
        ("train {tmp}/good.py --set seed", "override 'seed': expected key=value"),
        ("train {tmp}/good.py --seeds none", "--seeds 'none': expected how many"),
        ("train {tmp}/good.py --run-dir {tmp}/good.py", "--run-dir {tmp}/good.py is a file"),
        ("export {tmp}/none --out {tmp}/m", "there is no run {tmp}/none"),
        ("export {tmp} --out {tmp}/m --step -1", "--step -1: expected at least 0"),
        ("generate {tmp}/good.py --prompt p", "{tmp}/good.py is a file: expected the folder of"),
        ("generate {tmp} --prompt p --max-tokens 0", "--max-tokens 0: expected at least 1"),
        ("generate {tmp} --prompt p --temperature nan", "--temperature nan: expected at least 0"),
        ("generate {tmp} --prompt p --top-k 0", "--top-k 0: expected at least 1"),
        ("generate {tmp} --prompt p --top-p 0", "--top-p 0.0: expected more than 0 and at most 1"),
        ("evaluate {tmp}/none --task bpb", "there is no run or artifact {tmp}/none"),
        ("report {tmp}/none", "there is no run {tmp}/none"),
        ("plan {tmp}/no.py", "there is no recipe {tmp}/no.py: a recipe is path/to/file.py"),
        ("plan {tmp}/good.py --target v7:4", "--target 'v7:4' is not known: there are v5e:AxB,"),
        ("plan {tmp}/good.py --plot a.png", "--plot draws a sweep: give --sweep KEY=V1,V2,... too"),
        ("plan {tmp}/good.py --compile", "--compile: give --target too"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: str, said: str
):
    (tmp_path / "raises.py").write_text("x = 1 / 0\n", encoding="utf-8")
    (tmp_path / "good.py").write_text(
        "from memtrain.config import Experiment\nfrom memtrain.model.config import ModelConfig\n"
        "def recipe():\n    return Experiment(name='x', model=ModelConfig())\n",
        encoding="utf-8",
    )
    before = sorted(tmp_path.iterdir())
    words = [word.format(tmp=tmp_path) for word in arguments.split()]
    assert main(words) == 2
    out, err = capsys.readouterr()
    assert err.startswith(f"memtrain: error: {said.format(tmp=tmp_path)}")
    assert err.count("\n") == 1
    made = [path for path in sorted(tmp_path.iterdir()) if path.name != "__pycache__"]
    assert made == before
    if "--json" not in words:
        assert out == ""
        if "--json" not in arguments:
            assert main([*words, "--json"]) == 2
            out, again = capsys.readouterr()
            assert again.count("\n") == 1
    told = json.loads(out)
    assert told["exit_code"] == 2
    assert f"memtrain: error: {told['error']}\n" == err or words == []


# Exit codes


def full_disk() -> None:
    """Raises what the system raises on a full disk."""
    with open("/dev/full", "wb", buffering=0) as file:
        file.write(b"x")


def wrapped_full_disk() -> None:
    try:
        full_disk()
    except OSError as error:
        raise RuntimeError("could not save") from error


def full_disk_in_cpp() -> None:
    raise ValueError("RESOURCE_EXHAUSTED: Error writing: [OS error 28: No space left on device]")


def over_quota() -> None:
    raise ExceptionGroup("tasks", [OSError(errno.EDQUOT, "quota", "a/file")])


def raising(error: BaseException) -> Callable[[], None]:
    def action() -> None:
        raise error

    return action


@pytest.mark.parametrize(
    ("action", "code", "said"),
    [
        (raising(BadInput("two\nlines")), 2, "two lines"),
        (raising(PeerLost("host 3 is gone")), 71, "host 3 is gone"),
        (raising(StorageFailed("the disk is gone")), 74, "the disk is gone"),
        (raising(Preempted("saved at step 7")), 75, "saved at step 7"),
        (full_disk, 74, "No space left on device"),
        (wrapped_full_disk, 74, "No space left on device"),
        (full_disk_in_cpp, 74, "No space left on device"),
        (over_quota, 74, "a/file: Disk quota exceeded"),
    ],
)
def test_errors_for_people_are_one_line(
    probe: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    action: Callable[[], None],
    code: int,
    said: str,
):
    probe(action)
    assert main(["probe"]) == code
    out, err = capsys.readouterr()
    assert out == ""
    # A job that was asked to stop and has saved did nothing wrong.
    kind = "" if code == 75 else "error: "
    assert err.startswith(f"memtrain: {kind}{said}")
    assert err.count("\n") == 1

    assert main(["probe", "--json"]) == code
    told = json.loads(capsys.readouterr().out)
    assert told["exit_code"] == code
    assert told["error"].startswith(said)

    monkeypatch.setenv("MEMTRAIN_TRACEBACK", "1")
    assert main(["probe"]) == code
    err = capsys.readouterr().err
    assert "Traceback (most recent call last)" in err
    assert err.splitlines()[-1].startswith(f"memtrain: {kind}{said}")


def test_a_bug_of_ours_shows_its_traceback(
    probe: Callable[..., None], capsys: pytest.CaptureFixture[str]
):
    probe(lambda: {}["nothing"])
    assert main(["probe"]) == 1
    assert "KeyError: 'nothing'" in capsys.readouterr().err
    assert main(["probe", "--json"]) == 1
    assert json.loads(capsys.readouterr().out) == {"error": "KeyError: 'nothing'", "exit_code": 1}


def test_a_bug_while_handling_bad_input_is_a_bug(probe: Callable[..., None]):
    def action() -> None:
        try:
            raise BadInput("x")
        except BadInput:
            raise KeyError("y")  # noqa: B904 - just what is tested.

    probe(action)
    assert main(["probe"]) == 1


def test_an_interrupt_is_quiet(probe: Callable[..., None], capsys: pytest.CaptureFixture[str]):
    probe(raising(KeyboardInterrupt()))
    assert main(["probe"]) == 130
    assert capsys.readouterr() == ("", "")
    assert main(["probe", "--json"]) == 130
    assert json.loads(capsys.readouterr().out)["exit_code"] == 130


# Output


def test_with_json_one_object_is_on_stdout_and_the_rest_on_stderr():
    code = """
import os, subprocess, sys
from dataclasses import dataclass
from memtrain import cli, commands

@dataclass(frozen=True, kw_only=True)
class Probe:
    json: bool = False
    def run(self):
        print("progress of ours", flush=True)
        print("half a line, not flushed", end="")
        os.write(1, b"a library in C\\n")
        subprocess.run(["echo", "a child"], check=True)
        return {"loss": float("nan"), "steps": 3}

commands.COMMANDS["probe"] = Probe
print("before")
assert cli.main(["probe", "--json"]) == 0
print("after")
"""
    done = python(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout == 'before\n{"loss": null, "steps": 3}\nafter\n'
    for noise in ("progress of ours", "half a line, not flushed", "a library in C", "a child"):
        assert noise in done.stderr


@pytest.mark.parametrize("arguments", [["doctor", "--help"], ["--version"], ["no", "--json"]])
def test_a_full_stdout_is_storage_failed(arguments: list[str]):
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "memtrain", *arguments],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
            check=False,
        )
    assert done.returncode == 74
    assert "No space left on device" in done.stderr
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr


def test_results_are_strict_json():
    result = {"a": np.float32(1.5), "b": np.arange(2), "c": float("inf"), "d": Path("x"), 1: (2,)}
    told = {"a": 1.5, "b": [0, 1], "c": None, "d": "x", "1": [2]}
    assert json.loads(as_json(result)) == told


def test_results_for_people_are_lines_and_tables():
    result = {
        "bits_per_byte": 2.09876,
        "tokens": 1_000_000,
        "ok": True,
        "without": [],
        "by_distance": [{"distance": 8, "accuracy": 1.0}, {"distance": 1024, "accuracy": 0.25}],
    }
    assert as_text(result).splitlines() == [
        "bits_per_byte  2.099",
        "tokens         1000000",
        "ok             yes",
        "without        -",
        "",
        "by_distance",
        "  distance  accuracy",
        "  8         1",
        "  1024      0.25",
    ]


# Arguments


def test_set_takes_several_values_and_leaves_the_recipe():
    typed = ["train", "--set", "a=1", "b=2", "recipe.py", "--set", "c=3", "--json", "d=4"]
    assert spread_set(typed) == [*typed[:3], "--set", *typed[3:]]
    typed = ["train", "--set", "a=1", "b=2", "r.py", "--set=c=3", "--run-dir", "d"]
    command = commands.parse(typed)
    assert (command.recipe, command.set) == ("r.py", ("a=1", "b=2", "c=3"))
    assert (command.run_dir, command.seeds, command.json) == (Path("d"), None, False)


def test_repeated_options_add_up():
    words = "evaluate a --task bpb --data x --data y --without m --without n"
    command = commands.parse([*words.split()])
    assert command.data == (Path("x"), Path("y"))
    assert command.without == ("m", "n")
    assert commands.parse(["generate", "a", "--prompt=-p"]).prompt == "-p"


def test_a_model_does_not_command_the_terminal():
    assert commands.printable("a\tb\n\x1b[2J\u00e9\x07") == "a\tb\n\ufffd[2J\u00e9\ufffd"


def test_seeds_are_a_number_or_a_list():
    assert parse_seeds("3", 5) == [5, 6, 7]
    assert parse_seeds("0,7, 9", 5) == [0, 7, 9]
    assert parse_seeds("7,", 5) == [7]
    for wrong in ("0", "-1", "a", "1,b", "", ",", "1,1"):
        with pytest.raises(BadInput, match="--seeds"):
            parse_seeds(wrong, 0)


# Runtime and doctor


# Prints last how many programs were found in the cache, and how many were not.
COUNT_HITS = """
import atexit, sys
import jax.monitoring
events = []
jax.monitoring.register_event_listener(lambda event, **_: events.append(event.split("/")[-1]))
count = lambda: print(*map(events.count, ("cache_hits", "cache_misses")), file=sys.stderr)
atexit.register(count)
"""


def test_devices_are_simulated_the_cache_is_used_and_the_doctor_is_content(tmp_path: Path):
    cache = tmp_path / "cache"
    cold = """
from memtrain import runtime
from memtrain.cli import main
from memtrain.errors import BadInput
runtime.prepare(3)
code = main(["doctor", "--json"])
try:
    runtime.prepare(4)
except BadInput as error:
    print(error, file=sys.stderr)
raise SystemExit(code)
"""
    done = python(COUNT_HITS + cold, MEMTRAIN_CACHE=str(cache))
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    found = {check["name"]: check for check in result["checks"]}
    assert result["usable"]
    assert "broken" not in {check["status"] for check in result["checks"]}
    assert found["devices"]["found"].startswith("3 cpu")
    assert found["cache"]["found"].startswith(str(cache))
    assert float(found["attention"]["found"].split()[2]) < 1e-5
    assert ": xla (automatic: " in found["kernels"]["found"]
    simulated, *others, refused, counts = done.stderr.splitlines()
    assert simulated.startswith("memtrain: no accelerator found: 3 devices are simulated")
    assert refused.startswith("the mesh needs 4 devices and JAX has started with 3:")
    assert all(line.startswith("memtrain_kernels: ") for line in others), others
    assert int(counts.split()[1]) > 0

    warm = """
from memtrain import doctor, runtime
runtime.prepare(3)
print(doctor._attention().status)
"""
    done = python(COUNT_HITS + warm, MEMTRAIN_CACHE=str(cache))
    assert done.stdout == "ok\n"
    simulated, *others, counts = done.stderr.splitlines()
    assert all(line.startswith("memtrain_kernels: ") for line in others), others
    hits, misses = map(int, counts.split())
    assert hits > 0
    assert misses == 0


@pytest.mark.parametrize(
    ("environment", "folder"),
    [
        ({"JAX_COMPILATION_CACHE_DIR": "/a/b", "MEMTRAIN_CACHE": "/c"}, "/a/b"),
        ({"MEMTRAIN_CACHE": "/c"}, "/c/xla/"),
        ({"XDG_CACHE_HOME": "/d"}, "/d/memtrain/xla/"),
        ({"HOME": "/home/me"}, "/home/me/.cache/memtrain/xla/"),
        ({"MEMTRAIN_CACHE": "off"}, "None"),
    ],
)
def test_the_cache_is_where_it_is_said_to_be(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], folder: str
):
    for name in ("JAX_COMPILATION_CACHE_DIR", "MEMTRAIN_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert str(runtime.cache_folder()).startswith(folder)


@pytest.mark.parametrize(
    ("environment", "flags", "said"),
    [
        ({}, "--xla_force_host_platform_device_count=8", 1),
        ({"XLA_FLAGS": "--xla_x=1"}, "--xla_x=1 --xla_force_host_platform_device_count=8", 1),
        ({"SLURM_NTASKS": "4"}, "--xla_force_host_platform_device_count=2", 1),
        ({"SLURM_NTASKS": "8"}, "", 0),
        ({"JAX_NUM_CPU_DEVICES": "8"}, "", 0),
        (
            {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"},
            "--xla_force_host_platform_device_count=4",
            0,
        ),
    ],
)
def test_explicit_device_counts_win(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], flags: str, said: int
):
    for name in ("XLA_FLAGS", "SLURM_NTASKS", "JAX_COORDINATOR_ADDRESS", "JAX_NUM_CPU_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setattr(runtime, "_backend_started", lambda: False)
    lines: list[str] = []
    runtime._simulate_devices(8, lines.append)
    found = os.environ.get("XLA_FLAGS", "")
    if said:
        # Simulated devices that share a core may keep each other waiting.
        begin = found.index(" --xla_cpu_collective")
        found, patience = found[:begin], found[begin:]
        assert patience.count("timeout_seconds=86400") == 2
    assert found == flags
    assert len(lines) == said


@pytest.mark.parametrize(
    ("version", "specifier", "met"),
    [
        ("0.12.0.1", ">=0.11.2", True),
        ("0.11.2", ">=0.11.2", True),
        ("0.11.1", ">=0.11.2", False),
        ("0.13.0", ">=0.12.8,<0.13", False),
        ("0.12.9rc1", ">=0.12.8,<0.13", True),
        ("1.0", "", True),
        ("2", "==2.0.0", True),
    ],
)
def test_version_requirements(version: str, specifier: str, met: bool):
    assert supported(version, specifier) is met


def test_the_documented_commands_are_understood():
    text = (Path(__file__).parents[1] / "docs" / "command-line.md").read_text(encoding="utf-8")
    typed = [line for line in text.splitlines() if line.startswith("memtrain ")]
    assert {line.split()[1] for line in typed} == set(COMMANDS)
    for line in typed:
        commands.parse(shlex.split(line)[1:])
