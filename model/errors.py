"""The user's mistakes in this package."""


class ModelError(ValueError):
    """A file of weights, a size or an option that the network does not take.

    Commands end in its one line and exit code 2: `core/base/errors.py` looks for the mark, for this package knows none
    of the others.
    """

    is_user_error = True
