"""The checkpoint itself, run by transformers in float32: what every artifact is compared with."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from transformers.initialization import no_init_weights

from onnxpress.arrays import Floats, Ids
from onnxpress.errors import BadInputError
from onnxpress.evaluation.decoder import Decoder
from onnxpress.evaluation.encoder import Encoder
from onnxpress.evaluation.encoder_decoder import EncoderDecoder
from onnxpress.evaluation.graph import Graph
from onnxpress.evaluation.kind import Opened
from onnxpress.exporter import tasks


class TorchModel:
    """A model in torch with the interface of the sessions in `onnxpress.runtime`: `prefill`, `decode`, `encode`,
    `run`."""

    last_only = False

    def __init__(self, model: Any, *, has_encoder: bool) -> None:
        """has_encoder: whether it is an encoder-decoder, and `encode` runs the encoder alone."""
        self.model, self.has_encoder = model, has_encoder
        self._accepted = inspect.signature(model.forward).parameters
        self.vocabulary = int(getattr(model.config.get_text_config(), "vocab_size", 0))
        self._states: Any = None
        self.reset()

    def reset(self) -> None:
        self._cache: Any = None
        self._mask: Ids = np.zeros((0, 0), np.int64)

    def prefill(self, ids: Ids, mask: Ids | None = None) -> Floats:
        """See `onnxpress.runtime.decoder.DecoderSession.prefill`."""
        self.reset()
        return self._step(ids, np.ones_like(ids) if mask is None else mask)

    def decode(self, ids: Ids) -> Floats:
        return self._step(ids, np.ones_like(ids))

    def _step(self, ids: Ids, new_mask: Ids) -> Floats:
        self._mask = new_mask if self._mask.size == 0 else np.concatenate([self._mask, new_mask], axis=1)
        mask = torch.from_numpy(self._mask)
        feeds: dict[str, Any] = {"past_key_values": self._cache, "use_cache": True}
        if self.has_encoder:
            feeds |= {"decoder_input_ids": torch.from_numpy(ids), **self._states}
        else:
            feeds |= {"input_ids": torch.from_numpy(ids), "attention_mask": mask}
            if "position_ids" in self._accepted:
                feeds["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        with torch.inference_mode():
            outputs = self.model(**feeds)
        self._cache = outputs.past_key_values
        return np.asarray(outputs.logits.numpy(), np.float32)

    def encode(self, ids: Any, mask: Ids | None = None) -> Any:
        """An encoder's outputs by name for `ids` [batch, length]; for an encoder-decoder, `ids` are the encoder's feeds
        and the result its hidden states."""
        if not self.has_encoder:
            return self.run({"input_ids": ids, "attention_mask": np.ones_like(ids) if mask is None else mask})
        self.reset()
        feeds = {name: torch.from_numpy(value) for name, value in ids.items()}
        with torch.inference_mode():
            self._states = {"encoder_outputs": self.model.get_encoder()(**feeds)}
        if "attention_mask" in feeds:
            self._states["attention_mask"] = feeds["attention_mask"]
        return np.asarray(self._states["encoder_outputs"].last_hidden_state.numpy(), np.float32)

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """All tensor outputs by transformers' names."""
        given = {name: torch.from_numpy(value) for name, value in feeds.items() if name in self._accepted}
        with torch.inference_mode():
            outputs = self.model(**given)
        return {name: value.float().numpy() for name, value in outputs.items() if isinstance(value, torch.Tensor)}


class TorchReference(TorchModel):
    """A checkpoint in float32.

    `checkpoint` is a Hugging Face folder or an `exporter.checkpoint.Checkpoint`. Weights are memory-mapped by
    safetensors and held in float32.
    """

    def __init__(self, checkpoint: Any, *, task: str | None = None) -> None:
        is_folder = isinstance(checkpoint, str | Path)
        self.folder = Path(checkpoint) if is_folder else Path(checkpoint.folder)
        self.name = self.folder.name if is_folder else str(checkpoint.source.name)
        if not (self.folder / "config.json").is_file():
            raise BadInputError(f"{self.folder} has no config.json", hint="give a checkpoint folder, or an ONNX file")
        config = transformers.AutoConfig.from_pretrained(self.folder, local_files_only=True)
        self.config: Mapping[str, Any] = config.to_dict()
        task = (task or getattr(checkpoint, "task", None) or tasks.infer_task(config)).removesuffix("-with-past")
        model_class = tasks.model_class(config, task)
        transformers.utils.logging.disable_progress_bar()
        attention = tasks.reference_attention(config)
        options = {"dtype": torch.float32, "local_files_only": True, "attn_implementation": attention}
        try:
            if any(self.folder.glob("*.safetensors")):
                model = model_class.from_pretrained(self.folder, **options)
            elif is_folder:
                raise BadInputError(f"{self.folder} has no safetensors weights and no ONNX graph")
            else:
                arrays = {name: np.array(tensor.numpy(), np.float32) for name, tensor in checkpoint.tensors.items()}
                weights = {name: torch.from_numpy(array) for name, array in arrays.items()}
                with no_init_weights():  # random ones would take as much memory again
                    model = model_class._from_config(config, dtype=torch.float32, attn_implementation=attention)
                missing = set(model.load_state_dict(weights, strict=False, assign=True).missing_keys)
                model.tie_weights()
                tied = getattr(model, "all_tied_weights_keys", None) or getattr(model, "_tied_weights_keys", None) or ()
                if missing - set(tied):
                    raise BadInputError(f"{self.name} lacks the weight {min(missing - set(tied))}")
        except (ValueError, RuntimeError, KeyError, OSError) as error:
            reason = " ".join(str(error).split())[:300]
            raise BadInputError(f"transformers cannot load {self.name}: {reason}") from error
        self.kind = kind_of(task, config)
        super().__init__(model.eval(), has_encoder=self.kind is EncoderDecoder)


def open_in_torch(checkpoint: Any, *, task: str | None = None) -> Opened:
    """Open a Hugging Face folder or a `Checkpoint`, to be compared with. Raises BadInputError where it cannot be
    loaded."""
    model = TorchReference(checkpoint, task=task)
    return model.kind(model.name, model, model.config, model.folder)


def kind_of(task: str, config: Any) -> type[Opened]:
    """Tell the kind of model that a task makes of an architecture."""
    if task == "text-generation":
        return Decoder
    if config.is_encoder_decoder:
        return EncoderDecoder
    if task == "automatic-speech-recognition" or getattr(config, "vocab_size", None) is None:
        return Graph  # samples or pixels; a vocabulary is of letters to recognise
    return Encoder
