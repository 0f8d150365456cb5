"""Adapters side by side against PEFT itself: what they compute, their gradients, what training makes of them."""

import pytest
import torch
from peft import set_peft_model_state_dict
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from rpg.tasks.language.adapter_bank import (
    AdapterBank,
    adapter_state,
    completion_losses,
    fresh_adapter,
    peft_config,
    peft_on,
    score_adapters,
)
from rpg.tasks.language.adapter_training import _Stopper, train_one, train_side_by_side
from rpg.tasks.language.config import AdapterConfig, AdapterTraining
from rpg.tasks.language.rows import IGNORED, Rows
from rpg.tasks.side_by_side import stack
from tokenization.errors import InputError

VOCABULARY = 12


def llama():
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, bos_token_id=None, eos_token_id=1,
        )
    )  # fmt: skip


def gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=4, n_positions=16, bos_token_id=1, eos_token_id=1
        )
    )


BASES = {"llama": (llama, ("q_proj", "v_proj", "down_proj")), "gpt2": (gpt2, ("c_attn", "c_proj"))}


def made(kind, name, **changes):
    build, modules = BASES[name]
    return build(), peft_config(AdapterConfig(kind=kind, r=3, target_modules=modules, **changes), "base")


def random_adapters(base, config, num):
    """Adapters whose B is not zero any more."""
    states = [fresh_adapter(base, config, seed) for seed in range(num)]
    rng = torch.Generator().manual_seed(0)
    for state in states:
        for value in state.values():
            value += 0.1 * torch.randn(value.shape, generator=rng)
    return states


def random_rows(num, rows=4, length=7):
    rng = torch.Generator().manual_seed(1)
    ids = torch.randint(VOCABULARY, (num, rows, length), generator=rng)
    targets = torch.randint(2, VOCABULARY, (num, rows, length), generator=rng)
    targets[..., :3] = IGNORED
    targets[..., -1] = 1
    return Rows(ids, targets, 1)


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_side_by_side_is_what_peft_computes(kind, name, rslora):
    base, config = made(kind, name, rslora=rslora)
    keys = list(base.state_dict())
    bank = AdapterBank(base, config)
    states = random_adapters(base, config, 3)
    weights = {key: value.requires_grad_() for key, value in stack(states).items()}
    rows = random_rows(3)
    logits = bank.logits(weights, rows.ids, torch.tensor([2, 6]))
    assert logits.shape == (3, 4, 2, VOCABULARY)
    completion_losses(bank, weights, rows).sum().backward()
    for number, state in enumerate(states):
        with peft_on(base, config) as adapted:
            set_peft_model_state_dict(adapted, state)
            theirs = adapted(rows.ids[number]).logits
            assert torch.allclose(logits[number], theirs[:, [2, 6]], atol=1e-5)
            loss = torch.nn.functional.cross_entropy(theirs.flatten(0, 1), rows.targets[number].flatten())
            loss.backward()
            for key, parameter in adapted.named_parameters():
                if parameter.requires_grad:
                    ours = weights[key.replace(".default", "").replace("vector.weight", "vector")].grad[number]
                    assert torch.allclose(ours, parameter.grad, atol=1e-5), key
    assert list(base.state_dict()) == keys and not hasattr(base, "peft_config")
    assert not any(module._forward_hooks for module in base.modules())


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_trained_side_by_side_as_by_peft_alone(kind):
    base, config = made(kind, "llama")
    rows = random_rows(3)
    starts = [fresh_adapter(base, config, seed) for seed in range(3)]
    training = AdapterTraining(steps=8, learning_rate=1e-2, weight_decay=0.1, checkpoints=2)
    together = train_side_by_side(AdapterBank(base, config), stack(starts), lambda: rows, training)
    assert len(together) == 2
    for number, start in enumerate(starts):
        alone = train_one(base, config, start, lambda number=number: rows[number : number + 1], training)
        for ours, theirs in zip(together, alone, strict=True):
            assert ours.keys() == theirs.keys()
            for key, value in theirs.items():
                assert torch.allclose(ours[key][number], value, atol=1e-4), key
    b = next(key for key in together[0] if "lora_B" in key)
    assert together[1][b].abs().sum() > together[0][b].abs().sum() > 0


def test_an_adapter_is_kept_as_it_was_when_good_enough():
    stopper = _Stopper(AdapterTraining(steps=25, until=0.9, check_every=10), 2)
    assert [step for step in range(25) if stopper.looks(step)] == [9, 19, 24]
    weights = {"w": torch.zeros(2, 3)}
    for value, exact, ended in ((1.0, [0.95, 0.2], False), (2.0, [0.1, 0.5], False), (3.0, [0.1, 0.9], True)):
        weights["w"].fill_(value)
        assert stopper.take(weights, torch.tensor(exact)) is ended
    assert stopper.kept["w"][:, 0].tolist() == [1.0, 3.0]


