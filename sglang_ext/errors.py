"""Errors raised on purpose."""


class StartupError(SystemExit):
    """The server must not start; the message names the problem.

    A SystemExit because SGLang logs and swallows every ``Exception`` of a plugin.
    Python prints the message and exits with status 1.
    """

    def __init__(self, message: str) -> None:
        super().__init__(f"sglang-ext: {message}")
