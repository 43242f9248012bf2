"""Laws that must hold for any network, policy and batch, tried on many."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_networks import randomized

import utils
from models import inference

cases = settings(max_examples=25, deadline=None, derandomize=True)


@cases
@given(
    st.sampled_from(["R8_SYN", "R14_SYN", "R20_C100"]),
    st.integers(0, 6),
    st.integers(0, 99),
    st.sampled_from([0.0, 0.2, 0.5, 0.8, 1.0]),
    st.booleans(),
)
@torch.no_grad()
def test_masked_single_and_conditional_agree(model, n, seed, keep, one_for_all):
    torch.manual_seed(seed)
    rnet = randomized(utils.build_model(model)[0])
    images, policies = torch.rand(n, 3, 32, 32), (torch.rand(n, rnet.num_blocks) < keep).float()
    if one_for_all:
        policies = policies[:1].expand(n, -1)
    masked = rnet(images, policies)
    scale = masked.abs().max().item() if n else 1
    ways = [rnet(images, policies, skip_dropped=True), inference.prepare(rnet)(images, policies)]
    if one_for_all and n:
        ways.append(rnet.forward_single(images, policies[0]))
    for found in ways:
        torch.testing.assert_close(found / scale, masked / scale, atol=1e-4, rtol=0)


@cases
@given(st.integers(1, 40), st.integers(1, 8), st.integers(0, 99), st.integers(1, 4))
def test_statistics_are_the_slow_formulas(n, num_blocks, seed, parts):
    torch.manual_seed(seed)
    policies, rewards, matches = (
        torch.randint(2, (n, num_blocks)).float(),
        torch.randn(n),
        torch.rand(n) < 0.5,
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
