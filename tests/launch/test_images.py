"""The Dockerfile as far as it can be looked at without building it, and what the image without torch needs."""

import ast
import sys
import tomllib
from fnmatch import fnmatch

from tests.launch.launches import ROOT

NAMES = {"yaml": "PyYAML", "PIL": "pillow", "google_crc32c": "google-crc32c", "ray": "ray[default]"}
"""Packages whose name is not that of what is imported."""
FLOORS = ["store", "config", "config_file.py", "commit.py", "errors.py", "bar.py", "ray_cluster.py"]
"""What data_pipeline stands on."""
HEAVY = {"torch", "deepspeed", "monai", "mlflow"}


def instructions() -> list[list[str]]:
    lines = [line for line in (ROOT / "Dockerfile").read_text().splitlines() if not line.startswith("#")]
    return [line.split() for line in "\n".join(lines).replace("\\\n", " ").splitlines() if line]


def stages() -> dict[str, list[list[str]]]:
    found: dict[str, list[list[str]]] = {}
    for words in instructions():
        if words[0] == "FROM":
            name = words[3]
            found[name] = []
        found[name].append(words)
    return found


def requirements() -> tuple[dict[str, str], dict[str, str]]:
    """Of the whole project, and of the group that builds stores; by name, with their ranges."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    lists = (project["project"]["dependencies"], project["dependency-groups"]["shards"])
    whole, group = ({line.split(">")[0]: line for line in one} for one in lists)
    return whole, group


def test_stages() -> None:
    assert list(stages()) == ["base", "shards", "train"], "the last is what `docker build .` makes"
    (image,) = {words[1] for words in instructions() if words[0] == "FROM"} - set(stages())
    assert image.startswith("python:3.11-")
    for name in ("shards", "train"):
        users = [words for words in stages()[name] if words[0] == "USER"]
        assert users == [["USER", "1000:1000"]], name
        kinds = [words[0] for words in stages()[name]]
        assert kinds.index("RUN") < kinds.index("COPY"), "requirements first"


def test_what_is_copied_exists_and_is_sent_to_the_builder() -> None:
    rules = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    assert rules[0] == "*"
    sent = {line.removeprefix("!") for line in rules if line.startswith("!")}
    copied = {word for words in instructions() if words[0] == "COPY" for word in words[1:-1]}
    assert copied == sent
    assert all((ROOT / name).exists() for name in copied)
    left_out = [line for line in rules[1:] if not line.startswith("!")]
    assert any(fnmatch("mim_scale/__pycache__", line) for line in left_out)


def test_the_group_for_stores_is_a_part_of_the_project() -> None:
    whole, group = requirements()
    assert {name: whole.get(name) for name in group} == group
    assert not HEAVY & set(group)


def test_the_group_has_all_that_building_stores_imports() -> None:
    files = [*(ROOT / "data_pipeline").rglob("*.py"), ROOT / "launch" / "build_shards.py"]
    for floor in FLOORS:
        path = ROOT / "mim_scale" / floor
        assert path.exists()
        files += [path] if path.is_file() else list(path.rglob("*.py"))
    imported = set()
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                imported.add(node.module.split(".")[0])
    third_party = imported - set(sys.stdlib_module_names) - {"mim_scale", "data_pipeline"}
    assert third_party
    _, group = requirements()
    assert {NAMES.get(name, name) for name in third_party} <= set(group)
