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


def flag(text: str, *names: str, **more: Any) -> Any:
    """An option that is there or not, with its help text."""
    return option(text, *names, metavar="", **more)


# of several commands
ConfigFile = Annotated[Path, argument("A YAML configuration, e.g. configs/digits.yaml.", "CONFIG")]
OtherConfig = Annotated[
    Path | None,
    argument("A configuration with a task; unseen, lora, fields and metric have one of their own.", "CONFIG"),
]
RunFolder = Annotated[
    Path, argument("A run or generator folder, sensors (comes with rpg), or an id on the Hugging Face hub.", "RUN")
]
AppFolder = Annotated[
    Path, argument("As of generate (default: the generator of sensors that comes with rpg).", "[RUN]")
]
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
Source = Annotated[
    list[str] | None, option("Your own checkpoints: folders, files or globs, as many as you like.", "--from")
]
CollectedConfig = Annotated[
    list[str] | None,
    argument("A configuration with a task; after --from, more checkpoints.", "[CONFIG | FILE…]"),
]
Key = Annotated[str | None, option("Which set of weights to take where files hold several, e.g. generator.", "--key")]
Strip = Annotated[str | None, option("Prefix to cut off all tensor names, e.g. net.", metavar="PREFIX")]
SkipBad = Annotated[
    bool,
    option("With --from: leave out checkpoints that cannot be read or do not belong, and list them.", "--skip-bad"),
]
NewZoo = Annotated[Path | None, option("With --from: the zoo folder to make.")]
Table = Annotated[
    Path | None,
    option("With --from: CSV or JSONL with file, run, step, condition of each checkpoint.", "--table", "--conditions"),
]
Pattern = Annotated[
    str | None, option("With --from: regular expression on file names with groups run, step, condition.")
]
AdapterBase = Annotated[
    str | None, option("With --from: the base of all adapters, whatever path each names.", "--base", metavar="NAME")
]
FindRuns = Annotated[bool, flag("With --from: take run and step from common names.", "--find-runs/--no-find-runs")]
Kind = Annotated[
    str | None, option("With --from: binary, class, vector or text; found out from the values if left out.")
]

# inspect and plan
Inspected = Annotated[Path, argument("A zoo folder, a checkpoint of any kind, or a configuration.", "PATH")]
Verify = Annotated[bool, flag("Read the whole zoo: digests, finite values, into tokens and back.", "--verify")]
WriteConfig = Annotated[
    Path | None, option("Of a zoo: write a configuration that suits it, ready for rpg train.", metavar="FILE")
]
Memory = Annotated[str | None, option("Of a GPU: 24GB or a100; shows the largest target network that fits.")]
TimmName = Annotated[str | None, option("The target network, by timm's name; needs no zoo.")]
Checkpoints = Annotated[int | None, option("In a zoo that is not there yet (default: 50).", min=1)]
ConditionSize = Annotated[int | None, option("Values of a condition, if no zoo tells.", min=1)]
Processes = Annotated[int, option("Processes that share a training step.", min=1)]

# train, sweep, unseen
Resume = Annotated[bool, flag("Continue the run exactly where it was saved.", "--resume")]
OverwriteNetworks = Annotated[bool, flag("Replace networks of another request that are there.", "--overwrite")]
Overwrite = Annotated[bool, flag("Discard the run that is there.", "--overwrite")]
Compare = Annotated[
    bool, flag("Train kernel ridge, too, and say which is better on the validation split.", "--compare")
]
SweepFile = Annotated[Path, argument("A sweep file, e.g. configs/sweeps/noise.yaml.", "SWEEP")]
Jobs = Annotated[int, option("Experiments at a time.", min=1)]
Only = Annotated[list[str] | None, option("Run this entry alone. Can be given several times.", metavar="NAME")]
NumSeeds = Annotated[int, option("Generators to train, by seed.", min=1)]

# generate, export, evaluate, score
Num = Annotated[int, option("How many networks.", "--num", "-n", min=1)]
NumScored = Annotated[int | None, option("Networks to generate (default: the configuration's).", "--num", "-n", min=1)]
OutputFolder = Annotated[Path | None, option("Folder for the files (default: RUN/generated).")]
Steps = Annotated[int | None, option("Sampling steps (default: the configuration's).", min=1)]
Sampler = Annotated[str | None, option("euler, heun, ddpm, ddim or dpm-solver++.")]
Classes = Annotated[str | None, option("The task's positive classes by name or number, e.g. 1,3,5 or cat,dog.")]
Prompt = Annotated[str | None, option("The task in words: any text, or class names where the condition is binary.")]
PromptModel = Annotated[
    str | None,
    option(
        "Language model or sentence encoder for --prompt: a name or a local path (of a generator that takes texts: "
        "where its own encoder is)."
    ),
]
Metric = Annotated[str | None, option("The wished value of the zoo's metric, e.g. loss=0.1.", metavar="NAME=VALUE")]
Setting = Annotated[
    list[str] | None,
    option(
        "A setting of what the networks are for, e.g. angle=137 or inverted=true; others keep their defaults. Can be "
        "given several times.",
        metavar="NAME=VALUE",
    ),
]
Examples = Annotated[
    Path | None,
    option(
        "Examples of what to do: images in folders of classes (or unlabelled), npz with X and y, csv.", metavar="PATH"
    ),
]
ChooseBy = Annotated[
    Path | None, option("Labelled examples, read as --examples: say which of the draws they favour.", metavar="PATH")
]
Ensemble = Annotated[bool, flag("Write all draws into one file as well, stacked.", "--ensemble")]
Start = Annotated[Path | None, option("The checkpoint to go on from, of a generator that takes one.", "--from")]
Guidance = Annotated[float | None, option("Classifier-free guidance; 1 is none.", min=0)]
State = Annotated[str | None, option("stored, density, gaussian or prior: which permutation states to draw.")]
Temperature = Annotated[
    float | None,
    option("Spread of fresh states, or of kernel ridge's draws, in that of the zoo; 0: the mean.", min=0),
]
Sparsity = Annotated[
    float | None, option("Of pruned networks: share of zeros among their pruned weights (default: the zoo's).")
]
IgnoreMemory = Annotated[bool, flag("Begin even if more memory is needed than is free.", "--ignore-memory")]
Device = Annotated[
    str, option("auto (the best there is), cpu, cuda, cuda:1, mps, …; launched processes have their own.")
]
Host = Annotated[str, option("Address to serve at; 0.0.0.0 lets in everybody who reaches this machine.")]
Port = Annotated[int, option("Port to serve at.", min=1, max=65535)]
Trajectory = Annotated[
    str | None,
    option(
        "Show in report.html how networks for this condition come out of noise: bits or classes, a class, numbers, or "
        "a text.",
        metavar="CONDITION",
    ),
]
Exported = Annotated[str, argument("A checkpoint, or a run or generator folder to generate one with.", "SOURCE")]
Form = Annotated[str, option("timm, transformers, peft, lightning or torch (a pickle).", metavar="FORM")]
Written = Annotated[
    Path | None,
    option(
        "The file (timm, lightning, torch) or folder (transformers, peft) to write (default: beside the source).",
        "--output",
    ),
]
Base = Annotated[
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
Full = Annotated[
    bool, option("Print every baseline, metric and part of the report, not only the rows that matter.", "--full")
]
ResultFolder = Annotated[Path | None, option("Folder for the results (default: RUN).")]


def default_config(name: str) -> Path:
    """A configuration that comes with the package: beside it in a checkout, inside it when installed."""
    package = Path(__file__).parent.parent
    inside = package / "configs"
    return (inside if inside.is_dir() else package.parent / "configs") / name
