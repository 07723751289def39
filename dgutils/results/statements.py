"""Words and digits that follow from intervals by rule, so that no sentence can say more than its number."""

import math

LOWER, HIGHER, NEITHER = "lower than", "higher than", "not distinguishable from"
NOT_TESTABLE = "not testable at this scale"


def direction(low: float, high: float) -> str:
    """What the interval of a difference allows to say."""
    return LOWER if high < 0 else HIGHER if low > 0 else NEITHER


def verdict(sign: float, low: float, high: float) -> str:
    """The interval of a change against the sign that a claim asserts for it, which is all that scales can share."""
    word = direction(low, high)
    if word == NEITHER:
        return "not distinguishable"
    return "same sign" if (word == LOWER) == (sign < 0) else "opposite"


def summary(verdicts: list[str]) -> str:
    """One word for a claim's verdicts in all feature spaces; for none, that it was not tested."""
    if not verdicts:
        return NOT_TESTABLE
    if all(word == "same sign" for word in verdicts):
        return "reproduced"
    return "partly reproduced" if "same sign" in verdicts and "opposite" not in verdicts else "not reproduced"


def two_digits(low: float, high: float) -> int | None:
    """Decimals that show two digits of the half width: of a difference one reads whether it reaches zero."""
    return max(0, 1 - math.floor(math.log10((high - low) / 2))) if high > low else None


def with_words(records: dict[str, dict]) -> dict[str, dict]:
    """Records, and beside each <key>_change with an interval its word, <key>_direction."""
    words = {key.removesuffix("change") + "direction": record | {
        "value": direction(*record["interval"]), "label": f"{record['label']}, in words", "interval": None, "unit": ""}
        for key, record in records.items() if key.endswith("_change") and record.get("interval")}
    return words | records
