"""Which of the two learners people see masks of: the head, or the network that is trained in the background."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from backend.project import Project
from model.classes import Classes

#: Labels that both were tested on from which on they are compared, and the newest of them that are.
LEAST_PAIRS, PAIRS = 10, 30


def model_info(project: Project) -> dict[str, Any]:
    """The network in force: version, trained (task -> label version), classes, note; empty before the first."""
    return dict(project.store.read_json(project.key("network.json")) or {})


def knows(info: Mapping[str, Any], classes: Classes) -> bool:
    """Whether a model was trained for just these classes, in whatever order."""
    return sorted(info.get("classes", ())) == sorted(classes.fine)


def compare(project: Project, curve: Sequence[Mapping[str, Any]]) -> None:
    """Say which of the two was better of late.

    Args:
        project: whose they are.
        curve: rows of the learning curve; those of labels that the network was tested on too have its `network`.
    """
    pairs = [row for row in curve if row.get("network")][-PAIRS:]
    if not pairs:
        return
    head, network = ([row["miou"] for row in pairs], [row["network"]["miou"] for row in pairs])
    gains = [b - a for a, b in zip(head, network, strict=True)]
    error = statistics.stdev(gains) / len(gains) ** 0.5 if len(gains) > 1 else 0.0
    ahead = len(pairs) >= LEAST_PAIRS and statistics.fmean(gains) > error
    said = {"pairs": len(pairs), "head": statistics.fmean(head), "network": statistics.fmean(network), "ahead": ahead}
    project.store.write_json(project.key("comparison.json"), said)


def comparison(project: Project) -> dict[str, Any]:
    """What `compare` has said, and the network it is about: `pairs`, `head`, `network`, `ahead`, `version`, `trained`.

    Empty before there is a network.
    """
    info = model_info(project)
    if "version" not in info:
        return {}
    said = dict(project.store.read_json(project.key("comparison.json")) or {})
    return {**said, "version": info["version"], "trained": len(info["trained"]), "classes": info["classes"]}


def tuned_in_force(project: Project, classes: Classes) -> str:
    """The network whose masks people see; empty while they see the head's."""
    if not (project.store.read_json(project.key("comparison.json")) or {}).get("ahead"):
        return ""
    info = model_info(project)
    return str(info["version"]) if knows(info, classes) else ""
