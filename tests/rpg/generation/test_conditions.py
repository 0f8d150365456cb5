import json

import pytest
import torch

from rpg.generation.conditions import bits_of_prompt, describe_bits, named_condition
from tokenization.errors import InputError
from tokenization.zoo.condition import ConditionSpec

NAMES = ("cat", "dog", "ship")


@pytest.mark.parametrize("prompt", ["cat, ship", "cat and ship", "0 2", "Ship or cat;"])
def test_a_list_of_classes_needs_no_model(prompt):
    bits = bits_of_prompt(prompt, NAMES)
    assert bits.tolist() == [1, 0, 1]
    assert describe_bits(bits, NAMES) == "1,0,1 (cat, ship)"


@pytest.mark.parametrize(
    "prompt, words",
    [("", "--prompt is empty"), ("cat dog ship", "every class"), ("all animals", "--prompt-model")],
)
def test_prompts_that_cannot_be_used_are_one_line(prompt, words):
    with pytest.raises(InputError, match=words) as caught:
        bits_of_prompt(prompt, NAMES)
    assert "\n" not in str(caught.value)


def test_a_model_that_cannot_be_loaded_is_one_line(tmp_path):
    with pytest.raises(InputError, match="--prompt-model") as caught:
        bits_of_prompt("all animals", NAMES, str(tmp_path / "nowhere"))
    assert "\n" not in str(caught.value)


def save_tokenizer(folder, words):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: index for index, word in enumerate(["[PAD]", "[UNK]", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(folder)
    return vocabulary


def test_a_sentence_encoder_chooses_the_classes_near_the_prompt(tmp_path):
    """A network whose word vectors say that cats and dogs are animals."""
    from transformers import BertConfig, BertModel

    words = save_tokenizer(tmp_path, ["animals", *NAMES])
    config = BertConfig(
        vocab_size=len(words), hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8
    )
    network = BertModel(config)
    with torch.no_grad():
        for value in network.parameters():
            value.zero_()
        network.embeddings.LayerNorm.weight.fill_(1)
        network.encoder.layer[0].attention.output.LayerNorm.weight.fill_(1)
        network.encoder.layer[0].output.LayerNorm.weight.fill_(1)
        for word, axis in (("animals", 0), ("cat", 0), ("dog", 0), ("ship", 3)):
            network.embeddings.word_embeddings.weight[words[word], axis] = 5
    network.save_pretrained(tmp_path)
    assert bits_of_prompt("animals", NAMES, str(tmp_path)).tolist() == [1, 1, 0]


def test_a_language_model_is_asked_for_every_class(tmp_path, monkeypatch):
    from transformers import GPT2Config, GPT2LMHeadModel

    words = save_tokenizer(tmp_path, ["yes", "no", "animals", *NAMES])
    network = GPT2LMHeadModel(GPT2Config(vocab_size=len(words), n_positions=64, n_embd=8, n_layer=1, n_head=1))
    network.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["GPT2LMHeadModel"]
    asked = []

    def answer(self, tokens, **_):
        asked.append(tokens[0].tolist())
        logits = torch.zeros(1, tokens.shape[1], len(words))
        living = words["animals"] in asked[-1] and (words["cat"] in asked[-1] or words["dog"] in asked[-1])
        logits[0, -1, words["yes"]] = 1.0 if living else -1.0 if words["animals"] in asked[-1] else 0.0
        return type("Output", (), {"logits": logits})

    monkeypatch.setattr(GPT2LMHeadModel, "forward", answer)
    assert bits_of_prompt("animals!", NAMES, str(tmp_path)).tolist() == [1, 1, 0]
    assert len(asked) == 6  # each class with the prompt and with neutral words


def test_one_text_names_a_condition_of_any_kind():
    bits, pets = ConditionSpec("binary", 3), ConditionSpec("binary", 3, ("cat", "dog", "frog"))
    for spec, text in ((bits, "010"), (bits, "0,1,0"), (pets, "dog"), (pets, "1")):
        assert named_condition(spec, text, "--x") == [0, 1, 0]
    assert named_condition(ConditionSpec("class", 2, ("french", "german")), "german", "--x") == [1.0]
    assert named_condition(ConditionSpec("class", 4), "3", "--x") == [3.0]
    assert named_condition(ConditionSpec("vector", 2), "0.3,-1.2e-1", "--x") == [0.3, -0.12]
    assert named_condition(ConditionSpec("text", 1, ("polite",)), "anything, really", "--x") == "anything, really"
    for spec, text in (
        (None, "1"), (bits, "01"), (bits, "0,2,0"), (pets, "cow"), (ConditionSpec("class", 4), "4"),
        (ConditionSpec("class", 2, ("french", "german")), "dutch"), (ConditionSpec("vector", 2), "0.3"),
        (ConditionSpec("vector", 2), "a,b"), (ConditionSpec("vector", 2), "1,nan"),
    ):  # fmt: skip
        with pytest.raises(InputError, match="--x"):
            named_condition(spec, text, "--x")
