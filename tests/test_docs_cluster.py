"""The files to start a cluster with: what Ray's own schema wants, and settings that exist."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.options import stage_options

FOLDER = Path(__file__).resolve().parent.parent / "docs" / "cluster"


def load(name: str) -> Any:
    return yaml.safe_load((FOLDER / name).read_text())


def test_rays_launcher_accepts_its_file() -> None:
    import jsonschema
    import ray.autoscaler

    schema = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())
    config = load("ray-cluster.yaml")
    jsonschema.validate(config, schema)
    assert config["head_node_type"] in config["available_node_types"]
    [start] = config["head_start_ray_commands"][1:]
    assert "--object-store-memory=" in start
    assert "--num-cpus=0" in start, "no worker without a GPU"


def test_the_job_for_kubernetes_is_whole() -> None:
    job = load("kuberay.yaml")
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    cluster = job["spec"]["rayClusterSpec"]
    [workers] = cluster["workerGroupSpecs"]
    pods = [group["template"]["spec"] for group in (cluster["headGroupSpec"], workers)]
    gpus = [pod["containers"][0]["resources"]["limits"].get("nvidia.com/gpu") for pod in pods]
    assert gpus == [None, "1"], "the head decides, workers work"
    for pod in pods:
        mounted = {mount["name"] for mount in pod["containers"][0]["volumeMounts"]}
        assert mounted == {volume["name"] for volume in pod["volumes"]} == {"shared", "memory"}


@pytest.mark.parametrize("name", ["ray-cluster.yaml", "kuberay.yaml", "README.md"])
def test_options_that_are_named_exist(name: str) -> None:
    def command() -> None: ...

    known = {word for option in stage_options(command).__click_params__ for word in option.opts}  # type: ignore[attr-defined]
    text = (FOLDER / name).read_text()
    used = {
        word
        for line in re.findall(r"pipeline (?:extract|plan|status)(.*(?:\n?.*--ray-address auto)?)", text)
        for word in re.findall(r"--[a-z-]+", line)
    }
    assert used
    assert used - {"--help"} <= known
    assert text.count("extract.precision=float16") >= 1, "the driver has no GPU, which auto would ask"
    for setting in re.findall(r"extract\.run\.(\w+)", text):
        from extract.config import ExecutionConfig

        assert setting in ExecutionConfig.model_fields
