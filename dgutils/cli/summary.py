"""What `make reproduce` ends with: the arms' scores, what was found in a few sentences, and where to look next."""

from dgutils.paths import figures_dir, repo_root, results_dir, runs_dir
from dgutils.results.records import Results, load_results

SHOWN = ("FD", "FD change", "KID x 1000", "KID change")  # columns of the arms' tables
FOUND = ("arm.paper", "arm.ensemble_against_paper", "ens.raw_all")  # the changes that sentences are made of


def arms(results: Results) -> list[str]:
    """The tables of the arms, one a feature space, with those columns alone."""
    shown = []
    for table in (results.tables[name] for name in ("arms", "arms_second") if name in results.tables):
        kept = [table["columns"].index(column) - 1 for column in SHOWN]
        rows = [[label, *(keys[i] for i in kept)] for label, *keys in table["rows"]]
        record = results[rows[-1][1]]
        space = record["label"].rpartition(", ")[2]
        head = f"{space}, {record['n']:,} images"
        results.tables[head] = {"columns": [head, *SHOWN], "rows": rows}
        shown.append(results.markdown(head))
    return shown


def sentences(results: Results) -> list[str]:
    """What was found, a sentence for each recorded change: its label, its words and its numbers, in each space."""
    found = []
    for key in FOUND:
        changes = [f"{key}.{slot}.kid" for slot in ("first", "second") if f"{key}.{slot}.kid_change" in results.records]
        parts = []
        for change in changes:
            label, _, space = results[f"{change}_change"]["label"].removeprefix("KID x 1000 of ").rpartition(", ")
            arm, _, baseline = label.partition(" minus ")
            parts.append(f"{results.text(f'{change}_direction')} {'it' if parts else f'that of {baseline}'} in {space} "
                         f"({results.text(f'{change}_change')})")  # fmt: skip
        if parts:
            found.append(f"{arm[0].upper()}{arm[1:]}: KID x 1000 is {' and '.join(parts)}.")
    return found


def show(profile: str) -> None:
    """Print all of it."""
    results, root = load_results(profile), repo_root()
    print(f"\nResults of profile {profile}; changes are against unguided; 95 % intervals.\n")
    print("\n\n".join([*arms(results), "\n".join(sentences(results))]) + "\n")
    places = {"notebooks": runs_dir(profile) / "notebooks", "figures": figures_dir(profile),
              "every number": results_dir(profile)}  # fmt: skip
    print("\n".join(f"{what:<13} {path.relative_to(root)}/" for what, path in places.items()))
    print(f"{'report':<13} make report PROFILE={profile}", flush=True)
