"""The tree of ARCHITECTURE.md, made from the first lines of the modules: `python -m tests.house.tree` rewrites it."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "ARCHITECTURE.md"
FOLDERS = ("mim_scale", "data_pipeline", "launch", "examples", "benchmarks")
BEGIN, END = "<!-- tree: python -m tests.house.tree -->\n", "<!-- end of tree -->\n"


def tree() -> str:
    """One line a module: its name and the first line of its docstring."""
    lines = []
    for folder in FOLDERS:
        last: Path | None = None
        for path in sorted((ROOT / folder).rglob("*.py"), key=lambda path: (path.parent, path.name)):
            if path.name == "__init__.py" and path.parent != ROOT / "mim_scale":
                continue
            place = path.relative_to(ROOT)
            if place.parent != last:
                lines.append(f"{place.parent}/")
                last = place.parent
            first = (ast.get_docstring(ast.parse(path.read_text())) or "").split("\n")[0]
            lines.append(f"  {place.name:<24}{first}".rstrip())
    return "```\n" + "\n".join(lines) + "\n```\n"


def parts() -> tuple[str, str, str]:
    """ARCHITECTURE.md before, inside and after the tree."""
    before, rest = PAGE.read_text().split(BEGIN)
    inside, after = rest.split(END)
    return before, inside, after


if __name__ == "__main__":
    head, _, tail = parts()
    PAGE.write_text(f"{head}{BEGIN}{tree()}{END}{tail}")
