"""The maths of quantization: pure numpy, no graphs. Weights are float32 [in, out], as MatMul has them.

block_format     codes in blocks, as MatMulNBits and DequantizeLinear take them
grids            scale and zero point of a block: rounding to them, fitting them
least_squares    round to nearest; grids with the least squared error, weighted or not
reencoding       exact codes for weights that lay on a grid of blocks before
hqq              grids that tolerate outliers, from the weights alone
gptq             rounding that makes up for the errors already made, from E[xxᵀ]
channels         a scale per output channel; integer biases
channel_scaling  exact rescaling of input channels: SmoothQuant, AWQ, equalization
outliers         input channels to leave in floating point: LLM.int8()
ranges           the range to quantize an activation to, from its histogram

Imports numpy and `optimizers.fitting`: no graph.
"""
