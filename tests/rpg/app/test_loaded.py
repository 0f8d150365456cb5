"""What the page is made of, without a browser: wishes, comparison with originals, drawn digits, refusals."""

from __future__ import annotations

import base64
import builtins
import io
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gradio as gr
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file

from rpg.app.controls import condition_controls, initial_controls, request_of, sampling_controls
from rpg.app.loaded import LoadedRun, PageRequest
from rpg.app.panels import PREFIX, classes_of, counted, drawn, read_image
from rpg.app.serve import show_header, show_made, show_mistake
from rpg.config import Config
from rpg.experiments.single import collect
from rpg.generation.generator import Generator
from rpg.labs.fields.config import FieldsConfig
from rpg.labs.fields.task import FieldsTask
from rpg.tasks import build_task
from rpg.tasks.images.digits import load_splits, standardise
from rpg.training.loop import train
from tests.conftest import make_zoo, small_config
from tests.rpg.conftest import Run, refused
from tests.rpg.generation.test_adapters import adapters_at
from tokenization.errors import InputError
from tokenization.zoo.importing import collect_from
from tokenization.zoo.zoo import ConditionSpec, Zoo


def loaded(folder: Path, **sections: object) -> LoadedRun:
    """A run that learned next to nothing from the zoo in ``folder``."""
    config = small_config(folder, **{"train": {"steps": 2}, **sections})
    train(config, overwrite=True, say=lambda _: None)
    return LoadedRun(config.run)


def controls(run: LoadedRun) -> list[Any]:
    with gr.Blocks(analytics_enabled=False):
        return [condition_controls(run), initial_controls(run), sampling_controls(run)]


def defaults(parts: list[Any]) -> list[Any]:
    return [component.value for each in parts for component in each.components]


# --- networks and originals ---------------------------------------------------------------------------------------


def test_networks_are_what_generate_makes_and_originals_are_their_own_nearest(tmp_path: Path) -> None:
    make_zoo(tmp_path / "zoo")
    run = loaded(tmp_path)
    made = run.make(PageRequest(num=2, seed=5, state="gaussian", temperature=0.5), tmp_path)
    expected = Generator.from_pretrained(tmp_path / "run").generate(2, seed=5, state="gaussian", temperature=0.5)
    for file, wanted in zip(made.files, expected, strict=True):
        assert all(torch.equal(value, wanted[name]) for name, value in load_file(file).items())  # type: ignore[index]
    assert run.originals is not None
    again = run.originals.nearest([Zoo.open(tmp_path / "zoo").state_dict(4)])[0]
    assert again[0].index == 4 and again[0].distance == pytest.approx(0, abs=1e-5)
    assert again[0].name == "run 0, step 4" and again[1].distance > 0
    html = show_made(run, made)
    assert html.count('scope="row"') == 2 and "accuracy" not in html and "data:image/png" in html


def test_a_generator_whose_zoo_is_gone_is_shown_without_originals(tmp_path: Path) -> None:
    zoo = make_zoo(tmp_path / "zoo")
    loaded(tmp_path)
    zoo.path.rename(tmp_path / "elsewhere")
    run = LoadedRun(tmp_path / "run")
    assert run.originals is None and "elsewhere" not in run.missing[0] and "does not exist" in run.missing[0]
    assert run.missing[0] in show_header(run)
    assert "nearest originals" not in show_made(run, run.make(PageRequest(), tmp_path))


def test_adapters_are_taken_along_as_a_zip_of_peft_folders(tmp_path: Path) -> None:
    adapters = adapters_at(tmp_path, "llama")
    collect_from(adapters, tmp_path / "zoo")
    made = loaded(tmp_path).make(PageRequest(seed=1), tmp_path)
    with zipfile.ZipFile(made.download()) as archive:
        archive.extractall(tmp_path / "taken")
    folder = tmp_path / "taken" / "network-00000"
    assert (folder / "adapter_config.json").read_bytes() == (adapters / "task0/adapter_config.json").read_bytes()
    expected = Generator.from_pretrained(tmp_path / "run").generate(seed=1)[0]
    found = load_file(folder / "adapter_model.safetensors")
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)  # type: ignore[union-attr,index]


