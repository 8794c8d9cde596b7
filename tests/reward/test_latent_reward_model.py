"""LatentRewardModel: the published architecture on every family, and who gets gradients from it."""

from __future__ import annotations

import copy

import pytest
import rewardnets
import torch
from rewardnets import HEADS, twin, wake, written_out
from torch import Tensor, nn

import prfl_fast
from prfl_fast import LatentRewardModel, reward_feedback_loss

pytest.importorskip("diffusers")

# The trunk's arithmetic is the transformer's, bit for bit. The head is float64 on both sides, 1e3 roundings of 1.1e-16
# at a condition of 1e2 at the most; where the trunk computes in float32 inside (Wan) it does so on both sides.
TOLERANCE = 1e-11


def assert_close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    assert float((actual - expected).detach().norm()) <= tolerance * float(expected.detach().norm())


@pytest.mark.parametrize("copied", [True, False])
@pytest.mark.parametrize("num_blocks", [1, 2])
@pytest.mark.parametrize("family", rewardnets.FAMILIES)
def test_equals_the_architecture_written_out(family: str, num_blocks: int, copied: bool) -> None:
    source = twin(family)
    model = wake(LatentRewardModel.from_transformer(source.net, num_blocks, HEADS, copy=copied))
    assert model.num_blocks == num_blocks
    x = source.latents.clone().requires_grad_()
    logits = {}
    for noise_level in (0.0, 437.5, 999.0):
        t = torch.tensor(noise_level)
        logits[noise_level] = model(x, t, **source.conditioning)
        expected = written_out(model, source, x, t, source.conditioning)
        assert logits[noise_level].shape == (x.shape[0],)
        assert_close(logits[noise_level], expected, TOLERANCE)
        ours, theirs = (torch.autograd.grad(value.sum(), x)[0] for value in (logits[noise_level], expected))
        # Wan keeps float32 inside: the gradient's float32 sums may be added in another order.
        assert_close(ours, theirs, 1e-5 if family == "wan" else 1e-9)
        assert ours.any()
    # The noise level and the sample count.
    assert (logits[0.0] - logits[999.0]).abs().min() > 1e-6
    assert (logits[0.0][0] - logits[0.0][1]).abs() > 1e-6


def test_one_timestep_a_sample() -> None:
    source = twin()
    model = wake(LatentRewardModel.from_transformer(source.net, 2, HEADS))
    both = model(source.latents, torch.tensor([900.0, 100.0]), **source.conditioning)
    for index, t in enumerate((900.0, 100.0)):
        # The batch counts in the shape of the trunk's products: float32 inside Wan, 1e2 roundings of 6e-8.
        alone = model(source.latents, torch.tensor(t), **source.conditioning)[index]
        assert_close(both[index], alone, 1e-5)


def test_a_trunk_of_its_own_is_trained_and_the_transformer_is_not_touched() -> None:
    source = twin()
    source.net.requires_grad_(False)  # as with LoRA; the copy is to be trained all the same
    model = wake(LatentRewardModel.from_transformer(source.net, 2, HEADS))
    model(source.latents, torch.tensor(500), **source.conditioning).sum().backward()
    lacking = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    assert lacking == set()
    assert all(parameter.grad is None for parameter in source.net.parameters())
    own = {id(parameter) for parameter in model.parameters()}
    assert not own & {id(parameter) for parameter in source.net.parameters()}
    before = model(source.latents, torch.tensor(500), **source.conditioning)
    with torch.no_grad():
        for parameter in source.net.parameters():
            parameter.add_(1.0)
    assert torch.equal(model(source.latents, torch.tensor(500), **source.conditioning), before)


def test_a_shared_trunk_is_constant_and_out_of_reach() -> None:
    source = twin()
    trained = [source.net.blocks[0].ffn.net[2].weight]
    source.net.requires_grad_(False)
    trained[0].requires_grad_(True)
    model = wake(LatentRewardModel.from_transformer(source.net, 2, HEADS, copy=False))
    assert all(name.startswith(("query_attention.", "mlp.")) for name, _ in model.named_parameters())
    assert all(name.startswith(("query_attention.", "mlp.")) for name in model.state_dict())
    text = source.conditioning["encoder_hidden_states"].clone().requires_grad_()
    x = source.latents.clone().requires_grad_()
    model(x, torch.tensor(500), encoder_hidden_states=text).sum().backward()
    assert x.grad is not None and x.grad.any() and text.grad is not None and text.grad.any()
    assert trained[0].grad is None and trained[0].requires_grad
    assert all(parameter.grad is not None for parameter in model.parameters())
    model.requires_grad_(False).eval().bfloat16()
    assert trained[0].requires_grad and trained[0].dtype == torch.float64
    # No gradient of the transformer's own loss is lost, and flags come back after an error, too.
    source.call(x.detach(), torch.tensor(500), source.conditioning).sum().backward()
    assert trained[0].grad is not None
    with pytest.raises(TypeError):
        model(x, torch.tensor(500), no_such_keyword=1, **source.conditioning)
    assert trained[0].requires_grad


def test_a_shared_trunk_refuses_what_would_train_it() -> None:
    source = twin()
    model = LatentRewardModel.from_transformer(source.net, 1, HEADS, copy=False)
    source.net.enable_gradient_checkpointing()
    with pytest.raises(ValueError, match="gradient checkpointing.*copy=True"):
        model(source.latents, torch.tensor(500), **source.conditioning)
    assert source.net.blocks[0].ffn.net[2].weight.requires_grad
    source.net.requires_grad_(False)
    x = source.latents.clone().requires_grad_()
    wake(model)(x, torch.tensor(500), **source.conditioning).sum().backward()
    assert x.grad is not None and x.grad.any()


