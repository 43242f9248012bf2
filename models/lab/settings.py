"""The notebooks' settings: one table of what each may be, read and checked before anything runs."""

import ast
import difflib
import math
import types
from collections.abc import Iterable, MutableMapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import yaml

from models.lab.files import ROOT
from models.lab.names import parse_model

RECIPES = ROOT / "results" / "recipes"
ALIKE = 0.81  # of difflib: from here on a name is another one misspelled, not an old one such as load_policy


class Rule(NamedTuple):
    """What a setting may be."""

    notebooks: str  # s: rnet_sole, t: blockdrop_training, i: blockdrop_inference
    kind: str  # one of KINDS
    low: float = -math.inf  # inclusive, as `high` is
    high: float = math.inf
    below: bool = False  # `high` itself is out
    none: bool = False
    auto: bool = False
    several: float = 1  # 2: one value per stage; math.inf: a list


KINDS = {
    "number": "a number",
    "whole": "a whole number",
    "switch": "True or False",
    "source": "a file's path or a test image's number",
    "path": "a path in quotes",
    "text": "a text in quotes",
}
RULES = {
    "model": Rule("sti", "text"),
    "recipe": Rule("st", "switch"),
    "epochs": Rule("s", "whole", 1),
    "max_epochs_stochastic_depth": Rule("t", "whole", 0),
    "max_epochs_training": Rule("t", "whole", 0),
    "max_epochs_finetuning": Rule("t", "whole", 0),
    "small_crops": Rule("st", "number", 0, 1, below=True),
    "batch_size": Rule("st", "whole", 1),
    "lr_rnet": Rule("st", "number", 0),
    "lr_policy": Rule("t", "number", 0, several=2),
    "averaging": Rule("st", "number", 0, 0.85),  # in the first steps the learning rate rises
    "penalty": Rule("t", "number", high=0, below=True, several=2),
    "start_from": Rule("ti", "path", none=True),
    "survival_probability": Rule("t", "number", 0.01, 1, below=True),
    # At 0.5 a sampled policy would not depend on the policy network.
    "alpha": Rule("t", "number", 0.51, 1, below=True, several=2),
    # Below, powers underflow; above 1, they have infinite slopes.
    "temperature": Rule("t", "number", 0.02, 1, several=2),
    "beta": Rule("t", "number", 0),
    "curriculum": Rule("t", "whole", 0),
    "skip_dropped": Rule("t", "switch", auto=True),
    "seed": Rule("st", "whole"),
    "deterministic": Rule("st", "switch"),
    "precision": Rule("sti", "text"),
    "device": Rule("sti", "text"),
    "max_images": Rule("sti", "whole", 2, none=True),
    "resume": Rule("st", "switch"),
    "batch_sizes": Rule("i", "whole", 1, several=math.inf),
    "seconds": Rule("i", "number", 0),
    "image": Rule("i", "source", 0),
    "data_dir": Rule("sti", "path"),
    "cv_dir": Rule("sti", "path"),
    "results_dir": Rule("i", "path", none=True),
}


def names_of(notebook: str) -> list[str]:
    """Return the names of a notebook's settings."""
    letter = {"rnet_sole": "s", "blockdrop_training": "t", "blockdrop_inference": "i"}[notebook]
    return [name for name, rule in RULES.items() if letter in rule.notebooks]


