"""Texts as conditions: a frozen sentence encoder makes a vector of each, once.

T texts, E width of the encoder.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from rpg.packages import install_command, without_bars
from tokenization.errors import InputError
from tokenization.files import atomic_file
from tokenization.zoo.cache import cache_path
from tokenization.zoo.zoo import Zoo

ONES = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
)  # fmt: skip
TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")


def phrases_of(text: str) -> list[str]:
    """The parts between commas, full stops and the like, ``and``, ``but``, and before ``on``; whole numbers as words.

    The average of a phrase's words would not tell the digits of 137 from those of 173, or light on dark from dark on
    light. A hyphen within a word is left out: anti-clockwise, to an encoder, is mostly clockwise.
    """
    text = re.sub(r"(?<=[a-z])-(?=[a-z])", "", text.lower())
    parts = re.split(r"[,;!]+|\.(?!\d)|\bbut\b|(?<!hundred )\band\b|(?<=\w) (?=on\b)", text)
    return [
        re.sub(r"\b\d{1,3}\b", lambda found: spelled(int(found[0])), part.strip()) for part in parts if part.strip()
    ]


def spelled(number: int) -> str:
    """A whole number from 0 to 999 in words."""
    if number >= 100:
        return f"{ONES[number // 100]} hundred{f' {spelled(number % 100)}' if number % 100 else ''}"
    if number < 20:
        return ONES[number]
    return TENS[number // 10 - 2] + (f" {ONES[number % 10]}" if number % 10 else "")


TEXTS_FILE = "texts.safetensors"
VERSION = 1


@dataclass(frozen=True)
class TextTable:
    """Texts and their vectors.

    What sentences have in common fills most of a vector, so that conditions are what is left: less the texts' mean,
    by the root mean square of the rest.

    Attributes:
        encoder: name or local path of the sentence encoder.
        fingerprint: SHA-256 (hexadecimal) of its weights and tokenizer.
        texts: all different.
        vectors: ``[T, E]`` float32, of unit mean square.
        phrases: P, the most phrases of a description; the texts are then phrases. 0: they are whole conditions.
    """

    encoder: str
    fingerprint: str
    texts: tuple[str, ...]
    vectors: Tensor
    phrases: int = 0

    @property
    def num_inputs(self) -> int:
        """How many numbers networks see of a text, or of each of its phrases: E, or E and a 1 that says it is there."""
        return self.vectors.shape[1] + (self.phrases > 0)

    @property
    def width(self) -> int:
        """Numbers of a condition: ``num_inputs``, for each phrase."""
        return self.num_inputs * max(1, self.phrases)

    @functools.cached_property
    def _own_encoder(self) -> SentenceEncoder | StaticEncoder:
        """The encoder that made the table. Raises InputError if it cannot be loaded, or is another one now."""
        encoder = sentence_encoder(self.encoder, "--prompt-model")
        if encoder.fingerprint != self.fingerprint:
            raise InputError(
                f"--prompt-model {self.encoder} has other weights than the sentence encoder that the generator was "
                "trained with; name that one"
            )
        return encoder

    @functools.cached_property
    def _known(self) -> dict[str, Tensor]:
        """Centred vectors of the texts, and of whatever was encoded since."""
        return dict(zip(self.texts, self.conditions, strict=True))

    def _vectors_of(self, texts: Sequence[str]) -> Tensor:
        new = [text for text in dict.fromkeys(texts) if text not in self._known]
        if new:
            self._known.update(zip(new, self._centred(self._own_encoder.vectors(new)), strict=True))
        return torch.stack([self._known[text] for text in texts])

    @functools.cached_property
    def conditions(self) -> Tensor:
        """What the networks are given for each text, ``[T, E]``, of unit mean square over all texts."""
        return self._centred(self.vectors)

    @functools.cached_property
    def _centre(self) -> tuple[Tensor, Tensor]:
        """The mean ``[E]`` of the vectors, and the root mean square of the rest."""
        mean = self.vectors.mean(0)
        return mean, (self.vectors - mean).square().mean().sqrt()

    def _centred(self, vectors: Tensor) -> Tensor:
        mean, scale = self._centre
        return (vectors - mean) / scale if scale > 0 else vectors  # a single text is all that it can be

    def condition(self, text: str) -> Tensor:
        """What the networks are given for a text, ``[width]``; raises as `conditions_of`."""
        return self.conditions_of([text])[0]

    def conditions_of(self, texts: Sequence[str]) -> Tensor:
        """What the networks are given for texts, ``[n, width]``; what is not in the table is encoded now.

        Raises:
            InputError: the encoder cannot be loaded, or is not the one that made the table; there are too many phrases.
        """
        if not self.phrases:
            return self._vectors_of(texts)
        parts = [phrases_of(text) for text in texts]
        for text, each in zip(texts, parts, strict=True):
            if not 0 < len(each) <= self.phrases:
                found = f"the description {text!r} has {len(each)} phrases between commas"
                raise InputError(f"{found}; give 1 to {self.phrases}")
        rows = torch.zeros(len(texts), self.phrases, self.num_inputs)
        places = torch.tensor([(row, place) for row, each in enumerate(parts) for place in range(len(each))])
        rows[places[:, 0], places[:, 1], :-1] = self._vectors_of([phrase for each in parts for phrase in each])
        rows[places[:, 0], places[:, 1], -1] = 1
        return rows.flatten(1)

    def with_encoder(self, encoder: str | None) -> TextTable:
        """The table with the place where the encoder is now."""
        return self if encoder is None else replace(self, encoder=encoder)

    def save(self, path: Path) -> None:
        """Write one safetensors file. Raises InputError when the disk refuses."""
        metadata = {"encoder": self.encoder, "fingerprint": self.fingerprint, "texts": json.dumps(self.texts)}
        if self.phrases:
            metadata["phrases"] = str(self.phrases)
        with atomic_file(path) as temporary:
            save_file({"vectors": self.vectors.contiguous()}, temporary, {"format": "pt", **metadata})

    @classmethod
    def load(cls, path: Path) -> TextTable:
        """Read what ``save`` wrote. Raises InputError if it is missing or damaged."""
        try:
            with safe_open(path, "pt") as file:
                metadata, vectors = file.metadata(), file.get_tensor("vectors")
            texts = tuple(json.loads(metadata["texts"]))
            if len(texts) != len(vectors):
                raise ValueError(f"{len(texts)} texts for {len(vectors)} vectors")
            return cls(metadata["encoder"], metadata["fingerprint"], texts, vectors, int(metadata.get("phrases", 0)))
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise InputError(f"{path} could not be read ({error}); copy the generator's folder again") from None


def text_table(zoo: Zoo, encoder: str | None) -> TextTable:
    """The vectors of a zoo's texts: from its folder ``cache``, by the encoder's name, or computed now.

    Raises:
        InputError: the zoo has no texts, no encoder is named, or it cannot be loaded.
    """
    if zoo.condition is None or zoo.condition.kind != "text":
        found = f"conditions of kind {zoo.condition.kind}" if zoo.condition else "no conditions"
        raise InputError(f"{zoo.path} has {found}, not texts; collect it with --condition text")
    if not encoder:
        raise InputError(
            "model.condition.encoder is empty; name a sentence encoder for transformers, or its local path, for "
            "example sentence-transformers/all-MiniLM-L6-v2"
        )
    texts = zoo.condition.names
    path = cache_path(zoo, "texts", [VERSION, encoder, texts])
    with contextlib.suppress(InputError):  # whatever is wrong with a cache, it is made again
        return TextTable.load(path)
    network = sentence_encoder(encoder, "model.condition.encoder")
    table = TextTable(encoder, network.fingerprint, texts, network.vectors(texts))
    with contextlib.suppress(InputError, OSError):  # a zoo that may not be written
        path.parent.mkdir(exist_ok=True)
        table.save(path)
    return table


WORDLLAMA = "wordllama"


def sentence_encoder(name: str, where: str) -> SentenceEncoder | StaticEncoder:
    """The encoder of a name; raises InputError as it does if it cannot be loaded."""
    return static_encoder(where) if name == WORDLLAMA else SentenceEncoder(name, where)


class StaticEncoder:
    """The package wordllama: the mean of static embeddings of a text's tokens, 256 values. It needs no download.

    Raises:
        InputError: the package is missing.
    """

    def __init__(self, where: str) -> None:
        root = logging.getLogger()
        before = root.handlers[:], root.level
        try:
            import wordllama
        except ModuleNotFoundError:
            raise InputError(f"{where} {WORDLLAMA} needs the package; run {install_command(WORDLLAMA)}") from None
        finally:  # it sets up logging for the whole program
            root.handlers[:], root.level = before
        self.folder = Path(wordllama.__file__).parent
        self.model = wordllama.WordLlama.load(cache_dir=self.folder, disable_download=True)

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hexadecimal) of embeddings and tokenizer."""
        digest = hashlib.sha256(self.model.embedding.data)
        digest.update(self.model.tokenizer.to_str().encode())
        return digest.hexdigest()

    def vectors(self, texts: Sequence[str]) -> Tensor:
        """Each text's vector, ``[T, 256]``, of unit mean square."""
        vectors = torch.from_numpy(self.model.embed(list(texts))).float()
        return F.normalize(vectors, dim=-1) * vectors.shape[-1] ** 0.5


