"""Every notebook, executed from a clean kernel with small settings on the built-in data."""

import builtins
import json
import re
import symtable
from unittest.mock import Mock

import nbformat
import papermill
import pytest
import torch
from running import NOTEBOOKS, ROOT, code_cells, run_cells, run_python

import utils
from models import inference
from models.lab import data, plots, report, rivals, stages, sweep
from models.lab.checkpoints import fingerprint, read_checkpoint
from models.lab.device import choose_precision
from models.lab.training import Training
from models.resnet import FlatResNet

FEW = {"model": "R8_SYN", "max_images": 300, "device": "cpu"}
SOLE = FEW | {"batch_size": 64, "epochs": 2}
STAGES = ("max_epochs_stochastic_depth", "max_epochs_training", "max_epochs_finetuning")
BLOCKDROP = FEW | {"batch_size": 64, "curriculum": 2} | dict.fromkeys(STAGES, 2)
INFERENCE = FEW | {"seconds": 0.01, "batch_sizes": [1, 16, 1024]}


def execute(name, folder, settings):
    """Run a notebook with its checkpoints in `folder`; return what its cells printed."""
    paths = {"cv_dir": str(folder / "cv"), "data_dir": str(ROOT / "data")}
    if name == "blockdrop_inference":
        paths["results_dir"] = str(folder / "results")
    file, options = f"{name}.ipynb", {"progress_bar": False, "execution_timeout": 600}  # seconds per cell
    notebook = papermill.execute_notebook(ROOT / file, folder / file, settings | paths, cwd=ROOT, **options)
    return "".join(o.text for c in notebook.cells for o in c.get("outputs", []) if o.output_type == "stream")


@pytest.fixture(scope="module")
def printed(tmp_path_factory):
    """All three, in the reader's order: what they printed, and the folder of checkpoints."""
    folder, settings = tmp_path_factory.mktemp("notebooks"), (SOLE, BLOCKDROP, INFERENCE)
    return {name: execute(name, folder, s) for name, s in zip(NOTEBOOKS, settings, strict=True)}, folder


@pytest.fixture
def without_pictures(at_root, monkeypatch):
    """The notebooks run in the repository's root and draw nothing: `printed` draws all pictures."""
    for name, function in list(vars(plots).items()):
        if getattr(function, "__module__", None) == plots.__name__ and not name.startswith("_"):
            monkeypatch.setattr(plots, name, lambda *args, **options: None)


def train(cv_dir, settings, blockdrop=None, **how):
    """Run both trainings' cells, 5 steps per epoch; return the fingerprints of the three networks."""
    found = []
    for name, usual in (("rnet_sole", SOLE), ("blockdrop_training", BLOCKDROP | (blockdrop or {}))):
        few = {"max_images": 100, "batch_size": 18, "cv_dir": str(cv_dir)}
        left = run_cells(name, usual | few | settings, **how)
        found += [fingerprint(left[network]) for network in ("rnet", "agent") if network in left]
    return found


def test_they_print_the_originals_lines_and_more(printed):
    for name, *lines in (
        ("rnet_sole", "Accuracy of the model: ", "Training in s: ", "Testing per image in ms: "),
        ("blockdrop_training", "TS - Accuracy: ", "Policy Training: ", "the policy network adds "),
        ("blockdrop_inference", "Accuracy of the model: ", "Blocks used in avg: ", "Min blocks: "),
        ("blockdrop_inference", "Testing per image in ms: ", "A single image runs, ", "Report saved: "),
    ):
        assert all(line in printed[0][name] for line in lines), name


def test_they_write_their_checkpoints_and_where_these_come_from(printed):
    lineage, names = [], ("sole", "stochastic depth", "policy training", "finetuning")
    folders = ("trained_rnet", "stochastic_depth", "trained_policy", "finetuned")
    for number, folder in enumerate(folders):
        pattern = "pk_E_2_A_*.t7" if number < 2 else "ckpt_E_2_A_*_R_*_S_*_#_*.t7"
        (path,) = (printed[1] / "cv" / folder / "R8_SYN").glob(pattern)
        assert (path.parent / "tensorboard").is_dir()
        rnet, agent = utils.build_model("R8_SYN")
        found = stages.load(path, rnet, agent if number > 1 else None)
        assert set(found.holds) == ({"resnet"} if number < 2 else {"agent", "resnet"})
        assert [entry["stage"] for entry in found.lineage] == list(names[: number + 1])
        assert found.lineage[:-1] == lineage and len(found.history) == 2
        lineage, networks = found.lineage, (rnet,) if number < 2 else (agent, rnet)
        assert lineage[-1]["weights"] == fingerprint(*networks)
        if folder == "trained_policy":  # the ResNet was frozen
            assert fingerprint(rnet) == lineage[-2]["weights"]
        elif number:
            assert lineage[-1]["settings"]["starting weights"] == lineage[-2]["weights"]
        assert lineage[-1]["seconds"] > 0 and lineage[-1]["settings"]["model"] == "R8_SYN"
    assert all(seconds > 0 for seconds in stages.costs(lineage, "R8_SYN").values())


