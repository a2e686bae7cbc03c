"""The one exception meant for the person at the keyboard."""

import re

MAX_LENGTH = 1000  # characters
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]+")


class MinisaError(Exception):
    """Something the user can put right: a file, a flag, a plan.

    The message is one line. It names the file, key or flag, says what was expected and what to do next.
    The command lines print it on stderr and exit with status 2.
    """

    def __init__(self, message: str) -> None:
        """What a message quotes of a file may be anything: its control characters and its middle are left out, and
        half a surrogate pair is spelled out.
        """
        message = _CONTROL.sub(" ", message).encode("utf-8", "backslashreplace").decode()
        if len(message) > MAX_LENGTH:
            message = f"{message[: MAX_LENGTH * 2 // 3]} … {message[-MAX_LENGTH // 3 :]}"
        super().__init__(message)


def shown(value: object) -> str:
    """Whatever was given in place of what was expected, as a message quotes it."""
    try:
        return repr(value)
    except ValueError:  # Python spells out no number of more than 4,300 digits
        return "a number of thousands of digits"
