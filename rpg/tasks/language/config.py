"""Configuration of the language task: the base, the adapters' form and their training. Nothing here computes."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from rpg.section import Section


class RowsConfig(Section):
    """Which rows of every file are kept from training, and how long a row may be."""

    validation: int = Field(64, ge=1, description="the rows before the test rows; choices are made on them")
    test: int = Field(128, ge=1, description="the last rows of every file")
    max_tokens: int = Field(1024, ge=2, description="longest row, prompt and completion together")


class SymbolsConfig(Section):
    """The strings, and the base that copies them."""

    symbols: int = Field(8, ge=2, le=26, description="different symbols; 2^symbols − 2 tasks")
    length: int = Field(8, ge=1, description="symbols of a string")
    rows: int = Field(512, ge=3, description="strings; the same ones in every task's file")
    hidden: int = Field(128, ge=4)
    intermediate: int = Field(448, ge=4)
    layers: int = Field(2, ge=1)
    heads: int = Field(4, ge=1)
    steps: int = Field(400, ge=1, description="pretraining steps")
    batch_size: int = Field(64, ge=1)
    learning_rate: float = Field(2e-3, gt=0)


class AdapterConfig(Section):
    """The adapters' form, as PEFT names it."""

    kind: Literal["lora", "dora"] = Field("lora", description="dora: LoRA with a learned norm of every output")
    r: int = Field(4, ge=1, description="rank")
    alpha: float = Field(8.0, gt=0, description="the product B·A is scaled by alpha / r (rslora: alpha / sqrt(r))")
    rslora: bool = False
    dropout: float = Field(0.0, ge=0, lt=1, description="on the adapters' inputs; with one adapter at a time only")
    target_modules: tuple[str, ...] = Field(("q_proj", "v_proj"), min_length=1)


class AdapterTraining(Section):
    """How an adapter is trained from its start."""

    steps: int = Field(120, ge=1)
    batch_size: int = Field(16, ge=1, description="rows a step")
    learning_rate: float = Field(1e-2, gt=0, description="after a short warm-up; falls to 0 along a cosine")
    weight_decay: float = Field(0.0, ge=0)
    checkpoints: int = Field(1, ge=1, description="checkpoints kept of every adapter")
    tail: float = Field(
        0.5, gt=0, le=1, description="share of the steps, the last, that is cut into one stretch a checkpoint, each of "
        "which is the mean of the weights over its stretch",
    )  # fmt: skip
    until: float | None = Field(
        None, gt=0, le=1, description="exact match on validation rows at which an adapter is kept as it is; steps is "
        "the most",
    )  # fmt: skip
    check_every: int = Field(10, ge=1, description="with until: steps between looks at the validation rows")
    gradient_checkpointing: bool = Field(False, description="with one adapter at a time: less memory, more time")


class LanguageConfig(Section):
    """A base model, tasks for it, and how an adapter is trained for each."""

    constants: ClassVar = {"score_rows": 2048}
    name: Literal["language"] = "language"
    seed: int = Field(0, ge=0, description="decides splits of tasks, starts of adapters and the order of rows")
    base: str = Field(description="the base model: a local folder, or a name on the hub")
    data: str = Field(description="folder of JSONL files, one a task, rows with prompt and completion")
    conditions: str | None = Field(
        None, description="table with file, condition or condition.NAME, split; without it the stems are the conditions"
    )
    condition: Literal["binary", "class", "vector", "text"] | None = Field(
        None, description="kind of the conditions; found out from the values if left out, names being classes"
    )
    symbols: SymbolsConfig | None = Field(None, description="first make base and data: symbol strings")
    unseen: int = Field(50, ge=0, description="tasks that no generator sees, where the table has no split")
    validation: int = Field(20, ge=0, description="seen tasks kept for choices, where the table has no split")
    rows: RowsConfig = RowsConfig()
    adapter: AdapterConfig = AdapterConfig()
    training: AdapterTraining = AdapterTraining()
    start: Literal["shared", "own"] = Field(
        "shared", description="all adapters start from the same random A, or each from its own"
    )
    group: int = Field(32, ge=1, description="adapters trained side by side; 1: each by PEFT alone")
    processes: int | None = Field(
        None, ge=1, description="groups trained at a time; as many as cores when null, one with a GPU"
    )
