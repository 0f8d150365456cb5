"""The arguments and options of the command line: types with their help texts and limits, and what is read by them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer


def argument(text: str, metavar: str | None = None) -> Any:
    """An argument with its help text."""
    return typer.Argument(help=text, metavar=metavar)


def option(text: str, *names: str, **limits: Any) -> Any:
    """An option with its help text."""
    return typer.Option(*names, help=text, **limits)


# of several commands
ConfigFile = Annotated[Path, argument("A YAML configuration, e.g. configs/digits.yaml.", "CONFIG")]
OtherConfig = Annotated[
    Path | None,
    argument("A configuration with a task; unseen, lora, fields and metric have one of their own.", "[CONFIG]"),
]
RunFolder = Annotated[Path, argument("A run or generator folder, or an id on the Hugging Face hub.", "RUN")]
ZooFolder = Annotated[Path, argument("A zoo of several runs.", "ZOO")]
Overrides = Annotated[
    list[str] | None,
    option("Change a field: --set train.steps=100. Can be given several times.", "--set", metavar="KEY=VALUE"),
]
Seed = Annotated[int, option("Decides everything that is random.", min=0)]
Condition = Annotated[str | None, option("Comma-separated values, e.g. 1,0,0,1 for a binary vector.")]
Split = Literal["test", "validation"]
ScoredSplit = Annotated[
    Split | None,
    option(
        "Only score a run: on the test tasks, or on the validation tasks to make choices by (of a run in RUN/choices "
        "where the configured one is trained on them)."
    ),
]
RowSplit = Annotated[Split, option("Rows of every task's file.")]

# collect, of checkpoints of your own
Source = Annotated[str | None, option("Your own checkpoints: a folder or a glob.", "--from")]
NewZoo = Annotated[Path | None, option("With --from: the zoo folder to make.")]
Table = Annotated[
    Path | None,
    option("With --from: CSV or JSONL with file, run, step, condition of each checkpoint.", "--table", "--conditions"),
]
Pattern = Annotated[
    str | None, option("With --from: regular expression on file names with groups run, step, condition.")
]
AdapterBase = Annotated[
    str | None,
    option(
        "The network that the weights are for: a folder with its config.json (transformers) or adapter_config.json "
        "(peft), timm's name, an original .ckpt (lightning), or MODULE:FUNCTION (timm, lightning, torch).",
        metavar="NETWORK",
    ),
]
Fields = Annotated[list[Path], argument("Fields: files of a zoo, or generated ones.", "FILE…")]
Resolution = Annotated[int, option("Height and width of the images.", min=1)]
FieldsConfig = Annotated[
    Path | None, option("How the fields were made, for files that lie in no run or zoo of fields.", "--config")
]
PictureFolder = Annotated[Path | None, option("Folder for the images (default: beside the files).")]
Evaluated = Annotated[Path, argument("A run folder, or a zoo, which is scored without a generator.", "RUN")]
Scored = Annotated[
    list[Path],
    argument(
        "Zoos, checkpoints or PEFT folders, and a configuration with the task that scores them.", "FILE… [CONFIG]"
    ),
]
Function = Annotated[
    str | None,
    option(
        "Score with a function of your own: it takes a state dict (or a path) and returns a number or a dict of them.",
        "--score",
        metavar="MODULE:FUNCTION",
    ),
]
Lower = Annotated[
    list[str] | None,
    option(
        "With --score: a figure of which less is better (names with loss or error say so themselves).", metavar="NAME"
    ),
]
Higher = Annotated[list[str] | None, option("With --score: a figure of which more is better.", metavar="NAME")]
ResultFolder = Annotated[Path | None, option("Folder for the results (default: RUN).")]


def default_config(name: str) -> Path:
    """A configuration that comes with the package: beside it in a checkout, inside it when installed."""
    package = Path(__file__).parent.parent
    inside = package / "configs"
    return (inside if inside.is_dir() else package.parent / "configs") / name
