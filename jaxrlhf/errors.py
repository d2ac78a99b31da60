"""The one exception that means "the user's input is wrong"; the command line prints it without a traceback."""


class InputError(ValueError):
    """Bad input: the message names the field, file or row, what was found, and what to do about it."""


class SharedError(InputError):
    """An InputError that every process of a run raises at the same place, so that together they can save first."""
