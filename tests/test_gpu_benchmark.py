"""python -m benchmarks.gpu: a small shape runs every measurement on a CPU, and an ended run continues."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks.gpu.runner import Measurement, ResultsFile, format_table, run_measurements
from engine.errors import UsageError
from tests.support.site_packages import link_site_packages_without

ROOT = Path(__file__).parents[1]
FIGURES = [("copy", 1234.0, "GB/s")]


def make_measurement(run=lambda: FIGURES, limit_s=10, conditions="size 1", name="copy", **more):
    return Measurement(1, name, conditions, limit_s, run, **more)


@pytest.fixture
def results(tmp_path):
    return ResultsFile(tmp_path / "results.json", "device 1")


def reload(results):
    """Return the results as the next run reads them."""
    loaded = ResultsFile(results.path, results.device)
    loaded.load()
    return loaded


def run(results, *measurements, seconds=60.0):
    return run_measurements(measurements, results, time.monotonic() + seconds)


def fail(error):
    raise error


def test_results_are_stored_at_once_and_not_measured_again(results, capsys):
    def stop():
        stored = json.loads(results.path.read_text())["rows"]
        assert stored["copy"]["figures"] == [["copy", 1234.0, "GB/s"]]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(results, make_measurement(), make_measurement(stop, name="second"))
    continued = reload(results)
    assert run(continued, make_measurement(lambda: fail(AssertionError("again"))), make_measurement(name="second"))
    assert "copy: skipped: already measured (ok)" in capsys.readouterr().out
    assert run(reload(results), make_measurement(lambda: [("copy", 5.0, "GB/s")], conditions="size 2"))
    assert reload(results).rows["copy"]["figures"] == [["copy", 5.0, "GB/s"]]


def test_a_measurement_that_ends_the_process_is_tried_twice(results, capsys):
    def kill():
        raise SystemExit

    for _ in range(2):
        with pytest.raises(SystemExit):
            run(results, make_measurement(kill))
        results = reload(results)
    assert not run(results, make_measurement(kill), make_measurement(name="second"))
    assert "copy: skipped: it ended the process, and was tried 2 times" in capsys.readouterr().out
    assert results.rows["second"]["status"] == "ok"


def test_failures_are_rows_and_the_next_measurement_runs(results, capsys):
    measurements = [
        make_measurement(lambda: fail(torch.OutOfMemoryError("CUDA out of memory. Tried 3 GiB")), name="large"),
        make_measurement(lambda: time.sleep(60), limit_s=0.05, name="slow"),
        make_measurement(lambda: fail(ValueError("odd")), name="faulty"),
        make_measurement(packages=("no_such_package", "torch"), name="stream"),
        make_measurement(limit_s=100, name="long"),
        make_measurement(),
    ]
    assert not run(results, *measurements)
    assert [results.rows[m.name]["status"] for m in measurements] == [
        "out of memory", "over time", "failed", "skipped", "skipped", "ok",
    ]  # fmt: skip
    output, errors = capsys.readouterr()
    assert "stream: skipped: it needs packages that are not installed: no_such_package" in output
    assert re.search(r"long: skipped: its time limit of 100 s does not fit into the remaining \d\d s", output)
    assert "ValueError: odd" in output and "Traceback" in errors
    table = format_table(results, [m.name for m in measurements])
    assert "`python -m benchmarks.gpu --part 1` on device 1" in table
    assert "| copy | copy | 1,234 | GB/s | size 1 |" in table
    assert "| large | out of memory |  | CUDA out of memory. Tried 3 GiB | size 1 |" in table
    run(reload(results), *measurements)  # only the faulty one is tried again
    assert "stopped" not in (output := capsys.readouterr().out) and "faulty (size 1): failed: ValueError: odd" in output


def test_results_of_two_machines_are_not_mixed(results):
    run(results, make_measurement())
    other = ResultsFile(results.path, "device 2")
    with pytest.raises(UsageError, match="device 1") as caught:
        other.load()
    assert len(str(caught.value).splitlines()) == 3
    other.load(any_device=True)
    assert "on device 1" in format_table(other, [])


def run_benchmark(*arguments, packages, results, code=0):
    """Run the command with these packages. Return its output and its rows."""
    environment = {**os.environ, "PYTHONPATH": f"{packages}{os.pathsep}{ROOT}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-S", "-W", "ignore", "-m", "benchmarks.gpu", "--results", str(results), *arguments]
    completed = subprocess.run(command, check=False, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert completed.returncode == code, completed.stderr
    return completed.stdout, json.loads(results.read_text())["rows"]


def test_small_shape_runs_without_trl_datasets_and_duckdb(tmp_path):
    packages = link_site_packages_without({"trl", "datasets", "duckdb", "_duckdb", "pydantic_settings"}, tmp_path / "packages")
    selection = ["--only", "bandwidth", "batch 1", "labels", "stream", "LoRA"]
    output, rows = run_benchmark(
        "--shapes", "small", "--part", "1", "--part", "2", *selection, packages=packages, results=tmp_path / "r.json", code=1
    )
    assert "stream small: skipped: it needs packages that are not installed: duckdb, pydantic_settings" in output
    measured = {name for name, row in rows.items() if row["status"] == "ok"}
    assert measured == {"bandwidth", "generation small, batch 1", "labels small", "ppo small, LoRA", "grpo small, LoRA"}
    for row in rows.values():
        assert row["device"].startswith("CPU") and row["command"].startswith("python -m benchmarks.gpu --part")
        assert all(value > 0 and unit for _, value, unit in row.get("figures", []))


def test_large_shapes_are_refused_without_a_gpu(capsys, tmp_path):
    from benchmarks.gpu.__main__ import main

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert main(["--part", "1", "--results", str(tmp_path / "r.json")]) == 2
    assert "the shapes 1b, 8b need a GPU" in capsys.readouterr().err


def test_stream_counts_all_records_at_fixed_lengths():
    from benchmarks.gpu.measurements import measure_stream
    from benchmarks.gpu.shapes import SHAPES

    figures = {name: value for name, value, _ in measure_stream(SHAPES["small"])}
    assert figures["written tokens of a prompt"] == 24 and figures["records of all stages"] > figures["prompts"] > 0
    assert not any("llm-swarm" in name for name in figures)  # its prompts have 321 written tokens


def test_limit_counts_the_bytes_that_a_step_reads():
    from transformers import LlamaForCausalLM

    from benchmarks.gpu.shapes import SHAPES, count_kv_bytes, count_weight_bytes

    assert count_kv_bytes(SHAPES["8b"], torch.bfloat16) == 131_072
    with torch.device("meta"):
        sizes = {name: count_weight_bytes(LlamaForCausalLM(SHAPES[name].to_config()).bfloat16()) for name in ("1b", "8b")}
    # The embedding of the 1B shape is also its output layer. The 8B shape reads only a few rows of its embedding.
    assert sizes == {"1b": 2 * 1_235_814_400, "8b": 2 * (8_030_261_248 - 128_256 * 4096)}
