"""Trained policies for tests with real servers, and the difference between a server and the weights it should have."""

import torch

from engine.checkpoints import write_checkpoint
from engine.settings import load_settings
from schemas import ids
from schemas.records import ChatMessage, ModelRef, PolicyKind, PolicyUpdate
from trainer import phases, weights
from trainer.learners import sft
from trainer.learners.sft import SftExample

MESSAGES = (ChatMessage(role="user", content="Name a bird."),)
HARDWARE = weights.Hardware(precision="fp32")


def make_settings(folder, address, base, method, **more):
    flags = {
        "data.folder": str(folder / "data"), "models.policy": address, "models.weight_sync": method, "train.base_model": str(base),
        "models.critic": "smollm2", "models.judge": "smollm2", "models.timeout_s": "120", "models.concurrency": "4",
        "models.threads": "1", "prompts.eval_fraction": "0",
    }  # fmt: skip
    return load_settings(flags | more, environment={})[0]


def train_policy(folder, base, version, *, lora_rank):
    """Write the checkpoint of a policy that was trained on one sentence until it differs clearly. Return its update."""
    torch.set_num_threads(1)
    texts = [
        SftExample(MESSAGES, f"Bird number {version} is a parrot that counts to {version}.", True, str(n)) for n in range(4)
    ]
    model, tokenizer, _ = sft.train(base, texts, learning_rate=1e-4, epochs=6, lora_rank=lora_rank, hardware=HARDWARE)
    checkpoint = write_checkpoint(
        folder / "data" / "checkpoints" / f"policy-{version:06d}", phases.make_sft_saver(model, tokenizer, base, base), {}
    )
    return PolicyUpdate(
        record_id=ids.compute_record_id("train", [], str(version)), run_id="r", stage="train",
        model=ModelRef(id="m", revision=str(version)), kind=PolicyKind.POLICY, version=version, phase="sft",
        uri=str(checkpoint.folder), content_hash=checkpoint.content_hash, base_version=version - 1,
        batch_id=ids.compute_record_id("batch", [], str(version)),
    )  # fmt: skip


def compute_differences(folder, generations):
    """Return the differences of the log-probabilities of a folder's weights and of a server, one for each sampled token."""
    torch.set_num_threads(1)
    model, differences = weights.load_policy(folder), []
    for generation in generations:
        assert len(generation.logprobs) == len(generation.token_ids) > 0 and generation.prompt_token_ids
        start = len(generation.prompt_token_ids)
        tokens = torch.tensor([[*generation.prompt_token_ids, *generation.token_ids]])
        with torch.inference_mode():
            logits = model(tokens).logits[0, start - 1 : -1].float()
        logprobs = logits.log_softmax(-1).gather(-1, tokens[0, start:, None])[:, 0]
        differences.append(logprobs - torch.tensor(generation.logprobs))
    return torch.cat(differences)
