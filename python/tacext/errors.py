"""The exceptions of tacext. Messages read `operation: argument: expected ..., got ...; way out`."""


class TacextError(Exception):
    """Base of every error that tacext raises on purpose."""


class InputError(TacextError, ValueError):
    """An argument that cannot be used; the message names it, what was expected and the way out."""

    @classmethod
    def of(
        cls, operation: str, argument: str, *, expected: str, got: str, way_out: str
    ) -> "InputError":
        """Builds the message from its parts."""
        return cls(f"{operation}: {argument}: expected {expected}, got {got}; {way_out}")


class FileError(TacextError, OSError):
    """A file that cannot be read, trusted or written; the message names it and the way out."""

    @classmethod
    def of(
        cls, operation: str, argument: str, *, expected: str, got: str, way_out: str
    ) -> "FileError":
        """Builds the message from its parts."""
        return cls(f"{operation}: {argument}: expected {expected}, got {got}; {way_out}")


class HeadNotFoundError(InputError):
    """The model's last linear layer could not be found by itself; name it with `head=`."""
