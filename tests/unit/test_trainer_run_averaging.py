"""The moving average of the weights: its formula, what it holds, and that it changes places with the model's."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from tests.support.training_run import assert_equal_states
from tests.unit.test_trainer_models_precision import NoWaiting, images, loss_of, model_of
from trainer.config import TrainConfig
from trainer.distributed import DistContext
from trainer.models import Segmenter
from trainer.run.averaging import AveragedWeights, decay_after, running_statistics

ALONE = DistContext(rank=0, world_size=1, device=torch.device("cpu"))


def averaged(model: Segmenter, decay: float = 0.9, *, warmup: bool = False) -> AveragedWeights:
    return AveragedWeights(model, TrainConfig(ema_decay=decay, ema_warmup=warmup), ALONE)


def step(model: Segmenter, seed: int) -> None:
    """New weights and running statistics, as after an optimiser step."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in [*(weight for weight in model.parameters() if weight.requires_grad), *running_statistics(model)]:
            tensor.copy_(torch.rand(tensor.shape, generator=generator))


@pytest.mark.parametrize(("updates", "decay", "warmup", "expected"), [
    (0, 0.999, True, 0.1), (8, 0.999, True, 0.5), (890, 0.999, True, 0.99), (10_000, 0.999, True, 0.999),
    (0, 0.999, False, 0.999), (0, 0.05, True, 0.05), (10**9, 0.0, True, 0.0)])
def test_the_decay_rises_to_its_final_value(updates: int, decay: float, warmup: bool, expected: float) -> None:
    assert decay_after(updates, decay, warmup) == pytest.approx(expected)


def test_it_is_the_average_that_torch_computes() -> None:
    """AveragedModel copies at its first call, averages all floating-point buffers, and copies a frozen ViT too."""
    model = model_of("m2f")
    ours, theirs = averaged(model), AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    theirs.update_parameters(model)
    for seed in range(3):
        step(model, seed)
        ours.update()
        theirs.update_parameters(model)
    state, reference = ours.state()["model"], theirs.module.trainable_state_dict()  # type: ignore[operator]
    assert state.keys() == reference.keys()
    for name, tensor in state.items():
        torch.testing.assert_close(tensor, reference[name], rtol=0, atol=0)


@pytest.mark.parametrize("head", ["m2f", "linear", "eomt", "pmt"])
def test_only_what_training_changes_is_held(head: str) -> None:
    """A frozen ViT is not copied; a trained one is averaged, in a layout of its own."""
    model = model_of(head)
    weights = averaged(model)
    trained = [*(weight for weight in model.parameters() if weight.requires_grad), *running_statistics(model)]
    assert sum(map(Tensor.numel, weights._averages)) == sum(map(Tensor.numel, trained))
    raw = {name: tensor.clone() for name, tensor in model.trainable_state_dict().items()}
    step(model, 1)
    weights.update()
    saved = weights.state()
    assert saved["updates"] == 1 and saved["model"].keys() == raw.keys()
    for name, tensor in model.trainable_state_dict().items():
        if tensor.is_floating_point() and "attn_mask_probs" not in name:
            torch.testing.assert_close(saved["model"][name], torch.lerp(raw[name], tensor, 0.1))
    again = model_of(head)
    step(again, 1)
    other = averaged(again)
    other.restore(saved)
    assert_equal_states(other.state(), saved)
    assert_equal_states(again.trainable_state_dict(), model.trainable_state_dict())


def test_a_model_borrows_the_averages_and_gets_its_weights_back() -> None:
    model = model_of("m2f")
    weights = averaged(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    step(model, 1)
    places = [weight.data_ptr() for weight in model.parameters()]
    own = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(KeyboardInterrupt), weights.in_model():
        assert_equal_states(dict(model.state_dict()), before)
        raise KeyboardInterrupt
    assert_equal_states(dict(model.state_dict()), own)
    assert places == [weight.data_ptr() for weight in model.parameters()]


def test_averages_of_batch_norm_follow_its_statistics_and_counters_are_shared() -> None:
    model = model_of("m2f")
    weights = averaged(model)
    model.train()(images())
    weights.update()
    norm = next(module for module in model.modules() if isinstance(module, nn.BatchNorm2d))
    assert norm.running_mean is not None and norm.num_batches_tracked is not None
    mean = norm.running_mean.clone()
    with weights.in_model():
        torch.testing.assert_close(norm.running_mean, 0.1 * mean)
        assert norm.num_batches_tracked == 1


def test_an_update_never_waits_for_the_device() -> None:
    model = model_of("eomt")
    weights = averaged(model, warmup=True)
    with NoWaiting():
        weights.update()


def test_training_goes_on_with_the_same_parameters_after_an_exchange() -> None:
    """Gradients, optimiser state and DDP's hooks belong to the parameters, which stay in place."""
    results = []
    for exchanges in (False, True):
        model = model_of("linear").train()
        weights = averaged(model)
        trained = [weight for weight in model.parameters() if weight.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            torch.manual_seed(0)
            loss_of(model(images())).backward()
            optimizer.step()
            weights.update()
            if exchanges:
                with weights.in_model(), torch.inference_mode():
                    model.eval()(images())
                model.train()
        results.append({**model.trainable_state_dict(), **weights.state()})
    assert_equal_states(results[0], results[1])


def test_it_starts_again_from_the_present_weights() -> None:
    model = model_of("linear")
    weights = averaged(model)
    weights.update()
    step(model, 3)
    weights.restore(None)
    assert_equal_states(weights.state(), {"model": dict(model.trainable_state_dict()), "updates": 0})
