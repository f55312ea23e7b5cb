"""The page as people use it: in a browser, against the server as it is run."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from serving.routes.pages import FOLDER, POLICY
from tests.serving.browser import CHROMIUM, Page, browse
from tests.serving.conftest import RunningServer, RunServer, publish

Drive = Callable[..., Any]
RATE = 16_000
ONE_WORKER = {"SONORANT_SERVE_NUM_WORKERS": "1"}  # two cores: more would only start later
FACTS = "[...document.querySelectorAll('.facts span')].map((x) => x.textContent)"
HAS_MODEL = "document.querySelector('#model-gist').textContent"


# ------------------------------------------------------------------------------------------------------- the routes


def test_the_page_and_its_files_are_served_under_a_strict_policy(client):
    page = client.get("/")
    assert page.headers["Content-Type"] == "text/html; charset=utf-8"
    assert page.headers["Content-Security-Policy"] == POLICY
    assert "unsafe" not in POLICY
    assert "default-src 'none'" in POLICY
    media = {".js": "text/javascript; charset=utf-8", ".css": "text/css; charset=utf-8", ".svg": "image/svg+xml"}
    for path in FOLDER.iterdir():
        answer = client.get(f"/page/{path.name}")
        if path.name == "index.html":
            assert answer.status_code == 404  # it is at / alone, where its addresses hold
        else:
            assert answer.content == path.read_bytes()
            assert answer.headers["Content-Type"] == media[path.suffix]
            assert answer.headers["Content-Security-Policy"] == POLICY
            assert client.head(f"/page/{path.name}").headers["ETag"] == answer.headers["ETag"]


def test_what_the_client_has_is_not_sent_again(client):
    tag = client.get("/page/page.js").headers["ETag"]
    for known in (tag, f"W/{tag}", f'"other", {tag}', "*"):
        again = client.get("/page/page.js", headers={"If-None-Match": known})
        assert (again.status_code, again.content, again.headers["ETag"]) == (304, b"", tag)
        assert again.headers["Cache-Control"] == "no-cache"
    assert client.get("/page/page.js", headers={"If-None-Match": '"other"'}).status_code == 200


@pytest.mark.parametrize("file", ["nothing", "page.py", "%2e%2e%2fapp.py", "..%2fapp.py", "%2e%2e", "page.js%00", "."])
def test_no_other_file_is_served(client, file):
    answer = client.get(f"/page/{file}")
    assert answer.status_code == 404
    assert answer.json()["error"]["code"] == "not_found"


def test_nothing_in_the_page_is_inline_or_from_elsewhere():
    for path in FOLDER.iterdir():
        text = path.read_text()
        for word in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "style=", "onclick="):
            assert word not in text, f"{path.name}: {word}"
        assert "https://" not in text, path.name
        assert "http://" not in text.replace("http://www.w3.org/2000/svg", ""), path.name


# ------------------------------------------------------------------------------------------------------- in a browser


@pytest.fixture(scope="module")
def server(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    if CHROMIUM is None:
        pytest.skip("browser: found no chromium, chromium-browser or google-chrome on PATH: install one")
    server = RunningServer(model, tmp_path_factory.mktemp("server"), ONE_WORKER)
    try:
        server.wait()
        yield server
    finally:
        server.process.terminate()
        server.process.wait(timeout=30)


@pytest.fixture(scope="module")
def sounds(tmp_path_factory: pytest.TempPathFactory, encode: Callable[..., bytes]) -> dict[str, Path]:
    """Files to drop: two of tones and noise, and one that is none."""
    folder = tmp_path_factory.mktemp("sounds")
    rng, time = np.random.default_rng(0), np.arange(2 * RATE) / RATE
    paths = {}
    for name, rate in (("first.wav", 1.0), ("second.flac", 0.8)):
        tone = np.sin(2 * np.pi * 300 * rate * time * (1 + 2 * (np.sin(9 * rate * time) > 0)))
        wave = 0.3 * tone * (0.2 + np.sin(5 * rate * time) ** 2) + rng.normal(0, 0.02, len(time))
        paths[name] = folder / name
        paths[name].write_bytes(encode(wave[: int(2 * RATE * rate)], format=name.rpartition(".")[2].upper()))
    paths["broken.wav"] = folder / "<img src=nowhere>.wav"
    paths["broken.wav"].write_bytes(b"RIFF and then nothing that is audio")
    return paths


@pytest.fixture(scope="module")
def runner() -> Iterator[asyncio.Runner]:
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture(scope="module")
def tab(runner: asyncio.Runner, sounds: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    browser = browse(tmp_path_factory.mktemp("browser"), sounds["first.wav"])
    page = runner.run(browser.__aenter__())
    try:
        yield page
    finally:
        runner.run(browser.__aexit__(None, None, None))


@pytest.fixture
def drive(runner: asyncio.Runner, server: RunningServer, tab: Page) -> Drive:
    """Runs a visit to the page, opened afresh; its console must stay empty, and its requests must stay here."""

    def drive(visit: Callable[[Page], Awaitable[None]], url: str = server.url) -> None:
        async def whole() -> None:
            await tab.resize(1280, 900)
            tab.errors.clear()
            tab.requests.clear()
            await tab.open(f"{url}/")
            await visit(tab)

        runner.run(whole())
        assert tab.errors == []
        own = (url, f"blob:{url}", url.replace("http", "ws"), "data:")
        assert [request for request in tab.requests if not request.startswith(own)] == []

    return drive


def units_of(server: RunningServer, data: bytes) -> dict[str, Any]:
    headers = {"Content-Type": "application/octet-stream"}
    answer = httpx.post(f"{server.url}/v1/units?deduplicate=true", content=data, headers=headers, timeout=30)
    return answer.json()["results"][0]


async def segments_of(page: Page, scroller: str) -> list[tuple[int, int]]:
    """What the arrow keys read out of a timeline, segment by segment: unit and duration."""
    await page.run(f"document.querySelector({scroller!r}).focus()")
    segments: list[tuple[int, int]] = []
    while True:
        await page.press("ArrowRight")
        words, now, last = await page.run(
            f"(x => [x.ariaValueText, x.ariaValueNow, x.ariaValueMax])(document.querySelector({scroller!r}))"
        )
        unit, duration = words.split(", ")[:2]
        segments.append((int(unit.removeprefix("unit ")), int(duration.removesuffix(" ms"))))
        if now == last:
            return segments


def test_a_dropped_file_shows_the_servers_units(drive, server, sounds):
    expected = units_of(server, sounds["first.wav"].read_bytes())

    async def visit(page: Page) -> None:
        gist = await page.wait(HAS_MODEL)
        assert gist == "layer 2 · 7 units · float32"
        assert "not grounded" in await page.run("document.querySelector('#model-facts').textContent")
        digest = await page.run("document.querySelector('.digest').textContent")
        assert digest == httpx.get(f"{server.url}/v1/models").json()["models"][0]["digest"]
        await page.choose_files("#files", [sounds["first.wav"]])
        await page.wait("document.querySelectorAll('.recording').length === 1")
        assert await page.run("document.querySelector('.recording h2').textContent") == "first.wav"
        facts = await page.run(FACTS)
        units = expected["units"]
        assert facts[:3] == ["2.00 s", f"{len(units)} segments", f"{len(set(units))} different units"]
        assert facts[3].startswith("answered in ")
        found = await segments_of(page, ".recording .scroller")
        assert found == list(zip(expected["units"], expected["durations_ms"], strict=True))
        readout = await page.run("document.querySelector('.recording .readout').textContent")
        assert readout.startswith(f"unit {found[-1][0]}, {found[-1][1]} ms")
        left, top = await page.run(
            "(({left, top}) => [left, top])(document.querySelector('.recording .scroller').getBoundingClientRect())"
        )
        await page.call("Input.dispatchMouseEvent", type="mouseMoved", x=left + 2, y=top + 100)
        readout = await page.wait("document.querySelector('.recording .chip').textContent")
        assert readout.startswith(f"unit {found[0][0]}, {found[0][1]} ms, from 0.00")
        assert await page.run("document.querySelector('#comparison').hidden")

    drive(visit)


IMAGES = """[...document.querySelectorAll('.images li')].map((item) => ({
  shown: item.querySelector('img')?.naturalWidth ?? 0, text: item.innerText.split('\\n').filter(Boolean),
}))"""
NOTE = "document.querySelector('.images .note').textContent"


def test_a_grounded_model_shows_what_the_recording_speaks_of(drive, sounds, encode, tmp_path, run_server: RunServer):
    server = run_server(
        publish(tmp_path / "grounded", num_images=12), **ONE_WORKER, SONORANT_SERVE_MAX_SEARCH_SECONDS="3"
    )
    headers, query = {"Content-Type": "application/octet-stream"}, {"thumbnails": True}
    data = sounds["first.wav"].read_bytes()
    answer = httpx.post(f"{server.url}/v1/images/search", params=query, content=data, headers=headers, timeout=30)
    expected = answer.json()["results"][0]["images"]
    long = tmp_path / "long.wav"
    long.write_bytes(encode(np.random.default_rng(0).normal(0, 0.1, 4 * RATE)))

    async def visit(page: Page) -> None:
        await page.wait(HAS_MODEL)
        assert "12" in await page.run("document.querySelector('#model-facts').textContent")
        await page.choose_files("#files", [sounds["first.wav"]])
        await page.wait("document.querySelectorAll('.images li').length === 10")
        await page.wait("[...document.querySelectorAll('.images img')].every((image) => image.complete)")
        found = await page.run(IMAGES)
        for image, shown in zip(expected, found, strict=True):
            said = image["texts"][0] if image["texts"] else image["id"]
            numbers = [str(image["rank"]), f"{image['score']:.2f}"]
            assert shown["text"] == [*([] if image["thumbnail"] else ["no picture kept"]), *numbers, said]
            assert (shown["shown"] > 0) == (image["thumbnail"] is not None)
        assert (await page.run(NOTE)).startswith("The nearest of 12 to what was said")
        assert (await page.run("document.querySelector('[role=status]').textContent")).endswith("segments, 10 images")
        for width in (1280, 375):
            await page.resize(width, 800, mobile=width < 500)
            assert await page.run("document.documentElement.scrollWidth <= window.innerWidth")
        await page.choose_files("#files", [long])
        await page.wait("document.querySelectorAll('.recording').length === 2")
        await page.wait(f"/found more than 3 s/.test({NOTE})")  # newest on top
        # The answer 413 is the server's; that the browser logs it is no fault of the page.
        page.errors[:] = [error for error in page.errors if "413" not in error]

    drive(visit, server.url)


PIXELS = """(() => {
  const canvas = document.querySelectorAll('.recording canvas')[PLACE];
  const data = canvas.getContext('2d').getImageData(0, 92, canvas.width, 1).data;
  return Array.from({length: canvas.width}, (_, i) => [...data.slice(4 * i, 4 * i + 4)].join());
})()"""  # of a row through the units, above their labels


def colours(expected: dict[str, Any], row: list[str], seconds: float) -> dict[int, set[str]]:
    """The colours in the middle of each unit's segments."""
    found: dict[int, set[str]] = {}
    at = 0
    for unit, duration in zip(expected["units"], expected["durations_ms"], strict=True):
        found.setdefault(unit, set()).add(row[int((at + duration / 2) / 1000 / seconds * (len(row) - 1))])
        at += duration
    return found


