"""A real API server of Kubernetes accepts every overlay and every pod of them, and refuses what is broken."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.deploy.test_kubernetes import DEPLOY, OVERLAYS, pods
from tests.deploy.tiny import environ

FOLDER = "STEMTOMO_KUBE_BIN"


def why_not() -> str | None:
    """Return why no API server can be started here; ``None`` if it can."""
    if FOLDER not in os.environ:
        return f"{FOLDER} names no folder with kube-apiserver and etcd (docs/clusters.md)"
    for name in ("kube-apiserver", "etcd", "kubectl", "openssl"):
        if shutil.which(name, path=f"{os.environ[FOLDER]}:{os.environ['PATH']}") is None:
            return f"{name} is neither in {FOLDER} nor on the PATH"
    return None


pytestmark = [
    pytest.mark.heavy,
    pytest.mark.timeout(300),
    pytest.mark.skipif(why_not() is not None, reason=str(why_not())),
]


def test_an_api_server_accepts_every_overlay_and_pod_and_refuses_broken_ones(tmp_path: Path) -> None:
    found = [(f"{overlay}-{name}", pod) for overlay in OVERLAYS for name, pod in pods(overlay).items()]
    manifest = tmp_path / "pods.yaml"  # the operator's definitions let anything pass as a pod
    manifest.write_text(
        yaml.safe_dump_all(
            {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "namespace": "stemtomo"}, "spec": pod}
            for name, pod in found
        )
    )
    script = DEPLOY / "kubernetes" / "check-api-server.sh"
    done = subprocess.run([str(script), str(manifest)], env=environ(), capture_output=True, text=True, timeout=280)
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    for overlay in OVERLAYS:
        assert f"accepted: overlay {overlay}" in said
    assert all(f"pod/{name} created (server dry run)" in said for name, _ in found), said
    assert said.count("refused, as it must be") == 2
