"""The one exception that means: the user's input cannot be worked with.

Its text is one clear sentence: what was got, what was expected, what to do. The command line prints it and
exits with code 2; a library user catches it as a ``ValueError``.
"""


class InputError(ValueError):
    """Bad input from the user: got, expected, remedy, in one sentence."""


class WriteError(InputError):
    """The disk refused a file. What was finished before stays, and the same command goes on from there."""
