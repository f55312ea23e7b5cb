"""The page: whole, self-contained, safe and the same twice."""

from __future__ import annotations

import base64
import io
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

import numpy as np
from PIL import Image

from sonorant.evaluation.intervals import ratio_of_sums
from sonorant.evaluation.measures import MEASURES, RETRIEVAL, System, best_systems, show_score
from sonorant.evaluation.report import Example, Report, Search, Shown, render
from sonorant.evaluation.report.drawings import sort_by_phone, training_curves
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


def make_search(own_place: int, picture: bytes | None) -> Search:
    """An utterance whose own image comes at that place of nine; the first two bear other words, the third the same."""

    def shown(place: int) -> Shown:
        mark = "right" if place == own_place else "same words" if place == 3 else ""
        return Shown(f"image{place}.png", "a <b> dog", picture, place, 1 / place, mark)

    wave = np.sin(np.arange(4000, dtype=np.float32))
    found = [shown(place) for place in range(1, 6)]
    return Search("u3", "a <b> dog", wave, found, shown(own_place), 9)


def make_retrieval_report(*searches: Search) -> Report:
    """A page of a model that finds images, beside chance and a model that cannot."""
    scores = {"speech_to_image_recall_at_1": 0.25, "speech_to_image_median_rank": 3.5}
    systems = [
        System("model", "this model", "d", {"pnmi": 0.5} | scores),
        System("mfcc", "MFCC", "39 dimensions", {"pnmi": 0.4}),
        System("chance", "chance", "a random order", dict.fromkeys(scores, 0.111)),
    ]
    return Report("t", systems, searches=searches)


def section(page: str, name: str) -> str:
    """One section of the page, empty where it has none."""
    found = re.search(rf"<section><h2>{name}</h2>(.*?)</section>", page, re.DOTALL)
    return found[1] if found else ""


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
    # Three training panels fold loss and units/loss into one: 2, two heat maps, two utterances, a histogram.
    assert len(images) == 2 + 2 + 2 + 1
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


def test_a_lead_that_other_utterances_could_undo_is_none() -> None:
    hard = np.random.default_rng(0).normal(size=50)

    def system(key: str, errors: np.ndarray) -> System:
        estimate = ratio_of_sums({f"u{row}": (value, 1.0) for row, value in enumerate(errors.tolist())})
        return System(key, key, "", {"abx_across_any": estimate.value}, {"abx_across_any": estimate})

    measure = MEASURES["ABX error of features"][0]
    ahead, behind = system("a", hard), system("b", hard + 0.1)
    near = system("c", hard + 0.1 * np.random.default_rng(1).normal(size=50) + 0.01)
    # The first two differ by the same on every utterance, however much these differ among themselves.
    assert best_systems(measure, [ahead, behind]) == {"a"}
    assert best_systems(measure, [ahead, behind, near]) == set()
    # A system of which that is not known is compared as it is printed.
    assert best_systems(measure, [ahead, System("d", "d", "", {"abx_across_any": 9.0})]) == {"a"}
    # What is not known by utterance has no best where other scores are.
    pnmi = MEASURES["Units and phones"][1]
    plain = [System("a", "a", "", {"pnmi": 0.5}), System("b", "b", "", {"pnmi": 0.4})]
    assert best_systems(pnmi, plain) == {"a"}
    assert best_systems(pnmi, [*plain, behind]) == set()
    page = render(Report("title", [ahead, behind]))
    assert re.search(r'<td class="best">-?0\.\d{3}<br><small>-?0\.\d{3} … -?0\.\d{3}</small></td>', page)


def test_units_are_sorted_by_the_phone_they_stand_for() -> None:
    shares, phones, units = sort_by_phone(JOINT)
    assert phones == ["SIL", "n", "ah"]  # 9, 7 and 5 frames
    assert units.tolist() == [3, 0, 2]  # of SIL, n, ah; unit 1 never occurs
    assert np.allclose(shares.sum(axis=0), 1, atol=1e-12)  # each column is a distribution
    assert shares[:, 0].tolist() == [0.8, 0.2, 0.0]


def test_the_phones_that_are_confused_most_are_named() -> None:
    joint = Joint(("<b>", "n", "s"), np.array([[60, 0, 20], [9, 40, 0], [0, 0, 100]]))
    page = render(Report("t", [System("model", "this model", "d", {"pnmi": 0.5})], joint=joint))
    # n has 49 frames, too few to name.
    assert "Confused most, of phones of a second or more: &lt;b&gt; heard as s: 25 %.</p>" in page
    assert "Confused most" not in render(make_report())  # 16 frames in all


def test_curves_keep_the_updates_at_which_a_number_was_logged() -> None:
    curves = training_curves([{"update": 5, "loss": 2.0}, {"update": 9, "loss": 1.0, "note": "x", "std": 3}])
    assert curves == {"loss": ([5.0, 9.0], [2.0, 1.0]), "std": ([9.0], [3.0])}


def test_retrieval_has_a_table_of_its_own() -> None:
    page = render(make_retrieval_report())
    found, scores = section(page, "Retrieval"), section(page, "Scores")
    assert "Speech to image, its own" in found
    assert "recall at 5" not in found  # nobody's was measured
    assert ("0.250" in found, "0.111" in found, "MFCC" in found) == (True, True, False)
    assert ("recall at" in scores, "chance" in scores, "MFCC" in scores) == (False, False, True)
    assert section(render(make_report()), "Retrieval") == ""


def test_what_an_utterance_finds_stands_in_order_and_the_right_one_is_named() -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 3), "red").save(buffer, "png")
    page = render(make_retrieval_report(make_search(2, buffer.getvalue()), make_search(7, buffer.getvalue())))
    images = [image for image in read(page).images if str(image["src"]).startswith("data:image/png")]
    for image in images:
        with Image.open(io.BytesIO(base64.b64decode(str(image["src"]).split(",")[1]))) as picture:
            assert picture.size == (4, 3)
    names = re.findall(r"image(\d)\.png", " ".join(str(image["alt"]) for image in images))
    assert names == [*"12345", *"123457"]  # its own, where it is not among the five, comes after them
    marks = re.findall(r'<div class="mark">([^<]*)</div>', section(page, "Retrieval"))
    assert marks == ["–", "right", "same words", "–", "–", "–", "–", "same words", "–", "–", "right"]
    assert "u3: its own image is number 2 of 9" in page
    assert "u3: its own image is number 7 of 9" in page
    assert "a &lt;b&gt; dog" in page
    assert "a <b> dog" not in page


def test_an_image_of_which_there_is_no_picture_is_named() -> None:
    page = render(make_retrieval_report(make_search(1, None)))
    assert [str(image["alt"]) for image in read(page).images] == ["Waveform of u3"]
    assert re.findall(r'<div class="unseen">(image\d)', page) == [f"image{place}" for place in range(1, 6)]


def test_a_lower_median_rank_is_better() -> None:
    measures = {measure.key: measure for group in RETRIEVAL.values() for measure in group}
    systems = [System(name, name, "", {"image_to_speech_median_rank": rank}) for name, rank in (("a", 3), ("b", 4))]
    assert best_systems(measures["image_to_speech_median_rank"], systems) == {"a"}
    assert len(measures) == 2 * 2 * 4
