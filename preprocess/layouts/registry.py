"""All layouts, by the name that `dataset.kind` gives. A new one is added here, and its name to KINDS in config.py."""

from __future__ import annotations

from preprocess.layouts.ade20k_full import ADE20KFull
from preprocess.layouts.camvid import CamVid
from preprocess.layouts.cityscapes import Cityscapes, CityscapesTrainIds
from preprocess.layouts.coco import CocoInstances, CocoPanoptic
from preprocess.layouts.coco_stuff import COCOStuff
from preprocess.layouts.folder import ADE20K, Folder
from preprocess.layouts.huggingface import HuggingFace
from preprocess.layouts.labelme import LabelMe
from preprocess.layouts.layout import Layout
from preprocess.layouts.loveda import LoveDA
from preprocess.layouts.mapillary import MapillaryV1, MapillaryV2
from preprocess.layouts.pascal import PascalContext, PascalVOC
from preprocess.layouts.yolo import YOLO

LAYOUTS: dict[str, Layout] = {layout.name: layout for layout in (
    ADE20K(), ADE20KFull(), CamVid(), Cityscapes(), CityscapesTrainIds(), CocoInstances(), CocoPanoptic(), COCOStuff(),
    LoveDA(), MapillaryV1(), MapillaryV2(), PascalContext(), PascalVOC(), Folder(), LabelMe(), YOLO(),
    HuggingFace())}
