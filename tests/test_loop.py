"""Annotations in, reordered queue out: Label Studio, Redis, web process and worker are all real."""

from __future__ import annotations

import base64
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from conftest import Backend
from numpy.typing import NDArray
from team import Team, clean_old_orders, stages, wait_for

from backend.annotator import prelabel, shown_prediction
from backend.coarse_answers import COARSE_COPY, copy_of
from backend.connection import credentials
from backend.embedded import start_serve, start_worker
from backend.generations import KEEP_ORDERS, expired
from backend.labelstudio import LabelStudio
from backend.regions import fine_regions, to_mask
from model.data import Folder


def test_the_loop_from_clusters_to_a_new_order(
    share_backend: Callable[..., Backend], pictures: dict[Path, NDArray[np.uint8]]
) -> None:
    team = Team(share_backend(FIRSTROW_COARSE_TASKS="2"), pictures)
    team.attach()
    served = team.studio.next_task(team.id)
    assert served is not None
    assert served["id"] == team.ranking()[0]
    shown = prelabel(served)
    assert {region["from_name"] for region in shown} == {"coarse"}
    assert {region["value"]["brushlabels"][0] for region in shown} <= {"Soil (cluster)", "Plant"}
    assert all(region["meta"]["cluster"] == int(region["id"][2:].split("_")[0]) for region in shown)

    team.coarse()
    votes = team.project.decided(team.config)
    assert {0, 1} <= set(votes.tolist()), "two coarse labels name clusters of soil and of plants"
    kept = {p["model_version"] for t in team.masks for p in team.studio.predictions(t)}
    assert COARSE_COPY in kept, "a coarse label is kept when its task comes back"
    assert set(stages(team).values()) == {"new", "returned"}

    before, model = team.ranking(), team.backend.context.board.state(team.id)["model"]
    assert model.startswith("coarse-"), "what coarse answers tell, before the first full annotation"
    first = team.annotator().label_next()
    assert first is not None
    assert first.task == before[0], (before, team.ranking(), stages(team), team.backend.context.board.state(team.id))
    assert first.ask == "full"
    round_one = team.wait(team.backend.round(team.id))
    second = team.annotator().label_next()
    assert second is not None
    team.wait(round_one)
    state = team.backend.context.board.state(team.id)
    assert state["model"].startswith("model-")
    assert first.task not in team.ranking()
    assert len(team.ranking()) == len(pictures) - 2
    curve = team.project.store.read_json(team.project.key("curve.json"))
    assert [row["task"] for row in curve] == [second.task], "each label is scored by the model that had not seen it"
    assert 0 <= curve[0]["miou"] <= 1
    fine = prelabel(team.studio.next_task(team.id) or {})
    assert {region["from_name"] for region in fine} == {"seg"}
    assert all(0 <= region["score"] <= 1 for region in fine)


def test_the_loop_with_a_network_that_is_trained(
    make_backend: Callable[..., Backend], pictures: dict[Path, NDArray[np.uint8]]
) -> None:
    team = Team(make_backend(FIRSTROW_LEARNER="deep", FIRSTROW_COARSE_TASKS="0"), dict(list(pictures.items())[:4]))
    before = team.attach()
    for _ in range(2):
        first = team.annotator().label_next()
        assert first is not None
        before = team.wait(before)
        assert first.task not in team.ranking()
    state, store = team.backend.context.board.state(team.id), team.project.store
    assert state["model"].startswith("model-")
    assert len(store.read_json(team.project.key("network.json"))["trained"]) == 2
    curve = store.read_json(team.project.key("curve.json"))
    assert [row["task"] for row in curve] == [first.task]
    rows = store.read_json(team.project.key("ranking.json"))
    assert all(row["utility"] is not None and row["parts"] for row in rows)
    assert {region["from_name"] for region in prelabel(team.studio.next_task(team.id) or {})} == {"seg"}


def test_coarse_labels_change_the_ranking(
    share_backend: Callable[..., Backend], pictures: dict[Path, NDArray[np.uint8]]
) -> None:
    backend = share_backend(FIRSTROW_COARSE_TASKS="1", FIRSTROW_STRATEGY="gradient-magnitude")
    team = Team(backend, pictures)
    team.attach()
    unlabelled = team.ranking()[1:]
    team.coarse()
    rows = team.project.store.read_json(team.project.key("ranking.json"))
    assert all(row["parts"]["magnitude"] > 0 for row in rows), "coarse labels of one image reach the whole pool"
    assert [t for t in team.ranking() if t in unlabelled] != unlabelled


