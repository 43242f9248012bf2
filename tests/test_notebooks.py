"""Every notebook, executed from a clean kernel with small settings on the built-in data."""

import contextlib
import copy
import json
import re
import shutil
from types import SimpleNamespace

import nbformat
import papermill
import pytest
import torch
from compare_training import Masked
from conftest import NOTEBOOKS, ROOT
from running import run_cells

import utils
from models import inference, report, sweep

SMALL = {"model": "R8_SYN", "max_images": 300, "device": "cpu", "batch_size": 64}
SOLE = SMALL | {"epochs": 2, "warmup": 0.2}
INFERENCE = {
    "model": "R8_SYN",
    "max_images": 300,
    "device": "cpu",
    "seconds": 0.01,
    "batch_sizes": [1, 16, 1024],
    "static_images": 50,
}
BLOCKDROP = SMALL | {
    "max_epochs_stochastic_depth": 0,
    "max_epochs_training": 2,
    "max_epochs_finetuning": 2,
    "cl_pace": 3,
    "warmup_rnet": 0.5,
    "warmup_policy": 0.5,
}
ALL_STAGES = BLOCKDROP | {"max_epochs_stochastic_depth": 2}


def execute(name, folder, settings, cv_dir=None):
    """Run a notebook with its checkpoints in `folder`; return what its cells printed."""
    paths = {"cv_dir": str(cv_dir or folder / "cv"), "data_dir": str(ROOT / "data")}
    if name == "blockdrop_inference":
        paths["results_dir"] = str(folder / "results")
    path = folder / f"{name}.ipynb"
    notebook = papermill.execute_notebook(
        ROOT / f"{name}.ipynb",
        path,
        parameters=settings | paths,
        cwd=ROOT,
        progress_bar=False,
        execution_timeout=600,  # seconds a cell
    )
    return "".join(o.text for c in notebook.cells for o in c.get("outputs", []) if o.output_type == "stream")


@pytest.fixture(scope="module")
def printed(tmp_path_factory):
    """All three, in the reader's order: what they printed, and the folder of checkpoints."""
    folder = tmp_path_factory.mktemp("notebooks")
    texts = {
        "rnet_sole": execute("rnet_sole", folder, SOLE),
        "blockdrop_training": execute("blockdrop_training", folder, BLOCKDROP),
        "blockdrop_inference": execute("blockdrop_inference", folder, INFERENCE),
    }
    return texts, folder


def test_they_print_the_originals_lines(printed):
    texts, _ = printed
    for name, line in (
        ("rnet_sole", "Training in s: "),
        ("rnet_sole", "Accuracy of the model: "),
        ("blockdrop_training", "TS - Accuracy: "),
        ("blockdrop_training", "Policy Training: "),
        ("blockdrop_inference", "Blocks used in avg: "),
        ("blockdrop_inference", "Min blocks: "),
        ("blockdrop_inference", "Testing in ms: "),
        ("blockdrop_inference", "FLOPs would allow "),
        ("blockdrop_inference", "the policy network takes "),
    ):
        assert line in texts[name]


def test_they_write_their_checkpoints(printed):
    _, folder = printed
    patterns = ("trained_rnet/R8_SYN/pk_E_2_A_*", "trained_policy/R8_SYN/ckpt_E_2_A_*_R_*_S_*_#_*",
                "finetuned/R8_SYN/ckpt_E_2_A_*_R_*_S_*_#_*")  # fmt: skip
    found = [list((folder / "cv").glob(f"{pattern}.t7")) for pattern in patterns]
    assert [len(files) for files in found] == [1, 1, 1]
    for (path,) in found:
        assert (path.parent / "tensorboard").is_dir()
        content = utils.read_checkpoint(path)
        assert content["seconds"] > 0 and len(content["history"]) == content["epoch"] == 2
    pair = utils.read_checkpoint(found[2][0])
    assert pair["policy_seconds"] > 0 and {"resnet", "agent"} <= pair.keys()


