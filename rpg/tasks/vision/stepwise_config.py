"""What every task configures that trains one base network and keeps the checkpoints of its fine-tuning steps."""

from __future__ import annotations

from pydantic import Field

from rpg.section import Section


class StepwiseConfig(Section):
    """How the base network is trained, and what its fine-tuning keeps."""

    base: str = Field(
        "runs/base.safetensors",
        description="where the network before fine-tuning is kept; put a state dict of yours there to start from it",
    )
    seed: int = Field(0, ge=0, description="decides the initial weights, the order of the data and all noise")
    train_steps: int = Field(1000, ge=1, description="steps to the base network, where there is no file of it")
    learning_rate: float = Field(3e-3, gt=0, description="its peak on the way to the base network; a cosine to 0")
    weight_decay: float = Field(1e-4, ge=0)
    steps: int = Field(48, ge=1, description="fine-tuning steps; one checkpoint is saved after each")
    finetune_learning_rate: float = Field(5e-4, gt=0, description="constant learning rate of the fine-tuning steps")
    finetune: tuple[str, ...] = Field(
        ("*",), description="patterns of what is fine-tuned and saved; empty: the last norm layers"
    )
    num_norms: int = Field(2, ge=1, description="how many of the last norm layers")
    average: float = Field(
        0.0, ge=0, lt=1, description="decay of the moving average of the weights that checkpoints are; 0: the weights"
    )
    hold_out: int = Field(
        0, ge=0, description="every so-many-th checkpoint is of split held_out, which no generator learns from; 0: none"
    )
    batch_size: int = Field(32, ge=1)
    threads: int = Field(1, ge=1, description="threads of training steps and scores on a CPU; bits depend on it")
    device: str = Field("auto", description="cpu, cuda, …")
