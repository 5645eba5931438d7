"""The page as a person meets it: headless Chromium, the real endpoint, a keyboard, hostile names, errors."""

from __future__ import annotations

import asyncio
import json
import os
import shlex
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from browser import CHROMIUM, Browser, Tab
from factories import LABELS, image_bytes

from cnn_ray.auth import add_key
from cnn_ray.config import ServeConfig
from cnn_ray.endpoint import Endpoint

pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: the page was not seen in a browser"),
]
HOSTILE_LABEL = "<img src=x onerror=hit=1>\u202egnp.exe"
VERDICT = "!document.getElementById('details').hidden"
PROBLEM = "document.getElementById('problem').innerText"


class Wrapped:
    """The endpoint, with two switches of the tests: answers that wait, and a label that is markup."""

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        self.hold: dict[bytes, threading.Event] = {}
        self.hostile = False

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http" and scope["method"] == "POST":
            if self.hostile:
                return await self._hostile(send)
            size = dict(scope["headers"]).get(b"content-length", b"")
            while size in self.hold and not self.hold[size].is_set():
                await asyncio.sleep(0.01)
        return await self.endpoint(scope, receive, send)

    async def _hostile(self, send: Any) -> None:
        scores = {HOSTILE_LABEL: 0.75, "</td><script>hit=1</script>": 0.25}
        answer = {
            "label": HOSTILE_LABEL,
            "score": 0.75,
            "flagged": None,
            "scores": scores,
            "model": "<b>",
            "version": 1,
        }
        headers = [(b"content-type", b"application/json")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": json.dumps(answer).encode()})


class Site:
    """An endpoint under uvicorn in a thread of this process."""

    def __init__(self, config: ServeConfig) -> None:
        self.app = Wrapped(Endpoint(config))
        self._server = uvicorn.Server(uvicorn.Config(self.app, port=0, log_level="warning", lifespan="off"))
        self._thread = threading.Thread(target=self._server.run, daemon=True)
        self._thread.start()
        while not self._server.started:
            assert self._thread.is_alive()
            time.sleep(0.01)
        self.url = f"http://127.0.0.1:{self._server.servers[0].sockets[0].getsockname()[1]}/"

    def close(self) -> None:
        self._server.should_exit = True
        self._thread.join(20)
        self.app.endpoint.close()

    def verdict(self, data: bytes, **headers: str) -> dict[str, Any]:
        answer = httpx.post(
            f"{self.url}v1/models/small:predict", content=data, headers={"Content-Type": "image/png", **headers}
        )
        assert answer.status_code == 200
        return answer.json()


def config(small_models: str, **changed: Any) -> ServeConfig:
    facts = {"model": "small@1", "models_uri": small_models, "engine": "openvino", "precision": "f32"}
    return ServeConfig.model_validate({**facts, "access_log": False, **changed})


@pytest.fixture(scope="module")
def site(small_models: str) -> Iterator[Site]:
    running = Site(config(small_models))
    yield running
    running.close()


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("chromium") / "profile") as running:
        yield running


@pytest.fixture
def tab(browser: Browser, site: Site) -> Iterator[Tab]:
    """The page, open; afterwards the browser has nothing to say against it, and it talked to its own server only."""
    opened = browser.open(site.url)
    yield opened
    assert opened.complaints() == []
    assert opened.value("typeof hit") == "undefined", "markup from outside was run"
    strangers = [url for url in opened.requested() if not url.removeprefix("blob:").startswith(site.url)]
    assert set(strangers) <= {"data:,"}
    opened.close()


def write(folder: Path, name: str, seed: int = 1) -> Path:
    path = folder / name
    path.write_bytes(image_bytes(seed, (160, 90)))
    return path


def shown_scores(tab: Tab) -> dict[str, str]:
    rows = tab.value(
        "[...document.querySelectorAll('#scores tr')].map(r => [r.cells[0].innerText, r.cells[2].innerText])"
    )
    return dict(rows)


def focused(tab: Tab) -> str:
    return tab.value("document.activeElement.id || document.activeElement.innerText || document.activeElement.tagName")


