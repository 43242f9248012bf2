"""Checkpoint files: read without running code from them, in every format that loads.

The formats: ours, the original's (policy, finetuned pair, ResNet in the stream that `torch.save` wrote
before 1.6), torchvision's, and state dicts of our networks that other tools have wrapped.
"""

import argparse
import hashlib
import io
import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from models.lab.distributed import rank, wait_for_all
from models.lab.files import written_whole

_GET_AGAIN = "Get the file again, or move it away"
_CHOOSE_MODEL = "Choose the `model` that the file was trained for, or another file"

# Classes in files of the original beside tensors: parsed arguments, and NumPy's numbers, under the names
# that they had before and after NumPy 2.
_SAFE_GLOBALS = [
    argparse.Namespace,
    np.dtype,
    *{type(np.dtype(code)) for code in "?bhilqBHILQefd"},
    *((np.float64(0).__reduce__()[0], f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
]


class CheckpointError(ValueError):
    """A file that is not a checkpoint, or not one of this network. Says which file, why, what next."""


def save_checkpoint(path: str | Path, state: dict) -> Path:
    """Write `state` (tensors, numbers, strings, lists and dicts of them) to `path`; return the path.

    A killed run or a full disk leaves what stood there before. Where several processes train together,
    the first one writes. RuntimeError where it can't be written.
    """
    path = Path(path)
    if rank() == 0:
        content = io.BytesIO()
        torch.save(state, content)
        with written_whole(path) as file:
            file.write(content.getbuffer())
    wait_for_all()
    return path


def read_checkpoint(path: str | Path) -> dict:
    """Return what a checkpoint file holds, tensors on the CPU.

    No code from the file is run. FileNotFoundError without it, CheckpointError for anything else in it.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint {path}: check the path, or train it first")
    try:
        _check_archive(path)
        with torch.serialization.safe_globals(_SAFE_GLOBALS), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Detected pickle protocol")
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file fails in torch.load in many ways
        raise CheckpointError(f"{path} was not loaded: {_refused(error)}") from error
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not a dict: name another file")
    return dict(content)


def _refused(error: Exception) -> str:
    """Say why torch.load refused a file: what it asks for, or that it is damaged."""
    if isinstance(error, PermissionError):
        return f"it can't be read ({error}): ask its owner, or name another file"
    foreign = re.search(r"(?:[Uu]nsupported (?:global: )?GLOBAL|Unsupported class) (\S+)", str(error))
    if isinstance(error, pickle.UnpicklingError) and foreign:
        return f"it asks for {foreign[1]}, which could run code. Save a network's state_dict() alone"
    why = f" ({error})" if isinstance(error, (OSError, zipfile.BadZipFile)) else ""
    return f"it is truncated, damaged or not a PyTorch file{why}. {_GET_AGAIN}"


def _check_archive(path: Path) -> None:
    """Raise BadZipFile for a zip archive that grows in unpacking or whose checksums are wrong.

    torch.save compresses nothing, and torch.load does not look at the checksums.
    """
    try:
        archive = zipfile.ZipFile(path)
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        return  # an older format, or damaged, which torch.load reports
    with archive:
        unpacked = sum(member.file_size for member in archive.infolist())
        if unpacked > path.stat().st_size:
            raise zipfile.BadZipFile(f"it would unpack to {unpacked:,} bytes, as no checkpoint does")
        if damaged := archive.testzip():
            raise zipfile.BadZipFile(f"{damaged} in it is damaged")


def load_checkpoint(path: str | Path, rnet: nn.Module | None = None, agent: nn.Module | None = None) -> dict:
    """Load a checkpoint file into `rnet` and/or `agent`; return what else it holds, as plain values.

    Knows our files, the original's, torchvision's and bare state dicts. A network that is given must be in
    the file, and where the file names the model, it must be the network's. On any error the networks keep
    the weights they had. FileNotFoundError, CheckpointError.
    """
    _, rest = load_states(path, rnet, agent)
    for key, value in rest.items():  # tensors of one element and NumPy's numbers become Python's
        if isinstance(value, np.generic) or (isinstance(value, Tensor) and value.numel() == 1):
            rest[key] = value.item()
    return rest


def load_states(path: str | Path, rnet: nn.Module | None, agent: nn.Module | None) -> tuple[dict, dict]:
    """Load a checkpoint into both networks, or into neither; return its state dicts, and the rest."""
    states, rest = split(read_checkpoint(path), path)
    pairs = []
    for network, name in ((rnet, "resnet"), (agent, "agent")):
        if network is None:
            continue
        if name not in states:
            has = " and ".join(states) or "no weights"
            raise CheckpointError(f"{path} holds {has}, but no {name}, which is needed: name another file")
        trained_as, expected = _model_of(rest), getattr(network, "model", None)
        if trained_as and expected and trained_as != expected:
            raise CheckpointError(f"{path} was trained as {trained_as}, not as {expected}. {_CHOOSE_MODEL}")
        pairs.append((network, _fitted(network, states[name], f"the {name} in {path}")))
    for network, state in pairs:
        network.load_state_dict(state)
    return states, rest


def _model_of(content: Mapping) -> str | None:
    """Return the model name that a checkpoint was trained as; None where it does not say."""
    try:
        return content.get("lineage", [content])[-1]["settings"]["model"]  # older files: no lineage
    except (KeyError, IndexError, TypeError):
        return None


def load_weights_to_flatresnet(
    source: nn.Module | Mapping, target: nn.Module, where: str = "the source"
) -> nn.Module:
    """Copy the weights of a plain ResNet into the FlatResNet `target` and return it.

    `source`: a torchvision ResNet (or another with its names), its state dict, or a checkpoint dict; `where`
    names it in errors. A target without classifier, as in a policy network, may be a part of the source: the
    first blocks of each segment. CheckpointError where the weights don't fit.
    """
    states, _ = split(source.state_dict() if isinstance(source, nn.Module) else source, where)
    if "resnet" not in states:
        raise CheckpointError(f"{where} holds no ResNet: give a ResNet's file or state dict")
    state = states["resnet"]
    if isinstance(target.fc, nn.Identity):
        wanted = target.state_dict()
        state = {key: value for key, value in state.items() if key in wanted}
    target.load_state_dict(_fitted(target, state, f"the ResNet in {where}"))
    return target


def newest_checkpoint(folder: str | Path, prefix: str) -> Path | None:
    """Return the file `<prefix>*.t7` in `folder` that was trained last; None where there is none.

    The files themselves say when they were saved; those that don't are older, and ordered by their epochs.
    """

    def age(path: Path) -> list[float]:
        content = read_checkpoint(path)
        return [float(content.get(name, 0)) for name in ("saved", "epoch")]

    paths = sorted(Path(folder).glob(f"{prefix}*.t7"))
    return paths[0] if len(paths) == 1 else max(paths, key=age, default=None)


def fingerprint(*networks: nn.Module) -> str:
    """Return 12 hexadecimal digits that tell networks with other weights apart."""
    digest = hashlib.sha256()
    for network in networks:
        for key, value in network.state_dict().items():
            digest.update(key.encode() + value.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:12]


def split(content: Mapping, path: str | Path) -> tuple[dict[str, dict], dict]:
    """Return the state dicts in a checkpoint, by the names `resnet` and `agent`, and the rest.

    CheckpointError for weights that are no state dict; `path` is named there.
    """
    rest, states = dict(content), {}
    ours = ("resnet", "agent")
    for key in (*ours, "net", "state_dict", "model", "model_state_dict"):
        if key in rest and (key in ours or isinstance(rest[key], Mapping)):
            state = rest.pop(key)
            states[key if key in ours else _kind(state)] = state
    if not states and any(isinstance(value, Tensor) for value in rest.values()):
        states, rest = {_kind(rest): rest}, {}
    for name, state in states.items():
        if not isinstance(state, Mapping) or not all(isinstance(key, str) for key in state):
            raise CheckpointError(f"the {name} in {path} is not a state dict: it is damaged. {_GET_AGAIN}")
        states[name] = _our_names(state)
    return states, rest


def _kind(state: Mapping) -> str:
    """Tell a policy network's state dict from a ResNet's by its last layer."""
    return "agent" if any(str(key).endswith("logit.weight") for key in state) else "resnet"


def _our_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Translate the parameter names of plain and wrapped networks to ours; ours stay as they are.

    Left out are the count of averaged models (SWA), and the classifier that very old policies carry unused.
    """
    ours = {}
    for key, value in state.items():
        key = re.sub(r"^((module|_orig_mod|model)\.)+", "", key)
        key = re.sub(r"^layer(\d+)\.\d+\.downsample\.", lambda m: f"ds.{int(m[1]) - 1}.", key)
        key = re.sub(r"^layer(\d+)\.", lambda m: f"blocks.{int(m[1]) - 1}.", key)
        if key != "n_averaged" and not key.startswith("features.fc."):
            ours[key] = value
    return ours


def _fitted(network: nn.Module, state: Mapping, what: str) -> dict[str, Tensor]:
    """Return `state` complete and checked for `network`, or raise CheckpointError saying why not."""
    expected = network.state_dict()
    # Files from before PyTorch 0.4.1 don't count batches; nothing here uses the count.
    state = {k: v for k, v in expected.items() if k.endswith("num_batches_tracked")} | dict(state)
    if problem := _problem(state, expected):
        raise CheckpointError(f"{what} does not fit the network: {problem}. {_CHOOSE_MODEL}")
    for key, wanted in expected.items():
        if not state[key].to(wanted.dtype).isfinite().all():
            raise CheckpointError(f"{key} of {what} has values that are not finite: train it anew")
    return state


def _problem(state: Mapping, expected: Mapping[str, Tensor]) -> str | None:
    """Return why a state dict can't be loaded where another is expected; None where it can."""
    missing = [f"{key} is missing" for key in expected if key not in state]
    extra = [f"{key} has no place in it" for key in state if key not in expected]
    if missing or extra:
        return ", ".join(missing[:1] + extra[:1])
    for key, wanted in expected.items():
        value = state[key]
        if not isinstance(value, Tensor):
            return f"{key} is not a tensor"
        if value.shape != wanted.shape:
            return f"{key} is {tuple(value.shape)}, not {tuple(wanted.shape)}"
        plain = value.layout == wanted.layout and not value.is_complex()
        if not plain or value.is_floating_point() != wanted.is_floating_point():
            return f"{key} holds {value.dtype}, not {wanted.dtype}"
    return None
