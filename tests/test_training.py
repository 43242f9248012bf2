"""Stages: trained, interrupted, resumed, skipped; what they start from and what they cost."""

import contextlib
import errno
import subprocess
import sys
from unittest.mock import Mock

import pytest
import torch
import torch.nn.functional as F
from torch.optim.swa_utils import AveragedModel

import utils
from models.lab import stages
from models.lab.checkpoints import CheckpointError, fingerprint, read_checkpoint, save_checkpoint
from models.lab.data import Images, Loader
from models.lab.stages import Stage
from models.lab.training import Training, first_averaged_epoch, one_cycle, take_average

EPOCHS = 4
# Takes a lock, and keeps it until its input ends.
LOCK = """
import sys, filelock
try:
    lock = filelock.FileLock(sys.argv[1])
    lock.acquire(timeout=0)
    print("free", flush=True)
    sys.stdin.read()
except filelock.Timeout:
    print("in use")
"""


def images(number, batch_size):
    """Return a loader of random images."""
    pixels = torch.randint(256, (number, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator())
    dataset = Images(pixels, torch.arange(number) % 10, list("abcdefghij"), augment=True)
    return Loader(dataset, batch_size, "cpu", shuffle=True)


def train(folder, fault=(None, None), resume=True, seed=5, lr=0.1, averaging=0, start=None, before=print):
    """Train a little R8; return the network and its training.

    `fault`: what happens in which epoch: "interrupt", "loss" or "weight". `before`: called with each epoch.
    """
    torch.manual_seed(seed)
    loader, (rnet, _) = images(40, 10), utils.build_model("R8_SYN")
    optimizer = torch.optim.SGD(rnet.parameters(), lr, momentum=0.9)
    scheduler, averaged = one_cycle(optimizer, lr, EPOCHS * len(loader), 0.3), AveragedModel(rnet)
    progress = {"optimizer": optimizer, "scheduler": scheduler, "averaged": averaged}
    settings = {"model": "R8_SYN", "seed": seed, "lr": lr, "averaging": averaging}
    training = Training("sole", folder, settings, {"resnet": rnet}, progress, EPOCHS, str, start, resume)
    for epoch in training:
        before(epoch)
        losses = []
        for step, (inputs, targets) in enumerate(training.batches(loader, losses)):
            loss = F.cross_entropy(rnet.train()(F.dropout(inputs, 0.1)), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
            if fault == ("interrupt", epoch) and step == 2:
                raise KeyboardInterrupt
            bad = fault == ("loss", epoch) and step == 2
            losses.append(loss.detach() * (float("nan") if bad else len(targets)))
        if epoch >= first_averaged_epoch(EPOCHS, averaging):
            averaged.update_parameters(rnet)
            if epoch == EPOCHS - 1:
                take_average(averaged, rnet, loader, "fp32")
        if fault == ("weight", epoch):
            rnet.fc.bias.data[3] = float("inf")
        training.end_epoch(loss=training.mean_loss(losses, loader))
    return rnet, training


@pytest.mark.parametrize("averaging", [0, 0.5])
def test_resumed_is_uninterrupted_to_the_bit(tmp_path, capsys, averaging):
    expected, whole = train(tmp_path / "whole", averaging=averaging)
    interrupted = []  # a traceback refers to the loop, as in a notebook's cell
    for epoch in (0, 2, 3):
        with pytest.raises(KeyboardInterrupt) as error:
            train(tmp_path / "interrupted", ("interrupt", epoch), averaging=averaging)
        interrupted.append(error)
    for epochs in ("3 epochs done, 1 to go", "4 epochs done, 0 to go"):
        capsys.readouterr()
        resumed, training = train(tmp_path / "interrupted", averaging=averaging)
        assert epochs in capsys.readouterr().out
        assert fingerprint(resumed) == fingerprint(expected)
        assert [row["loss"] for row in training.history] == [row["loss"] for row in whole.history]


def test_a_finished_run_of_other_settings_is_replaced_once_it_is_saved(tmp_path, capsys):
    _, training = train(tmp_path)
    with pytest.raises(ValueError, match=r"finished but unsaved run of other settings \(seed 5 -> 6\)"):
        train(tmp_path, seed=6)
    training.save("final.t7")
    _, training = train(tmp_path, seed=6)
    assert "seed 5 -> 6" in capsys.readouterr().out and len(training.history) == EPOCHS
    assert read_checkpoint(tmp_path / "last.t7")["lineage"][-1]["settings"]["seed"] == 6


@pytest.mark.parametrize(
    ("other", "changed"),
    [({"lr": 0.2}, "lr 0.1 -> 0.2"), ({"start": stages.TORCHVISION}, "starting weights")],
)
def test_an_unfinished_run_of_other_settings_is_not_lost(tmp_path, other, changed):
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, ("interrupt", 2))
    with pytest.raises(ValueError, match=rf"an unfinished run .*\({changed}.*resume = False"):
        train(tmp_path, **other)
    _, training = train(tmp_path, **other, resume=False)
    assert len(training.history) == EPOCHS


LAST = {"history": [], "lineage": [{"settings": {"epochs": EPOCHS}}]}  # without an optimizer's state


@pytest.mark.parametrize(
    "change", [{}, {"lineage": None}, {"lineage": []}, {"lineage": [3]}, {"lineage": [{}]}, {"history": 3}]
)
def test_a_foreign_state_is_refused(tmp_path, change):
    save_checkpoint(tmp_path / "last.t7", LAST | change)
    with pytest.raises(CheckpointError, match=r"last\.t7 is not the state of a run like this one"):
        train(tmp_path)


@pytest.mark.parametrize(("what", "epoch"), [("loss", 1), ("weight", 0), ("weight", 2)])
def test_numbers_that_are_not_finite_stop_the_run_and_are_not_saved(tmp_path, what, epoch):
    problem = {"loss": "from step 2 of epoch 1 on", "weight": f"after epoch {epoch}"}[what]
    way_out = ": lower the learning rate" + ", and move" * (epoch > 0)
    with pytest.raises(RuntimeError, match=rf"the (loss|resnet's fc\.bias) is not finite {problem}{way_out}"):
        train(tmp_path, (what, epoch))
    assert (tmp_path / "last.t7").exists() == (epoch > 0)
    assert epoch == 0 or len(read_checkpoint(tmp_path / "last.t7")["history"]) == epoch


@pytest.mark.parametrize(("bad", "noticed"), [(7, 100), (99, 100), (130, 200)])
def test_a_loss_that_is_not_finite_is_noticed_within_100_steps(tmp_path, bad, noticed):
    rnet, _ = utils.build_model("R8_SYN")
    training = Training("sole", tmp_path, {"seed": 1}, {"resnet": rnet}, {}, 1, str)
    losses = []
    with pytest.raises(RuntimeError, match=f"not finite from step {bad} of epoch 0 on: lower"):
        for _ in training:
            for _ in training.batches(images(300, 1), losses):
                losses.append(torch.tensor(float("nan") if len(losses) == bad else 1.0))
    assert len(losses) == noticed
    with pytest.raises(RuntimeError, match=r"only 0 of 1 epochs are done in .*: run the training's cell"):
        training.save("final.t7")


def test_a_folder_is_in_use_until_the_final_checkpoint_is_written(tmp_path):
    lock = [sys.executable, "-c", LOCK, str(tmp_path / ".lock")]

    def found():
        return subprocess.run(lock, input="", capture_output=True, text=True, check=True).stdout.strip()

    with subprocess.Popen(lock, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "free\n"
        with pytest.raises(RuntimeError, match=rf"another process is training in {tmp_path}: wait for it"):
            train(tmp_path)
    for _ in range(2):  # the second time nothing is left to train
        _, training = train(tmp_path)
        assert found() == "in use"
    (tmp_path / ".left.tmp").touch()
    assert read_checkpoint(training.save("final.t7", acc=0.5).path)["acc"] == 0.5
    assert found() == "free" and not (tmp_path / ".left.tmp").exists()


@pytest.mark.parametrize("error", [OSError(errno.ENOLCK, "none"), NotImplementedError("no flock")])
def test_a_file_system_without_locks_is_trained_on(tmp_path, monkeypatch, capsys, error):
    monkeypatch.setattr("models.lab.training.FileLock.acquire", Mock(side_effect=error))
    _, training = train(tmp_path)
    assert training.save("final.t7").path.exists()
    assert f"The file system of {tmp_path} has no locks" in capsys.readouterr().out


def test_a_folder_that_cannot_be_is_said_before_training(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(RuntimeError, match=r"could not write in .*a file stands where a folder is needed"):
        train(tmp_path / "file" / "run")


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 2 MB, where this process may mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)]
    if sys.platform != "linux" or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a small file system can't be mounted here: it takes Linux, and root")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)  # an interrupted run has files open


def test_a_disk_that_fills_up_ends_the_training_and_keeps_its_last_epoch(small_disk, tmp_path):
    expected, _ = train(tmp_path / "whole")
    ballast = small_disk / "ballast"

    def fill(epoch):
        if epoch == 2:
            with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
                while file.write(bytes(4096)):
                    pass

    with pytest.raises(RuntimeError, match=r"could not write .*last\.t7 \(.*No space left.*free some space"):
        train(small_disk / "run", before=fill)
    assert len(read_checkpoint(small_disk / "run" / "last.t7")["history"]) == 2
    ballast.unlink()
    resumed, _ = train(small_disk / "run")
    assert fingerprint(resumed) == fingerprint(expected)


@pytest.mark.parametrize("steps", [0, 1, 3, 4, 5, 100])
def test_the_learning_rate_rises_and_falls_in_trainings_of_any_length(steps):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], 1)
    scheduler, rates = one_cycle(optimizer, 0.5, steps, warmup=0.15), []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert all(0 <= rate <= 0.5 for rate in rates)
    assert steps < 100 or (rates.index(max(rates)) == 14 and max(rates) == 0.5 and rates[-1] < 1e-3)