def test_two_recordings_are_compared_in_the_same_colours(drive, server, sounds):
    first, second = (units_of(server, sounds[name].read_bytes()) for name in ("first.wav", "second.flac"))

    async def visit(page: Page) -> None:
        await page.choose_files("#files", [sounds["first.wav"], sounds["second.flac"]])
        await page.wait("document.querySelector('#figures').children.length === 4")
        assert not await page.run("document.querySelector('#comparison').hidden")
        figures = await page.run("[...document.querySelectorAll('#figures dd:not(.note)')].map((x) => x.textContent)")
        a, b = first["units"], second["units"]
        assert figures[0] == f"{levenshtein(a, b)} of {max(len(a), len(b))}"
        assert figures[1] == f"{len({*a} & {*b})} of {len({*a} | {*b})}"
        assert await page.run("document.querySelector('#links').ariaValueMax") == str(len(a) - 1)
        await page.run("document.querySelector('#links').focus()")
        await page.press("End")
        words = await page.run("document.querySelector('#links-readout').textContent")
        assert words.startswith(f"A: unit {a[-1]}, {first['durations_ms'][-1]} ms")
        end_of_second = sum(second["durations_ms"]) / 1000
        assert f"to {end_of_second:.2f} s" in words  # the path leads from both beginnings to both ends
        await page.run("document.activeElement.blur()")
        # Newest on top. Where both hear a unit, its colour is the same.
        rows = [await page.run(PIXELS.replace("PLACE", place)) for place in "10"]
        seen = colours(first, rows[0], 2.0), colours(second, rows[1], 1.6)
        shared = seen[0].keys() & seen[1].keys()
        assert shared
        assert all(len(seen[0][unit] | seen[1][unit]) == 1 for unit in shared)
        assert len({min(seen[0][unit]) for unit in seen[0]}) == len(seen[0])
        await page.run("document.querySelector('#swap').click()")
        await page.wait(f"document.querySelector('#links').ariaValueMax === '{len(b) - 1}'")
        await page.run("document.querySelector('[data-part=remove]').click()")
        await page.wait("document.querySelector('#comparison').hidden")

    drive(visit)


