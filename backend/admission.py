"""What a request may carry, known from its head alone: whose secret it shows, and how large a body it may have."""

from __future__ import annotations

from dataclasses import dataclass

from backend.secret import project_of, secret_in

#: Asked by Docker, by load balancers, and by Label Studio before everything else.
HEALTH = {"/", "/health"}
#: Answered without a secret while a project has none, so that Label Studio's own settings page can connect us.
OPEN = {"/setup", "/predict"}

#: Bytes of the first line and the headers; Label Studio sends less than 1 kB.
HEAD = 32 << 10
#: Bytes of a body that is read only to be refused politely.
REFUSED = 64 << 10
#: Bytes of a body without a secret: a label config.
WITHOUT = 1 << 20
#: Bytes of a body with a secret. Webhooks repeat an annotation with its masks (2 to 30 MB), `/predict` whole tasks
#: with their predictions; 256 MiB is about what Label Studio accepts itself.
WITH = {"/webhook": 64 << 20, "/predict": 256 << 20}
OTHERS = 8 << 20
LARGEST = max(WITH.values())


@dataclass(frozen=True)
class Admission:
    """Whether and how a request is let in.

    Attributes:
        path: that it asks for.
        shown: whether it carries any secret.
        project: whose secret it carries, None for none or a wrong one.
    """

    path: str
    shown: bool
    project: int | None

    @property
    def refused(self) -> bool:
        """Whether the answer is 401, whatever the body says."""
        if self.path in HEALTH or self.project is not None:
            return False
        return self.shown or self.path not in OPEN

    @property
    def limit(self) -> int:
        """Bytes that its body may have."""
        if self.refused or self.path in HEALTH:
            return REFUSED
        return WITHOUT if self.project is None else WITH.get(self.path, OTHERS)


def admission(master: str, path: str, header: str | None, authorization: str | None) -> Admission:
    """Judge the head of a request.

    Args:
        master: the master secret.
        path: that the request asks for.
        header: value of our own header, None without it.
        authorization: value of the Authorization header, None without it.
    """
    secret = secret_in(header, authorization)
    return Admission(path, secret is not None, project_of(master, secret))
