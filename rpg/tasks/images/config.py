"""Configuration of the image tasks: what is collected and how it is trained. Nothing here computes."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, TypeAlias

from pydantic import Field, model_validator

from rpg.section import Section


class Pruning(Section):
    """Networks of which most weights are zero."""

    kind: Literal["prune"] = "prune"
    sparsity: float = Field(0.8, gt=0, lt=1, description="share of zeros among the weights of layers, biases apart")
    steps: int = Field(400, ge=1, description="fine-tuning steps in which the share of zeros rises")
    masks: Literal["csr", "stored", "implied"] = Field(
        "csr", description="compressed rows; values and mask, as torch.nn.utils.prune; zeros (name them: tokens.pruned)"
    )


class Quantisation(Section):
    """Networks whose weights are integers with one scale for each output channel."""

    kind: Literal["quantise"] = "quantise"
    bits: Literal[8, 4] = Field(8, description="of a code")
    steps: int = Field(200, ge=1, description="fine-tuning steps with rounded weights before the first checkpoint")


Compress: TypeAlias = Annotated[Pruning | Quantisation, Field(discriminator="kind")]


DIGITS_SIZE = 8
"""Height and width of scikit-learn's digits."""

NetworkName = Literal[
    "cnn", "vit", "vit-coarse", "vit-tiny", "convnet-mini", "mlp-mini", "resnet-mini", "vit-mini", "convnext-mini",
    "convnext-tiny", "convnext-large", "convnet-mini-24k", "resnet-mini-25k",
]  # fmt: skip


Precision = Literal["fp32", "bf16"]
Arithmetic = Literal["auto", "fp32", "bf16"]


class CollectionConfig(Section):
    """How the checkpoints of a zoo are trained."""

    seed: int = Field(0, ge=0, description="decides the initial weights and the order of the images of every run")
    runs: int = Field(1, ge=1, description="independent training runs")
    steps: int = Field(128, ge=1, description="fine-tuning steps of a run; one checkpoint is saved after each")
    hold_out: int = Field(
        0,
        ge=0,
        description="every n-th checkpoint of a run is of split held_out: no generator learns from it, and "
        "generated networks are compared with it; 0 holds none out",
    )
    train_steps: int = Field(800, ge=1, description="optimizer steps to convergence before the first checkpoint")
    batch_size: int = Field(128, ge=1, description="images a step")
    learning_rate: float = Field(5e-3, gt=0, description="peak of the one-cycle schedule to convergence")
    finetune_learning_rate: float = Field(2e-3, gt=0, description="constant learning rate of the fine-tuning steps")
    weight_decay: float = Field(0.05, ge=0)
    optimizer: Literal["adamw", "adam", "sgd"] = Field("adamw", description="of both phases; sgd has momentum 0.9")
    precision: Arithmetic = Field("fp32", description="arithmetic of the training steps; auto: bf16 where it is faster")
    dtype: Precision = Field("fp32", description="floating-point values of the checkpoints on disk")
    threads: int = Field(
        1, ge=1, description="threads of the training steps; more than one for large networks, bits depend on it"
    )
    finetune: tuple[str, ...] = Field(
        ("*",), min_length=1, description="glob patterns of the parameters that the fine-tuning steps change"
    )
    augment: bool = Field(False, description="move, turn and scale the training images at random, in both phases")


RECIPES: dict[str, dict[str, Any]] = {
    # chosen on the validation images: with the general recipe it stays at 93 %
    "vit": {"train_steps": 1500, "batch_size": 64, "finetune_learning_rate": 5e-4},
}


class DigitsConfig(CollectionConfig):
    """Handwritten digits and the network that is trained on them."""

    name: Literal["digits"] = "digits"
    network: NetworkName = Field("cnn", description="the target network")
    image_size: int = Field(
        DIGITS_SIZE, ge=DIGITS_SIZE, description="height and width to which the images are enlarged"
    )

    compress: Compress | None = Field(None, description="all runs then compress one dense network, each by itself")

    @model_validator(mode="before")
    @classmethod
    def _fill_recipe(cls, given: Any) -> Any:
        """Fields that are not given take the network's own recipe, where it has one."""
        return {**RECIPES.get(str(given.get("network")), {}), **given} if isinstance(given, dict) else given


class RandomSplit(Section):
    """Tasks drawn at random are held out."""

    kind: Literal["random"] = "random"
    num: int = Field(200, ge=1, description="unseen tasks")


class HammingWeightSplit(Section):
    """All tasks with given numbers of positive classes are held out."""

    kind: Literal["hamming_weight"] = "hamming_weight"
    weights: tuple[int, ...] = Field((3, 7), min_length=1, description="numbers of positive classes")


class ClassPairSplit(Section):
    """All tasks that put two given classes on one side, both positive or both negative, are held out."""

    kind: Literal["class_pair"] = "class_pair"
    pair: tuple[int, int] = Field((3, 8), description="two classes, counted from 0")


