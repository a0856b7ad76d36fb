"""The manifests are valid in Kubeflow Trainer's API models, which are installed in a separate environment."""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from strop.interop.job import kubernetes_manifests
from tests.interop.test_launch import job

PYTHON = os.environ.get("STROP_KUBEFLOW_PYTHON")
# A manifest after parsing by the models, which drop fields that the API does not have.
ROUND_TRIP = """
import json, sys
from kubeflow_trainer_api.models import IoK8sApiCoreV1ConfigMap, TrainerV1alpha1TrainJob
of = {"TrainJob": TrainerV1alpha1TrainJob, "ConfigMap": IoK8sApiCoreV1ConfigMap}
print(json.dumps([of[given["kind"]].from_dict(given).to_dict() for given in json.load(sys.stdin)]))
"""

pytestmark = pytest.mark.skipif(not PYTHON, reason="no Python with kubeflow-trainer-api: `make scale` makes one")


def parsed(documents: list[dict[str, Any]]) -> Any:
    assert PYTHON is not None
    done = subprocess.run(
        [PYTHON, "-c", ROUND_TRIP], input=json.dumps(documents), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("gpus", [True, False])
def test_every_field_exists_in_the_api(gpus: bool) -> None:
    result = replace(job("it's $(x)"), gpus=gpus, folder=Path("/"))
    documents = list(
        yaml.safe_load_all(kubernetes_manifests(result, "model: {name: demo}\n", image="strop:1", claim="disk"))
    )
    assert parsed(documents) == documents


def test_unknown_field_is_detected() -> None:
    given = list(yaml.safe_load_all(kubernetes_manifests(job(), "", image="strop:1", claim="disk")))
    given[1]["spec"]["trainer"]["numGpus"] = 1
    assert parsed(given) != given
