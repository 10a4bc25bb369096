"""RayJobs in a Kubernetes cluster, through its official client and the user's kubeconfig."""

from __future__ import annotations

import base64
import codecs
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import yaml

from launcher.kubernetes.manifests import (
    PATH_ANNOTATION,
    RUN_LABEL,
    KubernetesTarget,
    build_config_map,
    build_rayjob,
    rayjob_name,
    run_label,
)
from mhe_dist.config.schema import Config
from mhe_dist.errors import Preempted, RunError, UserError

GROUP, VERSION, PLURAL = "ray.io", "v1", "rayjobs"
DASHBOARD_PORT = 8265
POLL_S = 2.0
_UNREACHED = (502, 503, 504)  # what a proxy answers for what is behind it
_CODES = {"SUCCEEDED": 0, "FAILED": 1, "STOPPED": Preempted.exit_code}


@dataclass(frozen=True)
class RayJobState:
    """A RayJob as the operator describes it.

    Attributes:
        name: of the RayJob.
        run, path: of mhe's run; empty for a RayJob of another program.
        job: what Ray says: PENDING, RUNNING, SUCCEEDED, FAILED, STOPPED; empty before it was asked.
        deployment: what the operator does: Initializing, Running, Complete, Failed, Suspended ...
        message: why, if the operator says so.
        job_id, cluster: name of the job in its Ray cluster, and of that; empty before they exist.
    """

    name: str
    run: str
    path: str
    job: str
    deployment: str
    message: str
    job_id: str
    cluster: str

    @property
    def is_over(self) -> bool:
        """Whether nothing more will happen.

        A job that failed is over once the operator says so: it may begin again (`backoffLimit`).
        """
        return self.job in ("SUCCEEDED", "STOPPED") or self.deployment in ("Complete", "Failed")

    @property
    def exit_code(self) -> int:
        """What a command that follows it exits with."""
        return _CODES.get(self.job, 1) if self.is_over else 0