def test_the_averaged_epochs_are_the_last_ones():
    assert [first_averaged_epoch(*of) for of in ((10, 0.5), (100, 0.29), (4, 0), (0, 0.5))] == [5, 71, 4, 0]
    with pytest.raises(ValueError, match=r"averaging is 0\.2 of 4 epochs, less than one"):
        first_averaged_epoch(4, 0.2)


def test_weights_are_averaged_and_batch_norm_learns_the_means_statistics():
    rnet, _ = utils.build_model("R8_SYN")
    averaged, seen, means = AveragedModel(rnet), [], []
    for _ in range(2):
        torch.nn.init.normal_(rnet.conv1.weight)
        averaged.update_parameters(rnet)
        seen.append(rnet.conv1.weight.clone())
    rnet.bn1.register_forward_pre_hook(lambda _, x: means.append(x[0].mean((0, 2, 3))))
    take_average(averaged, rnet, images(40, 10), "fp32")
    torch.testing.assert_close(rnet.conv1.weight, sum(seen) / 2)
    torch.testing.assert_close(rnet.bn1.running_mean, torch.stack(means).mean(0))
    assert len(means) == 4 and rnet.bn1.momentum == 0.1 and rnet.training


def test_a_block_that_no_image_keeps_has_its_statistics_still():
    rnet, _ = utils.build_model("R8_SYN")
    norm, policy = rnet.blocks[0][0].bn1, torch.tensor([[0.0, 1, 1]])
    norm.running_mean.fill_(3)
    averaged = AveragedModel(rnet)
    averaged.update_parameters(rnet)
    take_average(averaged, rnet, images(4, 2), "fp32", lambda x: rnet(x, policy.expand(len(x), 3), True))
    assert (norm.running_mean == 3).all() and rnet.bn1.num_batches_tracked == 2


