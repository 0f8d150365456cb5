"""Arguments and options of the command line: types with help texts and limits."""

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
    """An option without a value, with its help text."""
    return option(text, *names, metavar="", **more)


# of several commands
ConfigFile = Annotated[Path, argument("A YAML configuration, e.g. configs/digits.yaml.", "CONFIG")]
OtherConfig = Annotated[
    Path | None, argument("A configuration with a task; unseen, lora, fields and metric have a default.", "CONFIG")
]
RunFolder = Annotated[
    Path,
    argument(
        "A run or generator folder, `sensors` (included in the package), or an id on the Hugging Face hub.", "RUN"
    ),
]
AppFolder = Annotated[Path, argument("As for generate (default: the package's own generator of sensors).", "[RUN]")]
ZooFolder = Annotated[Path, argument("A zoo of several runs.", "ZOO")]
Overrides = Annotated[
    list[str] | None, option("Change a field, e.g. --set train.steps=100. Repeatable.", "--set", metavar="KEY=VALUE")
]
Seed = Annotated[int, option("Random seed.", min=0)]
Condition = Annotated[str | None, option("Comma-separated values, e.g. 1,0,0,1 for a binary vector.")]
Split = Literal["test", "validation"]
ScoredSplit = Annotated[
    Split | None,
    option(
        "Only score a run: on test tasks, or on validation tasks for making choices (if the configured run is trained "
        "on these, a run in RUN/choices is scored)."
    ),
]
RowSplit = Annotated[Split, option("Rows of each task's file.")]

# collect, of checkpoints of your own
Source = Annotated[list[str] | None, option("Your own checkpoints: any number of folders, files or globs.", "--from")]
CollectedConfig = Annotated[
    list[str] | None, argument("A configuration with a task; after --from, more checkpoints.", "CONFIG | FILE")
]
Key = Annotated[
    str | None, option("Which set of weights to read from files that hold several, e.g. generator.", "--key")
]
Strip = Annotated[str | None, option("Prefix to remove from all tensor names, e.g. net.", metavar="PREFIX")]
SkipBad = Annotated[
    bool, flag("With --from: skip and list checkpoints that are unreadable or of another network.", "--skip-bad")
]
NewZoo = Annotated[Path | None, option("With --from: the zoo folder to make.")]
Table = Annotated[
    Path | None,
    option(
        "With --from: CSV or JSONL with each checkpoint's file, run, step and condition.", "--table", "--conditions"
    ),
]
Pattern = Annotated[
    str | None, option("With --from: regular expression for file names with groups run, step, condition.")
]
AdapterBase = Annotated[
    str | None,
    option("With --from: the base model of all adapters, whatever path each names.", "--base", metavar="NAME"),
]
FindRuns = Annotated[bool, flag("With --from: read run and step from common file names.", "--find-runs/--no-find-runs")]
Kind = Annotated[str | None, option("With --from: binary, class, vector or text (default: inferred from the values).")]

# inspect and plan
Inspected = Annotated[Path, argument("A zoo folder, a checkpoint or a configuration.", "PATH")]
Verify = Annotated[
    bool, flag("Read the whole zoo: check digests and finite values, encode and decode every token.", "--verify")
]
WriteConfig = Annotated[
    Path | None, option("For a zoo: write a proposed configuration, ready for rpg train.", metavar="FILE")
]
Memory = Annotated[str | None, option("Memory of a GPU, e.g. 24GB or a100: show the largest target network that fits.")]
TimmName = Annotated[str | None, option("Target network by its name in timm; needs no zoo.")]
Checkpoints = Annotated[int | None, option("Number of checkpoints, if there is no zoo yet (default: 50).", min=1)]
ConditionSize = Annotated[int | None, option("Number of values in a condition, if there is no zoo yet.", min=1)]
Processes = Annotated[int, option("Processes that share a training step.", min=1)]

# train, sweep, unseen
Resume = Annotated[bool, flag("Continue the run exactly from its last save.", "--resume")]
OverwriteNetworks = Annotated[bool, flag("Replace existing networks of another request.", "--overwrite")]
Overwrite = Annotated[bool, flag("Replace the existing run.", "--overwrite")]
Compare = Annotated[
    bool, flag("Also train kernel ridge and report which is better on the validation split.", "--compare")
]
SweepFile = Annotated[Path, argument("A sweep file, e.g. configs/sweeps/noise.yaml.", "SWEEP")]
Jobs = Annotated[int, option("Number of parallel experiments.", min=1)]
Only = Annotated[list[str] | None, option("Run only this entry. Repeatable.", metavar="NAME")]
NumSeeds = Annotated[int, option("Number of generators to train, one per seed.", min=1)]

