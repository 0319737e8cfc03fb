"""Errors a user can meet. Each message is one sentence that names the remedy.

Exit codes of the command line: 0 done; 1 anything unforeseen; 2 wrong usage; 3 done, but some
images could not be scored; 4 the input data cannot be used; 5 the store belongs to another
configuration; 6 the store is missing or damaged; 7 the model cannot be used; 130 interrupted.
"""


class ClasslensError(Exception):
    """Base of every error a user can meet; ``exit_code`` is the process's exit status."""

    exit_code = 1


class ShardError(ClasslensError):
    """A tar shard is truncated, damaged, interleaved or missing."""

    exit_code = 4


class ConfigMismatchError(ClasslensError):
    """A store exists and was made with another configuration."""

    exit_code = 5


class StoreError(ClasslensError):
    """A store is missing, unreadable or damaged."""

    exit_code = 6


class ModelError(ClasslensError):
    """A model has no class-embedding space, or its blocks are of an unknown kind."""

    exit_code = 7


class UsageError(ClasslensError):
    """Arguments that do not fit together or do not fit the data."""

    exit_code = 2
