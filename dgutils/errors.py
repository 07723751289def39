"""The one exception that means: you can mend this, and here is how."""


class UserError(ValueError):
    """A problem the user can fix; its text is one line that says what is wrong and what to do."""
