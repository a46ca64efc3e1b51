"""The two errors of this package."""


class ProtocolError(ValueError):
    """These bytes, or this value, are not a message of the protocol; the sentence says what was
    wrong with it."""


class AccessError(ValueError):
    """A key file that cannot be used, or a process that the other side does not let in; the
    sentence is for the person who can mend it."""
