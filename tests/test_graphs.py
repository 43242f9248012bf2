"""What CUDA graphs need, tested without them: functions run again where a GPU would replay."""

import pytest
import torch
from running import step_functions

import utils
from models import inference
from models.graphs import CapturedStep, Graph, Graphs, one_graph
from models.lab.device import seed_everything
from models.lab.training import one_cycle

CPU = torch.device("cpu")
SAMPLING = {"penalty": -1, "alpha": 0.9, "temperature": 0.5, "beta": 0}


def run_for_replay(function):
    """Stand for a capture: warm up three times; return the function itself."""
    for _ in range(3):
        function()
    return function


def train(name, wrapped):
    """Take a few steps of batches of two sizes; return the losses."""
    seed_everything(0)
    rnet, agent = utils.build_model("R8_SYN")
    sgd = torch.optim.SGD(rnet.parameters(), 0.1, momentum=0.9, nesterov=True, weight_decay=5e-4, fused=True)
    adam = torch.optim.Adam(agent.parameters(), 1e-3, fused=True)
    schedules = {"sgd": one_cycle(sgd, 0.1, 6, 0.3), "adam": one_cycle(adam, 1e-3, 6, 0.3)}
    used = {"policy_step": ["adam"], "finetuning_step": ["sgd", "adam"]}.get(name, ["sgd"])
    frozen, images = inference.prepare(rnet.eval()), torch.rand(6, 8, 3, 32, 32)
    rnet.train()
    labels, losses = torch.randint(10, (6, 8)), []
    algorithm = step_functions("rnet_sole" if name == "sole_step" else "blockdrop_training")
    step = wrapped(getattr(algorithm, name))
    for x, y in zip(images, labels, strict=True):
        if len(losses) == 3:
            x, y = x[:5], y[:5]
        given = {
            "sole_step": (rnet, sgd, x, y, "fp32"),
            "depth_step": (rnet, sgd, x, y, 0.7, "fp32", False),
            "policy_step": (agent, frozen, adam, x, y, "fp32", 3, SAMPLING),
            "finetuning_step": (rnet, agent, (sgd, adam), x, y, "fp32", False, SAMPLING),
        }[name]
        result = step(*given)
        losses.append(result[0] if isinstance(result, tuple) else result)
        for optimizer in used:
            schedules[optimizer].step()
    return [loss.item() for loss in losses]


@pytest.mark.parametrize("name", ["sole_step", "depth_step", "policy_step", "finetuning_step"])
def test_warming_up_does_not_train(name):
    losses = train(name, lambda step: CapturedStep(step, CPU, run_for_replay))
    torch.testing.assert_close(losses, train(name, lambda step: step))  # learning rates are rounded
    assert one_graph(train, CPU) is train


def test_a_step_that_cant_be_captured_runs_as_it_is(capsys):
    def refuse(function):
        function()
        raise RuntimeError("no graphs here")

    losses = train("sole_step", lambda step: CapturedStep(step, CPU, refuse))
    torch.testing.assert_close(losses, train("sole_step", lambda step: step))
    assert capsys.readouterr().out == "sole_step runs without CUDA graphs: no graphs here\n"


@torch.inference_mode()
def test_captured_functions_give_what_they_gave():
    torch.manual_seed(0)
    rnet, agent = utils.build_model("R8_SYN")
    first, images = torch.rand(2, 2, 3, 32, 32)
    for net in (inference.prepare(rnet.eval()), inference.prepare(rnet, agent.eval())):
        graphs, policy = Graphs(net.eager, first, run_for_replay), torch.tensor([[1, 0, 1.0]] * 2)
        pairs = [(graphs.under(images, policy), net.eager.under(images, policy))]
        if net.eager.agent is None:
            pairs.append((graphs.alone(images), net(images)))
        else:
            pairs += [
                (graphs.decide(images), net.decide(images)),
                *zip(graphs.both(images), net(images), strict=True),
            ]
        assert all(torch.equal(ours, expected) for ours, expected in pairs)
    with pytest.raises(RuntimeError, match="gave other results"):
        Graph(torch.sin, images, capture=lambda run: run() or (lambda: None))
