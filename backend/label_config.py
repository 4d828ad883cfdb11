"""Which Image, which control for fine and for coarse labels, and which classes a label config means."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from itertools import chain, repeat
from typing import Any
from xml.parsers import expat
from xml.sax.saxutils import quoteattr

from backend.errors import ConfigError
from model.classes import Classes

#: Controls whose regions are masks.
MASK_TAGS = ("BrushLabels", "BitmaskLabels", "PolygonLabels")
#: Names of the coarse control: the second where the team has a control of the first name.
COARSE_NAMES = ("coarse", "firstrow_coarse")
#: What is written down of labels.
LABELS_NOTED = {"groups", "meant", "background"}
#: The label of a cluster in which several coarse classes meet.
MIXED_LABEL = "Mixed"
#: Key in the `meta` of a cluster's region: the fine classes of each coarse label when the region was made.
MEANS = "means"
#: What a coarse label's name ends in where another label of the project has the name.
DISTINCT = " (cluster)"
#: Names of the class that pixels without a region have where no label means background.
IMPLICIT = ("background", "(background)")
#: Labels that mean what nobody looks for; earlier ones win.
BACKGROUND_LIKE = ("background", "bare soil", "soil", "bare ground", "ground", "earth")
#: What is asked of a person.
TASK = "Clusters: click a wrong one in the list, press its key"
#: Class of the view around our control: says what to take away again.
OURS = "firstrow-coarse"
#: The order in which Label Studio gives keys to labels without one.
KEYS = "1234567890qwetasdfgzxcvbyiopjklnm"
#: Of background, then other coarse classes, then Mixed.
COLOURS = ("#8B5A2B", "#00C853", "#2979FF", "#FFB300", "#D500F9", "#00B8D4")
GREY = "#AAAAAA"
#: Rows of `Classes.sets` must fit a uint8 map beside IGNORE and MIXED.
MOST_ROWS = 254
#: Elements inside each other; nobody needs a tenth of it.
MOST_DEPTH = 100


@dataclass(frozen=True)
class Control:
    """A control tag that draws masks.

    Attributes:
        name: `from_name` of its regions.
        tag: one of MASK_TAGS.
        to_name: the Image it draws on.
        labels: as they appear in results, in the order of the config.
    """

    name: str
    tag: str
    to_name: str
    labels: tuple[str, ...]


@dataclass(frozen=True)
class ProjectConfig:
    """What a label config means to us.

    Attributes:
        image_name: name of the Image tag, `to_name` of regions.
        image_key: key of a task's data that holds the image.
        fine: the control that people annotate with.
        coarse: the control for clusters, None before `with_coarse`.
        classes: fine and coarse classes; the background's coarse class comes first.
        background: the label for background; pixels without a region are then unknown. Empty when no label means
            background: pixels without a region are then class 0 of `classes.fine`.
        regrouped: labels that no group named, so that each went into the group that seemed likeliest.
        recorded: each coarse label and its fine classes as they were written down, for answers that do not say it.
    """

    image_name: str
    image_key: str
    fine: Control
    coarse: Control | None
    classes: Classes
    background: str
    regrouped: tuple[str, ...] = ()
    recorded: tuple[tuple[str, tuple[str, ...]], ...] = ()

    @property
    def groups(self) -> dict[str, list[str]]:
        """Fine classes of each coarse class, by name: what coarse labels mean today."""
        members = [[self.classes.fine[c] for c in group] for group in self.classes.groups]
        return dict(zip(self.classes.coarse, members, strict=True))

    @property
    def coarse_names(self) -> tuple[str, ...]:
        """Names of the coarse classes that differ wherever the fine classes of one do: for what is kept by name."""
        return tuple(json.dumps([name, sorted(members)]) for name, members in self.groups.items())

    @property
    def meaning(self) -> str:
        """Names all that a person's labels are read by: where it differs, they must be read again."""
        controls = (self.image_name, self.image_key, self.fine, self.coarse)
        read_by = (*controls, self.classes, self.background, self.recorded)
        return hashlib.sha1(repr(read_by).encode()).hexdigest()[:16]

    def note(self, old: Mapping[str, Any]) -> dict[str, Any]:
        """What is written down of labels, so that it can be told later which were renamed, moved, or are gone.

        Args:
            old: what was written down before.
        """
        ever = united(recorded_groups(old, "meant") or {}, recorded_groups(old) or {}, self.groups)
        meant = {label: list(members) for label, members in ever}
        return {"groups": self.groups, "meant": meant, "background": self.background}

    def members(self, label: str, means: Mapping[str, Sequence[str]]) -> frozenset[str]:
        """The fine classes that a coarse label stood for when it was given; none for Mixed.

        Args:
            label: by its name of today or of before it was made distinct.
            means: what the answer says of it; else it stands for all that was ever written down for it.
        """
        known: dict[str, Sequence[str]] = {**self.groups, **dict(self.recorded), **means}
        return frozenset(known.get(label) or known.get(label + DISTINCT) or ())

    def coarse_of(self, members: Set[str]) -> int | None:
        """The coarse class of today that holds all of these fine classes; None without one, or where one is gone."""
        homes = (number for number, group in enumerate(self.groups.values()) if members <= set(group))
        return next(homes, None) if members else None


