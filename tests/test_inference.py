"""Networks prepared for inference give what the masked forward gives, and say no to what can't be run."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_networks import networks
from torch.utils.flop_counter import FlopCounterMode

from models import inference
from models.lab.checkpoints import fingerprint
from utils import count_flops


def assert_near(found, expected):
    assert (found - expected).norm() <= 1e-4 * expected.norm()


@settings(max_examples=20, deadline=None, derandomize=True)
@example("R50_ImgNet", 3, 0, 0.5, True)
@example("R50_ImgNet", 3, 0, 0.5, False)
@given(
    st.sampled_from(["R8_SYN", "R14_SYN", "R20_C100"]),
    st.integers(0, 6),
    st.integers(0, 99),
    st.sampled_from([0.0, 0.2, 0.5, 0.8, 1.0]),
    st.booleans(),
)
@torch.no_grad()
def test_masked_single_and_conditional_agree(model, n, seed, keep, one_for_all):
    rnet, _ = networks(model, seed)
    images, policies = torch.rand(n, 3, 32, 32), (torch.rand(n, rnet.num_blocks) < keep).float()
    if one_for_all:
        policies = policies[:1].expand(n, -1)
    masked = rnet(images, policies)
    scale = masked.abs().max().item() if n else 1
    ways = [rnet(images, policies, skip_dropped=True), inference.prepare(rnet)(images, policies)]
    if one_for_all and n:
        ways.append(rnet.forward_single(images, policies[0]))
        ways.append(inference.prepare(rnet, policy=policies[0])(images))
    for found in ways:
        torch.testing.assert_close(found / scale, masked / scale, atol=1e-4, rtol=0)


def test_dropped_blocks_are_not_computed():
    rnet, _ = networks("R14_SYN")
    images, policies = torch.rand(4, 3, 32, 32), torch.randint(2, (4, 6)).float()
    policies[:, 1], policies[:, 2] = 0, 1  # kept by none, by all
    with FlopCounterMode(display=False) as counter:
        inference.prepare(rnet)(images, policies)
    assert counter.get_total_flops() == count_flops(rnet, policies).sum().item()


@torch.no_grad()
def test_the_agent_decides():
    rnet, agent = networks("R20_SYN")
    images, net = torch.rand(6, 3, 32, 32), inference.prepare(rnet, agent)
    images *= torch.arange(6)[:, None, None, None]  # so different that policies differ
    policy = (agent(images)[0] >= 0.5).float()
    assert len(policy.unique(dim=0)) > 1
    with torch.autocast("cpu", torch.bfloat16):  # the precision is that of `prepare`
        logits, decided = net(images)
    assert torch.equal(decided, policy)
    assert_near(logits, rnet(images, policy))
    assert torch.equal(net.decide(images), policy)
    assert_near(inference.prepare(rnet)(images), rnet.forward_full(images))


def test_one_policy_for_all_agrees_with_itself_and_is_checked():
    rnet, policy, batches = networks()[0], torch.tensor([1, 0, 1]), [(torch.rand(3, 3, 32, 32), None)]
    net = inference.prepare(rnet, policy=policy)
    same, apart = inference.agreement(net, inference.prepare(rnet), batches)
    assert 0 <= same <= 3 and apart > 0.01
    assert inference.agreement(net, net, batches) == (3, 0)
    for wrong, message in ((policy[1:], r"shape \(1, 2\), expected \(1, 3\)"), (policy / 2, "other than 0")):
        with pytest.raises(ValueError, match=message):
            inference.prepare(rnet, policy=wrong)


def test_the_networks_stay_untouched():
    rnet, agent = networks()
    before = fingerprint(rnet.train(), agent)
    inference.prepare(rnet, agent, precision="bf16")(torch.rand(2, 3, 32, 32))
    assert rnet.training and all(parameter.requires_grad for parameter in rnet.parameters())
    assert fingerprint(rnet, agent) == before


@pytest.mark.parametrize(
    ("images", "policy", "message"),
    [
        (torch.rand(2, 3, 32, 32), torch.ones(2, 2), r"shape \(2, 2\), expected \(2, 3\)"),
        (torch.rand(2, 3, 32, 32), torch.full((2, 3), 0.5), r"values other than 0 \(drop\) and 1 \(keep\)"),
        (torch.rand(2, 3, 32, 32, device="meta"), None, "the images are on meta, the network on cpu"),
        (torch.rand(2, 1, 32, 32), None, r"shape \(2, 1, 32, 32\), expected \(N, 3, H, W\)"),
    ],
)
def test_what_cant_be_run_is_said(images, policy, message):
    with pytest.raises(ValueError, match=message):
        inference.prepare(*networks())(images, policy)
