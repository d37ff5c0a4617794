"""What is pinned, what is packed, and what the project says of itself."""

import email
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PINS = {path.stem: path.read_text() for path in sorted((ROOT / "requirements").glob("*.txt"))}
DEVICE = {"cpu": [], "cuda": ["cuda"], "tpu": ["tpu"], "floor": []}


def pinned(name: str) -> dict[str, str]:
    """Package name -> version, checked line by line: each with hashes, and nothing else."""
    found: dict[str, str] = {}
    text = "".join(line for line in PINS[name].splitlines(True) if not line.startswith("#"))
    for block in text.replace("\\\n", " ").splitlines():
        requirement, *hashes = re.split(r"\s+--hash=", block.strip())
        assert hashes, f"{name}: no hash in {block!r}"
        assert all(re.fullmatch("sha256:[0-9a-f]{64}", value) for value in hashes), block
        parsed = Requirement(requirement)
        version = re.fullmatch(r"==([^,*]+)", str(parsed.specifier))
        assert version and parsed.url is None and not parsed.extras, block
        # One version for all platforms and Pythons.
        assert parsed.name not in found, f"{name}: {parsed.name} twice"
        found[parsed.name] = version[1]
    return found


def asked_for(extras: list[str]) -> list[Requirement]:
    """The requirements of pyproject.toml with these extras, its own ones followed."""
    lines = list(PROJECT["dependencies"])
    for extra in extras:
        lines += PROJECT["optional-dependencies"][extra]
    asked: list[Requirement] = []
    for requirement in map(Requirement, lines):
        if requirement.name == PROJECT["name"]:
            asked += asked_for(sorted(requirement.extras))
        else:
            asked.append(requirement)
    return asked


def test_there_is_a_file_a_device() -> None:
    assert sorted(PINS) == sorted([*DEVICE, "lint", "aot-tpu"])


@pytest.mark.parametrize("name", sorted(PINS))
def test_pins_have_hashes_and_name_no_place(name: str) -> None:
    assert pinned(name)
    assert not re.search(r"://|index|find-links|@ |file:", PINS[name])
    assert len(PINS[name]) < 2**20


@pytest.mark.parametrize("name", sorted(DEVICE))
def test_pins_are_what_pyproject_asks_for(name: str) -> None:
    pins = pinned(name)
    for requirement in asked_for(["dev", *DEVICE[name]]):
        version = pins.get(canonicalize_name(requirement.name))
        assert version, f"{name}: {requirement.name} is missing: run tools/lock"
        assert requirement.specifier.contains(version), f"{requirement}: run tools/lock"


def test_devices_differ_by_their_own_packages_only() -> None:
    cpu, floor = pinned("cpu"), pinned("floor")
    for name in ("cuda", "tpu"):
        pins = pinned(name)
        assert {package: pins.get(package) for package in cpu} == cpu
        assert pins["jax"] == pins["jaxlib"]
    assert pinned("cuda")["jax-cuda13-plugin"] == cpu["jax"]
    assert "libtpu" in pinned("tpu")
    assert (floor["jax"], floor["jaxlib"]) == ("0.11.2", "0.11.2")


def test_the_floor_is_the_oldest_jax_that_pyproject_allows() -> None:
    (jax,) = [requirement for requirement in asked_for([]) if requirement.name == "jax"]
    assert str(jax.specifier) == ">=0.11.2"


def test_no_file_names_a_package_index() -> None:
    files = [ROOT / "pyproject.toml", ROOT / ".ci/run"]
    for folder in ("tools", "requirements", "docs", "memtrain", "kernels", "experiments"):
        files += [path for path in (ROOT / folder).rglob("*") if path.suffix != ".pyc"]
    for path in filter(Path.is_file, files):
        text = path.read_bytes()
        assert not re.search(rb"--(extra-)?index(-url)?[= ]|/simple\b|pypi\.org", text), path


def test_the_wheel_holds_both_packages_and_the_licence(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "hatchling", "build", "--target", "wheel"]
    subprocess.run([*build, "--directory", tmp_path], cwd=ROOT, check=True, capture_output=True)
    (path,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(path) as wheel:
        names = set(wheel.namelist())
        (metadata,) = [name for name in names if name.endswith("/METADATA")]
        facts = email.message_from_bytes(wheel.read(metadata))
        (entry_points,) = [name for name in names if name.endswith("/entry_points.txt")]
        assert "memtrain = memtrain.cli:main" in wheel.read(entry_points).decode()
    for package, folder in (("memtrain", ROOT), ("memtrain_kernels", ROOT / "kernels")):
        sources = {str(file.relative_to(folder)) for file in (folder / package).rglob("*.py")}
        assert sources and sources <= names
    tops = {name.split("/")[0] for name in names}
    assert tops == {"memtrain", "memtrain_kernels", f"memtrain-{PROJECT['version']}.dist-info"}
    assert facts["License-Expression"] == "Apache-2.0"
    assert facts.get_all("License-File") == ["LICENSE"]
    assert facts["Requires-Python"] == ">=3.12"


def test_citation_and_changelog_agree_with_the_project() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["title"] == PROJECT["name"]
    assert citation["version"] == PROJECT["version"]
    assert citation["license"] == PROJECT["license"]
    assert citation["authors"] == [{"name": PROJECT["authors"][0]["name"]}]
    assert f"## [{PROJECT['version']}]" in (ROOT / "CHANGELOG.md").read_text()
    assert "Apache License" in (ROOT / "LICENSE").read_text()
