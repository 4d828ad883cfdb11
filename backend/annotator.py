"""A person at Label Studio, played from hidden masks: for the demo and the tests of the whole loop."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from backend.label_config import ProjectConfig
from backend.labelstudio import LabelStudio
from backend.regions import UNLABELLED, fine_regions, to_mask
from model.classes import IGNORE


@dataclass(frozen=True)
class Work:
    """What the annotator did to one task.

    Attributes:
        task: Label Studio's task id.
        ask: what was asked: `coarse` or `full`.
        fixed: regions whose label had to be changed.
        shown: regions that the prelabel showed.
    """

    task: int
    ask: str
    fixed: int
    shown: int


class Annotator:
    """Labels whatever Label Studio serves, as its mask says.

    Args:
        studio: Label Studio, with this person's key.
        project: project id.
        config: the project's controls and classes.
        masks: (H, W) fine class of every pixel of the original image, by task id; IGNORE where unknown.
    """

    def __init__(
        self, studio: LabelStudio, project: int, config: ProjectConfig, masks: Mapping[int, NDArray[np.uint8]]
    ) -> None:
        self.studio, self.project, self.config, self.masks = studio, project, config, masks

    def label_next(self) -> Work | None:
        """Label the task that Label Studio serves now; None when there is none left."""
        task = self.studio.next_task(self.project)
        return None if task is None else self.label(task)

    def label(self, task: Mapping[str, Any]) -> Work:
        """Correct what the task shows: its clusters when it shows clusters, else its mask."""
        shown = prelabel(task)
        coarse = self.config.coarse
        if coarse is not None and any(region.get("from_name") == coarse.name for region in shown):
            return self.submit_coarse(task, shown)
        result = self.full_result(task["id"])
        self.studio.create_annotation(task["id"], result, lead_time=60.0, **started_from(task))
        return Work(task["id"], "full", 0, len(shown))

    def submit_coarse(self, task: Mapping[str, Any], shown: list[dict[str, Any]]) -> Work:
        """Give each cluster the coarse class of most of its pixels."""
        result = [self.corrected(task["id"], region) for region in shown]
        self.studio.create_annotation(task["id"], result, lead_time=5.0, **started_from(task))
        fixed = sum(new["value"] != old["value"] for new, old in zip(result, shown, strict=True))
        return Work(task["id"], "coarse", fixed, len(shown))

    def corrected(self, task: int, region: dict[str, Any]) -> dict[str, Any]:
        """A cluster region with the label that the hidden mask gives it."""
        control, mask = self.config.coarse, self.masks[task]
        if control is None:
            raise ValueError("the project has no coarse control")
        here = to_mask([region], control, (mask.shape[1], mask.shape[0]), control.labels) != UNLABELLED
        fine = mask[here & (mask != IGNORE)]
        if not fine.size:
            return region
        coarse = np.bincount(np.asarray(self.config.classes.coarse_of())[fine]).argmax()
        label = self.config.classes.coarse[coarse]
        return {**region, "value": {**region["value"], control.tag.lower(): [label]}}

    def full_result(self, task: int) -> list[dict[str, Any]]:
        """The regions of the hidden mask."""
        mask = self.masks[task]
        sure = np.full(mask.shape, 255, np.uint8)
        regions = fine_regions(mask, sure, self.config, (mask.shape[1], mask.shape[0]))
        return [{key: value for key, value in region.items() if key != "score"} for region in regions]


def shown_prediction(task: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The prediction that a served task shows, None when it is served bare."""
    predictions = sorted(task.get("predictions") or [], key=lambda p: int(p["id"]))
    return next((p for p in reversed(predictions) if p.get("result")), None)


def prelabel(task: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The regions that a served task shows before anybody labelled it."""
    return list((shown_prediction(task) or {}).get("result", []))


def started_from(task: Mapping[str, Any]) -> dict[str, int]:
    """What Label Studio's editor submits of the prediction that an annotation was started from."""
    prediction = shown_prediction(task)
    return {} if prediction is None else {"parent_prediction": int(prediction["id"])}
