"""Is a build that was killed ten times the clean one? `make soak`: an archive-like tree, kills of workers and drivers.

The tree is ../shared/data unpacked and shuffled into one folder, where that is at hand, else the example volumes.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from data_pipeline.example_data import default_cache
from mim_scale.store.dataset import Dataset
from mim_scale.store.verify import verify
from tests.pipeline.archive_tree import SHARED, flatten

_KILLS = 10


def main() -> int:
    """Build once cleanly and once under fire; compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0, help="of the moments and the victims")
    parser.add_argument("--executor", choices=("local", "ray"), default="local")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="mim-scale-kills-") as folder:
        root = Path(folder)
        num_files = flatten(SHARED if SHARED.is_dir() else default_cache(), root / "tree")
        began = time.monotonic()
        _finish(root / "tree", root / "clean", options.executor)
        took = time.monotonic() - began
        kills = _under_fire(root / "tree", root / "killed", options, took)
        clean, killed = Dataset.open(root / "clean"), Dataset.open(root / "killed")
        problems = verify(root / "killed", deep=True)
        is_equal = (clean.fingerprint, clean.rows, clean.quarantine) == (
            killed.fingerprint,
            killed.rows,
            killed.quarantine,
        )
        names = {path.name for path in (root / "killed" / "volumes").iterdir()}
        leftovers = names - {f"{row.key}.zarr" for row in killed.rows}
        print(f"{num_files} files, {len(clean.rows)} volumes + {len(clean.quarantine)} quarantined; kills: {kills}")
        print(f"equal to the clean build: {is_equal}; damage: {len(problems)}; leftovers: {len(leftovers)}")
        return 0 if is_equal and not problems and not leftovers else 1


def _command(source: Path, store: Path, executor: str) -> list[str]:
    program = "from mim_scale.cli import main; main()"
    return [sys.executable, "-c", program, "data", "build", str(source), str(store), "--executor", executor]


def _finish(source: Path, store: Path, executor: str) -> None:
    done = subprocess.run(_command(source, store, executor), capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"the build ended with {done.returncode}: {done.stderr}")


def _under_fire(source: Path, store: Path, options: argparse.Namespace, took: float) -> dict[str, int]:
    """Start the build, kill something, start it again; after ten kills let it end."""
    shots = random.Random(options.seed)
    kills = {"worker": 0, "driver": 0}
    while sum(kills.values()) < _KILLS:
        driver = subprocess.Popen(
            _command(source, store, options.executor),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        victim = shots.choice(["worker", "driver"])
        time.sleep(shots.uniform(0.2, 1.0) * max(took / 6, 2.0))
        if driver.poll() is None:
            targets = _children(driver.pid) if victim == "worker" else [driver.pid]
            if targets:
                os.kill(shots.choice(targets), signal.SIGKILL)
                kills[victim] += 1
                time.sleep(shots.uniform(0.0, 1.0))
        if driver.poll() is None:
            os.kill(driver.pid, signal.SIGKILL)
            kills["driver"] += 1
        driver.wait()
    _finish(source, store, options.executor)
    return kills


def _children(pid: int) -> list[int]:
    """Processes that a process has started, and those that these have started."""
    try:
        text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    except OSError:
        return []
    found = [int(child) for child in text.split()]
    return found + [grandchild for child in found for grandchild in _children(child)]


if __name__ == "__main__":
    sys.exit(main())