UnseenSplit = Annotated[RandomSplit | HammingWeightSplit | ClassPairSplit, Field(discriminator="kind")]


class Stage(Section):
    """A stretch of fine-tuning."""

    steps: int = Field(200, ge=1)
    learning_rate: float = Field(1e-2, gt=0, description="its peak")
    schedule: Literal["cosine", "constant"] = Field(
        "cosine", description="the learning rate warms up and falls to 0 along a cosine, or stays as it is"
    )
    weight_decay: float = Field(0.05, ge=0)
    only: tuple[str, ...] = Field(("*",), min_length=1, description="patterns of the tensors that are trained")


class FinetuneConfig(Section):
    """How the base network is fine-tuned for each task."""

    constants: ClassVar = {"focal_gamma": 2.0}
    stages: tuple[Stage, ...] = Field((Stage(),), min_length=1)
    batch_size: int = Field(128, ge=1)
    images_at_a_time: int | None = Field(
        None, ge=1, description="images of a step whose activations are held together; all of them when null"
    )
    augment: bool = Field(True, description="move, turn and scale the images at random")
    precision: Arithmetic = Field("fp32", description="arithmetic of the training steps; auto: bf16 where it is faster")
    loss: Literal["cross_entropy", "focal"] = "cross_entropy"
    checkpoints: int = Field(1, ge=1, description="checkpoints kept of every task")
    tail: float = Field(
        0.5, gt=0, le=1, description="share of the last stage that is cut into one stretch a checkpoint, "
        "each of which is the mean of the weights over its stretch",
    )  # fmt: skip


class SubsetsConfig(Section):
    """Fields that every family of binary tasks shares."""

    seed: int = Field(0, ge=0, description="decides splits of tasks, initial weights and the order of images")
    tasks: int | None = Field(None, ge=4, description="so many of the family's tasks, drawn at random; all when null")
    unseen: UnseenSplit = Field(RandomSplit(), description="tasks that no generator is trained on")
    validation: int = Field(100, ge=0, description="seen tasks kept for choices")
    finetune: FinetuneConfig = FinetuneConfig()
    fresh_head: bool = Field(False, description="start every task's head at random, not at the base's mean rows")
    group: int = Field(32, ge=1, description="tasks trained side by side in one process")
    copies: int = Field(
        1, ge=1, description="networks of every task, each from other images: runs 0 … T − 1 are the first networks of "
        "the T tasks, the next T the second ones",
    )  # fmt: skip


class BaseConfig(Section):
    """How the shared base network is trained: AdamW, one-cycle schedule, altered images."""

    steps: int = Field(3000, ge=0, description="0 keeps the first weights")
    batch_size: int = Field(256, ge=1)
    learning_rate: float = Field(1e-2, gt=0)
    weight_decay: float = Field(0.05, ge=0)
    precision: Arithmetic = Field("fp32", description="arithmetic of the training steps; auto: bf16 where it is faster")


class DigitsSubsetsConfig(SubsetsConfig):
    """Which of two groups of digits an image belongs to: 1,022 tasks."""

    name: Literal["digits_subsets"] = "digits_subsets"
    network: NetworkName = Field("cnn", description="the target network; one without dropout and batch norm")
    image_size: int = Field(
        DIGITS_SIZE, ge=DIGITS_SIZE, description="height and width to which the images are enlarged"
    )
    base: BaseConfig = BaseConfig()


class ProbeConfig(Section):
    """How the shared base gets its ten-way head: a linear probe on the ImageNet network."""

    steps: int = Field(180, ge=1)
    learning_rate: float = Field(1e-2, gt=0)
    batch_size: int = Field(500, ge=1)


class Cifar10FinetuneConfig(FinetuneConfig):
    """The paper's recipe, any field of which may be changed by itself."""

    stages: tuple[Stage, ...] = Field(
        (
            Stage(steps=180, learning_rate=1e-2, weight_decay=0.1, only=("head.*",)),  # 2 epochs of 45,000 images
            Stage(steps=1170, learning_rate=1e-4, weight_decay=0.1),  # 13 epochs
        ),
        min_length=1,
    )
    batch_size: int = Field(500, ge=1)
    images_at_a_time: int | None = Field(
        100, ge=1, description="images of a step whose activations are held together; all 500 take 14 GB"
    )
    loss: Literal["cross_entropy", "focal"] = "focal"
    checkpoints: int = Field(5, ge=1, description="checkpoints kept of every task")
    tail: float = Field(0.05, gt=0, le=1, description="share of the last stage that the checkpoints are means of")