@functools.lru_cache(1)
def static_encoder(where: str) -> StaticEncoder:
    """The one there is, loaded once."""
    return StaticEncoder(where)


class SentenceEncoder:
    """A frozen transformers model whose mean last hidden state stands for a text.

    Args:
        name: for ``AutoModel.from_pretrained``: a name on the hub or a local path.

    Raises:
        InputError: it cannot be loaded.
    """

    def __init__(self, name: str, where: str) -> None:
        from transformers import AutoModel

        network, self.tokenizer = load_pretrained(name, where, lambda config: AutoModel)
        self.network: nn.Module = network.get_encoder() if network.config.is_encoder_decoder else network
        lengths = (self.tokenizer.model_max_length, getattr(network.config, "max_position_embeddings", None))
        self.max_length = min(length for length in (*lengths, 1 << 20) if length)
        self.where = f"{where} {name}"

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hexadecimal) of weights and tokenizer."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.network.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        vocabulary = backend.to_str() if backend is not None else json.dumps(sorted(self.tokenizer.get_vocab().items()))
        digest.update(vocabulary.encode())
        return digest.hexdigest()

    @torch.inference_mode()
    def vectors(self, texts: Sequence[str]) -> Tensor:
        """Each text's vector, ``[T, E]``, one by one: no text's depends on another's length.

        Raises:
            InputError: a text has no token, or the model gives no hidden states.
        """
        rows = []
        for text in texts:
            ids = self.tokenizer(text, return_tensors="pt", truncation=True, max_length=self.max_length)["input_ids"]
            if not ids.numel():
                raise InputError(f"the tokenizer of {self.where} knows no token of {text!r}; write it in other words")
            rows.append(mean_hidden(self.network(input_ids=ids), torch.ones_like(ids), self.where)[0])
        vectors = torch.stack(rows)
        return (F.normalize(vectors, dim=-1) * vectors.shape[-1] ** 0.5).clone()


