"""Reasoning is separated from responses, and texts that only mention its marks stay unchanged."""

import duckdb
import pytest

from engine.eligibility import find_rejection_reason
from engine.models.chat_template import encode_prompt, format_prompt
from engine.models.interface import GenerationRequest
from engine.models.reasoning import (
    REASONING_MACROS,
    contains_reasoning,
    has_reasoning_marks,
    separate_reasoning,
)
from engine.notices import NOTICES
from schemas.records import ChatMessage, FinishReason, RejectionReason
from tests.support.chat_model import make_chat_model, script_completion

SEPARATED = {
    "tags": ("<think>The user asks.</think>\n\nParis.", "The user asks.", "Paris."),
    "empty tags": ("<think>\n\n</think>\n\nParis.", "", "Paris."),
    "closing tag alone": ("The user asks.\nI know it.\n</think>\n\nParis.", "The user asks.\nI know it.", "Paris."),
    "attached closing tag": ("I know it.</think>Paris.", "I know it.", "Paris."),
    "other tags": ("<thought>I know it.</thought>Paris.", "I know it.", "Paris."),
    "capital tags": ("<THINKING>I know it.</THINKING> Paris.", "I know it.", "Paris."),
    "namespace": ("<seed:think>I know it.</seed:think>Paris.", "I know it.", "Paris."),
    "nested": ("<think>a <think>b</think> c</think>\nParis.", "a b c", "Paris."),
    "square brackets": ("[THINK]I know it.[/THINK]Paris.", "I know it.", "Paris."),
    "small letters in square brackets": ("[thinking]I know it.[/thinking]Paris.", "I know it.", "Paris."),
    "triangles": ("◁think▷I know it.◁/think▷Paris.", "I know it.", "Paris."),
    "channels": (
        "<|channel|>analysis<|message|>I know it.<|end|><|start|>assistant<|channel|>final<|message|>Paris.<|return|>",
        "I know it.",
        "Paris.",
    ),
    "only the final channel": ("<|channel|>final<|message|>Paris.", "", "Paris."),
    "channels without special tokens": ("analysisThe user asks.assistantfinalParis.", "The user asks.", "Paris."),
    "one channel": ("<|channel>thought\nI know it.<channel|>Paris.", "I know it.", "Paris."),
    "unused tokens": ("<unused94>thought\nI know it.<unused95>Paris.", "I know it.", "Paris."),
    "wrapped response": ("<think>I know it.</think>\n<answer>\nParis.\n</answer>", "I know it.", "Paris."),
    "marked response": (
        "<|START_THINKING|>I know it.<|END_THINKING|><|START_RESPONSE|>Paris.<|END_RESPONSE|>",
        "I know it.",
        "Paris.",
    ),
    "attribute and spaces": ('<thinking time="3" >I know it.</thinking > Paris.', "I know it.", "Paris."),
    "reflection": ("<reflection>I know it.</reflection>\nParis.", "I know it.", "Paris."),
    "mixed case": ("<Thought>I know it.</Thought>\n<Output>Paris.</Output>", "I know it.", "Paris."),
    "special token with a slash": ("<|thinking|>I know it.<|/thinking|>Paris.", "I know it.", "Paris."),
    "box": ("<think>I know it.</think><|begin_of_box|>Paris.<|end_of_box|>", "I know it.", "Paris."),
    "sections": ("Here is my thought process:\nI know it.\n\nHere is my response:\nParis.", "I know it.", "Paris."),
    "process": ("<thought_process>I know it.</thought_process>Paris.", "I know it.", "Paris."),
    "two words before the name": ("<chain_of_thought>I know it.</chain_of_thought>Paris.", "I know it.", "Paris."),
    "Anthropic": ("<antThinking>I know it.</antThinking>Paris.", "I know it.", "Paris."),
    "working out": ("<start_working_out>I know it.<end_working_out><SOLUTION>Paris.</SOLUTION>", "I know it.", "Paris."),
    "start and end tokens": ("<|start_thinking|>I know it.<|end_thinking|>Paris.", "I know it.", "Paris."),
    "details of Open WebUI": ('<details type="reasoning" done="true">\nI know it.\n</details>\nParis.', "I know it.", "Paris."),
    "after a first word": ("Okay. <think>The user asks.</think>\n\nParis.", "Okay. The user asks.", "Paris."),
    "after a first line": ("Sure!\n<think>\nThe user asks.\n</think>\nParis.", "Sure!\n\nThe user asks.", "Paris."),
}
CUT = {
    "tag": "<think>\nThe user asks",
    "after a first word": "Okay <think>\nThe user asks",
    "square bracket": "[THINK]The user asks",
    "channel": "<|channel|>analysis<|message|>The user asks",
    "channel without special tokens": "analysisThe user asks",
    "sections": "Here's my thought process: The user asks",
    "details": '<details type="reasoning">\nThe user asks',
}
PROSE = {
    "in a sentence": "Models write <think> before they answer and </think> after.",
    "tags": "Wrap the thoughts in <think> and </think> tags, or in <think></think> alone.",
    "inline code": "Use `<think>` and `</think>`.",
    "code block": "The format is:\n```\n<think>\nplan\n</think>\n```\nThat is all.",
    "quoted": 'It stops at "</think>". Then the answer follows.',
    "end of a sentence": "End the reasoning with </think>",
    "analysis, perhaps a part of the response": "<analysis>It is a capital.</analysis>\nParis.",
    "escaped tags": "&lt;think&gt;I know it.&lt;/think&gt; Paris.",
    "heading": "**Thinking process:**\n1. It is a capital.\n\nParis.",
    "end of a line": "The closing tag is </think>\nand the opening tag is <think>\nin most models.",
}
REMAINING = {
    "late block": "Here is a long answer, with many more words than that.\n<think>\nhm\n</think>\nIndeed.",
    "second block": "<think>a</think>\nHello.\n<think>\nb\n</think>\nWorld.",
}


