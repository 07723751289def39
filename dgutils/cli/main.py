"""Discriminator guidance, reproduced: the command line behind the Makefile."""

import json
import math
import os
import sys
from pathlib import Path

import click

from dgutils.errors import UserError, require
from dgutils.paths import cores, repo_root, runs_dir


def _minutes(context, parameter, value):
    if value is not None and not 0 < value < math.inf:
        raise click.BadParameter("give minutes, more than 0")
    return value


def _profile(default):
    return click.option("--profile", default=default, show_default=True, help="notebooks/profiles/PROFILE.yaml",
                        callback=lambda context, parameter, name: runs_dir(name).name)  # refuses what is no name


SET = click.option("--set", multiple=True, metavar="NAME=VALUE", help="Change a parameter; may be repeated.")
commands = click.Group("dgutils", help=__doc__, no_args_is_help=False, context_settings={"max_content_width": 120})
command = commands.command()


@command
@_profile("quick")
@click.option("--only", multiple=True, metavar="NN", help="Only the notebooks whose names begin so.")
@SET
@click.option("--cell-timeout", type=int, default=24 * 3600, help="Seconds that a cell may take, 0: any [a day].")
@click.option("--force", is_flag=True, help="Execute notebooks that are unchanged, too.")
def reproduce(profile, only, set, cell_timeout, force):
    """Run the notebooks of a profile and print the result table."""
    from dgutils.cli.summary import show
    from dgutils.pipeline.notebooks import run_profile
    from dgutils.pipeline.parameters import parse_overrides

    run_profile(profile, only or None, parse_overrides(set), cell_timeout, force)
    if not only:
        show(profile)


@command
@_profile("quick")
@click.option("--nproc", type=int, help="Start so many ranks on this machine [be one of torchrun's].")
@click.option("--minutes", type=float, callback=_minutes, help="End after so long, between shards, epochs or scores.")
@SET
def work(profile, nproc, minutes, set):
    """Compute what a profile's notebooks will ask for, as one rank or as several."""
    from dgutils.pipeline import parameters, ranks
    from dgutils.pipeline.work import work

    overrides = parameters.parse_overrides(set)
    if nproc is None:
        return work(profile, overrides, minutes)
    parameters.load(profile, overrides)  # what is wrong with them is said before any rank starts
    again = ["-m", "dgutils", "work", "--profile", profile, *(["--minutes", str(minutes)] if minutes else [])]
    ranks.run_ranks(nproc, again + [part for text in set for part in ("--set", text)])


@command
@_profile("cifar10")
def keep(profile):
    """Put a profile's scores where git holds them, for other machines to go on from."""
    from dgutils.results.records import keep

    print(f"wrote {keep(profile)}")


@command
@_profile("quick")
def plan(profile):
    """Say what a profile would compute, download and take; run nothing."""
    from dgutils.cli.plan import show

    show(profile)


@command
@_profile("paper")
@click.argument("name", nargs=-1)
def fetch(profile, name):
    """Download the published weights that a profile needs, or only the NAMEs of dgutils/assets/registry.yaml."""
    from dgutils import datasets
    from dgutils.networks import weights
    from dgutils.pipeline.parameters import load

    parameters = load(profile).model_dump()
    names = name or weights.mentioned(parameters)
    weights.fetch(names)
    for split in () if name else ("train", "test"):
        datasets.load_dataset(parameters["dataset"], split)
    if not names:
        print(f"profile {profile} needs no weights from the network; its images are here")


@command
@click.argument("file", nargs=-1, required=True, type=Path)
def inspect(file):
    """Say what each checkpoint FILE holds; nothing in it is executed."""
    from dgutils.networks.checkpoints import look_into

    refused = []
    for path in file:
        print("\n".join(lines := look_into(path)))
        refused += [str(path)] * any(line.startswith("REFUSED") for line in lines)
    require(not refused, f"refused, for the reasons above: {', '.join(refused)}")


@command
@_profile("quick")
def doctor(profile):
    """Say whether everything is here that a profile needs."""
    from dgutils.cli.doctor import run

    return run(profile)


@command
@click.argument("name")
@click.option("--out", type=Path, help="Folder of checkpoint and result [runs/networks].")
@click.option("--minutes", type=float, callback=_minutes, help="Train so long, whatever the recipe's images.")
@click.option("--parts", is_flag=True, help="Write the weights in parts of 15 MiB, too.")
@click.option("--join", type=Path, metavar="FOLDER", help="Only put the parts in FOLDER together, checked.")
def train_score(name, out, minutes, parts, join):
    """Train the network of a recipe, dgutils/assets/NAME.yaml; resumes."""
    from dgutils.networks import pretrain

    out = out or repo_root() / "runs" / "networks"
    path = pretrain.join(name, join, out) if join else pretrain.train_network(name, out, minutes=minutes)
    if parts:
        pretrain.write_parts(path, out)
    finished = json.loads(path.with_suffix(".json").read_text())["finished"]
    state = "" if finished else " (unfinished: the same command goes on)"
    print(f"wrote {path} and its model card{state}; to ship them, move both to dgutils/assets")


commands.add_command(train_score, "train-extractor")


def main(arguments=None) -> int:
    """Run a command; a problem that the user can mend is one line on stderr and exit status 2."""
    given = sys.argv[1:] if arguments is None else arguments
    if cores() < (os.cpu_count() or 1) and "--nproc" not in given:  # torch counts cores that a quota withholds
        os.environ.setdefault("OMP_NUM_THREADS", str(cores()))
    try:
        sys.stdout.reconfigure(line_buffering=True)  # click sees at once that nobody reads, after `| head`, and ends
        return commands.main(given, prog_name="dgutils", standalone_mode=False) or 0
    except click.Abort:
        print("dgutils: stopped; the same command goes on where it was", file=sys.stderr)
        return 130
    except click.UsageError as error:
        name = error.ctx.command_path if error.ctx else "dgutils"
        problem = UserError(f"{error.format_message().rstrip('.')} (python -m {name} --help)")
    except UserError as error:
        problem = error
    except OSError as error:
        if error.strerror is None:
            raise
        problem = UserError(f"{error.filename}: {error.strerror}" if error.filename else error.strerror)
    print(f"dgutils: {problem}", file=sys.stderr)
    return 2
