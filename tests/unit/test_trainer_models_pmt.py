"""PMT: any ViT, any grid; only the decoder trains; masked attention; what its files may contain."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from shards.errors import ConfigError
from tests.unit.test_trainer_models import all_predictions_loss
from trainer.build import build_model
from trainer.config import RunConfig, load_run_config
from trainer.models import Segmenter
from trainer.models.pmt import PmtHead, TokenNorm
from trainer.models.weights import read_weights
from trainer.optimizer import param_groups

CLASSES, QUERIES, BLOCKS = 5, 6, 2


def settings(*overrides: str) -> RunConfig:
    return load_run_config(None, [
        "backbone.random.hidden_size=32", "backbone.random.num_hidden_layers=8", "backbone.random.intermediate_size=48",
        "decoder_head.type=pmt", f"decoder_head.num_queries={QUERIES}", f"decoder_head.dec_layers={BLOCKS}",
        "decoder_head.block_ffn=40", "loss.matched_gradients=false", *overrides])


def model(*overrides: str, seed: int = 0) -> Segmenter:
    torch.manual_seed(seed)
    return build_model(settings(*overrides), CLASSES)


def images(height: int = 64, width: int = 96, batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(1))


def published(segmenter: Segmenter, path: Path, **extra: Tensor) -> Path:
    """The decoder in its authors' layout, written down here by hand."""
    state = {}
    for key, tensor in segmenter.head.state_dict().items():
        name = key.replace("class_predictor.", "class_head.").replace("upscale_block.block.", "upscale.")
        name = name.replace("layernorm2d.", "norm.").replace("query.", "q.")
        for layer in (1, 2, 3):
            name = name.replace(f"mask_head.fc{layer}.", f"mask_head.{2 * layer - 2}.")
        state[f"network.{'' if name.startswith('bn.') else 'decoder.'}{name}"] = tensor.clone()
    torch.save({**state, **extra}, path)
    return path