# --- conditions ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "values", "condition"),
    [
        (ConditionSpec("binary", 3, ("a", "b", "c")), ["a", "c"], [1.0, 0.0, 1.0]),
        (ConditionSpec("class", 3, ("x", "y", "z")), "y", [1.0]),
        (ConditionSpec("vector", 2), "0.5, -1", [0.5, -1.0]),
    ],
    ids=["binary", "class", "vector"],
)
def test_a_condition_of_any_kind_is_chosen(
    spec: ConditionSpec, values: Any, condition: list[float], tmp_path: Path
) -> None:
    zoo = Zoo.create(tmp_path / "zoo", condition=spec)
    for index in range(4):
        numbers = [index % spec.size] if spec.kind == "class" else [float(index >> bit & 1) for bit in range(spec.size)]
        zoo.append({"w": torch.randn(24), "b": torch.randn(3)}, run=index, step=0, condition=numbers)
    run = loaded(tmp_path, model={"state": {"of": "none"}, "condition": {"kind": spec.kind}})
    parts = controls(run)
    request = request_of(parts, (values, *defaults(parts)[1:]))
    assert request.condition == condition and (request.num, request.seed, request.steps) == (4, 0, 3)
    made = run.make(request, tmp_path)
    expected = Generator.from_pretrained(tmp_path / "run").generate(4, condition=condition)
    assert all(torch.equal(made.networks[3][name], expected[3][name]) for name in ("w", "b"))  # type: ignore[index]
    with pytest.raises(InputError):
        request = (
            request_of(parts, ("1,2,3", *defaults(parts)[1:]))
            if spec.kind == "vector"
            else PageRequest(condition=[9.0])
        )
        run.make(request, tmp_path)
    assert not list(tmp_path.glob("networks-*/generated/*.tmp")) and len(list(tmp_path.glob("networks-*"))) == 1


@pytest.fixture(scope="module")
def metric_run(tmp_path_factory: pytest.TempPathFactory) -> LoadedRun:
    """Of a wished loss, with a start."""
    folder = tmp_path_factory.mktemp("metric")
    changes = [
        f"run={folder / 'run'}", f"zoo={folder / 'zoo'}", "task.runs=8", "task.validation=2", "task.unseen=2",
        "task.hidden=4", "task.steps=[0,5,15]", "task.group=4", "model.backbone.d_model=16", "train.steps=2",
        "model.backbone.num_layers=1", "train.batch_size=4", "train.behaviour.images=20", "train.warmup_steps=0",
    ]  # fmt: skip
    config = Config.load("configs/gpt.yaml", changes)
    collect(config)
    train(config)
    return LoadedRun(config.run)


def test_a_metric_and_a_start(metric_run: LoadedRun, tmp_path: Path) -> None:
    run, parts = metric_run, controls(metric_run)
    assert run.zoo is not None and run.originals is not None
    first, own = run.originals.indices[0], tmp_path / "mine.safetensors"
    request = request_of(parts, (0.5, run.originals.name(first), None, *defaults(parts)[3:]))
    assert request.condition == [0.5] and request.initial == run.zoo.file(first)
    made = run.make(request, tmp_path)
    network, split = build_task(run.config.task).build(), run.config.evaluate.split
    network.load_state_dict(made.networks[0])
    right = network(run.task.images(split)).argmax(1) == run.task.labels(split)  # type: ignore[union-attr]
    assert made.metrics[0]["accuracy"] == pytest.approx(right.double().mean().item())
    save_file(run.zoo.state_dict(first), own)
    uploaded = run.make(request_of(parts, (0.5, None, str(own), *defaults(parts)[3:])), tmp_path)
    assert torch.equal(made.networks[0]["units"], uploaded.networks[0]["units"])


@pytest.mark.parametrize("damage", ["truncated", "pickle", "other network"])
def test_an_uploaded_start_is_refused_in_one_sentence(metric_run: LoadedRun, damage: str, tmp_path: Path) -> None:
    file, parts = tmp_path / "start.safetensors", controls(metric_run)
    assert metric_run.zoo is not None
    if damage == "truncated":
        file.write_bytes(metric_run.zoo.file(0).read_bytes()[:-9])
    elif damage == "pickle":
        torch.save(metric_run.zoo.state_dict(0), file)
    else:
        save_file({"units": torch.zeros(2, 2)}, file)
    with pytest.raises(InputError) as caught:
        metric_run.make(request_of(parts, (0.5, None, str(file), *defaults(parts)[3:])), tmp_path)
    assert "\n" not in str(caught.value) and not list(tmp_path.glob("networks-*"))


# --- digits -------------------------------------------------------------------------------------------------------


