"""The page in a real browser: generate, draw, take along, be refused; nothing is asked of any other host."""

from __future__ import annotations

import json
import shutil
import time
import urllib.error
import urllib.request
import zipfile
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

from rpg.app.loaded import LoadedRun
from rpg.app.panels import answer, classes_of, drawn
from rpg.app.serve import served
from rpg.config import Config
from rpg.experiments.single import collect
from rpg.tasks import collecting
from rpg.training.loop import train
from tests.processes import free_port
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
        patch.setattr(collecting, "num_cores", lambda: 1)
        collect(config)
        train(config, say=lambda _: None)
    return LoadedRun(config.run)


class Page:
    """The page as somebody uses it."""

    def __init__(self, address: str, folder: Path) -> None:
        options = webdriver.ChromeOptions()
        options.binary_location = str(CHROMIUM)
        for flag in (*FLAGS, f"--user-data-dir={folder / 'profile'}"):
            options.add_argument(flag)
        options.add_experimental_option("prefs", {"download.default_directory": str(folder)})
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        self.folder = folder
        self.driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(str(DRIVER)))
        self.wait = WebDriverWait(self.driver, PATIENCE, poll_frequency=0.1)
        self.driver.get(address)
        self.find("#generate")
        time.sleep(0.5)  # what is shown answers a moment later

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


def test_somebody_uses_the_page(run: LoadedRun, rpg: Run, tmp_path: Path) -> None:
    """One visit, from the first network to the last refusal: what happens later builds on what was there before."""
    port = free_port()
    with served(run, port=port) as address:
        page = Page(address, tmp_path)
        try:
            the_download_is_what_generate_writes(page, run, rpg)
            every_network_answers_to_a_drawn_digit(page, run)
            pictures_set_the_switches_and_others_are_refused_in_a_line(page, run)
            no_class_at_all_is_refused_in_a_line_and_the_networks_stay(page)
            nothing_else_is_asked_for_and_nothing_complained_of(page, address)
            nothing_sticks_out(page)
        finally:
            page.driver.quit()
        files_of_this_machine_are_not_served(address, run)
        paths_do_not_come_from_the_page(address, tmp_path)
        with pytest.raises(InputError, match="choose another --port"), served(run, port=port):
            pass


def the_download_is_what_generate_writes(page: Page, run: LoadedRun, rpg: Run) -> None:
    page.switch("three", "seven")
    page.write("#num input[type=number]", 2)
    page.write("#seed input", 7)
    page.find("#generate").click()
    assert "2 networks for three, seven" in page.until("#result h2", "networks for")
    text = page.find("#result").text
    assert "accuracy" in text and "nearest originals" in text and "Seed 7" in text
    page.until("#download", "networks.zip")
    page.find("#download").click()
    page.wait.until(lambda _: (page.folder / "networks.zip").is_file())
    with zipfile.ZipFile(page.folder / "networks.zip") as archive:
        archive.extractall(page.folder / "taken")
    made = page.folder / "made"
    code, _, err = rpg("generate", run.name, "-n", 2, "--seed", 7, "--classes", "3,7", "--output", made)
    assert code == 0, err
    names = [f"network-0000{index}.safetensors" for index in range(2)]
    for name in names:
        assert (page.folder / "taken" / name).read_bytes() == (made / name).read_bytes()
    network = run.task.build()  # type: ignore[union-attr]
    network.load_state_dict(load_file(page.folder / "taken" / names[1]))


def every_network_answers_to_a_drawn_digit(page: Page, run: LoadedRun) -> None:
    page.draw(SEVEN)
    assert "Is it one of: three, seven?" in page.until("#answers", "Is it one of")
    counts = drawn(page.driver.execute_script("return document.querySelector('#pad canvas').toDataURL()"))
    bits = [float(digit in (3, 7)) for digit in range(10)]
    for network, item in zip(run.generator.generate(2, seed=7, condition=bits), page.all("#answers li"), strict=True):
        expected = answer(run, network, counts, bits)  # type: ignore[arg-type]
        assert item.text.startswith(f"{expected.text} {100 * expected.share:.0f} %")


