"""A launcher and ranks that take a moment instead of minutes: `python stand_ins.py launch PLAN ...`.

PLAN says for each start what becomes of its two ranks, as codes parted by commas: `kill` for kill -9, `wait` for a rank
that ends only when asked (then with 75, as ours do); the last plan is used for all further starts. Like DeepSpeed's
launcher it puts ranks in sessions of their own and ends with 247 where one was killed; like torchrun, with 1 otherwise.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from mim_scale.training.exit_report import tell_supervisor


def rank(number: int, fate: str, folder: Path) -> None:
    asked: list[int] = []
    for signum in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(signum, lambda signum, frame: asked.append(signum))
    tell_supervisor(os.environ, rank=number)
    tell_supervisor(os.environ, output=str(folder))
    (folder / f"alive_{os.getpid()}").touch()
    while fate == "wait" and not asked:
        time.sleep(0.02)
    if fate == "step":
        with open(folder / "journal.jsonl", "a+") as journal:
            journal.seek(0)
            journal.write(json.dumps({"kind": "step", "step": len(journal.readlines()) + 1}) + "\n")
        fate = "kill"
    if fate == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    code = 75 if fate == "wait" else int(fate)
    if asked:
        (folder / f"asked_{number}_{signal.Signals(asked[0]).name}").touch()
    tell_supervisor(os.environ, code=code)
    sys.exit(code)


def launch(folder: Path, plans: list[str]) -> int:
    starts = len(list(folder.glob("start_*")))
    (folder / f"start_{starts}").touch()
    plan = plans[min(starts, len(plans) - 1)]
    if plan.startswith("exit"):
        return int(plan.removeprefix("exit"))
    fates = plan.split(",")
    ranks = [
        subprocess.Popen([sys.executable, __file__, "rank", str(n), fate, str(folder)], start_new_session=True)
        for n, fate in enumerate(fates)
    ]
    codes = [process.wait() for process in ranks]
    if -signal.SIGKILL in codes:
        return 247
    return int(any(codes))


if __name__ == "__main__":
    if sys.argv[1] == "rank":
        rank(int(sys.argv[2]), sys.argv[3], Path(sys.argv[4]))
    sys.exit(launch(Path(sys.argv[2]), sys.argv[3:]))