@pytest.mark.parametrize("name", SEPARATED)
def test_reasoning_is_separated_from_the_response(name):
    text, reasoning, response = SEPARATED[name]
    separated = separate_reasoning(text)
    assert (separated.reasoning, separated.response, separated.ends_in_reasoning) == (reasoning, response, False)


@pytest.mark.parametrize("name", CUT)
def test_cut_reasoning_is_no_response(name):
    separated = separate_reasoning(CUT[name])
    assert separated.response == "" and separated.ends_in_reasoning and separated.reasoning.endswith("The user asks")


@pytest.mark.parametrize("name", PROSE)
def test_text_about_marks_is_unchanged_usable_and_marked(name):
    text = PROSE[name]
    assert separate_reasoning(text).response == text and separate_reasoning(text).reasoning == ""
    assert has_reasoning_marks(text) and not contains_reasoning(text)
    assert find_rejection_reason(text, FinishReason.STOP) is RejectionReason.NONE


@pytest.mark.parametrize("name", REMAINING)
def test_remaining_reasoning_makes_a_response_unusable(name):
    response = separate_reasoning(REMAINING[name]).response
    assert find_rejection_reason(response, FinishReason.STOP) is RejectionReason.REASONING


def test_texts_without_marks_are_unchanged():
    for text in (
        "",
        " Paris. \n",
        "Analysis of the river: long.",
        "a < b and b > c",
        "<b>bold</b>",
        "I think so.",
        "<details>\nx\n</details>\ny",
    ):
        assert separate_reasoning(text).response == text and not has_reasoning_marks(text)


def test_open_reasoning_ends_at_the_first_closing_mark():
    assert separate_reasoning("hm</think>Paris.", is_open=True).response == "Paris."
    assert separate_reasoning("it writes `</think>` at the end\n</think>\nParis.", is_open=True).response == "Paris."
    assert separate_reasoning("The user asks", is_open=True).ends_in_reasoning


