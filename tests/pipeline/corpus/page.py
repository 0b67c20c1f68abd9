"""docs/bad-inputs.md: every mutation, what must become of it, and what did: `make bad-inputs`."""

import sys
import tempfile
from collections import Counter
from collections.abc import Mapping
from itertools import groupby
from pathlib import Path

from tests.pipeline.corpus.cases import CASES
from tests.pipeline.corpus.good import save_good
from tests.pipeline.corpus.run import Got, run_cases

PAGE = Path(__file__).parents[3] / "docs" / "bad-inputs.md"

_TOP = """# Bad inputs, and what becomes of them

Written by `make bad-inputs`; do not edit. Each line is a folder that tests/pipeline/corpus/ makes from a real chest CT
by one mutation, read beside a healthy file that must be accepted every time. *Accepted* means that voxels and place
were compared with what the input truly holds; the words after it are what the manifest row records. *Refused* names the
reason code of the quarantine row. Cases run in processes with limits (30 seconds, 1 GiB), so that a crash or a hang
would stand in the last column, where what was not expected is bold.

Not found, because nothing in a file says it: sizes swapped along two axes of equal voxel size, a scan mirrored together
with its header, and a shift of HU by much less than 1000.
"""


def page(got: Mapping[str, Got]) -> str:
    """The page, from what became of each case."""
    num_right = sum(got[case.key].outcomes == case.expected for case in CASES)
    num_accepted = sum(any(outcome.startswith("accepted") for outcome in case.expected) for case in CASES)
    lines = [
        _TOP,
        f"{len(CASES)} mutations: {num_accepted} to be accepted, {len(CASES) - num_accepted} to be refused; "
        f"{num_right} with the outcome expected, {len(CASES) - num_right} without.",
    ]
    for family, cases in groupby(CASES, lambda case: case.family):
        lines += ["", f"## {family}", "", "| mutation | expected | got |", "|---|---|---|"]
        for case in cases:
            outcomes = got[case.key].outcomes
            told = _shown(outcomes) if outcomes == case.expected else f"**{_shown(outcomes)}**"
            lines.append(f"| {case.name.replace('|', ' ')} | {_shown(case.expected)} | {told} |")
    return "\n".join(lines) + "\n"


def _shown(outcomes: tuple[str, ...]) -> str:
    counted = Counter(outcomes)
    return "; ".join(outcome if count == 1 else f"{count} x {outcome}" for outcome, count in counted.items())


def main() -> int:
    """Run all cases and write the page; 1 where an outcome is not the expected one."""
    with tempfile.TemporaryDirectory() as folder:
        good = Path(folder) / "good.npy"
        save_good(good)
        got = {case.key: result for case, result in run_cases(CASES, good)}
    PAGE.write_text(page(got), encoding="utf-8")
    wrong = [case for case in CASES if got[case.key].outcomes != case.expected]
    for case in wrong:
        print(f"{case.key}: expected {_shown(case.expected)}, got {_shown(got[case.key].outcomes)}", file=sys.stderr)
    print(f"{PAGE.name}: {len(CASES)} mutations, {len(wrong)} with another outcome than expected")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
