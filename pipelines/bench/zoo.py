"""Families of timm as backbones: is one built, does it learn, are its exports what it is?

    python -m pipelines.bench.zoo --page docs/zoo.md [--only FAMILY ...]

Each family is tried in a process of its own, and its row is kept at once, so that a sweep that was
stopped goes on where it was. A row says "trains" (three steps with finite losses and gradients,
both exports equal to the trained model), "refused" (a UserError before the first step) or "fails".
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mhe_dist.backbone.model import Backbone, build_backbone, restore_backbone
from mhe_dist.config.schema import Config
from mhe_dist.distributed.device import prepare_rank
from mhe_dist.distributed.topology import Topology, connect
from mhe_dist.engine.first_pass import refuse_untrainable
from mhe_dist.errors import UserError, describe_error, first_line
from pipelines.bench.zoo_models import FAMILIES

STEPS, BATCH, CLASSES, WIDTH = 3, 4, 16, 64
TIMEOUT_S = 900.0
RECORD = Path("runs/zoo.jsonl")

Row = dict[str, Any]

_TITLE = "# Families of timm\n"
_ABOUT = f"""\
"Trains" means: {STEPS} steps of {BATCH} images, with `optim.clip_norm=5`, have finite losses and
gradients, and the timm folder and the ONNX file equal the trained model: each element of an
embedding up to 1/10,000 and 1/1,000 of its largest value. The gradient is the norm of the first
step's, before it is clipped; above 1,000 a run advises to clip. A neck is a BatchNorm that is
folded into the last layer; there is none where that is not one linear layer. The last columns are
the largest differences of the exports' embeddings, which are large where embeddings are, and the
seconds of the trial.
"""
_HEADER = """\
| family | model | side | million weights | neck | result | gradient | timm | ONNX | seconds |
|---|---|---|---|---|---|---|---|---|---|"""


def sweep(families: Sequence[str], record: Path) -> list[Row]:
    """Try the families of which the record has no row with today's versions; give all rows."""
    record.parent.mkdir(parents=True, exist_ok=True)
    for number, family in enumerate(families, 1):
        if family in read_rows(record):
            continue
        print(f"{number}/{len(families)} {family}", flush=True)
        row = try_apart(family)
        print(f"   {row['status']} {row.get('message', '')}", flush=True)
        with record.open("a") as file:
            file.write(json.dumps(row) + "\n")
    rows = read_rows(record)
    return [rows[family] for family in families if family in rows]


def read_rows(record: Path) -> dict[str, Row]:
    """The rows of a record by family, those of other versions left out."""
    if not record.exists():
        return {}
    rows = map(json.loads, record.read_text().splitlines())
    return {row["family"]: row for row in rows if row["versions"] == versions()}


def versions() -> str:
    """What a row depends on beside this project."""
    return ", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "timm"))


def try_apart(family: str) -> Row:
    """Try a family in a process of its own, which may die or hang."""
    model, side = FAMILIES[family]
    row: Row = {"family": family, "model": model, "side": side, "versions": versions()}
    command = [sys.executable, "-m", __spec__.name if __spec__ else __name__, "--one", family]
    begin = time.monotonic()
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        return row | {"status": "fails", "message": f"not done after {TIMEOUT_S:.0f} s"}
    row["seconds"] = round(time.monotonic() - begin, 1)
    lines = done.stdout.strip().splitlines()
    if done.returncode == 0 and lines:
        return row | json.loads(lines[-1])
    said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
    fatal = [line for line in said if line.startswith("Fatal Python error")]
    return row | {"status": "fails", "message": (fatal or said[-1:])[0][:300]}


def try_model(model: str, side: int) -> Row:
    """Try one model in this process, with a neck if it can have one."""
    for neck in ("batchnorm", "none"):
        config = _config(model, side, neck)
        images = torch.randint(0, 256, (BATCH, 3, side, side)).byte()
        torch.manual_seed(0)
        try:
            backbone = build_backbone(config.model, side)
            refuse_untrainable(backbone, config, images)
        except UserError as error:
            if neck == "none" or "model.neck=none" not in str(error):
                return {"status": "refused", "message": first_line(error)[:300], "neck": neck}
            continue
        try:
            return _train_and_export(backbone, config, images) | {"neck": neck}
        except Exception as error:  # of whatever library: that is what is tried
            message = describe_error(error)
            return {"status": "fails", "message": message[:300], "neck": neck}
    raise AssertionError("the loop returns")