@pytest.mark.parametrize("size", [(64, 96), (16, 16), (48, 160)], ids=str)
def test_predictions_have_the_shapes_of_any_grid(size: tuple[int, int]) -> None:
    segmenter = model()
    outputs: Any = segmenter.train()(images(*size))
    predictions = [*outputs["aux_outputs"], outputs]
    assert len(predictions) == BLOCKS + 1
    for prediction in predictions:
        assert prediction["pred_logits"].shape == (2, QUERIES, CLASSES + 1)
        assert prediction["pred_masks"].shape == (2, QUERIES, size[0] // 4, size[1] // 4)
    assert "aux_outputs" not in segmenter.eval()(images(*size))


def test_only_the_decoder_trains() -> None:
    segmenter = model().train()
    before = segmenter.backbone.weights_sha256()
    all_predictions_loss(segmenter(images())).backward()
    missing = [name for name, parameter in segmenter.named_parameters()
               if parameter.requires_grad and parameter.grad is None]
    assert not missing and segmenter.backbone.weights_sha256() == before
    assert all(parameter.grad is None for parameter in segmenter.backbone.parameters())
    assert all(key.startswith("segmentation_model.1.") for key in segmenter.trainable_state_dict())


def test_a_trainable_vit_gets_gradients_through_all_taps() -> None:
    segmenter = model("backbone.trainable=true").train()
    all_predictions_loss(segmenter(images())).backward()
    assert not [name for name, parameter in segmenter.named_parameters()
                if parameter.requires_grad and parameter.grad is None]


def test_taps_are_the_quarters_even_of_a_vit_l() -> None:
    small = ["backbone.random.num_hidden_layers=24"]
    assert model(*small).backbone.layers == [5, 11, 17, 23], "Meta's heads on a ViT-L use 4 instead of 5"


def test_token_norm_is_a_batch_norm_over_batch_and_tokens() -> None:
    norm, tokens = TokenNorm(3), torch.randn(4, 7, 3)
    normed = norm(tokens)
    expected = (tokens - tokens.mean((0, 1))) / (tokens.var((0, 1), unbiased=False) + norm.eps).sqrt()
    torch.testing.assert_close(normed, expected, rtol=1e-4, atol=1e-5)


def test_a_masked_query_sees_its_mask_queries_and_prefix_and_an_unmasked_one_everything() -> None:
    segmenter = model()
    head = segmenter.head
    assert isinstance(head, PmtHead)
    masks = torch.full((1, QUERIES, 16, 24), -1.0)
    masks[0, 1, :8, :12] = 1.0
    tokens = QUERIES + 5 + 24
    allowed = head._allowed(masks, tokens, (4, 6), head.attn_mask_probs[0])
    seen = allowed[0, 0]
    assert seen[QUERIES:].all() and seen[:, : QUERIES + 5].all(), "tokens see all; all see queries and prefix"
    assert not seen[0, QUERIES + 5:].any(), "no rule frees a query that sees no patch"
    assert seen[1, QUERIES + 5:].view(4, 6)[:2, :3].all() and seen[1, QUERIES + 5:].sum() == 6


def test_masking_is_annealed_over_the_run() -> None:
    head = model("decoder_head.mask_annealing_starts=[0, 10]", "decoder_head.mask_annealing_ends=[10, 20]").head
    assert isinstance(head, PmtHead)
    shares = []
    for step in (0, 10, 20):
        head.set_progress(step, 20)
        shares.append(head.attn_mask_probs.tolist())
    assert shares == [[1.0, 1.0], [0.0, 1.0], [0.0, 0.0]]


def test_gradient_checkpointing_changes_nothing() -> None:
    gradients = []
    for enabled in ("false", "true"):
        segmenter = model(f"train.gradient_checkpointing={enabled}").train()
        torch.manual_seed(3)
        all_predictions_loss(segmenter(images())).backward()
        gradients.append({name: parameter.grad for name, parameter in segmenter.named_parameters()
                          if parameter.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


def test_a_random_scale_of_the_rotary_code_is_drawn_in_training_only() -> None:
    plain, scaled = model(), model("backbone.rope_rescale=2")
    scaled.load_state_dict(plain.state_dict())
    plain.eval(), scaled.eval()
    assert torch.equal(plain(images())["pred_masks"], scaled(images())["pred_masks"])
    draws = []
    for _ in range(2):
        torch.manual_seed(5)
        draws.append(scaled.train().backbone(images()).rope[0])
    assert torch.equal(*draws), "drawn from torch's generator"
    assert not torch.equal(draws[0], plain.train().backbone(images()).rope[0])
    torch.manual_seed(6)
    angles = [torch.atan2(*reversed(scaled.backbone(images(32, 32)).rope)) for _ in range(50)]  # (sin, cos)
    base = torch.atan2(*reversed(plain.backbone(images(32, 32)).rope))
    slow = base.abs().mean(0).argmin()  # its angles do not wrap
    ratios = torch.stack([(angle[0, slow] / base[0, slow]) for angle in angles])
    assert 0.5 <= float(ratios.min()) < 0.7 and 1.5 < float(ratios.max()) <= 2.0


def test_decoder_only_files_load_strictly(tmp_path: Path) -> None:
    trained = model(seed=1)
    path = published(trained, tmp_path / "pytorch_model.bin")
    fresh = model(seed=2)
    fresh.load_weights(read_weights(path))
    assert torch.equal(fresh.eval()(images())["pred_masks"], trained.eval()(images())["pred_masks"])
    with pytest.raises(ConfigError, match=r"missing: segmentation_model\.1\.blocks\.2"):
        model("decoder_head.dec_layers=3").load_weights(read_weights(path))
    with pytest.raises(ConfigError, match=r"of another shape: segmentation_model\.1\.blocks\.0\.mlp"):
        model("decoder_head.block_ffn=44").load_weights(read_weights(path))
    dropped = {"criterion.empty_weight": torch.ones(6), "network.decoder.pe.x": torch.ones(1)}
    model().load_weights(read_weights(published(trained, tmp_path / "older.bin", **dropped)))
    stray = published(trained, tmp_path / "stray.bin", **{"network.decoder.other": torch.ones(1)})
    with pytest.raises(ConfigError, match=r"not an EoMT or PMT of tue-mps; unexpected keys: network\.decoder\.other"):
        read_weights(stray)


def test_a_folder_or_hub_repository_with_nothing_but_the_file_is_taken(tmp_path: Path,
                                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "folder").mkdir()
    trained = model(seed=1)
    path = published(trained, tmp_path / "folder" / "pytorch_model.bin")
    asked = []

    def download(repository: str, name: str) -> str:
        asked.append((repository, name))
        return str(path)

    (tmp_path / "snapshot").mkdir()
    monkeypatch.setattr("trainer.models.hub.snapshot_download", lambda *_, **__: str(tmp_path / "snapshot"))
    monkeypatch.setattr("trainer.models.hub.hf_hub_download", download)
    for source in (tmp_path / "folder", "tue-mps/pmt"):
        fresh = model(seed=2)
        fresh.load_weights(read_weights(source))
        assert torch.equal(fresh.eval()(images())["pred_masks"], trained.eval()(images())["pred_masks"])
    assert asked == [("tue-mps/pmt", "pytorch_model.bin")]


def test_the_scales_are_not_decayed() -> None:
    segmenter = model()
    groups = {id(parameter): group["weight_decay"] for group in param_groups(segmenter, settings().optimizer)
              for parameter in group["params"]}
    head = segmenter.head
    assert isinstance(head, PmtHead)
    assert {groups[id(scale)] for scale in head.scalers} == {0.0}
    assert groups[id(head.blocks[0].layer_scale1.lambda1)] == groups[id(head.bn[0].weight)] == 0.0
    assert groups[id(head.blocks[0].mlp.up_proj.weight)] == 0.05


def test_a_decoder_of_impossible_size_is_refused_before_it_is_allocated() -> None:
    with pytest.raises(ConfigError, match=r"decoder_head has \d+\.\d G parameters, legal: at most 4 G; lower dec_l"):
        model("backbone.random.hidden_size=4096", "decoder_head.dec_layers=64", "decoder_head.block_ffn=16384",
              "backbone.random.num_hidden_layers=4", "backbone.random.num_attention_heads=4")
