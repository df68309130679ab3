"""All layouts, by the name that `dataset.kind` gives."""

from __future__ import annotations

from preprocess.layouts.camvid import CamVid
from preprocess.layouts.folder import ADE20K, Folder
from preprocess.layouts.layout import Layout

LAYOUTS: dict[str, Layout] = {layout.name: layout for layout in (ADE20K(), CamVid(), Folder())}