def read_settings(notebook: str, namespace: MutableMapping) -> None:
    """Check a notebook's settings in its `globals()`, and write them back as they are meant.

    Texts that stand for numbers or lists are read as such, `~` in a path as the home folder, one number for
    two stages as both. With `recipe`, the model's recipe replaces them; without, those that differ from it
    are printed. Model, precision and device are checked further where they are used. ValueError for
    the first wrong setting, and for names that are no settings of the notebook.
    """
    names = names_of(notebook)
    # On the first call nothing but settings and imports has been defined: a further name was misspelled.
    if not namespace.get("_settings_read"):
        defined = [n for n, v in namespace.items() if not (callable(v) or isinstance(v, types.ModuleType))]
        refuse_unknown((n for n in defined if not n.startswith("_") and n not in ("In", "Out")), names)
    if missing := [name for name in names if name not in namespace]:
        raise ValueError(f"the setting {missing[0]} is missing: put its line back")
    model = namespace["model"]
    parse_model(model)
    recipe = read_recipe(notebook, model) if "recipe" in names else {}
    if "recipe" in names:
        takes_recipe = as_meant("recipe", namespace["recipe"])
        if takes_recipe and not recipe:
            raise ValueError(f"{model} has no recipe in results/recipes/: set recipe = False")
        if not recipe:
            print(f"{model} has no recipe in results/recipes/: these settings were not tuned for it")
        if takes_recipe:
            namespace.update(recipe)
    for name in names:
        namespace[name] = as_meant(name, namespace[name])
    others = [name for name in recipe if namespace[name] != recipe[name]]
    if others:
        print(f"These settings differ from the recipe of {model}, which recipe = True takes:")
        for name in others:
            print(f"    {name} = {namespace[name]!r}, there {recipe[name]!r}")
    namespace["_settings_read"] = True


def refuse_unknown(given: Iterable[str], names: Sequence[str]) -> None:
    """Raise ValueError for the first given name that is not among `names`, with one that is like it."""
    for name in given:
        if name not in names:
            near = [known for known in names if name.startswith(known)]
            near += difflib.get_close_matches(name, names, n=1, cutoff=ALIKE)
            hint = f"do you mean {near[0]}?" if near else "README.md lists old settings and new ones"
            raise ValueError(f"there is no setting {name!r}: {hint}")


def read_recipe(notebook: str, model: str) -> dict[str, object]:
    """Return the settings in `results/recipes/<model>/<notebook>.yaml`; none without that file."""
    path = RECIPES / model / f"{notebook}.yaml"
    if not path.is_file():
        return {}
    try:
        recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError):
        recipe = None
    if not isinstance(recipe, dict) or recipe.get("model", model) != model:
        raise ValueError(f"{path} is not a recipe of {model}: expected lines like model: {model}")
    refuse_unknown(recipe, names_of(notebook))
    return {name: as_meant(name, value) for name, value in recipe.items()}


def as_meant(name: str, value: object) -> object:
    """Return a setting as it is meant, checked by its rule. ValueError."""
    rule = RULES[name]
    if rule.none and value in (None, "None"):
        return None
    if rule.auto and value == "auto":
        return value
    if rule.several == 1:
        return _one(name, value, rule)
    value = _literal(value)
    values = list(value) if isinstance(value, (list, tuple)) else [value]
    if rule.several == 2 and len(values) == 1:
        values *= 2
    if not values or len(values) > rule.several:
        number = "two: policy training's and finetuning's" if rule.several == 2 else "more"
        raise ValueError(f"{name} is {value!r}, expected one value, or {number}")
    return tuple(_one(name, each, rule) for each in values)


def _one(name: str, value: object, rule: Rule) -> object:
    kind = rule.kind
    if kind == "source":
        kind = "whole" if isinstance(_literal(value), int) else "path"
    if kind in ("number", "whole", "switch"):
        value = _literal(value)
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if kind == "whole" and number and value == int(value):
        value = int(value)
    fits = {
        "number": number,
        "whole": number and isinstance(value, int),
        "switch": isinstance(value, bool),
        "text": isinstance(value, (str, torch.device)),  # a cell that ran before has made the device of it
        "path": isinstance(value, (str, Path)) and str(value) != "",
    }[kind]
    if fits and number:
        fits = rule.low <= value <= rule.high and not (rule.below and value == rule.high)
    if not fits:
        expected = KINDS[rule.kind] + ', or "auto"' * rule.auto + ", or None" * rule.none
        if rule.low > -math.inf:
            expected += f", {rule.low:g} or more"
        if rule.high < math.inf:
            expected += f", below {rule.high:g}" if rule.below else f", {rule.high:g} or less"
        raise ValueError(f"{name} is {value!r}, expected {expected}")
    return str(Path(value).expanduser()) if kind == "path" else value


def _literal(value: object) -> object:
    """Read a text as a number, list, True or False where it is one: command lines and YAML give texts."""
    try:
        return ast.literal_eval(value) if isinstance(value, str) else value
    except (ValueError, SyntaxError):
        return value