def test_image_by_image_gives_the_accuracy_of_batches(printed):
    """The inference notebook's pair, one by one there and in one batch here, both in fp32."""
    texts, folder = printed
    (path,) = (folder / "cv" / "finetuned" / "R8_SYN").glob("ckpt_*.t7")
    rnet, agent = utils.build_model("R8_SYN")
    utils.load_checkpoint(path, rnet, agent)
    _, testset = utils.get_dataset("R8_SYN", ROOT / "data", 300)
    ((inputs, labels),) = utils.Loader(testset, 300, torch.device("cpu"))
    logits, _ = inference.prepare(rnet, agent)(inputs)
    accuracy = (logits.argmax(1) == labels).float().mean().item()
    reported = texts["blockdrop_inference"].split("Accuracy of the model: ")[1].split("%")[0]
    assert float(reported) == pytest.approx(100 * accuracy, abs=0.34)  # one image of 300 may be a tie


def test_the_report_is_written(printed):
    _, folder = printed
    found = json.loads((folder / "results" / "R8_SYN_cpu_300images.json").read_text())
    assert found["images"] == 300 and found["blocks"] == 3
    assert found["sole"]["blocks kept"] == 3 and 0 <= found["blockdrop"]["blocks kept"] <= 3
    assert found["baselines"]["every block"]["sole ResNet"] == pytest.approx(
        found["sole"]["accuracy"], abs=0.004
    )
    assert found["baselines"]["learned, per image"]["finetuned ResNet"] == pytest.approx(
        found["blockdrop"]["accuracy"], abs=0.004
    )
    assert "Break-even in blocks" in (folder / "results" / "R8_SYN_cpu_300images.md").read_text()
    pictures = sorted(path.name for path in (folder / "results").glob("*.svg"))
    assert len(pictures) == 11 and pictures[0] == "R8_SYN_cpu_300images_baselines.svg"
    assert "`R8_SYN`" in report.results_tables([found])
    found["rank correlation of difficulty and blocks"] = {"rho": None, "interval": [None, None]}
    assert "the same blocks for all" in report.results_tables([found])


def test_no_widget_is_drawn_in_while_a_cell_runs(printed):
    """Jupyter's client answers each such output on the channel it waits on, and may miss the cell's end."""
    _, folder = printed
    notebook = nbformat.read(folder / "blockdrop_inference.ipynb", as_version=4)
    (widgets,) = notebook.metadata.widgets.values()
    outputs = [w["state"] for w in widgets["state"].values() if w["model_name"] == "OutputModel"]
    assert len(outputs) == 1 and not outputs[0].get("outputs")


def test_running_again_finds_the_work_done(printed):
    texts, folder = printed
    again = execute("blockdrop_training", folder, BLOCKDROP)
    assert again.count("2 epochs done, 0 to go") == 2

    def test_lines(text):
        return [line for line in text.splitlines() if line.startswith("TS")]

    assert test_lines(again) == test_lines(texts["blockdrop_training"])


def test_stages_can_be_skipped_and_started_from_files(printed, at_root, tmp_path, capsys):
    _, folder = printed
    (policy,) = (folder / "cv" / "trained_policy" / "R8_SYN").glob("ckpt_*.t7")
    (pair,) = (folder / "cv" / "finetuned" / "R8_SYN").glob("ckpt_*.t7")

    def text(**settings):
        short = {"max_epochs_training": 1, "max_epochs_finetuning": 1, "cv_dir": str(folder / "cv")}
        run_cells("blockdrop_training", BLOCKDROP | short | settings)
        return capsys.readouterr().out

    skipped = text(max_epochs_training=0)
    assert "Policy training skipped" in skipped and f"loaded policy from {policy}" in skipped
    assert "Settings changed" in text(load_policy=str(policy))
    assert "loaded pair from" in text(max_epochs_training=0, load_finetuning=str(pair))
    shutil.copytree(folder / "cv" / "trained_rnet", tmp_path / "trained_rnet")
    neither = text(max_epochs_training=0, max_epochs_finetuning=0, cv_dir=str(tmp_path))
    assert neither.count("No checkpoint tells the history") == 2