def test_the_report_says_what_the_pair_gives(printed):
    (path,) = (printed[1] / "results").glob("*.json")
    found = json.loads(path.read_text(encoding="utf-8"))
    assert path.stem == "R8_SYN_cpu_300images" and found["images"] == 300 and found["blocks"] == 3
    rnet, agent = utils.build_model("R8_SYN")
    tested = utils.load_checkpoint(found["checkpoint"], rnet, agent)
    _, testset = utils.get_dataset("R8_SYN", ROOT / "data", 300)
    ((images, labels),) = data.Loader(testset, 300, "cpu")
    logits, policy = inference.prepare(rnet, agent)(images)
    accuracy, blocks = (logits.argmax(1) == labels).float().mean().item(), policy.sum(1).mean().item()
    assert found["networks"]["blockdrop"]["accuracy"] == pytest.approx(accuracy, abs=0.0034)  # a tie of 300
    assert found["networks"]["blockdrop"]["blocks"] == pytest.approx(blocks, abs=0.01)
    reward = torch.where(logits.argmax(1) == labels, 1 - policy.mean(1) ** 2, -2.5).mean().item()
    assert [tested["acc"], tested["reward"]] == pytest.approx([accuracy, reward], abs=0.2)  # bf16's, maybe
    assert found["baselines"]["learned, per image"]["finetuned"] == pytest.approx(accuracy, abs=0.0034)
    assert all(len(list(path.parent.glob(f"{path.stem}_*.{kind}"))) >= 9 for kind in ("svg", "png"))
    text = path.with_suffix(".md").read_text(encoding="utf-8")
    assert all(words in text for words in ("Distinct policies", "break-even in blocks", "At chance level"))
    assert "`R8_SYN`" in report.readme_table({"CPU": [found], "GPU": [found]})


def test_a_pair_without_a_lineage_is_reported(printed, without_pictures, at_root, tmp_path):
    (path,) = (printed[1] / "cv" / "finetuned" / "R8_SYN").glob("ckpt_*.t7")
    pair = read_checkpoint(path)
    torch.save({name: pair[name] for name in ("agent", "resnet")}, tmp_path / "a.t7")
    precision = choose_precision("auto", torch.device("cpu"))
    settings = {"start_from": str(tmp_path / "a.t7"), "precision": precision, "results_dir": None}
    found = run_cells("blockdrop_inference", INFERENCE | settings)
    assert "not like for like" in found["verdict"] and "training took is unknown" in found["verdict"]


def test_no_widget_is_drawn_in_while_a_cell_runs(printed):
    """Jupyter's client answers each such output on the channel it waits on, and may miss the cell's end."""
    notebook = nbformat.read(printed[1] / "blockdrop_inference.ipynb", as_version=4)
    (widgets,) = notebook.metadata.widgets.values()
    outputs = [w["state"] for w in widgets["state"].values() if w["model_name"] == "OutputModel"]
    assert len(outputs) == 1 and not outputs[0].get("outputs")


def test_running_again_finds_the_work_done(printed, without_pictures, capsys):
    run_cells("blockdrop_training", BLOCKDROP | {"cv_dir": str(printed[1] / "cv")})
    again = capsys.readouterr().out
    assert again.count("2 epochs done, 0 to go") == 3
    found = [re.findall("^TS.*", text, re.MULTILINE) for text in (again, printed[0]["blockdrop_training"])]
    assert len(found[0]) == 2 and found[0] == found[1]


