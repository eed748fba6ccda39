"""Mistakes that a user can mend end in one sentence, not in a traceback."""
from contextlib import contextmanager


class RunError(ValueError):
    """What the user can mend, found after set-up: a damaged file, too little memory, a model that gives NaN."""


@contextmanager
def user_errors(mistakes: type[ValueError] = ValueError):
    """What the user can mend ends in one sentence on standard error: bad input, a disk that is full.

    After set-up a ValueError may be a mistake of ours, which deserves its traceback: there use `user_errors(RunError)`.
    """
    try:
        yield
    except mistakes as error:
        raise SystemExit(f"error: {error}") from None
    except OSError as error:
        raise SystemExit(f"error: {error.filename or 'input or output'}: {error.strerror or error}; what was finished "
                         f"before is intact, so mend that and run the same command again") from None
