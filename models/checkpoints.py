"""Checkpoint files: written whole or not at all, read without running code from them.

The formats that load are ours, the original's (policy, finetuned pair, ResNet in the stream that
`torch.save` wrote before 1.6) and torchvision's. `utils` offers everything here under its own name.
"""

import argparse
import contextlib
import os
import pickle
import re
import tempfile
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO

import numpy as np
import torch
from torch import Tensor, nn

from models.distributed import rank, wait_for_all

_CHOOSE_MODEL = "Choose the `model` that the file was trained for"

# Classes in the original's files beside tensors: parsed arguments, and NumPy numbers under the
# names that they had before and after NumPy 2.
_SCALAR = np.float64(0).__reduce__()[0]
_SAFE_GLOBALS = [
    argparse.Namespace,
    np.dtype,
    *{type(np.dtype(code)) for code in "?bhilqBHILQefd"},
    (_SCALAR, "numpy.core.multiarray.scalar"),
    (_SCALAR, "numpy._core.multiarray.scalar"),
]


class CheckpointError(ValueError):
    """A file that is not a checkpoint, or not one of this network. Says which file, why, what next."""


def save_checkpoint(path: str | os.PathLike, state: dict) -> Path:
    """Write `state` (tensors, numbers, strings, lists and dicts of them) to `path`; return the path.

    The file appears under its name only when it is complete: a killed run or a full disk leaves
    what stood there before. Where several processes train together, the first one writes.
    RuntimeError where it can't be written.
    """
    path = Path(path)
    if rank() == 0:
        _write(path, state)
    wait_for_all()
    return path


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[IO[bytes]]:
    """Yield a file to write to, which appears as `path` only when it is complete. OSError."""
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".", suffix=".tmp", delete=False) as file:
            temporary = file.name
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    finally:
        if temporary is not None and os.path.exists(temporary):
            os.remove(temporary)


def _write(path: Path, state: dict) -> None:
    try:
        with written_whole(path) as file:
            torch.save(state, file)
    except (OSError, RuntimeError) as error:  # torch reports a failed write as RuntimeError
        while not isinstance(error, OSError) and error.__context__ is not None:
            error = error.__context__  # torch hides the operating system's word
        raise RuntimeError(
            f"could not write {path} ({error}): free some space or choose another folder; "
            "whatever stood there before is unharmed"
        ) from error


