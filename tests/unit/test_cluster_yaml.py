"""cluster.yaml, against Ray's own schema and against what makes it safe."""

from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

ROOT = Path(__file__).parents[2]


@pytest.fixture
def config() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "cluster.yaml").read_text())


def test_it_is_valid_for_rays_launcher(config):
    prepared = prepare_config(config)
    validate_config(prepared)
    assert prepared["available_node_types"]["gpu"]["resources"] == {"CPU": 8, "GPU": 1}


def test_ray_would_refuse_what_is_wrong(config):
    """The check above can fail."""
    for wrong in ({"clustr_name": "x"}, {"head_node_type": "none"}):
        with pytest.raises((jsonschema.ValidationError, ValueError)):
            validate_config(prepare_config({**config, **wrong}))
    config["available_node_types"]["gpu"]["resources"]["GPU"] = 0.5
    with pytest.raises(jsonschema.ValidationError):
        validate_config(prepare_config(config))


def test_the_head_has_no_gpu_and_gpu_nodes_come_when_asked_for(config):
    types = config["available_node_types"]
    assert "GPU" not in types[config["head_node_type"]]["resources"]
    assert types["gpu"]["min_workers"] == 0 and 0 < types["gpu"]["max_workers"] <= config["max_workers"]


def test_every_node_asks_for_the_token_and_the_dashboard_is_not_open(config):
    starts = [command for key in ("head", "worker") for command in config[f"{key}_start_ray_commands"] if "ray start" in command]
    assert len(starts) == 2 and all("RAY_AUTH_MODE=token" in command for command in starts)
    assert "--dashboard-host=127.0.0.1" in starts[0] and "ray-client-server-port" not in starts[0]
    assert config["file_mounts"]["/home/ray/.ray/auth_token"] == "~/.ray/auth_token"


def test_what_is_installed_on_the_nodes_is_here_and_of_one_ray(config):
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line and line[0] != "#")
    images = [config["docker"]["image"], config["available_node_types"]["gpu"]["docker"]["worker_image"]]
    assert all(f"rayproject/ray:{pins['ray']}-" in image for image in images)
    assert (ROOT / config["file_mounts"]["/home/ray/orchestrator/constraints.txt"]).is_file()
    assert "orchestrator/dist/*.whl" in config["setup_commands"][0]
