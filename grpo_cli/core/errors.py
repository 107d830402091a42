"""The one exception that a user is meant to see; it does not know how it is shown.

Exception
  CountdownError    what a user can mend: exit code 2, or 1 when the job ran and failed
"""


class CountdownError(Exception):
    """Something a user can mend, with a `hint` that says how.

    `exit_code` is 2 when the invocation, the configuration or the data is wrong, 1 when the job ran and failed.
    """

    def __init__(self, message: str, hint: str | None = None, *, exit_code: int = 2) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.exit_code = exit_code
