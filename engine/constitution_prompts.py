"""Add the constitution to a prompt of the policy: for the teacher of self-distillation, and for contrast pairs.

The constitution is part of the last user message (in front of its text), or of the system message. Many chat templates add a
default system message if a dialogue has none. The policy is sampled with this message, so the prompt with the constitution has it
too: its text is read from the template, and the constitution follows it. Otherwise the two prompts would differ by more than the
constitution. Control tokens in the constitution and in the dialogue are broken up (`engine.models.chat_template`).

The texts that introduce the constitution are here, and nowhere else.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from constitutions.loader import Constitution, CritiquePrinciple
from engine.errors import PermanentRecordError, UsageError
from engine.models.chat_template import encode_prompt, format_prompt
from schemas import ids
from schemas.records import ChatMessage

ConstitutionRole = Literal["user", "system"]

# A paragraph of prose describes how to answer. A critique principle has a request to rewrite a bad answer, so the model is asked
# for an answer that does not need it. A single paragraph has no header and no list mark: a small model copies the mark, and answers
# about the header. (SmolLM2 with "Answer in one short sentence.": 21 of 24 responses are one sentence, and 13 to 20 with headers.)
_PROSE_HEADER = "Follow these principles when you answer. Do not mention them."
_CORRECTIONS_HEADER = "Write an answer that needs none of these corrections. Do not mention them."
_SINGLE = "a single paragraph alone"  # part of the hash only
_PLACEHOLDER = "CHARTER-SYSTEM-MESSAGE"
HEADERS_HASH = ids.compute_fingerprint("template", template=f"{_PROSE_HEADER}\n{_CORRECTIONS_HEADER}\n{_SINGLE}", prefill="")


def select_principles(
    constitution: Constitution, prompt_id: str, num_principles: int, tags: Sequence[str] = ()
) -> Sequence[CritiquePrinciple]:
    """Return the principles that are added to a prompt, in the order of the constitution.

    If `num_principles` is 0, these are all principles that apply to the tags of the prompt. Otherwise sample this number of them. The
    sample depends only on the prompt, so all completions of a prompt have the same principles.
    """
    count = num_principles or len(constitution.critique)
    sampled = constitution.sample_critique_principles(ids.compute_seed(prompt_id), tags, count)
    return [principle for principle in constitution.critique if principle in sampled]


def render_principles(constitution: Constitution, principles: Sequence[CritiquePrinciple]) -> str:
    """Return the text that states the principles to the model."""
    if constitution.prose and len(principles) == 1:
        (paragraph,) = (paragraph for paragraph in constitution.prose if paragraph.id == principles[0].id)
        return paragraph.text
    texts = {paragraph.id: paragraph.text for paragraph in constitution.prose}
    header = _PROSE_HEADER if constitution.prose else _CORRECTIONS_HEADER
    lines = [f"- {texts.get(principle.id) or f'{principle.name}: {principle.revision_prompt}'}" for principle in principles]
    return "\n".join([header, *lines])


def add_principles(
    tokenizer: Any,
    messages: Sequence[ChatMessage],
    text: str,
    role: ConstitutionRole,
    setting: str = "distill.constitution_role",
) -> tuple[ChatMessage, ...]:
    """Return the dialogue with `text` in its last user message or in its system message. `setting` is named in errors.

    Only the role "system" needs the tokenizer; None means that the model is on a server. Raise UsageError if the dialogue has no
    user message, or if the chat template has no system messages.
    """
    if role == "system":
        return _add_to_system_message(tokenizer, messages, text, setting)
    place = next((i for i in reversed(range(len(messages))) if messages[i].role == "user"), None)
    if place is None:
        raise UsageError(
            "a prompt has no user message",
            "the constitution is added to the last user message",
            f'set {setting} = "system"',
        )
    message = messages[place].model_copy(update={"content": f"{text}\n\n{messages[place].content}"})
    return (*messages[:place], message, *messages[place + 1 :])


def encode_teacher_prompt(tokenizer: Any, messages: Sequence[ChatMessage], text: str, role: ConstitutionRole) -> list[int]:
    """Return the token ids of the prompt of the teacher of self-distillation (see `add_principles`)."""
    return encode_prompt(tokenizer, add_principles(tokenizer, messages, text, role))


def _add_to_system_message(tokenizer: Any, messages: Sequence[ChatMessage], text: str, setting: str) -> tuple[ChatMessage, ...]:
    has_system_message = messages[0].role == "system"
    if tokenizer is None and not has_system_message:
        raise UsageError(
            "the default system message of the model is unknown",
            "only the chat template of a local model can be read",
            f'set {setting} = "user"',
        )
    present = messages[0].content if has_system_message else read_default_system_message(tokenizer, messages, setting)
    content = f"{present}\n\n{text}" if present else text
    return (ChatMessage(role="system", content=content), *messages[has_system_message:])


def read_default_system_message(
    tokenizer: Any, messages: Sequence[ChatMessage], setting: str = "distill.constitution_role"
) -> str:
    """Return the system message that the chat template adds to a dialogue without one. Return "" if it adds none.

    The dialogue is formatted without changes, and with a placeholder as its system message. The text at the place of the
    placeholder is the default. Raise UsageError if the chat template rejects or ignores a system message.
    """
    placeholder = ChatMessage(role="system", content=_PLACEHOLDER)
    try:
        before, found, after = format_prompt(tokenizer, (placeholder, *messages)).partition(_PLACEHOLDER)
    except PermanentRecordError as error:
        raise _make_no_system_message_error(tokenizer, error.why, setting) from error
    if not found:
        why = "it ignores them, so the constitution would change nothing"
        raise _make_no_system_message_error(tokenizer, why, setting)
    plain = format_prompt(tokenizer, messages)
    is_around = plain.startswith(before) and plain.endswith(after) and len(before) + len(after) <= len(plain)
    return plain[len(before) : len(plain) - len(after)] if is_around else ""


def _make_no_system_message_error(tokenizer: Any, why: str, setting: str) -> UsageError:
    return UsageError(f"the chat template of {tokenizer.name_or_path} has no system messages", why, f'set {setting} = "user"')
