"""`mim-scale status`: what is typed in, what is shown. Heavy imports wait."""

import argparse
import json
import time
from pathlib import Path
from typing import Any


def add_status(verbs: Any) -> None:
    """Add the verb."""
    verb = verbs.add_parser(
        "status",
        help="how a run stands: progress, time left, last checkpoint",
        description="Reads the run folder alone, from any shell, while the run goes on or after it.",
    )
    verb.add_argument("run", type=Path, help="a run folder")
    verb.add_argument("--watch", action="store_true", help="again and again, until the run ends or Ctrl-C")
    verb.add_argument("--every", type=float, default=5.0, metavar="S", help="seconds between looks (default: 5)")
    verb.add_argument("--json", action="store_true", help="for scripts; one line a look")
    verb.set_defaults(verb=_status)


def _status(options: argparse.Namespace) -> int:
    from dataclasses import asdict

    from mim_scale.errors import ConfigError
    from mim_scale.training.status import read_status, told

    if options.every <= 0:
        raise ConfigError(f"--every {options.every:g}: give seconds above 0")
    while True:
        status = read_status(options.run)
        print(json.dumps(asdict(status)) if options.json else told(options.run, status), flush=True)
        if not options.watch or status.state != "running":
            return 0
        time.sleep(options.every)
        if not options.json:
            print()
