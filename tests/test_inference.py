"""Networks prepared for inference give what the masked forward gives, and say no to what can't be run."""

import pytest
import torch
from test_networks import randomized

import utils
from models import inference
from models.graphs import SingleImage
from models.lab.checkpoints import fingerprint


@pytest.fixture(scope="module")
def networks():
    torch.manual_seed(0)
    rnet, agent = (randomized(network) for network in utils.build_model("R20_SYN"))
    agent.logit.bias.data.uniform_(-1, 1)
    return rnet, agent


def assert_near(found, expected):
    assert (found - expected).norm() <= 1e-4 * expected.norm()


@torch.no_grad()
def test_the_agent_decides_and_the_masked_way_does_alike(networks):
    rnet, agent = networks
    images, net = torch.rand(6, 3, 32, 32), inference.prepare(rnet, agent)
    images *= torch.arange(6)[:, None, None, None]  # so different that policies differ
    policy = (agent(images)[0] >= 0.5).float()
    assert len(policy.unique(dim=0)) > 1
    for logits, decided in (net(images), net.masked(images)):
        assert torch.equal(decided, policy)
        assert_near(logits, rnet(images, policy))
    assert torch.equal(net.decide(images), policy)
    assert_near(inference.prepare(rnet)(images), rnet.forward_full(images))


@torch.no_grad()
def test_one_policy_for_all(networks):
    rnet, _ = networks
    images, policy = torch.rand(3, 3, 32, 32), torch.tensor([1, 0, 1, 1, 0, 0, 1, 0, 1])
    net = inference.prepare(rnet, policy=policy)
    assert_near(net(images), rnet(images, policy.expand(3, -1)))
    same, apart = inference.agreement(net, inference.prepare(rnet), [(images, None)])
    assert 0 <= same <= 3 and apart > 0.01
    assert inference.agreement(net, net, [(images, None)]) == (3, 0)
    for wrong, message in (
        (policy[1:], r"shape \(1, 8\), expected \(1, 9\)"),
        (policy / 2, "values other than"),
    ):
        with pytest.raises(ValueError, match=message):
            inference.prepare(rnet, policy=wrong)


@torch.no_grad()
def test_bottlenecks_and_their_shortcuts_fold():
    torch.manual_seed(0)
    rnet = randomized(utils.build_model("R50_ImgNet")[0])
    images, policy = torch.rand(2, 3, 64, 64), torch.randint(2, (2, 16)).float()
    assert_near(inference.prepare(rnet)(images, policy), rnet(images, policy))


@torch.inference_mode()
def test_steps_for_one_image_are_the_masked_forward(networks):
    """What CUDA captures, without CUDA: the steps are run instead of replayed."""
    rnet, agent = networks
    first, *images = torch.rand(4, 1, 3, 32, 32)
    net = inference.prepare(rnet, agent)
    steps = SingleImage(net.eager, first, capture=lambda step: step)
    alone = SingleImage(inference.prepare(rnet).eager, first, capture=lambda step: step)
    for image in images:
        assert torch.equal(steps.decide(image), net.decide(image))
        assert_near(alone.alone(image), rnet.forward_full(image))
        for policy in (torch.ones(1, 9), torch.zeros(1, 9), *torch.randint(2, (3, 1, 9)).float()):
            assert_near(steps.under(image, policy), rnet(image, policy))


@pytest.mark.parametrize("policy_too", [True, False])
@torch.inference_mode()
def test_a_step_that_does_nothing_is_noticed(networks, policy_too):
    net, image, steps = inference.prepare(*networks[: 1 + policy_too]), torch.rand(1, 3, 32, 32), []
    SingleImage(net.eager, image, lambda step: steps.append(step) or step)
    before = iter(steps[:-1])  # the last step is the decision, or all blocks at once
    with pytest.raises(RuntimeError, match="gave other results"):
        SingleImage(net.eager, image, lambda step: step if next(before, None) else lambda: None)


def test_the_networks_stay_untouched(networks):
    before = fingerprint(*networks)
    networks[0].train()
    inference.prepare(*networks, precision="bf16")(torch.rand(2, 3, 32, 32))
    assert networks[0].training and all(p.requires_grad for p in networks[0].parameters())
    assert fingerprint(*networks) == before
    networks[0].eval()


@pytest.mark.parametrize(
    ("images", "policy", "message"),
    [
        (torch.rand(2, 3, 32, 32), torch.ones(2, 8), r"shape \(2, 8\), expected \(2, 9\)"),
        (torch.rand(2, 3, 32, 32), torch.full((2, 9), 0.5), r"values other than 0 \(drop\) and 1 \(keep\)"),
        (torch.rand(2, 3, 32, 32, device="meta"), None, "the images are on meta, the network on cpu"),
        (torch.rand(2, 1, 32, 32), None, r"shape \(2, 1, 32, 32\), expected \(N, 3, H, W\)"),
    ],
)
def test_what_cant_be_run_is_said(networks, images, policy, message):
    with pytest.raises(ValueError, match=message):
        inference.prepare(*networks)(images, policy)
