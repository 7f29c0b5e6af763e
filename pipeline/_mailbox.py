"""What Ray's workers tell the driver, and the driver them. A module of its own, since the actor that it becomes should
not import torch."""

from typing import Any


class Mailbox:
    """Holds messages until they are taken, whether the workers are to stop, and the error that ends the run."""

    def __init__(self) -> None:
        self.messages: list[tuple[Any, ...]] = []
        self.stop = False
        self.error: Exception | None = None

    def put(self, *message: Any) -> None:
        """Keep a message for the driver."""
        self.messages.append(message)

    def take(self) -> list[tuple[Any, ...]]:
        """The messages since the last time, in their order."""
        taken, self.messages = self.messages, []
        return taken

    def ask_to_stop(self) -> None:
        """Let `asked_to_stop` be true from now on."""
        self.stop = True

    def asked_to_stop(self) -> bool:
        """Whether the workers are to stop."""
        return self.stop

    def fail(self, error: Exception) -> None:
        """Keep the error; the first one counts."""
        self.error = self.error or error

    def failed(self) -> Exception | None:
        """The error that ends the run, if there was one."""
        return self.error
