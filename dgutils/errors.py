"""The one exception that means: you can mend this, and here is how."""

import re


class UserError(ValueError):
    """A problem the user can fix; its text is one line that says what is wrong and what to do."""

    def __init__(self, text: object):
        super().__init__(re.sub(r"\s*\n\s*", " ", str(text).strip()))  # others' errors, quoted in it, have many lines


def require(condition, problem: str) -> None:
    """Raises UserError, which says what the problem is and what mends it, unless the condition holds."""
    if not condition:
        raise UserError(problem)
