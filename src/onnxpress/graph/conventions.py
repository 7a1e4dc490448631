"""What the graphs of an encoder-decoder are called, as stems of their files; the names are optimum's."""

ENCODER, DECODER, DECODER_WITH_PAST = "encoder_model", "decoder_model", "decoder_with_past_model"
DECODER_MERGED = "decoder_model_merged"
"""Both decoders in one graph: made when an artifact is written, see `onnxpress.graph.merged_decoder`."""