def test_policy_training_can_start_from_a_resnet_that_has_learned_without_blocks(
    printed, at_root, tmp_path, capsys
):
    _, folder = printed
    shutil.copytree(folder / "cv" / "trained_rnet", tmp_path / "trained_rnet")
    (sole,) = (tmp_path / "trained_rnet" / "R8_SYN").glob("pk_*.t7")
    stages = {f"max_epochs_{stage}": 1 for stage in ("stochastic_depth", "training", "finetuning")}
    start = {"load_features": str(sole), "cv_dir": str(tmp_path), "beta_finetuning": 0.1}
    whole = run_cells("blockdrop_training", BLOCKDROP | stages | start)
    printed_lines = capsys.readouterr().out
    assert f"layers start from {sole}" in printed_lines and "loaded pair from" in printed_lines
    files = {
        stage: next((tmp_path / stage / "R8_SYN").glob(pattern))
        for stage, pattern in (
            ("stochastic_depth", "pk_*"),
            ("trained_policy", "ckpt_*"),
            ("finetuned", "ckpt_*"),
        )
    }
    found = {stage: utils.read_checkpoint(path) for stage, path in files.items()}
    networks = {stage: utils.build_model("R8_SYN")[0] for stage in (*found, "sole", "goes on")}
    for stage, path in (files | {"sole": sole}).items():
        utils.load_checkpoint(path, networks[stage])
    policy, pair = found["trained_policy"], found["finetuned"]
    prints = {stage: utils.fingerprint(network) for stage, network in networks.items()}
    assert policy["sole_resnet"] == pair["sole_resnet"] == prints["sole"]
    assert len({prints[stage] for stage in ("sole", "trained_policy", "finetuned")}) == 3
    assert prints["trained_policy"] == prints["stochastic_depth"]  # frozen since
    assert found["trained_policy"]["settings"]["load_features"] == sole.name
    earlier = found["stochastic_depth"]["seconds"] + utils.read_checkpoint(sole)["seconds"]
    assert pair["policy_seconds"] == policy["seconds"] > earlier

    again = {
        "max_epochs_stochastic_depth": 1,
        "max_epochs_training": 1,
        "max_epochs_finetuning": 0,
        "load_policy": str(files["trained_policy"]),
    }
    left = run_cells("blockdrop_training", BLOCKDROP | again | {"cv_dir": str(tmp_path)})
    assert "Stochastic depth skipped: no new policy is trained" in capsys.readouterr().out
    utils.load_checkpoint(left["policy_checkpoint"], networks["goes on"])
    assert utils.fingerprint(networks["goes on"]) == prints["trained_policy"]

    for checkpoint, next_stage in (
        ("depth_checkpoint", "start_policy_training"),
        ("policy_checkpoint", "start_finetuning"),
    ):
        whole[checkpoint] = None  # as a cell leaves it that was interrupted
        with pytest.raises(RuntimeError, match="is not done: run its cell again"):
            whole[next_stage]()


def test_the_readmes_main_job_runs(tmp_path):
    """The shipped pair on the built-in data, on fewer images."""
    few = {"model": "R20_SYN", "max_images": 100, "seconds": 0.01, "static_images": 50}
    printed = execute("blockdrop_inference", tmp_path, few, cv_dir=ROOT / "cv")
    assert "loaded resnet and agent from" in printed and "sole ResNet it was trained from" not in printed
    table = (tmp_path / "results" / "R20_SYN_cpu_100images.md").read_text()
    assert "Distinct policies" in table and "Break-even in images" in table


class Interrupted(KeyboardInterrupt):
    """Stands for the interrupt of a kernel."""


@pytest.mark.parametrize(
    ("name", "settings", "same_kernel"),
    [
        ("rnet_sole", SOLE, True),
        ("rnet_sole", SOLE | {"compiled": True, "small_crops": 0.5, "averaging": 0.5}, False),
        ("blockdrop_training", ALL_STAGES | {"averaging": 0.5}, True),
        ("blockdrop_training", ALL_STAGES, False),
    ],
)
def test_an_interrupted_training_ends_as_an_uninterrupted_one(
    printed, at_root, tmp_path, monkeypatch, request, name, settings, same_kernel
):
    """Stopped inside epochs; the cell, or the notebook, runs again: the same weights to the bit."""
    if settings.get("compiled"):
        request.getfixturevalue("compiler")
    _, folder = printed

    def run(cv_dir):
        if name == "blockdrop_training":
            shutil.copytree(folder / "cv" / "trained_rnet", cv_dir / "trained_rnet", dirs_exist_ok=True)
        left = run_cells(name, settings | {"cv_dir": str(cv_dir)}, again_after=(Interrupted,) * same_kernel)
        return utils.fingerprint(*(left[network] for network in ("rnet", "agent") if network in left))

    expected = run(tmp_path / "whole")
    batches, number, interrupts = utils.TrainingRun.batches, 0, 0

    def interrupted(self, *args):
        nonlocal number, interrupts
        for inputs, labels in batches(self, *args):
            number += 1
            if number in (2, 9, 15, 24, 31, 40):  # once in each epoch, of 5 batches, of each stage
                interrupts += 1
                raise Interrupted
            yield inputs, labels

    monkeypatch.setattr(utils.TrainingRun, "batches", interrupted)
    found = None
    while found is None:
        with contextlib.suppress(Interrupted):
            found = run(tmp_path / "interrupted")
    assert found == expected and interrupts == {"rnet_sole": 2, "blockdrop_training": 6}[name]


