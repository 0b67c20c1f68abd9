"""`mim-scale`: the verbs a user types. Every heavy import waits for its verb, so `--help` answers at once."""

import argparse
import importlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from mim_scale import __version__
from mim_scale.bench.commands import add_bench
from mim_scale.config import BuildConfig
from mim_scale.config_file import check_config
from mim_scale.doctor.commands import add_doctor
from mim_scale.errors import ConfigError, exit_with
from mim_scale.estimate.commands import add_estimate
from mim_scale.streaming.pack_commands import add_pack, verify_pack
from mim_scale.streaming.peek_commands import add_peek
from mim_scale.training.checkpoint_commands import add_checkpoint
from mim_scale.training.status_commands import add_status

_SOURCE = "a folder, a list of paths or addresses, s3://BUCKET/PREFIX, or the address of one file"


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, as everything else here does."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; `{self.prog} --help` has the usage")


def main() -> None:
    """The console entry point."""
    exit_with(run, skip_teardown=True)


def run(arguments: Sequence[str] | None = None) -> int:
    """Parse a command line, run its verb, return its exit code."""
    options = _parser().parse_args(arguments)
    code: int = options.verb(options)
    return code


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="mim-scale", description="An archive of CT in, pre-trained 3D network weights out.")
    parser.add_argument("--version", action="version", version=f"mim-scale {__version__}")
    verbs = parser.add_subparsers(title="verbs", required=True, metavar="VERB")

    example = verbs.add_parser("example-data", help="fetch a few real CT volumes to try things with")
    example.add_argument(
        "--cache",
        type=Path,
        help="folder to keep them in (default: $MIM_SCALE_CACHE or ~/.cache/mim-scale/example-data)",
    )
    example.set_defaults(verb=_example_data)

    data = verbs.add_parser("data", help="look at, build and check stores").add_subparsers(
        required=True, metavar="VERB"
    )
    _add_data_verbs(data)

    add_doctor(verbs)
    add_estimate(verbs)
    add_status(verbs)
    add_checkpoint(verbs)
    add_bench(verbs)

    export = verbs.add_parser("export", help="write a run's encoder as safetensors + config.json")
    export.add_argument("run", type=Path, help="a run folder (its newest checkpoint is taken) or one checkpoint folder")
    export.add_argument("folder", type=Path, help="where to write; must not exist yet, or be an export")
    export.add_argument("--register", metavar="MODEL", help="also make it a version of this model in the run's MLflow")
    export.add_argument("--alias", help="let this alias of the model mean that version, for example candidate")
    export.set_defaults(verb=_export)
    return parser


def _add_data_verbs(data: Any) -> None:
    scan = data.add_parser("scan", help="list what a source folder holds, without reading voxels")
    scan.add_argument("source", help=_SOURCE)
    scan.add_argument("--workers", type=int, help="processes that read headers (default: every core)")
    scan.add_argument("--store", type=Path, help="check that every input has a row in this store")
    scan.add_argument("--names", action="store_true", help="print the paths of inputs that headers refuse")
    scan.set_defaults(verb=lambda o: _data("scan", o.source, o.workers, o.store, o.names))

    plan = data.add_parser("plan", help="what a build would do and take; writes nothing")
    _add_build_options(plan)
    plan.add_argument("--json", action="store_true", help="for scripts")
    plan.set_defaults(verb=lambda o: _data("plan", _build_config(o), o.json))

    build = data.add_parser("build", help="convert a source folder into a store; run again to resume")
    _add_build_options(build)
    build.set_defaults(verb=lambda o: _data("build", _build_config(o)))

    _add_quarantine(data)

    _add_verify(data)

    listing = data.add_parser(
        "list",
        help="write what a source holds as a list, for nnssl or for a later build",
        description="Subjects are numbered, files are named: the list holds their paths, and whatever name is in them.",
    )
    listing.add_argument("source", help=_SOURCE)
    listing.add_argument("out", type=Path, help=".json for nnssl (call it pretrain_data.json), .csv or .parquet")
    listing.set_defaults(verb=lambda o: _data("export_list", o.source, o.out))

    stats = data.add_parser("stats", help="counts, sizes, spacings and HU of a store")
    stats.add_argument("store", type=Path)
    stats.add_argument("--json", action="store_true", help="for scripts")
    stats.set_defaults(verb=lambda o: _data("stats", o.store, o.json))

    report = data.add_parser("report", help="a page that shows what a store holds and refused; needs no network")
    report.add_argument("store", type=Path)
    report.add_argument("--out", type=Path, default=Path("report.html"), help="the page (default: %(default)s)")
    report.add_argument("--leakage", type=Path, metavar="JSON", help="what `data leakage` wrote, to be shown in it")
    report.add_argument(
        "--sample", type=int, default=24, metavar="N", help="volumes to draw; 0: no pictures (default: %(default)s)"
    )
    report.add_argument("--seed", type=int, default=0, help="which volumes a sample means (default: %(default)s)")
    report.add_argument("--json", action="store_true", help="print the numbers for scripts, write no page")
    report.set_defaults(verb=lambda o: _data("report", o.store, o.out, o.leakage, o.sample, o.seed, o.json))

    push = data.add_parser("push", help="upload a store, a pack or an export to a bucket; run again to go on")
    push.add_argument("folder", type=Path, help="a store, a pack or an export")
    push.add_argument("url", help="s3://BUCKET/PREFIX or gs://BUCKET/PREFIX")
    push.add_argument("--delete-old", action="store_true", help="remove volumes that only older records name")
    push.set_defaults(verb=lambda o: _data("push", o.folder, o.url, o.delete_old))

    pull = data.add_parser("pull", help="download a store from a bucket; run again to go on")
    pull.add_argument("url", help="s3://BUCKET/PREFIX or gs://BUCKET/PREFIX")
    pull.add_argument("store", type=Path)
    pull.set_defaults(verb=lambda o: _data("pull", o.url, o.store))

    _add_leakage(data)
    add_pack(data)
    add_peek(data)