def test_a_chosen_file_gets_the_verdict_of_the_endpoint(tab, site, tmp_path):
    shot = write(tmp_path, "shot.png")
    said = site.verdict(shot.read_bytes())

    tab.choose_file("#file", shot)
    tab.wait(VERDICT)

    verdict = tab.text("#verdict")
    assert verdict.split("\n")[0] == said["label"]
    assert f"{said['score']:.4f}" in verdict
    assert ("not flagged" not in verdict) == said["flagged"]
    assert "small@1" in verdict
    assert shown_scores(tab) == {label: f"{said['scores'][label]:.4f}" for label in LABELS}
    widths = tab.value("[...document.querySelectorAll('.bar')].map(b => b.offsetWidth / b.parentElement.offsetWidth)")
    assert widths == pytest.approx(sorted(said["scores"].values(), reverse=True), abs=0.02)
    assert tab.text("#file-name") == f"shot.png, {shot.stat().st_size:,} bytes"
    assert tab.wait("document.getElementById('preview').naturalWidth") == 160
    assert tab.text("#problem") == ""


def test_everything_is_reached_and_pressed_by_keyboard_and_the_focus_is_seen(tab, tmp_path):
    tab.choose_file("#file", write(tmp_path, "shot.png"))
    tab.wait(VERDICT)
    tab.value("document.activeElement.blur()")

    order = []
    for _ in range(7):
        tab.press("Tab")
        order.append(focused(tab))
        ring = "document.activeElement.id === 'file' ? document.getElementById('drop') : document.activeElement"
        style, width = tab.value(f"(s => [s.outlineStyle, parseFloat(s.outlineWidth)])(getComputedStyle({ring}))")
        assert (style, width >= 2) == ("solid", True), f"no ring around {order[-1]}"
    assert order == ["file", "model", "version", "Check", "explain", "curl", "copy"]

    tab.press("Tab", modifiers=8)
    tab.press("Tab", modifiers=8)
    assert focused(tab) == "explain"
    tab.press("Enter")
    tab.wait("!document.getElementById('heat').hidden && document.getElementById('heat-image').naturalWidth")
    size = tab.value("(i => [i.naturalWidth, i.naturalHeight])(document.getElementById('heat-image'))")
    assert size[0] == 640
    assert 360 < size[1] <= 420, "the picture's own proportions, and the legend"
    assert tab.value("document.getElementById('heat-image').alt").startswith("The screenshot in grey")
    assert focused(tab) == "explain", "the focus stays"
    assert any(url.endswith("/v1/models/small/versions/1:explain") for url in tab.requested())


def test_the_accessibility_tree_has_a_name_for_every_control(tab):
    tab.call("Accessibility.enable")
    nodes = tab.call("Accessibility.getFullAXTree")["nodes"]

    controls = {}
    for node in nodes:
        role = node.get("role", {}).get("value")
        if not node.get("ignored") and role in ("button", "textbox", "combobox"):
            controls[node.get("name", {}).get("value", "")] = role
    assert controls == {
        "Choose a file, drop it here or paste it (Ctrl-V)": "button",
        "Model": "combobox",
        "Version or alias": "textbox",
        "Check": "button",
        "Copy": "button",
    }
    live = tab.value("['verdict', 'problem', 'heat-state'].map(id => document.getElementById(id).role)")
    assert live == ["status", "alert", "status"]


@pytest.mark.skipif(shutil.which("curl") is None, reason="no curl here: the shown command was not run")
def test_the_curl_line_does_the_same_whatever_the_file_is_called(tab, site, tmp_path):
    names = (
        "shot.png",
        "<img src=x onerror=hit=1> '; touch hit; $(touch hit) `touch hit` \"&.png",
        "@-.png",
        "-o hit.png",
        "büro 票.png",
    )
    for number, name in enumerate(names):
        shot = write(tmp_path, name, seed=number)

        tab.choose_file("#file", shot)
        tab.wait(f"document.getElementById('file-name').innerText.startsWith({json.dumps(name + ', ')}) && {VERDICT}")
        line = tab.text("#curl")

        ran = subprocess.run(["bash", "-c", line], cwd=tmp_path, capture_output=True, timeout=30, check=True)
        assert json.loads(ran.stdout) == site.verdict(shot.read_bytes())
    assert {path.name for path in tmp_path.iterdir()} == set(names), "a name was run as a command"


def test_a_name_that_a_terminal_would_obey_is_not_in_the_curl_line(tab, tmp_path):
    for name, shown in (
        ("a\x03\nrm -rf x\n.png", "a\\u0003\\u000arm -rf x\\u000a.png, "),
        ("gpj.\u202egnp.png", "gpj.\\u202egnp.png, "),
        ("esc\x1b[2J.png", "esc\\u001b[2J.png, "),
    ):
        tab.choose_file("#file", write(tmp_path, name))
        tab.wait(f"document.getElementById('file-name').innerText.startsWith({json.dumps(shown)})")

        assert shlex.split(tab.text("#curl"))[2] == "@FILE"