def test_sql_agrees_with_python():
    connection = duckdb.connect()
    for macro in REASONING_MACROS:
        connection.execute(macro)
    texts = [*(text for text, _, _ in SEPARATED.values()), *CUT.values(), *PROSE.values(), *REMAINING.values(), "", "plain"]
    rows = connection.execute("SELECT has_reasoning_marks(t), contains_reasoning(t) FROM (SELECT unnest(?) AS t)", [texts])
    assert rows.fetchall() == [(has_reasoning_marks(text), contains_reasoning(text)) for text in texts]


# Local models

QWEN = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
)
OPENED = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{{ 'assistant: <think>\n' }}"
HARMONY = "{% for m in messages %}<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>{% endfor %}<|start|>assistant"
MESSAGES = (ChatMessage(role="user", content="Hi"),)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_chat_model(tmp_path_factory.mktemp("chat-model"))


@pytest.mark.parametrize(
    ("template", "off", "on"),
    [
        (QWEN, "assistant\n<think>\n\n</think>\n\n", "assistant\n"),
        (OPENED, "assistant: <think>\n\n</think>\n\n", "assistant: <think>\n"),
        (OPENED.replace("<think>", "<|think|>"), "assistant: <|think|>\n\n<|/think|>\n\n", "assistant: <|think|>\n"),
        (HARMONY, "<|start|>assistant<|channel|>final<|message|>", "<|start|>assistant"),
    ],
)
def test_prompt_turns_thinking_off_or_on(model, monkeypatch, template, off, on):
    monkeypatch.setattr(model.tokenizer, "chat_template", template)
    assert format_prompt(model.tokenizer, MESSAGES).endswith(off)
    assert format_prompt(model.tokenizer, MESSAGES, thinking=True).endswith(on)
    assert format_prompt(model.tokenizer, MESSAGES, "Answer: (", thinking=True).endswith(off + "Answer: (")
    assert encode_prompt(model.tokenizer, MESSAGES) == model.encode_request(GenerationRequest(MESSAGES), 1)  # training agrees


def generate(model, **options):
    return model.generate([GenerationRequest(MESSAGES)], **options)[0][0]


@pytest.mark.parametrize(
    ("template", "text"),
    [
        (OPENED, "I know it.\n</think>\n\nParis."),
        (QWEN, "<think>\nI know it.\n</think>\n\nParis."),
        (QWEN, "[THINK]I know it.[/THINK]Paris."),
        (HARMONY, "<|channel|>analysis<|message|>I know it.<|end|><|start|>assistant<|channel|>final<|message|>Paris."),
    ],
)
def test_local_model_keeps_reasoning_apart(model, monkeypatch, template, text):
    monkeypatch.setattr(model.tokenizer, "chat_template", template)
    NOTICES.clear()
    ids = script_completion(model, monkeypatch, text)
    one = generate(model, max_tokens=20, max_thinking_tokens=100)
    assert (one.text, one.reasoning, one.finish_reason) == ("Paris.", "I know it.", "stop")
    assert one.token_ids == tuple(ids) and ("reasoning", model.id) in NOTICES.get_counts()


def test_local_model_limits_reasoning_and_response_separately(model, monkeypatch):
    monkeypatch.setattr(model.tokenizer, "chat_template", OPENED)
    script_completion(model, monkeypatch, "I know it.\n</think>\n\nParis is the capital.")
    num_reasoning = len("I know it.\n") + 1
    cut = generate(model, max_tokens=50, max_thinking_tokens=num_reasoning - 1)
    assert (cut.text, cut.ends_in_reasoning, cut.finish_reason) == ("", True, "length")
    assert len(cut.token_ids) == num_reasoning - 1
    short = generate(model, max_tokens=7, max_thinking_tokens=200)
    assert (short.text, short.reasoning, short.finish_reason) == ("Paris", "I know it.", "length")
    assert len(short.token_ids) == num_reasoning + 7


def test_local_response_without_reasoning_has_only_its_own_limit(model, monkeypatch):
    monkeypatch.setattr(model.tokenizer, "chat_template", QWEN)
    script_completion(model, monkeypatch, "Paris is the capital of France and a large city on a river.")
    one = generate(model, max_tokens=18, max_thinking_tokens=200)
    assert (one.text, one.reasoning, one.finish_reason) == ("Paris is the capit", "", "length")