def entry(stage, seconds, model="R20_SYN"):
    return {"stage": stage, "seconds": seconds, "machine": [], "weights": None, "settings": {"model": model}}


def test_a_finished_stage_is_what_its_file_says(tmp_path):
    before = entry("stochastic depth", 7.0)
    rnet, training = train(tmp_path, start=Stage(None, (), [], [before]))
    stage = training.save("final.t7", acc=0.5)
    assert stages.load(stage.path) == stage and stage.holds == ("resnet",)
    assert stage.lineage[0] == before and stage.lineage[1]["stage"] == "sole"
    assert stage.lineage[1]["weights"] == fingerprint(rnet)
    assert stage.lineage[1]["settings"].keys() >= {"model", "seed", "epochs", "starting weights"}
    assert 0 < stage.history[0]["seconds"] < stage.history[-1]["seconds"] == stage.lineage[1]["seconds"]
    rnet, training = train(tmp_path, start=Stage(None, (), [], [before]))
    assert training.lineage == stage.lineage


def test_the_lineage_has_the_machines_that_the_epochs_ran_on(tmp_path, monkeypatch):
    def machines_after(name, fault=(None, None)):
        record = {"name": name, "instructions": "", "threads": 1, "torch": "2", "calibration": 1.0}
        monkeypatch.setattr("models.lab.training.machine_record", lambda device: dict(record))
        return [machine["name"] for machine in train(tmp_path, fault)[1].lineage[-1]["machine"]]

    with pytest.raises(KeyboardInterrupt):
        machines_after("one", ("interrupt", 1))
    assert machines_after("another") == ["one", "another"]
    assert machines_after("a third") == ["one", "another"]  # nothing was left to train