def test_labels_and_names_from_the_server_are_text(tab, site, tmp_path):
    site.app.hostile = True
    try:
        tab.choose_file("#file", write(tmp_path, "shot.png"))
        tab.wait(VERDICT)
    finally:
        site.app.hostile = False

    shown = HOSTILE_LABEL.replace("\u202e", "\\u202e")
    assert tab.text("#verdict").split("\n")[0] == shown
    assert shown_scores(tab) == {shown: "0.7500", "</td><script>hit=1</script>": "0.2500"}
    assert "<b>@1" in tab.text("#verdict")
    assert "flagged" not in tab.text("#verdict"), "null: the model has no positive label"
    assert tab.value("document.querySelectorAll('main script, main b img, #verdict img').length") == 0


def test_an_error_is_shown_in_the_words_of_the_server_and_the_old_verdict_is_gone(tab, site, tmp_path):
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"no image at all")
    told = httpx.post(
        f"{site.url}v1/models/small:predict", content=bad.read_bytes(), headers={"Content-Type": "image/png"}
    )
    tab.choose_file("#file", write(tmp_path, "shot.png"))
    tab.wait(VERDICT)

    tab.choose_file("#file", bad)
    tab.wait(PROBLEM)

    assert told.status_code == 400
    assert tab.text("#problem").startswith(told.json()["error"])
    assert "Request " in tab.text("#problem")
    assert tab.value("document.getElementById('details').hidden")
    assert tab.text("#verdict") == "No verdict."


def test_another_version_and_a_missing_one(tab, site, tmp_path):
    tab.choose_file("#file", write(tmp_path, "shot.png"))
    tab.wait(VERDICT)

    for version, path in (("1", "versions/1"), ("nightly", "labels/nightly"), ("99", "versions/99")):
        tab.value("document.getElementById('version').value = ''; document.getElementById('version').focus()")
        tab.type(version)
        assert tab.text("#curl").endswith(f"{site.url}v1/models/small/{path}:predict")
        tab.press("Enter")  # as in any form
        tab.wait(VERDICT if version == "1" else f"{PROBLEM}.includes({version!r})")


def test_a_newer_file_wins_over_a_slow_answer(tab, site, tmp_path):
    slow, fast = tmp_path / "slow.png", write(tmp_path, "fast.png")
    slow.write_bytes(image_bytes(2, (300, 200)))
    assert slow.stat().st_size != fast.stat().st_size
    said = site.verdict(fast.read_bytes())
    release = site.app.hold[str(slow.stat().st_size).encode()] = threading.Event()
    try:
        tab.choose_file("#file", slow)
        tab.wait("document.getElementById('verdict').innerText.startsWith('Checking')")
        tab.choose_file("#file", fast)
        tab.wait(VERDICT)
    finally:
        release.set()
        site.app.hold.clear()
    time.sleep(0.2)  # an answer that came late would have been shown by now

    assert tab.text("#file-name").startswith("fast.png")
    assert shown_scores(tab) == {label: f"{said['scores'][label]:.4f}" for label in LABELS}
    assert tab.text("#problem") == ""


def test_drop_and_paste(tab, tmp_path):
    shot = write(tmp_path, "dropped.png")
    at = {"x": 200, "y": 600, "data": {"items": [], "files": [str(shot)], "dragOperationsMask": 1}}
    for kind in ("dragEnter", "dragOver", "drop"):
        tab.call("Input.dispatchDragEvent", type=kind, **at)
    tab.wait(VERDICT)
    assert tab.text("#file-name").startswith("dropped.png")

    encoded = json.dumps(list(image_bytes(5)))
    tab.value(
        f"""(() => {{
        const data = new DataTransfer();
        data.items.add(new File([new Uint8Array({encoded})], "image.png", {{type: "image/png"}}));
        dispatchEvent(new ClipboardEvent("paste", {{clipboardData: data, bubbles: true, cancelable: true}}));
        }})()"""
    )
    tab.wait("document.getElementById('file-name').innerText.startsWith('image.png')")
    tab.wait(VERDICT)


def test_the_copy_button_gives_the_curl_line(tab, site):
    tab.call("Page.bringToFront")
    tab.value("document.getElementById('copy').focus()")
    tab.press(" ")
    tab.wait("document.getElementById('copied').innerText === 'Copied.'")


