"""Alone in calling Label Studio: projects, tasks, annotations, predictions, and what `attach` sets up.

What Label Studio sends stays a dictionary with Label Studio's own field names.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from backend.errors import LabelStudioError
from backend.transport import Transport

Row = dict[str, Any]

#: Tasks asked for in one page of a listing.
PAGE = 1000
#: Tasks asked for at once with all their masks.
FULL_PAGE = 20
#: Fields of the tasks that changed last.
COUNTED = "id,updated_at,total_annotations,cancelled_annotations"
#: Why Label Studio answers 500 to every listing with a certain task.
UNSHOWN = "an annotation or a draft there holds what it cannot write, half a character for example"
#: The fields of a light row.
LIGHT = "id,data,updated_at,is_labeled,total_annotations,cancelled_annotations"


class LabelStudio:
    """One Label Studio, as the user whose key we hold.

    Every method raises `LabelStudioError` when Label Studio cannot be reached or says no; the error's `status` is the
    HTTP status, and its text says what to do.

    Args:
        url: where Label Studio is.
        key: personal access token or legacy token.
        patience: `timeout` and `tries`, as `Transport` has them.
    """

    def __init__(self, url: str, key: str, **patience: Any) -> None:
        self.http = Transport(url, key, **patience)

    @property
    def url(self) -> str:
        """Where Label Studio is, without a final slash."""
        return self.http.url

    # The installation

    def version(self) -> str:
        """The release, for example "1.23.2"; empty if it does not say."""
        return str(self.http.call("GET", "/api/version").get("release", ""))

    def create_user(self, **fields: object) -> Row:
        """Make an account in the organisation of the key's user (`email`, `username`, `first_name`, ...)."""
        return dict(self.http.call("POST", "/api/users/", body=fields))

    def users(self) -> list[Row]:
        """Accounts of the organisation."""
        return list(self.http.call("GET", "/api/users/"))

    def delete_user(self, user: int) -> None:
        """Delete an account; its annotations stay, without an author. Only the organisation's owner may."""
        self._delete(f"/api/users/{user}/")

    def whoami(self) -> Row:
        """The user whose key we hold."""
        return dict(self.http.call("GET", "/api/current-user/whoami"))

    # Projects

    def project(self, project: int) -> Row:
        """Settings of a project, its `label_config` among them."""
        return dict(self.http.call("GET", f"/api/projects/{project}/"))

    def projects(self, title: str) -> list[Row]:
        """Projects whose title contains this."""
        return list(self.http.call("GET", "/api/projects/", params={"title": title, "page_size": 100})["results"])

    def label_config(self, project: int) -> str:
        """The project's label config alone."""
        return str(self.some_settings(project, "label_config")["label_config"])

    def some_settings(self, project: int, *names: str) -> Row:
        """Some settings of a project; cheaper than all of `project`."""
        return dict(self.http.call("GET", f"/api/projects/{project}/", params={"include": ",".join(["id", *names])}))

    def version_in_force(self, project: int) -> str:
        """The version of predictions that a project is sorted by and shows; empty without one."""
        return str(self.some_settings(project, "model_version")["model_version"] or "")

    def used_controls(self, project: int) -> set[str]:
        """Names of the controls that annotations and drafts use: Label Studio refuses a label config without them."""
        row = self.http.call("GET", f"/api/projects/{project}/summary/")
        drawn = {str(name).partition("|")[0] for name in row["created_annotations"]}
        return drawn | set(row["created_labels"]) | set(row["created_labels_drafts"])

    def create_project(self, title: str, label_config: str, **settings: object) -> Row:
        """Create a project."""
        body = {"title": title, "label_config": label_config, **settings}
        return dict(self.http.call("POST", "/api/projects/", body=body))

    def patch_project(self, project: int, **settings: object) -> Row:
        """Change settings of a project; Label Studio sends us PROJECT_UPDATED for it."""
        return dict(self.http.call("PATCH", f"/api/projects/{project}/", body=settings))

    def delete_project(self, project: int) -> None:
        """Delete a project with all its tasks."""
        self.http.call("DELETE", f"/api/projects/{project}/")

    # Tasks

    def import_tasks(self, project: int, tasks: Sequence[Mapping[str, Any]]) -> list[int]:
        """Add tasks (`{"image": ...}` or `{"data": ..., "annotations": ...}`) and return their ids in order."""
        path = f"/api/projects/{project}/import"
        answer = self.http.call("POST", path, params={"return_task_ids": "true"}, body=list(tasks))
        return [int(task) for task in answer["task_ids"]]

    def upload(self, project: int, files: Iterable[Path]) -> list[int]:
        """Upload image files as tasks and return their ids in order."""
        return [task for file in files for task in self._upload(project, file)]

    def _upload(self, project: int, file: Path) -> list[int]:
        path = f"/api/projects/{project}/import"
        with file.open("rb") as stream:
            answer = self.http.call(
                "POST",
                path,
                params={"return_task_ids": "true"},
                files={"file": (file.name, stream)},
            )
        return [int(task) for task in answer["task_ids"]]

    def tasks(self, project: int) -> Iterator[Row]:
        """Light rows of all tasks, by id: data, updated_at, is_labeled, total_annotations (without skips)."""
        return self._listing(project, {}, PAGE, include=LIGHT)

    def changed_since(self, project: int, when: str) -> Iterator[Row]:
        """Light rows of tasks created, annotated, or freed of an annotation after `when` (ISO time), newest first."""
        query = _where("updated_at", "greater", "Datetime", when) | {"ordering": ["-tasks:updated_at"]}
        return self._listing(project, query, PAGE, include=LIGHT)

    def newest_tasks(self, project: int, most: int) -> tuple[list[Row], int, int]:
        """The tasks that were changed last, newest first, at most so many; numbers of tasks and of annotations."""
        query = {"ordering": ["-tasks:updated_at"]}
        params = {"project": project, "page": 1, "page_size": most, "query": json.dumps(query)}
        answer = self.http.call("GET", "/api/tasks/", params={**params, "include": COUNTED, "resolve_uri": "false"})
        return list(answer["tasks"]), int(answer["total"]), int(answer["total_annotations"])

    def updated_at(self, project: int, task: int) -> str:
        """When a task was changed last, as the listing says it, also where the task cannot be shown; empty if gone."""
        rows = self._listing(project, _chosen([task]), 1, include="id,updated_at")
        return next((str(row["updated_at"]) for row in rows), "")

    def tasks_with_version(self, project: int, version: str) -> set[int]:
        """Ids of the tasks that have a prediction of this version."""
        query = _where("predictions_model_versions", "contains", "List", [version])
        rows = self._listing(project, query, PAGE, include="id,predictions_model_versions")
        return {int(row["id"]) for row in rows if _names(row["predictions_model_versions"], version)}

    def tasks_with_draft(self, project: int) -> set[int]:
        """Ids of the tasks that somebody has a draft of, begun and not submitted."""
        query = _where("draft_exists", "equal", "Boolean", True)  # a row's `drafts` are those of the key's user alone
        return {int(row["id"]) for row in self._listing(project, query, PAGE, include="id")}

    def tasks_annotated_by(self, project: int, user: int) -> set[int]:
        """Ids of the tasks that have an annotation of this account, skipped ones among them."""
        query = _where("annotators", "contains", "List", user)
        return {int(row["id"]) for row in self._listing(project, query, PAGE, include="id")}

    def drafts(self, task: int) -> list[Row]:
        """Drafts of a task, whoever began them; `annotation` is the annotation that one hangs on, None without.

        Label Studio deletes the drafts of an annotation whenever any field of it is changed.
        """
        return list(self.http.call("GET", f"/api/tasks/{task}/drafts"))

    def drafted(self, task: int) -> set[int]:
        """Ids of the annotations of a task that somebody has a draft of."""
        return {int(row["annotation"]) for row in self.drafts(task) if row.get("annotation")}

    def create_draft(self, task: int, annotation: int, result: Sequence[Mapping[str, Any]], lead_time: float) -> None:
        """Begin a change of an annotation; the draft is the key's user's."""
        path = f"/api/tasks/{task}/annotations/{annotation}/drafts"
        self.http.call("POST", path, body={"result": list(result), "lead_time": lead_time})

    def head(self, project: int) -> set[int]:
        """Ids of the first tasks in the order of the version in force."""
        params = {"project": project, "page": 1, "page_size": FULL_PAGE, "include": "id"}
        query = json.dumps({"ordering": ["tasks:predictions_score"]})
        return {
            int(row["id"]) for row in self.http.call("GET", "/api/tasks/", params={**params, "query": query})["tasks"]
        }

    def task(self, task: int, project: int | None = None) -> Row:
        """One task with its annotations and predictions.

        Name its project where you know it: asked for a single task that has no prediction, Label Studio first asks
        the project's ML backend for one, which may be somebody else's and slow.

        Raises:
            LabelStudioError: it is gone (status 404), cannot be shown (500), or any other trouble.
        """
        if project is None:
            return dict(self.http.call("GET", f"/api/tasks/{task}/", params={"resolve_uri": "false"}))
        unshown: set[int] = set()
        for row in self.full_tasks(project, [task], unshown):
            return row
        if unshown:
            remedy = "delete that annotation, or the task"
            raise LabelStudioError(f"Label Studio cannot show task {task} (500): {UNSHOWN}; {remedy}", status=500)
        raise LabelStudioError(f"task {task} of project {project} is gone from Label Studio", status=404)

    def full_tasks(self, project: int, tasks: Iterable[int], unshown: set[int] | None = None) -> Iterator[Row]:
        """The tasks that still exist, each with its annotations and predictions.

        Args:
            project: Label Studio's project id.
            tasks: their ids.
            unshown: gets the tasks that Label Studio cannot show, see `UNSHOWN`; without it such a task is an error.
        """
        ids = list(tasks)
        for start in range(0, len(ids), FULL_PAGE):
            yield from self._full_page(project, ids[start : start + FULL_PAGE], unshown)

    def _full_page(self, project: int, tasks: list[int], unshown: set[int] | None) -> list[Row]:
        try:
            return list(self._listing(project, _chosen(tasks), FULL_PAGE, fields="all"))
        except LabelStudioError as error:
            if unshown is None or error.status != 500 or not self.http.answers():
                raise
        if len(tasks) > 1:
            return [row for task in tasks for row in self._full_page(project, [task], unshown)]
        unshown.update(tasks)
        return []

    def _listing(self, project: int, query: Mapping[str, Any], size: int, **params: str) -> Iterator[Row]:
        page, seen, total = 1, 0, 1
        while seen < total:
            answer = self.http.call(
                "GET",
                "/api/tasks/",
                params={
                    "project": project,
                    "page": page,
                    "page_size": size,
                    "query": json.dumps(query),
                    "resolve_uri": "false",  # else s3:// becomes a path that changes with the task
                    **params,
                },
            )
            yield from answer["tasks"]
            page, seen, total = page + 1, seen + size, int(answer["total"])

    def next_task(self, project: int) -> Row | None:
        """The task that Label Studio serves to the key's user now, None when there is none left."""
        try:
            return dict(self.http.call("GET", f"/api/projects/{project}/next/"))
        except LabelStudioError as error:
            if error.status == 404:
                return None
            raise

    def download(self, path: str, limit: int, hosts: Collection[str] = ()) -> bytes:
        """Bytes of a file that Label Studio serves, or that it sends us on to (presigned cloud storage).

        Args:
            path: begins with a slash; our key goes along, but only to Label Studio itself.
            limit: most bytes to accept.
            hosts: that the operator allows, besides public addresses.
        """
        return self.http.download(path, limit, hosts)

    # Annotations

    def create_annotation(self, task: int, result: Sequence[Mapping[str, Any]], **more: object) -> Row:
        """Submit an annotation; `completed_by`, `was_cancelled`, `lead_time` and the like in `more`."""
        return dict(
            self.http.call(
                "POST",
                f"/api/tasks/{task}/annotations/",
                body={"result": list(result), **more},
            )
        )

    def update_annotation(self, annotation: int, result: Sequence[Mapping[str, Any]]) -> Row:
        """Replace what an annotation says."""
        return dict(
            self.http.call(
                "PATCH",
                f"/api/annotations/{annotation}/",
                body={"result": list(result)},
            )
        )

    def annotation(self, annotation: int) -> Row:
        """One annotation with its regions.

        Raises:
            LabelStudioError: it is gone (status 404), or any other trouble.
        """
        return dict(self.http.call("GET", f"/api/annotations/{annotation}/"))

    def patch_annotation(self, annotation: int, **fields: object) -> Row:
        """Change fields of an annotation; the others keep what they say. Returns it as it is then."""
        return dict(self.http.call("PATCH", f"/api/annotations/{annotation}/", body=fields))

    def delete_annotation(self, annotation: int) -> None:
        """Delete an annotation; fine if it is already gone."""
        self._delete(f"/api/annotations/{annotation}/")

    # Predictions

    def create_prediction(
        self,
        task: int,
        result: Sequence[Mapping[str, Any]],
        version: str,
        score: float | None = None,
    ) -> int:
        """Store one prediction and return its id. Label Studio does not check it."""
        body = {"task": task, "result": list(result), "model_version": version}
        body |= {} if score is None else {"score": score}
        return int(self.http.call("POST", "/api/predictions/", body=body)["id"])

    def import_predictions(self, project: int, predictions: Sequence[Mapping[str, Any]]) -> int:
        """Store many predictions (`task`, `result`, `score` in [0, 1], `model_version`) in one request.

        Returns:
            How many were stored: Label Studio drops those it dislikes without a word, so compare.
        """
        path = f"/api/projects/{project}/import/predictions"
        return int(self.http.call("POST", path, body=list(predictions))["created"])

    def predictions(self, task: int) -> list[Row]:
        """All predictions of a task with their regions."""
        return list(self.http.call("GET", "/api/predictions/", params={"task": task}))

    def patch_prediction(self, prediction: int, **fields: object) -> None:
        """Change a prediction; its id stays, and with it what people started from it."""
        self.http.call("PATCH", f"/api/predictions/{prediction}/", body=fields)

    def delete_prediction(self, prediction: int) -> None:
        """Delete one prediction; fine if it is already gone."""
        self._delete(f"/api/predictions/{prediction}/")

    def versions(self, project: int) -> dict[str, int]:
        """How many predictions there are of each version."""
        return dict(self.http.call("GET", f"/api/projects/{project}/model-versions/"))

    def delete_version(self, project: int, version: str) -> None:
        """Delete all predictions of a version, and keep the version in force.

        Label Studio clears `project.model_version` whenever it equals the ML backend's title, whatever is deleted.
        """
        before = self.project(project)["model_version"]
        self.http.call(
            "DELETE",
            f"/api/projects/{project}/model-versions/",
            body={"model_version": version},
        )
        if before and before != version and not self.project(project)["model_version"]:
            self.patch_project(project, model_version=before)

    # What `attach` sets up

    def ml_backends(self, project: int) -> list[Row]:
        """Connected ML backends, the one that Label Studio asks first; each is asked for its health by this call."""
        rows = self.http.call("GET", "/api/ml/", params={"project": project})
        return sorted(rows, key=lambda row: int(row["id"]))

    def connect_ml(self, **fields: object) -> Row:
        """Connect an ML backend (`project`, `url`, `title`, ...); Label Studio asks its `/health` and `/setup`."""
        return dict(self.http.call("POST", "/api/ml/", body=fields))

    def patch_ml(self, backend: int, **fields: object) -> Row:
        """Change a connection; `url`, `project` and the credentials must be among the fields.

        With a new title Label Studio moves `project.model_version` along in the same transaction.
        """
        return dict(self.http.call("PATCH", f"/api/ml/{backend}", body=fields))

    def delete_ml(self, backend: int) -> None:
        """Disconnect an ML backend; its webhook stays."""
        self._delete(f"/api/ml/{backend}")

    def start_training(self, backend: int) -> None:
        """Press "Start training"."""
        self.http.call("POST", f"/api/ml/{backend}/train", body={})

    def webhooks(self, project: int) -> list[Row]:
        """Webhooks of the project."""
        return list(self.http.call("GET", "/api/webhooks/", params={"project": project}))

    def create_webhook(self, project: int, url: str, headers: Mapping[str, str]) -> Row:
        """Have every event of the project sent to `url`."""
        body = {"project": project, "url": url, "headers": dict(headers)}
        return dict(
            self.http.call(
                "POST",
                "/api/webhooks/",
                body=body | {"send_payload": True, "send_for_all_actions": True},
            )
        )

    def patch_webhook(self, webhook: int, **fields: object) -> Row:
        """Change a webhook."""
        return dict(self.http.call("PATCH", f"/api/webhooks/{webhook}/", body=fields))

    def delete_webhook(self, webhook: int) -> None:
        """Delete a webhook."""
        self._delete(f"/api/webhooks/{webhook}/")

    def views(self, project: int) -> list[Row]:
        """Data Manager tabs, from left to right."""
        return list(self.http.call("GET", "/api/dm/views/", params={"project": project}))

    def columns(self, project: int) -> list[Row]:
        """Columns of the Data Manager, and which of them it shows by default."""
        return list(self.http.call("GET", "/api/dm/columns/", params={"project": project})["columns"])

    def create_view(self, project: int, data: Mapping[str, Any]) -> Row:
        """Add a Data Manager tab at the right."""
        return dict(self.http.call("POST", "/api/dm/views/", body={"project": project, "data": dict(data)}))

    def order_views(self, project: int, views: Sequence[int]) -> None:
        """Put the Data Manager tabs in this order."""
        self.http.call(
            "POST",
            "/api/dm/views/order/",
            body={"project": project, "ids": list(views)},
        )

    def delete_view(self, view: int) -> None:
        """Delete a Data Manager tab."""
        self._delete(f"/api/dm/views/{view}/")

    def _delete(self, path: str) -> None:
        try:
            self.http.call("DELETE", path)
        except LabelStudioError as error:
            if error.status != 404:
                raise


def _where(column: str, operator: str, kind: str, value: object) -> dict[str, Any]:
    item = {
        "filter": f"filter:tasks:{column}",
        "operator": operator,
        "type": kind,
        "value": value,
    }
    return {"filters": {"conjunction": "and", "items": [item]}}


def _chosen(tasks: Sequence[int]) -> dict[str, Any]:
    return {"selectedItems": {"all": False, "included": list(tasks)}}


def _names(versions: str, version: str) -> bool:
    # On SQLite Label Studio's filter also finds versions that merely contain the name; it cuts off long lists.
    return version in versions.split(",") or versions.endswith("...")