def read_checkpoint(path: str | os.PathLike) -> dict:
    """Return what a checkpoint file holds, tensors on the CPU.

    No code from the file is run: only tensors, plain values, argparse namespaces and NumPy numbers
    are built. FileNotFoundError without the file, CheckpointError for anything else in it.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"there is no checkpoint {path}: check the path, or train it with the notebooks"
        )
    _check_archive(path)
    try:
        with torch.serialization.safe_globals(_SAFE_GLOBALS), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Detected pickle protocol")
            content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise CheckpointError(
            f"{path} can't be read ({error}): it may be truncated. "
            "Get the file again, or train it with the notebooks"
        ) from error
    except pickle.UnpicklingError as error:
        foreign = re.search(r"(?:[Uu]nsupported (?:global: )?GLOBAL|Unsupported class) (\S+)", str(error))
        reason = (
            f"it asks for {foreign[1]}, which no checkpoint needs and which could run code"
            if foreign
            else "its contents are damaged or not a PyTorch file"
        )
        raise CheckpointError(
            f"{path} was not loaded: {reason}. Get the file again, or train it with the notebooks"
        ) from error
    except Exception as error:  # a damaged file fails in torch.load in many ways
        raise CheckpointError(
            f"{path} was not loaded: it is truncated, damaged or not a PyTorch file. "
            "Get the file again, or train it with the notebooks"
        ) from error
    if not isinstance(content, Mapping):
        raise CheckpointError(
            f"{path} holds a {type(content).__name__}, not a checkpoint: expected a dict of weights. "
            "Name another file"
        )
    return dict(content)


def _check_archive(path: Path) -> None:
    """Raise CheckpointError for a zip archive that grows in unpacking or whose checksums are wrong.

    torch.save compresses nothing, and torch.load does not look at the checksums.
    """
    try:
        archive = zipfile.ZipFile(path)
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        return  # an older format, or damaged, which torch.load will tell
    with archive:
        unpacked = sum(member.file_size for member in archive.infolist())
        if unpacked > path.stat().st_size:
            raise CheckpointError(
                f"{path} was not loaded: it would unpack to {unpacked:,} bytes, as no checkpoint does. "
                "Get the file again, or train it with the notebooks"
            )
        try:
            damaged = archive.testzip()
        except Exception:  # zipfile fails in many ways, too
            damaged = "an entry"
    if damaged:
        raise CheckpointError(
            f"{path} was not loaded: {damaged} in it is damaged. "
            "Get the file again, or train it with the notebooks"
        )


def load_checkpoint(
    path: str | os.PathLike, rnet: nn.Module | None = None, agent: nn.Module | None = None
) -> dict:
    """Load a checkpoint file into `rnet` and/or `agent`; return what else it holds, as plain values.

    Knows our files, the original's (`agent`, `net` and `resnet` entries, `state_dict` of a plain
    ResNet), torchvision's ResNets and bare state dicts. A network that is given must be in the
    file, and where the file tells the model name, it must be the network's. On any error the
    networks keep the weights they had. FileNotFoundError, CheckpointError.
    """
    content = read_checkpoint(path)
    states, rest = _split(content, path)
    if not isinstance(rest.get("settings", {}), Mapping):
        del rest["settings"]  # a foreign file's, in another form
    trained_as = rest.get("settings", {}).get("model")
    pairs = []
    for network, name in ((rnet, "resnet"), (agent, "agent")):
        if network is None:
            continue
        if name not in states:
            has = " and ".join({"resnet": "a ResNet", "agent": "a policy"}[n] for n in states)
            wanted = "a ResNet" if name == "resnet" else "a policy"
            raise CheckpointError(
                f"{path} holds {has or 'no weights'}, and {wanted} is needed: name another file"
            )
        expected = getattr(network, "model", None)
        if trained_as and expected and trained_as != expected:
            raise CheckpointError(f"{path} was trained as {trained_as}, not as {expected}. {_CHOOSE_MODEL}")
        pairs.append((network, _fitted(network, states[name], f"the {name} in {path}")))
    for network, state in pairs:
        network.load_state_dict(state)
    return {key: _plain(value) for key, value in rest.items()}


def load_policy_file(path: str | os.PathLike, rnet: nn.Module, agent: nn.Module) -> tuple[dict, bool]:
    """Load a policy into `agent`, and into `rnet` the ResNet that it was trained on, where the file holds it.

    Returns what else the file holds, and whether it holds a ResNet. Errors as in `load_checkpoint`.
    """
    has_resnet = "resnet" in read_checkpoint(path)
    return load_checkpoint(path, rnet if has_resnet else None, agent), has_resnet


def load_features(path: str | os.PathLike, agent: nn.Module) -> None:
    """Load a sole ResNet's checkpoint file into the layers of a policy network.

    The file is one of ResNet-8 (ResNet-18 for ImageNet), or of a deeper one of the same kind: the first
    blocks of each segment are taken. FileNotFoundError, CheckpointError; then the policy network stays as
    it was.
    """
    states, _ = _split(read_checkpoint(path), path)
    if "resnet" not in states:
        raise CheckpointError(f"{path} holds no ResNet: name a sole ResNet's file, such as one of R8_C10's")
    advice = "Name a file of ResNet-8, or of ResNet-18 for ImageNet"
    _load_flat(states["resnet"], agent.features, f"the ResNet in {path}", advice)


def load_weights_to_flatresnet(source: nn.Module | Mapping, target: nn.Module) -> nn.Module:
    """Copy the weights of a plain ResNet into the FlatResNet `target` and return it.

    `source`: a torchvision ResNet (or another with its names), its state dict, or a checkpoint dict
    with `state_dict`; a leading `module.` (nn.DataParallel) is dropped. A target without classifier,
    as in a policy network, may be a part of the source: the first blocks of each segment.
    CheckpointError where the weights don't fit.
    """
    if isinstance(source, nn.Module):
        source = source.state_dict()
    _load_flat(_flat_names(source.get("state_dict", source)), target, "the source ResNet")
    return target


def _load_flat(
    state: Mapping[str, Tensor], target: nn.Module, what: str, advice: str = _CHOOSE_MODEL
) -> None:
    """Load a FlatResNet's weights, or, where `target` has no classifier, those that it has a place for."""
    if isinstance(target.fc, nn.Identity):
        wanted = target.state_dict()
        state = {key: value for key, value in state.items() if key in wanted}
    target.load_state_dict(_fitted(target, state, what, advice))


def newest_checkpoint(folder: str | os.PathLike, prefix: str, hint: str | None = None) -> Path | None:
    """Return the file `<prefix>*.t7` written last in `folder`.

    Where there is none: FileNotFoundError, whose message ends with `hint`, what to do about it; without
    a hint, None.
    """
    files = sorted(Path(folder).glob(f"{prefix}*.t7"), key=lambda p: (p.stat().st_mtime, p.name))
    if not files and hint is not None:
        raise FileNotFoundError(f"there is no {prefix}*.t7 in {folder}: {hint}")
    return files[-1] if files else None