@pytest.mark.parametrize(
    ("width_px", "dark"),
    [
        (320, True),
        pytest.param(320, False, marks=pytest.mark.slow),
        pytest.param(1100, True, marks=pytest.mark.slow),
        pytest.param(1100, False, marks=pytest.mark.slow),
    ],
)
def test_the_page_fits_and_its_texts_have_contrast(browser, site, tmp_path, width_px, dark):
    tab = browser.open(site.url, width_px=width_px, dark=dark)
    tab.choose_file("#file", write(tmp_path, f"{'long-name' * 20}.png"))
    tab.wait(VERDICT)
    tab.value("document.getElementById('explain').click()")
    tab.wait("!document.getElementById('heat').hidden")

    assert tab.value("document.documentElement.scrollWidth") <= width_px
    poor = tab.value(CONTRAST)
    assert poor == []


# WCAG 2.1, 1.4.3: 4.5 to 1 for text, on the nearest background that is painted
CONTRAST = """(() => {
  const parse = (c) => (c.match(/[\\d.]+/g) || []).map(Number);
  const light = ([r, g, b]) => {
    const f = (v) => { v /= 255; return v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4; };
    return 0.2126 * f(r) + 0.7152 * f(g) + 0.0722 * f(b);
  };
  const behind = (e) => {
    for (; e; e = e.parentElement) {
      const c = parse(getComputedStyle(e).backgroundColor);
      if (c.length === 3 || c[3] === 1) return c;
    }
    return [255, 255, 255];
  };
  const poor = [];
  let seen = 0;
  for (const e of document.querySelectorAll("body *")) {
    const own = [...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim());
    if (!own || !e.offsetParent || e.tagName === "NOSCRIPT") continue;
    const [a, b] = [light(parse(getComputedStyle(e).color)), light(behind(e))];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    seen += 1;
    if (ratio < 4.5) poor.push(`${e.tagName} ${e.innerText.slice(0, 30)} ${ratio.toFixed(2)}`);
  }
  return seen > 10 ? poor : [`only ${seen} texts`];
})()"""


def test_the_policy_stops_what_should_ever_slip_through(browser, site):
    tab = browser.open(site.url)

    tab.value("document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=hit=1><p style=color:red>x')")
    tab.value("document.body.append(Object.assign(document.createElement('script'), {textContent: 'hit=1'}))")
    outcome = tab.value("fetch('http://127.0.0.1:9/').then(() => 'sent', () => 'stopped')")
    tab.wait("document.readyState === 'complete'")

    assert outcome == "stopped"
    assert tab.value("typeof hit") == "undefined"
    said = "\n".join(tab.complaints())
    for directive in ("script-src 'self'", "style-src 'self'", "connect-src 'self'"):
        assert directive in said, "otherwise the other tests would see no violation either"


def test_a_key_is_asked_for_sent_and_kept_nowhere(browser, small_models, tmp_path):
    keys = str(tmp_path / "keys.json")
    key = add_key(keys, "analyst")
    shot = write(tmp_path, "shot.png")
    site = Site(config(small_models, api_keys_uri=keys))
    try:
        tab = browser.open(site.url)
        tab.choose_file("#file", shot)
        tab.wait(f"{PROBLEM}.includes('API key')")
        assert focused(tab) == "key"
        assert not [url for url in tab.requested() if ":predict" in url], "nothing is sent without one"

        tab.type("wrong")
        tab.press("Enter")
        tab.wait(f"{PROBLEM}.includes('valid API key')")
        tab.value("document.getElementById('key').select()")
        tab.type(key)
        tab.press("Enter")
        tab.wait(VERDICT)

        line = tab.text("#curl")
        assert key not in tab.value("document.documentElement.outerHTML") + line
        assert tab.value("document.getElementById('key').type") == "password"
        assert tab.value("localStorage.length + sessionStorage.length") == 0
        assert tab.call("Network.getCookies")["cookies"] == []
        assert not [url for url in tab.requested() if key in url]
        command = ["bash", "-c", line]
        ran = subprocess.run(command, cwd=tmp_path, env={**os.environ, "KEY": key}, capture_output=True, timeout=30)
        assert json.loads(ran.stdout) == site.verdict(shot.read_bytes(), Authorization=f"Bearer {key}")
        assert tab.complaints() == []
    finally:
        site.close()
