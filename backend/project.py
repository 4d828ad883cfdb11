"""What we hold of one project in the store, and where. All of it can be rebuilt from Label Studio."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from backend import named_maps
from backend.label_config import ProjectConfig, parse
from backend.store import Store
from model.classes import MIXED, UNKNOWN
from model.clusters import DEFAULT_K, Codebook

log = logging.getLogger(__name__)

T = TypeVar("T")
Stage = Literal["new", "coarse", "returned", "full", "other"]
#: Changes when records get another meaning: an index of another format is made anew.
FORMAT = 2
#: Places at the head of the queue for which coarse-labelled tasks are called back and prelabels travel along.
HEAD = 10
#: Where masks by the head of the instant learner lie, in place of the name of a network.
HEAD_MASKS = "head"


@dataclass(frozen=True)
class TaskRecord:
    """One task as last seen in Label Studio.

    Attributes:
        id: Label Studio's task id.
        image: the task's value of the image key, empty when it has none.
        updated_at: Label Studio's time stamp of the task.
        stage: `new` (no annotation), `coarse` (only clusters labelled, so Label Studio does not serve it),
            `returned` (coarse labels set aside, open for full segmentation), `full`, `other` (annotated without a
            mask, for example by a choice alone; Label Studio does not serve it again).
        annotation: id of the annotation (or of the copy, for `returned`) that our masks come from.
        version: changes whenever a person's labels of this task change.
        size: width and height of the original image in pixels, (0, 0) until it was read.
        error: why this task takes no part, in a sentence; empty when all is well.
        coarse: whether there is a coarse mask in the store.
        clusters: names the clusters of its cluster map, empty before there is one.
        counts: pixels of each cluster in that map.
        asked: whether it was served with clusters to label.
        callable: whether its coarse labels may be set aside: they are what we asked for, and nothing more.
        lost: labels of its mask, and classes that its coarse labels allow, that are not in the label config any more:
            those pixels count as unknown.
        tries: how often it failed in a row, up to its last failure.
        next_try: seconds since the epoch, when it is (or was) tried again after its last failure.
        known: whether `asked` is known: not before its labels are read anew where an earlier index was lost.
    """

    id: int
    image: str = ""
    updated_at: str = ""
    stage: Stage = "new"
    annotation: int = 0
    version: str = ""
    size: tuple[int, int] = (0, 0)
    error: str = ""
    coarse: bool = False
    clusters: str = ""
    counts: tuple[int, ...] = ()
    asked: bool = False
    callable: bool = False
    lost: tuple[str, ...] = ()
    tries: int = 0
    next_try: float = 0.0
    known: bool = False

    def to_json(self) -> dict[str, Any]:
        """For the store."""
        return dict(vars(self))  # ten times as fast as dataclasses.asdict, and there may be 100,000 of them

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> TaskRecord:
        """The inverse of `to_json`."""
        tuples = {name: tuple(row.get(name, ())) for name in ("size", "counts", "lost")}
        return cls(**{**row, **tuples})

    @property
    def labelled(self) -> bool:
        """Whether a full annotation can be trained on."""
        return self.stage == "full" and not self.error

    @property
    def in_pool(self) -> bool:
        """Whether Label Studio has yet to see this task segmented."""
        return self.stage not in ("full", "other")

    @property
    def annotated(self) -> bool:
        """Whether Label Studio counts an annotation of it."""
        return self.stage in ("coarse", "full", "other")


Index = dict[int, TaskRecord]


class SavedIndex(NamedTuple):
    """An index as the store has it.

    Attributes:
        data: the file; None where there is none, or none that can be used.
        meaning: names the label config by which its labels were read.
        tasks: by id; never changed.
    """

    data: bytes | None
    meaning: str
    tasks: Index


#: Indexes as this process saw them last, by store and project; a round asks for its project's many times.
INDEXES: dict[tuple[str, int], SavedIndex] = {}
#: ... of this many projects.
MOST = 4


def remember(kept: dict[tuple[str, int], T], place: tuple[str, int], value: T, most: int) -> None:
    """Keep something of a project as the newest of at most `most`."""
    kept.pop(place, None)
    kept[place] = value
    for old in list(kept)[:-most]:  # another thread may be at it
        kept.pop(old, None)


@dataclass(frozen=True)
class Project:
    """The store's folder of one project.

    Args:
        store: where derived things live.
        id: Label Studio's project id.
    """

    store: Store
    id: int

    def key(self, *parts: object) -> str:
        """The store key of one of this project's things."""
        return "/".join(["projects", str(self.id), *map(str, parts)])

    def save_config(self, label_config: str, extra: Mapping[str, Any]) -> None:
        """Keep the label config and what `attach` recorded in Label Studio (`extra`)."""
        self.store.write_json(self.key("config.json"), {"label_config": label_config, "extra": dict(extra)})

    def config(self) -> ProjectConfig:
        """The label config as last seen, with the project's coarse groups.

        Raises:
            ConfigError: it cannot be used, or none was ever saved (then with an empty config's message).
        """
        saved = self.store.read_json(self.key("config.json")) or {}
        return parse(saved.get("label_config", ""), recorded=saved.get("extra"))

    def label_config(self) -> str:
        """The label config's text as last saved."""
        return str((self.store.read_json(self.key("config.json")) or {}).get("label_config", ""))

    def extra(self) -> dict[str, Any]:
        """What `attach` recorded in Label Studio: groups, what was there before."""
        saved = self.store.read_json(self.key("config.json")) or {}
        return dict(saved.get("extra", {}))

    def index(self) -> Index:
        """Every task of the project as last seen, by id."""
        return dict(self._saved_index().tasks)

    def save_index(self, index: Index, config: ProjectConfig | None = None) -> None:
        """Replace the index; `config` is the label config by which its labels were read, the same as before if None."""
        saved = self._saved_index()
        meaning = saved.meaning if config is None else config.meaning
        if saved.data is not None and (saved.meaning, saved.tasks) == (meaning, index):
            return
        tasks = {i: index[i] for i in sorted(index)}
        rows = [record.to_json() for record in tasks.values()]
        data = self.store.write_json(self.key("index.json"), {"format": FORMAT, "meaning": meaning, "tasks": rows})
        remember(INDEXES, (self.store.url, self.id), SavedIndex(data, meaning, tasks), MOST)

    def index_meaning(self) -> str:
        """Names the label config by which the index's labels were read; empty before the first."""
        return self._saved_index().meaning

    def _saved_index(self) -> SavedIndex:
        """The index in the store; read anew where it is not what this process saw last."""
        place, key = (self.store.url, self.id), self.key("index.json")
        before, data = INDEXES.get(place), self.store.read(key)
        if before is not None and before.data == data:
            return before
        saved = self.store.parsed(key, data)
        if not isinstance(saved, dict) or saved.get("format") != FORMAT:
            return SavedIndex(None, "", {})  # of another release: everything is read again from Label Studio
        tasks = {row["id"]: TaskRecord.from_json(row) for row in saved["tasks"]}
        remember(INDEXES, place, found := SavedIndex(data, str(saved.get("meaning", "")), tasks), MOST)
        return found

    def save_shard(self, step: str, number: int, shard: int, records: Iterable[TaskRecord], **more: Any) -> None:
        """Leave the tasks of one job where the job finds them: it need not read those of all others."""
        rows = [record.to_json() for record in records]
        self.store.write_json(self.key("shards", number, f"{step}-{shard}.json"), {"tasks": rows, **more})

    def shard(self, step: str, number: int, shard: int) -> tuple[list[TaskRecord], dict[str, Any]]:
        """What `save_shard` left: tasks, and what else was said; nothing when the round is long over."""
        saved = dict(self.store.read_json(self.key("shards", number, f"{step}-{shard}.json")) or {"tasks": []})
        return [TaskRecord.from_json(row) for row in saved.pop("tasks")], saved

    def codebook(self) -> Codebook | None:
        """The pool's clusters, None before the first fit."""
        saved = self.store.read_json(self.key("codebook.json"))
        return Codebook.from_json(saved["codebook"]) if saved else None

    def cluster_key(self, clusters: str, task: int) -> str:
        """Where the cluster map of a task lies; `clusters` names the way it was made."""
        return self.key("clusters", clusters, f"{task}.png")

    def coarse_key(self, task: int) -> str:
        """Where the coarse mask that a person gave a task lies."""
        return self.key("coarse", f"{task}.png")

    def coarse_answer_key(self, annotation: int) -> str:
        """Where the whole of a coarse answer that was set aside lies."""
        return self.key("coarse-answers", f"{annotation}.json")

    def coarse_answer(self, annotation: int) -> dict[str, Any]:
        """What the store keeps of a coarse answer that was set aside; empty where it has nothing."""
        return dict(self.store.read_json(self.coarse_answer_key(annotation)) or {})

    def coarse_answers(self) -> CoarseAnswers:
        """What the store keeps of coarse answers that were set aside."""
        return CoarseAnswers(self)

    def label_key(self, task: int) -> str:
        """Where the annotation mask (fine classes) of a task lies."""
        return self.key("labels", f"{task}.png")

    def prediction_key(self, model: str, task: int) -> str:
        """Where the network's mask of a task lies (class and confidence, side by side)."""
        return self.key("predictions", model, f"{task}.png")

    def save_prediction(
        self, model: str, task: int, prediction: NDArray[np.uint8], sure: NDArray[np.uint8], names: Sequence[str]
    ) -> None:
        """Keep the network's class (H, W), by number in `names`, and confidence (H, W, 0..255) of every pixel."""
        self.write_named(self.prediction_key(model, task), np.hstack([prediction, sure]), names)

    def prediction(
        self, model: str, task: int, names: Sequence[str]
    ) -> tuple[NDArray[np.uint8], NDArray[np.uint8]] | None:
        """The network's class, by number in `names`, and confidence of every pixel; None when not scored by it."""
        both = self.read_named(self.prediction_key(model, task)) if model else None
        if both is None:
            return None
        values, before = both
        width = values.shape[1] // 2
        return named_maps.renumbered(values[:, :width], before, names), values[:, width:]

    def save_labels(self, task: int, mask: NDArray[np.uint8], config: ProjectConfig) -> None:
        """Keep a task's annotation mask (H, W): fine class or IGNORE."""
        self.write_named(self.label_key(task), mask, config.classes.fine)

    def labels(self, task: int, config: ProjectConfig) -> NDArray[np.uint8] | None:
        """A task's annotation mask (H, W) in the fine classes of today; None without one."""
        saved = self.read_named(self.label_key(task))
        return None if saved is None else named_maps.renumbered(*saved, config.classes.fine)

    def save_own_coarse(self, task: int, mask: NDArray[np.uint8], config: ProjectConfig) -> None:
        """Keep the coarse mask (H, W) that a person gave a task: coarse class, MIXED or UNKNOWN."""
        self.write_named(self.coarse_key(task), mask, config.coarse_names)

    def own_coarse(self, record: TaskRecord, config: ProjectConfig) -> NDArray[np.uint8] | None:
        """The coarse mask that a person gave a task, in the coarse classes of today; None without one."""
        saved = self.read_named(self.coarse_key(record.id)) if record.coarse else None
        return None if saved is None else named_maps.renumbered(*saved, config.coarse_names)

    def write_named(self, key: str, values: NDArray[np.uint8], names: Sequence[str]) -> None:
        """Keep a map (H, W) with the names of its values."""
        self.store.write(key, named_maps.encode(values, names))

    def read_named(self, key: str) -> tuple[NDArray[np.uint8], tuple[str, ...]] | None:
        """A map and the names of its values; None without one. A damaged one is removed, so that it is made again."""
        data = self.store.read(key)
        try:
            return None if data is None else named_maps.decode(data)
        except ValueError as error:
            log.warning("%s: %s", key, error)
            self.store.discard(key, data)
            return None

    def state(self) -> dict[str, Any]:
        """The small state written at each publish; empty before the first."""
        return dict(self.store.read_json(self.key("state.json")) or {})

    def attached(self) -> bool:
        """Whether `attach` has tied the project to us, and `detach` has not undone it; False before the first round."""
        return self.store.exists(self.key("state.json")) and "before" in self.extra()

    def forget_order(self) -> None:
        """The project has no order of ours any more (detach); models, maps and scores stay for another time."""
        for name in ("state.json", "ranking.json", "generations.json", "served.json", "spares.json"):
            self.store.delete(self.key(name))

    def save_votes(self, decided: NDArray[np.uint8], voters: int, config: ProjectConfig) -> None:
        """Keep the coarse class of each cluster, by name, and how many tasks have voted."""
        names = dict(enumerate(config.coarse_names))
        rows = [names.get(int(value), int(value)) for value in decided]
        self.store.write_json(self.key("votes.json"), {"clusters": rows, "voters": voters})

    def decided(self, config: ProjectConfig) -> NDArray[np.uint8]:
        """(k,) coarse class of each cluster by the votes so far; MIXED and UNKNOWN allow every class."""
        saved = self.store.read_json(self.key("votes.json")) or {}
        number = {name: value for value, name in enumerate(config.coarse_names)} | {MIXED: MIXED}
        return np.array([number.get(row, UNKNOWN) for row in saved.get("clusters", [None] * DEFAULT_K)], np.uint8)


