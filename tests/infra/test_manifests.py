"""The manifests: they build, they are valid, their commands are understood by the job, and their numbers fit together.

A cluster is not at hand: what a Kubernetes or KubeRay would do with them is not tested here.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from operations import INFRA, kustomize, one
from servers import BIN

from pipeline.config import JobConfig, parse_arguments

KUBERNETES = INFRA / "kubernetes"
ROOT = INFRA.parent
_CRDS = ("ray.io/v1", "monitoring.coreos.com/v1")


@pytest.fixture(scope="module")
def nightly() -> list[dict[str, Any]]:
    return kustomize(KUBERNETES / "overlays" / "nightly")


@pytest.fixture(scope="module")
def by_ray(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The base on a schedule by KubeRay, as the overlay says it can be had."""
    folder = tmp_path_factory.mktemp("overlay")
    base, component = (os.path.relpath(KUBERNETES / part, folder) for part in ("base", "components/raycronjob"))
    (folder / "kustomization.yaml").write_text(yaml.safe_dump({"resources": [base], "components": [component]}))
    return kustomize(folder)


def _pods(documents: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    cluster = one(documents, "RayJob")["spec"]["rayClusterSpec"]
    workers = {group["groupName"]: group["template"] for group in cluster["workerGroupSpecs"]}
    schedule = one(documents, "CronJob")["spec"]["jobTemplate"]["spec"]["template"]
    return {"head": cluster["headGroupSpec"]["template"], "schedule": schedule, **workers}


def _configured(documents: list[dict[str, Any]], tmp_path: Path) -> JobConfig:
    """The job that the RayJob starts, with its configuration from the ConfigMap."""
    words = shlex.split(one(documents, "RayJob")["spec"]["entrypoint"])
    assert words[:3] == ["python", "-m", "jobs.encode_laion"]
    place = Path(words[words.index("--config") + 1])
    head = _pods(documents)["head"]["spec"]
    (mount,) = [m for m in head["containers"][0]["volumeMounts"] if m["mountPath"] == str(place.parent)]
    (volume,) = [v for v in head["volumes"] if v["name"] == mount["name"]]
    text = one(documents, "ConfigMap", volume["configMap"]["name"])["data"][place.name]
    (tmp_path / place.name).write_text(text)
    return parse_arguments([*words[3:], "--config", str(tmp_path / place.name)])


def test_every_core_object_and_every_pod_is_valid_to_the_letter(nightly: list[dict[str, Any]]) -> None:
    checked = 0
    for document in nightly:
        if document["apiVersion"] not in _CRDS:
            kubernetes_validate.validate(document, "1.32", strict=True)
            checked += 1
    assert checked >= 6
    for name, template in _pods(nightly).items():
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name}, "spec": template["spec"]}
        kubernetes_validate.validate(pod, "1.32", strict=True)


def test_the_job_understands_what_the_manifests_tell_it(nightly: list[dict[str, Any]], tmp_path: Path) -> None:
    config = _configured(nightly, tmp_path)
    assert config.source.input
    assert config.run.output.startswith("s3://")
    base = parse_arguments(["--config", str(KUBERNETES / "base" / "encode.yaml")])
    assert base.run.output.startswith("s3://")


def test_every_command_written_in_infra_is_one_that_the_job_understands() -> None:
    found = 0
    for path in INFRA.rglob("*.yaml"):
        for command in re.findall(r"python -m jobs\.encode_laion ([^'\"\n]*--input[^'\"\n]*)", path.read_text()):
            parse_arguments(shlex.split(command))
            found += 1
    assert found