def test_every_cell_can_be_run_twice(at_root, tmp_path):
    """It ends with the same weights and the same answers as when every cell runs once."""
    few, averaging, found = {"max_images": 100, "batch_size": 18}, {"averaging": 0.5}, {}
    for times in (1, 2):
        paths = few | {"cv_dir": str(tmp_path / str(times))}
        sole = run_cells("rnet_sole", SOLE | averaging | paths, times)
        trained = run_cells("blockdrop_training", ALL_STAGES | averaging | paths, times)
        tested = run_cells("blockdrop_inference", INFERENCE | paths | {"results_dir": None}, times)
        answers = [tested["report"].numbers[key] for key in ("baselines", "keep rate of each block")]
        found[times] = utils.fingerprint(sole["rnet"], trained["rnet"], trained["agent"]), answers
    assert found[1] == found[2]


def test_compiled_training_is_the_same_but_for_rounding(at_root, tmp_path, compiler):
    few = SOLE | {"max_images": 100, "batch_size": 18, "precision": "fp32"}
    losses, weights = [], []
    for compiled in (False, True):
        left = run_cells("rnet_sole", few | {"compiled": compiled, "cv_dir": str(tmp_path / str(compiled))})
        losses.append([row["loss"] for row in left["run"].history])
        weights.append(utils.fingerprint(left["rnet"]))
    assert losses[1] == pytest.approx(losses[0], abs=0.01)
    assert weights[1] != weights[0]


def test_small_crops_come_first(at_root, tmp_path, monkeypatch):
    batches, widths = utils.TrainingRun.batches, []

    def recorded(self, *args):
        for inputs, labels in batches(self, *args):
            widths.append(inputs.shape[-1])
            yield inputs, labels

    monkeypatch.setattr(utils.TrainingRun, "batches", recorded)
    few = {"small_crops": 0.5, "max_images": 100, "batch_size": 18, "cv_dir": str(tmp_path)}  # 5 batches
    run_cells("rnet_sole", SOLE | few)
    assert widths == [24] * 5 + [32] * 5
    widths.clear()
    run_cells("blockdrop_training", ALL_STAGES | few)
    # Stochastic depth, policy training on whole images, finetuning.
    assert widths == ([24] * 5 + [32] * 5) + [32] * 10 + ([24] * 5 + [32] * 5)


@pytest.mark.parametrize("skip_dropped", [True, False])
def test_finetuning_skips_dropped_blocks_or_hides_them(at_root, tmp_path, monkeypatch, skip_dropped):
    forward, skipped = utils.FlatResNet.forward, []

    def recorded(self, x, policy=None, skip_dropped=False):
        skipped.append(skip_dropped)
        return forward(self, x, policy, skip_dropped)

    run_cells("rnet_sole", SOLE | {"cv_dir": str(tmp_path)})
    monkeypatch.setattr(utils.FlatResNet, "forward", recorded)
    run_cells("blockdrop_training", BLOCKDROP | {"cv_dir": str(tmp_path), "skip_dropped": skip_dropped})
    assert skipped and set(skipped) == {skip_dropped}


