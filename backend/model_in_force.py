"""What predicts now, whichever learner made it."""

from __future__ import annotations

from typing import NamedTuple

from backend.comparison import model_info, tuned_in_force
from backend.context import Context
from backend.label_config import ProjectConfig
from backend.learn import is_trained, network_key
from backend.project import HEAD_MASKS, Project
from backend.score import scores_key


class InForce(NamedTuple):
    """What predicts now.

    Attributes:
        name: for people; empty while nothing was learnt.
        masks: where the masks that people see lie in the store, see `Project.prediction`; empty while there are none.
        compared: names all that an order by it depends on, besides the tasks.
        note: what there is to say of it, in a sentence; empty for most.
    """

    name: str
    masks: str
    compared: str
    note: str


def model_in_force(ctx: Context, project: Project, config: ProjectConfig) -> InForce:
    """What predicts now."""
    if ctx.settings.learner == "instant":
        said = dict(project.store.read_json(project.key("model.json")) or {})
        name = str(said.get("version", "")) if "made_of" in said else ""
        deep = tuned_in_force(project, config.classes) if name else ""
        masks = deep or (HEAD_MASKS if name else "")
        return InForce(name, masks, f"{said.get('made_of', '')} {deep}".strip(), str(said.get("note", "")))
    note = str(model_info(project).get("note", ""))
    key = network_key(ctx, project, config.classes)
    learnt = is_trained(ctx, key)
    return InForce(key if learnt else "", key if learnt else "", scores_key(ctx, project, config), note)