def levenshtein(a: list[int], b: list[int]) -> int:
    """The edit distance by its recursive definition."""
    known: dict[tuple[int, int], int] = {}
    for i in range(len(a) + 1):
        for j in range(len(b) + 1):
            known[i, j] = (
                i + j
                if not i or not j
                else min(known[i - 1, j] + 1, known[i, j - 1] + 1, known[i - 1, j - 1] + (a[i - 1] != b[j - 1]))
            )
    return known[len(a), len(b)]


def test_the_keyboard_alone_records_and_plays(drive):
    async def tab_to(page: Page, selector: str) -> None:
        for _ in range(20):
            await page.press("Tab")
            if await page.run(f"document.activeElement.matches({selector!r})"):
                assert await page.run("document.activeElement.matches(':focus-visible')")
                return
        raise AssertionError(f"{selector}: not reached by Tab")

    async def visit(page: Page) -> None:
        await page.wait(HAS_MODEL)
        await tab_to(page, "#record")
        await page.press("Enter")
        await page.wait("document.querySelector('#record').innerText === 'Stop'")
        await page.wait("parseFloat(document.querySelector('#clock').textContent) >= 1.1")
        await page.press("Enter")
        await page.wait("document.querySelectorAll('.recording .facts span').length >= 4")
        assert await page.run("document.querySelector('#record').innerText") == "Record"
        assert await page.run("document.activeElement.id") == "record"
        facts = await page.run(FACTS)
        assert 1 <= float(facts[0].removesuffix(" s")) < 10
        assert len(await segments_of(page, ".recording .scroller")) == int(facts[1].removesuffix(" segments")) > 1
        assert await page.run("document.querySelector('[role=status]').textContent") == f"Recording 1: {facts[1]}"
        await page.run("document.querySelector('#record').focus()")
        await tab_to(page, ".play")
        await page.press("Enter")
        await page.wait("document.querySelector('.play').getAttribute('aria-label') === 'Pause Recording 1'")
        await page.wait("/translateX\\((?!0px)/.test(document.querySelector('.cursor').style.transform)")

    drive(visit)


