"""The one exception that means "the user's input is wrong"; the command line prints it without a traceback."""


class InputError(ValueError):
    """Bad input: the message names the field, file or row, what was found, and what to do about it."""
