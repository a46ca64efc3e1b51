"""The one error of the protocol."""


class ProtocolError(ValueError):
    """These bytes, or this value, are not a message of the protocol; the sentence says what was
    wrong with it."""