class KubernetesClient:
    """One namespace."""

    def __init__(self, namespace: str, context: str = "") -> None:
        """Args:
            namespace: where the RayJobs are.
            context: of the kubeconfig; empty: the current one.

        Raises:
            UserError: the package is missing, or there is no usable kubeconfig.
        """
        try:
            import kubernetes
        except ImportError as error:
            raise UserError("mhe k8s needs the kubernetes client: pip install mhe[k8s]") from error
        self.namespace, self._context = namespace, context
        client = self._client()
        self._core: Any = kubernetes.client.CoreV1Api(client)
        self._custom: Any = kubernetes.client.CustomObjectsApi(client)

    def submit(self, config: Config, target: KubernetesTarget) -> str:
        """Make the RayJob of a run and its settings; the RayJob's name.

        Raises:
            UserError: a RayJob of this run is not over yet, or the cluster refuses.
        """
        known = self.states()
        for state in known:
            if state.path == config.run.path and not state.is_over:
                raise UserError(
                    f"run.name={config.run.name}: RayJob {state.name} is "
                    f"{state.deployment.lower() or 'starting'} with this run. Watch it (mhe k8s "
                    f"logs {state.name} -f) or stop it (mhe k8s stop {state.name})."
                )
        attempt = 1
        while rayjob_name(config.run.name, attempt) in {state.name for state in known}:
            attempt += 1
        job = build_rayjob(config, target, attempt)
        name = str(job["metadata"]["name"])
        build_config_map(config, target, name)  # refuses before anything is made
        with self._translate_errors():
            made = self._custom.create_namespaced_custom_object(
                GROUP, VERSION, self.namespace, PLURAL, job
            )
        settings = build_config_map(config, target, name, made["metadata"]["uid"])
        try:
            with self._translate_errors():
                self._core.create_namespaced_config_map(self.namespace, settings)
        except BaseException:
            self._delete(name)  # it would wait for its settings, or begin with those of another
            raise
        return name

    def _delete(self, name: str) -> None:
        with self._translate_errors():
            self._custom.delete_namespaced_custom_object(
                GROUP, VERSION, self.namespace, PLURAL, name
            )

    def states(self) -> list[RayJobState]:
        """The RayJobs of the namespace, the oldest first; the API lists them by name."""
        with self._translate_errors():
            listed = self._custom.list_namespaced_custom_object(
                GROUP, VERSION, self.namespace, PLURAL
            )
        return [_state(item) for item in sorted(listed["items"], key=_age)]

    def find(self, name: str, only_rayjob: bool = False) -> RayJobState:
        """The RayJob of that name; where there is none, the last one of the run of that name.

        Args:
            name: a run may be called as a RayJob of another run is; then it is the RayJob.
            only_rayjob: whether it is no name of a run.

        Raises:
            UserError: there is none.
        """
        known = self.states()
        found = [state for state in known if state.run and state.run == run_label(name)]
        found = [state for state in known if state.name == name] or found[-1:] * (not only_rayjob)
        if found:
            return found[0]
        names = ", ".join(state.name for state in known) or "none"
        raise UserError(f"namespace {self.namespace} has no RayJob or run {name!r}; it has {names}")

    def read_output(self, name: str) -> Iterator[str]:
        """What a run has printed so far, in pieces.

        Raises:
            UserError: there is no output yet, or no longer.
        """
        stream = self._open_log(self._newest_pod(name))
        with self._translate_errors():
            yield from codecs.iterdecode(stream.stream(), "utf-8", "replace")

    def follow(self, name: str, wait: Callable[[float], None] = time.sleep) -> Iterator[str]:
        """What a run prints, in pieces, from the beginning until the run is over.

        The end of a log is not that of its run: the operator says that seconds later, a connection
        may end before, and a run that failed may begin again, in another pod. A log that is opened
        again goes on by the time of its lines: the node may have begun a new file meanwhile.

        Args:
            name: of the RayJob.
            wait: called with the seconds between one look at the cluster and the next; for tests.

        Raises:
            UserError: there is no output yet, or the RayJob is gone.
        """
        last: dict[str, bytes] = {}
        while True:
            state = self.find(name, only_rayjob=True)  # before its log, which then is whole
            for line in self._read_on(state, last):
                yield line.decode("utf-8", "replace")
            if state.is_over:
                return
            wait(POLL_S)

    def _read_on(self, state: RayJobState, last: dict[str, bytes]) -> Iterator[bytes]:
        """Lines of the newest pod that were not read, until its log or the connection ends.

        Args:
            state: of the RayJob.
            last: time of the last line that was read of each pod; changed here.
        """
        from urllib3.exceptions import HTTPError

        try:
            pod = self._newest_pod(state.name)
            if last and pod not in last and state.job in _CODES:
                return  # the operator submits what is over once more: it repeats the same output
            stream = self._open_log(pod, follow=True, timestamps=True)
        except (UserError, RunError):
            if last:
                return  # a pod that goes or has not begun; the next look says what becomes of it
            raise
        last.setdefault(pod, b"")
        with suppress(HTTPError):
            for line in stream:  # whole ones, of whatever pieces come
                when, _, text = line.partition(b" ")
                if when > last[pod]:  # of fixed width, to the nanosecond
                    last[pod] = when
                    yield text

    def _newest_pod(self, name: str) -> str:
        """The pod that prints what a RayJob does.

        Raises:
            UserError: there is none.
        """
        with self._translate_errors():
            pods = self._core.list_namespaced_pod(self.namespace, label_selector=f"job-name={name}")
        if not pods.items:
            raise UserError(
                f"{name} prints nothing yet, or its pods are gone: mhe k8s status {name}"
            )
        # One that failed to reach the head is followed by others, with names by chance.
        newest = max(pods.items, key=lambda pod: str(pod.metadata.creation_timestamp))
        return str(newest.metadata.name)

    def _open_log(self, pod: str, **options: bool) -> Any:
        with self._translate_errors():
            return self._core.read_namespaced_pod_log(
                pod, self.namespace, _preload_content=False, **options
            )

    def stop(self, state: RayJobState, now: bool = False) -> None:
        """Ask the run to save and stop; with `now`, delete the RayJob and all its pods.

        Raises:
            UserError: the API server does not reach the dashboard, or refuses.
        """
        with self._translate_errors():
            if now or not state.cluster:
                self._delete(state.name)
                return
            self._ask_dashboard(state)

    def _ask_dashboard(self, state: RayJobState) -> None:
        """Ask Ray to stop a job, through the API server.

        Raises:
            UserError: the API server does not reach the dashboard.
        """
        from kubernetes.client import ApiException

        dashboard = self._dashboard(state.cluster)
        try:
            dashboard.connect_post_namespaced_service_proxy_with_path(
                f"{state.cluster}-head-svc:{DASHBOARD_PORT}",
                self.namespace,
                f"api/jobs/{state.job_id}/stop",
            )
        except ApiException as error:
            if error.status not in _UNREACHED:
                raise
            raise UserError(
                f"{state.name} is not stopped: the API server does not reach Ray's dashboard "
                f"({error.status}): {(error.body or 'no reason').strip()[:300]}. Either Ray has "
                "not started yet (--now deletes the run), or a NetworkPolicy such as "
                "k8s/base/network.yaml closes it: docs/clusters.md says how to let the API server "
                "in, and how to stop the run without"
            ) from error

    def _client(self) -> Any:
        import kubernetes

        try:
            return kubernetes.config.new_client_from_config(context=self._context or None)
        except (kubernetes.config.ConfigException, yaml.YAMLError) as error:
            raise UserError(f"no usable kubeconfig (KUBECONFIG, --context): {error}") from error

    def _dashboard(self, cluster: str) -> Any:
        """A client whose requests may go through to a Ray dashboard.

        The token is in the secret that KubeRay makes for a cluster with `authOptions`; the API
        server keeps the usual header for itself, so Ray takes it from another one as well.
        """
        import kubernetes

        client = self._client()
        client.configuration.safe_chars_for_path_param = "/:"  # the proxied path keeps its slashes
        token = self._token(cluster)
        if token:
            client.set_default_header("X-Ray-Authorization", f"Bearer {token}")
        return kubernetes.client.CoreV1Api(client)

    def _token(self, cluster: str) -> str:
        """The token of a Ray cluster; empty for one that wants none."""
        from kubernetes.client import ApiException

        try:
            secret = self._core.read_namespaced_secret(cluster, self.namespace)
        except ApiException as error:
            if error.status == 404:
                return ""
            raise
        return base64.b64decode(secret.data.get("auth_token", "")).decode()

    @contextmanager
    def _translate_errors(self) -> Iterator[None]:
        """The client's errors in our words."""
        from kubernetes.client import ApiException
        from urllib3.exceptions import HTTPError

        try:
            yield
        except ApiException as error:
            text = f"{error.status} {error.reason}: {(error.body or '').strip()[:300]}"
            if error.status == 404:
                text += " (is the KubeRay operator installed, and the namespace there?)"
            kind = UserError if 400 <= (error.status or 500) < 500 else RunError
            raise kind(f"Kubernetes answers {text}") from error
        except HTTPError as error:
            raise UserError(f"Kubernetes does not answer: {error}") from error


def _age(item: dict[str, Any]) -> tuple[str, int]:
    """Sorts objects by when they were made, to the second, and then by the number in the name."""
    metadata = item["metadata"]
    number = re.search(r"-(\d{1,9})$", metadata["name"])
    return metadata.get("creationTimestamp", ""), int(number[1]) if number else 0


def _state(item: dict[str, Any]) -> RayJobState:
    metadata, status = item["metadata"], item.get("status") or {}
    return RayJobState(
        name=metadata["name"],
        run=metadata.get("labels", {}).get(RUN_LABEL, ""),
        path=metadata.get("annotations", {}).get(PATH_ANNOTATION, ""),
        job=status.get("jobStatus", ""),
        deployment=status.get("jobDeploymentStatus", ""),
        message=status.get("message", ""),
        job_id=status.get("jobId", ""),
        cluster=status.get("rayClusterName", ""),
    )
