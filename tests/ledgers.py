"""A ledger for tests, without an experiment behind it."""

from types import SimpleNamespace

from dgutils.results.ledger import Ledger


def blank_ledger(profile: str, notebook: str) -> Ledger:
    """The ledger of a notebook that scores nothing."""
    return Ledger(SimpleNamespace(parameters=SimpleNamespace(profile=profile, feature_spaces=[]), notebook=notebook))