@pytest.mark.parametrize(
    ("stage", "epochs", "said"),
    [
        ("trained_rnet", (1, 1, 1), "The policy network's layers start from {file}"),
        ("trained_policy", (2, 1, 1), "Stochastic depth is skipped: {file} is taken"),
        ("finetuned", (0, 0, 1), "Policy training is skipped: {file} is taken"),
        ("finetuned", (0, 0, 0), "Finetuning is skipped: {file} is taken"),
    ],
)
def test_training_starts_from_a_file(printed, without_pictures, tmp_path, capsys, stage, epochs, said):
    (file,) = (printed[1] / "cv" / stage / "R8_SYN").glob("*_E_2_*.t7")
    settings = dict(zip(STAGES, epochs, strict=True)) | {"start_from": str(file), "curriculum": 0}
    left = run_cells("blockdrop_training", BLOCKDROP | settings | {"cv_dir": str(tmp_path)})
    assert said.format(file=file) in capsys.readouterr().out
    lineage, before = left["pair"].lineage, stages.load(file).lineage
    assert all(entry in lineage for entry in before)
    assert (left["pair"].path == file and lineage == before) == (not any(epochs))


class Interrupted(KeyboardInterrupt):
    """Stands for the interrupt of a kernel."""


def test_an_interrupted_training_ends_as_an_uninterrupted_one(without_pictures, tmp_path, monkeypatch):
    """Stopped once in each epoch, and the cell run again: the same to the bit."""
    settings = {"averaging": 0.5, "small_crops": 0.5}
    expected = train(tmp_path / "whole", settings)
    batches, number, interrupts = Training.batches, 0, [2, 9, 15, 24, 31, 40, 47, 56]

    def interrupted(self, *args):
        nonlocal number
        for batch in batches(self, *args):
            number += 1
            if number in interrupts:
                raise Interrupted
            yield batch

    monkeypatch.setattr(Training, "batches", interrupted)
    assert train(tmp_path / "cell", settings, again_after=(Interrupted,)) == expected


def test_cells_run_once_or_twice_give_the_same_and_another_seed_gives_others(without_pictures, tmp_path):
    """In a tiny training: two steps per epoch."""
    tiny, found = {"max_images": 10, "batch_size": 8, "averaging": 0.5}, {}
    for times in (1, 2):
        weights = train(tmp_path / str(times), tiny, times=times)
        paths = {"max_images": 10, "cv_dir": str(tmp_path / str(times)), "results_dir": None}
        numbers = run_cells("blockdrop_inference", INFERENCE | paths, times)["numbers"]
        found[times] = weights, [numbers[key] for key in ("baselines", "keep_rates", "networks")]
    assert found[1] == found[2]
    others = train(tmp_path / "other", tiny | {"seed": 2})
    assert all(one != other for one, other in zip(found[1][0], others, strict=True))


@pytest.mark.parametrize(("skip_dropped", "skips"), [("auto", True), (False, False)])
def test_small_crops_come_first_and_dropped_blocks_are_skipped_or_hidden(
    without_pictures, tmp_path, monkeypatch, skip_dropped, skips
):
    random_crop, forward, skipped = Mock(wraps=data.random_crop), FlatResNet.forward, set()

    def recorded_forward(self, x, policy=None, skip_dropped=False):
        if self.training and policy is not None:
            skipped.add(skip_dropped)
        return forward(self, x, policy, skip_dropped)

    monkeypatch.setattr(data, "random_crop", random_crop)
    monkeypatch.setattr(FlatResNet, "forward", recorded_forward)
    train(tmp_path, {"small_crops": 0.5}, {"skip_dropped": skip_dropped, "device": "cpu"})
    shares = [call.args[1] for call in random_crop.call_args_list]
    assert shares == ([0.75] * 5 + [1] * 5) * 3  # of policy training, which sees whole images, none
    assert skipped == {skips}