@dataclass(eq=False)
class Element:
    """An XML element and where its text stands in the UTF-8 source."""

    tag: str
    attributes: dict[str, str]
    start: int
    parent: Element | None
    end: int = 0
    within: list[Element] = field(default_factory=list)


def parse(
    xml: str, groups: Mapping[str, Sequence[str]] | None = None, recorded: Mapping[str, Any] | None = None
) -> ProjectConfig:
    """Understand a label config.

    Groups that a person names now must fit the labels exactly. Groups that were written down before are fitted to the
    labels of today: a label that is gone leaves its group, a new one joins the likeliest.

    Args:
        xml: the project's label config.
        groups: fine labels of each coarse label, as a person names them now.
        recorded: what `attach` or the first round wrote down, used without `groups`: `groups`, `background`, the label
            for it, and `meant`, all that coarse labels ever stood for. The `classes` attributes of a coarse control of
            the team's own come before it; without both background stands against everything else.

    Raises:
        ConfigError: no Image, no control for masks or several, or `groups` that do not fit the labels.
    """
    elements, recorded = read(xml), recorded or {}
    coarse, fine = find_controls(elements)
    control = as_control(fine)
    before = groups_before(coarse, recorded)
    named = groups or before
    background = find_background(control.labels, named)
    if before and not background and had_label_for_background(recorded) and not names_no_label(groups or {}):
        background = heir(control.labels, before, str(recorded.get("background") or ""))
    named, regrouped = (groups, ()) if groups or not before else fitted(before, control.labels, background, recorded)
    classes = group_classes(control.labels, background, named)
    classes = replace(classes, coarse=distinct_names(classes.coarse, elements, coarse))
    if coarse is not None and lacks(as_control(coarse), classes) and (is_ours(coarse) or recorded):
        coarse = None  # somebody took a label away: nothing is asked coarsely until `attach` has seen to it
    if coarse is not None:
        check_coarse(as_control(coarse), classes)
    image, key = find_image(elements, control)
    clusters = as_control(coarse) if coarse else None
    meant = united(recorded_groups(recorded, "meant") or {}, groups or before or {})
    return ProjectConfig(image, key, control, clusters, classes, background, regrouped, meant)


def groups_before(coarse: Element | None, recorded: Mapping[str, Any]) -> dict[str, list[str]] | None:
    """The groups that stand in the team's own coarse control, else those that were written down, else those in ours."""
    said = said_groups(coarse) if coarse is not None else None
    own = said if coarse is not None and not is_ours(coarse) else None
    return own or recorded_groups(recorded) or said


def united(*groups: Mapping[str, Sequence[str]]) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """Each coarse label with all the fine classes that it has in any of these groups."""
    labels = dict.fromkeys(label for one in groups for label in one)
    return tuple((label, tuple(dict.fromkeys(n for one in groups for n in one.get(label, ())))) for label in labels)


def names_no_label(groups: Mapping[str, Sequence[str]]) -> bool:
    """Whether groups name the class of pixels without a region."""
    return any(name in IMPLICIT for members in groups.values() for name in members)


def had_label_for_background(recorded: Mapping[str, Any]) -> bool:
    """Whether a label meant background when the groups were written down: pixels without a region are then unknown."""
    if "background" in recorded:
        return bool(recorded["background"])
    return not names_no_label(recorded_groups(recorded) or {IMPLICIT[0]: IMPLICIT})


