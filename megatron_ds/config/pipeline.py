"""What has to fit together in the ``pipeline`` section of a run."""

from __future__ import annotations

from megatron_ds.config.schema import BaseRunConfig


def pipeline_faults(config: BaseRunConfig) -> list[str]:
    """Every fault of how the layers are cut into stages and the stages placed on ranks."""
    section, num_layers, pp = config.pipeline, config.model.num_layers, config.mesh.pp
    num_stages = pp * section.chunks
    what = "mesh.pp" if section.chunks == 1 else f"mesh.pp={pp} x pipeline.chunks={section.chunks}"
    faults = []
    if num_layers < num_stages:
        faults.append(f"model.num_layers={num_layers} cannot fill {num_stages} stages ({what}); use pp <= {num_layers}")
    split = section.layers_per_stage
    if split is not None and not (len(split) == num_stages and sum(split) == num_layers and min(split, default=0) > 0):
        faults.append(
            f"pipeline.layers_per_stage={list(split)} must be {num_stages} positive numbers ({what}) with the sum "
            f"{num_layers} (model.num_layers); it has {len(split)} with the sum {sum(split)}"
        )
    if section.chunks > 1 and section.schedule != "gpipe":
        faults.append(
            f"pipeline.chunks={section.chunks} puts several stages on a rank, and pipeline.schedule={section.schedule} "
            "runs one; use --pipeline.schedule gpipe, or --pipeline.chunks 1"
        )
    if section.placement != "looped" and section.chunks == 1:
        faults.append(
            f"pipeline.placement={section.placement} does nothing with one stage a rank; set pipeline.chunks to 2 or "
            "more, or leave it looped"
        )
    return faults
