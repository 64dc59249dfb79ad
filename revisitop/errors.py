"""The user's mistakes in this package."""


class ProtocolError(ValueError):
    """A ground truth, or descriptors, that the protocol does not take.

    Commands end in its one line and exit code 2: `core/base/errors.py` looks for the mark, for this package knows none
    of the others.
    """

    is_user_error = True