def test_sampled_policies_are_held_against_the_greedy_ones(printed, at_root):
    """In both stages the loss gets the sampled policy, and its reward minus the greedy one's."""
    _, folder = printed
    nb = run_cells("blockdrop_training", BLOCKDROP | {"cv_dir": str(folder / "cv")})
    get_reward, policy_loss, rewards, held = nb["get_reward"], nb["policy_loss"], [], []

    def recorded_reward(logits, targets, policy, penalty):
        rewards.append((policy, get_reward(logits, targets, policy, penalty)[0]))
        return get_reward(logits, targets, policy, penalty)

    def recorded_loss(explored, sampled, advantage, *more, **options):
        (greedy,) = (reward for policy, reward in rewards[-2:] if policy is not sampled)
        (ours,) = (reward for policy, reward in rewards[-2:] if policy is sampled)
        held.append(torch.equal(advantage, ours - greedy))
        return policy_loss(explored, sampled, advantage, *more, **options)

    class OneBatch:
        in_average = False

        def batches(self, loader, crop=1):
            return [next(iter(loader))]

        def mean_loss(self, losses, loader):
            return losses[0].item()

    nb |= {"get_reward": recorded_reward, "policy_loss": recorded_loss}
    nb["policy_training"] = nb["finetuning"] = OneBatch()
    nb["scheduler_rnet"] = nb["scheduler_agent"] = torch.optim.lr_scheduler.ConstantLR(nb["optimizer_agent"])
    nb["train"](1)
    nb["finetune"]()
    assert held == [True, True]


def test_policy_training_finds_the_plain_loops_rewards(printed, at_root):
    """One step on the same batch, from the same weights: every block computed twice, or none in vain."""
    _, folder = printed
    paths = {"cv_dir": str(folder / "cv"), "precision": "fp32", "max_epochs_finetuning": 0}
    nb = run_cells("blockdrop_training", BLOCKDROP | paths)
    get_reward, batch, rewards = nb["get_reward"], next(iter(nb["trainloader"])), []

    def recorded(*given):
        rewards.append(get_reward(*given))
        return rewards[-1]

    step = SimpleNamespace(batches=lambda loader: [batch], mean_loss=lambda losses, loader: losses[0])
    nb |= {"get_reward": recorded, "policy_training": step}
    start = copy.deepcopy(nb["agent"].state_dict())
    losses = []
    for frozen in (inference.prepare(nb["rnet"]), Masked(nb["rnet"])):
        nb["frozen"] = frozen
        nb["agent"].load_state_dict(start)
        utils.seed_everything(3)
        losses.append(nb["train"](0)[0])
    assert len(rewards) == 4 and not torch.equal(rewards[0][0], rewards[1][0])  # greedy and sampled
    torch.testing.assert_close(rewards[:2], rewards[2:])
    torch.testing.assert_close(*losses)


def test_the_seed_decides_the_weights(at_root, tmp_path):
    def weights(folder, seed):
        settings = BLOCKDROP | {"cv_dir": str(tmp_path / folder), "seed": seed, "deterministic": True}
        sole = run_cells("rnet_sole", SOLE | settings)
        trained = run_cells("blockdrop_training", settings)
        return [utils.fingerprint(network) for network in (sole["rnet"], trained["rnet"], trained["agent"])]

    try:
        first, again, other = weights("a", 1), weights("b", 1), weights("c", 2)
    finally:
        torch.use_deterministic_algorithms(False)
    assert first == again
    assert all(a != b for a, b in zip(first, other, strict=True))


def test_penalties_are_compared(printed, at_root, tmp_path):
    """A sweep over one penalty, which the notebook draws then."""
    _, folder = printed
    settings = BLOCKDROP | {"data_dir": str(ROOT / "data")}
    with pytest.raises(ValueError, match="a sweep sets max_epochs_training and model itself"):
        sweep.sweep("R8_SYN", [-3.0], settings, folder / "cv", tmp_path)
    del settings["max_epochs_training"], settings["model"]
    path = sweep.sweep("R8_SYN", [-3.0], settings, folder / "cv", tmp_path)
    (found,) = json.loads(path.read_text())["runs"]
    assert found["penalty"] == -3 and found["epoch"] == 2 and 0 <= found["sparsity"] <= 3
    paths = {"cv_dir": str(folder / "cv"), "results_dir": str(tmp_path)}
    neither = {"max_epochs_training": 0, "max_epochs_finetuning": 0}
    assert run_cells("blockdrop_training", BLOCKDROP | neither | paths)["sweeps"] == [path]


def test_an_image_that_is_not_there_is_told_and_the_notebook_goes_on(printed, at_root, capsys):
    _, folder = printed
    paths = {"cv_dir": str(folder / "cv"), "results_dir": None}
    run_cells("blockdrop_inference", INFERENCE | paths | {"image": "none.png", "max_images": 20})
    assert "there is no image file none.png" in capsys.readouterr().out


