"""The one exception that a user is meant to read."""


class DistillError(Exception):
    """A problem the user can act on, in one line: where it is, what was found, and what to do."""
