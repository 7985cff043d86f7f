"""Bad input of learners: data they cannot train on, damaged folders, folders that do not belong together. Each error has three lines."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel

from engine import checkpoints
from engine.checkpoints import hash_files
from engine.errors import CheckpointsFull, TrainingFailed, UsageError
from schemas.records import ChatMessage
from trainer import weights
from trainer.learners import dpo, grpo, ppo, reward, rloo, sft
from trainer.learners.grpo import GRPOConfig
from trainer.learners.ppo import PPOConfig, Rollout
from trainer.learners.reward import PreferenceExample
from trainer.learners.rloo import RLOOConfig
from trainer.learners.sft import SftExample

MESSAGES = (ChatMessage(role="user", content="say a"),)
PAIRS = [
    PreferenceExample((ChatMessage(role="user", content=f"say {n * 'n'}"),), "aa", "bb", 0.9, str(n), True, True)
    for n in range(9)
]
ROLLOUTS = [Rollout((1, 5 + n), (7, 8, 2), (-1.0,) * 3, True, 0, str(n)) for n in range(8)]
HARDWARE = weights.Hardware(precision="fp32")
GROUP = [replace(rollout, record_id="group") for rollout in ROLLOUTS]


def has_three_lines(error):
    lines = str(error.value).split("\n")
    return len(lines) == 3 and all(lines)


@pytest.fixture
def copy(tiny, tmp_path):
    return shutil.copytree(tiny, tmp_path / "copy")


@pytest.fixture
def reward_folder(tiny, tmp_path):
    """A folder with a complete reward model."""
    torch.manual_seed(0)
    model = weights.load_scorer(tiny)
    torch.nn.init.normal_(model.score.weight)
    folder = tmp_path / "reward"
    folder.mkdir()
    reward.RewardModel([reward.EnsembleMember(model)], weights.load_tokenizer(tiny)).save(folder)
    return folder


# Diverging updates

DIVERGING_UPDATES = {
    "sft": lambda folder: sft.train(
        folder, [SftExample(MESSAGES, "abc", True, str(n)) for n in range(16)], learning_rate=1e30, epochs=3, hardware=HARDWARE
    ),
    "reward": lambda folder: reward.train(folder, PAIRS, learning_rate=1e30, epochs=3, batch_size=2, hardware=HARDWARE),
    "dpo": lambda folder: dpo.train(folder, folder, PAIRS, learning_rate=1e30, epochs=3, batch_size=2, hardware=HARDWARE),
    "ppo": lambda folder: ppo.train(
        folder, folder, ROLLOUTS, list(range(8)), PPOConfig(learning_rate=1e30, max_kl=1e30), hardware=HARDWARE
    ),
    "grpo": lambda folder: grpo.train(
        folder,
        folder,
        GROUP,
        list(range(8)),
        GRPOConfig(learning_rate=1e30, max_kl=1e30, epochs=3, batch_size=2),
        hardware=HARDWARE,
    ),
    "rloo": lambda folder: rloo.train(
        folder,
        folder,
        GROUP,
        list(range(8)),
        RLOOConfig(learning_rate=1e30, max_kl=1e30, epochs=3, batch_size=2),
        hardware=HARDWARE,
    ),
}


@pytest.mark.parametrize("phase", DIVERGING_UPDATES)
def test_diverging_update_raises_and_leaves_the_policy_unchanged(tiny, phase):
    before = hash_files(tiny)
    with pytest.raises(TrainingFailed, match="training has diverged") as error:
        DIVERGING_UPDATES[phase](tiny)
    assert has_three_lines(error) and hash_files(tiny) == before


def test_prompts_longer_than_max_length_raise(tiny):
    with pytest.raises(TrainingFailed, match=r"^3 responses have no tokens to learn") as error:
        sft.train(tiny, [SftExample(MESSAGES, "abc", True, str(n)) for n in range(3)], learning_rate=1e-3, max_length=4)
    assert has_three_lines(error)


# Folders


def test_truncated_weights_raise(copy):
    file = copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    for load in (weights.load_policy, weights.load_scorer):
        with pytest.raises(UsageError, match="cannot be loaded") as error:
            load(copy)
        assert has_three_lines(error)


def test_missing_weight_raises(copy, reward_folder):
    for folder, name in ((copy, "model.layers.0.mlp.up_proj.weight"), (reward_folder, "score.weight")):
        tensors = load_file(folder / "model.safetensors")
        del tensors[name]
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(UsageError, match="cannot be loaded\n1 of them are missing") as error:
            reward.load_reward_model(folder) if folder == reward_folder else weights.load_policy(folder)
        assert has_three_lines(error)


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"])
def test_full_disk_raises_and_leaves_no_checkpoint(tiny, tmp_path, file):
    """/dev/full is a full disk. Different libraries write the files of a checkpoint."""
    save = weights.make_saver(weights.load_policy(tiny), weights.load_tokenizer(tiny))

    def save_to_full_disk(folder):
        (folder / file).symlink_to("/dev/full")
        save(folder)

    with pytest.raises(CheckpointsFull, match="not enough disk space for a checkpoint") as error:
        checkpoints.write_checkpoint(tmp_path / "policy-000001", save_to_full_disk, {})
    assert has_three_lines(error) and list(tmp_path.iterdir()) == []


def test_truncated_adapter_raises(tiny, copy):
    model = weights.add_lora(weights.load_policy(tiny), 4, "CAUSAL_LM")
    shutil.rmtree(copy)
    copy.mkdir()
    weights.make_rl_saver(model, weights.load_tokenizer(tiny), None, tiny)(copy)
    assert weights.has_adapter_for_reference(copy, tiny)
    file = copy / "rl" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UsageError, match="cannot be loaded") as error:
        weights.load_policy_for_rl(copy, tiny, 4)
    assert has_three_lines(error)


@pytest.mark.parametrize("damage", ["", "{", '{"mean": 0}', "[]"])
def test_reward_model_without_its_normalization_raises(reward_folder, damage):
    (reward_folder / "reward.json").write_text(damage)
    with pytest.raises(UsageError, match="does not contain a complete reward model") as error:
        reward.load_reward_model(reward_folder)
    assert has_three_lines(error)


@pytest.mark.parametrize("change", ["vocabulary", "template", "end token"])
def test_policy_with_another_tokenizer_is_rejected(tiny, copy, change):
    if change == "vocabulary":
        configuration = json.loads((copy / "tokenizer.json").read_text())
        vocabulary = configuration["model"]["vocab"]
        vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
        (copy / "tokenizer.json").write_text(json.dumps(configuration))
    else:
        tokenizer = weights.load_tokenizer(copy)
        if change == "template":
            tokenizer.chat_template = "{{ messages[0].content }}"
        else:
            tokenizer.eos_token = "<s>"
        tokenizer.save_pretrained(copy)
    with pytest.raises(UsageError, match="have different tokenizers") as error:
        ppo.train(tiny, copy, ROLLOUTS, list(range(8)), PPOConfig(), hardware=HARDWARE)
    assert has_three_lines(error)
    with pytest.raises(UsageError, match="have different tokenizers"):
        dpo.train(tiny, copy, PAIRS, learning_rate=1e-3, hardware=HARDWARE)


def test_reward_model_of_another_architecture_is_rejected(tiny, reward_folder, tmp_path):
    other = tmp_path / "other"
    GPT2LMHeadModel(GPT2Config(vocab_size=49, n_embd=16, n_layer=1, n_head=2, n_positions=64)).save_pretrained(other)
    weights.load_tokenizer(tiny).save_pretrained(other)
    with pytest.raises(
        UsageError, match=r"the reward model in .* is a llama model, but the policy in .* is a gpt2 model"
    ) as error:
        reward.load_reward_model(reward_folder, policy=other)
    assert has_three_lines(error)
    assert reward.load_reward_model(reward_folder, policy=tiny).members