def test_one_and_three_people_get_the_ranking_exactly(
    make_backend: Callable[..., Backend],
    make_user: Callable[[str], LabelStudio],
    pictures: dict[Path, NDArray[np.uint8]],
) -> None:
    backend = make_backend(FIRSTROW_COARSE_TASKS="0", FIRSTROW_RETRAIN_EVERY="99", FIRSTROW_STRATEGY="random")
    team = Team(backend, pictures)
    team.attach()
    ranking = team.ranking()
    assert sorted(ranking) == sorted(team.masks)
    assert ranking != sorted(ranking)
    backend.stack.close()  # the order of one round, without the next ones
    people = [make_user(name) for name in ("anna", "ben", "chi")]
    served = []
    chance = random.Random(0)
    for person in chance.choices(people, k=len(ranking)):
        task = person.next_task(team.id)
        assert task is not None
        served.append(task["id"])
        person.create_annotation(task["id"], team.annotator().full_result(task["id"]))
    assert served == ranking


def test_people_at_work_at_once_hold_distinct_tasks_of_the_head(
    share_backend: Callable[..., Backend],
    make_user: Callable[[str], LabelStudio],
    pictures: dict[Path, NDArray[np.uint8]],
) -> None:
    team = Team(share_backend(FIRSTROW_COARSE_TASKS="0"), pictures)
    team.attach()
    held = [make_user(name).next_task(team.id) for name in ("anna", "ben", "chi")]
    assert [task["id"] for task in held if task] == team.ranking()[:3]


def test_a_coarse_task_returns_to_the_person_who_labelled_it(
    share_backend: Callable[..., Backend],
    make_user: Callable[[str], LabelStudio],
    pictures: dict[Path, NDArray[np.uint8]],
) -> None:
    team = Team(share_backend(FIRSTROW_COARSE_TASKS="1"), pictures)
    before = team.attach()
    anna = make_user("anna")
    # One label or a few: whether one names every cluster depends on the clusters, which differ from project to project.
    while team.backend.context.board.state(team.id)["phase"] == "coarse":
        work = team.annotator(anna).label_next()
        assert work is not None
        assert work.ask == "coarse"
        before = team.wait(before)
    assert stages(team)[work.task] == "returned"
    for _ in team.masks:
        task = anna.next_task(team.id)
        assert task is not None
        if task["id"] == work.task:
            break
        anna.create_annotation(task["id"], team.annotator().full_result(task["id"]))
    assert task["id"] == work.task


def test_a_death_between_copy_and_delete_loses_nothing(
    share_backend: Callable[..., Backend], pictures: dict[Path, NDArray[np.uint8]]
) -> None:
    team = Team(share_backend(FIRSTROW_COARSE_TASKS="2"), pictures)
    first = team.attach()
    work = team.annotator().label_next()
    assert work is not None
    team.wait(first)
    annotation = team.studio.task(work.task, team.id)["annotations"][0]
    team.studio.create_prediction(work.task, copy_of(annotation), COARSE_COPY)  # as if a publish had died here
    second = team.annotator().label_next()
    assert second is not None
    team.wait(team.backend.round(team.id))
    task = team.studio.task(work.task, team.id)
    copies = [p for p in task["predictions"] if p["model_version"] == COARSE_COPY]
    assert [(row["id"], row["was_cancelled"]) for row in task["annotations"]] == [(annotation["id"], True)]
    assert len(copies) == 1, "taken up where it stopped, not copied twice"
    assert len(copies[0]["result"]) == len(annotation["result"])


def test_what_happened_while_we_were_down_is_made_good(
    make_backend: Callable[..., Backend], pictures: dict[Path, NDArray[np.uint8]]
) -> None:
    backend = make_backend(FIRSTROW_COARSE_TASKS="0", FIRSTROW_RECONCILE_SECONDS="1")
    team = Team(backend, pictures)
    before = team.attach()
    backend.stack.close()
    done, gone = team.ranking()[:2]
    team.segment(done)
    team.studio.http.call("DELETE", f"/api/tasks/{gone}/")
    (added,) = team.studio.upload(team.id, [next(iter(pictures))])
    backend.stack.enter_context(start_serve(backend.folder, backend.environment))
    backend.stack.enter_context(start_worker(backend.folder, backend.environment))
    team.wait(before)
    assert stages(team)[done] == "full"
    assert gone not in stages(team)
    assert added in team.ranking()
    assert done not in team.ranking()
    store, clusters = team.project.store, team.project.key("clusters")
    wait_for(lambda: not any(key.endswith(f"/{gone}.png") for key in store.list(clusters)), 30)  # behind the order


