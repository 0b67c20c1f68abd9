"""What the documents say is so."""

import re
from pathlib import Path

from tests.house.tree import parts, tree

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])


def test_the_tree_in_architecture_is_the_tree_on_disk() -> None:
    assert parts()[1] == tree(), "run `python -m tests.house.tree`"


def test_every_module_says_what_it_promises() -> None:
    silent = [line for line in tree().splitlines() if line.startswith("  ") and len(line.split()) < 3]
    assert silent == []


def test_links_and_pictures_between_pages_exist() -> None:
    assert PAGES
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            if not target.startswith(("http:", "https:")):
                assert (page.parent / target).exists(), f"{page.name}: {target}"
