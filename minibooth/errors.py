"""The one exception for what a user can mend."""


class UserError(Exception):
    """Wrong input: the message is one line that says what is wrong and what to do.

    The programs print it and leave with exit status 2; from Python it is raised as it is.
    """
