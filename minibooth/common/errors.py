"""The one exception for what a user can mend."""


class UserError(Exception):
    """Wrong input: the message is one line that says what is wrong and what to do.

    The programs print it and leave with exit status 2; from Python it is raised as it is.
    """


def first_line(error: Exception) -> str:
    """What another library's error says, short enough to stand in a UserError's one line."""
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