def _split(content: dict, path: str | os.PathLike) -> tuple[dict[str, dict], dict]:
    """Return the state dicts in a checkpoint, by the names `resnet` and `agent`, and the rest."""
    rest = dict(content)
    states = {}
    for key, name in (("resnet", "resnet"), ("agent", "agent"), ("net", "agent")):
        if key in rest:
            states[name] = rest.pop(key)
    if "state_dict" in rest:
        states["resnet"] = rest.pop("state_dict")
    if not states and any(isinstance(value, Tensor) for value in content.values()):
        name = "agent" if "logit.weight" in content else "resnet"
        states, rest = {name: content}, {}
    for name, state in states.items():
        if not isinstance(state, Mapping) or not all(isinstance(key, str) for key in state):
            raise CheckpointError(
                f"the {name} in {path} is not a state dict: the file is damaged. Get it again"
            )
    if "resnet" in states:
        states["resnet"] = _flat_names(states["resnet"])
    if "agent" in states:  # very old policies still carry the classifier that they never used
        states["agent"] = {
            key: value for key, value in states["agent"].items() if not key.startswith("features.fc.")
        }
    return states, rest


def _flat_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Translate the parameter names of a plain ResNet to FlatResNet's; ours stay as they are."""
    patterns = (
        (r"^module\.", ""),
        (r"^layer(\d+)\.\d+\.downsample\.", lambda m: f"ds.{int(m[1]) - 1}."),
        (r"^layer(\d+)\.", lambda m: f"blocks.{int(m[1]) - 1}."),
    )
    flat = {}
    for key, value in state.items():
        for pattern, name in patterns:
            key = re.sub(pattern, name, key)
        flat[key] = value
    return flat


def _fitted(network: nn.Module, state: Mapping, what: str, advice: str = _CHOOSE_MODEL) -> dict[str, Tensor]:
    """Return `state` complete and checked for `network`, or raise CheckpointError saying why not."""
    expected = network.state_dict()
    # Files from before PyTorch 0.4.1 don't count batches; nothing here uses the count.
    state = {k: v for k, v in expected.items() if k.endswith("num_batches_tracked")} | dict(state)
    problem = None
    if wrong := next((k for k, v in state.items() if not isinstance(v, Tensor)), None):
        problem = f"{wrong} is not a tensor"
    elif missing := next((k for k in expected if k not in state), None):
        problem = f"{missing} is missing"
    elif extra := next((k for k in state if k not in expected), None):
        problem = f"{extra} has no place in the network"
    elif wrong := next((k for k, v in expected.items() if v.shape != state[k].shape), None):
        problem = f"{wrong} is {tuple(state[wrong].shape)}, not {tuple(expected[wrong].shape)}"
    elif wrong := next((k for k, v in expected.items() if not _alike(v, state[k])), None):
        problem = f"{wrong} holds {state[wrong].dtype}, not {expected[wrong].dtype}"
    elif wrong := next((k for k, v in expected.items() if not state[k].to(v.dtype).isfinite().all()), None):
        problem = f"{wrong} has values that are not finite"
    if problem:
        raise CheckpointError(
            f"{what} does not fit the network: {problem}{_blocks_hint(state, expected)}. {advice}"
        )
    return state


def _alike(a: Tensor, b: Tensor) -> bool:
    """Tell whether two tensors are both plain numbers of the same kind, be it in another precision."""
    return a.is_floating_point() == b.is_floating_point() and a.layout == b.layout and not b.is_complex()


def _blocks_hint(state: Mapping, expected: Mapping) -> str:
    """Name the two depths where they differ, the usual reason why weights don't fit."""

    def blocks(keys: Mapping) -> str:
        found = {m.groups() for k in keys if (m := re.match(r"blocks\.(\d+)\.(\d+)\.", k))}
        segments = sorted({segment for segment, _ in found}, key=int)
        return "+".join(str(sum(s == segment for s, _ in found)) for segment in segments)

    if blocks(state) == blocks(expected):
        return ""
    return f" (blocks in the file: {blocks(state) or 'none'}, in the network: {blocks(expected)})"


def _plain(value: object) -> object:
    """Turn one-element tensors and NumPy numbers into Python numbers."""
    if isinstance(value, np.generic) or (isinstance(value, Tensor) and value.numel() == 1):
        return value.item()
    return value