class CoarseAnswers(Mapping[int, dict[str, Any]]):
    """What the store keeps of coarse answers that were set aside, by annotation: `task` and `annotation`.

    Each is read when it is asked for: all of them may not fit into memory. One that is damaged is then missing.
    """

    def __init__(self, project: Project) -> None:
        self.project = project
        names = [Path(key).stem for key in project.store.list(project.key("coarse-answers"))]
        self.ids = frozenset(int(name) for name in names if name.isdigit())

    def __getitem__(self, annotation: int) -> dict[str, Any]:
        row = self.project.coarse_answer(annotation) if annotation in self.ids else {}
        if not row:
            raise KeyError(annotation)
        return row

    def __iter__(self) -> Iterator[int]:
        return iter(sorted(self.ids))

    def __len__(self) -> int:
        return len(self.ids)


def pool(index: Index) -> list[TaskRecord]:
    """Tasks still to be segmented, by id."""
    return [index[i] for i in sorted(index) if index[i].in_pool]


def labelled(index: Index) -> list[TaskRecord]:
    """Tasks with a usable full annotation, by id."""
    return [index[i] for i in sorted(index) if index[i].labelled]


def stages(index: Index) -> dict[str, int]:
    """How many tasks are in each stage, and how many have an error."""
    counts = dict.fromkeys(("new", "coarse", "returned", "full", "other"), 0)
    for record in index.values():
        counts[record.stage] += 1
    return {**counts, "unusable": sum(bool(record.error) for record in index.values())}


def deleted_tasks(index: Index, annotations: Iterable[int]) -> set[int]:
    """Tasks whose annotation is among the deleted ones."""
    gone = set(annotations)
    return {record.id for record in index.values() if record.annotation in gone and record.annotated}


def known(mask: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """(H, W) pixels of a coarse mask that name one coarse class."""
    return np.asarray(mask < min(MIXED, UNKNOWN))
