"""The one exception meant for the person at the keyboard."""


class MinisaError(Exception):
    """Something the user can put right: a file, a flag, a plan.

    The message is one line. It names the file, key or flag, says what was expected and what to do next.
    The command lines print it on stderr and exit with status 2.
    """
