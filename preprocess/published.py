"""Datasets that `preprocess/download.py` gets, and what is published about their files. None is part of MaskStream."""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from shards.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class PublishedFile:
    """One file on a server, and how to tell that it has arrived intact."""

    title: str
    name: str  # of the file
    url: str
    size: int  # bytes
    checksum: str  # algorithm of hashlib:hexadecimal digest
    licence: str
    home: str  # page with the full terms
    layout: str  # dataset.kind for make_shards.py


PUBLISHED = {
    # URL: the authors' CSAILVision/semantic-segmentation-pytorch, download_ADE20K.sh at ad30ddb, with http; others use
    #   https (the README of DUSA, ade20k.py of segmentation_robustness_framework), which protects it on the way.
    # Size and sha256: tensorflow/datasets, tensorflow_datasets/url_checksums/ade20k.txt at 6f96ef3. vernier's
    #   ade20k_val_cache has the same sha256, computed from the authors' server on 2026-05-30.
    # Other digests of the file: sha1 219e1696abb36c8ba3a3afe7fb2f4b4606a897c7 (dmlc/gluon-cv,
    #   scripts/datasets/ade20k.py at a121278), md5 7328b3957e407ddae1d3cbf487f149ef (ade20k.py as above).
    # Licence: the terms page, as quoted in huggingface.co/datasets/Benyooz/ADE20K (images) and in the dataset cards
    #   1aurent/ADE20K and zhoubolei/scene_parse_150 (annotations, BSD-3).
    "ade20k": PublishedFile(
        title="ADE20K scene parsing: 20,210 training and 2,000 validation images, 150 classes",
        name="ADEChallengeData2016.zip",
        url="https://data.csail.mit.edu/places/ADEchallenge/ADEChallengeData2016.zip",
        size=967_382_037,
        checksum="sha256:7ff1be44964418441f542a7cc1e1a650e7dc0fc275f5d23252bc9bbdbc977b29",
        licence="images: for non-commercial research and education only, MIT CSAIL does not own their copyright; "
                "annotations: BSD-3",
        home="https://groups.csail.mit.edu/vision/datasets/ADE20K/terms/",
        layout="ade20k",
    ),
}


def published_file(name: str) -> PublishedFile:
    """The file of a dataset. Raises ConfigError naming the nearest known dataset."""
    if name in PUBLISHED:
        return PUBLISHED[name]
    near = difflib.get_close_matches(name.lower(), PUBLISHED, n=1)
    raise ConfigError(f"unknown dataset {name!r}; {f'did you mean {near[0]!r}? ' if near else ''}"
                      f"legal: {', '.join(PUBLISHED)}")
