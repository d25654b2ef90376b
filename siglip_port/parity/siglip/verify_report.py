"""Reports of a comparison: JSON, console lines and files."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from siglip_port.atomic import write_text
from siglip_port.parity import report as reports
from siglip_port.parity.metrics import cosine
from siglip_port.parity.report import Json, html
from siglip_port.parity.results import Comparison
from siglip_port.parity.sides import Side, cast
from siglip_port.parity.siglip import cases, reference
from siglip_port.parity.siglip.cases import Case
from siglip_port.parity.siglip.verification import LoadedPort
from siglip_port.parity.siglip.verify_options import VerifyOptions
from siglip_port.text import format_table


def make_report(
    options: VerifyOptions, comparison: Comparison, port: LoadedPort, case: Case
) -> Json:
    """Build the JSON report.

    Args:
        options: Options of the comparison.
        comparison: Results of the gates.
        port: Port that was compared.
        case: Checkpoint with its reference.
    """
    model = port.model
    reference_run = case.reference_run(case.dtypes[0])
    attention = case.attentions[0]
    with cast(model, case.dtypes[0]):
        port_outputs = Side(model, cases.port_outputs).run(reference_run.inputs)
    reference_outputs = reference_run.outputs[attention]
    metrics = reports.output_metrics(port_outputs, reference_outputs)
    shapes = {name: list(tensor.shape) for name, tensor in reference_outputs.items()}
    patches = {
        "grid": model.config.grid_size,
        "cosine": cosine_by_patch(port_outputs["tokens"], reference_run.exact.outputs["tokens"]),
    }
    return reports.to_json(
        comparison,
        environment={"transformers": reference.VERSION, **describe_settings(options, port)},
        provenance=asdict(model.provenance) if model.provenance else None,
        config=asdict(model.config),
        outputs=[{"dtype": options.dtype, "attention": attention, **metric} for metric in metrics],
        reference_shapes=shapes,
        patches=patches,
    )


def cosine_by_patch(tokens: Tensor, reference_tokens: Tensor) -> list[float]:
    """Return the cosine of each token of the first image with the reference's: one per patch.

    Empty if the shapes differ.
    """
    if tokens.shape != reference_tokens.shape:
        return []
    cosines: list[float] = cosine(tokens, reference_tokens)[0].tolist()
    return cosines


def describe_settings(options: VerifyOptions, port: LoadedPort) -> Json:
    """Return the checkpoint and the settings, which a report states beside its origin."""
    settings = {"checkpoint": options.checkpoint}
    if port.commit is not None:
        settings["commit"] = port.commit
    return {
        **settings,
        "device": describe_device(options.device),
        "threads": torch.get_num_threads(),
        "dtype": options.dtype,
        "attention": options.attention,
    }


def describe_device(device: str) -> str:
    """Return a device with the name of its model, if it is a GPU."""
    if torch.device(device).type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return device


def console_lines(comparison: Comparison, report: Json) -> list[str]:
    """Return the printed lines: shapes, cosines, the table of gates, findings, environment."""
    lines = []
    port_shapes = {output["point"]: output["shape"] for output in report["outputs"]}
    for side, shapes in (("custom", port_shapes), ("original", report["reference_shapes"])):
        for point, shape in shapes.items():
            suffix = "-afterPooling" if point == "pooled" else ""
            lines.append(f"siglip_{side}{suffix}.shape: torch.Size({shape})")
    for output in report["outputs"]:
        suffix = " after pooling" if output["point"] == "pooled" else ""
        for statistic in ("mean", "min"):
            value = float(output[f"cosine_{statistic}"])
            lines.append(f"cosine_similarity{suffix}.{statistic}(): {value:.12f}")
    lines += ["", *format_table(reports.gate_table(comparison))]
    if comparison.findings:
        lines += ["", *str(comparison).splitlines()[:-1]]
    environment = ", ".join(f"{name} {value}" for name, value in report["environment"].items())
    return [*lines, "", environment]


def write_reports(folder: Path, report: Json, pixel_values: Tensor) -> list[str]:
    """Write a report in every format; return the file names.

    Args:
        folder: Output folder, created if missing.
        report: Return value of `make_report`.
        pixel_values: First image of the comparison, [C, S, S].
    """
    image = html.image_data_uri(pixel_values)
    writers: dict[str, Callable[[], str]] = {
        "report.json": lambda: reports.dumps(report),
        "report.md": lambda: reports.to_markdown(report),
        "report.html": lambda: html.render_page(report, image),
        "junit.xml": lambda: reports.to_junit(report),
        "badge.json": lambda: reports.to_badge(report),
    }
    for name, write in writers.items():
        write_text(folder / name, write())
    return list(writers)