def test_everything_is_rebuilt_from_label_studio(
    share_backend: Callable[..., Backend], pictures: dict[Path, NDArray[np.uint8]]
) -> None:
    backend = share_backend(FIRSTROW_COARSE_TASKS="1")
    team = Team(backend, pictures)
    team.attach()
    team.coarse()
    team.segment(team.ranking()[0])
    before = team.wait(backend.round(team.id))
    was, votes = stages(team), team.project.decided(team.config).tolist()
    backend.context.store.delete_prefix(f"projects/{team.id}")
    backend.context.board.forget(team.id)
    backend.context.board.request_round(team.id, "the store was lost")
    after = team.wait(before)
    assert after > before, "rounds go on counting"
    assert stages(team) == was
    assert team.project.decided(team.config).tolist() == votes


@pytest.mark.parametrize("tag", ["BrushLabels", "BitmaskLabels", "PolygonLabels"])
def test_masks_make_the_way_to_label_studio_and_back(
    share_backend: Callable[..., Backend], pictures: dict[Path, NDArray[np.uint8]], tag: str
) -> None:
    team = Team(share_backend(FIRSTROW_COARSE_TASKS="0", FIRSTROW_IMAGE_SIZE="160"), pictures, tag)
    before = team.attach()
    task = team.ranking()[0]
    team.segment(task)
    team.wait(before)
    stored = team.project.store.read_map(team.project.label_key(task))
    assert stored is not None
    names = [*team.config.classes.fine, *["unknown"] * 253]
    truth = team.masks[task]
    same = np.array([names[c] for c in stored.ravel()]) == np.array(["soil", "crop", "weed"])[truth.ravel()]
    if tag == "PolygonLabels":  # outlines are not pixels, and specks get no polygon of their own
        known = stored.ravel() != 255
        assert known.mean() > 0.9
        assert same[known].mean() > 0.98
    else:
        assert same.all()
    served = prelabel(team.studio.next_task(team.id) or {})
    assert {region["type"] for region in served} == {tag.lower()}


def test_one_bad_task_does_not_harm_the_others(
    share_backend: Callable[..., Backend], pictures: dict[Path, NDArray[np.uint8]], tmp_path: Path
) -> None:
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"not a picture")
    team = Team(share_backend(FIRSTROW_COARSE_TASKS="0"), pictures)
    (unreadable,) = team.studio.upload(team.id, [broken])
    (elsewhere,) = team.studio.import_tasks(team.id, [{"picture": "http://192.0.2.1/picture.jpg"}])
    sized = next(iter(team.masks))
    wrong = fine_regions(np.zeros((10, 10), np.uint8), np.zeros((10, 10), np.uint8), team.config, (10, 10))
    team.studio.create_annotation(sized, wrong)
    team.attach()
    errors = {record.id: record.error for record in team.project.index().values() if record.error}
    assert set(errors) == {unreadable, elsewhere, sized}
    assert "10x10" in errors[sized]
    assert "160x120" in errors[sized]
    assert "192.0.2.1" in errors[elsewhere]
    assert team.ranking()[-2:] == [unreadable, elsewhere], "they keep a place, so that nobody is left without a task"
    good = [task for task in team.masks if task != sized]
    assert sorted(team.ranking()[:-2]) == sorted(good)
    work = team.annotator().label_next()
    assert work is not None
    assert work.task == team.ranking()[0]


def test_a_person_without_our_order_is_told(
    share_backend: Callable[..., Backend], pictures: dict[Path, NDArray[np.uint8]]
) -> None:
    backend = share_backend()
    studio = backend.context.studio
    project = int(studio.create_project("texts", '<View><Text name="t" value="$t"/></View>')["id"])
    studio.connect_ml(**credentials(backend.context.settings, project), title="by Label Studio's own page")
    backend.context.board.request_round(project, "somebody connected it")
    board = backend.context.board
    wait_for(lambda: not board.busy(project))
    error = board.error(project)
    assert error is not None
    assert "BrushLabels" in error["message"]


