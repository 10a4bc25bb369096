"""`mhe k8s ...`: runs as RayJobs of a Kubernetes cluster with the KubeRay operator."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from launcher.kubernetes.claim_paths import PlacedConfig, place_on_claim, require_claim
from launcher.kubernetes.client import KubernetesClient, RayJobState
from launcher.kubernetes.manifests import (
    CLAIM_FOLDER,
    KubernetesTarget,
    build_config_map,
    build_raycluster,
    build_rayjob,
    manifests_to_yaml,
)
from launcher.preflight.checks import check_names
from launcher.signals import Interrupted, interruptible
from launcher.terminal import console
from launcher.terminal.commands import command_line
from launcher.terminal.event_log import split_lines
from launcher.terminal.replay import replay_log
from launcher.verbs.options import ConfigFile, Overrides
from mhe_dist.config.load import load_config
from mhe_dist.config.schema import Config

app = typer.Typer(no_args_is_help=True, help="Runs on Kubernetes, as RayJobs of KubeRay.")

DEFAULT = KubernetesTarget()
JobName = Annotated[
    str, typer.Argument(metavar="NAME", help="A RayJob, or else a run: its last RayJob.")
]
Namespace = Annotated[str, typer.Option(help="Namespace of the RayJobs.")]
Context = Annotated[str, typer.Option(help="Context of the kubeconfig; the current if left out.")]
Image = Annotated[str, typer.Option(help="Image with mhe, by digest where it matters.")]
Claim = Annotated[
    str, typer.Option(help="PersistentVolumeClaim for /data; left out: data and runs at URLs.")
]
Secret = Annotated[str, typer.Option(help="Secret whose keys become variables of the pods.")]
Queue = Annotated[str, typer.Option(help="LocalQueue of Kueue, which starts all pods or none.")]
Memory = Annotated[str, typer.Option(help="Memory of a worker, such as 500Mi or 4Gi.")]
HeadCpus = Annotated[int, typer.Option(min=1, help="CPUs of the head.")]
HeadMemory = Annotated[str, typer.Option(help="Memory of the head; more for many workers.")]
StartMinutes = Annotated[
    int, typer.Option(min=0, help="Minutes in which all pods must run; 0: no limit.")
]
MaxHours = Annotated[
    int, typer.Option(min=0, help="Hours after which the RayJob is ended; 0: no limit.")
]


@app.callback()
def k8s() -> None:
    """Runs on Kubernetes, as RayJobs of KubeRay."""


@app.command()
def render(
    config: ConfigFile,
    overrides: Overrides = None,
    namespace: Namespace = DEFAULT.namespace,
    image: Image = DEFAULT.image,
    claim: Claim = DEFAULT.claim,
    secret: Secret = DEFAULT.secret,
    queue: Queue = DEFAULT.queue,
    memory: Memory = DEFAULT.memory,
    head_cpus: HeadCpus = DEFAULT.head_cpus,
    head_memory: HeadMemory = DEFAULT.head_memory,
    start_minutes: StartMinutes = DEFAULT.start_minutes,
    max_hours: MaxHours = DEFAULT.max_hours,
    cluster: Annotated[
        bool, typer.Option("--cluster", help="A RayCluster for `mhe submit`, not a RayJob.")
    ] = False,
) -> None:
    """Print what would be sent: a RayJob and its settings, as YAML for `kubectl apply -f -`.

    With --claim, relative paths of the config mean folders on the claim, which is mounted at /data;
    without one they are refused.

    Example: mhe k8s render quickstart --claim mhe-data | kubectl apply -f -
    """
    settings = _load(config, overrides)
    head = (head_cpus, head_memory)
    target = KubernetesTarget(
        image, namespace, claim, secret, queue, memory, *head, start_minutes, max_hours
    )
    if cluster:
        made = [build_raycluster(settings, target)]
    else:
        placed = _with_pod_paths(settings, claim)
        settings = placed.config
        if placed.on_claim and not claim:
            console.note(f"nothing is mounted at {CLAIM_FOLDER} here: a patch has to, or --claim")
        job = build_rayjob(settings, target)
        _note_elastic(settings, target)
        made = [job, build_config_map(settings, target, job["metadata"]["name"])]
    typer.echo(manifests_to_yaml(made), nl=False)


@app.command()
def submit(
    config: ConfigFile,
    overrides: Overrides = None,
    namespace: Namespace = DEFAULT.namespace,
    context: Context = "",
    image: Image = DEFAULT.image,
    claim: Claim = DEFAULT.claim,
    secret: Secret = DEFAULT.secret,
    queue: Queue = DEFAULT.queue,
    memory: Memory = DEFAULT.memory,
    head_cpus: HeadCpus = DEFAULT.head_cpus,
    head_memory: HeadMemory = DEFAULT.head_memory,
    start_minutes: StartMinutes = DEFAULT.start_minutes,
    max_hours: MaxHours = DEFAULT.max_hours,
) -> None:
    """Train a run as a RayJob. The same run again goes on where it stopped.

    Relative paths of the config mean folders on the claim, which is mounted at /data. A path that a
    pod does not keep is refused.

    Example: mhe k8s submit run.yaml --image registry.example/mhe@sha256:... --claim mhe-data
    """
    placed = _with_pod_paths(_load(config, overrides), claim)
    require_claim(placed, claim)
    settings = placed.config
    head = (head_cpus, head_memory)
    target = KubernetesTarget(
        image, namespace, claim, secret, queue, memory, *head, start_minutes, max_hours
    )
    _note_elastic(settings, target)
    name = KubernetesClient(namespace, context).submit(settings, target)
    console.say(f"RayJob [bold]{escape(name)}[/] is made in namespace {escape(namespace)}.")
    where = _where(namespace, context)
    console.list_next(
        [
            ("watch it", ["mhe", "k8s", "logs", name, "-f", *where]),
            ("how it does", ["mhe", "k8s", "status", name, *where]),
            ("save and stop", ["mhe", "k8s", "stop", name, *where]),
        ]
    )


@app.command()
def status(
    name: Annotated[str, typer.Argument(metavar="[NAME]", help="All RayJobs if left out.")] = "",
    namespace: Namespace = DEFAULT.namespace,
    context: Context = "",
) -> None:
    """Say how RayJobs are doing; with a name, exit as it did: 0 also while it runs.

    Example: mhe k8s status quickstart
    """
    api = KubernetesClient(namespace, context)
    found = [api.find(name)] if name else api.states()
    table = Table("rayjob", "run", "job", "deployment", "", box=None, padding=(0, 2, 0, 0))
    for state in found:
        row = (state.name, state.run or "-", state.job or "-", state.deployment or "-")
        table.add_row(*row, escape(state.message))
    console.print_table(table)
    if name:
        raise typer.Exit(found[0].exit_code)


@app.command()
def logs(
    name: JobName,
    namespace: Namespace = DEFAULT.namespace,
    context: Context = "",
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Until the run ends; exit as it does.")
    ] = False,
) -> None:
    """Show what a run did, and with -f what it does.

    Example: mhe k8s logs quickstart -f
    """
    api = KubernetesClient(namespace, context)
    state = api.find(name)
    try:
        with interruptible():
            output = api.follow(state.name) if follow else api.read_output(state.name)
            replay_log(split_lines(output))
    except Interrupted as stop_:
        raise typer.Exit(stop_.exit_code) from None
    if follow:
        raise typer.Exit(api.find(state.name, only_rayjob=True).exit_code)


@app.command()
def stop(
    name: JobName,
    namespace: Namespace = DEFAULT.namespace,
    context: Context = "",
    now: Annotated[
        bool, typer.Option("--now", help="Delete the RayJob; do not wait for a checkpoint.")
    ] = False,
) -> None:
    """Let a run save a checkpoint and stop; the same `mhe k8s submit` goes on with it.

    Example: mhe k8s stop quickstart
    """
    api = KubernetesClient(namespace, context)
    state = api.find(name)
    if state.is_over:
        console.say(f"{escape(state.name)} is over: {_word(state)}.")
        return
    api.stop(state, now)
    what = "is deleted" if now or not state.cluster else "saves and stops"
    status_command = command_line(["mhe", "k8s", "status", state.name, *_where(namespace, context)])
    console.say(f"{escape(state.name)} {what}; {escape(status_command)} says when.")


def _where(namespace: str, context: str) -> list[str]:
    """The options that the next command needs to speak of the same namespace."""
    options = ["--namespace", namespace] if namespace != DEFAULT.namespace else []
    return [*options, "--context", context] if context else options


def _load(config: str, overrides: list[str] | None) -> Config:
    return load_config(config, overrides or [], [check_names])


def _note_elastic(config: Config, target: KubernetesTarget) -> None:
    """Say what an elastic run is not on Kubernetes: KubeRay, and Kueue, wait for all its pods."""
    if config.scale.elastic:
        limit = f", at most {target.start_minutes} min (--start-minutes)" * bool(
            target.start_minutes
        )
        console.note(
            f"scale.min_workers={config.scale.min_workers}: a RayJob waits until the pods of all "
            f"{config.scale.workers} workers run{limit}; only then may the run go on with fewer. "
            "To begin with fewer, make a cluster (mhe k8s render --cluster), and mhe submit to it"
        )


def _with_pod_paths(config: Config, claim: str) -> PlacedConfig:
    """The config with the paths that hold in a pod; says which ones changed."""
    placed = place_on_claim(config, claim)
    for key, before, after in placed.moved:
        console.note(f"{key}: {before} is {after} in the pods, on claim {claim}")
    return placed


def _word(state: RayJobState) -> str:
    return (state.job or state.deployment).lower()
