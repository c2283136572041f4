"""Exceptions that end a command with one line and an exit code."""


class CommandError(Exception):
    """Ends a command with the line ``error: <message>`` and the exit code of its class."""

    exit_code = 1

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


class UserError(CommandError):
    """Signals wrong input: a name, a path, an option, a data set or a run directory that cannot be used.

    The message says in one line what was got and what was expected. Nothing has been overwritten by then.
    """

    exit_code = 2


class DivergenceError(CommandError):
    """Signals that a loss, metric or parameter of a run is not finite. Its last good checkpoint is kept."""

    exit_code = 3


class InterruptionError(CommandError):
    """Signals that SIGINT or SIGTERM ended a run after a checkpoint; the exit code is the one of the signal."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal_number
