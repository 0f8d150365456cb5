"""The page in a real browser: generate, draw, take along, be refused; nothing is asked of any other host."""

from __future__ import annotations

import json
import shutil
import socket
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image, ImageDraw
from safetensors.torch import load_file
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import WebDriverWait

from rpg.app.digits import answer, classes_of, drawn
from rpg.app.loaded import LoadedRun
from rpg.app.serve import served
from rpg.config import Config
from rpg.experiments.single import collect
from rpg.tasks import many
from rpg.training.loop import train
from tests.rpg.commands import CONFIGS
from tests.rpg.conftest import Run
from tests.rpg.evaluation.test_page import CHROMIUM, OWN_TRAFFIC
from tokenization.errors import InputError

DRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="chromium or its driver is not installed")
FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update",
    "--disable-sync", "--no-first-run", "--disable-dev-shm-usage",
)  # fmt: skip
SEVEN = [(0.2, 0.2), (0.5, 0.18), (0.8, 0.2), (0.65, 0.5), (0.5, 0.85)]
PATIENCE = 90  # seconds, of a busy machine


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> LoadedRun:
    """A generator of networks for groups of digits that learned next to nothing."""
    folder = tmp_path_factory.mktemp("page")
    tree = {"run": str(folder / "run"), "zoo": str(folder / "zoo"), **CONFIGS["unseen"]}
    config = Config.parse(yaml.safe_load(yaml.safe_dump(tree)), "test")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(many, "num_cores", lambda: 1)
        collect(config)
        train(config, say=lambda _: None)
    return LoadedRun(config.run)


@pytest.fixture(scope="module")
def address(run: LoadedRun) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with served(run, port=port) as address:
        yield address


class Page:
    """The page as somebody uses it."""

    def __init__(self, address: str, folder: Path) -> None:
        options = webdriver.ChromeOptions()
        options.binary_location = str(CHROMIUM)
        for flag in (*FLAGS, f"--user-data-dir={folder / 'profile'}"):
            options.add_argument(flag)
        options.add_experimental_option("prefs", {"download.default_directory": str(folder)})
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        self.driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(str(DRIVER)))
        self.wait = WebDriverWait(self.driver, PATIENCE)
        self.driver.get(address)
        self.find("#generate")

    def find(self, css: str) -> WebElement:
        return self.wait.until(lambda driver: next(iter(driver.find_elements(By.CSS_SELECTOR, css)), None))

    def all(self, css: str) -> list[WebElement]:
        return self.driver.find_elements(By.CSS_SELECTOR, css)

    def until(self, css: str, text: str) -> str:
        """The text of an element once it says something; other texts may come before."""

        def says(driver: Any) -> str | None:
            found = driver.execute_script("return document.querySelector(arguments[0])?.textContent", css) or ""
            return found if text in found else None

        return self.wait.until(says)

    def switch(self, *names: str) -> None:
        """Have these classes on and no others."""
        for label in self.all("#condition label"):
            if label.text in ("", "Classes that count as positive"):
                continue
            box = label.find_element(By.CSS_SELECTOR, "input")
            if box.is_selected() != (label.text in names):
                label.click()

    def switches(self) -> list[str]:
        boxes = [(each.text, each.find_elements(By.CSS_SELECTOR, "input")) for each in self.all("#condition label")]
        return [text for text, box in boxes if box and box[0].is_selected()]

    def write(self, css: str, value: int) -> None:
        box = self.find(css)
        box.clear()
        box.send_keys(f"{value}\t")

    def upload(self, file: Path) -> None:
        box = self.find("input[data-testid$=upload-button]")
        self.driver.execute_script("arguments[0].value = ''", box)  # or the driver adds to what was there
        box.send_keys(str(file))

    def draw(self, points: list[tuple[float, float]]) -> None:
        """A stroke, from pointer events as a finger or a mouse makes them."""
        canvas = self.find("#pad canvas")
        self.driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", canvas)
        size = canvas.size
        actions = webdriver.ActionChains(self.driver, duration=10)
        for number, (x, y) in enumerate(points):
            actions.move_to_element_with_offset(canvas, (x - 0.5) * size["width"], (y - 0.5) * size["height"])
            if number == 0:
                actions.click_and_hold()
        actions.release().perform()

    def hosts(self) -> set[str]:
        """Whom the browser asked for anything."""
        messages = [json.loads(each["message"])["message"] for each in self.driver.get_log("performance")]
        urls = [each["params"]["request"]["url"] for each in messages if each["method"] == "Network.requestWillBeSent"]
        return {url.split("/")[2] for url in urls if url.startswith("http")}


