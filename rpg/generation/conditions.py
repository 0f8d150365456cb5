"""What a user asks for → the condition of a generator; of a text, which classes does it mean?

A plain list of class names needs no model. Anything else is decided by a transformers model, class by class: a causal
language model is asked yes or no, a sentence encoder compares the prompt with the class names. C classes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rpg.console import console
from rpg.generation.examples import read_examples
from rpg.generation.text_encoder import load_pretrained, mean_hidden
from rpg.tasks.class_splits import bits_of_classes, check_bits
from tokenization.errors import InputError
from tokenization.zoo.condition import ConditionSpec, MetricScale, parse_settings

QUESTION = 'Question: does "{name}" belong to "{prompt}"? Answer yes or no.\nAnswer:'
NEUTRAL = "the things in this list"


def parse_condition(text: str | None) -> list[float] | None:
    """Comma-separated values as numbers. Raises InputError for anything else."""
    try:
        return None if text is None else [float(part) for part in text.split(",")]
    except ValueError:
        what = f"--condition {text!r} is not understood"
        raise InputError(f"{what}; write comma-separated numbers such as 1,0,0,1") from None


def named_condition(spec: ConditionSpec | None, text: str, where: str) -> list[float] | str:
    """A condition of any kind from one text: bits or classes, a class, numbers, or the text itself.

    Args:
        spec: what conditions mean; None where there are none.
        text: ``0110``, ``0,1,1,0`` or ``cat,dog``; ``french`` or ``3``; ``0.3,-1.2``; any text.
        where: the option to name in errors.

    Raises:
        InputError: it is no such condition, or there are none.
    """
    if spec is None:
        raise InputError(f"{where} names a condition, but the generator was trained without any; leave it out")
    if spec.kind == "text":
        return text
    if spec.kind == "class" and text in spec.names:
        return [float(spec.names.index(text))]
    bits = text if "," in text else ",".join(text)
    if spec.kind == "binary" and re.fullmatch(r"[01](,[01])*", bits) and bits.count(",") + 1 == spec.size:
        return parse_condition(bits) or []
    if spec.kind == "binary" and spec.names:
        return bits_of_classes(text.split(","), spec.names, where).tolist()
    values = [float(each) for each in text.split(",") if re.fullmatch(r"\s*-?\d+(\.\d*)?(e-?\d+)?\s*", each)]
    size = 1 if spec.kind == "class" else spec.size
    fits = len(values) == size == text.count(",") + 1
    if not fits or spec.kind == "binary" or (spec.kind == "class" and values[0] not in range(spec.size)):
        known = f" ({', '.join(spec.names)})" if spec.names else ""
        raise InputError(
            f"{where} {text!r} is not a condition of this generator; give a {spec.kind} of {spec.size}{known}"
        )
    return values


def choose_condition(
    generator: Any, condition: str | None, classes: str | None, prompt: str | None, prompt_model: str | None,
    metric: str | None = None, examples: Path | None = None, settings: Sequence[str] | None = None,
) -> list[float] | Tensor | str | None:  # fmt: skip
    """The condition that a user asks for by values, classes or words; words are shown as the vector they became.

    Args:
        generator: a `rpg.generation.generator.Generator`; of one that takes texts the sentence encoder is set.
        condition: comma-separated values, or the name of a class.
        classes: comma-separated names or numbers of the positive classes.
        prompt, prompt_model: the task in words, and a language model or sentence encoder for it.
        metric, settings: ``NAME=VALUE`` (each); a metric's value outside the zoo's is warned of.
        examples: what `rpg.generation.examples.read_examples` reads.

    Raises:
        InputError: more than one is given, or what is given is not a condition of this generator.
    """
    asked = {
        "condition": condition, "classes": classes, "prompt": prompt, "metric": metric, "examples": examples,
        "setting": settings,
    }  # fmt: skip
    given = [name for name, value in asked.items() if value]
    if len(given) > 1:
        raise InputError(f"--{given[1]} was given together with --{given[0]}; give one of them")
    spec = generator.condition
    if examples is not None:
        return read_examples(examples, spec, task=generator.config.task)
    if metric is not None:
        return _metric_condition(metric, generator.metric)
    if settings:
        return _settings_condition(settings, spec)
    if prompt is not None and generator.texts is not None:
        generator.texts = generator.texts.with_encoder(prompt_model)
        return prompt
    if spec is not None and spec.kind == "class" and condition in spec.names:
        return [float(spec.names.index(condition))]
    vector = parse_condition(condition)
    if classes is None and prompt is None:
        if vector is not None and spec is not None and spec.kind == "binary" and generator.config.task is not None:
            check_bits(vector, spec.size, "--condition")  # of all or no classes there is no task
        return vector
    if spec is None or spec.kind != "binary" or not spec.names:
        raise InputError(
            f"--{given[0] if given else 'classes'} needs a generator of named classes, which this one is not; use "
            "--condition instead"
        )
    named = None if classes is None else bits_of_classes(classes.split(","), spec.names)
    bits = bits_of_prompt(prompt or "", spec.names, prompt_model) if named is None else named
    console.print(f"condition {describe_bits(bits, spec.names)}", highlight=False)
    return bits.float().tolist()


def _settings_condition(given: Sequence[str], spec: ConditionSpec | None) -> list[float]:
    """The values of ``NAME=VALUE`` each, shown with those that were not given."""
    if spec is None or not spec.settings:
        raise InputError(f"--setting {given[0]!r} needs a generator of settings, which this one is not; leave it out")
    pairs = [each.partition("=") for each in given]
    for name, equals, _ in pairs:
        if not equals:
            raise InputError(f"--setting {name!r} has no value; write {name}=VALUE")
    values = parse_settings(spec.settings, {name.strip(): value.strip() for name, _, value in pairs})
    shown = ", ".join(f"{name} {value:g}" for name, value in zip(spec.names, values, strict=True))
    console.print(f"settings: {shown}", highlight=False, soft_wrap=True)
    return values


def _metric_condition(text: str, scale: MetricScale | None) -> list[float]:
    """The value of ``NAME=VALUE``, warned of if it is a guess. Raises InputError for another metric, or no number."""
    if scale is None:
        raise InputError(f"--metric {text!r} needs a generator of a metric, which this one is not; leave it out")
    name, _, written = text.partition("=")
    try:
        value = float(written)
    except ValueError:
        value = math.nan
    if name != scale.name or not math.isfinite(value):
        raise InputError(
            f"--metric {text!r} is not understood; write {scale.name}=VALUE, from {scale.low:.3g} to {scale.high:.3g}"
        )
    scale.asked(torch.tensor([value]))
    if warning := scale.warning(torch.tensor([value])):
        console.print(f"[yellow]{warning}[/yellow]", highlight=False, soft_wrap=True)
    return [value]


def bits_of_prompt(prompt: str, classes: Sequence[str], model: str | None = None) -> Tensor:
    """The task that a prompt asks for, ``[C]`` int64.

    Args:
        prompt: a list of class names or numbers (``cat, dog and frog``), or any text if there is a model.
        model: name or local path of a causal language model or a sentence encoder, for transformers.

    Raises:
        InputError: the prompt selects no class or every class, is not a list and there is no model, or the model cannot
            be loaded.
    """
    words = [word for word in re.split(r"[\s,;+&]+|\band\b|\bor\b", prompt) if word]
    if not words:
        raise InputError(f"--prompt is empty; name classes among {', '.join(classes)}")
    known = {name.lower() for name in classes} | {str(index) for index in range(len(classes))}
    if all(word.lower() in known for word in words):
        return bits_of_classes(words, classes, "--prompt")
    if model is None:
        raise InputError(
            f"--prompt {prompt!r} is not a list of {', '.join(classes)}; write one, or name a language model or "
            "sentence encoder with --prompt-model"
        )
    scores = _scores(prompt, classes, model)  # [C], positive means yes
    return check_bits((scores > 0).long(), len(classes), f"--prompt {prompt!r}")


def describe_bits(bits: Tensor, classes: Sequence[str]) -> str:
    """The vector and its positive classes, to be shown before it is used."""
    chosen = [name for name, bit in zip(classes, bits.tolist(), strict=True) if bit]
    return f"{','.join(str(int(bit)) for bit in bits.tolist())} ({', '.join(chosen)})"


def _scores(prompt: str, classes: Sequence[str], model: str) -> Tensor:
    from transformers import AutoModel, AutoModelForCausalLM

    def is_causal(config: Any) -> bool:
        return any(name.endswith("ForCausalLM") or "LMHead" in name for name in config.architectures or [])

    network, tokenizer = load_pretrained(
        model, "--prompt-model", lambda config: AutoModelForCausalLM if is_causal(config) else AutoModel
    )
    with torch.inference_mode():
        if is_causal(network.config):
            return _ask(prompt, classes, network, tokenizer)
        return _compare(prompt, classes, network, tokenizer)


def _ask(prompt: str, classes: Sequence[str], network: Any, tokenizer: Any) -> Tensor:
    """How much likelier "yes" becomes by the prompt than by words that say nothing, ``[C]``."""

    def preference(name: str, what: str) -> float:
        question = tokenizer(QUESTION.format(name=name, prompt=what), return_tensors="pt").input_ids
        logits = network(question).logits[0, -1].float()
        yes, no = (tokenizer(word, add_special_tokens=False).input_ids[0] for word in (" yes", " no"))
        return float(logits[yes] - logits[no])

    return torch.tensor([preference(name, prompt) - preference(name, NEUTRAL) for name in classes])


def _compare(prompt: str, classes: Sequence[str], network: Any, tokenizer: Any) -> Tensor:
    """Cosine similarity of prompt and class names, less the middle of the widest gap among them, ``[C]``."""
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    batch = tokenizer([prompt, *classes], padding=True, return_tensors="pt")
    vectors = F.normalize(mean_hidden(network(**batch), batch["attention_mask"], "--prompt-model"), dim=-1)
    similarity = vectors[1:] @ vectors[0]  # [C]
    ordered = similarity.sort().values
    gap = (ordered[1:] - ordered[:-1]).argmax()
    return similarity - (ordered[gap] + ordered[gap + 1]) / 2
