"""Detect the language of a text with langdetect (extras `eval` and `generate`). Codes are ISO 639-1, as langdetect names them."""

from __future__ import annotations

import importlib.util
import threading
from collections.abc import Callable
from functools import cache
from typing import Any

from engine.errors import UsageError

# The languages that langdetect 1.0.9 can detect. "zh" means both of its Chinese languages.
LANGUAGES = (
    "af", "ar", "bg", "bn", "ca", "cs", "cy", "da", "de", "el", "en", "es", "et", "fa", "fi", "fr", "gu", "he", "hi", "hr", "hu",
    "id", "it", "ja", "kn", "ko", "lt", "lv", "mk", "ml", "mr", "ne", "nl", "no", "pa", "pl", "pt", "ro", "ru", "sk", "sl", "so",
    "sq", "sv", "sw", "ta", "te", "th", "tl", "tr", "uk", "ur", "vi", "zh", "zh-cn", "zh-tw",
)  # fmt: skip
_LANGUAGE_LOCK = threading.Lock()


def require_language_detector(what: str, why: str, install_command: str) -> None:
    """Raise UsageError if the package is missing that detects languages. `what` names the user of the package."""
    if importlib.util.find_spec("langdetect") is None:
        raise UsageError(f"{what} needs the package langdetect, which is not installed", why, install_command)


def detect_language(text: str) -> str:
    """Return the code of the language of a text, as langdetect names it, or "" if no language can be detected.

    The same text always has the same language, because the detector has a seed.
    """
    from langdetect.lang_detect_exception import LangDetectException

    detector = _make_detector(text)
    try:
        return str(detector.detect())
    except LangDetectException:
        return ""


def compute_language_probability(text: str, code: str, prior: float) -> float:
    """Return the probability that a text is in a language. `prior` is its probability before the text is read.

    The languages of short texts are uncertain: with a high prior, a short text counts as another language only if its letters say
    so. If no language can be detected, the result is 0.
    """
    from langdetect.lang_detect_exception import LangDetectException

    detector = _make_detector(text)
    codes = ("zh-cn", "zh-tw") if code == "zh" else (code,)
    others = [language for language in detector.langlist if language not in codes]
    priors = dict.fromkeys(codes, prior / len(codes)) | dict.fromkeys(others, (1 - prior) / len(others))
    detector.set_prior_map(priors)
    try:
        return float(sum(found.prob for found in detector.get_probabilities() if found.lang in codes))
    except LangDetectException:
        return 0.0


def _make_detector(text: str) -> Any:
    with _LANGUAGE_LOCK:  # threads would load the profiles several times
        detector = _load_detector_factory()()
    detector.append(text.lower() if text.isupper() else text)
    return detector


@cache
def _load_detector_factory() -> Callable[[], Any]:
    from langdetect.detector_factory import PROFILES_DIRECTORY, DetectorFactory

    factory = DetectorFactory()
    factory.load_profile(PROFILES_DIRECTORY)
    factory.set_seed(0)
    return factory.create
