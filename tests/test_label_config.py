"""Any team's label config is understood, or refused with a sentence; our control comes and goes without a trace."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from label_studio_sdk.label_interface.interface import LabelInterface

from backend.attach import understand
from backend.errors import ConfigError
from backend.label_config import Control, parse, shares_names, with_coarse, without_coarse
from model.classes import Classes

TEAM = """<View>
  <!-- grüße: the team's own words stay -->
  <Image name="picture" value="$photo"/>
  <BrushLabels name="seg" toName="picture">
    <Label value="Crop" hotkey="4"/><Label value="Weed"/><Label value="Soil"/>
  </BrushLabels>
</View>"""
#: No label means background.
PLANTS = TEAM.replace('<Label value="Soil"/>', "")
OWN_COARSE = '<BrushLabels name="coarse" toName="picture">{}</BrushLabels></View>'


def test_names_come_from_the_config() -> None:
    config = parse(TEAM)
    assert (config.image_name, config.image_key) == ("picture", "photo")
    assert config.fine == Control("seg", "BrushLabels", "picture", ("Crop", "Weed", "Soil"))
    assert config.coarse is None


def test_a_label_for_background_stands_against_the_rest() -> None:
    config = parse(TEAM)
    assert config.background == "Soil"
    assert config.classes == Classes(("Crop", "Weed", "Soil"), ("Background", "Foreground"), ((2,), (0, 1)))


def test_without_one_pixels_without_a_region_are_class_0() -> None:
    config = parse(PLANTS)
    assert config.background == ""
    assert config.fine.labels == ("Crop", "Weed")
    assert config.classes == Classes(("background", "Crop", "Weed"), ("Background", "Foreground"), ((0,), (1, 2)))


@pytest.mark.parametrize(
    ("xml", "groups", "expected"),
    [
        (TEAM, {"Plant": ["Weed", "Crop"], "Earth": ["Soil"]}, {"Earth": [2], "Plant": [0, 1]}),
        (PLANTS, {"C": ["Crop"], "W": ["Weed"]}, {"Background": [0], "C": [1], "W": [2]}),
        (PLANTS, {"C": ["Crop"], "Rest": ["background", "Weed"]}, {"Rest": [0, 2], "C": [1]}),
        (PLANTS, {"C": ["Crop"], "background": []}, {"background": [0, 2], "C": [1]}),
    ],
)
def test_groups_by_argument(xml: str, groups: dict[str, list[str]], expected: dict[str, list[int]]) -> None:
    classes = parse(xml, groups).classes
    assert dict(zip(classes.coarse, map(list, classes.groups), strict=True)) == expected
    assert list(classes.coarse) == list(expected)


def test_a_group_called_background_names_the_label_for_it() -> None:
    config = parse(PLANTS, {"Thing": ["Weed"], "Background": ["Crop"]})
    assert config.background == "Crop"
    assert config.classes.coarse == ("Background", "Thing")


@pytest.mark.parametrize(
    ("groups", "sentence"),
    [
        ({"A": ["Crops", "Weed"], "B": ["Soil"]}, "did you mean 'Crop'"),
        ({"A": ["Crop"], "B": ["Soil"]}, "'Weed' is in no group"),
        ({"A": ["Crop", "Weed"], "B": ["Soil", "Weed"]}, "'Weed' is in more than one place"),
        ({"Mixed": ["Crop", "Weed"], "B": ["Soil"]}, "cannot be the name of a group"),
    ],
)
def test_groups_that_do_not_fit_are_refused(groups: dict[str, list[str]], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        parse(TEAM, groups)


@pytest.mark.parametrize(
    ("xml", "sentence"),
    [
        ("", "not valid XML"),
        ("<View>", "not valid XML"),
        ("<View/>", "no control for masks"),
        ('<!DOCTYPE a [<!ENTITY b "bb">]><View>&b;</View>', "DOCTYPE"),
        (TEAM.replace("Image", "Text"), "no <Image> named 'picture'"),
        (TEAM.replace("$photo", "photo"), "it must be"),
        (TEAM.replace("Crop", "Weed"), "not distinct"),
        (TEAM.replace("Crop", "Cr&#10;op"), "line break"),
        (TEAM.replace("</View>", '<PolygonLabels name="p" toName="picture"/></View>'), "several controls"),
        (TEAM.replace("</View>", OWN_COARSE.format('<Label value="A"/>')), "has no label Background"),
        (
            TEAM.replace("</View>", OWN_COARSE.replace("Brush", "Polygon").format('<Label value="A"/>')),
            "polygons cannot hold",
        ),
    ],
)
def test_what_cannot_be_used_is_said(xml: str, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        parse(xml)


@pytest.mark.parametrize("xml", [TEAM, PLANTS, TEAM.replace("\n", "").replace("  ", ""), TEAM.replace("/>", " />")])
@pytest.mark.parametrize("groups", [None, {"Ä & <B>": ["Crop"], "W": ["Weed"]}])
def test_our_control_comes_and_goes_without_a_trace(xml: str, groups: dict[str, list[str]] | None) -> None:
    if groups and "Soil" in xml:
        groups = {**groups, "S": ["Soil"]}
    before = parse(xml, groups)
    after = with_coarse(xml, before.classes)
    config = parse(after)  # the groups are read from it
    assert config.classes == before.classes
    assert config.coarse == Control("coarse", "BrushLabels", "picture", (*before.classes.coarse, "Mixed"))
    assert config.fine == before.fine
    assert with_coarse(after, before.classes) == after
    assert without_coarse(after) == xml
    LabelInterface(after).validate()  # type: ignore[no-untyped-call]


def test_a_renamed_label_keeps_working_with_default_groups() -> None:
    after = with_coarse(TEAM, parse(TEAM).classes).replace('value="Weed"', 'value="Thistle"')
    assert parse(after).classes.fine == ("Crop", "Thistle", "Soil")


SOIL_AND_PLANTS = {"groups": {"Earth": ["Soil"], "Plant": ["Crop", "Weed"]}, "background": "Soil"}


@pytest.mark.parametrize(
    ("labels", "expected", "regrouped"),
    [
        (("Crop", "Weed", "Soil"), {"Earth": ["Soil"], "Plant": ["Crop", "Weed"]}, ()),
        (("Soil", "Weed", "Crop"), {"Earth": ["Soil"], "Plant": ["Weed", "Crop"]}, ()),
        (("Crop", "Weed", "Soil", "Stone"), {"Earth": ["Soil"], "Plant": ["Crop", "Weed", "Stone"]}, ("Stone",)),
        (("Crop", "Thistle", "Soil"), {"Earth": ["Soil"], "Plant": ["Crop", "Thistle"]}, ("Thistle",)),
        (("Crop", "Weed", "Erde"), {"Earth": ["Erde"], "Plant": ["Crop", "Weed"]}, ("Erde",)),
        (("Maize", "Thistle", "Soil"), {"Earth": ["Soil"], "Plant": ["Maize", "Thistle"]}, ("Maize", "Thistle")),
        (("Soil",), {"Earth": ["Soil"]}, ()),
        (("A", "B"), {"Background": ["background"], "Foreground": ["A", "B"]}, ("A", "B")),
    ],
)
def test_groups_that_were_written_down_follow_the_labels(
    labels: tuple[str, ...], expected: dict[str, list[str]], regrouped: tuple[str, ...]
) -> None:
    xml = TEAM.replace(
        '<Label value="Crop" hotkey="4"/><Label value="Weed"/><Label value="Soil"/>',
        "".join(f'<Label value="{label}"/>' for label in labels),
    )
    recorded = SOIL_AND_PLANTS if labels != ("A", "B") else {**SOIL_AND_PLANTS, "background": ""}
    config = parse(xml, recorded=recorded)
    classes = config.classes
    named = {g: [classes.fine[c] for c in of] for g, of in zip(classes.coarse, classes.groups, strict=True)}
    assert named == expected
    assert config.regrouped == regrouped


@pytest.mark.parametrize("recorded", [SOIL_AND_PLANTS, {"groups": SOIL_AND_PLANTS["groups"]}])
def test_groups_given_anew_leave_unlabelled_pixels_unknown(recorded: dict[str, Any]) -> None:
    xml = TEAM.replace('value="Soil"', 'value="Loam"')
    plants = {"Plant": ["Crop", "Weed"]}
    assert parse(xml, {"Earth": ["Loam"], **plants}, recorded).background == "Loam"
    asked = parse(xml, {"Earth": ["background"], "Plant": ["Crop", "Weed", "Loam"]}, recorded)
    assert asked.background == "", "somebody wants pixels without a region to be background"


def test_the_order_of_groups_in_the_note_means_nothing() -> None:
    xml = TEAM.replace('value="Soil"', 'value="Clay"')
    groups = {"Plant": ["Crop", "Weed"], "Background": ["Loam"]}  # as PostgreSQL orders them
    config = parse(xml, recorded={"groups": groups, "background": "Loam"})
    assert (config.background, list(config.groups)) == ("Clay", ["Background", "Plant"])
    added = PLANTS.replace('<Label value="Weed"/>', '<Label value="Weed"/><Label value="soil"/>')
    groups = {"Plant": ["Crop", "Weed"], "Background": ["background"]}
    assert parse(added, recorded={"groups": groups, "background": ""}).groups["Background"] == ["soil"]


def test_a_note_holds_all_that_coarse_labels_ever_meant() -> None:
    before = parse(TEAM, {"Earth": ["Soil"], "Plant": ["Crop", "Weed"]})
    divided = parse(TEAM, {"Earth": ["Soil"], "Plant": ["Crop"], "Bad": ["Weed"]})
    note = divided.note(before.note({}))
    assert note["groups"] == {"Earth": ["Soil"], "Plant": ["Crop"], "Bad": ["Weed"]}
    assert note["meant"] == {"Earth": ["Soil"], "Plant": ["Crop", "Weed"], "Bad": ["Weed"]}
    config = parse(TEAM, recorded=note)
    assert config.coarse_of(config.members("Plant", {})) is None, "an answer of before may mean Weed"
    assert config.coarse_of(config.members("Plant", {"Plant": ["Crop"]})) == 1, "this one says that it does not"


def test_the_teams_own_coarse_control_says_itself_what_its_labels_mean() -> None:
    def own(*labels: str) -> str:
        return TEAM.replace("</View>", OWN_COARSE.format("".join(labels)))

    ground, mixed = '<Label value="Ground" classes="Soil"/>', '<Label value="Mixed"/>'
    first = parse(own(ground, '<Label value="A" classes="Crop"/><Label value="B" classes="Weed"/>', mixed))
    note = first.note({})
    swapped = own(ground, '<Label value="A" classes="Weed"/><Label value="B" classes="Crop"/>', mixed)
    renamed = own(ground, '<Label value="Crops" classes="Crop"/><Label value="B" classes="Weed"/>', mixed)
    assert parse(swapped, recorded=note).groups == {"Ground": ["Soil"], "A": ["Weed"], "B": ["Crop"]}
    assert parse(renamed, recorded=note).groups == {"Ground": ["Soil"], "Crops": ["Crop"], "B": ["Weed"]}
    lacking = own(ground, '<Label value="Other"/>', mixed)
    assert parse(lacking, recorded=note).coarse is None, "rounds go on"
    with pytest.raises(ConfigError, match="has no label"):
        understand(lacking, None, note)


def test_names_of_coarse_classes_are_never_the_same() -> None:
    xml = TEAM.replace('"Crop"', '"Weed: tall"').replace('"Weed"', '"tall"')
    config = parse(xml, {"E": ["Soil"], "Plant": ["Weed: tall"], "Plant: Weed": ["tall"]})
    assert len(set(config.coarse_names)) == 3
    names = parse(TEAM, {"soil": ["Soil"], "soil (cluster)": ["Crop"], "P": ["Weed"]}).classes.coarse
    assert len(set(names)) == 3


def test_junk_in_the_note_stops_nothing() -> None:
    for groups in ({"Earth": ["Soil", "Soil"], "Plant": ["Crop", "Weed"]}, {"Mixed": ["Soil"], "Plant": ["Crop"]}, {}):
        config = parse(TEAM, recorded={"groups": groups, "background": "Soil"})
        assert sorted(config.classes.fine) == ["Crop", "Soil", "Weed"]


def test_a_vanished_label_for_background_never_makes_unlabelled_pixels_background() -> None:
    xml = TEAM.replace('<Label value="Soil"/>', "")
    config = parse(xml, recorded=SOIL_AND_PLANTS)
    assert config.background in ("Crop", "Weed")
    assert config.classes.fine == ("Crop", "Weed"), "no class that nobody named"


def test_coarse_labels_have_names_of_their_own() -> None:
    choices = '<Choices name="q" toName="picture"><Choice value="mixed"/></Choices></View>'
    xml = TEAM.replace("</View>", choices)
    classes = parse(xml, {"soil": ["Soil"], "Plant": ["Crop", "Weed"]}).classes
    after = with_coarse(xml, classes)
    config = parse(after)
    assert config.coarse is not None
    assert config.coarse.labels == ("soil (cluster)", "Plant", "Mixed (cluster)")
    assert config.classes.coarse == ("soil (cluster)", "Plant")
    said = [config.coarse_of(config.members(name, {})) for name in ("soil", "soil (cluster)", "Plant", "Mixed", "gone")]
    assert said == [0, 0, 1, None, None]
    assert not shares_names(after)
    assert shares_names(after.replace("soil (cluster)", "Soil"))
    assert without_coarse(after) == xml


def test_a_label_taken_from_our_control_does_not_stop_rounds() -> None:
    after = with_coarse(TEAM, parse(TEAM).classes).replace('value="Foreground"', 'value="Else"')
    assert parse(after).coarse is None, "no coarse labels until `attach` puts the control in anew"


def test_keys_and_colours_are_nobody_elses() -> None:
    tree = ElementTree.fromstring(with_coarse(TEAM, parse(TEAM).classes))  # noqa: S314 ours
    labels = tree.findall(".//*[@name='coarse']/Label")
    # 4 is Crop's; Label Studio gives 1 and 2 to Weed and Soil
    assert [label.get("hotkey") for label in labels] == ["3", "5", "6"]
    assert len({label.get("background") for label in labels}) == 3


def test_many_coarse_labels_get_keys_as_long_as_there_are_some() -> None:
    labels = "".join(f'<Label value="l{n}"/>' for n in range(40))
    xml = TEAM.replace('<Label value="Soil"/>', labels)
    after = with_coarse(xml, parse(xml, {"A": ["Crop"], "B": ["Weed", *(f"l{n}" for n in range(40))]}).classes)
    tree = ElementTree.fromstring(after)  # noqa: S314 ours
    assert {label.get("hotkey") for label in tree.findall(".//*[@name='coarse']/Label")} == {None}


def test_the_teams_own_control_called_coarse_is_left_alone() -> None:
    xml = TEAM.replace('name="seg"', 'name="coarse"')
    config = parse(xml)
    assert (config.fine.name, config.coarse) == ("coarse", None)
    after = parse(with_coarse(xml, config.classes))
    assert after.coarse is not None
    assert (after.fine.name, after.coarse.name) == ("coarse", "firstrow_coarse")


def test_the_shipped_config_is_understood() -> None:
    config = parse((Path(__file__).parents[1] / "label_config.xml").read_text())
    assert config.classes == Classes(("soil", "crop", "weed"), ("Background", "Vegetation"), ((0,), (1, 2)))
    assert config.coarse is not None
    assert config.coarse.labels[-1] == "Mixed"


def test_aliases_are_what_results_hold() -> None:
    assert parse(TEAM.replace('value="Weed"', 'value="Weed plant" alias="Weed"')).fine.labels[1] == "Weed"