def test_the_alignment_is_dynamic_time_warping(drive):
    """Against the recursion written out here, on frames of 6 dimensions, B forwards and backwards."""
    rng = np.random.default_rng(3)
    a, b = rng.normal(size=(9, 6)).astype(np.float32), rng.normal(size=(7, 6)).astype(np.float32)
    cosine = (a @ b.T) / np.linalg.norm(a, axis=1)[:, None] / np.linalg.norm(b, axis=1)
    script = f"""(async () => {{
      const {{ similarities, warp }} = await import('/page/align.js');
      const [a, b] = [Float32Array.from({a.ravel().tolist()}), Float32Array.from({b.ravel().tolist()})];
      const found = similarities(a, b, 6);
      return [...[false, true].map((turned) => {{
        const {{ first, last, likeness, path }} = warp(found, 9, 7, turned);
        return [[...first], [...last], [...likeness], path];
      }}), [...found]];
    }})()"""

    async def visit(page: Page) -> None:
        *found, similarity = await page.run(script)
        np.testing.assert_allclose(np.reshape(similarity, (9, 7)), cosine, atol=1e-6)  # float32 sums
        for (first, last, likeness, path), table in zip(found, (cosine, cosine[:, ::-1]), strict=True):
            steps = best_path(1 - table)
            rows = [[j for i, j in steps if i == row] for row in range(9)]
            assert first == [row[0] for row in rows]
            assert last == [row[-1] for row in rows]
            means = [table[i, row].mean() for i, row in enumerate(rows)]
            np.testing.assert_allclose(likeness, means, atol=1e-6)
            np.testing.assert_allclose(path, np.mean([table[step] for step in steps]), atol=1e-6)

    drive(visit)


