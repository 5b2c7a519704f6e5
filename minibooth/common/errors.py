"""What a user can mend, and what a user asked for: two exceptions that the programs expect."""


class UserError(Exception):
    """Wrong input: the message is one line that says what is wrong and what to do.

    The programs print it and leave with exit status 2; from Python it is raised as it is.
    """


class Stopped(KeyboardInterrupt):
    """Ctrl-C or SIGTERM: the message is one line that says how to go on, `status` what the program
    leaves with: 128 and the signal's number, as shells have it."""

    def __init__(self, message: str = "stopped", status: int = 130):
        super().__init__(message)
        self.status = status


def first_line(error: Exception) -> str:
    """What another library's error says, short enough to stand in a UserError's one line."""
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
