"""Publish an export on the Hugging Face hub, from where `load_pretrained("ORG/NAME")` loads it.

Weights that others publish under a licence which has to be accepted (DINOv3's) are not passed on unless asked for: the
export then names the ViT, with its hash, instead of containing it, and loading gets it from where it was published.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.utils import HFValidationError, validate_repo_id

from shards.errors import ConfigError
from shards.files.atomic import write_atomically
from trainer.evaluation.record import measured, usual_folder
from trainer.exporting.files import ExportError
from trainer.exporting.model_card import CARD_NAME, LICENSES, CardFacts, found_data, model_card
from trainer.models.hub import is_hub_id
from trainer.pretrained import Pretrained, model_identity

# What an earlier upload of ours may have left in the repository; other files there stay.
_REPLACED = ["model.safetensors*", "config.json", "meta/*", "program.pt2*", "model.onnx*"]
_LONGEST_ID = 96  # characters
_LONGEST = 400  # characters of a message of the hub
_LICENSE_ID = re.compile(r"[a-z0-9][a-z0-9.+-]*")
_DATASET_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


@dataclass(frozen=True, kw_only=True)
class Publication:
    """What to publish where. Raises ConfigError for malformed ids, and for formats without one that can be loaded."""

    repo_id: str
    formats: Sequence[str]
    public: bool = False  # of a new repository
    include_backbone: bool = False  # also where the ViT's licence has to be accepted
    license: str | None = None
    dataset: str | None = None  # id on the hub of the training data

    def __post_init__(self) -> None:
        if not is_hub_id(self.repo_id) or not _is_repo_id(self.repo_id):
            raise ConfigError(f"--push-to-hub is {self.repo_id!r}, legal: ORGANISATION/NAME or USER/NAME, of letters, "
                              "digits, '-', '_' and '.', together at most 96, without '-' or '.' at an end, '--', "
                              "'..' or a final .git")
        if "directory" not in self.formats:
            raise ConfigError(f"--formats is {' '.join(self.formats)}, legal with --push-to-hub: directory, with or "
                              "without others, as load_pretrained reads that")
        if self.dataset is not None and not _DATASET_ID.fullmatch(self.dataset):
            raise ConfigError(f"--dataset is {self.dataset!r}, legal: the id of a data set on the hub, such as "
                              "zhoubolei/scene_parse_150; without it the card names the shard set")
        if self.license is not None and not _LICENSE_ID.fullmatch(self.license):
            raise ConfigError(f"--license is {self.license!r}, legal: an id of {LICENSES}, such as apache-2.0, "
                              "cc-by-nc-4.0 or other")


def _is_repo_id(text: str) -> bool:
    """Whether the hub takes it as the id of a repository."""
    try:
        validate_repo_id(text)
    except HFValidationError:
        return False
    return len(text) <= _LONGEST_ID


def check_access(publication: Publication) -> None:
    """Raise ExportError unless the hub can be reached and knows the user; before anything slow is done."""
    with _one_line(publication.repo_id, "Log in with `hf auth login`, and check the network"):
        HfApi().whoami()


def backbone_to_name(pretrained: Pretrained, publication: Publication) -> str | None:
    """Hub id of a ViT that must not be contained in what is published; None if it may be.

    Raises ConfigError if it must not, but cannot be left out.
    """
    backbone, config = pretrained.model.backbone, pretrained.config.backbone
    if publication.include_backbone or not backbone.is_gated or config.random.hidden_size is not None:
        return None
    reason = (f"the model contains a {backbone.family} ViT, whose weights are published under the {backbone.license} "
              "and only given to those who accept it")
    consent = "to publish them under that licence, with a copy of it, give --include-backbone"
    if config.trainable:
        raise ConfigError(f"{reason}. They were trained further, so they cannot be left out; {consent}")
    if others := [name for name in publication.formats if name != "directory"]:
        raise ConfigError(f"{reason}. --formats {' '.join(others)} would contain them; leave these out, or, {consent}")
    if (source := backbone_id(pretrained)) is None:
        raise ConfigError(f"{reason}. An upload names them instead, but backbone.source is {config.source}, legal: a "
                          f"hub id; give --set backbone.source=ORG/NAME, where they were published, or, {consent}")
    return source


def backbone_id(pretrained: Pretrained) -> str | None:
    """Where on the hub the ViT came from, if it did."""
    source = pretrained.config.backbone.source
    return source if source is not None and is_hub_id(source) and not Path(source).exists() else None


def notes(pretrained: Pretrained, named: str | None) -> Iterator[str]:
    """What the user should know before the world does; `named` as from `backbone_to_name`."""
    backbone = pretrained.model.backbone
    if named is not None:
        yield (f"the {backbone.family} ViT's weights are not part of the export: load_pretrained gets them from "
               f"{named}, for who has accepted their licence, and compares their sha256")
    elif backbone.is_gated and pretrained.config.backbone.random.hidden_size is None:
        yield (f"the export contains weights of {backbone.family}: their licence, {backbone.license}, applies to it, "
               "and a copy of it has to be in the repository")


def write_card(pretrained: Pretrained, folder: Path, publication: Publication, checkpoint: Path,
               named: str | None) -> Path:
    """README.md beside the export's other files; `checkpoint` is where the model came from, `named` as from
    `backbone_to_name`."""
    name, images = found_data(pretrained)
    facts = CardFacts(
        repo_id=publication.repo_id,
        formats=publication.formats,
        contains_backbone=named is None,
        dataset=publication.dataset or name,
        dataset_id=publication.dataset,
        images=images,
        measured=measured(usual_folder(checkpoint), model_identity(pretrained)) if checkpoint.exists() else None,
        license=publication.license,
        backbone_id=backbone_id(pretrained),
    )
    path = folder / CARD_NAME
    write_atomically(path, model_card(pretrained, facts).encode())
    return path


def describe(folder: Path, publication: Publication) -> str:
    """What `upload` would do."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    size = sum(path.stat().st_size for path in files) / 1e6
    return (f"dry run, nothing was uploaded. Without --dry-run, {len(files)} files ({size:.1f} MB) of {folder} go to "
            f"{publication.repo_id} ({_visibility(publication)} if it is new): "
            f"{', '.join(path.relative_to(folder).as_posix() for path in files)}")


