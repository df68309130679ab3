"""The shard format: images with sparse per-class RLE masks, in plain WebDataset tar files.

Reading from a folder needs numpy, pillow, msgpack and simplejpeg. Object storage also needs obstore and tenacity, which
are imported when the first URL is opened. torch is never imported.
"""

from shards.errors import (
    ConfigError,
    CorruptShardError,
    DatasetError,
    FormatVersionError,
    MaskStreamError,
    ShardError,
)
from shards.manifest import FORMAT_VERSION, ClassInfo, Manifest, load_manifest
from shards.reader import ShardReader, iter_samples
from shards.rle import decode_masks, decode_segment_map, encode_rle
from shards.sample import CropSample
from shards.verify import verify

__all__ = [
    "FORMAT_VERSION",
    "ClassInfo",
    "ConfigError",
    "CorruptShardError",
    "CropSample",
    "DatasetError",
    "FormatVersionError",
    "Manifest",
    "MaskStreamError",
    "ShardError",
    "ShardReader",
    "decode_masks",
    "decode_segment_map",
    "encode_rle",
    "iter_samples",
    "load_manifest",
    "verify",
]