def _add_build_options(build: Any) -> None:
    build.add_argument("source", help=_SOURCE)
    build.add_argument("store", type=Path)
    build.add_argument(
        "--spacing", type=_spacing, metavar="MM", help="resample: one number, or z,y,x (default: native)"
    )
    build.add_argument(
        "--min-slices", type=int, default=16, help="thinner volumes are quarantined (default: %(default)s)"
    )
    build.add_argument("--executor", choices=("ray", "local"), default="ray", help="(default: %(default)s)")
    build.add_argument("--workers", type=int, help="tasks at once (default: every core)")
    build.add_argument("--part", metavar="3/16", help="do one part of a job array and commit nothing")
    build.add_argument("--key", type=Path, help="file with the secret behind pseudonyms (default: your own)")
    build.add_argument(
        "--hold-out", action="append", default=[], metavar="PATH", help="keep copies of these volumes out; repeatable"
    )
    build.add_argument(
        "--replace", action="store_true", help="also where the store loses most of its volumes or its hold-outs"
    )


def _add_verify(data: Any) -> None:
    verify = data.add_parser("verify", help="check every byte of a store or a pack; mend a store from its source")
    verify.add_argument("store", type=Path)
    verify.add_argument("--deep", action="store_true", help="also decode every chunk and compare with the manifest")
    verify.add_argument("--sample", type=_share, default=1.0, metavar="1%", help="only a share of the volumes")
    verify.add_argument("--seed", type=int, default=0, help="which volumes a share means (default: %(default)s)")
    verify.add_argument("--workers", type=int, help="threads (default: one a core)")
    verify.add_argument("--json", action="store_true", help="for scripts")
    verify.add_argument(
        "--repair", metavar="SOURCE", help="build damaged volumes again from what the store was built from"
    )
    verify.add_argument(
        "--key", type=Path, help="file with the secret behind pseudonyms, for --repair (default: your own)"
    )
    verify.set_defaults(verb=_verify)


def _add_quarantine(data: Any) -> None:
    refused = data.add_parser("quarantine", help="what a store refused, why, and what to do about it")
    actions = refused.add_subparsers(required=True, metavar="ACTION")
    for action, words in (
        ("list", "every refused input, one line each"),
        ("show", "refused inputs, and what can be done"),
        ("retry", "have the next build try them again"),
        ("waive", "let inputs pass that were refused by judgement"),
    ):
        one = actions.add_parser(action, help=words)
        one.add_argument("store", type=Path)
        one.add_argument("keys", nargs="*", metavar="KEY", help="of inputs, as `list` shows them (default: all)")
        one.add_argument("--reason", default="", help="only those refused for this")
        one.set_defaults(names=None, json=False)
        if action in {"list", "show"}:
            one.add_argument("--names", metavar="SOURCE", help="show the paths behind the keys")
            one.add_argument("--json", action="store_true", help="for scripts")
        one.set_defaults(
            verb=lambda o, action=action: _data("quarantine", action, o.store, tuple(o.keys), o.reason, o.names, o.json)
        )


