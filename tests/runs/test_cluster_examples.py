"""The examples for Slurm and Kubernetes: valid, and their commands do what they say, run as processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from shards.manifest import load_manifest
from shards.verify import verify
from tests.conftest import REPOSITORY
from tests.support.object_storage import free_ports
from tests.support.training_run import TINY

KUBERNETES = sorted((REPOSITORY / "docker/kubernetes").glob("*.yaml"))
SLURM = REPOSITORY / "docker/slurm"
SMALL = ("crops.size=64", "crops.per_image=2", "images_per_shard=4")


def resources(path: Path) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(path.read_text()))


@pytest.mark.parametrize("version", ["1.29", kubernetes_validate.latest_version()])
@pytest.mark.parametrize("path", KUBERNETES, ids=lambda path: path.name)
def test_kubernetes_examples_follow_the_schema(path: Path, version: str) -> None:
    found = resources(path)
    assert found
    for resource in found:
        kubernetes_validate.validate(resource, version, strict=True)


def test_the_schema_would_notice_a_mistake() -> None:
    (job,) = resources(REPOSITORY / "docker/kubernetes/preprocess.yaml")
    job["spec"]["template"]["spec"]["containers"][0]["arguments"] = []
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(job, "1.29", strict=True)


def container(name: str) -> dict[str, Any]:
    *_, job = resources(REPOSITORY / f"docker/kubernetes/{name}.yaml")
    (found,) = job["spec"]["template"]["spec"]["containers"]
    return dict(found)


def test_the_two_jobs_name_the_same_set() -> None:
    """Their options must be equal, or finishing refuses what the parts have made."""
    parts, last = (container(name)["args"] for name in ("preprocess", "finish"))
    own = ("--part", "--workers", "--finish")
    assert [word for word in parts if not word.startswith(own)] == [word for word in last if not word.startswith(own)]
    *_, job = resources(REPOSITORY / "docker/kubernetes/preprocess.yaml")
    assert f"--part=$(JOB_COMPLETION_INDEX)/{job['spec']['completions']}" in parts
    assert job["spec"]["parallelism"] == job["spec"]["completions"]


@pytest.mark.slow
def test_the_commands_of_the_kubernetes_jobs(scenes: Path, tmp_path: Path) -> None:
    def run(name: str, index: int) -> None:
        words = [*container(name)["command"][1:], *container(name)["args"]]
        for old, new in (("$(JOB_COMPLETION_INDEX)", str(index)), ("/16", "/3"), ("=ade20k", "=folder"),
                         ("/datasets/ADEChallengeData2016", str(scenes)), ("s3://bucket/shards-ade20k", "set"),
                         ("/staging", "staging"), ("--workers=8", "--workers=0")):
            words = [word.replace(old, new) for word in words]
        subprocess.run([sys.executable, REPOSITORY / words[0], *words[1:], *SMALL], cwd=tmp_path, check=True)

    for index in range(3):
        run("preprocess", index)
    run("finish", 0)
    assert verify(tmp_path / "set") == [] and load_manifest(tmp_path / "set").splits["train"].images == 12


def slurm(tmp_path: Path, **commands: str) -> dict[str, str]:
    """An environment with stand-ins for Slurm's commands, and with `python` and `torchrun` of this environment."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for name, text in {"srun": 'exec "$@"', **commands}.items():
        (tools / name).write_text(f"#!/bin/bash\n{text}\n")
        (tools / name).chmod(0o755)
    path = os.pathsep.join([str(tools), str(Path(sys.executable).parent), os.environ["PATH"]])
    return {**os.environ, "PATH": path, "SLURM_CPUS_PER_TASK": "1", "SLURM_JOB_ID": "7", "OMP_NUM_THREADS": "1"}


def bash(script: str, environment: dict[str, str], *words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["bash", SLURM / script, *map(str, words)], cwd=REPOSITORY, env=environment,
                          capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_a_slurm_array_shards_a_dataset(scenes: Path, tmp_path: Path) -> None:
    environment = slurm(tmp_path)
    words = ("--dataset", "folder", "--root", scenes, "--output", tmp_path / "set", *SMALL)
    for number in range(2):
        array = {"SLURM_ARRAY_TASK_ID": str(number), "SLURM_ARRAY_TASK_COUNT": "2"}
        done = bash("preprocess.sbatch", {**environment, **array}, *words)
        assert done.returncode == 0 and f"part {number} of 2 is there" in done.stdout, done.stderr
    done = bash("preprocess.sbatch", environment, "--finish", *words)
    assert done.returncode == 0, done.stderr
    assert verify(tmp_path / "set") == []


@pytest.mark.slow
def test_a_slurm_job_trains(scene_shards: Path, tmp_path: Path) -> None:
    environment = slurm(tmp_path, scontrol="echo 127.0.0.1")
    node = {"SLURM_JOB_NODELIST": "node1", "SLURM_JOB_NUM_NODES": "1", "SLURM_GPUS_ON_NODE": "2",
            "MASTER_PORT": str(free_ports(1)[0])}
    done = bash("train.sbatch", {**environment, **node}, "--config", TINY, f"data.root={scene_shards}",
                f"output_dir={tmp_path / 'run'}", "train.total_steps=2", "train.micro_batch_size=1")
    assert done.returncode == 0, done.stderr
    assert "finished" in done.stdout


@pytest.mark.parametrize(("state", "code"), [(75, "0"), (1, "3")])
def test_a_slurm_job_that_was_told_to_stop_is_queued_again(tmp_path: Path, state: int, code: str) -> None:
    """`torchrun` hides the ranks' exit codes, so the script asks the run's status: 75 is "resume me"."""
    asked = tmp_path / "asked"
    environment = slurm(tmp_path, srun="exit 3", python=f"exit {state}",
                        scontrol=f'[ "$1" = show ] && echo n1 || echo "$@" > {asked}')
    done = bash("train.sbatch", {**environment, "SLURM_JOB_NODELIST": "n1", "SLURM_JOB_NUM_NODES": "1"},
                "output_dir=RUN")
    assert str(done.returncode) == code
    assert asked.exists() == (state == 75) and (state != 75 or asked.read_text() == "requeue 7\n")
