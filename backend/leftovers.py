"""Files that nothing needs any more, deleted once no round can be reading or writing them."""

from __future__ import annotations

from collections.abc import Iterable

from backend.project import Project

#: Orders after the one at which a file was found useless, until it is deleted: any round of then is over.
ORDERS = 2


def delete_leftovers(project: Project, useless: Iterable[str], idle: bool) -> None:
    """Delete what has been useless for some orders; at once where no round is in progress.

    Args:
        project: whose files they are.
        useless: all that nothing known needs now; one that a round needs after all is not named the next time.
        idle: no round is in progress.
    """
    place, number = project.key("leftovers.json"), int(project.state().get("round", 0))
    before = project.store.read_json(place) or {}
    found = {key: int(before.get(key, number)) for key in useless}
    due = [key for key, since in found.items() if idle or number >= since + ORDERS]
    for key in due:
        project.store.delete(key)
    left = {key: since for key, since in found.items() if key not in set(due)}
    if left != before:
        project.store.write_json(place, left)
