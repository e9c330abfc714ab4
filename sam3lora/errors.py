"""The one exception that means "the user can fix this"."""


class UserError(ValueError):
    """A mistake in a file, an option or the set-up; the message says what was expected, what came and what to do.

    The command line prints it without a traceback and exits with status 2.
    """