def best_path(cost: np.ndarray) -> list[tuple[int, int]]:
    """The cheapest way through a table from its first to its last cell, by trying all that lead to each."""
    best: dict[tuple[int, int], tuple[float, list[tuple[int, int]]]] = {}
    for i, j in np.ndindex(cost.shape):
        before = [best[cell] for cell in ((i - 1, j - 1), (i - 1, j), (i, j - 1)) if cell in best]
        total, path = min(before, key=lambda found: found[0], default=(0.0, []))
        best[i, j] = (total + float(cost[i, j]), [*path, (i, j)])
    return best[cost.shape[0] - 1, cost.shape[1] - 1][1]


def test_what_the_microphone_hears_is_resampled_faithfully(drive):
    """Tones of the pass band keep their height, and tones above 8 kHz leave nothing, whatever the pieces."""
    script = """(async () => {
      const { Resampler } = await import('/page/audio.js');
      const rates = {};
      for (const rate of [44100, 48000, 8000, 16000]) for (const hertz of [440, 3000, 11000]) {
        if (hertz >= rate / 2) continue;
        const wave = Float32Array.from({length: rate}, (_, i) => Math.sin(2 * Math.PI * hertz * i / rate));
        const resampler = new Resampler(rate), parts = [];
        for (let at = 0, size = 1; at < rate; at += size, size = size * 7 % 5003) {
          parts.push(...resampler.feed(wave.slice(at, at + size)));
        }
        parts.push(...resampler.finish());
        const wanted = (i) => hertz < 8000 ? Math.sin(2 * Math.PI * hertz * i / 16000) : 0;
        const errors = parts.map((x, i) => Math.abs(x - wanted(i))).slice(2000, -2000);
        rates[`${rate} ${hertz}`] = [parts.length, Math.max(...errors)];
      }
      return rates;
    })()"""

    async def visit(page: Page) -> None:
        found = await page.run(script)
        assert len(found) == 10
        for name, (length, error) in found.items():
            assert length == RATE, name
            assert error < 1e-4, name  # found: 1e-5, which is less than half of a 16-bit step

    drive(visit)


def test_a_broken_file_shows_the_servers_message(drive, server, sounds):
    headers = {"Content-Type": "application/octet-stream"}
    answer = httpx.post(f"{server.url}/v1/units", content=sounds["broken.wav"].read_bytes(), headers=headers)
    message = answer.json()["error"]["message"]

    async def visit(page: Page) -> None:
        await page.choose_files("#files", [sounds["broken.wav"], sounds["first.wav"]])
        await page.wait("document.querySelectorAll('.recording').length === 1")  # the good one still comes
        shown = await page.run("[...document.querySelectorAll('[role=alert] .error span')].map((x) => x.textContent)")
        assert shown == [f"<img src=nowhere>.wav {message}"]
        await page.run("document.querySelector('[aria-label=Dismiss]').click()")
        assert await page.run("document.querySelectorAll('.error').length") == 0
        assert all("400 (Bad Request)" in error for error in page.errors)  # the browser's own line on the answer
        page.errors.clear()

    drive(visit)


