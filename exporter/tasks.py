"""Tasks by optimum's names, and which transformers class serves each."""

from __future__ import annotations

from typing import Any

from onnxpress.errors import UnsupportedModelError, UsageError

AUTO_MAPPINGS: dict[str, tuple[str, ...]] = {
    "text-generation": ("MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",),
    "text2text-generation": ("MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",),
    "automatic-speech-recognition": ("MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES", "MODEL_FOR_CTC_MAPPING_NAMES"),
    "feature-extraction": ("MODEL_MAPPING_NAMES",),
    "fill-mask": ("MODEL_FOR_MASKED_LM_MAPPING_NAMES",),
    "text-classification": ("MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",),
    "token-classification": ("MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES",),
    "question-answering": ("MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES",),
    "image-classification": ("MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES",),
    "audio-classification": ("MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES",),
    "zero-shot-image-classification": ("MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING_NAMES",),
}
"""optimum's task name -> the tables of transformers' auto classes, in order of preference."""

_SUFFIXES = {
    "ForCausalLM": "text-generation",
    "LMHeadModel": "text-generation",
    "ForMaskedLM": "fill-mask",
    "ForPreTraining": "feature-extraction",
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "ForQuestionAnswering": "question-answering",
    "ForImageClassification": "image-classification",
    "ForAudioClassification": "audio-classification",
    "ForSpeechSeq2Seq": "automatic-speech-recognition",
    "ForCTC": "automatic-speech-recognition",
    "MTModel": "text2text-generation",
    "Model": "feature-extraction",
}
_BY_TYPE = {
    "whisper": "automatic-speech-recognition",
    "clip": "zero-shot-image-classification",
    "vit": "image-classification",
}


def infer_task(config: Any) -> str:
    """The task of a checkpoint, from the class that its config names."""
    architectures = config.architectures or []
    if architectures and architectures[0].endswith("ForConditionalGeneration"):
        return _BY_TYPE.get(config.model_type, "text2text-generation")
    for suffix, task in _SUFFIXES.items():
        if architectures and architectures[0].endswith(suffix):
            return _BY_TYPE.get(config.model_type, task) if suffix == "Model" else task
    for task in ("text-generation", "text2text-generation", "automatic-speech-recognition", "feature-extraction"):
        if _class_name(config, task) is not None:
            return task
    raise UnsupportedModelError(
        f"cannot tell the task of a {config.model_type!r} checkpoint",
        hint=f"name it with --task: {', '.join(AUTO_MAPPINGS)}",
    )


def model_class(config: Any, task: str) -> Any:
    """The transformers class that serves `task` for this config. Raises UsageError or UnsupportedModelError."""
    if task not in AUTO_MAPPINGS:
        raise UsageError(f"unknown task {task!r}", hint=f"one of {', '.join(AUTO_MAPPINGS)}")
    import transformers

    name = _class_name(config, task)
    if name is None:
        raise UnsupportedModelError(
            f"transformers has no {task} model of type {config.model_type!r}", hint="try another --task"
        )
    return getattr(transformers, name)


def reference_attention(config: Any) -> str:
    """The attention implementation of transformers that a model is compared with: the plain one, unless it is wrong.

    Falcon's plain attention adds ALiBi to scores whose mask holds it already; its default one (`sdpa`) does not.
    """
    return "sdpa" if getattr(config, "model_type", None) == "falcon" else "eager"


def _class_name(config: Any, task: str) -> str | None:
    from transformers.models.auto import modeling_auto

    for table in AUTO_MAPPINGS[task]:
        name = getattr(modeling_auto, table).get(config.model_type)
        if name is not None:
            names = [name] if isinstance(name, str) else list(name)
            preferred = [name for name in names if name in (config.architectures or [])]
            return str((preferred or names)[0])
    return None