def test_own_trunk_under_gradient_checkpointing() -> None:
    source = twin()
    model = wake(LatentRewardModel.from_transformer(source.net, 2, HEADS))
    gradients = []
    for _ in range(2):
        loss = model(source.latents, torch.tensor(500), **source.conditioning).sum()
        gradients.append(torch.autograd.grad(loss, list(model.parameters())))
        model.trunk.body.enable_gradient_checkpointing()
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("copied", [True, False])
def test_a_frozen_reward_trains_a_generator_through_the_chain(copied: bool) -> None:
    """PRFL: one random step, the reward on the latent after it; the generator's gradient is the loop's."""
    source = twin()
    reward = wake(LatentRewardModel.from_transformer(source.net, 1, HEADS, copy=copied)).requires_grad_(False)
    generator = source.net
    sample = prfl_fast.unrolled_sample(
        generator, source.scheduler, source.latents, None, conditioning=source.conditioning, gradient="step:1",
        stop_step=2,
    )  # fmt: skip
    reward_feedback_loss(reward(sample.latents, sample.timestep, **source.conditioning)).backward()
    found = {name: p.grad for name, p in generator.named_parameters() if p.grad is not None}
    assert all(parameter.grad is None for parameter in reward.parameters())

    # The same by hand: the step's call is the only one with a graph, the reward a constant function of the latent.
    generator.zero_grad()
    constant = copy.deepcopy(generator).requires_grad_(False)
    scheduler = copy.deepcopy(source.scheduler)
    latents = source.latents
    for step in range(2):
        t = scheduler.timesteps[step]
        with torch.set_grad_enabled(step == 1):
            prediction = source.call(latents, t, source.conditioning)
            latents = scheduler.step(prediction, t, latents, return_dict=False)[0]
    frozen = LatentRewardModel.from_transformer(constant, 1, HEADS, copy=False)
    frozen.load_state_dict({n: v for n, v in reward.state_dict().items() if not n.startswith("trunk.")})
    reward_feedback_loss(frozen(latents, scheduler.timesteps[2], **source.conditioning)).backward()
    expected = {name: p.grad for name, p in generator.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys() and len(found) > 10
    for name, gradient in expected.items():
        # float32 inside Wan and in the scheduler's step: 1e2 roundings of 6e-8 at a condition of 1e1.
        assert float((found[name] - gradient).norm()) <= 1e-4 * float(gradient.norm()) + 1e-12, name


def test_a_bfloat16_trunk_under_a_float32_head() -> None:
    source = twin()
    exact = wake(LatentRewardModel.from_transformer(source.net, 2, HEADS)).float()
    nn.Module.to(source.net, torch.bfloat16)
    model = LatentRewardModel.from_transformer(source.net, 2, HEADS)
    model.query_attention.load_state_dict(exact.query_attention.state_dict())
    model.mlp.load_state_dict(exact.mlp.state_dict())
    assert next(model.trunk.parameters()).dtype == torch.bfloat16
    assert all(p.dtype == torch.float32 for p in [*model.query_attention.parameters(), *model.mlp.parameters()])
    x = source.latents.float().requires_grad_()
    conditioning = {"encoder_hidden_states": source.conditioning["encoder_hidden_states"].float()}
    logits = model(x, torch.tensor(500), **conditioning)
    assert logits.dtype == torch.float32
    (gradient,) = torch.autograd.grad(logits.sum(), x)
    assert gradient.dtype == torch.float32 and gradient.any()
    # The head adds float32 roundings only: on the same bfloat16 features a float64 head says the same.
    features = model.trunk(x, torch.tensor(500), **conditioning)
    wide = copy.deepcopy(model.query_attention).double(), copy.deepcopy(model.mlp).double()
    assert_close(logits.double(), wide[1](wide[0](features)[:, 0]), 1e-5)  # 2e3 roundings of 6e-8, at random
    # bfloat16 features: two blocks of some 30 roundings of 2^-9 each, at random sqrt(60) * 2^-9 = 1.5 % of the spread.
    reference = exact(x.detach(), torch.tensor(500), **conditioning)
    assert_close(logits, reference, 0.1)


def test_autocast_reaches_the_trunk_and_the_perceptron_not_the_softmax() -> None:
    source = twin(dtype=torch.float32)
    model = wake(LatentRewardModel.from_transformer(source.net, 2, HEADS))
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(source.latents, torch.tensor(500), **source.conditioning)
    logits.float().sum().backward()
    assert logits.isfinite().all()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_wrong_arguments() -> None:
    source = twin()
    with pytest.raises(ValueError, match="num_blocks: .* 1..2, got 3"):
        LatentRewardModel.from_transformer(source.net, 3, HEADS)
    with pytest.raises(ValueError, match="num_heads: expected a divisor of the transformer's width 24, got 5"):
        LatentRewardModel.from_transformer(source.net, 1, 5)
    with pytest.raises(ValueError, match="num_heads: .* got 0"):
        LatentRewardModel.from_transformer(source.net, 1, 0)
    with pytest.raises(ValueError, match="features are known for Wan"):
        LatentRewardModel.from_transformer(nn.Linear(2, 2), 1, HEADS)
    model = LatentRewardModel.from_transformer(source.net, 1)  # the default of 8 heads divides 24
    assert model(source.latents, torch.tensor(1), **source.conditioning).isfinite().all()
