"""The page: whole, self-contained, safe and the same twice."""

from __future__ import annotations

import base64
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

import numpy as np

from sonorant.evaluation.report import (
    MEASURES,
    Example,
    Report,
    System,
    best_systems,
    render,
    show_score,
    sort_by_phone,
    training_curves,
)
from sonorant.evaluation.units import Joint

JOINT = Joint(("SIL", "ah", "n"), np.array([[1, 0, 0, 8], [0, 0, 5, 0], [4, 0, 1, 2]]))
VOID = {"meta", "img", "br", "hr", "link", "input"}


def make_report() -> Report:
    """A small page with everything on it."""
    rng = np.random.default_rng(0)
    wave = rng.normal(size=8000).astype(np.float32)
    units = np.array([3, 3, 3, 1, 1, 1, 7, 7, 7, 7, 7, 2, 2, 2, 2, 2, 2, 2, 0, 0, 0, 0, 0, 0])
    phones = [("SIL", 0.0, 0.1), ("ah", 0.1, 0.3), ("n", 0.3, 0.5)]
    return Report(
        title="A model & <its> units",
        systems=[
            System("model", "this model", "layer 1", {"abx_across_any": 0.2, "pnmi": 0.5, "num_units": 4}),
            System("mfcc", "MFCC", "39 dimensions", {"abx_across_any": 0.25, "num_units": 4}),
        ],
        notes=["Mind <this>."],
        journal=[{"update": k, "loss": 1 / k, "units/loss": 1.0, "learning_rate": 1e-3} for k in (1, 2, 3)],
        joint=JOINT,
        examples=[Example("u1", wave, units, phones, "a <script>"), Example("u2", wave, units)],
        corpus=[{"source": "a", "split": "test", "minutes": 1.234}],
        refused={"too long": 3},
        durations=[1.0, 2.0],
        provenance={"commit": "abc", "config": {"dim": 3}},
    )


class Balanced(HTMLParser):
    """Collects attributes, and fails where an element is closed that is not open."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.images: list[dict[str, str | None]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "img":
            self.images.append(dict(attrs))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def read(page: str) -> Balanced:
    """The page's structure."""
    parser = Balanced()
    parser.feed(page)
    assert parser.open == []
    return parser


def test_the_page_is_well_formed_and_its_pictures_are_inside() -> None:
    images = read(render(make_report())).images
    # Three training panels fold loss and units/loss into one: 2, the heat map, two utterances, a histogram.
    assert len(images) == 2 + 1 + 2 + 1
    for image in images:
        kind, data = str(image["src"]).split(",", 1)
        assert kind == "data:image/svg+xml;base64"
        assert ElementTree.fromstring(base64.b64decode(data)).tag == "{http://www.w3.org/2000/svg}svg"
        assert image["alt"]


def test_nothing_is_loaded_from_elsewhere() -> None:
    page = render(make_report())
    drawings = [base64.b64decode(data).decode() for data in re.findall(r"base64,([^\"]+)\"", page)]
    for text in (page, *drawings):
        assert not re.search(r"@import|<script|<link|<iframe", text)
        links = re.findall(r"(?:src|href)=\"([^\"]*)\"|url\(([^)]*)\)", text)
        assert all(one.startswith(("data:", "#")) for link in links for one in link if one)


def test_what_was_refused_is_said() -> None:
    assert "Rows refused: too long: 3." in render(make_report())


def test_text_is_escaped() -> None:
    page = render(make_report())
    for shown in ("A model &amp; &lt;its&gt; units", "Mind &lt;this&gt;.", "u1: a &lt;script&gt;"):
        assert shown in page
    assert "<script>" not in page


def test_the_same_report_gives_the_same_bytes() -> None:
    assert render(make_report()) == render(make_report())


def test_an_almost_empty_report_is_still_a_page() -> None:
    page = render(Report("t", [System("model", "this model", "d", {"bitrate": 3.0})]))
    assert read(page).images == []
    assert "without a training journal" in page
    assert "The evaluated utterances have no phones" in page
    assert "PNMI" not in page


def test_the_best_score_is_marked_in_its_direction() -> None:
    systems = [
        System("a", "a", "", {"pnmi": 0.5, "abx_across_any": 0.3, "perplexity": 9.0}),
        System("b", "b", "", {"pnmi": 0.4, "abx_across_any": 0.2, "perplexity": 8.0}),
        System("c", "c", "", {"abx_across_any": 0.2001}),
    ]
    best = {m.key: best_systems(m, systems) for group in MEASURES.values() for m in group}
    assert best["pnmi"] == {"a"}
    assert best["abx_across_any"] == {"b", "c"}  # equal as printed
    assert best["perplexity"] == set()  # neither direction is better
    assert best["bitrate"] == set()
    measure = next(m for m in MEASURES["Units and phones"] if m.key == "pnmi")
    assert (show_score(measure, 0.12345), show_score(measure, None)) == ("0.123", "–")


def test_units_are_sorted_by_the_phone_they_stand_for() -> None:
    shares, phones, units = sort_by_phone(JOINT)
    assert phones == ["SIL", "n", "ah"]  # 9, 7 and 5 frames
    assert units.tolist() == [3, 0, 2]  # of SIL, n, ah; unit 1 never occurs
    assert np.allclose(shares.sum(axis=0), 1, atol=1e-12)  # each column is a distribution
    assert shares[:, 0].tolist() == [0.8, 0.2, 0.0]


def test_curves_keep_the_updates_at_which_a_number_was_logged() -> None:
    curves = training_curves([{"update": 5, "loss": 2.0}, {"update": 9, "loss": 1.0, "note": "x", "std": 3}])
    assert curves == {"loss": ([5.0, 9.0], [2.0, 1.0]), "std": ([9.0], [3.0])}
