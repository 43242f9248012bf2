"""What the notebooks' settings may be, so that a wrong one is told before anything runs."""

import math
import os
from collections.abc import Mapping


def check(
    name: str,
    value: object,
    low: float,
    high: float = math.inf,
    most: float = math.inf,
    whole: bool = False,
) -> None:
    """Check that a setting is a finite number: `low` or more, below `high`, `most` or less. ValueError."""
    number = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
    if not (number and math.isfinite(value) and low <= value < high and value <= most):
        kind = "a whole number" if whole else "a number"
        limits = [f"{low} or more"] * (low > -math.inf) + [f"below {high}"] * (high < math.inf)
        limits += [f"{most} or less"] * (most < math.inf)
        expected = kind + ", " * bool(limits) + " and ".join(limits)
        raise ValueError(f"{name} is {value!r}, expected {expected}")


# The lowest value; where there are such, the limit that values stay below and the highest value.
_NUMBERS = {
    "alpha": (0.51, 1),  # at 0.5 a sampled policy would not depend on the policy network
    "alpha_finetuning": (0.51, 1),
    "averaging": (0, 1),
    "beta": (0,),
    "beta_finetuning": (0,),
    "holdout": (0, 1),
    "lr": (0,),
    "lr_finetuning": (0,),
    "lr_rnet": (0,),
    "momentum": (0, 1),
    "penalty": (-math.inf, 0),
    "penalty_finetuning": (-math.inf, 0),
    "seconds": (0,),
    "small_crops": (0, 1),
    "survival_probability": (0.01, 1),
    "temperature": (0.02, math.inf, 1),  # powers underflow below, have infinite slopes above
    "temperature_finetuning": (0.02, math.inf, 1),
    "warmup": (0, 1),
    "warmup_policy": (0, 1),
    "warmup_rnet": (0, 1),
    "weight_decay": (0,),
}
_WHOLE_NUMBERS = {
    "batch_size": 1,
    "batch_size_test": 1,
    "cl_pace": 1,
    "epochs": 1,
    "max_epochs_finetuning": 0,
    "max_epochs_stochastic_depth": 0,
    "max_epochs_training": 0,
    "max_images": 2,
    "seed": -math.inf,
    "static_images": 1,
    "warmup_images": 0,
    "workers": 0,
}
_SWITCHES = ("compiled", "deterministic", "resume", "skip_dropped")
_TEXTS = ("cv_dir", "data_dir")
_LOADED = ("load", "load_features", "load_finetuning", "load_policy", "load_rnet")
_OPTIONAL_TEXTS = (*_LOADED, "date", "results_dir")


def check_settings(settings: Mapping[str, object]) -> None:
    """Check those of a notebook's settings that can be judged alone. ValueError naming the first bad one.

    `settings` may be its `globals()`: other names are passed over. Model, precision, device, and what
    depends on the data are checked where they are used.
    """
    for name, value in settings.items():
        if name in _NUMBERS:
            check(name, value, *_NUMBERS[name])
        elif name in _WHOLE_NUMBERS and not (name == "max_images" and value is None):
            check(name, value, _WHOLE_NUMBERS[name], whole=True)
        elif name in _SWITCHES and not isinstance(value, bool):
            raise ValueError(f"{name} is {value!r}, expected True or False")
        elif name in _TEXTS and not isinstance(value, (str, os.PathLike)):
            raise ValueError(f"{name} is {value!r}, expected a text in quotes")
        elif name in _OPTIONAL_TEXTS and not isinstance(value, (str, os.PathLike, type(None))):
            raise ValueError(f"{name} is {value!r}, expected a text in quotes, or None")
