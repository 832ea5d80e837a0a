"""How a trial is executed: its device, threads, checkpoints and where files lie."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from trainers.section import LISTED, ONCE, Section


class ExecutionConfig(Section):
    """How a trial is executed; nothing here changes what it computes, and nothing here is in its identity."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int | None = Field(None, ge=1, le=1024, description="CPU threads of a rank; null leaves PyTorch's own")
    data_root: str | None = Field(None, description="where the files of an image folder or a download lie")
    checkpoint_seconds: float = Field(60.0, ge=0, description="least time between two checkpoints")
    keep_checkpoints: int = Field(1, ge=1, le=1_000, description="how many checkpoints are kept")
    keep_steps: Annotated[tuple[Annotated[int, Field(ge=1)], ...], LISTED, ONCE] = Field(
        (), description="steps whose checkpoints are kept for ever, for other trials to start from"
    )
    trials_root: str | None = Field(
        None, description="folder under which the trials of model.init_from and model.weights are looked for"
    )
    weights_root: str | None = Field(None, description="folder of the files of model.weights; null for this one")
    program_root: str | None = Field(None, description="folder in which a command is run; null for this one")
    activation_checkpointing: bool = Field(False, description="compute activations twice, keep those of blocks alone")
    network_interface: str | None = Field(
        None, description="by which the ranks of a trial reach each other, such as eth0; null leaves it to them"
    )
    no_progress_seconds: float = Field(
        1_800.0, gt=0, description="after which a trial that reports nothing and makes no step is taken for hung"
    )
