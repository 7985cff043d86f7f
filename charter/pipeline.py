"""Build the pipeline from the settings: the stages, and the host that runs their workers and the sink.

One process can run all stages with one shared model (`charter run`), or only some stages (`charter run --stage NAME`).
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from charter import custom_stage
from charter.budget import make_budget
from charter.configurations import claim_configuration, describe_stages
from charter.connect import open_sink_lock, open_store
from charter.installation import get_install_command
from charter.manifests import make_run_manifest
from charter.models import ConfigurationProcessor, LatestPolicyProcessor, RoleModels, is_endpoint, make_policy_getter
from charter.served_policy import require_separate_server
from charter.stages import PRINCIPLES_GRADER, STAGE_OUTPUTS, STAGES, get_stage_inputs, get_stage_role
from charter.telemetry import make_pipeline_collector, open_tracing, start_metrics_server
from charter.topic_check import require_usable_topics
from constitutions.loader import Constitution, load_constitution
from consumers.contrast import ContrastStage
from consumers.critique import CritiqueStage
from consumers.grade import GradeStage
from consumers.graders.custom import load_grader
from consumers.graders.instructions import InstructionsGrader
from consumers.graders.interface import Grader
from consumers.graders.length import LengthGrader
from consumers.graders.one_sentence import OneSentenceGrader
from consumers.graders.principles import PrinciplesGrader
from consumers.graders.refusal import RefusalGrader
from consumers.judge import JudgeStage
from consumers.respond import ContrastPrompts, RespondStage
from consumers.revise import ReviseStage
from consumers.sink import Sink
from engine.budget import Budget
from engine.bus.port import Bus
from engine.crash_journal import CrashJournal, FaultLog
from engine.errors import ModelUnreachable, UsageError
from engine.host import Host, ThreadTarget
from engine.instances import InstanceLease, ServiceLease
from engine.languages import require_language_detector
from engine.models.interface import Model
from engine.pacing import PacedAdmission, TrainingLoopHistory
from engine.pairing import CONTRAST_PAIRING, name_pairing
from engine.run_starts import StartPositions, ensure_run_start
from engine.server_waits import ServerWaitReporter
from engine.settings import JUDGE, REWARD_MODEL, Settings
from engine.watchdog import CallTracker
from engine.worker import Stage, Worker, WorkerLimits, skip_tracing
from schemas.records import Sampling
from trainer.methods import get_rl_fraction

if TYPE_CHECKING:
    from engine.tracing import Tracing

logger = logging.getLogger("charter.pipeline")

_STANDBY_POLL_INTERVAL_S = 1.0
_NO_LIMITS: Mapping[str, int] = {}


@dataclass(frozen=True)
class Evaluation:
    """The evaluation that a run belongs to: its name, its policy version, and the maximum length of the responses.

    `max_tokens` is the maximum for all suites. If it is None, each suite has its own, in `suite_max_tokens`.
    """

    name: str
    policy_version: int
    max_tokens: int | None
    suite_max_tokens: Mapping[str, int]

    def to_manifest_fields(self) -> dict[str, Any]:
        return {"name": self.name, "policy": self.policy_version}

    def describe(self) -> dict[str, Any]:
        """Return the values that replace those of the stage respond in the configuration of the run."""
        return {"respond.max_tokens": self.max_tokens or "the limit of each suite", "policy version": self.policy_version}


def make_stage(
    name: str,
    settings: Settings,
    models: RoleModels,
    constitution: Constitution,
    bus: Bus,
    pinned_version: int | None = None,
    suite_max_tokens: Mapping[str, int] = _NO_LIMITS,
    *,
    labels_all: bool = False,
    revises_suites: bool = False,
) -> Stage:
    """Return a stage of the pipeline.

    The stage uses policy `pinned_version`. If `pinned_version` is None, the stage follows the newest policy. `suite_max_tokens` is
    the maximum length of the responses to prompts of each evaluation suite; by default, it is respond.max_tokens. If `labels_all` is
    true, the judge also labels the pairs of prompts for RL. If `revises_suites` is true, responses to prompts of evaluation suites are
    criticized and revised, too.

    Raises UsageError for an unknown name, and for a role in models.follow whose model is not the local policy.
    """
    require_separate_server(settings)
    stage = _make_base_stage(name, settings, models, constitution, bus, pinned_version, suite_max_tokens, labels_all)
    if revises_suites and name in ("critique", "revise"):
        process: Any = stage.process
        stage = replace(stage, process=replace(process, revises_suites=True))
    role = get_stage_role(name, settings)
    if role not in settings.models.follow or pinned_version is not None:
        return stage
    if models.get_spec(role) != models.get_spec("policy") or is_endpoint(models.get_spec("policy")):
        raise UsageError(
            f"models.follow and models.{role} contradict each other",
            f"{models.get_spec(role)} is not the local policy that the trainer updates",
            f"leave models.{role} empty, or remove {role} from models.follow",
        )
    return replace(stage, process=LatestPolicyProcessor(stage.process, models.follow_policy(bus).get_current_policy))


def _make_base_stage(
    name: str,
    settings: Settings,
    models: RoleModels,
    constitution: Constitution,
    bus: Bus,
    pinned_version: int | None,
    suite_max_tokens: Mapping[str, int],
    labels_all: bool,
) -> Stage:
    """Return a stage whose critic and judge keep the same weights when the policy changes."""
    batch_size = settings.models.max_batch_size
    process: Any
    if name == "respond":
        _require_contrast_role(settings, models)
        process = make_respond_stage(settings, make_policy_getter(models, bus, pinned_version), constitution, suite_max_tokens)
        batch_size = max(1, batch_size // settings.respond.num_completions)  # each completion needs one row of the batch
    elif name == "critique":
        process = make_critique_stage(settings, models, constitution)
    elif name == "revise":
        process = make_revise_stage(settings, models, constitution)
    elif name == "judge":
        process = make_judge_stage(settings, models, constitution)
        if isinstance(process, JudgeStage) and not labels_all and get_rl_fraction(settings):
            process = replace(process, skips_rl_prompts=TrainingLoopHistory(bus))
    elif name == "grade":
        process = make_grade_stage(settings, models, constitution)
    else:
        raise UsageError(f"there is no stage {name}", f"the stages are {', '.join(STAGES)}", "type: charter run --help")
    inputs = get_stage_inputs(settings)[name]
    # Several producers may publish the same prompt. The policy responds only to the first record of a prompt.
    is_first = name == "respond"
    return Stage(name, inputs, (STAGE_OUTPUTS[name],), STAGES.index(name), batch_size, process, first_per_key=is_first)


def _require_contrast_role(settings: Settings, models: RoleModels) -> None:
    """Raise UsageError if contrast completions need the chat template of a server, which cannot be read."""
    spec = models.get_spec("policy")
    if settings.judge.pairing == CONTRAST_PAIRING and settings.contrast.constitution_role == "system" and is_endpoint(spec):
        raise UsageError(
            "contrast.constitution_role = system needs a local policy",
            f"the default system message of {spec} is unknown, so the two prompts would differ by more than the constitution",
            "set contrast.constitution_role = user",
        )


def make_respond_stage(
    settings: Settings,
    get_policy: Callable[[], tuple[Model, int]],
    constitution: Constitution | None,
    suite_max_tokens: Mapping[str, int] = _NO_LIMITS,
) -> RespondStage:
    """Return the respond stage. The constitution is used only with judge.pairing = contrast; None means no contrast completions."""
    options = settings.respond
    contrast = None
    if settings.judge.pairing == CONTRAST_PAIRING and constitution is not None:
        contrast = ContrastPrompts(constitution, settings.contrast.constitution_role, settings.contrast.num_principles)
    sampling = Sampling(
        temperature=options.temperature,
        top_p=options.top_p,
        max_tokens=options.max_tokens,
        max_thinking_tokens=options.max_thinking_tokens,
    )
    return RespondStage(get_policy, options.num_completions, sampling, suite_max_tokens, contrast)


def make_critique_stage(settings: Settings, models: RoleModels, constitution: Constitution) -> CritiqueStage:
    options = settings.critique
    return CritiqueStage(
        model=models.get_model("critic"),
        constitution=constitution,
        sampling=Sampling(
            temperature=options.temperature,
            top_p=1.0,
            max_tokens=options.max_tokens,
            max_thinking_tokens=options.max_thinking_tokens,
        ),
        rounds=options.rounds,
        early_stop=options.early_stop,
        few_shot=options.few_shot,
        min_option_mass=options.min_option_mass,
        accept_threshold=options.accept_threshold,
        reject_threshold=options.reject_threshold,
        similarity_threshold=options.similarity_threshold,
        skip_sources=tuple(options.skip_sources),
        preset=options.preset,
        selection=options.selection,
    )


def make_revise_stage(settings: Settings, models: RoleModels, constitution: Constitution) -> ReviseStage:
    sampling = Sampling(
        temperature=settings.critique.temperature,
        top_p=1.0,
        max_tokens=settings.revise.max_tokens,
        max_thinking_tokens=settings.revise.max_thinking_tokens,
    )
    return ReviseStage(models.get_model("critic"), constitution, sampling, settings.critique.few_shot, settings.critique.preset)


def make_judge_stage(settings: Settings, models: RoleModels, constitution: Constitution) -> JudgeStage | ContrastStage:
    """Return the judge stage. Contrast pairs have labels without a judge, so its model is opened only if it is asked."""
    if settings.judge.pairing != CONTRAST_PAIRING:
        return make_pair_judge(settings, models.get_model("judge"), constitution)
    model = models.get_model("judge") if settings.contrast.ask_judge else None
    return ContrastStage(model, lambda judge: make_pair_judge(settings, judge, constitution), settings.judge.preset)


def make_pair_judge(settings: Settings, model: Model, constitution: Constitution) -> JudgeStage:
    """Return a judge of pairs of completions or, if judge.pairing is revision, of chains."""
    options = settings.judge
    return JudgeStage(
        model=model,
        constitution=constitution,
        pairing=name_pairing(options.pairing),
        pairs="neighbors" if options.pairing == CONTRAST_PAIRING else options.pairing,
        min_option_mass=options.min_option_mass,
        reject_position_flips=options.reject_position_flips,
        preset=options.preset,
        answer_mode=options.answer_mode,
        principles=options.principles,
        num_principles=options.num_principles,
        label_order=options.label_order,
        clamp=options.clamp,
        max_tokens=options.max_tokens,
        timeout_s=options.timeout_s,
        max_thinking_tokens=options.max_thinking_tokens,
    )


BUILTIN_GRADERS = ("refusal", "length", "one-sentence", "instructions", PRINCIPLES_GRADER)


def make_principles_grader(settings: Settings, models: RoleModels, constitution: Constitution) -> PrinciplesGrader:
    return PrinciplesGrader(
        models.get_model("judge"), constitution, settings.judge.min_option_mass, settings.grade.num_principles
    )


def make_grade_stage(settings: Settings, models: RoleModels, constitution: Constitution) -> GradeStage:
    """Return the stage with the graders in `grade.graders`. Raises UsageError if a grader does not exist or is named twice."""
    graders: list[Grader] = []
    for name in settings.grade.graders:
        if name == "refusal":
            graders.append(RefusalGrader())
        elif name == "length":
            graders.append(LengthGrader())
        elif name == "one-sentence":
            graders.append(OneSentenceGrader())
        elif name == "instructions":
            require_language_detector(
                "the grader instructions",
                "some instructions ask for a response in one language",
                f"type: {get_install_command('eval')}",
            )
            graders.append(InstructionsGrader())
        elif name == PRINCIPLES_GRADER:
            graders.append(make_principles_grader(settings, models, constitution))
        elif name.endswith(".py"):
            graders.append(load_grader(name, (*BUILTIN_GRADERS, REWARD_MODEL, JUDGE)))
        else:
            raise UsageError(
                f"there is no grader {name}",
                f"the graders are {', '.join(BUILTIN_GRADERS)}, or a Python file",
                "correct grade.graders",
            )
    names = [grader.name for grader in graders]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UsageError(f"grade.graders has {twice} twice", "each grader grades a response once", "correct grade.graders")
    return GradeStage(graders, settings.grade.subjects, constitution)


def make_host(
    settings: Settings,
    bus: Bus,
    stages: Sequence[str],
    *,
    sink: bool,
    custom_stages: Sequence[custom_stage.CustomStage] = (),
    instance: str | None = None,
    pinned_version: int | None = None,
    replay: dict[str, Any] | None = None,
    evaluation: Evaluation | None = None,
    constitution: Constitution | None = None,
    accept_configuration: bool = False,
    open_models: dict[str, Model] | None = None,
) -> Host:
    """Publish the run manifest if it is new. Return a host that runs these stages, and also the sink if `sink` is true.

    A replay passes the replay fields of its manifest, a policy version and a constitution. By default, they come from the
    settings. An evaluation passes `evaluation` and a policy version. `open_models` are models that are already open, by their
    setting; models that this function opens are added. `instance` is the name of this worker instance. If `instance` is None,
    the host leases the lowest free name on this machine. If `accept_configuration` is true, changed settings of the stages become
    a further configuration of the run.

    Raises UsageError if the run has another configuration. If this function raises an error, it closes everything that it has
    opened, so that it can be called again.
    """
    constitution = constitution or load_constitution(settings.run.constitution)
    for problem in require_usable_topics(bus):
        logger.warning("%s: %s; %s", *problem[:3])
    with ExitStack() as on_failure:
        # The host closes these resources in reverse order.
        resources = on_failure.enter_context(ExitStack())
        models = RoleModels(settings, {} if open_models is None else open_models)
        resources.callback(models.close)
        lease = None if instance else InstanceLease(settings.folder / "instances")
        instance_name = instance or (lease.name if lease else "")
        roles = {role for stage in stages if (role := get_stage_role(stage, settings))}
        budget = make_budget(settings, models, bus, roles, admits_prompts="respond" in stages)
        tracing = open_tracing(settings)
        for resource in (lease, budget, tracing):
            if resource:
                resources.callback(resource.close)
        is_live = replay is None and evaluation is None
        stages_and_roles = _make_stages(
            settings,
            bus,
            models,
            constitution,
            stages,
            custom_stages,
            pinned_version,
            evaluation,
            labels_all=not is_live,
            revises_suites=replay is not None and "revises_suites" in replay,
        )
        _check_servers(models, [role for _, role in stages_and_roles if role])
        run_start = None
        if stages_and_roles:  # a process that runs only the sink serves all runs, so it must not create a run
            run_start = ensure_run_start(bus, settings.run.id)
            number = _claim_configuration(settings, bus, models, constitution, stages, replay, evaluation, accept_configuration)
            stages_and_roles = [
                (replace(stage, process=ConfigurationProcessor(stage.process, number)), role)
                for stage, role in stages_and_roles
            ]
        fault_log = FaultLog(settings.folder / "journal" / f"{instance_name}.fault")
        resources.callback(fault_log.close)
        workers = []
        for stage, role in stages_and_roles:
            worker = _make_worker(
                settings,
                bus,
                models,
                stage,
                role,
                instance_name,
                budget,
                tracing,
                fault_log.had_fault,
                run_start,
                pacing=make_pacing(stage.name, settings, bus) if is_live else None,
            )
            workers.append(worker)
            if worker.journal:
                resources.callback(worker.journal.close)
            for opened in (worker.consumer, worker.writer):
                on_failure.callback(opened.close)  # a worker that runs closes them itself
        sink_service = _SinkService(settings, bus) if sink else None
        if sink_service:
            resources.callback(sink_service.close)
        sinks = sink_service.sinks if sink_service else []
        # The metrics server is closed first, because it reads the workers.
        for close in reversed(start_metrics_server(settings, make_pipeline_collector(workers, sinks, models.list_servers))):
            resources.callback(close)
        on_failure.pop_all()
        waits = ServerWaitReporter(settings.folder, lambda: [server.health for server in models.list_servers()])
        services: dict[str, ThreadTarget] = {"sink": sink_service.run} if sink_service else {}
        if stages_and_roles:
            services["server waits"] = waits.run
        return Host(
            workers,
            services,
            [resources.close],
            watched_calls=sink_service.call_trackers if sink_service else (),
            shutdown_timeout_s=settings.worker.shutdown_timeout_s,
            call_timeout_s=settings.worker.call_timeout_s,
        )


def _make_stages(
    settings: Settings,
    bus: Bus,
    models: RoleModels,
    constitution: Constitution,
    names: Sequence[str],
    custom_stages: Sequence[custom_stage.CustomStage],
    pinned_version: int | None,
    evaluation: Evaluation | None,
    *,
    labels_all: bool,
    revises_suites: bool,
) -> list[tuple[Stage, str | None]]:
    """Return the built-in and the custom stages, each with the role of its model."""
    limits = evaluation.suite_max_tokens if evaluation else _NO_LIMITS
    stages: list[tuple[Stage, str | None]] = [
        (
            make_stage(
                name,
                settings,
                models,
                constitution,
                bus,
                pinned_version,
                limits,
                labels_all=labels_all,
                revises_suites=revises_suites,
            ),
            get_stage_role(name, settings),
        )
        for name in names
    ]
    for custom in custom_stages:
        stage = custom_stage.validate_custom_stage(custom.make_stage(settings, models), custom.path, STAGES)
        stages.append((stage, custom.role))
    return stages


def _claim_configuration(
    settings: Settings,
    bus: Bus,
    models: RoleModels,
    constitution: Constitution,
    stages: Sequence[str],
    replay: dict[str, Any] | None,
    evaluation: Evaluation | None,
    accept: bool,
) -> int:
    """Publish the run manifest if it is new. Return the number of the configuration in the run."""
    all_stages = describe_stages(settings, constitution, models)
    if evaluation:
        all_stages["respond"] = {**all_stages["respond"], **evaluation.describe()}
    evaluation_fields = evaluation.to_manifest_fields() if evaluation else None
    configuration = claim_configuration(
        bus,
        settings.run.id,
        {name: all_stages[name] for name in stages},
        all_stages,
        lambda claimed: make_run_manifest(settings, constitution, replay, claimed.to_manifest_fields(), evaluation_fields),
        accept=accept,
        name_option="--as NAME" if replay else "--name NAME" if evaluation else "--run NAME",
        may_accept=evaluation is None,
    )
    return configuration.number


def _check_servers(models: RoleModels, roles: Sequence[str]) -> None:
    """Send one request to each model server of these roles. Log what is wrong; the stages wait until the server is available."""
    for spec in dict.fromkeys(models.get_spec(role) for role in roles):
        if not is_endpoint(spec):
            continue
        endpoint: Any = models.get_model_by_spec(spec)  # an Endpoint, because its setting is the address of a server
        try:
            endpoint.check_reachable()
        except ModelUnreachable as error:
            logger.warning("%s", "; ".join(str(error).splitlines()))


def _make_worker(
    settings: Settings,
    bus: Bus,
    models: RoleModels,
    stage: Stage,
    role: str | None,
    instance: str,
    budget: Budget | None,
    tracing: Tracing | None,
    had_fault: bool,
    run_start: StartPositions | None,
    pacing: PacedAdmission | None,
) -> Worker:
    run_id, options = settings.run.id, settings.worker
    return Worker(
        bus,
        stage,
        models.get_executor(role),
        run_id=run_id,
        instance=instance,
        limits=WorkerLimits(
            max_in_flight=options.max_in_flight,
            max_in_flight_bytes=options.max_bytes,
            max_uncommitted=options.max_uncommitted,
            max_attempts=options.max_attempts,
            retry_timeout_s=options.retry_timeout_s,
            max_consecutive_dead_letters=options.max_consecutive_dead_letters,
        ),
        journal=CrashJournal(
            settings.folder / "journal" / f"{run_id}.{stage.name}",
            instance,
            topic_ids=bus.topic_ids(stage.inputs),
            had_fault=had_fault,
        ),
        can_admit=partial(budget.can_admit, stage.name) if budget else lambda: True,
        trace=tracing.make_stage_tracer(stage.name, run_id) if tracing else skip_tracing,
        run_start=run_start,
        pacing=pacing,
    )


def make_pacing(stage: str, settings: Settings, bus: Bus) -> PacedAdmission | None:
    """Return what holds new prompts while a training loop wants no further completions. Only the stage respond has it."""
    return PacedAdmission(bus, settings.respond.num_completions) if stage == "respond" else None


class _SinkService:
    """Runs the sink of a host. If another process writes to the same database, waits until that process ends.

    `sinks` is empty during this wait.
    """

    def __init__(self, settings: Settings, bus: Bus) -> None:
        self.settings, self.bus = settings, bus
        self.lock = open_sink_lock(settings)
        self.sinks: list[Sink] = []
        self.lease: ServiceLease | None = None  # held while the sink writes; not on standby
        self.call_trackers: list[CallTracker] = []
        if self.lock.try_acquire():
            try:
                self.open_sink()
            except BaseException:
                self.lock.close()  # another try in this process, or a repair, must find the lock free
                raise
            self.call_trackers.append(self.sinks[0].call_tracker)
        else:
            holder = self.lock.get_holder_pid()
            logger.warning("the sink of process %s writes to this database; the sink of this process is on standby", holder)

    def open_sink(self) -> None:
        options = self.settings.sink
        store = open_store(self.settings)
        self.sinks.append(Sink(self.bus, store, max_rows=options.max_rows))
        self.lease = ServiceLease(self.settings.folder, "sink")

    def run(self, stop: threading.Event) -> None:
        while not self.sinks:
            if self.lock.try_acquire():
                self.open_sink()
            elif stop.wait(_STANDBY_POLL_INTERVAL_S):
                return
        self.sinks[0].run(stop)

    def close(self) -> None:
        if self.lease:
            self.lease.close()
        self.lock.close()