def test_another_backend_first_prelabels_travel_with_the_ranking(
    make_backend: Callable[..., Backend], share_backend: Callable[..., Backend], pictures: dict[Path, NDArray[np.uint8]]
) -> None:
    helper = make_backend(worker=False)
    team = Team(share_backend(FIRSTROW_COARSE_TASKS="1"), pictures)
    team.studio.connect_ml(
        project=team.id, url=helper.environment["FIRSTROW_URL"], title="sam-helper", is_interactive=True
    )
    team.attach()
    served = team.studio.next_task(team.id)
    assert served is not None
    assert served["id"] == team.ranking()[0]
    assert {region["from_name"] for region in prelabel(served)} == {"coarse"}


def test_clusters_of_each_image_by_itself(
    share_backend: Callable[..., Backend], pictures: dict[Path, NDArray[np.uint8]]
) -> None:
    team = Team(share_backend(FIRSTROW_CLUSTERS="image", FIRSTROW_COARSE_TASKS="1"), pictures)
    first = team.attach()
    work = team.annotator().label_next()
    assert work is not None
    assert work.ask == "coarse"
    team.wait(first)
    record = team.project.index()[work.task]
    own = team.project.own_coarse(record, team.config)
    assert own is not None
    truth = cv2.resize(team.masks[work.task], own.shape[::-1], interpolation=cv2.INTER_NEAREST_EXACT)
    assert ((own == 1) == (truth > 0)).mean() > 0.8


def test_events_during_a_round_cause_the_next_and_none_is_dropped(
    share_backend: Callable[..., Backend], pictures: dict[Path, NDArray[np.uint8]]
) -> None:
    team = Team(share_backend(FIRSTROW_COARSE_TASKS="0"), pictures)
    before = team.attach()
    for task in team.ranking()[:4]:
        team.segment(task)
    team.wait(before)
    assert sum(stage == "full" for stage in stages(team).values()) == 4
    trained = team.project.store.read_json(team.project.key("model.json"))["trained"]
    assert len(trained) == 4
    assert team.backend.round(team.id) - before <= 4


def test_a_project_may_be_finished_and_grow_again(
    share_backend: Callable[..., Backend], pictures: dict[Path, NDArray[np.uint8]]
) -> None:
    team = Team(share_backend(FIRSTROW_COARSE_TASKS="0"), dict(list(pictures.items())[:2]))
    before = team.attach()
    for task in team.ranking():
        team.segment(task)
    before = team.wait(before)
    assert team.ranking() == []
    assert team.studio.next_task(team.id) is None
    assert team.backend.context.board.error(team.id) is None
    (added,) = team.studio.upload(team.id, [next(iter(pictures))])
    team.wait(before)
    assert team.ranking() == [added]
    assert (team.studio.next_task(team.id) or {})["id"] == added


def test_work_begun_before_a_round_can_be_submitted_after_it(
    share_backend: Callable[..., Backend],
    make_user: Callable[[str], LabelStudio],
    pictures: dict[Path, NDArray[np.uint8]],
) -> None:
    team = Team(share_backend(FIRSTROW_COARSE_TASKS="1"), pictures)
    team.attach()
    before = team.coarse()
    anna = make_user("anna")
    opened = anna.next_task(team.id)
    assert opened is not None
    fetched = shown_prediction(opened)
    head = next(p for p in team.studio.predictions(opened["id"]) if p["model_version"].startswith("first-row"))
    assert fetched is not None
    assert fetched["id"] != head["id"], "one is asked for when the task is served, one travels with the order"
    for _ in range(2):
        work = team.annotator().label_next()
        assert work is not None
        assert work.task != opened["id"]
        before = team.wait(before)
    clean_old_orders(team, head["model_version"])
    kept = {p["id"]: p["model_version"] for p in team.studio.predictions(opened["id"])}
    assert {fetched["id"], head["id"]} <= set(kept)
    assert head["model_version"] not in kept.values()
    result = team.annotator().full_result(opened["id"])
    anna.create_annotation(opened["id"], result, parent_prediction=fetched["id"])
    anna.create_annotation(opened["id"], result, parent_prediction=head["id"])


def test_old_orders_go_and_what_may_be_open_stays() -> None:
    now = time.time()
    known = {str(n): {"published": now - 60 * (100 - n), "head": []} for n in range(100)}
    known["97"]["published"] = now - 2 * KEEP_ORDERS
    old = {f"first-row-{n}": n for n in range(80, 99)} | {f"seg-{n}": n for n in range(80, 99)}
    gone = expired(old, dict.fromkeys(old, 10), known)
    assert gone == ["first-row-97"]
    assert len(expired(old, dict.fromkeys(old, 20_000), known)) == 18
    known["80"]["published"] = now - 3 * 24 * 3600
    assert "seg-80" in expired(old, dict.fromkeys(old, 10), known)