def test_ended_early_side_by_side_as_by_peft_alone():
    base, config = made("lora", "llama")
    targets = torch.full((2, 3, 4), 5)
    targets[1] = torch.tensor([7, 8, 9])[:, None]  # by row: takes longer to learn
    ids = torch.randint(VOCABULARY, (2, 3, 4), generator=torch.Generator().manual_seed(0))
    rows = Rows(ids, targets, 1)
    starts = [fresh_adapter(base, config, seed) for seed in range(2)]
    bank = AdapterBank(base, config)
    training = AdapterTraining(steps=60, learning_rate=3e-2, until=1.0, check_every=5)
    (kept,) = train_side_by_side(bank, stack(starts), lambda: rows, training, [rows[0], rows[1]])
    for number, start in enumerate(starts):
        own = rows[number : number + 1]
        (alone,) = train_one(base, config, start, lambda own=own: own, training, [own[0]])
        assert all(torch.allclose(kept[key][number], value, atol=1e-3) for key, value in alone.items())
    assert score_adapters(bank, kept, [rows[0], rows[1]])["exact_match"][0] == 1


def test_gradient_checkpointing_changes_nothing():
    base, config = made("lora", "llama")
    rows = random_rows(1)
    start = fresh_adapter(base, config, 0)
    plain = train_one(base, config, start, lambda: rows, AdapterTraining(steps=2))[0]
    saving = train_one(base, config, start, lambda: rows, AdapterTraining(steps=2, gradient_checkpointing=True))[0]
    assert all(torch.allclose(saving[key], value, atol=1e-6) for key, value in plain.items())


def test_a_fresh_adapter_changes_nothing_and_leaves_the_random_state():
    base, config = made("dora", "llama")
    rows = random_rows(2)
    state = torch.get_rng_state()
    start = fresh_adapter(base, config, 5)
    assert torch.equal(torch.get_rng_state(), state)
    logits = AdapterBank(base, config).logits(stack([start, start]), rows.ids)
    assert torch.allclose(logits[1], base(rows.ids[1]).logits, atol=1e-6)
    with peft_on(base, config) as adapted:
        assert adapter_state(adapted).keys() == start.keys()


def test_scores_are_what_greedy_decoding_writes():
    base, config = made("lora", "llama")
    base.generation_config.eos_token_id = None  # always three tokens
    bank = AdapterBank(base, config)
    weights = stack(random_adapters(base, config, 2))
    prompts = torch.randint(2, VOCABULARY, (2, 12, 4), generator=torch.Generator().manual_seed(2))
    rows, written = [], []
    for number in range(2):
        with peft_on(base, config) as adapted:
            set_peft_model_state_dict(adapted, {key: value[number] for key, value in weights.items()})
            answer = adapted.generate(
                input_ids=prompts[number], attention_mask=torch.ones_like(prompts[number]), do_sample=False,
                max_new_tokens=3, pad_token_id=1,
            )[:, 4:]  # fmt: skip
        written.append(answer)
        right = answer.clone()
        right[::3, 1] = (right[::3, 1] + 1) % VOCABULARY  # every third completion is another one
        ids = torch.cat([prompts[number], right], 1)
        targets = torch.full_like(ids[:, 1:], IGNORED)
        targets[:, 3:] = right
        rows.append(Rows(ids[:, :-1], targets, end=VOCABULARY))
    for rows_at_once in (2048, 5, 1):
        scores = score_adapters(bank, weights, rows, rows_at_once)
        free = torch.stack([(answer == each.targets[:, 3:]).all(1) for answer, each in zip(written, rows, strict=True)])
        assert scores["exact_match"].tolist() == pytest.approx(free.double().mean(1).tolist())
        assert 2 / 3 <= scores["symbol_accuracy"].min() < 1
        losses = completion_losses(
            bank, weights, Rows(*(torch.stack([getattr(r, k) for r in rows]) for k in ("ids", "targets")), 1)
        )
        assert scores["perplexity"].log().tolist() == pytest.approx(losses.tolist(), rel=1e-4)


def test_unknown_layers_are_one_line():
    base, config = made("lora", "llama")
    config.target_modules = {"no_such"}
    with pytest.raises(InputError, match="target_modules") as caught:
        AdapterBank(base, config)
    assert "\n" not in str(caught.value)