def load_pretrained(name: str, where: str, choose: Any) -> tuple[Any, Any]:
    """A transformers model in float32, frozen, and its tokenizer.

    The hub is asked once whether it answers, where transformers would ask for every file six times, half a minute in
    all. If it does not, its cache is read.

    Args:
        name: a name on the hub or a local path.
        choose: from its configuration to the class that loads it.

    Raises:
        InputError: it cannot be loaded.
    """
    from transformers import AutoConfig, AutoTokenizer

    try:
        with without_bars():
            local: Any = {"local_files_only": not Path(name).exists() and not _answers(name)}
            config = AutoConfig.from_pretrained(name, **local)
            tokenizer = AutoTokenizer.from_pretrained(name, **local)
            network = choose(config).from_pretrained(name, dtype=torch.float32, **local)
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = str(error).strip().splitlines()[0]
        cure = "name a transformers model or its local path"
        if where == "model.condition.encoder":
            cure += f", or take one that needs no download: --set {where}={WORDLLAMA}"
        raise InputError(f"{where} {name} could not be loaded ({reason}); {cure}") from None
    return network.eval().requires_grad_(False), tokenizer


def _answers(name: str) -> bool:
    """Whether the hub answers when it is asked for a model, whatever it says."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        HfApi().model_info(name, timeout=10)
    except (HfHubHTTPError, HFValidationError):
        return True
    except Exception:  # of whatever carries the request
        return False
    return True


def mean_hidden(output: Any, attention_mask: Tensor, where: str) -> Tensor:
    """The mean of the last hidden states ``[B, words, E]`` over each text's words, ``[B, E]``."""
    hidden = getattr(output, "last_hidden_state", None)
    if hidden is None:
        raise InputError(f"{where} has no last hidden states, as a text encoder has; name another model")
    mask = attention_mask[..., None].to(hidden.dtype)
    return (hidden * mask).sum(1) / mask.sum(1)
