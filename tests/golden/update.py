"""Rewrite the golden numbers of pure code: `python -m tests.golden.update`. A diff breaks old runs."""

import json
from pathlib import Path

from tests.golden import sampling


def main() -> None:
    """Write every JSON that this package computes itself."""
    path = Path(__file__).parent / "sampling.json"
    path.write_text(json.dumps(sampling.numbers(), indent=1) + "\n")
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