@pytest.fixture(scope="module")
def page(address: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    page = Page(address, tmp_path_factory.mktemp("browser"))
    yield page
    page.driver.quit()


def test_the_download_is_what_generate_writes(page: Page, run: LoadedRun, rpg: Run, tmp_path: Path) -> None:
    folder = Path(page.driver.capabilities["chrome"]["userDataDir"]).parent
    page.switch("three", "seven")
    page.write("#num input[type=number]", 2)
    page.write("#seed input", 7)
    page.find("#generate").click()
    assert "2 networks for three, seven" in page.until("#result h2", "networks for")
    text = page.find("#result").text
    assert "accuracy" in text and "nearest originals" in text and "Seed 7" in text
    page.until("#download", "networks.zip")
    page.find("#download").click()
    page.wait.until(lambda _: (folder / "networks.zip").is_file())
    with zipfile.ZipFile(folder / "networks.zip") as archive:
        archive.extractall(tmp_path / "taken")
    code, _, err = rpg("generate", run.name, "-n", 2, "--seed", 7, "--classes", "3,7", "--output", tmp_path / "made")
    assert code == 0, err
    names = [f"network-0000{index}.safetensors" for index in range(2)]
    for name in names:
        assert (tmp_path / "taken" / name).read_bytes() == (tmp_path / "made" / name).read_bytes()
    network = run.task.build()  # type: ignore[union-attr]
    network.load_state_dict(load_file(tmp_path / "taken" / names[1]))


def test_every_network_answers_to_a_drawn_digit(page: Page, run: LoadedRun) -> None:
    page.draw(SEVEN)
    assert "Is it one of: three, seven?" in page.until("#answers", "Is it one of")
    assert len(page.all("#answers li")) == 2
    counts = drawn(page.driver.execute_script("return document.querySelector('#pad canvas').toDataURL()"))
    bits = [float(digit in (3, 7)) for digit in range(10)]
    for network, item in zip(run.generator.generate(2, seed=7, condition=bits), page.all("#answers li"), strict=True):
        expected = answer(run, network, counts, bits)  # type: ignore[arg-type]
        assert item.text.startswith(f"{expected.text} {100 * expected.share:.0f} %")


def test_examples_set_the_switches_and_what_is_none_is_refused_in_a_line(
    page: Page, run: LoadedRun, tmp_path: Path
) -> None:
    (tmp_path / "broken.png").write_bytes(b"no picture")
    page.upload(tmp_path / "broken.png")
    line = page.until(".mistake", "broken.png")
    assert line.strip() == "broken.png is no picture that can be read; give a PNG or JPEG file of one digit"
    assert page.switches() == ["three", "seven"]
    image = Image.new("L", (64, 64), "white")
    ImageDraw.Draw(image).line([(64 * x, 64 * y) for x, y in SEVEN], fill=0, width=7, joint="curve")
    image.save(tmp_path / "seven.png")
    page.upload(tmp_path / "seven.png")
    found = classes_of(run, [tmp_path / "seven.png"])
    names = [run.task.class_names[place] for place in found]  # type: ignore[union-attr]
    page.wait.until(lambda _: page.switches() == names and not page.all(".mistake"))


def test_no_class_at_all_is_refused_in_a_line_and_the_networks_stay(page: Page) -> None:
    page.switch()
    page.find("#generate").click()
    assert "no positive class" in page.until(".mistake", "asks nothing")
    assert "for three, seven" in page.find("#result h2").text


def test_nothing_else_is_asked_for_and_nothing_is_complained_of(page: Page, address: str) -> None:
    assert {each for each in page.hosts() if not each.endswith(OWN_TRAFFIC)} == {address.removeprefix("http://")}
    assert [each["message"] for each in page.driver.get_log("browser") if each["level"] == "SEVERE"] == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_phone(page: Page, scheme: str) -> None:
    metrics = {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": True}
    page.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    page.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    time.sleep(0.5)
    assert page.driver.execute_script("return document.documentElement.scrollWidth") <= 390


def test_a_port_that_is_taken_is_refused(address: str, run: LoadedRun) -> None:
    with pytest.raises(InputError, match="choose another --port"), served(run, port=int(address.rpartition(":")[2])):
        pass


def test_files_of_this_machine_are_not_served(address: str, run: LoadedRun, tmp_path: Path) -> None:
    for path in ("/etc/passwd", Path(run.name).resolve() / "generator/config.yaml", "pyproject.toml"):
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(f"{address}/gradio_api/file={path}")
        assert caught.value.code in (403, 404)
