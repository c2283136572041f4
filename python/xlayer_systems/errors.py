"""The one exception that a user of the command line is meant to see."""


class UserError(Exception):
    """Wrong input from the user: a name, a path, an option or a data set that cannot be used.

    The message says in one line what was got and what was expected. The command line prints it as
    ``error: <message>`` and ends with exit code 2; nothing has been overwritten by then.
    """

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))
