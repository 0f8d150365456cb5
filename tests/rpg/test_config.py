from pathlib import Path

import pytest

from rpg.config import Config
from tests.conftest import configurations
from tokenization.errors import InputError

CONFIGS = [path for path in configurations(Path("configs")) if path.parent.name not in ("sweeps", "accelerate")]


def write(folder: Path, text: str) -> Path:
    path = folder / "config.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("path", CONFIGS, ids=str)
def test_every_shipped_config_loads_and_survives_saving(path, tmp_path):
    config = Config.load(path)
    config.save(tmp_path / "saved.yaml")
    assert Config.load(tmp_path / "saved.yaml") == config


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("trian: {steps: 3}", ["trian", "did you mean 'train'"]),
        ("train: {stepz: 3}", ["train.stepz", "did you mean 'steps'"]),
        ("model: {backbone: {kind: lstm, d_modle: 3}}", ["model.backbone.d_modle", "did you mean 'd_model'"]),
        ("tokens: {sise: 3}", ["tokens.sise", "did you mean 'size'"]),
        ("model: {kind: pdiff, autoencoder: {steps: 3}}", ["model.autoencoder.learning_rate is missing"]),
        ("train: {steps: 0}", ["train.steps", "0", "greater than or equal to 1"]),
        ("train: {steps: many}", ["train.steps", "'many'", "integer"]),
        ("model: {backbone: {kind: gru}}", ["model.backbone", "lstm"]),
        ("tokens: {normalization: batch}", ["tokens.normalization", "'batch'"]),
        ("tokens: {size: 0}", ["tokens", "size"]),
        ("[1, 2]", ["list", "mapping"]),
        ("a: [", ["invalid YAML"]),
    ],
)
def test_mistakes_name_the_field_and_the_cure_in_one_line(tmp_path, text, expected):
    with pytest.raises(InputError) as caught:
        Config.load(write(tmp_path, text))
    message = str(caught.value)
    assert "\n" not in message
    for part in ["config.yaml", *expected] if "mapping" not in expected else expected:
        assert part in message


def test_overrides_reach_nested_fields_and_keep_their_siblings(tmp_path):
    path = write(tmp_path, "model: {backbone: {kind: lstm, d_model: 64, num_layers: 3}}")
    config = Config.load(path, ["model.backbone.d_model=32", "train.learning_rate=1e-4", "train.tokens=null"])
    assert config.model.backbone.d_model == 32
    assert config.model.backbone.num_layers == 3
    assert config.train.learning_rate == 1e-4
    assert config.train.tokens is None


def test_another_kind_starts_its_section_afresh(tmp_path):
    path = write(tmp_path, "model: {denoiser: {kind: mlp, width: 64}}")
    config = Config.load(path, ["model.denoiser.kind=unet1d"])
    assert config.model.denoiser.kind == "unet1d"


def test_extends_takes_the_rest_from_the_other_file(tmp_path):
    write(tmp_path, "seed: 3\ntrain: {steps: 7, batch_size: 2}")
    child = tmp_path / "child.yaml"
    child.write_text("extends: config.yaml\ntrain: {steps: 9}")
    config = Config.load(child)
    assert (config.seed, config.train.steps, config.train.batch_size) == (3, 9, 2)
    (tmp_path / "second.yaml").write_text("train: {steps: 8, batch_size: 4}\nmodel: {denoiser: {kind: unet1d}}")
    child.write_text("extends: [config.yaml, second.yaml]\ntrain: {steps: 9}")
    config = Config.load(child)
    assert (config.seed, config.train.steps, config.train.batch_size) == (3, 9, 4)
    child.write_text("extends: child.yaml")
    with pytest.raises(InputError, match="extends itself"):
        Config.load(child)


def test_a_broken_override_is_named():
    with pytest.raises(InputError, match="section.field=value"):
        Config.load("configs/digits.yaml", ["train.steps"])
    with pytest.raises(InputError, match=r"no file configs/none\.yaml"):
        Config.load("configs/none.yaml")


def test_the_packages_own_configurations_are_found_from_anywhere(tmp_path, monkeypatch):
    own = Config.load("configs/digits_demo.yaml")
    monkeypatch.chdir(tmp_path)
    assert Config.load("configs/digits_demo.yaml") == own
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "digits_demo.yaml").write_text("run: mine\n")
    assert Config.load("configs/digits_demo.yaml").run == "mine"  # a file that is there comes first


def test_the_papers_configurations_share_its_recipe():
    """Each is configs/paper/base.yaml but for what the paper itself varies."""
    own = {"tokens": {"size"}, "train": {"steps", "batch_size", "tokens", "learning_rate", "warmup_steps", "optimizer"}}
    own |= {"generate": {"sampler", "steps", "eta", "tile_tokens"}}
    files = configurations(Path("configs/paper"))
    assert len(files) > 8
    base = Config.load("configs/paper/base.yaml").plain()
    for path in files:
        found = Config.load(path).plain()
        for section, fields in own.items():
            fields = fields | ({"splits", "save_every"} if "unseen" in path.name else set())
            for field in fields & found[section].keys():
                found[section][field] = base[section][field]
            assert found[section] == base[section], (path, section)
        backbone, denoiser = found["model"]["backbone"], found["model"]["denoiser"]
        assert backbone["d_model"] in (found["tokens"]["size"], 128, 8192, 12288)
        for field in ("d_model", "widths"):
            backbone[field] = base["model"]["backbone"][field]
        denoiser["channels"] = base["model"]["denoiser"]["channels"]
        if "unseen" in path.name:
            found["model"]["condition"] = base["model"]["condition"]
            found["model"]["state"]["of"] = "checkpoint"
        assert found["model"] == base["model"], path