def upload(folder: Path, publication: Publication) -> str:
    """Create the repository if there is none, and upload the folder in one commit; returns what to say about it.

    A card that is there already is kept: the user may have edited it. Raises ExportError.
    """
    repo_id = publication.repo_id
    with _one_line(repo_id, f"The export is complete in {folder}; check the network, and that your token may write to "
                            f"{repo_id}, then run `hf upload {repo_id} {folder} .`"):
        api = HfApi()
        api.create_repo(repo_id, private=not publication.public, exist_ok=True)
        keeps_card = api.file_exists(repo_id, CARD_NAME)
        commit = api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message="Upload from MaskStream",
                                   ignore_patterns=[CARD_NAME] if keeps_card else None, delete_patterns=_REPLACED)
    kept = f"; the {CARD_NAME} there was kept, the new one is in {folder}" if keeps_card else ""
    return f'uploaded: {commit.commit_url}; load it with load_pretrained("{repo_id}"){kept}'


def _visibility(publication: Publication) -> str:
    return "public" if publication.public else "private"


@contextmanager
def _one_line(repo_id: str, advice: str) -> Iterator[None]:
    """Turn whatever the hub's client raises, errors of several libraries, into one line."""
    try:
        yield
    except Exception as error:
        message = " ".join(str(error).split()) or type(error).__name__
        raise ExportError(f"--push-to-hub {repo_id}: {message[:_LONGEST].rstrip('.')}. {advice}") from error
