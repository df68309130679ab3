"""Settings of the network: ViT, adapter and head."""

from __future__ import annotations

import operator
from dataclasses import dataclass

from shards.cli.settings import place, setting
from shards.errors import ConfigError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
TOKEN_STRIDE = 16  # pixels, along each axis, per token that a backbone hands to a head, whatever its own patch size
MOST_HEAD_PARAMETERS = 4_000_000_000  # four times the head of the largest published ViT


@dataclass(frozen=True, kw_only=True)
class RandomBackboneConfig:
    """A small DINOv3 ViT with random weights drawn from `seed`, for tests, demos and dry runs."""

    hidden_size: int | None = setting(None, "embedding dimension; null: no random backbone", minimum=4, maximum=16384)
    num_hidden_layers: int = setting(4, "transformer blocks", minimum=1, maximum=256)
    num_attention_heads: int = setting(2, "attention heads", minimum=1, maximum=512)
    intermediate_size: int = setting(256, "hidden width of the MLP in each block", minimum=1, maximum=65536)
    num_register_tokens: int = setting(4, "register tokens", minimum=0, maximum=4096)
    use_gated_mlp: bool = setting(False, "SwiGLU MLP, as in S+, H+ and 7B")
    seed: int = setting(0, "seed of the random weights", minimum=0, maximum=2**62)


@dataclass(frozen=True, kw_only=True)
class BackboneConfig:
    """The ViT: DINOv3 or DINOv2."""

    source: str | None = place("DINOv3, DINOv2 or EoMT model as a Hugging Face directory or hub id, e.g. "
                               "facebook/dinov3-vits16-pretrain-lvd1689m or facebook/dinov2-small; or a ViT as Meta's "
                               ".pth")
    random: RandomBackboneConfig = setting(RandomBackboneConfig, "random weights instead of `source`")
    layers: str = setting("FOUR_EVEN_INTERVALS", "blocks whose output tokens are used as features",
                          choices=("FOUR_EVEN_INTERVALS", "FOUR_LAST", "LAST"))
    patch_resize: str = setting("weights", "how a ViT with patches of another size than 16 pixels (DINOv2: 14) gives "
                                "one token per 16: resample the weights of its patch embedding, or scale the image",
                                choices=("weights", "image"))
    trainable: bool = setting(False, "train the ViT too; checkpoints then include it")
    rope_rescale: float | None = setting(None, "DINOv3: in training, multiply the coordinates of the rotary position "
                                         "embedding by a random factor from 1/x to x in every forward pass, as in the "
                                         "recipes of EoMT and PMT (2); null: never", minimum=1, maximum=16)
    image_mean: list[float] = setting(list(IMAGENET_MEAN), "per-channel mean of pixel values, on a 0..1 scale")
    image_std: list[float] = setting(list(IMAGENET_STD), "per-channel standard deviation, on a 0..1 scale")

    def __post_init__(self) -> None:
        for name, values in (("image_mean", self.image_mean), ("image_std", self.image_std)):
            if len(values) != 3 or (name == "image_std" and min(values) <= 0):
                raise ConfigError(f"backbone.{name} is {values}, legal: three numbers"
                                  f"{' above 0' if name == 'image_std' else ''}, one per channel")
        if self.source is not None and self.random.hidden_size is not None:
            raise ConfigError("backbone.source and backbone.random.hidden_size are both set; set only one of them")


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """DINOv3_Adapter (ViT-Adapter without injectors), with the reference's defaults."""

    conv_inplane: int = setting(64, "channels of the convolutional stem", minimum=1, maximum=1024)
    n_points: int = setting(4, "sampling points per head in deformable attention", minimum=1, maximum=64)
    deform_num_heads: int = setting(16, "attention heads in deformable attention", minimum=1, maximum=512)
    drop_path: float = setting(0.3, "stochastic depth rate of the extractors", minimum=0, maximum=0.99)
    cffn_ratio: float = setting(0.25, "hidden width of the convolutional FFN, as a fraction of the embedding "
                                "dimension", minimum=0.01, maximum=16)
    deform_ratio: float = setting(0.5, "value width of deformable attention, as a fraction of the embedding dimension; "
                                  "the result must be a multiple of deform_num_heads", minimum=0.01, maximum=16)


SIZE_DIVISORS = {"m2f": 2 * TOKEN_STRIDE, "linear": TOKEN_STRIDE, "eomt": TOKEN_STRIDE, "pmt": TOKEN_STRIDE}
"""Image height and width must be multiples of it: the stride of the adapter's coarsest map, or of the tokens."""


