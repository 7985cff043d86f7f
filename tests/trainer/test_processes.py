"""Two processes under a launcher shard each model and train the same as one process, on the CPU."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config

from consumers.sink import Sink
from engine.errors import UsageError
from engine.settings import load_settings
from engine.worker import to_producer_record
from tests.support.kafka import find_free_port
from tests.support.learner_processes import list_cases, open_trainer, resume_update, run_learners
from tests.support.records import RecordDatabase, make_chain_end
from tests.support.waiting import HANG_S
from trainer import distributed, sharding, weights
from trainer.promotion import PromotionGate


@pytest.fixture
def untied(tiny, tmp_path):
    """Return the folder of a tiny model whose output layer has its own weights."""
    folder = tmp_path / "untied"
    folder.mkdir()
    for file in tiny.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tiny, tie_word_embeddings=False)).save_pretrained(folder)
    return folder


@pytest.fixture
def interrupted(tiny, tmp_path):
    """Return two equal data folders. In each, one process has begun an SFT update and died after its first step."""

    def interrupt(*arguments):
        raise KeyboardInterrupt

    data = tmp_path / "data"
    bus, trainer = open_trainer(data, tiny, on_step=interrupt)
    bus.publish([to_producer_record(make_chain_end(f"prompt {n}", f"chain {n}")) for n in range(8)])
    sink = Sink(bus, trainer.store, max_wait_s=0.05)
    while sink.step():
        pass
    sink.close()
    with pytest.raises(KeyboardInterrupt):
        trainer.update("sft")
    trainer.close()
    bus.close()
    return data, shutil.copytree(data, tmp_path / "copy")


def test_two_processes_train_like_one(tiny, untied, interrupted, tmp_path):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path.cwd())}
    sharded, single = tmp_path / "sharded", tmp_path / "single"
    # This is what `accelerate launch --multi_gpu` runs.
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    script = "tests/support/learner_processes.py"
    processes = subprocess.Popen([*launch, script, str(tiny), str(untied), str(sharded), str(interrupted[1])], env=environment)
    try:
        expected = run_learners(tiny, untied, single)
        batch_id, checkpoint = resume_update(interrupted[0], tiny)
        assert processes.wait(timeout=HANG_S) == 0
    finally:
        processes.terminate()  # if they wait for each other
    result = json.loads((sharded / "result.json").read_text())
    # The batch of the process that died is resumed by two processes.
    other_batch_id, other_checkpoint = result["resumed"]
    assert other_batch_id == batch_id and other_checkpoint != checkpoint
    assert_same_update(tiny, Path(checkpoint), Path(other_checkpoint), 0.01)
    result = result["steps"]
    assert result.pop("error") == expected.pop("error") == [{"message": "the log is unreachable"}]
    for column, other in zip(expected.pop("scores"), result.pop("scores"), strict=True):
        assert list(other.values()) == pytest.approx(list(column.values()), abs=1e-3)
    cases = list_cases(tiny, untied, single)
    assert set(result) == set(expected) == set(cases)
    for name, steps in expected.items():
        assert len(result[name]) == len(steps) >= 1
        # bf16 has three digits. A second update starts from weights that already differ by the rounding of the first one.
        is_bf16, is_second = "bf16" in name, "second" in name
        precise = {"rel": 0.05, "abs": 0.01} if is_bf16 or is_second else {"rel": 1e-3, "abs": 1e-4}
        for number, step in enumerate(steps):
            assert result[name][number] == pytest.approx(step, **precise), (name, number)
        initial = tiny if "second" in name else cases[name][1][0]
        assert_same_update(initial, single / name, sharded / name, 0.25 if is_bf16 else 0.05 if is_second else 0.01)
        one, two = (json.loads((out / name / "config.json").read_text()) for out in (single, sharded))
        assert one | {"pad_token_id": 0} == two | {"pad_token_id": 0}, name  # a reward model sets it for each batch


def assert_same_update(initial, folder, other_folder, tolerance):
    """Check that all weights in two folders differ by less than `tolerance` times the change since the model in `initial`."""
    start, files = load_file(initial / "model.safetensors"), list(folder.rglob("*.safetensors"))
    assert files
    for file in files:
        trained, other = load_file(file), load_file(other_folder / file.relative_to(folder))
        assert trained.keys() == other.keys()
        for key, weight in trained.items():
            change = weight - start[key] if key in start else weight
            assert (weight - other[key]).norm() <= tolerance * change.norm() + 1e-6, (file, key)


def test_signals_and_the_loss_of_a_process():
    """Only the main process decides when to stop. If it is killed, the other process reports this and ends."""
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(Path.cwd()),
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
    }
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(find_free_port())}
    command = [sys.executable, "tests/support/lost_process.py"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    main, other = (
        subprocess.Popen(command, env=environment | {"RANK": rank, "LOCAL_RANK": rank}, **pipes) for rank in ("0", "1")
    )
    try:
        output, _ = main.communicate(timeout=HANG_S)
        _, errors = other.communicate(timeout=HANG_S)
    finally:
        main.kill()
        other.kill()
    assert (output, main.returncode, other.returncode) == ("sum 1.0\n", -signal.SIGKILL, 1)
    assert "ProcessLost: process 1 of 2 stops, because another process of this training has ended\n" in errors


def test_gate_reports_once_that_one_process_runs_it(tmp_path, monkeypatch, caplog):
    store, gate = RecordDatabase(tmp_path / "db").store, PromotionGate(load_settings(environment={})[0].promotion, list)
    gate(store, tmp_path, 1)
    assert not any("one process" in message for message in caplog.messages)
    monkeypatch.setattr(distributed, "_process_groups", ["group"])
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 4)
    distributed.report_single_process.cache_clear()
    for _ in range(2):
        gate(store, tmp_path, 1)
    (message,) = [message for message in caplog.messages if "one process" in message]
    assert message.startswith("the promotion gate runs in one process") and message.endswith("the other processes wait (3)")


def test_a_launch_that_would_train_something_else_is_refused(monkeypatch):
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 3)
    distributed.require_supported_launch({"sft.batch_size": 6})
    with pytest.raises(UsageError, match=r"3 processes cannot divide the 8 rows of a step equally \(reward.batch_size\)"):
        distributed.require_supported_launch({"sft.batch_size": 6, "reward.batch_size": 8})
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(UsageError, match="accelerate was started with FSDP"):
        distributed.require_supported_launch({})


def test_a_model_that_cannot_be_sharded_is_refused(tmp_path, monkeypatch):
    GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=10).save_pretrained(tmp_path)
    monkeypatch.setattr(sharding, "get_num_shards", lambda: 2)
    with pytest.raises(UsageError, match="a GPT2LMHeadModel cannot be trained by 2 processes"):
        weights.load_policy(tmp_path)
