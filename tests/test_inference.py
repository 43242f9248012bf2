"""The fast ways to run a ResNet under a policy give what the masked forward gives."""

import pytest
import torch
from test_networks import randomized

import utils
from models import inference


@pytest.fixture(scope="module")
def networks():
    torch.manual_seed(0)
    rnet, agent = utils.build_model("R20_SYN")
    return randomized(rnet), randomized(agent)


def some_policies(n):
    torch.manual_seed(1)
    return {
        "random": torch.randint(2, (n, 9)).float(),
        "all kept": torch.ones(n, 9),
        "all dropped": torch.zeros(n, 9),
        "the same for all": torch.tensor([[1.0, 0, 0, 1, 1, 0, 0, 1, 0]]).expand(n, 9),
        "half kept": torch.tensor([1.0, 0]).repeat_interleave(9)[:, None].view(2, 9).repeat(n, 1)[:n],
    }


@pytest.mark.parametrize("name", some_policies(1))
@pytest.mark.parametrize("n", [0, 1, 2, 7])
@torch.no_grad()
def test_conditional_is_masked(networks, name, n):
    rnet, agent = networks
    images, policy = torch.rand(n, 3, 32, 32), some_policies(n)[name]
    logits, used = inference.prepare(rnet, agent)(images, policy=policy)
    torch.testing.assert_close(logits, rnet(images, policy), atol=1e-4, rtol=1e-4)
    assert torch.equal(used, policy)


@torch.no_grad()
def test_the_agent_decides(networks):
    rnet, agent = networks
    agent.logit.bias.data.uniform_(-1, 1)
    images = torch.rand(6, 3, 32, 32)
    logits, policy = inference.prepare(rnet, agent)(images)
    assert torch.equal(policy, (agent(images)[0] >= 0.5).float())
    torch.testing.assert_close(logits, rnet(images, policy), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_alone_it_is_the_full_forward(networks):
    rnet, _ = networks
    images = torch.rand(3, 3, 32, 32)
    torch.testing.assert_close(
        inference.prepare(rnet)(images), rnet.forward_full(images), atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize("shared", [0, 4, 9])
@torch.no_grad()
def test_several_policies_share_what_they_have_in_common(networks, shared):
    rnet, _ = networks
    images = torch.rand(5, 3, 32, 32)
    policies = [torch.randint(2, (5, 9)).float() for _ in range(3)]
    for policy in policies:
        policy[:, :shared] = 1
    policies[1][2:4] = policies[0][2:4]
    for policy, logits in zip(policies, inference.prepare(rnet).under_each(images, policies), strict=True):
        torch.testing.assert_close(logits, rnet(images, policy), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_what_policies_share_is_computed_once(networks):
    """The first blocks, kept by all, once for each image; the rest twice only where policies differ."""
    net, computed = inference.prepare(networks[0]), []

    def counted(branch):
        def run(x, residual):
            computed.append(len(x))
            return branch(x, residual)

        return run

    net.blocks = [(shortcut, counted(branch)) for shortcut, branch in net.blocks]
    first = torch.ones(6, 9)
    first[:, 5] = 0
    second = first.clone()
    second[:2, 7] = 0  # two of six images
    net.under_each(torch.rand(6, 3, 32, 32), [first, second])
    assert computed == [6] * 5 + [8, 6, 8]  # no image keeps block 5


@torch.no_grad()
def test_bottlenecks_and_their_shortcuts_fold(networks):
    torch.manual_seed(0)
    rnet = randomized(utils.build_model("R50_ImgNet")[0])
    images, policy = torch.rand(2, 3, 64, 64), torch.randint(2, (2, 16)).float()
    expected = rnet(images, policy)
    torch.testing.assert_close(
        inference.prepare(rnet)(images, policy) / expected.std(), expected / expected.std(), atol=1e-3, rtol=0
    )


@torch.no_grad()
def test_steps_for_one_image_are_the_masked_forward(networks):
    """What CUDA captures, without CUDA: the steps are run instead of replayed."""
    rnet, agent = networks
    agent.logit.bias.data.uniform_(-1, 1)
    image = torch.rand(1, 3, 32, 32)
    net = inference.prepare(rnet, agent)
    with torch.inference_mode():
        steps = inference._SingleImage(net, image, capture=lambda function: function)
        for image in torch.rand(3, 1, 3, 32, 32):
            assert torch.equal(steps.decide(image), net.decide(image))
            for policy in some_policies(1).values():
                torch.testing.assert_close(
                    steps.under(image, policy.bool()), rnet(image, policy), atol=1e-4, rtol=1e-4
                )
        alone = inference._SingleImage(inference.prepare(rnet), image, capture=lambda function: function)
        torch.testing.assert_close(alone.alone(image), rnet.forward_full(image), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_steps_that_go_wrong_are_noticed(networks):
    net = inference.prepare(networks[0])
    with torch.inference_mode(), pytest.raises(RuntimeError, match="gave other logits"):
        inference._SingleImage(net, torch.rand(1, 3, 32, 32), capture=lambda function: lambda: None)


@torch.no_grad()
def test_a_decision_that_is_left_out_is_noticed(networks):
    net, image, steps = inference.prepare(*networks), torch.rand(1, 3, 32, 32), []

    def capture(function):
        steps.append(function)
        return function

    with torch.inference_mode():
        inference._SingleImage(net, image, capture)
        before = iter(range(1, len(steps)))  # the decision is captured last
        with pytest.raises(RuntimeError, match="gave another policy"):
            inference._SingleImage(net, image, lambda function: function if next(before, 0) else lambda: None)


@torch.no_grad()
def test_the_masked_way_decides_and_computes_alike(networks):
    rnet, agent = networks
    net = inference.prepare(rnet, agent)
    images = torch.rand(5, 3, 32, 32)
    for ours, expected in zip(net.masked(images), net(images), strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)


def test_the_networks_stay_untouched(networks):
    rnet, agent = networks
    rnet.train()
    before = utils.fingerprint(rnet, agent)
    net = inference.prepare(rnet, agent, precision="bf16")
    net(torch.rand(2, 3, 32, 32))
    assert utils.fingerprint(rnet, agent) == before and rnet.training
    assert all(p.requires_grad for p in rnet.parameters())
    rnet.eval()


@torch.no_grad()
def test_bf16_is_close(networks):
    rnet, _ = networks
    images, policy = torch.rand(4, 3, 32, 32), torch.randint(2, (4, 9)).float()
    expected = rnet(images, policy)
    logits = inference.prepare(rnet, precision="bf16")(images, policy)
    assert (logits - expected).norm() < 0.05 * expected.norm()


def test_bad_input(networks):
    rnet, agent = networks
    net = inference.prepare(rnet, agent)
    images = torch.rand(2, 3, 32, 32)
    with pytest.raises(ValueError, match=r"shape \(2, 8\), expected \(2, 9\)"):
        net(images, policy=torch.ones(2, 8))
    with pytest.raises(ValueError, match=r"values other than 0 \(drop\) and 1 \(keep\)"):
        net(images, policy=torch.full((2, 9), 0.5))
    with pytest.raises(ValueError, match="the images are on meta, the network on cpu"):
        net(images.to("meta"))
    with pytest.raises(ValueError, match=r"shape \(2, 1, 32, 32\), expected \(N, 3, H, W\)"):
        net(images[:, :1])
    with pytest.raises(ValueError, match="unknown precision 'fp8'"):
        inference.prepare(rnet, agent, precision="fp8")
    with pytest.raises(ValueError, match="cpu has no tf32"):
        inference.prepare(rnet, agent, precision="tf32")