def test_a_phone_shows_all_of_it(drive, sounds):
    async def visit(page: Page) -> None:
        await page.resize(390, 844, 2, mobile=True)
        await page.choose_files("#files", [sounds["first.wav"], sounds["second.flac"], sounds["broken.wav"]])
        await page.wait("document.querySelectorAll('#figures div').length === 4 && !!document.querySelector('.error')")
        await page.run("document.querySelector('#model').open = true")
        assert await page.run("document.documentElement.scrollWidth") == 390
        scroller, canvas = (f"document.querySelector('.recording {what}')" for what in (".scroller", "canvas"))
        assert await page.run(f"{canvas}.width === Math.round(2 * {canvas}.clientWidth)")  # sharp
        assert await page.run(f"{scroller}.scrollWidth > {scroller}.clientWidth")
        page.errors.clear()  # the broken file's 400

    drive(visit)


def test_a_key_is_asked_for_and_kept(drive, model, sounds, tmp_path):
    token = "sesame-open-thou"
    keys = tmp_path / "keys"
    keys.write_text(json.dumps({"name": "alice", "sha256": hashlib.sha256(token.encode()).hexdigest()}) + "\n")
    (tmp_path / "guarded").mkdir()
    guarded = RunningServer(model, tmp_path / "guarded", {**ONE_WORKER, "SONORANT_SERVE_KEYS_FILE": str(keys)})

    async def visit(page: Page) -> None:
        await page.wait("!document.querySelector('#key-form').hidden")
        assert await page.run("document.querySelector('#key-message').textContent")
        assert await page.run("document.activeElement.id") == "key"
        await page.choose_files("#files", [sounds["first.wav"]])
        await page.wait("performance.getEntriesByType('resource').some(({name}) => name.includes('v1/units'))")
        await page.call("Input.insertText", text="wrong")
        await page.press("Enter")
        await page.wait("!document.querySelector('#key-form').hidden && !document.querySelector('#key').value")
        await page.call("Input.insertText", text=token)
        await page.press("Enter")
        await page.wait("document.querySelectorAll('.recording').length === 1")  # what was refused was tried again
        assert await page.run("document.querySelector('#key-form').hidden")
        assert await page.run(HAS_MODEL) != ""
        await page.run("document.querySelector('#live').click(); document.querySelector('#record').click()")
        await page.wait("Number(document.querySelector('.recording.live .scroller')?.ariaValueMax) > 3")
        await page.run("document.querySelector('#record').click()")
        await page.wait("document.querySelectorAll('.recording:not(.live)').length === 2")
        assert await page.run("[localStorage.length, sessionStorage.length, document.cookie]") == [0, 0, ""]
        assert all("401 (Unauthorized)" in error for error in page.errors)
        page.errors.clear()

    try:
        guarded.wait()
        drive(visit, guarded.url)
    finally:
        guarded.process.terminate()
        guarded.process.wait(timeout=30)


def test_live_units_come_while_the_microphone_is_open(drive):
    async def visit(page: Page) -> None:
        await page.wait(HAS_MODEL)
        await page.run("document.querySelector('#live').click(); document.querySelector('#record').click()")
        await page.wait("Number(document.querySelector('.recording.live .scroller')?.ariaValueMax) > 3")
        assert await page.run("document.querySelector('#record').innerText") == "Stop"
        await page.run("document.querySelector('#record').click()")
        await page.wait("document.querySelectorAll('.recording:not(.live) .facts span').length >= 5")
        facts = await page.run(FACTS)
        assert facts[4].startswith("live: ")
        assert facts[4].endswith("% of frames")

    drive(visit)
