"""Changes to the log that Charter does not make: lost or changed offsets, deleted records, recreated topics, more partitions.

In every scenario one process runs all stages and the sink.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tests.chaos.delivery import check_delivery, read_topic
from tests.chaos.system import SystemUnderTest, is_caught_up, read_texts, require, wait_until, write_prompts
from tests.support.kafka_operator import KafkaOperator

STAGES = ("respond", "critique", "revise", "judge")
WORK_TOPICS = ("prompts", "responses", "critiques", "revisions", "preferences")
_NUM_PARTITIONS = 3
_SETTING_FLAGS = {
    "critique.rounds": "1",
    "respond.num_completions": "2",
    "models.max_batch_size": "8",
    "bus.partitions": str(_NUM_PARTITIONS),
}
_FOREIGN_OFFSET = "was not written by Charter"


@contextmanager
def _open_system(folder: Path, address: str, prefix: str, batch_delay_s: float) -> Iterator[SystemUnderTest]:
    with SystemUnderTest(folder / "system", address, dict(_SETTING_FLAGS), prefix, batch_delay_s) as system:
        yield system


def _make_operator(system: SystemUnderTest) -> KafkaOperator:
    return KafkaOperator(system.bus_address.removeprefix("kafka://").split(","), system.bus_prefix)


def _is_running(system: SystemUnderTest) -> bool:
    """Return True. Raise an error if the process has ended."""
    code = system.processes["all"].poll()
    require(code is None, f"the process has ended with {code}: {system.read_log_tail('all')}")
    return True


def _wait_for_prompts(system: SystemUnderTest, count: int) -> None:
    wait_until(lambda: _is_running(system) and system.count_finished_prompts() >= count, f"{count} prompts are finished")


def _run_until_finished(system: SystemUnderTest, count: int, *arguments: str) -> None:
    """Run until `count` prompts are finished and nothing is unread. Then stop the process."""
    system.start_pipeline(*arguments)
    _finish(system, count)


def _finish(system: SystemUnderTest, count: int) -> None:
    _wait_for_prompts(system, count)
    wait_until(lambda: _is_running(system) and is_caught_up(system), "every consumer has caught up")
    require(system.stop_process("all") == 0, f"the process ended with an error: {system.read_log_tail('all')}")


# Offsets


def delete_groups(system: SystemUnderTest) -> None:
    """Delete the offsets of all stages, as Kafka does some days after the stages have stopped."""
    for stage in STAGES:
        _make_operator(system).delete_group(f"live.{stage}")


def wait_until_offsets_expire(system: SystemUnderTest) -> None:
    """Wait until the broker has deleted the offsets itself. `EXPIRY_SETTINGS` make this a matter of minutes."""
    operator = _make_operator(system)
    wait_until(
        lambda: not any(operator.list_offsets(f"live.{stage}") for stage in STAGES), "the broker has deleted all offsets"
    )


EXPIRY_SETTINGS = {"offsets.retention.minutes": 1, "offsets.retention.check.interval.ms": 5000}


def run_offset_expiry(
    folder: Path,
    address: str,
    *,
    prompts: int = 300,
    num_expiries: int = 3,
    seed: int = 0,
    prefix: str = "",
    expire: Callable[[SystemUnderTest], None] = wait_until_offsets_expire,
) -> Iterator[str]:
    """Lose all offsets several times: after a clean stop, and after a kill in the middle of the work.

    The temperature changes each time, so repeated work would produce records with other ids.
    """
    paths = write_prompts(folder / "prompts", prompts, num_expiries + 1, seed)
    texts: list[str] = []
    with _open_system(folder, address, prefix, batch_delay_s=0.05) as system:
        for number, path in enumerate(paths):
            system.setting_overrides["respond.temperature"] = f"{0.5 + number / 10:.1f}"
            system.publish_file(path)
            num_finished, texts = len(texts), texts + read_texts(path)
            if number % 2:
                system.start_pipeline("--accept-configuration")
                _wait_for_prompts(system, num_finished + 1)
                system.kill_process("all")
                yield f"killed with {system.count_finished_prompts()} of {len(texts)} prompts finished"
            else:
                _run_until_finished(system, len(texts), "--accept-configuration")
            if path is not paths[-1]:
                expire(system)
                yield f"all offsets are lost after {len(texts)} prompts"
        _run_until_finished(system, len(texts), "--accept-configuration")
        check_delivery(system, texts)
        yield f"{len(texts)} prompts are finished exactly once"


RESETS: dict[str, Callable[[int], int]] = {
    "the beginning": lambda end: 0,
    "the end": lambda end: end,
    "beyond the end": lambda end: end + 1000,
}


def run_offset_resets(
    folder: Path, address: str, *, resets: Sequence[str] = tuple(RESETS), prompts: int = 40, seed: int = 0, prefix: str = ""
) -> Iterator[str]:
    """Change all offsets with another program, while unread prompts are on the log.

    The stages refuse to start. `charter offsets restore` repairs each stage.
    """
    paths = write_prompts(folder / "prompts", prompts, len(resets) + 1, seed)
    texts = read_texts(paths[0])
    with _open_system(folder, address, prefix, batch_delay_s=0.0) as system:
        operator = _make_operator(system)
        system.publish_file(paths[0])
        _run_until_finished(system, len(texts))
        for name, path in zip(resets, paths[1:], strict=True):
            system.publish_file(path)
            texts += read_texts(path)
            ends = {tp: end for topic in WORK_TOPICS for tp, end in operator.end_offsets(topic).items()}
            for stage in STAGES:
                offsets = operator.list_offsets(f"live.{stage}")
                operator.alter_offsets(f"live.{stage}", {tp: RESETS[name](ends[tp]) for tp in offsets})
            system.start_pipeline()
            require(system.wait_for_exit("all") == 2, f"a reset to {name} was not refused: {system.read_log_tail('all')}")
            require(_FOREIGN_OFFSET in system.read_log("all"), f"no reason is given: {system.read_log_tail('all')}")
            for stage in STAGES:
                code, output = system.run_command("offsets", "restore", "--stage", stage)
                require(code == 0, output)
            _run_until_finished(system, len(texts))
            yield f"a reset to {name} was refused and repaired"
        check_delivery(system, texts)


# Deleted records


def run_deleted_records(folder: Path, address: str, *, prompts: int = 40, seed: int = 0, prefix: str = "") -> Iterator[str]:
    """Delete records that a stage has not read, before its first start and between two runs, and records that the sink needs.

    Each process ends with an error that names the records. After `charter offsets set` the stage answers the other prompts.
    """
    paths = write_prompts(folder / "prompts", prompts, 2, seed)
    with _open_system(folder, address, prefix, batch_delay_s=0.0) as system:
        operator, expected, num_published = _make_operator(system), set[str](), 0
        for path, state in zip(paths, ("before its first start", "while it was stopped"), strict=True):
            system.publish_file(path)
            num_published += len(read_texts(path))
            _run_sink(system, num_published)
            committed = operator.list_offsets("live.respond")
            operator.delete_records_below(_find_middles(operator, "prompts", committed))
            kept = {record.prompt_text for record in read_topic(system, "prompts")}
            expected |= kept
            _require_loss_reported(system, "prompts", "respond")
            code, output = system.run_command("offsets", "set", "--stage", "respond", "--to", "earliest")
            require(code == 0, output)
            system.start_pipeline("--stage", "respond")
            count = len(expected)
            wait_until(
                lambda count=count: _is_running(system) and len(_read_answered(system)) >= count,
                "the other prompts are answered",
            )
            require(system.stop_process("all") == 0, system.read_log_tail("all"))
            yield f"{len(read_texts(path)) - len(kept)} prompts deleted {state}: reported, and the other prompts are answered"
        require(_read_answered(system) == sorted(expected), "the answered prompts are not the remaining prompts")
        operator.delete_records_below(_find_middles(operator, "responses", {}))
        _require_loss_reported(system, "responses", "sink")
        yield "responses deleted before the sink has read them: reported"


def _run_sink(system: SystemUnderTest, num_prompts: int) -> None:
    """Run only the sink until the database has this number of prompts."""
    system.start_pipeline("--stage", "sink")
    wait_until(
        lambda: _is_running(system) and system.query_count_or_zero("SELECT count(*) FROM prompts") == num_prompts,
        "the sink has stored the prompts",
    )
    require(system.stop_process("all") == 0, system.read_log_tail("all"))


def _find_middles(operator: KafkaOperator, topic: str, committed: dict[tuple[str, int], int]) -> dict[tuple[str, int], int]:
    """Return, for each partition, the offset in the middle of its unread records."""
    return {tp: (committed.get(tp, 0) + end + 1) // 2 for tp, end in operator.end_offsets(topic).items()}


def _read_answered(system: SystemUnderTest) -> list[str]:
    return sorted(record.prompt_text for record in read_topic(system, "responses"))


def _require_loss_reported(system: SystemUnderTest, topic: str, stage: str) -> None:
    """Run a stage that has lost records. Require that it ends with an error that names them."""
    code, output = system.run_to_its_end("run", "--stage", stage)
    require(
        code == 1 and f"{topic}[" in output and "no longer" in output, f"no error about the loss, code {code}: {output[-300:]}"
    )


RETENTION_SETTINGS = {"log.retention.check.interval.ms": 500, "log.initial.task.delay.ms": 500}


def run_retention(folder: Path, address: str, *, prompts: int = 600, seed: int = 0, prefix: str = "") -> Iterator[str]:
    """Let the broker delete prompts after a few seconds, while respond is slower than that.

    respond ends with an error when prompts are lost. It is then started again after `charter offsets set`. If it never ends with
    an error, every prompt must be answered.
    """
    paths = write_prompts(folder / "prompts", prompts, 10, seed)
    texts = {text for path in paths for text in read_texts(path)}
    with _open_system(folder, address, prefix, batch_delay_s=1.0) as system:
        system.setting_overrides["worker.max_in_flight"] = "8"
        code, output = system.run_command("topics", "create")
        require(code == 0, output)
        _make_operator(system).set_topic_configs("prompts", {"retention.ms": "3000", "segment.ms": "1000"})
        system.start_pipeline("--stage", "respond")
        losses = []
        for path in paths:
            system.publish_file(path)
            losses.append(_skip_lost_prompts(system))

        def has_read_all_prompts() -> bool:
            losses.append(_skip_lost_prompts(system))
            return not losses[-1] and _has_read_all_prompts(system)

        wait_until(has_read_all_prompts, "respond has read all prompts")
        require(system.stop_process("all") == 0, system.read_log_tail("all"))
        answered = _read_answered(system)
        require(len(answered) == len(set(answered)), "a prompt was answered twice")
        num_missing = len(texts.difference(answered))
        require(any(losses) or num_missing == 0, f"{num_missing} prompts were lost and no error was reported")
        yield f"{len(answered)} of {len(texts)} prompts are answered; {sum(losses)} errors reported the loss of the others"


def _has_read_all_prompts(system: SystemUnderTest) -> bool:
    operator = _make_operator(system)
    return operator.list_offsets("live.respond") == operator.end_offsets("prompts")


def _skip_lost_prompts(system: SystemUnderTest) -> bool:
    """If respond has ended because of lost prompts, skip them and start it again. Return whether it had ended."""
    code = system.processes["all"].poll()
    if code is None:
        return False
    output = system.read_log("all")
    require(code == 1 and "no longer" in output, f"respond ended with {code} for another reason: {output[-300:]}")
    (system.folder / "all.log").unlink()
    code, output = system.run_command("offsets", "set", "--stage", "respond", "--to", "earliest")
    require(code == 0, output)
    system.start_pipeline("--stage", "respond")
    return True


# Recreated topics


def run_recreated_topics(
    folder: Path,
    address: str,
    *,
    state: str = "running",
    topics: Sequence[str] = WORK_TOPICS,
    prompts: int = 300,
    pause_s: float = 0.0,
    seed: int = 0,
    prefix: str = "",
) -> Iterator[str]:
    """Delete topics and create them again in the middle of the work of a process.

    The process is running, stopped (with SIGTERM) or paused (with SIGSTOP, for `pause_s` seconds). Prompts that were finished
    before are not processed again. Unfinished prompts may be lost, because their records were deleted. Every prompt that is
    published afterwards is finished exactly once.
    """
    before, during, after = write_prompts(folder / "prompts", prompts, 3, seed)
    finished, unfinished, new = read_texts(before), read_texts(during), read_texts(after)
    with _open_system(folder, address, prefix, batch_delay_s=0.1) as system:
        operator = _make_operator(system)
        system.publish_file(before)
        _run_until_finished(system, len(finished))
        system.publish_file(during)
        system.start_pipeline()
        _wait_for_prompts(system, len(finished) + 1)
        if state == "stopped":
            require(system.stop_process("all") == 0, system.read_log_tail("all"))
        elif state == "paused":
            system.processes["all"].send_signal(signal.SIGSTOP)
        operator.recreate_topics(*topics)
        system.publish_file(after)
        if state == "paused":
            time.sleep(pause_s)  # the pause itself
            system.processes["all"].send_signal(signal.SIGCONT)
        if state != "stopped":
            code = system.wait_for_exit("all")
            require(code == 3, f"the process ended with {code} and not with 3: {system.read_log_tail('all')}")
            yield f"the {state} process has ended with 3: {system.read_log_tail('all')[:120]}"
        system.start_pipeline()
        wait_until(lambda: _is_running(system) and _count_new(system, new) == len(new), "the new prompts are finished")
        wait_until(lambda: _is_running(system) and is_caught_up(system), "every consumer has caught up")
        require(system.stop_process("all") == 0, system.read_log_tail("all"))
        check_delivery(system, [*finished, *new], texts_on_topics=new, other_texts=unfinished)
        yield f"{', '.join(topics)} created again under a {state} process: {len(new)} new prompts finished exactly once"


def _count_new(system: SystemUnderTest, texts: Sequence[str]) -> int:
    """Return the number of these prompts that have a finished chain and a preference in the database."""
    words = ", ".join(f"'{text}'" for text in texts)
    return system.query_count_or_zero(
        f"""SELECT count(*) FROM prompts WHERE messages[1].content IN ({words})
            AND prompt_id IN (SELECT prompt_id FROM revision_chains) AND prompt_id IN (SELECT prompt_id FROM preferences)"""
    )


# Added partitions


def run_added_partitions(
    folder: Path, address: str, *, prompts: int = 200, wait_for_discovery: bool = True, seed: int = 0, prefix: str = ""
) -> Iterator[str]:
    """Add partitions to all work topics under a running process, and publish known and new prompts afterwards.

    The run keeps its partitions, so a known prompt is recognized. A later run uses all partitions. With `wait_for_discovery`
    the process runs until it has been assigned the new partitions.
    """
    first, second = write_prompts(folder / "prompts", prompts, 2, seed)
    both = folder / "prompts" / "both.jsonl"
    both.write_text(second.read_text() + first.read_text())
    texts, new_count = read_texts(both), _NUM_PARTITIONS + 2
    with _open_system(folder, address, prefix, batch_delay_s=0.05) as system:
        operator = _make_operator(system)
        system.start_pipeline()
        system.publish_file(first)
        _wait_for_prompts(system, 1)
        operator.add_partitions(new_count, *WORK_TOPICS)
        system.publish_file(both)
        if wait_for_discovery:
            new = {("prompts", number) for number in range(_NUM_PARTITIONS, new_count)}
            wait_until(
                lambda: _is_running(system) and new <= operator.list_offsets("live.respond").keys(), "new partitions are read"
            )
            yield "the running process has read the new partitions"
        _finish(system, len(texts))
        check_delivery(system, texts)
        used = {record.partition for topic in WORK_TOPICS for record in read_topic(system, topic)}
        require(used <= set(range(_NUM_PARTITIONS)), f"the run has used the partitions {sorted(used)}")
        system.setting_overrides["run.id"] = "later"
        system.publish_file(both)
        system.start_pipeline()
        # Its records have the same ids as those of the first run, so the views show them as duplicates.
        outputs = "SELECT least((SELECT count(*) FROM raw.preferences {0}), (SELECT count(*) FROM raw.critiques {0} AND final))"
        sql = outputs.format("WHERE run_id = 'later'")
        wait_until(lambda: _is_running(system) and system.query_count_or_zero(sql) == len(texts), "the later run is finished")
        require(system.stop_process("all") == 0, system.read_log_tail("all"))
        check_delivery(system, texts, run_id="later")
        used = {record.partition for record in read_topic(system, "prompts") if record.belongs_to("later")}
        require(used == set(range(new_count)), f"the later run has used the partitions {sorted(used)}")
        yield f"{len(texts)} prompts finished exactly once, in both runs"
