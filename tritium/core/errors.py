"""Every error a user can meet: one line that says what is wrong, one hint that says what to do."""

from __future__ import annotations


class TritiumError(Exception):
    """Base of all errors that Tritium raises on purpose.

    `message` is one line; `hint`, when given, tells the user what to do next.
    """

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message if hint is None else f"{message} (hint: {hint})")
        self.message = message
        self.hint = hint


class ConfigError(TritiumError):
    """A flag, a configuration value or a combination of them that cannot work."""


class CheckpointError(TritiumError):
    """A checkpoint that is missing, damaged, of another shape or of an unsupported kind."""


class CacheFileError(TritiumError):
    """A file of the prefix cache that cannot be written, or must not be loaded."""


class CapacityError(TritiumError):
    """What was asked does not fit the memory plan."""


class RequestError(TritiumError):
    """A request that cannot be served; `param` names the offending field."""

    def __init__(self, message: str, *, param: str | None = None, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.param = param


class EngineDeadError(TritiumError):
    """The engine stopped because of an internal failure; nothing more can be served."""


def one_line(error: BaseException) -> str:
    """What another library's error says, on one line."""
    return " ".join(str(error).split()) or type(error).__name__