@dataclass(frozen=True, kw_only=True)
class DecoderHeadConfig:
    """The segmentation head. `trainer.build` chooses network and loss by `type`."""

    type: str = setting("m2f", "segmentation head", choices=("m2f", "linear", "eomt", "pmt"))
    num_queries: int = setting(100, "mask queries", minimum=1, maximum=65536, only_for=("m2f", "eomt", "pmt"))
    # Mask2Former
    hidden_dim: int = setting(256, "width of pixel decoder, queries and mask features (multiple of 32)", minimum=32,
                              maximum=4096, only_for=("m2f",))
    nheads: int = setting(16, "attention heads (must divide hidden_dim)", minimum=1, maximum=512, only_for=("m2f",))
    enc_layers: int = setting(6, "deformable encoder layers of the pixel decoder", minimum=1, maximum=64,
                              only_for=("m2f",))
    enc_ffn: int = setting(4096, "FFN width of the pixel decoder's encoder", minimum=1, maximum=65536,
                           only_for=("m2f",))
    dec_layers: int = setting(9, "layers of the mask decoder (m2f), or its plain blocks (pmt); dec_layers + 1 "
                              "predictions", minimum=1, maximum=64, only_for=("m2f", "pmt"))
    dec_ffn: int = setting(4096, "FFN width of the mask decoder", minimum=1, maximum=65536, only_for=("m2f",))
    # linear
    dropout: float = setting(0.1, "probability of dropping a feature channel", minimum=0, maximum=0.99,
                             only_for=("linear",))
    use_batchnorm: bool = setting(True, "batch norm on the features", only_for=("linear",))
    use_cls_token: bool = setting(False, "concatenate the class token to every patch feature", only_for=("linear",))
    use_backbone_norm: bool = setting(True, "apply the ViT's final norm to the features", only_for=("linear",))
    # EoMT and PMT
    num_blocks: int = setting(4, "last ViT blocks, which also process the queries (giving num_blocks + 1 predictions)",
                              minimum=1, maximum=256, only_for=("eomt",))
    block_ffn: int | None = setting(None, "FFN width of the decoder's plain blocks; null: 4 times the ViT's width",
                                    minimum=1, maximum=65536, only_for=("pmt",))
    num_upscale_blocks: int = setting(2, "times the patch grid is upscaled by 2; 2 gives masks at stride 4", minimum=0,
                                      maximum=4, only_for=("eomt", "pmt"))
    mask_annealing: list[float] = setting([0.125, 0.8125], "interval of the run over which masked attention is phased "
                                          "out, as two fractions of train.total_steps", minimum=0, maximum=1,
                                          only_for=("eomt", "pmt"))
    mask_annealing_starts: list[int] = setting([], "steps at which masked attention starts to be phased out, one per "
                                               "block; empty: use mask_annealing", minimum=0,
                                               only_for=("eomt", "pmt"))
    mask_annealing_ends: list[int] = setting([], "steps at which masked attention is fully phased out, one per block",
                                             minimum=1, only_for=("eomt", "pmt"))

    @property
    def masked_blocks(self) -> int:
        """EoMT and PMT: how many blocks process the queries, `num_blocks` of the ViT or `dec_layers` of the decoder."""
        return self.num_blocks if self.type == "eomt" else self.dec_layers

    @property
    def size_divisor(self) -> int:
        """Height and width of the network's input images must be multiples of this."""
        return SIZE_DIVISORS[self.type]

    def __post_init__(self) -> None:
        if self.type == "m2f" and self.nheads > 0 and (self.hidden_dim % 32 or self.hidden_dim % self.nheads):
            raise ConfigError(f"decoder_head.hidden_dim is {self.hidden_dim}, legal: a multiple of 32 and of "
                              f"decoder_head.nheads ({self.nheads})")
        self._check_size()
        if len(self.mask_annealing) != 2 or self.mask_annealing[0] >= self.mask_annealing[1]:
            raise ConfigError(f"decoder_head.mask_annealing is {self.mask_annealing}, legal: two fractions from 0 to "
                              "1, the first below the second")
        starts, ends = self.mask_annealing_starts, self.mask_annealing_ends
        if starts or ends:
            blocks = self.masked_blocks
            if [len(starts), len(ends)] != [blocks] * 2 or any(map(operator.ge, starts, ends)):
                raise ConfigError(f"decoder_head.mask_annealing_starts is {list(starts)} and .mask_annealing_ends "
                                  f"{list(ends)}, legal: {blocks} steps each, one per block "
                                  f"({'num_blocks' if self.type == 'eomt' else 'dec_layers'}), every start below its "
                                  "end; or none, to use decoder_head.mask_annealing")

    def check_blocks(self, dim: int) -> None:
        """Limit the size of a decoder of `dec_layers` ViT blocks of width `dim`, like `_check_size`."""
        ffn = self.block_ffn or 4 * dim
        _check_parameters(self.dec_layers * dim * (4 * dim + 2 * ffn) + dim * self.num_queries,
                          "dec_layers, block_ffn or num_queries")

    def _check_size(self) -> None:
        """Limit the head's total size: settings from untrusted files can each be legal and still exhaust memory."""
        width = self.hidden_dim
        layers = self.enc_layers * (2 * self.enc_ffn + 4 * width) + self.dec_layers * (2 * self.dec_ffn + 8 * width)
        parameters = width * (layers + 2 * self.num_queries)
        if self.type == "m2f":
            _check_parameters(parameters, "hidden_dim, enc_ffn, dec_ffn or the number of layers")


def _check_parameters(parameters: int, names: str) -> None:
    if parameters > MOST_HEAD_PARAMETERS:
        raise ConfigError(f"decoder_head has {parameters / 1e9:.1f} G parameters, legal: at most "
                          f"{MOST_HEAD_PARAMETERS / 1e9:.0f} G; lower {names}")
