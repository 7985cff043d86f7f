"""A data folder with an embedded log, a database and a trainer with FAKE learners."""

from charter.connect import connect_bus, open_store
from consumers.sink import Sink
from engine.bus.read import read_values
from engine.policy import read_policy_updates
from engine.worker import to_producer_record
from schemas.codec import decode_record
from schemas.records import ModelRef
from tests.chaos.crash_points import FAKE_LEARNERS, make_settings
from tests.support.records import copy_empty_database, make_chain_end, make_preference, make_response
from trainer.loop import Trainer


class Workspace:
    """A data folder with a trainer. Records that are added are in the database at once."""

    def __init__(self, folder, respond=None, **train_settings):
        (folder / "base").mkdir(parents=True, exist_ok=True)
        settings = make_settings(folder)
        train = settings.train.model_copy(update={"sft_mixture": [], "reward_mixture": []} | train_settings)
        self.settings = settings.model_copy(
            update={"train": train, "respond": settings.respond.model_copy(update=respond or {})}
        )
        copy_empty_database(folder / "charter.duckdb")
        self.bus, self.store, self.messages = connect_bus(self.settings), open_store(self.settings), []
        self.trainer = self.open()

    def open(self, **more):
        base_folder = self.settings.folder / "base"
        values = {"learners": FAKE_LEARNERS, "notify": self.messages.append} | more
        return Trainer(self.bus, self.store, self.settings, base_folder, **values)

    def reopen(self, **more):
        """Replace the trainer by one with other settings or learners."""
        self.trainer.close()
        self.trainer = self.open(**more)

    def add(self, *records):
        self.bus.publish([to_producer_record(record) for record in records])
        sink = Sink(self.bus, self.store, max_wait_s=0.05)
        while sink.step():
            pass
        sink.close()

    def add_chains(self, name, count=4):
        self.add(*(make_chain_end(f"{name}{n}", f"chain {name} {n}") for n in range(count)))

    def add_labels(self, name, count=4):
        self.add(*(make_preference(f"{name}{n}", f"pair {name} {n}", 0.7) for n in range(count)))

    def add_responses(self, name, count=4):
        """Add responses of the current policy."""
        state = self.trainer.read_state()
        version = state.policy_version
        origin = {"model": ModelRef(id="policy", revision=state.model_revisions[version]), "policy_version": version}
        responses = [make_response(f"answer {name} {n}") for n in range(count)]
        completion_origin = {"policy_version": version}
        self.add(
            *(
                response.model_copy(
                    update=origin | {"completions": [response.completions[0].model_copy(update=completion_origin)]}
                )
                for response in responses
            )
        )

    def read_records(self, record):
        return [decode_record(value, record) for value in read_values(self.bus, record.topic)]

    def list_policies(self):
        return [(u.version, u.phase, u.restored_version) for u in read_policy_updates(self.bus) if u.kind.value == "POLICY"]

    def close(self):
        self.trainer.close()
        self.bus.close()