# generate, export, evaluate, score
Num = Annotated[int, option("Number of networks.", "--num", "-n", min=1)]
NumScored = Annotated[
    int | None, option("Number of networks to generate (default: the configuration's).", "--num", "-n", min=1)
]
OutputFolder = Annotated[Path | None, option("Folder for the files (default: RUN/generated).")]
Steps = Annotated[int | None, option("Sampling steps (default: the configuration's).", min=1)]
Sampler = Annotated[str | None, option("euler, heun, ddpm, ddim or dpm-solver++.")]
Classes = Annotated[str | None, option("The task's positive classes by name or number, e.g. 1,3,5 or cat,dog.")]
Prompt = Annotated[str | None, option("The task in words: any text, or class names if the condition is binary.")]
PromptModel = Annotated[
    str | None,
    option(
        "Language model or sentence encoder for --prompt: a name or local path (for generators trained with texts: "
        "where their encoder is)."
    ),
]
Metric = Annotated[str | None, option("Target value of the zoo's metric, e.g. loss=0.1.", metavar="NAME=VALUE")]
Setting = Annotated[
    list[str] | None,
    option(
        "A setting of what the network is for, e.g. angle=137 or inverted=true; others keep their defaults. "
        "Repeatable.",
        metavar="NAME=VALUE",
    ),
]
Examples = Annotated[
    Path | None,
    option(
        "Examples of the task: images in class folders (or unlabelled), npz with X and y, csv; for adapters rows as "
        "jsonl.",
        metavar="PATH",
    ),
]
ChooseBy = Annotated[
    Path | None, option("Labelled examples, read like --examples, that rank the draws.", metavar="PATH")
]
Ensemble = Annotated[bool, flag("Also write all draws into one file, stacked.", "--ensemble")]
Start = Annotated[Path | None, option("Checkpoint to continue from, for generators that take one.", "--from")]
Guidance = Annotated[float | None, option("Scale of classifier-free guidance; 1 means none.", min=0)]
State = Annotated[str | None, option("Permutation states: stored, density, gaussian or prior.")]
Temperature = Annotated[
    float | None,
    option("Spread of fresh states (or of kernel ridge's draws) relative to the zoo's; 0 is the mean.", min=0),
]
Sparsity = Annotated[
    float | None, option("For pruned networks: share of zeros among prunable weights (default: the zoo's).")
]
IgnoreMemory = Annotated[bool, flag("Start even if more memory is needed than is free.", "--ignore-memory")]
Device = Annotated[str, option("auto (the best found), cpu, cuda, cuda:1, mps, …; launchers set it themselves.")]
Host = Annotated[str, option("Address to serve at; 0.0.0.0 accepts connections from any host.")]
Port = Annotated[int, option("Port to serve at.", min=1, max=65535)]
DenoisingPath = Annotated[
    str | None,
    option(
        "Add to report.html how networks for this condition emerge from noise: bits or classes, a class, numbers, or "
        "a text.",
        "--denoising-path",
        "--trajectory",
        metavar="CONDITION",
    ),
]
Exported = Annotated[str, argument("A checkpoint, or a run or generator folder that generates one.", "SOURCE")]
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
    Path | None, option("Configuration of the fields, for files outside a run or zoo of fields.", "--config")
]
PictureFolder = Annotated[Path | None, option("Folder for the images (default: beside the files).")]
Evaluated = Annotated[Path, argument("A run folder, or a zoo.", "RUN")]
Scored = Annotated[
    list[Path],
    argument(
        "Zoos, checkpoints or PEFT folders, and a configuration with the task that scores them.", "FILE… [CONFIG]"
    ),
]
Function = Annotated[
    str | None,
    option(
        "Score with your own function, which takes a state dict (or a path) and returns a number or a dict of numbers.",
        "--score",
        metavar="MODULE:FUNCTION",
    ),
]
Lower = Annotated[
    list[str] | None,
    option(
        "With --score: a metric for which lower is better (the default for names with loss or error).", metavar="NAME"
    ),
]
Higher = Annotated[list[str] | None, option("With --score: a metric for which higher is better.", metavar="NAME")]
Full = Annotated[bool, flag("Print every baseline, metric and part of the report.", "--full")]
ResultFolder = Annotated[Path | None, option("Folder for the results (default: RUN).")]

# of all commands, align and demo
Quiet = Annotated[bool, flag("Print errors only; may stand anywhere.", "--quiet")]
AsJson = Annotated[bool, flag("Print one JSON object of paths and metrics; may stand anywhere.", "--json")]
AlignedZoo = Annotated[Path, argument("The zoo to write.")]
DemoConfig = Annotated[Path | None, option("Configuration (default: configs/demo.yaml).")]

# push and pull
HubKind = Annotated[
    Literal["model", "dataset"] | None,
    option("What it is (default: found out): model, a generator; dataset, a zoo.", "--type"),
]
PulledKind = Annotated[Literal["model", "dataset"], option("dataset for a zoo.", "--type")]
Repo = Annotated[str, argument("Id on the Hugging Face hub: name/repository.", "REPO")]
Pushed = Annotated[Path, argument("A run or generator folder, or a zoo.", "FOLDER")]
Pulled = Annotated[Path, argument("The new folder.", "FOLDER")]
Private = Annotated[bool, flag("Make a new repository private.", "--private")]
Branch = Annotated[str | None, option("Publish on this branch (made if need be) in place of the main one.")]
Message = Annotated[str | None, option("What the commit says.")]
Revision = Annotated[str | None, option("A branch, tag or commit (default: the main branch).")]

# merge
Merged = Annotated[list[Path], argument("Checkpoints of one network, of any kind, or PEFT adapters.", "FILE…")]
Method = Annotated[
    str, option("linear, slerp, ties, dare_linear, dare_ties or model_stock.", "--method", metavar="METHOD")
]
MergedOutput = Annotated[Path, option("The safetensors file to write; of adapters the folder.")]
MergeBase = Annotated[
    str | None,
    option(
        "What all began with: a file, for ties, dare_linear, dare_ties and model_stock; of adapters the base's name."
    ),
]
MergeWeights = Annotated[
    str | None, option("One number for each file, e.g. 0.7,0.3 (default: equal ones).", metavar="NUMBERS")
]
Normalize = Annotated[
    bool | None,
    option(
        "Scale the weights to add up to 1 (default: linear and ties do, dare_linear and dare_ties do not).",
        "--normalize/--no-normalize",
    ),
]
Density = Annotated[
    float | None, option("Share of the deviations that ties (default: 0.2) and dare (default: 0.5) keep.")
]
MergePlace = Annotated[float | None, option("Of slerp: 0 is the first, 1 the second network (default: 0.5).", "--t")]