def recorded_groups(recorded: Mapping[str, Any], part: str = "groups") -> dict[str, list[str]] | None:
    """The groups that were written down; None where there are none, or something else stands there."""
    groups = recorded.get(part)
    if not isinstance(groups, dict):
        return None
    good = all(isinstance(of, list) and all(isinstance(name, str) for name in of) for of in groups.values())
    named = {str(name): list(dict.fromkeys(of)) for name, of in groups.items() if name != MIXED_LABEL} if good else {}
    return named or None


def background_group(groups: Mapping[str, Sequence[str]], label: str) -> str:
    """Name of the group that background is in; groups come from a database that does not keep their order.

    Args:
        groups: as they were written down, at least one.
        label: the label for background then; empty where none is known.
    """
    names = [label] if label else [*IMPLICIT, *BACKGROUND_LIKE]
    homes = (
        group for name in names for group, of in groups.items() if name in {member.casefold() for member in of} | {*of}
    )
    return next(homes, next(iter(groups)))


def heir(labels: Sequence[str], before: Mapping[str, Sequence[str]], gone: str) -> str:
    """The label for background where the one that was written down is gone: pixels without a region stay unknown.

    Args:
        labels: of today.
        before: groups as they were written down.
        gone: the label for background then.
    """
    home = background_group(before, gone)
    elsewhere = {label for name, members in before.items() if name != home for label in members}
    likely = [label for label in labels if label in before[home]]
    likely += [label for label in labels if label not in elsewhere]
    return next(iter(likely), labels[0])


def fitted(
    before: Mapping[str, Sequence[str]], labels: Sequence[str], background: str, recorded: Mapping[str, Any]
) -> tuple[dict[str, list[str]] | None, tuple[str, ...]]:
    """Groups that were written down for other labels, for those of today.

    Args:
        before: the groups.
        labels: of today.
        background: the label for it today, empty without one.
        recorded: `background` there is the label for it then.

    Returns:
        The groups, None where none of their labels is left; and the labels that no group had named.
    """
    known = {*labels, *(() if background else IMPLICIT)}
    kept: dict[str, list[str]] = {name: [] for name in before}
    for name, members in before.items():
        kept[name] = [label for label in members if label in known and not any(label in of for of in kept.values())]
    fresh = tuple(label for label in labels if not any(label in of for of in kept.values()))
    if not any(kept.values()):
        return None, fresh
    first = background_group(before, str(recorded.get("background") or ""))
    for label in fresh:
        home = first if label == background else likely_group(kept, before, background)
        kept.setdefault(home, []).append(label)
    return {name: of for name, of in kept.items() if of}, fresh


def likely_group(kept: Mapping[str, Sequence[str]], before: Mapping[str, Sequence[str]], background: str) -> str:
    """The group of a label that is new: the one whose labels are gone (a label was renamed), else not the background's.

    Args:
        kept: groups with the labels that are left.
        before: groups as they were written down.
        background: the label for it, empty without one.
    """
    emptied = [name for name in before if before[name] and not kept.get(name)]
    if len(emptied) == 1:
        return emptied[0]
    others = [name for name, members in kept.items() if background not in members and not set(members) & set(IMPLICIT)]
    return next(reversed(others), "Foreground")


def distinct_names(names: Sequence[str], elements: Sequence[Element], coarse: Element | None) -> tuple[str, ...]:
    """Coarse names that no other label of the project has; those of a control that is there already stay as they are.

    Args:
        names: of the coarse groups.
        elements: of the label config.
        coarse: the coarse control, if there is one.
    """
    there = {label.get("alias") or label.get("value", "") for label in labels_of(coarse)} if coarse else set()
    own = coarse.within if coarse else []
    others = [e.attributes for e in elements if e.tag in ("Label", "Choice") and not any(e is label for label in own)]
    taken = {name.casefold() for a in others for name in (a.get("alias", ""), a.get("value", "")) if name}

    def distinct(name: str) -> str:
        if name in there or name + DISTINCT in there:
            return name if name in there else name + DISTINCT
        found = name
        while found.casefold() in taken or (found != name and found in names):
            found += DISTINCT
        return found

    return tuple(map(distinct, names))


