"""The README's Python runs, its commands exist, and its links lead somewhere."""

import doctest
import re
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


@pytest.mark.full
def test_the_snippet_runs():
    found = doctest.testfile(str(ROOT / "README.md"), module_relative=False, verbose=False)
    assert found.attempted >= 10
    assert found.failed == 0


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_and_pictures_exist(page: Path):
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (page.parent / target).exists(), target


def test_nothing_is_left_to_fill_in():
    assert not re.findall(r"@[A-Z]+@", (ROOT / "README.md").read_text(encoding="utf-8"))


def test_commands_named_in_the_readme_exist():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for path in re.findall(r"(?:experiments|tests|tools)/[\w/.-]+", text):
        assert (ROOT / path.rstrip(".")).exists(), path
