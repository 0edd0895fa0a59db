"""What can go wrong on the way, by what follows from it."""


class UnprocessableError(Exception):
    """This record cannot be processed and never will be: it becomes a dead letter, and the stage goes on."""

    def __init__(self, message: str, *, kind: str = "error", camera_id: str = "", detail: str = "") -> None:
        super().__init__(message)
        self.kind = kind
        self.camera_id = camera_id
        self.detail = detail
        """What is known besides, JSON."""


class UnavailableError(Exception):
    """Something that the stage needs is away (llm, store, image store, settings): wait, and try again."""

    def __init__(self, waiting_on: str, message: str) -> None:
        super().__init__(message)
        self.waiting_on = waiting_on


class FencedError(Exception):
    """Another producer took this transactional id, or the coordinator timed our transaction out."""


class UncertainError(Exception):
    """A transaction's outcome is unknown: fence ourselves, read the position, and see."""


def explain(error: BaseException) -> str:
    """One line about an error of others, for people: its class says more than nothing."""
    name = type(error).__name__
    first = next(iter(str(error).strip().splitlines()), "")
    if not first or first.startswith(name):  # aiokafka's errors name themselves
        return first or name
    return f"{name}: {first}"