def is_mixed(label: str) -> bool:
    """Whether a label of a coarse control says that several coarse classes meet."""
    return label.startswith(MIXED_LABEL) and not label.removeprefix(MIXED_LABEL).replace(DISTINCT, "")


def lacks(control: Control, classes: Classes) -> list[str]:
    """Coarse classes without a label in the coarse control."""
    return [name for name in classes.coarse if name not in control.labels]


def is_ours(coarse: Element) -> bool:
    """Whether a coarse control is one that `attach` put in."""
    return coarse.parent is not None and coarse.parent.attributes.get("className") == OURS


def shares_names(xml: str) -> bool:
    """Whether our own coarse control has a label of the same name as another label: people then cannot tell them apart.

    Raises:
        ConfigError: the label config cannot be read.
    """
    elements = read(xml)
    coarse, _ = find_controls(elements)
    if coarse is None or not is_ours(coarse):
        return False
    names = [label.get("alias") or label.get("value", "") for label in labels_of(coarse)]
    return list(distinct_names(names, [e for e in elements if e not in coarse.within], None)) != names


def read(xml: str) -> list[Element]:
    """All elements in document order.

    Raises:
        ConfigError: not well formed, nested without end, or with a document type (entities could grow without end).
    """
    try:
        source = xml.encode()
    except UnicodeEncodeError as error:
        raise ConfigError("the label config has characters that are none: save it once in Label Studio") from error
    parser, found, inside = expat.ParserCreate("UTF-8"), list[Element](), list[Element]()
    bare = [False]  # nothing came since the last start tag

    def start(tag: str, attributes: dict[str, str]) -> None:
        found.append(Element(tag, attributes, parser.CurrentByteIndex, inside[-1] if inside else None))
        if len(inside) > MOST_DEPTH:
            raise ConfigError(f"the label config has more than {MOST_DEPTH} elements inside each other: take some away")
        for outer in inside:
            outer.within.append(found[-1])
        inside.append(found[-1])
        bare[0] = True

    def between(_: str) -> None:
        bare[0] = False

    def end(tag: str) -> None:
        here = parser.CurrentByteIndex  # of the end tag; behind an empty element such as <Label/>
        empty = bare[0] and source.endswith(b"/>", 0, here)
        inside.pop().end = here if empty else source.index(b">", here) + 1
        bare[0] = False

    def refuse(*_: object) -> None:
        raise ConfigError("the label config has a document type: remove <!DOCTYPE ...> from it")

    parser.StartElementHandler, parser.EndElementHandler = start, end
    parser.DefaultHandler, parser.StartDoctypeDeclHandler = between, refuse
    try:
        parser.Parse(source, True)
    except expat.ExpatError as error:
        raise ConfigError(f"the label config is not valid XML ({error}): save it once in Label Studio") from error
    return found


def find_controls(elements: Sequence[Element]) -> tuple[Element | None, Element]:
    """The coarse control, if there is one, and the fine one.

    A lone control is the fine one, whatever its name.
    """
    controls = [element for element in elements if element.tag in MASK_TAGS]
    named = [c for name in reversed(COARSE_NAMES) for c in controls if c.attributes.get("name") == name]
    coarse = named[0] if named and len(controls) > 1 else None
    fine = [c for c in controls if c is not coarse]
    if not fine:
        raise ConfigError(f"the label config has no control for masks: add one of {', '.join(MASK_TAGS)}")
    if len(fine) > 1:
        names = ", ".join(f"{c.tag} {c.attributes.get('name')!r}" for c in fine)
        raise ConfigError(f"the label config has several controls for masks ({names}): keep one, or use two projects")
    return coarse, fine[0]


def as_control(element: Element) -> Control:
    """A control with its labels."""
    found = element.attributes
    names = tuple(label.get("alias") or label.get("value", "") for label in labels_of(element))
    if not names or "" in names or len(set(names)) < len(names):
        raise ConfigError(
            f"the labels of {element.tag} {found.get('name')!r} are missing, nameless or not distinct: list them as "
            '<Label value="..."/> inside it (labels from task data cannot be used)'
        )
    if any(character < " " for name in names for character in name):
        raise ConfigError(f"a label of {element.tag} {found.get('name')!r} has a line break or a tab in it: rename it")
    return Control(found.get("name", ""), element.tag, found.get("toName", ""), names)


