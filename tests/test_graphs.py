"""What CUDA graphs need, tested without them: functions run again where a GPU would replay."""

import pytest
import torch
from running import step_functions

import utils
from models import inference
from models.graphs import CapturedStep, Graphs, SingleImage, one_graph
from models.lab.device import choose_device, seed_everything
from models.lab.training import one_cycle

CPU = torch.device("cpu")
STEPS, LR = 20, 0.05
SAMPLING = {"penalty": -1, "alpha": 0.9, "temperature": 1, "beta": 0.1}


def networks(model="R20_SYN"):
    """Return ResNet and policy network, in eval mode on the CPU; the policies differ between images."""
    seed_everything(0)
    rnet, agent = utils.build_model(model)
    with torch.no_grad():
        agent.logit.weight.normal_()
    return rnet.eval(), agent.eval()


def take_steps(stage, precision="fp32", device=CPU, wrapped=None, steps=7):
    """Take some training steps; return the weights before and after, batch norms' statistics, and the losses.

    `wrapped`: what makes a captured step of a step function.
    """
    choose_device(device.type)
    rnet, agent = (net.to(device, memory_format=torch.channels_last).train() for net in networks("R8_SYN"))
    fused = None if wrapped else True  # captured steps become fused
    sgd = torch.optim.SGD(rnet.parameters(), LR, 0.9, weight_decay=5e-4, nesterov=True, fused=fused)
    adam = torch.optim.Adam(agent.parameters(), 1e-3, fused=fused)
    # On CUDA in bf16, as one kernel: block by block the host would read the policies, which no graph can.
    frozen = inference.prepare(rnet, precision="bf16" if device.type == "cuda" else "fp32")
    sole, nb = step_functions("rnet_sole"), step_functions("blockdrop_training")
    function, before, after = {
        "sole": (sole.sole_step, (rnet, sgd), (precision,)),
        "depth": (nb.depth_step, (rnet, sgd), (0.7, precision, False)),
        "policy": (nb.policy_step, (agent, frozen, adam), (precision, 3, SAMPLING)),
        "finetuning": (nb.finetuning_step, (rnet, agent, (sgd, adam)), (precision, False, SAMPLING)),
    }[stage]
    nets = [net for net in (rnet, agent) if net in before]
    optimizers = {"policy": [adam], "finetuning": [sgd, adam]}.get(stage, [sgd])
    schedules = [one_cycle(optimizer, optimizer.defaults["lr"], 2 * STEPS, 0.2) for optimizer in optimizers]
    step = wrapped(function) if wrapped else function
    draw = {"generator": torch.Generator().manual_seed(3)}
    batches = [(torch.rand(n, 3, 32, 32, **draw), torch.randint(10, (n,), **draw)) for n in (32, 32, 16)]
    batches = [(images.to(device), labels.to(device)) for images, labels in batches]

    def weights():
        return torch.cat([weight.detach().flatten() for net in nets for weight in net.parameters()])

    start, losses = weights(), []
    seed_everything(2)  # of sampled policies
    for number in range(steps):
        found = step(*before, *batches[2 if number % 10 == 5 else number % 2], *after)
        losses.append(found[0] if isinstance(found, tuple) else found)
        for schedule in schedules:
            schedule.step()
    end, statistics = weights(), torch.cat([buffer.flatten() for net in nets for buffer in net.buffers()])
    if wrapped and step.graphs:
        assert len(step.graphs) == (2 if steps > 5 else 1)
        for optimizer in optimizers:  # as a schedule does it: the graph sees the new learning rate
            optimizer.param_groups[0]["lr"].fill_(0)
        step(*before, *batches[0], *after)
        assert torch.equal(weights(), end)
    return start, end, statistics, torch.stack(losses)


def run_for_replay(function):
    """Stand for a capture: warm up three times; return the function itself."""
    for _ in range(3):
        function()
    return function


@pytest.mark.parametrize("stage", ["sole", "depth", "policy", "finetuning"])
def test_warming_up_does_not_train(stage):
    warmed = take_steps(stage, wrapped=lambda step: CapturedStep(step, CPU, run_for_replay))
    cold = take_steps(stage, wrapped=lambda step: CapturedStep(step, CPU, lambda run: run))
    torch.testing.assert_close(warmed, cold, rtol=0, atol=0)
    # Learning rates are rounded, and Adam makes more of that where gradients are small. A step is 1e-3.
    torch.testing.assert_close(cold, take_steps(stage), rtol=1e-3, atol=1e-4)
    assert one_graph(take_steps, CPU) is take_steps
    with pytest.raises(ValueError, match="device is 'auto' again: run the cell below the settings"):
        one_graph(take_steps, "auto")


def test_a_step_that_cant_be_captured_runs_as_it_is(capsys):
    def refuse(function):
        function()
        raise RuntimeError("no graphs here")

    refused = take_steps("sole", wrapped=lambda step: CapturedStep(step, CPU, refuse))
    torch.testing.assert_close(refused, take_steps("sole"))
    assert capsys.readouterr().out == "sole_step runs without CUDA graphs: no graphs here\n"


def test_nothing_ties_a_weights_gradient_to_another_stream_than_the_captures():
    """The node that sums it belongs to the stream it was made on, as long as anything holds it."""
    rnet, _ = networks("R8_SYN")
    weight, still_held = rnet.fc.weight, []

    def capture(function):
        for _ in range(2):
            node = weight.expand_as(weight).grad_fn.next_functions[0][0]
            still_held.append("seen" in node.metadata)
            node.metadata["seen"] = True
            del node
        return run_for_replay(function)

    step = CapturedStep(step_functions("rnet_sole").sole_step, CPU, capture)
    step(rnet, torch.optim.SGD(rnet.parameters(), LR), torch.rand(2, 3, 32, 32), torch.tensor([1, 2]), "fp32")
    assert still_held == [False, False]


@pytest.mark.parametrize(("way", "n"), [(Graphs, 2), (SingleImage, 1)])
@torch.inference_mode()
def test_captured_networks_are_the_masked_forward(way, n):
    rnet, agent = networks()
    pair, sole = inference.prepare(rnet, agent), inference.prepare(rnet)
    first, *others = torch.rand(4, n, 3, 32, 32)
    captured_pair, captured_sole = (way(net.eager, first, run_for_replay) for net in (pair, sole))
    for images in others:
        decided = pair.decide(images)
        assert torch.equal(captured_pair.decide(images), decided)
        found = [*captured_pair.both(images), captured_sole.alone(images)]
        expected = [rnet(images, decided), decided, rnet(images)]
        for policy in (torch.ones(n, 9), torch.zeros(n, 9), *torch.randint(2, (3, n, 9)).float()):
            found += [*captured_pair.both(images, policy), captured_sole.under(images, policy)]
            expected += [rnet(images, policy), policy, rnet(images, policy)]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("policy_too", [True, False])
@torch.inference_mode()
def test_a_step_that_does_nothing_is_noticed(policy_too):
    net, image, steps = inference.prepare(*networks()[: 1 + policy_too]), torch.rand(1, 3, 32, 32), []
    SingleImage(net.eager, image, lambda step: steps.append(step) or step)
    before = iter(steps[:-1])  # the last step is the decision, or all blocks at once
    with pytest.raises(RuntimeError, match="gave other results"):
        SingleImage(net.eager, image, lambda step: step if next(before, None) else lambda: None)
    with pytest.raises(RuntimeError, match="gave other results"):
        Graphs(net.eager, image, lambda run: run() or (lambda: None))