class Cifar10SubsetsConfig(SubsetsConfig):
    """Which of two groups of CIFAR-10 classes an image belongs to: 1,022 tasks."""

    name: Literal["cifar10_subsets"] = "cifar10_subsets"
    root: str = Field("data/cifar10", description="folder that holds cifar-10-batches-py")
    download: bool = Field(False, description="let torchvision fetch the images into root")
    network: str = Field("vit_tiny_patch16_224", description="a timm network without dropout and batch norm")
    pretrained: bool = Field(True, description="start from timm's ImageNet weights")
    image_size: int = Field(224, ge=1, description="what the 32×32 images are enlarged to")
    num_validation: int = Field(5000, ge=1, description="training images kept for choices")
    eval_batch: int = Field(250, ge=1, description="images enlarged and scored at a time")
    probe: ProbeConfig = ProbeConfig()
    fresh_head: bool = Field(True, description="start every task's head at random, as the paper does")
    finetune: Cifar10FinetuneConfig = Cifar10FinetuneConfig()
    group: int = Field(4, ge=1, description="tasks trained side by side in one process")


DatasetName = Literal["folder", "cifar10", "cifar100", "stl10", "flowers102", "pets", "food101"]


class StepwiseConfig(Section):
    """Fields that the zoos of one network's fine-tuning steps share."""

    seed: int = Field(0, ge=0, description="decides the initial weights, the order of the data and all noise")
    weight_decay: float = Field(1e-4, ge=0)
    hold_out: int = Field(
        0, ge=0, description="every n-th checkpoint is of split held_out, which no generator learns from; 0: none"
    )
    batch_size: int = Field(32, ge=1)
    device: str = Field("auto", description="cpu, cuda, …")


class FinetunedConfig(StepwiseConfig):
    """How the base network is trained, and what its fine-tuning keeps."""

    base: str = Field(
        "runs/base.safetensors",
        description="where the network before fine-tuning is kept; put a state dict of yours there to start from it",
    )
    learning_rate: float = Field(3e-3, gt=0, description="its peak on the way to the base network; a cosine to 0")
    steps: int = Field(48, ge=1, description="fine-tuning steps; one checkpoint is saved after each")
    finetune_learning_rate: float = Field(5e-4, gt=0, description="learning rate of the fine-tuning steps")
    finetune: tuple[str, ...] = Field(
        ("*",), description="patterns of what is fine-tuned and saved; empty: the last norm layers"
    )
    num_norms: int = Field(2, ge=1, description="how many of the last norm layers")
    average: float = Field(
        0.0, ge=0, lt=1, description="decay of the moving average of the weights that checkpoints are; 0: the weights"
    )


class TimmFinetuneConfig(FinetunedConfig):
    """A network, a data set, and how one is fitted to the other."""

    name: Literal["finetune"] = "finetune"
    network: str = Field(
        "resnet18",
        description="a timm model, or a class or function of yours that makes a module for images [B, 3, S, S]: "
        "package.module:name or file.py:name",
    )
    network_arguments: dict[str, Any] = Field(
        {}, description="keyword arguments of a network of yours, the number of its classes among them"
    )
    pretrained: bool = Field(
        True, description="start from timm's weights, fetched from the hub; a network of yours loads its own, if any"
    )
    data: str = Field("data", description="folder of the data set; it is never downloaded")
    dataset: DatasetName = Field("folder", description="folder: DATA/train/CLASS/*.jpg and DATA/val/CLASS/*.jpg")
    image_size: int = Field(224, ge=1)
    train_epochs: int = Field(10, ge=0, description="epochs of the whole network; 0 to keep the pretrained one")
    learning_rate: float = Field(5e-4, gt=0)
    weight_decay: float = Field(5e-4, ge=0)
    steps: int = Field(300, ge=1, description="fine-tuning steps; one checkpoint is saved after each")
    finetune_learning_rate: float = Field(3e-2, gt=0, description="its peak; a cosine to 0")
    finetune: tuple[str, ...] = Field((), description="patterns of what is fine-tuned; empty: the last norm layers")
    batch_size: int = Field(128, ge=1)
    workers: int = Field(0, ge=0, description="processes that read images")


class ImageNetConfig(StepwiseConfig):
    """A timm network, a folder of images, and the epochs in which its checkpoints are saved."""

    name: Literal["imagenet"] = "imagenet"
    network: str = Field("vit_base_patch16_224", description="a timm model")
    pretrained: bool = Field(True, description="start from timm's weights, fetched from the hub")
    weights: str | None = Field(None, description="file to start from instead, of any kind that holds a state dict")
    data: str = Field("data/imagenet", description="folder with train/CLASS/*.jpg and val/CLASS/*.jpg")
    num_classes: int = Field(1000, ge=2, description="classes of the data; the network's head has as many logits")
    image_size: int = Field(224, ge=1)
    epochs: float = Field(1.0, gt=0, description="epochs of fine-tuning")
    checkpoints: int = Field(50, ge=1, description="saved at even distances in them, the last step among them")
    learning_rate: float = Field(1e-5, gt=0, description="constant, so that checkpoints stay comparable")
    weight_decay: float = Field(0.05, ge=0)
    batch_size: int = Field(128, ge=1)
    precision: Arithmetic = Field("fp32", description="arithmetic; checkpoints are fp32 in any case")
    workers: int = Field(0, ge=0, description="processes that read images")
