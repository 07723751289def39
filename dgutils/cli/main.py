"""Discriminator guidance, reproduced: the command line behind the Makefile."""

import argparse
import json
import sys
from pathlib import Path

from dgutils.errors import UserError
from dgutils.paths import repo_root

NOTEBOOKS = "notebooks/profiles/PROFILE.yaml"


class _Parser(argparse.ArgumentParser):
    """Says what is wrong with the arguments in one line, as everything else here does."""

    def error(self, message):
        self.exit(2, f"dgutils: {message} (python -m {self.prog} --help)\n")


def _reproduce(args):
    from dgutils.pipeline.notebooks import parse_override, run_profile
    from dgutils.results.records import print_summary

    run_profile(args.profile, args.only, dict(parse_override(text) for text in args.set), args.cell_timeout)
    if args.only is None:
        print_summary(args.profile)


def _work(args):
    from dgutils.pipeline.distributed import run_ranks, work
    from dgutils.pipeline.notebooks import every_parameter, parse_override

    overrides = dict(parse_override(text) for text in args.set)
    if args.nproc is None:
        work(args.profile, overrides, args.timeout)
        return
    every_parameter(args.profile, overrides)  # what is wrong with them is said before any rank starts
    again = ["-m", "dgutils", "work", "--profile", args.profile, "--timeout", str(args.timeout)]
    run_ranks(args.nproc, again + ["--set", *args.set] * bool(args.set))


def _launch(args):
    from dgutils.pipeline.distributed import launch

    script = launch(args.profile, args.nodes, args.gpus, args.cpus, args.time, args.sbatch)
    Path(args.out).write_text(script)
    print(f"wrote {args.out}; start it with: sbatch {args.out}")


def _plan(args):
    from dgutils.cli.plan import show

    show(args.profile)


def _fetch(args):
    from dgutils import datasets
    from dgutils.networks import weights
    from dgutils.pipeline.notebooks import every_parameter

    parameters = every_parameter(args.profile)
    names = args.name or weights.mentioned(parameters)
    weights.fetch(names)
    if not args.name:
        for split in ("train", "test"):
            datasets.load_dataset(parameters["dataset"], split)
    if not names:
        print(f"profile {args.profile} needs no weights from the network; its images are here")


def _inspect(args):
    from dgutils.networks.inspection import inspect

    for file in args.file:
        print("\n".join(inspect(Path(file))))


def _stand_ins(args):
    from dgutils.networks import weights
    from dgutils.networks.standins import write_stand_ins
    from dgutils.pipeline.notebooks import every_parameter

    folder = weights.weights_dir()
    write_stand_ins(folder, weights.mentioned(every_parameter(args.profile)))
    print(f"{folder}: random stand-ins for the published weights")


def _doctor(args):
    from dgutils.cli.doctor import run

    return run(args.profile)


def _keep(args):
    from dgutils.results.records import keep

    print(f"wrote {keep(args.profile)}")


def _train(args):
    from dgutils.networks.checkpoints import write_parts
    from dgutils.networks.pretrain import export, join, train_network

    out = Path(args.out) if args.out else repo_root() / "runs" / "networks"
    if args.join:
        path = join(args.name, Path(args.join), out)
    else:
        path = export(args.name, out) if args.export else train_network(args.name, out, args.threads,
                                                                         minutes=args.minutes)  # fmt: skip
    if args.parts:
        write_parts(path, out)
    finished = json.loads(path.with_suffix(".json").read_text())["finished"]
    state = "" if finished else " (unfinished: the same command goes on)"
    print(f"wrote {path} and its model card{state}; to ship them, move both to dgutils/assets")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="dgutils", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name, run, text, profile=None):
        sub = commands.add_parser(name, help=text)
        if profile:
            sub.add_argument("--profile", default=profile, help=f"{NOTEBOOKS} [{profile}]")
        sub.set_defaults(run=run)
        return sub

    overrides = dict(nargs="+", action="extend", default=[], metavar="NAME=VALUE", help="change a parameter")
    sub = command("reproduce", _reproduce, "run the notebooks of a profile and print the result table", "quick")
    sub.add_argument("--only", nargs="+", metavar="NN", help="only the notebooks whose names begin so")
    sub.add_argument("--set", **overrides)
    sub.add_argument("--cell-timeout", type=int, default=24 * 3600, metavar="S",
                     help="seconds after which a cell counts as hanging; 0 for none [a day]")  # fmt: skip
    sub = command("work", _work, "compute what a profile's notebooks will ask for, as one rank or as several", "quick")
    sub.add_argument("--nproc", type=int, metavar="N", help="start N ranks on this machine [be one of torchrun's]")
    sub.add_argument("--timeout", type=float, default=360, metavar="MIN", help="minutes ranks wait for each other")
    sub.add_argument("--set", **overrides)
    sub = command("launch", _launch, "write a Slurm script that runs a profile on many nodes", "paper")
    sub.add_argument("--nodes", type=int, default=1)
    sub.add_argument("--gpus", type=int, default=8, help="GPUs a node [8]")
    sub.add_argument("--cpus", type=int, default=8, help="CPU cores a GPU [8]")
    sub.add_argument("--time", default="24:00:00", help="limit, as Slurm writes it [24:00:00]")
    sub.add_argument("--sbatch", nargs="+", default=[], metavar="NAME=VALUE", help="more options of sbatch")
    sub.add_argument("--out", default="dgutils.sbatch", help="the script's file [dgutils.sbatch]")
    command("keep", _keep, "put a profile's scores where git holds them, for other machines to go on from", "cifar10")
    command("plan", _plan, "what a profile would compute, download and take; runs nothing", "quick")
    sub = command("fetch", _fetch, "download the published weights that a profile needs", "paper")
    sub.add_argument("name", nargs="*", help="only these files of dgutils/assets/registry.yaml")
    sub = command("inspect", _inspect, "what a checkpoint file holds; nothing in it is executed")
    sub.add_argument("file", nargs="+")
    command("stand-ins", _stand_ins, "write random stand-ins for a profile's published weights to $DGUTILS_WEIGHTS",
            "rehearsal")  # fmt: skip
    command("doctor", _doctor, "is everything here that a profile needs?", "quick")

    for name, what in (("train-score", "score network"), ("train-extractor", "feature extractor")):
        sub = command(name, _train, f"train the {what} of a recipe in dgutils/assets; resumes")
        sub.add_argument("name", help="the recipe: dgutils/assets/NAME.yaml")
        sub.add_argument("--out", help="folder of checkpoint and result [runs/networks]")
        sub.add_argument("--threads", type=int, help="CPU threads [all]")
        sub.add_argument("--minutes", type=float, metavar="M", help="train for so long, whatever the recipe's images")
        sub.add_argument("--parts", action="store_true", help="write the weights in parts of 15 MiB, too")
        sub.add_argument("--join", metavar="FOLDER", help="only put the parts in FOLDER together, and check them")
        sub.add_argument("--export", action="store_true", help="only write the weights of the checkpoint so far")
    return parser


def main(argv=None) -> int:
    """Run a command; a problem that the user can mend is one line on stderr and exit status 2."""
    try:
        args = _parser().parse_args(argv)
        return args.run(args) or 0
    except UserError as error:
        print(f"dgutils: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        if error.filename is None:
            raise
        print(f"dgutils: {error.filename}: {error.strerror}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("dgutils: stopped; the same command goes on where it was", file=sys.stderr)
        return 130