def _config(model: str, side: int, neck: str) -> Config:
    return Config.model_validate(
        {
            "data": {"shards": "unused", "image_size": side, "streams": BATCH},
            "model": {"name": model, "embedding_dim": WIDTH, "neck": neck},
            "train": {"global_batch": BATCH, "micro_batch": BATCH, "precision": "float32"},
            "optim": {"lr": 0.01, "clip_norm": 5.0},
        }
    )


def _train_and_export(model: Backbone, config: Config, images: Tensor) -> Row:
    from mhe_dist.backbone.export import export_onnx, export_timm
    from mhe_dist.engine.engine import Engine
    from mhe_dist.heads.standalone import create_head

    row: Row = {"parameters": sum(p.numel() for p in model.parameters())}
    engine = Engine(model, config.optim, config.train, Topology(), zero_stage=0)
    head = create_head("full", num_classes=CLASSES, dim=WIDTH)
    losses, norms = [], []
    for step in range(STEPS):
        loss = head(engine.forward(images, step, 0), torch.arange(BATCH)).loss
        engine.backward(loss)
        engine.step(config.optim.lr)
        head.step(config.optim.lr)
        losses.append(loss.item())
        norms.append(float(engine.grad_norm() or 0.0))
    row |= {"losses": losses, "grad_norm": norms[0]}
    if not all(map(math.isfinite, losses + norms)) or not norms[0] > 0:
        return row | {"status": "fails", "message": f"losses {losses}, gradients {norms}"}
    trained = restore_backbone(config.model, config.data.image_size, engine.state())
    with tempfile.TemporaryDirectory() as folder:
        row["timm"] = export_timm(trained, config, f"{folder}/timm", images)
        row["onnx"] = export_onnx(trained, config, f"{folder}/backbone.onnx", images)
    return row | {"status": "trains"}


def page(rows: Sequence[Row]) -> str:
    """The table as Markdown."""
    counts = {s: sum(row["status"] == s for row in rows) for s in ("trains", "refused", "fails")}
    found = (
        f"Found by `make zoo` with {versions()} on a CPU, in float32. {len(rows)} of "
        f"{len(FAMILIES)} families were tried: {counts['trains']} train, {counts['refused']} are "
        f"refused before the first step, {counts['fails']} fail."
    )
    return "\n".join([_TITLE, found, "", _ABOUT, _HEADER, *map(_line, rows)]) + "\n"


def _line(row: Row) -> str:
    def number(key: str, form: str, scale: float = 1.0) -> str:
        return format(row[key] * scale, form) if key in row else ""

    result = row["status"] + (f": {row['message']}" if row.get("message") else "")
    cells = [
        *(row["family"], f"`{row['model']}`", str(row["side"]), number("parameters", ".1f", 1e-6)),
        *(row.get("neck", ""), result.replace("|", "\\|"), number("grad_norm", ".2g")),
        *(number("timm", ".0e"), number("onnx", ".0e"), number("seconds", ".0f")),
    ]
    return f"| {' | '.join(cells)} |"


def main(arguments: Sequence[str]) -> None:
    """The command; see the module."""
    parser = argparse.ArgumentParser(prog="zoo", description=__doc__)
    parser.add_argument("--record", type=Path, default=RECORD, help="rows found so far")
    parser.add_argument("--page", type=Path, help="Markdown file for the table")
    parser.add_argument("--only", nargs="+", choices=FAMILIES, metavar="FAMILY", default=[])
    parser.add_argument("--one", choices=FAMILIES, metavar="FAMILY", help="try it in this process")
    options = parser.parse_args(arguments)
    if options.one:
        prepare_rank(gpu=False)
        connect()
        print(json.dumps(try_model(*FAMILIES[options.one])), flush=True)
        return
    rows = sweep(options.only or list(FAMILIES), options.record)
    if options.page:
        options.page.write_text(page(rows))


if __name__ == "__main__":
    main(sys.argv[1:])
