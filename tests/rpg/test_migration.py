import pytest

from rpg.config import Config
from rpg.section import migrate
from rpg.tasks import build_task
from tokenization.errors import InputError


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({"generator": "pdiff", "model": {"position": "2d"}, "pdiff": {"latent_size": 8}}, {"latent_size": 8}),
        ({"generator": "pdiff"}, {}),
        ({"generator": "rpg", "model": {"position": "1d"}, "pdiff": {"latent_size": 8}}, {"position": "1d"}),
        ({"generator": "rpg"}, {}),
    ],
)
def test_the_generator_of_earlier_versions_is_a_kind_of_model(before, after):
    kind = {"rpg": "recurrent", "pdiff": "pdiff"}[before["generator"]]
    assert migrate(before) == {"model": {"kind": kind, **after}}
    assert Config.parse(before, "test") == Config.parse({"model": {"kind": kind, **after}}, "test")


def test_losses_of_earlier_versions_have_new_names():
    before = {"steps": 5, "fresh": {"networks": 3}, "behaviour": {"share": 0.25}}
    after = {"steps": 5, "new_states": {"networks": 3}, "behaviour": {"fraction": 0.25}}
    assert migrate({"train": before}) == migrate({"train": after}) == {"train": after}
    config = Config.parse({"train": before}, "test")
    assert config.train.new_states.networks == 3 and config.train.behaviour.fraction == 0.25
    assert Config.defaults(["train.behaviour.share=0.75"]).train.behaviour.fraction == 0.75
    with pytest.raises(InputError, match=r"train\.fresh is an unknown key"):
        Config.parse({"train": {"fresh": {}, "new_states": {}}}, "test")


def test_fields_that_became_constants_are_read_where_they_say_the_same():
    section = {"kind": "sane", "contrast_temperature": 0.1}
    assert Config.parse({"model": section}, "test").model == Config.parse({"model": {"kind": "sane"}}, "test").model
    with pytest.raises(InputError, match=r"model\.contrast_temperature is an unknown key"):
        Config.parse({"model": {**section, "contrast_temperature": 0.2}}, "test")


def test_a_model_without_a_kind_is_recurrent():
    config = Config.parse({"model": {"position": "1d"}}, "test")
    assert config.model.kind == "recurrent" and config.model == Config.parse(config.plain(), "test").model
    assert Config.defaults(["model.state.of=none"]).model.state.of == "none"


def test_files_and_overrides_of_earlier_versions_mix_with_todays(tmp_path):
    old, new = tmp_path / "old.yaml", tmp_path / "new.yaml"
    old.write_text("generator: pdiff\npdiff: {latent_size: 8}")
    new.write_text("extends: old.yaml\nmodel: {stride: 3}")
    config = Config.load(new, ["pdiff.latent.steps=5", "pdiff.latent.learning_rate=1e-3"])
    assert (config.model.kind, config.model.latent_size, config.model.stride) == ("pdiff", 8, 3)
    assert config.model.latent.steps == 5
    old.write_text("model: {kind: pdiff, latent_size: 8}")
    new.write_text("extends: old.yaml\npdiff: {stride: 3}")
    assert (Config.load(new).model.latent_size, Config.load(new).model.stride) == (8, 3)
    assert Config.load(new, ["generator=rpg"]) == Config.defaults()
    with pytest.raises(InputError, match=r"model.*'gan'.*recurrent"):
        Config.load(new, ["generator=gan"])


def test_names_of_earlier_versions_are_read() -> None:
    tree = {
        "run": "r", "zoo": "z", "model": {"start": {"first": 0.25}, "state": {"of": "none", "start": "constant"}},
        "task": {"name": "tickets", "family": {"name": "digits_subsets", "held_out": {"kind": "random", "num": 7}}},
    }  # fmt: skip
    config = Config.parse(tree, "test")
    assert config.model.initial.first == 0.25 and config.model.state.initial == "constant"  # type: ignore[union-attr]
    assert config.task.family.unseen.num == 7  # type: ignore[union-attr]
    runs = build_task({"name": "trajectories", "runs": 24, "validation": 3, "unseen": 4})
    assert type(runs).__name__ == "TrainingRunsTask"
