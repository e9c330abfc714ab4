"""The labelling configuration of a project: its control tag, and its labels as prompts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from xml.etree import ElementTree

CONTROLS = ("brushlabels", "polygonlabels", "rectanglelabels")  # the first that a project has gets the predictions


class ConfigFault(Exception):
    """The project's configuration has no control that this backend can fill."""


@dataclass(frozen=True)
class LabelConfig:
    """The control that gets the predictions, and the prompts.

    Attributes:
        control: Type of the regions, one of `CONTROLS`.
        from_name: Name of the control tag.
        to_name: Name of the image tag.
        data_key: Key of the image in a task's data.
        prompts: Label -> what the model is asked: the attribute `prompt` of the label, or the label itself.
    """

    control: str
    from_name: str
    to_name: str
    data_key: str
    prompts: Mapping[str, str]


def read_label_config(xml: str) -> LabelConfig:
    """The first control of the best kind that labels an image.

    Raises:
        ConfigFault: There is none, or the text is not XML.
    """
    if "<!DOCTYPE" in xml:
        raise ConfigFault("a labelling configuration has no DOCTYPE")
    try:
        root = ElementTree.fromstring(xml)
    except ElementTree.ParseError as error:
        raise ConfigFault(f"the labelling configuration is not XML: {error}") from None
    images = {tag.get("name"): tag.get("value", "") for tag in root.iter("Image")}
    tags = [tag for tag in root.iter() if tag.tag.lower() in CONTROLS and tag.get("toName") in images]
    for tag in sorted(tags, key=lambda tag: CONTROLS.index(tag.tag.lower())):
        prompts = {label.get("value", ""): label.get("prompt") or label.get("value", "") for label in tag.iter("Label")}
        prompts.pop("", None)
        to_name = tag.get("toName", "")
        if prompts:
            return LabelConfig(
                tag.tag.lower(), tag.get("name", ""), to_name, images[to_name].removeprefix("$"), prompts
            )
    wanted = "BrushLabels, PolygonLabels or RectangleLabels with labels, whose toName is an Image"
    raise ConfigFault(f"expected {wanted}; this project's configuration has none")