def _add_leakage(data: Any) -> None:
    sides = "a store, a folder of images, or a list made by `data fingerprints`"
    leakage = data.add_parser("leakage", help="certify which images of a benchmark are in a corpus")
    leakage.add_argument("corpus", type=Path, help=sides)
    leakage.add_argument("benchmark", type=Path, help=sides)
    leakage.add_argument("--out", type=Path, default=Path(), help="folder for leakage.json and .html (default: here)")
    leakage.add_argument("--key", type=Path, help="file with the key of the pseudonyms (default: the user's own)")
    leakage.add_argument("--names", action="store_true", help="name the files that were found, where a side has files")
    leakage.add_argument("--no-pictures", action="store_true", help="leave middle slices out of the page")
    leakage.add_argument("--fail-on-leak", action="store_true", help="exit with 3 where a leak is found (default: 0)")
    leakage.set_defaults(
        verb=lambda o: _data("leakage", o.corpus, o.benchmark, o.out, o.key, o.names, not o.no_pictures, o.fail_on_leak)
    )

    fingerprints = data.add_parser("fingerprints", help="list volumes to hold out or compare with, without images")
    fingerprints.add_argument("source", type=Path, help="a store or a folder of images")
    fingerprints.add_argument("out", type=Path, metavar="OUT.parquet")
    fingerprints.add_argument("--key", type=Path, help="file with the key of the pseudonyms (default: the user's own)")
    fingerprints.set_defaults(verb=lambda o: _data("fingerprints", o.source, o.out, o.key))


def _data(verb: str, *values: Any) -> int:
    # By name: mim_scale must not depend on the pipeline, which training machines may lack.
    code: int = getattr(importlib.import_module(f"data_pipeline.commands.{verb}"), verb)(*values)
    return code


def _example_data(options: argparse.Namespace) -> int:
    return _data("example_data", options.cache)


def _spacing(text: str) -> list[float]:
    """`2` or `2.5,0.8,0.8`: millimetres along z, y, x."""
    try:
        numbers = [float(number) for number in text.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) not in {1, 3}:
        raise argparse.ArgumentTypeError(f"{text!r} is neither one number nor three (z,y,x)")
    return numbers * 3 if len(numbers) == 1 else numbers


def _build_config(options: argparse.Namespace) -> BuildConfig:
    values = {
        "source": str(options.source),
        "store": str(options.store),
        "spacing": options.spacing,
        "min_slices": options.min_slices,
        "executor": options.executor,
        "workers": options.workers,
        "part": options.part,
        "key_file": str(options.key) if options.key else None,
        "hold_out": tuple(options.hold_out),
        "replace": options.replace,
    }
    return check_config(BuildConfig, values, "data build")


def _share(text: str) -> float:
    """`1%` or `0.01`: above 0 and up to all."""
    try:
        share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        share = 0.0
    if not 0 < share <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no share of the volumes; write it as 1% or 0.01")
    return share


def _verify(options: argparse.Namespace) -> int:
    from mim_scale.streaming.pack_verify import is_pack

    if is_pack(options.store):
        if options.repair is not None or options.sample < 1 or options.json:
            raise ConfigError(f"{options.store}: is a pack; --repair, --sample and --json are for stores")
        return verify_pack(options.store, options.deep)
    if options.workers is not None and options.workers < 1:
        raise ConfigError(f"--workers is {options.workers}, expected 1 or more")
    values = {name: getattr(options, name) for name in ("deep", "seed", "workers", "json", "repair")}
    key_file = str(options.key) if options.key is not None else None
    return _data("verify", options.store, values | {"share": options.sample, "key_file": key_file})


def _export(options: argparse.Namespace) -> int:
    from mim_scale.transfer.export import export, register_export

    if options.alias is not None and options.register is None:
        raise ConfigError("--alias belongs to a model: name one with --register")
    for name in (name for name in (options.register, options.alias) if name is not None):
        if not re.fullmatch(r"[A-Za-z0-9._-]+", name) or re.fullmatch(r"latest|v\d+", name, re.IGNORECASE):
            raise ConfigError(
                f"{name!r} is no name for a model or an alias: take letters, digits, and . _ -, not `latest` or `v1`"
            )
    report = export(options.run, options.folder)
    print(report)
    if options.register:
        print(register_export(report, options.register, options.alias))
    return 0


if __name__ == "__main__":
    main()