def pictures_set_the_switches_and_others_are_refused_in_a_line(page: Page, run: LoadedRun) -> None:
    (page.folder / "broken.png").write_bytes(b"no picture")
    page.upload(page.folder / "broken.png")
    line = page.until(".mistake", "broken.png")
    assert line.strip() == "broken.png is not a picture that can be read; give a PNG or JPEG file of one digit"
    assert page.switches() == ["three", "seven"]
    image = Image.new("L", (64, 64), "white")
    ImageDraw.Draw(image).line([(64 * x, 64 * y) for x, y in SEVEN], fill=0, width=7, joint="curve")
    image.save(page.folder / "seven.png")
    page.upload(page.folder / "seven.png")
    names = [run.task.class_names[each] for each in classes_of(run, [page.folder / "seven.png"])]  # type: ignore[union-attr]
    page.wait.until(lambda _: page.switches() == names and not page.all(".mistake"))


def no_class_at_all_is_refused_in_a_line_and_the_networks_stay(page: Page) -> None:
    page.switch()
    page.find("#generate").click()
    assert "no positive class" in page.until(".mistake", "asks nothing")
    assert "for three, seven" in page.find("#result h2").text


def nothing_else_is_asked_for_and_nothing_complained_of(page: Page, address: str) -> None:
    assert {each for each in page.hosts() if not each.endswith(OWN_TRAFFIC)} == {address.removeprefix("http://")}
    assert [each["message"] for each in page.driver.get_log("browser") if each["level"] == "SEVERE"] == []


def nothing_sticks_out(page: Page) -> None:
    """On a desk and on a phone, in light and dark."""
    outside = """return [...document.querySelectorAll('#work *')].filter(
        each => each.getBoundingClientRect().right > innerWidth + 1).map(each => each.outerHTML.slice(0, 80))"""
    for width, scheme in ((1200, "light"), (1200, "dark"), (390, "light"), (390, "dark")):
        metrics = {"width": width, "height": 844, "deviceScaleFactor": 1, "mobile": width < 500}
        page.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        page.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        assert page.driver.execute_script(outside) == [], (width, scheme)
        assert page.driver.execute_script("return document.documentElement.scrollWidth") <= width


def files_of_this_machine_are_not_served(address: str, run: LoadedRun) -> None:
    for path in ("/etc/passwd", Path(run.name).resolve() / "generator/config.yaml", "pyproject.toml"):
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(f"{address}/gradio_api/file={path}")
        assert caught.value.code in (403, 404)


def paths_do_not_come_from_the_page(address: str, folder: Path) -> None:
    """Whoever speaks to the server without the page may not name a file of this machine as an upload."""
    with urllib.request.urlopen(f"{address}/config") as answer:
        config = json.load(answer)
    button = next(each["id"] for each in config["components"] if each["type"] == "uploadbutton")
    event = next(each["id"] for each in config["dependencies"] if each["inputs"] == [button])
    picture = (folder / "seven.png").read_bytes()
    start, end = b'--x\r\nContent-Disposition: form-data; name="files"; filename="seven.png"\r\n\r\n', b"\r\n--x--\r\n"
    form = {"Content-Type": "multipart/form-data; boundary=x"}
    uploaded = json.loads(post(f"{address}/gradio_api/upload", start + picture + end, form))[0]
    for path, accepted in ((uploaded, True), (folder / "seven.png", False), ("/etc/passwd", False)):
        file = {"path": str(path), "meta": {"_type": "gradio.FileData"}}
        body = json.dumps({"data": [[file]], "fn_index": event, "session_hash": "mine", "event_data": None})
        post(f"{address}/gradio_api/queue/join", body.encode(), {"Content-Type": "application/json"})
        with urllib.request.urlopen(f"{address}/gradio_api/queue/data?session_hash=mine", timeout=PATIENCE) as stream:
            lines = [json.loads(line[5:]) for line in stream if line.startswith(b"data:")]
        done = next(each for each in lines if each["msg"] == "process_completed")
        assert done["success"] is accepted, path


def post(url: str, body: bytes, headers: dict[str, str]) -> bytes:
    with urllib.request.urlopen(urllib.request.Request(url, body, headers)) as answer:
        return answer.read()