def labels_of(control: Element) -> list[dict[str, str]]:
    """Attributes of a control's labels."""
    return [label.attributes for label in control.within if label.tag == "Label"]


def find_image(elements: Sequence[Element], control: Control) -> tuple[str, str]:
    """Name of the Image that a control draws on, and its key in a task's data."""
    images = [element.attributes for element in elements if element.tag == "Image"]
    image = next((found for found in images if found.get("name") == control.to_name), None)
    if image is None:
        raise ConfigError(
            f"the label config has no <Image> named {control.to_name!r}, which {control.tag} {control.name!r} draws "
            'on: add <Image name="..." value="$image"/> and set toName'
        )
    value = image.get("value", "")
    if not value.startswith("$") or len(value) < 2:
        raise ConfigError(
            f'<Image name="{control.to_name}"> has value={value!r}: it must be "$" and a key, as "$image"'
        )
    return control.to_name, value[1:]


def find_background(labels: Sequence[str], groups: Mapping[str, Sequence[str]] | None) -> str:
    """The label for background, empty when none means it.

    A label is one by its name, or as the first of a group that is called background and names only labels.
    """
    known = {name.casefold(): name for name in reversed(labels)}
    by_name = [known[name] for name in BACKGROUND_LIKE if name in known]
    called = [list(members) for name, members in (groups or {}).items() if name.casefold() == BACKGROUND_LIKE[0]]
    by_group = [members[0] for members in called if members and set(members) <= set(labels)]
    return next(iter(by_name + by_group), "")


def group_classes(labels: tuple[str, ...], background: str, groups: Mapping[str, Sequence[str]] | None) -> Classes:
    """Fine classes in the order of the labels, an implicit background first, in coarse classes.

    Raises:
        ConfigError: groups that do not fit the labels, or too many labels.
    """
    implicit = IMPLICIT[1] if IMPLICIT[0] in labels else IMPLICIT[0]
    fine, first = (labels, background) if background else ((implicit, *labels), implicit)
    members = {name: list(of) for name, of in (groups or {"Background": [first]}).items()}
    rest = [name for name in fine if not any(name in of for of in members.values())]
    if not groups:
        members["Foreground"] = rest
    elif not background:
        home = next((n for n, of in members.items() if first in of or n.casefold() == BACKGROUND_LIKE[0]), "Background")
        members[home] = members.get(home, []) + rest
    check_groups(members, fine)
    ordered = sorted((name for name in members if members[name]), key=lambda name: first not in members[name])
    indices = tuple(tuple(sorted(fine.index(name) for name in members[group])) for group in ordered)
    return Classes(fine, tuple(ordered), indices)


def check_groups(members: Mapping[str, Sequence[str]], fine: Sequence[str]) -> None:
    """Refuse groups in which a class is unknown, missing or twice, or with too many classes."""
    said = [name for of in members.values() for name in of]
    faults = []
    for name in sorted(set(said) - set(fine)):
        near = get_close_matches(name, fine, 1)
        faults.append(f"{name!r} is not a label" + (f" (did you mean {near[0]!r}?)" if near else ""))
    faults += [f"{name!r} is in no group" for name in fine if name not in said]
    faults += [f"{name!r} is in more than one place" for name in fine if said.count(name) > 1]
    faults += [f"{MIXED_LABEL!r} cannot be the name of a group"] * (MIXED_LABEL in members)
    if len(fine) + len(members) + 1 > MOST_ROWS:
        faults.append(f"more than {MOST_ROWS - 1} labels and groups")
    if faults:
        raise ConfigError(f"coarse groups: {'; '.join(faults)}. The labels are {', '.join(fine)}; name each one once")


def said_groups(control: Element) -> dict[str, list[str]] | None:
    """Groups by the `classes` attributes of a coarse control's labels; None when it has none."""
    found = {
        label.get("alias") or label.get("value", ""): [part.strip() for part in label["classes"].split(",")]
        for label in labels_of(control)
        if label.get("classes")
    }
    return found or None


def check_own_coarse(xml: str, classes: Classes) -> None:
    """Refuse a coarse control of the team's own whose regions could not be shown.

    Raises:
        ConfigError: it lacks a coarse class.
    """
    coarse, _ = find_controls(read(xml))
    if coarse is not None and not is_ours(coarse):
        check_coarse(as_control(coarse), classes)