def test_a_cut_out_digit_is_counted_in_blocks_of_four() -> None:
    bitmap = (torch.rand(32, 32, generator=torch.Generator().manual_seed(0)) > 0.5).float()
    bitmap[0, 0] = bitmap[31, 31] = 1  # the corners are ink, so that nothing is cut off
    expected = bitmap.view(8, 4, 8, 4).sum((1, 3))
    assert torch.equal(counted(bitmap, "it"), expected)
    far = torch.zeros(90, 120)
    far[7:39, 60:92] = bitmap
    assert torch.equal(counted(far, "it"), expected), "wherever it was drawn"
    narrow = counted(torch.ones(40, 5), "it")
    assert narrow[:, [0, 1, 2, 5, 6, 7]].sum() == 0 and (narrow.sum(1) > 0).all(), "a stroke stays one, in the middle"


def test_redrawn_digits_come_back_as_the_digits_they_were(tmp_path: Path) -> None:
    """Digits enlarged to smooth pictures, as somebody may draw them, and read again."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images, labels = torch.from_numpy(digits.images).float(), torch.from_numpy(digits.target)
    drawings = F.interpolate(images[:300, None] / 16, size=128, mode="bicubic", align_corners=False)[:, 0].clamp(0, 1)
    counts = torch.stack([counted(drawing, "it") for drawing in drawings])
    distances = torch.cdist(counts.flatten(1), images.flatten(1))
    distances.fill_diagonal_(float("inf"))  # another digit than that itself
    assert (labels[distances.argmin(1)] == labels[:300]).float().mean() > 0.92
    for index in range(3):
        Image.fromarray((255 * (1 - drawings[index])).byte().numpy()).save(tmp_path / f"{index}.png")
    run: Any = SimpleNamespace(zoo=object(), task=FieldsTask(FieldsConfig()))
    assert classes_of(run, [tmp_path / f"{index}.png" for index in range(3)]) == labels[:3].tolist()


def test_counts_are_standardised_as_the_images_that_networks_learned_from() -> None:
    from sklearn.datasets import load_digits

    images = torch.from_numpy(load_digits().images).float()[:, None]
    for size in (8, 16):
        known = torch.cat(list(load_splits(size).images.values()))
        assert torch.allclose(standardise(images, size).sort(0).values, known.sort(0).values, atol=1e-5)


def test_a_drawing_is_read_from_its_data_url_and_nothing_else(tmp_path: Path) -> None:
    page = Image.new("RGB", (64, 64), "white")
    page.paste((0, 0, 0), (20, 10, 30, 50))
    page.save(tmp_path / "one.png")
    url = PREFIX + base64.b64encode((tmp_path / "one.png").read_bytes()).decode()
    assert torch.equal(drawn(url), read_image(tmp_path / "one.png")) and drawn(url).sum() > 0
    inverted = Image.eval(page, lambda value: 255 - value)
    inverted.save(tmp_path / "white.png")
    assert torch.equal(drawn(url), read_image(tmp_path / "white.png")), "chalk on a board reads as ink on paper"
    empty = io.BytesIO()
    Image.new("RGB", (64, 64), "white").save(empty, "PNG")
    nothing = PREFIX + base64.b64encode(empty.getvalue()).decode()
    for wrong in (
        None,
        3,
        "/etc/passwd",
        "file:///etc/passwd",
        PREFIX + "AAAA",
        PREFIX + "%%",
        nothing,
        PREFIX + "A" * 2**21,
    ):
        with pytest.raises(InputError):
            drawn(wrong)


# --- the page and its command -------------------------------------------------------------------------------------


def test_what_is_shown_is_escaped() -> None:
    shown = show_mistake("<img src=x onerror=alert(1)> ${value} {{value}}\n").strip()
    inside = "&lt;img src=x onerror=alert(1)&gt; &#36;&#123;value} &#123;&#123;value}}"
    assert shown == f'<p class="mistake" role="alert">{inside}</p>'


def test_without_gradio_the_command_says_what_to_install(
    rpg: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real: Callable[..., Any] = builtins.__import__

    def missing(name: str, *arguments: Any, **more: Any) -> Any:
        if name.partition(".")[0] == "gradio":
            raise ModuleNotFoundError("No module named 'gradio'", name="gradio")
        return real(name, *arguments, **more)

    for name in [name for name in sys.modules if name in ("rpg.app.serve", "rpg.app.serve", "rpg.app.controls")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(builtins, "__import__", missing)
    refused(rpg("app", tmp_path, "--device", "cpu"), "Gradio", "pip install 'gradio>=6'")
    monkeypatch.setattr(builtins, "__import__", real)
    refused(rpg("app", tmp_path / "none", "--device", "cpu"), "none")
