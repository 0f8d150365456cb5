"""The configuration of training."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from rpg.section import Section


class BehaviourConfig(Section):
    """The behaviour loss; weight 0 keeps its fraction of the batch at the last time and asks no behaviour of it."""

    weight: float = Field(1.0, ge=0, description="weight beside the weight-space loss")
    images: int = Field(128, ge=1, description="training images a step")
    target: Literal["labels", "base", "original", "both"] = Field(
        "labels",
        description="right answers: the images' labels, the base network's class probabilities, or those of the very "
        "checkpoint that is learned, so that what it does differently from others of its task is learned, too; both: "
        "the mean of base and checkpoint. With a metric: labels asks for its value, original for the checkpoint's "
        "answers, both for the sum",
    )
    tasks: Literal["zoo", "fresh"] = Field(
        "zoo", description="the tasks of the batch, or fresh ones in every step, of a family that draws them"
    )
    networks: int = Field(32, ge=1, description="with fresh tasks: networks a step")
    noise: float = Field(
        0.0, ge=0, description="standard deviation of noise on images, of sensors: networks that bear it are found "
        "between the tasks of a small zoo, too; of a metric, where the checkpoint's answers are asked for"
    )  # fmt: skip
    fraction: float = Field(0.5, gt=0, le=1, description="fraction of the batch whose tokens are all at the last time")


class NewStatesConfig(Section):
    """The loss of networks of new permutation states, which no checkpoint has."""

    weight: float = Field(1.0, gt=0, description="of the cross-entropy")
    spread: float = Field(1.0, ge=0, description="of the penalty on networks nearer one another than their temperature")
    temperature: float = Field(4.0, ge=1, description="widest states, in the spread of the learned ones; from 1 on")
    networks: int = Field(8, ge=2, description="networks a step")
    images: int = Field(128, ge=1, description="training images a step")
    start: float = Field(0.5, ge=0, lt=1, description="fraction of the steps before it sets in")


class TrainConfig(Section):
    """The training loop."""

    steps: int = Field(1000, ge=1, description="optimizer steps")
    batch_size: int = Field(16, ge=1, description="checkpoints a step, over all processes")
    splits: tuple[str, ...] = Field(("train",), min_length=1, description="splits of the zoo that are trained on")
    imitation: float = Field(
        1.0, ge=0, description="weight of the weight-space loss; 0: networks are taught by what they do alone, and no "
        "checkpoint is read"
    )  # fmt: skip
    networks: str | None = Field(
        None, description="run whose networks are taken and stay as they are: only what reads examples or words as "
        "settings is trained (model.condition.read, or phrases)"
    )  # fmt: skip
    tokens: int | None = Field(None, ge=1, description="tokens sampled of each checkpoint a step; all when null")
    learning_rate: float = Field(3e-3, gt=0)
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = Field(1e-4, ge=0)
    warmup_steps: int = Field(100, ge=0, description="steps of linear warm-up; a cosine to 0 follows")
    gradient_clip: float = Field(1.0, gt=0, description="largest gradient norm")
    gradient_accumulation: int = Field(1, ge=1, description="parts a step's batch is cut into, to save memory")
    optimizer: Literal["adamw", "adamw8bit"] = Field("adamw", description="adamw8bit: moments of 8 bits (bitsandbytes)")
    compile: Literal["inductor", "aot_eager", "eager"] | None = Field(
        None, description="backend of torch.compile for the networks; inductor: a slow start, then faster steps"
    )
    ema_decay: float = Field(0.999, ge=0, lt=1, description="decay of the weight average that is saved")
    precision: Literal["auto", "fp32", "bf16"] = Field("auto", description="auto: bf16 where the device is faster so")
    save_every: int = Field(500, ge=1, description="steps between resumable checkpoints")
    keep: int = Field(2, ge=1, description="how many resumable checkpoints stay on disk")
    behaviour: BehaviourConfig | None = Field(None, description="score predicted networks by what they answer")
    new_states: NewStatesConfig | None = Field(
        None, description="score networks of permutation states that no checkpoint has"
    )
    log_with: tuple[Literal["tensorboard", "wandb"], ...] = Field(
        ("tensorboard",),
        description="where losses go beside metrics.jsonl; wandb: Weights & Biases, if wandb is installed",
    )
    log_every: int = Field(10, ge=1, description="steps between logged losses")

    @model_validator(mode="after")
    def _something_teaches(self) -> TrainConfig:
        if not self.imitation and (self.behaviour is None or not self.behaviour.weight or self.new_states is not None):
            raise ValueError("imitation: 0 leaves nothing to learn from; give behaviour a weight, without new_states")
        if self.networks is not None and self.imitation:
            raise ValueError("networks of another run learn nothing more; set imitation to 0")
        return self
