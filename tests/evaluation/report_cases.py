"""Measured splits to report on, and what must hold for every report."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

from sam3lora.config.post_processing import PostProcessing
from sam3lora.data.coco import CocoIndex
from sam3lora.evaluation.metrics.ground_truth import SplitTruth, prompted_categories
from sam3lora.evaluation.metrics.measure import SplitMetrics, measure_split
from sam3lora.evaluation.split_results import SplitResults

CRACK, HOLE = 1, 2
NAMES = {CRACK: "crack", HOLE: "hole"}


def measured(folder: Path, predictions: list[dict], label: str = "base", names=NAMES, **options) -> SplitMetrics:
    """Metrics of these answers to the split in the folder; `names` are id -> category, asked even if none shows it."""
    index = CocoIndex.from_folder(folder)
    truth = SplitTruth(index, prompted_categories(index, list(names.values())))
    pairs = [(image_id, category.id) for image_id in truth.image_ids for category in truth.categories]
    shown = {(entry["image_id"], entry["category_id"]) for entry in truth.annotations()}
    presence = {pair: 0.9 if pair in shown else 0.1 for pair in pairs}
    options = {"split_dir": folder, "settings": {"model": "tiny", "versions": {"torch": "2.8"}}} | options
    options = {"post": PostProcessing(threshold=0.3)} | options
    return measure_split(truth, SplitResults(predictions, presence, len(predictions)), label=label, **options)


class _Balance(HTMLParser):
    """Every element is closed."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag, attrs):
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text.append(data)


def check_page(page: str) -> str:
    """The page's text, after checking that it is whole, small enough, and refers to nothing outside itself."""
    parser = _Balance()
    parser.feed(page)
    assert parser.open == []
    assert re.findall(r'(?:src|href)="(?!data:|#)[^"]*"', page) == []
    assert re.findall(r"url\((?!#)[^)]*\)|https?:|@import", page) == []
    ids = re.findall(r' id="([^"]*)"', page)
    assert len(ids) == len(set(ids))
    assert len(page) < 8_000_000
    return " ".join(" ".join(parser.text).split())


def table(page: str, heading: str) -> dict[str, list[str]]:
    """First cell -> the other cells of the table below a heading, as text."""
    body = page.split(f"<h2>{heading}</h2>")[1].split("<tbody>")[1].split("</tbody>")[0]
    rows = [re.findall(r"<td[^>]*>(.*?)</td>", row, re.DOTALL) for row in body.split("<tr>")[1:]]
    return {
        row[0].split("<span")[0]: [re.sub(r"<.*>", " ", cell, flags=re.DOTALL).strip() for cell in row[1:]]
        for row in rows
    }