def test_a_changed_annotation_is_learnt_again_and_a_new_picture_gets_new_clusters(
    share_backend: Callable[..., Backend], pictures: dict[Path, NDArray[np.uint8]]
) -> None:
    team = Team(share_backend(FIRSTROW_COARSE_TASKS="0"), pictures)
    before = team.attach()
    task, other = team.ranking()[:2]
    for version in ("seg-1" + 18 * "0", "seg-" + 5000 * "9", "first-row-٣"):
        team.studio.create_prediction(other, [], version, 0.5)  # others may name theirs so, and numbers of ours go on
    team.segment(task)
    one = team.wait(before)
    first = team.project.store.read_json(team.project.key("model.json"))
    annotation = team.studio.task(task, team.id)["annotations"][0]
    whole = fine_regions(np.ones((120, 160), np.uint8), np.zeros((120, 160), np.uint8), team.config, (160, 120))
    team.studio.update_annotation(annotation["id"], whole)
    two = team.wait(one)
    assert two < 1000
    second = team.project.store.read_json(team.project.key("model.json"))
    assert first["trained"][str(task)] != second["trained"][str(task)]
    stored = team.project.store.read_map(team.project.label_key(task))
    assert stored is not None
    assert (stored == 1).all()
    data = team.studio.task(other, team.id)["data"]
    team.studio.http.call("PATCH", f"/api/tasks/{task}/", body={"data": data})
    team.wait(two)
    index = team.project.index()
    maps = [team.project.store.read_map(team.project.cluster_key(index[t].clusters, t)) for t in (task, other)]
    np.testing.assert_array_equal(*maps)
    third = team.project.store.read_json(team.project.key("model.json"))
    assert second["trained"][str(task)] != third["trained"][str(task)]


def test_two_rounds_on_real_images(share_backend: Callable[..., Backend], data_folder: Path) -> None:
    images = Folder(data_folder / "peanut")
    names = images.names("train")[:24]
    pictures = {images.file(name): images.mask(name, 1 << 16) for name in names}
    backend = share_backend(FIRSTROW_COARSE_TASKS="2", FIRSTROW_IMAGE_SIZE="192", FIRSTROW_TRAIN_STEPS="20")
    team = Team(backend, pictures)
    team.attach()
    team.coarse()
    for _ in range(2):
        before, ranking = backend.round(team.id), team.ranking()
        work = team.annotator().label_next()
        assert work is not None
        assert work.task == ranking[0]
        team.wait(before)
        assert team.ranking() != ranking[1:], "the new network ranks anew"
    curve = team.project.store.read_json(team.project.key("curve.json"))
    assert len(curve) == 1
    table = np.array(curve[0]["confusion"])
    assert table.sum() == images.mask(names[0], 192).size
    assert np.diag(table).sum() / table.sum() > 0.5


def test_bitmask_prelabels_are_pictures_that_label_studio_shows(
    share_backend: Callable[..., Backend], pictures: dict[Path, NDArray[np.uint8]]
) -> None:
    team = Team(share_backend(FIRSTROW_COARSE_TASKS="0"), pictures, "BitmaskLabels")
    before = team.attach()
    team.segment(team.ranking()[0])
    team.wait(before)
    regions: list[dict[str, Any]] = prelabel(team.studio.next_task(team.id) or {})
    data = base64.b64decode(regions[0]["value"]["imageDataURL"].partition(",")[2])
    picture = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    assert picture.shape == (120, 160, 4)
    control = team.config.fine
    assert (to_mask(regions[:1], control, (160, 120), control.labels) != 255).any()


def test_a_strategy_that_needs_more_than_the_plain_numbers_gets_it(
    make_backend: Callable[..., Backend], pictures: dict[Path, NDArray[np.uint8]]
) -> None:
    team = Team(make_backend(FIRSTROW_COARSE_TASKS="0", FIRSTROW_STRATEGY="bait"), pictures)
    before = team.attach()
    team.segment(team.ranking()[0])
    team.wait(before)
    rows = team.project.store.read_json(team.project.key("ranking.json"))
    assert all(row["utility"] is not None for row in rows), "every picture of the pool has its place by the strategy"
    assert len(team.ranking()) == len(pictures) - 1
    assert team.backend.context.board.error(team.id) is None
