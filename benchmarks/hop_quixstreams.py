"""This file has the stage that `benchmarks.hop` measures. It runs the stage in an exactly-once hop of quixstreams (librdkafka).

`benchmarks.hop` runs this file in a separate virtual environment. This environment has quixstreams but not kafka-python, so the
file imports only `schemas` from Charter. Charter's own environment does not have quixstreams, so quixstreams is imported inside
`main`.
"""

from __future__ import annotations

import json
import sys

from schemas.codec import decode_record, encode_record
from schemas.records import Completion, Prompt, Response


def make_response(prompt: Prompt) -> Response:
    """Return a response whose only completion is the prompt's content. The response is about as large as the prompt."""
    return Response(
        record_id=prompt.record_id,
        parent_ids=[prompt.record_id],
        prompt_id=prompt.prompt_id,
        run_id=prompt.run_id,
        stage="respond",
        messages=[],
        source=prompt.source,
        completions=[Completion(index=0, text=prompt.messages[0].content)],
    )


def main(servers: str, source: str, target: str, group: str, count: int, batch: int, interval_s: float) -> None:
    from quixstreams import Application

    app = Application(
        broker_address=servers,
        consumer_group=group,
        auto_offset_reset="earliest",
        processing_guarantee="exactly-once",
        commit_every=batch,
        commit_interval=interval_s,
        auto_create_topics=False,
        producer_extra_config={"compression.type": "lz4"},
        loglevel="WARNING",
    )
    raw = {"value_deserializer": "bytes", "key_deserializer": "bytes"}
    stream = app.dataframe(app.topic(source, **raw))
    stream = stream.apply(lambda value: encode_record(make_response(decode_record(value, Prompt))))
    stream.to_topic(app.topic(target, value_serializer="bytes", key_serializer="bytes"))
    app.run(count=count)


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
