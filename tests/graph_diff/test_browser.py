"""The HTML page in a real browser: it opens without errors, answers clicks and keys, and needs no network."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import fxprune
from fxprune.compiled import CompiledModule
from fxprune.geometry import flatten_weight
from fxprune.graph_diff import GraphDiff, diff
from tests.graph_diff.small_net import SmallNet

webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium: pip install selenium")
ActionChains = webdriver.ActionChains
By = pytest.importorskip("selenium.webdriver.common.by").By
Keys = webdriver.Keys

FLAGS = (
    "--headless --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-dev-shm-usage "
    "--disable-component-update --disable-sync --force-prefers-reduced-motion --window-size=1400,900"
).split()


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    binary = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    driver_path = shutil.which("chromedriver")
    if not binary or not driver_path:
        pytest.skip("no Chromium with chromedriver; on Debian: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for flag in [*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"]:
        options.add_argument(flag)
    if os.geteuid() == 0:
        options.add_argument("--no-sandbox")  # Chromium's sandbox does not start as root
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    service = webdriver.ChromeService(driver_path, log_output=subprocess.DEVNULL)
    driver = webdriver.Chrome(options=options, service=service)
    yield driver
    driver.quit()


@pytest.fixture
def result(net: SmallNet, compiled: CompiledModule, images: Tensor) -> GraphDiff:
    return diff(net, compiled, example_inputs=images)


def show(browser: webdriver.Chrome, result: GraphDiff, folder: Path) -> None:
    result.to_html(folder / "diff.html")
    browser.get((folder / "diff.html").as_uri())


def button(browser: webdriver.Chrome, name: str) -> webdriver.remote.webelement.WebElement:
    (found,) = browser.find_elements(By.CSS_SELECTOR, f'.node[title="{name}"]')
    return found


def panel(browser: webdriver.Chrome) -> str:
    return str(browser.find_element(By.ID, "panel").text)


def shown(browser: webdriver.Chrome) -> str:
    return str(browser.find_element(By.ID, "node-name").text)


def test_it_opens_without_errors_and_without_network(
    browser: webdriver.Chrome, result: GraphDiff, tmp_path: Path
) -> None:
    show(browser, result, tmp_path)
    for node in browser.find_elements(By.CSS_SELECTOR, ".node"):
        node.click()
        assert shown(browser) == node.get_attribute("title")
    assert browser.get_log("browser") == []
    assert browser.execute_script("return performance.getEntriesByType('resource').length") == 0
    assert "Graph diff: SmallNet → SmallNet pruned to 2:4" in browser.title


def test_it_opens_with_what_changed(browser: webdriver.Chrome, result: GraphDiff, tmp_path: Path) -> None:
    show(browser, result, tmp_path)
    rows = [row.text.split() for row in browser.find_elements(By.CSS_SELECTOR, "#panel .layers tbody tr")]
    assert [row[0] for row in rows] == ["conv1", "conv2", "mix", "fc"]
    assert rows[1][1] == "50.0%"
    browser.find_element(By.XPATH, "//thead//button[text()='output error']").click()
    names = [cell.text for cell in browser.find_elements(By.CSS_SELECTOR, "#panel .layers .link")]
    assert names == ["fc", "mix", "conv2", "conv1"]
    browser.find_element(By.CSS_SELECTOR, "#panel .layers .link").click()
    assert shown(browser) == "fc"


def test_a_click_shows_the_layer_with_its_mask(
    browser: webdriver.Chrome, result: GraphDiff, compiled: CompiledModule, tmp_path: Path
) -> None:
    show(browser, result, tmp_path)
    button(browser, "conv2").click()
    assert shown(browser) == "conv2"
    for text in ("pruned to 2:4", "bn2 folded in", "Before, BatchNorm folded in", "8×8×3×3", "288 zeros"):
        assert text in panel(browser)
    cells = browser.execute_script(
        """const canvas = document.querySelectorAll('#panel canvas')[1], side = canvas.width / 72;
        const pixels = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data;
        return [...Array(8 * 72).keys()].map((i) => {
          const x = Math.floor((i % 72) * side + side / 3), y = Math.floor(Math.floor(i / 72) * side + side / 3);
          return pixels[4 * (y * canvas.width + x) + 3] > 0;
        });"""
    )
    kept = flatten_weight(compiled.get_submodule("conv2").weight.detach()) != 0
    assert cells == kept.flatten().tolist()


def test_a_folded_batchnorm_leads_to_its_layer(browser: webdriver.Chrome, result: GraphDiff, tmp_path: Path) -> None:
    show(browser, result, tmp_path)
    button(browser, "bn1").click()
    assert "folded into conv1" in panel(browser)
    browser.find_element(By.CSS_SELECTOR, "#panel .note .link").click()
    assert shown(browser) == "conv1"
    assert "Not pruned: 3 input channels are not a multiple of 4." in panel(browser)


def test_search_dims_and_steps_through_what_it_finds(
    browser: webdriver.Chrome, result: GraphDiff, tmp_path: Path
) -> None:
    show(browser, result, tmp_path)
    ActionChains(browser).send_keys("/conv").perform()
    found = [node.get_attribute("title") for node in browser.find_elements(By.CSS_SELECTOR, ".node.match")]
    assert found == ["conv1", "bn1", "conv2", "bn2", "mix"]  # bn1 was folded into conv1
    assert browser.find_element(By.ID, "matches").text == "5 matches"
    ActionChains(browser).send_keys(Keys.ENTER, Keys.ENTER, Keys.ENTER).perform()
    assert shown(browser) == "conv2"
    assert browser.find_element(By.ID, "matches").text == "3 of 5"
    ActionChains(browser).send_keys(Keys.ESCAPE).perform()
    assert browser.find_elements(By.CSS_SELECTOR, ".node.match") == []
    assert "What changed" in panel(browser)


def test_a_status_button_shows_only_its_nodes(browser: webdriver.Chrome, result: GraphDiff, tmp_path: Path) -> None:
    show(browser, result, tmp_path)
    removed = browser.find_element(By.CSS_SELECTOR, ".filter.removed")
    removed.click()
    found = [node.get_attribute("title") for node in browser.find_elements(By.CSS_SELECTOR, ".node.match")]
    assert found == ["bn1", "bn2"]
    assert removed.get_attribute("aria-pressed") == "true"
    removed.click()
    assert browser.find_elements(By.CSS_SELECTOR, "#graph.filtered") == []


def test_everything_can_be_reached_by_keyboard(browser: webdriver.Chrome, result: GraphDiff, tmp_path: Path) -> None:
    show(browser, result, tmp_path)
    for _ in range(20):
        ActionChains(browser).send_keys(Keys.TAB).perform()
        if "node" in (browser.switch_to.active_element.get_attribute("class") or "").split():
            break
    assert browser.switch_to.active_element.get_attribute("title") == "x"
    ActionChains(browser).send_keys(Keys.ARROW_DOWN, Keys.ARROW_DOWN, Keys.ENTER).perform()
    assert shown(browser) == "bn1"
    ActionChains(browser).send_keys("n").perform()
    assert shown(browser) == "conv2"
    ActionChains(browser).send_keys("pp").perform()
    assert shown(browser) == "conv1"
    ActionChains(browser).send_keys(Keys.END, Keys.ENTER).perform()
    assert shown(browser) == "output"


def test_light_and_dark(browser: webdriver.Chrome, result: GraphDiff, tmp_path: Path) -> None:
    def brightness() -> float:
        color = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
        return sum(map(int, color.removeprefix("rgb(").removesuffix(")").split(","))) / 3

    for scheme, dark in (("light", False), ("dark", True)):
        media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
        show(browser, result, tmp_path)
        assert (brightness() < 100) == dark
        browser.find_element(By.ID, "theme").click()
        assert (brightness() < 100) != dark
        browser.find_element(By.ID, "theme").click()
        assert (brightness() < 100) == dark
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def test_names_are_never_run(browser: webdriver.Chrome, result: GraphDiff, tmp_path: Path) -> None:
    evil = "<img src=x onerror=document.title='run'>"
    nodes = tuple(
        replace(node, name=f"{i}{evil}", reason=evil, changes=(evil,), folded=(), into=())
        for i, node in enumerate(result.nodes)
    )
    show(browser, replace(result, nodes=nodes, notes=(evil,)), tmp_path)
    for node in browser.find_elements(By.CSS_SELECTOR, ".node"):
        node.click()
    assert browser.find_elements(By.CSS_SELECTOR, "img") == []
    assert browser.title.startswith("Graph diff")
    assert browser.get_log("browser") == []


def test_an_empty_diff(browser: webdriver.Chrome, net: SmallNet, tmp_path: Path) -> None:
    show(browser, diff(net, net), tmp_path)
    assert "No difference: SmallNet and SmallNet" in browser.find_element(By.CSS_SELECTOR, ".empty").text
    assert "Nothing changed" in panel(browser)
    ActionChains(browser).send_keys("n").perform()
    assert browser.get_log("browser") == []


@pytest.mark.slow
def test_resnet50_answers_without_lag(browser: webdriver.Chrome, tmp_path: Path) -> None:
    model = fxprune.models.create("resnet50").eval()
    compiled = fxprune.compile(model, [torch.randn(2, 3, 64, 64)], method="magnitude", progress=False)
    show(browser, diff(model, compiled), tmp_path)
    assert (tmp_path / "diff.html").stat().st_size < 4_000_000
    count = len(browser.find_elements(By.CSS_SELECTOR, ".node"))
    assert count == 177
    worst = browser.execute_script(
        """let worst = 0;
        for (let i = 0; i < nodes.length; i++) {
          const start = performance.now();
          select(i);
          document.body.getBoundingClientRect();
          worst = Math.max(worst, performance.now() - start);
        }
        return worst;"""
    )
    assert worst < 250, f"showing a layer took {worst:.0f} ms"
    assert browser.get_log("browser") == []


def test_a_narrow_screen_shows_graph_and_panel_in_turn(
    browser: webdriver.Chrome, result: GraphDiff, tmp_path: Path
) -> None:
    metrics = {"width": 420, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    show(browser, result, tmp_path)
    graph, details = (browser.find_element(By.ID, name) for name in ("scroll", "panel"))
    assert (graph.is_displayed(), details.is_displayed()) == (False, True)
    browser.find_element(By.CSS_SELECTOR, ".tabs [data-view=graph]").click()
    assert (graph.is_displayed(), details.is_displayed()) == (True, False)
    assert graph.size["height"] > 500
    button(browser, "conv2").click()
    assert (graph.is_displayed(), shown(browser)) == (False, "conv2")
    assert browser.execute_script("return document.documentElement.scrollWidth") == 420
    assert browser.get_log("browser") == []
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
