"""docker/compose.yaml: its services, run as processes in the order it gives, against a real S3 server."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from shards.verify import verify
from tests.conftest import REPOSITORY
from tests.support.object_storage import FaultyProxy

COMPOSE = yaml.safe_load((REPOSITORY / "docker/compose.yaml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
FEWER = {"scenes": ["--train", "6", "--val", "2"], "preprocess": ["--workers", "0", "crops.size=64"],
         "train": ["train.total_steps=2", "train.eval_every=2", "data.workers=0", "train.global_batch_size=2",
                   "train.micro_batch_size=2", "eval.panels=0"]}


def in_order() -> list[str]:
    """The services, each after those that it depends on."""
    order: list[str] = []
    while len(order) < len(SERVICES):
        order += [name for name, service in SERVICES.items()
                  if name not in order and set(service.get("depends_on", {})) <= set(order)]
    return order


def test_each_service_waits_for_what_it_needs() -> None:
    assert in_order() == ["store", "scenes", "preprocess", "train", "evaluate"]
    assert SERVICES["preprocess"]["depends_on"]["store"]["condition"] == "service_healthy"
    for name in ("preprocess", "train", "evaluate"):
        assert "service_completed_successfully" in {wait["condition"] for wait in
                                                    SERVICES[name]["depends_on"].values()}
        assert SERVICES[name]["environment"].keys() >= {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT"}


def test_the_store_knows_the_credentials_that_the_services_use() -> None:
    (identity,) = json.loads((REPOSITORY / "docker/s3.json").read_text())["identities"]
    default = {name: re.fullmatch(r"\$\{\w+:-(.+)\}", value)[1] for name, value in COMPOSE["x-storage"].items()}
    assert identity["credentials"] == [{"accessKey": default["AWS_ACCESS_KEY_ID"],
                                        "secretKey": default["AWS_SECRET_ACCESS_KEY"]}]


def test_every_example_of_the_trainer_says_how_much_shared_memory() -> None:
    """Containers get 64 MB of /dev/shm, Kubernetes pods as well."""
    assert SERVICES["train"]["shm_size"]
    examples = re.findall(r"docker run .*maskstream-trainer train.*", (REPOSITORY / "docker/README.md").read_text())
    assert examples and all("--shm-size" in example for example in examples)
    text = (REPOSITORY / "docker/kubernetes/train.yaml").read_text()
    assert "mountPath: /dev/shm" in text and "medium: Memory" in text


@pytest.mark.slow
def test_the_services_as_processes(s3: FaultyProxy, s3_root: str, tmp_path: Path) -> None:
    """The commands of the file, with its folders and its store replaced, and fewer steps."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "RANKS": "1",
                   "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])}
    for name in in_order()[1:]:
        service = SERVICES[name]
        own = ["python", "preprocess/make_shards.py"] if "preprocess" in service["image"] else ["sh", "docker/entry.sh"]
        entry = service.get("entrypoint", own)
        words = [word.replace("/data/", f"{tmp_path}/").replace("s3://maskstream/shards", f"{s3_root}/shards")
                 for word in [*entry, *service["command"], *FEWER.get(name, [])]]
        done = subprocess.run(words, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{name}: {done.stderr[-2000:]}"
        if name == "preprocess":
            assert verify(f"{s3_root}/shards") == []
    assert "mIoU" in done.stdout
