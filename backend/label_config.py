"""Which Image, which control for fine and for coarse labels, and which classes a label config means."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from itertools import chain, repeat
from xml.parsers import expat
from xml.sax.saxutils import quoteattr

from backend.errors import ConfigError
from model.classes import Classes

#: Controls whose regions are masks.
MASK_TAGS = ("BrushLabels", "BitmaskLabels", "PolygonLabels")
#: Names of the coarse control: the second where the team has a control of the first name.
COARSE_NAMES = ("coarse", "firstrow_coarse")
#: The label of a cluster in which several coarse classes meet.
MIXED_LABEL = "Mixed"
#: Labels that mean what nobody looks for; earlier ones win.
BACKGROUND_LIKE = ("background", "bare soil", "soil", "bare ground", "ground", "earth")
#: Class of the view around our control: says what to take away again.
OURS = "firstrow-coarse"
#: The order in which Label Studio gives keys to labels without one.
KEYS = "1234567890qwetasdfgzxcvbyiopjklnm"
#: Of background, then other coarse classes, then Mixed.
COLOURS = ("#8B5A2B", "#00C853", "#2979FF", "#FFB300", "#D500F9", "#00B8D4")
GREY = "#AAAAAA"
#: Rows of `Classes.sets` must fit a uint8 map beside IGNORE and MIXED.
MOST_ROWS = 254


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
    """

    image_name: str
    image_key: str
    fine: Control
    coarse: Control | None
    classes: Classes
    background: str | None


@dataclass
class Element:
    """An XML element and where its text stands in the UTF-8 source."""

    tag: str
    attributes: dict[str, str]
    start: int
    parent: Element | None
    end: int = 0
    children: list[Element] = field(default_factory=list)


def parse(xml: str, groups: Mapping[str, Sequence[str]] | None = None) -> ProjectConfig:
    """Understand a label config.

    Args:
        xml: the project's label config.
        groups: fine labels of each coarse label; without them the `classes` attributes of the coarse control's labels
            count, else background stands against everything else.

    Raises:
        ConfigError: no Image, no control for masks or several, or groups that do not fit the labels.
    """
    elements = read(xml)
    coarse, fine = find_controls(elements)
    control = as_control(fine)
    labels = {name.casefold(): name for name in reversed(control.labels)}
    background = next((labels[name] for name in BACKGROUND_LIKE if name in labels), "")
    named = groups or (said_groups(coarse) if coarse else None)
    classes = group(control.labels, background, named)
    if coarse is not None:
        check_coarse(as_control(coarse), classes)
    image, key = find_image(elements, control)
    return ProjectConfig(image, key, control, as_control(coarse) if coarse else None, classes, background)


def read(xml: str) -> list[Element]:
    """All elements in document order.

    Raises:
        ConfigError: not well formed, or with a document type (entities could grow without end).
    """
    parser, found, inside = expat.ParserCreate("UTF-8"), list[Element](), list[Element]()
    source = xml.encode()

    def start(tag: str, attributes: dict[str, str]) -> None:
        element = Element(tag, attributes, parser.CurrentByteIndex, inside[-1] if inside else None)
        if element.parent:
            element.parent.children.append(element)
        found.append(element)
        inside.append(element)

    def end(tag: str) -> None:
        inside.pop().end = source.index(b">", parser.CurrentByteIndex) + 1 if True else 0

    def refuse(*_: object) -> None:
        raise ConfigError("the label config has a document type: remove the <!DOCTYPE ...> line")

    parser.StartElementHandler, parser.EndElementHandler, parser.StartDoctypeDeclHandler = start, end, refuse
    try:
        parser.Parse(source, True)
    except expat.ExpatError as error:
        raise ConfigError(f"the label config is not valid XML ({error}): save it once in Label Studio") from error
    return found