def test_penalties_are_compared(printed, at_root, tmp_path):
    settings = {"max_images": 300, "device": "cpu", "max_epochs_finetuning": 1}
    with pytest.raises(ValueError, match="a sweep sets recipe and penalty itself: leave it out"):
        sweep.sweep("R8_SYN", [-3.0], settings | {"penalty": -1, "recipe": True})
    path = sweep.sweep("R8_SYN", [-3.0], settings, printed[1] / "cv", tmp_path, with_rivals=True)
    assert path.stem == "R8_SYN_300images"
    (found,) = json.loads(path.read_text())["runs"]
    assert found["penalty"] == -3 and found["epoch"] == 1 and 0 <= found["sparsity"] <= 3
    assert found["flops"] > found["one_policy"]["flops"] > 0 and found["one_policy"]["policies"] == 1
    pair, sole = (
        stages.load(stages.find(printed[1] / "cv", folder, "R8_SYN"))
        for folder in ("penalties/-3/finetuned", "trained_rnet")
    )
    (tmp_path / "one_policy").mkdir()
    (tmp_path / "one_policy" / "equal_flops").symlink_to(printed[1] / "cv" / "penalties" / "-3_one_policy")
    assert "equal FLOPs, finetuned" in rivals.find_rivals("R8_SYN", pair, sole, tmp_path)
    options = ("--penalties", "-0.5", "-p", "batchsize", "1")
    _, refused = run_python("-m", "models.lab.sweep", "R8_SYN", *options)
    assert "there is no setting 'batchsize': do you mean batch_size?" in refused


@pytest.mark.parametrize(
    ("name", "setting", "message"),
    [
        ("rnet_sole", {"model": "R9_SYN"}, "unknown model 'R9_SYN'"),
        ("rnet_sole", {"epoch": 1}, "there is no setting 'epoch': do you mean epochs?"),
        ("blockdrop_training", {"alpha_finetuning": 1}, "'alpha_finetuning': do you mean alpha?"),
        ("blockdrop_training", {"load_policy": 1}, "'load_policy': README.md lists old settings"),
        ("rnet_sole", {"max_images": 3}, "too few to hold a tenth out"),
        ("rnet_sole", {"averaging": 0.2}, "averaging is 0.2 of 2 epochs, less than one"),
        ("rnet_sole", {"precision": "fp8"}, "unknown precision 'fp8'"),
        ("rnet_sole", {"cv_dir": "README.md"}, "a file stands where a folder is needed"),
        ("rnet_sole", {"device": "toaster"}, "device 'toaster' can't be used here"),
        ("blockdrop_training", {"curriculum": 3}, "curriculum is 3, and there are 2 epochs: lower it"),
        ("blockdrop_training", {"model": "R26_SYN"}, "run rnet_sole.ipynb with model = 'R26_SYN' first"),
        ("blockdrop_training", {"start_from": "a.t7"}, "there is no checkpoint a.t7"),
        ("blockdrop_inference", {"model": "R26_SYN"}, "run blockdrop_training.ipynb with model = 'R26_SYN'"),
        ("blockdrop_inference", {"image": "none.png"}, "there is no image file none.png"),
        ("blockdrop_inference", {"image": 300}, "image is 300, expected a number below 300"),
        ("blockdrop_inference", {"results_dir": "README.md"}, "a file stands where a folder is needed"),
    ],
)
def test_bad_settings_get_one_sentence_before_anything_is_trained(at_root, tmp_path, name, setting, message):
    shipped = INFERENCE | {"model": "R20_SYN"}
    usual = {"rnet_sole": SOLE, "blockdrop_training": BLOCKDROP, "blockdrop_inference": shipped}[name]
    with pytest.raises((ValueError, FileNotFoundError, RuntimeError)) as error:
        run_cells(name, usual | {"cv_dir": str(tmp_path)} | setting)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not list(tmp_path.rglob("*.t7"))


def outer_names(scope):
    """Return the names that a function, and what is in it, takes from outside."""
    names = {symbol.get_name() for symbol in scope.get_symbols() if symbol.is_global()}
    return names.union(*map(outer_names, scope.get_children()))


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_no_function_reads_from_outside(name):
    """What a function uses is an argument, its own, imported, another function or a CONSTANT."""
    module = symtable.symtable("\n".join(cell.source for cell in code_cells(name)), name, "exec")
    symbols, known = module.get_symbols(), set(dir(builtins))
    known |= {symbol.get_name() for symbol in symbols if symbol.is_imported() or symbol.is_namespace()}
    for function in (function for symbol in symbols for function in symbol.get_namespaces()):
        assert all(used.isupper() for used in outer_names(function) - known), function.get_name()


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_cells_fit_a_screen_and_their_outputs_come_from_one_clean_run(name):
    code = code_cells(name)
    assert max(len(cell.source.splitlines()) for cell in code) <= 30
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    for output in (output for cell in code for output in cell.outputs):
        assert output.output_type != "error" and "Warning" not in str(output)
