"""One secret per project, derived from the master secret, which never leaves this machine.

Members of a project can read the headers of its webhooks in Label Studio. What they read there is worth nothing beyond
their project, and the master secret cannot be computed from it.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import re

from werkzeug.datastructures import Authorization

#: A project number, a dash, and 43 letters that only the master secret can make. The number tells, before a body is
#: read, which project a request speaks for.
FORM = re.compile(r"([1-9][0-9]{0,17})-[A-Za-z0-9_-]{43}", re.ASCII)


def project_secret(master: str, project: int) -> str:
    """The secret of a project: HMAC-SHA256 of its number under the master secret, fit for headers and URLs."""
    made = hmac.new(master.encode(), f"first-row project {project}".encode(), hashlib.sha256).digest()
    return f"{project}-{base64.urlsafe_b64encode(made).decode().rstrip('=')}"


def project_of(master: str, secret: str | None) -> int | None:
    """The project whose secret this is; None for anything else, the master secret included."""
    form = FORM.fullmatch(secret or "")
    if form is None:
        return None
    project = int(form[1])
    return project if hmac.compare_digest(form[0].encode(), project_secret(master, project).encode()) else None


def secret_in(header: str | None, authorization: str | None) -> str | None:
    """The secret that a request carries: in our own header, else as Basic auth password; None without one.

    Args:
        header: value of our own header.
        authorization: value of the Authorization header.

    Returns:
        The secret, whatever it is worth; empty for an Authorization header that nobody can read.
    """
    if header is not None or authorization is None:
        return header
    try:
        basic = Authorization.from_header(authorization)
    except ValueError:  # junk in it
        return ""
    return (basic.password if basic else "") or ""
