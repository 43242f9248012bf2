"""The notebooks' settings: checked by one table, read as they are meant; recipes."""

import re
from pathlib import Path

import pytest
from running import NOTEBOOKS, code_cells

from models.lab import settings

RECIPES = sorted(settings.RECIPES.glob("*/*.yaml"))


def parameters(name):
    """The cell with a notebook's settings."""
    (cell,) = code_cells(name, "parameters")
    return cell.source


def read(name, **given):
    """A notebook's settings, some of them given, after they have been read."""
    found = {}
    exec(parameters(name), {}, found)
    settings.read_settings(name, found := found | given)
    return found


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_every_setting_is_in_the_table_and_refuses_another_kind(name):
    names = settings.names_of(name)
    assert sorted(re.findall(r"^(\w+) =", parameters(name), re.MULTILINE)) == sorted(names)
    assert all(len(line) <= 85 for line in parameters(name).splitlines())  # JupyterLab shows no more
    read(name)
    for setting in names:
        with pytest.raises(ValueError, match=f"^{setting} is .*, expected |^unknown model"):
            read(name, **{setting: {"a": "dict"}})


@pytest.mark.parametrize(
    ("setting", "values", "expected"),
    [
        ("epochs", (0, 2.5, True, "many"), "a whole number, 1 or more"),
        ("lr_rnet", (-1, float("nan"), float("inf")), "a number, 0 or more"),
        ("averaging", (0.9,), "a number, 0 or more, 0.85 or less"),
        ("alpha", (1, (0.8, 0.5)), "a number, 0.51 or more, below 1"),
        ("penalty", (0, (-1, "none")), "a number, below 0"),
        ("penalty", ((-1, -1, -1), []), "one value, or two: policy training's and finetuning's"),
        ("resume", ("yes", 1, "auto"), "True or False$"),
        ("skip_dropped", ("yes", 1), 'True or False, or "auto"'),
        ("data_dir", ("", None), "a path in quotes$"),
        ("results_dir", ("", 0), "a path in quotes, or None$"),
        ("batch_sizes", ([8, 0], "[1, 'a']"), "a whole number, 1 or more"),
        ("image", (None, -1), "a file's path or a test image's number, 0 or more"),
    ],
)
def test_what_a_setting_may_be_is_said(setting, values, expected):
    for value in values:
        with pytest.raises(ValueError, match=f"^{setting} is .*, expected {expected}"):
            settings.as_meant(setting, value)


@pytest.mark.parametrize(
    ("setting", "given", "meant"),
    [
        ("lr_rnet", "1e-2", 0.01),  # as YAML reads it
        ("epochs", 3.0, 3),
        ("resume", "False", False),
        ("max_images", "None", None),
        ("data_dir", "~/my data#1", str(Path.home() / "my data#1")),
        ("penalty", "-1e1", (-10.0, -10.0)),
        ("lr_policy", "[1e-3, 1e-6]", (1e-3, 1e-6)),
        ("batch_sizes", "[1,8]", (1, 8)),
        ("image", "7", 7),
        ("image", "7.png", "7.png"),
    ],
)
def test_settings_are_read_as_they_are_meant(setting, given, meant):
    assert repr(settings.as_meant(setting, given)) == repr(meant)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_a_recipe_loads_and_taking_it_replaces_the_settings(path, capsys):
    recipe = settings.read_recipe(path.stem, path.parent.name)
    taken = read(path.stem, model=path.parent.name, recipe="True")  # as a command line gives it
    assert {name: taken[name] for name in recipe} == recipe and taken["model"] == recipe["model"]
    assert capsys.readouterr().out == "" and path.read_text(encoding="utf-8").startswith("# ")


@pytest.mark.parametrize("name", ["rnet_sole", "blockdrop_training"])
def test_the_notebooks_own_settings_are_the_recipe_of_resnet32(name):
    assert settings.read_recipe(name, "R32_C10").items() <= read(name).items()


def test_changing_the_model_alone_says_which_settings_differ_from_its_recipe(capsys):
    read("rnet_sole", model="R20_SYN")
    said = capsys.readouterr().out
    assert "the recipe of R20_SYN, which recipe = True takes" in said and "epochs = 80, there 40" in said
    read("rnet_sole", model="R14_SYN")
    assert "R14_SYN has no recipe in results/recipes/" in capsys.readouterr().out
    with pytest.raises(ValueError, match="R14_SYN has no recipe"):
        read("rnet_sole", model="R14_SYN", recipe=True)


@pytest.mark.parametrize("content", ["model: R20_SYN", "epochs 3", "a: [", b"\xff"])
def test_a_recipe_of_another_model_or_a_damaged_one_is_refused(tmp_path, monkeypatch, content):
    monkeypatch.setattr(settings, "RECIPES", tmp_path)
    (tmp_path / "R8_SYN").mkdir()
    path = tmp_path / "R8_SYN" / "rnet_sole.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=r"rnet_sole\.yaml is not a recipe of R8_SYN"):
        read("rnet_sole", model="R8_SYN")


def test_a_setting_whose_line_is_gone_is_named():
    with pytest.raises(ValueError, match="the setting resume is missing: put its line back"):
        settings.read_settings("rnet_sole", {k: v for k, v in read("rnet_sole").items() if k != "resume"})
