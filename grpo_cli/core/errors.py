"""The one exception that users are meant to see.

Exception
  CountdownError    a problem that the user can fix: exit code 2, or 1 if the job ran and failed
"""


class CountdownError(Exception):
    """A problem that the user can fix, with a `hint` on how.

    `exit_code` is 2 if the invocation, the configuration or the data is wrong, 1 if the job ran and failed.
    """

    def __init__(self, message: str, hint: str | None = None, *, exit_code: int = 2) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.exit_code = exit_code