@pytest.mark.parametrize(("stage", "history"), [("finetuning", [{"epoch": 0}]), ("sole", [])])
def test_a_skipped_stage_is_the_one_it_would_start_from(tmp_path, capsys, stage, history):
    start = Stage(tmp_path / "pair.t7", ("resnet",), [{"epoch": 0}], [entry("finetuning", 1.0)])
    training = Training(stage, tmp_path / "run", {"seed": 1}, {"resnet": torch.nn.ReLU()}, {}, 0, str, start)
    assert list(training) == [] and training.history == history
    assert training.save("final.t7") is start and not (tmp_path / "run").exists()
    assert f"is skipped: {start.path} is taken" in capsys.readouterr().out


@pytest.fixture
def cv(tmp_path, monkeypatch):
    """A folder of checkpoints, next to the one that ships."""
    monkeypatch.setattr(stages, "SHIPPED", tmp_path / "shipped")
    weights = {"resnet": {"fc.weight": torch.zeros(1)}, "agent": {"logit.weight": torch.zeros(1)}}
    for path, *holds in (("cv/trained_rnet/R20_SYN/pk_1.t7", "resnet"), (f"cv/{R14}", "resnet"),
                         ("shipped/trained_rnet/R8_SYN/pk_1.t7", "resnet"),
                         (f"cv/{POLICY}", "agent", "resnet")):  # fmt: skip
        save_checkpoint(tmp_path / path, {name: weights[name] for name in holds})
    return tmp_path / "cv"


R14, POLICY = "trained_rnet/R14_SYN/pk_1.t7", "trained_policy/R20_SYN/ckpt_1.t7"


@pytest.mark.parametrize(
    ("model", "start_from", "trains_policy", "expected", "layers"),
    [
        ("R20_SYN", "auto", True, "cv/trained_rnet/R20_SYN", "shipped/trained_rnet/R8_SYN"),
        ("R20_SYN", None, True, "cv/trained_rnet/R20_SYN", None),
        ("R20_SYN", R14, True, "cv/trained_rnet/R20_SYN", "cv/trained_rnet/R14_SYN"),
        *(("R20_SYN", POLICY, trains, "cv/trained_policy/R20_SYN", None) for trains in (True, False)),
        *(("R20_SYN", start, False, "cv/trained_policy/R20_SYN", None) for start in ("auto", None)),
        ("R8_SYN", "auto", True, "shipped/trained_rnet/R8_SYN", None),
        ("R50_ImgNet", "auto", True, None, None),  # torchvision's weights
    ],
)
def test_where_training_starts(cv, model, start_from, trains_policy, expected, layers):
    start_from = start_from if start_from in ("auto", None) else cv / start_from
    found = stages.starting_point(model, start_from, trains_policy, cv)
    for stage, folder in zip(found, (expected, layers), strict=True):
        path = stage.path if stage else None
        assert path.resolve().parent == cv.parent / folder if folder else path is None


