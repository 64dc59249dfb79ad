"""The user's mistakes in this package."""


class DataError(ValueError):
    """A file, a list or an option that the data do not bear out.

    Commands end in its one line and exit code 2: `core/base/errors.py` looks for the mark, for this package knows none
    of the others.
    """

    is_user_error = True
