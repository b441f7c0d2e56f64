"""The errors a user can cause, each with the exit code that the commands return for it.

Programming errors (a wrong shape or dtype given to an op) are plain ValueError, TypeError and RuntimeError; they do
not live here.
"""


class UserError(Exception):
    """Something the user can put right; the message is one clear sentence, shown without a traceback."""

    exit_code = 1


class ArgumentError(UserError, ValueError):
    """A flag, a configuration value or a prompt that cannot be used."""

    exit_code = 2


class ModelError(UserError):
    """A model folder or checkpoint that is missing, unreadable, or of another configuration."""

    exit_code = 3


class OutOfMemoryError(UserError, MemoryError):
    """The run needs more memory than there is; the message names what to reduce."""

    exit_code = 4


class InputFileError(UserError):
    """An input file other than a model (mesh, image, shard) that is missing or unreadable."""

    exit_code = 5


class DivergedError(UserError, ArithmeticError):
    """The optimisation left the finite numbers and could not be restored."""

    exit_code = 6


class OutputError(UserError, OSError):
    """An output that cannot be written, or exists already."""

    exit_code = 7