@pytest.mark.parametrize(
    ("model", "start_from", "trains_policy", "message"),
    [("R20_SYN", R14, False, "a ResNet: finetuning alone needs a policy's file"),
     ("R14_SYN", "auto", False, r"no ckpt_\*\.t7 in .*R14_SYN: train a policy first, with max_epochs_train"),
     ("R32_SYN", "auto", True, r"run rnet_sole\.ipynb with model = 'R32_SYN' first")],
)  # fmt: skip
def test_where_training_cannot_start(cv, model, start_from, trains_policy, message):
    start_from = cv / start_from if start_from == R14 else start_from
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        stages.starting_point(model, start_from, trains_policy, cv)


OLD_SOLE = {"seconds": 5.0, "machine": "A; B", "settings": {"model": "R20_SYN"}}
OLD_POLICY = OLD_SOLE | {"stage": "policy training", "sole_resnet": "0123456789ab"}
OLD_PAIR = OLD_SOLE | {"sole_resnet": "0123456789ab", "policy_seconds": 3.0, "policy_machine": "C"}


@pytest.mark.parametrize(
    ("content", "expected", "costs"),
    [
        ({}, [], (None, None, 0)),
        (OLD_SOLE, [("sole", 5, "AB")], (5, None, 0)),
        (OLD_POLICY, [("sole", None, ""), ("policy training", 5, "AB")], (None, 5, 0)),
        (OLD_PAIR, [("sole", None, ""), ("policy training", 3, "C"), ("finetuning", 5, "AB")], (None, 3, 5)),
        (OLD_PAIR | {"policy_seconds": None, "policy_machine": None},
         [("sole", None, ""), ("policy training", None, ""), ("finetuning", 5, "AB")], (None, None, 5)),
    ],
    ids=["the original's", "sole", "policy", "pair", "pair of unknown policy"],
)  # fmt: skip
def test_files_without_lineage_say_what_they_know(tmp_path, content, expected, costs):
    weights = {"resnet": {"fc.weight": torch.zeros(1)}, "agent": {"logit.weight": torch.zeros(1)}}
    stage = stages.load(save_checkpoint(tmp_path / "old.t7", content | weights | {"history": [1]}))
    assert stage.holds == ("resnet", "agent") and stage.history == [1]
    found = [(e["stage"], e["seconds"], "".join(m["name"] for m in e["machine"])) for e in stage.lineage]
    assert found == expected
    assert tuple(stages.costs(stage.lineage, "R20_SYN").values()) == costs
    if "sole_resnet" in content:
        assert stages.sole_entry(stage.lineage, "R20_SYN")["weights"] == "0123456789ab"


def test_costs_are_sums_over_the_lineage():
    sole, eight = entry("sole", 100.0), entry("sole", 5.0, "R8_SYN")
    policy = [sole, entry("stochastic depth", 20.0), eight, entry("policy training", 10.0)]
    for finetuned, costs in (([], 0), ([1.0, 2.0], 3), ([None], None)):
        lineage = [*policy, *(entry("finetuning", seconds) for seconds in finetuned)]
        expected = {"sole": 100, "policy training": 35, "finetuning": costs}
        assert stages.costs(lineage, "R20_SYN") == expected


@pytest.mark.parametrize(("seen", "said"), [(None, False), (300, True)])
def test_held_out_images_that_were_trained_on_are_said(capsys, seen, said):
    trained = entry("sole", 1.0)
    trained["settings"]["max_images"] = seen
    stages.check_images(Stage("a.t7", ("resnet",), [], [trained]), None)
    assert ("may have seen images held out now" in capsys.readouterr().out) == said