def test_they_run_on_cifar10(at_root, tmp_path, cifar10, capsys):
    small = {"model": "R8_C10", "cv_dir": str(tmp_path)}
    run_cells("rnet_sole", SOLE | small)
    run_cells("blockdrop_training", BLOCKDROP | small)
    run_cells("blockdrop_inference", INFERENCE | small | {"results_dir": None})
    assert "The difficulty of R8_C10's images is not known" in capsys.readouterr().out


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA GPU here")
def test_they_run_on_cuda(tmp_path):
    for name, settings in (
        ("rnet_sole", SOLE),
        ("blockdrop_training", BLOCKDROP),
        ("blockdrop_inference", INFERENCE),
    ):
        text = execute(name, tmp_path, settings | {"device": "cuda"})
    assert "How a single image runs: CUDA graphs, alone: CUDA graphs" in text


@pytest.mark.parametrize(
    ("name", "setting", "message"),
    [
        ("rnet_sole", {"model": "R9_SYN"}, "unknown model 'R9_SYN'"),
        ("blockdrop_training", {"alpha": 1.5}, "alpha is 1.5"),
        (
            "blockdrop_training",
            {"temperature": 2},
            "temperature is 2, expected a number, 0.02 or more and 1 or less",
        ),
        ("blockdrop_training", {"temperature_finetuning": 0}, "temperature_finetuning is 0"),
        ("blockdrop_training", {"penalty": 1}, "penalty is 1, expected a number, below 0"),
        (
            "blockdrop_training",
            {"max_epochs_training": 0, "load_policy": "a.t7"},
            "or name a policy in load_finetuning",
        ),
        ("blockdrop_training", {"load_features": "a", "load_policy": "a"}, "leave one of them out"),
        ("blockdrop_training", {"cl_pace": 0.5}, "cl_pace is 0.5, expected a whole number, 1 or more"),
        ("blockdrop_inference", {"batch_sizes": [0]}, "each of batch_sizes is 0, expected a whole number"),
        ("rnet_sole", {"compiled": "yes"}, "compiled is 'yes', expected True or False"),
        ("rnet_sole", {"epochs": 0}, "epochs is 0, expected a whole number, 1 or more"),
        ("rnet_sole", {"max_images": 2}, "leaves one part empty"),
        ("rnet_sole", {"epochs": 1, "warmup": 0}, "warmup is 0 of 5 steps"),
        ("rnet_sole", {"epochs": 9, "averaging": 0.1}, "averaging is 0.1 of 9 epochs, less than one"),
        ("blockdrop_training", {"averaging": 0.95}, "averaging is 0.95, and in the first 0.1 of the steps"),
        ("blockdrop_inference", {"image": None}, "image is None, expected a whole number, 0 or more"),
        ("blockdrop_inference", {"model": "R14_SYN"}, "run blockdrop_training.ipynb with model = 'R14_SYN'"),
    ],
)
def test_bad_settings_get_one_clear_sentence(at_root, tmp_path, name, setting, message):
    with pytest.raises((ValueError, FileNotFoundError), match=re.escape(message)):
        run_cells(name, SMALL | {"cv_dir": str(tmp_path)} | setting)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_no_cell_is_longer_than_a_screen(name):
    notebook = nbformat.read(ROOT / f"{name}.ipynb", as_version=4)
    assert max(len(cell.source.splitlines()) for cell in notebook.cells) <= 45


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_every_setting_is_checked(name):
    """Another kind of value than the default's is refused, whatever the setting."""
    notebook = nbformat.read(ROOT / f"{name}.ipynb", as_version=4)
    (cell,) = (c for c in notebook.cells if "parameters" in c.metadata.get("tags", []))
    defaults = {}
    exec(cell.source, {}, defaults)
    utils.check_settings(defaults)
    elsewhere = {"model", "device", "precision", "batch_sizes", "image"}
    for setting in defaults.keys() - elsewhere:
        with pytest.raises(ValueError, match=f"^{setting} is .*, expected "):
            utils.check_settings(defaults | {setting: [1]})


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_kept_outputs_come_from_one_clean_run(name):
    notebook = nbformat.read(ROOT / f"{name}.ipynb", as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert sum("parameters" in cell.metadata.get("tags", []) for cell in code) == 1
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    assert not any(output.output_type == "error" for output in outputs)
    assert not any("Warning" in str(output) for output in outputs)