def test_a_cluster_that_begins_without_gpus_is_asked_for_them(nightly: list[dict[str, Any]], tmp_path: Path) -> None:
    run = _configured(nightly, tmp_path).run
    cluster = one(nightly, "RayJob")["spec"]["rayClusterSpec"]
    (workers,) = cluster["workerGroupSpecs"]
    assert cluster["enableInTreeAutoscaling"]
    # Without these flags the job counts the GPUs that are there, which are none, and encodes on CPU cores.
    assert run.gpus_per_actor == 1
    assert run.num_actors == workers["maxReplicas"]
    assert workers["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"


def test_workers_are_on_spot_and_the_head_is_not(nightly: list[dict[str, Any]]) -> None:
    pods = _pods(nightly)
    (key,) = pods["gpu-spot"]["spec"]["nodeSelector"]
    assert {"nvidia.com/gpu", key} <= {toleration["key"] for toleration in pods["gpu-spot"]["spec"]["tolerations"]}
    assert "nodeSelector" not in pods["head"]["spec"]
    assert "tolerations" not in pods["head"]["spec"]


def test_a_driver_that_must_go_has_its_grace(nightly: list[dict[str, Any]], tmp_path: Path) -> None:
    grace_s = _configured(nightly, tmp_path).run.grace_s
    head = _pods(nightly)["head"]["spec"]
    container = head["containers"][0]
    (stop_s,) = [float(e["value"]) for e in container["env"] if e["name"] == "RAY_JOB_STOP_WAIT_TIME_S"]
    (wait_s,) = map(float, re.findall(r"timeout=(\d+)", container["lifecycle"]["preStop"]["exec"]["command"][-1]))
    assert grace_s + 10 <= wait_s == stop_s < head["terminationGracePeriodSeconds"]


def test_the_head_tells_its_driver_before_it_goes_and_nobody_else(nightly: list[dict[str, Any]]) -> None:
    python, c, code = _pods(nightly)["head"]["spec"]["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
    assert (python, c) == ("python", "-c")
    says = "import signal, sys; signal.signal(15, lambda *_: sys.exit(7)); print(flush=True); signal.pause()"
    driver, other = (
        subprocess.Popen([sys.executable, "-c", says, *words], stdout=subprocess.PIPE)
        for words in (["-m", "jobs.encode_laion", "--config", "x"], ["bash -c 'python -m jobs.encode_laion'"])
    )
    try:
        for process in (driver, other):
            assert process.stdout is not None
            process.stdout.readline()
        # On a machine with other runs the hook must see those of this test alone.
        only = f"""
            import psutil
            every = psutil.process_iter
            psutil.process_iter = lambda asked: [p for p in every(asked) if p.pid in {{{driver.pid}, {other.pid}}}]
        """
        hook = subprocess.Popen([sys.executable, "-c", textwrap.dedent(only) + code])
        assert driver.wait(60) == 7
        assert hook.wait(60) == 0
        assert other.poll() is None
    finally:
        for process in (driver, other):
            process.kill()
            process.wait()
            assert process.stdout is not None
            process.stdout.close()


def test_no_pod_runs_as_root_or_may_become_it(nightly: list[dict[str, Any]]) -> None:
    for name, template in _pods(nightly).items():
        assert template["spec"]["securityContext"]["runAsNonRoot"], name
        assert template["spec"]["securityContext"]["runAsUser"] == 1000, name
        for container in template["spec"]["containers"]:
            assert container["securityContext"]["allowPrivilegeEscalation"] is False, name
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}, name


def test_secrets_are_referred_to_and_stand_nowhere(nightly: list[dict[str, Any]]) -> None:
    assert not [document for document in nightly if document["kind"] == "Secret"]
    pods = _pods(nightly)
    for name in ("head", "gpu-spot"):
        references = pods[name]["spec"]["containers"][0]["envFrom"]
        assert {r["secretRef"]["name"] for r in references} == {"latentmill-s3", "latentmill-hub"}
    for template in pods.values():
        for variable in template["spec"]["containers"][0].get("env", []):
            assert not re.search("KEY|TOKEN|SECRET|PASSWORD", variable["name"]), variable


def test_ray_runs_nobodys_code_and_has_its_shared_memory(nightly: list[dict[str, Any]]) -> None:
    cluster = one(nightly, "RayJob")["spec"]["rayClusterSpec"]
    assert cluster["authOptions"]["mode"] == "token"
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    assert cluster["rayVersion"] == pins["ray"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    for group, name in zip(groups, ("head", "gpu-spot"), strict=True):
        spec = _pods(nightly)[name]["spec"]
        (shm,) = [m["name"] for m in spec["containers"][0]["volumeMounts"] if m["mountPath"] == "/dev/shm"]
        (volume,) = [v["emptyDir"] for v in spec["volumes"] if v["name"] == shm]
        assert volume["medium"] == "Memory"
        assert int(group["rayStartParams"]["object-store-memory"]) < 1 << 30
        assert volume["sizeLimit"] == "1Gi"


def test_prometheus_finds_the_driver(nightly: list[dict[str, Any]], tmp_path: Path) -> None:
    run = _configured(nightly, tmp_path).run
    monitor = one(nightly, "PodMonitor")["spec"]
    head = _pods(nightly)["head"]
    assert monitor["selector"]["matchLabels"].items() <= head["metadata"]["labels"].items()
    (endpoint,) = monitor["podMetricsEndpoints"]
    (port,) = [p for p in head["spec"]["containers"][0]["ports"] if p["name"] == endpoint["port"]]
    assert port["containerPort"] == run.metrics_port
    assert run.metrics_address == "0.0.0.0"
    assert endpoint["honorLabels"], "the run's own `job` would be renamed"


def test_the_dashboard_goes_along(nightly: list[dict[str, Any]]) -> None:
    loaded = one(nightly, "ConfigMap", "latentmill-dashboard")
    assert loaded["metadata"]["labels"]["grafana_dashboard"] == "1"
    assert json.loads(loaded["data"]["latentmill.json"])["title"] == "Latentmill"


def test_kuberays_own_schedule_has_the_same_job_and_nothing_runs_beside_it(by_ray: list[dict[str, Any]]) -> None:
    assert "RayJob" not in {document["kind"] for document in by_ray}
    template = one(by_ray, "RayCronJob")["spec"]["jobTemplate"]
    assert template == yaml.safe_load((KUBERNETES / "base" / "rayjob.yaml").read_text())["spec"]


def test_the_plain_schedule_creates_the_job_of_its_template(nightly: list[dict[str, Any]], tmp_path: Path) -> None:
    template = one(nightly, "RayJob")
    assert template["spec"]["suspend"] is True
    (container,) = one(nightly, "CronJob")["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"]
    # Stands in for the API server alone; what is patched locally is patched by the real kubectl.
    (tmp_path / "spec.json").write_text(json.dumps(template["spec"]))
    (tmp_path / "kubectl").write_text(
        f"""#!/bin/bash
echo "$@" >> {tmp_path}/calls
case "$1" in
    get) cat {tmp_path}/spec.json ;;
    create) cat > {tmp_path}/created.json ;;
    *) exec {BIN}/kubectl "$@" ;;
esac
"""
    )
    (tmp_path / "kubectl").chmod(0o755)
    env = {"PATH": f"{tmp_path}:/usr/bin:/bin", "HOME": str(tmp_path)}
    subprocess.run([*container["command"], *container["args"]], env=env, check=True, timeout=60)
    created = json.loads((tmp_path / "created.json").read_text())
    assert (created["apiVersion"], created["kind"]) == ("ray.io/v1", "RayJob")
    assert re.fullmatch(r"latentmill-encode-\d{8}-\d{6}", created["metadata"]["name"])
    assert created["spec"] == {key: value for key, value in template["spec"].items() if key != "suspend"}
    calls = [line.split()[:2] for line in (tmp_path / "calls").read_text().splitlines()]
    assert ["get", "rayjob"] in calls
    (rule,) = one(nightly, "Role")["rules"]
    assert rule == {"apiGroups": ["ray.io"], "resources": ["rayjobs"], "verbs": ["get", "create"]}


def test_images_are_replaced_everywhere(nightly: list[dict[str, Any]]) -> None:
    images = {name: pod["spec"]["containers"][0]["image"] for name, pod in _pods(nightly).items()}
    assert images["head"] == images["schedule"] == "registry.example.com/latentmill:0.1.0-cpu"
    assert images["gpu-spot"] == "registry.example.com/latentmill:0.1.0-cuda"