def check_coarse(control: Control, classes: Classes) -> None:
    """Refuse a coarse control that lacks a coarse class: its regions could not be shown."""
    if control.tag == "PolygonLabels":
        raise ConfigError(f"{control.name!r} is for clusters, which polygons cannot hold: make it BrushLabels")
    missing = lacks(control, classes)
    if missing:
        raise ConfigError(
            f"{control.tag} {control.name!r} has no label {', '.join(missing)}: add it, or say what each of its labels "
            'stands for, as in <Label value="Plant" classes="crop,weed"/>'
        )


def with_coarse(xml: str, classes: Classes) -> str:
    """The label config with a control for clusters before the fine one; unchanged when it has one.

    Raises:
        ConfigError: the label config cannot be used.
    """
    elements = read(xml)
    coarse, fine = find_controls(elements)
    if coarse is not None:
        return xml
    taken = {element.attributes.get("name") for element in elements}
    name = next((name for name in COARSE_NAMES if name not in taken), "")
    if not name:
        raise ConfigError(f"the names {' and '.join(COARSE_NAMES)} are taken in the label config: rename one")
    source = xml.encode()
    start = above(fine, elements).start
    before = source[:start]
    gap = before[len(before.rstrip()) :].decode()
    [mixed] = distinct_names([MIXED_LABEL], elements, None)
    block = coarse_block(name, fine.attributes.get("toName", ""), classes, mixed, free_keys(elements))
    return before.decode() + block + gap + source[start:].decode()


def above(control: Element, elements: Sequence[Element]) -> Element:
    """The heading directly above a control, else the control itself."""
    same = [e for e in elements if e.parent is control.parent and e.start < control.start]
    last = max(same, key=lambda e: e.start, default=control)
    return last if last.tag == "Header" else control


def coarse_block(name: str, image: str, classes: Classes, mixed: str, keys: Iterable[str]) -> str:
    """Text of our control; `mixed` names the label for clusters in which several coarse classes meet."""
    colours = [COLOURS[min(g, 1) + max(g - 1, 0) % (len(COLOURS) - 1)] for g in range(len(classes.coarse))] + [GREY]
    labels, written = [], must_be_said(classes)
    for index, (label, colour, key) in enumerate(zip([*classes.coarse, mixed], colours, keys, strict=False)):
        fine = [classes.fine[c] for c in classes.groups[index]] if written and index < len(classes.groups) else []
        parts = {"value": label, "background": colour, "hotkey": key, "classes": ",".join(fine)}
        said = " ".join(f"{part}={quoteattr(value)}" for part, value in parts.items() if value)
        labels.append(f"<Label {said}/>")
    head = f'<View className="{OURS}"><Header value={quoteattr(TASK)} size="5"/>'
    control = f'<BrushLabels name="{name}" toName={quoteattr(image)} opacity="0.5">'
    return f"{head}{control}{''.join(labels)}</BrushLabels></View>"


def must_be_said(classes: Classes) -> bool:
    """Whether groups are to be written down.

    Not where background stands against everything else, for that stays right when a label is added or renamed; and
    not where a comma in a name would be misread.
    """
    usual = classes.coarse == ("Background", "Foreground") and len(classes.groups[0]) == 1
    return not usual and not any("," in name for name in classes.fine)


def free_keys(elements: Sequence[Element]) -> Iterator[str]:
    """Hotkeys for our labels, then empty ones.

    Keys that other elements have are left out, and as many more as Label Studio will give to labels without a key,
    so that everybody's keys stay what they were.
    """
    taken = {element.attributes["hotkey"].casefold() for element in elements if "hotkey" in element.attributes}
    without = sum("hotkey" not in e.attributes for e in elements if e.tag in ("Label", "Choice"))
    return chain([key for key in KEYS if key not in taken][without:], repeat(""))


def without_coarse(xml: str) -> str:
    """The label config without the control for clusters: the inverse of `with_coarse`."""
    coarse, _ = find_controls(read(xml))
    if coarse is None:
        return xml
    block = coarse.parent if coarse.parent is not None and is_ours(coarse) else coarse
    source = xml.encode()
    return (source[: block.start] + source[block.end :].lstrip()).decode()
