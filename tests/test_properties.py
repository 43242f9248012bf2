"""Laws that must hold for any network, policy and batch, tried on many; and the algorithm, enumerated."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_networks import randomized
from torch.utils.flop_counter import FlopCounterMode

import utils
from models import inference

cases = settings(max_examples=25, deadline=None, derandomize=True)
networks = st.tuples(st.sampled_from(["R8_SYN", "R14_SYN", "R20_C100"]), st.integers(0, 99))
batches = st.tuples(st.integers(0, 6), st.integers(0, 99), st.sampled_from([0.0, 0.2, 0.5, 0.8, 1.0]))


def network_and_batch(network, batch):
    """Return a ResNet of random weights in eval mode, images (n, 3, 32, 32) and policies (n, K)."""
    model, weight_seed = network
    n, seed, keep = batch
    torch.manual_seed(weight_seed)
    rnet = randomized(utils.build_model(model)[0])
    torch.manual_seed(seed)
    return rnet, torch.rand(n, 3, 32, 32), (torch.rand(n, rnet.num_blocks) < keep).float()


@cases
@given(networks, batches)
@torch.no_grad()
def test_masked_single_and_conditional_agree(network, batch):
    rnet, images, policies = network_and_batch(network, batch)
    masked = rnet(images, policies)
    scale = masked.abs().max().item() if len(images) else 1
    for conditional in (rnet(images, policies, skip_dropped=True), inference.prepare(rnet)(images, policies)):
        torch.testing.assert_close(conditional / scale, masked / scale, atol=1e-4, rtol=0)
    for image, policy, logits in zip(images, policies, masked, strict=True):
        single = rnet.forward_single(image[None], policy)[0]
        torch.testing.assert_close(single / scale, logits / scale, atol=1e-4, rtol=0)


@cases
@given(networks, batches)
@torch.no_grad()
def test_flops_are_what_the_counter_counts(network, batch):
    rnet, images, policies = network_and_batch(network, batch)
    for image, policy, flops in zip(images, policies, utils.count_flops(rnet, policies), strict=True):
        with FlopCounterMode(display=False) as counter:
            rnet.forward_single(image[None], policy)
        assert counter.get_total_flops() == flops


@cases
@given(st.integers(1, 40), st.integers(1, 8), st.integers(0, 99), st.integers(1, 4))
def test_statistics_are_the_slow_formulas(n, num_blocks, seed, parts):
    torch.manual_seed(seed)
    policies, rewards, matches = (
        torch.randint(2, (n, num_blocks)).float(),
        torch.randn(n),
        torch.rand(n).round(),
    )
    accuracy, reward, sparsity, variance, policy_set = utils.performance_stats(
        policies.chunk(parts), rewards.chunk(parts), matches.chunk(parts)
    )
    kept = [sum(row) for row in policies.tolist()]
    assert accuracy == pytest.approx(sum(matches.tolist()) / n)
    assert reward == pytest.approx(sum(rewards.tolist()) / n, abs=1e-6)
    assert sparsity == pytest.approx(sum(kept) / n)
    spread = math.sqrt(sum((k - sparsity) ** 2 for k in kept) / max(1, n - 1))
    assert variance == pytest.approx(spread, abs=1e-5)
    assert policy_set == {"".join(str(int(u)) for u in row) for row in policies.tolist()}


@cases
@given(st.integers(2, 30), st.integers(1, 5), st.integers(0, 99))
def test_rank_correlation_is_the_correlation_of_ranks(n, levels, seed):
    torch.manual_seed(seed)
    x, y = torch.randint(levels + 1, (n,)), torch.randn(n)

    def ranks(values):
        return [sum(v < w for v in values) + (values.count(w) + 1) / 2 for w in values]

    expected = torch.corrcoef(torch.tensor([ranks(x.tolist()), ranks(y.tolist())]))[0, 1]
    torch.testing.assert_close(
        torch.tensor(utils.rank_correlation(x, y)), expected, equal_nan=True, atol=1e-5, rtol=1e-5
    )


# A toy of two blocks whose rewards are known: all four policies can be enumerated.
REWARDS = {(0, 0): -1.0, (0, 1): 0.75, (1, 0): -1.0, (1, 1): 0.0}


def rewards_of(policies):
    return torch.tensor([REWARDS[tuple(map(int, policy))] for policy in policies.tolist()])


@cases
@given(st.lists(st.floats(-3, 3), min_size=2, max_size=2), st.sampled_from([0.1, 1]))
def test_the_policys_gradient_is_that_of_the_expected_reward(algorithm, start, temperature):
    """The loss, averaged over all policies by their probability, has the expected reward's gradient."""
    every = torch.tensor(list(itertools.product([0.0, 1.0], repeat=2)))

    def explored_and_chances(logits):
        explored = algorithm.explore(torch.sigmoid(logits), 0.8, temperature)
        return explored, (explored * every + (1 - explored) * (1 - every)).prod(1)

    logits = torch.tensor(start, requires_grad=True)
    _, chances = explored_and_chances(logits)
    (expected,) = torch.autograd.grad((chances * rewards_of(every)).sum(), logits)

    explored, chances = explored_and_chances(logits)
    greedy = (torch.sigmoid(logits) >= 0.5).float()[None]
    advantage = rewards_of(every) - rewards_of(greedy)
    loss = sum(
        chance.detach() * algorithm.policy_loss(explored[None], policy[None], a[None], 2, beta=0)
        for chance, policy, a in zip(chances, every, advantage, strict=True)
    )
    (found,) = torch.autograd.grad(-loss, logits)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_a_trained_toy_finds_the_best_policy(algorithm):
    torch.manual_seed(0)
    logits = torch.zeros(2, requires_grad=True)
    optimizer = torch.optim.Adam([logits], 0.05)
    for _ in range(200):
        probs = torch.sigmoid(logits).expand(64, 2)
        explored = algorithm.explore(probs, alpha=0.8)
        sampled = torch.bernoulli(explored.detach())
        advantage = rewards_of(sampled) - rewards_of((probs >= 0.5).float())
        optimizer.zero_grad()
        algorithm.policy_loss(explored, sampled, advantage, 2, beta=0.1).backward()
        optimizer.step()
    best = max(REWARDS, key=REWARDS.get)
    assert tuple((logits >= 0).int().tolist()) == best
