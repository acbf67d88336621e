"""The HTML report in a real browser: sorting, no errors, no network, readable at phone width, light and dark."""

import json
import re
import shutil

import pytest
from made_up import report

from fused_rect.environment import machine
from fused_rect.perf.profiling.compare import compare
from fused_rect.perf.profiling.page import page

FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
)
COMMAND = "fused-rect profile --html <report>.html"


def content():
    frame = report()
    return page(frame, machine(), COMMAND, compare(report((1.5, 1.5, 0.7)), frame))


def test_the_page_is_self_contained_and_escapes_what_it_shows():
    text = content()
    assert not re.search(r"""(src|href)=["'](?!#|data:)|@import|url\((?!#)""", text)
    assert "&lt;report&gt;" in text and "<report>" not in text
    assert not re.search(r"\b(nan|inf)\b", re.sub(r"<svg.*?</svg>", "", text, flags=re.S))


def test_identifiers_are_unique_and_pictures_take_the_pages_colours():
    text = content()
    found = re.findall(r' id="([^"]+)"', text)
    assert len(set(found)) == len(found)
    assert "var(--accent)" in text and "#040404" not in text


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (chromium and driver):
        pytest.skip("no Chromium: apt-get install chromium chromium-driver")
    webdriver = pytest.importorskip("selenium.webdriver", reason="pip install selenium")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in (*FLAGS.split(), f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    started = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield started
    started.quit()


@pytest.fixture
def opened(browser, tmp_path):
    file = tmp_path / "report.html"
    file.write_text(content())
    browser.get(file.as_uri())
    return browser


def requested(browser):
    events = (json.loads(entry["message"])["message"] for entry in browser.get_log("performance"))
    return [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]


def column(browser, name):
    headers = browser.find_elements("css selector", "#measurements thead th")
    at = [header.text.rstrip(" ▲▼") for header in headers].index(name)
    cells = browser.find_elements("css selector", f"#measurements tbody td:nth-child({at + 1})")
    return headers[at], [cell.get_attribute("data-v") for cell in cells]


def test_it_opens_without_errors_or_network(opened):
    assert not [url for url in requested(opened) if not url.startswith(("file:", "data:", "chrome:"))]
    assert opened.get_log("browser") == []
    assert len(opened.find_elements("css selector", "svg")) == 1


@pytest.mark.parametrize("name, read", [("time", float), ("peer", str)])
def test_a_click_on_a_header_sorts_and_a_second_one_reverses(opened, name, read):
    header, before = column(opened, name)
    values = [read(value) for value in before]
    assert values != sorted(values) and values != sorted(values, reverse=True)
    for order, reverse in (("ascending", False), ("descending", True)):
        header.find_element("tag name", "button").click()
        assert header.get_attribute("aria-sort") == order
        assert [read(value) for value in column(opened, name)[1]] == sorted(values, reverse=reverse)
    assert opened.get_log("browser") == []


@pytest.mark.parametrize("width", (360, 1280))
@pytest.mark.parametrize("scheme", ("light", "dark"))
def test_it_fits_its_window_and_is_legible(opened, width, scheme):
    emulate = opened.execute_cdp_cmd
    emulate("Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]})
    size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500}
    emulate("Emulation.setDeviceMetricsOverride", size)
    assert opened.execute_script("return document.documentElement.scrollWidth") <= width
    style = "const s = getComputedStyle(document.body); return [s.color, s.backgroundColor]"
    ink, paper = ([int(v) for v in re.findall(r"\d+", color)[:3]] for color in opened.execute_script(style))
    assert contrast(ink, paper) >= 7
    assert (sum(paper) > sum(ink)) == (scheme == "light")
    texts = "return [...document.querySelectorAll('svg text')].map(t => t.getBoundingClientRect().height)"
    assert min(opened.execute_script(texts)) >= 8


def contrast(a, b):
    """WCAG's contrast ratio of two sRGB colours."""

    def luminance(color):
        linear = [v / 255 / 12.92 if v / 255 <= 0.04045 else ((v / 255 + 0.055) / 1.055) ** 2.4 for v in color]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_scaling_pictures_are_on_the_page():
    frame = report(workload="scaling threads").query("part != 'layer'").copy()
    assert page(frame, {}, "").count("<svg") == 4
